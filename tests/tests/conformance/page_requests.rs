//! Page requests.

use std::collections::BTreeSet;

use pgtable_formats::format::Attrs;
use pgtable_formats::{Access, TableMem};
use viommu_device::host::{EndpointCaps, FaultCause, Stream, TableCaps};
use viommu_device::soft::{AccessError, Answer, Ticket};
use viommu_device::{DeviceConfig, Features, Gpa, Limits};
use viommu_tests::rig::{Memory, Rig, Sends, Setup, request, smmuv3, vtd};
use viommu_tests::tables::{PageTable, PasidTable};
use viommu_wire::{
    AccessFlags, Caches, DomainId, EndpointId, Event, FaultEvent, FaultReason, Invalidate, InvalidateScope,
    Iova, IovaRange, PageRequest, PageRequestFlags, PageResponse, PageResponseCode, Properties, Property,
    Request, Status, TableDescriptor,
};

use PageResponseCode::{Failure, Invalid, Success};

/// Endpoints 8 and 9 (SMMUv3), 16 and 17 (VT-d) may wait for a page; 24 may not.
fn setup() -> Setup {
    let caps = |tables: Option<TableCaps>| EndpointCaps {
        page_requests: tables.is_some(),
        tables,
        ..EndpointCaps::default()
    };
    let tables = [(8, Some(smmuv3())), (9, Some(smmuv3())), (16, Some(vtd())), (17, Some(vtd())), (24, None)];
    Setup { endpoints: tables.map(|(id, tables)| (id, caps(tables))).into(), ..Setup::default() }
}

fn with(config: DeviceConfig) -> Setup {
    Setup { config, ..setup() }
}

/// A process that shares its address space with endpoint 8, 9, 16 or 17, by the PASIDs 0, 5 and 6.
struct Process {
    endpoint: u32,
    pages: PageTable,
    table: PasidTable,
}

impl Process {
    /// Bound in a domain of the endpoint's number.
    fn new(rig: &mut Rig, endpoint: u32) -> Self {
        let process = Self::unbound(rig, endpoint);
        assert_eq!(rig.send(&process.bind(endpoint)), Status::Ok);
        process
    }

    fn unbound(rig: &mut Rig, endpoint: u32) -> Self {
        let caps = if endpoint < 16 { smmuv3() } else { vtd() };
        let pages = PageTable::new(&caps, 1, rig.alloc());
        let table = PasidTable::new(&caps, 4, rig.alloc());
        for pasid in [0, 5, 6] {
            table.set(rig.alloc(), pasid, &pages);
        }
        Self { endpoint, pages, table }
    }

    fn bind(&self, domain: u32) -> Request {
        request::attach_table(domain, self.endpoint, self.table.descriptor())
    }

    /// Where the first word of the entry of `pasid` is.
    fn entry(&self, rig: &Rig, pasid: u64) -> Gpa {
        match self.table.descriptor() {
            TableDescriptor::Smmuv3 { ste0, .. } => Gpa((ste0 & 0x000f_ffff_ffff_ffc0) + pasid * 64),
            TableDescriptor::VtdPasidTable(table) => {
                Gpa((rig.machine.memory().load(table.directory).unwrap() & !0xfff) + pasid * 64)
            }
            other => panic!("{other:?}"),
        }
    }

    fn map(&self, rig: &mut Rig, iova: u64) {
        self.pages.map(rig.alloc(), iova, Memory::page(3).0, 0x1000, Attrs::READ_WRITE);
    }

    fn write(&self, rig: &Rig, pasid: Option<u32>, iova: u64) -> Result<u64, AccessError> {
        let stream = stream(self.endpoint, pasid);
        let mut iommu = rig.machine.lock();
        let host = iommu.device_mut().host_mut();
        host.access(stream, Iova(iova), Access::WRITE, |piece| piece.output.0)
    }

    #[track_caller]
    fn waits(&self, rig: &Rig, pasid: Option<u32>, iova: u64) -> Ticket {
        match self.write(rig, pasid, iova) {
            Err(AccessError::Waits(ticket)) => ticket,
            other => panic!("{other:x?}"),
        }
    }
}

