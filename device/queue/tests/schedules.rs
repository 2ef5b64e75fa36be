//! Pins and waiting under schedules that shuttle makes: `translated.rs` and `paged.rs`, compiled over its primitives, around
//! a real `SoftHost` with its caches and its tickets.
//!
//! What holds in each schedule:
//! - (a) Once an unbind, or an invalidation, has returned, no access uses the old translation.
//! - (b) No access that has waited goes through another table, or another entry of the PASID table, than the one that it
//!   waited for: it is refused.
//! - (c) No wake-up is lost: a thread that sleeps for ever is a deadlock, which shuttle finds. Its clock stands still, so no
//!   time-out hides one.
//! - (d) Requests and accesses come to an end: a schedule with more than a million steps fails.
//!
//! Bounds, for each of the scenarios below: 2 to 5 threads besides the first, 1 to 3 accesses each, to up to 3 pages; 3,000
//! random schedules, and 3,000 of PCT with up to 3 changes of priority. `VIOMMU_SCHEDULES` sets another number.
//!
//! Not explored: time-outs but that of a patience of 0; `GIVE_WAY`, which never ends here; memory order, for shuttle's is
//! sequential (the code has no atomics of its own).
#![allow(clippy::unwrap_used, clippy::panic)]

#[allow(dead_code, unreachable_pub)]
#[path = "../src/paged.rs"]
mod paged;
#[allow(dead_code, unreachable_pub)]
#[path = "../src/translated.rs"]
mod translated;

mod sync {
    pub(crate) use shuttle::sync::{Condvar, Mutex, MutexGuard};
}

mod virtio_iommu {
    pub(crate) use viommu_queue::VirtioIommu;
}

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use pgtable_formats::context::{Canonical, vtd};
use pgtable_formats::{Gpa, Iova, IovaRange, Pasid};
use shuttle::thread;
use viommu_device::EndpointId;
use viommu_device::host::{
    EndpointCaps, GroupResponse, Host, Invalidation, Scope, SpaceSpec, Stream, TableCaps,
};
use viommu_device::soft::{AccessError, Answer, SoftHost, Space, Ticket};
use viommu_device::wire::{Caches, PageResponseCode};
use viommu_queue::GuestTables;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};

use paged::{Attempt, DmaError, Observe, PagedIommu};
use sync::{Condvar, Mutex};
use translated::SharedIommu;

const BASE: u64 = 0x4000_0000;
/// Present, writable, for users, accessed, dirty.
const ENTRY: u64 = 0x67;
const ENDPOINT: EndpointId = EndpointId(16);
const FOR_EVER: Duration = Duration::from_secs(1 << 30);
/// Where DMA of the first process goes, by page; that of the second one goes one page of memory further up.
const FRAMES: u64 = BASE + 0x8000;

/// A guest with the page tables of two processes, of which the first is bound by PASID 5.
struct World {
    memory: GuestMemoryMmap,
    iommu: SharedIommu<SoftHost<GuestTables>>,
    spaces: [Mutex<Option<Space>>; 2],
    /// Somebody waits for a page: what an event's interrupt is to a guest.
    bell: Arc<(Mutex<Bell>, Condvar)>,
    /// Whose memory may be used: no access with the PASID may reach the other one's.
    is_over: [AtomicBool; 2],
    /// How often what the PASID leads to was replaced; changes while the IOMMU is locked.
    replacements: AtomicUsize,
    succeeded: AtomicUsize,
}

#[derive(Default)]
struct Bell {
    rings: bool,
    is_shut: bool,
}

fn stream() -> Stream {
    Stream { endpoint: ENDPOINT, pasid: Pasid::new(5) }
}

