//! Accesses that wait for pages, on real threads and in real time.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use pgtable_formats::context::{Canonical, vtd};
use pgtable_formats::{Gpa, Pasid};
use viommu_device::EndpointId;
use viommu_device::host::{
    EndpointCaps, FaultCause, GroupResponse, Host, PageRequestReport, SpaceSpec, Stream, TableCaps,
};
use viommu_device::soft::{AccessError, Answer, SoftHost, Space, Ticket};
use viommu_device::wire::{AccessFlags, PageResponseCode};
use viommu_queue::{Attempt, DmaError, GuestTables, MAX_ACCESS, Observe, SharedIommu};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, IommuMemory, Permissions};

use PageResponseCode::{Invalid, Success};

const BASE: u64 = 0x4000_0000;
/// Where pages go: the page of address 0 to the first one.
const FRAMES: u64 = BASE + 0x8000;
/// Present, writable, for users, accessed, dirty.
const ENTRY: u64 = 0x67;
/// One that may wait, and one that may not.
const ENDPOINTS: [EndpointId; 2] = [EndpointId(16), EndpointId(17)];
/// Longer than any of these tests takes.
const LONG: Duration = Duration::from_secs(60);

struct World {
    memory: GuestMemoryMmap,
    iommu: SharedIommu<SoftHost<GuestTables>>,
    /// Somebody waits, or has faulted.
    bell: mpsc::Receiver<()>,
    spaces: Vec<Space>,
}

const fn stream(endpoint: EndpointId) -> Stream {
    Stream { endpoint, pasid: Pasid::new(5) }
}

impl World {
    /// Both endpoints bound to an empty table by PASID 5.
    fn new() -> Self {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(BASE), 0x1_0000)]).unwrap();
        for at in [BASE, BASE + 0x1000, BASE + 0x2000] {
            memory.write_obj((at + 0x1000) | ENTRY, GuestAddress(at)).unwrap();
        }
        let caps = vtd::Caps::from_registers(vtd::CapRegisters::SOFTWARE);
        let flags = vtd::FirstStageFlags::empty();
        let table = &Canonical::VtdFirstStage(vtd::FirstStage::new(Gpa(BASE), flags, 48, &caps).unwrap());
        let mut host = SoftHost::new(GuestTables::new(&memory));
        let mut spaces = Vec::new();
        for (endpoint, page_requests) in ENDPOINTS.into_iter().zip([true, false]) {
            let tables = Some(TableCaps::Vtd(caps));
            host.add_endpoint(endpoint, EndpointCaps { tables, page_requests, ..EndpointCaps::default() })
                .unwrap();
            let mut space = host.create(SpaceSpec::GuestTable { endpoint, table }).unwrap();
            host.bind(stream(endpoint), Some(&mut space)).unwrap();
            spaces.push(space);
        }
        let (rope, bell) = mpsc::channel();
        let iommu = SharedIommu::with_fault_notice(host, move || _ = rope.send(()));
        Self { memory, iommu, bell, spaces }
    }

    fn map(&self, page: u64) {
        self.memory
            .write_obj((FRAMES + page * 0x1000) | ENTRY, GuestAddress(BASE + 0x3000 + page * 8))
            .unwrap();
    }

    fn asked(&self) -> Option<PageRequestReport> {
        self.iommu.lock().next_page_request()
    }

    fn answer(&self, asked: &PageRequestReport, code: PageResponseCode) {
        let response = GroupResponse { stream: asked.stream, group: asked.group, code };
        self.iommu.lock().respond(&response).unwrap();
    }
}

#[test]
fn the_polling_form_moves_all_or_nothing() {
    let world = World::new();
    let dma = world.iommu.stream(stream(ENDPOINTS[0])).paged(Duration::ZERO);
    let bytes: Vec<u8> = (1..=32).collect();
    let at = GuestAddress(0xff0);
    world.map(0);
    let Err(DmaError::Waits(ticket)) = dma.try_write(&world.memory, at, &bytes) else { panic!() };
    assert_eq!(world.memory.read_obj::<u64>(GuestAddress(FRAMES + 0xff0)).unwrap(), 0, "nothing yet");
    assert_eq!(world.bell.try_recv(), Ok(()));
    assert_eq!(dma.answer(ticket), None);
    assert_eq!(dma.retry_write(ticket, &world.memory, at, &bytes), Err(DmaError::Waits(ticket)));
    let asked = world.asked().unwrap();
    assert_eq!((asked.address.0, asked.access), (0x1000, AccessFlags::WRITE));
    world.map(1);
    world.answer(&asked, Success);
    assert_eq!(dma.answer(ticket), Some(Answer::Retry));
    assert_eq!(dma.retry_write(ticket, &world.memory, at, &bytes), Ok(()));
    let mut seen = [0; 32];
    assert_eq!(dma.try_read(&world.memory, at, &mut seen), Ok(()));
    assert_eq!(seen[..], bytes);
    world.memory.read_slice(&mut seen, GuestAddress(FRAMES + 0xff0)).unwrap();
    assert_eq!(seen[..], bytes);
}

