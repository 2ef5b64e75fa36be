//! The x86-64 format with 4 and 5 levels: VT-d first-stage tables (VT-d specification, 3.6 and 9.8).

use bitfield_struct::bitfield;

use crate::format::{Attrs, Denied, Entry, Format, Grant, Path};
use crate::{Access, AccessKind, Gpa, Iova, Perms, Translation, WalkFault};

/// Entry bits (VT-d, 9.8).
mod bits {
    /// Bit 0, P.
    pub(super) const PRESENT: u64 = 1 << 0;
    /// Bit 1, R/W.
    pub(super) const WRITE: u64 = 1 << 1;
    /// Bit 2, U/S.
    pub(super) const USER: u64 = 1 << 2;
    /// Bits 3 and 4, PWT and PCD.
    pub(super) const PWT_SHIFT: u32 = 3;
    /// Bit 5, A.
    pub(super) const ACCESSED: u64 = 1 << 5;
    /// Bit 6, D, of a leaf.
    pub(super) const DIRTY: u64 = 1 << 6;
    /// Bit 7, PS, above level 0.
    pub(super) const PAGE_SIZE: u64 = 1 << 7;
    /// Bit 7, PAT, at level 0.
    pub(super) const PAT_SMALL: u64 = 1 << 7;
    /// Bit 8, G, of a leaf.
    pub(super) const GLOBAL: u64 = 1 << 8;
    /// Bit 10, EA.
    pub(super) const EXTENDED_ACCESSED: u64 = 1 << 10;
    /// Bit 12, PAT, of a leaf above level 0.
    pub(super) const PAT_LARGE: u64 = 1 << 12;
    /// Bits \[51:12\], the address.
    pub(super) const ADDRESS: u64 = (1 << 52) - (1 << 12);
    /// Bit 63, XD.
    pub(super) const EXECUTE_DISABLE: u64 = 1 << 63;
}

/// How many levels (PASID entry, FSPM).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum X86Levels {
    /// 48-bit addresses.
    Four,
    /// 57-bit addresses.
    Five,
}

impl X86Levels {
    /// Bits of a canonical address that are translated.
    #[inline]
    pub const fn input_lg2(self) -> u8 {
        match self {
            Self::Four => 48,
            Self::Five => 57,
        }
    }
}

bitflags::bitflags! {
    /// What the PASID entry and the capabilities say. Names and bits are those of the PASID entry (VT-d, 9.6, from bit
    /// 128 on), but for `FS1GP`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct X86Flags: u8 {
        /// SRE: privileged requests are allowed. Without it no translation permits any.
        const SRE = 1 << 0;
        /// ERE: execute requests are allowed. Without it no translation permits any.
        const ERE = 1 << 1;
        /// CAP.FS1GP: 1 GiB pages.
        const FS1GP = 1 << 2;
        /// WPE: R/W binds privileged writes too.
        const WPE = 1 << 4;
        /// NXE: bit 63 is XD. Without it, it is ignored: a process's own tables have it set on nearly every data page.
        const NXE = 1 << 5;
        /// SMEP: privileged instruction reads may not use user pages.
        const SMEP = 1 << 6;
        /// EAFE: the walk sets EA along with A.
        const EAFE = 1 << 7;
    }
}

/// What makes an [`X86`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct X86Params {
    /// The root table, FSPTPTR; bits below 12 are dropped.
    pub root: Gpa,
    /// FSPM.
    pub levels: X86Levels,
    /// Host address width, 32 to 52: address bits from there on are reserved.
    pub output_lg2: u8,
    /// Everything else.
    pub flags: X86Flags,
}

/// An address space translated by x86-64 tables.
///
/// Two words, because a context is made anew for each access that finds nothing in a cache, and handed on: what takes an
/// instruction or two to work out is not kept, and what is kept moves in whole words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct X86 {
    root: Gpa,
    config: Config,
}

const _: () = assert!(size_of::<X86>() == 16);

/// What [`X86Params`] say besides the root, in one word.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Hash)]
struct Config {
    /// [`X86Flags`].
    flags: u8,
    output_lg2: u8,
    five_levels: bool,
    #[bits(47)]
    __: u64,
}

impl X86 {
    /// The output addresses that mean interrupts: `0xfee0_0000..=0xfeef_ffff`. No translation may lead there.
    pub const INTERRUPT_RANGE: core::ops::RangeInclusive<u64> = 0xfee0_0000..=0xfeef_ffff;

    /// `None` where the output width is outside its range, see [`X86Params`].
    #[inline]
    pub const fn new(params: X86Params) -> Option<Self> {
        if params.output_lg2 < 32 || params.output_lg2 > 52 {
            return None;
        }
        let root = Gpa(params.root.0 & bits::ADDRESS);
        let config = Config::new()
            .with_flags(params.flags.bits())
            .with_output_lg2(params.output_lg2)
            .with_five_levels(matches!(params.levels, X86Levels::Five));
        Some(Self { root, config })
    }

