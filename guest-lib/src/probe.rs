//! What PROBE says of an endpoint.

use alloc::vec::Vec;

use pgtable_formats::context::{smmuv3, vtd};
use viommu_wire::{
    EndpointId, IovaRange, PageRequestFlags, Properties, Property, PropertyError, ReservedKind,
    ReservedRegion, TableFormats, numbers,
};

/// An endpoint that was probed. Attaching takes one of these, so that no endpoint is attached unprobed.
#[derive(Clone, Debug)]
pub struct Endpoint {
    id: EndpointId,
    properties: EndpointProperties,
}

impl Endpoint {
    pub(crate) const fn new(id: EndpointId, properties: EndpointProperties) -> Self {
        Self { id, properties }
    }

    /// Its number.
    pub const fn id(&self) -> EndpointId {
        self.id
    }

    /// What the device says of it.
    pub const fn properties(&self) -> &EndpointProperties {
        &self.properties
    }
}

/// The properties of an endpoint.
#[derive(Clone, Debug, Default)]
pub struct EndpointProperties {
    /// Regions that must not be mapped.
    pub reserved: Vec<ReservedRegion>,
    /// The hardware that walks the guest's tables, where the device hands them over.
    pub hardware: Option<Hardware>,
    /// Width of the endpoint's PASIDs in bits; 0 where it has none.
    pub pasid_bits: u8,
    /// Table formats that ATTACH_TABLE takes, in the device's order of preference.
    pub formats: TableFormats,
    /// What the endpoint does with page requests: nothing where the device does not say.
    pub page_requests: PageRequestFlags,
    /// Properties of a type that this version does not know.
    pub unknown: u32,
    /// Properties that were ignored because they are malformed, or stated a second time.
    pub malformed: u32,
}

/// Hardware that walks a guest's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hardware {
    /// An SMMUv3.
    Smmuv3(smmuv3::Caps),
    /// A VT-d remapping unit.
    Vtd(vtd::Caps),
}

impl EndpointProperties {
    /// Reads the properties area of a PROBE reply. Every property that has meaning is taken, whatever stands before
    /// or after it.
    ///
    /// A device that names its hardware but not the formats takes the one that the ATTACH_TABLE proposal defines for
    /// that hardware.
    pub fn parse(area: &[u8]) -> Self {
        let mut properties = Self::default();
        let (mut pasid_bits, mut formats, mut page_requests) = (None, None, None);
        for property in Properties::new(area) {
            match property {
                Ok(Property::ReservedRegion(region)) => properties.reserved.push(region),
                Ok(Property::HwArmSmmu3 { idr0, idr1, idr3, idr5 }) => {
                    let registers = smmuv3::IdRegisters { idr0, idr1, idr3, idr5 };
                    let hardware = Hardware::Smmuv3(smmuv3::Caps::from_registers(registers));
                    first(&mut properties.hardware, hardware, &mut properties.malformed);
                }
                Ok(Property::HwIntelVtd { cap, ecap }) => {
                    let hardware = Hardware::Vtd(vtd::Caps::from_registers(vtd::CapRegisters { cap, ecap }));
                    first(&mut properties.hardware, hardware, &mut properties.malformed);
                }
                Ok(Property::PasidSize { bits }) => first(&mut pasid_bits, bits, &mut properties.malformed),
                Ok(Property::TableFormats(list)) => first(&mut formats, list, &mut properties.malformed),
                Ok(Property::PageRequests(flags)) => {
                    first(&mut page_requests, flags, &mut properties.malformed);
                }
                Err(PropertyError::Unknown { .. }) => {
                    properties.unknown = properties.unknown.saturating_add(1);
                }
                Err(
                    PropertyError::Reserved { .. }
                    | PropertyError::Short { .. }
                    | PropertyError::Value { .. }
                    | PropertyError::Cut,
                ) => {
                    properties.malformed = properties.malformed.saturating_add(1);
                }
            }
        }
        properties.pasid_bits = pasid_bits.unwrap_or(0);
        properties.page_requests = page_requests.unwrap_or_default();
        properties.formats = formats.unwrap_or_else(|| {
            let of_hardware: &[u8] = match properties.hardware {
                Some(Hardware::Smmuv3(_)) => &[numbers::FORMAT_ARM_SMMU3],
                Some(Hardware::Vtd(_)) => &[numbers::FORMAT_INTEL_PT],
                None => &[],
            };
            TableFormats::new(of_hardware).unwrap_or_default()
        });
        properties
    }

    /// The reserved region that `range` touches, if any.
    pub fn reserved_in(&self, range: IovaRange) -> Option<ReservedRegion> {
        self.reserved.iter().copied().find(|region| region.range.overlaps(range))
    }

    /// Where message-signalled interrupts go, the first such region.
    ///
    /// In a domain of MAP and UNMAP it is no address to map. In tables of the guest's own it is: an SMMUv3 translates
    /// interrupts, see [`AddressSpace`](crate::tables::AddressSpace#interrupts).
    pub fn msi(&self) -> Option<IovaRange> {
        self.msi_windows().next()
    }

    /// All regions that message-signalled interrupts go to; a device should have one (D-52).
    pub fn msi_windows(&self) -> impl Iterator<Item = IovaRange> {
        self.reserved.iter().filter(|region| region.kind == ReservedKind::Msi).map(|region| region.range)
    }
}

/// Keeps the first value of a property that has one, and counts others.
fn first<V>(place: &mut Option<V>, value: V, repeated: &mut u32) {
    if place.is_none() {
        *place = Some(value);
    } else {
        *repeated = repeated.saturating_add(1);
    }
}
