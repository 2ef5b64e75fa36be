//! Tables in guest memory: what is bound is read back by lookup and walk, as hardware does, and every change is
//! followed by the request that it needs.

mod empty;

use alloc::{vec, vec::Vec};

use pgtable_formats::context::{Canonical, Context, smmuv3, vtd};
use pgtable_formats::edit::EditError;
use pgtable_formats::format::Attrs;
use pgtable_formats::{Access, Fault, Gpa, Iova, IovaRange, Pasid};
use proptest::prelude::*;
use viommu_wire::{
    AttachTable, Caches, DomainId, EndpointId, Invalidate, InvalidateScope, Property, Request, ReservedKind,
    ReservedRegion, Status, TableDescriptor,
};

use super::{TestDriver, driver, smmuv3_endpoint, vtd_endpoint};
use crate::hal::fake::{FakeTransport, Mood};
use crate::tables::{
    AddressSpace, EmptyTables, PasidTable, SpaceOptions, Stale, Style, TableError, TableOptions,
};
use crate::{Endpoint, EndpointProperties, RequestError};

const DOMAIN: DomainId = DomainId(5);

pub(super) fn range(first: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova(first), Iova(last)).unwrap()
}

fn pasid(value: u32) -> Option<Pasid> {
    Pasid::new(value)
}

pub(super) fn smmuv3() -> Endpoint {
    smmuv3_endpoint(8, smmuv3::IdRegisters::SOFTWARE, 20)
}

/// Behind an SMMUv3 whose device keeps the table of PASIDs.
pub(super) fn smmuv3_pages() -> Endpoint {
    arm_with(&[0x80])
}

fn arm_with(formats: &[u8]) -> Endpoint {
    let smmuv3::IdRegisters { idr0, idr1, idr3, idr5 } = smmuv3::IdRegisters::SOFTWARE;
    super::endpoint(8, Property::HwArmSmmu3 { idr0, idr1, idr3, idr5 }, 20, formats)
}

pub(super) fn vtd() -> Endpoint {
    vtd_endpoint(8, &[0x81, 2])
}

/// Endpoints of every hardware, and PASID widths that make every layout of table.
fn all() -> Vec<(Endpoint, u8)> {
    let software = smmuv3::IdRegisters::SOFTWARE;
    let linear = smmuv3::IdRegisters { idr0: software.idr0 & !(1 << 19), ..software };
    let only_64k = smmuv3::IdRegisters { idr5: software.idr5 & !0x30, ..software };
    let only_16k = smmuv3::IdRegisters { idr5: software.idr5 & !0x50, ..software };
    let small =
        smmuv3::IdRegisters { idr0: software.idr0 & !(1 << 12), idr5: software.idr5 & !7 | 2, ..software };
    vec![
        (smmuv3(), 0),
        (smmuv3(), 6),
        (smmuv3(), 7),
        (smmuv3(), 20),
        (smmuv3_endpoint(8, linear, 10), 20),
        (smmuv3_endpoint(8, only_64k, 20), 12),
        (smmuv3_endpoint(8, only_16k, 16), 16),
        (smmuv3_endpoint(8, small, 8), 8),
        (smmuv3_pages(), 20),
        (smmuv3_pages(), 0),
        (vtd(), 20),
        (vtd(), 0),
        (vtd_endpoint(8, &[0x81]), 14),
        (vtd_endpoint(8, &[2]), 20),
    ]
}

/// The requests that arrived, decoded as a device does.
pub(super) fn requests(device: &FakeTransport) -> Vec<Request> {
    device.take_requests().iter().map(|bytes| Request::decode(bytes).unwrap()).collect()
}

/// Lets the device answer everything with `status`.
pub(super) fn answer(device: &FakeTransport, status: Status) {
    device.set_script(move |_, writable| {
        writable.copy_from_slice(&viommu_wire::Tail { status }.encode());
        4
    });
}

/// The table that a request binds, checked as a device does, and the PASID that it is for.
pub(super) fn canonical(endpoint: &Endpoint, table: TableDescriptor) -> (Canonical, Option<Pasid>) {
    match (endpoint.properties().hardware.unwrap(), table) {
        (crate::Hardware::Smmuv3(caps), TableDescriptor::Smmuv3 { ste0, ste1 }) => {
            (Canonical::Smmuv3(smmuv3::CdTable::from_ste(ste0, ste1, &caps).unwrap()), None)
        }
        (crate::Hardware::Vtd(caps), TableDescriptor::VtdPasidTable(table)) => {
            let table =
                vtd::PasidTable::new(table.directory, table.directory_lg2, table.untagged, &caps).unwrap();
            (Canonical::VtdPasidTable(table), None)
        }
        (crate::Hardware::Vtd(caps), TableDescriptor::VtdPageTable(table)) => {
            let flags = vtd::FirstStageFlags::from_bits(table.flags).unwrap();
            let first_stage = vtd::FirstStage::new(table.pgd, flags, table.addr_width, &caps).unwrap();
            (Canonical::VtdFirstStage(first_stage), Some(table.pasid))
        }
        (crate::Hardware::Smmuv3(caps), TableDescriptor::ArmPageTable(table)) => {
            let registers = smmuv3::PageTableRegisters {
                asid: table.asid,
                tcr: table.tcr.into(),
                ttbr0: table.ttbr0,
                ttbr1: table.ttbr1,
                mair: table.mair,
            };
            let page_table = smmuv3::PageTable::new(&registers, &caps).unwrap();
            (Canonical::Smmuv3PageTable(page_table), Some(table.pasid))
        }
        (_, table) => panic!("{table:?}"),
    }
}

