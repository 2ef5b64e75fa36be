//! Device tree nodes and properties.
//!
//! The bindings are `virtio/mmio.yaml`, `virtio/pci-iommu.yaml`, `iommu/iommu.txt` and
//! `pci/pci-iommu.txt` of the Linux device tree bindings.

use thiserror::Error;
use vm_fdt::FdtWriter;

use crate::{Device, Endpoints, PciAddress, Topology};

/// Why the tree cannot be written.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DeviceTreeError {
    /// 0 and 0xffffffff refer to no node.
    #[error("{0:#x} is not a phandle")]
    Phandle(u32),
    /// A PCI node was asked for and the IOMMU is virtio-mmio, or the other way round.
    #[error("the IOMMU is {0}, which takes the other kind of node")]
    OtherTransport(Device),
    /// The register window is empty or reaches above 64 bits.
    #[error("{size:#x} bytes from {base:#x} on are not a register window")]
    Window {
        /// Guest-physical address of the first register.
        base: u64,
        /// Bytes.
        size: u64,
    },
    /// The binding of virtio-mmio requires an interrupt.
    #[error("a virtio-mmio node needs an interrupt")]
    NoInterrupt,
    /// The device is not behind this IOMMU.
    #[error("{0} is not an endpoint of this IOMMU")]
    NotAnEndpoint(Device),
    /// The writer refuses: a node is not open, a phandle is in use, the tree is too large.
    #[error(transparent)]
    Fdt(#[from] vm_fdt::Error),
}

/// What the topology does not tell about the node of a virtio-mmio IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioNode<'a> {
    /// Bytes of its register window.
    pub size: u64,
    /// The cells of `interrupts`, as the interrupt parent of the node defines them.
    pub interrupts: &'a [u32],
    /// Whether to write `dma-coherent`: the device sees guest memory as the CPUs do.
    pub dma_coherent: bool,
}

/// One entry of `iommu-map`: the requester IDs `rid_base ..` of a host bridge, `length` of them, are
/// the endpoints `endpoint_base ..` of the IOMMU node `phandle`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IommuMapEntry {
    /// First requester ID.
    pub rid_base: u32,
    /// Which IOMMU.
    pub phandle: u32,
    /// Endpoint ID of `rid_base`.
    pub endpoint_base: u32,
    /// How many requester IDs, 1 to 0x10000.
    pub length: u32,
}

impl IommuMapEntry {
    /// The four cells, in their order in the property.
    pub const fn cells(&self) -> [u32; 4] {
        [self.rid_base, self.phandle, self.endpoint_base, self.length]
    }
}

/// Writes one topology into the device tree of a VMM.
///
/// The caller opens the nodes around. In a flattened tree, the properties of a node stand before its
/// children: on a host bridge, call [`write_iommu_map`](Self::write_iommu_map) before
/// [`write_pci_node`](Self::write_pci_node).
#[derive(Clone, Copy, Debug)]
pub struct DeviceTree<'a> {
    topology: &'a Topology,
    phandle: u32,
}

impl<'a> DeviceTree<'a> {
    /// `phandle` is the number by which other nodes refer to the IOMMU; unique in the tree.
    ///
    /// # Errors
    /// [`DeviceTreeError::Phandle`] for 0 and 0xffffffff.
    pub const fn new(topology: &'a Topology, phandle: u32) -> Result<Self, DeviceTreeError> {
        match phandle {
            0 | u32::MAX => Err(DeviceTreeError::Phandle(phandle)),
            _ => Ok(Self { topology, phandle }),
        }
    }

    /// The number by which other nodes refer to the IOMMU.
    pub const fn phandle(&self) -> u32 {
        self.phandle
    }

    /// Writes the node of a virtio-pci IOMMU, as a child of the node that is open: the host bridge of
    /// the IOMMU's segment (or the bridge that the IOMMU is behind), with `#address-cells = <3>` and
    /// `#size-cells = <2>`.
    ///
    /// # Errors
    /// [`DeviceTreeError::OtherTransport`] for a virtio-mmio IOMMU, [`DeviceTreeError::Fdt`].
    pub fn write_pci_node(&self, fdt: &mut FdtWriter) -> Result<(), DeviceTreeError> {
        let Device::Pci(PciAddress { bdf, .. }) = self.topology.iommu() else {
            return Err(DeviceTreeError::OtherTransport(self.topology.iommu()));
        };
        let node = fdt.begin_node(&format!("iommu@{:x},{:x}", bdf.device(), bdf.function()))?;
        let compatible = ["virtio,pci-iommu", "pci1af4,1057"].map(String::from).to_vec();
        fdt.property_string_list("compatible", compatible)?;
        // Configuration space: bus 23:16, device 15:11, function 10:8.
        fdt.property_array_u32("reg", &[u32::from(bdf.rid()) << 8, 0, 0, 0, 0])?;
        self.write_provider(fdt)?;
        fdt.end_node(node)?;
        Ok(())
    }

