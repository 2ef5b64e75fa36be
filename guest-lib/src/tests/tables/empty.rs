//! Tables in which nothing is mapped: kept for the next mapping, given back when asked, never in the way.

use alloc::rc::Rc;
use core::cell::RefCell;

use super::*;

const PAGE: u64 = 0x7f00_0000_0000;

fn page(number: u64) -> IovaRange {
    let first = PAGE + (number << 12);
    range(first, first + 0xfff)
}

fn sent_leaf_only(device: &FakeTransport) -> Vec<bool> {
    requests(device)
        .into_iter()
        .map(|request| match request {
            Request::Invalidate(Invalidate { caches: Caches::TLB, leaf, .. }) => leaf,
            request => panic!("{request:?}"),
        })
        .collect()
}

/// A buffer that comes and goes alone costs tables once.
#[test]
fn a_mapping_that_comes_and_goes_finds_its_tables() {
    for endpoint in [smmuv3(), vtd()] {
        let (mut driver, device, _table, mut space, _) = bound_with(&endpoint, EmptyTables::Keep);
        requests(&device);
        space.map(&mut driver, page(0), Gpa(0x1000), Attrs::READ).unwrap();
        let live = driver.platform().alloc.live.clone();
        driver.platform_mut().alloc.budget = 0;
        for _ in 0..5 {
            space.unmap(&mut driver, page(0)).unwrap();
            assert_eq!(sent_leaf_only(&device), [true]);
            assert!(space.translate(&driver, page(0).start(), Access::READ).is_err());
            space.map(&mut driver, page(0), Gpa(0x1000), Attrs::READ).unwrap();
        }
        assert_eq!(driver.platform().alloc.live, live);
        // All that a table translates goes with it.
        space.unmap(&mut driver, range(PAGE, PAGE + 0x1f_ffff)).unwrap();
        assert_eq!(sent_leaf_only(&device), [false]);
        assert_eq!(driver.platform().alloc.live.len(), live.len() - 1);
    }
}

/// What is empty is given back on demand, after one invalidation; what is mapped stays.
#[test]
fn empty_tables_are_given_back_on_demand() {
    for endpoint in [smmuv3(), vtd()] {
        let (mut driver, device, _table, mut space, _) = bound_with(&endpoint, EmptyTables::Keep);
        let mapped = [page(0), page(7 << 9), range(0x4000_0000, 0x401f_ffff), range(0, 0xfff)];
        for range in mapped {
            space.map(&mut driver, range, Gpa(range.start().0 & 0xffff_ffff), Attrs::READ).unwrap();
        }
        let live = driver.platform().alloc.live.clone();
        for number in [1, 600, 3 << 9, 1 << 18, 1 << 27] {
            space.map(&mut driver, page(number), Gpa(0x1000), Attrs::READ).unwrap();
            space.unmap(&mut driver, page(number)).unwrap();
        }
        // Two beside others on the last level, then one and its parent, then one, its parent and that one's.
        assert_eq!(driver.platform().alloc.live.len(), live.len() + 2 + 2 + 3);
        let all = driver.platform().alloc.live.clone();
        requests(&device);
        answer(&device, Status::DevErr);
        assert!(space.trim(&mut driver).is_err());
        assert_eq!(driver.platform().alloc.live, all, "the hardware may still read them");
        requests(&device);
        answer(&device, Status::Ok);
        space.trim(&mut driver).unwrap();
        assert_eq!(sent_leaf_only(&device), [false]);
        assert_eq!(driver.platform().alloc.live, live);
        for range in mapped {
            let at = space.translate(&driver, range.start(), Access::READ).unwrap().output;
            assert_eq!(at, Gpa(range.start().0 & 0xffff_ffff));
        }
        assert_eq!((space.trim(&mut driver), requests(&device)), (Ok(0), vec![]));
    }
}

