//! The VMM's side: memory, device, queues, and the DMA of endpoints, in numbers.

use std::ops::Deref;

use pgtable_formats::context::{smmuv3 as smmu, vtd as dmar};
use pgtable_formats::{Access, AccessKind};
use viommu_device::host::{EndpointCaps, FaultCause, Stream, TableCaps};
use viommu_device::soft::SoftHost;
use viommu_device::{Device, DeviceConfig};
use viommu_guest::hal::QueueLayout;
use viommu_queue::loopback::{self, place_queue};
use viommu_queue::{GuestTables, StreamIommu, VirtioIommu};
use viommu_wire::numbers::EVENT_QUEUE;
use viommu_wire::{EndpointId, Features, Iova, IovaRange, Pasid, ReservedKind, ReservedRegion};
use vm_memory::{GuestMemoryMmap, IommuMemory};

use super::bare::soft_host;
use super::{Alloc, Memory};

/// The device with its queues.
pub type Iommu = VirtioIommu<SoftHost<GuestTables>>;

/// How a machine is made.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The device.
    pub config: DeviceConfig,
    /// Its endpoints.
    pub endpoints: Vec<(u32, EndpointCaps)>,
    /// What a driver accepts of what is offered; `None`: all.
    pub accept: Option<Features>,
    /// Largest size of each queue.
    pub queue_size: u16,
    /// Bytes of memory from [`Memory::BASE`] on.
    pub memory_bytes: usize,
}

impl Default for Setup {
    /// [`default_endpoints`], everything offered and accepted, 64 MiB.
    fn default() -> Self {
        Self {
            config: DeviceConfig::default(),
            endpoints: default_endpoints(),
            accept: None,
            queue_size: 1024,
            memory_bytes: 64 << 20,
        }
    }
}

impl Setup {
    /// With other features offered.
    pub fn offering(features: Features) -> Self {
        Self { config: DeviceConfig { features, ..DeviceConfig::default() }, ..Self::default() }
    }

    /// With `features` accepted, and VERSION_1.
    pub fn accepting(features: Features) -> Self {
        Self { accept: Some(features), ..Self::default() }
    }
}

/// 8 and 9: SMMUv3 tables, an MSI window at 0x8000000-0x80fffff. 16 and 17: VT-d tables. 24: no tables. 25: no tables,
/// reserved 0x100000-0x10ffff.
pub fn default_endpoints() -> Vec<(u32, EndpointCaps)> {
    let msi = reserved(ReservedKind::Msi, 0x800_0000, 0x80f_ffff);
    let hole = reserved(ReservedKind::Reserved, 0x10_0000, 0x10_ffff);
    let caps = |tables, reserved| EndpointCaps { tables, reserved, ..EndpointCaps::default() };
    vec![
        (8, caps(Some(smmuv3()), vec![msi])),
        (9, caps(Some(smmuv3()), vec![msi])),
        (16, caps(Some(vtd()), vec![])),
        (17, caps(Some(vtd()), vec![])),
        (24, caps(None, vec![])),
        (25, caps(None, vec![hole])),
    ]
}

/// A reserved region.
pub fn reserved(kind: ReservedKind, start: u64, last: u64) -> ReservedRegion {
    ReservedRegion { kind, range: IovaRange::new(Iova(start), Iova(last)).expect("an ordered range") }
}

/// An SMMUv3 that has all that the walker has.
pub fn smmuv3() -> TableCaps {
    TableCaps::Smmuv3(smmu::Caps::from_registers(smmu::IdRegisters::SOFTWARE))
}

/// A VT-d unit that has all that the walker has.
pub fn vtd() -> TableCaps {
    TableCaps::Vtd(dmar::Caps::from_registers(dmar::CapRegisters::SOFTWARE))
}

/// The VMM's side. Clones share everything.
#[derive(Clone)]
pub struct Machine {
    inner: loopback::Machine,
    endpoints: Vec<u32>,
}

impl Deref for Machine {
    type Target = loopback::Machine;

    fn deref(&self) -> &loopback::Machine {
        &self.inner
    }
}

impl Machine {
    /// A machine whose device is as after power-on.
    pub fn new(setup: Setup) -> Self {
        let (host, memory) = soft_host(&setup);
        let device = Device::new(setup.config, host).expect("a configuration");
        let inner = loopback::Machine::new(memory, device, setup.queue_size).expect("a queue size");
        Self { inner, endpoints: setup.endpoints.iter().map(|&(id, _)| id).collect() }
    }

