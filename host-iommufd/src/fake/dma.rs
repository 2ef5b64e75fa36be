//! One access of a device, through all that is attached.

use std::cell::Cell;

use pgtable_formats::{Access, AccessKind, Fault, FaultClass, Gpa, Iova, NotMemory, Pasid, TableMem};

use super::FakeIommufd;
use super::graph::{Attachment, Hwpt, HwptKind, State};
use super::ioas::Ioas;
use super::memory::Memory;
use super::page_requests::Wanted;
use super::smmuv3::{Failure, Stage1, is_forwarded, record};
use super::units::Unit;
use super::vtd::FirstStageRoot;
use crate::kernel::{Backing, DeviceId, HwptFlags, ObjectId};

/// Why an access of a device did not reach memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DmaFault {
    /// Nothing is attached for it, or what is attached aborts.
    #[error("blocked")]
    Blocked,
    /// The IOAS has no mapping there.
    #[error("not mapped in the IOAS")]
    Unmapped,
    /// The mapping of the IOAS does not permit it.
    #[error("not permitted by the mapping in the IOAS")]
    Permission,
    /// The guest's own table says so.
    #[error("stage 1: {0}")]
    Stage1(Fault),
    /// Stage 2 has nothing there, or does not permit it: where stage 1 led to, or where it has a table.
    #[error("stage 2 at {0}")]
    Stage2(Gpa),
    /// It waits for an answer: the device has asked for the page.
    #[error("stalled")]
    Stalled,
}

impl<M: Memory> FakeIommufd<M> {
    /// Where in the process an access of a device leads.
    ///
    /// A device with page requests (PCIe PRI) asks for what a guest's table with a fault queue does not permit, and one
    /// that may stall so does where the guest says so: then the answer is [`DmaFault::Stalled`], and so it is for the
    /// same access until somebody has answered the request. After INVALID it fails once; after success it is done.
    ///
    /// # Errors
    /// Why it leads nowhere. The guest's event queue or [`take_host_faults`](Self::take_host_faults) has it as well.
    pub fn dma(
        &self,
        device: DeviceId,
        pasid: Option<Pasid>,
        iova: u64,
        access: Access,
    ) -> Result<Backing, DmaFault> {
        let state = &mut *self.state();
        // What was answered is seen whatever is attached since.
        state.waited(Asked { device, pasid, iova, access }.wanted())?;
        let (attachment, hwpt, ioas) = state.reach(device, pasid)?;
        match state.stage1(&self.memory, device, pasid, (iova, access), &attachment, &hwpt) {
            Ok(stage1) => state
                .stage2(ioas, &hwpt, stage1, access.kind)
                .inspect_err(|&fault| state.host_faults.push((device, fault))),
            Err(fault) => Err(fault),
        }
    }

    /// The same, as the guest-physical address of that memory.
    ///
    /// # Errors
    /// As [`dma`](Self::dma).
    pub fn dma_gpa(
        &self,
        device: DeviceId,
        pasid: Option<Pasid>,
        iova: u64,
        access: Access,
    ) -> Result<Option<Gpa>, DmaFault> {
        self.dma(device, pasid, iova, access).map(|at| self.memory.gpa(at))
    }

    /// The device sends an interrupt: a write to the doorbell, which the guest's stage 1 has to map where one is
    /// attached (Arm). On x86, interrupts go another way.
    ///
    /// # Errors
    /// Why it does not arrive.
    pub fn interrupt(&self, device: DeviceId) -> Result<(), DmaFault> {
        let state = &mut *self.state();
        let (attachment, hwpt, _) = state.reach(device, None)?;
        let Some(window) = state.unit(hwpt.unit).interrupts() else { return Ok(()) };
        if !matches!(hwpt.kind, HwptKind::Smmuv3 { .. }) {
            return Ok(());
        }
        let doorbell = window.start().0 + 0x40;
        match state.stage1(&self.memory, device, None, (doorbell, Access::WRITE), &attachment, &hwpt)? {
            Stage1Output::Guest(at) if window.contains(Iova(at.0)) => Ok(()),
            Stage1Output::Guest(at) => Err(DmaFault::Stage2(at)),
            Stage1Output::None(_) => Ok(()),
        }
    }
}

/// What the first stage made of an address.
#[derive(Clone, Copy)]
enum Stage1Output {
    /// There is none: the address as it came.
    None(u64),
    Guest(Gpa),
}

