//! The order of an unbind, step by step, and the end of a process.

extern crate std;

use super::*;
use crate::sva::ExitError;
use crate::tables::TableError;
use crate::{MAX_KEPT_EVENTS, RequestError};
use viommu_wire::{Caches, InvalidateScope, TableDescriptor};

/// Steps 3 to 6 of the module's page: the entry goes, then the invalidation, and with the entry the walk of the hardware
/// ends before the invalidation is sent. Whatever the device has told of the PASID is forgotten then.
#[test]
fn an_unbind_goes_in_order() {
    for endpoint in all(ENDPOINT) {
        let (mut driver, device) = driver();
        let mut processes = Processes::new();
        let mut sva = Sva::new(&mut driver, &endpoint, SvaOptions::default()).unwrap();
        let seen = Rc::default();
        let mut handles = vec![];
        for _ in 0..2 {
            let space = AddressSpace::new(&mut driver, &endpoint, SpaceOptions::default()).unwrap();
            let id = processes.add(space, Scripted { seen: Rc::clone(&seen), answers: vec![] });
            handles.push(sva.bind(&mut driver, &mut processes, id).unwrap());
        }
        let [dying, living] = [handles[0].pasid(), handles[1].pasid()];
        let tables = requests(&device);
        let is_single = tables.iter().all(|request| matches!(request, Request::AttachTable(_)));

        // Kept by its handler; gathering; ready; still in the queue, among others' events.
        ask(&device, wanted(dying, 1, 0, true));
        events(&mut driver, &mut sva);
        sva.serve(&mut driver, &mut processes).unwrap();
        ask(&device, wanted(dying, 2, 1, false));
        ask(&device, wanted(dying, 3, 2, true));
        events(&mut driver, &mut sva);
        let elsewhere = PageRequest { endpoint: EndpointId(77), ..wanted(dying, 9, 0, true) };
        ask(&device, elsewhere);
        ask(&device, wanted(dying, 4, 3, true));
        send(&device, fault());
        ask(&device, wanted(living, 4, 4, true));

        // When the device sees the invalidation, the entry is not there any more.
        let gone = Rc::new(RefCell::new(vec![]));
        let memory = driver.platform().memory.clone();
        device.set_script({
            let (gone, endpoint, tables) = (Rc::clone(&gone), endpoint.clone(), tables.clone());
            move |readable, writable| {
                if let Ok(Request::Invalidate(_)) = Request::decode(readable) {
                    let Request::AttachTable(AttachTable { table, .. }) = tables[0] else { panic!() };
                    let (table, _) = canonical(&endpoint, table);
                    gone.borrow_mut().push(table.lookup(&memory, Some(dying)).is_err());
                }
                writable.fill(0);
                writable.len() as u32
            }
        });
        sva.unbind(&mut driver, &mut processes, handles.remove(0)).unwrap();
        let sent = requests(&device);
        assert_eq!(sent.len(), 1, "the device has answered its groups itself: {sent:?}");
        match sent[0] {
            Request::AttachTable(AttachTable { table: TableDescriptor::Unbind { pasid }, .. }) => {
                assert!(is_single);
                assert_eq!(pasid, dying);
            }
            Request::Invalidate(Invalidate { scope, caches, leaf, tag, .. }) => {
                assert!(!is_single);
                assert_eq!(
                    (scope, caches, leaf),
                    (InvalidateScope::Pasid(Some(dying)), Caches::all(), false)
                );
                assert_eq!(
                    tag.is_some(),
                    matches!(endpoint.properties().hardware, Some(Hardware::Smmuv3(_)))
                );
                assert_eq!(*gone.borrow(), [true]);
            }
            request => panic!("{request:?}"),
        }
        assert_eq!((sva.open_groups(), sva.has_work()), (1, true), "the living one's");
        let counters = sva.group_counters();
        assert_eq!((counters.revoked, counters.drained, counters.received), (3, 1, 5));

        // What was others' was kept, in order, and the living process is served.
        assert_eq!(driver.kept_events(), 2);
        assert_eq!(events(&mut driver, &mut sva), [Event::PageRequest(elsewhere), fault()]);
        sva.serve(&mut driver, &mut processes).unwrap();
        let token = seen.borrow().last().unwrap().0;
        assert_eq!((token.pasid(), requests(&device)), (Some(living), vec![]));

        // A device that tells of one all the same gets an answer, but no handler of the dead is asked.
        ask(&device, wanted(dying, 2, 1, true));
        events(&mut driver, &mut sva);
        sva.serve(&mut driver, &mut processes).unwrap();
        assert_eq!(requests(&device), [response(dying, 2, PageResponseCode::Invalid)]);
        assert_eq!((seen.borrow().len(), sva.serve_counters().strays), (2, 1));
    }
}

