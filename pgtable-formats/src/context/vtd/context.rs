//! Raw layout of the scalable-mode context entry, 256 bits.

use bitfield_struct::bitfield;

/// Context entry bits 63:0.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Hash)]
pub struct ContextWord0 {
    /// Bit 0, P: present.
    pub present: bool,
    /// Bit 1, FPD: faults are not recorded.
    pub fault_disable: bool,
    /// Bit 2, DTE: device TLB (ATS) enabled.
    pub dte: bool,
    /// Bit 3, PASIDE: requests with PASIDs enabled.
    pub paside: bool,
    /// Bit 4, PRE: page requests enabled.
    pub pre: bool,
    /// Bits 8:5, reserved.
    #[bits(4)]
    pub reserved: u8,
    /// Bits 11:9, PDTS: the directory has `2^(PDTS + 7)` entries.
    #[bits(3)]
    pub pdts: u8,
    /// Bits 63:12, PASIDDIRPTR: address of the directory divided by 4096.
    #[bits(52)]
    pub directory: u64,
}

/// Context entry bits 127:64.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Hash)]
pub struct ContextWord1 {
    /// Bits 19:0 (entry bits 83:64), RID_PASID: the PASID of untagged requests.
    #[bits(20)]
    pub rid_pasid: u32,
    /// Bit 20 (84), RID_PRIV: untagged requests are privileged.
    pub rid_priv: bool,
    /// Bits 63:21, reserved.
    #[bits(43)]
    pub reserved: u64,
}

/// A scalable-mode context entry, 256 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct ContextEntry {
    /// Bits 63:0.
    pub word0: ContextWord0,
    /// Bits 127:64.
    pub word1: ContextWord1,
    /// Bits 255:128, reserved.
    pub reserved: [u64; 2],
}

const _: () = assert!(size_of::<ContextEntry>() == 32);

impl ContextEntry {
    /// The entry that four words in the order of memory make.
    pub const fn from_words(words: [u64; 4]) -> Self {
        let [word0, word1, word2, word3] = words;
        Self {
            word0: ContextWord0::from_bits(word0),
            word1: ContextWord1::from_bits(word1),
            reserved: [word2, word3],
        }
    }

    /// The four words in the order of memory.
    pub const fn words(&self) -> [u64; 4] {
        [self.word0.into_bits(), self.word1.into_bits(), self.reserved[0], self.reserved[1]]
    }
}
