//! Page requests: from the host to the driver, and the answers back.

use alloc::boxed::Box;
use alloc::collections::BTreeSet;
use alloc::format;

use pgtable_formats::AccessKind;

use super::*;
use crate::host::{FaultCause, FaultReport, GroupResponse, HostError, PageRequestReport, Scope};
use crate::{Limits, PageRequestCounts, Rejection};

const EVENT: usize = 48;

/// The machine of the other tests, in which endpoints 8, 9, 16 and 17 may wait for pages and 24 may not.
fn asking_machine() -> TestHost {
    machine().waiting(&[8, 9, 16, 17])
}

fn asking_with(config: DeviceConfig) -> Device<TestHost> {
    let mut device = Device::new(config, asking_machine()).unwrap();
    device.accept_features(device.offered_features()).unwrap();
    device
}

fn asking() -> Device<TestHost> {
    asking_with(DeviceConfig::default())
}

fn limited(limits: Limits) -> Device<TestHost> {
    asking_with(DeviceConfig { limits, ..DeviceConfig::default() })
}

fn stream(endpoint: u32, value: Option<u32>) -> Stream {
    Stream { endpoint: EndpointId(endpoint), pasid: value.map(pasid) }
}

fn request(endpoint: u32, value: Option<u32>, group: u16, last: bool) -> PageRequestReport {
    PageRequestReport {
        stream: stream(endpoint, value),
        address: Iova(0x7000 + (u64::from(group) << 12)),
        access: AccessFlags::WRITE,
        group,
        last,
        private_data: None,
        fault: Some(FaultCause::Unmapped),
    }
}

fn ask(device: &mut Device<TestHost>, endpoint: u32, value: Option<u32>, group: u16) {
    device.host.page_requests.push_back(request(endpoint, value, group, true));
}

fn response(endpoint: u32, value: Option<u32>, group: u16, code: PageResponseCode) -> Request {
    let Stream { endpoint, pasid } = stream(endpoint, value);
    Request::PageResponse(PageResponse { endpoint, pasid, group_id: group, code })
}

fn success(endpoint: u32, value: Option<u32>, group: u16) -> Request {
    response(endpoint, value, group, PageResponseCode::Success)
}

fn answered(endpoint: u32, value: Option<u32>, group: u16, code: PageResponseCode) -> GroupResponse {
    GroupResponse { stream: stream(endpoint, value), group, code }
}

fn invalid(endpoint: u32, value: Option<u32>, group: u16) -> GroupResponse {
    answered(endpoint, value, group, PageResponseCode::Invalid)
}

/// The endpoint and group of the next event, which is a page request.
fn told(device: &mut Device<TestHost>) -> (u32, u16) {
    match device.next_event() {
        Some(Event::PageRequest(request)) => (request.endpoint.0, request.group_id),
        other => panic!("{other:?}"),
    }
}

fn all_told(device: &mut Device<TestHost>) -> Vec<(u32, u16)> {
    let mut all = Vec::new();
    while device.event_pending() {
        all.push(told(device));
    }
    all
}

fn fault(device: &mut Device<TestHost>) {
    device.host.faults.push_back(FaultReport {
        stream: stream(24, None),
        address: Some(Iova(0x1000)),
        kind: AccessKind::Read,
        privileged: false,
        cause: FaultCause::Unmapped,
    });
}

fn rejection(device: &mut Device<TestHost>, request: &Request) -> Option<Rejection> {
    device.handle(&request.encode(), &mut [0; 4]).rejection
}

#[test]
fn the_feature_is_offered_where_an_endpoint_may_wait() {
    assert!(!device().offered_features().contains(Features::PAGE_REQUEST));
    assert!(asking().offered_features().contains(Features::PAGE_REQUEST));
    let config = DeviceConfig { features: DeviceConfig::FEATURES, ..DeviceConfig::default() };
    assert_eq!(asking_with(config).offered_features(), DeviceConfig::FEATURES);
    let mut plain = device();
    assert!(plain.accept_features(DeviceConfig::ALL_FEATURES).is_err());
    // No table, no page that could be there later.
    let features = DeviceConfig::ALL_FEATURES - Features::ATTACH_TABLE;
    let config = DeviceConfig { features, ..DeviceConfig::default() };
    assert_eq!(asking_with(config).offered_features(), features - Features::PAGE_REQUEST);
}

#[test]
fn a_driver_that_accepts_the_feature_alone_is_served_as_any() {
    let mut device = asking();
    device.accept_features(DeviceConfig::ALL_FEATURES - Features::ATTACH_TABLE).unwrap();
    assert_eq!(send(&mut device, &attach(1, 8)), Status::Ok);
    assert_eq!(send(&mut device, &success(8, None, 1)), Status::NoEnt);
    ask(&mut device, 8, None, 1);
    assert!(matches!(device.next_event(), Some(Event::Fault(_))));
    assert_eq!(device.host.answers, [invalid(8, None, 1)]);
    assert_eq!(device.next_event(), None);
}

#[test]
fn probe_says_of_each_endpoint_what_it_does() {
    let mut device = asking();
    let mut flags = |features, endpoint| {
        device.accept_features(features).unwrap();
        let mut area = [0; 516];
        let probe = Request::Probe(Probe { endpoint: EndpointId(endpoint) });
        assert_eq!(device.handle(&probe.encode(), &mut area).rejection, None);
        Properties::new(&area[..512]).map(Result::unwrap).find_map(|property| match property {
            Property::PageRequests(flags) => Some(flags),
            _ => None,
        })
    };
    for endpoint in [8, 16] {
        assert_eq!(flags(DeviceConfig::ALL_FEATURES, endpoint), Some(PageRequestFlags::all()));
        assert_eq!(flags(DeviceConfig::FEATURES, endpoint), None);
    }
    assert_eq!(flags(DeviceConfig::ALL_FEATURES, 24), Some(PageRequestFlags::empty()));
}