/// What hardware with the bound tables answers.
pub(super) fn dma(
    driver: &TestDriver,
    table: &Canonical,
    pasid: Option<Pasid>,
    iova: u64,
    access: Access,
) -> Result<Gpa, Fault> {
    let memory = &driver.platform().memory;
    match table.lookup(memory, pasid)? {
        Context::Stage1(stage1) => {
            stage1.walk(memory, Iova(iova), access).map(|translation| translation.apply(Iova(iova)))
        }
        Context::Bypass => panic!("no entry bypasses"),
    }
}

/// One way for all: the same code binds the tables of every vendor, and hardware finds what the caller mapped.
#[test]
fn the_same_code_serves_every_vendor() {
    for (endpoint, pasid_bits) in all() {
        let (mut driver, device) = driver();
        let before = driver.platform().alloc.live.clone();
        let options = TableOptions { pasid_bits, ..TableOptions::default() };
        let mut table = PasidTable::new(&mut driver, &endpoint, DOMAIN, options).unwrap();
        table.attach(&mut driver).unwrap();

        let mut spaces = vec![];
        let wanted = if pasid_bits == 0 { 0 } else { 5 };
        for number in 0..=wanted {
            let mut space = AddressSpace::new(&mut driver, &endpoint, SpaceOptions::default()).unwrap();
            let page = 1 << space.page_lg2();
            let target = Gpa(0x1000_0000 * (number + 1));
            space.map(&mut driver, range(16 * page, 18 * page - 1), target, Attrs::READ_WRITE).unwrap();
            space
                .map(&mut driver, range(0x7f00_0000_0000, 0x7f00_0020_0000 - 1), target, Attrs::READ)
                .unwrap();
            let bound = match number {
                0 => table.bind_at(&mut driver, None, &mut space).map(|()| None).unwrap(),
                _ => Some(table.bind(&mut driver, &mut space).unwrap()),
            };
            assert_eq!(bound.map_or(0, Pasid::value), number as u32);
            spaces.push((space, bound, target));
        }

        let bound: Vec<_> = requests(&device)
            .into_iter()
            .filter_map(|request| match request {
                Request::AttachTable(AttachTable { domain: DOMAIN, endpoint: EndpointId(8), table }) => {
                    Some(canonical(&endpoint, table))
                }
                _ => None,
            })
            .collect();
        for (space, user, target) in &spaces {
            let page = 1 << space.page_lg2();
            let single = Some(user.unwrap_or(Pasid::ZERO));
            let (table, _) = bound.iter().find(|(table, of)| table.has_pasids() || *of == single).unwrap();
            for offset in [0, 8, page, 2 * page - 1] {
                let found = dma(&driver, table, *user, 16 * page + offset, Access::WRITE);
                assert_eq!(found, Ok(Gpa(target.0 + offset)));
                assert_eq!(
                    space
                        .translate(&driver, Iova(16 * page + offset), Access::READ)
                        .unwrap()
                        .apply(Iova(16 * page + offset)),
                    Gpa(target.0 + offset)
                );
            }
            assert_eq!(
                dma(&driver, table, *user, 0x7f00_001f_ffff, Access::READ),
                Ok(Gpa(target.0 + 0x1f_ffff))
            );
            assert!(dma(&driver, table, *user, 0x7f00_001f_ffff, Access::WRITE).is_err());
            for outside in [16 * page - 1, 18 * page, 0x7eff_ffff_ffff, 0x7f00_0020_0000, 0] {
                assert!(dma(&driver, table, *user, outside, Access::READ).is_err());
            }
        }
        let (first, _) = &bound[0];
        if first.has_pasids() {
            assert!(dma(&driver, first, pasid(wanted as u32 + 1), 0x10_0000, Access::READ).is_err());
        }

        for (mut space, user, _) in spaces {
            table.unbind(&mut driver, user, &mut space).unwrap();
            if first.has_pasids() {
                assert!(dma(&driver, first, user, 16 << space.page_lg2(), Access::READ).is_err());
            }
            space.release(&mut driver).map_err(|(_, error)| error).unwrap();
        }
        table.release(&mut driver).map_err(|(_, error)| error).unwrap();
        assert!(matches!(requests(&device).last(), Some(Request::Detach(_))));
        assert_eq!(driver.platform().alloc.live, before, "no memory is lost");
    }
}

#[test]
fn layouts_follow_the_number_of_pasids() {
    use smmuv3::TableFormat::{Linear, TwoLevel4K, TwoLevel64K};
    let (mut driver, _) = driver();
    for (endpoint, bits, format) in [
        (smmuv3(), 0, Linear),
        (smmuv3(), 6, Linear),
        (smmuv3(), 7, TwoLevel4K),
        (smmuv3(), 15, TwoLevel4K),
        (smmuv3(), 16, TwoLevel64K),
    ] {
        let options = TableOptions { pasid_bits: bits, ..TableOptions::default() };
        let table = PasidTable::new(&mut driver, &endpoint, DOMAIN, options).unwrap();
        let Canonical::Smmuv3(table) = canonical(&endpoint, table.descriptor().unwrap()).0 else { panic!() };
        assert_eq!((table.format(), table.pasid_bits()), (format, bits));
        assert_eq!(table.untagged(), smmuv3::Untagged::Pasid0);
    }
    let options = TableOptions { smmuv3_format: Some(TwoLevel64K), ..TableOptions::default() };
    let table =
        PasidTable::new(&mut driver, &smmuv3_endpoint(8, smmuv3::IdRegisters::SOFTWARE, 5), DOMAIN, options);
    let Canonical::Smmuv3(table) = canonical(&smmuv3(), table.unwrap().descriptor().unwrap()).0 else {
        panic!()
    };
    assert_eq!((table.format(), table.pasid_bits()), (TwoLevel64K, 5));
}

