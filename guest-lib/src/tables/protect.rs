//! What mappings allow, changed in place.

use alloc::vec::Vec;

use pgtable_formats::edit::EditError;
use pgtable_formats::format::{Attrs, Entry, Format};
use pgtable_formats::visit::Leaf;
use pgtable_formats::{Gpa, IovaRange, TableMem};

use super::change::{covered, first_leaf};

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
    let mut rest = Some(range);
    while let Some(part) = rest {
        let Some(leaf) = first_leaf(format, memory, part)? else { break };
        let covered = covered(&leaf);
        let old = format.attrs(leaf.level, leaf.entry);
        let new = permitting(old, attrs);
        if new != old {
            if range.covers(covered) && !format.is_contiguous(leaf.entry) {
                replace(format, memory, &leaf, attrs)?;
            } else {
                let start = covered.start().max(part.start());
                let output = Gpa(leaf.output.0 + (start.0 - leaf.iova.0));
                let piece = IovaRange::new(start, covered.last().min(part.last()));
                anew.extend(piece.map(|range| Piece { range, output, attrs: new }));
            }
        }
        rest = covered.last().checked_add(1).and_then(|next| IovaRange::new(next, range.last()));
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
