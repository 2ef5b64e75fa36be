//! Page requests of one endpoint: from the kernel's fault queue to reports, and answers back.
//!
//! Each endpoint has a queue of its own, so that one that floods fills its own alone. What the kernel hands out is a
//! *group* with a *cookie* to answer it by. Cookies are small numbers that the kernel gives anew as soon as a group is
//! answered, by whomever; so this keeps to the kernel's books: what the kernel answers itself is forgotten here
//! ([`PageRequests::forget`]) before the queue is read again, and no cookie is ever used that may be another group's.
//! The device core sees numbers of ours, which come in rotation.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::RawFd;
use std::sync::Arc;

use nix::errno::Errno;
use pgtable_formats::context::smmuv3::Idr0;
use pgtable_formats::context::vtd::Ecap;
use pgtable_formats::{Iova, Pasid};
use viommu_device::host::{Answered, FaultCause, PageRequestReport, Stream};
use viommu_wire::{AccessFlags, EndpointId};

use crate::error::{SetupError, Step, is_absent};
use crate::kernel::{DeviceId, HwKind, Iommufd, PageFault, ResponseCode};
use crate::objects::{Attachment, FaultQueue, Session};
use crate::setup::Device;
use crate::unit::Unit;

/// Groups of page requests of one endpoint that may wait for an answer before no more are read: what comes meanwhile
/// waits in the kernel. One read may go beyond it, by as many as the kernel hands out at once; and so may what is read to
/// end a stream, up to [`MAX_OUTSTANDING_PAGE_REQUESTS`].
pub const MAX_OPEN_GROUPS_PER_ENDPOINT: usize = 1024;

/// Page requests that are read at most to find those of a stream whose table is bound again, or whose PASID is taken
/// back: as many as an SMMUv3 can have stalled. A PCIe function has no more than its 512 groups. Those of the endpoint's
/// other streams that are read with them are kept until they are told and answered, so this bounds the memory that one
/// endpoint takes. Where more than that is queued, the request that had it read fails.
pub const MAX_OUTSTANDING_PAGE_REQUESTS: usize = 1 << 16;

/// PASID_VALID of [`PageFault::flags`].
const PASID_VALID: u32 = 1 << 0;

/// See the [module](self).
pub(crate) struct PageRequests<K: Iommufd> {
    endpoint: EndpointId,
    device: DeviceId,
    queue: Arc<FaultQueue<K>>,
    /// By our number: read, and answered by nobody.
    open: BTreeMap<u16, Open>,
    /// What the device core was not told of, oldest first; of open groups only.
    waiting: VecDeque<PageRequestReport>,
    next_group: u16,
    ignored: u64,
}

/// A group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Open {
    pasid: Option<Pasid>,
    cookie: u32,
}

/// Whether page requests are worth a try: what registers and capabilities say. Linux has no PRI on Arm, where only
/// transactions that stall can wait.
pub(crate) fn may_have(hardware: &HwKind, device: &Device, ats: bool) -> bool {
    match *hardware {
        HwKind::Vtd { ecap, .. } => Ecap::from_bits(ecap).prs() && device.pri && ats,
        HwKind::Smmuv3 { idr: [idr0, ..], .. } => {
            const BOTH: u8 = 0;
            const ALWAYS: u8 = 2;
            device.may_stall && matches!(Idr0::from_bits(idr0).stall_model(), BOTH | ALWAYS)
        }
        HwKind::None | HwKind::Amd { .. } | HwKind::Other(_) => false,
    }
}

/// A queue for the page requests of `device`, if they get there: the kernel says so when a table that has a queue is
/// attached, not before. Tried on a table that leads nowhere; at the end the device is attached to the abort of `unit`,
/// as it was.
pub(crate) fn try_on<K: Iommufd>(
    session: &Arc<Session<K>>,
    unit: &Unit<K>,
    device: DeviceId,
    attachment: &mut Attachment<K>,
) -> Result<Option<Arc<FaultQueue<K>>>, SetupError> {
    let answer = attempt(session, unit, device, attachment);
    attachment.replace(&unit.abort, || ()).map_err(Step::Attach.failed())?;
    match answer {
        Ok(queue) => Ok(Some(queue)),
        // Not switched on in the device; a virtual function, which shares those of its physical one.
        Err(errno) if is_absent(errno) || matches!(errno, Errno::ENODEV | Errno::EINVAL) => {
            tracing::info!(device = device.0, %errno, "no page requests");
            Ok(None)
        }
        Err(errno) => Err(Step::PageRequests.failed()(errno)),
    }
}

