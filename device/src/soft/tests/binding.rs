//! Which space serves which stream, and that a change of it takes effect at once.

use super::*;
use crate::host::HostError;
use crate::mapping::{MapFlags, Mapping};

const PAGE: u64 = 0x40_0000;

fn untagged() -> Stream {
    Stream::untagged(ENDPOINT)
}

fn read(host: &mut SoftHost<Memory>, stream: Stream) -> Result<u64, FaultCause> {
    host.translate(stream, Iova(PAGE), Access::READ, |piece| piece.output.0)
}

/// A page table that leads [`PAGE`] to `output`.
fn first_stage(memory: &mut Memory, output: u64) -> Canonical {
    let table = PageTable::new(Arch::Vtd, memory);
    table.map(memory, range(PAGE, 0x1000), Gpa(output), Attrs::READ_WRITE);
    let PageTable::Vtd(table) = table else { panic!("not VT-d") };
    Canonical::VtdFirstStage(table)
}

fn vtd_host(memory: &Memory) -> SoftHost<Memory> {
    let mut host = SoftHost::new(memory.clone());
    host.add_endpoint(ENDPOINT, endpoint_caps(Arch::Vtd, vec![])).unwrap();
    host.add_endpoint(OTHER, endpoint_caps(Arch::Vtd, vec![])).unwrap();
    host
}

#[test]
fn exact_binding_comes_before_the_untagged_one() {
    let mut memory = Memory::new();
    let mut host = vtd_host(&memory);
    let table = first_stage(&mut memory, 0x1000);
    let spec = SpaceSpec::GuestTable { endpoint: ENDPOINT, table: &table };
    let mut own = host.create(spec).unwrap();
    let mut identity = host.create(SpaceSpec::Identity).unwrap();
    host.bind(untagged(), Some(&mut identity)).unwrap();
    assert_eq!(read(&mut host, tagged(5)), Ok(PAGE), "bypass serves every PASID");
    host.bind(tagged(5), Some(&mut own)).unwrap();
    assert_eq!(read(&mut host, tagged(5)), Ok(0x1000));
    assert_eq!(read(&mut host, tagged(6)), Ok(PAGE));
    assert_eq!(read(&mut host, untagged()), Ok(PAGE));
    host.bind(untagged(), None).unwrap();
    assert_eq!(read(&mut host, tagged(5)), Ok(0x1000));
    assert_eq!(read(&mut host, tagged(6)), Err(FaultCause::Unattached));
    host.bind(tagged(5), None).unwrap();
    assert_eq!(read(&mut host, tagged(5)), Err(FaultCause::Unattached));
}

#[test]
fn page_table_of_the_untagged_stream_serves_pasid_0() {
    let mut memory = Memory::new();
    let mut host = vtd_host(&memory);
    let table = first_stage(&mut memory, 0x1000);
    let mut space = host.create(SpaceSpec::GuestTable { endpoint: ENDPOINT, table: &table }).unwrap();
    host.bind(untagged(), Some(&mut space)).unwrap();
    assert_eq!(read(&mut host, untagged()), Ok(0x1000));
    assert_eq!(read(&mut host, tagged(0)), Ok(0x1000));
    assert_eq!(read(&mut host, tagged(1)), Err(FaultCause::Unattached));

    // One invalidation reaches both names, whichever it uses.
    let Canonical::VtdFirstStage(first) = table else { panic!("not a page table") };
    let mut output = 0x1000;
    for pasid in [None, Pasid::new(0)] {
        PageTable::Vtd(first).remap(
            &mut memory,
            range(PAGE, 0x1000),
            Gpa(output + 0x1000),
            Attrs::READ_WRITE,
        );
        for stream in [untagged(), tagged(0)] {
            assert_eq!(read(&mut host, stream), Ok(output));
        }
        output += 0x1000;
        host.invalidate(&[tlb(Scope::Pasid(pasid))]).unwrap();
        for stream in [untagged(), tagged(0)] {
            assert_eq!(read(&mut host, stream), Ok(output));
        }
    }
    host.bind(untagged(), None).unwrap();
    assert_eq!(read(&mut host, tagged(0)), Err(FaultCause::Unattached));
}

#[test]
fn mappings_serve_untagged_accesses_only() {
    let memory = Memory::new();
    let mut host = vtd_host(&memory);
    let mut space = host.create(SpaceSpec::Mapped).unwrap();
    let mapping = Mapping { range: range(PAGE, 0x1000), output: Gpa(0x1000), flags: MapFlags::READ };
    host.map(&mut space, mapping).unwrap();
    host.bind(untagged(), Some(&mut space)).unwrap();
    assert_eq!(read(&mut host, untagged()), Ok(0x1000));
    assert_eq!(read(&mut host, tagged(1)), Err(FaultCause::Unattached));
    host.bind(tagged(1), Some(&mut space)).unwrap();
    assert_eq!(read(&mut host, tagged(1)), Ok(0x1000));
    // Two streams: both lose it at once.
    assert_eq!(host.unmap(&mut space, range(PAGE, 0x1000)), Ok(1));
    for stream in [untagged(), tagged(1)] {
        assert_eq!(read(&mut host, stream), Err(FaultCause::Unmapped));
    }
}

