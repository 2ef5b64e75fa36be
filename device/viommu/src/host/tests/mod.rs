//! Machines, and what is said of them.
#![allow(clippy::unwrap_used, reason = "tests")]

mod tree;

use nix::errno::Errno;
use serde_json::Value;
use viommu_host_iommufd::examine::Examined;
use viommu_host_iommufd::kernel::{HwCapabilities, HwInfo, HwKind};
use viommu_host_iommufd::sysfs::{Architecture, Bdf, CpuMaker, PciDevice};

use super::judge::{Answer, Verdict, Waits};
use super::names::Names;
use super::no_iommu::NoIommu;
use super::obstacle::{Incapable, Obstacle, Question, Weight};
use super::report::Report;
use super::{json, text};
use tree::{Tree, capable, config, iort};

const SMMU: &str = "smmu3.0x0000000009050000";
/// ECAP of a VT-d with scalable mode, first and second stage, nesting, PASIDs of 20 bits, page requests, device TLBs.
const NESTING: u64 = 1 << 43 | 1 << 46 | 1 << 47 | 1 << 26 | 1 << 40 | 19 << 35 | 1 << 29 | 1 << 42 | 1 << 2;
const CAP: u64 = 47 << 16 | 1 << 60 | 1 << 56 | 1 << 39;

/// A network card and an NVMe disk.
fn arm_server(memory_flags: u8, card_driver: Option<&str>) -> Tree {
    Tree::server("6.18.2", "aarch64")
        .file("sys/firmware/acpi/tables/IORT", iort(memory_flags))
        .function("0000:00:00.0", (0x19e5, 0xa120), 0x06_0400, &[0; 4096])
        .function("0000:01:00.0", (0x15b3, 0x1021), 0x02_0000, &capable())
        .function("0000:02:00.0", (0x144d, 0xa80a), 0x01_0802, &config(&[(0x0f, [0; 4])]))
        .behind("0000:01:00.0", SMMU, 7, card_driver)
        .behind("0000:02:00.0", SMMU, 8, Some("nvme"))
        .file("sys/bus/pci/devices/0000:02:00.0/nvme/nvme0/model", "disk")
}

fn intel_server(ecap: u64, command_line: &str) -> Tree {
    Tree::server("6.18.2", "x86_64")
        .table("DMAR")
        .file("proc/cpuinfo", "vendor_id : GenuineIntel\nflags : fpu vmx\n")
        .file("proc/cmdline", command_line)
        .function("0000:6a:01.0", (0x8086, 0x0b25), 0x08_8000, &capable())
        .behind("0000:6a:01.0", "dmar3", 12, Some("vfio-pci"))
        .vtd("dmar3", CAP, ecap)
}

fn laptop() -> Tree {
    Tree::new("6.12.8", "x86_64")
        .table("FACP")
        .file("proc/cpuinfo", "vendor_id : GenuineIntel\nflags : fpu vmx\n")
        .file("boot/config-6.12.8", "CONFIG_VFIO=m\nCONFIG_VFIO_PCI=m\nCONFIG_INTEL_IOMMU=y\n")
        .function("0000:00:02.0", (0x8086, 0x9a49), 0x03_0000, &[0; 64])
}

/// The report of a machine whose kernel is not asked.
fn looked_at(tree: &Tree) -> Report {
    report(tree, |_| Answer::NotAsked { passive: true })
}

fn report(tree: &Tree, ask: impl Fn(&PciDevice) -> Answer) -> Report {
    let report = Report::new(tree.machine(), &[], ask).unwrap();
    check_form(&report);
    report
}

