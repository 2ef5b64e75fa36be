//! The ACPI Virtual I/O Translation Table (VIOT), as introduced by ACPI 6.5.

use acpi_tables::sdt::Sdt;
use thiserror::Error;
use zerocopy::{
    Immutable, IntoBytes, Unaligned,
    little_endian::{U16, U32, U64},
};

use crate::{Device, Endpoints, Topology};

/// Who made the table: three fields of the ACPI table header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Oem {
    /// OEM ID, the same in all tables of a machine; ASCII, padded with spaces.
    pub id: [u8; 6],
    /// OEM table ID; ASCII, padded with spaces.
    pub table_id: [u8; 8],
    /// OEM revision, in the VMM's own counting.
    pub revision: u32,
}

/// Why topologies do not fit in one VIOT table.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ViotError {
    /// There is nothing to describe. A machine without an IOMMU has no VIOT table.
    #[error("no IOMMU to describe")]
    NoIommu,
    /// Two of the IOMMUs are the same device.
    #[error("{0} is given as an IOMMU twice")]
    SameIommu(Device),
    /// One IOMMU is behind another one. Its driver would wait for the other's.
    #[error("IOMMU {inner} is an endpoint of IOMMU {outer}")]
    IommuBehindIommu {
        /// The one that is an endpoint.
        inner: Device,
        /// The one whose endpoint it is.
        outer: Device,
    },
    /// A device is behind two IOMMUs.
    #[error("{first} and {second}, behind different IOMMUs, have devices in common")]
    SameDevice {
        /// The entry of the IOMMU that comes first.
        first: Endpoints,
        /// The entry of the IOMMU that comes later.
        second: Endpoints,
    },
    /// Nodes are counted, and IOMMU nodes are referred to, by 16-bit numbers.
    #[error("{iommus} IOMMU nodes and {endpoints} endpoint nodes are more than a table can hold")]
    TooManyNodes {
        /// How many IOMMU nodes there would be.
        iommus: usize,
        /// How many endpoint nodes there would be.
        endpoints: usize,
    },
}

/// The VIOT table, revision 0, that describes `topologies`: header, checksum and all.
///
/// The nodes of the IOMMUs come first, then the endpoints of each.
///
/// # Errors
/// See [`ViotError`]. A single topology is refused only if it has more than 65534 entries.
pub fn viot(topologies: &[Topology], oem: &Oem) -> Result<Vec<u8>, ViotError> {
    let iommus = topologies.len();
    let endpoints = topologies.iter().map(|topology| topology.endpoints().len()).sum();
    let too_many = ViotError::TooManyNodes { iommus, endpoints };
    let node_count = u16::try_from(iommus.saturating_add(endpoints)).map_err(|_| too_many)?;
    check_together(topologies)?;

    let mut body = Vec::new();
    let header = Header { node_count: node_count.into(), node_offset: FIRST_NODE.into(), reserved: [0; 8] };
    body.extend_from_slice(header.as_bytes());
    for topology in topologies {
        body.extend_from_slice(IommuNode::new(topology.iommu()).as_bytes());
    }
    for (index, topology) in topologies.iter().enumerate() {
        let offset = index.saturating_mul(size_of::<IommuNode>()).saturating_add(usize::from(FIRST_NODE));
        let iommu_node = u16::try_from(offset).map_err(|_| too_many)?;
        for entry in topology.endpoints() {
            body.extend_from_slice(EndpointNode::new(entry, iommu_node).as_bytes());
        }
    }

    let mut table = Sdt::new(*b"VIOT", ACPI_HEADER, REVISION, oem.id, oem.table_id, oem.revision);
    table.append_slice(&body);
    Ok(table.as_slice().to_vec())
}

fn check_together(topologies: &[Topology]) -> Result<(), ViotError> {
    if topologies.is_empty() {
        return Err(ViotError::NoIommu);
    }
    for (index, second) in topologies.iter().enumerate() {
        for first in topologies.iter().take(index) {
            check_pair(first, second)?;
        }
    }
    Ok(())
}

