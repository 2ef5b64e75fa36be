//! Guest tables: what they serve, and what an invalidation drops.

use pgtable_formats::context::{Canonical, smmuv3, vtd};
use pgtable_formats::format::Attrs;
use pgtable_formats::{Gpa, Pasid};
use viommu_device::host::{Host, HostError, Invalidation, Scope, SpaceSpec, Stream, TableCaps};
use viommu_wire::{Caches, EndpointId};

use super::{HostUnderTest, Space, pages, read, tagged, untagged};
use crate::tables::{PageTable, PasidTable};

/// A guest's table that is not in its memory is refused when the space is made.
pub fn a_table_outside_memory_is_refused<T: HostUnderTest>(test: &mut T) {
    let [endpoint, _] = test.endpoints();
    let Some(caps) = caps(test) else { return };
    let nowhere = Gpa(0x20_0000_0000);
    let table = match &caps {
        TableCaps::Smmuv3(caps) => Canonical::Smmuv3(
            smmuv3::CdTable::from_ste(nowhere.0 | 4 << 59, 2, caps).expect("a legal pointer"),
        ),
        TableCaps::Vtd(caps) => Canonical::VtdFirstStage(
            vtd::FirstStage::new(nowhere, vtd::FirstStageFlags::empty(), 48, caps).expect("a legal pointer"),
        ),
    };
    let refused = test.host().create(SpaceSpec::GuestTable { endpoint, table: &table });
    assert_eq!(refused.err(), Some(HostError::BadAddress));
}

/// The capabilities for tables of the first endpoint; a host without skips the tests about them.
fn caps<T: HostUnderTest>(test: &mut T) -> Option<TableCaps> {
    let [endpoint, _] = test.endpoints();
    test.host().caps(endpoint).and_then(|caps| caps.tables.clone())
}

/// A PASID table that is bound to the first endpoint: PASIDs 0 (untagged), 5 and 7 lead pages 1 to 4 to pages
/// `16 * (index + 1)` and following.
struct Handover<S> {
    endpoint: EndpointId,
    caps: TableCaps,
    space: S,
    table: PasidTable,
    spaces: [PageTable; 3],
}

const STREAMS: [Option<u32>; 3] = [None, Some(5), Some(7)];

impl Handover<()> {
    fn new<T: HostUnderTest>(test: &mut T) -> Option<Handover<Space<T>>> {
        let [endpoint, _] = test.endpoints();
        let caps = caps(test)?;
        let table = PasidTable::new(&caps, 4, test.memory());
        let spaces = [0, 1, 2].map(|index| {
            let output = test.page(16 * (index + 1));
            let space = PageTable::new(&caps, index as u16 + 1, test.memory());
            space.map(test.memory(), 0x1000, output, 0x4000, Attrs::READ_WRITE);
            table.set(test.memory(), STREAMS[index as usize].unwrap_or(0), &space);
            space
        });
        let canonical = table.canonical();
        let mut space =
            test.host().create(SpaceSpec::GuestTable { endpoint, table: &canonical }).expect("a space");
        test.host().bind(untagged(endpoint), Some(&mut space)).expect("bound");
        // As the device does: translations may outlive their table, and meet the new one's tags.
        let (scope, caches) = (Scope::Endpoint, Caches::all());
        let all = Invalidation { endpoint, scope, caches, leaf: false, tag: None, global: true };
        test.host().invalidate(&[all]).expect("invalidated");
        Some(Handover { endpoint, caps, space, table, spaces })
    }
}

impl<S> Handover<S> {
    fn stream(&self, index: usize) -> Stream {
        match STREAMS[index] {
            None => untagged(self.endpoint),
            Some(pasid) => tagged(self.endpoint, pasid),
        }
    }

    /// How often page `page` of a space has moved, as the endpoint sees it.
    fn seen<T: HostUnderTest>(&self, test: &mut T, index: usize, page: u64) -> u64 {
        let first = test.page(16 * (index as u64 + 1)) + ((page - 1) << 12);
        (read(test, self.stream(index), page).expect("mapped") - first) >> 18
    }

