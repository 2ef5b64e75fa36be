//! What one entry of one table format means: small questions, no allocation, no policy.
//!
//! Vocabulary: *level* 0 is the level that holds only leaves (the smallest page) and levels count up to the root's;
//! a *leaf* ends a walk, a *table* entry continues it; *output* is what a leaf leads to; `_lg2` is a logarithm to
//! base 2. An *input index* is the part of an [`Iova`] that the tables translate: its low
//! [`input_lg2`](Format::input_lg2) bits.

use crate::{Access, AccessKind, Gpa, Iova, Perms, Translation, WalkFault};

/// One table format with its configuration: which root, how many bits, which features.
///
/// Implementations are plain values; the walker and the builder take them as type parameters.
pub trait Format: Copy {
    /// The table that a walk starts with.
    fn root(&self) -> Gpa;

    /// The level of [`root`](Self::root), at most 4.
    fn top_level(&self) -> u8;

    /// Bits of an address that the tables translate.
    fn input_lg2(&self) -> u8;

    /// Bits of an output address that the configuration lets pass, at most 52.
    fn output_lg2(&self) -> u8;

    /// What one entry at `level` covers, in bytes.
    fn entry_lg2(&self, level: u8) -> u8;

    /// log2 of the number of entries of a table below the root; the root may have fewer.
    fn stride_lg2(&self) -> u8;

    /// The highest level that may hold leaves; all below it may too.
    fn leaf_level_max(&self) -> u8;

    /// The input index of `iova`.
    ///
    /// # Errors
    /// What the architecture reports before it reads any table.
    fn admit(&self, iova: Iova, access: Access) -> Result<u64, WalkFault>;

    /// The address of an input index, in its canonical form (an ignored top byte is an extension of the sign).
    fn iova(&self, index: u64) -> Iova;

    /// What the walk starts with, before any entry took anything away.
    fn path(&self) -> Path;

    /// What `entry`, found at `level`, is. At level 0 never a table.
    fn decode(&self, level: u8, entry: u64) -> Entry;

    /// The path below a table `entry`.
    fn descend(&self, path: Path, entry: u64) -> Path;

    /// The table `entry` as hardware leaves it after a walk through it.
    fn mark_table(&self, entry: u64) -> u64;

    /// Judges an access through a leaf, without the check of its output.
    ///
    /// # Errors
    /// [`WalkFault::AccessFlag`] before [`WalkFault::Permission`].
    fn grant(&self, level: u8, entry: u64, path: Path, access: Access) -> Result<Grant, WalkFault>;

    /// The part of `translation` around `at` that does not touch output addresses which no access may have; `None`
    /// where `at` itself leads to one.
    #[inline]
    fn narrow(&self, translation: Translation, at: Iova) -> Option<Translation> {
        let _ = at;
        Some(translation)
    }

    /// An entry that leads to `table`, a table of the level below.
    fn table_entry(&self, table: Gpa) -> u64;

    /// A leaf at `level`, with its accessed flag set; `None` where the format cannot express `attrs`.
    fn leaf_entry(&self, level: u8, output: Gpa, attrs: Attrs) -> Option<u64>;

    /// The `leaf` of level `from` as a leaf of level `to` that leads to `output`, all else equal, the contiguous
    /// hint gone.
    fn relevel(&self, leaf: u64, from: u8, to: u8, output: Gpa) -> u64;

    /// What [`leaf_entry`](Self::leaf_entry) would have been asked for.
    fn attrs(&self, level: u8, leaf: u64) -> Attrs;

    /// log2 of the number of entries that form a contiguous group at `level`; 0 where there are none.
    #[inline]
    fn contiguous_lg2(&self, level: u8) -> u8 {
        let _ = level;
        0
    }

    /// Whether a leaf says that it belongs to a contiguous group.
    #[inline]
    fn is_contiguous(&self, leaf: u64) -> bool {
        let _ = leaf;
        false
    }

    /// The leaf with its contiguous hint set or cleared.
    #[inline]
    fn with_contiguous(&self, leaf: u64, contiguous: bool) -> u64 {
        let _ = contiguous;
        leaf
    }

    /// Which entry of a table at `level` translates an input index.
    #[inline]
    fn index(&self, level: u8, index: u64) -> u64 {
        index >> self.entry_lg2(level) & ((1 << self.stride_lg2()) - 1)
    }

    /// log2 of the size in bytes of a table at `level`, which is its alignment too.
    #[inline]
    fn table_lg2(&self, level: u8) -> u8 {
        let entries_lg2 = if level == self.top_level() {
            self.input_lg2().saturating_sub(self.entry_lg2(level))
        } else {
            self.stride_lg2()
        };
        entries_lg2 + 3
    }

    /// The page sizes, one bit each, without contiguous groups.
    #[inline]
    fn page_sizes(&self) -> u64 {
        let highest = self.leaf_level_max().min(self.top_level());
        (0..=highest).fold(0, |sizes, level| sizes | 1 << self.entry_lg2(level))
    }
}

/// A decoded entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Not present.
    Empty,
    /// Leads to a table of the level below.
    Table(Gpa),
    /// Ends the walk; the address is a multiple of what an entry of this level covers.
    Leaf(Gpa),
    /// Present, but malformed: reserved bits, or a leaf where there are none.
    Reserved,
    /// Leads to an address, of a table or an output, that is wider than the configuration allows.
    TooWide,
}

/// What the table entries on the way down say about permissions. The meaning of the bits is the format's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Path(pub(crate) u64);

/// An access that a leaf lets pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// What passes without another walk, once [`entry`](Self::entry) is stored.
    pub perms: Perms,
    /// The leaf with accessed and dirty flags as this access leaves them.
    pub entry: u64,
    /// The leaf is global.
    pub global: bool,
}

/// Why a leaf does not let an access pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Denied {
    /// The page is privileged and the access is not (x86: U/S).
    Privilege,
    /// Not readable.
    Read,
    /// Not writable.
    Write,
    /// Not executable.
    Execute,
}

impl From<AccessKind> for Denied {
    #[inline]
    fn from(kind: AccessKind) -> Self {
        match kind {
            AccessKind::Read => Self::Read,
            AccessKind::Write => Self::Write,
            AccessKind::Execute => Self::Execute,
        }
    }
}

/// What a mapping is to allow, as far as every format can say it. Reads are always allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Attrs {
    /// Unprivileged accesses may use the page, which DMA is unless it says otherwise.
    pub user: bool,
    /// Writes may.
    pub write: bool,
    /// Instruction reads may: on Arm unprivileged ones of a `user` page and privileged ones of any other.
    pub execute: bool,
    /// The mapping survives an invalidation by address-space tag.
    pub global: bool,
    /// The memory type, 0 to 7: index into MAIR (Arm), or PAT, PCD and PWT as one number (x86).
    pub memory_type: u8,
    /// The first write has to set a dirty flag (where the format's configuration has one).
    pub clean: bool,
}

impl Attrs {
    /// What a DMA buffer that a device reads needs.
    pub const READ: Self =
        Self { user: true, write: false, execute: false, global: false, memory_type: 0, clean: false };
    /// What a DMA buffer that a device writes needs.
    pub const READ_WRITE: Self = Self { write: true, ..Self::READ };
}
