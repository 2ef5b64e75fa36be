//! What streams are bound to: every change is made at the host first, undone where a later step fails, then recorded.

use alloc::vec;
use alloc::vec::Vec;

use viommu_wire::{DomainId, Features, Pasid};

use crate::device::{Device, Stuck};
use crate::domain::{DomainSpace, Domains};
use crate::endpoint::{Bound, Endpoint};
use crate::error::ConfigWriteError;
use crate::host::{Host, HostError, SpaceSpec, Stream};

/// What untagged accesses of an endpoint shall translate through, if not a guest's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Nothing,
    Identity,
    /// The mapped domain at this place.
    Domain(usize),
}

impl<H: Host> Device<H> {
    /// What an endpoint that is not attached translates through: D-16 (a), D-14. The older feature BYPASS, D-16 (c),
    /// is never offered.
    pub(crate) fn unattached(&self) -> Target {
        match self.bypass && self.config.features.contains(Features::BYPASS_CONFIG) {
            true => Target::Identity,
            false => Target::Nothing,
        }
    }

    /// Binds the untagged accesses of an endpoint to `target` and takes away its guest tables. Its page requests are
    /// answered INVALID. Membership in domains is not touched.
    pub(crate) fn move_endpoint(&mut self, at: usize, target: Target) -> Result<(), HostError> {
        self.unbind_pasids(at)?;
        if let Err(error) = self.bind_untagged(at, target) {
            self.rebind_pasids(at);
            return Err(error);
        }
        self.forget_pasids(at);
        self.record_untagged(at, target.bound());
        self.close_groups(at, |_| true);
        Ok(())
    }