fn attempt<K: Iommufd>(
    session: &Arc<Session<K>>,
    unit: &Unit<K>,
    device: DeviceId,
    attachment: &mut Attachment<K>,
) -> Result<Arc<FaultQueue<K>>, Errno> {
    let queue = FaultQueue::new(session)?;
    let table = unit.dead_end(device, &queue)?;
    attachment.replace(&table, || ())?;
    if unit.pasids {
        // Detached again at once.
        Attachment::new(device, Pasid::new(1), &table)?;
    }
    Ok(queue)
}

impl<K: Iommufd> PageRequests<K> {
    pub(crate) const fn new(endpoint: EndpointId, device: DeviceId, queue: Arc<FaultQueue<K>>) -> Self {
        Self {
            endpoint,
            device,
            queue,
            open: BTreeMap::new(),
            waiting: VecDeque::new(),
            next_group: 0,
            ignored: 0,
        }
    }

    /// Where the page requests of the endpoint's tables go.
    pub(crate) const fn queue(&self) -> &Arc<FaultQueue<K>> {
        &self.queue
    }

    pub(crate) fn fd(&self) -> Option<RawFd> {
        self.queue.fd()
    }

    /// Groups that were answered at once because they were of no stream of the endpoint.
    pub(crate) const fn ignored(&self) -> u64 {
        self.ignored
    }

    /// The oldest request that the device core was not told of. `is_stream`: whether page requests with a PASID can be.
    pub(crate) fn next(&mut self, is_stream: impl Fn(Option<Pasid>) -> bool) -> Option<PageRequestReport> {
        let mut seen = 0;
        // Requests that are ignored hide none behind them; nor do they keep us here for ever.
        while self.waiting.is_empty()
            && self.open.len() < MAX_OPEN_GROUPS_PER_ENDPOINT
            && seen < MAX_OPEN_GROUPS_PER_ENDPOINT
        {
            match self.read(&is_stream) {
                Ok(0) => break,
                Ok(count) => seen += count,
                Err(errno) => {
                    tracing::debug!(endpoint = self.endpoint.0, %errno, "fault queue not read");
                    break;
                }
            }
        }
        self.waiting.pop_front()
    }

    /// Answers the group that the device core knows by this number. What fails leaves it as it was.
    pub(crate) fn respond(
        &mut self,
        pasid: Option<Pasid>,
        group: u16,
        code: ResponseCode,
    ) -> Result<Answered, Errno> {
        let Some(&open) = self.open.get(&group).filter(|open| open.pasid == pasid) else {
            return Ok(Answered::Gone);
        };
        let answered = self.answer(open.cookie, code)?;
        self.open.remove(&group);
        self.drop_closed();
        Ok(answered)
    }

    /// The kernel has answered what was asked with selected PASIDs, read or not: their table is not attached any more.
    pub(crate) fn forget(&mut self, selects: impl Fn(Option<Pasid>) -> bool) {
        self.open.retain(|_, open| !selects(open.pasid));
        self.drop_closed();
    }

