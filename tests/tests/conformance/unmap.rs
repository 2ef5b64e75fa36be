//! UNMAP: D-38 to D-42.

use viommu_tests::rig::{Memory, Rig, Sends, Setup, request};
use viommu_wire::Status;
use vm_memory::{Bytes, GuestAddress};

/// Endpoint 16 in domain 1; endpoint 17 in the bypass domain 2.
fn rig() -> Rig {
    let mut rig = Rig::new(Setup::default());
    assert_eq!(rig.send(&request::attach(1, 16)), Status::Ok);
    assert_eq!(rig.send(&request::attach_bypass(2, 17)), Status::Ok);
    rig
}

/// Maps pages `first..=last` of domain 1 to the same numbers a million pages further up.
fn map(rig: &mut Rig, first: u64, last: u64) -> Status {
    rig.send(&request::map(1, first << 12, (last << 12) + 0xfff, (first + 0x10_0000) << 12))
}

fn unmap(rig: &mut Rig, first: u64, last: u64) -> Status {
    rig.send(&request::unmap(1, first << 12, (last << 12) + 0xfff))
}

/// Which of the pages 0 to 19 are mapped; checks where they lead.
fn mapped(rig: &Rig) -> Vec<u64> {
    let leads = |page: u64| rig.machine.read(16, page << 12);
    let pages: Vec<u64> = (0..20).filter(|&page| leads(page).is_some()).collect();
    for &page in &pages {
        assert_eq!(leads(page), Some((page + 0x10_0000) << 12));
    }
    pages
}

#[test]
fn d38_unmap_reserved_must_be_zero() {
    // The text permits to go on all the same; this device does not.
    let mut rig = rig();
    assert_eq!(map(&mut rig, 1, 1), Status::Ok);
    for at in 24..28 {
        let mut bytes = request::unmap(1, 0x1000, 0x1fff).encode().to_vec();
        bytes[at] = 1;
        rig.refuse(&bytes, Status::Inval);
    }
    assert_eq!(mapped(&rig), [1]);
}

#[test]
fn d39_unmap_in_an_unknown_domain_is_noent() {
    let mut rig = rig();
    for domain in [0, 3, u32::MAX] {
        rig.refuse(&request::unmap(domain, 0, u64::MAX).encode(), Status::NoEnt);
    }
    rig.refuse(&request::unmap(3, 0x1000, 0).encode(), Status::NoEnt);
}

#[test]
fn d40_unmap_in_a_bypass_domain_is_inval() {
    let mut rig = rig();
    rig.refuse(&request::unmap(2, 0x1000, 0x1fff).encode(), Status::Inval);
    rig.refuse(&request::unmap(2, 0, u64::MAX).encode(), Status::Inval);
    assert_eq!(rig.machine.read(17, 0x1000), Some(0x1000));
}

#[test]
fn d41_a_mapping_that_is_covered_in_part_keeps_all() {
    let mut rig = rig();
    for (first, last) in [(1, 2), (4, 7), (9, 9), (11, 14)] {
        assert_eq!(map(&mut rig, first, last), Status::Ok);
    }
    let before = mapped(&rig);
    // The one to be split comes first, last, in the middle, on both sides; in whole pages and in single bytes.
    for (start, last) in [
        (0x4000, 0x5fff),
        (0x5000, 0x6fff),
        (0x6000, 0x7fff),
        (0x5000, 0x9fff),
        (0x1000, 0x4fff),
        (0x0000, 0x6fff),
        (0x2000, 0x9fff),
        (0x2000, 0xbfff),
        (0x0000, 0xdfff),
        (0x5000, u64::MAX),
        (0x0000, 0xe000),
        (0x9000, 0x9ffe),
        (0x9001, 0x9fff),
        (0x9800, 0x9800),
    ] {
        rig.refuse(&request::unmap(1, start, last).encode(), Status::Range);
        assert_eq!(mapped(&rig), before, "{start:#x}-{last:#x}");
    }
    assert_eq!(unmap(&mut rig, 0, 19), Status::Ok);
    assert_eq!(mapped(&rig), [0; 0]);
}

#[test]
fn d41_the_two_halves_of_a_mapping_cannot_go_in_either_order() {
    for halves in [[(0, 4), (5, 9)], [(5, 9), (0, 4)]] {
        let mut rig = rig();
        assert_eq!(map(&mut rig, 0, 9), Status::Ok);
        for (first, last) in halves {
            rig.refuse(&request::unmap(1, first << 12, (last << 12) + 0xfff).encode(), Status::Range);
        }
        assert_eq!(mapped(&rig).len(), 10);
        assert_eq!(unmap(&mut rig, 0, 9), Status::Ok);
        assert_eq!(mapped(&rig), [0; 0]);
    }
}