#[test]
fn probe_size_counts_the_property_where_it_may_appear() {
    // 104 bytes without it, as `configurations_that_are_refused` counts.
    let with = |probe_size| DeviceConfig { probe_size, ..DeviceConfig::default() };
    assert!(Device::new(with(111), asking_machine()).is_err());
    assert!(Device::new(with(112), asking_machine()).is_ok());
    assert!(Device::new(with(104), machine()).is_ok());
    let config = DeviceConfig { features: DeviceConfig::FEATURES, ..with(104) };
    assert!(Device::new(config, asking_machine()).is_ok());
}

#[test]
fn a_request_is_told_whole_and_its_answer_goes_to_the_host() {
    let mut device = asking();
    device.host.page_requests.push_back(PageRequestReport {
        access: AccessFlags::READ | AccessFlags::EXEC | AccessFlags::PRIVILEGED,
        private_data: Some([1, 2]),
        ..request(16, Some(5), 0x1ff, true)
    });
    let mut buffer = [0xee; 60];
    assert_eq!(device.fill_event(&mut buffer), Some(EVENT));
    assert_eq!(buffer[EVENT..], [0xee; 12]);
    let expected = PageRequest {
        access: AccessFlags::READ | AccessFlags::EXEC | AccessFlags::PRIVILEGED,
        endpoint: EndpointId(16),
        pasid: Some(pasid(5)),
        address: Iova(0x20_6000),
        group_id: 0x1ff,
        last: true,
        private_data: Some([1, 2]),
    };
    assert_eq!(Event::decode(&buffer[..EVENT]), Some(Event::PageRequest(expected)));
    assert_eq!(device.fill_event(&mut buffer), None);
    assert_eq!(send(&mut device, &success(16, Some(5), 0x1ff)), Status::Ok);
    assert_eq!(device.host.answers, [answered(16, Some(5), 0x1ff, PageResponseCode::Success)]);
    assert_eq!(device.page_request_counts(), PageRequestCounts::default());
}

#[test]
fn each_code_reaches_the_host() {
    for code in [PageResponseCode::Success, PageResponseCode::Invalid, PageResponseCode::Failure] {
        let mut device = asking();
        ask(&mut device, 8, None, 3);
        assert_eq!(told(&mut device), (8, 3));
        assert_eq!(send(&mut device, &response(8, None, 3, code)), Status::Ok);
        assert_eq!(device.host.answers, [answered(8, None, 3, code)]);
    }
}

#[test]
fn what_is_not_there_is_noent_and_harmless() {
    let mut device = asking();
    ask(&mut device, 8, Some(5), 3);
    // Before the driver was told.
    assert_eq!(send(&mut device, &success(8, Some(5), 3)), Status::NoEnt);
    assert_eq!(told(&mut device), (8, 3));
    for (endpoint, value, group) in [(99, Some(5), 3), (9, Some(5), 3), (24, Some(5), 3), (8, Some(5), 4)] {
        assert_eq!(send(&mut device, &success(endpoint, value, group)), Status::NoEnt);
    }
    for value in [None, Some(0), Some(6)] {
        let group = 3;
        let expected = Rejection::NoPageRequest { endpoint: EndpointId(8), pasid: value.map(pasid), group };
        assert_eq!(rejection(&mut device, &success(8, value, group)), Some(expected));
        assert_eq!(expected.status(), Some(Status::NoEnt));
    }
    assert_eq!(device.host.answers, []);
    assert_eq!(send(&mut device, &success(8, Some(5), 3)), Status::Ok);
    assert_eq!(send(&mut device, &success(8, Some(5), 3)), Status::NoEnt, "it is answered");
    assert_eq!(device.host.answers.len(), 1);
}

#[test]
fn responses_without_meaning_are_inval() {
    let mut device = asking();
    ask(&mut device, 8, Some(5), 3);
    assert_eq!(told(&mut device), (8, 3));
    let good = success(8, Some(5), 3).encode();
    for (at, byte) in [(8, 3), (9, 1), (11, 0x80), (14, 0x10), (18, 3), (19, 1), (20, 1), (27, 1)] {
        let mut bytes = good.to_vec();
        bytes[at] = byte;
        assert_eq!(raw(&mut device, &bytes), Status::Inval, "@{at}");
    }
    assert_eq!(raw(&mut device, &good[..27]), Status::Inval);
    assert_eq!(device.host.answers, []);
    assert_eq!(raw(&mut device, &good), Status::Ok);
}

#[test]
fn a_group_is_answered_when_all_of_it_was_told() {
    let mut device = asking();
    for last in [false, false, true] {
        assert_eq!(send(&mut device, &success(8, None, 3)), Status::NoEnt);
        device.host.page_requests.push_back(request(8, None, 3, last));
        assert_eq!(told(&mut device), (8, 3));
    }
    assert_eq!(device.page_request_counts().requests, 3);
    assert_eq!(send(&mut device, &success(8, None, 3)), Status::Ok);
    assert_eq!(device.host.answers.len(), 1);
    // All of it is with the device, but not with the driver.
    device.host.page_requests.extend([request(8, None, 4, false), request(8, None, 4, true)]);
    assert_eq!(told(&mut device), (8, 4));
    assert_eq!(send(&mut device, &success(8, None, 4)), Status::NoEnt);
    assert_eq!(told(&mut device), (8, 4));
    assert_eq!(send(&mut device, &success(8, None, 4)), Status::Ok);
}

#[test]
fn several_groups_are_answered_in_any_order() {
    let mut device = asking();
    let groups = [(8, None, 1), (8, Some(0), 1), (8, Some(5), 1), (8, Some(5), 2), (9, Some(5), 1)];
    for (endpoint, value, group) in groups {
        ask(&mut device, endpoint, value, group);
    }
    assert_eq!(all_told(&mut device).len(), groups.len());
    for &(endpoint, value, group) in groups.iter().rev() {
        assert_eq!(send(&mut device, &success(endpoint, value, group)), Status::Ok);
    }
    let answers: Vec<_> =
        groups.iter().rev().map(|&(e, v, g)| answered(e, v, g, PageResponseCode::Success)).collect();
    assert_eq!(device.host.answers, answers);
}

