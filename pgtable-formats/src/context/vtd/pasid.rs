//! Raw layouts of PASID directory entries and PASID entries, and the judgement of a PASID entry.

use bitfield_struct::bitfield;

use super::{Caps, FaultReason, FirstStage, FirstStageFlags};
use crate::{
    Gpa, context,
    leaf::x86::{X86Flags, X86Levels},
};

/// A PASID directory entry, 64 bits.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Hash)]
pub struct DirectoryEntry {
    /// Bit 0, P: present.
    pub present: bool,
    /// Bit 1, FPD: faults are not recorded.
    pub fault_disable: bool,
    /// Bits 11:2, reserved.
    #[bits(10)]
    pub reserved: u16,
    /// Bits 63:12, SMPTBLPTR: address of the PASID table divided by 4096.
    #[bits(52)]
    pub table: u64,
}

/// PASID entry bits 63:0.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Hash)]
pub struct PasidWord0 {
    /// Bit 0, P: present.
    pub present: bool,
    /// Bit 1, FPD: faults are not recorded.
    pub fault_disable: bool,
    /// Bits 4:2, AW: width of the second stage; ignored by the first.
    #[bits(3)]
    pub address_width: u8,
    /// Bit 5, reserved (SLEE in older revisions).
    pub slee: bool,
    /// Bits 8:6, PGTT: 1 first stage, 2 second stage, 3 nested, 4 pass-through.
    #[bits(3)]
    pub pgtt: u8,
    /// Bit 9, SSADE: accessed and dirty flags in the second stage.
    pub ssade: bool,
    /// Bits 11:10, reserved.
    #[bits(2)]
    pub reserved: u8,
    /// Bits 63:12, SSPTPTR: second-stage table divided by 4096; ignored by the first.
    #[bits(52)]
    pub second_stage: u64,
}

/// PASID entry bits 127:64.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Hash)]
pub struct PasidWord1 {
    /// Bits 15:0 (entry bits 79:64), DID: domain; a host substitutes its own.
    pub domain: u16,
    /// Bits 22:16 (86:80), reserved.
    #[bits(7)]
    pub reserved: u8,
    /// Bit 23 (87), PWSNP: page walks snoop.
    pub pwsnp: bool,
    /// Bit 24 (88), PGSNP: page accesses snoop.
    pub pgsnp: bool,
    /// Bit 25 (89), CD: cache disable.
    pub cache_disable: bool,
    /// Bit 26 (90), EMTE.
    pub emte: bool,
    /// Bits 29:27 (93:91), EMT.
    #[bits(3)]
    pub emt: u8,
    /// Bit 30 (94), PWT.
    pub pwt: bool,
    /// Bit 31 (95), PCD.
    pub pcd: bool,
    /// Bits 63:32 (127:96), PAT.
    pub pat: u32,
}

/// PASID entry bits 191:128.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Hash)]
pub struct PasidWord2 {
    /// Bit 0 (entry bit 128), SRE: privileged requests are enabled.
    pub sre: bool,
    /// Bit 1 (129), ERE: execute requests are enabled.
    pub ere: bool,
    /// Bits 3:2 (131:130), FSPM: 0 4 levels, 1 5 levels.
    #[bits(2)]
    pub fspm: u8,
    /// Bit 4 (132), WPE: read-only pages bind privileged writes.
    pub wpe: bool,
    /// Bit 5 (133), NXE.
    pub nxe: bool,
    /// Bit 6 (134), SMEP.
    pub smep: bool,
    /// Bit 7 (135), EAFE: extended-accessed flags.
    pub eafe: bool,
    /// Bits 11:8 (139:136), reserved.
    #[bits(4)]
    pub reserved: u8,
    /// Bits 63:12 (191:140), FSPTPTR: first-stage table divided by 4096.
    #[bits(52)]
    pub first_stage: u64,
}

/// A PASID entry, 512 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct PasidEntry {
    /// Bits 63:0.
    pub word0: PasidWord0,
    /// Bits 127:64.
    pub word1: PasidWord1,
    /// Bits 191:128.
    pub word2: PasidWord2,
    /// Bits 511:192, reserved.
    pub reserved: [u64; 5],
}

const _: () = assert!(size_of::<DirectoryEntry>() == 8 && size_of::<PasidEntry>() == 64);

const PGTT_FIRST_STAGE: u8 = 1;
const PGTT_PASS_THROUGH: u8 = 4;

