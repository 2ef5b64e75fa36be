//! Why tables cannot be handed over, and what can be done about it.

use std::fmt;
use std::path::PathBuf;

use nix::errno::Errno;
use viommu_host_iommufd::sysfs::Bdf;

use super::no_iommu::NoIommu;

/// Something that stands in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Obstacle {
    /// The kernel drives no IOMMU.
    NoIommu(NoIommu),
    /// Options that the kernel was built without, and where that is written.
    KernelOptions { missing: Vec<&'static str>, path: PathBuf },
    /// The kernel is older than the feature.
    KernelOld { release: String, floor: (u32, u32), what: &'static str },
    /// There is no `/dev/iommu`, though the kernel's configuration may have it.
    IommufdAbsent,
    /// This user may not open `/dev/iommu`. Another may: it is in the way of asking, not of handing over.
    IommufdDenied,
    /// This user may not open the device's file, likewise.
    VfioDenied,
    /// This kind of IOMMU cannot be handed tables.
    Kind(Incapable),
    /// VT-d: the hardware has no scalable mode.
    NoScalableMode,
    /// VT-d: scalable mode is not switched on.
    ScalableModeOff,
    /// The hardware does not nest a guest's tables in the host's.
    NoNesting { what: &'static str },
    /// The device is not behind an IOMMU.
    NotBehindIommu,
    /// SMMUv3: the firmware does not say CANWBS. Certain when the SMMU was seen to have no S2FWB either.
    NotCoherent { device_tree: bool, certain: bool },
    /// SMMUv3: whether the firmware says CANWBS was not seen.
    CoherenceUnseen,
    /// The device is not with a VFIO driver.
    Driver { driver: Option<String>, load: bool, uses: Vec<String>, boot_display: bool },
    /// Others of its group are with drivers of the host.
    GroupMates { group: u32, others: Vec<(String, String)> },
    /// The firmware wants a part of memory mapped at all times.
    FirmwareMapping,
    /// VFIO has the device, and makes no file for it.
    NoCdev,
    /// VFIO has the device without an IOMMU.
    NoIommuMode,
    /// The kernel does not give the device away.
    Bind { why: String },
    /// The kernel refused an object.
    Refused { question: Question, errno: Errno },
    /// Nothing known is in the way, and the kernel was not asked.
    NotAsked { passive: bool },
}

/// What the kernel was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Question {
    HwInfo,
    NestParent,
    Viommu,
    Nested,
}

/// Kinds of IOMMUs that cannot be handed tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Incapable {
    Smmuv2,
    Amd,
    Riscv,
    Virtio,
    Other,
}

/// How much an obstacle weighs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Weight {
    /// It may be none: the kernel decides.
    Doubt,
    /// Something can be done about it.
    Fixable,
    /// Nothing can be done about it on this machine.
    Final,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// In words.
    Do(String),
    /// Commands, as root. `$dev` is the device.
    Run(Vec<String>),
}

impl Obstacle {
    pub(super) fn weight(&self) -> Weight {
        match self {
            Self::IommufdDenied
            | Self::VfioDenied
            | Self::CoherenceUnseen
            | Self::NotAsked { .. }
            | Self::NotCoherent { certain: false, .. } => Weight::Doubt,
            Self::Kind(_) | Self::NoScalableMode | Self::NoNesting { .. } => Weight::Final,
            Self::NoIommu(facts) if facts.is_final() => Weight::Final,
            Self::Refused { question, errno } => match (question, errno) {
                (Question::HwInfo, _) | (_, Errno::ENOMEM | Errno::EBUSY) => Weight::Fixable,
                _ => Weight::Final,
            },
            Self::NoIommu(_)
            | Self::KernelOptions { .. }
            | Self::KernelOld { .. }
            | Self::IommufdAbsent
            | Self::ScalableModeOff
            | Self::NotBehindIommu
            | Self::NotCoherent { .. }
            | Self::Driver { .. }
            | Self::GroupMates { .. }
            | Self::FirmwareMapping
            | Self::NoCdev
            | Self::NoIommuMode
            | Self::Bind { .. } => Weight::Fixable,
        }
    }