#[test]
fn groups_of_several_requests_may_be_mixed() {
    let mut device = asking();
    for (value, last) in [(1, false), (2, false), (1, true), (2, false), (2, true)] {
        device.host.page_requests.push_back(request(8, Some(value), 7, last));
    }
    for open in [None, None, Some(1), None, Some(2)] {
        assert_eq!(told(&mut device), (8, 7));
        for value in [1, 2] {
            let expected = if open == Some(value) { Status::Ok } else { Status::NoEnt };
            assert_eq!(send(&mut device, &success(8, Some(value), 7)), expected);
        }
    }
}

#[test]
fn endpoints_take_turns() {
    let mut device = asking();
    (0..50).for_each(|group| ask(&mut device, 8, None, group));
    (0..2).for_each(|group| ask(&mut device, 9, Some(5), group));
    ask(&mut device, 16, None, 0);
    let order = all_told(&mut device);
    assert_eq!(order[..6], [(8, 0), (9, 0), (16, 0), (8, 1), (9, 1), (8, 2)]);
    assert_eq!(order.len(), 53);
    assert!(order.iter().filter(|told| told.0 == 8).map(|told| told.1).eq(0..50), "in order");
}

#[test]
fn faults_and_page_requests_take_turns() {
    let mut device = asking();
    (0..5).for_each(|_| fault(&mut device));
    (0..3).for_each(|group| ask(&mut device, 8, None, group));
    let kinds: Vec<bool> = core::iter::from_fn(|| device.next_event())
        .map(|event| matches!(event, Event::PageRequest(_)))
        .collect();
    assert_eq!(kinds, [false, true, false, true, false, true, false, false]);
}

#[test]
fn a_full_event_queue_delays_and_loses_nothing() {
    let limits = Limits { max_page_requests: 10, ..Limits::default() };
    let mut device = limited(limits);
    for group in 0..100 {
        ask(&mut device, [8, 9, 16, 17][usize::from(group) % 4], None, group);
    }
    for _ in 0..3 {
        assert!(device.event_pending());
        device.set_time(0);
    }
    assert_eq!(device.page_request_counts().requests, 10);
    assert_eq!(device.host.page_requests.len(), 90, "the host keeps them");
    let mut all = BTreeSet::new();
    while device.event_pending() {
        let (endpoint, group) = told(&mut device);
        assert!(all.insert(group));
        assert_eq!(send(&mut device, &success(endpoint, None, group)), Status::Ok);
    }
    assert_eq!(all.len(), 100);
    assert_eq!(device.page_request_counts(), PageRequestCounts::default());
    assert!(device.host.answers.iter().all(|answer| answer.code == PageResponseCode::Success));
}

#[test]
fn who_floods_meets_its_own_bound() {
    let limits = Limits { max_page_requests_per_endpoint: 4, ..Limits::default() };
    let mut device = limited(limits);
    (0..1000).for_each(|group| ask(&mut device, 8, None, group));
    (0..4).for_each(|group| ask(&mut device, 9, None, group));
    assert!(device.event_pending());
    let counts = device.page_request_counts();
    assert_eq!((counts.requests, counts.groups, counts.refused), (8, 8, 996));
    assert_eq!(device.host.answers.len(), 996);
    assert!(device.host.answers.iter().all(|answer| *answer == invalid(8, None, answer.group)));
    let order = all_told(&mut device);
    assert_eq!(order[..4], [(8, 0), (9, 0), (8, 1), (9, 1)]);
    assert_eq!(order.len(), 8);
    // An answer makes room.
    assert_eq!(send(&mut device, &success(8, None, 2)), Status::Ok);
    ask(&mut device, 8, None, 2000);
    assert_eq!(told(&mut device), (8, 2000));
}

#[test]
fn a_driver_that_never_answers_is_refused_further_groups() {
    let limits = Limits { max_page_requests: 3, ..Limits::default() };
    let mut device = limited(limits);
    (0..6).for_each(|group| ask(&mut device, 8, None, group));
    // Only when the driver was told of all that there is room for.
    for group in 0..3 {
        assert_eq!(device.page_request_counts().refused, 0);
        assert_eq!(told(&mut device), (8, group));
    }
    assert_eq!(device.next_event(), None);
    assert_eq!(device.host.answers, [invalid(8, None, 3), invalid(8, None, 4), invalid(8, None, 5)]);
    assert_eq!(device.page_request_counts().refused, 3);
    assert_eq!(send(&mut device, &success(8, None, 0)), Status::Ok);
    ask(&mut device, 9, None, 0);
    assert_eq!(told(&mut device), (9, 0));
}

#[test]
fn a_group_beyond_a_bound_goes_as_a_whole() {
    let limits = Limits { max_page_requests_per_endpoint: 3, ..Limits::default() };
    let mut device = limited(limits);
    ask(&mut device, 8, None, 1);
    device.host.page_requests.extend((0..5).map(|at| request(8, None, 2, at == 4)));
    device.host.page_requests.push_back(request(8, None, 3, true));
    assert_eq!(all_told(&mut device), [(8, 1), (8, 3)]);
    assert_eq!(device.host.answers, [invalid(8, None, 2)]);
    assert_eq!(device.page_request_counts().refused, 1);
    assert_eq!(send(&mut device, &success(8, None, 2)), Status::NoEnt);
}

#[test]
fn bounds_of_nothing() {
    for limits in [
        Limits { max_page_requests: 0, ..Limits::default() },
        Limits { max_page_requests_per_endpoint: 0, ..Limits::default() },
    ] {
        let mut device = limited(limits);
        ask(&mut device, 8, None, 1);
        assert_eq!(device.next_event(), None);
        assert_eq!(device.host.answers, [invalid(8, None, 1)]);
    }
}

