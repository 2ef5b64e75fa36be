//! Processes, PASIDs and page requests, against a device that answers by script.

mod bounds;
mod kill;
mod paging;
mod unbind;

use alloc::rc::Rc;
use alloc::{vec, vec::Vec};
use core::cell::RefCell;

use pgtable_formats::format::Attrs;
use pgtable_formats::{Access, Gpa, Iova, IovaRange, Pasid};
use viommu_wire::{
    AccessFlags, AttachTable, EndpointId, Event, FaultEvent, FaultReason, Features, Invalidate, PageRequest,
    PageRequestFlags, PageResponse, PageResponseCode, Property, Request, Status, TableFormats,
};

use super::tables::{answer, canonical, dma, range, requests};
use super::{OFFERED, TestDriver, driver, driver_with};
use crate::hal::fake::{FakePlatform, FakeTransport};
use crate::sva::{
    Answer, Area, DemandPaged, FaultHandler, GroupLimits, Handle, PageGroup, ProcessId, Processes, Sva,
    SvaError, SvaOptions, Token,
};
use crate::tables::{AddressSpace, SpaceOptions};
use crate::{Endpoint, EndpointProperties, Hardware};

const HEAP: u64 = 0x7f00_0000_0000;
const ENDPOINT: u32 = 8;

/// An endpoint that has page requests.
fn asking(id: u32, hardware: Property, formats: &[u8]) -> Endpoint {
    let properties = [
        hardware,
        Property::TableFormats(TableFormats::new(formats).unwrap()),
        Property::PasidSize { bits: 8 },
        Property::PageRequests(PageRequestFlags::SUPPORTED),
    ];
    Endpoint::new(EndpointId(id), EndpointProperties::parse(&super::area(&properties)))
}

fn arm(id: u32, formats: &[u8]) -> Endpoint {
    use pgtable_formats::context::smmuv3::IdRegisters;
    let IdRegisters { idr0, idr1, idr3, idr5 } = IdRegisters::SOFTWARE;
    asking(id, Property::HwArmSmmu3 { idr0, idr1, idr3, idr5 }, formats)
}

fn intel(id: u32, formats: &[u8]) -> Endpoint {
    let pgtable_formats::context::vtd::CapRegisters { cap, ecap } =
        pgtable_formats::context::vtd::CapRegisters::SOFTWARE;
    asking(id, Property::HwIntelVtd { cap, ecap }, formats)
}

/// Both vendors, both ways.
fn all(id: u32) -> Vec<Endpoint> {
    vec![arm(id, &[1]), arm(id, &[0x80]), intel(id, &[0x81]), intel(id, &[2])]
}

fn heap(pages: u64) -> IovaRange {
    IovaRange::from_length(Iova(HEAP), pages << 12).unwrap()
}

/// A process with a heap.
fn process(
    driver: &mut TestDriver,
    endpoint: &Endpoint,
    processes: &mut Processes<DemandPaged>,
    max_pages: usize,
) -> ProcessId {
    let space = AddressSpace::new(driver, endpoint, SpaceOptions::default()).unwrap();
    let mut memory = DemandPaged::new(&space, max_pages);
    memory.add_area(Area { range: heap(64), attrs: Attrs::READ_WRITE }).unwrap();
    processes.add(space, memory)
}

fn wanted(pasid: Pasid, group_id: u16, page: u64, last: bool) -> PageRequest {
    PageRequest {
        access: AccessFlags::WRITE,
        endpoint: EndpointId(ENDPOINT),
        pasid: Some(pasid),
        address: Iova(HEAP + (page << 12)),
        group_id,
        last,
        private_data: None,
    }
}

fn send(device: &FakeTransport, event: Event) {
    let mut record = [0; 48];
    let length = event.encode(&mut record).unwrap();
    assert!(device.send_event(&record[..length], length as u32), "no event buffer");
}

fn ask(device: &FakeTransport, request: PageRequest) {
    send(device, Event::PageRequest(request));
}

