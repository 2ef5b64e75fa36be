//! PROBE and reserved regions: D-43 to D-54.

use pgtable_formats::{AccessKind, TableMem};
use viommu_device::host::{EndpointCaps, FaultCause};
use viommu_device::soft::{EndpointError, NoMemory, SoftHost};
use viommu_device::{ConfigError, Device, DeviceConfig, Features};
use viommu_tests::rig::{Bare, Memory, Reply, Rig, Sends, Setup, UNWRITTEN, request, reserved, smmuv3};
use viommu_wire::{EndpointId, Event, FaultReason, Properties, Property, ReservedKind, Status};
use vm_memory::{Bytes, GuestAddress};

const SIZE: usize = 512;

fn probe(rig: &mut Rig, endpoint: u32) -> Reply {
    let reply = rig.raw(&request::probe(endpoint).encode(), SIZE + 4);
    assert_eq!(reply.used, SIZE + 4);
    reply
}

/// The properties as they stand in the area: type word, value.
fn raw_properties(reply: &Reply) -> Vec<(u16, Vec<u8>)> {
    let mut rest = &reply.bytes[..SIZE];
    let mut properties = Vec::new();
    while let [t0, t1, l0, l1, after @ ..] = rest {
        let kind = u16::from_le_bytes([*t0, *t1]);
        if kind & 0xfff == 0 {
            break;
        }
        let (value, next) = after.split_at(usize::from(u16::from_le_bytes([*l0, *l1])));
        properties.push((kind, value.to_vec()));
        rest = next;
    }
    assert!(rest.iter().all(|&byte| byte == 0), "behind the properties everything is zero");
    properties
}

/// The base device: no handover, so that RESV_MEM is all there is.
fn base() -> Rig {
    Rig::new(Setup::accepting(DeviceConfig::FEATURES - Features::ATTACH_TABLE))
}

#[test]
fn d43_probe_reserved_is_ignored() {
    let mut rig = base();
    let plain = probe(&mut rig, 8);
    let mut bytes = request::probe(8).encode().to_vec();
    bytes[8..72].fill(0xff);
    let reply = rig.raw(&bytes, SIZE + 4);
    assert_eq!((reply.status(), reply), (Some(Status::Ok), plain));
}

#[test]
fn d44_probe_of_an_unknown_endpoint_is_noent() {
    let mut rig = base();
    for endpoint in [0, 7, 10, u32::MAX] {
        let reply = probe(&mut rig, endpoint);
        assert_eq!(reply.status(), Some(Status::NoEnt));
        assert_eq!(reply.bytes[..SIZE], [0; SIZE]);
    }
    rig.works();
}

#[test]
fn d45_probe_that_is_not_offered_comes_back_unwritten() {
    let mut rig = Rig::new(Setup::offering(DeviceConfig::FEATURES - Features::PROBE));
    for writable in [4, SIZE + 4] {
        rig.leave_unwritten(&request::probe(8).encode(), writable);
    }
}

#[test]
fn d46_reserved_bits_of_property_types_are_zero() {
    let mut rig = Rig::new(Setup::default());
    for endpoint in [8, 16, 24, 25] {
        for (kind, _) in raw_properties(&probe(&mut rig, endpoint)) {
            assert_eq!(kind >> 12, 0);
        }
    }
}

#[test]
fn d47_the_length_leaves_the_header_out() {
    let mut rig = base();
    let reply = probe(&mut rig, 8);
    // RESV_MEM of subtype MSI: 24 bytes of which 20 are the value.
    let expected = "01001400 01000000 0000000800000000 ffff0f0800000000".replace(' ', "");
    let hex: String = reply.bytes[..24].iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, expected);
    for (kind, value) in raw_properties(&reply) {
        assert_eq!((kind, value.len()), (1, 20));
    }
}

