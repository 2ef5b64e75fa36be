//! Guest and device back to back: real split virtqueues in one shared guest memory.
//!
//! - [`Machine`]: the VMM's side. Memory, the device with its queues on a `SoftHost`, and the DMA of its endpoints.
//! - [`Rig`]: a machine and a driver that sends any bytes at all, cut in any way.
//! - [`Guest`]: a machine and the driver of `viommu-guest`.
//! - [`Bare`]: a device without queues: bytes in, bytes out.
//! - [`Scripted`]: a hostile or merely odd device, for the driver.
//! - [`Flaky`]: a host that fails where it is told to.
//!
//! ```
//! use viommu_tests::rig::{Rig, Sends, Setup, request};
//! use viommu_wire::Status;
//!
//! let mut rig = Rig::new(Setup::default());
//! assert_eq!(rig.send(&request::attach(1, 8)), Status::Ok);
//! assert_eq!(rig.send(&request::map(1, 0x1000, 0x1fff, 0x4010_0000)), Status::Ok);
//! assert_eq!(rig.machine.write(8, 0x1234), Some(0x4010_0234));
//! ```

mod bare;
mod flaky;
mod guest;
mod machine;
pub mod request;
mod scripted;

use std::collections::HashMap;

use pgtable_formats::TableMem;
use viommu_guest::hal::GuestMem;
use viommu_guest::queue::{Buffer, Queue, QueueOptions};
use viommu_wire::numbers::{EVENT_QUEUE, REQUEST_QUEUE};
use viommu_wire::{Event, Features, Gpa, Request, Status, Tail};
use vm_memory::{Bytes, GuestAddress};

pub use bare::Bare;
pub use flaky::{Call, Flaky};
pub use guest::Guest;
pub use machine::{Iommu, Machine, Setup, default_endpoints, reserved, smmuv3, vtd};
pub use scripted::{Script, Scripted};
pub use viommu_queue::loopback::{Alloc, Memory, Port, Transport};

/// What unwritten bytes of a device-writable part look like.
pub const UNWRITTEN: u8 = 0xee;

/// The endpoint that [`Rig::works`] uses.
pub const WITNESS: u32 = 24;

/// What came back of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The used length.
    pub used: usize,
    /// The whole device-writable part; bytes that the device did not write are [`UNWRITTEN`].
    pub bytes: Vec<u8>,
}

impl Reply {
    /// The status, where the written part ends in a tail whose reserved bytes are zero (D-13).
    pub fn status(&self) -> Option<Status> {
        let tail = self.bytes.get(self.used.checked_sub(Tail::LEN)?..self.used)?;
        assert_eq!(tail[1..], [0; 3], "reserved bytes of the tail");
        Some(Tail::decode(tail).expect("a status without meaning").status)
    }

    /// Whether the chain came back unwritten, with length 0 (D-10).
    pub fn is_unwritten(&self) -> bool {
        self.used == 0 && self.bytes.iter().all(|&byte| byte == UNWRITTEN)
    }
}

/// Sends requests as bytes: to the device behind queues, or to the device alone.
pub trait Sends {
    /// Sends one request of these device-readable bytes, with `writable` bytes for the answer.
    fn raw(&mut self, readable: &[u8], writable: usize) -> Reply;

    /// Sends a request whose answer is a tail of 4 bytes.
    fn send(&mut self, request: &Request) -> Status {
        self.send_bytes(&request.encode())
    }

    /// The same from bytes; checks the used length.
    fn send_bytes(&mut self, readable: &[u8]) -> Status {
        let reply = self.raw(readable, Tail::LEN);
        assert_eq!(reply.used, Tail::LEN, "no answer to {readable:02x?}");
        reply.status().expect("a tail")
    }
}

/// A machine, and a driver that sends whatever it is given.
///
/// Chains are put into the ring by the queue of `viommu-guest`, so they obey the rules of the ring; what they hold
/// need not obey anything.
pub struct Rig {
    /// The VMM's side.
    pub machine: Machine,
    alloc: Alloc,
    requests: Driven,
    events: Driven,
}

/// A queue with what is in flight.
struct Driven {
    index: u16,
    queue: Queue,
    /// Writable buffers by head.
    writable: HashMap<u16, Vec<Buffer>>,
    /// Heads in the order in which they were added.
    order: Vec<u16>,
    scratch: Gpa,
    next: u64,
}

