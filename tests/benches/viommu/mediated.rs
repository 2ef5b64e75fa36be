//! Both kinds of tables on a machine that has one: binding, and reading a guest's PASID table.

use std::hint::black_box;

use pgtable_formats::Pasid;
use pgtable_formats::context::Canonical;
use viommu_device::host::{
    EndpointCaps, Host, Invalidation, Scope, SpaceSpec, Stream, TableCaps, TableKinds,
};
use viommu_device::mediated::{Mediated, MediationLimits, Space, Window};
use viommu_device::soft::{self, SoftHost};
use viommu_queue::GuestTables;
use viommu_tests::rig::{self, Alloc, Memory};
use viommu_tests::tables::{PageTable, PasidTable};
use viommu_wire::{Caches, EndpointId};

use crate::measure::{Stopwatch, Suite};
use crate::walks;

const ENDPOINT: EndpointId = EndpointId(8);
const WINDOW_BYTES: u64 = 4 << 20;
/// Entries of the large table.
const MANY: usize = 100_000;

type Both = Mediated<SoftHost<GuestTables>, GuestTables>;

/// A page table for one PASID, beside 1,000 others, by the host alone or by way of a table of descriptors.
pub(crate) fn bind_and_unbind(suite: &mut Suite) {
    for (name, caps) in walks::architectures() {
        page_tables(suite, name, &caps);
    }
}

/// What an INVALIDATE costs where the device reads the guest's PASID table.
pub(crate) fn read_again(suite: &mut Suite) {
    let caps = rig::vtd();
    one_entry(suite, &caps);
    for (keys, stride) in [("dense", 1), ("one-in-64", 64), ("spread", 1 << 10)] {
        whole_table(suite, &caps, keys, stride);
    }
}

/// A host that takes one kind of table, and mediation over it.
fn host(memory: &Memory, caps: &TableCaps, native: TableKinds) -> Both {
    let mut host = SoftHost::new(memory.tables().clone());
    let tables = Some(caps.clone());
    let endpoint = EndpointCaps { tables, kinds: native, native, ..EndpointCaps::default() };
    host.add_endpoint(ENDPOINT, endpoint).expect("an endpoint");
    let limits = MediationLimits {
        max_entries_per_endpoint: 1 << 18,
        max_entries: 1 << 18,
        ..MediationLimits::DEFAULT
    };
    let window = Window::new(memory.first(), WINDOW_BYTES);
    Mediated::new(host, memory.tables().clone(), window, limits).expect("a window")
}

fn alloc(memory: &Memory) -> Alloc {
    Alloc::within(memory, pgtable_formats::Gpa(memory.first().0 + WINDOW_BYTES), memory.last())
}

fn space(host: &mut Both, table: &Canonical) -> Space<soft::Space> {
    host.create(SpaceSpec::GuestTable { endpoint: ENDPOINT, table }).expect("a table in memory")
}

fn page_tables(suite: &mut Suite, name: &str, caps: &TableCaps) {
    const BATCH: u32 = 64;
    let memory = Memory::new(64 << 20);
    let mut alloc = alloc(&memory);
    let table = PageTable::new(caps, 1, &mut alloc).canonical().expect("a table");
    let mut ways = vec![("native", TableKinds::PAGE_TABLE)];
    if matches!(caps, TableCaps::Smmuv3(_)) {
        ways.push(("mediated", TableKinds::PASID_TABLE));
    }
    for (way, native) in ways {
        let mut host = host(&memory, caps, native);
        let stream = |pasid| Stream { endpoint: ENDPOINT, pasid: Pasid::new(pasid) };
        for pasid in 1..=1000 {
            let mut space = space(&mut host, &table);
            host.bind(stream(pasid), Some(&mut space)).expect("bound");
        }
        let mut spaces: Vec<_> = (0..BATCH).map(|_| space(&mut host, &table)).collect();
        let stopwatch = Stopwatch::new();
        for (what, binds) in [("bind", true), ("unbind", false)] {
            let keys = [("format", name), ("way", way), ("what", what)];
            suite.run("pasid-bind", &keys, u64::from(BATCH), || {
                let mut bind = |host: &mut Both| {
                    for (pasid, space) in (2000..).zip(&mut spaces) {
                        host.bind(black_box(stream(pasid)), Some(space)).expect("bound");
                    }
                };
                let unbind = |host: &mut Both| {
                    for pasid in 2000..2000 + BATCH {
                        host.bind(black_box(stream(pasid)), None).expect("unbound");
                    }
                };
                if binds {
                    let (time, ()) = stopwatch.time(|| bind(&mut host));
                    unbind(&mut host);
                    time
                } else {
                    bind(&mut host);
                    stopwatch.time(|| unbind(&mut host)).0
                }
            });
        }
    }
}

/// `count` entries, `stride` PASIDs apart, that lead to one page table.
fn bound(
    memory: &Memory,
    alloc: &mut Alloc,
    caps: &TableCaps,
    count: usize,
    stride: u32,
) -> (Both, PasidTable, [PageTable; 2]) {
    let pages = [1, 2].map(|asid| PageTable::new(caps, asid, alloc));
    let pasids = PasidTable::new(caps, 20, alloc);
    for number in 0..count as u32 {
        pasids.set(alloc, number * stride % (1 << 20), &pages[0]);
    }
    let mut host = host(memory, caps, TableKinds::PAGE_TABLE);
    let mut all = space(&mut host, &pasids.canonical());
    host.bind(Stream::untagged(ENDPOINT), Some(&mut all)).expect("bound");
    (host, pasids, pages)
}

fn invalidate(host: &mut Both, scope: Scope) {
    let one = Invalidation {
        endpoint: ENDPOINT,
        scope,
        caches: Caches::PASID,
        leaf: false,
        tag: None,
        global: false,
    };
    host.invalidate(black_box(&[one])).expect("invalidated");
}

/// INVALIDATE of the PASID cache for one PASID: its entry is the same, or another.
fn one_entry(suite: &mut Suite, caps: &TableCaps) {
    let memory = Memory::new(512 << 20);
    let mut alloc = alloc(&memory);
    let count = suite.size(MANY);
    let (mut host, pasids, pages) = bound(&memory, &mut alloc, caps, count, 1);
    let pasid = count as u32 / 2;
    let scope = Scope::Pasid(Pasid::new(pasid));
    let stopwatch = Stopwatch::new();
    let bound = count.to_string();
    suite.run("pasid-reread", &[("bound", &bound), ("what", "one"), ("changed", "no")], 64, || {
        stopwatch.time(|| (0..64).for_each(|_| invalidate(&mut host, scope))).0
    });
    let mut turn = 0;
    suite.run("pasid-reread", &[("bound", &bound), ("what", "one"), ("changed", "yes")], 1, || {
        turn ^= 1;
        pasids.set(&mut alloc, pasid, &pages[turn]);
        stopwatch.time(|| invalidate(&mut host, scope)).0
    });
}

/// INVALIDATE of the PASID cache for all: 1,000 of 2^20 are present.
fn whole_table(suite: &mut Suite, caps: &TableCaps, name: &str, stride: u32) {
    let memory = Memory::new(256 << 20);
    let mut alloc = alloc(&memory);
    let (mut host, _, _) = bound(&memory, &mut alloc, caps, 1000, stride);
    let stopwatch = Stopwatch::new();
    suite.run("pasid-reread", &[("present", "1000"), ("what", "all"), ("pasids", name)], 1, || {
        stopwatch.time(|| invalidate(&mut host, Scope::Endpoint)).0
    });
}
