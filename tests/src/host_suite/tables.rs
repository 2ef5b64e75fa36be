//! Guest tables: what they serve, and what an invalidation drops.

use pgtable_formats::context::{Canonical, smmuv3, vtd};
use pgtable_formats::format::Attrs;
use pgtable_formats::{AccessKind, Gpa, Iova, Pasid};
use viommu_device::host::{FaultCause, Host, HostError, Invalidation, Scope, SpaceSpec, Stream, TableCaps};
use viommu_wire::{Caches, EndpointId};

use super::abilities::can;
use super::checks::{Space, expect_at, leads, pages, tagged, untagged};
use super::{Ability, HostUnderTest};
use crate::tables::{PageTable, PasidTable};

/// The capabilities for tables of the first endpoint.
fn caps<T: HostUnderTest>(test: &mut T) -> TableCaps {
    let [endpoint, _] = test.endpoints();
    test.host().caps(endpoint).and_then(|caps| caps.tables.clone()).expect("tables that are not denied")
}

/// A guest's table that is not in its memory is refused when the space is made.
pub fn a_table_outside_memory_is_refused<T: HostUnderTest>(test: &mut T) {
    let [endpoint, _] = test.endpoints();
    let nowhere = Gpa(0x2_0000_0000);
    if can(test, &[Ability::PasidTables]) {
        let table = match caps(test) {
            TableCaps::Smmuv3(caps) => {
                let bits = u64::from(caps.ssid_bits.min(4));
                let table = smmuv3::CdTable::from_ste(nowhere.0 | bits << 59, 2, &caps);
                Canonical::Smmuv3(table.expect("a legal pointer"))
            }
            TableCaps::Vtd(caps) => {
                let table = vtd::PasidTable::new(nowhere, 7, Pasid::ZERO, &caps);
                Canonical::VtdPasidTable(table.expect("a legal pointer"))
            }
        };
        let refused = test.host().create(SpaceSpec::GuestTable { endpoint, table: &table });
        assert_eq!(refused.err(), Some(HostError::BadAddress));
    }
    if can(test, &[Ability::PageTables]) {
        let table = match caps(test) {
            TableCaps::Smmuv3(caps) => {
                let known = PageTable::new(&TableCaps::Smmuv3(caps), 1, test.memory());
                let PageTable::Smmuv3 { bare, .. } = known else { panic!("not of this architecture") };
                let registers = smmuv3::PageTableRegisters { ttbr0: nowhere.0, ..bare.registers() };
                let table = smmuv3::PageTable::new(&registers, &caps);
                Canonical::Smmuv3PageTable(table.expect("a legal pointer"))
            }
            TableCaps::Vtd(caps) => {
                let table = vtd::FirstStage::new(nowhere, vtd::FirstStageFlags::empty(), 48, &caps);
                Canonical::VtdFirstStage(table.expect("a legal pointer"))
            }
        };
        let refused = test.host().create(SpaceSpec::GuestTable { endpoint, table: &table });
        assert_eq!(refused.err(), Some(HostError::BadAddress));
    }
}

/// A table that is bound to the first endpoint: untagged accesses, and PASIDs 5 and 7 where there are PASIDs, lead pages
/// 1 to 4 to pages `16 * (index + 1)` and following.
struct Handover<S> {
    endpoint: EndpointId,
    caps: TableCaps,
    space: S,
    table: PasidTable,
    spaces: Vec<PageTable>,
}

/// The PASIDs of [`Handover`], by index.
const STREAMS: [Option<u32>; 3] = [None, Some(5), Some(7)];

/// Where page `page` of the space of index `index` leads, after it has moved `moves` times.
fn target(index: usize, page: u64, moves: u64) -> u64 {
    16 * (index as u64 + 1) + (page - 1) + 64 * moves
}

