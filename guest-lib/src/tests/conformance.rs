//! The statements of virtio 1.4, chapter "IOMMU Device", that bind a driver.

use alloc::{vec, vec::Vec};

use viommu_wire::{
    Attach, AttachFlags, DomainId, EndpointId, Event, FaultReason, Features, Gpa, Iova, IovaRange, Map,
    MapFlags, Property, Request, ReservedKind, ReservedRegion, Status, Unmap,
};

use super::{OFFERED, area, driver, driver_with, hex};
use crate::hal::fake::{self, FakeTransport};
use crate::{
    BypassDomain, DomainError, Driver, DriverOptions, Endpoint, EndpointProperties, MappedDomain, Mapping,
    NoBypass, Refusal, RequestError,
};

fn range(first: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova(first), Iova(last)).unwrap()
}

fn endpoint(id: u32, reserved: &[(u64, u64)]) -> Endpoint {
    let reserved = reserved
        .iter()
        .map(|&(first, last)| ReservedRegion { kind: ReservedKind::Reserved, range: range(first, last) })
        .collect();
    Endpoint::new(EndpointId(id), EndpointProperties { reserved, ..EndpointProperties::default() })
}

fn mapping(first: u64, last: u64) -> Mapping {
    Mapping { range: range(first, last), target: Gpa(0x10_0000), flags: MapFlags::READ }
}

fn negotiated(offered: Features, wanted: Features) -> Features {
    let platform = fake::platform();
    let device = FakeTransport::new(platform.memory.clone(), offered);
    let options = DriverOptions { features: wanted, ..DriverOptions::default() };
    let driver = Driver::new(platform, device.clone(), options).unwrap();
    assert_eq!(driver.features(), device.0.borrow().accepted);
    driver.features()
}

/// INPUT_RANGE, DOMAIN_RANGE and PROBE are accepted whenever they are offered.
#[test]
fn r1_accepts_ranges_and_probe() {
    let wanted = Features::INPUT_RANGE | Features::DOMAIN_RANGE | Features::PROBE;
    assert!(negotiated(OFFERED, Features::empty()).contains(wanted));
    let version_1 = Features::VERSION_1;
    assert_eq!(negotiated(Features::PROBE | version_1, Features::empty()), Features::PROBE | version_1);
    assert_eq!(negotiated(version_1, Features::all()), version_1);
}

/// Only `bypass` is ever written, only where negotiated, only 0 or 1; bits 7:1 are ignored on reading.
#[test]
fn r2_bypass_is_the_only_field_written() {
    let (mut driver, device) = driver();
    device.0.borrow_mut().config[36] = 0xfe;
    assert_eq!(driver.bypass(), Ok(false));
    device.0.borrow_mut().config[36] = 0xff;
    assert_eq!(driver.bypass(), Ok(true));
    driver.set_bypass(false).unwrap();
    driver.set_bypass(true).unwrap();
    driver
        .send(Request::Attach(Attach {
            domain: DomainId(1),
            endpoint: EndpointId(8),
            flags: AttachFlags::empty(),
        }))
        .unwrap();
    driver.probe(EndpointId(8)).unwrap();
    assert_eq!(device.0.borrow().config_writes, [(36, vec![0]), (36, vec![1])]);

    let (mut driver, device) = driver_with(OFFERED - Features::BYPASS_CONFIG);
    assert_eq!((driver.bypass(), driver.set_bypass(true)), (Err(NoBypass), Err(NoBypass)));
    assert!(device.0.borrow().config_writes.is_empty());
}

/// MAP_UNMAP is not accepted by a driver that was told not to use it, and then no MAP or UNMAP is sent. What is not
/// known to this library is not accepted either.
#[test]
fn r3_map_unmap_only_where_it_is_used() {
    assert!(negotiated(OFFERED, DriverOptions::default().features).contains(Features::MAP_UNMAP));
    assert!(!negotiated(OFFERED, Features::ATTACH_TABLE).contains(Features::MAP_UNMAP));
    let everything = negotiated(Features::all() | Features::from_bits_retain(1 << 60), Features::all());
    assert!(!everything.intersects(Features::BYPASS | Features::from_bits_retain(1 << 60)));

    let (mut driver, device) = driver_with(OFFERED - Features::MAP_UNMAP);
    let error = Err(RequestError::NotNegotiated(Features::MAP_UNMAP));
    assert_eq!(driver.map(DomainId(1), range(0x1000, 0x1fff), Gpa(0), MapFlags::READ), error);
    assert_eq!(driver.unmap(DomainId(1), range(0x1000, 0x1fff)), error);
    assert!(device.take_requests().is_empty());
}

