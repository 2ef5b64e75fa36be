//! Golden bytes, one vector per layout.
//!
//! Origin of each: computed by hand from the specification's listings (virtio 1.4, 5.13; the 2023 ATTACH_TABLE
//! proposal; this project's private layouts), independently of the code under test.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops where it finds something wrong")]

use viommu_wire::{
    AccessFlags, ArmPageTable, Attach, AttachFlags, AttachTable, Caches, Config, Detach, DomainId,
    DomainRange, EndpointId, Event, FaultEvent, FaultReason, Gpa, Invalidate, InvalidateScope, Iova,
    IovaRange, Map, MapFlags, PageRequest, PageRequestFlags, PageResponse, PageResponseCode, Pasid, Probe,
    Properties, Property, Request, ReservedKind, ReservedRegion, Status, TableDescriptor, TableFormats, Tail,
    Unmap, VtdPageTable, VtdPasidTable,
};

/// Bytes from hex digits; blanks are for the reader.
fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let digit = |byte: u8| u8::try_from(char::from(byte).to_digit(16).unwrap()).unwrap();
    digits.chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}

fn padded(text: &str, length: usize) -> Vec<u8> {
    let mut bytes = hex(text);
    assert!(bytes.len() <= length);
    bytes.resize(length, 0);
    bytes
}

fn pasid(value: u32) -> Pasid {
    Pasid::new(value).unwrap()
}

fn range(start: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova(start), Iova(last)).unwrap()
}

#[track_caller]
fn request(meaning: Request, bytes: &[u8]) {
    assert_eq!(&*meaning.encode(), bytes);
    assert_eq!(Request::decode(bytes), Ok(meaning));
    assert_eq!(bytes.len(), meaning.kind().readable_len());
}

#[test]
fn attach() {
    let attach = Attach { domain: DomainId(1), endpoint: EndpointId(8), flags: AttachFlags::empty() };
    request(Request::Attach(attach), &hex("01000000 01000000 08000000 00000000 00000000"));
}

#[test]
fn attach_bypass() {
    let attach = Attach { domain: DomainId(2), endpoint: EndpointId(0x10008), flags: AttachFlags::BYPASS };
    request(Request::Attach(attach), &hex("01000000 02000000 08000100 01000000 00000000"));
}

#[test]
fn detach() {
    let detach = Detach { domain: DomainId(1), endpoint: EndpointId(8) };
    request(Request::Detach(detach), &hex("02000000 01000000 08000000 0000000000000000"));
}

#[test]
fn map() {
    let map = Map {
        domain: DomainId(1),
        virt_start: Iova(0x1000),
        virt_end: Iova(0x1fff),
        phys_start: Gpa(0xa000),
        flags: MapFlags::READ | MapFlags::WRITE,
    };
    request(
        Request::Map(map),
        &hex("03000000 01000000 0010000000000000 ff1f000000000000 00a0000000000000 03000000"),
    );
}

#[test]
fn unmap() {
    let unmap = Unmap { domain: DomainId(1), virt_start: Iova(0x1000), virt_end: Iova(0x1fff) };
    request(Request::Unmap(unmap), &hex("04000000 01000000 0010000000000000 ff1f000000000000 00000000"));
}

#[test]
fn probe() {
    request(Request::Probe(Probe { endpoint: EndpointId(8) }), &padded("05000000 08000000", 72));
}

#[test]
fn attach_table_smmuv3() {
    let table = TableDescriptor::Smmuv3 { ste0: 0x5000_0000_8000_1020, ste1: 2 };
    let attach = AttachTable { domain: DomainId(1), endpoint: EndpointId(8), table };
    request(
        Request::AttachTable(attach),
        &padded("06000000 01000000 08000000 01000000 2010008000000050 0200000000000000", 124),
    );
}

#[test]
fn attach_table_vtd_page_table() {
    let table = TableDescriptor::VtdPageTable(VtdPageTable {
        pgd: Gpa(0x4123_4000),
        flags: 1,
        addr_width: 48,
        pasid: pasid(5),
    });
    let attach = AttachTable { domain: DomainId(3), endpoint: EndpointId(16), table };
    request(
        Request::AttachTable(attach),
        &padded(
            "06000000 03000000 10000000 02000000 0040234100000000 0100000000000000 30000000 05000000",
            124,
        ),
    );
}

