//! Accesses of a device that the VMM emulates, from its write to the bytes in guest memory: the lock, the translation (known
//! to the front of all caches), the pin, the copy. What a recorder that is off adds, and one that is on.

use std::hint::black_box;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use pgtable_formats::format::Attrs;
use viommu_device::host::{EndpointCaps, Stream};
use viommu_guest::sva::{Processes, Sva, SvaOptions, Unpaged};
use viommu_guest::tables::{AddressSpace, SpaceOptions};
use viommu_queue::record::Tape;
use viommu_tests::rig::{self, Guest, Memory, Setup};
use viommu_wire::{Iova, IovaRange};
use vm_memory::{Bytes, GuestAddress};

use crate::measure::{Stopwatch, Suite};

const ENDPOINT: u32 = 8;
/// Writes of a batch, to one page.
const WRITES: u64 = 512;
const PAGE: u64 = 0x7f00_0000_0000;

pub(crate) fn run(suite: &mut Suite) {
    let caps = EndpointCaps { tables: Some(rig::smmuv3()), page_requests: true, ..EndpointCaps::default() };
    let mut guest = Guest::new(Setup { endpoints: vec![(ENDPOINT, caps)], ..Setup::default() });
    let endpoint = guest.probe(ENDPOINT);
    let Guest { driver, machine } = &mut guest;
    let mut sva = Sva::new(driver, &endpoint, SvaOptions::default()).expect("PASIDs");
    let mut space = AddressSpace::new(driver, &endpoint, SpaceOptions::default()).expect("memory");
    let page = IovaRange::from_length(Iova(PAGE), 0x1000).expect("a page");
    space.map(driver, page, Memory::page(3), Attrs::READ_WRITE).expect("a free page");
    let mut processes = Processes::new();
    let process = processes.add(space, Unpaged);
    let handle = sva.bind(driver, &mut processes, process).expect("a PASID");
    let stream = Stream { endpoint: endpoint.id(), pasid: Some(handle.pasid()) };

    let plain = machine.behind(stream);
    each(suite, "none", |at| write(&plain, at));
    let recorded = machine.behind_recorded(stream);
    each(suite, "off", |at| write(&recorded, at));
    machine.lock().set_recorder(Some(Arc::new(Tape::new(io::sink()))));
    let recorded = machine.behind_recorded(stream);
    each(suite, "on", |at| write(&recorded, at));
    machine.lock().set_recorder(None);
    let paged = machine.paged(stream, Duration::ZERO);
    each(suite, "none,paged", |at| paged.try_write(machine.memory().map(), at, &[1; 8]).is_ok());
}

// As a function of its own, for each kind of memory: what is inlined into what is not to make the difference.
#[inline(never)]
fn write<M: Bytes<GuestAddress>>(memory: &M, at: GuestAddress) -> bool {
    memory.write_slice(&[1; 8], at).is_ok()
}

fn each(suite: &mut Suite, recorder: &str, write: impl Fn(GuestAddress) -> bool) {
    let stopwatch = Stopwatch::new();
    suite.run("dma", &[("bytes", "8"), ("recorder", recorder)], WRITES, || {
        let (time, written) = stopwatch.time(|| {
            let at = |number| GuestAddress(PAGE + number * 8);
            (0..WRITES).filter(|&number| write(black_box(at(number)))).count()
        });
        assert_eq!(written as u64, WRITES);
        time
    });
}