const SCRATCH_LG2: u8 = 20;
const QUEUE_SIZE: u16 = 256;

impl Rig {
    /// A machine whose device is reset, negotiated and started.
    pub fn new(setup: Setup) -> Self {
        let accept = setup.accept;
        let machine = Machine::new(setup);
        Self::start(machine, accept)
    }

    /// A driver for a machine that is reset: negotiates `accept` of what is offered (`None`: all) and enables the
    /// queues.
    pub fn start(machine: Machine, accept: Option<Features>) -> Self {
        let mut alloc = machine.alloc();
        let offered = machine.lock().offered_features();
        let accepted = accept.map_or(offered, |accept| accept & offered | Features::VERSION_1);
        machine.lock().accept_features(accepted).expect("a choice of what is offered");
        let event_idx = accepted.contains(Features::RING_EVENT_IDX);
        let requests = Driven::new(&machine, &mut alloc, REQUEST_QUEUE, event_idx);
        let events = Driven::new(&machine, &mut alloc, EVENT_QUEUE, event_idx);
        Self { machine, alloc, requests, events }
    }

    /// Resets the device and starts it again with these features.
    pub fn restart(self, accept: Option<Features>) -> Self {
        self.machine.lock().reset();
        Self::start(self.machine, accept)
    }

    /// The allocator that the rings came from.
    pub fn alloc(&mut self) -> &mut Alloc {
        &mut self.alloc
    }

    /// Sends one chain: each part is a buffer of its own.
    pub fn raw_parts(&mut self, readable: &[&[u8]], writable: &[usize]) -> Reply {
        self.add(readable, writable);
        let mut replies = self.kick();
        assert_eq!(replies.len(), 1);
        replies.remove(0)
    }

    /// Puts one chain into the ring; the device sees it at the next [`kick`](Self::kick).
    pub fn add(&mut self, readable: &[&[u8]], writable: &[usize]) {
        self.requests.add(self.machine.memory(), readable, writable);
    }

    /// Publishes what was added, notifies the device, and takes every chain back, in the order of adding.
    pub fn kick(&mut self) -> Vec<Reply> {
        self.requests.publish(&self.machine);
        let replies = self.requests.collect(self.machine.memory());
        assert!(self.requests.order.is_empty(), "the device kept chains");
        replies
    }

    /// Sends what must be refused with `status`: nothing that anybody can notice changes, and the device works on.
    pub fn refuse(&mut self, readable: &[u8], status: Status) {
        let before = self.machine.snapshot();
        assert_eq!(self.send_bytes(readable), status, "{readable:02x?}");
        assert_eq!(self.machine.snapshot(), before, "{readable:02x?} changed something");
        self.works();
    }

    /// Sends what must come back unwritten: nothing that anybody can notice changes, and the device works on.
    pub fn leave_unwritten(&mut self, readable: &[u8], writable: usize) {
        let before = self.machine.snapshot();
        let reply = self.raw(readable, writable);
        assert!(reply.is_unwritten(), "{readable:02x?}: {reply:02x?}");
        assert_eq!(self.machine.snapshot(), before, "{readable:02x?} changed something");
        self.works();
    }

    /// That the device works: endpoint [`WITNESS`], which tests leave alone, is attached, moves bytes through a mapping,
    /// and is detached; nobody else notices.
    pub fn works(&mut self) {
        const DOMAIN: u32 = 77;
        const IOVA: u64 = 0x7000_0000;
        let before = self.machine.snapshot();
        let target = Memory::page(1);
        let dma = self.machine.dma(WITNESS, None);
        assert_eq!(self.send(&request::attach(DOMAIN, WITNESS)), Status::Ok);
        assert!(dma.write_slice(&[1], GuestAddress(IOVA)).is_err());
        assert_eq!(self.send(&request::map(DOMAIN, IOVA, IOVA + 0xfff, target.0)), Status::Ok);
        self.machine.memory().store(target, 0);
        dma.write_slice(&[0x5a; 8], GuestAddress(IOVA)).expect("mapped");
        assert_eq!(self.machine.memory().load(target), Ok(0x5a5a_5a5a_5a5a_5a5a));
        assert_eq!(self.send(&request::unmap(DOMAIN, IOVA, IOVA + 0xfff)), Status::Ok);
        assert!(dma.write_slice(&[1], GuestAddress(IOVA)).is_err());
        assert_eq!(self.send(&request::detach(DOMAIN, WITNESS)), Status::Ok);
        assert_eq!(self.machine.snapshot(), before);
        self.events(); // Of the two accesses that had to fault.
    }

