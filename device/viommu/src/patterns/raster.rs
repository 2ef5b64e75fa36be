//! What a trace looks like. The second time through: addresses over time, one picture for each endpoint.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use pgtable_formats::{IovaRange, Pasid};
use viommu_device::Status;
use viommu_queue::record::{Event, Outcome, TraceError, TraceReader};
use viommu_wire::{AccessFlags, Request};

use super::analysis::{Analysis, each, range};
use super::endpoint::EndpointFacts;
use super::waits::lanes::Lanes;
use super::world::{Kind, Mapping, Moment, Stale, Watcher, World};

/// Endpoints that are drawn: those with most events.
pub(super) const DRAWN: usize = 8;
/// Pieces of time.
const COLUMNS: usize = 600;
/// Rows of the tallest band.
const MAX_ROWS: u64 = 72;
/// Bands of one endpoint.
const MAX_BANDS: usize = 12;

/// What is drawn.
pub(super) struct Drawing {
    /// When which endpoint did what, over the whole trace.
    pub(super) lanes: Vec<Lane>,
    /// Pieces of time of a lane.
    pub(super) columns: usize,
    pub(super) rasters: Vec<Raster>,
}

/// One endpoint in the picture of all.
pub(super) struct Lane {
    pub(super) endpoint: u32,
    /// In each piece of time.
    pub(super) requests: Vec<u32>,
    pub(super) accesses: Vec<u32>,
}

/// One endpoint's picture: from its first event to its last one.
pub(super) struct Raster {
    pub(super) endpoint: u32,
    time: Time,
    pub(super) bands: Vec<Band>,
    /// Pieces of the address spaces that had no place.
    pub(super) bands_left_out: usize,
    /// Requests in each piece of time.
    pub(super) maps: Vec<u32>,
    pub(super) unmaps: Vec<u32>,
    pub(super) invalidates: Vec<u32>,
    /// How the endpoint was translated from which column on.
    pub(super) kinds: Vec<(usize, Option<Kind>)>,
    /// Where accesses wait.
    pub(super) waits: Option<Lanes>,
}

/// Events `first..=last` in columns of the same number of events.
#[derive(Clone, Copy)]
struct Time {
    first: u64,
    last: u64,
}

impl Time {
    fn columns(self) -> usize {
        let events = (self.last - self.first).saturating_add(1);
        usize::try_from(events).map_or(COLUMNS, |events| events.min(COLUMNS))
    }

    /// The column of an event; of one outside, the nearest.
    fn column(self, event: u64) -> usize {
        let at = event.clamp(self.first, self.last) - self.first;
        let events = u128::from(self.last - self.first) + 1;
        let column = u128::from(at) * self.columns() as u128 / events;
        usize::try_from(column).unwrap_or(0)
    }
}

/// A piece of one address space.
pub(super) struct Band {
    pub(super) pasid: Option<Pasid>,
    pub(super) range: IovaRange,
    pub(super) mapped: Plane,
    pub(super) read: Plane,
    pub(super) written: Plane,
    pub(super) refused: Plane,
    pub(super) waited: Plane,
}

/// One bit for each row and column.
#[derive(Clone)]
pub(super) struct Plane {
    rows: Vec<Vec<u64>>,
}

impl Plane {
    fn new(rows: usize, columns: usize) -> Self {
        Self { rows: vec![vec![0; columns.div_ceil(64)]; rows] }
    }

    pub(super) fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Sets `columns` of `rows`, both inclusive.
    fn set(&mut self, rows: (usize, usize), columns: (usize, usize)) {
        let (first, last) = columns;
        for row in self.rows.iter_mut().take(rows.1 + 1).skip(rows.0) {
            for (index, word) in row.iter_mut().enumerate().take(last / 64 + 1).skip(first / 64) {
                let from = if index == first / 64 { first % 64 } else { 0 };
                let to = if index == last / 64 { last % 64 } else { 63 };
                *word |= (u64::MAX >> (63 - to)) & (u64::MAX << from);
            }
        }
    }

    fn get(&self, row: usize, column: usize) -> bool {
        self.rows
            .get(row)
            .and_then(|row| row.get(column / 64))
            .is_some_and(|word| word >> (column % 64) & 1 != 0)
    }

