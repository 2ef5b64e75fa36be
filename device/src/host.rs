//! The seam to the machine: what the device asks of whatever really translates.

use alloc::vec::Vec;

use pgtable_formats::context::{Canonical, smmuv3, vtd};
use pgtable_formats::{AccessKind, Fault, FaultClass, Iova, IovaRange, Pasid};
use viommu_wire::{AccessFlags, Caches, EndpointId, PageResponseCode, ReservedRegion};

use crate::mapping::Mapping;

/// A machine that translates for endpoints.
///
/// Bypass, mappings and guest tables are three kinds of *space*; a *stream* is bound to one space or to none. The
/// machine answers, and its answer decides the guest's status.
///
/// # Contract
/// - A method that fails leaves in force what was.
/// - [`unmap`](Self::unmap), [`bind`](Self::bind), [`invalidate`](Self::invalidate) return once no access through
///   what they took away can still be in flight.
/// - Nothing here is told twice: the device binds a stream before it invalidates it, and destroys a space only when
///   no stream is bound to it.
/// - When [`bind`](Self::bind) has replaced or taken away what a stream translated through, the host has answered the
///   stream's page requests INVALID itself, and does not report any of them any more. With the untagged stream these
///   are the PASIDs, too, that are not bound on their own.
/// - The same goes for [`invalidate`](Self::invalidate) and the stream that is [revoked](Invalidation::revoked),
///   whatever its entry says now. Of what an invalidation of a whole endpoint is about, the host may answer requests
///   whose entry it finds changed, and no others.
/// - Groups of an endpoint are numbered in rotation: a number is used again after all others, so that an answer which
///   comes late meets no other group.
/// - What an endpoint without [`EndpointCaps::page_requests`] does is never a page request.
pub trait Host {
    /// What a stream translates through.
    type Space;

    /// The endpoints behind this machine, in ascending order.
    fn endpoints(&self) -> Vec<EndpointId>;

    /// What `endpoint` can do; `None` where there is no such endpoint.
    fn caps(&self, endpoint: EndpointId) -> Option<&EndpointCaps>;

    /// Makes a space. No stream translates through it yet.
    ///
    /// # Errors
    /// [`HostError::Unsupported`], [`HostError::BadAddress`] (a table that is not in guest memory),
    /// [`HostError::NoMemory`], [`HostError::Failed`].
    fn create(&mut self, spec: SpaceSpec<'_>) -> Result<Self::Space, HostError>;

    /// Frees a space that no stream is bound to.
    fn destroy(&mut self, space: Self::Space);

    /// Adds a mapping to a space of kind [`SpaceSpec::Mapped`].
    ///
    /// # Errors
    /// [`MapError::Overlap`] where any address of it is mapped (D-31); else the machine's.
    fn map(&mut self, space: &mut Self::Space, mapping: Mapping) -> Result<(), MapError>;

    /// Removes every mapping inside `range` and says how many. Addresses without a mapping are passed over (D-42).
    ///
    /// # Errors
    /// [`UnmapError::Split`] where a mapping is touched but not covered; then none is removed (D-41). Else the
    /// machine's.
    fn unmap(&mut self, space: &mut Self::Space, range: IovaRange) -> Result<usize, UnmapError>;

    /// Whether any address of `range` is mapped in a space of kind [`SpaceSpec::Mapped`]. A host that does not know
    /// answers yes: then an endpoint whose reserved regions differ may not join a domain that has mappings (D-23), and a
    /// MAP beyond a limit is answered as one of a range that is mapped.
    fn overlaps(&self, space: &Self::Space, range: IovaRange) -> bool {
        let _ = (space, range);
        true
    }

    /// Replaces, in one step, what `stream` translates through. `None`: all its accesses fault.
    ///
    /// # Errors
    /// The machine's; the stream stays bound as it was.
    fn bind(&mut self, stream: Stream, space: Option<&mut Self::Space>) -> Result<(), HostError>;

    /// Drops what was cached of guests' tables, in order. It may drop more than asked, never less.
    ///
    /// # Errors
    /// How many of `batch` were done before one failed.
    fn invalidate(&mut self, batch: &[Invalidation]) -> Result<(), Stopped>;

    /// The oldest failed access that was not handed out yet. What the guest's own table says is not to be recorded
    /// (CD.R, FPD) is not among them, where the machine knows.
    fn next_fault(&mut self) -> Option<FaultReport>;

    /// The oldest page request that was not handed out yet. The requests of one group come in order, those of several
    /// groups in any. The device stops asking while it has no room, so what it does not ask for has to be kept.
    fn next_page_request(&mut self) -> Option<PageRequestReport> {
        None
    }

    /// Answers a group: all of its requests, which are never reported again. A request with its number that is
    /// reported later begins another group; so it is where the answer comes before the last request was reported.
    ///
    /// A group that is gone, because the host answered it itself, is no error: that is [`Answered::Gone`]. The driver,
    /// where it is one that answers, is told NOENT then, as of any group that is over.
    ///
    /// # Errors
    /// The machine's; the group stays as it was.
    fn respond(&mut self, response: &GroupResponse) -> Result<Answered, HostError> {
        let _ = response;
        Err(HostError::Unsupported)
    }
}

/// Accesses that translate alike: an endpoint's untagged ones, or those with one PASID.
///
/// A space that serves all PASIDs (bypass, a PASID table) is bound to the untagged stream and serves the tagged ones
/// of the endpoint with it, except those that are bound on their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stream {
    /// The endpoint.
    pub endpoint: EndpointId,
    /// The PASID; `None` for untagged accesses.
    pub pasid: Option<Pasid>,
}