/// What holds for the text and the JSON of every report.
fn check_form(report: &Report) {
    for all in [false, true] {
        let text = text::render(report, &Names::default(), all);
        for line in text.lines() {
            assert!(line.len() <= 100 && line.trim_end() == line, "{line:?} in\n{text}");
            assert!(line.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{line:?}");
        }
        assert!(!text.contains("\n\n\n"), "{text}");
    }
    let document = document(report);
    assert_eq!(document["schema"], 1);
    let count = |verdict: &str| {
        let devices = document["devices"].as_array().unwrap();
        devices.iter().filter(|device| device["handover"] == verdict).count()
    };
    for (field, verdict) in [("yes", "yes"), ("likely", "likely"), ("not_yet", "not-yet"), ("no", "no")] {
        assert_eq!(document["summary"][field], count(verdict), "{field}");
    }
}

fn document(report: &Report) -> Value {
    serde_json::to_value(json::Document::new(report, &Names::default())).unwrap()
}

fn page(report: &Report) -> String {
    text::render(report, &Names::default(), false)
}

#[track_caller]
fn assert_says(text: &str, wanted: &[&str]) {
    // Lines are broken where they are full.
    let flat = text.split_whitespace().collect::<Vec<_>>().join(" ");
    for wanted in wanted {
        assert!(flat.contains(wanted), "{wanted:?} is not in\n{text}");
    }
}

fn device<'a>(report: &'a Report, bdf: &str) -> &'a super::report::DeviceReport {
    let bdf: Bdf = bdf.parse().unwrap();
    report.devices.iter().find(|device| device.device.bdf == bdf).unwrap()
}

/// The kernel's answers for the SMMUv3 that QEMU emulates.
fn answers(viommu: Result<(), Errno>) -> Answer {
    let idr = [0x0d44_101b, 0x0273_0010, 0, 0x1414, 0, 0x74];
    let kind = HwKind::Smmuv3 { flags: 0, idr, iidr: 0, aidr: 1 };
    let info = HwInfo { kind, max_pasid_lg2: 0, capabilities: HwCapabilities::ATS_NOT_SUPPORTED };
    Answer::Examined(Box::new(Examined {
        hw_info: Some(Ok(info)),
        nest_parent: Some(Ok(())),
        viommu: Some(viommu),
        events: viommu.ok().map(Ok),
        nested: viommu.ok().map(Ok),
    }))
}

fn asked(viommu: Result<(), Errno>) -> impl Fn(&PciDevice) -> Answer {
    move |device| if device.vfio.is_some() { answers(viommu) } else { Answer::NotAsked { passive: false } }
}

#[test]
fn arm_server_with_canwbs() {
    let tree = arm_server(0x07, Some("vfio-pci"));
    let report = report(&tree, asked(Ok(())));
    assert_eq!(device(&report, "0000:01:00.0").verdict, Verdict::Yes);
    assert_eq!(device(&report, "0000:02:00.0").verdict, Verdict::NotYet);
    let text = page(&report);
    assert!(text.starts_with("1 of 2 devices can be handed over; 1 not yet (see what to do).\n"), "{text}");
    assert_says(
        &text,
        &[
            "ACPI, table IORT: SMMUv3: 1; PCI root complexes: 1, with CANWBS: 1",
            "IOMMU smmu3.0x0000000009050000: Arm SMMUv3",
            "the guest's PASID table (context descriptors)",
            "page sizes 4 KiB, 16 KiB, 64 KiB",
            "addresses 48 bits in, 44 bits out",
            "0000:01:00.0 Ethernet controller [15b3:1021] 7 vfio-pci 20 yes yes yes",
            "0000:02:00.0 NVMe controller [144d:a80a] 8 nvme - yes - not yet",
            "Driver nvme has the device; vfio-pci has to have it. The host would lose disk nvme0.",
            "dev=0000:02:00.0",
            "echo vfio-pci > /sys/bus/pci/devices/$dev/driver_override",
            "echo $dev > /sys/bus/pci/devices/$dev/driver/unbind",
            "echo $dev > /sys/bus/pci/drivers_probe",
        ],
    );
    assert!(!text.contains("modprobe"), "vfio-pci is loaded: {text}");
    assert!(!text.contains("could not be seen"), "{text}");
    assert_eq!(report.bridges, 1);

    let document = document(&report);
    assert_eq!(document["iommus"][0]["capabilities"]["granules"], serde_json::json!([4096, 16384, 65536]));
    assert_eq!(document["iommus"][0]["way"], "pasid-table");
    assert_eq!(document["devices"][0]["pci"]["pasid_bits"], 20);
    let offer = &document["devices"][0]["offer"];
    assert_eq!((&offer["pasid_table"], &offer["page_table"]), (&"native".into(), &"mediated".into()));
    // It has PRI; but not behind an SMMUv3.
    assert_eq!(document["devices"][0]["pci"]["page_requests"], true);
    assert_eq!(offer["page_requests"], "no");
    assert_eq!(document["devices"][0]["kernel"]["nested_table"], "ok");
    assert_eq!(document["devices"][0]["reserved_regions"][0]["start"], "0x8000000");
    assert_eq!(document["devices"][1]["obstacles"][0]["code"], "driver");
}

