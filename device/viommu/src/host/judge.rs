//! From facts to what stands in the way. Pure: no file is looked at here.

use viommu_host_iommufd::examine::Examined;
use viommu_host_iommufd::sysfs::{
    Architecture, CpuMaker, Group, IommuInstance, IommuKind, Machine, PciDevice, RegionKind, Seen, System,
};

use super::capabilities::Capabilities;
use super::no_iommu::NoIommu;
use super::obstacle::{Incapable, Obstacle, Question, Weight};

/// Whether tables of a device can be handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Verdict {
    /// The kernel said so.
    Yes,
    /// Nothing known is in the way, but the kernel was not asked.
    Likely,
    /// Not as it is; there are steps to take.
    NotYet,
    /// Not on this machine.
    No,
}

/// What is handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// SMMUv3: the guest's table of context descriptors, with all its PASIDs.
    PasidTable,
    /// VT-d: one page table for each PASID.
    PageTables,
}

/// How asking the kernel about a device went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It was not asked.
    NotAsked {
        /// Because the user did not want it.
        passive: bool,
    },
    /// It did not give the device away.
    NotGiven(String),
    /// It answered.
    Examined(Box<Examined>),
}

impl Verdict {
    /// From all that stands in the way, of the machine, the IOMMU and the device.
    pub(super) fn of<'a>(obstacles: impl IntoIterator<Item = &'a Obstacle>, answer: &Answer) -> Self {
        if let Answer::Examined(examined) = answer
            && examined.takes_tables()
        {
            return Self::Yes;
        }
        match obstacles.into_iter().map(Obstacle::weight).max() {
            Some(Weight::Final) => Self::No,
            Some(Weight::Fixable) => Self::NotYet,
            Some(Weight::Doubt) | None => Self::Likely,
        }
    }
}

impl Way {
    /// How a guest gets a table of PASIDs, and a page table for each: the hardware takes one of them as it is, and the
    /// other is made of it (`viommu_device::mediated`).
    pub(super) const fn kinds(self) -> [&'static str; 2] {
        match self {
            Self::PasidTable => ["native", "mediated"],
            Self::PageTables => ["mediated", "native"],
        }
    }

    pub(super) fn of(kind: IommuKind) -> Option<Self> {
        match kind {
            IommuKind::Smmuv3 => Some(Self::PasidTable),
            IommuKind::Vtd(_) => Some(Self::PageTables),
            _ => None,
        }
    }
}

/// Whether accesses of a device can wait for a page that the guest brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waits {
    /// Nothing known is in the way. The kernel says so when a table is attached, not before.
    Likely,
    /// They cannot.
    No(&'static str),
    /// What decides was not seen.
    Unseen(&'static str),
}

impl Waits {
    /// Of a device behind an IOMMU that takes tables.
    pub(super) fn of(
        system: &System,
        device: &PciDevice,
        kind: IommuKind,
        capabilities: Option<&Capabilities>,
    ) -> Self {
        if !matches!(kind, IommuKind::Vtd(_)) {
            return Self::No("Linux does not pass on page requests of PCI devices behind an SMMUv3");
        }
        let Some(config) = device.config.known().filter(|config| config.is_whole()) else {
            return Self::Unseen("the device's configuration space was not wholly seen");
        };
        if !config.page_requests() || config.ats().is_none() {
            return Self::No("the device has no PRI, or no ATS");
        }
        if device.physical_function.is_some() {
            return Self::No("page requests of a virtual function go through the physical one");
        }
        if system.release.version != (0, 0) && system.release.version < (6, 11) {
            return Self::No("before Linux 6.11 page requests are not passed on");
        }
        match capabilities.map(|capabilities| capabilities.page_requests) {
            None => Self::Unseen("the IOMMU's registers were not seen"),
            Some(Some(true)) => Self::Likely,
            Some(_) => Self::No("the IOMMU takes no page requests: ECAP.PRS = 0"),
        }
    }

    /// In words.
    pub(super) const fn reason(self) -> &'static str {
        match self {
            Self::Likely => "PRI, ATS and ECAP.PRS are there",
            Self::No(reason) | Self::Unseen(reason) => reason,
        }
    }
}

/// Of the machine as a whole.
pub(super) fn machine(machine: &Machine) -> Vec<Obstacle> {
    let system = &machine.system;
    let mut found = Vec::new();
    let none = machine.iommus.known().is_none_or(Vec::is_empty);
    if none {
        let facts = no_iommu(system);
        let last = facts.is_final();
        found.push(Obstacle::NoIommu(facts));
        if last {
            return found; // A better kernel would not help.
        }
    }
    let missing = missing_options(system, &["IOMMUFD", "VFIO", "VFIO_PCI", "VFIO_DEVICE_CDEV"]);
    if let Some(old) = too_old(system, (6, 6), "iommufd with files for VFIO devices") {
        found.push(old);
    }
    match missing {
        Some(missing) => found.push(missing),
        None if !system.iommufd.exists => found.push(Obstacle::IommufdAbsent),
        None if !system.iommufd.usable => found.push(Obstacle::IommufdDenied),
        None => {}
    }
    found
}

