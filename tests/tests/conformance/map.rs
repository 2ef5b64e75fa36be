//! MAP: D-30 to D-37.

use pgtable_formats::AccessKind;
use viommu_device::host::FaultCause;
use viommu_device::{DeviceConfig, Features, IovaRange, Limits};
use viommu_tests::rig::{Rig, Sends, Setup, request};
use viommu_wire::{MapFlags, Status};

/// Endpoint 16, which has no reserved regions, in domain 1 with page 4 mapped; endpoint 17 in the bypass domain 2.
fn rig_with(config: DeviceConfig) -> Rig {
    let mut rig = Rig::new(Setup { config, ..Setup::default() });
    assert_eq!(rig.send(&request::attach(1, 16)), Status::Ok);
    assert_eq!(rig.send(&request::map(1, 0x4000, 0x4fff, 0x9000)), Status::Ok);
    assert_eq!(rig.send(&request::attach_bypass(2, 17)), Status::Ok);
    rig
}

fn rig() -> Rig {
    rig_with(DeviceConfig::default())
}

/// Every address can be mapped.
fn rig_of_everything() -> Rig {
    rig_with(DeviceConfig { input_range: IovaRange::ALL, ..DeviceConfig::default() })
}

fn flags(start: u64, last: u64, flags: u32) -> Vec<u8> {
    let mut bytes = request::map(1, start, last, 0x5000).encode().to_vec();
    bytes[32..36].copy_from_slice(&flags.to_le_bytes());
    bytes
}

#[test]
fn d30_map_must_be_aligned_to_the_granule() {
    let mut rig = rig();
    for (start, last, output) in [
        (0x1001, 0x1fff, 0x5000),
        (0x1800, 0x1fff, 0x5000),
        (0x1000, 0x1ffe, 0x5000),
        (0x1000, 0x2000, 0x5000),
        (0x1000, 0x1000, 0x5000),
        (0x1000, 0x1fff, 0x5001),
        (0x1000, 0x1fff, 0x5800),
    ] {
        rig.refuse(&request::map(1, start, last, output).encode(), Status::Range);
    }
    assert_eq!(rig.send(&request::map(1, 0x1000, 0x1fff, 0x5000)), Status::Ok);
}

#[test]
fn d30_the_last_address_of_all_is_aligned() {
    let mut rig = rig_of_everything();
    assert_eq!(rig.send(&request::map(1, u64::MAX - 0xfff, u64::MAX, 0x5000)), Status::Ok);
    assert_eq!(rig.machine.read(16, u64::MAX), Some(0x5fff));
    assert_eq!(rig.machine.read(16, u64::MAX - 0x1000), None);
}

#[test]
fn d31_a_range_with_a_mapping_in_it_is_refused() {
    let mut rig = rig();
    assert_eq!(rig.send(&request::map(1, 0x8000, 0x9fff, 0x1_0000)), Status::Ok);
    for (start, last) in [
        (0x4000, 0x4fff),
        (0x3000, 0x4fff),
        (0x4000, 0x5fff),
        (0x3000, 0x5fff),
        (0x9000, 0x9fff),
        (0x9000, 0xafff),
        (0x0000, 0xffff),
    ] {
        rig.refuse(&request::map(1, start, last, 0x5_0000).encode(), Status::Inval);
    }
    assert_eq!(rig.send(&request::map(1, 0x5000, 0x7fff, 0x5_0000)), Status::Ok, "the gap between two");
    assert_eq!((rig.machine.read(16, 0x4fff), rig.machine.read(16, 0x5000)), (Some(0x9fff), Some(0x5_0000)));
}

#[test]
fn d32_unknown_map_flags_are_refused() {
    let mut rig = rig();
    for bit in 3..32 {
        assert_eq!(rig.send_bytes(&flags(0x1000, 0x1fff, 1 << bit | 3)), Status::Inval, "bit {bit}");
    }
    rig.refuse(&flags(0x1000, 0x1fff, 8), Status::Inval);
    rig.refuse(&flags(0x1000, 0x1fff, u32::MAX), Status::Inval);
    // Before anything else is looked at.
    rig.refuse(&flags(0x1001, 0, 8), Status::Inval);
    for known in 0..8 {
        let start = 0x10_0000 + (u64::from(known) << 12);
        assert_eq!(rig.send_bytes(&flags(start, start + 0xfff, known)), Status::Ok);
    }
}

