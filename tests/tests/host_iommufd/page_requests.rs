//! Page requests through the device and the host to hardware that is made up, and what becomes of them when calls fail.

use nix::errno::Errno;
use pgtable_formats::format::Attrs;
use pgtable_formats::{AccessKind, Pasid};
use viommu_device::DeviceConfig;
use viommu_device::host::{
    Answered, GroupResponse, Host, Invalidation, PageRequestReport, Scope, SpaceSpec, Stream,
};
use viommu_host_iommufd::Space;
use viommu_host_iommufd::counted::Call;
use viommu_host_iommufd::fake::{DmaFault, FakeDevice, Unit};
use viommu_host_iommufd::kernel::ResponseCode;
use viommu_tests::host_suite::HostUnderTest;
use viommu_tests::host_suite::iommufd::{ENDPOINTS, Fakes, Kernel, Layout};
use viommu_tests::rig::{Bare, Memory, Sends, request};
use viommu_tests::tables::PageTable;
use viommu_wire::{
    Caches, DomainId, Event, Invalidate, InvalidateScope, PageResponse, PageResponseCode, Request, Status,
};

const PASID: u32 = 5;
const MISSING: u64 = 0x5000;

/// Endpoints behind VT-d, whose devices have page requests.
fn asking() -> Fakes {
    let device = |unit| FakeDevice { ats: true, pri: true, ..FakeDevice::on(unit).with_pasids(20) };
    Fakes::without_host(Unit::vtd(), Layout::OneUnit, device, &[])
}

fn stream() -> Stream {
    Stream { endpoint: ENDPOINTS[0], pasid: Pasid::new(PASID) }
}

/// A host, what it is asked for, and what it has said.
struct World {
    fakes: Fakes,
    space: Option<Space<Kernel>>,
    pages: Option<PageTable>,
    told: Vec<PageRequestReport>,
}

impl World {
    fn new() -> Self {
        Self { fakes: asking(), space: None, pages: None, told: Vec::new() }
    }

    fn create(&mut self) -> Result<(), String> {
        let caps = self.fakes.host().caps(ENDPOINTS[0]).unwrap().clone();
        assert!(caps.page_requests);
        let pages = PageTable::new(&caps.tables.unwrap(), 1, &mut self.fakes.memory);
        pages.map(&mut self.fakes.memory, 0x1000, Memory::page(300).0, 0x1000, Attrs::READ_WRITE);
        let table = pages.canonical().unwrap();
        let spec = SpaceSpec::GuestTable { endpoint: ENDPOINTS[0], table: &table };
        self.space = Some(self.fakes.host().create(spec).map_err(text)?);
        self.pages = Some(pages);
        Ok(())
    }

    fn bind(&mut self, bound: bool) -> Result<(), String> {
        let Self { fakes, space, .. } = self;
        fakes.host().bind(stream(), space.as_mut().filter(|_| bound)).map_err(text)
    }

    fn access(&self) -> Result<u64, DmaFault> {
        self.fakes.dma(stream(), MISSING, AccessKind::Write)
    }

    /// The device asks, in a group of two.
    fn ask(&mut self, group: u32) {
        let device = self.fakes.devices[0];
        for last in [false, true] {
            assert!(self.fakes.fake.page_request(device, Some(PASID), group, MISSING, 1, last));
        }
    }

    fn fetch(&mut self) -> Result<(), String> {
        let report = self.fakes.host().next_page_request().ok_or("nothing")?;
        self.told.push(report);
        Ok(())
    }

    fn answer(&mut self) -> Result<(), String> {
        let report = self.told.last().unwrap();
        let response =
            GroupResponse { stream: report.stream, group: report.group, code: PageResponseCode::Success };
        match self.fakes.host().respond(&response).map_err(text)? {
            Answered::Taken => Ok(()),
            // Where the kernel says so it is so: EINVAL is its word for it.
            Answered::Gone => Err("gone".into()),
        }
    }

    fn invalidate(&mut self) -> Result<(), String> {
        let (scope, caches) = (Scope::Pasid(stream().pasid), Caches::all());
        let one =
            Invalidation { endpoint: ENDPOINTS[0], scope, caches, leaf: false, tag: None, global: true };
        self.fakes.host().invalidate(&[one]).map_err(text)
    }

