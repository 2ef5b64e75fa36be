//! The hardware: IOMMUs, and devices behind them.

use pgtable_formats::context::smmuv3::{Caps as SmmuCaps, IdRegisters, Idr0, Idr1, Idr3, Idr5};
use pgtable_formats::context::vtd::{Cap, CapRegisters, Caps as VtdCaps, Ecap};
use pgtable_formats::{Iova, IovaRange};

use crate::kernel::{HwCapabilities, HwKind};

/// Number of an IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnitId(pub(super) usize);

/// An IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// One that the kernel tells nothing of and that takes no guest's tables.
    Plain,
    /// An SMMUv3.
    Smmuv3(FakeSmmuv3),
    /// A VT-d unit.
    Vtd(FakeVtd),
    /// An AMD IOMMU, which can be a nest parent and has no invalidation of what is nested.
    Amd {
        /// Extended feature register.
        efr: u64,
        /// Extended feature register 2.
        efr2: u64,
    },
}

/// An SMMUv3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FakeSmmuv3 {
    /// SMMU_IDR0 to SMMU_IDR5.
    pub idr: [u32; 6],
    /// Its accesses are coherent by CANWBS or S2FWB: without there is no vIOMMU.
    pub coherent: bool,
    /// TLBI and CFGI have to be sent twice (`IOMMU_HW_INFO_ARM_SMMUV3_ERRATA_REPEAT_TLBI_CFGI`): each second one works.
    pub repeat: bool,
}

/// A VT-d unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FakeVtd {
    /// Capability register.
    pub cap: u64,
    /// Extended capability register.
    pub ecap: u64,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FakeDevice {
    /// Behind which IOMMU.
    pub unit: UnitId,
    /// log2 of the number of PASIDs; 0: none.
    pub max_pasid_lg2: u8,
    /// It has ATS, and the IOMMU may enable it.
    pub ats: bool,
    /// It sends page requests (PCIe PRI).
    pub pri: bool,
    /// It is an SR-IOV function that shares its page requests.
    pub virtual_function: bool,
    /// Its transactions may stall.
    pub stall: bool,
    /// How many StreamIDs it has.
    pub stream_ids: u32,
    /// What must not be mapped for it, beside its IOMMU's own window for interrupts.
    pub reserved: Vec<IovaRange>,
}

/// The doorbell window that Linux makes up for devices behind an SMMU, and that of x86.
const SOFTWARE_MSI: (u64, u64) = (0x800_0000, 0x80f_ffff);
const X86_MSI: (u64, u64) = (0xfee0_0000, 0xfeef_ffff);

impl Unit {
    /// An SMMUv3 with both stages, 16 PASID bits, 16-bit ASIDs, 4 KiB, 16 KiB and 64 KiB granules, 48-bit addresses,
    /// ATS, range invalidation, and no stalls.
    pub const fn smmuv3() -> Self {
        Self::Smmuv3(FakeSmmuv3::NEW)
    }

    /// What QEMU's `virt` machine has: no PASIDs, no ATS, 44-bit addresses.
    pub const fn emulated_smmuv3() -> Self {
        let idr = [0xd44_101b, 0x273_0010, 0, 0x1414, 0, 0x74];
        Self::Smmuv3(FakeSmmuv3 { idr, coherent: true, repeat: false })
    }

    /// A VT-d unit in scalable mode that nests, with all that the formats know, page requests and device TLBs.
    pub const fn vtd() -> Self {
        let ecap = Ecap::from_bits(CapRegisters::SOFTWARE.ecap)
            .with_nest(true)
            .with_ssts(true)
            .with_dt(true)
            .with_prs(true)
            .with_pds(true);
        let cap = Cap::from_bits(CapRegisters::SOFTWARE.cap).with_sagaw(4).with_mgaw(47);
        Self::Vtd(FakeVtd { cap: cap.into_bits(), ecap: ecap.into_bits() })
    }

    /// What `IOMMU_GET_HW_INFO` tells.
    pub(super) const fn hw_kind(&self) -> HwKind {
        match *self {
            Self::Plain => HwKind::None,
            Self::Smmuv3(FakeSmmuv3 { idr, repeat, .. }) => {
                HwKind::Smmuv3 { flags: repeat as u32, idr, iidr: 0, aidr: 1 }
            }
            // Erratum 772415 is always told.
            Self::Vtd(FakeVtd { cap, ecap }) => HwKind::Vtd { flags: 1, cap, ecap },
            Self::Amd { efr, efr2 } => HwKind::Amd { efr, efr2 },
        }
    }