/// An endpoint is probed before it is attached: attaching takes what only a probe makes.
#[test]
fn r4_probe_comes_before_attach() {
    let (mut driver, device) = driver();
    let endpoint = driver.probe(EndpointId(8)).unwrap();
    MappedDomain::new(&mut driver).unwrap().attach(&mut driver, &endpoint).unwrap();
    let kinds: Vec<u8> = device.take_requests().iter().map(|request| request[0]).collect();
    assert_eq!(kinds, [5, 1]);

    let (mut driver, device) = driver_with(OFFERED - Features::PROBE);
    let endpoint = driver.probe(EndpointId(8)).unwrap();
    driver.attach(DomainId(1), &endpoint, AttachFlags::empty()).unwrap();
    assert_eq!(device.take_requests().len(), 1, "no PROBE where it was not negotiated");
}

/// `head.reserved` is zero; `tail.reserved` is ignored.
#[test]
fn r5_reserved_bytes_of_head_and_tail() {
    let (mut driver, device) = driver();
    device.set_script(|readable, writable| {
        assert_eq!(readable[1..4], [0; 3]);
        let tail = writable.len() - 4;
        writable[..tail].fill(0);
        writable[tail..].copy_from_slice(&[0, 0xaa, 0xbb, 0xcc]);
        writable.len() as u32
    });
    let endpoint = driver.probe(EndpointId(8)).unwrap();
    assert_eq!(driver.attach(DomainId(1), &endpoint, AttachFlags::empty()), Ok(()));
}

/// A used length of 0 is a failure whatever the buffer says, and so is an answer that is not whole or has no meaning.
#[test]
fn r6_used_length_zero_is_a_failure() {
    let (mut driver, device) = driver();
    for (used, status, expected) in [
        (0, 0, Err(RequestError::Unwritten)),
        (1, 0, Err(RequestError::BadAnswer)),
        (4, 9, Err(RequestError::BadAnswer)),
        (4, 6, Err(RequestError::Status(Status::NoEnt))),
        (4, 0, Ok(())),
        (u32::MAX, 0, Ok(())),
    ] {
        device.set_script(move |_, writable| {
            writable[..4].copy_from_slice(&[status, 0, 0, 0]);
            used
        });
        assert_eq!(driver.detach(DomainId(1), EndpointId(8)), expected);
    }
    device.set_script(|_, writable| {
        writable.fill(0);
        4
    });
    assert_eq!(driver.probe(EndpointId(8)).err(), Some(RequestError::BadAnswer));
}

/// Nothing outside of the negotiated ranges is sent; ranges that were not negotiated do not count.
#[test]
fn r7_ranges_are_respected() {
    let (mut driver, device) = driver();
    let rw = MapFlags::READ | MapFlags::WRITE;
    for bad in
        [range(0, 0xfff), range(0, 0x1fff), range(0xff_ffff_f000, 0x100_0000_0fff), range(1 << 40, u64::MAX)]
    {
        let refused = Err(RequestError::Refused(Refusal::Range(bad)));
        assert_eq!(driver.map(DomainId(1), bad, Gpa(0), rw), refused);
        assert_eq!(driver.unmap(DomainId(1), bad), refused);
    }
    for bad in [0, 101, u32::MAX].map(DomainId) {
        let refused = Err(RequestError::Refused(Refusal::Domain(bad)));
        assert_eq!(driver.map(bad, range(0x1000, 0x1fff), Gpa(0), rw), refused);
        assert_eq!(driver.unmap(bad, range(0x1000, 0x1fff)), refused);
        assert_eq!(driver.attach(bad, &endpoint(8, &[]), AttachFlags::empty()), refused);
        assert_eq!(driver.detach(bad, EndpointId(8)), refused);
    }
    assert!(device.take_requests().is_empty());
    assert_eq!(driver.map(DomainId(100), range(0x1000, (1 << 40) - 1), Gpa(0), rw), Ok(()));

    // The fields hold what they like where they were not negotiated.
    let platform = fake::platform();
    let device = FakeTransport::new(platform.memory.clone(), Features::MAP_UNMAP | Features::VERSION_1);
    device.0.borrow_mut().config[8..].copy_from_slice(&[0xff, 0].repeat(16));
    let mut driver = Driver::new(platform, device, DriverOptions::default()).unwrap();
    assert_eq!(driver.map(DomainId(u32::MAX), range(0, u64::MAX), Gpa(0), rw), Ok(()));
    assert_eq!(driver.unmap(DomainId(0), range(1 << 63, u64::MAX)), Ok(()));
}

