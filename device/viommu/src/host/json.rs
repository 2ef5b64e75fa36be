//! The report as a JSON document. Names here are the schema: they stay.
//!
//! Registers, addresses and IDs are strings like `"0x9050000"`: not every reader of JSON keeps 64 bits of a number.

use serde::Serialize;
use serde_json::{Value, json};
use viommu_host_iommufd::sysfs::{IommuKind, Node, RegionKind};

use super::capabilities::{Capabilities, Registers};
use super::judge::{Answer, Verdict, Waits, Way};
use super::names::{Names, class_name};
use super::obstacle::{Obstacle, Step, Weight};
use super::report::{DeviceReport, IommuReport, Offer, Report};

/// Number of this schema. It rises when a field changes its meaning or goes.
const SCHEMA: u32 = 1;

#[derive(Serialize)]
pub(super) struct Document {
    schema: u32,
    summary: Summary,
    machine: MachineDocument,
    iommus: Vec<IommuDocument>,
    devices: Vec<DeviceDocument>,
    /// What could not be seen.
    unseen: Vec<UnseenDocument>,
}

/// How many devices; bridges are not counted.
#[derive(Serialize)]
struct Summary {
    devices: usize,
    yes: usize,
    likely: usize,
    not_yet: usize,
    no: usize,
}

#[derive(Serialize)]
struct MachineDocument {
    kernel: String,
    architecture: String,
    /// `null` on bare metal, or where it was not seen.
    hypervisor: Option<String>,
    /// File of the kernel's configuration; `null` where it was not seen.
    kernel_config: Option<String>,
    /// Words of the kernel's command line about IOMMUs and VFIO; `null` where it was not seen.
    parameters: Option<Vec<String>>,
    iommufd: NodeDocument,
    vfio_pci: bool,
    /// Signatures of the ACPI tables; `null` without ACPI.
    acpi_tables: Option<Vec<String>>,
    bridges: usize,
    obstacles: Vec<ObstacleDocument>,
}

#[derive(Serialize)]
struct NodeDocument {
    path: String,
    exists: bool,
    usable: bool,
}

#[derive(Serialize)]
struct IommuDocument {
    name: String,
    /// `smmuv3`, `smmuv2`, `vtd`, `amd`, `riscv`, `virtio`, `other`.
    kind: &'static str,
    /// What is handed over: `pasid-table`, `page-table-per-pasid`; `null` where nothing is.
    way: Option<&'static str>,
    /// `null` where they were not told. `idr` is a list, the others are one value each.
    registers: Option<Value>,
    capabilities: Option<Capabilities>,
    obstacles: Vec<ObstacleDocument>,
    notes: Vec<String>,
    platform_devices: Vec<String>,
}

#[derive(Serialize)]
struct DeviceDocument {
    device: String,
    name: String,
    vendor_id: String,
    device_id: String,
    class: String,
    class_name: &'static str,
    numa_node: Option<u32>,
    driver: Option<String>,
    iommu: Option<String>,
    group: Option<u32>,
    /// Names of the other devices in the group.
    group_devices: Vec<String>,
    reserved_regions: Vec<RegionDocument>,
    /// `vfio0` and so on.
    vfio: Option<String>,
    physical_function: Option<String>,
    /// `null` where the configuration space was not wholly read.
    pci: Option<Value>,
    /// `yes`: the kernel said so; `likely`: nothing known is in the way; `not-yet`: there are steps; `no`.
    handover: &'static str,
    /// What a guest is offered of a device that is handed over: `pasid_table` and `page_table`, each `native` or
    /// `mediated`; `page_requests`: `likely`, `no` or `null`, with `page_requests_because`. `null`: nothing.
    offer: Option<Value>,
    /// What the kernel answered; `null` where it was not asked.
    kernel: Option<Value>,
    /// Those of this device. The machine's and the IOMMU's count as well.
    obstacles: Vec<ObstacleDocument>,
    notes: Vec<String>,
}

#[derive(Serialize)]
struct RegionDocument {
    start: String,
    last: String,
    /// `direct`, `direct-relaxable`, `reserved`, `msi`, `other`.
    kind: &'static str,
}

