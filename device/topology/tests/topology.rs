//! What a topology accepts, and the endpoint IDs that follow.

#![allow(clippy::unwrap_used, reason = "also the functions that tests call fail by a panic")]

mod generate;

use proptest::prelude::*;
use viommu_topology::{Bdf, Device, Endpoints, MmioEndpoint, PciAddress, PciRange, Topology, TopologyError};

fn pci(segment: u16, rid: u16) -> PciAddress {
    PciAddress { segment, bdf: Bdf::from_rid(rid) }
}

fn rids(first: u16, last: u16) -> std::ops::RangeInclusive<Bdf> {
    Bdf::from_rid(first)..=Bdf::from_rid(last)
}

fn mmio(base: u64, id: u32) -> Endpoints {
    MmioEndpoint { base, id }.into()
}

#[test]
fn bdf_is_bus_device_function() {
    let bdf = Bdf::new(0x12, 0x1f, 7).unwrap();
    assert_eq!(bdf.rid(), 0x12ff);
    assert_eq!((bdf.bus(), bdf.device(), bdf.function()), (0x12, 0x1f, 7));
    assert_eq!(Bdf::new(0, 1, 0).unwrap().rid(), 8);
    assert_eq!(PciAddress { segment: 0xabcd, bdf }.to_string(), "abcd:12:1f.7");
    assert_eq!(Bdf::new(0, 32, 0), Err(TopologyError::DeviceNumber(32)));
    assert_eq!(Bdf::new(0, 0, 8), Err(TopologyError::FunctionNumber(8)));
    for rid in 0..=u16::MAX {
        let bdf = Bdf::from_rid(rid);
        assert_eq!(Bdf::new(bdf.bus(), bdf.device(), bdf.function()), Ok(bdf));
    }
}

#[test]
fn endpoint_id_follows_the_formula() {
    let range = PciRange::new(2..=4, rids(0x10, 0x1f), 0x500).unwrap();
    let topology = Topology::new(pci(0, 8), [range.into(), mmio(0x1000, 7)]).unwrap();
    assert_eq!(topology.endpoint_id(pci(2, 0x10)), Some(0x500));
    assert_eq!(topology.endpoint_id(pci(2, 0x1f)), Some(0x50f));
    assert_eq!(topology.endpoint_id(pci(4, 0x11)), Some(0x2_0501));
    assert_eq!(topology.endpoint_id(Device::Mmio { base: 0x1000 }), Some(7));
    for outside in [pci(1, 0x10), pci(5, 0x10), pci(2, 0xf), pci(2, 0x20)] {
        assert_eq!(topology.endpoint_id(outside), None, "{outside}");
    }
    assert_eq!(topology.endpoint_id(Device::Mmio { base: 0x1001 }), None);
    assert_eq!(topology.device(0x2_0501), Some(pci(4, 0x11).into()));
    assert_eq!(topology.device(0x2_0510), None);
    assert_eq!(topology.device(0x3_0500), None);
}

#[test]
fn the_iommu_inside_a_range_is_no_endpoint() {
    let topology = Topology::new(pci(0, 8), [PciRange::segment(0, 0).unwrap().into()]).unwrap();
    assert_eq!(topology.endpoint_id(pci(0, 8)), None);
    assert_eq!(topology.device(8), None);
    assert_eq!(topology.endpoint_id(pci(0, 7)), Some(7));
    assert_eq!(topology.endpoint_id(pci(0, 9)), Some(9));
    assert_eq!(topology.iommu(), Device::Pci(pci(0, 8)));
}

#[test]
fn an_entry_for_the_iommu_alone_is_refused() {
    let own = Endpoints::Pci(PciRange::function(pci(0, 8), 8));
    assert_eq!(Topology::new(pci(0, 8), [own]), Err(TopologyError::OnlyTheIommu(own)));
    assert!(Topology::new(pci(1, 8), [own]).is_ok());
    let own = mmio(0x1000, 8);
    assert_eq!(Topology::new(Device::Mmio { base: 0x1000 }, [own]), Err(TopologyError::OnlyTheIommu(own)));
}

#[test]
fn inverted_ranges_are_refused() {
    let (first, last) = (3, 2);
    assert_eq!(
        PciRange::new(first..=last, rids(0, 1), 0),
        Err(TopologyError::SegmentsInverted { first, last })
    );
    let (first, last) = (Bdf::from_rid(9), Bdf::from_rid(8));
    assert_eq!(PciRange::new(2..=3, first..=last, 0), Err(TopologyError::BdfsInverted { first, last }));
}

#[test]
fn endpoint_ids_above_32_bits_are_refused() {
    assert!(PciRange::segment(0, 0xffff_0000).is_ok());
    assert_eq!(
        PciRange::segment(0, 0xffff_0001),
        Err(TopologyError::EndpointIdOverflow { first_id: 0xffff_0001, segments: 1, last_id: 0x1_0000_0000 })
    );
    let everything = PciRange::new(0..=u16::MAX, Bdf::FIRST..=Bdf::LAST, 0).unwrap();
    assert_eq!(everything.endpoint_id(pci(u16::MAX, u16::MAX)), Some(u32::MAX));
    assert_eq!(
        PciRange::new(0..=u16::MAX, Bdf::FIRST..=Bdf::LAST, 1),
        Err(TopologyError::EndpointIdOverflow { first_id: 1, segments: 0x1_0000, last_id: 0x1_0000_0000 })
    );
    let last = PciRange::function(pci(0, 0), u32::MAX);
    assert_eq!(last.endpoint_id(pci(0, 0)), Some(u32::MAX));
    assert_eq!(last.address(u32::MAX), Some(pci(0, 0)));
}

