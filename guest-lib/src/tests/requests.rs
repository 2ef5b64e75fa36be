//! Bring-up, requests one by one and many at once, devices that do not answer, events.

use alloc::{vec, vec::Vec};

use viommu_wire::{
    AccessFlags, Attach, AttachFlags, Detach, DomainId, EndpointId, Event, FaultEvent, FaultReason, Features,
    Gpa, Iova, IovaRange, Map, MapFlags, Request, Status, Unmap,
};

use super::{OFFERED, driver, driver_with, hex};
use crate::hal::TransportError;
use crate::hal::fake::{self, FakeTransport, Mood};
use crate::queue::QueueError;
use crate::{
    BypassDomain, DomainError, Driver, DriverOptions, Endpoint, EndpointProperties, InitError, MappedDomain,
    Mapping, Refusal, RequestError,
};

fn map(page: u64) -> Request {
    Request::Map(Map {
        domain: DomainId(1),
        virt_start: Iova(page << 12),
        virt_end: Iova((page << 12) + 0xfff),
        phys_start: Gpa(page << 12),
        flags: MapFlags::READ,
    })
}

fn plain_endpoint(id: u32) -> Endpoint {
    Endpoint::new(EndpointId(id), EndpointProperties::default())
}

fn range(first: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova(first), Iova(last)).unwrap()
}

#[test]
fn bring_up_goes_in_the_order_of_the_standard() {
    let (driver, device) = driver();
    assert_eq!(device.0.borrow().calls, ["reset", "accept", "requestq", "eventq", "start"]);
    assert_eq!(driver.granule_lg2(), 12);
    assert_eq!(*driver.config(), fake::config());
}

fn bring_up(
    prepare: impl FnOnce(&FakeTransport),
    features: Features,
    options: DriverOptions,
) -> (Option<InitError>, Vec<&'static str>) {
    let platform = fake::platform();
    let device = FakeTransport::new(platform.memory.clone(), features);
    prepare(&device);
    let error = Driver::new(platform, device.clone(), options).err();
    let calls = device.0.borrow().calls.clone();
    (error, calls)
}

#[test]
fn bring_up_refuses_what_it_cannot_drive() {
    let options = DriverOptions::default();
    let (error, calls) = bring_up(|_| (), Features::DEVICE, options);
    assert_eq!((error, calls), (Some(InitError::Legacy), vec!["reset", "fail"]));

    let required = DriverOptions { required: Features::ATTACH_TABLE, ..options };
    let (error, _) = bring_up(|_| (), OFFERED - Features::ATTACH_TABLE, required);
    assert_eq!(error, Some(InitError::Missing(Features::ATTACH_TABLE)));

    let (error, calls) = bring_up(|device| device.0.borrow_mut().refuses_features = true, OFFERED, options);
    assert_eq!(error, Some(InitError::Transport(TransportError::FeaturesRefused)));
    assert_eq!(calls.last(), Some(&"fail"));

    let (error, _) = bring_up(|device| device.0.borrow_mut().config[..8].fill(0), OFFERED, options);
    assert_eq!(error, Some(InitError::Config));

    let (error, _) = bring_up(|device| device.0.borrow_mut().config[32..36].fill(0xff), OFFERED, options);
    assert_eq!(error, Some(InitError::ProbeSize(u32::MAX)));

    let (error, _) = bring_up(|device| device.0.borrow_mut().max_queue_size = 1, OFFERED, options);
    assert_eq!(error, Some(InitError::QueueSize { queue: 0, size: 1 }));
}

#[test]
fn configuration_is_read_as_of_one_moment() {
    let options = DriverOptions::default();
    assert_eq!(bring_up(|device| device.0.borrow_mut().config_changes = 9, OFFERED, options).0, None);
    let (error, _) = bring_up(|device| device.0.borrow_mut().config_changes = u32::MAX, OFFERED, options);
    assert_eq!(error, Some(InitError::Config));
}