    /// What it was made from, the root aligned.
    pub const fn params(&self) -> X86Params {
        let (levels, output_lg2) = (self.levels(), self.config.output_lg2());
        X86Params { root: self.root, levels, output_lg2, flags: self.flags() }
    }

    #[inline]
    const fn levels(&self) -> X86Levels {
        if self.config.five_levels() { X86Levels::Five } else { X86Levels::Four }
    }

    #[inline]
    const fn flags(&self) -> X86Flags {
        X86Flags::from_bits_retain(self.config.flags())
    }

    #[inline]
    const fn has(&self, flag: X86Flags) -> bool {
        self.flags().contains(flag)
    }

    /// Bits reserved in every entry.
    #[inline]
    const fn reserved(&self) -> u64 {
        bits::ADDRESS & !((1 << self.config.output_lg2()) - 1)
    }

    /// Access rights of the AND of all entries of a walk, XD inverted.
    #[inline]
    fn perms(&self, all: u64) -> Perms {
        let rights = (all >> 1 & 0b011 | all >> 61 & 0b100) & 0b111;
        PERMS[modes_of(self.flags())][usize::from(rights as u8)]
    }

    /// An entry as a walk leaves it.
    #[inline]
    const fn mark(&self, entry: u64) -> u64 {
        let accessed =
            if self.has(X86Flags::EAFE) { bits::ACCESSED | bits::EXTENDED_ACCESSED } else { bits::ACCESSED };
        entry | accessed
    }

    /// Bit of a leaf that is the highest bit of its memory type.
    #[inline]
    const fn pat_bit(level: u8) -> u64 {
        if level == 0 { bits::PAT_SMALL } else { bits::PAT_LARGE }
    }
}

impl Format for X86 {
    #[inline]
    fn root(&self) -> Gpa {
        self.root
    }

    #[inline]
    fn top_level(&self) -> u8 {
        match self.levels() {
            X86Levels::Four => 3,
            X86Levels::Five => 4,
        }
    }

    #[inline]
    fn input_lg2(&self) -> u8 {
        self.levels().input_lg2()
    }

    #[inline]
    fn output_lg2(&self) -> u8 {
        self.config.output_lg2()
    }

    #[inline]
    fn entry_lg2(&self, level: u8) -> u8 {
        12 + 9 * level
    }

    #[inline]
    fn stride_lg2(&self) -> u8 {
        9
    }

    #[inline]
    fn leaf_level_max(&self) -> u8 {
        if self.has(X86Flags::FS1GP) { 2 } else { 1 }
    }

    #[inline]
    fn admit(&self, iova: Iova, _access: Access) -> Result<u64, WalkFault> {
        let index = iova.0 & ((1 << self.input_lg2()) - 1);
        if self.iova(index) == iova { Ok(index) } else { Err(WalkFault::InputRange) }
    }

    #[inline]
    fn iova(&self, index: u64) -> Iova {
        let unused = 64 - self.input_lg2();
        Iova(((index << unused).cast_signed() >> unused).cast_unsigned())
    }

    #[inline]
    fn path(&self) -> Path {
        Path(u64::MAX)
    }

    #[inline]
    fn decode(&self, level: u8, entry: u64) -> Entry {
        if entry & bits::PRESENT == 0 {
            return Entry::Empty;
        }
        if entry & self.reserved() != 0 {
            return Entry::Reserved;
        }
        if level != 0 && entry & bits::PAGE_SIZE == 0 {
            return Entry::Table(Gpa(entry & bits::ADDRESS));
        }
        if level == 0 {
            return Entry::Leaf(Gpa(entry & bits::ADDRESS));
        }
        let low = bits::ADDRESS & ((1 << self.entry_lg2(level)) - 1);
        if level > self.leaf_level_max() || entry & low & !bits::PAT_LARGE != 0 {
            return Entry::Reserved;
        }
        Entry::Leaf(Gpa(entry & bits::ADDRESS & !low))
    }

    #[inline]
    fn descend(&self, path: Path, entry: u64) -> Path {
        Path(path.0 & (entry ^ bits::EXECUTE_DISABLE))
    }

    #[inline]
    fn mark_table(&self, entry: u64) -> u64 {
        self.mark(entry)
    }

    #[inline]
    fn grant(&self, level: u8, entry: u64, path: Path, access: Access) -> Result<Grant, WalkFault> {
        let all = self.descend(path, entry).0;
        let mut perms = self.perms(all);
        if !perms.allow(access) {
            let is_below = !access.privileged && all & bits::USER == 0;
            let denied = if is_below { Denied::Privilege } else { Denied::from(access.kind) };
            return Err(WalkFault::Permission { level, denied });
        }
        let mut marked = self.mark(entry);
        if access.kind == AccessKind::Write {
            marked |= bits::DIRTY;
        }
        if marked & bits::DIRTY == 0 {
            perms.remove(Perms::WRITE);
        }
        Ok(Grant { perms, entry: marked, global: entry & bits::GLOBAL != 0 })
    }

