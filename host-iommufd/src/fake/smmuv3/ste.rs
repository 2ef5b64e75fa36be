//! The two words of a guest's stream table entry (IHI 0070, 5.2), as the driver takes them.

use nix::errno::Errno;
use pgtable_formats::context::smmuv3::CdTable;

use super::super::units::FakeSmmuv3;

/// V, Config, S1Fmt, S1ContextPtr\[51:6\], S1CDMax.
const WORD0: u64 = 1 | 7 << 1 | 3 << 4 | 0x000f_ffff_ffff_ffc0 | 0x1f << 59;
/// S1DSS, S1CIR, S1COR, S1CSH, S1STALLD, EATS.
const WORD1: u64 = 0xff | 1 << 27 | 3 << 28;

/// An entry that the driver has accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Ste {
    words: [u64; 2],
}

/// What an entry makes of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Config {
    Abort,
    Bypass,
    Stage1,
}

impl Ste {
    /// An entry with `V = 0` is taken whatever else it holds, and aborts.
    pub(in super::super) fn accept(words: [u64; 2]) -> Result<Self, Errno> {
        let [word0, word1] = words;
        if word0 & 1 == 0 {
            return Ok(Self { words: [0; 2] });
        }
        let is_clean = word0 & !WORD0 == 0 && word1 & !WORD1 == 0;
        if is_clean && matches!(word0 >> 1 & 7, 0 | 4 | 5) && word1 >> 28 & 3 <= 1 {
            Ok(Self { words })
        } else {
            Err(Errno::EIO)
        }
    }

    pub(in super::super) fn config(self) -> Config {
        match self.words[0] >> 1 & 7 {
            4 => Config::Bypass,
            5 => Config::Stage1,
            _ => Config::Abort,
        }
    }

    pub(in super::super) fn translates(self) -> bool {
        self.config() == Config::Stage1
    }

    /// The guest's switch for ATS.
    pub(in super::super) fn eats(self) -> bool {
        self.words[1] >> 28 & 1 != 0
    }

    /// What the hardware makes of a translating entry; `None`: the entry is illegal (C_BAD_STE).
    pub(in super::super) fn table(self, smmu: &FakeSmmuv3) -> Option<CdTable> {
        let stalls_disabled = self.words[1] >> 27 & 1 != 0;
        if stalls_disabled && smmu.idr0().stall_model() != 0 {
            return None;
        }
        let table = CdTable::from_ste(self.words[0], self.words[1], &smmu.caps()).ok()?;
        Some(table.with_stall(!stalls_disabled))
    }
}