    /// Answers INVALID what was asked with selected PASIDs until now, read or not. Where that fails, some may be left.
    pub(crate) fn close(
        &mut self,
        selects: impl Fn(Option<Pasid>) -> bool,
        is_stream: impl Fn(Option<Pasid>) -> bool,
    ) -> Result<(), Errno> {
        // All is read before the first of a stream is answered: a device that is refused may ask again, but it cannot ask
        // for more than it has room to wait for. Strangers are answered at once, and may come again: hence the bound.
        let mut seen = 0;
        let mut result = Ok(());
        loop {
            match self.read(&is_stream)? {
                0 => break,
                count => seen += count,
            }
            if seen > MAX_OUTSTANDING_PAGE_REQUESTS {
                result = Err(Errno::EBUSY);
                break;
            }
        }
        let selected = self.open.iter().filter(|(_, open)| selects(open.pasid));
        let selected: Vec<(u16, u32)> = selected.map(|(&group, open)| (group, open.cookie)).collect();
        for (group, cookie) in selected {
            match self.answer(cookie, ResponseCode::Invalid) {
                Ok(_) => drop(self.open.remove(&group)),
                Err(errno) => result = result.and(Err(errno)),
            }
        }
        self.drop_closed();
        result
    }

    /// One read. Answers how many requests came.
    fn read(&mut self, is_stream: &impl Fn(Option<Pasid>) -> bool) -> Result<usize, Errno> {
        let faults = self.queue.read()?;
        // The kernel hands out whole groups, each with a cookie of its own.
        for group in faults.chunk_by(|one, other| one.cookie == other.cookie) {
            self.take_over(group, is_stream);
        }
        Ok(faults.len())
    }

    fn take_over(&mut self, requests: &[PageFault], is_stream: &impl Fn(Option<Pasid>) -> bool) {
        let Some(&PageFault { cookie, device, .. }) = requests.first() else { return };
        let pasid = requests.first().and_then(stream_of);
        let known = pasid.filter(|&pasid| device == self.device && is_stream(pasid));
        let Some((pasid, group)) = known.zip(self.unused_number()) else {
            self.ignored = self.ignored.saturating_add(1);
            if let Err(errno) = self.answer(cookie, ResponseCode::Invalid) {
                tracing::warn!(endpoint = self.endpoint.0, %errno, "a page request of no stream is not answered");
            }
            return;
        };
        self.open.insert(group, Open { pasid, cookie });
        let stream = Stream { endpoint: self.endpoint, pasid };
        let last = requests.len().saturating_sub(1);
        self.waiting.extend(requests.iter().enumerate().map(|(index, request)| PageRequestReport {
            stream,
            address: Iova(request.address),
            access: access_of(request),
            group,
            last: index == last,
            private_data: None,
            // Whether the guest's table silences it is not known here, as of faults that the kernel tells.
            fault: Some(FaultCause::Unmapped),
        }));
    }

    /// What the kernel has no group for was answered by the kernel.
    fn answer(&self, cookie: u32, code: ResponseCode) -> Result<Answered, Errno> {
        match self.queue.respond(cookie, code) {
            Ok(()) => Ok(Answered::Taken),
            Err(Errno::EINVAL) => Ok(Answered::Gone),
            Err(errno) => Err(errno),
        }
    }

    fn drop_closed(&mut self) {
        let Self { open, waiting, .. } = self;
        waiting.retain(|report| open.contains_key(&report.group));
    }

    /// `None` where all are in use.
    fn unused_number(&mut self) -> Option<u16> {
        if self.open.len() > usize::from(u16::MAX) {
            return None;
        }
        while self.open.contains_key(&self.next_group) {
            self.next_group = self.next_group.wrapping_add(1);
        }
        let group = self.next_group;
        self.next_group = group.wrapping_add(1);
        Some(group)
    }
}

/// `None`: a PASID that no device has.
fn stream_of(request: &PageFault) -> Option<Option<Pasid>> {
    match request.flags & PASID_VALID {
        0 => Some(None),
        _ => Pasid::new(request.pasid).map(Some),
    }
}

/// The bits of [`PageFault::permissions`] are READ 0, WRITE 1, EXEC 2, PRIV 3. A request that says nothing reads.
fn access_of(request: &PageFault) -> AccessFlags {
    let flag = |bit: u32, flag: AccessFlags| {
        if request.permissions & 1 << bit != 0 { flag } else { AccessFlags::empty() }
    };
    let access = flag(0, AccessFlags::READ) | flag(1, AccessFlags::WRITE) | flag(2, AccessFlags::EXEC);
    let access = if access.is_empty() { AccessFlags::READ } else { access };
    access | flag(3, AccessFlags::PRIVILEGED)
}
