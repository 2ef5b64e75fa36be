//! Every call fails once, at every place where it is made.
//!
//! A life of a host is cut into steps. Whatever fails in a step, each endpoint afterwards has what it had before, or
//! nothing at all; the step then succeeds when it is done again, and ends with the same accesses and the same number of
//! objects as if nothing had happened. When the host is gone nothing is left.

use nix::errno::Errno;
use pgtable_formats::format::Attrs;
use pgtable_formats::{AccessKind, Gpa, Iova, IovaRange, Pasid};
use viommu_device::host::{Host, Invalidation, Scope, SpaceSpec, Stream, TableCaps};
use viommu_device::mapping::{MapFlags, Mapping};
use viommu_host_iommufd::Space;
use viommu_host_iommufd::counted::Call;
use viommu_tests::host_suite::HostUnderTest;
use viommu_tests::host_suite::iommufd::{ENDPOINTS, Fakes, Kernel, Layout};
use viommu_tests::rig::Memory;
use viommu_tests::tables::{PageTable, PasidTable};
use viommu_wire::Caches;

/// A host and what it is asked for.
struct World {
    fakes: Fakes,
    mapped: Option<Space<Kernel>>,
    identity: Option<Space<Kernel>>,
    tables: [Option<Space<Kernel>>; 2],
    /// The page tables behind [`tables`](Self::tables), for the stream that uses them.
    pages: [Option<PageTable>; 2],
}

impl World {
    fn new(fakes: Fakes) -> Self {
        Self { fakes, mapped: None, identity: None, tables: [None, None], pages: [None, None] }
    }

    /// The stream that is given tables: on VT-d one with a PASID.
    fn stream(&mut self) -> Stream {
        let pasid = match self.caps() {
            TableCaps::Smmuv3(_) => None,
            TableCaps::Vtd(_) => Pasid::new(5),
        };
        Stream { endpoint: ENDPOINTS[0], pasid }
    }

    fn caps(&mut self) -> TableCaps {
        self.fakes.host().caps(ENDPOINTS[0]).unwrap().tables.clone().unwrap()
    }

    /// Where each endpoint's accesses lead. Looking warms the caches.
    fn view(&self) -> [Vec<Option<u64>>; 2] {
        ENDPOINTS.map(|endpoint| {
            let mut seen = Vec::new();
            for pasid in [None, Pasid::new(5)] {
                for iova in [0x1000, 0x2000, 0x3000, Memory::page(3).0] {
                    for kind in [AccessKind::Read, AccessKind::Write] {
                        seen.push(self.fakes.dma(Stream { endpoint, pasid }, iova, kind).ok());
                    }
                }
            }
            seen
        })
    }

    /// What the caches hold is seen only if everything is tried.
    fn is_blocked(view: &[Option<u64>]) -> bool {
        view.iter().all(Option::is_none)
    }

    fn create_table(&mut self, index: usize) -> Result<(), String> {
        let caps = self.caps();
        let pages = PageTable::new(&caps, 1, &mut self.fakes.memory);
        let output = Memory::page(300 + 100 * index as u64).0;
        pages.map(&mut self.fakes.memory, 0x1000, output, 0x3000, Attrs::READ_WRITE);
        let canonical = match caps {
            TableCaps::Smmuv3(_) => {
                let table = PasidTable::new(&caps, 4, &mut self.fakes.memory);
                table.set(&mut self.fakes.memory, 0, &pages);
                table.canonical()
            }
            TableCaps::Vtd(_) => pages.canonical().unwrap(),
        };
        let spec = SpaceSpec::GuestTable { endpoint: ENDPOINTS[0], table: &canonical };
        let space = self.fakes.host().create(spec).map_err(text)?;
        (self.tables[index], self.pages[index]) = (Some(space), Some(pages));
        Ok(())
    }

    fn bind(&mut self, stream: Stream, space: Pick) -> Result<(), String> {
        let Self { fakes, mapped, identity, tables, .. } = self;
        let space = match space {
            Pick::Nothing => None,
            Pick::Mapped => mapped.as_mut(),
            Pick::Identity => identity.as_mut(),
            Pick::Table(index) => tables[index].as_mut(),
        };
        fakes.host().bind(stream, space).map_err(text)
    }

