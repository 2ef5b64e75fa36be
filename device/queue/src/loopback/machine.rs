//! The VMM's side.

use std::time::Duration;

use pgtable_formats::{Access, Gpa, Iova};
use viommu_device::host::{FaultCause, Host, Stream};
use viommu_device::soft::{SoftHost, Stage2};
use viommu_device::wire::numbers::{EVENT_QUEUE, REQUEST_QUEUE};
use viommu_device::{Device, Features};
use viommu_guest::hal::{QueueLayout, TransportError};
use virtio_queue::QueueT;
use vm_memory::{GuestMemoryMmap, IommuMemory};

use super::memory::Memory;
use super::transport::Port;
use crate::error::QueueError;
use crate::guest_tables::GuestTables;
use crate::paged::PagedIommu;
use crate::record::RecordedIommu;
use crate::translated::{Exclusive, SharedIommu, StreamIommu, Translate};
use crate::virtio_iommu::{Notify, VirtioIommu};

/// Guest memory, and the device behind its queues. Clones are the same machine.
pub struct Machine<H: Host = SoftHost<GuestTables>> {
    memory: Memory,
    iommu: SharedIommu<VirtioIommu<H>>,
}

impl<H: Host> Machine<H> {
    /// Puts queues of at most `queue_size` entries before `device`.
    ///
    /// # Errors
    /// As [`VirtioIommu::new`].
    pub fn new(memory: Memory, device: Device<H>, queue_size: u16) -> Result<Self, virtio_queue::Error> {
        let iommu = SharedIommu::new(VirtioIommu::new(device, queue_size)?);
        Ok(Self { memory, iommu })
    }

    /// Guest memory.
    pub const fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The device with its queues, while no DMA is under way.
    pub fn lock(&self) -> Exclusive<'_, VirtioIommu<H>> {
        self.iommu.lock()
    }

    /// The driver kicked queue `index`, or there is something for it: the device does all there is to do. The answer
    /// sums up the kicks that this took.
    ///
    /// # Errors
    /// The queue is unusable, or there is none of that number ([`QueueError::NotReady`]).
    pub fn kick(&self, index: u16) -> Result<Notify, QueueError> {
        let mut iommu = self.lock();
        let mut sum = Notify::default();
        loop {
            let notify = match index {
                REQUEST_QUEUE => iommu.kick_requests(self.memory.map())?,
                EVENT_QUEUE => iommu.kick_events(self.memory.map())?,
                _ => return Err(QueueError::NotReady),
            };
            sum.requests |= notify.requests;
            sum.events |= notify.events;
            sum.served = sum.served.saturating_add(notify.served);
            if !notify.again {
                return Ok(sum);
            }
        }
    }
}

impl<H: Host> Machine<H>
where
    VirtioIommu<H>: Translate + Send,
{
    /// Guest memory as an emulated device behind the IOMMU has it.
    pub fn behind(&self, stream: Stream) -> IommuMemory<GuestMemoryMmap, StreamIommu<VirtioIommu<H>>> {
        IommuMemory::new(self.memory.map().clone(), self.iommu.stream(stream), true, ())
    }

    /// The accesses of a device that waits for pages, up to `patience` each, see [`PagedIommu`].
    pub fn paged(&self, stream: Stream, patience: Duration) -> PagedIommu<VirtioIommu<H>> {
        self.iommu.stream(stream).paged(patience)
    }

    /// The same as [`behind`](Self::behind); accesses are told to the recorder of requests, too, if the [`VirtioIommu`] has one now. As
    /// [`lock`](Self::lock), it waits for accesses that are under way.
    pub fn behind_recorded(
        &self,
        stream: Stream,
    ) -> IommuMemory<GuestMemoryMmap, RecordedIommu<VirtioIommu<H>>> {
        let recorder = self.lock().recorder().cloned();
        IommuMemory::new(self.memory.map().clone(), self.iommu.stream(stream).recorded(recorder), true, ())
    }
}

impl<M: Stage2> Machine<SoftHost<M>> {
    /// Where an access would lead, caches included. No fault is recorded.
    ///
    /// # Errors
    /// Why it would fault.
    pub fn leads(&self, stream: Stream, at: Iova, access: Access) -> Result<Gpa, FaultCause> {
        let mut iommu = self.lock();
        iommu.device_mut().host_mut().peek(stream, at, access).map(|piece| piece.output)
    }
}

impl<H: Host> Clone for Machine<H> {
    fn clone(&self) -> Self {
        Self { memory: self.memory.clone(), iommu: self.iommu.clone() }
    }
}

impl<H: Host> std::fmt::Debug for Machine<H> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine").field("memory", &self.memory).finish_non_exhaustive()
    }
}

impl<H: Host> Port for Machine<H> {
    fn reset(&self) {
        self.lock().reset();
    }

    fn offered(&self) -> Features {
        self.lock().offered_features()
    }

    fn accept(&self, features: Features) -> Result<(), TransportError> {
        self.lock().accept_features(features).map_err(|_| TransportError::FeaturesRefused)
    }

    fn max_queue_size(&self, queue: u16) -> u16 {
        self.lock().queue(queue.into()).map_or(0, QueueT::max_size)
    }

    fn enable_queue(&self, queue: u16, layout: QueueLayout) -> Result<(), TransportError> {
        self.lock().enable_queue(queue, layout, self.memory.map())
    }

    fn kick(&self, queue: u16) -> Result<Notify, QueueError> {
        Machine::kick(self, queue)
    }

    fn read_config(&self, offset: usize, bytes: &mut [u8]) {
        self.lock().device().read_config(offset, bytes);
    }

    fn write_config(&self, offset: usize, bytes: &[u8]) {
        // A write that is refused has no effect: a bus has no way to say so.
        let _ = self.lock().device_mut().write_config(offset, bytes);
    }
}
