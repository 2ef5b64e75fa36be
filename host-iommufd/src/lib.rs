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
//! Devices go from one to the other by replacement and are attached to *something* as long as they are endpoints; but a
//! guest's table with a fault queue is detached first where the next one lacks it, see below. Whatever fails leaves in
//! force what was, or, where the kernel does not attach that again either, an endpoint that reaches nothing; where caches cannot be brought up to date, the endpoint is blocked, until they can.
//! The window of message-signalled interrupts is a reserved region of kind MSI: the kernel maps it for bypass and mappings,
//! a guest's own table has to map it like any other page (Arm; on x86 interrupts are not translated).
//!
//! # Page requests
//!
//! Where hardware and kernel let accesses wait for a page, [`EndpointCaps::page_requests`] is true: this is tried when the
//! endpoint is added, by attaching a table that leads nowhere. The kernel then queues what the endpoint asks for, and the
//! device core takes it from there: [`Host::next_page_request`] reads the queue, in turns with those of other endpoints,
//! and [`Host::respond`] answers. A VMM waits on [`queue_fds`](IommufdHost::queue_fds), and on the driver's event buffers,
//! and moves events from one to the other:
//!
//! ```no_run
//! use std::os::fd::BorrowedFd;
//!
//! use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
//! use viommu_device::Device;
//! use viommu_host_iommufd::IommufdHost;
//! use viommu_host_iommufd::kernel::Iommufd;
//!
//! /// One turn of a VMM's loop. `now` is any clock in nanoseconds, `next_buffer` the next buffer of the event queue.
//! fn serve<K: Iommufd>(
//!     device: &mut Device<IommufdHost<K>>,
//!     files: &[BorrowedFd<'_>],
//!     now: u64,
//!     mut next_buffer: impl FnMut() -> Option<[u8; 48]>,
//! ) -> nix::Result<()> {
//!     let mut files: Vec<_> = files.iter().map(|file| PollFd::new(*file, PollFlags::POLLIN)).collect();
//!     poll(&mut files, PollTimeout::from(10_u8))?;
//!     // What the driver does not answer in time is answered for it.
//!     device.set_time(now);
//!     while device.event_pending() {
//!         // Without a buffer nothing is taken: what there is stays in the kernel, and the accesses wait.
//!         let Some(mut buffer) = next_buffer() else { break };
//!         let _written = device.fill_event(&mut buffer);
//!     }
//!     Ok(())
//! }
//! ```
//!
//! While the driver gives no buffers the files stay readable; a loop that shall sleep then waits for edges (`EPOLLET`)
//! and takes its turn when buffers come and after each PAGE_RESP. An endpoint that nobody answers fills its own queue
//! ([`MAX_OPEN_GROUPS_PER_ENDPOINT`]), which then is not read any more, but to end a stream of it
//! ([`MAX_OUTSTANDING_PAGE_REQUESTS`]). A VMM that does not move page requests says that
//! its devices have none ([`Device::pri`], [`Device::may_stall`]).
//!
//! | | page requests |
//! |---|---|
//! | VT-d (PRS), a device with ATS and PRI | yes, from Linux 6.11; of PASIDs, from 6.15 |
//! | a virtual function whose physical one has PRI | no: Linux attaches it to no such table |
//! | SMMUv3, a platform device that may stall | yes, where its stall model is not "terminate" and Linux serves stalls (`ARM_SMMU_V3_SVA`, one StreamID); the guest's context says whether it stalls |
//! | SMMUv3, PCI Express | no: Linux has no PRI on Arm, and such transactions must not stall |
//! | bypass, mappings | no, with any hardware: Linux answers INVALID |
//!
//! The kernel numbers no answer but yes and no: FAILURE becomes INVALID. Private data of VT-d is not passed on. What ends
//! without an answer of the driver (another table bound, the PASID cache invalidated, the endpoint removed) is answered
//! INVALID by the kernel, or here: when a table is replaced by one with the same queue, and when it is detached, every
//! kernel answers. When one *without* the queue replaces it, Linux from 6.15 on looks in the wrong queue (7.3.4 does
//! not any more): what waited is never answered, and is read later through memory that is freed. As no one can
//! tell those kernels apart, such a table is detached before the next one is attached; in between, the stream reaches
//! nothing. What the hardware has queued and the kernel has not taken yet is drained by the kernel
//! alone, where it does so.
//!
//! [`EndpointCaps::page_requests`]: viommu_device::host::EndpointCaps::page_requests
//! [`Host::next_page_request`]: viommu_device::host::Host::next_page_request
//! [`Host::respond`]: viommu_device::host::Host::respond
//!
//! # Kernels
//!
//! | | from |
//! |---|---|
//! | MAP, UNMAP and bypass by VFIO character devices | 6.6 |
//! | VT-d: guests' tables; page requests; for PASIDs | 6.8; 6.11; 6.15 |
//! | SMMUv3: guests' tables; faults of them | 6.13; 6.15 |
//!
//! An SMMUv3 needs both stages, and either devices that are coherent whatever their attributes say (CANWBS in the
//! firmware's IORT) or S2FWB; the kernel option `ARM_SMMU_V3_IOMMUFD`. VT-d needs scalable mode with nested translation.
//! What is missing is found out device by device: an endpoint then has no [`tables`](viommu_device::host::EndpointCaps).
//!
//! # Not supported
//!
//! - PASID tables on VT-d and page tables for one PASID on an SMMUv3: those would have to be read, or built,
//!   which `viommu_device::mediated` does over this host.
//! - AMD and RISC-V guests' tables: the kernel cannot keep their caches up to date, or has nothing of the kind.
//! - Dirty tracking; Tegra241 command queues.
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
mod page_requests;
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
pub use page_requests::{MAX_OPEN_GROUPS_PER_ENDPOINT, MAX_OUTSTANDING_PAGE_REQUESTS};
pub use setup::Device;
pub use space::Space;
pub use unit::{EVENT_QUEUE_DEPTH, SMMUV3_BATCH};
