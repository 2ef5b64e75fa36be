//! Mediation over `IommufdHost` on a kernel that is made up, as a [`HostUnderTest`]. The window is memory that devices
//! can read and not write.

use pgtable_formats::{AccessKind, Gpa};
use viommu_device::host::Stream;
use viommu_device::mediated::{Mediated, MediationLimits, Window};
use viommu_device::soft::Answer;
use viommu_host_iommufd::IommufdHost;
use viommu_host_iommufd::fake::{DmaFault, FakeDevice, Kernel as Version, Unit, UnitId};
use viommu_queue::GuestTables;
use viommu_wire::EndpointId;

use super::iommufd::{
    ENDPOINTS, Fakes, Kernel, Layout, SMMUV3_MEDIATED, VTD_ASKING_MEDIATED, VTD_MEDIATED, asking, decline,
};
use super::memory::{WINDOW, with_window};
use super::{Attempt, Denied, HostUnderTest, Waiting};
use crate::rig::{Alloc, Memory};

const MEMORY_BYTES: usize = 64 << 20;
const WINDOW_BYTES: usize = 1 << 20;

/// See the [module](self).
pub struct MediatedFakes {
    /// What is below; its host was taken out.
    pub fakes: Fakes,
    /// The host.
    pub host: Mediated<IommufdHost<Kernel>, GuestTables>,
    cannot: &'static [Denied],
}

impl MediatedFakes {
    fn new(
        unit: Unit,
        layout: Layout,
        device: impl Fn(UnitId) -> FakeDevice,
        cannot: &'static [Denied],
    ) -> Self {
        let (guest, tables) = with_window(MEMORY_BYTES, WINDOW_BYTES);
        let mut fakes = Fakes::on_kernel(Version::NEWEST, guest, unit, layout, device, cannot);
        let half = MEMORY_BYTES as u64 / 2;
        let last = Gpa(Memory::BASE + 2 * half - 1);
        fakes.memory = Alloc::within(&fakes.guest, Gpa(Memory::BASE + half), last);
        fakes.start().expect("a host");
        for index in 0..2 {
            fakes.add(index).expect("an endpoint");
        }
        let host = fakes.host.take().expect("a host that was made");
        let window = Window::new(Gpa(WINDOW), WINDOW_BYTES as u64);
        let host = Mediated::new(host, tables, window, MediationLimits::DEFAULT).expect("a window");
        Self { fakes, host, cannot }
    }

    /// An SMMUv3 with PASIDs.
    pub fn smmuv3(layout: Layout) -> Self {
        Self::new(Unit::smmuv3(), layout, |unit| FakeDevice::on(unit).with_pasids(16), SMMUV3_MEDIATED)
    }

    /// VT-d with PASIDs.
    pub fn vtd(layout: Layout) -> Self {
        Self::new(Unit::vtd(), layout, |unit| FakeDevice::on(unit).with_pasids(20), VTD_MEDIATED)
    }

    /// The same, with devices that ask for pages.
    pub fn vtd_asking(layout: Layout) -> Self {
        Self::new(Unit::vtd(), layout, asking, VTD_ASKING_MEDIATED)
    }
}

impl HostUnderTest for MediatedFakes {
    type Host = Mediated<IommufdHost<Kernel>, GuestTables>;
    type Memory = Alloc;

    fn host(&mut self) -> &mut Self::Host {
        &mut self.host
    }

    fn memory(&mut self) -> &mut Alloc {
        &mut self.fakes.memory
    }

    fn endpoints(&self) -> [EndpointId; 2] {
        ENDPOINTS
    }

    fn access(&mut self, stream: Stream, iova: u64, kind: AccessKind) -> Option<u64> {
        let mut reached = self.fakes.dma(stream, iova, kind);
        if reached == Err(DmaFault::Stalled) {
            decline(&mut self.host);
            reached = self.fakes.dma(stream, iova, kind);
        }
        assert_eq!(self.fakes.fake.violations(), [""; 0]);
        reached.ok()
    }

    fn attempt(&mut self, stream: Stream, iova: u64, kind: AccessKind) -> Attempt {
        self.fakes.attempt(stream, iova, kind)
    }

    fn answer(&mut self, waiting: Waiting) -> Option<Answer> {
        self.fakes.answer(waiting)
    }

    fn page(&self, number: u64) -> u64 {
        Memory::page(number).0
    }

    fn shows_stale(&self) -> bool {
        true
    }

    fn cannot(&self) -> &'static [Denied] {
        self.cannot
    }
}
