//! Device tree nodes, read back by a reader of our own and by `dtc`.

#![allow(clippy::unwrap_used, clippy::panic, reason = "also the functions that tests call fail by a panic")]

mod generate;
mod tools;

use std::{collections::BTreeMap, fs};

use proptest::prelude::*;
use viommu_topology::{
    Bdf, Device, DeviceTree, DeviceTreeError, IommuMapEntry, MmioEndpoint, MmioNode, PciAddress, PciRange,
    Topology,
};
use vm_fdt::FdtWriter;

const PHANDLE: u32 = 0x99;
const PLATFORM_DEVICE: u64 = 0x0a00_3000;
const MMIO_NODE: MmioNode<'_> = MmioNode { size: 0x200, interrupts: &[0, 16, 1], dma_coherent: true };

fn pci(segment: u16, rid: u16) -> PciAddress {
    PciAddress { segment, bdf: Bdf::from_rid(rid) }
}

/// Two whole PCI segments and a platform device.
fn machine(iommu: impl Into<Device>) -> Topology {
    let range = PciRange::new(0..=1, Bdf::FIRST..=Bdf::LAST, 0).unwrap();
    let platform = MmioEndpoint { base: PLATFORM_DEVICE, id: 0x2_0000 };
    Topology::new(iommu, [range.into(), platform.into()]).unwrap()
}

/// The tree of a small machine: an interrupt controller, two host bridges, a platform device.
fn whole_tree(topology: &Topology) -> Vec<u8> {
    let tree = DeviceTree::new(topology, PHANDLE).unwrap();
    let mut fdt = FdtWriter::new().unwrap();
    let root = fdt.begin_node("").unwrap();
    fdt.property_string("compatible", "linux,dummy-virt").unwrap();
    fdt.property_string("model", "test").unwrap();
    fdt.property_u32("#address-cells", 2).unwrap();
    fdt.property_u32("#size-cells", 2).unwrap();
    fdt.property_u32("interrupt-parent", 1).unwrap();

    let gic = fdt.begin_node("interrupt-controller@8000000").unwrap();
    fdt.property_string("compatible", "arm,cortex-a15-gic").unwrap();
    fdt.property_array_u64("reg", &[0x800_0000, 0x1_0000]).unwrap();
    fdt.property_null("interrupt-controller").unwrap();
    fdt.property_u32("#address-cells", 0).unwrap();
    fdt.property_u32("#interrupt-cells", 3).unwrap();
    fdt.property_phandle(1).unwrap();
    fdt.end_node(gic).unwrap();

    for segment in 0..=1_u16 {
        let ecam = 0x40_1000_0000 + (u64::from(segment) << 28);
        let bridge = fdt.begin_node(&format!("pcie@{ecam:x}")).unwrap();
        fdt.property_string("compatible", "pci-host-ecam-generic").unwrap();
        fdt.property_string("device_type", "pci").unwrap();
        fdt.property_array_u64("reg", &[ecam, 1 << 28]).unwrap();
        fdt.property_array_u32("bus-range", &[0, 0xff]).unwrap();
        fdt.property_u32("linux,pci-domain", segment.into()).unwrap();
        fdt.property_u32("#address-cells", 3).unwrap();
        fdt.property_u32("#size-cells", 2).unwrap();
        let window = 0x1000_0000 + (u32::from(segment) << 24);
        fdt.property_array_u32("ranges", &[0x200_0000, 0, window, 0, window, 0, 1 << 24]).unwrap();
        tree.write_iommu_map(&mut fdt, segment).unwrap();
        if matches!(topology.iommu(), Device::Pci(iommu) if iommu.segment == segment) {
            tree.write_pci_node(&mut fdt).unwrap();
        }
        fdt.end_node(bridge).unwrap();
    }
    if let Device::Mmio { .. } = topology.iommu() {
        tree.write_mmio_node(&mut fdt, &MMIO_NODE).unwrap();
    }
    let device = fdt.begin_node(&format!("dma@{PLATFORM_DEVICE:x}")).unwrap();
    fdt.property_string("compatible", "test,dma").unwrap();
    fdt.property_array_u64("reg", &[PLATFORM_DEVICE, 0x1000]).unwrap();
    tree.write_iommus(&mut fdt, PLATFORM_DEVICE).unwrap();
    fdt.end_node(device).unwrap();
    fdt.end_node(root).unwrap();
    fdt.finish().unwrap()
}

