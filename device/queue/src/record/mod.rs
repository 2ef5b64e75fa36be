//! A record of what a guest asks of the IOMMU, and what its devices do through it.
//!
//! - [`Recorder`] is told of every [`Event`]: a request with its status, a kick, an access with its outcome, a page request,
//!   a reset.
//! - [`Tape`] is a recorder that writes a *trace*, in bounded memory and up to a bounded length.
//! - [`TraceReader`] reads one, in bounded memory, whoever wrote it.
//! - [`RecordedIommu`] is a [`StreamIommu`](crate::StreamIommu) whose accesses are recorded; [`Recording`] does the same for
//!   a [`PagedIommu`](crate::PagedIommu), whose accesses may wait.
//!
//! # What it costs
//! Nothing is recorded unless a recorder is given. Requests: [`VirtioIommu`](crate::VirtioIommu) looks once per request,
//! and once per kick, whether there is one. Accesses: a `StreamIommu` and a `PagedIommu` do not look at all; those that do
//! are other types, which a VMM uses where it may want to record.
//!
//! # Order
//! Events are recorded while the IOMMU is locked, so the order of a trace is the order in which things came into force: an
//! access that is recorded behind an UNMAP was translated after it. An access is recorded when it is translated, which is
//! before the data move.
//!
//! ```
//! use std::sync::Arc;
//!
//! use viommu_device::host::{EndpointCaps, Stream};
//! use viommu_device::soft::SoftHost;
//! use viommu_device::{EndpointId, Iova};
//! use viommu_queue::record::{Event, Outcome, Recorder, Tape, TraceReader};
//! use viommu_queue::{GuestTables, SharedIommu};
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, IommuMemory};
//!
//! let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1_0000)])?;
//! let mut host = SoftHost::new(GuestTables::new(&memory));
//! host.add_endpoint(EndpointId(8), EndpointCaps::default())?;
//! let iommu = SharedIommu::new(host);
//!
//! // A file, in a VMM. For requests: `VirtioIommu::set_recorder`.
//! let tape = Arc::new(Tape::new(Vec::new()));
//! let stream = iommu.stream(Stream::untagged(EndpointId(8)));
//! let dma = IommuMemory::new(memory, stream.recorded(Some(tape.clone())), true, ());
//! assert!(dma.read_obj::<u32>(GuestAddress(0x1234)).is_err());
//! let written = tape.finish()?;
//! assert_eq!((written.events, written.lost), (1, 0));
//!
//! drop(dma);
//! let bytes = Arc::into_inner(tape).ok_or("still shared")?.into_sink();
//! let mut reader = TraceReader::new(&bytes[..])?;
//! let (_time, event) = reader.next_event()?.ok_or("empty")?;
//! let Event::Access(access) = event else { return Err("no access".into()) };
//! assert_eq!((access.iova, access.length, access.outcome), (Iova(0x1234), 4, Outcome::Unattached));
//! assert!(reader.next_event()?.is_none());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The trace
//! Little-endian. It holds addresses and lengths, and none of the data that were moved. First 16 bytes:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | `VIOMMUTR` |
//! | 8 | 2 | version, 2 |
//! | 10 | 1 | what times are: 0 the number of the record, 1 nanoseconds of some clock |
//! | 11 | 5 | 0 |
//!
//! Then records, each a head of 12 bytes and a body:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 1 | kind |
//! | 1 | 1 | length of the body |
//! | 2 | 1 | result |
//! | 3 | 1 | flags |
//! | 4 | 8 | time, not before that of the record in front |
//! | 12 | | body |
//!
//! | kind | what | result | flags | body |
//! |---|---|---|---|---|
//! | 1 | request | status; 0xff: returned unwritten | 0 | the device-readable part as sent, at most the 124 bytes that the longest has |
//! | 2 | access | 0 passed; 1 unattached, 2 unmapped, 3 permission, 4 configuration, 5 a table could not be read, 6 malformed entry, 7 waits for a page | as in events: bit 0 read, 1 write, 2 execute, 3 privileged | endpoint le32, PASID le32 (all ones: untagged), address le64, length le32; where it waits, the group that it waits for le16 |
//! | 3 | kick of the request queue | 0 | bit 0: the driver was notified | requests answered le32: those since the kick in front |
//! | 4 | reset of the device | 0 | 0 | none |
//! | 5 | page request, told to the driver | 0 | as in events: those of an access, bit 4 last of its group | endpoint le32, PASID le32, address le64, group le16 |
//! | 6 | a device that waited goes on | 0 tries again, 1 was refused, 2 its patience ended | 0 | endpoint le32, PASID le32, group le16 |
//! | 254 | events left out here, because the trace had reached its limit | 0 | 0 | how many le64 |
//! | 255 | end | 0 | 0 | records in front of it le64 |
//!
//! The end is always there: a trace without it was cut.
//!
//! # Accesses that wait
//! An access that waits for a page is recorded when it is tried, with the group of page requests that it waits for; again
//! when it is tried anew; and in between, when its device has noticed the answer, which for one that polls is each time that
//! it asks or tries again. The driver's answer is a request, PAGE_RESP. A group whose access was refused without one was
//! answered by the machine: its binding was taken away, or the driver's time was over. Groups are those of the machine, a
//! number of which is used again when its group is over.
//!
//! # Not recorded
//! Fault events; configuration accesses; accesses that are refused before they are translated, because they
//! leave the 64-bit space or are longer than [`MAX_ACCESS`](crate::MAX_ACCESS); an access of length 0; and what hardware
//! does: a host that walks tables itself sees no access.

