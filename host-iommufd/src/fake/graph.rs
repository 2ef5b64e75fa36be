//! What there is, and what keeps what alive.

use std::collections::{BTreeMap, VecDeque};

use nix::errno::Errno;
use pgtable_formats::{Iova, IovaRange};

use super::dma::DmaFault;
use super::events::EventQueue;
use super::ioas::Ioas;
use super::page_requests::{FaultQueue, Wait, Wanted};
use super::smmuv3::{Ste, Tlb};
use super::units::{FakeDevice, Unit, UnitId};
use super::vtd::{FirstStageRoot, Iotlb};
use crate::kernel::{DeviceId, HwptFlags, ObjectId, ResponseCode};

/// Everything behind the lock.
#[derive(Debug, Default)]
pub(super) struct State {
    /// Objects and devices share one space of numbers.
    last_id: u32,
    pub(super) units: Vec<Unit>,
    pub(super) devices: BTreeMap<DeviceId, FakeDevice>,
    pub(super) objects: BTreeMap<ObjectId, Object>,
    pub(super) attachments: BTreeMap<(DeviceId, Option<u32>), Attachment>,
    pub(super) smmu_tlb: Tlb,
    pub(super) vtd_tlb: Iotlb,
    pub(super) host_faults: Vec<(DeviceId, DmaFault)>,
    pub(super) violations: Vec<String>,
    pub(super) page_responses: Vec<(DeviceId, u32, Option<ResponseCode>)>,
    /// Page requests whose group is not complete yet.
    pub(super) partial: BTreeMap<(DeviceId, Option<u32>, u32), VecDeque<crate::kernel::PageFault>>,
    /// Accesses that wait for pages.
    pub(super) waits: BTreeMap<Wanted, Wait>,
    /// The group number that an access had last.
    pub(super) last_group: u32,
}

/// An iommufd object.
#[derive(Debug)]
pub(super) enum Object {
    Ioas(Ioas),
    Hwpt(Hwpt),
    Viommu { unit: UnitId, parent: ObjectId },
    Vdevice { viommu: ObjectId, device: DeviceId, virtual_id: u64 },
    EventQueue(EventQueue),
    FaultQueue(FaultQueue),
}

/// A hardware page table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hwpt {
    pub(super) unit: UnitId,
    pub(super) flags: HwptFlags,
    pub(super) fault_queue: Option<ObjectId>,
    pub(super) kind: HwptKind,
}

/// What a hardware page table is made of.
#[derive(Clone, Copy, Debug)]
pub(super) enum HwptKind {
    Paging { ioas: ObjectId },
    Smmuv3 { viommu: ObjectId, ste: Ste },
    Vtd { parent: ObjectId, root: FirstStageRoot },
}

/// What accesses of a device go through.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attachment {
    pub(super) table: ObjectId,
    /// The device's ID in events, if it had one when it was attached to a nested table.
    pub(super) virtual_id: Option<(ObjectId, u64)>,
}

impl Object {
    /// What has to outlive it.
    fn parents(&self) -> [Option<ObjectId>; 2] {
        match self {
            Self::Ioas(_) | Self::FaultQueue(_) => [None; 2],
            Self::Hwpt(hwpt) => [Some(hwpt.parent()), hwpt.fault_queue],
            Self::Viommu { parent, .. } => [Some(*parent), None],
            Self::Vdevice { viommu, .. } => [Some(*viommu), None],
            Self::EventQueue(queue) => [Some(queue.viommu), None],
        }
    }
}

impl Hwpt {
    fn parent(&self) -> ObjectId {
        match self.kind {
            HwptKind::Paging { ioas } => ioas,
            HwptKind::Smmuv3 { viommu, .. } => viommu,
            HwptKind::Vtd { parent, .. } => parent,
        }
    }
}

impl State {
    pub(super) fn add_unit(&mut self, unit: Unit) -> UnitId {
        self.units.push(unit);
        UnitId(self.units.len() - 1)
    }

    pub(super) fn add_device(&mut self, device: FakeDevice) -> DeviceId {
        let id = DeviceId(self.next_id());
        self.devices.insert(id, device);
        id
    }

    pub(super) fn insert(&mut self, object: Object) -> ObjectId {
        let id = ObjectId(self.next_id());
        self.objects.insert(id, object);
        id
    }

