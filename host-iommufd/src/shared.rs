//! [`Iommufd`] through pointers: several users of one kernel.

use std::os::fd::RawFd;
use std::sync::Arc;

use nix::errno::Errno;
use pgtable_formats::{IovaRange, Pasid};

use crate::kernel::{
    Commands, DeviceId, Event, HwInfo, HwptSpec, InvalidateError, IoasMapping, Iommufd, IovaRanges, ObjectId,
    PageFault, ResponseCode, ViommuKind,
};

macro_rules! through {
    ($($pointer:ty),*) => {$(
        impl<K: Iommufd + ?Sized> Iommufd for $pointer {
            fn destroy(&self, object: ObjectId) -> Result<(), Errno> {
                (**self).destroy(object)
            }

            fn alloc_ioas(&self) -> Result<ObjectId, Errno> {
                (**self).alloc_ioas()
            }

            fn iova_ranges(&self, ioas: ObjectId) -> Result<IovaRanges, Errno> {
                (**self).iova_ranges(ioas)
            }

            fn map(&self, ioas: ObjectId, mapping: &IoasMapping) -> Result<(), Errno> {
                (**self).map(ioas, mapping)
            }

            fn unmap(&self, ioas: ObjectId, range: IovaRange) -> Result<u64, Errno> {
                (**self).unmap(ioas, range)
            }

            fn hw_info(&self, device: DeviceId) -> Result<HwInfo, Errno> {
                (**self).hw_info(device)
            }

            fn alloc_hwpt(&self, spec: &HwptSpec) -> Result<ObjectId, Errno> {
                (**self).alloc_hwpt(spec)
            }

            fn invalidate(&self, object: ObjectId, commands: Commands<'_>) -> Result<(), InvalidateError> {
                (**self).invalidate(object, commands)
            }

            fn alloc_viommu(
                &self,
                kind: ViommuKind,
                device: DeviceId,
                parent: ObjectId,
            ) -> Result<ObjectId, Errno> {
                (**self).alloc_viommu(kind, device, parent)
            }

            fn alloc_vdevice(
                &self,
                viommu: ObjectId,
                device: DeviceId,
                virtual_id: u64,
            ) -> Result<ObjectId, Errno> {
                (**self).alloc_vdevice(viommu, device, virtual_id)
            }

            fn alloc_event_queue(
                &self,
                viommu: ObjectId,
                kind: ViommuKind,
                depth: u32,
            ) -> Result<ObjectId, Errno> {
                (**self).alloc_event_queue(viommu, kind, depth)
            }

            fn read_events(&self, queue: ObjectId) -> Result<Vec<Event>, Errno> {
                (**self).read_events(queue)
            }

            fn alloc_fault_queue(&self) -> Result<ObjectId, Errno> {
                (**self).alloc_fault_queue()
            }

            fn read_page_faults(&self, queue: ObjectId) -> Result<Vec<PageFault>, Errno> {
                (**self).read_page_faults(queue)
            }

            fn respond(&self, queue: ObjectId, cookie: u32, code: ResponseCode) -> Result<(), Errno> {
                (**self).respond(queue, cookie, code)
            }

            fn queue_fd(&self, queue: ObjectId) -> Option<RawFd> {
                (**self).queue_fd(queue)
            }

            fn attach(&self, device: DeviceId, pasid: Option<Pasid>, table: ObjectId) -> Result<(), Errno> {
                (**self).attach(device, pasid, table)
            }

            fn detach(&self, device: DeviceId, pasid: Option<Pasid>) -> Result<(), Errno> {
                (**self).detach(device, pasid)
            }
        }
    )*};
}

through!(&K, Arc<K>);