fn bound(endpoint: &Endpoint) -> (TestDriver, FakeTransport, PasidTable, AddressSpace, Pasid) {
    bound_with(endpoint, EmptyTables::Free)
}

fn bound_with(
    endpoint: &Endpoint,
    empty_tables: EmptyTables,
) -> (TestDriver, FakeTransport, PasidTable, AddressSpace, Pasid) {
    let (mut driver, device) = driver();
    let mut table = PasidTable::new(&mut driver, endpoint, DOMAIN, TableOptions::default()).unwrap();
    table.attach(&mut driver).unwrap();
    let options = SpaceOptions { empty_tables, ..SpaceOptions::default() };
    let mut space = AddressSpace::new(&mut driver, endpoint, options).unwrap();
    let pasid = table.bind(&mut driver, &mut space).unwrap();
    (driver, device, table, space, pasid)
}

/// The table in the page of `crate::tables`, request by request.
#[test]
fn each_change_sends_the_invalidation_it_needs() {
    for endpoint in [smmuv3(), vtd()] {
        let (mut driver, device, mut table, mut space, pasid) = bound(&endpoint);
        let tag = space.tag().map(u64::from);
        assert_eq!(tag.is_some(), matches!(endpoint.properties().hardware, Some(crate::Hardware::Smmuv3(_))));
        let expect = |scope, caches, leaf, tag| {
            Request::Invalidate(Invalidate { domain: DOMAIN, scope, caches, leaf, tag, global: false })
        };
        let sent = requests(&device);
        assert!(matches!(sent[0], Request::AttachTable(_)));
        assert_eq!(sent[1..], [expect(InvalidateScope::Pasid(Some(pasid)), Caches::PASID, false, None)]);

        let mapped = range(0x1_0000, 0x1_ffff);
        space.map(&mut driver, mapped, Gpa(0x10_0000), Attrs::READ).unwrap();
        assert_eq!(requests(&device), [], "absence is not cached");

        let address = |range| InvalidateScope::Address { pasid: Some(pasid), range, page_lg2: 12 };
        space.unmap(&mut driver, range(0x1_0000, 0x1_0fff)).unwrap();
        let first = address(range(0x1_0000, 0x1_0fff));
        assert_eq!(requests(&device), [expect(first, Caches::TLB, true, tag)], "only a leaf");
        space.unmap(&mut driver, mapped).unwrap();
        assert_eq!(requests(&device), [expect(address(mapped), Caches::TLB, false, tag)], "tables went, too");

        table.unbind(&mut driver, Some(pasid), &mut space).unwrap();
        let scope = InvalidateScope::Pasid(Some(pasid));
        assert_eq!(requests(&device), [expect(scope, Caches::PASID | Caches::TLB, false, tag)]);

        space.map(&mut driver, mapped, Gpa(0x10_0000), Attrs::READ).unwrap();
        space.unmap(&mut driver, mapped).unwrap();
        assert_eq!(requests(&device), [], "nobody uses the space");
        table.bind_at(&mut driver, None, &mut space).unwrap();
        let untagged = InvalidateScope::Pasid(None);
        assert_eq!(requests(&device), [expect(untagged, Caches::PASID, false, None)]);
    }
}

/// The number of bytes and notifications of one unmap for many users.
#[test]
fn one_unmap_reaches_every_user_with_one_notification() {
    let (mut driver, device, mut table, mut space, _) = bound(&smmuv3());
    table.bind(&mut driver, &mut space).unwrap();
    table.bind_at(&mut driver, None, &mut space).unwrap();
    // A second endpoint in the same domain, with a table of its own and the same PASIDs.
    let other = smmuv3_endpoint(9, smmuv3::IdRegisters::SOFTWARE, 20);
    let mut second = PasidTable::new(&mut driver, &other, DOMAIN, TableOptions::default()).unwrap();
    second.attach(&mut driver).unwrap();
    second.bind(&mut driver, &mut space).unwrap();
    space.map(&mut driver, range(0x1000, 0x1fff), Gpa(0), Attrs::READ).unwrap();
    device.take_requests();
    let before = driver.counters().notifications;
    space.unmap(&mut driver, range(0x1000, 0x1fff)).unwrap();
    assert_eq!(driver.counters().notifications, before + 1);
    let scopes: Vec<_> = requests(&device)
        .into_iter()
        .map(|request| match request {
            Request::Invalidate(Invalidate { scope: InvalidateScope::Address { pasid, .. }, .. }) => pasid,
            request => panic!("{request:?}"),
        })
        .collect();
    assert_eq!(scopes, [pasid(1), pasid(2), None]);
    assert_eq!(space.release(&mut driver).map_err(|(_, error)| error), Err(TableError::InUse));
}

