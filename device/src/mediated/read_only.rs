//! The window as a machine in software has it.

use pgtable_formats::{Gpa, NotMemory, TableMem};

use super::Window;
use crate::soft::Stage2;

/// Guest memory in which the window can be read and not written: what a [`SoftHost`](crate::soft::SoftHost) below a
/// [`Mediated`](super::Mediated) host walks through.
///
/// A kernel that is given the window as read-only memory does the same for hardware. A walk that a guest's tables lead
/// there finds descriptors where it looks for entries, and sets no flag in them. [`Mediated`](super::Mediated) itself has
/// the memory as it is.
#[derive(Clone, Debug)]
pub struct ReadOnlyWindow<M> {
    memory: M,
    window: Window,
}

impl<M> ReadOnlyWindow<M> {
    /// `memory`, without the right to write `window`.
    pub const fn new(memory: M, window: Window) -> Self {
        Self { memory, window }
    }
}

impl<M: TableMem> TableMem for ReadOnlyWindow<M> {
    #[inline]
    fn load(&self, at: Gpa) -> Result<u64, NotMemory> {
        self.memory.load(at)
    }

    #[inline]
    fn compare_exchange(&self, at: Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, NotMemory> {
        if self.window.touches(at, 8) {
            return Err(NotMemory);
        }
        self.memory.compare_exchange(at, current, new)
    }

    #[inline]
    fn load_run(&self, at: Gpa, stride: u64, words: &mut [u64]) -> usize {
        self.memory.load_run(at, stride, words)
    }
}

impl<M: Stage2> Stage2 for ReadOnlyWindow<M> {
    fn contains(&self, first: Gpa, last: Gpa) -> bool {
        self.memory.contains(first, last)
    }
}
