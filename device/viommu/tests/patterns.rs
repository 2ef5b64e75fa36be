//! `demo --trace` and `patterns`, as a user has them.

#![allow(clippy::unwrap_used, clippy::panic)]

mod program;

use std::path::PathBuf;

use program::viommu;
use serde_json::{Value, json};

/// A folder of its own for each test, gone with it.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("viommu-patterns-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn demo(folder: &Folder, buffers: &str) -> String {
    let trace = folder.file("trace");
    let output = viommu(&["demo", "--json", "--buffers", buffers, "--trace", &trace], b"");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    trace
}

fn patterns(arguments: &[&str]) -> String {
    let output = viommu(&[&["patterns"], arguments].concat(), b"");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn refused(arguments: &[&str]) -> String {
    let output = viommu(&[&["patterns"], arguments].concat(), b"");
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    String::from_utf8(output.stderr).unwrap()
}

/// Scene 7 of the demo compares ways to map with endpoint 9; what it counts at the driver, the trace must hold.
#[test]
fn the_demo_leaves_a_trace_that_tells_what_it_did() {
    let folder = Folder::new("demo");
    let trace = demo(&folder, "100");
    let told: Value = serde_json::from_str(&patterns(&[&trace, "--json"])).unwrap();
    assert_eq!((&told["cut"], &told["left_out"], &told["odd"]), (&Value::Null, &json!(0), &json!(0)));
    assert_eq!(told["unit"], "events");
    let endpoints = told["endpoints"].as_array().unwrap();
    let of = |id: u32| endpoints.iter().find(|facts| facts["endpoint"] == id).unwrap();

    let compared = of(9);
    // 100 buffers one by one, and in batches of 64 and 36.
    assert_eq!(compared["mappings"]["made"], 200);
    assert_eq!(compared["mappings"]["memory_again"], 100);
    assert_eq!(compared["mappings"]["uses"]["buckets"], json!([{ "first": 1, "last": 1, "count": 200 }]));
    assert_eq!(compared["mappings"]["sizes"]["median"], 4096);
    assert_eq!(compared["accesses"]["total"], 500);
    assert_eq!(compared["accesses"]["outcomes"], json!({ "passed": 500 }));
    assert_eq!(compared["accesses"]["through"], json!({ "mappings": 200, "own_table": 300 }));
    let requests = &told["requests"];
    assert_eq!(requests["sent"]["kinds"], json!({ "ATTACH": 2, "DETACH": 2, "MAP": 200, "UNMAP": 102 }));
    let handover = json!({ "ATTACH_TABLE": 2, "DETACH": 2, "INVALIDATE": 102 });
    assert_eq!(requests["handover"]["kinds"], handover);
    assert_eq!(requests["bound"]["kinds"], json!({ "ATTACH_TABLE": 2, "DETACH": 2 }));
    assert_eq!(requests["sent"]["kicks"], 2 + 2 + 100 + 100 + 2 + 2);

    // Scenes 3 to 6: processes, and accesses that are refused.
    for (id, names) in [(8, 3), (16, 2)] {
        assert_eq!(of(id)["mappings"]["made"], 0);
        assert!(of(id)["accesses"]["pasids"].as_u64().unwrap() >= names);
        assert!(of(id)["accesses"]["outcomes"]["unmapped"].as_u64().unwrap() >= 2);
    }

    // Scene 7: memory on demand. The device's accesses for three processes; of one, three are refused.
    for id in [10, 17] {
        let waits = &of(id)["waits"];
        assert_eq!((&waits["waits"], &waits["ends"]["served"]), (&json!(17), &json!(14)));
        assert_eq!(waits["by_pasid"], json!({ "1": 6, "2": 5, "3": 6 }));
        // Each moved burst is a read and a write; what waited is counted once it goes on.
        assert_eq!(of(id)["accesses"]["outcomes"]["passed"].as_u64().unwrap() - 14, 76);
    }
    assert_eq!(of(8)["waits"], Value::Null);

    // The same twice: nothing of the machine is in it.
    let first = std::fs::read(&trace).unwrap();
    demo(&folder, "100");
    assert_eq!(first, std::fs::read(&trace).unwrap());
}

#[test]
fn words_and_a_page_tell_the_story() {
    let folder = Folder::new("page");
    let trace = demo(&folder, "64");
    let page = folder.file("page.html");
    let words = patterns(&[&trace, "--html", &page, "--iotlb", "16"]);
    let flat = words.split_whitespace().collect::<Vec<_>>().join(" ");
    for sentence in [
        "Exactly one access went through each.",
        "64 of the MAPs (50 %) were for memory that had been mapped before",
        "an IOTLB of 16 pages would have answered",
        "Had the driver handed its page tables over",
        "Its device met no page 17 times, and waited: 14 ended with a page.",
        "What it means for handover: the 56 KiB of memory",
    ] {
        assert!(flat.contains(sentence), "{sentence}\n{words}");
    }
    let page = std::fs::read_to_string(page).unwrap();
    for piece in [
        "<h2 id=\"endpoint-9\">",
        "<h2 id=\"endpoint-16\">",
        "its own table",
        "PASID 1",
        "class=\"refused\"",
        "Page faults over time",
        "class=\"asked\"",
    ] {
        assert!(page.contains(piece), "{piece}");
    }
    for foreign in ["<script", "http:", "https:", "url(", "NaN", "inf\""] {
        assert!(!page.contains(foreign), "{foreign}");
    }
}

#[test]
fn what_is_no_trace_is_refused_in_words() {
    let folder = Folder::new("refused");
    let trace = demo(&folder, "1");
    let whole = std::fs::read(&trace).unwrap();
    let broken = folder.file("broken");
    let page = folder.file("page.html");
    let try_with = |bytes: &[u8]| {
        std::fs::write(&broken, bytes).unwrap();
        let error = refused(&[&broken, "--html", &page]);
        assert!(error.contains("broken"), "{error}");
        assert!(!std::path::Path::new(&page).exists());
        error
    };
    assert!(try_with(b"").contains("no trace of viommu"));
    assert!(try_with(&[0xff; 100_000]).contains("no trace of viommu"));
    let half = &whole[..whole.len() / 2];
    assert!(try_with(half).contains(&format!("cut off after {} bytes", half.len())));
    let mut later = whole.clone();
    later[8] = 9;
    assert!(try_with(&later).contains("version 9"));
    let mut odd = whole.clone();
    odd[16] = 0x33;
    assert!(try_with(&odd).contains("no valid record at byte 16"));
    assert!(try_with(&[&whole[..], b"x"].concat()).contains("behind the end"));

    std::fs::write(&broken, half).unwrap();
    assert!(patterns(&[&broken, "--partial"]).contains("This is a part"));
    let folder_itself = folder.0.to_str().unwrap().to_owned();
    assert!(refused(&[&folder_itself]).contains("is no file"));
    assert!(refused(&["/dev/zero"]).contains("is no file"));
    assert!(refused(&[&folder.file("nowhere")]).contains("nowhere"));
}

#[test]
fn a_trace_that_cannot_be_written_fails_the_demo() {
    let output = viommu(&["demo", "--buffers", "1", "--trace", "/nowhere/trace"], b"");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("/nowhere/trace"));
}