#[test]
fn attach_table_vtd_pasid_table() {
    let table = TableDescriptor::VtdPasidTable(VtdPasidTable {
        directory: Gpa(0x4100_0000),
        directory_lg2: 14,
        untagged: pasid(1),
    });
    let attach = AttachTable { domain: DomainId(3), endpoint: EndpointId(16), table };
    request(
        Request::AttachTable(attach),
        &padded("06000000 03000000 10000000 81000000 0000004100000000 01000000 0e", 124),
    );
}

#[test]
fn attach_table_arm_page_table() {
    let table = TableDescriptor::ArmPageTable(ArmPageTable {
        pasid: pasid(5),
        asid: 0x2a,
        tcr: 0x8080_3510,
        ttbr0: 0x4000_1000,
        ttbr1: 0x4000_2000,
        mair: 0xff,
    });
    let attach = AttachTable { domain: DomainId(1), endpoint: EndpointId(8), table };
    let bytes = "06000000 01000000 08000000 80000000 05000000 2a000000 1035808000000000
        0010004000000000 0020004000000000 ff00000000000000";
    request(Request::AttachTable(attach), &padded(bytes, 124));
}

#[test]
fn attach_table_unbind() {
    let table = TableDescriptor::Unbind { pasid: pasid(5) };
    let attach = AttachTable { domain: DomainId(1), endpoint: EndpointId(16), table };
    request(Request::AttachTable(attach), &padded("06000000 01000000 10000000 00000000 05000000", 124));
}

#[test]
fn invalidate_address() {
    let invalidate = Invalidate {
        domain: DomainId(1),
        scope: InvalidateScope::Address {
            pasid: Some(pasid(5)),
            range: range(0x7f00_0000_0000, 0x7f00_0000_ffff),
            page_lg2: 12,
        },
        caches: Caches::TLB,
        leaf: true,
        tag: Some(0x2a),
        global: false,
    };
    let bytes = "07000000 03 02 0700 01000000 05000000 2a00000000000000 00000000007f0000 1000000000000000 0c";
    request(Request::Invalidate(invalidate), &padded(bytes, 60));
}

#[test]
fn invalidate_domain() {
    let invalidate = Invalidate {
        domain: DomainId(1),
        scope: InvalidateScope::Domain,
        caches: Caches::PASID | Caches::TLB,
        leaf: false,
        tag: None,
        global: false,
    };
    request(Request::Invalidate(invalidate), &padded("07000000 01 03 0000 01000000", 60));
}

#[test]
fn page_response() {
    let response = PageResponse {
        endpoint: EndpointId(8),
        pasid: Some(pasid(5)),
        group_id: 3,
        code: PageResponseCode::Invalid,
    };
    request(
        Request::PageResponse(response),
        &hex("08000000 08000000 01000000 05000000 0300 0100 0000000000000000"),
    );
}

#[track_caller]
fn property(meaning: Property, bytes: &[u8]) {
    let mut area = [0xaa; 64];
    assert_eq!(meaning.encode(&mut area), Some(bytes.len()));
    assert_eq!(&area[..bytes.len()], bytes);
    assert_eq!(Properties::new(bytes).collect::<Vec<_>>(), [Ok(meaning)]);
}

#[test]
fn reserved_region_msi() {
    let region = ReservedRegion { kind: ReservedKind::Msi, range: range(0xfee0_0000, 0xfeef_ffff) };
    property(Property::ReservedRegion(region), &hex("0100 1400 01000000 0000e0fe00000000 ffffeffe00000000"));
}

#[test]
fn hw_arm_smmu3() {
    let registers = Property::HwArmSmmu3 { idr0: 0x0d44_101b, idr1: 0x0273_0010, idr3: 0x1414, idr5: 0x74 };
    let bytes = "0200 3400 00000000 1b10440d00000000 1000730200000000 0000000000000000
        1414000000000000 0000000000000000 7400000000000000";
    property(registers, &hex(bytes));
}

