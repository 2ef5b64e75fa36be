//! A scripted machine that holds the device to the contract of `Host`, and fails where it is told to.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;

use pgtable_formats::context::{Canonical, smmuv3, vtd};
use viommu_wire::{EndpointId, IovaRange, ReservedRegion};

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
        self.endpoints.insert(EndpointId(id), EndpointCaps { tables, reserved });
        self
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
            Content::Table(_, Canonical::VtdFirstStage(_)) => "page table",
            Content::Table(..) => "PASID table",
        })
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
        }
        if done < batch.len() {
            return Err(Stopped { done, error: HostError::Failed(5) });
        }
        Ok(())
    }

    fn next_fault(&mut self) -> Option<FaultReport> {
        self.faults.pop_front()
    }
}

pub(super) fn smmuv3() -> Option<TableCaps> {
    Some(TableCaps::Smmuv3(smmuv3::Caps::from_registers(smmuv3::IdRegisters::SOFTWARE)))
}

pub(super) fn vtd() -> Option<TableCaps> {
    Some(TableCaps::Vtd(vtd::Caps::from_registers(vtd::CapRegisters::SOFTWARE)))
}
