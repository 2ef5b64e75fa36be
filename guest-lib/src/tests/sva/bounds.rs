//! Devices that flood, repeat themselves, never come to an end, or send garbage.

use super::*;

const LIMITS: GroupLimits = GroupLimits { groups: 8, groups_per_pasid: 4, requests_per_group: 3 };

struct Bound {
    driver: TestDriver,
    device: FakeTransport,
    processes: Processes<DemandPaged>,
    sva: Sva,
    handles: Vec<Handle>,
}

fn bound(processes_wanted: usize) -> Bound {
    let (mut driver, device) = driver();
    let endpoint = intel(ENDPOINT, &[2]);
    let mut processes = Processes::new();
    let options = SvaOptions { limits: LIMITS, ..SvaOptions::default() };
    let mut sva = Sva::new(&mut driver, &endpoint, options).unwrap();
    let mut handles = vec![];
    for _ in 0..processes_wanted {
        let id = process(&mut driver, &endpoint, &mut processes, 64);
        handles.push(sva.bind(&mut driver, &mut processes, id).unwrap());
    }
    requests(&device);
    Bound { driver, device, processes, sva, handles }
}

impl Bound {
    fn tell(&mut self, request: PageRequest) {
        assert!(self.sva.receive(&Event::PageRequest(request)));
    }

    fn served(&mut self) -> Vec<Request> {
        self.sva.serve(&mut self.driver, &mut self.processes).unwrap();
        requests(&self.device)
    }
}

/// Groups that never get whole make room for those that do.
#[test]
fn groups_without_an_end_do_not_pile_up() {
    let mut bound = bound(2);
    let [bad, good] = [bound.handles[0].pasid(), bound.handles[1].pasid()];
    for group in 0..10_000 {
        bound.tell(wanted(bad, group, 0, false));
        assert!(bound.sva.open_groups() <= LIMITS.groups_per_pasid);
    }
    assert_eq!(bound.sva.group_counters().evicted, 10_000 - 4);
    bound.tell(wanted(good, 1, 1, true));
    assert_eq!(bound.served(), [response(good, 1, PageResponseCode::Success)]);
    // The end of one that was forgotten is served as what is known of it.
    bound.tell(wanted(bad, 3, 2, true));
    assert_eq!(bound.served(), [response(bad, 3, PageResponseCode::Success)]);
    // So do those of a PASID that nobody has, and of untagged DMA.
    let nobody = Pasid::new(200).unwrap();
    for group in 0..100 {
        bound.tell(wanted(nobody, group, 0, false));
        bound.tell(PageRequest { pasid: None, ..wanted(nobody, group, 0, false) });
        assert!(bound.sva.open_groups() <= LIMITS.groups);
    }
    bound.tell(wanted(good, 2, 3, true));
    assert_eq!(bound.served(), [response(good, 2, PageResponseCode::Success)]);
}

/// A group keeps a bounded number of requests; the device asks again for the others.
#[test]
fn a_group_without_an_end_does_not_grow() {
    let mut bound = bound(1);
    let pasid = bound.handles[0].pasid();
    for page in 0..20 {
        bound.tell(wanted(pasid, 1, page, false));
    }
    for _ in 0..1000 {
        bound.tell(wanted(pasid, 1, 0, false));
    }
    let counters = *bound.sva.group_counters();
    assert_eq!((counters.truncated, counters.repeated, counters.received), (17, 1000, 1020));
    bound.tell(wanted(pasid, 1, 63, true));
    assert_eq!(bound.served(), [response(pasid, 1, PageResponseCode::Success)]);
    let process = bound.handles[0].process();
    assert_eq!(bound.processes.get(process).unwrap().handler().resident(), 3);
}

