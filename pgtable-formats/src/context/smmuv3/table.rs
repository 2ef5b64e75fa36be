//! The canonical context-descriptor table: from stream table entry words to the descriptor of a PASID.

use super::{
    Caps, Context, Event, L1Cd, StallModel, Ste0, Ste1,
    context::{Rules, judge},
};
use crate::{Gpa, Pasid, TableMem, context};

/// How a CD table is laid out (STE.S1Fmt; IHI 0070, 5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TableFormat {
    /// One array of 64-byte descriptors.
    Linear,
    /// 8-byte level-1 entries that point to 4 KiB tables of 64 descriptors.
    TwoLevel4K,
    /// 8-byte level-1 entries that point to 64 KiB tables of 1024 descriptors.
    TwoLevel64K,
}

impl TableFormat {
    /// How many PASID bits a level-2 table resolves; `None` where there is no level 2.
    #[inline]
    pub const fn leaf_bits(self) -> Option<u8> {
        match self {
            Self::Linear => None,
            Self::TwoLevel4K => Some(6),
            Self::TwoLevel64K => Some(10),
        }
    }
}

/// What untagged DMA does where the table has more than one descriptor (STE.S1DSS).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Untagged {
    /// It faults with F_STREAM_DISABLED.
    Terminate,
    /// It bypasses stage 1.
    Bypass,
    /// It uses descriptor 0, which PASID 0 may then not use.
    Pasid0,
}

/// Why stream table entry words are not bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SteRefusal {
    /// S1CDMax is greater than IDR1.SSIDSIZE (C_BAD_STE).
    #[error("{asked} PASID bits are asked for and {implemented} implemented")]
    PasidBits {
        /// S1CDMax.
        asked: u8,
        /// IDR1.SSIDSIZE.
        implemented: u8,
    },
    /// S1Fmt asks for a two-level table and IDR0.CD2L is 0 (C_BAD_STE).
    #[error("two-level tables of context descriptors are not implemented")]
    TwoLevel,
    /// S1Fmt is 3 and S1CDMax is not 0.
    #[error("the table format is reserved")]
    Format,
    /// S1ContextPtr is not aligned to the table's size.
    #[error("the table pointer is not aligned to the table's size of {size:#x} bytes")]
    Alignment {
        /// Size of the linear table or of level 1, at least 64 bytes.
        size: u64,
    },
    /// S1ContextPtr lies beyond the output address size (C_BAD_STE).
    #[error("the table pointer has more than {bits} bits")]
    AddressSize {
        /// IDR5.OAS in bits.
        bits: u8,
    },
}

impl SteRefusal {
    /// Whether the words are meaningful but beyond the capabilities; otherwise they are invalid as such.
    pub const fn is_unsupported(self) -> bool {
        match self {
            Self::PasidBits { .. } | Self::TwoLevel => true,
            Self::Format | Self::Alignment { .. } | Self::AddressSize { .. } => false,
        }
    }
}

/// A context-descriptor table in canonical form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CdTable {
    base: Gpa,
    format: TableFormat,
    cd_max: u8,
    untagged: Untagged,
    ats: bool,
    /// S1CIR, S1COR and S1CSH where the STE has them (word 1, bits 7:2).
    fetch_attributes: u64,
    may_stall: bool,
    caps: Caps,
    /// What `caps` and `may_stall` come to.
    rules: Rules,
}

/// Size of a context descriptor.
pub(super) const CD_LG2: u8 = 6;
const STE1_FETCH_ATTRIBUTES: u64 = 0xfc;
const STE_CONFIG_STAGE1: u8 = 5;

