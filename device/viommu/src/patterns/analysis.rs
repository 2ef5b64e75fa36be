//! What a trace says. The first time through: everything that is counted.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use pgtable_formats::IovaRange;
use serde::Serialize;
use viommu_device::Status;
use viommu_queue::record::{Accessed, Clock, Event, Outcome, TraceError, TraceReader, Waited};
use viommu_wire::{AttachTable, Request, TableDescriptor};

use super::endpoint::{Endpoint, EndpointFacts};
use super::saving::Saving;
use super::world::{Concern, MAX_ENDPOINTS, Mapping, Moment, Stale, Watcher, World};

/// Everything that is told.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Analysis {
    /// Events in the trace.
    pub(super) events: u64,
    /// Where it was cut and read all the same, why.
    pub(super) cut: Option<String>,
    /// Events that the recorder left out at the end.
    pub(super) left_out: u64,
    /// What lifetimes are in: `events` or `nanoseconds`.
    pub(super) unit: Unit,
    /// From the first event to the last one, in that unit.
    pub(super) duration: u64,
    pub(super) accesses: u64,
    pub(super) resets: u64,
    /// Requests that the device could not make sense of.
    pub(super) undecodable: u64,
    /// Requests that do not fit to those before: the trace starts in the middle, or there is more than is followed.
    pub(super) odd: u64,
    /// Events of endpoints beyond those that are followed.
    pub(super) of_others: u64,
    pub(super) requests: Saving,
    /// Those with most events first.
    pub(super) endpoints: Vec<EndpointFacts>,
}

/// What times are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Unit {
    Events,
    Nanoseconds,
}

/// Reads all of it. `entries`: how large the translation caches are to be thought; `partial`: what is whole of a trace
/// that was cut is good enough.
pub(super) fn analyse<R: Read>(
    trace: &mut TraceReader<R>,
    entries: usize,
    partial: bool,
) -> Result<Analysis, TraceError> {
    let mut pass = Pass { entries, ..Pass::default() };
    let mut world = World::default();
    let cut = each(trace, partial, |now, event| pass.event(&mut world, now, event))?;
    let unit = match trace.clock() {
        Clock::Records => Unit::Events,
        Clock::Nanoseconds => Unit::Nanoseconds,
    };
    for (endpoints, _) in world.alive() {
        for id in endpoints {
            if let Some(endpoint) = pass.watched.endpoints.get_mut(id) {
                endpoint.mappings.alive_at_the_end += 1;
            }
        }
    }
    let mut endpoints: Vec<EndpointFacts> =
        pass.watched.endpoints.into_iter().map(|(id, endpoint)| endpoint.facts(id, entries)).collect();
    endpoints.sort_by_key(|endpoint| (std::cmp::Reverse(endpoint.events), endpoint.endpoint));
    Ok(Analysis {
        events: pass.events,
        cut,
        left_out: trace.lost(),
        unit,
        duration: pass.watched.now.time.saturating_sub(pass.first.unwrap_or(0)),
        accesses: pass.accesses,
        resets: pass.resets,
        undecodable: pass.undecodable,
        odd: world.odd(),
        of_others: pass.watched.of_others,
        requests: pass.saving,
        endpoints,
    })
}

