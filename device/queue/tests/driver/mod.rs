//! The driver's side of one split virtqueue, written by hand so that it can break every rule.
#![allow(dead_code)]

use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// First address of memory.
pub const BASE: u64 = 0x4000_0000;
/// Bytes of memory.
pub const BYTES: usize = 1 << 20;
/// First byte that is not memory.
pub const END: u64 = BASE + BYTES as u64;
const TABLE: u64 = BASE;
const AVAILABLE: u64 = BASE + 0x1_0000;
const USED: u64 = BASE + 0x2_0000;
/// Free for buffers, up to `END`.
pub const BUFFERS: u64 = BASE + 0x3_0000;

pub fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(BASE), BYTES)]).unwrap()
}

pub struct Driver<'m> {
    pub memory: &'m GuestMemoryMmap,
    pub size: u16,
    offset: u64,
    available: u16,
    seen: u16,
}

impl<'m> Driver<'m> {
    pub fn new(memory: &'m GuestMemoryMmap, size: u16) -> Self {
        Self { memory, size, offset: 0, available: 0, seen: 0 }
    }

    /// A second queue in the same memory; its rings lie 32 KiB further.
    pub fn second(memory: &'m GuestMemoryMmap, size: u16) -> Self {
        Self { offset: 0x8000, ..Self::new(memory, size) }
    }

    /// Tells the device where the rings are, as a transport does.
    pub fn enable(&self, queue: &mut Queue, event_idx: bool) {
        let halves = |address: u64| (Some((address + self.offset) as u32), Some((address >> 32) as u32));
        queue.set_size(self.size);
        let (low, high) = halves(TABLE);
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(AVAILABLE);
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(USED);
        queue.set_used_ring_address(low, high);
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
    }

    pub fn store16(&self, at: u64, value: u16) {
        self.memory.store(value.to_le(), GuestAddress(at + self.offset), Ordering::SeqCst).unwrap();
    }

    pub fn load16(&self, at: u64) -> u16 {
        u16::from_le(self.memory.load(GuestAddress(at + self.offset), Ordering::SeqCst).unwrap())
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// Writes entry `index` of the table at `table`.
    pub fn entry(&self, table: u64, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.write(table + 16 * u64::from(index), &bytes);
    }

    pub fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        self.entry(TABLE + self.offset, index, address, len, flags, next);
    }

    /// A chain from descriptor `head` on: `(address, len, WRITE or 0)` each.
    pub fn chain(&self, head: u16, parts: &[(u64, u32, u16)]) {
        for (i, &(address, len, flags)) in parts.iter().enumerate() {
            let index = head + i as u16;
            let more = if i + 1 < parts.len() { NEXT } else { 0 };
            self.descriptor(index, address, len, flags | more, index + 1);
        }
    }

    /// Puts `head` in the available ring.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.available % self.size);
        self.store16(AVAILABLE + 4 + 2 * slot, head);
        self.available = self.available.wrapping_add(1);
        self.set_available_index(self.available);
    }

    pub fn set_available_index(&self, index: u16) {
        self.store16(AVAILABLE + 2, index);
    }

    pub fn available_index(&self) -> u16 {
        self.available
    }

    pub fn set_available_flags(&self, flags: u16) {
        self.store16(AVAILABLE, flags);
    }

    pub fn set_used_event(&self, event: u16) {
        self.store16(AVAILABLE + 4 + 2 * u64::from(self.size), event);
    }

    pub fn available_event(&self) -> u16 {
        self.load16(USED + 4 + 8 * u64::from(self.size))
    }

    pub fn used_index(&self) -> u16 {
        self.load16(USED + 2)
    }

    /// The elements `(head, length)` that came since the last call.
    pub fn used(&mut self) -> Vec<(u32, u32)> {
        let index = self.used_index();
        let mut elements = Vec::new();
        while self.seen != index {
            let at = USED + self.offset + 4 + 8 * u64::from(self.seen % self.size);
            let element: [u32; 2] = self.memory.read_obj(GuestAddress(at)).unwrap();
            elements.push((u32::from_le(element[0]), u32::from_le(element[1])));
            self.seen = self.seen.wrapping_add(1);
        }
        elements
    }
}
