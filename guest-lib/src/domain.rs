//! Domains: address spaces that the device keeps, by MAP and UNMAP, and bypass.
//!
//! The third kind, a domain over the guest's own tables, is [`PasidTable`](crate::tables::PasidTable). Each kind is a
//! type of its own, so that no MAP is ever sent for a domain that takes none, and no endpoint is attached in
//! another way than the others.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use viommu_wire::{
    AttachFlags, DomainId, EndpointId, Gpa, Iova, IovaRange, Map, MapFlags, Request, ReservedRegion, Unmap,
};

use crate::hal::{Platform, Transport};
use crate::probe::Endpoint;
use crate::{Driver, RequestError};

/// Why a domain was not changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DomainError {
    /// The request failed.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// An endpoint of the domain must not see mappings there.
    #[error("{0} touches a region that an endpoint reserves")]
    Reserved(IovaRange),
    /// Something is mapped there already.
    #[error("{0} is mapped already")]
    Mapped(IovaRange),
    /// The range ends inside of a mapping.
    #[error("{0} covers only a part of a mapping")]
    Split(IovaRange),
    /// The endpoint is not attached to this domain.
    #[error("endpoint {0} is not attached")]
    NotAttached(EndpointId),
    /// Every domain ID is in use.
    #[error("no domain ID is left")]
    NoDomain,
}

/// One mapping to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The addresses that the endpoints use.
    pub range: IovaRange,
    /// Where the first of them leads.
    pub target: Gpa,
    /// What accesses pass: READ must be set for reads, and MMIO should be for device registers.
    pub flags: MapFlags,
}

/// A domain whose mappings are made by MAP and UNMAP. The caller chooses the addresses.
///
/// The domain knows its mappings, because the rules for MAP and UNMAP cannot be kept otherwise.
#[derive(Debug)]
pub struct MappedDomain {
    id: DomainId,
    endpoints: Vec<Attached>,
    /// Last address by first address.
    mappings: BTreeMap<u64, u64>,
}

#[derive(Debug)]
struct Attached {
    id: EndpointId,
    reserved: Vec<ReservedRegion>,
}

impl MappedDomain {
    /// A domain with an ID of its own; the device learns of it at the first attach.
    ///
    /// # Errors
    /// [`DomainError::NoDomain`].
    pub fn new<P: Platform, T: Transport>(driver: &mut Driver<P, T>) -> Result<Self, DomainError> {
        let id = driver.new_domain_id().ok_or(DomainError::NoDomain)?;
        Ok(Self { id, endpoints: Vec::new(), mappings: BTreeMap::new() })
    }

    /// Its ID.
    pub const fn id(&self) -> DomainId {
        self.id
    }

    /// The mappings, in the order of addresses.
    pub fn mappings(&self) -> impl Iterator<Item = IovaRange> {
        self.mappings.iter().filter_map(|(&first, &last)| range(first, last))
    }