#[test]
fn d42_addresses_without_a_mapping_do_not_matter() {
    let mut rig = rig();
    assert_eq!(map(&mut rig, 3, 3), Status::Ok);
    assert_eq!(map(&mut rig, 6, 7), Status::Ok);
    assert_eq!(unmap(&mut rig, 10, 12), Status::Ok, "wholly unmapped");
    assert_eq!(mapped(&rig), [3, 6, 7]);
    assert_eq!(unmap(&mut rig, 4, 9), Status::Ok, "partly unmapped");
    assert_eq!(mapped(&rig), [3]);
    // No alignment is asked of what is not mapped.
    assert_eq!(rig.send(&request::unmap(1, 0x2801, 0x4001)), Status::Ok);
    assert_eq!(mapped(&rig), [0; 0]);
    assert_eq!(unmap(&mut rig, 0, 19), Status::Ok);
    rig.works();
}

#[test]
fn d42_the_seven_reference_cases() {
    /// What is mapped, what is unmapped, how that is answered, and which pages are left.
    type Case = (&'static [(u64, u64)], (u64, u64), Status, &'static [u64]);
    let cases: [Case; 7] = [
        (&[], (0, 4), Status::Ok, &[]),
        (&[(0, 9)], (0, 9), Status::Ok, &[]),
        (&[(0, 4), (5, 9)], (0, 9), Status::Ok, &[]),
        (&[(0, 9)], (0, 4), Status::Range, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (&[(0, 4), (5, 9)], (0, 4), Status::Ok, &[5, 6, 7, 8, 9]),
        (&[(0, 4)], (0, 9), Status::Ok, &[]),
        (&[(0, 4), (10, 14)], (0, 14), Status::Ok, &[]),
    ];
    for (number, (maps, (first, last), status, left)) in (1..).zip(cases) {
        let mut rig = rig();
        for &(first, last) in maps {
            assert_eq!(map(&mut rig, first, last), Status::Ok);
        }
        assert_eq!(unmap(&mut rig, first, last), status, "case {number}");
        assert_eq!(mapped(&rig), left, "case {number}");
        rig.works();
    }
}

#[test]
fn d42_after_unmap_nothing_uses_the_translation() {
    let mut rig = rig();
    assert_eq!(rig.send(&request::attach(1, 9)), Status::Ok);
    let target = Memory::page(7);
    assert_eq!(rig.send(&request::map(1, 0x1000, 0x1fff, target.0)), Status::Ok);
    let devices = [rig.machine.dma(16, None), rig.machine.dma(9, None)];
    for dma in &devices {
        dma.write_slice(&[1; 8], GuestAddress(0x1000)).unwrap();
    }
    assert_eq!(rig.send(&request::unmap(1, 0x1000, 0x1fff)), Status::Ok);
    for dma in &devices {
        assert!(dma.write_slice(&[2; 8], GuestAddress(0x1000)).is_err());
    }
    let mut bytes = [0; 8];
    rig.machine.memory().map().read_slice(&mut bytes, GuestAddress(target.0)).unwrap();
    assert_eq!(bytes, [1; 8]);
    // The range can be mapped elsewhere, and the new translation is the one in use.
    assert_eq!(rig.send(&request::map(1, 0x1000, 0x1fff, target.0 + 0x1000)), Status::Ok);
    assert_eq!(rig.machine.read(16, 0x1000), Some(target.0 + 0x1000));
}

#[test]
fn unmap_of_everything_removes_everything() {
    let mut rig = rig();
    for page in [0, 3, 5, 6, 19] {
        assert_eq!(map(&mut rig, page, page), Status::Ok);
    }
    assert_eq!(rig.send(&request::unmap(1, 0, u64::MAX)), Status::Ok);
    assert_eq!(mapped(&rig), [0; 0]);
    assert_eq!(rig.machine.lock().device().mapping_count(), 0);
    rig.works();
}

#[test]
fn unmap_that_ends_before_it_starts_is_range() {
    let mut rig = rig();
    assert_eq!(map(&mut rig, 1, 2), Status::Ok);
    for (start, last) in [(0x3000, 0x1fff), (0x2000, 0x1fff), (u64::MAX, 0), (1, 0)] {
        rig.refuse(&request::unmap(1, start, last).encode(), Status::Range);
    }
}