#[derive(Serialize)]
struct ObstacleDocument {
    code: &'static str,
    /// `doubt`, `fixable`, `final`.
    weight: &'static str,
    why: String,
    steps: Vec<StepDocument>,
}

/// `do` is a sentence; `run` are commands for root, in which `$dev` is the device.
#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum StepDocument {
    Do(String),
    Run(Vec<String>),
}

#[derive(Serialize)]
struct UnseenDocument {
    what: String,
    why: String,
    how: &'static str,
}

impl Document {
    pub(super) fn new(report: &Report, names: &Names) -> Self {
        let system = &report.machine.system;
        let node = |node: &Node| NodeDocument {
            path: node.path.display().to_string(),
            exists: node.exists,
            usable: node.usable,
        };
        Self {
            schema: SCHEMA,
            summary: Summary {
                devices: report.devices.len(),
                yes: report.count(Verdict::Yes),
                likely: report.count(Verdict::Likely),
                not_yet: report.count(Verdict::NotYet),
                no: report.count(Verdict::No),
            },
            machine: MachineDocument {
                kernel: system.release.text.clone(),
                architecture: system.architecture.to_string(),
                hypervisor: system.hypervisor.clone(),
                kernel_config: system.config.known().map(|config| config.path.display().to_string()),
                parameters: report.parameters().map(|words| words.into_iter().map(str::to_owned).collect()),
                iommufd: node(&system.iommufd),
                vfio_pci: system.vfio_pci,
                acpi_tables: system.firmware.acpi.known().cloned(),
                bridges: report.bridges,
                obstacles: obstacles(&report.obstacles),
            },
            iommus: report.iommus.iter().map(iommu).collect(),
            devices: report.devices.iter().map(|each| device(report, names, each)).collect(),
            unseen: report
                .unseen
                .iter()
                .map(|unseen| UnseenDocument {
                    what: unseen.what.clone(),
                    why: unseen.why.clone(),
                    how: unseen.how,
                })
                .collect(),
        }
    }
}

fn iommu(report: &IommuReport) -> IommuDocument {
    IommuDocument {
        name: report.instance.name.clone(),
        kind: match report.instance.kind {
            IommuKind::Smmuv3 => "smmuv3",
            IommuKind::Smmuv2 => "smmuv2",
            IommuKind::Vtd(_) => "vtd",
            IommuKind::Amd(_) => "amd",
            IommuKind::Riscv => "riscv",
            IommuKind::Virtio => "virtio",
            IommuKind::Other => "other",
        },
        way: report.way.map(|way| match way {
            Way::PasidTable => "pasid-table",
            Way::PageTables => "page-table-per-pasid",
        }),
        registers: report.registers.map(registers),
        capabilities: report.capabilities.clone(),
        obstacles: obstacles(&report.obstacles),
        notes: report.notes.clone(),
        platform_devices: report.platform_devices.clone(),
    }
}

fn registers(registers: Registers) -> Value {
    match registers {
        Registers::Smmuv3 { idr, iidr, aidr } => json!({
            "idr": idr.map(hexadecimal),
            "iidr": hexadecimal(iidr),
            "aidr": hexadecimal(aidr),
        }),
        Registers::Vtd { cap, ecap } => json!({ "cap": hexadecimal(cap), "ecap": hexadecimal(ecap) }),
        Registers::Amd { efr, efr2 } => json!({ "efr": hexadecimal(efr), "efr2": hexadecimal(efr2) }),
    }
}

fn hexadecimal(value: impl Into<u64>) -> String {
    format!("{:#x}", value.into())
}