    /// A stable name, for programs.
    pub(super) fn code(&self) -> &'static str {
        match self {
            Self::NoIommu(_) => "no-iommu",
            Self::KernelOptions { .. } => "kernel-options",
            Self::KernelOld { .. } => "kernel-old",
            Self::IommufdAbsent => "iommufd-absent",
            Self::IommufdDenied => "iommufd-permission",
            Self::VfioDenied => "vfio-permission",
            Self::Kind(_) => "iommu-kind",
            Self::NoScalableMode => "no-scalable-mode",
            Self::ScalableModeOff => "scalable-mode-off",
            Self::NoNesting { .. } => "no-nesting",
            Self::NotBehindIommu => "not-behind-iommu",
            Self::NotCoherent { .. } => "not-coherent",
            Self::CoherenceUnseen => "coherence-unseen",
            Self::Driver { .. } => "driver",
            Self::GroupMates { .. } => "group",
            Self::FirmwareMapping => "firmware-mapping",
            Self::NoCdev => "no-vfio-file",
            Self::NoIommuMode => "vfio-noiommu",
            Self::Bind { .. } => "bind",
            Self::Refused { .. } => "refused",
            Self::NotAsked { .. } => "not-asked",
        }
    }

    /// A word or two, for a column.
    pub(super) fn short(&self) -> &'static str {
        match self {
            Self::NoIommu(_) => "no IOMMU",
            Self::KernelOptions { .. } => "kernel options",
            Self::KernelOld { .. } => "kernel too old",
            Self::IommufdAbsent => "no /dev/iommu",
            Self::IommufdDenied => "permission for iommufd",
            Self::VfioDenied => "permission for VFIO",
            Self::Kind(_) => "kind of IOMMU",
            Self::NoScalableMode => "no scalable mode",
            Self::ScalableModeOff => "scalable mode off",
            Self::NoNesting { .. } => "no nesting",
            Self::NotBehindIommu => "no IOMMU",
            Self::NotCoherent { .. } => "no CANWBS",
            Self::CoherenceUnseen => "CANWBS not seen",
            Self::Driver { .. } => "driver",
            Self::GroupMates { .. } => "its group",
            Self::FirmwareMapping => "firmware mapping",
            Self::NoCdev => "no VFIO file",
            Self::NoIommuMode => "VFIO without IOMMU",
            Self::Bind { .. } => "kernel refuses",
            Self::Refused { .. } => "kernel refuses",
            Self::NotAsked { .. } => "kernel not asked",
        }
    }

    /// What to do, in order. Empty where nothing can be done.
    pub(super) fn steps(&self) -> Vec<Step> {
        let say = |text: &str| vec![Step::Do(text.to_owned())];
        match self {
            Self::NoIommu(facts) => facts.steps(),
            Self::KernelOptions { missing, .. } => vec![Step::Do(format!(
                "Install or build a kernel with {}=y (or =m). Not every distribution's kernel has them: Debian's has \
                 no CONFIG_IOMMUFD.",
                listed(missing.iter().map(|option| format!("CONFIG_{option}")))
            ))],
            Self::KernelOld { floor: (major, minor), .. } => {
                vec![Step::Do(format!("Install Linux {major}.{minor} or later."))]
            }
            Self::IommufdAbsent => vec![
                Step::Run(vec!["modprobe iommufd".into()]),
                Step::Do(
                    "Where there is no such module the kernel was built without CONFIG_IOMMUFD and \
                     CONFIG_VFIO_DEVICE_CDEV: install one that has both."
                        .into(),
                ),
            ],
            Self::IommufdDenied => {
                say("Run this as root, or give the user access: setfacl -m u:NAME:rw /dev/iommu")
            }
            Self::VfioDenied => say(
                "Run this as root, or give the user access to the device's file, which is named after the folder in \
                 /sys/bus/pci/devices/$dev/vfio-dev: setfacl -m u:NAME:rw /dev/vfio/devices/FILE",
            ),
            Self::Kind(Incapable::Virtio) => {
                say("Run this on the machine that runs the virtual machine, or where it emulates an SMMUv3.")
            }
            Self::Kind(_) | Self::NoScalableMode | Self::NoNesting { .. } => Vec::new(),
            Self::ScalableModeOff => {
                say("Add intel_iommu=on,sm_on to the kernel's command line and boot again.")
            }
            Self::NotBehindIommu => say(
                "Nothing between this device and memory translates. Firmware may have the IOMMU off for its root port, \
                 or the kernel may have passed it over (dmesg | grep -i -e iommu -e dmar -e smmu).",
            ),
            Self::NotCoherent { device_tree: true, .. } => {
                say("Boot with ACPI: the flag exists in the IORT alone, a device tree cannot say it.")
            }
            Self::NotCoherent { .. } => say(
                "Ask the maker for firmware whose IORT sets CANWBS (memory access flags of the root complex, bit 2), \
                 where the hardware is so. To try: override the IORT from the initrd (CONFIG_ACPI_TABLE_UPGRADE).",
            ),
            Self::CoherenceUnseen => say("Run this as root: the firmware's tables are for root alone."),
            Self::Driver { driver, load, .. } => {
                let mut commands = vec![];
                commands.extend(load.then(|| "modprobe vfio-pci".into()));
                commands.push("echo vfio-pci > /sys/bus/pci/devices/$dev/driver_override".into());
                if driver.is_some() {
                    commands.push("echo $dev > /sys/bus/pci/devices/$dev/driver/unbind".into());
                }
                commands.push("echo $dev > /sys/bus/pci/drivers_probe".into());
                vec![Step::Run(commands), Step::Do("Then run this again as root: it asks the kernel.".into())]
            }
            Self::GroupMates { .. } => say(
                "Give those to vfio-pci as well, or to no driver. A slot behind a root port with ACS has groups of \
                 its own.",
            ),
            Self::FirmwareMapping => say(
                "Look for a firmware setting that lets go of the device (often named RMRR, or shared memory with the \
                 management controller).",
            ),
            Self::NoCdev => {
                say("Install or build a kernel with CONFIG_VFIO_DEVICE_CDEV=y (Linux 6.6 or later).")
            }
            Self::NoIommuMode => {
                say("Switch off enable_unsafe_noiommu_mode of module vfio, and give the machine an IOMMU.")
            }
            Self::Bind { .. } => Vec::new(),
            Self::Refused { question: Question::HwInfo, .. } => {
                say("Look into the kernel's log: dmesg | tail")
            }
            Self::Refused { errno: Errno::ENOMEM | Errno::EBUSY, .. } => {
                say("Try again when less is running.")
            }
            Self::Refused { .. } => Vec::new(),
            Self::NotAsked { passive: true } => say("Leave out --passive: the kernel is asked then."),
            Self::NotAsked { .. } => say("Run this as root: the kernel is asked then."),
        }
    }
}