const BRIDGE_0: &str = "/pcie@4010000000";
const BRIDGE_1: &str = "/pcie@4020000000";

#[test]
fn virtio_pci_iommu() {
    let nodes = read(&whole_tree(&machine(pci(0, 0x19))));
    let iommu = &nodes[&format!("{BRIDGE_0}/iommu@3,1")];
    assert_eq!(iommu["compatible"], b"virtio,pci-iommu\0pci1af4,1057\0");
    assert_eq!(cells(&iommu["reg"]), [0x1900, 0, 0, 0, 0]);
    assert_eq!(cells(&iommu["#iommu-cells"]), [1]);
    assert_eq!(cells(&iommu["phandle"]), [PHANDLE]);
    assert_eq!(iommu.len(), 4, "nothing else, an `iommus` least of all: {iommu:?}");

    // As QEMU and cloud-hypervisor write it: <0 &v 0 b  b+1 &v b+1 0xffff-b>.
    assert_eq!(
        cells(&nodes[BRIDGE_0]["iommu-map"]),
        [0, PHANDLE, 0, 0x19, 0x1a, PHANDLE, 0x1a, 0xffff - 0x19]
    );
    assert_eq!(cells(&nodes[BRIDGE_1]["iommu-map"]), [0, PHANDLE, 0x1_0000, 0x1_0000]);
    assert_eq!(cells(&nodes["/dma@a003000"]["iommus"]), [PHANDLE, 0x2_0000]);
}

#[test]
fn virtio_mmio_iommu() {
    let nodes = read(&whole_tree(&machine(Device::Mmio { base: 0x3100 })));
    let iommu = &nodes["/iommu@3100"];
    assert_eq!(iommu["compatible"], b"virtio,mmio\0");
    assert_eq!(cells(&iommu["reg"]), [0, 0x3100, 0, 0x200]);
    assert_eq!(cells(&iommu["interrupts"]), [0, 16, 1]);
    assert_eq!(iommu["dma-coherent"], b"");
    assert_eq!(cells(&iommu["#iommu-cells"]), [1]);
    assert_eq!(cells(&iommu["phandle"]), [PHANDLE]);
    assert_eq!(iommu.len(), 6);
    assert_eq!(cells(&nodes[BRIDGE_0]["iommu-map"]), [0, PHANDLE, 0, 0x1_0000]);
    assert_eq!(cells(&nodes[BRIDGE_1]["iommu-map"]), [0, PHANDLE, 0x1_0000, 0x1_0000]);
}

#[test]
fn the_iommu_at_either_end_of_a_range_leaves_one_entry() {
    let entry =
        |rid_base, length| IommuMapEntry { rid_base, phandle: PHANDLE, endpoint_base: rid_base, length };
    for (rid, expected) in [(0, entry(1, 0xffff)), (0xffff, entry(0, 0xffff))] {
        let topology = machine(pci(0, rid));
        assert_eq!(DeviceTree::new(&topology, PHANDLE).unwrap().iommu_map(0), [expected]);
    }
    // The last endpoint IDs of all, and the IOMMU the last device of the range.
    let range = PciRange::new(0..=0, Bdf::from_rid(8)..=Bdf::from_rid(9), u32::MAX - 1).unwrap();
    let topology = Topology::new(pci(0, 9), [range.into()]).unwrap();
    let map = DeviceTree::new(&topology, 5).unwrap().iommu_map(0);
    assert_eq!(map.iter().map(IommuMapEntry::cells).collect::<Vec<_>>(), [[8, 5, u32::MAX - 1, 1]]);
}

#[test]
fn a_bridge_without_endpoints_gets_no_map() {
    let topology = Topology::new(pci(0, 8), [PciRange::segment(0, 0).unwrap().into()]).unwrap();
    let tree = DeviceTree::new(&topology, PHANDLE).unwrap();
    assert_eq!(tree.iommu_map(1), []);
    let mut fdt = FdtWriter::new().unwrap();
    let root = fdt.begin_node("").unwrap();
    tree.write_iommu_map(&mut fdt, 1).unwrap();
    fdt.end_node(root).unwrap();
    assert!(read(&fdt.finish().unwrap())[""].is_empty());
}

