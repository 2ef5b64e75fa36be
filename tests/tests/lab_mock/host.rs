//! [`IommufdHost`](viommu_host_iommufd::IommufdHost) through real ioctls.

use pgtable_formats::format::Attrs;
use pgtable_formats::{AccessKind, Gpa, Iova, IovaRange, Pasid};
use viommu_device::host::{Host, HostError, Invalidation, Scope, SpaceSpec, Stream};
use viommu_device::mapping::{MapFlags, Mapping};
use viommu_host_iommufd::EVENT_QUEUE_DEPTH;
use viommu_host_iommufd::kernel::{HwptData, ObjectId};
use viommu_tests::host_suite::HostUnderTest;
use viommu_tests::host_suite::cells::{self, Hardware, Machine};
use viommu_tests::rig::Memory;
use viommu_tests::tables::{PageTable, PasidTable};
use viommu_wire::{Caches, EndpointId};

use super::ioctl::{TestOp, UNRULY_PASID};
use super::kernel::{EVENT_ADDRESS, Flavour, INVALIDATED, cached_by, slot};
use super::mocks::{ENDPOINTS, MEMORY, Mocks, plain};

pub(crate) type Space = viommu_host_iommufd::Space<super::kernel::MockKernel>;

pub(crate) fn stream(endpoint: EndpointId, pasid: Option<u32>) -> Stream {
    Stream { endpoint, pasid: pasid.map(|pasid| Pasid::new(pasid).unwrap()) }
}

/// Page 1 of the addresses leads to `page` of memory.
fn page_table(mocks: &mut Mocks, page: u64) -> PageTable {
    let table = PageTable::new(&mocks.caps, page as u16, &mut mocks.memory);
    table.map(&mut mocks.memory, 0x1000, Memory::page(page).0, 0x1000, Attrs::READ_WRITE);
    table
}

/// A VT-d table of one PASID.
pub(crate) fn vtd_space(mocks: &mut Mocks, page: u64) -> Space {
    let table = page_table(mocks, page).canonical().unwrap();
    mocks.host().create(SpaceSpec::GuestTable { endpoint: ENDPOINTS[0], table: &table }).unwrap()
}

/// An SMMUv3 table whose untagged accesses have a context.
fn smmuv3_space(mocks: &mut Mocks, endpoint: EndpointId, page: u64) -> Space {
    let table = page_table(mocks, page);
    let contexts = PasidTable::new(&mocks.caps, 4, &mut mocks.memory);
    contexts.set(&mut mocks.memory, 0, &table);
    mocks.host().create(SpaceSpec::GuestTable { endpoint, table: &contexts.canonical() }).unwrap()
}

pub(crate) fn invalidation(endpoint: EndpointId, scope: Scope, caches: Caches) -> Invalidation {
    Invalidation { endpoint, scope, caches, leaf: false, tag: None, global: false }
}

/// The nested table that a stream is attached to, with what it was made of.
fn nested(mocks: &Mocks, pasid: Option<u32>) -> (ObjectId, HwptData) {
    let pasid = pasid.map(|pasid| Pasid::new(pasid).unwrap());
    let table = mocks.kernel.attached(mocks.devices[0], pasid).expect("attached");
    (table, mocks.kernel.route(mocks.devices[0], pasid).unwrap().stage1)
}

/// Drops host and devices, and checks that kernel and memory are as they were before there was a host.
pub(crate) fn nothing_is_left(mut mocks: Mocks) {
    let pins = TestOp::CheckPins { user: mocks.user(Memory::BASE), length: MEMORY as u64, pins: 0 };
    drop(mocks.host.take());
    assert_eq!(mocks.kernel.free_numbers(), mocks.free);
    mocks.kernel.test(pins).expect("no page is pinned");
    for device in mocks.devices {
        mocks.kernel.remove_device(device);
    }
}

/// What VT-d and the mock cannot is left out by name; the rest of the suite runs.
#[test]
#[ignore = "needs the lab: tests/lab/run"]
fn suite_of_hosts_as_vtd() {
    cells::entry(Machine::Iommufd(cells::Kernel::Mock), Hardware::Vtd, false)
        .prove(|| Mocks::impatient(Flavour::Vtd));
}

