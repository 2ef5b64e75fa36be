//! Hostile and mistaken requests: a clear status, nothing changed, the device still working.
#![allow(clippy::unwrap_used, reason = "a test may stop")]

mod program;

use program::*;

const PAGES: &str = "0-0xffffffffffffffff";

/// The requests in between two probes that show the domain of endpoint 16 as it was: one page mapped, one not.
fn unharmed(options: &[&str], requests: &[(String, String)]) {
    let mut exchanges = vec![(attach(1, 16), status(OK)), (map(1, 0x4000, 0x7fff, 0xa000, 3), status(OK))];
    for exchange in requests {
        exchanges.push(exchange.clone());
        exchanges.push(("dma 16 - 0x4000 0x4000 w".into(), "ok 0xa000".into()));
        exchanges.push(("dma 16 - 0x8000 1 r".into(), "fault unmapped".into()));
        exchanges.push(("event 24".into(), "used 24 02*".into()));
    }
    exchanges.push((unmap(1, 0, 0xffff), status(OK)));
    exchanges.push((detach(1, 16), status(OK)));
    converse(options, &exchanges);
}

#[test]
fn map_and_unmap_of_everything() {
    // The input range ends at 2^48-1.
    unharmed(&[], &[(map(1, 0, u64::MAX, 0, 3), status(RANGE))]);
    converse(
        &["--input-range", PAGES],
        &[
            (attach(1, 16), status(OK)),
            (map(1, 0, u64::MAX, 0x1000, 3), status(RANGE)),
            ("dma 16 - 0 1 r".into(), "fault unmapped".into()),
            (map(1, 0, u64::MAX, 0, 3), status(OK)),
            ("dma 16 - 0xffffffffffffffff 1 w".into(), "ok 0xffffffffffffffff".into()),
            (map(1, 0x1000, 0x1fff, 0, 3), status(INVAL)),
            (unmap(1, 0, u64::MAX - 1), status(RANGE)),
            (unmap(1, 0, u64::MAX), status(OK)),
            ("dma 16 - 0xffffffffffffffff 1 w".into(), "fault unmapped".into()),
            (map(1, 0x1000, 0x1fff, 0, 3), status(OK)),
            (map(1, 0xffff_ffff_ffff_f000, u64::MAX, 0, 3), status(OK)),
            (unmap(1, 0, u64::MAX), status(OK)),
            ("dma 16 - 0x1000 1 w".into(), "fault unmapped".into()),
            (unmap(1, 0, u64::MAX), status(OK)),
        ],
    );
    // An endpoint with an MSI window cannot have everything mapped.
    converse(
        &["--input-range", PAGES],
        &[
            (attach(1, 8), status(OK)),
            (map(1, 0, u64::MAX, 0, 3), status(INVAL)),
            (unmap(1, 0, u64::MAX), status(OK)),
        ],
    );
}

#[test]
fn ranges_that_make_no_sense() {
    unharmed(
        &[],
        &[
            // End below start.
            (map(1, 0x2000, 0xfff, 0, 3), status(RANGE)),
            (map(1, 1, 0, 0, 3), status(RANGE)),
            (unmap(1, 0x8000, 0x3fff), status(RANGE)),
            // Physical wrap.
            (map(1, 0x1_0000, 0x1_1fff, 0xffff_ffff_ffff_f000, 3), status(RANGE)),
            // Misaligned.
            (map(1, 0x1_0800, 0x1_17ff, 0, 3), status(RANGE)),
            (map(1, 0x1_0000, 0x1_0ffe, 0, 3), status(RANGE)),
            (map(1, 0x1_0000, 0x1_0fff, 0x10, 3), status(RANGE)),
            // Outside of the input range.
            (map(1, 1 << 48, (1 << 48) + 0xfff, 0, 3), status(RANGE)),
            // Overlap.
            (map(1, 0x7000, 0x8fff, 0, 3), status(INVAL)),
            (map(1, 0x5000, 0x5fff, 0, 3), status(INVAL)),
            (map(1, 0x3000, 0x8fff, 0, 3), status(INVAL)),
        ],
    );
    // A page that ends the physical space does not wrap.
    converse(
        &[],
        &[
            (attach(1, 16), status(OK)),
            (map(1, 0x1_0000, 0x1_0fff, 0xffff_ffff_ffff_f000, 3), status(OK)),
            ("dma 16 - 0x10fff 1 r".into(), "ok 0xffffffffffffffff".into()),
        ],
    );
}