fn both(check: impl Fn(Rig, Process)) {
    for endpoint in [8, 16] {
        let mut rig = Rig::new(setup());
        let process = Process::new(&mut rig, endpoint);
        check(rig, process);
    }
}

fn stream(endpoint: u32, pasid: Option<u32>) -> Stream {
    Stream { endpoint: EndpointId(endpoint), pasid: pasid.map(request::pasid) }
}

fn answer(rig: &Rig, ticket: Ticket) -> Option<Answer> {
    rig.machine.lock().device_mut().host_mut().answer(ticket)
}

fn set_time(rig: &Rig, now: u64) {
    rig.machine.lock().device_mut().set_time(now);
}

/// The page requests that wait to be told.
fn told(rig: &mut Rig) -> Vec<PageRequest> {
    rig.events().into_iter().map(page_request).collect()
}

fn page_request(event: Event) -> PageRequest {
    match event {
        Event::PageRequest(request) => request,
        other => panic!("{other:?}"),
    }
}

fn response(request: &PageRequest, code: PageResponseCode) -> Request {
    let PageRequest { endpoint, pasid, group_id, .. } = *request;
    Request::PageResponse(PageResponse { endpoint, pasid, group_id, code })
}

#[test]
fn x29_the_feature_and_the_property_tell_who_may_wait() {
    let flags = |rig: &mut Rig, endpoint| {
        let reply = rig.raw(&request::probe(endpoint).encode(), 516);
        Properties::new(&reply.bytes[..512]).map(Result::unwrap).find_map(|property| match property {
            Property::PageRequests(flags) => Some(flags),
            _ => None,
        })
    };
    let mut rig = Rig::new(Setup::default());
    assert!(!rig.machine.lock().offered_features().contains(Features::PAGE_REQUEST));
    assert_eq!(flags(&mut rig, 8), None);
    let mut rig = Rig::new(setup());
    assert!(rig.machine.lock().offered_features().contains(Features::PAGE_REQUEST));
    for endpoint in [8, 9, 16, 17] {
        assert_eq!(flags(&mut rig, endpoint), Some(PageRequestFlags::all()));
    }
    assert_eq!(flags(&mut rig, 24), Some(PageRequestFlags::empty()));
    rig = rig.restart(Some(DeviceConfig::FEATURES));
    assert_eq!(flags(&mut rig, 8), None, "not negotiated");
    rig.works();
}

#[test]
fn x30_a_page_request_is_one_record_of_48_bytes() {
    both(|mut rig, process| {
        process.waits(&rig, Some(5), 0x1234);
        process.waits(&rig, None, 0x5000);
        for (pasid, address, flags) in [(5, 0x1234u64, 0x732u32), (0, 0x5000, 0x532)] {
            rig.post_event_buffer(64);
            let replies = rig.event_replies();
            assert_eq!((replies.len(), replies[0].used), (1, 48));
            let bytes = &replies[0].bytes;
            assert_eq!(bytes[..4], [2, 0, 0, 0]);
            assert_eq!(bytes[4..8], flags.to_le_bytes(), "WRITE, LAST, PAGE_REQ, ADDRESS, PASID, GROUP_ID");
            assert_eq!(bytes[8..12], process.endpoint.to_le_bytes());
            assert_eq!(bytes[12..16], u32::to_le_bytes(pasid));
            assert_eq!(bytes[16..24], address.to_le_bytes());
            assert_eq!(bytes[26..48], [0; 22]);
        }
        assert_eq!(rig.event_replies(), []);
    });
}

#[test]
fn x31_success_lets_the_access_go_on() {
    both(|mut rig, process| {
        let ticket = process.waits(&rig, Some(5), 0x1234);
        assert_eq!(answer(&rig, ticket), None);
        let asked = told(&mut rig);
        process.map(&mut rig, 0x1000);
        assert_eq!(answer(&rig, ticket), None);
        assert_eq!(rig.send(&response(&asked[0], Success)), Status::Ok);
        assert_eq!(answer(&rig, ticket), Some(Answer::Retry));
        assert_eq!(process.write(&rig, Some(5), 0x1234), Ok(Memory::page(3).0 + 0x234));
        assert_eq!(rig.events(), []);
        rig.works();
    });
}

