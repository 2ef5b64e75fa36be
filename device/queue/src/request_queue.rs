//! The request queue: chains in, answers out.

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryBackend;

use crate::chain::ChainBuffers;
use crate::error::QueueError;
use crate::kick::{self, Answer, Kick};

/// Bytes of a request that are fetched; what is behind them is not read. The longest request has 128.
pub const READABLE_LIMIT: usize = 4096;

/// A split virtqueue whose chains are a readable part, then a writable one.
#[derive(Debug)]
pub struct RequestQueue {
    queue: Queue,
    buffers: ChainBuffers,
}

impl RequestQueue {
    /// A queue of at most `max_size` entries. Of a writable part, the first `writable_limit` bytes are offered to the
    /// device.
    ///
    /// # Errors
    /// Where `max_size` is not a power of two from 1 to 32768.
    pub fn new(max_size: u16, writable_limit: usize) -> Result<Self, virtio_queue::Error> {
        Ok(Self { queue: Queue::new(max_size)?, buffers: ChainBuffers::new(READABLE_LIMIT, writable_limit) })
    }

    /// Configuration and position, for the transport.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Configuration and position, for the transport.
    pub fn queue_mut(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// Takes all that is in the ring. `handle` gets the readable part of each chain and a zeroed buffer for the
    /// writable one, and says how many bytes of it go back to the driver.
    ///
    /// A chain that breaks the rules is not shown to `handle`; it is given back with used length 0.
    ///
    /// # Errors
    /// Where the queue itself is unusable; nothing was taken then.
    pub fn kick<M: GuestMemoryBackend>(
        &mut self,
        memory: &M,
        mut handle: impl FnMut(&[u8], &mut [u8]) -> usize,
    ) -> Result<Kick, QueueError> {
        kick::run("request", &mut self.queue, &mut self.buffers, memory, |readable, writable| {
            Answer::Used(handle(readable, writable))
        })
    }
}
