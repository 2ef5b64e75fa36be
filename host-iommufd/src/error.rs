//! What goes wrong: while a host is set up, and while it serves.

use nix::errno::Errno;
use pgtable_formats::IovaRange;
use viommu_device::host::HostError;
use viommu_wire::EndpointId;

use crate::kernel::DeviceId;

/// Why a host was not made, or an endpoint not added. All is as it was before.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SetupError {
    /// The kernel refused.
    #[error("{step}: {errno}{}", hint(*step, *errno))]
    Kernel {
        /// What was to be done.
        step: Step,
        /// Its answer.
        errno: Errno,
    },
    /// There is an endpoint of that number.
    #[error("endpoint {} exists", .0.0)]
    EndpointExists(EndpointId),
    /// There is no endpoint of that number.
    #[error("there is no endpoint {}", .0.0)]
    NoEndpoint(EndpointId),
    /// The device is an endpoint already.
    #[error("device {} is endpoint {} already", .device.0, .endpoint.0)]
    DeviceExists {
        /// The device.
        device: DeviceId,
        /// What it is.
        endpoint: EndpointId,
    },
    /// Guest memory lies where the device cannot reach, or where it reaches something else (the window for
    /// message-signalled interrupts, say): the guest has to have its memory elsewhere.
    #[error("guest memory {memory} lies in what the device reserves")]
    MemoryReserved {
        /// The region of guest memory, by guest-physical addresses.
        memory: IovaRange,
    },
}

/// A step of setting up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Step {
    /// `IOMMU_IOAS_ALLOC`.
    #[error("making an I/O address space")]
    AddressSpace,
    /// `IOMMU_IOAS_MAP` or `IOMMU_IOAS_MAP_FILE` of guest memory. `ENOMEM` is most often the limit of locked memory
    /// (`RLIMIT_MEMLOCK`).
    #[error("mapping guest memory for devices")]
    GuestMemory,
    /// `IOMMU_GET_HW_INFO`.
    #[error("asking for the device's IOMMU")]
    HardwareInfo,
    /// `IOMMU_IOAS_IOVA_RANGES`.
    #[error("asking for the device's addresses")]
    Ranges,
    /// `IOMMU_HWPT_ALLOC` of bypass or abort.
    #[error("making a table")]
    Table,
    /// `IOMMU_VIOMMU_ALLOC`.
    #[error("making a vIOMMU")]
    Viommu,
    /// `IOMMU_VDEVICE_ALLOC`.
    #[error("naming the device in its vIOMMU")]
    Vdevice,
    /// `IOMMU_VEVENTQ_ALLOC`.
    #[error("making an event queue")]
    EventQueue,
    /// `VFIO_DEVICE_ATTACH_IOMMUFD_PT`.
    #[error("attaching the device")]
    Attach,
    /// `IOMMU_FAULT_QUEUE_ALLOC`, or making and attaching a table with such a queue.
    #[error("trying page requests")]
    PageRequests,
}

/// What an error number means that says little by itself.
const fn hint(step: Step, errno: Errno) -> &'static str {
    match (step, errno) {
        (Step::GuestMemory, Errno::ENOMEM) => {
            " (most likely the limit of locked memory: all of guest memory is locked for devices, and counted again for each \
             address space that a guest maps it in; see RLIMIT_MEMLOCK, `ulimit -l`)"
        }
        (Step::GuestMemory, Errno::EINVAL) => {
            " (are the start and the size of each region, and its place in its file, multiples of the page size?)"
        }
        (Step::Table, Errno::EADDRINUSE) => {
            " (guest memory reaches beyond what the IOMMU translates, or is no multiple of its pages)"
        }
        (Step::Attach, Errno::EINVAL) => " (does the device share its IOMMU group with another one?)",
        _ => "",
    }
}

impl Step {
    /// What the kernel answered to this step.
    pub(crate) fn failed(self) -> impl FnOnce(Errno) -> SetupError {
        move |errno| SetupError::Kernel { step: self, errno }
    }
}

/// The device's words for what the kernel answered.
pub(crate) fn host_error(errno: Errno) -> HostError {
    match errno {
        Errno::ENOMEM | Errno::ENOSPC => HostError::NoMemory,
        Errno::EOPNOTSUPP | Errno::ENOTTY => HostError::Unsupported,
        Errno::EFAULT => HostError::BadAddress,
        other => HostError::Failed(other as i32),
    }
}

/// Whether the answer means that kernel or hardware does not have what was asked for.
pub(crate) const fn is_absent(errno: Errno) -> bool {
    matches!(errno, Errno::EOPNOTSUPP | Errno::ENOTTY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_administrator_can_change_is_told() {
        let told = |step: Step, errno| step.failed()(errno).to_string();
        let text = told(Step::GuestMemory, Errno::ENOMEM);
        assert!(text.starts_with("mapping guest memory for devices: ENOMEM"), "{text}");
        assert!(text.contains("RLIMIT_MEMLOCK"), "{text}");
        assert!(!told(Step::Viommu, Errno::ENOMEM).contains("RLIMIT"));
    }
}
