//! The canonical PASID directory: from a context entry to the page table of a PASID.

use super::{Caps, ContextEntry, DirectoryEntry, FaultReason, PasidEntry, PasidWord0};
use crate::{Gpa, Pasid, TableMem, context};

/// Why a PASID directory, a context entry or a first-stage table is not bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// ECAP.SMTS or FSTS is 0.
    #[error("first-stage translation is not implemented")]
    FirstStage,
    /// The directory covers more PASIDs than ECAP.PSS, and is larger than one page.
    #[error("the directory covers {asked} PASID bits and {implemented} are implemented")]
    PasidBits {
        /// What the directory covers.
        asked: u8,
        /// What ECAP.PSS says.
        implemented: u8,
    },
    /// The PASID of untagged requests is not 0 and ECAP.RPS is 0.
    #[error("untagged requests can use PASID 0 only")]
    UntaggedFixed,
    /// Untagged requests are to be privileged (RID_PRIV).
    #[error("untagged requests cannot be privileged")]
    UntaggedPrivileged,
    /// 57-bit addresses and CAP.FS5LP is 0.
    #[error("tables of 5 levels are not implemented")]
    FiveLevels,
    /// SRE and ECAP.SRS is 0.
    #[error("privileged requests are not implemented")]
    Privileged,
    /// EAFE and ECAP.EAFS is 0.
    #[error("extended-accessed flags are not implemented")]
    ExtendedAccessed,
    /// The context entry is not present.
    #[error("the context entry is not present")]
    NotPresent,
    /// Reserved bits or unknown flags.
    #[error("reserved bits are set")]
    Reserved,
    /// The directory's size is none that a context entry can express.
    #[error("a directory has 2^7 to 2^14 entries, not 2^{0}")]
    DirectorySize(u8),
    /// The PASID of untagged requests lies beyond the directory.
    #[error("PASID {0} of untagged requests lies beyond the directory")]
    Untagged(Pasid),
    /// The address width is neither 48 nor 57.
    #[error("no first-stage table translates {0} bits")]
    AddressWidth(u32),
    /// The table is not aligned to 4 KiB.
    #[error("the table is not aligned to 4 KiB")]
    Alignment,
    /// The table lies beyond the host address width.
    #[error("the table's address has more than {bits} bits")]
    AddressSize {
        /// Host address width.
        bits: u8,
    },
}

impl Refusal {
    /// Whether the request is meaningful but beyond the capabilities; otherwise it is invalid as such.
    pub const fn is_unsupported(self) -> bool {
        match self {
            Self::FirstStage
            | Self::PasidBits { .. }
            | Self::UntaggedFixed
            | Self::UntaggedPrivileged
            | Self::FiveLevels
            | Self::Privileged
            | Self::ExtendedAccessed => true,
            Self::NotPresent
            | Self::Reserved
            | Self::DirectorySize(_)
            | Self::Untagged(_)
            | Self::AddressWidth(_)
            | Self::Alignment
            | Self::AddressSize { .. } => false,
        }
    }
}

/// log2 of the number of entries of the smallest directory (PDTS 0).
const MIN_DIRECTORY_LG2: u8 = 7;
/// Of the largest (PDTS 7).
const MAX_DIRECTORY_LG2: u8 = 14;
/// Of a directory that fills a page. A driver that cannot allocate less may point to it whatever ECAP.PSS says.
const PAGE_DIRECTORY_LG2: u8 = 9;
/// PASID bits that a PASID table resolves: 64 entries.
pub(super) const TABLE_BITS: u8 = 6;

/// A PASID directory in canonical form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PasidTable {
    directory: Gpa,
    directory_lg2: u8,
    untagged: Pasid,
    /// Requests with PASIDs are enabled.
    tagged: bool,
    caps: Caps,
}