#[test]
fn x31_other_codes_end_the_access() {
    for code in [Invalid, Failure] {
        both(|mut rig, process| {
            let ticket = process.waits(&rig, Some(5), 0x1234);
            let asked = told(&mut rig);
            assert_eq!(rig.send(&response(&asked[0], code)), Status::Ok);
            assert_eq!(answer(&rig, ticket), Some(Answer::Failed));
            rig.works();
        });
    }
}

#[test]
fn x31_groups_are_answered_in_any_order() {
    both(|mut rig, process| {
        let tickets: Vec<Ticket> = [(None, 0x1000), (Some(5), 0x1000), (Some(5), 0x2000), (Some(6), 0x1000)]
            .map(|(pasid, iova)| process.waits(&rig, pasid, iova))
            .into();
        let asked = told(&mut rig);
        assert_eq!(asked.len(), tickets.len());
        for (at, code) in [(2, Success), (0, Invalid), (3, Success), (1, Failure)] {
            assert_eq!(answer(&rig, tickets[at]), None);
            assert_eq!(rig.send(&response(&asked[at], code)), Status::Ok);
            let expected = if code == Success { Answer::Retry } else { Answer::Failed };
            assert_eq!(answer(&rig, tickets[at]), Some(expected));
        }
    });
}

#[test]
fn x32_a_response_to_nothing_is_noent() {
    both(|mut rig, process| {
        let ticket = process.waits(&rig, Some(5), 0x1000);
        let guess = PageRequest {
            access: AccessFlags::WRITE,
            endpoint: EndpointId(process.endpoint),
            pasid: Some(request::pasid(5)),
            address: Iova(0x1000),
            group_id: 0,
            last: true,
            private_data: None,
        };
        let noent = |rig: &mut Rig, request: &PageRequest| {
            let bytes = response(request, Success).encode();
            assert_eq!(rig.send_bytes(&bytes), Status::NoEnt, "{request:?}");
        };
        noent(&mut rig, &guess); // The driver was not told yet.
        let asked = told(&mut rig)[0];
        assert_eq!(asked, guess);
        for wrong in [
            PageRequest { endpoint: EndpointId(99), ..asked },
            PageRequest { endpoint: EndpointId(9), ..asked },
            PageRequest { pasid: None, ..asked },
            PageRequest { pasid: Some(request::pasid(6)), ..asked },
            PageRequest { group_id: 77, ..asked },
        ] {
            noent(&mut rig, &wrong);
        }
        assert_eq!(answer(&rig, ticket), None);
        rig.refuse(&response(&PageRequest { group_id: 77, ..asked }, Success).encode(), Status::NoEnt);
        assert_eq!(rig.send(&response(&asked, Success)), Status::Ok);
        noent(&mut rig, &asked);
        rig.works();
    });
}

#[test]
fn x33_responses_without_meaning_are_inval() {
    both(|mut rig, process| {
        let ticket = process.waits(&rig, Some(5), 0x1000);
        let good = response(&told(&mut rig)[0], Success).encode().to_vec();
        // Flags, a PASID of 21 bits, the code, reserved bytes.
        for (at, bits) in [(8, 2), (11, 0x80), (14, 0x10), (18, 3), (19, 1), (20, 1), (27, 0x80)] {
            let mut bytes = good.clone();
            bytes[at] |= bits;
            rig.refuse(&bytes, Status::Inval);
        }
        rig.refuse(&good[..27], Status::Inval);
        assert_eq!(answer(&rig, ticket), None);
        assert_eq!(rig.send_bytes(&good), Status::Ok);
    });
}

