//! What stays in use until it is invalidated, and what each invalidation reaches.

use pgtable_formats::context::Stage1;
use pgtable_formats::leaf::Vmsav8;
use pgtable_formats::walk::Step;
use pgtable_formats::{Perms, Translation};

use super::super::TLB_ENTRIES;
use super::super::contexts::Tables;
use super::super::tlb::Tlb;
use super::super::walk_cache::WalkCache;
use super::*;

/// Pages of one process: own, a neighbour in another last-level table, and a global one.
const OWN: u64 = 0x40_0000;
const FAR: u64 = 0x80_0000;
const GLOBAL: u64 = 0x40_5000;
const ALL_PAGES: [u64; 3] = [OWN, FAR, GLOBAL];

const OLD: u64 = 0x1_0000_0000;
const NEW: u64 = 0x2_0000_0000;

const GLOBAL_ATTRS: Attrs = Attrs { global: true, ..Attrs::READ_WRITE };

fn attrs(page: u64) -> Attrs {
    if page == GLOBAL { GLOBAL_ATTRS } else { Attrs::READ_WRITE }
}

/// PASIDs 1 and 3 share page table and ASID 11; PASID 2 has its own, and ASID 12. All pages have been used and lead
/// elsewhere by now.
fn stale_world(arch: Arch) -> World {
    let mut world = World::new(arch);
    let shared = world.page_table();
    let own = world.page_table();
    for table in [shared, own] {
        for page in ALL_PAGES {
            world.map(table, page, 0x1000, OLD + page, attrs(page));
        }
    }
    for (pasid, asid, table) in [(1, 11, shared), (2, 12, own), (3, 11, shared)] {
        world.set_context(pasid, asid, table);
    }
    for pasid in [1, 2, 3] {
        for page in ALL_PAGES {
            assert_eq!(world.read(pasid, page), Ok(OLD + page));
        }
    }
    for table in [shared, own] {
        for page in ALL_PAGES {
            world.remap(table, page, 0x1000, NEW + page, attrs(page));
        }
    }
    world
}

/// Which (PASID, page) are translated anew.
fn fresh(world: &mut World) -> Vec<(u32, u64)> {
    let mut fresh = Vec::new();
    for pasid in [1, 2, 3] {
        for page in ALL_PAGES {
            match world.read(pasid, page) {
                Ok(output) if output == NEW + page => fresh.push((pasid, page)),
                other => assert_eq!(other, Ok(OLD + page), "PASID {pasid} page {page:#x}"),
            }
        }
    }
    fresh
}

fn all_but(kept: &[(u32, u64)]) -> Vec<(u32, u64)> {
    let all = [1, 2, 3].into_iter().flat_map(|pasid| ALL_PAGES.map(|page| (pasid, page)));
    all.filter(|one| !kept.contains(one)).collect()
}

#[test]
fn nothing_is_dropped_without_an_invalidation() {
    for arch in [Arch::Arm, Arch::Vtd] {
        assert_eq!(fresh(&mut stale_world(arch)), []);
    }
}