    /// What is set, as row, first column, and number of columns.
    pub(super) fn runs(&self, columns: usize) -> Vec<(usize, usize, usize)> {
        let mut runs = Vec::new();
        for row in 0..self.rows.len() {
            let mut start = None;
            for column in 0..=columns {
                match (self.get(row, column) && column < columns, start) {
                    (true, None) => start = Some(column),
                    (false, Some(first)) => {
                        runs.push((row, first, column - first));
                        start = None;
                    }
                    _ => {}
                }
            }
        }
        runs
    }
}

/// Draws what `analysis` found, from the same trace once more.
pub(super) fn draw<R: Read>(
    trace: &mut TraceReader<R>,
    analysis: &Analysis,
    partial: bool,
) -> Result<Drawing, TraceError> {
    let whole = Time { first: 0, last: analysis.events.saturating_sub(1) };
    let mut canvas =
        Canvas { whole, now: Moment::default(), rasters: BTreeMap::new(), lanes: BTreeMap::new() };
    for facts in analysis.endpoints.iter().take(DRAWN) {
        let (first, last) = facts.span.unwrap_or((0, 0));
        let raster = Raster::new(facts, Time { first, last: last.max(first) });
        canvas.rasters.insert(facts.endpoint, raster);
        let empty = vec![0; whole.columns()];
        let lane = Lane { endpoint: facts.endpoint, requests: empty.clone(), accesses: empty };
        canvas.lanes.insert(facts.endpoint, lane);
    }
    let mut world = World::default();
    each(trace, partial, |now, event| canvas.event(&mut world, now, event))?;
    for (endpoints, mapping) in world.alive() {
        canvas.mapping(endpoints, mapping, u64::MAX);
    }
    let order = analysis.endpoints.iter().filter_map(|facts| canvas.rasters.remove(&facts.endpoint));
    let rasters = order.collect();
    Ok(Drawing { lanes: canvas.lanes.into_values().collect(), columns: whole.columns(), rasters })
}

/// How many rows a piece of an address space gets: a page is not less than a row, and large ones do not grow without end.
fn rows(range: IovaRange) -> usize {
    let pages = (range.length_minus_one() >> 12).saturating_add(1);
    usize::try_from(pages.min(MAX_ROWS)).unwrap_or(1).max(1)
}

struct Canvas {
    whole: Time,
    now: Moment,
    rasters: BTreeMap<u32, Raster>,
    lanes: BTreeMap<u32, Lane>,
}

impl Canvas {
    fn event(&mut self, world: &mut World, now: Moment, event: Event<'_>) {
        self.now = now;
        match event {
            Event::Access(access) => {
                let id = access.stream.endpoint.0;
                let whole = self.whole.column(now.event);
                if let Some(lane) = self.lanes.get_mut(&id) {
                    count(&mut lane.accesses, whole);
                }
                let (Some(range), Some(raster)) = (range(&access), self.rasters.get_mut(&id)) else { return };
                let column = raster.time.column(now.event);
                if let Some(lanes) = &mut raster.waits {
                    lanes.access(&access, column);
                }
                for band in raster.bands.iter_mut().filter(|band| band.pasid == access.stream.pasid) {
                    let Some(rows) = band.rows(range) else { continue };
                    let plane = match access.outcome {
                        Outcome::Passed if access.access.contains(AccessFlags::WRITE) => &mut band.written,
                        Outcome::Passed => &mut band.read,
                        Outcome::Waits { .. } => &mut band.waited,
                        _ => &mut band.refused,
                    };
                    plane.set(rows, (column, column));
                }
            }
            Event::Request { readable, status } => {
                let Ok(request) = Request::decode(readable) else { return };
                let done = status == Some(Status::Ok);
                let concern = world.apply(&request, done, now, self);
                let whole = self.whole.column(now.event);
                for id in concern.endpoints {
                    if let Some(lane) = self.lanes.get_mut(&id) {
                        count(&mut lane.requests, whole);
                    }
                    let Some(raster) = self.rasters.get_mut(&id) else { continue };
                    let column = raster.time.column(now.event);
                    raster.kind(column, world.kind(id));
                    if let Some(lanes) = raster.waits.as_mut().filter(|_| done) {
                        lanes.request(&request, column);
                    }
                    let counts = match request {
                        Request::Map(_) => &mut raster.maps,
                        Request::Unmap(_) => &mut raster.unmaps,
                        Request::Invalidate(_) => &mut raster.invalidates,
                        _ => continue,
                    };
                    count(counts, column);
                }
            }
            Event::Reset => {
                world.reset(self);
                self.rasters.values_mut().for_each(|raster| raster.kind(raster.time.column(now.event), None));
            }
            Event::Kick { .. } | Event::PageRequest(_) | Event::Waited(_) => {}
        }
    }