    /// Writes the node of a virtio-mmio IOMMU, as a child of the node that is open, with
    /// `#address-cells = <2>` and `#size-cells = <2>`.
    ///
    /// # Errors
    /// [`DeviceTreeError::OtherTransport`] for a virtio-pci IOMMU, [`DeviceTreeError::Window`],
    /// [`DeviceTreeError::NoInterrupt`], [`DeviceTreeError::Fdt`].
    pub fn write_mmio_node(&self, fdt: &mut FdtWriter, rest: &MmioNode<'_>) -> Result<(), DeviceTreeError> {
        let Device::Mmio { base } = self.topology.iommu() else {
            return Err(DeviceTreeError::OtherTransport(self.topology.iommu()));
        };
        let size = rest.size;
        if size.checked_sub(1).and_then(|more| base.checked_add(more)).is_none() {
            return Err(DeviceTreeError::Window { base, size });
        }
        if rest.interrupts.is_empty() {
            return Err(DeviceTreeError::NoInterrupt);
        }
        let node = fdt.begin_node(&format!("iommu@{base:x}"))?;
        fdt.property_string("compatible", "virtio,mmio")?;
        fdt.property_array_u64("reg", &[base, size])?;
        fdt.property_array_u32("interrupts", rest.interrupts)?;
        if rest.dma_coherent {
            fdt.property_null("dma-coherent")?;
        }
        self.write_provider(fdt)?;
        fdt.end_node(node)?;
        Ok(())
    }

    /// The entries of `iommu-map` for the host bridge of `segment`, in ascending order of requester ID.
    /// That of the IOMMU itself is left out: its DMA is not translated.
    pub fn iommu_map(&self, segment: u16) -> Vec<IommuMapEntry> {
        let mut entries: Vec<_> = self
            .topology
            .endpoints()
            .iter()
            .filter_map(|entry| match entry {
                Endpoints::Pci(range) => Some(range),
                Endpoints::Mmio(_) => None,
            })
            .filter_map(|range| {
                let (first, last) = range.bdfs().into_inner();
                Some(IommuMapEntry {
                    rid_base: u32::from(first.rid()),
                    phandle: self.phandle,
                    endpoint_base: range.endpoint_id(PciAddress { segment, bdf: first })?,
                    length: u32::from(last.rid().checked_sub(first.rid())?) + 1,
                })
            })
            .flat_map(|entry| match self.topology.iommu() {
                Device::Pci(iommu) if iommu.segment == segment => without(entry, u32::from(iommu.bdf.rid())),
                Device::Pci(_) | Device::Mmio { .. } => [Some(entry), None],
            })
            .flatten()
            .collect();
        entries.sort_by_key(|entry| entry.rid_base);
        entries
    }

    /// Writes `iommu-map` into the node that is open: the host bridge of `segment`. Writes nothing if
    /// none of its devices is behind the IOMMU.
    ///
    /// # Errors
    /// [`DeviceTreeError::Fdt`].
    pub fn write_iommu_map(&self, fdt: &mut FdtWriter, segment: u16) -> Result<(), DeviceTreeError> {
        let cells: Vec<u32> = self.iommu_map(segment).iter().flat_map(IommuMapEntry::cells).collect();
        if !cells.is_empty() {
            fdt.property_array_u32("iommu-map", &cells)?;
        }
        Ok(())
    }

    /// The cells of `iommus` for the platform device at `base`: phandle and endpoint ID. `None` if it is
    /// not behind the IOMMU.
    pub fn iommus(&self, base: u64) -> Option<[u32; 2]> {
        Some([self.phandle, self.topology.endpoint_id(Device::Mmio { base })?])
    }

    /// Writes `iommus` into the node that is open: that of the platform device at `base`.
    ///
    /// # Errors
    /// [`DeviceTreeError::NotAnEndpoint`], [`DeviceTreeError::Fdt`].
    pub fn write_iommus(&self, fdt: &mut FdtWriter, base: u64) -> Result<(), DeviceTreeError> {
        let cells = self.iommus(base).ok_or(DeviceTreeError::NotAnEndpoint(Device::Mmio { base }))?;
        fdt.property_array_u32("iommus", &cells)?;
        Ok(())
    }

    /// What makes a node one that `iommus` and `iommu-map` can refer to. An endpoint ID is one cell.
    fn write_provider(&self, fdt: &mut FdtWriter) -> Result<(), DeviceTreeError> {
        fdt.property_u32("#iommu-cells", 1)?;
        fdt.property_phandle(self.phandle)?;
        Ok(())
    }
}

/// What is left of `entry` below and above `rid`.
fn without(entry: IommuMapEntry, rid: u32) -> [Option<IommuMapEntry>; 2] {
    let Some(below) = rid.checked_sub(entry.rid_base).filter(|below| *below < entry.length) else {
        return [Some(entry), None];
    };
    // `below` is less than `length`, and the IDs of the whole entry fit in 32 bits.
    let skipped = below + 1;
    let above = IommuMapEntry {
        rid_base: entry.rid_base.saturating_add(skipped),
        endpoint_base: entry.endpoint_base.saturating_add(skipped),
        length: entry.length - skipped,
        ..entry
    };
    [IommuMapEntry { length: below, ..entry }, above].map(|part| (part.length > 0).then_some(part))
}
