//! The registers in the answer of `IOMMU_GET_HW_INFO`.

use iommufd_bindings::iommufd::{
    iommu_hw_info_type_IOMMU_HW_INFO_TYPE_AMD as TYPE_AMD,
    iommu_hw_info_type_IOMMU_HW_INFO_TYPE_ARM_SMMUV3 as TYPE_ARM_SMMUV3,
    iommu_hw_info_type_IOMMU_HW_INFO_TYPE_INTEL_VTD as TYPE_INTEL_VTD,
    iommu_hw_info_type_IOMMU_HW_INFO_TYPE_NONE as TYPE_NONE,
};

use crate::kernel::HwKind;

/// Room for the registers of any kind: the longest known is 40 bytes, and the kernel fills what is left by zeros.
pub(super) const REGISTERS_LENGTH: usize = 128;

/// What `registers` are those of. `kind` is `out_data_type`.
pub(super) fn decode(kind: u32, registers: &[u8; REGISTERS_LENGTH]) -> HwKind {
    match kind {
        TYPE_NONE => HwKind::None,
        TYPE_INTEL_VTD => HwKind::Vtd {
            flags: word32(registers, 0),
            cap: word64(registers, 8),
            ecap: word64(registers, 16),
        },
        TYPE_ARM_SMMUV3 => HwKind::Smmuv3 {
            flags: word32(registers, 0),
            idr: std::array::from_fn(|index| word32(registers, 8 + 4 * index)),
            iidr: word32(registers, 32),
            aidr: word32(registers, 36),
        },
        TYPE_AMD => HwKind::Amd { efr: word64(registers, 0), efr2: word64(registers, 8) },
        other => HwKind::Other(other),
    }
}

fn word32(bytes: &[u8], offset: usize) -> u32 {
    let word = bytes.get(offset..).and_then(|rest| rest.first_chunk());
    word.map_or(0, |word| u32::from_ne_bytes(*word))
}

fn word64(bytes: &[u8], offset: usize) -> u64 {
    let word = bytes.get(offset..).and_then(|rest| rest.first_chunk());
    word.map_or(0, |word| u64::from_ne_bytes(*word))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers(words: &[u32]) -> [u8; REGISTERS_LENGTH] {
        let mut bytes = [0; REGISTERS_LENGTH];
        for (place, word) in bytes.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn smmuv3_of_qemu() {
        // The registers that QEMU 11.1's SMMU shows.
        let words = [1, 0, 0x0d44_101b, 0x0273_0010, 0, 0x1414, 0, 0x74, 0x43b, 1];
        let idr = [0x0d44_101b, 0x0273_0010, 0, 0x1414, 0, 0x74];
        assert_eq!(decode(2, &registers(&words)), HwKind::Smmuv3 { flags: 1, idr, iidr: 0x43b, aidr: 1 });
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn vtd_and_amd() {
        let words = [1, 0, 0x222f_0606, 0x80d2_008c, 0x80f0_0f4a, 0x4800];
        assert_eq!(
            decode(1, &registers(&words)),
            HwKind::Vtd { flags: 1, cap: 0x80d2_008c_222f_0606, ecap: 0x4800_80f0_0f4a }
        );
        assert_eq!(decode(4, &registers(&[0x29d3, 7, 2, 0])), HwKind::Amd { efr: 0x7_0000_29d3, efr2: 2 });
    }

    #[test]
    fn unknown_kinds_are_told() {
        assert_eq!(decode(0, &registers(&[9; 32])), HwKind::None);
        assert_eq!(decode(3, &registers(&[9; 32])), HwKind::Other(3));
        assert_eq!(decode(77, &registers(&[9; 32])), HwKind::Other(77));
    }
}
