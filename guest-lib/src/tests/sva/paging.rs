//! Memory that is there once somebody asks for it, and what a process does to its mappings.

use super::*;
use crate::sva::PagingError;
use crate::tables::TableError;
use pgtable_formats::edit::EditError;
use viommu_wire::{Caches, InvalidateScope};

fn memory(endpoint: &Endpoint, max_pages: usize) -> (TestDriver, FakeTransport, AddressSpace, DemandPaged) {
    let (mut driver, device) = driver();
    let space = AddressSpace::new(&mut driver, endpoint, SpaceOptions::default()).unwrap();
    let memory = DemandPaged::new(&space, max_pages);
    (driver, device, space, memory)
}

fn page(number: u64) -> Iova {
    Iova(HEAP + (number << 12))
}

#[test]
fn areas_say_what_is_allowed() {
    for endpoint in [arm(8, &[1]), intel(8, &[2])] {
        let (mut driver, _, mut space, mut memory) = memory(&endpoint, 100);
        let executable = Attrs { execute: true, ..Attrs::READ };
        for (first, last, attrs) in [(8, 9, Attrs::READ), (0, 3, Attrs::READ_WRITE), (4, 7, executable)] {
            let range = range(page(first).0, page(last).0 + 0xfff);
            memory.add_area(Area { range, attrs }).unwrap();
        }
        for (first, last) in [(0, 0), (3, 4), (9, 20), (0, 100)] {
            let range = range(page(first).0, page(last).0 + 0xfff);
            let refused = memory.add_area(Area { range, attrs: Attrs::READ });
            assert!(matches!(refused, Err(PagingError::Overlap(_))), "{refused:?}");
        }
        assert_eq!(memory.areas().len(), 3);
        // VT-d has privileges and execution only where bits of the entry say so, which are not set.
        let executes = !matches!(endpoint.properties().hardware, Some(Hardware::Vtd(_)));
        use AccessFlags as A;
        for (number, access, allowed) in [
            (0, A::READ, true),
            (1, A::WRITE, true),
            (1, A::READ | A::WRITE, true),
            (1, A::READ | A::WRITE | A::EXEC, false),
            (2, A::EXEC, false),
            (4, A::EXEC, executes),
            (5, A::WRITE, false),
            (6, A::empty(), true),
            (8, A::READ, true),
            (8, A::READ | A::WRITE, false),
            (3, A::READ | A::PRIVILEGED, executes),
            // Hardware lets nobody privileged execute what a user may: to say Success would go on for ever.
            (7, A::EXEC | A::PRIVILEGED, false),
        ] {
            let found = memory.populate(&mut driver, &mut space, page(number), access);
            assert_eq!(found.is_ok(), allowed, "{number} {access:?} {found:?}");
        }
        for outside in [Iova(HEAP - 1), page(10), Iova(0), Iova(u64::MAX)] {
            let none = memory.populate(&mut driver, &mut space, outside, A::READ);
            assert_eq!(none, Err(PagingError::NoArea(outside)));
        }
    }
}

/// Neither the bound nor the allocator's end is passed, and what fails leaves nothing behind.
#[test]
fn pages_are_bounded() {
    let (mut driver, device, mut space, mut memory) = memory(&intel(8, &[2]), 3);
    memory.add_area(Area { range: heap(64), attrs: Attrs::READ_WRITE }).unwrap();
    for number in 0..3 {
        let frame = memory.populate(&mut driver, &mut space, page(number), AccessFlags::WRITE).unwrap();
        let bytes = driver.platform().memory.bytes(frame, 4096);
        assert_eq!(bytes, [0; 4096]);
        let again = memory.populate(&mut driver, &mut space, page(number), AccessFlags::READ);
        assert_eq!(again, Ok(frame));
    }
    let full = memory.populate(&mut driver, &mut space, page(3), AccessFlags::WRITE);
    assert_eq!((full, memory.resident()), (Err(PagingError::Full), 3));
    memory.discard(&mut driver, &mut space, heap(1)).unwrap();
    assert!(matches!(requests(&device)[..], []), "nobody is bound");
    memory.populate(&mut driver, &mut space, page(3), AccessFlags::WRITE).unwrap();
    memory.discard(&mut driver, &mut space, heap(2)).unwrap();

    let live = driver.platform().alloc.live.clone();
    driver.platform_mut().alloc.budget = 0;
    let none = memory.populate(&mut driver, &mut space, page(0), AccessFlags::WRITE);
    assert_eq!(none, Err(PagingError::NoMemory));
    // A frame, but no table for it.
    memory.add_area(Area { range: range(0, 0xffff), attrs: Attrs::READ }).unwrap();
    driver.platform_mut().alloc.budget = 1;
    let none = memory.populate(&mut driver, &mut space, Iova(0x1000), AccessFlags::READ);
    assert_eq!(none, Err(PagingError::Table(TableError::Edit(EditError::NoTable))));
    assert_eq!((memory.resident(), &driver.platform().alloc.live), (2, &live));
    assert_eq!((memory.counters().made, memory.counters().failed, memory.counters().present), (4, 3, 3));

    driver.platform_mut().alloc.budget = usize::MAX;
    space.release(&mut driver).map_err(|(_, error)| error).unwrap();
    memory.release(&mut driver);
    let (platform, _) = driver.shut_down();
    assert!(platform.alloc.live.is_empty());
}

