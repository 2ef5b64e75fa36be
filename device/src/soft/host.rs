//! [`SoftHost`] as a [`Host`].

use alloc::vec::Vec;

use pgtable_formats::context::Canonical;
use pgtable_formats::{Gpa, IovaRange, Pasid};
use viommu_wire::{Caches, EndpointId};

use super::flush::Selector;
use super::key::Key;
use super::page_requests::{Closing, Tickets};
use super::port::{Port, Served};
use super::space::{Kind, Space};
use super::{SoftHost, Stage2};
use crate::host::{
    Answered, EndpointCaps, FaultReport, GroupResponse, Host, HostError, Invalidation, MapError,
    PageRequestReport, Scope, SpaceSpec, Stopped, Stream, TableCaps, UnmapError,
};
use crate::mapping::Mapping;

impl<M: Stage2> Host for SoftHost<M> {
    type Space = Space;

    fn endpoints(&self) -> Vec<EndpointId> {
        self.ports.keys().copied().collect()
    }

    fn caps(&self, endpoint: EndpointId) -> Option<&EndpointCaps> {
        self.ports.get(&endpoint).map(|port| &port.caps)
    }

    fn create(&mut self, spec: SpaceSpec<'_>) -> Result<Space, HostError> {
        let kind = match spec {
            SpaceSpec::Identity => Kind::Identity,
            SpaceSpec::Mapped => Kind::Mapped(Default::default()),
            SpaceSpec::GuestTable { endpoint, table } => {
                let caps = self.ports.get(&endpoint).and_then(|port| port.caps.tables.as_ref());
                if !matches!(
                    (caps, table),
                    (Some(TableCaps::Smmuv3(_)), Canonical::Smmuv3(_) | Canonical::Smmuv3PageTable(_))
                        | (
                            Some(TableCaps::Vtd(_)),
                            Canonical::VtdPasidTable(_) | Canonical::VtdFirstStage(_)
                        )
                ) {
                    return Err(HostError::Unsupported);
                }
                if !is_in_memory(&self.memory, table) {
                    return Err(HostError::BadAddress);
                }
                Kind::Table { endpoint, table: table.clone() }
            }
        };
        self.spaces.insert(kind)
    }

    /// Streams that are still bound to it, against the contract, are bound to nothing then.
    fn destroy(&mut self, space: Space) {
        let Space(index) = space;
        if self.spaces.get(index).is_some_and(|space| space.bound > 0) {
            for (&endpoint, port) in &mut self.ports {
                if port.untagged == Some(index) {
                    port.untagged = None;
                    close_tickets(&mut self.tickets, endpoint, port, None);
                }
                let Port { tagged, waiting, .. } = port;
                tagged.retain(|&pasid, bound| {
                    let stays = *bound != index;
                    if !stays {
                        self.tickets.close(endpoint, waiting, Closing::Stream(Some(pasid)));
                    }
                    stays
                });
            }
            self.flush();
        }
        self.spaces.remove(index);
    }

    fn map(&mut self, space: &mut Space, mapping: Mapping) -> Result<(), MapError> {
        match self.spaces.get_mut(space.0).map(|space| &mut space.kind) {
            // What faults is not cached: there is nothing to drop.
            Some(Kind::Mapped(mappings)) => mappings.insert(mapping).map_err(|_| MapError::Overlap),
            _ => Err(MapError::Host(HostError::Unsupported)),
        }
    }

    fn unmap(&mut self, space: &mut Space, range: IovaRange) -> Result<usize, UnmapError> {
        let Some(space) = self.spaces.get_mut(space.0) else {
            return Err(UnmapError::Host(HostError::Unsupported));
        };
        let Kind::Mapped(mappings) = &mut space.kind else {
            return Err(UnmapError::Host(HostError::Unsupported));
        };
        let removed = mappings.remove(range).map_err(|_| UnmapError::Split)?;
        match (removed, space.bound, space.only) {
            (0, _, _) | (_, 0, _) => {}
            (_, 1, Some(stream)) => self.front.forget(Key::new(stream.endpoint, stream.pasid), range),
            _ => self.front.clear(),
        }
        Ok(removed)
    }

    fn overlaps(&self, space: &Space, range: IovaRange) -> bool {
        match self.spaces.get(space.0).map(|space| &space.kind) {
            Some(Kind::Mapped(mappings)) => mappings.overlaps(range),
            _ => false,
        }
    }

