//! VIOT tables: a vector, and tables read back by a decoder of our own and by `iasl`.

#![allow(clippy::unwrap_used, clippy::panic, reason = "also the functions that tests call fail by a panic")]

mod generate;
mod tools;

use std::fs;

use proptest::prelude::*;
use viommu_topology::{Bdf, Device, MmioEndpoint, Oem, PciAddress, PciRange, Topology, ViotError, viot};

const OEM: Oem = Oem { id: *b"VIOMMU", table_id: *b"TOPOLOGY", revision: 0x0102_0304 };

fn pci(segment: u16, rid: u16) -> PciAddress {
    PciAddress { segment, bdf: Bdf::from_rid(rid) }
}

fn all_of_segment_0() -> Topology {
    Topology::new(pci(0, 8), [PciRange::segment(0, 0).unwrap().into()]).unwrap()
}

/// All four types of node, with a different number in each field.
fn every_node() -> [Topology; 2] {
    [
        Topology::new(
            pci(0x11, 0x0122),
            [
                PciRange::new(0x11..=0x12, Bdf::from_rid(0x0013)..=Bdf::from_rid(0xfe14), 0x15)
                    .unwrap()
                    .into(),
                MmioEndpoint { base: 0x16_1718_1920, id: 0x2122_2324 }.into(),
            ],
        )
        .unwrap(),
        Topology::new(
            Device::Mmio { base: 0x25_2627_2829 },
            [PciRange::function(pci(0x30, 0x3132), 0x3334_3536).into()],
        )
        .unwrap(),
    ]
}

