//! Raw layout of context descriptors (CD) and level-1 table entries, and how a guest fills one (IHI 0070, 5.3, 5.4).

use bitfield_struct::bitfield;

use super::{Caps, context_from_cd};
use crate::{
    Gpa, NotMemory, TableMem,
    context::build::{store, store_entry},
    leaf::vmsav8::Granule,
};

/// Level-1 context-descriptor-table entry (L1CD), 64 bits (IHI 0070, 5.3).
#[bitfield(u64)]
#[derive(PartialEq, Eq, Hash)]
pub struct L1Cd {
    /// Bit 0, V: the entry is valid.
    pub valid: bool,
    /// Bits 11:1, reserved.
    #[bits(11)]
    __: u16,
    /// Bits 51:12, L2Ptr: address of the level-2 table divided by 4096. With 64 KiB leaves bits 15:12 are reserved.
    #[bits(40)]
    pub l2_ptr: u64,
    /// Bits 63:52, reserved (55:52 are L2Ptr in SMMUv3.4).
    #[bits(12)]
    __: u16,
}

/// CD bits 63:0.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Hash)]
pub struct CdWord0 {
    /// Bits 5:0, T0SZ: the lower half translates `64 - T0SZ` bits.
    #[bits(6)]
    pub t0sz: u8,
    /// Bits 7:6, TG0: 0 4 KiB, 1 64 KiB, 2 16 KiB, 3 reserved.
    #[bits(2)]
    pub tg0: u8,
    /// Bits 9:8, IR0: inner cacheability of table walks.
    #[bits(2)]
    pub ir0: u8,
    /// Bits 11:10, OR0: outer cacheability.
    #[bits(2)]
    pub or0: u8,
    /// Bits 13:12, SH0: shareability.
    #[bits(2)]
    pub sh0: u8,
    /// Bit 14, EPD0: no walks in the lower half.
    pub epd0: bool,
    /// Bit 15, ENDI: the tables are big-endian.
    pub endi: bool,
    /// Bits 21:16, T1SZ: the upper half translates `64 - T1SZ` bits.
    #[bits(6)]
    pub t1sz: u8,
    /// Bits 23:22, TG1: 1 16 KiB, 2 4 KiB, 3 64 KiB, 0 reserved.
    #[bits(2)]
    pub tg1: u8,
    /// Bits 25:24, IR1.
    #[bits(2)]
    pub ir1: u8,
    /// Bits 27:26, OR1.
    #[bits(2)]
    pub or1: u8,
    /// Bits 29:28, SH1.
    #[bits(2)]
    pub sh1: u8,
    /// Bit 30, EPD1: no walks in the upper half.
    pub epd1: bool,
    /// Bit 31, V: the descriptor is valid.
    pub valid: bool,
    /// Bits 34:32, IPS: 0 to 7 mean 32, 36, 40, 42, 44, 48, 52, 56 bits of output address.
    #[bits(3)]
    pub ips: u8,
    /// Bit 35, AFFD: a clear access flag does not fault.
    pub affd: bool,
    /// Bit 36, WXN: what is writable is not executable.
    pub wxn: bool,
    /// Bit 37, UWXN: matters to VMSAv8-32 only.
    pub uwxn: bool,
    /// Bit 38, TBI0: bits 63:56 of lower-half addresses are ignored.
    pub tbi0: bool,
    /// Bit 39, TBI1: bits 63:56 of upper-half addresses are ignored.
    pub tbi1: bool,
    /// Bit 40, PAN: no privileged data access to what is accessible unprivileged.
    pub pan: bool,
    /// Bit 41, AA64: the tables are VMSAv8-64.
    pub aa64: bool,
    /// Bit 42, HD: hardware updates the dirty state.
    pub hd: bool,
    /// Bit 43, HA: hardware updates the access flag.
    pub ha: bool,
    /// Bit 44, S: faulting transactions stall.
    pub stall: bool,
    /// Bit 45, R: faults are recorded.
    pub record: bool,
    /// Bit 46, A: terminated transactions abort.
    pub abort: bool,
    /// Bit 47, ASET: the ASID is not shared with the processors' ASIDs.
    pub aset: bool,
    /// Bits 63:48, ASID.
    pub asid: u16,
}

