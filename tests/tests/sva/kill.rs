//! Processes that live and die, whatever the hardware.

use pgtable_formats::format::Attrs;
use viommu_device::host::{Host, Stream};
use viommu_guest::Endpoint;
use viommu_guest::sva::{Area, DemandPaged, Handle, ProcessId, Processes, Sva, SvaError, SvaOptions};
use viommu_guest::tables::{AddressSpace, SpaceOptions, Style, TableOptions};
use viommu_queue::loopback::Machine;
use viommu_tests::rig::Guest;
use viommu_wire::numbers::EVENT_QUEUE;
use viommu_wire::{AccessFlags, Iova, IovaRange};

const HEAP: u64 = 0x7f00_0000_0000;
/// Pages of the heap; the last four may only be read.
const PAGES: u64 = 20;
const READ_ONLY: u64 = 4;
/// Fewer than the heap has: some accesses are refused.
const MAX_RESIDENT: usize = 14;
const ROUNDS: u64 = 500;

/// What does the DMA.
pub(crate) trait Hardware {
    /// What the device stands on.
    type Host: Host;

    /// What it remembers of an access that waits.
    type Ticket: Copy;

    /// Accesses to one page wait for one answer, so one that comes later may fail with it at once.
    const SHARES_ANSWERS: bool;

    /// Starts an access, or looks after one that waits.
    fn go_on(
        &mut self,
        machine: &Machine<Self::Host>,
        stream: Stream,
        access: &mut Access<Self::Ticket>,
    ) -> Progress;

    /// How much the host holds. Looks for what must not be on the way.
    fn held(&mut self, machine: &Machine<Self::Host>) -> usize;
}

/// A piece of DMA.
#[derive(Clone, Copy)]
pub(crate) struct Access<T> {
    pub(crate) iova: u64,
    pub(crate) length: usize,
    pub(crate) reads: bool,
    pub(crate) writes: bool,
    /// Of one that waits.
    pub(crate) ticket: Option<T>,
    has_waited: bool,
}

impl<T> Access<T> {
    const fn new(iova: u64, length: usize, reads: bool, writes: bool) -> Self {
        Self { iova, length, reads, writes, ticket: None, has_waited: false }
    }
}

/// What has become of an access.
#[derive(Clone, Debug)]
pub(crate) enum Progress {
    /// Where its bytes lie, and how many of them.
    Done(Vec<(u64, usize)>),
    Waits,
    Fails,
}

/// What is killed, and how it is set up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cell {
    pub(crate) endpoint: u32,
    pub(crate) style: Style,
    /// What the guest takes then.
    pub(crate) format: u8,
    pub(crate) has_page_requests: bool,
}

pub(crate) fn kill<W: Hardware>(cell: Cell, mut guest: Guest<Machine<W::Host>>, mut hardware: W) {
    let probed = guest.probe(cell.endpoint);
    let table = TableOptions { style: cell.style, ..TableOptions::default() };
    let options = SvaOptions { table, ..SvaOptions::default() };
    // A host may keep what it made, to use it again.
    let first = Sva::new(&mut guest.driver, &probed, options).expect("an endpoint with PASIDs");
    first.release(&mut guest.driver).map_err(|(_, error)| error).expect("nobody is bound");
    let before = (guest.driver.platform().alloc.live(), hardware.held(&guest.machine));
    let sva = Sva::new(&mut guest.driver, &probed, options).expect("an endpoint with PASIDs");
    assert_eq!((sva.format(), sva.has_page_requests()), (cell.format, cell.has_page_requests));
    let mut world = World { guest, hardware, probed, sva, processes: Processes::new(), random: Random(1) };
    let survivor = world.start();
    for page in 0..4 {
        world.populate(survivor.id, page);
    }
    let resident = world.blocks();
    // The same of what two more need.
    world.round(&survivor);
    let held = world.hardware.held(&world.guest.machine);
    let (mut waiting, mut done) = (0, 0);
    for round in 0..ROUNDS {
        world.random = Random(round);
        let (deaths, moved) = world.round(&survivor);
        waiting += deaths;
        done += moved;
        world.is_clean(resident, 1);
        assert_eq!(world.hardware.held(&world.guest.machine), held, "objects of the host");
    }
    // Else nothing was tested.
    assert!(
        waiting > ROUNDS && done > 4 * ROUNDS,
        "{waiting} accesses were under way when their process died, {done} done"
    );

    world.finish(survivor);
    world.release(before);
}

struct World<W: Hardware> {
    guest: Guest<Machine<W::Host>>,
    hardware: W,
    probed: Endpoint,
    sva: Sva,
    processes: Processes<DemandPaged>,
    random: Random,
}

/// A process, and the device's work for it.
struct Job<T> {
    id: ProcessId,
    handle: Handle,
    in_flight: Vec<Access<T>>,
    done: u64,
}

