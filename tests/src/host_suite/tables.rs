//! Guest tables: what they serve, and what an invalidation drops. Each check is made with each [kind](kinds) of table.

use pgtable_formats::context::{Canonical, smmuv3, vtd};
use pgtable_formats::format::Attrs;
use pgtable_formats::{AccessKind, Gpa, Iova, Pasid};
use viommu_device::host::{
    FaultCause, Host, HostError, Invalidation, Scope, SpaceSpec, Stream, TableCaps, TableKinds,
};
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

/// The kinds of tables that the host takes: what is checked of one is checked of the other.
pub(super) fn kinds<T: HostUnderTest>(test: &T) -> Vec<TableKinds> {
    let mut kinds = Vec::new();
    kinds.extend(can(test, &[Ability::PasidTables]).then_some(TableKinds::PASID_TABLE));
    kinds.extend(can(test, &[Ability::PageTables]).then_some(TableKinds::PAGE_TABLE));
    kinds
}

/// Tables that are bound to an endpoint: untagged accesses, and PASIDs 5 and 7 where there are PASIDs, lead pages 1 to 4
/// to pages `16 * (index + 1)` and following. By one table of PASIDs, or by a page table for each stream.
pub(super) struct Handover<S> {
    pub(super) endpoint: EndpointId,
    pub(super) caps: TableCaps,
    way: Way<S>,
    pub(super) pages: Vec<PageTable>,
}

/// By what the page tables are bound.
enum Way<S> {
    /// A table of PASIDs, which leads to them.
    PasidTable(PasidTable, S),
    /// Themselves, in the order of the streams.
    PageTables(Vec<S>),
}

/// The PASIDs of [`Handover`], by index.
const STREAMS: [Option<u32>; 3] = [None, Some(5), Some(7)];

/// Where page `page` of the table of index `index` leads, after it has moved `moves` times.
fn target(index: usize, page: u64, moves: u64) -> u64 {
    16 * (index as u64 + 1) + (page - 1) + 64 * moves
}

impl<S> Handover<S> {
    /// Of the first endpoint.
    pub(super) fn new<T: HostUnderTest>(test: &mut T, kind: TableKinds) -> Self
    where
        T::Host: Host<Space = S>,
    {
        let [endpoint, _] = test.endpoints();
        Self::of(test, kind, endpoint)
    }

    pub(super) fn of<T: HostUnderTest>(test: &mut T, kind: TableKinds, endpoint: EndpointId) -> Self
    where
        T::Host: Host<Space = S>,
    {
        let caps = caps(test);
        let streams = if can(test, &[Ability::Pasids]) { STREAMS.len() } else { 1 };
        let pages = (0..streams).map(|index| {
            let output = test.page(target(index, 1, 0));
            let table = PageTable::new(&caps, index as u16 + 1, test.memory());
            table.map(test.memory(), 0x1000, output, 0x4000, Attrs::READ_WRITE);
            table
        });
        let pages: Vec<PageTable> = pages.collect();
        let way = if kind == TableKinds::PASID_TABLE {
            let table = PasidTable::new(&caps, if streams > 1 { 4 } else { 0 }, test.memory());
            for (pasid, pages) in STREAMS.into_iter().zip(&pages) {
                table.set(test.memory(), pasid.unwrap_or(0), pages);
            }
            let canonical = if test.ats() { with_ats(&table) } else { table.canonical() };
            let spec = SpaceSpec::GuestTable { endpoint, table: &canonical };
            Way::PasidTable(table, test.host().create(spec).expect("a space"))
        } else {
            Way::PageTables(pages.iter().map(|pages| single(test, endpoint, pages)).collect())
        };
        let mut handover = Self { endpoint, caps, way, pages };
        handover.bind(test);
        handover
    }

    /// Binds all of it, in place of what is bound.
    pub(super) fn bind<T: HostUnderTest>(&mut self, test: &mut T)
    where
        T::Host: Host<Space = S>,
    {
        let endpoint = self.endpoint;
        // As the device does: translations may outlive their table, and meet the new one's tags.
        match &mut self.way {
            Way::PasidTable(_, space) => {
                test.host().bind(untagged(endpoint), Some(space)).expect("bound");
                drop_all(test, endpoint, Scope::Endpoint);
            }
            Way::PageTables(spaces) => {
                for (pasid, space) in STREAMS.into_iter().zip(spaces) {
                    bind_single(test, endpoint, pasid, Some(space));
                }
            }
        }
    }