/// Found by review: such an access was translated in the address space that had replaced its own.
#[test]
fn an_access_that_was_told_to_try_again_fails_where_its_table_is_gone() {
    for is_rebound in [true, false] {
        let mut world = World::new();
        let dma = world.iommu.stream(stream(ENDPOINTS[0])).paged(Duration::ZERO);
        let at = GuestAddress(0x1000);
        let Err(DmaError::Waits(ticket)) = dma.try_write(&world.memory, at, &[1; 8]) else { panic!() };
        let asked = world.asked().unwrap();
        world.map(1);
        world.answer(&asked, Success);
        assert_eq!(dma.answer(ticket), Some(Answer::Retry));
        {
            let mut host = world.iommu.lock();
            host.bind(stream(ENDPOINTS[0]), None).unwrap();
            if is_rebound {
                host.bind(stream(ENDPOINTS[0]), Some(&mut world.spaces[0])).unwrap();
            }
        }
        assert_eq!(world.bell.try_iter().count(), 1);
        assert_eq!(dma.retry_write(ticket, &world.memory, at, &[1; 8]), Err(DmaError::Refused));
        assert_eq!(dma.retry_read(ticket, &world.memory, at, &mut [0; 8]), Err(DmaError::Refused));
        let translated = dma.retry_translate(ticket, at, 8, Permissions::ReadWrite).map(drop);
        assert_eq!(translated, Err(DmaError::Refused));
        assert_eq!(world.memory.read_obj::<u64>(GuestAddress(FRAMES + 0x1000)).unwrap(), 0);
        // It was no fault, and there is nothing to tell the guest.
        assert_eq!((world.bell.try_iter().count(), world.iommu.lock().next_fault()), (0, None));
        assert_eq!(dma.try_write(&world.memory, at, &[1; 8]).is_ok(), is_rebound);
    }
}

#[test]
fn what_cannot_be_is_an_error_at_once() {
    let world = World::new();
    let dma = world.iommu.stream(stream(ENDPOINTS[0])).paged(LONG);
    let length = |at, length| dma.translate_waiting(GuestAddress(at), length, Permissions::Read).map(drop);
    assert_eq!(length(u64::MAX, 2), Err(DmaError::Range));
    assert_eq!(length(0, MAX_ACCESS + 1), Err(DmaError::Range));
    assert_eq!(length(0, 0), Ok(()));
    // An endpoint that cannot wait.
    let other = world.iommu.stream(stream(ENDPOINTS[1])).paged(LONG);
    let fault = other.translate_waiting(GuestAddress(0), 1, Permissions::Read).map(drop);
    assert!(matches!(fault, Err(DmaError::Fault(FaultCause::Table(_)))), "{fault:?}");
    // A page in the guest's table that is no memory.
    world.memory.write_obj((BASE + 0x10_0000) | ENTRY, GuestAddress(BASE + 0x3000)).unwrap();
    assert_eq!(dma.try_write(&world.memory, GuestAddress(0), &[1]), Err(DmaError::NoMemory));
    assert_eq!(world.iommu.lock().waiting(ENDPOINTS[0]), 0);
}

#[test]
fn a_thread_sleeps_until_the_guest_has_answered() {
    let world = World::new();
    let dma = world.iommu.stream(stream(ENDPOINTS[0])).paged(LONG);
    let memory = IommuMemory::new(world.memory.clone(), dma, true, ());
    std::thread::scope(|scope| {
        let device = scope.spawn(move || memory.write_slice(&[7; 0x2000], GuestAddress(0x800)));
        for page in 0..3 {
            world.bell.recv_timeout(LONG).unwrap();
            let asked = world.asked().unwrap();
            assert_eq!(asked.address.0 >> 12, page);
            world.map(page);
            world.answer(&asked, Success);
        }
        device.join().unwrap().unwrap();
    });
    assert_eq!(world.memory.read_obj::<u8>(GuestAddress(FRAMES + 0x27ff)).unwrap(), 7);
    assert_eq!(world.memory.read_obj::<u8>(GuestAddress(FRAMES + 0x2800)).unwrap(), 0);
}

