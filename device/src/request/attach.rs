//! ATTACH and DETACH.

use viommu_wire::{Attach, AttachFlags, Detach, DomainId, EndpointId, Features, RequestType};

use crate::binding::Target;
use crate::device::Device;
use crate::domain::{DomainKind, DomainSpace, MappedSpace};
use crate::error::{Rejection, Resource};
use crate::host::{Host, SpaceSpec};
use crate::reserved::Reserved;

impl<H: Host> Device<H> {
    /// Order of checks: flags, endpoint, domain ID, kind of domain, compatibility, limits.
    pub(super) fn attach(&mut self, attach: &Attach) -> Result<(), Rejection> {
        let kind = match attach.flags.contains(AttachFlags::BYPASS) {
            true if !self.features.contains(Features::BYPASS_CONFIG) => {
                let kind = RequestType::Attach;
                return Err(Rejection::FlagNotNegotiated { kind, feature: Features::BYPASS_CONFIG }); // D-18
            }
            true => DomainKind::Bypass,
            false => DomainKind::Mapped,
        };
        let at = self.find_endpoint(attach.endpoint)?; // D-19
        let existing = self.find_domain(attach.domain, kind)?; // D-21
        if self.endpoints[at].domain == Some(attach.domain) {
            return Ok(());
        }
        let place = match existing {
            Some(place) => {
                self.check_reserved(at, place)?; // D-23
                place
            }
            None => {
                self.check_domains()?;
                let space = match kind {
                    DomainKind::Mapped => DomainSpace::Mapped(MappedSpace {
                        space: self.host.create(SpaceSpec::Mapped)?,
                        mappings: 0,
                        reserved: self.endpoints[at].reserved.clone(),
                    }),
                    DomainKind::Bypass => DomainSpace::Bypass,
                    DomainKind::Table => DomainSpace::Table,
                };
                self.domains.insert(attach.domain, space)
            }
        };
        let target = if kind == DomainKind::Bypass { Target::Identity } else { Target::Domain(place) };
        if let Err(error) = self.move_endpoint(at, target) {
            if existing.is_none() {
                self.remove_domain(place);
            }
            return Err(error.into());
        }
        self.join(at, place); // D-20, D-22, D-24
        Ok(())
    }

    /// Order of checks: endpoint, domain.
    pub(super) fn detach(&mut self, detach: &Detach) -> Result<(), Rejection> {
        let Detach { domain, endpoint } = *detach;
        let at = self.find_endpoint(endpoint)?; // D-26
        if self.endpoints[at].domain != Some(domain) {
            return Err(Rejection::NotAttached { endpoint, domain }); // D-27
        }
        self.move_endpoint(at, self.unattached())?; // D-28, D-16
        self.leave(at); // D-29
        Ok(())
    }

    #[inline]
    pub(super) fn find_endpoint(&self, id: EndpointId) -> Result<usize, Rejection> {
        self.endpoints.find(id).ok_or(Rejection::NoEndpoint(id))
    }

    /// The place of a domain that an endpoint is to be attached to; `None` where it is to be made.
    pub(super) fn find_domain(&mut self, id: DomainId, kind: DomainKind) -> Result<Option<usize>, Rejection> {
        let range = self.config.domain_range;
        if !range.contains(id) {
            return Err(Rejection::DomainOutOfRange { domain: id, range });
        }
        if let Some(place) = self.domains.find(id) {
            let found = self.domains[place].kind();
            return if found == kind {
                Ok(Some(place))
            } else {
                Err(Rejection::WrongKind { domain: id, found })
            };
        }
        Ok(None)
    }

    /// Whether one more domain may be made.
    #[inline]
    pub(super) fn check_domains(&self) -> Result<(), Rejection> {
        let limit = self.config.limits.max_domains;
        if self.domains.len() < limit { Ok(()) } else { Err(Rejection::Limit(Resource::Domains, limit)) }
    }

    /// Records that an endpoint, which is bound already, is in the domain at `place` and in no other.
    pub(super) fn join(&mut self, at: usize, place: usize) {
        let domain = &mut self.domains[place];
        domain.endpoints.push(at);
        if let DomainSpace::Mapped(mapped) = &mut domain.space {
            mapped.reserved = mapped.reserved.union(&self.endpoints[at].reserved);
        }
        let id = domain.id;
        self.leave(at);
        self.endpoints[at].domain = Some(id);
    }

    /// Records that an endpoint is in no domain. A domain without endpoints ceases to exist (D-29).
    fn leave(&mut self, at: usize) {
        let Some(place) = self.endpoints[at].domain.take().and_then(|id| self.domains.find(id)) else {
            return;
        };
        let domain = &mut self.domains[place];
        domain.endpoints.retain(|&member| member != at);
        if domain.endpoints.is_empty() {
            self.remove_domain(place);
        } else if let DomainSpace::Mapped(mapped) = &mut domain.space {
            let endpoints = &self.endpoints;
            let mut lists = domain.endpoints.iter().map(|&member| &endpoints[member].reserved);
            if !lists.clone().all(|list| list.same(&mapped.reserved)) {
                mapped.reserved = Reserved::new(lists.by_ref().flat_map(Reserved::iter));
            }
        }
    }

    /// Ends a domain that no stream is bound to.
    fn remove_domain(&mut self, place: usize) {
        if let DomainSpace::Mapped(mapped) = self.domains.remove(place) {
            self.mappings = self.mappings.saturating_sub(mapped.mappings);
            self.host.destroy(mapped.space);
        }
    }

    /// Whether the reserved regions of an endpoint are free of mappings in the domain at `place`.
    fn check_reserved(&self, at: usize, place: usize) -> Result<(), Rejection> {
        let endpoint = &self.endpoints[at];
        let domain = &self.domains[place];
        let DomainSpace::Mapped(mapped) = &domain.space else { return Ok(()) };
        if mapped.mappings == 0 || mapped.reserved.same(&endpoint.reserved) {
            return Ok(());
        }
        let added = endpoint.reserved.iter().filter(|&region| !mapped.reserved.covers(region));
        match added.into_iter().find(|&region| self.host.overlaps(&mapped.space, region)) {
            Some(region) => Err(Rejection::Incompatible { endpoint: endpoint.id, domain: domain.id, region }),
            None => Ok(()),
        }
    }
}