/// What the interrupt of the event queue does. Gives what was for somebody else.
fn events(driver: &mut TestDriver, sva: &mut Sva) -> Vec<Event> {
    let mut others = vec![];
    driver
        .handle_events(|event| {
            if !sva.receive(&event) {
                others.push(event);
            }
        })
        .unwrap();
    others
}

fn response(pasid: Pasid, group_id: u16, code: PageResponseCode) -> Request {
    Request::PageResponse(PageResponse { endpoint: EndpointId(ENDPOINT), pasid: Some(pasid), group_id, code })
}

/// What the device was told of tables, all that is in force; found by PASID as hardware finds it.
fn device_dma(
    driver: &TestDriver,
    endpoint: &Endpoint,
    tables: &[Request],
    pasid: Pasid,
    page: u64,
) -> Option<Gpa> {
    let mut bound = None;
    for request in tables {
        let Request::AttachTable(AttachTable { table, .. }) = request else { continue };
        match table {
            viommu_wire::TableDescriptor::Unbind { pasid: gone } if *gone == pasid => bound = None,
            viommu_wire::TableDescriptor::Unbind { .. } => {}
            table => {
                let (table, of) = canonical(endpoint, *table);
                if of.is_none_or(|of| of == pasid) {
                    bound = Some(table);
                }
            }
        }
    }
    dma(driver, &bound?, Some(pasid), HEAP + (page << 12), Access::WRITE).ok()
}

type Seen = Vec<(Token, Vec<PageRequest>)>;

/// The handler keeps what it sees, and answers by a list; then later.
#[derive(Debug, Default)]
struct Scripted {
    seen: Rc<RefCell<Seen>>,
    answers: Vec<Answer>,
}

impl FaultHandler<FakePlatform, FakeTransport> for Scripted {
    fn handle(&mut self, _: &mut TestDriver, _: &mut AddressSpace, group: &PageGroup<'_>) -> Answer {
        self.seen.borrow_mut().push((group.token, group.requests.to_vec()));
        self.answers.pop().unwrap_or(Answer::Later)
    }
}

/// A fault, from the event to the answer, on both vendors' hardware and in both ways; the guest's code is the same.
#[test]
fn a_device_pages_its_memory_in_whatever_the_hardware() {
    for endpoint in all(ENDPOINT) {
        let (mut driver, device) = driver();
        let before = driver.platform().alloc.live.clone();
        let mut processes = Processes::new();
        let mut sva = Sva::new(&mut driver, &endpoint, SvaOptions::default()).unwrap();
        assert!(sva.has_page_requests());
        let id = process(&mut driver, &endpoint, &mut processes, 16);
        let handle = sva.bind(&mut driver, &mut processes, id).unwrap();
        let pasid = handle.pasid();
        let tables = requests(&device);
        assert_eq!(device_dma(&driver, &endpoint, &tables, pasid, 3), None);

        // Two pages in one group; nothing is answered before the last.
        ask(&device, wanted(pasid, 7, 3, false));
        assert_eq!(events(&mut driver, &mut sva), []);
        assert_eq!(sva.serve(&mut driver, &mut processes), Ok(0));
        assert_eq!(requests(&device), []);
        ask(&device, wanted(pasid, 7, 4, true));
        events(&mut driver, &mut sva);
        assert!(sva.has_work());
        assert_eq!(sva.serve(&mut driver, &mut processes), Ok(1));
        // No invalidation: absence is not cached.
        assert_eq!(requests(&device), [response(pasid, 7, PageResponseCode::Success)]);
        let frames: Vec<_> =
            [3, 4].map(|page| device_dma(&driver, &endpoint, &tables, pasid, page).unwrap()).into();
        assert_ne!(frames[0], frames[1]);
        assert_eq!(device_dma(&driver, &endpoint, &tables, pasid, 5), None);
        assert_eq!(processes.get(id).unwrap().handler().resident(), 2);

        // Outside of every area.
        ask(&device, wanted(pasid, 7, 64, true));
        events(&mut driver, &mut sva);
        sva.serve(&mut driver, &mut processes).unwrap();
        assert_eq!(requests(&device), [response(pasid, 7, PageResponseCode::Invalid)]);

        // A process is bound once, however many handles it has.
        let again = sva.bind(&mut driver, &mut processes, id).unwrap();
        assert_eq!((again.pasid(), sva.bound(), requests(&device)), (pasid, 1, vec![]));
        sva.unbind(&mut driver, &mut processes, handle).unwrap();
        assert_eq!(requests(&device), [], "another handle is out");
        assert!(device_dma(&driver, &endpoint, &tables, pasid, 3).is_some());
        let (again, error) = processes_in_use(&mut driver, &mut processes, id, again);
        assert_eq!(error, crate::tables::TableError::InUse);
        sva.unbind(&mut driver, &mut processes, again).unwrap();
        let tables: Vec<_> = tables.into_iter().chain(requests(&device)).collect();
        assert_eq!(device_dma(&driver, &endpoint, &tables, pasid, 3), None);

        processes.remove(&mut driver, id).unwrap().release(&mut driver);
        sva.release(&mut driver).map_err(|(_, error)| error).unwrap();
        assert_eq!(driver.platform().alloc.live, before);
        assert_eq!(driver.asids.in_use(), 0);
    }
}