mod format;
mod iommu;
mod paged;
mod reader;
mod tape;

use pgtable_formats::FaultClass;
use viommu_device::host::{FaultCause, Stream};
use viommu_device::soft::AccessError;
use viommu_device::wire::AccessFlags;
use viommu_device::{Iova, Status};

pub use format::{Clock, MAX_REQUEST, VERSION};
pub use iommu::RecordedIommu;
pub use paged::Recording;
pub use reader::{TraceError, TraceReader};
pub use tape::{DEFAULT_LIMIT, Tape, Written};

/// What is told of what happens. It is called while the IOMMU is locked, from any thread: it must be quick, and must not
/// use the IOMMU.
pub trait Recorder: Send + Sync {
    /// This happened now.
    fn record(&self, event: Event<'_>);
}

/// Something that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// The device answered a request.
    Request {
        /// The device-readable part, gathered; at least the first [`MAX_REQUEST`] bytes of it.
        readable: &'a [u8],
        /// What the driver was told; `None`: the buffers came back unwritten.
        status: Option<Status>,
    },
    /// The driver's notification was served.
    Kick {
        /// Requests that were answered.
        served: u32,
        /// The driver is notified in turn.
        notify: bool,
    },
    /// A device behind the IOMMU accessed memory, or tried to.
    Access(Accessed),
    /// The driver was told that an access waits for a page.
    PageRequest(PageAsked),
    /// A device that waited for a page goes on.
    Waited(Waited),
    /// The device was reset: nothing is attached any more.
    Reset,
}

/// A page request, as the driver was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageAsked {
    /// Whose access waits.
    pub stream: Stream,
    /// For the page of this address.
    pub address: Iova,
    /// What it needs.
    pub access: AccessFlags,
    /// The group that one answer serves.
    pub group: u16,
    /// It is the last one of its group.
    pub last: bool,
}

/// The end of a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waited {
    /// Whose.
    pub stream: Stream,
    /// For which group.
    pub group: u16,
    /// How.
    pub end: WaitEnd,
}

/// How a wait for a page ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum WaitEnd {
    /// The page is there: the access is tried again.
    Retry = 0,
    /// The access was refused.
    Failed = 1,
    /// There was no answer as long as the device was patient.
    TimedOut = 2,
}

impl WaitEnd {
    /// Every end, by its number.
    pub const ALL: [Self; 3] = [Self::Retry, Self::Failed, Self::TimedOut];
}

/// An access of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accessed {
    /// Whose.
    pub stream: Stream,
    /// First address.
    pub iova: Iova,
    /// Length in bytes, 1 to [`MAX_ACCESS`](crate::MAX_ACCESS).
    pub length: u32,
    /// What kind. Empty: the device only asked whether there is something.
    pub access: AccessFlags,
    /// What became of it.
    pub outcome: Outcome,
}

/// What became of an access: [`FaultCause`] without an architecture's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Outcome {
    /// It was translated.
    Passed,
    /// The stream is bound to nothing.
    Unattached,
    /// Nothing is mapped there.
    Unmapped,
    /// The mapping does not permit it.
    Permission,
    /// The configuration leads to no page table: the PASID has none, for one.
    Configuration,
    /// A table lies outside guest memory.
    TableAccess,
    /// An entry of a table is malformed.
    Malformed,
    /// It waits for a page.
    Waits {
        /// The group of page requests that it waits for.
        group: u16,
    },
}

impl From<Result<(), FaultCause>> for Outcome {
    fn from(result: Result<(), FaultCause>) -> Self {
        match result {
            Ok(()) => Self::Passed,
            Err(FaultCause::Unattached) => Self::Unattached,
            Err(FaultCause::Unmapped) => Self::Unmapped,
            Err(FaultCause::Permission) => Self::Permission,
            Err(FaultCause::Table(fault)) => match fault.class() {
                FaultClass::NotMapped => Self::Unmapped,
                FaultClass::Permission => Self::Permission,
                FaultClass::Configuration => Self::Configuration,
                FaultClass::TableAccess => Self::TableAccess,
                FaultClass::Malformed => Self::Malformed,
            },
        }
    }
}

impl From<Result<(), AccessError>> for Outcome {
    fn from(result: Result<(), AccessError>) -> Self {
        match result {
            Ok(()) => Self::Passed,
            Err(AccessError::Fault(cause)) => Err(cause).into(),
            Err(AccessError::Waits(ticket)) => Self::Waits { group: ticket.group() },
        }
    }
}
