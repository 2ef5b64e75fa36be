//! Page requests of [`IommufdHost`](viommu_host_iommufd::IommufdHost) through the kernel's own fault queues: real groups,
//! cookies and answers.

use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use viommu_device::host::{Answered, GroupResponse, Host, PageRequestReport, Scope, Stream};
use viommu_host_iommufd::MAX_OPEN_GROUPS_PER_ENDPOINT;
use viommu_host_iommufd::kernel::{Iommufd, ResponseCode};
use viommu_tests::host_suite::HostUnderTest;
use viommu_wire::{AccessFlags, Caches, PageResponseCode};

use super::host::{Space, invalidation, nothing_is_left, stream, vtd_space};
use super::ioctl::{NO_PASID, TestOp};
use super::kernel::Flavour;
use super::mocks::{ENDPOINTS, Mocks};

const ADDRESS: u64 = 0x7fff_1000;

/// The untagged accesses of the first endpoint, and those with two PASIDs, each bound to a table of its own.
struct Bound {
    mocks: Mocks,
    spaces: Vec<Space>,
}

fn streams() -> [Stream; 3] {
    [None, Some(5), Some(6)].map(|pasid| stream(ENDPOINTS[0], pasid))
}

impl Bound {
    fn new() -> Self {
        let mut mocks = Mocks::new(Flavour::Vtd);
        let mut spaces: Vec<Space> = (2..5).map(|page| vtd_space(&mut mocks, page)).collect();
        for (space, stream) in spaces.iter_mut().zip(streams()) {
            mocks.host().bind(stream, Some(space)).unwrap();
        }
        Self { mocks, spaces }
    }

    /// The device sends a request, the only one of its group.
    fn ask(&self, stream: Stream, group: u32, permissions: u32) {
        let device = self.mocks.device(stream.endpoint).0;
        let pasid = stream.pasid.map_or(NO_PASID, |pasid| pasid.value());
        let request = TestOp::PageRequest { device, pasid, group, permissions, address: ADDRESS };
        self.mocks.kernel.test(request).unwrap();
    }

