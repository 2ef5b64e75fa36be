//! The recorder: what goes into a trace comes out of it, and nothing else is believed.

#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, unreachable_pub)]

mod driver;

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use driver::{BASE, BUFFERS, Driver, WRITE, memory};
use pgtable_formats::Pasid;
use pgtable_formats::context::vtd;
use viommu_device::host::{EndpointCaps, Stream, TableCaps};
use viommu_device::soft::SoftHost;
use viommu_device::wire::{
    AccessFlags, Attach, AttachFlags, AttachTable, DomainId, Map, MapFlags, PageResponse, PageResponseCode,
    Request, TableDescriptor, VtdPageTable,
};
use viommu_device::{Device, DeviceConfig, EndpointId, Gpa, Iova, Status};
use viommu_queue::record::{
    Accessed, Clock, Event, MAX_REQUEST, Outcome, PageAsked, Recorder, Tape, TraceError, TraceReader,
    WaitEnd, Waited,
};
use viommu_queue::{DmaError, EVENT_QUEUE, GuestTables, REQUEST_QUEUE, SharedIommu, VirtioIommu};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Iommu as _, IommuMemory, Permissions};

const ENDPOINT: EndpointId = EndpointId(8);
const DATA: u64 = BASE + 0x8_0000;
/// Present, writable, for users, accessed, dirty.
const X86: u64 = 0x67;

/// Keeps what it is told, as text.
#[derive(Default)]
struct Notes(Mutex<Vec<String>>);

impl Recorder for Notes {
    fn record(&self, event: Event<'_>) {
        let text = match event {
            Event::Request { readable, status } => {
                let kind = Request::peek(readable).map_or("unknown", |kind| kind.name());
                format!("{kind} {}", status.map_or("unwritten", Status::name))
            }
            Event::Kick { served, notify } => format!("kick {served} {notify}"),
            Event::Access(Accessed { stream, iova, length, access, outcome }) => {
                let pasid = stream.pasid.map_or(-1, |pasid| i64::from(pasid.value()));
                format!("access {} {pasid} {iova} {length} {:x} {outcome:?}", stream.endpoint, access.bits())
            }
            Event::PageRequest(PageAsked { stream, address, access, group, last }) => {
                format!("asked {} {address} {:x} group {group} {last}", stream.endpoint, access.bits())
            }
            Event::Waited(Waited { group, end, .. }) => format!("waited group {group} {end:?}"),
            Event::Reset => "reset".into(),
        };
        self.0.lock().unwrap().push(text);
    }
}

