//! One builder for every format: map, unmap, split, and the tables that takes.
//!
//! The table may be in use by hardware at any moment, so every change is one compare-exchange, a new table is
//! filled before an entry leads to it, and a removed one is given back after no entry does. One [`Editor`] at a time
//! may change a table; what else changes entries meanwhile is hardware that sets flags.
//!
//! Nothing here invalidates caches. After an unmap the caller invalidates the range, walk caches included
//! where [`Unmapped::tables_freed`] says so, and an implementation of [`TableAlloc::free`] keeps the memory aside
//! until then.

use crate::format::{Attrs, Entry, Format};
use crate::walk::UPDATE_ATTEMPTS;
use crate::{Access, AccessKind, Gpa, Iova, IovaRange, NotMemory, TableAlloc, TableMem};

/// How an [`Editor`] behaves where there is a choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EditOptions {
    /// Mark contiguous groups where the mapping has room for them (formats without groups: no effect).
    pub contiguous: bool,
    /// Split leaves and contiguous groups of which only a part is unmapped; otherwise that is
    /// [`EditError::WouldSplit`]. A split replaces a valid entry by another valid one of a different size: on Arm an
    /// SMMU needs IDR3.BBML for that, or the caller stops all accesses meanwhile.
    pub split: bool,
    /// Leave tables in place that became empty but that the unmapped range does not cover: cheaper where
    /// mappings come and go.
    pub keep_tables: bool,
}

/// Why a table was not changed as asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EditError {
    /// An address or a length is not a multiple of the smallest page.
    #[error("not aligned to the smallest page")]
    Unaligned,
    /// The range is not wholly inside what the table translates.
    #[error("range outside what the table translates")]
    InputRange,
    /// Some output address is wider than the configuration allows.
    #[error("output addresses too wide")]
    OutputRange,
    /// The format cannot express the attributes.
    #[error("attributes the format cannot express")]
    Attrs,
    /// Something is mapped there already.
    #[error("already mapped")]
    Exists,
    /// Only a part of a leaf would be unmapped.
    #[error("only part of a leaf or contiguous group")]
    WouldSplit,
    /// An entry that must lead to a table is malformed.
    #[error("malformed entry")]
    Malformed,
    /// No memory for another table.
    #[error("no memory for a table")]
    NoTable,
    /// An entry was changed by somebody else.
    #[error("entry changed by somebody else")]
    Raced,
    /// A table is not in memory.
    #[error(transparent)]
    NotMemory(#[from] NotMemory),
}

/// An operation that stopped on its way. The first [`done`](Self::done) bytes of the range are as asked, the others
/// as they were (though perhaps in smaller pages), and nothing is in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{cause} after {done:#x} bytes")]
pub struct Partial {
    /// Bytes, from the start of the range.
    pub done: u64,
    /// What stopped it.
    #[source]
    pub cause: EditError,
}

/// What an unmap did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unmapped {
    /// Bytes that were mapped and no longer are.
    pub bytes: u64,
    /// Tables were given back: walk caches hold stale entries, so an invalidation of leaves alone is not enough.
    pub tables_freed: bool,
}

/// Changes one table. See the [module](self) for what that asks of the caller.
#[derive(Debug)]
pub struct Editor<'a, F, T> {
    format: F,
    memory: &'a mut T,
    options: EditOptions,
}

impl<'a, F: Format, T: TableMem + TableAlloc> Editor<'a, F, T> {
    /// An editor of the table below `format`'s root, which the caller has allocated
    /// ([`Format::table_lg2`] of the top level).
    pub fn new(format: F, memory: &'a mut T, options: EditOptions) -> Self {
        Self { format, memory, options }
    }