#[test]
fn hw_intel_vtd() {
    let registers = Property::HwIntelVtd { cap: 0x81d2_008c_222f_0606, ecap: 0x8998_0000_0f46 };
    property(registers, &hex("0300 1400 00000000 06062f228c00d281 460f000098890000"));
}

#[test]
fn pasid_size() {
    property(Property::PasidSize { bits: 20 }, &hex("0008 0400 14000000"));
}

#[test]
fn table_formats() {
    let formats = TableFormats::new(&[0x81, 2]).unwrap();
    property(Property::TableFormats(formats), &hex("0108 0c00 00000000 8102000000000000"));
}

#[test]
fn page_requests() {
    property(Property::PageRequests(PageRequestFlags::empty()), &hex("0208 0400 00000000"));
    property(Property::PageRequests(PageRequestFlags::all()), &hex("0208 0400 03000000"));
}

#[track_caller]
fn event(meaning: Event, bytes: &[u8]) {
    let mut buffer = [0xaa; 48];
    assert_eq!(meaning.encode(&mut buffer), Some(bytes.len()));
    assert_eq!(&buffer[..bytes.len()], bytes);
    assert_eq!(Event::decode(bytes), Some(meaning));
}

#[test]
fn fault_event() {
    let fault = FaultEvent {
        reason: FaultReason::Mapping,
        access: AccessFlags::WRITE,
        endpoint: EndpointId(8),
        pasid: None,
        address: Some(Iova(0x123_4000)),
    };
    event(Event::Fault(fault), &hex("02000000 02010000 08000000 00000000 0040230100000000"));
}

#[test]
fn fault_event_with_pasid() {
    let fault = FaultEvent {
        reason: FaultReason::Unknown,
        access: AccessFlags::READ,
        endpoint: EndpointId(16),
        pasid: Some(pasid(5)),
        address: None,
    };
    event(Event::Fault(fault), &hex("00000000 01020000 10000000 05000000 0000000000000000"));
}

#[test]
fn page_request() {
    let asked = PageRequest {
        access: AccessFlags::WRITE,
        endpoint: EndpointId(8),
        pasid: Some(pasid(5)),
        address: Iova(0x7f00_0000_1000),
        group_id: 3,
        last: true,
        private_data: None,
    };
    let bytes = padded("02000000 32070000 08000000 05000000 00100000007f0000 0300", 48);
    event(Event::PageRequest(asked), &bytes);
}

#[test]
fn page_request_with_private_data() {
    let asked = PageRequest {
        access: AccessFlags::READ | AccessFlags::EXEC | AccessFlags::PRIVILEGED,
        endpoint: EndpointId(16),
        pasid: None,
        address: Iova(0x1000),
        group_id: 0x1ff,
        last: false,
        private_data: Some([1, 2]),
    };
    let bytes = hex("02000000 2d0d0000 10000000 00000000 0010000000000000
        ff01 000000000000 0100000000000000 0200000000000000");
    event(Event::PageRequest(asked), &bytes);
}

#[test]
fn tail() {
    assert_eq!(Tail { status: Status::Inval }.encode(), *hex("04000000"));
    assert_eq!(
        Tail::decode(&hex("04ffffff")),
        Some(Tail { status: Status::Inval }),
        "R-5: reserved is ignored"
    );
    assert_eq!(Tail::decode(&hex("09000000")), None);
}

#[test]
fn config() {
    let config = Config {
        page_size_mask: 0xffff_ffff_ffff_f000,
        input_range: range(0, 0xffff_ffff_ffff),
        domain_range: DomainRange::new(DomainId(1), DomainId(0xffff)).unwrap(),
        probe_size: 512,
        bypass: true,
    };
    let bytes =
        hex("00f0ffffffffffff 0000000000000000 ffffffffffff0000 01000000 ffff0000 00020000 01 000000");
    assert_eq!(config.encode().to_vec(), bytes);
    assert_eq!(Config::decode(&config.encode()), Some(config));
}
