//! A machine without an IOMMU: why it has none, and how it may get one.

use std::fmt;

use viommu_host_iommufd::sysfs::{Architecture, CpuMaker};

use super::obstacle::Step;

/// Why the kernel drives no IOMMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NoIommu {
    pub(super) architecture: Architecture,
    pub(super) cpu: CpuMaker,
    pub(super) hypervisor: Option<String>,
    /// The table by which the firmware describes an IOMMU, if it does.
    pub(super) table: Option<&'static str>,
    /// The option of the IOMMU's driver, where the kernel is known not to have it.
    pub(super) driver_missing: Option<&'static str>,
    /// The parameter on the command line that switches IOMMUs off.
    pub(super) switched_off: Option<String>,
}

impl NoIommu {
    /// Whether no IOMMU that could appear here would take a guest's tables.
    pub(super) fn is_final(&self) -> bool {
        let found = self.table.is_some() || self.switched_off.is_some();
        match (self.architecture, self.cpu) {
            (Architecture::Arm, _) => false,
            (Architecture::X86, CpuMaker::Amd) => true,
            (Architecture::X86, _) => !found && self.hypervisor.is_some(),
            (Architecture::Riscv | Architecture::Other, _) => true,
        }
    }

    pub(super) fn steps(&self) -> Vec<Step> {
        let say = |text: String| Step::Do(text);
        if let Some(parameter) = &self.switched_off {
            return vec![say(format!("Take {parameter} off the kernel's command line and boot again."))];
        }
        let mut steps = Vec::new();
        match (self.table, &self.hypervisor) {
            (Some(_), _) => match self.driver_missing {
                Some(option) => steps.push(say(format!("Install or build a kernel with CONFIG_{option}=y."))),
                None if self.table == Some("DMAR") => {
                    steps.push(say("Add intel_iommu=on,sm_on to the kernel's command line and boot again.".into()));
                }
                None => steps.push(say(
                    "Look why the kernel passed it over: dmesg | grep -i -e iommu -e dmar -e amd-vi -e smmu".into(),
                )),
            },
            (None, Some(_)) => steps.push(say(match self.architecture {
                Architecture::Arm => "Let the VMM give this machine an SMMUv3 with both stages. QEMU: -machine \
                     virt,iommu=smmuv3 -global arm-smmuv3.stage=nested, booted with UEFI."
                    .into(),
                _ => "Run this on the physical machine instead. The IOMMUs that QEMU emulates for x86 (intel-iommu, \
                     amd-iommu) do not nest; the SMMUv3 that it emulates for Arm does."
                    .into(),
            })),
            (None, None) => steps.push(say(match (self.architecture, self.cpu) {
                (Architecture::X86, CpuMaker::Intel) => {
                    "Turn on VT-d (Intel Virtualization Technology for Directed I/O) in the firmware's setup. Then \
                     boot with intel_iommu=on,sm_on."
                        .into()
                }
                (Architecture::X86, CpuMaker::Amd) => {
                    "AMD's IOMMU (AMD-Vi) can be turned on in the firmware's setup, for MAP and UNMAP requests. Linux \
                     does not hand guests' tables to it."
                        .into()
                }
                (Architecture::X86, CpuMaker::Other) => "Turn on the IOMMU (VT-d) in the firmware's setup.".into(),
                (Architecture::Arm, _) => {
                    "Turn on the SMMU in the firmware's setup, if the machine has an SMMUv3, and boot with ACPI."
                        .into()
                }
                _ => "Linux hands guests' tables to Arm SMMUv3 and Intel VT-d alone.".into(),
            })),
        }
        if self.table.is_none()
            && !self.is_final()
            && let Some(option) = self.driver_missing
        {
            steps.push(say(format!("The kernel needs CONFIG_{option}=y as well.")));
        }
        steps.push(say("Meanwhile there is the software host, which needs no IOMMU: viommu demo".into()));
        steps
    }
}

impl fmt::Display for NoIommu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "The kernel drives no IOMMU: devices reach all of memory, and nothing translates for them. ",
        )?;
        match (self.table, &self.hypervisor, &self.switched_off) {
            (_, _, Some(parameter)) => write!(f, "Its command line says {parameter}."),
            (Some(table), ..) => write!(f, "The firmware describes one (ACPI table {table})."),
            (None, Some(hypervisor), _) => {
                write!(f, "This is a virtual machine ({hypervisor}), and it was given none.")
            }
            (None, None, _) => f.write_str("The firmware describes none."),
        }
    }
}