/// The reserved bytes of ATTACH, DETACH, UNMAP and PROBE are zero.
#[test]
fn r8_reserved_bytes_of_requests_are_zero() {
    let (mut driver, device) = driver();
    // Leave other bytes in the buffers first.
    for _ in 0..20 {
        driver.map(DomainId(77), range(0x1000, 0x1fff), Gpa(0xffff_f000), MapFlags::all()).unwrap();
    }
    device.take_requests();
    driver.attach(DomainId(1), &endpoint(8, &[]), AttachFlags::empty()).unwrap();
    driver.unmap(DomainId(1), range(0x1000, 0x1fff)).unwrap();
    driver.detach(DomainId(1), EndpointId(8)).unwrap();
    driver.probe(EndpointId(8)).unwrap();
    let requests = device.take_requests();
    assert_eq!(requests[0][16..], [0; 4]);
    assert_eq!(requests[1][24..], [0; 4]);
    assert_eq!(requests[2][12..], [0; 8]);
    assert_eq!(requests[3][8..], [0; 64]);
}

/// Endpoints that cannot be told apart share a domain: a domain takes any number of them, and their reserved regions
/// all count.
#[test]
fn r9_endpoints_can_share_a_domain() {
    let (mut driver, device) = driver();
    let mut domain = MappedDomain::new(&mut driver).unwrap();
    domain.attach(&mut driver, &endpoint(8, &[])).unwrap();
    domain.attach(&mut driver, &endpoint(9, &[(0x8000, 0x8fff)])).unwrap();
    let requests = device.take_requests();
    assert_eq!(requests[0][4..8], requests[1][4..8]);
    assert!(matches!(domain.map(&mut driver, mapping(0x8000, 0x8fff)), Err(DomainError::Reserved(_))));
    domain.map(&mut driver, mapping(0x9000, 0x9fff)).unwrap();
    let late = domain.attach(&mut driver, &endpoint(10, &[(0x9800, 0x98ff)]));
    assert_eq!(late, Err(DomainError::Reserved(range(0x9800, 0x98ff))));
}

/// Every ATTACH to one domain has the same flag, and BYPASS is sent only where it was negotiated.
#[test]
fn r10_bypass_flag_fits_the_domain() {
    let (mut driver, device) = driver();
    let bypass = BypassDomain::new(&mut driver).unwrap();
    let mut mapped = MappedDomain::new(&mut driver).unwrap();
    for id in 0..3 {
        bypass.attach(&mut driver, &endpoint(id, &[])).unwrap();
        mapped.attach(&mut driver, &endpoint(id + 3, &[])).unwrap();
    }
    let sent: Vec<(u8, u8)> =
        device.take_requests().iter().map(|request| (request[4], request[12])).collect();
    assert_eq!(sent, [(1, 1), (2, 0), (1, 1), (2, 0), (1, 1), (2, 0)]);

    let (mut driver, device) = driver_with(OFFERED - Features::BYPASS_CONFIG);
    let bypass = BypassDomain::new(&mut driver).unwrap();
    let refused = DomainError::Request(RequestError::NotNegotiated(Features::BYPASS_CONFIG));
    assert_eq!(bypass.attach(&mut driver, &endpoint(8, &[])), Err(refused));
    assert!(device.take_requests().is_empty());
}