#[test]
fn a_buffer_that_is_too_small_answers_the_group() {
    let mut device = asking();
    device.host.page_requests.extend([request(8, None, 1, false), request(8, None, 1, true)]);
    ask(&mut device, 8, None, 2);
    assert_eq!(told(&mut device), (8, 1));
    for (length, group) in [(47, 1), (24, 2)] {
        let mut buffer = vec![0xee; length];
        assert_eq!(device.fill_event(&mut buffer), Some(0));
        assert!(buffer.iter().all(|&byte| byte == 0xee));
        assert_eq!(device.host.answers.last(), Some(&invalid(8, None, group)));
        assert_eq!(send(&mut device, &success(8, None, group)), Status::NoEnt);
    }
    assert_eq!(device.fill_event(&mut [0; 47]), None);
    assert_eq!(device.page_request_counts().buffer_too_small, 2);
    // A fault stays, and may use a small buffer.
    fault(&mut device);
    assert_eq!(device.fill_event(&mut [0; 23]), Some(0));
    assert_eq!(device.fill_event(&mut [0; 24]), Some(24));
}

#[test]
fn without_the_feature_it_is_a_fault() {
    let mut device = asking();
    for features in [DeviceConfig::FEATURES, Features::MAP_UNMAP] {
        device.accept_features(features).unwrap();
        ask(&mut device, 8, Some(5), 3);
        let Some(Event::Fault(fault)) = device.next_event() else { panic!("no fault") };
        assert_eq!((fault.reason, fault.access), (FaultReason::Mapping, AccessFlags::WRITE));
        assert_eq!((fault.endpoint, fault.address), (EndpointId(8), Some(Iova(0xa000))));
        let extended = features.contains(Features::ATTACH_TABLE);
        assert_eq!(fault.pasid, extended.then_some(pasid(5))); // D-55
        assert_eq!(device.next_event(), None);
        assert_eq!(device.host.answers.pop(), Some(invalid(8, Some(5), 3)));
        assert_eq!(device.handle(&success(8, Some(5), 3).encode(), &mut [0; 4]).used, 0);
        // What the guest's table says is not to be recorded.
        device
            .host
            .page_requests
            .push_back(PageRequestReport { fault: None, ..request(8, Some(5), 4, true) });
        assert_eq!(device.next_event(), None);
        assert_eq!(device.host.answers.pop(), Some(invalid(8, Some(5), 4)));
    }
}

#[test]
fn giving_up_the_feature_answers_what_is_open() {
    let mut device = asking();
    (0..3).for_each(|group| ask(&mut device, 8, None, group));
    assert_eq!(told(&mut device), (8, 0));
    device.accept_features(device.offered_features()).unwrap();
    assert_eq!(device.host.answers, []);
    device.accept_features(DeviceConfig::FEATURES).unwrap();
    let expected: Vec<_> = (0..3).map(|group| invalid(8, None, group)).collect();
    assert_eq!(device.host.answers, expected);
    assert_eq!(device.next_event(), None);
}

#[test]
fn who_may_not_wait_is_answered_at_once() {
    let mut device = asking();
    ask(&mut device, 24, None, 1);
    ask(&mut device, 7, None, 2); // D-56
    assert_eq!(device.next_event(), None);
    assert_eq!(device.host.answers, [invalid(24, None, 1), invalid(7, None, 2)]);
}

/// Four groups of each of these streams: held by the host, taken over, told in part, told.
const STREAMS: [(u32, Option<u32>); 6] =
    [(8, None), (8, Some(5)), (16, None), (16, Some(0)), (16, Some(5)), (16, Some(6))];

/// Endpoint 8 with a PASID table, endpoint 16 with page tables 0, 5, 6, and groups in every state.
fn busy() -> Device<TestHost> {
    let mut device = asking_with(DeviceConfig { bypass: true, ..DeviceConfig::default() });
    let base = 0x4000_0000;
    assert_eq!(send(&mut device, &table(1, 8, cd_table(base))), Status::Ok);
    for value in [0, 5, 6] {
        assert_eq!(send(&mut device, &table(2, 16, page_table(base, value))), Status::Ok);
    }
    for (endpoint, value) in STREAMS {
        let requests = [(1, true), (2, false)];
        device.host.page_requests.extend(requests.map(|(group, last)| request(endpoint, value, group, last)));
    }
    assert_eq!(all_told(&mut device).len(), 2 * STREAMS.len());
    for (endpoint, value) in STREAMS {
        ask(&mut device, endpoint, value, 3);
    }
    assert!(device.event_pending());
    for (endpoint, value) in STREAMS {
        ask(&mut device, endpoint, value, 4);
    }
    device
}

fn invalidate(domain: u32, scope: InvalidateScope, caches: Caches, tag: Option<u64>) -> Request {
    let domain = DomainId(domain);
    Request::Invalidate(Invalidate { domain, scope, caches, leaf: false, tag, global: false })
}

/// The entry of one PASID, or of untagged accesses, is taken away.
fn revoke(domain: u32, value: Option<u32>) -> Request {
    invalidate(domain, InvalidateScope::Pasid(value.map(pasid)), Caches::PASID, None)
}

fn addresses(value: Option<u32>) -> InvalidateScope {
    let range = IovaRange::from_length(Iova(0x7000), 0x1000).unwrap();
    InvalidateScope::Address { pasid: value.map(pasid), range, page_lg2: 12 }
}

#[test]
fn an_invalidation_that_fails_keeps_page_requests() {
    let mut device = busy();
    let before = device.page_request_counts();
    for (error, expected) in [(HostError::Failed(5), Status::DevErr), (HostError::NoMemory, Status::NoMem)] {
        device.host.error = Some(error);
        device.host.fails = Fails::Always;
        assert_eq!(send(&mut device, &revoke(1, Some(5))), expected);
        device.host.fails = Fails::Never;
    }
    assert_eq!(device.page_request_counts(), before);
    assert_eq!(send(&mut device, &success(8, Some(5), 1)), Status::Ok);
}

