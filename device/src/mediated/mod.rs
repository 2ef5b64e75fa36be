//! Both ways to hand over a guest's tables, on a machine that has one.
//!
//! Hardware walks one kind of table as it is: an SMMUv3 the table of context descriptors that the guest fills, and a
//! VT-d unit, through Linux, a page table for each PASID. [`Mediated`] is a [`Host`] over such a host that offers both
//! kinds for every endpoint that has tables. What the host takes as it is goes through; the other kind is made of it.
//!
//! ```
//! use pgtable_formats::context::vtd;
//! use viommu_device::host::{EndpointCaps, Host, TableCaps, TableKinds};
//! use viommu_device::mediated::{Mediated, MediationLimits};
//! use viommu_device::soft::{NoMemory, SoftHost};
//! use viommu_wire::EndpointId;
//!
//! let vtd = vtd::Caps::from_registers(vtd::CapRegisters::SOFTWARE);
//! let page_tables = TableKinds::PAGE_TABLE;
//! let mut host = SoftHost::new(NoMemory);
//! let caps = EndpointCaps {
//!     tables: Some(TableCaps::Vtd(vtd)),
//!     kinds: page_tables,
//!     native: page_tables,
//!     ..EndpointCaps::default()
//! };
//! host.add_endpoint(EndpointId(8), caps)?;
//!
//! let host = Mediated::new(host, NoMemory, None, MediationLimits::DEFAULT)?;
//! let caps = host.caps(EndpointId(8)).ok_or("no endpoint")?;
//! assert_eq!((caps.kinds, caps.native), (TableKinds::all(), page_tables));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Page tables on an SMMUv3
//! The endpoint gets a table of context descriptors of the device's own, in a [`Window`] of guest-physical space that
//! the VMM grants. The first page table that is bound makes it; from then on a bind writes a descriptor, and an unbind
//! clears one, with the invalidation that the architecture asks for. Level 1 is made once; level 2, of 64 descriptors,
//! where PASIDs are in use. Empty level-2 tables, and tables that wait to be used again, go when the window is full.
//!
//! - The window is a reserved region of these endpoints, no table of a guest may lie in it, and no mapping lead there.
//! - What the window holds is known here: it is written, never read.
//! - PASID 0 is untagged DMA (S1DSS = 2); DMA that is tagged with PASID 0 faults, as the architecture has it.
//! - A page table that replaces another does so by way of none: accesses in between fault.
//! - Where what is cached of a PASID cannot be dropped, the endpoint is blocked until everything can; the request fails.
//! - A machine in software walks through a [`ReadOnlyWindow`], and has the window among its endpoints' reserved regions.
//! - Beside page tables untagged DMA has a page table or nothing: bypass and mappings are refused meanwhile.
//!
//! # PASID tables on VT-d
//! The guest's directory and tables are read when the table is bound, and again with each invalidation of the PASID
//! cache: of the whole endpoint, or one entry. Each entry is read once, judged as hardware does, and compared with what
//! is bound; only what differs is bound anew. Absent directory entries cost one word, absent entries one word each, of
//! as many tables as [`MediationLimits`] let be read.
//!
//! - To bind a table is all or nothing. A reading that fails part-way leaves each PASID as it was or as the table has
//!   it now.
//! - An entry that is not legal, or whose page table is not in memory, leaves its PASID bound to nothing. A machine
//!   that reports such accesses makes them faults of the reason that the live entry gives.
//! - FPD is heeded as the live table has it, since the machine does not see it.
//! - Pass-through entries are bound to bypass; where the machine has none for PASIDs, to nothing.
//! - The entry of untagged requests (RID_PASID) serves these, and the PASID of its number too.
//! - No PASID is bound on its own beside a table.
//!
//! # Not here
//! - ATS for page tables on an SMMUv3: the descriptor of ATTACH_TABLE cannot ask for it.
//! - Endpoints that come and go: they are those of the host when it is wrapped.
//! - A pass-through entry for untagged requests over a host whose bypass serves PASIDs as well. The software host's does
//!   (it takes PASID tables itself, and needs no mediation): PASIDs without an entry are then bypassed instead of
//!   faulting. Linux's does not.
//! - A PASID 0 apart from untagged requests where RID_PASID is another: without an entry of its own, what is tagged
//!   with 0 goes where untagged requests go.

