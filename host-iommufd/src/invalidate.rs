//! Dropping what IOMMUs have cached of guests' tables.
//!
//! As asked, else everything, else the streams are blocked: never less than what was asked for while a stream goes on to
//! translate. A stream that was blocked by an earlier failure goes on once everything was dropped.

use std::collections::BTreeMap;
use std::sync::Arc;

use nix::errno::Errno;
use pgtable_formats::Pasid;
use viommu_device::host::{Invalidation, Scope, Stopped, TableCaps};
use viommu_wire::EndpointId;

use crate::endpoint::Endpoint;
use crate::error::host_error;
use crate::host::IommufdHost;
use crate::kernel::{Commands, Iommufd, VtdInvalidation};
use crate::objects::Hwpt;
use crate::unit::{Kind, Smmuv3};
use crate::vendor::{smmuv3, vtd};

type Endpoints<K> = BTreeMap<EndpointId, Endpoint<K>>;

/// A place in the batch, and what is there.
type Numbered<'a> = (usize, &'a Invalidation);

/// What stopped, and the first of the batch that was not done.
struct Failure {
    first: usize,
    errno: Errno,
}

impl<K: Iommufd> IommufdHost<K> {
    /// Of endpoints that there are. Each unit is asked once for all of the batch; where one fails the others are still
    /// asked.
    pub(crate) fn invalidate_known(&mut self, batch: &[Invalidation]) -> Result<(), Stopped> {
        let mut failure: Option<Failure> = None;
        for unit in &self.units {
            let endpoints = &self.endpoints;
            let behind = |endpoint| endpoints.get(&endpoint).is_some_and(|e| Arc::ptr_eq(&e.unit, unit));
            let of_unit: Vec<Numbered<'_>> =
                batch.iter().enumerate().filter(|(_, one)| behind(one.endpoint)).collect();
            let Some(&(first, _)) = of_unit.first() else { continue };
            let result = match &unit.kind {
                Kind::Smmuv3(smmu) => smmuv3_batch(&mut self.endpoints, smmu, &of_unit)
                    .map_err(|errno| Failure { first, errno }),
                Kind::Vtd => vtd_batch(&mut self.endpoints, &of_unit),
                Kind::Paging => Ok(()),
            };
            if let Err(new) = result
                && failure.as_ref().is_none_or(|failure| new.first < failure.first)
            {
                failure = Some(new);
            }
        }
        match failure {
            None => Ok(()),
            Some(Failure { first, errno }) => Err(Stopped { done: first, error: host_error(errno) }),
        }
    }
}

