//! The driver against a device that answers by script.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of tests are small")]

mod conformance;
mod queue;
mod requests;
mod sva;
mod tables;

use alloc::vec::Vec;

use pgtable_formats::context::{smmuv3, vtd};
use viommu_wire::{EndpointId, Features, Property, TableFormats};

use crate::hal::fake::{self, FakePlatform, FakeTransport};
use crate::{Driver, DriverOptions, Endpoint};

type TestDriver = Driver<FakePlatform, FakeTransport>;

/// All that a device may offer.
const OFFERED: Features = Features::DEVICE.union(Features::VERSION_1);

/// A driver of a device that offers `features`, and the device.
fn driver_with(features: Features) -> (TestDriver, FakeTransport) {
    let platform = fake::platform();
    let device = FakeTransport::new(platform.memory.clone(), features);
    let driver = Driver::new(platform, device.clone(), DriverOptions::default()).unwrap();
    (driver, device)
}

fn driver() -> (TestDriver, FakeTransport) {
    driver_with(OFFERED)
}

/// The bytes of properties, back to back.
fn area(properties: &[Property]) -> Vec<u8> {
    let mut bytes = alloc::vec![0; 512];
    let length = properties.iter().fold(0, |at, property| at + property.encode(&mut bytes[at..]).unwrap());
    bytes.truncate(length);
    bytes
}

fn smmuv3_endpoint(id: u32, registers: smmuv3::IdRegisters, pasid_bits: u8) -> Endpoint {
    let smmuv3::IdRegisters { idr0, idr1, idr3, idr5 } = registers;
    endpoint(id, Property::HwArmSmmu3 { idr0, idr1, idr3, idr5 }, pasid_bits, &[1])
}

fn vtd_endpoint(id: u32, formats: &[u8]) -> Endpoint {
    let vtd::CapRegisters { cap, ecap } = vtd::CapRegisters::SOFTWARE;
    endpoint(id, Property::HwIntelVtd { cap, ecap }, 20, formats)
}

fn endpoint(id: u32, hardware: Property, pasid_bits: u8, formats: &[u8]) -> Endpoint {
    let mut properties = alloc::vec![hardware, Property::TableFormats(TableFormats::new(formats).unwrap())];
    if pasid_bits != 0 {
        properties.push(Property::PasidSize { bits: pasid_bits });
    }
    Endpoint::new(EndpointId(id), crate::EndpointProperties::parse(&area(&properties)))
}

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(core::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}
