//! Reserved regions and interrupts.

use viommu_wire::ReservedKind;

use super::super::EndpointError;
use super::*;
use crate::mapping::{MapFlags, Mapping};

fn region(kind: ReservedKind, start: u64, last: u64) -> ReservedRegion {
    ReservedRegion { kind, range: IovaRange::new(Iova(start), Iova(last)).unwrap() }
}

fn regions() -> Vec<ReservedRegion> {
    vec![
        region(ReservedKind::Reserved, 0x900_0000, 0x900_0fff),
        region(ReservedKind::Msi, 0x800_0000, 0x80f_ffff),
        region(ReservedKind::Reserved, u64::MAX - 0xff, u64::MAX),
    ]
}

fn host(arch: Arch, memory: &Memory) -> SoftHost<Memory> {
    let mut host = SoftHost::new(memory.clone());
    host.add_endpoint(ENDPOINT, endpoint_caps(arch, regions())).unwrap();
    host
}

#[test]
fn interrupts_pass_untranslated_and_nothing_else_in_a_region_does() {
    for strict in [false, true] {
        for spec in [SpaceSpec::Identity, SpaceSpec::Mapped] {
            let mut host = host(Arch::Arm, &Memory::new());
            host.set_strict(strict);
            let mut space = host.create(spec).unwrap();
            if let SpaceSpec::Mapped = spec {
                // Around the regions, which the device would not let happen.
                let mapping = Mapping {
                    range: range(0x700_0000, 0x300_0000),
                    output: Gpa(0x700_0000),
                    flags: MapFlags::READ,
                };
                host.map(&mut space, mapping).unwrap();
            }
            let stream = Stream::untagged(ENDPOINT);
            host.bind(stream, Some(&mut space)).unwrap();
            let mut dma = |address, access| host.translate(stream, Iova(address), access, |piece| piece);
            for _ in 0..2 {
                for address in [0x800_0000, 0x802_0040, 0x80f_ffff] {
                    let piece = dma(address, Access::WRITE).unwrap();
                    assert_eq!((piece.output, piece.length <= 0x810_0000 - address), (Gpa(address), true));
                    assert_eq!(dma(address, Access::READ), Err(FaultCause::Unmapped));
                }
                for access in [Access::READ, Access::WRITE] {
                    assert_eq!(dma(0x900_0000, access), Err(FaultCause::Unmapped));
                    assert_eq!(dma(0x900_0fff, access), Err(FaultCause::Unmapped));
                }
                for address in [0x7ff_ffff, 0x810_0000, 0x8ff_ffff, 0x900_1000] {
                    let piece = dma(address, Access::READ).unwrap();
                    assert_eq!(piece.output, Gpa(address));
                    assert!(address > 0x900_0000 || address + piece.length <= 0x900_0000);
                }
            }
        }
    }
}

#[test]
fn a_guest_table_translates_everything_but_interrupts_of_vtd() {
    const MSI: u64 = 0x800_0000;
    for arch in [Arch::Arm, Arch::Vtd] {
        for strict in [false, true] {
            let mut world = World::new(arch);
            let table = world.page_table();
            world.map(table, MSI - 0x1000, 0x2000, 0x5000_0000, Attrs::READ_WRITE);
            for pasid in [0, 1] {
                world.set_context(pasid, 10, table);
            }
            let mut host = host(arch, &world.memory);
            host.set_strict(strict);
            let mut space =
                host.create(SpaceSpec::GuestTable { endpoint: ENDPOINT, table: &world.table }).unwrap();
            host.bind(Stream::untagged(ENDPOINT), Some(&mut space)).unwrap();
            let mut dma = |stream, access| host.translate(stream, Iova(MSI), access, |piece| piece.output.0);
            for _ in 0..2 {
                let translated = Ok(0x5000_1000);
                assert_eq!(dma(Stream::untagged(ENDPOINT), Access::READ), translated);
                assert_eq!(dma(tagged(1), Access::WRITE), translated);
                let interrupt = if arch == Arch::Vtd { Ok(MSI) } else { translated };
                assert_eq!(dma(Stream::untagged(ENDPOINT), Access::WRITE), interrupt);
            }
        }
    }
}

#[test]
fn endpoints_are_checked() {
    let mut host = SoftHost::new(Memory::new());
    let caps = |reserved| EndpointCaps { reserved, ..EndpointCaps::default() };
    let (msi, reserved) = (ReservedKind::Msi, ReservedKind::Reserved);
    let overlapping = caps(vec![region(reserved, 0x1000, 0x1fff), region(reserved, 0x1fff, 0x2fff)]);
    assert_eq!(host.add_endpoint(ENDPOINT, overlapping), Err(EndpointError::ReservedOverlap));
    let two = caps(vec![region(msi, 0x1000, 0x1fff), region(msi, 0x2000, 0x2fff)]);
    assert_eq!(host.add_endpoint(ENDPOINT, two), Err(EndpointError::TwoMsiRegions));
    assert_eq!(Host::endpoints(&host), []);
    assert_eq!(host.add_endpoint(ENDPOINT, caps(regions())), Ok(()));
    assert_eq!(host.add_endpoint(ENDPOINT, caps(vec![])), Err(EndpointError::Exists));
    assert_eq!(host.caps(ENDPOINT).unwrap().reserved.len(), 3);
}
