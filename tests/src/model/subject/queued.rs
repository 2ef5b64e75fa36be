//! The device behind its queues.

use std::sync::Arc;

use viommu_device::Device;
use viommu_guest::queue::{Buffer, Queue, QueueOptions};
use viommu_queue::loopback::{self, place_queue};
use viommu_wire::numbers::{EVENT_QUEUE, REQUEST_QUEUE};
use viommu_wire::{Features, Gpa};

use super::super::layout::MEMORY_BYTES;
use super::super::world::World;
use super::{Called, Machine, Native, Observed, Subject};
use crate::rig::{Alloc, Memory, Reply, UNWRITTEN};

const QUEUE_SIZE: u16 = 256;
/// Features of the transport that stay negotiated.
const TRANSPORT: Features =
    Features::VERSION_1.union(Features::RING_EVENT_IDX).union(Features::RING_INDIRECT_DESC);

/// The device with its queues, and a driver that sends whatever it is given.
pub struct Queued<H: Machine = Native> {
    machine: loopback::Machine<Observed<H>>,
    memory: Memory,
    /// Requests, events.
    queues: [Queue; 2],
    scratch: Gpa,
}

impl<H: Machine> Queued<H> {
    /// Rings for a device that was reset.
    fn queues(machine: &loopback::Machine<Observed<H>>, memory: &Memory) -> ([Queue; 2], Gpa) {
        let mut alloc = Alloc::new(memory);
        let queues = [REQUEST_QUEUE, EVENT_QUEUE].map(|index| {
            let options = QueueOptions { event_idx: true, indirect: 0, interrupts: true };
            let queue = Queue::new(memory, &mut alloc, QUEUE_SIZE, options).expect("a queue");
            let mut iommu = machine.lock();
            place_queue(iommu.queue_mut(index.into()).expect("a queue"), queue.layout()).expect("a place");
            queue
        });
        (queues, alloc.take(16))
    }

    /// Sends one chain, which comes back, unless it is an event buffer and there is no event.
    fn send(&mut self, index: u16, readable: &[&[u8]], writable: &[usize]) -> Option<Reply> {
        let Self { machine, memory, queues, scratch } = self;
        let queue = &mut queues[usize::from(index)];
        let mut next = scratch.0;
        let mut buffer = |bytes: &[u8]| {
            let at = Gpa(next);
            // With a gap to the one before.
            next += bytes.len() as u64 + 3;
            memory.write(at, bytes).expect("memory");
            Buffer { at, length: bytes.len() as u32 }
        };
        let readable: Vec<Buffer> = readable.iter().map(|bytes| buffer(bytes)).collect();
        let writable: Vec<Buffer> = writable.iter().map(|&len| buffer(&vec![UNWRITTEN; len])).collect();
        queue.add(&*memory, &readable, &writable).expect("room in the ring");
        if queue.publish(&*memory).expect("rings in memory") {
            let _ = machine.kick(index).expect("a usable queue");
        }
        let used = queue.collect(&*memory).expect("an honest device")?;
        let mut bytes = Vec::new();
        for part in writable {
            let start = bytes.len();
            bytes.resize(start + part.length as usize, 0);
            memory.read(part.at, &mut bytes[start..]).expect("memory");
        }
        Some(Reply { used: used.written as usize, bytes })
    }
}

use viommu_guest::hal::GuestMem;

impl<H: Machine> Subject for Queued<H> {
    fn power_on(world: &Arc<World>) -> Self {
        let memory = Memory::new(MEMORY_BYTES);
        let host = Observed::new(H::make(world, &memory));
        let device = Device::new(world.device_config(), host).expect("a configuration");
        let machine = loopback::Machine::new(memory.clone(), device, QUEUE_SIZE).expect("a queue size");
        machine.lock().accept_features(TRANSPORT).expect("what is offered");
        let (queues, scratch) = Self::queues(&machine, &memory);
        Self { machine, memory, queues, scratch }
    }

    fn worlds() -> Vec<World> {
        H::worlds()
    }

    fn request(&mut self, readable: &[u8], writable: usize, cut: usize) -> Reply {
        if readable.is_empty() && writable == 0 {
            return Reply { used: 0, bytes: vec![] }; // A chain has at least one byte.
        }
        let size = |len: usize| len.div_ceil(cut.clamp(1, 8)).max(1);
        let parts: Vec<&[u8]> = readable.chunks(size(readable.len())).collect();
        let step = size(writable);
        let room: Vec<usize> = (0..writable).step_by(step).map(|at| step.min(writable - at)).collect();
        self.send(REQUEST_QUEUE, &parts, &room).expect("an answer")
    }

    fn with_device<R>(&mut self, call: impl FnOnce(&mut dyn Called) -> R) -> R {
        call(self.machine.lock().device_mut())
    }

    fn memory(&self) -> &Memory {
        &self.memory
    }

    fn reset(&mut self, system: bool, features: u64) {
        {
            let mut iommu = self.machine.lock();
            if system {
                iommu.system_reset();
            } else {
                iommu.reset();
            }
            let accepted = Features::from_bits_retain(features) & iommu.offered_features();
            iommu.accept_features(accepted | TRANSPORT).expect("what is offered");
        }
        (self.queues, self.scratch) = Self::queues(&self.machine, &self.memory);
    }

    fn accept(&mut self, features: u64) -> bool {
        let features = Features::from_bits_retain(features) | TRANSPORT;
        self.machine.lock().accept_features(features).is_ok()
    }

    fn take_event(&mut self, len: usize) -> Option<Vec<u8>> {
        // A buffer would stay in the ring for a later event.
        if !self.with_device(|device| device.has_event()) {
            return None;
        }
        // A buffer has at least one byte.
        let reply = self.send(EVENT_QUEUE, &[], &[len.max(1)]).expect("an event and a buffer for it");
        Some(reply.bytes[..reply.used].to_vec())
    }
}
