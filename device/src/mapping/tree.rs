//! A B+-tree of mappings by first address.
//!
//! Height 0 is a single leaf. The shape keeps two rules, besides order: no node but the root is empty, and two
//! neighbours below one parent hold more than [`Nodes::JOINED`] slots together. That allows lone small nodes, so a
//! sequential run leaves full nodes behind it, and still bounds the memory.

use pgtable_formats::{Iova, IovaRange};

use super::node::{Branch, NodeId, Nodes, Record, Relief, Renumbered, Slot};
use super::{Mapping, Overlap, Split};

#[derive(Debug)]
pub(super) struct Tree<const LEAF: usize, const INNER: usize> {
    leaves: Nodes<Record, LEAF>,
    inner: Nodes<Branch, INNER>,
    root: NodeId,
    /// Levels of inner nodes above the leaves.
    height: usize,
    len: usize,
    /// Where the last insertion was, and the last removal: drivers often map at one place and unmap at another.
    /// Whatever changes the shape forgets both.
    inserted: Finger,
    removed: Finger,
}

/// A leaf, the keys that belong there, its neighbours below the same parent, and where in it the change was.
#[derive(Clone, Copy, Debug)]
struct Finger {
    leaf: NodeId,
    low: u64,
    high: u64,
    left: NodeId,
    right: NodeId,
    /// Behind an inserted record, or where a removed one was.
    position: usize,
}

impl Finger {
    /// One that no key belongs to.
    const NOWHERE: Self =
        Self { leaf: NodeId::NONE, low: 1, high: 0, left: NodeId::NONE, right: NodeId::NONE, position: 0 };

    #[inline]
    fn holds(&self, key: u64) -> bool {
        self.low <= key && key <= self.high
    }

    /// How many of `slots`, which are those of the leaf, have a key below `key`, and whether this goes on from the
    /// last change, upwards or downwards.
    #[inline]
    fn position(&self, slots: &[Record], key: u64) -> (usize, bool) {
        for position in [self.position, self.position.wrapping_sub(1)] {
            if let Some((before, after)) = slots.split_at_checked(position)
                && before.last().is_none_or(|record| record.key() < key)
                && after.first().is_none_or(|record| record.key() >= key)
            {
                return (position, true);
            }
        }
        (slots.partition_point(|record| record.key() < key), false)
    }
}

impl<const LEAF: usize, const INNER: usize> Default for Tree<LEAF, INNER> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const LEAF: usize, const INNER: usize> Tree<LEAF, INNER> {
    pub(super) const fn new() -> Self {
        Self {
            leaves: Nodes::new(),
            inner: Nodes::new(),
            root: NodeId::NONE,
            height: 0,
            len: 0,
            inserted: Finger::NOWHERE,
            removed: Finger::NOWHERE,
        }
    }

    #[inline]
    pub(super) const fn len(&self) -> usize {
        self.len
    }

    pub(super) fn clear(&mut self) {
        *self = Self::new();
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.leaves.memory_bytes() + self.inner.memory_bytes()
    }

    #[inline]
    pub(super) fn insert(&mut self, mapping: Mapping) -> Result<(), Overlap> {
        if self.root.is_none() {
            self.root = self.leaves.add(NodeId::NONE);
        }
        let (start, last) = (mapping.range.start().0, mapping.range.last().0);
        if !self.inserted.holds(start) {
            self.inserted = self.descend(start);
        }
        let finger = self.inserted;
        let slots = self.leaves.slots(finger.leaf);
        let (position, run) = finger.position(slots, start);
        let before = self.before(finger.leaf, position).filter(|record| record.last() >= start);
        let in_the_way = before.or_else(|| {
            let after = match slots.get(position) {
                Some(record) => Some(record),
                None if last <= finger.high => None,
                None => self.first(self.leaves.next(finger.leaf)),
            };
            after.filter(|record| record.key() <= last)
        });
        if let Some(existing) = in_the_way.and_then(Record::range) {
            return Err(Overlap { existing });
        }
        if slots.len() < LEAF {
            self.leaves.slots_mut(finger.leaf).insert(position, mapping.into());
            self.inserted.position = position + 1;
        } else {
            self.insert_into_full(mapping.into(), run);
        }
        self.len += 1;
        Ok(())
    }

