//! What streams are bound to.

use pgtable_formats::Pasid;
use pgtable_formats::context::smmuv3::PageTable;
use pgtable_formats::context::vtd::PasidTable;

use super::descriptors::{self, Descriptors};
use super::entries::{self, Entries};
use super::{Kind, Mediated, Port, Way};
use crate::host::{Host, HostError, Stream};
use crate::soft::Stage2;

impl<S> Kind<S> {
    /// What the host below is given.
    pub(super) const fn inner(&mut self) -> Result<Option<&mut S>, HostError> {
        match self {
            Self::Inner(space) => Ok(Some(space)),
            Self::PageTable(..) | Self::PasidTable(..) => Err(HostError::Unsupported),
        }
    }
}

/// Whose descriptor serves a stream. None does where accesses are tagged with PASID 0.
fn number(stream: Stream) -> Option<Pasid> {
    match stream.pasid {
        None => Some(Pasid::ZERO),
        Some(pasid) => Some(pasid).filter(|pasid| *pasid != Pasid::ZERO),
    }
}

impl<H: Host, M: Stage2> Mediated<H, M> {
    pub(super) fn bind_inner(
        &mut self,
        stream: Stream,
        space: Option<&mut H::Space>,
    ) -> Result<(), HostError> {
        let is_bound = space.is_some();
        self.host.bind(stream, space)?;
        if let (None, Some(port)) = (stream.pasid, self.ports.get_mut(&stream.endpoint)) {
            port.is_untagged = is_bound;
        }
        Ok(())
    }

    /// Of an endpoint whose page tables are bound by descriptors of the device's own.
    pub(super) fn bind_descriptor(
        &mut self,
        stream: Stream,
        kind: Option<&mut Kind<H::Space>>,
    ) -> Result<(), HostError> {
        let made = match self.ports.get(&stream.endpoint).map(|port| &port.way) {
            Some(Way::Descriptors(_, made)) => made.as_ref(),
            _ => return Err(HostError::Unsupported),
        };
        let serves_tagged = made.is_some_and(Descriptors::serves_tagged);
        let number = number(stream).ok_or(HostError::Unsupported)?;
        match (kind, stream.pasid) {
            (Some(Kind::PageTable(_, table)), _) => {
                let table = *table;
                match self.set_descriptor(stream, number, &table) {
                    // What waits to be used again may hold all that is left.
                    Err(HostError::NoMemory) if self.reclaim() => self.set_descriptor(stream, number, &table),
                    result => result,
                }
            }
            (Some(_), _) if serves_tagged => Err(HostError::Unsupported),
            (Some(kind), None) => {
                self.bind_inner(stream, kind.inner()?)?;
                self.leave_descriptors(stream);
                Ok(())
            }
            (Some(kind), Some(_)) => self.bind_inner(stream, kind.inner()?),
            (None, _) if made.is_some_and(|made| made.serves(number)) => {
                self.clear_descriptor(stream, number)
            }
            // The others need the table, in which it has no descriptor.
            (None, _) if serves_tagged => Ok(()),
            (None, None) => {
                self.bind_inner(stream, None)?;
                self.idle_descriptors(stream);
                Ok(())
            }
            (None, Some(_)) => self.bind_inner(stream, None),
        }
    }

    fn set_descriptor(&mut self, stream: Stream, number: Pasid, table: &PageTable) -> Result<(), HostError> {
        let Self { host, memory, ports, room, limits, .. } = self;
        let (Some(port), Some(room)) = (ports.get_mut(&stream.endpoint), room) else {
            return Err(HostError::Unsupported);
        };
        let Way::Descriptors(caps, made) = &mut port.way else { return Err(HostError::Unsupported) };
        // One table of descriptors serves the endpoint, and untagged accesses have just one descriptor there.
        if stream.pasid.is_some() && port.is_untagged {
            return Err(HostError::Unsupported);
        }
        let limit = limits.max_window_per_endpoint;
        let mut means = descriptors::Means { endpoint: stream.endpoint, host, memory, room, limit };
        let made = match made {
            Some(made) => made,
            none => none.insert(Descriptors::new(caps, &mut means)?),
        };
        made.bind(number, table, &mut means)?;
        port.is_untagged &= stream.pasid.is_some();
        Ok(())
    }

    fn clear_descriptor(&mut self, stream: Stream, number: Pasid) -> Result<(), HostError> {
        let Self { host, memory, ports, room, limits, .. } = self;
        let (Some(port), Some(room)) = (ports.get_mut(&stream.endpoint), room) else { return Ok(()) };
        let Way::Descriptors(_, Some(made)) = &mut port.way else { return Ok(()) };
        let limit = limits.max_window_per_endpoint;
        let mut means = descriptors::Means { endpoint: stream.endpoint, host, memory, room, limit };
        made.unbind(number, &mut means)
    }

    /// The endpoint has its untagged stream bound to something else.
    fn leave_descriptors(&mut self, stream: Stream) {
        let Self { host, ports, room, .. } = self;
        if let (Some(port), Some(room)) = (ports.get_mut(&stream.endpoint), room)
            && let Way::Descriptors(_, made) = &mut port.way
            && let Some(made) = made.take()
        {
            made.release(host, room);
        }
    }

