//! INVALIDATE.

use pgtable_formats::Access;
use pgtable_formats::format::Attrs;
use viommu_device::host::{HostError, Invalidation, Scope, Stream, TableCaps};
use viommu_tests::rig::{Bare, Call, Flaky, Memory, Rig, Sends, Setup, request, smmuv3, vtd};
use viommu_tests::tables::{PageTable, PasidTable};
use viommu_wire::{
    Caches, DomainId, EndpointId, Invalidate, InvalidateScope, Iova, IovaRange, Pasid, Request, Status,
};

fn request_of(domain: u32, scope: InvalidateScope, caches: Caches) -> Invalidate {
    Invalidate { domain: DomainId(domain), scope, caches, leaf: false, tag: None, global: false }
}

fn invalidate(domain: u32, scope: InvalidateScope, caches: Caches) -> Request {
    Request::Invalidate(request_of(domain, scope, caches))
}

fn pages(pasid: Option<u32>, start: u64, last: u64) -> InvalidateScope {
    let range = IovaRange::new(Iova(start), Iova(last)).unwrap();
    InvalidateScope::Address { pasid: pasid.map(request::pasid), range, page_lg2: 12 }
}

fn pasid(pasid: Option<u32>) -> InvalidateScope {
    InvalidateScope::Pasid(pasid.map(request::pasid))
}

/// Domain 1 with one endpoint; PASIDs 0, 5 and 7 have page tables of their own in which pages 1 to 4 lead to pages
/// `16 * (pasid + 1)` and following.
struct Bound {
    rig: Rig,
    endpoint: u32,
    caps: TableCaps,
    table: PasidTable,
    spaces: Vec<(u32, PageTable)>,
}

impl Bound {
    fn new(caps: TableCaps, endpoint: u32) -> Self {
        let mut rig = Rig::new(Setup::default());
        let table = PasidTable::new(&caps, 4, rig.alloc());
        let mut spaces = Vec::new();
        for number in [0, 5, 7] {
            let space = PageTable::new(&caps, number as u16 + 1, rig.alloc());
            space.map(rig.alloc(), 0x1000, Self::page(number, 0), 0x4000, Attrs::READ_WRITE);
            table.set(rig.alloc(), number, &space);
            spaces.push((number, space));
        }
        assert_eq!(rig.send(&request::attach_table(1, endpoint, table.descriptor())), Status::Ok);
        let bound = Self { rig, endpoint, caps, table, spaces };
        bound.all(0);
        bound
    }

    fn both() -> [Self; 2] {
        [Self::new(smmuv3(), 8), Self::new(vtd(), 16)]
    }

    /// Where IOVA 0x1000 of a PASID leads, after `moves` moves.
    fn page(pasid: u32, moves: u64) -> u64 {
        Memory::page(16 * (u64::from(pasid) + 1) + 256 * moves).0
    }

    /// The guest maps everything elsewhere and tells nobody.
    fn remap(&mut self, moves: u64) {
        for (pasid, space) in &self.spaces {
            space.remap(self.rig.alloc(), 0x1000, Self::page(*pasid, moves), 0x4000);
        }
    }

    /// How often page `page` of a PASID has moved, as the endpoint sees it.
    fn seen(&self, pasid: Option<u32>, page: u64) -> u64 {
        let at = self
            .rig
            .machine
            .peek(self.endpoint, pasid, page << 12, pgtable_formats::AccessKind::Read)
            .unwrap();
        let first = Self::page(pasid.unwrap_or(0), 0) + ((page - 1) << 12);
        (at - first) >> 20
    }

    /// Everything has moved so often, as the endpoint sees it; and is cached so.
    fn all(&self, moves: u64) {
        for pasid in self.pasids() {
            for page in 1..=4 {
                assert_eq!(self.seen(pasid, page), moves, "{pasid:?} page {page}");
            }
        }
    }

