//! Judging a context descriptor, and the walk that it configures.

use super::{Caps, CdWord0, CdWord1, CdWord2, Event, StallModel, TableEndianness, caps::address_bits};
use crate::{
    Access, Gpa, Iova, NotMemory, TableMem, Translation, WalkFault,
    leaf::vmsav8::{Granule, Vmsav8, Vmsav8Flags, Vmsav8Params},
    walk,
};

/// A legal context descriptor: what hardware keeps of it for translations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    asid: u16,
    big_endian: bool,
    records: bool,
    lower: Option<Vmsav8>,
    upper: Option<Vmsav8>,
}

impl Context {
    /// The tag on cached translations.
    #[inline]
    pub const fn asid(&self) -> u16 {
        self.asid
    }

    /// The tables that translate `iova` (bit 55 selects the half); `None` where walks of that half are disabled.
    #[inline]
    pub const fn half(&self, iova: Iova) -> Option<&Vmsav8> {
        if iova.0 >> 55 & 1 == 0 { self.lower.as_ref() } else { self.upper.as_ref() }
    }

    /// Whether the entries of the tables are big-endian.
    #[inline]
    pub const fn is_big_endian(&self) -> bool {
        self.big_endian
    }

    /// CD.R: whether faults of the walk are recorded, see [`Event::heeds_r`]. What stalls (CD.S) always is: it waits
    /// for an answer (IHI 0070, 3.12.2).
    #[inline]
    pub const fn records(&self) -> bool {
        self.records
    }

    /// Walks the live table.
    ///
    /// # Errors
    /// F_TRANSLATION where the half is disabled or the address out of its range, then per level F_WALK_EABT,
    /// F_TRANSLATION, F_ADDR_SIZE, and of the leaf F_ACCESS before F_PERMISSION (IHI 0070, 7.3.22).
    // Inlined, its answer is not copied to change the type of an error that is rare.
    #[inline(always)]
    pub fn walk<M: TableMem>(&self, mem: &M, iova: Iova, access: Access) -> Result<Translation, Event> {
        let half = self.half(iova).ok_or(Event::FTranslation)?;
        if self.big_endian {
            return walk_big_endian(half, mem, iova, access);
        }
        walk(half, mem, iova, access).map_err(Event::from)
    }
}

/// What the walker finds, as an SMMUv3 records it.
impl From<WalkFault> for Event {
    #[cold]
    fn from(fault: WalkFault) -> Self {
        match fault {
            WalkFault::InputRange | WalkFault::NotPresent { .. } | WalkFault::Reserved { .. } => {
                Self::FTranslation
            }
            // A flag update that fails is a failed table access as well (IHI 0070, 3.13).
            WalkFault::TableAccess { .. } | WalkFault::EntryUpdate { .. } => Self::FWalkEabt,
            WalkFault::AddressSize { .. } | WalkFault::Output { .. } => Self::FAddrSize,
            WalkFault::AccessFlag { .. } => Self::FAccess,
            WalkFault::Permission { .. } => Self::FPermission,
        }
    }
}

/// Judges a context descriptor as `CdIllegal()` does (IHI 0070, 5.4.2), for a stream of the EL1 world.
///
/// `may_stall` is false where STE.S1STALLD is set, which matters only with `STALL_MODEL = 0`.
///
/// Beyond the manual's list, `AA64 = 0` is refused whether or not IDR0.TTF knows VMSAv8-32: it is not walked here.
/// A TxSZ out of range is illegal, as from SMMUv3.1 on. HAFT is judged but otherwise ignored.
///
/// # Errors
/// [`Event::CBadCd`].
pub fn context_from_cd(cd: &[u64; 8], caps: &Caps, may_stall: bool) -> Result<Context, Event> {
    let &[word0, word1, word2, ..] = cd;
    judge([word0, word1, word2], caps, &Rules::new(caps, may_stall))
}

/// What the capabilities make of a descriptor, in the form that takes least time at each access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rules {
    /// Bits of word 0 that are 1 in every legal descriptor.
    required: u64,
    /// Bits of word 0 that are 0.
    forbidden: u64,
    /// Flags that have a meaning.
    flags: Vmsav8Flags,
}

