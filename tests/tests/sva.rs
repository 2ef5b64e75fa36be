//! The kill test: processes that share their memory with a device die at a random point of its DMA and faults.
//!
//! Guest, device and the emulated endpoint take turns on one thread, in an order that a seed decides, so a failure repeats
//! itself. For both architectures and both ways to hand tables over, 1,000 processes die each, two at a time beside one
//! that lives on:
//! - nothing hangs: whoever waited has an answer when unbind returns, and survivors get everything they ask for;
//! - nothing leaks: tables, frames, PASIDs, tickets and groups are back, each time;
//! - no access gets through after unbind returned, or after the process's exit did.

#![allow(clippy::expect_used, clippy::panic, clippy::cast_possible_truncation)]

use pgtable_formats::format::Attrs;
use viommu_device::host::{EndpointCaps, Stream, TableCaps};
use viommu_device::soft::{Answer, Ticket};
use viommu_guest::Endpoint;
use viommu_guest::sva::{Area, DemandPaged, Handle, ProcessId, Processes, Sva, SvaOptions};
use viommu_guest::tables::{AddressSpace, SpaceOptions, Style, TableOptions};
use viommu_queue::{DmaError, PagedIommu};
use viommu_tests::rig::{Guest, Iommu, Setup, smmuv3, vtd};
use viommu_wire::{AccessFlags, Iova, IovaRange};
use vm_memory::{GuestAddress, Permissions};

const HEAP: u64 = 0x7f00_0000_0000;
/// Pages of the heap; the last four may only be read.
const PAGES: u64 = 20;
const READ_ONLY: u64 = 4;
/// Fewer than the heap has: some accesses are refused.
const MAX_RESIDENT: usize = 14;
const ROUNDS: u64 = 500;

#[test]
fn processes_die_behind_an_smmuv3_with_a_table_of_their_own_making() {
    kill(8, smmuv3(), Style::Table);
}

#[test]
fn processes_die_behind_an_smmuv3_page_table_by_page_table() {
    kill(8, smmuv3(), Style::Single);
}

#[test]
fn processes_die_behind_vtd_with_a_table_of_their_own_making() {
    kill(16, vtd(), Style::Table);
}

#[test]
fn processes_die_behind_vtd_page_table_by_page_table() {
    kill(16, vtd(), Style::Single);
}

fn kill(endpoint: u32, tables: TableCaps, style: Style) {
    let caps = EndpointCaps { tables: Some(tables), page_requests: true, ..EndpointCaps::default() };
    let mut guest = Guest::new(Setup { endpoints: vec![(endpoint, caps)], ..Setup::default() });
    let probed = guest.probe(endpoint);
    let before = guest.driver.platform().alloc.live();

    let options =
        SvaOptions { table: TableOptions { style, ..TableOptions::default() }, ..SvaOptions::default() };
    let sva = Sva::new(&mut guest.driver, &probed, options).expect("an endpoint with PASIDs");
    assert!(sva.has_page_requests());
    let mut world = World { guest, probed, sva, processes: Processes::new(), random: Random(1) };
    let survivor = world.start();
    for page in 0..4 {
        world.populate(survivor.id, page);
    }
    let resident = world.guest.driver.platform().alloc.live();
    let (mut waiting, mut done) = (0, 0);
    for round in 0..ROUNDS {
        world.random = Random(round);
        let (deaths, moved) = world.round(&survivor);
        waiting += deaths;
        done += moved;
        world.is_clean(resident, 1);
    }
    // Else nothing was tested.
    assert!(
        waiting > ROUNDS && done > 4 * ROUNDS,
        "{waiting} accesses waited when their process died, {done} done"
    );

    world.finish(survivor);
    world.release(before);
}

struct World {
    guest: Guest,
    probed: Endpoint,
    sva: Sva,
    processes: Processes<DemandPaged>,
    random: Random,
}

