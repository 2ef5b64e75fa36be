//! The event queue: the driver's buffers in, events out.

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryBackend;

use crate::chain::ChainBuffers;
use crate::error::QueueError;
use crate::kick::{self, Answer, Kick};

/// Bytes of a buffer that are offered for an event. The longest event has 48.
pub const EVENT_LIMIT: usize = 256;

/// A split virtqueue of writable buffers, each for one event.
#[derive(Debug)]
pub struct EventQueue {
    queue: Queue,
    buffers: ChainBuffers,
}

impl EventQueue {
    /// A queue of at most `max_size` entries.
    ///
    /// # Errors
    /// Where `max_size` is not a power of two from 1 to 32768.
    pub fn new(max_size: u16) -> Result<Self, virtio_queue::Error> {
        Ok(Self { queue: Queue::new(max_size)?, buffers: ChainBuffers::new(0, EVENT_LIMIT) })
    }

    /// Configuration and position, for the transport.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Configuration and position, for the transport.
    pub fn queue_mut(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// Gives one buffer after the other to `fill` until it answers `None`: there is no event; that buffer stays in the
    /// ring. `Some(n)` gives the buffer back with `n` bytes. `Some(0)` is a buffer that is too small: it goes back
    /// unwritten, and `fill` keeps the event for the next one; an event never spans buffers (D-58).
    ///
    /// # Errors
    /// Where the queue itself is unusable; `fill` was not called then.
    pub fn kick<M: GuestMemoryBackend>(
        &mut self,
        memory: &M,
        mut fill: impl FnMut(&mut [u8]) -> Option<usize>,
    ) -> Result<Kick, QueueError> {
        kick::run("event", &mut self.queue, &mut self.buffers, memory, |_, writable| match fill(writable) {
            Some(used) => Answer::Used(used),
            None => Answer::Keep,
        })
    }
}
