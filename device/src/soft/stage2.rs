//! Stage 2: the guest's memory map.

use pgtable_formats::suite::FlatMem;
use pgtable_formats::{Gpa, NotMemory, TableMem};

/// Guest memory: the second stage of translation, through which tables are read.
pub trait Stage2: TableMem {
    /// Whether every byte of `first..=last` is guest memory.
    fn contains(&self, first: Gpa, last: Gpa) -> bool;
}

impl<M: Stage2 + ?Sized> Stage2 for &M {
    fn contains(&self, first: Gpa, last: Gpa) -> bool {
        (**self).contains(first, last)
    }
}

/// No guest memory: enough for bypass and mappings, where no table is read.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoMemory;

impl TableMem for NoMemory {
    fn load(&self, _: Gpa) -> Result<u64, NotMemory> {
        Err(NotMemory)
    }

    fn compare_exchange(&self, _: Gpa, _: u64, _: u64) -> Result<Result<u64, u64>, NotMemory> {
        Err(NotMemory)
    }
}

impl Stage2 for NoMemory {
    fn contains(&self, _: Gpa, _: Gpa) -> bool {
        false
    }
}

/// For tests and benchmarks.
impl Stage2 for FlatMem {
    fn contains(&self, first: Gpa, last: Gpa) -> bool {
        // One flat piece: what holds both ends holds all between.
        first <= last && [first, last].iter().all(|end| self.load(Gpa(end.0 & !7)).is_ok())
    }
}