#[test]
fn invalidation_drops_what_it_names_and_no_more() {
    let one = Scope::Pasid(Pasid::new(1));
    let globals = [(1, GLOBAL), (2, GLOBAL), (3, GLOBAL)];
    let common: Vec<(Invalidation, Vec<(u32, u64)>)> = vec![
        (tlb(Scope::Endpoint), all_but(&[])),
        (tlb(one), vec![(1, OWN), (1, FAR)]),
        (
            Invalidation { global: true, ..tlb(one) },
            vec![(1, OWN), (1, FAR), (1, GLOBAL), (2, GLOBAL), (3, GLOBAL)],
        ),
        (tlb(pages(1, OWN, 0x1000)), vec![(1, OWN)]),
        (tlb(pages(1, OWN + 0x1000, 0x1000)), vec![]),
        (tlb(pages(1, GLOBAL, 0x1000)), globals.to_vec()),
        (tlb(pages(1, OWN, 0x10_0000)), vec![(1, OWN), (1, GLOBAL), (2, GLOBAL), (3, GLOBAL)]),
        (tlb(pages(1, 0, 1 << 47)), vec![(1, OWN), (1, FAR), (1, GLOBAL), (2, GLOBAL), (3, GLOBAL)]),
        // Dropping a context drops what was translated through it.
        (Invalidation { caches: Caches::PASID, ..tlb(Scope::Endpoint) }, all_but(&[])),
        (Invalidation { caches: Caches::PASID, ..tlb(one) }, vec![(1, OWN), (1, FAR), (1, GLOBAL)]),
        (
            Invalidation { caches: Caches::PASID, ..tlb(pages(1, OWN, 0x1000)) },
            vec![(1, OWN), (1, FAR), (1, GLOBAL)],
        ),
        // Both at once drop no less than each.
        (
            Invalidation { caches: Caches::all(), ..tlb(pages(1, GLOBAL, 0x1000)) },
            vec![(1, OWN), (1, FAR), (1, GLOBAL), (2, GLOBAL), (3, GLOBAL)],
        ),
        // Nothing of another endpoint or of a PASID without translations.
        (Invalidation { endpoint: OTHER, caches: Caches::all(), ..tlb(Scope::Endpoint) }, vec![]),
        (tlb(Scope::Pasid(Pasid::new(4))), vec![]),
        (tlb(Scope::Pasid(None)), vec![]),
    ];
    for arch in [Arch::Arm, Arch::Vtd] {
        for (invalidation, expected) in &common {
            for leaf in [false, true] {
                let mut world = stale_world(arch);
                world.invalidate(Invalidation { leaf, ..*invalidation });
                assert_eq!(fresh(&mut world), *expected, "{arch:?} {invalidation:?}");
            }
        }
    }
}

#[test]
fn tag_selects_an_asid_on_arm_whatever_the_pasid() {
    let of_asid = vec![(1, OWN), (1, FAR), (3, OWN), (3, FAR)];
    let and_globals = all_but(&[(2, OWN), (2, FAR)]);
    let cases = [
        (tlb(Scope::Endpoint), of_asid.clone()),
        (Invalidation { global: true, ..tlb(Scope::Endpoint) }, and_globals.clone()),
        (tlb(Scope::Pasid(Pasid::new(1))), of_asid.clone()),
        (tlb(Scope::Pasid(None)), of_asid),
        (Invalidation { global: true, ..tlb(Scope::Pasid(None)) }, and_globals),
        (tlb(pages(2, OWN, 0x1000)), vec![(1, OWN), (3, OWN)]),
        (tlb(pages(1, GLOBAL, 0x1000)), vec![(1, GLOBAL), (2, GLOBAL), (3, GLOBAL)]),
        // A dropped context takes all of its PASID's along, whatever ASID is named, and global ones of both.
        (Invalidation { caches: Caches::PASID, ..tlb(Scope::Pasid(Pasid::new(2))) }, all_but(&[])),
    ];
    for (invalidation, expected) in cases {
        let mut world = stale_world(Arch::Arm);
        let invalidation = Invalidation { tag: Some(11), ..invalidation };
        world.invalidate(invalidation);
        assert_eq!(fresh(&mut world), expected, "{invalidation:?}");
    }
    let mut world = stale_world(Arch::Arm);
    world.invalidate(Invalidation { tag: Some(99), ..tlb(Scope::Endpoint) });
    assert_eq!(fresh(&mut world), []);
}

#[test]
fn tag_has_no_meaning_on_vtd() {
    let mut world = stale_world(Arch::Vtd);
    world.invalidate(Invalidation { tag: Some(11), ..tlb(pages(2, OWN, 0x1000)) });
    assert_eq!(fresh(&mut world), [(2, OWN)]);
    world.invalidate(Invalidation { tag: Some(99), ..tlb(Scope::Endpoint) });
    assert_eq!(fresh(&mut world), all_but(&[]));
}

#[test]
fn strict_mode_reads_everything_anew() {
    for arch in [Arch::Arm, Arch::Vtd] {
        let mut world = stale_world(arch);
        world.host.set_strict(true);
        assert!(world.host.is_strict());
        assert_eq!(fresh(&mut world), all_but(&[]));
        // Nothing from before comes back.
        world.host.set_strict(false);
        assert_eq!(fresh(&mut world), all_but(&[]));
    }
}

