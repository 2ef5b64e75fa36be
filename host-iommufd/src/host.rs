//! [`IommufdHost`] as a [`Host`].

use std::collections::BTreeMap;
use std::ops::Bound::{Excluded, Unbounded};
use std::os::fd::RawFd;
use std::sync::Arc;

use pgtable_formats::{IovaRange, Pasid};
use viommu_device::host::{
    Answered, EndpointCaps, FaultReport, GroupResponse, Host, HostError, Invalidation, MapError,
    PageRequestReport, SpaceSpec, Stopped, Stream, UnmapError,
};
use viommu_device::mapping::Mapping;
use viommu_wire::{EndpointId, PageResponseCode};

use crate::endpoint::{Bound, Endpoint};
use crate::error::host_error;
use crate::faults::Faults;
use crate::guest_memory::GuestMemory;
use crate::kernel::{Iommufd, ResponseCode};
use crate::objects::{Ioas, Session};
use crate::page_requests::PageRequests;
use crate::space::{Kind, Mapped, Space};
use crate::unit::{self, Unit};

/// A machine whose IOMMUs Linux drives. See the [crate](crate) for what it is and how it is made.
///
/// Dropping it detaches all devices and frees all that it made.
pub struct IommufdHost<K: Iommufd> {
    // In this order: endpoints hold units, units hold tables over guest memory.
    pub(crate) endpoints: BTreeMap<EndpointId, Endpoint<K>>,
    pub(crate) units: Vec<Arc<Unit<K>>>,
    /// How many units there were.
    pub(crate) last_unit: u64,
    pub(crate) faults: Faults,
    /// Whose page request was handed out last: endpoints take turns.
    pub(crate) last_asking: EndpointId,
    /// See [`ignored_page_requests`](Self::ignored_page_requests), of endpoints that are gone.
    pub(crate) ignored_page_requests: u64,
    /// All of guest memory, at its guest-physical addresses.
    pub(crate) ioas: Arc<Ioas<K>>,
    pub(crate) memory: GuestMemory,
    pub(crate) session: Arc<Session<K>>,
}

impl<K: Iommufd> IommufdHost<K> {
    /// The kernel.
    pub fn kernel(&self) -> &Arc<K> {
        self.session.kernel()
    }

    /// Files to wait on for `POLLIN`: then [`Host::next_fault`] or [`Host::next_page_request`] has something. They change
    /// when endpoints are added or removed.
    ///
    /// A file stays readable while the device core takes no more, because the driver gives no buffers or does not
    /// answer: wait for edges (`EPOLLET`). See the [crate](crate#page-requests).
    pub fn queue_fds(&self) -> Vec<RawFd> {
        let events = self.units.iter().filter_map(|unit| match &unit.kind {
            unit::Kind::Smmuv3(smmu) => smmu.events.as_ref()?.fd(),
            unit::Kind::Vtd | unit::Kind::Paging => None,
        });
        let requests = self.endpoints.values().filter_map(|endpoint| endpoint.page_requests.as_ref()?.fd());
        events.chain(requests).collect()
    }

    /// How many faults were lost because they came faster than they were asked for.
    pub const fn lost_events(&self) -> u64 {
        self.faults.lost()
    }

    /// How many events were of no endpoint that there is, or of no known kind.
    pub const fn ignored_events(&self) -> u64 {
        self.faults.ignored()
    }

    /// How many groups of page requests were answered INVALID at once because they were of no stream that has a table.
    pub fn ignored_page_requests(&self) -> u64 {
        let endpoints = self.endpoints.values().filter_map(|endpoint| endpoint.page_requests.as_ref());
        endpoints.fold(self.ignored_page_requests, |all, requests| all.saturating_add(requests.ignored()))
    }

