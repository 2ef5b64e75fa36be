//! The driver's side, R-1 to R-15: `viommu-guest` against the device, and against one that does what it should not.

use pgtable_formats::format::Attrs;
use viommu_device::{DeviceConfig, Features, Gpa, Iova, IovaRange, Status};
use viommu_guest::tables::{AddressSpace, PasidTable, SpaceOptions, TableOptions};
use viommu_guest::{
    BypassDomain, DomainError, DriverOptions, InitError, MappedDomain, Mapping, Refusal, RequestError,
};
use viommu_tests::rig::{Guest, Memory, Scripted, Setup, request};
use viommu_wire::{
    AttachFlags, Config, DomainId, EndpointId, Event, FaultReason, MapFlags, Property, Request, ReservedKind,
    ReservedRegion,
};

const RW: MapFlags = MapFlags::READ.union(MapFlags::WRITE);

fn range(start: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova(start), Iova(last)).unwrap()
}

fn mapping(start: u64, last: u64, target: u64, flags: MapFlags) -> Mapping {
    Mapping { range: range(start, last), target: Gpa(target), flags }
}

/// A driver on a scripted device, which has received nothing yet.
fn scripted(offered: Features) -> Guest<Scripted> {
    scripted_with(offered, DriverOptions::default()).unwrap()
}

fn scripted_with(offered: Features, options: DriverOptions) -> Result<Guest<Scripted>, InitError> {
    let memory = Memory::new(64 << 20);
    Guest::over(Scripted::new(&memory, offered), &memory, options)
}

/// What the driver sent, decoded. Panics where it sent reserved bytes that are not zero.
fn sent(guest: &Guest<Scripted>) -> Vec<Request> {
    let decode = |(bytes, _): (Vec<u8>, usize)| {
        let request = Request::decode(&bytes).unwrap();
        assert_eq!(request.encode().as_ref(), bytes, "every reserved byte is zero");
        request
    };
    guest.machine.received().into_iter().map(decode).collect()
}

#[test]
fn r1_ranges_and_probe_are_accepted_whatever_is_asked_for() {
    let options = DriverOptions { features: Features::MAP_UNMAP, ..DriverOptions::default() };
    let must = Features::INPUT_RANGE | Features::DOMAIN_RANGE | Features::PROBE;
    let mut guest = scripted_with(DeviceConfig::FEATURES, options).unwrap();
    assert!(guest.driver.transport_mut().accepted.contains(must | Features::VERSION_1));
    let guest = Guest::with_options(Setup::default(), options).unwrap();
    assert!(guest.driver.features().contains(must));
}

#[test]
fn r2_nothing_but_bypass_is_written_and_only_once_it_is_negotiated() {
    let mut guest = Guest::new(Setup::default());
    assert_eq!(guest.driver.bypass(), Ok(false));
    guest.driver.set_bypass(true).unwrap();
    assert_eq!((guest.driver.bypass(), guest.machine.read(8, 0x1000)), (Ok(true), Some(0x1000)));
    guest.driver.set_bypass(false).unwrap();
    assert_eq!(guest.machine.read(8, 0x1000), None);
    let writes = &guest.driver.transport_mut().config_writes;
    assert_eq!(writes[..], [(Config::BYPASS_OFFSET, vec![1]), (Config::BYPASS_OFFSET, vec![0])]);

    let mut guest = Guest::new(Setup::offering(DeviceConfig::FEATURES - Features::BYPASS_CONFIG));
    assert!(guest.driver.set_bypass(true).is_err());
    assert!(guest.driver.bypass().is_err());
    assert!(guest.driver.transport_mut().config_writes.is_empty());
}

#[test]
fn r2_other_bits_of_bypass_are_ignored() {
    let mut guest = scripted(DeviceConfig::FEATURES);
    for (byte, bypass) in [(0xfe, false), (0xff, true), (0x80, false), (0x03, true)] {
        guest.machine.set_config(Config::BYPASS_OFFSET, &[byte]);
        assert_eq!(guest.driver.bypass(), Ok(bypass), "{byte:#x}");
    }
}

