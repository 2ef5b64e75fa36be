//! What is found out about one endpoint.

use std::collections::{BTreeMap, HashSet};

use pgtable_formats::{IovaRange, Pasid};
use serde::Serialize;
use viommu_queue::record::{Accessed, Outcome};
use viommu_wire::AccessFlags;

use super::extent::Extents;
use super::histogram::Histogram;
use super::locality::{Iotlb, PER_ACCESS, Reuse, Verdicts};
use super::saving::Saving;
use super::stride::{StrideFacts, Strides};
use super::waits::{WaitFacts, Waits};
use super::world::{Kind, Mapping, Moment};

/// Addresses and pieces of memory that are recognised when they are mapped again, and PASIDs that are counted.
const KNOWN: usize = 1 << 16;

/// One endpoint, as far as the trace goes.
pub(super) struct Endpoint {
    pub(super) saving: Saving,
    pub(super) mappings: Mappings,
    pub(super) accesses: Accesses,
    pub(super) extents: Extents,
    iotlb: Iotlb,
    reuse: Reuse,
    strides: Strides,
    pub(super) waits: Waits,
    seen: Seen,
    /// Events that are about it.
    pub(super) events: u64,
    /// The first and the last of them.
    pub(super) span: Option<(u64, u64)>,
    pub(super) rejected: u64,
    /// ATTACH and ATTACH_TABLE, by what came of them.
    pub(super) attached: BTreeMap<Kind, u64>,
}

#[derive(Default)]
struct Seen {
    addresses: HashSet<u64>,
    targets: HashSet<u64>,
    pasids: HashSet<Pasid>,
}

/// Mappings made by MAP.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Mappings {
    pub(super) made: u64,
    /// Of those, how many at an address where there was one before.
    pub(super) address_again: u64,
    /// How many of memory that had been mapped before.
    pub(super) memory_again: u64,
    /// Bytes.
    pub(super) sizes: Histogram,
    /// From MAP to the end, in the trace's time; of those that ended.
    pub(super) lifetimes: Histogram,
    /// The same in events.
    pub(super) lifetimes_in_events: Histogram,
    /// Accesses through each, of those that ended.
    pub(super) uses: Histogram,
    pub(super) ended: u64,
    pub(super) alive_at_the_end: u64,
}

/// Accesses.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Accesses {
    pub(super) total: u64,
    pub(super) bytes: u64,
    pub(super) reads: u64,
    pub(super) writes: u64,
    pub(super) sizes: Histogram,
    pub(super) outcomes: BTreeMap<&'static str, u64>,
    /// By what translated the endpoint then.
    pub(super) through: BTreeMap<&'static str, u64>,
    /// PASIDs among them; 65536 at most are counted.
    pub(super) pasids: u64,
    /// Accesses that were longer than is followed page by page.
    pub(super) long: u64,
}

/// Hits, misses, and how far apart uses are.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Locality {
    pub(super) entries: usize,
    #[serde(flatten)]
    pub(super) verdicts: Verdicts,
    /// Of a cache from which nothing is dropped: entries, and hits.
    pub(super) without_drops: Vec<(u64, u64)>,
    pub(super) reuse_distances: Histogram,
    pub(super) first_uses: u64,
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub(super) struct EndpointFacts {
    pub(super) endpoint: u32,
    pub(super) events: u64,
    pub(super) rejected: u64,
    pub(super) attached: BTreeMap<Kind, u64>,
    pub(super) requests: Saving,
    pub(super) mappings: Mappings,
    pub(super) accesses: Accesses,
    pub(super) strides: StrideFacts,
    pub(super) iotlb: Locality,
    /// Accesses that waited for a page, if any.
    pub(super) waits: Option<WaitFacts>,
    #[serde(skip)]
    pub(super) extents: Extents,
    /// The number of its first event, and of its last one.
    pub(super) span: Option<(u64, u64)>,
}

impl Endpoint {
    pub(super) fn new(entries: usize) -> Self {
        Self {
            saving: Saving::default(),
            mappings: Mappings::default(),
            accesses: Accesses::default(),
            extents: Extents::default(),
            iotlb: Iotlb::new(entries),
            reuse: Reuse::new(),
            strides: Strides::default(),
            waits: Waits::default(),
            seen: Seen::default(),
            events: 0,
            span: None,
            rejected: 0,
            attached: BTreeMap::new(),
        }
    }

    /// An event is about it.
    pub(super) fn event(&mut self, now: Moment) {
        self.events += 1;
        self.span = Some((self.span.map_or(now.event, |(first, _)| first), now.event));
    }