#[test]
fn what_cannot_be_written_is_refused() {
    let on_pci = machine(pci(0, 8));
    let on_mmio = machine(Device::Mmio { base: 0x3100 });
    for phandle in [0, u32::MAX] {
        assert_eq!(DeviceTree::new(&on_pci, phandle).unwrap_err(), DeviceTreeError::Phandle(phandle));
    }
    let pci_tree = DeviceTree::new(&on_pci, PHANDLE).unwrap();
    let mmio_tree = DeviceTree::new(&on_mmio, PHANDLE).unwrap();
    let mut fdt = FdtWriter::new().unwrap();
    // No node is open yet.
    assert_eq!(
        pci_tree.write_iommu_map(&mut fdt, 0),
        Err(DeviceTreeError::Fdt(vm_fdt::Error::PropertyBeforeBeginNode))
    );
    let _root = fdt.begin_node("").unwrap();
    assert_eq!(
        pci_tree.write_mmio_node(&mut fdt, &MMIO_NODE),
        Err(DeviceTreeError::OtherTransport(on_pci.iommu()))
    );
    assert_eq!(mmio_tree.write_pci_node(&mut fdt), Err(DeviceTreeError::OtherTransport(on_mmio.iommu())));
    assert_eq!(
        mmio_tree.write_mmio_node(&mut fdt, &MmioNode { interrupts: &[], ..MMIO_NODE }),
        Err(DeviceTreeError::NoInterrupt)
    );
    for size in [0, 0xffff_ffff_ffff_cf01] {
        assert_eq!(
            mmio_tree.write_mmio_node(&mut fdt, &MmioNode { size, ..MMIO_NODE }),
            Err(DeviceTreeError::Window { base: 0x3100, size })
        );
    }
    for base in [PLATFORM_DEVICE + 1, 0x3100] {
        assert_eq!(
            mmio_tree.write_iommus(&mut fdt, base),
            Err(DeviceTreeError::NotAnEndpoint(Device::Mmio { base }))
        );
    }
    // A phandle that another node has.
    let other = fdt.begin_node("other").unwrap();
    fdt.property_phandle(PHANDLE).unwrap();
    fdt.end_node(other).unwrap();
    assert_eq!(pci_tree.write_pci_node(&mut fdt), Err(DeviceTreeError::Fdt(vm_fdt::Error::DuplicatePhandle)));
}

#[test]
fn dtc_reads_the_tree_back() {
    let test = "dtc_reads_the_tree_back";
    let folder = tools::folder(test);
    for (name, iommu) in [("pci", Device::Pci(pci(0, 0x19))), ("mmio", Device::Mmio { base: 0x3100 })] {
        let blob = whole_tree(&machine(iommu));
        let (binary, source, again) =
            (format!("{name}.dtb"), format!("{name}.dts"), format!("{name}-again.dtb"));
        fs::write(folder.join(&binary), &blob).unwrap();

        // dtc checks unit addresses, bus numbers and the reference cells of `iommus`, and says so.
        let Some(output) =
            tools::run(test, &folder, "dtc", &["-I", "dtb", "-O", "dts", "-o", &source, &binary])
        else {
            return;
        };
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{name}");
        let text = fs::read_to_string(folder.join(&source)).unwrap();
        let expected: &[&str] = match iommu {
            Device::Pci(_) => &[
                "iommu@3,1 {",
                r#"compatible = "virtio,pci-iommu", "pci1af4,1057";"#,
                "reg = <0x1900 0x00 0x00 0x00 0x00>;",
                "iommu-map = <0x00 0x99 0x00 0x19 0x1a 0x99 0x1a 0xffe6>;",
                "iommu-map = <0x00 0x99 0x10000 0x10000>;",
            ],
            Device::Mmio { .. } => &[
                "iommu@3100 {",
                r#"compatible = "virtio,mmio";"#,
                "reg = <0x00 0x3100 0x00 0x200>;",
                "interrupts = <0x00 0x10 0x01>;",
                "iommu-map = <0x00 0x99 0x00 0x10000>;",
                "iommu-map = <0x00 0x99 0x10000 0x10000>;",
            ],
        };
        let common = ["#iommu-cells = <0x01>;", "phandle = <0x99>;", "iommus = <0x99 0x20000>;"];
        for line in expected.iter().chain(&common) {
            assert!(text.lines().any(|found| normal(found) == normal(line)), "{name}: no {line} in {text}");
        }

        tools::run(test, &folder, "dtc", &["-I", "dts", "-O", "dtb", "-o", &again, &source]).unwrap();
        assert_eq!(read(&fs::read(folder.join(&again)).unwrap()), read(&blob), "{name}");
    }
}

