//! Reading a whole PASID directory, as one who mirrors it does.

use super::{DirectoryEntry, FaultReason, PasidEntry, PasidTable, PasidWord0, table::TABLE_BITS};
use crate::{Gpa, Pasid, TableMem, context};

/// PASID tables have 64 entries of 64 bytes.
const TABLE_ENTRIES: u32 = 1 << TABLE_BITS;

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
        let end = self.tagged_end();
        for first in (0..end).step_by(1 << TABLE_BITS) {
            let Some(pasid) = Pasid::new(first) else { break };
            let Some(table) = self.present_table(mem, pasid) else { continue };
            for index in 0..TABLE_ENTRIES.min(end - first) {
                let Some(pasid) = Pasid::new(first + index) else { break };
                let at = Gpa(table.0 | u64::from(index) << 6);
                match mem.load(at) {
                    Ok(word0) if PasidWord0::from_bits(word0).present() => {
                        sink(pasid, self.judge_at(mem, at, word0));
                    }
                    Ok(_) => {}
                    Err(_) => break,
                }
            }
        }
        let untagged = self.untagged();
        if untagged.value() >= end && self.is_present(mem, untagged) {
            sink(untagged, self.lookup(mem, None));
        }
    }

    /// Whether the entry of `pasid` has P set.
    fn is_present<M: TableMem>(&self, mem: &M, pasid: Pasid) -> bool {
        let table = self.present_table(mem, pasid);
        let word0 = table.and_then(|table| mem.load(super::table::entry_in(table, pasid)).ok());
        word0.is_some_and(|word0| PasidWord0::from_bits(word0).present())
    }

    fn present_table<M: TableMem>(&self, mem: &M, pasid: Pasid) -> Option<Gpa> {
        let entry = DirectoryEntry::from_bits(mem.load(self.directory_entry(pasid)).ok()?);
        let table = entry.table() << 12;
        (entry.present() && entry.reserved() == 0 && table >> self.caps().haw == 0).then_some(Gpa(table))
    }

    /// The entry at `at`, whose first word was read.
    fn judge_at<M: TableMem>(&self, mem: &M, at: Gpa, word0: u64) -> Result<context::Context, FaultReason> {
        let word = |index: u64| mem.load(Gpa(at.0 + 8 * index)).map_err(|_| FaultReason::ENTRY_ACCESS);
        let words = [word0, word(1)?, word(2)?, word(3)?, word(4)?, word(5)?, word(6)?, word(7)?];
        PasidEntry::from_words(words).judge(self.caps())
    }
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
