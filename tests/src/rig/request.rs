//! Requests with few words.

use viommu_wire::{
    Attach, AttachFlags, AttachTable, Detach, DomainId, EndpointId, Gpa, Iova, Map, MapFlags, Pasid, Probe,
    Request, TableDescriptor, Unmap, VtdPageTable, VtdPasidTable,
};

/// ATTACH to a domain of mappings.
pub const fn attach(domain: u32, endpoint: u32) -> Request {
    let (domain, endpoint) = (DomainId(domain), EndpointId(endpoint));
    Request::Attach(Attach { domain, endpoint, flags: AttachFlags::empty() })
}

/// ATTACH to a bypass domain.
pub const fn attach_bypass(domain: u32, endpoint: u32) -> Request {
    let (domain, endpoint) = (DomainId(domain), EndpointId(endpoint));
    Request::Attach(Attach { domain, endpoint, flags: AttachFlags::BYPASS })
}

/// DETACH.
pub const fn detach(domain: u32, endpoint: u32) -> Request {
    Request::Detach(Detach { domain: DomainId(domain), endpoint: EndpointId(endpoint) })
}

/// MAP for reads and writes.
pub const fn map(domain: u32, start: u64, last: u64, output: u64) -> Request {
    map_with(domain, start, last, output, MapFlags::READ.union(MapFlags::WRITE))
}

/// MAP.
pub const fn map_with(domain: u32, start: u64, last: u64, output: u64, flags: MapFlags) -> Request {
    Request::Map(Map {
        domain: DomainId(domain),
        virt_start: Iova(start),
        virt_end: Iova(last),
        phys_start: Gpa(output),
        flags,
    })
}

/// UNMAP.
pub const fn unmap(domain: u32, start: u64, last: u64) -> Request {
    Request::Unmap(Unmap { domain: DomainId(domain), virt_start: Iova(start), virt_end: Iova(last) })
}

/// PROBE.
pub const fn probe(endpoint: u32) -> Request {
    Request::Probe(Probe { endpoint: EndpointId(endpoint) })
}

/// ATTACH_TABLE.
pub const fn attach_table(domain: u32, endpoint: u32, table: TableDescriptor) -> Request {
    Request::AttachTable(AttachTable { domain: DomainId(domain), endpoint: EndpointId(endpoint), table })
}

/// A linear SMMUv3 table of `1 << bits` context descriptors; untagged DMA uses descriptor 0.
pub const fn cd_table(base: Gpa, bits: u8) -> TableDescriptor {
    TableDescriptor::Smmuv3 { ste0: base.0 | (bits as u64) << 59, ste1: 2 }
}

/// A VT-d page table with 4 levels for one PASID.
pub fn vtd_page_table(root: Gpa, pasid: u32) -> TableDescriptor {
    TableDescriptor::VtdPageTable(VtdPageTable {
        pgd: root,
        flags: 0,
        addr_width: 48,
        pasid: self::pasid(pasid),
    })
}

/// A VT-d PASID directory of 128 entries; untagged DMA uses PASID 0.
pub const fn vtd_pasid_table(directory: Gpa) -> TableDescriptor {
    TableDescriptor::VtdPasidTable(VtdPasidTable { directory, directory_lg2: 7, untagged: Pasid::ZERO })
}

/// Takes back the table of one PASID.
pub fn unbind(pasid: u32) -> TableDescriptor {
    TableDescriptor::Unbind { pasid: self::pasid(pasid) }
}

/// A PASID. Panics where it has more than 20 bits.
pub fn pasid(value: u32) -> Pasid {
    Pasid::new(value).expect("20 bits")
}
