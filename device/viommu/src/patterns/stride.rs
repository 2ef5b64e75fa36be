//! How far it is from one access to the next of the same kind.

use std::collections::{BTreeMap, HashMap};

use pgtable_formats::Pasid;
use serde::Serialize;

/// Streams that are followed for each endpoint, reads and writes apart.
const MAX_STREAMS: usize = 4096;
/// Distances that are told apart for each endpoint.
const MAX_STRIDES: usize = 4096;
/// Distances that are told.
const TOLD: usize = 6;

/// The distances from the first address of an access to that of the next one of the same stream and kind.
#[derive(Default)]
pub(super) struct Strides {
    last: HashMap<(Option<Pasid>, bool), (u64, u32)>,
    counts: BTreeMap<i64, u64>,
    facts: StrideFacts,
}

/// What came out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct StrideFacts {
    /// Accesses that have one before them.
    pub(super) steps: u64,
    /// Those that start where the one before ended.
    pub(super) follows: u64,
    /// Those at the same address again.
    pub(super) repeats: u64,
    /// The most frequent distances in bytes, and how often they came.
    pub(super) most: Vec<(i64, u64)>,
    /// All others.
    pub(super) others: u64,
}

impl Strides {
    pub(super) fn add(&mut self, pasid: Option<Pasid>, write: bool, iova: u64, length: u32) {
        let key = (pasid, write);
        if self.last.len() >= MAX_STREAMS && !self.last.contains_key(&key) {
            return;
        }
        let Some((before, covered)) = self.last.insert(key, (iova, length)) else { return };
        self.facts.steps += 1;
        self.facts.follows += u64::from(before.checked_add(covered.into()) == Some(iova));
        self.facts.repeats += u64::from(before == iova);
        let distance = iova.wrapping_sub(before).cast_signed();
        if self.counts.len() < MAX_STRIDES || self.counts.contains_key(&distance) {
            *self.counts.entry(distance).or_insert(0) += 1;
        }
    }

    pub(super) fn facts(&self) -> StrideFacts {
        let mut most: Vec<(i64, u64)> =
            self.counts.iter().map(|(&distance, &count)| (distance, count)).collect();
        most.sort_by_key(|&(distance, count)| (std::cmp::Reverse(count), distance.unsigned_abs()));
        most.truncate(TOLD);
        let told: u64 = most.iter().map(|&(_, count)| count).sum();
        StrideFacts { others: self.facts.steps - told, most, ..self.facts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_and_a_stride_are_told_apart() {
        let mut strides = Strides::default();
        (0..5).for_each(|index| strides.add(None, true, 0x1000 * index, 0x1000));
        let facts = strides.facts();
        assert_eq!((facts.steps, facts.follows, facts.most), (4, 4, vec![(0x1000, 4)]));

        let mut strides = Strides::default();
        (0..5).for_each(|index| strides.add(None, true, 0x1000 * index, 64));
        assert_eq!((strides.facts().follows, strides.facts().most), (0, vec![(0x1000, 4)]));
    }

    #[test]
    fn reads_do_not_disturb_writes_nor_one_process_another() {
        let mut strides = Strides::default();
        for index in 0..3 {
            strides.add(None, false, 0x10_0000 + 64 * index, 64);
            strides.add(None, true, 0x90_0000 + 64 * index, 64);
            strides.add(Pasid::new(1), true, 0x50_0000 - 64 * index, 64);
        }
        let facts = strides.facts();
        assert_eq!((facts.steps, facts.follows), (6, 4));
        assert_eq!(facts.most, [(64, 4), (-64, 2)]);
    }

    #[test]
    fn the_whole_address_space_is_a_distance() {
        let mut strides = Strides::default();
        [0, u64::MAX - 1, u64::MAX - 1].into_iter().for_each(|iova| strides.add(None, true, iova, 1));
        assert_eq!((strides.facts().repeats, strides.facts().most), (1, vec![(0, 1), (-2, 1)]));
    }

    #[test]
    fn many_strides_cost_no_more_than_few() {
        let mut strides = Strides::default();
        (0..20_000u64).for_each(|index| strides.add(None, true, index * index, 1));
        let facts = strides.facts();
        assert_eq!((facts.steps, facts.most.len(), facts.others), (19_999, TOLD, 19_999 - TOLD as u64));
    }
}
