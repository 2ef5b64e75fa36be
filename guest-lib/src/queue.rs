//! A split virtqueue, driver's side (virtio 1.4, 2.7).
//!
//! The driver keeps its own copy of every link and length: what the device writes to shared memory cannot lead it
//! astray. Nothing is allocated after [`Queue::new`].

use alloc::{vec, vec::Vec};

use pgtable_formats::{NotMemory, TableAlloc};
use viommu_wire::Gpa;

use crate::hal::{GuestMem, QueueLayout};

/// A piece of memory in a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Where it starts.
    pub at: Gpa,
    /// Its length in bytes, not 0.
    pub length: u32,
}

/// What was negotiated for the queue, and what it is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueOptions {
    /// EVENT_IDX: notifications are suppressed by index, not by a flag.
    pub event_idx: bool,
    /// INDIRECT_DESC: chains of up to this many buffers take a single descriptor. 0: not negotiated.
    pub indirect: u16,
    /// The device should interrupt when it has used buffers; otherwise the driver polls.
    pub interrupts: bool,
}

/// A chain that the device has finished with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The head that [`Queue::add`] gave.
    pub head: u16,
    /// How many bytes the device says that it wrote, at most what the chain has of writable ones.
    pub written: u32,
}

/// Why a queue did not do what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The size is 0, no power of two, or above 32768.
    #[error("a queue cannot have {0} descriptors")]
    Size(u16),
    /// The allocator has no memory for the rings.
    #[error("no memory for the queue")]
    NoMemory,
    /// All descriptors are with the device.
    #[error("the queue is full")]
    Full,
    /// The chain is empty, holds an empty buffer, or is longer than the queue or 2^32-1 bytes.
    #[error("no such chain can be made")]
    Chain,
    /// The device moved its index further than there are chains.
    #[error("the device used {found} chains where {in_flight} are in flight")]
    UsedIndex {
        /// How many the index says.
        found: u16,
        /// How many there are.
        in_flight: u16,
    },
    /// The device used a chain that it does not have. The entry was skipped.
    #[error("the device used chain {id}, which it does not have")]
    UsedId {
        /// The number found.
        id: u32,
    },
    /// The queue does not lie in memory.
    #[error(transparent)]
    NotMemory(#[from] NotMemory),
}

/// A split virtqueue.
#[derive(Debug)]
pub struct Queue {
    layout: QueueLayout,
    options: QueueOptions,
    /// One table per head, where INDIRECT_DESC is negotiated.
    indirect_tables: Gpa,
    /// Follower of each descriptor: in the free list, or in its chain.
    next: Vec<u16>,
    /// State of the chain that starts at each descriptor.
    chains: Vec<Chain>,
    first_free: u16,
    free: u16,
    in_flight: u16,
    /// Available index: what the ring holds, and what the device was told.
    added: u16,
    published: u16,
    /// Used index: what was collected, and what the device said when last looked.
    collected: u16,
    used: u16,
    /// The used index last asked for an interrupt at.
    interrupt_at: Option<u16>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Chain {
    in_flight: bool,
    last: u16,
    descriptors: u16,
    writable: u32,
}

const DESCRIPTOR: u64 = 16;
const RING_HEAD: u64 = 4;
const USED_ELEMENT: u64 = 8;
const INDEX: u64 = 2;
const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

impl Queue {
    /// Allocates the rings of a queue with `size` descriptors.
    ///
    /// # Errors
    /// [`QueueError::Size`], [`QueueError::NoMemory`], [`QueueError::NotMemory`].
    pub fn new<M: GuestMem, A: TableAlloc>(
        memory: &M,
        alloc: &mut A,
        size: u16,
        options: QueueOptions,
    ) -> Result<Self, QueueError> {
        if !size.is_power_of_two() {
            return Err(QueueError::Size(size));
        }
        let entries = u64::from(size);
        let available = DESCRIPTOR * entries;
        // Both rings end with a word for EVENT_IDX.
        let used = (available + RING_HEAD + 2 * entries + 2).next_multiple_of(4);
        let rings = allocate(alloc, used + RING_HEAD + USED_ELEMENT * entries + 2)?;
        let indirect_tables = match options.indirect {
            0 => Gpa(0),
            buffers => allocate(alloc, entries * u64::from(buffers) * DESCRIPTOR)?,
        };
        let layout = QueueLayout {
            size,
            descriptors: rings,
            available: Gpa(rings.0 + available),
            used: Gpa(rings.0 + used),
        };
        if !options.interrupts && !options.event_idx {
            memory.store_release(layout.available, NO_INTERRUPT)?;
        }
        Ok(Self {
            layout,
            options,
            indirect_tables,
            next: (1..=size).collect(),
            chains: vec![Chain::default(); size.into()],
            first_free: 0,
            free: size,
            in_flight: 0,
            added: 0,
            published: 0,
            collected: 0,
            used: 0,
            interrupt_at: None,
        })
    }

