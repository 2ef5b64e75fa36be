//! `IOMMU_HWPT_ALLOC`, `IOMMU_VIOMMU_ALLOC`, `IOMMU_VDEVICE_ALLOC`: who takes what.

use nix::errno::Errno;

use super::graph::{Hwpt, HwptKind, Object, State};
use super::smmuv3::Ste;
use super::units::{Unit, UnitId};
use super::vtd::FirstStageRoot;
use crate::kernel::{DeviceId, HwptData, HwptFlags, HwptSpec, ObjectId, ViommuKind};

impl State {
    /// What is made depends on what `parent` is.
    pub(super) fn alloc_hwpt(&mut self, spec: &HwptSpec) -> Result<ObjectId, Errno> {
        let unit = self.device(spec.device)?.unit;
        let kind = match self.objects.get(&spec.parent) {
            Some(Object::Ioas(_)) => self.paging_hwpt(unit, spec)?,
            Some(Object::Hwpt(_)) => self.vtd_hwpt(unit, spec)?,
            Some(Object::Viommu { .. }) => self.smmuv3_hwpt(unit, spec)?,
            // The kernel says the same of what is no table and of what is nothing.
            Some(_) | None => return Err(Errno::EINVAL),
        };
        if let Some(queue) = spec.fault_queue
            && !matches!(self.objects.get(&queue), Some(Object::FaultQueue(_)))
        {
            return Err(Errno::ENOENT);
        }
        let (flags, fault_queue) = (spec.flags, spec.fault_queue);
        Ok(self.insert(Object::Hwpt(Hwpt { unit, flags, fault_queue, kind })))
    }

    fn paging_hwpt(&self, unit: UnitId, spec: &HwptSpec) -> Result<HwptKind, Errno> {
        let has = |flags| spec.flags.contains(flags);
        let nest_parent = has(HwptFlags::NEST_PARENT);
        if nest_parent && spec.fault_queue.is_some() || spec.data != HwptData::None {
            return Err(Errno::EOPNOTSUPP);
        }
        let supported = match self.unit(unit) {
            Unit::Plain => spec.flags.is_empty(),
            Unit::Amd { .. } => !has(HwptFlags::PASID),
            // The driver knows exact combinations: a nest parent is nothing else.
            Unit::Smmuv3(smmu) => match spec.flags {
                HwptFlags::NEST_PARENT => smmu.nests(),
                _ if nest_parent => false,
                _ => !has(HwptFlags::DIRTY_TRACKING) || smmu.idr0().httu() >= 2,
            },
            Unit::Vtd(vtd) => {
                (!nest_parent || vtd.nests())
                    && (!has(HwptFlags::PASID) || vtd.ecap().smts())
                    && (!has(HwptFlags::DIRTY_TRACKING) || vtd.ecap().slads() && vtd.ecap().smpwc())
            }
        };
        if !supported {
            return Err(Errno::EOPNOTSUPP);
        }
        let ioas = self.ioas(spec.parent)?;
        if self.beyond(unit).is_some_and(|beyond| ioas.overlaps(beyond)) {
            return Err(Errno::EADDRINUSE);
        }
        Ok(HwptKind::Paging { ioas: spec.parent })
    }

    fn vtd_hwpt(&self, unit: UnitId, spec: &HwptSpec) -> Result<HwptKind, Errno> {
        let parent = self.hwpt(spec.parent)?;
        if !HwptFlags::PASID.contains(spec.flags) {
            return Err(Errno::EOPNOTSUPP);
        }
        let is_parent = parent.flags.contains(HwptFlags::NEST_PARENT);
        if !is_parent {
            return Err(Errno::EINVAL);
        }
        let Unit::Vtd(vtd) = self.unit(unit) else { return Err(Errno::EOPNOTSUPP) };
        if !vtd.nests() {
            return Err(Errno::EOPNOTSUPP);
        }
        // Flags are not looked at, and nothing is checked before it is attached.
        match spec.data {
            HwptData::Vtd { flags, root, address_width } => {
                let root = FirstStageRoot { flags, root, address_width };
                Ok(HwptKind::Vtd { parent: spec.parent, root })
            }
            HwptData::None | HwptData::Smmuv3(_) => Err(Errno::EOPNOTSUPP),
        }
    }

    fn smmuv3_hwpt(&self, unit: UnitId, spec: &HwptSpec) -> Result<HwptKind, Errno> {
        let (of, _) = self.viommu(spec.parent)?;
        if of != unit {
            return Err(Errno::EINVAL);
        }
        if !spec.flags.is_empty() {
            return Err(Errno::EOPNOTSUPP);
        }
        match spec.data {
            HwptData::Smmuv3(words) => Ok(HwptKind::Smmuv3 { viommu: spec.parent, ste: Ste::accept(words)? }),
            HwptData::None | HwptData::Vtd { .. } => Err(Errno::EINVAL),
        }
    }

    pub(super) fn alloc_viommu(
        &mut self,
        kind: ViommuKind,
        device: DeviceId,
        parent: ObjectId,
    ) -> Result<ObjectId, Errno> {
        let ViommuKind::Smmuv3 = kind;
        let unit = self.device(device)?.unit;
        let Unit::Smmuv3(smmu) = self.unit(unit) else { return Err(Errno::EOPNOTSUPP) };
        if !smmu.nests() || !smmu.coherent {
            return Err(Errno::EOPNOTSUPP);
        }
        let hwpt = self.hwpt(parent)?;
        if !hwpt.flags.contains(HwptFlags::NEST_PARENT) || hwpt.unit != unit {
            return Err(Errno::EINVAL);
        }
        Ok(self.insert(Object::Viommu { unit, parent }))
    }

    pub(super) fn alloc_vdevice(
        &mut self,
        viommu: ObjectId,
        device: DeviceId,
        virtual_id: u64,
    ) -> Result<ObjectId, Errno> {
        let (unit, _) = self.viommu(viommu)?;
        let known = self.device(device)?;
        if known.unit != unit {
            return Err(Errno::EINVAL);
        }
        let taken =
            |(of, whose, id): (ObjectId, DeviceId, u64)| whose == device || of == viommu && id == virtual_id;
        if self.vdevices().any(taken) {
            return Err(Errno::EEXIST);
        }
        if virtual_id > u64::from(u32::MAX) {
            return Err(Errno::EINVAL);
        }
        if known.stream_ids != 1 {
            return Err(Errno::EOPNOTSUPP);
        }
        Ok(self.insert(Object::Vdevice { viommu, device, virtual_id }))
    }
}
