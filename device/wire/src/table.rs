//! What ATTACH_TABLE binds: one meaning per format.

use pgtable_formats::{Gpa, Pasid};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::layout::{
    ArmPageTableLayout, AttachTableLayout, SmmuTableLayout, UnbindLayout, VtdPageTableLayout,
    VtdPasidTableLayout,
};
use crate::request::{pasid, zero};
use crate::{DecodeError, RequestType, numbers};

const KIND: RequestType = RequestType::AttachTable;
const LEN: usize = size_of::<AttachTableLayout>() - core::mem::offset_of!(AttachTableLayout, descriptor);

/// The table that an ATTACH_TABLE names. Register words are the guest's, not yet checked against the hardware.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableDescriptor {
    /// Take back the table of one PASID.
    Unbind {
        /// The PASID.
        pasid: Pasid,
    },
    /// An SMMUv3 context-descriptor table: the first two words of a stream table entry (IHI 0070, 5.2).
    Smmuv3 {
        /// Bits 63:0 of the entry.
        ste0: u64,
        /// Bits 127:64 of the entry.
        ste1: u64,
    },
    /// A VT-d first-stage page table for one PASID.
    VtdPageTable(VtdPageTable),
    /// A VT-d PASID directory.
    VtdPasidTable(VtdPasidTable),
    /// A VMSAv8-64 stage-1 page table for one PASID.
    ArmPageTable(ArmPageTable),
    /// A format that has no layout here.
    Other {
        /// The number found.
        format: u8,
    },
}

/// A VT-d first-stage page table for one PASID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VtdPageTable {
    /// The root table.
    pub pgd: Gpa,
    /// Bits 0 SRE, 1 EAFE, 2 WPE; others are the device's to refuse.
    pub flags: u64,
    /// Input width in bits.
    pub addr_width: u32,
    /// The PASID to bind; PASID 0 serves untagged DMA too.
    pub pasid: Pasid,
}

/// A VT-d scalable-mode PASID directory with what the context entry says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VtdPasidTable {
    /// The directory.
    pub directory: Gpa,
    /// log2 of the number of its entries.
    pub directory_lg2: u8,
    /// The PASID of untagged DMA.
    pub untagged: Pasid,
}

/// A VMSAv8-64 stage-1 page table for one PASID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArmPageTable {
    /// The PASID to bind.
    pub pasid: Pasid,
    /// Address space identifier.
    pub asid: u16,
    /// As TCR_EL1.
    pub tcr: u64,
    /// Table of the lower half.
    pub ttbr0: u64,
    /// Table of the upper half.
    pub ttbr1: u64,
    /// As MAIR_EL1.
    pub mair: u64,
}

impl TableDescriptor {
    /// The number of the format.
    pub const fn format(&self) -> u8 {
        match self {
            Self::Unbind { .. } => numbers::FORMAT_NONE,
            Self::Smmuv3 { .. } => numbers::FORMAT_ARM_SMMU3,
            Self::VtdPageTable(_) => numbers::FORMAT_INTEL_PT,
            Self::VtdPasidTable(_) => numbers::FORMAT_INTEL_PASID_TABLE,
            Self::ArmPageTable(_) => numbers::FORMAT_ARM_PT,
            Self::Other { format } => *format,
        }
    }

