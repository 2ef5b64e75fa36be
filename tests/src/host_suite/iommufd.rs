//! `IommufdHost` on a kernel that is made up, as a [`HostUnderTest`].

use std::sync::Arc;

use pgtable_formats::{Access, AccessKind};
use viommu_device::host::{GroupResponse, Host, Stream};
use viommu_device::soft::Answer;
use viommu_host_iommufd::counted::Counted;
use viommu_host_iommufd::failing::Failing;
use viommu_host_iommufd::fake::{
    DmaFault, FakeDevice, FakeIommufd, FakeMemory, FakeSmmuv3, Kernel as Version, Unit, UnitId,
};
use viommu_host_iommufd::kernel::DeviceId;
use viommu_host_iommufd::{Device, IommufdHost, SetupError};
use viommu_wire::{EndpointId, PageResponseCode, ReservedKind, ReservedRegion};

use super::{Ability, Attempt, Denied, HostUnderTest, Waiting};
use crate::rig::{Alloc, Memory};

/// The kernel that is made up.
pub type Fake = FakeIommufd<FakeMemory>;

/// The same as the host has it: its calls counted, and failing where they are told to.
pub type Kernel = Counted<Failing<Arc<Fake>>>;

/// The endpoints of [`Fakes`].
pub const ENDPOINTS: [EndpointId; 2] = [EndpointId(8), EndpointId(9)];

/// What Linux does for no IOMMU.
const BY_LINUX: [Denied; 3] = [
    (Ability::UnboundFaults, "the kernel tells faults of guests' tables only"),
    (Ability::MappingFaults, "the kernel tells faults of guests' tables only"),
    (Ability::BypassBeyondMemory, "bypass is stage 2, which has guest memory alone"),
];
const WRITES: Denied = (Ability::WriteOnly, "pages of stage 1 that can be written can be read");

/// What SMMUv3s do not do, and what some of them do not: the lists below are parts of this one.
const ARM: [Denied; 10] = [
    (Ability::Pasids, "the emulated SMMUv3 has none"),
    BY_LINUX[0],
    BY_LINUX[1],
    BY_LINUX[2],
    WRITES,
    (Ability::NarrowUntagged, "an SMMUv3 finds translations by ASID alone"),
    (Ability::PasidBypass, "an SMMUv3 whose stage 1 is bypassed refuses PASIDs"),
    (Ability::PageRequests, "Linux lets no PCI device ask for pages behind an SMMUv3"),
    (Ability::PageTables, "an SMMUv3 takes tables of context descriptors only"),
    (Ability::TableFaults, "an SMMUv3 records no fault of a translation request"),
];

/// What an SMMUv3 through Linux cannot.
pub const SMMUV3: &[Denied] = part(&ARM, 1, 9);
/// The same where the devices have ATS and the guest turns it on.
pub const SMMUV3_ATS: &[Denied] = part(&ARM, 1, 10);
/// The same without ATS and with mediation.
pub const SMMUV3_MEDIATED: &[Denied] = part(&ARM, 1, 8);
/// What the SMMUv3 of an emulated machine cannot.
pub const EMULATED: &[Denied] = part(&ARM, 0, 9);
/// The same with mediation.
pub const EMULATED_MEDIATED: &[Denied] = part(&ARM, 0, 8);

/// What VT-d does not do.
const INTEL: [Denied; 9] = [
    (Ability::PageRequests, "the devices have no PRI"),
    BY_LINUX[0],
    BY_LINUX[1],
    BY_LINUX[2],
    WRITES,
    (Ability::PasidBypass, "PASIDs are attached one by one"),
    (Ability::Tags, "VT-d has no tag but the PASID"),
    (Ability::TableFaults, "the kernel tells no faults of VT-d"),
    (Ability::PasidTables, "the hardware never sees the guest's PASID table"),
];

/// What VT-d through Linux cannot.
pub const VTD: &[Denied] = &INTEL;
/// The same with mediation.
pub const VTD_MEDIATED: &[Denied] = part(&INTEL, 0, 8);
/// What it cannot for devices that ask for pages.
pub const VTD_ASKING: &[Denied] = part(&INTEL, 1, 9);
/// The same with mediation.
pub const VTD_ASKING_MEDIATED: &[Denied] = part(&INTEL, 1, 8);

/// A device that asks for pages.
pub(super) fn asking(unit: UnitId) -> FakeDevice {
    FakeDevice { ats: true, pri: true, ..FakeDevice::on(unit).with_pasids(20) }
}

/// What an IOMMU without nested translation cannot.
pub const PLAIN: &[Denied] = &[
    BY_LINUX[0],
    BY_LINUX[1],
    BY_LINUX[2],
    (Ability::Pasids, "the driver attaches none"),
    (Ability::PasidTables, "the IOMMU takes no tables"),
    (Ability::PageTables, "the IOMMU takes no tables"),
    (Ability::Tags, "the IOMMU takes no tables"),
    (Ability::TableFaults, "the IOMMU takes no tables"),
    (Ability::PageRequests, "the IOMMU takes no tables"),
];

