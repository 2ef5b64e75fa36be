//! The platform's memory as the builders want it, with freed tables kept aside.

use alloc::vec::Vec;

use pgtable_formats::{Gpa, NotMemory, TableAlloc, TableMem};

use crate::hal::Platform;

/// Tables that nothing in memory leads to any more, but that the hardware may still read.
#[derive(Debug, Default)]
pub(super) struct Retired(Vec<(Gpa, u8)>);

impl Retired {
    pub(super) const fn len(&self) -> usize {
        self.0.len()
    }

    /// Gives all back but the first `keep`. The hardware must have forgotten them.
    pub(super) fn release_from<A: TableAlloc>(&mut self, keep: usize, alloc: &mut A) {
        for (table, size_lg2) in self.0.drain(keep.min(self.0.len())..) {
            alloc.free(table, size_lg2);
        }
    }
}

/// Memory and allocator as one, as the builders take them. What they free is retired.
pub(super) struct Lent<'a, P: Platform> {
    memory: &'a P::Memory,
    alloc: &'a mut P::Alloc,
    retired: &'a mut Retired,
}

impl<'a, P: Platform> Lent<'a, P> {
    pub(super) fn new(platform: &'a mut P, retired: &'a mut Retired) -> Self {
        let (memory, alloc) = platform.parts();
        Self { memory, alloc, retired }
    }
}

impl<P: Platform> TableMem for Lent<'_, P> {
    fn load(&self, at: Gpa) -> Result<u64, NotMemory> {
        self.memory.load(at)
    }

    fn compare_exchange(&self, at: Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, NotMemory> {
        self.memory.compare_exchange(at, current, new)
    }
}

impl<P: Platform> TableAlloc for Lent<'_, P> {
    fn alloc(&mut self, size_lg2: u8) -> Option<Gpa> {
        self.alloc.alloc(size_lg2)
    }

    fn free(&mut self, table: Gpa, size_lg2: u8) {
        self.retired.0.push((table, size_lg2));
    }
}
