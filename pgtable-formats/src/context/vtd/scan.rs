//! Reading a whole PASID directory, as one who mirrors it does.

use super::{DirectoryEntry, FaultReason, PasidEntry, PasidTable, PasidWord0, table::TABLE_BITS};
use crate::{Gpa, Pasid, TableMem, context};

/// PASID tables have 64 entries of 64 bytes.
const TABLE_ENTRIES: u32 = 1 << TABLE_BITS;
/// Entries that are read at once.
const RUN: usize = TABLE_ENTRIES as usize;

impl PasidTable {
    /// Reads every entry once, in ascending order of PASIDs, and gives `sink` those that are present, as
    /// [`lookup`](Self::lookup) judges them. Of others only the word with P is read; of PASID tables that are absent,
    /// malformed or not in memory nothing at all.
    ///
    /// With PASIDs disabled, or beyond what the capabilities know, just the entry of untagged requests is read.
    pub fn scan<M: TableMem>(
        &self,
        mem: &M,
        mut sink: impl FnMut(Pasid, Result<context::Context, FaultReason>),
    ) {
        let cut = self.scan_entries(mem, usize::MAX, |pasid, entry| {
            sink(pasid, entry.and_then(|entry| entry.judge(self.caps())));
        });
        debug_assert!(cut.is_none(), "a directory has no more tables than memory");
    }

    /// As [`scan`](Self::scan), but gives the entries as they are; an error is
    /// [`ENTRY_ACCESS`](FaultReason::ENTRY_ACCESS): part of the entry is not in memory.
    ///
    /// Reads at most `max_tables` PASID tables of 64 entries. Where more are present it ends, and gives the first PASID
    /// that it did not read; the entry of untagged requests is not read then if its PASID is greater.
    pub fn scan_entries<M: TableMem>(
        &self,
        mem: &M,
        max_tables: usize,
        mut sink: impl FnMut(Pasid, Result<PasidEntry, FaultReason>),
    ) -> Option<Pasid> {
        let end = self.tagged_end();
        // One place that calls it: inlined there, the words of an entry stay in registers.
        let mut visit = |pasid, at, word0| sink(pasid, entry_at(mem, at, word0));
        let (mut next, mut left) = (0, max_tables);
        while let Some(first) = Pasid::new(next).filter(|_| next < end) {
            let mut run = [0; RUN];
            let count = RUN.min((end - next).div_ceil(TABLE_ENTRIES) as usize);
            let loaded =
                mem.load_run(self.directory_entry(first), 8, run.get_mut(..count).unwrap_or_default());
            for index in present(&run) {
                let Some(table) = run.get(index as usize).and_then(|entry| self.present_table(*entry)) else {
                    continue;
                };
                let Some(first) = Pasid::new(next + index * TABLE_ENTRIES) else { break };
                left = match left.checked_sub(1) {
                    Some(left) => left,
                    None => return Some(first),
                };
                scan_table(mem, table, first, end, &mut visit);
            }
            // One that is not in memory is absent; there may be others behind it.
            next += TABLE_ENTRIES * u32::try_from((loaded + 1).min(RUN)).unwrap_or(1);
        }
        let untagged = self.untagged();
        if untagged.value() >= end {
            let directory = mem.load(self.directory_entry(untagged)).ok();
            let at = directory.and_then(|entry| self.present_table(entry));
            let at = at.map(|table| super::table::entry_in(table, untagged));
            if let Some((at, Ok(word0))) = at.map(|at| (at, mem.load(at)))
                && PasidWord0::from_bits(word0).present()
            {
                visit(untagged, at, word0);
            }
        }
        None
    }

    /// Reads the entry of `pasid` (`None`: untagged DMA).
    ///
    /// # Errors
    /// As [`lookup`](Self::lookup), before it judges the entry.
    pub fn fetch<M: TableMem>(&self, mem: &M, pasid: Option<Pasid>) -> Result<PasidEntry, FaultReason> {
        let at = self.locate(mem, self.select(pasid)?)?;
        entry_at(mem, at, mem.load(at).map_err(|_| FaultReason::ENTRY_ACCESS)?)
    }

    /// Where the table that a directory entry leads to is.
    #[inline]
    const fn present_table(&self, entry: u64) -> Option<Gpa> {
        let entry = DirectoryEntry::from_bits(entry);
        let table = entry.table() << 12;
        let is_legal = entry.present() && entry.reserved() == 0 && table >> self.caps().haw == 0;
        if is_legal { Some(Gpa(table)) } else { None }
    }
}

/// Gives `visit` the place and the first word of the entries of one table that are present. Those from `end` on belong to nobody.
#[inline]
fn scan_table<M: TableMem>(
    mem: &M,
    table: Gpa,
    first: Pasid,
    end: u32,
    visit: &mut impl FnMut(Pasid, Gpa, u64),
) {
    let mut words = [0; RUN];
    let count = TABLE_ENTRIES.min(end - first.value()) as usize;
    // What is not in memory stays 0: not present.
    mem.load_run(table, 64, words.get_mut(..count).unwrap_or_default());
    for index in present(&words) {
        let word0 = words.get(index as usize).copied().unwrap_or_default();
        if let Some(pasid) = Pasid::new(first.value() + index) {
            visit(pasid, Gpa(table.0 | u64::from(index) << 6), word0);
        }
    }
}

