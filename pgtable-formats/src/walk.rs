//! One walker for every format.
//!
//! It takes nothing from a table on trust: each entry is one load, the number of levels comes from the
//! configuration, flags are updated by compare-exchange on the loaded value, and the level falls with each step.

use crate::format::{Denied, Entry, Format, Path};
use crate::{Access, Gpa, Iova, TableMem, Translation};

/// Why a walk failed, in the order in which the formats detect it; the same level finds the upper ones first.
/// Contexts turn it into an event or a fault reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum WalkFault {
    /// The address is outside what the tables translate: not canonical, beyond the input size, or closed to
    /// unprivileged accesses as a whole (Arm E0PD).
    #[error("address outside the table's input range")]
    InputRange,
    /// An entry could not be read.
    #[error("level {level} table not in memory")]
    TableAccess {
        /// Level of the table.
        level: u8,
    },
    /// The entry is not present.
    #[error("level {level} entry not present")]
    NotPresent {
        /// Level of the entry.
        level: u8,
    },
    /// The entry is present and malformed.
    #[error("level {level} entry malformed")]
    Reserved {
        /// Level of the entry.
        level: u8,
    },
    /// The entry leads to an address that is too wide.
    #[error("level {level} entry leads to an address that is too wide")]
    AddressSize {
        /// Level of the entry.
        level: u8,
    },
    /// The leaf's access flag is clear and software has to set it (Arm).
    #[error("level {level} leaf has its access flag clear")]
    AccessFlag {
        /// Level of the leaf.
        level: u8,
    },
    /// The leaf and the tables above it do not allow the access.
    #[error("level {level} leaf does not allow the access: {denied:?}")]
    Permission {
        /// Level of the leaf.
        level: u8,
        /// What it lacks.
        denied: Denied,
    },
    /// The output is an address that no access may have (VT-d: the interrupt range).
    #[error("level {level} leaf leads to a forbidden output")]
    Output {
        /// Level of the leaf.
        level: u8,
    },
    /// A flag could not be set: the table is not writable, or did not stand still.
    #[error("level {level} entry could not be updated")]
    EntryUpdate {
        /// Level of the entry.
        level: u8,
    },
}

/// A table that a walk has reached: enough to resume from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Step {
    /// The table.
    pub table: Gpa,
    /// Its level.
    pub level: u8,
    /// What the entries that led to it say about permissions.
    pub path: Path,
}

impl Step {
    /// Where a walk begins.
    #[inline]
    pub fn root<F: Format>(format: &F) -> Self {
        Self { table: format.root(), level: format.top_level(), path: format.path() }
    }
}

/// How often a walk tries to set flags in entries that change under it, before it gives up.
pub const UPDATE_ATTEMPTS: u32 = 64;

/// Translates `iova`, from the root down.
///
/// The answer's `iova` has the canonical form of [`Format::iova`]. Contiguous groups are not merged: the hint
/// changes nothing, as the architecture permits.
///
/// # Errors
/// The first failure in the architecture's order.
#[inline]
pub fn walk<F: Format, M: TableMem + ?Sized>(
    format: &F,
    mem: &M,
    iova: Iova,
    access: Access,
) -> Result<Translation, WalkFault> {
    walk_from(format, mem, Step::root(format), iova, access, |_| ())
}

/// Translates `iova` from a table that an earlier walk *for the same part of the address space* has reached;
/// `reached` is told of each further table, so that a walk cache can keep it. A walk from [`Step::root`] is whole.
///
/// # Errors
/// As [`walk`].
#[inline(always)]
pub fn walk_from<F: Format, M: TableMem + ?Sized>(
    format: &F,
    mem: &M,
    from: Step,
    iova: Iova,
    access: Access,
    mut reached: impl FnMut(Step),
) -> Result<Translation, WalkFault> {
    let mut from = from;
    for _ in 0..=UPDATE_ATTEMPTS {
        match pass(format, mem, from, iova, access, &mut reached) {
            Ok(translation) => return Ok(translation),
            Err(Stop::Fault(fault)) => return Err(fault),
            Err(Stop::Changed(step)) => from = step,
        }
    }
    Err(WalkFault::EntryUpdate { level: from.level })
}

/// Why one pass over the tables did not arrive.
enum Stop {
    Fault(WalkFault),
    /// An entry of this table has changed between its load and the update of its flags: it must be judged anew.
    Changed(Step),
}

/// One pass downwards, without a way back: loops in loops would cost every walk what only changing tables need.
// Inlined, its answer is written once: copies of it cost as much as a level.
#[inline(always)]
fn pass<F: Format, M: TableMem + ?Sized>(
    format: &F,
    mem: &M,
    from: Step,
    iova: Iova,
    access: Access,
    reached: &mut impl FnMut(Step),
) -> Result<Translation, Stop> {
    // A copy, which stays in registers whatever is stored meanwhile.
    let format = *format;
    let index = format.admit(iova, access).map_err(Stop::Fault)?;
    let Step { mut table, mut level, mut path } = from;
    // Where in a table the entry is, as `Format::index`, in bytes: kept along, because it is most of a step's work.
    let stride_lg2 = format.stride_lg2();
    let offsets = ((1 << stride_lg2) - 1) << 3;
    let mut shift = format.entry_lg2(level) - 3;
    let (at, entry, output) = loop {
        let at = Gpa(table.0 | index >> shift & offsets);
        let Ok(entry) = mem.load(at) else { return Err(Stop::Fault(WalkFault::TableAccess { level })) };
        let next = match format.decode(level, entry) {
            Entry::Table(next) => next,
            Entry::Leaf(output) => break (at, entry, output),
            Entry::Empty => return Err(Stop::Fault(WalkFault::NotPresent { level })),
            Entry::Reserved => return Err(Stop::Fault(WalkFault::Reserved { level })),
            Entry::TooWide => return Err(Stop::Fault(WalkFault::AddressSize { level })),
        };
        let marked = format.mark_table(entry);
        if marked != entry {
            update(mem, at, entry, marked, Step { table, level, path })?;
        }
        let Some(below) = level.checked_sub(1) else {
            return Err(Stop::Fault(WalkFault::Reserved { level }));
        };
        (table, level, path) = (next, below, format.descend(path, entry));
        shift -= stride_lg2;
        reached(Step { table, level, path });
    };
    let grant = format.grant(level, entry, path, access).map_err(Stop::Fault)?;
    let size_lg2 = format.entry_lg2(level);
    let translation = Translation {
        iova: format.iova(index >> size_lg2 << size_lg2),
        output,
        size_lg2,
        perms: grant.perms,
        global: grant.global,
    };
    let Some(translation) = format.narrow(translation, iova) else {
        return Err(Stop::Fault(WalkFault::Output { level }));
    };
    if grant.entry != entry {
        update(mem, at, entry, grant.entry, Step { table, level, path })?;
    }
    Ok(translation)
}

/// Stores flags into an entry of the table `step`.
#[cold]
fn update<M: TableMem + ?Sized>(mem: &M, at: Gpa, entry: u64, marked: u64, step: Step) -> Result<(), Stop> {
    match mem.compare_exchange(at, entry, marked) {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(_)) => Err(Stop::Changed(step)),
        Err(_) => Err(Stop::Fault(WalkFault::EntryUpdate { level: step.level })),
    }
}

#[cfg(test)]
mod tests;