impl Stream {
    /// The untagged accesses of `endpoint`.
    pub const fn untagged(endpoint: EndpointId) -> Self {
        Self { endpoint, pasid: None }
    }
}

/// What kind of space to make.
#[derive(Clone, Copy, Debug)]
pub enum SpaceSpec<'a> {
    /// Output equals input, everything is allowed.
    Identity,
    /// What [`Host::map`] adds.
    Mapped,
    /// The guest's own table, for streams of `endpoint`.
    GuestTable {
        /// Whose capabilities the table was checked against.
        endpoint: EndpointId,
        /// The table.
        table: &'a Canonical,
    },
}

/// What an endpoint can do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointCaps {
    /// The guest tables that the machine walks for it; `None` where it walks none. The device tells a guest, and
    /// takes tables by, those bits of the registers alone that hold for nested tables (`filtered` of either kind).
    pub tables: Option<TableCaps>,
    /// Which kinds of them the host takes, of those that the device can check for that hardware.
    pub kinds: TableKinds,
    /// Those that it hands over as they are. Others of `kinds` it makes of these, which costs more: PROBE names them
    /// last.
    pub native: TableKinds,
    /// Regions that must not be mapped; disjoint (D-53), with at most one MSI region (D-52).
    pub reserved: Vec<ReservedRegion>,
    /// Whether its accesses can wait for a page, see [`Host::next_page_request`].
    pub page_requests: bool,
}

bitflags::bitflags! {
    /// Ways to hand over a guest's tables.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct TableKinds: u8 {
        /// A table of all PASIDs of the endpoint, which the guest fills.
        const PASID_TABLE = 1 << 0;
        /// A page table for one PASID.
        const PAGE_TABLE = 1 << 1;
    }
}

/// All: a host that takes fewer says so.
impl Default for TableKinds {
    fn default() -> Self {
        Self::all()
    }
}

/// The hardware that walks guest tables, as its ID registers describe it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TableCaps {
    /// An SMMUv3.
    Smmuv3(smmuv3::Caps),
    /// A VT-d unit in scalable mode.
    Vtd(vtd::Caps),
}

impl TableCaps {
    /// What of it holds for a guest's tables, and a guest is told: the device judges every table by this.
    pub(crate) const fn for_guests(&self) -> Self {
        match self {
            Self::Smmuv3(caps) => {
                let registers = caps.registers().filtered().with_output_bits(caps.oas_bits);
                Self::Smmuv3(smmuv3::Caps::from_registers(registers))
            }
            Self::Vtd(caps) => Self::Vtd(vtd::Caps::from_registers(caps.registers().filtered())),
        }
    }
}

/// What to drop of the caches over the guest table of one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invalidation {
    /// The endpoint whose accesses filled the caches.
    pub endpoint: EndpointId,
    /// How much.
    pub scope: Scope,
    /// Which caches; never empty.
    pub caches: Caches,
    /// Only what came from leaf entries.
    pub leaf: bool,
    /// Architectural tag that narrows the translations; on Arm the ASID.
    pub tag: Option<u16>,
    /// Global translations, too.
    pub global: bool,
}

impl Invalidation {
    /// The stream whose page requests end with it, see the contract of [`Host`]: the entry of a PASID, or of untagged
    /// accesses, may have been taken away.
    pub fn revoked(&self) -> Option<Stream> {
        match self.scope {
            Scope::Pasid(pasid) if self.caches.contains(Caches::PASID) => {
                Some(Stream { endpoint: self.endpoint, pasid })
            }
            Scope::Pasid(_) | Scope::Endpoint | Scope::Range { .. } => None,
        }
    }
}