#[test]
fn a_stale_translation_can_be_had_on_purpose() {
    let (mut driver, device, _table, mut space, _) = bound(&vtd());
    let page = range(0x20_0000, 0x20_0fff);
    space.map(&mut driver, page, Gpa(0x1000), Attrs::READ).unwrap();
    device.take_requests();
    let live = driver.platform().alloc.live.len();
    space.unmap_unsynchronized(&mut driver, page).unwrap();
    space.map(&mut driver, page, Gpa(0x2000), Attrs::READ).unwrap();
    assert_eq!(requests(&device), []);
    assert_eq!(space.stale(), Some(Stale { range: page, leaf: false }));
    assert!(driver.platform().alloc.live.len() > live, "the tables that went are kept aside");
    space.synchronize(&mut driver).unwrap();
    assert_eq!((requests(&device).len(), space.stale()), (1, None));
    assert_eq!(driver.platform().alloc.live.len(), live);
    assert_eq!(space.translate(&driver, page.start(), Access::READ).unwrap().output, Gpa(0x2000));
}

/// Memory that hardware may still read is given back only when an invalidation has succeeded that covers it.
#[test]
fn a_failed_invalidation_is_made_up_for() {
    for endpoint in [smmuv3(), vtd()] {
        let (mut driver, device, _table, mut space, _) = bound(&endpoint);
        for page in [0x20_0000, 0x4000_0000, 0x8000_0000] {
            space.map(&mut driver, range(page, page + 0xfff), Gpa(0x1000), Attrs::READ).unwrap();
        }
        let live = driver.platform().alloc.live.clone();
        answer(&device, Status::DevErr);
        let failed = space.unmap(&mut driver, range(0x4000_0000, 0x4000_0fff));
        assert_eq!(failed, Err(TableError::Request(RequestError::Status(Status::DevErr))));
        // Neither an unmap that is not synchronized nor a map that fails at once gives anything back.
        space.unmap_unsynchronized(&mut driver, range(0x20_0000, 0x20_0fff)).unwrap();
        let exists = space.map(&mut driver, range(0x8000_0000, 0x8000_0fff), Gpa(0), Attrs::READ);
        assert_eq!(exists, Err(TableError::Edit(EditError::Exists)));
        assert_eq!(driver.platform().alloc.live, live);
        device.take_requests();
        answer(&device, Status::Ok);
        space.unmap(&mut driver, range(0x8000_0000, 0x8000_0fff)).unwrap();
        let hull = range(0x20_0000, 0x8000_0fff);
        let sent = requests(&device);
        let [Request::Invalidate(Invalidate { scope, leaf: false, caches: Caches::TLB, .. })] = sent[..]
        else {
            panic!("{sent:?}")
        };
        assert!(matches!(scope, InvalidateScope::Address { range, .. } if range == hull));
        assert!(driver.platform().alloc.live.len() < live.len());
    }
}

#[test]
fn a_failed_map_in_between_gives_back_only_what_nobody_saw() {
    let (mut driver, device, _table, mut space, _) = bound(&vtd());
    space.map(&mut driver, range(0x4000_0000, 0x4000_0fff), Gpa(0x1000), Attrs::READ).unwrap();
    let live = driver.platform().alloc.live.clone();
    space.unmap_unsynchronized(&mut driver, range(0x4000_0000, 0x4000_0fff)).unwrap();
    device.take_requests();
    driver.platform_mut().alloc.budget = 2;
    let failed = space.map(&mut driver, range(0x80_0000_0000, 0x80_0000_0fff), Gpa(0), Attrs::READ);
    assert_eq!(failed, Err(TableError::Edit(EditError::NoTable)));
    assert_eq!(driver.platform().alloc.live, live, "the tables of the unmap are still kept");
    assert_eq!(requests(&device), []);
}

/// A domain that the device does not know holds nothing that could be stale.
#[test]
fn an_unknown_domain_has_nothing_stale() {
    let (mut driver, device, mut table, mut space, pasid) = bound(&smmuv3());
    space.map(&mut driver, range(0x1000, 0x1fff), Gpa(0x1000), Attrs::READ).unwrap();
    table.detach(&mut driver).unwrap();
    device.set_script(|_, writable| {
        writable.copy_from_slice(&[6, 0, 0, 0]);
        4
    });
    space.unmap(&mut driver, range(0x1000, 0x1fff)).unwrap();
    table.unbind(&mut driver, Some(pasid), &mut space).unwrap();
    space.release(&mut driver).map_err(|(_, error)| error).unwrap();
}

#[test]
fn a_binding_that_fails_is_undone() {
    for endpoint in [smmuv3(), vtd()] {
        let (mut driver, device, mut table, mut space, first) = bound(&endpoint);
        let mut other = AddressSpace::new(&mut driver, &endpoint, SpaceOptions::default()).unwrap();
        // The first INVALIDATE fails, the one that undoes it succeeds.
        let mut statuses = vec![0, 3];
        device.set_script(move |_, writable| {
            writable.copy_from_slice(&[statuses.pop().unwrap_or(0), 0, 0, 0]);
            4
        });
        let failed = table.bind(&mut driver, &mut other);
        assert_eq!(failed, Err(TableError::Request(RequestError::Status(Status::DevErr))));
        assert_eq!(table.in_use(), 1);
        let (bound_table, _) = canonical(&endpoint, table.descriptor().unwrap());
        assert!(bound_table.lookup(&driver.platform().memory, pasid(2)).is_err());
        assert!(bound_table.lookup(&driver.platform().memory, Some(first)).is_ok());
        assert_eq!(table.bind(&mut driver, &mut other), Ok(Pasid::new(2).unwrap()));

        // A device that is gone may hold on to the space.
        let mut lost = AddressSpace::new(&mut driver, &endpoint, SpaceOptions::default()).unwrap();
        device.0.borrow_mut().mood = Mood::Silent;
        assert!(table.bind(&mut driver, &mut lost).is_err());
        assert_eq!(table.in_use(), 3);
        assert!(lost.release(&mut driver).is_err());
        device.0.borrow_mut().mood = Mood::Obedient;
        table.unbind(&mut driver, Some(first), &mut space).unwrap();
    }
}

