//! What every format has to prove, written once, and a memory to prove it in.
//!
//! For tests, benchmarks and fuzzing: the checks are assertions and [`FlatMem`] asserts that it is used correctly.
//! Nothing here belongs in a device.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

mod flat_mem;

pub use flat_mem::FlatMem;

use crate::edit::{EditError, EditOptions, Editor, best_page_lg2};
use crate::format::{Attrs, Entry, Format};
use crate::visit::{leaf_at, leaves};
use crate::{Access, AccessKind, Gpa, Iova, IovaRange, Perms, TableAlloc, WalkFault, walk};

/// A format and the memory of its tables, with an empty root.
///
/// `configure` makes the format for a root; it is called twice, at first to learn the root's size.
///
/// # Panics
/// Where the memory has no room for the root.
pub fn empty<F: Format>(mut mem: FlatMem, configure: impl Fn(Gpa) -> F) -> (F, FlatMem) {
    let draft = configure(Gpa(0));
    let root = mem.alloc(draft.table_lg2(draft.top_level()).max(6));
    assert!(root.is_some(), "no room for a root table");
    let format = configure(root.unwrap_or_default());
    assert_eq!(Some(format.root()), root, "the format changed the root's address");
    (format, mem)
}

/// Every check that needs no generated input.
///
/// # Panics
/// Where the format does not hold what it promises.
pub fn check<F: Format>(configure: impl Fn(Gpa) -> F) {
    let (format, _) = empty(suite_memory(), &configure);
    check_geometry(&format);
    check_tables(&format);
    check_attrs(&format);
    check_best_page(&format);
    check_pages(&configure);
    check_hostile(&configure);
}

/// The levels' bits cover the translated part of an address exactly once, and indices and addresses convert.
///
/// # Panics
/// Where they do not.
pub fn check_geometry<F: Format>(format: &F) {
    let top = format.top_level();
    assert!(top <= 4 && format.output_lg2() <= 52);
    let mut covered = (1_u64 << format.entry_lg2(0)) - 1;
    for level in 0..=top {
        let field = ((1_u64 << (format.table_lg2(level) - 3)) - 1) << format.entry_lg2(level);
        assert_eq!(covered & field, 0, "level {level} overlaps the ones below");
        covered |= field;
        assert!(format.index(level, u64::MAX >> 7) >> format.stride_lg2() == 0);
    }
    assert_eq!(covered, (1 << format.input_lg2()) - 1, "the levels do not cover the input");
    for bit in 0..format.input_lg2() {
        let index = 1_u64 << bit;
        let rebuilt = (0..=top)
            .fold(0, |sum, level| sum | format.index(level, index) << format.entry_lg2(level))
            | index & ((1 << format.entry_lg2(0)) - 1);
        assert_eq!(rebuilt, index, "bit {bit}");
        assert_eq!(format.admit(format.iova(index), PRIVILEGED_READ), Ok(index));
    }
}

/// A table entry leads to the table it was made for, at every level and for every address bit.
///
/// # Panics
/// Where it does not.
pub fn check_tables<F: Format>(format: &F) {
    for level in 1..=format.top_level() {
        for bit in format.table_lg2(level - 1)..format.output_lg2() {
            let table = Gpa(1 << bit);
            let entry = format.table_entry(table);
            assert_eq!(format.decode(level, entry), Entry::Table(table), "level {level} bit {bit}");
            assert_eq!(format.mark_table(entry), entry, "a new table entry needs no marking");
        }
        assert_eq!(format.decode(level, 0), Entry::Empty);
    }
    assert!(
        !matches!(format.decode(0, format.table_entry(Gpa(0))), Entry::Table(_)),
        "level 0 has no tables"
    );
}

