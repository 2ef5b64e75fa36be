//! The request queue: buffers for every descriptor, batches, answers.

use alloc::vec::Vec;

use pgtable_formats::TableAlloc;
use viommu_wire::{EndpointId, Gpa, Probe, Request, Status, Tail, numbers};

use crate::hal::{GuestMem, QueueLayout, Transport};
use crate::probe::EndpointProperties;
use crate::queue::{self, Buffer, Queue, QueueError, QueueOptions};
use crate::{InitError, RequestError};

/// What was sent, for comparisons: a way to use the device is good when these stay small.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests sent.
    pub requests: u64,
    /// Notifications of the request queue: each is an exit to the hypervisor.
    pub notifications: u64,
    /// Bytes that the device had to read.
    pub readable_bytes: u64,
    /// Bytes that the device was given to write.
    pub writable_bytes: u64,
}

impl Counters {
    /// What was sent after the counters stood at `earlier`.
    #[must_use]
    pub const fn since(&self, earlier: &Self) -> Self {
        Self {
            requests: self.requests.wrapping_sub(earlier.requests),
            notifications: self.notifications.wrapping_sub(earlier.notifications),
            readable_bytes: self.readable_bytes.wrapping_sub(earlier.readable_bytes),
            writable_bytes: self.writable_bytes.wrapping_sub(earlier.writable_bytes),
        }
    }
}

/// The request queue with a buffer for each chain. No request allocates.
#[derive(Debug)]
pub(crate) struct Requester {
    queue: Queue,
    /// [`SLOT`] bytes by head: the tail, then the device-readable part.
    slots: Gpa,
    /// Whose answer each head brings; `None` where nobody waits any more.
    waiting: Vec<Option<usize>>,
    /// Properties area and tail of PROBE.
    probe: Option<ProbeBuffer>,
    counters: Counters,
}

#[derive(Debug)]
struct ProbeBuffer {
    at: Gpa,
    size: u32,
    /// The head that the device may still answer into the buffer.
    busy: Option<u16>,
    bytes: Vec<u8>,
}

const SLOT_LEN: usize = 128;
const SLOT: u64 = 128;
const TAIL: u32 = 4;
const _: () = assert!(Tail::LEN == TAIL as usize && Request::MAX_READABLE_LEN + Tail::LEN <= SLOT_LEN);
/// No status: an answer that was claimed but not written is not taken for one.
const UNANSWERED: [u8; 4] = [0xff; 4];

impl Requester {
    pub(crate) fn new<M: GuestMem, A: TableAlloc>(
        memory: &M,
        alloc: &mut A,
        size: u16,
        options: QueueOptions,
        probe_size: u32,
    ) -> Result<Self, InitError> {
        let queue = Queue::new(memory, alloc, size, options)?;
        let slots = queue::allocate(alloc, SLOT * u64::from(size))?;
        let probe = match probe_size {
            0 => None,
            size => {
                let whole = u64::from(size) + u64::from(TAIL);
                let bytes = alloc::vec![0; usize::try_from(whole).map_err(|_| InitError::ProbeSize(size))?];
                Some(ProbeBuffer { at: queue::allocate(alloc, whole)?, size, busy: None, bytes })
            }
        };
        Ok(Self {
            queue,
            slots,
            waiting: alloc::vec![None; size.into()],
            probe,
            counters: Counters::default(),
        })
    }

    pub(crate) const fn layout(&self) -> QueueLayout {
        self.queue.layout()
    }

    pub(crate) const fn counters(&self) -> &Counters {
        &self.counters
    }

    pub(crate) fn release<A: TableAlloc>(self, alloc: &mut A) {
        alloc.free(self.slots, queue::size_lg2(SLOT * u64::from(self.queue.layout().size)));
        if let Some(probe) = self.probe {
            alloc.free(probe.at, queue::size_lg2(u64::from(probe.size) + u64::from(TAIL)));
        }
        self.queue.release(alloc);
    }