impl Notes {
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

#[test]
fn requests_kicks_accesses_and_resets_are_told_in_order() {
    let memory = memory();
    let mut host = SoftHost::new(GuestTables::new(&memory));
    host.add_endpoint(ENDPOINT, EndpointCaps::default()).unwrap();
    let iommu = VirtioIommu::new(Device::new(DeviceConfig::default(), host).unwrap(), 16).unwrap();
    let shared = SharedIommu::new(iommu);
    let mut requests = Driver::new(&memory, 16);
    {
        let mut iommu = shared.lock();
        let offered = iommu.offered_features();
        iommu.accept_features(offered).unwrap();
        requests.enable(iommu.queue_mut(REQUEST_QUEUE).unwrap(), true);
    }
    let mut send = |list: &[Vec<u8>]| {
        for (index, bytes) in list.iter().enumerate() {
            let at = BUFFERS + 0x100 * index as u64;
            requests.write(at, bytes);
            let descriptor = 2 * index as u16;
            requests.chain(descriptor, &[(at, bytes.len() as u32, 0), (at + 0x80, 4, WRITE)]);
            requests.offer(descriptor);
        }
        let _ = shared.lock().kick_requests(&memory).unwrap();
        requests.used();
    };
    let attach = Attach { domain: DomainId(1), endpoint: ENDPOINT, flags: AttachFlags::empty() };
    let attach = Request::Attach(attach).encode().to_vec();
    let (virt_start, virt_end) = (Iova(0x1000), Iova(0x1fff));
    let map = Map { domain: DomainId(1), virt_start, virt_end, phys_start: Gpa(DATA), flags: MapFlags::READ };
    let map = Request::Map(map).encode().to_vec();

    let notes = Arc::new(Notes::default());
    let stream = Stream::untagged(ENDPOINT);
    let mut recorded = shared.stream(stream).recorded(None);
    let read = |iommu: &_, at: u64| {
        let dma = IommuMemory::new(memory.clone(), Clone::clone(iommu), true, ());
        dma.read_obj::<u64>(GuestAddress(at)).is_ok()
    };
    assert!(!read(&recorded, 0x1000));
    send(std::slice::from_ref(&attach));
    assert_eq!(notes.take(), [""; 0], "nobody was told of it");

    shared.lock().set_recorder(Some(notes.clone()));
    assert!(shared.lock().recorder().is_some());
    recorded.set_recorder(Some(notes.clone()));
    send(&[map.clone(), map, vec![0x77; 8]]);
    let told = notes.take();
    assert_eq!(told[..3], ["MAP OK", "MAP INVAL", "unknown unwritten"]);
    assert!(told[3].starts_with("kick 3 "), "{told:?}");

    assert!(read(&recorded, 0x1ff8));
    assert!(!read(&recorded, 0x1ffc), "its second half is not mapped");
    let privileged = shared.stream(stream).privileged().recorded(Some(notes.clone()));
    assert!(privileged.inner().is_privileged());
    let write = IommuMemory::new(memory.clone(), privileged, true, ());
    assert!(write.write_obj(0u32, GuestAddress(0x1000)).is_err());
    let pasid = Stream { endpoint: ENDPOINT, pasid: Pasid::new(5) };
    let other =
        IommuMemory::new(memory.clone(), shared.stream(pasid).recorded(Some(notes.clone())), true, ());
    assert!(!other.check_range(GuestAddress(0x1000), 1, Permissions::No));
    let accesses = [
        "access 8 -1 0x1ff8 8 1 Passed",
        "access 8 -1 0x1ffc 8 1 Unmapped",
        "access 8 -1 0x1000 4 a Permission",
        "access 8 5 0x1000 1 0 Unattached",
    ];
    let told = notes.take();
    assert_eq!(told, accesses);

    shared.lock().reset();
    shared.lock().set_recorder(None);
    shared.lock().reset();
    assert_eq!(notes.take(), ["reset"]);
}

fn access(iova: u64) -> Event<'static> {
    Event::Access(Accessed {
        stream: Stream { endpoint: ENDPOINT, pasid: Pasid::new(0xf_ffff) },
        iova: Iova(iova),
        length: 1 << 30,
        access: AccessFlags::READ | AccessFlags::WRITE | AccessFlags::PRIVILEGED,
        outcome: Outcome::Malformed,
    })
}

/// One of each.
fn events() -> [Event<'static>; 9] {
    [
        Event::Request { readable: &[1, 2, 3], status: Some(Status::NoMem) },
        Event::Request { readable: &[], status: None },
        access(0x1234_5678_9abc),
        Event::Access(Accessed {
            stream: Stream::untagged(EndpointId(u32::MAX)),
            iova: Iova(0),
            length: 1,
            access: AccessFlags::empty(),
            outcome: Outcome::Passed,
        }),
        Event::Kick { served: u32::MAX, notify: true },
        Event::Reset,
        Event::Access(Accessed {
            stream: Stream { endpoint: ENDPOINT, pasid: Pasid::new(1) },
            iova: Iova(0x1fff),
            length: 2,
            access: AccessFlags::READ | AccessFlags::WRITE,
            outcome: Outcome::Waits { group: 0xabcd },
        }),
        Event::PageRequest(PageAsked {
            stream: Stream { endpoint: ENDPOINT, pasid: Pasid::new(1) },
            address: Iova(u64::MAX),
            access: AccessFlags::WRITE,
            group: 0xabcd,
            last: true,
        }),
        Event::Waited(Waited { stream: Stream::untagged(ENDPOINT), group: 1, end: WaitEnd::TimedOut }),
    ]
}

