//! Guest memory as the queues see it: byte ranges by guest-physical address.

use vm_memory::bitmap::MS;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, VolatileMemory, VolatileSlice};

/// Length of nearly all that is written. One store does it, which a copy of any length cannot know.
const TAIL: usize = 4;

/// A piece of guest memory that is contiguous in the host, too.
pub(crate) type HostSlice<'m, M> = VolatileSlice<'m, MS<'m, M>>;

/// Reads and writes byte ranges that may lie across regions.
///
/// It remembers the region it touched last: looking one up costs more than all else of a small access.
pub(crate) struct MemoryView<'m, M: GuestMemoryBackend> {
    memory: &'m M,
    start: u64,
    region: HostSlice<'m, M>,
}

impl<'m, M: GuestMemoryBackend> MemoryView<'m, M> {
    /// `near` is any address in memory.
    pub(crate) fn new(memory: &'m M, near: GuestAddress) -> Option<Self> {
        let (start, region) = find(memory, near.0)?;
        Some(Self { memory, start, region })
    }

    /// The `len` bytes from `at`, where they lie in one region.
    #[inline]
    pub(crate) fn contiguous(&mut self, at: u64, len: usize) -> Option<HostSlice<'m, M>> {
        let chunk = self.chunk(at, len)?;
        (chunk.len() == len).then_some(chunk)
    }

    /// Whether each of the `len` bytes from `at` is memory.
    #[inline]
    pub(crate) fn contains(&mut self, at: u64, len: usize) -> bool {
        self.visit(at, len, |_, _| ())
    }

    /// Reads each byte once. What `buffer` holds after `false` means nothing.
    #[inline]
    pub(crate) fn read(&mut self, at: u64, buffer: &mut [u8]) -> bool {
        let len = buffer.len();
        self.visit(at, len, |done, chunk| {
            if let Some(rest) = buffer.get_mut(done..) {
                chunk.copy_to(rest);
            }
        })
    }

    /// Writes up to the first byte that is not memory.
    #[inline]
    pub(crate) fn write(&mut self, at: u64, bytes: &[u8]) -> bool {
        self.visit(at, bytes.len(), |done, chunk| {
            let Some(rest) = bytes.get(done..) else { return };
            match <[u8; TAIL]>::try_from(rest) {
                Ok(tail) if chunk.len() == TAIL => {
                    let _ = chunk.get_ref(0).map(|target| target.store(tail));
                }
                _ => {
                    chunk.copy_from(rest);
                }
            }
        })
    }

    /// Calls `each` with the contiguous pieces, and how many bytes came before.
    #[inline]
    fn visit(&mut self, at: u64, len: usize, mut each: impl FnMut(usize, &HostSlice<'m, M>)) -> bool {
        let mut done = 0;
        while done < len {
            let Some(chunk) = at.checked_add(done as u64).and_then(|at| self.chunk(at, len - done)) else {
                return false;
            };
            each(done, &chunk);
            done += chunk.len();
        }
        true
    }

    /// As many of the `want` bytes from `at` as lie in one region; at least one.
    #[inline]
    fn chunk(&mut self, at: u64, want: usize) -> Option<HostSlice<'m, M>> {
        let mut offset = at.wrapping_sub(self.start);
        if offset >= self.region.len() as u64 {
            (self.start, self.region) = find(self.memory, at)?;
            offset = at.wrapping_sub(self.start);
        }
        let offset = usize::try_from(offset).ok()?;
        let rest = self.region.len().checked_sub(offset)?;
        self.region.subslice(offset, want.min(rest)).ok()
    }
}

#[cold]
fn find<M: GuestMemoryBackend>(memory: &M, at: u64) -> Option<(u64, HostSlice<'_, M>)> {
    let region = memory.find_region(GuestAddress(at))?;
    Some((region.start_addr().0, region.as_volatile_slice().ok()?))
}