    /// Waits for it: it takes its way through the kernel.
    fn next(&mut self) -> PageRequestReport {
        for _ in 0..200 {
            if let Some(report) = self.mocks.host().next_page_request() {
                return report;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        panic!("no page request came");
    }

    fn none_is_left(&mut self) {
        assert_eq!(self.mocks.host().next_page_request(), None);
    }

    fn answer(&mut self, report: &PageRequestReport, code: PageResponseCode) -> Answered {
        let response = GroupResponse { stream: report.stream, group: report.group, code };
        self.mocks.host().respond(&response).unwrap()
    }

    fn end(self) {
        let Self { mocks, spaces } = self;
        drop(spaces);
        nothing_is_left(mocks);
    }
}

const SUCCESS: PageResponseCode = PageResponseCode::Success;

/// Whose, with what, and in any order; once each.
#[test]
#[ignore = "needs the lab: tests/lab/run"]
fn page_requests_come_and_are_answered() {
    let mut bound = Bound::new();
    let asked = [(streams()[0], 7, 1), (streams()[1], 7, 3), (streams()[1], 8, 0xd), (streams()[2], 7, 2)];
    for (stream, group, permissions) in asked {
        bound.ask(stream, group, permissions);
    }
    let reports = asked.map(|_| bound.next());
    bound.none_is_left();
    let flags = [
        AccessFlags::READ,
        AccessFlags::READ | AccessFlags::WRITE,
        AccessFlags::READ | AccessFlags::EXEC | AccessFlags::PRIVILEGED,
        AccessFlags::WRITE,
    ];
    for ((report, (stream, ..)), flags) in reports.iter().zip(asked).zip(flags) {
        assert_eq!((report.stream, report.address.0), (stream, ADDRESS));
        assert_eq!((report.access, report.last, report.private_data), (flags, true, None));
    }
    let codes = [SUCCESS, PageResponseCode::Failure, PageResponseCode::Invalid, SUCCESS];
    for (index, code) in [2, 0, 3, 1].into_iter().zip(codes) {
        assert_eq!(bound.answer(&reports[index], code), Answered::Taken);
        assert_eq!(bound.answer(&reports[index], code), Answered::Gone);
    }
    bound.end();
}

/// The kernel answers what waited for a table that is replaced or detached, and gives its cookies to others: no late
/// answer meets one of those.
#[test]
#[ignore = "needs the lab: tests/lab/run"]
fn cookies_that_are_gone_meet_nobody() {
    let [untagged, tagged, other] = streams();
    for (gone, replace) in [(tagged, true), (tagged, false), (untagged, true), (untagged, false)] {
        let mut bound = Bound::new();
        bound.ask(gone, 1, 1);
        bound.ask(other, 2, 1);
        let reports = [bound.next(), bound.next()];
        bound.ask(gone, 3, 1);
        bound.ask(other, 4, 1);
        let mut space = vtd_space(&mut bound.mocks, 9);
        bound.mocks.host().bind(gone, replace.then_some(&mut space)).unwrap();
        // The group that is read next has the cookie of the first, which is free.
        let next = bound.next();
        assert_eq!(next.stream, other);
        bound.none_is_left();
        assert_eq!(bound.answer(&reports[0], SUCCESS), Answered::Gone);
        assert_eq!(bound.answer(&next, SUCCESS), Answered::Taken, "it was answered by nobody yet");
        assert_eq!(bound.answer(&reports[1], SUCCESS), Answered::Taken);
        if replace {
            bound.ask(gone, 5, 1);
            let new = bound.next();
            assert_eq!(new.stream, gone);
            assert_eq!(bound.answer(&new, SUCCESS), Answered::Taken);
        }
        bound.spaces.push(space);
        bound.end();
    }
}

/// That the kernel does give cookies anew, and that a cookie of a table that was replaced is `EINVAL`: what the one above
/// rests on.
#[test]
#[ignore = "needs the lab: tests/lab/run"]
fn the_kernel_gives_cookies_anew() {
    use pgtable_formats::Pasid;
    use viommu_host_iommufd::kernel::{HwptData, HwptFlags, HwptSpec};

    let mocks = Mocks::new(Flavour::Vtd);
    let kernel = &mocks.kernel;
    let device = kernel.add_device(Flavour::Vtd);
    let ioas = kernel.alloc_ioas().unwrap();
    let spec = HwptSpec {
        device,
        parent: ioas,
        flags: HwptFlags::NEST_PARENT | HwptFlags::PASID,
        data: HwptData::None,
        fault_queue: None,
    };
    let parent = kernel.alloc_hwpt(&spec).unwrap();
    let queue = kernel.alloc_fault_queue().unwrap();
    let data = HwptData::Vtd { flags: 0, root: 0, address_width: 48 };
    let spec = HwptSpec { parent, flags: HwptFlags::PASID, data, fault_queue: Some(queue), ..spec };
    let [one, two] = [(); 2].map(|()| kernel.alloc_hwpt(&spec).unwrap());
    let pasid = Pasid::new(5);
    kernel.attach(device, None, parent).unwrap();
    kernel.attach(device, pasid, one).unwrap();
    let ask = |group| {
        let (device, address) = (device.0, ADDRESS);
        let request = TestOp::PageRequest { device, pasid: 5, group, permissions: 1, address };
        kernel.test(request).unwrap();
        kernel.read_page_faults(queue).unwrap()[0].cookie
    };
    let first = ask(1);
    // The same table once more is nothing.
    kernel.attach(device, pasid, one).unwrap();
    assert_eq!(kernel.respond(queue, first, ResponseCode::Success), Ok(()));
    let second = ask(2);
    assert_eq!(second, first);
    kernel.attach(device, pasid, two).unwrap();
    assert_eq!(kernel.respond(queue, second, ResponseCode::Success), Err(Errno::EINVAL));
    assert_eq!(ask(3), second);
    assert_eq!(kernel.respond(queue, second, ResponseCode::Invalid), Ok(()), "another group");
    kernel.detach(device, pasid).unwrap();
    kernel.detach(device, None).unwrap();
    for object in [one, two, queue, parent, ioas] {
        kernel.destroy(object).unwrap();
    }
    kernel.remove_device(device);
    nothing_is_left(mocks);
}

/// The same table bound again, and a PASID that is taken back: what waits is answered here.
#[test]
#[ignore = "needs the lab: tests/lab/run"]
fn what_is_taken_back_is_drained() {
    let [_, tagged, other] = streams();
    for rebind in [true, false] {
        let mut bound = Bound::new();
        bound.ask(tagged, 1, 1);
        bound.ask(other, 2, 1);
        let reports = [bound.next(), bound.next()];
        bound.ask(tagged, 3, 1);
        bound.ask(other, 4, 1);
        if rebind {
            let Bound { mocks, spaces } = &mut bound;
            mocks.host().bind(tagged, Some(&mut spaces[1])).unwrap();
        } else {
            let one = invalidation(ENDPOINTS[0], Scope::Pasid(tagged.pasid), Caches::all());
            bound.mocks.host().invalidate(&[one]).unwrap();
        }
        let next = bound.next();
        assert_eq!(next.stream, other);
        bound.none_is_left();
        assert_eq!(bound.answer(&reports[0], SUCCESS), Answered::Gone);
        for report in [next, reports[1]] {
            assert_eq!(bound.answer(&report, SUCCESS), Answered::Taken);
        }
        bound.end();
    }
}

/// Who answers nothing is read no further; the kernel keeps the rest, and gives all of it when there is room.
#[test]
#[ignore = "needs the lab: tests/lab/run"]
fn a_flood_waits_in_the_kernel() {
    const MORE: u32 = 500;
    let mut bound = Bound::new();
    let mut quiet = vtd_space_of(&mut bound.mocks, 1);
    let second = stream(ENDPOINTS[1], None);
    bound.mocks.host().bind(second, Some(&mut quiet)).unwrap();
    let tagged = streams()[1];
    let all = MAX_OPEN_GROUPS_PER_ENDPOINT as u32 + MORE;
    for group in 0..all {
        bound.ask(tagged, group % 512, 1);
    }
    assert_eq!(bound.next().stream, tagged);
    bound.ask(second, 1, 1);
    let turns = [bound.next(), bound.next()];
    assert!(turns.iter().any(|report| report.stream == second), "{turns:?}");
    let mut told = 3;
    let mut last = Vec::new();
    while let Some(report) = bound.mocks.host().next_page_request() {
        told += 1;
        last.push(report);
    }
    assert!((MAX_OPEN_GROUPS_PER_ENDPOINT..all as usize).contains(&told), "{told}");
    assert!(is_readable(&mut bound, 0) && !is_readable(&mut bound, 1));
    // One answered group makes room for a read.
    while let Some(report) = last.pop() {
        assert_eq!(bound.answer(&report, SUCCESS), Answered::Taken);
        while let Some(report) = bound.mocks.host().next_page_request() {
            told += 1;
            last.push(report);
        }
    }
    assert_eq!(told, all as usize + 1);
    // Three are left to the kernel.
    drop(quiet);
    bound.end();
}

fn vtd_space_of(mocks: &mut Mocks, endpoint: usize) -> Space {
    use viommu_device::host::SpaceSpec;
    use viommu_tests::tables::PageTable;

    let table = PageTable::new(&mocks.caps, 7, &mut mocks.memory).canonical().unwrap();
    mocks.host().create(SpaceSpec::GuestTable { endpoint: ENDPOINTS[endpoint], table: &table }).unwrap()
}

/// Whether the file of an endpoint's queue says that there is something.
fn is_readable(bound: &mut Bound, endpoint: usize) -> bool {
    let files = bound.mocks.host().queue_fds();
    assert_eq!(files.len(), 2);
    #[allow(unsafe_code)]
    // SAFETY: the host keeps the queue's file open, and nobody else has `bound` meanwhile.
    let file = unsafe { BorrowedFd::borrow_raw(files[endpoint]) };
    poll(&mut [PollFd::new(file, PollFlags::POLLIN)], 0u8).unwrap() == 1
}

/// The endpoint goes with requests read, unread and answered: the kernel ends them, and nothing is left.
#[test]
#[ignore = "needs the lab: tests/lab/run"]
fn an_endpoint_goes_with_its_page_requests() {
    let mut bound = Bound::new();
    for (group, stream) in (1..).zip(streams()) {
        bound.ask(stream, group, 1);
    }
    let report = bound.next();
    let device = bound.mocks.devices[0];
    bound.ask(streams()[2], 9, 1);
    bound.mocks.host().remove_endpoint(ENDPOINTS[0]).unwrap();
    bound.none_is_left();
    assert_eq!(bound.answer(&report, SUCCESS), Answered::Gone);
    assert_eq!(bound.mocks.host().queue_fds().len(), 1);
    let again = viommu_host_iommufd::Device { ats: true, pri: true, ..super::mocks::plain(device) };
    bound.mocks.host().add_endpoint(ENDPOINTS[0], again).unwrap();
    bound.end();
}

/// What this kernel does where kernels differ: it answers when a table without a queue replaces one that has it, and a read
/// without room for the first group is an error. The host relies on neither.
#[test]
#[ignore = "needs the lab: tests/lab/run"]
fn this_kernel_answers_whatever_replaces() {
    use std::io::Read;
    use std::os::fd::AsFd;

    use pgtable_formats::Pasid;
    use viommu_host_iommufd::kernel::{HwptData, HwptFlags, HwptSpec};

    let mocks = Mocks::new(Flavour::Vtd);
    let kernel = &mocks.kernel;
    let device = kernel.add_device(Flavour::Vtd);
    let ioas = kernel.alloc_ioas().unwrap();
    let spec = HwptSpec {
        device,
        parent: ioas,
        flags: HwptFlags::NEST_PARENT | HwptFlags::PASID,
        data: HwptData::None,
        fault_queue: None,
    };
    let parent = kernel.alloc_hwpt(&spec).unwrap();
    let queue = kernel.alloc_fault_queue().unwrap();
    let data = HwptData::Vtd { flags: 0, root: 0, address_width: 48 };
    let spec = HwptSpec { parent, flags: HwptFlags::PASID, data, fault_queue: Some(queue), ..spec };
    let table = kernel.alloc_hwpt(&spec).unwrap();
    #[allow(unsafe_code)]
    // SAFETY: the kernel's end keeps the queue's file open until it is destroyed below.
    let file = unsafe { BorrowedFd::borrow_raw(kernel.queue_fd(queue).unwrap()) };
    let mut file = std::fs::File::from(file.try_clone_to_owned().unwrap());
    let is_readable =
        |file: &std::fs::File| poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLIN)], 0u8).unwrap() == 1;
    kernel.attach(device, None, parent).unwrap();
    for pasid in [None, Pasid::new(5)] {
        kernel.attach(device, pasid, table).unwrap();
        let ask = |group| {
            let (device, address) = (device.0, ADDRESS);
            let pasid = pasid.map_or(NO_PASID, Pasid::value);
            kernel.test(TestOp::PageRequest { device, pasid, group, permissions: 1, address }).unwrap();
        };
        assert!(!is_readable(&file));
        assert_eq!(file.read(&mut []).unwrap(), 0, "an empty queue");
        ask(1);
        let no_room = file.read(&mut []).map_err(|error| error.raw_os_error());
        assert_eq!(no_room, Err(Some(Errno::EINVAL as i32)));
        assert!(is_readable(&file), "it is still there");
        let cookie = kernel.read_page_faults(queue).unwrap()[0].cookie;
        ask(2);
        kernel.attach(device, pasid, parent).unwrap();
        // Not read before this is known: other kernels would read freed memory.
        let answered = kernel.respond(queue, cookie, ResponseCode::Success);
        assert_eq!((answered, is_readable(&file)), (Err(Errno::EINVAL), false), "{pasid:?}");
    }
    drop(file);
    kernel.detach(device, Pasid::new(5)).unwrap();
    kernel.detach(device, None).unwrap();
    for object in [table, queue, parent, ioas] {
        kernel.destroy(object).unwrap();
    }
    kernel.remove_device(device);
    nothing_is_left(mocks);
}