#[test]
fn d48_properties_stand_back_to_back() {
    let caps = |index: u64| reserved(ReservedKind::Reserved, index << 20, (index << 20) + 0xfff);
    let regions: Vec<_> = (1..=20).map(caps).collect();
    let endpoints = vec![
        (8, EndpointCaps { tables: Some(smmuv3()), reserved: regions.clone(), ..EndpointCaps::default() }),
        (24, EndpointCaps::default()),
    ];
    let config = DeviceConfig { probe_size: 1024, ..DeviceConfig::default() };
    let mut rig = Rig::new(Setup { endpoints, config, ..Setup::default() });
    let reply = rig.raw(&request::probe(8).encode(), 1028);
    assert_eq!((reply.used, reply.status()), (1028, Some(Status::Ok)));
    let found: Vec<Property> = Properties::new(&reply.bytes[..1024]).map(Result::unwrap).collect();
    assert_eq!(found[..20], regions.into_iter().map(Property::ReservedRegion).collect::<Vec<_>>()[..]);
    assert!(found.len() > 20, "the hardware follows");
    let total: usize = found.iter().map(Property::encoded_len).sum();
    assert!(reply.bytes[total..1024].iter().all(|&byte| byte == 0));
}

#[test]
fn d49_an_area_that_is_too_small_gets_no_property() {
    let mut rig = base();
    for area in [0, 1, 23, 24, 100, SIZE - 1] {
        let before = rig.machine.snapshot();
        let reply = rig.raw(&request::probe(8).encode(), area + 4);
        assert_eq!((reply.used, reply.status()), (area + 4, Some(Status::Inval)), "{area}");
        assert!(reply.bytes[..area].iter().all(|&byte| byte == 0));
        assert_eq!(rig.machine.snapshot(), before);
    }
    // Of any endpoint.
    assert_eq!(rig.raw(&request::probe(99).encode(), 8).status(), Some(Status::Inval));
    rig.works();
}

#[test]
fn d50_the_rest_of_the_area_is_zero() {
    let mut rig = base();
    let reply = probe(&mut rig, 8);
    assert!(reply.bytes[..24].iter().any(|&byte| byte != 0));
    assert_eq!(reply.bytes[24..SIZE], [0; SIZE - 24]);
    assert_eq!(probe(&mut rig, 24).bytes[..SIZE], [0; SIZE], "an endpoint without properties");
    // The tail is behind the area, also where the part is longer.
    let reply = rig.raw(&request::probe(8).encode(), SIZE + 20);
    assert_eq!((reply.used, reply.status()), (SIZE + 4, Some(Status::Ok)));
    assert!(reply.bytes[SIZE + 4..].iter().all(|&byte| byte == UNWRITTEN));
}

#[test]
fn d50_the_device_itself_leaves_no_byte_as_it_was() {
    // The queue hands the device zeroed buffers; a VMM with queues of its own may not.
    let (mut bare, _) = Bare::new(&Setup::default());
    for (endpoint, area, status) in [
        (24, SIZE, Status::Ok),
        (8, SIZE, Status::Ok),
        (99, SIZE, Status::NoEnt),
        (8, SIZE - 1, Status::Inval),
    ] {
        let reply = bare.raw(&request::probe(endpoint).encode(), area + 4);
        assert_eq!((reply.used, reply.status()), (area + 4, Some(status)));
        assert!(!reply.bytes.contains(&UNWRITTEN), "endpoint {endpoint}");
    }
}

#[test]
fn d51_reserved_bytes_of_resv_mem_are_zero() {
    let mut rig = base();
    for endpoint in [8, 25] {
        let properties = raw_properties(&probe(&mut rig, endpoint));
        assert!(!properties.is_empty());
        for (_, value) in properties {
            assert_eq!(value[1..4], [0; 3]);
        }
    }
}

#[test]
fn d52_an_endpoint_has_at_most_one_msi_region() {
    let regions =
        vec![reserved(ReservedKind::Msi, 0x1000, 0x1fff), reserved(ReservedKind::Msi, 0x3000, 0x3fff)];
    let caps = EndpointCaps { reserved: regions, ..EndpointCaps::default() };
    let mut host = SoftHost::new(NoMemory);
    assert_eq!(host.add_endpoint(EndpointId(8), caps.clone()), Err(EndpointError::TwoMsiRegions));
    assert_eq!(
        Device::new(DeviceConfig::default(), Careless(caps)).err(),
        Some(ConfigError::MsiRegions(EndpointId(8)))
    );
}

