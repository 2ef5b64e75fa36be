//! What a table maps, without asking for anything to be translated.

use crate::format::{Entry, Format, Path};
use crate::walk::Step;
use crate::{Access, AccessKind, Gpa, Iova, NotMemory, TableMem};

/// A leaf of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// First input address.
    pub iova: Iova,
    /// First output address.
    pub output: Gpa,
    /// log2 of what it covers, in bytes.
    pub size_lg2: u8,
    /// Where the entry lies.
    pub at: Gpa,
    /// Its level.
    pub level: u8,
    /// The entry, as loaded.
    pub entry: u64,
    /// What the tables above say about permissions.
    pub path: Path,
}

/// A table has more entries than the caller was ready to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("more table entries than may be visited")]
pub struct OutOfBudget;

/// The leaf that `iova` meets, whatever it permits; `None` where there is none or an entry is malformed.
///
/// # Errors
/// [`NotMemory`] where a table is not in memory.
pub fn leaf_at<F: Format, M: TableMem + ?Sized>(
    format: &F,
    mem: &M,
    iova: Iova,
) -> Result<Option<Leaf>, NotMemory> {
    let Ok(index) = format.admit(iova, Access { kind: AccessKind::Read, privileged: true }) else {
        return Ok(None);
    };
    let Step { mut table, mut level, mut path } = Step::root(format);
    loop {
        let at = Gpa(table.0 | format.index(level, index) << 3);
        let entry = mem.load(at)?;
        match (format.decode(level, entry), level.checked_sub(1)) {
            (Entry::Table(next), Some(below)) => {
                path = format.descend(path, entry);
                (table, level) = (next, below);
            }
            (Entry::Leaf(output), _) => {
                let size_lg2 = format.entry_lg2(level);
                let iova = format.iova(index >> size_lg2 << size_lg2);
                return Ok(Some(Leaf { iova, output, size_lg2, at, level, entry, path }));
            }
            _ => return Ok(None),
        }
    }
}

/// Visits every leaf in the order of input addresses. What is malformed, or cannot be read, maps nothing.
///
/// # Errors
/// [`OutOfBudget`] once `budget` entries were read: a stranger's table of a few pages can have any number of leaves.
pub fn leaves<F: Format, M: TableMem + ?Sized>(
    format: &F,
    mem: &M,
    mut budget: u64,
    mut visit: impl FnMut(Leaf),
) -> Result<(), OutOfBudget> {
    visit_table(format, mem, Step::root(format), 0, &mut budget, &mut visit)
}

/// Goes one level down at each call, so it is at most five calls deep.
fn visit_table<F: Format, M: TableMem + ?Sized>(
    format: &F,
    mem: &M,
    step: Step,
    first: u64,
    budget: &mut u64,
    visit: &mut impl FnMut(Leaf),
) -> Result<(), OutOfBudget> {
    let Step { table, level, path } = step;
    let size_lg2 = format.entry_lg2(level);
    for number in 0..1_u64 << (format.table_lg2(level) - 3) {
        *budget = budget.checked_sub(1).ok_or(OutOfBudget)?;
        let at = Gpa(table.0 | number << 3);
        let Ok(entry) = mem.load(at) else { continue };
        let index = first | number << size_lg2;
        match (format.decode(level, entry), level.checked_sub(1)) {
            (Entry::Table(table), Some(level)) => {
                let step = Step { table, level, path: format.descend(path, entry) };
                visit_table(format, mem, step, index, budget, visit)?;
            }
            (Entry::Leaf(output), _) => {
                visit(Leaf { iova: format.iova(index), output, size_lg2, at, level, entry, path });
            }
            _ => {}
        }
    }
    Ok(())
}
