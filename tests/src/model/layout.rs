//! Where the generator keeps what guests make by hand, in the lower half of guest memory.

use crate::rig::Memory;

/// Two CD tables in linear form (0 and 2) and one of two levels (1), 1 MiB apart.
pub const CD_TABLES: u64 = Memory::BASE + 0x10_0000;
/// How many.
pub const CD_TABLE_COUNT: u64 = 3;
/// Bytes from one to the next.
pub const CD_TABLE_STEP: u64 = 0x10_0000;
/// Level-2 tables of the one of two levels, from its start on, 64 KiB apart.
pub const CD_LEAVES: u64 = 0x8_0000;

/// PASID directories.
pub const DIRECTORIES: u64 = Memory::BASE + 0x40_0000;
/// How many.
pub const DIRECTORY_COUNT: u64 = 2;
/// Bytes from one to the next.
pub const DIRECTORY_STEP: u64 = 0x8_0000;
/// PASID tables of a directory, from its start on, 64 KiB apart.
pub const PASID_TABLES: u64 = 0x4_0000;

/// Page tables of address spaces, [`SPACE_STEP`] apart: VMSAv8-64 ones, then as many for VT-d.
pub const SPACES: u64 = Memory::BASE + 0x50_0000;
/// How many of each.
pub const SPACE_COUNT: u64 = 3;
/// Bytes from one to the next.
pub const SPACE_STEP: u64 = 0x1_0000;

/// Where the device keeps its own tables, where it has some: not the guest's.
pub const WINDOW: u64 = Memory::BASE + 0x60_0000;
/// Bytes of it.
pub const WINDOW_BYTES: u64 = 0x10_0000;

/// Zeros.
pub const ZEROS: u64 = Memory::BASE + 0x70_0000;

/// Bytes of guest memory.
pub const MEMORY_BYTES: usize = 16 << 20;
/// First and last address of guest memory.
pub const MEMORY: (u64, u64) = (Memory::BASE, Memory::BASE + MEMORY_BYTES as u64 - 1);

/// Page tables of one address space: a chain of tables down to the one that covers 1 GiB in steps of 2 MiB, then, for each
/// of two such steps, two tables of pages to choose from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tables {
    /// The first table.
    pub root: u64,
    is_vtd: bool,
}

impl Tables {
    /// Address space `n` of VMSAv8-64 or VT-d tables.
    pub const fn new(is_vtd: bool, n: u64) -> Self {
        let n = n % SPACE_COUNT + if is_vtd { SPACE_COUNT } else { 0 };
        Self { root: SPACES + n * SPACE_STEP, is_vtd }
    }

    /// Tables above the pages': 3 levels with 39 bits, 4 with 48.
    const fn upper(self) -> u64 {
        if self.is_vtd { 3 } else { 2 }
    }

    /// Entries of upper tables, each with the table that it is to lead to.
    pub fn links(self) -> impl Iterator<Item = (u64, u64)> {
        (1..self.upper()).map(move |n| (self.root + (n - 1) * 4096, self.root + n * 4096))
    }

    /// The entry that covers 2 MiB.
    pub const fn region(self, region: u64) -> u64 {
        self.root + (self.upper() - 1) * 4096 + 8 * (region % 2)
    }

    /// A table of pages.
    pub const fn pages(self, region: u64, variant: u64) -> u64 {
        self.root + (self.upper() + region % 2 * 2 + variant % 2) * 4096
    }

    /// The address space whose first table this is.
    pub fn of(is_vtd: bool, root: u64) -> Option<Self> {
        (0..SPACE_COUNT).map(|n| Self::new(is_vtd, n)).find(|tables| tables.root == root)
    }

    /// An entry that leads to a table.
    pub const fn link(self, table: u64) -> u64 {
        // Valid and table; or P, R/W, U/S.
        table | if self.is_vtd { 7 } else { 3 }
    }

    /// A page, or a block of 2 MiB, that may be written, and by unprivileged accesses.
    pub const fn leaf(self, output: u64, is_block: bool) -> u64 {
        match (self.is_vtd, is_block) {
            // AF, nG, AP[1], UXN, PXN.
            (false, false) => output | 3 | 1 << 6 | 1 << 10 | 1 << 11 | 3 << 53,
            (false, true) => output | 1 | 1 << 6 | 1 << 10 | 1 << 11 | 3 << 53,
            // P, R/W, U/S, A, D.
            (true, false) => output | 0x67,
            (true, true) => output | 0xe7,
        }
    }

    /// A leaf made global: G set, or nG cleared.
    pub const fn global(self, leaf: u64) -> u64 {
        if self.is_vtd { leaf | 1 << 8 } else { leaf & !(1 << 11) }
    }
}
