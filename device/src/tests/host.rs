//! A scripted machine that holds the device to the contract of `Host`, and fails where it is told to.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;

use pgtable_formats::context::{Canonical, smmuv3, vtd};
use viommu_wire::{EndpointId, IovaRange, PageResponseCode, ReservedRegion};

use crate::host::*;
use crate::mapping::{Mapping, Mappings};

#[derive(Debug, Default)]
pub(super) struct TestHost {
    endpoints: BTreeMap<EndpointId, EndpointCaps>,
    spaces: BTreeMap<u32, Content>,
    bound: BTreeMap<Stream, u32>,
    pub(super) created: u32,
    pub(super) destroyed: u32,
    /// Calls that can fail, so far.
    pub(super) calls: usize,
    /// Which of them do.
    pub(super) fails: Fails,
    pub(super) error: Option<HostError>,
    pub(super) last_failed: Option<&'static str>,
    pub(super) faults: VecDeque<FaultReport>,
    pub(super) invalidations: Vec<Invalidation>,
    /// Page requests that were not handed out.
    pub(super) page_requests: VecDeque<PageRequestReport>,
    /// Groups that were handed out, or begun to be, and wait for an answer; with whether they are whole.
    pub(super) open: BTreeMap<(Stream, u16), bool>,
    /// Every answer to an open group.
    pub(super) answers: Vec<GroupResponse>,
    /// How many of an invalidation batch are done before it stops; `None`: all.
    pub(super) stops: VecDeque<usize>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Fails {
    #[default]
    Never,
    At(usize),
    From(usize),
    Always,
}

/// Not to be cloned, as a kernel's object is not.
#[derive(Debug)]
pub(super) struct TestSpace(u32);

#[derive(Debug)]
enum Content {
    Identity,
    Mapped(Mappings),
    Table(EndpointId, Canonical),
}

impl TestHost {
    pub(super) fn with(mut self, id: u32, tables: Option<TableCaps>, reserved: Vec<ReservedRegion>) -> Self {
        self.endpoints.insert(EndpointId(id), EndpointCaps { tables, reserved, ..EndpointCaps::default() });
        self
    }

    /// Lets the accesses of these endpoints wait for pages.
    pub(super) fn waiting(mut self, endpoints: &[u32]) -> Self {
        for &id in endpoints {
            self.endpoints.get_mut(&EndpointId(id)).unwrap().page_requests = true;
        }
        self
    }

    /// Forgets what waits in `stream`, and what the stream served besides.
    fn close(&mut self, stream: Stream) {
        let bound = &self.bound;
        let served = |other: Stream| {
            let shares = stream.pasid.is_none() && !bound.contains_key(&other);
            other.endpoint == stream.endpoint && (other == stream || shares)
        };
        self.page_requests.retain(|request| !served(request.stream));
        self.open.retain(|&(other, _), _| !served(other));
    }

    /// Everything that a guest could notice, as text.
    pub(super) fn state(&self) -> String {
        let mut text = String::new();
        for (stream, space) in &self.bound {
            let pasid = stream.pasid.map(|pasid| pasid.value());
            write!(text, "{}/{pasid:?}: ", stream.endpoint).unwrap();
            match &self.spaces[space] {
                Content::Identity => writeln!(text, "identity").unwrap(),
                Content::Mapped(mappings) => {
                    writeln!(text, "#{space} {:?}", mappings.iter().collect::<Vec<_>>()).unwrap();
                }
                Content::Table(endpoint, table) => writeln!(text, "#{space} {endpoint} {table:?}").unwrap(),
            }
        }
        text
    }

    pub(super) fn live_spaces(&self) -> usize {
        assert_eq!(u32::try_from(self.spaces.len()), Ok(self.created - self.destroyed));
        self.spaces.len()
    }

    pub(super) fn bound_to(&self, stream: Stream) -> Option<&'static str> {
        Some(match &self.spaces[self.bound.get(&stream)?] {
            Content::Identity => "identity",
            Content::Mapped(_) => "mapped",
            Content::Table(_, Canonical::VtdFirstStage(_) | Canonical::Smmuv3PageTable(_)) => "page table",
            Content::Table(..) => "PASID table",
        })
    }

    /// The guest's table that `stream` is bound to.
    pub(super) fn table_of(&self, stream: Stream) -> Option<&Canonical> {
        match &self.spaces[self.bound.get(&stream)?] {
            Content::Table(_, table) => Some(table),
            Content::Identity | Content::Mapped(_) => None,
        }
    }

    pub(super) fn bound_streams(&self) -> usize {
        self.bound.len()
    }

    fn step(&mut self, name: &'static str) -> Result<(), HostError> {
        let call = self.calls;
        self.calls += 1;
        let fails = match self.fails {
            Fails::Never => false,
            Fails::At(at) => call == at,
            Fails::From(from) => call >= from,
            Fails::Always => true,
        };
        if fails {
            self.last_failed = Some(name);
            return Err(self.error.unwrap_or(HostError::Failed(5)));
        }
        Ok(())
    }
}

impl Host for TestHost {
    type Space = TestSpace;

