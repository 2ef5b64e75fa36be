//! The base specification's and the proposal's requests as bytes, sent at the console.
//!
//! The bytes were computed by hand from the layouts of virtio 1.4, "IOMMU Device", and of the 2023 ATTACH_TABLE proposal.
#![allow(clippy::unwrap_used, reason = "a test may stop")]

mod program;

use program::*;

/// Hexadecimal digits without the spaces that make them readable.
fn bare(text: &str) -> String {
    text.split_whitespace().collect()
}

fn req(text: &str) -> String {
    format!("req {} 4", bare(text))
}

#[test]
fn base_requests_are_understood() {
    let attach = req("01000000 01000000 08000000 00000000 00000000");
    let attach_bypass = req("01000000 02000000 08000100 01000000 00000000");
    let detach = req("02000000 01000000 08000000 0000000000000000");
    let map = req("03000000 01000000 0010000000000000 ff1f000000000000 00a0000000000000 03000000");
    let unmap = req("04000000 01000000 0010000000000000 ff1f000000000000 00000000");
    converse(
        &["--endpoint", "8", "--endpoint", "0x10008"],
        &[
            (attach, status(OK)),
            (map.clone(), status(OK)),
            ("dma 8 - 0x1fff 1 w".into(), "ok 0xafff".into()),
            // Tail INVAL is 04000000.
            (map, "used 4 04000000".into()),
            (unmap, status(OK)),
            ("dma 8 - 0x1fff 1 w".into(), "fault unmapped".into()),
            (detach, status(OK)),
            (attach_bypass, status(OK)),
            ("dma 0x10008 - 0x1234 8 w".into(), "ok 0x1234".into()),
        ],
    );
}

#[test]
fn properties_and_events_have_these_bytes() {
    let probe = format!("req {}{} 516", bare("05000000 08000000"), zeros(64));
    let msi = bare("0100 1400 01000000 0000e0fe00000000 ffffeffe00000000");
    let event = bare("02000000 02010000 08000000 00000000 0040230100000000");
    converse(
        &["--resv", "8:msi:0xfee00000-0xfeefffff", "--register", "idr0=0xa", "--register", "idr5=0x74"],
        &[
            // Only the base: hardware properties come with ATTACH_TABLE.
            ("accept 0x77".into(), "ok".into()),
            (probe.clone(), format!("used 516 {msi}{}", zeros(512 - 24 + 4))),
            (attach(1, 8), status(OK)),
            ("dma 8 - 0x1234000 4 w".into(), "fault unmapped".into()),
            ("event 24".into(), format!("used 24 {event}")),
            ("accept 0xf7".to_owned(), "ok".to_owned()),
            // HW_ARM_SMMU3: type 2, length 52, idr0 at 8, idr5 at 48.
            (probe, format!("used 516 {msi}02003400000000000a000000*")),
        ],
    );
}

#[test]
fn handover_requests_are_understood() {
    // 64 KiB two-level, pointer 0x80001000, 10 PASID bits, DSS 2: ste0 = 0x5000000080001020.
    let attach_table = format!(
        "req {}{} 4",
        bare("06000000 01000000 08000000 01000000 2010008000000050 0200000000000000"),
        zeros(92)
    );
    let invalidate_address = format!(
        "req {}{} 4",
        bare("07000000 03 02 0700 01000000 05000000 2a00000000000000 00000000007f0000 1000000000000000 0c"),
        zeros(19)
    );
    let invalidate_domain = format!("req {}{} 4", bare("07000000 01 03 0000 01000000"), zeros(48));
    converse(
        &["--memory", "0x80000000:1M"],
        &[
            (invalidate_domain.clone(), status(NOENT)),
            (attach_table.clone(), status(OK)),
            // The table is empty: the first-level descriptor of substream 5 is not valid.
            ("dma 8 5 0x7f0000000000 4 r".into(), "fault C_BAD_SUBSTREAMID".into()),
            (invalidate_address, status(OK)),
            (invalidate_domain, status(OK)),
            (detach(1, 8), status(OK)),
        ],
    );
    // The same table where there is no memory.
    converse(&[], &[(attach_table, status(INVAL)), (detach(1, 8), status(INVAL))]);
}