#[test]
fn a_cached_table_that_is_gone_makes_no_access_fault() {
    for arch in [Arch::Arm, Arch::Vtd] {
        let mut world = World::new(arch);
        let table = world.page_table();
        world.map(table, OWN, 0x2000, OLD + OWN, Attrs::READ_WRITE);
        world.set_context(1, 11, table);
        assert_eq!(world.read(1, OWN), Ok(OLD + OWN));
        // The tables are given back and become somebody else's empty pages; others take their place.
        assert!(table.unmap(&mut world.memory, range(OWN, 0x2000), false));
        for _ in 0..3 {
            world.memory.alloc(12).unwrap();
        }
        world.map(table, OWN, 0x2000, NEW + OWN, Attrs::READ_WRITE);
        assert_eq!(world.read(1, OWN), Ok(OLD + OWN), "the translation is kept");
        assert_eq!(world.read(1, OWN + 0x1000), Ok(NEW + OWN + 0x1000), "a walk from the root decides");
    }
}

/// PASIDs 1 and 2 use one page table with ASIDs of their own; pages at [`OWN`] lead to [`OLD`]. What comes back makes
/// them lead to [`NEW`] by an entry of the root.
fn world_with_two_roots(arch: Arch, attrs: Attrs) -> (World, impl Fn(&mut World)) {
    let mut world = World::new(arch);
    let (old, new) = (world.page_table(), world.page_table());
    for (table, output) in [(old, OLD), (new, NEW)] {
        world.map(table, OWN, 0x3000, output, attrs);
    }
    for (pasid, asid) in [(1, 11), (2, 12)] {
        world.set_context(pasid, asid, old);
    }
    let [old, new] = [old, new].map(|table| match table {
        PageTable::Arm { root } => root,
        PageTable::Vtd(table) => table.root(),
    });
    let switch = move |world: &mut World| {
        let stale = world.memory.load(old).unwrap();
        let entry = world.memory.load(new).unwrap();
        assert_eq!(world.memory.compare_exchange(old, stale, entry).unwrap(), Ok(stale));
    };
    (world, switch)
}

#[test]
fn a_cached_table_is_used_until_it_is_invalidated() {
    for arch in [Arch::Arm, Arch::Vtd] {
        let (mut world, switch) = world_with_two_roots(arch, Attrs::READ_WRITE);
        assert_eq!(world.read(1, OWN), Ok(OLD));
        switch(&mut world);
        // A page that was never used goes through the cached table.
        assert_eq!(world.read(1, OWN + 0x1000), Ok(OLD + 0x1000));
        world.invalidate(Invalidation { leaf: true, ..tlb(Scope::Endpoint) });
        assert_eq!(world.read(1, OWN), Ok(OLD));
        world.invalidate(tlb(pages(2, OWN, 0x1000)));
        assert_eq!(world.read(1, OWN), Ok(OLD), "another PASID's table is not this one's");
        world.invalidate(tlb(pages(1, OWN, 0x1000)));
        assert_eq!(world.read(1, OWN), Ok(NEW));
    }
}

#[test]
fn cached_tables_of_vtd_go_whatever_the_address() {
    for (arch, output) in [(Arch::Arm, OLD), (Arch::Vtd, NEW)] {
        let (mut world, switch) = world_with_two_roots(arch, Attrs::READ_WRITE);
        assert_eq!(world.read(1, OWN), Ok(OLD));
        switch(&mut world);
        world.invalidate(tlb(pages(1, FAR, 0x1000)));
        assert_eq!(world.read(1, OWN), Ok(OLD), "the translation is not in the range");
        assert_eq!(world.read(1, OWN + 0x1000), Ok(output + 0x1000));
    }
}

#[test]
fn tables_of_global_pages_go_for_every_pasid() {
    let ranged = tlb(pages(1, OWN, 0x1000));
    let flagged = Invalidation { global: true, ..tlb(Scope::Pasid(Pasid::new(1))) };
    for arch in [Arch::Arm, Arch::Vtd] {
        for invalidation in [ranged, flagged] {
            let (mut world, switch) = world_with_two_roots(arch, GLOBAL_ATTRS);
            assert_eq!(world.read(2, OWN), Ok(OLD));
            switch(&mut world);
            world.invalidate(invalidation);
            for offset in [0, 0x1000] {
                assert_eq!(world.read(2, OWN + offset), Ok(NEW + offset), "{arch:?} {invalidation:?}");
            }
        }
    }
}

