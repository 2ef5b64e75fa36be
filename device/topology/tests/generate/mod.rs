//! Random topologies. Numbers crowd around few values, so that ranges touch and overlap often.

use proptest::{collection::vec, prelude::*};
use viommu_topology::{Bdf, Device, Endpoints, MmioEndpoint, PciAddress, PciRange, Topology};

pub(crate) fn bdf() -> impl Strategy<Value = Bdf> {
    prop_oneof![Just(0), 0_u16..12, Just(0xff), Just(0x100), 0xfffc..=u16::MAX, any::<u16>()]
        .prop_map(Bdf::from_rid)
}

pub(crate) fn segment() -> impl Strategy<Value = u16> {
    prop_oneof![4 => 0_u16..4, 1 => 0xfffe..=u16::MAX]
}

pub(crate) fn device() -> impl Strategy<Value = Device> {
    prop_oneof![
        4 => (segment(), bdf()).prop_map(|(segment, bdf)| Device::Pci(PciAddress { segment, bdf })),
        1 => (0_u64..6).prop_map(|page| Device::Mmio { base: page << 12 }),
    ]
}

fn id() -> impl Strategy<Value = u32> {
    (prop_oneof![8 => 0_u32..8, 1 => Just(0xffff)], prop_oneof![0_u32..12, 0xfff4..0x1_0000_u32])
        .prop_map(|(high, low)| high << 16 | low)
}

pub(crate) fn endpoints() -> impl Strategy<Value = Endpoints> {
    let pci = (segment(), segment(), bdf(), bdf(), id()).prop_filter_map("overflow", |(s, t, b, c, id)| {
        PciRange::new(s.min(t)..=s.max(t), b.min(c)..=b.max(c), id).ok().map(Endpoints::Pci)
    });
    let mmio = (0_u64..6, id()).prop_map(|(page, id)| MmioEndpoint { base: page << 12, id }.into());
    prop_oneof![3 => pci, 1 => mmio]
}

/// Entries that do not go with the earlier ones are left out.
pub(crate) fn topology() -> impl Strategy<Value = Topology> {
    (device(), vec(endpoints(), 0..12)).prop_map(|(iommu, candidates)| {
        let mut topology = Topology::new(iommu, []).unwrap();
        for candidate in candidates {
            let more = topology.endpoints().iter().copied().chain([candidate]);
            topology = Topology::new(iommu, more).unwrap_or(topology);
        }
        topology
    })
}
