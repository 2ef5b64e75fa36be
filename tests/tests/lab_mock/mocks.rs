//! [`IommufdHost`] on the mock, as a host that the suite of hosts tests.
//!
//! Attachments, address spaces and invalidations are the kernel's. The mock walks no tables: what hardware would find in
//! the guest's is looked up here, and where that leads is asked of the kernel again.

use std::sync::Arc;

use pgtable_formats::context::{Canonical, Context, smmuv3, vtd};
use pgtable_formats::{Access, AccessKind, Gpa, Iova};
use viommu_device::host::{Host, Stream, TableCaps};
use viommu_host_iommufd::fake::{FakeMemory, Memory as _};
use viommu_host_iommufd::kernel::{Backing, DeviceId, HwptData};
use viommu_host_iommufd::{Device, IommufdHost};
use viommu_tests::host_suite::memory::memory;
use viommu_tests::host_suite::{Ability, Denied, HostUnderTest};
use viommu_tests::rig::{Alloc, Memory};
use viommu_wire::EndpointId;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::kernel::{Flavour, MockKernel, Route};

/// The endpoints of [`Mocks`].
pub(crate) const ENDPOINTS: [EndpointId; 2] = [EndpointId(8), EndpointId(9)];

/// Bytes of guest memory, one memfd.
pub(crate) const MEMORY: usize = 16 << 20;

const UNTOLD: &str = "the kernel tells faults of guests' tables only";
const NUMBERED: &str = "events of the mock have no address";

/// What the mock as an SMMUv3 cannot.
pub(crate) const SMMUV3: &[Denied] = &[
    (Ability::UnboundFaults, UNTOLD),
    (Ability::MappingFaults, UNTOLD),
    (Ability::BypassBeyondMemory, "bypass is stage 2, which has guest memory alone"),
    (Ability::PasidBypass, "an SMMUv3 whose stage 1 is bypassed refuses PASIDs"),
    (Ability::PageTables, "an SMMUv3 takes tables of context descriptors only"),
    (Ability::NarrowUntagged, "nothing is cached"),
    (Ability::TableFaults, NUMBERED),
    (Ability::PageRequests, "Linux lets no PCI device ask for pages behind an SMMUv3"),
];

/// What the mock as VT-d cannot.
pub(crate) const VTD: &[Denied] = &[
    (Ability::UnboundFaults, UNTOLD),
    (Ability::MappingFaults, UNTOLD),
    (Ability::BypassBeyondMemory, "bypass is stage 2, which has guest memory alone"),
    (Ability::PasidBypass, "PASIDs are attached one by one"),
    (Ability::PasidTables, "the hardware never sees the guest's PASID table"),
    (Ability::Tags, "VT-d has no tag but the PASID"),
    (Ability::TableFaults, "the kernel tells no faults of VT-d"),
    (Ability::PageRequests, "they are switched off: a mock does not say what it was answered"),
];

/// A host with two endpoints, which are mocks.
pub(crate) struct Mocks {
    /// The host; first, so that it goes before its kernel.
    pub(crate) host: Option<IommufdHost<MockKernel>>,
    /// The kernel.
    pub(crate) kernel: Arc<MockKernel>,
    /// Guest memory.
    pub(crate) memory: Alloc,
    /// The devices behind [`ENDPOINTS`].
    pub(crate) devices: [DeviceId; 2],
    /// What was free before the host was made.
    pub(crate) free: Vec<u32>,
    /// What tables of the endpoints may be.
    pub(crate) caps: TableCaps,
    pub(crate) map: GuestMemoryMmap,
    cannot: &'static [Denied],
}

impl Mocks {
    /// On VT-d with page requests, which the mock has whatever it is attached to.
    pub(crate) fn new(flavour: Flavour) -> Self {
        Self::with(flavour, flavour == Flavour::Vtd)
    }

    /// Whose accesses do not wait. For the suite of hosts: a mock does not say what it was answered.
    pub(crate) fn impatient(flavour: Flavour) -> Self {
        Self::with(flavour, false)
    }

    fn with(flavour: Flavour, asks: bool) -> Self {
        let kernel = Arc::new(MockKernel::open());
        let devices = [flavour; 2].map(|flavour| kernel.add_device(flavour));
        let map = memory(MEMORY);
        let memory = Alloc::new(&Memory::over(map.clone()));
        let free = kernel.free_numbers();
        let cannot = match flavour {
            Flavour::Smmuv3 => SMMUV3,
            Flavour::Vtd => VTD,
        };
        let mut host = IommufdHost::new(Arc::clone(&kernel), &map).expect("a host");
        for (endpoint, id) in ENDPOINTS.into_iter().zip(devices) {
            host.add_endpoint(endpoint, Device { ats: asks, pri: asks, ..plain(id) }).expect("an endpoint");
            assert_eq!(host.caps(endpoint).unwrap().page_requests, asks);
        }
        let caps = host.caps(ENDPOINTS[0]).unwrap().tables.clone().expect("an IOMMU that takes tables");
        Self { host: Some(host), kernel, memory, devices, free, caps, map, cannot }
    }