/// The indices of those with bit 0 (P of all entries) set. Most tables have few.
#[inline]
fn present(words: &[u64; RUN]) -> impl Iterator<Item = u32> + use<> {
    let (groups, _) = words.as_chunks::<8>();
    let mut rest = groups.iter().rev().fold(0_u64, |all, group| {
        let mut bits = 0;
        if group.iter().fold(0, |all, word| all | word) & 1 != 0 {
            bits = group.iter().rev().fold(0, |bits, word| bits << 1 | word & 1);
        }
        all << 8 | bits
    });
    core::iter::from_fn(move || {
        let index = rest.trailing_zeros();
        rest &= rest.checked_sub(1)?;
        Some(index)
    })
}

/// The entry at `at`, whose first word was read.
// Not inlined, eight words are written to memory and at once read as wider ones, which takes longer than all the rest.
#[inline(always)]
fn entry_at<M: TableMem>(mem: &M, at: Gpa, word0: u64) -> Result<PasidEntry, FaultReason> {
    let word = |index: u64| mem.load(Gpa(at.0 + 8 * index)).map_err(|_| FaultReason::ENTRY_ACCESS);
    let words = [word0, word(1)?, word(2)?, word(3)?, word(4)?, word(5)?, word(6)?, word(7)?];
    Ok(PasidEntry::from_words(words))
}

#[cfg(test)]
mod tests {
    use alloc::collections::BTreeMap;
    use alloc::vec::Vec;
    use core::cell::Cell;

    use proptest::prelude::*;

    use super::*;
    use crate::NotMemory;
    use crate::context::vtd::{CapRegisters, Caps};
    use crate::suite::FlatMem;

    struct Counted<'a>(&'a FlatMem, Cell<usize>);

    impl TableMem for Counted<'_> {
        fn load(&self, at: Gpa) -> Result<u64, NotMemory> {
            self.1.set(self.1.get() + 1);
            self.0.load(at)
        }

        fn compare_exchange(&self, at: Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, NotMemory> {
            self.0.compare_exchange(at, current, new)
        }
    }

    fn caps() -> Caps {
        Caps::from_registers(CapRegisters::SOFTWARE)
    }

    /// 2^20 PASIDs with few present take one word for each directory entry, and little more.
    #[test]
    fn what_is_absent_is_not_read() {
        let mut memory = FlatMem::new(Gpa(0x4000_0000), 1 << 20);
        let table = PasidTable::create(14, Pasid::ZERO, &caps(), &mut memory).unwrap();
        for pasid in [0, 5, 63, 0xf_ffff] {
            table.write(&mut memory, Pasid::new(pasid).unwrap(), &PasidEntry::pass_through(1)).unwrap();
        }
        let counted = Counted(&memory, Cell::new(0));
        let mut seen = Vec::new();
        table.scan(&counted, |pasid, judged| seen.push((pasid.value(), judged)));
        let bypass = Ok(context::Context::Bypass);
        assert_eq!(seen, [0, 5, 63, 0xf_ffff].map(|pasid| (pasid, bypass)));
        assert_eq!(counted.1.get(), (1 << 14) + 2 * 64 + 4 * 7);
    }

    proptest! {
        /// It agrees with the lookup of every PASID, whatever is in memory.
        #[test]
        fn agrees_with_lookup(
            words in proptest::collection::vec((0u64..0x3000, any::<u64>(), any::<bool>()), 0..200),
            untagged in 0u32..1 << 13,
        ) {
            let memory = FlatMem::new(Gpa(0x4000_0000), 0x3000);
            for (at, value, is_pointer) in words {
                // Towards the tables of the test, or anything.
                let table = (0x4000_1000 + (value >> 8 & 0x3000)) | value & 3;
                memory.store(Gpa(0x4000_0000 + (at & !7)), if is_pointer { table } else { value }).unwrap();
            }
            let table = PasidTable::new(Gpa(0x4000_0000), 7, Pasid::new(untagged).unwrap(), &caps()).unwrap();
            let mut seen = BTreeMap::new();
            let mut last = None;
            table.scan(&memory, |pasid, judged| {
                assert!(last.replace(pasid).is_none_or(|last| last < pasid), "ascending");
                seen.insert(pasid, judged);
            });
            for pasid in (0..1 << 13).filter_map(Pasid::new) {
                match (table.lookup(&memory, Some(pasid)), seen.get(&pasid)) {
                    (Ok(context), Some(judged)) => prop_assert_eq!(Ok(context), *judged),
                    (Err(reason), Some(judged)) => prop_assert_eq!(Err(reason), *judged),
                    (Err(_), None) => {}
                    (Ok(_), None) => prop_assert!(false, "PASID {} was left out", pasid),
                }
            }
        }
    }
}