/// Attributes survive the way into a leaf and out of it, at every level and with every output address bit; so they
/// do when a leaf is split.
///
/// # Panics
/// Where they do not.
pub fn check_attrs<F: Format>(format: &F) {
    for level in 0..=format.leaf_level_max().min(format.top_level()) {
        for attrs in every_attrs() {
            for bit in format.entry_lg2(level)..format.output_lg2() {
                let output = Gpa(1 << bit);
                let Some(leaf) = format.leaf_entry(level, output, attrs) else { continue };
                assert_eq!(format.decode(level, leaf), Entry::Leaf(output), "level {level} {attrs:?}");
                let read = format.attrs(level, leaf);
                let rebuilt = format.leaf_entry(level, output, read);
                assert_eq!(rebuilt, Some(leaf), "level {level} {attrs:?} became {read:?}");
                assert_eq!((read.user, read.write), (attrs.user, attrs.write));
                assert_eq!(read.memory_type, attrs.memory_type);
                if let Some(below) = level.checked_sub(1) {
                    let last = Gpa(output.0 | 1 << (format.entry_lg2(level) - 1));
                    let marked = format.with_contiguous(leaf, format.contiguous_lg2(level) > 0);
                    let part = format.relevel(marked, level, below, last);
                    assert_eq!(format.leaf_entry(below, last, read), Some(part), "{attrs:?}");
                }
            }
        }
    }
}

/// The fast choice of a page size agrees with trying them all.
///
/// # Panics
/// Where it does not.
pub fn check_best_page<F: Format>(format: &F) {
    let sizes = format.page_sizes();
    let limit = (1_u64 << format.input_lg2()) - 1;
    let page = 1_u64 << format.entry_lg2(0);
    let steps = || (format.entry_lg2(0)..format.input_lg2()).map(|bit| 1_u64 << bit);
    for index in steps().chain([0, page * 511, limit & !(page - 1)]).filter(|&index| index <= limit) {
        for output in steps().take(32).chain([0, page * 513]) {
            for length in steps().flat_map(|length| [length, length + page, length - page]) {
                if length == 0 || length - 1 > limit - index {
                    continue;
                }
                let slow = (0..64_u8)
                    .filter(|&lg2| {
                        let size = 1_u64 << lg2;
                        sizes & size != 0 && (index | output) & (size - 1) == 0 && length >= size
                    })
                    .max();
                let fast = best_page_lg2(sizes, index, Gpa(output), length - 1);
                assert_eq!(fast, slow, "index {index:#x} output {output:#x} length {length:#x}");
            }
        }
    }
}

/// Every page size with every attribute: mapped, walked at its edges with every access, unmapped; nothing remains.
///
/// # Panics
/// Where a walk does not answer what was mapped.
pub fn check_pages<F: Format>(configure: impl Fn(Gpa) -> F) {
    let (format, mut mem) = empty(suite_memory(), configure);
    for level in 0..=format.leaf_level_max().min(format.top_level()) {
        let size_lg2 = format.entry_lg2(level);
        let size = 1_u64 << size_lg2;
        // The last page of the input, and an output that the page before it does not reach.
        let index = (1 << format.input_lg2()) - size;
        let output = Gpa(if size_lg2 + 1 < format.output_lg2() { size } else { 0 });
        let Some(range) = IovaRange::from_length(format.iova(index), size) else { continue };
        for attrs in every_attrs().filter(|attrs| format.leaf_entry(level, output, *attrs).is_some()) {
            let tables = mem.tables();
            let mut editor = Editor::new(format, &mut mem, EditOptions::default());
            assert_eq!(editor.map(range, output, attrs), Ok(()));
            assert_eq!(editor.map(range, output, attrs).map_err(|stop| stop.cause), Err(EditError::Exists));
            assert_eq!(leaf_at(&format, &mem, range.last()).map(|l| l.map(|l| l.level)), Ok(Some(level)));
            for access in EVERY_ACCESS {
                for offset in [0, 8, size - 1] {
                    check_access(&format, &mem, Iova(range.start().0 + offset), output, attrs, access);
                }
            }
            for outside in [range.start().0.wrapping_sub(1), range.last().0.wrapping_add(1)] {
                let answer = walk(&format, &mem, Iova(outside), PRIVILEGED_READ);
                assert!(matches!(answer, Err(WalkFault::NotPresent { .. } | WalkFault::InputRange)));
            }
            let mut editor = Editor::new(format, &mut mem, EditOptions::default());
            assert_eq!(editor.unmap(range).map(|unmapped| unmapped.bytes), Ok(size));
            assert_eq!(mem.tables(), tables, "emptied tables were not freed");
        }
    }
}

