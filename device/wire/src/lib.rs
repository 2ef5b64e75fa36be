//! virtio-iommu on the wire: every layout, and the meaning it decodes to.
//!
//! Each structure exists twice. A *layout* ([`layout`]) is the bytes as the specification lists them. A *meaning*
//! ([`Request`], [`Property`], [`Event`], [`Config`]) holds legal values only: reserved bytes, unknown flags and
//! lengths were judged when it was decoded. The device decodes requests and encodes events; the guest does the reverse.
//!
//! Numbers come from virtio 1.4, chapter "IOMMU Device" (the base), from the 2023 ATTACH_TABLE proposal (the
//! handover), and a few are our own; [`numbers`] marks which is which.
//!
//! ```
//! use viommu_wire::{Attach, AttachFlags, DomainId, EndpointId, Request};
//!
//! let attach = Attach { domain: DomainId(1), endpoint: EndpointId(8), flags: AttachFlags::empty() };
//! let bytes = Request::Attach(attach).encode();
//! assert_eq!(bytes.as_ref(), [1, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
//! assert_eq!(Request::decode(&bytes), Ok(Request::Attach(attach)));
//! ```
//!
//! # Not here
//! Drafts of the extension older than the 2023 proposal; the topology descriptions (they are ACPI's and the device
//! tree's); any state: whether a request is *allowed* is the device's to say.
#![no_std]
#![forbid(unsafe_code)]

mod config;
mod error;
mod event;
mod feature;
mod id;
mod invalidate;
mod kind;
pub mod layout;
pub mod numbers;
mod page_response;
mod probe;
mod request;
mod status;
mod table;

pub use config::{Config, DomainRange};
pub use error::DecodeError;
pub use event::{AccessFlags, Event, FaultEvent, FaultReason, PageRequest};
pub use feature::Features;
pub use id::{DomainId, EndpointId};
pub use invalidate::{Caches, Invalidate, InvalidateScope};
pub use kind::RequestType;
pub use page_response::{PageResponse, PageResponseCode};
pub use pgtable_formats::{Gpa, Iova, IovaRange, Pasid};
pub use probe::{
    PageRequestFlags, Properties, Property, PropertyError, ReservedKind, ReservedRegion, TableFormats,
};
pub use request::{Attach, AttachFlags, AttachTable, Detach, Encoded, Map, MapFlags, Probe, Request, Unmap};
pub use status::{Status, Tail};
pub use table::{ArmPageTable, TableDescriptor, VtdPageTable, VtdPasidTable};
