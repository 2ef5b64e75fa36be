//! Every call of the machine below fails once, twice and three times, at every place where it is made.
//!
//! Whatever fails in a step, each stream afterwards leads where it led before or where it leads when the step is done,
//! or it is blocked. The step then succeeds when it is done again, and ends as if nothing had happened; when the host is
//! gone, nothing is left.

use pgtable_formats::format::Attrs;
use pgtable_formats::{Gpa, Pasid};
use viommu_device::host::{Host, HostError, Invalidation, Scope, SpaceSpec, Stream, TableCaps};
use viommu_device::mediated;
use viommu_device::soft;
use viommu_tests::host_suite::HostUnderTest;
use viommu_tests::host_suite::soft::{ARM, INTEL, MediatedSoft as Soft};
use viommu_tests::rig::Memory;
use viommu_tests::tables::{PageTable, PasidTable};
use viommu_wire::{Caches, EndpointId};

type Space = mediated::Space<soft::Space>;

const PASIDS: [Option<u32>; 6] = [None, Some(5), Some(7), Some(9), Some(70), Some(1000)];

struct World {
    soft: Soft,
    endpoint: EndpointId,
    tables: Vec<PageTable>,
    pages: Vec<Space>,
    pasids: Vec<(PasidTable, Space)>,
    identity: Space,
}

/// What is done at once.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// A page table for a PASID.
    Page(Option<u32>, usize),
    Unbind(Option<u32>),
    Identity,
    /// A table of all PASIDs.
    Table(usize),
    /// An entry of one of these changes, and the guest says so: of all, or of that PASID.
    Change(usize, u32, Option<usize>, bool),
}

impl World {
    fn new(first: u32) -> Self {
        let cannot = if first < 16 { ARM } else { INTEL };
        let mut soft = Soft::mediated([first, first + 1], false, cannot);
        let endpoint = EndpointId(first);
        let caps = soft.host.caps(endpoint).and_then(|caps| caps.tables.clone()).expect("tables");
        let (mut tables, mut pages) = (Vec::new(), Vec::new());
        for number in 0..6_u16 {
            let table = PageTable::new(&caps, number + 1, &mut soft.memory);
            let output = Memory::page(16 + u64::from(number)).0;
            table.map(&mut soft.memory, 0x1000, output, 0x1000, Attrs::READ_WRITE);
            let canonical = table.canonical().expect("page tables");
            let spec = SpaceSpec::GuestTable { endpoint, table: &canonical };
            pages.push(soft.host.create(spec).expect("a space"));
            tables.push(table);
        }
        let pasids = [(0, 0), (5, 1), (70, 2)];
        let others = [(0, 0), (5, 3), (7, 1), (1000, 4)];
        let pasids = [&pasids[..], &others[..]].map(|entries| {
            let table = PasidTable::new(&caps, 13, &mut soft.memory);
            for &(pasid, number) in entries {
                table.set(&mut soft.memory, pasid, &tables[number]);
            }
            let canonical = table.canonical();
            let spec = SpaceSpec::GuestTable { endpoint, table: &canonical };
            let space = soft.host.create(spec).expect("a space");
            (table, space)
        });
        let identity = soft.host.create(SpaceSpec::Identity).expect("a space");
        soft.host.host_mut().calls = 0;
        Self { soft, endpoint, tables, pages, pasids: pasids.into(), identity }
    }

    fn stream(&self, pasid: Option<u32>) -> Stream {
        Stream { endpoint: self.endpoint, pasid: pasid.and_then(Pasid::new) }
    }

    fn view(&mut self) -> Vec<Option<Gpa>> {
        PASIDS.iter().map(|&pasid| self.soft.leads(self.stream(pasid), 0x1000)).collect()
    }

    /// What the device core does: it binds, and drops what was cached.
    fn step(&mut self, step: Step) -> Result<(), HostError> {
        let (stream, space) = match step {
            Step::Page(pasid, number) => (self.stream(pasid), Some(&mut self.pages[number])),
            Step::Unbind(pasid) => (self.stream(pasid), None),
            Step::Identity => (self.stream(None), Some(&mut self.identity)),
            Step::Table(number) => (self.stream(None), Some(&mut self.pasids[number].1)),
            Step::Change(number, pasid, to, all) => {
                let table = &self.pasids[number].0;
                match to {
                    Some(to) => table.set(&mut self.soft.memory, pasid, &self.tables[to]),
                    None => table.clear(&self.soft.memory, pasid),
                }
                let scope = if all { Scope::Endpoint } else { Scope::Pasid(Pasid::new(pasid)) };
                return self.invalidate(scope, Caches::PASID);
            }
        };
        self.soft.host.bind(stream, space)?;
        match step {
            Step::Unbind(_) => Ok(()),
            Step::Page(..) => self.invalidate(Scope::Pasid(stream.pasid), Caches::all()),
            _ => self.invalidate(Scope::Endpoint, Caches::all()),
        }
    }

