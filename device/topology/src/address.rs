//! Where a device is, as firmware tables name it.

use std::fmt;

use crate::TopologyError;

/// Bus, device and function of a PCI device within its segment: also its requester ID.
///
/// Bits 15:8 are the bus, 7:3 the device, 2:0 the function.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf(u16);

impl Bdf {
    /// 00:00.0.
    pub const FIRST: Self = Self(0);
    /// ff:1f.7.
    pub const LAST: Self = Self(u16::MAX);

    /// Composes the three numbers.
    ///
    /// # Errors
    /// [`TopologyError::DeviceNumber`] above 31, [`TopologyError::FunctionNumber`] above 7.
    pub fn new(bus: u8, device: u8, function: u8) -> Result<Self, TopologyError> {
        if device > 31 {
            return Err(TopologyError::DeviceNumber(device));
        }
        if function > 7 {
            return Err(TopologyError::FunctionNumber(function));
        }
        Ok(Self(u16::from(bus) << 8 | u16::from(device) << 3 | u16::from(function)))
    }

    /// Takes a requester ID; every 16-bit number is one.
    pub const fn from_rid(rid: u16) -> Self {
        Self(rid)
    }

    /// The requester ID: `bus << 8 | device << 3 | function`.
    pub const fn rid(self) -> u16 {
        self.0
    }

    /// Bits 15:8.
    pub const fn bus(self) -> u8 {
        self.0.to_be_bytes()[0]
    }

    /// Bits 7:3.
    pub const fn device(self) -> u8 {
        self.0.to_be_bytes()[1] >> 3
    }

    /// Bits 2:0.
    pub const fn function(self) -> u8 {
        self.0.to_be_bytes()[1] & 7
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus(), self.device(), self.function())
    }
}

impl fmt::Debug for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A PCI function among all segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// PCI segment group in ACPI, `linux,pci-domain` in a device tree.
    pub segment: u16,
    /// Bus, device and function within the segment.
    pub bdf: Bdf,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{}", self.segment, self.bdf)
    }
}

/// A device that DMA comes from, or the IOMMU itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Device {
    /// A PCI function; as the IOMMU: virtio-pci.
    Pci(PciAddress),
    /// A platform device; as the IOMMU: virtio-mmio.
    Mmio {
        /// Guest-physical address of its first register.
        base: u64,
    },
}

impl From<PciAddress> for Device {
    fn from(address: PciAddress) -> Self {
        Self::Pci(address)
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(address) => address.fmt(f),
            Self::Mmio { base } => write!(f, "mmio@{base:#x}"),
        }
    }
}
