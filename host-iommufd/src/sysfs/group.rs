use pgtable_formats::{Iova, IovaRange};
use viommu_wire::{ReservedKind, ReservedRegion};

use super::pci::hexadecimal;
use super::{Bdf, Root, Seen};

/// Devices that the IOMMU cannot tell apart: they are handed over together or not at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Its number.
    pub id: u32,
    /// How the kernel itself translates for it: `DMA`, `DMA-FQ`, `identity`, `blocked`, ….
    pub domain: Option<String>,
    /// Names of its devices: PCI addresses, and names of platform devices.
    pub devices: Vec<String>,
    /// Addresses that are not for mappings.
    pub regions: Vec<Region>,
}

/// Addresses that are not for mappings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Where.
    pub range: IovaRange,
    /// What for.
    pub kind: RegionKind,
}

/// What a region is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionKind {
    /// The firmware demands a 1:1 mapping at all times (RMRR, IVMD, RMR).
    Direct,
    /// The firmware demands a 1:1 mapping until a driver takes the device.
    DirectRelaxable,
    /// Never translated.
    Reserved,
    /// Doorbells of message-signalled interrupts: those of the hardware, or the window in which software maps them.
    Msi,
    /// A name that is not known here.
    Other,
}

impl Group {
    /// All groups, by number.
    pub fn all(root: &Root) -> Seen<Vec<Self>> {
        root.names("/sys/kernel/iommu_groups").map(|names| {
            let mut ids: Vec<u32> = names.iter().filter_map(|name| name.parse().ok()).collect();
            ids.sort_unstable();
            ids.into_iter().map(|id| Self::read(root, id)).collect()
        })
    }

    fn read(root: &Root, id: u32) -> Self {
        let folder = format!("/sys/kernel/iommu_groups/{id}");
        let regions = root.text(format!("{folder}/reserved_regions")).into_known().unwrap_or_default();
        Self {
            id,
            domain: root.text(format!("{folder}/type")).into_known(),
            devices: root.names(format!("{folder}/devices")).into_known().unwrap_or_default(),
            regions: regions.lines().filter_map(region).collect(),
        }
    }
}

/// What a guest is told of the addresses that `device` cannot use, from its group: of each region that holds while the
/// device is handed over, where it is and whether it is for interrupts.
///
/// `None` where the device has no group, or its regions cannot be read.
pub fn reserved_regions(root: &Root, device: Bdf) -> Option<Vec<ReservedRegion>> {
    let folder = format!("/sys/bus/pci/devices/{device}/iommu_group");
    let text = root.text(format!("{folder}/reserved_regions")).into_known()?;
    Some(text.lines().filter_map(region).filter_map(Region::for_guest).collect())
}

impl Region {
    /// `None` for what is no longer reserved once the device has left its driver.
    fn for_guest(self) -> Option<ReservedRegion> {
        let kind = match self.kind {
            RegionKind::DirectRelaxable => return None,
            RegionKind::Msi => ReservedKind::Msi,
            RegionKind::Direct | RegionKind::Reserved | RegionKind::Other => ReservedKind::Reserved,
        };
        Some(ReservedRegion { kind, range: self.range })
    }
}

/// `0x0000000008000000 0x00000000080fffff msi`
fn region(line: &str) -> Option<Region> {
    let mut words = line.split_whitespace();
    let (start, last) = (hexadecimal(words.next()?)?, hexadecimal(words.next()?)?);
    let kind = match words.next()? {
        "direct" => RegionKind::Direct,
        "direct-relaxable" => RegionKind::DirectRelaxable,
        "reserved" => RegionKind::Reserved,
        "msi" => RegionKind::Msi,
        _ => RegionKind::Other,
    };
    Some(Region { range: IovaRange::new(Iova(start), Iova(last))?, kind })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> (u64, u64, RegionKind) {
        let Region { range, kind } = region(line).unwrap();
        (range.start().0, range.last().0, kind)
    }

    #[test]
    fn lines_of_the_kernel_are_read() {
        let line = "0x0000000008000000 0x00000000080fffff msi";
        assert_eq!(parsed(line), (0x800_0000, 0x80f_ffff, RegionKind::Msi));
        let line = "0x00000000000a0000 0x00000000000bffff direct-relaxable";
        assert_eq!(parsed(line), (0xa_0000, 0xb_ffff, RegionKind::DirectRelaxable));
        assert_eq!(parsed("0x0 0xffffffffffffffff new"), (0, u64::MAX, RegionKind::Other));
        for line in ["", "0x0", "0x1 0x0 msi", "x y reserved"] {
            assert_eq!(region(line), None);
        }
    }

    #[test]
    fn a_guest_hears_of_what_stays_reserved() {
        let guest = |line| region(line).unwrap().for_guest().map(|region| region.kind);
        assert_eq!(guest("0x0 0x1 msi"), Some(ReservedKind::Msi));
        assert_eq!(guest("0x0 0x1 direct"), Some(ReservedKind::Reserved));
        assert_eq!(guest("0x0 0x1 new"), Some(ReservedKind::Reserved));
        assert_eq!(guest("0x0 0x1 direct-relaxable"), None);
    }
}
