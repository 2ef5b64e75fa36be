//! Counting: how many ioctls it takes.

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use pgtable_formats::{IovaRange, Pasid};

use crate::kernel::{
    Commands, DeviceId, Event, HwInfo, HwptSpec, InvalidateError, IoasMapping, Iommufd, IovaRanges, ObjectId,
    PageFault, ResponseCode, ViommuKind,
};

/// A call of [`Iommufd`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "each is the method of that name")]
pub enum Call {
    Destroy,
    AllocIoas,
    IovaRanges,
    Map,
    Unmap,
    HwInfo,
    AllocHwpt,
    Invalidate,
    AllocViommu,
    AllocVdevice,
    AllocEventQueue,
    ReadEvents,
    AllocFaultQueue,
    ReadPageFaults,
    Respond,
    Attach,
    Detach,
}

impl Call {
    /// What the kernel calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Destroy => "DESTROY",
            Self::AllocIoas => "IOAS_ALLOC",
            Self::IovaRanges => "IOAS_IOVA_RANGES",
            Self::Map => "IOAS_MAP",
            Self::Unmap => "IOAS_UNMAP",
            Self::HwInfo => "GET_HW_INFO",
            Self::AllocHwpt => "HWPT_ALLOC",
            Self::Invalidate => "HWPT_INVALIDATE",
            Self::AllocViommu => "VIOMMU_ALLOC",
            Self::AllocVdevice => "VDEVICE_ALLOC",
            Self::AllocEventQueue => "VEVENTQ_ALLOC",
            Self::ReadEvents => "read of a vEVENTQ",
            Self::AllocFaultQueue => "FAULT_QUEUE_ALLOC",
            Self::ReadPageFaults => "read of a fault queue",
            Self::Respond => "write to a fault queue",
            Self::Attach => "VFIO attach",
            Self::Detach => "VFIO detach",
        }
    }

    /// Whether it is an ioctl: all but reading and answering.
    pub const fn is_ioctl(self) -> bool {
        !matches!(self, Self::ReadEvents | Self::ReadPageFaults | Self::Respond)
    }
}

/// How often each call was made, whether or not it succeeded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts(BTreeMap<Call, u64>);

impl Counts {
    /// How often this one was.
    pub fn of(&self, call: Call) -> u64 {
        self.0.get(&call).copied().unwrap_or(0)
    }

    /// All ioctls together.
    pub fn ioctls(&self) -> u64 {
        self.iter().filter(|(call, _)| call.is_ioctl()).map(|(_, count)| count).sum()
    }

    /// Those that were made at all.
    pub fn iter(&self) -> impl Iterator<Item = (Call, u64)> {
        self.0.iter().map(|(&call, &count)| (call, count))
    }
}

/// Counts what it passes on.
#[derive(Debug)]
pub struct Counted<K> {
    kernel: K,
    counts: Mutex<Counts>,
}

impl<K> Counted<K> {
    /// With nothing counted yet.
    pub fn new(kernel: K) -> Self {
        Self { kernel, counts: Mutex::default() }
    }

    /// Whom calls are passed on to.
    pub const fn inner(&self) -> &K {
        &self.kernel
    }

    /// What was counted.
    pub fn counts(&self) -> Counts {
        self.lock().clone()
    }

    /// The same, and counts from 0 again.
    pub fn take(&self) -> Counts {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, call: Call) -> &K {
        *self.lock().0.entry(call).or_default() += 1;
        &self.kernel
    }
}

impl<K: Iommufd> Iommufd for Counted<K> {
    fn destroy(&self, object: ObjectId) -> Result<(), Errno> {
        self.count(Call::Destroy).destroy(object)
    }

    fn alloc_ioas(&self) -> Result<ObjectId, Errno> {
        self.count(Call::AllocIoas).alloc_ioas()
    }

    fn iova_ranges(&self, ioas: ObjectId) -> Result<IovaRanges, Errno> {
        self.count(Call::IovaRanges).iova_ranges(ioas)
    }

    fn map(&self, ioas: ObjectId, mapping: &IoasMapping) -> Result<(), Errno> {
        self.count(Call::Map).map(ioas, mapping)
    }

    fn unmap(&self, ioas: ObjectId, range: IovaRange) -> Result<u64, Errno> {
        self.count(Call::Unmap).unmap(ioas, range)
    }

    fn hw_info(&self, device: DeviceId) -> Result<HwInfo, Errno> {
        self.count(Call::HwInfo).hw_info(device)
    }

    fn alloc_hwpt(&self, spec: &HwptSpec) -> Result<ObjectId, Errno> {
        self.count(Call::AllocHwpt).alloc_hwpt(spec)
    }

    fn invalidate(&self, object: ObjectId, commands: Commands<'_>) -> Result<(), InvalidateError> {
        self.count(Call::Invalidate).invalidate(object, commands)
    }

    fn alloc_viommu(&self, kind: ViommuKind, device: DeviceId, parent: ObjectId) -> Result<ObjectId, Errno> {
        self.count(Call::AllocViommu).alloc_viommu(kind, device, parent)
    }

    fn alloc_vdevice(&self, viommu: ObjectId, device: DeviceId, virtual_id: u64) -> Result<ObjectId, Errno> {
        self.count(Call::AllocVdevice).alloc_vdevice(viommu, device, virtual_id)
    }

    fn alloc_event_queue(&self, viommu: ObjectId, kind: ViommuKind, depth: u32) -> Result<ObjectId, Errno> {
        self.count(Call::AllocEventQueue).alloc_event_queue(viommu, kind, depth)
    }

    fn read_events(&self, queue: ObjectId) -> Result<Vec<Event>, Errno> {
        self.count(Call::ReadEvents).read_events(queue)
    }

    fn alloc_fault_queue(&self) -> Result<ObjectId, Errno> {
        self.count(Call::AllocFaultQueue).alloc_fault_queue()
    }

    fn read_page_faults(&self, queue: ObjectId) -> Result<Vec<PageFault>, Errno> {
        self.count(Call::ReadPageFaults).read_page_faults(queue)
    }

    fn respond(&self, queue: ObjectId, cookie: u32, code: ResponseCode) -> Result<(), Errno> {
        self.count(Call::Respond).respond(queue, cookie, code)
    }

    fn queue_fd(&self, queue: ObjectId) -> Option<RawFd> {
        self.kernel.queue_fd(queue)
    }

    fn attach(&self, device: DeviceId, pasid: Option<Pasid>, table: ObjectId) -> Result<(), Errno> {
        self.count(Call::Attach).attach(device, pasid, table)
    }

    fn detach(&self, device: DeviceId, pasid: Option<Pasid>) -> Result<(), Errno> {
        self.count(Call::Detach).detach(device, pasid)
    }
}