    /// Sends every request and calls `answer` once with the index of each, in the order of answers. As many as the
    /// queue holds go out with one store of the index and at most one notification.
    pub(crate) fn send_all<M: GuestMem, T: Transport>(
        &mut self,
        memory: &M,
        transport: &mut T,
        requests: impl Iterator<Item = Result<Request, RequestError>>,
        mut answer: impl FnMut(usize, Result<(), RequestError>),
    ) {
        let mut requests = requests.enumerate();
        let mut next = requests.next();
        while next.is_some() {
            let mut sent = 0usize;
            while let Some((index, request)) = &next {
                match request {
                    Err(error) => answer(*index, Err(*error)),
                    Ok(request) => match self.add(memory, *index, request) {
                        Ok(()) => sent += 1,
                        Err(QueueError::Full) if sent != 0 => break,
                        Err(QueueError::Full) => match self.make_room(memory, transport) {
                            Ok(()) => continue,
                            Err(error) => answer(*index, Err(error)),
                        },
                        Err(error) => answer(*index, Err(error.into())),
                    },
                }
                next = requests.next();
            }
            if let Err(error) = self.complete(memory, transport, sent, &mut answer) {
                for waiting in &mut self.waiting {
                    if let Some(index) = waiting.take() {
                        answer(index, Err(error));
                    }
                }
            }
        }
    }

    pub(crate) fn probe<M: GuestMem, T: Transport>(
        &mut self,
        memory: &M,
        transport: &mut T,
        endpoint: EndpointId,
    ) -> Result<EndpointProperties, RequestError> {
        // Where an earlier PROBE was given up, its answer may still come, into the one buffer that there is.
        while self.probe.as_ref().is_some_and(|buffer| buffer.busy.is_some())
            || self.queue.next_head(2).is_none()
        {
            self.make_room(memory, transport)?;
        }
        let &ProbeBuffer { at, size, .. } = self.probe.as_ref().ok_or(RequestError::BadAnswer)?;
        let length = size + TAIL;
        let tail_at = Gpa(at.0 + u64::from(size));
        memory.write(tail_at, &UNANSWERED).map_err(QueueError::from)?;

        // the writable part is exactly the properties area and the tail.
        let writable = Buffer { at, length };
        let head = self.add_parts(memory, 0, &Request::Probe(Probe { endpoint }), writable)?;
        self.probe_busy(Some(head));
        let mut outcome = Err(RequestError::Unwritten);
        self.finish(memory, transport, 1, |_, written| {
            outcome = answer_in(memory, tail_at, written, length);
        })
        .inspect_err(|_| self.waiting.fill(None))?;
        outcome?;
        let buffer = self.probe.as_mut().ok_or(RequestError::BadAnswer)?;
        memory.read(at, &mut buffer.bytes).map_err(QueueError::from)?;
        let area = usize::try_from(size).ok().and_then(|size| buffer.bytes.get(..size));
        Ok(EndpointProperties::parse(area.unwrap_or_default()))
    }

    fn add<M: GuestMem>(&mut self, memory: &M, index: usize, request: &Request) -> Result<(), QueueError> {
        let head = self.queue.next_head(2).ok_or(QueueError::Full)?;
        let writable = Buffer { at: self.slot(head), length: TAIL };
        self.add_parts(memory, index, request, writable).map(|_| ())
    }

    /// Puts the request in the slot of the next head, and the chain in the ring.
    fn add_parts<M: GuestMem>(
        &mut self,
        memory: &M,
        index: usize,
        request: &Request,
        writable: Buffer,
    ) -> Result<u16, QueueError> {
        let slot = self.slot(self.queue.next_head(2).ok_or(QueueError::Full)?);
        let request = request.encode();
        let mut bytes = [0; SLOT_LEN];
        let (tail, rest) = bytes.split_at_mut(Tail::LEN);
        tail.copy_from_slice(&UNANSWERED);
        rest[..request.len()].copy_from_slice(&request);
        memory.write(slot, &bytes[..Tail::LEN + request.len()])?;
        let length = u32::try_from(request.len()).map_err(|_| QueueError::Chain)?;
        let readable = Buffer { at: Gpa(slot.0 + u64::from(TAIL)), length };
        let head = self.queue.add(memory, &[readable], &[writable])?;
        if let Some(waiting) = self.waiting.get_mut(usize::from(head)) {
            *waiting = Some(index);
        }
        self.counters.requests += 1;
        self.counters.readable_bytes += u64::from(length);
        self.counters.writable_bytes += u64::from(writable.length);
        Ok(head)
    }

