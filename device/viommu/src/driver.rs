//! A driver that puts one chain at a time into a ring, just as it is told.
//!
//! The guest library's queue makes only chains that a correct driver makes. Somebody who debugs a device also wants the
//! others: cut anywhere, too short, with descriptors of length 0.

use anyhow::{Context as _, ensure};
use viommu_guest::hal::QueueLayout;
use viommu_wire::numbers::{EVENT_QUEUE, REQUEST_QUEUE};
use viommu_wire::{Features, Gpa};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::machine::{MAX_QUEUE_SIZE, Machine};

/// Descriptors of the queue: the most parts that a chain may have.
pub(crate) const MAX_PARTS: usize = 1024;
/// Most bytes of the readable parts together, and of the writable ones.
pub(crate) const MAX_PART_BYTES: usize = 1 << 20;
/// Bytes of memory that one queue takes, its buffers included.
const FOOTPRINT: u64 = 4 << 20;
const SIZE: u16 = 1024;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x5000;
const READABLE: u64 = 0x10_0000;
const WRITABLE: u64 = 0x20_0000;

const DESCRIPTOR: u64 = 16;
const RING_HEAD: u64 = 4;
const USED_ELEMENT: u64 = 8;
const INDEX: u64 = 2;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

const _: () = assert!(
    MAX_PARTS == SIZE as usize
        && DESCRIPTOR * SIZE as u64 <= AVAILABLE
        && AVAILABLE + RING_HEAD + 2 * SIZE as u64 + 2 <= USED
        && USED + RING_HEAD + USED_ELEMENT * SIZE as u64 + 2 <= READABLE
        && READABLE + MAX_PART_BYTES as u64 <= WRITABLE
        && WRITABLE + MAX_PART_BYTES as u64 <= FOOTPRINT
        && 2 * FOOTPRINT <= Machine::RINGS_BYTES
        && SIZE <= MAX_QUEUE_SIZE
);

/// The driver: its two queues lie in [`Machine::RINGS`].
pub(crate) struct RawDriver {
    requests: RawQueue,
    events: RawQueue,
}

/// One queue, seen by its driver.
struct RawQueue {
    index: u16,
    base: u64,
    /// Chains made available so far.
    added: u16,
}

/// What came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// The used length.
    pub(crate) used: u32,
    /// All of the writable part.
    pub(crate) writable: Vec<u8>,
}

impl RawDriver {
    /// What a driver does after a reset: it accepts features and enables its queues.
    pub(crate) fn start(machine: &mut Machine, features: Features) -> anyhow::Result<Self> {
        machine.accept_features(features)?;
        let requests = RawQueue::enable(machine, REQUEST_QUEUE, Machine::RINGS)?;
        let events = RawQueue::enable(machine, EVENT_QUEUE, Gpa(Machine::RINGS.0 + FOOTPRINT))?;
        Ok(Self { requests, events })
    }

    /// Sends a request: each part is a descriptor, the writable ones are zeroed before.
    ///
    /// # Errors
    /// No part, too many, too long; or the device did not give the chain back.
    pub(crate) fn request(
        &mut self,
        machine: &mut Machine,
        readable: &[Vec<u8>],
        writable: &[usize],
    ) -> anyhow::Result<Answer> {
        self.requests.send(machine, readable, writable)
    }

    /// Offers a buffer for an event. `None` where no event waits: a buffer that is posted cannot be taken back, so none
    /// is posted then.
    ///
    /// # Errors
    /// The device did not give the buffer back.
    pub(crate) fn event(&mut self, machine: &mut Machine, length: usize) -> anyhow::Result<Option<Answer>> {
        if !machine.device_mut().event_pending() {
            return Ok(None);
        }
        self.events.send(machine, &[], &[length]).map(Some)
    }
}

