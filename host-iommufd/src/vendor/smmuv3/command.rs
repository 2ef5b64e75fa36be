//! Commands, as `iommu_viommu_arm_smmuv3_invalidate` takes them (IHI 0070, 4.3 to 4.5).

use bitfield_struct::bitfield;
use pgtable_formats::Pasid;
use pgtable_formats::leaf::vmsav8::Granule;

use super::range::Pages;
use crate::vendor::block::Block;

/// A command. Each comes out of [`words`](Self::words) with the fields that are named here, and all others 0: the
/// kernel fills the VMID in and puts the StreamID in the place of the vSID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// CMD_TLBI_NH_ALL: all translations of the guest.
    NhAll,
    /// CMD_TLBI_NH_ASID: those of one ASID, but for the global ones.
    NhAsid { asid: u16 },
    /// CMD_TLBI_NH_VA: those of the pages that are of one ASID or global. CMD_TLBI_NH_VAA: of any ASID (`None`).
    /// `leaf`: those from leaf entries only.
    NhVa { asid: Option<u16>, pages: Pages, leaf: bool },
    /// CMD_CFGI_CD with LEAF=0: the context descriptor of one PASID, and the level-1 entry that leads to it. The
    /// kernel refuses SSV, which tells a SubstreamID of 0 from none; both use descriptor 0.
    CfgiCd { vsid: u32, pasid: Pasid },
    /// CMD_CFGI_CD_ALL: all context descriptors of a stream.
    CfgiCdAll { vsid: u32 },
    /// CMD_ATC_INV: what the device itself has cached of a block of addresses.
    AtcInv { vsid: u32, tag: AtcTag, block: Block },
}

/// Which translations of a device an ATC_INV is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AtcTag {
    /// SSV=0: no PASID goes out with it.
    Untagged,
    /// SSV=1.
    Pasid(Pasid),
    /// SSV=1, Global=1.
    EveryPasid,
}

impl Command {
    /// The two words of the command queue.
    pub(super) const fn words(self) -> [u64; 2] {
        match self {
            Self::NhAll => [Tlbi0::new().with_op(OP_TLBI_NH_ALL).into_bits(), 0],
            Self::NhAsid { asid } => [Tlbi0::new().with_op(OP_TLBI_NH_ASID).with_asid(asid).into_bits(), 0],
            Self::NhVa { asid, pages, leaf } => {
                let word0 = match asid {
                    Some(asid) => Tlbi0::new().with_op(OP_TLBI_NH_VA).with_asid(asid),
                    None => Tlbi0::new().with_op(OP_TLBI_NH_VAA),
                };
                let word1 = Tlbi1::new().with_leaf(leaf);
                match pages {
                    Pages::One { frame } => [word0.into_bits(), word1.with_address(frame).into_bits()],
                    Pages::Many { frame, granule, num, scale } => [
                        word0.with_num(num).with_scale(scale).into_bits(),
                        word1.with_tg(tg(granule)).with_address(frame).into_bits(),
                    ],
                }
            }
            Self::CfgiCd { vsid, pasid } => {
                [Stream0::new().with_op(OP_CFGI_CD).with_ssid(pasid.value()).with_sid(vsid).into_bits(), 0]
            }
            Self::CfgiCdAll { vsid } => {
                [Stream0::new().with_op(OP_CFGI_CD_ALL).with_sid(vsid).into_bits(), 0]
            }
            Self::AtcInv { vsid, tag, block } => {
                let word0 = Stream0::new().with_op(OP_ATC_INV).with_sid(vsid);
                let word0 = match tag {
                    AtcTag::Untagged => word0,
                    AtcTag::Pasid(pasid) => word0.with_ssv(true).with_ssid(pasid.value()),
                    AtcTag::EveryPasid => word0.with_ssv(true).with_global(true),
                };
                let word1 = Atc1::new().with_size(block.size()).with_address(block.frame());
                [word0.into_bits(), word1.into_bits()]
            }
        }
    }
}

/// The field TG.
const fn tg(granule: Granule) -> u8 {
    match granule {
        Granule::K4 => 1,
        Granule::K16 => 2,
        Granule::K64 => 3,
    }
}

const OP_CFGI_CD: u8 = 0x05;
const OP_CFGI_CD_ALL: u8 = 0x06;
const OP_TLBI_NH_ALL: u8 = 0x10;
const OP_TLBI_NH_ASID: u8 = 0x11;
const OP_TLBI_NH_VA: u8 = 0x12;
const OP_TLBI_NH_VAA: u8 = 0x13;
const OP_ATC_INV: u8 = 0x40;

/// Bits 63:0 of a TLBI (IHI 0070, 4.4).
#[bitfield(u64)]
struct Tlbi0 {
    /// Bits 7:0.
    op: u8,
    /// Bits 11:8.
    #[bits(4)]
    __: u8,
    /// Bits 16:12, NUM.
    #[bits(5)]
    num: u8,
    /// Bits 19:17.
    #[bits(3)]
    __: u8,
    /// Bits 24:20, SCALE. Bit 25 needs IDR5.DS and is not used.
    #[bits(5)]
    scale: u8,
    /// Bits 31:25.
    #[bits(7)]
    __: u8,
    /// Bits 47:32, VMID: the kernel's.
    __: u16,
    /// Bits 63:48.
    asid: u16,
}

/// Bits 127:64 of a TLBI by address.
#[bitfield(u64)]
struct Tlbi1 {
    /// Bit 0: only what came from leaf entries.
    leaf: bool,
    /// Bits 7:1.
    #[bits(7)]
    __: u8,
    /// Bits 9:8, TTL: no hint.
    #[bits(2)]
    __: u8,
    /// Bits 11:10, TG: 0 no range, 1 4 KiB, 2 16 KiB, 3 64 KiB.
    #[bits(2)]
    tg: u8,
    /// Bits 63:12: the address divided by 4096.
    #[bits(52)]
    address: u64,
}

/// Bits 63:0 of CFGI_CD, CFGI_CD_ALL and ATC_INV (IHI 0070, 4.3, 4.5).
#[bitfield(u64)]
struct Stream0 {
    /// Bits 7:0.
    op: u8,
    /// Bit 8.
    __: bool,
    /// Bit 9, of ATC_INV.
    global: bool,
    /// Bit 10, SSec.
    __: bool,
    /// Bit 11, of ATC_INV.
    ssv: bool,
    /// Bits 31:12.
    #[bits(20)]
    ssid: u32,
    /// Bits 63:32.
    sid: u32,
}

/// Bits 127:64 of ATC_INV.
#[bitfield(u64)]
struct Atc1 {
    /// Bits 5:0: log2 of the number of 4 KiB pages; 52 is all addresses.
    #[bits(6)]
    size: u8,
    /// Bits 11:6.
    #[bits(6)]
    __: u8,
    /// Bits 63:12: the address divided by 4096.
    #[bits(52)]
    address: u64,
}
