//! Stage-1 tables that look like nothing a guest would build: random permissions and sizes, holes, malformed entries.
//!
//! Everything here is numbers: what is done with them, and on what hardware, is the caller's business.
//!
//! Left out, because the architecture leaves the outcome open: contiguous groups whose entries differ, and overlapping
//! translations of one address.

use std::collections::BTreeMap;

use pgtable_formats::context::smmuv3::{Caps, Cd, CdWord0, CdWord1, Ste0, Ste1};
use pgtable_formats::{Gpa, Iova};
use viommu_wire::TableDescriptor;

use super::random::Random;

/// Where a table may lie, and where it may lead. Both are guest memory and whole pages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// First address for context descriptor and tables.
    pub(super) tables: Gpa,
    /// How many pages from there on.
    pub(super) table_pages: u64,
    /// First address of data, a multiple of 2 MiB.
    pub(super) data: Gpa,
    /// Bytes of data, at least 2 MiB.
    pub(super) data_bytes: u64,
    /// An address that is no memory, a multiple of 1 GiB.
    pub(super) nowhere: Gpa,
}

/// What may stand in a table, beyond what all hardware takes in the same way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// Entries that refuse unprivileged accesses.
    pub(super) privilege: bool,
    /// Blocks at level 0, which is a reserved encoding.
    pub(super) top_blocks: bool,
    /// Entries that are refused for several reasons, of which the architecture names one: what ends the walk comes before
    /// the access flag, and permissions come last, those of table entries, too.
    pub(super) in_order: bool,
}

/// A table, with the addresses that show what it does.
#[derive(Clone, Debug)]
pub(super) struct RandomTable {
    /// What ATTACH_TABLE says of it.
    pub(super) descriptor: TableDescriptor,
    /// Its pages.
    pub(super) pages: BTreeMap<u64, Box<[u64; ENTRIES]>>,
    /// Addresses to try, multiples of 4.
    pub(super) probes: Vec<Iova>,
    root: Gpa,
    input_bits: u32,
}

impl RandomTable {
    /// The entries on the way to an address, from the root on.
    pub(super) fn way(&self, iova: Iova) -> String {
        let mut table = self.root.0;
        let mut way = format!("{} bits of address", self.input_bits);
        for level in first_level(self.input_bits)..4 {
            let Some(page) = self.pages.get(&table) else { break };
            let entry =
                usize::try_from(iova.0 >> (12 + 9 * (3 - level)) & 0x1ff).ok().and_then(|at| page.get(at));
            let entry = entry.copied().unwrap_or(0);
            way.push_str(&format!(", level {level} {entry:#x}"));
            if entry & (TABLE_OR_PAGE | VALID) != TABLE_OR_PAGE | VALID {
                break;
            }
            table = entry & 0x0000_ffff_ffff_f000;
        }
        way
    }
}

/// The architecture's number of the level at which a walk starts: 0 to 2.
const fn first_level(input_bits: u32) -> u32 {
    4 - (input_bits - 12).div_ceil(9)
}

const ENTRIES: usize = 512;
const PAGE: u64 = 0x1000;
const PROBES: u64 = 8;
/// What output addresses may be: IPS 0 to 4.
const IPS_BITS: [u8; 5] = [32, 36, 40, 42, 44];

const VALID: u64 = 1;
const TABLE_OR_PAGE: u64 = 0b10;
const AP_UNPRIVILEGED: u64 = 1 << 6;
const AP_READ_ONLY: u64 = 1 << 7;
const SH_INNER: u64 = 3 << 8;
const AF: u64 = 1 << 10;
/// A block that leads to address 0, where it may stand.
pub(super) const READ_ONLY_BLOCK: u64 = VALID | AP_UNPRIVILEGED | AP_READ_ONLY | SH_INNER | AF | NOT_GLOBAL;
const NOT_GLOBAL: u64 = 1 << 11;
const CONTIGUOUS: u64 = 1 << 52;
/// A bit that hardware does not look at.
const SOFTWARE: u64 = 1 << 55;
const XN: [u64; 4] = [0, 1 << 53, 1 << 54, 3 << 53];
/// An output address beyond every output size.
const BEYOND: u64 = 1 << 45;
/// What a table entry may forbid below it: unprivileged access, writes.
const AP_TABLE: [u64; 2] = [1 << 61, AP_TABLE_READ_ONLY];
const AP_TABLE_READ_ONLY: u64 = 1 << 62;

