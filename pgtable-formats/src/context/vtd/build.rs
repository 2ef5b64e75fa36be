//! The guest's side: makes a PASID directory and writes entries into its tables.

use super::{
    Caps, DirectoryEntry, PasidEntry, PasidTable, PasidWord0,
    table::{TABLE_BITS, entry_in},
};
use crate::{
    Gpa, Pasid, TableAlloc, TableMem,
    context::build::{BuildError, MIN_ALLOC_LG2, store, store_entry},
};

/// log2 of the size of a PASID table: 64 entries of 64 bytes.
const TABLE_LG2: u8 = 12;

impl PasidTable {
    /// Allocates an empty directory of `1 << directory_lg2` entries (7 to 14) in which untagged DMA uses `untagged`.
    ///
    /// # Errors
    /// [`BuildError::Unsupported`] where [`PasidTable::new`] refuses, [`BuildError::NoTable`].
    pub fn create<A: TableAlloc>(
        directory_lg2: u8,
        untagged: Pasid,
        caps: &Caps,
        alloc: &mut A,
    ) -> Result<Self, BuildError> {
        // With address 0 only the numbers and the capabilities can refuse.
        Self::new(Gpa(0), directory_lg2, untagged, caps).map_err(|_| BuildError::Unsupported)?;
        let size_lg2 = alloc_lg2(directory_lg2);
        let directory = alloc.alloc(size_lg2).ok_or(BuildError::NoTable)?;
        Self::new(directory, directory_lg2, untagged, caps).map_err(|_| {
            alloc.free(directory, size_lg2);
            BuildError::Unsupported
        })
    }

    /// Writes the entry of `pasid`, P last, and before that the PASID table where there is none yet.
    ///
    /// The entry is not judged; [`PasidEntry::first_stage`] makes legal ones.
    ///
    /// # Errors
    /// [`BuildError::InUse`] where the present entry is valid, and the other [`BuildError`]s. The directory is as
    /// before, except that a PASID table may have been installed.
    pub fn write<T: TableMem + TableAlloc>(
        &self,
        memory: &mut T,
        pasid: Pasid,
        entry: &PasidEntry,
    ) -> Result<(), BuildError> {
        let at = match self.entry(memory, pasid)? {
            Some(at) => at,
            None => entry_in(self.install(memory, pasid)?, pasid),
        };
        if PasidWord0::from_bits(memory.load(at)?).present() {
            return Err(BuildError::InUse);
        }
        Ok(store_entry(memory, at, entry.words())?)
    }

    /// Clears P of the entry of `pasid`, and nothing else: hardware that is fetching the entry may still have read P=1
    /// (VT-d, 6.5.3.3). `Ok(false)` where it was not present. An invalidation must follow, before
    /// [`write`](Self::write) may use the place again.
    ///
    /// # Errors
    /// [`BuildError::OutOfTable`], [`BuildError::NotMemory`].
    pub fn clear<M: TableMem>(&self, mem: &M, pasid: Pasid) -> Result<bool, BuildError> {
        let Some(at) = self.entry(mem, pasid)? else {
            return Ok(false);
        };
        let word0 = PasidWord0::from_bits(mem.load(at)?);
        if word0.present() {
            store(mem, at, word0.with_present(false).into_bits())?;
        }
        Ok(word0.present())
    }

    /// Reads the entry of `pasid` as it stands, present or not; `None` where no PASID table holds it.
    ///
    /// # Errors
    /// [`BuildError::OutOfTable`], [`BuildError::NotMemory`].
    pub fn read<M: TableMem>(&self, mem: &M, pasid: Pasid) -> Result<Option<PasidEntry>, BuildError> {
        let Some(at) = self.entry(mem, pasid)? else {
            return Ok(None);
        };
        let mut words = [0; 8];
        for (offset, word) in (0..).step_by(8).zip(&mut words) {
            *word = mem.load(Gpa(at.0 + offset))?;
        }
        Ok(Some(PasidEntry::from_words(words)))
    }

    /// Gives all memory of the directory back. No device may use it any more.
    ///
    /// # Errors
    /// [`BuildError::NotMemory`] where the directory cannot be read; what was not reached is not freed.
    pub fn release<T: TableMem + TableAlloc>(self, memory: &mut T) -> Result<(), BuildError> {
        let (directory, size) = self.extents();
        for offset in (0..size).step_by(8) {
            if let Some(table) = pasid_table(memory.load(Gpa(directory.0 + offset))?) {
                memory.free(table, TABLE_LG2);
            }
        }
        memory.free(directory, alloc_lg2(self.directory_lg2()));
        Ok(())
    }

    /// Where the entry of `pasid` is; `None` where the directory entry is not present.
    fn entry<M: TableMem>(&self, mem: &M, pasid: Pasid) -> Result<Option<Gpa>, BuildError> {
        if pasid.value() >> (self.directory_lg2() + TABLE_BITS) != 0 {
            return Err(BuildError::OutOfTable(pasid));
        }
        let table = pasid_table(mem.load(self.directory_entry(pasid))?);
        Ok(table.map(|table| entry_in(table, pasid)))
    }

    /// The address of the PASID table that now stands in the directory.
    fn install<T: TableMem + TableAlloc>(&self, memory: &mut T, pasid: Pasid) -> Result<Gpa, BuildError> {
        let table = memory.alloc(TABLE_LG2).ok_or(BuildError::NoTable)?;
        let installed = if table.0 >> self.caps().haw != 0 || !table.is_aligned(TABLE_LG2) {
            Err(BuildError::Unsupported)
        } else {
            let entry = DirectoryEntry::new().with_present(true).with_table(table.0 >> 12);
            store(memory, self.directory_entry(pasid), entry.into_bits()).map_err(BuildError::from)
        };
        installed.map(|()| table).inspect_err(|_| memory.free(table, TABLE_LG2))
    }
}

fn pasid_table(entry: u64) -> Option<Gpa> {
    let entry = DirectoryEntry::from_bits(entry);
    entry.present().then(|| Gpa(entry.table() << 12))
}

fn alloc_lg2(directory_lg2: u8) -> u8 {
    (directory_lg2 + 3).max(MIN_ALLOC_LG2)
}