    /// Maps `range` to the addresses from `output` on, with the largest pages that fit.
    ///
    /// # Errors
    /// [`EditError::Exists`] at the first page that is mapped already; otherwise as [`EditError`] says.
    pub fn map(&mut self, range: IovaRange, output: Gpa, attrs: Attrs) -> Result<(), Partial> {
        let refuse = |cause| Partial { done: 0, cause };
        let (first, last) = self.indices(range).map_err(refuse)?;
        let length_minus_one = last - first;
        if output.0 & low_mask(self.format.entry_lg2(0)) != 0 {
            return Err(refuse(EditError::Unaligned));
        }
        let output_last = output.checked_add(length_minus_one).ok_or(refuse(EditError::OutputRange))?;
        if output_last.0 > low_mask(self.format.output_lg2()) {
            return Err(refuse(EditError::OutputRange));
        }
        let mut job = MapJob { next: first, last, output: output.0, attrs, sizes: self.format.page_sizes() };
        let (root, top) = (self.format.root(), self.format.top_level());
        self.map_table(root, top, &mut job).map_err(|cause| Partial { done: job.next - first, cause })
    }

    /// Unmaps whatever is mapped in `range`; gaps are no error.
    ///
    /// # Errors
    /// [`EditError::WouldSplit`] unless [`EditOptions::split`]; otherwise as [`EditError`] says.
    pub fn unmap(&mut self, range: IovaRange) -> Result<Unmapped, Partial> {
        let (first, last) = self.indices(range).map_err(|cause| Partial { done: 0, cause })?;
        self.unmap_indices(first, last)
    }

    /// Unmaps everything and gives back every table but the root.
    ///
    /// # Errors
    /// As [`unmap`](Self::unmap).
    pub fn clear(&mut self) -> Result<Unmapped, Partial> {
        self.unmap_indices(0, low_mask(self.format.input_lg2()))
    }

    fn unmap_indices(&mut self, first: u64, last: u64) -> Result<Unmapped, Partial> {
        let mut job = UnmapJob { first, next: first, last, unmapped: Unmapped::default() };
        let (root, top) = (self.format.root(), self.format.top_level());
        match self.unmap_table(root, top, &mut job) {
            Ok(()) => Ok(job.unmapped),
            Err(cause) => Err(Partial { done: job.next - first, cause }),
        }
    }

    /// First and last input index of a range.
    fn indices(&self, range: IovaRange) -> Result<(u64, u64), EditError> {
        let page = low_mask(self.format.entry_lg2(0));
        if range.start().0 & page != 0 || range.last().0 & page != page {
            return Err(EditError::Unaligned);
        }
        let index = |iova: Iova| {
            let access = Access { kind: AccessKind::Read, privileged: true };
            self.format.admit(iova, access).map_err(|_| EditError::InputRange)
        };
        let (first, last) = (index(range.start())?, index(range.last())?);
        // A range may not reach over the hole between the halves of a canonical address space.
        if last.checked_sub(first) != Some(range.length_minus_one()) {
            return Err(EditError::InputRange);
        }
        Ok((first, last))
    }

    /// Maps the part of `job` that lies in `table`. Goes down one level at each call.
    fn map_table(&mut self, table: Gpa, level: u8, job: &mut MapJob) -> Result<(), EditError> {
        let entry_lg2 = self.format.entry_lg2(level);
        let stop = job.last.min(self.table_last(level, job.next));
        while job.next <= stop {
            let best = best_page_lg2(job.sizes, job.next, Gpa(job.output), job.last - job.next);
            let at = self.entry_at(table, level, job.next);
            if best.is_none_or(|best| best < entry_lg2) {
                self.map_below(at, level, job)?;
            } else if let Err(cause) = self.map_leaves(table, level, job) {
                // A table in the way may have room.
                let entry = self.memory.load(at)?;
                match self.format.decode(level, entry) {
                    Entry::Table(_) if cause == EditError::Exists => self.map_below(at, level, job)?,
                    _ => return Err(cause),
                }
            }
        }
        Ok(())
    }