mod bind;
mod descriptors;
mod entries;
mod faults;
mod host;
mod invalidate;
mod limits;
mod read_only;
mod reading;
#[cfg(test)]
mod tests;
mod window;

pub use limits::MediationLimits;
pub use read_only::ReadOnlyWindow;
pub use window::Window;

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

use pgtable_formats::Pasid;
use pgtable_formats::context::{Canonical, smmuv3, vtd};
use viommu_wire::{Caches, EndpointId};

use crate::host::{EndpointCaps, Host, Invalidation, Scope, Stream, TableCaps, TableKinds};
use crate::soft::Stage2;
use descriptors::Descriptors;
use entries::{Entries, Lost};
use window::Room;

/// A host that offers both kinds of tables, over one that may take one. `M` is the guest's memory, the window included.
/// See the [module](self).
#[derive(Debug)]
pub struct Mediated<H: Host, M> {
    ports: BTreeMap<EndpointId, Port<H::Space>>,
    identity: Option<H::Space>,
    host: H,
    memory: M,
    window: Option<Window>,
    room: Option<Room>,
    limits: MediationLimits,
    /// Entries of PASID tables that are bound.
    entries: usize,
    /// Invalidations of one call, with the place in it that each is of; empty in between, kept for their memory.
    batch: Vec<(usize, Invalidation)>,
    sent: Vec<Invalidation>,
}

/// Why a window cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WindowError {
    /// Part of it is not memory.
    #[error("the window is not memory")]
    NotMemory,
    /// An MSI region of an endpoint lies in it.
    #[error("the window holds an MSI region of endpoint {0}")]
    Msi(EndpointId),
}

/// What mediation holds for an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Page tables that are bound by a table of the device's own.
    pub page_tables: usize,
    /// Bytes of the window.
    pub window_bytes: u64,
    /// Entries of the guest's PASID table that are bound.
    pub entries: usize,
    /// How many of these the machine could not do, so that accesses fault.
    pub refused: usize,
}

/// A space of a [`Mediated`] host.
#[derive(Debug)]
pub struct Space<S>(Kind<S>);

#[derive(Debug)]
enum Kind<S> {
    /// Of the host below.
    Inner(S),
    /// Page tables of one PASID of an endpoint behind an SMMUv3.
    PageTable(EndpointId, smmuv3::PageTable),
    /// A VT-d PASID table.
    PasidTable(EndpointId, vtd::PasidTable),
}

#[derive(Debug)]
struct Port<S> {
    caps: EndpointCaps,
    way: Way<S>,
    /// The untagged stream is bound to a space of the host below.
    is_untagged: bool,
}

/// How the kind of table that the host does not take is made.
#[derive(Debug)]
enum Way<S> {
    /// Not at all.
    None,
    /// By a table of context descriptors, made when it is first needed.
    Descriptors(smmuv3::Caps, Option<Descriptors<S>>),
    /// By page tables of single PASIDs.
    Entries {
        bound: Option<Entries<S>>,
        /// PASIDs that are bound on their own.
        own: BTreeSet<Pasid>,
        /// What is to be taken from the machine before anything else is bound.
        lost: Vec<Lost<S>>,
    },
}

impl<H: Host, M: Stage2> Mediated<H, M> {
    /// Wraps `host`, whose endpoints are there and have no stream bound. Without a window, page tables on an SMMUv3 are
    /// left out.
    ///
    /// # Errors
    /// [`WindowError`].
    pub fn new(
        host: H,
        memory: M,
        window: Option<Window>,
        limits: MediationLimits,
    ) -> Result<Self, WindowError> {
        if window.is_some_and(|window| !memory.contains(window.first(), window.last())) {
            return Err(WindowError::NotMemory);
        }
        let mut ports = BTreeMap::new();
        for endpoint in host.endpoints() {
            if let Some(caps) = host.caps(endpoint) {
                let port = Port::new(caps, window).ok_or(WindowError::Msi(endpoint))?;
                ports.insert(endpoint, port);
            }
        }
        Ok(Self {
            ports,
            identity: None,
            host,
            memory,
            window,
            room: window.map(Room::new),
            limits,
            entries: 0,
            batch: Vec::new(),
            sent: Vec::new(),
        })
    }
}