/// A block that leads too far, and does not have the access flag.
pub(super) const FAR_BLOCK: u64 = VALID | AP_UNPRIVILEGED | SH_INNER | NOT_GLOBAL | BEYOND;

/// An entry for a table.
pub(super) const fn table(below: Gpa) -> u64 {
    below.0 | TABLE_OR_PAGE | VALID
}

/// An entry for a table below which no writes are permitted.
pub(super) const fn read_only_table(below: Gpa) -> u64 {
    below.0 | AP_TABLE_READ_ONLY | TABLE_OR_PAGE | VALID
}

/// A table for untagged DMA behind an SMMUv3 with `caps`, 4 KiB granule.
pub(super) fn smmuv3(random: &mut Random, layout: &Layout, caps: &Caps, shape: Shape) -> RandomTable {
    let mut builder = Builder { random, layout, shape, pages: BTreeMap::new(), next: 0, input_bits: 0 };
    let cd_page = builder.page();
    let root = builder.page();
    builder.input_bits = builder.random.of(&[48, 48, 39, 39, 36, 32, 30]);
    let mut probes = Vec::new();
    for _ in 0..PROBES {
        let iova = builder.address(&probes);
        if let Some(iova) = builder.grow(root, iova) {
            probes.push(iova);
        }
    }
    // Beside them, and beyond what the table translates.
    for index in 0..2 {
        let near = Iova(probes.get(index).map_or(0, |probe: &Iova| probe.0) ^ PAGE);
        if builder.shape.in_order || !builder.is_limited(root, near) {
            probes.push(near);
        }
    }
    let beyond = 1u64 << builder.input_bits;
    probes.push(Iova(beyond | builder.random.below(1 << 20) & !3));
    let cd = builder.descriptor(root, caps);
    if let Some(page) = builder.pages.get_mut(&cd_page.0) {
        for (place, word) in page.iter_mut().zip(cd.words()) {
            *place = word;
        }
    }
    let ste0 = Ste0::new().with_valid(true).with_config(5).with_s1_context_ptr(cd_page.0 >> 6);
    let ste1 = Ste1::new().with_s1_dss(2).with_s1_cir(1).with_s1_cor(1).with_s1_csh(3);
    let descriptor = TableDescriptor::Smmuv3 { ste0: ste0.into_bits(), ste1: ste1.into_bits() };
    RandomTable { descriptor, pages: builder.pages, probes, root, input_bits: builder.input_bits }
}

struct Builder<'r> {
    random: &'r mut Random,
    layout: &'r Layout,
    shape: Shape,
    pages: BTreeMap<u64, Box<[u64; ENTRIES]>>,
    next: u64,
    input_bits: u32,
}