    fn map(&mut self, page: u64, count: u64, target: u64) -> Result<(), String> {
        let range = IovaRange::from_length(Iova(page << 12), count << 12).unwrap();
        let (output, flags) = (Gpa(Memory::page(target).0), MapFlags::READ | MapFlags::WRITE);
        let Self { fakes, mapped, .. } = self;
        fakes.host().map(mapped.as_mut().unwrap(), Mapping { range, output, flags }).map_err(text)
    }

    fn unmap(&mut self, page: u64, count: u64) -> Result<(), String> {
        let range = IovaRange::from_length(Iova(page << 12), count << 12).unwrap();
        let Self { fakes, mapped, .. } = self;
        fakes.host().unmap(mapped.as_mut().unwrap(), range).map(drop).map_err(text)
    }

    fn invalidate(&mut self, scope: Scope, caches: Caches) -> Result<(), String> {
        let endpoint = ENDPOINTS[0];
        let one = Invalidation { endpoint, scope, caches, leaf: false, tag: None, global: true };
        self.fakes.host().invalidate(&[one]).map_err(text)
    }

    fn destroy(&mut self, space: Option<Space<Kernel>>) {
        if let Some(space) = space {
            self.fakes.host().destroy(space);
        }
    }
}

#[derive(Clone, Copy)]
enum Pick {
    Nothing,
    Mapped,
    Identity,
    Table(usize),
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn untagged(index: usize) -> Stream {
    Stream::untagged(ENDPOINTS[index])
}

type Step = (&'static str, fn(&mut World) -> Result<(), String>);

const SETUP: &[Step] = &[
    ("make the host", |w| w.fakes.start().map_err(text)),
    ("add the first endpoint", |w| w.fakes.add(0).map_err(text)),
    ("add the second endpoint", |w| w.fakes.add(1).map_err(text)),
];

const MAPPINGS: &[Step] = &[
    ("make a space of mappings", |w| {
        w.mapped = Some(w.fakes.host().create(SpaceSpec::Mapped).map_err(text)?);
        Ok(())
    }),
    ("map before it is bound", |w| w.map(1, 1, 40)),
    ("bind the first to it", |w| w.bind(untagged(0), Pick::Mapped)),
    ("bind the second to it", |w| w.bind(untagged(1), Pick::Mapped)),
    ("map after it was bound", |w| w.map(2, 2, 50)),
    ("unmap", |w| w.unmap(1, 1)),
    ("map elsewhere", |w| w.map(1, 1, 60)),
    ("unmap two", |w| w.unmap(1, 3)),
    ("map once more", |w| w.map(1, 2, 70)),
    ("make a bypass", |w| {
        w.identity = Some(w.fakes.host().create(SpaceSpec::Identity).map_err(text)?);
        Ok(())
    }),
    ("bind the second to bypass", |w| w.bind(untagged(1), Pick::Identity)),
];

const TABLES: &[Step] = &[
    ("unbind the first", |w| w.bind(untagged(0), Pick::Nothing)),
    ("make a table", |w| w.create_table(0)),
    ("bind it", |w| {
        let stream = w.stream();
        w.bind(stream, Pick::Table(0))
    }),
    ("invalidate as the device does", |w| w.invalidate(Scope::Endpoint, Caches::all())),
    ("invalidate a range", |w| {
        let range = IovaRange::new(Iova(0x1000), Iova(0x2fff)).unwrap();
        let pasid = w.stream().pasid;
        w.invalidate(Scope::Range { pasid, range, page_lg2: 12 }, Caches::TLB)
    }),
    ("make another", |w| w.create_table(1)),
    ("bind that", |w| {
        let stream = w.stream();
        w.bind(stream, Pick::Table(1))
    }),
    ("invalidate for it", |w| w.invalidate(Scope::Endpoint, Caches::all())),
    ("destroy the first", |w| {
        let space = w.tables[0].take();
        w.destroy(space);
        Ok(())
    }),
    ("unbind it", |w| {
        let stream = w.stream();
        w.bind(stream, Pick::Nothing)
    }),
    ("bind the first to mappings", |w| w.bind(untagged(0), Pick::Mapped)),
    ("destroy the second", |w| {
        let space = w.tables[1].take();
        w.destroy(space);
        Ok(())
    }),
];

const TEARDOWN: &[Step] = &[
    ("unbind both", |w| {
        w.bind(untagged(0), Pick::Nothing)?;
        w.bind(untagged(1), Pick::Nothing)
    }),
    ("destroy the spaces", |w| {
        for space in [w.mapped.take(), w.identity.take()] {
            w.destroy(space);
        }
        Ok(())
    }),
    ("remove the second", |w| w.fakes.host().remove_endpoint(ENDPOINTS[1]).map_err(text)),
    ("drop the host", |w| {
        w.fakes.host = None;
        Ok(())
    }),
];

/// What a step ends with where nothing fails.
type After = ([Vec<Option<u64>>; 2], usize);

fn undisturbed(make: fn() -> Fakes, steps: &[Step]) -> Vec<After> {
    let mut world = World::new(make());
    let mut after = Vec::new();
    for (name, step) in steps {
        assert_eq!(step(&mut world), Ok(()), "{name}");
        after.push((world.view(), world.fakes.fake.objects()));
    }
    assert_eq!(world.fakes.fake.objects(), 0);
    after
}

/// Runs all steps with `count` calls failing from the `number`-th after `from` steps on. `false`: none has failed.
fn disturbed(
    make: fn() -> Fakes,
    steps: &[Step],
    expected: &[After],
    (from, number, count): (usize, u64, u64),
    errno: Errno,
) -> bool {
    let mut world = World::new(make());
    let failing = |world: &World| -> Option<Call> { world.fakes.kernel.inner().failed() };
    let mut failed = None;
    for (index, (name, step)) in steps.iter().enumerate() {
        if index == from {
            world.fakes.kernel.inner().fail_run(number, count, errno);
        }
        let before = world.view();
        let mut result = step(&mut world);
        failed = failed.or(failing(&world));
        let place = format!("{name}, {failed:?} number {number} of {count} with {errno}");
        // One failure may hide another: so often it may take.
        for _ in 0..count {
            let Err(error) = &result else { break };
            assert!(failed.is_some(), "{place}: {error}");
            for (before, after) in before.iter().zip(&world.view()) {
                assert!(after == before || World::is_blocked(after), "{place}: {before:x?} then {after:x?}");
            }
            result = step(&mut world);
        }
        assert_eq!(result, Ok(()), "{place}: not even when nothing fails any more");
        let (view, objects) = &expected[index];
        assert_eq!(&world.view(), view, "{place}");
        let seen = world.fakes.fake.objects();
        assert_eq!(seen, *objects, "{place}: {:#?}", world.fakes.fake.describe());
    }
    assert_eq!(world.fakes.fake.objects(), 0);
    assert_eq!(world.fakes.fake.violations(), [""; 0]);
    failed.is_some()
}

/// `from`: the first step in which calls fail.
fn every_call(make: fn() -> Fakes, steps: &[&[Step]], from: usize, errnos: &[Errno]) {
    let steps = steps.concat();
    let expected = undisturbed(make, &steps);
    for &errno in errnos {
        for count in [1, 2] {
            let mut number = 0;
            while disturbed(make, &steps, &expected, (from, number, count), errno) {
                number += 1;
            }
            assert!(number > 10, "{number} calls");
        }
    }
}

const ALL: [&[Step]; 4] = [SETUP, MAPPINGS, TABLES, TEARDOWN];
const UNNESTED: [&[Step]; 3] = [SETUP, MAPPINGS, TEARDOWN];
const FAILURES: [Errno; 3] = [Errno::ENOMEM, Errno::EIO, Errno::EBUSY];
/// They have a meaning while a host is set up: something is not there, or elsewhere.
const ANSWERS: [Errno; 3] = [Errno::EINVAL, Errno::EOPNOTSUPP, Errno::ENOTTY];

fn smmuv3() -> Fakes {
    without_host(viommu_host_iommufd::fake::Unit::smmuv3(), Layout::OneUnit, 16)
}

fn two_smmuv3() -> Fakes {
    without_host(viommu_host_iommufd::fake::Unit::smmuv3(), Layout::TwoUnits, 16)
}

fn vtd() -> Fakes {
    without_host(viommu_host_iommufd::fake::Unit::vtd(), Layout::OneUnit, 20)
}

fn plain() -> Fakes {
    without_host(viommu_host_iommufd::fake::Unit::Plain, Layout::TwoUnits, 0)
}

fn without_host(unit: viommu_host_iommufd::fake::Unit, layout: Layout, pasids: u8) -> Fakes {
    let device = |unit| viommu_host_iommufd::fake::FakeDevice::on(unit).with_pasids(pasids);
    Fakes::without_host(unit, layout, device, &[])
}

#[test]
fn every_call_on_an_smmuv3() {
    every_call(smmuv3, &ALL, 0, &FAILURES);
    every_call(smmuv3, &ALL, SETUP.len(), &ANSWERS);
}

#[test]
fn every_call_on_two_smmuv3() {
    every_call(two_smmuv3, &ALL, 0, &FAILURES);
}

#[test]
fn every_call_on_vtd() {
    every_call(vtd, &ALL, 0, &FAILURES);
    every_call(vtd, &ALL, SETUP.len(), &ANSWERS);
}

#[test]
fn every_call_without_nested_translation() {
    every_call(plain, &UNNESTED, 0, &FAILURES);
    every_call(plain, &UNNESTED, SETUP.len(), &ANSWERS);
}

/// Where invalidations fail whatever is tried, the endpoints that they are about reach nothing until one succeeds; the
/// other goes on.
#[test]
fn invalidations_that_keep_failing_block() {
    for make in [smmuv3, two_smmuv3, vtd] {
        let mut world = World::new(make());
        let bound = TABLES.iter().position(|(name, _)| *name == "invalidate a range").unwrap();
        let steps = [SETUP, MAPPINGS, &TABLES[..bound]].concat();
        for (name, step) in steps {
            assert_eq!(step(&mut world), Ok(()), "{name}");
        }
        let stream = world.stream();
        let before = world.view();
        assert!(!World::is_blocked(&before[0]));
        let Some(pages) = world.pages[0] else { panic!() };
        pages.remap(&mut world.fakes.memory, 0x1000, Memory::page(500).0, 0x3000);
        world.fakes.kernel.inner().fail_kind(Call::Invalidate, Errno::EIO);
        for _ in 0..2 {
            assert!(world.invalidate(Scope::Pasid(stream.pasid), Caches::TLB).is_err());
            let after = world.view();
            assert!(World::is_blocked(&after[0]) && after[1] == before[1], "{after:x?}");
        }
        world.fakes.kernel.inner().heal();
        world.invalidate(Scope::Pasid(stream.pasid), Caches::TLB).unwrap();
        assert_eq!(world.fakes.dma(stream, 0x1000, AccessKind::Read), Ok(Memory::page(500).0));
        assert_eq!(world.view()[1], before[1]);
    }
}

/// Wherever a host ends, before its spaces or after them, nothing is left of it.
#[test]
fn nothing_is_left_of_a_host() {
    for make in [smmuv3, two_smmuv3, vtd, plain] {
        let nested = !std::ptr::fn_addr_eq(make, plain as fn() -> Fakes);
        let steps = if nested { [SETUP, MAPPINGS, TABLES].concat() } else { [SETUP, MAPPINGS].concat() };
        for stop in 0..steps.len() {
            let mut world = World::new(make());
            for (name, step) in &steps[..=stop] {
                assert_eq!(step(&mut world), Ok(()), "{name}");
            }
            // Spaces after the host, as well as before it.
            if stop % 2 == 0 {
                world.fakes.host = None;
            }
            let World { fakes, mapped, identity, tables, .. } = world;
            drop((mapped, identity, tables));
            let Fakes { fake, host, devices, .. } = fakes;
            drop(host);
            assert_eq!(fake.objects(), 0, "{:#?}", fake.describe());
            let attached = devices.map(|device| fake.attached(device, None));
            assert_eq!(attached, [None; 2]);
        }
    }
}
