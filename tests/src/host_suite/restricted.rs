//! A software host that takes one kind of table, as hardware through Linux does.

use pgtable_formats::IovaRange;
use pgtable_formats::context::Canonical;
use viommu_device::host::{
    Answered, EndpointCaps, FaultReport, GroupResponse, Host, HostError, Invalidation, MapError,
    PageRequestReport, SpaceSpec, Stopped, Stream, TableCaps, UnmapError,
};
use viommu_device::mapping::Mapping;
use viommu_device::soft::{self, SoftHost};
use viommu_queue::GuestTables;
use viommu_wire::EndpointId;

use super::soft::native_kinds;
use crate::rig::{Memory, default_endpoints};

/// A software host, with less of what it can do. Every call that can fail is counted, and one of them can be made to.
pub struct Restricted {
    /// The host that it restricts.
    pub inner: SoftHost<GuestTables>,
    /// Calls so far.
    pub calls: usize,
    /// Which fail.
    pub fails: Option<(usize, usize)>,
    /// Spaces that were made and not destroyed.
    pub live: usize,
}

impl Restricted {
    /// One over this memory, with the endpoints of the rig.
    pub fn new(memory: &Memory) -> Self {
        let mut inner = SoftHost::new(memory.tables().clone());
        for (id, caps) in default_endpoints() {
            let kinds = native_kinds(&caps);
            let page_requests = caps.tables.is_some();
            let caps = EndpointCaps { kinds, native: kinds, page_requests, ..caps };
            inner.add_endpoint(EndpointId(id), caps).expect("an endpoint");
        }
        Self { inner, calls: 0, fails: None, live: 0 }
    }

    fn step(&mut self) -> Result<(), HostError> {
        let call = self.calls;
        self.calls += 1;
        match self.fails {
            Some((first, last)) if (first..=last).contains(&call) => Err(HostError::Failed(5)),
            _ => Ok(()),
        }
    }
}

impl Host for Restricted {
    type Space = soft::Space;

    fn endpoints(&self) -> Vec<EndpointId> {
        self.inner.endpoints()
    }

    fn caps(&self, endpoint: EndpointId) -> Option<&EndpointCaps> {
        self.inner.caps(endpoint)
    }

    fn create(&mut self, spec: SpaceSpec<'_>) -> Result<soft::Space, HostError> {
        if let SpaceSpec::GuestTable { table, .. } = spec {
            let is_native = matches!(table, Canonical::Smmuv3(_) | Canonical::VtdFirstStage(_));
            assert!(is_native, "a table that this machine does not take");
        }
        self.step()?;
        let space = self.inner.create(spec)?;
        self.live += 1;
        Ok(space)
    }

    fn destroy(&mut self, space: soft::Space) {
        self.live -= 1;
        self.inner.destroy(space);
    }

    fn map(&mut self, space: &mut soft::Space, mapping: Mapping) -> Result<(), MapError> {
        self.inner.map(space, mapping)
    }

    fn unmap(&mut self, space: &mut soft::Space, range: IovaRange) -> Result<usize, UnmapError> {
        self.inner.unmap(space, range)
    }

    fn overlaps(&self, space: &soft::Space, range: IovaRange) -> bool {
        self.inner.overlaps(space, range)
    }

    fn bind(&mut self, stream: Stream, space: Option<&mut soft::Space>) -> Result<(), HostError> {
        // As through Linux: a PASID of its own on VT-d alone, and not number 0.
        let is_smmu = matches!(
            self.inner.caps(stream.endpoint).and_then(|caps| caps.tables.as_ref()),
            Some(TableCaps::Smmuv3(_))
        );
        if stream.pasid.is_some_and(|pasid| space.is_some() && (is_smmu || pasid.value() == 0)) {
            return Err(HostError::Unsupported);
        }
        self.step()?;
        self.inner.bind(stream, space)
    }

    fn invalidate(&mut self, batch: &[Invalidation]) -> Result<(), Stopped> {
        self.step().map_err(|error| Stopped { done: 0, error })?;
        self.inner.invalidate(batch)
    }

    fn next_fault(&mut self) -> Option<FaultReport> {
        self.inner.next_fault()
    }

    fn next_page_request(&mut self) -> Option<PageRequestReport> {
        self.inner.next_page_request()
    }

    fn respond(&mut self, response: &GroupResponse) -> Result<Answered, HostError> {
        self.inner.respond(response)
    }
}
