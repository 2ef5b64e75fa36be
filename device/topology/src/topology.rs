//! An IOMMU and what is behind it.

use crate::{Device, Endpoints, TopologyError};

/// One virtio-iommu and its endpoints.
///
/// Each device has at most one endpoint ID and each endpoint ID at most one device; the IOMMU is not an
/// endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    iommu: Device,
    endpoints: Vec<Endpoints>,
}

impl Topology {
    /// Checks that the entries go together.
    ///
    /// The BDF of the IOMMU may lie inside a PCI range (that of a whole bus, for instance). It has no
    /// endpoint ID then; the ID that the formula would give it stays unused.
    ///
    /// # Errors
    /// [`TopologyError::SameDevice`] and [`TopologyError::SameEndpointId`] if two entries overlap,
    /// [`TopologyError::OnlyTheIommu`] if an entry names the IOMMU and nothing else.
    pub fn new(
        iommu: impl Into<Device>,
        endpoints: impl IntoIterator<Item = Endpoints>,
    ) -> Result<Self, TopologyError> {
        let iommu = iommu.into();
        let mut accepted: Vec<Endpoints> = Vec::new();
        for second in endpoints {
            if second.is_only(iommu) {
                return Err(TopologyError::OnlyTheIommu(second));
            }
            for &first in &accepted {
                if first.shares_device(&second) {
                    return Err(TopologyError::SameDevice { first, second });
                }
                if first.shares_endpoint_id(&second) {
                    return Err(TopologyError::SameEndpointId { first, second });
                }
            }
            accepted.push(second);
        }
        Ok(Self { iommu, endpoints: accepted })
    }

    /// The IOMMU: virtio-pci at a PCI address, or virtio-mmio at a base address.
    pub const fn iommu(&self) -> Device {
        self.iommu
    }

    /// What is behind the IOMMU, in the order in which it was given.
    pub fn endpoints(&self) -> &[Endpoints] {
        &self.endpoints
    }

    /// The number by which the guest names `device` in its requests. `None` if the device is not behind
    /// this IOMMU, or is the IOMMU.
    ///
    /// A PCI function's DMA alias has an endpoint ID of its own: ask for the alias's BDF.
    pub fn endpoint_id(&self, device: impl Into<Device>) -> Option<u32> {
        let device = device.into();
        if device == self.iommu {
            return None;
        }
        self.endpoints.iter().find_map(|entry| entry.endpoint_id(device))
    }

    /// The device that the guest means by the endpoint ID `id`: the inverse of [`endpoint_id`](Self::endpoint_id).
    pub fn device(&self, id: u32) -> Option<Device> {
        let device = self.endpoints.iter().find_map(|entry| entry.device(id))?;
        (device != self.iommu).then_some(device)
    }
}
