//! Making a host, adding endpoints to it, and removing them.

use std::collections::BTreeMap;
use std::sync::Arc;

use nix::errno::Errno;
use pgtable_formats::context::smmuv3::Idr1;
use pgtable_formats::context::vtd::Ecap;
use pgtable_formats::{IovaRange, Pasid};
use viommu_device::host::{EndpointCaps, TableCaps, TableKinds};
use viommu_wire::{EndpointId, ReservedRegion};
use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::Bitmap;

use crate::endpoint::{Bound, Endpoint, Facts};
use crate::error::{SetupError, Step, is_absent};
use crate::faults::Faults;
use crate::guest_memory::GuestMemory;
use crate::host::IommufdHost;
use crate::kernel::{DeviceId, HwCapabilities, HwInfo, HwKind, HwptFlags, Iommufd, IovaRanges};
use crate::objects::{Attachment, Hwpt, Ioas, Session};
use crate::page_requests::{self, PageRequests};
use crate::reserved;
use crate::sysfs::{self, Bdf, ConfigSpace, PciDevice, Root};
use crate::unit::{Kind, Place, Site, Unit, UnitId};
use crate::vendor::{smmuv3, vtd};

/// A device to be an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its number in the iommufd that it is bound to. It is attached to nothing yet.
    pub id: DeviceId,
    /// What is known of its reserved regions, the window for message-signalled interrupts above all
    /// ([`ReservedKind::Msi`](viommu_wire::ReservedKind::Msi)): sysfs lists them for its group. What the kernel excludes
    /// without saying why need not be here.
    pub reserved: Vec<ReservedRegion>,
    /// Its transactions may stall: a platform device whose firmware says so, never one on PCI.
    pub may_stall: bool,
    /// It has the ATS capability.
    pub ats: bool,
    /// It has the PRI capability. Whoever does not fetch page requests
    /// ([`Host::next_page_request`](viommu_device::host::Host::next_page_request)) says no: accesses would wait for ever.
    pub pri: bool,
}

impl Device {
    /// A function on PCI, as sysfs knows it: its reserved regions, and whether it has ATS and PRI. `None` where its
    /// reserved regions cannot be read: a guest that is not told of them may lose its interrupts.
    ///
    /// Without privilege sysfs hides extended capabilities, and the device does without either.
    pub fn on_pci(id: DeviceId, root: &Root, function: Bdf) -> Option<Self> {
        let reserved = sysfs::reserved_regions(root, function)?;
        let function = PciDevice::read(root, function);
        let config = function.as_ref().and_then(|function| function.config.known());
        let ats = config.is_some_and(|config| config.ats().is_some());
        let pri = config.is_some_and(ConfigSpace::page_requests);
        // A transaction on PCI that waits could block those behind it.
        Some(Self { id, reserved, may_stall: false, ats, pri })
    }
}

