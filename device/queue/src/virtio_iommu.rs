//! The device with its two queues, as a VMM's transport uses it.

use std::sync::Arc;

use viommu_device::host::{Host, Stream};
use viommu_device::wire::{self, PageRequest, Tail, numbers};
use viommu_device::{Device, FeatureError, Features, Handled, Status};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryBackend;

use crate::error::QueueError;
use crate::event_queue::EventQueue;
use crate::record::{Event, PageAsked, Recorder};
use crate::request_queue::RequestQueue;

/// A virtio-iommu behind a transport (PCI or MMIO, the VMM's own).
///
/// The transport forwards feature negotiation, configuration accesses ([`device`](Self::device)), queue setup
/// ([`queue_mut`](Self::queue_mut)), kicks and resets, and raises the interrupts that [`Notify`] asks for.
pub struct VirtioIommu<H: Host> {
    device: Device<H>,
    requests: RequestQueue,
    events: EventQueue,
    recorder: Option<Arc<dyn Recorder>>,
}

/// What the transport must do after a kick.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "the driver may wait for the notification"]
pub struct Notify {
    /// Notify the driver of the request queue.
    pub requests: bool,
    /// Notify the driver of the event queue.
    pub events: bool,
    /// Kick the same queue again, after other work: the driver added more meanwhile and may not kick for it.
    pub again: bool,
    /// Chains of the kicked queue that went back with an answer of the device: requests, or buffers with an event.
    pub served: u32,
}

/// Index of the queue for requests.
pub const REQUEST_QUEUE: usize = numbers::REQUEST_QUEUE as usize;
/// Index of the queue for events.
pub const EVENT_QUEUE: usize = numbers::EVENT_QUEUE as usize;

/// Device ID of an IOMMU (virtio 1.4, "Device Types").
pub const DEVICE_ID: u32 = numbers::DEVICE_ID;

impl<H: Host> VirtioIommu<H> {
    /// Features of the rings and the transport that this crate handles; they are offered beside the device's.
    pub const RING_FEATURES: Features =
        Features::VERSION_1.union(Features::RING_INDIRECT_DESC).union(Features::RING_EVENT_IDX);

    /// Puts queues of at most `queue_size` entries before `device`.
    ///
    /// # Errors
    /// Where `queue_size` is not a power of two from 1 to 32768.
    pub fn new(device: Device<H>, queue_size: u16) -> Result<Self, virtio_queue::Error> {
        // No answer is longer than that of PROBE.
        let longest = (device.config().probe_size as usize).saturating_add(Tail::LEN);
        let requests = RequestQueue::new(queue_size, longest)?;
        Ok(Self { device, requests, events: EventQueue::new(queue_size)?, recorder: None })
    }

    /// The device behind the queues.
    pub fn device(&self) -> &Device<H> {
        &self.device
    }

    /// The device behind the queues. For a reset, take [`reset`](Self::reset).
    pub fn device_mut(&mut self) -> &mut Device<H> {
        &mut self.device
    }

    /// All feature bits on offer.
    pub fn offered_features(&self) -> Features {
        self.device.offered_features().union(Self::RING_FEATURES)
    }

    /// The driver's choice. It comes before the queues are enabled.
    ///
    /// # Errors
    /// A device-type bit that was not offered; nothing changes then. Other bits of the transport are its own business.
    pub fn accept_features(&mut self, accepted: Features) -> Result<(), FeatureError> {
        self.device.accept_features(accepted)?;
        let event_idx = accepted.contains(Features::RING_EVENT_IDX);
        self.requests.queue_mut().set_event_idx(event_idx);
        self.events.queue_mut().set_event_idx(event_idx);
        Ok(())
    }

    /// Configuration and position of queue `index`, [`REQUEST_QUEUE`] or [`EVENT_QUEUE`].
    pub fn queue(&self, index: usize) -> Option<&Queue> {
        match index {
            REQUEST_QUEUE => Some(self.requests.queue()),
            EVENT_QUEUE => Some(self.events.queue()),
            _ => None,
        }
    }

    /// Configuration and position of queue `index`, [`REQUEST_QUEUE`] or [`EVENT_QUEUE`].
    pub fn queue_mut(&mut self, index: usize) -> Option<&mut Queue> {
        match index {
            REQUEST_QUEUE => Some(self.requests.queue_mut()),
            EVENT_QUEUE => Some(self.events.queue_mut()),
            _ => None,
        }
    }