    /// Last address that a table of this IOMMU translates.
    pub(super) const fn aperture_last(&self) -> u64 {
        match self {
            Self::Plain | Self::Amd { .. } => (1 << 48) - 1,
            Self::Smmuv3(smmu) => (1 << smmu.caps().oas_bits) - 1,
            Self::Vtd(vtd) => (2 << Cap::from_bits(vtd.cap).mgaw()) - 1,
        }
    }

    /// The addresses that its devices send interrupts to, and that are not memory.
    pub(super) fn interrupts(&self) -> Option<IovaRange> {
        let (start, last) = match self {
            Self::Plain => return None,
            Self::Smmuv3(_) => SOFTWARE_MSI,
            Self::Vtd(_) | Self::Amd { .. } => X86_MSI,
        };
        IovaRange::new(Iova(start), Iova(last))
    }

    /// Whether a paging table that is no nest parent can have pages that are written and not read.
    pub(super) const fn has_write_only(&self) -> bool {
        match self {
            Self::Plain | Self::Amd { .. } => true,
            // Both use stage 1 for paging where they have it, and stage 1 has no such pages.
            Self::Smmuv3(smmu) => !Idr0::from_bits(smmu.idr[0]).s1p(),
            Self::Vtd(vtd) => !Ecap::from_bits(vtd.ecap).fsts(),
        }
    }
}

impl FakeSmmuv3 {
    /// See [`Unit::smmuv3`].
    pub const NEW: Self = Self {
        idr: [
            Idr0::from_bits(IdRegisters::SOFTWARE.idr0).with_s2p(true).with_ats(true).into_bits(),
            Idr1::new().with_sidsize(16).with_ssidsize(16).into_bits(),
            0,
            Idr3::from_bits(IdRegisters::SOFTWARE.idr3).into_bits(),
            0,
            IdRegisters::SOFTWARE.idr5,
        ],
        coherent: true,
        repeat: false,
    };

    /// The same with another `IDR0.STALL_MODEL`.
    #[must_use]
    pub const fn with_stall_model(mut self, model: u8) -> Self {
        self.idr[0] = Idr0::from_bits(self.idr[0]).with_stall_model(model).into_bits();
        self
    }

    /// The same with or without range invalidation.
    #[must_use]
    pub const fn with_ranges(mut self, ril: bool) -> Self {
        self.idr[3] = Idr3::from_bits(self.idr[3]).with_ril(ril).into_bits();
        self
    }

    /// What the hardware itself goes by: all of its registers.
    pub(super) const fn caps(&self) -> SmmuCaps {
        let [idr0, idr1, _, idr3, _, idr5] = self.idr;
        SmmuCaps::from_registers(IdRegisters { idr0, idr1, idr3, idr5 })
    }

    pub(super) const fn idr0(&self) -> Idr0 {
        Idr0::from_bits(self.idr[0])
    }

    pub(super) const fn idr3(&self) -> Idr3 {
        Idr3::from_bits(self.idr[3])
    }

    pub(super) const fn idr5(&self) -> Idr5 {
        Idr5::from_bits(self.idr[5])
    }

    /// Both stages at once.
    pub(super) const fn nests(&self) -> bool {
        self.idr0().s1p() && self.idr0().s2p()
    }
}

impl FakeVtd {
    pub(super) const fn caps(&self) -> VtdCaps {
        VtdCaps::from_registers(CapRegisters { cap: self.cap, ecap: self.ecap })
    }

    pub(super) const fn ecap(&self) -> Ecap {
        Ecap::from_bits(self.ecap)
    }

    /// Scalable mode with nested translation.
    pub(super) const fn nests(&self) -> bool {
        self.ecap().smts() && self.ecap().nest() && self.ecap().ssts()
    }
}

impl FakeDevice {
    /// A device without PASIDs, ATS, page requests or reserved regions.
    pub const fn on(unit: UnitId) -> Self {
        Self {
            unit,
            max_pasid_lg2: 0,
            ats: false,
            pri: false,
            virtual_function: false,
            stall: false,
            stream_ids: 1,
            reserved: Vec::new(),
        }
    }

    /// The same with `bits` of PASID.
    #[must_use]
    pub fn with_pasids(self, bits: u8) -> Self {
        Self { max_pasid_lg2: bits, ..self }
    }

    pub(super) fn capabilities(&self) -> HwCapabilities {
        let mut capabilities = HwCapabilities::empty();
        capabilities.set(HwCapabilities::ATS_NOT_SUPPORTED, !self.ats);
        capabilities
    }
}
