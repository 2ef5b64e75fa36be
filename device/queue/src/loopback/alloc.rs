//! The guest's memory management.

use std::collections::{BTreeMap, BTreeSet};

use pgtable_formats::{Gpa, NotMemory, TableAlloc, TableMem};
use viommu_guest::hal::GuestMem;

use super::memory::Memory;

/// Gives out blocks of memory, a power of two in size and aligned to it, zeroed; and knows what is out.
///
/// It is memory and allocator in one, as builders of tables want it.
#[derive(Debug)]
pub struct Alloc {
    memory: Memory,
    /// First address that was never given out; `None` behind the last one.
    next: Option<u64>,
    last: Gpa,
    /// Blocks that came back, by the log2 of their size.
    free: BTreeMap<u8, Vec<Gpa>>,
    live: BTreeSet<(Gpa, u8)>,
}

impl Alloc {
    /// Over the upper half of `memory`; the lower one is left to the user.
    pub fn new(memory: &Memory) -> Self {
        let (first, last) = (memory.first(), memory.last());
        Self::within(memory, Gpa(first.0 + (last.0 - first.0).div_ceil(2)), last)
    }

    /// Over `first..=last`, which should be memory. Two allocators over the same memory do not know of each other.
    pub fn within(memory: &Memory, first: Gpa, last: Gpa) -> Self {
        Self {
            memory: memory.clone(),
            next: Some(first.0),
            last,
            free: BTreeMap::new(),
            live: BTreeSet::new(),
        }
    }

    /// [`alloc`](TableAlloc::alloc), for those who cannot go on without.
    ///
    /// # Panics
    /// Where no such block is left.
    #[expect(clippy::expect_used, reason = "asked for")]
    pub fn take(&mut self, size_lg2: u8) -> Gpa {
        self.alloc(size_lg2).expect("a block of memory that is left")
    }

    /// How many blocks are out.
    pub fn live(&self) -> usize {
        self.live.len()
    }

    fn fresh(&mut self, size: u64) -> Option<Gpa> {
        let at = self.next?.checked_next_multiple_of(size)?;
        let last = at.checked_add(size - 1).filter(|last| *last <= self.last.0)?;
        self.next = last.checked_add(1);
        Some(Gpa(at))
    }
}

impl TableAlloc for Alloc {
    fn alloc(&mut self, size_lg2: u8) -> Option<Gpa> {
        const ZEROS: [u8; 4096] = [0; 4096];
        let size = 1u64.checked_shl(size_lg2.into())?;
        let at = match self.free.get_mut(&size_lg2).and_then(Vec::pop) {
            Some(at) => at,
            None => self.fresh(size)?,
        };
        // A fresh block, too: an allocator before this one may have given it out.
        for offset in (0..size).step_by(ZEROS.len()) {
            let piece = usize::try_from(size - offset).ok().and_then(|left| ZEROS.get(..left));
            self.memory.write(Gpa(at.0 + offset), piece.unwrap_or(&ZEROS)).ok()?;
        }
        self.live.insert((at, size_lg2));
        Some(at)
    }

    /// # Panics
    /// Where the block is not out.
    fn free(&mut self, table: Gpa, size_lg2: u8) {
        assert!(self.live.remove(&(table, size_lg2)), "{table} of 2^{size_lg2} bytes was not given out");
        self.free.entry(size_lg2).or_default().push(table);
    }
}

impl TableMem for Alloc {
    fn load(&self, at: Gpa) -> Result<u64, NotMemory> {
        self.memory.load(at)
    }

    fn compare_exchange(&self, at: Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, NotMemory> {
        self.memory.compare_exchange(at, current, new)
    }
}
