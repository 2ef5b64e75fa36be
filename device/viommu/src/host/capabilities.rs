//! What an IOMMU can do, decoded from its registers.

use pgtable_formats::context::smmuv3::{Caps, IdRegisters, Idr0, Idr1, Idr3, StallModel};
use pgtable_formats::context::vtd::{self, Cap, CapRegisters, Ecap};
use serde::Serialize;
use viommu_host_iommufd::kernel::{HwInfo, HwKind};
use viommu_host_iommufd::sysfs::IommuKind;

/// The registers of an IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Registers {
    /// SMMU_IDR0 to SMMU_IDR5, SMMU_IIDR, SMMU_AIDR.
    Smmuv3 { idr: [u32; 6], iidr: u32, aidr: u32 },
    /// Capability and extended capability register.
    Vtd { cap: u64, ecap: u64 },
    /// The extended feature registers.
    Amd { efr: u64, efr2: u64 },
}

/// What an IOMMU can do. A field that is absent does not apply, or is not told by this kind's registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Capabilities {
    /// Translation by a guest's tables.
    pub(super) first_stage: bool,
    /// Translation by the host's tables.
    pub(super) second_stage: bool,
    /// Both, one after the other: what a handover needs.
    pub(super) nested: bool,
    /// Page sizes that a guest's tables can be made of, in bytes.
    pub(super) granules: Vec<u64>,
    /// Levels that a guest's tables can have, where it is not the granule that decides.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) levels: Vec<u8>,
    /// Bits of the addresses that devices use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) input_bits: Option<u8>,
    /// Bits of the addresses that come out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) output_bits: Option<u8>,
    /// Bits of a PASID; 0: none.
    pub(super) pasid_bits: u8,
    /// PASID tables of two levels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) two_level_pasid_table: Option<bool>,
    /// Bits of an ASID.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) asid_bits: Option<u8>,
    /// Whether faulting accesses can wait: `never`, `may`, `always`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) stall: Option<&'static str>,
    /// Address translation services of PCI.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ats: Option<bool>,
    /// Page requests of PCI.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) page_requests: Option<bool>,
    /// The hardware can mark which pages were written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) dirty_tracking: Option<bool>,
    /// Invalidation of a range by one command.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) range_invalidation: Option<bool>,
    /// SMMUv3: the second stage can force write-back (IDR3.FWB).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) forced_write_back: Option<bool>,
    /// VT-d: scalable mode.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) scalable_mode: Option<bool>,
}

impl Registers {
    /// From what sysfs told.
    pub(super) fn from_sysfs(kind: IommuKind) -> Option<Self> {
        match kind {
            IommuKind::Vtd(registers) => registers.map(|CapRegisters { cap, ecap }| Self::Vtd { cap, ecap }),
            IommuKind::Amd(features) => features.map(|(efr, efr2)| Self::Amd { efr, efr2 }),
            _ => None,
        }
    }

    /// From what the kernel answered.
    pub(super) fn from_kernel(info: &HwInfo) -> Option<Self> {
        match info.kind {
            HwKind::Smmuv3 { idr, iidr, aidr, .. } => Some(Self::Smmuv3 { idr, iidr, aidr }),
            HwKind::Vtd { cap, ecap, .. } => Some(Self::Vtd { cap, ecap }),
            HwKind::Amd { efr, efr2 } => Some(Self::Amd { efr, efr2 }),
            HwKind::None | HwKind::Other(_) => None,
        }
    }

    pub(super) fn decode(self) -> Capabilities {
        match self {
            Self::Smmuv3 { idr, .. } => smmuv3(idr),
            Self::Vtd { cap, ecap } => intel(CapRegisters { cap, ecap }),
            Self::Amd { efr, efr2 } => amd(efr, efr2),
        }
    }
}