    fn invalidate(&mut self, scope: Scope, caches: Caches) -> Result<(), HostError> {
        let endpoint = self.endpoint;
        let one = Invalidation { endpoint, scope, caches, leaf: false, tag: None, global: true };
        self.soft.host.invalidate(&[one]).map_err(|stopped| stopped.error)
    }

    fn end(self) {
        let Self { mut soft, pages, pasids, identity, .. } = self;
        // What the machine does not let go goes with it.
        soft.host.host_mut().fails = None;
        let spaces = pages.into_iter().chain(pasids.into_iter().map(|(_, space)| space)).chain([identity]);
        spaces.for_each(|space| soft.host.destroy(space));
        assert_eq!(soft.host.into_inner().live, 0, "spaces that nobody destroyed");
    }
}

/// Page tables of single PASIDs, and bypass and a table of all PASIDs in between.
const PAGES: &[Step] = &[
    Step::Page(Some(5), 0),
    Step::Page(Some(70), 1),
    Step::Page(Some(5), 2),
    Step::Page(None, 3),
    Step::Unbind(Some(70)),
    Step::Page(Some(1000), 4),
    Step::Page(None, 5),
    Step::Unbind(Some(5)),
    Step::Unbind(Some(1000)),
    Step::Identity,
    Step::Page(None, 0),
    Step::Page(Some(7), 1),
    Step::Unbind(None),
    Step::Unbind(Some(7)),
    Step::Table(0),
    Step::Unbind(None),
    Step::Page(Some(7), 2),
    Step::Unbind(Some(7)),
];

/// A table of all PASIDs that changes.
const TABLES: &[Step] = &[
    Step::Identity,
    Step::Table(0),
    Step::Change(0, 5, Some(4), false),
    Step::Change(0, 7, Some(5), false),
    Step::Change(0, 70, None, true),
    Step::Change(0, 1000, Some(3), true),
    Step::Change(0, 0, Some(2), false),
    Step::Table(1),
    Step::Change(1, 0, None, true),
    Step::Table(0),
    Step::Unbind(None),
    Step::Page(Some(5), 1),
    Step::Unbind(Some(5)),
    Step::Table(1),
    Step::Identity,
    Step::Unbind(None),
];

fn check(first: u32, steps: &[Step]) {
    let mut world = World::new(first);
    let mut views = vec![world.view()];
    for &step in steps {
        world.step(step).expect("a step that nothing keeps from");
        views.push(world.view());
    }
    let calls = world.soft.host.host().calls;
    world.end();
    assert!(calls > steps.len());
    for length in 1..=3 {
        for at in 0..calls {
            let mut world = World::new(first);
            world.soft.host.host_mut().fails = Some((at, at + length - 1));
            world.view();
            for (step, view) in steps.iter().zip(views.windows(2)) {
                let mut tries = 0;
                while let Err(error) = world.step(*step) {
                    assert_eq!(error, HostError::Failed(5));
                    for ((seen, before), after) in world.view().into_iter().zip(&view[0]).zip(&view[1]) {
                        let is_known = seen.is_none() || seen == *before || seen == *after;
                        assert!(is_known, "{step:?}, failing at {at}: {seen:x?}");
                    }
                    tries += 1;
                    assert!(tries <= length, "{step:?}, failing at {at}");
                }
                assert_eq!(world.view(), view[1], "{step:?}, failing {length} times at {at}");
            }
            world.end();
        }
    }
}

#[test]
fn page_tables_on_smmuv3() {
    check(8, PAGES);
}

#[test]
fn pasid_tables_on_smmuv3() {
    check(8, TABLES);
}

#[test]
fn page_tables_on_vtd() {
    check(16, PAGES);
}

#[test]
fn pasid_tables_on_vtd() {
    check(16, TABLES);
}

/// The capabilities, as a guest sees them, are those of the hardware.
#[test]
fn tables_are_of_the_hardware() {
    for (first, is_arm) in [(8, true), (16, false)] {
        let world = World::new(first);
        let caps = world.soft.host.caps(EndpointId(first)).and_then(|caps| caps.tables.as_ref());
        assert_eq!(matches!(caps, Some(TableCaps::Smmuv3(_))), is_arm);
        assert_eq!(world.soft.endpoints(), [EndpointId(first), EndpointId(first + 1)]);
    }
}
