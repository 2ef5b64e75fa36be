//! The window is out of a guest's reach: as a table, as an output, and for whatever walks there.

use pgtable_formats::{Access, Fault, NotMemory, TableMem};
use viommu_wire::{ReservedKind, ReservedRegion};

use super::super::ReadOnlyWindow;
use super::*;
use crate::host::FaultCause;
use crate::mapping::MapFlags;
use crate::soft::SoftHost;

const WINDOW_BYTES: u64 = 1 << 20;

fn window() -> Window {
    Window::new(WINDOW, WINDOW_BYTES).unwrap()
}

#[test]
fn what_walks_there_reads_and_does_not_write() {
    let memory = memory();
    let seen = ReadOnlyWindow::new(&memory, window());
    let inside = [WINDOW, Gpa(WINDOW.0 + WINDOW_BYTES - 8)];
    for at in inside {
        memory.store(at, 7).unwrap();
        assert_eq!(seen.load(at), Ok(7));
        assert_eq!(seen.compare_exchange(at, 7, 8), Err(NotMemory));
        assert_eq!(memory.load(at), Ok(7));
        let mut words = [0; 1];
        assert_eq!((seen.load_run(at, 8, &mut words), words), (1, [7]));
    }
    let before = Gpa(WINDOW.0 - 8);
    assert_eq!(seen.compare_exchange(before, 0, 8), Ok(Ok(0)));
    assert!(seen.contains(before, WINDOW));
}

/// A software host as a VMM sets it up: it walks through a window that it cannot write, and its endpoints have it
/// reserved. The device itself writes it.
fn soft(memory: &FlatMem) -> Mediated<SoftHost<ReadOnlyWindow<&FlatMem>>, &FlatMem> {
    let mut host = SoftHost::new(ReadOnlyWindow::new(memory, window()));
    let kinds = TableKinds::PASID_TABLE;
    let range = IovaRange::from_length(Iova(WINDOW.0), WINDOW_BYTES).unwrap();
    let caps = EndpointCaps {
        tables: Some(TableCaps::Smmuv3(arm_caps())),
        kinds,
        native: kinds,
        reserved: vec![ReservedRegion { kind: ReservedKind::Reserved, range }],
        ..EndpointCaps::default()
    };
    let vtd = TableCaps::Vtd(vtd_caps());
    let page_table = TableKinds::PAGE_TABLE;
    let intel =
        EndpointCaps { tables: Some(vtd), kinds: page_table, native: page_table, ..EndpointCaps::default() };
    host.add_endpoint(ARM, caps).unwrap();
    host.add_endpoint(VTD, intel).unwrap();
    Mediated::new(host, memory, Some(window()), MediationLimits::DEFAULT).unwrap()
}

/// All words of the window.
fn words(memory: &FlatMem) -> Vec<u64> {
    (0..WINDOW_BYTES).step_by(8).map(|at| memory.load(Gpa(WINDOW.0 + at)).unwrap()).collect()
}

/// Bypass: the reserved region is not let through, whatever the access.
#[test]
fn bypass_does_not_reach_the_window() {
    let memory = memory();
    let mut host = soft(&memory);
    let mut identity = host.create(SpaceSpec::Identity).unwrap();
    host.bind(Stream::untagged(ARM), Some(&mut identity)).unwrap();
    let mut reach = |at: u64, access| {
        host.host_mut().translate(Stream::untagged(ARM), Iova(at), access, |piece| piece.output.0)
    };
    for at in [WINDOW.0, WINDOW.0 + WINDOW_BYTES - 1] {
        for access in [Access::READ, Access::WRITE] {
            assert!(reach(at, access).is_err(), "{at:#x}");
        }
    }
    assert_eq!(reach(WINDOW.0 - 1, Access::WRITE), Ok(WINDOW.0 - 1));
    assert_eq!(reach(WINDOW.0 + WINDOW_BYTES, Access::WRITE), Ok(WINDOW.0 + WINDOW_BYTES));
}