    /// The endpoint has its untagged stream bound to nothing.
    fn idle_descriptors(&mut self, stream: Stream) {
        if let Some(Way::Descriptors(_, Some(made))) =
            self.ports.get_mut(&stream.endpoint).map(|port| &mut port.way)
        {
            made.set_idle();
        }
    }

    /// Gives back what of the window is not in use. Whether that was anything.
    pub(super) fn reclaim(&mut self) -> bool {
        let Self { host, memory, ports, room: Some(room), limits, .. } = self else { return false };
        let before = room.left();
        for (&endpoint, port) in ports {
            let Way::Descriptors(_, slot) = &mut port.way else { continue };
            let limit = limits.max_window_per_endpoint;
            let means = &mut descriptors::Means { endpoint, host, memory, room, limit };
            if let Some(made) = slot {
                made.settle(means);
                made.trim(means);
            }
            if let Some(idle) = slot.take_if(|made| made.is_idle()) {
                idle.release(host, room);
            }
        }
        room.left() > before
    }

    /// Of an endpoint whose PASID table is read here.
    pub(super) fn bind_entries(
        &mut self,
        stream: Stream,
        kind: Option<&mut Kind<H::Space>>,
    ) -> Result<(), HostError> {
        self.settle_lost(stream)?;
        let Some(Way::Entries { bound, own, .. }) = self.ports.get(&stream.endpoint).map(|port| &port.way)
        else {
            return Err(HostError::Unsupported);
        };
        match (stream.pasid, kind) {
            (None, Some(Kind::PasidTable(_, table))) if own.is_empty() => {
                let table = *table;
                self.bind_pasid_table(stream, &table)
            }
            (None, kind) if bound.is_some() => {
                let space = kind.map_or(Ok(None), Kind::inner)?;
                self.leave_entries(stream, space)
            }
            // An entry of the table serves it.
            (Some(_), None) if bound.is_some() => Ok(()),
            (Some(_), Some(_)) if bound.is_some() => Err(HostError::Unsupported),
            (pasid, kind) => {
                let space = kind.map_or(Ok(None), Kind::inner)?;
                let is_bound = space.is_some();
                self.bind_inner(stream, space)?;
                let port = self.ports.get_mut(&stream.endpoint);
                if let (Some(pasid), Some(Way::Entries { own, .. })) = (pasid, port.map(|port| &mut port.way))
                {
                    if is_bound {
                        own.insert(pasid)
                    } else {
                        own.remove(&pasid)
                    };
                }
                Ok(())
            }
        }
    }

    fn bind_pasid_table(&mut self, stream: Stream, table: &PasidTable) -> Result<(), HostError> {
        self.with_entries(stream, |slot, means| {
            let is_new = slot.is_none();
            let result = slot.get_or_insert_with(|| Entries::new(*table)).replace(table, is_new, means);
            if is_new
                && result.is_err()
                && let Some(entries) = slot.take()
            {
                entries.lose(means);
            }
            result
        })
    }

    fn leave_entries(&mut self, stream: Stream, space: Option<&mut H::Space>) -> Result<(), HostError> {
        self.with_entries(stream, |slot, means| {
            if let Some(entries) = slot {
                entries.leave(space, means)?;
            }
            *slot = None;
            Ok(())
        })
    }

    /// Takes from the machine what it did not let go of before.
    fn settle_lost(&mut self, Stream { endpoint, .. }: Stream) -> Result<(), HostError> {
        let Self { host, ports, .. } = self;
        let Some(Way::Entries { lost, .. }) = ports.get_mut(&endpoint).map(|port| &mut port.way) else {
            return Ok(());
        };
        while let Some(last) = lost.last_mut() {
            for pasid in last.streams.into_iter().flatten() {
                host.bind(Stream { endpoint, pasid }, None)?;
            }
            last.spaces.drain(..).for_each(|space| host.destroy(space));
            lost.pop();
        }
        Ok(())
    }

    /// Lets `change` work on the entries of an endpoint, and counts them.
    pub(super) fn with_entries<R>(
        &mut self,
        stream: Stream,
        change: impl FnOnce(&mut Option<Entries<H::Space>>, &mut entries::Means<'_, H, M>) -> Result<R, HostError>,
    ) -> Result<R, HostError> {
        self.settle_lost(stream)?;
        let Self { host, memory, ports, identity, window, limits, entries, .. } = self;
        let endpoint = stream.endpoint;
        let Some(Port { caps, way: Way::Entries { bound, lost, .. }, .. }) = ports.get_mut(&endpoint) else {
            return Err(HostError::Unsupported);
        };
        let count = |bound: &Option<Entries<H::Space>>| bound.as_ref().map_or(0, Entries::len);
        let elsewhere = entries.saturating_sub(count(bound));
        let limit = limits.max_entries_per_endpoint.min(limits.max_entries.saturating_sub(elsewhere));
        let mut means = entries::Means {
            endpoint,
            host,
            memory,
            identity,
            lost,
            window: *window,
            limit,
            max_tables: limits.max_tables_per_reading,
            page_requests: caps.page_requests,
        };
        let result = change(bound, &mut means);
        *entries = elsewhere + count(bound);
        result
    }
}