    /// Maps through a table of the level below, which is made where there is none.
    fn map_below(&mut self, at: Gpa, level: u8, job: &mut MapJob) -> Result<(), EditError> {
        let below = level.checked_sub(1).ok_or(EditError::Unaligned)?;
        let entry = self.memory.load(at)?;
        match self.format.decode(level, entry) {
            Entry::Table(table) => return self.map_table(table, below, job),
            Entry::Leaf(_) => return Err(EditError::Exists),
            Entry::Reserved | Entry::TooWide => return Err(EditError::Malformed),
            Entry::Empty => {}
        }
        let table = self.alloc(below)?;
        let before = *job;
        let result = self.map_table(table, below, job);
        if job.next == before.next {
            self.free(table, below);
            return result;
        }
        // What was mapped before a failure counts, so it is linked in then, too.
        match self.memory.compare_exchange(at, entry, self.format.table_entry(table)) {
            Ok(Ok(_)) => result,
            changed => {
                self.free_tree(table, below);
                *job = before;
                Err(changed.map_or_else(EditError::from, |_| EditError::Raced))
            }
        }
    }

    /// Writes one leaf, or all of a contiguous group.
    fn map_leaves(&mut self, table: Gpa, level: u8, job: &mut MapJob) -> Result<(), EditError> {
        let entry_lg2 = self.format.entry_lg2(level);
        let count = self.group(table, level, job)?;
        for number in 0..count {
            let offset = number << entry_lg2;
            let leaf = self
                .format
                .leaf_entry(level, Gpa(job.output + offset), job.attrs)
                .map(|leaf| self.format.with_contiguous(leaf, count > 1))
                .ok_or(EditError::Attrs)?;
            if let Err(cause) = self.install(self.entry_at(table, level, job.next + offset), level, leaf) {
                // Half a group would claim pages that are not there.
                for undone in 0..number {
                    let at = self.entry_at(table, level, job.next + (undone << entry_lg2));
                    let entry = self.memory.load(at)?;
                    self.replace(at, level, entry, |_| 0)?;
                }
                return Err(cause);
            }
        }
        job.next += count << entry_lg2;
        job.output += count << entry_lg2;
        Ok(())
    }

    /// How many leaves to write together: all of a contiguous group where it fits, is wanted and is empty.
    fn group(&self, table: Gpa, level: u8, job: &MapJob) -> Result<u64, EditError> {
        let count_lg2 = self.format.contiguous_lg2(level);
        let entry_lg2 = self.format.entry_lg2(level);
        let mask = low_mask(entry_lg2 + count_lg2);
        let fits = (job.next | job.output) & mask == 0 && job.last - job.next >= mask;
        if !self.options.contiguous || count_lg2 == 0 || !fits {
            return Ok(1);
        }
        for number in 0..1 << count_lg2 {
            let entry = self.memory.load(self.entry_at(table, level, job.next + (number << entry_lg2)))?;
            if self.format.decode(level, entry) != Entry::Empty {
                return Ok(1);
            }
        }
        Ok(1 << count_lg2)
    }

    /// Writes `leaf` where nothing is.
    fn install(&mut self, at: Gpa, level: u8, leaf: u64) -> Result<(), EditError> {
        let mut expected = 0;
        // The second attempt is for an entry that is empty without being zero.
        for _ in 0..2 {
            match self.memory.compare_exchange(at, expected, leaf)? {
                Ok(_) => return Ok(()),
                Err(seen) if self.format.decode(level, seen) == Entry::Empty => expected = seen,
                Err(_) => return Err(EditError::Exists),
            }
        }
        Err(EditError::Raced)
    }