#[test]
fn refusals_and_unbinds_wake_who_waits() {
    let world = World::new();
    let dma = world.iommu.stream(stream(ENDPOINTS[0])).paged(LONG);
    let wait = || dma.translate_waiting(GuestAddress(0x1000), 8, Permissions::ReadWrite).map(drop);
    std::thread::scope(|scope| {
        let device = scope.spawn(wait);
        world.bell.recv_timeout(LONG).unwrap();
        world.answer(&world.asked().unwrap(), Invalid);
        assert_eq!(device.join().unwrap(), Err(DmaError::Refused));

        let device = scope.spawn(wait);
        world.bell.recv_timeout(LONG).unwrap();
        world.iommu.lock().bind(stream(ENDPOINTS[0]), None).unwrap();
        assert_eq!(device.join().unwrap(), Err(DmaError::Refused));
    });
    assert_eq!(world.asked(), None);
    assert_eq!(wait(), Err(DmaError::Fault(FaultCause::Unattached)));
}

#[test]
fn patience_ends_and_the_request_stays() {
    let world = World::new();
    let patience = Duration::from_millis(30);
    let dma = world.iommu.stream(stream(ENDPOINTS[0])).paged(patience);
    let start = Instant::now();
    let wait = || dma.translate_waiting(GuestAddress(0), 8, Permissions::Write).map(drop);
    assert_eq!(wait(), Err(DmaError::TimedOut));
    assert!(start.elapsed() >= patience);
    assert_eq!(world.iommu.lock().waiting(ENDPOINTS[0]), 1);
    // The next one joins, and the answer to the first serves it.
    let asked = world.asked().unwrap();
    assert_eq!(wait(), Err(DmaError::TimedOut));
    assert_eq!(world.asked(), None);
    world.map(0);
    world.answer(&asked, Success);
    assert_eq!(wait(), Ok(()));
}

/// Found by shuttle: an answer that is always there already let an access try for ever.
#[test]
fn patience_ends_although_the_guest_always_says_success() {
    let world = World::new();
    let dma = world.iommu.stream(stream(ENDPOINTS[0])).paged(Duration::from_millis(50));
    let is_over = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        let iommu = &world.iommu;
        scope.spawn(|| {
            while !is_over.load(SeqCst) {
                let mut host = iommu.lock();
                if let Some(PageRequestReport { stream, group, .. }) = host.next_page_request() {
                    host.respond(&GroupResponse { stream, group, code: Success }).unwrap();
                }
            }
        });
        let waited = dma.translate_waiting(GuestAddress(0), 8, Permissions::Write).map(drop);
        is_over.store(true, SeqCst);
        assert_eq!(waited, Err(DmaError::TimedOut));
    });
}

/// Whether an access waits, as an observer has it; the guest answers, and patience ends before the next try.
#[derive(Debug, Default)]
struct Slow {
    waits: Mutex<Option<Ticket>>,
}

impl Observe for Slow {
    fn tried(&self, _: &Attempt, outcome: Result<(), AccessError>) {
        let Err(AccessError::Waits(ticket)) = outcome else { return };
        assert_eq!(self.waits.lock().unwrap().replace(ticket), None);
    }

    fn waited(&self, _: Stream, ticket: Ticket, answer: Option<Answer>) {
        assert_eq!(self.waits.lock().unwrap().take(), Some(ticket), "each wait has one end");
        if answer == Some(Answer::Retry) {
            std::thread::sleep(PATIENCE);
        }
    }
}

const PATIENCE: Duration = Duration::from_millis(300);

/// Found by review: the wait for the second page had no end.
#[test]
fn an_observer_is_told_when_patience_ends_between_two_pages() {
    let world = World::new();
    let dma = world.iommu.stream(stream(ENDPOINTS[0])).paged(PATIENCE).observed(Slow::default());
    std::thread::scope(|scope| {
        let wait = || dma.translate_waiting(GuestAddress(0), 0x2000, Permissions::Write).map(drop);
        let device = scope.spawn(wait);
        world.bell.recv_timeout(LONG).unwrap();
        world.map(0);
        world.answer(&world.asked().unwrap(), Success);
        assert_eq!(device.join().unwrap(), Err(DmaError::TimedOut));
    });
    assert_eq!(world.asked().unwrap().address.0, 0x1000, "it has tried again");
    assert!(format!("{dma:?}").contains("Slow { waits: Mutex { data: None"), "{dma:?}");
}