    fn next_id(&mut self) -> u32 {
        self.last_id += 1;
        self.last_id
    }

    pub(super) fn device(&self, id: DeviceId) -> Result<&FakeDevice, Errno> {
        self.devices.get(&id).ok_or(Errno::ENOENT)
    }

    pub(super) fn unit(&self, id: UnitId) -> &Unit {
        &self.units[id.0]
    }

    pub(super) fn ioas(&self, id: ObjectId) -> Result<&Ioas, Errno> {
        match self.objects.get(&id) {
            Some(Object::Ioas(ioas)) => Ok(ioas),
            _ => Err(Errno::ENOENT),
        }
    }

    pub(super) fn ioas_mut(&mut self, id: ObjectId) -> Result<&mut Ioas, Errno> {
        match self.objects.get_mut(&id) {
            Some(Object::Ioas(ioas)) => Ok(ioas),
            _ => Err(Errno::ENOENT),
        }
    }

    pub(super) fn hwpt(&self, id: ObjectId) -> Result<Hwpt, Errno> {
        match self.objects.get(&id) {
            Some(Object::Hwpt(hwpt)) => Ok(*hwpt),
            _ => Err(Errno::ENOENT),
        }
    }

    /// The IOMMU and the nest parent of a vIOMMU.
    pub(super) fn viommu(&self, id: ObjectId) -> Result<(UnitId, ObjectId), Errno> {
        match self.objects.get(&id) {
            Some(Object::Viommu { unit, parent }) => Ok((*unit, *parent)),
            _ => Err(Errno::ENOENT),
        }
    }

    /// The table that the second stage of `hwpt` comes from: itself, where it pages; and its IOAS.
    pub(super) fn paging(&self, id: ObjectId) -> Result<(ObjectId, ObjectId), Errno> {
        match self.hwpt(id)?.kind {
            HwptKind::Paging { ioas } => Ok((id, ioas)),
            HwptKind::Smmuv3 { viommu, .. } => self.paging(self.viommu(viommu)?.1),
            HwptKind::Vtd { parent, .. } => self.paging(parent),
        }
    }

    pub(super) fn vdevices(&self) -> impl Iterator<Item = (ObjectId, DeviceId, u64)> {
        self.objects.values().filter_map(|object| match object {
            Object::Vdevice { viommu, device, virtual_id } => Some((*viommu, *device, *virtual_id)),
            _ => None,
        })
    }

    /// `IOMMU_DESTROY`.
    pub(super) fn destroy(&mut self, id: ObjectId) -> Result<(), Errno> {
        if !self.objects.contains_key(&id) {
            return Err(Errno::ENOENT);
        }
        let is_parent = self.objects.values().any(|object| object.parents().contains(&Some(id)));
        let is_attached = self.attachments.values().any(|attachment| attachment.table == id);
        if is_parent || is_attached {
            return Err(Errno::EBUSY);
        }
        if let Some(Object::FaultQueue(queue)) = self.objects.remove(&id) {
            queue.into_open().for_each(|group| self.answered(&group, None));
        }
        Ok(())
    }

    /// What must not be mapped in an IOAS: beyond what its tables translate, and what its devices reserve.
    pub(super) fn closed(&self, ioas: ObjectId) -> Vec<IovaRange> {
        let mut closed = Vec::new();
        for object in self.objects.values() {
            if let Object::Hwpt(Hwpt { kind: HwptKind::Paging { ioas: of }, unit, .. }) = object
                && *of == ioas
            {
                closed.extend(self.beyond(*unit));
            }
        }
        for ((device, _), attachment) in &self.attachments {
            if self.paging(attachment.table).is_ok_and(|(_, of)| of == ioas) {
                closed.extend(self.reserved(*device));
            }
        }
        closed
    }

    /// What no table of an IOMMU translates.
    pub(super) fn beyond(&self, unit: UnitId) -> Option<IovaRange> {
        let first = self.unit(unit).aperture_last().checked_add(1)?;
        IovaRange::new(Iova(first), Iova(u64::MAX))
    }

    /// What a device closes in the IOAS that it is attached to.
    pub(super) fn reserved(&self, device: DeviceId) -> Vec<IovaRange> {
        let Some(device) = self.devices.get(&device) else { return Vec::new() };
        device.reserved.iter().copied().chain(self.unit(device.unit).interrupts()).collect()
    }
}