#[test]
fn d32_the_mmio_flag_is_unknown_where_it_was_not_negotiated() {
    let mut rig = Rig::new(Setup::accepting(DeviceConfig::FEATURES - Features::MMIO));
    assert_eq!(rig.send(&request::attach(1, 16)), Status::Ok);
    rig.refuse(&flags(0x1000, 0x1fff, 5), Status::Inval);
    assert_eq!(rig.send_bytes(&flags(0x1000, 0x1fff, 1)), Status::Ok);
}

#[test]
fn d33_map_in_an_unknown_domain_is_noent() {
    let mut rig = rig();
    for domain in [0, 3, u32::MAX] {
        rig.refuse(&request::map(domain, 0x1000, 0x1fff, 0x5000).encode(), Status::NoEnt);
    }
    // Before the range is looked at.
    rig.refuse(&request::map(3, 0x1001, 0, 0x5000).encode(), Status::NoEnt);
}

#[test]
fn d34_map_in_a_bypass_domain_is_inval() {
    let mut rig = rig();
    rig.refuse(&request::map(2, 0x1000, 0x1fff, 0x5000).encode(), Status::Inval);
    assert_eq!(rig.machine.read(17, 0x1000), Some(0x1000));
}

#[test]
fn d35_writes_pass_only_with_the_write_flag() {
    let mut rig = rig();
    let pages = [
        (MapFlags::empty(), false),
        (MapFlags::READ, false),
        (MapFlags::WRITE, true),
        (MapFlags::READ | MapFlags::WRITE, true),
        (MapFlags::MMIO | MapFlags::READ, false),
        (MapFlags::MMIO | MapFlags::WRITE, true),
    ];
    for (page, (flags, writes)) in (0x10..).zip(pages) {
        let start = page << 12;
        assert_eq!(rig.send(&request::map_with(1, start, start + 0xfff, start, flags)), Status::Ok);
        let write = rig.machine.peek(16, None, start, AccessKind::Write);
        assert_eq!(write, if writes { Ok(start) } else { Err(FaultCause::Permission) }, "{flags:?}");
        // Nor after a read has brought the translation into a cache.
        let _ = rig.machine.peek(16, None, start, AccessKind::Read);
        assert_eq!(rig.machine.peek(16, None, start, AccessKind::Write).is_ok(), writes, "{flags:?}");
    }
}

#[test]
fn d36_reads_pass_only_with_the_read_flag() {
    // The text permits reads of a mapping that has WRITE only; this host knows write-only mappings.
    let mut rig = rig();
    assert_eq!(rig.send(&request::map_with(1, 0x1000, 0x1fff, 0x5000, MapFlags::WRITE)), Status::Ok);
    assert_eq!(rig.machine.write(16, 0x1000), Some(0x5000));
    assert_eq!(rig.machine.peek(16, None, 0x1000, AccessKind::Read), Err(FaultCause::Permission));
    assert_eq!(rig.send(&request::map_with(1, 0x2000, 0x2fff, 0x6000, MapFlags::READ)), Status::Ok);
    assert_eq!(rig.machine.read(16, 0x2000), Some(0x6000));
}

#[test]
fn d37_map_over_a_reserved_region_is_refused() {
    let mut rig = rig();
    assert_eq!(rig.send(&request::attach(1, 8)), Status::Ok, "an MSI window at 0x8000000");
    assert_eq!(rig.send(&request::attach(1, 25)), Status::Ok, "0x100000-0x10ffff");
    for (start, last) in [
        (0x800_0000, 0x80f_ffff),
        (0x800_0000, 0x800_0fff),
        (0x7ff_f000, 0x800_0fff),
        (0x80f_f000, 0x810_0fff),
        (0x700_0000, 0x90f_ffff),
        (0x10_f000, 0x10_ffff),
        (0x10_f000, 0x11_0fff),
        (0xf_f000, 0x10_0fff),
    ] {
        rig.refuse(&request::map(1, start, last, 0x2000_0000).encode(), Status::Inval);
    }
    for (start, last) in
        [(0x7ff_f000, 0x7ff_ffff), (0x810_0000, 0x810_0fff), (0xf_f000, 0xf_ffff), (0x11_0000, 0x11_0fff)]
    {
        assert_eq!(rig.send(&request::map(1, start, last, 0x2000_0000)), Status::Ok);
    }
    // A domain none of whose endpoints has the region may map it.
    assert_eq!(rig.send(&request::attach(3, 9)), Status::Ok);
    assert_eq!(rig.send(&request::map(3, 0x10_0000, 0x10_ffff, 0)), Status::Ok);
}