/// The same as an SMMUv3.
#[test]
#[ignore = "needs the lab: tests/lab/run"]
fn suite_of_hosts_as_smmuv3() {
    cells::entry(Machine::Iommufd(cells::Kernel::Mock), Hardware::Smmuv3, false)
        .prove(|| Mocks::impatient(Flavour::Smmuv3));
}

/// VT-d: one nested table for each PASID, attached, replaced and detached beside the others.
#[test]
#[ignore = "needs the lab: tests/lab/run"]
fn each_pasid_has_a_nested_table() {
    let mut mocks = Mocks::new(Flavour::Vtd);
    let mut spaces: Vec<Space> = (2..6).map(|page| vtd_space(&mut mocks, page)).collect();
    let leads = |mocks: &mut Mocks, pasid| {
        mocks
            .access(stream(ENDPOINTS[0], pasid), 0x1008, AccessKind::Write)
            .map(|at| (at - Memory::BASE) >> 12)
    };
    for (space, pasid) in spaces.iter_mut().zip([None, Some(1), Some(2), Some(0xf_ffff)]) {
        mocks.host().bind(stream(ENDPOINTS[0], pasid), Some(space)).unwrap();
    }
    let all = |mocks: &mut Mocks| [None, Some(1), Some(2), Some(0xf_ffff)].map(|pasid| leads(mocks, pasid));
    assert_eq!(all(&mut mocks), [Some(2), Some(3), Some(4), Some(5)]);
    // One space for two PASIDs, which is a replacement.
    mocks.host().bind(stream(ENDPOINTS[0], Some(1)), Some(&mut spaces[2])).unwrap();
    assert_eq!(all(&mut mocks), [Some(2), Some(4), Some(4), Some(5)]);
    mocks.host().bind(stream(ENDPOINTS[0], Some(2)), None).unwrap();
    assert_eq!(all(&mut mocks), [Some(2), Some(4), None, Some(5)]);
    mocks.host().bind(stream(ENDPOINTS[0], None), None).unwrap();
    assert_eq!(all(&mut mocks), [None, Some(4), None, Some(5)]);
    // Two are still bound when all goes.
    drop(spaces);
    assert_eq!(all(&mut mocks), [None, Some(4), None, Some(5)]);
    nothing_is_left(mocks);
}

/// The driver fails to replace the table of a PASID: the kernel goes back to the old one, and so does the host.
#[test]
#[ignore = "needs the lab: tests/lab/run"]
fn a_replacement_that_fails_leaves_what_was() {
    let mut mocks = Mocks::new(Flavour::Vtd);
    let (mut one, mut two) = (vtd_space(&mut mocks, 2), vtd_space(&mut mocks, 3));
    let unruly = stream(ENDPOINTS[0], Some(UNRULY_PASID));
    mocks.host().bind(unruly, Some(&mut one)).unwrap();
    let before = nested(&mocks, Some(UNRULY_PASID));
    assert_eq!(mocks.host().bind(unruly, Some(&mut two)), Err(HostError::NoMemory));
    assert_eq!(nested(&mocks, Some(UNRULY_PASID)), before);
    assert_eq!(mocks.access(unruly, 0x1000, AccessKind::Read), Some(Memory::page(2).0));
    mocks.host().destroy(two);
    mocks.host().bind(unruly, None).unwrap();
    mocks.host().destroy(one);
    nothing_is_left(mocks);
}