/// The place of untagged DMA is not given to another space while the hardware may still hold on to the last one.
#[test]
fn untagged_dma_stays_taken_until_it_is_invalidated() {
    for endpoint in [smmuv3(), vtd()] {
        let (mut driver, device, mut table, mut first, _) = bound(&endpoint);
        table.bind_at(&mut driver, None, &mut first).unwrap();
        let mut second = AddressSpace::new(&mut driver, &endpoint, SpaceOptions::default()).unwrap();
        assert_eq!(table.bind_at(&mut driver, None, &mut second), Err(TableError::InUse));
        answer(&device, Status::DevErr);
        let failed = table.unbind(&mut driver, None, &mut first);
        assert_eq!(failed, Err(TableError::Request(RequestError::Status(Status::DevErr))));
        answer(&device, Status::Ok);
        assert_eq!(table.bind_at(&mut driver, None, &mut second), Err(TableError::InUse));
        table.unbind(&mut driver, None, &mut first).unwrap();
        table.bind_at(&mut driver, None, &mut second).unwrap();
        let (bound_table, _) = canonical(&endpoint, table.descriptor().unwrap());
        let Context::Stage1(found) = bound_table.lookup(&driver.platform().memory, None).unwrap() else {
            panic!()
        };
        assert_eq!(found.tag(), second.tag());
    }
}

#[test]
fn pasids_are_bounded_claimed_and_reused() {
    let endpoint = smmuv3_endpoint(8, smmuv3::IdRegisters::SOFTWARE, 2);
    let (mut driver, _, mut table, mut space, first) = bound(&endpoint);
    assert_eq!(first.value(), 1);
    assert_eq!(table.bind_at(&mut driver, pasid(3), &mut space), Ok(()));
    assert_eq!(table.bind_at(&mut driver, pasid(3), &mut space), Err(TableError::InUse));
    for outside in [0, 4, 0xf_ffff] {
        assert_eq!(table.bind_at(&mut driver, pasid(outside), &mut space), Err(TableError::NoPasid));
    }
    assert_eq!(table.bind(&mut driver, &mut space).map(Pasid::value), Ok(2));
    assert_eq!(table.bind(&mut driver, &mut space), Err(TableError::NoPasid));
    table.unbind(&mut driver, pasid(3), &mut space).unwrap();
    assert_eq!(table.unbind(&mut driver, pasid(3), &mut space), Err(TableError::NotBound(pasid(3))));
    assert_eq!(table.bind(&mut driver, &mut space).map(Pasid::value), Ok(3));
    assert_eq!(table.bind_at(&mut driver, None, &mut space), Ok(()));
    assert!(table.bind_at(&mut driver, None, &mut space).is_err());
}

/// Format 2: one ATTACH_TABLE for each PASID, and format 0 to take it back.
#[test]
fn vtd_page_tables_can_be_bound_one_by_one() {
    let (mut driver, device) = driver();
    let endpoint = vtd();
    let options = TableOptions { style: Style::Single, ..TableOptions::default() };
    let mut table = PasidTable::new(&mut driver, &endpoint, DOMAIN, options).unwrap();
    assert_eq!((table.format(), table.descriptor()), (2, None));
    table.attach(&mut driver).unwrap();
    assert_eq!(requests(&device), []);
    let mut space = AddressSpace::new(&mut driver, &endpoint, SpaceOptions::default()).unwrap();
    let first = table.bind(&mut driver, &mut space).unwrap();
    table.bind_at(&mut driver, None, &mut space).unwrap();
    let pasids: Vec<_> = requests(&device)
        .into_iter()
        .map(|request| match request {
            Request::AttachTable(AttachTable { table: TableDescriptor::VtdPageTable(table), .. }) => {
                assert_eq!((table.pgd, table.flags, table.addr_width), (space.root(), 0, 48));
                table.pasid
            }
            request => panic!("{request:?}"),
        })
        .collect();
    assert_eq!(pasids, [first, Pasid::ZERO]);
    table.unbind(&mut driver, Some(first), &mut space).unwrap();
    let table_descriptor = TableDescriptor::Unbind { pasid: first };
    let unbind = AttachTable { domain: DOMAIN, endpoint: EndpointId(8), table: table_descriptor };
    assert_eq!(requests(&device), [Request::AttachTable(unbind)]);
    // The other one is with the device still.
    let (mut table, error) = table.release(&mut driver).unwrap_err();
    assert_eq!((error, requests(&device)), (TableError::InUse, vec![]));
    // A device that knows nothing of it has nothing to take back.
    answer(&device, Status::NoEnt);
    table.unbind(&mut driver, None, &mut space).unwrap();
    assert_eq!(requests(&device).len(), 1);
    answer(&device, Status::Ok);
    space.release(&mut driver).map_err(|(_, error)| error).unwrap();
    table.release(&mut driver).map_err(|(_, error)| error).unwrap();
    assert_eq!(requests(&device).len(), 1);
}