impl PasidTable {
    /// Checks a directory of `1 << directory_lg2` entries (7 to 14) in which untagged DMA uses the PASID `untagged`.
    /// Requests with PASIDs are enabled where the capabilities know them.
    ///
    /// Whether the directory lies in memory is for the caller to check, see [`extents`](Self::extents); what it holds
    /// is judged by [`lookup`](Self::lookup).
    ///
    /// # Errors
    /// What the numbers themselves show to be wrong.
    pub const fn new(
        directory: Gpa,
        directory_lg2: u8,
        untagged: Pasid,
        caps: &Caps,
    ) -> Result<Self, Refusal> {
        if !caps.first_stage {
            return Err(Refusal::FirstStage);
        }
        if directory_lg2 < MIN_DIRECTORY_LG2 || directory_lg2 > MAX_DIRECTORY_LG2 {
            return Err(Refusal::DirectorySize(directory_lg2));
        }
        let asked = directory_lg2 + TABLE_BITS;
        if directory_lg2 > PAGE_DIRECTORY_LG2 && asked > caps.pasid_bits {
            return Err(Refusal::PasidBits { asked, implemented: caps.pasid_bits });
        }
        if untagged.value() != 0 && !caps.rps {
            return Err(Refusal::UntaggedFixed);
        }
        if untagged.value() >> asked != 0 {
            return Err(Refusal::Untagged(untagged));
        }
        if !directory.is_aligned(12) {
            return Err(Refusal::Alignment);
        }
        if directory.0 >> caps.haw != 0 {
            return Err(Refusal::AddressSize { bits: caps.haw });
        }
        Ok(Self { directory, directory_lg2, untagged, tagged: caps.pasid_bits != 0, caps: *caps })
    }

    /// Checks a scalable-mode context entry. FPD, DTE and PRE are ignored. Without PASIDE, DMA with a PASID faults.
    ///
    /// # Errors
    /// What the entry itself shows to be wrong.
    pub const fn from_context_entry(words: [u64; 4], caps: &Caps) -> Result<Self, Refusal> {
        let entry = ContextEntry::from_words(words);
        if !entry.word0.present() {
            return Err(Refusal::NotPresent);
        }
        let [word2, word3] = entry.reserved;
        if entry.word0.reserved() != 0 || entry.word1.reserved() != 0 || word2 != 0 || word3 != 0 {
            return Err(Refusal::Reserved);
        }
        let Some(untagged) = Pasid::new(entry.word1.rid_pasid()) else {
            return Err(Refusal::Reserved);
        };
        if entry.word1.rid_priv() {
            return Err(Refusal::UntaggedPrivileged);
        }
        let directory = Gpa(entry.word0.directory() << 12);
        match Self::new(directory, entry.word0.pdts() + MIN_DIRECTORY_LG2, untagged, caps) {
            Ok(table) => Ok(Self { tagged: table.tagged && entry.word0.paside(), ..table }),
            Err(refusal) => Err(refusal),
        }
    }

    /// Where the directory starts and its size in bytes.
    pub const fn extents(&self) -> (Gpa, u64) {
        (self.directory, 8 << self.directory_lg2)
    }

    /// log2 of the number of directory entries, 7 to 14.
    pub const fn directory_lg2(&self) -> u8 {
        self.directory_lg2
    }

    /// The PASID that untagged DMA uses.
    #[inline]
    pub const fn untagged(&self) -> Pasid {
        self.untagged
    }

    /// How many bits a PASID has: what the directory covers, limited by the capabilities.
    #[inline]
    pub const fn pasid_bits(&self) -> u8 {
        let covered = self.directory_lg2 + TABLE_BITS;
        if covered < self.caps.pasid_bits { covered } else { self.caps.pasid_bits }
    }

    /// The capabilities that the directory was checked against.
    pub const fn caps(&self) -> &Caps {
        &self.caps
    }

    /// The words of a context entry that says the same: P=1, no ATS, no page requests.
    pub const fn words(&self) -> [u64; 4] {
        let word0 = super::ContextWord0::new()
            .with_present(true)
            .with_paside(self.tagged)
            .with_pdts(self.directory_lg2.saturating_sub(MIN_DIRECTORY_LG2))
            .with_directory(self.directory.0 >> 12);
        let word1 = super::ContextWord1::new().with_rid_pasid(self.untagged.value());
        [word0.into_bits(), word1.into_bits(), 0, 0]
    }