/// Of one IOMMU, apart from those of the machine. `capabilities`: where its registers are known.
pub(super) fn iommu(system: &System, kind: IommuKind, capabilities: Option<&Capabilities>) -> Vec<Obstacle> {
    let mut found = Vec::new();
    match kind {
        IommuKind::Smmuv3 => {
            found.extend(missing_options(system, &["ARM_SMMU_V3_IOMMUFD"]));
            found.extend(too_old(system, (6, 13), "Handing tables to an SMMUv3"));
            if capabilities.is_some_and(|caps| !caps.nested) {
                found.push(Obstacle::NoNesting { what: "the SMMU has one stage: IDR0.S1P and S2P" });
            }
        }
        IommuKind::Vtd(_) => {
            found.extend(too_old(system, (6, 8), "Handing tables to VT-d"));
            match capabilities {
                Some(caps) if caps.scalable_mode == Some(false) => found.push(Obstacle::NoScalableMode),
                Some(caps) if !caps.first_stage => {
                    found.push(Obstacle::NoNesting { what: "no first stage: ECAP.FSTS = 0" });
                }
                Some(caps) if !caps.nested => {
                    found.push(Obstacle::NoNesting {
                        what: "ECAP.NEST = 0, or no second stage beside the first",
                    });
                }
                _ if scalable_mode(system) == Some(false) => found.push(Obstacle::ScalableModeOff),
                _ => {}
            }
        }
        IommuKind::Smmuv2 => found.push(Obstacle::Kind(Incapable::Smmuv2)),
        IommuKind::Amd(_) => found.push(Obstacle::Kind(Incapable::Amd)),
        IommuKind::Riscv => found.push(Obstacle::Kind(Incapable::Riscv)),
        IommuKind::Virtio => found.push(Obstacle::Kind(Incapable::Virtio)),
        IommuKind::Other => found.push(Obstacle::Kind(Incapable::Other)),
    }
    found
}

/// Of one device, apart from those of the machine and of its IOMMU.
pub(super) fn device(
    machine: &Machine,
    device: &PciDevice,
    iommu: Option<&IommuInstance>,
    capabilities: Option<&Capabilities>,
    answer: &Answer,
) -> Vec<Obstacle> {
    let system = &machine.system;
    let Some(iommu) = iommu else {
        let none = machine.iommus.known().is_none_or(Vec::is_empty);
        // Then the machine's obstacle has said it.
        return if none { Vec::new() } else { vec![Obstacle::NotBehindIommu] };
    };
    if let Answer::Examined(examined) = answer
        && examined.takes_tables()
    {
        return Vec::new();
    }
    let mut found = Vec::new();
    let with_vfio = device.vfio.is_some();
    if !with_vfio {
        found.push(Obstacle::Driver {
            driver: device.driver.clone(),
            load: !system.vfio_pci,
            uses: device.uses.clone(),
            boot_display: device.boot_display,
        });
    }
    let group = device.group.and_then(|id| machine.group(id));
    if let Some(group) = group {
        found.extend(group_mates(machine, device, group));
        if group.regions.iter().any(|region| region.kind == RegionKind::Direct) {
            found.push(Obstacle::FirmwareMapping);
        }
    }
    match &device.vfio {
        Some(vfio) if vfio.name.starts_with("noiommu") => found.push(Obstacle::NoIommuMode),
        Some(vfio) => match &vfio.node {
            None => found.push(Obstacle::NoCdev),
            Some(node) if !node.usable => found.push(Obstacle::VfioDenied),
            Some(_) => {}
        },
        None => {}
    }
    if iommu.kind == IommuKind::Smmuv3 {
        found.extend(coherence(system, device, capabilities, answer));
    }
    match answer {
        Answer::NotGiven(why) => found.push(Obstacle::Bind { why: why.clone() }),
        Answer::Examined(examined) if Way::of(iommu.kind).is_some() => {
            found.extend(refused(
                examined,
                found.iter().any(|other| matches!(other, Obstacle::NotCoherent { .. })),
            ));
        }
        // Where there is something to do first, asking comes after it; where this user may not, that has been said.
        Answer::NotAsked { passive }
            if with_vfio && found.iter().all(|other| other.weight() == Weight::Doubt) =>
        {
            if *passive || (system.iommufd.usable && !found.contains(&Obstacle::VfioDenied)) {
                found.push(Obstacle::NotAsked { passive: *passive });
            }
        }
        Answer::Examined(_) | Answer::NotAsked { .. } => {}
    }
    found
}

