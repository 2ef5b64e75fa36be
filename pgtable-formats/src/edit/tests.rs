use core::cell::RefCell;

use super::*;
use crate::leaf::{Granule, Vmsav8, Vmsav8Flags, Vmsav8Params, X86, X86Flags, X86Levels, X86Params};
use crate::suite::{self, FlatMem};
use crate::visit::{leaf_at, leaves};

/// Memory in which somebody else changes a word just before the next exchange of it.
struct Shared {
    mem: FlatMem,
    other: RefCell<Option<Change>>,
}

/// Which word, and into what.
type Change = (Gpa, fn(u64) -> u64);

impl TableMem for Shared {
    fn load(&self, at: Gpa) -> Result<u64, NotMemory> {
        self.mem.load(at)
    }

    fn compare_exchange(&self, at: Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, NotMemory> {
        let other = self.other.borrow_mut().take_if(|(place, _)| *place == at);
        if let Some((_, write)) = other {
            self.mem.store(at, write(self.mem.load(at)?))?;
        }
        self.mem.compare_exchange(at, current, new)
    }
}

impl TableAlloc for Shared {
    fn alloc(&mut self, size_lg2: u8) -> Option<Gpa> {
        self.mem.alloc(size_lg2)
    }

    fn free(&mut self, table: Gpa, size_lg2: u8) {
        self.mem.free(table, size_lg2);
    }
}

const OPTIONS: EditOptions = EditOptions { contiguous: true, split: true, keep_tables: false };

fn memory() -> FlatMem {
    FlatMem::new(Gpa(0x10_0000), 1 << 20)
}

/// One table of 4 KiB pages is the whole of it.
fn vmsav8() -> (Vmsav8, Shared) {
    let (format, mem) = suite::empty(memory(), |root| {
        let params = Vmsav8Params {
            root,
            granule: Granule::K4,
            input_lg2: 21,
            output_lg2: 40,
            wide: false,
            upper: false,
            flags: Vmsav8Flags::empty(),
        };
        Vmsav8::new(params).expect("legal")
    });
    (format, Shared { mem, other: RefCell::new(None) })
}

fn x86() -> (X86, Shared) {
    let (format, mem) = suite::empty(memory(), |root| {
        let flags = X86Flags::empty();
        X86::new(X86Params { root, levels: X86Levels::Four, output_lg2: 46, flags }).expect("legal")
    });
    (format, Shared { mem, other: RefCell::new(None) })
}

fn range(start: u64, length: u64) -> IovaRange {
    IovaRange::from_length(Iova(start), length).expect("a range")
}

fn count<F: Format>(format: &F, mem: &Shared) -> usize {
    let mut count = 0;
    leaves(format, mem, u64::MAX, |_| count += 1).expect("no budget");
    count
}

#[test]
fn a_group_that_cannot_be_completed_is_taken_back() {
    let (format, mut mem) = vmsav8();
    let taken = Gpa(format.root().0 + 0x19 * 8);
    mem.other = RefCell::new(Some((taken, |_| 0x7f43)));
    let stop = Editor::new(format, &mut mem, OPTIONS).map(range(0xf000, 0x1_2000), Gpa(0xf000), Attrs::READ);
    assert_eq!(stop, Err(Partial { done: 0x1000, cause: EditError::Exists }));
    assert_eq!(mem.load(taken), Ok(0x7f43));
    assert_eq!(count(&format, &mem), 2, "the page before the group and the other's");
}

#[test]
fn a_table_that_cannot_be_linked_takes_its_pages_along() {
    let (format, mut mem) = x86();
    let pages = range(0x1f_f000, 0x2000);
    // The root's entry is the last that a first mapping writes.
    mem.other = RefCell::new(Some((format.root(), |_| 0xf000_0027)));
    let stop = Editor::new(format, &mut mem, OPTIONS).map(pages, Gpa(0x5000), Attrs::READ);
    assert_eq!(stop, Err(Partial { done: 0, cause: EditError::Raced }));
    assert_eq!(mem.mem.tables(), 1, "all tables but the root were given back");
    // In the second of two tables: what the first maps stays.
    let (format, mut mem) = x86();
    Editor::new(format, &mut mem, OPTIONS).map(range(0, 0x1000), Gpa(0), Attrs::READ).expect("mapped");
    let level_0 = leaf_at(&format, &mem, Iova(0)).expect("memory").expect("mapped").at;
    // Root, level 2, level 1, level 0, in the order of allocation.
    let level_1 = Gpa(level_0.0 - 0x1000);
    assert_eq!(mem.load(level_1).map(|entry| entry & !0xfff), Ok(level_0.0));
    mem.other = RefCell::new(Some((Gpa(level_1.0 + 8), |_| 0xf000_0027)));
    let stop = Editor::new(format, &mut mem, OPTIONS).map(pages, Gpa(0x5000), Attrs::READ);
    assert_eq!(stop, Err(Partial { done: 0x1000, cause: EditError::Raced }));
    assert_eq!(count(&format, &mem), 2);
}

/// Hardware sets flags between load and exchange: nothing fails, and a split leaf's parts have them.
#[test]
fn flags_that_hardware_sets_meanwhile_are_no_race() {
    const DIRTY: u64 = 1 << 6;
    let (format, mut mem) = x86();
    let clean = Attrs { clean: true, ..Attrs::READ_WRITE };
    Editor::new(format, &mut mem, OPTIONS).map(range(0, 0x20_0000), Gpa(0x20_0000), clean).expect("mapped");
    let at = leaf_at(&format, &mem, Iova(0)).expect("memory").expect("mapped").at;
    mem.other = RefCell::new(Some((at, |leaf| leaf | DIRTY)));
    let unmapped = Editor::new(format, &mut mem, OPTIONS).unmap(range(0x1000, 0x1000));
    assert_eq!(unmapped, Ok(Unmapped { bytes: 0x1000, tables_freed: false }));
    let rest = leaf_at(&format, &mem, Iova(0x2000)).expect("memory").expect("mapped");
    assert_eq!((rest.size_lg2, rest.output, rest.entry & DIRTY), (12, Gpa(0x20_2000), DIRTY));
    assert_eq!(count(&format, &mem), 511);
    assert_eq!(mem.mem.tables(), 4, "the first attempt's table was given back");
    mem.other = RefCell::new(Some((rest.at, |leaf| leaf | 1 << 5 | 1 << 52)));
    let unmapped = Editor::new(format, &mut mem, OPTIONS).clear();
    assert_eq!(unmapped, Ok(Unmapped { bytes: 511 << 12, tables_freed: true }));
    assert_eq!(mem.mem.tables(), 1);
}

#[test]
fn malformed_entries_are_swept_when_covered_and_otherwise_left() {
    let (format, mut mem) = x86();
    let entry = format.root();
    mem.mem.store(entry, 0x81).expect("memory");
    let stop = Editor::new(format, &mut mem, OPTIONS).unmap(range(0, 0x1000));
    assert_eq!(stop, Err(Partial { done: 0, cause: EditError::Malformed }));
    let stop = Editor::new(format, &mut mem, OPTIONS).map(range(0, 0x1000), Gpa(0), Attrs::READ);
    assert_eq!(stop, Err(Partial { done: 0, cause: EditError::Malformed }));
    assert_eq!(Editor::new(format, &mut mem, OPTIONS).unmap(range(0, 1 << 39)), Ok(Unmapped::default()));
    assert_eq!(mem.load(entry), Ok(0));
    // A table that is not there.
    mem.mem.store(entry, 0xf000_0027).expect("memory");
    let stop = Editor::new(format, &mut mem, OPTIONS).unmap(range(0, 0x1000));
    assert_eq!(stop, Err(Partial { done: 0, cause: EditError::NotMemory(NotMemory) }));
}
