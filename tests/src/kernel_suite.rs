//! What is relied on of iommufd, written once: for the kernel itself and for what stands in for it.
//!
//! A kernel comes as a [`KernelUnderTest`]: the kernel, a way to make devices, and a way to let them do something. Each
//! function is one property; a test target calls them all with a fresh kernel each, see
//! [`kernel_suite!`](crate::kernel_suite!). Only what every kernel does is here: what one driver does differently from
//! another is the business of that driver's stand-in.

use nix::errno::Errno;
use pgtable_formats::{Iova, IovaRange, Pasid};
use viommu_host_iommufd::kernel::{
    Backing, Commands, DeviceId, Event, HwptData, HwptFlags, HwptSpec, IoasMapping, Iommufd, ObjectId,
    PageFault, ResponseCode, ViommuKind, VtdInvalidation,
};

/// A kernel with what is around it.
pub trait KernelUnderTest {
    /// The kernel.
    type Kernel: Iommufd;

    /// The kernel.
    fn kernel(&self) -> &Self::Kernel;

    /// Another device that has PASIDs and page requests, behind an IOMMU that takes a nested table for each PASID.
    fn vtd_device(&mut self) -> DeviceId;

    /// Another device behind an IOMMU, the same for all, that takes nested tables through a vIOMMU.
    fn smmuv3_device(&mut self) -> DeviceId;

    /// At least 16 pages of the process's memory, zeroed, at a multiple of 4 KiB.
    fn memory(&self) -> u64;

    /// Whether `device`, attached to the paging table `table`, reaches the page at `user` of the process by `iova`.
    fn leads(&mut self, device: DeviceId, table: ObjectId, iova: u64, user: u64) -> bool;

    /// The device sends a page request, the only one of its group.
    fn request_page(&mut self, device: DeviceId, request: PageRequest);

    /// The device has an event. It is attached to a nested table of its vIOMMU whose contexts lie in zeroed memory.
    fn send_event(&mut self, device: DeviceId);

    /// Something that is the same at two times where as many objects exist.
    fn count(&mut self) -> Vec<u32>;
}

/// A page request.
#[derive(Clone, Copy, Debug)]
pub struct PageRequest {
    /// The PASID.
    pub pasid: Option<Pasid>,
    /// Number of the group.
    pub group: u32,
    /// As [`PageFault::permissions`].
    pub permissions: u32,
    /// The address.
    pub address: u64,
}

