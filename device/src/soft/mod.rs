//! A host made of software: two stages of translation and the caches of real hardware.
//!
//! [`SoftHost`] is what a VMM uses for the devices that it emulates itself, and the reference that other hosts are
//! compared with. Stage 1 is what a stream is bound to: nothing, bypass, mappings, or a guest's own tables. Stage 2 is
//! the guest's memory map ([`Stage2`]): every table is read through it.
//!
//! ```
//! use pgtable_formats::{Access, Gpa, Iova, IovaRange};
//! use viommu_device::host::{EndpointCaps, FaultCause, Host, SpaceSpec, Stream};
//! use viommu_device::mapping::{MapFlags, Mapping};
//! use viommu_device::soft::{NoMemory, SoftHost};
//! use viommu_wire::EndpointId;
//!
//! let mut host = SoftHost::new(NoMemory);
//! host.add_endpoint(EndpointId(8), EndpointCaps::default())?;
//! let stream = Stream::untagged(EndpointId(8));
//!
//! let mut space = host.create(SpaceSpec::Mapped)?;
//! let range = IovaRange::from_length(Iova(0x1000), 0x1000).ok_or("empty")?;
//! host.map(&mut space, Mapping { range, output: Gpa(0x8000_0000), flags: MapFlags::READ })?;
//! host.bind(stream, Some(&mut space))?;
//!
//! let output = host.translate(stream, Iova(0x1abc), Access::READ, |piece| piece.output);
//! assert_eq!(output, Ok(Gpa(0x8000_0abc)));
//! assert_eq!(host.translate(stream, Iova(0x1abc), Access::WRITE, |_| ()), Err(FaultCause::Permission));
//! assert_eq!(host.next_fault().map(|fault| fault.cause), Some(FaultCause::Permission));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Caches
//! As on hardware, what was read from a guest's tables stays in use until the guest invalidates it; strict mode
//! ([`SoftHost::set_strict`]) reads everything anew for each access. There are four caches, each of fixed size:
//!
//! | cache | key | dropped by |
//! |---|---|---|
//! | contexts ([`CONTEXT_SLOTS`]) | endpoint, PASID | [`Caches::PASID`], bind |
//! | translations ([`TLB_ENTRIES`]) | endpoint, entry's PASID, ASID (Arm), address | [`Caches::TLB`], [`Caches::PASID`], bind |
//! | last-level tables ([`WALK_SLOTS`]) | the same | the same, unless it is for leaves only |
//! | pages of 4 KiB in front of all ([`FRONT_SLOTS`]) | endpoint, PASID, address | all of these, and unmap |
//!
//! - What faults is never cached, and no cache makes an access fault: what a cached translation does not permit, or
//!   a cached table does not translate, is decided by a walk from the root.
//! - Translations are kept per PASID even where two PASIDs have one ASID. An invalidation by ASID reaches both.
//! - Global translations are kept per PASID too. An invalidation of a range, or one with the GLOBAL flag, reaches those
//!   of all PASIDs of the endpoint.
//! - Addresses that differ in a top byte which the table ignores (TBI) share the canonical one's translation. An
//!   invalidation of a range that is named by another top byte drops all addresses.
//! - An invalidation that is not for leaves only drops cached tables: on Arm those of the range, on VT-d those of the
//!   whole PASID.
//!
//! # Reserved regions
//! In spaces without a guest's table, writes to an MSI region pass untranslated and every other access to a reserved
//! region faults as unmapped. A guest's table translates everything, except that an untagged write to the MSI region
//! of an endpoint behind VT-d is an interrupt, which that hardware takes out before it translates.
//!
//! # Page requests
//! An access of an endpoint with [`EndpointCaps::page_requests`] that a guest's page table does not let through, because
//! nothing is mapped or the permission is missing, may wait for the guest instead of faulting: [`SoftHost::access`] gives
//! a [`Ticket`], the device tells the driver, and [`SoftHost::answer`] says what came of it. Each is a group of its own.
//! Accesses to one page hold one ticket. Where what the stream translates through is replaced or taken away, or its entry
//! is invalidated by name ([`Invalidation::revoked`]), its tickets have failed. Through [`SoftHost::translate`] every fault
//! is final, as for a device that cannot wait.
//!
//! # Faults that are not recorded
//! Where the guest's table says so (SMMUv3: CD.R = 0 and CD.S = 0, for the four faults of stage 1; VT-d: FPD = 1 in the
//! PASID directory entry or the PASID entry, for what these lead to), the access fails and
//! [`next_fault`](crate::host::Host::next_fault) does not tell. CD.R and CD.S are those of the context in use, FPD is read
//! when the fault occurs. An access that waits is a page request all the same, with no
//! [`fault`](crate::host::PageRequestReport::fault).
//!
//! # Not here
//! CD.A (how a failed access ends for the device), ATS, dirty tracking, memory attributes, and sharing between threads: a
//! [`SoftHost`] has one user at a time, which is what pins a translation while it is used.
//!
//! [`Caches::PASID`]: viommu_wire::Caches::PASID
//! [`Caches::TLB`]: viommu_wire::Caches::TLB
//! [`Invalidation::revoked`]: crate::host::Invalidation::revoked

