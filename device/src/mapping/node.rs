//! Nodes of the tree, kept by level kind in tables of headers, each header with one block of slots.

use alloc::vec::Vec;
use core::mem::{size_of, take};

use pgtable_formats::{Gpa, Iova, IovaRange};

use super::{MapFlags, Mapping};

/// Where a node lies in its [`Nodes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NodeId(u32);

impl NodeId {
    /// No node.
    pub(super) const NONE: Self = Self(u32::MAX);

    #[inline]
    pub(super) fn is_none(self) -> bool {
        self == Self::NONE
    }

    #[inline]
    fn index(self) -> usize {
        self.0 as usize
    }
}

/// What a node holds, in ascending order of a key.
pub(super) trait Slot: Copy {
    fn key(&self) -> u64;
}

/// A mapping in a leaf; its key is its first address. Packed, and with the flags in a byte, which saves 7 bytes of 32.
#[derive(Clone, Copy, Debug)]
#[repr(C, packed)]
pub(super) struct Record {
    start: u64,
    last: u64,
    output: u64,
    /// [`MapFlags`].
    flags: u8,
}

const _: () = assert!(size_of::<Record>() == 25 && MapFlags::all().bits() <= u8::MAX as u32);

impl Record {
    #[inline]
    pub(super) fn last(&self) -> u64 {
        self.last
    }

    /// `None` cannot happen: a record is made of a mapping, whose range is one.
    #[inline]
    pub(super) fn range(&self) -> Option<IovaRange> {
        IovaRange::new(Iova(self.start), Iova(self.last))
    }

    #[inline]
    pub(super) fn mapping(&self) -> Option<Mapping> {
        let flags = MapFlags::from_bits_truncate(u32::from(self.flags));
        Some(Mapping { range: self.range()?, output: Gpa(self.output), flags })
    }
}

impl From<Mapping> for Record {
    #[inline]
    fn from(mapping: Mapping) -> Self {
        let Mapping { range, output, flags } = mapping;
        let [flags, ..] = flags.bits().to_le_bytes();
        Self { start: range.start().0, last: range.last().0, output: output.0, flags }
    }
}

impl Slot for Record {
    #[inline]
    fn key(&self) -> u64 {
        self.start
    }
}

/// A child of an inner node: its keys are at least `low`, and below the `low` of the next child.
#[derive(Clone, Copy, Debug)]
#[repr(C, packed(4))]
pub(super) struct Branch {
    pub(super) low: u64,
    pub(super) child: NodeId,
}

impl Slot for Branch {
    #[inline]
    fn key(&self) -> u64 {
        self.low
    }
}

/// A node's header. `previous` and `next` lead to its neighbours on the same level, whatever their parents.
#[derive(Debug)]
struct Node<T> {
    slots: Vec<T>,
    previous: NodeId,
    next: NodeId,
}

/// How a full node got room, for its parent to record.
pub(super) enum Relief {
    /// Slots went to the left neighbour, or may: the new `low` of the node itself, and the position in that neighbour
    /// where its own end and the others begin.
    Left { low: u64, met: usize },
    /// Slots went to the right neighbour, or may: the new `low` of that one, and the position where its own begin.
    Right { low: u64, met: usize },
    /// A new right neighbour has a part of them.
    Split(Branch),
}

/// The new numbers of nodes, by the old ones.
pub(super) struct Renumbered(Vec<NodeId>);

impl Renumbered {
    pub(super) fn number(&self, old: NodeId) -> NodeId {
        self.0.get(old.index()).copied().unwrap_or(NodeId::NONE)
    }
}

/// All nodes of one kind, leaves or inner ones, with up to `CAPACITY` slots each.
#[derive(Debug)]
pub(super) struct Nodes<T, const CAPACITY: usize> {
    table: Vec<Node<T>>,
    /// Headers without a node, chained by `next`.
    free: NodeId,
    live: usize,
}

impl<T: Slot, const CAPACITY: usize> Nodes<T, CAPACITY> {
    /// Two neighbours below one parent are joined when they hold no more than this together. It is less than the
    /// capacity by two at least: a joined node is not split by the next insertion, and a neighbour with as few takes
    /// slots over and still has room.
    pub(super) const JOINED: usize = CAPACITY - if CAPACITY < 16 { 2 } else { CAPACITY / 8 };

    pub(super) const fn new() -> Self {
        const { assert!(CAPACITY >= 4) };
        Self { table: Vec::new(), free: NodeId::NONE, live: 0 }
    }

    #[inline]
    pub(super) fn slots(&self, id: NodeId) -> &[T] {
        &self.table[id.index()].slots
    }

    #[inline]
    pub(super) fn slots_mut(&mut self, id: NodeId) -> &mut Vec<T> {
        &mut self.table[id.index()].slots
    }

    #[inline]
    pub(super) fn previous(&self, id: NodeId) -> NodeId {
        self.table[id.index()].previous
    }

    #[inline]
    pub(super) fn next(&self, id: NodeId) -> NodeId {
        self.table[id.index()].next
    }

    #[inline]
    pub(super) fn is_full(&self, id: NodeId) -> bool {
        self.slots(id).len() >= CAPACITY
    }

    /// Whether two neighbours are to be joined.
    #[inline]
    pub(super) fn fit(&self, left: NodeId, right: NodeId) -> bool {
        self.slots(left).len() + self.slots(right).len() <= Self::JOINED
    }

