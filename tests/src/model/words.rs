//! Walks of guest tables, word by word, as the manuals tell them; slow, and sharing nothing with `pgtable-formats`.
//!
//! Only what the generator can make is known here: SMMUv3 context descriptors with the 4 KiB granule and the lower half,
//! VMSAv8-64 tables below them, VT-d PASID directories, and first-stage tables.

use super::world::Hardware;

/// Guest memory: the word at an address, or `None` where there is no memory.
pub type Words<'a> = &'a dyn Fn(u64) -> Option<u64>;

/// An access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// What it does.
    pub kind: Kind,
    /// In privileged mode.
    pub privileged: bool,
}

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Fetches instructions.
    Execute,
}

/// The tables that a context leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// VMSAv8-64, lower half, 4 KiB granule.
    Arm {
        /// The first table.
        root: u64,
        /// Bits of input address.
        input: u32,
        /// Bits of output address.
        output: u32,
        /// The tag.
        asid: u16,
    },
    /// VT-d first stage.
    Vtd {
        /// The first table.
        root: u64,
        /// 4 or 5.
        levels: u32,
        /// Privileged requests.
        sre: bool,
        /// Read-only binds privileged writes.
        wpe: bool,
        /// Bits of host address.
        haw: u32,
        /// 1 GiB pages.
        giant_pages: bool,
    },
}

/// What a PASID entry leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Context {
    /// Output equals input.
    Bypass,
    /// Tables.
    Tables(Space),
    /// Words whose meaning is not modelled: any answer goes.
    Unknown,
}

/// What a walk found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// First address.
    pub iova: u64,
    /// Where it leads.
    pub output: u64,
    /// log2 of the size.
    pub lg2: u32,
    /// What it permits.
    pub rights: Rights,
    /// It is global.
    pub global: bool,
}

/// Six permissions: by kind, unprivileged and privileged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights {
    user: [bool; 3],
    privileged: [bool; 3],
}

/// A table that holds only pages, and what the tables above it say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastTable {
    /// Its address.
    pub at: u64,
    limits: u64,
}

/// A walk that ended well: the leaf, and the last table where the leaf is a page.
pub type Walk = Result<(Leaf, Option<LastTable>), &'static str>;

impl Rights {
    /// Whether an access may pass.
    pub const fn allow(self, access: Access) -> bool {
        let rights = if access.privileged { self.privileged } else { self.user };
        rights[access.kind as usize]
    }
}

impl Leaf {
    /// Whether `iova` lies in it.
    pub const fn covers(&self, iova: u64) -> bool {
        (self.iova ^ iova) >> self.lg2 == 0
    }

    /// Where `iova` leads.
    pub const fn apply(&self, iova: u64) -> u64 {
        self.output + (iova - self.iova)
    }

    /// The last address.
    pub const fn last(&self) -> u64 {
        self.iova + ((1 << self.lg2) - 1)
    }
}

impl Space {
    /// The ASID, where the architecture has one.
    pub const fn asid(&self) -> Option<u16> {
        match self {
            Self::Arm { asid, .. } => Some(*asid),
            Self::Vtd { .. } => None,
        }
    }

    /// From the root.
    pub fn walk(&self, words: Words<'_>, iova: u64, access: Access) -> Walk {
        match *self {
            Self::Arm { root, input, .. } => {
                // Bit 55 selects the upper half, whose walks are disabled.
                if iova >> 55 & 1 != 0 || iova >> input != 0 {
                    return Err("F_TRANSLATION");
                }
                let below = (input - 12).div_ceil(9) - 1;
                self.arm(words, root, below, 0, iova, access)
            }
            Self::Vtd { root, levels, .. } => {
                self.vtd_admits(access)?;
                let bits = 12 + 9 * levels;
                let high = iova.cast_signed() >> (bits - 1);
                if high != 0 && high != -1 {
                    return Err("0x80");
                }
                self.vtd(words, root, levels - 1, u64::MAX, iova, access)
            }
        }
    }

