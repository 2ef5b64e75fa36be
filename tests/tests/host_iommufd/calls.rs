//! What requests cost in ioctls.

use pgtable_formats::format::Attrs;
use viommu_device::DeviceConfig;
use viommu_device::host::{Host, TableCaps};
use viommu_host_iommufd::IommufdHost;
use viommu_host_iommufd::counted::{Call, Counts};
use viommu_tests::host_suite::iommufd::{ENDPOINTS, Fakes, Kernel, Layout};
use viommu_tests::rig::{Bare, Memory, Sends, request};
use viommu_tests::tables::{PageTable, PasidTable};
use viommu_wire::{
    Caches, DomainId, Invalidate, InvalidateScope, Iova, IovaRange, Request, Status, TableDescriptor,
};

/// The device over the host, as a guest sees it.
struct Driven {
    fakes: Fakes,
    bare: Bare<IommufdHost<Kernel>>,
}

impl Driven {
    fn new(mut fakes: Fakes) -> Self {
        let host = fakes.host.take().unwrap();
        let bare = Bare::over(DeviceConfig::default(), None, host);
        fakes.kernel.take();
        Self { fakes, bare }
    }

    fn caps(&mut self) -> TableCaps {
        let caps = self.bare.device.host_mut().caps(ENDPOINTS[0]).unwrap();
        caps.tables.clone().unwrap()
    }

    /// Sends a request that succeeds, and counts.
    fn send(&mut self, request: &Request) -> Counts {
        self.fakes.kernel.take();
        assert_eq!(self.bare.send(request), Status::Ok, "{request:?}");
        self.fakes.kernel.take()
    }

    /// A table of context descriptors with one page table for untagged accesses.
    fn cd_table(&mut self) -> TableDescriptor {
        let caps = self.caps();
        let table = PasidTable::new(&caps, 4, &mut self.fakes.memory);
        let pages = PageTable::new(&caps, 1, &mut self.fakes.memory);
        pages.map(&mut self.fakes.memory, 0x1000, Memory::page(300).0, 0x1000, Attrs::READ_WRITE);
        table.set(&mut self.fakes.memory, 0, &pages);
        // With ATS, which is the guest's to turn on.
        match table.descriptor() {
            TableDescriptor::Smmuv3 { ste0, ste1 } => TableDescriptor::Smmuv3 { ste0, ste1: ste1 | 1 << 28 },
            other => other,
        }
    }

    fn page_table(&mut self, pasid: u32) -> TableDescriptor {
        let caps = self.caps();
        let pages = PageTable::new(&caps, 1, &mut self.fakes.memory);
        pages.descriptor(pasid).unwrap()
    }
}

const DOMAIN: u32 = 3;

fn attach(index: usize, table: TableDescriptor) -> Request {
    request::attach_table(DOMAIN, ENDPOINTS[index].0, table)
}

/// Every kind of INVALIDATE: scopes, caches, tags, sizes up to everything.
fn invalidations() -> Vec<Request> {
    let mut requests = Vec::new();
    let range = |start, last| IovaRange::new(Iova(start), Iova(last)).unwrap();
    for pasid in [None, Some(request::pasid(5))] {
        let mut scopes = vec![InvalidateScope::Domain, InvalidateScope::Pasid(pasid)];
        for range in [
            range(0x1000, 0x1fff),
            range(0x1000, 0x3f_ffff),
            range(0x20_1000, 0x7fff_ffff_efff),
            range(0, u64::MAX),
        ] {
            scopes.push(InvalidateScope::Address { pasid, range, page_lg2: 12 });
        }
        for scope in scopes {
            for (caches, leaf) in [(Caches::TLB, true), (Caches::TLB, false)] {
                for (tag, global) in [(None, false), (Some(1), false), (Some(1), true)] {
                    let domain = DomainId(DOMAIN);
                    requests.push(Request::Invalidate(Invalidate {
                        domain,
                        scope,
                        caches,
                        leaf,
                        tag,
                        global,
                    }));
                }
            }
        }
    }
    requests
}

/// The same for PASID caches.
fn configuration() -> Vec<Request> {
    let scopes = [
        InvalidateScope::Domain,
        InvalidateScope::Pasid(None),
        InvalidateScope::Pasid(Some(request::pasid(5))),
    ];
    let caches = [Caches::PASID, Caches::all()];
    let all = scopes.into_iter().flat_map(|scope| caches.map(|caches| (scope, caches)));
    all.map(|(scope, caches)| {
        let domain = DomainId(DOMAIN);
        Request::Invalidate(Invalidate { domain, scope, caches, leaf: false, tag: None, global: false })
    })
    .collect()
}