/// The host does it for all of the endpoint, and then ends the page requests by name.
#[test]
fn a_revocation_that_was_widened_costs_others_nothing() {
    let mut device = limited(Limits { max_page_requests: 4, ..Limits::default() });
    let base = 0x4000_0000;
    assert_eq!(send(&mut device, &table(1, 8, cd_table(base))), Status::Ok);
    assert_eq!(send(&mut device, &table(2, 16, page_table(base, 5))), Status::Ok);
    for group in 0..8 {
        ask(&mut device, 16, Some(5), group);
        ask(&mut device, 8, Some(5), group);
    }
    assert!(device.event_pending());
    assert_eq!(device.page_request_counts().requests, 4, "the rest waits in the host");
    device.host.invalidations.clear();
    device.host.stops.push_back(0);
    assert_eq!(send(&mut device, &revoke(1, Some(5))), Status::Ok);
    let scopes: Vec<_> = device.host.invalidations.iter().map(|done| done.scope).collect();
    assert_eq!(scopes, [Scope::Endpoint, Scope::Pasid(Some(pasid(5)))]);
    assert_eq!(
        device.page_request_counts(),
        PageRequestCounts { requests: 2, groups: 2, ..Default::default() }
    );
    for group in 0..8 {
        assert_eq!(told(&mut device), (16, group));
        assert_eq!(send(&mut device, &success(16, Some(5), group)), Status::Ok);
    }
    assert_eq!(device.next_event(), None);
    assert!(device.host.open.is_empty());
    assert!(device.host.answers.iter().all(|answer| answer.code == PageResponseCode::Success));
}

#[test]
fn only_who_may_wait_is_named_again() {
    let mut device = Device::new(DeviceConfig::default(), machine().waiting(&[8])).unwrap();
    device.accept_features(device.offered_features()).unwrap();
    for endpoint in [8, 9] {
        assert_eq!(send(&mut device, &table(1, endpoint, cd_table(0x4000_0000))), Status::Ok);
    }
    let mut scopes = |stops: &[usize], expected| {
        device.host.stops.extend(stops);
        device.host.invalidations.clear();
        assert_eq!(send(&mut device, &revoke(1, Some(5))), expected);
        assert!(device.host.stops.is_empty());
        device.host.invalidations.iter().map(|done| (done.endpoint.0, done.scope)).collect::<Vec<_>>()
    };
    let (all, five) = (Scope::Endpoint, Scope::Pasid(Some(pasid(5))));
    assert_eq!(scopes(&[2], Status::Ok), [(8, five), (9, five)]);
    assert_eq!(scopes(&[1, 1], Status::Ok), [(8, five), (9, all)], "9 has nothing that waits");
    assert_eq!(scopes(&[0, 2, 1], Status::Ok), [(8, all), (9, all), (8, five)]);
}

#[test]
fn a_revocation_that_the_host_does_not_do_by_name_fails() {
    let mut device = busy();
    let before = device.page_request_counts();
    device.host.stops.extend([0, 1, 0]);
    assert_eq!(send(&mut device, &revoke(1, Some(5))), Status::DevErr);
    assert!(device.host.stops.is_empty());
    assert_eq!(device.page_request_counts(), before);
    assert_eq!(send(&mut device, &success(8, Some(5), 1)), Status::Ok);
    assert_eq!(send(&mut device, &revoke(1, Some(5))), Status::Ok);
    assert_eq!(send(&mut device, &success(8, Some(5), 3)), Status::NoEnt);
}

/// The host ended what waited in a binding that went and came back.
#[test]
fn a_move_that_is_undone_may_have_ended_page_requests() {
    for moved in [attach(3, 16), table(3, 16, page_table(0x4000_0000, 0))] {
        let mut device = busy();
        // The space, PASIDs 5 and 6 go, and untagged accesses do not move.
        device.host.fails = Fails::At(device.host.calls + 3);
        assert_eq!(send(&mut device, &moved), Status::DevErr);
        assert_eq!(device.host.last_failed, Some("bind"));
        assert!(!device.needs_reset());
        for (value, expected) in [(5, Status::NoEnt), (6, Status::NoEnt), (0, Status::Ok)] {
            assert_eq!(send(&mut device, &success(16, Some(value), 1)), expected, "{moved:?}: {value}");
        }
        assert_eq!(send(&mut device, &success(16, None, 1)), Status::Ok);
        // An access with a PASID waits as before.
        ask(&mut device, 16, Some(5), 9);
        all_told(&mut device);
        assert_eq!(send(&mut device, &success(16, Some(5), 9)), Status::Ok);
    }
}

#[test]
fn who_cannot_wait_is_not_named_twice() {
    // Untagged accesses and PASID 0 have one entry. That matters to page requests alone.
    for (features, scopes) in [(DeviceConfig::ALL_FEATURES, 2), (DeviceConfig::FEATURES, 1)] {
        let mut device = busy();
        device.accept_features(features).unwrap();
        device.host.invalidations.clear();
        assert_eq!(send(&mut device, &revoke(1, Some(0))), Status::Ok);
        assert_eq!(device.host.invalidations.len(), scopes);
    }
}

#[test]
fn an_answer_to_what_the_host_has_closed_is_noent() {
    let mut device = asking();
    ask(&mut device, 8, Some(5), 1);
    assert_eq!(told(&mut device), (8, 1));
    device.host.open.clear();
    assert_eq!(send(&mut device, &success(8, Some(5), 1)), Status::NoEnt);
    assert_eq!(device.page_request_counts(), PageRequestCounts::default());
    assert!(!device.needs_reset());
    assert_eq!(send(&mut device, &success(8, Some(5), 1)), Status::NoEnt);
}