/// Why, in a sentence or two.
impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoIommu(facts) => facts.fmt(f),
            Self::KernelOptions { missing, path } => write!(
                f,
                "The kernel was built without {} ({}).",
                listed(missing.iter().map(|option| format!("CONFIG_{option}"))),
                path.display()
            ),
            Self::KernelOld { release, floor: (major, minor), what } => write!(
                f,
                "{what} is in Linux {major}.{minor} and later; this is {release}, unless it was ported back.",
            ),
            Self::IommufdAbsent => f.write_str("There is no /dev/iommu: iommufd is not loaded, or not built."),
            Self::IommufdDenied => f.write_str("This user may not open /dev/iommu, so the kernel was not asked."),
            Self::VfioDenied => {
                f.write_str("VFIO has the device, but this user may not open its file in /dev/vfio/devices.")
            }
            Self::Kind(kind) => kind.fmt(f),
            Self::NoScalableMode => f.write_str(
                "This VT-d has no scalable mode (ECAP.SMTS = 0): only the host's own tables translate, one for each \
                 device.",
            ),
            Self::ScalableModeOff => {
                f.write_str("VT-d has scalable mode, but the kernel does not use it, and nesting needs it.")
            }
            Self::NoNesting { what } => {
                write!(f, "The hardware cannot nest a guest's tables in the host's ({what}).")
            }
            Self::NotBehindIommu => f.write_str("The device is not behind an IOMMU."),
            Self::NotCoherent { device_tree, certain } => {
                f.write_str(if *device_tree {
                    "The firmware describes the machine by a device tree, which cannot say that cacheable DMA stays \
                     coherent whatever a guest's tables say (CANWBS)."
                } else {
                    "The firmware does not say that cacheable DMA stays coherent whatever a guest's tables say \
                     (CANWBS in the IORT)."
                })?;
                f.write_str(if *certain {
                    " Without it Linux nests only on an SMMU that forces write-back (S2FWB), and this one does not."
                } else {
                    " Without it Linux nests only on an SMMU that forces write-back (S2FWB); whether this one does is \
                     not seen from here."
                })
            }
            Self::CoherenceUnseen => f.write_str(
                "Linux nests only where the firmware says CANWBS in the IORT, or the SMMU forces write-back (S2FWB). \
                 Neither could be seen.",
            ),
            Self::Driver { driver, uses, boot_display, .. } => {
                match driver {
                    Some(driver) => write!(f, "Driver {driver} has the device; vfio-pci has to have it.")?,
                    None => f.write_str("No driver has the device; vfio-pci has to have it.")?,
                }
                if !uses.is_empty() {
                    write!(f, " The host would lose {}.", listed(uses.iter().cloned()))?;
                }
                if *boot_display {
                    f.write_str(" It is the display that the machine booted with.")?;
                }
                Ok(())
            }
            Self::GroupMates { group, others } => write!(
                f,
                "The IOMMU cannot tell it from others of group {group} that the host uses: {}.",
                listed(others.iter().map(|(device, driver)| format!("{device} ({driver})")))
            ),
            Self::FirmwareMapping => f.write_str(
                "The firmware demands a mapping of its own for the device at all times (reserved region of type \
                 direct), and the kernel then does not give it away.",
            ),
            Self::NoCdev => f.write_str(
                "vfio-pci has the device, but the kernel makes no file for it in /dev/vfio/devices, which iommufd \
                 needs.",
            ),
            Self::NoIommuMode => f.write_str("VFIO has the device in its mode without an IOMMU."),
            Self::Bind { why } => write!(f, "The kernel does not give the device away: {why}."),
            Self::Refused { question, errno } => write!(f, "The kernel refused {question}: {}.", errno.desc()),
            Self::NotAsked { passive: true } => f.write_str("The kernel was not asked whether it takes tables for it."),
            Self::NotAsked { .. } => {
                f.write_str("The kernel could not be asked whether it takes tables for it.")
            }
        }
    }
}