    /// The addresses that all endpoints can use, from the lowest to the highest: the widest `input_range` that a
    /// device's configuration should have. Holes in it are reserved regions of the endpoints. Endpoints that are added
    /// later may have fewer.
    pub fn input_range(&self) -> IovaRange {
        let spans = self.endpoints.values().filter_map(|endpoint| endpoint.facts.span);
        spans.fold(IovaRange::ALL, |all, span| {
            let (start, last) = (all.start().max(span.start()), all.last().min(span.last()));
            IovaRange::new(start, last).unwrap_or(all)
        })
    }

    /// The page sizes of mappings, as the configuration of a device has them: the lowest bit is the smallest page that
    /// all endpoints can map.
    pub fn page_size_mask(&self) -> u64 {
        const SMALLEST: u64 = 4096;
        let largest =
            self.endpoints.values().map(|endpoint| endpoint.facts.alignment).max().unwrap_or(SMALLEST);
        largest.max(1).next_power_of_two().wrapping_neg()
    }
}

impl<K: Iommufd> Host for IommufdHost<K> {
    type Space = Space<K>;

    fn endpoints(&self) -> Vec<EndpointId> {
        self.endpoints.keys().copied().collect()
    }

    fn caps(&self, endpoint: EndpointId) -> Option<&EndpointCaps> {
        self.endpoints.get(&endpoint).map(|endpoint| &endpoint.facts.caps)
    }

    fn create(&mut self, spec: SpaceSpec<'_>) -> Result<Space<K>, HostError> {
        let kind = match spec {
            SpaceSpec::Identity => Kind::Identity,
            SpaceSpec::Mapped => Kind::Mapped(Box::new(Mapped::new(&self.session)?)),
            SpaceSpec::GuestTable { endpoint, table } => {
                let of = self.endpoints.get(&endpoint).ok_or(HostError::Unsupported)?;
                if !table.extents().all(|(first, size)| self.memory.contains(first, size)) {
                    return Err(HostError::BadAddress);
                }
                let queue = of.page_requests.as_ref().map(PageRequests::queue);
                Kind::Table { endpoint, table: of.unit.table(&of.facts, table, queue)? }
            }
        };
        Ok(Space(kind))
    }

    /// A stream that is still bound to it, against the contract, goes on to translate through what it was.
    fn destroy(&mut self, space: Space<K>) {
        drop(space);
    }

    fn map(&mut self, space: &mut Space<K>, mapping: Mapping) -> Result<(), MapError> {
        if !space.is_of(&self.session) {
            return Err(HostError::Unsupported.into());
        }
        match &mut space.0 {
            Kind::Mapped(mapped) => mapped.map(&self.memory, mapping),
            Kind::Identity | Kind::Table { .. } => Err(HostError::Unsupported.into()),
        }
    }

    fn unmap(&mut self, space: &mut Space<K>, range: IovaRange) -> Result<usize, UnmapError> {
        match &mut space.0 {
            Kind::Mapped(mapped) => mapped.unmap(&self.memory, range),
            Kind::Identity | Kind::Table { .. } => Err(HostError::Unsupported.into()),
        }
    }

    fn overlaps(&self, space: &Space<K>, range: IovaRange) -> bool {
        match &space.0 {
            Kind::Mapped(mapped) => mapped.overlaps(range),
            Kind::Identity | Kind::Table { .. } => false,
        }
    }

