//! What MAP requests created: the mappings of one domain.
//!
//! [`Mappings`] holds disjoint ranges of I/O virtual addresses of any size from one byte to the whole 64-bit space,
//! each with where it leads and what may pass. It is the only storage that a mapping has in the device.
//!
//! ```
//! use pgtable_formats::{Gpa, Iova, IovaRange};
//! use viommu_device::mapping::{MapFlags, Mapping, Mappings};
//!
//! let page = IovaRange::from_length(Iova(0x1000), 0x1000).ok_or("empty")?;
//! let mut mappings = Mappings::new();
//! mappings.insert(Mapping { range: page, output: Gpa(0x8000_0000), flags: MapFlags::READ })?;
//!
//! let found = mappings.lookup(Iova(0x1abc)).ok_or("not mapped")?;
//! assert_eq!(found.translate(Iova(0x1abc)), Some(Gpa(0x8000_0abc)));
//! assert_eq!(mappings.remove(IovaRange::ALL), Ok(1));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Cost
//! With *n* live mappings: insert, lookup and the check for overlap O(log *n*); removal O(log *n* + removed); walking
//! from one mapping to the next O(1). Where insertions go on from the last one, or removals from the last one, there is
//! no search. Growing and shrinking the tables of node headers is amortized: each node pays a constant share of it.
//!
//! # Memory
//! A full leaf costs 25 bytes for each mapping, and that is what an ascending or descending run of MAPs comes to.
//! Random order comes to about 32. A full node gives slots to its neighbours before it is split, and two neighbours
//! are joined when together they fit one node with an eighth to spare: so nodes are on average filled to more than
//! 7/16. Blocks of nodes that became empty go back to the allocator at once, and the table of node headers shrinks
//! when three quarters of it are unused. So no order of requests makes the store use more than 64 bytes for each *live*
//! mapping, and 8 KiB.

mod node;
#[cfg(test)]
mod tests;
mod tree;

use pgtable_formats::{Gpa, Iova, IovaRange};
pub use viommu_wire::MapFlags;

use tree::Tree;

/// Mappings in a leaf and children in an inner node. Larger ones cost more to shift, smaller ones more levels.
const LEAF: usize = 64;
const INNER: usize = 64;

/// One mapping: what one MAP request created.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mapping {
    /// The addresses that devices use.
    pub range: IovaRange,
    /// Where the first of them leads; the others follow on.
    pub output: Gpa,
    /// What may pass.
    pub flags: MapFlags,
}

impl Mapping {
    /// Where `iova` leads, or `None` where it lies outside of the range or the output address leaves the 64-bit space.
    #[inline]
    pub fn translate(&self, iova: Iova) -> Option<Gpa> {
        let offset = iova.0.checked_sub(self.range.start().0)?;
        if self.range.contains(iova) { self.output.checked_add(offset) } else { None }
    }
}

/// The range of a new mapping is not free (D-31).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{existing} is already mapped")]
pub struct Overlap {
    /// The lowest mapping in the way.
    pub existing: IovaRange,
}

/// A range to remove ends inside of a mapping (D-41).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the range ends inside of the mapping {mapping}")]
pub struct Split {
    /// The lowest mapping that would be left in part.
    pub mapping: IovaRange,
}

/// All mappings of a domain, disjoint and in the order of their addresses. See the [module](self) for cost and memory.
#[derive(Debug, Default)]
pub struct Mappings {
    tree: Tree<LEAF, INNER>,
}

impl Mappings {
    /// No mapping, and no memory.
    pub const fn new() -> Self {
        Self { tree: Tree::new() }
    }

    /// How many mappings there are.
    #[inline]
    pub const fn len(&self) -> usize {
        self.tree.len()
    }

    /// Whether there is none.
    #[inline]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds `mapping`.
    ///
    /// # Errors
    /// [`Overlap`] where any of its addresses is already mapped; nothing is changed then.
    #[inline]
    pub fn insert(&mut self, mapping: Mapping) -> Result<(), Overlap> {
        self.tree.insert(mapping)
    }

    /// Removes every mapping inside of `range` and says how many these were. Addresses of `range` that are not mapped
    /// do not matter (D-42).
    ///
    /// # Errors
    /// [`Split`] where a mapping lies inside of `range` in part only; nothing is removed then (D-41).
    #[inline]
    pub fn remove(&mut self, range: IovaRange) -> Result<usize, Split> {
        self.tree.remove(range)
    }

    /// The mapping that `iova` lies in.
    #[inline]
    pub fn lookup(&self, iova: Iova) -> Option<Mapping> {
        self.tree.lookup(iova)
    }

    /// Whether any address of `range` is mapped.
    #[inline]
    pub fn overlaps(&self, range: IovaRange) -> bool {
        self.overlapping(range).next().is_some()
    }

    /// The mappings with an address in `range`, ascending.
    #[inline]
    pub fn overlapping(&self, range: IovaRange) -> impl Iterator<Item = Mapping> + '_ {
        self.tree.from(range.start()).take_while(move |mapping| mapping.range.start() <= range.last())
    }

    /// All mappings, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Mapping> + '_ {
        self.tree.from(Iova(0))
    }

    /// Removes all and gives the memory back. This one takes time in proportion to the number of mappings.
    pub fn clear(&mut self) {
        self.tree.clear();
    }

    /// Bytes of heap in use, without what the allocator adds to each block. This includes what is reserved for
    /// mappings to come.
    pub fn memory_bytes(&self) -> usize {
        self.tree.memory_bytes()
    }
}
