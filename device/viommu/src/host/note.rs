//! What is good to know of something that can be, or could be, handed over.

use viommu_host_iommufd::examine::Examined;
use viommu_host_iommufd::kernel::{HwCapabilities, HwKind};
use viommu_host_iommufd::sysfs::{IommuKind, PciDevice, System};

use super::capabilities::Capabilities;
use super::judge::Answer;

/// Of an IOMMU: what a handover through it does not have.
pub(super) fn iommu(system: &System, kind: IommuKind, capabilities: Option<&Capabilities>) -> Vec<String> {
    let mut notes = Vec::new();
    let mut note = |text: &str| notes.push(text.to_owned());
    let version = system.release.version;
    match kind {
        IommuKind::Smmuv3 => {
            note(
                "Page requests of PCI devices: Linux does not pass them on (SMMUv3). Guests pin what devices use.",
            );
            note("Dirty tracking and handed-over tables exclude each other: migrating needs another way.");
            if version < (6, 15) {
                note("Before Linux 6.15 faults in the guest's tables are not reported to the guest.");
            }
        }
        IommuKind::Vtd(_) => {
            note("Memory that is read-only for the guest is writable for its devices (erratum SPR17).");
            note(
                "Faults that cannot be answered by a page are written to the host's log, not told to the guest.",
            );
            if version < (6, 11) {
                note("Before Linux 6.11 page requests are not passed on.");
            }
            if version < (6, 15) {
                note("Before Linux 6.15 there are no PASIDs: one table for each device.");
            }
            let has_option = |option| system.config.known().is_none_or(|config| config.has(option));
            if version < (6, 13) && !has_option("INTEL_IOMMU_SVM") {
                note("Without CONFIG_INTEL_IOMMU_SVM this kernel does not switch page requests on.");
            }
        }
        _ => return notes,
    }
    let options = system.config.known();
    for (option, what) in [("PCI_ATS", "ATS"), ("PCI_PRI", "page requests"), ("PCI_PASID", "PASIDs")] {
        let has = capabilities.is_none_or(|caps| match option {
            "PCI_ATS" => caps.ats == Some(true),
            "PCI_PRI" => caps.page_requests == Some(true),
            _ => caps.pasid_bits != 0,
        });
        if has && options.is_some_and(|options| !options.has(option)) {
            notes.push(format!("The kernel was built without CONFIG_{option}: {what} stay off."));
        }
    }
    notes
}

/// Of a device.
pub(super) fn device(
    device: &PciDevice,
    kind: Option<IommuKind>,
    capabilities: Option<&Capabilities>,
    answer: &Answer,
) -> Vec<String> {
    let mut notes = Vec::new();
    if let Some(function) = device.physical_function {
        notes.push(format!("A virtual function of {function}."));
    }
    let examined = match answer {
        Answer::Examined(examined) => Some(&**examined),
        Answer::NotAsked { .. } | Answer::NotGiven(_) => None,
    };
    notes.extend(examined.into_iter().flat_map(|examined| of_answers(device, examined)));
    let Some(config) = device.config.known().filter(|config| config.is_whole()) else { return notes };
    match (config.pasid(), capabilities.map(|caps| caps.pasid_bits)) {
        (None, _) => notes.push("It sends no PASIDs: one table, for all that it does.".into()),
        (Some(_), Some(0)) => notes.push("It sends PASIDs, but its IOMMU knows none.".into()),
        (Some(_), _) => notes.push(
            "vfio-pci hides its PASID capability: the VMM makes one for the guest from what iommufd tells."
                .into(),
        ),
    }
    let may_page = config.page_requests();
    match kind {
        Some(IommuKind::Vtd(_)) if may_page && device.physical_function.is_some() => {
            notes.push(
                "Its page requests go through the physical function: the kernel does not pass them on."
                    .into(),
            );
        }
        Some(IommuKind::Vtd(_))
            if may_page && capabilities.is_none_or(|caps| caps.page_requests != Some(true)) =>
        {
            notes.push("It sends page requests, but its IOMMU does not take them.".into());
        }
        _ => {}
    }
    if config.ats().is_some() && capabilities.is_some_and(|caps| caps.ats == Some(false)) {
        notes.push("It has ATS, but its IOMMU does not.".into());
    }
    notes
}

fn of_answers(device: &PciDevice, examined: &Examined) -> Vec<String> {
    let mut notes = Vec::new();
    if let Some(info) = examined.hardware() {
        if info.max_pasid_lg2 > 0 {
            notes.push(format!("The kernel has PASIDs of {} bits switched on.", info.max_pasid_lg2));
        }
        let may = device.config.known().is_some_and(|config| config.ats().is_some());
        if may && info.capabilities.contains(HwCapabilities::ATS_NOT_SUPPORTED) {
            notes.push("The kernel cannot switch ATS on for it.".into());
        }
        if matches!(info.kind, HwKind::Smmuv3 { flags, .. } if flags & 1 != 0) {
            notes.push("Its SMMU has an erratum: each invalidation is sent twice.".into());
        }
    }
    if let Some(Err(errno)) = examined.events {
        notes.push(format!("Faults in the guest's tables cannot be reported to it: {}.", errno.desc()));
    }
    notes
}
