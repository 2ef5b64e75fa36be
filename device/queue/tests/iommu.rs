//! The device behind its queues, and emulated devices behind the device.

#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, unreachable_pub)]

mod driver;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use driver::{BASE, BUFFERS, BYTES, Driver, END, WRITE, memory};
use pgtable_formats::{AccessKind, Gpa, IovaRange, NotMemory, Pasid, TableMem};
use viommu_device::host::{
    EndpointCaps, FaultCause, FaultReport, Host, HostError, Invalidation, MapError, SpaceSpec, Stopped,
    Stream, TableKinds, UnmapError,
};
use viommu_device::mapping::Mapping;
use viommu_device::soft::{SoftHost, Stage2};
use viommu_device::wire::{Attach, AttachFlags, DomainId, Map, MapFlags, Request, Unmap};
use viommu_device::{Device, DeviceConfig, EndpointId, Features, Iova};
use viommu_queue::{
    EVENT_QUEUE, GuestTables, MAX_ACCESS, Notify, REQUEST_QUEUE, SharedIommu, StreamIommu, VirtioIommu,
};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Iommu, IommuMemory, Permissions};

const SIZE: u16 = 16;
const ENDPOINT: EndpointId = EndpointId(8);
const R: u64 = BUFFERS;
const W: u64 = BUFFERS + 0x8000;
const E: u64 = BUFFERS + 0x9000;
/// Where DMA goes.
const DATA: u64 = BASE + 0x8_0000;

type Soft = SoftHost<GuestTables>;

fn device(memory: &GuestMemoryMmap) -> VirtioIommu<Soft> {
    let mut host = SoftHost::new(GuestTables::new(memory));
    host.add_endpoint(ENDPOINT, EndpointCaps::default()).unwrap();
    VirtioIommu::new(Device::new(DeviceConfig::default(), host).unwrap(), SIZE).unwrap()
}

/// A device whose driver has set up both queues.
fn running(memory: &GuestMemoryMmap) -> (VirtioIommu<Soft>, Driver<'_>, Driver<'_>) {
    let mut iommu = device(memory);
    iommu.accept_features(iommu.offered_features()).unwrap();
    let (requests, events) = (Driver::new(memory, SIZE), Driver::second(memory, SIZE));
    requests.enable(iommu.queue_mut(REQUEST_QUEUE).unwrap(), true);
    events.enable(iommu.queue_mut(EVENT_QUEUE).unwrap(), true);
    (iommu, requests, events)
}

/// Sends one request and returns its status; `None` where it came back unwritten.
fn send(iommu: &mut VirtioIommu<Soft>, driver: &mut Driver<'_>, request: Request) -> Option<u8> {
    let bytes = request.encode();
    driver.used();
    driver.write(R, &bytes);
    driver.write(W, &[0xff; 4]);
    driver.chain(0, &[(R, bytes.len() as u32, 0), (W, 4, WRITE)]);
    driver.set_used_event(driver.used_index());
    driver.offer(0);
    let notify = iommu.kick_requests(driver.memory).unwrap();
    assert!(notify.requests);
    match driver.used()[..] {
        [(0, 4)] => Some(driver.read(W, 1)[0]),
        [(0, 0)] => None,
        ref other => panic!("{other:?}"),
    }
}

fn attach() -> Request {
    Request::Attach(Attach { domain: DomainId(1), endpoint: ENDPOINT, flags: AttachFlags::empty() })
}

fn map(start: u64, length: u64, to: u64, flags: MapFlags) -> Request {
    let (virt_start, virt_end) = (Iova(start), Iova(start + length - 1));
    Request::Map(Map { domain: DomainId(1), virt_start, virt_end, phys_start: Gpa(to), flags })
}

fn unmap(start: u64, length: u64) -> Request {
    Request::Unmap(Unmap { domain: DomainId(1), virt_start: Iova(start), virt_end: Iova(start + length - 1) })
}

