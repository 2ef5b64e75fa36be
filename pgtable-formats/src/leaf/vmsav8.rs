//! VMSAv8-64 stage-1 tables (Arm DDI 0487, D8): what an SMMUv3 context descriptor points to.
//!
//! A [`Vmsav8`] is one half of the address space: TTB0 or TTB1. The architecture's level numbers count down to 3;
//! here level 0 is its level 3, and level 4 its level -1.
//!
//! Not here: stage 2, permission indirection and overlays (PIE), 128-bit descriptors, the hardware-managed flag of
//! table entries (HAFT), big-endian tables, security states (NSTable and NS are ignored).

mod params;
mod permissions;

use bitfield_struct::bitfield;

use crate::format::{Attrs, Denied, Entry, Format, Grant, Path};
use crate::{Access, AccessKind, Gpa, Iova, Perms, WalkFault};
pub use params::{Granule, Vmsav8Flags, Vmsav8Params};
use permissions::{PERMS, modes_of};

/// Descriptor bits (DDI 0487, D8.3).
mod bits {
    /// Bits \[1:0\] of a table entry, and of a page.
    pub(super) const TABLE_OR_PAGE: u64 = 0b11;
    /// Bits \[1:0\] of a block.
    pub(super) const BLOCK: u64 = 0b01;
    /// Bits \[4:2\], AttrIndx.
    pub(super) const ATTR_INDEX_SHIFT: u32 = 2;
    /// Bit 6, AP\[1\]: unprivileged access.
    pub(super) const AP_UNPRIVILEGED: u64 = 1 << 6;
    /// Bit 7, AP\[2\]: read-only.
    pub(super) const AP_READ_ONLY: u64 = 1 << 7;
    /// Bits \[9:8\], SH: inner shareable.
    pub(super) const SH_INNER: u64 = 0b11 << 8;
    /// Bit 10, AF.
    pub(super) const AF: u64 = 1 << 10;
    /// Bit 11, nG.
    pub(super) const NOT_GLOBAL: u64 = 1 << 11;
    /// Bit 51, DBM.
    pub(super) const DBM: u64 = 1 << 51;
    /// Bit 52, Contiguous.
    pub(super) const CONTIGUOUS: u64 = 1 << 52;
    /// Bit 53, PXN.
    pub(super) const PXN: u64 = 1 << 53;
    /// Bit 54, UXN.
    pub(super) const UXN: u64 = 1 << 54;
    /// Bit 59 of a table entry, PXNTable.
    pub(super) const PXN_TABLE: u64 = 1 << 59;
    /// Bit 60, UXNTable.
    pub(super) const UXN_TABLE: u64 = 1 << 60;
    /// Bit 61, APTable\[0\]: no unprivileged access below.
    pub(super) const AP_TABLE_PRIVILEGED: u64 = 1 << 61;
    /// Bit 62, APTable\[1\]: no writes below.
    pub(super) const AP_TABLE_READ_ONLY: u64 = 1 << 62;
    /// All that a table entry says of permissions.
    pub(super) const TABLE_LIMITS: u64 = PXN_TABLE | UXN_TABLE | AP_TABLE_PRIVILEGED | AP_TABLE_READ_ONLY;
}

/// One half of an address space, translated by VMSAv8-64 stage-1 tables.
///
/// Two words, because a context is made anew for each access that finds nothing in a cache, and handed on: what takes an
/// instruction or two to work out is not kept, and what is kept moves in whole words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Vmsav8 {
    root: Gpa,
    config: Config,
}

const _: () = assert!(size_of::<Vmsav8>() == 16);

/// What [`Vmsav8Params`] say besides the root, in one word.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Hash)]
struct Config {
    granule_lg2: u8,
    input_lg2: u8,
    output_lg2: u8,
    top_level: u8,
    /// [`Vmsav8Flags`].
    flags: u16,
    wide: bool,
    upper: bool,
    #[bits(14)]
    __: u16,
}

