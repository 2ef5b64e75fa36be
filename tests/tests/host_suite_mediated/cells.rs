//! What is special to mediation: what a guest sees of it, what it costs below, and its bounds.

use pgtable_formats::context::{Canonical, vtd};
use pgtable_formats::format::Attrs;
use pgtable_formats::{AccessKind, Fault, Gpa, Iova, IovaRange, Pasid, TableMem};
use viommu_device::host::{
    FaultCause, Host, HostError, Invalidation, MapError, Scope, SpaceSpec, Stream, TableCaps,
};
use viommu_device::mapping::{MapFlags, Mapping};
use viommu_device::mediated::{Mediated, MediationLimits, Space, Window, WindowError};
use viommu_device::{DeviceConfig, soft};
use viommu_tests::host_suite::soft::{
    ARM, INTEL, MediatedSoft as Soft, SMMUV3, VTD, WINDOW_BYTES, WINDOW_PAGE,
};
use viommu_tests::host_suite::{HostUnderTest, Restricted};
use viommu_tests::rig::{Bare, Memory, Sends, request};
use viommu_tests::tables::{PageTable, PasidTable};
use viommu_wire::{Caches, EndpointId, Properties, Property, ReservedKind, Status, numbers};

fn caps(soft: &Soft, endpoint: u32) -> TableCaps {
    soft.host.caps(EndpointId(endpoint)).and_then(|caps| caps.tables.clone()).expect("tables")
}

/// IOVA 0x1000 to page `page`.
fn leading(soft: &mut Soft, endpoint: u32, asid: u16, page: u64) -> PageTable {
    let caps = caps(soft, endpoint);
    let table = PageTable::new(&caps, asid, &mut soft.memory);
    table.map(&mut soft.memory, 0x1000, Memory::page(page).0, 0x1000, Attrs::READ_WRITE);
    table
}

fn space(soft: &mut Soft, endpoint: u32, table: &Canonical) -> Result<Space<soft::Space>, HostError> {
    soft.host.create(SpaceSpec::GuestTable { endpoint: EndpointId(endpoint), table })
}

fn tagged(endpoint: u32, pasid: u32) -> Stream {
    Stream { endpoint: EndpointId(endpoint), pasid: Pasid::new(pasid) }
}

fn untagged(endpoint: u32) -> Stream {
    Stream::untagged(EndpointId(endpoint))
}

fn invalidate(soft: &mut Soft, endpoint: u32, scope: Scope, caches: Caches) {
    let endpoint = EndpointId(endpoint);
    let one = Invalidation { endpoint, scope, caches, leaf: false, tag: None, global: false };
    soft.host.invalidate(&[one]).expect("invalidated");
}

fn page(number: u64) -> Option<Gpa> {
    Some(Memory::page(number))
}

