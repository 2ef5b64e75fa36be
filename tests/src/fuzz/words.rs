//! Memory that a fuzzer fills: mostly zero, with words that often lead back into it.

use pgtable_formats::Gpa;
use pgtable_formats::suite::FlatMem;

/// First address of the memory.
pub(super) const BASE: u64 = 0x4000_0000;
/// Its size in bytes.
pub(super) const SIZE: usize = 0x4_0000;

/// The bytes of an input, taken from the front; zeros when there are none left.
pub(super) struct Input<'a>(pub(super) &'a [u8]);

impl Input<'_> {
    pub(super) fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut taken = [0; N];
        let n = N.min(self.0.len());
        let (front, rest) = self.0.split_at(n);
        taken[..n].copy_from_slice(front);
        self.0 = rest;
        taken
    }

    pub(super) fn byte(&mut self) -> u8 {
        let [byte] = self.take();
        byte
    }

    pub(super) fn word(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    /// A word that is an address in the memory unless bit 62 says otherwise; attribute bits stay as they are.
    pub(super) fn entry(&mut self) -> u64 {
        let word = self.word();
        if word >> 62 & 1 == 1 { word } else { word & 0xfff0_0000_0003_ffff | BASE }
    }

    /// Fills memory from what is left: each ten bytes are the number of a word and its value.
    pub(super) fn memory(&mut self) -> FlatMem {
        let memory = FlatMem::new(Gpa(BASE), SIZE);
        while !self.0.is_empty() {
            let place = u64::from(u16::from_le_bytes(self.take())) % (SIZE as u64 / 8);
            memory.store(Gpa(BASE + place * 8), self.entry()).expect("a word of the memory");
        }
        memory
    }
}
