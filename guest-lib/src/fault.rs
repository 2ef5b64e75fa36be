//! Faults and page requests: what the device tells the driver unasked.

use alloc::collections::VecDeque;

use pgtable_formats::TableAlloc;
use viommu_wire::{Event, Features, Gpa, numbers};

use crate::Driver;
use crate::hal::{GuestMem, Platform, QueueLayout, Transport};
use crate::queue::{self, Buffer, Queue, QueueError, QueueOptions};

/// Bytes of an event buffer where PAGE_REQUEST was negotiated, and where it was not.
const PAGE_REQUEST: u32 = 48;
const FAULT: u32 = 24;
const BUFFER_STRIDE: u64 = 64;

/// Most events that are kept for [`Driver::handle_events`] after something else took them out of the queue. Where so many
/// are kept, the others stay in the queue.
pub const MAX_KEPT_EVENTS: usize = 1 << 10;

/// What became of events so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventCounters {
    /// Handed to the handler.
    pub delivered: u64,
    /// Records that a driver must ignore: too short, or with reserved bytes set.
    pub ignored: u64,
}

/// Why events were not all taken out of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SweepError {
    /// [`MAX_KEPT_EVENTS`] wait to be handled.
    Kept,
    Queue(QueueError),
}

impl From<QueueError> for SweepError {
    fn from(error: QueueError) -> Self {
        Self::Queue(error)
    }
}

/// The event queue with a buffer for every descriptor.
#[derive(Debug)]
pub(crate) struct EventRing {
    queue: Queue,
    buffers: Gpa,
    buffer_length: u32,
    /// Taken out of the queue, oldest first, but not delivered yet.
    kept: VecDeque<Event>,
    counters: EventCounters,
}

impl EventRing {
    pub(crate) fn new<M: GuestMem, A: TableAlloc>(
        memory: &M,
        alloc: &mut A,
        size: u16,
        features: Features,
    ) -> Result<Self, QueueError> {
        let event_idx = features.contains(Features::RING_EVENT_IDX);
        let buffer_length = if features.contains(Features::PAGE_REQUEST) { PAGE_REQUEST } else { FAULT };
        let queue =
            Queue::new(memory, alloc, size, QueueOptions { event_idx, indirect: 0, interrupts: true })?;
        let buffers = queue::allocate(alloc, BUFFER_STRIDE * u64::from(size))?;
        Ok(Self { queue, buffers, buffer_length, kept: VecDeque::new(), counters: EventCounters::default() })
    }

    pub(crate) const fn layout(&self) -> QueueLayout {
        self.queue.layout()
    }

    /// Gives the device every buffer that it does not have. `true`: it wants to be notified.
    pub(crate) fn post<M: GuestMem>(&mut self, memory: &M) -> Result<bool, QueueError> {
        while let Some(head) = self.queue.next_head(1) {
            let buffer = Buffer { at: self.buffer(head), length: self.buffer_length };
            self.queue.add(memory, &[], &[buffer])?;
        }
        self.queue.publish(memory)
    }

    pub(crate) fn release<A: TableAlloc>(self, alloc: &mut A) {
        alloc.free(self.buffers, queue::size_lg2(BUFFER_STRIDE * u64::from(self.queue.layout().size)));
        self.queue.release(alloc);
    }

    /// Takes the next record; `None` where there is none. The inner `None` is one to be ignored.
    fn take<M: GuestMem>(&mut self, memory: &M) -> Result<Option<Option<Event>>, QueueError> {
        let Some(used) = self.queue.collect(memory)? else {
            return Ok(None);
        };
        let mut bytes = [0; PAGE_REQUEST as usize];
        let record = usize::try_from(used.written).ok().and_then(|written| bytes.get_mut(..written));
        let Some(record) = record else {
            self.counters.ignored += 1;
            return Ok(Some(None));
        };
        memory.read(self.buffer(used.head), record)?;
        let event = Event::decode(record);
        if event.is_none() {
            self.counters.ignored += 1;
        }
        Ok(Some(event))
    }

    fn buffer(&self, head: u16) -> Gpa {
        Gpa(self.buffers.0 + BUFFER_STRIDE * u64::from(head))
    }
}

impl<P: Platform, T: Transport> Driver<P, T> {
    /// Hands every event that has arrived to `handler` and gives its buffer back to the device: what the interrupt of
    /// the event queue has to do. Gives the number of events handled.
    ///
    /// No more than a queue of events is handled at once, so that a device that never stops does not keep the
    /// driver here.
    ///
    /// # Errors
    /// [`QueueError`] where the device broke the protocol; events that were collected have been handled.
    pub fn handle_events(&mut self, mut handler: impl FnMut(Event)) -> Result<usize, QueueError> {
        let memory = self.platform.memory();
        let mut handled = 0u64;
        let mut outcome = Ok(());
        while let Some(event) = self.events.kept.pop_front() {
            handled += 1;
            handler(event);
        }
        for _ in 0..self.events.layout().size {
            match self.events.take(memory) {
                Ok(Some(event)) => {
                    if let Some(event) = event {
                        handled += 1;
                        handler(event);
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
        }
        self.events.counters.delivered += handled;
        self.post_event_buffers()?;
        outcome.map(|()| usize::try_from(handled).unwrap_or(usize::MAX))
    }

    /// Takes the events that have arrived, those that an earlier call kept and at most a queue of others, and gives
    /// their buffers back. `take` gets each; those that it gives back are kept, in order, for
    /// [`handle_events`](Self::handle_events).
    ///
    /// # Errors
    /// [`SweepError`]; events that were collected are taken or kept.
    pub(crate) fn sweep_events(
        &mut self,
        mut take: impl FnMut(Event) -> Option<Event>,
    ) -> Result<(), SweepError> {
        let mut outcome = Ok(());
        for _ in 0..self.events.kept.len() {
            match self.events.kept.pop_front().and_then(&mut take) {
                Some(event) => self.events.kept.push_back(event),
                None => self.events.counters.delivered += 1,
            }
        }
        for _ in 0..self.events.layout().size {
            if self.events.kept.len() >= MAX_KEPT_EVENTS {
                outcome = Err(SweepError::Kept);
                break;
            }
            match self.events.take(self.platform.memory()) {
                Ok(Some(event)) => {
                    let Some(event) = event else { continue };
                    match take(event) {
                        Some(event) => self.events.kept.push_back(event),
                        None => self.events.counters.delivered += 1,
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    outcome = Err(error.into());
                    break;
                }
            }
        }
        self.post_event_buffers()?;
        outcome
    }

    /// How many events are kept for [`handle_events`](Self::handle_events): some may wait there although the queue is
    /// empty, after a PASID was unbound.
    pub fn kept_events(&self) -> usize {
        self.events.kept.len()
    }

    fn post_event_buffers(&mut self) -> Result<(), QueueError> {
        if self.events.post(self.platform.memory())? {
            self.transport.notify(numbers::EVENT_QUEUE);
        }
        Ok(())
    }

    /// What became of events so far.
    pub const fn event_counters(&self) -> &EventCounters {
        &self.events.counters
    }
}
