//! The rules of iommufd on the stand-in for machines without hardware. `lab_mock` runs them on the kernel itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests")]

use pgtable_formats::{Access, Pasid};
use viommu_host_iommufd::fake::{FakeDevice, FakeIommufd, FakeMemory, Unit, UnitId};
use viommu_host_iommufd::kernel::{Backing, DeviceId, ObjectId};
use viommu_tests::kernel_suite;
use viommu_tests::kernel_suite::{KernelUnderTest, PageRequest};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

struct Fake {
    kernel: FakeIommufd<FakeMemory>,
    vtd: UnitId,
    smmuv3: UnitId,
    memory: GuestMemoryMmap,
}

impl Fake {
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0x4000_0000), 0x1_0000)]).unwrap();
        let kernel = FakeIommufd::new(FakeMemory::new(&memory));
        let (vtd, smmuv3) = (kernel.add_unit(Unit::vtd()), kernel.add_unit(Unit::smmuv3()));
        Self { kernel, vtd, smmuv3, memory }
    }
}

impl KernelUnderTest for Fake {
    type Kernel = FakeIommufd<FakeMemory>;

    fn kernel(&self) -> &Self::Kernel {
        &self.kernel
    }

    fn vtd_device(&mut self) -> DeviceId {
        self.kernel.add_device(FakeDevice {
            ats: true,
            pri: true,
            ..FakeDevice::on(self.vtd).with_pasids(20)
        })
    }

    fn smmuv3_device(&mut self) -> DeviceId {
        self.kernel.add_device(FakeDevice::on(self.smmuv3))
    }

    fn memory(&self) -> u64 {
        self.memory.iter().next().unwrap().as_ptr() as u64
    }

    fn leads(&mut self, device: DeviceId, table: ObjectId, iova: u64, user: u64) -> bool {
        assert_eq!(self.kernel.attached(device, None), Some(table));
        self.kernel.dma(device, None, iova, Access::READ) == Ok(Backing::Memory(user))
    }

    fn request_page(&mut self, device: DeviceId, request: PageRequest) {
        let PageRequest { pasid, group, permissions, address } = request;
        self.kernel.page_request(device, pasid.map(Pasid::value), group, address, permissions, true);
    }

    fn send_event(&mut self, device: DeviceId) {
        self.kernel.dma(device, None, 0x1000, Access::WRITE).expect_err("no context");
    }

    fn count(&mut self) -> Vec<u32> {
        vec![self.kernel.objects().try_into().unwrap()]
    }
}

kernel_suite!(Fake::new());
