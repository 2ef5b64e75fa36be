//! How the tables of an address space are changed, and what becomes of those that are empty.

use pgtable_formats::edit::{EditError, EditOptions, Editor, Partial, Unmapped};
use pgtable_formats::format::{Attrs, Format};
use pgtable_formats::visit::{Leaf, leaf_at};
use pgtable_formats::{Access, AccessKind, Gpa, Iova, IovaRange, TableAlloc, TableMem};

use super::TableError;
use super::lent::Lent;
use super::root::{INPUT_BITS, MIN_ALLOC_LG2, Table};
use super::space::{AddressSpace, Stale};
use crate::Driver;
use crate::hal::{Platform, Transport};

/// What is to be done to a table.
#[derive(Clone, Copy, Debug)]
enum Change {
    Map { range: IovaRange, target: Gpa, attrs: Attrs },
    Unmap(IovaRange),
    Clear,
}

/// What an Arm address space translates: the lower half, the only one that is used.
const ARM: &[IovaRange] = &[first(1 << INPUT_BITS)];
/// What x86 tables translate: both halves of a canonical address space.
const X86: &[IovaRange] = &[first(1 << (INPUT_BITS - 1)), last(1 << (INPUT_BITS - 1))];

impl AddressSpace {
    /// Gives back the tables in which nothing is mapped any more, all with one invalidation, and tells how many: what a
    /// kernel does when memory gets scarce. Only [`EmptyTables::Keep`](super::EmptyTables::Keep) leaves any. Looks at
    /// every mapping.
    ///
    /// # Errors
    /// [`TableError::Edit`], [`TableError::Request`]: tables that were taken out are given back by the next
    /// invalidation that succeeds.
    pub fn trim<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
    ) -> Result<usize, TableError> {
        let before = self.retired.len();
        let removed = self.table.all().iter().try_for_each(|range| self.remove_empty(driver, *range));
        let tables = self.retired.len() - before;
        if tables != 0 {
            self.add_stale(Stale { range: IovaRange::ALL, leaf: false });
        }
        self.synchronize(driver)?;
        removed?;
        self.has_empty = false;
        Ok(tables)
    }

    /// Gives the memory and the tag back.
    ///
    /// # Errors
    /// The space itself with [`TableError::InUse`] where a PASID still uses it, or with what else is in the way.
    #[expect(clippy::result_large_err, reason = "the space must not be lost")]
    pub fn release<P: Platform, T: Transport>(
        mut self,
        driver: &mut Driver<P, T>,
    ) -> Result<(), (Self, TableError)> {
        if self.has_users() {
            return Err((self, TableError::InUse));
        }
        if let Err(Partial { cause, .. }) = self.change(driver, Change::Clear) {
            return Err((self, cause.into()));
        }
        let (_, alloc) = driver.platform.parts();
        self.retired.release_from(0, alloc);
        alloc.free(self.root(), self.table.root_lg2().max(MIN_ALLOC_LG2));
        if let Some(tag) = self.tag() {
            driver.asids.release(tag.into());
        }
        Ok(())
    }

    /// Maps, or leaves nothing of `range` behind.
    pub(super) fn insert<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        range: IovaRange,
        target: Gpa,
        attrs: Attrs,
    ) -> Result<(), TableError> {
        self.make_way(driver, range)?;
        match self.try_insert(driver, range, target, attrs) {
            Err(TableError::Edit(EditError::NoTable)) if self.has_empty => {
                self.trim(driver)?;
                self.try_insert(driver, range, target, attrs)
            }
            inserted => inserted,
        }
    }

    /// Unmaps, and notes what is stale even if that stopped on the way.
    pub(super) fn remove<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        range: IovaRange,
    ) -> Result<(), TableError> {
        let unmapped = self.change(driver, Change::Unmap(range));
        if let Err(Partial { cause: cause @ (EditError::Unaligned | EditError::InputRange), done: 0 }) =
            unmapped
        {
            return Err(cause.into());
        }
        let leaf = unmapped.is_ok_and(|unmapped| !unmapped.tables_freed);
        self.add_stale(Stale { range, leaf });
        self.has_empty |= self.edit.keep_tables;
        Ok(unmapped.map(|_| ()).map_err(|Partial { cause, .. }| cause)?)
    }

    /// Unmaps everything but the windows.
    pub(super) fn remove_all<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
    ) -> Result<(), TableError> {
        let parts = self.table.all().iter().flat_map(|range| self.windows.outside(*range));
        let parts: alloc::vec::Vec<IovaRange> = parts.collect();
        let removed =
            parts.into_iter().try_for_each(|part| self.change(driver, Change::Unmap(part)).map(|_| ()));
        self.add_stale(Stale { range: IovaRange::ALL, leaf: false });
        Ok(removed.map_err(|Partial { cause, .. }| cause)?)
    }

    fn try_insert<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        range: IovaRange,
        target: Gpa,
        attrs: Attrs,
    ) -> Result<(), TableError> {
        let attrs = Attrs { global: false, ..attrs };
        let before = self.retired.len();
        let Err(Partial { done, cause }) = self.change(driver, Change::Map { range, target, attrs }) else {
            return Ok(());
        };
        match IovaRange::from_length(range.start(), done) {
            // The device may have seen the part that was there for a moment.
            Some(part) => self.unmap(driver, part)?,
            // Tables that were to be new were never seen by anybody.
            None => self.retired.release_from(before, driver.platform.parts().1),
        }
        Err(cause.into())
    }

    /// Removes empty tables from where a page larger than the smallest may go, and lets the hardware forget them
    /// before that is written (on Arm: break-before-make). Without, the mapping would be made of the smallest pages.
    fn make_way<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        range: IovaRange,
    ) -> Result<(), TableError> {
        if !self.has_empty || range.length_minus_one() < self.table.large_page() - 1 {
            return Ok(());
        }
        if self.table.first_leaf(driver.platform.memory(), range)?.is_some() {
            return Ok(());
        }
        let before = self.retired.len();
        let removed = self.change(driver, Change::Unmap(range));
        if self.retired.len() != before {
            self.add_stale(Stale { range, leaf: false });
            self.synchronize(driver)?;
        }
        Ok(removed.map(|_| ()).map_err(|Partial { cause, .. }| cause)?)
    }

    /// Removes the tables that lie wholly between two mappings of `range`.
    fn remove_empty<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        range: IovaRange,
    ) -> Result<(), EditError> {
        let mut rest = Some(range);
        while let Some(range) = rest {
            let leaf = self.table.first_leaf(driver.platform.memory(), range)?.map(|leaf| covered(&leaf));
            let gap = match leaf {
                None => Some(range),
                Some(leaf) => range_until(range.start(), leaf.start().0.checked_sub(1)),
            };
            if let Some(gap) = gap {
                self.change(driver, Change::Unmap(gap)).map_err(|Partial { cause, .. }| cause)?;
            }
            rest = leaf.and_then(|leaf| IovaRange::new(leaf.last().checked_add(1)?, range.last()));
        }
        Ok(())
    }

    fn change<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        change: Change,
    ) -> Result<Unmapped, Partial> {
        let memory = &mut Lent::new(&mut driver.platform, &mut self.retired);
        match &self.table {
            Table::Smmuv3 { format, .. } => apply(*format, memory, self.edit, change),
            Table::Vtd(table) => apply(*table.format(), memory, self.edit, change),
        }
    }
}