/// Whatever the device had told of a PASID, nothing of it reaches the process that gets the PASID next: not a group that
/// was not whole, not one that waits to be refused, not an event that another endpoint's unbind has put aside.
#[test]
fn a_new_process_sees_nothing_of_the_one_before() {
    for endpoint in all(ENDPOINT) {
        let (mut driver, device) = driver();
        let mut processes = Processes::new();
        let limits = GroupLimits { groups_per_pasid: 2, ..GroupLimits::default() };
        let options = SvaOptions { limits, ..SvaOptions::default() };
        let mut sva = Sva::new(&mut driver, &endpoint, options).unwrap();
        let mut other = Sva::new(&mut driver, &arm(9, &[1]), SvaOptions::default()).unwrap();
        let seen = Rc::default();
        let ids = [(); 3].map(|()| {
            let space = AddressSpace::new(&mut driver, &endpoint, SpaceOptions::default());
            processes.add(
                space.unwrap_or_else(|error| panic!("{error}")),
                Scripted { seen: Rc::clone(&seen), answers: vec![] },
            )
        });
        let theirs = {
            let space = AddressSpace::new(&mut driver, &arm(9, &[1]), SpaceOptions::default()).unwrap();
            processes.add(space, Scripted::default())
        };
        let handle = sva.bind(&mut driver, &mut processes, ids[0]).unwrap();
        let elsewhere = other.bind(&mut driver, &mut processes, theirs).unwrap();
        let pasid = handle.pasid();

        // Gathering, whole, and a third one that is refused; then two requests that lie in the queue, where the unbind of
        // another endpoint finds them first.
        for (group, last) in [(1, false), (2, true), (3, true)] {
            ask(&device, wanted(pasid, group, group.into(), last));
        }
        events(&mut driver, &mut sva);
        sva.serve(&mut driver, &mut processes).unwrap();
        ask(&device, wanted(pasid, 4, 4, true));
        events(&mut driver, &mut sva);
        assert_eq!(sva.group_counters().refused, 1, "{:?}", sva.group_counters());
        ask(&device, wanted(pasid, 5, 5, false));
        ask(&device, wanted(pasid, 6, 6, true));
        other.unbind(&mut driver, &mut processes, elsewhere).unwrap();
        assert_eq!(driver.kept_events(), 2);
        requests(&device);
        seen.borrow_mut().clear();

        sva.unbind(&mut driver, &mut processes, handle).unwrap();
        let new = sva.bind(&mut driver, &mut processes, ids[1]).unwrap();
        assert_eq!((new.pasid(), driver.kept_events(), sva.open_groups()), (pasid, 0, 0));
        requests(&device);
        // The same names, each with one request.
        for group in 1..=6 {
            ask(&device, wanted(pasid, group, 40, true));
            assert_eq!(events(&mut driver, &mut sva), []);
            assert_eq!(sva.serve(&mut driver, &mut processes), Ok(1));
            assert_eq!(requests(&device), [], "the handler answers later");
            let (token, asked) = seen.borrow_mut().pop().unwrap();
            assert_eq!(asked, [wanted(pasid, group, 40, true)]);
            sva.answer(&mut driver, &processes, token, PageResponseCode::Success).unwrap();
            assert_eq!(requests(&device), [response(pasid, group, PageResponseCode::Success)]);
        }
        sva.unbind(&mut driver, &mut processes, new).unwrap();
    }
}