    /// From a table of pages that an earlier walk of the same 2 MiB came to.
    pub fn walk_from(&self, words: Words<'_>, table: LastTable, iova: u64, access: Access) -> Walk {
        match self {
            Self::Arm { .. } => self.arm(words, table.at, 0, table.limits, iova, access),
            Self::Vtd { .. } => {
                self.vtd_admits(access)?;
                self.vtd(words, table.at, 0, table.limits, iova, access)
            }
        }
    }

    /// `below`: how many levels there are below this one. `limits`: table entries so far, ORed.
    fn arm(&self, words: Words<'_>, table: u64, below: u32, limits: u64, iova: u64, access: Access) -> Walk {
        let &Self::Arm { output, .. } = self else { unreachable!() };
        let lg2 = 12 + 9 * below;
        let index = iova >> lg2 & 0x1ff;
        let entry = words(table + 8 * index).ok_or("F_WALK_EABT")?;
        let is_leaf = match (entry & 3, below) {
            (3, 0) | (1, 1 | 2) => true,
            (3, _) => false,
            _ => return Err("F_TRANSLATION"),
        };
        let low = if is_leaf { lg2 } else { 12 };
        let address = entry & ((1 << 48) - 1) & !((1 << low) - 1);
        if address >> output != 0 {
            return Err("F_ADDR_SIZE");
        }
        if !is_leaf {
            return self.arm(words, address, below - 1, limits | entry, iova, access);
        }
        let set = |word: u64, bit: u32| word >> bit & 1 != 0;
        if !set(entry, 10) {
            return Err("F_ACCESS");
        }
        // AP[2:1], UXN, PXN of the leaf; APTable (62:61), UXNTable (60), PXNTable (59) of the tables above.
        let user = set(entry, 6) && !set(limits, 61);
        let write = !set(entry, 7) && !set(limits, 62);
        let user_execute = !set(entry, 54) && !set(limits, 60);
        // What unprivileged accesses can write is not executed by privileged ones.
        let no_execute = set(entry, 53) || set(limits, 59) || user && write;
        let rights =
            Rights { user: [user, user && write, user_execute], privileged: [true, write, !no_execute] };
        if !rights.allow(access) {
            return Err("F_PERMISSION");
        }
        let leaf =
            Leaf { iova: iova & !((1 << lg2) - 1), output: address, lg2, rights, global: !set(entry, 11) };
        Ok((leaf, (below == 0).then_some(LastTable { at: table, limits })))
    }

    fn vtd_admits(&self, access: Access) -> Result<(), &'static str> {
        match self {
            _ if access.kind == Kind::Execute => Err("0x5c"),
            Self::Vtd { sre: false, .. } if access.privileged => Err("0x5d"),
            _ => Ok(()),
        }
    }

    /// `all`: all entries so far, ANDed.
    fn vtd(&self, words: Words<'_>, table: u64, below: u32, all: u64, iova: u64, access: Access) -> Walk {
        let &Self::Vtd { levels, sre, wpe, haw, giant_pages, .. } = self else { unreachable!() };
        let lg2 = 12 + 9 * below;
        let index = iova >> lg2 & 0x1ff;
        let fault = if below == levels - 1 { "0x73" } else { "0x70" };
        let entry = words(table + 8 * index).ok_or(fault)?;
        if entry & 1 == 0 {
            return Err("0x71");
        }
        let address = entry & 0x000f_ffff_ffff_f000;
        // Bit 63 is XD, ignored without NXE.
        if address >> haw != 0 {
            return Err("0x72");
        }
        let is_leaf = below == 0 || entry & 1 << 7 != 0;
        if !is_leaf {
            return self.vtd(words, address, below - 1, all & entry, iova, access);
        }
        let inside = (1_u64 << lg2) - 1;
        if below > 0 {
            let may_be_leaf = below == 1 || below == 2 && giant_pages;
            // Bit 12 is PAT.
            if !may_be_leaf || address & inside & !(1 << 12) != 0 {
                return Err("0x72");
            }
        }
        let (user, write) = (all & entry & 4 != 0, all & entry & 2 != 0);
        let rights =
            Rights { user: [user, user && write, false], privileged: [sre, sre && (write || !wpe), false] };
        if !rights.allow(access) {
            return Err(if !access.privileged && !user { "0x81" } else { "0x85" });
        }
        let leaf = Leaf {
            iova: iova & !inside,
            output: address & !inside,
            lg2,
            rights,
            global: entry & 1 << 8 != 0,
        };
        if leaf.apply(iova) >> 20 == 0xfee {
            return Err("0x87");
        }
        Ok((leaf, (below == 0).then_some(LastTable { at: table, limits: all })))
    }
}

