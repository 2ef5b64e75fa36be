//! A platform and a device for tests: memory of one process, and a device that answers by script.

#![allow(clippy::cast_possible_truncation, reason = "the memory of tests is small")]

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::rc::Rc;
use alloc::{vec, vec::Vec};
use core::cell::RefCell;

use pgtable_formats::{NotMemory, TableAlloc, TableMem};
use viommu_wire::{Config, DomainId, DomainRange, Features, Gpa, Iova, IovaRange};

use super::{GuestMem, Parts, QueueLayout, Transport, TransportError};

pub(crate) const BASE: u64 = 0x4000_0000;
const SIZE: u64 = 16 << 20;

/// Memory shared between driver and device.
#[derive(Clone, Debug)]
pub(crate) struct FakeMem(Rc<RefCell<Vec<u8>>>);

impl FakeMem {
    fn at(&self, at: Gpa, length: usize) -> Result<core::ops::Range<usize>, NotMemory> {
        let offset =
            at.0.checked_sub(BASE).filter(|offset| offset + length as u64 <= SIZE).ok_or(NotMemory)?;
        Ok(offset as usize..offset as usize + length)
    }

    pub(crate) fn bytes(&self, at: Gpa, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.read(at, &mut bytes).unwrap();
        bytes
    }
}

impl GuestMem for FakeMem {
    fn read(&self, at: Gpa, bytes: &mut [u8]) -> Result<(), NotMemory> {
        bytes.copy_from_slice(&self.0.borrow()[self.at(at, bytes.len())?]);
        Ok(())
    }

    fn write(&self, at: Gpa, bytes: &[u8]) -> Result<(), NotMemory> {
        let range = self.at(at, bytes.len())?;
        self.0.borrow_mut()[range].copy_from_slice(bytes);
        Ok(())
    }

    fn load_acquire(&self, at: Gpa) -> Result<u16, NotMemory> {
        assert_eq!(at.0 % 2, 0);
        let mut bytes = [0; 2];
        self.read(at, &mut bytes)?;
        Ok(u16::from_le_bytes(bytes))
    }

    fn store_release(&self, at: Gpa, value: u16) -> Result<(), NotMemory> {
        assert_eq!(at.0 % 2, 0);
        self.write(at, &value.to_le_bytes())
    }
}