#[test]
fn d53_reserved_regions_of_an_endpoint_do_not_overlap() {
    let regions =
        vec![reserved(ReservedKind::Msi, 0x3000, 0x4fff), reserved(ReservedKind::Reserved, 0x1000, 0x3000)];
    let (first, second) = (regions[1].range, regions[0].range);
    let caps = EndpointCaps { reserved: regions, ..EndpointCaps::default() };
    let mut host = SoftHost::new(NoMemory);
    assert_eq!(host.add_endpoint(EndpointId(8), caps.clone()), Err(EndpointError::ReservedOverlap));
    let error = ConfigError::ReservedOverlap { endpoint: EndpointId(8), first, second };
    assert_eq!(Device::new(DeviceConfig::default(), Careless(caps)).err(), Some(error));
}

#[test]
fn d54_accesses_to_reserved_regions_touch_nobody_else() {
    let regions = vec![reserved(ReservedKind::Reserved, Memory::page(2).0, Memory::page(2).0 + 0xfff)];
    let caps = EndpointCaps { reserved: regions, ..EndpointCaps::default() };
    let endpoints = vec![(8, caps), (24, EndpointCaps::default())];
    let mut rig = Rig::new(Setup { endpoints, ..Setup::default() });
    let target = Memory::page(2);
    rig.machine.memory().store(target, 0x1111);
    for request in [request::attach(1, 8), request::attach_bypass(2, 8)] {
        assert_eq!(rig.send(&request), Status::Ok);
        let dma = rig.machine.dma(8, None);
        assert!(dma.write_slice(&[0xff; 8], GuestAddress(target.0)).is_err());
        assert!(dma.read_slice(&mut [0; 8], GuestAddress(target.0)).is_err());
        assert_eq!(rig.machine.memory().load(target), Ok(0x1111));
    }
    let events = rig.events();
    assert_eq!(events.len(), 4);
    for event in events {
        let Event::Fault(fault) = event else { panic!("{event:?}") };
        assert_eq!((fault.endpoint, fault.reason), (EndpointId(8), FaultReason::Mapping));
    }
    // In bypass its neighbours in the address space are open.
    assert_eq!(rig.machine.write(8, target.0 + 0x1000), Some(target.0 + 0x1000));
}

#[test]
fn d54_the_msi_window_takes_writes_and_nothing_else() {
    let mut rig = Rig::new(Setup::default());
    for request in [request::attach(1, 8), request::attach_bypass(2, 8)] {
        assert_eq!(rig.send(&request), Status::Ok);
        assert_eq!(rig.machine.write(8, 0x800_0040), Some(0x800_0040), "an interrupt needs no mapping");
        let read = rig.machine.peek(8, None, 0x800_0040, AccessKind::Read);
        assert_eq!(read, Err(FaultCause::Unmapped));
    }
    assert_eq!(rig.send(&request::detach(2, 8)), Status::Ok);
    assert_eq!(rig.machine.write(8, 0x800_0040), None, "an endpoint that is not attached sends none");
}

/// A host that does not look at its endpoints' reserved regions.
struct Careless(EndpointCaps);

impl viommu_device::host::Host for Careless {
    type Space = ();

    fn endpoints(&self) -> Vec<EndpointId> {
        vec![EndpointId(8)]
    }

    fn caps(&self, _: EndpointId) -> Option<&EndpointCaps> {
        Some(&self.0)
    }

    fn create(
        &mut self,
        _: viommu_device::host::SpaceSpec<'_>,
    ) -> Result<(), viommu_device::host::HostError> {
        Ok(())
    }

    fn destroy(&mut self, (): ()) {}

    fn map(
        &mut self,
        (): &mut (),
        _: viommu_device::mapping::Mapping,
    ) -> Result<(), viommu_device::host::MapError> {
        Ok(())
    }

    fn unmap(
        &mut self,
        (): &mut (),
        _: viommu_device::IovaRange,
    ) -> Result<usize, viommu_device::host::UnmapError> {
        Ok(0)
    }

    fn bind(
        &mut self,
        _: viommu_device::host::Stream,
        _: Option<&mut ()>,
    ) -> Result<(), viommu_device::host::HostError> {
        Ok(())
    }

    fn invalidate(
        &mut self,
        _: &[viommu_device::host::Invalidation],
    ) -> Result<(), viommu_device::host::Stopped> {
        Ok(())
    }

    fn next_fault(&mut self) -> Option<viommu_device::host::FaultReport> {
        None
    }
}