impl Handover<()> {
    /// `None` where there are no such tables.
    fn new<T: HostUnderTest>(test: &mut T) -> Option<Handover<Space<T>>> {
        if !can(test, &[Ability::PasidTables]) {
            return None;
        }
        let [endpoint, _] = test.endpoints();
        let caps = caps(test);
        let streams = if can(test, &[Ability::Pasids]) { STREAMS.len() } else { 1 };
        let table = PasidTable::new(&caps, if streams > 1 { 4 } else { 0 }, test.memory());
        let spaces = (0..streams).map(|index| {
            let output = test.page(target(index, 1, 0));
            let space = PageTable::new(&caps, index as u16 + 1, test.memory());
            space.map(test.memory(), 0x1000, output, 0x4000, Attrs::READ_WRITE);
            table.set(test.memory(), STREAMS[index].unwrap_or(0), &space);
            space
        });
        let spaces = spaces.collect();
        let canonical = if test.ats() { with_ats(&table) } else { table.canonical() };
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

/// The same with EATS = 1.
fn with_ats(table: &PasidTable) -> Canonical {
    let Canonical::Smmuv3(table) = table.canonical() else { return table.canonical() };
    let [word0, word1] = table.words();
    let table = smmuv3::CdTable::from_ste(word0, word1 | 1 << 28, table.caps());
    Canonical::Smmuv3(table.expect("the same table"))
}

impl<S> Handover<S> {
    fn stream(&self, index: usize) -> Stream {
        match STREAMS[index] {
            None => untagged(self.endpoint),
            Some(pasid) => tagged(self.endpoint, pasid),
        }
    }

    /// The one that is invalidated: a PASID, where there are some.
    fn main(&self) -> usize {
        usize::from(self.spaces.len() > 1)
    }

    fn main_pasid(&self) -> Option<Pasid> {
        STREAMS[self.main()].and_then(Pasid::new)
    }

    /// The others.
    fn others(&self) -> impl Iterator<Item = usize> + use<S> {
        let main = self.main();
        (0..self.spaces.len()).filter(move |&index| index != main)
    }

    /// That the endpoint sees a page of a space as having moved so often.
    fn moved<T: HostUnderTest>(&self, test: &mut T, index: usize, page: u64, moves: u64) {
        leads(test, self.stream(index), page, target(index, page, moves));
    }

    /// The guest maps everything 64 pages further and tells nobody.
    fn remap<T: HostUnderTest>(&self, test: &mut T, moves: u64) {
        for (index, space) in self.spaces.iter().enumerate() {
            let output = test.page(target(index, 1, moves));
            space.remap(test.memory(), 0x1000, output, 0x4000);
        }
    }

    /// Everything has moved so often.
    fn all<T: HostUnderTest>(&self, test: &mut T, moves: u64) {
        for index in 0..self.spaces.len() {
            for page in 1..=4 {
                self.moved(test, index, page, moves);
            }
        }
    }

    /// That it still is as before, where the host promises that.
    fn stale<T: HostUnderTest>(&self, test: &mut T, index: usize, page: u64) {
        if test.shows_stale() {
            self.moved(test, index, page, 0);
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
    leads(test, tagged(bound.endpoint, 6), 1, None);
    leads(test, untagged(bound.endpoint), 5, None);
    let Handover { endpoint, space, .. } = bound;
    test.host().bind(untagged(endpoint), None).expect("unbound");
    for pasid in [5, 7] {
        leads(test, tagged(endpoint, pasid), 1, None);
    }
    leads(test, untagged(endpoint), 1, None);
    test.host().destroy(space);
}

/// A page table for each PASID, bound on its own.
struct Singles<S> {
    endpoint: EndpointId,
    spaces: Vec<S>,
    tables: Vec<PageTable>,
}

/// The PASIDs of [`Singles`], with where their page 1 leads.
const SINGLES: [(u32, u64); 2] = [(5, 16), (7, 32)];

impl Singles<()> {
    fn new<T: HostUnderTest>(test: &mut T) -> Option<Singles<Space<T>>> {
        if !can(test, &[Ability::PageTables, Ability::Pasids]) {
            return None;
        }
        let [endpoint, _] = test.endpoints();
        let caps = caps(test);
        let mut singles = Singles { endpoint, spaces: Vec::new(), tables: Vec::new() };
        for (asid, (pasid, number)) in (1..).zip(SINGLES) {
            let output = test.page(number);
            let table = PageTable::new(&caps, asid, test.memory());
            table.map(test.memory(), 0x1000, output, 0x4000, Attrs::READ_WRITE);
            let canonical = table.canonical().expect("a table for one PASID");
            let spec = SpaceSpec::GuestTable { endpoint, table: &canonical };
            let mut space = test.host().create(spec).expect("a space");
            test.host().bind(tagged(endpoint, pasid), Some(&mut space)).expect("bound");
            singles.spaces.push(space);
            singles.tables.push(table);
        }
        Some(singles)
    }
}

/// A page table for one PASID serves it alone, beside others.
pub fn single_tables_serve_one_pasid<T: HostUnderTest>(test: &mut T) {
    let Some(Singles { endpoint, spaces, .. }) = Singles::new(test) else { return };
    for (pasid, number) in SINGLES {
        leads(test, tagged(endpoint, pasid), 1, number);
        leads(test, tagged(endpoint, pasid), 4, number + 3);
        leads(test, tagged(endpoint, pasid), 5, None);
    }
    leads(test, tagged(endpoint, 6), 1, None);
    leads(test, untagged(endpoint), 1, None);
    test.host().bind(tagged(endpoint, 5), None).expect("unbound");
    leads(test, tagged(endpoint, 5), 1, None);
    leads(test, tagged(endpoint, 7), 1, 32);
    test.host().bind(tagged(endpoint, 7), None).expect("unbound");
    for space in spaces {
        test.host().destroy(space);
    }
}

/// What was cached of a page table for one PASID goes with an invalidation of that PASID, or of a range of it.
pub fn single_tables_are_stale_until_invalidated<T: HostUnderTest>(test: &mut T) {
    let Some(Singles { endpoint, tables, .. }) = Singles::new(test) else { return };
    let both = |test: &mut T, page, moves: [u64; 2]| {
        for ((pasid, number), moves) in SINGLES.into_iter().zip(moves) {
            leads(test, tagged(endpoint, pasid), page, number + page - 1 + 64 * moves);
        }
    };
    for page in 1..=4 {
        both(test, page, [0, 0]);
    }
    for ((_, number), table) in SINGLES.into_iter().zip(&tables) {
        let output = test.page(number + 64);
        table.remap(test.memory(), 0x1000, output, 0x4000);
    }
    if test.shows_stale() {
        both(test, 1, [0, 0]);
    }
    let invalidate = |test: &mut T, scope| {
        let all =
            Invalidation { endpoint, scope, caches: Caches::TLB, leaf: false, tag: None, global: false };
        test.host().invalidate(&[all]).expect("invalidated");
    };
    let pasid = Pasid::new(5);
    invalidate(test, Scope::Range { pasid, range: pages(2, 1), page_lg2: 12 });
    leads(test, tagged(endpoint, 5), 2, 16 + 1 + 64);
    if test.shows_stale() {
        both(test, 4, [0, 0]);
    }
    invalidate(test, Scope::Pasid(pasid));
    if test.shows_stale() {
        both(test, 1, [1, 0]);
    }
    invalidate(test, Scope::Endpoint);
    for page in 1..=4 {
        both(test, page, [1, 1]);
    }
}

/// An invalidation of the endpoint, or of one PASID, makes the guest's change visible; of that PASID at least.
pub fn stale_until_invalidated<T: HostUnderTest>(test: &mut T) {
    let Some(bound) = Handover::new(test) else { return };
    bound.all(test, 0);
    bound.remap(test, 1);
    for index in 0..bound.spaces.len() {
        bound.stale(test, index, 1);
    }
    bound.invalidate(test, Scope::Pasid(bound.main_pasid()), Caches::TLB);
    for page in 1..=4 {
        bound.moved(test, bound.main(), page, 1);
    }
    for index in bound.others() {
        if is_narrow(test) {
            bound.stale(test, index, 1);
        }
    }
    bound.invalidate(test, Scope::Pasid(None), Caches::TLB);
    bound.moved(test, 0, 4, 1);
    bound.invalidate(test, Scope::Endpoint, Caches::TLB);
    bound.all(test, 1);
}

/// Whether an invalidation without a tag drops no more than it names: hardware whose translations are tagged by ASID
/// alone has to drop all of them.
fn is_narrow<T: HostUnderTest>(test: &T) -> bool {
    can(test, &[Ability::NarrowUntagged])
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
        let batch = [part(2, bound.main_pasid()), part(3, bound.main_pasid()), part(4, None)];
        test.host().invalidate(&batch).expect("invalidated");
        bound.moved(test, bound.main(), 2, 1);
        bound.moved(test, bound.main(), 3, 1);
        bound.moved(test, 0, 4, 1);
        for index in 0..bound.spaces.len() {
            bound.stale(test, index, 1);
        }
        for index in bound.others() {
            if is_narrow(test) {
                bound.stale(test, index, 2);
            }
        }
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
    let (main, pasid) = (bound.main(), STREAMS[bound.main()].unwrap_or(0));
    let output = test.page(128);
    let other = PageTable::new(&bound.caps, 9, test.memory());
    other.map(test.memory(), 0x1000, output, 0x4000, Attrs::READ_WRITE);
    bound.table.set(test.memory(), pasid, &other);
    bound.stale(test, main, 1);
    bound.invalidate(test, Scope::Pasid(bound.main_pasid()), Caches::PASID);
    leads(test, bound.stream(main), 1, 128);
    // The same ASID, and so the same tag, for another table: nothing of the old one may serve it.
    let third = PageTable::new(&bound.caps, 9, test.memory());
    let output = test.page(160);
    third.map(test.memory(), 0x1000, output, 0x4000, Attrs::READ_WRITE);
    bound.table.set(test.memory(), pasid, &third);
    bound.invalidate(test, Scope::Pasid(bound.main_pasid()), Caches::PASID);
    leads(test, bound.stream(main), 1, 160);
    bound.table.clear(test.memory(), pasid);
    bound.invalidate(test, Scope::Endpoint, Caches::PASID);
    leads(test, bound.stream(main), 1, None);
    for index in bound.others() {
        bound.moved(test, index, 1, 0);
    }
}

/// An invalidation by tag reaches what has that tag at least (Arm).
pub fn invalidation_by_tag<T: HostUnderTest>(test: &mut T) {
    if !can(test, &[Ability::Tags]) {
        return;
    }
    let Some(bound) = Handover::new(test) else { return };
    bound.all(test, 0);
    bound.remap(test, 1);
    let tag = Some(bound.main() as u16 + 1);
    let invalidation = Invalidation { tag, ..bound.invalidation(Scope::Endpoint, Caches::TLB) };
    test.host().invalidate(&[invalidation]).expect("invalidated");
    for page in 1..=4 {
        bound.moved(test, bound.main(), page, 1);
    }
    for index in bound.others() {
        bound.stale(test, index, 1);
    }
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
    leads(test, untagged(endpoint), 1, target(0, 1, 1));
}

/// A fault in a guest's table is told with stream, address and kind.
pub fn faults_of_tables_are_told<T: HostUnderTest>(test: &mut T) {
    if !can(test, &[Ability::TableFaults]) {
        return;
    }
    let Some(bound) = Handover::new(test) else { return };
    for index in 0..bound.spaces.len() {
        let stream = bound.stream(index);
        for kind in [AccessKind::Read, AccessKind::Write] {
            if !expect_at(test, stream, 0x9008, kind, None) {
                continue;
            }
            let fault = test.told().expect("a fault that is told");
            assert_eq!((fault.stream, fault.kind, fault.privileged), (stream, kind, false));
            assert_eq!(fault.address, Some(Iova(0x9008)));
            assert!(matches!(fault.cause, FaultCause::Table(_)) && fault.cause.is_mapping(), "{fault:?}");
            assert!(test.told().is_none(), "one access, one fault");
        }
    }
}
