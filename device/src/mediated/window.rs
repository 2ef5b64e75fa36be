//! The memory that descriptor tables of the device's own lie in.

use alloc::collections::BTreeSet;

use pgtable_formats::{Gpa, Iova, IovaRange, NotMemory, TableAlloc, TableMem};
use viommu_wire::{ReservedKind, ReservedRegion};

/// A piece of guest-physical space that the guest was not told of as memory, for tables of the device's own.
///
/// The machine reads it at these addresses, as it reads the guest's memory; the VMM can write it. It should grant the
/// machine no write access (second stage read-only): then not even a guest that ignores the reserved region can change
/// these tables by DMA. For a machine without an SMMUv3 there is no need of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    range: IovaRange,
}

impl Window {
    /// `size` bytes from `first` on. `None` where they are not whole pages of 4 KiB, there are none, or they do not lie
    /// below 2^52.
    pub const fn new(first: Gpa, size: u64) -> Option<Self> {
        let Some(range) = IovaRange::from_length(Iova(first.0), size) else { return None };
        let is_paged = first.is_aligned(PAGE_LG2) && size.trailing_zeros() >= PAGE_LG2 as u32;
        if is_paged && range.last().0 >> 52 == 0 { Some(Self { range }) } else { None }
    }

    /// Its first address.
    pub const fn first(&self) -> Gpa {
        Gpa(self.range.start().0)
    }

    /// Its last address, inside of it.
    pub const fn last(&self) -> Gpa {
        Gpa(self.range.last().0)
    }

    /// Whether any of `size` bytes from `first` on lie in it; those that leave the 64-bit space do.
    pub(super) fn touches(&self, first: Gpa, size: u64) -> bool {
        IovaRange::from_length(Iova(first.0), size).is_none_or(|range| range.overlaps(self.range))
    }

    /// What of it must be told to be reserved beside `others`, which are disjoint. `None` where one of them is for MSIs
    /// and lies in it.
    pub(super) fn reserved(&self, others: &[ReservedRegion]) -> Option<alloc::vec::Vec<ReservedRegion>> {
        let mut inside: alloc::vec::Vec<&ReservedRegion> =
            others.iter().filter(|other| other.range.overlaps(self.range)).collect();
        if inside.iter().any(|other| other.kind == ReservedKind::Msi) {
            return None;
        }
        inside.sort_unstable_by_key(|other| other.range.start());
        let mut pieces = alloc::vec::Vec::new();
        let mut next = Some(self.range.start());
        for other in inside {
            let before = other.range.start().0.checked_sub(1).map(Iova);
            pieces.extend(next.zip(before).and_then(|(start, last)| IovaRange::new(start, last)));
            next = other.range.last().checked_add(1);
        }
        pieces.extend(next.and_then(|start| IovaRange::new(start, self.range.last())));
        Some(pieces.into_iter().map(|range| ReservedRegion { kind: ReservedKind::Reserved, range }).collect())
    }
}

/// Smallest piece that is given out.
const PAGE_LG2: u8 = 12;

/// What of a window is in use. Nothing of this is read from the window itself.
#[derive(Debug)]
pub(super) struct Room {
    /// Naturally aligned blocks: log2 of the size, address.
    free: BTreeSet<(u8, Gpa)>,
    left: u64,
}

impl Room {
    pub(super) fn new(window: Window) -> Self {
        let mut room = Self { free: BTreeSet::new(), left: window.range.length_minus_one() + 1 };
        let (mut at, end) = (window.first().0, window.last().0 + 1);
        while at < end {
            let fits = u64::BITS - 1 - (end - at).leading_zeros();
            let size_lg2 = at.trailing_zeros().min(fits);
            room.free.insert((u8::try_from(size_lg2).unwrap_or(PAGE_LG2), Gpa(at)));
            at += 1 << size_lg2;
        }
        room
    }

    /// Bytes that are left.
    pub(super) const fn left(&self) -> u64 {
        self.left
    }

    fn take(&mut self, size_lg2: u8) -> Option<Gpa> {
        let &(found, at) = self.free.range((size_lg2, Gpa(0))..).next()?;
        self.free.remove(&(found, at));
        for half in size_lg2..found {
            self.free.insert((half, Gpa(at.0 + (1 << half))));
        }
        self.left -= 1 << size_lg2;
        Some(at)
    }

    /// Takes back what was given out with that size.
    pub(super) fn give_back(&mut self, at: Gpa, size_lg2: u8) {
        self.left += 1 << size_lg2;
        let (mut at, mut size_lg2) = (at, size_lg2);
        // A neighbour that never was part of the window is not free.
        while size_lg2 < 52 && self.free.remove(&(size_lg2, Gpa(at.0 ^ 1 << size_lg2))) {
            at = Gpa(at.0 & !(1 << size_lg2));
            size_lg2 += 1;
        }
        self.free.insert((size_lg2, at));
    }
}

