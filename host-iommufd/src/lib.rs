//! Hands guests' page tables to hardware, through Linux iommufd and VFIO.
//!
//! [`IommufdHost`] is a [`Host`](viommu_device::host::Host): give it to a
//! [`Device`](viommu_device::Device), and what a guest binds by ATTACH_TABLE is walked by the physical IOMMU, while MAP
//! and UNMAP, bypass, and endpoints that are bound to nothing work as everywhere.
//!
//! ```no_run
//! use std::path::Path;
//! use std::sync::Arc;
//!
//! use viommu_device::host::Host;
//! use viommu_host_iommufd::sys::Sys;
//! use viommu_host_iommufd::sysfs::Root;
//! use viommu_host_iommufd::{Device, IommufdHost};
//! use viommu_wire::EndpointId;
//! use vm_memory::{GuestAddress, GuestMemoryMmap};
//!
//! let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0x4000_0000), 256 << 20)])?;
//! let kernel = Arc::new(Sys::open()?);
//! // The function must be bound to the driver vfio-pci.
//! let (id, _vfio) = kernel.bind(Path::new("/sys/bus/pci/devices/0000:01:00.0"))?;
//! let device = Device::on_pci(id, &Root::here(), "0000:01:00.0".parse()?);
//! let device = device.ok_or("its reserved regions cannot be read")?;
//!
//! let mut host = IommufdHost::new(kernel, &memory)?;
//! host.add_endpoint(EndpointId(8), device)?;
//! println!("{:#?}, input range {}", host.caps(EndpointId(8)), host.input_range());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # How it works
//!
//! All guest memory is mapped once, at its guest-physical addresses, and stays pinned: stage 2. It counts against the
//! limit of locked memory (`RLIMIT_MEMLOCK`), and once more so does what a guest maps by MAP, for each domain. Endpoints
//! behind one physical IOMMU share a *unit*: a table of stage 2 (the nest parent), and on an SMMUv3 a vIOMMU in which each
//! device has the endpoint's number as its name (vDEVICE), with an event queue.
//!
//! | a stream is bound to | SMMUv3 | VT-d | without nesting |
//! |---|---|---|---|
//! | nothing | stream table entry with V=0 | empty table | empty table |
//! | bypass | entry with Config=4: stage 2 alone | nest parent | table of guest memory |
//! | mappings (MAP) | table of an address space of its own | the same | the same |
//! | a guest's table | entry with Config=5, all PASIDs | nested table, one for each PASID | — |
//!
//! Devices go from one to the other by replacement and are attached to *something* as long as they are endpoints. Whatever
//! fails leaves in force what was; where caches cannot be brought up to date, the endpoint is blocked, until they can.
//! The window of message-signalled interrupts is a reserved region of kind MSI: the kernel maps it for bypass and mappings,
//! a guest's own table has to map it like any other page (Arm; on x86 interrupts are not translated).
//!
//! # Kernels
//!
//! | | from |
//! |---|---|
//! | MAP, UNMAP and bypass by VFIO character devices | 6.6 |
//! | VT-d: guests' tables; for PASIDs | 6.8; 6.15 |
//! | SMMUv3: guests' tables; faults of them | 6.13; 6.15 |
//!
//! An SMMUv3 needs both stages, and either devices that are coherent whatever their attributes say (CANWBS in the
//! firmware's IORT) or S2FWB; the kernel option `ARM_SMMU_V3_IOMMUFD`. VT-d needs scalable mode with nested translation.
//! What is missing is found out device by device: an endpoint then has no [`tables`](viommu_device::host::EndpointCaps).
//!
//! # Not supported
//!
//! - PASID tables on VT-d and page tables for one PASID on an SMMUv3: those would have to be read, or built, here.
//! - AMD and RISC-V guests' tables: the kernel cannot keep their caches up to date, or has nothing of the kind.
//! - Page requests (PRI, stall); dirty tracking; Tegra241 command queues.
//! - Faults of bypass, of mappings, of endpoints that are bound to nothing, and all of VT-d: Linux tells user space of
//!   none of them.
//! - Bypass and mappings for accesses with a PASID on an SMMUv3, and bypass for them on VT-d unless it is bound to the
//!   PASID: they fault.
//! - Mappings that are written and not read, where hardware has no such pages: they can be read, too (D-36).
//! - Devices that share a group; memory that is added to the guest later, other guests' memory (MAP leads to memory
//!   alone); devices' registers as the target of MAP.

pub mod counted;
pub mod engine;
pub mod examine;
pub mod failing;
#[cfg(feature = "fake")]
pub mod fake;
pub mod kernel;
pub mod sys;
pub mod sysfs;
pub mod vendor;

mod endpoint;
mod error;
mod faults;
mod guest_memory;
mod host;
mod invalidate;
mod objects;
mod reserved;
mod setup;
mod shared;
mod space;
#[cfg(test)]
mod tests;
mod unit;

pub use error::{SetupError, Step};
pub use faults::MAX_WAITING_FAULTS;
pub use host::IommufdHost;
pub use setup::Device;
pub use space::Space;
pub use unit::{EVENT_QUEUE_DEPTH, SMMUV3_BATCH};
