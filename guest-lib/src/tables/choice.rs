//! What fits the hardware: formats, layouts, and how a descriptor is said.

use pgtable_formats::context::smmuv3;
use viommu_wire::{ArmPageTable, Features, PageRequestFlags, Pasid, numbers};

use super::pasid::Style;
use crate::probe::{Endpoint, Hardware};

/// Whether this library makes tables of `format` for `hardware`.
pub(super) fn is_known(format: u8, hardware: Hardware, style: Style) -> bool {
    let (known, its_style) = match (hardware, format) {
        (Hardware::Smmuv3(_), numbers::FORMAT_ARM_SMMU3) => (true, Style::Table),
        (Hardware::Smmuv3(_), numbers::FORMAT_ARM_PT) => (true, Style::Single),
        (Hardware::Vtd(_), numbers::FORMAT_INTEL_PASID_TABLE) => (true, Style::Table),
        (Hardware::Vtd(_), numbers::FORMAT_INTEL_PT) => (true, Style::Single),
        _ => (false, style),
    };
    known && (style == Style::Preferred || style == its_style)
}

/// What `cd` says, for ATTACH_TABLE.
pub(super) const fn arm_page_table(pasid: Pasid, cd: &smmuv3::Cd) -> ArmPageTable {
    let smmuv3::PageTableRegisters { asid, tcr, ttbr0, ttbr1, mair } = smmuv3::PageTableRegisters::of(cd);
    ArmPageTable { pasid, asid, tcr: tcr.into_bits(), ttbr0, ttbr1, mair }
}

/// Whether the SMMU is to stall what faults until the guest has answered, instead of ending it (IHI 0070, 3.12.2). An
/// endpoint that says it has page requests is one whose transactions may stall: what an SMMU with PRI hands on needs
/// no such bit, and a host without stalls says STALL_MODEL 1.
pub(super) fn stalls(features: Features, endpoint: &Endpoint, caps: &smmuv3::Caps) -> bool {
    features.contains(Features::PAGE_REQUEST)
        && endpoint.properties().page_requests.contains(PageRequestFlags::SUPPORTED)
        && caps.stall_model == smmuv3::StallModel::Both
}

/// A page where everything fits one; then two levels, with leaves of the size that keeps level 1 small.
pub(super) const fn smmuv3_format(pasid_bits: u8, caps: &smmuv3::Caps) -> smmuv3::TableFormat {
    match pasid_bits {
        _ if !caps.two_level_cd => smmuv3::TableFormat::Linear,
        0..=6 => smmuv3::TableFormat::Linear,
        7..=15 => smmuv3::TableFormat::TwoLevel4K,
        _ => smmuv3::TableFormat::TwoLevel64K,
    }
}
