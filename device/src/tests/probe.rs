//! PROBE.

use super::*;

fn probe(endpoint: u32) -> Request {
    Request::Probe(Probe { endpoint: EndpointId(endpoint) })
}

/// Status, properties area, used length.
fn ask(device: &mut Device<TestHost>, readable: &[u8], writable: usize) -> (Status, Vec<u8>, usize) {
    let mut buffer = vec![0xee; writable];
    let used = device.handle(readable, &mut buffer).used;
    assert!(buffer[used..].iter().all(|&byte| byte == 0xee));
    let tail = Tail::decode(&buffer[used - 4..used]).unwrap();
    buffer.truncate(used - 4);
    (tail.status, buffer, used)
}

fn properties(device: &mut Device<TestHost>, endpoint: u32) -> Vec<Property> {
    let (status, area, used) = ask(device, &probe(endpoint).encode(), 516);
    assert_eq!((status, used), (Status::Ok, 516));
    Properties::new(&area).map(Result::unwrap).collect()
}

#[test]
fn handover_properties_need_the_feature() {
    let mut device = device();
    device.accept_features(DeviceConfig::FEATURES - Features::ATTACH_TABLE).unwrap();
    assert_eq!(properties(&mut device, 8), [Property::ReservedRegion(MSI)]);
    assert_eq!(properties(&mut device, 16), []);
    device.accept_features(DeviceConfig::FEATURES).unwrap();
    let smmuv3 = properties(&mut device, 8);
    assert_eq!(smmuv3.len(), 4);
    assert_eq!(smmuv3[0], Property::ReservedRegion(MSI));
    assert!(matches!(smmuv3[1], Property::HwArmSmmu3 { .. }));
    assert_eq!(smmuv3[2], Property::PasidSize { bits: 20 });
    assert_eq!(smmuv3[3], Property::TableFormats(TableFormats::new(&[1, 0x80]).unwrap()));
    let vtd = properties(&mut device, 16);
    assert!(matches!(vtd[0], Property::HwIntelVtd { .. }));
    assert_eq!(vtd[1], Property::PasidSize { bits: 20 });
    assert_eq!(vtd[2], Property::TableFormats(TableFormats::new(&[0x81, 2]).unwrap()));
    assert_eq!(properties(&mut device, 24), []);
}

#[test]
fn registers_keep_the_output_size_and_lose_what_a_guest_cannot_use() {
    use pgtable_formats::context::smmuv3::{Caps, IdRegisters, Idr0, Idr5};
    let mut device = device();
    let Property::HwArmSmmu3 { idr0, idr1, idr3, idr5 } = properties(&mut device, 8)[1] else { panic!() };
    assert!(!Idr0::from_bits(idr0).cohacc());
    assert_eq!(Idr5::from_bits(idr5).oas(), 5);
    assert_eq!(Caps::from_registers(IdRegisters { idr0, idr1, idr3, idr5 }).oas_bits, 48);
}

#[test]
fn the_tail_is_behind_the_area() {
    let mut device = device();
    let readable = probe(8).encode();
    let zero = |area: &[u8]| area.iter().all(|&byte| byte == 0);
    for writable in 4..516 {
        let (status, area, used) = ask(&mut device, &readable, writable);
        assert_eq!((status, used), (Status::Inval, writable)); // D-49
        assert!(zero(&area));
    }
    let (status, area, used) = ask(&mut device, &readable, 600);
    assert_eq!((status, used), (Status::Ok, 516));
    assert!(zero(&area[104..])); // D-50
    let (status, area, used) = ask(&mut device, &probe(7).encode(), 516);
    assert_eq!((status, used, zero(&area)), (Status::NoEnt, 516, true)); // D-44
    let (status, area, used) = ask(&mut device, &readable[..71], 516);
    assert_eq!((status, used, zero(&area)), (Status::Inval, 516, true));
    let mut reserved = readable.to_vec();
    reserved[8..].fill(0xff);
    assert_eq!(ask(&mut device, &reserved, 516).0, Status::Ok); // D-43
    for writable in 0..4 {
        let mut buffer = vec![0xee; writable];
        assert_eq!(device.handle(&readable, &mut buffer).used, 0);
        assert!(buffer.iter().all(|&byte| byte == 0xee));
    }
}

#[test]
fn probe_that_is_not_offered() {
    let features = DeviceConfig::FEATURES - Features::PROBE;
    let mut device = device_with(DeviceConfig { features, ..DeviceConfig::default() });
    let mut buffer = [0xee; 516];
    assert_eq!(device.handle(&probe(8).encode(), &mut buffer).used, 0); // D-45
    assert_eq!(buffer, [0xee; 516]);
}
