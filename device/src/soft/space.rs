//! What streams translate through.

use alloc::vec::Vec;

use pgtable_formats::context::Canonical;
use viommu_wire::EndpointId;

use crate::host::{HostError, Stream};
use crate::mapping::Mappings;

/// How many spaces there may be at a time: one for each of 2^20 PASIDs.
pub const MAX_SPACES: usize = 1 << 20;

/// Memory for so many is kept when all are gone: a driver that attaches and detaches would allocate each time.
const KEPT: usize = 64;

/// A space of a [`SoftHost`](super::SoftHost): a handle that only the host which made it understands.
#[derive(Debug, PartialEq, Eq)]
pub struct Space(pub(super) SpaceIndex);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SpaceIndex(u32);

#[derive(Debug)]
pub(super) enum Kind {
    Identity,
    Mapped(Mappings),
    Table { endpoint: EndpointId, table: Canonical },
}

#[derive(Debug)]
pub(super) struct SpaceState {
    pub(super) kind: Kind,
    /// How many streams are bound to it.
    pub(super) bound: usize,
    /// The first stream that was bound, while it is the only one.
    pub(super) only: Option<Stream>,
}

/// All spaces, by number.
#[derive(Debug)]
pub(super) struct Spaces {
    slots: Vec<Option<SpaceState>>,
    free: Vec<SpaceIndex>,
}

impl Spaces {
    pub(super) const fn new() -> Self {
        Self { slots: Vec::new(), free: Vec::new() }
    }

    pub(super) fn insert(&mut self, kind: Kind) -> Result<Space, HostError> {
        let state = Some(SpaceState { kind, bound: 0, only: None });
        if let Some(index) = self.free.pop() {
            if let Some(slot) = self.slots.get_mut(index.place()) {
                *slot = state;
            }
            return Ok(Space(index));
        }
        if self.slots.len() >= MAX_SPACES {
            return Err(HostError::NoMemory);
        }
        let index = u32::try_from(self.slots.len()).map_err(|_| HostError::NoMemory)?;
        self.slots.push(state);
        Ok(Space(SpaceIndex(index)))
    }

    pub(super) fn remove(&mut self, index: SpaceIndex) {
        if self.slots.get_mut(index.place()).and_then(Option::take).is_some() {
            self.free.push(index);
        }
        // A guest that made many, and then was reset, leaves no memory behind.
        if self.free.len() == self.slots.len() && self.slots.len() > KEPT {
            *self = Self::new();
        }
    }

    #[inline]
    pub(super) fn get(&self, index: SpaceIndex) -> Option<&SpaceState> {
        self.slots.get(index.place())?.as_ref()
    }

    #[inline]
    pub(super) fn get_mut(&mut self, index: SpaceIndex) -> Option<&mut SpaceState> {
        self.slots.get_mut(index.place())?.as_mut()
    }

    /// Notes that `stream` is now bound to `index`.
    pub(super) fn count_bound(&mut self, index: SpaceIndex, stream: Stream) {
        if let Some(space) = self.get_mut(index) {
            space.only = (space.bound == 0).then_some(stream);
            space.bound += 1;
        }
    }

    /// Notes that a stream is not bound to `index` any more.
    pub(super) fn count_unbound(&mut self, index: SpaceIndex) {
        if let Some(space) = self.get_mut(index) {
            // Of the others it is not known which they are.
            space.only = None;
            space.bound = space.bound.saturating_sub(1);
        }
    }
}

impl SpaceIndex {
    #[inline]
    const fn place(self) -> usize {
        self.0 as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_kept_when_all_are_gone() {
        let mut spaces = Spaces::new();
        let made: Vec<Space> = (0..1000).map(|_| spaces.insert(Kind::Identity).unwrap()).collect();
        for Space(index) in made {
            spaces.remove(index);
        }
        assert_eq!(spaces.slots.capacity() + spaces.free.capacity(), 0);
        assert_eq!(spaces.insert(Kind::Identity), Ok(Space(SpaceIndex(0))));
    }
}
