//! One physical IOMMU, as far as a guest's endpoints behind it share it: bypass, abort, and where guests' tables go.

use std::sync::Arc;

use nix::errno::Errno;
use pgtable_formats::context::Canonical;
use pgtable_formats::context::smmuv3::Ste1;
use viommu_device::host::HostError;
use viommu_wire::EndpointId;

use crate::endpoint::Facts;
use crate::error::{SetupError, Step, host_error, is_absent};
use crate::kernel::{Commands, DeviceId, HwptData, HwptFlags, Iommufd, ViommuKind};
use crate::objects::{EventQueue, FaultQueue, Hwpt, Ioas, Session, Vdevice, Viommu};
use crate::vendor::{smmuv3, vtd};

/// Events that the kernel keeps of one SMMU until they are read. Further ones are lost, and counted.
pub const EVENT_QUEUE_DEPTH: u32 = 1024;

/// Commands that the kernel hands to an SMMU at once. Where a longer array fails, whole batches of it were issued.
pub const SMMUV3_BATCH: usize = 63;

/// What tells units apart, those that are gone included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct UnitId(pub(crate) u64);

/// See the [module](self).
pub(crate) struct Unit<K: Iommufd> {
    pub(crate) id: UnitId,
    /// What reaches all guest memory, at its guest-physical addresses.
    pub(crate) bypass: Arc<Hwpt<K>>,
    /// What reaches nothing: a device is never attached to nothing.
    pub(crate) abort: Arc<Hwpt<K>>,
    /// PASIDs are attached one by one, so that every table has the flag for that.
    pub(crate) pasids: bool,
    pub(crate) kind: Kind<K>,
}

/// What a unit does with guests' tables.
pub(crate) enum Kind<K: Iommufd> {
    /// It walks them.
    Smmuv3(Smmuv3<K>),
    /// It walks them. [`Unit::bypass`] is their nest parent.
    Vtd,
    /// Nothing.
    Paging,
}

/// The guest's slice of an SMMUv3.
pub(crate) struct Smmuv3<K: Iommufd> {
    viommu: Arc<Viommu<K>>,
    /// `None` where the kernel has no such queues.
    pub(crate) events: Option<EventQueue<K>>,
    pub(crate) hardware: smmuv3::Hardware,
}

/// A guest's table, ready to be attached.
pub(crate) struct Table<K: Iommufd> {
    pub(crate) hwpt: Arc<Hwpt<K>>,
    /// The device may cache translations of it.
    pub(crate) ats: bool,
    /// Width of its PASIDs in bits, where it is a table of all of them.
    pub(crate) pasid_bits: Option<u8>,
}

impl<K: Iommufd> Clone for Table<K> {
    fn clone(&self) -> Self {
        Self { hwpt: Arc::clone(&self.hwpt), ats: self.ats, pasid_bits: self.pasid_bits }
    }
}

/// A unit, and what one device is called there.
pub(crate) struct Place<K: Iommufd> {
    pub(crate) unit: Arc<Unit<K>>,
    /// Of an SMMUv3 whose tables the device may use.
    pub(crate) vdevice: Option<Vdevice<K>>,
}

impl<K: Iommufd> Place<K> {
    pub(crate) fn new(unit: Unit<K>, vdevice: Option<Vdevice<K>>) -> Self {
        Self { unit: Arc::new(unit), vdevice }
    }
}

/// Where a unit is made: everything that it has in common with the others of its host.
pub(crate) struct Site<'a, K: Iommufd> {
    pub(crate) id: UnitId,
    pub(crate) session: &'a Arc<Session<K>>,
    /// All of guest memory.
    pub(crate) memory: &'a Arc<Ioas<K>>,
    /// One device behind the unit.
    pub(crate) device: DeviceId,
}

