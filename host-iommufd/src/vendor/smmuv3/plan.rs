//! From invalidations to commands.

use std::collections::HashSet;

use pgtable_formats::leaf::vmsav8::Granule;
use pgtable_formats::{IovaRange, Pasid};
use viommu_device::host::{Invalidation, Scope};
use viommu_wire::Caches;

use super::Hardware;
use super::command::{AtcTag, Command};
use super::range::{is_worthwhile, split};
use crate::vendor::block::{Block, blocks};

/// The stream that an invalidation is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// `virt_id` of the vDEVICE.
    pub vsid: u32,
    /// The device may have translations of its own: EATS of the bound entry is 1.
    pub ats: bool,
    /// Bits of a PASID in the bound table (S1CDMax); 0: the stream has no PASIDs.
    pub pasids: u8,
}

impl Target {
    /// Whether the bound table has a descriptor of that number; it always has the first one.
    const fn has(&self, pasid: Pasid) -> bool {
        let bits = if self.pasids > Pasid::BITS { Pasid::BITS } else { self.pasids };
        pasid.value() >> bits == 0
    }
}

/// Commands for one vIOMMU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    configuration: Vec<[u64; 2]>,
    translations: Vec<[u64; 2]>,
    devices: Vec<[u64; 2]>,
    repeat: bool,
}

/// Commands that may run in any order: those of one `IOMMU_HWPT_INVALIDATE`, which ends in a CMD_SYNC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step<'a> {
    /// Never empty.
    pub commands: &'a [[u64; 2]],
    /// To be sent once more when they are done (erratum T264-SMMU-3).
    pub repeat: bool,
}

impl Plan {
    /// What to send, one step after the other: each has to be complete before the next begins. Three only where cached
    /// descriptors of a stream with ATS go; else at most two.
    ///
    /// 1. CFGI. An access that fetched the old descriptor before it may go on to fill the TLB from the old tables,
    ///    until a CMD_SYNC says that there is none any more (IHI 0070, 4.3.8).
    /// 2. TLBI, after which nothing fills the TLB from the old tables. Before it is complete, a device that was told to
    ///    forget a translation would be given it again (IHI 0070, 4.5.1).
    /// 3. ATC_INV.
    pub fn steps(&self) -> impl Iterator<Item = Step<'_>> {
        let Self { configuration, translations, devices, repeat } = self;
        [(configuration, *repeat), (translations, *repeat), (devices, false)]
            .into_iter()
            .filter(|(commands, _)| !commands.is_empty())
            .map(|(commands, repeat)| Step { commands, repeat })
    }
}

/// The commands that `batch`, invalidations of streams of one vIOMMU, comes to. They drop what is asked, or more.
///
/// | asked | TLBI | ATC_INV of a stream with ATS |
/// |---|---|---|
/// | cached descriptors, with CFGI_CD (CFGI_CD_ALL of an endpoint, or of a tag with no PASID) | NH_ALL: a descriptor that changed does not tell its old ASID | all of the PASID |
/// | endpoint or PASID, by tag | NH_ASID | all of the PASID |
/// | endpoint or PASID, by tag and global; or without a tag | NH_ALL | the same; of every PASID if global |
/// | range, by tag | NH_VA | the range |
/// | range, by tag and global; or without a tag | NH_VAA | the same; of every PASID if global |
///
/// TLBI has effect on the whole VMID, which all streams of the guest behind this SMMU share: so that a TLBI is sent once
/// for all streams that need the same, and NH_ALL makes all others needless.
///
/// - A tag by itself, without a PASID, is about all PASIDs that have it; a device's cache knows no tags, so that there
///   it is about all PASIDs.
/// - Untagged accesses may use descriptor 0, and the other way round: what is asked of PASID 0 is done for both.
/// - The page size of a range has to be the granule of the tables: only entries of that granule are sure to be dropped
///   by a command of a range. A page size that is no granule of the SMMU, a range that is too long (2^36 pages by range,
///   without range commands as many as a table has entries), or one that is named by an ignored top byte (TBI) drops the
///   whole tag.
/// - Names that differ in an ignored top byte are different addresses to a device's cache: a guest that uses TBI with
///   ATS has to name those that it used, or all.
pub fn plan(batch: &[(Invalidation, Target)], hardware: &Hardware) -> Plan {
    let mut plan = Plan { repeat: hardware.repeat, ..Plan::default() };
    let mut flushes = HashSet::new();
    let mut pages = Vec::new();
    for (invalidation, target) in batch {
        plan.configuration.extend(configuration(invalidation, target).map(Command::words));
        let flush = Flush::of(invalidation, hardware);
        if flushes.insert(flush) {
            flush.expand(hardware, &mut pages);
        }
        if target.ats && hardware.ats {
            devices(invalidation, target, hardware, &mut plan.devices);
        }
    }
    plan.translations = if flushes.contains(&Flush::All) { vec![Command::NhAll.words()] } else { pages };
    plan
}

/// The commands that drop all that is cached of `targets`, streams of one vIOMMU.
pub fn everything(targets: &[Target], hardware: &Hardware) -> Plan {
    let mut plan = Plan { repeat: hardware.repeat, ..Plan::default() };
    if targets.is_empty() {
        return plan;
    }
    plan.translations.push(Command::NhAll.words());
    for target in targets {
        plan.configuration.push(Command::CfgiCdAll { vsid: target.vsid }.words());
        if target.ats && hardware.ats {
            every_pasid(target, Block::ALL, &mut plan.devices);
        }
    }
    plan
}