fn smmuv3([idr0, idr1, _, idr3, _, idr5]: [u32; 6]) -> Capabilities {
    let caps = Caps::from_registers(IdRegisters { idr0, idr1, idr3, idr5 });
    let (bits0, bits1, bits3) = (Idr0::from_bits(idr0), Idr1::from_bits(idr1), Idr3::from_bits(idr3));
    let granules = [(caps.granule_4k, 1 << 12), (caps.granule_16k, 1 << 14), (caps.granule_64k, 1 << 16)];
    Capabilities {
        first_stage: bits0.s1p(),
        second_stage: bits0.s2p(),
        nested: bits0.s1p() && bits0.s2p(),
        granules: granules.into_iter().filter_map(|(has, size)| has.then_some(size)).collect(),
        input_bits: Some(caps.input_bits),
        output_bits: Some(caps.oas_bits),
        pasid_bits: bits1.ssidsize().min(20),
        two_level_pasid_table: Some(caps.two_level_cd),
        asid_bits: Some(if caps.asid16 { 16 } else { 8 }),
        stall: Some(match caps.stall_model {
            StallModel::Both => "may",
            StallModel::Terminate => "never",
            StallModel::Stall => "always",
        }),
        ats: Some(bits0.ats()),
        page_requests: Some(bits0.pri()),
        dirty_tracking: Some(matches!(bits0.httu(), 2 | 3)),
        range_invalidation: Some(bits3.ril()),
        forced_write_back: Some(bits3.fwb()),
        ..Capabilities::default()
    }
}

fn intel(registers: CapRegisters) -> Capabilities {
    let caps = vtd::Caps::from_registers(registers);
    let (cap, ecap) = (Cap::from_bits(registers.cap), Ecap::from_bits(registers.ecap));
    let mut granules = vec![1 << 12, 1 << 21];
    granules.extend(caps.fs1gp.then_some(1 << 30));
    let mut levels = vec![4];
    levels.extend(caps.fs5lp.then_some(5));
    let first_stage = caps.first_stage;
    Capabilities {
        first_stage,
        second_stage: !ecap.smts() || ecap.ssts(),
        nested: first_stage && ecap.ssts() && ecap.nest(),
        granules: if first_stage { granules } else { Vec::new() },
        levels: if first_stage { levels } else { Vec::new() },
        input_bits: first_stage.then_some(if caps.fs5lp { 57 } else { 48 }),
        output_bits: Some(caps.haw),
        pasid_bits: caps.pasid_bits,
        ats: Some(ecap.dt()),
        page_requests: Some(ecap.prs() && ecap.pds()),
        dirty_tracking: Some(ecap.slads() && ecap.smpwc()),
        range_invalidation: Some(cap.psi()),
        scalable_mode: Some(ecap.smts()),
        ..Capabilities::default()
    }
}

/// EFR: PPRSup 1, GTSup 4, PASmax 36:32 (bits less one), GIOSup 48, HDSup 52. EFR2: GCR3TRPMode 3.
fn amd(efr: u64, efr2: u64) -> Capabilities {
    let bit = |register: u64, bit: u32| register >> bit & 1 != 0;
    let first_stage = bit(efr, 4);
    let pasid_bits = u8::try_from(efr >> 32 & 0x1f).unwrap_or(0) + 1;
    Capabilities {
        first_stage,
        second_stage: true,
        nested: first_stage && bit(efr, 48) && bit(efr2, 3),
        granules: if first_stage { vec![1 << 12, 1 << 21, 1 << 30] } else { Vec::new() },
        pasid_bits: if first_stage { pasid_bits.min(20) } else { 0 },
        page_requests: Some(bit(efr, 1)),
        dirty_tracking: Some(bit(efr, 52)),
        ..Capabilities::default()
    }
}

