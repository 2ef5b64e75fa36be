//! What a physical SMMUv3 can do: what a guest is shown of it, and what its host needs to know.

use pgtable_formats::context::smmuv3::{Caps, IdRegisters, Idr0, Idr3};

/// A physical SMMUv3 as `IOMMU_GET_HW_INFO` describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hardware {
    /// What the guest's tables may use. See [`caps`].
    pub caps: Caps,
    /// One command can invalidate a range of pages (IDR3.RIL).
    pub range_invalidation: bool,
    /// Translation requests of devices are served (IDR0.ATS); without it the kernel refuses ATC_INV.
    pub ats: bool,
    /// TLBI and CFGI commands have to be sent twice (`flags` bit 0, erratum T264-SMMU-3). For whoever sends a
    /// [`Plan`](super::Plan): its `commands` go out as a whole, then as a whole again, before its `ats`.
    pub repeat: bool,
}

impl Hardware {
    /// Decodes the answer of `IOMMU_GET_HW_INFO`, type 2. `address_bits`: see [`caps`].
    pub const fn new(flags: u32, idr: &[u32; 6], address_bits: u8) -> Self {
        const REPEAT_TLBI_CFGI: u32 = 1 << 0;
        let [idr0, _, _, idr3, _, _] = *idr;
        Self {
            caps: caps(idr, address_bits),
            range_invalidation: Idr3::from_bits(idr3).ril(),
            ats: Idr0::from_bits(idr0).ats(),
            repeat: flags & REPEAT_TLBI_CFGI != 0,
        }
    }

    /// log2 of the smallest page: what the kernel gives devices as the smallest translation unit (STU) of ATS.
    pub(super) const fn smallest_page_lg2(&self) -> u8 {
        match (self.caps.granule_4k, self.caps.granule_16k, self.caps.granule_64k) {
            (true, _, _) | (false, false, false) => 12,
            (false, true, _) => 14,
            (false, false, true) => 16,
        }
    }
}

/// What a guest is shown of SMMU_IDR0 to SMMU_IDR5: those bits that the uAPI lists as usable with nesting, HTTU and
/// BTM not among them. `address_bits`, the width of a guest-physical address that stage 2 can translate, becomes OAS.
pub const fn caps(idr: &[u32; 6], address_bits: u8) -> Caps {
    let [idr0, idr1, _, idr3, _, idr5] = *idr;
    Caps::from_registers(IdRegisters { idr0, idr1, idr3, idr5 }.filtered().with_output_bits(address_bits))
}