impl Table {
    /// All that it translates.
    const fn all(&self) -> &'static [IovaRange] {
        match self {
            Self::Smmuv3 { .. } => ARM,
            Self::Vtd(_) => X86,
        }
    }

    /// Bytes of the smallest page but one.
    fn large_page(&self) -> u64 {
        match self {
            Self::Smmuv3 { format, .. } => 1 << format.entry_lg2(1),
            Self::Vtd(table) => 1 << table.format().entry_lg2(1),
        }
    }

    fn first_leaf<M: TableMem>(&self, memory: &M, range: IovaRange) -> Result<Option<Leaf>, EditError> {
        match self {
            Self::Smmuv3 { format, .. } => first_leaf(format, memory, range),
            Self::Vtd(table) => first_leaf(table.format(), memory, range),
        }
    }
}

/// The first leaf that covers an address of `range`.
///
/// # Errors
/// [`EditError::InputRange`] where the tables do not translate `range`; [`EditError::NotMemory`].
pub(super) fn first_leaf<F: Format, M: TableMem>(
    format: &F,
    memory: &M,
    range: IovaRange,
) -> Result<Option<Leaf>, EditError> {
    let mut next = Some(range.start());
    while let Some(at) = next.filter(|at| *at <= range.last()) {
        if let Some(leaf) = leaf_at(format, memory, at)? {
            return Ok(Some(leaf));
        }
        let entry_lg2 = gap_lg2(format, memory, at)?;
        next = Iova(at.0 | ((1 << entry_lg2) - 1)).checked_add(1);
    }
    Ok(None)
}

/// The addresses that a leaf covers.
pub(super) fn covered(leaf: &Leaf) -> IovaRange {
    let last = Iova(leaf.iova.0 | ((1 << leaf.size_lg2) - 1));
    IovaRange::new(leaf.iova, last).unwrap_or(IovaRange::ALL)
}

/// log2 of what the entry covers that ends the walk of `at`, which meets no leaf: a gap may be large.
fn gap_lg2<F: Format, M: TableMem>(format: &F, memory: &M, at: Iova) -> Result<u8, EditError> {
    let access = Access { kind: AccessKind::Read, privileged: true };
    let index = format.admit(at, access).map_err(|_| EditError::InputRange)?;
    let (mut table, mut level) = (format.root(), format.top_level());
    loop {
        let entry = memory.load(Gpa(table.0 | format.index(level, index) << 3))?;
        match (format.decode(level, entry), level.checked_sub(1)) {
            (pgtable_formats::format::Entry::Table(next), Some(below)) => (table, level) = (next, below),
            _ => return Ok(format.entry_lg2(level)),
        }
    }
}

fn apply<F: Format, M: TableMem + TableAlloc>(
    format: F,
    memory: &mut M,
    options: EditOptions,
    change: Change,
) -> Result<Unmapped, Partial> {
    let mut editor = Editor::new(format, memory, options);
    match change {
        Change::Map { range, target, attrs } => {
            editor.map(range, target, attrs).map(|()| Unmapped::default())
        }
        Change::Unmap(range) => editor.unmap(range),
        Change::Clear => editor.clear(),
    }
}

fn range_until(first: Iova, last: Option<u64>) -> Option<IovaRange> {
    IovaRange::new(first, Iova(last?))
}

/// The first `length` addresses.
const fn first(length: u64) -> IovaRange {
    match IovaRange::from_length(Iova(0), length) {
        Some(range) => range,
        None => IovaRange::ALL,
    }
}

/// The last `length` addresses.
const fn last(length: u64) -> IovaRange {
    match IovaRange::from_length(Iova(0_u64.wrapping_sub(length)), length) {
        Some(range) => range,
        None => IovaRange::ALL,
    }
}