#[test]
fn arm_server_without_canwbs() {
    let tree = arm_server(0x03, Some("vfio-pci"));
    let report = report(&tree, asked(Err(Errno::EOPNOTSUPP)));
    let card = device(&report, "0000:01:00.0");
    assert_eq!(card.verdict, Verdict::NotYet);
    // The refusal has one reason, which is told once.
    assert_eq!(card.obstacles, [Obstacle::NotCoherent { device_tree: false, certain: true }]);
    assert_says(
        &page(&report),
        &[
            "0 of 2 devices",
            "(CANWBS in the IORT)",
            "and this one does not.",
            "override the IORT from the initrd",
        ],
    );

    // Without the kernel's answer the SMMU may still force write-back.
    let looked = looked_at(&tree);
    let card = device(&looked, "0000:01:00.0");
    assert_eq!(card.verdict, Verdict::Likely);
    assert!(card.obstacles.contains(&Obstacle::NotCoherent { device_tree: false, certain: false }));
    assert_says(&page(&looked), &["whether this one does is not seen from here"]);

    // Whatever the firmware says, the kernel's word counts.
    let taken = self::report(&tree, asked(Ok(())));
    assert_eq!(device(&taken, "0000:01:00.0").verdict, Verdict::Yes);
}

#[test]
fn a_device_tree_cannot_say_canwbs() {
    let tree = Tree::server("6.18.2", "aarch64")
        .file("sys/firmware/devicetree/base/compatible", "board")
        .function("0000:01:00.0", (0x15b3, 0x1021), 0x02_0000, &capable())
        .behind("0000:01:00.0", SMMU, 7, Some("vfio-pci"));
    assert_says(&page(&looked_at(&tree)), &["device tree, which cannot say", "Boot with ACPI"]);
}

#[test]
fn without_privilege_it_tells_what_it_did_not_see() {
    let tree = arm_server(0x07, Some("vfio-pci"))
        .unreadable("sys/firmware/acpi/tables/IORT")
        .file("sys/bus/pci/devices/0000:01:00.0/config", [0; 64])
        .file("sys/bus/pci/devices/0000:02:00.0/config", [0; 64])
        .without("boot/config-6.18.2");
    let report = looked_at(&tree);
    let card = device(&report, "0000:01:00.0");
    assert_eq!(card.verdict, Verdict::Likely);
    assert!(card.obstacles.contains(&Obstacle::CoherenceUnseen));
    assert_says(
        &page(&report),
        &[
            "0 of 2 devices can be handed over; 1 probably (the kernel was not asked); 1 not yet",
            "ACPI, table IORT, which this user may not read",
            "0000:01:00.0 Ethernet controller [15b3:1021] 7 vfio-pci ? ? ? likely",
            "What could not be seen",
            "the firmware's IORT (CANWBS): /sys/firmware/acpi/tables/IORT:",
            "ATS, PASIDs and page requests of all devices: without privilege the kernel shows 64 bytes",
            "the kernel's configuration: neither /boot/config-6.18.2 nor /proc/config.gz is there",
            "what smmu3.0x0000000009050000 can do: the kernel tells an SMMUv3's registers only through",
        ],
    );
    assert_eq!(document(&report)["devices"][0]["pci"], Value::Null);
}

