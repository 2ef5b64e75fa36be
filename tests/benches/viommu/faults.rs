//! Accesses that wait for a page, from the access that misses to the same one getting through: the request becomes an event
//! in the ring, the guest takes it, maps the page, answers by PAGE_RESP through the other ring, and the access is tried
//! again. Guest and device take turns on one thread; both are in the time.

use std::hint::black_box;
use std::time::Duration;

use pgtable_formats::format::Attrs;
use viommu_device::host::{EndpointCaps, Stream};
use viommu_guest::hal::{Parts, Platform};
use viommu_guest::sva::{
    Answer as Served, Area, DemandPaged, FaultHandler, PageGroup, ProcessId, Processes, Sva, SvaOptions,
};
use viommu_guest::tables::{AddressSpace, SpaceOptions};
use viommu_guest::{Driver, hal};
use viommu_queue::{DmaError, PagedIommu};
use viommu_tests::rig::{Alloc, Guest, Iommu, Machine, Memory, Setup, Transport};
use viommu_wire::numbers::EVENT_QUEUE;
use viommu_wire::{Gpa, Iova, IovaRange};
use vm_memory::GuestAddress;

use crate::measure::{Stopwatch, Suite};
use crate::walks;

const ENDPOINT: u32 = 8;
/// Pages of a batch: they share tables, which the first one's fault makes.
const PAGES: u64 = 256;
const FIRST: u64 = 0x7f00_0000_0000;

pub(crate) fn run(suite: &mut Suite) {
    for (name, caps) in walks::architectures() {
        let caps = EndpointCaps { tables: Some(caps), page_requests: true, ..EndpointCaps::default() };
        let setup = Setup { endpoints: vec![(ENDPOINT, caps)], ..Setup::default() };
        let keys = |pages| [("format", name), ("pages", pages)];

        let frame = Memory::page(3);
        let mut world = World::new(setup.clone(), |_| OneFrame { frame });
        suite.run("page-fault", &keys("one-frame"), PAGES, || {
            world.batch(|driver, space, _| space.unmap(driver, pages(0, PAGES)).expect("an invalidation"))
        });
        let mut world = World::new(setup, |space| {
            let mut memory = DemandPaged::new(space, 1 << 10);
            memory.add_area(Area { range: pages(0, PAGES), attrs: Attrs::READ_WRITE }).expect("no overlap");
            memory
        });
        suite.run("page-fault", &keys("zeroed-frames"), PAGES, || {
            world.batch(|driver, space, memory| {
                memory.discard(driver, space, pages(0, PAGES)).expect("an invalidation");
            })
        });
    }
}

type GuestDriver = Driver<Parts<Memory, Alloc>, Transport<Machine>>;

struct World<H> {
    guest: Guest,
    sva: Sva,
    processes: Processes<H>,
    process: ProcessId,
    dma: PagedIommu<Iommu>,
    stopwatch: Stopwatch,
}

impl<H: FaultHandler<Parts<Memory, Alloc>, Transport<Machine>>> World<H> {
    fn new(setup: Setup, handler: impl FnOnce(&AddressSpace) -> H) -> Self {
        let mut guest = Guest::new(setup);
        let endpoint = guest.probe(ENDPOINT);
        let driver = &mut guest.driver;
        let mut processes = Processes::new();
        let mut sva = Sva::new(driver, &endpoint, SvaOptions::default()).expect("PASIDs");
        let space = AddressSpace::new(driver, &endpoint, SpaceOptions::default()).expect("memory");
        let handler = handler(&space);
        let process = processes.add(space, handler);
        let handle = sva.bind(driver, &mut processes, process).expect("a PASID");
        let stream = Stream { endpoint: endpoint.id(), pasid: Some(handle.pasid()) };
        let dma = guest.machine.paged(stream, Duration::ZERO);
        Self { guest, sva, processes, process, dma, stopwatch: Stopwatch::new() }
    }

    /// One fault after the other; then `reset` takes the pages away.
    fn batch(&mut self, reset: impl FnOnce(&mut GuestDriver, &mut AddressSpace, &mut H)) -> Duration {
        let stopwatch = self.stopwatch;
        let (time, ()) = stopwatch.time(|| (0..PAGES).for_each(|page| self.fault(black_box(page))));
        let (space, handler) = self.processes.get_mut(self.process).expect("alive").parts();
        reset(&mut self.guest.driver, space, handler);
        time
    }

    #[inline]
    fn fault(&mut self, page: u64) {
        let Self { guest, sva, processes, dma, .. } = self;
        let Guest { driver, machine } = guest;
        let at = GuestAddress(FIRST + (page << 12) + 8);
        let Err(DmaError::Waits(ticket)) = dma.try_write(machine.memory().map(), at, &[1; 8]) else {
            panic!("the page is there");
        };
        machine.notify(EVENT_QUEUE);
        driver.handle_events(|event| assert!(sva.receive(&event), "{event:?}")).expect("an honest device");
        assert_eq!(sva.serve(driver, processes), Ok(1));
        assert_eq!(dma.retry_write(ticket, machine.memory().map(), at, &[1; 8]), Ok(()));
    }
}

/// Maps the same frame wherever one is missing: what a page fault costs without a memory management.
struct OneFrame {
    frame: Gpa,
}

impl<P: Platform, T: hal::Transport> FaultHandler<P, T> for OneFrame {
    fn handle(
        &mut self,
        driver: &mut Driver<P, T>,
        space: &mut AddressSpace,
        group: &PageGroup<'_>,
    ) -> Served {
        for request in group.requests {
            let range = IovaRange::from_length(Iova(request.address.0 & !0xfff), 0x1000).expect("a page");
            space.map(driver, range, self.frame, Attrs::READ_WRITE).expect("a free page");
        }
        Served::Success
    }
}

fn pages(first: u64, count: u64) -> IovaRange {
    IovaRange::from_length(Iova(FIRST + (first << 12)), count << 12).expect("pages")
}
