use pgtable_formats::context::vtd::CapRegisters;

use super::pci::hexadecimal;
use super::{Root, Seen};

/// An IOMMU that the kernel drives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IommuInstance {
    /// Its name in `/sys/class/iommu`.
    pub name: String,
    /// What it is, with its registers as far as sysfs has them.
    pub kind: IommuKind,
    /// Names of the devices behind it: PCI addresses, and names of platform devices.
    pub devices: Vec<String>,
}

/// What an IOMMU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IommuKind {
    /// Arm SMMUv3. Its registers are told by `IOMMU_GET_HW_INFO` alone.
    Smmuv3,
    /// Arm SMMUv1 or SMMUv2.
    Smmuv2,
    /// Intel VT-d, with capability and extended capability register where sysfs told them.
    Vtd(Option<CapRegisters>),
    /// AMD, with the two extended feature registers where sysfs told them.
    Amd(Option<(u64, u64)>),
    /// RISC-V IOMMU.
    Riscv,
    /// virtio-iommu: this is a guest, and the VMM translates.
    Virtio,
    /// Another.
    Other,
}

impl IommuInstance {
    /// All IOMMUs, by name.
    pub fn all(root: &Root) -> Seen<Vec<Self>> {
        root.names("/sys/class/iommu")
            .map(|names| names.into_iter().map(|name| Self::read(root, name)).collect())
    }

    fn read(root: &Root, name: String) -> Self {
        let folder = format!("/sys/class/iommu/{name}");
        let number = |path: &str| hexadecimal(&root.text(format!("{folder}/{path}")).into_known()?);
        let virtio = || root.link_name(format!("{folder}/device/driver")).as_deref() == Some("virtio_iommu");
        let kind = if name.starts_with("smmu3.") {
            IommuKind::Smmuv3
        } else if name.starts_with("smmu.") {
            IommuKind::Smmuv2
        } else if name.starts_with("dmar") {
            let registers = || Some((number("intel-iommu/cap")?, number("intel-iommu/ecap")?));
            IommuKind::Vtd(registers().map(|(cap, ecap)| CapRegisters { cap, ecap }))
        } else if name.starts_with("ivhd") {
            IommuKind::Amd(
                root.text(format!("{folder}/amd-iommu/features")).into_known().and_then(|t| features(&t)),
            )
        } else if name.starts_with("riscv-iommu") {
            IommuKind::Riscv
        } else if name.starts_with("virtio") || virtio() || is_virtio_function(root, &name) {
            IommuKind::Virtio
        } else {
            IommuKind::Other
        };
        let devices = root.names(format!("{folder}/devices")).into_known().unwrap_or_default();
        Self { name, kind, devices }
    }
}

/// `EFR:EFR2`; older kernels have `EFR` alone.
fn features(text: &str) -> Option<(u64, u64)> {
    let (first, second) = text.split_once(':').unwrap_or((text, "0"));
    Some((hexadecimal(first)?, hexadecimal(second)?))
}

/// A virtio-iommu is named after the PCI function that carries it (device ID 0x1040 + 23).
fn is_virtio_function(root: &Root, name: &str) -> bool {
    let id = |name_of: &str| root.text(format!("/sys/bus/pci/devices/{name}/{name_of}")).into_known();
    id("vendor").as_deref() == Some("0x1af4") && id("device").as_deref() == Some("0x1057")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amd_features_come_in_two_forms() {
        assert_eq!(features("25bf732fa2295afe:1d"), Some((0x25bf_732f_a229_5afe, 0x1d)));
        assert_eq!(features("f77ef22294ada"), Some((0xf_77ef_2229_4ada, 0)));
        assert_eq!(features("none"), None);
    }
}