/// VT-d: what is invalidated is the IOTLB of the PASID's own nested table.
#[test]
#[ignore = "needs the lab: tests/lab/run"]
fn invalidation_reaches_the_tables_of_its_scope() {
    let mut mocks = Mocks::new(Flavour::Vtd);
    let mut spaces: Vec<Space> = (2..5).map(|page| vtd_space(&mut mocks, page)).collect();
    let pasids = [None, Some(1), Some(2)];
    for (space, pasid) in spaces.iter_mut().zip(pasids) {
        mocks.host().bind(stream(ENDPOINTS[0], pasid), Some(space)).unwrap();
    }
    let cached = |mocks: &Mocks| {
        pasids.map(|pasid| {
            let (table, data) = nested(mocks, pasid);
            let is_cached = mocks.kernel.iotlb_holds(table, cached_by(data));
            assert_ne!(is_cached, mocks.kernel.iotlb_holds(table, INVALIDATED));
            is_cached
        })
    };
    assert_eq!(cached(&mocks), [true; 3], "the tables arrived as they are");
    let endpoint = ENDPOINTS[0];
    let pasid = |pasid: Option<u32>| Scope::Pasid(pasid.map(|pasid| Pasid::new(pasid).unwrap()));
    mocks.host().invalidate(&[invalidation(endpoint, pasid(Some(1)), Caches::TLB)]).unwrap();
    assert_eq!(cached(&mocks), [true, false, true]);
    mocks.host().invalidate(&[invalidation(endpoint, pasid(None), Caches::TLB)]).unwrap();
    assert_eq!(cached(&mocks), [false, false, true]);
    mocks.host().invalidate(&[invalidation(endpoint, Scope::Endpoint, Caches::TLB)]).unwrap();
    assert_eq!(cached(&mocks), [false; 3]);
    drop(spaces);
    nothing_is_left(mocks);
}

/// An entry for each page range arrives, and no other.
#[test]
#[ignore = "needs the lab: tests/lab/run"]
fn invalidation_of_a_range_is_of_a_range() {
    let mut mocks = Mocks::new(Flavour::Vtd);
    let mut space = vtd_space(&mut mocks, 2);
    mocks.host().bind(stream(ENDPOINTS[0], None), Some(&mut space)).unwrap();
    let range = IovaRange::new(Iova(0x2000), Iova(0x2fff)).unwrap();
    let scope = Scope::Range { pasid: None, range, page_lg2: 12 };
    mocks.host().invalidate(&[invalidation(ENDPOINTS[0], scope, Caches::TLB)]).unwrap();
    let (table, data) = nested(&mocks, None);
    for place in 0..4 {
        let value = if place == 2 { INVALIDATED } else { cached_by(data) };
        mocks
            .kernel
            .test(TestOp::CheckIotlb { table: table.0, slot: place, value })
            .expect("the slot of page 2 alone");
    }
    drop(space);
    nothing_is_left(mocks);
}

/// SMMUv3: commands name their endpoint, TLBI and CFGI, and ATC_INV for none that has no ATS.
#[test]
#[ignore = "needs the lab: tests/lab/run"]
fn commands_reach_their_endpoint() {
    let mut mocks = Mocks::new(Flavour::Smmuv3);
    let mut spaces: Vec<Space> =
        ENDPOINTS.iter().zip(2..).map(|(&endpoint, page)| smmuv3_space(&mut mocks, endpoint, page)).collect();
    for (space, endpoint) in spaces.iter_mut().zip(ENDPOINTS) {
        mocks.host().bind(stream(endpoint, None), Some(space)).unwrap();
    }
    let contexts = |mocks: &Mocks| {
        mocks.devices.map(|device| {
            [slot::CFGI_CD, slot::CFGI_CD_ALL, slot::ATC_INV].map(|slot| mocks.kernel.cached(device, slot))
        })
    };
    assert_eq!(contexts(&mocks), [[true; 3]; 2]);
    let (scope, caches) = (Scope::Pasid(Pasid::new(3)), Caches::PASID);
    mocks.host().invalidate(&[invalidation(ENDPOINTS[1], scope, caches)]).unwrap();
    assert_eq!(contexts(&mocks), [[true; 3], [false, true, true]]);
    mocks.host().invalidate(&[invalidation(ENDPOINTS[0], Scope::Endpoint, Caches::all())]).unwrap();
    let [first, second] = contexts(&mocks);
    assert_eq!((first[1], first[2], second), (false, true, [false, true, true]));
    let tlb = mocks.devices.map(|device| mocks.kernel.cached(device, slot::TLBI));
    assert_ne!(tlb, [true; 2], "translations were invalidated as well");
    // More than a batch of the driver has, to one call: everything is done.
    let scopes = (0..200).map(|page| {
        let range = IovaRange::from_length(Iova(page << 13), 0x1000).unwrap();
        invalidation(ENDPOINTS[0], Scope::Range { pasid: None, range, page_lg2: 12 }, Caches::TLB)
    });
    mocks.host().invalidate(&scopes.collect::<Vec<_>>()).unwrap();
    drop(spaces);
    nothing_is_left(mocks);
}

