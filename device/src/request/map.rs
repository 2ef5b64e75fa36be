//! MAP and UNMAP.

use viommu_wire::{DomainId, Features, Iova, IovaRange, Map, MapFlags, RequestType, Unmap};

use crate::device::Device;
use crate::domain::{DomainSpace, Domains, MappedSpace};
use crate::error::{Rejection, Resource};
use crate::host::{Host, MapError, UnmapError};
use crate::limits::Limits;
use crate::mapping::Mapping;

impl<H: Host> Device<H> {
    /// Order of checks: flags, domain, range and alignment, reserved regions, overlap, limits.
    #[inline]
    pub(super) fn map(&mut self, map: &Map) -> Result<(), Rejection> {
        self.check_negotiated(RequestType::Map)?;
        if map.flags.contains(MapFlags::MMIO) && !self.features.contains(Features::MMIO) {
            let kind = RequestType::Map;
            return Err(Rejection::FlagNotNegotiated { kind, feature: Features::MMIO }); // D-32
        }
        let Self { host, domains, mappings, config, .. } = self;
        let domain = mapped(domains, map.domain)?; // D-33, D-34
        let range = ordered(map.range(), map.virt_start, map.virt_end)?;

        // The end wraps to 0, which is aligned, where the range reaches the last address.
        let ends = range.start().0 | range.last().0.wrapping_add(1) | map.phys_start.0;
        let granule_lg2 = config.granule_lg2();
        if ends & ((1 << granule_lg2) - 1) != 0 {
            return Err(Rejection::Misaligned { range, output: map.phys_start, granule_lg2 }); // D-30
        }
        if map.phys_start.checked_add(range.length_minus_one()).is_none() {
            return Err(Rejection::OutputWraps { range, output: map.phys_start });
        }
        let input_range = config.input_range;
        if !input_range.covers(range) {
            return Err(Rejection::OutsideInputRange { range, input_range }); // D-15
        }
        if let Some(region) = domain.reserved.hit(range) {
            return Err(Rejection::ReservedRegion { range, region }); // D-37
        }
        if let Some(limit) = limit_reached(&config.limits, domain.mappings, *mappings) {
            // What could not be mapped at any time is not for want of memory.
            return Err(if host.overlaps(&domain.space, range) { Rejection::Overlap(range) } else { limit });
        }

        // The host honours the flags: D-35, D-36.
        let mapping = Mapping { range, output: map.phys_start, flags: map.flags };
        host.map(&mut domain.space, mapping).map_err(|error| match error {
            MapError::Overlap => Rejection::Overlap(range), // D-31
            MapError::Host(error) => Rejection::Host(error),
        })?;
        domain.mappings += 1;
        *mappings += 1;
        Ok(())
    }

    /// Addresses outside of the input range are addresses without a mapping, and need no alignment.
    #[inline]
    pub(super) fn unmap(&mut self, unmap: &Unmap) -> Result<(), Rejection> {
        self.check_negotiated(RequestType::Unmap)?;
        let Self { host, domains, mappings, .. } = self;
        let domain = mapped(domains, unmap.domain)?; // D-39, D-40
        let range = ordered(unmap.range(), unmap.virt_start, unmap.virt_end)?;
        let removed = host.unmap(&mut domain.space, range).map_err(|error| match error {
            UnmapError::Split => Rejection::Split(range), // D-41
            UnmapError::Host(error) => Rejection::Host(error),
        })?; // D-42
        domain.mappings = domain.mappings.saturating_sub(removed);
        *mappings = mappings.saturating_sub(removed);
        Ok(())
    }

    #[inline]
    fn check_negotiated(&self, kind: RequestType) -> Result<(), Rejection> {
        match self.features.contains(Features::MAP_UNMAP) {
            true => Ok(()),
            false => Err(Rejection::NoMapUnmap(kind)),
        }
    }
}

/// Whether there may not be another mapping, in a domain with so many or in all domains with so many.
#[inline]
fn limit_reached(limits: &Limits, in_domain: usize, in_all: usize) -> Option<Rejection> {
    let Limits { max_mappings_per_domain, max_mappings, .. } = *limits;
    if in_domain >= max_mappings_per_domain {
        Some(Rejection::Limit(Resource::MappingsPerDomain, max_mappings_per_domain))
    } else if in_all >= max_mappings {
        Some(Rejection::Limit(Resource::Mappings, max_mappings))
    } else {
        None
    }
}

#[inline]
fn mapped<S>(domains: &mut Domains<S>, id: DomainId) -> Result<&mut MappedSpace<S>, Rejection> {
    let place = domains.find(id).ok_or(Rejection::NoDomain(id))?;
    let domain = &mut domains[place];
    let found = domain.kind();
    match &mut domain.space {
        DomainSpace::Mapped(mapped) => Ok(mapped),
        DomainSpace::Bypass | DomainSpace::Table => Err(Rejection::WrongKind { domain: id, found }),
    }
}

#[inline]
fn ordered(range: Option<IovaRange>, start: Iova, last: Iova) -> Result<IovaRange, Rejection> {
    range.ok_or(Rejection::Inverted { start, last })
}
