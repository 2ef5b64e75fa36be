//! The device over a scripted machine.

mod base;
mod config;
mod event;
mod failure;
mod host;
mod page_requests;
mod probe;
mod sequence;
mod table;

use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt::Write;

use host::{Fails, TestHost, smmuv3, vtd};
use viommu_wire::*;

use crate::domain::DomainSpace;
use crate::endpoint::Bound;
use crate::host::Stream;
use crate::{Device, DeviceConfig, Handled};

const MSI: ReservedRegion = ReservedRegion { kind: ReservedKind::Msi, range: range(0x800_0000, 0x80f_ffff) };

const fn range(start: u64, last: u64) -> IovaRange {
    match IovaRange::new(Iova(start), Iova(last)) {
        Some(range) => range,
        None => panic!("inverted"),
    }
}

/// Endpoints 8 and 9: SMMUv3 tables and an MSI window. 16 and 17: VT-d tables. 24: no tables.
fn machine() -> TestHost {
    TestHost::default()
        .with(8, smmuv3(), vec![MSI])
        .with(9, smmuv3(), vec![MSI])
        .with(16, vtd(), vec![])
        .with(17, vtd(), vec![])
        .with(24, None, vec![])
}

/// All features accepted.
fn device() -> Device<TestHost> {
    device_with(DeviceConfig::default())
}

fn device_with(config: DeviceConfig) -> Device<TestHost> {
    let mut device = Device::new(config, machine()).unwrap();
    device.accept_features(device.offered_features()).unwrap();
    device
}

/// Sends a request whose writable part is a tail.
fn send(device: &mut Device<TestHost>, request: &Request) -> Status {
    raw(device, &request.encode())
}

fn raw(device: &mut Device<TestHost>, readable: &[u8]) -> Status {
    let mut writable = [0xee; 4];
    let Handled { used, rejection } = device.handle(readable, &mut writable);
    assert_eq!(used, 4, "{rejection:?}");
    assert_eq!(&writable[1..], [0; 3]);
    let status = Status::from_number(writable[0]).unwrap();
    assert_eq!(rejection.map_or(Some(Status::Ok), |rejection| rejection.status()), Some(status));
    consistent(device);
    status
}

/// That what the device recorded is what the host has.
fn consistent(device: &Device<TestHost>) {
    let mut streams = 0;
    let mut page_tables = 0;
    for at in 0..device.endpoints.len() {
        let endpoint = &device.endpoints[at];
        let expected = match endpoint.untagged {
            Bound::Nothing => None,
            Bound::Identity => Some("identity"),
            Bound::Domain => Some("mapped"),
            Bound::PasidTable(..) => Some("PASID table"),
            Bound::PageTable(_) => Some("page table"),
        };
        assert_eq!(device.host.bound_to(Stream::untagged(endpoint.id)), expected, "endpoint {}", endpoint.id);
        streams += usize::from(expected.is_some()) + endpoint.pasids.len();
        page_tables += endpoint.page_tables();
        for &pasid in endpoint.pasids.keys() {
            let stream = Stream { endpoint: endpoint.id, pasid: Some(pasid) };
            assert_eq!(device.host.bound_to(stream), Some("page table"));
        }
    }
    if device.stuck.is_empty() {
        assert_eq!(device.host.bound_streams(), streams);
    }
    assert_eq!(device.page_tables, page_tables);
    let mut mappings = 0;
    for place in 0..device.domains.len() {
        let domain = &device.domains[place];
        assert!(!domain.endpoints.is_empty());
        for &at in &domain.endpoints {
            assert_eq!(device.endpoints[at].domain, Some(domain.id));
        }
        if let DomainSpace::Mapped(mapped) = &domain.space {
            mappings += mapped.mappings;
        }
    }
    assert_eq!(device.mappings, mappings);
}

/// All that a guest could notice.
fn observe(device: &Device<TestHost>) -> String {
    let mut text = device.host.state();
    let mut domains: Vec<_> = (0..device.domains.len()).map(|place| &device.domains[place]).collect();
    domains.sort_by_key(|domain| domain.id);
    for domain in domains {
        let mut members: Vec<_> = domain.endpoints.iter().map(|&at| device.endpoints[at].id.0).collect();
        members.sort_unstable();
        writeln!(text, "domain {} {} {members:?}", domain.id, domain.kind()).unwrap();
        if let DomainSpace::Mapped(mapped) = &domain.space {
            writeln!(text, "{:?}", mapped.reserved.iter().collect::<Vec<_>>()).unwrap();
        }
    }
    let mut config = [0; Config::LEN];
    device.read_config(0, &mut config);
    writeln!(text, "{:?} {config:?} {}", device.features(), device.mappings).unwrap();
    text
}

fn attach(domain: u32, endpoint: u32) -> Request {
    let (domain, endpoint) = (DomainId(domain), EndpointId(endpoint));
    Request::Attach(Attach { domain, endpoint, flags: AttachFlags::empty() })
}

fn attach_bypass(domain: u32, endpoint: u32) -> Request {
    let (domain, endpoint) = (DomainId(domain), EndpointId(endpoint));
    Request::Attach(Attach { domain, endpoint, flags: AttachFlags::BYPASS })
}

fn detach(domain: u32, endpoint: u32) -> Request {
    Request::Detach(Detach { domain: DomainId(domain), endpoint: EndpointId(endpoint) })
}

/// Read and write; pages of 4 KiB, both numbers counting pages, the last one inside.
fn map(domain: u32, first: u64, last: u64) -> Request {
    map_bytes(domain, first << 12, (last << 12) + 0xfff, 0x4000_0000 + (first << 12))
}

fn map_bytes(domain: u32, start: u64, last: u64, output: u64) -> Request {
    Request::Map(Map {
        domain: DomainId(domain),
        virt_start: Iova(start),
        virt_end: Iova(last),
        phys_start: Gpa(output),
        flags: MapFlags::READ | MapFlags::WRITE,
    })
}

fn unmap(domain: u32, first: u64, last: u64) -> Request {
    unmap_bytes(domain, first << 12, (last << 12) + 0xfff)
}

fn unmap_bytes(domain: u32, start: u64, last: u64) -> Request {
    Request::Unmap(Unmap { domain: DomainId(domain), virt_start: Iova(start), virt_end: Iova(last) })
}

fn table(domain: u32, endpoint: u32, table: TableDescriptor) -> Request {
    Request::AttachTable(AttachTable { domain: DomainId(domain), endpoint: EndpointId(endpoint), table })
}

fn pasid(value: u32) -> Pasid {
    Pasid::new(value).unwrap()
}

/// A linear table of 1024 context descriptors.
fn cd_table(base: u64) -> TableDescriptor {
    TableDescriptor::Smmuv3 { ste0: base | 10 << 59, ste1: 2 }
}

fn page_table(root: u64, value: u32) -> TableDescriptor {
    let pasid = pasid(value);
    TableDescriptor::VtdPageTable(VtdPageTable { pgd: Gpa(root), flags: 0, addr_width: 48, pasid })
}

fn pasid_table(base: u64) -> TableDescriptor {
    let untagged = Pasid::ZERO;
    TableDescriptor::VtdPasidTable(VtdPasidTable { directory: Gpa(base), directory_lg2: 9, untagged })
}

fn unbind(value: u32) -> TableDescriptor {
    TableDescriptor::Unbind { pasid: pasid(value) }
}