    #[inline]
    fn narrow(&self, mut translation: Translation, at: Iova) -> Option<Translation> {
        let first = *Self::INTERRUPT_RANGE.start();
        // The range is 1 MiB and aligned: a leaf holds it, lies within it, or does not touch it.
        while (translation.output.0 ^ first) >> translation.size_lg2.max(20) == 0 {
            if translation.size_lg2 <= 20 {
                return None;
            }
            translation.size_lg2 -= 1;
            let half = at.0 & 1 << translation.size_lg2;
            translation.iova.0 |= half;
            translation.output.0 |= half;
        }
        Some(translation)
    }

    #[inline]
    fn table_entry(&self, table: Gpa) -> u64 {
        // Rights are left to the leaf.
        let rights = bits::PRESENT | bits::WRITE | bits::USER;
        self.mark(table.0 & bits::ADDRESS | rights)
    }

    #[inline]
    fn leaf_entry(&self, level: u8, output: Gpa, attrs: Attrs) -> Option<u64> {
        if attrs.memory_type > 7 {
            return None;
        }
        let mut entry = output.0 & bits::ADDRESS
            | bits::PRESENT
            | u64::from(attrs.memory_type & 0b11) << bits::PWT_SHIFT
            | if level == 0 { 0 } else { bits::PAGE_SIZE };
        for (wanted, bit) in [
            (attrs.user, bits::USER),
            (attrs.write, bits::WRITE),
            (attrs.write && !attrs.clean, bits::DIRTY),
            (attrs.global, bits::GLOBAL),
            (attrs.memory_type & 0b100 != 0, Self::pat_bit(level)),
            (!attrs.execute && self.has(X86Flags::NXE), bits::EXECUTE_DISABLE),
        ] {
            if wanted {
                entry |= bit;
            }
        }
        Some(self.mark(entry))
    }

    #[inline]
    fn relevel(&self, leaf: u64, from: u8, to: u8, output: Gpa) -> u64 {
        let pat = if leaf & Self::pat_bit(from) != 0 { Self::pat_bit(to) } else { 0 };
        let size = if to == 0 { 0 } else { bits::PAGE_SIZE };
        leaf & !(bits::ADDRESS | bits::PAGE_SIZE) | output.0 & bits::ADDRESS | pat | size
    }

    #[inline]
    fn attrs(&self, level: u8, leaf: u64) -> Attrs {
        let pat = if leaf & Self::pat_bit(level) != 0 { 0b100 } else { 0 };
        let write = leaf & bits::WRITE != 0;
        Attrs {
            user: leaf & bits::USER != 0,
            write,
            execute: leaf & bits::EXECUTE_DISABLE == 0,
            global: leaf & bits::GLOBAL != 0,
            memory_type: (leaf >> bits::PWT_SHIFT & 0b11) as u8 | pat,
            clean: write && leaf & bits::DIRTY == 0,
        }
    }
}

/// Access rights by [`modes_of`] the flags, and by what all entries of a walk allow: bit 0 writes (R/W), bit 1
/// unprivileged accesses (U/S), bit 2 execution (XD inverted).
static PERMS: [[Perms; 8]; 32] = {
    let mut perms = [[Perms::empty(); 8]; 32];
    let mut bits = 0;
    while bits < X86Flags::EAFE.bits() {
        let flags = X86Flags::from_bits_truncate(bits);
        let mut rights = 0;
        while rights < 8 {
            perms[modes_of(flags)][rights] = perms_of(flags, rights);
            rights += 1;
        }
        bits += 1;
    }
    perms
};

/// What flags say about access rights: bits 1:0 SRE and ERE, bits 4:2 WPE, NXE and SMEP.
#[inline]
const fn modes_of(flags: X86Flags) -> usize {
    let bits = flags.bits();
    (bits & 0b0_0011 | bits >> 2 & 0b1_1100) as usize
}

/// Access rights (VT-d, 3.6.1), and what the PASID entry lets pass at all.
const fn perms_of(flags: X86Flags, rights: usize) -> Perms {
    let (write, user) = (rights & 1 != 0, rights & 2 != 0);
    let execute = rights & 4 != 0 || !flags.contains(X86Flags::NXE);
    let mut perms = Perms::PRIV_READ;
    if write || !flags.contains(X86Flags::WPE) {
        perms = perms.union(Perms::PRIV_WRITE);
    }
    if execute && !(user && flags.contains(X86Flags::SMEP)) {
        perms = perms.union(Perms::PRIV_EXECUTE);
    }
    if user {
        perms = perms.union(Perms::USER_READ);
        if write {
            perms = perms.union(Perms::USER_WRITE);
        }
        if execute {
            perms = perms.union(Perms::USER_EXECUTE);
        }
    }
    if !flags.contains(X86Flags::SRE) {
        perms = perms.difference(PRIVILEGED);
    }
    if !flags.contains(X86Flags::ERE) {
        perms = perms.difference(Perms::EXECUTE);
    }
    perms
}

const PRIVILEGED: Perms = Perms::PRIV_READ.union(Perms::PRIV_WRITE).union(Perms::PRIV_EXECUTE);

#[cfg(test)]
mod tests;
