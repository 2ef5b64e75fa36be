//! Commands (IHI 0070, 4), as Linux 7.3.4 lets them through to the SMMU's queue.

use nix::errno::Errno;

use super::super::units::FakeSmmuv3;
use crate::kernel::DeviceId;

/// A command that was let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in super::super) enum Command {
    /// TLBI_NH_ALL, and TLBI_NSNH_ALL, which is rewritten to it.
    All,
    /// TLBI_NH_ASID.
    Asid(u16),
    /// TLBI_NH_VA, or TLBI_NH_VAA where there is no ASID.
    Address { asid: Option<u16>, first: u64, reach: Reach },
    /// CFGI_CD.
    Cd { device: DeviceId, ssid: u32, leaf: bool },
    /// CFGI_CD_ALL.
    AllCds { device: DeviceId },
    /// ATC_INV. `ssid` of `None`: accesses without a PASID; `global`: all PASIDs.
    Atc { device: DeviceId, ssid: Option<u32>, global: bool, first: u64, last: u64 },
}

/// What an invalidation by address reaches from its address on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in super::super) enum Reach {
    /// What holds the address.
    One,
    /// `..=last`, of translations with pages of this size, and of that level where one is named.
    Range { last: u64, granule_lg2: u8, level: Option<u8> },
}

impl Command {
    /// Whether it is about the SMMU's own caches: TLBI and CFGI.
    pub(in super::super) fn is_local(&self) -> bool {
        !matches!(self, Self::Atc { .. })
    }

    pub(in super::super) fn is_tlbi(&self) -> bool {
        matches!(self, Self::All | Self::Asid(_) | Self::Address { .. })
    }
}

const OPCODE: u64 = 0xff;
const GLOBAL: u64 = 1 << 9;
const SSV: u64 = 1 << 11;
const NUM: u64 = 0x1f << 12;
const SSID: u64 = 0xf_ffff << 12;
const SCALE: u64 = 0x3f << 20;
const VMID: u64 = 0xffff << 32;
const SID: u64 = 0xffff_ffff << 32;
const ASID: u64 = 0xffff << 48;

const LEAF: u64 = 1;
const SIZE: u64 = 0x3f;
const TTL: u64 = 3 << 8;
const TG: u64 = 3 << 10;
const ADDRESS: u64 = !0xfff;

/// Checks one command. `device` finds the device of a vSID. `strict`: field by field, as from 7.3.4 on.
pub(in super::super) fn decode(
    words: [u64; 2],
    smmu: &FakeSmmuv3,
    strict: bool,
    device: impl Fn(u64) -> Option<DeviceId>,
) -> Result<Command, Errno> {
    let [word0, word1] = words;
    let opcode = word0 & OPCODE;
    let (allowed0, allowed1) = allowed(opcode, smmu).ok_or(Errno::EIO)?;
    let is_clean = word0 & !allowed0 == 0 && word1 & !allowed1 == 0;
    let asid = (word0 >> 48) as u16;
    if strict && !(is_clean && (asid >> 8 == 0 || smmu.caps().asid16)) {
        return Err(Errno::EIO);
    }
    let stream = || device(word0 >> 32).ok_or(Errno::EIO);
    let ssid = (word0 >> 12 & 0xf_ffff) as u32;
    Ok(match opcode {
        0x10 | 0x30 => Command::All,
        0x11 => Command::Asid(asid),
        0x12 | 0x13 => {
            let first = word1 & ADDRESS;
            let reach = reach(word0, word1, smmu, strict)?;
            Command::Address { asid: (opcode == 0x12).then_some(asid), first, reach }
        }
        0x05 => Command::Cd { device: stream()?, ssid, leaf: word1 & LEAF != 0 },
        0x06 => Command::AllCds { device: stream()? },
        0x40 => {
            let device = stream()?;
            let size = word1 & SIZE;
            if size > 52 {
                return Err(Errno::EIO);
            }
            let span =
                4096_u64.checked_shl(size as u32).filter(|_| size < 52).map_or(u64::MAX, |bytes| bytes - 1);
            let first = word1 & ADDRESS & !span;
            let ssid = (word0 & SSV != 0).then_some(ssid);
            Command::Atc { device, ssid, global: word0 & GLOBAL != 0, first, last: first | span }
        }
        _ => return Err(Errno::EIO),
    })
}

/// The fields of a command, by word; `None` for one that is refused whatever it holds.
fn allowed(opcode: u64, smmu: &FakeSmmuv3) -> Option<(u64, u64)> {
    let ranges = if smmu.idr3().ril() { (NUM | SCALE, TG | TTL) } else { (0, 0) };
    let has_substreams = smmu.caps().ssid_bits != 0;
    let substream = |fields| if has_substreams { fields } else { 0 };
    let (word0, word1) = match opcode {
        0x30 => (0, 0),
        0x10 => (VMID, 0),
        0x11 => (ASID | VMID, 0),
        0x12 => (ASID | VMID | ranges.0, LEAF | ADDRESS | ranges.1),
        0x13 => (VMID | ranges.0, LEAF | ADDRESS | ranges.1),
        0x40 if smmu.idr0().ats() => (SID | substream(SSV | SSID | GLOBAL), SIZE | ADDRESS),
        0x05 => (SID | substream(SSID), LEAF),
        0x06 => (SID, 0),
        _ => return None,
    };
    Some((OPCODE | word0, word1))
}

/// NUM, SCALE, TG and TTL together.
fn reach(word0: u64, word1: u64, smmu: &FakeSmmuv3, strict: bool) -> Result<Reach, Errno> {
    let (num, scale) = (word0 >> 12 & 0x1f, word0 >> 20 & 0x3f);
    let (ttl, tg) = (word1 >> 8 & 3, word1 >> 10 & 3);
    let (ds, caps) = (smmu.idr5().ds(), smmu.caps());
    let (granule_lg2, known): (u8, bool) = match tg {
        0 if strict && (num, scale, ttl) != (0, 0, 0) => return Err(Errno::EIO),
        0 => return Ok(Reach::One),
        1 => (12, caps.granule_4k),
        2 => (14, caps.granule_16k),
        _ => (16, caps.granule_64k),
    };
    let wrong = !known || (num, scale, ttl) == (0, 0, 0) || tg == 2 && ttl == 1 && !ds || scale > 0x1f && !ds;
    if strict && wrong {
        return Err(Errno::EIO);
    }
    let bytes = u128::from(num + 1) << (scale + u64::from(granule_lg2));
    let last = u128::from(word1 & ADDRESS) + bytes - 1;
    let level = u8::try_from(ttl).ok().filter(|level| *level != 0);
    let last = u64::try_from(last).unwrap_or(u64::MAX);
    Ok(Reach::Range { last, granule_lg2, level })
}