#[test]
fn r3_map_unmap_is_not_negotiated_where_the_caller_has_no_use_for_it() {
    let features = Features::ATTACH_TABLE | Features::BYPASS_CONFIG;
    let options = DriverOptions { features, ..DriverOptions::default() };
    let mut guest = Guest::with_options(Setup::default(), options).unwrap();
    assert!(!guest.driver.features().contains(Features::MAP_UNMAP));
    let refused = RequestError::NotNegotiated(Features::MAP_UNMAP);
    let (page, before) = (range(0x1000, 0x1fff), *guest.driver.counters());
    assert_eq!(guest.driver.map(DomainId(1), page, Gpa(0), RW), Err(refused));
    assert_eq!(guest.driver.unmap(DomainId(1), page), Err(refused));
    assert_eq!(*guest.driver.counters(), before, "neither is sent");
}

#[test]
fn r4_an_endpoint_is_probed_before_it_is_attached() {
    // To attach takes an `Endpoint`, and only a PROBE gives one.
    let mut guest = scripted(DeviceConfig::FEATURES);
    let endpoint = guest.driver.probe(EndpointId(8)).unwrap();
    guest.driver.attach(DomainId(3), &endpoint, AttachFlags::empty()).unwrap();
    assert_eq!(sent(&guest), [request::probe(8), request::attach(3, 8)]);
    // Where the PROBE fails there is no endpoint.
    guest.machine.script(|_, writable| {
        let tail = writable.len() - 4;
        writable[tail] = Status::NoEnt.number();
        writable.len()
    });
    assert_eq!(guest.driver.probe(EndpointId(9)).err(), Some(RequestError::Status(Status::NoEnt)));
}

#[test]
fn r5_reserved_bytes_of_the_tail_are_ignored_and_of_the_head_zero() {
    let mut guest = scripted(DeviceConfig::FEATURES);
    let endpoint = guest.driver.probe(EndpointId(8)).unwrap();
    guest.machine.script(|readable, writable| {
        assert_eq!(readable[1..4], [0; 3]);
        writable.copy_from_slice(&[0, 0xff, 0xfe, 0xfd]);
        4
    });
    assert_eq!(guest.driver.attach(DomainId(3), &endpoint, AttachFlags::empty()), Ok(()));
    guest.machine.script(|_, writable| {
        writable.copy_from_slice(&[Status::Inval.number(), 1, 2, 3]);
        4
    });
    let refused = Err(RequestError::Status(Status::Inval));
    assert_eq!(guest.driver.attach(DomainId(3), &endpoint, AttachFlags::empty()), refused);
}

#[test]
fn r6_a_used_length_of_zero_is_a_failure() {
    let mut guest = scripted(DeviceConfig::FEATURES);
    let endpoint = guest.driver.probe(EndpointId(8)).unwrap();
    // Whatever the device left in the buffer.
    guest.machine.script(|_, writable| {
        writable.fill(0);
        0
    });
    let page = range(0x10_0000, 0x10_0fff);
    assert_eq!(guest.driver.map(DomainId(3), page, Gpa(0), RW), Err(RequestError::Unwritten));
    assert_eq!(guest.driver.detach(DomainId(3), EndpointId(8)), Err(RequestError::Unwritten));
    assert_eq!(guest.driver.probe(EndpointId(8)).err(), Some(RequestError::Unwritten));
    // Nor is an answer that is cut, or that has no meaning, a success.
    for (used, status) in [(1, 0), (3, 0), (4, 9), (4, 0xff)] {
        guest.machine.script(move |_, writable| {
            writable[0] = status;
            used
        });
        let answer = guest.driver.attach(DomainId(3), &endpoint, AttachFlags::empty());
        assert_eq!(answer, Err(RequestError::BadAnswer), "{used} {status}");
    }
    // A domain does not take a mapping for made that was not.
    guest.machine.script(|_, writable| writable.len());
    let mut domain = MappedDomain::new(&mut guest.driver).unwrap();
    domain.attach(&mut guest.driver, &endpoint).unwrap();
    guest.machine.script(|_, _| 0);
    assert!(domain.map(&mut guest.driver, mapping(0x10_0000, 0x10_0fff, 0, RW)).is_err());
    assert_eq!(domain.mappings().count(), 0);
}