/// The vectors of the wire format, as they arrive at the device.
#[test]
fn golden_bytes_of_requests() {
    let (mut driver, device) = driver();
    let endpoint = plain_endpoint(8);
    driver.attach(DomainId(1), &endpoint, AttachFlags::empty()).unwrap();
    driver.attach(DomainId(2), &plain_endpoint(0x10008), AttachFlags::BYPASS).unwrap();
    driver.map(DomainId(1), range(0x1000, 0x1fff), Gpa(0xa000), MapFlags::READ | MapFlags::WRITE).unwrap();
    driver.unmap(DomainId(1), range(0x1000, 0x1fff)).unwrap();
    driver.detach(DomainId(1), EndpointId(8)).unwrap();
    driver.probe(EndpointId(8)).unwrap();
    let expected = [
        "01000000 01000000 08000000 00000000 00000000",
        "01000000 02000000 08000100 01000000 00000000",
        "03000000 01000000 0010000000000000 ff1f000000000000 00a0000000000000 03000000",
        "04000000 01000000 0010000000000000 ff1f000000000000 00000000",
        "02000000 01000000 08000000 0000000000000000",
    ];
    let requests = device.take_requests();
    for (request, expected) in requests.iter().zip(expected) {
        assert_eq!(*request, hex(expected));
    }
    assert_eq!((requests[5].len(), &requests[5][..8]), (72, &hex("05000000 08000000")[..]));
}

#[test]
fn a_batch_is_one_notification_for_each_queue_of_requests() {
    for (extra, room) in [(Features::empty(), 8), (Features::RING_INDIRECT_DESC, 16)] {
        let (mut driver, device) = driver_with(OFFERED | extra);
        let mut answers = vec![];
        driver.send_all((1..=100).map(map), |index, answer| answers.push((index, answer)));
        assert_eq!(answers, (0..100).map(|index| (index, Ok(()))).collect::<Vec<_>>());
        let counters = *driver.counters();
        assert_eq!((counters.requests, counters.notifications), (100, 100u64.div_ceil(room)));
        assert_eq!((counters.readable_bytes, counters.writable_bytes), (3600, 400));
        assert_eq!(device.0.borrow().notifications[0], 100u32.div_ceil(room as u32));
        assert!(device.0.borrow().received.iter().all(|received| received.indirect != extra.is_empty()));
    }
}

#[test]
fn each_request_of_a_batch_has_its_own_status() {
    let (mut driver, device) = driver();
    device.set_script(|readable, writable| {
        let page = readable[9] >> 4;
        writable.copy_from_slice(&[if page % 3 == 0 { 4 } else { 0 }, 0, 0, 0]);
        4
    });
    let mut requests: Vec<_> = (1..=7).map(map).collect();
    requests[4] = map(1 << 40); // outside of input_range: not sent
    let mut answers = vec![None; 7];
    driver.send_all(requests, |index, answer| assert!(answers[index].replace(answer).is_none()));
    let answers: Vec<_> = answers.into_iter().map(Option::unwrap).collect();
    let inval = Err(RequestError::Status(Status::Inval));
    assert!(matches!(answers[4], Err(RequestError::Refused(Refusal::Range(_)))));
    assert_eq!([answers[2], answers[5]], [inval, inval]);
    assert!([0, 1, 3, 6].iter().all(|index| answers[*index] == Ok(())));
    assert_eq!(device.0.borrow().received.len(), 6);
}

#[test]
fn a_silent_device_does_not_hold_the_driver_and_late_answers_are_not_mistaken() {
    let (mut driver, device) = driver();
    device.0.borrow_mut().mood = Mood::Silent;
    let mut failed = 0;
    driver.send_all((1..=3).map(map), |_, answer| {
        assert_eq!(answer, Err(RequestError::Transport(TransportError::Gone)));
        failed += 1;
    });
    assert_eq!(failed, 3);
    // The late answers refuse, the new requests succeed.
    device.set_script({
        let mut late = 3;
        move |_, writable| {
            writable.copy_from_slice(&[if late > 0 { 3 } else { 0 }, 0, 0, 0]);
            late -= 1.min(late);
            4
        }
    });
    device.0.borrow_mut().mood = Mood::Obedient;
    let mut answers = vec![];
    driver.send_all((1..=20).map(map), |_, answer| answers.push(answer));
    assert_eq!(answers, vec![Ok(()); 20]);
}