    /// An allocator over the upper half of memory. Only one may be in use at a time.
    pub fn alloc(&self) -> Alloc {
        Alloc::new(self.memory())
    }

    /// Tells the device where a queue lies, whatever is there: one that cannot be is not ready, or fails when it is
    /// kicked. `false`: there is no such queue.
    pub fn enable_queue(&self, index: u16, layout: QueueLayout) -> bool {
        let mut iommu = self.lock();
        let queue = iommu.queue_mut(usize::from(index));
        queue.map(|queue| place_queue(queue, layout).is_ok()).is_some()
    }

    /// The driver's notification: the device does all there is to do.
    pub fn notify(&self, index: u16) {
        let _ = self.kick(index).expect("a usable queue");
    }

    /// What a VMM does when an endpoint met a fault.
    pub fn deliver_events(&self) {
        self.notify(EVENT_QUEUE);
    }

    /// Guest memory through the IOMMU, as a device of the VMM that is behind it has it.
    pub fn dma(&self, endpoint: u32, pasid: Option<u32>) -> IommuMemory<GuestMemoryMmap, StreamIommu<Iommu>> {
        self.behind(stream(endpoint, pasid))
    }

    /// Where an access leads. A fault is recorded, as that of any device.
    ///
    /// # Errors
    /// Why it faults.
    pub fn access(
        &self,
        endpoint: u32,
        pasid: Option<u32>,
        iova: u64,
        kind: AccessKind,
    ) -> Result<u64, FaultCause> {
        let access = Access { kind, privileged: false };
        let mut iommu = self.lock();
        let host = iommu.device_mut().host_mut();
        host.translate(stream(endpoint, pasid), Iova(iova), access, |piece| piece.output.0)
    }

    /// The same without a record of the fault.
    ///
    /// # Errors
    /// Why it would fault.
    pub fn peek(
        &self,
        endpoint: u32,
        pasid: Option<u32>,
        iova: u64,
        kind: AccessKind,
    ) -> Result<u64, FaultCause> {
        let access = Access { kind, privileged: false };
        self.leads(stream(endpoint, pasid), Iova(iova), access).map(|at| at.0)
    }

    /// Where an untagged read leads, unless it would fault.
    pub fn read(&self, endpoint: u32, iova: u64) -> Option<u64> {
        self.peek(endpoint, None, iova, AccessKind::Read).ok()
    }

    /// Where an untagged write leads, unless it would fault.
    pub fn write(&self, endpoint: u32, iova: u64) -> Option<u64> {
        self.peek(endpoint, None, iova, AccessKind::Write).ok()
    }

    /// Where a read with a PASID leads, unless it would fault.
    pub fn read_with(&self, endpoint: u32, pasid: u32, iova: u64) -> Option<u64> {
        self.peek(endpoint, Some(pasid), iova, AccessKind::Read).ok()
    }

    /// Everything that a guest, or the devices behind the IOMMU, can notice: features, configuration, and where
    /// accesses of every endpoint lead, at the ends of the pages that tests use. Empties the caches.
    pub fn snapshot(&self) -> Vec<String> {
        let mut seen = Vec::new();
        {
            let mut iommu = self.lock();
            let device = iommu.device_mut();
            let mut config = [0; viommu_wire::Config::LEN];
            device.read_config(0, &mut config);
            seen.push(format!("{:?} {config:?}", device.features()));
            seen.push(format!("{} domains, {} mappings", device.domain_count(), device.mapping_count()));
            device.host_mut().flush();
        }
        let pages = (0..16).map(|page| page << 12);
        let places =
            pages.chain([0x10_0000, 0x800_0000, Memory::BASE, (1 << 47) - 0x1000, (1 << 48) - 0x1000]);
        let iovas: Vec<u64> =
            places.flat_map(|page| [page, page + 0xfff]).chain([1 << 48, u64::MAX]).collect();
        for &endpoint in &self.endpoints {
            for pasid in [None, Some(0), Some(1), Some(5), Some(7)] {
                for &iova in &iovas {
                    let read = self.peek(endpoint, pasid, iova, AccessKind::Read);
                    let write = self.peek(endpoint, pasid, iova, AccessKind::Write);
                    seen.push(format!("{endpoint} {pasid:?} {iova:#x}: {read:x?} {write:x?}"));
                }
            }
        }
        seen
    }
}

fn stream(endpoint: u32, pasid: Option<u32>) -> Stream {
    Stream { endpoint: EndpointId(endpoint), pasid: pasid.map(|pasid| Pasid::new(pasid).expect("20 bits")) }
}