/// MAP: no undefined flags, no MMIO where it was not negotiated, the end is greater than the start. A bypass domain has
/// no method that sends MAP or UNMAP.
#[test]
fn r11_map_is_well_formed() {
    let (mut driver, device) = driver();
    let undefined = MapFlags::from_bits_retain(0x11);
    let refused = Err(RequestError::Refused(Refusal::Flags(0x10)));
    assert_eq!(driver.map(DomainId(1), range(0x1000, 0x1fff), Gpa(0), undefined), refused);
    for (first, last) in [(0x2000, 0x1fff), (0x2000, 0x2000), (u64::MAX, 0)] {
        let (virt_start, virt_end) = (Iova(first), Iova(last));
        let refused = Err(RequestError::Refused(Refusal::Inverted { first: virt_start, last: virt_end }));
        let flags = MapFlags::READ;
        let map = Map { domain: DomainId(1), virt_start, virt_end, phys_start: Gpa(0), flags };
        assert_eq!(driver.send(Request::Map(map)), refused);
        assert_eq!(driver.send(Request::Unmap(Unmap { domain: DomainId(1), virt_start, virt_end })), refused);
    }
    let misaligned = Err(RequestError::Refused(Refusal::Misaligned { granule_lg2: 12 }));
    for (bad, target) in
        [(range(0x1800, 0x1fff), 0), (range(0x1000, 0x17ff), 0), (range(0x1000, 0x1fff), 0x800)]
    {
        assert_eq!(driver.map(DomainId(1), bad, Gpa(target), MapFlags::READ), misaligned);
    }
    let wraps = driver.map(DomainId(1), range(0x1000, 0x2fff), Gpa(u64::MAX - 0xfff), MapFlags::READ);
    assert_eq!(wraps, Err(RequestError::Refused(Refusal::Physical(Gpa(u64::MAX - 0xfff)))));
    assert!(device.take_requests().is_empty());

    let (mut driver, device) = driver_with(OFFERED - Features::MMIO);
    let mmio = driver.map(DomainId(1), range(0x1000, 0x1fff), Gpa(0), MapFlags::MMIO | MapFlags::WRITE);
    assert_eq!(mmio, Err(RequestError::NotNegotiated(Features::MMIO)));
    assert!(device.take_requests().is_empty());
}

/// UNMAP never splits a mapping, at either end.
#[test]
fn r12_unmap_splits_no_mapping() {
    let (mut driver, device) = driver();
    let mut domain = MappedDomain::new(&mut driver).unwrap();
    domain.attach(&mut driver, &endpoint(8, &[])).unwrap();
    for (first, last) in [(0x1_0000, 0x1_ffff), (0x2_0000, 0x2_ffff), (0x4_0000, 0x4_ffff)] {
        domain.map(&mut driver, mapping(first, last)).unwrap();
    }
    device.take_requests();
    for (first, last) in [
        (0x1_1000, 0x1_ffff),
        (0x1_0000, 0x1_efff),
        (0x1_2000, 0x1_2fff),
        (0x8000, 0x4_0fff),
        (0x1_0000, 0x2_0fff),
    ] {
        let split = Err(DomainError::Split(range(first, last)));
        assert_eq!(domain.unmap(&mut driver, range(first, last)), split);
    }
    assert!(device.take_requests().is_empty());
    assert_eq!(domain.unmap(&mut driver, range(0x2_0000, 0x3_ffff)), Ok(()));
    assert_eq!(domain.unmap(&mut driver, range(0x1000, 0xf_ffff)), Ok(()));
    assert_eq!(domain.mappings().count(), 0);
}

