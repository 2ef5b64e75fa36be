//! The guest's side of virtio-iommu: a driver that a kernel can take, and the tables that SVA needs.
//!
//! - [`hal`]: what the platform lends, as traits: memory, an allocator, a transport.
//! - [`Driver`]: brings the device up, sends requests (one by one, or many with one notification), hands out events.
//! - [`MappedDomain`], [`BypassDomain`]: address spaces that the device keeps, by MAP and UNMAP.
//! - [`tables`]: the guest's own tables. An [`AddressSpace`](tables::AddressSpace) is a page table in guest memory; a
//!   [`PasidTable`](tables::PasidTable) gives one to each PASID of an endpoint and is handed to the hardware by
//!   ATTACH_TABLE. Whether that hardware is an SMMUv3 or a VT-d unit, and whether guest or device keeps the table of
//!   PASIDs, is read from PROBE; the caller's code is the same.
//! - [`sva`]: processes that share their addresses with devices, bound and unbound in order, and page requests that come
//!   to a handler: what a kernel's SVA needs. It stands on [`tables`]; its page has an example.
//! - [`queue`]: the virtqueue below, for those who drive another device with it.
//!
//! ```
//! use pgtable_formats::format::Attrs;
//! use viommu_guest::hal::{Platform, Transport};
//! use viommu_guest::tables::{AddressSpace, PasidTable, SpaceOptions, TableOptions};
//! use viommu_guest::{Driver, DriverOptions};
//! use viommu_wire::{EndpointId, Gpa, Iova, IovaRange};
//!
//! /// Lets a device use tables of the guest, without page requests.
//! fn share<P: Platform, T: Transport>(platform: P, transport: T) -> Result<(), Box<dyn std::error::Error>> {
//!     let mut driver = Driver::new(platform, transport, DriverOptions::default())?;
//!     let endpoint = driver.probe(EndpointId(8))?;
//!     let domain = driver.new_domain_id().ok_or("no domain")?;
//!
//!     // Once for each endpoint: a table for all its PASIDs, handed to the hardware.
//!     let mut pasids = PasidTable::new(&mut driver, &endpoint, domain, TableOptions::default())?;
//!     pasids.attach(&mut driver)?;
//!
//!     // Once for each process: a page table, and the PASID that the device is to use.
//!     let mut space = AddressSpace::new(&mut driver, &endpoint, SpaceOptions::default())?;
//!     let pasid = pasids.bind(&mut driver, &mut space)?;
//!
//!     // Mapping is a store to memory; only unmapping talks to the device.
//!     let buffer = IovaRange::from_length(Iova(0x7f00_0000_0000), 0x20_0000).ok_or("empty")?;
//!     space.map(&mut driver, buffer, Gpa(0x8000_0000), Attrs::READ_WRITE)?;
//!     // ... the device works on the buffer with `pasid` ...
//!     space.unmap(&mut driver, buffer)?;
//!
//!     pasids.unbind(&mut driver, Some(pasid), &mut space)?;
//!     driver.handle_events(|event| println!("{event:?}"))?;
//!     Ok(())
//! }
//! ```
//!
//! # What is relied on
//! A driver believes its device no further than it must: links, lengths and identifiers that the device writes are
//! checked, a device that does not answer is given up when the [`Transport`](hal::Transport) says so, and late answers
//! are not mistaken for others. A device can always refuse, lie in a status, or not do what it answered: what it
//! translates is in its hands.
//!
//! # Not supported
//! Packed virtqueues; AMD and RISC-V tables; 52-bit and 57-bit address spaces, the upper half of an Arm address space,
//! big-endian SMMUs; turning on ATS or PRI in the endpoint. Page requests of untagged DMA, which are answered INVALID;
//! execution and privileged accesses by devices behind VT-d; copy-on-write and paging out: [`sva::DemandPaged`] makes
//! pages and gives them back, nothing else. Sharing the processor's own page tables: an address space is made of tables
//! of its own, so a kernel repeats its changes there. Addresses are the caller's to choose: there is no allocator of I/O
//! virtual addresses. Access from several threads at once is the caller's to arrange: every method takes `&mut`.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod domain;
mod driver;
mod fault;
pub mod hal;
mod ids;
mod probe;
pub mod queue;
mod request;
mod requester;
pub mod sva;
pub mod tables;

pub use domain::{BypassDomain, DomainError, MappedDomain, Mapping};
pub use driver::{Driver, DriverOptions, InitError, MAX_PROBE_SIZE, NoBypass};
pub use fault::{EventCounters, MAX_KEPT_EVENTS};
pub use ids::IdSpace;
pub use probe::{Endpoint, EndpointProperties, Hardware};
pub use request::{Refusal, RequestError};
pub use requester::Counters;

#[cfg(test)]
mod tests;