/// The window as an allocator of tables.
pub(super) struct Tables<'a, M> {
    pub(super) room: &'a mut Room,
    pub(super) memory: &'a M,
}

impl<M: TableMem> TableAlloc for Tables<'_, M> {
    fn alloc(&mut self, size_lg2: u8) -> Option<Gpa> {
        let size_lg2 = size_lg2.max(PAGE_LG2);
        let at = self.room.take(size_lg2)?;
        match clear(self.memory, at, size_lg2) {
            Ok(()) => Some(at),
            Err(NotMemory) => {
                self.room.give_back(at, size_lg2);
                None
            }
        }
    }

    fn free(&mut self, table: Gpa, size_lg2: u8) {
        self.room.give_back(table, size_lg2.max(PAGE_LG2));
    }
}

/// Most of it is zero already.
fn clear<M: TableMem>(memory: &M, at: Gpa, size_lg2: u8) -> Result<(), NotMemory> {
    for offset in (0..1 << size_lg2).step_by(8) {
        let word = Gpa(at.0 + offset);
        let mut current = memory.load(word)?;
        while current != 0 {
            match memory.compare_exchange(word, current, 0)? {
                Ok(_) => break,
                Err(seen) => current = seen,
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use alloc::vec;
    use alloc::vec::Vec;

    use pgtable_formats::suite::FlatMem;

    use super::*;

    fn window(first: u64, size: u64) -> Window {
        Window::new(Gpa(first), size).unwrap()
    }

    #[test]
    fn windows_consist_of_pages() {
        for (first, size) in [(0x800, 0x1000), (0x1000, 0x800), (0x1000, 0), (1 << 52, 0x1000), (u64::MAX, 1)]
        {
            assert_eq!(Window::new(Gpa(first), size), None, "{first:#x}+{size:#x}");
        }
        let window = window(0x1000, 0x3000);
        assert_eq!((window.first(), window.last()), (Gpa(0x1000), Gpa(0x3fff)));
        for (first, size, expected) in
            [(0, 0x1000, false), (0xfff, 2, true), (0x4000, 1, false), (0x3fff, 1, true), (u64::MAX, 2, true)]
        {
            assert_eq!(window.touches(Gpa(first), size), expected, "{first:#x}");
        }
    }

    #[test]
    fn what_is_reserved_already_is_not_told_again() {
        let region = |kind, start, last| ReservedRegion {
            kind,
            range: IovaRange::new(Iova(start), Iova(last)).unwrap(),
        };
        let reserved = |start, last| region(ReservedKind::Reserved, start, last);
        let window = window(0x1000, 0x4000);
        assert_eq!(window.reserved(&[]), Some(vec![reserved(0x1000, 0x4fff)]));
        let others = [reserved(0x3000, 0x3fff), reserved(0, 0x1fff), reserved(0x8000, 0x8fff)];
        assert_eq!(window.reserved(&others), Some(vec![reserved(0x2000, 0x2fff), reserved(0x4000, 0x4fff)]));
        assert_eq!(window.reserved(&[reserved(0, u64::MAX)]), Some(Vec::new()));
        assert_eq!(window.reserved(&[region(ReservedKind::Msi, 0x4000, 0x7fff)]), None);
        assert!(window.reserved(&[region(ReservedKind::Msi, 0x5000, 0x7fff)]).is_some());
    }

    /// Whatever is given out is inside, aligned, zero and nobody else's; what came back is whole again.
    #[test]
    fn blocks_are_aligned_disjoint_and_whole_again() {
        let memory = FlatMem::new(Gpa(0x3000), 0x20_0000);
        let window = window(0x5000, 0x9_b000);
        let mut room = Room::new(window);
        let whole = room.free.clone();
        let mut given: Vec<(u64, u8)> = Vec::new();
        let mut seed = 1_u64;
        for round in 0..2000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let size_lg2 = 12 + (seed >> 60 & 3) as u8;
            if seed >> 40 & 1 == 0 || round > 1500 {
                if !given.is_empty() {
                    let (at, size_lg2) = given.swap_remove((seed >> 20) as usize % given.len());
                    room.give_back(Gpa(at), size_lg2);
                }
                continue;
            }
            let mut tables = Tables { room: &mut room, memory: &memory };
            let Some(Gpa(at)) = tables.alloc(size_lg2) else { continue };
            let last = at + (1 << size_lg2) - 1;
            assert!(at % (1 << size_lg2) == 0 && at >= 0x5000 && last < 0xa_0000, "{at:#x}");
            assert!(given.iter().all(|&(other, lg2)| last < other || at > other + (1 << lg2) - 1), "{at:#x}");
            for word in (at..last).step_by(8) {
                assert_eq!(memory.load(Gpa(word)), Ok(0));
                memory.store(Gpa(word), !0).unwrap();
            }
            given.push((at, size_lg2));
        }
        for (at, size_lg2) in given {
            room.give_back(Gpa(at), size_lg2);
        }
        assert_eq!((room.free, room.left), (whole, 0x9_b000));
    }
}