impl State {
    /// What serves an access: what its PASID is attached to, or on Arm the nested table of the stream.
    fn reach(
        &self,
        device: DeviceId,
        pasid: Option<Pasid>,
    ) -> Result<(Attachment, Hwpt, ObjectId), DmaFault> {
        let found = |pasid: Option<u32>| {
            let attachment = *self.attachments.get(&(device, pasid))?;
            let hwpt = self.hwpt(attachment.table).ok()?;
            let (_, ioas) = self.paging(attachment.table).ok()?;
            Some((attachment, hwpt, ioas))
        };
        let stream = || found(None).filter(|(_, hwpt, _)| matches!(hwpt.kind, HwptKind::Smmuv3 { .. }));
        found(pasid.map(Pasid::value)).or_else(stream).ok_or(DmaFault::Blocked)
    }

    fn stage1<M: Memory>(
        &mut self,
        memory: &M,
        device: DeviceId,
        pasid: Option<Pasid>,
        (iova, access): (u64, Access),
        attachment: &Attachment,
        hwpt: &Hwpt,
    ) -> Result<Stage1Output, DmaFault> {
        let asked = Asked { device, pasid, iova, access };
        match (hwpt.kind, *self.unit(hwpt.unit)) {
            (HwptKind::Smmuv3 { viommu, ste }, Unit::Smmuv3(smmu)) => {
                let (_, parent) = self.viommu(viommu).map_err(|_| DmaFault::Blocked)?;
                let stage1 = Stage1 { smmu: &smmu, device, vmid: parent, ste, ats: self.ats(device) };
                self.smmuv3(memory, &asked, &stage1, attachment).map(Stage1Output::Guest)
            }
            (HwptKind::Vtd { root, .. }, Unit::Vtd(vtd)) => {
                self.vtd(memory, &asked, root, attachment, &vtd).map(Stage1Output::Guest)
            }
            _ => Ok(Stage1Output::None(iova)),
        }
    }

    fn smmuv3<M: Memory>(
        &mut self,
        memory: &M,
        asked: &Asked,
        stage1: &Stage1<'_>,
        attachment: &Attachment,
    ) -> Result<Gpa, DmaFault> {
        // Out of the state, which the memory is read through meanwhile.
        let mut tlb = std::mem::take(&mut self.smmu_tlb);
        let translated = self.through(memory, attachment).map(|through| {
            let translated = stage1.translate(&through, &mut tlb, asked.pasid, asked.iova, asked.access);
            (translated, through.missed.get())
        });
        self.smmu_tlb = tlb;
        let Ok((translated, missed)) = translated else { return Err(DmaFault::Blocked) };
        let (event, told, stall) = match translated {
            Ok(output) => return Ok(output),
            Err(Failure::Abort) => return Err(DmaFault::Blocked),
            Err(Failure::Event { event, record, stall }) => (event, record, stall),
        };
        if let Some(at) = missed {
            // The second stage's fault, whatever the first one was about: only the host hears of it.
            self.host_faults.push((asked.device, DmaFault::Stage2(at)));
            return Err(DmaFault::Stage2(at));
        }
        let fault = DmaFault::Stage1(Fault::Smmuv3(event));
        if stall {
            return Err(self.stall(asked, fault));
        }
        let pasid = asked.pasid.map(Pasid::value);
        let forwarded = told
            && is_forwarded(event)
            && attachment.virtual_id.is_some_and(|(viommu, id)| {
                self.tell(viommu, record(event, id, pasid, asked.iova, asked.access))
            });
        if told && !forwarded {
            self.host_faults.push((asked.device, fault));
        }
        Err(fault)
    }

    /// The access waits, and its page request goes where the table says.
    fn stall(&mut self, asked: &Asked, fault: DmaFault) -> DmaFault {
        if !self.devices.get(&asked.device).is_some_and(|device| device.stall) {
            // The driver warns, and nobody ever answers.
            self.violations.push(format!("{:?} stalls, which it cannot", asked.device));
            return DmaFault::Stalled;
        }
        match self.wait_for_page(asked.wanted(), fault) {
            Err(waits) => waits,
            // Aborted by the kernel at once.
            Ok(()) => fault,
        }
    }