/// Only the table can set a space free that is bound, so it does not go before.
#[test]
fn a_table_that_cannot_go_comes_back() {
    for endpoint in [smmuv3(), vtd(), vtd_endpoint(8, &[2])] {
        let before = driver().0.platform().alloc.live.len();
        let (mut driver, device, table, mut space, pasid) = bound(&endpoint);
        device.take_requests();
        let (mut table, error) = table.release(&mut driver).unwrap_err();
        assert_eq!((error, requests(&device)), (TableError::InUse, vec![]));
        assert!(table.is_attached());
        table.unbind(&mut driver, Some(pasid), &mut space).unwrap();
        // Untagged DMA counts, too.
        table.bind_at(&mut driver, None, &mut space).unwrap();
        let (mut table, error) = table.release(&mut driver).unwrap_err();
        assert_eq!(error, TableError::InUse);
        table.unbind(&mut driver, None, &mut space).unwrap();

        // The hardware may read the table until it is detached.
        answer(&device, Status::DevErr);
        let (table, error) = table.release(&mut driver).unwrap_err();
        assert_eq!(error, TableError::Request(RequestError::Status(Status::DevErr)));
        assert!(table.is_attached());
        answer(&device, Status::Ok);
        table.release(&mut driver).map_err(|(_, error)| error).unwrap();
        space.release(&mut driver).map_err(|(_, error)| error).unwrap();
        assert_eq!(driver.platform().alloc.live.len(), before);
    }
}

/// An unbind that fails leaves the space bound, and can be tried again.
#[test]
fn a_page_table_stays_bound_where_the_device_does_not_take_it_back() {
    let (mut driver, device, mut table, mut space, pasid) = bound(&vtd_endpoint(8, &[2]));
    answer(&device, Status::DevErr);
    let failed = table.unbind(&mut driver, Some(pasid), &mut space);
    assert_eq!(failed, Err(TableError::Request(RequestError::Status(Status::DevErr))));
    assert_eq!(table.in_use(), 1);
    let (space, error) = space.release(&mut driver).unwrap_err();
    assert_eq!(error, TableError::InUse);
    answer(&device, Status::Ok);
    let mut space = space;
    table.unbind(&mut driver, Some(pasid), &mut space).unwrap();
    assert_eq!(table.in_use(), 0);
}

#[test]
fn formats_are_taken_from_the_list_of_the_device() {
    let (mut driver, _) = driver();
    let format = |driver: &mut TestDriver, endpoint: &Endpoint, style| {
        let options = TableOptions { style, ..TableOptions::default() };
        PasidTable::new(driver, endpoint, DOMAIN, options).map(|table| table.format())
    };
    let no_format = Err(TableError::Format(EndpointId(8)));
    assert_eq!(format(&mut driver, &vtd_endpoint(8, &[0x81, 2]), Style::Preferred), Ok(0x81));
    assert_eq!(format(&mut driver, &vtd_endpoint(8, &[2, 0x81]), Style::Preferred), Ok(2));
    assert_eq!(format(&mut driver, &vtd_endpoint(8, &[2, 0x81]), Style::Table), Ok(0x81));
    assert_eq!(format(&mut driver, &vtd_endpoint(8, &[2]), Style::Table), no_format);
    assert_eq!(format(&mut driver, &vtd_endpoint(8, &[1, 0x80, 0xff]), Style::Preferred), no_format);
    assert_eq!(format(&mut driver, &smmuv3(), Style::Single), no_format);
    assert_eq!(format(&mut driver, &smmuv3_pages(), Style::Preferred), Ok(0x80));
    assert_eq!(format(&mut driver, &smmuv3_pages(), Style::Table), no_format);
    assert_eq!(format(&mut driver, &arm_with(&[0x80, 1]), Style::Preferred), Ok(0x80));
    assert_eq!(format(&mut driver, &arm_with(&[1, 0x80]), Style::Preferred), Ok(1));
    assert_eq!(format(&mut driver, &arm_with(&[1, 0x80]), Style::Single), Ok(0x80));
    let plain = Endpoint::new(EndpointId(8), EndpointProperties::default());
    assert_eq!(format(&mut driver, &plain, Style::Preferred), Err(TableError::NoHardware(EndpointId(8))));
    assert_eq!(
        AddressSpace::new(&mut driver, &plain, SpaceOptions::default()).err(),
        Some(TableError::NoHardware(EndpointId(8)))
    );
}

#[test]
fn spaces_of_other_hardware_do_not_fit() {
    let (mut driver, _, mut table, _, _) = bound(&smmuv3());
    let mut space = AddressSpace::new(&mut driver, &vtd(), SpaceOptions::default()).unwrap();
    let mismatch = TableError::Mismatch(EndpointId(8));
    assert_eq!(table.bind(&mut driver, &mut space), Err(mismatch));
    assert_eq!(table.in_use(), 1);
    // An SMMU with another granule only.
    let software = smmuv3::IdRegisters::SOFTWARE;
    let other = smmuv3_endpoint(9, smmuv3::IdRegisters { idr5: software.idr5 & !0x30, ..software }, 20);
    let mut space = AddressSpace::new(&mut driver, &other, SpaceOptions::default()).unwrap();
    assert_eq!(space.page_lg2(), 16);
    assert!(table.bind(&mut driver, &mut space).is_ok(), "this one has every granule");
    let mut second = PasidTable::new(&mut driver, &other, DOMAIN, TableOptions::default()).unwrap();
    let mut small = AddressSpace::new(&mut driver, &smmuv3(), SpaceOptions::default()).unwrap();
    assert_eq!(second.bind(&mut driver, &mut small), Err(TableError::Mismatch(EndpointId(9))));
}