    /// The guest maps everything 64 pages further and tells nobody.
    fn remap<T: HostUnderTest>(&self, test: &mut T, moves: u64) {
        for (index, space) in (0..).zip(&self.spaces) {
            let output = test.page(16 * (index + 1) + 64 * moves);
            space.remap(test.memory(), 0x1000, output, 0x4000);
        }
    }

    /// Everything has moved so often.
    fn all<T: HostUnderTest>(&self, test: &mut T, moves: u64) {
        for (index, pasid) in STREAMS.iter().enumerate() {
            for page in 1..=4 {
                assert_eq!(self.seen(test, index, page), moves, "{pasid:?} page {page}");
            }
        }
    }

    /// That it still is as before, where the host promises that.
    fn stale<T: HostUnderTest>(&self, test: &mut T, index: usize, page: u64) {
        if test.shows_stale() {
            assert_eq!(self.seen(test, index, page), 0, "{:?} page {page}", STREAMS[index]);
        }
    }

    fn invalidation(&self, scope: Scope, caches: Caches) -> Invalidation {
        Invalidation { endpoint: self.endpoint, scope, caches, leaf: false, tag: None, global: false }
    }

    fn invalidate<T: HostUnderTest>(&self, test: &mut T, scope: Scope, caches: Caches) {
        let invalidation = self.invalidation(scope, caches);
        test.host().invalidate(&[invalidation]).expect("invalidated");
    }
}

/// A PASID table serves untagged accesses and each PASID by its own page table.
pub fn tables_serve_pasids<T: HostUnderTest>(test: &mut T) {
    let Some(bound) = Handover::new(test) else { return };
    bound.all(test, 0);
    assert_eq!(read(test, tagged(bound.endpoint, 6), 1), None);
    assert_eq!(read(test, untagged(bound.endpoint), 5), None);
    let Handover { endpoint, space, .. } = bound;
    test.host().bind(untagged(endpoint), None).expect("unbound");
    for pasid in [5, 7] {
        assert_eq!(read(test, tagged(endpoint, pasid), 1), None);
    }
    assert_eq!(read(test, untagged(endpoint), 1), None);
    test.host().destroy(space);
}

/// A page table for one PASID serves it alone, beside others.
pub fn single_tables_serve_one_pasid<T: HostUnderTest>(test: &mut T) {
    let [endpoint, _] = test.endpoints();
    let Some(caps) = caps(test) else { return };
    let mut spaces = Vec::new();
    for (pasid, number) in [(5, 16), (7, 32)] {
        let output = test.page(number);
        let pages = PageTable::new(&caps, 1, test.memory());
        pages.map(test.memory(), 0x1000, output, 0x1000, Attrs::READ_WRITE);
        let Some(table) = pages.canonical() else { return };
        let mut space =
            test.host().create(SpaceSpec::GuestTable { endpoint, table: &table }).expect("a space");
        test.host().bind(tagged(endpoint, pasid), Some(&mut space)).expect("bound");
        spaces.push(space);
    }
    let outputs = [16, 32].map(|number| Some(test.page(number)));
    assert_eq!([5, 7].map(|pasid| read(test, tagged(endpoint, pasid), 1)), outputs);
    assert_eq!((read(test, tagged(endpoint, 6), 1), read(test, untagged(endpoint), 1)), (None, None));
    test.host().bind(tagged(endpoint, 5), None).expect("unbound");
    assert_eq!([5, 7].map(|pasid| read(test, tagged(endpoint, pasid), 1)), [None, outputs[1]]);
}

/// An invalidation of the endpoint, or of one PASID, makes the guest's change visible; of that PASID at least.
pub fn stale_until_invalidated<T: HostUnderTest>(test: &mut T) {
    let Some(bound) = Handover::new(test) else { return };
    bound.all(test, 0);
    bound.remap(test, 1);
    for index in 0..3 {
        bound.stale(test, index, 1);
    }
    bound.invalidate(test, Scope::Pasid(Pasid::new(5)), Caches::TLB);
    for page in 1..=4 {
        assert_eq!(bound.seen(test, 1, page), 1);
    }
    bound.stale(test, 0, 1);
    bound.stale(test, 2, 1);
    bound.invalidate(test, Scope::Pasid(None), Caches::TLB);
    assert_eq!(bound.seen(test, 0, 4), 1);
    bound.invalidate(test, Scope::Endpoint, Caches::TLB);
    bound.all(test, 1);
}