    fn vtd<M: Memory>(
        &mut self,
        memory: &M,
        asked: &Asked,
        root: FirstStageRoot,
        attachment: &Attachment,
        vtd: &super::units::FakeVtd,
    ) -> Result<Gpa, DmaFault> {
        let pasid = asked.pasid.map(Pasid::value);
        if let Some(cached) = self.vtd_tlb.lookup(asked.device, pasid, asked.iova)
            && cached.perms.allow(asked.access)
        {
            return Ok(cached.apply(Iova(asked.iova)));
        }
        let Ok(through) = self.through(memory, attachment) else { return Err(DmaFault::Blocked) };
        let walked = root.translate(vtd, &through, asked.iova, asked.access);
        let missed = through.missed.get();
        match walked {
            Ok(translation) => {
                self.vtd_tlb.learn(asked.device, pasid, translation);
                Ok(translation.apply(Iova(asked.iova)))
            }
            Err(reason) => {
                let stage1 = DmaFault::Stage1(Fault::Vtd(reason));
                let fault = missed.map_or(stage1, DmaFault::Stage2);
                let is_missing = matches!(reason.class(), FaultClass::NotMapped | FaultClass::Permission);
                let has_pri = self.devices.get(&asked.device).is_some_and(|device| device.pri);
                if is_missing && missed.is_none() && has_pri {
                    self.wait_for_page(asked.wanted(), fault)?;
                }
                // User space hears of none of them.
                self.host_faults.push((asked.device, fault));
                Err(fault)
            }
        }
    }

    /// The guest's memory as the tables of an attachment are read.
    fn through<'a, M>(
        &'a self,
        memory: &'a M,
        attachment: &Attachment,
    ) -> Result<Through<'a, M>, nix::errno::Errno> {
        let (_, ioas) = self.paging(attachment.table)?;
        Ok(Through { ioas: self.ioas(ioas)?, memory, missed: Cell::new(None) })
    }

    /// The second stage, or the only one.
    fn stage2(
        &self,
        ioas: ObjectId,
        hwpt: &Hwpt,
        input: Stage1Output,
        kind: AccessKind,
    ) -> Result<Backing, DmaFault> {
        let unit = self.unit(hwpt.unit);
        let (address, missing, denied) = match input {
            Stage1Output::None(iova) => (iova, DmaFault::Unmapped, DmaFault::Permission),
            Stage1Output::Guest(at) => (at.0, DmaFault::Stage2(at), DmaFault::Stage2(at)),
        };
        let ioas = self.ioas(ioas).map_err(|_| DmaFault::Blocked)?;
        let (at, mut permits) = ioas.lookup(address).ok_or(missing)?;
        let is_stage2 = match hwpt.kind {
            HwptKind::Paging { .. } => hwpt.flags.contains(HwptFlags::NEST_PARENT),
            HwptKind::Smmuv3 { .. } | HwptKind::Vtd { .. } => true,
        };
        // Erratum 772415: a nest parent makes everything writable.
        permits.write |= is_stage2 && matches!(unit, Unit::Vtd(_));
        permits.read |= !is_stage2 && permits.write && !unit.has_write_only();
        if permits.allow(kind) { Ok(at) } else { Err(denied) }
    }
}

/// An access.
struct Asked {
    device: DeviceId,
    pasid: Option<Pasid>,
    iova: u64,
    access: Access,
}

impl Asked {
    fn wanted(&self) -> Wanted {
        let kind = match self.access.kind {
            AccessKind::Read => 1,
            AccessKind::Write => 2,
            AccessKind::Execute => 5,
        };
        Wanted {
            device: self.device,
            pasid: self.pasid.map(Pasid::value),
            page: self.iova & !0xfff,
            permissions: kind | u32::from(self.access.privileged) << 3,
        }
    }
}

/// Guest memory through an IOAS.
struct Through<'a, M> {
    ioas: &'a Ioas,
    memory: &'a M,
    /// The first address that was not there.
    missed: Cell<Option<Gpa>>,
}

impl<M: Memory> Through<'_, M> {
    fn find(&self, at: Gpa, kind: AccessKind) -> Result<Gpa, NotMemory> {
        let mapped = self.ioas.lookup(at.0).filter(|(_, permits)| permits.allow(kind));
        let found = mapped.and_then(|(place, _)| self.memory.gpa(place));
        if found.is_none() && self.missed.get().is_none() {
            self.missed.set(Some(at));
        }
        found.ok_or(NotMemory)
    }
}

impl<M: Memory> TableMem for Through<'_, M> {
    fn load(&self, at: Gpa) -> Result<u64, NotMemory> {
        self.memory.load(self.find(at, AccessKind::Read)?)
    }

    fn compare_exchange(&self, at: Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, NotMemory> {
        self.memory.compare_exchange(self.find(at, AccessKind::Write)?, current, new)
    }
}
