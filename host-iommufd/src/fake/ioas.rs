//! An I/O address space: disjoint areas, whole or not at all.

use std::collections::BTreeMap;

use nix::errno::Errno;
use pgtable_formats::{AccessKind, Iova, IovaRange};

use crate::kernel::{Backing, IoasMapping};

/// What addresses and lengths are multiples of.
pub(super) const ALIGNMENT: u64 = 4096;

/// The areas of an I/O address space by their first address.
#[derive(Debug, Default)]
pub(super) struct Ioas {
    areas: BTreeMap<u64, IoasMapping>,
}

impl Ioas {
    /// `closed`: what must not be mapped because of what is attached.
    pub(super) fn map(&mut self, mapping: &IoasMapping, closed: &[IovaRange]) -> Result<(), Errno> {
        let range = mapping.range;
        if !(mapping.readable || mapping.writable) {
            return Err(Errno::EINVAL);
        }
        let aligned = |value: u64| value.is_multiple_of(ALIGNMENT);
        let place = match mapping.backing {
            Backing::Memory(address) => address,
            Backing::File { offset, .. } => offset,
        };
        if !(aligned(range.start().0) && aligned(range.last().0.wrapping_add(1)) && aligned(place)) {
            return Err(Errno::EINVAL);
        }
        if closed.iter().any(|hole| hole.overlaps(range)) {
            return Err(Errno::EINVAL);
        }
        if self.overlaps(range) {
            return Err(Errno::EEXIST);
        }
        self.areas.insert(range.start().0, *mapping);
        Ok(())
    }

    /// In ascending order, up to the first area that would be cut. Answers how many bytes went.
    pub(super) fn unmap(&mut self, range: IovaRange) -> Result<u64, Errno> {
        let inside: Vec<IovaRange> =
            self.areas.values().map(|area| area.range).filter(|area| area.overlaps(range)).collect();
        let mut unmapped = 0;
        for area in &inside {
            if !range.covers(*area) {
                return Err(Errno::ENOENT);
            }
            self.areas.remove(&area.start().0);
            unmapped += area.length_minus_one() + 1;
        }
        if inside.is_empty() && range != IovaRange::ALL { Err(Errno::ENOENT) } else { Ok(unmapped) }
    }

    pub(super) fn overlaps(&self, range: IovaRange) -> bool {
        self.areas.range(..=range.last().0).next_back().is_some_and(|(_, area)| area.range.overlaps(range))
    }

    /// Where an address leads, with what the area permits.
    pub(super) fn lookup(&self, address: u64) -> Option<(Backing, Permits)> {
        let (_, area) = self.areas.range(..=address).next_back()?;
        if !area.range.contains(Iova(address)) {
            return None;
        }
        let further = address - area.range.start().0;
        let at = match area.backing {
            Backing::Memory(start) => Backing::Memory(start + further),
            Backing::File { fd, offset } => Backing::File { fd, offset: offset + further },
        };
        Some((at, Permits { read: area.readable, write: area.writable }))
    }
}

/// What an area permits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Permits {
    pub(super) read: bool,
    pub(super) write: bool,
}

impl Permits {
    pub(super) fn allow(self, kind: AccessKind) -> bool {
        match kind {
            AccessKind::Read | AccessKind::Execute => self.read,
            AccessKind::Write => self.write,
        }
    }
}

/// `0..=u64::MAX` without `closed`.
pub(super) fn open(closed: &[IovaRange]) -> Vec<IovaRange> {
    let mut closed = closed.to_vec();
    closed.sort_by_key(|range| range.start());
    let (mut open, mut next) = (Vec::new(), Some(0));
    for hole in closed {
        let Some(start) = next else { break };
        if let Some(before) = hole.start().0.checked_sub(1)
            && let Some(range) = IovaRange::new(Iova(start), Iova(before))
        {
            open.push(range);
        }
        next = hole.last().0.checked_add(1).map(|after| after.max(start));
    }
    open.extend(next.and_then(|start| IovaRange::new(Iova(start), Iova(u64::MAX))));
    open
}