#[test]
fn a_second_answer_is_for_who_has_the_number_by_then() {
    let mut device = asking();
    ask(&mut device, 8, Some(5), 1);
    assert_eq!(told(&mut device), (8, 1));
    assert_eq!(send(&mut device, &success(8, Some(5), 1)), Status::Ok);
    // The number is in use again, and the driver was not told yet.
    ask(&mut device, 8, Some(5), 1);
    assert!(device.event_pending());
    assert_eq!(send(&mut device, &success(8, Some(5), 1)), Status::NoEnt);
    assert_eq!(told(&mut device), (8, 1));
    assert_eq!(send(&mut device, &response(8, Some(5), 1, PageResponseCode::Failure)), Status::Ok);
    let codes: Vec<_> = device.host.answers.iter().map(|answer| answer.code).collect();
    assert_eq!(codes, [PageResponseCode::Success, PageResponseCode::Failure]);
    // Of another PASID the same number is another group.
    ask(&mut device, 8, Some(6), 1);
    assert_eq!(told(&mut device), (8, 1));
    assert_eq!(send(&mut device, &success(8, Some(5), 1)), Status::NoEnt);
    assert_eq!(send(&mut device, &success(8, Some(6), 1)), Status::Ok);
}

#[test]
fn what_goes_takes_its_page_requests_with_it() {
    let base = 0x4000_0000;
    let all =
        |endpoint: u32| STREAMS.iter().copied().filter(|stream| stream.0 == endpoint).collect::<Vec<_>>();
    let only = |value: u32| vec![(16, Some(value))];
    let zero = || vec![(16, None), (16, Some(0))];
    let detached = |device: &mut Device<TestHost>, request: Request| {
        assert_eq!(send(device, &request), Status::Ok, "{request:?}");
    };
    type Action<'a> = Box<dyn Fn(&mut Device<TestHost>) + 'a>;
    type Case<'a> = (&'a str, Action<'a>, Vec<(u32, Option<u32>)>);
    let request = |request: Request| -> Action<'_> {
        Box::new(move |device: &mut Device<TestHost>| detached(device, request))
    };
    // The host stops once, and is asked for all of the endpoint.
    let wider = |request: Request| -> Action<'_> {
        Box::new(move |device: &mut Device<TestHost>| {
            device.host.stops.push_back(0);
            detached(device, request);
            assert!(device.host.stops.is_empty());
        })
    };
    let all_caches = Caches::all();
    let pasids = |value: Option<u32>| InvalidateScope::Pasid(value.map(pasid));
    let cases: Vec<Case<'_>> = vec![
        ("detach a PASID table", request(detach(1, 8)), all(8)),
        ("detach page tables", request(detach(2, 16)), all(16)),
        ("attach elsewhere", request(attach(3, 8)), all(8)),
        ("bypass", request(attach_bypass(3, 16)), all(16)),
        ("another PASID table", request(table(1, 8, cd_table(base + 0x10000))), all(8)),
        ("PASID table for page tables", request(table(2, 16, pasid_table(base))), all(16)),
        ("table elsewhere", request(table(3, 16, page_table(base, 5))), all(16)),
        ("table 0 elsewhere", request(table(3, 16, page_table(base, 0))), all(16)),
        ("replace a page table", request(table(2, 16, page_table(base + 0x1000, 5))), only(5)),
        ("replace page table 0", request(table(2, 16, page_table(base + 0x1000, 0))), zero()),
        ("one more page table", request(table(2, 16, page_table(base, 7))), vec![]),
        ("unbind", request(table(2, 16, unbind(6))), only(6)),
        ("unbind 0", request(table(2, 16, unbind(0))), zero()),
        ("attach where it is", request(table(2, 16, page_table(base + 0x1000, 7))), vec![]),
        ("clear an entry", request(revoke(1, Some(5))), vec![(8, Some(5))]),
        ("clear the entry of untagged accesses", request(revoke(1, None)), vec![(8, None)]),
        ("clear it by its PASID", request(revoke(1, Some(0))), vec![(8, None)]),
        ("clear another entry", request(revoke(1, Some(9))), vec![]),
        ("drop a page table", request(revoke(2, Some(5))), only(5)),
        ("drop page table 0", request(revoke(2, Some(0))), zero()),
        ("drop that of untagged accesses", request(revoke(2, None)), zero()),
        ("drop one that is not bound", request(revoke(2, Some(7))), vec![]),
        ("by ASID, too", request(invalidate(1, pasids(None), all_caches, Some(1))), vec![(8, None)]),
        ("by ASID, page table 0", request(invalidate(2, pasids(None), all_caches, Some(1))), zero()),
        (
            "by ASID that is none",
            request(invalidate(1, pasids(None), all_caches, Some(1 << 20))),
            vec![(8, None)],
        ),
        ("by addresses", request(invalidate(1, addresses(Some(5)), all_caches, None)), vec![(8, Some(5))]),
        ("translations", request(invalidate(1, pasids(Some(5)), Caches::TLB, None)), vec![]),
        ("translations of addresses", request(invalidate(1, addresses(Some(5)), Caches::TLB, None)), vec![]),
        ("a domain", request(invalidate(1, InvalidateScope::Domain, all_caches, None)), vec![]),
        (
            "a domain of page tables",
            request(invalidate(2, InvalidateScope::Domain, all_caches, None)),
            vec![],
        ),
        ("clear an entry, wider", wider(revoke(1, Some(5))), vec![(8, Some(5))]),
        ("drop page table 0, wider", wider(revoke(2, Some(0))), zero()),
        ("reset", Box::new(Device::reset), STREAMS.to_vec()),
        ("system reset", Box::new(Device::system_reset), STREAMS.to_vec()),
    ];
    for (name, act, gone) in cases {
        let mut device = busy();
        act(&mut device);
        consistent(&device);
        assert!(!device.needs_reset(), "{name}");
        device.accept_features(device.offered_features()).unwrap();
        let kept: Vec<_> = STREAMS.iter().filter(|stream| !gone.contains(stream)).collect();
        let told = all_told(&mut device);
        assert_eq!(told.len(), 2 * kept.len(), "{name}: groups 3 and 4 of the others");
        // No access waits for nothing.
        let open: BTreeSet<_> = device.host.open.keys().map(|(stream, _)| *stream).collect();
        let expected: BTreeSet<_> = kept.iter().map(|(endpoint, value)| stream(*endpoint, *value)).collect();
        assert_eq!(open, expected, "{name}");
        for (endpoint, value) in STREAMS {
            let expected = if gone.contains(&(endpoint, value)) { Status::NoEnt } else { Status::Ok };
            for group in [1, 3, 4] {
                let status = send(&mut device, &success(endpoint, value, group));
                assert_eq!(status, expected, "{name}: {endpoint} {value:?} {group}");
            }
            assert_eq!(send(&mut device, &success(endpoint, value, 2)), Status::NoEnt, "{name}");
        }
        device.reset();
        assert_eq!(device.page_request_counts().requests, 0);
        assert!(device.host.open.is_empty());
    }
}