/// A guest is offered both kinds, the hardware's own first, and told of the window; and may change from one to the other
/// and back, all by requests.
#[test]
fn a_guest_has_both_kinds_and_moves_between_them() {
    for (endpoint, formats) in [
        (8, [numbers::FORMAT_ARM_SMMU3, numbers::FORMAT_ARM_PT]),
        (16, [numbers::FORMAT_INTEL_PT, numbers::FORMAT_INTEL_PASID_TABLE]),
    ] {
        let mut soft =
            Soft::mediated([endpoint, endpoint + 1], false, if endpoint == 8 { ARM } else { INTEL });
        let first = leading(&mut soft, endpoint, 1, 16);
        let second = leading(&mut soft, endpoint, 2, 17);
        let all = PasidTable::new(&caps(&soft, endpoint), 13, &mut soft.memory);
        all.set(&mut soft.memory, 0, &first);
        all.set(&mut soft.memory, 5, &second);
        let mut bare = Bare::over(DeviceConfig::default(), None, soft.host);

        let reply = bare.raw(&request::probe(endpoint).encode(), 516);
        let properties: Vec<Property> =
            Properties::new(&reply.bytes[..512]).map(|property| property.expect("well formed")).collect();
        assert!(
            properties
                .iter()
                .any(|property| matches!(property, Property::TableFormats(list) if list.iter().eq(formats))),
            "{properties:?}"
        );
        let window = Memory::page(WINDOW_PAGE);
        let is_told = properties.iter().any(|property| {
            matches!(property, Property::ReservedRegion(region) if region.kind == ReservedKind::Reserved
                && region.range.start() == Iova(window.0)
                && region.range.last() == Iova(window.0 + WINDOW_BYTES - 1))
        });
        assert_eq!(is_told, endpoint == 8);

        let leads = |bare: &mut Bare<Mediated<Restricted, _>>| {
            [None, Some(0), Some(5), Some(6)].map(|pasid: Option<u32>| {
                let stream = Stream { endpoint: EndpointId(endpoint), pasid: pasid.and_then(Pasid::new) };
                let access = pgtable_formats::Access::READ;
                let inner = &mut bare.device.host_mut().host_mut().inner;
                inner.peek(stream, Iova(0x1000), access).ok().map(|piece| piece.output)
            })
        };
        let tagged_zero = |number| if endpoint == 8 { None } else { page(number) };
        let table = |pasid, table: &PageTable| {
            request::attach_table(1, endpoint, table.descriptor(pasid).expect("a descriptor"))
        };
        for _ in 0..3 {
            assert_eq!(bare.send(&request::attach_table(1, endpoint, all.descriptor())), Status::Ok);
            assert_eq!(leads(&mut bare), [page(16), tagged_zero(16), page(17), None]);
            assert_eq!(bare.send(&table(6, &first)), Status::Ok);
            assert_eq!(leads(&mut bare), [None, None, None, page(16)]);
            assert_eq!(bare.send(&table(0, &second)), Status::Ok);
            assert_eq!(leads(&mut bare), [page(17), tagged_zero(17), None, page(16)]);
            assert_eq!(bare.send(&request::attach_table(1, endpoint, request::unbind(6))), Status::Ok);
            assert_eq!(leads(&mut bare), [page(17), tagged_zero(17), None, None]);
        }
        assert_eq!(bare.send(&table(5, &first)), Status::Ok);
        bare.device.reset();
        assert_eq!(leads(&mut bare), [None; 4]);
        let held = bare.device.host().held(EndpointId(endpoint)).expect("an endpoint");
        assert_eq!((held.page_tables, held.entries), (0, 0));
    }
}

/// No table of a guest may lie in the window, and no mapping lead there.
#[test]
fn the_window_is_out_of_reach() {
    let mut soft = Soft::mediated(SMMUV3, false, ARM);
    let TableCaps::Smmuv3(arm) = caps(&soft, 8) else { panic!() };
    let window = Memory::page(WINDOW_PAGE);
    let bare = leading(&mut soft, 8, 1, 16);
    let PageTable::Smmuv3 { bare, .. } = bare else { panic!() };
    for at in [window.0, window.0 + WINDOW_BYTES - 0x1000] {
        use pgtable_formats::context::smmuv3;
        let cds = smmuv3::CdTable::from_ste(at, 2, &arm).expect("an aligned address");
        assert_eq!(space(&mut soft, 8, &Canonical::Smmuv3(cds)).err(), Some(HostError::BadAddress));
        let registers = smmuv3::PageTableRegisters { ttbr0: at, ..bare.registers() };
        let pages = smmuv3::PageTable::new(&registers, &arm).expect("an aligned address");
        let refused = space(&mut soft, 8, &Canonical::Smmuv3PageTable(pages));
        assert_eq!(refused.err(), Some(HostError::BadAddress));
    }
    let TableCaps::Vtd(intel) = caps(&soft, 16) else { panic!() };
    let table = vtd::FirstStage::new(window, vtd::FirstStageFlags::empty(), 48, &intel).expect("a table");
    let refused = space(&mut soft, 16, &Canonical::VtdFirstStage(table));
    assert_eq!(refused.err(), Some(HostError::BadAddress), "whoever's it is");

    let mut mapped = soft.host.create(SpaceSpec::Mapped).expect("a space");
    let range = IovaRange::from_length(Iova(0x10_0000), 0x2000).expect("a range");
    let flags = MapFlags::READ | MapFlags::WRITE;
    for output in [window, Gpa(window.0 - 0x1000), Gpa(window.0 + WINDOW_BYTES - 0x1000)] {
        let refused = soft.host.map(&mut mapped, Mapping { range, output, flags });
        assert_eq!(refused, Err(MapError::Host(HostError::BadAddress)), "{output}");
    }
    let beside = Gpa(window.0 + WINDOW_BYTES);
    assert_eq!(soft.host.map(&mut mapped, Mapping { range, output: beside, flags }), Ok(()));
}

