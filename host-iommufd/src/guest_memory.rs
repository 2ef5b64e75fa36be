//! Guest memory, by guest-physical address: what devices may be given.

use std::any::Any;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use nix::errno::Errno;
use nix::libc;
use pgtable_formats::{Gpa, Iova, IovaRange};
use viommu_device::mapping::{MapFlags, Mapping};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _, GuestRegionMmap};

use crate::kernel::{Backing, IoasMapping, Iommufd};
use crate::objects::Ioas;

/// The regions of a guest's memory. Holds them mapped in this process: what devices reach stays pinned.
pub(crate) struct GuestMemory {
    /// Ascending and disjoint.
    regions: Vec<Region>,
    _held: Box<dyn Any + Send + Sync>,
}

/// One region of memory.
#[derive(Clone, Debug)]
struct Region {
    /// Its guest-physical addresses.
    range: IovaRange,
    /// What devices are given: the file, where there is one that the kernel takes, else the address.
    backing: Backing,
    /// Its address in this process.
    address: u64,
    /// What this process may do with it, and so what devices may.
    readable: bool,
    writable: bool,
}

impl GuestMemory {
    pub(crate) fn new<B>(memory: &GuestMemoryMmap<B>) -> Self
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let mut regions: Vec<Region> = memory.iter().filter_map(Region::new).collect();
        regions.sort_unstable_by_key(|region| region.range.start());
        Self { regions, _held: Box::new(memory.clone()) }
    }

    /// Maps all of it at its guest-physical addresses, and finds out which files the kernel takes.
    pub(crate) fn map_all<K: Iommufd>(&mut self, ioas: &Arc<Ioas<K>>) -> Result<(), Errno> {
        for region in &mut self.regions {
            let Err(errno) = ioas.map(&region.all()) else { continue };
            if matches!(region.backing, Backing::Memory(_)) {
                return Err(errno);
            }
            tracing::debug!(region = %region.range, %errno, "file not taken, mapped by address");
            region.backing = Backing::Memory(region.address);
            ioas.map(&region.all())?;
        }
        Ok(())
    }

    /// The regions, by guest-physical address.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = IovaRange> + '_ {
        self.regions.iter().map(|region| region.range)
    }

    /// Whether a region of it is not writable.
    pub(crate) fn has_read_only(&self) -> bool {
        self.regions.iter().any(|region| !region.writable)
    }

    /// Whether all of the `size` bytes from `first` on are memory.
    pub(crate) fn contains(&self, first: Gpa, size: u64) -> bool {
        IovaRange::from_length(Iova(first.0), size).is_some_and(|range| self.covers(range))
    }

    /// What to map for `mapping`, region by region; `None` where part of it is not memory, or not memory that may be used
    /// so: the kernel would let devices write to a file that is mapped read-only here.
    pub(crate) fn pieces(&self, mapping: &Mapping) -> Option<impl Iterator<Item = IoasMapping> + '_> {
        let output = IovaRange::new(
            Iova(mapping.output.0),
            Iova(mapping.output.checked_add(mapping.range.length_minus_one())?.0),
        )?;
        let Mapping { range, flags, .. } = *mapping;
        if !self.covers(output) || !self.overlapping(output).all(|region| region.permits(flags)) {
            return None;
        }
        Some(self.overlapping(output).filter_map(move |region| {
            let start = region.range.start().max(output.start());
            let last = region.range.last().min(output.last());
            // Both lie in `output`, and `range` is as long.
            let at = |address: Iova| range.start().checked_add(address.0.checked_sub(output.start().0)?);
            Some(IoasMapping {
                range: IovaRange::new(at(start)?, at(last)?)?,
                backing: region.backing_at(start)?,
                readable: flags.contains(MapFlags::READ),
                writable: flags.contains(MapFlags::WRITE),
            })
        }))
    }

    /// By guest-physical addresses.
    fn covers(&self, range: IovaRange) -> bool {
        let mut next = Some(range.start());
        for region in self.overlapping(range) {
            match next {
                Some(address) if region.range.contains(address) => {}
                _ => return false,
            }
            if region.range.last() >= range.last() {
                return true;
            }
            next = region.range.last().checked_add(1);
        }
        false
    }

    fn overlapping(&self, range: IovaRange) -> impl Iterator<Item = &Region> {
        let from = self.regions.partition_point(|region| region.range.last() < range.start());
        let regions = self.regions.get(from..).unwrap_or_default();
        regions.iter().take_while(move |region| region.range.start() <= range.last())
    }
}

impl Region {
    /// `None` for one without addresses.
    fn new<B: Bitmap>(region: &GuestRegionMmap<B>) -> Option<Self> {
        let range = IovaRange::from_length(Iova(region.start_addr().0), region.len())?;
        let mmap = region.get_mmap();
        let address = u64::try_from(mmap.as_ptr().addr()).ok()?;
        let shared = mmap.flags() & libc::MAP_SHARED != 0;
        // A private mapping has pages that the file has not.
        let file = mmap.file_offset().filter(|_| shared);
        let backing = match file {
            Some(file) => Backing::File { fd: file.file().as_raw_fd(), offset: file.start() },
            None => Backing::Memory(address),
        };
        let allows = |prot| mmap.prot() & prot != 0;
        let (readable, writable) = (allows(libc::PROT_READ), allows(libc::PROT_WRITE));
        Some(Self { range, backing, address, readable, writable })
    }

