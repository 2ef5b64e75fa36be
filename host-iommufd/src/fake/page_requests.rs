//! Page requests: from a device to the queue of the table it is attached to, in whole groups.

use std::collections::{BTreeMap, VecDeque};

use nix::errno::Errno;

use super::FakeIommufd;
use super::events::Bell;
use super::graph::{HwptKind, Object, State};
use super::memory::Memory;
use crate::kernel::{DeviceId, ObjectId, PageFault, ResponseCode};

/// PASID_VALID of a page request.
const PASID_VALID: u32 = 1;
/// LAST_PAGE of a page request.
const LAST_PAGE: u32 = 2;

/// A fault queue.
#[derive(Debug)]
pub(super) struct FaultQueue {
    /// Not read yet.
    deliver: VecDeque<Group>,
    /// Read and not answered yet, by cookie.
    waiting: BTreeMap<u32, Group>,
    next_cookie: u32,
    pub(super) bell: Bell,
}

/// A group of page requests.
#[derive(Debug)]
struct Group {
    /// The attachment whose table has the queue.
    route: (DeviceId, Option<u32>),
    number: u32,
    requests: VecDeque<PageFault>,
}

impl FaultQueue {
    pub(super) fn new() -> Result<Self, Errno> {
        let (deliver, waiting) = (VecDeque::new(), BTreeMap::new());
        Ok(Self { deliver, waiting, next_cookie: 1, bell: Bell::new()? })
    }

    pub(super) fn read(&mut self) -> Vec<PageFault> {
        let mut read = Vec::new();
        while let Some(group) = self.deliver.pop_front() {
            let cookie = self.next_cookie;
            self.next_cookie += 1;
            read.extend(group.requests.iter().map(|request| PageFault { cookie, ..*request }));
            self.waiting.insert(cookie, group);
        }
        self.bell.set(false);
        read
    }

    /// The device and the number of the group.
    pub(super) fn respond(&mut self, cookie: u32) -> Result<(DeviceId, u32), Errno> {
        let group = self.waiting.remove(&cookie).ok_or(Errno::EINVAL)?;
        Ok((group.route.0, group.number))
    }

    /// Groups that are not answered, with their devices.
    pub(super) fn open_groups(&self) -> impl Iterator<Item = (DeviceId, u32)> {
        self.deliver.iter().chain(self.waiting.values()).map(|group| (group.route.0, group.number))
    }

    fn take(&mut self, route: (DeviceId, Option<u32>)) -> Vec<u32> {
        let gone = self.deliver.iter().chain(self.waiting.values()).filter(|group| group.route == route);
        let numbers = gone.map(|group| group.number).collect();
        self.deliver.retain(|group| group.route != route);
        self.waiting.retain(|_, group| group.route != route);
        numbers
    }
}

impl State {
    /// Finds the queue as the kernel does: that of the PASID, else on Arm that of the nested table of the stream.
    fn route(&self, device: DeviceId, pasid: Option<u32>) -> Option<((DeviceId, Option<u32>), ObjectId)> {
        let with_queue = |pasid: Option<u32>, any: bool| {
            let hwpt = self.hwpt(self.attachments.get(&(device, pasid))?.table).ok()?;
            let serves = any || matches!(hwpt.kind, HwptKind::Smmuv3 { .. });
            hwpt.fault_queue.filter(|_| serves).map(|queue| ((device, pasid), queue))
        };
        if self.attachments.contains_key(&(device, pasid)) {
            return with_queue(pasid, true);
        }
        with_queue(None, false)
    }

    /// `false` where the kernel answered INVALID at once.
    pub(super) fn request_page(&mut self, fault: PageFault) -> bool {
        let pasid = (fault.flags & PASID_VALID != 0).then_some(fault.pasid);
        let key = (fault.device, pasid, fault.group);
        self.partial.entry(key).or_default().push_back(fault);
        if fault.flags & LAST_PAGE == 0 {
            return true;
        }
        let requests = self.partial.remove(&key).unwrap_or_default();
        if let Some((route, queue)) = self.route(fault.device, pasid)
            && let Some(Object::FaultQueue(queue)) = self.objects.get_mut(&queue)
        {
            queue.deliver.push_back(Group { route, number: fault.group, requests });
            queue.bell.set(true);
            return true;
        }
        self.page_responses.push((fault.device, fault.group, None));
        false
    }

    /// What is attached goes: the kernel answers what nobody has answered.
    pub(super) fn abandon_page_requests(&mut self, device: DeviceId, pasid: Option<u32>) {
        for object in self.objects.values_mut() {
            if let Object::FaultQueue(queue) = object {
                let numbers = queue.take((device, pasid));
                self.page_responses.extend(numbers.into_iter().map(|number| (device, number, None)));
            }
        }
    }
}

impl<M: Memory> FakeIommufd<M> {
    /// A device asks for a page (PCIe PRI); the last of its group closes it. `false`: the kernel answered INVALID by
    /// itself, because nothing with a fault queue is attached there.
    pub fn page_request(
        &self,
        device: DeviceId,
        pasid: Option<u32>,
        group: u32,
        address: u64,
        permissions: u32,
        last: bool,
    ) -> bool {
        let flags = if pasid.is_some() { PASID_VALID } else { 0 } | if last { LAST_PAGE } else { 0 };
        let pasid = pasid.unwrap_or(0);
        self.state().request_page(PageFault { flags, device, pasid, group, permissions, address, cookie: 0 })
    }

    pub(super) fn answer(&self, queue: ObjectId, cookie: u32, code: ResponseCode) -> Result<(), Errno> {
        let mut state = self.state();
        let Some(Object::FaultQueue(queue)) = state.objects.get_mut(&queue) else {
            return Err(Errno::ENOENT);
        };
        let (device, group) = queue.respond(cookie)?;
        state.page_responses.push((device, group, Some(code)));
        Ok(())
    }
}