    /// Unmaps the part of `job` that lies in `table`. Goes down one level at each call.
    fn unmap_table(&mut self, table: Gpa, level: u8, job: &mut UnmapJob) -> Result<(), EditError> {
        let entry_lg2 = self.format.entry_lg2(level);
        let stop = job.last.min(self.table_last(level, job.next));
        let mut splits = 0_u32;
        while job.next <= stop {
            let at = self.entry_at(table, level, job.next);
            let entry_last = job.next | low_mask(entry_lg2);
            let is_whole = job.next & low_mask(entry_lg2) == 0 && job.last >= entry_last;
            let entry = self.memory.load(at)?;
            match self.format.decode(level, entry) {
                Entry::Empty => {}
                Entry::Table(child) => {
                    let Some(below) = level.checked_sub(1) else { return Err(EditError::Malformed) };
                    self.unmap_table(child, below, job)?;
                    if (is_whole || !self.options.keep_tables) && self.is_empty(child, below, job)? {
                        self.replace(at, level, entry, |_| 0)?;
                        self.free(child, below);
                        job.unmapped.tables_freed = true;
                    }
                    // The call above has moved on already.
                    continue;
                }
                Entry::Leaf(_) if self.format.is_contiguous(entry) && !self.covers_group(level, job) => {
                    splits += 1;
                    if splits > SPLIT_ATTEMPTS {
                        return Err(EditError::Raced);
                    }
                    self.split_group(table, level, job.next)?;
                    continue;
                }
                Entry::Leaf(_) if is_whole => {
                    self.replace(at, level, entry, |_| 0)?;
                    job.unmapped.bytes += 1 << entry_lg2;
                }
                Entry::Leaf(output) => {
                    splits += 1;
                    if splits > SPLIT_ATTEMPTS {
                        return Err(EditError::Raced);
                    }
                    self.split_leaf(at, level, entry, output)?;
                    continue;
                }
                // It maps nothing; what it may have led to is not ours to guess.
                Entry::Reserved | Entry::TooWide if is_whole => {
                    self.replace(at, level, entry, |_| 0)?;
                }
                Entry::Reserved | Entry::TooWide => return Err(EditError::Malformed),
            }
            job.next = entry_last.min(stop) + 1;
        }
        Ok(())
    }

    /// Whether the range to unmap holds the whole contiguous group around its next address.
    fn covers_group(&self, level: u8, job: &UnmapJob) -> bool {
        let mask = low_mask(self.format.entry_lg2(level) + self.format.contiguous_lg2(level));
        job.first <= job.next & !mask && job.last >= job.next | mask
    }

    /// Takes the contiguous hint from every leaf of the group around `index`.
    fn split_group(&mut self, table: Gpa, level: u8, index: u64) -> Result<(), EditError> {
        if !self.options.split {
            return Err(EditError::WouldSplit);
        }
        let format = self.format;
        let entry_lg2 = format.entry_lg2(level);
        let count_lg2 = format.contiguous_lg2(level);
        let first = index & !low_mask(entry_lg2 + count_lg2);
        for number in 0..1_u64 << count_lg2 {
            let at = self.entry_at(table, level, first + (number << entry_lg2));
            let entry = self.memory.load(at)?;
            if matches!(format.decode(level, entry), Entry::Leaf(_)) && format.is_contiguous(entry) {
                self.replace(at, level, entry, |leaf| format.with_contiguous(leaf, false))?;
            }
        }
        Ok(())
    }

    /// Replaces a leaf by a table of smaller leaves that map the same. If the leaf changes meanwhile, by a flag
    /// that hardware sets, nothing is done and the caller tries again.
    fn split_leaf(&mut self, at: Gpa, level: u8, leaf: u64, output: Gpa) -> Result<(), EditError> {
        if !self.options.split {
            return Err(EditError::WouldSplit);
        }
        let below = level.checked_sub(1).ok_or(EditError::Unaligned)?;
        let size_lg2 = self.format.entry_lg2(below);
        let table = self.alloc(below)?;
        for number in 0..1_u64 << self.format.stride_lg2() {
            let part = self.format.relevel(leaf, level, below, Gpa(output.0 + (number << size_lg2)));
            if let Err(cause) = self.install(Gpa(table.0 | number << 3), below, part) {
                self.free(table, below);
                return Err(cause);
            }
        }
        match self.memory.compare_exchange(at, leaf, self.format.table_entry(table)) {
            Ok(Ok(_)) => Ok(()),
            changed => {
                self.free(table, below);
                changed.map(|_| ()).map_err(EditError::from)
            }
        }
    }

