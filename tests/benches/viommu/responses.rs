//! Page requests where many are open: an answer, and what it costs to tell the device the time.

use std::collections::VecDeque;
use std::hint::black_box;
use std::time::Duration;

use pgtable_formats::{Access, Iova, Pasid};
use viommu_device::host::{EndpointCaps, Stream, TableCaps};
use viommu_device::soft::{AccessError, SoftHost};
use viommu_device::{Device, DeviceConfig, Limits};
use viommu_queue::GuestTables;
use viommu_tests::rig::{self, Alloc, Memory, request};
use viommu_tests::tables::PageTable;
use viommu_wire::{EndpointId, Event, PageRequest, PageResponse, PageResponseCode, Request};

use crate::measure::{Stopwatch, Suite};
use crate::walks;

const ENDPOINTS: u32 = 64;
/// Open groups of each endpoint: few, and as many as it may have.
const GROUPS: [u64; 2] = [1, 256];
const PASID: u32 = 1;

/// PAGE_RESP for the oldest group of each endpoint: decoded, given to the host, answered.
pub(crate) fn answers(suite: &mut Suite) {
    for (name, caps) in walks::architectures() {
        for groups in GROUPS {
            let mut world = World::new(&caps, groups);
            let open = (groups * u64::from(ENDPOINTS)).to_string();
            let keys = [("format", name), ("open", open.as_str())];
            suite.run("page-response", &keys, u64::from(ENDPOINTS), || world.answer_each());
            assert_eq!(world.device.page_request_counts().groups as u64, groups * u64::from(ENDPOINTS));
        }
    }
}

/// Telling the time while nothing is due: again, and after an endpoint asked for one more page.
pub(crate) fn time(suite: &mut Suite) {
    const CALLS: u64 = 64;
    for groups in GROUPS {
        let mut world = World::new(&rig::vtd(), groups);
        let (mut now, stopwatch) = (0, world.stopwatch);
        let open = (groups * u64::from(ENDPOINTS)).to_string();
        suite.run("set-time", &[("open", &open), ("new", "0")], CALLS, || {
            let tell = |_| {
                now += 1;
                world.device.set_time(black_box(now));
            };
            stopwatch.time(|| (0..CALLS).for_each(tell)).0
        });
        suite.run("set-time", &[("open", &open), ("new", "1")], 1, || {
            world.replace(0);
            now += 1;
            stopwatch.time(|| world.device.set_time(black_box(now))).0
        });
    }
}

struct World {
    device: Device<SoftHost<GuestTables>>,
    /// What each endpoint waits for, oldest first.
    open: Vec<VecDeque<PageRequest>>,
    stopwatch: Stopwatch,
}

impl World {
    /// Endpoints that wait for `groups` pages each.
    fn new(caps: &TableCaps, groups: u64) -> Self {
        let memory = Memory::new(1 << 20);
        let table = PageTable::new(caps, 1, &mut Alloc::new(&memory));
        let mut host = SoftHost::new(memory.tables().clone());
        for endpoint in 0..ENDPOINTS {
            let caps =
                EndpointCaps { tables: Some(caps.clone()), page_requests: true, ..EndpointCaps::default() };
            host.add_endpoint(EndpointId(endpoint), caps).expect("an endpoint");
        }
        let limits = Limits { max_page_requests: 1 << 14, ..Limits::DEFAULT };
        let config = DeviceConfig { limits, page_request_timeout_ns: 1 << 60, ..DeviceConfig::default() };
        let mut device = Device::new(config, host).expect("a configuration");
        device.accept_features(device.offered_features()).expect("what is offered");
        let open = vec![VecDeque::new(); ENDPOINTS as usize];
        let mut world = Self { device, open, stopwatch: Stopwatch::new() };
        let descriptor = table.descriptor(PASID).expect("a way to bind it");
        for endpoint in 0..ENDPOINTS {
            world.send(&request::attach_table(1 + endpoint, endpoint, descriptor).encode());
            (0..groups).for_each(|page| world.ask(endpoint, Iova(page << 12)));
        }
        world
    }

    /// One group of each endpoint; then each asks anew.
    fn answer_each(&mut self) -> Duration {
        let oldest: Vec<PageRequest> = self.open.iter_mut().filter_map(VecDeque::pop_front).collect();
        let answers: Vec<_> = oldest.iter().map(answer).collect();
        let (stopwatch, device) = (self.stopwatch, &mut self.device);
        let mut refused = 0;
        let (time, ()) = stopwatch.time(|| {
            for answer in &answers {
                let handled = device.handle(black_box(answer), &mut [0; 4]);
                refused += usize::from(handled.rejection.is_some());
            }
        });
        assert_eq!(refused, 0);
        oldest.iter().for_each(|request| self.ask(request.endpoint.0, request.address));
        time
    }

    /// The oldest group of an endpoint makes room for another.
    fn replace(&mut self, endpoint: u32) {
        let oldest = self.open[endpoint as usize].pop_front().expect("an open group");
        self.send(&answer(&oldest));
        self.ask(endpoint, oldest.address);
    }

    /// An access that has to wait, and the event that tells the guest.
    fn ask(&mut self, endpoint: u32, iova: Iova) {
        let stream = Stream { endpoint: EndpointId(endpoint), pasid: Pasid::new(PASID) };
        let access = self.device.host_mut().access(stream, iova, Access::WRITE, |_| ());
        assert!(matches!(access, Err(AccessError::Waits(_))), "{access:?}");
        match self.device.next_event() {
            Some(Event::PageRequest(request)) => self.open[endpoint as usize].push_back(request),
            other => panic!("{other:?}"),
        }
    }

    fn send(&mut self, request: &[u8]) {
        assert_eq!(self.device.handle(request, &mut [0; 4]).rejection, None);
    }
}

fn answer(request: &PageRequest) -> impl std::ops::Deref<Target = [u8]> + use<> {
    let &PageRequest { endpoint, pasid, group_id, .. } = request;
    let code = PageResponseCode::Success;
    Request::PageResponse(PageResponse { endpoint, pasid, group_id, code }).encode()
}