/// How much of an endpoint an [`Invalidation`] is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Every PASID, and untagged accesses.
    Endpoint,
    /// One PASID, or untagged accesses.
    Pasid(Option<Pasid>),
    /// A range of one PASID, or of untagged accesses.
    Range {
        /// The PASID; `None` for untagged accesses.
        pasid: Option<Pasid>,
        /// The addresses.
        range: IovaRange,
        /// log2 of the size in bytes of the pages that the guest named.
        page_lg2: u8,
    },
}

/// An access that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultReport {
    /// Whose access.
    pub stream: Stream,
    /// Its address, where known.
    pub address: Option<Iova>,
    /// What it did.
    pub kind: AccessKind,
    /// In privileged mode.
    pub privileged: bool,
    /// Why.
    pub cause: FaultCause,
}

/// An access that waits for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRequestReport {
    /// Whose access.
    pub stream: Stream,
    /// Its address.
    pub address: Iova,
    /// What it is; a machine may ask for several at once.
    pub access: AccessFlags,
    /// The group that one answer serves; of this stream, until it is answered.
    pub group: u16,
    /// The last request of its group. Only a whole group is answered with success.
    pub last: bool,
    /// VT-d private data.
    pub private_data: Option<[u64; 2]>,
    /// As which fault it is told to a driver that takes no page requests: for that one the access has failed. `None`:
    /// the guest's own table says that it is not to be recorded, see [`Host::next_fault`].
    pub fault: Option<FaultCause>,
}

/// The answer to a group of page requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupResponse {
    /// Whose accesses wait.
    pub stream: Stream,
    /// The group.
    pub group: u16,
    /// The answer.
    pub code: PageResponseCode,
}

/// What became of the answer to a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Answered {
    /// The machine took it.
    Taken,
    /// There is no such group any more: the machine answered it itself.
    Gone,
}

/// Why an access failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultCause {
    /// The stream is bound to nothing.
    Unattached,
    /// No mapping is there.
    Unmapped,
    /// The mapping does not permit the access.
    Permission,
    /// The guest's own table says so.
    Table(Fault),
}

impl FaultCause {
    /// Whether the reason is a mapping (missing, or without the permission) rather than the configuration.
    pub const fn is_mapping(self) -> bool {
        match self {
            Self::Unattached => false,
            Self::Unmapped | Self::Permission => true,
            Self::Table(fault) => !matches!(fault.class(), FaultClass::Configuration),
        }
    }

    /// Whether it is a matter of a page: the walk found nothing mapped there, or not with that permission. What is
    /// malformed or not in memory, or configured otherwise, is none.
    ///
    /// An address that no entry of the table can map is none on VT-d. On Arm it is F_TRANSLATION, by which hardware
    /// stalls an access as by any other (IHI 0070, 3.12.2), so it counts here, too.
    pub const fn is_recoverable(self) -> bool {
        match self {
            Self::Unattached | Self::Unmapped | Self::Permission => false,
            // What the PASID entry does not enable, and addresses that no table translates.
            Self::Table(Fault::Vtd(
                vtd::FaultReason::EXECUTE_DISABLED
                | vtd::FaultReason::PRIVILEGED_DISABLED
                | vtd::FaultReason::NOT_CANONICAL,
            )) => false,
            Self::Table(fault) => matches!(fault.class(), FaultClass::NotMapped | FaultClass::Permission),
        }
    }
}

/// `unattached`, `unmapped`, `permission`, or the architecture's own name.
impl core::fmt::Display for FaultCause {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Unattached => f.write_str("unattached"),
            Self::Unmapped => f.write_str("unmapped"),
            Self::Permission => f.write_str("permission"),
            Self::Table(fault) => fault.fmt(f),
        }
    }
}

/// What went wrong in the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// The machine cannot do this.
    #[error("not supported by the host")]
    Unsupported,
    /// A table, or part of one, is not in guest memory.
    #[error("table is not in guest memory")]
    BadAddress,
    /// The machine is out of memory, or of what else it needs.
    #[error("host is out of resources")]
    NoMemory,
    /// It failed, with this code.
    #[error("host failed with code {0}")]
    Failed(i32),
}

/// Why a mapping was not added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// Part of the range is mapped (D-31).
    #[error("part of the range is mapped")]
    Overlap,
    /// The machine's reason.
    #[error(transparent)]
    Host(#[from] HostError),
}

/// Why no mapping was removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnmapError {
    /// A mapping lies partly in the range (D-41).
    #[error("a mapping lies partly in the range")]
    Split,
    /// The machine's reason.
    #[error(transparent)]
    Host(#[from] HostError),
}

/// An invalidation that stopped part-way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stopped after {done}: {error}")]
pub struct Stopped {
    /// How many of the batch were done.
    pub done: usize,
    /// Why the next one was not.
    pub error: HostError,
}
