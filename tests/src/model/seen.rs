//! What the accesses of one endpoint may have left in caches, and what an invalidation takes out of them.
//!
//! An *entry* is the PASID whose descriptor, PASID entry or page table served an access.

use super::words::{Context, LastTable, Leaf};

/// What may be cached.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Contexts, by the PASID of the access.
    contexts: Vec<(Option<u32>, Option<u32>, Context)>,
    /// Tables of pages, by entry, ASID and the 2 MiB that they translate.
    tables: Vec<(u32, Option<u16>, u64, LastTable)>,
    /// Translations, by entry and ASID.
    leaves: Vec<(u32, Option<u16>, Leaf)>,
}

/// What an INVALIDATE is about, for one endpoint.
#[derive(Clone, Debug)]
pub struct Drop {
    /// `None`: all.
    pub entries: Option<Vec<u32>>,
    /// Entries made from the PASID table.
    pub contexts: bool,
    /// Also what was not made from leaves.
    pub tables: bool,
    /// Only what touches this.
    pub range: Option<(u64, u64)>,
    /// Only what has this ASID.
    pub asid: Option<u16>,
    /// Of every entry that has it.
    pub is_by_tag: bool,
    /// Global translations of every entry, too.
    pub global: bool,
}

impl Seen {
    /// Nothing may be cached any more.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Nothing of one entry may be cached any more.
    pub fn forget_entry(&mut self, entry: u32) {
        self.contexts.retain(|(_, of, _)| *of != Some(entry));
        self.tables.retain(|(of, ..)| *of != entry);
        self.leaves.retain(|(of, ..)| *of != entry);
    }

    /// Does an invalidation. Only what it names *must* go; a device may drop more.
    pub fn invalidate(&mut self, drop: &Drop) {
        let is_named = |entry: u32| drop.entries.as_ref().is_none_or(|entries| entries.contains(&entry));
        if drop.contexts {
            // With them goes what was translated through them, whatever tag and range say.
            self.contexts.retain(|(_, entry, _)| !entry.is_none_or(is_named));
            self.tables.retain(|(entry, ..)| !is_named(*entry));
            self.leaves.retain(|(entry, ..)| !is_named(*entry));
        }
        let is_one = |entry: u32, asid: Option<u16>| match drop.asid {
            Some(tag) => asid == Some(tag) && (drop.is_by_tag || is_named(entry)),
            None => is_named(entry),
        };
        let touches =
            |first: u64, last: u64| drop.range.is_none_or(|(start, end)| start <= last && first <= end);
        if drop.tables {
            self.tables.retain(|(entry, asid, region, _)| {
                !(is_one(*entry, *asid) && touches(region << 21, region << 21 | 0x1f_ffff))
            });
        }
        self.leaves.retain(|(entry, asid, leaf)| {
            let is_meant = match leaf.global {
                true => drop.global,
                false => is_one(*entry, *asid),
            };
            !(is_meant && touches(leaf.iova, leaf.last()))
        });
    }

    /// Contexts that may be cached for accesses with `pasid`.
    pub fn contexts(&self, pasid: Option<u32>) -> impl Iterator<Item = (Option<u32>, Context)> + '_ {
        self.contexts.iter().filter(move |(of, ..)| *of == pasid).map(|&(_, entry, context)| (entry, context))
    }

    /// Tables of pages that may be cached for an address.
    pub fn tables(&self, entry: u32, asid: Option<u16>, iova: u64) -> impl Iterator<Item = LastTable> + '_ {
        let wanted = move |found: &(u32, Option<u16>, u64, LastTable)| {
            (found.0, found.1, found.2) == (entry, asid, iova >> 21)
        };
        self.tables.iter().filter(move |found| wanted(found)).map(|&(.., table)| table)
    }

    /// Translations that may be cached for an address.
    pub fn leaves(&self, entry: u32, asid: Option<u16>, iova: u64) -> impl Iterator<Item = Leaf> + '_ {
        let wanted = move |found: &&(u32, Option<u16>, Leaf)| {
            (found.0, found.1) == (entry, asid) && found.2.covers(iova)
        };
        self.leaves.iter().filter(wanted).map(|&(.., leaf)| leaf)
    }

    /// A context was used.
    pub fn add_context(&mut self, pasid: Option<u32>, entry: Option<u32>, context: Context) {
        add(&mut self.contexts, (pasid, entry, context));
    }

    /// A table of pages was used.
    pub fn add_table(&mut self, entry: u32, asid: Option<u16>, iova: u64, table: LastTable) {
        add(&mut self.tables, (entry, asid, iova >> 21, table));
    }

    /// A translation was used.
    pub fn add_leaf(&mut self, entry: u32, asid: Option<u16>, leaf: Leaf) {
        add(&mut self.leaves, (entry, asid, leaf));
    }

    /// How many things may be cached.
    pub fn len(&self) -> usize {
        self.contexts.len() + self.tables.len() + self.leaves.len()
    }

    /// Whether nothing may be cached.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn add<T: PartialEq>(list: &mut Vec<T>, item: T) {
    if !list.contains(&item) {
        list.push(item);
    }
}