/// A PASID that is not drained is not given to another process.
#[test]
fn a_pasid_is_free_only_when_all_steps_were_done() {
    for endpoint in all(ENDPOINT) {
        let (mut driver, device) = driver();
        let mut processes = Processes::new();
        let mut sva = Sva::new(&mut driver, &endpoint, SvaOptions::default()).unwrap();
        let old = process(&mut driver, &endpoint, &mut processes, 16);
        let new = process(&mut driver, &endpoint, &mut processes, 16);
        let handle = sva.bind(&mut driver, &mut processes, old).unwrap();
        let pasid = handle.pasid();

        // Step 4 fails.
        answer(&device, Status::DevErr);
        let (handle, error) = sva.unbind(&mut driver, &mut processes, handle).unwrap_err();
        let refused = RequestError::Status(Status::DevErr);
        assert_eq!(error, SvaError::Table(TableError::Request(refused)));
        answer(&device, Status::Ok);
        assert_eq!(sva.bind(&mut driver, &mut processes, old), Err(SvaError::Unbinding(old)));
        let other = sva.bind(&mut driver, &mut processes, new).unwrap();
        assert_ne!(other.pasid(), pasid);
        // Step 2 holds: the binding is marked.
        requests(&device);
        ask(&device, wanted(pasid, 1, 0, true));
        events(&mut driver, &mut sva);
        sva.serve(&mut driver, &mut processes).unwrap();
        assert_eq!(requests(&device), [response(pasid, 1, PageResponseCode::Invalid)]);
        assert_eq!(processes.get(old).unwrap().handler().resident(), 0);
        sva.unbind(&mut driver, &mut processes, other).unwrap();

        // Step 5 fails: more events of others than are kept.
        for _ in 0..MAX_KEPT_EVENTS / 16 {
            (0..16).for_each(|_| send(&device, fault()));
            driver.sweep_events(Some).unwrap();
        }
        let (_handle, error) = sva.unbind(&mut driver, &mut processes, handle).unwrap_err();
        assert_eq!((error, sva.pasid_of(old)), (SvaError::Events, Some(pasid)));
        send(&device, fault());
        assert_eq!(events(&mut driver, &mut sva).len(), MAX_KEPT_EVENTS + 1, "none was lost");

        sva.retry_unbinds(&mut driver, &mut processes).unwrap();
        assert_eq!((sva.pasid_of(old), sva.bound()), (None, 0));
        let again = sva.bind(&mut driver, &mut processes, new).unwrap();
        assert_eq!(again.pasid(), pasid);
    }
}