#[test]
fn a_window_that_is_not_memory_is_no_window() {
    let guest = Memory::new(1 << 20);
    let window = Window::new(Gpa(Memory::BASE + (1 << 20)), 0x1000);
    let limits = MediationLimits::DEFAULT;
    let refused = Mediated::new(Restricted::new(&guest), guest.tables().clone(), window, limits);
    assert_eq!(refused.err(), Some(WindowError::NotMemory));
    let host = Mediated::new(Restricted::new(&guest), guest.tables().clone(), None, limits).expect("a host");
    let caps = host.caps(EndpointId(8)).expect("an endpoint");
    assert_eq!(caps, Restricted::new(&guest).caps(EndpointId(8)).expect("an endpoint"), "nothing more");
}

/// PASIDs cost memory where they are used; a window that is full is a NoMemory that changes nothing, and what is not
/// used any more makes room.
#[test]
fn the_window_bounds_page_tables() {
    // Level 1 for 20 bits of PASID, and three level-2 tables.
    let bytes = (128 << 10) + 3 * 4096;
    let mut soft = Soft::mediated_within(SMMUV3, false, ARM, bytes, MediationLimits::DEFAULT);
    let table = leading(&mut soft, 8, 1, 16).canonical().expect("a table");
    let mut spaces: Vec<_> = (0..5).map(|_| space(&mut soft, 8, &table).expect("a space")).collect();
    for (place, pasid) in [1, 64, 0xf_ffff].into_iter().enumerate() {
        soft.host.bind(tagged(8, pasid), Some(&mut spaces[place])).expect("room");
    }
    soft.host.bind(tagged(8, 63), Some(&mut spaces[3])).expect("room beside the first");
    assert_eq!(soft.host.window_left(), 0);
    assert_eq!(soft.host.bind(tagged(8, 128), Some(&mut spaces[4])), Err(HostError::NoMemory));
    assert_eq!(soft.leads(tagged(8, 0xf_ffff), 0x1000), page(16));
    soft.host.bind(tagged(8, 64), None).expect("unbound");
    soft.host.bind(tagged(8, 128), Some(&mut spaces[4])).expect("an empty level-2 table gone");
    assert_eq!([64, 128].map(|pasid| soft.leads(tagged(8, pasid), 0x1000)), [None, page(16)]);
    // Another endpoint finds no room before the first one has nothing bound.
    let other = leading(&mut soft, 9, 2, 17).canonical().expect("a table");
    let mut theirs = space(&mut soft, 9, &other).expect("a space");
    assert_eq!(soft.host.bind(tagged(9, 5), Some(&mut theirs)), Err(HostError::NoMemory));
    for pasid in [1, 63, 128, 0xf_ffff] {
        soft.host.bind(tagged(8, pasid), None).expect("unbound");
    }
    soft.host.bind(tagged(9, 5), Some(&mut theirs)).expect("all of the first one's");
    assert_eq!(soft.leads(tagged(9, 5), 0x1000), page(17));
    assert_eq!(soft.host.held(EndpointId(8)).expect("an endpoint").window_bytes, 0);
}

