//! A small device behind the IOMMU: it copies memory.

use pgtable_formats::{Access, Gpa, Pasid};
use viommu_device::host::{FaultCause, Stream};
use viommu_wire::{EndpointId, Iova};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, iommu};

use super::machine::Machine;

/// Bytes that the engine moves at a time.
const BURST: usize = 1024;

/// A DMA engine. All that it has of memory is what the IOMMU lets it have.
pub(super) struct Engine {
    machine: Machine,
    endpoint: EndpointId,
}

/// An access was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the access was refused: {0}")]
pub(super) struct Refused(pub(super) String);

impl Engine {
    pub(super) fn new(machine: &Machine, endpoint: EndpointId) -> Self {
        Self { machine: machine.clone(), endpoint }
    }

    /// Its number.
    pub(super) fn endpoint(&self) -> EndpointId {
        self.endpoint
    }

    /// Reads memory for the process with this PASID; `None`: without saying for whom.
    pub(super) fn read(&self, pasid: Option<Pasid>, at: Iova, bytes: &mut [u8]) -> Result<(), Refused> {
        let memory = self.machine.behind_recorded(self.stream(pasid));
        memory.read_slice(bytes, GuestAddress(at.0)).map_err(refused)
    }

    /// Writes memory for the process with this PASID; `None`: without saying for whom.
    pub(super) fn write(&self, pasid: Option<Pasid>, at: Iova, bytes: &[u8]) -> Result<(), Refused> {
        let memory = self.machine.behind_recorded(self.stream(pasid));
        memory.write_slice(bytes, GuestAddress(at.0)).map_err(refused)
    }

    /// Copies `length` bytes from one pointer of a process to another one.
    pub(super) fn copy(&self, pasid: Pasid, from: Iova, to: Iova, length: u64) -> Result<(), Refused> {
        let mut done = 0;
        while done < length {
            let mut burst = [0; BURST];
            let now = usize::try_from(length - done).map_or(BURST, |left| left.min(BURST));
            let bytes = burst.get_mut(..now).unwrap_or_default();
            self.read(Some(pasid), Iova(from.0.wrapping_add(done)), bytes)?;
            self.write(Some(pasid), Iova(to.0.wrapping_add(done)), bytes)?;
            done += now as u64;
        }
        Ok(())
    }

    /// Where an access of the engine would lead.
    pub(super) fn leads(&self, pasid: Option<Pasid>, at: Iova, access: Access) -> Result<Gpa, FaultCause> {
        self.machine.leads(self.stream(pasid), at, access)
    }

    fn stream(&self, pasid: Option<Pasid>) -> Stream {
        Stream { endpoint: self.endpoint, pasid }
    }
}

/// What the IOMMU gave as the reason.
fn refused(error: GuestMemoryError) -> Refused {
    Refused(match error {
        GuestMemoryError::IommuError(iommu::Error::CannotResolve { reason, .. }) => reason,
        other => other.to_string(),
    })
}