fn smmuv3_batch<K: Iommufd>(
    endpoints: &mut Endpoints<K>,
    smmu: &Smmuv3<K>,
    batch: &[Numbered<'_>],
) -> Result<(), Errno> {
    let hardware = &smmu.hardware;
    let mut targets = Vec::with_capacity(batch.len());
    let mut needs_all = false;
    for (_, invalidation) in batch {
        if let Some(endpoint) = endpoints.get(&invalidation.endpoint) {
            needs_all |= endpoint.needs_all();
            targets.push((**invalidation, endpoint.target()));
        }
    }
    if !needs_all && smmu.send(&smmuv3::plan(&targets, hardware)).is_ok() {
        return Ok(());
    }
    let mut all: Vec<smmuv3::Target> = targets.iter().map(|(_, target)| *target).collect();
    all.sort_unstable_by_key(|target| target.vsid);
    all.dedup_by_key(|target| target.vsid);
    tracing::debug!(endpoints = all.len(), "dropping everything");
    let sent = smmu.send(&smmuv3::everything(&all, hardware));
    let mut result = sent;
    for endpoint in all.iter().map(|target| EndpointId(target.vsid)) {
        let Some(endpoint) = endpoints.get_mut(&endpoint) else { continue };
        match sent {
            Ok(()) => result = result.and(endpoint.resume()),
            Err(errno) => endpoint.block(errno),
        }
    }
    result
}

/// One stream that is bound to a nested table, with what is asked of it.
struct Asked<K: Iommufd> {
    hwpt: Arc<Hwpt<K>>,
    endpoint: EndpointId,
    pasid: Option<Pasid>,
    /// The first of the batch that asks something of it.
    first: usize,
    entries: Vec<VtdInvalidation>,
}

fn vtd_batch<K: Iommufd>(endpoints: &mut Endpoints<K>, batch: &[Numbered<'_>]) -> Result<(), Failure> {
    let mut all: Vec<Asked<K>> = Vec::new();
    for &(first, invalidation) in batch {
        let Some(endpoint) = endpoints.get(&invalidation.endpoint) else { continue };
        for pasid in streams(endpoint, invalidation.scope) {
            let Some(hwpt) = endpoint.table(pasid) else { continue };
            let entries = vtd::plan(invalidation, largest_block(endpoint));
            match all.iter_mut().find(|asked| asked.endpoint == endpoint.facts.id && asked.pasid == pasid) {
                // Untagged accesses and PASID 0 are one stream here, and are asked for one after the other.
                Some(asked) => asked.extend(entries),
                None => {
                    let (endpoint, hwpt) = (endpoint.facts.id, Arc::clone(hwpt));
                    all.push(Asked { hwpt, endpoint, pasid, first, entries });
                }
            }
        }
    }
    let mut result = Ok(());
    for Asked { hwpt, endpoint, pasid, first, entries } in all {
        let Some(endpoint) = endpoints.get_mut(&endpoint) else { continue };
        let sent = send(&hwpt, &entries).or_else(|_| send(&hwpt, &[EVERYTHING]));
        let done = match (sent, pasid) {
            (Ok(()), None) => endpoint.resume(),
            (Ok(()), Some(pasid)) => endpoint.resume_tagged(pasid),
            (Err(errno), pasid) => {
                match pasid {
                    None => endpoint.block(errno),
                    Some(pasid) => endpoint.block_tagged(pasid, errno),
                }
                Err(errno)
            }
        };
        // In the order of the batch: the first that fails is what counts.
        if let Err(errno) = done {
            result = result.and(Err(Failure { first, errno }));
        }
    }
    result
}

const EVERYTHING: VtdInvalidation = VtdInvalidation { address: 0, pages: u64::MAX, leaf: false };

impl<K: Iommufd> Asked<K> {
    fn extend(&mut self, entries: Vec<VtdInvalidation>) {
        for entry in entries {
            if !self.entries.contains(&entry) {
                self.entries.push(entry);
            }
        }
    }
}

/// See [`vtd::largest_block`].
fn largest_block<K: Iommufd>(endpoint: &Endpoint<K>) -> Option<u8> {
    match &endpoint.facts.caps.tables {
        Some(TableCaps::Vtd(caps)) => vtd::largest_block(caps),
        Some(TableCaps::Smmuv3(_)) | None => None,
    }
}

/// The streams of an endpoint that a scope is about.
fn streams<K: Iommufd>(endpoint: &Endpoint<K>, scope: Scope) -> Vec<Option<Pasid>> {
    match scope {
        Scope::Endpoint => std::iter::once(None).chain(endpoint.pasids().map(Some)).collect(),
        Scope::Pasid(pasid) | Scope::Range { pasid, .. } => {
            vec![pasid.filter(|pasid| *pasid != Pasid::ZERO)]
        }
    }
}

/// The kernel counts these one by one: what it has not done is sent once more.
fn send<K: Iommufd>(hwpt: &Hwpt<K>, entries: &[VtdInvalidation]) -> Result<(), Errno> {
    let Err(error) = hwpt.invalidate(Commands::Vtd(entries)) else { return Ok(()) };
    tracing::debug!(%error, entries = entries.len(), "invalidation failed, what is left is sent once more");
    let done = usize::try_from(error.done).unwrap_or(0);
    // All are done, and yet it failed: then none of them counts.
    let left = entries.get(done..).filter(|left| !left.is_empty()).unwrap_or(entries);
    hwpt.invalidate(Commands::Vtd(left)).map_err(|error| error.errno)
}