/// CD bits 127:64.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Hash)]
pub struct CdWord1 {
    /// Bit 0 (CD bit 64), NSCFG0.
    pub nscfg0: bool,
    /// Bit 1 (65), HAD0: hierarchical attributes are ignored.
    pub had0: bool,
    /// Bit 2 (66), E0PD0: unprivileged access to the lower half faults.
    pub e0pd0: bool,
    /// Bit 3 (67), HAFT: hardware updates the access flag of table descriptors.
    pub haft: bool,
    /// Bits 51:4 (115:68), TTB0: address of the lower half's table divided by 16.
    #[bits(48)]
    pub ttb0: u64,
    /// Bits 55:52 (119:116), TTB0 of VMSAv9-128, otherwise reserved.
    #[bits(4)]
    pub ttb0_high: u8,
    /// Bits 57:56 (121:120), reserved.
    #[bits(2)]
    __: u8,
    /// Bit 58 (122), PnCH.
    pub pnch: bool,
    /// Bit 59 (123), EPAN: PAN covers what is only executable unprivileged.
    pub epan: bool,
    /// Bits 63:60 (127:124), HWU059 to HWU062.
    #[bits(4)]
    pub hwu0: u8,
}

/// CD bits 191:128.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Hash)]
pub struct CdWord2 {
    /// Bit 0 (CD bit 128), NSCFG1.
    pub nscfg1: bool,
    /// Bit 1 (129), HAD1: hierarchical attributes are ignored.
    pub had1: bool,
    /// Bit 2 (130), E0PD1: unprivileged access to the upper half faults.
    pub e0pd1: bool,
    /// Bit 3 (131), AIE: attribute index extension.
    pub aie: bool,
    /// Bits 51:4 (179:132), TTB1: address of the upper half's table divided by 16.
    #[bits(48)]
    pub ttb1: u64,
    /// Bits 55:52 (183:180), TTB1 of VMSAv9-128, otherwise reserved.
    #[bits(4)]
    pub ttb1_high: u8,
    /// Bits 57:56 (185:184), reserved.
    #[bits(2)]
    __: u8,
    /// Bit 58 (186), DS: 52-bit addresses with 4 KiB and 16 KiB granules.
    pub ds: bool,
    /// Bit 59 (187), PIE: permission indirection.
    pub pie: bool,
    /// Bits 63:60 (191:188), HWU159 to HWU162.
    #[bits(4)]
    pub hwu1: u8,
}

/// CD bits 383:320.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Hash)]
pub struct CdWord5 {
    /// Bits 31:0 (CD bits 351:320), implementation defined.
    pub impdef: u32,
    /// Bits 47:32 (367:352), PARTID.
    pub partid: u16,
    /// Bits 55:48 (375:368), PMG.
    pub pmg: u8,
    /// Bits 63:56 (383:376), reserved.
    #[bits(8)]
    __: u8,
}

/// A context descriptor, 512 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Cd {
    /// Bits 63:0.
    pub word0: CdWord0,
    /// Bits 127:64.
    pub word1: CdWord1,
    /// Bits 191:128.
    pub word2: CdWord2,
    /// Bits 255:192, MAIR: eight memory attributes of 8 bits.
    pub mair: u64,
    /// Bits 319:256, AMAIR.
    pub amair: u64,
    /// Bits 383:320.
    pub word5: CdWord5,
    /// Bits 447:384, PIIU in 431:384: unprivileged permission indirection, 16 x 3 bits.
    pub piiu: u64,
    /// Bits 511:448, PIIP in 495:448: privileged permission indirection, 16 x 3 bits.
    pub piip: u64,
}

const _: () = assert!(size_of::<L1Cd>() == 8 && size_of::<Cd>() == 64);

impl Cd {
    /// The descriptor that eight words in the order of memory make.
    pub const fn from_words(words: [u64; 8]) -> Self {
        let [word0, word1, word2, mair, amair, word5, piiu, piip] = words;
        Self {
            word0: CdWord0::from_bits(word0),
            word1: CdWord1::from_bits(word1),
            word2: CdWord2::from_bits(word2),
            mair,
            amair,
            word5: CdWord5::from_bits(word5),
            piiu,
            piip,
        }
    }

    /// Writes the descriptor at `at`, V last. What is there must not be valid.
    ///
    /// # Errors
    /// [`NotMemory`]: then it is not valid, either.
    pub fn store<M: TableMem>(&self, mem: &M, at: Gpa) -> Result<(), NotMemory> {
        store_entry(mem, at, self.words())
    }

    /// Writes the first word alone, which has V: takes a descriptor that is at `at` away (V=0), or gives it back.
    ///
    /// # Errors
    /// [`NotMemory`]: then nothing is written.
    pub fn store_valid<M: TableMem>(&self, mem: &M, at: Gpa, valid: bool) -> Result<(), NotMemory> {
        store(mem, at, self.word0.with_valid(valid).into_bits())
    }

    /// The eight words in the order of memory.
    pub const fn words(&self) -> [u64; 8] {
        [
            self.word0.into_bits(),
            self.word1.into_bits(),
            self.word2.into_bits(),
            self.mair,
            self.amair,
            self.word5.into_bits(),
            self.piiu,
            self.piip,
        ]
    }
}

