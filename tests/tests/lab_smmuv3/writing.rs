//! The suite of hosts with two `iommu-testdev`, which write, at once, and are told of a refusal.

use std::sync::LazyLock;

use pgtable_formats::AccessKind;
use viommu_device::host::{FaultReport, Stream};
use viommu_host_iommufd::IommufdHost;
use viommu_tests::host_suite::iommufd::EMULATED;
use viommu_tests::host_suite::{Ability, Check, Denied, HostUnderTest};
use viommu_tests::rig::{Alloc, Memory};
use viommu_wire::EndpointId;

use super::devices::{self, Devices, forget_faults, next_fault};
use super::kernel::Kernel;

static CANNOT: LazyLock<Vec<Denied>> =
    LazyLock::new(|| [EMULATED, &[(Ability::Reads, "iommu-testdev writes and does not read")]].concat());

struct Writers {
    host: IommufdHost<Kernel>,
    alloc: Alloc,
    devices: Devices,
}

impl Writers {
    fn new() -> Self {
        let (devices, host) = Devices::take(["TESTDEV0", "TESTDEV1"]);
        Self { host, alloc: Alloc::new(&devices.guest), devices }
    }
}

impl HostUnderTest for Writers {
    type Host = IommufdHost<Kernel>;
    type Memory = Alloc;

    fn host(&mut self) -> &mut Self::Host {
        &mut self.host
    }

    fn memory(&mut self) -> &mut Alloc {
        &mut self.alloc
    }

    fn endpoints(&self) -> [EndpointId; 2] {
        self.devices.endpoints
    }

    /// One byte is written, and looked for in all data.
    fn access(&mut self, stream: Stream, iova: u64, kind: AccessKind) -> Option<u64> {
        assert_eq!((stream.pasid, kind), (None, AccessKind::Write));
        forget_faults(&mut self.host);
        self.devices.write(self.devices.index(stream.endpoint), iova)
    }

    fn told(&mut self) -> Option<FaultReport> {
        next_fault(&mut self.host)
    }

    fn page(&self, number: u64) -> u64 {
        Memory::page(number).0
    }

    fn shows_stale(&self) -> bool {
        true
    }

    fn cannot(&self) -> &'static [Denied] {
        &CANNOT
    }
}

fn in_the_lab(name: &'static str, check: Check<Writers>) {
    devices::check(name, check, &mut Writers::new(), left_out);
}

viommu_tests::host_suite!(
    #[ignore = "needs the lab: tests/lab/run"]
    in_the_lab
);

/// What each check leaves out.
fn left_out(check: &str) -> Vec<Ability> {
    use Ability::{BypassBeyondMemory, MappingFaults, PageTables, Pasids, Reads, UnboundFaults, WriteOnly};
    match check {
        "unbound_streams_fault" => vec![Reads, Pasids],
        "identity_leads_where_it_says" => vec![BypassBeyondMemory, Reads, Pasids],
        "mappings_translate_and_permit" => vec![Reads, Pasids],
        "write_only_mappings" => vec![WriteOnly],
        "unmap_takes_effect_at_once" | "bind_replaces_in_one_step" | "what_is_denied_is_refused" => {
            vec![Reads]
        }
        "faults_are_told" => vec![UnboundFaults, MappingFaults],
        "a_table_outside_memory_is_refused"
        | "single_tables_serve_one_pasid"
        | "single_tables_are_stale_until_invalidated" => vec![PageTables],
        "faults_of_tables_are_told" => vec![Reads, Pasids],
        "tables_serve_pasids"
        | "stale_until_invalidated"
        | "invalidation_by_range"
        | "invalidation_of_contexts"
        | "invalidation_by_tag"
        | "rebinding_starts_clean" => vec![Pasids],
        _ => vec![],
    }
}