#[test]
fn one_device_in_two_entries_is_refused() {
    let first = Endpoints::Pci(PciRange::segment(0, 0).unwrap());
    let second = Endpoints::Pci(PciRange::function(pci(0, 0xffff), 0x9_0000));
    let refused = Err(TopologyError::SameDevice { first, second });
    assert_eq!(Topology::new(pci(0, 8), [first, second]), refused);
    let (first, second) = (mmio(0x1000, 1), mmio(0x1000, 2));
    assert_eq!(Topology::new(pci(0, 8), [first, second]), Err(TopologyError::SameDevice { first, second }));
}

#[test]
fn one_endpoint_id_in_two_entries_is_refused() {
    // The first range has IDs 0..=0xf, 0x10000..=0x1000f and 0x20000..=0x2000f.
    let first = Endpoints::Pci(PciRange::new(0..=2, rids(0, 0xf), 0).unwrap());
    for (id, free) in
        [(0xf, false), (0x10, true), (0xffff, true), (0x1_0000, false), (0x2_000f, false), (0x3_0000, true)]
    {
        let second = mmio(0x1000, id);
        let expected = if free { Ok(()) } else { Err(TopologyError::SameEndpointId { first, second }) };
        assert_eq!(Topology::new(pci(0, 0x800), [first, second]).map(drop), expected, "{id:#x}");
    }
    // Interleaved: the gaps of one range hold the IDs of another one.
    let second = Endpoints::Pci(PciRange::new(3..=9, rids(0, 0xf), 0x10).unwrap());
    assert!(Topology::new(pci(0, 0x800), [first, second]).is_ok());
    // The end of the last block of one meets the start of the first block of the other.
    let second = Endpoints::Pci(PciRange::new(3..=9, rids(0, 0xffff), 0x2_000f).unwrap());
    assert_eq!(
        Topology::new(pci(0, 0x800), [first, second]),
        Err(TopologyError::SameEndpointId { first, second })
    );
    // The ID that the IOMMU's own place in a range would have stays unused.
    assert!(Topology::new(pci(0, 8), [first, mmio(0x1000, 8)]).is_err());
}

#[test]
fn errors_say_what_is_wrong() {
    let (first, second) = (mmio(0x1000, 1), Endpoints::Pci(PciRange::new(0..=1, rids(0, 0xff), 1).unwrap()));
    let error = TopologyError::SameEndpointId { first, second };
    assert_eq!(
        error.to_string(),
        "MMIO 0x1000 (endpoint ID 0x1) and PCI segments 0000..=0001 00:00.0..=00:1f.7 (endpoint IDs from 0x1) \
         have endpoint IDs in common"
    );
}

/// The closed blocks of IDs of an entry, one for each segment, by counting.
fn blocks(entry: &Endpoints) -> Vec<(u64, u64)> {
    match entry {
        Endpoints::Mmio(endpoint) => vec![(endpoint.id.into(), endpoint.id.into())],
        Endpoints::Pci(range) => {
            let bdfs = u64::from(range.bdfs().end().rid() - range.bdfs().start().rid());
            let mut first = u64::from(range.first_id());
            let mut blocks = Vec::new();
            for _ in range.segments() {
                blocks.push((first, first + bdfs));
                first += 0x1_0000;
            }
            blocks
        }
    }
}

fn share_an_id(a: &Endpoints, b: &Endpoints) -> bool {
    // Each of the few blocks of the shorter list against all of the other.
    let (a, b) = (blocks(a), blocks(b));
    a.iter().any(|(a_first, a_last)| b.iter().any(|(b_first, b_last)| a_first <= b_last && b_first <= a_last))
}

fn share_a_device(a: &Endpoints, b: &Endpoints) -> bool {
    match (a, b) {
        (Endpoints::Mmio(a), Endpoints::Mmio(b)) => a.base == b.base,
        (Endpoints::Pci(a), Endpoints::Pci(b)) => {
            // Two ranges with a device in common have the first segment and BDF of one of them in common.
            let corners = [(a, a), (a, b), (b, a), (b, b)];
            corners.iter().any(|(s, t)| {
                let corner = PciAddress { segment: *s.segments().start(), bdf: *t.bdfs().start() };
                a.endpoint_id(corner).is_some() && b.endpoint_id(corner).is_some()
            })
        }
        _ => false,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..Default::default() })]

    #[test]
    fn overlap_is_found_exactly(first in generate::endpoints(), second in generate::endpoints()) {
        // Ranges over all segments would make the counting oracle slow.
        let short = |entry: &Endpoints| blocks(entry).len() < 64;
        prop_assume!(short(&first) || short(&second));
        let expected = if share_a_device(&first, &second) {
            Err(TopologyError::SameDevice { first, second })
        } else if share_an_id(&first, &second) {
            Err(TopologyError::SameEndpointId { first, second })
        } else {
            Ok(())
        };
        let elsewhere = Device::Mmio { base: 0xdead_0000 };
        prop_assert_eq!(Topology::new(elsewhere, [first, second]).map(drop), expected);
    }

    #[test]
    fn device_is_the_inverse_of_endpoint_id(
        topology in generate::topology(),
        device in generate::device(),
        id in any::<u32>(),
    ) {
        if let Some(id) = topology.endpoint_id(device) {
            prop_assert_eq!(topology.device(id), Some(device));
        }
        let near = topology.endpoints().iter().flat_map(blocks).flat_map(|(first, last)| [first, last, last + 1]);
        for id in near.take(200).filter_map(|id| u32::try_from(id).ok()).chain([id]) {
            if let Some(device) = topology.device(id) {
                prop_assert_eq!(topology.endpoint_id(device), Some(id));
            }
        }
    }
}
