//! The guest's side: makes a context-descriptor table and writes descriptors into it.

use super::{
    Caps, Cd, CdTable, CdWord0, L1Cd, Ste0, Ste1, TableFormat, Untagged,
    table::{CD_LG2, in_leaf, l2_table},
};
use crate::{
    Gpa, Pasid, TableAlloc, TableMem,
    context::build::{BuildError, MIN_ALLOC_LG2, store, store_entry},
};

impl CdTable {
    /// Allocates an empty table for `pasid_bits` of PASID (0: untagged DMA alone, through descriptor 0).
    ///
    /// [`words`](Self::words) are what to bind. CD fetches are write-back and inner-shareable.
    ///
    /// # Errors
    /// [`BuildError::Unsupported`] where `caps` do not have the format or that many PASIDs, or where the allocated
    /// table lies beyond their output size; [`BuildError::NoTable`].
    pub fn create<A: TableAlloc>(
        format: TableFormat,
        pasid_bits: u8,
        untagged: Untagged,
        caps: &Caps,
        alloc: &mut A,
    ) -> Result<Self, BuildError> {
        const WRITE_BACK: u8 = 1;
        const INNER_SHAREABLE: u8 = 3;
        if pasid_bits > Pasid::BITS {
            return Err(BuildError::Unsupported);
        }
        let ste0 = Ste0::new().with_s1_cd_max(pasid_bits).with_s1_fmt(match format {
            TableFormat::Linear => 0,
            TableFormat::TwoLevel4K => 1,
            TableFormat::TwoLevel64K => 2,
        });
        let ste1 = Ste1::new()
            .with_s1_dss(match untagged {
                Untagged::Terminate => 0,
                Untagged::Bypass => 1,
                Untagged::Pasid0 => 2,
            })
            .with_s1_cir(WRITE_BACK)
            .with_s1_cor(WRITE_BACK)
            .with_s1_csh(INNER_SHAREABLE);
        // With address 0, which is aligned, only the capabilities can refuse.
        let model =
            Self::from_ste(ste0.into_bits(), ste1.into_bits(), caps).map_err(|_| BuildError::Unsupported)?;
        let size_lg2 = model.alloc_lg2();
        let base = alloc.alloc(size_lg2).ok_or(BuildError::NoTable)?;
        Self::from_ste(ste0.with_s1_context_ptr(base.0 >> 6 & PTR_MASK).into_bits(), ste1.into_bits(), caps)
            .ok()
            .filter(|table| table.extents().0 == base)
            .ok_or_else(|| {
                alloc.free(base, size_lg2);
                BuildError::Unsupported
            })
    }

    /// Writes the descriptor of `pasid`, V last, and before that the level-2 table where there is none yet.
    ///
    /// `Ok(true)` where a level-1 entry changed: the invalidation that must follow has to cover level 1 as well.
    /// The descriptor is not judged; [`CdSpec::encode`](super::CdSpec::encode) makes legal ones.
    ///
    /// # Errors
    /// [`BuildError::InUse`] where the present descriptor is valid, and the other [`BuildError`]s. The table is as
    /// before, except that a level-2 table may have been installed.
    pub fn write<T: TableMem + TableAlloc>(
        &self,
        memory: &mut T,
        pasid: Pasid,
        cd: &Cd,
    ) -> Result<bool, BuildError> {
        let (at, level1_changed) = match self.descriptor(memory, pasid)? {
            Some(at) => (at, false),
            None => (self.install(memory, pasid)?, true),
        };
        if CdWord0::from_bits(memory.load(at)?).valid() {
            return Err(BuildError::InUse);
        }
        store_entry(memory, at, cd.words())?;
        Ok(level1_changed)
    }

    /// log2 of the size of a level-2 table; `None` where there is no level 2.
    pub const fn leaf_lg2(&self) -> Option<u8> {
        match self.format().leaf_bits() {
            Some(bits) => Some(bits + CD_LG2),
            None => None,
        }
    }

    /// Where the descriptor of `pasid` is, for one who knows where level 2 is and does not want to rely on what
    /// memory says. `leaf` is the level-2 table that holds it, where there is a level 2.
    ///
    /// # Errors
    /// [`BuildError::OutOfTable`], also where `leaf` and the format do not agree.
    pub fn place(&self, leaf: Option<Gpa>, pasid: Pasid) -> Result<Gpa, BuildError> {
        if pasid.value() >> self.pasid_bits() != 0 {
            return Err(BuildError::OutOfTable(pasid));
        }
        match (self.format().leaf_bits(), leaf) {
            (None, None) => Ok(Gpa(self.extents().0.0 + (u64::from(pasid.value()) << CD_LG2))),
            (Some(bits), Some(leaf)) => Ok(in_leaf(leaf, pasid, bits)),
            _ => Err(BuildError::OutOfTable(pasid)),
        }
    }

