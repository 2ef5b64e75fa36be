//! Interrupts of endpoints whose DMA goes through tables of the guest: X-28.

use pgtable_formats::format::{Attrs, Format};
use pgtable_formats::leaf::vmsav8::{Granule, Vmsav8, Vmsav8Flags, Vmsav8Params};
use pgtable_formats::visit::leaf_at;
use pgtable_formats::{Access, AccessKind};
use viommu_device::host::EndpointCaps;
use viommu_device::{Gpa, Iova, IovaRange};
use viommu_guest::Endpoint;
use viommu_guest::tables::{AddressSpace, PasidTable, SpaceOptions, TableError, TableOptions};
use viommu_tests::rig::{Guest, Setup, default_endpoints, reserved, smmuv3, vtd};
use viommu_wire::ReservedKind;

/// The window of endpoints 8 and 9, and a doorbell in it.
const WINDOW: (u64, u64) = (0x800_0000, 0x80f_ffff);
const DOORBELL: u64 = 0x800_0040;

fn range(start: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova(start), Iova(last)).unwrap()
}

fn window() -> IovaRange {
    range(WINDOW.0, WINDOW.1)
}

fn attached(guest: &mut Guest, endpoint: &Endpoint) -> PasidTable {
    let domain = guest.driver.new_domain_id().unwrap();
    let mut table = PasidTable::new(&mut guest.driver, endpoint, domain, TableOptions::default()).unwrap();
    table.attach(&mut guest.driver).unwrap();
    table
}

fn space(guest: &mut Guest, endpoint: &Endpoint) -> AddressSpace {
    AddressSpace::new(&mut guest.driver, endpoint, SpaceOptions::default()).unwrap()
}

/// Where the interrupt arrives, sent as the device sends it: a write without a PASID.
fn interrupt(guest: &Guest, endpoint: u32) -> Option<u64> {
    guest.machine.access(endpoint, None, DOORBELL, AccessKind::Write).ok()
}

/// What the entry says that translates `iova`.
fn attrs(guest: &Guest, space: &AddressSpace, iova: u64) -> Option<Attrs> {
    let format = Vmsav8::new(Vmsav8Params {
        root: space.root(),
        granule: Granule::K4,
        input_lg2: 48,
        output_lg2: 48,
        wide: false,
        upper: false,
        flags: Vmsav8Flags::empty(),
    })
    .unwrap();
    let leaf = leaf_at(&format, guest.machine.memory(), Iova(iova)).unwrap()?;
    Some(format.attrs(leaf.level, leaf.entry))
}

#[test]
fn x28_interrupts_arrive_through_a_table_of_the_guest() {
    let mut guest = Guest::new(Setup::default());
    let before = guest.driver.platform().alloc.live();
    let (eight, nine) = (guest.probe(8), guest.probe(9));
    let mut table = attached(&mut guest, &eight);
    assert_eq!(interrupt(&guest, 8), None, "nothing is bound");
    let mut one = space(&mut guest, &eight);
    table.bind_at(&mut guest.driver, None, &mut one).unwrap();
    assert_eq!(interrupt(&guest, 8), Some(DOORBELL));
    for edge in [WINDOW.0, WINDOW.1] {
        assert_eq!(guest.machine.write(8, edge), Some(edge));
    }
    for beside in [WINDOW.0 - 1, WINDOW.1 + 1] {
        assert_eq!(guest.machine.write(8, beside), None);
    }

    // Mappings come and go beside it, and around it.
    let around = range(WINDOW.0 - 0x1000, WINDOW.1 + 0x1000);
    for (start, target) in [(WINDOW.0 - 0x1000, 0x4010_0000), (WINDOW.1 + 1, 0x4020_0000)] {
        one.map(&mut guest.driver, range(start, start + 0xfff), Gpa(target), Attrs::READ_WRITE).unwrap();
        assert_eq!((guest.machine.write(8, start), interrupt(&guest, 8)), (Some(target), Some(DOORBELL)));
    }
    one.unmap(&mut guest.driver, around).unwrap();
    for gone in [WINDOW.0 - 0x1000, WINDOW.1 + 1] {
        assert_eq!((guest.machine.write(8, gone), interrupt(&guest, 8)), (None, Some(DOORBELL)));
    }
    one.unmap(&mut guest.driver, range(0, (1 << 48) - 1)).unwrap();
    assert_eq!(interrupt(&guest, 8), Some(DOORBELL));

    // Another space in its place, and the first again; and a second endpoint on the same space.
    table.unbind(&mut guest.driver, None, &mut one).unwrap();
    assert_eq!(interrupt(&guest, 8), None);
    let mut two = space(&mut guest, &eight);
    table.bind_at(&mut guest.driver, None, &mut two).unwrap();
    assert_eq!(interrupt(&guest, 8), Some(DOORBELL));
    table.unbind(&mut guest.driver, None, &mut two).unwrap();
    table.bind_at(&mut guest.driver, None, &mut one).unwrap();
    let mut other = attached(&mut guest, &nine);
    other.bind_at(&mut guest.driver, None, &mut one).unwrap();
    assert_eq!((interrupt(&guest, 8), interrupt(&guest, 9)), (Some(DOORBELL), Some(DOORBELL)));

    table.unbind(&mut guest.driver, None, &mut one).unwrap();
    other.unbind(&mut guest.driver, None, &mut one).unwrap();
    for table in [table, other] {
        table.release(&mut guest.driver).map_err(|(_, error)| error).unwrap();
    }
    for space in [one, two] {
        space.release(&mut guest.driver).map_err(|(_, error)| error).unwrap();
    }
    assert_eq!(guest.driver.platform().alloc.live(), before, "windows go with their spaces");
}