    /// An SMMUv3 whose untagged DMA uses descriptor 0 aborts what is tagged with 0 (IHI 0070, S1DSS).
    fn pasids(&self) -> Vec<Option<u32>> {
        match self.caps {
            TableCaps::Smmuv3(_) => vec![None, Some(5), Some(7)],
            TableCaps::Vtd(_) => vec![None, Some(0), Some(5), Some(7)],
        }
    }

    fn invalidate(&mut self, scope: InvalidateScope, caches: Caches) {
        assert_eq!(self.rig.send(&invalidate(1, scope, caches)), Status::Ok);
    }
}

#[test]
fn x16_invalidate_of_an_unknown_domain_is_noent() {
    let mut bound = Bound::new(smmuv3(), 8);
    for domain in [0, 2, u32::MAX] {
        for scope in [InvalidateScope::Domain, pasid(None), pages(Some(5), 0, 0xfff)] {
            bound.rig.refuse(&invalidate(domain, scope, Caches::all()).encode(), Status::NoEnt);
        }
    }
}

#[test]
fn x17_invalidate_of_a_domain_without_tables_is_inval() {
    let mut bound = Bound::new(smmuv3(), 8);
    assert_eq!(bound.rig.send(&request::attach(2, 9)), Status::Ok);
    assert_eq!(bound.rig.send(&request::map(2, 0x1000, 0x1fff, 0x5000)), Status::Ok);
    assert_eq!(bound.rig.send(&request::attach_bypass(3, 16)), Status::Ok);
    for domain in [2, 3] {
        for scope in [InvalidateScope::Domain, pasid(Some(1)), pages(None, 0, 0xfff)] {
            bound.rig.refuse(&invalidate(domain, scope, Caches::TLB).encode(), Status::Inval);
        }
    }
}

#[test]
fn x18_selectors_without_meaning_are_inval() {
    let mut bound = Bound::new(smmuv3(), 8);
    let good = invalidate(1, InvalidateScope::Domain, Caches::all()).encode().to_vec();
    let rig = &mut bound.rig;
    let mut check = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        assert_eq!(rig.send_bytes(&bytes), Status::Inval, "byte {at} {value:#x}");
    };
    for scope in (0..=u8::MAX).filter(|scope| !(1..=3).contains(scope)) {
        check(4, scope);
    }
    for caches in (0..=u8::MAX).filter(|caches| !(1..=3).contains(caches)) {
        check(5, caches);
    }
    for flag in 4..8 {
        check(6, 1 << flag);
    }
    for flag in 0..8 {
        check(7, 1 << flag);
    }
    for at in 41..60 {
        check(at, 1);
    }
    // A PASID of more than 20 bits.
    let mut bytes = invalidate(1, pasid(Some(5)), Caches::all()).encode().to_vec();
    bytes[12..16].copy_from_slice(&(1u32 << 20).to_le_bytes());
    bound.rig.refuse(&bytes, Status::Inval);
    // Before the domain is looked for.
    let mut bytes = good.clone();
    (bytes[4], bytes[8]) = (9, 9);
    bound.rig.refuse(&bytes, Status::Inval);
    assert_eq!(bound.rig.send_bytes(&good), Status::Ok);
}

#[test]
fn x19_address_ranges_without_meaning_are_inval() {
    let mut bound = Bound::new(smmuv3(), 8);
    let good = invalidate(1, pages(Some(5), 0x1000, 0x1fff), Caches::TLB).encode().to_vec();
    let with = |address: u64, count: u64, page_lg2: u8| {
        let mut bytes = good.clone();
        bytes[24..32].copy_from_slice(&address.to_le_bytes());
        bytes[32..40].copy_from_slice(&count.to_le_bytes());
        bytes[40] = page_lg2;
        bytes
    };
    for (address, count, page_lg2) in [
        (0x1000, 0, 12),
        (0x1000, 1, 64),
        (0x1000, 1, 255),
        (0x1000, u64::MAX, 12),
        (0xffff_ffff_ffff_f000, 2, 12),
        (0x1000, 1 << 52, 12),
        (0x1000, 2, 63),
        (u64::MAX, 2, 0),
    ] {
        bound.rig.refuse(&with(address, count, page_lg2), Status::Inval);
    }
    for (address, count, page_lg2) in
        [(0, 1 << 52, 12), (0, 2, 63), (0xffff_ffff_ffff_f000, 1, 12), (0x1234, 1, 12)]
    {
        assert_eq!(bound.rig.send_bytes(&with(address, count, page_lg2)), Status::Ok);
    }
}