    /// Unbinds all of it.
    pub(super) fn unbind<T: HostUnderTest>(&mut self, test: &mut T) {
        match &self.way {
            Way::PasidTable(..) => test.host().bind(untagged(self.endpoint), None).expect("unbound"),
            Way::PageTables(spaces) => {
                for pasid in STREAMS.into_iter().take(spaces.len()) {
                    bind_single(test, self.endpoint, pasid, None);
                }
            }
        }
    }

    /// Makes room for tables of a kind: where it is the same, they take the place of these in one step.
    fn leave_for<T: HostUnderTest>(&mut self, test: &mut T, kind: TableKinds) {
        if self.kind() != kind {
            self.unbind(test);
        }
    }

    /// Gives back what is not bound.
    fn destroy<T: HostUnderTest>(self, test: &mut T)
    where
        T::Host: Host<Space = S>,
    {
        match self.way {
            Way::PasidTable(_, space) => test.host().destroy(space),
            Way::PageTables(spaces) => spaces.into_iter().for_each(|space| test.host().destroy(space)),
        }
    }

    /// Unbinds all of it, and gives it back.
    pub(super) fn end<T: HostUnderTest>(mut self, test: &mut T)
    where
        T::Host: Host<Space = S>,
    {
        self.unbind(test);
        self.destroy(test);
    }

    /// Gives a stream other pages, and sees to it that the old ones are not used any more.
    pub(super) fn replace<T: HostUnderTest>(&mut self, test: &mut T, index: usize, pages: &PageTable)
    where
        T::Host: Host<Space = S>,
    {
        let (endpoint, pasid) = (self.endpoint, STREAMS[index]);
        match &mut self.way {
            Way::PasidTable(table, _) => {
                table.set(test.memory(), pasid.unwrap_or(0), pages);
                self.invalidate(test, Scope::Pasid(pasid.and_then(Pasid::new)), Caches::PASID);
            }
            Way::PageTables(spaces) => {
                let mut space = single(test, endpoint, pages);
                bind_single(test, endpoint, pasid, Some(&mut space));
                test.host().destroy(std::mem::replace(&mut spaces[index], space));
            }
        }
    }

    /// Takes a stream's pages away; the table of PASIDs by an invalidation that is no narrower than `scope`.
    pub(super) fn clear<T: HostUnderTest>(&mut self, test: &mut T, index: usize, scope: Scope)
    where
        T::Host: Host<Space = S>,
    {
        let (endpoint, pasid) = (self.endpoint, STREAMS[index]);
        match &self.way {
            Way::PasidTable(table, _) => {
                table.clear(test.memory(), pasid.unwrap_or(0));
                self.invalidate(test, scope, Caches::PASID);
            }
            Way::PageTables(_) => bind_single::<T>(test, endpoint, pasid, None),
        }
    }

    pub(super) fn kind(&self) -> TableKinds {
        match self.way {
            Way::PasidTable(..) => TableKinds::PASID_TABLE,
            Way::PageTables(_) => TableKinds::PAGE_TABLE,
        }
    }

    pub(super) fn stream(&self, index: usize) -> Stream {
        Stream { endpoint: self.endpoint, pasid: STREAMS[index].and_then(Pasid::new) }
    }

    /// The one that is invalidated: a PASID, where there are some.
    pub(super) fn main(&self) -> usize {
        usize::from(self.pages.len() > 1)
    }

    pub(super) fn main_pasid(&self) -> Option<Pasid> {
        self.stream(self.main()).pasid
    }

    /// The others.
    pub(super) fn others(&self) -> impl Iterator<Item = usize> + use<S> {
        let main = self.main();
        (0..self.pages.len()).filter(move |&index| index != main)
    }

    /// That the endpoint sees a page of a table as having moved so often.
    fn moved<T: HostUnderTest>(&self, test: &mut T, index: usize, page: u64, moves: u64) {
        leads(test, self.stream(index), page, target(index, page, moves));
    }