impl Rules {
    /// The checks of `CdIllegal()` that are about single bits of word 0.
    pub(super) const fn new(caps: &Caps, may_stall: bool) -> Self {
        const NONE: CdWord0 = CdWord0::new();
        let (stall, flags) = (NONE.with_stall(true), NONE.with_ha(true).with_hd(true));
        let mut required = NONE.with_valid(true).with_aa64(true).with_abort(caps.always_abort).into_bits();
        let mut forbidden =
            NONE.with_aa64(!caps.aarch64).with_asid(if caps.asid16 { 0 } else { 0xff00 }).into_bits();
        match caps.stall_model {
            StallModel::Both if may_stall => {}
            StallModel::Both | StallModel::Terminate => forbidden |= stall.into_bits(),
            StallModel::Stall => required |= stall.into_bits(),
        }
        match caps.endianness {
            TableEndianness::Both => {}
            TableEndianness::Little => forbidden |= ENDI,
            TableEndianness::Big => required |= ENDI,
        }
        match caps.httu {
            0 => forbidden |= flags.into_bits(),
            1 => forbidden |= flags.with_ha(false).into_bits(),
            _ => {}
        }
        let mut known = Vmsav8Flags::all();
        if !caps.had {
            known = known.difference(Vmsav8Flags::HAD);
        }
        if !caps.e0pd {
            known = known.difference(Vmsav8Flags::E0PD);
        }
        if !caps.epan {
            known = known.difference(Vmsav8Flags::EPAN);
        }
        Self { required, forbidden, flags: known }
    }

    /// The checks of `CdIllegal()` that do not belong to one half.
    #[inline]
    fn refuse(&self, word0: CdWord0, word1: CdWord1, caps: &Caps) -> bool {
        // The byte order matters where there are walks.
        let matters = if word0.epd0() && word0.epd1() { !ENDI } else { u64::MAX };
        let bits = word0.into_bits();
        (!bits & self.required | bits & self.forbidden) & matters != 0
            || word1.haft() && caps.httu > 2 && !word0.ha()
    }
}

const ENDI: u64 = CdWord0::new().with_endi(true).into_bits();

/// [`context_from_cd`] of the words that matter.
// Inlined with all below it, its answer is not copied from place to place: every miss of a cache comes along here.
#[inline(always)]
pub(super) fn judge(words: [u64; 3], caps: &Caps, rules: &Rules) -> Result<Context, Event> {
    let (word0, word1, word2) =
        (CdWord0::from_bits(words[0]), CdWord1::from_bits(words[1]), CdWord2::from_bits(words[2]));
    if rules.refuse(word0, word1, caps) {
        return Err(Event::CBadCd);
    }
    let shared = SharedFields {
        output_bits: address_bits(word0.ips()).min(caps.oas_bits),
        ds: caps.ds && word2.ds(),
        flags: shared_flags(word0, word1) & rules.flags,
    };
    let mut context = Context {
        asid: word0.asid(),
        big_endian: word0.endi(),
        records: word0.record() || word0.stall(),
        lower: None,
        upper: None,
    };
    if !word0.epd0() {
        let half = HalfFields {
            granule: lower_granule(word0.tg0()),
            size: word0.t0sz(),
            root: word1.ttb0() << 4,
            upper: false,
            flags: half_flags(word0.tbi0(), word1.into_bits()) & rules.flags,
        };
        context.lower = Some(half.judge(shared, caps)?);
    }
    if !word0.epd1() {
        let half = HalfFields {
            granule: upper_granule(word0.tg1()),
            size: word0.t1sz(),
            root: word2.ttb1() << 4,
            upper: true,
            flags: half_flags(word0.tbi1(), word2.into_bits()) & rules.flags,
        };
        context.upper = Some(half.judge(shared, caps)?);
    }
    Ok(context)
}

/// AFFD, WXN, PAN, HD, HA and EPAN, which lie as in [`Vmsav8Flags`], by groups.
#[inline]
fn shared_flags(word0: CdWord0, word1: CdWord1) -> Vmsav8Flags {
    const IN_WORD0: Vmsav8Flags = Vmsav8Flags::AFFD
        .union(Vmsav8Flags::WXN)
        .union(Vmsav8Flags::PAN)
        .union(Vmsav8Flags::HD)
        .union(Vmsav8Flags::HA);
    let in_word0 = word0.into_bits() >> 35 & u64::from(IN_WORD0.bits());
    let in_word1 = word1.into_bits() >> 48 & u64::from(Vmsav8Flags::EPAN.bits());
    flags(in_word0 | in_word1)
}

