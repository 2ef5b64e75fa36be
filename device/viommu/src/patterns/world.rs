//! What the device holds, followed by the requests that it answered: domains, who is in them, and what is mapped.

use std::collections::{BTreeMap, BTreeSet};

use pgtable_formats::{IovaRange, Pasid};
use serde::Serialize;
use viommu_wire::{AttachFlags, Invalidate, InvalidateScope, Request, TableDescriptor};

/// Domains and endpoints that are followed. A device allows no more by default; a trace may say so all the same.
const MAX_DOMAINS: usize = 1 << 16;
pub(super) const MAX_ENDPOINTS: usize = 256;
/// Mappings that are followed at a time.
const MAX_MAPPINGS: usize = 1 << 20;
/// Mappings that one access is counted for.
const MAX_TOUCHED: usize = 1024;

/// When something happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Moment {
    /// Events before it.
    pub(super) event: u64,
    /// As the trace has it.
    pub(super) time: u64,
}

/// How a domain translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
    /// By MAP requests.
    Mapped,
    /// Not at all.
    Bypass,
    /// By the guest's own tables.
    Table,
}

/// A mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) range: IovaRange,
    pub(super) target: u64,
    pub(super) born: Moment,
    /// Accesses that passed through it.
    pub(super) uses: u64,
}

/// What caches over an endpoint's translations have to forget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stale {
    All,
    Pasid(Option<Pasid>),
    Range(Option<Pasid>, IovaRange),
}

/// Who wants to know what changes.
pub(super) trait Watcher {
    /// A mapping is gone, for these endpoints.
    fn ended(&mut self, endpoints: &BTreeSet<u32>, mapping: &Mapping);
    /// What was cached is void.
    fn dropped(&mut self, endpoint: u32, what: Stale);
}

/// What a request was about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Concern {
    /// The endpoint that it names, or those in the domain that it names.
    pub(super) endpoints: Vec<u32>,
    /// How the domain translates: after an attach, before a detach.
    pub(super) kind: Option<Kind>,
    /// Mappings that an UNMAP removed.
    pub(super) removed: u64,
}

/// See the [module](self).
#[derive(Default)]
pub(super) struct World {
    domains: BTreeMap<u32, Domain>,
    endpoints: BTreeMap<u32, u32>,
    mappings: usize,
    /// What does not fit to what was before, or is more than can be followed.
    odd: u64,
}

struct Domain {
    kind: Kind,
    endpoints: BTreeSet<u32>,
    /// By first address.
    mappings: BTreeMap<u64, Mapping>,
}

impl World {
    /// The device did this. `None` as a `request`, and one that was rejected, changes nothing.
    pub(super) fn apply(
        &mut self,
        request: &Request,
        done: bool,
        now: Moment,
        watcher: &mut impl Watcher,
    ) -> Concern {
        if !done {
            return self.concern(request);
        }
        match *request {
            Request::Attach(attach) => {
                let bypass = attach.flags.contains(AttachFlags::BYPASS);
                let kind = if bypass { Kind::Bypass } else { Kind::Mapped };
                self.join(attach.endpoint.0, attach.domain.0, kind, watcher);
                self.concern(request)
            }
            Request::AttachTable(attach) => {
                let endpoint = attach.endpoint.0;
                if !matches!(attach.table, TableDescriptor::Unbind { .. }) {
                    self.join(endpoint, attach.domain.0, Kind::Table, watcher);
                }
                watcher.dropped(endpoint, bound(&attach.table));
                self.concern(request)
            }
            Request::Detach(detach) => {
                let concern = self.concern(request);
                self.leave(detach.endpoint.0, watcher);
                concern
            }
            Request::Map(map) => {
                if let Some(range) = map.range() {
                    let mapping = Mapping { range, target: map.phys_start.0, born: now, uses: 0 };
                    self.map(map.domain.0, mapping);
                }
                self.concern(request)
            }
            Request::Unmap(unmap) => {
                let removed = unmap.range().map_or(0, |range| self.unmap(unmap.domain.0, range, watcher));
                Concern { removed, ..self.concern(request) }
            }
            Request::Invalidate(Invalidate { domain, scope, .. }) => {
                let what = match scope {
                    InvalidateScope::Domain => Stale::All,
                    InvalidateScope::Pasid(pasid) => Stale::Pasid(pasid),
                    InvalidateScope::Address { pasid, range, .. } => Stale::Range(pasid, range),
                };
                if let Some(domain) = self.domains.get(&domain.0) {
                    domain.endpoints.iter().for_each(|&endpoint| watcher.dropped(endpoint, what));
                }
                self.concern(request)
            }
            Request::Probe(_) | Request::PageResponse(_) => self.concern(request),
        }
    }

    /// Nothing is attached any more.
    pub(super) fn reset(&mut self, watcher: &mut impl Watcher) {
        for endpoint in self.endpoints.keys().copied().collect::<Vec<_>>() {
            self.leave(endpoint, watcher);
        }
        // Those that were never seen to be attached.
        for domain in std::mem::take(&mut self.domains).into_values() {
            domain.mappings.values().for_each(|mapping| watcher.ended(&domain.endpoints, mapping));
        }
        self.mappings = 0;
    }

    /// How an endpoint's accesses are translated now.
    pub(super) fn kind(&self, endpoint: u32) -> Option<Kind> {
        self.endpoints.get(&endpoint).and_then(|domain| self.domains.get(domain)).map(|domain| domain.kind)
    }

