//! A host that fails where it is told to.

use std::collections::VecDeque;

use viommu_device::host::{
    Answered, EndpointCaps, FaultReport, GroupResponse, Host, HostError, Invalidation, MapError,
    PageRequestReport, SpaceSpec, Stopped, Stream, UnmapError,
};
use viommu_device::mapping::Mapping;
use viommu_device::soft::SoftHost;
use viommu_queue::GuestTables;
use viommu_wire::{EndpointId, IovaRange};

use super::Memory;
use super::bare::soft_host;
use super::machine::Setup;

/// A method of [`Host`] that can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// [`Host::create`].
    Create,
    /// [`Host::map`].
    Map,
    /// [`Host::unmap`].
    Unmap,
    /// [`Host::bind`].
    Bind,
    /// [`Host::invalidate`].
    Invalidate,
}

/// A software host in front of which calls can be made to fail; a failed call has no effect.
#[derive(Debug)]
pub struct Flaky {
    /// What does the work.
    pub inner: SoftHost<GuestTables>,
    /// What becomes of the next calls, in this order: `None` lets one such call through. Calls that are not the next one
    /// of the list succeed.
    pub script: VecDeque<(Call, Option<HostError>)>,
    /// Faults to report before those of the software host.
    pub faults: VecDeque<FaultReport>,
    /// Every batch of invalidations that was asked for.
    pub invalidations: Vec<Vec<Invalidation>>,
}

impl Flaky {
    /// With the endpoints of `setup`, and the memory of its guest.
    pub fn new(setup: &Setup) -> (Self, Memory) {
        let (inner, memory) = soft_host(setup);
        (Self { inner, script: VecDeque::new(), faults: VecDeque::new(), invalidations: Vec::new() }, memory)
    }

    fn step(&mut self, call: Call) -> Result<(), HostError> {
        match self.script.pop_front_if(|(next, _)| *next == call) {
            Some((_, Some(error))) => Err(error),
            _ => Ok(()),
        }
    }
}

impl Host for Flaky {
    type Space = <SoftHost<GuestTables> as Host>::Space;

    fn endpoints(&self) -> Vec<EndpointId> {
        self.inner.endpoints()
    }

    fn caps(&self, endpoint: EndpointId) -> Option<&EndpointCaps> {
        self.inner.caps(endpoint)
    }

    fn create(&mut self, spec: SpaceSpec<'_>) -> Result<Self::Space, HostError> {
        self.step(Call::Create)?;
        self.inner.create(spec)
    }

    fn destroy(&mut self, space: Self::Space) {
        self.inner.destroy(space);
    }

    fn map(&mut self, space: &mut Self::Space, mapping: Mapping) -> Result<(), MapError> {
        self.step(Call::Map)?;
        self.inner.map(space, mapping)
    }

    fn unmap(&mut self, space: &mut Self::Space, range: IovaRange) -> Result<usize, UnmapError> {
        self.step(Call::Unmap)?;
        self.inner.unmap(space, range)
    }

    fn bind(&mut self, stream: Stream, space: Option<&mut Self::Space>) -> Result<(), HostError> {
        self.step(Call::Bind)?;
        self.inner.bind(stream, space)
    }

    fn invalidate(&mut self, batch: &[Invalidation]) -> Result<(), Stopped> {
        self.invalidations.push(batch.to_vec());
        self.step(Call::Invalidate).map_err(|error| Stopped { done: 0, error })?;
        self.inner.invalidate(batch)
    }

    fn next_fault(&mut self) -> Option<FaultReport> {
        self.faults.pop_front().or_else(|| self.inner.next_fault())
    }

    fn next_page_request(&mut self) -> Option<PageRequestReport> {
        self.inner.next_page_request()
    }

    fn respond(&mut self, response: &GroupResponse) -> Result<Answered, HostError> {
        self.inner.respond(response)
    }
}
