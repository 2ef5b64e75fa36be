use std::fmt;
use std::path::PathBuf;

use nix::unistd::{AccessFlags, access};

use super::{Iort, KernelConfig, Root, Seen};

/// The kernel, its files, and the firmware.
#[derive(Clone, Debug)]
pub struct System {
    /// Release of the kernel.
    pub release: Release,
    /// Architecture of the machine.
    pub architecture: Architecture,
    /// Maker of the CPU.
    pub cpu: CpuMaker,
    /// What the machine runs in, where it is a virtual one.
    pub hypervisor: Option<String>,
    /// The kernel's command line.
    pub command_line: Seen<String>,
    /// The kernel's configuration.
    pub config: Seen<KernelConfig>,
    /// `/dev/iommu`.
    pub iommufd: Node,
    /// Whether the driver `vfio-pci` is there.
    pub vfio_pci: bool,
    /// Drivers `vfio-pci` and its variants that are there.
    pub vfio_drivers: Vec<String>,
    /// What the firmware says.
    pub firmware: Firmware,
}

/// Release of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Release {
    /// As `uname -r` has it.
    pub text: String,
    /// The first two numbers; (0, 0) where there are none.
    pub version: (u32, u32),
}

/// Architecture of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// x86-64.
    X86,
    /// 64-bit Arm.
    Arm,
    /// RISC-V.
    Riscv,
    /// Another.
    Other,
}

/// Who made the CPU, where that tells which IOMMU there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuMaker {
    /// Intel.
    Intel,
    /// AMD, and Hygon.
    Amd,
    /// Another, or not told.
    Other,
}

/// A file to be opened for reading and writing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its path.
    pub path: PathBuf,
    /// Whether it is there.
    pub exists: bool,
    /// Whether this process may open it.
    pub usable: bool,
}

/// What the firmware says.
#[derive(Clone, Debug)]
pub struct Firmware {
    /// Signatures of its ACPI tables; absent on a machine without ACPI.
    pub acpi: Seen<Vec<String>>,
    /// The IORT.
    pub iort: Seen<Iort>,
    /// Whether the machine is described by a device tree.
    pub device_tree: bool,
}

impl System {
    /// Looks at the machine below `root`.
    pub fn read(root: &Root) -> Self {
        let text = root.text("/proc/sys/kernel/osrelease").into_known().unwrap_or_default();
        let config = KernelConfig::read(root, &text);
        let drivers = root.names("/sys/bus/pci/drivers").into_known().unwrap_or_default();
        Self {
            release: Release { version: version(&text), text },
            architecture: architecture(root),
            cpu: cpu(root),
            hypervisor: hypervisor(root),
            command_line: root.text("/proc/cmdline"),
            config,
            iommufd: Node::read(root, "/dev/iommu"),
            vfio_pci: drivers.iter().any(|name| name == "vfio-pci"),
            vfio_drivers: drivers.into_iter().filter(|name| is_vfio(name)).collect(),
            firmware: Firmware::read(root),
        }
    }

    /// The last value of `NAME=` on the kernel's command line, or `Some("")` for the bare word.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        let words = self.command_line.known()?.split_whitespace();
        words.rev().find_map(|word| {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            (key == name).then_some(value)
        })
    }
}

/// Whether a PCI driver is one of VFIO: `vfio-pci` itself, or a variant for one maker's devices (`mlx5_vfio_pci`).
pub(super) fn is_vfio(driver: &str) -> bool {
    driver.replace('_', "-").ends_with("vfio-pci")
}

impl Firmware {
    fn read(root: &Root) -> Self {
        let acpi = root.names("/sys/firmware/acpi/tables").map(|names| {
            let is_table =
                |name: &String| name.len() >= 4 && name.bytes().take(4).all(|b| b.is_ascii_uppercase());
            names.into_iter().filter(is_table).collect()
        });
        let path = "/sys/firmware/acpi/tables/IORT";
        let iort = match root.bytes(path) {
            Seen::Known(table) => match Iort::parse(&table) {
                Ok(iort) => Seen::Known(iort),
                Err(error) => Seen::Hidden { path: path.into(), why: error.to_string() },
            },
            Seen::Absent => Seen::Absent,
            Seen::Hidden { path, why } => Seen::Hidden { path, why },
        };
        Self { acpi, iort, device_tree: root.exists("/sys/firmware/devicetree/base/compatible") }
    }

    /// Whether there is an ACPI table of this signature.
    pub fn has_table(&self, signature: &str) -> bool {
        self.acpi.known().is_some_and(|tables| tables.iter().any(|name| name == signature))
    }
}

impl Node {
    pub(super) fn read(root: &Root, path: &str) -> Self {
        let usable = access(&root.path(path), AccessFlags::R_OK | AccessFlags::W_OK).is_ok();
        Self { path: path.into(), exists: root.exists(path), usable }
    }
}

fn version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor),
        _ => (0, 0),
    }
}

fn architecture(root: &Root) -> Architecture {
    let of_program = || std::env::consts::ARCH.to_owned();
    match root.text("/proc/sys/kernel/arch").into_known().unwrap_or_else(of_program).as_str() {
        "x86_64" => Architecture::X86,
        "aarch64" => Architecture::Arm,
        "riscv64" => Architecture::Riscv,
        _ => Architecture::Other,
    }
}

fn cpu(root: &Root) -> CpuMaker {
    let info = root.text("/proc/cpuinfo").into_known().unwrap_or_default();
    if info.contains("GenuineIntel") {
        CpuMaker::Intel
    } else if info.contains("AuthenticAMD") || info.contains("HygonGenuine") {
        CpuMaker::Amd
    } else {
        CpuMaker::Other
    }
}

/// Names that virtual machines have where a machine's maker and model stand.
const VIRTUAL: [&str; 8] =
    ["QEMU", "KVM", "VMware", "VirtualBox", "Xen", "Google Compute Engine", "Virtual Machine", "OpenStack"];

/// x86 processors say whether they are virtual; elsewhere the name of the machine does.
fn hypervisor(root: &Root) -> Option<String> {
    let id = |name: &str| root.text(format!("/sys/class/dmi/id/{name}")).into_known();
    let named = [id("sys_vendor"), id("product_name")].into_iter().flatten();
    let name = named.into_iter().find(|name| VIRTUAL.iter().any(|virtual_name| name.contains(virtual_name)));
    let info = root.text("/proc/cpuinfo").into_known().unwrap_or_default();
    match info.lines().find(|line| line.starts_with("flags")) {
        Some(flags) if !flags.split_whitespace().any(|flag| flag == "hypervisor") => None,
        Some(_) => Some(name.unwrap_or_else(|| "unnamed hypervisor".to_owned())),
        None => name,
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::X86 => "x86-64",
            Self::Arm => "aarch64",
            Self::Riscv => "riscv64",
            Self::Other => "another architecture",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_begin_with_two_numbers() {
        let cases = [("7.3.4-1~bpo13+1-arm64", (7, 3)), ("6.8.0-31-generic", (6, 8)), ("6.15-rc1", (6, 15))];
        for (text, expected) in cases {
            assert_eq!(version(text), expected);
        }
        assert_eq!(version(""), (0, 0));
    }

    #[test]
    fn variants_of_vfio_pci_are_known() {
        assert!(["vfio-pci", "mlx5_vfio_pci", "nvgrace-gpu-vfio-pci"].into_iter().all(is_vfio));
        assert!(!["nvme", "vfio-platform", "pci-stub"].into_iter().any(is_vfio));
    }
}
