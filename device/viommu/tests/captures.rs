//! Captured kernels, at the console and replayed.
#![allow(clippy::unwrap_used, reason = "a test may stop")]

mod program;

use std::path::{Path, PathBuf};

use program::*;

/// A copy of a capture that a test may spoil.
fn copy(of: &Path, name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&folder).unwrap();
    for file in ["capture.json", "memory.bin"] {
        std::fs::write(folder.join(file), std::fs::read(of.join(file)).unwrap()).unwrap();
    }
    folder
}

/// Replaces the first occurrence of `from` in `capture.json`.
fn edit(folder: &Path, from: &str, to: &str) {
    let path = folder.join("capture.json");
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{from}");
    std::fs::write(path, text.replacen(from, to, 1)).unwrap();
}

/// Whether it succeeds, and the line of `--json`.
fn replay(folder: &Path) -> (bool, String) {
    let output = viommu(&["replay", folder.to_str().unwrap(), "--json"], b"");
    (output.status.success(), String::from_utf8(output.stdout).unwrap())
}

fn numbers(line: &str) -> [u64; 4] {
    let value: serde_json::Value = serde_json::from_str(line).unwrap();
    ["endpoints", "mappings", "agree", "differ"].map(|name| value[name].as_u64().unwrap())
}

fn with_capture(folder: &Path, options: &[&str], exchanges: &[(&str, &str)]) {
    converse(&[&["--capture", folder.to_str().unwrap()], options].concat(), exchanges);
}

#[test]
fn both_captures_agree_wholly() {
    let smmu = (true, "{\"endpoints\":4,\"mappings\":545,\"agree\":545,\"differ\":0}\n".to_owned());
    assert_eq!(replay(&smmuv3()), smmu);
    let vtd_line = (true, "{\"endpoints\":4,\"mappings\":541,\"agree\":541,\"differ\":0}\n".to_owned());
    assert_eq!(replay(&vtd()), vtd_line);

    let output = viommu(&["replay", smmuv3().to_str().unwrap()], b"");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success());
    assert!(text.contains("4 endpoints, 545 mappings: 545 agree, 0 differences."), "{text}");
}

#[test]
fn a_mapping_that_differs_is_found() {
    for (name, capture) in [("smmuv3", smmuv3()), ("vtd", vtd())] {
        let output = if name == "smmuv3" { "\"0x44a75000\"" } else { "\"0x296c000\"" };
        let cases = [
            ("output", output, "\"0x2b00000\""),
            // A write that passes although it must not.
            ("write", "\"write\": true", "\"write\": false"),
        ];
        for (case, from, to) in cases {
            let folder = copy(&capture, &format!("differs-{name}-{case}"));
            edit(&folder, from, to);
            let (success, line) = replay(&folder);
            let [endpoints, mappings, agree, differ] = numbers(&line);
            assert!(!success);
            assert_eq!((endpoints, agree, differ), (4, mappings - 1, 1), "{name} {case}: {line}");
        }
    }
}

#[test]
fn a_mapping_that_should_not_be_there_is_found() {
    let folder = copy(&smmuv3(), "differs-gap");
    // The capture knows nothing of the page at 0xffffd000: it becomes the end of the gap, and the byte behind 0xffffc000.
    let path = folder.join("capture.json");
    let mut value: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let mappings = value["endpoints"][0]["mappings"].as_array_mut().unwrap();
    let before = mappings.len();
    mappings.retain(|mapping| mapping["iova"] != "0xffffd000");
    assert_eq!(mappings.len(), before - 1);
    std::fs::write(&path, value.to_string()).unwrap();
    let (success, line) = replay(&folder);
    assert!(!success);
    let [_, mappings, agree, differ] = numbers(&line);
    assert_eq!((mappings, agree), (544, 544));
    assert!(differ >= 1, "{line}");
    let output = viommu(&["replay", folder.to_str().unwrap()], b"");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("endpoint 8: read of 0xffffd000-0xffffd000 gives 0x44a76000, expected fault"),
        "{text}"
    );
}

