//! Raw layout of the stream table entry words that a guest hands over (IHI 0070, 5.2).

use bitfield_struct::bitfield;

/// Stream table entry, bits 63:0.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Hash)]
pub struct Ste0 {
    /// Bit 0, V: the entry is valid. Ignored on binding: the request itself says so.
    pub valid: bool,
    /// Bits 3:1, Config: 4 bypass, 5 stage 1, 6 stage 2, 7 both. Ignored on binding, taken as 5.
    #[bits(3)]
    pub config: u8,
    /// Bits 5:4, S1Fmt: 0 linear, 1 two-level with 4 KiB leaves, 2 two-level with 64 KiB leaves, 3 reserved.
    #[bits(2)]
    pub s1_fmt: u8,
    /// Bits 51:6, S1ContextPtr: address of the CD table divided by 64.
    #[bits(46)]
    pub s1_context_ptr: u64,
    /// Bits 55:52, S1ContextPtr of SMMUv3.4. Ignored on binding.
    #[bits(4)]
    pub s1_context_ptr_high: u8,
    /// Bits 58:56, reserved.
    #[bits(3)]
    __: u8,
    /// Bits 63:59, S1CDMax: log2 of the number of CDs; 0 means that PASIDs are not allowed.
    #[bits(5)]
    pub s1_cd_max: u8,
}

/// Stream table entry, bits 127:64.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Hash)]
pub struct Ste1 {
    /// Bits 1:0 (entry bits 65:64), S1DSS: untagged DMA is 0 terminated, 1 bypassed, 2 sent through CD 0; 3 acts as 0.
    #[bits(2)]
    pub s1_dss: u8,
    /// Bits 3:2, S1CIR: inner cacheability of CD fetches.
    #[bits(2)]
    pub s1_cir: u8,
    /// Bits 5:4, S1COR: outer cacheability of CD fetches.
    #[bits(2)]
    pub s1_cor: u8,
    /// Bits 7:6, S1CSH: shareability of CD fetches.
    #[bits(2)]
    pub s1_csh: u8,
    /// Bits 26:8: fields that binding ignores (S2HWU, DRE, CONT, DCP, PPAR, MEV ...).
    #[bits(19)]
    __: u32,
    /// Bit 27 (entry bit 91), S1STALLD: transactions of this stream may not stall.
    pub s1_stalld: bool,
    /// Bits 29:28 (entry bits 93:92), EATS: 0 ATS off, 1 full ATS, 2 split-stage, 3 DPT.
    #[bits(2)]
    pub eats: u8,
    /// Bits 31:30, STRW: stream world. Ignored on binding: always non-secure EL1.
    #[bits(2)]
    pub strw: u8,
    /// Bits 63:32: fields that binding ignores (MemAttr, SHCFG, ALLOCCFG, PRIVCFG, INSTCFG ...).
    #[bits(32)]
    __: u32,
}

const _: () = assert!(size_of::<Ste0>() == 8 && size_of::<Ste1>() == 8);