/// TBIx, and HADx and E0PDx, which lie side by side in the word of the half's table.
#[inline]
fn half_flags(tbi: bool, word: u64) -> Vmsav8Flags {
    const IN_WORD: Vmsav8Flags = Vmsav8Flags::HAD.union(Vmsav8Flags::E0PD);
    flags(u64::from(tbi) << 3 | word << 8 & u64::from(IN_WORD.bits()))
}

#[inline]
fn flags(bits: u64) -> Vmsav8Flags {
    let [low, high, ..] = bits.to_le_bytes();
    Vmsav8Flags::from_bits_truncate(u16::from_le_bytes([low, high]))
}

/// What both halves share.
#[derive(Clone, Copy)]
struct SharedFields {
    output_bits: u8,
    ds: bool,
    flags: Vmsav8Flags,
}

/// What the descriptor says about one half. Where EPDx is set none of it is judged.
struct HalfFields {
    /// `None` where TGx is reserved.
    granule: Option<Granule>,
    size: u8,
    root: u64,
    upper: bool,
    flags: Vmsav8Flags,
}

impl HalfFields {
    #[inline(always)]
    fn judge(self, shared: SharedFields, caps: &Caps) -> Result<Vmsav8, Event> {
        let granule = self.granule.filter(|granule| caps.has_granule(*granule)).ok_or(Event::CBadCd)?;
        let large = matches!(granule, Granule::K64) || shared.ds;
        let largest_size = match (caps.stt, granule) {
            (true, Granule::K4 | Granule::K16) => 48,
            (true, Granule::K64) => 47,
            (false, _) => 39,
        };
        let smallest_size = if large { 64 - caps.input_bits } else { 16 };
        if !(smallest_size..=largest_size).contains(&self.size) {
            return Err(Event::CBadCd);
        }
        let root_bits = if large { shared.output_bits } else { shared.output_bits.min(48) };
        if self.root >> root_bits != 0 {
            return Err(Event::CBadCd);
        }
        let input_lg2 = 64 - self.size;
        let wide = match granule {
            Granule::K64 => caps.oas_bits > 48,
            Granule::K4 | Granule::K16 => shared.ds,
        };
        Vmsav8::new(Vmsav8Params {
            root: Gpa(self.root),
            granule,
            input_lg2,
            output_lg2: root_bits,
            wide,
            upper: self.upper,
            flags: self.flags | shared.flags,
        })
        .ok_or(Event::CBadCd)
    }
}

impl Caps {
    /// Whether tables may use `granule`.
    #[inline]
    pub const fn has_granule(&self, granule: Granule) -> bool {
        match granule {
            Granule::K4 => self.granule_4k,
            Granule::K16 => self.granule_16k,
            Granule::K64 => self.granule_64k,
        }
    }
}

#[inline]
pub(super) const fn lower_granule(tg0: u8) -> Option<Granule> {
    match tg0 {
        0 => Some(Granule::K4),
        1 => Some(Granule::K64),
        2 => Some(Granule::K16),
        _ => None,
    }
}

#[inline]
pub(super) const fn upper_granule(tg1: u8) -> Option<Granule> {
    match tg1 {
        1 => Some(Granule::K16),
        2 => Some(Granule::K4),
        3 => Some(Granule::K64),
        _ => None,
    }
}

/// Apart, so that the walk that everybody uses has the registers to itself.
#[cold]
fn walk_big_endian<M: TableMem>(
    half: &Vmsav8,
    mem: &M,
    iova: Iova,
    access: Access,
) -> Result<Translation, Event> {
    walk(half, &BigEndian(mem), iova, access).map_err(Event::from)
}

/// Memory whose table entries are big-endian.
struct BigEndian<'a, M>(&'a M);

impl<M: TableMem> TableMem for BigEndian<'_, M> {
    fn load(&self, at: Gpa) -> Result<u64, NotMemory> {
        self.0.load(at).map(u64::swap_bytes)
    }

    fn compare_exchange(&self, at: Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, NotMemory> {
        let outcome = self.0.compare_exchange(at, current.swap_bytes(), new.swap_bytes())?;
        Ok(outcome.map(u64::swap_bytes).map_err(u64::swap_bytes))
    }
}