/// Makes one test of each function of the suite: `kernel_suite!(make_a_kernel);`, or with `ignore = "why"` after it.
#[macro_export]
macro_rules! kernel_suite {
    ($make:expr) => {
        $crate::kernel_suite!(@all [] $make);
    };
    ($make:expr, ignore = $reason:literal) => {
        $crate::kernel_suite!(@all [#[ignore = $reason]] $make);
    };
    (@all $attributes:tt $make:expr) => {
        $crate::kernel_suite!(
            @each $attributes $make,
            what_is_used_stays,
            what_is_not_there_is_told,
            areas_come_and_go_whole,
            tables_lead_where_their_address_space_does,
            a_table_is_replaced_in_one_step,
            pasids_have_tables_of_their_own,
            tables_have_to_be_made_for_pasids,
            page_requests_are_answered_once,
            page_requests_end_with_their_table,
            page_requests_end_where_nothing_is_attached,
            there_is_one_of_a_kind,
            a_translating_table_needs_its_vdevice,
            events_are_numbered_and_losses_told,
            vtd_invalidation_stops_where_it_fails,
            smmuv3_invalidation_stops_where_it_fails,
            a_vdevice_may_go_before_its_table
        );
    };
    (@each $attributes:tt $make:expr, $($name:ident),*) => {
        $($crate::kernel_suite!(@one $attributes $make, $name);)*
    };
    (@one [$($attribute:tt)*] $make:expr, $name:ident) => {
        #[test]
        $($attribute)*
        fn $name() {
            $crate::kernel_suite::$name(&mut $make);
        }
    };
}

/// Where the tests map the process's memory.
const GPA: u64 = 0x4000_0000;

fn range(start: u64, length: u64) -> IovaRange {
    IovaRange::from_length(Iova(start), length).expect("a range")
}

fn pasid(value: u32) -> Option<Pasid> {
    Some(Pasid::new(value).expect("20 bits"))
}

fn mapping(iova: u64, length: u64, user: u64) -> IoasMapping {
    IoasMapping { range: range(iova, length), backing: Backing::Memory(user), readable: true, writable: true }
}

fn paging(device: DeviceId, ioas: ObjectId, flags: HwptFlags) -> HwptSpec {
    HwptSpec { device, parent: ioas, flags, data: HwptData::None, fault_queue: None }
}

/// A nested table for a PASID whose root is zeroed memory.
fn vtd_nested(device: DeviceId, parent: ObjectId) -> HwptSpec {
    let data = HwptData::Vtd { flags: 0, root: GPA, address_width: 48 };
    HwptSpec { device, parent, flags: HwptFlags::PASID, data, fault_queue: None }
}

/// A nested table that translates, whose context descriptor is zeroed memory.
fn smmuv3_nested(device: DeviceId, viommu: ObjectId) -> HwptSpec {
    let data = HwptData::Smmuv3([GPA | 0b1011, 0]);
    HwptSpec { device, parent: viommu, flags: HwptFlags::empty(), data, fault_queue: None }
}

/// An address space with the first 16 pages of memory at [`GPA`], and a nest parent on it.
fn nest_parent<T: KernelUnderTest>(test: &T, device: DeviceId, flags: HwptFlags) -> (ObjectId, ObjectId) {
    let kernel = test.kernel();
    let ioas = kernel.alloc_ioas().expect("an address space");
    kernel.map(ioas, &mapping(GPA, 0x1_0000, test.memory())).expect("mapped");
    let spec = paging(device, ioas, HwptFlags::NEST_PARENT | flags);
    (ioas, kernel.alloc_hwpt(&spec).expect("a nest parent"))
}

/// A vIOMMU with a vDEVICE, and what is below.
struct Virtual {
    ioas: ObjectId,
    parent: ObjectId,
    viommu: ObjectId,
    vdevice: ObjectId,
}

impl Virtual {
    fn new<T: KernelUnderTest>(test: &T, device: DeviceId) -> Self {
        let (ioas, parent) = nest_parent(test, device, HwptFlags::empty());
        let kernel = test.kernel();
        let viommu = kernel.alloc_viommu(ViommuKind::Smmuv3, device, parent).expect("a vIOMMU");
        let vdevice = kernel.alloc_vdevice(viommu, device, 0x42).expect("a vDEVICE");
        Self { ioas, parent, viommu, vdevice }
    }

    /// In the order that the kernel wants.
    fn destroy<T: KernelUnderTest>(self, test: &T) {
        destroy(test, &[self.vdevice, self.viommu, self.parent, self.ioas]);
    }
}

fn destroy<T: KernelUnderTest>(test: &T, objects: &[ObjectId]) {
    for object in objects {
        assert_eq!(test.kernel().destroy(*object), Ok(()), "{object:?}");
    }
}

fn busy<T: KernelUnderTest>(test: &T, objects: &[ObjectId]) {
    for object in objects {
        assert_eq!(test.kernel().destroy(*object), Err(Errno::EBUSY), "{object:?}");
    }
}

/// An object that another one is made of, or that a device is attached to, is not destroyed.
pub fn what_is_used_stays<T: KernelUnderTest>(test: &mut T) {
    let (vtd, smmuv3) = (test.vtd_device(), test.smmuv3_device());
    let before = test.count();
    let kernel = test.kernel();
    let (ioas, parent) = nest_parent(test, vtd, HwptFlags::PASID);
    busy(test, &[ioas]);
    let queue = kernel.alloc_fault_queue().expect("a fault queue");
    let nested =
        kernel.alloc_hwpt(&HwptSpec { fault_queue: Some(queue), ..vtd_nested(vtd, parent) }).unwrap();
    busy(test, &[ioas, parent, queue]);
    kernel.attach(vtd, None, nested).unwrap();
    kernel.attach(vtd, pasid(9), nested).unwrap();
    busy(test, &[ioas, parent, queue, nested]);
    kernel.attach(vtd, None, parent).unwrap();
    busy(test, &[nested]);
    kernel.detach(vtd, pasid(9)).unwrap();
    destroy(test, &[nested, queue]);
    busy(test, &[parent]);
    kernel.detach(vtd, None).unwrap();
    destroy(test, &[parent, ioas]);

    let below = Virtual::new(test, smmuv3);
    let kernel = test.kernel();
    busy(test, &[below.ioas, below.parent, below.viommu]);
    let events = kernel.alloc_event_queue(below.viommu, ViommuKind::Smmuv3, 4).unwrap();
    let nested = kernel.alloc_hwpt(&smmuv3_nested(smmuv3, below.viommu)).unwrap();
    kernel.attach(smmuv3, None, nested).unwrap();
    busy(test, &[below.viommu, nested]);
    kernel.detach(smmuv3, None).unwrap();
    destroy(test, &[nested]);
    busy(test, &[below.viommu]);
    destroy(test, &[events]);
    busy(test, &[below.viommu]);
    below.destroy(test);
    assert_eq!(test.count(), before);
}

/// Numbers that stand for nothing, or for something else.
pub fn what_is_not_there_is_told<T: KernelUnderTest>(test: &mut T) {
    let device = test.vtd_device();
    let before = test.count();
    let kernel = test.kernel();
    let (ioas, parent) = nest_parent(test, device, HwptFlags::PASID);
    let plain = kernel.alloc_hwpt(&paging(device, ioas, HwptFlags::PASID)).unwrap();
    let nothing = ObjectId(0x7fff_0000);
    let nobody = DeviceId(0x7fff_0000);

    assert_eq!(kernel.destroy(nothing), Err(Errno::ENOENT));
    assert_eq!(kernel.map(nothing, &mapping(GPA, 0x1000, test.memory())), Err(Errno::ENOENT));
    assert_eq!(kernel.unmap(nothing, range(GPA, 0x1000)), Err(Errno::ENOENT));
    assert_eq!(kernel.iova_ranges(nothing), Err(Errno::ENOENT));
    assert_eq!(kernel.iova_ranges(parent), Err(Errno::ENOENT), "a table is no address space");
    assert_eq!(kernel.hw_info(nobody), Err(Errno::ENOENT));
    assert_eq!(kernel.attach(device, None, nothing), Err(Errno::ENOENT));
    assert_eq!(kernel.alloc_viommu(ViommuKind::Smmuv3, nobody, parent), Err(Errno::ENOENT));
    assert_eq!(kernel.alloc_vdevice(nothing, device, 1), Err(Errno::ENOENT));
    assert_eq!(kernel.alloc_event_queue(nothing, ViommuKind::Smmuv3, 4), Err(Errno::ENOENT));
    let entries = [VtdInvalidation { address: 0, pages: u64::MAX, leaf: false }];
    let errno = |object| kernel.invalidate(object, Commands::Vtd(&entries)).map_err(|error| error.errno);
    assert_eq!(errno(nothing), Err(Errno::ENOENT));
    assert_eq!(errno(parent), Err(Errno::EINVAL), "a paging table has nothing to invalidate");

    assert_eq!(kernel.alloc_hwpt(&paging(nobody, ioas, HwptFlags::empty())), Err(Errno::ENOENT));
    assert_eq!(kernel.alloc_hwpt(&paging(device, nothing, HwptFlags::empty())), Err(Errno::EINVAL));
    assert_eq!(kernel.alloc_hwpt(&vtd_nested(device, plain)), Err(Errno::EINVAL), "no nest parent");
    let nested = vtd_nested(device, parent);
    let refused = HwptSpec { fault_queue: Some(nothing), ..nested };
    assert_eq!(kernel.alloc_hwpt(&refused), Err(Errno::ENOENT));
    let refused = HwptSpec { flags: HwptFlags::NEST_PARENT, ..nested };
    assert_eq!(kernel.alloc_hwpt(&refused), Err(Errno::EOPNOTSUPP));
    let queue = kernel.alloc_fault_queue().unwrap();
    let spec = paging(device, ioas, HwptFlags::NEST_PARENT);
    let refused = HwptSpec { fault_queue: Some(queue), ..spec };
    assert_eq!(kernel.alloc_hwpt(&refused), Err(Errno::EOPNOTSUPP), "a nest parent has no page requests");
    destroy(test, &[queue, plain, parent, ioas]);
    assert_eq!(test.kernel().destroy(ioas), Err(Errno::ENOENT));
    assert_eq!(test.count(), before);
}

/// A mapping replaces none, and leaves as a whole.
pub fn areas_come_and_go_whole<T: KernelUnderTest>(test: &mut T) {
    let device = test.vtd_device();
    let before = test.count();
    let user = test.memory();
    let kernel = test.kernel();
    let ioas = kernel.alloc_ioas().unwrap();
    kernel.map(ioas, &mapping(GPA, 0x4000, user)).unwrap();
    kernel.map(ioas, &mapping(GPA + 0x8000, 0x1000, user)).unwrap();
    for (start, length) in [(0, 0x1000), (0x3000, 0x1000), (0x3000, 0x2000), (0x7000, 0x2000), (0, 0x1_0000)]
    {
        let over = mapping(GPA + start, length, user);
        assert_eq!(kernel.map(ioas, &over), Err(Errno::EEXIST), "{start:#x} {length:#x}");
    }
    for (start, length) in [(0, 0x1000), (0x1000, 0x1000), (0x3000, 0x1000), (0x1000, 0x8000)] {
        assert_eq!(
            kernel.unmap(ioas, range(GPA + start, length)),
            Err(Errno::ENOENT),
            "{start:#x} {length:#x}"
        );
    }
    assert_eq!(kernel.unmap(ioas, range(GPA + 0x5000, 0x1000)), Err(Errno::ENOENT), "nothing is there");
    // With a table, addresses and lengths are of whole pages.
    let table = kernel.alloc_hwpt(&paging(device, ioas, HwptFlags::empty())).unwrap();
    assert_eq!(kernel.iova_ranges(ioas).unwrap().alignment, 0x1000);
    for (start, length, user) in [(0x5800, 0x1000, user), (0x5000, 0x800, user), (0x5000, 0x1000, user + 8)] {
        let refused = kernel.map(ioas, &mapping(GPA + start, length, user));
        assert_eq!(refused, Err(Errno::EINVAL), "{start:#x} {length:#x} {user:#x}");
    }
    destroy(test, &[table]);
    let none = IoasMapping { readable: false, writable: false, ..mapping(GPA + 0x5000, 0x1000, user) };
    assert_eq!(kernel.map(ioas, &none), Err(Errno::EINVAL));
    assert_eq!(kernel.unmap(ioas, range(GPA, 0x9000)), Ok(0x5000));
    assert_eq!(kernel.unmap(ioas, IovaRange::ALL), Ok(0));
    kernel.map(ioas, &mapping(GPA + 0x2000, 0x2000, user)).unwrap();
    assert_eq!(kernel.unmap(ioas, IovaRange::ALL), Ok(0x2000));
    destroy(test, &[ioas]);
    assert_eq!(test.count(), before);
}

/// What is mapped before and after a table is made, and what is unmapped.
pub fn tables_lead_where_their_address_space_does<T: KernelUnderTest>(test: &mut T) {
    let device = test.vtd_device();
    let before = test.count();
    let user = test.memory();
    let kernel = test.kernel();
    let ioas = kernel.alloc_ioas().unwrap();
    kernel.map(ioas, &mapping(GPA, 0x2000, user)).unwrap();
    let table = kernel.alloc_hwpt(&paging(device, ioas, HwptFlags::empty())).unwrap();
    kernel.attach(device, None, table).unwrap();
    kernel.map(ioas, &mapping(0x1000, 0x1000, user + 0x3000)).unwrap();
    for (iova, page) in [(GPA, 0), (GPA + 0x1000, 1), (0x1000, 3)] {
        for other in [0, 1, 3] {
            let leads = test.leads(device, table, iova, user + 0x1000 * other);
            assert_eq!(leads, page == other, "{iova:#x} to page {other}");
        }
    }
    assert_eq!(test.kernel().unmap(ioas, range(GPA, 0x2000)), Ok(0x2000));
    assert!(!test.leads(device, table, GPA, user));
    assert!(test.leads(device, table, 0x1000, user + 0x3000));
    test.kernel().detach(device, None).unwrap();
    destroy(test, &[table, ioas]);
    assert_eq!(test.count(), before);
}

/// An attach that is refused leaves what was; one that is taken leaves nothing of what was.
pub fn a_table_is_replaced_in_one_step<T: KernelUnderTest>(test: &mut T) {
    let device = test.vtd_device();
    let before = test.count();
    let user = test.memory();
    let kernel = test.kernel();
    let make = |page: u64| {
        let ioas = kernel.alloc_ioas().unwrap();
        kernel.map(ioas, &mapping(GPA, 0x1000, user + 0x1000 * page)).unwrap();
        (ioas, kernel.alloc_hwpt(&paging(device, ioas, HwptFlags::PASID)).unwrap())
    };
    let (first, second) = (make(1), make(2));
    kernel.attach(device, None, first.1).unwrap();
    assert_eq!(kernel.attach(device, None, first.1), Ok(()), "what is there already");
    assert_eq!(kernel.attach(device, None, ObjectId(0x7fff_0000)), Err(Errno::ENOENT));
    busy(test, &[first.1]);
    assert!(test.leads(device, first.1, GPA, user + 0x1000));
    test.kernel().attach(device, None, second.1).unwrap();
    assert!(test.leads(device, second.1, GPA, user + 0x2000));
    busy(test, &[second.1]);
    destroy(test, &[first.1, first.0]);
    test.kernel().detach(device, None).unwrap();
    destroy(test, &[second.1, second.0]);
    assert_eq!(test.count(), before);
}

/// Each PASID is attached, replaced and detached by itself.
pub fn pasids_have_tables_of_their_own<T: KernelUnderTest>(test: &mut T) {
    let device = test.vtd_device();
    let before = test.count();
    let kernel = test.kernel();
    let (ioas, parent) = nest_parent(test, device, HwptFlags::PASID);
    assert!(kernel.hw_info(device).unwrap().max_pasid_lg2 >= 8);
    kernel.attach(device, None, parent).unwrap();
    let tables: Vec<_> = (0..4).map(|_| kernel.alloc_hwpt(&vtd_nested(device, parent)).unwrap()).collect();
    kernel.attach(device, pasid(1), tables[0]).unwrap();
    kernel.attach(device, pasid(2), tables[1]).unwrap();
    kernel.attach(device, pasid(0xff), tables[1]).unwrap();
    busy(test, &tables[..2]);
    kernel.attach(device, pasid(1), tables[2]).unwrap();
    destroy(test, &tables[..1]);
    kernel.detach(device, pasid(2)).unwrap();
    busy(test, &tables[1..3]);
    kernel.detach(device, pasid(0xff)).unwrap();
    destroy(test, &tables[1..2]);
    assert_eq!(kernel.detach(device, pasid(2)), Ok(()), "nothing was attached");
    // Untagged accesses may have another table meanwhile.
    kernel.attach(device, None, tables[3]).unwrap();
    busy(test, &tables[2..]);
    kernel.attach(device, None, parent).unwrap();
    kernel.detach(device, pasid(1)).unwrap();
    destroy(test, &tables[2..]);
    kernel.detach(device, None).unwrap();
    destroy(test, &[parent, ioas]);
    assert_eq!(test.count(), before);
}

/// Flag PASID: of the table of a PASID, and of that of untagged accesses beside it.
pub fn tables_have_to_be_made_for_pasids<T: KernelUnderTest>(test: &mut T) {
    let device = test.vtd_device();
    let before = test.count();
    let kernel = test.kernel();
    let (ioas, parent) = nest_parent(test, device, HwptFlags::PASID);
    let plain = kernel.alloc_hwpt(&paging(device, ioas, HwptFlags::empty())).unwrap();
    let nested = kernel.alloc_hwpt(&vtd_nested(device, parent)).unwrap();
    let unfit =
        kernel.alloc_hwpt(&HwptSpec { flags: HwptFlags::empty(), ..vtd_nested(device, parent) }).unwrap();

    kernel.attach(device, None, plain).unwrap();
    assert_eq!(
        kernel.attach(device, pasid(3), nested),
        Err(Errno::EINVAL),
        "the untagged table is not made for it"
    );
    // Nothing is left of it: the table is not in use.
    destroy(test, &[nested]);
    let nested = kernel.alloc_hwpt(&vtd_nested(device, parent)).unwrap();
    kernel.attach(device, None, parent).unwrap();
    assert_eq!(kernel.attach(device, pasid(3), unfit), Err(Errno::EINVAL));
    kernel.attach(device, pasid(3), nested).unwrap();
    assert_eq!(kernel.attach(device, pasid(3), unfit), Err(Errno::EINVAL));
    busy(test, &[nested]);
    assert_eq!(kernel.attach(device, None, plain), Err(Errno::EINVAL), "PASIDs are in use");
    busy(test, &[parent]);
    kernel.detach(device, pasid(3)).unwrap();
    kernel.attach(device, None, plain).unwrap();
    kernel.detach(device, None).unwrap();
    destroy(test, &[nested, unfit, plain, parent, ioas]);
    assert_eq!(test.count(), before);
}

/// Waits for page requests: they take their way through the kernel.
fn page_faults<T: KernelUnderTest>(test: &T, queue: ObjectId, count: usize) -> Vec<PageFault> {
    let mut faults = Vec::new();
    for _ in 0..200 {
        faults.extend(test.kernel().read_page_faults(queue).expect("readable"));
        if faults.len() >= count {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert_eq!(faults.len(), count, "{faults:?}");
    faults
}

/// A group has a cookie, which is good for one answer.
pub fn page_requests_are_answered_once<T: KernelUnderTest>(test: &mut T) {
    const PASID_VALID: u32 = 1;
    const LAST: u32 = 2;
    let device = test.vtd_device();
    let before = test.count();
    let kernel = test.kernel();
    let (ioas, parent) = nest_parent(test, device, HwptFlags::PASID);
    let queue = kernel.alloc_fault_queue().unwrap();
    let spec = HwptSpec { fault_queue: Some(queue), ..vtd_nested(device, parent) };
    let (untagged, tagged) = (kernel.alloc_hwpt(&spec).unwrap(), kernel.alloc_hwpt(&spec).unwrap());
    kernel.attach(device, None, untagged).unwrap();
    kernel.attach(device, pasid(5), tagged).unwrap();
    assert_eq!(kernel.read_page_faults(queue), Ok(vec![]), "an empty queue does not block");
    assert_eq!(kernel.respond(queue, 1, ResponseCode::Success), Err(Errno::EINVAL), "no such cookie");

    test.request_page(device, PageRequest { pasid: None, group: 7, permissions: 1, address: 0x1000 });
    test.request_page(
        device,
        PageRequest { pasid: pasid(5), group: 7, permissions: 3, address: 0x7fff_1000 },
    );
    let faults = page_faults(test, queue, 2);
    let seen = |fault: &PageFault| (fault.flags, fault.device, fault.group, fault.permissions, fault.address);
    assert_eq!(seen(&faults[0]), (LAST, device, 7, 1, 0x1000));
    assert_eq!(seen(&faults[1]), (LAST | PASID_VALID, device, 7, 3, 0x7fff_1000));
    assert_eq!(faults[1].pasid, 5);
    assert_ne!(faults[0].cookie, faults[1].cookie);
    let kernel = test.kernel();
    // In any order, once.
    assert_eq!(kernel.respond(queue, faults[1].cookie, ResponseCode::Success), Ok(()));
    assert_eq!(kernel.respond(queue, faults[0].cookie, ResponseCode::Invalid), Ok(()));
    for fault in &faults {
        assert_eq!(kernel.respond(queue, fault.cookie, ResponseCode::Success), Err(Errno::EINVAL));
    }
    kernel.detach(device, pasid(5)).unwrap();
    kernel.detach(device, None).unwrap();
    destroy(test, &[tagged, untagged, queue, parent, ioas]);
    assert_eq!(test.count(), before);
}

/// The kernel answers what is open when a table is detached or replaced: read already or not.
pub fn page_requests_end_with_their_table<T: KernelUnderTest>(test: &mut T) {
    let device = test.vtd_device();
    let before = test.count();
    let kernel = test.kernel();
    let (ioas, parent) = nest_parent(test, device, HwptFlags::PASID);
    let queue = kernel.alloc_fault_queue().unwrap();
    let spec = HwptSpec { fault_queue: Some(queue), ..vtd_nested(device, parent) };
    let (one, two) = (kernel.alloc_hwpt(&spec).unwrap(), kernel.alloc_hwpt(&spec).unwrap());
    kernel.attach(device, None, one).unwrap();
    for pasid in [pasid(5), pasid(6)] {
        kernel.attach(device, pasid, one).unwrap();
    }
    let request = |pasid, group| PageRequest { pasid, group, permissions: 1, address: 0x1000 };
    test.request_page(device, request(pasid(5), 1));
    test.request_page(device, request(pasid(6), 2));
    let read = page_faults(test, queue, 2);
    test.request_page(device, request(pasid(5), 3));
    test.request_page(device, request(pasid(6), 4));

    let kernel = test.kernel();
    kernel.attach(device, pasid(5), two).unwrap();
    assert_eq!(kernel.respond(queue, read[0].cookie, ResponseCode::Success), Err(Errno::EINVAL), "replaced");
    let left = page_faults(test, queue, 1);
    assert_eq!((left[0].pasid, left[0].group), (6, 4), "unread ones of PASID 5 are gone");
    let kernel = test.kernel();
    assert_eq!(kernel.respond(queue, read[1].cookie, ResponseCode::Success), Ok(()));
    kernel.detach(device, pasid(6)).unwrap();
    assert_eq!(kernel.respond(queue, left[0].cookie, ResponseCode::Success), Err(Errno::EINVAL), "detached");
    kernel.detach(device, pasid(5)).unwrap();
    kernel.detach(device, None).unwrap();
    destroy(test, &[one, two, queue, parent, ioas]);
    assert_eq!(test.count(), before);
}

/// A stream that leaves its queue by way of nothing leaves no page request there: read already or not. Kernels differ in
/// what becomes of them where a table *without* the queue replaces it in one step.
pub fn page_requests_end_where_nothing_is_attached<T: KernelUnderTest>(test: &mut T) {
    let device = test.vtd_device();
    let before = test.count();
    let kernel = test.kernel();
    let (ioas, parent) = nest_parent(test, device, HwptFlags::PASID);
    let queue = kernel.alloc_fault_queue().unwrap();
    let spec = HwptSpec { fault_queue: Some(queue), ..vtd_nested(device, parent) };
    let table = kernel.alloc_hwpt(&spec).unwrap();
    kernel.attach(device, None, table).unwrap();
    for stream in [pasid(5), None] {
        let request = |group| PageRequest { pasid: stream, group, permissions: 1, address: 0x1000 };
        test.kernel().attach(device, stream, table).unwrap();
        test.request_page(device, request(1));
        let read = page_faults(test, queue, 1);
        test.request_page(device, request(2));
        let kernel = test.kernel();
        kernel.detach(device, stream).unwrap();
        assert_eq!(kernel.read_page_faults(queue), Ok(vec![]), "{stream:?}");
        assert_eq!(kernel.respond(queue, read[0].cookie, ResponseCode::Success), Err(Errno::EINVAL));
        kernel.attach(device, stream, parent).unwrap();
        assert_eq!(kernel.read_page_faults(queue), Ok(vec![]), "{stream:?}");
    }
    let kernel = test.kernel();
    kernel.detach(device, pasid(5)).unwrap();
    kernel.detach(device, None).unwrap();
    destroy(test, &[table, queue, parent, ioas]);
    assert_eq!(test.count(), before);
}

/// One vDEVICE of a device, one ID in a vIOMMU, one event queue of a kind.
pub fn there_is_one_of_a_kind<T: KernelUnderTest>(test: &mut T) {
    let (device, other) = (test.smmuv3_device(), test.smmuv3_device());
    let before = test.count();
    let below = Virtual::new(test, device);
    let kernel = test.kernel();
    assert_eq!(kernel.alloc_vdevice(below.viommu, device, 0x43), Err(Errno::EEXIST));
    assert_eq!(kernel.alloc_vdevice(below.viommu, other, 0x42), Err(Errno::EEXIST));
    let second =
        kernel.alloc_viommu(ViommuKind::Smmuv3, device, below.parent).expect("any number of vIOMMUs");
    assert_eq!(kernel.alloc_vdevice(second, device, 0x43), Err(Errno::EEXIST), "in whatever vIOMMU");
    let vdevice = kernel.alloc_vdevice(second, other, 0x42).expect("IDs are those of a vIOMMU");

    for depth in [0, (1 << 19) + 1] {
        assert_eq!(kernel.alloc_event_queue(below.viommu, ViommuKind::Smmuv3, depth), Err(Errno::EINVAL));
    }
    let queue = kernel.alloc_event_queue(below.viommu, ViommuKind::Smmuv3, 1 << 19).unwrap();
    assert_eq!(kernel.alloc_event_queue(below.viommu, ViommuKind::Smmuv3, 4), Err(Errno::EEXIST));
    destroy(test, &[queue]);
    let queue = kernel.alloc_event_queue(below.viommu, ViommuKind::Smmuv3, 4).expect("the other one is gone");
    assert_eq!(kernel.read_events(queue), Ok(vec![]), "an empty queue does not block");
    // Who has no nest parent has no vIOMMU.
    let plain = kernel.alloc_hwpt(&paging(device, below.ioas, HwptFlags::empty())).unwrap();
    assert_eq!(kernel.alloc_viommu(ViommuKind::Smmuv3, device, plain), Err(Errno::EINVAL));
    destroy(test, &[plain, queue, vdevice, second]);
    below.destroy(test);
    assert_eq!(test.count(), before);
}

/// A table that translates is attached only where commands and events have a name for the device.
pub fn a_translating_table_needs_its_vdevice<T: KernelUnderTest>(test: &mut T) {
    let device = test.smmuv3_device();
    let before = test.count();
    let (ioas, parent) = nest_parent(test, device, HwptFlags::empty());
    let kernel = test.kernel();
    let viommu = kernel.alloc_viommu(ViommuKind::Smmuv3, device, parent).unwrap();
    let nested = kernel.alloc_hwpt(&smmuv3_nested(device, viommu)).expect("it can be made");
    assert_eq!(kernel.attach(device, None, nested), Err(Errno::ENOENT));
    let vdevice = kernel.alloc_vdevice(viommu, device, 0x42).unwrap();
    assert_eq!(kernel.attach(device, None, nested), Ok(()));
    kernel.detach(device, None).unwrap();
    destroy(test, &[nested, vdevice, viommu, parent, ioas]);
    assert_eq!(test.count(), before);
}

/// Events have numbers without a gap; where the queue is full, that is told once, at its end.
pub fn events_are_numbered_and_losses_told<T: KernelUnderTest>(test: &mut T) {
    let device = test.smmuv3_device();
    let before = test.count();
    let below = Virtual::new(test, device);
    let kernel = test.kernel();
    let queue = kernel.alloc_event_queue(below.viommu, ViommuKind::Smmuv3, 3).unwrap();
    let nested = kernel.alloc_hwpt(&smmuv3_nested(device, below.viommu)).unwrap();
    kernel.attach(device, None, nested).unwrap();
    let events = |test: &mut T, count: u32| {
        for _ in 0..count {
            test.send_event(device);
        }
        let mut events = Vec::new();
        loop {
            let some = test.kernel().read_events(queue).unwrap();
            if some.is_empty() {
                return events;
            }
            events.extend(some);
        }
    };
    let seen = |events: &[Event]| -> Vec<(bool, u32)> {
        let seen = |event: &Event| match *event {
            Event::Lost { sequence } => (true, sequence),
            Event::Smmuv3 { sequence, record } => {
                assert_eq!(record[0] >> 32, 0x42, "the vDEVICE's ID");
                (false, sequence)
            }
        };
        events.iter().map(seen).collect()
    };
    assert_eq!(seen(&events(test, 2)), [(false, 0), (false, 1)]);
    let overflow = seen(&events(test, 6));
    assert_eq!(overflow[..3], [(false, 2), (false, 3), (false, 4)], "as many as fit");
    assert_eq!(overflow.len(), 4, "{overflow:?}");
    let (lost, last) = overflow[3];
    assert!(lost && last >= 5, "{overflow:?}");
    assert_eq!(seen(&events(test, 1)), [(false, last + 1)], "lost events have a number as well");
    let kernel = test.kernel();
    kernel.detach(device, None).unwrap();
    destroy(test, &[nested, queue]);
    below.destroy(test);
    assert_eq!(test.count(), before);
}

/// The kernel says how many entries it handled before the one that it refused.
pub fn vtd_invalidation_stops_where_it_fails<T: KernelUnderTest>(test: &mut T) {
    let device = test.vtd_device();
    let before = test.count();
    let (ioas, parent) = nest_parent(test, device, HwptFlags::PASID);
    let kernel = test.kernel();
    let nested = kernel.alloc_hwpt(&vtd_nested(device, parent)).unwrap();
    let good = VtdInvalidation { address: 0x1000, pages: 1, leaf: true };
    let unaligned = VtdInvalidation { address: 0x1001, ..good };
    let overlong = VtdInvalidation { address: 0x1000, pages: u64::MAX, leaf: false };
    assert_eq!(kernel.invalidate(nested, Commands::Vtd(&[])), Ok(()));
    assert_eq!(kernel.invalidate(nested, Commands::Vtd(&[good; 200])), Ok(()));
    for bad in [unaligned, overlong] {
        for place in [0, 1, 100] {
            let mut entries = [good; 200];
            entries[place] = bad;
            let error = kernel.invalidate(nested, Commands::Vtd(&entries)).expect_err("a bad entry");
            assert_eq!((error.done, error.errno), (place as u32, Errno::EINVAL));
        }
    }
    destroy(test, &[nested, parent, ioas]);
    assert_eq!(test.count(), before);
}

/// The same for commands. (What was issued of those handled is the driver's business.)
pub fn smmuv3_invalidation_stops_where_it_fails<T: KernelUnderTest>(test: &mut T) {
    const CFGI_CD_ALL: u64 = 0x06;
    const SYNC: u64 = 0x46;
    let device = test.smmuv3_device();
    let before = test.count();
    let below = Virtual::new(test, device);
    let kernel = test.kernel();
    let good = [CFGI_CD_ALL | 0x42 << 32, 0];
    assert_eq!(kernel.invalidate(below.viommu, Commands::Smmuv3(&[good; 200])), Ok(()));
    for bad in [[CFGI_CD_ALL | 0x43 << 32, 0], [SYNC, 0]] {
        for place in [0, 1, 100] {
            let mut commands = [good; 200];
            commands[place] = bad;
            let error =
                kernel.invalidate(below.viommu, Commands::Smmuv3(&commands)).expect_err("a bad command");
            assert_eq!(error.done, place as u32);
        }
    }
    below.destroy(test);
    assert_eq!(test.count(), before);
}

/// A vDEVICE does not belong to the table that its device is attached to.
pub fn a_vdevice_may_go_before_its_table<T: KernelUnderTest>(test: &mut T) {
    let device = test.smmuv3_device();
    let before = test.count();
    let below = Virtual::new(test, device);
    let kernel = test.kernel();
    let nested = kernel.alloc_hwpt(&smmuv3_nested(device, below.viommu)).unwrap();
    kernel.attach(device, None, nested).unwrap();
    destroy(test, &[below.vdevice]);
    let kernel = test.kernel();
    let good = [0x06 | 0x42 << 32, 0];
    assert!(
        kernel.invalidate(below.viommu, Commands::Smmuv3(&[good])).is_err(),
        "nobody has that name any more"
    );
    kernel.detach(device, None).unwrap();
    destroy(test, &[nested, below.viommu, below.parent, below.ioas]);
    assert_eq!(test.count(), before);
}