fn check_pair(first: &Topology, second: &Topology) -> Result<(), ViotError> {
    if first.iommu() == second.iommu() {
        return Err(ViotError::SameIommu(first.iommu()));
    }
    for (outer, inner) in [(first, second), (second, first)] {
        if outer.endpoint_id(inner.iommu()).is_some() {
            return Err(ViotError::IommuBehindIommu { inner: inner.iommu(), outer: outer.iommu() });
        }
    }
    for first in first.endpoints() {
        for second in second.endpoints() {
            if first.shares_device(second) {
                return Err(ViotError::SameDevice { first: *first, second: *second });
            }
        }
    }
    Ok(())
}

/// Bytes of the header that all ACPI tables begin with.
const ACPI_HEADER: u32 = 36;

/// 0 as in QEMU, cloud-hypervisor and ACPICA's template.
const REVISION: u8 = 0;

/// Offset of the first node from the start of the table.
const FIRST_NODE: u16 = 48;

/// What follows the ACPI header, at offset 36.
#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct Header {
    /// @36: nodes of all types.
    node_count: U16,
    /// @38: the first node, from the start of the table.
    node_offset: U16,
    /// @40.
    reserved: [u8; 8],
}

/// @0 of each node.
#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct NodeHeader {
    /// @0.
    node_type: u8,
    /// @1.
    reserved: u8,
    /// @2: bytes of the node, this header included.
    length: U16,
}

impl NodeHeader {
    fn new(node_type: u8, length: u16) -> Self {
        Self { node_type, reserved: 0, length: length.into() }
    }
}

/// Type 3 (virtio-pci): segment le16@4, bdf le16@6, 8 reserved bytes @8.
/// Type 4 (virtio-mmio): 4 reserved bytes @4, base address le64@8.
#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct IommuNode {
    header: NodeHeader,
    segment: U16,
    bdf: U16,
    base_address: U64,
}

impl IommuNode {
    const LENGTH: u16 = 16;

    fn new(iommu: Device) -> Self {
        match iommu {
            Device::Pci(address) => Self {
                header: NodeHeader::new(3, Self::LENGTH),
                segment: address.segment.into(),
                bdf: address.bdf.rid().into(),
                base_address: U64::ZERO,
            },
            Device::Mmio { base } => Self {
                header: NodeHeader::new(4, Self::LENGTH),
                segment: U16::ZERO,
                bdf: U16::ZERO,
                base_address: base.into(),
            },
        }
    }
}

/// Type 1 (PCI range): first and last segment le16@8 and @10, first and last BDF le16@12 and @14.
/// Type 2 (MMIO endpoint): base address le64@8.
#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct EndpointNode {
    header: NodeHeader,
    /// @4: ID of the first, or only, endpoint.
    endpoint: U32,
    /// @8.
    place: [u8; 8],
    /// @16: the IOMMU's node, from the start of the table.
    output_node: U16,
    /// @18.
    reserved: [u8; 6],
}

impl EndpointNode {
    const LENGTH: u16 = 24;

    fn new(entry: &Endpoints, iommu_node: u16) -> Self {
        let (node_type, endpoint, place) = match entry {
            Endpoints::Pci(range) => {
                let (first_segment, last_segment) = range.segments().into_inner();
                let (first_bdf, last_bdf) = range.bdfs().into_inner();
                let place = PciPlace {
                    first_segment: first_segment.into(),
                    last_segment: last_segment.into(),
                    first_bdf: first_bdf.rid().into(),
                    last_bdf: last_bdf.rid().into(),
                };
                (1, range.first_id(), zerocopy::transmute!(place))
            }
            Endpoints::Mmio(endpoint) => (2, endpoint.id, endpoint.base.to_le_bytes()),
        };
        Self {
            header: NodeHeader::new(node_type, Self::LENGTH),
            endpoint: endpoint.into(),
            place,
            output_node: iommu_node.into(),
            reserved: [0; 6],
        }
    }
}

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct PciPlace {
    first_segment: U16,
    last_segment: U16,
    first_bdf: U16,
    last_bdf: U16,
}

const _: () = {
    assert!(size_of::<Header>() == 12);
    assert!(size_of::<IommuNode>() == IommuNode::LENGTH as usize);
    assert!(size_of::<EndpointNode>() == EndpointNode::LENGTH as usize);
};