#[test]
fn files_that_may_not_be_opened_are_named() {
    let tree = arm_server(0x07, Some("vfio-pci"));
    let mut machine = tree.machine();
    machine.system.iommufd.usable = false;
    if let viommu_host_iommufd::sysfs::Seen::Known(devices) = &mut machine.devices {
        for node in devices.iter_mut().filter_map(|device| device.vfio.as_mut()?.node.as_mut()) {
            node.usable = false;
        }
    }
    let report = Report::new(machine, &[], |_| Answer::NotAsked { passive: false }).unwrap();
    check_form(&report);
    // Another user may: that is no reason why the machine cannot do it.
    let card = device(&report, "0000:01:00.0");
    assert_eq!((card.verdict, card.obstacles.as_slice()), (Verdict::Likely, &[Obstacle::VfioDenied][..]));
    assert_says(
        &page(&report),
        &[
            "/dev/iommu, which this user may not open",
            "Permission for iommufd (the whole machine) This user may not open /dev/iommu",
            "setfacl -m u:NAME:rw /dev/iommu",
            "Permission for VFIO (0000:01:00.0)",
        ],
    );
}

#[test]
fn intel_needs_scalable_mode_and_nesting() {
    let cases = [
        (0, "intel_iommu=on,sm_on", Verdict::No, "has no scalable mode (ECAP.SMTS = 0)"),
        (NESTING & !(1 << 26), "intel_iommu=on,sm_on", Verdict::No, "ECAP.NEST = 0"),
        (NESTING & !(1 << 47), "intel_iommu=on,sm_on", Verdict::No, "no first stage: ECAP.FSTS = 0"),
        (NESTING, "intel_iommu=on", Verdict::NotYet, "Add intel_iommu=on,sm_on to the kernel's command line"),
        (NESTING, "intel_iommu=sm_on intel_iommu=on,sm_off", Verdict::NotYet, "the kernel does not use it"),
        (NESTING, "intel_iommu=on,sm_on", Verdict::Likely, "one for each PASID"),
    ];
    for (ecap, command_line, verdict, wanted) in cases {
        let report = looked_at(&intel_server(ecap, command_line));
        assert_eq!(device(&report, "0000:6a:01.0").verdict, verdict, "{ecap:#x} {command_line}");
        assert_says(&page(&report), &[wanted, "IOMMU dmar3: Intel VT-d", "addresses"]);
    }
    let report = looked_at(&intel_server(NESTING, "intel_iommu=on,sm_on"));
    assert_says(&page(&report), &["table levels 4 or 5", "PASIDs 20 bits", "57 bits in, 48 bits out"]);
    let device = device(&report, "0000:6a:01.0");
    assert!(device.notes.iter().any(|note| note.contains("vfio-pci hides its PASID capability")));
    let offer = device.offer.as_ref().unwrap();
    assert_eq!(offer.way.kinds(), ["mediated", "native"]);
}

/// The truth about page requests takes all of it: device, IOMMU and kernel.
#[test]
fn intel_page_requests_need_the_iommu_too() {
    const PRS: u64 = 1 << 29;
    for (ecap, wanted) in [(NESTING, Waits::Likely), (NESTING & !PRS, Waits::No(""))] {
        let report = looked_at(&intel_server(ecap, "intel_iommu=on,sm_on"));
        let device = device(&report, "0000:6a:01.0");
        let waits = device.offer.as_ref().unwrap().waits;
        assert_eq!(std::mem::discriminant(&waits), std::mem::discriminant(&wanted), "{}", waits.reason());
        assert!(!waits.reason().is_empty());
    }
}