    /// Reads and judges the entry of `pasid` (`None`: untagged DMA).
    ///
    /// # Errors
    /// In this order: 0x45 (PASIDs are not enabled), 0x46 (beyond the directory or the capabilities), 0x50 to 0x52 of
    /// the directory entry, 0x58 where the PASID table is not in memory, then as [`PasidEntry::judge`].
    #[inline]
    pub fn lookup<M: TableMem>(
        &self,
        mem: &M,
        pasid: Option<Pasid>,
    ) -> Result<context::Context, FaultReason> {
        let at = self.locate(mem, self.select(pasid)?)?;
        let word = |index: u64| mem.load(Gpa(at.0 + 8 * index)).map_err(|_| FaultReason::ENTRY_ACCESS);
        let words = [word(0)?, word(1)?, word(2)?, word(3)?, word(4)?, word(5)?, word(6)?, word(7)?];
        PasidEntry::from_words(words).judge(&self.caps)
    }

    /// FPD: whether faults of requests with `pasid` (`None`: untagged DMA) are kept from being recorded, by the
    /// directory entry or the PASID entry. Both are read now, whether or not they are present; what is not in memory
    /// says nothing. See [`FaultReason::is_qualified`].
    #[cold]
    pub fn disables_faults<M: TableMem>(&self, mem: &M, pasid: Option<Pasid>) -> bool {
        let Ok(pasid) = self.select(pasid) else { return false };
        let Ok(directory) = mem.load(self.directory_entry(pasid)) else { return false };
        DirectoryEntry::from_bits(directory).fault_disable()
            || self
                .locate(mem, pasid)
                .is_ok_and(|at| mem.load(at).is_ok_and(|word| PasidWord0::from_bits(word).fault_disable()))
    }

    /// The first PASID that no tagged request can use.
    pub(super) const fn tagged_end(&self) -> u32 {
        if self.tagged { 1 << self.pasid_bits() } else { 0 }
    }

    /// Whose entry serves `pasid`.
    #[inline]
    pub(super) const fn select(&self, pasid: Option<Pasid>) -> Result<Pasid, FaultReason> {
        match pasid {
            None => Ok(self.untagged),
            Some(_) if !self.tagged => Err(FaultReason::PASID_DISABLED),
            Some(pasid) if pasid.value() >> self.pasid_bits() != 0 => Err(FaultReason::PASID_RANGE),
            Some(pasid) => Ok(pasid),
        }
    }

    /// Where the entry of `pasid`, which the directory covers, is.
    #[inline]
    pub(super) fn locate<M: TableMem>(&self, mem: &M, pasid: Pasid) -> Result<Gpa, FaultReason> {
        let entry = mem.load(self.directory_entry(pasid)).map_err(|_| FaultReason::DIRECTORY_ACCESS)?;
        let entry = DirectoryEntry::from_bits(entry);
        if !entry.present() {
            return Err(FaultReason::DIRECTORY_NOT_PRESENT);
        }
        let table = entry.table() << 12;
        if entry.reserved() != 0 || table >> self.caps.haw != 0 {
            return Err(FaultReason::DIRECTORY_RESERVED);
        }
        Ok(entry_in(Gpa(table), pasid))
    }

    /// Address of the directory entry that leads to `pasid`. The sum stays below 2^53: the directory lies below the
    /// host address width.
    pub(super) const fn directory_entry(&self, pasid: Pasid) -> Gpa {
        Gpa(self.directory.0 + ((pasid.value() >> TABLE_BITS) as u64) * 8)
    }
}

/// Address of the entry of `pasid` in its PASID table.
#[inline]
pub(super) const fn entry_in(table: Gpa, pasid: Pasid) -> Gpa {
    Gpa(table.0 | ((pasid.value() & ((1 << TABLE_BITS) - 1)) as u64) << 6)
}
