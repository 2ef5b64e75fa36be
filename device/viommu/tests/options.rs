//! The options of the console.
#![allow(clippy::unwrap_used, reason = "a test may stop")]

mod program;

use program::*;

#[test]
fn the_defaults_are_these() {
    let probe_size = 512;
    converse(
        &[],
        &[
            ("dma 8 - 0 1 r".to_owned(), "fault unattached".to_owned()),
            ("dma 9 - 0 1 r".into(), "fault unattached".into()),
            ("dma 16 - 0 1 r".into(), "fault unattached".into()),
            ("dma 17 - 0 1 r".into(), "error*".into()),
            ("peek 0x40000000 1".into(), "00".into()),
            ("peek 0x4fffffff 1".into(), "00".into()),
            ("peek 0x3fffffff 1".into(), "error*".into()),
            ("peek 0x50000000 1".into(), "error*".into()),
            // The MSI window, then SMMUv3 registers, or VT-d ones.
            (probe(8, probe_size + 4), "used 516 010014000100000000000008000000* ".trim().into()),
            (
                probe(9, probe_size + 4),
                format!("used 516 0100140001000000{}{}02003400*", le64(0x800_0000), le64(0x80f_ffff)),
            ),
            (probe(16, probe_size + 4), "used 516 03001400*".into()),
        ],
    );
}

#[test]
fn endpoints_are_chosen() {
    converse(
        &["--endpoint", "8", "--endpoint", "9:vtd", "--endpoint", "0x20:none"],
        &[
            (
                probe(8, 516),
                format!("used 516 0100140001000000{}{}02003400*", le64(0x800_0000), le64(0x80f_ffff)),
            ),
            (
                probe(9, 516),
                format!("used 516 0100140001000000{}{}03001400*", le64(0x800_0000), le64(0x80f_ffff)),
            ),
            (probe(32, 516), format!("used 516 {}", zeros(516))),
            (attach_smmuv3(1, 32, 0x4000_0000, 0), status(UNSUPP)),
            ("dma 16 - 0 1 r".into(), "error there is no endpoint 16".into()),
        ],
    );
    refused(&["--endpoint", "8:amd"], "none of smmuv3, vtd, none");
    refused(&["--endpoint", "8", "--endpoint", "8"], "listed twice");
    refused(&["--endpoint", "x"], "not a number");
}

#[test]
fn reserved_regions_replace_the_default() {
    converse(
        &["--resv", "8:msi:0xfee00000-0xfeefffff", "--resv", "9:none", "--resv", "16:reserved:0-0xffff"],
        &[
            (
                probe(8, 516),
                format!("used 516 0100140001000000{}{}02003400*", le64(0xfee0_0000), le64(0xfeef_ffff)),
            ),
            (probe(9, 516), "used 516 02003400*".into()),
            (probe(16, 516), format!("used 516 0100140000000000{}{}03001400*", le64(0), le64(0xffff))),
        ],
    );
    refused(&["--resv", "8:msi:0-0xfff", "--resv", "8:msi:0x2000-0x2fff"], "MSI");
    refused(&["--resv", "8:msi:0-0xfff", "--resv", "8:reserved:0x800-0x2fff"], "overlap");
    refused(&["--resv", "7:msi:0-0xfff"], "there is no endpoint 7");
    refused(&["--resv", "8:msi:5-4"], "ends before it starts");
    refused(&["--resv", "8:doorbell:0-1"], "neither msi nor reserved");
}

#[test]
fn memory_is_chosen() {
    converse(
        &["--memory", "0:8K"],
        &[
            ("mem 0x1fff 01", "ok"),
            ("peek 0 1", "00"),
            ("peek 0x2000 1", "error*"),
            ("mem 0x1fff 0101", "error*"),
        ],
    );
    converse(
        &["--memory", "0x100000000:2G"],
        &[("peek 0x17fffffff 1", "00"), ("peek 0x180000000 1", "error*")],
    );
    refused(&["--memory", "0"], "BASE:SIZE");
    refused(&["--memory", "0:0"], "no size");
    refused(&["--memory", "0x800:4K"], "multiple of 4096");
    refused(&["--memory", "0xfffffffffffff000:8K"], "wraps");
    refused(&["--memory", "0:0xfffffffffffff000"], "");
    refused(&["--memory", "0x100000000000000:1M"], "");
}

#[test]
fn the_configuration_is_chosen() {
    converse(
        &[
            "--page-size-mask",
            "0x10000",
            "--input-range",
            "0x10000-0xffffffff",
            "--domain-range",
            "5-6",
            "--bypass",
            "1",
        ],
        &[
            (
                "config 0 40".to_owned(),
                format!(
                    "config {}{}{}{}{}{}01000000",
                    le64(0x1_0000),
                    le64(0x1_0000),
                    le64(0xffff_ffff),
                    le32(5),
                    le32(6),
                    le32(512)
                ),
            ),
            ("dma 8 - 0x1234 4 w".into(), "ok 0x1234".into()),
            (attach(4, 8), status(RANGE)),
            (attach(7, 8), status(RANGE)),
            (attach(6, 8), status(OK)),
            ("dma 8 - 0x1234 4 w".into(), "fault unmapped".into()),
            (map(6, 0x1_0000, 0x1_0fff, 0, 3), status(RANGE)),
            (map(6, 0, 0xffff, 0, 3), status(RANGE)),
            (map(6, 0x1_0000, 0x1_ffff, 0, 3), status(OK)),
            (map(6, 0xffff_0000, 0x1_0000_ffff, 0, 3), status(RANGE)),
        ],
    );
    refused(&["--page-size-mask", "0"], "page_size_mask");
    refused(&["--input-range", "5"], "range");
    refused(&["--domain-range", "0-0x100000000"], "");
    refused(&["--bypass", "2"], "neither 0 nor 1");
}

