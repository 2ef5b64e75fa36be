//! Attaching and detaching: what a device is compatible with, and what hardware forgets.

use nix::errno::Errno;

use super::graph::{Attachment, Hwpt, HwptKind, State};
use super::units::{FakeDevice, Unit};
use crate::kernel::{DeviceId, HwptFlags, ObjectId};

impl State {
    /// Replaces what was attached. What is refused changes nothing.
    pub(super) fn attach(&mut self, id: DeviceId, pasid: Option<u32>, table: ObjectId) -> Result<(), Errno> {
        let device = self.device(id)?;
        let hwpt = self.hwpt(table)?;
        self.check_pasids(id, device, pasid, &hwpt)?;
        if hwpt.fault_queue.is_some() && device.virtual_function && device.pri {
            return Err(Errno::EINVAL);
        }
        if hwpt.unit != device.unit {
            return Err(Errno::EINVAL);
        }
        let (_, ioas) = self.paging(table)?;
        let mapped = self.ioas(ioas)?;
        if self.reserved(id).into_iter().any(|range| mapped.overlaps(range)) {
            return Err(Errno::EADDRINUSE);
        }
        let virtual_id = match hwpt.kind {
            HwptKind::Paging { .. } => None,
            HwptKind::Smmuv3 { viommu, ste } => {
                let found = self.vdevices().find(|&(of, whose, _)| of == viommu && whose == id);
                if ste.translates() && found.is_none() {
                    return Err(Errno::ENOENT);
                }
                found.map(|(of, _, virtual_id)| (of, virtual_id))
            }
            HwptKind::Vtd { root, .. } => {
                let Unit::Vtd(vtd) = self.unit(hwpt.unit) else { return Err(Errno::EINVAL) };
                root.check(vtd)?;
                if hwpt.fault_queue.is_some() && !device.pri {
                    return Err(Errno::ENODEV);
                }
                None
            }
        };
        let replaced = self.attachments.insert((id, pasid), Attachment { table, virtual_id });
        // The same once more is nothing to the kernel.
        if replaced.is_none_or(|replaced| replaced.table != table) {
            // The surprise of kernels from 6.15 on: what waits is looked for in the queue of the new table.
            self.forget(id, pasid, replaced, hwpt.fault_queue);
        }
        Ok(())
    }

    /// Without anything attached it does nothing.
    pub(super) fn detach(&mut self, id: DeviceId, pasid: Option<u32>) -> Result<(), Errno> {
        self.device(id)?;
        let replaced = self.attachments.remove(&(id, pasid));
        let queue = replaced.as_ref().and_then(|replaced| self.hwpt(replaced.table).ok()?.fault_queue);
        self.forget(id, pasid, replaced, queue);
        Ok(())
    }

    /// A table that a PASID is attached to, and that of untagged accesses beside it, are both made for that.
    fn check_pasids(
        &self,
        id: DeviceId,
        device: &FakeDevice,
        pasid: Option<u32>,
        hwpt: &Hwpt,
    ) -> Result<(), Errno> {
        let fits = |hwpt: &Hwpt| hwpt.flags.contains(HwptFlags::PASID);
        if let Some(pasid) = pasid {
            let count = match device.max_pasid_lg2 {
                0 => 0,
                bits => 1 << bits,
            };
            let untagged = self.attachments.get(&(id, None)).and_then(|beside| self.hwpt(beside.table).ok());
            // PASID 0 is what untagged accesses have.
            let legal = (1..count).contains(&pasid) && fits(hwpt) && untagged.as_ref().is_none_or(fits);
            return if legal { Ok(()) } else { Err(Errno::EINVAL) };
        }
        let has_pasids = self.attachments.keys().any(|(of, pasid)| *of == id && pasid.is_some());
        if has_pasids && !fits(hwpt) { Err(Errno::EINVAL) } else { Ok(()) }
    }

    /// What the kernel invalidates by itself when something is attached or detached. `queue`: whose page requests it
    /// answers.
    fn forget(
        &mut self,
        id: DeviceId,
        pasid: Option<u32>,
        replaced: Option<Attachment>,
        queue: Option<ObjectId>,
    ) {
        // The stream table entry or PASID entry has changed: its contexts go, and device TLBs.
        self.smmu_tlb.forget_stream(id);
        self.vtd_tlb.forget_stream(id, pasid);
        let Some(replaced) = replaced else { return };
        // Page requests that nobody has answered are answered.
        self.abandon_page_requests(id, pasid, queue);
        let Ok((parent, _)) = self.paging(replaced.table) else { return };
        // Translations under the guest's ASIDs stay, until nobody uses that VMID any more.
        let in_use =
            |attachment: &Attachment| self.paging(attachment.table).is_ok_and(|(of, _)| of == parent);
        if !self.attachments.values().any(in_use) {
            self.smmu_tlb.forget_vmid(parent);
        }
    }
}
