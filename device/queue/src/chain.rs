//! One descriptor chain: walked once, its readable part fetched once.

use vm_memory::{GuestMemoryBackend, VolatileMemory};

use crate::error::ChainError;
use crate::ring::{DESCRIPTOR_BYTES, Ring};
use crate::view::{HostSlice, MemoryView};

/// Descriptors of a chain that are followed, and entries that an indirect table may have. A request is less than
/// 1 KiB, so even one cut into single bytes is shorter. A chain without an indirect table is bounded by the queue
/// size, too.
pub const MAX_CHAIN_LENGTH: usize = 1024;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Holds the parts of one chain at a time; its memory is used again for the next.
pub(crate) struct ChainBuffers {
    readable: Box<[u8]>,
    readable_len: usize,
    writable: Box<[u8]>,
    writable_len: usize,
    /// Where the writable part goes.
    pieces: Vec<Piece>,
}

#[derive(Clone, Copy)]
struct Piece {
    address: u64,
    len: usize,
}

/// How far a walk got.
#[derive(Default)]
struct Walk {
    descriptors: usize,
    bytes: u64,
    writable: bool,
}

/// An indirect table.
struct Indirect {
    address: u64,
    len: u32,
}

struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl ChainBuffers {
    /// Of a part that is longer than its limit, the rest is neither read nor written. With `readable_limit` 0,
    /// readable descriptors are an error.
    pub(crate) fn new(readable_limit: usize, writable_limit: usize) -> Self {
        Self {
            readable: vec![0; readable_limit].into(),
            readable_len: 0,
            writable: vec![0; writable_limit].into(),
            writable_len: 0,
            pieces: Vec::new(),
        }
    }

    /// Walks the chain from `head`, fetches the readable part, and zeroes the buffer for the writable one.
    #[inline]
    pub(crate) fn gather<M: GuestMemoryBackend>(
        &mut self,
        ring: &Ring<'_, '_, M>,
        view: &mut MemoryView<'_, M>,
        head: u16,
    ) -> Result<(), ChainError> {
        self.readable_len = 0;
        self.writable_len = 0;
        self.pieces.clear();
        let mut walk = Walk::default();
        let limit = usize::from(ring.size()).min(MAX_CHAIN_LENGTH);
        if let Some(indirect) = self.gather_table(&mut walk, ring.descriptors(), limit, head, view)? {
            self.gather_indirect(&mut walk, &indirect, view)?;
        }
        if let Some(part) = self.writable.get_mut(..self.writable_len) {
            // A tail alone, as in all answers but PROBE's, takes one store.
            match part.first_chunk_mut::<4>() {
                Some(tail) if self.writable_len == 4 => *tail = [0; 4],
                _ => part.fill(0),
            }
        }
        Ok(())
    }

    /// The readable part, and the buffer for the writable one.
    #[inline]
    pub(crate) fn parts(&mut self) -> (&[u8], &mut [u8]) {
        let readable = self.readable.get(..self.readable_len).unwrap_or_default();
        let writable = self.writable.get_mut(..self.writable_len).unwrap_or_default();
        (readable, writable)
    }

    /// Writes the first `used` bytes of the writable part back, and says how many there were.
    #[inline]
    pub(crate) fn scatter<M: GuestMemoryBackend>(&self, view: &mut MemoryView<'_, M>, used: usize) -> u32 {
        let mut bytes = self.writable.get(..used.min(self.writable_len)).unwrap_or_default();
        let mut written = 0;
        for piece in &self.pieces {
            if bytes.is_empty() {
                break;
            }
            let (now, later) = bytes.split_at(piece.len.min(bytes.len()));
            if !view.write(piece.address, now) {
                break;
            }
            written += now.len();
            bytes = later;
        }
        u32::try_from(written).unwrap_or(u32::MAX)
    }

    /// Follows a chain through one table, to its end or to an indirect table.
    ///
    /// Inlined into the hot path although the indirect one uses it, too: a tenth of a request's time.
    #[inline(always)]
    fn gather_table<M: GuestMemoryBackend>(
        &mut self,
        walk: &mut Walk,
        table: &HostSlice<'_, M>,
        limit: usize,
        head: u16,
        view: &mut MemoryView<'_, M>,
    ) -> Result<Option<Indirect>, ChainError> {
        let mut index = head;
        loop {
            let descriptor = Descriptor::load(table, index).ok_or(ChainError::Next(index))?;
            let Descriptor { address, len, flags, next } = descriptor;
            if flags & INDIRECT != 0 {
                // The device must ignore WRITE here.
                return if flags & NEXT != 0 {
                    Err(ChainError::IndirectAndNext)
                } else {
                    Ok(Some(Indirect { address, len }))
                };
            }
            walk.descriptors += 1;
            walk.bytes += u64::from(len);
            if walk.descriptors > limit {
                return Err(ChainError::TooLong(limit));
            }
            if walk.bytes > u64::from(u32::MAX) {
                return Err(ChainError::TooManyBytes);
            }
            if len == 0 {
                return Err(ChainError::Empty);
            }
            let ok = if flags & WRITE != 0 {
                walk.writable = true;
                self.add_writable(address, len, view)
            } else if walk.writable {
                return Err(ChainError::Order);
            } else if self.readable.is_empty() {
                return Err(ChainError::Readable);
            } else {
                self.add_readable(address, len, view)
            };
            if !ok {
                return Err(ChainError::BadAddress { address, len });
            }
            if flags & NEXT == 0 {
                return Ok(None);
            }
            index = next;
        }
    }

    #[cold]
    fn gather_indirect<M: GuestMemoryBackend>(
        &mut self,
        walk: &mut Walk,
        indirect: &Indirect,
        view: &mut MemoryView<'_, M>,
    ) -> Result<(), ChainError> {
        let &Indirect { address, len } = indirect;
        let bytes = len as usize;
        if bytes == 0
            || !bytes.is_multiple_of(DESCRIPTOR_BYTES)
            || bytes / DESCRIPTOR_BYTES > MAX_CHAIN_LENGTH
        {
            return Err(ChainError::IndirectLength(len));
        }
        let table = view.contiguous(address, bytes).ok_or(ChainError::BadAddress { address, len })?;
        match self.gather_table(walk, &table, MAX_CHAIN_LENGTH, 0, view)? {
            None => Ok(()),
            Some(_) => Err(ChainError::NestedIndirect),
        }
    }

    #[inline]
    fn add_readable<M: GuestMemoryBackend>(
        &mut self,
        address: u64,
        len: u32,
        view: &mut MemoryView<'_, M>,
    ) -> bool {
        let Some(free) = self.readable.get_mut(self.readable_len..) else { return false };
        let len = free.len().min(len as usize);
        let Some(target) = free.get_mut(..len) else { return false };
        self.readable_len += len;
        view.read(address, target)
    }

    #[inline]
    fn add_writable<M: GuestMemoryBackend>(
        &mut self,
        address: u64,
        len: u32,
        view: &mut MemoryView<'_, M>,
    ) -> bool {
        let len = (self.writable.len() - self.writable_len).min(len as usize);
        if len > 0 {
            self.writable_len += len;
            self.pieces.push(Piece { address, len });
        }
        view.contains(address, len)
    }
}

impl std::fmt::Debug for ChainBuffers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChainBuffers")
            .field("readable_limit", &self.readable.len())
            .field("writable_limit", &self.writable.len())
            .finish_non_exhaustive()
    }
}

impl Descriptor {
    /// Reads entry `index`, each word once; `None` where the table ends before it.
    #[inline]
    fn load<B: vm_memory::bitmap::BitmapSlice>(
        table: &vm_memory::VolatileSlice<'_, B>,
        index: u16,
    ) -> Option<Self> {
        let offset = usize::from(index) * DESCRIPTOR_BYTES;
        let [address, rest] = table.get_ref::<[u64; 2]>(offset).ok()?.load();
        let (address, rest) = (u64::from_le(address), u64::from_le(rest));
        let [l0, l1, l2, l3, f0, f1, n0, n1] = rest.to_le_bytes();
        Some(Self {
            address,
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        })
    }
}
