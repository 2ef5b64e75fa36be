//! What the builders of context tables share.

use crate::{Gpa, NotMemory, Pasid, TableMem};

/// Why a context table was not changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BuildError {
    /// The capabilities do not allow such a table.
    #[error("the capabilities do not allow such a table")]
    Unsupported,
    /// The PASID lies outside of the table.
    #[error("PASID {0} lies outside of the table")]
    OutOfTable(Pasid),
    /// The allocator has no table left.
    #[error("no memory for a table")]
    NoTable,
    /// The entry is in use. Clear it and invalidate before it is written again: hardware may cache it in any state.
    #[error("the entry is in use")]
    InUse,
    /// The table does not lie in memory.
    #[error(transparent)]
    NotMemory(#[from] NotMemory),
}

/// log2 of the smallest piece that is asked of an allocator: tables share no page with anything else.
pub(super) const MIN_ALLOC_LG2: u8 = 12;

/// Stores a word of a table that this builder alone changes.
pub(super) fn store<M: TableMem>(mem: &M, at: Gpa, value: u64) -> Result<(), NotMemory> {
    let mut current = mem.load(at)?;
    while let Err(seen) = mem.compare_exchange(at, current, value)? {
        current = seen;
    }
    Ok(())
}

/// Writes an entry of eight words at `at`: first the others, then the one that `first` makes valid.
pub(super) fn store_entry<M: TableMem>(mem: &M, at: Gpa, words: [u64; 8]) -> Result<(), NotMemory> {
    let [first, rest @ ..] = words;
    for (offset, word) in (8..).step_by(8).zip(rest) {
        store(mem, Gpa(at.0 + offset), word)?;
    }
    store(mem, at, first)
}