/// Random entries, tables that lead to themselves, pointers out of memory: every walk ends with an answer.
///
/// # Panics
/// Where one does not hold what a [`Translation`](crate::Translation) promises.
pub fn check_hostile<F: Format>(configure: impl Fn(Gpa) -> F) {
    let (format, mut mem) = empty(suite_memory(), configure);
    let mut random = SplitMix(0x0123_4567_89ab_cdef);
    let tables: Vec<Gpa> =
        (0..4).filter_map(|_| mem.alloc(format.table_lg2(0))).chain([format.root()]).collect();
    for round in 0..64 {
        for &table in &tables {
            let lg2 = if table == format.root() { format.top_level() } else { 0 };
            for number in 0..1_u64 << (format.table_lg2(lg2) - 3) {
                let next = random.pick(&tables);
                let word = match random.below(4) {
                    0 => random.next(),
                    1 => format.table_entry(Gpa(random.next())),
                    _ => format.table_entry(next) ^ if round % 2 == 0 { 0 } else { 1 << random.below(64) },
                };
                assert_eq!(mem.store(Gpa(table.0 + number * 8), word), Ok(()));
            }
        }
        for _ in 0..256 {
            let iova = format.iova(random.next() & ((1 << format.input_lg2()) - 1));
            let access = random.pick(&EVERY_ACCESS);
            if let Ok(found) = walk(&format, &mem, iova, access) {
                assert!(found.contains(iova) && found.size_lg2 >= 12 && found.size_lg2 < 64);
                assert_eq!((found.iova.0 | found.output.0) & ((1 << found.size_lg2) - 1), 0);
                assert!(found.output.0 >> format.output_lg2() == 0);
                assert!(access.kind == AccessKind::Write || found.perms.allow(access));
                // Flags were set by the first walk, so the second finds what the first has left.
                assert_eq!(walk(&format, &mem, iova, access), Ok(found));
            }
        }
        // Any number of leaves: that it ends is all there is to see.
        let _ = leaves(&format, &mem, 1 << 14, |_| ());
    }
}

/// One step of a [`run_model`]: pages are the format's smallest.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    /// Maps pages.
    Map {
        /// First page, modulo the window: four tables of level 0 around the middle of the input, where the indices of all
        /// levels change.
        page: u32,
        /// How many.
        count: u32,
        /// First page of the output.
        output: u32,
        /// Whether writes are allowed.
        write: bool,
    },
    /// Unmaps pages.
    Unmap {
        /// First page.
        page: u32,
        /// How many.
        count: u32,
    },
    /// Unmaps all.
    Clear,
}

