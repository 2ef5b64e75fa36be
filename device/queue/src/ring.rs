//! The rings of a split virtqueue, opened for one kick.
//!
//! Configuration and position live in [`virtio_queue::Queue`], so that transports set it up and save it as they do for
//! any device. Its iterators look every field up in guest memory by address, about 15 ns each; here the three parts
//! are looked up once a kick, and the used index is published once.

use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileMemory};

use crate::error::{QueueError, RingPart};
use crate::view::{HostSlice, MemoryView};

/// Bytes of a descriptor.
pub(crate) const DESCRIPTOR_BYTES: usize = 16;
/// The index follows the flags, in either ring.
const INDEX: usize = 2;
/// The entries follow flags and index, in either ring.
const ENTRIES: usize = 4;
const AVAILABLE_ENTRY: usize = 2;
const USED_ENTRY: usize = 8;
/// Bit of the available ring's flags: the driver wants no notification.
const NO_INTERRUPT: u16 = 1;

/// The rings of one queue, looked up once.
pub(crate) struct Ring<'q, 'm, M: GuestMemoryBackend> {
    queue: &'q mut Queue,
    descriptors: HostSlice<'m, M>,
    available: HostSlice<'m, M>,
    used: HostSlice<'m, M>,
    size: u16,
    event_idx: bool,
    next_avail: u16,
    next_used: u16,
    /// Elements published in this kick; several passes may make more than the index counts.
    added: u32,
}

impl<'q, 'm, M: GuestMemoryBackend> Ring<'q, 'm, M> {
    /// The rings of `queue`, and a view that knows the region that they lie in. This checks all that
    /// [`QueueT::is_valid`] does.
    pub(crate) fn open(queue: &'q mut Queue, memory: &'m M) -> Result<(Self, MemoryView<'m, M>), QueueError> {
        if !queue.ready() {
            return Err(QueueError::NotReady);
        }
        let size = usize::from(queue.size());
        let address = queue.desc_table();
        let mut view = MemoryView::new(memory, GuestAddress(address))
            .ok_or(QueueError::BadRing { part: RingPart::Descriptors, address })?;
        let mut part = |part: RingPart, address: u64, entry: usize, around: usize, align: u64| {
            let slice = view.contiguous(address, around + entry * size);
            slice.filter(|_| address.is_multiple_of(align)).ok_or(QueueError::BadRing { part, address })
        };
        // Both rings end in a 16-bit event index.
        let descriptors = part(RingPart::Descriptors, queue.desc_table(), DESCRIPTOR_BYTES, 0, 16)?;
        let available = part(RingPart::Available, queue.avail_ring(), AVAILABLE_ENTRY, ENTRIES + 2, 2)?;
        let used = part(RingPart::Used, queue.used_ring(), USED_ENTRY, ENTRIES + 2, 4)?;
        let ring = Self {
            size: queue.size(),
            event_idx: queue.event_idx_enabled(),
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
            added: 0,
            queue,
            descriptors,
            available,
            used,
        };
        Ok((ring, view))
    }

    /// Entries of the queue.
    #[inline]
    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    /// The descriptor table.
    #[inline]
    pub(crate) fn descriptors(&self) -> &HostSlice<'m, M> {
        &self.descriptors
    }

    /// How many entries the driver has made available and were not taken yet.
    pub(crate) fn pending(&self) -> Result<u16, QueueError> {
        // Acquire: the entries and descriptors that the index covers are read after it.
        let index = self.available.load(INDEX, Ordering::Acquire).map(u16::from_le).map_err(|_| {
            QueueError::BadRing { part: RingPart::Available, address: self.queue.avail_ring() }
        })?;
        let pending = index.wrapping_sub(self.next_avail);
        if pending > self.size {
            return Err(QueueError::AvailableIndex { index, next: self.next_avail, size: self.size });
        }
        Ok(pending)
    }

    /// The head of the first entry not taken yet. Only for entries that are [`pending`](Self::pending).
    #[inline]
    pub(crate) fn head(&self) -> u16 {
        let slot = usize::from(self.next_avail & (self.size - 1));
        let entry = self.available.get_ref::<u16>(ENTRIES + slot * AVAILABLE_ENTRY);
        // The slice covers every slot; a head that no table has is an error for the caller either way.
        entry.map_or(u16::MAX, |entry| u16::from_le(entry.load()))
    }

    /// Takes the entry.
    #[inline]
    pub(crate) fn advance(&mut self) {
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// Gives the chain back. The driver sees it after [`publish`](Self::publish).
    #[inline]
    pub(crate) fn complete(&mut self, head: u16, used: u32) {
        let slot = usize::from(self.next_used & (self.size - 1));
        if let Ok(element) = self.used.get_ref::<u64>(ENTRIES + slot * USED_ENTRY) {
            element.store((u64::from(head) | u64::from(used) << 32).to_le());
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the driver what was completed, and asks for a notification of what it adds from here on.
    ///
    /// What [`pending`](Self::pending) and [`wants_notification`](Self::wants_notification) read after this
    /// cannot be older than what the driver read before it saw this.
    pub(crate) fn publish(&mut self) {
        // A pass completes no more than the queue has entries.
        self.added = self.added.saturating_add(self.next_used.wrapping_sub(self.queue.next_used()).into());
        self.queue.set_next_avail(self.next_avail);
        self.queue.set_next_used(self.next_used);
        // Release: the elements come before the index that covers them. Neither store can fail: `open` checked
        // range and alignment of the guest-physical address, and host pages are aligned like guest pages.
        let shown = self.used.store(self.next_used.to_le(), INDEX, Ordering::Release);
        debug_assert!(shown.is_ok());
        if self.event_idx {
            let avail_event = ENTRIES + usize::from(self.size) * USED_ENTRY;
            let asked = self.used.store(self.next_avail.to_le(), avail_event, Ordering::Relaxed);
            debug_assert!(asked.is_ok());
        }
        fence(Ordering::SeqCst);
    }

    /// Whether the driver asked to be told of what was published in this kick.
    pub(crate) fn wants_notification(&self) -> bool {
        if self.event_idx {
            let used_event = ENTRIES + usize::from(self.size) * AVAILABLE_ENTRY;
            let event = self.available.load(used_event, Ordering::Relaxed).map(u16::from_le);
            // The elements added are the last ones before `next_used`; the event names one of them.
            let behind = event.map(|event| self.next_used.wrapping_sub(event).wrapping_sub(1));
            behind.is_ok_and(|behind| u32::from(behind) < self.added)
        } else {
            let flags = self.available.load(0, Ordering::Relaxed).map(u16::from_le);
            self.added != 0 && flags.is_ok_and(|flags| flags & NO_INTERRUPT == 0)
        }
    }
}