#[test]
fn x34_without_a_buffer_page_requests_wait_and_none_is_lost() {
    // Far fewer than the endpoint asks for.
    let limits = Limits { max_page_requests: 4, ..Limits::DEFAULT };
    let mut rig = Rig::new(with(DeviceConfig { limits, ..DeviceConfig::default() }));
    let process = Process::new(&mut rig, 16);
    let tickets: Vec<Ticket> = (0..64u64).map(|page| process.waits(&rig, Some(5), page << 12)).collect();
    for _ in 0..3 {
        assert_eq!(rig.event_replies(), []);
        assert_eq!(rig.send(&request::attach(1, 24)), Status::Ok);
        assert_eq!(rig.send(&request::detach(1, 24)), Status::Ok);
    }
    for (page, &ticket) in tickets.iter().enumerate() {
        assert_eq!(answer(&rig, ticket), None);
        rig.post_event_buffer(48);
        let replies = rig.event_replies();
        let asked = page_request(Event::decode(&replies[0].bytes).unwrap());
        assert_eq!(asked.address, Iova((page as u64) << 12));
        assert_eq!(rig.send(&response(&asked, Success)), Status::Ok);
        assert_eq!(answer(&rig, ticket), Some(Answer::Retry));
    }
    assert_eq!(rig.machine.lock().device().page_request_counts(), Default::default());
}

#[test]
fn x35_a_buffer_that_is_too_small_answers_invalid() {
    both(|mut rig, process| {
        for len in [24, 47] {
            let ticket = process.waits(&rig, Some(5), 0x1000);
            rig.post_event_buffer(len);
            let replies = rig.event_replies();
            assert_eq!(replies.len(), 1);
            assert!(replies[0].is_unwritten());
            assert_eq!(answer(&rig, ticket), Some(Answer::Failed));
        }
        assert_eq!(rig.events(), []);
        rig.works();
    });
}

/// Does `act` while one access waits untold and one told, and checks that both have failed when it returned.
fn ends_the_waiting(endpoint: u32, pasid: Option<u32>, act: impl FnOnce(&mut Rig, &Process)) {
    let mut rig = Rig::new(setup());
    let process = Process::new(&mut rig, endpoint);
    let witness = Process::new(&mut rig, endpoint + 1);
    let kept = witness.waits(&rig, Some(5), 0x3000);
    let first = process.waits(&rig, pasid, 0x1000);
    let asked = told(&mut rig);
    let second = process.waits(&rig, pasid, 0x2000);
    act(&mut rig, &process);
    for ticket in [first, second] {
        assert_eq!(answer(&rig, ticket), Some(Answer::Failed));
    }
    assert_eq!(rig.events(), [], "of what is gone");
    for asked in asked {
        let expected = if asked.endpoint.0 == endpoint { Status::NoEnt } else { Status::Ok };
        assert_eq!(rig.send(&response(&asked, Success)), expected);
    }
    assert_eq!(answer(&rig, kept), Some(Answer::Retry));
}

#[test]
fn x36_detach_and_attach_elsewhere_answer_invalid() {
    for endpoint in [8, 16] {
        for pasid in [None, Some(5)] {
            for request in [
                request::detach(endpoint, endpoint),
                request::attach(50, endpoint),
                request::attach_bypass(50, endpoint),
            ] {
                ends_the_waiting(endpoint, pasid, |rig, _| {
                    assert_eq!(rig.send(&request), Status::Ok);
                });
            }
            ends_the_waiting(endpoint, pasid, |rig, process| {
                assert_eq!(rig.send(&process.bind(50)), Status::Ok);
            });
        }
    }
}

#[test]
fn x36_another_table_answers_invalid() {
    for endpoint in [8, 16] {
        for pasid in [None, Some(5)] {
            ends_the_waiting(endpoint, pasid, |rig, process| {
                let other = Process::unbound(rig, process.endpoint);
                assert_eq!(rig.send(&other.bind(endpoint)), Status::Ok);
            });
        }
    }
}