/// A fault of a guest's table comes out with its endpoint and address, once.
#[test]
#[ignore = "needs the lab: tests/lab/run"]
fn events_are_told_with_their_endpoint() {
    let mut mocks = Mocks::new(Flavour::Smmuv3);
    let mut spaces: Vec<Space> =
        ENDPOINTS.iter().zip(2..).map(|(&endpoint, page)| smmuv3_space(&mut mocks, endpoint, page)).collect();
    for (space, endpoint) in spaces.iter_mut().zip(ENDPOINTS) {
        mocks.host().bind(stream(endpoint, None), Some(space)).unwrap();
    }
    assert_eq!(mocks.host().next_fault(), None);
    for device in [mocks.devices[1], mocks.devices[0], mocks.devices[1]] {
        mocks.kernel.test(TestOp::Event { device: device.0 }).unwrap();
    }
    for endpoint in [ENDPOINTS[1], ENDPOINTS[0], ENDPOINTS[1]] {
        let fault = mocks.host().next_fault().expect("a fault");
        assert_eq!((fault.stream, fault.address), (stream(endpoint, None), Some(Iova(EVENT_ADDRESS))));
        assert!(fault.cause.is_mapping());
    }
    assert_eq!((mocks.host().next_fault(), mocks.host().lost_events()), (None, 0));
    drop(spaces);
    nothing_is_left(mocks);
}

/// More events than the kernel keeps: those that fit come out, and how many were lost is known to the last.
#[test]
#[ignore = "needs the lab: tests/lab/run"]
fn events_that_are_lost_are_counted() {
    const LOST: u32 = 37;
    let mut mocks = Mocks::new(Flavour::Smmuv3);
    let mut space = smmuv3_space(&mut mocks, ENDPOINTS[0], 2);
    mocks.host().bind(stream(ENDPOINTS[0], None), Some(&mut space)).unwrap();
    let device = mocks.devices[0].0;
    for _ in 0..EVENT_QUEUE_DEPTH + LOST {
        mocks.kernel.test(TestOp::Event { device }).unwrap();
    }
    let told = std::iter::from_fn(|| mocks.host().next_fault()).count();
    assert_eq!((told, mocks.host().lost_events()), (EVENT_QUEUE_DEPTH as usize, u64::from(LOST)));
    mocks.kernel.test(TestOp::Event { device }).unwrap();
    assert!(mocks.host().next_fault().is_some());
    assert_eq!((mocks.host().next_fault(), mocks.host().lost_events()), (None, u64::from(LOST)));
    drop(space);
    nothing_is_left(mocks);
}

/// Who waits for faults wakes up: files of queues are ready exactly while there is something to fetch.
#[test]
#[ignore = "needs the lab: tests/lab/run"]
fn queues_can_be_waited_for() {
    use nix::poll::{PollFd, PollFlags, poll};
    use std::os::fd::BorrowedFd;

    let mut mocks = Mocks::new(Flavour::Smmuv3);
    let mut space = smmuv3_space(&mut mocks, ENDPOINTS[0], 2);
    mocks.host().bind(stream(ENDPOINTS[0], None), Some(&mut space)).unwrap();
    let ready = |mocks: &mut Mocks| {
        let [file] = mocks.host().queue_fds()[..] else { panic!("one SMMU, one queue") };
        #[allow(unsafe_code)]
        // SAFETY: the host keeps the queue's file open, and nobody else has `mocks` meanwhile.
        let file = unsafe { BorrowedFd::borrow_raw(file) };
        poll(&mut [PollFd::new(file, PollFlags::POLLIN)], 0u8).unwrap() == 1
    };
    assert!(!ready(&mut mocks));
    mocks.kernel.test(TestOp::Event { device: mocks.devices[0].0 }).unwrap();
    assert!(ready(&mut mocks));
    assert!(mocks.host().next_fault().is_some());
    assert!(!ready(&mut mocks));
    drop(space);
    nothing_is_left(mocks);
}

