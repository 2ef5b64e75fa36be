//! Ranges of an address space that are not the caller's: where interrupts go.

use alloc::vec::Vec;

use viommu_wire::{Iova, IovaRange};

/// Disjoint ranges, ascending.
#[derive(Debug, Default)]
pub(super) struct Windows(Vec<IovaRange>);

impl Windows {
    /// Whether `range` has an address in a window.
    pub(super) fn touch(&self, range: IovaRange) -> bool {
        self.0.iter().any(|window| window.overlaps(range))
    }

    /// The parts of `range` that lie in no window, ascending.
    pub(super) fn outside(&self, range: IovaRange) -> Vec<IovaRange> {
        let mut parts = Vec::new();
        let mut next = Some(range.start());
        for window in self.0.iter().filter(|window| window.overlaps(range)) {
            let before = window.start().0.checked_sub(1).map(Iova);
            parts.extend(next.zip(before).and_then(|(first, last)| IovaRange::new(first, last)));
            next = window.last().0.checked_add(1).map(Iova);
        }
        parts.extend(next.and_then(|first| IovaRange::new(first, range.last())));
        parts
    }

    /// Adds a range that touches no window.
    pub(super) fn add(&mut self, range: IovaRange) {
        let place = self.0.partition_point(|window| window.start() < range.start());
        self.0.insert(place, range);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova(first), Iova(last)).unwrap()
    }

    #[test]
    fn what_is_left_beside_windows() {
        let mut windows = Windows::default();
        assert_eq!(windows.outside(IovaRange::ALL), [IovaRange::ALL]);
        for (first, last) in [(0x30, 0x3f), (0, 0xf), (0x40, 0x4f), (u64::MAX - 0xf, u64::MAX)] {
            assert!(!windows.touch(range(first, last)));
            windows.add(range(first, last));
            assert!(windows.touch(range(last, last)));
        }
        assert_eq!(windows.outside(IovaRange::ALL), [range(0x10, 0x2f), range(0x50, u64::MAX - 0x10)]);
        assert_eq!(windows.outside(range(0x10, 0x2f)), [range(0x10, 0x2f)]);
        assert_eq!(windows.outside(range(0x20, 0x30)), [range(0x20, 0x2f)]);
        assert_eq!(windows.outside(range(0x38, 0x60)), [range(0x50, 0x60)]);
        assert_eq!(windows.outside(range(0x31, 0x4f)), []);
        assert_eq!(windows.outside(range(0, 0)), []);
    }
}