fn processes_in_use(
    driver: &mut TestDriver,
    processes: &mut Processes<DemandPaged>,
    id: ProcessId,
    handle: Handle,
) -> (Handle, crate::tables::TableError) {
    match processes.remove(driver, id) {
        Err(crate::sva::ExitError::Table(error)) => (handle, error),
        other => panic!("{other:?}"),
    }
}

/// The guest takes the first format that it knows, which is the native one, and the style of its choice otherwise.
#[test]
fn the_way_that_the_device_prefers_is_taken() {
    let (mut driver, _) = driver();
    for (endpoint, format) in [
        (arm(8, &[1, 0x80]), 1),
        (arm(8, &[0x80, 1]), 0x80),
        (intel(8, &[2, 0x81]), 2),
        (intel(8, &[0x81, 2]), 0x81),
    ] {
        let sva = Sva::new(&mut driver, &endpoint, SvaOptions::default()).unwrap();
        assert_eq!(sva.format(), format);
    }
    let plain = super::smmuv3_endpoint(9, pgtable_formats::context::smmuv3::IdRegisters::SOFTWARE, 0);
    let none = Sva::new(&mut driver, &plain, SvaOptions::default());
    assert_eq!(none.err(), Some(SvaError::NoPasids(EndpointId(9))));
}

/// 48 bytes where page requests were negotiated, 24 where not: then the device cannot tell of one.
#[test]
fn event_buffers_have_room_for_what_was_negotiated() {
    for (offered, length) in [(OFFERED, 48), (OFFERED - Features::PAGE_REQUEST, 24)] {
        let (mut driver, device) = driver_with(offered);
        let chain = device.next_chain(1).unwrap();
        assert_eq!(chain.writable[0].1, length);
        device.push_used(1, chain.head.into(), 0);
        assert_eq!(driver.handle_events(|_| ()), Ok(0));
        assert_eq!(driver.event_counters().ignored, 1);
        let endpoint = arm(8, &[1]);
        let sva = Sva::new(&mut driver, &endpoint, SvaOptions::default()).unwrap();
        assert_eq!(sva.has_page_requests(), length == 48);
        if length == 24 {
            let refused = driver.respond(PageResponse {
                endpoint: EndpointId(8),
                pasid: None,
                group_id: 0,
                code: PageResponseCode::Success,
            });
            let missing = crate::RequestError::NotNegotiated(Features::PAGE_REQUEST);
            assert_eq!(refused, Err(missing));
        }
    }
}