#[test]
fn a_queue_full_of_unanswered_requests_is_no_dead_end() {
    let (mut driver, device) = driver();
    device.0.borrow_mut().mood = Mood::Silent;
    driver.send_all((1..=8).map(map), |_, answer| assert!(answer.is_err()));
    assert_eq!(driver.send(map(9)), Err(RequestError::Transport(TransportError::Gone)));
    assert_eq!(driver.probe(EndpointId(1)).err(), Some(RequestError::Transport(TransportError::Gone)));
    device.0.borrow_mut().mood = Mood::Obedient;
    assert_eq!(driver.send(map(9)), Ok(()));
    assert!(driver.probe(EndpointId(1)).is_ok());
}

#[test]
fn an_unanswered_probe_keeps_its_buffer() {
    let (mut driver, device) = driver();
    device.0.borrow_mut().mood = Mood::Silent;
    let gone = Some(RequestError::Transport(TransportError::Gone));
    assert_eq!(driver.probe(EndpointId(1)).err(), gone);
    assert_eq!(driver.probe(EndpointId(1)).err(), gone);
    device.0.borrow_mut().mood = Mood::Obedient;
    assert!(driver.probe(EndpointId(1)).is_ok());
    assert_eq!(device.take_requests().len(), 2);
}

#[test]
fn the_late_answer_to_a_probe_is_not_taken_for_another() {
    let (mut driver, device) = driver();
    device.0.borrow_mut().mood = Mood::Silent;
    assert!(driver.probe(EndpointId(1)).is_err());
    device.0.borrow_mut().mood = Mood::Obedient;
    let mut answers = vec![];
    driver.send_all([map(1)], |index, answer| answers.push((index, answer)));
    assert_eq!(answers, [(0, Ok(()))]);
    assert_eq!(device.take_requests().iter().map(|request| request[0]).collect::<Vec<_>>(), [5, 3]);
}

/// An OK that an earlier request left in the buffer is not the answer of a later one.
#[test]
fn an_answer_that_was_claimed_but_not_written_is_none() {
    let (mut driver, device) = driver();
    assert_eq!(driver.send(map(1)), Ok(()));
    assert!(driver.probe(EndpointId(1)).is_ok());
    device.set_script(|_, writable| writable.len() as u32);
    for _ in 0..16 {
        assert_eq!(driver.send(map(1)), Err(RequestError::BadAnswer));
        assert_eq!(driver.probe(EndpointId(1)).err(), Some(RequestError::BadAnswer));
    }
}

#[test]
fn a_hostile_used_entry_fails_the_batch_and_not_the_driver() {
    let (mut driver, device) = driver();
    device.0.borrow_mut().mood = Mood::Silent;
    device.push_used(0, 77, 4);
    device.0.borrow_mut().mood = Mood::Obedient;
    let mut answers = vec![];
    driver.send_all((1..=2).map(map), |_, answer| answers.push(answer));
    assert!(answers.iter().all(|answer| matches!(answer, Err(RequestError::Queue(_)))), "{answers:?}");
    assert_eq!(answers.len(), 2);
}

#[test]
fn memory_comes_back_at_the_end() {
    let (driver, device) = driver_with(OFFERED | Features::RING_INDIRECT_DESC);
    let (platform, _) = driver.shut_down();
    assert!(platform.alloc.live.is_empty());
    assert_eq!(device.0.borrow().calls.last(), Some(&"reset"));
}

