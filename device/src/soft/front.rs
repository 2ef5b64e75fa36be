//! The first thing that an access meets: translations of 4 KiB pages, whatever they came from.
//!
//! It is direct-mapped and takes a fraction of the time of any other way. It knows too little to be invalidated
//! precisely, so most invalidations empty it, which costs one addition; the caches behind it stay precise.

use alloc::vec;
use alloc::vec::Vec;

use pgtable_formats::{Access, Gpa, Iova, IovaRange, Perms};

use super::Piece;
use super::key::Key;

const SLOTS_LG2: u32 = 12;
/// Pages in front of all caches.
pub const FRONT_SLOTS: usize = 1 << SLOTS_LG2;

/// log2 of the size of such a page in bytes.
pub(super) const PAGE_LG2: u8 = 12;
const PAGE_MASK: u64 = (1 << PAGE_LG2) - 1;
/// An unmap of more pages than this empties the front.
const MAX_FORGET: u64 = 64;

/// One page. 32 bytes, so that two share a cache line and none needs two.
#[derive(Clone, Copy, Debug)]
#[repr(align(32))]
struct Slot {
    key: Key,
    page: u64,
    /// Counts up with each emptying; the slot is in use where it has the front's.
    epoch: u64,
    /// Bits 63:12: the output page. Bits 11:6: log2 of the size of the piece around it. Bits 5:0: [`Perms`].
    output: u64,
}

const _: () = assert!(size_of::<Slot>() == 32 && Perms::all().bits() < 1 << SIZE_SHIFT);

const SIZE_SHIFT: u32 = 6;
const PERMS_MASK: u64 = (1 << SIZE_SHIFT) - 1;
const EMPTY: Slot = Slot { key: Key::NONE, page: 0, epoch: 0, output: 0 };

#[derive(Debug)]
pub(super) struct Front {
    /// Allocated with the first translation.
    slots: Vec<Slot>,
    epoch: u64,
}

impl Front {
    pub(super) const fn new() -> Self {
        Self { slots: Vec::new(), epoch: 1 }
    }

    #[inline]
    pub(super) fn lookup(&self, key: Key, iova: Iova, access: Access) -> Option<Piece> {
        let page = iova.0 >> PAGE_LG2;
        let slot = self.slots.get(key.slot(page, SLOTS_LG2))?;
        let perms = Perms::from_bits_truncate((slot.output & PERMS_MASK) as u8);
        if slot.key != key || slot.page != page || slot.epoch != self.epoch || !perms.allow(access) {
            return None;
        }
        let size_mask = (1 << (slot.output >> SIZE_SHIFT & 63)) - 1;
        Some(Piece {
            output: Gpa(slot.output & !PAGE_MASK | iova.0 & PAGE_MASK),
            length: size_mask - (iova.0 & size_mask) + 1,
        })
    }

    /// Keeps what `piece` says of the page of `iova`. The piece lies in a naturally aligned block of
    /// `1 << size_lg2` bytes, 12 to 63, that leads to one as well.
    #[inline]
    pub(super) fn fill(&mut self, key: Key, iova: Iova, output: Gpa, size_lg2: u8, perms: Perms) {
        if self.slots.is_empty() {
            self.slots = vec![EMPTY; FRONT_SLOTS];
        }
        let page = iova.0 >> PAGE_LG2;
        if let Some(slot) = self.slots.get_mut(key.slot(page, SLOTS_LG2)) {
            let low = u64::from(size_lg2) << SIZE_SHIFT | u64::from(perms.bits());
            *slot = Slot { key, page, epoch: self.epoch, output: output.0 & !PAGE_MASK | low };
        }
    }

    /// Forgets the pages of `range`, and perhaps all.
    #[inline]
    pub(super) fn forget(&mut self, key: Key, range: IovaRange) {
        let (first, last) = (range.start().0 >> PAGE_LG2, range.last().0 >> PAGE_LG2);
        if last - first >= MAX_FORGET {
            self.clear();
            return;
        }
        for page in first..=last {
            if let Some(slot) = self.slots.get_mut(key.slot(page, SLOTS_LG2))
                && slot.key == key
                && slot.page == page
            {
                *slot = EMPTY;
            }
        }
    }

    #[inline]
    pub(super) fn clear(&mut self) {
        // 2^64 invalidations do not happen.
        self.epoch = self.epoch.wrapping_add(1);
    }
}