    #[inline]
    pub(super) fn remove(&mut self, range: IovaRange) -> Result<usize, Split> {
        if self.len == 0 {
            return Ok(0);
        }
        let (start, last) = (range.start().0, range.last().0);
        if !self.removed.holds(start) {
            self.removed = self.descend(start);
        }
        let finger = self.removed;
        let slots = self.leaves.slots(finger.leaf);
        let (from, _) = finger.position(slots, start);
        // Mappings are disjoint: only the ones over the two ends can be covered in part.
        let split = self.before(finger.leaf, from).filter(|record| record.last() >= start);
        if let Some(mapping) = split.and_then(Record::range) {
            return Err(Split { mapping });
        }
        if last > finger.high {
            return self.remove_over_leaves(start, last);
        }
        let inside = slots.get(from..).unwrap_or_default();
        let removed = match inside.get(1) {
            Some(record) if record.key() <= last => inside.partition_point(|record| record.key() <= last),
            _ => usize::from(inside.first().is_some_and(|record| record.key() <= last)),
        };
        let to = from + removed;
        if removed == 0 {
            return Ok(0);
        }
        let split = self.before(finger.leaf, to).filter(|record| record.last() > last);
        if let Some(mapping) = split.and_then(Record::range) {
            return Err(Split { mapping });
        }
        if removed == 1 {
            self.leaves.slots_mut(finger.leaf).remove(from);
        } else {
            self.leaves.slots_mut(finger.leaf).drain(from..to);
        }
        self.len -= removed;
        self.removed.position = from;
        if self.is_too_small(&finger) {
            // Nothing is left to remove; this restores the shape on the way to the leaf.
            self.remove_from_root(start, start);
        }
        Ok(removed)
    }

    #[inline]
    pub(super) fn lookup(&self, iova: Iova) -> Option<Mapping> {
        let leaf = self.leaf(iova.0)?;
        let position = self.leaves.slots(leaf).partition_point(|record| record.key() <= iova.0);
        self.before(leaf, position).filter(|record| record.last() >= iova.0)?.mapping()
    }

