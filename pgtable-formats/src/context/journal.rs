//! In which order a builder writes.

use alloc::vec::Vec;
use core::cell::RefCell;

use crate::suite::FlatMem;
use crate::{Gpa, NotMemory, TableAlloc, TableMem};

/// Memory that records the order of writes.
pub(super) struct Journal {
    pub(super) memory: FlatMem,
    pub(super) writes: RefCell<Vec<(u64, u64)>>,
}

impl TableMem for Journal {
    fn load(&self, at: Gpa) -> Result<u64, NotMemory> {
        self.memory.load(at)
    }

    fn compare_exchange(&self, at: Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, NotMemory> {
        self.writes.borrow_mut().push((at.0, new));
        self.memory.compare_exchange(at, current, new)
    }
}

impl TableAlloc for Journal {
    fn alloc(&mut self, size_lg2: u8) -> Option<Gpa> {
        self.memory.alloc(size_lg2)
    }

    fn free(&mut self, table: Gpa, size_lg2: u8) {
        self.memory.free(table, size_lg2);
    }
}