fn trace() -> Vec<u8> {
    let tape = Tape::new(Vec::new());
    events().into_iter().for_each(|event| tape.record(event));
    let written = tape.finish().unwrap();
    assert_eq!((written.events, written.lost), (9, 0));
    tape.record(Event::Reset);
    assert_eq!(tape.finish().unwrap(), written, "nothing comes behind the end");
    let bytes = tape.into_sink();
    assert_eq!(written.bytes, bytes.len() as u64);
    bytes
}

/// Events with their times, and how it ended.
fn read(bytes: &[u8]) -> (Vec<(u64, String)>, Result<u64, TraceError>) {
    let mut read = Vec::new();
    let mut reader = match TraceReader::new(bytes) {
        Ok(reader) => reader,
        Err(error) => return (read, Err(error)),
    };
    loop {
        match reader.next_event() {
            Ok(Some((time, event))) => read.push((time, format!("{event:?}"))),
            Ok(None) => return (read, Ok(reader.lost())),
            Err(error) => return (read, Err(error)),
        }
    }
}

#[test]
fn what_is_recorded_is_read() {
    let expected: Vec<_> = (0..).zip(events().map(|event| format!("{event:?}"))).collect();
    let bytes = trace();
    let (read, end) = read(&bytes);
    assert_eq!((read, end.unwrap()), (expected, 0));
    // The layout as the module says it, of the third record: behind the header, 12 + 3 bytes, and 12.
    let record = &bytes[16 + 15 + 12..][..32];
    assert_eq!(record[..4], [2, 20, 6, 0b1011]);
    assert_eq!(record[4..12], 2_u64.to_le_bytes());
    assert_eq!(record[12..20], [8, 0, 0, 0, 0xff, 0xff, 0x0f, 0]);
    assert_eq!(record[20..], [0xbc, 0x9a, 0x78, 0x56, 0x34, 0x12, 0, 0, 0, 0, 0, 0x40]);
    // The last three, in front of the end: bodies of 22, 18 and 10 bytes.
    let last = &bytes[bytes.len() - (12 + 8) - (12 + 22) - (12 + 18) - (12 + 10)..];
    assert_eq!((&last[..4], &last[12 + 20..12 + 22]), (&[2, 22, 7, 0b11][..], &[0xcd, 0xab][..]));
    let asked = &last[34..];
    assert_eq!((&asked[..4], &asked[12..16]), (&[5, 18, 0, 0b10010][..], &[8, 0, 0, 0][..]));
    assert_eq!(asked[12 + 8..30], [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xcd, 0xab]);
    let waited = &asked[30..];
    assert_eq!((&waited[..4], &waited[12 + 4..22]), (&[6, 10, 2, 0][..], &[255, 255, 255, 255, 1, 0][..]));
}