#[test]
fn nothing_is_found_under_another_asid() {
    let mut world = World::new(Arch::Arm);
    let table = world.page_table();
    let tables = |asid| {
        let cd = table.cd(asid).encode(&arm_caps()).unwrap();
        let context = smmuv3::context_from_cd(&cd.words(), &arm_caps(), false).unwrap();
        Tables::new(ENDPOINT, Pasid::new(1), Stage1::Smmuv3(context))
    };
    let translation =
        Translation { iova: Iova(OWN), output: Gpa(OLD), size_lg2: 12, perms: Perms::READ, global: false };
    let step = Step { table: MEMORY, level: 0, path: Vmsav8::path(&table.vmsav8()) };
    let (mut tlb, mut walks) = (Tlb::new(), WalkCache::new());
    tlb.fill(&tables(11), &translation);
    walks.fill(&tables(11), Iova(OWN), 21, step);
    assert_eq!(tlb.lookup(&tables(11), Iova(OWN)), Some(translation));
    assert_eq!(walks.lookup(&tables(11), Iova(OWN), 21), Some(step));
    for asid in (0..4096).filter(|&asid| asid != 11) {
        assert_eq!(tlb.lookup(&tables(asid), Iova(OWN)), None, "{asid}");
        assert_eq!(walks.lookup(&tables(asid), Iova(OWN), 21), None, "{asid}");
    }
}

#[test]
fn context_is_kept_until_the_pasid_cache_is_invalidated() {
    let scopes = [Scope::Endpoint, Scope::Pasid(Pasid::new(1)), pages(1, OWN, 0x1000)];
    for arch in [Arch::Arm, Arch::Vtd] {
        for scope in scopes {
            let mut world = World::new(arch);
            let (old, new) = (world.page_table(), world.page_table());
            world.map(old, OWN, 0x1000, OLD, Attrs::READ_WRITE);
            world.map(new, OWN, 0x1000, NEW, Attrs::READ_WRITE);
            world.set_context(1, 11, old);
            assert_eq!(world.read(1, OWN), Ok(OLD));
            world.set_context(1, 12, new);
            assert_eq!(world.read(1, OWN), Ok(OLD));
            world.invalidate(tlb(Scope::Endpoint));
            assert_eq!(world.read(1, OWN), Ok(OLD), "translations alone leave the context");
            let other = Invalidation { caches: Caches::PASID, ..tlb(Scope::Pasid(Pasid::new(2))) };
            world.invalidate(other);
            assert_eq!(world.read(1, OWN), Ok(OLD), "another PASID's context is not this one's");
            world.invalidate(Invalidation { caches: Caches::PASID, leaf: true, ..tlb(scope) });
            assert_eq!(world.read(1, OWN), Ok(NEW), "{arch:?} {scope:?}");
        }
    }
}

#[test]
fn untagged_accesses_are_invalidated_under_either_name() {
    // Both tables say that untagged accesses use entry 0.
    for arch in [Arch::Arm, Arch::Vtd] {
        for pasid in [None, Pasid::new(0)] {
            let mut world = World::new(arch);
            let table = world.page_table();
            world.map(table, OWN, 0x1000, OLD, Attrs::READ_WRITE);
            world.set_context(0, 10, table);
            let untagged = Stream::untagged(ENDPOINT);
            let read = |world: &mut World| {
                world.host.translate(untagged, Iova(OWN), Access::READ, |piece| piece.output.0)
            };
            assert_eq!(read(&mut world), Ok(OLD));
            world.remap(table, OWN, 0x1000, NEW, Attrs::READ_WRITE);
            assert_eq!(read(&mut world), Ok(OLD));
            world.invalidate(tlb(Scope::Pasid(pasid)));
            assert_eq!(read(&mut world), Ok(NEW), "{arch:?} {pasid:?}");
        }
    }
}