impl TableMem for FakeMem {
    fn load(&self, at: Gpa) -> Result<u64, NotMemory> {
        assert_eq!(at.0 % 8, 0);
        let mut bytes = [0; 8];
        self.read(at, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn compare_exchange(&self, at: Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, NotMemory> {
        let seen = self.load(at)?;
        if seen != current {
            return Ok(Err(seen));
        }
        self.write(at, &new.to_le_bytes())?;
        Ok(Ok(seen))
    }
}

/// Gives memory out; knows what is out.
#[derive(Debug)]
pub(crate) struct FakeAlloc {
    memory: FakeMem,
    next: u64,
    free: BTreeMap<u8, Vec<Gpa>>,
    pub(crate) live: BTreeSet<(Gpa, u8)>,
    /// How many more allocations succeed.
    pub(crate) budget: usize,
}

impl TableAlloc for FakeAlloc {
    fn alloc(&mut self, size_lg2: u8) -> Option<Gpa> {
        self.budget = self.budget.checked_sub(1)?;
        let size = 1 << size_lg2;
        let at = self.free.get_mut(&size_lg2).and_then(Vec::pop).unwrap_or_else(|| {
            let at = self.next.next_multiple_of(size);
            self.next = at + size;
            Gpa(at)
        });
        self.memory.write(at, &vec![0; size as usize]).unwrap();
        self.live.insert((at, size_lg2));
        Some(at)
    }

    fn free(&mut self, table: Gpa, size_lg2: u8) {
        assert!(self.live.remove(&(table, size_lg2)), "{table} of 2^{size_lg2} was not allocated");
        self.free.entry(size_lg2).or_default().push(table);
    }
}

pub(crate) type FakePlatform = Parts<FakeMem, FakeAlloc>;

pub(crate) fn platform() -> FakePlatform {
    let memory = FakeMem(Rc::new(RefCell::new(vec![0; SIZE as usize])));
    let alloc = FakeAlloc {
        memory: memory.clone(),
        next: BASE,
        free: BTreeMap::new(),
        live: BTreeSet::new(),
        budget: usize::MAX,
    };
    Parts { memory, alloc }
}

/// A chain as the device found it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Received {
    pub(crate) head: u16,
    pub(crate) readable: Vec<u8>,
    pub(crate) writable: Vec<(Gpa, u32)>,
    pub(crate) indirect: bool,
}

type Script = Box<dyn FnMut(&[u8], &mut [u8]) -> u32>;

/// What the device does with the chains it finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mood {
    /// Answers by script.
    Obedient,
    /// Leaves them alone.
    Silent,
}

/// A device that answers by script.
pub(crate) struct FakeDevice {
    pub(crate) memory: FakeMem,
    pub(crate) offered: Features,
    pub(crate) accepted: Features,
    pub(crate) refuses_features: bool,
    pub(crate) config: [u8; Config::LEN],
    pub(crate) config_writes: Vec<(usize, Vec<u8>)>,
    /// The generation changes this many more times.
    pub(crate) config_changes: u32,
    pub(crate) max_queue_size: u16,
    pub(crate) queues: [Option<QueueLayout>; 2],
    pub(crate) calls: Vec<&'static str>,
    pub(crate) notifications: [u32; 2],
    pub(crate) received: Vec<Received>,
    pub(crate) script: Script,
    pub(crate) mood: Mood,
    available: [u16; 2],
    pub(crate) used: [u16; 2],
    generation: u32,
}

/// The driver's end of a [`FakeDevice`].
#[derive(Clone)]
pub(crate) struct FakeTransport(pub(crate) Rc<RefCell<FakeDevice>>);

/// The configuration that a [`FakeTransport`] starts with.
pub(crate) fn config() -> Config {
    Config {
        page_size_mask: !0xfff,
        input_range: IovaRange::new(Iova(0x1000), Iova((1 << 40) - 1)).unwrap(),
        domain_range: DomainRange::new(DomainId(1), DomainId(100)).unwrap(),
        probe_size: 256,
        bypass: false,
    }
}

/// Answers OK, with `properties` to a PROBE.
pub(crate) fn answer_ok(properties: Vec<u8>) -> Script {
    Box::new(move |_, writable| {
        let tail = writable.len() - 4;
        writable.fill(0);
        writable[..properties.len().min(tail)].copy_from_slice(&properties[..properties.len().min(tail)]);
        writable.len() as u32
    })
}

impl FakeTransport {
    pub(crate) fn new(memory: FakeMem, offered: Features) -> Self {
        Self(Rc::new(RefCell::new(FakeDevice {
            memory,
            offered,
            accepted: Features::empty(),
            refuses_features: false,
            config: config().encode(),
            config_writes: Vec::new(),
            config_changes: 0,
            max_queue_size: 16,
            queues: [None; 2],
            calls: Vec::new(),
            notifications: [0; 2],
            received: Vec::new(),
            script: answer_ok(Vec::new()),
            mood: Mood::Obedient,
            available: [0; 2],
            used: [0; 2],
            generation: 0,
        })))
    }

    /// The device-readable parts that arrived, and forgets them.
    pub(crate) fn take_requests(&self) -> Vec<Vec<u8>> {
        self.0.borrow_mut().received.drain(..).map(|received| received.readable).collect()
    }

    pub(crate) fn set_script(&self, script: impl FnMut(&[u8], &mut [u8]) -> u32 + 'static) {
        self.0.borrow_mut().script = Box::new(script);
    }

    /// The next chain that the driver published.
    pub(crate) fn next_chain(&self, queue: usize) -> Option<Received> {
        let mut device = self.0.borrow_mut();
        let layout = device.queues[queue]?;
        let memory = device.memory.clone();
        let seen = device.available[queue];
        if memory.load_acquire(Gpa(layout.available.0 + 2)).unwrap() == seen {
            return None;
        }
        let place = layout.available.0 + 4 + 2 * u64::from(seen % layout.size);
        let head = memory.load_acquire(Gpa(place)).unwrap();
        device.available[queue] = seen.wrapping_add(1);
        if device.accepted.contains(Features::RING_EVENT_IDX) {
            let event = Gpa(layout.used.0 + 4 + 8 * u64::from(layout.size));
            memory.store_release(event, device.available[queue]).unwrap();
        }
        Some(read_chain(&memory, layout.descriptors, head))
    }

    /// Writes a used entry, true or not.
    pub(crate) fn push_used(&self, queue: usize, id: u32, length: u32) {
        let mut device = self.0.borrow_mut();
        let layout = device.queues[queue].unwrap();
        let used = device.used[queue];
        let place = Gpa(layout.used.0 + 4 + 8 * u64::from(used % layout.size));
        let entry = u64::from(id) | u64::from(length) << 32;
        device.memory.write(place, &entry.to_le_bytes()).unwrap();
        device.used[queue] = used.wrapping_add(1);
        device.memory.store_release(Gpa(layout.used.0 + 2), used.wrapping_add(1)).unwrap();
    }