#[test]
fn laptop_without_iommu() {
    let report = looked_at(&laptop());
    assert_eq!(report.devices[0].verdict, Verdict::NotYet);
    assert_says(
        &page(&report),
        &[
            "0 of 1 devices can be handed over; 1 not yet",
            "The kernel drives no IOMMU",
            "The firmware describes none.",
            "Turn on VT-d (Intel Virtualization Technology for Directed I/O) in the firmware's setup.",
            "viommu demo",
            "built without CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV (/boot/config-6.12.8)",
            "Devices behind no IOMMU",
        ],
    );

    let described = laptop().table("DMAR");
    assert_says(
        &page(&looked_at(&described)),
        &["describes one (ACPI table DMAR)", "Add intel_iommu=on,sm_on"],
    );
    let off = described.file("proc/cmdline", "quiet intel_iommu=off");
    assert_says(
        &page(&looked_at(&off)),
        &["Its command line says intel_iommu=off.", "Take intel_iommu=off off"],
    );
}

#[test]
fn virtual_machines_without_iommu() {
    let x86 = laptop().file("proc/cpuinfo", "vendor_id : GenuineIntel\nflags : fpu hypervisor\n");
    let report = looked_at(&x86);
    assert_eq!(report.devices[0].verdict, Verdict::No);
    let text = page(&report);
    assert_says(
        &text,
        &["This is a virtual machine (unnamed hypervisor)", "Run this on the physical machine instead."],
    );
    assert!(!text.contains("CONFIG_"), "{text}");

    let arm = Tree::new("6.12.8", "aarch64").file("sys/class/dmi/id/sys_vendor", "QEMU").function(
        "0000:00:01.0",
        (0x1af4, 0x1041),
        0x02_0000,
        &[0; 256],
    );
    let report = looked_at(&arm);
    assert_eq!(report.devices[0].verdict, Verdict::NotYet);
    assert_says(&page(&report), &["(QEMU)", "-global arm-smmuv3.stage=nested", "virtio network [1af4:1041]"]);
}

#[test]
fn kinds_of_iommu_that_take_no_tables() {
    let server = |iommu: &str| {
        Tree::server("7.3.4", "x86_64")
            .function("0000:01:00.0", (0x15b3, 0x1021), 0x02_0000, &capable())
            .behind("0000:01:00.0", iommu, 7, Some("vfio-pci"))
    };
    let amd = server("ivhd0").file("sys/class/iommu/ivhd0/amd-iommu/features", "25bf732fa2295afe:1d\n");
    let cases = [
        (amd, "there is no invalidation"),
        (server("riscv-iommu@3010000"), "no nesting, no PASIDs, no faults"),
        (server("smmu.0x2b400000"), "this SMMU is of version 1 or 2"),
        (server("virtio0"), "belong to the VMM above it"),
        (server("exynos0"), "this is neither"),
    ];
    for (tree, wanted) in cases {
        let report = looked_at(&tree);
        assert_eq!(report.devices[0].verdict, Verdict::No, "{wanted}");
        assert_says(&page(&report), &[wanted, "0 of 1 devices can be handed over; 1 not on this machine."]);
    }
}

#[test]
fn devices_that_the_kernel_will_not_give_away() {
    let group = "sys/kernel/iommu_groups/7";
    let shared =
        arm_server(0x07, Some("vfio-pci")).link(&format!("{group}/devices/0000:02:00.0"), "../device");
    let obstacles = |tree: &Tree| device(&looked_at(tree), "0000:01:00.0").obstacles.clone();
    let mates = Obstacle::GroupMates { group: 7, others: vec![("0000:02:00.0".into(), "nvme".into())] };
    assert!(obstacles(&shared).contains(&mates));

    let regions = "0x1000 0x1fff direct\n0x3000 0x3fff direct-relaxable\n";
    let mapped = arm_server(0x07, None).file(&format!("{group}/reserved_regions"), regions);
    assert!(obstacles(&mapped).contains(&Obstacle::FirmwareMapping));
    let relaxed = mapped.file(&format!("{group}/reserved_regions"), "0x3000 0x3fff direct-relaxable\n");
    assert!(!obstacles(&relaxed).contains(&Obstacle::FirmwareMapping));

    let card = "sys/bus/pci/devices/0000:01:00.0";
    let no_file = arm_server(0x07, Some("vfio-pci")).without(&format!("{card}/vfio-dev/vfio7/dev"));
    assert!(obstacles(&no_file).contains(&Obstacle::NoCdev));

    let tree = arm_server(0x07, Some("vfio-pci"));
    let busy = report(&tree, |_| Answer::NotGiven("it is busy".into()));
    assert_eq!(device(&busy, "0000:01:00.0").verdict, Verdict::NotYet);
    assert_says(&page(&busy), &["The kernel does not give the device away: it is busy."]);
}

