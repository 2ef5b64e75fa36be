//! All that is known and judged of a machine.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::bail;
use viommu_host_iommufd::sysfs::{Bdf, IommuInstance, Machine, PciDevice, Seen};

use super::capabilities::{Capabilities, Registers};
use super::judge::{self, Answer, Verdict, Waits, Way};
use super::note;
use super::obstacle::Obstacle;

pub(super) struct Report {
    pub(super) machine: Machine,
    /// Those that concern every device.
    pub(super) obstacles: Vec<Obstacle>,
    pub(super) iommus: Vec<IommuReport>,
    /// Bridges are left out.
    pub(super) devices: Vec<DeviceReport>,
    /// Bridges behind an IOMMU, or at all where there is none.
    pub(super) bridges: usize,
    pub(super) unseen: Vec<Unseen>,
}

pub(super) struct IommuReport {
    pub(super) instance: IommuInstance,
    pub(super) registers: Option<Registers>,
    pub(super) capabilities: Option<Capabilities>,
    pub(super) way: Option<Way>,
    pub(super) obstacles: Vec<Obstacle>,
    pub(super) notes: Vec<String>,
    /// Devices on other buses, by name.
    pub(super) platform_devices: Vec<String>,
}

pub(super) struct DeviceReport {
    pub(super) device: PciDevice,
    pub(super) answer: Answer,
    pub(super) verdict: Verdict,
    /// What a guest is offered, as far as the hardware goes; `None`: its IOMMU takes no tables.
    pub(super) offer: Option<Offer>,
    /// Those of the device alone.
    pub(super) obstacles: Vec<Obstacle>,
    pub(super) notes: Vec<String>,
}

/// What PROBE would say of a device that is handed over.
pub(super) struct Offer {
    pub(super) way: Way,
    pub(super) waits: Waits,
}

/// Something that was not seen.
pub(super) struct Unseen {
    pub(super) what: String,
    pub(super) why: String,
    pub(super) how: &'static str,
}

impl Report {
    /// Judges `machine`, or the devices of it that are `wanted`. `ask` asks the kernel.
    ///
    /// # Errors
    /// A device that is wanted and not there.
    pub(super) fn new(
        machine: Machine,
        wanted: &[Bdf],
        ask: impl Fn(&PciDevice) -> Answer,
    ) -> anyhow::Result<Self> {
        let functions = machine.devices.known().map_or(&[][..], Vec::as_slice);
        if let Some(missing) =
            wanted.iter().find(|bdf| functions.iter().all(|function| function.bdf != **bdf))
        {
            bail!("there is no PCI device {missing}");
        }
        let (bridges, endpoints): (Vec<_>, Vec<_>) =
            functions.iter().cloned().partition(|device| device.is_bridge() && !wanted.contains(&device.bdf));
        let chosen: Vec<_> = endpoints
            .into_iter()
            .filter(|device| wanted.is_empty() || wanted.contains(&device.bdf))
            .collect();
        let answers: BTreeMap<Bdf, Answer> = chosen.iter().map(|device| (device.bdf, ask(device))).collect();

        let iommus: Vec<_> = machine
            .iommus
            .known()
            .map_or(&[][..], Vec::as_slice)
            .iter()
            .filter_map(|instance| {
                let behind = |device: &&PciDevice| device.iommu.as_ref() == Some(&instance.name);
                let behind: Vec<_> =
                    chosen.iter().filter(behind).filter_map(|device| answers.get(&device.bdf)).collect();
                let shown = wanted.is_empty() || !behind.is_empty();
                shown.then(|| IommuReport::new(&machine, instance, &behind))
            })
            .collect();

        let mut obstacles = judge::machine(&machine);
        if answers
            .values()
            .any(|answer| matches!(answer, Answer::Examined(examined) if examined.takes_tables()))
        {
            obstacles.clear();
        }
        let devices: Vec<_> = chosen
            .into_iter()
            .map(|device| {
                let answer = answers.get(&device.bdf).cloned().unwrap_or(Answer::NotAsked { passive: true });
                DeviceReport::new(&machine, device, &iommus, &obstacles, answer)
            })
            .collect();
        let unseen = unseen(&machine, &iommus, &devices);
        Ok(Self { obstacles, iommus, devices, bridges: bridges.len(), unseen, machine })
    }

    pub(super) fn iommu(&self, device: &PciDevice) -> Option<&IommuReport> {
        iommu_of(&self.iommus, device)
    }

    /// What the kernel's command line says of IOMMUs and VFIO; the rest is nobody's business. `None`: it was not seen.
    pub(super) fn parameters(&self) -> Option<Vec<&str>> {
        let about = |word: &&str| ["iommu", "smmu", "vfio"].iter().any(|name| word.contains(name));
        Some(self.machine.system.command_line.known()?.split_whitespace().filter(about).collect())
    }

    /// Whether devices that are told of are behind `iommu`.
    pub(super) fn has_devices(&self, iommu: &IommuReport) -> bool {
        self.devices.iter().any(|device| device.device.iommu.as_ref() == Some(&iommu.instance.name))
    }

    pub(super) fn count(&self, verdict: Verdict) -> usize {
        self.devices.iter().filter(|device| device.verdict == verdict).count()
    }
}

