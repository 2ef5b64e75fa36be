//! The suite on the software host.

use pgtable_formats::{Access, AccessKind, Gpa, Iova};
use viommu_device::host::{FaultReport, Host, Stream};
use viommu_device::mediated::{Mediated, MediationLimits, Window};
use viommu_queue::GuestTables;
use viommu_tests::host_suite::{Ability, Denied, HostUnderTest, skips};
use viommu_tests::rig::{Alloc, Memory};
use viommu_wire::EndpointId;

use super::restricted::Restricted;

/// First page of the window; behind it, to the middle of memory, lie 8 MiB.
pub(crate) const WINDOW_PAGE: u64 = 0x1800;
pub(crate) const WINDOW_BYTES: u64 = 1 << 20;

pub(crate) struct Soft {
    pub(crate) host: Mediated<Restricted, GuestTables>,
    pub(crate) memory: Alloc,
    pub(crate) guest: Memory,
    endpoints: [EndpointId; 2],
    cannot: &'static [Denied],
    told: Option<FaultReport>,
}

impl Soft {
    pub(crate) fn new(first: u32, second: u32, strict: bool, cannot: &'static [Denied]) -> Self {
        Self::with(first, second, strict, cannot, WINDOW_BYTES, MediationLimits::DEFAULT)
    }

    pub(crate) fn with(
        first: u32,
        second: u32,
        strict: bool,
        cannot: &'static [Denied],
        window: u64,
        limits: MediationLimits,
    ) -> Self {
        let guest = Memory::new(64 << 20);
        let mut host = Restricted::new(&guest);
        host.inner.set_strict(strict);
        let window = Window::new(Memory::page(WINDOW_PAGE), window);
        let host = Mediated::new(host, guest.tables().clone(), window, limits).expect("a window");
        let memory = Alloc::new(&guest);
        Self { host, memory, guest, endpoints: [first, second].map(EndpointId), cannot, told: None }
    }

    pub(crate) fn leads(&mut self, stream: Stream, iova: u64) -> Option<Gpa> {
        self.host.host_mut().inner.peek(stream, Iova(iova), Access::READ).ok().map(|piece| piece.output)
    }
}

impl HostUnderTest for Soft {
    type Host = Mediated<Restricted, GuestTables>;
    type Memory = Alloc;

    fn host(&mut self) -> &mut Self::Host {
        &mut self.host
    }

    fn memory(&mut self) -> &mut Alloc {
        &mut self.memory
    }

    fn endpoints(&self) -> [EndpointId; 2] {
        self.endpoints
    }

    fn access(&mut self, stream: Stream, iova: u64, kind: AccessKind) -> Option<u64> {
        let access = Access { kind, privileged: false };
        let inner = &mut self.host.host_mut().inner;
        let output = inner.translate(stream, Iova(iova), access, |piece| piece.output.0).ok();
        self.told = self.host.next_fault();
        assert_eq!((self.told.is_some(), self.host.next_fault()), (output.is_none(), None));
        output
    }

    fn told(&mut self) -> Option<FaultReport> {
        self.told.take()
    }

    fn page(&self, number: u64) -> u64 {
        Memory::page(number).0
    }

    fn shows_stale(&self) -> bool {
        !self.host.host().inner.is_strict()
    }

    fn cannot(&self) -> &'static [Denied] {
        self.cannot
    }
}

pub(crate) const ARM: &[Denied] = &[];
pub(crate) const INTEL: &[Denied] = &[(Ability::Tags, "VT-d has no tag but the PASID")];

mod smmuv3 {
    viommu_tests::host_suite!(super::Soft::new(8, 9, false, super::ARM));
}

mod strict_smmuv3 {
    viommu_tests::host_suite!(super::Soft::new(8, 9, true, super::ARM));
}

mod vtd {
    viommu_tests::host_suite!(super::Soft::new(16, 17, false, super::INTEL));
}

mod strict_vtd {
    viommu_tests::host_suite!(super::Soft::new(16, 17, true, super::INTEL));
}

/// All kinds of tables on both architectures: nothing is left out for them.
#[test]
fn skips_are_these() {
    assert_eq!(skips(|| Soft::new(8, 9, false, ARM)), []);
    assert_eq!(skips(|| Soft::new(16, 17, false, INTEL)), [("invalidation_by_tag", Ability::Tags)]);
}