    fn bind(&mut self, stream: Stream, space: Option<&mut Space<K>>) -> Result<(), HostError> {
        if space.as_ref().is_some_and(|space| !space.is_of(&self.session)) {
            return Err(HostError::Unsupported);
        }
        let endpoint = self.endpoints.get_mut(&stream.endpoint).ok_or(HostError::Unsupported)?;
        let pasid = match stream.pasid {
            // The kernel has no number for it apart from that of untagged accesses.
            Some(Pasid::ZERO) => return Err(HostError::Unsupported),
            Some(_) if space.is_some() && !endpoint.unit.pasids => return Err(HostError::Unsupported),
            pasid => pasid,
        };
        let bound = match space.map(|space| &mut space.0) {
            None => Bound::Nothing,
            Some(Kind::Identity) => Bound::Paging(Arc::clone(&endpoint.unit.bypass)),
            Some(Kind::Mapped(mapped)) => Bound::Paging(mapped.table(&endpoint.unit, endpoint.facts.device)?),
            Some(Kind::Table { endpoint: of, table }) => {
                if *of != endpoint.facts.id || pasid.is_some() && table.pasid_bits.is_some() {
                    return Err(HostError::Unsupported);
                }
                Bound::Table(table.clone())
            }
        };
        let result = match pasid {
            None => endpoint.bind_untagged(bound),
            Some(pasid) => endpoint.bind_tagged(pasid, &bound),
        };
        result.map_err(|errno| {
            tracing::debug!(endpoint = stream.endpoint.0, %errno, "not bound");
            host_error(errno)
        })
    }

    fn invalidate(&mut self, batch: &[Invalidation]) -> Result<(), Stopped> {
        let strange = batch.iter().position(|one| !self.endpoints.contains_key(&one.endpoint));
        let known = strange.map_or(batch, |at| batch.get(..at).unwrap_or_default());
        let (done, stopped) = match self.invalidate_known(known) {
            Ok(()) => (known.len(), strange.map(|done| Stopped { done, error: HostError::Unsupported })),
            Err(stopped) => (stopped.done, Some(stopped)),
        };
        self.close_unbound(known.get(..done).unwrap_or_default())?;
        stopped.map_or(Ok(()), Err)
    }

    /// Endpoints take turns.
    fn next_fault(&mut self) -> Option<FaultReport> {
        if self.faults.is_round_over() {
            for unit in &self.units {
                let endpoints = &self.endpoints;
                let behind =
                    |id| endpoints.get(&id).is_some_and(|endpoint| Arc::ptr_eq(&endpoint.unit, unit));
                self.faults.read(unit, behind);
            }
            self.faults.begin_round();
        }
        self.faults.pop()
    }

    /// Endpoints take turns.
    fn next_page_request(&mut self) -> Option<PageRequestReport> {
        let last = self.last_asking;
        let next = |(_, endpoint): (&EndpointId, &mut Endpoint<K>)| endpoint.next_page_request();
        let after = self.endpoints.range_mut((Excluded(last), Unbounded)).find_map(next);
        let report = after.or_else(|| self.endpoints.range_mut(..=last).find_map(next))?;
        self.last_asking = report.stream.endpoint;
        Some(report)
    }

    fn respond(&mut self, response: &GroupResponse) -> Result<Answered, HostError> {
        let &GroupResponse { stream: Stream { endpoint, pasid }, group, code } = response;
        let endpoint = self.endpoints.get_mut(&endpoint);
        let Some(requests) = endpoint.and_then(|endpoint| endpoint.page_requests.as_mut()) else {
            return Ok(Answered::Gone);
        };
        let code = match code {
            PageResponseCode::Success => ResponseCode::Success,
            // The kernel knows no other way to say no.
            PageResponseCode::Invalid | PageResponseCode::Failure => ResponseCode::Invalid,
        };
        requests.respond(pasid, group, code).map_err(host_error)
    }
}

impl<K: Iommufd> IommufdHost<K> {
    /// A guest that has the PASID cache of one PASID invalidated has taken it back, page requests included.
    fn close_unbound(&mut self, done: &[Invalidation]) -> Result<(), Stopped> {
        for (index, one) in done.iter().enumerate() {
            let Some(Stream { endpoint, pasid }) = one.revoked() else { continue };
            if let Some(endpoint) = self.endpoints.get_mut(&endpoint) {
                endpoint.close_page_requests_of(pasid).map_err(|errno| {
                    tracing::warn!(endpoint = one.endpoint.0, %errno, "page requests not answered");
                    Stopped { done: index, error: host_error(errno) }
                })?;
            }
        }
        Ok(())
    }
}
