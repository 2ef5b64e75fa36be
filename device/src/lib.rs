//! The virtio-iommu device: requests in, replies out, over any host.
//!
//! A guest's driver attaches *endpoints* (devices behind the IOMMU) to *domains* (address spaces) and fills these: by
//! MAP and UNMAP requests, or by handing over its own page tables, which the machine then walks. [`Device`] decides
//! what each request means and whether it is allowed; a [`Host`](host::Host) does what it says. The device owns no
//! queue, thread, clock or file: [`Device::handle`] takes the bytes of one request and writes the bytes of its answer.
//!
//! ```
//! use viommu_device::host::{EndpointCaps, Stream};
//! use viommu_device::soft::{NoMemory, SoftHost};
//! use viommu_device::wire::{Attach, AttachFlags, Map, MapFlags, Request, Tail};
//! use viommu_device::{Device, DeviceConfig, DomainId, EndpointId, Features, Gpa, Iova, Status};
//! use pgtable_formats::Access;
//!
//! let mut host = SoftHost::new(NoMemory);
//! host.add_endpoint(EndpointId(8), EndpointCaps::default())?;
//! let mut device = Device::new(DeviceConfig::default(), host)?;
//! device.accept_features(Features::MAP_UNMAP)?;
//!
//! let mut send = |request: Request| {
//!     let mut tail = [0; Tail::LEN];
//!     let handled = device.handle(&request.encode(), &mut tail);
//!     assert_eq!(handled.used, Tail::LEN, "{:?}", handled.rejection);
//!     Tail::decode(&tail).map(|tail| tail.status)
//! };
//! let (domain, endpoint) = (DomainId(1), EndpointId(8));
//! let attach = Attach { domain, endpoint, flags: AttachFlags::empty() };
//! assert_eq!(send(Request::Attach(attach)), Some(Status::Ok));
//! let map = Map {
//!     domain,
//!     virt_start: Iova(0x1000),
//!     virt_end: Iova(0x1fff),
//!     phys_start: Gpa(0x8000_0000),
//!     flags: MapFlags::READ,
//! };
//! assert_eq!(send(Request::Map(map)), Some(Status::Ok));
//! assert_eq!(send(Request::Map(map)), Some(Status::Inval), "it is mapped already");
//!
//! // The endpoint's DMA.
//! let output = device.host_mut().translate(Stream::untagged(endpoint), Iova(0x1abc), Access::READ, |at| at.output);
//! assert_eq!(output, Ok(Gpa(0x8000_0abc)));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What holds
//! - A request that is rejected has changed nothing. Where it takes several steps at the host and a later one fails,
//!   the earlier ones are undone. Should the host fail on the way back, too, what is recorded is what is in force,
//!   and [`Device::needs_reset`] says so.
//! - When [`Device::handle`] returns, the effect is in force: what was taken away cannot be used any more.
//! - Whatever a guest can make grow is bounded by [`Limits`].
//! - A check that comes from the standard carries its number in a comment (`D-17`).
//!
//! # The handover of tables
//! ATTACH_TABLE binds a table of all PASIDs of an endpoint (SMMUv3 context descriptors, VT-d PASID directory) or a
//! page table for one PASID (VT-d first stage). Page tables of several PASIDs live side by side; a table of all PASIDs
//! replaces them, and the reverse. A page table for PASID 0 serves untagged accesses, too. Format 0 takes one PASID
//! back; the endpoint stays in its domain. In a table domain each endpoint has tables of its own: the domain is what
//! INVALIDATE names. An endpoint that is attached to another domain loses all of them, as by a DETACH (D-22).
//!
//! # Page requests
//! An endpoint that can wait for a page ([`EndpointCaps::page_requests`](host::EndpointCaps)) asks for it, and the
//! driver answers, once for each *group* of requests: with success the access is tried again, else it fails. A request
//! that the host handed out is told to the driver or answered, never lost; while the driver offers no buffer, it waits,
//! and the host keeps what there is no room for. The device answers INVALID itself when what the access waits for is
//! replaced or taken away (ATTACH, DETACH, ATTACH_TABLE, reset, an INVALIDATE of the PASID cache that names the entry of
//! one PASID or of untagged accesses), when the driver takes too long
//! ([`Device::set_time`]), offers a buffer that is too small, or gave up the feature, and when a bound of [`Limits`] is
//! reached. A driver without the feature hears of such an access as of any fault.
//!
//! # Choices that the standard leaves open
//! | situation | here |
//! |---|---|
//! | domain ID outside of `domain_range` | RANGE |
//! | MAP or UNMAP without MAP_UNMAP negotiated | UNSUPP |
//! | MAP of a range that is partly mapped, at a limit | INVAL, as without the limit |
//! | MAP over a reserved region | INVAL |
//! | UNMAP outside of `input_range` | OK: nothing is mapped there |
//! | UNMAP with reserved bytes set | INVAL, nothing is unmapped |
//! | DETACH from a domain that the endpoint is not in | INVAL |
//! | ATTACH to the domain that the endpoint is in | OK, no change |
//! | device-readable part too short for a known type | INVAL; longer: the rest is ignored |
//! | event buffer too small | returned with a used length of 0; a fault is kept, a page request answered INVALID |
//! | PAGE_RESP for a group that the driver was not told of to its end, or that the host has answered itself | NOENT |
//! | INVALIDATE that the host has no resources for | NOMEM |
//! | access with a PASID that no page table is bound for, of an attached endpoint | fault, reason DOMAIN |
//!
//! # Not here
//! The feature BYPASS (superseded by BYPASS_CONFIG), tables of other formats, endpoints that come and
//! go: they are those of the host when the device is made.
#![no_std]
#![forbid(unsafe_code)]
extern crate alloc;

mod binding;
mod config;
mod device;
mod domain;
mod endpoint;
mod error;
mod event;
pub mod host;
mod limits;
pub mod mapping;
pub mod mediated;
mod page_request;
mod request;
mod reserved;
pub mod soft;
mod sorted;
#[cfg(test)]
mod tests;

pub use config::{ConfigError, DeviceConfig};
pub use device::Device;
pub use domain::DomainKind;
pub use error::{ConfigWriteError, FeatureError, Rejection, Resource};
pub use limits::Limits;
pub use page_request::PageRequestCounts;
pub use request::Handled;
pub use viommu_wire as wire;
pub use viommu_wire::{
    DomainId, DomainRange, EndpointId, Event, Features, Gpa, Iova, IovaRange, Pasid, ReservedKind,
    ReservedRegion, Status,
};
