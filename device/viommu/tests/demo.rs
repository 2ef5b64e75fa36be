//! The demo in both forms. What it finds out it checks itself; here its facts are held against the specification.
#![allow(clippy::unwrap_used, reason = "tests")]

mod program;

use std::sync::LazyLock;

use program::viommu;
use serde_json::{Value, json};

/// The facts, with the default number of buffers.
static FACTS: LazyLock<Value> = LazyLock::new(|| facts(&[]));

fn facts(options: &[&str]) -> Value {
    let output = viommu(&[&["demo", "--json"], options].concat(), b"");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn sent(requests: u64, notifications: u64, bytes: u64) -> Value {
    json!({"requests": requests, "notifications": notifications, "bytes": bytes})
}

#[test]
fn text_tells_all_scenes_in_plain_characters() {
    let output = viommu(&["demo"], b"");
    assert!(output.status.success());
    assert!(output.stderr.is_empty());
    let text = String::from_utf8(output.stdout).unwrap();
    for scene in 1..=8 {
        assert_eq!(text.lines().filter(|line| line.starts_with(&format!("{scene}. "))).count(), 1, "{scene}");
    }
    assert!(text.contains("STALE"));
    assert!(text.contains("group 7: INVALID"));
    assert!(text.trim_end().ends_with("Everything came out as it must."));
    assert!(text.bytes().all(|byte| byte == b'\n' || (b' '..=b'~').contains(&byte)));
    assert!(text.lines().all(|line| line.len() <= 100 && line.trim_end() == line), "{text}");
}

/// Every address, and what stands there, is in both.
#[test]
fn text_and_json_agree() {
    let output = viommu(&["demo"], b"");
    let text = String::from_utf8(output.stdout).unwrap();
    let mut strings = Vec::new();
    collect_strings(&FACTS, &mut strings);
    strings.retain(|string| string.starts_with("0x") || string.starts_with("process "));
    assert!(strings.len() > 50);
    for string in strings {
        assert!(text.contains(&string), "{string}");
    }
}

fn collect_strings(value: &Value, strings: &mut Vec<String>) {
    match value {
        Value::String(string) => strings.push(string.clone()),
        Value::Array(values) => values.iter().for_each(|value| collect_strings(value, strings)),
        Value::Object(fields) => fields.values().for_each(|value| collect_strings(value, strings)),
        _ => {}
    }
}

#[test]
fn nothing_passes_before_the_guest_says_so() {
    let fault = &FACTS["machine"]["at_first"];
    assert_eq!(fault["architecture"], "unattached");
    assert_eq!(fault["reason"], "DOMAIN");
    assert_eq!(
        (&fault["endpoint"], &fault["pasid"], &fault["address"]),
        (&json!(8), &Value::Null, &json!("0x40000000"))
    );
}

#[test]
fn probe_is_one_request_with_the_handover_in_its_answer() {
    let probe = &FACTS["probe"];
    // 72 bytes of request; 512 bytes of properties and 4 of tail.
    assert_eq!(probe["sent"], sent(1, 1, 72 + 512 + 4));
    assert_eq!(probe["pasid_bits"], 20);
    assert_eq!(probe["table_formats"], json!([1, 128]));
    assert_eq!(probe["reserved"], json!([{"kind": "msi", "first": "0x8000000", "last": "0x80fffff"}]));
}

#[test]
fn one_request_hands_all_processes_over() {
    for (hardware, endpoint, format, processes) in [("smmuv3", 8, 1, 3), ("vtd", 16, 0x81, 2)] {
        let handover = &FACTS[hardware]["handover"];
        assert_eq!(handover["endpoint"], endpoint);
        assert_eq!(handover["format"], format);
        assert_eq!(handover["sent"], sent(1, 1, 124 + 4));
        assert_eq!(handover["sent_for_copies"], sent(0, 0, 0));
        let list = handover["processes"].as_array().unwrap();
        assert_eq!(list.len(), processes);
        let mut pages: Vec<&Value> =
            list.iter().flat_map(|process| process["pages"].as_array().unwrap()).collect();
        pages.sort_by_key(|page| page.to_string());
        pages.dedup();
        assert_eq!(pages.len(), 2 * processes, "each process has pages of its own behind the same pointer");
        for (index, process) in list.iter().enumerate() {
            assert_eq!(process["pasid"], index + 1);
            let name = process["name"].as_str().unwrap();
            assert_eq!(process["text"], format!("process {name}, page 1"));
            assert_eq!(process["copied"], 8192);
        }
    }
}

#[test]
fn a_stale_translation_shows_until_it_is_invalidated() {
    for (hardware, unmapped) in [("smmuv3", "F_TRANSLATION"), ("vtd", "0x71")] {
        let change = &FACTS[hardware]["change"];
        assert_eq!(change["sent_for_removal"], sent(0, 0, 0));
        assert_eq!(change["table_says"], unmapped);
        assert_eq!(change["stale"], change["before"]);
        assert_eq!(change["sent_for_invalidation"], sent(1, 1, 60 + 4));
        assert_eq!(change["gone"]["architecture"], unmapped);
        assert_eq!(change["gone"]["address"], change["pointer"]);
        assert_eq!(change["gone"]["pasid"], change["pasid"]);
        assert_eq!(change["sent_for_new_mapping"], sent(0, 0, 0));
        assert_ne!(change["after"]["page"], change["before"]["page"]);
        assert_ne!(change["after"]["text"], change["before"]["text"]);
    }
}

#[test]
fn faults_arrive_as_events_under_the_names_of_the_architecture() {
    for (hardware, endpoint, pasid, names) in [
        ("smmuv3", 8, 3, ["F_TRANSLATION", "F_PERMISSION", "C_BAD_CD"]),
        ("vtd", 16, 2, ["0x71", "0x85", "0x59"]),
    ] {
        let faults = &FACTS[hardware]["faults"];
        let events = faults["events"].as_array().unwrap();
        let expected = [
            ("write", pasid, "0x7f00dead0000", "MAPPING"),
            ("write", pasid, "0x7f0000000000", "MAPPING"),
            ("read", pasid + 1, "0x7f0000000000", "UNKNOWN"),
        ];
        assert_eq!(events.len(), expected.len());
        for ((event, name), (access, pasid, address, reason)) in events.iter().zip(names).zip(expected) {
            assert_eq!(event["architecture"], name);
            assert_eq!(event["endpoint"], endpoint);
            assert_eq!(event["access"], access);
            assert_eq!(event["pasid"], pasid);
            assert_eq!(event["address"], address);
            assert_eq!(event["reason"], reason);
        }
        assert_eq!(faults["copied_afterwards"], 8192);
    }
}

#[test]
fn a_device_waits_for_memory_and_a_killed_process_is_gone() {
    for (index, endpoint, format, refusal) in [(0, 10, 1, "C_BAD_CD"), (1, 17, 2, "unattached")] {
        let facts = &FACTS["paging"][index];
        assert_eq!((&facts["endpoint"], &facts["format"]), (&json!(endpoint), &json!(format)));
        let requests = facts["requests"].as_array().unwrap();
        let of = |pasid: usize, answer: &str| {
            requests.iter().filter(|request| request["pasid"] == pasid && request["answer"] == answer).count()
        };
        // Half of the source was not there, and nothing of the target.
        for (pasid, copied, finished, granted, refused) in
            [(1, 16384, true, 2 + 4, 0), (2, 8192, false, 2, 3), (3, 16384, true, 2 + 4, 0)]
        {
            let process = &facts["processes"][pasid - 1];
            assert_eq!(process["pasid"], pasid);
            assert_eq!((&process["copied"], &process["finished"]), (&json!(copied), &json!(finished)));
            // Two pages of the source are the process's own doing.
            assert_eq!(process["pages_made"], 2 + granted);
            assert_eq!((of(pasid, "SUCCESS"), of(pasid, "INVALID")), (granted, refused), "PASID {pasid}");
        }
        assert_eq!(requests.len(), 6 + 5 + 6);
        let groups: Vec<u64> = requests.iter().map(|request| request["group"].as_u64().unwrap()).collect();
        assert!(groups.is_sorted(), "groups are numbered in rotation: {groups:?}");
        assert!(facts["switches"].as_u64().unwrap() > 16, "the device takes turns");

        let kill = &facts["kill"];
        assert_eq!((&kill["pasid"], &kill["copied"], &kill["waiting"]), (&json!(2), &json!(8192), &json!(3)));
        assert_eq!(kill["sent_for_exit"], sent(1, 1, INVALIDATE));
        let by = |who: &str| kill[who].as_u64().unwrap();
        // To take the PASID away answers what waited for it.
        assert_eq!((by("answered_by_guest"), by("answered_by_device")), (0, 3));
        assert_eq!(kill["sent_for_unbind"]["requests"], 1);
        assert_eq!(kill["refusal"], refusal);
        assert!(by("refused_afterwards") > 2);
        assert_eq!(kill["watched"], 4 * 4096);
    }
}

/// Lengths of requests by the specification, tails included.
const MAP: u64 = 36 + 4;
const UNMAP: u64 = 28 + 4;
const INVALIDATE: u64 = 60 + 4;

#[test]
fn counts_of_the_comparison_are_those_of_the_requests() {
    for (facts, buffers) in
        [(&*FACTS, 1000), (&facts(&["--buffers", "1"]), 1), (&facts(&["--buffers", "65"]), 65)]
    {
        let batches = buffers_in_batches(buffers);
        let comparison = &facts["comparison"];
        assert_eq!(comparison["buffers"], buffers);
        let expected = [
            ("MAP and UNMAP", sent(2 * buffers, 2 * buffers, buffers * (MAP + UNMAP)), 2),
            ("handover", sent(buffers, buffers, buffers * INVALIDATE), 2),
            ("MAP and UNMAP", sent(buffers + batches, 2 * batches, buffers * MAP + batches * UNMAP), 2),
            ("handover", sent(batches, batches, batches * INVALIDATE), 2),
            ("process bound once", sent(0, 0, 0), 4),
        ];
        let ways = comparison["ways"].as_array().unwrap();
        assert_eq!(ways.len(), expected.len());
        for (way, (name, sent, once)) in ways.iter().zip(expected) {
            assert_eq!(way["way"], name);
            assert_eq!(way["sent"], sent, "{name}");
            let kinds: u64 =
                way["kinds"].as_object().unwrap().values().map(|number| number.as_u64().unwrap()).sum();
            assert_eq!(kinds, sent["requests"]);
            let around = ["before", "after"].map(|time| way[time]["requests"].as_u64().unwrap());
            assert_eq!(around.iter().sum::<u64>(), once, "{name}");
            assert_eq!(way["moved"], buffers * 4096);
            assert_eq!(way["closed"], if name == "process bound once" { 0 } else { buffers });
            for unit in ["requests", "notifications", "bytes"] {
                let each = way["per_buffer"][unit].as_f64().unwrap();
                assert!((each * buffers as f64 - sent[unit].as_f64().unwrap()).abs() < 1e-6);
            }
        }
    }
}

fn buffers_in_batches(buffers: u64) -> u64 {
    buffers.div_ceil(64)
}

#[test]
fn any_number_of_buffers_fits() {
    for buffers in ["2", "3", "64", "8192"] {
        assert_eq!(facts(&["--buffers", buffers])["comparison"]["buffers"].to_string(), buffers);
    }
    for wrong in ["0", "8193", "many"] {
        assert!(!viommu(&["demo", "--buffers", wrong], b"").status.success());
    }
}

/// Hardware without caches has nothing stale to show: the demo must say so instead of telling its story.
#[test]
fn a_scene_that_comes_out_differently_ends_the_demo() {
    for form in [&["demo", "--strict"][..], &["demo", "--strict", "--json"]] {
        let output = viommu(form, b"");
        assert_eq!(output.status.code(), Some(1));
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(
            errors,
            "error: scene 4: no stale translation shows: the access was refused: F_TRANSLATION\n"
        );
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(!text.contains("4. "));
        assert!(!text.contains("Everything came out"));
    }
}
