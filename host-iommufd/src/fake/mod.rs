//! A kernel that keeps the real one's rules, and hardware that translates: for tests without either.
//!
//! [`FakeIommufd`] implements [`Iommufd`](crate::kernel::Iommufd) after what Linux 7.3.4 does: which object keeps which
//! alive (`EBUSY`), what has to come first (`ENOENT`), what there is one of (`EEXIST`), which flags a driver takes
//! (`EOPNOTSUPP`), which bits of a stream table entry or of a command it refuses (`EIO`), and what an invalidation that
//! fails has done. Behind it are IOMMUs ([`Unit`]) and devices ([`FakeDevice`]), whose accesses
//! ([`FakeIommufd::dma`]) go through what is attached: stage 1 in the guest's memory, read only where stage 2 maps it,
//! with a cache of context descriptors, an IOTLB and device TLBs that nothing but commands empties; then stage 2. So a
//! host that invalidates too little is seen to.
//!
//! Commands are decoded here from the architecture's tables once more: nothing is shared with those who build them.
//!
//! ```
//! use viommu_host_iommufd::fake::{FakeDevice, FakeIommufd, FakeMemory, Unit};
//! use viommu_host_iommufd::kernel::Iommufd;
//! use vm_memory::{GuestAddress, GuestMemoryMmap};
//!
//! let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0x4000_0000), 1 << 20)])?;
//! let kernel = FakeIommufd::new(FakeMemory::new(&memory));
//! let unit = kernel.add_unit(Unit::smmuv3());
//! let device = kernel.add_device(FakeDevice::on(unit));
//! let ioas = kernel.alloc_ioas()?;
//! assert_eq!((kernel.objects(), kernel.hw_info(device)?.max_pasid_lg2), (1, 0));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Not modelled
//! Attaching an IOAS without a hardware page table, `IOAS_COPY`, dirty tracking beyond its flag, limits on pinned memory,
//! several StreamIDs of a device, merged events, walk caches (an invalidation of leaf entries drops as much as one of
//! all), contents of MSIs, AMD nesting. IDs are never given out twice, so that a stale one is `ENOENT`; the kernel
//! reuses them.

mod attach;
mod dma;
mod events;
mod graph;
mod hwpt;
mod invalidate;
mod ioas;
mod iommufd;
mod memory;
mod page_requests;
mod smmuv3;
mod units;
mod vtd;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub use dma::DmaFault;
pub use memory::{FakeMemory, Memory};
pub use units::{FakeDevice, FakeSmmuv3, FakeVtd, Unit, UnitId};

use pgtable_formats::IovaRange;

use crate::kernel::{DeviceId, ObjectId, ResponseCode};
use graph::State;

/// What of iommufd the kernel has: all of it, unless it is an old one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// `IOMMU_IOAS_MAP_FILE`, else `ENOTTY` (6.13).
    pub map_file: bool,
    /// `IOMMU_VIOMMU_ALLOC` and `IOMMU_VDEVICE_ALLOC`, else `ENOTTY` (6.13).
    pub viommu: bool,
    /// `IOMMU_VEVENTQ_ALLOC`, else `ENOTTY` (6.15).
    pub event_queues: bool,
    /// `IOMMU_FAULT_QUEUE_ALLOC`, else `ENOTTY` (6.11).
    pub fault_queues: bool,
    /// Attaching with a PASID, else `EINVAL` (6.15).
    pub pasids: bool,
    /// Commands are checked field by field, else by opcode and vSID alone (7.3.4).
    pub strict_commands: bool,
}

impl Kernel {
    /// Linux 7.3.4.
    pub const NEWEST: Self = Self {
        map_file: true,
        viommu: true,
        event_queues: true,
        fault_queues: true,
        pasids: true,
        strict_commands: true,
    };
}

/// iommufd, IOMMUs and devices, all of them made up.
#[derive(Debug)]
pub struct FakeIommufd<M> {
    memory: M,
    kernel: Kernel,
    state: Mutex<State>,
}

impl<M: Memory> FakeIommufd<M> {
    /// The newest kernel, without any hardware yet, in a process with this memory.
    pub fn new(memory: M) -> Self {
        Self::with_kernel(memory, Kernel::NEWEST)
    }

    /// Another kernel.
    pub fn with_kernel(memory: M, kernel: Kernel) -> Self {
        Self { memory, kernel, state: Mutex::default() }
    }

    /// Puts an IOMMU into the machine.
    pub fn add_unit(&self, unit: Unit) -> UnitId {
        self.state().add_unit(unit)
    }

    /// Puts a device behind an IOMMU and binds it to the iommufd.
    pub fn add_device(&self, device: FakeDevice) -> DeviceId {
        self.state().add_device(device)
    }

    /// What was said of a device when it was added.
    pub fn device(&self, device: DeviceId) -> Option<FakeDevice> {
        self.state().devices.get(&device).cloned()
    }

    /// Where a device sends its interrupts, if those are addresses that its IOMMU translates.
    pub fn doorbell(&self, device: DeviceId) -> Option<IovaRange> {
        let state = self.state();
        let unit = state.unit(state.devices.get(&device)?.unit);
        unit.interrupts().filter(|_| matches!(unit, Unit::Smmuv3(_)))
    }

    /// How many objects there are, devices not counted: what leaks if it does not come back to what it was.
    pub fn objects(&self) -> usize {
        self.state().objects.len()
    }

    /// The objects, one line each.
    pub fn describe(&self) -> Vec<String> {
        self.state().objects.iter().map(|(id, object)| format!("{}: {object:?}", id.0)).collect()
    }

    /// What the untagged accesses of a device, or those with a PASID, are attached to.
    pub fn attached(&self, device: DeviceId, pasid: Option<u32>) -> Option<ObjectId> {
        self.state().attachments.get(&(device, pasid)).map(|attachment| attachment.table)
    }

    /// Faults that only the host's log has: those of stage 2, those that are not passed on, all of VT-d. Oldest first;
    /// they are handed out once.
    pub fn take_host_faults(&self) -> Vec<(DeviceId, DmaFault)> {
        std::mem::take(&mut self.state().host_faults)
    }

    /// What the real kernel or hardware would not have caught, or would have answered by a `WARN`: an ATC_INV in one
    /// batch with a TLBI, a stall of a device that cannot, a range that VT-d has no mask for, page requests read
    /// that the kernel missed to answer. Empty after a run in which all was done right.
    pub fn violations(&self) -> Vec<String> {
        self.state().violations.clone()
    }

    /// How page requests were answered: device, group, answer. An answer of `None` is one the kernel gave by itself.
    pub fn page_responses(&self) -> Vec<(DeviceId, u32, Option<ResponseCode>)> {
        self.state().page_responses.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What a test that panicked has left is as good as any other state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