/// Both forms of accesses that wait, and what the driver is told of them.
#[test]
fn accesses_that_wait_are_told_until_they_go_on() {
    let memory = memory();
    for at in [0x8_0000, 0x8_1000, 0x8_2000] {
        memory.write_obj((BASE + at + 0x1000) | X86, GuestAddress(BASE + at)).unwrap();
    }
    let caps = vtd::Caps::from_registers(vtd::CapRegisters::SOFTWARE);
    let mut host = SoftHost::new(GuestTables::new(&memory));
    let tables = Some(TableCaps::Vtd(caps));
    host.add_endpoint(ENDPOINT, EndpointCaps { tables, page_requests: true, ..EndpointCaps::default() })
        .unwrap();
    let iommu = VirtioIommu::new(Device::new(DeviceConfig::default(), host).unwrap(), 16).unwrap();
    let shared = SharedIommu::new(iommu);
    let notes = Arc::new(Notes::default());
    let (mut requests, mut events) = (Driver::new(&memory, 16), Driver::second(&memory, 16));
    let attach = TableDescriptor::VtdPageTable(VtdPageTable {
        pgd: Gpa(DATA),
        flags: 0,
        addr_width: 48,
        pasid: Pasid::new(5).unwrap(),
    });
    {
        let mut iommu = shared.lock();
        let offered = iommu.offered_features();
        iommu.accept_features(offered).unwrap();
        requests.enable(iommu.queue_mut(REQUEST_QUEUE).unwrap(), true);
        events.enable(iommu.queue_mut(EVENT_QUEUE).unwrap(), true);
    }
    let mut send = |request: Request| {
        let bytes = request.encode().to_vec();
        requests.write(BUFFERS, &bytes);
        requests.chain(0, &[(BUFFERS, bytes.len() as u32, 0), (BUFFERS + 0x80, 4, WRITE)]);
        requests.offer(0);
        let _ = shared.lock().kick_requests(&memory).unwrap();
        requests.used();
    };
    let (domain, endpoint) = (DomainId(1), ENDPOINT);
    send(Request::AttachTable(AttachTable { domain, endpoint, table: attach }));
    shared.lock().set_recorder(Some(notes.clone()));

    let stream = Stream { endpoint: ENDPOINT, pasid: Pasid::new(5) };
    let paged = |patience| shared.stream(stream).paged(patience).recorded(Some(notes.clone()));
    let dma = paged(Duration::ZERO);
    let Err(DmaError::Waits(ticket)) = dma.try_write(&memory, GuestAddress(0x1010), &[1; 8]) else {
        panic!("there is no page")
    };
    assert_eq!(dma.answer(ticket), None);
    events.chain(0, &[(BUFFERS + 0x1000, 48, WRITE)]);
    events.offer(0);
    let _ = shared.lock().kick_events(&memory).unwrap();
    memory.write_obj((BASE + 0x9_0000) | X86, GuestAddress(BASE + 0x8_3008)).unwrap();
    let response = |code| PageResponse { endpoint, pasid: stream.pasid, group_id: 0, code };
    send(Request::PageResponse(response(PageResponseCode::Success)));
    dma.retry_write(ticket, &memory, GuestAddress(0x1010), &[1; 8]).unwrap();
    let told = notes.take();
    assert!(told[3].starts_with("kick 1 "), "{told:?}");
    let expected = [
        "access 8 5 0x1010 8 2 Waits { group: 0 }",
        "asked 8 0x1010 2 group 0 true",
        "PAGE_RESP OK",
        "waited group 0 Retry",
        "access 8 5 0x1010 8 2 Passed",
    ];
    assert_eq!([&told[..3], &told[4..]].concat(), expected);

    // Who asks and then tries again has asked twice.
    assert!(dma.answer(ticket).is_some());
    assert!(dma.retry_read(ticket, &memory, GuestAddress(0x1010), &mut [0]).is_ok());
    let expected = ["waited group 0 Retry", "waited group 0 Retry", "access 8 5 0x1010 1 1 Passed"];
    assert_eq!(notes.take(), expected);

    // One that sleeps, and loses its patience at once.
    assert!(paged(Duration::ZERO).translate(GuestAddress(0x5000), 4, Permissions::ReadWrite).is_err());
    let expected = ["access 8 5 0x5000 4 3 Waits { group: 1 }", "waited group 1 TimedOut"];
    assert_eq!(notes.take(), expected);
    // Nobody is told of the others.
    shared.lock().set_recorder(None);
    let mut silent = shared.stream(stream).paged(Duration::ZERO).recorded(None);
    assert!(silent.try_write(&memory, GuestAddress(0x6000), &[1]).is_err());
    assert_eq!((notes.take(), format!("{silent:?}").contains("Recording(false)")), (vec![], true));
    // Until somebody asks.
    silent.set_recorder(Some(notes.clone()));
    assert!(silent.try_write(&memory, GuestAddress(0x6000), &[1]).is_err());
    assert_eq!(notes.take(), ["access 8 5 0x6000 1 2 Waits { group: 2 }"]);
}