#[test]
fn x36_a_pasid_that_is_bound_anew_or_taken_back_answers_invalid() {
    let mut rig = Rig::new(setup());
    let process = Process::unbound(&mut rig, 16);
    let page_table = |pasid| request::attach_table(1, 16, process.pages.descriptor(pasid).unwrap());
    for pasid in [0, 5, 6] {
        assert_eq!(rig.send(&page_table(pasid)), Status::Ok);
    }
    let unbind = |pasid| request::attach_table(1, 16, request::unbind(pasid));
    for (request, gone) in [
        (page_table(5), vec![Some(5)]),
        (unbind(5), vec![Some(5)]),
        (page_table(0), vec![None, Some(0)]),
        (unbind(0), vec![None, Some(0)]),
    ] {
        let streams = [None, Some(0), Some(5), Some(6)];
        let is_bound = |pasid: &Option<u32>| {
            !matches!(process.write(&rig, *pasid, 0x1000), Err(AccessError::Fault(FaultCause::Unattached)))
        };
        let bound: Vec<_> = streams.into_iter().filter(is_bound).collect();
        let tickets: Vec<_> =
            bound.iter().map(|&pasid| (pasid, process.waits(&rig, pasid, 0x1000))).collect();
        rig.events();
        assert_eq!(rig.send(&request), Status::Ok);
        for (pasid, ticket) in tickets {
            let expected = gone.contains(&pasid).then_some(Answer::Failed);
            assert_eq!(answer(&rig, ticket), expected, "{pasid:?}: {request:?}");
        }
    }
}

fn invalidate(domain: u32, scope: InvalidateScope, caches: Caches, tag: Option<u64>) -> Request {
    let domain = DomainId(domain);
    Request::Invalidate(Invalidate { domain, scope, caches, leaf: false, tag, global: false })
}

fn pasid(pasid: Option<u32>) -> InvalidateScope {
    InvalidateScope::Pasid(pasid.map(request::pasid))
}

fn addresses(pasid: Option<u32>) -> InvalidateScope {
    let range = IovaRange::from_length(Iova(0x1000), 0x1000).unwrap();
    InvalidateScope::Address { pasid: pasid.map(request::pasid), range, page_lg2: 12 }
}

#[test]
fn x36_an_entry_that_is_invalidated_by_name_answers_invalid() {
    for endpoint in [8, 16] {
        for named in [None, Some(5)] {
            for (scope, caches, tag) in [
                (pasid(named), Caches::all(), None),
                (pasid(named), Caches::PASID, None),
                (pasid(named), Caches::PASID, Some(1)),
                (addresses(named), Caches::PASID, None),
            ] {
                ends_the_waiting(endpoint, named, |rig, process| {
                    assert_eq!(rig.send(&invalidate(endpoint, scope, caches, tag)), Status::Ok);
                    // The entry is as it was, and the next access waits anew.
                    let ticket = process.waits(rig, named, 0x9000);
                    let asked = told(rig);
                    let asked = asked.iter().find(|asked| asked.endpoint.0 == endpoint).unwrap();
                    assert_eq!(rig.send(&response(asked, Success)), Status::Ok);
                    assert_eq!(answer(rig, ticket), Some(Answer::Retry));
                });
            }
        }
    }
    // Page tables that are bound one by one.
    for (endpoint, named, gone) in
        [(16, Some(5), &[Some(5)][..]), (16, Some(0), &[None, Some(0)]), (16, None, &[None, Some(0)])]
    {
        let mut rig = Rig::new(setup());
        let process = Process::unbound(&mut rig, endpoint);
        for value in [0, 5, 6] {
            let table = process.pages.descriptor(value).unwrap();
            assert_eq!(rig.send(&request::attach_table(1, endpoint, table)), Status::Ok);
        }
        let streams = [None, Some(0), Some(5), Some(6)];
        let tickets = streams.map(|stream| process.waits(&rig, stream, 0x1000));
        assert_eq!(rig.send(&invalidate(1, pasid(named), Caches::all(), None)), Status::Ok);
        for (stream, ticket) in streams.iter().zip(tickets) {
            assert_eq!(answer(&rig, ticket), gone.contains(stream).then_some(Answer::Failed), "{stream:?}");
        }
        assert_eq!(told(&mut rig).len(), streams.len() - gone.len());
    }
}

#[test]
fn x36_an_invalidate_that_names_no_entry_answers_nothing() {
    both(|mut rig, process| {
        let endpoint = process.endpoint;
        let told_first = process.waits(&rig, Some(5), 0x1000);
        let asked = told(&mut rig);
        let untold = process.waits(&rig, Some(5), 0x2000);
        for (scope, caches) in [
            (InvalidateScope::Domain, Caches::all()),
            (InvalidateScope::Domain, Caches::PASID),
            (pasid(Some(5)), Caches::TLB),
            (addresses(Some(5)), Caches::TLB),
            (pasid(Some(6)), Caches::all()),
            (pasid(None), Caches::all()),
        ] {
            assert_eq!(rig.send(&invalidate(endpoint, scope, caches, None)), Status::Ok);
            rig.refuse(&invalidate(99, pasid(Some(5)), caches, None).encode(), Status::NoEnt);
        }
        assert_eq!(answer(&rig, told_first), None);
        assert_eq!(answer(&rig, untold), None);
        for asked in [asked, told(&mut rig)].concat() {
            assert_eq!(rig.send(&response(&asked, Success)), Status::Ok);
        }
    });
}