/// The entries from `first` up to, but without, `end`.
const fn part(list: &[Denied], first: usize, end: usize) -> &[Denied] {
    list.split_at(end).0.split_at(first).1
}

/// A host with two endpoints, on hardware that is made up.
pub struct Fakes {
    /// Kernel and hardware.
    pub fake: Arc<Fake>,
    /// What the host calls.
    pub kernel: Arc<Kernel>,
    /// The host; `None` after it was dropped.
    pub host: Option<IommufdHost<Kernel>>,
    /// Guest memory.
    pub guest: Memory,
    /// An allocator of it.
    pub memory: Alloc,
    /// The devices behind [`ENDPOINTS`].
    pub devices: [DeviceId; 2],
    cannot: &'static [Denied],
    /// Accesses that were told to wait.
    waiting: Vec<Wait>,
}

/// An access that was told to wait.
#[derive(Clone, Copy, Debug)]
enum Wait {
    /// Nobody has looked since whether it was answered.
    Open {
        stream: Stream,
        iova: u64,
        kind: AccessKind,
    },
    Answered(Answer),
}

/// Says no to every page request: to devices that always ask, for accesses that are not to wait.
pub(super) fn decline(host: &mut impl Host) {
    while let Some(request) = host.next_page_request() {
        let (stream, group) = (request.stream, request.group);
        let response = GroupResponse { stream, group, code: PageResponseCode::Invalid };
        host.respond(&response).expect("a kernel that works");
    }
}

/// How the two endpoints lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Behind one IOMMU.
    OneUnit,
    /// Behind one each.
    TwoUnits,
}

impl Fakes {
    /// Both endpoints behind IOMMUs of one kind, devices as `device` makes them.
    pub fn new(
        unit: Unit,
        layout: Layout,
        device: impl Fn(UnitId) -> FakeDevice,
        cannot: &'static [Denied],
    ) -> Self {
        let mut fakes = Self::without_host(unit, layout, device, cannot);
        fakes.start().expect("a host");
        for index in 0..2 {
            fakes.add(index).expect("an endpoint");
        }
        fakes
    }

    /// The same before there is a host.
    pub fn without_host(
        unit: Unit,
        layout: Layout,
        device: impl Fn(UnitId) -> FakeDevice,
        cannot: &'static [Denied],
    ) -> Self {
        Self::on_kernel(Version::NEWEST, Memory::new(64 << 20), unit, layout, device, cannot)
    }

    /// The same with another kernel, and other memory: its first region is where [`Memory::page`] says.
    pub fn on_kernel(
        version: Version,
        guest: Memory,
        unit: Unit,
        layout: Layout,
        device: impl Fn(UnitId) -> FakeDevice,
        cannot: &'static [Denied],
    ) -> Self {
        let fake = Arc::new(Fake::with_kernel(FakeMemory::new(guest.map()), version));
        let first = fake.add_unit(unit);
        let second = match layout {
            Layout::OneUnit => first,
            Layout::TwoUnits => fake.add_unit(unit),
        };
        let devices = [first, second].map(|unit| fake.add_device(device(unit)));
        let kernel = Arc::new(Counted::new(Failing::new(Arc::clone(&fake))));
        let memory = Alloc::new(&guest);
        Self { fake, kernel, host: None, guest, memory, devices, cannot, waiting: Vec::new() }
    }

    /// Makes the host, without endpoints.
    ///
    /// # Errors
    /// The host's.
    pub fn start(&mut self) -> Result<(), SetupError> {
        self.host = Some(IommufdHost::new(Arc::clone(&self.kernel), self.guest.map())?);
        Ok(())
    }

    /// Adds one of the endpoints.
    ///
    /// # Errors
    /// The host's.
    pub fn add(&mut self, index: usize) -> Result<(), SetupError> {
        let id = self.devices[index];
        let known = self.fake.device(id).expect("a device");
        let msi = self.fake.doorbell(id).map(|range| ReservedRegion { kind: ReservedKind::Msi, range });
        let reserved = msi.into_iter().collect();
        let device = Device { id, reserved, may_stall: known.stall, ats: known.ats, pri: known.pri };
        self.host().add_endpoint(ENDPOINTS[index], device)
    }

    /// An SMMUv3 with PASIDs, ATS where the devices have it.
    pub fn smmuv3(layout: Layout, ats: bool) -> Self {
        let device = |unit| FakeDevice { ats, ..FakeDevice::on(unit).with_pasids(16) };
        Self::new(Unit::smmuv3(), layout, device, if ats { SMMUV3_ATS } else { SMMUV3 })
    }

