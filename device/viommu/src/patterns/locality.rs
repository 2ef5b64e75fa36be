//! How soon pages are used again, and what a translation cache of a given size would make of it.
//!
//! Pages are of 4 KiB, whatever the size of the mapping behind them.

use std::collections::{BTreeMap, HashMap};

use pgtable_formats::Pasid;
use serde::Serialize;

use super::histogram::{Bucket, Histogram};
use super::world::Stale;

/// Pages that are told apart at a time, for each endpoint. Of one that was used longer ago, it is forgotten that it was.
pub(super) const FOLLOWED: usize = 1 << 14;
/// Pages of one access that are followed.
pub(super) const PER_ACCESS: u64 = 256;
const PAGE_LG2: u32 = 12;

/// A page, and whose.
pub(super) type Page = (Option<Pasid>, u64);

/// What would have come of accesses in a cache: the least recently used of a fixed number of pages gives way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Verdicts {
    /// Pages accessed: an access of three pages counts three times.
    pub(super) lookups: u64,
    pub(super) hits: u64,
    /// Never used before, as far as is known.
    pub(super) first: u64,
    /// An UNMAP, an INVALIDATE or a detach had dropped it.
    pub(super) dropped: u64,
    /// It had given way to others.
    pub(super) evicted: u64,
}

/// See [`Verdicts`].
pub(super) struct Iotlb {
    entries: usize,
    stamps: HashMap<Page, u64>,
    pages: BTreeMap<u64, Page>,
    now: u64,
    /// Pages that are not in it any more: whether they were dropped. The oldest are forgotten.
    gone: HashMap<Page, bool>,
    pub(super) verdicts: Verdicts,
}

impl Iotlb {
    pub(super) fn new(entries: usize) -> Self {
        Self {
            entries,
            stamps: HashMap::new(),
            pages: BTreeMap::new(),
            now: 0,
            gone: HashMap::new(),
            verdicts: Verdicts::default(),
        }
    }

    pub(super) fn look_up(&mut self, page: Page) {
        let verdicts = &mut self.verdicts;
        verdicts.lookups += 1;
        match self.stamps.get(&page) {
            Some(stamp) => {
                verdicts.hits += 1;
                self.pages.remove(stamp);
            }
            None => match self.gone.remove(&page) {
                None => verdicts.first += 1,
                Some(true) => verdicts.dropped += 1,
                Some(false) => verdicts.evicted += 1,
            },
        }
        self.now += 1;
        self.stamps.insert(page, self.now);
        self.pages.insert(self.now, page);
        if self.stamps.len() > self.entries
            && let Some((_, oldest)) = self.pages.pop_first()
        {
            self.stamps.remove(&oldest);
            self.goes(oldest, false);
        }
    }

    pub(super) fn forget(&mut self, what: Stale) {
        let gone: Vec<Page> = self.stamps.keys().copied().filter(|&page| covers(what, page)).collect();
        for page in gone {
            if let Some(stamp) = self.stamps.remove(&page) {
                self.pages.remove(&stamp);
            }
            self.goes(page, true);
        }
    }

    fn goes(&mut self, page: Page, dropped: bool) {
        if self.gone.len() < FOLLOWED {
            self.gone.insert(page, dropped);
        }
    }
}

fn covers(what: Stale, (of, page): Page) -> bool {
    // A page table for PASID 0 serves untagged accesses, too.
    let same =
        |pasid: Option<Pasid>| of == pasid || (of.is_none() && pasid.is_some_and(|pasid| pasid.value() == 0));
    match what {
        Stale::All => true,
        Stale::Pasid(pasid) => same(pasid),
        Stale::Range(pasid, range) => {
            same(pasid) && (range.start().0 >> PAGE_LG2..=range.last().0 >> PAGE_LG2).contains(&page)
        }
    }
}

/// Reuse distances: how many other pages were used since the same page was used last.
pub(super) struct Reuse {
    /// The slot of each page's last use.
    slots: HashMap<Page, usize>,
    /// Which slots are a last use: a Fenwick tree.
    sums: Vec<u32>,
    next: usize,
    pub(super) distances: Histogram,
    /// Pages that were not used before, or so long ago that it is forgotten.
    pub(super) first: u64,
}

impl Reuse {
    pub(super) fn new() -> Self {
        Self {
            slots: HashMap::new(),
            sums: vec![0; 2 * FOLLOWED + 1],
            next: 0,
            distances: Histogram::default(),
            first: 0,
        }
    }

    pub(super) fn touch(&mut self, page: Page) {
        if self.next == 2 * FOLLOWED {
            self.compact();
        }
        match self.slots.insert(page, self.next) {
            Some(slot) => {
                let since = self.sum(self.next) - self.sum(slot + 1);
                self.distances.add(since.into());
                self.add(slot, false);
            }
            None => self.first += 1,
        }
        self.add(self.next, true);
        self.next += 1;
    }

    /// Of all pages used, how many a cache of 1, 2, 4… entries from which nothing is dropped would have had.
    pub(super) fn curve(&self) -> Vec<(u64, u64)> {
        let buckets = self.distances.buckets();
        let within =
            |entries: u64| buckets.iter().filter(|b| b.last < entries).map(|b: &Bucket| b.count).sum();
        (0..=FOLLOWED.trailing_zeros()).map(|lg2| (1 << lg2, within(1 << lg2))).collect()
    }

