//! The host on the fake kernel: what it does when all goes well is the suites' business (in `viommu-tests`); here is
//! what it asks of the kernel, how often, and what becomes of it when the kernel refuses.

mod binding;
mod failures;
mod faults;
mod invalidation;
mod mapping;
mod page_requests;
mod setup;

use std::sync::Arc;

use nix::errno::Errno;
use pgtable_formats::context::{Canonical, smmuv3, vtd};
use pgtable_formats::edit::{EditOptions, Editor};
use pgtable_formats::format::Attrs;
use pgtable_formats::leaf::vmsav8::Granule;
use pgtable_formats::{Access, Gpa, Iova, IovaRange, NotMemory, Pasid, TableAlloc, TableMem};
use viommu_device::host::{Host, Invalidation, Scope, SpaceSpec, Stream, TableCaps};
use viommu_device::mapping::{MapFlags, Mapping};
use viommu_wire::{Caches, EndpointId};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::counted::{Call, Counted};
use crate::failing::Failing;
use crate::fake::{self, DmaFault, FakeDevice, FakeIommufd, FakeMemory, Unit, UnitId};
use crate::kernel::DeviceId;
use crate::{Device, IommufdHost, Space};

type Kernel = Counted<Failing<FakeIommufd<FakeMemory>>>;

/// Two regions that touch, a hole, and a third.
const MEMORY: [(u64, usize); 3] = [(0x4000_0000, 4 << 20), (0x4040_0000, 4 << 20), (0x6000_0000, 1 << 20)];

/// Guests' data and tables: pages from here on are handed out for tables.
const TABLES: u64 = 0x4020_0000;

const FIRST: EndpointId = EndpointId(8);
const SECOND: EndpointId = EndpointId(0x42);

struct Rig {
    host: IommufdHost<Kernel>,
    kernel: Arc<Kernel>,
    guest: Guest,
}

impl Rig {
    /// Without endpoints.
    fn new() -> Self {
        let ranges = MEMORY.map(|(start, size)| (GuestAddress(start), size));
        Self::with_memory(&GuestMemoryMmap::from_ranges(&ranges).unwrap(), fake::Kernel::NEWEST)
    }

    fn with_memory(memory: &GuestMemoryMmap, kernel: fake::Kernel) -> Self {
        let fake = FakeIommufd::with_kernel(FakeMemory::new(memory), kernel);
        let kernel = Arc::new(Counted::new(Failing::new(fake)));
        let host = IommufdHost::new(Arc::clone(&kernel), memory).unwrap();
        Self { host, kernel, guest: Guest { memory: FakeMemory::new(memory), next: TABLES } }
    }

    /// Two endpoints behind one unit; their devices have ATS, and 8 bits of PASID.
    fn two(unit: Unit) -> Self {
        let mut rig = Self::new();
        let unit = rig.fake().add_unit(unit);
        rig.add(FIRST, unit);
        rig.add(SECOND, unit);
        rig
    }

    fn add(&mut self, id: EndpointId, unit: UnitId) -> DeviceId {
        let device = FakeDevice { ats: true, ..FakeDevice::on(unit).with_pasids(8) };
        let device = self.fake().add_device(device);
        self.host.add_endpoint(id, as_is(device)).unwrap();
        device
    }

    fn fake(&self) -> &FakeIommufd<FakeMemory> {
        self.failing().inner()
    }

    fn failing(&self) -> &Failing<FakeIommufd<FakeMemory>> {
        self.kernel.inner()
    }

    fn device(&self, endpoint: EndpointId) -> DeviceId {
        self.host.endpoints[&endpoint].facts.device
    }

    fn read(&self, endpoint: EndpointId, iova: u64) -> Result<u64, DmaFault> {
        self.dma(endpoint, None, iova, Access::READ)
    }

    fn dma(
        &self,
        endpoint: EndpointId,
        pasid: Option<u32>,
        iova: u64,
        access: Access,
    ) -> Result<u64, DmaFault> {
        let pasid = pasid.map(pasid_of);
        let gpa = self.fake().dma_gpa(self.device(endpoint), pasid, iova, access)?;
        Ok(gpa.expect("guest memory").0)
    }

    fn caps(&self, endpoint: EndpointId) -> TableCaps {
        self.host.caps(endpoint).unwrap().tables.clone().expect("guests' tables")
    }

    /// A space of the endpoint's for a table that leads from `iova` to `output`, one page; and what changes the latter.
    fn table(&mut self, endpoint: EndpointId, iova: u64, output: u64) -> (Space<Kernel>, Pages) {
        let caps = self.caps(endpoint);
        let (table, pages) = self.guest.table(&caps, iova, output);
        let space = self.host.create(SpaceSpec::GuestTable { endpoint, table: &table }).unwrap();
        (space, pages)
    }

    fn bind(&mut self, endpoint: EndpointId, space: &mut Space<Kernel>) {
        self.host.bind(Stream::untagged(endpoint), Some(space)).unwrap();
    }

    fn identity(&mut self) -> Space<Kernel> {
        self.host.create(SpaceSpec::Identity).unwrap()
    }