    /// The device behind an endpoint.
    pub(crate) fn device(&self, endpoint: EndpointId) -> DeviceId {
        self.devices[ENDPOINTS.iter().position(|&id| id == endpoint).unwrap()]
    }

    /// Where the process has a guest-physical page.
    pub(crate) fn user(&self, gpa: u64) -> u64 {
        self.map.get_slice(GuestAddress(gpa), 1).unwrap().ptr_guard().as_ptr() as u64
    }

    /// What stage 1 makes of an address.
    fn stage1(&self, route: &Route, stream: Stream, iova: u64, access: Access) -> Option<u64> {
        let table = match (route.stage1, &self.caps) {
            (HwptData::None, _) => return stream.pasid.is_none().then_some(iova),
            (HwptData::Vtd { flags, root, address_width }, TableCaps::Vtd(caps)) => {
                let flags = vtd::FirstStageFlags::from_bits(flags).unwrap();
                let table = vtd::FirstStage::new(Gpa(root), flags, address_width, caps);
                Canonical::VtdFirstStage(table.expect("what was checked"))
            }
            (HwptData::Smmuv3([first, second]), TableCaps::Smmuv3(caps)) => match first >> 1 & 7 {
                _ if first & 1 == 0 => return None,
                4 => return stream.pasid.is_none().then_some(iova),
                5 => Canonical::Smmuv3(
                    smmuv3::CdTable::from_ste(first, second, caps).expect("what was checked"),
                ),
                config => panic!("Config {config}"),
            },
            (data, _) => panic!("{data:?}"),
        };
        let memory = &self.memory;
        match table.lookup(memory, stream.pasid).ok()? {
            Context::Bypass => Some(iova),
            Context::Stage1(stage1) => {
                stage1.walk(memory, Iova(iova), access).ok().map(|found| found.apply(Iova(iova)).0)
            }
        }
    }
}

impl HostUnderTest for Mocks {
    type Host = IommufdHost<MockKernel>;
    type Memory = Alloc;

    fn host(&mut self) -> &mut Self::Host {
        self.host.as_mut().expect("a host that was not dropped")
    }

    fn memory(&mut self) -> &mut Alloc {
        &mut self.memory
    }

    fn endpoints(&self) -> [EndpointId; 2] {
        ENDPOINTS
    }

    fn access(&mut self, stream: Stream, iova: u64, kind: AccessKind) -> Option<u64> {
        let device = self.device(stream.endpoint);
        self.kernel.attached(device, stream.pasid);
        let route = self.kernel.route(device, stream.pasid)?;
        let at = self.stage1(&route, stream, iova, Access { kind, privileged: false })?;
        let write = kind == AccessKind::Write;
        let area = self.kernel.area(route.ioas, at);
        let permitted = area.filter(|area| if write { area.writable } else { area.readable });
        let Some(area) = permitted else {
            let refused = self.kernel.access(route.ioas, at, write, &mut [0]);
            assert!(refused.is_err(), "{at:#x} of {route:?}");
            return None;
        };
        let further = at - area.range.start().0;
        let backing = match area.backing {
            Backing::Memory(start) => Backing::Memory(start + further),
            Backing::File { fd, offset } => Backing::File { fd, offset: offset + further },
        };
        let gpa = FakeMemory::new(&self.map).gpa(backing).expect("guest memory").0;
        // The table leads there, and memory is reached that way: what is written is what was there.
        let page = 0xfff;
        assert!(self.kernel.leads(route.table, at & !page, self.user(gpa & !page)), "{at:#x} of {route:?}");
        let byte: u8 = self.map.read_obj(GuestAddress(gpa)).unwrap();
        let mut seen = [byte];
        self.kernel.access(route.ioas, at, write, &mut seen).expect("what is mapped");
        assert_eq!(seen, [byte]);
        Some(gpa)
    }

    fn page(&self, number: u64) -> u64 {
        Memory::page(number).0
    }

    fn shows_stale(&self) -> bool {
        false
    }

    fn cannot(&self) -> &'static [Denied] {
        self.cannot
    }
}

/// A device without ATS, stalls and reserved regions.
pub(crate) fn plain(id: DeviceId) -> Device {
    Device { id, reserved: vec![], may_stall: false, ats: false, pri: false }
}
