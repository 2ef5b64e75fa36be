//! The kernel, with a memory for what devices are attached to: it cannot be asked.

use std::collections::HashMap;
use std::os::fd::RawFd;
use std::path::Path;
use std::sync::Mutex;

use nix::errno::Errno;
use pgtable_formats::{IovaRange, Pasid};
use viommu_host_iommufd::engine::{self, Engine};
use viommu_host_iommufd::kernel::{
    Commands, DeviceId, Event, HwInfo, HwptSpec, InvalidateError, IoasMapping, Iommufd, IovaRanges, ObjectId,
    PageFault, ResponseCode, ViommuKind,
};
use viommu_host_iommufd::sys::Sys;

/// See the [module](self).
pub(crate) struct Kernel {
    sys: Sys,
    attached: Mutex<HashMap<DeviceId, ObjectId>>,
}

impl Kernel {
    pub(crate) fn open() -> Self {
        Self { sys: Sys::open().unwrap(), attached: Mutex::default() }
    }

    /// Binds the device of this folder. What makes it do DMA can be had once it is attached to something.
    pub(crate) fn take(&self, device: &Path) -> DeviceId {
        let (id, _) = self.sys.bind(device).unwrap();
        id
    }

    pub(crate) fn engine(&self, device: DeviceId) -> Box<dyn Engine> {
        engine::probe(&self.sys.device(device).unwrap()).unwrap()
    }

    /// What untagged accesses of a device go through.
    pub(crate) fn attached(&self, device: DeviceId) -> ObjectId {
        self.attached.lock().unwrap()[&device]
    }
}

impl Iommufd for Kernel {
    fn attach(&self, device: DeviceId, pasid: Option<Pasid>, table: ObjectId) -> Result<(), Errno> {
        self.sys.attach(device, pasid, table)?;
        if pasid.is_none() {
            self.attached.lock().unwrap().insert(device, table);
        }
        Ok(())
    }

    fn destroy(&self, object: ObjectId) -> Result<(), Errno> {
        self.sys.destroy(object)
    }

    fn alloc_ioas(&self) -> Result<ObjectId, Errno> {
        self.sys.alloc_ioas()
    }

    fn iova_ranges(&self, ioas: ObjectId) -> Result<IovaRanges, Errno> {
        self.sys.iova_ranges(ioas)
    }

    fn map(&self, ioas: ObjectId, mapping: &IoasMapping) -> Result<(), Errno> {
        self.sys.map(ioas, mapping)
    }

    fn unmap(&self, ioas: ObjectId, range: IovaRange) -> Result<u64, Errno> {
        self.sys.unmap(ioas, range)
    }

    fn hw_info(&self, device: DeviceId) -> Result<HwInfo, Errno> {
        self.sys.hw_info(device)
    }

    fn alloc_hwpt(&self, spec: &HwptSpec) -> Result<ObjectId, Errno> {
        self.sys.alloc_hwpt(spec)
    }

    fn invalidate(&self, object: ObjectId, commands: Commands<'_>) -> Result<(), InvalidateError> {
        self.sys.invalidate(object, commands)
    }

    fn alloc_viommu(&self, kind: ViommuKind, device: DeviceId, parent: ObjectId) -> Result<ObjectId, Errno> {
        self.sys.alloc_viommu(kind, device, parent)
    }

    fn alloc_vdevice(&self, viommu: ObjectId, device: DeviceId, virtual_id: u64) -> Result<ObjectId, Errno> {
        self.sys.alloc_vdevice(viommu, device, virtual_id)
    }

    fn alloc_event_queue(&self, viommu: ObjectId, kind: ViommuKind, depth: u32) -> Result<ObjectId, Errno> {
        self.sys.alloc_event_queue(viommu, kind, depth)
    }

    fn read_events(&self, queue: ObjectId) -> Result<Vec<Event>, Errno> {
        self.sys.read_events(queue)
    }

    fn alloc_fault_queue(&self) -> Result<ObjectId, Errno> {
        self.sys.alloc_fault_queue()
    }

    fn read_page_faults(&self, queue: ObjectId) -> Result<Vec<PageFault>, Errno> {
        self.sys.read_page_faults(queue)
    }

    fn respond(&self, queue: ObjectId, cookie: u32, code: ResponseCode) -> Result<(), Errno> {
        self.sys.respond(queue, cookie, code)
    }

    fn queue_fd(&self, queue: ObjectId) -> Option<RawFd> {
        self.sys.queue_fd(queue)
    }

    fn detach(&self, device: DeviceId, pasid: Option<Pasid>) -> Result<(), Errno> {
        self.sys.detach(device, pasid)
    }
}
