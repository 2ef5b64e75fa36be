//! Guest and device in one process: a driver of [`viommu_guest`] on one side, the device with its queues on the other, and
//! real split virtqueues in memory that both have. For tests, demonstrations, and a VMM that wants to test itself.
//!
//! - [`Memory`]: guest memory as driver, queues and walkers of tables have it.
//! - [`Alloc`]: the guest's memory management; it counts what is out.
//! - [`Machine`]: the VMM's side. Memory, the device behind its queues, and the DMA of emulated devices.
//! - [`Transport`]: the driver's way to a [`Machine`], or to any other [`Port`].
//!
//! ```
//! use pgtable_formats::Access;
//! use viommu_device::host::{EndpointCaps, Stream};
//! use viommu_device::soft::SoftHost;
//! use viommu_device::wire::{Gpa, Iova, IovaRange, MapFlags};
//! use viommu_device::{Device, DeviceConfig, EndpointId};
//! use viommu_guest::hal::Parts;
//! use viommu_guest::{Driver, DriverOptions, MappedDomain, Mapping};
//! use viommu_queue::loopback::{Alloc, Machine, Memory, Transport};
//!
//! // The VMM's side, with the host that is to be tested.
//! let memory = Memory::new(16 << 20);
//! let mut host = SoftHost::new(memory.tables().clone());
//! host.add_endpoint(EndpointId(8), EndpointCaps::default())?;
//! let machine = Machine::new(memory.clone(), Device::new(DeviceConfig::default(), host)?, 256)?;
//!
//! // The guest's side.
//! let platform = Parts { alloc: Alloc::new(&memory), memory };
//! let mut driver = Driver::new(platform, Transport::new(machine.clone()), DriverOptions::default())?;
//! let endpoint = driver.probe(EndpointId(8))?;
//! let mut domain = MappedDomain::new(&mut driver)?;
//! domain.attach(&mut driver, &endpoint)?;
//! let range = IovaRange::from_length(Iova(0x1000), 0x1000).ok_or("empty")?;
//! domain.map(&mut driver, Mapping { range, target: Gpa(0x4000_0000), flags: MapFlags::READ })?;
//!
//! let stream = Stream::untagged(EndpointId(8));
//! assert_eq!(machine.leads(stream, Iova(0x1234), Access::READ), Ok(Gpa(0x4000_0234)));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Panics
//! What a test cannot go on with panics, and says so: memory that cannot be mapped, memory given back that was not out, a
//! notification before DRIVER_OK.
//!
//! # Not here
//! Interrupts: the driver looks for itself. Threads: the device works on the thread that notifies it.

mod alloc;
mod machine;
mod memory;
mod setup;
mod transport;

pub use alloc::Alloc;
pub use machine::Machine;
pub use memory::Memory;
pub use setup::place_queue;
pub use transport::{Port, Transport};
