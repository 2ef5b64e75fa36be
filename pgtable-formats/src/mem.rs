//! The memory that tables live in, as the formats and the walker see it.

use crate::Gpa;

/// The address is not in the guest's memory (or not in the part that may hold tables).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not in guest memory")]
pub struct NotMemory;

/// Guest memory that holds tables: one 64-bit load, one compare-exchange.
///
/// Implementors translate the guest-physical address through stage 2 and never read an entry twice for one
/// call: a guest may change its tables while they are walked.
pub trait TableMem {
    /// Loads the 64-bit little-endian word at `at`, which is a multiple of 8, in one access.
    ///
    /// # Errors
    /// [`NotMemory`] where no guest memory is behind `at`.
    fn load(&self, at: Gpa) -> Result<u64, NotMemory>;

    /// Replaces the word at `at` (a multiple of 8) by `new` if it is still `current`. `Ok(Err(seen))` gives the
    /// word found instead.
    ///
    /// # Errors
    /// [`NotMemory`] where no writable guest memory is behind `at`.
    fn compare_exchange(&self, at: Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, NotMemory>;

    /// Fills `words` with the words at `at`, `at + stride`, `at + 2 * stride` and so on (multiples of 8), each loaded as
    /// [`load`](Self::load) does, once. Ends before the first that is not in memory, and says how many were loaded; the rest
    /// of `words` stays as it is.
    ///
    /// An implementation that finds the memory once for many words makes reading whole tables cheap.
    #[inline]
    fn load_run(&self, at: Gpa, stride: u64, words: &mut [u64]) -> usize {
        let mut next = Some(at);
        let mut loaded = 0;
        for word in words {
            let Some(Ok(value)) = next.map(|at| self.load(at)) else { break };
            *word = value;
            loaded += 1;
            next = next.and_then(|at| at.checked_add(stride));
        }
        loaded
    }
}

impl<M: TableMem + ?Sized> TableMem for &M {
    #[inline]
    fn load(&self, at: Gpa) -> Result<u64, NotMemory> {
        (**self).load(at)
    }

    #[inline]
    fn compare_exchange(&self, at: Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, NotMemory> {
        (**self).compare_exchange(at, current, new)
    }

    #[inline]
    fn load_run(&self, at: Gpa, stride: u64, words: &mut [u64]) -> usize {
        (**self).load_run(at, stride, words)
    }
}

/// Where a builder gets the pages of its tables.
pub trait TableAlloc {
    /// A zeroed table of `1 << size_lg2` bytes, aligned to its size; `None` when there is none left.
    fn alloc(&mut self, size_lg2: u8) -> Option<Gpa>;

    /// Takes back a table that `alloc` gave with the same size and that nothing refers to any more.
    fn free(&mut self, table: Gpa, size_lg2: u8);
}
