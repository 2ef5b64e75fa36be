//! Tells a guest where its virtio-iommu is and which devices are behind it.
//!
//! A virtio-iommu cannot describe its own topology: firmware does, by an ACPI table (VIOT) or by
//! device tree nodes. A VMM states the topology once, as a [`Topology`], and takes from it
//!
//! * the **endpoint ID** of each device ([`Topology::endpoint_id`]): the number by which the guest
//!   names the device in ATTACH and PROBE, and under which the VMM registers it with its device model;
//! * the bytes of the **VIOT** table ([`viot`]);
//! * the **device tree** node of the IOMMU, and the `iommu-map` and `iommus` properties that refer to
//!   it ([`DeviceTree`]).
//!
//! All three come from the same value, so they cannot disagree. A `Topology` is legal once it exists:
//! every device has one endpoint ID, no ID is given twice, and the IOMMU itself is never an endpoint.
//!
//! ```
//! use viommu_topology::{Bdf, Device, DeviceTree, MmioEndpoint, Oem, PciAddress, PciRange, Topology, viot};
//!
//! // The IOMMU is 0000:00:01.0. Behind it: two whole PCI segments, and one platform device.
//! let iommu = PciAddress { segment: 0, bdf: Bdf::new(0, 1, 0)? };
//! let topology = Topology::new(
//!     iommu,
//!     [
//!         PciRange::new(0..=1, Bdf::FIRST..=Bdf::LAST, 0)?.into(),
//!         MmioEndpoint { base: 0x0a00_3000, id: 0x2_0000 }.into(),
//!     ],
//! )?;
//!
//! let nic = PciAddress { segment: 1, bdf: Bdf::new(0, 3, 0)? };
//! assert_eq!(topology.endpoint_id(nic), Some(0x1_0018));
//! assert_eq!(topology.endpoint_id(Device::Mmio { base: 0x0a00_3000 }), Some(0x2_0000));
//! assert_eq!(topology.endpoint_id(iommu), None);
//!
//! // ACPI: one table, to be listed in the XSDT.
//! let table = viot(
//!     std::slice::from_ref(&topology),
//!     &Oem { id: *b"MYVMM ", table_id: *b"MYTABLES", revision: 1 },
//! )?;
//! assert_eq!(&table[..4], b"VIOT");
//!
//! // Device tree: the IOMMU is a child of the first host bridge, both bridges map to it.
//! let mut fdt = vm_fdt::FdtWriter::new()?;
//! let tree = DeviceTree::new(&topology, 1)?;
//! let root = fdt.begin_node("")?;
//! for segment in 0..=1 {
//!     let bridge = fdt.begin_node(&format!("pci@{segment}"))?;
//!     // … compatible, reg, ranges, #address-cells = <3>, #size-cells = <2> …
//!     tree.write_iommu_map(&mut fdt, segment)?;
//!     if segment == 0 {
//!         tree.write_pci_node(&mut fdt)?;
//!     }
//!     fdt.end_node(bridge)?;
//! }
//! fdt.end_node(root)?;
//! let blob = fdt.finish()?;
//! # assert!(blob.len() > 40);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What the guest expects besides
//!
//! Linux finds a PCI IOMMU only at exactly the address in the table. Keep it on a bus whose number
//! neither firmware nor guest changes: bus 0. A virtio-mmio IOMMU needs a device in the ACPI namespace
//! whose memory resource covers [`Device::Mmio`]'s base, and an MMIO endpoint one whose *first* memory
//! resource starts at its base; VIOT refers to them by that address. Virtio devices behind the IOMMU
//! have to offer `VIRTIO_F_ACCESS_PLATFORM`, or their DMA goes past it.
//!
//! # Not supported
//!
//! * Several IOMMUs are described by several `Topology` values: [`viot`] takes them all. In a device
//!   tree, each is written by its own [`DeviceTree`]; a host bridge whose devices are divided among
//!   them needs one `iommu-map`, which the caller joins from [`DeviceTree::iommu_map`].
//! * Device tree `reg` of a virtio-mmio IOMMU is written for two address and two size cells.
//! * `iommu-map-mask` is not written: requester IDs are mapped as they are.
//! * ACPI namespace objects, and reserved regions (they are in the reply to PROBE, not in firmware tables).
//! * Reading either form back; this crate only writes.

#![forbid(unsafe_code)]

mod address;
mod device_tree;
mod endpoints;
mod error;
mod topology;
mod viot;

pub use address::{Bdf, Device, PciAddress};
pub use device_tree::{DeviceTree, DeviceTreeError, IommuMapEntry, MmioNode};
pub use endpoints::{Endpoints, MmioEndpoint, PciRange};
pub use error::TopologyError;
pub use topology::Topology;
pub use viot::{Oem, ViotError, viot};