/// Origin: the body was computed by hand from the field offsets of ACPICA's headers, for one PCI IOMMU at
/// 0:00:01.0 and all of segment 0. ACPICA's `iasl` (20250404) disassembles it and compiles it to the same.
/// The header is that of every ACPI table, with the creator fields of `acpi_tables`.
#[test]
fn golden_vector() {
    #[rustfmt::skip]
    let body = [
        // two nodes, from 48 on
        0x02, 0x00, 0x30, 0x00, 0, 0, 0, 0, 0, 0, 0, 0,
        // type 3: virtio-pci IOMMU
        0x03, 0x00, 0x10, 0x00, 0x00, 0x00, 0x08, 0x00, 0, 0, 0, 0, 0, 0, 0, 0,
        // type 1: PCI range
        0x01, 0x00, 0x18, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff,
        0x30, 0x00, 0, 0, 0, 0, 0, 0,
    ];
    let table = viot(&[all_of_segment_0()], &OEM).unwrap();
    assert_eq!(table.len(), 88);
    assert_eq!(table[..9], *b"VIOT\x58\0\0\0\0");
    assert_eq!(table[10..28], *b"VIOMMUTOPOLOGY\x04\x03\x02\x01");
    assert_eq!(table[36..], body);
    assert_eq!(table.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
}

#[test]
fn every_field_is_in_its_place() {
    let decoded = decode(&viot(&every_node(), &OEM).unwrap());
    let (first, second) = (Device::Pci(pci(0x11, 0x0122)), Device::Mmio { base: 0x25_2627_2829 });
    assert_eq!(
        decoded,
        [
            Entry::Range { iommu: first, id: 0x15, segments: (0x11, 0x12), rids: (0x0013, 0xfe14) },
            Entry::Mmio { iommu: first, id: 0x2122_2324, base: 0x16_1718_1920 },
            Entry::Range { iommu: second, id: 0x3334_3536, segments: (0x30, 0x30), rids: (0x3132, 0x3132) },
        ]
    );
}

#[test]
fn a_machine_without_iommu_has_no_table() {
    assert_eq!(viot(&[], &OEM), Err(ViotError::NoIommu));
}

#[test]
fn iommus_that_do_not_go_together_are_refused() {
    let all = all_of_segment_0();
    assert_eq!(viot(&[all.clone(), all.clone()], &OEM), Err(ViotError::SameIommu(pci(0, 8).into())));

    let inside = Topology::new(pci(0, 0x10), []).unwrap();
    let refused = Err(ViotError::IommuBehindIommu { inner: pci(0, 0x10).into(), outer: pci(0, 8).into() });
    assert_eq!(viot(&[all.clone(), inside.clone()], &OEM), refused);
    assert_eq!(viot(&[inside, all.clone()], &OEM), refused);

    let elsewhere = Device::Mmio { base: 0x1000 };
    let second = PciRange::function(pci(0, 0x18), 0).into();
    let sharing = Topology::new(elsewhere, [second]).unwrap();
    let first = all.endpoints()[0];
    assert_eq!(viot(&[all.clone(), sharing], &OEM), Err(ViotError::SameDevice { first, second }));

    // Endpoint IDs are each IOMMU's own: the same ones again are fine.
    let apart = Topology::new(elsewhere, [PciRange::segment(1, 0).unwrap().into()]).unwrap();
    assert!(viot(&[all, apart], &OEM).is_ok());
}

#[test]
fn nodes_are_counted_in_16_bits() {
    // 16 + 16 * 4095 is one more than fits.
    let topologies: Vec<Topology> = (0..16)
        .map(|iommu| {
            let own = (0..4095)
                .map(|id| MmioEndpoint { base: u64::from(iommu) << 32 | u64::from(id) << 12, id }.into());
            Topology::new(pci(0, iommu), own).unwrap()
        })
        .collect();
    assert_eq!(viot(&topologies, &OEM), Err(ViotError::TooManyNodes { iommus: 16, endpoints: 65520 }));

    // The last IOMMU node that 16 bits can refer to is at 65520: node 4092 from 48 on.
    let iommus = |count: u64| -> Vec<Topology> {
        (0..count).map(|index| Topology::new(Device::Mmio { base: index << 12 }, []).unwrap()).collect()
    };
    let mut most = iommus(4093);
    let behind_last = MmioEndpoint { base: 0x1, id: 9 };
    *most.last_mut().unwrap() = Topology::new(pci(0, 8), [behind_last.into()]).unwrap();
    let table = viot(&most, &OEM).unwrap();
    assert_eq!(decode(&table), [Entry::Mmio { iommu: pci(0, 8).into(), id: 9, base: 1 }]);
    assert_eq!(viot(&iommus(4094), &OEM), Err(ViotError::TooManyNodes { iommus: 4094, endpoints: 0 }));
}

#[test]
fn iasl_reads_the_table_back() {
    let test = "iasl_reads_the_table_back";
    let folder = tools::folder(test);
    let table = viot(&every_node(), &OEM).unwrap();
    fs::write(folder.join("viot.aml"), &table).unwrap();
    let Some(_) = tools::run(test, &folder, "iasl", &["-d", "viot.aml"]) else {
        return;
    };
    let listing = fs::read_to_string(folder.join("viot.dsl")).unwrap();

    // `[offset …] name : value`, and a remark on a checksum that is wrong.
    let fields: Vec<(String, String)> = listing
        .lines()
        .filter_map(|line| line.strip_prefix('[')?.split_once(']')?.1.split_once(" : "))
        .map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned()))
        .collect();
    let value = |name: &str| &fields.iter().find(|field| field.0 == name).unwrap().1;
    assert!(value("Signature").starts_with("\"VIOT\""), "{listing}");
    assert_eq!(value("Table Length"), "00000098");
    assert_eq!(value("Revision"), "00");
    assert_eq!(*value("Checksum"), format!("{:02X}", table[9]));
    assert_eq!(value("Oem ID"), "\"VIOMMU\"");
    assert_eq!(value("Oem Table ID"), "\"TOPOLOGY\"");

    if listing.contains("Unknown ACPI table signature") {
        tools::skip(test, "this iasl is too old to know VIOT; it read the header and the checksum only");
        return;
    }
    let nodes: Vec<(&str, &str)> = fields
        .iter()
        .skip_while(|field| field.0 != "Node count")
        .filter(|field| field.0 != "Reserved")
        .map(|(name, value)| (name.as_str(), value.split(" [").next().unwrap()))
        .collect();
    assert_eq!(
        nodes,
        [
            ("Node count", "0005"),
            ("Node offset", "0030"),
            ("Type", "03"),
            ("Length", "0010"),
            ("PCI Segment", "0011"),
            ("PCI BDF number", "0122"),
            ("Type", "04"),
            ("Length", "0010"),
            ("Base address", "0000002526272829"),
            ("Type", "01"),
            ("Length", "0018"),
            ("Endpoint start", "00000015"),
            ("PCI Segment start", "0011"),
            ("PCI Segment end", "0012"),
            ("PCI BDF start", "0013"),
            ("PCI BDF end", "FE14"),
            ("Output node", "0030"),
            ("Type", "02"),
            ("Length", "0018"),
            ("Endpoint", "21222324"),
            ("Base address", "0000001617181920"),
            ("Output node", "0030"),
            ("Type", "01"),
            ("Length", "0018"),
            ("Endpoint start", "33343536"),
            ("PCI Segment start", "0030"),
            ("PCI Segment end", "0030"),
            ("PCI BDF start", "3132"),
            ("PCI BDF end", "3132"),
            ("Output node", "0040"),
        ]
    );

    // And compiled again, all but the creator is the same.
    tools::run(test, &folder, "iasl", &["-p", "again", "viot.dsl"]).unwrap();
    assert_eq!(fs::read(folder.join("again.aml")).unwrap()[36..], table[36..]);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn a_guest_finds_the_same_endpoint_ids(
        topology in generate::topology(),
        devices in proptest::collection::vec(generate::device(), 64),
    ) {
        let entries = decode(&viot(std::slice::from_ref(&topology), &OEM).unwrap());
        prop_assert_eq!(entries.len(), topology.endpoints().len());
        for device in devices {
            prop_assert_eq!(guest_lookup(&entries, device), topology.endpoint_id(device).map(|id| (topology.iommu(), id)));
        }
    }
}