#[test]
fn one_endpoint_has_its_share_of_the_window() {
    let limits = MediationLimits { max_window_per_endpoint: (128 << 10) + 4096, ..MediationLimits::DEFAULT };
    let mut soft = Soft::mediated_within(SMMUV3, false, ARM, WINDOW_BYTES, limits);
    for endpoint in [8, 9] {
        let table = leading(&mut soft, endpoint, 1, 16).canonical().expect("a table");
        let mut first = space(&mut soft, endpoint, &table).expect("a space");
        let mut second = space(&mut soft, endpoint, &table).expect("a space");
        soft.host.bind(tagged(endpoint, 1), Some(&mut first)).expect("room");
        assert_eq!(soft.host.bind(tagged(endpoint, 64), Some(&mut second)), Err(HostError::NoMemory));
        soft.host.bind(tagged(endpoint, 2), Some(&mut second)).expect("room");
    }
}

/// A PASID table in which each of `pasids` leads to page 16.
fn bound(soft: &mut Soft, endpoint: u32, pasids: impl Iterator<Item = u32>) -> PasidTable {
    let table = PasidTable::new(&caps(soft, endpoint), 20, &mut soft.memory);
    let pages = leading(soft, endpoint, 1, 16);
    pasids.for_each(|pasid| table.set(&mut soft.memory, pasid, &pages));
    table
}

/// Only what differs is bound anew: everything else is one invalidation below.
#[test]
fn only_what_changed_is_bound() {
    let mut soft = Soft::mediated(VTD, false, INTEL);
    let table = bound(&mut soft, 16, (0..1000).map(|number| number * 17));
    let mut all = space(&mut soft, 16, &table.canonical()).expect("a space");
    soft.host.bind(untagged(16), Some(&mut all)).expect("bound");
    assert_eq!(soft.host.held(EndpointId(16)).expect("an endpoint").entries, 1000);
    assert_eq!(soft.leads(tagged(16, 17 * 999), 0x1000), page(16));
    let calls = |soft: &mut Soft, scope| {
        let before = soft.host.host().calls;
        invalidate(soft, 16, scope, Caches::PASID);
        soft.host.host().calls - before
    };
    assert_eq!(calls(&mut soft, Scope::Endpoint), 1, "nothing has changed");
    assert_eq!(calls(&mut soft, Scope::Pasid(Pasid::new(17))), 1);
    let other = leading(&mut soft, 16, 2, 17);
    table.set(&mut soft.memory, 34, &other);
    table.set(&mut soft.memory, 35, &other);
    table.clear(&soft.memory, 51);
    assert_eq!(calls(&mut soft, Scope::Pasid(Pasid::new(17))), 1, "another's");
    assert_eq!([34, 35, 51].map(|pasid| soft.leads(tagged(16, pasid), 0x1000)), [page(16), None, page(16)]);
    assert_eq!(calls(&mut soft, Scope::Pasid(Pasid::new(34))), 3, "a space, a binding, an invalidation");
    assert_eq!([34, 35, 51].map(|pasid| soft.leads(tagged(16, pasid), 0x1000)), [page(17), None, page(16)]);
    assert_eq!(calls(&mut soft, Scope::Endpoint), 4, "a space, two bindings, an invalidation");
    assert_eq!([34, 35, 51].map(|pasid| soft.leads(tagged(16, pasid), 0x1000)), [page(17), page(17), None]);
}

