//! Contexts: what the guest's table says a stream translates through, found and fetched once.

use alloc::vec::Vec;

use pgtable_formats::Pasid;
use pgtable_formats::context::Stage1;
use viommu_wire::EndpointId;

use super::key::{Key, Tag};

const SLOTS_LG2: u32 = 11;
/// Streams whose context is kept.
pub const CONTEXT_SLOTS: usize = 1 << SLOTS_LG2;

/// How the table of a stream says that it translates.
#[derive(Clone, Copy, Debug)]
pub(super) enum Route {
    /// Output equals input.
    Bypass,
    /// By the guest's tables.
    Tables(Tables),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Tables {
    /// The endpoint and the PASID whose entry this is.
    pub(super) owner: Key,
    pub(super) tag: Tag,
    /// What `owner` and `tag` come to when translations are spread over a cache.
    pub(super) spread: Key,
    pub(super) stage1: Stage1,
}

impl Tables {
    pub(super) fn new(endpoint: EndpointId, effective: Option<Pasid>, stage1: Stage1) -> Self {
        let owner = Key::new(endpoint, effective);
        let tag = Tag::new(stage1.tag());
        Self { owner, tag, spread: tag.spread(endpoint, owner), stage1 }
    }
}

/// Direct-mapped.
#[derive(Debug)]
pub(super) struct Contexts {
    /// Allocated with the first one.
    slots: Vec<Slot>,
    /// How many slots are in use.
    used: usize,
}

#[derive(Clone, Debug)]
struct Slot {
    /// The stream: not of the entry, but of the accesses.
    key: Key,
    route: Route,
}

const EMPTY: Slot = Slot { key: Key::NONE, route: Route::Bypass };

impl Contexts {
    pub(super) const fn new() -> Self {
        Self { slots: Vec::new(), used: 0 }
    }

    #[inline]
    pub(super) fn get(&self, key: Key) -> Option<&Route> {
        self.slots.get(slot(key)).filter(|slot| slot.key == key).map(|slot| &slot.route)
    }

    pub(super) fn fill(&mut self, key: Key, route: Route) {
        if self.slots.is_empty() {
            self.slots.resize(CONTEXT_SLOTS, EMPTY);
        }
        if let Some(slot) = self.slots.get_mut(slot(key)) {
            self.used += usize::from(slot.key == Key::NONE);
            *slot = Slot { key, route };
        }
    }

    /// Drops the context of the streams of `endpoint` that `pasid` (an entry of the guest's table, or `None`) may serve.
    pub(super) fn drop_pasid(&mut self, endpoint: EndpointId, pasid: Option<Pasid>) {
        // An entry serves the accesses with its PASID, or untagged ones; and the table of untagged accesses may serve
        // PASID 0.
        for requested in [pasid, None, Some(Pasid::ZERO)] {
            let key = Key::new(endpoint, requested);
            if let Some(slot) = self.slots.get_mut(slot(key))
                && slot.key == key
            {
                slot.key = Key::NONE;
                self.used -= 1;
            }
        }
    }

    pub(super) fn drop_endpoint(&mut self, endpoint: EndpointId) {
        self.drop_where(|key| key.is_of(endpoint));
    }

    pub(super) fn clear(&mut self) {
        self.drop_where(|_| true);
    }

    fn drop_where(&mut self, is_dropped: impl Fn(Key) -> bool) {
        if self.used == 0 {
            return;
        }
        for slot in &mut self.slots {
            if slot.key != Key::NONE && is_dropped(slot.key) {
                slot.key = Key::NONE;
                self.used -= 1;
            }
        }
    }
}

#[inline]
fn slot(key: Key) -> usize {
    key.slot(0, SLOTS_LG2)
}