    fn complete<M: GuestMem, T: Transport>(
        &mut self,
        memory: &M,
        transport: &mut T,
        sent: usize,
        answer: &mut impl FnMut(usize, Result<(), RequestError>),
    ) -> Result<(), RequestError> {
        let slots = self.slots;
        self.finish(memory, transport, sent, |waiting, written| {
            let slot = Gpa(slots.0 + SLOT * u64::from(waiting.head));
            answer(waiting.index, answer_in(memory, slot, written, TAIL));
        })
    }

    /// Publishes, notifies, and waits for `sent` answers.
    fn finish<M: GuestMem, T: Transport>(
        &mut self,
        memory: &M,
        transport: &mut T,
        sent: usize,
        mut answered: impl FnMut(Waiting, u32),
    ) -> Result<(), RequestError> {
        if self.queue.publish(memory)? {
            self.counters.notifications += 1;
            transport.notify(numbers::REQUEST_QUEUE);
        }
        let mut left = sent;
        while left != 0 {
            match self.collect(memory)? {
                Some((Some(waiting), written)) => {
                    left -= 1;
                    answered(waiting, written);
                }
                Some((None, _)) => {}
                None => transport.wait(numbers::REQUEST_QUEUE)?,
            }
        }
        Ok(())
    }

    /// Waits for an answer that was given up: its descriptors, or its buffer, are needed.
    fn make_room<M: GuestMem, T: Transport>(
        &mut self,
        memory: &M,
        transport: &mut T,
    ) -> Result<(), RequestError> {
        if self.queue.in_flight() == 0 {
            return Err(QueueError::Full.into());
        }
        while self.collect(memory)?.is_none() {
            transport.wait(numbers::REQUEST_QUEUE)?;
        }
        Ok(())
    }

    fn collect<M: GuestMem>(&mut self, memory: &M) -> Result<Option<(Option<Waiting>, u32)>, QueueError> {
        let Some(used) = self.queue.collect(memory)? else {
            return Ok(None);
        };
        if self.probe.as_ref().is_some_and(|probe| probe.busy == Some(used.head)) {
            self.probe_busy(None);
        }
        let index = self.waiting.get_mut(usize::from(used.head)).and_then(Option::take);
        Ok(Some((index.map(|index| Waiting { head: used.head, index }), used.written)))
    }

    fn probe_busy(&mut self, head: Option<u16>) {
        if let Some(probe) = &mut self.probe {
            probe.busy = head;
        }
    }

    fn slot(&self, head: u16) -> Gpa {
        Gpa(self.slots.0 + SLOT * u64::from(head))
    }
}

struct Waiting {
    head: u16,
    index: usize,
}

/// Reads the tail at `at` of a part that had `length` bytes to write, all of which must have been.
fn answer_in<M: GuestMem>(memory: &M, at: Gpa, written: u32, length: u32) -> Result<(), RequestError> {
    if written == 0 {
        return Err(RequestError::Unwritten);
    }
    if written < length {
        return Err(RequestError::BadAnswer);
    }
    let mut bytes = [0; Tail::LEN];
    memory.read(at, &mut bytes).map_err(QueueError::from)?;
    match Tail::decode(&bytes).ok_or(RequestError::BadAnswer)?.status {
        Status::Ok => Ok(()),
        status => Err(RequestError::Status(status)),
    }
}