#[test]
fn r7_ranges_are_respected_where_they_were_negotiated() {
    let mut guest = scripted(DeviceConfig::FEATURES);
    let endpoint = guest.driver.probe(EndpointId(8)).unwrap();
    guest.machine.received();
    for domain in [0, 2, 10, u32::MAX] {
        let id = DomainId(domain);
        let refused = Err(RequestError::Refused(Refusal::Domain(id)));
        assert_eq!(guest.driver.attach(id, &endpoint, AttachFlags::empty()), refused);
        assert_eq!(guest.driver.detach(id, EndpointId(8)), refused);
        assert_eq!(guest.driver.map(id, range(0x1_0000, 0x1_0fff), Gpa(0), RW), refused);
    }
    for range in
        [range(0, 0xfff), range(0xf000, 0x1_0fff), range(1 << 40, (1 << 40) + 0xfff), range(0, (1 << 40) - 1)]
    {
        let refused = Err(RequestError::Refused(Refusal::Range(range)));
        assert_eq!(guest.driver.map(DomainId(3), range, Gpa(0), RW), refused);
        assert_eq!(guest.driver.unmap(DomainId(3), range), refused);
    }
    assert!(sent(&guest).is_empty());
    // IDs that the driver gives out itself lie inside; when they are used up it says so.
    let ids: Vec<DomainId> = std::iter::from_fn(|| guest.driver.new_domain_id()).collect();
    assert_eq!(ids, (3..=9).map(DomainId).collect::<Vec<_>>());

    // What was not offered restricts nothing, whatever the fields hold.
    let mut guest = scripted(Features::MAP_UNMAP | Features::PROBE);
    assert_eq!(guest.driver.map(DomainId(1), range(0, 0xfff), Gpa(0), RW), Ok(()));
}

#[test]
fn r8_reserved_bytes_of_requests_are_zero() {
    let mut guest = scripted(DeviceConfig::FEATURES);
    let endpoint = guest.driver.probe(EndpointId(8)).unwrap();
    guest.driver.attach(DomainId(3), &endpoint, AttachFlags::BYPASS).unwrap();
    guest.driver.unmap(DomainId(3), range(0x1_0000, 0x1_0fff)).unwrap();
    guest.driver.detach(DomainId(3), EndpointId(8)).unwrap();
    guest.driver.attach_table(DomainId(3), &endpoint, request::cd_table(Gpa(0x4000_0000), 4)).unwrap();
    let lengths: Vec<usize> = guest.machine.received().iter().map(|(bytes, _)| bytes.len()).collect();
    assert_eq!(lengths, [72, 20, 28, 20, 124]);
    guest.driver.probe(EndpointId(9)).unwrap();
    guest.driver.detach(DomainId(3), EndpointId(8)).unwrap();
    assert_eq!(sent(&guest).len(), 2, "and `sent` compares the bytes");
}

#[test]
fn r9_inseparable_endpoints_can_share_a_domain() {
    let mut guest = Guest::new(Setup::default());
    let (first, second) = (guest.probe(8), guest.probe(9));
    let mut domain = MappedDomain::new(&mut guest.driver).unwrap();
    domain.attach(&mut guest.driver, &first).unwrap();
    domain.map(&mut guest.driver, mapping(0x1000, 0x1fff, 0x5000, RW)).unwrap();
    domain.attach(&mut guest.driver, &second).unwrap();
    assert_eq!((guest.machine.read(8, 0x1000), guest.machine.read(9, 0x1000)), (Some(0x5000), Some(0x5000)));
    domain.detach(&mut guest.driver, EndpointId(8)).unwrap();
    assert_eq!((guest.machine.read(8, 0x1000), guest.machine.read(9, 0x1000)), (None, Some(0x5000)));
    // One without the other: a mapping in the reserved region of the newcomer keeps it out, unsent.
    let third = guest.probe(25);
    domain.map(&mut guest.driver, mapping(0x10_0000, 0x10_0fff, 0, RW)).unwrap();
    let refused = DomainError::Reserved(range(0x10_0000, 0x10_ffff));
    assert_eq!(domain.attach(&mut guest.driver, &third), Err(refused));
}

#[test]
fn r10_the_bypass_flag_goes_with_the_kind_of_domain() {
    let mut guest = scripted(DeviceConfig::FEATURES);
    let endpoints = [8, 9].map(|id| guest.driver.probe(EndpointId(id)).unwrap());
    guest.machine.received();
    let bypass = BypassDomain::new(&mut guest.driver).unwrap();
    let mut mapped = MappedDomain::new(&mut guest.driver).unwrap();
    for endpoint in &endpoints {
        bypass.attach(&mut guest.driver, endpoint).unwrap();
        mapped.attach(&mut guest.driver, endpoint).unwrap();
    }
    let (bypass, mapped) = (bypass.id().0, mapped.id().0);
    let expected =
        [8, 9].map(|endpoint| [request::attach_bypass(bypass, endpoint), request::attach(mapped, endpoint)]);
    assert_eq!(sent(&guest), expected.concat());
    // Without the feature there is no bypass domain.
    let mut guest = scripted(DeviceConfig::FEATURES - Features::BYPASS_CONFIG);
    let endpoint = guest.driver.probe(EndpointId(8)).unwrap();
    let refused = Err(DomainError::Request(RequestError::NotNegotiated(Features::BYPASS_CONFIG)));
    assert_eq!(BypassDomain::new(&mut guest.driver).unwrap().attach(&mut guest.driver, &endpoint), refused);
}

