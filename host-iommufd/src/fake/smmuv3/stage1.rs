//! The first stage of one access: context descriptor, TLB, walk.

use std::cell::Cell;

use pgtable_formats::context::smmuv3::{CdTable, Event, TableFormat};
use pgtable_formats::context::{self, Context};
use pgtable_formats::leaf::vmsav8::Granule;
use pgtable_formats::{Access, Gpa, Iova, NotMemory, Pasid, TableMem, Translation};

use super::super::units::FakeSmmuv3;
use super::ste::{Config, Ste};
use super::tlb::{CachedCd, CachedRequest, CachedTranslation, Tlb};
use crate::kernel::{DeviceId, ObjectId};

/// What the first stage needs to know of an access, beside its address.
#[derive(Clone, Copy)]
pub(in super::super) struct Stage1<'a> {
    pub(in super::super) smmu: &'a FakeSmmuv3,
    pub(in super::super) device: DeviceId,
    pub(in super::super) vmid: ObjectId,
    pub(in super::super) ste: Ste,
    /// The device and the SMMU have ATS; the entry decides.
    pub(in super::super) ats: bool,
}

/// Why the first stage did not come to an end.
#[derive(Clone, Copy, Debug)]
pub(in super::super) enum Failure {
    /// The entry aborts, and tells nobody.
    Abort,
    /// With this event. `record`: it is told. `stall`: the access waits for an answer.
    Event { event: Event, record: bool, stall: bool },
}

impl Failure {
    fn told(event: Event) -> Self {
        Self::Event { event, record: true, stall: false }
    }
}

impl Stage1<'_> {
    /// The guest-physical address. `memory` is the guest's, through stage 2.
    pub(in super::super) fn translate<M: TableMem>(
        &self,
        memory: &M,
        tlb: &mut Tlb,
        pasid: Option<Pasid>,
        iova: u64,
        access: Access,
    ) -> Result<Gpa, Failure> {
        match self.ste.config() {
            Config::Abort => return Err(Failure::Abort),
            Config::Bypass if pasid.is_some() => return Err(Failure::told(Event::CBadSubstreamid)),
            Config::Bypass => return Ok(Gpa(iova)),
            Config::Stage1 => {}
        }
        let number = pasid.map(Pasid::value);
        let ats = self.ats && self.ste.eats();
        if ats
            && let Some(kept) = tlb.requested(self.device, number, iova)
            && kept.perms.allow(access)
        {
            return Ok(kept.apply(Iova(iova)));
        }
        let translated = self.through_tables(memory, tlb, pasid, iova, access);
        if !ats {
            return translated.map(|translation| translation.apply(Iova(iova)));
        }
        match translated {
            Ok(translation) => {
                tlb.learn_request(self.device, CachedRequest { pasid: number, translation });
                Ok(translation.apply(Iova(iova)))
            }
            // Faults of translation requests are not recorded.
            Err(Failure::Event { event, .. }) => Err(Failure::Event { event, record: false, stall: false }),
            Err(Failure::Abort) => Err(Failure::Abort),
        }
    }

    fn through_tables<M: TableMem>(
        &self,
        memory: &M,
        tlb: &mut Tlb,
        pasid: Option<Pasid>,
        iova: u64,
        access: Access,
    ) -> Result<Translation, Failure> {
        let table = self.ste.table(self.smmu).ok_or(Failure::told(Event::CBadSte))?;
        let cd = self.fetch(&table, memory, tlb, pasid)?;
        let stage1 = match cd.context {
            Context::Stage1(stage1) => stage1,
            Context::Bypass => return Ok(identity(iova)),
        };
        let asid = stage1.tag().unwrap_or(0);
        if let Some(cached) = tlb.lookup(self.vmid, asid, iova)
            && cached.perms.allow(access)
        {
            return Ok(cached);
        }
        let walked = match stage1 {
            context::Stage1::Smmuv3(context) => context.walk(memory, Iova(iova), access),
            context::Stage1::Vtd(_) => Err(Event::CBadCd),
        };
        let translation =
            walked.map_err(|event| Failure::Event { event, record: cd.record, stall: cd.stall })?;
        let granule_lg2 = granule_lg2(&stage1, iova);
        tlb.learn(CachedTranslation { vmid: self.vmid, asid, granule_lg2, translation });
        Ok(translation)
    }

    /// From the cache where it is there, else from the table; each level is cached for itself.
    fn fetch<M: TableMem>(
        &self,
        table: &CdTable,
        memory: &M,
        tlb: &mut Tlb,
        pasid: Option<Pasid>,
    ) -> Result<CachedCd, Failure> {
        let effective = table.effective_pasid(pasid).map(Pasid::value);
        if let Some(cached) = effective.and_then(|ssid| tlb.cd(self.device, ssid)) {
            return Ok(cached);
        }
        let index = effective.unwrap_or(0) >> table.format().leaf_bits().unwrap_or(0);
        let reader = CdReader {
            memory,
            table,
            known: tlb.level1(self.device, index),
            level1: Cell::new(None),
            word0: Cell::new(None),
        };
        let found = table.lookup(&reader, pasid);
        if let Some(entry) = reader.level1.get() {
            tlb.learn_level1(self.device, index, entry);
        }
        let context = found.map_err(Failure::told)?;
        let word0 = reader.word0.get().unwrap_or(0);
        let cd = CachedCd { context, record: word0 >> 45 & 1 != 0, stall: word0 >> 44 & 1 != 0 };
        if let Some(ssid) = effective {
            tlb.learn_cd(self.device, ssid, cd);
        }
        Ok(cd)
    }
}

/// Stage 1 bypassed for one page (STE.S1DSS = 1).
fn identity(iova: u64) -> Translation {
    let page = iova & !0xfff;
    let perms = pgtable_formats::Perms::all();
    Translation { iova: Iova(page), output: Gpa(page), size_lg2: 12, perms, global: false }
}

fn granule_lg2(stage1: &context::Stage1, iova: u64) -> u8 {
    let granule = match stage1 {
        context::Stage1::Smmuv3(context) => context.half(Iova(iova)).map(|half| half.params().granule),
        context::Stage1::Vtd(_) => None,
    };
    match granule {
        Some(Granule::K64) => 16,
        Some(Granule::K16) => 14,
        Some(Granule::K4) | None => 12,
    }
}

/// Memory that knows level-1 entries of a CD table that were read before, and keeps what the lookup does not tell.
struct CdReader<'a, M> {
    memory: &'a M,
    table: &'a CdTable,
    known: Option<u64>,
    level1: Cell<Option<u64>>,
    word0: Cell<Option<u64>>,
}

impl<M: TableMem> TableMem for CdReader<'_, M> {
    fn load(&self, at: Gpa) -> Result<u64, NotMemory> {
        let (base, bytes) = self.table.extents();
        let in_level1 = at.0.checked_sub(base.0).is_some_and(|offset| offset < bytes);
        if in_level1 && self.table.format() != TableFormat::Linear && self.word0.get().is_none() {
            if let Some(known) = self.known {
                return Ok(known);
            }
            let entry = self.memory.load(at)?;
            self.level1.set((entry & 1 != 0).then_some(entry));
            return Ok(entry);
        }
        let word = self.memory.load(at)?;
        if self.word0.get().is_none() {
            self.word0.set(Some(word));
        }
        Ok(word)
    }

    fn compare_exchange(&self, at: Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, NotMemory> {
        self.memory.compare_exchange(at, current, new)
    }
}