/// The first refusal. A refused vIOMMU is what a missing CANWBS looks like, and is not told twice.
fn refused(examined: &Examined, explained: bool) -> Option<Obstacle> {
    let questions = [
        (Question::HwInfo, examined.hw_info.and_then(Result::err)),
        (Question::NestParent, examined.nest_parent.and_then(Result::err)),
        (Question::Viommu, examined.viommu.and_then(Result::err).filter(|_| !explained)),
        (Question::Nested, examined.nested.and_then(Result::err)),
    ];
    questions.into_iter().find_map(|(question, errno)| Some(Obstacle::Refused { question, errno: errno? }))
}

/// Whether cacheable DMA stays coherent whatever the guest's tables say. `VIOMMU_ALLOC` demands it.
fn coherence(
    system: &System,
    device: &PciDevice,
    capabilities: Option<&Capabilities>,
    answer: &Answer,
) -> Option<Obstacle> {
    if let Answer::Examined(examined) = answer
        && matches!(examined.viommu, Some(Ok(())))
    {
        return None;
    }
    let forced = capabilities.and_then(|caps| caps.forced_write_back);
    if forced == Some(true) {
        return None;
    }
    let certain = forced == Some(false);
    match &system.firmware.iort {
        Seen::Known(iort) => {
            let canwbs = iort.root_complex(device.bdf).is_some_and(|complex| complex.canwbs);
            (!canwbs).then_some(Obstacle::NotCoherent { device_tree: false, certain })
        }
        Seen::Absent => {
            Some(Obstacle::NotCoherent { device_tree: system.firmware.acpi.known().is_none(), certain })
        }
        Seen::Hidden { .. } => Some(Obstacle::CoherenceUnseen),
    }
}

/// Devices of the group that a driver of the host has. Bridges stay with theirs.
fn group_mates(machine: &Machine, device: &PciDevice, group: &Group) -> Option<Obstacle> {
    let own = device.bdf.to_string();
    let functions = machine.devices.known().map_or(&[][..], Vec::as_slice);
    let others: Vec<_> = group
        .devices
        .iter()
        .filter(|name| **name != own)
        .filter_map(|name| {
            let other = functions.iter().find(|function| function.bdf.to_string() == *name)?;
            let driver = other.driver.clone()?;
            (!other.is_bridge() && other.vfio.is_none()).then(|| (name.clone(), driver))
        })
        .collect();
    (!others.is_empty()).then_some(Obstacle::GroupMates { group: group.id, others })
}

fn missing_options(system: &System, wanted: &[&'static str]) -> Option<Obstacle> {
    let config = system.config.known()?;
    let missing: Vec<_> = wanted.iter().copied().filter(|option| !config.has(option)).collect();
    (!missing.is_empty()).then(|| Obstacle::KernelOptions { missing, path: config.path.clone() })
}

fn too_old(system: &System, floor: (u32, u32), what: &'static str) -> Option<Obstacle> {
    let release = &system.release;
    let old = release.version != (0, 0) && release.version < floor;
    old.then(|| Obstacle::KernelOld { release: release.text.clone(), floor, what })
}

/// Whether the kernel uses VT-d's scalable mode, as far as its options say.
fn scalable_mode(system: &System) -> Option<bool> {
    let words = system.parameter("intel_iommu").unwrap_or_default();
    for word in words.split(',').rev() {
        match word {
            "sm_on" => return Some(true),
            "sm_off" => return Some(false),
            _ => {}
        }
    }
    system.command_line.known()?;
    Some(system.config.known()?.has("INTEL_IOMMU_SCALABLE_MODE_DEFAULT_ON"))
}

fn no_iommu(system: &System) -> NoIommu {
    let firmware = &system.firmware;
    let smmus = firmware.iort.known().is_some_and(|iort| !iort.smmuv3.is_empty());
    let table = ["DMAR", "IVRS", "RIMT", "VIOT"].into_iter().find(|name| firmware.has_table(name));
    let table = table.or(smmus.then_some("IORT"));
    let driver = match (table, system.architecture, system.cpu) {
        (Some("VIOT"), ..) => "VIRTIO_IOMMU",
        (Some("DMAR"), ..) | (None, Architecture::X86, CpuMaker::Intel) => "INTEL_IOMMU",
        (Some("IVRS"), ..) | (None, Architecture::X86, CpuMaker::Amd) => "AMD_IOMMU",
        (Some("RIMT"), ..) | (None, Architecture::Riscv, _) => "RISCV_IOMMU",
        (_, Architecture::Arm, _) => "ARM_SMMU_V3",
        _ => "IOMMU_SUPPORT",
    };
    let off = [("intel_iommu", "off"), ("amd_iommu", "off"), ("iommu", "off")];
    let switched_off = off.into_iter().find(|(name, value)| {
        system.parameter(name).is_some_and(|words| words.split(',').any(|word| word == *value))
    });
    NoIommu {
        architecture: system.architecture,
        cpu: system.cpu,
        hypervisor: system.hypervisor.clone(),
        table,
        driver_missing: system.config.known().filter(|config| !config.has(driver)).map(|_| driver),
        switched_off: switched_off.map(|(name, value)| format!("{name}={value}")),
    }
}
