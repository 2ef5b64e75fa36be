//! What a driver must not map: what the kernel leaves out, and what is known of the device.

use pgtable_formats::{Iova, IovaRange};
use viommu_wire::{ReservedKind, ReservedRegion};

/// The reserved regions of an endpoint, ascending and disjoint (D-53), at most one of them for MSIs (D-52).
///
/// `allowed` are the ranges that the kernel lets be mapped, ascending and disjoint. What lies above the last of them is
/// no region of the endpoint but the end of its input range.
pub(crate) fn regions(allowed: &[IovaRange], device: &[ReservedRegion]) -> Vec<ReservedRegion> {
    let msi = device.iter().find(|region| region.kind == ReservedKind::Msi).map(|region| region.range);
    let others =
        device.iter().filter(|region| region.kind == ReservedKind::Reserved || Some(region.range) != msi);
    let merged = merge(holes(allowed).into_iter().chain(others.map(|region| region.range)).collect());
    let mut regions: Vec<ReservedRegion> = merged
        .into_iter()
        .flat_map(|range| match msi {
            Some(msi) => around(range, msi),
            None => [Some(range), None],
        })
        .flatten()
        .map(|range| ReservedRegion { kind: ReservedKind::Reserved, range })
        .collect();
    regions.extend(msi.map(|range| ReservedRegion { kind: ReservedKind::Msi, range }));
    regions.sort_unstable_by_key(|region| region.range.start());
    regions
}

/// What lies between and below the allowed ranges.
fn holes(allowed: &[IovaRange]) -> Vec<IovaRange> {
    let mut holes = Vec::new();
    let mut next = Some(Iova(0));
    for range in allowed {
        let hole = next.and_then(|next| IovaRange::new(next, Iova(range.start().0.checked_sub(1)?)));
        holes.extend(hole);
        next = range.last().checked_add(1);
    }
    holes
}

/// Sorted, with none that overlaps or follows on another.
fn merge(mut ranges: Vec<IovaRange>) -> Vec<IovaRange> {
    ranges.sort_unstable_by_key(|range| range.start());
    let mut merged: Vec<IovaRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(previous) if previous.last().checked_add(1).is_none_or(|next| range.start() <= next) => {
                let last = previous.last().max(range.last());
                *previous = IovaRange::new(previous.start(), last).unwrap_or(range);
            }
            _ => merged.push(range),
        }
    }
    merged
}

/// What of `range` lies below and above `cut`.
fn around(range: IovaRange, cut: IovaRange) -> [Option<IovaRange>; 2] {
    if !range.overlaps(cut) {
        return [Some(range), None];
    }
    let below = cut.start().0.checked_sub(1).and_then(|last| IovaRange::new(range.start(), Iova(last)));
    let above = cut.last().checked_add(1).and_then(|first| IovaRange::new(first, range.last()));
    [below, above]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova(start), Iova(last)).unwrap()
    }

    fn region(kind: ReservedKind, start: u64, last: u64) -> ReservedRegion {
        ReservedRegion { kind, range: range(start, last) }
    }

    use ReservedKind::{Msi, Reserved};

    #[test]
    fn the_msi_window_of_the_emulated_machine_stays_one() {
        let allowed = [range(0, 0x7ff_ffff), range(0x810_0000, 0xfff_ffff_ffff)];
        let msi = region(Msi, 0x800_0000, 0x80f_ffff);
        assert_eq!(regions(&allowed, &[msi]), [msi]);
        assert_eq!(regions(&allowed, &[]), [region(Reserved, 0x800_0000, 0x80f_ffff)]);
    }

    #[test]
    fn holes_and_device_regions_become_one_disjoint_list() {
        let allowed = [range(0x1000, 0x1fff), range(0x3000, 0xffff)];
        let device = [
            region(Reserved, 0x9000, 0x9fff),
            region(Msi, 0x2800, 0x28ff),
            region(Reserved, 0x2f00, 0x3fff),
            region(Reserved, 0x9800, 0xafff),
        ];
        let expected = [
            region(Reserved, 0, 0xfff),
            region(Reserved, 0x2000, 0x27ff),
            region(Msi, 0x2800, 0x28ff),
            region(Reserved, 0x2900, 0x3fff),
            region(Reserved, 0x9000, 0xafff),
        ];
        assert_eq!(regions(&allowed, &device), expected);
    }

    #[test]
    fn of_two_msi_windows_one_is_just_reserved() {
        let device = [region(Msi, 0x1000, 0x1fff), region(Msi, 0x8000, 0x8fff)];
        let expected = [device[0], region(Reserved, 0x8000, 0x8fff)];
        assert_eq!(regions(&[IovaRange::ALL], &device), expected);
        assert_eq!(regions(&[IovaRange::ALL], &[]), []);
        assert_eq!(regions(&[], &[]), []);
    }

    #[test]
    fn regions_at_both_ends_of_the_address_space() {
        let allowed = [range(0x1000, u64::MAX)];
        let device = [region(Reserved, u64::MAX - 0xfff, u64::MAX), region(Msi, 0, 0xfff)];
        let expected = [region(Msi, 0, 0xfff), region(Reserved, u64::MAX - 0xfff, u64::MAX)];
        assert_eq!(regions(&allowed, &device), expected);
    }
}