#[test]
fn a_table_that_is_missing_or_refused_is_found() {
    let folder = copy(&smmuv3(), "differs-memory");
    let memory = std::fs::read(folder.join("memory.bin")).unwrap();
    // Without the page of the context descriptor of endpoint 8, nothing of it translates.
    let kept: Vec<&[u8]> =
        memory.chunks(4104).filter(|page| page[..8] != 0x44ec_0000_u64.to_le_bytes()).collect();
    assert_eq!(kept.len(), memory.len() / 4104 - 1);
    std::fs::write(folder.join("memory.bin"), kept.concat()).unwrap();
    let (success, line) = replay(&folder);
    let [endpoints, mappings, agree, differ] = numbers(&line);
    assert!(!success);
    // Its mappings, and its unmapped addresses, which fault by another name.
    assert!((endpoints, mappings, agree) == (4, 545, 542) && differ > 3, "{line}");

    // 31 bits of PASID.
    let folder = copy(&smmuv3(), "differs-refused");
    edit(&folder, "\"0x0000000044ec000b\"", "\"0xf800000044ec000b\"");
    let (success, line) = replay(&folder);
    assert!(!success);
    assert_eq!(numbers(&line), [4, 545, 542, 3]);
}

#[test]
fn malformed_captures_are_named() {
    let failed = |folder: &Path, reason: &str| {
        for arguments in [["replay", folder.to_str().unwrap()], ["console", "--capture"]] {
            let mut arguments = arguments.to_vec();
            if arguments[0] == "console" {
                arguments.push(folder.to_str().unwrap());
            }
            let output = viommu(&arguments, b"features\n");
            let errors = String::from_utf8(output.stderr).unwrap();
            assert!(!output.status.success() && output.stdout.is_empty());
            assert!(errors.starts_with("error: ") && errors.contains(reason), "{reason}: {errors}");
        }
    };
    failed(Path::new("/does/not/exist"), "cannot read");
    for (name, from, to, reason) in [
        ("iommu", "\"iommu\": \"smmuv3\"", "\"iommu\": \"sparc\"", "sparc"),
        ("register", "\"idr0\"", "\"idr00\"", "register idr0 is missing"),
        ("hex", "\"0xd44101b\"", "\"0xd44101bq\"", "not a number"),
        ("wide", "\"0xd44101b\"", "\"0x1d44101b0\"", "32 bits"),
        ("ste", "\"ste\"", "\"stream\"", "`ste` is missing"),
        ("last", "\"0xffffcfff\"", "\"0xffffbfff\"", "ends before it starts"),
        ("overlap", "\"0xffffcfff\"", "\"0xffffdfff\"", "overlap"),
        ("wraps", "\"0x44a75000\"", "\"0xffffffffffffffff\"", "wraps"),
        ("span", "\"0x44a75000\"", "\"0x1044a75000\"", "8 GiB"),
        ("twice", "\"id\": 16", "\"id\": 8", "listed twice"),
        ("type", "\"id\": 16", "\"id\": -1", "capture.json"),
        ("cut", "\"registers\"", "", "capture.json"),
    ] {
        let folder = copy(&smmuv3(), &format!("malformed-{name}"));
        edit(&folder, from, to);
        failed(&folder, reason);
    }
    let folder = copy(&vtd(), "malformed-context");
    edit(&folder, "\"0x000000000226b401\"", "\"0x000000000226b400\"");
    failed(&folder, "not present");
    let folder = copy(&vtd(), "malformed-pasid");
    edit(&folder, "\"pasid\": 0", "\"pasid\": 1048576");
    failed(&folder, "20 bits");

    let folder = copy(&smmuv3(), "malformed-memory");
    let memory = std::fs::read(folder.join("memory.bin")).unwrap();
    let write = |bytes: &[u8]| std::fs::write(folder.join("memory.bin"), bytes).unwrap();
    write(&memory[1..]);
    failed(&folder, "no multiple of 4104");
    write(&[&memory[..4104], &memory[..4104]].concat());
    failed(&folder, "twice");
    let mut odd = memory.clone();
    odd[0] |= 1;
    write(&odd);
    failed(&folder, "not a multiple of 4096");
    std::fs::remove_file(folder.join("memory.bin")).unwrap();
    failed(&folder, "cannot read");
}