/// One half of an address space that a guest describes in a [`CdSpec`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HalfSpec {
    /// The first table, aligned to its size and to 64 bytes.
    pub root: Gpa,
    /// The granule.
    pub granule: Granule,
    /// How many address bits the half translates: 25 to 48, further where the capabilities say so.
    pub input_bits: u8,
}

/// What a guest wants in a context descriptor.
///
/// The descriptor made of it ([`encode`](Self::encode)) records faults and aborts faulting transactions, walks
/// little-endian tables (big-endian where the capabilities know nothing else) through inner-shareable write-back
/// memory, and leaves flag updates to software.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CdSpec {
    /// The tag on cached translations; unique per address space. 8 bits where the capabilities lack `asid16`.
    pub asid: u16,
    /// Addresses with bit 55 clear; `None` faults them all.
    pub lower: Option<HalfSpec>,
    /// Addresses with bit 55 set; `None` faults them all.
    pub upper: Option<HalfSpec>,
    /// Bits of output address that the tables may hold; rounded up to what IPS can say.
    pub output_bits: u8,
    /// The tables use 52-bit addresses with a 4 KiB or 16 KiB granule (DS).
    pub ds: bool,
    /// Memory attributes by index; 0xff in byte 0 is normal write-back memory.
    pub mair: u64,
}

/// The capabilities do not allow the descriptor, or a root is not aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no legal context descriptor says this")]
pub struct SpecError;

impl CdSpec {
    /// The descriptor, valid (V=1).
    ///
    /// # Errors
    /// Where an SMMU with `caps` would answer C_BAD_CD, or would drop bits of a root.
    pub fn encode(&self, caps: &Caps) -> Result<Cd, SpecError> {
        const WRITE_BACK: u8 = 1;
        const INNER_SHAREABLE: u8 = 3;
        let mut word0 = CdWord0::new()
            .with_epd0(true)
            .with_epd1(true)
            .with_valid(true)
            .with_ips(size_code(self.output_bits).ok_or(SpecError)?)
            .with_endi(matches!(caps.endianness, super::TableEndianness::Big))
            .with_aa64(true)
            .with_stall(matches!(caps.stall_model, super::StallModel::Stall))
            .with_record(true)
            .with_abort(true)
            .with_aset(true)
            .with_asid(self.asid);
        let mut cd = Cd { word2: CdWord2::new().with_ds(self.ds), mair: self.mair, ..Cd::default() };
        if let Some(half) = self.lower {
            word0 = word0
                .with_epd0(false)
                .with_t0sz(half.size_field()?)
                .with_tg0(match half.granule {
                    Granule::K4 => 0,
                    Granule::K64 => 1,
                    Granule::K16 => 2,
                })
                .with_ir0(WRITE_BACK)
                .with_or0(WRITE_BACK)
                .with_sh0(INNER_SHAREABLE);
            cd.word1.set_ttb0(half.root_field()?);
        }
        if let Some(half) = self.upper {
            word0 = word0
                .with_epd1(false)
                .with_t1sz(half.size_field()?)
                .with_tg1(match half.granule {
                    Granule::K16 => 1,
                    Granule::K4 => 2,
                    Granule::K64 => 3,
                })
                .with_ir1(WRITE_BACK)
                .with_or1(WRITE_BACK)
                .with_sh1(INNER_SHAREABLE);
            cd.word2.set_ttb1(half.root_field()?);
        }
        cd.word0 = word0;
        let may_stall = word0.stall();
        context_from_cd(&cd.words(), caps, may_stall).map_err(|_| SpecError)?;
        Ok(cd)
    }
}

impl HalfSpec {
    fn size_field(&self) -> Result<u8, SpecError> {
        if !(16..=52).contains(&self.input_bits) {
            return Err(SpecError);
        }
        Ok(64 - self.input_bits)
    }

    fn root_field(&self) -> Result<u64, SpecError> {
        if self.root.0 >> 52 != 0 || !self.root.is_aligned(self.root_lg2()) {
            return Err(SpecError);
        }
        Ok(self.root.0 >> 4)
    }

    /// log2 of the first table's size in bytes, but at least 64 bytes.
    fn root_lg2(&self) -> u8 {
        let granule = self.granule.lg2();
        let stride = granule - 3;
        let resolved_here = match self.input_bits.saturating_sub(granule) % stride {
            0 => stride,
            rest => rest,
        };
        (resolved_here + 3).max(6)
    }
}

/// The IPS code of the smallest size that holds `bits`.
const fn size_code(bits: u8) -> Option<u8> {
    Some(match bits {
        0..=32 => 0,
        33..=36 => 1,
        37..=40 => 2,
        41..=42 => 3,
        43..=44 => 4,
        45..=48 => 5,
        49..=52 => 6,
        _ => return None,
    })
}