impl<W: Hardware> World<W> {
    /// A new process, bound.
    fn start(&mut self) -> Job<W::Ticket> {
        let Self { guest, probed, sva, processes, .. } = self;
        let driver = &mut guest.driver;
        let space = AddressSpace::new(driver, probed, SpaceOptions::default()).expect("memory");
        let waits = sva.has_page_requests();
        let mut memory = DemandPaged::new(&space, if waits { MAX_RESIDENT } else { PAGES as usize });
        let area = |first: u64, pages: u64, attrs| Area { range: pages_at(first, pages), attrs };
        memory.add_area(area(0, PAGES - READ_ONLY, Attrs::READ_WRITE)).expect("no overlap");
        memory.add_area(area(PAGES - READ_ONLY, READ_ONLY, Attrs::READ)).expect("no overlap");
        let id = processes.add(space, memory);
        if !waits {
            assert_eq!(sva.bind(driver, processes, id), Err(SvaError::NotPinned(id)));
            let (space, memory) = processes.get_mut(id).expect("just added").parts();
            memory.pin(driver, space).expect("memory");
        }
        let handle = sva.bind(driver, processes, id).expect("a PASID");
        Job { id, handle, in_flight: Vec::new(), done: 0 }
    }

    /// Two processes live and die. How many accesses were under way when their process died, and how many had succeeded.
    fn round(&mut self, survivor: &Job<W::Ticket>) -> (u64, u64) {
        let mut jobs = vec![self.start(), self.start()];
        let (mut waited, mut done) = (0, 0);
        while !jobs.is_empty() {
            let which = self.random.below(jobs.len() as u64) as usize;
            match self.random.below(48) {
                0..=12 => self.begin(&mut jobs[which]),
                13..=24 => self.go_on(&mut jobs[which]),
                25..=32 => self.take_events(),
                33..=41 => self.serve(),
                42 | 43 => self.discard(jobs[which].id),
                44 | 45 => self.lives(survivor),
                46 => self.complete(&mut jobs[which]),
                _ => {
                    let job = jobs.swap_remove(which);
                    let waits = self.sva.has_page_requests();
                    let counts = |access: &&Access<W::Ticket>| access.ticket.is_some() || !waits;
                    waited += job.in_flight.iter().filter(counts).count() as u64;
                    done += job.done;
                    self.die(job);
                }
            }
        }
        self.lives(survivor);
        (waited, done)
    }

    /// The device starts an access: within a page, or across several.
    fn begin(&mut self, job: &mut Job<W::Ticket>) {
        let page = self.random.below(PAGES - 2);
        let (offset, length) = match self.random.below(3) {
            0 => (0xffc, 8),
            1 => (0x800, 0x1800),
            _ => (0x10, 8),
        };
        let (reads, writes) = [(true, false), (false, true), (true, true)][self.random.below(3) as usize];
        job.in_flight.push(Access::new(HEAP + (page << 12) + offset, length, reads, writes));
    }

    /// The device looks after its accesses, each once.
    fn go_on(&mut self, job: &mut Job<W::Ticket>) {
        for mut access in std::mem::take(&mut job.in_flight) {
            match self.look_after(&job.handle, &mut access) {
                Progress::Done(pieces) => {
                    self.leads_to_the_process(job.id, &access, &pieces);
                    job.done += 1;
                }
                Progress::Waits => job.in_flight.push(access),
                Progress::Fails => {
                    let may_fail = W::SHARES_ANSWERS || !self.sva.has_page_requests();
                    assert!(access.has_waited || may_fail, "nobody was asked");
                }
            }
        }
    }

    fn look_after(&mut self, handle: &Handle, access: &mut Access<W::Ticket>) -> Progress {
        let stream = Stream { endpoint: self.probed.id(), pasid: Some(handle.pasid()) };
        let progress = self.hardware.go_on(&self.guest.machine, stream, access);
        access.has_waited |= matches!(progress, Progress::Waits);
        progress
    }

    /// That the device sees each byte where the processor does.
    fn leads_to_the_process(&mut self, id: ProcessId, access: &Access<W::Ticket>, pieces: &[(u64, usize)]) {
        let space = self.processes.get(id).expect("alive").space();
        let mut iova = access.iova;
        for &(base, length) in pieces {
            for at in (0..length as u64).step_by(4) {
                let here = Iova(iova + at);
                let found = space.translate(&self.guest.driver, here, pgtable_formats::Access::READ);
                assert_eq!(found.expect("a page").apply(here).0, base + at);
            }
            iova += length as u64;
        }
        assert_eq!(iova, access.iova + access.length as u64);
    }

    fn take_events(&mut self) {
        let Self { guest, sva, .. } = self;
        let _ = guest.machine.kick(EVENT_QUEUE).expect("a usable queue");
        guest.driver.handle_events(|event| _ = sva.receive(&event)).expect("an honest device");
    }

