//! The suite of hosts on each host there is.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests")]

use pgtable_formats::{Access, AccessKind, Iova};
use viommu_device::host::{Host, Stream};
use viommu_device::soft::SoftHost;
use viommu_queue::GuestTables;
use viommu_tests::host_suite::HostUnderTest;
use viommu_tests::rig::{Alloc, Memory, default_endpoints};
use viommu_wire::EndpointId;

/// The software host, and two of its endpoints.
struct Soft {
    host: SoftHost<GuestTables>,
    memory: Alloc,
    endpoints: [EndpointId; 2],
}

impl Soft {
    fn new(first: u32, second: u32, strict: bool) -> Self {
        let memory = Memory::new(64 << 20);
        let mut host = SoftHost::new(memory.tables().clone());
        host.set_strict(strict);
        for (id, caps) in default_endpoints() {
            host.add_endpoint(EndpointId(id), caps).expect("an endpoint");
        }
        Self { host, memory: Alloc::new(&memory), endpoints: [first, second].map(EndpointId) }
    }
}

impl HostUnderTest for Soft {
    type Host = SoftHost<GuestTables>;
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
        let output = self.host.translate(stream, Iova(iova), access, |piece| piece.output.0).ok();
        // A fault is told, once, and nothing else is.
        assert_eq!(self.host.next_fault().is_some(), output.is_none());
        output
    }

    fn page(&self, number: u64) -> u64 {
        Memory::page(number).0
    }

    fn shows_stale(&self) -> bool {
        !self.host.is_strict()
    }
}

mod smmuv3 {
    viommu_tests::host_suite!(super::Soft::new(8, 9, false));
}

mod vtd {
    viommu_tests::host_suite!(super::Soft::new(16, 17, false));
}

mod strict_smmuv3 {
    viommu_tests::host_suite!(super::Soft::new(8, 9, true));
}

mod strict_vtd {
    viommu_tests::host_suite!(super::Soft::new(16, 17, true));
}

mod without_tables {
    viommu_tests::host_suite!(super::Soft::new(24, 25, false));
}