    /// An empty node to the right of `previous`.
    ///
    /// # Panics
    /// Where 2^32 - 1 nodes are live: with a hundred times the memory of any machine.
    pub(super) fn add(&mut self, previous: NodeId) -> NodeId {
        let next = if previous.is_none() { NodeId::NONE } else { self.next(previous) };
        let node = Node { slots: Vec::with_capacity(CAPACITY), previous, next };
        let id = self.free;
        let id = if id.is_none() {
            let index = u32::try_from(self.table.len()).unwrap_or(u32::MAX);
            assert!(index != u32::MAX, "node numbers used up");
            self.table.push(node);
            NodeId(index)
        } else {
            self.free = self.next(id);
            self.table[id.index()] = node;
            id
        };
        self.link(previous, id);
        self.link(id, next);
        self.live += 1;
        id
    }

    /// Takes a node out and frees its block.
    pub(super) fn release(&mut self, id: NodeId) {
        let free = Node { slots: Vec::new(), previous: NodeId::NONE, next: self.free };
        let node = core::mem::replace(&mut self.table[id.index()], free);
        self.free = id;
        self.live -= 1;
        if !node.previous.is_none() {
            self.table[node.previous.index()].next = node.next;
        }
        if !node.next.is_none() {
            self.table[node.next.index()].previous = node.previous;
        }
    }

    /// Moves all of `right` to its left neighbour.
    pub(super) fn join(&mut self, left: NodeId, right: NodeId) {
        let mut moved = take(self.slots_mut(right));
        self.slots_mut(left).append(&mut moved);
        self.release(right);
    }

    /// Makes room in the node `full`, or beside it, for a slot with the key `key`, such that no two of the three nodes
    /// are to be joined. `left` and `right` are its neighbours below the same parent; where these are full too, the
    /// node is split before slot `cut`, and a cut at an end keeps it whole.
    pub(super) fn relieve(
        &mut self,
        left: Option<NodeId>,
        full: NodeId,
        right: Option<NodeId>,
        cut: usize,
        key: u64,
    ) -> Relief {
        let count = |id: Option<NodeId>| id.map_or(CAPACITY, |id| self.slots(id).len());
        let (in_left, in_right) = (count(left), count(right));
        // What the node keeps must not fit the neighbour that gets nothing.
        let share =
            |to: usize, other: usize| ((CAPACITY - to) / 2).clamp(1, CAPACITY - Self::JOINED + other - 1);
        match (left, right) {
            (Some(left), _) if in_left <= Self::JOINED && in_left <= in_right => {
                if cut != 0 {
                    let mut from = take(self.slots_mut(full));
                    self.slots_mut(left).extend(from.drain(..share(in_left, in_right)));
                    *self.slots_mut(full) = from;
                }
                Relief::Left { low: self.low(full, key), met: in_left }
            }
            (_, Some(right)) if in_right <= Self::JOINED => {
                if cut == CAPACITY {
                    return Relief::Right { low: key, met: 0 };
                }
                let kept = CAPACITY - share(in_right, in_left);
                let mut from = take(self.slots_mut(full));
                self.slots_mut(right).splice(..0, from.drain(kept..));
                *self.slots_mut(full) = from;
                Relief::Right { low: self.low(right, key), met: CAPACITY - kept }
            }
            _ => {
                let new = self.add(full);
                let mut from = take(self.slots_mut(full));
                self.slots_mut(new).extend(from.drain(cut..));
                *self.slots_mut(full) = from;
                Relief::Split(Branch { low: self.low(new, key), child: new })
            }
        }
    }

    /// Whether three of four headers are without a node, in a table that is worth the work.
    pub(super) fn is_sparse(&self) -> bool {
        self.table.capacity() > CAPACITY && self.table.capacity() / 4 > self.live
    }

    /// Moves the headers together, in a smaller table. The answer is the new number of each node by its old one.
    pub(super) fn compact(&mut self) -> Renumbered {
        let old = take(&mut self.table);
        let mut numbers = Vec::with_capacity(old.len());
        let mut live = 0;
        for node in &old {
            // Only a live node has a block.
            let is_live = node.slots.capacity() > 0;
            numbers.push(if is_live { NodeId(live) } else { NodeId::NONE });
            live += u32::from(is_live);
        }
        let numbers = Renumbered(numbers);
        self.table.reserve_exact(2 * self.live);
        self.table.extend(old.into_iter().filter(|node| node.slots.capacity() > 0).map(|node| Node {
            previous: numbers.number(node.previous),
            next: numbers.number(node.next),
            ..node
        }));
        self.free = NodeId::NONE;
        numbers
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.table.capacity() * size_of::<Node<T>>() + self.live * CAPACITY * size_of::<T>()
    }

    #[inline]
    fn low(&self, id: NodeId, otherwise: u64) -> u64 {
        self.slots(id).first().map_or(otherwise, Slot::key)
    }

    fn link(&mut self, left: NodeId, right: NodeId) {
        if !left.is_none() {
            self.table[left.index()].next = right;
        }
        if !right.is_none() {
            self.table[right.index()].previous = left;
        }
    }

    #[cfg(test)]
    pub(super) fn live(&self) -> usize {
        self.live
    }
}