impl<K: Iommufd> IommufdHost<K> {
    /// A host without endpoints. All of `memory` is mapped for devices, and held mapped as long as the host lives.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new<B>(kernel: Arc<K>, memory: &GuestMemoryMmap<B>) -> Result<Self, SetupError>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let session = Session::new(kernel);
        let mut memory = GuestMemory::new(memory);
        let ioas = Ioas::new(&session).map_err(Step::AddressSpace.failed())?;
        memory.map_all(&ioas).map_err(Step::GuestMemory.failed())?;
        Ok(Self {
            endpoints: BTreeMap::new(),
            units: Vec::new(),
            last_unit: 0,
            faults: Faults::default(),
            last_asking: EndpointId(0),
            ignored_page_requests: 0,
            ioas,
            memory,
            session,
        })
    }

    /// Adds an endpoint, whose accesses all fault until one of its streams is bound.
    ///
    /// # Errors
    /// [`SetupError`]; the device is detached then.
    pub fn add_endpoint(&mut self, id: EndpointId, device: Device) -> Result<(), SetupError> {
        if self.endpoints.contains_key(&id) {
            return Err(SetupError::EndpointExists(id));
        }
        if let Some(taken) = self.endpoints.values().find(|endpoint| endpoint.facts.device == device.id) {
            return Err(SetupError::DeviceExists { device: device.id, endpoint: taken.facts.id });
        }
        let hardware = self.kernel().hw_info(device.id).map_err(Step::HardwareInfo.failed())?;
        let Alone { mut attachment, ranges, pasids } = self.attach_alone(device.id, &hardware)?;
        if let Some(memory) = self.memory.ranges().find(|memory| !is_allowed(&ranges.allowed, *memory)) {
            return Err(SetupError::MemoryReserved { memory });
        }

        let newcomer = Newcomer { id, device: device.id, hardware, pasids };
        let Place { unit, vdevice } = self.find_place(&newcomer, &mut attachment)?;
        let tables = tables(&unit, &hardware);
        let ats = device.ats && !hardware.capabilities.contains(HwCapabilities::ATS_NOT_SUPPORTED);
        let queue = if tables.is_some() && page_requests::may_have(&hardware.kind, &device, ats) {
            page_requests::try_on(&self.session, &unit, device.id, &mut attachment)?
        } else {
            None
        };
        let caps = EndpointCaps {
            tables,
            page_requests: queue.is_some(),
            kinds: match unit.kind {
                Kind::Smmuv3(_) => TableKinds::PASID_TABLE,
                Kind::Vtd => TableKinds::PAGE_TABLE,
                Kind::Paging => TableKinds::empty(),
            },
            reserved: reserved::regions(&ranges.allowed, &device.reserved),
            ..EndpointCaps::default()
        };
        let facts = Facts {
            id,
            device: device.id,
            caps,
            ats,
            may_stall: device.may_stall,
            span: span(&ranges.allowed),
            alignment: ranges.alignment,
        };
        if !self.units.iter().any(|known| Arc::ptr_eq(known, &unit)) {
            self.units.push(Arc::clone(&unit));
        }
        let requests = queue.map(|queue| PageRequests::new(id, device.id, queue));
        self.endpoints.insert(id, Endpoint::new(facts, unit, vdevice, attachment, requests));
        Ok(())
    }

    /// Removes an endpoint and detaches its device, which then reaches nothing. A device core that knows the endpoint
    /// has to be told before.
    ///
    /// # Errors
    /// [`SetupError::NoEndpoint`].
    pub fn remove_endpoint(&mut self, id: EndpointId) -> Result<(), SetupError> {
        let mut endpoint = self.endpoints.remove(&id).ok_or(SetupError::NoEndpoint(id))?;
        // Not for the device, which is detached anyway, but for those that share its tags.
        if let Err(errno) = endpoint.bind_untagged(Bound::Nothing) {
            tracing::warn!(endpoint = id.0, %errno, "caches of a removed endpoint were not dropped");
        }
        let ignored = endpoint.page_requests.as_ref().map_or(0, PageRequests::ignored);
        self.ignored_page_requests = self.ignored_page_requests.saturating_add(ignored);
        let unit = Arc::clone(&endpoint.unit);
        drop(endpoint);
        let Self { units, faults, endpoints, .. } = self;
        faults.forget_endpoint(id, &unit, |id| {
            endpoints.get(&id).is_some_and(|endpoint| Arc::ptr_eq(&endpoint.unit, &unit))
        });
        drop(unit);
        units.retain(|unit| {
            let in_use = Arc::strong_count(unit) > 1;
            if !in_use {
                faults.forget_unit(unit.id);
            }
            in_use
        });
        Ok(())
    }

    /// Attaches the device to an empty address space that no other device narrows, to see what it leaves of it.
    fn attach_alone(&self, device: DeviceId, hardware: &HwInfo) -> Result<Alone<K>, SetupError> {
        let ioas = Ioas::new(&self.session).map_err(Step::AddressSpace.failed())?;
        let wants_pasids = matches!(hardware.kind, HwKind::Vtd { .. }) && hardware.max_pasid_lg2 != 0;
        let with_pasids = match wants_pasids.then(|| Hwpt::paging(&ioas, device, HwptFlags::PASID)) {
            Some(Err(errno)) if is_absent(errno) => None,
            other => other.transpose().map_err(Step::Table.failed())?,
        };
        let pasids = with_pasids.is_some();
        let table = match with_pasids {
            Some(table) => table,
            None => Hwpt::paging(&ioas, device, HwptFlags::empty()).map_err(Step::Table.failed())?,
        };
        let attachment = Attachment::new(device, None, &table).map_err(Step::Attach.failed())?;
        let ranges = ioas.ranges().map_err(Step::Ranges.failed())?;
        Ok(Alone { attachment, ranges, pasids: pasids && takes_pasids(device, &table)? })
    }

    /// The unit that the device is behind, one that is known or a new one, and attaches the device to its abort.
    fn find_place(
        &mut self,
        newcomer: &Newcomer,
        attachment: &mut Attachment<K>,
    ) -> Result<Place<K>, SetupError> {
        let known = match newcomer.hardware.kind {
            HwKind::Smmuv3 { .. } => self.known_smmuv3(newcomer)?,
            HwKind::Vtd { .. } => {
                let is_like =
                    |unit: &Unit<K>| matches!(unit.kind, Kind::Vtd) && unit.pasids == newcomer.pasids;
                self.known_by_trial(is_like, attachment)?
            }
            HwKind::None | HwKind::Amd { .. } | HwKind::Other(_) => None,
        };
        let place = match known {
            Some(place) => Some(place),
            None => self.new_nested(newcomer)?,
        };
        let place = match place {
            Some(place) => place,
            None => {
                tracing::info!(
                    endpoint = newcomer.id.0,
                    "no guests' tables: kernel or hardware does not nest"
                );
                let is_like =
                    |unit: &Unit<K>| matches!(unit.kind, Kind::Paging) && unit.pasids == newcomer.pasids;
                match self.known_by_trial(is_like, attachment)? {
                    Some(place) => place,
                    None => Place::new(self.site(newcomer).paging(newcomer.pasids)?, None),
                }
            }
        };
        attachment.replace(&place.unit.abort, || ()).map_err(Step::Attach.failed())?;
        Ok(place)
    }

    /// The SMMUv3 that gives the device a name.
    fn known_smmuv3(&self, newcomer: &Newcomer) -> Result<Option<Place<K>>, SetupError> {
        for unit in &self.units {
            let Kind::Smmuv3(smmu) = &unit.kind else { continue };
            match smmu.vdevice(newcomer.device, newcomer.id) {
                Ok(vdevice) => return Ok(Some(Place { unit: Arc::clone(unit), vdevice: Some(vdevice) })),
                // It is behind another one.
                Err(Errno::EINVAL) => {}
                // No SMMU can name it: it has several StreamIDs.
                Err(errno) if is_absent(errno) => return Ok(None),
                Err(errno) => return Err(Step::Vdevice.failed()(errno)),
            }
        }
        Ok(None)
    }

    /// A unit whose abort the device can be attached to.
    fn known_by_trial(
        &self,
        is_like: impl Fn(&Unit<K>) -> bool,
        attachment: &mut Attachment<K>,
    ) -> Result<Option<Place<K>>, SetupError> {
        for unit in self.units.iter().filter(|unit| is_like(unit)) {
            match attachment.replace(&unit.abort, || ()) {
                Ok(()) => return Ok(Some(Place { unit: Arc::clone(unit), vdevice: None })),
                // It is behind another one.
                Err(Errno::EINVAL) => {}
                Err(errno) => return Err(Step::Attach.failed()(errno)),
            }
        }
        Ok(None)
    }

    fn new_nested(&mut self, newcomer: &Newcomer) -> Result<Option<Place<K>>, SetupError> {
        match newcomer.hardware.kind {
            HwKind::Smmuv3 { flags, idr, .. } => self.site(newcomer).smmuv3(newcomer.id, flags, &idr),
            HwKind::Vtd { flags, .. } => {
                let unit = self.site(newcomer).vtd(newcomer.pasids)?;
                if unit.is_some() && flags & ERRATUM_772415 != 0 && self.memory.has_read_only() {
                    tracing::warn!("erratum 772415: devices can write to guest memory that is read-only");
                }
                Ok(unit.map(|unit| Place::new(unit, None)))
            }
            HwKind::None | HwKind::Amd { .. } | HwKind::Other(_) => Ok(None),
        }
    }

    fn site(&mut self, newcomer: &Newcomer) -> Site<'_, K> {
        self.last_unit = self.last_unit.wrapping_add(1);
        let Self { session, ioas, last_unit, .. } = self;
        Site { id: UnitId(*last_unit), session, memory: ioas, device: newcomer.device }
    }
}