#[test]
fn x20_stale_translations_last_until_they_are_invalidated() {
    for mut bound in Bound::both() {
        bound.remap(1);
        bound.all(0);
        bound.invalidate(InvalidateScope::Domain, Caches::TLB);
        bound.all(1);
    }
}

#[test]
fn x20_scope_domain_reaches_every_endpoint_and_pasid() {
    for caches in [Caches::PASID, Caches::TLB, Caches::all()] {
        for mut bound in Bound::both() {
            let other = bound.endpoint + 1;
            let again = request::attach_table(1, other, bound.table.descriptor());
            assert_eq!(bound.rig.send(&again), Status::Ok);
            let endpoint = bound.endpoint;
            for moves in 1..3 {
                for endpoint in [endpoint, other] {
                    bound.endpoint = endpoint;
                    bound.all(moves - 1);
                }
                bound.remap(moves);
                bound.invalidate(InvalidateScope::Domain, caches);
                for endpoint in [endpoint, other] {
                    bound.endpoint = endpoint;
                    bound.all(moves);
                }
            }
        }
    }
}

#[test]
fn x20_scope_pasid_reaches_its_pasid() {
    for caches in [Caches::PASID, Caches::TLB, Caches::all()] {
        for mut bound in Bound::both() {
            bound.remap(1);
            bound.invalidate(pasid(Some(5)), caches);
            for page in 1..=4 {
                assert_eq!(bound.seen(Some(5), page), 1);
            }
            // Others may be dropped as well; this host is exact.
            assert_eq!((bound.seen(Some(7), 1), bound.seen(None, 1)), (0, 0));
            bound.invalidate(pasid(None), caches);
            assert_eq!((bound.seen(Some(7), 1), bound.seen(None, 1)), (0, 1));
            bound.invalidate(pasid(Some(7)), caches);
            bound.all(1);
        }
    }
}

#[test]
fn x20_scope_address_reaches_its_pages() {
    for leaf in [false, true] {
        for mut bound in Bound::both() {
            bound.remap(1);
            let request = request_of(1, pages(Some(5), 0x2000, 0x3fff), Caches::TLB);
            assert_eq!(bound.rig.send(&Request::Invalidate(Invalidate { leaf, ..request })), Status::Ok);
            let seen: Vec<u64> = (1..=4).map(|page| bound.seen(Some(5), page)).collect();
            assert_eq!(seen, [0, 1, 1, 0]);
            assert_eq!(bound.seen(Some(7), 2), 0);
            bound.invalidate(pages(Some(5), 0, u64::MAX >> 16), Caches::TLB);
            let seen: Vec<u64> = (1..=4).map(|page| bound.seen(Some(5), page)).collect();
            assert_eq!(seen, [1; 4]);
        }
    }
}

#[test]
fn x20_an_address_of_a_larger_page_reaches_all_of_it() {
    for (caps, endpoint) in [(smmuv3(), 8), (vtd(), 16)] {
        let mut rig = Rig::new(Setup::default());
        let table = PasidTable::new(&caps, 4, rig.alloc());
        let space = PageTable::new(&caps, 1, rig.alloc());
        space.map(rig.alloc(), 1 << 21, 1 << 21, 1 << 21, Attrs::READ);
        table.set(rig.alloc(), 0, &space);
        assert_eq!(rig.send(&request::attach_table(1, endpoint, table.descriptor())), Status::Ok);
        let (first, last) = (1 << 21, (2 << 21) - 0x1000);
        assert_eq!(
            (rig.machine.read(endpoint, first), rig.machine.read(endpoint, last)),
            (Some(first), Some(last))
        );
        space.unmap(rig.alloc(), 1 << 21, 1 << 21);
        let middle = first + 0x10_0000;
        assert_eq!(rig.send(&invalidate(1, pages(None, middle, middle + 0xfff), Caches::TLB)), Status::Ok);
        assert_eq!((rig.machine.read(endpoint, first), rig.machine.read(endpoint, last)), (None, None));
    }
}

