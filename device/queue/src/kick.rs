//! Taking what is in a ring, for both queues.

use virtio_queue::Queue;
use vm_memory::GuestMemoryBackend;

use crate::chain::ChainBuffers;
use crate::error::{ChainError, QueueError};
use crate::ring::Ring;

/// How often the available index is read again before a kick ends: a guest that keeps adding must not keep the
/// device's thread. One pass takes at most as many chains as the queue has entries.
pub const MAX_PASSES: usize = 4;

/// Refused chains that are named in the log, per kick; the rest are counted there.
const MAX_WARNINGS: u32 = 8;

/// What a kick did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "the driver may wait for the notification"]
pub struct Kick {
    /// Chains given back with an answer of the device.
    pub served: u32,
    /// Chains given back unwritten, or skipped, because they break the rules of the ring.
    pub refused: u32,
    /// The first of those, by its head, and why.
    pub refusal: Option<(u16, ChainError)>,
    /// The driver asked to be notified.
    pub notify: bool,
    /// There is more in the ring, and the driver may not kick for it: kick again, after other work.
    pub again: bool,
}

/// What to do with a chain whose parts were gathered.
pub(crate) enum Answer {
    /// Give it back with so many bytes of the writable part.
    Used(usize),
    /// Leave it, and what is behind it, in the ring; the kick is over.
    Keep,
}

/// Gives each available chain to `answer`, publishes once for all that were there, and decides about the
/// notification once.
pub(crate) fn run<M: GuestMemoryBackend>(
    name: &'static str,
    queue: &mut Queue,
    buffers: &mut ChainBuffers,
    memory: &M,
    mut answer: impl FnMut(&[u8], &mut [u8]) -> Answer,
) -> Result<Kick, QueueError> {
    let (mut ring, mut view) = Ring::open(queue, memory)?;
    let mut kick = Kick::default();
    let mut pending = ring.pending()?;
    for _ in 0..MAX_PASSES {
        if pending == 0 {
            break;
        }
        let mut taken = 0;
        while taken < pending {
            let head = ring.head();
            let answered = if head >= ring.size() {
                Err(ChainError::Head(head))
            } else {
                buffers.gather(&ring, &mut view, head).map(|()| {
                    let (readable, writable) = buffers.parts();
                    answer(readable, writable)
                })
            };
            match answered {
                Ok(Answer::Keep) => break,
                Ok(Answer::Used(used)) => {
                    let used = buffers.scatter(&mut view, used);
                    ring.complete(head, used);
                    kick.served += 1;
                }
                Err(error) => {
                    refuse(name, head, error, &mut kick);
                    if head < ring.size() {
                        ring.complete(head, 0);
                    }
                }
            }
            ring.advance();
            taken += 1;
        }
        if taken > 0 {
            ring.publish();
        }
        if taken < pending {
            pending = 0;
            break;
        }
        pending = match ring.pending() {
            Ok(pending) => pending,
            Err(error) => {
                // What was done stands; the next kick reports it if it is still so.
                tracing::warn!(queue = name, %error, "available ring");
                0
            }
        };
    }
    if kick.refused > MAX_WARNINGS {
        tracing::warn!(queue = name, more = kick.refused - MAX_WARNINGS, "further chains refused");
    }
    kick.again = pending != 0;
    kick.notify = ring.wants_notification();
    Ok(kick)
}

#[cold]
fn refuse(name: &'static str, head: u16, error: ChainError, kick: &mut Kick) {
    kick.refused += 1;
    kick.refusal.get_or_insert((head, error));
    if kick.refused <= MAX_WARNINGS {
        tracing::warn!(queue = name, head, %error, "chain refused");
    }
}