/// Entries beyond a limit are a NoMemory: of a table that is bound nothing happens then, and of one that changes what
/// goes does go.
#[test]
fn limits_bound_entries() {
    let limits = MediationLimits { max_entries_per_endpoint: 3, max_entries: 5, ..MediationLimits::DEFAULT };
    let mut soft = Soft::mediated_within(VTD, false, INTEL, WINDOW_BYTES, limits);
    let small = bound(&mut soft, 16, [0, 5, 70].into_iter());
    let large = bound(&mut soft, 16, [0, 5, 70, 71].into_iter());
    let mut small_space = space(&mut soft, 16, &small.canonical()).expect("a space");
    let mut large_space = space(&mut soft, 16, &large.canonical()).expect("a space");
    assert_eq!(soft.host.bind(untagged(16), Some(&mut large_space)), Err(HostError::NoMemory));
    assert_eq!(soft.leads(tagged(16, 5), 0x1000), None);
    soft.host.bind(untagged(16), Some(&mut small_space)).expect("as many as may be");
    let theirs = bound(&mut soft, 17, [0, 5, 70].into_iter());
    let mut their_space = space(&mut soft, 17, &theirs.canonical()).expect("a space");
    assert_eq!(
        soft.host.bind(untagged(17), Some(&mut their_space)),
        Err(HostError::NoMemory),
        "of all together"
    );
    let pages = leading(&mut soft, 16, 1, 17);
    small.set(&mut soft.memory, 71, &pages);
    small.set(&mut soft.memory, 72, &pages);
    small.clear(&soft.memory, 5);
    let one = Invalidation {
        endpoint: EndpointId(16),
        scope: Scope::Endpoint,
        caches: Caches::PASID,
        leaf: false,
        tag: None,
        global: false,
    };
    assert_eq!(soft.host.invalidate(&[one]).map_err(|stopped| stopped.error), Err(HostError::NoMemory));
    let seen = [5, 70, 71, 72].map(|pasid| soft.leads(tagged(16, pasid), 0x1000));
    assert_eq!(seen, [None, page(16), page(17), None]);
    soft.host.bind(untagged(16), None).expect("unbound");
    soft.host.bind(untagged(17), Some(&mut their_space)).expect("room for the other");
}

/// RID_PASID: its entry serves untagged accesses, and those with its number.
#[test]
fn untagged_accesses_use_the_entry_that_the_guest_names() {
    let mut soft = Soft::mediated(VTD, false, INTEL);
    let TableCaps::Vtd(vtd_caps) = caps(&soft, 16) else { panic!() };
    let three = Pasid::new(3).expect("20 bits");
    let table = vtd::PasidTable::create(7, three, &vtd_caps, &mut soft.memory).expect("RPS");
    let (first, second) = (leading(&mut soft, 16, 0, 16), leading(&mut soft, 16, 0, 17));
    let entry = |table: &PageTable| match table {
        PageTable::Vtd(table) => vtd::PasidEntry::first_stage(table, 1),
        PageTable::Smmuv3 { .. } => panic!(),
    };
    table.write(&mut soft.memory, three, &entry(&first)).expect("an entry");
    table
        .write(&mut soft.memory, Pasid::new(5).expect("20 bits"), &vtd::PasidEntry::pass_through(1))
        .expect("an entry");
    let mut all = space(&mut soft, 16, &Canonical::VtdPasidTable(table)).expect("a space");
    soft.host.bind(untagged(16), Some(&mut all)).expect("bound");
    let seen = |soft: &mut Soft| {
        [untagged(16), tagged(16, 3), tagged(16, 5)].map(|stream| soft.leads(stream, 0x1000))
    };
    assert_eq!(seen(&mut soft), [page(16), page(16), Some(Gpa(0x1000))], "bypass for a pass-through entry");
    table.clear(&soft.memory, three).expect("an entry");
    table.write(&mut soft.memory, three, &entry(&second)).expect("an entry");
    invalidate(&mut soft, 16, Scope::Pasid(None), Caches::PASID);
    assert_eq!(seen(&mut soft), [page(17), page(17), Some(Gpa(0x1000))]);
    soft.host.bind(untagged(16), None).expect("unbound");
    assert_eq!(seen(&mut soft), [None; 3]);
}