/// Reserved for every type of entry: SLEE, SSADE (there is no second stage) and bits 11:10.
const RESERVED0: u64 = PasidWord0::new().with_slee(true).with_ssade(true).with_reserved(0b11).into_bits();
/// Reserved for every type: bits 86:80 and the memory types.
const RESERVED1: u64 = !PasidWord1::new().with_domain(u16::MAX).with_pwsnp(true).with_pgsnp(true).into_bits();
/// Reserved for a first-stage entry whatever the capabilities: ERE, NXE, SMEP and bits 139:136.
const RESERVED2: u64 =
    PasidWord2::new().with_ere(true).with_nxe(true).with_smep(true).with_reserved(0b1111).into_bits();

impl PasidEntry {
    /// The entry that eight words in the order of memory make.
    pub const fn from_words(words: [u64; 8]) -> Self {
        let [word0, word1, word2, reserved @ ..] = words;
        Self {
            word0: PasidWord0::from_bits(word0),
            word1: PasidWord1::from_bits(word1),
            word2: PasidWord2::from_bits(word2),
            reserved,
        }
    }

    /// The eight words in the order of memory.
    pub const fn words(&self) -> [u64; 8] {
        let [word3, word4, word5, word6, word7] = self.reserved;
        let (word0, word1, word2) = (self.word0.into_bits(), self.word1.into_bits(), self.word2.into_bits());
        [word0, word1, word2, word3, word4, word5, word6, word7]
    }

    /// A present entry that leads to a first-stage table; walks snoop.
    pub const fn first_stage(table: &FirstStage, domain: u16) -> Self {
        let flags = table.flags();
        Self {
            word0: PasidWord0::new().with_present(true).with_pgtt(PGTT_FIRST_STAGE),
            word1: PasidWord1::new().with_domain(domain).with_pwsnp(true),
            word2: PasidWord2::new()
                .with_sre(flags.contains(FirstStageFlags::SRE))
                .with_wpe(flags.contains(FirstStageFlags::WPE))
                .with_eafe(flags.contains(FirstStageFlags::EAFE))
                .with_fspm(if table.address_width() == 57 { 1 } else { 0 })
                .with_first_stage(table.root().0 >> 12),
            reserved: [0; 5],
        }
    }

    /// A present entry that bypasses stage 1.
    pub const fn pass_through(domain: u16) -> Self {
        Self {
            word0: PasidWord0::new().with_present(true).with_pgtt(PGTT_PASS_THROUGH),
            word1: PasidWord1::new().with_domain(domain),
            word2: PasidWord2::new(),
            reserved: [0; 5],
        }
    }

    /// Judges the entry.
    ///
    /// Reserved bits are those of the newest revision, and what no host interface can express: memory types (89 to
    /// 127), ERE, NXE and SMEP; SRE and WPE without ECAP.SRS, EAFE without ECAP.EAFS. Bits of FSPTPTR from the host
    /// address width on are reserved bits too. A root table that is narrow enough but not in memory is found by the
    /// walk (0x73). A pass-through entry ignores bits 191:128.
    ///
    /// # Errors
    /// In this order: 0x59 not present, 0x5a reserved bits, 0x5b a type (PGTT) or a number of levels (FSPM) that is
    /// not offered.
    // Inlined, the words stay in registers: every miss of a cache comes along here.
    #[inline(always)]
    pub fn judge(&self, caps: &Caps) -> Result<context::Context, FaultReason> {
        if !self.word0.present() {
            return Err(FaultReason::ENTRY_NOT_PRESENT);
        }
        let rest = self.reserved.iter().fold(0, |all, word| all | word);
        if self.word0.into_bits() & RESERVED0 | self.word1.into_bits() & RESERVED1 | rest != 0 {
            return Err(FaultReason::ENTRY_RESERVED);
        }
        match self.word0.pgtt() {
            PGTT_FIRST_STAGE => {}
            PGTT_PASS_THROUGH => return Ok(context::Context::Bypass),
            _ => return Err(FaultReason::ENTRY_INVALID),
        }
        let (word2, root) = (self.word2, Gpa(self.word2.first_stage() << 12));
        if word2.into_bits() & RESERVED2 != 0
            || (word2.sre() || word2.wpe()) && !caps.srs
            || word2.eafe() && !caps.eafs
            || root.0 >> caps.haw != 0
        {
            return Err(FaultReason::ENTRY_RESERVED);
        }
        let levels = match word2.fspm() {
            0 => X86Levels::Four,
            1 if caps.fs5lp => X86Levels::Five,
            _ => return Err(FaultReason::ENTRY_INVALID),
        };
        // SRE, WPE and EAFE: what else has a place there is reserved, but for FSPM, which has none.
        let [low, ..] = word2.into_bits().to_le_bytes();
        let flags = X86Flags::from_bits_truncate(low) - X86Flags::FS1GP;
        let table = FirstStage::assemble(root, levels, flags, caps).ok_or(FaultReason::ENTRY_INVALID)?;
        Ok(context::Context::Stage1(context::Stage1::Vtd(table)))
    }
}
