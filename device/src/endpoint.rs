//! Endpoints: whose accesses are translated, and what by.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::ops::{Index, IndexMut};

use viommu_wire::{DomainId, EndpointId, Pasid};

use crate::host::{Host, TableCaps};
use crate::reserved::Reserved;

/// An endpoint as the device sees it.
#[derive(Debug)]
pub(crate) struct Endpoint<S> {
    pub(crate) id: EndpointId,
    /// The guest tables that it takes, as PROBE tells: what a guest is not told of, it does not get.
    pub(crate) tables: Option<TableCaps>,
    /// What must not be mapped for it.
    pub(crate) reserved: Reserved,
    /// The domain that it is attached to.
    pub(crate) domain: Option<DomainId>,
    /// What its untagged accesses translate through.
    pub(crate) untagged: Bound<S>,
    /// The page tables bound for single PASIDs. PASID 0 is never here: its table is bound to untagged accesses.
    pub(crate) pasids: BTreeMap<Pasid, S>,
}

/// What the untagged accesses of an endpoint are bound to.
#[derive(Debug)]
pub(crate) enum Bound<S> {
    Nothing,
    Identity,
    /// The space of the mapped domain that the endpoint is attached to.
    Domain,
    /// A guest table that serves all PASIDs.
    PasidTable(S, UntaggedEntry),
    /// A guest table for PASID 0.
    PageTable(S),
}

/// The PASID whose entry of a PASID table serves untagged accesses, if one does.
pub(crate) type UntaggedEntry = Option<Pasid>;

impl<S> Bound<S> {
    /// The space, where it belongs to the endpoint.
    pub(crate) fn into_space(self) -> Option<S> {
        match self {
            Self::PasidTable(space, _) | Self::PageTable(space) => Some(space),
            Self::Nothing | Self::Identity | Self::Domain => None,
        }
    }
}

impl<S> Endpoint<S> {
    /// Whether any table of the guest is bound.
    pub(crate) fn has_table(&self) -> bool {
        !self.pasids.is_empty() || matches!(self.untagged, Bound::PasidTable(..) | Bound::PageTable(_))
    }

    /// How many page tables are bound for single PASIDs.
    pub(crate) fn page_tables(&self) -> usize {
        self.pasids.len() + usize::from(matches!(self.untagged, Bound::PageTable(_)))
    }
}

/// The endpoints of the host, found by ID. They never change, so a place holds for ever.
#[derive(Debug)]
pub(crate) struct Endpoints<S> {
    endpoints: Vec<Endpoint<S>>,
}

impl<S> Endpoints<S> {
    /// All endpoints of `host`, unattached and bound to nothing.
    pub(crate) fn new<H: Host<Space = S>>(host: &H) -> Self {
        let mut endpoints: Vec<Endpoint<S>> = Vec::new();
        for id in host.endpoints() {
            let Some(caps) = host.caps(id) else { continue };
            let own = Reserved::new(caps.reserved.iter().map(|region| region.range));
            // Share what is equal: a domain then needs no list of its own.
            let reserved = endpoints.iter().map(|other| &other.reserved).find(|other| other.same(&own));
            let reserved = reserved.cloned().unwrap_or(own);
            endpoints.push(Endpoint {
                id,
                tables: caps.tables.as_ref().map(TableCaps::for_guests),
                reserved,
                domain: None,
                untagged: Bound::Nothing,
                pasids: BTreeMap::new(),
            });
        }
        endpoints.sort_unstable_by_key(|endpoint| endpoint.id);
        endpoints.dedup_by_key(|endpoint| endpoint.id);
        Self { endpoints }
    }

    pub(crate) fn len(&self) -> usize {
        self.endpoints.len()
    }

    /// The place of `id`.
    #[inline]
    pub(crate) fn find(&self, id: EndpointId) -> Option<usize> {
        self.endpoints.binary_search_by_key(&id, |endpoint| endpoint.id).ok()
    }
}

/// By a place that [`Endpoints::find`] gave, or below [`Endpoints::len`].
impl<S> Index<usize> for Endpoints<S> {
    type Output = Endpoint<S>;

    #[inline]
    fn index(&self, place: usize) -> &Endpoint<S> {
        &self.endpoints[place]
    }
}

impl<S> IndexMut<usize> for Endpoints<S> {
    #[inline]
    fn index_mut(&mut self, place: usize) -> &mut Endpoint<S> {
        &mut self.endpoints[place]
    }
}