    /// Where the queue lies.
    pub const fn layout(&self) -> QueueLayout {
        self.layout
    }

    /// How many chains are with the device, or will be with the next [`publish`](Self::publish).
    pub const fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// The head that the next [`add`](Self::add) gives its chain, so that buffers can be chosen by it; `None` where
    /// a chain of `buffers` buffers does not fit now.
    pub fn next_head(&self, buffers: u16) -> Option<u16> {
        (self.free >= self.descriptors_for(buffers)).then_some(self.first_free)
    }

    /// Makes a chain: `readable` for the device to read, then `writable` for it to write. The device sees it at the
    /// next [`publish`](Self::publish). The buffers are the device's until [`collect`](Self::collect) gives the head.
    ///
    /// # Errors
    /// [`QueueError::Full`], [`QueueError::Chain`], [`QueueError::NotMemory`]; the queue is as before.
    pub fn add<M: GuestMem>(
        &mut self,
        memory: &M,
        readable: &[Buffer],
        writable: &[Buffer],
    ) -> Result<u16, QueueError> {
        let buffers = u16::try_from(readable.len() + writable.len()).map_err(|_| QueueError::Chain)?;
        let (readable_bytes, writable_bytes) = (total(readable)?, total(writable)?);
        if buffers == 0 || readable_bytes.checked_add(writable_bytes).is_none() {
            return Err(QueueError::Chain);
        }
        let descriptors = self.descriptors_for(buffers);
        if descriptors > self.layout.size {
            return Err(QueueError::Chain);
        }
        let head = self.next_head(buffers).ok_or(QueueError::Full)?;
        let all =
            readable.iter().map(|buffer| (buffer, 0)).chain(writable.iter().map(|buffer| (buffer, F_WRITE)));
        let last = if descriptors < buffers {
            // Into the head's own table, in order.
            let size = DESCRIPTOR * u64::from(self.options.indirect);
            let table = Gpa(self.indirect_tables.0 + u64::from(head) * size);
            write_chain(memory, table, 0, |at| at + 1, all, buffers)?;
            let whole = Buffer { at: table, length: u32::from(buffers) * 16 };
            let place = self.layout.descriptors.0 + DESCRIPTOR * u64::from(head);
            memory.write(Gpa(place), &descriptor(&whole, F_INDIRECT, 0))?;
            head
        } else {
            write_chain(memory, self.layout.descriptors, head, |at| link(&self.next, at), all, buffers)?
        };
        let place = self.layout.available.0 + RING_HEAD + 2 * u64::from(self.added & (self.layout.size - 1));
        memory.write(Gpa(place), &head.to_le_bytes())?;

        self.first_free = link(&self.next, last);
        self.free -= descriptors;
        self.in_flight += 1;
        self.added = self.added.wrapping_add(1);
        if let Some(chain) = self.chains.get_mut(usize::from(head)) {
            *chain = Chain { in_flight: true, last, descriptors, writable: writable_bytes };
        }
        Ok(head)
    }

    /// Shows the device everything added since the last time, with one store. `true`: it wants to be notified.
    ///
    /// # Errors
    /// [`QueueError::NotMemory`].
    pub fn publish<M: GuestMem>(&mut self, memory: &M) -> Result<bool, QueueError> {
        if self.added == self.published {
            return Ok(false);
        }
        let (old, new) = (self.published, self.added);
        memory.store_release(Gpa(self.layout.available.0 + INDEX), new)?;
        self.published = new;
        // The device stores what it wants to hear of and then looks for more buffers; here it is the other way round.
        memory.barrier();
        if self.options.event_idx {
            let event = memory.load_acquire(self.available_event())?;
            Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
        } else {
            Ok(memory.load_acquire(self.layout.used)? & NO_NOTIFY == 0)
        }
    }

    /// Takes back the next chain that the device has finished with; `None` where there is none yet.
    ///
    /// # Errors
    /// [`QueueError::UsedIndex`] and [`QueueError::UsedId`] where the device broke the protocol,
    /// [`QueueError::NotMemory`]. Chains that the device has stay with it.
    pub fn collect<M: GuestMem>(&mut self, memory: &M) -> Result<Option<Used>, QueueError> {
        if self.collected == self.used && !self.look(memory)? {
            return Ok(None);
        }
        let slot = u64::from(self.collected & (self.layout.size - 1));
        let mut element = [0; 8];
        memory.read(Gpa(self.layout.used.0 + RING_HEAD + USED_ELEMENT * slot), &mut element)?;
        self.collected = self.collected.wrapping_add(1);
        let [id @ .., _, _, _, _] = element;
        let [_, _, _, _, length @ ..] = element;
        let (id, length) = (u32::from_le_bytes(id), u32::from_le_bytes(length));
        let head = u16::try_from(id).map_err(|_| QueueError::UsedId { id })?;
        let chain = self
            .chains
            .get_mut(usize::from(head))
            .filter(|chain| chain.in_flight)
            .ok_or(QueueError::UsedId { id })?;
        chain.in_flight = false;
        let Chain { last, descriptors, writable, .. } = *chain;
        if let Some(next) = self.next.get_mut(usize::from(last)) {
            *next = self.first_free;
        }
        self.first_free = head;
        self.free += descriptors;
        self.in_flight -= 1;
        Ok(Some(Used { head, written: length.min(writable) }))
    }