impl World {
    fn new() -> Arc<Self> {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(BASE), 0x2_0000)]).unwrap();
        let caps = vtd::Caps::from_registers(vtd::CapRegisters::SOFTWARE);
        let mut host = SoftHost::new(GuestTables::new(&memory));
        let tables = Some(TableCaps::Vtd(caps));
        let endpoint = EndpointCaps { tables, page_requests: true, ..EndpointCaps::default() };
        host.add_endpoint(ENDPOINT, endpoint).unwrap();
        let mut space = |process: u64| {
            // Four levels in four pages.
            let root = BASE + process * 0x4000;
            for level in 0..3 {
                let at = root + level * 0x1000;
                memory.write_obj((at + 0x1000) | ENTRY, GuestAddress(at)).unwrap();
            }
            let flags = vtd::FirstStageFlags::empty();
            let table = Canonical::VtdFirstStage(vtd::FirstStage::new(Gpa(root), flags, 48, &caps).unwrap());
            host.create(SpaceSpec::GuestTable { endpoint: ENDPOINT, table: &table }).unwrap()
        };
        let mut spaces = [space(0), space(1)];
        host.bind(stream(), Some(&mut spaces[0])).unwrap();
        let bell = Arc::new((Mutex::new(Bell::default()), Condvar::new()));
        let rope = Arc::clone(&bell);
        let iommu = SharedIommu::with_fault_notice(host, move || {
            rope.0.lock().unwrap().rings = true;
            rope.1.notify_one();
        });
        Arc::new(Self {
            memory,
            iommu,
            spaces: spaces.map(|space| Mutex::new(Some(space))),
            bell,
            is_over: [AtomicBool::new(false), AtomicBool::new(true)],
            replacements: AtomicUsize::new(0),
            succeeded: AtomicUsize::new(0),
        })
    }

    /// Maps page `page` of a process to its frame, or clears its entry.
    fn set(&self, process: u64, page: u64, mapped: bool) {
        let entry = (FRAMES + page * 0x2000 + process * 0x1000) | ENTRY;
        let at = BASE + process * 0x4000 + 0x3000 + page * 8;
        self.memory.write_obj(if mapped { entry } else { 0 }, GuestAddress(at)).unwrap();
    }

    /// The DMA of one access.
    fn dma(&self, patience: Duration) -> PagedIommu<SoftHost<GuestTables>, Loyal<'_>> {
        let observer = Loyal { replacements: &self.replacements, waited: AtomicUsize::new(usize::MAX) };
        self.iommu.stream(stream()).paged(patience).observed(observer)
    }

    /// One access to `pages` pages, in the middle of which others run.
    fn access(&self, first: u64, pages: u64, patience: Duration) -> Result<(), DmaError> {
        let length = usize::try_from(pages * 0x1000).unwrap();
        let dma = self.dma(patience);
        let pieces = dma.translate_waiting(GuestAddress(first << 12), length, Permissions::Write)?;
        self.uses(pieces.map(|piece| (piece.base.0, piece.length as u64)));
        Ok(())
    }

    /// One access of a device that looks for answers itself.
    fn poll(&self, first: u64, access: Permissions) -> Result<(), DmaError> {
        let (at, dma) = (GuestAddress(first << 12), self.dma(FOR_EVER));
        let mut tried = dma.try_translate(at, 0x1000, access);
        while let Err(DmaError::Waits(ticket)) = tried {
            thread::yield_now();
            tried = dma.retry_translate(ticket, at, 0x1000, access);
        }
        self.uses(tried?.map(|piece| (piece.base.0, piece.length as u64)));
        Ok(())
    }

    /// What a translation leads to is used while it is pinned.
    fn uses(&self, pieces: impl Iterator<Item = (u64, u64)>) {
        for (base, length) in pieces {
            for frame in (base..base + length).step_by(0x1000) {
                thread::yield_now();
                let process = (frame - FRAMES) / 0x1000 % 2;
                assert!(!self.is_over[process as usize].load(SeqCst), "memory of process {process} is used");
            }
        }
        self.succeeded.fetch_add(1, SeqCst);
    }

    /// The guest: maps what is asked for in the table of `process`, and answers, until the bell is shut.
    fn serve(&self, process: u64, code: PageResponseCode) {
        loop {
            {
                let bell = self.bell.0.lock().unwrap();
                let mut bell = self.bell.1.wait_while(bell, |bell| !bell.rings && !bell.is_shut).unwrap();
                if !std::mem::take(&mut bell.rings) {
                    return;
                }
            }
            // One `lock` for the event, another one for the response, as the two queues have it.
            loop {
                let Some(request) = self.iommu.lock().next_page_request() else { break };
                self.set(process, request.address.0 >> 12, true);
                let response = GroupResponse { stream: request.stream, group: request.group, code };
                self.iommu.lock().respond(&response).unwrap();
            }
        }
    }

    fn shut(&self) {
        self.bell.0.lock().unwrap().is_shut = true;
        self.bell.1.notify_all();
    }

    /// An UNBIND request, or a table's replacement by that of the other process.
    fn bind(&self, process: Option<usize>) {
        let mut host = self.iommu.lock();
        match process {
            Some(process) => {
                let mut space = self.spaces[process].lock().unwrap();
                host.bind(stream(), space.as_mut()).unwrap();
                self.is_over[process].store(false, SeqCst);
            }
            None => host.bind(stream(), None).unwrap(),
        }
        self.is_over[0].store(true, SeqCst);
        self.replacements.fetch_add(1, SeqCst);
    }

    /// After everything: nothing waits, nothing is pinned.
    fn is_quiet(&self) {
        assert_eq!(self.iommu.lock().waiting(ENDPOINT), 0);
        assert!(self.iommu.lock().next_page_request().is_none());
    }
}

/// Sees to it that an access which has waited goes through what it waited for.
#[derive(Debug)]
struct Loyal<'a> {
    replacements: &'a AtomicUsize,
    /// How many of those there were when it had to wait.
    waited: AtomicUsize,
}