#[test]
fn r11_map_flags_and_ranges_obey_the_rules() {
    let mut guest = scripted(DeviceConfig::FEATURES - Features::MMIO);
    let page = range(0x1_0000, 0x1_0fff);
    let map = |flags, start, last| {
        let (virt_start, virt_end) = (Iova(start), Iova(last));
        Request::Map(viommu_wire::Map {
            domain: DomainId(3),
            virt_start,
            virt_end,
            phys_start: Gpa(0),
            flags,
        })
    };
    let undefined = MapFlags::from_bits_retain(1 << 5 | 1);
    let sends = [
        (map(undefined, 0x1_0000, 0x1_0fff), RequestError::Refused(Refusal::Flags(1 << 5))),
        (map(RW | MapFlags::MMIO, 0x1_0000, 0x1_0fff), RequestError::NotNegotiated(Features::MMIO)),
        (
            map(RW, 0x1_1000, 0x1_0fff),
            RequestError::Refused(Refusal::Inverted { first: Iova(0x1_1000), last: Iova(0x1_0fff) }),
        ),
        (
            map(RW, 0x1_0000, 0x1_0000),
            RequestError::Refused(Refusal::Inverted { first: Iova(0x1_0000), last: Iova(0x1_0000) }),
        ),
        (map(RW, 0x1_0800, 0x1_0fff), RequestError::Refused(Refusal::Misaligned { granule_lg2: 12 })),
    ];
    for (request, error) in sends {
        assert_eq!(guest.driver.send(request), Err(error));
    }
    assert!(sent(&guest).is_empty());
    // READ is set for reads, and not for what is only written.
    guest.driver.map(DomainId(3), page, Gpa(0), MapFlags::WRITE).unwrap();
    assert_eq!(sent(&guest), [map(MapFlags::WRITE, 0x1_0000, 0x1_0fff)]);
    let mut guest = scripted(DeviceConfig::FEATURES);
    guest.driver.map(DomainId(3), page, Gpa(0), RW | MapFlags::MMIO).unwrap();
    assert_eq!(sent(&guest), [map(RW | MapFlags::MMIO, 0x1_0000, 0x1_0fff)]);
}

#[test]
fn r12_unmap_never_splits_a_mapping() {
    let mut guest = Guest::new(Setup::default());
    let endpoint = guest.probe(16);
    let mut domain = MappedDomain::new(&mut guest.driver).unwrap();
    domain.attach(&mut guest.driver, &endpoint).unwrap();
    domain.map(&mut guest.driver, mapping(0x4000, 0x7fff, 0x1_0000, RW)).unwrap();
    domain.map(&mut guest.driver, mapping(0x9000, 0x9fff, 0x2_0000, RW)).unwrap();
    let before = *guest.driver.counters();
    for part in [range(0x4000, 0x4fff), range(0x7000, 0x9fff), range(0x5000, 0x5fff), range(0, 0x4fff)] {
        assert_eq!(domain.unmap(&mut guest.driver, part), Err(DomainError::Split(part)));
    }
    assert_eq!(*guest.driver.counters(), before, "nothing is sent");
    assert_eq!(guest.machine.read(16, 0x7fff), Some(0x1_3fff));
    domain.unmap(&mut guest.driver, range(0x3000, 0xafff)).unwrap();
    assert_eq!((guest.machine.read(16, 0x4000), guest.machine.read(16, 0x9000)), (None, None));
    assert_eq!(domain.mappings().count(), 0);
}

/// A property with a header of the test's choice.
fn property(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = (value.len() as u16).to_le_bytes();
    [&kind.to_le_bytes()[..], &length, value].concat()
}

fn region(start: u64, last: u64) -> ReservedRegion {
    ReservedRegion { kind: ReservedKind::Reserved, range: range(start, last) }
}

fn encoded(region: ReservedRegion) -> Vec<u8> {
    let mut bytes = vec![0; 24];
    Property::ReservedRegion(region).encode(&mut bytes).unwrap();
    bytes
}

