//! Guest memory as all sides have it.

use std::sync::atomic::Ordering;

use pgtable_formats::{Gpa, NotMemory, TableMem};
use viommu_guest::hal::GuestMem;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::guest_tables::GuestTables;

/// The memory that driver and device share. Clones are the same memory.
#[derive(Clone, Debug)]
pub struct Memory {
    map: GuestMemoryMmap,
    tables: GuestTables,
}

impl Memory {
    /// First address of the memory that [`new`](Self::new) makes.
    pub const BASE: u64 = 0x4000_0000;

    /// `bytes` bytes from [`BASE`](Self::BASE) on, zero and sparse: what nobody touches takes nothing.
    ///
    /// # Panics
    /// Where so much cannot be mapped.
    #[expect(clippy::expect_used, reason = "a machine without memory is none")]
    pub fn new(bytes: usize) -> Self {
        Self::over(
            GuestMemoryMmap::from_ranges(&[(GuestAddress(Self::BASE), bytes)]).expect("memory to be mapped"),
        )
    }

    /// A VMM's own memory, as it is now: regions that come later are not seen.
    pub fn over(map: GuestMemoryMmap) -> Self {
        let tables = GuestTables::new(&map);
        Self { map, tables }
    }

    /// The address of page `number` of [`new`](Self::new)'s memory, pages of 4 KiB counted from 0.
    pub const fn page(number: u64) -> Gpa {
        Gpa(Self::BASE + (number << 12))
    }

    /// As queues and emulated devices have it.
    pub const fn map(&self) -> &GuestMemoryMmap {
        &self.map
    }

    /// As walkers of tables have it.
    pub const fn tables(&self) -> &GuestTables {
        &self.tables
    }

    /// Its lowest address.
    pub fn first(&self) -> Gpa {
        Gpa(self.map.iter().next().map_or(0, |region| region.start_addr().0))
    }

    /// Its highest address; between the two there may be gaps.
    pub fn last(&self) -> Gpa {
        Gpa(self.map.last_addr().0)
    }

    /// Writes a 64-bit little-endian word.
    ///
    /// # Panics
    /// Where there is no memory.
    pub fn store(&self, at: Gpa, value: u64) {
        assert_eq!(self.write(at, &value.to_le_bytes()), Ok(()), "a word at {at}");
    }
}

/// As a guest's own loads and stores: what lies in one region, as nearly all does, is found as fast as tables are.
impl GuestMem for Memory {
    fn read(&self, at: Gpa, bytes: &mut [u8]) -> Result<(), NotMemory> {
        match self.tables.slice(at, bytes.len()) {
            Some(slice) => _ = slice.copy_to(bytes),
            None => self.map.read_slice(bytes, GuestAddress(at.0)).map_err(|_| NotMemory)?,
        }
        Ok(())
    }

    fn write(&self, at: Gpa, bytes: &[u8]) -> Result<(), NotMemory> {
        match self.tables.slice(at, bytes.len()) {
            Some(slice) => slice.copy_from(bytes),
            None => self.map.write_slice(bytes, GuestAddress(at.0)).map_err(|_| NotMemory)?,
        }
        Ok(())
    }

    fn load_acquire(&self, at: Gpa) -> Result<u16, NotMemory> {
        let word = self.tables.slice(at, size_of::<u16>()).ok_or(NotMemory)?;
        word.load(0, Ordering::Acquire).map(u16::from_le).map_err(|_| NotMemory)
    }

    fn store_release(&self, at: Gpa, value: u16) -> Result<(), NotMemory> {
        let word = self.tables.slice(at, size_of::<u16>()).ok_or(NotMemory)?;
        word.store(value.to_le(), 0, Ordering::Release).map_err(|_| NotMemory)
    }
}

impl TableMem for Memory {
    fn load(&self, at: Gpa) -> Result<u64, NotMemory> {
        self.tables.load(at)
    }

    fn compare_exchange(&self, at: Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, NotMemory> {
        self.tables.compare_exchange(at, current, new)
    }
}