/// MAP: no mapping leads there, be it by one byte.
#[test]
fn mappings_do_not_reach_the_window() {
    let memory = memory();
    let mut host = soft(&memory);
    let mut mapped = host.create(SpaceSpec::Mapped).unwrap();
    let flags = MapFlags::READ | MapFlags::WRITE;
    for (output, length, is_taken) in [
        (WINDOW.0, 0x1000, false),
        (WINDOW.0 - 0x1000, 0x1000, true),
        (WINDOW.0 - 0x1000, 0x1001, false),
        (WINDOW.0 + WINDOW_BYTES - 1, 1, false),
        (WINDOW.0 + WINDOW_BYTES, 0x1000, true),
        (0, 1 << 52, false),
        (u64::MAX - 0xfff, 0x1000, true),
    ] {
        let range = IovaRange::from_length(Iova(0), length).unwrap();
        let result = host.map(&mut mapped, Mapping { range, output: Gpa(output), flags });
        assert_eq!(result.is_ok(), is_taken, "{output:#x}+{length:#x}: {result:?}");
        host.unmap(&mut mapped, IovaRange::ALL).unwrap();
    }
}

/// Tables of a guest, of all kinds and at every place: the roots that are told with a request are refused.
#[test]
fn no_root_lies_in_the_window() {
    let memory = memory();
    let mut host = over(&memory, MediationLimits::DEFAULT);
    let refused = |host: &mut Both<'_, FlatMem>, endpoint, table: &Canonical| {
        host.create(SpaceSpec::GuestTable { endpoint, table }).err() == Some(HostError::BadAddress)
    };
    for at in [WINDOW.0, WINDOW.0 + WINDOW_BYTES - 0x1000] {
        // Both halves of an Arm table: TTB0, and TTB1 beside a TTB0 elsewhere.
        let lower = smmuv3::Tcr::from_bits(0x25_0080_3510);
        let both = smmuv3::Tcr::from_bits(0x25_b510_3510);
        for (tcr, ttbr0, ttbr1) in [(lower, at, 0), (both, MEMORY.0, at), (both, at, MEMORY.0)] {
            let registers = smmuv3::PageTableRegisters { asid: 1, tcr, ttbr0, ttbr1, mair: 0xff };
            let table = smmuv3::PageTable::new(&registers, &arm_caps()).unwrap();
            assert!(refused(&mut host, ARM, &Canonical::Smmuv3PageTable(table)), "{ttbr0:#x} {ttbr1:#x}");
        }
        let cds = smmuv3::CdTable::from_ste(at, 2, &arm_caps()).unwrap();
        assert!(refused(&mut host, ARM, &Canonical::Smmuv3(cds)));
        let flags = vtd::FirstStageFlags::empty();
        let first = vtd::FirstStage::new(Gpa(at), flags, 48, &vtd_caps()).unwrap();
        assert!(refused(&mut host, VTD, &Canonical::VtdFirstStage(first)));
        let pasids = vtd::PasidTable::new(Gpa(at), 7, Pasid::ZERO, &vtd_caps()).unwrap();
        assert!(refused(&mut host, VTD, &Canonical::VtdPasidTable(pasids)));
    }
    // One that begins before it and ends in it.
    let pasids = vtd::PasidTable::new(Gpa(WINDOW.0 - 0x1000), 14, Pasid::ZERO, &vtd_caps()).unwrap();
    assert!(refused(&mut host, VTD, &Canonical::VtdPasidTable(pasids)));
}