/// A device that is attached to an empty address space of its own.
struct Alone<K: Iommufd> {
    attachment: Attachment<K>,
    /// What it leaves of it.
    ranges: IovaRanges,
    /// Its PASIDs can be attached one by one.
    pasids: bool,
}

/// An endpoint to be.
struct Newcomer {
    id: EndpointId,
    device: DeviceId,
    hardware: HwInfo,
    pasids: bool,
}

/// `IOMMU_HW_INFO_VTD_ERRATA_772415_SPR17`.
const ERRATUM_772415: u32 = 1 << 0;

/// The registers that a guest is shown: of the unit, with no more PASIDs than the device has.
fn tables<K: Iommufd>(unit: &Unit<K>, hardware: &HwInfo) -> Option<TableCaps> {
    let bits = hardware.max_pasid_lg2;
    match (&unit.kind, hardware.kind) {
        (Kind::Smmuv3(smmu), HwKind::Smmuv3 { mut idr, .. }) => {
            let idr1 = Idr1::from_bits(idr[1]);
            idr[1] = idr1.with_ssidsize(idr1.ssidsize().min(bits)).into_bits();
            Some(TableCaps::Smmuv3(smmuv3::caps(&idr, smmu.hardware.caps.oas_bits)))
        }
        (Kind::Vtd, HwKind::Vtd { cap, ecap, .. }) => {
            let ecap = Ecap::from_bits(ecap);
            let ecap = match bits.checked_sub(1) {
                Some(pss) if unit.pasids => ecap.with_pss(ecap.pss().min(pss)),
                _ => ecap.with_pasid(false).with_pss(0),
            };
            let caps = vtd::caps(cap, ecap.into_bits());
            caps.first_stage.then_some(TableCaps::Vtd(caps))
        }
        _ => None,
    }
}

/// Whether accesses with a PASID can be attached: a kernel may tell how many PASIDs there are and make tables for them,
/// and yet have no way to attach them (Linux before 6.15, VFIO drivers other than vfio-pci).
fn takes_pasids<K: Iommufd>(device: DeviceId, table: &Arc<Hwpt<K>>) -> Result<bool, SetupError> {
    let any = Pasid::new(1);
    match Attachment::new(device, any, table) {
        Ok(_) => Ok(true),
        Err(errno) if errno == Errno::EINVAL || is_absent(errno) => Ok(false),
        Err(errno) => Err(Step::Attach.failed()(errno)),
    }
}

/// Whether the whole of `memory` is usable. `allowed` is ascending; neighbours in it may touch.
fn is_allowed(allowed: &[IovaRange], memory: IovaRange) -> bool {
    let mut next = memory.start();
    for range in allowed.iter().filter(|range| range.overlaps(memory)) {
        if !range.contains(next) {
            return false;
        }
        match range.last().checked_add(1) {
            Some(after) if range.last() < memory.last() => next = after,
            _ => return true,
        }
    }
    false
}

fn span(allowed: &[IovaRange]) -> Option<IovaRange> {
    IovaRange::new(allowed.first()?.start(), allowed.last()?.last())
}
