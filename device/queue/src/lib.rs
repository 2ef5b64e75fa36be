//! The virtio-iommu device on split virtqueues and [`vm_memory`].
//!
//! - [`VirtioIommu`] is a [`Device`](viommu_device::Device) with its request and event queue, for a VMM's transport.
//! - [`RequestQueue`] and [`EventQueue`] are the queues alone, over any handler.
//! - [`GuestTables`] gives a [`SoftHost`](viommu_device::soft::SoftHost) the guest's memory.
//! - [`SharedIommu`] and [`StreamIommu`] put any device that is built on vm-memory behind the IOMMU ([`vm_memory::Iommu`]).
//! - [`PagedIommu`] does the same for accesses that wait for the guest to put a page there, with a PASID or without.
//! - [`record`] writes down what guest and devices do with the IOMMU, where that is asked for.
//! - `loopback`, a module behind the feature of that name, puts a guest's driver and the device into one process: for tests,
//!   demonstrations, and a VMM that wants to test itself.
//!
//! ```
//! use viommu_device::host::EndpointCaps;
//! use viommu_device::soft::SoftHost;
//! use viommu_device::{Device, DeviceConfig, EndpointId};
//! use viommu_queue::{GuestTables, REQUEST_QUEUE, VirtioIommu};
//! use virtio_queue::QueueT;
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
//!
//! // The VMM's side.
//! let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0x4000_0000), 0x1_0000)])?;
//! let mut host = SoftHost::new(GuestTables::new(&memory));
//! host.add_endpoint(EndpointId(8), EndpointCaps::default())?;
//! let mut iommu = VirtioIommu::new(Device::new(DeviceConfig::default(), host)?, 256)?;
//!
//! // The driver's side, through the VMM's transport: features, and where the rings are.
//! iommu.accept_features(iommu.offered_features())?;
//! let queue = iommu.queue_mut(REQUEST_QUEUE).ok_or("no queue")?;
//! queue.set_size(16);
//! queue.set_desc_table_address(Some(0x4000_0000), None);
//! queue.set_avail_ring_address(Some(0x4000_1000), None);
//! queue.set_used_ring_address(Some(0x4000_2000), None);
//! queue.set_ready(true);
//!
//! // ATTACH endpoint 8 to domain 1: 20 bytes to read, a tail of 4 bytes to write.
//! let attach: [u8; 20] = [1, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
//! memory.write_slice(&attach, GuestAddress(0x4000_3000))?;
//! memory.write_slice(&[0xff; 4], GuestAddress(0x4000_4000))?;
//! memory.write_obj([0x4000_3000_u64, 20 | 1 << 32 | 1 << 48], GuestAddress(0x4000_0000))?; // NEXT: descriptor 1
//! memory.write_obj([0x4000_4000_u64, 4 | 2 << 32], GuestAddress(0x4000_0010))?; // WRITE
//! memory.write_obj(1_u16, GuestAddress(0x4000_1002))?; // one head, descriptor 0
//!
//! let notify = iommu.kick_requests(&memory)?;
//! assert!(notify.requests);
//! assert_eq!(memory.read_obj::<u32>(GuestAddress(0x4000_4000))?, 0); // status OK
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What a hostile ring can do
//! A chain that breaks the rules is named in the log ([`ChainError`]), given back with used length 0, and not shown to the
//! device; a head that is no descriptor is skipped. A ring that cannot be used at all is an error of the kick
//! ([`QueueError`]) that takes nothing. Work per kick is bounded by [`MAX_PASSES`], the queue size and
//! [`MAX_CHAIN_LENGTH`]. Requests are fetched once; what of a request is behind [`READABLE_LIMIT`] is not.
//!
//! # Not here
//! Packed virtqueues; a descriptor table, ring or indirect table that lies across memory regions (buffers may);
//! queues that are themselves behind an IOMMU (`ACCESS_PLATFORM`); the transport; threads and event loops.
#![forbid(unsafe_code)]

mod chain;
mod error;
mod event_queue;
mod guest_tables;
mod kick;
#[cfg(feature = "loopback")]
pub mod loopback;
mod paged;
pub mod record;
mod request_queue;
mod ring;
mod sync;
mod translated;
mod view;
mod virtio_iommu;

pub use chain::MAX_CHAIN_LENGTH;
pub use error::{ChainError, QueueError, RingPart};
pub use event_queue::{EVENT_LIMIT, EventQueue};
pub use guest_tables::GuestTables;
pub use kick::{Kick, MAX_PASSES};
pub use paged::{Attempt, DmaError, Observe, PagedIommu};
pub use request_queue::{READABLE_LIMIT, RequestQueue};
pub use translated::{Exclusive, GIVE_WAY, MAX_ACCESS, Pinned, SharedIommu, StreamIommu, Translate};
pub use virtio_iommu::{DEVICE_ID, EVENT_QUEUE, Notify, REQUEST_QUEUE, VirtioIommu};