    /// An SMMUv3 that invalidates page by page.
    pub fn smmuv3_without_ranges() -> Self {
        let unit = Unit::Smmuv3(FakeSmmuv3::NEW.with_ranges(false));
        Self::new(unit, Layout::OneUnit, |unit| FakeDevice::on(unit).with_pasids(16), SMMUV3)
    }

    /// An SMMUv3 to which everything has to be said twice.
    pub fn smmuv3_with_erratum() -> Self {
        let unit = Unit::Smmuv3(FakeSmmuv3 { repeat: true, ..FakeSmmuv3::NEW });
        Self::new(unit, Layout::OneUnit, |unit| FakeDevice::on(unit).with_pasids(16), SMMUV3)
    }

    /// What the lab has.
    pub fn emulated() -> Self {
        Self::new(Unit::emulated_smmuv3(), Layout::OneUnit, FakeDevice::on, EMULATED)
    }

    /// VT-d with PASIDs.
    pub fn vtd(layout: Layout) -> Self {
        Self::new(Unit::vtd(), layout, |unit| FakeDevice::on(unit).with_pasids(20), VTD)
    }

    /// The same, with devices that ask for pages.
    pub fn vtd_asking(layout: Layout) -> Self {
        Self::new(Unit::vtd(), layout, asking, VTD_ASKING)
    }

    /// An IOMMU that the kernel tells nothing of.
    pub fn plain(layout: Layout) -> Self {
        Self::new(Unit::Plain, layout, FakeDevice::on, PLAIN)
    }

    /// The device behind an endpoint.
    pub fn device(&self, endpoint: EndpointId) -> DeviceId {
        let index = ENDPOINTS.iter().position(|&id| id == endpoint).expect("one of the endpoints");
        self.devices[index]
    }

    /// Whether what a guest's table does not let through is asked for in any case.
    fn cannot_but_wait(&self, endpoint: EndpointId) -> bool {
        self.fake.device(self.device(endpoint)).is_some_and(|device| device.pri)
    }

    /// An access, as the hardware answers it.
    ///
    /// # Errors
    /// Why it does not arrive.
    pub fn dma(&self, stream: Stream, iova: u64, kind: AccessKind) -> Result<u64, DmaFault> {
        let access = Access { kind, privileged: false };
        let device = self.device(stream.endpoint);
        let reached = self.fake.dma_gpa(device, stream.pasid, iova, access)?;
        Ok(reached.expect("guest memory").0)
    }
}

impl HostUnderTest for Fakes {
    type Host = IommufdHost<Kernel>;
    type Memory = Alloc;

    fn host(&mut self) -> &mut IommufdHost<Kernel> {
        self.host.as_mut().expect("a host that was not dropped")
    }

    fn memory(&mut self) -> &mut Alloc {
        &mut self.memory
    }

    fn endpoints(&self) -> [EndpointId; 2] {
        ENDPOINTS
    }

    fn access(&mut self, stream: Stream, iova: u64, kind: AccessKind) -> Option<u64> {
        let mut reached = self.dma(stream, iova, kind);
        if reached == Err(DmaFault::Stalled) {
            decline(self.host());
            reached = self.dma(stream, iova, kind);
        }
        assert_eq!(self.fake.violations(), [""; 0]);
        reached.ok()
    }

    fn attempt(&mut self, stream: Stream, iova: u64, kind: AccessKind) -> Attempt {
        let mut reached = self.dma(stream, iova, kind);
        if matches!(reached, Err(DmaFault::Stage1(_))) && self.cannot_but_wait(stream.endpoint) {
            // The answer to an access of before, which was not tried again.
            reached = self.dma(stream, iova, kind);
        }
        match reached {
            Ok(at) => Attempt::Reaches(at),
            Err(DmaFault::Stalled) => {
                self.waiting.push(Wait::Open { stream, iova, kind });
                Attempt::Waits(Waiting(self.waiting.len() - 1))
            }
            Err(_) => Attempt::Fails,
        }
    }

    /// The device sees the answer when it tries again.
    fn answer(&mut self, waiting: Waiting) -> Option<Answer> {
        let answer = match self.waiting[waiting.0] {
            Wait::Answered(answer) => answer,
            Wait::Open { stream, iova, kind } => match self.dma(stream, iova, kind) {
                Err(DmaFault::Stalled) => return None,
                Ok(_) => Answer::Retry,
                Err(_) => Answer::Failed,
            },
        };
        self.waiting[waiting.0] = Wait::Answered(answer);
        Some(answer)
    }

    fn page(&self, number: u64) -> u64 {
        Memory::page(number).0
    }

    fn shows_stale(&self) -> bool {
        true
    }

    fn ats(&self) -> bool {
        self.fake.device(self.devices[0]).is_some_and(|device| device.ats)
    }

    fn cannot(&self) -> &'static [Denied] {
        self.cannot
    }
}