mod contexts;
mod fault_log;
mod flush;
mod front;
mod host;
mod key;
mod page_requests;
mod port;
mod reserved;
mod space;
mod stage2;
pub mod suite;
#[cfg(test)]
mod tests;
mod tlb;
mod translate;
mod walk_cache;

pub use contexts::CONTEXT_SLOTS;
pub use fault_log::MAX_PENDING_FAULTS;
pub use front::FRONT_SLOTS;
pub use page_requests::{AccessError, Answer, MAX_WAITING_PER_ENDPOINT, Ticket};
pub use port::EndpointError;
pub use space::{MAX_SPACES, Space};
pub use stage2::{NoMemory, Stage2};
pub use tlb::TLB_ENTRIES;
pub use walk_cache::WALK_SLOTS;

use alloc::collections::BTreeMap;

use pgtable_formats::{Access, Gpa, Iova, IovaRange};
use viommu_wire::EndpointId;

use crate::host::{EndpointCaps, FaultCause, Stream};
use contexts::{Contexts, Route};
use fault_log::FaultLog;
use front::Front;
use key::Key;
use page_requests::Tickets;
use port::Port;
use space::{Kind, Spaces};
use tlb::Tlb;
use walk_cache::WalkCache;

/// A host that translates in software, over guest memory `M`. See the [module](self).
#[derive(Debug)]
pub struct SoftHost<M> {
    memory: M,
    ports: BTreeMap<EndpointId, Port>,
    spaces: Spaces,
    is_strict: bool,
    front: Front,
    contexts: Contexts,
    tlb: Tlb,
    walks: WalkCache,
    faults: FaultLog,
    tickets: Tickets,
}

/// Where an access leads, and how far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where the address leads.
    pub output: Gpa,
    /// Bytes from the address on that lead to consecutive addresses and permit the same access; at least 1, at most
    /// 2^63. There may be more behind: ask again.
    pub length: u64,
}

impl<M: Stage2> SoftHost<M> {
    /// A host without endpoints.
    pub const fn new(memory: M) -> Self {
        Self {
            memory,
            ports: BTreeMap::new(),
            spaces: Spaces::new(),
            is_strict: false,
            front: Front::new(),
            contexts: Contexts::new(),
            tlb: Tlb::new(),
            walks: WalkCache::new(),
            faults: FaultLog::new(),
            tickets: Tickets::new(),
        }
    }

    /// Adds an endpoint, bound to nothing.
    ///
    /// # Errors
    /// [`EndpointError`]; nothing is added then.
    pub fn add_endpoint(&mut self, endpoint: EndpointId, caps: EndpointCaps) -> Result<(), EndpointError> {
        if self.ports.contains_key(&endpoint) {
            return Err(EndpointError::Exists);
        }
        self.ports.insert(endpoint, Port::new(caps)?);
        Ok(())
    }

    /// The guest's memory.
    pub const fn memory(&self) -> &M {
        &self.memory
    }

    /// The guest's memory. Whoever changes its layout says so to [`flush`](Self::flush).
    pub const fn memory_mut(&mut self) -> &mut M {
        &mut self.memory
    }

    /// Switches strict mode, in which nothing is cached: every access reads the guest's tables from the start.
    pub fn set_strict(&mut self, strict: bool) {
        self.is_strict = strict;
        self.flush();
    }