impl RawQueue {
    /// Zeroes the rings of queue `index` at `base` and enables it.
    fn enable(machine: &mut Machine, index: u16, base: Gpa) -> anyhow::Result<Self> {
        let base = base.0;
        // Not the buffers: they are written before each use.
        machine.memory().write_slice(&vec![0; 0x8000], GuestAddress(base))?;
        let layout = QueueLayout {
            size: SIZE,
            descriptors: Gpa(base),
            available: Gpa(base + AVAILABLE),
            used: Gpa(base + USED),
        };
        machine.enable_queue(index, layout)?;
        Ok(Self { index, base, added: 0 })
    }

    /// Makes a chain of the parts, zeroes the writable ones, notifies the device, and takes the chain back.
    fn send(
        &mut self,
        machine: &mut Machine,
        readable: &[Vec<u8>],
        writable: &[usize],
    ) -> anyhow::Result<Answer> {
        let parts = readable.len() + writable.len();
        ensure!(parts != 0, "a chain has at least one descriptor");
        ensure!(parts <= MAX_PARTS, "a chain has at most {MAX_PARTS} descriptors");
        let written: usize = writable.iter().sum();
        ensure!(readable.iter().map(Vec::len).sum::<usize>() <= MAX_PART_BYTES, "readable part too long");
        ensure!(written <= MAX_PART_BYTES, "writable part too long");
        self.lay_out(machine.memory(), readable, writable)?;
        self.publish(machine.memory())?;
        // The answer says whether to interrupt; this driver looks for itself.
        let _ = machine.notify(self.index)?;
        let used = self.collect(machine.memory())?.context("the device kept the chain")?;
        let mut bytes = vec![0; written];
        machine.memory().read_slice(&mut bytes, GuestAddress(self.base + WRITABLE))?;
        Ok(Answer { used, writable: bytes })
    }

    /// Writes buffers and descriptors, from descriptor 0 on.
    fn lay_out(
        &self,
        memory: &GuestMemoryMmap,
        readable: &[Vec<u8>],
        writable: &[usize],
    ) -> anyhow::Result<()> {
        let mut chain = Vec::with_capacity(readable.len() + writable.len());
        let mut at = self.base + READABLE;
        for part in readable {
            memory.write_slice(part, GuestAddress(at))?;
            chain.push((at, part.len(), 0));
            at += part.len() as u64;
        }
        let mut at = self.base + WRITABLE;
        memory.write_slice(&vec![0; writable.iter().sum()], GuestAddress(at))?;
        for &length in writable {
            chain.push((at, length, WRITE));
            at += length as u64;
        }
        let last = chain.len().saturating_sub(1);
        for (index, &(at, length, flags)) in chain.iter().enumerate() {
            let (flags, next) =
                if index == last { (flags, 0) } else { (flags | NEXT, u16::try_from(index + 1)?) };
            let word = u64::try_from(length)? | u64::from(flags) << 32 | u64::from(next) << 48;
            let place = GuestAddress(self.base + DESCRIPTOR * index as u64);
            memory.write_obj([at.to_le(), word.to_le()], place)?;
        }
        Ok(())
    }

    /// Makes the chain that starts at descriptor 0 available.
    fn publish(&mut self, memory: &GuestMemoryMmap) -> anyhow::Result<()> {
        let available = self.base + AVAILABLE;
        let slot = u64::from(self.added % SIZE);
        memory.write_obj(0u16, GuestAddress(available + RING_HEAD + 2 * slot))?;
        self.added = self.added.wrapping_add(1);
        // Device and driver take turns on one thread: no barrier is missing.
        memory.write_obj(self.added.to_le(), GuestAddress(available + INDEX))?;
        Ok(())
    }

    /// The used length of the chain published last; `None` where the device still has it.
    fn collect(&self, memory: &GuestMemoryMmap) -> anyhow::Result<Option<u32>> {
        let used = self.base + USED;
        let index: u16 = memory.read_obj(GuestAddress(used + INDEX))?;
        if u16::from_le(index) != self.added {
            return Ok(None);
        }
        let slot = u64::from(self.added.wrapping_sub(1) % SIZE);
        let length: u32 = memory.read_obj(GuestAddress(used + RING_HEAD + USED_ELEMENT * slot + 4))?;
        Ok(Some(u32::from_le(length)))
    }
}