#[test]
fn unmap_that_splits_in_either_order() {
    unharmed(
        &[],
        &[
            (unmap(1, 0x4000, 0x5fff), status(RANGE)),
            (unmap(1, 0x6000, 0x7fff), status(RANGE)),
            (unmap(1, 0x5000, 0x5fff), status(RANGE)),
            (unmap(1, 0, 0x4fff), status(RANGE)),
            (unmap(1, 0x7000, 0xffff), status(RANGE)),
        ],
    );
    // Another mapping that is covered, before or behind the one that is not, stays too.
    let both = "ok 0x10000 0x1a000";
    converse(
        &[],
        &[
            (attach(1, 16), status(OK)),
            (map(1, 0x4000, 0x5fff, 0x1_0000, 3), status(OK)),
            (map(1, 0x6000, 0x7fff, 0x1_a000, 3), status(OK)),
            (unmap(1, 0x4000, 0x6fff), status(RANGE)),
            ("dma 16 - 0x4000 0x4000 r".into(), both.into()),
            (unmap(1, 0x5000, 0x7fff), status(RANGE)),
            ("dma 16 - 0x4000 0x4000 r".into(), both.into()),
            (unmap(1, 0x4000, 0x5fff), status(OK)),
            ("dma 16 - 0x4000 0x4000 r".into(), "fault unmapped".into()),
            ("dma 16 - 0x6000 0x2000 r".into(), "ok 0x1a000".into()),
        ],
    );
}

#[test]
fn the_seven_reference_cases_of_unmap() {
    let m = |first: u64, last: u64| (map(1, first << 12, (last << 12) + 0xfff, first << 12, 3), status(OK));
    let u = |first: u64, last: u64, result| (unmap(1, first << 12, (last << 12) + 0xfff), status(result));
    let clear = u(0, 0xff, OK);
    let there = |page: u64| (format!("dma 16 - {:#x} 1 r", page << 12), format!("ok {:#x}", page << 12));
    let gone = |page: u64| (format!("dma 16 - {:#x} 1 r", page << 12), "fault unmapped".to_owned());
    let exchanges = [
        vec![(attach(1, 16), status(OK)), u(0, 4, OK), clear.clone()],
        vec![m(0, 9), u(0, 9, OK), gone(0), gone(9), clear.clone()],
        vec![m(0, 4), m(5, 9), u(0, 9, OK), gone(0), gone(5), clear.clone()],
        vec![m(0, 9), u(0, 4, RANGE), there(0), there(9), clear.clone()],
        vec![m(0, 4), m(5, 9), u(0, 4, OK), gone(4), there(5), clear.clone()],
        vec![m(0, 4), u(0, 9, OK), gone(0), clear.clone()],
        vec![m(0, 4), m(10, 14), u(0, 14, OK), gone(0), gone(10)],
    ]
    .concat();
    converse(&[], &exchanges);
}

#[test]
fn short_and_long_parts() {
    let mapping = map_bytes(1, 0x1_0000, 0x1_0fff, 0, 3);
    let mut requests = Vec::new();
    for length in 0..mapping.len() / 2 {
        let part = &mapping[..2 * length];
        let answer = if length < 4 { "used 0 00000000".to_owned() } else { status(INVAL) };
        requests.push((format!("req {} 4", if part.is_empty() { "-" } else { part }), answer));
    }
    // No room for a tail.
    for length in 0..4 {
        let answer = format!("used 0 {}", zeros(length));
        requests.push((format!("req {mapping} {length}"), answer.trim_end().to_owned()));
    }
    unharmed(&[], &requests);
    converse(
        &[],
        &[
            (attach(1, 16), status(OK)),
            // Longer is fine: the rest is not read, nor written.
            (format!("req {mapping}{} 4", "ff".repeat(5000)), status(OK)),
            (format!("req {mapping} 10"), format!("used 4 04000000{}", zeros(6))),
            ("dma 16 - 0x10000 1 r".into(), "ok 0x0".into()),
        ],
    );
}

#[test]
fn probe_buffers_of_the_wrong_length() {
    converse(
        &[],
        &[
            (probe(16, 0), "used 0".to_owned()),
            (probe(16, 3), format!("used 0 {}", zeros(3))),
            (probe(16, 4), status(INVAL)),
            (probe(16, 100), format!("used 100 {}04000000", zeros(96))),
            (probe(16, 515), format!("used 515 {}04000000", zeros(511))),
            (probe(16, 520), "used 516 03*".into()),
            (probe(17, 516), format!("used 516 {}06000000", zeros(512))),
            (format!("req 0500000010000000{} 516", zeros(63)), format!("used 516 {}04000000", zeros(512))),
        ],
    );
    // Nothing to say: all zero, status OK.
    converse(
        &["--endpoint", "3:none"],
        &[
            (probe(3, 516), format!("used 516 {}", zeros(516))),
            (probe(3, 517), format!("used 516 {}", zeros(517))),
        ],
    );
}

