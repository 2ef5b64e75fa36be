//! Lookup and walk alone, over flat memory, and the floor below them.

use std::hint::black_box;
use std::time::Duration;

use pgtable_formats::context::{Context, Stage1};
use pgtable_formats::format::Attrs;
use pgtable_formats::suite::FlatMem;
use pgtable_formats::{Access, Gpa, Iova, Pasid, TableAlloc, TableMem};
use viommu_device::host::TableCaps;
use viommu_tests::rig;
use viommu_tests::tables::{PageTable, PasidTable};

use crate::measure::{Random, Stopwatch, Suite};

/// Pages that are mapped: more than one last-level table, few enough for the processor's cache.
pub(crate) const PAGES: u64 = 1024;
pub(crate) const FIRST: u64 = 0x12_3450_0000;
pub(crate) const OUTPUT: u64 = 0x8000_0000;
const BASE: Gpa = Gpa(0x4000_0000);

/// The addresses of a batch: every page once, in an order that no prefetcher guesses.
pub(crate) fn addresses() -> Vec<Iova> {
    let mut addresses: Vec<Iova> =
        (0..PAGES).map(|page| Iova(FIRST + page * 0x1000 + page % 512 * 8)).collect();
    Random(3).shuffle(&mut addresses);
    addresses
}

/// The endpoints' architectures, by name.
pub(crate) fn architectures() -> [(&'static str, TableCaps); 2] {
    [("smmuv3", rig::smmuv3()), ("vtd", rig::vtd())]
}

/// Four loads that depend on each other, and nothing else: no attributes, no permissions, no faults but absence.
pub(crate) fn floor(suite: &mut Suite) {
    let mut memory = FlatMem::new(BASE, 1 << 20);
    let table = PageTable::new(&rig::vtd(), 1, &mut memory);
    map_all(&table, &mut memory);
    let words: Vec<u64> = (0..1 << 17).map(|word| memory.load(Gpa(BASE.0 + word * 8)).unwrap()).collect();
    let walk = |iova: Iova| -> Option<u64> {
        let mut table = table.root().0;
        for shift in [39, 30, 21, 12] {
            let at = (table - BASE.0) >> 3 | iova.0 >> shift & 0x1ff;
            let entry = *words.get(at as usize)?;
            if entry & 1 == 0 {
                return None;
            }
            table = entry & 0xf_ffff_ffff_f000;
        }
        Some(table | iova.0 & 0xfff)
    };
    let (addresses, stopwatch) = (addresses(), Stopwatch::new());
    suite.run("floor-walk", &[("levels", "4"), ("memory", "flat")], PAGES, || {
        time_each(stopwatch, &addresses, walk)
    });
    assert_eq!(walk(Iova(FIRST + 0x1008)), Some(OUTPUT + 0x1008));
}

/// The walker over one page table; and the fetch of a context before each walk.
pub(crate) fn run(suite: &mut Suite) {
    let (addresses, stopwatch) = (addresses(), Stopwatch::new());
    for (name, caps) in architectures() {
        let mut memory = FlatMem::new(BASE, 1 << 20);
        let table = PageTable::new(&caps, 1, &mut memory);
        map_all(&table, &mut memory);
        let pasids = PasidTable::new(&caps, 10, &mut memory);
        pasids.set(&mut memory, 7, &table);
        let (canonical, pasid) = (pasids.canonical(), Pasid::new(7));
        let keys = [("format", name), ("levels", "4"), ("memory", "flat")];

        let stage1 = match canonical.lookup(&memory, pasid) {
            Ok(Context::Stage1(stage1)) => stage1,
            other => panic!("{other:?}"),
        };
        let walk = |stage1: &Stage1, iova| stage1.walk(&memory, iova, Access::READ).unwrap().output;
        suite.run("walk", &keys, PAGES, || time_each(stopwatch, &addresses, |iova| walk(&stage1, iova)));
        let lookup_and_walk = |iova| match canonical.lookup(&memory, black_box(pasid)) {
            Ok(Context::Stage1(stage1)) => walk(&stage1, iova),
            other => panic!("{other:?}"),
        };
        suite.run("lookup-and-walk", &keys, PAGES, || time_each(stopwatch, &addresses, lookup_and_walk));
    }
}

fn time_each<R>(stopwatch: Stopwatch, addresses: &[Iova], walk: impl Fn(Iova) -> R) -> Duration {
    let all = || {
        for &iova in addresses {
            black_box(walk(black_box(iova)));
        }
    };
    stopwatch.time(all).0
}

/// Maps [`PAGES`] from [`FIRST`] on, to single pages.
pub(crate) fn map_all<T: TableMem + TableAlloc>(table: &PageTable, memory: &mut T) {
    for page in 0..PAGES {
        table.map(memory, FIRST + page * 0x1000, OUTPUT + page * 0x1000, 0x1000, Attrs::READ_WRITE);
    }
}