    /// A mapping was there until this event.
    fn mapping(&mut self, endpoints: &BTreeSet<u32>, mapping: &Mapping, until: u64) {
        for id in endpoints {
            let Some(raster) = self.rasters.get_mut(id) else { continue };
            let columns = (raster.time.column(mapping.born.event), raster.time.column(until));
            for band in raster.bands.iter_mut().filter(|band| band.pasid.is_none()) {
                if let Some(rows) = band.rows(mapping.range) {
                    band.mapped.set(rows, columns);
                }
            }
        }
    }
}

fn count(counts: &mut [u32], column: usize) {
    if let Some(count) = counts.get_mut(column) {
        *count = count.saturating_add(1);
    }
}

impl Watcher for Canvas {
    fn ended(&mut self, endpoints: &BTreeSet<u32>, mapping: &Mapping) {
        self.mapping(endpoints, mapping, self.now.event);
    }

    fn dropped(&mut self, _: u32, _: Stale) {}
}

impl Raster {
    fn new(facts: &EndpointFacts, time: Time) -> Self {
        let columns = time.columns();
        let pieces = facts.extents.pieces();
        let bands = pieces.iter().take(MAX_BANDS).map(|&(pasid, range)| {
            let plane = Plane::new(rows(range), columns);
            let [mapped, read, written, waited] = std::array::from_fn(|_| plane.clone());
            Band { pasid, range, mapped, read, written, refused: plane, waited }
        });
        Self {
            endpoint: facts.endpoint,
            time,
            bands: bands.collect(),
            bands_left_out: pieces.len().saturating_sub(MAX_BANDS),
            maps: vec![0; columns],
            unmaps: vec![0; columns],
            invalidates: vec![0; columns],
            kinds: vec![(0, None)],
            waits: facts.waits.as_ref().map(|waits| Lanes::new(waits, columns)),
        }
    }

    /// Pieces of time; each is the same number of events.
    pub(super) fn columns(&self) -> usize {
        self.time.columns()
    }

    /// The column of an event.
    pub(super) fn column(&self, event: u64) -> usize {
        self.time.column(event)
    }

    /// The first event and the last one.
    pub(super) fn span(&self) -> (u64, u64) {
        (self.time.first, self.time.last)
    }

    fn kind(&mut self, column: usize, kind: Option<Kind>) {
        match self.kinds.last_mut() {
            Some((_, last)) if *last == kind => {}
            // The last word within a column counts.
            Some((at, last)) if *at == column => *last = kind,
            _ => self.kinds.push((column, kind)),
        }
    }
}

impl Band {
    /// The rows that a range lies in.
    fn rows(&self, range: IovaRange) -> Option<(usize, usize)> {
        let first = range.start().max(self.range.start());
        let overlap = IovaRange::new(first, range.last().min(self.range.last()))?;
        let all = u128::from(self.range.length_minus_one()) + 1;
        let rows = self.mapped.rows() as u128;
        let row = |at: u64| {
            let row = u128::from(at - self.range.start().0) * rows / all;
            usize::try_from(row).unwrap_or(0)
        };
        Some((row(overlap.start().0), row(overlap.last().0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_comes_back_as_runs() {
        let mut plane = Plane::new(3, 200);
        plane.set((1, 2), (60, 130));
        plane.set((0, 0), (199, 199));
        plane.set((2, 2), (0, 0));
        assert_eq!(plane.runs(200), [(0, 199, 1), (1, 60, 71), (2, 0, 1), (2, 60, 71)]);
    }
}
