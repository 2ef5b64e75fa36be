//! Devices behind the IOMMU, and the endpoint ID that each of them has.

use std::{fmt, ops::RangeInclusive};

use crate::{Bdf, Device, PciAddress, TopologyError};

/// From one segment to the next, endpoint IDs advance by this much (VIOT, type 1 node).
const IDS_PER_SEGMENT: u32 = 1 << 16;

/// PCI functions behind the IOMMU: the same BDFs of each of one or more segments.
///
/// The endpoint ID of a function is
/// `((segment - first segment) << 16) + (bdf - first bdf) + first_id`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PciRange {
    first_segment: u16,
    last_segment: u16,
    first_bdf: Bdf,
    last_bdf: Bdf,
    first_id: u32,
}

impl PciRange {
    /// The functions `bdfs` of each of `segments`; the first one gets the endpoint ID `first_id`.
    ///
    /// # Errors
    /// [`TopologyError::SegmentsInverted`], [`TopologyError::BdfsInverted`] for a range that ends
    /// before it starts; [`TopologyError::EndpointIdOverflow`] if the last ID is above 32 bits.
    pub fn new(
        segments: RangeInclusive<u16>,
        bdfs: RangeInclusive<Bdf>,
        first_id: u32,
    ) -> Result<Self, TopologyError> {
        let (first_segment, last_segment) = segments.into_inner();
        let (first_bdf, last_bdf) = bdfs.into_inner();
        let Some(more_segments) = last_segment.checked_sub(first_segment) else {
            return Err(TopologyError::SegmentsInverted { first: first_segment, last: last_segment });
        };
        let Some(more_bdfs) = last_bdf.rid().checked_sub(first_bdf.rid()) else {
            return Err(TopologyError::BdfsInverted { first: first_bdf, last: last_bdf });
        };
        let last_id = u64::from(first_id)
            + u64::from(more_segments) * u64::from(IDS_PER_SEGMENT)
            + u64::from(more_bdfs);
        if last_id > u64::from(u32::MAX) {
            return Err(TopologyError::EndpointIdOverflow {
                first_id,
                segments: u32::from(more_segments) + 1,
                last_id,
            });
        }
        Ok(Self { first_segment, last_segment, first_bdf, last_bdf, first_id })
    }

    /// All functions of one segment.
    ///
    /// # Errors
    /// [`TopologyError::EndpointIdOverflow`] if `first_id` is above `0xffff_0000`.
    pub fn segment(segment: u16, first_id: u32) -> Result<Self, TopologyError> {
        Self::new(segment..=segment, Bdf::FIRST..=Bdf::LAST, first_id)
    }

    /// One function alone.
    pub const fn function(address: PciAddress, id: u32) -> Self {
        Self {
            first_segment: address.segment,
            last_segment: address.segment,
            first_bdf: address.bdf,
            last_bdf: address.bdf,
            first_id: id,
        }
    }

    /// The segments, first and last included.
    pub const fn segments(&self) -> RangeInclusive<u16> {
        self.first_segment..=self.last_segment
    }

    /// The BDFs taken of each segment, first and last included.
    pub const fn bdfs(&self) -> RangeInclusive<Bdf> {
        self.first_bdf..=self.last_bdf
    }

    /// The endpoint ID of the first BDF of the first segment.
    pub const fn first_id(&self) -> u32 {
        self.first_id
    }

    /// The endpoint ID of `address`, if it is in the range.
    pub fn endpoint_id(&self, address: PciAddress) -> Option<u32> {
        if !self.segments().contains(&address.segment) || !self.bdfs().contains(&address.bdf) {
            return None;
        }
        let segment = u32::from(address.segment.checked_sub(self.first_segment)?);
        let bdf = u32::from(address.bdf.rid().checked_sub(self.first_bdf.rid())?);
        segment.checked_mul(IDS_PER_SEGMENT)?.checked_add(bdf)?.checked_add(self.first_id)
    }

    /// The function that has the endpoint ID `id`, if it is in the range.
    pub fn address(&self, id: u32) -> Option<PciAddress> {
        let offset = id.checked_sub(self.first_id)?;
        let segment = u16::try_from(offset / IDS_PER_SEGMENT).ok()?;
        let rid = u16::try_from(offset % IDS_PER_SEGMENT).ok()?;
        let address = PciAddress {
            segment: self.first_segment.checked_add(segment)?,
            bdf: Bdf::from_rid(self.first_bdf.rid().checked_add(rid)?),
        };
        (self.segments().contains(&address.segment) && self.bdfs().contains(&address.bdf)).then_some(address)
    }

