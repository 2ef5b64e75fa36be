//! A memory for tables that asserts it is used correctly.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::{Gpa, NotMemory, TableAlloc, TableMem};

/// A flat piece of guest memory: everything outside of it is [`NotMemory`].
#[derive(Debug)]
pub struct FlatMem {
    base: u64,
    words: Vec<AtomicU64>,
    /// Offset of the first byte that `alloc` has never given out.
    fresh: u64,
    /// Tables given back, by log2 of their size.
    spare: BTreeMap<u8, Vec<Gpa>>,
    live: BTreeMap<Gpa, u8>,
    /// How many more tables there may be; `None`: as many as fit.
    allowance: Option<usize>,
}

impl FlatMem {
    /// `bytes` of zeroed memory from `base` on, both multiples of 8.
    ///
    /// # Panics
    /// Where they are not, or where the memory does not fit the address space of the host.
    pub fn new(base: Gpa, bytes: usize) -> Self {
        assert!(base.0.is_multiple_of(8) && bytes.is_multiple_of(8), "memory consists of 64-bit words");
        let words = (0..bytes / 8).map(|_| AtomicU64::new(0)).collect();
        Self { base: base.0, words, fresh: 0, spare: BTreeMap::new(), live: BTreeMap::new(), allowance: None }
    }

    /// Writes the word at `at`, a multiple of 8.
    ///
    /// # Errors
    /// [`NotMemory`] outside of the memory.
    #[inline]
    pub fn store(&self, at: Gpa, value: u64) -> Result<(), NotMemory> {
        self.word(at)?.store(value, Ordering::Relaxed);
        Ok(())
    }

    /// How many tables were allocated and not given back.
    pub fn tables(&self) -> usize {
        self.live.len()
    }

    /// Lets `alloc` succeed `tables` more times (`None`: while there is room).
    pub fn allow_tables(&mut self, tables: Option<usize>) {
        self.allowance = tables;
    }

    #[inline]
    fn word(&self, at: Gpa) -> Result<&AtomicU64, NotMemory> {
        let offset = at.0.wrapping_sub(self.base) / 8;
        usize::try_from(offset).ok().and_then(|offset| self.words.get(offset)).ok_or(NotMemory)
    }
}

impl TableMem for FlatMem {
    #[inline]
    fn load(&self, at: Gpa) -> Result<u64, NotMemory> {
        Ok(self.word(at)?.load(Ordering::Relaxed))
    }

    #[inline]
    fn compare_exchange(&self, at: Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, NotMemory> {
        Ok(self.word(at)?.compare_exchange(current, new, Ordering::AcqRel, Ordering::Relaxed))
    }
}

impl TableAlloc for FlatMem {
    fn alloc(&mut self, size_lg2: u8) -> Option<Gpa> {
        self.allowance = match self.allowance {
            Some(left) => Some(left.checked_sub(1)?),
            None => None,
        };
        let size = 1 << size_lg2.max(3);
        let table = match self.spare.get_mut(&size_lg2).and_then(Vec::pop) {
            Some(table) => table,
            None => {
                let first = (self.base + self.fresh).checked_next_multiple_of(size)?;
                let end = first.checked_add(size)?.checked_sub(self.base)?;
                if end > self.words.len() as u64 * 8 {
                    return None;
                }
                self.fresh = end;
                Gpa(first)
            }
        };
        for offset in (0..size).step_by(8) {
            self.store(Gpa(table.0 + offset), 0).ok()?;
        }
        self.live.insert(table, size_lg2);
        Some(table)
    }

    /// # Panics
    /// Where `table` was not allocated with that size, or was given back before.
    fn free(&mut self, table: Gpa, size_lg2: u8) {
        assert_eq!(self.live.remove(&table), Some(size_lg2), "freed table {table} is not allocated");
        // A table that something still leads to is to be noticed.
        for offset in (0..1_u64 << size_lg2.max(3)).step_by(8) {
            let _ = self.store(Gpa(table.0 + offset), 0xdead_dead_dead_dead);
        }
        self.spare.entry(size_lg2).or_default().push(table);
    }
}