impl CdTable {
    /// Checks the first two words of a stream table entry.
    ///
    /// S1Fmt, S1ContextPtr\[51:6\], S1CDMax, S1DSS, EATS (0 or not) and the attributes of CD fetches are taken; all
    /// other bits are ignored, V, Config, STRW and S1STALLD among them, because drivers send their software copy of
    /// the entry. S1Fmt has no meaning where S1CDMax is 0. Whether the table lies in memory is for the caller to
    /// check, see [`extents`](Self::extents); what it holds is judged by [`lookup`](Self::lookup).
    ///
    /// The endpoint counts as one that may not stall, see [`with_stall`](Self::with_stall).
    ///
    /// # Errors
    /// What the two words themselves show to be wrong.
    pub const fn from_ste(ste0: u64, ste1: u64, caps: &Caps) -> Result<Self, SteRefusal> {
        let (word0, word1) = (Ste0::from_bits(ste0), Ste1::from_bits(ste1));
        let cd_max = word0.s1_cd_max();
        if cd_max > caps.ssid_bits {
            return Err(SteRefusal::PasidBits { asked: cd_max, implemented: caps.ssid_bits });
        }
        let format = match (cd_max, word0.s1_fmt()) {
            (0, _) | (_, 0) => TableFormat::Linear,
            (_, 1) => TableFormat::TwoLevel4K,
            (_, 2) => TableFormat::TwoLevel64K,
            _ => return Err(SteRefusal::Format),
        };
        if !matches!(format, TableFormat::Linear) && !caps.two_level_cd {
            return Err(SteRefusal::TwoLevel);
        }
        let table = Self {
            base: Gpa(word0.s1_context_ptr() << CD_LG2),
            format,
            cd_max,
            untagged: match word1.s1_dss() {
                1 => Untagged::Bypass,
                2 => Untagged::Pasid0,
                _ => Untagged::Terminate,
            },
            ats: word1.eats() != 0,
            fetch_attributes: ste1 & STE1_FETCH_ATTRIBUTES,
            may_stall: false,
            caps: *caps,
            rules: Rules::new(caps, false),
        };
        let base = table.base;
        if base.0 >> caps.oas_bits != 0 {
            return Err(SteRefusal::AddressSize { bits: caps.oas_bits });
        }
        if !base.is_aligned(table.size_lg2()) {
            return Err(SteRefusal::Alignment { size: 1 << table.size_lg2() });
        }
        Ok(table)
    }

    /// The same table for an endpoint whose transactions may stall, or not.
    ///
    /// Where stalling is optional (`STALL_MODEL = 0`) and the endpoint may not, S1STALLD is set, so that a descriptor
    /// with `S = 1` is C_BAD_CD.
    #[must_use]
    pub const fn with_stall(self, may_stall: bool) -> Self {
        Self { may_stall, rules: Rules::new(&self.caps, may_stall), ..self }
    }

    /// Where the table starts and how many bytes of it the stream can reach: the whole linear table, or level 1.
    pub const fn extents(&self) -> (Gpa, u64) {
        let size = match self.format.leaf_bits() {
            None => 1 << (CD_LG2 + self.cd_max),
            Some(leaf) => 8 << self.cd_max.saturating_sub(leaf),
        };
        (self.base, size)
    }

    /// How many bits a PASID has: log2 of the number of descriptors.
    pub const fn pasid_bits(&self) -> u8 {
        self.cd_max
    }

    /// How the table is laid out.
    pub const fn format(&self) -> TableFormat {
        self.format
    }

    /// What untagged DMA does. Where [`pasid_bits`](Self::pasid_bits) is 0 it uses descriptor 0 whatever this says.
    pub const fn untagged(&self) -> Untagged {
        self.untagged
    }

    /// Whether the guest turns ATS on (EATS is not 0).
    pub const fn ats(&self) -> bool {
        self.ats
    }

    /// The capabilities that the table was checked against.
    pub const fn caps(&self) -> &Caps {
        &self.caps
    }

    /// The two words of the canonical stream table entry, as `iommu_hwpt_arm_smmuv3` takes them: V=1, Config=5.
    pub const fn words(&self) -> [u64; 2] {
        let s1_fmt = match self.format {
            TableFormat::Linear => 0,
            TableFormat::TwoLevel4K => 1,
            TableFormat::TwoLevel64K => 2,
        };
        let s1_dss = match self.untagged {
            Untagged::Terminate => 0,
            Untagged::Bypass => 1,
            Untagged::Pasid0 => 2,
        };
        let word0 = Ste0::new()
            .with_valid(true)
            .with_config(STE_CONFIG_STAGE1)
            .with_s1_fmt(s1_fmt)
            .with_s1_context_ptr(self.base.0 >> CD_LG2)
            .with_s1_cd_max(self.cd_max);
        let word1 = Ste1::from_bits(self.fetch_attributes)
            .with_s1_dss(s1_dss)
            .with_s1_stalld(self.stalls_disabled())
            .with_eats(self.ats as u8);
        [word0.into_bits(), word1.into_bits()]
    }

    /// The PASID whose descriptor serves `pasid` (`None`: untagged DMA). `None` where no descriptor does: the DMA
    /// bypasses or faults, which [`lookup`](Self::lookup) tells without reading memory.
    ///
    /// Where untagged DMA uses descriptor 0, tagged DMA of PASID 0 uses none, so caches may be tagged with the answer.
    #[inline]
    pub const fn effective_pasid(&self, pasid: Option<Pasid>) -> Option<Pasid> {
        match self.select(pasid) {
            Ok(selected) => selected,
            Err(_) => None,
        }
    }