    fn serve(&mut self) {
        self.sva.serve(&mut self.guest.driver, &mut self.processes).expect("answers that the device takes");
    }

    /// The process changes its memory under the device, if that can wait for it.
    fn discard(&mut self, id: ProcessId) {
        let range = pages_at(self.random.below(PAGES - 2), 1 + self.random.below(2));
        if !self.sva.has_page_requests() {
            return;
        }
        let (space, memory) = self.processes.get_mut(id).expect("alive").parts();
        memory.discard(&mut self.guest.driver, space, range).expect("an invalidation");
    }

    fn populate(&mut self, id: ProcessId, page: u64) {
        let (space, memory) = self.processes.get_mut(id).expect("alive").parts();
        let at = Iova(HEAP + (page << 12));
        memory.populate(&mut self.guest.driver, space, at, AccessFlags::WRITE).expect("memory");
    }

    /// All that the device has begun comes to its end.
    fn complete(&mut self, job: &mut Job<W::Ticket>) {
        // An access asks for at most 3 pages, each of them to be read and to be written.
        for _ in 0..8 {
            self.go_on(job);
            self.take_events();
            self.serve();
        }
        self.go_on(job);
        assert!(job.in_flight.is_empty(), "{} accesses hang", job.in_flight.len());
    }

    /// Somebody else notices nothing.
    fn lives(&mut self, survivor: &Job<W::Ticket>) {
        for page in 0..4 {
            let mut access = Access::new(HEAP + (page << 12) + 8, 8, true, true);
            match self.look_after(&survivor.handle, &mut access) {
                Progress::Done(pieces) => self.leads_to_the_process(survivor.id, &access, &pieces),
                other => panic!("page {page}: {other:?}"),
            }
        }
    }

    fn die(&mut self, job: Job<W::Ticket>) {
        let Job { id, handle, mut in_flight, .. } = job;
        let first = self.random.below(3);
        if first > 0 {
            // The process is gone before the device's driver hears of it; the device goes on.
            self.processes.exit(&mut self.guest.driver, id).expect("an invalidation");
            for access in &mut in_flight {
                let progress = self.look_after(&handle, access);
                assert!(!matches!(progress, Progress::Done(_)), "memory of a process that has ended");
            }
        }
        if first > 1 {
            self.take_events();
            self.serve();
        }
        let pasid = handle.pasid();
        let driver = &mut self.guest.driver;
        let unbound = self.sva.unbind(driver, &mut self.processes, handle);
        unbound.map_err(|(_, error)| error).expect("an unbind");
        let stream = Stream { endpoint: self.probed.id(), pasid: Some(pasid) };
        for mut access in in_flight {
            // One that waited has its answer, and another attempt does not wait.
            for _ in 0..2 {
                match self.hardware.go_on(&self.guest.machine, stream, &mut access) {
                    Progress::Fails => {}
                    other => panic!("after unbind: {other:x?}"),
                }
            }
        }
        let driver = &mut self.guest.driver;
        let memory = self.processes.remove(driver, id).expect("bound to nobody");
        memory.release(driver);
    }

    fn blocks(&self) -> usize {
        self.guest.driver.platform().alloc.live()
    }

    /// What is left is what `processes` processes need.
    fn is_clean(&mut self, blocks: usize, processes: usize) {
        assert_eq!(self.blocks(), blocks, "blocks of memory");
        assert_eq!((self.sva.bound(), self.processes.ids().count()), (processes, processes));
        self.take_events();
        self.serve();
        assert_eq!((self.sva.open_groups(), self.sva.has_work()), (0, false));
        let counters = self.sva.serve_counters();
        assert_eq!(counters.failed, 0, "{counters:?}");
        let iommu = self.guest.machine.lock();
        let counts = iommu.device().page_request_counts();
        assert_eq!((counts.requests, counts.groups), (0, 0));
        assert!(!iommu.device().needs_reset());
    }

    fn finish(&mut self, survivor: Job<W::Ticket>) {
        assert!(survivor.in_flight.is_empty());
        let driver = &mut self.guest.driver;
        let unbound = self.sva.unbind(driver, &mut self.processes, survivor.handle);
        unbound.map_err(|(_, error)| error).expect("an unbind");
        self.processes.remove(driver, survivor.id).expect("bound to nobody").release(driver);
    }

    fn release(self, before: (usize, usize)) {
        let Self { mut guest, mut hardware, sva, .. } = self;
        sva.release(&mut guest.driver).map_err(|(_, error)| error).expect("nobody is bound");
        assert_eq!((guest.driver.platform().alloc.live(), hardware.held(&guest.machine)), before);
        assert_eq!(guest.machine.lock().device().domain_count(), 0);
    }
}

fn pages_at(first: u64, pages: u64) -> IovaRange {
    IovaRange::from_length(Iova(HEAP + (first << 12)), pages << 12).expect("pages")
}

/// Numbers that look random and are the same in each run (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % bound
    }
}