/// SMMUv3: a table of context descriptors as two words of a stream table entry name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CdTable {
    /// Its address.
    pub base: u64,
    /// PASID bits of a level-2 table; 0: linear.
    pub leaf_bits: u32,
    /// PASID bits.
    pub cd_max: u32,
    /// What untagged accesses do: 1 bypass, 2 descriptor 0, others fault.
    pub dss: u64,
}

/// VT-d: a PASID directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Directory {
    /// Its address.
    pub base: u64,
    /// log2 of its entries.
    pub lg2: u32,
    /// The PASID of untagged accesses.
    pub untagged: u32,
}

impl CdTable {
    /// Which descriptor serves an access. `Ok(None)`: stage 1 is bypassed.
    pub const fn entry(&self, pasid: Option<u32>) -> Result<Option<u32>, &'static str> {
        match pasid {
            None if self.cd_max == 0 => Ok(Some(0)),
            None => match self.dss {
                1 => Ok(None),
                2 => Ok(Some(0)),
                _ => Err("F_STREAM_DISABLED"),
            },
            Some(pasid) if self.cd_max == 0 || pasid >> self.cd_max != 0 => Err("C_BAD_SUBSTREAMID"),
            Some(0) if self.dss == 2 => Err("F_STREAM_DISABLED"),
            Some(pasid) => Ok(Some(pasid)),
        }
    }

    /// Reads and judges a descriptor.
    pub fn context(&self, words: Words<'_>, entry: u32, hardware: Hardware) -> Result<Context, &'static str> {
        let Hardware::Smmuv3 { oas, .. } = hardware else { unreachable!() };
        let entry = u64::from(entry);
        let at = if self.leaf_bits == 0 {
            self.base + 64 * entry
        } else {
            let l1 = words(self.base + 8 * (entry >> self.leaf_bits)).ok_or("F_CD_FETCH")?;
            let table = l1 & 0x000f_ffff_ffff_f000 & !((64 << self.leaf_bits) - 1);
            if l1 & 1 == 0 || table >> oas != 0 {
                return Err("C_BAD_SUBSTREAMID");
            }
            table + 64 * (entry & ((1 << self.leaf_bits) - 1))
        };
        let mut cd = [0; 8];
        for (n, word) in (0..).zip(&mut cd) {
            *word = words(at + 8 * n).ok_or("F_CD_FETCH")?;
        }
        judge_cd(cd, oas)
    }
}

/// What of word 0 may vary: T0SZ, attributes, V, IPS, AA64, A, ASID.
const CD_KNOWN: u64 = 0x3f | 0x3f << 8 | 1 << 31 | 7 << 32 | 1 << 41 | 1 << 46 | 0xffff << 48;
/// What is always there: EPD1, R, ASET.
const CD_FIXED: u64 = 1 << 30 | 1 << 45 | 1 << 47;