#[test]
fn x20_a_tag_reaches_every_pasid_that_has_it() {
    let mut bound = Bound::new(smmuv3(), 8);
    // PASID 7 takes the space of PASID 5: one ASID, two PASIDs.
    let space = bound.spaces[1].1;
    bound.table.set(bound.rig.alloc(), 7, &space);
    bound.invalidate(pasid(Some(7)), Caches::all());
    let leads = |bound: &Bound, pasid| bound.rig.machine.read_with(8, pasid, 0x1000);
    assert_eq!((leads(&bound, 5), leads(&bound, 7)), (Some(Bound::page(5, 0)), Some(Bound::page(5, 0))));
    bound.remap(1);
    let request = request_of(1, InvalidateScope::Domain, Caches::TLB);
    assert_eq!(bound.rig.send(&Request::Invalidate(Invalidate { tag: Some(6), ..request })), Status::Ok);
    assert_eq!((leads(&bound, 5), leads(&bound, 7)), (Some(Bound::page(5, 1)), Some(Bound::page(5, 1))));
    assert_eq!(bound.seen(None, 1), 0, "another tag");
    // A tag that no architecture has narrows nothing.
    let wide = Invalidate { tag: Some(1 << 16), ..request };
    assert_eq!(bound.rig.send(&Request::Invalidate(wide)), Status::Ok);
    assert_eq!(bound.seen(None, 1), 1);
}

#[test]
fn x20_a_changed_entry_is_used_after_its_pasid_cache_was_dropped() {
    for mut bound in Bound::both() {
        let space = PageTable::new(&bound.caps, 99, bound.rig.alloc());
        space.map(bound.rig.alloc(), 0x1000, Bound::page(5, 3), 0x4000, Attrs::READ);
        bound.table.set(bound.rig.alloc(), 5, &space);
        assert_eq!(bound.seen(Some(5), 1), 0, "the entry is cached");
        // A page of the entry as well: PASID implies the TLB.
        bound.invalidate(pasid(Some(5)), Caches::PASID);
        assert_eq!(bound.seen(Some(5), 1), 3);
        bound.table.clear(bound.rig.alloc(), 5);
        assert_eq!(bound.seen(Some(5), 1), 3);
        bound.invalidate(InvalidateScope::Domain, Caches::PASID);
        assert_eq!(bound.rig.machine.read_with(bound.endpoint, 5, 0x1000), None);
    }
}

#[test]
fn x20_pasids_that_nothing_is_bound_for_are_no_error() {
    for mut bound in Bound::both() {
        bound.invalidate(pasid(Some(11)), Caches::all());
        bound.invalidate(pages(Some(0xf_ffff), 0, 0xfff), Caches::TLB);
        bound.all(0);
    }
}