    pub(crate) fn decode(format: u8, bytes: &[u8; LEN]) -> Result<Self, DecodeError> {
        match format {
            numbers::FORMAT_NONE => {
                let layout: UnbindLayout = read(bytes)?;
                reserved(&layout.reserved)?;
                Ok(Self::Unbind { pasid: pasid(KIND, layout.pasid.get())? })
            }
            numbers::FORMAT_ARM_SMMU3 => {
                let layout: SmmuTableLayout = read(bytes)?;
                reserved(&layout.reserved)?;
                Ok(Self::Smmuv3 { ste0: layout.ste0.get(), ste1: layout.ste1.get() })
            }
            numbers::FORMAT_INTEL_PT => {
                let layout: VtdPageTableLayout = read(bytes)?;
                reserved(&layout.reserved)?;
                Ok(Self::VtdPageTable(VtdPageTable {
                    pgd: Gpa(layout.pgd.get()),
                    flags: layout.flags.get(),
                    addr_width: layout.addr_width.get(),
                    pasid: pasid(KIND, layout.pasid.get())?,
                }))
            }
            numbers::FORMAT_INTEL_PASID_TABLE => {
                let layout: VtdPasidTableLayout = read(bytes)?;
                reserved(&layout.reserved)?;
                Ok(Self::VtdPasidTable(VtdPasidTable {
                    directory: Gpa(layout.directory.get()),
                    directory_lg2: layout.directory_lg2,
                    untagged: pasid(KIND, layout.untagged.get())?,
                }))
            }
            numbers::FORMAT_ARM_PT => {
                let layout: ArmPageTableLayout = read(bytes)?;
                reserved(&layout.reserved0)?;
                reserved(&layout.reserved1)?;
                Ok(Self::ArmPageTable(ArmPageTable {
                    pasid: pasid(KIND, layout.pasid.get())?,
                    asid: layout.asid.get(),
                    tcr: layout.tcr.get(),
                    ttbr0: layout.ttbr0.get(),
                    ttbr1: layout.ttbr1.get(),
                    mair: layout.mair.get(),
                }))
            }
            format => Ok(Self::Other { format }),
        }
    }

    /// Format number and descriptor bytes. [`Other`](Self::Other) gives zero bytes.
    pub(crate) fn encode(&self) -> (u8, [u8; LEN]) {
        let mut bytes = [0; LEN];
        match self {
            Self::Unbind { pasid } => {
                let layout = UnbindLayout { pasid: pasid.value().into(), reserved: [0; 104] };
                bytes.copy_from_slice(layout.as_bytes());
            }
            Self::Smmuv3 { ste0, ste1 } => {
                let layout =
                    SmmuTableLayout { ste0: (*ste0).into(), ste1: (*ste1).into(), reserved: [0; 92] };
                bytes.copy_from_slice(layout.as_bytes());
            }
            Self::VtdPageTable(table) => {
                let layout = VtdPageTableLayout {
                    pgd: table.pgd.0.into(),
                    flags: table.flags.into(),
                    addr_width: table.addr_width.into(),
                    pasid: table.pasid.value().into(),
                    reserved: [0; 84],
                };
                bytes.copy_from_slice(layout.as_bytes());
            }
            Self::VtdPasidTable(table) => {
                let layout = VtdPasidTableLayout {
                    directory: table.directory.0.into(),
                    untagged: table.untagged.value().into(),
                    directory_lg2: table.directory_lg2,
                    reserved: [0; 95],
                };
                bytes.copy_from_slice(layout.as_bytes());
            }
            Self::ArmPageTable(table) => {
                let layout = ArmPageTableLayout {
                    pasid: table.pasid.value().into(),
                    asid: table.asid.into(),
                    reserved0: [0; 2],
                    tcr: table.tcr.into(),
                    ttbr0: table.ttbr0.into(),
                    ttbr1: table.ttbr1.into(),
                    mair: table.mair.into(),
                    reserved1: [0; 68],
                };
                bytes.copy_from_slice(layout.as_bytes());
            }
            Self::Other { .. } => {}
        }
        (self.format(), bytes)
    }
}

fn read<L: FromBytes + KnownLayout + Immutable>(bytes: &[u8; LEN]) -> Result<L, DecodeError> {
    const { assert!(size_of::<L>() == LEN) };
    L::read_from_bytes(bytes).map_err(|_| DecodeError::Short { kind: KIND, length: bytes.len() })
}

fn reserved(bytes: &[u8]) -> Result<(), DecodeError> {
    if zero(bytes) { Ok(()) } else { Err(DecodeError::Reserved { kind: KIND }) }
}