#[test]
fn a_long_request_is_recorded_as_far_as_any_is_understood() {
    let tape = Tape::new(Vec::new());
    tape.record(Event::Request { readable: &[9; 4096], status: None });
    tape.finish().unwrap();
    let bytes = tape.into_sink();
    let mut reader = TraceReader::new(&bytes[..]).unwrap();
    let Ok(Some((_, Event::Request { readable, .. }))) = reader.next_event() else { panic!("a request") };
    assert_eq!((readable, MAX_REQUEST), (&[9; 124][..], 124));
}

#[test]
fn a_clock_that_runs_backwards_stands_still() {
    let times = AtomicU64::new(0);
    let clock = move || [5, 7, 3, 9][times.fetch_add(1, Ordering::Relaxed) as usize % 4];
    let tape = Tape::new(Vec::new()).clock(clock);
    (0..4).for_each(|_| tape.record(Event::Reset));
    tape.finish().unwrap();
    let bytes = tape.into_sink();
    assert_eq!(TraceReader::new(&bytes[..]).unwrap().clock(), Clock::Nanoseconds);
    assert_eq!(read(&bytes).0.iter().map(|(time, _)| *time).collect::<Vec<_>>(), [5, 7, 7, 9]);
}

#[test]
fn a_trace_has_a_limit_and_says_what_is_missing() {
    let tape = Tape::new(Vec::new()).limit(1000);
    (0..1000).for_each(|iova| tape.record(access(iova)));
    let written = tape.finish().unwrap();
    assert_eq!(written.events + written.lost, 1000);
    assert!(written.events > 20 && written.bytes <= 1000 + 2 * 20, "{written:?}");
    let (events, end) = read(&tape.into_sink());
    assert_eq!((events.len() as u64, end.unwrap()), (written.events, written.lost));
}

#[test]
fn a_sink_that_fails_ends_the_trace_and_is_told() {
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let tape = Tape::new(Full);
    (0..100_000).for_each(|iova| tape.record(access(iova)));
    assert_eq!(tape.finish().unwrap_err().kind(), io::ErrorKind::StorageFull);
    assert_eq!(tape.finish().unwrap_err().kind(), io::ErrorKind::StorageFull, "still");
}

#[test]
fn a_trace_that_was_cut_says_where() {
    let whole = trace();
    for end in 0..whole.len() {
        match read(&whole[..end]) {
            (events, Err(TraceError::NoTrace)) => assert!(end < 16 && events.is_empty()),
            (events, Err(TraceError::Cut { offset, records })) => {
                assert_eq!((offset, records), (end as u64, events.len() as u64));
            }
            other => panic!("{end}: {other:?}"),
        }
    }
    let mut more = whole.clone();
    more.push(0);
    assert!(matches!(read(&more).1, Err(TraceError::Behind { offset }) if offset == whole.len() as u64));
}

#[test]
fn nonsense_is_refused() {
    assert!(matches!(read(b"#!/bin/sh\nexit 0\n# something").1, Err(TraceError::NoTrace)));
    let mut later = trace();
    later[8] = 3;
    assert!(matches!(read(&later).1, Err(TraceError::Version { version: 3 })));
    // Bytes that a record must not have: kind, length, result, flags, time, a PASID of 21 bits, length 0.
    let third = 16 + 15 + 12;
    for (at, value) in
        [(0, 9), (1, 19), (2, 7), (3, 0x10), (4, 0), (12 + 6, 0x1f), (12 + 19, 0), (12 + 19, 0x80)]
    {
        let mut bytes = trace();
        bytes[third + at] = value;
        match read(&bytes).1 {
            Err(TraceError::Record { offset, records }) => {
                assert_eq!((offset, records), (third as u64, 2), "byte {at}");
            }
            // A shorter record lets the next one start too early.
            other => assert!(at == 1 && other.is_err(), "byte {at}: {other:?}"),
        }
    }
    // Whatever else is changed: no panic, and no event but those that a recorder may write.
    let whole = trace();
    for at in 0..whole.len() {
        for bit in 0..8 {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << bit;
            let (events, _) = read(&bytes);
            assert!(events.len() <= 9);
        }
    }
}