/// A descriptor lets accesses stall where that is how the hardware waits, and only then.
#[test]
fn accesses_stall_where_the_hardware_lets_them() {
    use pgtable_formats::context::smmuv3::{CdTable, IdRegisters};
    let software = IdRegisters::SOFTWARE;
    let optional = software.idr0 & !(3 << 24);
    for (idr0, features, stalls) in [
        (software.idr0, OFFERED, false),
        (optional, OFFERED, true),
        (optional, OFFERED - Features::PAGE_REQUEST, false),
    ] {
        let (mut driver, device) = driver_with(features);
        let IdRegisters { idr1, idr3, idr5, .. } = software;
        let endpoint = asking(8, Property::HwArmSmmu3 { idr0, idr1, idr3, idr5 }, &[1]);
        let mut processes = Processes::new();
        let mut sva = Sva::new(&mut driver, &endpoint, SvaOptions::default()).unwrap();
        let id = process(&mut driver, &endpoint, &mut processes, 64);
        let (space, memory) = processes.get_mut(id).unwrap().parts();
        memory.pin(&mut driver, space).unwrap();
        let handle = sva.bind(&mut driver, &mut processes, id).unwrap();
        let sent = requests(&device);
        let Request::AttachTable(AttachTable { table, .. }) = sent[0] else { panic!("{sent:?}") };
        let viommu_wire::TableDescriptor::Smmuv3 { ste0, ste1 } = table else { panic!("{table:?}") };
        let Some(Hardware::Smmuv3(caps)) = endpoint.properties().hardware else { panic!() };
        let table = CdTable::from_ste(ste0, ste1, &caps).unwrap().with_stall(stalls);
        let memory = &driver.platform().memory;
        let cd = table.read(memory, handle.pasid()).unwrap().unwrap();
        assert_eq!(cd.word0.stall(), stalls);
        let untagged = table.read(memory, Pasid::ZERO).unwrap().unwrap();
        assert!(!untagged.word0.stall(), "nobody answers for untagged DMA");
        assert!(table.lookup(memory, Some(handle.pasid())).is_ok());
        sva.unbind(&mut driver, &mut processes, handle).unwrap();
    }
}

/// Groups are open side by side, of several PASIDs, and are answered in any order; a repeated answer does no harm.
#[test]
fn groups_are_answered_in_any_order() {
    let (mut driver, device) = driver();
    let endpoint = intel(ENDPOINT, &[2]);
    let mut processes = Processes::new();
    let mut sva = Sva::new(&mut driver, &endpoint, SvaOptions::default()).unwrap();
    let seen = Rc::default();
    let mut handles = vec![];
    for _ in 0..2 {
        let space = AddressSpace::new(&mut driver, &endpoint, SpaceOptions::default()).unwrap();
        let id = processes.add(space, Scripted { seen: Rc::clone(&seen), answers: vec![] });
        handles.push(sva.bind(&mut driver, &mut processes, id).unwrap());
    }
    let [first, second] = [handles[0].pasid(), handles[1].pasid()];
    requests(&device);
    for (pasid, group, page, last) in [
        (first, 1, 10, false),
        (second, 1, 20, false),
        (first, 2, 11, true),
        (second, 1, 21, true),
        (first, 1, 12, true),
    ] {
        ask(&device, wanted(pasid, group, page, last));
    }
    events(&mut driver, &mut sva);
    assert_eq!(sva.serve(&mut driver, &mut processes), Ok(3));
    assert_eq!((requests(&device), sva.open_groups()), (vec![], 3));
    let groups: Vec<_> = seen
        .borrow()
        .iter()
        .map(|(token, requests)| {
            (token.pasid().unwrap(), requests.iter().map(|request| request.address.0 >> 12 & 0xff).collect())
        })
        .collect();
    let expected: [(Pasid, Vec<u64>); 3] = [(first, vec![11]), (second, vec![20, 21]), (first, vec![10, 12])];
    assert_eq!(groups, expected);

    let tokens: Vec<_> = seen.borrow().iter().map(|(token, _)| *token).collect();
    use PageResponseCode::{Failure, Invalid, Success};
    for (token, code) in [(2, Success), (0, Failure), (1, Invalid)] {
        sva.answer(&mut driver, &processes, tokens[token], code).unwrap();
    }
    assert_eq!(
        requests(&device),
        [response(first, 1, Success), response(first, 2, Failure), response(second, 1, Invalid)]
    );
    for token in &tokens {
        let answered = sva.answer(&mut driver, &processes, *token, Success);
        assert_eq!(answered, Err(SvaError::Answered));
    }
    assert_eq!((requests(&device), sva.open_groups()), (vec![], 0));

    // The device answered group 1 by itself and uses its number anew: the old token says nothing about the new group.
    for page in [30, 31] {
        ask(&device, wanted(first, 1, page, true));
        events(&mut driver, &mut sva);
        sva.serve(&mut driver, &mut processes).unwrap();
    }
    assert_eq!(sva.group_counters().superseded, 1);
    let [.., old, new] = seen.borrow().iter().map(|(token, _)| *token).collect::<Vec<_>>()[..] else {
        panic!()
    };
    assert_eq!(sva.answer(&mut driver, &processes, old, Failure), Err(SvaError::Answered));
    // NOENT: gone on the way.
    answer(&device, Status::NoEnt);
    assert_eq!(sva.answer(&mut driver, &processes, new, Success), Ok(()));
    assert_eq!(requests(&device), [response(first, 1, Success)]);
    assert_eq!((sva.serve_counters().answered, sva.serve_counters().gone), (3, 1));
}

