//! Accesses of devices through the software host, over guest memory as a VMM has it.

use std::hint::black_box;
use std::time::Duration;

use pgtable_formats::format::Attrs;
use pgtable_formats::{Access, Iova, Pasid};
use viommu_device::host::{EndpointCaps, Host, SpaceSpec, Stream, TableCaps};
use viommu_device::soft::{SoftHost, TLB_ENTRIES};
use viommu_queue::GuestTables;
use viommu_tests::rig::{Alloc, Memory};
use viommu_tests::tables::{PageTable, PasidTable};
use viommu_wire::EndpointId;

use crate::measure::{Stopwatch, Suite};
use crate::walks::{self, FIRST, PAGES};

const ENDPOINT: EndpointId = EndpointId(8);
/// Accesses of a batch.
const ACCESSES: u64 = 1024;

pub(crate) fn run(suite: &mut Suite) {
    for (name, caps) in walks::architectures() {
        hits(suite, name, &caps);
        misses(suite, name, &caps);
    }
}

/// A host with one endpoint, whose PASID table is bound.
fn host(memory: &Memory, caps: &TableCaps, pasids: &PasidTable) -> SoftHost<GuestTables> {
    let mut host = SoftHost::new(memory.tables().clone());
    let endpoint = EndpointCaps { tables: Some(caps.clone()), ..EndpointCaps::default() };
    host.add_endpoint(ENDPOINT, endpoint).expect("an endpoint");
    let table = &pasids.canonical();
    let mut space =
        host.create(SpaceSpec::GuestTable { endpoint: ENDPOINT, table }).expect("a table in memory");
    host.bind(Stream::untagged(ENDPOINT), Some(&mut space)).expect("a table for the endpoint");
    host
}

fn stream(pasid: u32) -> Stream {
    Stream { endpoint: ENDPOINT, pasid: Pasid::new(pasid) }
}

/// One access each by `accesses`, which all succeed.
fn translate(
    host: &mut SoftHost<GuestTables>,
    stopwatch: Stopwatch,
    accesses: impl Iterator<Item = (Stream, Iova)>,
) -> Duration {
    let mut faults = 0;
    let (time, ()) = stopwatch.time(|| {
        for (stream, iova) in accesses {
            match host.translate(black_box(stream), black_box(iova), Access::READ, |piece| piece.output) {
                Ok(output) => _ = black_box(output),
                Err(_) => faults += 1,
            }
        }
    });
    assert_eq!(faults, 0);
    time
}

/// Accesses that the front of all caches knows, and with so many PASIDs in use that some go behind it.
fn hits(suite: &mut Suite, name: &str, caps: &TableCaps) {
    let memory = Memory::new(256 << 20);
    let mut alloc = Alloc::new(&memory);
    let pasids = PasidTable::new(caps, 13, &mut alloc);
    let count: u32 = 1_000;
    for pasid in 1..=count {
        let table = PageTable::new(caps, pasid as u16, &mut alloc);
        // As processes have them: the same few addresses in each.
        table.map(&mut alloc, FIRST, u64::from(pasid) << 24, 0x4000, Attrs::READ_WRITE);
        pasids.set(&mut alloc, pasid, &table);
    }
    let (mut host, stopwatch) = (host(&memory, caps, &pasids), Stopwatch::new());
    let format = ("format", name);
    let one = || (0..ACCESSES).map(|at| (stream(1), Iova(FIRST + at * 8 % 0x1000)));
    suite.run("hit", &[format, ("pasids", "1"), ("page", "same")], ACCESSES, || {
        translate(&mut host, stopwatch, one())
    });
    let all = (1..=count).map(|pasid| (stream(pasid), Iova(FIRST + 0x238)));
    suite.run("hit", &[format, ("pasids", "1000"), ("page", "one-each")], u64::from(count), || {
        translate(&mut host, stopwatch, all.clone())
    });
    suite.run("hit", &[format, ("pasids", "1000"), ("page", "same")], ACCESSES, || {
        translate(&mut host, stopwatch, one())
    });
}

/// Accesses that no cache of translations knows.
fn misses(suite: &mut Suite, name: &str, caps: &TableCaps) {
    let memory = Memory::new(256 << 20);
    let mut alloc = Alloc::new(&memory);
    let pasids = PasidTable::new(caps, 13, &mut alloc);
    let table = PageTable::new(caps, 1, &mut alloc);
    walks::map_all(&table, &mut alloc);
    pasids.set(&mut alloc, 7, &table);
    let (mut host, stopwatch) = (host(&memory, caps, &pasids), Stopwatch::new());
    let addresses = walks::addresses();

    // Context and walk from the root, each time.
    host.set_strict(true);
    suite.run("miss", &[("format", name), ("caches", "none"), ("levels", "4")], PAGES, || {
        translate(&mut host, stopwatch, addresses.iter().map(|&iova| (stream(7), iova)))
    });
    host.set_strict(false);

    // More pages in turn than the IOTLB holds: contexts and last-level tables are cached.
    let pages = 4 * TLB_ENTRIES as u64;
    let first = FIRST + (1 << 30);
    for page in 0..pages {
        let (iova, output) = (first + page * 0x1000, 0x1_0000_0000 + page * 0x1000);
        table.map(&mut alloc, iova, output, 0x1000, Attrs::READ_WRITE);
    }
    let mut next = 0;
    suite.run("miss", &[("format", name), ("caches", "all"), ("levels", "4")], ACCESSES, || {
        let start = next;
        next = (next + ACCESSES) % pages;
        translate(
            &mut host,
            stopwatch,
            (start..start + ACCESSES).map(|page| (stream(7), Iova(first + page * 0x1000))),
        )
    });
}