/// Whoever an entry serves: after its invalidation every stream is translated as without caches.
#[test]
fn an_entry_goes_for_every_stream_that_it_serves() {
    const ENTRIES: u32 = 3;
    let asid = |entry: u32| 10 + u16::try_from(entry).unwrap();
    let streams = || [None].into_iter().chain((0..ENTRIES).map(Pasid::new));
    let see = |host: &mut SoftHost<Memory>| -> Vec<_> {
        let peek = |pasid| host.peek(Stream { endpoint: ENDPOINT, pasid }, Iova(OWN), Access::READ);
        streams().map(peek).map(|seen| seen.map(|piece| piece.output)).collect()
    };
    let arm = [smmuv3::Untagged::Terminate, smmuv3::Untagged::Bypass, smmuv3::Untagged::Pasid0];
    let kinds = arm.map(|s1dss| (Arch::Arm, s1dss, 0)).into_iter();
    for (arch, s1dss, rid_pasid) in kinds.chain((0..ENTRIES).map(|rid| (Arch::Vtd, arm[0], rid))) {
        for entry in 0..ENTRIES {
            for (caches, tag) in [(Caches::PASID, None), (Caches::all(), Some(77))] {
                for scope in [Scope::Pasid(Pasid::new(entry)), pages(entry, OWN, 0x1000)] {
                    let mut world = World::with_untagged(arch, s1dss, Pasid::new(rid_pasid).unwrap());
                    for pasid in 0..ENTRIES {
                        let table = world.page_table();
                        world.map(table, OWN, 0x1000, OLD + u64::from(pasid) * 0x1000, Attrs::READ);
                        world.set_context(pasid, asid(pasid), table);
                    }
                    assert_eq!(see(&mut world.host), see(&mut world.strict));
                    let table = world.page_table();
                    world.map(table, OWN, 0x1000, NEW, Attrs::READ);
                    world.set_context(entry, asid(entry), table);
                    world.invalidate(Invalidation { caches, tag, leaf: true, ..tlb(scope) });
                    let case = (arch, s1dss, rid_pasid, entry, caches, scope);
                    assert_eq!(see(&mut world.host), see(&mut world.strict), "{case:?}");
                }
            }
        }
    }
}

#[test]
fn what_faulted_is_not_cached() {
    for arch in [Arch::Arm, Arch::Vtd] {
        let mut world = World::new(arch);
        let table = world.page_table();
        assert!(world.read(1, OWN).is_err(), "no context");
        world.set_context(1, 11, table);
        assert!(world.read(1, OWN).is_err(), "no mapping");
        world.map(table, OWN, 0x1000, OLD, Attrs::READ);
        assert_eq!(world.read(1, OWN), Ok(OLD));
        assert!(world.write(1, OWN).is_err(), "not writable");
    }
}

#[test]
fn more_permission_needs_no_invalidation_and_less_does() {
    for arch in [Arch::Arm, Arch::Vtd] {
        let mut world = World::new(arch);
        let table = world.page_table();
        world.map(table, OWN, 0x1000, OLD, Attrs::READ);
        world.set_context(1, 11, table);
        assert_eq!(world.read(1, OWN), Ok(OLD));
        assert!(world.write(1, OWN).is_err());
        world.remap(table, OWN, 0x1000, OLD, Attrs::READ_WRITE);
        assert_eq!(world.write(1, OWN), Ok(OLD));
        world.remap(table, OWN, 0x1000, OLD, Attrs::READ);
        assert_eq!(world.write(1, OWN), Ok(OLD));
        world.invalidate(Invalidation { leaf: true, ..tlb(pages(1, OWN, 0x1000)) });
        assert!(world.write(1, OWN).is_err());
    }
}

#[test]
fn a_large_leaf_goes_as_a_whole() {
    const LARGE: u64 = 0x20_0000;
    for arch in [Arch::Arm, Arch::Vtd] {
        let mut world = World::new(arch);
        let table = world.page_table();
        world.map(table, OWN, LARGE, OLD, Attrs::READ_WRITE);
        world.set_context(1, 11, table);
        for offset in [0, 0x1000, LARGE - 1] {
            assert_eq!(world.read(1, OWN + offset), Ok(OLD + offset));
        }
        world.remap(table, OWN, LARGE, NEW, Attrs::READ_WRITE);
        assert_eq!(world.read(1, OWN + 0x1000), Ok(OLD + 0x1000));
        world.invalidate(Invalidation { leaf: true, ..tlb(pages(1, OWN + 0x5000, 0x1000)) });
        for offset in [0, 0x1000, LARGE - 1] {
            assert_eq!(world.read(1, OWN + offset), Ok(NEW + offset), "{arch:?} {offset:#x}");
        }
    }
}