#[test]
fn a_replaced_pasid_table_is_forgotten() {
    for arch in [Arch::Arm, Arch::Vtd] {
        let mut world = World::new(arch);
        let table = world.page_table();
        world.map(table, PAGE, 0x1000, 0x1000, Attrs::READ_WRITE);
        world.set_context(1, 11, table);
        assert_eq!(world.read(1, PAGE), Ok(0x1000));
        let spec = SpaceSpec::GuestTable { endpoint: ENDPOINT, table: &world.table };
        let mut again = world.host.create(spec).unwrap();
        world.remap(table, PAGE, 0x1000, 0x3000, Attrs::READ_WRITE);
        assert_eq!(world.read(1, PAGE), Ok(0x1000));
        world.host.bind(untagged(), Some(&mut again)).unwrap();
        assert_eq!(world.read(1, PAGE), Ok(0x3000));
        world.host.bind(untagged(), None).unwrap();
        assert_eq!(world.read(1, PAGE), Err(FaultCause::Unattached));
    }
}

#[test]
fn create_and_bind_refuse_what_cannot_be() {
    let mut memory = Memory::new();
    let mut host = vtd_host(&memory);
    let arm = World::new(Arch::Arm).table;
    fn spec(endpoint: EndpointId, table: &Canonical) -> SpaceSpec<'_> {
        SpaceSpec::GuestTable { endpoint, table }
    }
    assert_eq!(host.create(spec(ENDPOINT, &arm)), Err(HostError::Unsupported));
    let table = first_stage(&mut memory, 0x1000);
    assert_eq!(host.create(spec(EndpointId(1), &table)), Err(HostError::Unsupported));
    let outside = vtd::FirstStage::new(Gpa(0x1000), vtd::FirstStageFlags::empty(), 48, &vtd_caps()).unwrap();
    let outside = Canonical::VtdFirstStage(outside);
    assert_eq!(host.create(spec(ENDPOINT, &outside)), Err(HostError::BadAddress));
    // A directory of which only the beginning is memory.
    let last_page = Gpa(MEMORY.0 + MEMORY_SIZE as u64 - 0x1000);
    let cut =
        Canonical::VtdPasidTable(vtd::PasidTable::new(last_page, 14, Pasid::ZERO, &vtd_caps()).unwrap());
    assert_eq!(host.create(spec(ENDPOINT, &cut)), Err(HostError::BadAddress));

    let mut theirs = host.create(spec(OTHER, &table)).unwrap();
    let pasids =
        Canonical::VtdPasidTable(vtd::PasidTable::create(7, Pasid::ZERO, &vtd_caps(), &mut memory).unwrap());
    let mut pasids = host.create(spec(ENDPOINT, &pasids)).unwrap();
    let mut identity = host.create(SpaceSpec::Identity).unwrap();
    host.bind(untagged(), Some(&mut identity)).unwrap();
    assert_eq!(host.bind(untagged(), Some(&mut theirs)), Err(HostError::Unsupported));
    assert_eq!(host.bind(tagged(1), Some(&mut pasids)), Err(HostError::Unsupported));
    assert_eq!(read(&mut host, untagged()), Ok(PAGE));
    assert_eq!(read(&mut host, tagged(1)), Ok(PAGE));
}

#[test]
fn destroying_a_bound_space_unbinds_it() {
    let memory = Memory::new();
    let mut host = vtd_host(&memory);
    let mut space = host.create(SpaceSpec::Identity).unwrap();
    host.bind(untagged(), Some(&mut space)).unwrap();
    assert_eq!(read(&mut host, untagged()), Ok(PAGE));
    host.destroy(space);
    // Even when another space gets its place.
    let _other = host.create(SpaceSpec::Identity).unwrap();
    assert_eq!(read(&mut host, untagged()), Err(FaultCause::Unattached));
}

#[test]
fn binding_one_pasid_takes_it_from_the_pasid_table() {
    let mut world = World::new(Arch::Vtd);
    let table = world.page_table();
    world.map(table, PAGE, 0x1000, 0x1000, Attrs::READ_WRITE);
    for pasid in [1, 2] {
        world.set_context(pasid, 0, table);
        assert_eq!(world.read(pasid, PAGE), Ok(0x1000));
    }
    let own = first_stage(&mut world.memory, 0x2000);
    let mut own = world.host.create(SpaceSpec::GuestTable { endpoint: ENDPOINT, table: &own }).unwrap();
    world.host.bind(tagged(1), Some(&mut own)).unwrap();
    assert_eq!(world.read(1, PAGE), Ok(0x2000));
    // And back: nothing of its own table is left, and nothing of before.
    world.remap(table, PAGE, 0x1000, 0x3000, Attrs::READ_WRITE);
    world.host.bind(tagged(1), None).unwrap();
    assert_eq!(world.read(1, PAGE), Ok(0x3000));
    assert_eq!(world.read(2, PAGE), Ok(0x1000), "another PASID's translation is kept");
}