/// The buffer for properties is exactly `probe_size`; unknown types, types with reserved bits and values that are too
/// short are passed over; a length is believed even where the type says otherwise; what follows still counts.
#[test]
fn r13_probe_buffer_and_unknown_properties() {
    let (mut driver, device) = driver();
    let mut properties = vec![];
    properties.extend(hex("ff0f 0300 112233")); // unknown, of odd length
    properties.extend(hex("0110 1400 01000000 0000000000000000 ff0f000000000000")); // reserved bits
    properties.extend(hex("0100 0400 01000000")); // too short
    properties.extend(hex("0108 1000 00000000 0201000000000000 99999999")); // TABLE_FORMATS, longer than known
    properties.extend(hex("0100 1400 01000000 0000e0fe00000000 ffffeffe00000000"));
    device.set_script(move |_, writable| {
        writable.fill(0);
        writable[..properties.len()].copy_from_slice(&properties);
        writable.len() as u32
    });
    let endpoint = driver.probe(EndpointId(8)).unwrap();
    let found = endpoint.properties();
    assert_eq!((found.unknown, found.malformed), (1, 2));
    assert_eq!(found.formats.iter().collect::<Vec<_>>(), [2, 1]);
    assert_eq!(found.msi(), Some(range(0xfee0_0000, 0xfeef_ffff)));
    let received = device.0.borrow().received[0].clone();
    assert_eq!(received.writable.iter().map(|(_, length)| *length).collect::<Vec<_>>(), [256 + 4]);

    // A list that fills the area to the last byte, and one that is cut off.
    let mut full = area(&[Property::PasidSize { bits: 7 }]);
    full.extend(hex("ff0f f400"));
    full.resize(256, 0);
    assert_eq!((full.len(), EndpointProperties::parse(&full).unknown), (256, 1));
    let cut = EndpointProperties::parse(&hex("0008 0400 07000000 ff0f ff00 0000"));
    assert_eq!((cut.pasid_bits, cut.malformed), (7, 1));
    // Stated twice: the first counts.
    let twice = area(&[Property::PasidSize { bits: 7 }, Property::PasidSize { bits: 9 }]);
    assert_eq!(
        (EndpointProperties::parse(&twice).pasid_bits, EndpointProperties::parse(&twice).malformed),
        (7, 1)
    );
}

/// Reserved regions are not mapped, their reserved bytes are ignored, an unknown subtype counts as RESERVED.
#[test]
fn r14_reserved_regions_are_not_mapped() {
    let (mut driver, device) = driver();
    let properties = hex("0100 1400 07aabbcc 0080000000000000 ff8f000000000000");
    device.0.borrow_mut().script = fake::answer_ok(properties);
    let endpoint = driver.probe(EndpointId(8)).unwrap();
    let region = ReservedRegion { kind: ReservedKind::Reserved, range: range(0x8000, 0x8fff) };
    assert_eq!(endpoint.properties().reserved, [region]);
    let mut domain = MappedDomain::new(&mut driver).unwrap();
    domain.attach(&mut driver, &endpoint).unwrap();
    device.take_requests();
    for bad in [
        mapping(0x8000, 0x8fff),
        mapping(0x1000, 0x8fff),
        mapping(0x8000, 0x1_ffff),
        mapping(0x1000, 0xf_ffff),
    ] {
        assert_eq!(domain.map(&mut driver, bad), Err(DomainError::Reserved(bad.range)));
    }
    assert!(device.take_requests().is_empty());
    domain.map(&mut driver, mapping(0x7000, 0x7fff)).unwrap();
    domain.map(&mut driver, mapping(0x9000, 0x9fff)).unwrap();
}

/// A report with `reserved` set is ignored; `reserved1`, undefined flags and what follows byte 24 are not looked at; an
/// unknown reason is UNKNOWN.
#[test]
fn r15_events_are_read_leniently_where_they_must_be() {
    let (mut driver, device) = driver();
    let ignored = [
        hex("02010000 01010000 08000000 00000000 0010000000000000"),
        hex("02000001 01010000 08000000 00000000 0010000000000000"),
    ];
    for record in &ignored {
        assert!(device.send_event(record, 24));
    }
    assert!(device.send_event(&hex("02000000 01010000 08000000 00000000 0010000000000000"), 23));
    assert!(device.send_event(&hex("63000000 010100f0 08000000 ffffffff 0010000000000000"), 24));
    let mut longer = hex("01000000 02000000 09000000 ffffffff ffffffffffffffff");
    longer.extend([0xff; 24]);
    assert!(device.send_event(&longer, 48));
    let mut seen = vec![];
    assert_eq!(driver.handle_events(|event| seen.push(event)), Ok(2));
    assert_eq!((driver.event_counters().delivered, driver.event_counters().ignored), (2, 3));
    let [Event::Fault(first), Event::Fault(second)] = seen[..] else { panic!("{seen:?}") };
    assert_eq!(
        (first.reason, first.endpoint, first.address),
        (FaultReason::Unknown, EndpointId(8), Some(Iova(0x1000)))
    );
    assert_eq!((second.reason, second.endpoint, second.address), (FaultReason::Domain, EndpointId(9), None));
    assert_eq!((first.pasid, second.pasid), (None, None));
}