    /// The guest maps everything 64 pages further and tells nobody.
    fn remap<T: HostUnderTest>(&self, test: &mut T, moves: u64) {
        for (index, pages) in self.pages.iter().enumerate() {
            let output = test.page(target(index, 1, moves));
            pages.remap(test.memory(), 0x1000, output, 0x4000);
        }
    }

    /// Everything has moved so often.
    fn all<T: HostUnderTest>(&self, test: &mut T, moves: u64) {
        for index in 0..self.pages.len() {
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

    /// Whether an invalidation without a tag drops no more than it names: of a table of PASIDs, hardware whose
    /// translations are tagged by ASID alone has to drop all of them. Of a page table the tag is known.
    fn is_narrow<T: HostUnderTest>(&self, test: &T) -> bool {
        self.kind() == TableKinds::PAGE_TABLE || can(test, &[Ability::NarrowUntagged])
    }

    fn invalidation(&self, scope: Scope, caches: Caches) -> Invalidation {
        Invalidation { endpoint: self.endpoint, scope, caches, leaf: false, tag: None, global: false }
    }

    pub(super) fn invalidate<T: HostUnderTest>(&self, test: &mut T, scope: Scope, caches: Caches) {
        let invalidation = self.invalidation(scope, caches);
        test.host().invalidate(&[invalidation]).expect("invalidated");
    }
}

/// A space of one page table.
fn single<T: HostUnderTest>(test: &mut T, endpoint: EndpointId, pages: &PageTable) -> Space<T> {
    let table = pages.canonical().expect("a table for one PASID");
    test.host().create(SpaceSpec::GuestTable { endpoint, table: &table }).expect("a space")
}

fn bind_single<T: HostUnderTest>(
    test: &mut T,
    endpoint: EndpointId,
    pasid: Option<u32>,
    space: Option<&mut Space<T>>,
) {
    let stream = Stream { endpoint, pasid: pasid.and_then(Pasid::new) };
    let is_bound = space.is_some();
    test.host().bind(stream, space).expect("bound");
    if is_bound {
        drop_all(test, endpoint, Scope::Pasid(stream.pasid));
    }
}

/// What the device sends when it has bound something.
fn drop_all<T: HostUnderTest>(test: &mut T, endpoint: EndpointId, scope: Scope) {
    let caches = Caches::all();
    let all = Invalidation { endpoint, scope, caches, leaf: false, tag: None, global: true };
    test.host().invalidate(&[all]).expect("invalidated");
}

/// The same with EATS = 1.
fn with_ats(table: &PasidTable) -> Canonical {
    let Canonical::Smmuv3(table) = table.canonical() else { return table.canonical() };
    let [word0, word1] = table.words();
    let table = smmuv3::CdTable::from_ste(word0, word1 | 1 << 28, table.caps());
    Canonical::Smmuv3(table.expect("the same table"))
}

/// Tables serve untagged accesses and each PASID by a page table of its own.
pub fn tables_serve_pasids<T: HostUnderTest>(test: &mut T) {
    for kind in kinds(test) {
        let mut bound = Handover::new(test, kind);
        bound.all(test, 0);
        leads(test, tagged(bound.endpoint, 6), 1, None);
        leads(test, untagged(bound.endpoint), 5, None);
        bound.clear(test, bound.main(), Scope::Pasid(bound.main_pasid()));
        leads(test, bound.stream(bound.main()), 1, None);
        for index in bound.others() {
            bound.moved(test, index, 1, 0);
        }
        let endpoint = bound.endpoint;
        bound.end(test);
        for pasid in [5, 7] {
            leads(test, tagged(endpoint, pasid), 1, None);
        }
        leads(test, untagged(endpoint), 1, None);
    }
}

/// An invalidation of the endpoint, or of one PASID, makes the guest's change visible; of that PASID at least.
pub fn stale_until_invalidated<T: HostUnderTest>(test: &mut T) {
    for kind in kinds(test) {
        let bound = Handover::new(test, kind);
        bound.all(test, 0);
        bound.remap(test, 1);
        for index in 0..bound.pages.len() {
            bound.stale(test, index, 1);
        }
        bound.invalidate(test, Scope::Pasid(bound.main_pasid()), Caches::TLB);
        for page in 1..=4 {
            bound.moved(test, bound.main(), page, 1);
        }
        for index in bound.others() {
            if bound.is_narrow(test) {
                bound.stale(test, index, 1);
            }
        }
        bound.invalidate(test, Scope::Pasid(None), Caches::TLB);
        bound.moved(test, 0, 4, 1);
        bound.invalidate(test, Scope::Endpoint, Caches::TLB);
        bound.all(test, 1);
        bound.end(test);
    }
}

/// An invalidation of a range makes the change visible in that range at least; a batch is done in order.
pub fn invalidation_by_range<T: HostUnderTest>(test: &mut T) {
    for (kind, leaf) in kinds(test).into_iter().flat_map(|kind| [(kind, false), (kind, true)]) {
        let bound = Handover::new(test, kind);
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
        for index in 0..bound.pages.len() {
            bound.stale(test, index, 1);
        }
        for index in bound.others() {
            if bound.is_narrow(test) {
                bound.stale(test, index, 2);
            }
        }
        bound.end(test);
    }
}

/// Another page table for a PASID, or none, is seen once it was bound, or once the PASID cache was dropped; and what was
/// translated through the old one is gone with it.
pub fn invalidation_of_contexts<T: HostUnderTest>(test: &mut T) {
    for kind in kinds(test) {
        let mut bound = Handover::new(test, kind);
        bound.all(test, 0);
        let main = bound.main();
        // The same ASID twice, and so the same tag, for another table: nothing of the old one may serve it.
        for page in [128, 160] {
            let output = test.page(page);
            let other = PageTable::new(&bound.caps, 9, test.memory());
            other.map(test.memory(), 0x1000, output, 0x4000, Attrs::READ_WRITE);
            bound.replace(test, main, &other);
            leads(test, bound.stream(main), 1, page);
        }
        bound.clear(test, main, Scope::Endpoint);
        leads(test, bound.stream(main), 1, None);
        for index in bound.others() {
            bound.moved(test, index, 1, 0);
        }
        bound.end(test);
    }
}

/// A changed entry of a PASID table is not seen before the PASID cache was dropped.
pub fn contexts_are_stale_until_invalidated<T: HostUnderTest>(test: &mut T) {
    if !can(test, &[Ability::PasidTables]) || !test.shows_stale() {
        return;
    }
    let bound = Handover::new(test, TableKinds::PASID_TABLE);
    bound.all(test, 0);
    let (main, pasid) = (bound.main(), STREAMS[bound.main()].unwrap_or(0));
    let Way::PasidTable(table, _) = &bound.way else { panic!("a table of PASIDs") };
    table.set(test.memory(), pasid, &bound.pages[0]);
    bound.moved(test, main, 1, 0);
    bound.invalidate(test, Scope::Pasid(bound.main_pasid()), Caches::PASID);
    leads(test, bound.stream(main), 1, target(0, 1, 0));
    bound.end(test);
}

/// An invalidation by tag reaches what has that tag at least (Arm).
pub fn invalidation_by_tag<T: HostUnderTest>(test: &mut T) {
    if !can(test, &[Ability::Tags]) {
        return;
    }
    for kind in kinds(test) {
        let bound = Handover::new(test, kind);
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
        bound.end(test);
    }
}

/// What was cached of one table does not serve the next that is bound, of whatever kind.
pub fn rebinding_starts_clean<T: HostUnderTest>(test: &mut T) {
    let kinds = kinds(test);
    for (&before, &after) in kinds.iter().flat_map(|before| kinds.iter().map(move |after| (before, after))) {
        let mut first = Handover::new(test, before);
        first.all(test, 0);
        first.remap(test, 1);
        first.leave_for(test, after);
        let mut second = Handover::new(test, after);
        second.all(test, 0);
        second.leave_for(test, before);
        first.bind(test);
        first.all(test, 1);
        // What was said of the other table is no matter of this one.
        first.invalidate(test, Scope::Endpoint, Caches::all());
        leads(test, untagged(first.endpoint), 1, target(0, 1, 1));
        first.end(test);
        second.destroy(test);
    }
}

/// A fault in a guest's table is told with stream, address and kind.
pub fn faults_of_tables_are_told<T: HostUnderTest>(test: &mut T) {
    if !can(test, &[Ability::TableFaults]) {
        return;
    }
    for kind in kinds(test) {
        let bound = Handover::new(test, kind);
        for index in 0..bound.pages.len() {
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
        bound.end(test);
    }
}