/// An invalidation of a range makes the change visible in that range at least; a batch is done in order.
pub fn invalidation_by_range<T: HostUnderTest>(test: &mut T) {
    for leaf in [false, true] {
        let Some(bound) = Handover::new(test) else { return };
        bound.all(test, 0);
        bound.remap(test, 1);
        let part = |first, pasid| {
            let scope = Scope::Range { pasid, range: pages(first, 1), page_lg2: 12 };
            Invalidation { leaf, ..bound.invalidation(scope, Caches::TLB) }
        };
        let batch = [part(2, Pasid::new(5)), part(3, Pasid::new(5)), part(1, None)];
        test.host().invalidate(&batch).expect("invalidated");
        assert_eq!((bound.seen(test, 1, 2), bound.seen(test, 1, 3), bound.seen(test, 0, 1)), (1, 1, 1));
        bound.stale(test, 1, 1);
        bound.stale(test, 0, 2);
        bound.stale(test, 2, 2);
        let Handover { endpoint, space, .. } = bound;
        test.host().bind(untagged(endpoint), None).expect("unbound");
        test.host().destroy(space);
    }
}

/// A changed or removed entry of a PASID table is seen once the PASID cache was dropped, and what was translated
/// through the old one is gone with it.
pub fn invalidation_of_contexts<T: HostUnderTest>(test: &mut T) {
    let Some(bound) = Handover::new(test) else { return };
    bound.all(test, 0);
    let output = test.page(128);
    let other = PageTable::new(&bound.caps, 9, test.memory());
    other.map(test.memory(), 0x1000, output, 0x4000, Attrs::READ);
    bound.table.set(test.memory(), 5, &other);
    bound.stale(test, 1, 1);
    bound.invalidate(test, Scope::Pasid(Pasid::new(5)), Caches::PASID);
    assert_eq!(read(test, bound.stream(1), 1), Some(output));
    bound.table.clear(test.memory(), 5);
    bound.invalidate(test, Scope::Endpoint, Caches::PASID);
    assert_eq!(read(test, bound.stream(1), 1), None);
    assert_eq!((bound.seen(test, 0, 1), bound.seen(test, 2, 1)), (0, 0));
}

/// An invalidation by tag reaches what has that tag at least (Arm).
pub fn invalidation_by_tag<T: HostUnderTest>(test: &mut T) {
    let Some(bound) = Handover::new(test) else { return };
    if !matches!(bound.caps, TableCaps::Smmuv3(_)) {
        return;
    }
    bound.all(test, 0);
    bound.remap(test, 1);
    let invalidation = Invalidation { tag: Some(2), ..bound.invalidation(Scope::Endpoint, Caches::TLB) };
    test.host().invalidate(&[invalidation]).expect("invalidated");
    for page in 1..=4 {
        assert_eq!(bound.seen(test, 1, page), 1, "the tag of PASID 5");
    }
    bound.stale(test, 0, 1);
    bound.stale(test, 2, 1);
}

/// What was cached of one table does not serve the next that is bound.
pub fn rebinding_starts_clean<T: HostUnderTest>(test: &mut T) {
    let Some(first) = Handover::new(test) else { return };
    first.all(test, 0);
    first.remap(test, 1);
    let second = Handover::new(test).expect("tables");
    second.all(test, 0);
    let Handover { endpoint, mut space, .. } = first;
    test.host().bind(untagged(endpoint), Some(&mut space)).expect("bound");
    second.invalidate(test, Scope::Endpoint, Caches::all());
    let output = test.page(16 + 64);
    assert_eq!(read(test, untagged(endpoint), 1), Some(output));
}