impl Capabilities {
    /// Lines for a reader: what, and how much of it.
    pub(super) fn lines(&self) -> Vec<(&'static str, String)> {
        let mut lines = vec![("stages", self.stages().to_owned())];
        let joined = |sizes: &[u64]| sizes.iter().map(|&size| size_text(size)).collect::<Vec<_>>().join(", ");
        if !self.granules.is_empty() {
            lines.push(("page sizes", joined(&self.granules)));
        }
        if !self.levels.is_empty() {
            let levels: Vec<_> = self.levels.iter().map(u8::to_string).collect();
            lines.push(("table levels", levels.join(" or ")));
        }
        let addresses = [(self.input_bits, "in"), (self.output_bits, "out")];
        let addresses: Vec<_> =
            addresses.into_iter().filter_map(|(bits, way)| Some(format!("{} bits {way}", bits?))).collect();
        if !addresses.is_empty() {
            lines.push(("addresses", addresses.join(", ")));
        }
        lines.push(("PASIDs", self.pasids()));
        let asids = self.asid_bits.map(|bits| format!("{bits} bits"));
        let stall = self.stall.map(|stall| {
            match stall {
                "may" => "can wait for a page (stall)",
                "always" => "always wait for a page (stall)",
                _ => "end at once (no stall)",
            }
            .to_owned()
        });
        let flag = |flag: Option<bool>| flag.map(|flag| if flag { "yes" } else { "no" }.to_owned());
        let rest = [
            ("ASIDs", asids),
            ("faulting DMA", stall),
            ("ATS", flag(self.ats)),
            ("page requests", flag(self.page_requests)),
            ("dirty tracking", flag(self.dirty_tracking)),
            (
                "ranges",
                self.range_invalidation.map(|range| {
                    if range { "invalidated by one command" } else { "invalidated page by page" }.to_owned()
                }),
            ),
        ];
        lines.extend(rest.into_iter().filter_map(|(label, text)| Some((label, text?))));
        lines
    }

    fn stages(&self) -> &'static str {
        match (self.nested, self.first_stage, self.second_stage) {
            (true, ..) => "guest's and host's, one after the other (nested)",
            (false, true, true) => "guest's or host's, not both at once",
            (false, true, false) => "one, of tables as a guest has them",
            (false, false, _) => "the host's alone",
        }
    }

    fn pasids(&self) -> String {
        match (self.pasid_bits, self.two_level_pasid_table) {
            (0, _) => "none: one address space for each device".to_owned(),
            (bits, Some(true)) => format!("{bits} bits, tables of one or two levels"),
            (bits, Some(false)) => format!("{bits} bits, tables of one level"),
            (bits, None) => format!("{bits} bits"),
        }
    }
}

fn size_text(bytes: u64) -> String {
    match bytes.trailing_zeros() {
        30.. => format!("{} GiB", bytes >> 30),
        20.. => format!("{} MiB", bytes >> 20),
        _ => format!("{} KiB", bytes >> 10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Registers of QEMU's SMMUv3 with both stages.
    #[test]
    fn smmuv3_of_qemu() {
        let idr = [0x0d44_101b, 0x0273_0010, 0, 0x1414, 0, 0x74];
        let caps = Registers::Smmuv3 { idr, iidr: 0, aidr: 1 }.decode();
        assert!(caps.nested);
        assert_eq!(caps.granules, [0x1000, 0x4000, 0x1_0000]);
        assert_eq!((caps.input_bits, caps.output_bits), (Some(48), Some(44)));
        assert_eq!((caps.pasid_bits, caps.asid_bits), (0, Some(16)));
        assert_eq!((caps.stall, caps.ats, caps.page_requests), (Some("never"), Some(false), Some(false)));
        assert_eq!((caps.range_invalidation, caps.forced_write_back), (Some(true), Some(false)));
    }

    /// Registers of QEMU's VT-d: first or second stage, never both.
    #[test]
    fn vtd_of_qemu() {
        let second = Registers::Vtd { cap: 0x80d2_008c_222f_0606, ecap: 0x4800_80f0_0f4a }.decode();
        assert_eq!((second.first_stage, second.second_stage, second.nested), (false, true, false));
        let first = Registers::Vtd { cap: 0x81d2_008c_222f_0606, ecap: 0x8d3a_20f0_0f4e }.decode();
        assert_eq!((first.first_stage, first.second_stage, first.nested), (true, false, false));
        assert_eq!(
            (first.page_requests, first.ats, first.scalable_mode),
            (Some(true), Some(true), Some(true))
        );
        assert_eq!(first.granules.last(), Some(&(1 << 30)));
    }

    #[test]
    fn amd_of_qemu() {
        let caps = Registers::Amd { efr: 0x29d3, efr2: 0 }.decode();
        assert_eq!((caps.first_stage, caps.nested, caps.page_requests), (true, false, Some(true)));
    }
}
