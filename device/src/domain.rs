//! Domains: the address spaces that a guest makes.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::fmt;
use core::ops::{Index, IndexMut};

use viommu_wire::DomainId;

use crate::reserved::Reserved;

/// What a domain translates by; its first ATTACH or ATTACH_TABLE decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DomainKind {
    /// By what MAP requests created.
    Mapped,
    /// Output equals input.
    Bypass,
    /// By the guest's own tables.
    Table,
}

impl fmt::Display for DomainKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mapped => "mapped",
            Self::Bypass => "bypass",
            Self::Table => "table",
        })
    }
}

/// A domain, which lives as long as an endpoint is in it (D-29).
#[derive(Debug)]
pub(crate) struct Domain<S> {
    pub(crate) id: DomainId,
    pub(crate) space: DomainSpace<S>,
    /// Its endpoints, by place; empty only until the first ATTACH is recorded.
    pub(crate) endpoints: Vec<usize>,
}

/// What a domain translates by, with what belongs to it.
#[derive(Debug)]
pub(crate) enum DomainSpace<S> {
    Mapped(MappedSpace<S>),
    Bypass,
    Table,
}

#[derive(Debug)]
pub(crate) struct MappedSpace<S> {
    pub(crate) space: S,
    /// How many mappings there are.
    pub(crate) mappings: usize,
    /// What no endpoint of the domain may have mapped.
    pub(crate) reserved: Reserved,
}

impl<S> Domain<S> {
    pub(crate) const fn kind(&self) -> DomainKind {
        match self.space {
            DomainSpace::Mapped(_) => DomainKind::Mapped,
            DomainSpace::Bypass => DomainKind::Bypass,
            DomainSpace::Table => DomainKind::Table,
        }
    }
}

/// The domains that exist, found by ID.
///
/// They lie side by side, so that one used recently is found again without a search. A place holds until the next
/// [`remove`](Self::remove).
#[derive(Debug)]
pub(crate) struct Domains<S> {
    domains: Vec<Domain<S>>,
    places: BTreeMap<DomainId, usize>,
    /// Where domains were found last, by the low bits of their IDs: guesses.
    recent: [usize; RECENT],
    /// Memory for the endpoints of the next domain: a driver that attaches and detaches would allocate each time.
    spare: Vec<usize>,
}

/// As many domains as a driver uses in turns are found without a search.
const RECENT: usize = 64;

impl<S> Domains<S> {
    pub(crate) const fn new() -> Self {
        Self { domains: Vec::new(), places: BTreeMap::new(), recent: [0; RECENT], spare: Vec::new() }
    }

    pub(crate) fn len(&self) -> usize {
        self.domains.len()
    }

    /// The place of `id`.
    #[inline]
    pub(crate) fn find(&mut self, id: DomainId) -> Option<usize> {
        let recent = &mut self.recent[id.0 as usize % RECENT];
        if self.domains.get(*recent).is_none_or(|domain| domain.id != id) {
            *recent = *self.places.get(&id)?;
        }
        Some(*recent)
    }

    /// Adds a domain without endpoints, whose ID is not in use, and gives its place.
    pub(crate) fn insert(&mut self, id: DomainId, space: DomainSpace<S>) -> usize {
        let place = self.domains.len();
        self.domains.push(Domain { id, space, endpoints: core::mem::take(&mut self.spare) });
        self.places.insert(id, place);
        place
    }

    /// Takes a domain out and gives what it translated by. Another domain may move to its place.
    pub(crate) fn remove(&mut self, place: usize) -> DomainSpace<S> {
        let mut domain = self.domains.swap_remove(place);
        self.places.remove(&domain.id);
        if let Some(moved) = self.domains.get(place) {
            self.places.insert(moved.id, place);
        }
        domain.endpoints.clear();
        self.spare = domain.endpoints;
        domain.space
    }

    /// Takes all of them out.
    pub(crate) fn take(&mut self) -> Vec<Domain<S>> {
        self.places.clear();
        core::mem::take(&mut self.domains)
    }
}

/// By a place that [`Domains::find`] or [`Domains::insert`] gave.
impl<S> Index<usize> for Domains<S> {
    type Output = Domain<S>;

    #[inline]
    fn index(&self, place: usize) -> &Domain<S> {
        &self.domains[place]
    }
}

impl<S> IndexMut<usize> for Domains<S> {
    #[inline]
    fn index_mut(&mut self, place: usize) -> &mut Domain<S> {
        &mut self.domains[place]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_follow_removals() {
        let mut domains: Domains<()> = Domains::new();
        for id in 0..100 {
            domains.insert(DomainId(id), DomainSpace::Bypass);
        }
        for id in (0..100).step_by(3) {
            let place = domains.find(DomainId(id)).unwrap();
            assert_eq!(domains[place].id, DomainId(id));
            domains.remove(place);
        }
        assert_eq!(domains.len(), 66);
        for id in 0..100 {
            let found = domains.find(DomainId(id)).map(|place| domains[place].id);
            assert_eq!(found, (id % 3 != 0).then_some(DomainId(id)));
        }
    }

    #[test]
    fn a_removed_domain_is_not_found_where_it_was_used_last() {
        let mut domains: Domains<()> = Domains::new();
        let place = domains.insert(DomainId(7), DomainSpace::Bypass);
        assert_eq!(domains.find(DomainId(7)), Some(place));
        domains.remove(place);
        assert_eq!(domains.find(DomainId(7)), None);
        domains.insert(DomainId(8), DomainSpace::Table);
        assert_eq!(domains.find(DomainId(7)), None);
        assert!(domains.find(DomainId(8)).is_some());
    }
}
