//! Guest memory as the walkers of translation tables see it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};

use pgtable_formats::{Gpa, NotMemory, TableMem};
use viommu_device::soft::Stage2;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MmapRegion, VolatileMemory};
#[cfg(feature = "loopback")]
use vm_memory::{VolatileSlice, bitmap::BS};

/// Translation tables in the memory of a guest.
///
/// A load costs about what the machine's own load does: the region that was hit last is tried first, and its host
/// address waits in a register or the cache, while a lookup through [`GuestMemoryMmap`] depends on the address that
/// the previous load gave. Every access is one atomic, little-endian 64-bit access. Writes are marked in the region's
/// dirty bitmap.
///
/// It is a snapshot of the memory map and keeps its regions mapped. Regions that are added to the guest later are not in
/// it.
///
/// ```
/// use pgtable_formats::{Gpa, NotMemory, TableMem};
/// use viommu_queue::GuestTables;
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
///
/// let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0x4000_0000), 0x1_0000)]).unwrap();
/// memory.write_obj(0x1234_u64.to_le(), GuestAddress(0x4000_1000)).unwrap();
///
/// let tables = GuestTables::new(&memory);
/// assert_eq!(tables.load(Gpa(0x4000_1000)), Ok(0x1234));
/// assert_eq!(tables.load(Gpa(0x4001_0000)), Err(NotMemory));
/// ```
#[derive(Debug)]
pub struct GuestTables<B = ()> {
    /// In ascending order, disjoint.
    regions: Box<[Region<B>]>,
    /// Index of the region that was hit last; any value is right, some are slower.
    hint: AtomicUsize,
}

/// Words that are loaded between two checks of bounds.
const BLOCK: usize = 16;

#[derive(Debug)]
struct Region<B> {
    start: u64,
    mapping: Arc<MmapRegion<B>>,
}

impl<B: Bitmap + 'static> GuestTables<B> {
    /// Tables in `memory`, as it is now.
    pub fn new(memory: &GuestMemoryMmap<B>) -> Self {
        let regions =
            memory.iter().map(|region| Region { start: region.start_addr().0, mapping: region.get_mmap() });
        Self { regions: regions.collect(), hint: AtomicUsize::new(0) }
    }

    /// The `length` bytes from `at`, where they lie in one region: for a driver in the same process.
    #[cfg(feature = "loopback")]
    #[inline]
    pub(crate) fn slice(&self, at: Gpa, length: usize) -> Option<VolatileSlice<'_, BS<'_, B>>> {
        let (region, offset) = self.find(at).ok()?;
        region.mapping.get_slice(offset, length).ok()
    }

    /// The region of `at`, and where in it.
    #[inline]
    fn find(&self, at: Gpa) -> Result<(&Region<B>, usize), NotMemory> {
        let hint = self.hint.load(Ordering::Relaxed);
        match self.regions.get(hint).and_then(|region| Some((region, region.offset(at)?))) {
            Some(found) => Ok(found),
            None => self.search(at),
        }
    }

    #[cold]
    fn search(&self, at: Gpa) -> Result<(&Region<B>, usize), NotMemory> {
        let after = self.regions.partition_point(|region| region.start <= at.0);
        let index = after.checked_sub(1).ok_or(NotMemory)?;
        let region = self.regions.get(index).ok_or(NotMemory)?;
        let offset = region.offset(at).ok_or(NotMemory)?;
        self.hint.store(index, Ordering::Relaxed);
        Ok((region, offset))
    }
}