#[test]
fn domain_ids_stay_in_the_range_and_are_given_once() {
    let (mut driver, _) = driver();
    let all: Vec<_> = core::iter::from_fn(|| driver.new_domain_id()).collect();
    assert_eq!(all, (1..=100).map(DomainId).collect::<Vec<_>>());
    assert_eq!(BypassDomain::new(&mut driver).err(), Some(DomainError::NoDomain));
}

#[test]
fn a_mapped_domain_follows_what_the_device_answered() {
    let (mut driver, device) = driver();
    let mut domain = MappedDomain::new(&mut driver).unwrap();
    domain.attach(&mut driver, &plain_endpoint(8)).unwrap();
    device.set_script(|readable, writable| {
        writable.copy_from_slice(&[if readable[9] == 0x30 { 8 } else { 0 }, 0, 0, 0]);
        4
    });
    let mappings: Vec<_> = (1..=4)
        .map(|page| Mapping {
            range: range(page << 12, (page << 12) + 0xfff),
            target: Gpa(0),
            flags: MapFlags::READ,
        })
        .collect();
    let mut failed = vec![];
    domain.map_all(&mut driver, &mappings, |index, error| failed.push((index, error)));
    assert_eq!(failed, [(2, DomainError::Request(RequestError::Status(Status::NoMem)))]);
    assert_eq!(domain.mappings().count(), 3);
    assert_eq!(domain.map(&mut driver, mappings[0]), Err(DomainError::Mapped(mappings[0].range)));
    domain.unmap(&mut driver, range(0x1000, 0x4fff)).unwrap();
    assert_eq!(domain.mappings().count(), 0);

    domain.map(&mut driver, mappings[0]).unwrap();
    domain.detach(&mut driver, EndpointId(8)).unwrap();
    assert_eq!(domain.mappings().count(), 0, "a domain without endpoints is gone");
    assert_eq!(domain.detach(&mut driver, EndpointId(8)), Err(DomainError::NotAttached(EndpointId(8))));
}

#[test]
fn events_arrive_and_their_buffers_go_back() {
    for extra in [Features::empty(), Features::RING_EVENT_IDX] {
        let (mut driver, device) = driver_with(OFFERED | extra);
        let fault = FaultEvent {
            reason: FaultReason::Mapping,
            access: AccessFlags::WRITE,
            endpoint: EndpointId(8),
            pasid: None,
            address: Some(Iova(0x123_4000)),
        };
        let record = hex("02000000 02010000 08000000 00000000 0040230100000000");
        for _ in 0..20 {
            // More than the queue holds would have to wait.
            let sent = (0..20).filter(|_| device.send_event(&record, 24)).count();
            assert_eq!(sent, 16);
            let mut events = vec![];
            assert_eq!(driver.handle_events(|event| events.push(event)), Ok(16));
            assert_eq!(events, vec![Event::Fault(fault); 16]);
            assert_eq!(driver.handle_events(|_| ()), Ok(0));
        }
        assert_eq!(driver.event_counters().delivered, 320);
        assert_eq!(device.0.borrow().notifications[1], 21);
    }
}

#[test]
fn a_hostile_event_queue_does_not_stop_requests() {
    let (mut driver, device) = driver();
    device.push_used(1, 999, 24);
    assert_eq!(driver.handle_events(|_| ()), Err(QueueError::UsedId { id: 999 }));
    assert_eq!(driver.handle_events(|_| ()), Ok(0));
    let attach = Attach { domain: DomainId(1), endpoint: EndpointId(1), flags: AttachFlags::empty() };
    assert_eq!(driver.send(Request::Attach(attach)), Ok(()));
    let detach = Detach { domain: DomainId(1), endpoint: EndpointId(1) };
    assert_eq!(driver.send(Request::Detach(detach)), Ok(()));
    let unmap = Unmap { domain: DomainId(1), virt_start: Iova(0x1000), virt_end: Iova(0x1fff) };
    assert_eq!(driver.send(Request::Unmap(unmap)), Ok(()));
}