/// A process, and the device's work for it.
struct Job {
    id: ProcessId,
    handle: Handle,
    dma: PagedIommu<Iommu>,
    in_flight: Vec<Access>,
    done: u64,
}

#[derive(Clone, Copy)]
struct Access {
    iova: u64,
    length: usize,
    kind: Permissions,
    /// `None`: not tried yet.
    ticket: Option<Ticket>,
}

impl World {
    /// A new process, bound.
    fn start(&mut self) -> Job {
        let Self { guest, probed, sva, processes, .. } = self;
        let driver = &mut guest.driver;
        let space = AddressSpace::new(driver, probed, SpaceOptions::default()).expect("memory");
        let mut memory = DemandPaged::new(&space, MAX_RESIDENT);
        let area = |first: u64, pages: u64, attrs| Area { range: pages_at(first, pages), attrs };
        memory.add_area(area(0, PAGES - READ_ONLY, Attrs::READ_WRITE)).expect("no overlap");
        memory.add_area(area(PAGES - READ_ONLY, READ_ONLY, Attrs::READ)).expect("no overlap");
        let id = processes.add(space, memory);
        let handle = sva.bind(driver, processes, id).expect("a PASID");
        let stream = Stream { endpoint: probed.id(), pasid: Some(handle.pasid()) };
        let dma = guest.machine.paged(stream, std::time::Duration::ZERO);
        Job { id, handle, dma, in_flight: Vec::new(), done: 0 }
    }