impl IommuReport {
    /// `answers`: about the devices behind it.
    fn new(machine: &Machine, instance: &IommuInstance, answers: &[&Answer]) -> Self {
        let told = answers.iter().find_map(|answer| match answer {
            Answer::Examined(examined) => Registers::from_kernel(&examined.hardware()?),
            Answer::NotAsked { .. } | Answer::NotGiven(_) => None,
        });
        let registers = told.or_else(|| Registers::from_sysfs(instance.kind));
        let capabilities = registers.map(Registers::decode);
        let (system, kind) = (&machine.system, instance.kind);
        let proven = answers
            .iter()
            .any(|answer| matches!(answer, Answer::Examined(examined) if examined.takes_tables()));
        let is_platform = |name: &&String| name.parse::<Bdf>().is_err();
        Self {
            registers,
            way: Way::of(kind),
            obstacles: if proven { Vec::new() } else { judge::iommu(system, kind, capabilities.as_ref()) },
            notes: note::iommu(system, kind, capabilities.as_ref()),
            platform_devices: instance.devices.iter().filter(is_platform).cloned().collect(),
            capabilities,
            instance: instance.clone(),
        }
    }
}

impl IommuReport {
    /// Whether there is nothing new to tell of `other`.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        (self.way, &self.capabilities, &self.notes) == (other.way, &other.capabilities, &other.notes)
            && std::mem::discriminant(&self.instance.kind) == std::mem::discriminant(&other.instance.kind)
    }
}

impl DeviceReport {
    fn new(
        machine: &Machine,
        device: PciDevice,
        iommus: &[IommuReport],
        of_machine: &[Obstacle],
        answer: Answer,
    ) -> Self {
        let iommu = iommu_of(iommus, &device);
        let capabilities = iommu.and_then(|iommu| iommu.capabilities.as_ref());
        let instance = iommu.map(|iommu| &iommu.instance);
        let obstacles = judge::device(machine, &device, instance, capabilities, &answer);
        let of_iommu = iommu.map_or(&[][..], |iommu| &iommu.obstacles);
        let verdict = Verdict::of(of_machine.iter().chain(of_iommu).chain(&obstacles), &answer);
        let notes = note::device(&device, instance.map(|instance| instance.kind), capabilities, &answer);
        let offer = iommu.and_then(|iommu| {
            let (kind, system) = (iommu.instance.kind, &machine.system);
            Some(Offer { way: iommu.way?, waits: Waits::of(system, &device, kind, capabilities) })
        });
        Self { device, answer, verdict, offer, obstacles, notes }
    }
}

fn iommu_of<'a>(iommus: &'a [IommuReport], device: &PciDevice) -> Option<&'a IommuReport> {
    iommus.iter().find(|iommu| Some(&iommu.instance.name) == device.iommu.as_ref())
}

const AS_ROOT: &str = "run this as root";

fn unseen(machine: &Machine, iommus: &[IommuReport], devices: &[DeviceReport]) -> Vec<Unseen> {
    let system = &machine.system;
    let mut found = Vec::new();
    let mut hidden = |what: &str, file: Option<(&PathBuf, &String)>, how| {
        if let Some((path, why)) = file {
            found.push(Unseen { what: what.to_owned(), why: format!("{}: {why}", path.display()), how });
        }
    };
    hidden("the IOMMUs", file(&machine.iommus), AS_ROOT);
    hidden("the IOMMU groups", file(&machine.groups), AS_ROOT);
    hidden("the PCI devices", file(&machine.devices), AS_ROOT);
    hidden("the kernel's command line", file(&system.command_line), AS_ROOT);
    hidden("the kernel's configuration", file(&system.config), AS_ROOT);
    hidden("the firmware's IORT (CANWBS)", file(&system.firmware.iort), AS_ROOT);
    if matches!(system.config, Seen::Absent) {
        found.push(Unseen {
            what: "the kernel's configuration".into(),
            why: format!("neither /boot/config-{} nor /proc/config.gz is there", system.release.text),
            how: "put it there, or modprobe configs",
        });
    }
    let cut = |device: &&DeviceReport| {
        let config = device.device.config.known();
        !config.is_some_and(|config| config.is_whole())
    };
    let cut = devices.iter().filter(cut).count();
    if cut > 0 {
        let all = if cut == devices.len() { "all".to_owned() } else { format!("{cut} of {}", devices.len()) };
        found.push(Unseen {
            what: format!("ATS, PASIDs and page requests of {all} devices"),
            why: "without privilege the kernel shows 64 bytes of their configuration space".into(),
            how: AS_ROOT,
        });
    }
    let dark = iommus.iter().filter(|iommu| iommu.way.is_some() && iommu.registers.is_none());
    let dark: Vec<_> = dark.map(|iommu| iommu.instance.name.as_str()).collect();
    if !dark.is_empty() {
        found.push(Unseen {
            what: format!("what {} can do", dark.join(", ")),
            why: "the kernel tells an SMMUv3's registers only through a device that VFIO has".into(),
            how: "give one device behind each to vfio-pci, and run this as root",
        });
    }
    found
}

fn file<T>(seen: &Seen<T>) -> Option<(&PathBuf, &String)> {
    match seen {
        Seen::Hidden { path, why } => Some((path, why)),
        Seen::Known(_) | Seen::Absent => None,
    }
}