impl Vmsav8 {
    /// `None` where a size is outside its range, see [`Vmsav8Params`].
    #[inline]
    pub const fn new(params: Vmsav8Params) -> Option<Self> {
        if !params.is_legal() {
            return None;
        }
        let is_52_bit = params.wide && (params.output_lg2 > 48 || !matches!(params.granule, Granule::K64));
        let align_lg2 = if is_52_bit && params.root_lg2() < 6 { 6 } else { params.root_lg2() };
        let root = Gpa(params.root.0 & ADDRESS_52 & !low_mask(align_lg2));
        let flags = if params.flags.contains(Vmsav8Flags::HA) {
            params.flags
        } else {
            params.flags.difference(Vmsav8Flags::HD)
        };
        let config = Config::new()
            .with_granule_lg2(params.granule.lg2())
            .with_input_lg2(params.input_lg2)
            .with_output_lg2(params.output_lg2)
            .with_top_level(params.top_level())
            .with_flags(flags.bits())
            .with_wide(params.wide)
            .with_upper(params.upper);
        Some(Self { root, config })
    }

    /// What it was made from, the root aligned.
    pub const fn params(&self) -> Vmsav8Params {
        Vmsav8Params {
            root: self.root,
            granule: self.granule(),
            input_lg2: self.config.input_lg2(),
            output_lg2: self.config.output_lg2(),
            wide: self.config.wide(),
            upper: self.config.upper(),
            flags: self.flags(),
        }
    }

    /// The address with what TBI ignores replaced: the form in which translations are reported and cached.
    #[inline]
    pub const fn canonical(&self, iova: Iova) -> Iova {
        if self.has(Vmsav8Flags::TBI) {
            Iova(((iova.0 << 8).cast_signed() >> 8).cast_unsigned())
        } else {
            iova
        }
    }

    #[inline]
    const fn has(&self, flag: Vmsav8Flags) -> bool {
        self.flags().contains(flag)
    }

    #[inline]
    const fn flags(&self) -> Vmsav8Flags {
        Vmsav8Flags::from_bits_retain(self.config.flags())
    }

    #[inline]
    const fn granule_lg2(&self) -> u8 {
        self.config.granule_lg2()
    }

    #[inline]
    const fn granule(&self) -> Granule {
        match self.granule_lg2() {
            12 => Granule::K4,
            14 => Granule::K16,
            _ => Granule::K64,
        }
    }

    /// Bits of an address above the input range.
    #[inline]
    const fn upper_bits(&self) -> u64 {
        if self.config.upper() { !low_mask(self.config.input_lg2()) } else { 0 }
    }

    /// Address bits that an entry can hold and the output size forbids.
    #[inline]
    const fn too_wide(&self) -> u64 {
        ADDRESS_52 & !low_mask(self.config.output_lg2())
    }

    /// The address in an entry, whose bits below `low_lg2` are something else (DDI 0487, D8.3.1).
    #[inline]
    const fn address(&self, entry: u64, low_lg2: u8) -> u64 {
        let address = entry & ADDRESS_48 & !low_mask(low_lg2);
        if self.config.wide() { address | self.wide_bits(entry) } else { address }
    }

    /// What [`address`](Self::address) takes from elsewhere, or from above bit 47.
    // Apart, because a select between the two would be half of a level's instructions for everybody.
    #[cold]
    const fn wide_bits(&self, entry: u64) -> u64 {
        match self.granule() {
            Granule::K64 => (entry >> 12 & 0xf) << 48,
            Granule::K4 | Granule::K16 => entry & 0b11 << 48 | (entry >> 8 & 0b11) << 50,
        }
    }

    /// What an entry is that is neither a table nor a page.
    fn decode_block(&self, level: u8, entry: u64) -> Entry {
        if entry & 1 == 0 {
            return Entry::Empty;
        }
        if level == 0 || level > self.leaf_level_max() {
            return Entry::Reserved;
        }
        let address = self.address(entry, self.entry_lg2(level));
        if address & self.too_wide() != 0 { Entry::TooWide } else { Entry::Leaf(Gpa(address)) }
    }