/// Runs operations on a table and on a map from page to page, and compares after each.
///
/// # Panics
/// Where they differ.
pub fn run_model<F: Format>(configure: impl Fn(Gpa) -> F, options: EditOptions, ops: &[Op]) {
    let (format, mut mem) = empty(suite_memory(), configure);
    let page_lg2 = format.entry_lg2(0);
    let half = (1_u64 << (format.input_lg2() - page_lg2 - 1)).min(1 << (format.stride_lg2() + 1));
    let first_page = (1_u64 << (format.input_lg2() - page_lg2 - 1)) - half;
    let mut model: BTreeMap<u64, (u64, bool)> = BTreeMap::new();
    for (step, &op) in ops.iter().enumerate() {
        let clip = |page: u32, count: u32| {
            let page = u64::from(page) % (2 * half);
            (page, (page + u64::from(count.max(1))).min(2 * half))
        };
        let range = |(first, end): (u64, u64)| {
            let start = format.iova((first_page + first) << page_lg2);
            // The window may reach over the hole of a canonical address space; then the range is refused.
            IovaRange::new(
                start,
                Iova(format.iova((first_page + end - 1) << page_lg2).0 | low_mask(page_lg2)),
            )
        };
        let mut editor = Editor::new(format, &mut mem, options);
        match op {
            Op::Map { page, count, output, write } => {
                let pages = clip(page, count);
                let Some(asked) = range(pages) else { continue };
                let output = u64::from(output) % (4 * half);
                let result = editor.map(asked, Gpa(output << page_lg2), Attrs { write, ..Attrs::READ });
                let free = (pages.0..pages.1).take_while(|page| !model.contains_key(page)).count() as u64;
                let done = match result {
                    Ok(()) => pages.1 - pages.0,
                    Err(stop) if stop.cause == EditError::InputRange => {
                        assert!(pages.0 < half && pages.1 > half, "step {step}: inside the input");
                        continue;
                    }
                    Err(stop) => {
                        assert_eq!(stop.cause, EditError::Exists, "step {step}");
                        stop.done >> page_lg2
                    }
                };
                assert_eq!(done, free, "step {step}: mapped up to the first mapping");
                model.extend((0..done).map(|n| (pages.0 + n, (output + n, write))));
            }
            Op::Unmap { page, count } => {
                let pages = clip(page, count);
                let Some(asked) = range(pages) else { continue };
                unmap_both(&mut model, pages, page_lg2, editor.unmap(asked), step);
            }
            Op::Clear => {
                unmap_both(&mut model, (0, u64::MAX), page_lg2, editor.clear(), step);
                assert_eq!(mem.tables(), 1, "step {step}: tables remain");
            }
        }
        compare(&format, &mem, &model, first_page, 2 * half, step);
    }
}

fn unmap_both(
    model: &mut BTreeMap<u64, (u64, bool)>,
    pages: (u64, u64),
    page_lg2: u8,
    result: Result<crate::edit::Unmapped, crate::edit::Partial>,
    step: usize,
) {
    let (end, bytes) = match result {
        Ok(unmapped) => (pages.1, Some(unmapped.bytes)),
        Err(stop) => {
            assert!(
                matches!(stop.cause, EditError::WouldSplit | EditError::InputRange),
                "step {step}: {stop}"
            );
            (pages.0 + (stop.done >> page_lg2), None)
        }
    };
    let before = model.len();
    model.retain(|page, _| !(pages.0..end).contains(page));
    if let Some(bytes) = bytes {
        assert_eq!(bytes >> page_lg2, (before - model.len()) as u64, "step {step}: bytes unmapped");
    }
}