#[test]
fn requests_and_faults_pass_through_the_queues() {
    let memory = memory();
    let (mut iommu, mut requests, mut events) = running(&memory);
    assert_eq!(send(&mut iommu, &mut requests, attach()), Some(0));
    assert_eq!(send(&mut iommu, &mut requests, map(0x1000, 0x1000, DATA, MapFlags::READ)), Some(0));
    assert_eq!(send(&mut iommu, &mut requests, map(0x1000, 0x1000, DATA, MapFlags::READ)), Some(4), "INVAL");
    assert_eq!(send(&mut iommu, &mut requests, unmap(0x1000, 0x800)), Some(5), "RANGE: a part of a mapping");

    let stream = Stream::untagged(ENDPOINT);
    let access = pgtable_formats::Access::WRITE;
    assert!(iommu.device_mut().host_mut().translate(stream, Iova(0x1008), access, |_| ()).is_err());
    // No buffer yet: the event waits.
    assert_eq!(iommu.kick_events(&memory), Ok(Notify::default()));
    events.chain(0, &[(E, 24, WRITE)]);
    events.offer(0);
    let notify = iommu.kick_events(&memory).unwrap();
    assert_eq!(notify, Notify { events: true, served: 1, ..Notify::default() });
    assert_eq!(events.used(), [(0, 24)]);
    let record = events.read(E, 24);
    assert_eq!((record[0], record[4], record[8]), (2, 2, 8), "MAPPING, WRITE, endpoint 8");
    assert_eq!(record[16..], 0x1008_u64.to_le_bytes());
}

#[test]
fn an_event_that_waits_is_delivered_after_requests() {
    let memory = memory();
    let (mut iommu, mut requests, mut events) = running(&memory);
    let stream = Stream::untagged(ENDPOINT);
    events.chain(0, &[(E, 24, WRITE)]);
    events.offer(0);
    let access = pgtable_formats::Access::READ;
    assert!(iommu.device_mut().host_mut().translate(stream, Iova(0), access, |_| ()).is_err());
    assert_eq!(send(&mut iommu, &mut requests, attach()), Some(0));
    assert_eq!(events.used(), [(0, 24)]);
    assert_eq!(events.read(E, 1), [1], "DOMAIN");
}

/// A driver that keeps adding buffers may not kick for the last of them: what waits then is not to be forgotten.
#[test]
fn events_that_are_left_over_ask_for_another_kick() {
    let memory = memory();
    let host = EagerDriver { memory: memory.clone(), added: 1, faults: 20 };
    let mut iommu = VirtioIommu::new(Device::new(DeviceConfig::default(), host).unwrap(), SIZE).unwrap();
    let (requests, mut events) = (Driver::new(&memory, SIZE), Driver::second(&memory, SIZE));
    requests.enable(iommu.queue_mut(REQUEST_QUEUE).unwrap(), false);
    events.enable(iommu.queue_mut(EVENT_QUEUE).unwrap(), false);
    events.chain(0, &[(E, 24, WRITE)]);
    events.offer(0);
    let notify = iommu.kick_requests(&memory).unwrap();
    assert_eq!(notify, Notify { events: true, again: true, ..Notify::default() });
    let mut delivered = events.used().len();
    while iommu.kick_requests(&memory).unwrap().again {
        delivered += events.used().len();
    }
    assert_eq!(delivered + events.used().len(), 20);
}

/// No machine, but a driver that adds an event buffer whenever it gets one back, and does not kick.
struct EagerDriver {
    memory: GuestMemoryMmap,
    added: u16,
    faults: usize,
}

impl Host for EagerDriver {
    type Space = ();

    fn endpoints(&self) -> Vec<EndpointId> {
        vec![ENDPOINT]
    }

    fn caps(&self, _: EndpointId) -> Option<&EndpointCaps> {
        static CAPS: EndpointCaps = EndpointCaps {
            tables: None,
            kinds: TableKinds::all(),
            native: TableKinds::all(),
            reserved: Vec::new(),
            page_requests: false,
        };
        Some(&CAPS)
    }

    fn create(&mut self, _: SpaceSpec<'_>) -> Result<(), HostError> {
        Ok(())
    }

    fn destroy(&mut self, (): ()) {}