impl Builder<'_> {
    /// The next page for a table, empty. There is none left: the last one again.
    fn page(&mut self) -> Gpa {
        let index = self.next.min(self.layout.table_pages.saturating_sub(1));
        self.next += 1;
        let page = Gpa(self.layout.tables.0 + index * PAGE);
        self.pages.entry(page.0).or_insert_with(|| Box::new([0; ENTRIES]));
        page
    }

    fn is_full(&self) -> bool {
        self.next >= self.layout.table_pages
    }

    /// An address that the table could translate, often near another one.
    fn address(&mut self, others: &[Iova]) -> Iova {
        let fresh = self.random.below(1 << self.input_bits);
        let index = usize::try_from(self.random.below(others.len().max(1) as u64)).unwrap_or(0);
        let near = match others.get(index) {
            // The same 1 GiB, 2 MiB or 64 KiB.
            Some(other) if !self.random.once_in(3) => {
                let low = (1u64 << self.random.of(&[30u32, 21, 21, 16])) - 1;
                (other.0 & !low) | (fresh & low)
            }
            _ => fresh,
        };
        Iova(near & ((1 << self.input_bits) - 1) & !3)
    }

    /// Makes what the table says of an address, where it says nothing yet. The address to try, moved to where a block of
    /// 1 GiB leads to data.
    fn grow(&mut self, root: Gpa, iova: Iova) -> Option<Iova> {
        let mut table = root;
        // The architecture's numbers: 0 to 3.
        let mut level = first_level(self.input_bits);
        // Nothing is to fault for another reason from here on.
        let mut limited = false;
        loop {
            let shift = 12 + 9 * (3 - level);
            let index = usize::try_from(iova.0 >> shift & 0x1ff).ok()?;
            let entry = *self.pages.get(&table.0)?.get(index)?;
            if entry == 0 {
                if limited && level < 3 && self.is_full() {
                    return None;
                }
                match self.entry(level, iova, limited) {
                    Made::Leaf(entry, offset) => {
                        self.put(table, index, level, entry);
                        return Some(offset.map_or(iova, |offset| Iova(iova.0 & !((1 << 30) - 1) | offset)));
                    }
                    Made::Table(entry, below) => {
                        self.put(table, index, level, entry);
                        limited |= self.limits(entry);
                        table = below;
                    }
                }
            } else if level < 3 && entry & (TABLE_OR_PAGE | VALID) == TABLE_OR_PAGE | VALID {
                let below = Gpa(entry & 0x0000_ffff_ffff_f000);
                if !self.pages.contains_key(&below.0) {
                    return Some(iova);
                }
                limited |= self.limits(entry);
                table = below;
            } else {
                return Some(iova);
            }
            level += 1;
        }
    }

    /// Whether what is below this entry must not fault for another reason.
    const fn limits(&self, entry: u64) -> bool {
        !self.shape.in_order && entry & AP_TABLE_READ_ONLY != 0
    }

    /// Whether a table entry forbids writes to this address.
    fn is_limited(&self, root: Gpa, iova: Iova) -> bool {
        let mut table = root.0;
        for level in first_level(self.input_bits)..3 {
            let index = usize::try_from(iova.0 >> (12 + 9 * (3 - level)) & 0x1ff).unwrap_or(0);
            let entry = self.pages.get(&table).and_then(|page| page.get(index)).copied().unwrap_or(0);
            if entry & (TABLE_OR_PAGE | VALID) != TABLE_OR_PAGE | VALID {
                return false;
            }
            if entry & AP_TABLE_READ_ONLY != 0 {
                return true;
            }
            table = entry & 0x0000_ffff_ffff_f000;
        }
        false
    }

    /// Writes an entry, and a group of 16 where it is a contiguous one.
    fn put(&mut self, table: Gpa, index: usize, level: u32, entry: u64) {
        let Some(page) = self.pages.get_mut(&table.0) else { return };
        if entry & CONTIGUOUS == 0 || level != 3 {
            if let Some(place) = page.get_mut(index) {
                *place = entry;
            }
            return;
        }
        let first = index & !15;
        let group = page.get_mut(first..first + 16).unwrap_or_default();
        // Entries that differ make a group whose meaning is open.
        let is_free = group.iter().all(|entry| *entry == 0);
        for (place, offset) in group.iter_mut().zip(0u64..) {
            if is_free {
                *place = (entry & !(0xf << 12)) + offset * PAGE;
            }
        }
        if !is_free && let Some(place) = page.get_mut(index) {
            *place = entry & !CONTIGUOUS;
        }
    }

    fn entry(&mut self, level: u32, iova: Iova, limited: bool) -> Made {
        if limited {
            return self.sound(level, iova);
        }
        let top_blocks = self.shape.top_blocks;
        let random = &mut *self.random;
        // A hole, sometimes one with much written in it; never 0, so that it stays one.
        if random.once_in(14) {
            let noise = if random.once_in(2) { 0 } else { random.next() };
            return Made::Leaf((noise | SOFTWARE) & !(VALID | CONTIGUOUS), None);
        }
        // What is reserved at its level: a block at level 0, a page that says block at level 3.
        if (level == 0 && top_blocks || level == 3) && random.once_in(16) {
            return Made::Leaf(self.leaf_bits() | self.output(PAGE).0 | VALID, None);
        }
        let made = match level {
            1 if self.random.once_in(6) => {
                let offset = self.random.below(self.layout.data_bytes / 4) * 4;
                let base = self.layout.data.0 & !((1 << 30) - 1);
                let entry = base | self.leaf_bits() | VALID;
                Made::Leaf(entry, Some((self.layout.data.0 - base) + offset))
            }
            2 if self.random.once_in(4) => {
                Made::Leaf(self.output(1 << 21).0 | self.leaf_bits() | VALID, None)
            }
            3 => {
                let contiguous = self.random.once_in(3);
                let output = self.output(if contiguous { 1 << 16 } else { PAGE });
                let mut entry = output.0 | self.leaf_bits() | TABLE_OR_PAGE | VALID;
                if contiguous {
                    entry |= CONTIGUOUS;
                    // An entry of its own must lead to its own page.
                    entry += iova.0 & 0xf000;
                }
                Made::Leaf(entry, None)
            }
            _ if self.is_full() => Made::Leaf(0, None),
            _ => self.table(),
        };
        match made {
            // One reason each.
            Made::Leaf(entry, offset) if !self.shape.in_order && entry & BEYOND != 0 => {
                Made::Leaf(entry & !AP_READ_ONLY | AF, offset)
            }
            Made::Leaf(entry, offset) if !self.shape.in_order && entry & AF == 0 => {
                Made::Leaf(entry & !AP_READ_ONLY, offset)
            }
            made => made,
        }
    }

    /// An entry that does not fault, but for want of a permission.
    fn sound(&mut self, level: u32, iova: Iova) -> Made {
        if level < 3 {
            let below = self.page();
            return Made::Table(below.0 | TABLE_OR_PAGE | VALID, below);
        }
        let pages = self.layout.data_bytes / PAGE;
        let output = self.layout.data.0 + (iova.0 / PAGE % pages) * PAGE;
        Made::Leaf(output | self.leaf_bits() | AF | TABLE_OR_PAGE | VALID, None)
    }

    fn table(&mut self) -> Made {
        if self.random.once_in(24) {
            // A table where there is no memory, or beyond every output size.
            let at = if self.random.once_in(2) { self.layout.nowhere.0 } else { 1 << 46 };
            return Made::Leaf(at | TABLE_OR_PAGE | VALID, None);
        }
        let below = self.page();
        let limits = AP_TABLE.get(usize::from(!self.shape.privilege)..).unwrap_or_default();
        let limit = if self.random.once_in(8) { self.random.of(limits) } else { 0 };
        Made::Table(below.0 | limit | TABLE_OR_PAGE | VALID, below)
    }

    /// Where a leaf of `size` bytes leads.
    fn output(&mut self, size: u64) -> Gpa {
        match self.random.below(24) {
            0 => self.layout.nowhere,
            1 => Gpa(BEYOND),
            _ => {
                let places = (self.layout.data_bytes / size).max(1);
                Gpa(self.layout.data.0 + self.random.below(places) * size)
            }
        }
    }

    fn leaf_bits(&mut self) -> u64 {
        let random = &mut *self.random;
        let mut bits = SH_INNER | random.of(&XN);
        for (bit, clear_once_in) in [(AP_UNPRIVILEGED, 10), (AF, 10), (NOT_GLOBAL, 3)] {
            if !random.once_in(clear_once_in) {
                bits |= bit;
            }
        }
        if !self.shape.privilege {
            bits |= AP_UNPRIVILEGED;
        }
        if random.once_in(4) {
            bits |= AP_READ_ONLY;
        }
        bits
    }

    fn descriptor(&mut self, root: Gpa, caps: &Caps) -> Cd {
        let random = &mut *self.random;
        let most = IPS_BITS.iter().rposition(|bits| *bits <= caps.oas_bits).unwrap_or(0);
        let ips = if random.once_in(6) { random.below(most as u64 + 1) } else { most as u64 };
        let t0sz = 64 - self.input_bits;
        let mut word0 = CdWord0::new()
            .with_t0sz(u8::try_from(t0sz).unwrap_or(16))
            .with_ir0(1)
            .with_or0(1)
            .with_sh0(3)
            .with_epd1(true)
            .with_valid(true)
            .with_ips(u8::try_from(ips).unwrap_or(0))
            .with_aa64(true)
            .with_record(true)
            .with_abort(true)
            .with_aset(true)
            // Few, so that tables of one ASID follow each other.
            .with_asid(u16::try_from(1 + random.below(3)).unwrap_or(1));
        match random.below(40) {
            0 => word0.set_valid(false),
            1 => word0.set_epd0(true),
            2 | 3 => word0.set_affd(true),
            4 => word0.set_wxn(true),
            _ => {}
        }
        let word1 = CdWord1::new().with_ttb0(root.0 >> 4);
        Cd { word0, word1, mair: 0xff, ..Cd::default() }
    }
}

/// An entry.
enum Made {
    /// It ends the walk; where it is a block of 1 GiB, with an offset that leads to data.
    Leaf(u64, Option<u64>),
    /// It leads to the next level.
    Table(u64, Gpa),
}