    /// Replaces an entry, again where hardware has meanwhile set flags in it.
    fn replace(&mut self, at: Gpa, level: u8, entry: u64, new: impl Fn(u64) -> u64) -> Result<(), EditError> {
        let meaning = self.format.decode(level, entry);
        let mut expected = entry;
        for _ in 0..UPDATE_ATTEMPTS {
            match self.memory.compare_exchange(at, expected, new(expected))? {
                Ok(_) => return Ok(()),
                Err(seen) if self.format.decode(level, seen) == meaning => expected = seen,
                Err(_) => return Err(EditError::Raced),
            }
        }
        Err(EditError::Raced)
    }

    /// Whether a table that was just worked on is empty. Neighbours of what was unmapped are looked at first: where
    /// mappings are dense, they settle it.
    fn is_empty(&self, table: Gpa, level: u8, job: &UnmapJob) -> Result<bool, EditError> {
        let mask = low_mask(self.format.table_lg2(level) - 3);
        let before = self.format.index(level, job.first).wrapping_sub(1);
        let after = self.format.index(level, job.next);
        for number in core::iter::once(before).chain(after..=after + mask) {
            let entry = self.memory.load(Gpa(table.0 | (number & mask) << 3))?;
            if self.format.decode(level, entry) != Entry::Empty {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Gives back a table that nothing leads to, with all below it.
    fn free_tree(&mut self, table: Gpa, level: u8) {
        if let Some(below) = level.checked_sub(1) {
            for number in 0..1_u64 << (self.format.table_lg2(level) - 3) {
                let Ok(entry) = self.memory.load(Gpa(table.0 | number << 3)) else { continue };
                if let Entry::Table(child) = self.format.decode(level, entry) {
                    self.free_tree(child, below);
                }
            }
        }
        self.free(table, level);
    }

    fn alloc(&mut self, level: u8) -> Result<Gpa, EditError> {
        self.memory.alloc(self.format.table_lg2(level)).ok_or(EditError::NoTable)
    }

    fn free(&mut self, table: Gpa, level: u8) {
        self.memory.free(table, self.format.table_lg2(level));
    }

    #[inline]
    fn entry_at(&self, table: Gpa, level: u8, index: u64) -> Gpa {
        Gpa(table.0 | self.format.index(level, index) << 3)
    }

    /// The last input index that the table around `index` translates.
    #[inline]
    fn table_last(&self, level: u8, index: u64) -> u64 {
        index | low_mask(self.format.entry_lg2(level) + self.format.stride_lg2())
    }
}

/// log2 of the largest page that can begin at `index` and lead to `output`, with `length_minus_one` more bytes to
/// map. `sizes` has one bit for each page size, as [`Format::page_sizes`]; `None` where none fits.
#[inline]
pub fn best_page_lg2(sizes: u64, index: u64, output: Gpa, length_minus_one: u64) -> Option<u8> {
    let aligned = (index | output.0).trailing_zeros().min(63);
    let long = length_minus_one.checked_add(1).map_or(63, u64::ilog2);
    let fitting = sizes & u64::MAX >> (63 - aligned.min(long));
    u8::try_from(fitting.checked_ilog2()?).ok()
}

/// How often one table's leaves are split in one unmap. Only the first and the last can need it, and their groups;
/// the rest is for leaves in which hardware sets flags meanwhile.
const SPLIT_ATTEMPTS: u32 = 4 + UPDATE_ATTEMPTS;

#[derive(Clone, Copy)]
struct MapJob {
    /// The next input index to map.
    next: u64,
    last: u64,
    output: u64,
    attrs: Attrs,
    sizes: u64,
}

struct UnmapJob {
    first: u64,
    /// The next input index to look at.
    next: u64,
    last: u64,
    unmapped: Unmapped,
}

#[inline]
const fn low_mask(lg2: u8) -> u64 {
    (1 << lg2) - 1
}

#[cfg(test)]
mod tests;