    fn map(&mut self, (): &mut (), _: Mapping) -> Result<(), MapError> {
        Ok(())
    }

    fn unmap(&mut self, (): &mut (), _: IovaRange) -> Result<usize, UnmapError> {
        Ok(0)
    }

    fn bind(&mut self, _: Stream, _: Option<&mut ()>) -> Result<(), HostError> {
        Ok(())
    }

    fn invalidate(&mut self, _: &[Invalidation]) -> Result<(), Stopped> {
        Ok(())
    }

    /// Asked for before each event.
    fn next_fault(&mut self) -> Option<FaultReport> {
        if let Some(left) = self.faults.checked_sub(1) {
            self.faults = left;
            return Some(FaultReport {
                stream: Stream::untagged(ENDPOINT),
                address: None,
                kind: AccessKind::Read,
                privileged: false,
                cause: FaultCause::Unattached,
            });
        }
        self.added += 1;
        Driver::second(&self.memory, SIZE).set_available_index(self.added);
        None
    }
}

#[test]
fn an_unknown_request_comes_back_unwritten() {
    let memory = memory();
    let (mut iommu, mut requests, _) = running(&memory);
    requests.write(R, &[0x77; 64]);
    requests.write(W, &[0xff; 4]);
    requests.chain(0, &[(R, 64, 0), (W, 4, WRITE)]);
    requests.offer(0);
    assert!(iommu.kick_requests(&memory).is_ok());
    assert_eq!(requests.used(), [(0, 0)]);
    assert_eq!(requests.read(W, 4), [0xff; 4]);
}

#[test]
fn the_whole_answer_of_probe_fits() {
    let memory = memory();
    let (mut iommu, mut requests, _) = running(&memory);
    let bytes = Request::Probe(viommu_device::wire::Probe { endpoint: ENDPOINT }).encode();
    let size = iommu.device().config().probe_size;
    requests.write(R, &bytes);
    requests.write(W, &[0xff; 1024]);
    requests.chain(0, &[(R, bytes.len() as u32, 0), (W, size, WRITE), (W + u64::from(size), 100, WRITE)]);
    requests.offer(0);
    assert!(iommu.kick_requests(&memory).is_ok());
    assert_eq!(requests.used(), [(0, size + 4)]);
    let answer = requests.read(W, size as usize + 5);
    assert_eq!(answer[size as usize..], [0, 0, 0, 0, 0xff]);
}

#[test]
fn reset_disables_the_queues_and_forgets_the_driver() {
    let memory = memory();
    let (mut iommu, mut requests, _) = running(&memory);
    assert_eq!(send(&mut iommu, &mut requests, attach()), Some(0));
    iommu.reset();
    assert!(iommu.kick_requests(&memory).is_err() && iommu.kick_events(&memory).is_err());
    assert_eq!(iommu.device().features(), Features::empty());
    assert_eq!(iommu.device().domain_count(), 0);
    assert!(!iommu.queue(REQUEST_QUEUE).unwrap().event_idx_enabled());

    memory.write_slice(&[0; 0x3_0000], GuestAddress(BASE)).unwrap();
    iommu.accept_features(iommu.offered_features()).unwrap();
    let mut requests = Driver::new(&memory, SIZE);
    requests.enable(iommu.queue_mut(REQUEST_QUEUE).unwrap(), true);
    assert_eq!(send(&mut iommu, &mut requests, attach()), Some(0));
}

#[test]
fn features_of_the_rings_are_offered_and_not_given_to_the_device() {
    let memory = memory();
    let mut iommu = device(&memory);
    let ring = VirtioIommu::<Soft>::RING_FEATURES;
    assert!(iommu.offered_features().contains(ring));
    assert!(iommu.accept_features(Features::PAGE_REQUEST | Features::RING_EVENT_IDX).is_err());
    assert!(!iommu.queue(EVENT_QUEUE).unwrap().event_idx_enabled());
    iommu.accept_features(ring | Features::MAP_UNMAP).unwrap();
    assert_eq!(iommu.device().features(), Features::MAP_UNMAP);
    assert!(iommu.queue(EVENT_QUEUE).unwrap().event_idx_enabled());
    assert!(iommu.queue_mut(2).is_none());
}

