//! Random edits of guests' tables, each followed by an invalidation that is enough for it: what is cached must never
//! differ from what is there.

use proptest::prelude::*;

use super::*;

/// Page tables of the guest; their ASID is [`asid`].
const TABLES: u16 = 3;
const PASIDS: u32 = 4;
const BASE: u64 = 0x40_0000;
/// 2 MiB regions in which there are mappings.
const REGIONS: u64 = 3;
const LARGE: u64 = 0x20_0000;
/// The first pages of a region, and the last.
const SMALL_PAGES: [u64; 4] = [0, 1, 2, 511];

#[derive(Clone, Debug)]
enum Step {
    /// Maps anew, whatever was there.
    Map {
        table: u16,
        region: u64,
        page: Option<usize>,
        output: u64,
        write: bool,
        global: bool,
    },
    Unmap {
        table: u16,
        region: u64,
        page: Option<usize>,
    },
    /// Replaces the entry of a PASID, or clears it.
    Context {
        pasid: u32,
        table: Option<u16>,
    },
    /// Accesses, which fill the caches.
    Use {
        seed: u64,
    },
    /// Takes the PASID table away and binds it again.
    Rebind,
}

/// How much more than needed is invalidated.
#[derive(Clone, Copy, Debug)]
enum Width {
    Range,
    RangeByTag,
    Pasids,
    Tag,
    Endpoint,
    EndpointCaches,
}

fn step() -> impl Strategy<Value = Step> {
    let place = || (0..TABLES, 0..REGIONS, prop::option::weighted(0.7, 0..SMALL_PAGES.len()));
    prop_oneof![
        3 => (place(), 0..64_u64, any::<bool>(), prop::bool::weighted(0.2)).prop_map(
            |((table, region, page), output, write, global)| Step::Map { table, region, page, output, write, global }
        ),
        2 => place().prop_map(|(table, region, page)| Step::Unmap { table, region, page }),
        1 => (0..PASIDS, prop::option::weighted(0.8, 0..TABLES))
            .prop_map(|(pasid, table)| Step::Context { pasid, table }),
        3 => any::<u64>().prop_map(|seed| Step::Use { seed }),
        1 => Just(Step::Rebind),
    ]
}

fn width() -> impl Strategy<Value = Width> {
    prop_oneof![
        3 => Just(Width::Range),
        2 => Just(Width::RangeByTag),
        2 => Just(Width::Pasids),
        1 => Just(Width::Tag),
        1 => Just(Width::Endpoint),
        1 => Just(Width::EndpointCaches),
    ]
}

const fn asid(table: u16) -> u16 {
    20 + table
}

struct Guest {
    world: World,
    tables: Vec<PageTable>,
    /// Which page table the entry of each PASID leads to.
    contexts: [Option<u16>; PASIDS as usize],
}

impl Guest {
    fn new(arch: Arch) -> Self {
        let mut world = World::new(arch);
        let tables = (0..TABLES).map(|_| world.page_table()).collect();
        Self { world, tables, contexts: [None; PASIDS as usize] }
    }

    fn take(&mut self, step: Step, width: Width) {
        match step {
            Step::Map { table, region, page, output, write, global } => {
                let range = place(region, page);
                let size = range.length_minus_one() + 1;
                let attrs = Attrs { write, global, ..Attrs::READ };
                let tables = self.tables[usize::from(table)].unmap(&mut self.world.memory, range, false);
                // As hardware asks: nothing valid is replaced by something valid without an invalidation in between.
                self.invalidate(table, range, tables, width);
                let before = self.world.memory.tables();
                self.tables[usize::from(table)].map(
                    &mut self.world.memory,
                    range,
                    Gpa((output + 1) * size),
                    attrs,
                );
                if self.world.arch == Arch::Arm && before != self.world.memory.tables() {
                    self.invalidate(table, range, true, width);
                }
            }
            Step::Unmap { table, region, page } => {
                let range = place(region, page);
                let tables = self.tables[usize::from(table)].unmap(&mut self.world.memory, range, false);
                self.invalidate(table, range, tables, width);
            }
            Step::Context { pasid, table } => self.set_context(pasid, table, width),
            Step::Use { seed } => self.compare(seed),
            Step::Rebind => {
                let spec = SpaceSpec::GuestTable { endpoint: ENDPOINT, table: &self.world.table };
                let mut space = self.world.host.create(spec).unwrap();
                self.world.host.bind(Stream::untagged(ENDPOINT), Some(&mut space)).unwrap();
            }
        }
    }

