//! One endpoint: its capabilities and what its streams are bound to.

use alloc::collections::BTreeMap;

use pgtable_formats::Pasid;
use viommu_wire::ReservedKind;

use super::page_requests::Waiting;
use super::space::{Kind, SpaceIndex, Spaces};
use crate::host::EndpointCaps;

/// Why an endpoint was not added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// There is one of that number.
    #[error("the endpoint exists")]
    Exists,
    /// Two of its reserved regions overlap (D-53).
    #[error("reserved regions overlap")]
    ReservedOverlap,
    /// More than one of its reserved regions is for MSIs (D-52).
    #[error("more than one MSI region")]
    TwoMsiRegions,
}

#[derive(Debug)]
pub(super) struct Port {
    /// The reserved regions are ascending.
    pub(super) caps: EndpointCaps,
    pub(super) untagged: Option<SpaceIndex>,
    pub(super) tagged: BTreeMap<Pasid, SpaceIndex>,
    /// Its accesses that wait for a page.
    pub(super) waiting: Waiting,
}

/// What serves a stream.
#[derive(Clone, Copy, Debug)]
pub(super) struct Served {
    pub(super) space: SpaceIndex,
    /// The PASID whose entry of a guest's table serves it: what caches are tagged with.
    pub(super) effective: Option<Pasid>,
}

impl Port {
    pub(super) fn new(mut caps: EndpointCaps) -> Result<Self, EndpointError> {
        caps.reserved.sort_unstable_by_key(|region| region.range.start());
        if caps.reserved.windows(2).any(|pair| matches!(pair, [a, b] if a.range.overlaps(b.range))) {
            return Err(EndpointError::ReservedOverlap);
        }
        if caps.reserved.iter().filter(|region| region.kind == ReservedKind::Msi).count() > 1 {
            return Err(EndpointError::TwoMsiRegions);
        }
        Ok(Self { caps, untagged: None, tagged: BTreeMap::new(), waiting: Waiting::default() })
    }

    /// What `pasid` (`None`: untagged accesses) translates through: what it is bound to itself, else what the untagged
    /// stream is bound to and serves PASIDs with. `None` where it faults.
    pub(super) fn served(&self, spaces: &Spaces, pasid: Option<Pasid>) -> Option<Served> {
        if let Some(&space) = pasid.and_then(|pasid| self.tagged.get(&pasid)) {
            return Some(Served { space, effective: pasid });
        }
        let space = self.untagged?;
        let effective = match (&spaces.get(space)?.kind, pasid) {
            (Kind::Table { table, .. }, None | Some(Pasid::ZERO)) if !table.has_pasids() => None,
            (Kind::Table { table, .. }, Some(_)) if !table.has_pasids() => return None,
            // An entry keeps its number where accesses with that PASID have lost it to the untagged ones.
            (Kind::Table { table, .. }, pasid) => table.effective_pasid(pasid).or(pasid),
            (Kind::Mapped(_), Some(_)) => return None,
            (Kind::Mapped(_) | Kind::Identity, _) => pasid,
        };
        Some(Served { space, effective })
    }

    pub(super) fn bound(&self, pasid: Option<Pasid>) -> Option<SpaceIndex> {
        match pasid {
            None => self.untagged,
            Some(pasid) => self.tagged.get(&pasid).copied(),
        }
    }

    pub(super) fn set_bound(&mut self, pasid: Option<Pasid>, space: Option<SpaceIndex>) {
        match (pasid, space) {
            (None, space) => self.untagged = space,
            (Some(pasid), Some(space)) => {
                self.tagged.insert(pasid, space);
            }
            (Some(pasid), None) => {
                self.tagged.remove(&pasid);
            }
        }
    }
}