/// MAP and UNMAP: pages of the guest's memfd, in the tables of all who are bound; pinned as long as they are mapped.
#[test]
#[ignore = "needs the lab: tests/lab/run"]
fn mappings_are_in_the_tables_of_the_kernel() {
    for flavour in [Flavour::Vtd, Flavour::Smmuv3] {
        let mut mocks = Mocks::new(flavour);
        let mut space = mocks.host().create(SpaceSpec::Mapped).unwrap();
        for endpoint in ENDPOINTS {
            mocks.host().bind(stream(endpoint, None), Some(&mut space)).unwrap();
        }
        let range = |page: u64, count: u64| IovaRange::from_length(Iova(page << 12), count << 12).unwrap();
        let flags = MapFlags::READ | MapFlags::WRITE;
        let mapping =
            |page, count, target| Mapping { range: range(page, count), output: Memory::page(target), flags };
        let beyond = Mapping { output: Gpa(Memory::BASE + MEMORY as u64 - 0x1000), ..mapping(0x80, 2, 0) };
        mocks.host().map(&mut space, mapping(0x40, 3, 7)).unwrap();
        assert!(mocks.host().map(&mut space, beyond).is_err(), "half of it is not memory");
        for endpoint in ENDPOINTS {
            let route = mocks.kernel.route(mocks.device(endpoint), None).unwrap();
            assert_eq!(route.stage1, HwptData::None);
            for page in 0..3 {
                let user = mocks.user(Memory::page(7 + page).0);
                assert!(mocks.kernel.leads(route.table, (0x40 + page) << 12, user));
            }
            for page in [0x3f, 0x43, 0x80, 0x81] {
                assert_eq!(mocks.access(stream(endpoint, None), page << 12, AccessKind::Read), None);
            }
        }
        assert_eq!(mocks.host().unmap(&mut space, range(0x40, 3)), Ok(1));
        for endpoint in ENDPOINTS {
            let route = mocks.kernel.route(mocks.device(endpoint), None).unwrap();
            assert!(!mocks.kernel.leads(route.table, 0x40 << 12, mocks.user(Memory::page(7).0)));
        }
        drop(space);
        nothing_is_left(mocks);
    }
}

/// Whatever is bound when it happens: endpoints are removed and added, and the host goes.
#[test]
#[ignore = "needs the lab: tests/lab/run"]
fn endpoints_come_and_go() {
    for flavour in [Flavour::Vtd, Flavour::Smmuv3] {
        let mut mocks = Mocks::new(flavour);
        for round in 0..3 {
            let mut space = match flavour {
                Flavour::Vtd => vtd_space(&mut mocks, 2),
                Flavour::Smmuv3 => smmuv3_space(&mut mocks, ENDPOINTS[0], 2),
            };
            let mut identity = mocks.host().create(SpaceSpec::Identity).unwrap();
            mocks.host().bind(stream(ENDPOINTS[0], None), Some(&mut space)).unwrap();
            mocks.host().bind(stream(ENDPOINTS[1], None), Some(&mut identity)).unwrap();
            let [gone, left] = if round % 2 == 0 { ENDPOINTS } else { [ENDPOINTS[1], ENDPOINTS[0]] };
            mocks.host().remove_endpoint(gone).unwrap();
            assert_eq!(mocks.access(stream(gone, None), 0x1000, AccessKind::Read), None);
            assert_eq!(mocks.access(stream(gone, None), Memory::BASE, AccessKind::Read), None);
            let seen =
                [0x1000, Memory::BASE].map(|at| mocks.access(stream(left, None), at, AccessKind::Read));
            let expected = if left == ENDPOINTS[0] {
                [Some(Memory::page(2).0), None]
            } else {
                [None, Some(Memory::BASE)]
            };
            assert_eq!(seen, expected);
            drop(space);
            let id = mocks.device(gone);
            mocks.host().add_endpoint(gone, plain(id)).unwrap();
            mocks.host().bind(stream(left, None), None).unwrap();
        }
        nothing_is_left(mocks);
    }
}