#[test]
fn a_change_of_bypass_answers_who_is_not_attached() {
    let mut device = asking();
    assert_eq!(send(&mut device, &attach(1, 9)), Status::Ok);
    ask(&mut device, 8, None, 1);
    ask(&mut device, 9, None, 1);
    assert_eq!(all_told(&mut device).len(), 2);
    device.write_config(Config::BYPASS_OFFSET, &[1]).unwrap();
    assert_eq!(send(&mut device, &success(8, None, 1)), Status::NoEnt);
    assert_eq!(send(&mut device, &success(9, None, 1)), Status::Ok);
}

#[test]
fn a_request_that_is_refused_keeps_page_requests() {
    let mut device = busy();
    let before = device.page_request_counts();
    for request in [detach(9, 8), attach(2, 8), table(2, 16, unbind(9)), table(2, 16, pasid_table(0x123))] {
        assert_ne!(send(&mut device, &request), Status::Ok);
    }
    for request in [detach(1, 8), detach(2, 16), table(1, 8, cd_table(0x4001_0000)), table(2, 16, unbind(0))]
    {
        device.host.fails = Fails::At(device.host.calls);
        assert_eq!(send(&mut device, &request), Status::DevErr);
    }
    assert_eq!(device.page_request_counts(), before);
    assert_eq!(send(&mut device, &success(8, Some(5), 1)), Status::Ok);
    assert_eq!(send(&mut device, &success(16, Some(5), 1)), Status::Ok);
}

#[test]
fn an_answer_that_the_host_cannot_give_can_be_given_again() {
    for (error, expected) in [(HostError::Failed(5), Status::DevErr), (HostError::NoMemory, Status::NoMem)] {
        let mut device = asking();
        ask(&mut device, 8, None, 1);
        assert_eq!(told(&mut device), (8, 1));
        device.host.error = Some(error);
        device.host.fails = Fails::At(device.host.calls);
        assert_eq!(send(&mut device, &success(8, None, 1)), expected);
        assert!(!device.needs_reset());
        assert_eq!(send(&mut device, &success(8, None, 1)), Status::Ok);
        assert_eq!(device.host.answers.len(), 1);
    }
}

#[test]
fn an_access_that_nobody_can_answer_asks_for_a_reset() {
    let mut device = asking();
    device.set_time(0);
    ask(&mut device, 8, None, 1);
    assert_eq!(told(&mut device), (8, 1));
    device.set_time(1);
    device.host.fails = Fails::At(device.host.calls);
    device.set_time(u64::MAX - 1);
    assert!(device.needs_reset()); // D-60
    assert_eq!(send(&mut device, &success(8, None, 1)), Status::NoEnt);
    device.reset();
    assert!(!device.needs_reset());
    // The same in a reset.
    device.accept_features(device.offered_features()).unwrap();
    ask(&mut device, 9, None, 1);
    device.host.fails = Fails::Always;
    device.reset();
    assert!(device.needs_reset());
    device.host.fails = Fails::Never;
    device.reset();
    assert!(!device.needs_reset());
}

#[test]
fn time_runs_out() {
    let config = DeviceConfig { page_request_timeout_ns: 100, ..DeviceConfig::default() };
    let mut device = asking_with(config);
    device.set_time(1_000_000);
    assert_eq!(device.page_requests_due(), None);
    // The second is gathering, the third not told.
    ask(&mut device, 8, None, 1);
    device.host.page_requests.push_back(request(8, Some(5), 2, false));
    assert_eq!(all_told(&mut device).len(), 2);
    ask(&mut device, 9, None, 3);
    assert!(device.event_pending());
    assert_eq!(device.page_requests_due(), Some(1_000_000), "their time does not run yet");
    // However late, the first call only sets the time.
    device.set_time(2_000_000);
    assert_eq!(device.host.answers, []);
    assert_eq!(device.page_requests_due(), Some(2_000_100));
    device.set_time(2_000_050);
    ask(&mut device, 16, None, 4);
    assert_eq!(told(&mut device), (9, 3));
    assert_eq!(told(&mut device), (16, 4));
    device.set_time(2_000_050);
    assert_eq!(device.page_requests_due(), Some(2_000_100));
    device.set_time(2_000_099);
    device.set_time(0);
    assert_eq!(device.host.answers, []);
    device.set_time(2_000_100);
    assert_eq!(device.host.answers, [invalid(8, None, 1), invalid(8, Some(5), 2), invalid(9, None, 3)]);
    assert_eq!(device.page_request_counts().timed_out, 3);
    assert_eq!(device.page_requests_due(), Some(2_000_150));
    for (endpoint, value, group) in [(8, None, 1), (8, Some(5), 2), (9, None, 3)] {
        assert_eq!(send(&mut device, &success(endpoint, value, group)), Status::NoEnt);
    }
    assert_eq!(send(&mut device, &success(16, None, 4)), Status::Ok);
    device.set_time(u64::MAX);
    assert_eq!(device.page_request_counts().timed_out, 3);
    assert_eq!(device.page_requests_due(), None);
}