/// Gives every event to `sink`. Where the trace is cut, and that is good enough, says so instead of failing.
pub(super) fn each<R: Read>(
    trace: &mut TraceReader<R>,
    partial: bool,
    mut sink: impl FnMut(Moment, Event<'_>),
) -> Result<Option<String>, TraceError> {
    let mut number = 0;
    loop {
        match trace.next_event() {
            Ok(Some((time, event))) => sink(Moment { event: number, time }, event),
            Ok(None) => return Ok(None),
            Err(error @ TraceError::Cut { .. }) if partial => return Ok(Some(error.to_string())),
            Err(error) => return Err(error),
        }
        number += 1;
    }
}

/// Where an access goes.
pub(super) fn range(access: &Accessed) -> Option<IovaRange> {
    IovaRange::from_length(access.iova, access.length.into())
}

#[derive(Default)]
struct Pass {
    entries: usize,
    watched: Watched,
    saving: Saving,
    events: u64,
    first: Option<u64>,
    accesses: u64,
    resets: u64,
    undecodable: u64,
}

#[derive(Default)]
struct Watched {
    endpoints: BTreeMap<u32, Endpoint>,
    now: Moment,
    of_others: u64,
}

impl Pass {
    fn event(&mut self, world: &mut World, now: Moment, event: Event<'_>) {
        self.events += 1;
        self.watched.now = now;
        self.first.get_or_insert(now.time);
        match event {
            Event::Request { readable, status } => self.request(world, readable, status),
            Event::Access(access) => {
                // One that waits comes again.
                self.accesses += u64::from(!matches!(access.outcome, Outcome::Waits { .. }));
                let id = access.stream.endpoint.0;
                let Some(range) = range(&access) else { return };
                let kind = world.kind(id);
                if access.stream.pasid.is_none() && access.outcome == Outcome::Passed {
                    world.touch(id, range);
                }
                if let Some(endpoint) = self.watched.endpoint(id, self.entries) {
                    endpoint.event(now);
                    endpoint.access(&access, range, kind, now);
                }
            }
            Event::PageRequest(asked) => {
                if let Some(endpoint) = self.watched.endpoint(asked.stream.endpoint.0, self.entries) {
                    endpoint.event(now);
                    endpoint.waits.told(&asked, now);
                }
            }
            Event::Waited(Waited { stream, group, end }) => {
                if let Some(endpoint) = self.watched.endpoint(stream.endpoint.0, self.entries) {
                    endpoint.event(now);
                    endpoint.waits.ended((stream.pasid, group), end, now);
                }
            }
            Event::Kick { .. } => {
                self.saving.kick();
            }
            Event::Reset => {
                self.resets += 1;
                world.reset(&mut self.watched);
            }
        }
    }

    fn request(&mut self, world: &mut World, readable: &[u8], status: Option<Status>) {
        let done = status == Some(Status::Ok);
        let request = Request::decode(readable).ok();
        let length = request.map_or(readable.len(), |request| request.kind().readable_len());
        let Some(request) = request else {
            self.undecodable += 1;
            self.saving.request(None, done, &Concern::default(), length);
            return;
        };
        // Endpoints are known from the first time that they are named.
        let concern = world.apply(&request, done, self.watched.now, &mut self.watched);
        self.saving.request(Some(&request), done, &concern, length);
        for &id in &concern.endpoints {
            let now = self.watched.now;
            let Some(endpoint) = self.watched.endpoint(id, self.entries) else { continue };
            endpoint.event(now);
            endpoint.rejected += u64::from(!done);
            endpoint.saving.request(Some(&request), done, &concern, length);
            if !done {
                continue;
            }
            match request {
                Request::Map(map) => {
                    if let Some(range) = map.range() {
                        endpoint.mapped(range, map.phys_start.0);
                    }
                }
                Request::AttachTable(AttachTable { table: TableDescriptor::Unbind { .. }, .. }) => {}
                Request::Attach(_) | Request::AttachTable(_) => {
                    if let Some(kind) = concern.kind {
                        *endpoint.attached.entry(kind).or_insert(0) += 1;
                    }
                }
                Request::PageResponse(response) => {
                    endpoint.waits.answered((response.pasid, response.group_id), response.code, now);
                }
                _ => {}
            }
        }
    }
}

impl Watched {
    fn endpoint(&mut self, id: u32, entries: usize) -> Option<&mut Endpoint> {
        if self.endpoints.len() >= MAX_ENDPOINTS && !self.endpoints.contains_key(&id) {
            self.of_others += 1;
            return None;
        }
        Some(self.endpoints.entry(id).or_insert_with(|| Endpoint::new(entries)))
    }
}

impl Watcher for Watched {
    fn ended(&mut self, endpoints: &BTreeSet<u32>, mapping: &Mapping) {
        for id in endpoints {
            if let Some(endpoint) = self.endpoints.get_mut(id) {
                endpoint.ended(mapping, self.now);
            }
        }
    }

    fn dropped(&mut self, endpoint: u32, what: Stale) {
        if let Some(endpoint) = self.endpoints.get_mut(&endpoint) {
            endpoint.dropped(what);
        }
    }
}
