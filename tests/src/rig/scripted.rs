//! A device that answers by script, for what no proper device does.

use std::cell::RefCell;
use std::rc::Rc;

use viommu_guest::hal::{QueueLayout, TransportError};
use viommu_queue::loopback::place_queue;
use viommu_queue::{EventQueue, Kick, Notify, QueueError, RequestQueue};
use viommu_wire::numbers::{EVENT_QUEUE, REQUEST_QUEUE};
use viommu_wire::{Config, DomainId, DomainRange, Features, Iova, IovaRange, Tail};
use virtio_queue::QueueT;

use super::{Memory, Port};

/// Answers a request: device-readable bytes, device-writable bytes (zeroed), and the used length.
pub type Script = Box<dyn FnMut(&[u8], &mut [u8]) -> usize>;

/// A device whose rings are honest and whose answers are a script's. Clones share it.
#[derive(Clone)]
pub struct Scripted(Rc<RefCell<State>>);

struct State {
    memory: Memory,
    offered: Features,
    config: Vec<u8>,
    script: Script,
    /// Device-readable parts that arrived, and lengths of their writable parts.
    received: Vec<(Vec<u8>, usize)>,
    /// Event records to deliver, and the used length of each.
    events: Vec<(Vec<u8>, usize)>,
    requests_queue: RequestQueue,
    events_queue: EventQueue,
}

impl Scripted {
    /// Offers `offered` (and VERSION_1) and the configuration of [`config`](Self::config); answers OK.
    pub fn new(memory: &Memory, offered: Features) -> Self {
        Self(Rc::new(RefCell::new(State {
            memory: memory.clone(),
            offered: offered | Features::VERSION_1,
            config: Self::config().encode().to_vec(),
            script: Box::new(|_, writable| {
                writable.fill(0);
                writable.len()
            }),
            received: Vec::new(),
            events: Vec::new(),
            requests_queue: RequestQueue::new(256, 1 << 16).expect("a size"),
            events_queue: EventQueue::new(256).expect("a size"),
        })))
    }

    /// 4 KiB pages, addresses 0x10000 to 2^40-1, domains 3 to 9, 256 bytes of properties.
    pub fn config() -> Config {
        Config {
            page_size_mask: !0xfff,
            input_range: IovaRange::new(Iova(0x1_0000), Iova((1 << 40) - 1)).expect("a range"),
            domain_range: DomainRange::new(DomainId(3), DomainId(9)).expect("a range"),
            probe_size: 256,
            bypass: false,
        }
    }

    /// Answers with this from now on.
    pub fn script(&self, script: impl FnMut(&[u8], &mut [u8]) -> usize + 'static) {
        self.0.borrow_mut().script = Box::new(script);
    }

    /// Answers PROBE with these properties, and everything with OK.
    pub fn answer_properties(&self, properties: Vec<u8>) {
        self.script(move |_, writable| {
            let room = writable.len() - Tail::LEN;
            let len = properties.len().min(room);
            writable[..len].copy_from_slice(&properties[..len]);
            writable.len()
        });
    }

    /// Changes the bytes of the configuration space.
    pub fn set_config(&self, offset: usize, bytes: &[u8]) {
        self.0.borrow_mut().config[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// What arrived since the last call: device-readable parts, and lengths of the writable ones.
    pub fn received(&self) -> Vec<(Vec<u8>, usize)> {
        std::mem::take(&mut self.0.borrow_mut().received)
    }

    /// Delivers an event record with a used length.
    pub fn send_event(&self, record: &[u8], used: usize) {
        self.0.borrow_mut().events.push((record.to_vec(), used));
        let _ = self.kick(EVENT_QUEUE).expect("a usable queue");
    }
}

impl Port for Scripted {
    fn reset(&self) {
        let mut state = self.0.borrow_mut();
        state.requests_queue.queue_mut().reset();
        state.events_queue.queue_mut().reset();
    }

    fn offered(&self) -> Features {
        self.0.borrow().offered
    }

    fn accept(&self, features: Features) -> Result<(), TransportError> {
        let mut state = self.0.borrow_mut();
        let event_idx = features.contains(Features::RING_EVENT_IDX);
        state.requests_queue.queue_mut().set_event_idx(event_idx);
        state.events_queue.queue_mut().set_event_idx(event_idx);
        Ok(())
    }

    fn max_queue_size(&self, queue: u16) -> u16 {
        if queue < 2 { 256 } else { 0 }
    }

    fn enable_queue(&self, queue: u16, layout: QueueLayout) -> Result<(), TransportError> {
        let mut state = self.0.borrow_mut();
        let place = match queue {
            REQUEST_QUEUE => state.requests_queue.queue_mut(),
            _ => state.events_queue.queue_mut(),
        };
        place_queue(place, layout).map_err(|_| TransportError::Queue { queue })
    }

    fn kick(&self, queue: u16) -> Result<Notify, QueueError> {
        let State { memory, script, received, events, requests_queue, events_queue, .. } =
            &mut *self.0.borrow_mut();
        let Kick { served, again, .. } = if queue == REQUEST_QUEUE {
            requests_queue.kick(memory.map(), |readable, writable| {
                received.push((readable.to_vec(), writable.len()));
                script(readable, writable)
            })?
        } else {
            events_queue.kick(memory.map(), |buffer| {
                if events.is_empty() {
                    return None;
                }
                let (record, used) = events.remove(0);
                let len = record.len().min(buffer.len());
                buffer[..len].copy_from_slice(&record[..len]);
                Some(used)
            })?
        };
        Ok(Notify { served, again, ..Notify::default() })
    }

    fn read_config(&self, offset: usize, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.0.borrow().config[offset..offset + bytes.len()]);
    }

    fn write_config(&self, offset: usize, bytes: &[u8]) {
        self.set_config(offset, bytes);
    }
}