#[test]
fn unknown_types_endpoints_domains_flags_and_reserved_bytes() {
    let mut requests: Vec<(String, String)> = (0..=255u8)
        .filter(|kind| !(1..=7).contains(kind))
        .map(|kind| (format!("req {kind:02x}000000{} 4", zeros(120)), "used 0 00000000".into()))
        .collect();
    requests.extend([
        (attach(1, 17), status(NOENT)),
        (attach(1, u32::MAX), status(NOENT)),
        (detach(1, 17), status(NOENT)),
        (detach(2, 16), status(INVAL)),
        (detach(1, 8), status(INVAL)),
        (attach_smmuv3(2, 17, 0, 0), status(NOENT)),
        (map(2, 0, 0xfff, 0, 3), status(NOENT)),
        (unmap(2, 0, 0xfff), status(NOENT)),
        (invalidate_domain(2), status(NOENT)),
        (invalidate_domain(1), status(INVAL)),
        (map(1, 0, 0xfff, 0, 8), status(INVAL)),
        (map(1, 0, 0xfff, 0, 0x8000_0003), status(INVAL)),
        // ATTACH: undefined flag, reserved bytes, a flag that does not match the domain.
        (format!("req 01000000{}{}{}{} 4", le32(1), le32(16), le32(2), zeros(4)), status(INVAL)),
        (format!("req 01000000{}{}{}00000001 4", le32(1), le32(16), zeros(4)), status(INVAL)),
        (attach_bypass(1, 8), status(INVAL)),
        (attach_bypass(1, 16), status(INVAL)),
        // UNMAP with reserved bytes: nothing is done.
        (format!("req 04000000{}{}{}00000001 4", le32(1), le64(0x4000), le64(0x7fff)), status(INVAL)),
        // Reserved bytes of the head are ignored (D-12); attaching again changes nothing.
        (format!("req 01ffffff{}{}{} 4", le32(1), le32(16), zeros(8)), status(OK)),
        (attach(1, 16), status(OK)),
    ]);
    unharmed(&[], &requests);
}

#[test]
fn reserved_regions_are_not_mapped() {
    converse(
        &["--resv", "8:msi:0x8000000-0x80fffff", "--resv", "8:reserved:0x100000-0x1fffff"],
        &[
            (attach(1, 8), status(OK)),
            (map(1, 0x800_0000, 0x800_0fff, 0, 3), status(INVAL)),
            (map(1, 0x7ff_f000, 0x800_0fff, 0, 3), status(INVAL)),
            (map(1, 0x80f_f000, 0x810_0fff, 0, 3), status(INVAL)),
            (map(1, 0, 0xffff_ffff, 0, 3), status(INVAL)),
            (map(1, 0x10_0000, 0x10_0fff, 0, 3), status(INVAL)),
            (map(1, 0xf_f000, 0xf_ffff, 0, 3), status(OK)),
            (map(1, 0x20_0000, 0x20_0fff, 0, 3), status(OK)),
            ("dma 8 - 0x100000 1 w".into(), "fault unmapped".into()),
            // A domain with a mapping there does not take the endpoint (D-23).
            (attach(2, 9), status(OK)),
            (map(2, 0x10_0000, 0x10_0fff, 0, 3), status(OK)),
            (attach(2, 8), status(UNSUPP)),
            ("dma 8 - 0x200000 1 r".into(), "ok 0x0".into()),
        ],
    );
}

#[test]
fn bypass_domains_have_no_mappings() {
    converse(
        &[],
        &[
            (attach_bypass(5, 8), status(OK)),
            ("dma 8 - 0x123456 4 w".into(), "ok 0x123456".into()),
            ("dma 8 7 0x123456 4 r".into(), "ok 0x123456".into()),
            (map(5, 0, 0xfff, 0, 3), status(INVAL)),
            (unmap(5, 0, 0xfff), status(INVAL)),
            (attach(5, 9), status(INVAL)),
            (attach_smmuv3(5, 9, 0x4000_0000, 2), status(INVAL)),
            (invalidate_domain(5), status(INVAL)),
            ("dma 9 - 0x123456 4 w".into(), "fault unattached".into()),
            (detach(5, 8), status(OK)),
            ("dma 8 - 0x123456 4 w".into(), "fault unattached".into()),
        ],
    );
}