#[test]
fn attach_table_allocates_one_table() {
    let mut driven = Driven::new(Fakes::smmuv3(Layout::OneUnit, true));
    for index in [0, 1, 0] {
        let table = driven.cd_table();
        let counts = driven.send(&attach(index, table));
        assert_eq!((counts.of(Call::AllocHwpt), counts.of(Call::Attach)), (1, 1), "{counts:?}");
    }
    let mut driven = Driven::new(Fakes::vtd(Layout::OneUnit));
    for (index, pasid) in [(0, 5), (0, 7), (1, 5), (0, 5)] {
        let table = driven.page_table(pasid);
        let counts = driven.send(&attach(index, table));
        assert_eq!((counts.of(Call::AllocHwpt), counts.of(Call::Attach)), (1, 1), "{counts:?}");
    }
}

#[test]
fn invalidate_takes_at_most_two_ioctls() {
    let mut driven = Driven::new(Fakes::smmuv3(Layout::OneUnit, true));
    for index in 0..2 {
        let table = driven.cd_table();
        driven.send(&attach(index, table));
    }
    for request in invalidations() {
        let counts = driven.send(&request);
        let ioctls = counts.ioctls();
        assert!(
            (1..=2).contains(&ioctls) && counts.of(Call::Invalidate) == ioctls,
            "{request:?}: {counts:?}"
        );
    }
    // Descriptors, translations, device TLBs: one has to be complete before the next begins.
    for request in configuration() {
        let counts = driven.send(&request);
        let ioctls = counts.ioctls();
        assert!(
            (1..=3).contains(&ioctls) && counts.of(Call::Invalidate) == ioctls,
            "{request:?}: {counts:?}"
        );
    }
    assert_eq!(driven.fakes.fake.violations(), [""; 0]);
}

/// Without device TLBs two are enough for everything.
#[test]
fn invalidate_without_ats_takes_at_most_two_ioctls() {
    let mut driven = Driven::new(Fakes::smmuv3(Layout::OneUnit, false));
    for index in 0..2 {
        let table = driven.cd_table();
        driven.send(&attach(index, table));
    }
    for request in invalidations().into_iter().chain(configuration()) {
        let counts = driven.send(&request);
        assert!((1..=2).contains(&counts.ioctls()), "{request:?}: {counts:?}");
    }
}

/// One for each page table that a request is about.
#[test]
fn invalidate_of_vtd_takes_one_ioctl_for_each_table() {
    let mut driven = Driven::new(Fakes::vtd(Layout::OneUnit));
    for (index, pasid) in [(0, 5), (1, 5)] {
        let table = driven.page_table(pasid);
        driven.send(&attach(index, table));
    }
    for request in invalidations() {
        let Request::Invalidate(asked) = &request else { panic!() };
        let untagged = matches!(
            asked.scope,
            InvalidateScope::Pasid(None) | InvalidateScope::Address { pasid: None, .. }
        );
        if asked.tag.is_some() {
            continue;
        }
        let counts = driven.send(&request);
        let tables = if untagged { 0 } else { 2 };
        assert_eq!((counts.ioctls(), counts.of(Call::Invalidate)), (tables, tables), "{request:?}");
    }
}

/// MAP and UNMAP are one ioctl each, however many endpoints there are.
#[test]
fn map_and_unmap_take_one_ioctl() {
    for fakes in [Fakes::smmuv3(Layout::OneUnit, false), Fakes::vtd(Layout::TwoUnits)] {
        let mut driven = Driven::new(fakes);
        for endpoint in ENDPOINTS {
            driven.send(&request::attach(DOMAIN, endpoint.0));
        }
        for page in 1..20 {
            let start = page << 12;
            let counts = driven.send(&request::map(DOMAIN, start, start + 0xfff, Memory::page(page).0));
            assert_eq!((counts.ioctls(), counts.of(Call::Map)), (1, 1));
        }
        let counts = driven.send(&request::unmap(DOMAIN, 0x1000, 0x1fff));
        assert_eq!((counts.ioctls(), counts.of(Call::Unmap)), (1, 1));
        let counts = driven.send(&request::unmap(DOMAIN, 0x2000, 0xffff_ffff));
        assert!(counts.ioctls() >= 1 && counts.of(Call::Unmap) == counts.ioctls());
        assert_eq!(driven.bare.device.mapping_count(), 0);
    }
}
