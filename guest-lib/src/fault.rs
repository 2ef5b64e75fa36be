//! Faults: what the device tells the driver unasked.

use pgtable_formats::TableAlloc;
use viommu_wire::{Event, Gpa, numbers};

use crate::Driver;
use crate::hal::{GuestMem, Platform, QueueLayout, Transport};
use crate::queue::{self, Buffer, Queue, QueueError, QueueOptions};

/// Bytes of an event buffer: the longest record that is known, a page request.
const BUFFER: u32 = 48;
const BUFFER_STRIDE: u64 = 64;

/// What became of events so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventCounters {
    /// Handed to the handler.
    pub delivered: u64,
    /// Records that a driver must ignore: too short, or with reserved bytes set.
    pub ignored: u64,
}

/// The event queue with a buffer for every descriptor.
#[derive(Debug)]
pub(crate) struct EventRing {
    queue: Queue,
    buffers: Gpa,
    counters: EventCounters,
}

impl EventRing {
    pub(crate) fn new<M: GuestMem, A: TableAlloc>(
        memory: &M,
        alloc: &mut A,
        size: u16,
        event_idx: bool,
    ) -> Result<Self, QueueError> {
        let queue =
            Queue::new(memory, alloc, size, QueueOptions { event_idx, indirect: 0, interrupts: true })?;
        let buffers = queue::allocate(alloc, BUFFER_STRIDE * u64::from(size))?;
        Ok(Self { queue, buffers, counters: EventCounters::default() })
    }

    pub(crate) const fn layout(&self) -> QueueLayout {
        self.queue.layout()
    }

    /// Gives the device every buffer that it does not have. `true`: it wants to be notified.
    pub(crate) fn post<M: GuestMem>(&mut self, memory: &M) -> Result<bool, QueueError> {
        while let Some(head) = self.queue.next_head(1) {
            let buffer = Buffer { at: self.buffer(head), length: BUFFER };
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
        let mut bytes = [0; BUFFER as usize];
        memory.read(self.buffer(used.head), &mut bytes)?;
        let record = usize::try_from(used.written).ok().and_then(|written| bytes.get(..written));
        let event = record.and_then(Event::decode);
        match event {
            Some(_) => self.counters.delivered += 1,
            None => self.counters.ignored += 1,
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
        let mut handled = 0;
        let mut outcome = Ok(());
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
        if self.events.post(memory)? {
            self.transport.notify(numbers::EVENT_QUEUE);
        }
        outcome.map(|()| handled)
    }

    /// What became of events so far.
    pub const fn event_counters(&self) -> &EventCounters {
        &self.events.counters
    }
}
