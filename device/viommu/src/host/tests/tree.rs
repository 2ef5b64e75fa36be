//! Machines made of files.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use viommu_host_iommufd::sysfs::{Machine, Root};

/// A folder with sys, proc, dev and boot; gone when dropped.
pub(super) struct Tree(PathBuf);

impl Tree {
    pub(super) fn new(release: &str, architecture: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let tree = Self(std::env::temp_dir().join(format!("viommu-host-{}-{number}", std::process::id())));
        let _ = fs::remove_dir_all(&tree.0);
        for folder in
            ["sys/class/iommu", "sys/bus/pci/devices", "sys/bus/pci/drivers", "sys/kernel/iommu_groups"]
        {
            fs::create_dir_all(tree.0.join(folder)).unwrap();
        }
        tree.file("proc/sys/kernel/osrelease", release)
            .file("proc/sys/kernel/arch", architecture)
            .file("proc/cmdline", "root=/dev/vda1 quiet")
    }

    /// A server: every option that is needed, iommufd and vfio-pci loaded.
    pub(super) fn server(release: &str, architecture: &str) -> Self {
        let config = "CONFIG_IOMMUFD=y\nCONFIG_VFIO=m\nCONFIG_VFIO_PCI=m\nCONFIG_VFIO_DEVICE_CDEV=y\n\
                      CONFIG_ARM_SMMU_V3=y\nCONFIG_ARM_SMMU_V3_IOMMUFD=y\nCONFIG_INTEL_IOMMU=y\nCONFIG_AMD_IOMMU=y\n\
                      CONFIG_PCI_ATS=y\nCONFIG_PCI_PRI=y\nCONFIG_PCI_PASID=y\n";
        let tree = Self::new(release, architecture)
            .file(&format!("boot/config-{release}"), config)
            .file("dev/iommu", "");
        fs::create_dir(tree.0.join("sys/bus/pci/drivers/vfio-pci")).unwrap();
        tree
    }

    pub(super) fn file(self, path: &str, content: impl AsRef<[u8]>) -> Self {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let _ = fs::remove_file(&path);
        fs::write(path, content).unwrap();
        self
    }

    pub(super) fn table(self, signature: &str) -> Self {
        self.file(&format!("sys/firmware/acpi/tables/{signature}"), "")
    }

    /// What is there, but cannot be read: a folder in its place, as root may read every file.
    pub(super) fn unreadable(self, path: &str) -> Self {
        let path = self.0.join(path);
        let _ = fs::remove_file(&path);
        fs::create_dir_all(path).unwrap();
        self
    }

    pub(super) fn without(self, path: &str) -> Self {
        fs::remove_file(self.0.join(path)).unwrap();
        self
    }

    pub(super) fn link(self, path: &str, target: &str) -> Self {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let _ = fs::remove_file(&path);
        symlink(target, path).unwrap();
        self
    }

    /// A PCI function, behind nothing.
    pub(super) fn function(self, bdf: &str, ids: (u16, u16), class: u32, config: &[u8]) -> Self {
        let folder = format!("sys/bus/pci/devices/{bdf}");
        self.file(&format!("{folder}/vendor"), format!("{:#06x}\n", ids.0))
            .file(&format!("{folder}/device"), format!("{:#06x}\n", ids.1))
            .file(&format!("{folder}/class"), format!("{class:#08x}\n"))
            .file(&format!("{folder}/config"), config)
    }

    /// Puts it behind an IOMMU, in a group, and gives it to a driver.
    pub(super) fn behind(self, bdf: &str, iommu: &str, group: u32, driver: Option<&str>) -> Self {
        let folder = format!("sys/bus/pci/devices/{bdf}");
        let groups = format!("sys/kernel/iommu_groups/{group}");
        let mut tree = self
            .link(&format!("{folder}/iommu"), &format!("../../class/iommu/{iommu}"))
            .link(&format!("{folder}/iommu_group"), &format!("../../../../{groups}"))
            .link(&format!("{groups}/devices/{bdf}"), "../device")
            .link(&format!("sys/class/iommu/{iommu}/devices/{bdf}"), "../device")
            .file(&format!("{groups}/type"), "DMA-FQ\n")
            .file(&format!("{groups}/reserved_regions"), "0x0000000008000000 0x00000000080fffff msi\n");
        if let Some(driver) = driver {
            tree = tree.link(&format!("{folder}/driver"), &format!("../../drivers/{driver}"));
        }
        if driver == Some("vfio-pci") {
            let name = format!("vfio{group}");
            tree = tree
                .file(&format!("{folder}/vfio-dev/{name}/dev"), "511:0\n")
                .file(&format!("dev/vfio/devices/{name}"), "");
        }
        tree
    }

    pub(super) fn vtd(self, name: &str, cap: u64, ecap: u64) -> Self {
        let folder = format!("sys/class/iommu/{name}/intel-iommu");
        self.file(&format!("{folder}/cap"), format!("{cap:x}\n"))
            .file(&format!("{folder}/ecap"), format!("{ecap:x}\n"))
    }

    pub(super) fn path(&self) -> &PathBuf {
        &self.0
    }

    pub(super) fn machine(&self) -> Machine {
        Machine::read(&Root::at(&self.0))
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Configuration space of a function with these extended capabilities and their first bytes.
pub(super) fn config(capabilities: &[(u8, [u8; 4])]) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    for (index, (id, body)) in capabilities.iter().enumerate() {
        let place = 0x100 + 0x40 * index;
        let next = if index + 1 == capabilities.len() { 0 } else { place + 0x40 };
        let header = u32::from(*id) | 1 << 16 | u32::try_from(next).unwrap() << 20;
        bytes[place..place + 4].copy_from_slice(&header.to_le_bytes());
        bytes[place + 4..place + 8].copy_from_slice(body);
    }
    bytes
}

/// A function with ATS, page requests and 20-bit PASIDs.
pub(super) fn capable() -> Vec<u8> {
    config(&[(0x0f, [0x20, 0, 0, 0]), (0x13, [0; 4]), (0x1b, [6, 0x14, 0, 0])])
}

/// An IORT with one SMMUv3 and one root complex for all of segment 0.
pub(super) fn iort(memory_flags: u8) -> Vec<u8> {
    let mut bytes = vec![0; 48 + 88 + 40];
    let length = u32::try_from(bytes.len()).unwrap();
    bytes[..4].copy_from_slice(b"IORT");
    bytes[4..8].copy_from_slice(&length.to_le_bytes());
    bytes[36] = 2;
    bytes[40] = 48;
    bytes[48..51].copy_from_slice(&[4, 88, 0]);
    bytes[64..72].copy_from_slice(&0x905_0000u64.to_le_bytes());
    let complex = 48 + 88;
    bytes[complex..complex + 3].copy_from_slice(&[2, 40, 0]);
    bytes[complex + 12] = 40;
    bytes[complex + 23] = memory_flags;
    bytes
}