#[test]
fn x36_untagged_accesses_and_their_pasid_have_one_entry() {
    for (named, other) in [(Some(0), None), (None, Some(0))] {
        let mut rig = Rig::new(setup());
        let process = Process::new(&mut rig, 16);
        let tickets = [named, other].map(|pasid| process.waits(&rig, pasid, 0x1000));
        let kept = process.waits(&rig, Some(5), 0x1000);
        assert_eq!(rig.send(&invalidate(16, pasid(named), Caches::all(), None)), Status::Ok);
        for ticket in tickets {
            assert_eq!(answer(&rig, ticket), Some(Answer::Failed));
        }
        assert_eq!(answer(&rig, kept), None);
    }
    // On Arm PASID 0 is not to be had where untagged accesses use its descriptor.
    let mut rig = Rig::new(setup());
    let process = Process::new(&mut rig, 8);
    let ticket = process.waits(&rig, None, 0x1000);
    assert_eq!(rig.send(&invalidate(8, pasid(Some(0)), Caches::all(), None)), Status::Ok);
    assert_eq!(answer(&rig, ticket), Some(Answer::Failed));
}

#[test]
fn x36_a_reset_answers_invalid() {
    for endpoint in [8, 16] {
        let mut rig = Rig::new(setup());
        let process = Process::new(&mut rig, endpoint);
        let first = process.waits(&rig, Some(5), 0x1000);
        let asked = told(&mut rig)[0];
        let second = process.waits(&rig, None, 0x2000);
        rig = rig.restart(None);
        for ticket in [first, second] {
            assert_eq!(answer(&rig, ticket), Some(Answer::Failed));
        }
        assert_eq!(rig.events(), []);
        assert_eq!(rig.send(&response(&asked, Success)), Status::NoEnt);
        rig.works();
    }
}

#[test]
fn x37_a_driver_without_the_feature_hears_of_a_fault() {
    for endpoint in [8, 16] {
        let mut rig = Rig::new(Setup { accept: Some(DeviceConfig::FEATURES), ..setup() });
        let process = Process::new(&mut rig, endpoint);
        let ticket = process.waits(&rig, Some(5), 0x1000);
        let fault = FaultEvent {
            reason: FaultReason::Mapping,
            access: AccessFlags::WRITE,
            endpoint: EndpointId(endpoint),
            pasid: Some(request::pasid(5)),
            address: Some(Iova(0x1000)),
        };
        assert_eq!(rig.events(), [Event::Fault(fault)]);
        assert_eq!(answer(&rig, ticket), Some(Answer::Failed));
        rig.leave_unwritten(&[8; 28], 4);
    }
}

#[test]
fn x54_a_page_request_that_becomes_a_fault_is_told_or_not_as_any() {
    for endpoint in [8, 16] {
        let mut rig = Rig::new(Setup { accept: Some(DeviceConfig::FEATURES), ..setup() });
        let process = Process::new(&mut rig, endpoint);
        // CD.R is set and has to be cleared, FPD the other way round.
        let bit = if endpoint == 8 { 1 << 45 } else { 1 << 1 };
        process.pages.map(rig.alloc(), 0x3000, Memory::page(3).0, 0x1000, Attrs::READ);
        for told in [true, false, true] {
            for iova in [0x1000, 0x3000] {
                let ticket = process.waits(&rig, Some(5), iova);
                assert_eq!(rig.events().len(), usize::from(told), "{endpoint} {iova:#x}");
                assert_eq!(answer(&rig, ticket), Some(Answer::Failed));
                process.waits(&rig, Some(6), iova);
                assert_eq!(rig.events().len(), 1, "of another entry");
            }
            let word = process.entry(&rig, 5);
            let value = rig.machine.memory().load(word).unwrap();
            rig.machine.memory().store(word, value ^ bit);
            assert_eq!(rig.send(&invalidate(endpoint, pasid(Some(5)), Caches::all(), None)), Status::Ok);
        }
    }
}

