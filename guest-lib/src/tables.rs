//! The guest's own tables: page tables, and the tables that give each PASID one.
//!
//! An [`AddressSpace`] is a page table; a [`PasidTable`] says which address space each PASID of an endpoint uses, and
//! binding it hands the lot to the hardware. Formats come from what PROBE says of the endpoint: the caller's code is
//! the same whoever made the hardware.
//!
//! # What has to be invalidated, and who does it
//!
//! | change | INVALIDATE | by |
//! |---|---|---|
//! | a mapping is added | none: absence is not cached | – |
//! | a mapping is removed | ADDRESS, TLB; LEAF where no table went with it | [`AddressSpace::unmap`] |
//! | a mapping leads elsewhere | the same, before the new one is written | [`AddressSpace::remap`] |
//! | a mapping allows less, or more | ADDRESS, TLB, LEAF: what it allowed is cached with it | [`AddressSpace::protect`] |
//! | everything goes for good | PASID, TLB | [`AddressSpace::close`] |
//! | a PASID gets an address space | PASID, PASID cache: entries are cached in any state | [`PasidTable::bind`] |
//! | a PASID loses it | PASID, PASID cache and TLB | [`PasidTable::unbind`] |
//!
//! Tables that an unmap leaves empty stay for the next mapping, unless all that they translate was unmapped, or
//! [`EmptyTables`] says otherwise. Where they go, the allocator gets them only after their invalidation succeeded: until
//! then the hardware may still read them.

mod change;
mod choice;
mod lent;
mod pasid;
mod protect;
mod root;
mod space;
mod windows;

use pgtable_formats::NotMemory;
use pgtable_formats::context::BuildError;
use pgtable_formats::edit::EditError;
use viommu_wire::{EndpointId, IovaRange, Pasid};

use crate::RequestError;

pub use pasid::{PasidTable, Style, TableOptions};
pub use space::{AddressSpace, EmptyTables, SpaceOptions, Stale};

/// Why tables were not made or changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// PROBE names no hardware that walks the guest's tables.
    #[error("the device takes no tables for endpoint {0}")]
    NoHardware(EndpointId),
    /// ATTACH_TABLE takes no format that this library makes in the style asked for.
    #[error("the device takes no table of a known format for endpoint {0}")]
    Format(EndpointId),
    /// The hardware's capabilities do not allow what was asked.
    #[error("the hardware's capabilities do not allow such a table")]
    Unsupported,
    /// The address space was made for hardware that differs too much from this endpoint's.
    #[error("the address space does not fit the hardware of endpoint {0}")]
    Mismatch(EndpointId),
    /// Every address-space tag is in use.
    #[error("no address-space tag is left")]
    NoTag,
    /// Every PASID is in use.
    #[error("no PASID is left")]
    NoPasid,
    /// The PASID has an address space already, or the address space still has PASIDs.
    #[error("still in use")]
    InUse,
    /// The PASID does not use this address space.
    #[error("PASID {0:?} does not use this address space")]
    NotBound(Option<Pasid>),
    /// The address space was closed: nothing is mapped in it any more.
    #[error("the address space was closed")]
    Closed,
    /// These addresses are where an endpoint's interrupts go, and cannot lead anywhere else.
    #[error("{0} is where interrupts go")]
    MsiWindow(IovaRange),
    /// There is no memory for a table.
    #[error("no memory for a table")]
    NoMemory,
    /// A page table was not changed as asked.
    #[error(transparent)]
    Edit(#[from] EditError),
    /// A PASID table was not changed as asked.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// A request failed.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// A table does not lie in memory.
    #[error(transparent)]
    NotMemory(#[from] NotMemory),
}
