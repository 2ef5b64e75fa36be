//! VT-d: what is checked when a first-stage table is attached, what invalidations reach, and translation.

use nix::errno::Errno;
use pgtable_formats::context::vtd::{Cap, FaultReason, FirstStage, FirstStageFlags};
use pgtable_formats::{Access, Gpa, Iova, TableMem, Translation};

use super::units::FakeVtd;
use crate::kernel::{DeviceId, VtdInvalidation};

/// `iommu_hwpt_vtd_s1`, as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FirstStageRoot {
    pub(super) flags: u64,
    pub(super) root: u64,
    pub(super) address_width: u32,
}

impl FirstStageRoot {
    /// What attaching it checks. The root is not looked at.
    pub(super) fn check(self, vtd: &FakeVtd) -> Result<(), Errno> {
        let (caps, flags) = (vtd.caps(), self.flags());
        let width = match self.address_width {
            48 => true,
            57 => caps.fs5lp,
            _ => false,
        };
        let privileged = !flags.contains(FirstStageFlags::SRE) || caps.srs;
        let extended = !flags.contains(FirstStageFlags::EAFE) || caps.eafs;
        if width && privileged && extended { Ok(()) } else { Err(Errno::EINVAL) }
    }

    /// The address of an access, guest-physical.
    pub(super) fn translate<M: TableMem>(
        self,
        vtd: &FakeVtd,
        memory: &M,
        iova: u64,
        access: Access,
    ) -> Result<Translation, FaultReason> {
        // The driver cuts the root to whole pages, and the hardware finds out whether it is legal.
        let root = Gpa(self.root & !0xfff);
        let table = FirstStage::new(root, self.flags(), self.address_width, &vtd.caps())
            .map_err(|_| FaultReason::ENTRY_INVALID)?;
        table.walk(memory, Iova(iova), access)
    }

    /// Unknown ones are ignored.
    fn flags(self) -> FirstStageFlags {
        FirstStageFlags::from_bits_truncate(self.flags)
    }
}

/// Translations of first stages, by device and PASID, in IOTLB and device TLBs alike.
#[derive(Debug, Default)]
pub(super) struct Iotlb {
    entries: Vec<(DeviceId, Option<u32>, Translation)>,
}

/// So many translations are kept.
const CAPACITY: usize = 4096;

impl Iotlb {
    pub(super) fn lookup(&self, device: DeviceId, pasid: Option<u32>, iova: u64) -> Option<Translation> {
        let hit = |(of, with, translation): &&(DeviceId, Option<u32>, Translation)| {
            (*of, *with) == (device, pasid) && translation.contains(Iova(iova))
        };
        self.entries.iter().rev().find(hit).map(|&(_, _, translation)| translation)
    }

    pub(super) fn learn(&mut self, device: DeviceId, pasid: Option<u32>, translation: Translation) {
        if self.entries.len() >= CAPACITY {
            self.entries.remove(0);
        }
        self.entries.push((device, pasid, translation));
    }

    pub(super) fn forget_stream(&mut self, device: DeviceId, pasid: Option<u32>) {
        self.entries.retain(|&(of, with, _)| (of, with) != (device, pasid));
    }

    /// Stage 2 has changed: everything of these devices goes.
    pub(super) fn forget_devices(&mut self, devices: &[DeviceId]) {
        self.entries.retain(|(of, _, _)| !devices.contains(of));
    }

    /// What an invalidation reaches of one device and PASID. `true` for global entries: they stay unless addressed.
    pub(super) fn invalidate(&mut self, device: DeviceId, pasid: Option<u32>, what: &VtdInvalidation) {
        let (first, last) = match reach(what) {
            Some(range) => range,
            None => return self.forget_stream(device, pasid),
        };
        self.entries.retain(|&(of, with, translation)| {
            let start = translation.iova.0;
            let end = start | ((1 << translation.size_lg2) - 1);
            (of, with) != (device, pasid) || end < first || last < start
        });
    }
}

/// Whether the kernel takes an entry.
pub(super) fn check(what: &VtdInvalidation) -> Result<(), Errno> {
    let aligned = what.address.is_multiple_of(4096);
    if !aligned || what.pages == u64::MAX && what.address != 0 { Err(Errno::EINVAL) } else { Ok(()) }
}

/// Whether an entry is everything, or a naturally aligned power of two of pages up to CAP_REG.MAMV. The kernel makes such
/// a block of any range, but before 6.10 one that may miss its end, and it never looks at MAMV.
pub(super) fn is_block(what: &VtdInvalidation, vtd: &FakeVtd) -> bool {
    let VtdInvalidation { address, pages, .. } = *what;
    if (address, pages) == (0, u64::MAX) {
        return true;
    }
    let is_aligned = pages.is_power_of_two() && (address >> 12).is_multiple_of(pages);
    let cap = Cap::from_bits(vtd.cap);
    is_aligned && cap.psi() && pages.trailing_zeros() <= cap.mamv().into()
}

/// The smallest aligned power of two of pages that covers an invalidation; `None`: everything.
fn reach(what: &VtdInvalidation) -> Option<(u64, u64)> {
    if what.address == 0 && matches!(what.pages, 0 | u64::MAX) {
        return None;
    }
    let bytes = what.pages.max(1).checked_mul(4096)?;
    let (first, last) = (what.address, what.address.checked_add(bytes - 1)?);
    let differing = 64 - ((first ^ last) | 0xfff).leading_zeros();
    let mask = 1_u64.checked_shl(differing)? - 1;
    Some((first & !mask, last | mask))
}