#[test]
fn tags_are_unique_and_bounded() {
    let (mut driver, _) = driver();
    let software = smmuv3::IdRegisters::SOFTWARE;
    let eight_bits =
        smmuv3_endpoint(8, smmuv3::IdRegisters { idr0: software.idr0 & !(1 << 12), ..software }, 20);
    let mut spaces: Vec<_> = (1..=255)
        .map(|_| AddressSpace::new(&mut driver, &eight_bits, SpaceOptions::default()).unwrap())
        .collect();
    let mut tags: Vec<_> = spaces.iter().filter_map(AddressSpace::tag).collect();
    tags.dedup();
    assert_eq!((tags.len(), tags[0]), (255, 1));
    let none = AddressSpace::new(&mut driver, &eight_bits, SpaceOptions::default());
    assert_eq!(none.err(), Some(TableError::NoTag));
    let wide = AddressSpace::new(&mut driver, &smmuv3(), SpaceOptions::default()).unwrap();
    assert_eq!(wide.tag(), Some(256));
    spaces.remove(9).release(&mut driver).map_err(|(_, error)| error).unwrap();
    let again = AddressSpace::new(&mut driver, &eight_bits, SpaceOptions::default()).unwrap();
    assert_eq!(again.tag(), Some(10));
}

/// What is mapped is as before when a map fails, whatever the reason.
#[test]
fn a_map_that_fails_maps_nothing() {
    for endpoint in [smmuv3(), vtd()] {
        let (mut driver, device, _table, mut space, _) = bound(&endpoint);
        space.map(&mut driver, range(0x2000_0000, 0x2000_0fff), Gpa(0x7000), Attrs::READ).unwrap();
        device.take_requests();
        let overlapping = range(0x1fff_f000, 0x2000_0fff);
        let exists = Err(TableError::Edit(EditError::Exists));
        assert_eq!(space.map(&mut driver, overlapping, Gpa(0x10_0000), Attrs::READ), exists);
        assert!(space.translate(&driver, Iova(0x1fff_f000), Access::READ).is_err());
        assert_eq!(requests(&device).len(), 1, "a device may have seen the first page");
        assert_eq!(space.translate(&driver, Iova(0x2000_0000), Access::READ).unwrap().output, Gpa(0x7000));

        let live = driver.platform().alloc.live.clone();
        driver.platform_mut().alloc.budget = 4;
        let many = range(0x10_0000_1000, 0x10_ffff_ffff);
        let no_table = Err(TableError::Edit(EditError::NoTable));
        assert_eq!(space.map(&mut driver, many, Gpa(0x40_0000_2000), Attrs::READ), no_table);
        assert!(space.translate(&driver, Iova(0x10_0000_1000), Access::READ).is_err());
        assert_eq!(driver.platform().alloc.live, live);

        for (bad, target) in [(range(0x800, 0xfff), 0), (range(0, 0x7ff), 0), (range(0x1000, 0x1fff), 0x800)]
        {
            let unaligned = Err(TableError::Edit(EditError::Unaligned));
            assert_eq!(space.map(&mut driver, bad, Gpa(target), Attrs::READ), unaligned);
            if target == 0 {
                assert_eq!(space.unmap(&mut driver, bad), unaligned);
            }
            assert_eq!(space.stale(), None);
        }
        let outside = Err(TableError::Edit(EditError::InputRange));
        assert_eq!(space.map(&mut driver, range(1 << 50, (1 << 50) + 0xfff), Gpa(0), Attrs::READ), outside);
    }
}

/// At every point where memory can run out, an error comes back, and nothing is lost.
#[test]
fn running_out_of_memory_loses_nothing() {
    for (endpoint, pasid_bits) in all() {
        let (mut driver, _) = driver();
        let before = driver.platform().alloc.live.clone();
        let mut succeeded = false;
        for budget in 0..40 {
            driver.platform_mut().alloc.budget = budget;
            succeeded = story(&mut driver, &endpoint, pasid_bits).is_ok();
            assert_eq!(driver.platform().alloc.live, before, "{budget} tables");
            assert_eq!(driver.asids.in_use(), 0);
            if succeeded {
                break;
            }
        }
        assert!(succeeded);
    }
}

fn story(driver: &mut TestDriver, endpoint: &Endpoint, pasid_bits: u8) -> Result<(), TableError> {
    let options = TableOptions { pasid_bits, ..TableOptions::default() };
    let mut table = PasidTable::new(driver, endpoint, DOMAIN, options)?;
    let result = table.attach(driver).and_then(|()| {
        let mut space = AddressSpace::new(driver, endpoint, SpaceOptions::default())?;
        let pasid = if pasid_bits == 0 { None } else { pasid(1) };
        let result = space
            .map(driver, range(0x10_0000, 0x11_ffff), Gpa(0x10_0000), Attrs::READ)
            .and_then(|()| table.bind_at(driver, pasid, &mut space))
            .and_then(|()| table.unbind(driver, pasid, &mut space));
        space.release(driver).map_err(|(_, error)| error).unwrap();
        result
    });
    table.release(driver).map_err(|(_, error)| error).unwrap();
    result
}