/// The end of a process that devices work for: emptied and invalidated everywhere first, then unbound.
#[test]
fn a_process_ends_while_it_is_bound() {
    for endpoint in all(ENDPOINT) {
        let (mut driver, device) = driver();
        let before = driver.platform().alloc.live.clone();
        let mut processes = Processes::new();
        let mut sva = Sva::new(&mut driver, &endpoint, SvaOptions::default()).unwrap();
        let id = process(&mut driver, &endpoint, &mut processes, 16);
        let handle = sva.bind(&mut driver, &mut processes, id).unwrap();
        let pasid = handle.pasid();
        let tables = requests(&device);
        let (space, memory) = processes.get_mut(id).unwrap().parts();
        for page in 0..5 {
            memory.populate(&mut driver, space, Iova(HEAP + (page << 12)), AccessFlags::WRITE).unwrap();
        }
        assert!(device_dma(&driver, &endpoint, &tables, pasid, 0).is_some());

        // A device that does not go along: nothing is mapped any more, and no memory went.
        let live = driver.platform().alloc.live.clone();
        answer(&device, Status::DevErr);
        assert!(matches!(processes.exit(&mut driver, id), Err(ExitError::Table(TableError::Request(_)))));
        assert_eq!(driver.platform().alloc.live, live);
        requests(&device);
        answer(&device, Status::Ok);
        processes.exit(&mut driver, id).unwrap();
        let sent = requests(&device);
        let [Request::Invalidate(Invalidate { scope, caches, leaf, .. })] = sent[..] else {
            panic!("{sent:?}")
        };
        assert_eq!((scope, caches, leaf), (InvalidateScope::Pasid(Some(pasid)), Caches::TLB, false));
        for page in 0..5 {
            assert_eq!(device_dma(&driver, &endpoint, &tables, pasid, page), None);
        }

        // The PASID is there still; nobody can map, bind, or page in.
        assert_eq!(sva.bind(&mut driver, &mut processes, id), Err(SvaError::Ended(id)));
        ask(&device, wanted(pasid, 1, 0, true));
        events(&mut driver, &mut sva);
        sva.serve(&mut driver, &mut processes).unwrap();
        assert_eq!(requests(&device), [response(pasid, 1, PageResponseCode::Invalid)]);
        let (space, _) = processes.get_mut(id).unwrap().parts();
        for refused in [
            space.map(&mut driver, heap(1), Gpa(0x1000), Attrs::READ),
            space.remap(&mut driver, heap(1), Gpa(0x1000), Attrs::READ),
            space.protect(&mut driver, heap(1), Attrs::READ),
        ] {
            assert_eq!(refused, Err(TableError::Closed));
        }
        assert!(matches!(processes.remove(&mut driver, id), Err(ExitError::Table(TableError::InUse))));

        sva.unbind(&mut driver, &mut processes, handle).unwrap();
        processes.remove(&mut driver, id).unwrap().release(&mut driver);
        sva.release(&mut driver).map_err(|(_, error)| error).unwrap();
        assert_eq!(driver.platform().alloc.live, before);
    }
}

/// What a handler left for later is INVALID once the process has ended.
#[test]
fn a_late_answer_for_the_dead_is_invalid() {
    let (mut driver, device) = driver();
    let endpoint = arm(ENDPOINT, &[1]);
    let mut processes = Processes::new();
    let mut sva = Sva::new(&mut driver, &endpoint, SvaOptions::default()).unwrap();
    let seen = Rc::default();
    let space = AddressSpace::new(&mut driver, &endpoint, SpaceOptions::default()).unwrap();
    let id = processes.add(space, Scripted { seen: Rc::clone(&seen), answers: vec![] });
    let handle = sva.bind(&mut driver, &mut processes, id).unwrap();
    for group in [1, 2] {
        ask(&device, wanted(handle.pasid(), group, 0, true));
    }
    events(&mut driver, &mut sva);
    sva.serve(&mut driver, &mut processes).unwrap();
    processes.exit(&mut driver, id).unwrap();
    requests(&device);
    let (first, second) = (seen.borrow()[0].0, seen.borrow()[1].0);
    sva.answer(&mut driver, &processes, first, PageResponseCode::Success).unwrap();
    assert_eq!(requests(&device), [response(handle.pasid(), 1, PageResponseCode::Invalid)]);
    sva.unbind(&mut driver, &mut processes, handle).unwrap();
    assert_eq!(requests(&device).len(), 1, "group 2 is the device's to answer");
    let late = sva.answer(&mut driver, &processes, second, PageResponseCode::Success);
    assert_eq!((late, requests(&device)), (Err(SvaError::Answered), vec![]));
}

