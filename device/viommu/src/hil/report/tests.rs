use std::time::Duration;

use pgtable_formats::{Gpa, Iova, IovaRange};

use super::{head, html, junit, ktap, line, tail};
use crate::hil::outcome::{Comparison, Done, Outcome, Report, Row, Subject};
use crate::hil::picture::{Access, End, Mapping, Memory, Picture};

/// Everything that can happen, with text that has to be escaped.
fn report() -> Report {
    let device = "0000:00:02.0";
    let check = |subject: &str, name, outcome, notes: &[&str], pictures| Done {
        subject: subject.to_owned(),
        name,
        claim: "what <it> says & means",
        outcome,
        notes: notes.iter().map(ToString::to_string).collect(),
        pictures,
        elapsed: Duration::from_micros(1_500),
    };
    let row = |way, buffer, requests, ioctls| Row {
        way,
        buffer,
        buffers: 8,
        requests,
        ioctls,
        mapping: Duration::from_micros(1_600),
        dma: Duration::from_millis(800),
    };
    let page = |at| IovaRange::from_length(Iova(at), 0x1000).unwrap();
    let picture = Picture {
        title: "After <INVALIDATE>".to_owned(),
        mappings: vec![
            Mapping { range: page(0x1000), output: Gpa(0x4000_1000), write: true, stale: false },
            Mapping { range: page(0x3000), output: Gpa(0x4000_5000), write: false, stale: false },
            Mapping { range: page(0x5000), output: Gpa(0x9000_0000), write: true, stale: true },
        ],
        memory: vec![Memory {
            first: Gpa(0x4000_0000),
            last: Gpa(0x407f_ffff),
            what: "guest memory".to_owned(),
        }],
        accesses: vec![
            Access { address: Iova(0x1010), write: true, end: End::Reached(Gpa(0x4000_1010)) },
            Access { address: Iova(0x3000), write: true, end: End::Faulted },
            Access { address: Iova(0x3000), write: false, end: End::Reached(Gpa(0x4000_5000)) },
            Access { address: Iova(0x5000), write: true, end: End::Stale(Gpa(0x4000_7000)) },
            Access { address: Iova(0x9000), write: true, end: End::Faulted },
        ],
    };
    Report {
        facts: vec![("program", "viommu".to_owned()), ("kernel", "Linux \"7.3\" <aarch64>".to_owned())],
        subjects: vec![Subject { name: device.to_owned(), engine: "QEMU edu".to_owned(), endpoint: 16 }],
        checks: vec![
            check(device, "probe", Outcome::Passed, &["a note & more"], Vec::new()),
            check(device, "unmap", Outcome::Passed, &[], vec![picture]),
            check(device, "msi", Outcome::Skipped("no # interrupts".to_owned()), &[], Vec::new()),
            check(
                "a and b",
                "pair",
                Outcome::Failed("first <line>\nsecond\u{1}]]>".to_owned()),
                &[],
                Vec::new(),
            ),
        ],
        comparisons: vec![Comparison {
            subject: device.to_owned(),
            rows: vec![row("MAP and UNMAP", 4096, 16, 16), row("handover", 65536, 8, 9)],
        }],
        elapsed: Duration::from_secs(2),
    }
}

fn terminal(report: &Report) -> String {
    let mut text = head(report);
    for check in &report.checks {
        text.push_str(&line(check, 8));
    }
    text + &tail(report)
}

/// The files are made anew with `UPDATE_GOLDEN=1`, and are to be looked at then.
fn golden(name: &str, text: &str) {
    let path = format!("{}/tests/golden/hil/{name}", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::create_dir_all(std::path::Path::new(&path).parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap();
    assert!(expected == text, "{name} differs; made anew with UPDATE_GOLDEN=1 it can be compared");
}

#[test]
fn each_report_is_as_it_was() {
    let report = report();
    golden("report.txt", &terminal(&report));
    golden("report.xml", &junit(&report));
    golden("report.ktap", &ktap(&report));
    golden("report.html", &html(&report));
}

#[test]
fn nothing_checked_is_not_passed() {
    let empty = Report::default();
    assert!(tail(&empty).contains("NOTHING WAS CHECKED"));
    assert!(html(&empty).contains("Nothing was checked"));
    assert!(!tail(&empty).contains("PASSED"));
}

#[test]
fn every_element_is_closed() {
    for text in [junit(&report()), html(&report())] {
        let mut open: Vec<&str> = Vec::new();
        for tag in text.split('<').skip(1) {
            let tag = tag.split_once('>').expect("a tag that ends").0;
            let name = tag.trim_start_matches('/').split([' ', '\n', '/']).next().unwrap();
            match tag.as_bytes()[0] {
                b'?' | b'!' => {}
                b'/' => assert_eq!(open.pop(), Some(name)),
                _ if tag.ends_with('/') || ["meta", "br"].contains(&name) => {}
                _ => open.push(name),
            }
        }
        assert_eq!(open, Vec::<&str>::new());
    }
}

#[test]
fn ktap_counts_what_it_announces() {
    let text = ktap(&report());
    let results = |indent: &str| {
        let starts = |line: &&str| {
            line.starts_with(&format!("{indent}ok ")) || line.starts_with(&format!("{indent}not ok "))
        };
        text.lines().filter(starts).count()
    };
    assert_eq!((results(""), results("  ")), (2, 4));
    assert!(text.starts_with("KTAP version 1\n"));
    assert!(text.contains("\n1..2\n") && text.contains("\n  1..3\n") && text.contains("\n  1..1\n"));
    assert!(text.contains("  ok 3 msi # SKIP no # interrupts\n"));
}