    /// The mappings from the one that `iova` lies in, or else the next one, upwards.
    pub(super) fn from(&self, iova: Iova) -> Ascending<'_, LEAF, INNER> {
        let Some(leaf) = self.leaf(iova.0) else {
            return Ascending { tree: self, leaf: NodeId::NONE, position: 0 };
        };
        let position = self.leaves.slots(leaf).partition_point(|record| record.key() < iova.0);
        if self.before(leaf, position).is_none_or(|record| record.last() < iova.0) {
            return Ascending { tree: self, leaf, position };
        }
        match position.checked_sub(1) {
            Some(position) => Ascending { tree: self, leaf, position },
            None => {
                let leaf = self.leaves.previous(leaf);
                Ascending { tree: self, leaf, position: self.leaves.slots(leaf).len() - 1 }
            }
        }
    }

    /// The record before `position` of a leaf, which may be the end of the previous leaf.
    #[inline]
    fn before(&self, leaf: NodeId, position: usize) -> Option<&Record> {
        match position.checked_sub(1) {
            Some(position) => self.leaves.slots(leaf).get(position),
            None => {
                let previous = self.leaves.previous(leaf);
                if previous.is_none() { None } else { self.leaves.slots(previous).last() }
            }
        }
    }

    #[inline]
    fn first(&self, leaf: NodeId) -> Option<&Record> {
        if leaf.is_none() { None } else { self.leaves.slots(leaf).first() }
    }

    /// The leaf that `key` belongs to.
    #[inline]
    fn leaf(&self, key: u64) -> Option<NodeId> {
        let mut id = self.root;
        if id.is_none() {
            return None;
        }
        for _ in 0..self.height {
            id = self.inner.slots(id)[self.child(id, key)].child;
        }
        Some(id)
    }

    /// Which child of an inner node `key` belongs to.
    #[inline]
    fn child(&self, id: NodeId, key: u64) -> usize {
        // The first child also takes what lies below its `low`: at the root nothing else could.
        self.inner.slots(id).partition_point(|branch| branch.low <= key).saturating_sub(1)
    }

    fn descend(&self, key: u64) -> Finger {
        let mut finger = Finger { leaf: self.root, low: 0, high: u64::MAX, ..Finger::NOWHERE };
        for _ in 0..self.height {
            let slots = self.inner.slots(finger.leaf);
            let child = self.child(finger.leaf, key);
            let Branch { low, child: leaf } = slots[child];
            let right = slots.get(child + 1);
            finger = Finger {
                leaf,
                low,
                // A `low` that is not the first of its node is above the `low` before it, so not 0.
                high: right.map_or(finger.high, |right| right.low - 1),
                left: child.checked_sub(1).map_or(NodeId::NONE, |left| slots[left].child),
                right: right.map_or(NodeId::NONE, |right| right.child),
                position: 0,
            };
        }
        finger
    }

    /// Adds a record whose leaf is full, from the root down: every full node on the way is given room before it is
    /// entered, so that it can take one more child. A leaf that a run goes on in is split there, so that the run
    /// goes on at an end.
    #[cold]
    fn insert_into_full(&mut self, record: Record, run: bool) {
        (self.inserted, self.removed) = (Finger::NOWHERE, Finger::NOWHERE);
        let key = record.key();
        let full =
            if self.height == 0 { self.leaves.is_full(self.root) } else { self.inner.is_full(self.root) };
        if full {
            let root = self.inner.add(NodeId::NONE);
            self.inner.slots_mut(root).push(Branch { low: 0, child: self.root });
            self.root = root;
            self.height += 1;
        }
        let mut parent = self.root;
        for height in (0..self.height).rev() {
            let at = self.child(parent, key);
            let slots = self.inner.slots(parent);
            let child = slots[at].child;
            let left = at.checked_sub(1).map(|left| slots[left].child);
            let right = slots.get(at + 1).map(|right| right.child);
            let relief = if height > 0 {
                self.inner.is_full(child).then(|| {
                    // At an end, the lone child goes on growing and the rest stays dense.
                    let cut = match self.child(child, key) {
                        0 => 1,
                        last if last == INNER - 1 => last,
                        _ => INNER / 2,
                    };
                    self.inner.relieve(left, child, right, cut, key)
                })
            } else {
                self.leaves.is_full(child).then(|| {
                    let cut = match self.leaves.slots(child).partition_point(|record| record.key() < key) {
                        position if run || position == 0 || position == LEAF => position,
                        _ => LEAF / 2,
                    };
                    self.leaves.relieve(left, child, right, cut, key)
                })
            };
            let slots = self.inner.slots_mut(parent);
            // Children of inner nodes that meet for the first time may be small ones.
            match relief {
                None => {}
                Some(Relief::Left { low, met }) => {
                    slots[at].low = low;
                    if let Some(left) = left {
                        self.join_met(left, height, met);
                    }
                }
                Some(Relief::Right { low, met }) => {
                    slots[at + 1].low = low;
                    if let Some(right) = right {
                        self.join_met(right, height, met);
                    }
                }
                Some(Relief::Split(right)) => slots.insert(at + 1, right),
            }
            parent = self.inner.slots(parent)[self.child(parent, key)].child;
        }
        let slots = self.leaves.slots_mut(parent);
        let position = slots.partition_point(|record| record.key() < key);
        slots.insert(position, record);
    }

    /// Whether a leaf is to be joined to a neighbour, or to go.
    #[inline]
    fn is_too_small(&self, finger: &Finger) -> bool {
        let count = self.leaves.slots(finger.leaf).len();
        let fits = |neighbour: NodeId| !neighbour.is_none() && self.leaves.fit(finger.leaf, neighbour);
        self.height > 0
            && count < Nodes::<Record, LEAF>::JOINED
            && (count == 0 || fits(finger.left) || fits(finger.right))
    }

    /// The rest of a removal of more than a leaf. No mapping crosses `start`.
    fn remove_over_leaves(&mut self, start: u64, last: u64) -> Result<usize, Split> {
        let end = self.descend(last).leaf;
        let to = self.leaves.slots(end).partition_point(|record| record.key() <= last);
        let split = self.before(end, to).filter(|record| record.last() > last);
        if let Some(mapping) = split.and_then(Record::range) {
            return Err(Split { mapping });
        }
        let removed = self.remove_from_root(start, last);
        self.len -= removed;
        Ok(removed)
    }

    /// Removes the records with keys `start..=last`, restores the shape, and says how many these were.
    #[cold]
    fn remove_from_root(&mut self, start: u64, last: u64) -> usize {
        (self.inserted, self.removed) = (Finger::NOWHERE, Finger::NOWHERE);
        let removed = self.remove_below(self.root, self.height, start, last);
        while self.height > 0 {
            match *self.inner.slots(self.root) {
                [] => {
                    self.inner.release(self.root);
                    self.root = NodeId::NONE;
                    self.height = 0;
                }
                [Branch { child, .. }] => {
                    self.inner.release(self.root);
                    self.root = child;
                    self.height -= 1;
                }
                _ => break,
            }
        }
        if self.leaves.is_sparse() || self.inner.is_sparse() {
            let (leaves, inner) = (self.leaves.compact(), self.inner.compact());
            self.root = if self.height == 0 { leaves.number(self.root) } else { inner.number(self.root) };
            self.renumber_below(self.root, self.height, &leaves, &inner);
        }
        removed
    }

    /// The same below one node. The rules of the shape then hold below it; itself, it may be empty or too small.
    fn remove_below(&mut self, id: NodeId, height: usize, start: u64, last: u64) -> usize {
        let Some(below) = height.checked_sub(1) else {
            let slots = self.leaves.slots_mut(id);
            let from = slots.partition_point(|record| record.key() < start);
            let to = slots.partition_point(|record| record.key() <= last);
            return slots.drain(from..to).count();
        };
        let (first, end) = (self.child(id, start), self.child(id, last));
        let mut removed = self.remove_below(self.inner.slots(id)[first].child, below, start, last);
        if first < end {
            removed += self.remove_below(self.inner.slots(id)[end].child, below, start, last);
            let mut slots = core::mem::take(self.inner.slots_mut(id));
            removed +=
                slots.drain(first + 1..end).map(|between| self.release(between.child, below)).sum::<usize>();
            *self.inner.slots_mut(id) = slots;
            self.drop_if_empty(id, below, first + 1);
        }
        self.drop_if_empty(id, below, first);
        // What is left of the two ends, with what lies before, between and behind them.
        let (mut at, mut end) = (first.saturating_sub(1), first + 2);
        while at < end && at + 1 < self.inner.slots(id).len() {
            if self.join_if_small(id, below, at) {
                end -= 1;
            } else {
                at += 1;
            }
        }
        removed
    }

    /// Rewrites the references to children of a node and of all below it. The removals since the table grew freed at
    /// least as many nodes, and have paid for this.
    fn renumber_below(&mut self, id: NodeId, height: usize, leaves: &Renumbered, inner: &Renumbered) {
        let Some(below) = height.checked_sub(1) else { return };
        for at in 0..self.inner.slots(id).len() {
            let branch = &mut self.inner.slots_mut(id)[at];
            branch.child = if below == 0 { leaves.number(branch.child) } else { inner.number(branch.child) };
            let child = branch.child;
            self.renumber_below(child, below, leaves, inner);
        }
    }

    /// Frees a node with all below it, and says how many records these were.
    fn release(&mut self, id: NodeId, height: usize) -> usize {
        let Some(below) = height.checked_sub(1) else {
            let count = self.leaves.slots(id).len();
            self.leaves.release(id);
            return count;
        };
        let mut count = 0;
        for branch in core::mem::take(self.inner.slots_mut(id)) {
            count += self.release(branch.child, below);
        }
        self.inner.release(id);
        count
    }

    /// Drops a child without slots; the one before takes its keys over, or the one behind.
    fn drop_if_empty(&mut self, id: NodeId, below: usize, at: usize) {
        let Branch { low, child } = self.inner.slots(id)[at];
        if self.count(child, below) > 0 {
            return;
        }
        self.release(child, below);
        self.inner.slots_mut(id).remove(at);
        if at > 0 {
            return;
        }
        // A first child covers what its parent does, all the way down.
        let mut node = id;
        for _ in 0..=below {
            match self.inner.slots_mut(node).first_mut() {
                Some(first) => {
                    first.low = low;
                    node = first.child;
                }
                None => break,
            }
        }
    }

    /// Joins the children `at` and `at + 1` where they fit, and then also the two that meet inside.
    fn join_if_small(&mut self, id: NodeId, below: usize, at: usize) -> bool {
        let (left, right) = (self.inner.slots(id)[at].child, self.inner.slots(id)[at + 1].child);
        let fit = if below == 0 { self.leaves.fit(left, right) } else { self.inner.fit(left, right) };
        if !fit {
            return false;
        }
        self.inner.slots_mut(id).remove(at + 1);
        if below == 0 {
            self.leaves.join(left, right);
        } else {
            let met = self.inner.slots(left).len();
            self.inner.join(left, right);
            self.join_met(left, below, met);
        }
        true
    }

    /// The same for the children on both sides of `met` in a node at `height`, which has just taken one of them over.
    fn join_met(&mut self, id: NodeId, height: usize, met: usize) {
        if let (Some(below), Some(at)) = (height.checked_sub(1), met.checked_sub(1)) {
            self.join_if_small(id, below, at);
        }
    }

    fn count(&self, id: NodeId, height: usize) -> usize {
        if height == 0 { self.leaves.slots(id).len() } else { self.inner.slots(id).len() }
    }
}

