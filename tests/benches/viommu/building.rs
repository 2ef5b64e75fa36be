//! What a guest spends on tables of its own.

use std::hint::black_box;

use pgtable_formats::edit::{EditOptions, Editor};
use pgtable_formats::format::{Attrs, Format};
use pgtable_formats::suite::FlatMem;
use pgtable_formats::{Gpa, Iova, IovaRange};
use viommu_tests::tables::{PageTable, PasidTable};

use crate::measure::{Stopwatch, Suite};
use crate::walks::{self, FIRST, OUTPUT};

/// Pages of a batch.
const PAGES: u64 = 512;

pub(crate) fn run(suite: &mut Suite) {
    for (name, caps) in walks::architectures() {
        let mut memory = FlatMem::new(Gpa(0x4000_0000), 1 << 20);
        let table = PageTable::new(&caps, 1, &mut memory);
        match &table {
            PageTable::Smmuv3 { format, .. } => pages(suite, name, *format, &mut memory),
            PageTable::Vtd(table) => pages(suite, name, *table.format(), &mut memory),
        }
    }
    descriptors(suite);
}

/// Pages of 4 KiB, mapped one by one as buffers are, and in one go.
fn pages<F: Format>(suite: &mut Suite, name: &str, format: F, memory: &mut FlatMem) {
    let stopwatch = Stopwatch::new();
    let options = EditOptions { keep_tables: true, ..EditOptions::default() };
    let page = |number: u64| IovaRange::from_length(Iova(FIRST + number * 0x1000), 0x1000).expect("a range");
    let all = IovaRange::from_length(Iova(FIRST), PAGES * 0x1000).expect("a range");
    // Off by one page, so that no larger page fits.
    let output = |number: u64| Gpa(OUTPUT + (number + 1) * 0x1000);
    let map = |editor: &mut Editor<'_, F, FlatMem>, number| {
        editor.map(page(number), output(number), Attrs::READ_WRITE).expect("room");
    };
    let mut editor = Editor::new(format, memory, options);
    suite.run("build-map", &[("format", name), ("pages", "single")], PAGES, || {
        editor.unmap(all).expect("a table");
        stopwatch.time(|| (0..PAGES).for_each(|number| map(&mut editor, black_box(number)))).0
    });
    suite.run("build-map", &[("format", name), ("pages", "512-at-once")], PAGES, || {
        editor.unmap(all).expect("a table");
        stopwatch.time(|| editor.map(black_box(all), output(0), Attrs::READ_WRITE).expect("room")).0
    });
    suite.run("build-unmap", &[("format", name), ("pages", "single")], PAGES, || {
        editor.unmap(all).expect("a table");
        (0..PAGES).for_each(|number| map(&mut editor, number));
        let mut unmap = |number| editor.unmap(black_box(page(number))).expect("a page").bytes;
        let (time, bytes) = stopwatch.time(|| (0..PAGES).map(&mut unmap).sum::<u64>());
        assert_eq!(bytes, PAGES * 0x1000);
        time
    });
}

/// Context descriptors and PASID entries.
fn descriptors(suite: &mut Suite) {
    const COUNT: u32 = 512;
    for (name, caps) in walks::architectures() {
        let mut memory = FlatMem::new(Gpa(0x4000_0000), 1 << 21);
        let table = PageTable::new(&caps, 1, &mut memory);
        let pasids = PasidTable::new(&caps, 13, &mut memory);
        // `set` looks for an entry in use first, as a guest that reuses PASIDs does.
        let stopwatch = Stopwatch::new();
        suite.run("build-pasid-entry", &[("format", name)], u64::from(COUNT), || {
            (1..=COUNT).for_each(|pasid| pasids.clear(&memory, pasid));
            stopwatch
                .time(|| (1..=COUNT).for_each(|pasid| pasids.set(&mut memory, black_box(pasid), &table)))
                .0
        });
    }
}
