//! [`Mediated`] as a [`Host`].

use alloc::vec::Vec;

use pgtable_formats::context::Canonical;
use pgtable_formats::{Gpa, IovaRange};
use viommu_wire::EndpointId;

use super::{Kind, Mediated, Space, Way, kind_of};
use crate::host::{
    Answered, EndpointCaps, FaultReport, GroupResponse, Host, HostError, Invalidation, MapError,
    PageRequestReport, SpaceSpec, Stopped, Stream, UnmapError,
};
use crate::mapping::Mapping;
use crate::soft::Stage2;

impl<H: Host, M: Stage2> Host for Mediated<H, M> {
    type Space = Space<H::Space>;

    fn endpoints(&self) -> Vec<EndpointId> {
        self.ports.keys().copied().collect()
    }

    fn caps(&self, endpoint: EndpointId) -> Option<&EndpointCaps> {
        self.ports.get(&endpoint).map(|port| &port.caps)
    }

    fn create(&mut self, spec: SpaceSpec<'_>) -> Result<Space<H::Space>, HostError> {
        let SpaceSpec::GuestTable { endpoint, table } = spec else {
            return Ok(Space(Kind::Inner(self.host.create(spec)?)));
        };
        let port = self.ports.get(&endpoint).ok_or(HostError::Unsupported)?;
        if !port.caps.kinds.contains(kind_of(table)) {
            return Err(HostError::Unsupported);
        }
        let window = self.window;
        if table.extents().any(|(first, size)| window.is_some_and(|window| window.touches(first, size))) {
            return Err(HostError::BadAddress);
        }
        let made = match (&port.way, table) {
            (Way::Descriptors(..), Canonical::Smmuv3PageTable(table)) => {
                Kind::PageTable(endpoint, table.with_stall(port.caps.page_requests))
            }
            (Way::Entries { .. }, Canonical::VtdPasidTable(table)) => Kind::PasidTable(endpoint, *table),
            _ => return Ok(Space(Kind::Inner(self.host.create(spec)?))),
        };
        let memory = &self.memory;
        let is_there = table.extents().all(|(first, size)| {
            let last = size.checked_sub(1).and_then(|offset| first.checked_add(offset));
            last.is_some_and(|Gpa(last)| memory.contains(first, Gpa(last)))
        });
        if is_there { Ok(Space(made)) } else { Err(HostError::BadAddress) }
    }

    fn destroy(&mut self, space: Space<H::Space>) {
        if let Kind::Inner(space) = space.0 {
            self.host.destroy(space);
        }
    }

    fn map(&mut self, space: &mut Space<H::Space>, mapping: Mapping) -> Result<(), MapError> {
        let size = mapping.range.length_minus_one().saturating_add(1);
        if self.window.is_some_and(|window| window.touches(mapping.output, size)) {
            return Err(HostError::BadAddress.into());
        }
        match &mut space.0 {
            Kind::Inner(space) => self.host.map(space, mapping),
            Kind::PageTable(..) | Kind::PasidTable(..) => Err(HostError::Unsupported.into()),
        }
    }

    fn unmap(&mut self, space: &mut Space<H::Space>, range: IovaRange) -> Result<usize, UnmapError> {
        match &mut space.0 {
            Kind::Inner(space) => self.host.unmap(space, range),
            Kind::PageTable(..) | Kind::PasidTable(..) => Err(HostError::Unsupported.into()),
        }
    }

    fn overlaps(&self, space: &Space<H::Space>, range: IovaRange) -> bool {
        match &space.0 {
            Kind::Inner(space) => self.host.overlaps(space, range),
            Kind::PageTable(..) | Kind::PasidTable(..) => false,
        }
    }

    fn bind(&mut self, stream: Stream, space: Option<&mut Space<H::Space>>) -> Result<(), HostError> {
        let kind = space.map(|space| &mut space.0);
        if let Some(Kind::PageTable(of, _) | Kind::PasidTable(of, _)) = &kind
            && *of != stream.endpoint
        {
            return Err(HostError::Unsupported);
        }
        match &self.ports.get(&stream.endpoint).ok_or(HostError::Unsupported)?.way {
            Way::None => self.bind_inner(stream, kind.map_or(Ok(None), Kind::inner)?),
            Way::Descriptors(..) => self.bind_descriptor(stream, kind),
            Way::Entries { .. } => self.bind_entries(stream, kind),
        }
    }

    fn invalidate(&mut self, batch: &[Invalidation]) -> Result<(), Stopped> {
        let is_made = |one: &Invalidation| match self.ports.get(&one.endpoint).map(|port| &port.way) {
            Some(Way::Descriptors(_, made)) => made.is_some(),
            Some(Way::Entries { bound, .. }) => bound.is_some(),
            Some(Way::None) | None => false,
        };
        if !batch.iter().any(is_made) {
            return self.host.invalidate(batch);
        }
        self.invalidate_made(batch)
    }

    fn next_fault(&mut self) -> Option<FaultReport> {
        self.next_told()
    }

    fn next_page_request(&mut self) -> Option<PageRequestReport> {
        self.host.next_page_request().map(|report| self.with_told(report))
    }

    fn respond(&mut self, response: &GroupResponse) -> Result<Answered, HostError> {
        self.host.respond(response)
    }
}
