//! Asking the kernel about the devices that VFIO already has.

use std::path::Path;

use viommu_host_iommufd::examine::examine;
use viommu_host_iommufd::sys::Sys;
use viommu_host_iommufd::sysfs::PciDevice;

use super::judge::Answer;

/// Who asks.
pub(super) struct Ask {
    passive: bool,
}

impl Ask {
    pub(super) fn new(passive: bool) -> Self {
        Self { passive }
    }

    /// Binds `device` to an iommufd of its own, asks, and lets go of it.
    pub(super) fn about(&self, device: &PciDevice) -> Answer {
        let node = device.vfio.as_ref().and_then(|vfio| vfio.node.as_ref());
        if self.passive || !node.is_some_and(|node| node.usable) {
            return Answer::NotAsked { passive: self.passive };
        }
        let Ok(kernel) = Sys::open() else {
            // What is wrong with /dev/iommu is told for the machine.
            return Answer::NotAsked { passive: false };
        };
        let folder = format!("/sys/bus/pci/devices/{}", device.bdf);
        match kernel.bind(Path::new(&folder)) {
            Ok((id, _handle)) => Answer::Examined(Box::new(examine(&kernel, id))),
            Err(error) => Answer::NotGiven(error.to_string()),
        }
    }
}