    /// Whether nothing is cached.
    pub const fn is_strict(&self) -> bool {
        self.is_strict
    }

    /// Empties every cache.
    pub fn flush(&mut self) {
        self.front.clear();
        self.contexts.clear();
        self.tlb.clear();
        self.walks.clear();
    }

    /// Translates the address of an access and calls `use_` with the answer.
    ///
    /// The translation is pinned while `use_` runs: nothing that would take it away (unmap, bind, invalidate) completes
    /// before it returns, because the host is borrowed. That it leads to memory is not checked: it may be a doorbell or
    /// a device.
    ///
    /// # Errors
    /// Why the access faults. [`next_fault`](crate::host::Host::next_fault) will tell the device, too.
    #[inline]
    pub fn translate<R>(
        &mut self,
        stream: Stream,
        iova: Iova,
        access: Access,
        use_: impl FnOnce(Piece) -> R,
    ) -> Result<R, FaultCause> {
        self.piece(stream, iova, access).map(use_)
    }

    /// The same for a device that can wait for a page: where the guest may put it there, it is asked, and the access is
    /// to be tried again when [`answer`](Self::answer) says so.
    ///
    /// Whoever drives the device has to let it tell the driver: see [`Device::event_pending`](crate::Device). Only an
    /// endpoint with [`EndpointCaps::page_requests`] waits; for others this is [`translate`](Self::translate).
    ///
    /// # Errors
    /// Why the access faults, or the ticket to wait with. Of a fault the device is told.
    #[inline]
    pub fn access<R>(
        &mut self,
        stream: Stream,
        iova: Iova,
        access: Access,
        use_: impl FnOnce(Piece) -> R,
    ) -> Result<R, AccessError> {
        let key = Key::new(stream.endpoint, stream.pasid);
        match self.front.lookup(key, iova, access) {
            Some(piece) => Ok(use_(piece)),
            None => self
                .miss(stream, iova, access)
                .map(use_)
                .map_err(|cause| self.wait(stream, iova, access, cause)),
        }
    }

    /// What became of an access that waits. `None`: it still does.
    ///
    /// The answer is the same each time, but for one: [`Answer::Retry`] becomes [`Answer::Failed`] when what the stream
    /// translates through is replaced, or its entry invalidated by name, because the access belonged to what was there
    /// before.
    ///
    /// Of a ticket that is thousands of tickets old, it may be [`Answer::Retry`] whatever the guest said, but for one whose
    /// stream was bound anew, or invalidated by name, since: that has failed.
    pub fn answer(&self, ticket: Ticket) -> Option<Answer> {
        let Some(port) = self.ports.get(&ticket.stream.endpoint) else { return Some(Answer::Failed) };
        match port.waiting.is_open(ticket) {
            true => None,
            false => Some(self.tickets.answer(&port.waiting, ticket)),
        }
    }

    /// For how many pages the accesses of `endpoint` wait.
    pub fn waiting(&self, endpoint: EndpointId) -> usize {
        self.ports.get(&endpoint).map_or(0, |port| port.waiting.len())
    }

    /// Translates without telling the device of a fault, as a debugger would. The caches are used and filled.
    ///
    /// # Errors
    /// Why such an access would fault.
    #[inline]
    pub fn peek(&mut self, stream: Stream, iova: Iova, access: Access) -> Result<Piece, FaultCause> {
        let key = Key::new(stream.endpoint, stream.pasid);
        match self.front.lookup(key, iova, access) {
            Some(piece) => Ok(piece),
            None => self.miss(stream, iova, access),
        }
    }