impl<K: Iommufd> Site<'_, K> {
    /// A vIOMMU and what the device is called there, for `name`. `None` where kernel or hardware does not nest, or not
    /// for this device.
    pub(crate) fn smmuv3(
        &self,
        name: EndpointId,
        flags: u32,
        idr: &[u32; 6],
    ) -> Result<Option<Place<K>>, SetupError> {
        let parent = Hwpt::paging(self.memory, self.device, HwptFlags::NEST_PARENT);
        let Some(parent) = present(parent, Step::Table)? else { return Ok(None) };
        let viommu = Viommu::new(ViommuKind::Smmuv3, self.device, &parent);
        let Some(viommu) = present(viommu, Step::Viommu)? else { return Ok(None) };
        let vdevice = Vdevice::new(&viommu, self.device, name.0.into());
        let Some(vdevice) = present(vdevice, Step::Vdevice)? else { return Ok(None) };
        let events = EventQueue::new(&viommu, ViommuKind::Smmuv3, EVENT_QUEUE_DEPTH);
        let events = present(events, Step::EventQueue)?;
        if events.is_none() {
            tracing::warn!("this kernel reports no faults of guests' tables; Linux 6.15 and later do");
        }
        let entry = |words| Hwpt::on_viommu(&viommu, self.device, words, None).map_err(Step::Table.failed());
        let (bypass, abort) = (entry(smmuv3::BYPASS)?, entry(smmuv3::ABORT)?);
        // What stage 2 translates, now that its table narrows the address space.
        let ranges = self.memory.ranges().map_err(Step::Ranges.failed())?;
        let last = ranges.allowed.last().map_or(u64::MAX, |range| range.last().0);
        let bits = u8::try_from(u64::BITS - last.leading_zeros()).unwrap_or(64);
        let hardware = smmuv3::Hardware::new(flags, idr, bits);
        if hardware.repeat {
            tracing::info!("erratum: TLBI and CFGI are sent twice");
        }
        let kind = Kind::Smmuv3(Smmuv3 { viommu, events, hardware });
        Ok(Some(Place::new(Unit { id: self.id, bypass, abort, pasids: false, kind }, Some(vdevice))))
    }

    /// `None` where kernel or hardware does not nest. `pasids`: tables are attached to PASIDs, too.
    pub(crate) fn vtd(&self, pasids: bool) -> Result<Option<Unit<K>>, SetupError> {
        let flags = HwptFlags::NEST_PARENT | pasid_flag(pasids);
        let bypass = Hwpt::paging(self.memory, self.device, flags);
        let Some(bypass) = present(bypass, Step::Table)? else { return Ok(None) };
        let abort = self.empty(flags)?;
        Ok(Some(Unit { id: self.id, bypass, abort, pasids, kind: Kind::Vtd }))
    }

    /// One that walks no guests' tables.
    pub(crate) fn paging(&self, pasids: bool) -> Result<Unit<K>, SetupError> {
        let flags = pasid_flag(pasids);
        let bypass = Hwpt::paging(self.memory, self.device, flags).map_err(Step::Table.failed())?;
        let abort = self.empty(flags)?;
        Ok(Unit { id: self.id, bypass, abort, pasids, kind: Kind::Paging })
    }

    /// A table of an address space of its own, without mappings.
    fn empty(&self, flags: HwptFlags) -> Result<Arc<Hwpt<K>>, SetupError> {
        let ioas = Ioas::new(self.session).map_err(Step::AddressSpace.failed())?;
        Hwpt::paging(&ioas, self.device, flags).map_err(Step::Table.failed())
    }
}

impl<K: Iommufd> Unit<K> {
    /// A table of mappings for `device`.
    pub(crate) fn mapped(&self, ioas: &Arc<Ioas<K>>, device: DeviceId) -> Result<Arc<Hwpt<K>>, Errno> {
        Hwpt::paging(ioas, device, pasid_flag(self.pasids))
    }