fn judge_cd(cd: [u64; 8], oas: u8) -> Result<Context, &'static str> {
    let [word0, word1, ..] = cd;
    // V; AA64; A, which TERM_MODEL wants.
    if [31, 41, 46].iter().any(|bit| word0 >> bit & 1 == 0) {
        return Err("C_BAD_CD");
    }
    if word0 & !CD_KNOWN != CD_FIXED || word1 & !0x000f_ffff_ffff_f000 != 0 || cd[2] != 0 {
        return Ok(Context::Unknown);
    }
    let t0sz = word0 & 0x3f;
    if !(16..=39).contains(&t0sz) {
        return Err("C_BAD_CD");
    }
    let ips = [32, 36, 40, 42, 44, 48, 48, 48][(word0 >> 32 & 7) as usize];
    let output = u32::min(ips, oas.into());
    if word1 >> output != 0 {
        return Err("C_BAD_CD");
    }
    Ok(Context::Tables(Space::Arm {
        root: word1,
        input: 64 - t0sz as u32,
        output,
        asid: (word0 >> 48) as u16,
    }))
}

/// A context descriptor that leads to `root`, whose tables translate 39 bits.
pub const fn cd(root: u64, asid: u16) -> [u64; 8] {
    let word0 = CD_FIXED | 25 | 0x35 << 8 | 1 << 31 | 2 << 32 | 1 << 41 | 1 << 46 | (asid as u64) << 48;
    [word0, root, 0, 0xff, 0, 0, 0, 0]
}

impl Directory {
    /// Which entry serves an access.
    pub const fn entry(&self, pasid: Option<u32>, hardware: Hardware) -> Result<u32, &'static str> {
        let Hardware::Vtd { pasid_bits, .. } = hardware else { return Err("0x45") };
        match pasid {
            None => Ok(self.untagged),
            Some(_) if pasid_bits == 0 => Err("0x45"),
            Some(pasid) if pasid >> pasid_bits != 0 || pasid >> (self.lg2 + 6) != 0 => Err("0x46"),
            Some(pasid) => Ok(pasid),
        }
    }

    /// Reads and judges an entry.
    pub fn context(&self, words: Words<'_>, entry: u32, hardware: Hardware) -> Result<Context, &'static str> {
        let Hardware::Vtd { haw, five_levels, giant_pages, srs, eafs, .. } = hardware else { unreachable!() };
        let word = words(self.base + 8 * u64::from(entry >> 6)).ok_or("0x50")?;
        if word & 1 == 0 {
            return Err("0x51");
        }
        let table = word & !0xfff;
        if word & 0xffc != 0 || table >> haw != 0 {
            return Err("0x52");
        }
        let mut found = [0; 8];
        for (n, word) in (0..).zip(&mut found) {
            *word = words(table + 64 * u64::from(entry & 63) + 8 * n).ok_or("0x58")?;
        }
        let [word0, word1, word2, rest @ ..] = found;
        if word0 & 1 == 0 {
            return Err("0x59");
        }
        // Bits 5, 9, 11:10; of the second word all but DID, PWSNP and PGSNP.
        let reserved = word0 & 0xe20 | word1 & !0x180_ffff | rest.iter().fold(0, |all, word| all | word);
        if reserved != 0 {
            return Err("0x5a");
        }
        match word0 >> 6 & 7 {
            1 => {}
            4 => return Ok(Context::Bypass),
            _ => return Err("0x5b"),
        }
        let (sre, wpe, eafe) = (word2 & 1 != 0, word2 & 1 << 4 != 0, word2 & 1 << 7 != 0);
        let root = word2 & !0xfff;
        // ERE, NXE, SMEP, bits 11:8.
        if word2 & 0xf62 != 0 || (sre || wpe) && !srs || eafe && !eafs || root >> haw != 0 {
            return Err("0x5a");
        }
        let levels = match word2 >> 2 & 3 {
            0 => 4,
            1 if five_levels => 5,
            _ => return Err("0x5b"),
        };
        Ok(Context::Tables(Space::Vtd { root, levels, sre, wpe: sre && wpe, haw: haw.into(), giant_pages }))
    }
}

/// A PASID entry that leads to 4-level tables.
pub const fn pasid_entry(root: u64, sre: bool) -> [u64; 8] {
    [1 | 1 << 6, 1 | 1 << 23, root | sre as u64, 0, 0, 0, 0, 0]
}