    /// Tells `recorder` of all requests, kicks, page requests and resets from now on; `None`: nobody, which is so at first.
    /// For accesses, see [`RecordedIommu`](crate::record::RecordedIommu) and [`Recording`](crate::record::Recording).
    pub fn set_recorder(&mut self, recorder: Option<Arc<dyn Recorder>>) {
        self.recorder = recorder;
    }

    /// Who is told, if anybody.
    pub fn recorder(&self) -> Option<&Arc<dyn Recorder>> {
        self.recorder.as_ref()
    }

    /// The driver kicked the request queue: answers all requests that are there. Events that come of it are delivered,
    /// too.
    ///
    /// # Errors
    /// Where the request queue is unusable; the transport may set DEVICE_NEEDS_RESET.
    pub fn kick_requests<M: GuestMemoryBackend>(&mut self, memory: &M) -> Result<Notify, QueueError> {
        let device = &mut self.device;
        let kick = match self.recorder.as_deref() {
            None => {
                self.requests.kick(memory, |readable, writable| answer(device, readable, writable).used)?
            }
            Some(recorder) => {
                let kick = self.requests.kick(memory, |readable, writable| {
                    let handled = answer(device, readable, writable);
                    recorder.record(Event::Request { readable, status: status(handled) });
                    handled.used
                })?;
                recorder.record(Event::Kick { served: kick.served, notify: kick.notify });
                kick
            }
        };
        let Notify { events, again, .. } = self.deliver(memory);
        Ok(Notify { requests: kick.notify, events, again: kick.again || again, served: kick.served })
    }

    /// The driver kicked the event queue, or an endpoint met a fault: delivers events while there are buffers.
    ///
    /// # Errors
    /// Where the event queue is unusable; events are kept.
    pub fn kick_events<M: GuestMemoryBackend>(&mut self, memory: &M) -> Result<Notify, QueueError> {
        let device = &mut self.device;
        let kick = match self.recorder.as_deref() {
            None => self.events.kick(memory, |buffer| device.fill_event(buffer))?,
            Some(recorder) => self.events.kick(memory, |buffer| {
                let written = device.fill_event(buffer);
                record_page_request(recorder, buffer.get(..written?).unwrap_or_default());
                written
            })?,
        };
        Ok(Notify { requests: false, events: kick.notify, again: kick.again, served: kick.served })
    }

    /// Device reset: queues are disabled, no endpoint is attached any more, features are to be negotiated anew.
    pub fn reset(&mut self) {
        self.device.reset();
        self.reset_queues();
    }

    /// System reset: a device reset that also restores `bypass` (D-6).
    pub fn system_reset(&mut self) {
        self.device.system_reset();
        self.reset_queues();
    }

    fn reset_queues(&mut self) {
        if let Some(recorder) = &self.recorder {
            recorder.record(Event::Reset);
        }
        self.requests.queue_mut().reset();
        self.events.queue_mut().reset();
    }

    /// Delivers the events that there are, as far as the event queue can be used.
    fn deliver<M: GuestMemoryBackend>(&mut self, memory: &M) -> Notify {
        if !self.events.queue().ready() || !self.device.event_pending() {
            return Notify::default();
        }
        self.kick_events(memory).unwrap_or_else(|error| {
            tracing::warn!(queue = "event", %error, "events are kept");
            Notify::default()
        })
    }
}

/// One request, and a word in the log where it was rejected.
fn answer<H: Host>(device: &mut Device<H>, readable: &[u8], writable: &mut [u8]) -> Handled {
    let handled = device.handle(readable, writable);
    if let Some(rejection) = handled.rejection {
        match rejection.status() {
            Some(Status::DevErr) => tracing::warn!(%rejection, "request failed"),
            status => tracing::debug!(%rejection, ?status, "request rejected"),
        }
    }
    handled
}

/// The event that the driver is told, where it is a page request.
#[cold]
fn record_page_request(recorder: &dyn Recorder, event: &[u8]) {
    if let Some(wire::Event::PageRequest(request)) = wire::Event::decode(event) {
        let PageRequest { endpoint, pasid, address, access, group_id: group, last, .. } = request;
        let stream = Stream { endpoint, pasid };
        recorder.record(Event::PageRequest(PageAsked { stream, address, access, group, last }));
    }
}

/// What the driver is told.
fn status(handled: Handled) -> Option<Status> {
    match handled.rejection {
        _ if handled.used == 0 => None,
        None => Some(Status::Ok),
        Some(rejection) => Some(rejection.status().unwrap_or(Status::DevErr)),
    }
}

impl<H: Host> std::fmt::Debug for VirtioIommu<H> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VirtioIommu")
            .field("requests", &self.requests)
            .field("events", &self.events)
            .finish_non_exhaustive()
    }
}
