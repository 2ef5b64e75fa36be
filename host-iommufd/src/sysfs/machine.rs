use super::{Group, IommuInstance, PciDevice, Root, Seen, System};

/// All that is looked at.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Kernel and firmware.
    pub system: System,
    /// The IOMMUs that the kernel drives.
    pub iommus: Seen<Vec<IommuInstance>>,
    /// The IOMMU groups.
    pub groups: Seen<Vec<Group>>,
    /// The PCI functions.
    pub devices: Seen<Vec<PciDevice>>,
}

impl Machine {
    /// Looks at the machine below `root`.
    pub fn read(root: &Root) -> Self {
        Self {
            system: System::read(root),
            iommus: IommuInstance::all(root),
            groups: Group::all(root),
            devices: PciDevice::all(root),
        }
    }

    /// The group with this number.
    pub fn group(&self, id: u32) -> Option<&Group> {
        self.groups.known()?.iter().find(|group| group.id == id)
    }

    /// The IOMMU with this name.
    pub fn iommu(&self, name: &str) -> Option<&IommuInstance> {
        self.iommus.known()?.iter().find(|iommu| iommu.name == name)
    }
}