#[test]
fn guest_tables_are_words_of_guest_memory() {
    let half = BYTES / 2;
    let (low, high) = (BASE, BASE + BYTES as u64);
    let ranges = [
        (GuestAddress(low), half),
        (GuestAddress(low + half as u64), half),
        (GuestAddress(high + 0x1000), half),
    ];
    let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
    let tables = GuestTables::new(&memory);
    let words = [low, low + half as u64 - 8, low + half as u64, high - 8, high + 0x1000];
    for (i, at) in words.into_iter().enumerate() {
        memory.write_obj((i as u64).to_le(), GuestAddress(at)).unwrap();
    }
    for (i, at) in words.into_iter().enumerate().chain(words.into_iter().enumerate().rev()) {
        assert_eq!(tables.load(Gpa(at)), Ok(i as u64));
        assert_eq!(tables.clone().load(Gpa(at)), Ok(i as u64));
    }
    for at in [0, low - 8, high, high + 0xff8, high + 0x1000 + half as u64, !7, low + 4, high - 4, u64::MAX] {
        assert_eq!(tables.load(Gpa(at)), Err(NotMemory), "{at:#x}");
        assert_eq!(tables.compare_exchange(Gpa(at), 0, 1), Err(NotMemory));
    }
    assert_eq!(tables.compare_exchange(Gpa(words[1]), 5, 6), Ok(Err(1)));
    assert_eq!(tables.compare_exchange(Gpa(words[1]), 1, 6), Ok(Ok(1)));
    assert_eq!(memory.read_obj::<u64>(GuestAddress(words[1])).unwrap().to_le(), 6);

    for (first, last, inside) in [
        (low, low, true),
        (low, high - 1, true),
        (low, high, false),
        (low - 1, low, false),
        (high - 1, high + 0x1000, false),
        (high + 0x1000, high + 0x1000 + half as u64 - 1, true),
        (high + 0x1000, u64::MAX, false),
        (low + 1, low, false),
        (0, u64::MAX, false),
    ] {
        assert_eq!(tables.contains(Gpa(first), Gpa(last)), inside, "{first:#x}-{last:#x}");
    }
    assert_eq!(GuestTables::new(&GuestMemoryMmap::<()>::new()).load(Gpa(0)), Err(NotMemory));
}

/// Devices on vm-memory, in front of a host with mappings 0x1000 -> DATA (read only) and 0x2000 -> DATA + 0x5000.
fn behind(memory: &GuestMemoryMmap) -> SharedIommu<VirtioIommu<Soft>> {
    let (mut iommu, mut requests, _) = running(memory);
    assert_eq!(send(&mut iommu, &mut requests, attach()), Some(0));
    assert_eq!(send(&mut iommu, &mut requests, map(0x1000, 0x1000, DATA, MapFlags::READ)), Some(0));
    let both = MapFlags::READ | MapFlags::WRITE;
    assert_eq!(send(&mut iommu, &mut requests, map(0x2000, 0x1000, DATA + 0x5000, both)), Some(0));
    SharedIommu::new(iommu)
}

fn untagged(
    iommu: &SharedIommu<VirtioIommu<Soft>>,
    memory: &GuestMemoryMmap,
) -> IommuMemory<GuestMemoryMmap, StreamIommu<VirtioIommu<Soft>>> {
    IommuMemory::new(memory.clone(), iommu.stream(Stream::untagged(ENDPOINT)), true, ())
}