    fn mapped(&mut self) -> Space<Kernel> {
        self.host.create(SpaceSpec::Mapped).unwrap()
    }

    fn count(&self, call: Call) -> u64 {
        self.kernel.counts().of(call)
    }
}

/// A device that nothing is known of but its number.
fn as_is(id: DeviceId) -> Device {
    Device { id, reserved: Vec::new(), may_stall: false, ats: true, pri: false }
}

fn pasid_of(value: u32) -> Pasid {
    Pasid::new(value).unwrap()
}

fn range(start: u64, length: u64) -> IovaRange {
    IovaRange::from_length(Iova(start), length).unwrap()
}

fn mapping(start: u64, length: u64, output: u64, flags: MapFlags) -> Mapping {
    Mapping { range: range(start, length), output: Gpa(output), flags }
}

const READ_WRITE: MapFlags = MapFlags::READ.union(MapFlags::WRITE);

/// All of an endpoint.
const fn all_of(endpoint: EndpointId) -> Invalidation {
    let caches = Caches::all();
    Invalidation { endpoint, scope: Scope::Endpoint, caches, leaf: false, tag: None, global: true }
}

/// One 4 KiB page of untagged accesses.
fn page_of(endpoint: EndpointId, iova: u64) -> Invalidation {
    let scope = Scope::Range { pasid: None, range: range(iova, 0x1000), page_lg2: 12 };
    Invalidation { scope, caches: Caches::TLB, ..all_of(endpoint) }
}

/// Guest memory, and what of it is free for tables.
struct Guest {
    memory: FakeMemory,
    next: u64,
}

/// The page table of one PASID.
enum Pages {
    Smmuv3(pgtable_formats::leaf::vmsav8::Vmsav8),
    Vtd(vtd::FirstStage),
}

impl Guest {
    fn table(&mut self, caps: &TableCaps, iova: u64, output: u64) -> (Canonical, Pages) {
        let root = self.alloc(12).unwrap();
        let (table, pages) = match caps {
            TableCaps::Smmuv3(caps) => {
                let lower = Some(smmuv3::HalfSpec { root, granule: Granule::K4, input_bits: 48 });
                let spec = smmuv3::CdSpec {
                    asid: 7,
                    lower,
                    upper: None,
                    output_bits: caps.oas_bits,
                    ds: false,
                    mair: 0xff,
                };
                let cd = spec.encode(caps).unwrap();
                let (format, untagged) = (smmuv3::TableFormat::Linear, smmuv3::Untagged::Pasid0);
                let table =
                    smmuv3::CdTable::create(format, caps.ssid_bits.min(2), untagged, caps, self).unwrap();
                table.write(self, Pasid::ZERO, &cd).unwrap();
                // With ATS, which a driver asks for in the entry.
                let [word0, word1] = table.words();
                let table = smmuv3::CdTable::from_ste(word0, word1 | 1 << 28, caps).unwrap();
                let context = smmuv3::context_from_cd(&cd.words(), caps, false).unwrap();
                (Canonical::Smmuv3(table), Pages::Smmuv3(*context.half(Iova(0)).unwrap()))
            }
            TableCaps::Vtd(caps) => {
                let table = vtd::FirstStage::new(root, vtd::FirstStageFlags::empty(), 48, caps).unwrap();
                (Canonical::VtdFirstStage(table), Pages::Vtd(table))
            }
        };
        pages.map(self, iova, output);
        (table, pages)
    }
}

impl Pages {
    fn map(&self, guest: &mut Guest, iova: u64, output: u64) {
        let (range, options) = (range(iova, 0x1000), EditOptions::default());
        match self {
            Self::Smmuv3(format) => {
                Editor::new(*format, guest, options).map(range, Gpa(output), Attrs::READ_WRITE)
            }
            Self::Vtd(table) => {
                Editor::new(*table.format(), guest, options).map(range, Gpa(output), Attrs::READ_WRITE)
            }
        }
        .unwrap();
    }

    /// Leads elsewhere, and tells nobody.
    fn remap(&self, guest: &mut Guest, iova: u64, output: u64) {
        let (page, options) =
            (range(iova, 0x1000), EditOptions { keep_tables: true, ..EditOptions::default() });
        match self {
            Self::Smmuv3(format) => Editor::new(*format, guest, options).unmap(page),
            Self::Vtd(table) => Editor::new(*table.format(), guest, options).unmap(page),
        }
        .unwrap();
        self.map(guest, iova, output);
    }
}

impl TableMem for Guest {
    fn load(&self, at: Gpa) -> Result<u64, NotMemory> {
        self.memory.load(at)
    }

    fn compare_exchange(&self, at: Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, NotMemory> {
        self.memory.compare_exchange(at, current, new)
    }
}

impl TableAlloc for Guest {
    fn alloc(&mut self, size_lg2: u8) -> Option<Gpa> {
        let size = 1 << size_lg2.max(12);
        let table = self.next.next_multiple_of(size);
        self.next = table + size;
        (self.next < 0x4080_0000).then_some(Gpa(table))
    }

    fn free(&mut self, _table: Gpa, _size_lg2: u8) {}
}