#[test]
fn r13_unknown_and_malformed_properties_are_skipped() {
    let mut guest = scripted(DeviceConfig::FEATURES);
    let (first, second, longer) = (region(0x1000, 0x1fff), region(0x3000, 0x3fff), region(0x5000, 0x5fff));
    // Reserved bits in the type: ignored, although it looks like a region.
    let mut reserved = encoded(region(0x7000, 0x7fff));
    reserved[1] |= 0x10;
    // A later version's RESV_MEM, with 8 bytes more: the length comes from the property, not from its type.
    let mut value = encoded(longer)[4..].to_vec();
    value.extend([0xaa; 8]);
    let list = [
        property(0x7ff, &[0x11; 5]),
        encoded(first),
        reserved,
        property(0x123, &[]),
        property(1, &[0; 8]),
        property(1, &value),
        encoded(second),
    ];
    guest.machine.answer_properties(list.concat());
    let endpoint = guest.driver.probe(EndpointId(8)).unwrap();
    assert_eq!(endpoint.properties().reserved, [first, longer, second]);
    assert_eq!((endpoint.properties().unknown, endpoint.properties().malformed), (2, 2));
    let (bytes, writable) = guest.machine.received().remove(0);
    assert_eq!((bytes.len(), writable), (72, 256 + 4), "the area has exactly probe_size bytes");
}

#[test]
fn r13_a_list_that_is_cut_off_ends_there() {
    let mut guest = scripted(DeviceConfig::FEATURES);
    let first = region(0x1000, 0x1fff);
    for tail in [vec![1, 0, 0xff, 0xff], vec![1, 0, 0, 0xff], vec![0xff, 0x0f, 0xf0, 0x00]] {
        guest.machine.answer_properties([encoded(first), tail].concat());
        let endpoint = guest.driver.probe(EndpointId(8)).unwrap();
        assert_eq!(endpoint.properties().reserved, [first]);
    }
    // An area full of small properties ends with the area.
    guest.machine.answer_properties(property(0x7ff, &[]).repeat(64));
    assert_eq!(guest.driver.probe(EndpointId(8)).unwrap().properties().unknown, 64);
}

#[test]
fn r14_reserved_regions_are_never_mapped() {
    let mut guest = Guest::new(Setup::default());
    let endpoint = guest.probe(8);
    assert_eq!(endpoint.properties().msi(), Some(range(0x800_0000, 0x80f_ffff)));
    let mut domain = MappedDomain::new(&mut guest.driver).unwrap();
    domain.attach(&mut guest.driver, &endpoint).unwrap();
    let before = *guest.driver.counters();
    for (start, last) in [(0x800_0000, 0x800_0fff), (0x7ff_f000, 0x800_0fff), (0x80f_f000, 0x810_0fff)] {
        let refused = domain.map(&mut guest.driver, mapping(start, last, 0, RW));
        assert_eq!(refused, Err(DomainError::Reserved(range(start, last))));
    }
    assert_eq!(*guest.driver.counters(), before, "nothing is sent");
    domain.map(&mut guest.driver, mapping(0x810_0000, 0x810_0fff, 0, RW)).unwrap();
}

#[test]
fn r14_an_unknown_subtype_counts_as_reserved_and_reserved_bytes_are_ignored() {
    let mut guest = scripted(DeviceConfig::FEATURES);
    let mut bytes = encoded(region(0x10_0000, 0x10_ffff));
    bytes[4] = 0x7f;
    bytes[5..8].fill(0xff);
    guest.machine.answer_properties(bytes);
    let endpoint = guest.driver.probe(EndpointId(8)).unwrap();
    assert_eq!(endpoint.properties().reserved, [region(0x10_0000, 0x10_ffff)]);
    let mut domain = MappedDomain::new(&mut guest.driver).unwrap();
    domain.attach(&mut guest.driver, &endpoint).unwrap();
    let refused = domain.map(&mut guest.driver, mapping(0x10_0000, 0x10_0fff, 0, RW));
    assert_eq!(refused, Err(DomainError::Reserved(range(0x10_0000, 0x10_0fff))));
}