impl<H: Host, M> Mediated<H, M> {
    /// The host below.
    pub const fn host(&self) -> &H {
        &self.host
    }

    /// The host below. To bind its streams behind this one's back is a mistake.
    pub const fn host_mut(&mut self) -> &mut H {
        &mut self.host
    }

    /// The guest's memory.
    pub const fn memory(&self) -> &M {
        &self.memory
    }

    /// What is held for `endpoint`; `None` where there is no such endpoint.
    pub fn held(&self, endpoint: EndpointId) -> Option<Held> {
        let held = match &self.ports.get(&endpoint)?.way {
            Way::Descriptors(_, Some(made)) => {
                Held { page_tables: made.len(), window_bytes: made.bytes(), ..Held::default() }
            }
            Way::Entries { bound: Some(bound), .. } => {
                Held { entries: bound.len(), refused: bound.refused(), ..Held::default() }
            }
            Way::None | Way::Descriptors(_, None) | Way::Entries { bound: None, .. } => Held::default(),
        };
        Some(held)
    }

    /// Bytes of the window that nothing uses.
    pub fn window_left(&self) -> u64 {
        self.room.as_ref().map_or(0, Room::left)
    }
}

impl<H: Host, M: Stage2> Mediated<H, M> {
    /// Gives back what waits to be used again, and the host below. Streams that are bound to what was made here are
    /// unbound.
    pub fn into_inner(mut self) -> H {
        let endpoints: Vec<EndpointId> = self.ports.keys().copied().collect();
        for &endpoint in &endpoints {
            let streams: Vec<Option<Pasid>> = match self.ports.get(&endpoint).map(|port| &port.way) {
                Some(Way::Descriptors(_, Some(made))) => {
                    made.pasids().map(|pasid| Some(pasid).filter(|pasid| *pasid != Pasid::ZERO)).collect()
                }
                Some(Way::Entries { bound, lost, .. }) if bound.is_some() || !lost.is_empty() => {
                    alloc::vec![None]
                }
                _ => Vec::new(),
            };
            for pasid in streams {
                // What is still bound goes with the host.
                let _ = Host::bind(&mut self, Stream { endpoint, pasid }, None);
            }
        }
        self.reclaim();
        if let Some(identity) = self.identity.take() {
            self.host.destroy(identity);
        }
        self.host
    }
}

impl<S> Port<S> {
    /// `None` where an MSI region lies in the window.
    fn new(caps: &EndpointCaps, window: Option<Window>) -> Option<Self> {
        let mut caps = caps.clone();
        let all = TableKinds::all();
        let way = match (&caps.tables, window) {
            (Some(TableCaps::Smmuv3(smmu)), Some(window)) if caps.kinds == TableKinds::PASID_TABLE => {
                let way = Way::Descriptors(*smmu, None);
                let reserved = window.reserved(&caps.reserved)?;
                caps.reserved.extend(reserved);
                caps.reserved.sort_unstable_by_key(|region| region.range.start());
                (caps.native, caps.kinds) = (caps.kinds, all);
                way
            }
            (Some(TableCaps::Vtd(_)), _) if caps.kinds == TableKinds::PAGE_TABLE => {
                (caps.native, caps.kinds) = (caps.kinds, all);
                Way::Entries { bound: None, own: BTreeSet::new(), lost: Vec::new() }
            }
            _ => Way::None,
        };
        Some(Self { caps, way, is_untagged: false })
    }
}

/// All that was cached.
const fn everything(endpoint: EndpointId, scope: Scope) -> Invalidation {
    Invalidation { endpoint, scope, caches: Caches::all(), leaf: false, tag: None, global: true }
}

/// Which kind a table is of.
const fn kind_of(table: &Canonical) -> TableKinds {
    if table.has_pasids() { TableKinds::PASID_TABLE } else { TableKinds::PAGE_TABLE }
}