impl fmt::Display for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::HwInfo => "to tell of the IOMMU (IOMMU_GET_HW_INFO)",
            Self::NestParent => "a table that guests' tables can be nested in (IOMMU_HWPT_ALLOC_NEST_PARENT)",
            Self::Viommu => "the guest's part of the IOMMU (IOMMU_VIOMMU_ALLOC)",
            Self::Nested => "a guest's table (IOMMU_HWPT_ALLOC)",
        })
    }
}

impl fmt::Display for Incapable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Smmuv2 => "Linux hands guests' tables to SMMUv3 alone; this SMMU is of version 1 or 2.",
            Self::Amd => {
                "Linux can hand a guest's tables to AMD's IOMMU (7.0 and later), but not tell it what the guest \
                 changed: there is no invalidation. Such a guest would soon use memory that is no longer its own \
                 mapping, so this is not done."
            }
            Self::Riscv => {
                "Linux's driver of the RISC-V IOMMU hands over nothing yet: no nesting, no PASIDs, no faults."
            }
            Self::Virtio => {
                "This is a guest's virtio-iommu: the tables that Linux would hand over belong to the VMM above it, and \
                 the driver takes none."
            }
            Self::Other => "Linux hands guests' tables to Arm SMMUv3 and Intel VT-d; this is neither.",
        })
    }
}

/// `a`, `a and b`, `a, b and c`.
pub(super) fn listed(items: impl IntoIterator<Item = String>) -> String {
    let items: Vec<String> = items.into_iter().collect();
    match items.split_last() {
        None => String::new(),
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} and {last}", rest.join(", ")),
    }
}

/// The commands of a step, for these devices.
pub(super) fn for_devices(commands: &[String], devices: &[Bdf]) -> Vec<String> {
    let mut lines = Vec::new();
    if commands.iter().any(|command| command.contains("$dev"))
        && let Some((first, rest)) = devices.split_first()
    {
        let also = match rest {
            [] => String::new(),
            [one] => format!("    # then {one}"),
            [one, .., last] => format!("    # then {one} to {last}"),
        };
        lines.push(format!("dev={first}{also}"));
    }
    lines.extend_from_slice(commands);
    lines
}