#[test]
fn dma_is_translated_and_checked() {
    let memory = memory();
    let iommu = behind(&memory);
    let dma = untagged(&iommu, &memory);
    // Across both mappings, which lead to different places.
    memory.write_slice(&[1, 2], GuestAddress(DATA + 0xffe)).unwrap();
    memory.write_slice(&[3, 4], GuestAddress(DATA + 0x5000)).unwrap();
    let mut bytes = [0; 4];
    dma.read_slice(&mut bytes, GuestAddress(0x1ffe)).unwrap();
    assert_eq!(bytes, [1, 2, 3, 4]);

    dma.write_slice(&[9], GuestAddress(0x2fff)).unwrap();
    assert_eq!(memory.read_obj::<u8>(GuestAddress(DATA + 0x5fff)).unwrap(), 9);
    assert!(dma.write_slice(&[9], GuestAddress(0x1000)).is_err(), "read only");
    assert!(dma.write_slice(&[9; 2], GuestAddress(0x2fff)).is_err(), "ends behind the mapping");
    assert!(dma.read_slice(&mut bytes, GuestAddress(0xffe)).is_err(), "starts before the mapping");
    assert!(!dma.check_range(GuestAddress(0x1000), 0x2000, Permissions::ReadWrite));
    assert!(dma.check_range(GuestAddress(0x1000), 0x2000, Permissions::Read));
    assert!(dma.check_range(GuestAddress(0x2000), 0x1000, Permissions::ReadWrite));

    let faults: Vec<_> = std::iter::from_fn(|| iommu.lock().device_mut().next_event()).collect();
    assert_eq!(faults.len(), 4, "{faults:?}");
}

#[test]
fn odd_ranges_are_refused_without_a_panic() {
    let memory = memory();
    let iommu = behind(&memory);
    let stream = iommu.stream(Stream::untagged(ENDPOINT));
    let len = |at, length| {
        let pieces = stream.translate(GuestAddress(at), length, Permissions::Read);
        pieces.map(|pieces| pieces.map(|piece| piece.length).sum::<usize>()).ok()
    };
    assert_eq!(len(0x1000, 0), Some(0));
    assert_eq!(len(0x9000, 0), Some(0));
    assert_eq!(len(u64::MAX, 0), Some(0));
    assert_eq!(len(u64::MAX, 1), None);
    assert_eq!(len(0x1000, usize::MAX), None);
    assert_eq!(len(0x1000, MAX_ACCESS + 1), None);
    assert_eq!(len(0x1000, 0x2000), Some(0x2000));
    drop(iommu.lock());
}

#[test]
fn streams_translate_by_their_own_space() {
    let memory = memory();
    let mut host = SoftHost::new(GuestTables::new(&memory));
    host.add_endpoint(ENDPOINT, EndpointCaps::default()).unwrap();
    let tagged = Stream { endpoint: ENDPOINT, pasid: Pasid::new(5) };
    let mut space = host.create(SpaceSpec::Identity).unwrap();
    host.bind(tagged, Some(&mut space)).unwrap();
    let told = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&told);
    let iommu = SharedIommu::with_fault_notice(host, move || {
        count.fetch_add(1, Ordering::Relaxed);
    });

    let with_pasid = IommuMemory::new(memory.clone(), iommu.stream(tagged).privileged(), true, ());
    let without = IommuMemory::new(memory.clone(), iommu.stream(Stream::untagged(ENDPOINT)), true, ());
    with_pasid.write_obj(7_u32, GuestAddress(DATA)).unwrap();
    assert_eq!(memory.read_obj::<u32>(GuestAddress(DATA)).unwrap(), 7);
    assert_eq!(told.load(Ordering::Relaxed), 0);
    assert!(without.read_obj::<u32>(GuestAddress(DATA)).is_err());
    assert_eq!(told.load(Ordering::Relaxed), 1);
    let fault = iommu.lock().next_fault().unwrap();
    assert_eq!((fault.stream, fault.privileged), (Stream::untagged(ENDPOINT), false));
    // A translation may lead where there is no memory; the access fails then, and it is no fault of the IOMMU's.
    assert!(with_pasid.read_obj::<u32>(GuestAddress(END)).is_err());
    assert_eq!(iommu.lock().next_fault(), None);
}