    /// Lets level 1 lead `pasid`, and those beside it, to the level-2 table `leaf`; `None`: to none. An invalidation
    /// that covers level 1 must follow.
    ///
    /// # Errors
    /// [`BuildError::OutOfTable`], [`BuildError::Unsupported`] where `leaf` is not aligned or lies beyond the output
    /// size, [`BuildError::NotMemory`].
    pub fn link<M: TableMem>(&self, mem: &M, pasid: Pasid, leaf: Option<Gpa>) -> Result<(), BuildError> {
        let leaf_bits = self.format().leaf_bits().ok_or(BuildError::OutOfTable(pasid))?;
        if pasid.value() >> self.pasid_bits() != 0 {
            return Err(BuildError::OutOfTable(pasid));
        }
        let entry = match leaf {
            None => L1Cd::new(),
            Some(leaf) if leaf.0 >> self.caps().oas_bits != 0 || !leaf.is_aligned(leaf_bits + CD_LG2) => {
                return Err(BuildError::Unsupported);
            }
            Some(leaf) => L1Cd::new().with_valid(true).with_l2_ptr(leaf.0 >> 12),
        };
        Ok(store(mem, self.l1_entry(pasid, leaf_bits), entry.into_bits())?)
    }

    /// Clears V of the descriptor of `pasid`, and nothing else: an SMMU that is fetching the descriptor may still have
    /// read V=1 (IHI 0070, 3.21.3). `Ok(false)` where it was not valid. An invalidation must follow, before
    /// [`write`](Self::write) may use the place again.
    ///
    /// # Errors
    /// [`BuildError::OutOfTable`], [`BuildError::NotMemory`].
    pub fn clear<M: TableMem>(&self, mem: &M, pasid: Pasid) -> Result<bool, BuildError> {
        let Some(at) = self.descriptor(mem, pasid)? else {
            return Ok(false);
        };
        let word0 = CdWord0::from_bits(mem.load(at)?);
        if word0.valid() {
            store(mem, at, word0.with_valid(false).into_bits())?;
        }
        Ok(word0.valid())
    }

    /// Reads the descriptor of `pasid` as it stands, valid or not; `None` where no level-2 table holds it.
    ///
    /// # Errors
    /// [`BuildError::OutOfTable`], [`BuildError::NotMemory`].
    pub fn read<M: TableMem>(&self, mem: &M, pasid: Pasid) -> Result<Option<Cd>, BuildError> {
        let Some(at) = self.descriptor(mem, pasid)? else {
            return Ok(None);
        };
        let mut words = [0; 8];
        for (offset, word) in (0..).step_by(8).zip(&mut words) {
            *word = mem.load(Gpa(at.0 + offset))?;
        }
        Ok(Some(Cd::from_words(words)))
    }

    /// Gives all memory of the table back. No stream may use it any more.
    ///
    /// # Errors
    /// [`BuildError::NotMemory`] where level 1 cannot be read; what was not reached is not freed.
    pub fn release<T: TableMem + TableAlloc>(self, memory: &mut T) -> Result<(), BuildError> {
        let (base, size) = self.extents();
        if let Some(leaf_bits) = self.format().leaf_bits() {
            for offset in (0..size).step_by(8) {
                let entry = L1Cd::from_bits(memory.load(Gpa(base.0 + offset))?);
                if let Some(table) = l2_table(entry, leaf_bits) {
                    memory.free(table, leaf_bits + CD_LG2);
                }
            }
        }
        memory.free(base, self.alloc_lg2());
        Ok(())
    }

    /// Where the descriptor of `pasid` is; `None` where the level-1 entry is not valid.
    fn descriptor<M: TableMem>(&self, mem: &M, pasid: Pasid) -> Result<Option<Gpa>, BuildError> {
        if pasid.value() >> self.pasid_bits() != 0 {
            return Err(BuildError::OutOfTable(pasid));
        }
        let Some(leaf_bits) = self.format().leaf_bits() else {
            return Ok(Some(Gpa(self.extents().0.0 + (u64::from(pasid.value()) << CD_LG2))));
        };
        let entry = L1Cd::from_bits(mem.load(self.l1_entry(pasid, leaf_bits))?);
        Ok(l2_table(entry, leaf_bits).map(|table| in_leaf(table, pasid, leaf_bits)))
    }

    /// Puts a new level-2 table into level 1; where the descriptor of `pasid` is in it.
    fn install<T: TableMem + TableAlloc>(&self, memory: &mut T, pasid: Pasid) -> Result<Gpa, BuildError> {
        let leaf_bits = self.format().leaf_bits().ok_or(BuildError::OutOfTable(pasid))?;
        let size_lg2 = leaf_bits + CD_LG2;
        let table = memory.alloc(size_lg2).ok_or(BuildError::NoTable)?;
        let linked = self.link(memory, pasid, Some(table));
        linked.map(|()| in_leaf(table, pasid, leaf_bits)).inspect_err(|_| memory.free(table, size_lg2))
    }

    /// log2 of the size of the linear table or of level 1, as [`create`](Self::create) asks for it.
    pub const fn alloc_lg2(&self) -> u8 {
        let size = self.size_lg2();
        if size < MIN_ALLOC_LG2 { MIN_ALLOC_LG2 } else { size }
    }
}

const PTR_MASK: u64 = (1 << 46) - 1;