/// A handler's answers of one round go out with one notification.
#[test]
fn answers_of_a_round_share_a_notification() {
    let (mut driver, device) = driver();
    let endpoint = arm(ENDPOINT, &[1]);
    let mut processes = Processes::new();
    let mut sva = Sva::new(&mut driver, &endpoint, SvaOptions::default()).unwrap();
    let id = process(&mut driver, &endpoint, &mut processes, 16);
    let handle = sva.bind(&mut driver, &mut processes, id).unwrap();
    requests(&device);
    for group in 0..6 {
        ask(&device, wanted(handle.pasid(), group, group.into(), true));
    }
    events(&mut driver, &mut sva);
    let before = driver.counters().notifications;
    assert_eq!(sva.serve(&mut driver, &mut processes), Ok(6));
    assert_eq!((requests(&device).len(), driver.counters().notifications), (6, before + 1));
}

/// What is unmapped or changed is invalidated for each PASID of each endpoint, in the endpoint's own domain.
#[test]
fn a_change_reaches_every_endpoint_of_the_process() {
    for (one, other) in [(arm(8, &[1]), arm(9, &[0x80])), (intel(8, &[2]), intel(9, &[0x81]))] {
        let (mut driver, device) = driver();
        let mut processes = Processes::new();
        let mut first = Sva::new(&mut driver, &one, SvaOptions::default()).unwrap();
        let mut second = Sva::new(&mut driver, &other, SvaOptions::default()).unwrap();
        let id = process(&mut driver, &one, &mut processes, 16);
        // Another process, so that PASIDs differ.
        let before = process(&mut driver, &other, &mut processes, 16);
        let _other = second.bind(&mut driver, &mut processes, before).unwrap();
        let handles = [
            first.bind(&mut driver, &mut processes, id).unwrap(),
            second.bind(&mut driver, &mut processes, id).unwrap(),
        ];
        assert_ne!(handles[0].pasid(), handles[1].pasid());
        let (space, memory) = processes.get_mut(id).unwrap().parts();
        memory.populate(&mut driver, space, Iova(HEAP), AccessFlags::WRITE).unwrap();
        requests(&device);
        memory.protect(&mut driver, space, heap(1), Attrs::READ).unwrap();
        memory.discard(&mut driver, space, heap(2)).unwrap();
        let expected = [(first.domain(), handles[0].pasid()), (second.domain(), handles[1].pasid())];
        let sent: Vec<_> = requests(&device)
            .into_iter()
            .map(|request| match request {
                Request::Invalidate(Invalidate {
                    domain,
                    scope: viommu_wire::InvalidateScope::Address { pasid: Some(pasid), range, .. },
                    leaf,
                    ..
                }) => (domain, pasid, range, leaf),
                request => panic!("{request:?}"),
            })
            .collect();
        let of = |range, leaf| expected.map(|(domain, pasid)| (domain, pasid, range, leaf));
        assert_eq!(sent, [of(heap(1), true), of(heap(2), true)].concat());
    }
}

fn fault() -> Event {
    Event::Fault(FaultEvent {
        reason: FaultReason::Mapping,
        access: AccessFlags::READ,
        endpoint: EndpointId(ENDPOINT),
        pasid: None,
        address: Some(Iova(0x1000)),
    })
}
