//! The suite of hosts on each host there is.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests")]

use pgtable_formats::{Access, AccessKind, Iova};
use viommu_device::host::{FaultReport, Host, Stream};
use viommu_device::soft::SoftHost;
use viommu_queue::GuestTables;
use viommu_tests::host_suite::{Ability, Denied, HostUnderTest, skips};
use viommu_tests::rig::{Alloc, Memory, default_endpoints};
use viommu_wire::EndpointId;

/// The software host, and two of its endpoints.
struct Soft {
    host: SoftHost<GuestTables>,
    memory: Alloc,
    endpoints: [EndpointId; 2],
    cannot: &'static [Denied],
    told: Option<FaultReport>,
}

impl Soft {
    fn new(first: u32, second: u32, strict: bool, cannot: &'static [Denied]) -> Self {
        let memory = Memory::new(64 << 20);
        let mut host = SoftHost::new(memory.tables().clone());
        host.set_strict(strict);
        for (id, caps) in default_endpoints() {
            host.add_endpoint(EndpointId(id), caps).expect("an endpoint");
        }
        let endpoints = [first, second].map(EndpointId);
        Self { host, memory: Alloc::new(&memory), endpoints, cannot, told: None }
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
        !self.host.is_strict()
    }

    fn cannot(&self) -> &'static [Denied] {
        self.cannot
    }
}

const ARM: &[Denied] = &[];
const INTEL: &[Denied] = &[(Ability::Tags, "VT-d has no tag but the PASID")];
const NO_TABLES: &[Denied] = &[
    (Ability::PasidTables, "the endpoint takes no tables"),
    (Ability::PageTables, "the endpoint takes no tables"),
    (Ability::Tags, "the endpoint takes no tables"),
];

mod smmuv3 {
    viommu_tests::host_suite!(super::Soft::new(8, 9, false, super::ARM));
}

mod vtd {
    viommu_tests::host_suite!(super::Soft::new(16, 17, false, super::INTEL));
}

mod strict_smmuv3 {
    viommu_tests::host_suite!(super::Soft::new(8, 9, true, super::ARM));
}

mod strict_vtd {
    viommu_tests::host_suite!(super::Soft::new(16, 17, true, super::INTEL));
}

mod without_tables {
    viommu_tests::host_suite!(super::Soft::new(24, 25, false, super::NO_TABLES));
}

/// Nothing is left out but what has to be.
#[test]
fn skips_are_these() {
    assert_eq!(skips(|| Soft::new(8, 9, false, ARM)), []);
    assert_eq!(skips(|| Soft::new(16, 17, false, INTEL)), [("invalidation_by_tag", Ability::Tags)]);
    let all = [
        ("a_table_outside_memory_is_refused", Ability::PasidTables),
        ("a_table_outside_memory_is_refused", Ability::PageTables),
        ("tables_serve_pasids", Ability::PasidTables),
        ("single_tables_serve_one_pasid", Ability::PageTables),
        ("single_tables_are_stale_until_invalidated", Ability::PageTables),
        ("stale_until_invalidated", Ability::PasidTables),
        ("invalidation_by_range", Ability::PasidTables),
        ("invalidation_of_contexts", Ability::PasidTables),
        ("invalidation_by_tag", Ability::Tags),
        ("rebinding_starts_clean", Ability::PasidTables),
        ("faults_of_tables_are_told", Ability::PasidTables),
    ];
    assert_eq!(skips(|| Soft::new(24, 25, false, NO_TABLES)), all);
}
