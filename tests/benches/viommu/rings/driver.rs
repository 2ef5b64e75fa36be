//! A driver that keeps its buffers, as one of a kernel does.

use std::time::Duration;

use viommu_guest::hal::GuestMem;
use viommu_guest::queue::{Buffer, Queue, QueueOptions};
use viommu_queue::{REQUEST_QUEUE, RequestQueue};
use viommu_tests::rig::{Machine, Setup};
use viommu_wire::{Gpa, Request, Tail};

use crate::measure::Stopwatch;

/// Chains of two buffers, for a batch of 256.
const QUEUE_SIZE: u16 = 512;
/// From one request's buffer to the next; the tail lies behind the request.
const STRIDE: u64 = 256;
const TAIL_AT: u64 = 192;

pub(crate) struct Driver {
    machine: Machine,
    queue: Queue,
    buffers: Gpa,
    stopwatch: Stopwatch,
}

impl Driver {
    pub(crate) fn new(setup: Setup) -> Self {
        let machine = Machine::new(setup);
        let offered = machine.lock().offered_features();
        machine.lock().accept_features(offered).expect("what is offered");
        let mut alloc = machine.alloc();
        let options = QueueOptions { event_idx: true, indirect: 0, interrupts: true };
        let queue = Queue::new(machine.memory(), &mut alloc, QUEUE_SIZE, options).expect("a queue");
        assert!(machine.enable_queue(REQUEST_QUEUE as u16, queue.layout()), "the device takes the queue");
        let buffers = alloc.take(17);
        Self { machine, queue, buffers, stopwatch: Stopwatch::new() }
    }

    /// Sends `requests` with one kick and gives the device's time. Each has to succeed.
    pub(crate) fn send(&mut self, requests: &[Request]) -> Duration {
        self.publish(requests);
        let (time, notify) = {
            let mut iommu = self.machine.lock();
            self.stopwatch.time(|| iommu.kick_requests(self.machine.memory().map()))
        };
        let again = notify.expect("a usable queue").again;
        assert!(!again, "all is done");
        for at in self.collect(requests.len()) {
            let mut tail = [0; Tail::LEN];
            self.machine.memory().read(Gpa(at + TAIL_AT), &mut tail).expect("memory");
            assert_eq!(tail, [0; Tail::LEN], "status of a request");
        }
        time
    }

    /// The same with a handler that looks at nothing and answers OK.
    pub(crate) fn send_to_nobody(&mut self, requests: &[Request]) -> Duration {
        self.publish(requests);
        let mut iommu = self.machine.lock();
        let place = iommu.queue_mut(REQUEST_QUEUE).expect("a queue");
        // The device's own ring, position and all.
        let mut nobody = RequestQueue::new(QUEUE_SIZE, 4).expect("a queue");
        std::mem::swap(place, nobody.queue_mut());
        let memory = self.machine.memory().map();
        let (time, kick) = self.stopwatch.time(|| nobody.kick(memory, |_, writable| writable.len()));
        assert_eq!(kick.expect("a usable queue").served as usize, requests.len());
        std::mem::swap(iommu.queue_mut(REQUEST_QUEUE).expect("a queue"), nobody.queue_mut());
        drop(iommu);
        self.collect(requests.len()).for_each(drop);
        time
    }

    fn publish(&mut self, requests: &[Request]) {
        let memory = self.machine.memory();
        for (at, request) in (self.buffers.0..).step_by(STRIDE as usize).zip(requests) {
            let bytes = request.encode();
            memory.write(Gpa(at), &bytes).expect("memory");
            memory.write(Gpa(at + TAIL_AT), &[0xff; Tail::LEN]).expect("memory");
            let readable = Buffer { at: Gpa(at), length: bytes.len() as u32 };
            let writable = Buffer { at: Gpa(at + TAIL_AT), length: Tail::LEN as u32 };
            self.queue.add(memory, &[readable], &[writable]).expect("room");
        }
        assert!(self.queue.publish(memory).expect("memory"), "the device asked for a kick");
    }

    /// Takes back all chains; where their buffers are.
    fn collect(&mut self, count: usize) -> impl Iterator<Item = u64> + use<> {
        for _ in 0..count {
            let used =
                self.queue.collect(self.machine.memory()).expect("an honest device").expect("an answer");
            assert_eq!(used.written as usize, Tail::LEN);
        }
        (self.buffers.0..).step_by(STRIDE as usize).take(count)
    }
}
