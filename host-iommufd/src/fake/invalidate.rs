//! `IOMMU_HWPT_INVALIDATE`: how far it gets, and in what order.

use nix::errno::Errno;

use super::graph::{HwptKind, Object, State};
use super::smmuv3::{Command, decode};
use super::units::Unit;
use super::vtd;
use crate::kernel::{Commands, DeviceId, InvalidateError, ObjectId, VtdInvalidation};

/// Commands that go to the SMMU together, with one CMD_SYNC behind them.
const BATCH: usize = 63;
/// The most entries that one call takes.
const MOST: usize = 1 << 19;

impl State {
    pub(super) fn invalidate(
        &mut self,
        object: ObjectId,
        commands: Commands<'_>,
        strict: bool,
    ) -> Result<(), InvalidateError> {
        let refused = |errno| Err(InvalidateError { done: 0, errno });
        match (self.objects.get(&object), commands) {
            (Some(Object::Viommu { .. }), Commands::Smmuv3(commands)) => {
                // There, none is not a question but a mistake.
                if commands.is_empty() || commands.len() > MOST {
                    return refused(Errno::EINVAL);
                }
                self.invalidate_smmuv3(object, commands, strict)
            }
            (Some(Object::Hwpt(hwpt)), Commands::Vtd(entries)) => match hwpt.kind {
                HwptKind::Vtd { .. } if entries.len() <= MOST => self.invalidate_vtd(object, entries),
                _ => refused(Errno::EINVAL),
            },
            (Some(Object::Viommu { .. } | Object::Hwpt(_)), _) => refused(Errno::EINVAL),
            _ => refused(Errno::ENOENT),
        }
    }

    /// Commands are converted one by one, and issued when a batch is full. One that is refused takes those down that
    /// wait in its batch, which count as done.
    fn invalidate_smmuv3(
        &mut self,
        viommu: ObjectId,
        commands: &[[u64; 2]],
        strict: bool,
    ) -> Result<(), InvalidateError> {
        let failed =
            |done: usize, errno| InvalidateError { done: done.try_into().unwrap_or(u32::MAX), errno };
        let (unit, parent) = self.viommu(viommu).map_err(|errno| failed(0, errno))?;
        let Unit::Smmuv3(smmu) = *self.unit(unit) else { return Err(failed(0, Errno::EOPNOTSUPP)) };
        let mut batch = Vec::new();
        for (index, words) in commands.iter().enumerate() {
            let device = |vsid| {
                let mut known = self.vdevices();
                known.find(|&(of, _, id)| of == viommu && id == vsid).map(|(_, device, _)| device)
            };
            let command = decode(*words, &smmu, strict, device).map_err(|errno| failed(index, errno))?;
            batch.push(command);
            if batch.len() == BATCH || index + 1 == commands.len() {
                self.issue(parent, &batch, smmu.repeat);
                batch.clear();
            }
        }
        Ok(())
    }

    fn issue(&mut self, vmid: ObjectId, batch: &[Command], repeat: bool) {
        let mut translations = false;
        for &command in batch {
            translations |= command.is_tlbi();
            if let Command::Atc { device, .. } = command {
                // Nothing says that the SMMU has forgotten before the device asks it again.
                if translations {
                    self.violations.push("an ATC_INV in one batch with a TLBI before it".into());
                    continue;
                }
                if !self.has_ats_on(device) {
                    self.violations.push(format!("an ATC_INV for {device:?}, whose ATS is off"));
                    continue;
                }
            }
            self.smmu_tlb.execute(vmid, command, repeat);
        }
    }

    fn has_ats_on(&self, device: DeviceId) -> bool {
        let attached = self.attachments.get(&(device, None)).and_then(|to| self.hwpt(to.table).ok());
        let on = attached.is_some_and(|hwpt| match hwpt.kind {
            HwptKind::Smmuv3 { ste, .. } => ste.translates() && ste.eats(),
            _ => false,
        });
        on && self.ats(device)
    }

    /// Whether ATS may be enabled for a device.
    pub(super) fn ats(&self, device: DeviceId) -> bool {
        self.devices.get(&device).is_some_and(|device| {
            device.ats && matches!(self.unit(device.unit), Unit::Smmuv3(smmu) if smmu.idr0().ats())
        })
    }

    /// Entry by entry, for everything that is attached to the table.
    fn invalidate_vtd(
        &mut self,
        table: ObjectId,
        entries: &[VtdInvalidation],
    ) -> Result<(), InvalidateError> {
        for (index, entry) in entries.iter().enumerate() {
            vtd::check(entry)
                .map_err(|errno| InvalidateError { done: index.try_into().unwrap_or(u32::MAX), errno })?;
            self.check_block(table, entry);
            for (&(device, pasid), attachment) in &self.attachments {
                if attachment.table == table {
                    self.vtd_tlb.invalidate(device, pasid, entry);
                }
            }
        }
        Ok(())
    }

    /// What the kernel takes and not every unit, or not every kernel, does right.
    fn check_block(&mut self, table: ObjectId, entry: &VtdInvalidation) {
        let unit = self.hwpt(table).map(|hwpt| hwpt.unit);
        let Ok(Unit::Vtd(vtd)) = unit.map(|unit| *self.unit(unit)) else { return };
        if !vtd::is_block(entry, &vtd) {
            self.violations.push(format!("{entry:x?} is no block that the unit has a mask for"));
        }
    }

    /// An IOAS has lost a mapping: the kernel invalidates stage 2 of everything that goes through it.
    pub(super) fn stage2_changed(&mut self, ioas: ObjectId) {
        let mut devices = Vec::new();
        let mut parents = Vec::new();
        for ((device, _), attachment) in &self.attachments {
            if let Ok((parent, of)) = self.paging(attachment.table)
                && of == ioas
            {
                devices.push(*device);
                parents.push(parent);
            }
        }
        for parent in parents {
            self.smmu_tlb.forget_stage2(parent, &devices);
        }
        self.vtd_tlb.forget_devices(&devices);
    }
}