#[test]
fn the_offer_of_features_is_chosen() {
    // Only PROBE and ATTACH_TABLE, as one shipped device has it.
    converse(
        &["--features", "0x90"],
        &[
            ("features".to_owned(), "features 0x130000090".to_owned()),
            (attach(1, 8), status(OK)),
            (map(1, 0, 0xfff, 0, 3), status(UNSUPP)),
            ("accept 4".into(), "error bits 0x4 were not offered".into()),
        ],
    );
    // Nothing but MAP_UNMAP: every address and domain ID may be used, PROBE is not known.
    converse(
        &["--features", "4"],
        &[
            (probe(8, 516), format!("used 0 {}", zeros(516))),
            (attach(u32::MAX, 16), status(OK)),
            (map(u32::MAX, 0xffff_ffff_ffff_f000, u64::MAX, 0, 1), status(OK)),
        ],
    );
    refused(&["--features", "8"], "the device does not have bits 0x8");
    refused(&["--features", "4", "--input-range", "0-0xffff"], "INPUT_RANGE");
    refused(&["--features", "4", "--bypass", "1"], "BYPASS_CONFIG");
}

#[test]
fn limits_are_reached_with_nomem() {
    converse(
        &[
            "--limit",
            "max_domains=1",
            "--limit",
            "max_mappings_per_domain=2",
            "--limit",
            "max_pending_events=1",
            "--limit",
            "max_bound_pasids=1",
        ],
        &[
            (attach(1, 8), status(OK)),
            (attach(2, 9), status(NOMEM)),
            (map(1, 0, 0xfff, 0, 3), status(OK)),
            (map(1, 0x1000, 0x1fff, 0, 3), status(OK)),
            (map(1, 0x2000, 0x2fff, 0, 3), status(NOMEM)),
            (unmap(1, 0, 0xfff), status(OK)),
            (map(1, 0x2000, 0x2fff, 0, 3), status(OK)),
            ("dma 9 - 0 1 r".into(), "fault unattached".into()),
            ("dma 9 - 1 1 r".into(), "fault unattached".into()),
            ("event 24".into(), "used 24 01*".into()),
            ("event 24".into(), "none".into()),
            (detach(1, 8), status(OK)),
            (attach_page_table(1, 16, 0x4000_0000, 48, 1), status(OK)),
            (attach_page_table(1, 16, 0x4000_0000, 48, 2), status(NOMEM)),
        ],
    );
    refused(&["--limit", "max_patience=1"], "no limit `max_patience`");
    refused(&["--limit", "max_domains"], "NAME=VALUE");
}

#[test]
fn registers_are_replaced() {
    // Six bits of substream; no two-level tables: idr0 of S1P, TTF AArch64, ASID16.
    converse(
        &["--register", "idr1=0x180", "--register", "idr0=0x100a"],
        &[
            (attach_smmuv3(1, 8, 0x4000_0000 | 6 << 59, 0), status(OK)),
            (attach_smmuv3(1, 8, 0x4000_0000 | 7 << 59, 0), status(UNSUPP)),
            (attach_smmuv3(1, 8, 0x4000_0000 | 1 << 4 | 6 << 59, 0), status(UNSUPP)),
        ],
    );
    // A VT-d unit without scalable mode.
    converse(
        &["--register", "ecap=0"],
        &[
            (attach_pasid_table(1, 16, 0x4000_0000, 0, 7), status(UNSUPP)),
            (attach_page_table(1, 16, 0x4000_0000, 48, 0), status(UNSUPP)),
        ],
    );
    refused(&["--register", "idr7=0"], "no register `idr7`");
    refused(&["--register", "idr0=0x100000000"], "32 bits");
    refused(&["--endpoint", "8", "--register", "cap=0"], "no endpoint has register cap");
}

#[test]
fn every_command_and_option_is_explained() {
    let output = viommu(&["console", "--help"], b"");
    let text = String::from_utf8(output.stdout).unwrap();
    for word in [
        "req HEX",
        "event N",
        "mem GPA",
        "peek GPA",
        "dma ENDPOINT",
        "features",
        "accept HEX",
        "config OFFSET",
        "config-write",
        "reset",
        "bind ENDPOINT",
        "--endpoint",
        "--resv",
        "--memory",
        "--page-size-mask",
        "--input-range",
        "--domain-range",
        "--bypass",
        "--features",
        "--limit",
        "--register",
        "--strict",
        "--capture",
        "--log",
    ] {
        assert!(text.contains(word), "{word}");
    }
    assert!(!viommu(&["consol"], b"").status.success());
    assert!(!viommu(&[], b"").status.success());
}

#[test]
fn why_a_request_was_rejected_goes_to_the_log() {
    let errors = |options: &[&str]| {
        let line = format!("{}\n", attach(1, 77));
        let output = viommu(&[&["console"], options].concat(), line.as_bytes());
        assert_eq!(String::from_utf8(output.stdout).unwrap().trim(), status(NOENT));
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(errors(&[]).contains("endpoint 77 does not exist"));
    assert!(errors(&["--log", "off"]).is_empty());
}
