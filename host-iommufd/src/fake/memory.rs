//! The process's memory, as the hardware reaches it.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};

use pgtable_formats::{Gpa, NotMemory, TableMem};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, VolatileMemory,
};

use crate::kernel::Backing;

/// Guest memory that knows which place in the process is behind an address.
pub trait Memory: TableMem {
    /// The guest-physical address of a place that an IOAS may lead to; `None` where it is not guest memory.
    fn gpa(&self, at: Backing) -> Option<Gpa>;
}

impl<M: Memory + ?Sized> Memory for &M {
    fn gpa(&self, at: Backing) -> Option<Gpa> {
        (**self).gpa(at)
    }
}

/// The memory of a VMM.
#[derive(Clone, Debug)]
pub struct FakeMemory {
    map: GuestMemoryMmap,
}

impl FakeMemory {
    /// `memory`, as it is now.
    pub fn new(memory: &GuestMemoryMmap) -> Self {
        Self { map: memory.clone() }
    }
}

impl Memory for FakeMemory {
    fn gpa(&self, at: Backing) -> Option<Gpa> {
        self.map.iter().find_map(|region| {
            let offset = match at {
                Backing::Memory(address) => address.checked_sub(region.as_ptr() as u64)?,
                Backing::File { fd, offset } => {
                    let file = region.file_offset().filter(|file| file.file().as_raw_fd() == fd)?;
                    offset.checked_sub(file.start())?
                }
            };
            (offset < region.len()).then(|| Gpa(region.start_addr().0 + offset))
        })
    }
}

impl TableMem for FakeMemory {
    fn load(&self, at: Gpa) -> Result<u64, NotMemory> {
        self.map.load(GuestAddress(at.0), Ordering::Acquire).map(u64::from_le).map_err(|_| NotMemory)
    }

    fn compare_exchange(&self, at: Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, NotMemory> {
        let slice = self.map.get_slice(GuestAddress(at.0), 8).map_err(|_| NotMemory)?;
        let word = slice.get_atomic_ref::<AtomicU64>(0).map_err(|_| NotMemory)?;
        let outcome =
            word.compare_exchange(current.to_le(), new.to_le(), Ordering::AcqRel, Ordering::Acquire);
        Ok(outcome.map(u64::from_le).map_err(u64::from_le))
    }
}