    fn set_context(&mut self, pasid: u32, table: Option<u16>, width: Width) {
        let number = Pasid::new(pasid).unwrap();
        match &self.world.table {
            Canonical::Smmuv3(cds) => drop(cds.clear(&self.world.memory, number).unwrap()),
            Canonical::VtdPasidTable(entries) => drop(entries.clear(&self.world.memory, number).unwrap()),
            Canonical::Smmuv3PageTable(_) | Canonical::VtdFirstStage(_) => {}
        }
        if let Some(table) = table {
            self.world.set_context(pasid, asid(table), self.tables[usize::from(table)]);
        }
        self.contexts[pasid as usize] = table;
        let scope = match width {
            Width::Range | Width::RangeByTag => pages(pasid, BASE, 0x1000),
            Width::Pasids | Width::Tag => Scope::Pasid(Some(number)),
            Width::Endpoint | Width::EndpointCaches => Scope::Endpoint,
        };
        // Entry 0 of Arm's table serves untagged accesses only, and that is what it is called by.
        let is_untagged = pasid == 0 && self.world.arch == Arch::Arm;
        let scope = if is_untagged { Scope::Pasid(None) } else { scope };
        self.world.invalidate(Invalidation { caches: Caches::PASID, leaf: true, ..tlb(scope) });
    }

    /// Invalidates what an edit of `range` may have left behind.
    fn invalidate(&mut self, table: u16, range: IovaRange, tables: bool, width: Width) {
        let users: Vec<_> =
            (0..PASIDS).filter(|&pasid| self.contexts[pasid as usize] == Some(table)).collect();
        let leaf = !tables;
        // On VT-d there are no tags: what says one is taken by its PASID alone.
        let tag = (self.world.arch == Arch::Arm).then_some(asid(table));
        let by_tag = |scope| Invalidation { leaf, tag, global: true, ..tlb(scope) };
        let of_pasid = |pasid: u32| match (pasid, self.world.arch) {
            (0, Arch::Arm) => None,
            _ => Pasid::new(pasid),
        };
        let batch: Vec<_> = match (width, tag) {
            (Width::RangeByTag, Some(_)) => vec![by_tag(Scope::Range { pasid: None, range, page_lg2: 12 })],
            (Width::Tag, Some(_)) => vec![by_tag(Scope::Endpoint)],
            (Width::Range | Width::RangeByTag, _) => {
                let scope = |pasid| Scope::Range { pasid: of_pasid(pasid), range, page_lg2: 12 };
                users.iter().map(|&pasid| Invalidation { leaf, ..tlb(scope(pasid)) }).collect()
            }
            (Width::Pasids, _) => {
                let scope = |pasid| Scope::Pasid(of_pasid(pasid));
                users.iter().map(|&pasid| Invalidation { leaf, global: true, ..tlb(scope(pasid)) }).collect()
            }
            (Width::Tag | Width::Endpoint, _) => vec![Invalidation { leaf, ..tlb(Scope::Endpoint) }],
            (Width::EndpointCaches, _) => {
                vec![Invalidation { caches: Caches::all(), ..tlb(Scope::Endpoint) }]
            }
        };
        self.world.host.invalidate(&batch).unwrap();
    }

    /// Some accesses, each by both hosts.
    fn compare(&mut self, seed: u64) {
        for turn in 0..24_u64 {
            let random = (seed ^ turn << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
            let pasid = (random % (u64::from(PASIDS) + 1)).checked_sub(1);
            let pasid = pasid.map(|pasid| Pasid::new(u32::try_from(pasid).unwrap()).unwrap());
            let stream = Stream { endpoint: ENDPOINT, pasid };
            let page = SMALL_PAGES[(random >> 8) as usize % SMALL_PAGES.len()];
            let iova =
                Iova(BASE + (random >> 16) % REGIONS * LARGE + page * 0x1000 + (random >> 20) % 0x1000);
            let access = if random >> 4 & 1 == 0 { Access::READ } else { Access::WRITE };
            let cached = self.world.host.peek(stream, iova, access).map(|piece| piece.output);
            let fresh = self.world.strict.peek(stream, iova, access).map(|piece| piece.output);
            assert_eq!(cached, fresh, "{stream:?} {iova} {access:?}");
        }
    }
}

/// A small page, or a large one.
fn place(region: u64, page: Option<usize>) -> IovaRange {
    let start = BASE + region * LARGE;
    match page {
        Some(page) => range(start + SMALL_PAGES[page] * 0x1000, 0x1000),
        None => range(start, LARGE),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn caches_never_keep_what_was_invalidated(
        is_arm in any::<bool>(),
        steps in prop::collection::vec((step(), width()), 1..120),
    ) {
        let mut guest = Guest::new(if is_arm { Arch::Arm } else { Arch::Vtd });
        for (seed, (step, width)) in (0..).zip(steps) {
            guest.take(step, width);
            guest.compare(seed);
        }
    }
}