    /// Numbers the slots anew, without those that are no last use, and forgets the oldest half if need be.
    fn compact(&mut self) {
        let mut last: Vec<(usize, Page)> = self.slots.drain().map(|(page, slot)| (slot, page)).collect();
        last.sort_unstable_by_key(|&(slot, _)| slot);
        let skip = last.len().saturating_sub(FOLLOWED);
        self.sums.fill(0);
        self.next = 0;
        for (_, page) in last.into_iter().skip(skip) {
            self.slots.insert(page, self.next);
            self.add(self.next, true);
            self.next += 1;
        }
    }

    /// Last uses in slots `..end`.
    fn sum(&self, end: usize) -> u32 {
        let mut at = end;
        let mut sum = 0;
        while at > 0 {
            sum += self.sums.get(at).copied().unwrap_or(0);
            at &= at - 1;
        }
        sum
    }

    fn add(&mut self, slot: usize, set: bool) {
        let mut at = slot + 1;
        while let Some(sum) = self.sums.get_mut(at) {
            *sum = if set { *sum + 1 } else { *sum - 1 };
            at += at & at.wrapping_neg();
        }
    }
}

#[cfg(test)]
mod tests {
    use pgtable_formats::{Iova, IovaRange};

    use super::*;

    fn page(number: u64) -> Page {
        (None, number)
    }

    #[test]
    fn the_iotlb_says_why_it_misses() {
        let mut iotlb = Iotlb::new(2);
        // 1 and 2 are new, 1 hits, 3 is new and takes the place of 2, 2 has to come back for that.
        [1, 2, 1, 3, 2].into_iter().for_each(|number| iotlb.look_up(page(number)));
        assert_eq!(iotlb.verdicts, Verdicts { lookups: 5, hits: 1, first: 3, dropped: 0, evicted: 1 });
        let range = IovaRange::new(Iova(0x2000), Iova(0x2fff)).unwrap();
        iotlb.forget(Stale::Range(None, range));
        [3, 2].into_iter().for_each(|number| iotlb.look_up(page(number)));
        assert_eq!(iotlb.verdicts, Verdicts { lookups: 7, hits: 2, first: 3, dropped: 1, evicted: 1 });
    }

    #[test]
    fn what_is_dropped_is_one_pasids_or_all() {
        let pasid = Pasid::new(7);
        let mut iotlb = Iotlb::new(8);
        let look = |iotlb: &mut Iotlb| [page(1), (pasid, 1)].into_iter().for_each(|page| iotlb.look_up(page));
        look(&mut iotlb);
        iotlb.forget(Stale::Pasid(pasid));
        look(&mut iotlb);
        assert_eq!((iotlb.verdicts.hits, iotlb.verdicts.dropped), (1, 1));
        iotlb.forget(Stale::All);
        look(&mut iotlb);
        assert_eq!((iotlb.verdicts.hits, iotlb.verdicts.dropped), (1, 3));
        iotlb.forget(Stale::Pasid(Pasid::new(0)));
        look(&mut iotlb);
        assert_eq!((iotlb.verdicts.hits, iotlb.verdicts.dropped), (2, 4), "PASID 0 is the untagged one, too");
    }

    #[test]
    fn distances_count_other_pages_once() {
        let mut reuse = Reuse::new();
        [1, 1, 2, 3, 3, 2, 1].into_iter().for_each(|number| reuse.touch(page(number)));
        assert_eq!(reuse.first, 3);
        // 1 at once: 0. 3 at once: 0. 2 behind 3: 1. 1 behind 2 and 3: 2.
        assert_eq!(reuse.distances.values(8), Some(vec![(0, 2), (1, 1), (2, 1)]));
        assert_eq!(reuse.curve()[..3], [(1, 2), (2, 3), (4, 4)]);
    }

    #[test]
    fn distances_stay_right_when_slots_are_numbered_anew() {
        let mut reuse = Reuse::new();
        for round in 0..40_000u64 {
            reuse.touch(page(round % 5));
        }
        assert_eq!((reuse.first, reuse.distances.values(8)), (5, Some(vec![(4, 39_995)])));
        // More pages than are followed, in turn: each is forgotten before it comes again.
        let mut reuse = Reuse::new();
        for round in 0..6 * FOLLOWED as u64 {
            reuse.touch(page(round % (3 * FOLLOWED as u64)));
        }
        assert_eq!(reuse.distances.count(), 0);
        assert!(reuse.slots.len() <= 2 * FOLLOWED);
    }

    /// The curve is that of caches which drop nothing.
    #[test]
    fn the_curve_agrees_with_caches() {
        let pages = |count: u64| {
            let mut state = 1u64;
            (0..count).map(move |_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                page((state >> 33) % 50 * ((state >> 40) % 3))
            })
        };
        let mut reuse = Reuse::new();
        pages(5000).for_each(|page| reuse.touch(page));
        for (entries, hits) in reuse.curve().into_iter().take(8) {
            let mut iotlb = Iotlb::new(usize::try_from(entries).unwrap());
            pages(5000).for_each(|page| iotlb.look_up(page));
            assert_eq!(iotlb.verdicts.hits, hits, "{entries} entries");
        }
    }
}
