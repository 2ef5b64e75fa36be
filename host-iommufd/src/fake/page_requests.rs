//! Page requests: from a device to the queue of the table it is attached to, in whole groups; and accesses that wait for
//! the answer.

use std::collections::{BTreeMap, VecDeque};

use nix::errno::Errno;

use super::FakeIommufd;
use super::dma::DmaFault;
use super::events::Bell;
use super::graph::{HwptKind, Object, State};
use super::memory::Memory;
use crate::kernel::{DeviceId, ObjectId, PageFault, ResponseCode};

/// PASID_VALID of a page request.
const PASID_VALID: u32 = 1;
/// LAST_PAGE of a page request.
const LAST_PAGE: u32 = 2;
/// Records that one read hands out, unless a single group has more.
const READ: usize = 128;
/// What groups of accesses are numbered from, up to the last of PCIe: below are those of
/// [`FakeIommufd::page_request`].
const GROUPS: std::ops::RangeInclusive<u32> = 0x100..=0x1ff;

/// What page requests go through: the attachment of a PASID, or that of untagged accesses.
type Route = (DeviceId, Option<u32>);

/// A fault queue.
#[derive(Debug)]
pub(super) struct FaultQueue {
    /// Not read yet.
    deliver: VecDeque<Group>,
    /// Read and not answered yet, by cookie.
    waiting: BTreeMap<u32, Group>,
    pub(super) bell: Bell,
}

/// A group of page requests.
#[derive(Debug)]
pub(super) struct Group {
    /// `None` once what it came through is gone, and the kernel has missed to answer.
    route: Option<Route>,
    requests: VecDeque<PageFault>,
}

/// An access, as far as it matters to which page it asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Wanted {
    pub(super) device: DeviceId,
    pub(super) pasid: Option<u32>,
    pub(super) page: u64,
    /// As [`PageFault::permissions`].
    pub(super) permissions: u32,
}

/// An access that waits, or whose answer it has not seen yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wait {
    group: u32,
    /// Why it will fail if it does.
    fault: DmaFault,
    answer: Option<ResponseCode>,
}

impl FaultQueue {
    pub(super) fn new() -> Result<Self, Errno> {
        Ok(Self { deliver: VecDeque::new(), waiting: BTreeMap::new(), bell: Bell::new()? })
    }

    /// Also answers how many groups the kernel read through memory that it had freed.
    fn read(&mut self) -> (Vec<PageFault>, usize) {
        let mut read = Vec::new();
        let mut stray = 0;
        while let Some(group) = self.deliver.pop_front() {
            if !read.is_empty() && read.len() + group.requests.len() > READ {
                self.deliver.push_front(group);
                break;
            }
            stray += usize::from(group.route.is_none());
            let cookie = self.free_cookie();
            read.extend(group.requests.iter().map(|request| PageFault { cookie, ..*request }));
            self.waiting.insert(cookie, group);
        }
        self.bell.set(!self.deliver.is_empty());
        (read, stray)
    }

    /// The lowest: an answered group's cookie is soon another's.
    fn free_cookie(&self) -> u32 {
        let used = self.waiting.keys();
        used.zip(1..).find(|&(&cookie, free)| cookie != free).map_or_else(
            || u32::try_from(self.waiting.len()).unwrap_or(u32::MAX).saturating_add(1),
            |(_, free)| free,
        )
    }

    /// Groups that are not answered.
    pub(super) fn into_open(self) -> impl Iterator<Item = Group> {
        self.deliver.into_iter().chain(self.waiting.into_values())
    }

    fn take(&mut self, route: Route) -> VecDeque<Group> {
        let (mut gone, deliver): (VecDeque<_>, VecDeque<_>) =
            std::mem::take(&mut self.deliver).into_iter().partition(|group| group.route == Some(route));
        self.deliver = deliver;
        self.bell.set(!self.deliver.is_empty());
        let read = self.waiting.extract_if(.., |_, group| group.route == Some(route));
        gone.extend(read.map(|(_, group)| group));
        gone
    }

    fn strand(&mut self, route: Route) {
        for group in self.deliver.iter_mut().chain(self.waiting.values_mut()) {
            group.route.take_if(|of| *of == route);
        }
    }
}

impl State {
    /// Finds the queue as the kernel does: that of the PASID, else on Arm that of the nested table of the stream.
    fn route(&self, device: DeviceId, pasid: Option<u32>) -> Option<(Route, ObjectId)> {
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
    fn request_page(&mut self, fault: PageFault) -> bool {
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
            queue.deliver.push_back(Group { route: Some(route), requests });
            queue.bell.set(true);
            return true;
        }
        self.page_responses.push((fault.device, fault.group, None));
        false
    }