    /// Gives the memory back. The device must have been reset.
    pub fn release<A: TableAlloc>(self, alloc: &mut A) {
        let entries = u64::from(self.layout.size);
        let rings = self.layout.used.0 - self.layout.descriptors.0 + RING_HEAD + USED_ELEMENT * entries + 2;
        alloc.free(self.layout.descriptors, size_lg2(rings));
        if self.options.indirect != 0 {
            let tables = entries * u64::from(self.options.indirect) * DESCRIPTOR;
            alloc.free(self.indirect_tables, size_lg2(tables));
        }
    }

    /// Reads the device's index. Asks for an interrupt first where there is nothing new.
    fn look<M: GuestMem>(&mut self, memory: &M) -> Result<bool, QueueError> {
        let index = Gpa(self.layout.used.0 + INDEX);
        let mut used = memory.load_acquire(index)?;
        if used == self.collected && self.ask_for_interrupt(memory)? {
            used = memory.load_acquire(index)?;
        }
        let found = used.wrapping_sub(self.collected);
        // Chains that were added but not published are not the device's to use.
        let in_flight = self.in_flight - self.added.wrapping_sub(self.published);
        if found > in_flight {
            return Err(QueueError::UsedIndex { found, in_flight });
        }
        self.used = used;
        Ok(found != 0)
    }

    /// `true` where the device may have gone on without knowing that it should interrupt.
    fn ask_for_interrupt<M: GuestMem>(&mut self, memory: &M) -> Result<bool, QueueError> {
        if !self.options.event_idx || !self.options.interrupts || self.interrupt_at == Some(self.collected) {
            return Ok(false);
        }
        let used_event = self.layout.available.0 + RING_HEAD + 2 * u64::from(self.layout.size);
        memory.store_release(Gpa(used_event), self.collected)?;
        self.interrupt_at = Some(self.collected);
        memory.barrier();
        Ok(true)
    }

    const fn descriptors_for(&self, buffers: u16) -> u16 {
        if buffers > 1 && buffers <= self.options.indirect { 1 } else { buffers }
    }

    fn available_event(&self) -> Gpa {
        Gpa(self.layout.used.0 + RING_HEAD + USED_ELEMENT * u64::from(self.layout.size))
    }
}

/// Takes `bytes` bytes, at least a page, from an allocator of powers of two.
pub(crate) fn allocate<A: TableAlloc>(alloc: &mut A, bytes: u64) -> Result<Gpa, QueueError> {
    alloc.alloc(size_lg2(bytes)).ok_or(QueueError::NoMemory)
}

/// log2 of the allocation that holds `bytes` bytes.
pub(crate) const fn size_lg2(bytes: u64) -> u8 {
    const PAGE_LG2: u8 = 12;
    let mut lg2 = PAGE_LG2;
    while lg2 < 63 && bytes >> lg2 != 0 && bytes != 1 << lg2 {
        lg2 += 1;
    }
    lg2
}

/// Writes a chain of `count` buffers into `table`, from descriptor `head` on, each followed by that which `next` gives.
/// Gives the last one.
fn write_chain<'b, M: GuestMem>(
    memory: &M,
    table: Gpa,
    head: u16,
    next: impl Fn(u16) -> u16,
    buffers: impl Iterator<Item = (&'b Buffer, u16)>,
    count: u16,
) -> Result<u16, QueueError> {
    let mut at = head;
    for (left, (buffer, flags)) in (0..count).rev().zip(buffers) {
        let place = Gpa(table.0 + DESCRIPTOR * u64::from(at));
        if left == 0 {
            memory.write(place, &descriptor(buffer, flags, 0))?;
        } else {
            let follower = next(at);
            memory.write(place, &descriptor(buffer, flags | F_NEXT, follower))?;
            at = follower;
        }
    }
    Ok(at)
}

fn descriptor(buffer: &Buffer, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    let word = u64::from(buffer.length) | u64::from(flags) << 32 | u64::from(next) << 48;
    bytes[..8].copy_from_slice(&buffer.at.0.to_le_bytes());
    bytes[8..].copy_from_slice(&word.to_le_bytes());
    bytes
}

fn total(buffers: &[Buffer]) -> Result<u32, QueueError> {
    buffers.iter().try_fold(0u32, |sum, buffer| {
        if buffer.length == 0 {
            return Err(QueueError::Chain);
        }
        sum.checked_add(buffer.length).ok_or(QueueError::Chain)
    })
}

/// Follower of a descriptor; the end of the list is a number that no descriptor has.
fn link(next: &[u16], at: u16) -> u16 {
    next.get(usize::from(at)).copied().unwrap_or(u16::MAX)
}