    /// Reads and judges the descriptor of `pasid` (`None`: untagged DMA).
    ///
    /// # Errors
    /// In the order of IHI 0070, 7.3.22: C_BAD_SUBSTREAMID (PASID beyond the table), F_STREAM_DISABLED, F_CD_FETCH
    /// (the table is not in memory), C_BAD_SUBSTREAMID (no level-2 table), F_CD_FETCH, C_BAD_CD.
    #[inline]
    pub fn lookup<M: TableMem>(&self, mem: &M, pasid: Option<Pasid>) -> Result<context::Context, Event> {
        let Some(pasid) = self.select(pasid)? else {
            return Ok(context::Context::Bypass);
        };
        let at = self.locate(mem, pasid)?;
        Ok(context::Context::Stage1(context::Stage1::Smmuv3(self.fetch(mem, at)?)))
    }

    /// Whose descriptor serves `pasid`; `None` where stage 1 is bypassed.
    #[inline]
    const fn select(&self, pasid: Option<Pasid>) -> Result<Option<Pasid>, Event> {
        match (pasid, self.untagged) {
            (None, _) if self.cd_max == 0 => Ok(Some(Pasid::ZERO)),
            (None, Untagged::Terminate) => Err(Event::FStreamDisabled),
            (None, Untagged::Bypass) => Ok(None),
            (None, Untagged::Pasid0) => Ok(Some(Pasid::ZERO)),
            (Some(pasid), _) if self.cd_max == 0 || pasid.value() >> self.cd_max != 0 => {
                Err(Event::CBadSubstreamid)
            }
            (Some(pasid), Untagged::Pasid0) if pasid.value() == 0 => Err(Event::FStreamDisabled),
            (Some(pasid), _) => Ok(Some(pasid)),
        }
    }

    /// Where the descriptor of `pasid`, which lies inside the table, is.
    #[inline]
    fn locate<M: TableMem>(&self, mem: &M, pasid: Pasid) -> Result<Gpa, Event> {
        let Some(leaf_bits) = self.format.leaf_bits() else {
            return Ok(Gpa(self.base.0 + (u64::from(pasid.value()) << CD_LG2)));
        };
        let entry = mem.load(self.l1_entry(pasid, leaf_bits)).map_err(|_| Event::FCdFetch)?;
        let table = l2_table(L1Cd::from_bits(entry), leaf_bits).ok_or(Event::CBadSubstreamid)?;
        if table.0 >> self.caps.oas_bits != 0 {
            return Err(Event::CBadSubstreamid);
        }
        Ok(in_leaf(table, pasid, leaf_bits))
    }

    #[inline]
    fn fetch<M: TableMem>(&self, mem: &M, at: Gpa) -> Result<Context, Event> {
        let word = |index: u64| mem.load(Gpa(at.0 + 8 * index)).map_err(|_| Event::FCdFetch);
        // The other words hold memory attributes and unsupported features: nothing that a translation depends on.
        judge([word(0)?, word(1)?, word(2)?], &self.caps, &self.rules)
    }

    /// Address of the level-1 entry that leads to `pasid`. The sum stays inside the table, which `from_ste` checked
    /// to lie below 2^52.
    pub(super) fn l1_entry(&self, pasid: Pasid, leaf_bits: u8) -> Gpa {
        Gpa(self.base.0 + (u64::from(pasid.value() >> leaf_bits) << 3))
    }

    /// log2 of the size of the linear table or of level 1, but at least the 64 bytes that the pointer can express.
    pub(super) const fn size_lg2(&self) -> u8 {
        match self.format.leaf_bits() {
            None => CD_LG2 + self.cd_max,
            Some(leaf) => {
                let size = 3 + self.cd_max.saturating_sub(leaf);
                if size < CD_LG2 { CD_LG2 } else { size }
            }
        }
    }

    const fn stalls_disabled(&self) -> bool {
        matches!(self.caps.stall_model, StallModel::Both) && !self.may_stall
    }
}

/// The level-2 table that a level-1 entry points to; `None` where the entry is not valid.
#[inline]
pub(super) fn l2_table(entry: L1Cd, leaf_bits: u8) -> Option<Gpa> {
    // With 64 KiB leaves the pointer's bits 15:12 are reserved; they are masked, as hardware may.
    let size_mask = (1 << (leaf_bits + CD_LG2)) - 1;
    entry.valid().then(|| Gpa(entry.l2_ptr() << 12 & !size_mask))
}

/// Address of the descriptor of `pasid` in its level-2 table.
#[inline]
pub(super) fn in_leaf(table: Gpa, pasid: Pasid, leaf_bits: u8) -> Gpa {
    Gpa(table.0 | (u64::from(pasid.value()) & ((1 << leaf_bits) - 1)) << CD_LG2)
}