/// A page that is there with too little permission is changed in place and invalidated, so that the device sees it; one
/// that was not there is not.
#[test]
fn more_permission_is_invalidated() {
    for endpoint in all(ENDPOINT) {
        let (mut driver, device) = driver();
        let mut processes = Processes::new();
        let mut sva = Sva::new(&mut driver, &endpoint, SvaOptions::default()).unwrap();
        let id = process(&mut driver, &endpoint, &mut processes, 16);
        let handle = sva.bind(&mut driver, &mut processes, id).unwrap();
        let tables = requests(&device);
        let (space, memory) = processes.get_mut(id).unwrap().parts();
        let frame = memory.populate(&mut driver, space, page(1), AccessFlags::READ).unwrap();
        assert_eq!(requests(&device), []);
        space.protect(&mut driver, range(page(1).0, page(1).0 + 0xfff), Attrs::READ).unwrap();
        requests(&device);
        assert_eq!(device_dma(&driver, &endpoint, &tables, handle.pasid(), 1), None);

        ask(&device, wanted(handle.pasid(), 1, 1, true));
        events(&mut driver, &mut sva);
        sva.serve(&mut driver, &mut processes).unwrap();
        let sent = requests(&device);
        let [Request::Invalidate(Invalidate { scope, caches, leaf, .. }), success] = sent[..] else {
            panic!("{sent:?}")
        };
        let upgraded = range(page(1).0, page(1).0 + 0xfff);
        let pasid = Some(handle.pasid());
        assert_eq!(scope, InvalidateScope::Address { pasid, range: upgraded, page_lg2: 12 });
        assert_eq!((caches, leaf), (Caches::TLB, true));
        assert_eq!(success, response(handle.pasid(), 1, PageResponseCode::Success));
        assert_eq!(device_dma(&driver, &endpoint, &tables, handle.pasid(), 1), Some(frame));
        assert_eq!(processes.get(id).unwrap().handler().counters().upgraded, 1);
        sva.unbind(&mut driver, &mut processes, handle).unwrap();
    }
}

/// Pages of an area that is protected lose their permission at once; areas are cut where the range ends.
#[test]
fn areas_can_be_protected() {
    let (mut driver, _, mut space, mut memory) = memory(&arm(8, &[1]), 100);
    memory.add_area(Area { range: heap(16), attrs: Attrs::READ_WRITE }).unwrap();
    for number in 0..16 {
        memory.populate(&mut driver, &mut space, page(number), AccessFlags::WRITE).unwrap();
    }
    let middle = range(page(4).0, page(7).0 + 0xfff);
    memory.protect(&mut driver, &mut space, middle, Attrs::READ).unwrap();
    let ranges: Vec<_> =
        memory.areas().iter().map(|area| (area.range.start(), area.range.last(), area.attrs.write)).collect();
    let last = |number| Iova(page(number).0 + 0xfff);
    assert_eq!(ranges, [(page(0), last(3), true), (page(4), last(7), false), (page(8), last(15), true)]);
    for number in 0..16 {
        let writable = space.translate(&driver, page(number), Access::WRITE).is_ok();
        assert_eq!(writable, !(4..8).contains(&number));
        assert!(space.translate(&driver, page(number), Access::READ).is_ok());
    }
    memory.protect(&mut driver, &mut space, heap(16), Attrs::READ_WRITE).unwrap();
    assert!(memory.areas().iter().all(|area| area.attrs.write));
    memory.protect(&mut driver, &mut space, range(0, 0xfff), Attrs::READ).unwrap();
    assert_eq!(memory.areas().len(), 3, "a gap stays a gap");
}