#[test]
fn old_kernels_are_told_what_they_miss() {
    let tree = |release: &str| {
        Tree::server(release, "aarch64")
            .file("sys/firmware/acpi/tables/IORT", iort(0x07))
            .function("0000:01:00.0", (0x15b3, 0x1021), 0x02_0000, &capable())
            .behind("0000:01:00.0", SMMU, 7, Some("vfio-pci"))
    };
    let wanted = "Handing tables to an SMMUv3 is in Linux 6.13 and later; this is 6.12.9";
    assert_says(&page(&looked_at(&tree("6.12.9"))), &[wanted]);
    assert!(!page(&looked_at(&tree("6.13.0"))).contains("and later"));
    assert_says(&page(&looked_at(&tree("6.14.0"))), &["Before Linux 6.15 faults in the guest's tables"]);
    // A kernel that does it has it, whatever its number.
    let ported = report(&tree("6.12.9"), asked(Ok(())));
    assert_eq!(ported.devices[0].verdict, Verdict::Yes);
    assert!(!page(&ported).contains("and later"));
}

#[test]
fn one_device_is_told_in_full() {
    let tree = arm_server(0x07, Some("vfio-pci"));
    let wanted = ["0000:01:00.0".parse().unwrap()];
    let report = Report::new(tree.machine(), &wanted, asked(Ok(()))).unwrap();
    let text = text::render(&report, &Names::default(), true);
    assert!(text.starts_with("1 of 1 devices can be handed over.\n"), "{text}");
    assert_says(
        &text,
        &[
            "Device 0000:01:00.0: Ethernet controller",
            "VFIO device vfio7 (/dev/vfio/devices/vfio7)",
            "0x8000000..=0x80fffff interrupts (MSI)",
            "PCI PASIDs of 20 bits (off), ATS (off), page requests",
            "kernel says registers ok, nest parent ok, vIOMMU ok, fault events ok, guest's table ok",
            "It sends PASIDs, but its IOMMU knows none.",
            "The kernel cannot switch ATS on for it.",
        ],
    );
    assert!(!text.contains("0000:02:00.0"), "{text}");
    let absent = ["0000:77:00.0".parse().unwrap()];
    let error = Report::new(tree.machine(), &absent, asked(Ok(()))).err().unwrap();
    assert_eq!(error.to_string(), "there is no PCI device 0000:77:00.0");
}

#[test]
fn iommus_that_are_alike_are_told_once() {
    let tree = intel_server(NESTING, "intel_iommu=on,sm_on")
        .function("0000:e7:02.0", (0x8086, 0x4940), 0x0b_4000, &capable())
        .behind("0000:e7:02.0", "dmar7", 13, Some("vfio-pci"))
        .vtd("dmar7", CAP, NESTING)
        .vtd("dmar9", CAP, NESTING);
    let text = page(&looked_at(&tree));
    assert_says(
        &text,
        &["IOMMU dmar7: Intel VT-d like dmar3", "Nothing but bridges is behind these IOMMUs: dmar9."],
    );
    assert_eq!(text.matches("table levels").count(), 1, "{text}");
}

