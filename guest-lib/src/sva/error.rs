//! What goes wrong when address spaces are shared.

use viommu_wire::EndpointId;

use super::ProcessId;
use crate::RequestError;
use crate::fault::SweepError;
use crate::queue::QueueError;
use crate::tables::TableError;

/// Why a process was not bound, unbound or answered for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SvaError {
    /// PROBE gives the endpoint no PASIDs: its DMA is untagged, and reaches one address space at a time. See
    /// [`PasidTable::bind_at`](crate::tables::PasidTable::bind_at) for tables of the guest's own, and
    /// [`MappedDomain`](crate::MappedDomain) for those of the device.
    #[error("endpoint {0} has no PASIDs")]
    NoPasids(EndpointId),
    /// Every domain is in use.
    #[error("no domain is left")]
    NoDomain,
    /// There is no such process.
    #[error("there is no {0}")]
    NoProcess(ProcessId),
    /// The process has ended.
    #[error("{0} has ended")]
    Ended(ProcessId),
    /// The endpoint has no page requests, and not all memory of the process is there: see
    /// [`DemandPaged::pin`](super::DemandPaged::pin).
    #[error("{0} is not pinned, and the endpoint cannot wait for pages")]
    NotPinned(ProcessId),
    /// An unbind of the process has not succeeded yet: see [`Sva::retry_unbinds`](super::Sva::retry_unbinds).
    #[error("{0} is being unbound")]
    Unbinding(ProcessId),
    /// The handle is another endpoint's, or of a binding that is gone.
    #[error("not a handle of this endpoint")]
    NotBound,
    /// Processes are bound still.
    #[error("processes are still bound")]
    InUse,
    /// The group was answered already: by the device, when its PASID was unbound, or before it used its number anew.
    #[error("the group needs no answer any more")]
    Answered,
    /// Too many events of others wait in front: [`Driver::handle_events`](crate::Driver::handle_events) first.
    #[error("events have to be handled first")]
    Events,
    /// A table was not made or changed.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A request failed.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The event queue is broken.
    #[error(transparent)]
    Queue(#[from] QueueError),
}

impl From<SweepError> for SvaError {
    fn from(error: SweepError) -> Self {
        match error {
            SweepError::Kept => Self::Events,
            SweepError::Queue(error) => Self::Queue(error),
        }
    }
}

/// Why a process did not end, or was not removed. It is as before, and can be tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExitError {
    /// There is no such process.
    #[error("there is no {0}")]
    NoProcess(ProcessId),
    /// [`TableError::InUse`]: an endpoint is still bound. Otherwise its page table could not be emptied.
    #[error(transparent)]
    Table(#[from] TableError),
}
