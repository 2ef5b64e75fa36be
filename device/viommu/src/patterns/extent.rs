//! Which parts of an address space are used at all: they are mostly holes.

use std::collections::BTreeMap;

use pgtable_formats::{Iova, IovaRange, Pasid};

/// Pieces of one address space that are told apart; beyond, those next to each other become one.
const MAX_PIECES: usize = 6;
/// Address spaces of an endpoint whose pieces are kept.
const MAX_SPACES: usize = 8;
/// Holes up to this are none.
const NEAR: u64 = 1 << 16;

/// The pieces of each address space of an endpoint.
#[derive(Clone, Debug, Default)]
pub(super) struct Extents {
    /// By first page; whole pages of 4 KiB.
    spaces: BTreeMap<Option<Pasid>, BTreeMap<u64, u64>>,
    /// There were more address spaces.
    pub(super) more: bool,
}

impl Extents {
    pub(super) fn add(&mut self, pasid: Option<Pasid>, range: IovaRange) {
        if self.spaces.len() >= MAX_SPACES && !self.spaces.contains_key(&pasid) {
            self.more = true;
            return;
        }
        let pieces = self.spaces.entry(pasid).or_default();
        let (mut first, mut last) = (range.start().0 & !0xfff, range.last().0 | 0xfff);
        // Those that it touches, or nearly.
        while let Some((&start, &end)) = pieces.range(..=last.saturating_add(NEAR)).next_back() {
            if end < first.saturating_sub(NEAR) {
                break;
            }
            if start <= first && end >= last {
                return;
            }
            pieces.remove(&start);
            first = first.min(start);
            last = last.max(end);
        }
        pieces.insert(first, last);
        if pieces.len() > MAX_PIECES {
            join_nearest(pieces);
        }
    }

    /// All pieces, space by space, in the order of addresses.
    pub(super) fn pieces(&self) -> Vec<(Option<Pasid>, IovaRange)> {
        let ranges = self.spaces.iter().flat_map(|(&pasid, pieces)| {
            pieces
                .iter()
                .filter_map(move |(&first, &last)| Some((pasid, IovaRange::new(Iova(first), Iova(last))?)))
        });
        ranges.collect()
    }
}

fn join_nearest(pieces: &mut BTreeMap<u64, u64>) {
    let starts = pieces.keys().skip(1);
    let holes = pieces.values().zip(starts).map(|(&last, &next)| (next - last, next));
    let Some((_, second)) = holes.min() else { return };
    if let Some(last) = pieces.remove(&second)
        && let Some((_, end)) = pieces.range_mut(..second).next_back()
    {
        *end = last;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova(first), Iova(last)).unwrap()
    }

    #[test]
    fn what_is_near_is_one_piece() {
        let mut extents = Extents::default();
        extents.add(None, range(0x10_0000_0000, 0x10_0000_0fff));
        extents.add(None, range(0x10_0000_2010, 0x10_0000_2020));
        extents.add(None, range(0x7f00_0000_0000, 0x7f00_0000_0000));
        extents.add(Pasid::new(1), range(0, u64::MAX));
        extents.add(Pasid::new(1), range(5, 6));
        let pieces = [
            (None, range(0x10_0000_0000, 0x10_0000_2fff)),
            (None, range(0x7f00_0000_0000, 0x7f00_0000_0fff)),
            (Pasid::new(1), range(0, u64::MAX)),
        ];
        assert_eq!(extents.pieces(), pieces);
    }

    #[test]
    fn many_pieces_become_few() {
        let mut extents = Extents::default();
        for index in 0..1000u64 {
            extents.add(None, range((index * index) << 32, ((index * index) << 32) + 7));
        }
        let pieces = extents.pieces();
        assert_eq!(pieces.len(), MAX_PIECES);
        assert_eq!(pieces[0].1.start(), Iova(0));
        assert_eq!(pieces[MAX_PIECES - 1].1.last(), Iova(((999 * 999) << 32) + 0xfff));
        (0..100).for_each(|value| extents.add(Pasid::new(value), range(0, 0)));
        assert!(extents.more && extents.pieces().len() == MAX_PIECES + MAX_SPACES - 1);
    }
}