#[test]
fn r15_events_with_reserved_bytes_are_ignored_and_others_read_with_care() {
    let mut guest = scripted(DeviceConfig::FEATURES);
    let record = |reason: u8, reserved: [u8; 3], flags: u32, reserved1: u32| {
        let head = [&[reason][..], &reserved, &flags.to_le_bytes(), &8u32.to_le_bytes()].concat();
        [&head[..], &reserved1.to_le_bytes(), &0x1234_5000u64.to_le_bytes()].concat()
    };
    // Ignored: any of the three reserved bytes, and what is too short to be a record.
    for reserved in [[1, 0, 0], [0, 0x80, 0], [0, 0, 0xff]] {
        guest.machine.send_event(&record(2, reserved, 0x101, 0), 24);
    }
    guest.machine.send_event(&record(2, [0; 3], 0x101, 0), 23);
    guest.machine.send_event(&record(2, [0; 3], 0x101, 0), 0);
    // Read: reserved1 and undefined flags mean nothing, an unknown reason is UNKNOWN, a longer record has more behind.
    guest.machine.send_event(&record(2, [0; 3], 0x101 | 0xffff_f0c0, 0xdead_beef), 24);
    guest.machine.send_event(&record(0x77, [0; 3], 0x002, 0), 24);
    guest.machine.send_event(&[record(1, [0; 3], 0x102, 0), vec![0xff; 24]].concat(), 48);
    let mut faults = Vec::new();
    guest
        .driver
        .handle_events(|event| match event {
            Event::Fault(fault) => faults.push((fault.reason, fault.endpoint, fault.address)),
            other => panic!("{other:?}"),
        })
        .unwrap();
    let at = Some(Iova(0x1234_5000));
    let endpoint = EndpointId(8);
    let expected = [
        (FaultReason::Mapping, endpoint, at),
        (FaultReason::Unknown, endpoint, None),
        (FaultReason::Domain, endpoint, at),
    ];
    assert_eq!(faults, expected);
    assert_eq!((guest.driver.event_counters().delivered, guest.driver.event_counters().ignored), (3, 5));
}

#[test]
fn a_device_that_is_not_modern_or_makes_no_sense_is_told_so() {
    let memory = Memory::new(64 << 20);
    let device = Scripted::new(&memory, DeviceConfig::FEATURES);
    device.set_config(0, &[0; 8]);
    assert_eq!(Guest::over(device, &memory, DriverOptions::default()).err(), Some(InitError::Config));
    let device = Scripted::new(&memory, DeviceConfig::FEATURES);
    device.set_config(32, &u32::MAX.to_le_bytes());
    let error = Guest::over(device, &memory, DriverOptions::default()).err();
    assert_eq!(error, Some(InitError::ProbeSize(u32::MAX)));
}

#[test]
fn the_whole_handover_works_with_the_device() {
    for endpoint in [8, 16] {
        let mut guest = Guest::new(Setup::default());
        let probed = guest.probe(endpoint);
        let driver = &mut guest.driver;
        let domain = driver.new_domain_id().unwrap();
        let mut table = PasidTable::new(driver, &probed, domain, TableOptions::default()).unwrap();
        table.attach(driver).unwrap();
        let mut spaces: Vec<_> =
            (0..3).map(|_| AddressSpace::new(driver, &probed, SpaceOptions::default()).unwrap()).collect();
        let mut pasids = Vec::new();
        for (space, target) in spaces.iter_mut().zip([0x10_0000, 0x20_0000, 0x30_0000]) {
            space.map(driver, range(0x1000, 0x4fff), Gpa(target), Attrs::READ_WRITE).unwrap();
            pasids.push(table.bind(driver, space).unwrap().value());
        }
        let leads = |pasid| guest.machine.read_with(endpoint, pasid, 0x2008);
        assert_eq!(
            [leads(pasids[0]), leads(pasids[1]), leads(pasids[2])],
            [Some(0x10_1008), Some(0x20_1008), Some(0x30_1008)]
        );
        // An unmap is over when no stale translation is left.
        spaces[1].unmap(driver, range(0x1000, 0x4fff)).unwrap();
        assert_eq!([leads(pasids[0]), leads(pasids[1])], [Some(0x10_1008), None]);
        table.unbind(driver, viommu_wire::Pasid::new(pasids[0]), &mut spaces[0]).unwrap();
        assert_eq!([leads(pasids[0]), leads(pasids[2])], [None, Some(0x30_1008)]);
        for index in 1..3 {
            table.unbind(driver, viommu_wire::Pasid::new(pasids[index]), &mut spaces[index]).unwrap();
        }
        assert_eq!(leads(pasids[2]), None);
        table.release(driver).map_err(|(_, error)| error).unwrap();
        for space in spaces {
            space.release(driver).map_err(|(_, error)| error).unwrap();
        }
        assert_eq!(guest.driver.shut_down().0.alloc.live(), 0, "all memory goes back");
    }
}
