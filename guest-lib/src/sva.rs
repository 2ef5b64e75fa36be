//! Shared virtual addresses: a process and a device use the same pointers.
//!
//! An [`Sva`] is one endpoint that takes processes. [`bind`](Sva::bind) gives it a PASID for a process of [`Processes`],
//! [`unbind`](Sva::unbind) takes it back. The same code serves every vendor's hardware, and both ways to hand tables over:
//! the first format in the device's list that this library makes is taken, which is the native one.
//!
//! Where the endpoint has [page requests](Sva::has_page_requests), what it uses need not be mapped before: an access
//! waits while the [`FaultHandler`] of its process makes the page and answers. [`DemandPaged`] is such a handler, for
//! memory that comes from the platform's allocator. Where it has none, as behind an SMMUv3 of a host that cannot hand
//! stalls on, the memory of a process has to be there before: [`DemandPaged::pin`] makes it, and
//! [`bind`](Sva::bind) refuses what is not there instead of letting the endpoint fault.
//!
//! ```
//! use pgtable_formats::format::Attrs;
//! use viommu_guest::hal::{Platform, Transport};
//! use viommu_guest::sva::{Area, DemandPaged, Processes, Sva, SvaOptions};
//! use viommu_guest::tables::{AddressSpace, SpaceOptions};
//! use viommu_guest::{Driver, Endpoint};
//! use viommu_wire::{Iova, IovaRange};
//!
//! /// One process, one device, and memory that is there once somebody asks for it.
//! fn share<P: Platform, T: Transport>(
//!     driver: &mut Driver<P, T>,
//!     endpoint: &Endpoint,
//! ) -> Result<(), Box<dyn std::error::Error>> {
//!     let mut processes = Processes::new();
//!     let mut sva = Sva::new(driver, endpoint, SvaOptions::default())?;
//!
//!     let heap = IovaRange::from_length(Iova(0x7f00_0000_0000), 1 << 30).ok_or("empty")?;
//!     let mut space = AddressSpace::new(driver, endpoint, SpaceOptions::default())?;
//!     let mut memory = DemandPaged::new(&space, 1 << 18);
//!     memory.add_area(Area { range: heap, attrs: Attrs::READ_WRITE })?;
//!     if !sva.has_page_requests() {
//!         memory.pin(driver, &mut space)?;
//!     }
//!     let process = processes.add(space, memory);
//!     let handle = sva.bind(driver, &mut processes, process)?;
//!
//!     // ... the device works with `handle.pasid()`; each interrupt of the event queue does this:
//!     driver.handle_events(|event| {
//!         if !sva.receive(&event) {
//!             println!("{event:?}");
//!         }
//!     })?;
//!     sva.serve(driver, &mut processes)?;
//!
//!     // The process ends while the device still works: its accesses fault from here on.
//!     processes.exit(driver, process)?;
//!     // The device was told to stop, and has.
//!     sva.unbind(driver, &mut processes, handle).map_err(|(_, error)| error)?;
//!     processes.remove(driver, process)?.release(driver);
//!     sva.release(driver).map_err(|(_, error)| error)?;
//!     Ok(())
//! }
//! ```
//!
//! # The order of things
//! What [`unbind`](Sva::unbind) does, in the order in which Linux takes a process from a device:
//!
//! 1. The caller has stopped the device: no new work names the PASID.
//! 2. The binding is marked. From here on each page request of the PASID is answered INVALID, and no handler is asked.
//! 3. The entry of the PASID is cleared (or the page table unbound, where the device keeps the entries).
//! 4. PASID cache and TLB of the PASID are invalidated. When that has returned, no access uses the process's memory, and
//!    the device has answered INVALID every page request of the PASID, those included whose group is not whole. It tells
//!    of none of them any more.
//! 5. What it has told before is taken out of the event queue and forgotten, and so are the groups that gather, that wait
//!    for their handler, or that a handler has kept for later: nobody waits for an answer to them. Events of others are
//!    kept for [`Driver::handle_events`](crate::Driver::handle_events).
//! 6. Only then another process may get the PASID: none of its groups is taken for one of the process before.
//!
//! Linux answers in step 5 what it finds. Here the device has done so, and tells of it by NOENT: no request is needed.
//!
//! A step that fails leaves the PASID taken and the binding marked: another attempt goes on where the first one stopped.
//!
//! When a process ends while it is bound, [`Processes::exit`] goes first: the page table is emptied for good and
//! invalidated at every endpoint, so that all DMA faults although the PASID is still there. Then each endpoint unbinds,
//! as its driver gets to it.
//!
//! # Invalidation after a fault
//! A page that was not mapped needs none once it is: neither Arm nor x86 hardware caches the absence of a mapping. A page
//! whose mapping did not allow the access does: the old permission may be cached.
//! [`AddressSpace::protect`](crate::tables::AddressSpace::protect) sees to it.

mod endpoint;
mod error;
mod groups;
mod paging;
mod process;
mod serve;

pub use endpoint::{Handle, Sva, SvaOptions};
pub use error::{ExitError, SvaError};
pub use groups::{GroupCounters, GroupLimits, Token};
pub use paging::{Area, DemandPaged, PagingCounters, PagingError};
pub use process::{Answer, FaultHandler, PageGroup, Process, ProcessId, Processes, Unpaged};
pub use serve::ServeCounters;
