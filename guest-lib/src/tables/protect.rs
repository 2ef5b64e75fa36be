//! What mappings allow, changed in place.

use alloc::vec::Vec;

use pgtable_formats::edit::EditError;
use pgtable_formats::format::{Attrs, Entry, Format};
use pgtable_formats::visit::{Leaf, leaf_at};
use pgtable_formats::{Gpa, Iova, IovaRange, TableMem};

/// A piece of a mapping that is to be taken out and mapped anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) range: IovaRange,
    pub(super) output: Gpa,
    pub(super) attrs: Attrs,
}

/// Hardware may set flags in a leaf between a load and the store; it does so once or twice.
const ATTEMPTS: u32 = 8;

/// Lets the leaves that lie wholly in `range` allow what `attrs` says. Gives the pieces that cannot be changed so.
///
/// # Errors
/// [`EditError`]; leaves may have been changed.
pub(super) fn in_place<F: Format, M: TableMem>(
    format: &F,
    memory: &M,
    range: IovaRange,
    attrs: Attrs,
) -> Result<Vec<Piece>, EditError> {
    let page_mask = (1 << format.entry_lg2(0)) - 1;
    if range.start().0 & page_mask != 0 || range.last().0 & page_mask != page_mask {
        return Err(EditError::Unaligned);
    }
    let mut anew = Vec::new();
    let mut next = Some(range.start());
    while let Some(at) = next.filter(|at| *at <= range.last()) {
        let Some(leaf) = leaf_at(format, memory, at)? else {
            next = beyond(format, memory, at)?;
            continue;
        };
        let last = Iova(leaf.iova.0 | ((1 << leaf.size_lg2) - 1));
        let is_whole = range.contains(leaf.iova) && range.contains(last);
        let old = format.attrs(leaf.level, leaf.entry);
        let new = permitting(old, attrs);
        if new != old {
            if is_whole && !format.is_contiguous(leaf.entry) {
                replace(format, memory, &leaf, attrs)?;
            } else {
                let end = last.min(range.last());
                let output = Gpa(leaf.output.0 + (at.0 - leaf.iova.0));
                anew.extend(IovaRange::new(at, end).map(|range| Piece { range, output, attrs: new }));
            }
        }
        next = last.checked_add(1);
    }
    Ok(anew)
}

const fn permitting(old: Attrs, new: Attrs) -> Attrs {
    Attrs { user: new.user, write: new.write, execute: new.execute, ..old }
}

/// Stores the leaf with other permissions, again where hardware has meanwhile set flags in it.
fn replace<F: Format, M: TableMem>(
    format: &F,
    memory: &M,
    leaf: &Leaf,
    attrs: Attrs,
) -> Result<(), EditError> {
    let mut expected = leaf.entry;
    for _ in 0..ATTEMPTS {
        let attrs = permitting(format.attrs(leaf.level, expected), attrs);
        let new = format.leaf_entry(leaf.level, leaf.output, attrs).ok_or(EditError::Attrs)?;
        match memory.compare_exchange(leaf.at, expected, new)? {
            Ok(_) => return Ok(()),
            Err(seen) if format.decode(leaf.level, seen) == Entry::Leaf(leaf.output) => expected = seen,
            Err(_) => return Err(EditError::Raced),
        }
    }
    Err(EditError::Raced)
}

/// The first address behind the entry that ends the walk of `at`, which meets no leaf: a gap may be large.
///
/// # Errors
/// [`EditError::InputRange`] where the tables do not translate `at`; [`EditError::NotMemory`].
fn beyond<F: Format, M: TableMem>(format: &F, memory: &M, at: Iova) -> Result<Option<Iova>, EditError> {
    let access = pgtable_formats::Access { kind: pgtable_formats::AccessKind::Read, privileged: true };
    let index = format.admit(at, access).map_err(|_| EditError::InputRange)?;
    let (mut table, mut level) = (format.root(), format.top_level());
    loop {
        let entry = memory.load(Gpa(table.0 | format.index(level, index) << 3))?;
        match (format.decode(level, entry), level.checked_sub(1)) {
            (Entry::Table(next), Some(below)) => (table, level) = (next, below),
            _ => return Ok(Iova(at.0 | ((1 << format.entry_lg2(level)) - 1)).checked_add(1)),
        }
    }
}