    fn bind(&mut self, stream: Stream, space: Option<&mut Space>) -> Result<(), HostError> {
        let new = space.map(|space| space.0);
        let port = self.ports.get_mut(&stream.endpoint).ok_or(HostError::Unsupported)?;
        if let Some(index) = new {
            match &self.spaces.get(index).ok_or(HostError::Unsupported)?.kind {
                Kind::Table { endpoint, .. } if *endpoint != stream.endpoint => {
                    return Err(HostError::Unsupported);
                }
                Kind::Table { table, .. } if table.has_pasids() && stream.pasid.is_some() => {
                    return Err(HostError::Unsupported);
                }
                Kind::Identity | Kind::Mapped(_) | Kind::Table { .. } => {}
            }
        }
        let served = port.served(&self.spaces, stream.pasid);
        let old = port.bound(stream.pasid);
        port.set_bound(stream.pasid, new);
        close_tickets(&mut self.tickets, stream.endpoint, port, stream.pasid);
        if let Some(index) = old {
            self.spaces.count_unbound(index);
        }
        if let Some(index) = new {
            self.spaces.count_bound(index, stream);
        }
        if let Some(served) = served {
            self.forget(stream, served);
        }
        Ok(())
    }

    fn invalidate(&mut self, batch: &[Invalidation]) -> Result<(), Stopped> {
        for (done, invalidation) in batch.iter().enumerate() {
            self.invalidate_one(invalidation).map_err(|error| Stopped { done, error })?;
        }
        Ok(())
    }

    fn next_fault(&mut self) -> Option<FaultReport> {
        self.faults.pop()
    }

    fn next_page_request(&mut self) -> Option<PageRequestReport> {
        let ticket = self.tickets.next_unreported()?;
        self.ports.get_mut(&ticket.stream.endpoint)?.waiting.report(ticket)
    }

    fn respond(&mut self, response: &GroupResponse) -> Result<Answered, HostError> {
        let Some(port) = self.ports.get_mut(&response.stream.endpoint) else { return Ok(Answered::Gone) };
        Ok(self.tickets.respond(&mut port.waiting, response))
    }
}

impl<M: Stage2> SoftHost<M> {
    /// Drops all that is cached of what `served` the stream so far, and with it other streams.
    fn forget(&mut self, stream: Stream, served: Served) {
        let endpoint = stream.endpoint;
        self.front.clear();
        let Some(Kind::Table { table, .. }) = self.spaces.get(served.space).map(|space| &space.kind) else {
            return;
        };
        if table.has_pasids() && stream.pasid.is_none() {
            self.contexts.drop_endpoint(endpoint);
            self.drop_translations(&Selector::endpoint(endpoint), true);
        } else {
            self.contexts.drop_pasid(endpoint, served.effective);
            self.drop_translations(&Selector::pasid(endpoint, served.effective), true);
        }
    }

    fn invalidate_one(&mut self, invalidation: &Invalidation) -> Result<(), HostError> {
        let endpoint = invalidation.endpoint;
        let port = self.ports.get(&endpoint).ok_or(HostError::Unsupported)?;
        let spaces = &self.spaces;
        let effective = |pasid: Option<Pasid>| port.served(spaces, pasid).map(|served| served.effective);
        let selector = Selector::new(invalidation, has_tags(port), effective);
        let drops_contexts = invalidation.caches.contains(Caches::PASID);
        if drops_contexts {
            match invalidation.scope {
                Scope::Endpoint => self.contexts.drop_endpoint(endpoint),
                Scope::Pasid(pasid) | Scope::Range { pasid, .. } => {
                    if let Some(effective) = effective(pasid) {
                        self.contexts.drop_pasid(endpoint, effective);
                    }
                }
            }
        }
        self.front.clear();
        self.drop_translations(&selector, !invalidation.leaf || drops_contexts);
        if let (Some(stream), Some(port)) = (invalidation.revoked(), self.ports.get_mut(&endpoint)) {
            self.tickets.close(endpoint, &mut port.waiting, Closing::Stream(stream.pasid));
        }
        Ok(())
    }

    /// Drops what `selector` selects of the translations, and of the tables where these may have changed.
    fn drop_translations(&mut self, selector: &Selector, tables: bool) {
        if tables {
            let shared = selector.globals && (selector.range.is_none() || self.tlb.has_globals());
            self.walks.invalidate(&selector.for_tables(), shared);
        }
        self.tlb.invalidate(selector, !self.walks.is_empty());
    }
}

/// Ends the waiting of what translated through the binding of `pasid`: with it, and, where that is `None`, with every
/// PASID that is not bound on its own.
fn close_tickets(tickets: &mut Tickets, endpoint: EndpointId, port: &mut Port, pasid: Option<Pasid>) {
    let closing = if pasid.is_some() { Closing::Stream(pasid) } else { Closing::AllBut(&port.tagged) };
    tickets.close(endpoint, &mut port.waiting, closing);
}

/// Whether translations of the endpoint carry an ASID.
fn has_tags(port: &Port) -> bool {
    matches!(port.caps.tables, Some(TableCaps::Smmuv3(_)))
}

/// Whether what `table` itself takes up is guest memory.
fn is_in_memory<M: Stage2>(memory: &M, table: &Canonical) -> bool {
    table.extents().all(|(first, size)| {
        let last = size.checked_sub(1).and_then(|offset| first.checked_add(offset));
        last.is_some_and(|Gpa(last)| memory.contains(first, Gpa(last)))
    })
}