/// What can be fixed says how; what cannot says so.
#[test]
fn each_obstacle_says_what_to_do_or_that_nothing_can_be_done() {
    let no_iommu = |architecture, cpu, hypervisor: Option<&str>| {
        Obstacle::NoIommu(NoIommu {
            architecture,
            cpu,
            hypervisor: hypervisor.map(str::to_owned),
            table: None,
            driver_missing: None,
            switched_off: None,
        })
    };
    let refused = |question, errno| Obstacle::Refused { question, errno };
    let driver = Obstacle::Driver { driver: None, load: true, uses: Vec::new(), boot_display: true };
    let fixable = [
        no_iommu(Architecture::X86, CpuMaker::Intel, None),
        no_iommu(Architecture::Arm, CpuMaker::Other, None),
        no_iommu(Architecture::Arm, CpuMaker::Other, Some("KVM")),
        Obstacle::KernelOptions { missing: vec!["IOMMUFD"], path: "/boot/config".into() },
        Obstacle::KernelOld { release: "5.10".into(), floor: (6, 6), what: "iommufd" },
        Obstacle::IommufdAbsent,
        Obstacle::ScalableModeOff,
        Obstacle::NotBehindIommu,
        Obstacle::NotCoherent { device_tree: true, certain: true },
        driver,
        Obstacle::GroupMates { group: 1, others: Vec::new() },
        Obstacle::FirmwareMapping,
        Obstacle::NoCdev,
        Obstacle::NoIommuMode,
        refused(Question::HwInfo, Errno::EIO),
        refused(Question::NestParent, Errno::ENOMEM),
    ];
    let doubts = [
        Obstacle::IommufdDenied,
        Obstacle::VfioDenied,
        Obstacle::CoherenceUnseen,
        Obstacle::NotCoherent { device_tree: false, certain: false },
        Obstacle::NotAsked { passive: true },
        Obstacle::NotAsked { passive: false },
    ];
    let last = [
        Obstacle::Kind(Incapable::Amd),
        Obstacle::NoScalableMode,
        Obstacle::NoNesting { what: "one stage" },
        refused(Question::NestParent, Errno::EOPNOTSUPP),
        refused(Question::Viommu, Errno::EOPNOTSUPP),
        refused(Question::Nested, Errno::EOPNOTSUPP),
    ];
    let check = |obstacle: &Obstacle, weight, has_steps| {
        assert_eq!(obstacle.weight(), weight, "{obstacle:?}");
        assert_eq!(!obstacle.steps().is_empty(), has_steps, "{obstacle:?}");
        assert!(obstacle.to_string().ends_with('.'), "{obstacle}");
    };
    fixable.iter().for_each(|obstacle| check(obstacle, Weight::Fixable, true));
    doubts.iter().for_each(|obstacle| check(obstacle, Weight::Doubt, true));
    last.iter().for_each(|obstacle| check(obstacle, Weight::Final, false));
    // There the advice is to go elsewhere.
    for (cpu, hypervisor) in [(CpuMaker::Intel, Some("VMware")), (CpuMaker::Amd, None)] {
        check(&no_iommu(Architecture::X86, cpu, hypervisor), Weight::Final, true);
    }
}

#[test]
fn verdicts_follow_the_heaviest_obstacle() {
    let not_asked = Answer::NotAsked { passive: true };
    let (doubt, fixable, last) =
        (Obstacle::CoherenceUnseen, Obstacle::IommufdAbsent, Obstacle::Kind(Incapable::Riscv));
    let cases: [(&[&Obstacle], Verdict); 4] = [
        (&[], Verdict::Likely),
        (&[&doubt], Verdict::Likely),
        (&[&fixable, &doubt], Verdict::NotYet),
        (&[&doubt, &last, &fixable], Verdict::No),
    ];
    for (obstacles, verdict) in cases {
        assert_eq!(Verdict::of(obstacles.iter().copied(), &not_asked), verdict);
        assert_eq!(Verdict::of(obstacles.iter().copied(), &answers(Ok(()))), Verdict::Yes);
    }
}

/// The hidden option reads a tree, and never asks this machine's kernel about it.
#[test]
fn a_tree_of_another_machine_is_only_looked_at() {
    let tree = arm_server(0x07, Some("vfio-pci"));
    let options =
        super::Options { json: true, devices: Vec::new(), passive: false, sysfs: Some(tree.path().clone()) };
    super::run(&options).unwrap();
}