/// Versions of dtc differ in how they write a list of strings and leading zeros.
fn normal(line: &str) -> String {
    let mut line = line.trim().replace(r"\0", r#"", ""#);
    while line.contains("0x0") {
        line = line.replace("0x0", "0x");
    }
    line
}

/// dtc is silent about a good tree. This shows that it would not be about a bad one.
#[test]
fn dtc_notices_a_wrong_reference() {
    let test = "dtc_notices_a_wrong_reference";
    let folder = tools::folder(test);
    let mut blob = whole_tree(&machine(Device::Mmio { base: 0x3100 }));
    let cells = [PHANDLE, 0x2_0000].map(u32::to_be_bytes).concat();
    let at = blob.windows(8).position(|window| window == cells).unwrap();
    blob[at..at + 4].copy_from_slice(&0x98_u32.to_be_bytes());
    fs::write(folder.join("wrong.dtb"), blob).unwrap();
    let arguments = ["-I", "dtb", "-O", "dts", "-o", "wrong.dts", "wrong.dtb"];
    if let Some(output) = tools::run(test, &folder, "dtc", &arguments) {
        assert!(String::from_utf8_lossy(&output.stderr).contains("iommus"), "{output:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn a_guest_finds_the_same_endpoint_ids(
        topology in generate::topology(),
        segment in generate::segment(),
        bdfs in proptest::collection::vec(generate::bdf(), 64),
    ) {
        let map = DeviceTree::new(&topology, PHANDLE).unwrap().iommu_map(segment);
        prop_assert!(map.is_sorted_by_key(|entry| entry.rid_base));
        for bdf in bdfs {
            // iommu-map as the binding defines it.
            let found: Vec<u32> = map
                .iter()
                .map(IommuMapEntry::cells)
                .filter(|[base, .., length]| (*base..base + length).contains(&u32::from(bdf.rid())))
                .map(|[base, phandle, endpoint, _]| {
                    assert_eq!(phandle, PHANDLE);
                    u32::from(bdf.rid()) - base + endpoint
                })
                .collect();
            let expected = topology.endpoint_id(PciAddress { segment, bdf });
            prop_assert_eq!(found, Vec::from_iter(expected));
        }
    }
}

type Properties = BTreeMap<String, Vec<u8>>;

fn cells(value: &[u8]) -> Vec<u32> {
    value.chunks(4).map(|cell| u32::from_be_bytes(cell.try_into().unwrap())).collect()
}

/// The properties of each node, by path, of a flattened device tree (Devicetree Specification 0.4,
/// chapter 5).
fn read(blob: &[u8]) -> BTreeMap<String, Properties> {
    let word = |at: usize| u32::from_be_bytes(blob[at..at + 4].try_into().unwrap());
    let text = |at: usize| -> String {
        let bytes = blob[at..].iter().take_while(|byte| **byte != 0).copied().collect();
        String::from_utf8(bytes).unwrap()
    };
    assert_eq!(word(0), 0xd00d_feed);
    assert_eq!(word(4) as usize, blob.len());
    let strings = word(12) as usize;
    let mut at = word(8) as usize;
    let mut path: Vec<String> = Vec::new();
    let mut nodes = BTreeMap::<String, Properties>::new();
    loop {
        let token = word(at);
        at += 4;
        match token {
            1 => {
                let name = text(at);
                at += (name.len() + 1).next_multiple_of(4);
                path.push(name);
                assert!(nodes.insert(path.join("/"), Properties::new()).is_none(), "{path:?} twice");
            }
            2 => drop(path.pop().unwrap()),
            3 => {
                let (length, name) = (word(at) as usize, text(strings + word(at + 4) as usize));
                let value = blob[at + 8..at + 8 + length].to_vec();
                at += 8 + length.next_multiple_of(4);
                let node = nodes.get_mut(&path.join("/")).unwrap();
                assert!(node.insert(name.clone(), value).is_none(), "{name} twice");
            }
            4 => {}
            9 => break,
            other => panic!("token {other:#x}"),
        }
    }
    assert!(path.is_empty());
    nodes
}