/// The whole table against the model, leaf by leaf, and walks at the edges of its mappings.
fn compare<F: Format>(
    format: &F,
    mem: &FlatMem,
    model: &BTreeMap<u64, (u64, bool)>,
    first_page: u64,
    window: u64,
    step: usize,
) {
    let page_lg2 = format.entry_lg2(0);
    let mut mapped = 0;
    let mut groups: BTreeMap<(u8, u64), (u64, u64)> = BTreeMap::new();
    let visited = leaves(format, mem, u64::MAX, |leaf| {
        if format.is_contiguous(leaf.entry) {
            let group_lg2 = leaf.size_lg2 + format.contiguous_lg2(leaf.level);
            let offset = leaf.iova.0 & low_mask(group_lg2);
            let group =
                groups.entry((leaf.level, leaf.iova.0 >> group_lg2)).or_insert((0, leaf.output.0 - offset));
            group.0 += 1;
            assert_eq!(leaf.output.0, group.1 + offset, "step {step}: a group leads to one place");
        }
        let page = (leaf.iova.0 & low_mask(format.input_lg2())) >> page_lg2;
        let write = format.attrs(leaf.level, leaf.entry).write;
        for number in 0..1_u64 << (leaf.size_lg2 - page_lg2) {
            let expected = Some(&((leaf.output.0 >> page_lg2) + number, write));
            let page = (page + number).wrapping_sub(first_page);
            assert_eq!(model.get(&page), expected, "step {step}: page {page}");
            mapped += 1;
        }
    });
    assert_eq!(visited, Ok(()));
    assert_eq!(mapped, model.len(), "step {step}: pages mapped");
    for ((level, _), (count, output)) in groups {
        assert_eq!(count, 1 << format.contiguous_lg2(level), "step {step}: a group is whole");
        assert_eq!(output & low_mask(format.entry_lg2(level) + format.contiguous_lg2(level)), 0);
    }
    let is_edge = |page: u64| {
        model.contains_key(&page) != model.contains_key(&page.wrapping_sub(1))
            || model.contains_key(&page) != model.contains_key(&(page + 1))
    };
    for page in (0..window).filter(|page| page % 61 == 0 || is_edge(*page)) {
        let iova = format.iova((first_page + page) << page_lg2 | 0x7f8);
        let found = walk(format, mem, iova, Access::READ).map(|found| found.apply(iova));
        let write = walk(format, mem, iova, Access::WRITE).is_ok();
        match model.get(&page) {
            Some(&(output, may_write)) => {
                assert_eq!(found, Ok(Gpa(output << page_lg2 | 0x7f8)), "step {step}: page {page}");
                assert_eq!(write, may_write, "step {step}: page {page}");
            }
            None => {
                assert!(matches!(found, Err(WalkFault::NotPresent { .. })), "step {step}: page {page}");
            }
        }
    }
}

/// A walk answers what the attributes say, as far as every format agrees on it.
fn check_access<F: Format>(format: &F, mem: &FlatMem, iova: Iova, output: Gpa, attrs: Attrs, access: Access) {
    let result = walk(format, mem, iova, access);
    let is_possible = (attrs.user || access.privileged)
        && match access.kind {
            AccessKind::Read => true,
            AccessKind::Write => attrs.write,
            AccessKind::Execute => return,
        };
    // Privileged accesses may be closed (PAN, SRE) or opened (WPE) by the configuration; others not.
    if access.privileged {
        return;
    }
    match result {
        Ok(found) => {
            assert!(is_possible, "{access:?} with {attrs:?}");
            assert_eq!(found.apply(iova).0, output.0 | iova.0 & low_mask(found.size_lg2));
            assert!(found.contains(iova) && found.perms.allow(access) && found.global == attrs.global);
            assert!(found.perms.contains(Perms::USER_READ));
        }
        Err(fault) => {
            assert!(!is_possible, "{access:?} with {attrs:?}: {fault}");
            assert!(matches!(fault, WalkFault::Permission { .. }), "{fault}");
        }
    }
}

fn every_attrs() -> impl Iterator<Item = Attrs> {
    (0..64_u8).map(|bits| Attrs {
        user: bits & 1 != 0,
        write: bits & 2 != 0,
        execute: bits & 4 != 0,
        global: bits & 8 != 0,
        clean: bits & 16 != 0,
        memory_type: if bits & 32 != 0 { 5 } else { 2 },
    })
}

fn suite_memory() -> FlatMem {
    FlatMem::new(Gpa(0x4000_0000), 4 << 20)
}

const PRIVILEGED_READ: Access = Access { kind: AccessKind::Read, privileged: true };

const EVERY_ACCESS: [Access; 6] = [
    Access::READ,
    Access::WRITE,
    Access { kind: AccessKind::Execute, privileged: false },
    PRIVILEGED_READ,
    Access { kind: AccessKind::Write, privileged: true },
    Access { kind: AccessKind::Execute, privileged: true },
];

/// A generator of test numbers (Steele, Lea, Flood: `SplitMix64`).
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        let number = usize::try_from(self.next()).unwrap_or_default() % from.len();
        from[number]
    }
}

const fn low_mask(lg2: u8) -> u64 {
    (1 << lg2) - 1
}
