//! The IOTLB: translations of guests' tables, whole leaves of any size, invalidated precisely.

use alloc::vec;
use alloc::vec::Vec;

use pgtable_formats::{Gpa, Iova, IovaRange, Perms, Translation};

use super::contexts::Tables;
use super::flush::{Reach, Selector};
use super::key::{Key, Tag};

const SETS_LG2: u32 = 10;
const SETS: usize = 1 << SETS_LG2;
const WAYS: usize = 4;
/// Translations of guests' tables that are kept.
pub const TLB_ENTRIES: usize = SETS * WAYS;

/// A range of more pages than this is searched for in every set.
const MAX_PROBES: u64 = 256;

#[derive(Clone, Copy, Debug)]
struct Entry {
    owner: Key,
    iova: u64,
    output: u64,
    tag: Tag,
    size_lg2: u8,
    perms: Perms,
    is_global: bool,
}

const EMPTY: Entry = Entry {
    owner: Key::NONE,
    iova: 0,
    output: 0,
    tag: Tag::new(None),
    size_lg2: 0,
    perms: Perms::empty(),
    is_global: false,
};

const _: () = assert!(size_of::<Entry>() == 32);

/// Set-associative; a leaf is found under its own address, so each size in use is looked up on its own.
#[derive(Debug)]
pub(super) struct Tlb {
    /// Allocated with the first translation.
    sets: Vec<[Entry; WAYS]>,
    /// How many entries are in use.
    used: usize,
    /// One bit for each size that an entry may have.
    sizes: u64,
    /// Whether an entry may be global, or was since tables are cached.
    has_globals: bool,
    /// The way that is replaced next.
    next: usize,
}

impl Tlb {
    pub(super) const fn new() -> Self {
        Self { sets: Vec::new(), used: 0, sizes: 0, has_globals: false, next: 0 }
    }

    #[inline]
    pub(super) fn lookup(&self, tables: &Tables, iova: Iova) -> Option<Translation> {
        let mut sizes = self.sizes;
        while sizes != 0 {
            let size_lg2 = sizes.trailing_zeros();
            sizes &= sizes - 1;
            let set = self.sets.get(tables.spread.slot(iova.0 >> size_lg2, SETS_LG2))?;
            for entry in set {
                if entry.owner == tables.owner
                    && entry.tag == tables.tag
                    && u32::from(entry.size_lg2) == size_lg2
                    && (entry.iova ^ iova.0) >> size_lg2 == 0
                {
                    return Some(entry.translation());
                }
            }
        }
        None
    }

    /// Keeps `translation`, in place of an older one of the same address.
    pub(super) fn fill(&mut self, tables: &Tables, translation: &Translation) {
        let Translation { iova, output, size_lg2, perms, global } = *translation;
        if self.sets.is_empty() {
            self.sets = vec![[EMPTY; WAYS]; SETS];
        }
        let Some(set) = self.sets.get_mut(tables.spread.slot(iova.0 >> size_lg2, SETS_LG2)) else { return };
        let entry = Entry {
            owner: tables.owner,
            iova: iova.0,
            output: output.0,
            tag: tables.tag,
            size_lg2,
            perms,
            is_global: global,
        };
        self.sizes |= 1 << size_lg2;
        self.has_globals |= global;
        let same = |old: &&mut Entry| {
            old.owner == entry.owner
                && old.tag == entry.tag
                && old.size_lg2 == size_lg2
                && old.iova == entry.iova
        };
        let place = match set.iter_mut().find(same) {
            Some(place) => Some(place),
            None => match set.iter().position(|old| old.owner == Key::NONE) {
                Some(free) => set.get_mut(free),
                None => {
                    self.next = (self.next + 1) % WAYS;
                    set.get_mut(self.next)
                }
            },
        };
        if let Some(place) = place {
            self.used += usize::from(place.owner == Key::NONE);
            *place = entry;
        }
    }

    /// Whether a global translation may be kept, here or below a cached table.
    #[inline]
    pub(super) const fn has_globals(&self) -> bool {
        self.has_globals
    }

    /// Drops what `selector` selects. `tables_left`: tables are still cached, and may lead to global leaves.
    pub(super) fn invalidate(&mut self, selector: &Selector, tables_left: bool) {
        if self.used > 0 {
            self.drop_from_sets(selector);
        }
        if self.used == 0 {
            self.sizes = 0;
            self.has_globals &= tables_left;
        }
    }

    fn drop_from_sets(&mut self, selector: &Selector) {
        let mut dropped = 0;
        match self.probe(selector) {
            Some((spread, range)) => {
                let mut sizes = self.sizes;
                while sizes != 0 {
                    let size_lg2 = sizes.trailing_zeros();
                    sizes &= sizes - 1;
                    for page in range.start().0 >> size_lg2..=range.last().0 >> size_lg2 {
                        let set = self.sets.get_mut(spread.slot(page, SETS_LG2));
                        dropped += set.map_or(0, |set| drop_selected(set, selector));
                    }
                }
            }
            None => dropped = self.sets.iter_mut().map(|set| drop_selected(set, selector)).sum(),
        }
        self.used -= dropped;
    }

    /// Where all that is selected must be, if that is in few places.
    fn probe(&self, selector: &Selector) -> Option<(Key, IovaRange)> {
        let spread = selector.spread.filter(|_| !self.has_globals)?;
        let range = selector.range?;
        let smallest = self.sizes.trailing_zeros().min(63);
        ((range.last().0 >> smallest) - (range.start().0 >> smallest) < MAX_PROBES).then_some((spread, range))
    }

    pub(super) fn clear(&mut self) {
        self.sets.fill([EMPTY; WAYS]);
        (self.used, self.sizes, self.has_globals) = (0, 0, false);
    }
}

/// Says how many these were.
fn drop_selected(set: &mut [Entry; WAYS], selector: &Selector) -> usize {
    let mut dropped = 0;
    for entry in set {
        if selector.selects(entry.owner, entry.tag, entry.reach(), entry.is_global) {
            *entry = EMPTY;
            dropped += 1;
        }
    }
    dropped
}

impl Entry {
    #[inline]
    const fn translation(&self) -> Translation {
        Translation {
            iova: Iova(self.iova),
            output: Gpa(self.output),
            size_lg2: self.size_lg2,
            perms: self.perms,
            global: self.is_global,
        }
    }

    const fn reach(&self) -> Reach {
        Reach { start: self.iova, size_lg2: self.size_lg2 }
    }
}