impl<B: Bitmap + 'static> Region<B> {
    #[inline]
    fn offset(&self, at: Gpa) -> Option<usize> {
        let offset = usize::try_from(at.0.wrapping_sub(self.start)).ok()?;
        (offset < self.mapping.size()).then_some(offset)
    }

    /// Loads words from `offset` on, until one does not lie in the region. How many there were.
    #[inline]
    fn load_run(&self, offset: usize, stride: u64, words: &mut [u64]) -> usize {
        let Ok(stride) = usize::try_from(stride) else { return 0 };
        let mut loaded = match stride {
            8 => self.load_blocks::<8>(offset, words),
            64 => self.load_blocks::<64>(offset, words),
            _ => 0,
        };
        for word in words.iter_mut().skip(loaded) {
            let at = loaded.checked_mul(stride).and_then(|forward| offset.checked_add(forward));
            let Some(Ok(place)) = at.map(|at| self.mapping.get_atomic_ref::<AtomicU64>(at)) else { break };
            *word = u64::from_le(place.load(Ordering::Relaxed));
            loaded += 1;
        }
        // As after each load of its own: what the words point to is read as it was then, or later.
        fence(Ordering::Acquire);
        loaded
    }

    /// As many whole blocks of words as lie in the region. With all sizes known their bounds are checked once.
    #[inline]
    fn load_blocks<const STRIDE: usize>(&self, offset: usize, words: &mut [u64]) -> usize {
        let (mut at, mut loaded) = (offset, 0);
        for block in words.as_chunks_mut::<BLOCK>().0 {
            let Ok(memory) = self.mapping.get_slice(at, BLOCK * STRIDE) else { break };
            for (index, word) in block.iter_mut().enumerate() {
                let Ok(place) = memory.get_atomic_ref::<AtomicU64>(index * STRIDE) else { return loaded };
                *word = u64::from_le(place.load(Ordering::Relaxed));
            }
            loaded += BLOCK;
            at = at.saturating_add(BLOCK * STRIDE);
        }
        loaded
    }
}

/// The new value shares the regions.
impl<B> Clone for GuestTables<B> {
    fn clone(&self) -> Self {
        let regions = self.regions.iter();
        Self {
            regions: regions.map(|r| Region { start: r.start, mapping: Arc::clone(&r.mapping) }).collect(),
            hint: AtomicUsize::new(self.hint.load(Ordering::Relaxed)),
        }
    }
}

impl<B: Bitmap + 'static> TableMem for GuestTables<B> {
    #[inline]
    fn load(&self, at: Gpa) -> Result<u64, NotMemory> {
        let (region, offset) = self.find(at)?;
        let word = region.mapping.get_atomic_ref::<AtomicU64>(offset).map_err(|_| NotMemory)?;
        // Acquire: the table that an entry points to is read as it was when the guest wrote the entry, or later.
        Ok(u64::from_le(word.load(Ordering::Acquire)))
    }

    fn compare_exchange(&self, at: Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, NotMemory> {
        let (region, offset) = self.find(at)?;
        let word = region.mapping.get_atomic_ref::<AtomicU64>(offset).map_err(|_| NotMemory)?;
        let seen = word.compare_exchange(current.to_le(), new.to_le(), Ordering::AcqRel, Ordering::Acquire);
        if seen.is_ok() {
            region.mapping.bitmap().mark_dirty(offset, size_of::<u64>());
        }
        Ok(seen.map(u64::from_le).map_err(u64::from_le))
    }

    fn load_run(&self, at: Gpa, stride: u64, words: &mut [u64]) -> usize {
        let (mut next, mut loaded) = (Some(at), 0);
        while let (Some(at), Some(left)) = (next, words.get_mut(loaded..).filter(|left| !left.is_empty())) {
            let Ok((region, offset)) = self.find(at) else { break };
            let count = region.load_run(offset, stride, left);
            if count == 0 {
                break;
            }
            loaded += count;
            next = stride.checked_mul(count as u64).and_then(|offset| at.checked_add(offset));
        }
        loaded
    }
}

impl<B: Bitmap + 'static> Stage2 for GuestTables<B> {
    fn contains(&self, first: Gpa, last: Gpa) -> bool {
        let mut at = first;
        while at <= last {
            let Ok((region, _)) = self.find(at) else { return false };
            // No region reaches 2^64, so there is an address behind each.
            let Some(behind) = Gpa(region.start).checked_add(region.mapping.size() as u64) else {
                return false;
            };
            at = behind;
        }
        first <= last
    }
}