/// CFGI: the cached descriptors that an invalidation is about.
fn configuration(invalidation: &Invalidation, target: &Target) -> Option<Command> {
    if !invalidation.caches.contains(Caches::PASID) {
        return None;
    }
    let vsid = target.vsid;
    let all = Command::CfgiCdAll { vsid };
    let pasid = match (pasid(invalidation.scope), invalidation.tag) {
        (Of::Endpoint, _) | (Of::Untagged, Some(_)) => return Some(all),
        (Of::Untagged, None) => Pasid::ZERO,
        (Of::Pasid(pasid), _) => pasid,
    };
    // A number that the SMMU does not have may stand for another there (IHI 0070, 4.1.7).
    Some(if target.has(pasid) { Command::CfgiCd { vsid, pasid } } else { all })
}

/// What the TLB drops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Flush {
    All,
    Asid(u16),
    Pages { asid: Option<u16>, range: IovaRange, granule: Granule, leaf: bool },
}

impl Flush {
    fn of(invalidation: &Invalidation, hardware: &Hardware) -> Self {
        if invalidation.caches.contains(Caches::PASID) {
            return Self::All;
        }
        let caps = &hardware.caps;
        // No translation has a tag that the SMMU cannot hold, and the kernel refuses it.
        let asid = invalidation.tag.filter(|asid| !invalidation.global && (caps.asid16 || *asid <= 0xff));
        let whole = asid.map_or(Self::All, Self::Asid);
        let Scope::Range { range, page_lg2, .. } = invalidation.scope else { return whole };
        let granule = match page_lg2 {
            12 if caps.granule_4k => Granule::K4,
            14 if caps.granule_16k => Granule::K16,
            16 if caps.granule_64k => Granule::K64,
            _ => return whole,
        };
        if !is_canonical(range, hardware) || !is_worthwhile(range, granule, hardware.range_invalidation) {
            return whole;
        }
        Self::Pages { asid, range, granule, leaf: invalidation.leaf }
    }

    fn expand(self, hardware: &Hardware, commands: &mut Vec<[u64; 2]>) {
        match self {
            Self::All => commands.push(Command::NhAll.words()),
            Self::Asid(asid) => commands.push(Command::NhAsid { asid }.words()),
            Self::Pages { asid, range, granule, leaf } => {
                let pages = split(range, granule, hardware.range_invalidation);
                commands.extend(pages.into_iter().map(|pages| Command::NhVa { asid, pages, leaf }.words()));
            }
        }
    }
}

/// ATC_INV: what the device itself drops.
fn devices(invalidation: &Invalidation, target: &Target, hardware: &Hardware, commands: &mut Vec<[u64; 2]>) {
    match invalidation.scope {
        Scope::Range { range, .. }
            if !invalidation.caches.contains(Caches::PASID) && is_canonical(range, hardware) =>
        {
            for block in blocks(range, hardware.smallest_page_lg2()) {
                device_block(invalidation, target, block, commands);
            }
        }
        _ => device_block(invalidation, target, Block::ALL, commands),
    }
}

fn device_block(invalidation: &Invalidation, target: &Target, block: Block, commands: &mut Vec<[u64; 2]>) {
    let vsid = target.vsid;
    let mut push = |tag| commands.push(Command::AtcInv { vsid, tag, block }.words());
    match pasid(invalidation.scope) {
        Of::Untagged if invalidation.tag.is_none() && !invalidation.global => push(AtcTag::Untagged),
        Of::Pasid(pasid) if !invalidation.global && target.has(pasid) => {
            if pasid == Pasid::ZERO {
                push(AtcTag::Untagged);
            }
            if target.pasids != 0 {
                push(AtcTag::Pasid(pasid));
            }
        }
        Of::Endpoint | Of::Untagged | Of::Pasid(_) => every_pasid(target, block, commands),
    }
}

/// A request with the global flag is about all PASIDs but, by the letter, not about untagged translations. A device
/// without PASIDs may fail one with a PASID.
fn every_pasid(target: &Target, block: Block, commands: &mut Vec<[u64; 2]>) {
    let vsid = target.vsid;
    commands.push(Command::AtcInv { vsid, tag: AtcTag::Untagged, block }.words());
    if target.pasids != 0 {
        commands.push(Command::AtcInv { vsid, tag: AtcTag::EveryPasid, block }.words());
    }
}

/// Whose entries.
enum Of {
    Endpoint,
    Untagged,
    Pasid(Pasid),
}

const fn pasid(scope: Scope) -> Of {
    match scope {
        Scope::Endpoint => Of::Endpoint,
        Scope::Pasid(None) | Scope::Range { pasid: None, .. } => Of::Untagged,
        Scope::Pasid(Some(pasid)) | Scope::Range { pasid: Some(pasid), .. } => Of::Pasid(pasid),
    }
}

/// Whether both ends are addresses that tables translate. By any other the SMMU may find nothing (IHI 0070, 4.4.2).
fn is_canonical(range: IovaRange, hardware: &Hardware) -> bool {
    let bits = hardware.caps.input_bits;
    [range.start(), range.last()].iter().all(|end| end.0 >> bits == 0 || !end.0 >> bits == 0)
}