    /// Offers an event buffer of `len` bytes.
    pub fn post_event_buffer(&mut self, len: usize) {
        self.events.add(self.machine.memory(), &[], &[len]);
        self.events.publish(&self.machine);
    }

    /// Lets the device deliver what endpoints did meanwhile, and takes back the event buffers that it used.
    pub fn event_replies(&mut self) -> Vec<Reply> {
        self.machine.deliver_events();
        self.events.collect(self.machine.memory())
    }

    /// Offers one buffer of 48 bytes for each event that waits, and gives the events.
    pub fn events(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        while self.machine.lock().device_mut().event_pending() {
            self.post_event_buffer(48);
            for reply in self.event_replies() {
                events.push(Event::decode(&reply.bytes[..reply.used]).expect("an event"));
            }
        }
        events
    }
}

impl Sends for Rig {
    fn raw(&mut self, readable: &[u8], writable: usize) -> Reply {
        let readable: &[&[u8]] = if readable.is_empty() { &[] } else { &[readable] };
        let writable: &[usize] = if writable == 0 { &[] } else { &[writable] };
        self.raw_parts(readable, writable)
    }
}

impl Driven {
    fn new(machine: &Machine, alloc: &mut Alloc, index: u16, event_idx: bool) -> Self {
        let options = QueueOptions { event_idx, indirect: 0, interrupts: true };
        let queue = Queue::new(machine.memory(), alloc, QUEUE_SIZE, options).expect("a queue");
        assert!(machine.enable_queue(index, queue.layout()));
        let scratch = alloc.take(SCRATCH_LG2);
        Self { index, queue, writable: HashMap::new(), order: Vec::new(), scratch, next: 0 }
    }

    fn add(&mut self, memory: &Memory, readable: &[&[u8]], writable: &[usize]) {
        if self.order.is_empty() {
            self.next = 0;
        }
        let readable: Vec<Buffer> = readable.iter().map(|bytes| self.buffer(memory, bytes)).collect();
        let writable: Vec<Buffer> =
            writable.iter().map(|&len| self.buffer(memory, &vec![UNWRITTEN; len])).collect();
        let head = self.queue.add(memory, &readable, &writable).expect("room in the ring");
        self.writable.insert(head, writable);
        self.order.push(head);
    }

    fn publish(&mut self, machine: &Machine) {
        if self.queue.publish(machine.memory()).expect("rings in memory") {
            machine.notify(self.index);
        }
    }

    fn collect(&mut self, memory: &Memory) -> Vec<Reply> {
        let mut replies = Vec::new();
        while let Some(used) = self.queue.collect(memory).expect("an honest device") {
            let mut bytes = Vec::new();
            for buffer in self.writable.remove(&used.head).expect("a chain in flight") {
                let start = bytes.len();
                bytes.resize(start + buffer.length as usize, 0);
                memory.read(buffer.at, &mut bytes[start..]).unwrap();
            }
            let place = self.order.iter().position(|&head| head == used.head).unwrap();
            replies.push((place, Reply { used: used.written as usize, bytes }));
        }
        let order: Vec<u16> = replies.iter().map(|&(place, _)| self.order[place]).collect();
        self.order.retain(|head| !order.contains(head));
        replies.sort_by_key(|&(place, _)| place);
        replies.into_iter().map(|(_, reply)| reply).collect()
    }

    /// A buffer of its own, with a gap to the one before.
    fn buffer(&mut self, memory: &Memory, bytes: &[u8]) -> Buffer {
        let at = Gpa(self.scratch.0 + self.next);
        self.next += bytes.len() as u64 + 3;
        assert!(self.next <= 1 << SCRATCH_LG2, "too much in flight");
        memory.write(at, bytes).unwrap();
        Buffer { at, length: bytes.len() as u32 }
    }
}