#[test]
fn x38_what_the_driver_does_not_answer_in_time_is_invalid() {
    for endpoint in [8, 16] {
        let config = DeviceConfig { page_request_timeout_ns: 1000, ..DeviceConfig::default() };
        let mut rig = Rig::new(with(config));
        let process = Process::new(&mut rig, endpoint);
        set_time(&rig, 1 << 40);
        let first = process.waits(&rig, Some(5), 0x1000);
        let asked = told(&mut rig)[0];
        let second = process.waits(&rig, Some(5), 0x2000);
        set_time(&rig, 2 << 40);
        set_time(&rig, (2 << 40) + 999);
        for ticket in [first, second] {
            assert_eq!(answer(&rig, ticket), None);
        }
        set_time(&rig, (2 << 40) + 1000);
        for ticket in [first, second] {
            assert_eq!(answer(&rig, ticket), Some(Answer::Failed), "told or not");
        }
        assert_eq!(rig.events(), []);
        assert_eq!(rig.send(&response(&asked, Success)), Status::NoEnt);
        rig.works();
    }
}

#[test]
fn x39_beyond_a_bound_groups_are_answered_invalid_at_once() {
    let limits = Limits { max_page_requests_per_endpoint: 4, max_page_requests: 6, ..Limits::DEFAULT };
    let mut rig = Rig::new(with(DeviceConfig { limits, ..DeviceConfig::default() }));
    let [flood, other] = [8, 16].map(|endpoint| Process::new(&mut rig, endpoint));
    let tickets: Vec<Ticket> = (0..50u64).map(|page| flood.waits(&rig, Some(5), page << 12)).collect();
    let asked = told(&mut rig);
    assert_eq!(asked.len(), 4);
    for (at, &ticket) in tickets.iter().enumerate() {
        assert_eq!(answer(&rig, ticket), (at >= 4).then_some(Answer::Failed), "{at}");
    }
    // The other one has its own, as far as there is room for all.
    let tickets: Vec<Ticket> = (0..3u64).map(|page| other.waits(&rig, Some(5), page << 12)).collect();
    let others = told(&mut rig);
    assert_eq!(others.len(), 2);
    assert_eq!(
        tickets.iter().map(|&ticket| answer(&rig, ticket)).collect::<Vec<_>>(),
        [None, None, Some(Answer::Failed)]
    );
    assert_eq!(rig.machine.lock().device().page_request_counts().refused, 47);
    for asked in asked.iter().chain(&others) {
        assert_eq!(rig.send(&response(asked, Success)), Status::Ok);
    }
    rig.works();
}

#[test]
fn x40_endpoints_take_turns_and_so_do_faults() {
    let mut rig = Rig::new(setup());
    let [flood, other] = [8, 16].map(|endpoint| Process::new(&mut rig, endpoint));
    for page in 0..100u64 {
        flood.waits(&rig, Some(5), page << 12);
        assert!(rig.machine.access(9, None, page << 12, pgtable_formats::AccessKind::Read).is_err());
    }
    other.waits(&rig, Some(5), 0x1000);
    let endpoints: Vec<(bool, u32)> = rig
        .events()
        .into_iter()
        .take(6)
        .map(|event| match event {
            Event::PageRequest(request) => (true, request.endpoint.0),
            Event::Fault(fault) => (false, fault.endpoint.0),
        })
        .collect();
    assert_eq!(endpoints, [(false, 9), (true, 8), (false, 9), (true, 16), (false, 9), (true, 8)]);
}