    /// Attaches an endpoint. Endpoints whose accesses the bus cannot tell apart belong in one domain.
    ///
    /// # Errors
    /// [`DomainError::Reserved`] where mappings lie in one of its reserved regions; [`DomainError::Request`].
    pub fn attach<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        endpoint: &Endpoint,
    ) -> Result<(), DomainError> {
        let reserved = &endpoint.properties().reserved;
        if let Some(region) = reserved.iter().find(|region| self.touching(region.range).next().is_some()) {
            return Err(DomainError::Reserved(region.range));
        }
        driver.attach(self.id, endpoint, AttachFlags::empty())?;
        if self.endpoints.iter().all(|attached| attached.id != endpoint.id()) {
            self.endpoints.push(Attached { id: endpoint.id(), reserved: reserved.clone() });
        }
        Ok(())
    }

    /// Detaches an endpoint. With the last one the device forgets every mapping, and so does this.
    ///
    /// # Errors
    /// [`DomainError::NotAttached`]; [`DomainError::Request`].
    pub fn detach<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        endpoint: EndpointId,
    ) -> Result<(), DomainError> {
        let place = self
            .endpoints
            .iter()
            .position(|attached| attached.id == endpoint)
            .ok_or(DomainError::NotAttached(endpoint))?;
        driver.detach(self.id, endpoint)?;
        self.endpoints.swap_remove(place);
        if self.endpoints.is_empty() {
            self.mappings.clear();
        }
        Ok(())
    }

    /// Makes one mapping.
    ///
    /// # Errors
    /// As [`DomainError`] says; nothing is mapped then.
    pub fn map<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        mapping: Mapping,
    ) -> Result<(), DomainError> {
        let mut outcome = Ok(());
        self.map_all(driver, &[mapping], |_, error| outcome = Err(error));
        outcome
    }

    /// Makes many mappings with as few notifications as possible, and calls `failed` for each that was not made.
    pub fn map_all<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        mappings: &[Mapping],
        mut failed: impl FnMut(usize, DomainError),
    ) {
        let domain = self.id;
        let mut indices = Vec::with_capacity(mappings.len());
        for (index, mapping) in mappings.iter().enumerate() {
            match self.claim(mapping.range) {
                Ok(()) => indices.push(index),
                Err(error) => failed(index, error),
            }
        }
        let requests = indices.iter().filter_map(|&index| mappings.get(index)).map(|mapping| {
            Request::Map(Map {
                domain,
                virt_start: mapping.range.start(),
                virt_end: mapping.range.last(),
                phys_start: mapping.target,
                flags: mapping.flags,
            })
        });
        let known = &mut self.mappings;
        driver.send_all(requests, |sent, answer| {
            let Err(error) = answer else { return };
            let Some(&index) = indices.get(sent) else { return };
            if !error.is_outcome_unknown()
                && let Some(mapping) = mappings.get(index)
            {
                known.remove(&mapping.range.start().0);
            }
            failed(index, error.into());
        });
    }

    /// Removes every mapping in `range`.
    ///
    /// # Errors
    /// [`DomainError::Split`] where an end of `range` lies inside of a mapping: nothing is removed.
    /// [`DomainError::Request`].
    pub fn unmap<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        range: IovaRange,
    ) -> Result<(), DomainError> {
        let mut outcome = Ok(());
        self.unmap_all(driver, &[range], |_, error| outcome = Err(error));
        outcome
    }

    /// Removes every mapping in many ranges with as few notifications as possible, and calls `failed` for each range
    /// that was not cleared.
    pub fn unmap_all<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        ranges: &[IovaRange],
        mut failed: impl FnMut(usize, DomainError),
    ) {
        let domain = self.id;
        let mut indices = Vec::with_capacity(ranges.len());
        for (index, range) in ranges.iter().enumerate() {
            match self.touching(*range).find(|mapping| !range.covers(*mapping)) {
                None => indices.push(index),
                Some(_) => failed(index, DomainError::Split(*range)),
            }
        }
        let requests = indices
            .iter()
            .filter_map(|&index| ranges.get(index))
            .map(|range| Request::Unmap(Unmap { domain, virt_start: range.start(), virt_end: range.last() }));
        let mut cleared = Vec::with_capacity(indices.len());
        driver.send_all(requests, |sent, answer| {
            let Some(&index) = indices.get(sent) else { return };
            match answer {
                Ok(()) => cleared.extend(ranges.get(index)),
                Err(error) => failed(index, error.into()),
            }
        });
        for range in cleared {
            loop {
                let mapping = self.touching(range).next();
                let Some(mapping) = mapping else { break };
                self.mappings.remove(&mapping.start().0);
            }
        }
    }

    /// Enters a mapping, unless something is in its way.
    fn claim(&mut self, range: IovaRange) -> Result<(), DomainError> {
        let reserved =
            |attached: &Attached| attached.reserved.iter().any(|region| region.range.overlaps(range));
        if self.endpoints.iter().any(reserved) {
            return Err(DomainError::Reserved(range));
        }
        if self.touching(range).next().is_some() {
            return Err(DomainError::Mapped(range));
        }
        self.mappings.insert(range.start().0, range.last().0);
        Ok(())
    }

    /// The mappings that share an address with `wanted`.
    fn touching(&self, wanted: IovaRange) -> impl Iterator<Item = IovaRange> {
        let before = self.mappings.range(..wanted.start().0).next_back();
        let inside = self.mappings.range(wanted.start().0..=wanted.last().0);
        before
            .into_iter()
            .chain(inside)
            .filter_map(|(&first, &last)| range(first, last))
            .filter(move |mapping| mapping.overlaps(wanted))
    }
}

/// A domain in which endpoints reach guest-physical memory untranslated. It has no mappings.
#[derive(Debug)]
pub struct BypassDomain {
    id: DomainId,
}

impl BypassDomain {
    /// A domain with an ID of its own; the device learns of it at the first attach.
    ///
    /// # Errors
    /// [`DomainError::NoDomain`].
    pub fn new<P: Platform, T: Transport>(driver: &mut Driver<P, T>) -> Result<Self, DomainError> {
        Ok(Self { id: driver.new_domain_id().ok_or(DomainError::NoDomain)? })
    }

    /// Its ID.
    pub const fn id(&self) -> DomainId {
        self.id
    }

    /// Attaches an endpoint, always with the flag BYPASS.
    ///
    /// # Errors
    /// [`RequestError::NotNegotiated`] without BYPASS_CONFIG; [`DomainError::Request`].
    pub fn attach<P: Platform, T: Transport>(
        &self,
        driver: &mut Driver<P, T>,
        endpoint: &Endpoint,
    ) -> Result<(), DomainError> {
        Ok(driver.attach(self.id, endpoint, AttachFlags::BYPASS)?)
    }

    /// Detaches an endpoint.
    ///
    /// # Errors
    /// [`DomainError::Request`].
    pub fn detach<P: Platform, T: Transport>(
        &self,
        driver: &mut Driver<P, T>,
        endpoint: EndpointId,
    ) -> Result<(), DomainError> {
        Ok(driver.detach(self.id, endpoint)?)
    }
}

fn range(first: u64, last: u64) -> Option<IovaRange> {
    IovaRange::new(Iova(first), Iova(last))
}