/// What is not there, or not legal, is a fault; a machine that tells of it tells why.
#[test]
fn faults_have_the_reason_of_the_guest_s_table() {
    let mut soft = Soft::mediated(VTD, false, INTEL);
    let table = bound(&mut soft, 16, [0, 5].into_iter());
    let PasidTable::Vtd(entries) = &table else { panic!() };
    // Reserved bits, and a page table that is nowhere.
    let bad = vtd::PasidEntry { reserved: [1, 0, 0, 0, 0], ..vtd::PasidEntry::pass_through(1) };
    entries.write(&mut soft.memory, Pasid::new(6).expect("20 bits"), &bad).expect("an entry");
    let TableCaps::Vtd(vtd_caps) = caps(&soft, 16) else { panic!() };
    let nowhere = vtd::FirstStage::new(Gpa(0x2_0000_0000), vtd::FirstStageFlags::empty(), 48, &vtd_caps);
    let nowhere = vtd::PasidEntry::first_stage(&nowhere.expect("a table"), 1);
    entries.write(&mut soft.memory, Pasid::new(7).expect("20 bits"), &nowhere).expect("an entry");
    let mut all = space(&mut soft, 16, &table.canonical()).expect("a space");
    soft.host.bind(untagged(16), Some(&mut all)).expect("bound");
    assert_eq!(soft.host.held(EndpointId(16)).expect("an endpoint").refused, 1);
    let cause = |soft: &mut Soft, stream| {
        assert_eq!(soft.access(stream, 0x1000, AccessKind::Read), None);
        soft.told().expect("a fault").cause
    };
    for (pasid, reason) in [
        (6, vtd::FaultReason::ENTRY_RESERVED),
        (8, vtd::FaultReason::ENTRY_NOT_PRESENT),
        (1 << 12, vtd::FaultReason::DIRECTORY_NOT_PRESENT),
    ] {
        assert_eq!(cause(&mut soft, tagged(16, pasid)), FaultCause::Table(Fault::Vtd(reason)), "{pasid}");
    }
    assert_eq!(cause(&mut soft, tagged(16, 7)), FaultCause::Unattached);

    let mut soft = Soft::mediated(SMMUV3, false, ARM);
    let table = leading(&mut soft, 8, 1, 16).canonical().expect("a table");
    let mut one = space(&mut soft, 8, &table).expect("a space");
    soft.host.bind(tagged(8, 5), Some(&mut one)).expect("bound");
    for stream in [untagged(8), tagged(8, 6), tagged(8, 600)] {
        assert_eq!(cause(&mut soft, stream), FaultCause::Unattached, "{stream:?}");
    }
    assert_eq!(soft.access(tagged(8, 5), 0x5000, AccessKind::Read), None);
    assert!(soft.told().is_some_and(|fault| fault.cause.is_mapping()));
}

/// The window is written and never read: whatever gets into it, the device goes on with what it knows.
#[test]
fn a_window_that_was_spoilt_leads_nowhere_else() {
    let mut soft = Soft::mediated(SMMUV3, false, ARM);
    let table = leading(&mut soft, 8, 1, 16).canonical().expect("a table");
    let mut one = space(&mut soft, 8, &table).expect("a space");
    let mut two = space(&mut soft, 8, &table).expect("a space");
    soft.host.bind(tagged(8, 5), Some(&mut one)).expect("bound");
    let victim = Memory::page(0x400);
    for at in (0..WINDOW_BYTES).step_by(8) {
        soft.guest.store(Gpa(Memory::page(WINDOW_PAGE).0 + at), victim.0 | 1);
    }
    soft.host.bind(tagged(8, 6), Some(&mut two)).expect("bound");
    soft.host.bind(tagged(8, 5), None).expect("unbound");
    soft.host.bind(tagged(8, 6), None).expect("unbound");
    for at in (0..0x1000).step_by(8) {
        assert_eq!(soft.memory.load(Gpa(victim.0 + at)), Ok(0), "written by the device");
    }
}