    /// A MAP succeeded.
    pub(super) fn mapped(&mut self, range: IovaRange, target: u64) {
        self.mappings.made += 1;
        self.mappings.sizes.add(range.length_minus_one().saturating_add(1));
        self.mappings.address_again += u64::from(again(&mut self.seen.addresses, range.start().0));
        self.mappings.memory_again += u64::from(again(&mut self.seen.targets, target));
        self.extents.add(None, range);
    }

    /// A mapping ended.
    pub(super) fn ended(&mut self, mapping: &Mapping, now: Moment) {
        self.mappings.ended += 1;
        self.mappings.lifetimes.add(now.time.saturating_sub(mapping.born.time));
        self.mappings.lifetimes_in_events.add(now.event.saturating_sub(mapping.born.event));
        self.mappings.uses.add(mapping.uses);
    }

    pub(super) fn dropped(&mut self, what: super::world::Stale) {
        self.iotlb.forget(what);
    }

    pub(super) fn access(&mut self, access: &Accessed, range: IovaRange, kind: Option<Kind>, now: Moment) {
        if let Outcome::Waits { group } = access.outcome {
            self.extents.add(access.stream.pasid, range);
            return self.waits.tried((access.stream.pasid, group), range, access.access, now);
        }
        let facts = &mut self.accesses;
        facts.total += 1;
        facts.bytes = facts.bytes.saturating_add(access.length.into());
        let write = access.access.contains(AccessFlags::WRITE);
        facts.writes += u64::from(write);
        facts.reads += u64::from(access.access.contains(AccessFlags::READ));
        facts.sizes.add(access.length.into());
        *facts.outcomes.entry(outcome(access.outcome)).or_insert(0) += 1;
        *facts.through.entry(through(kind)).or_insert(0) += 1;
        let pasid = access.stream.pasid;
        if let Some(pasid) = pasid
            && self.seen.pasids.len() < KNOWN
        {
            self.seen.pasids.insert(pasid);
        }
        self.extents.add(pasid, range);
        self.strides.add(pasid, write, access.iova.0, access.length);
        // A fault is not cached.
        if access.outcome == Outcome::Passed {
            self.waits.passed(pasid, range);
            let (first, last) = (range.start().0 >> 12, range.last().0 >> 12);
            facts.long += u64::from(last - first >= PER_ACCESS);
            for page in (first..=last).take(usize::try_from(PER_ACCESS).unwrap_or(usize::MAX)) {
                self.iotlb.look_up((pasid, page));
                self.reuse.touch((pasid, page));
            }
        }
    }

    pub(super) fn facts(self, endpoint: u32, entries: usize) -> EndpointFacts {
        let Self {
            saving,
            mappings,
            accesses,
            extents,
            iotlb,
            reuse,
            strides,
            waits,
            seen,
            events,
            span,
            rejected,
            attached,
        } = self;
        let iotlb = Locality {
            entries,
            verdicts: iotlb.verdicts,
            without_drops: reuse.curve(),
            reuse_distances: reuse.distances,
            first_uses: reuse.first,
        };
        let accesses = Accesses { pasids: seen.pasids.len() as u64, ..accesses };
        let strides = strides.facts();
        EndpointFacts {
            endpoint,
            events,
            rejected,
            attached,
            requests: saving,
            mappings,
            accesses,
            strides,
            iotlb,
            waits: waits.facts(),
            extents,
            span,
        }
    }
}

impl EndpointFacts {
    /// Accesses that were refused.
    pub(super) fn faults(&self) -> u64 {
        let passed = self.accesses.outcomes.get(outcome(Outcome::Passed)).copied().unwrap_or(0);
        self.accesses.total - passed
    }
}

/// Whether it is known; it is from now on, while there is room.
fn again(known: &mut HashSet<u64>, value: u64) -> bool {
    known.contains(&value) || (known.len() < KNOWN && !known.insert(value))
}

pub(super) const fn outcome(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Passed => "passed",
        Outcome::Unattached => "unattached",
        Outcome::Unmapped => "unmapped",
        Outcome::Permission => "permission",
        Outcome::Configuration => "configuration",
        Outcome::TableAccess => "table_access",
        Outcome::Malformed => "malformed",
        Outcome::Waits { .. } => "waits",
    }
}

const fn through(kind: Option<Kind>) -> &'static str {
    match kind {
        None => "nothing",
        Some(Kind::Bypass) => "bypass",
        Some(Kind::Mapped) => "mappings",
        Some(Kind::Table) => "own_table",
    }
}