#[test]
fn a_captured_smmuv3_is_used_at_the_console() {
    with_capture(
        &smmuv3(),
        &[],
        &[
            ("dma 8 - 0xffffc000 4 r", "fault unattached"),
            ("bind 8", "used 4 00000000"),
            ("dma 8 - 0xffffc000 4 r", "ok 0x44a75000"),
            ("dma 8 - 0xffffcffe 4 w", "ok 0x44a75ffe"),
            ("dma 8 - 0xfffff040 4 w", "ok 0x8090040"),
            ("dma 8 - 0xffffe000 4 w", "fault F_TRANSLATION"),
            ("dma 8 - 0xffffb000 0x2000 w", "fault F_TRANSLATION"),
            ("dma 16 - 0xffefd000 1 r", "fault unattached"),
            ("bind 16", "used 4 00000000"),
            ("bind 16", "used 4 00000000"),
            ("dma 16 - 0xffefd000 1 r", "ok 0x45214000"),
            ("dma 8 - 0xffefd000 1 r", "fault F_TRANSLATION"),
            ("bind 9", "error there is no endpoint 9"),
            ("bind", "error usage: bind ENDPOINT"),
            ("reset", "ok"),
            ("dma 8 - 0xffffc000 4 r", "fault unattached"),
            ("bind 8", "used 4 00000000"),
            ("dma 8 - 0xffffc000 4 r", "ok 0x44a75000"),
        ],
    );
}

#[test]
fn a_captured_vtd_is_used_at_the_console() {
    with_capture(
        &vtd(),
        &[],
        &[
            ("bind 16", "used 4 00000000"),
            ("dma 16 - 0xffffe123 4 w", "ok 0x296c123"),
            ("dma 16 0 0xffffe123 4 w", "ok 0x296c123"),
            ("dma 16 - 0xffffd000 4 w", "fault 0x71"),
            ("dma 16 - 0x800000000000 4 w", "fault 0x80"),
            ("dma 16 1048575 0xffffe123 4 w", "fault 0x*"),
        ],
    );
}

#[test]
fn registers_of_a_capture_are_replaced() {
    // 4 KiB and 64 KiB granules stay, then the 4 KiB granule goes.
    with_capture(
        &smmuv3(),
        &["--register", "idr5=0x54"],
        &[("bind 8", "used 4 00000000"), ("dma 8 - 0xffffc000 4 r", "ok 0x44a75000")],
    );
    with_capture(
        &smmuv3(),
        &["--register", "idr5=0x64"],
        &[
            ("bind 8", "used 4 00000000"),
            ("dma 8 - 0xffffc000 4 r", "fault C_BAD_CD"),
            // The configuration is at fault: UNKNOWN.
            ("event 24", "used 24 00*"),
        ],
    );
    let folder = smmuv3();
    refused(&["--capture", folder.to_str().unwrap(), "--register", "cap=0"], "no endpoint has register cap");
    refused(&["--capture", folder.to_str().unwrap(), "--endpoint", "8"], "--endpoint");
    refused(&["--capture", folder.to_str().unwrap(), "--memory", "0:1M"], "--memory");
}

#[test]
fn words_of_a_capture_are_changed_before_and_after() {
    // The context descriptor of endpoint 8 is at 0x44ec0000; V is bit 31 of its first word.
    let changes = [
        ("bind 8", "used 4 00000000"),
        ("mem 0x44ec0000 00000000", "ok"),
        ("dma 8 - 0xffffc000 4 r", "fault C_BAD_CD"),
    ];
    with_capture(&smmuv3(), &[], &changes);
    with_capture(&smmuv3(), &[], &[changes[1], changes[0], changes[2]]);
    let invalidate = invalidate_domain(1);
    let used = [
        changes[0],
        ("dma 8 - 0xffffc000 4 r", "ok 0x44a75000"),
        changes[1],
        ("dma 8 - 0xffffc000 4 r", "ok 0x44a75000"),
        (invalidate.as_str(), "used 4 00000000"),
        changes[2],
    ];
    with_capture(&smmuv3(), &[], &used);
    with_capture(&smmuv3(), &["--strict"], &[used[0], used[1], used[2], changes[2]]);
}

#[test]
fn guest_memory_spans_what_the_capture_names() {
    with_capture(
        &smmuv3(),
        &[],
        &[
            // From the doorbell, which is the lowest output, to the highest table.
            ("peek 0x8090000 4", "00000000"),
            ("peek 0x808ffff 1", "error*"),
            ("peek 0x20000000 4", "00000000"),
            ("mem 0x20000000 01", "ok"),
            ("peek 0x4be20fff 1", "00"),
            ("peek 0x4be21000 1", "error*"),
        ],
    );
    // From the lowest table to the highest output.
    with_capture(
        &vtd(),
        &[],
        &[
            ("peek 0x2261000 1", "01"),
            ("peek 0x2260fff 1", "error*"),
            ("peek 0x3440fff 1", "00"),
            ("peek 0x3441000 1", "error*"),
        ],
    );
}