    /// Changes `bypass` and with it what unattached endpoints are bound to.
    pub(crate) fn set_bypass(&mut self, bypass: bool) -> Result<(), ConfigWriteError> {
        let before = core::mem::replace(&mut self.bypass, bypass);
        let target = self.unattached();
        for at in 0..self.endpoints.len() {
            if self.endpoints[at].domain.is_some() {
                continue;
            }
            if let Err(error) = self.move_endpoint(at, target) {
                self.bypass = before;
                let target = self.unattached();
                for done in (0..at).filter(|&done| self.endpoints[done].domain.is_none()).collect::<Vec<_>>()
                {
                    self.needs_reset |= self.move_endpoint(done, target).is_err();
                }
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// Unbinds all streams with a PASID of their own. They stay recorded: [`forget_pasids`](Self::forget_pasids) or
    /// [`rebind_pasids`](Self::rebind_pasids) follows.
    pub(crate) fn unbind_pasids(&mut self, at: usize) -> Result<(), HostError> {
        let endpoint = &self.endpoints[at];
        let mut failed = None;
        for &pasid in endpoint.pasids.keys() {
            let stream = Stream { endpoint: endpoint.id, pasid: Some(pasid) };
            if let Err(error) = self.host.bind(stream, None) {
                failed = Some((pasid, error));
                break;
            }
        }
        let Some((pasid, error)) = failed else { return Ok(()) };
        self.rebind_pasids_before(at, Some(pasid));
        Err(error)
    }

    /// Undoes [`unbind_pasids`](Self::unbind_pasids).
    pub(crate) fn rebind_pasids(&mut self, at: usize) {
        self.rebind_pasids_before(at, None);
    }

    /// Completes [`unbind_pasids`](Self::unbind_pasids).
    pub(crate) fn forget_pasids(&mut self, at: usize) {
        let pasids = core::mem::take(&mut self.endpoints[at].pasids);
        self.page_tables = self.page_tables.saturating_sub(pasids.len());
        for space in pasids.into_values() {
            self.host.destroy(space);
        }
    }

    /// Binds untagged accesses, unless they already are bound so. Does not record it.
    pub(crate) fn bind_untagged(&mut self, at: usize, target: Target) -> Result<(), HostError> {
        let endpoint = &self.endpoints[at];
        let stream = Stream::untagged(endpoint.id);
        match target {
            Target::Nothing if matches!(endpoint.untagged, Bound::Nothing) => Ok(()),
            Target::Identity if matches!(endpoint.untagged, Bound::Identity) => Ok(()),
            Target::Nothing => self.host.bind(stream, None),
            Target::Identity => {
                let identity = match &mut self.identity {
                    Some(identity) => identity,
                    none => none.insert(self.host.create(SpaceSpec::Identity)?),
                };
                self.host.bind(stream, Some(identity))
            }
            Target::Domain(place) => match &mut self.domains[place].space {
                DomainSpace::Mapped(mapped) => self.host.bind(stream, Some(&mut mapped.space)),
                DomainSpace::Bypass | DomainSpace::Table => Err(HostError::Unsupported),
            },
        }
    }

    /// Records what untagged accesses are bound to now and destroys the table that they were bound to before.
    pub(crate) fn record_untagged(&mut self, at: usize, bound: Bound<H::Space>) {
        let added = usize::from(matches!(bound, Bound::PageTable(_)));
        let before = core::mem::replace(&mut self.endpoints[at].untagged, bound);
        let removed = usize::from(matches!(before, Bound::PageTable(_)));
        self.page_tables = (self.page_tables + added).saturating_sub(removed);
        if let Some(space) = before.into_space() {
            self.host.destroy(space);
        }
    }

    /// Binds untagged accesses to what is recorded for them, after a step that followed another binding failed.
    /// `false`, and the other binding stays in force, where the host fails once more.
    pub(crate) fn restore_untagged(&mut self, at: usize) -> bool {
        let Self { host, endpoints, domains, identity, .. } = self;
        let endpoint = &mut endpoints[at];
        let space = recorded(&mut endpoint.untagged, endpoint.domain, domains, identity);
        let restored = host.bind(Stream::untagged(endpoint.id), space).is_ok();
        self.needs_reset |= !restored;
        restored
    }

    /// Binds PASIDs below `end` (`None`: all) to their tables. What the host refuses is unbound, and recorded as such.
    fn rebind_pasids_before(&mut self, at: usize, end: Option<Pasid>) {
        let Self { host, endpoints, .. } = self;
        let Endpoint { id, pasids, .. } = &mut endpoints[at];
        let mut lost = Vec::new();
        for (&pasid, space) in pasids.iter_mut().filter(|(pasid, _)| end.is_none_or(|end| **pasid < end)) {
            if host.bind(Stream { endpoint: *id, pasid: Some(pasid) }, Some(space)).is_err() {
                lost.push(pasid);
            }
        }
        for space in lost.iter().filter_map(|pasid| pasids.remove(pasid)) {
            host.destroy(space);
        }
        self.page_tables = self.page_tables.saturating_sub(lost.len());
        self.needs_reset |= !lost.is_empty();
    }
}

/// Reset: it cannot fail, so a stream that the host does not let go keeps its space alive until a later reset.
impl<H: Host> Device<H> {
    /// Takes an endpoint out of its domain and binds it as an unattached one.
    pub(crate) fn reset_endpoint(&mut self, at: usize) {
        let endpoint = &mut self.endpoints[at];
        let id = endpoint.id;
        endpoint.domain = None;
        for (pasid, space) in core::mem::take(&mut endpoint.pasids) {
            let stream = Stream { endpoint: id, pasid: Some(pasid) };
            self.release(stream, space);
        }
        let target = self.unattached();
        let stream = Stream::untagged(id);
        if self.bind_untagged(at, target).is_ok() {
            self.record_untagged(at, target.bound());
            return;
        }
        self.needs_reset = true;
        if self.host.bind(stream, None).is_ok() {
            self.record_untagged(at, Bound::Nothing);
            return;
        }
        match core::mem::replace(&mut self.endpoints[at].untagged, Bound::Nothing) {
            Bound::PasidTable(space, _) | Bound::PageTable(space) => {
                self.stuck.push(Stuck { streams: vec![stream], space });
            }
            // These know their space themselves.
            other => self.endpoints[at].untagged = other,
        }
    }

    /// Destroys the space of a domain, unless one of `endpoints` could not be taken away from it.
    pub(crate) fn destroy_unless_stuck(&mut self, space: H::Space, endpoints: &[usize]) {
        let held = endpoints.iter().map(|&at| &self.endpoints[at]);
        let held = held.filter(|endpoint| matches!(endpoint.untagged, Bound::Domain));
        let streams: Vec<Stream> = held.map(|endpoint| Stream::untagged(endpoint.id)).collect();
        if streams.is_empty() {
            self.host.destroy(space);
        } else {
            self.stuck.push(Stuck { streams, space });
        }
    }

    /// Tries anew what earlier resets could not do.
    pub(crate) fn release_stuck(&mut self) {
        for mut stuck in core::mem::take(&mut self.stuck) {
            let Self { host, endpoints, .. } = self;
            stuck.streams.retain(|&stream| {
                let held = host.bind(stream, None).is_err();
                if let (false, None, Some(at)) = (held, stream.pasid, endpoints.find(stream.endpoint))
                    && matches!(endpoints[at].untagged, Bound::Identity)
                {
                    endpoints[at].untagged = Bound::Nothing; // Bound since; to be bound once more.
                }
                held
            });
            if stuck.streams.is_empty() {
                self.host.destroy(stuck.space);
            } else {
                self.needs_reset = true;
                self.stuck.push(stuck);
            }
        }
    }

    fn release(&mut self, stream: Stream, space: H::Space) {
        if self.host.bind(stream, None).is_ok() {
            self.host.destroy(space);
        } else {
            self.needs_reset = true;
            self.stuck.push(Stuck { streams: vec![stream], space });
        }
    }
}

impl Target {
    /// How it is recorded.
    const fn bound<S>(self) -> Bound<S> {
        match self {
            Self::Nothing => Bound::Nothing,
            Self::Identity => Bound::Identity,
            Self::Domain(_) => Bound::Domain,
        }
    }
}

/// The space of what is recorded.
fn recorded<'a, S>(
    untagged: &'a mut Bound<S>,
    domain: Option<DomainId>,
    domains: &'a mut Domains<S>,
    identity: &'a mut Option<S>,
) -> Option<&'a mut S> {
    match untagged {
        Bound::Nothing => None,
        Bound::Identity => identity.as_mut(),
        Bound::PasidTable(space, _) | Bound::PageTable(space) => Some(space),
        Bound::Domain => {
            let place = domains.find(domain?)?;
            match &mut domains[place].space {
                DomainSpace::Mapped(mapped) => Some(&mut mapped.space),
                DomainSpace::Bypass | DomainSpace::Table => None,
            }
        }
    }
}