#[test]
fn a_call_that_says_the_time_also_looks_for_requests() {
    let config = DeviceConfig { page_request_timeout_ns: 100, ..DeviceConfig::default() };
    let mut device = asking_with(config);
    ask(&mut device, 8, None, 1);
    // Nobody offers a buffer.
    device.set_time(1000);
    device.set_time(1100);
    assert_eq!(device.host.answers, [invalid(8, None, 1)]);
    assert_eq!(device.next_event(), None);
}

#[test]
fn time_that_never_runs_out() {
    let config = DeviceConfig { page_request_timeout_ns: u64::MAX, ..DeviceConfig::default() };
    let mut device = asking_with(config);
    ask(&mut device, 8, None, 1);
    assert_eq!(told(&mut device), (8, 1));
    for now in [5, 6, u64::MAX] {
        device.set_time(now);
        assert_eq!(device.page_requests_due(), None);
    }
    assert_eq!(send(&mut device, &success(8, None, 1)), Status::Ok);
}

#[test]
fn a_number_is_used_anew_where_the_host_answered() {
    let mut device = asking();
    ask(&mut device, 8, Some(5), 1);
    assert_eq!(told(&mut device), (8, 1));
    // What the host bound itself, it takes away itself.
    device.host.open.clear();
    device.host.page_requests.extend([request(8, Some(5), 1, false), request(8, Some(5), 1, true)]);
    assert_eq!(told(&mut device), (8, 1));
    assert_eq!(send(&mut device, &success(8, Some(5), 1)), Status::NoEnt);
    assert_eq!(told(&mut device), (8, 1));
    assert_eq!(device.page_request_counts().requests, 2);
    assert_eq!(send(&mut device, &success(8, Some(5), 1)), Status::Ok);
    assert_eq!(device.page_request_counts(), PageRequestCounts::default());
}

#[test]
fn a_reset_answers_more_than_there_is_room_for() {
    let limits = Limits { max_page_requests: 1, ..Limits::default() };
    let mut device = limited(limits);
    (0..1000).for_each(|group| ask(&mut device, 8, None, group));
    assert_eq!(told(&mut device), (8, 0));
    device.reset();
    assert!(!device.event_pending());
    assert!(device.host.open.is_empty() && device.host.page_requests.is_empty());
}

/// Every group is answered once, whatever the driver, the endpoints and the clock do.
#[test]
fn no_access_is_forgotten() {
    for seed in 1..40u64 {
        let limits = Limits { max_page_requests_per_endpoint: 5, max_page_requests: 12, ..Limits::default() };
        let config = DeviceConfig { limits, page_request_timeout_ns: 50, ..DeviceConfig::default() };
        let mut device = asking_with(config);
        let mut random = seed;
        let mut below = |bound: u32| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            u32::try_from(random >> 33).unwrap() % bound
        };
        let (mut now, mut next, mut gathering) = (0, 0u16, Vec::<PageRequestReport>::new());
        for _ in 0..600 {
            let endpoint = [8, 9, 16, 17][below(4) as usize];
            let value = [None, Some(0), Some(5)][below(3) as usize];
            match below(12) {
                0..=3 => {
                    next = next.wrapping_add(1);
                    let last = below(3) > 0;
                    let asked = request(endpoint, value, next, last);
                    device.host.page_requests.push_back(asked);
                    gathering.extend(Some(asked).filter(|_| !last));
                }
                4 => {
                    // The rest of a group, unless it was answered.
                    let Some(asked) = gathering.pop() else { continue };
                    let key = (asked.stream, asked.group);
                    let is_known = device.host.open.contains_key(&key)
                        || device.host.page_requests.iter().any(|held| (held.stream, held.group) == key);
                    if is_known {
                        device.host.page_requests.push_back(PageRequestReport { last: true, ..asked });
                    }
                }
                5 | 6 => drop(device.fill_event(&mut [0; EVENT])),
                7 if below(8) == 0 => drop(device.fill_event(&mut [0; 30])),
                7 | 8 => {
                    let keys: Vec<_> = device.host.open.keys().copied().collect();
                    if keys.is_empty() {
                        continue;
                    }
                    let (stream, group) = keys[below(u32::try_from(keys.len()).unwrap()) as usize];
                    let value = stream.pasid.map(|pasid| pasid.value());
                    let before = device.host.answers.len();
                    let status = send(&mut device, &success(stream.endpoint.0, value, group));
                    let done = usize::from(status == Status::Ok);
                    assert_eq!(device.host.answers.len(), before + done, "{status:?}");
                }
                9 => {
                    now += u64::from(below(40));
                    device.set_time(now);
                }
                10 if endpoint >= 16 => {
                    let value = value.unwrap_or(5);
                    send(&mut device, &table(endpoint, endpoint, page_table(0x4000_0000, value)));
                }
                10 => drop(send(&mut device, &attach(endpoint, endpoint))),
                _ => drop(send(&mut device, &detach(endpoint, endpoint))),
            }
            let counts = device.page_request_counts();
            let text = || format!("seed {seed}: {counts:?} {:?}", device.host.open);
            assert_eq!(counts.groups, device.host.open.len(), "{}", text());
            assert!(counts.requests <= 12 && counts.requests >= counts.groups, "{}", text());
            assert!(!device.needs_reset());
        }
        for _ in 0..3 {
            while device.fill_event(&mut [0; EVENT]).is_some() {}
            now += 50;
            device.set_time(now);
        }
        while device.event_pending() {
            device.next_event();
        }
        device.set_time(now + 1);
        device.set_time(now + 51);
        assert!(device.host.open.is_empty(), "seed {seed}");
        assert_eq!((device.page_request_counts().groups, device.page_requests_due()), (0, None));
    }
}
