//! Counting values whose size is not known before, in bounded memory.

use std::collections::BTreeMap;

use serde::Serialize;
use serde::ser::{SerializeStruct, Serializer};

/// Distinct values that are counted one by one; beyond, only powers of two are told apart.
const EXACT: usize = 1024;

/// How often which values came, by powers of two; and exactly, as long as they are few.
#[derive(Clone, Debug)]
pub(super) struct Histogram {
    /// Index 0: the value 0; `k`: from `1 << (k - 1)` on, up to the next.
    buckets: [u64; 65],
    exact: Option<BTreeMap<u64, u64>>,
    count: u64,
    sum: u128,
    least: u64,
    most: u64,
}

/// One bucket: values `first..=last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Bucket {
    pub(super) first: u64,
    pub(super) last: u64,
    pub(super) count: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: [0; 65], exact: Some(BTreeMap::new()), count: 0, sum: 0, least: u64::MAX, most: 0 }
    }
}

impl Histogram {
    pub(super) fn add(&mut self, value: u64) {
        if let Some(bucket) = self.buckets.get_mut(index(value)) {
            *bucket += 1;
        }
        if let Some(exact) = &mut self.exact {
            *exact.entry(value).or_insert(0) += 1;
            if exact.len() > EXACT {
                self.exact = None;
            }
        }
        self.count += 1;
        self.sum += u128::from(value);
        self.least = self.least.min(value);
        self.most = self.most.max(value);
    }

    /// How many values.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// The least and the greatest value.
    pub(super) fn ends(&self) -> Option<(u64, u64)> {
        (self.count > 0).then_some((self.least, self.most))
    }

    /// A value that half of all do not exceed; where values were too many, the least of its bucket.
    pub(super) fn median(&self) -> Option<u64> {
        let half = self.count.div_ceil(2);
        let mut passed = 0;
        let mut reached = |count: u64| {
            passed += count;
            count > 0 && passed >= half
        };
        match &self.exact {
            Some(exact) => exact.iter().find(|&(_, &count)| reached(count)).map(|(&value, _)| value),
            None => {
                self.buckets().into_iter().find(|bucket| reached(bucket.count)).map(|bucket| bucket.first)
            }
        }
    }

    /// How often exactly this value came; `None` where that is not known.
    pub(super) fn exactly(&self, value: u64) -> Option<u64> {
        match &self.exact {
            Some(exact) => Some(exact.get(&value).copied().unwrap_or(0)),
            // A bucket with one value in it.
            None if value <= 1 => self.buckets.get(index(value)).copied(),
            None => None,
        }
    }

    /// Each value with its number, while they are at most `most`.
    pub(super) fn values(&self, most: usize) -> Option<Vec<(u64, u64)>> {
        let exact = self.exact.as_ref().filter(|exact| exact.len() <= most)?;
        Some(exact.iter().map(|(&value, &count)| (value, count)).collect())
    }

    /// From the first bucket that is not empty to the last one.
    pub(super) fn buckets(&self) -> Vec<Bucket> {
        let used = |&(_, &count): &(usize, &u64)| count > 0;
        let first = self.buckets.iter().enumerate().find(used).map_or(0, |(index, _)| index);
        let end = self.buckets.iter().enumerate().rfind(used).map_or(0, |(index, _)| index + 1);
        let between = self.buckets.iter().enumerate().take(end).skip(first);
        between.map(|(index, &count)| Bucket { first: least(index), last: greatest(index), count }).collect()
    }
}

impl Serialize for Histogram {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut out = serializer.serialize_struct("Histogram", 5)?;
        out.serialize_field("count", &self.count)?;
        out.serialize_field("least", &self.ends().map(|(least, _)| least))?;
        out.serialize_field("median", &self.median())?;
        out.serialize_field("most", &self.ends().map(|(_, most)| most))?;
        out.serialize_field("buckets", &self.buckets())?;
        out.end()
    }
}

fn index(value: u64) -> usize {
    (u64::BITS - value.leading_zeros()) as usize
}

fn least(index: usize) -> u64 {
    match index {
        0 => 0,
        _ => 1 << (index - 1),
    }
}

fn greatest(index: usize) -> u64 {
    match index {
        0 => 0,
        64 => u64::MAX,
        _ => (1 << index) - 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_powers_of_two() {
        let mut histogram = Histogram::default();
        for value in [0, 1, 2, 3, 4, 4096, u64::MAX] {
            histogram.add(value);
        }
        let buckets = histogram.buckets();
        let find = |value: u64| buckets.iter().find(|b| (b.first..=b.last).contains(&value)).unwrap().count;
        assert_eq!((find(0), find(1), find(2), find(4), find(4096), find(u64::MAX)), (1, 1, 2, 1, 1, 1));
        assert_eq!((buckets[0].first, buckets[64].last), (0, u64::MAX));
        assert_eq!(histogram.median(), Some(3));
        assert_eq!(histogram.ends(), Some((0, u64::MAX)));
    }

    #[test]
    fn many_values_cost_no_more_than_few() {
        let mut histogram = Histogram::default();
        (0..100_000).for_each(|value| histogram.add(value));
        assert!(histogram.exact.is_none());
        assert_eq!((histogram.count(), histogram.exactly(1), histogram.exactly(7)), (100_000, Some(1), None));
        assert_eq!(histogram.median(), Some(32768));
        assert_eq!(histogram.values(8), None);
    }

    #[test]
    fn of_nothing_there_is_no_median() {
        let histogram = Histogram::default();
        assert_eq!((histogram.median(), histogram.ends()), (None, None));
        assert!(histogram.buckets().is_empty());
    }
}