    fn endpoints(&self) -> Vec<EndpointId> {
        self.endpoints.keys().copied().collect()
    }

    fn caps(&self, endpoint: EndpointId) -> Option<&EndpointCaps> {
        self.endpoints.get(&endpoint)
    }

    fn create(&mut self, spec: SpaceSpec<'_>) -> Result<TestSpace, HostError> {
        self.step("create")?;
        let content = match spec {
            SpaceSpec::Identity => Content::Identity,
            SpaceSpec::Mapped => Content::Mapped(Mappings::new()),
            SpaceSpec::GuestTable { endpoint, table } => Content::Table(endpoint, table.clone()),
        };
        let id = self.created;
        self.created += 1;
        self.spaces.insert(id, content);
        Ok(TestSpace(id))
    }

    fn destroy(&mut self, space: TestSpace) {
        assert!(!self.bound.values().any(|&bound| bound == space.0), "destroyed while bound");
        assert!(self.spaces.remove(&space.0).is_some());
        self.destroyed += 1;
    }

    fn map(&mut self, space: &mut TestSpace, mapping: Mapping) -> Result<(), MapError> {
        self.step("map")?;
        match self.spaces.get_mut(&space.0) {
            Some(Content::Mapped(mappings)) => mappings.insert(mapping).map_err(|_| MapError::Overlap),
            other => panic!("map in {other:?}"),
        }
    }

    fn unmap(&mut self, space: &mut TestSpace, range: IovaRange) -> Result<usize, UnmapError> {
        self.step("unmap")?;
        match self.spaces.get_mut(&space.0) {
            Some(Content::Mapped(mappings)) => mappings.remove(range).map_err(|_| UnmapError::Split),
            other => panic!("unmap in {other:?}"),
        }
    }

    fn overlaps(&self, space: &TestSpace, range: IovaRange) -> bool {
        match &self.spaces[&space.0] {
            Content::Mapped(mappings) => mappings.overlaps(range),
            other => panic!("overlaps in {other:?}"),
        }
    }

    fn bind(&mut self, stream: Stream, space: Option<&mut TestSpace>) -> Result<(), HostError> {
        assert!(self.endpoints.contains_key(&stream.endpoint));
        self.step("bind")?;
        match space {
            Some(space) => {
                match &self.spaces[&space.0] {
                    Content::Table(endpoint, _) => assert_eq!(*endpoint, stream.endpoint),
                    Content::Identity | Content::Mapped(_) => assert_eq!(stream.pasid, None),
                }
                let before = self.bound.insert(stream, space.0);
                assert_ne!(before, Some(space.0), "told twice");
            }
            None => {
                self.bound.remove(&stream);
            }
        }
        self.close(stream);
        Ok(())
    }

    fn invalidate(&mut self, batch: &[Invalidation]) -> Result<(), Stopped> {
        assert!(!batch.is_empty());
        if let Err(error) = self.step("invalidate") {
            return Err(Stopped { done: 0, error });
        }
        let done = self.stops.pop_front().unwrap_or(batch.len());
        for invalidation in &batch[..done] {
            let bound = |stream: &Stream| stream.endpoint == invalidation.endpoint;
            assert!(self.bound.keys().any(bound), "invalidation of what is not bound");
            assert!(!invalidation.caches.is_empty());
            self.invalidations.push(*invalidation);
            if let Some(revoked) = invalidation.revoked() {
                self.page_requests.retain(|request| request.stream != revoked);
                self.open.retain(|&(stream, _), _| stream != revoked);
            }
        }
        if done < batch.len() {
            return Err(Stopped { done, error: HostError::Failed(5) });
        }
        Ok(())
    }

    fn next_fault(&mut self) -> Option<FaultReport> {
        self.faults.pop_front()
    }

    fn next_page_request(&mut self) -> Option<PageRequestReport> {
        let request = self.page_requests.pop_front()?;
        let before = self.open.insert((request.stream, request.group), request.last);
        assert_ne!(before, Some(true), "a script that uses a number twice");
        Some(request)
    }

    fn respond(&mut self, response: &GroupResponse) -> Result<Answered, HostError> {
        self.step("respond")?;
        let GroupResponse { stream, group, code } = *response;
        let Some(is_whole) = self.open.remove(&(stream, group)) else { return Ok(Answered::Gone) };
        self.answers.push(*response);
        if !is_whole {
            assert_ne!(code, PageResponseCode::Success, "a group is answered as a whole");
            let mut is_rest = true;
            self.page_requests.retain(|request| {
                let goes = is_rest && (request.stream, request.group) == (stream, group);
                is_rest &= !(goes && request.last);
                !goes
            });
        }
        Ok(Answered::Taken)
    }
}

pub(super) fn smmuv3() -> Option<TableCaps> {
    Some(TableCaps::Smmuv3(smmuv3::Caps::from_registers(smmuv3::IdRegisters::SOFTWARE)))
}

pub(super) fn vtd() -> Option<TableCaps> {
    Some(TableCaps::Vtd(vtd::Caps::from_registers(vtd::CapRegisters::SOFTWARE)))
}