/// Nor do they keep a mapping from its memory.
#[test]
fn empty_tables_go_where_memory_runs_out() {
    for endpoint in [smmuv3(), vtd()] {
        let (mut driver, device, _table, mut space, _) = bound_with(&endpoint, EmptyTables::Keep);
        space.map(&mut driver, page(0), Gpa(0x1000), Attrs::READ).unwrap();
        space.unmap(&mut driver, page(0)).unwrap();
        requests(&device);
        let held = driver.platform().alloc.live.len();
        driver.platform_mut().alloc.budget = 2;
        let outcome = space.map(&mut driver, range(0x5000, 0x5fff), Gpa(0x1000), Attrs::READ);
        assert_eq!(outcome, Err(TableError::Edit(EditError::NoTable)), "it needs three");
        assert_eq!(sent_leaf_only(&device), [false], "the empty ones went");
        assert_eq!(driver.platform().alloc.live.len(), held - 3);
        driver.platform_mut().alloc.budget = 3;
        space.map(&mut driver, range(0x5000, 0x5fff), Gpa(0x1000), Attrs::READ).unwrap();
    }
}

/// A large page gets its place: the table in it goes, and is forgotten by the hardware before the page is written.
#[test]
fn a_large_page_takes_the_place_of_an_empty_table() {
    for endpoint in [smmuv3(), vtd()] {
        let (mut driver, device, _table, mut space, _) = bound_with(&endpoint, EmptyTables::Keep);
        let large = range(PAGE, PAGE + 0x1f_ffff);
        space.map(&mut driver, page(3), Gpa(0x1000), Attrs::READ).unwrap();
        let live = driver.platform().alloc.live.len();
        let exists = space.map(&mut driver, large, Gpa(0x4000_0000), Attrs::READ);
        assert_eq!(exists, Err(TableError::Edit(EditError::Exists)));
        space.unmap(&mut driver, page(3)).unwrap();
        requests(&device);
        let seen = Rc::new(RefCell::new(vec![]));
        device.set_script({
            let (seen, memory, root) = (Rc::clone(&seen), driver.platform().memory.clone(), space.root());
            let levels = [39, 30, 21].map(|shift| PAGE >> shift & 0x1ff);
            move |_, writable| {
                // The path to the entry of the last level but one.
                let entry = levels.iter().fold(root.0, |table, index| {
                    use pgtable_formats::TableMem;
                    memory.load(Gpa((table & 0xffff_ffff_f000) + 8 * index)).unwrap()
                });
                seen.borrow_mut().push(entry);
                writable.fill(0);
                writable.len() as u32
            }
        });
        space.map(&mut driver, large, Gpa(0x4000_0000), Attrs::READ).unwrap();
        assert_eq!(*seen.borrow(), [0], "invalidated when nothing was there");
        assert_eq!(sent_leaf_only(&device), [false]);
        let found = space.translate(&driver, Iova(PAGE + 0x12_3456), Access::READ).unwrap();
        assert_eq!(found.apply(Iova(PAGE + 0x12_3456)), Gpa(0x4012_3456));
        assert_eq!(driver.platform().alloc.live.len(), live - 1, "one page, no table");
    }
}

/// The window of interrupts stays whatever goes.
#[test]
fn interrupts_survive_a_trim() {
    let window = range(0x800_0000, 0x80f_ffff);
    let endpoint = with_windows(8, smmuv3::IdRegisters::SOFTWARE, &[window]);
    let (mut driver, device) = driver();
    let mut table = PasidTable::new(&mut driver, &endpoint, DOMAIN, TableOptions::default()).unwrap();
    table.attach(&mut driver).unwrap();
    let mut space = AddressSpace::new(&mut driver, &endpoint, SpaceOptions::default()).unwrap();
    table.bind_at(&mut driver, None, &mut space).unwrap();
    space.map(&mut driver, page(0), Gpa(0x1000), Attrs::READ).unwrap();
    space.unmap(&mut driver, page(0)).unwrap();
    requests(&device);
    assert_eq!(space.trim(&mut driver), Ok(3));
    let at = space.translate(&driver, window.start(), Access::WRITE).unwrap().output;
    assert_eq!(at, Gpa(window.start().0));
}