    /// How every group so far was answered.
    fn answers(&self) -> Vec<(u32, Option<ResponseCode>)> {
        self.fakes.fake.page_responses().into_iter().map(|(_, group, code)| (group, code)).collect()
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

type Step = (&'static str, fn(&mut World) -> Result<(), String>);

const LIFE: &[Step] = &[
    ("make the host", |w| w.fakes.start().map_err(text)),
    ("add an endpoint", |w| w.fakes.add(0).map_err(text)),
    ("add another", |w| w.fakes.add(1).map_err(text)),
    ("make a table", World::create),
    ("bind it", |w| w.bind(true)),
    ("fetch what an access asks for", |w| {
        assert_eq!(w.access(), Err(DmaFault::Stalled));
        w.fetch()
    }),
    ("map the page", |w| {
        w.pages.unwrap().map(&mut w.fakes.memory, MISSING, Memory::page(304).0, 0x1000, Attrs::READ_WRITE);
        Ok(())
    }),
    ("answer it", World::answer),
    ("see it done", |w| {
        assert_eq!(w.access(), Ok(Memory::page(304).0));
        Ok(())
    }),
    ("ask for more", |w| {
        (1..4).for_each(|group| w.ask(group));
        Ok(())
    }),
    ("fetch the first", World::fetch),
    ("bind the same table", |w| w.bind(true)),
    ("ask again", |w| {
        (4..7).for_each(|group| w.ask(group));
        Ok(())
    }),
    ("fetch one of them", World::fetch),
    ("take the PASID back", World::invalidate),
    ("ask once more", |w| {
        (7..9).for_each(|group| w.ask(group));
        Ok(())
    }),
    ("fetch", World::fetch),
    ("unbind", |w| w.bind(false)),
    ("bind again", |w| w.bind(true)),
    ("ask for the last", |w| {
        w.ask(9);
        Ok(())
    }),
    ("remove the endpoint", |w| w.fakes.host().remove_endpoint(ENDPOINTS[0]).map_err(text)),
    ("drop the rest", |w| {
        w.space = None;
        w.fakes.host = None;
        Ok(())
    }),
];

/// Runs a life with `count` calls failing from the `number`-th on. `false`: none has failed.
fn disturbed(number: u64, count: u64, errno: Errno) -> bool {
    let mut world = World::new();
    world.fakes.kernel.inner().fail_run(number, count, errno);
    let mut failed = None;
    for (name, step) in LIFE {
        let mut result = step(&mut world);
        failed = failed.or(world.fakes.kernel.inner().failed());
        let place = format!("{name}, {failed:?} number {number} of {count} with {errno}");
        for _ in 0..count {
            let Err(error) = &result else { break };
            assert!(failed.is_some(), "{place}: {error}");
            result = step(&mut world);
        }
        assert_eq!(result, Ok(()), "{place}: not even when nothing fails any more");
        assert_eq!(world.fakes.host.as_ref().map_or(0, |host| host.ignored_page_requests()), 0, "{place}");
    }
    let place = format!("{failed:?} number {number} of {count} with {errno}");
    // Whatever failed, each group was answered once, and as it should be: the kernel's own answers are those to what
    // was unbound or removed, or blocked because its caches could not be dropped.
    let answers = world.answers();
    let success = Some(ResponseCode::Success);
    assert_eq!(answers.first().map(|(_, code)| *code), Some(success), "{place}");
    let mut groups: Vec<_> = answers.iter().map(|(group, _)| *group).skip(1).collect();
    groups.sort_unstable();
    assert_eq!(groups, [1, 2, 3, 4, 5, 6, 7, 8, 9], "{place}");
    for (group, code) in &answers[1..] {
        let ours = Some(ResponseCode::Invalid);
        let expected: &[_] = match group {
            1..=3 => &[ours],
            4..=6 => &[ours, None],
            _ => &[None],
        };
        assert!(expected.contains(code), "{place}: {answers:?}");
    }
    assert_eq!((world.fakes.fake.objects(), world.fakes.fake.violations()), (0, vec![]), "{place}");
    failed.is_some()
}

#[test]
fn every_call_on_the_way_of_a_page_request() {
    for errno in [Errno::ENOMEM, Errno::EIO, Errno::EBUSY] {
        for count in [1, 2] {
            let mut number = 0;
            while disturbed(number, count, errno) {
                number += 1;
            }
            assert!(number > 30, "{number} calls");
        }
    }
}

/// The device over a host whose endpoints ask for pages, with a table of one PASID bound.
struct Driven {
    fakes: Fakes,
    bare: Bare<viommu_host_iommufd::IommufdHost<Kernel>>,
    pages: PageTable,
}

impl Driven {
    const DOMAIN: u32 = 3;

    fn new() -> Self {
        let mut fakes = asking();
        fakes.start().unwrap();
        for index in 0..2 {
            fakes.add(index).unwrap();
        }
        let caps = fakes.host().caps(ENDPOINTS[0]).unwrap().tables.clone().unwrap();
        let pages = PageTable::new(&caps, 1, &mut fakes.memory);
        pages.map(&mut fakes.memory, 0x1000, Memory::page(300).0, 0x1000, Attrs::READ_WRITE);
        let mut bare = Bare::over(DeviceConfig::default(), None, fakes.host.take().unwrap());
        let table = pages.descriptor(PASID).unwrap();
        assert_eq!(bare.send(&request::attach_table(Self::DOMAIN, ENDPOINTS[0].0, table)), Status::Ok);
        Self { fakes, bare, pages }
    }

    fn access(&self) -> Result<u64, DmaFault> {
        self.fakes.dma(stream(), MISSING, AccessKind::Write)
    }

    fn page_request(&mut self) -> PageResponse {
        let Some(Event::PageRequest(asked)) = self.bare.device.next_event() else { panic!("a page request") };
        assert_eq!(
            (asked.endpoint, asked.pasid, asked.address.0),
            (ENDPOINTS[0], Pasid::new(PASID), MISSING)
        );
        assert!(asked.last);
        PageResponse {
            endpoint: asked.endpoint,
            pasid: asked.pasid,
            group_id: asked.group_id,
            code: PageResponseCode::Success,
        }
    }
}

/// From the access to the guest's handler and back, in requests and events as a driver sees them.
#[test]
fn an_access_waits_for_the_guest() {
    let mut driven = Driven::new();
    assert_eq!(driven.access(), Err(DmaFault::Stalled));
    let response = driven.page_request();
    driven.pages.map(&mut driven.fakes.memory, MISSING, Memory::page(304).0, 0x1000, Attrs::READ_WRITE);
    driven.fakes.kernel.take();
    assert_eq!(driven.bare.send(&Request::PageResponse(response)), Status::Ok);
    let counts = driven.fakes.kernel.take();
    assert_eq!((counts.of(Call::Respond), counts.ioctls()), (1, 0), "one write");
    assert_eq!(driven.access(), Ok(Memory::page(304).0));
    assert_eq!(driven.bare.send(&Request::PageResponse(response)), Status::NoEnt, "once");
}

/// What the guest takes back has no page requests, whatever it answers later.
#[test]
fn answers_that_come_too_late_meet_nobody() {
    let invalidate = Request::Invalidate(Invalidate {
        domain: DomainId(Driven::DOMAIN),
        scope: InvalidateScope::Pasid(Pasid::new(PASID)),
        caches: Caches::PASID,
        leaf: false,
        tag: None,
        global: false,
    });
    for ends in [request::detach(Driven::DOMAIN, ENDPOINTS[0].0), invalidate] {
        let mut driven = Driven::new();
        assert_eq!(driven.access(), Err(DmaFault::Stalled));
        let response = driven.page_request();
        assert_eq!(driven.bare.send(&ends), Status::Ok, "{ends:?}");
        assert_ne!(driven.access(), Err(DmaFault::Stalled), "the access failed");
        assert_eq!(driven.bare.send(&Request::PageResponse(response)), Status::NoEnt, "{ends:?}");
        assert_eq!(driven.bare.device.next_event(), None);
    }
}
