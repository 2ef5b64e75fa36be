//! The rules of iommufd, which [`FakeIommufd`](viommu_host_iommufd::fake::FakeIommufd) keeps as well.

use pgtable_formats::Pasid;
use viommu_host_iommufd::kernel::{DeviceId, ObjectId};
use viommu_tests::kernel_suite;
use viommu_tests::kernel_suite::{KernelUnderTest, PageRequest};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::ioctl::{NO_PASID, TestOp};
use super::kernel::{Flavour, MockKernel};

struct Mocked {
    kernel: MockKernel,
    memory: GuestMemoryMmap,
}

impl Mocked {
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        Self { kernel: MockKernel::open(), memory }
    }
}

impl KernelUnderTest for Mocked {
    type Kernel = MockKernel;

    fn kernel(&self) -> &MockKernel {
        &self.kernel
    }

    fn vtd_device(&mut self) -> DeviceId {
        self.kernel.add_device(Flavour::Vtd)
    }

    fn smmuv3_device(&mut self) -> DeviceId {
        self.kernel.add_device(Flavour::Smmuv3)
    }

    fn memory(&self) -> u64 {
        self.memory.iter().next().unwrap().as_ptr() as u64
    }

    fn leads(&mut self, _: DeviceId, table: ObjectId, iova: u64, user: u64) -> bool {
        self.kernel.leads(table, iova, user)
    }

    fn request_page(&mut self, device: DeviceId, request: PageRequest) {
        let PageRequest { pasid, group, permissions, address } = request;
        let pasid = pasid.map_or(NO_PASID, Pasid::value);
        self.kernel
            .test(TestOp::PageRequest { device: device.0, pasid, group, permissions, address })
            .unwrap();
    }

    fn send_event(&mut self, device: DeviceId) {
        self.kernel.test(TestOp::Event { device: device.0 }).unwrap();
    }

    fn count(&mut self) -> Vec<u32> {
        self.kernel.free_numbers()
    }
}

kernel_suite!(Mocked::new(), ignore = "needs the lab: tests/lab/run");