/// A discard whose invalidation fails gives nothing back, and the page is found again.
#[test]
fn a_discard_that_fails_loses_no_page() {
    let endpoint = intel(ENDPOINT, &[0x81]);
    let (mut driver, device) = driver();
    let mut processes = Processes::new();
    let mut sva = Sva::new(&mut driver, &endpoint, SvaOptions::default()).unwrap();
    let id = process(&mut driver, &endpoint, &mut processes, 16);
    let _handle = sva.bind(&mut driver, &mut processes, id).unwrap();
    let (space, memory) = processes.get_mut(id).unwrap().parts();
    let frame = memory.populate(&mut driver, space, page(0), AccessFlags::WRITE).unwrap();
    answer(&device, Status::DevErr);
    assert!(memory.discard(&mut driver, space, heap(1)).is_err());
    assert_eq!(memory.resident(), 1);
    assert!(driver.platform().alloc.live.contains(&(frame, 12)));
    answer(&device, Status::Ok);
    assert_eq!(memory.populate(&mut driver, space, page(0), AccessFlags::WRITE), Ok(frame));
    memory.discard(&mut driver, space, heap(1)).unwrap();
    assert!(!driver.platform().alloc.live.contains(&(frame, 12)));
}

/// In place where it can be, taken out first where a large page or a group has to be split; the rest is as it was.
#[test]
fn permissions_of_parts_of_large_pages() {
    for (endpoint, contiguous) in [(arm(8, &[1]), false), (arm(8, &[1]), true), (intel(8, &[2]), false)] {
        let (mut driver, _) = driver();
        let options = SpaceOptions { contiguous, ..SpaceOptions::default() };
        let mut space = AddressSpace::new(&mut driver, &endpoint, options).unwrap();
        let mapped = range(0x4000_0000, 0x4080_ffff);
        space.map(&mut driver, mapped, Gpa(0x8000_0000), Attrs::READ_WRITE).unwrap();
        // From the middle of one large page over a whole one into small pages.
        let changed = range(0x4030_0000, 0x4080_3fff);
        space.protect(&mut driver, changed, Attrs::READ).unwrap();
        for at in (0x4000_0000..=0x4080_ffff).step_by(0x1000) {
            let writable = space.translate(&driver, Iova(at), Access::WRITE).is_ok();
            assert_eq!(writable, !changed.contains(Iova(at)), "{at:#x}");
            let read = space.translate(&driver, Iova(at), Access::READ).unwrap();
            assert_eq!(read.apply(Iova(at)), Gpa(at + 0x4000_0000));
        }
        assert_eq!(space.stale(), None);
        let unaligned = TableError::Edit(EditError::Unaligned);
        assert_eq!(space.protect(&mut driver, range(0x800, 0xfff), Attrs::READ), Err(unaligned));
        let outside = range(1 << 52, (1 << 52) + 0xfff);
        let outside = space.protect(&mut driver, outside, Attrs::READ);
        assert_eq!(outside, Err(TableError::Edit(EditError::InputRange)));
    }
}

/// The old mapping is gone and invalidated before the new one is written.
#[test]
fn a_remap_breaks_before_it_makes() {
    for endpoint in all(ENDPOINT) {
        let (mut driver, device) = driver();
        let mut processes = Processes::new();
        let mut sva = Sva::new(&mut driver, &endpoint, SvaOptions::default()).unwrap();
        let id = process(&mut driver, &endpoint, &mut processes, 16);
        let handle = sva.bind(&mut driver, &mut processes, id).unwrap();
        let tables = requests(&device);
        let (space, _) = processes.get_mut(id).unwrap().parts();
        space.map(&mut driver, heap(1), Gpa(0x1000), Attrs::READ_WRITE).unwrap();
        let memory = driver.platform().memory.clone();
        let absent = Rc::new(RefCell::new(vec![]));
        device.set_script({
            let (absent, endpoint, tables, pasid) =
                (Rc::clone(&absent), endpoint.clone(), tables.clone(), handle.pasid());
            move |readable, writable| {
                assert!(matches!(Request::decode(readable), Ok(Request::Invalidate(_))));
                for request in &tables {
                    let Request::AttachTable(AttachTable { table, .. }) = request else { continue };
                    let (table, of) = canonical(&endpoint, *table);
                    if of.is_none_or(|of| of == pasid) {
                        let pgtable_formats::context::Context::Stage1(stage1) =
                            table.lookup(&memory, Some(pasid)).unwrap()
                        else {
                            panic!()
                        };
                        absent.borrow_mut().push(stage1.walk(&memory, Iova(HEAP), Access::READ).is_err());
                    }
                }
                writable.fill(0);
                4
            }
        });
        space.remap(&mut driver, heap(1), Gpa(0x2000), Attrs::READ_WRITE).unwrap();
        assert_eq!(*absent.borrow(), [true]);
        assert_eq!(device_dma(&driver, &endpoint, &tables, handle.pasid(), 0), Some(Gpa(0x2000)));
        answer(&device, Status::Ok);
        sva.unbind(&mut driver, &mut processes, handle).unwrap();
    }
}