/// A handle is one binding's, of one endpoint.
#[test]
fn handles_of_others_are_refused() {
    let (mut driver, _) = driver();
    let mut processes = Processes::new();
    let mut first = Sva::new(&mut driver, &arm(8, &[1]), SvaOptions::default()).unwrap();
    let mut second = Sva::new(&mut driver, &arm(9, &[1]), SvaOptions::default()).unwrap();
    let id = process(&mut driver, &arm(8, &[1]), &mut processes, 1);
    let handle = first.bind(&mut driver, &mut processes, id).unwrap();
    let _mine = second.bind(&mut driver, &mut processes, id).unwrap();
    let (handle, error) = second.unbind(&mut driver, &mut processes, handle).unwrap_err();
    assert_eq!((error, second.bound()), (SvaError::NotBound, 1));
    let (mut first, error) = first.release(&mut driver).unwrap_err();
    assert_eq!(error, SvaError::InUse);
    first.unbind(&mut driver, &mut processes, handle).unwrap();
    first.release(&mut driver).map_err(|(_, error)| error).unwrap();
    let nobody = {
        let other = process(&mut driver, &arm(8, &[1]), &mut processes, 1);
        processes.remove(&mut driver, other).unwrap().release(&mut driver);
        other
    };
    assert_eq!(second.bind(&mut driver, &mut processes, nobody), Err(SvaError::NoProcess(nobody)));
    assert_eq!(processes.exit(&mut driver, nobody), Err(ExitError::NoProcess(nobody)));
}

/// Answers, or does not return.
#[derive(Debug)]
struct Panicking(bool);

impl FaultHandler<FakePlatform, FakeTransport> for Panicking {
    fn handle(&mut self, _: &mut TestDriver, _: &mut AddressSpace, _: &PageGroup<'_>) -> Answer {
        if self.0 {
            std::panic::resume_unwind(alloc::boxed::Box::new(()));
        }
        Answer::Success
    }
}

/// What was answered in a round that a handler did not return from goes out with the next, unless the PASID is somebody
/// else's by then, or the group another one.
#[test]
fn an_answer_that_was_left_meets_nobody_else() {
    for endpoint in all(ENDPOINT) {
        let (mut driver, device) = driver();
        let mut processes = Processes::new();
        let mut sva = Sva::new(&mut driver, &endpoint, SvaOptions::default()).unwrap();
        let bind = |driver: &mut TestDriver, processes: &mut Processes<Panicking>, sva: &mut Sva, panics| {
            let space = AddressSpace::new(driver, &endpoint, SpaceOptions::default()).unwrap();
            let id = processes.add(space, Panicking(panics));
            sva.bind(driver, processes, id).unwrap()
        };
        let [going, staying] = [(); 2].map(|()| bind(&mut driver, &mut processes, &mut sva, false));
        let panicking = bind(&mut driver, &mut processes, &mut sva, true);
        let pasid = going.pasid();
        for (pasid, group) in [(pasid, 1), (staying.pasid(), 2), (staying.pasid(), 3), (panicking.pasid(), 4)]
        {
            ask(&device, wanted(pasid, group, 0, true));
        }
        events(&mut driver, &mut sva);
        requests(&device);
        let round = core::panic::AssertUnwindSafe(|| sva.serve(&mut driver, &mut processes));
        assert!(std::panic::catch_unwind(round).is_err());
        assert_eq!(requests(&device), []);

        // The device has answered group 3 by itself and asks for another of that number, which is not whole yet.
        ask(&device, wanted(staying.pasid(), 3, 5, false));
        sva.unbind(&mut driver, &mut processes, going).unwrap();
        let next = bind(&mut driver, &mut processes, &mut sva, false);
        assert_eq!(next.pasid(), pasid);
        events(&mut driver, &mut sva);
        // Of the PASID the device has asked again by now, and nobody has looked yet.
        ask(&device, wanted(pasid, 1, 7, true));
        requests(&device);
        sva.serve(&mut driver, &mut processes).unwrap();
        assert_eq!(requests(&device), [response(staying.pasid(), 2, PageResponseCode::Success)]);
    }
}
