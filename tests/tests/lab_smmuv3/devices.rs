//! The lab's devices, and guest memory that they reach.

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pgtable_formats::Iova;
use viommu_device::host::{FaultReport, Host};
use viommu_host_iommufd::engine::{DmaError, Engine};
use viommu_host_iommufd::kernel::DeviceId;
use viommu_host_iommufd::sysfs::{Bdf, Root, reserved_regions};
use viommu_host_iommufd::{Device, IommufdHost};
use viommu_tests::rig::Memory;
use viommu_wire::EndpointId;
use vm_memory::{Bytes, GuestAddress};

use super::kernel::Kernel;

/// How long an event of the kernel may take. It is there before the access ends, unless its thread was held up.
const PATIENCE: Duration = Duration::from_millis(50);

/// Bytes of guest memory, and of that part of it, at its start, which data lies in.
pub(crate) const MEMORY: usize = 16 << 20;
pub(crate) const DATA: usize = 1 << 20;

/// Two devices of a kind that do DMA when told, and a kernel that has them. What is dropped last lets go of them.
pub(crate) struct Devices {
    pub(crate) engines: [Box<dyn Engine>; 2],
    pub(crate) ids: [DeviceId; 2],
    pub(crate) endpoints: [EndpointId; 2],
    pub(crate) guest: Memory,
    pub(crate) kernel: Arc<Kernel>,
}

impl Devices {
    /// Takes the devices that these variables name, and makes a host with both of them as endpoints of this memory.
    pub(crate) fn take(variables: [&str; 2], guest: Memory) -> (Self, IommufdHost<Kernel>) {
        let names = variables.map(|variable| {
            std::env::var(variable).unwrap_or_else(|_| panic!("{variable} names a device, in the lab"))
        });
        let kernel = Arc::new(Kernel::open());
        let mut host = IommufdHost::new(Arc::clone(&kernel), guest.map()).unwrap();
        let bound = names.map(|name| {
            let bdf: Bdf = name.parse().unwrap();
            let id = kernel.take(&Path::new("/sys/bus/pci/devices").join(&name));
            let reserved = reserved_regions(&Root::here(), bdf).unwrap();
            let endpoint = EndpointId(bdf.requester.into());
            host.add_endpoint(endpoint, Device { id, reserved, may_stall: false, ats: false, pri: false })
                .unwrap();
            (endpoint, id, kernel.engine(id))
        });
        let endpoints = bound.each_ref().map(|(endpoint, ..)| *endpoint);
        let ids = bound.each_ref().map(|(_, id, _)| *id);
        let engines = bound.map(|(.., engine)| engine);
        (Self { engines, ids, endpoints, guest, kernel }, host)
    }

    pub(crate) fn index(&self, endpoint: EndpointId) -> usize {
        self.endpoints.iter().position(|id| *id == endpoint).expect("an endpoint of these")
    }

    /// Where a write of one byte leads; `None` where it is refused. For devices that tell, and data that is all zeros,
    /// which it is again afterwards.
    pub(crate) fn write(&mut self, index: usize, iova: u64) -> Option<u64> {
        let outcome = self.engines[index].write(Iova(iova), 1);
        let reached = self.written();
        match outcome {
            Ok(()) => assert!(!reached.is_empty(), "{iova:#x} leads to what is no data"),
            Err(DmaError::Faulted) => assert_eq!(reached, [0; 0], "{iova:#x} was refused, and written"),
            Err(error) => panic!("{iova:#x}: {error}"),
        }
        assert!(reached.len() < 2, "{iova:#x} leads to {reached:#x?}");
        for at in &reached {
            self.guest.map().write_obj(0u8, GuestAddress(*at)).unwrap();
        }
        reached.first().copied()
    }

    /// The addresses of data that is not zero.
    fn written(&self) -> Vec<u64> {
        let mut written = Vec::new();
        let mut page = [0u8; 0x1000];
        for start in (Memory::BASE..Memory::BASE + DATA as u64).step_by(page.len()) {
            self.guest.map().read_slice(&mut page, GuestAddress(start)).unwrap();
            if page.iter().fold(0, |any, byte| any | byte) != 0 {
                let bytes = page.iter().zip(start..);
                written.extend(bytes.filter(|(byte, _)| **byte != 0).map(|(_, at)| at));
            }
        }
        written
    }

    /// Fills the data part of memory.
    pub(crate) fn fill(&self, data: &[u8]) {
        assert_eq!(data.len(), DATA);
        self.guest.map().write_slice(data, GuestAddress(Memory::BASE)).unwrap();
    }

    /// What is there.
    pub(crate) fn data(&self) -> Vec<u8> {
        let mut data = vec![0; DATA];
        self.guest.map().read_slice(&mut data, GuestAddress(Memory::BASE)).unwrap();
        data
    }
}

/// The next fault that the kernel tells, waiting for it.
pub(crate) fn next_fault(host: &mut impl Host) -> Option<FaultReport> {
    let start = Instant::now();
    loop {
        let fault = host.next_fault();
        if fault.is_some() || start.elapsed() >= PATIENCE {
            return fault;
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Forgets what was told.
pub(crate) fn forget_faults(host: &mut impl Host) {
    while host.next_fault().is_some() {}
}