#[test]
fn x41_only_what_a_page_can_cure_waits() {
    both(|mut rig, process| {
        let faults = |rig: &mut Rig, pasid, iova| {
            let error = process.write(rig, pasid, iova).unwrap_err();
            assert!(matches!(error, AccessError::Fault(_)), "{error:?}");
            assert!(matches!(rig.events()[..], [Event::Fault(_)]));
        };
        // No entry for the PASID.
        faults(&mut rig, Some(9), 0x1000);
        // The entry of PASID 5 leads out of memory.
        let word = if process.endpoint == 8 { 1 } else { 2 };
        let root = Gpa(process.entry(&rig, 5).0 + 8 * word);
        let value = rig.machine.memory().load(root).unwrap();
        rig.machine.memory().store(root, value | 1 << 46);
        rig.machine.lock().device_mut().host_mut().flush();
        faults(&mut rig, Some(5), 0x1000);
        rig.machine.memory().store(root, value);
        // A page without the permission can be cured.
        process.pages.map(rig.alloc(), 0x1000, Memory::page(3).0, 0x1000, Attrs::READ);
        process.waits(&rig, Some(6), 0x1000);
        told(&mut rig);
        // What the table has no entry for is a translation fault on Arm, which stalls like any other: beyond T0SZ, in a
        // half that is switched off. On VT-d an address that is not canonical is none.
        for (iova, is_canonical) in [(1 << 50, false), (u64::MAX << 48, false), (u64::MAX, true)] {
            if process.endpoint == 8 || is_canonical {
                process.waits(&rig, Some(6), iova);
            } else {
                faults(&mut rig, Some(6), iova);
            }
        }
        told(&mut rig);
        // A domain of mappings waits for no page, nor does an endpoint in no domain.
        assert_eq!(rig.send(&request::attach(50, process.endpoint)), Status::Ok);
        faults(&mut rig, None, 0x1000);
        assert_eq!(rig.send(&request::detach(50, process.endpoint)), Status::Ok);
        faults(&mut rig, None, 0x1000);
    });
}

#[test]
fn x55_numbers_of_groups_go_round() {
    both(|mut rig, process| {
        let held = process.waits(&rig, Some(6), 0x1000);
        let held_number = told(&mut rig)[0].group_id;
        let mut numbers = Vec::new();
        // All of them, and some once more.
        for round in 0..66_000u32 {
            process.waits(&rig, Some(5), 0x1000);
            let asked = told(&mut rig)[0];
            numbers.push(asked.group_id);
            // Over by an answer, or by the device.
            if round % 64 != 0 {
                assert_eq!(rig.send(&response(&asked, Invalid)), Status::Ok);
            } else {
                let entry = invalidate(process.endpoint, pasid(Some(5)), Caches::all(), None);
                assert_eq!(rig.send(&entry), Status::Ok);
                assert_eq!(rig.send(&response(&asked, Success)), Status::NoEnt);
            }
        }
        assert_eq!(answer(&rig, held), None);
        assert!(!numbers.contains(&held_number));
        let (round, next) = numbers.split_at(usize::from(u16::MAX));
        assert_eq!(round.iter().collect::<BTreeSet<_>>().len(), round.len(), "each one once");
        assert_eq!(next, &round[..next.len()], "and again in their order");
    });
}

#[test]
fn x56_page_requests_go_with_tables() {
    let features = DeviceConfig::ALL_FEATURES - Features::ATTACH_TABLE;
    let rig = Rig::new(with(DeviceConfig { features, ..DeviceConfig::default() }));
    assert_eq!(rig.machine.lock().offered_features() & Features::DEVICE, features - Features::PAGE_REQUEST);
    // Who takes the one without the other has an IOMMU as it always was.
    let mut rig = Rig::new(Setup { accept: Some(features), ..setup() });
    assert!(rig.machine.lock().device().features().contains(Features::PAGE_REQUEST));
    assert_eq!(rig.send(&request::attach(1, 8)), Status::Ok);
    let host_answer = {
        let mut iommu = rig.machine.lock();
        iommu.device_mut().host_mut().access(stream(8, None), Iova(0x1000), Access::WRITE, |_| ())
    };
    assert_eq!(host_answer, Err(AccessError::Fault(FaultCause::Unmapped)));
    assert!(matches!(rig.events()[..], [Event::Fault(_)]));
    let response = PageResponse { endpoint: EndpointId(8), pasid: None, group_id: 0, code: Success };
    assert_eq!(rig.send(&Request::PageResponse(response)), Status::NoEnt);
}