/// An endpoint node, with its IOMMU looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    Range { iommu: Device, id: u32, segments: (u16, u16), rids: (u16, u16) },
    Mmio { iommu: Device, id: u32, base: u64 },
}

/// Reads a table as a guest does, by offsets alone, and refuses all that a guest would skip or doubt.
fn decode(table: &[u8]) -> Vec<Entry> {
    let le16 = |at: usize| u16::from_le_bytes(table[at..at + 2].try_into().unwrap());
    let le32 = |at: usize| u32::from_le_bytes(table[at..at + 4].try_into().unwrap());
    let le64 = |at: usize| u64::from_le_bytes(table[at..at + 8].try_into().unwrap());
    assert_eq!(&table[..4], b"VIOT");
    assert_eq!(le32(4) as usize, table.len());
    assert_eq!(table[8], 0);
    assert_eq!(table.iter().map(|byte| u32::from(*byte)).sum::<u32>() % 256, 0);
    assert_eq!(le64(40), 0);

    let iommu_at = |at: u16| {
        let at = usize::from(at);
        match table[at] {
            3 => Device::Pci(pci(le16(at + 4), le16(at + 6))),
            4 => Device::Mmio { base: le64(at + 8) },
            other => panic!("output node of type {other}"),
        }
    };
    let mut entries = Vec::new();
    let mut at = usize::from(le16(38));
    for _ in 0..le16(36) {
        assert_eq!(table[at + 1], 0);
        let length = usize::from(le16(at + 2));
        match table[at] {
            1 => {
                assert_eq!((length, le16(at + 18), le32(at + 20)), (24, 0, 0));
                entries.push(Entry::Range {
                    iommu: iommu_at(le16(at + 16)),
                    id: le32(at + 4),
                    segments: (le16(at + 8), le16(at + 10)),
                    rids: (le16(at + 12), le16(at + 14)),
                });
            }
            2 => {
                assert_eq!((length, le16(at + 18), le32(at + 20)), (24, 0, 0));
                let iommu = iommu_at(le16(at + 16));
                entries.push(Entry::Mmio { iommu, id: le32(at + 4), base: le64(at + 8) });
            }
            3 => assert_eq!((length, le64(at + 8)), (16, 0)),
            4 => assert_eq!((length, le32(at + 4)), (16, 0)),
            other => panic!("node of type {other}"),
        }
        at += length;
    }
    assert_eq!(at, table.len());
    entries
}

/// First match wins, and an IOMMU does not translate itself.
fn guest_lookup(entries: &[Entry], device: Device) -> Option<(Device, u32)> {
    let (iommu, id) = entries.iter().find_map(|entry| match (*entry, device) {
        (Entry::Range { iommu, id, segments, rids }, Device::Pci(PciAddress { segment, bdf })) => {
            let rid = bdf.rid();
            let inside = segments.0 <= segment && segment <= segments.1 && rids.0 <= rid && rid <= rids.1;
            inside.then(|| (iommu, (u32::from(segment - segments.0) << 16) + u32::from(rid - rids.0) + id))
        }
        (Entry::Mmio { iommu, id, base }, Device::Mmio { base: wanted }) if base == wanted => {
            Some((iommu, id))
        }
        _ => None,
    })?;
    (iommu != device).then_some((iommu, id))
}