#[test]
fn x20_single_page_tables_are_invalidated_by_their_pasid() {
    let mut rig = Rig::new(Setup::default());
    let mut spaces = Vec::new();
    for number in [0, 5] {
        let space = PageTable::new(&vtd(), 0, rig.alloc());
        space.map(rig.alloc(), 0x1000, Bound::page(number, 0), 0x1000, Attrs::READ);
        assert_eq!(rig.send(&request::attach_table(1, 16, space.descriptor(number).unwrap())), Status::Ok);
        spaces.push(space);
    }
    let leads = |rig: &Rig| {
        [None, Some(0), Some(5)].map(|pasid| {
            rig.machine.peek(16, pasid, 0x1000, pgtable_formats::AccessKind::Read).unwrap()
                - Bound::page(pasid.unwrap_or(0), 0)
        })
    };
    assert_eq!(leads(&rig), [0; 3]);
    for (number, space) in [0, 5].into_iter().zip(&spaces) {
        space.remap(rig.alloc(), 0x1000, Bound::page(number, 1), 0x1000);
    }
    assert_eq!(leads(&rig), [0; 3]);
    assert_eq!(rig.send(&invalidate(1, pages(None, 0x1000, 0x1fff), Caches::TLB)), Status::Ok);
    assert_eq!(leads(&rig), [1 << 20, 1 << 20, 0], "untagged DMA and PASID 0 share a table");
    assert_eq!(rig.send(&invalidate(1, pasid(Some(5)), Caches::TLB)), Status::Ok);
    assert_eq!(leads(&rig), [1 << 20; 3]);
}

#[test]
fn x20_a_host_that_tells_pasid_0_from_untagged_dma_is_told_of_both() {
    let setup = Setup::default();
    let (host, _) = Flaky::new(&setup);
    let mut bare = Bare::over(setup.config, None, host);
    let table = request::vtd_page_table(Memory::page(9), 0);
    assert_eq!(bare.send(&request::attach_table(1, 16, table)), Status::Ok);
    for asked in [None, Some(0)] {
        bare.device.host_mut().invalidations.clear();
        assert_eq!(bare.send(&invalidate(1, pasid(asked), Caches::TLB)), Status::Ok);
        let scopes = bare.device.host().invalidations.concat();
        for pasid in [None, Some(Pasid::ZERO)] {
            assert!(scopes.iter().any(|one| one.scope == Scope::Pasid(pasid)), "{asked:?}: {scopes:?}");
        }
    }
}

#[test]
fn x20_what_the_host_cannot_do_exactly_is_done_wider() {
    let setup = Setup::default();
    let (host, memory) = Flaky::new(&setup);
    let mut alloc = viommu_tests::rig::Alloc::new(&memory);
    let mut bare = Bare::over(setup.config, None, host);
    let table = PasidTable::new(&smmuv3(), 4, &mut alloc);
    let space = PageTable::new(&smmuv3(), 1, &mut alloc);
    space.map(&mut alloc, 0x1000, 0x5000, 0x1000, Attrs::READ);
    table.set(&mut alloc, 5, &space);
    assert_eq!(bare.send(&request::attach_table(1, 8, table.descriptor())), Status::Ok);
    let leads = |bare: &mut Bare<Flaky>| {
        let stream = Stream { endpoint: EndpointId(8), pasid: Pasid::new(5) };
        bare.device.host_mut().inner.peek(stream, Iova(0x1000), Access::READ).map(|piece| piece.output.0)
    };
    assert_eq!(leads(&mut bare), Ok(0x5000));
    space.unmap(&mut alloc, 0x1000, 0x1000);
    bare.device.host_mut().invalidations.clear();
    bare.device.host_mut().script = [(Call::Invalidate, Some(HostError::Unsupported))].into();
    assert_eq!(bare.send(&invalidate(1, pages(Some(5), 0x1000, 0x1fff), Caches::TLB)), Status::Ok);
    assert!(leads(&mut bare).is_err());
    let asked = &bare.device.host().invalidations;
    assert!(matches!(asked[0][..], [Invalidation { scope: Scope::Range { .. }, .. }]), "{asked:?}");
    assert!(
        matches!(asked[1][..], [Invalidation { scope: Scope::Endpoint, leaf: false, tag: None, .. }]),
        "{asked:?}"
    );

    // Where that fails too, nothing is claimed.
    let fails = (Call::Invalidate, Some(HostError::Failed(5)));
    bare.device.host_mut().script = [fails, fails].into();
    assert_eq!(bare.send(&invalidate(1, pages(Some(5), 0x1000, 0x1fff), Caches::TLB)), Status::DevErr);
    assert_eq!(bare.send(&invalidate(1, InvalidateScope::Domain, Caches::all())), Status::Ok);
}