    /// Two processes live and die. How many accesses waited when their process died, and how many had succeeded.
    fn round(&mut self, survivor: &Job) -> (u64, u64) {
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
                    waited += job.in_flight.iter().filter(|access| access.ticket.is_some()).count() as u64;
                    done += job.done;
                    self.die(job);
                }
            }
        }
        self.lives(survivor);
        (waited, done)
    }

    /// The device starts an access: within a page, or across several.
    fn begin(&mut self, job: &mut Job) {
        let page = self.random.below(PAGES - 2);
        let (offset, length) = match self.random.below(3) {
            0 => (0xffc, 8),
            1 => (0x800, 0x1800),
            _ => (0x10, 8),
        };
        let kinds = [Permissions::Read, Permissions::Write, Permissions::ReadWrite];
        let kind = kinds[self.random.below(3) as usize];
        job.in_flight.push(Access { iova: HEAP + (page << 12) + offset, length, kind, ticket: None });
    }

    /// The device looks after its accesses, each once.
    fn go_on(&mut self, job: &mut Job) {
        for mut access in std::mem::take(&mut job.in_flight) {
            match access.ticket.map(|ticket| job.dma.answer(ticket)) {
                Some(None) => {
                    job.in_flight.push(access);
                    continue;
                }
                Some(Some(Answer::Failed)) => continue,
                None | Some(Some(Answer::Retry)) => {}
            }
            match attempt(&job.dma, &access) {
                Ok(pieces) => {
                    self.leads_to_the_process(job, &access, &pieces);
                    job.done += 1;
                }
                Err(DmaError::Waits(ticket)) => {
                    access.ticket = Some(ticket);
                    job.in_flight.push(access);
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// That the device sees each byte where the processor does.
    fn leads_to_the_process(&mut self, job: &Job, access: &Access, pieces: &[(u64, usize)]) {
        let (space, _) = self.processes.get_mut(job.id).expect("alive").parts();
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
        let sva = &mut self.sva;
        self.guest.machine.deliver_events();
        self.guest.driver.handle_events(|event| _ = sva.receive(&event)).expect("an honest device");
    }

    fn serve(&mut self) {
        self.sva.serve(&mut self.guest.driver, &mut self.processes).expect("answers that the device takes");
    }

    /// The process changes its memory under the device.
    fn discard(&mut self, id: ProcessId) {
        let range = pages_at(self.random.below(PAGES - 2), 1 + self.random.below(2));
        let (space, memory) = self.processes.get_mut(id).expect("alive").parts();
        memory.discard(&mut self.guest.driver, space, range).expect("an invalidation");
    }

    fn populate(&mut self, id: ProcessId, page: u64) {
        let (space, memory) = self.processes.get_mut(id).expect("alive").parts();
        let at = Iova(HEAP + (page << 12));
        memory.populate(&mut self.guest.driver, space, at, AccessFlags::WRITE).expect("memory");
    }

    /// All that the device has begun comes to its end.
    fn complete(&mut self, job: &mut Job) {
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
    fn lives(&mut self, survivor: &Job) {
        for page in 0..4 {
            let iova = HEAP + (page << 12) + 8;
            let access = Access { iova, length: 8, kind: Permissions::ReadWrite, ticket: None };
            let pieces = attempt(&survivor.dma, &access).expect("a page that is there");
            self.leads_to_the_process(survivor, &access, &pieces);
        }
    }

    fn die(&mut self, job: Job) {
        let Job { id, handle, dma, in_flight, .. } = job;
        let first = self.random.below(3);
        if first > 0 {
            // The process is gone before the device's driver hears of it; the device goes on.
            self.processes.exit(&mut self.guest.driver, id).expect("an invalidation");
            for access in &in_flight {
                assert!(attempt(&dma, access).is_err(), "memory of a process that has ended");
            }
        }
        if first > 1 {
            self.take_events();
            self.serve();
        }
        let driver = &mut self.guest.driver;
        let unbound = self.sva.unbind(driver, &mut self.processes, handle);
        unbound.map_err(|(_, error)| error).expect("an unbind");
        for access in &in_flight {
            assert!(access.ticket.is_none_or(|ticket| dma.answer(ticket).is_some()), "it waits for nobody");
            match attempt(&dma, access) {
                Err(DmaError::Fault(_)) => {}
                other => panic!("after unbind: {other:x?}"),
            }
        }
        let memory = self.processes.remove(driver, id).expect("bound to nobody");
        memory.release(driver);
    }

    /// What is left is what `processes` processes need.
    fn is_clean(&mut self, blocks: usize, processes: usize) {
        assert_eq!(self.guest.driver.platform().alloc.live(), blocks, "blocks of memory");
        assert_eq!((self.sva.bound(), self.processes.ids().count()), (processes, processes));
        self.take_events();
        self.serve();
        assert_eq!((self.sva.open_groups(), self.sva.has_work()), (0, false));
        let counters = self.sva.serve_counters();
        assert_eq!(counters.failed, 0, "{counters:?}");
        let mut iommu = self.guest.machine.lock();
        let counts = iommu.device().page_request_counts();
        assert_eq!((counts.requests, counts.groups), (0, 0));
        assert!(!iommu.device().needs_reset());
        assert_eq!(iommu.device_mut().host_mut().waiting(self.probed.id()), 0);
    }

    fn finish(&mut self, survivor: Job) {
        assert!(survivor.in_flight.is_empty());
        let driver = &mut self.guest.driver;
        let unbound = self.sva.unbind(driver, &mut self.processes, survivor.handle);
        unbound.map_err(|(_, error)| error).expect("an unbind");
        self.processes.remove(driver, survivor.id).expect("bound to nobody").release(driver);
    }

    fn release(self, before: usize) {
        let Self { mut guest, sva, .. } = self;
        sva.release(&mut guest.driver).map_err(|(_, error)| error).expect("nobody is bound");
        assert_eq!(guest.driver.platform().alloc.live(), before);
        assert_eq!(guest.machine.lock().device().domain_count(), 0);
    }
}

/// Where the bytes of an access lie.
fn attempt(dma: &PagedIommu<Iommu>, access: &Access) -> Result<Vec<(u64, usize)>, DmaError> {
    let pieces = dma.try_translate(GuestAddress(access.iova), access.length, access.kind)?;
    Ok(pieces.map(|piece| (piece.base.0, piece.length)).collect())
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