    /// An untagged access of `endpoint` passed.
    pub(super) fn touch(&mut self, endpoint: u32, range: IovaRange) {
        let Some(domain) = self.endpoints.get(&endpoint).and_then(|domain| self.domains.get_mut(domain))
        else {
            return;
        };
        let overlapping = domain.mappings.range_mut(..=range.last().0).rev();
        for (_, mapping) in
            overlapping.take_while(|(_, mapping)| mapping.range.last() >= range.start()).take(MAX_TOUCHED)
        {
            mapping.uses += 1;
        }
    }

    /// Mappings that are still there, with whom they serve.
    pub(super) fn alive(&self) -> impl Iterator<Item = (&BTreeSet<u32>, &Mapping)> {
        self.domains
            .values()
            .flat_map(|domain| domain.mappings.values().map(|mapping| (&domain.endpoints, mapping)))
    }

    /// Requests that do not fit to what was before: the trace starts in the middle, or was not written by this device.
    pub(super) fn odd(&self) -> u64 {
        self.odd
    }

    fn concern(&self, request: &Request) -> Concern {
        let (endpoint, domain) = match *request {
            Request::Attach(attach) => (Some(attach.endpoint), Some(attach.domain)),
            Request::AttachTable(attach) => (Some(attach.endpoint), Some(attach.domain)),
            Request::Detach(detach) => (Some(detach.endpoint), Some(detach.domain)),
            Request::Map(map) => (None, Some(map.domain)),
            Request::Unmap(unmap) => (None, Some(unmap.domain)),
            Request::Invalidate(invalidate) => (None, Some(invalidate.domain)),
            Request::Probe(probe) => (Some(probe.endpoint), None),
            Request::PageResponse(response) => (Some(response.endpoint), None),
        };
        let domain = domain.and_then(|domain| self.domains.get(&domain.0));
        let kind = domain.map(|domain| domain.kind);
        let endpoints = match endpoint {
            Some(endpoint) => vec![endpoint.0],
            None => domain.map_or(Vec::new(), |domain| domain.endpoints.iter().copied().collect()),
        };
        Concern { endpoints, kind, removed: 0 }
    }

    fn join(&mut self, endpoint: u32, domain: u32, kind: Kind, watcher: &mut impl Watcher) {
        if self.endpoints.get(&endpoint) == Some(&domain) {
            return;
        }
        self.leave(endpoint, watcher);
        let room = self.endpoints.len() < MAX_ENDPOINTS
            && (self.domains.len() < MAX_DOMAINS || self.domains.contains_key(&domain));
        if !room {
            self.odd += 1;
            return;
        }
        self.endpoints.insert(endpoint, domain);
        let domain = self.domains.entry(domain).or_insert_with(|| Domain::new(kind));
        domain.endpoints.insert(endpoint);
        self.odd += u64::from(domain.kind != kind);
    }

    fn leave(&mut self, endpoint: u32, watcher: &mut impl Watcher) {
        let Some(id) = self.endpoints.remove(&endpoint) else { return };
        watcher.dropped(endpoint, Stale::All);
        let Some(domain) = self.domains.get_mut(&id) else { return };
        if domain.endpoints.len() > 1 {
            domain.endpoints.remove(&endpoint);
            return;
        }
        domain.mappings.values().for_each(|mapping| watcher.ended(&domain.endpoints, mapping));
        self.mappings -= domain.mappings.len();
        self.domains.remove(&id);
    }

    fn map(&mut self, id: u32, mapping: Mapping) {
        let known = self.domains.contains_key(&id);
        if self.mappings >= MAX_MAPPINGS || (!known && self.domains.len() >= MAX_DOMAINS) {
            self.odd += 1;
            return;
        }
        // Attached before the trace starts.
        let domain = self.domains.entry(id).or_insert_with(|| Domain::new(Kind::Mapped));
        let below = domain.mappings.range(..=mapping.range.last().0).next_back();
        let overlaps = below.is_some_and(|(_, below)| below.range.last() >= mapping.range.start());
        if overlaps || domain.kind != Kind::Mapped {
            self.odd += 1;
            return;
        }
        self.odd += u64::from(!known);
        domain.mappings.insert(mapping.range.start().0, mapping);
        self.mappings += 1;
    }

    fn unmap(&mut self, id: u32, range: IovaRange, watcher: &mut impl Watcher) -> u64 {
        let Some(domain) = self.domains.get_mut(&id) else { return 0 };
        let mut removed = 0;
        while let Some((&first, mapping)) = domain.mappings.range(range.start().0..=range.last().0).next() {
            if mapping.range.last() > range.last() {
                self.odd += 1;
                break;
            }
            watcher.ended(&domain.endpoints, mapping);
            domain.mappings.remove(&first);
            removed += 1;
            self.mappings -= 1;
        }
        if removed > 0 {
            domain
                .endpoints
                .iter()
                .for_each(|&endpoint| watcher.dropped(endpoint, Stale::Range(None, range)));
        }
        removed
    }
}

impl Domain {
    fn new(kind: Kind) -> Self {
        Self { kind, endpoints: BTreeSet::new(), mappings: BTreeMap::new() }
    }
}

/// Whose translations an ATTACH_TABLE replaces.
fn bound(table: &TableDescriptor) -> Stale {
    match table {
        TableDescriptor::Unbind { pasid } => Stale::Pasid(Some(*pasid)),
        TableDescriptor::VtdPageTable(table) => Stale::Pasid(Some(table.pasid)),
        TableDescriptor::ArmPageTable(table) => Stale::Pasid(Some(table.pasid)),
        _ => Stale::All,
    }
}
