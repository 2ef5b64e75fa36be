//! What devices are called: the list of pci.ids where the machine has it, else the class.

use std::collections::HashMap;

use viommu_host_iommufd::sysfs::{PciDevice, Root};

const LISTS: [&str; 3] =
    ["/usr/share/misc/pci.ids", "/usr/share/hwdata/pci.ids", "/var/lib/pciutils/pci.ids"];

/// Names by vendor and device.
#[derive(Debug, Default)]
pub(super) struct Names {
    vendors: HashMap<u16, String>,
    devices: HashMap<(u16, u16), String>,
}

impl Names {
    pub(super) fn read(root: &Root) -> Self {
        let list = LISTS.into_iter().find_map(|list| std::fs::read(root.path(list)).ok());
        list.map(|list| Self::parse(&String::from_utf8_lossy(&list))).unwrap_or_default()
    }

    /// `8086  Intel Corporation`, and below it, after a tab, `1533  I210 Gigabit Network Connection`.
    fn parse(list: &str) -> Self {
        let mut names = Self::default();
        let mut vendor = None;
        for line in list.lines() {
            if line.starts_with('#') || line.starts_with("\t\t") {
                continue;
            }
            if line.starts_with("C ") {
                break; // classes
            }
            let (is_device, text) = line.strip_prefix('\t').map_or((false, line), |rest| (true, rest));
            let Some((id, name)) = text.split_once("  ") else { continue };
            let Ok(id) = u16::from_str_radix(id, 16) else { continue };
            match (is_device, vendor) {
                (true, Some(vendor)) => {
                    names.devices.insert((vendor, id), name.to_owned());
                }
                (true, None) => {}
                (false, _) => {
                    vendor = Some(id);
                    names.vendors.insert(id, name.to_owned());
                }
            }
        }
        names
    }

    /// Name of the device, or its class and numbers.
    pub(super) fn of(&self, device: &PciDevice) -> String {
        let PciDevice { vendor, device: id, class, .. } = *device;
        match (self.vendors.get(&vendor), self.devices.get(&(vendor, id))) {
            (Some(vendor), Some(name)) => format!("{vendor} {name}"),
            _ => {
                let name = emulated(vendor, id).unwrap_or_else(|| class_name(class));
                format!("{name} [{vendor:04x}:{id:04x}]")
            }
        }
    }
}

/// Devices of virtual machines, whose class says little. Those of virtio: 0x1040 and the device type.
fn emulated(vendor: u16, device: u16) -> Option<&'static str> {
    Some(match (vendor, device) {
        (0x1234, 0x11e8) => "QEMU edu",
        (0x1b36, 0x0005) => "QEMU test device",
        (0x1af4, 0x1000 | 0x1041) => "virtio network",
        (0x1af4, 0x1001 | 0x1042) => "virtio disk",
        (0x1af4, 0x1002 | 0x1045) => "virtio balloon",
        (0x1af4, 0x1003 | 0x1043) => "virtio console",
        (0x1af4, 0x1004 | 0x1048) => "virtio SCSI",
        (0x1af4, 0x1005 | 0x1044) => "virtio entropy",
        (0x1af4, 0x1009 | 0x1049) => "virtio 9P",
        (0x1af4, 0x1050) => "virtio GPU",
        (0x1af4, 0x1052) => "virtio input",
        (0x1af4, 0x1053) => "virtio socket",
        (0x1af4, 0x1057) => "virtio-iommu",
        (0x1af4, 0x1058) => "virtio memory",
        (0x1af4, 0x105a) => "virtio file system",
        (0x1af4, _) => "virtio device",
        _ => return None,
    })
}

/// PCI Code and ID Assignment: base class and subclass.
pub(super) fn class_name(class: u32) -> &'static str {
    match (class >> 16 & 0xff, class >> 8 & 0xff) {
        (0x01, 0x04) => "RAID controller",
        (0x01, 0x06) => "SATA controller",
        (0x01, 0x07) => "SAS controller",
        (0x01, 0x08) => "NVMe controller",
        (0x01, _) => "storage controller",
        (0x02, 0x00) => "Ethernet controller",
        (0x02, 0x07) => "InfiniBand controller",
        (0x02, _) => "network controller",
        (0x03, _) => "display controller",
        (0x04, _) => "multimedia device",
        (0x05, _) => "memory controller",
        (0x06, 0x00) => "host bridge",
        (0x06, 0x01) => "ISA bridge",
        (0x06, 0x04) => "PCI bridge",
        (0x06, _) => "bridge",
        (0x07, 0x00) => "serial port",
        (0x07, _) => "communication device",
        (0x08, 0x06) => "IOMMU",
        (0x08, 0x80) => "system device",
        (0x08, _) => "system device",
        (0x09, _) => "input device",
        (0x0b, _) => "processor",
        (0x0c, 0x03) => "USB controller",
        (0x0c, 0x05) => "SMBus controller",
        (0x0c, _) => "serial bus controller",
        (0x0d, _) => "wireless controller",
        (0x10, _) => "encryption controller",
        (0x11, _) => "signal processor",
        (0x12, _) => "accelerator",
        _ => "device",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_names_vendors_and_devices() {
        let list = "# comment\n8086  Intel Corporation\n\t1533  I210 Gigabit\n\t\t8086 0001  board\n1234  Other\n\
                    C 02  Network controller\n\t00  Ethernet controller\n";
        let names = Names::parse(list);
        assert_eq!(names.devices.get(&(0x8086, 0x1533)).unwrap(), "I210 Gigabit");
        assert_eq!((names.vendors.len(), names.devices.len()), (2, 1));
    }
}
