//! Reserved regions of an endpoint.

use pgtable_formats::{AccessKind, Iova, IovaRange};
use viommu_wire::{ReservedKind, ReservedRegion};

/// What the reserved regions say about one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// It lies in none of them; they leave free at least this range around it.
    Free(IovaRange),
    /// It lies in this one.
    Reserved(ReservedRegion),
}

/// Where `iova` lies with respect to `regions`, which are disjoint and ascending.
pub(super) fn locate(regions: &[ReservedRegion], iova: Iova) -> Place {
    let above = regions.partition_point(|region| region.range.last() < iova);
    let start = match above.checked_sub(1).and_then(|below| regions.get(below)) {
        // The region lies below an address, so it does not reach the end of the space.
        Some(region) => Iova(region.range.last().0.saturating_add(1)),
        None => Iova(0),
    };
    let last = match regions.get(above) {
        Some(region) if region.range.contains(iova) => return Place::Reserved(*region),
        // The region starts above an address, so not at 0.
        Some(region) => Iova(region.range.start().0.saturating_sub(1)),
        None => IovaRange::ALL.last(),
    };
    Place::Free(IovaRange::new(start, last).unwrap_or(IovaRange::ALL))
}

/// Whether an access to `region` is a message-signalled interrupt.
pub(super) fn is_interrupt(region: ReservedRegion, kind: AccessKind) -> bool {
    region.kind == ReservedKind::Msi && kind == AccessKind::Write
}