#[test]
fn more_translations_than_fit_are_all_right() {
    let mut world = World::new(Arch::Arm);
    let table = world.page_table();
    let length = 3 * TLB_ENTRIES as u64 * 0x1000;
    world.map(table, OWN + 0x1000, length, OLD + 0x1000, Attrs::READ_WRITE);
    world.set_context(1, 11, table);
    for _ in 0..2 {
        for offset in (0x1000..length).step_by(0x1000) {
            assert_eq!(world.read(1, OWN + offset + 0x123), Ok(OLD + offset + 0x123));
        }
    }
    // None of those that are still here survives.
    world.remap(table, OWN + 0x1000, length, NEW + 0x1000, Attrs::READ_WRITE);
    world.invalidate(tlb(pages(1, OWN, length + 0x1000)));
    for offset in (0x1000..length).step_by(0x1000) {
        assert_eq!(world.read(1, OWN + offset), Ok(NEW + offset));
    }
}

#[test]
fn ignored_top_byte_hides_nothing_stale() {
    let alias = OWN | 0x5a << 56;
    // The guest may name the page by any of its addresses.
    for named in [OWN, alias, OWN | 0xa5 << 56] {
        check_aliases(alias, named);
    }
}

fn check_aliases(alias: u64, named: u64) {
    let (mut world, switch) = world_with_two_roots(Arch::Arm, Attrs::READ_WRITE);
    let pasid = Pasid::new(1).unwrap();
    let Canonical::Smmuv3(cds) = &world.table else { panic!("not Arm") };
    let mut cd = cds.read(&world.memory, pasid).unwrap().unwrap();
    cd.word0.set_tbi0(true);
    cds.clear(&world.memory, pasid).unwrap();
    cds.write(&mut world.memory, pasid, &cd).unwrap();
    // The alias first: whatever is kept then must go as well.
    for address in [alias, OWN] {
        assert_eq!(world.read(1, address), Ok(OLD));
    }
    switch(&mut world);
    world.invalidate(tlb(pages(1, named, 0x1000)));
    for address in [OWN + 0x2000, OWN, alias + 0x1000, OWN + 0x1000, alias] {
        let offset = address & 0x3000;
        assert_eq!(world.read(1, address), Ok(NEW + offset), "{address:#x}");
    }
}

/// The translation goes first and alone, then the table that is shared by all PASIDs.
#[test]
fn tables_of_global_pages_outlive_their_translations() {
    for arch in [Arch::Arm, Arch::Vtd] {
        let (mut world, switch) = world_with_two_roots(arch, GLOBAL_ATTRS);
        assert_eq!(world.read(2, OWN), Ok(OLD));
        world.invalidate(Invalidation { leaf: true, ..tlb(Scope::Endpoint) });
        switch(&mut world);
        world.invalidate(tlb(pages(1, OWN, 0x1000)));
        for offset in [0, 0x1000] {
            assert_eq!(world.read(2, OWN + offset), Ok(NEW + offset), "{arch:?}");
        }
    }
}

/// Descriptor 0 is what PASID 0 names, also where accesses with PASID 0 have none because untagged ones took it.
#[test]
fn descriptor_0_goes_by_its_number() {
    for invalidation in [
        Invalidation { caches: Caches::PASID, ..tlb(Scope::Pasid(Pasid::new(0))) },
        Invalidation { caches: Caches::all(), leaf: true, ..tlb(pages(0, OWN, 0x1000)) },
    ] {
        let mut world = World::new(Arch::Arm);
        let (old, new) = (world.page_table(), world.page_table());
        world.map(old, OWN, 0x1000, OLD, Attrs::READ_WRITE);
        world.map(new, OWN, 0x1000, NEW, Attrs::READ_WRITE);
        world.set_context(0, 10, old);
        let untagged = Stream::untagged(ENDPOINT);
        let read = |world: &mut World| {
            world.host.translate(untagged, Iova(OWN), Access::READ, |piece| piece.output.0)
        };
        assert_eq!(read(&mut world), Ok(OLD));
        world.set_context(0, 10, new);
        world.invalidate(invalidation);
        assert_eq!(read(&mut world), Ok(NEW), "{invalidation:?}");
    }
}