/// An endpoint that cannot wait works for processes whose memory is there, and for no others.
#[test]
fn an_endpoint_without_page_requests_takes_what_is_pinned() {
    for endpoint in all(ENDPOINT) {
        let (mut driver, device) = driver_with(OFFERED - Features::PAGE_REQUEST);
        let before = driver.platform().alloc.live.clone();
        let mut processes = Processes::new();
        let mut sva = Sva::new(&mut driver, &endpoint, SvaOptions::default()).unwrap();
        assert!(!sva.has_page_requests());
        let id = process(&mut driver, &endpoint, &mut processes, 70);
        let refused = Err(SvaError::NotPinned(id));
        assert_eq!(sva.bind(&mut driver, &mut processes, id), refused);
        let (space, memory) = processes.get_mut(id).unwrap().parts();
        let read_only = IovaRange::from_length(Iova(HEAP + (1 << 30)), 3 << 12).unwrap();
        memory.add_area(Area { range: read_only, attrs: Attrs::READ }).unwrap();
        memory.pin(&mut driver, space).unwrap();
        assert_eq!((memory.is_pinned(), memory.resident()), (true, 64 + 3));
        requests(&device);
        let handle = sva.bind(&mut driver, &mut processes, id).unwrap();

        // What goes later, or comes later, has to be pinned anew before somebody else is bound.
        let (space, memory) = processes.get_mut(id).unwrap().parts();
        memory.discard(&mut driver, space, heap(1)).unwrap();
        assert_eq!(sva.bind(&mut driver, &mut processes, id), refused);
        let (space, memory) = processes.get_mut(id).unwrap().parts();
        memory.pin(&mut driver, space).unwrap();
        assert_eq!(memory.counters().made, 64 + 3 + 1);
        let more = IovaRange::from_length(Iova(HEAP + (2 << 30)), 4 << 12).unwrap();
        memory.add_area(Area { range: more, attrs: Attrs::READ }).unwrap();
        assert_eq!(memory.pin(&mut driver, space), Err(PagingError::Full));
        assert!(!memory.is_pinned());

        let answers = |request: &Request| matches!(request, Request::PageResponse(_));
        sva.unbind(&mut driver, &mut processes, handle).unwrap();
        assert!(!requests(&device).iter().any(answers));
        processes.remove(&mut driver, id).unwrap().release(&mut driver);
        sva.release(&mut driver).map_err(|(_, error)| error).unwrap();
        assert_eq!(driver.platform().alloc.live, before);
    }
}

/// A change of permission that fails may have taken pages out: an endpoint that cannot wait takes the process again when
/// they are back.
#[test]
fn what_could_not_be_protected_is_not_pinned() {
    let contiguous = SpaceOptions { contiguous: true, ..SpaceOptions::default() };
    for (endpoint, options) in all(ENDPOINT)
        .into_iter()
        .map(|one| (one, SpaceOptions::default()))
        .chain([(arm(ENDPOINT, &[1]), contiguous)])
    {
        let (mut driver, device) = driver_with(OFFERED - Features::PAGE_REQUEST);
        let mut processes = Processes::new();
        let mut sva = Sva::new(&mut driver, &endpoint, SvaOptions::default()).unwrap();
        let space = AddressSpace::new(&mut driver, &endpoint, options).unwrap();
        let mut memory = DemandPaged::new(&space, 64);
        memory.add_area(Area { range: heap(64), attrs: Attrs::READ_WRITE }).unwrap();
        let id = processes.add(space, memory);
        let (space, memory) = processes.get_mut(id).unwrap().parts();
        memory.pin(&mut driver, space).unwrap();
        let handle = sva.bind(&mut driver, &mut processes, id).unwrap();
        let (space, memory) = processes.get_mut(id).unwrap().parts();
        answer(&device, Status::DevErr);
        memory.protect(&mut driver, space, heap(3), Attrs::READ).unwrap_err();
        assert!(!memory.is_pinned());
        assert_eq!(sva.bind(&mut driver, &mut processes, id), Err(SvaError::NotPinned(id)));
        answer(&device, Status::Ok);
        let (space, memory) = processes.get_mut(id).unwrap().parts();
        memory.pin(&mut driver, space).unwrap();
        assert!((0..64).all(|number| space.translate(&driver, page(number), Access::WRITE).is_ok()));
        let again = sva.bind(&mut driver, &mut processes, id).unwrap();
        for handle in [handle, again] {
            sva.unbind(&mut driver, &mut processes, handle).unwrap();
        }
    }
}