/// FSPTPTR of an entry that the device reads: the PASID is bound to nothing.
#[test]
fn an_entry_does_not_lead_into_the_window() {
    let memory = memory();
    let mut host = over(&memory, MediationLimits::DEFAULT);
    let guest = Guest::new();
    let page = (WINDOW.0 - MEMORY.0) >> 12;
    guest.set(&memory, 5, &entry(100));
    guest.set(&memory, 6, &entry(page));
    guest.set(&memory, 7, &entry(page + 255));
    guest.set(&memory, 8, &entry(page - 1));
    guest.bind(&mut host, VTD).unwrap();
    assert_eq!(leads(&host, VTD), [(5, 100), (8, page - 1)]);
    assert_eq!(host.held(VTD).unwrap().refused, 2);
    guest.set(&memory, 5, &entry(page));
    reread(&mut host, VTD, Scope::Pasid(Pasid::new(5))).unwrap();
    assert_eq!(leads(&host, VTD), [(8, page - 1)]);
    // Tables of entries that lie in it are read as any others: nothing of a guest's is written there.
    guest.link(&memory, 100, WINDOW);
    reread(&mut host, VTD, Scope::Endpoint).unwrap();
    assert_eq!(leads(&host, VTD), [(8, page - 1)]);
}

/// Pointers that only hardware follows: of descriptors that a guest fills itself, and of tables to those of a level below.
/// A walk that gets into the window reads there, and sets no flag.
#[test]
fn a_walk_does_not_write_the_window() {
    let mut memory = memory();
    let (linear, untagged) = (smmuv3::TableFormat::Linear, smmuv3::Untagged::Pasid0);
    let cds = smmuv3::CdTable::create(linear, 6, untagged, &arm_caps(), &mut memory).unwrap();
    let root = |page: u64| Gpa(MEMORY.0 + (page << 12));
    let (arm_root, vtd_root) = (root(500), root(501));
    let pages = |ttbr0| {
        let tcr = smmuv3::Tcr::from_bits(0x25_0080_3510);
        let registers = smmuv3::PageTableRegisters { asid: 1, tcr, ttbr0, ttbr1: 0, mair: 0xff };
        smmuv3::PageTable::new(&registers, &arm_caps()).unwrap()
    };
    for (pasid, at) in [(1, WINDOW), (2, arm_root)] {
        cds.write(&mut memory, Pasid::new(pasid).unwrap(), pages(at.0).cd()).unwrap();
    }
    memory.store(arm_root, WINDOW.0 | 3).unwrap();
    memory.store(vtd_root, WINDOW.0 | 7).unwrap();
    let mut host = soft(&memory);
    let create = |host: &mut Mediated<SoftHost<_>, _>, endpoint, table: Canonical| {
        host.create(SpaceSpec::GuestTable { endpoint, table: &table }).unwrap()
    };
    let mut all = create(&mut host, ARM, Canonical::Smmuv3(cds));
    host.bind(Stream::untagged(ARM), Some(&mut all)).unwrap();
    let mut one = create(&mut host, VTD, Canonical::VtdFirstStage(vtd_pages(501)));
    host.bind(tagged(VTD, 1), Some(&mut one)).unwrap();
    // Words that are entries to either architecture, without a flag for accesses.
    for value in [WINDOW.0 | 7, WINDOW.0 | 0x43] {
        for at in (0..WINDOW_BYTES).step_by(8) {
            memory.store(Gpa(WINDOW.0 + at), value).unwrap();
        }
        let before = words(&memory);
        for stream in [tagged(ARM, 1), tagged(ARM, 2), tagged(VTD, 1)] {
            for access in [Access::READ, Access::WRITE] {
                let _: Result<Gpa, FaultCause> =
                    host.host_mut().translate(stream, Iova(0x1000), access, |piece| piece.output);
            }
        }
        assert_eq!(words(&memory), before);
    }
    // A unit that sets flags stops where it cannot.
    for at in (0..WINDOW_BYTES).step_by(8) {
        memory.store(Gpa(WINDOW.0 + at), WINDOW.0 | 7).unwrap();
    }
    let result = host.host_mut().translate(tagged(VTD, 1), Iova(0x1000), Access::READ, |piece| piece.output);
    let denied = FaultCause::Table(Fault::Vtd(vtd::FaultReason::ENTRY_UPDATE_FAILED));
    assert_eq!(result, Err(denied));
}
