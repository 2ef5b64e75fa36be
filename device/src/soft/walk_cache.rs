//! Last-level tables that walks have reached: the next walk in the same region starts there.

use alloc::vec;
use alloc::vec::Vec;

use pgtable_formats::Iova;
use pgtable_formats::walk::Step;

use super::contexts::Tables;
use super::flush::{Reach, Selector};
use super::key::{Key, Tag};

const SLOTS_LG2: u32 = 10;
/// Last-level tables that are kept.
pub const WALK_SLOTS: usize = 1 << SLOTS_LG2;

#[derive(Clone, Copy, Debug)]
struct Slot {
    owner: Key,
    tag: Tag,
    reach: Reach,
    /// `None` where the slot is empty.
    step: Option<Step>,
}

const EMPTY: Slot =
    Slot { owner: Key::NONE, tag: Tag::new(None), reach: Reach { start: 0, size_lg2: 0 }, step: None };

/// Direct-mapped.
#[derive(Debug)]
pub(super) struct WalkCache {
    /// Allocated with the first walk.
    slots: Vec<Slot>,
    /// How many slots are in use.
    used: usize,
}

impl WalkCache {
    pub(super) const fn new() -> Self {
        Self { slots: Vec::new(), used: 0 }
    }

    /// The table that translates the `1 << size_lg2` bytes around `iova`.
    #[inline]
    pub(super) fn lookup(&self, tables: &Tables, iova: Iova, size_lg2: u8) -> Option<Step> {
        let region = iova.0 >> size_lg2;
        let slot = self.slots.get(tables.spread.slot(region, SLOTS_LG2))?;
        (slot.owner == tables.owner
            && slot.tag == tables.tag
            && slot.reach.size_lg2 == size_lg2
            && slot.reach.start >> size_lg2 == region)
            .then_some(slot.step)?
    }

    pub(super) fn fill(&mut self, tables: &Tables, iova: Iova, size_lg2: u8, step: Step) {
        if self.slots.is_empty() {
            self.slots = vec![EMPTY; WALK_SLOTS];
        }
        let region = iova.0 >> size_lg2;
        if let Some(slot) = self.slots.get_mut(tables.spread.slot(region, SLOTS_LG2)) {
            let reach = Reach { start: region << size_lg2, size_lg2 };
            self.used += usize::from(slot.step.is_none());
            *slot = Slot { owner: tables.owner, tag: tables.tag, reach, step: Some(step) };
        }
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Drops what `selector` selects; with `shared` that of all PASIDs, because a table that leads to global leaves is
    /// everyone's.
    pub(super) fn invalidate(&mut self, selector: &Selector, shared: bool) {
        if self.used == 0 {
            return;
        }
        for slot in &mut self.slots {
            if selector.selects(slot.owner, slot.tag, slot.reach, false)
                || shared && selector.selects(slot.owner, slot.tag, slot.reach, true)
            {
                *slot = EMPTY;
                self.used -= 1;
            }
        }
    }

    pub(super) fn clear(&mut self) {
        self.slots.fill(EMPTY);
        self.used = 0;
    }
}