/// Whole groups beyond the bounds are answered INVALID, each, and a process does not take the room of others.
#[test]
fn whole_groups_beyond_the_bounds_are_invalid() {
    let mut bound = bound(3);
    let pasids: Vec<_> = bound.handles.iter().map(Handle::pasid).collect();
    for group in 0..6 {
        bound.tell(wanted(pasids[0], group, group.into(), true));
    }
    assert_eq!((bound.sva.open_groups(), bound.sva.group_counters().refused), (4, 2));
    for group in 0..4 {
        bound.tell(wanted(pasids[1], group, group.into(), true));
    }
    bound.tell(wanted(pasids[2], 0, 0, true));
    bound.tell(wanted(pasids[2], 1, 0, false));
    let counters = *bound.sva.group_counters();
    assert_eq!((bound.sva.open_groups(), counters.refused, counters.dropped), (8, 3, 1));
    let mut sent = bound.served();
    let refused = sent.split_off(8);
    assert_eq!(
        refused,
        [(pasids[0], 4), (pasids[0], 5), (pasids[2], 0)].map(|(pasid, group)| response(
            pasid,
            group,
            PageResponseCode::Invalid
        ))
    );
    assert!(sent.iter().all(|request| matches!(
        request,
        Request::PageResponse(PageResponse { code: PageResponseCode::Success, .. })
    )));
    assert_eq!(bound.sva.open_groups(), 0);

    // A device that does not wait for answers does not fill the list of refusals either.
    for group in 0..1000 {
        bound.tell(wanted(pasids[0], group, 0, true));
    }
    assert_eq!(bound.sva.group_counters().dropped, 1 + 1000 - 4 - 8);
    assert_eq!(bound.served().len(), 4 + 8);
}

/// Records that mean nothing are counted, and cost a buffer for a moment only.
#[test]
fn garbage_is_passed_over() {
    let mut bound = bound(1);
    let pasid = bound.handles[0].pasid();
    let mut record = [0; 48];
    Event::PageRequest(wanted(pasid, 1, 0, true)).encode(&mut record).unwrap();
    // Cut off, reserved bytes set, a PASID of more than 20 bits.
    assert!(bound.device.send_event(&record, 24));
    assert!(bound.device.send_event(&record, 47));
    record[2] = 1;
    assert!(bound.device.send_event(&record, 48));
    record[2] = 0;
    record[15] = 1;
    assert!(bound.device.send_event(&record, 48));
    // Said to be longer than the buffer is: what there is counts.
    record[15] = 0;
    assert!(bound.device.send_event(&record, 9999));
    assert_eq!(events(&mut bound.driver, &mut bound.sva), []);
    assert_eq!(bound.driver.event_counters().ignored, 4);
    assert_eq!(bound.served(), [response(pasid, 1, PageResponseCode::Success)]);

    // Others' are not taken, and every buffer is back.
    let other = PageRequest { endpoint: EndpointId(99), ..wanted(pasid, 1, 0, true) };
    (0..16).for_each(|_| ask(&bound.device, other));
    assert_eq!(events(&mut bound.driver, &mut bound.sva).len(), 16);
    // A PASID that nobody has, and untagged DMA.
    let nobody = Pasid::new(99).unwrap();
    bound.tell(wanted(nobody, 5, 0, true));
    bound.tell(PageRequest { pasid: None, ..wanted(nobody, 6, 0, true) });
    let untagged = PageResponse {
        endpoint: EndpointId(ENDPOINT),
        pasid: None,
        group_id: 6,
        code: PageResponseCode::Invalid,
    };
    assert_eq!(
        bound.served(),
        [response(nobody, 5, PageResponseCode::Invalid), Request::PageResponse(untagged)]
    );
}

/// A response that fails is not sent again: by then the group may be another one.
#[test]
fn an_answer_is_sent_once() {
    let mut bound = bound(1);
    let pasid = bound.handles[0].pasid();
    for group in 0..3 {
        bound.tell(wanted(pasid, group, 0, true));
    }
    answer(&bound.device, Status::Inval);
    let failed = bound.sva.serve(&mut bound.driver, &mut bound.processes);
    assert_eq!(failed, Err(SvaError::Request(crate::RequestError::Status(Status::Inval))));
    assert_eq!(requests(&bound.device).len(), 3, "the others go out, too");
    answer(&bound.device, Status::Ok);
    assert_eq!((bound.served(), bound.sva.open_groups()), (vec![], 0));
    assert_eq!(bound.sva.serve_counters().failed, 3);
}
