//! The VMM's side: the device with its endpoints, in one process with its guest.

use anyhow::Context as _;
use pgtable_formats::context::{smmuv3, vtd};
use viommu_device::host::{EndpointCaps, TableCaps, TableKinds};
use viommu_device::soft::SoftHost;
use viommu_device::{Device, DeviceConfig};
pub(super) use viommu_queue::loopback::Machine;
use viommu_queue::loopback::Memory;
use viommu_wire::{EndpointId, Gpa, Iova, IovaRange, ReservedKind, ReservedRegion};
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// First address of guest memory.
pub(super) const FIRST: Gpa = Gpa(0x4000_0000);
/// Length of guest memory in bytes. It is sparse: what nobody touches takes nothing.
pub(super) const BYTES: u64 = 256 << 20;
/// Last address of guest memory.
pub(super) const LAST: Gpa = Gpa(FIRST.0 + BYTES - 1);

/// Behind an SMMUv3. The story is told with it.
pub(super) const SMMUV3: EndpointId = EndpointId(8);
/// Behind an SMMUv3, too. The ways to map are compared with it.
pub(super) const COMPARED: EndpointId = EndpointId(9);
/// Behind a VT-d unit.
pub(super) const VTD: EndpointId = EndpointId(16);
/// Behind an SMMUv3; its device can wait for memory.
pub(super) const SMMUV3_PAGED: EndpointId = EndpointId(10);
/// Behind a VT-d unit; its device can wait for memory.
pub(super) const VTD_PAGED: EndpointId = EndpointId(17);
/// All of them.
pub(super) const ENDPOINTS: [EndpointId; 5] = [SMMUV3, COMPARED, SMMUV3_PAGED, VTD, VTD_PAGED];
/// Where interrupts of those behind the SMMUv3 are written to: never to be mapped.
pub(super) const MSI: (Iova, Iova) = (Iova(0x800_0000), Iova(0x80f_ffff));

const QUEUE_SIZE: u16 = 512;

/// A machine as after power-on. `strict`: the hardware below caches nothing.
pub(super) fn start(strict: bool) -> anyhow::Result<Machine> {
    let range = (GuestAddress(FIRST.0), usize::try_from(BYTES)?);
    let memory = Memory::over(GuestMemoryMmap::from_ranges(&[range])?);
    let mut host = SoftHost::new(memory.tables().clone());
    host.set_strict(strict);
    let smmuv3 = TableCaps::Smmuv3(smmuv3::Caps::from_registers(smmuv3::IdRegisters::SOFTWARE));
    let vtd = TableCaps::Vtd(vtd::Caps::from_registers(vtd::CapRegisters::SOFTWARE));
    let range = IovaRange::new(MSI.0, MSI.1).context("an empty MSI window")?;
    let msi = ReservedRegion { kind: ReservedKind::Msi, range };
    for endpoint in ENDPOINTS {
        let page_requests = [SMMUV3_PAGED, VTD_PAGED].contains(&endpoint);
        // What real hardware takes as it is, by way of Linux.
        let (tables, native, reserved) = match endpoint {
            VTD | VTD_PAGED => (vtd.clone(), TableKinds::PAGE_TABLE, Vec::new()),
            _ => (smmuv3.clone(), TableKinds::PASID_TABLE, vec![msi]),
        };
        let kinds = TableKinds::all();
        let caps = EndpointCaps { tables: Some(tables), kinds, native, reserved, page_requests };
        host.add_endpoint(endpoint, caps)?;
    }
    Ok(Machine::new(memory, Device::new(DeviceConfig::default(), host)?, QUEUE_SIZE)?)
}