#[test]
fn parts_of_large_pages_can_be_unmapped_where_the_hardware_allows() {
    let software = smmuv3::IdRegisters::SOFTWARE;
    let no_bbml =
        smmuv3_endpoint(8, smmuv3::IdRegisters { idr3: software.idr3 & !(3 << 11), ..software }, 20);
    for (endpoint, splits) in [(smmuv3(), true), (vtd(), true), (no_bbml, false)] {
        let (mut driver, device, _table, mut space, _) = bound(&endpoint);
        space.map(&mut driver, range(0x20_0000, 0x5f_ffff), Gpa(0x20_0000), Attrs::READ).unwrap();
        assert_eq!(space.translate(&driver, Iova(0x20_0000), Access::READ).unwrap().size_lg2, 21);
        device.take_requests();
        let outcome = space.unmap(&mut driver, range(0x40_0000, 0x40_0fff));
        assert_eq!(outcome.is_ok(), splits);
        if !splits {
            assert_eq!(outcome, Err(TableError::Edit(EditError::WouldSplit)));
        }
        assert_eq!(requests(&device).len(), 1);
        assert_eq!(space.translate(&driver, Iova(0x40_0000), Access::READ).is_err(), splits);
        assert!(space.translate(&driver, Iova(0x40_1000), Access::READ).is_ok());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Maps and unmaps in any order, against a list of pages; each unmap is followed by an invalidation that covers it.
    #[test]
    fn random_changes_follow_a_model(
        arm in any::<bool>(),
        steps in prop::collection::vec((any::<bool>(), 0u64..2000, 1u64..700), 1..40),
    ) {
        let endpoint = if arm { smmuv3() } else { vtd() };
        let (mut driver, device, _table, mut space, _) = bound(&endpoint);
        let mut model = vec![None; 3000];
        for (step, (is_map, first, count)) in steps.into_iter().enumerate() {
            let pages = first as usize..(first + count) as usize;
            let wanted = range(first << 12, ((first + count) << 12) - 1);
            device.take_requests();
            if is_map {
                let target = ((step as u64 + 1) << 32) + (first << 12);
                let free = model[pages.clone()].iter().all(Option::is_none);
                let mapped = space.map(&mut driver, wanted, Gpa(target), Attrs::READ_WRITE);
                prop_assert_eq!(mapped.is_ok(), free);
                if free {
                    for page in pages {
                        model[page] = Some(target + ((page as u64 - first) << 12));
                    }
                }
            } else {
                space.unmap(&mut driver, wanted).unwrap();
                model[pages].fill(None);
                let sent = requests(&device);
                let [Request::Invalidate(Invalidate { scope: InvalidateScope::Address { range, .. }, .. })] = sent[..]
                else { panic!("{sent:?}") };
                prop_assert!(range.covers(wanted));
            }
            for (page, expected) in model.iter().enumerate() {
                let at = Iova((page as u64) << 12);
                let found = space.translate(&driver, at, Access::WRITE).map(|found| found.apply(at).0).ok();
                prop_assert_eq!(found, *expected);
            }
        }
    }
}

fn with_windows(id: u32, registers: smmuv3::IdRegisters, windows: &[IovaRange]) -> Endpoint {
    let smmuv3::IdRegisters { idr0, idr1, idr3, idr5 } = registers;
    let mut properties = vec![Property::HwArmSmmu3 { idr0, idr1, idr3, idr5 }];
    let region = |&range| Property::ReservedRegion(ReservedRegion { kind: ReservedKind::Msi, range });
    properties.extend(windows.iter().map(region));
    Endpoint::new(EndpointId(id), EndpointProperties::parse(&super::area(&properties)))
}

/// A window smaller than a page takes the whole page, and endpoints whose windows differ may share a space.
#[test]
fn msi_windows_are_mapped_in_whole_pages() {
    let only_64k = smmuv3::IdRegisters {
        idr5: smmuv3::IdRegisters::SOFTWARE.idr5 & !0x30,
        ..smmuv3::IdRegisters::SOFTWARE
    };
    let behind = |id, windows: &[IovaRange]| with_windows(id, only_64k, windows);
    let (mut driver, _) = driver();
    let before = driver.platform().alloc.live.clone();
    let first = behind(8, &[range(0x800_1000, 0x800_1fff)]);
    let second = behind(9, &[range(0x7ff_f000, 0x801_0fff), range(0x810_0000, 0x810_0fff)]);
    let mut space = AddressSpace::new(&mut driver, &first, SpaceOptions::default()).unwrap();
    let mut tables = vec![];
    for endpoint in [&first, &second] {
        let mut table = PasidTable::new(&mut driver, endpoint, DOMAIN, TableOptions::default()).unwrap();
        table.bind_at(&mut driver, None, &mut space).unwrap();
        tables.push(table);
    }
    let mapped = |driver: &TestDriver, space: &AddressSpace, iova| {
        space.translate(driver, Iova(iova), Access::WRITE).ok().map(|found| found.apply(Iova(iova)).0)
    };
    space.unmap(&mut driver, range(0, 0xffff_ffff_ffff)).unwrap();
    for inside in [0x7ff_0000, 0x7ff_ffff, 0x800_0000, 0x800_1040, 0x801_ffff, 0x810_0000, 0x810_ffff] {
        assert_eq!(mapped(&driver, &space, inside), Some(inside));
    }
    for outside in [0x7fe_ffff, 0x802_0000, 0x80f_ffff, 0x811_0000] {
        assert_eq!(mapped(&driver, &space, outside), None);
    }
    let page = range(0x800_0000, 0x800_ffff);
    let refused = space.map(&mut driver, page, Gpa(0x1000_0000), Attrs::READ);
    assert_eq!(refused, Err(TableError::MsiWindow(page)));
    for mut table in tables {
        table.unbind(&mut driver, None, &mut space).unwrap();
        table.release(&mut driver).map_err(|(_, error)| error).unwrap();
    }
    space.release(&mut driver).map_err(|(_, error)| error).unwrap();
    assert_eq!(driver.platform().alloc.live, before);
}