fn device(report: &Report, names: &Names, each: &DeviceReport) -> DeviceDocument {
    let device = &each.device;
    let own = device.bdf.to_string();
    let group = device.group.and_then(|id| report.machine.group(id));
    let regions = group.map(|group| group.regions.as_slice()).unwrap_or_default();
    let config = device.config.known().filter(|config| config.is_whole());
    DeviceDocument {
        name: names.of(device),
        vendor_id: format!("{:#06x}", device.vendor),
        device_id: format!("{:#06x}", device.device),
        class: format!("{:#08x}", device.class),
        class_name: class_name(device.class),
        numa_node: device.numa_node,
        driver: device.driver.clone(),
        iommu: device.iommu.clone(),
        group: device.group,
        group_devices: group
            .map(|group| group.devices.iter().filter(|name| **name != own).cloned().collect())
            .unwrap_or_default(),
        reserved_regions: regions
            .iter()
            .map(|region| RegionDocument {
                start: hexadecimal(region.range.start().0),
                last: hexadecimal(region.range.last().0),
                kind: match region.kind {
                    RegionKind::Direct => "direct",
                    RegionKind::DirectRelaxable => "direct-relaxable",
                    RegionKind::Reserved => "reserved",
                    RegionKind::Msi => "msi",
                    RegionKind::Other => "other",
                },
            })
            .collect(),
        vfio: device.vfio.as_ref().map(|vfio| vfio.name.clone()),
        physical_function: device.physical_function.map(|function| function.to_string()),
        pci: config.map(|config| {
            json!({
                "ats": config.ats().is_some(),
                "ats_enabled": config.ats().is_some_and(|ats| ats.enabled),
                "page_requests": config.page_requests(),
                "pasid_bits": config.pasid().map_or(0, |pasid| pasid.bits),
                "pasid_execute": config.pasid().is_some_and(|pasid| pasid.execute),
                "pasid_privileged": config.pasid().is_some_and(|pasid| pasid.privileged),
                "pasid_enabled": config.pasid().is_some_and(|pasid| pasid.enabled),
                "virtual_functions": config.sriov().map_or(0, |sriov| sriov.total),
            })
        }),
        handover: match each.verdict {
            Verdict::Yes => "yes",
            Verdict::Likely => "likely",
            Verdict::NotYet => "not-yet",
            Verdict::No => "no",
        },
        offer: each.offer.as_ref().map(offer),
        kernel: kernel(&each.answer),
        obstacles: obstacles(&each.obstacles),
        notes: each.notes.clone(),
        device: own,
    }
}

fn offer(offer: &Offer) -> Value {
    let [pasid_table, page_table] = offer.way.kinds();
    let waits = match offer.waits {
        Waits::Likely => Some("likely"),
        Waits::No(_) => Some("no"),
        Waits::Unseen(_) => None,
    };
    json!({
        "pasid_table": pasid_table,
        "page_table": page_table,
        "page_requests": waits,
        "page_requests_because": offer.waits.reason(),
    })
}

/// Each question with `"ok"`, the name of the error, or `null` where it was not asked.
fn kernel(answer: &Answer) -> Option<Value> {
    let examined = match answer {
        Answer::NotAsked { .. } => return None,
        Answer::NotGiven(why) => return Some(json!({ "bind": why })),
        Answer::Examined(examined) => examined,
    };
    let told = |answer: Option<Result<(), nix::errno::Errno>>| {
        answer.map(|answer| answer.map_or_else(|errno| format!("{errno:?}"), |()| "ok".to_owned()))
    };
    Some(json!({
        "bind": "ok",
        "hw_info": told(examined.hw_info.map(|info| info.map(drop))),
        "nest_parent": told(examined.nest_parent),
        "viommu": told(examined.viommu),
        "events": told(examined.events),
        "nested_table": told(examined.nested),
        "max_pasid_bits": examined.hardware().map(|info| info.max_pasid_lg2),
        "capabilities": examined.hardware().map(|info| hexadecimal(info.capabilities.bits())),
    }))
}

fn obstacles(obstacles: &[Obstacle]) -> Vec<ObstacleDocument> {
    obstacles
        .iter()
        .map(|obstacle| ObstacleDocument {
            code: obstacle.code(),
            weight: match obstacle.weight() {
                Weight::Doubt => "doubt",
                Weight::Fixable => "fixable",
                Weight::Final => "final",
            },
            why: obstacle.to_string(),
            steps: obstacle
                .steps()
                .into_iter()
                .map(|step| match step {
                    Step::Do(text) => StepDocument::Do(text),
                    Step::Run(commands) => StepDocument::Run(commands),
                })
                .collect(),
        })
        .collect()
}