#[test]
fn map_of_everything_is_one_mapping() {
    let mut rig = rig_of_everything();
    rig.refuse(&request::map(1, 0, u64::MAX, 0).encode(), Status::Inval);
    assert_eq!(rig.send(&request::unmap(1, 0x4000, 0x4fff)), Status::Ok);
    assert_eq!(rig.send(&request::map(1, 0, u64::MAX, 0)), Status::Ok);
    for iova in [0, 0x1234, 1 << 63, u64::MAX] {
        assert_eq!((rig.machine.read(16, iova), rig.machine.write(16, iova)), (Some(iova), Some(iova)));
    }
    rig.refuse(&request::map(1, 0x1000, 0x1fff, 0).encode(), Status::Inval);
    rig.refuse(&request::unmap(1, 0, u64::MAX - 0x1000).encode(), Status::Range);
    assert_eq!(rig.send(&request::unmap(1, 0, u64::MAX)), Status::Ok);
    assert_eq!(rig.machine.read(16, 0x1234), None);
    rig.works();
}

#[test]
fn map_of_everything_outside_the_input_range_is_range() {
    rig().refuse(&request::map(1, 0, u64::MAX, 0).encode(), Status::Range);
}

#[test]
fn map_that_ends_before_it_starts_is_range() {
    let mut rig = rig_of_everything();
    for (start, last) in [(0x2000, 0x1fff), (0x2000, 0xfff), (u64::MAX - 0xfff, 0xfff), (0x1000, 0xfff)] {
        rig.refuse(&request::map(1, start, last, 0x5000).encode(), Status::Range);
    }
}

#[test]
fn map_whose_target_wraps_is_range() {
    let mut rig = rig_of_everything();
    for (start, last, output) in [
        (0x1000, 0x2fff, u64::MAX - 0xfff),
        (0x10_0000, u64::MAX, 0x20_0000),
        (0x1000, u64::MAX, 0x2000),
        (0x10_0000, 0x10_0000 + (1 << 40) - 1, u64::MAX - 0xf_ffff_efff),
    ] {
        rig.refuse(&request::map(1, start, last, output).encode(), Status::Range);
    }
    // The last page of the target space can be mapped.
    assert_eq!(rig.send(&request::map(1, 0x1000, 0x1fff, u64::MAX - 0xfff)), Status::Ok);
    assert_eq!(rig.machine.read(16, 0x1fff), Some(u64::MAX));
}

#[test]
fn map_beyond_a_limit_is_nomem() {
    let limits = Limits { max_mappings_per_domain: 3, max_mappings: 4, ..Limits::DEFAULT };
    let mut rig = rig_with(DeviceConfig { limits, ..DeviceConfig::default() });
    assert_eq!(rig.send(&request::map(1, 0x5000, 0x5fff, 0)), Status::Ok);
    assert_eq!(rig.send(&request::map(1, 0x6000, 0x6fff, 0)), Status::Ok);
    let before = rig.machine.snapshot();
    assert_eq!(rig.send(&request::map(1, 0x7000, 0x7fff, 0)), Status::NoMem, "three in the domain");
    assert_eq!(rig.machine.snapshot(), before);
    assert_eq!(rig.send(&request::attach(3, 8)), Status::Ok);
    assert_eq!(rig.send(&request::map(3, 0x7000, 0x7fff, 0)), Status::Ok);
    assert_eq!(rig.send(&request::map(3, 0x8000, 0x8fff, 0)), Status::NoMem, "four in all");
    assert_eq!(rig.send(&request::unmap(1, 0, 0xffff)), Status::Ok);
    assert_eq!(rig.send(&request::map(3, 0x8000, 0x8fff, 0)), Status::Ok);
    // What a domain takes along when it goes is free, too.
    assert_eq!(rig.send(&request::map(3, 0x9000, 0x9fff, 0)), Status::Ok);
    assert_eq!(rig.send(&request::detach(3, 8)), Status::Ok);
    for page in 1..=3 {
        assert_eq!(rig.send(&request::map(1, page << 12, (page << 12) + 0xfff, 0)), Status::Ok);
    }
}