    /// An access that no table permits, and that may wait: `Err` says what becomes of it now. `Ok` where nobody would be
    /// asked.
    pub(super) fn wait_for_page(&mut self, wanted: Wanted, fault: DmaFault) -> Result<(), DmaFault> {
        if self.route(wanted.device, wanted.pasid).is_none() {
            return Ok(());
        }
        let used = |group| {
            self.waits
                .iter()
                .any(|(of, wait)| of.device == wanted.device && wait.group == group && wait.answer.is_none())
        };
        let mut numbers = (self.last_group + 1..=*GROUPS.end()).chain(GROUPS);
        let Some(group) = numbers.find(|&group| GROUPS.contains(&group) && !used(group)) else {
            return Ok(());
        };
        self.last_group = group;
        self.waits.insert(wanted, Wait { group, fault, answer: None });
        let Wanted { device, pasid, page, permissions } = wanted;
        let flags = LAST_PAGE | if pasid.is_some() { PASID_VALID } else { 0 };
        let pasid = pasid.unwrap_or(0);
        self.request_page(PageFault { flags, device, pasid, group, permissions, address: page, cookie: 0 });
        Err(DmaFault::Stalled)
    }

    /// Whether an access goes on, as far as page requests are concerned.
    pub(super) fn waited(&mut self, wanted: Wanted) -> Result<(), DmaFault> {
        match self.waits.get(&wanted).copied() {
            None => Ok(()),
            Some(Wait { answer: None, .. }) => Err(DmaFault::Stalled),
            Some(Wait { answer: Some(answer), fault, .. }) => {
                self.waits.remove(&wanted);
                match answer {
                    ResponseCode::Success => Ok(()),
                    ResponseCode::Invalid => Err(fault),
                }
            }
        }
    }

    /// What is attached goes: the kernel answers what nobody has answered, in this queue. What is in any other stays there.
    pub(super) fn abandon_page_requests(
        &mut self,
        device: DeviceId,
        pasid: Option<u32>,
        queue: Option<ObjectId>,
    ) {
        let route = (device, pasid);
        let mut answered = VecDeque::new();
        for (id, object) in &mut self.objects {
            match object {
                Object::FaultQueue(found) if Some(*id) == queue => answered = found.take(route),
                Object::FaultQueue(other) => other.strand(route),
                _ => {}
            }
        }
        for group in answered {
            self.answered(&group, None);
        }
    }

    /// `None`: by the kernel itself, which says INVALID.
    pub(super) fn answered(&mut self, group: &Group, code: Option<ResponseCode>) {
        let Some(&PageFault { device, pasid, group, flags, .. }) = group.requests.front() else { return };
        let pasid = (flags & PASID_VALID != 0).then_some(pasid);
        self.page_responses.push((device, group, code));
        for (wanted, wait) in &mut self.waits {
            if (wanted.device, wanted.pasid, wait.group) == (device, pasid, group) && wait.answer.is_none() {
                wait.answer = Some(code.unwrap_or(ResponseCode::Invalid));
            }
        }
    }
}

impl<M: Memory> FakeIommufd<M> {
    /// A device asks for a page (PCIe PRI); the last of its group closes it. `false`: the kernel answered INVALID by
    /// itself, because nothing with a fault queue is attached there. Groups have numbers below 256: those from there on
    /// are of accesses ([`dma`](Self::dma)).
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

    pub(super) fn read_queue(&self, queue: ObjectId) -> Result<Vec<PageFault>, Errno> {
        let mut state = self.state();
        let Some(Object::FaultQueue(found)) = state.objects.get_mut(&queue) else {
            return Err(Errno::ENOENT);
        };
        let (read, stray) = found.read();
        if stray != 0 {
            state
                .violations
                .push(format!("{stray} groups read of what was replaced before they were answered"));
        }
        Ok(read)
    }

    pub(super) fn answer(&self, queue: ObjectId, cookie: u32, code: ResponseCode) -> Result<(), Errno> {
        let mut state = self.state();
        let Some(Object::FaultQueue(queue)) = state.objects.get_mut(&queue) else {
            return Err(Errno::ENOENT);
        };
        let group = queue.waiting.remove(&cookie).ok_or(Errno::EINVAL)?;
        state.answered(&group, Some(code));
        Ok(())
    }
}