/// Mappings in ascending order.
pub(super) struct Ascending<'a, const LEAF: usize, const INNER: usize> {
    tree: &'a Tree<LEAF, INNER>,
    leaf: NodeId,
    position: usize,
}

impl<const LEAF: usize, const INNER: usize> Iterator for Ascending<'_, LEAF, INNER> {
    type Item = Mapping;

    #[inline]
    fn next(&mut self) -> Option<Mapping> {
        while !self.leaf.is_none() {
            if let Some(record) = self.tree.leaves.slots(self.leaf).get(self.position) {
                self.position += 1;
                return record.mapping();
            }
            self.leaf = self.tree.leaves.next(self.leaf);
            self.position = 0;
        }
        None
    }
}

#[cfg(test)]
impl<const LEAF: usize, const INNER: usize> Tree<LEAF, INNER> {
    /// Order, rules of the shape, neighbours, counts and the fingers.
    pub(super) fn check(&self) {
        let mut levels = alloc::vec![alloc::vec::Vec::new(); self.height + 1];
        if !self.root.is_none() {
            self.check_below(self.root, self.height, 0, u64::MAX, &mut levels);
        }
        let live = self.leaves.live() + self.inner.live();
        assert_eq!(live, levels.iter().map(alloc::vec::Vec::len).sum::<usize>(), "no node is lost");
        for (height, level) in levels.iter().enumerate() {
            let mut previous = NodeId::NONE;
            for &id in level {
                let (links, count) = if height == 0 {
                    ((self.leaves.previous(id), self.leaves.next(id)), LEAF)
                } else {
                    ((self.inner.previous(id), self.inner.next(id)), INNER)
                };
                assert_eq!(links.0, previous);
                assert!((1..=count).contains(&self.count(id, height)) || id == self.root);
                previous = id;
            }
        }
        let all: alloc::vec::Vec<_> = self.from(Iova(0)).collect();
        assert_eq!(all.len(), self.len);
        assert!(all.windows(2).all(|pair| pair[0].range.last() < pair[1].range.start()));
        for finger in [self.inserted, self.removed] {
            if !finger.leaf.is_none() {
                let found = Finger { position: finger.position, ..self.descend(finger.low) };
                assert_eq!(alloc::format!("{found:?}"), alloc::format!("{finger:?}"));
            }
        }
    }

    fn check_below(
        &self,
        id: NodeId,
        height: usize,
        low: u64,
        high: u64,
        levels: &mut [alloc::vec::Vec<NodeId>],
    ) {
        levels[height].push(id);
        if height == 0 {
            let slots = self.leaves.slots(id);
            assert!(slots.iter().all(|record| low <= record.key() && record.key() <= high));
            return;
        }
        let slots = self.inner.slots(id);
        assert_eq!({ slots[0].low }, low, "the first child covers what its parent does");
        for (at, branch) in slots.iter().enumerate() {
            let next = slots.get(at + 1);
            let high = next.map_or(high, |next| next.low - 1);
            assert!(branch.low <= high);
            if let Some(next) = next {
                let together = self.count(branch.child, height - 1) + self.count(next.child, height - 1);
                let joined =
                    if height == 1 { Nodes::<Record, LEAF>::JOINED } else { Nodes::<Branch, INNER>::JOINED };
                assert!(together > joined, "{together} slots in two neighbours");
            }
            self.check_below(branch.child, height - 1, branch.low, high, levels);
        }
    }
}