    /// Translates a range and gives `sink` its pieces, in order: input address, output address, length in bytes.
    /// Pieces whose output is consecutive come as one.
    ///
    /// The time it takes grows with the number of pages in `range`: bound the length of a transfer before.
    ///
    /// # Errors
    /// The first fault. Pieces before it were given to `sink` then, as a transfer stops where it faults.
    pub fn translate_range(
        &mut self,
        stream: Stream,
        range: IovaRange,
        access: Access,
        mut sink: impl FnMut(Iova, Gpa, u64),
    ) -> Result<(), FaultCause> {
        let mut run: Option<Run> = None;
        let mut at = range.start();
        loop {
            let answer = self.piece(stream, at, access);
            let Ok(Piece { output, length }) = answer else {
                run.into_iter().for_each(|run| run.give(&mut sink));
                return answer.map(drop);
            };
            let length = length.min((range.last().0 - at.0).saturating_add(1));
            run = match run {
                Some(run) if run.reaches(output, length) => Some(Run { length: run.length + length, ..run }),
                other => {
                    other.into_iter().for_each(|run| run.give(&mut sink));
                    Some(Run { iova: at, output, length })
                }
            };
            match at.checked_add(length) {
                Some(next) if next <= range.last() => at = next,
                _ => break,
            }
        }
        run.into_iter().for_each(|run| run.give(&mut sink));
        Ok(())
    }

    /// How many faults were lost because [`MAX_PENDING_FAULTS`] were waiting.
    pub const fn faults_dropped(&self) -> u64 {
        self.faults.dropped()
    }

    #[cold]
    fn wait(&mut self, stream: Stream, iova: Iova, access: Access, cause: FaultCause) -> AccessError {
        if cause.is_recoverable()
            && let Some(ticket) = self.ticket(stream, iova, access, cause)
        {
            return AccessError::Waits(ticket);
        }
        self.record(stream, iova, access, cause);
        cause.into()
    }

    /// What the access waits with. `None`: its endpoint cannot wait, or waits for too many pages.
    fn ticket(&mut self, stream: Stream, iova: Iova, access: Access, cause: FaultCause) -> Option<Ticket> {
        let port = self.ports.get(&stream.endpoint).filter(|port| port.caps.page_requests)?;
        if let Some(ticket) = port.waiting.find(stream, iova, access) {
            return Some(ticket);
        }
        let fault = (!self.is_silenced(stream, cause)).then_some(cause);
        let port = self.ports.get_mut(&stream.endpoint)?;
        self.tickets.open(&mut port.waiting, stream, iova, access, fault)
    }

    /// Keeps a fault for the device, unless the guest's table says that it is not to be recorded.
    #[cold]
    fn record(&mut self, stream: Stream, iova: Iova, access: Access, cause: FaultCause) {
        // An event names an endpoint that exists (D-56).
        if self.ports.contains_key(&stream.endpoint) && !self.is_silenced(stream, cause) {
            self.faults.push(stream, iova, access, cause);
        }
    }

    /// Whether the guest's table says that the fault is not to be recorded.
    fn is_silenced(&self, stream: Stream, cause: FaultCause) -> bool {
        let FaultCause::Table(fault) = cause else { return false };
        let Some(port) = self.ports.get(&stream.endpoint) else { return false };
        let served = port.served(&self.spaces, stream.pasid);
        let space = served.and_then(|served| self.spaces.get(served.space));
        let Some(Kind::Table { table, .. }) = space.map(|space| &space.kind) else { return false };
        let stage1 = match self.contexts.get(Key::new(stream.endpoint, stream.pasid)) {
            Some(Route::Tables(tables)) => Some(&tables.stage1),
            Some(Route::Bypass) | None => None,
        };
        table.silences(&self.memory, stream.pasid, stage1, fault)
    }

    #[inline]
    fn piece(&mut self, stream: Stream, iova: Iova, access: Access) -> Result<Piece, FaultCause> {
        let key = Key::new(stream.endpoint, stream.pasid);
        match self.front.lookup(key, iova, access) {
            Some(piece) => Ok(piece),
            None => {
                self.miss(stream, iova, access).inspect_err(|&cause| self.record(stream, iova, access, cause))
            }
        }
    }
}

/// Pieces of a range that lead to consecutive addresses.
#[derive(Clone, Copy)]
struct Run {
    iova: Iova,
    output: Gpa,
    length: u64,
}

impl Run {
    /// Whether `length` bytes at `output` continue it.
    fn reaches(&self, output: Gpa, length: u64) -> bool {
        self.output.checked_add(self.length) == Some(output) && self.length.checked_add(length).is_some()
    }

    fn give(self, sink: &mut impl FnMut(Iova, Gpa, u64)) {
        sink(self.iova, self.output, self.length);
    }
}