    /// Whether this process may do with it what a mapping with `flags` lets devices do.
    fn permits(&self, flags: MapFlags) -> bool {
        (self.readable || !flags.contains(MapFlags::READ))
            && (self.writable || !flags.contains(MapFlags::WRITE))
    }

    /// The whole region at its guest-physical address.
    fn all(&self) -> IoasMapping {
        let Self { range, backing, readable, writable, .. } = *self;
        IoasMapping { range, backing, readable, writable }
    }

    /// What is behind a guest-physical address that lies in the region.
    fn backing_at(&self, address: Iova) -> Option<Backing> {
        let inside = address.0.checked_sub(self.range.start().0)?;
        Some(match self.backing {
            Backing::Memory(start) => Backing::Memory(start.checked_add(inside)?),
            Backing::File { fd, offset } => Backing::File { fd, offset: offset.checked_add(inside)? },
        })
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    fn memory() -> GuestMemory {
        let ranges = [(0x1000, 0x1000), (0x2000, 0x2000), (0x8000, 0x1000)];
        let ranges = ranges.map(|(start, size)| (GuestAddress(start), size));
        GuestMemory::new(&GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap())
    }

    fn mapping(start: u64, length: u64, output: u64) -> Mapping {
        let range = IovaRange::from_length(Iova(start), length).unwrap();
        Mapping { range, output: Gpa(output), flags: MapFlags::READ }
    }

    #[test]
    fn what_spans_regions_is_memory_unless_there_is_a_hole() {
        let memory = memory();
        for (first, size, expected) in [
            (0x1000, 0x1000, true),
            (0x1800, 0x2800, true),
            (0x0fff, 2, false),
            (0x3fff, 2, false),
            (0x3000, 0x6000, false),
            (0x8fff, 1, true),
            (0x9000, 1, false),
            (u64::MAX, 1, false),
            (0x1000, 0, false),
            (0x1000, u64::MAX, false),
        ] {
            assert_eq!(memory.contains(Gpa(first), size), expected, "{first:#x}+{size:#x}");
        }
    }

    #[test]
    fn pieces_follow_on_and_lead_into_their_region() {
        let memory = memory();
        let bases: Vec<u64> = memory.regions.iter().map(|region| region.address).collect();
        let pieces: Vec<_> = memory.pieces(&mapping(0x10_1800, 0x1800, 0x1800)).unwrap().collect();
        let seen: Vec<_> = pieces.iter().map(|piece| (piece.range, piece.backing)).collect();
        let range = |start, length| IovaRange::from_length(Iova(start), length).unwrap();
        assert_eq!(
            seen,
            [
                (range(0x10_1800, 0x800), Backing::Memory(bases[0] + 0x800)),
                (range(0x10_2000, 0x1000), Backing::Memory(bases[1])),
            ]
        );
        assert!(pieces.iter().all(|piece| piece.readable && !piece.writable));
        assert!(memory.pieces(&mapping(0, 0x2000, 0x3800)).is_none());
        assert!(memory.pieces(&mapping(0, 0x1000, u64::MAX)).is_none());
    }

    /// A private mapping of a file has pages that the file does not have.
    #[test]
    fn only_a_shared_file_is_handed_over_as_one() {
        for (flags, is_file) in [(libc::MAP_SHARED, true), (libc::MAP_PRIVATE, false)] {
            let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
            file.set_len(0x3000).unwrap();
            let file = Some(vm_memory::FileOffset::new(file, 0x1000));
            let protection = libc::PROT_READ;
            let mmap = vm_memory::MmapRegion::build(file, 0x2000, protection, flags).unwrap();
            let region = GuestRegionMmap::new(mmap, GuestAddress(0x1000)).unwrap();
            let memory = GuestMemoryMmap::<()>::from_regions(vec![region]).unwrap();
            let memory = GuestMemory::new(&memory);
            let all = memory.regions[0].all();
            assert_eq!(matches!(all.backing, Backing::File { offset: 0x1000, .. }), is_file);
            assert_eq!((all.readable, all.writable), (true, false));
            assert!(memory.has_read_only());
        }
    }

    /// The kernel sees what this process may do with an address, but not with a file.
    #[test]
    fn nothing_is_mapped_for_what_this_process_may_not_do() {
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        file.set_len(0x2000).unwrap();
        let file = Some(vm_memory::FileOffset::new(file, 0));
        let mmap = vm_memory::MmapRegion::build(file, 0x2000, libc::PROT_READ, libc::MAP_SHARED).unwrap();
        let region = GuestRegionMmap::new(mmap, GuestAddress(0x1000)).unwrap();
        let memory = GuestMemory::new(&GuestMemoryMmap::<()>::from_regions(vec![region]).unwrap());
        let allows = |flags| memory.pieces(&Mapping { flags, ..mapping(0x8000, 0x1000, 0x2000) }).is_some();
        assert!(allows(MapFlags::READ));
        assert!(!allows(MapFlags::WRITE));
        assert!(!allows(MapFlags::READ | MapFlags::WRITE));
    }
}