impl Observe for Loyal<'_> {
    fn tried(&self, _: &Attempt, outcome: Result<(), AccessError>) {
        let (now, waited) = (self.replacements.load(SeqCst), self.waited.load(SeqCst));
        assert!(waited == usize::MAX || waited == now, "it waited for something else");
        if let Err(AccessError::Waits(_)) = outcome {
            self.waited.store(now, SeqCst);
        }
    }

    fn waited(&self, _: Stream, _: Ticket, _: Option<Answer>) {}
}

fn spawn(world: &Arc<World>, work: impl FnOnce(&World) + Send + 'static) -> thread::JoinHandle<()> {
    let world = Arc::clone(world);
    thread::spawn(move || work(&world))
}

fn join(threads: impl IntoIterator<Item = thread::JoinHandle<()>>) {
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

/// An INVALIDATE of everything that `caches` hold for the process's PASID.
fn all(caches: Caches) -> Invalidation {
    let scope = Scope::Pasid(stream().pasid);
    Invalidation { endpoint: ENDPOINT, caches, scope, leaf: false, tag: None, global: false }
}

fn explore(scenario: fn()) {
    let schedules = std::env::var("VIOMMU_SCHEDULES").map_or(3_000, |number| number.parse().unwrap());
    shuttle::check_random(scenario, schedules);
    shuttle::check_pct(scenario, schedules, 3);
}

/// Faults are served while others access, invalidate and wait for the same pages: every access gets through.
#[test]
fn accesses_that_wait_make_progress() {
    explore(|| {
        let world = World::new();
        world.set(0, 0, true);
        let guest = spawn(&world, |world| world.serve(0, PageResponseCode::Success));
        let devices = [
            spawn(&world, |world| {
                assert_eq!(world.access(1, 1, FOR_EVER), Ok(()));
                assert_eq!(world.access(0, 1, FOR_EVER), Ok(()));
            }),
            // Over a page that is there, one that both ask for, and one of its own.
            spawn(&world, |world| assert_eq!(world.access(0, 3, FOR_EVER), Ok(()))),
        ];
        let invalidates = spawn(&world, |world| {
            assert_eq!(world.iommu.lock().invalidate(&[all(Caches::TLB)]), Ok(()));
        });
        join(devices.into_iter().chain([invalidates]));
        world.shut();
        guest.join().unwrap();
        assert_eq!(world.succeeded.load(SeqCst), 3);
        world.is_quiet();
    });
}

/// An INVALIDATE that names the PASID's entry refuses those who wait at that moment, and nobody else; what comes later
/// waits and gets through.
#[test]
fn an_invalidation_of_the_entry_refuses_who_waits() {
    explore(|| {
        let world = World::new();
        world.set(0, 0, true);
        let guest = spawn(&world, |world| world.serve(0, PageResponseCode::Success));
        let is_revoked = Arc::new(AtomicBool::new(false));
        let devices = [(0, 2), (1, 1)].map(|(first, pages)| {
            let is_revoked = Arc::clone(&is_revoked);
            spawn(&world, move |world| match world.access(first, pages, FOR_EVER) {
                Ok(()) => {}
                Err(DmaError::Refused) => {
                    assert!(is_revoked.load(SeqCst), "nobody refuses before");
                    assert_eq!(world.access(first, pages, FOR_EVER), Ok(()), "nobody refuses afterwards");
                }
                Err(error) => panic!("{error}"),
            })
        });
        let revokes = spawn(&world, move |world| {
            is_revoked.store(true, SeqCst);
            let mut host = world.iommu.lock();
            assert_eq!(host.invalidate(&[all(Caches::PASID | Caches::TLB)]), Ok(()));
            world.replacements.fetch_add(1, SeqCst);
        });
        join(devices.into_iter().chain([revokes]));
        world.shut();
        guest.join().unwrap();
        assert_eq!(world.succeeded.load(SeqCst), 2);
        world.is_quiet();
    });
}

/// A process is unbound while devices access and wait: they stop, and none is left behind.
#[test]
fn nothing_is_accessed_after_an_unbind_and_nobody_waits_for_ever() {
    explore(|| {
        let world = World::new();
        world.set(0, 0, true);
        let guest = spawn(&world, |world| world.serve(0, PageResponseCode::Success));
        let devices = [(0, 2), (1, 1)].map(|(first, pages)| {
            spawn(&world, move |world| {
                for _ in 0..2 {
                    match world.access(first, pages, FOR_EVER) {
                        Ok(()) => {}
                        Err(DmaError::Refused | DmaError::Fault(_)) => {
                            assert!(world.is_over[0].load(SeqCst), "nobody refuses before");
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
            })
        });
        let killer = spawn(&world, |world| world.bind(None));
        join(devices.into_iter().chain([killer]));
        world.shut();
        guest.join().unwrap();
        world.is_quiet();
    });
}

/// The same where nobody serves faults any more: only the unbind ends the waiting.
#[test]
fn an_unbind_alone_ends_the_waiting() {
    explore(|| {
        let world = World::new();
        let devices = [1, 1, 2].map(|page| {
            spawn(&world, move |world| {
                let refused = world.access(page, 1, FOR_EVER).unwrap_err();
                assert!(matches!(refused, DmaError::Refused | DmaError::Fault(_)), "{refused}");
            })
        });
        let killer = spawn(&world, |world| world.bind(None));
        join(devices.into_iter().chain([killer]));
        world.is_quiet();
    });
}

/// The PASID goes from one process to another in one step: what waited for the first does not reach the second with its
/// old answer, and no access mixes the two.
///
/// Found by review: an access that was told to try again did so in the second process, when that came in between.
#[test]
fn a_table_is_replaced_under_accesses() {
    explore(|| {
        let world = World::new();
        for process in [0, 1] {
            world.set(process, 0, true);
        }
        let guest = spawn(&world, |world| world.serve(0, PageResponseCode::Success));
        // The second process has these already.
        world.set(1, 2, true);
        world.set(1, 3, true);
        let come_of = |world: &World, tried| match tried {
            Ok(()) => {}
            Err(DmaError::Refused) => assert!(world.is_over[0].load(SeqCst), "nobody refuses before"),
            Err(error) => panic!("{error}"),
        };
        let devices = [
            // Of the second process nobody maps page 1, and yet the answer is Success, each time.
            spawn(&world, |world| {
                for _ in 0..2 {
                    let _ = world.access(0, 2, Duration::ZERO);
                }
            }),
            spawn(&world, move |world| come_of(world, world.access(2, 1, FOR_EVER))),
            spawn(&world, move |world| come_of(world, world.poll(3, Permissions::Write))),
        ];
        let replaces = spawn(&world, |world| world.bind(Some(1)));
        join(devices.into_iter().chain([replaces]));
        world.shut();
        guest.join().unwrap();
        world.bind(None);
        world.is_quiet();
    });
}

/// A page is taken away and invalidated: when that has returned, the frame is somebody else's.
#[test]
fn nothing_is_accessed_after_an_invalidation() {
    explore(|| {
        let world = World::new();
        world.set(0, 0, true);
        let devices = [Duration::ZERO, FOR_EVER].map(|patience| {
            spawn(&world, move |world| {
                for _ in 0..2 {
                    match world.access(0, 1, patience) {
                        Ok(()) | Err(DmaError::TimedOut | DmaError::Refused) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            })
        });
        let guest = spawn(&world, |world| {
            world.set(0, 0, false);
            let range = IovaRange::from_length(Iova(0), 0x1000).unwrap();
            let scope = Scope::Range { pasid: stream().pasid, range, page_lg2: 12 };
            let caches = Caches::TLB;
            let page =
                Invalidation { endpoint: ENDPOINT, caches, scope, leaf: true, tag: None, global: false };
            assert_eq!(world.iommu.lock().invalidate(&[page]), Ok(()));
            world.is_over[0].store(true, SeqCst);
        });
        let denies = spawn(&world, |world| {
            loop {
                {
                    let bell = world.bell.0.lock().unwrap();
                    let mut bell =
                        world.bell.1.wait_while(bell, |bell| !bell.rings && !bell.is_shut).unwrap();
                    if !std::mem::take(&mut bell.rings) {
                        return;
                    }
                }
                let mut host = world.iommu.lock();
                while let Some(request) = host.next_page_request() {
                    let code = PageResponseCode::Invalid;
                    let response = GroupResponse { stream: request.stream, group: request.group, code };
                    host.respond(&response).unwrap();
                }
            }
        });
        join(devices.into_iter().chain([guest]));
        world.shut();
        denies.join().unwrap();
        world.is_quiet();
    });
}

/// A device that gives up at once leaves its request to others that wait for the same page.
#[test]
fn who_gives_up_takes_nothing_from_who_waits() {
    explore(|| {
        let world = World::new();
        let guest = spawn(&world, |world| world.serve(0, PageResponseCode::Success));
        let impatient = spawn(&world, |world| match world.access(1, 1, Duration::ZERO) {
            Ok(()) | Err(DmaError::TimedOut) => {}
            Err(error) => panic!("{error}"),
        });
        let patient = spawn(&world, |world| assert_eq!(world.access(1, 1, FOR_EVER), Ok(())));
        let polls = spawn(&world, |world| assert_eq!(world.poll(1, Permissions::ReadWrite), Ok(())));
        join([impatient, patient, polls]);
        world.shut();
        guest.join().unwrap();
        world.is_quiet();
    });
}