    /// The reverse of [`address`](Self::address).
    #[inline]
    const fn address_bits(&self, address: u64) -> u64 {
        let bits = address & ADDRESS_48;
        match (self.config.wide(), self.granule()) {
            (false, _) => bits,
            (true, Granule::K64) => bits | (address >> 48 & 0xf) << 12,
            (true, _) => bits | address & 0b11 << 48 | (address >> 50 & 0b11) << 8,
        }
    }

    /// Bits \[9:8\]: SH, or with DS a part of the address, where the descriptor's SHx holds instead.
    #[inline]
    const fn shareability(&self) -> u64 {
        if self.config.wide() && !matches!(self.granule(), Granule::K64) { 0 } else { bits::SH_INNER }
    }

    /// Whether writes pass once the dirty state has been set.
    #[inline]
    const fn is_writable(&self, leaf: u64) -> bool {
        leaf & bits::AP_READ_ONLY == 0 || self.has(Vmsav8Flags::HD) && leaf & bits::DBM != 0
    }

    /// Permissions of a leaf below tables with these limits, dirty state aside.
    #[inline]
    fn perms(&self, leaf: u64, limits: u64) -> Perms {
        let leaf = if self.is_writable(leaf) { leaf & !bits::AP_READ_ONLY } else { leaf };
        let accesses = (leaf ^ bits::AP_UNPRIVILEGED) >> 6 & 0b11;
        let taken = (accesses << 2 | leaf >> 53 & 0b11 | limits >> 59) & 0b1111;
        PERMS[modes_of(self.flags())][usize::from(taken as u8)]
    }
}

impl Format for Vmsav8 {
    #[inline]
    fn root(&self) -> Gpa {
        self.root
    }

    #[inline]
    fn top_level(&self) -> u8 {
        self.config.top_level()
    }

    #[inline]
    fn input_lg2(&self) -> u8 {
        self.config.input_lg2()
    }

    #[inline]
    fn output_lg2(&self) -> u8 {
        if self.config.wide() { self.config.output_lg2() } else { self.config.output_lg2().min(48) }
    }

    #[inline]
    fn entry_lg2(&self, level: u8) -> u8 {
        self.granule_lg2() + level * self.stride_lg2()
    }

    #[inline]
    fn stride_lg2(&self) -> u8 {
        self.granule_lg2() - 3
    }

    #[inline]
    fn leaf_level_max(&self) -> u8 {
        let narrow = match self.granule() {
            Granule::K4 => 2,
            Granule::K16 | Granule::K64 => 1,
        };
        narrow + u8::from(self.config.wide())
    }

    #[inline]
    fn admit(&self, iova: Iova, access: Access) -> Result<u64, WalkFault> {
        let iova = self.canonical(iova);
        let index = iova.0 ^ self.upper_bits();
        if index >> self.config.input_lg2() != 0 || self.has(Vmsav8Flags::E0PD) && !access.privileged {
            return Err(WalkFault::InputRange);
        }
        Ok(index)
    }

    #[inline]
    fn iova(&self, index: u64) -> Iova {
        Iova(index | self.upper_bits())
    }

    #[inline]
    fn path(&self) -> Path {
        Path(0)
    }

    #[inline]
    fn decode(&self, level: u8, entry: u64) -> Entry {
        // Nearly all that a walk sees.
        if entry & 0b11 == bits::TABLE_OR_PAGE {
            let address = self.address(entry, self.granule_lg2());
            return if address & self.too_wide() != 0 {
                Entry::TooWide
            } else if level > 0 {
                Entry::Table(Gpa(address))
            } else {
                Entry::Leaf(Gpa(address))
            };
        }
        self.decode_block(level, entry)
    }

    #[inline]
    fn descend(&self, path: Path, entry: u64) -> Path {
        if self.has(Vmsav8Flags::HAD) { path } else { Path(path.0 | entry & bits::TABLE_LIMITS) }
    }

    #[inline]
    fn mark_table(&self, entry: u64) -> u64 {
        entry
    }

