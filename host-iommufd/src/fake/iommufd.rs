//! The calls.

use std::os::fd::RawFd;

use nix::errno::Errno;
use pgtable_formats::{IovaRange, Pasid};

use super::graph::Object;
use super::ioas::{self, Ioas};
use super::page_requests::FaultQueue;
use super::{FakeIommufd, Memory};
use crate::kernel::{
    Backing, Commands, DeviceId, Event, HwInfo, HwptData, HwptSpec, InvalidateError, IoasMapping, Iommufd,
    IovaRanges, ObjectId, PageFault, ResponseCode, ViommuKind,
};

/// What the kernel answers to an ioctl that it does not have.
fn known(has: bool) -> Result<(), Errno> {
    if has { Ok(()) } else { Err(Errno::ENOTTY) }
}

impl<M: Memory> Iommufd for FakeIommufd<M> {
    fn destroy(&self, object: ObjectId) -> Result<(), Errno> {
        self.state().destroy(object)
    }

    fn alloc_ioas(&self) -> Result<ObjectId, Errno> {
        Ok(self.state().insert(Object::Ioas(Ioas::default())))
    }

    fn iova_ranges(&self, ioas: ObjectId) -> Result<IovaRanges, Errno> {
        let state = self.state();
        state.ioas(ioas)?;
        Ok(IovaRanges { allowed: ioas::open(&state.closed(ioas)), alignment: ioas::ALIGNMENT })
    }

    fn map(&self, ioas: ObjectId, mapping: &IoasMapping) -> Result<(), Errno> {
        if let Backing::File { .. } = mapping.backing {
            known(self.kernel.map_file)?;
        }
        let mut state = self.state();
        let closed = state.closed(ioas);
        let memory = state.ioas_mut(ioas)?;
        // Pinning finds out that there is nothing behind.
        let last = match mapping.backing {
            Backing::Memory(at) => Backing::Memory(at.saturating_add(mapping.range.length_minus_one())),
            Backing::File { fd, offset } => {
                Backing::File { fd, offset: offset.saturating_add(mapping.range.length_minus_one()) }
            }
        };
        if self.memory.gpa(mapping.backing).is_none() || self.memory.gpa(last).is_none() {
            return Err(Errno::EFAULT);
        }
        memory.map(mapping, &closed)
    }

    fn unmap(&self, ioas: ObjectId, range: IovaRange) -> Result<u64, Errno> {
        let mut state = self.state();
        let unmapped = state.ioas_mut(ioas)?.unmap(range);
        // Even where it stopped part-way, what went is gone.
        state.stage2_changed(ioas);
        unmapped
    }

    fn hw_info(&self, device: DeviceId) -> Result<HwInfo, Errno> {
        let state = self.state();
        let device = state.device(device)?;
        let kind = state.unit(device.unit).hw_kind();
        Ok(HwInfo { kind, max_pasid_lg2: device.max_pasid_lg2, capabilities: device.capabilities() })
    }

    fn alloc_hwpt(&self, spec: &HwptSpec) -> Result<ObjectId, Errno> {
        if matches!(spec.data, HwptData::Smmuv3(_)) && !self.kernel.viommu {
            return Err(Errno::EOPNOTSUPP);
        }
        self.state().alloc_hwpt(spec)
    }

    fn invalidate(&self, object: ObjectId, commands: Commands<'_>) -> Result<(), InvalidateError> {
        self.state().invalidate(object, commands, self.kernel.strict_commands)
    }

    fn alloc_viommu(&self, kind: ViommuKind, device: DeviceId, parent: ObjectId) -> Result<ObjectId, Errno> {
        known(self.kernel.viommu)?;
        self.state().alloc_viommu(kind, device, parent)
    }

    fn alloc_vdevice(&self, viommu: ObjectId, device: DeviceId, virtual_id: u64) -> Result<ObjectId, Errno> {
        known(self.kernel.viommu)?;
        self.state().alloc_vdevice(viommu, device, virtual_id)
    }

    fn alloc_event_queue(&self, viommu: ObjectId, kind: ViommuKind, depth: u32) -> Result<ObjectId, Errno> {
        known(self.kernel.event_queues)?;
        let ViommuKind::Smmuv3 = kind;
        self.state().alloc_event_queue(viommu, depth)
    }

    fn read_events(&self, queue: ObjectId) -> Result<Vec<Event>, Errno> {
        match self.state().objects.get_mut(&queue) {
            Some(Object::EventQueue(queue)) => Ok(queue.read()),
            _ => Err(Errno::ENOENT),
        }
    }

    fn alloc_fault_queue(&self) -> Result<ObjectId, Errno> {
        known(self.kernel.fault_queues)?;
        let queue = FaultQueue::new()?;
        Ok(self.state().insert(Object::FaultQueue(queue)))
    }

    fn read_page_faults(&self, queue: ObjectId) -> Result<Vec<PageFault>, Errno> {
        self.read_queue(queue)
    }

    fn respond(&self, queue: ObjectId, cookie: u32, code: ResponseCode) -> Result<(), Errno> {
        self.answer(queue, cookie, code)
    }

    fn queue_fd(&self, queue: ObjectId) -> Option<RawFd> {
        match self.state().objects.get(&queue)? {
            Object::EventQueue(queue) => Some(queue.bell.fd()),
            Object::FaultQueue(queue) => Some(queue.bell.fd()),
            _ => None,
        }
    }

    fn attach(&self, device: DeviceId, pasid: Option<Pasid>, table: ObjectId) -> Result<(), Errno> {
        if pasid.is_some() && !self.kernel.pasids {
            return Err(Errno::EINVAL);
        }
        self.state().attach(device, pasid.map(Pasid::value), table)
    }

    fn detach(&self, device: DeviceId, pasid: Option<Pasid>) -> Result<(), Errno> {
        if pasid.is_some() && !self.kernel.pasids {
            return Err(Errno::EINVAL);
        }
        self.state().detach(device, pasid.map(Pasid::value))
    }
}