#[test]
fn x28_the_window_is_device_memory_of_untagged_dma_only() {
    let mut guest = Guest::new(Setup::default());
    let endpoint = guest.probe(8);
    let mut table = attached(&mut guest, &endpoint);
    let mut shared = space(&mut guest, &endpoint);
    let pasid = table.bind(&mut guest.driver, &mut shared).unwrap();
    let at = |guest: &Guest, space: &AddressSpace| attrs(guest, space, DOORBELL);
    assert_eq!(at(&guest, &shared), None, "addresses of a process are its own");
    shared.map(&mut guest.driver, window(), Gpa(0x4000_0000), Attrs::READ_WRITE).unwrap();
    assert_eq!(guest.machine.read_with(8, pasid.value(), DOORBELL), Some(0x4000_0040));

    let mut untagged = space(&mut guest, &endpoint);
    table.bind_at(&mut guest.driver, None, &mut untagged).unwrap();
    // Index 1 of MAIR is device memory.
    assert_eq!(at(&guest, &untagged), Some(Attrs { memory_type: 1, ..Attrs::READ_WRITE }));
}

#[test]
fn x28_nothing_else_is_mapped_over_the_window() {
    let mut guest = Guest::new(Setup::default());
    let endpoint = guest.probe(8);
    let mut table = attached(&mut guest, &endpoint);
    let mut one = space(&mut guest, &endpoint);
    // What was there first stays, and the endpoint does not get the space.
    let page = range(WINDOW.0 + 0x3000, WINDOW.0 + 0x3fff);
    one.map(&mut guest.driver, page, Gpa(0x4010_0000), Attrs::READ_WRITE).unwrap();
    let refused = table.bind_at(&mut guest.driver, None, &mut one);
    assert_eq!(refused, Err(TableError::MsiWindow(window())));
    assert_eq!((interrupt(&guest, 8), guest.machine.write(8, page.start().0)), (None, None));
    let kept = one.translate(&guest.driver, page.start(), Access::WRITE).unwrap();
    assert_eq!(kept.apply(page.start()), Gpa(0x4010_0000));
    one.unmap(&mut guest.driver, page).unwrap();
    table.bind_at(&mut guest.driver, None, &mut one).unwrap();

    for over in
        [window(), page, range(WINDOW.0 - 0x1000, WINDOW.0 + 0xfff), range(WINDOW.1 - 0xfff, 0x90f_ffff)]
    {
        let refused = one.map(&mut guest.driver, over, Gpa(0x4010_0000), Attrs::READ_WRITE);
        assert_eq!(refused, Err(TableError::MsiWindow(over)));
    }
    // Its pages cannot be taken out, whatever the range.
    one.unmap(&mut guest.driver, page).unwrap();
    assert_eq!(guest.machine.write(8, page.start().0), Some(page.start().0));
    assert_eq!((interrupt(&guest, 8), guest.machine.write(8, WINDOW.0 - 0x1000)), (Some(DOORBELL), None));
}

#[test]
fn x28_on_vtd_no_window_is_mapped() {
    let window = reserved(ReservedKind::Msi, 0xfee0_0000, 0xfeef_ffff);
    let caps =
        |tables| EndpointCaps { tables: Some(tables), reserved: vec![window], ..EndpointCaps::default() };
    let mut endpoints = default_endpoints();
    endpoints.extend([(30, caps(vtd())), (31, caps(smmuv3()))]);
    let mut guest = Guest::new(Setup { endpoints, ..Setup::default() });
    for (number, mapped) in [(30, false), (31, true)] {
        let endpoint = guest.probe(number);
        assert_eq!(endpoint.properties().msi(), Some(window.range));
        let mut table = attached(&mut guest, &endpoint);
        let mut space = space(&mut guest, &endpoint);
        table.bind_at(&mut guest.driver, None, &mut space).unwrap();
        let found = space.translate(&guest.driver, window.range.start(), Access::WRITE);
        assert_eq!(found.is_ok(), mapped, "{found:?}");
        // The interrupt arrives on both.
        assert_eq!(guest.machine.write(number, 0xfee0_1004), Some(0xfee0_1004));
    }
}
