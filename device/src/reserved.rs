//! Addresses that must not be mapped, in the form that a MAP checks against.

use alloc::sync::Arc;
use alloc::vec::Vec;

use viommu_wire::{Iova, IovaRange};

/// Disjoint ranges, ascending, none adjacent to the next. Cheap to clone: endpoints with the same regions, and the
/// domains that they are in, share one list.
#[derive(Clone, Debug)]
pub(crate) struct Reserved(Arc<[IovaRange]>);

impl Reserved {
    /// From ranges in any order; they may overlap.
    pub(crate) fn new(ranges: impl IntoIterator<Item = IovaRange>) -> Self {
        let mut ranges: Vec<IovaRange> = ranges.into_iter().collect();
        ranges.sort_unstable_by_key(|range| range.start());
        let mut merged: Vec<IovaRange> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match merged.last_mut() {
                Some(previous) if touches(*previous, range) => {
                    let last = Iova(previous.last().0.max(range.last().0));
                    // A later end keeps the order of the two.
                    *previous = IovaRange::new(previous.start(), last).unwrap_or(range);
                }
                _ => merged.push(range),
            }
        }
        Self(merged.into())
    }

    /// All of both.
    pub(crate) fn union(&self, other: &Self) -> Self {
        if self.same(other) { self.clone() } else { Self::new(self.iter().chain(other.iter())) }
    }

    /// Whether both hold the same addresses.
    #[inline]
    pub(crate) fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0 == other.0
    }

    /// The range that `range` shares an address with.
    #[inline]
    pub(crate) fn hit(&self, range: IovaRange) -> Option<IovaRange> {
        let from = self.0.partition_point(|reserved| reserved.last() < range.start());
        self.0.get(from).copied().filter(|reserved| reserved.overlaps(range))
    }

    /// Whether the whole of `range` is reserved.
    pub(crate) fn covers(&self, range: IovaRange) -> bool {
        self.hit(range).is_some_and(|reserved| reserved.covers(range))
    }

    /// The ranges, ascending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = IovaRange> + '_ {
        self.0.iter().copied()
    }
}

/// Whether `next`, which does not start before `previous`, overlaps or follows without a gap.
fn touches(previous: IovaRange, next: IovaRange) -> bool {
    match previous.last().checked_add(1) {
        Some(after) => next.start() <= after,
        None => true,
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova(start), Iova(last)).unwrap()
    }

    #[test]
    fn overlapping_and_adjacent_ranges_merge() {
        let reserved = Reserved::new([range(20, 29), range(0, 4), range(5, 9), range(25, 40), range(8, 8)]);
        assert_eq!(reserved.iter().collect::<Vec<_>>(), vec![range(0, 9), range(20, 40)]);
    }

    #[test]
    fn a_range_that_reaches_the_last_address_swallows_what_follows() {
        let reserved = Reserved::new([range(10, u64::MAX), range(20, 30), range(u64::MAX, u64::MAX)]);
        assert_eq!(reserved.iter().collect::<Vec<_>>(), vec![range(10, u64::MAX)]);
    }

    #[test]
    fn hit_agrees_with_a_scan() {
        let reserved = Reserved::new([range(2, 3), range(6, 8), range(12, 12)]);
        for start in 0..15 {
            for last in start..15 {
                let asked = range(start, last);
                let expected = reserved.iter().find(|reserved| reserved.overlaps(asked));
                assert_eq!(reserved.hit(asked), expected, "{asked}");
            }
        }
    }
}