    /// Puts an event in the next buffer. `false`: there is none.
    pub(crate) fn send_event(&self, record: &[u8], used: u32) -> bool {
        let Some(chain) = self.next_chain(1) else { return false };
        let (at, length) = chain.writable[0];
        assert!(record.len() <= length as usize);
        self.0.borrow().memory.write(at, record).unwrap();
        self.push_used(1, chain.head.into(), used);
        true
    }

    /// Answers everything in the request queue.
    pub(crate) fn run(&self) {
        while let Some(chain) = self.next_chain(0) {
            // What a script does not write stays as it was.
            let mut writable = Vec::new();
            for (at, length) in &chain.writable {
                writable.extend(self.0.borrow().memory.bytes(*at, *length as usize));
            }
            let mut script = core::mem::replace(&mut self.0.borrow_mut().script, Box::new(|_, _| 0));
            let used = script(&chain.readable, &mut writable);
            self.0.borrow_mut().script = script;
            let mut rest = &writable[..];
            for (at, length) in &chain.writable {
                let (bytes, left) = rest.split_at(*length as usize);
                self.0.borrow().memory.write(*at, bytes).unwrap();
                rest = left;
            }
            let head = chain.head;
            self.0.borrow_mut().received.push(chain);
            self.push_used(0, head.into(), used);
        }
    }
}

fn read_chain(memory: &FakeMem, table: Gpa, head: u16) -> Received {
    let mut received = Received { head, readable: Vec::new(), writable: Vec::new(), indirect: false };
    let (mut table, mut index) = (table, head);
    loop {
        let bytes = memory.bytes(Gpa(table.0 + 16 * u64::from(index)), 16);
        let at = Gpa(u64::from_le_bytes(bytes[..8].try_into().unwrap()));
        let length = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
        let flags = u16::from_le_bytes(bytes[12..14].try_into().unwrap());
        if flags & 4 != 0 {
            received.indirect = true;
            (table, index) = (at, 0);
            continue;
        }
        if flags & 2 == 0 {
            assert!(received.writable.is_empty(), "a readable buffer behind a writable one");
            received.readable.extend(memory.bytes(at, length as usize));
        } else {
            received.writable.push((at, length));
        }
        if flags & 1 == 0 {
            return received;
        }
        index = u16::from_le_bytes(bytes[14..].try_into().unwrap());
    }
}

impl Transport for FakeTransport {
    fn reset(&mut self) {
        self.0.borrow_mut().calls.push("reset");
    }

    fn offered_features(&mut self) -> Features {
        self.0.borrow().offered
    }

    fn accept_features(&mut self, features: Features) -> Result<(), TransportError> {
        let mut device = self.0.borrow_mut();
        device.calls.push("accept");
        device.accepted = features;
        if device.refuses_features { Err(TransportError::FeaturesRefused) } else { Ok(()) }
    }

    fn max_queue_size(&mut self, _queue: u16) -> u16 {
        self.0.borrow().max_queue_size
    }

    fn enable_queue(&mut self, queue: u16, layout: QueueLayout) -> Result<(), TransportError> {
        let mut device = self.0.borrow_mut();
        device.calls.push(if queue == 0 { "requestq" } else { "eventq" });
        device.queues[usize::from(queue)] = Some(layout);
        Ok(())
    }

    fn start(&mut self) {
        self.0.borrow_mut().calls.push("start");
    }

    fn fail(&mut self) {
        self.0.borrow_mut().calls.push("fail");
    }

    fn notify(&mut self, queue: u16) {
        self.0.borrow_mut().notifications[usize::from(queue)] += 1;
        let mood = self.0.borrow().mood;
        if queue == 0 && mood == Mood::Obedient {
            self.run();
        }
    }

    fn wait(&mut self, queue: u16) -> Result<(), TransportError> {
        let mood = self.0.borrow().mood;
        if queue != 0 || mood == Mood::Silent {
            return Err(TransportError::Gone);
        }
        let before = self.0.borrow().used[0];
        self.run();
        if self.0.borrow().used[0] == before { Err(TransportError::Gone) } else { Ok(()) }
    }

    fn config_generation(&mut self) -> u32 {
        let mut device = self.0.borrow_mut();
        if let Some(left) = device.config_changes.checked_sub(1) {
            device.config_changes = left;
            device.generation += 1;
        }
        device.generation
    }

    fn read_config(&mut self, offset: usize, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.0.borrow().config[offset..offset + bytes.len()]);
    }

    fn write_config(&mut self, offset: usize, bytes: &[u8]) {
        let mut device = self.0.borrow_mut();
        device.config[offset..offset + bytes.len()].copy_from_slice(bytes);
        device.config_writes.push((offset, bytes.to_vec()));
    }
}