    /// A guest's table for an endpoint, whose page requests go to `queue`.
    pub(crate) fn table(
        &self,
        endpoint: &Facts,
        table: &Canonical,
        queue: Option<&Arc<FaultQueue<K>>>,
    ) -> Result<Table<K>, HostError> {
        let &Facts { device, ats, may_stall, .. } = endpoint;
        match (&self.kind, table) {
            (Kind::Smmuv3(unit), Canonical::Smmuv3(table)) => {
                let entry = smmuv3::ste(table, ats && unit.hardware.ats, may_stall);
                let [_, word1] = entry;
                Ok(Table {
                    hwpt: Hwpt::on_viommu(&unit.viommu, device, entry, queue).map_err(host_error)?,
                    ats: Ste1::from_bits(word1).eats() != 0,
                    pasid_bits: Some(table.pasid_bits()),
                })
            }
            (Kind::Vtd, Canonical::VtdFirstStage(table)) => {
                let (flags, data) = (pasid_flag(self.pasids), vtd::table(table));
                let hwpt = Hwpt::on_nest_parent(&self.bypass, device, flags, data, queue);
                Ok(Table { hwpt: hwpt.map_err(host_error)?, ats: false, pasid_bits: None })
            }
            _ => Err(HostError::Unsupported),
        }
    }

    /// What a guest's table for `device` with page requests is to the kernel, but one that leads nowhere: an entry that
    /// aborts, or a table that would be where no memory is.
    pub(crate) fn dead_end(
        &self,
        device: DeviceId,
        queue: &Arc<FaultQueue<K>>,
    ) -> Result<Arc<Hwpt<K>>, Errno> {
        match &self.kind {
            Kind::Smmuv3(unit) => Hwpt::on_viommu(&unit.viommu, device, smmuv3::ABORT, Some(queue)),
            Kind::Vtd => {
                let data = HwptData::Vtd { flags: 0, root: 0, address_width: 48 };
                Hwpt::on_nest_parent(&self.abort, device, pasid_flag(self.pasids), data, Some(queue))
            }
            Kind::Paging => Err(Errno::EOPNOTSUPP),
        }
    }
}

impl<K: Iommufd> Smmuv3<K> {
    /// Another device of the same SMMU.
    pub(crate) fn vdevice(&self, device: DeviceId, name: EndpointId) -> Result<Vdevice<K>, Errno> {
        Vdevice::new(&self.viommu, device, name.0.into())
    }

    /// Sends the steps of a plan one after the other. `Ok` once all of them have taken effect.
    pub(crate) fn send(&self, plan: &smmuv3::Plan) -> Result<(), Errno> {
        for step in plan.steps() {
            for _ in 0..if step.repeat { 2 } else { 1 } {
                for batch in step.commands.chunks(SMMUV3_BATCH) {
                    self.send_batch(batch)?;
                }
            }
        }
        Ok(())
    }

    /// The kernel counts commands as handled that it has not issued: a batch that fails was not issued at all, or no one
    /// knows how much of it had an effect. It is sent once more, from its start.
    fn send_batch(&self, batch: &[[u64; 2]]) -> Result<(), Errno> {
        let commands = Commands::Smmuv3(batch);
        let Err(error) = self.viommu.invalidate(commands) else { return Ok(()) };
        tracing::debug!(%error, commands = batch.len(), "invalidation failed, sent once more");
        self.viommu.invalidate(commands).map_err(|error| error.errno)
    }
}

const fn pasid_flag(pasids: bool) -> HwptFlags {
    if pasids { HwptFlags::PASID } else { HwptFlags::empty() }
}

/// `None` where the kernel says that there is no such thing.
fn present<T>(answer: Result<T, Errno>, step: Step) -> Result<Option<T>, SetupError> {
    match answer {
        Ok(thing) => Ok(Some(thing)),
        Err(errno) if is_absent(errno) => {
            tracing::debug!(%step, %errno, "not available");
            Ok(None)
        }
        Err(errno) => Err(step.failed()(errno)),
    }
}