    /// Whether one PCI function is in both.
    fn shares_device(&self, other: &Self) -> bool {
        self.first_segment <= other.last_segment
            && other.first_segment <= self.last_segment
            && self.first_bdf <= other.last_bdf
            && other.first_bdf <= self.last_bdf
    }
}

/// One platform device behind the IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MmioEndpoint {
    /// Guest-physical address of the device's first register.
    pub base: u64,
    /// Its endpoint ID; every 32-bit number is one.
    pub id: u32,
}

/// One entry of a [`Topology`](crate::Topology).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Endpoints {
    /// PCI functions.
    Pci(PciRange),
    /// One platform device.
    Mmio(MmioEndpoint),
}

impl Endpoints {
    /// The endpoint ID of `device`, if this entry names it.
    pub fn endpoint_id(&self, device: Device) -> Option<u32> {
        match (self, device) {
            (Self::Pci(range), Device::Pci(address)) => range.endpoint_id(address),
            (Self::Mmio(endpoint), Device::Mmio { base }) => (endpoint.base == base).then_some(endpoint.id),
            (Self::Pci(_), Device::Mmio { .. }) | (Self::Mmio(_), Device::Pci(_)) => None,
        }
    }

    /// The device that has the endpoint ID `id`, if this entry names it.
    pub fn device(&self, id: u32) -> Option<Device> {
        match self {
            Self::Pci(range) => range.address(id).map(Device::Pci),
            Self::Mmio(endpoint) => (endpoint.id == id).then_some(Device::Mmio { base: endpoint.base }),
        }
    }

    /// Whether `device` is the only one that this entry names.
    pub(crate) fn is_only(&self, device: Device) -> bool {
        let single = match self {
            Self::Pci(range) => {
                range.first_segment == range.last_segment && range.first_bdf == range.last_bdf
            }
            Self::Mmio(_) => true,
        };
        single && self.endpoint_id(device).is_some()
    }

    /// Whether one device is named by both.
    pub(crate) fn shares_device(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Pci(a), Self::Pci(b)) => a.shares_device(b),
            (Self::Mmio(a), Self::Mmio(b)) => a.base == b.base,
            (Self::Pci(_), Self::Mmio(_)) | (Self::Mmio(_), Self::Pci(_)) => false,
        }
    }

    /// Whether one endpoint ID is given by both.
    pub(crate) fn shares_endpoint_id(&self, other: &Self) -> bool {
        self.id_blocks().intersects(&other.id_blocks())
    }

    fn id_blocks(&self) -> IdBlocks {
        match self {
            Self::Pci(range) => IdBlocks {
                first: i64::from(range.first_id),
                last_of_first: i64::from(range.first_id)
                    + (i64::from(range.last_bdf.rid()) - i64::from(range.first_bdf.rid())),
                further: i64::from(range.last_segment) - i64::from(range.first_segment),
            },
            Self::Mmio(endpoint) => {
                IdBlocks { first: i64::from(endpoint.id), last_of_first: i64::from(endpoint.id), further: 0 }
            }
        }
    }
}

impl From<PciRange> for Endpoints {
    fn from(range: PciRange) -> Self {
        Self::Pci(range)
    }
}

impl From<MmioEndpoint> for Endpoints {
    fn from(endpoint: MmioEndpoint) -> Self {
        Self::Mmio(endpoint)
    }
}

impl fmt::Display for Endpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(range) => write!(
                f,
                "PCI segments {:04x}..={:04x} {}..={} (endpoint IDs from {:#x})",
                range.first_segment, range.last_segment, range.first_bdf, range.last_bdf, range.first_id
            ),
            Self::Mmio(endpoint) => write!(f, "MMIO {:#x} (endpoint ID {:#x})", endpoint.base, endpoint.id),
        }
    }
}

/// The endpoint IDs of one entry: a block `first..=last_of_first` of at most 2^16 IDs, and `further`
/// more of the same length, each 2^16 above the one before.
///
/// 64-bit signed numbers: all values are below 2^33, so that no sum of a few of them overflows.
struct IdBlocks {
    first: i64,
    last_of_first: i64,
    further: i64,
}

impl IdBlocks {
    /// Whether block `i` here and block `j` there overlap, for any `i` and `j`. That depends on
    /// `d = j - i` only, so it is one interval of `d` to compare with the `d` that exist.
    fn intersects(&self, other: &Self) -> bool {
        let step = i64::from(IDS_PER_SEGMENT);
        // first <= other.last + d * step  and  other.first + d * step <= last
        let lowest = ceiling_div(self.first - other.last_of_first, step);
        let highest = (self.last_of_first - other.first).div_euclid(step);
        lowest.max(-self.further) <= highest.min(other.further)
    }
}

fn ceiling_div(value: i64, divisor: i64) -> i64 {
    -(-value).div_euclid(divisor)
}
