//! What the hardware remembers: context descriptors by stream, translations by VMID and ASID, device TLBs.
//!
//! Nothing goes from here but by a command, by what the driver does when something is attached, and by age.

use std::collections::{HashMap, HashSet, VecDeque};

use pgtable_formats::context::Context;
use pgtable_formats::{Iova, Translation};

use super::command::{Command, Reach};
use crate::kernel::{DeviceId, ObjectId};

/// So many translations are kept.
const CAPACITY: usize = 4096;

/// All caches of all SMMUs. A VMID is the nest parent that it belongs to.
#[derive(Debug, Default)]
pub(in super::super) struct Tlb {
    /// By stream and SubstreamID.
    cds: HashMap<(DeviceId, u32), CachedCd>,
    /// Level-1 entries of CD tables, by stream and index.
    level1: HashMap<(DeviceId, u32), u64>,
    translations: VecDeque<CachedTranslation>,
    /// By device: what it was told in answer to translation requests.
    device: HashMap<DeviceId, Vec<CachedRequest>>,
    /// Commands that were given once, where each has to be given twice.
    half_done: HashSet<(ObjectId, Command)>,
}

/// A context descriptor.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct CachedCd {
    pub(in super::super) context: Context,
    /// CD.R: faults are recorded.
    pub(in super::super) record: bool,
    /// CD.S: faults stall.
    pub(in super::super) stall: bool,
}

/// A translation of stage 1.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct CachedTranslation {
    pub(in super::super) vmid: ObjectId,
    pub(in super::super) asid: u16,
    pub(in super::super) granule_lg2: u8,
    pub(in super::super) translation: Translation,
}

/// A translation that a device keeps.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct CachedRequest {
    pub(in super::super) pasid: Option<u32>,
    pub(in super::super) translation: Translation,
}

impl Tlb {
    pub(in super::super) fn cd(&self, device: DeviceId, ssid: u32) -> Option<CachedCd> {
        self.cds.get(&(device, ssid)).copied()
    }

    pub(in super::super) fn learn_cd(&mut self, device: DeviceId, ssid: u32, cd: CachedCd) {
        self.cds.insert((device, ssid), cd);
    }

    pub(in super::super) fn level1(&self, device: DeviceId, index: u32) -> Option<u64> {
        self.level1.get(&(device, index)).copied()
    }

    pub(in super::super) fn learn_level1(&mut self, device: DeviceId, index: u32, entry: u64) {
        self.level1.insert((device, index), entry);
    }

    pub(in super::super) fn lookup(&self, vmid: ObjectId, asid: u16, iova: u64) -> Option<Translation> {
        let hit = |entry: &&CachedTranslation| {
            entry.vmid == vmid
                && (entry.asid == asid || entry.translation.global)
                && entry.translation.contains(Iova(iova))
        };
        self.translations.iter().find(hit).map(|entry| entry.translation)
    }

    /// A newer translation of the same addresses takes the place of the older one.
    pub(in super::super) fn learn(&mut self, new: CachedTranslation) {
        self.translations.retain(|old| {
            old.vmid != new.vmid
                || old.asid != new.asid
                || !(old.translation.contains(new.translation.iova)
                    || new.translation.contains(old.translation.iova))
        });
        self.translations.push_back(new);
        if self.translations.len() > CAPACITY {
            self.translations.pop_front();
        }
    }

    pub(in super::super) fn requested(
        &self,
        device: DeviceId,
        pasid: Option<u32>,
        iova: u64,
    ) -> Option<Translation> {
        let kept = self.device.get(&device)?;
        let hit = |entry: &&CachedRequest| entry.pasid == pasid && entry.translation.contains(Iova(iova));
        kept.iter().rev().find(hit).map(|entry| entry.translation)
    }

    pub(in super::super) fn learn_request(&mut self, device: DeviceId, new: CachedRequest) {
        self.device.entry(device).or_default().push(new);
    }

    /// What an SMMU does on CFGI_STE, and its driver to the device TLB.
    pub(in super::super) fn forget_stream(&mut self, device: DeviceId) {
        self.cds.retain(|(of, _), _| *of != device);
        self.level1.retain(|(of, _), _| *of != device);
        self.device.remove(&device);
    }

    pub(in super::super) fn forget_vmid(&mut self, vmid: ObjectId) {
        self.translations.retain(|entry| entry.vmid != vmid);
    }

    /// Stage 2 has changed: what went through it goes.
    pub(in super::super) fn forget_stage2(&mut self, vmid: ObjectId, devices: &[DeviceId]) {
        self.forget_vmid(vmid);
        for device in devices {
            self.device.remove(device);
        }
    }

    /// `repeat`: the first time does nothing.
    pub(in super::super) fn execute(&mut self, vmid: ObjectId, command: Command, repeat: bool) {
        if repeat && command.is_local() && self.half_done.insert((vmid, command)) {
            return;
        }
        self.half_done.remove(&(vmid, command));
        match command {
            Command::All => self.forget_vmid(vmid),
            Command::Asid(asid) => self
                .translations
                .retain(|entry| entry.vmid != vmid || entry.asid != asid || entry.translation.global),
            Command::Address { asid, first, reach } => self.translations.retain(|entry| {
                let of_asid = asid.is_none_or(|asid| entry.asid == asid || entry.translation.global);
                entry.vmid != vmid || !of_asid || !reaches(first, reach, entry)
            }),
            Command::Cd { device, ssid, leaf } => {
                self.cds.remove(&(device, ssid));
                if !leaf {
                    // Which level-1 entry that was depends on the table's format; dropping more is legal.
                    self.level1.retain(|(of, _), _| *of != device);
                }
            }
            Command::AllCds { device } => {
                self.cds.retain(|(of, _), _| *of != device);
                self.level1.retain(|(of, _), _| *of != device);
            }
            Command::Atc { device, ssid, global, first, last } => {
                if let Some(kept) = self.device.get_mut(&device) {
                    kept.retain(|entry| {
                        let start = entry.translation.iova.0;
                        let end = start | ((1 << entry.translation.size_lg2) - 1);
                        let apart = end < first || last < start;
                        apart || !(entry.pasid == ssid || global && entry.pasid.is_some())
                    });
                }
            }
        }
    }
}

/// Whether an invalidation by address has to reach an entry.
fn reaches(first: u64, reach: Reach, entry: &CachedTranslation) -> bool {
    let start = entry.translation.iova.0;
    let end = start | ((1 << entry.translation.size_lg2) - 1);
    match reach {
        Reach::One => entry.translation.contains(Iova(first)),
        Reach::Range { last, granule_lg2, level } => {
            let of_level = level.is_none_or(|level| {
                entry.translation.size_lg2 == (3 - level) * (granule_lg2 - 3) + granule_lg2
            });
            granule_lg2 == entry.granule_lg2 && of_level && start <= last && first <= end
        }
    }
}
