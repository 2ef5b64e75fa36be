use std::fmt;
use std::str::FromStr;

use super::{ConfigSpace, Node, Root, Seen};

/// Where a PCI function is: segment, bus, device, function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf {
    /// Segment (domain).
    pub segment: u32,
    /// Requester ID: bus in bits 15:8, device in bits 7:3, function in bits 2:0.
    pub requester: u16,
}

/// Not `SSSS:BB:DD.F`, nor `BB:DD.F` of segment 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a PCI function is written like 0000:01:00.0")]
pub struct InvalidBdf;

/// What sysfs tells of a PCI function.
#[derive(Clone, Debug)]
pub struct PciDevice {
    /// Where it is.
    pub bdf: Bdf,
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Class in bits 23:16, subclass in bits 15:8, programming interface in bits 7:0.
    pub class: u32,
    /// NUMA node, where the firmware names one.
    pub numa_node: Option<u32>,
    /// Name of the driver that has it.
    pub driver: Option<String>,
    /// Name of its IOMMU, as in `/sys/class/iommu`.
    pub iommu: Option<String>,
    /// Number of its IOMMU group.
    pub group: Option<u32>,
    /// Its VFIO device; `None` where no VFIO driver has it.
    pub vfio: Option<VfioCdev>,
    /// The function that a virtual function belongs to.
    pub physical_function: Option<Bdf>,
    /// What the host uses it for: names of network interfaces and of disks.
    pub uses: Vec<String>,
    /// Whether it is the display that the firmware used.
    pub boot_display: bool,
    /// Its configuration space.
    pub config: Seen<ConfigSpace>,
}

/// A VFIO device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VfioCdev {
    /// `vfio0` and so on; with `noiommu-` before it, no IOMMU protects the machine from the device.
    pub name: String,
    /// The file `/dev/vfio/devices/NAME`; `None` where the kernel makes none (no `CONFIG_VFIO_DEVICE_CDEV`).
    pub node: Option<Node>,
}

impl PciDevice {
    /// All PCI functions, in order of their addresses.
    pub fn all(root: &Root) -> Seen<Vec<Self>> {
        root.names("/sys/bus/pci/devices").map(|names| {
            let mut devices: Vec<_> = names
                .iter()
                .filter_map(|name| name.parse().ok())
                .filter_map(|bdf| Self::read(root, bdf))
                .collect();
            devices.sort_by_key(|device| device.bdf);
            devices
        })
    }

    /// One function. `None` where there is no such function.
    pub fn read(root: &Root, bdf: Bdf) -> Option<Self> {
        let folder = format!("/sys/bus/pci/devices/{bdf}");
        let attribute = |name: &str| root.text(format!("{folder}/{name}")).into_known();
        let number = |name: &str| hexadecimal(&attribute(name)?);
        let link = |name: &str| root.link_name(format!("{folder}/{name}"));
        Some(Self {
            bdf,
            vendor: number("vendor")?.try_into().ok()?,
            device: number("device")?.try_into().ok()?,
            class: number("class")?.try_into().ok()?,
            numa_node: attribute("numa_node").and_then(|node| node.parse().ok()),
            driver: link("driver"),
            iommu: link("iommu"),
            group: link("iommu_group").and_then(|group| group.parse().ok()),
            vfio: vfio(root, &folder),
            physical_function: link("physfn").and_then(|name| name.parse().ok()),
            uses: uses(root, &folder),
            boot_display: attribute("boot_vga").as_deref() == Some("1"),
            config: root.bytes(format!("{folder}/config")).map(ConfigSpace::new),
        })
    }

    /// A bridge, or what stands for the host itself: not something that is given to a guest.
    pub fn is_bridge(&self) -> bool {
        self.class >> 16 == 0x06
    }
}

fn vfio(root: &Root, folder: &str) -> Option<VfioCdev> {
    let name = root
        .names(format!("{folder}/vfio-dev"))
        .into_known()?
        .into_iter()
        .find(|name| name.trim_start_matches("noiommu-").starts_with("vfio"))?;
    let has_node = root.exists(format!("{folder}/vfio-dev/{name}/dev"));
    let node = has_node.then(|| Node::read(root, &format!("/dev/vfio/devices/{name}")));
    Some(VfioCdev { name, node })
}

/// Interfaces and disks below the device, or below the virtio device on it.
fn uses(root: &Root, folder: &str) -> Vec<String> {
    let children = root.names(folder).into_known().unwrap_or_default();
    let virtio =
        children.iter().filter(|name| name.starts_with("virtio")).map(|name| format!("{folder}/{name}"));
    let names = |path: String| root.names(path).into_known().unwrap_or_default();
    std::iter::once(folder.to_owned())
        .chain(virtio)
        .flat_map(|place| {
            let network =
                names(format!("{place}/net")).into_iter().map(|name| format!("network interface {name}"));
            let disks = ["block", "nvme"]
                .into_iter()
                .flat_map(|kind| names(format!("{}/{kind}", place.clone())))
                .map(|name| format!("disk {name}"))
                .collect::<Vec<_>>();
            network.chain(disks).collect::<Vec<_>>()
        })
        .collect()
}

/// With or without `0x`.
pub(super) fn hexadecimal(text: &str) -> Option<u64> {
    u64::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { segment, requester } = self;
        write!(f, "{segment:04x}:{:02x}:{:02x}.{:x}", requester >> 8, requester >> 3 & 0x1f, requester & 7)
    }
}

impl FromStr for Bdf {
    type Err = InvalidBdf;

    fn from_str(text: &str) -> Result<Self, InvalidBdf> {
        let part = |text: &str, most: u32| {
            let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            let value = u32::from_str_radix(text, 16).ok().filter(|&value| plain && value <= most);
            value.ok_or(InvalidBdf)
        };
        let (front, function) = text.rsplit_once('.').ok_or(InvalidBdf)?;
        let (front, device) = front.rsplit_once(':').ok_or(InvalidBdf)?;
        let (segment, bus) = front.rsplit_once(':').unwrap_or(("0", front));
        let requester = part(bus, 0xff)? << 8 | part(device, 0x1f)? << 3 | part(function, 7)?;
        Ok(Self {
            segment: part(segment, u32::MAX)?,
            requester: u16::try_from(requester).map_err(|_| InvalidBdf)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        for text in ["0000:01:00.0", "10000:ff:1f.7", "0000:00:02.0"] {
            assert_eq!(text.parse::<Bdf>().unwrap().to_string(), text);
        }
        assert_eq!("01:02.3".parse::<Bdf>().unwrap(), Bdf { segment: 0, requester: 0x113 });
        for text in
            ["", "0000:01:00", "0000:01:20.0", "0000:01:00.8", "0000:+1:00.0", "100:0:0:0.0", "eth0", "::.0"]
        {
            assert_eq!(text.parse::<Bdf>(), Err(InvalidBdf), "{text}");
        }
    }
}
