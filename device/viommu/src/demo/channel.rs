//! A device that can wait for memory: each of its channels copies a little in its turn.

use anyhow::bail;
use pgtable_formats::Pasid;
use viommu_device::host::{FaultCause, Stream};
use viommu_device::soft::{Answer, SoftHost, Ticket};
use viommu_queue::record::Recording;
use viommu_queue::{DmaError, GuestTables, PagedIommu, VirtioIommu};
use viommu_wire::{EndpointId, Iova};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::machine::Machine;

/// Bytes that a channel moves in its turn.
pub(super) const BURST: usize = 1024;

/// The copy of one piece of a process's memory to another one.
pub(super) struct Channel {
    dma: PagedIommu<VirtioIommu<SoftHost<GuestTables>>, Recording>,
    memory: GuestMemoryMmap,
    from: Iova,
    to: Iova,
    length: u64,
    done: u64,
    waits: Option<Asked>,
}

/// What a channel waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) ticket: Ticket,
    pub(super) address: Iova,
    pub(super) write: bool,
}

/// What came of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// A burst was moved.
    Moved,
    /// It waits, from now on.
    Waits(Asked),
    /// There is no answer yet.
    StillWaits,
    /// It waited for this, and was refused.
    Failed(Asked),
    /// It was refused at once.
    Refused(FaultCause),
    /// There is nothing left to do.
    Done,
}

impl Channel {
    /// `length` bytes from `from` to `to`, both of the process that has `pasid` at `endpoint`.
    pub(super) fn new(
        machine: &Machine,
        endpoint: EndpointId,
        pasid: Pasid,
        (from, to): (Iova, Iova),
        length: u64,
    ) -> Self {
        let stream = Stream { endpoint, pasid: Some(pasid) };
        let recorder = machine.lock().recorder().cloned();
        // It looks for answers itself: nobody would give them while it sleeps.
        let dma = machine.paged(stream, std::time::Duration::ZERO).recorded(recorder);
        Self { dma, memory: machine.memory().map().clone(), from, to, length, done: 0, waits: None }
    }

    /// Bytes moved.
    pub(super) fn done(&self) -> u64 {
        self.done
    }

    /// What it waits for, as far as it knows.
    pub(super) fn waits(&self) -> Option<Asked> {
        self.waits
    }

    /// Does what can be done now.
    pub(super) fn turn(&mut self) -> anyhow::Result<Turn> {
        if self.done >= self.length {
            return Ok(Turn::Done);
        }
        let mut burst = [0; BURST];
        let (from, to) = (Iova(self.from.0 + self.done), Iova(self.to.0 + self.done));
        // Both parts of a burst that has waited are of the process that was asked.
        let turn = match self.load(self.waits, from, &mut burst)? {
            Turn::Moved => self.store(self.waits, to, &burst)?,
            other => other,
        };
        match turn {
            Turn::Moved => {
                self.waits = None;
                self.done += BURST as u64;
            }
            Turn::Waits(asked) => self.waits = Some(asked),
            Turn::Failed(_) | Turn::Refused(_) => self.waits = None,
            Turn::StillWaits | Turn::Done => {}
        }
        Ok(turn)
    }

    /// Reads, whatever it waits for.
    pub(super) fn read(&self, at: Iova, bytes: &mut [u8]) -> anyhow::Result<Turn> {
        self.load(None, at, bytes)
    }

    fn load(&self, waits: Option<Asked>, at: Iova, bytes: &mut [u8]) -> anyhow::Result<Turn> {
        let address = GuestAddress(at.0);
        let done = match waits {
            Some(asked) => self.dma.retry_read(asked.ticket, &self.memory, address, bytes),
            None => self.dma.try_read(&self.memory, address, bytes),
        };
        came_of(done, waits, at, false)
    }

    fn store(&self, waits: Option<Asked>, at: Iova, bytes: &[u8]) -> anyhow::Result<Turn> {
        let address = GuestAddress(at.0);
        let done = match waits {
            Some(asked) => self.dma.retry_write(asked.ticket, &self.memory, address, bytes),
            None => self.dma.try_write(&self.memory, address, bytes),
        };
        came_of(done, waits, at, true)
    }

    /// What became of something that was waited for.
    pub(super) fn answer(&self, asked: Asked) -> Option<Answer> {
        self.dma.answer(asked.ticket)
    }
}

fn came_of(
    done: Result<(), DmaError>,
    waits: Option<Asked>,
    address: Iova,
    write: bool,
) -> anyhow::Result<Turn> {
    Ok(match (done, waits) {
        (Ok(()), _) => Turn::Moved,
        (Err(DmaError::Waits(ticket)), Some(asked)) if asked.ticket == ticket => Turn::StillWaits,
        (Err(DmaError::Waits(ticket)), _) => Turn::Waits(Asked { ticket, address, write }),
        (Err(DmaError::Fault(cause)), _) => Turn::Refused(cause),
        (Err(DmaError::Refused), Some(asked)) => Turn::Failed(asked),
        (Err(error), _) => bail!("{error}"),
    })
}