    #[inline]
    fn grant(&self, level: u8, entry: u64, path: Path, access: Access) -> Result<Grant, WalkFault> {
        let is_fault = !self.flags().intersects(Vmsav8Flags::AFFD.union(Vmsav8Flags::HA));
        if entry & bits::AF == 0 && is_fault {
            return Err(WalkFault::AccessFlag { level });
        }
        let mut perms = self.perms(entry, path.0);
        if !perms.allow(access) {
            return Err(WalkFault::Permission { level, denied: Denied::from(access.kind) });
        }
        let mut marked = entry;
        if self.has(Vmsav8Flags::HA) {
            marked |= bits::AF;
        }
        if access.kind == AccessKind::Write {
            marked &= !bits::AP_READ_ONLY;
        }
        if marked & bits::AP_READ_ONLY != 0 {
            perms.remove(Perms::WRITE);
        }
        Ok(Grant { perms, entry: marked, global: entry & bits::NOT_GLOBAL == 0 })
    }

    #[inline]
    fn table_entry(&self, table: Gpa) -> u64 {
        self.address_bits(table.0) | bits::TABLE_OR_PAGE
    }

    #[inline]
    fn leaf_entry(&self, level: u8, output: Gpa, attrs: Attrs) -> Option<u64> {
        if attrs.memory_type > 7 {
            return None;
        }
        let mut entry = self.address_bits(output.0)
            | if level == 0 { bits::TABLE_OR_PAGE } else { bits::BLOCK }
            | u64::from(attrs.memory_type) << bits::ATTR_INDEX_SHIFT
            | self.shareability()
            | bits::AF;
        if attrs.user {
            entry |= bits::AP_UNPRIVILEGED;
        }
        if !attrs.write {
            entry |= bits::AP_READ_ONLY;
        } else if attrs.clean && self.has(Vmsav8Flags::HD) {
            entry |= bits::AP_READ_ONLY | bits::DBM;
        }
        if !attrs.global {
            entry |= bits::NOT_GLOBAL;
        }
        if !(attrs.execute && attrs.user) {
            entry |= bits::UXN;
        }
        if !attrs.execute || attrs.user {
            entry |= bits::PXN;
        }
        Some(entry)
    }

    #[inline]
    fn relevel(&self, leaf: u64, from: u8, to: u8, output: Gpa) -> u64 {
        let old = self.address(leaf, self.entry_lg2(from));
        let kind = if to == 0 { bits::TABLE_OR_PAGE } else { bits::BLOCK };
        // What a block has between the page's size and its own (nT) would be address bits of a page.
        let between = low_mask(self.entry_lg2(from)) & !low_mask(self.granule_lg2());
        leaf & !(self.address_bits(old) | bits::CONTIGUOUS | 0b11 | between)
            | self.address_bits(output.0)
            | kind
    }

    #[inline]
    fn attrs(&self, _level: u8, leaf: u64) -> Attrs {
        let user = leaf & bits::AP_UNPRIVILEGED != 0;
        let read_only = leaf & bits::AP_READ_ONLY != 0;
        let write = self.is_writable(leaf);
        Attrs {
            user,
            write,
            execute: leaf & if user { bits::UXN } else { bits::PXN } == 0,
            global: leaf & bits::NOT_GLOBAL == 0,
            memory_type: (leaf >> bits::ATTR_INDEX_SHIFT & 0b111) as u8,
            clean: write && read_only,
        }
    }

    #[inline]
    fn contiguous_lg2(&self, level: u8) -> u8 {
        match (self.granule(), level) {
            (Granule::K4, 0..=2) => 4,
            (Granule::K16, 0) => 7,
            (Granule::K16, 1) | (Granule::K64, 0 | 1) => 5,
            _ => 0,
        }
    }

    #[inline]
    fn is_contiguous(&self, leaf: u64) -> bool {
        leaf & bits::CONTIGUOUS != 0
    }

    #[inline]
    fn with_contiguous(&self, leaf: u64, contiguous: bool) -> u64 {
        if contiguous { leaf | bits::CONTIGUOUS } else { leaf & !bits::CONTIGUOUS }
    }
}

const ADDRESS_48: u64 = low_mask(48) & !low_mask(12);
const ADDRESS_52: u64 = low_mask(52);

const fn low_mask(lg2: u8) -> u64 {
    (1 << lg2) - 1
}

#[cfg(test)]
mod tests;