/// An UNMAP is not answered while an access through the mapping is under way.
#[test]
fn lock_waits_for_translations_in_use() {
    let memory = memory();
    let iommu = behind(&memory);
    let stream = iommu.stream(Stream::untagged(ENDPOINT));
    let first = stream.translate(GuestAddress(0x1000), 8, Permissions::Read).unwrap();
    let second = stream.translate(GuestAddress(0x2000), 8, Permissions::Read).unwrap();
    let (done, unmapped) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut iommu = iommu.lock();
            let request = unmap(0x1000, 0x2000).encode();
            let mut tail = [0xff; 4];
            iommu.device_mut().handle(&request, &mut tail);
            done.send(tail[0]).unwrap();
        });
        let wait = Duration::from_millis(50);
        assert!(unmapped.recv_timeout(wait).is_err(), "both are in use");
        drop(first);
        assert!(unmapped.recv_timeout(wait).is_err(), "one is in use");
        // Others, and the same thread, still translate.
        drop(stream.translate(GuestAddress(0x1000), 8, Permissions::Read).unwrap());
        assert!(unmapped.recv_timeout(wait).is_err());
        drop(second);
        assert_eq!(unmapped.recv_timeout(Duration::from_secs(10)), Ok(0));
    });
    assert!(stream.translate(GuestAddress(0x1000), 8, Permissions::Read).is_err());
}

/// Devices that are never all idle at once must not keep the driver's requests waiting.
#[test]
fn lock_is_not_starved_by_busy_devices() {
    let memory = memory();
    let iommu = behind(&memory);
    let finished = AtomicBool::new(false);
    let (done, locked) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let stream = iommu.stream(Stream::untagged(ENDPOINT));
                while !finished.load(Ordering::SeqCst) {
                    let access = stream.translate(GuestAddress(0x1000), 8, Permissions::Read);
                    std::thread::sleep(Duration::from_millis(3));
                    drop(access);
                }
            });
        }
        std::thread::sleep(Duration::from_millis(20));
        scope.spawn(|| {
            for _ in 0..10 {
                drop(iommu.lock());
            }
            done.send(()).unwrap();
        });
        let result = locked.recv_timeout(Duration::from_secs(5));
        finished.store(true, Ordering::SeqCst);
        assert_eq!(result, Ok(()));
    });
}

/// Once an UNMAP is answered the page is somebody else's: no access through the old mapping may see what he writes.
#[test]
fn dma_never_sees_a_page_after_its_unmap() {
    let memory = memory();
    let iommu = behind(&memory);
    let dma = untagged(&iommu, &memory);
    let page = GuestAddress(DATA + 0x5000);
    let both = MapFlags::READ | MapFlags::WRITE;
    let handle = |request: Request| {
        let mut tail = [0xff; 4];
        iommu.lock().device_mut().handle(&request.encode(), &mut tail);
        assert_eq!(tail[0], 0);
    };
    memory.store(1_u64, page, Ordering::SeqCst).unwrap();
    let (finished, reads) = (AtomicBool::new(false), AtomicUsize::new(0));
    let deadline = Instant::now() + Duration::from_secs(30);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..2000 {
                handle(unmap(0x2000, 0x1000));
                memory.store(2_u64, page, Ordering::SeqCst).unwrap();
                std::thread::yield_now();
                memory.store(1_u64, page, Ordering::SeqCst).unwrap();
                handle(map(0x2000, 0x1000, page.0, both));
                // Now and then the reader is to come through before the next round.
                let seen = reads.load(Ordering::SeqCst);
                while round % 8 == 0 && reads.load(Ordering::SeqCst) == seen && Instant::now() < deadline {
                    std::thread::yield_now();
                }
            }
            finished.store(true, Ordering::SeqCst);
        });
        while !finished.load(Ordering::SeqCst) {
            // Between the slices and the access, so that the other thread gets its chance.
            let Ok(slices) = dma.get_slices(GuestAddress(0x2000), 8, Permissions::Read) else { continue };
            for slice in slices {
                std::thread::yield_now();
                assert_eq!(slice.unwrap().load::<u64>(0, Ordering::SeqCst).unwrap(), 1);
                reads.fetch_add(1, Ordering::SeqCst);
            }
        }
    });
    assert_eq!(dma.load::<u64>(GuestAddress(0x2000), Ordering::SeqCst).unwrap(), 1);
    assert!(reads.into_inner() >= 250);
}
