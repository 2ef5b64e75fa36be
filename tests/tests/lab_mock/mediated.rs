//! Mediation over [`IommufdHost`] on the mock: the suite of hosts, with both kinds of tables.

use pgtable_formats::AccessKind;
use viommu_device::host::Stream;
use viommu_device::mediated::{Mediated, MediationLimits, Window};
use viommu_host_iommufd::IommufdHost;
use viommu_queue::GuestTables;
use viommu_tests::host_suite::cells::{self, Hardware, Machine};
use viommu_tests::host_suite::{Ability, Denied, HostUnderTest};
use viommu_tests::rig::{Alloc, Memory};
use viommu_wire::EndpointId;

use super::kernel::{Flavour, MockKernel};
use super::mocks::{ENDPOINTS, Mocks};

/// First page of the window: behind the data, before the tables.
const WINDOW_PAGE: u64 = 0x400;
const WINDOW_BYTES: u64 = 1 << 20;

struct Through {
    host: Mediated<IommufdHost<MockKernel>, GuestTables>,
    /// What is below; its host was taken out.
    mocks: Mocks,
    cannot: Vec<Denied>,
}

impl Through {
    fn new(flavour: Flavour) -> Self {
        let mut mocks = Mocks::impatient(flavour);
        let host = mocks.host.take().expect("a host that was made");
        let window = Window::new(Memory::page(WINDOW_PAGE), WINDOW_BYTES);
        let tables = GuestTables::new(&mocks.map);
        let host = Mediated::new(host, tables, window, MediationLimits::DEFAULT).expect("a window");
        let made = [Ability::PageTables, Ability::PasidTables];
        let cannot = mocks.cannot().iter().filter(|(ability, _)| !made.contains(ability));
        Self { host, cannot: cannot.copied().collect(), mocks }
    }
}

impl HostUnderTest for Through {
    type Host = Mediated<IommufdHost<MockKernel>, GuestTables>;
    type Memory = Alloc;

    fn host(&mut self) -> &mut Self::Host {
        &mut self.host
    }

    fn memory(&mut self) -> &mut Alloc {
        &mut self.mocks.memory
    }

    fn endpoints(&self) -> [EndpointId; 2] {
        ENDPOINTS
    }

    fn access(&mut self, stream: Stream, iova: u64, kind: AccessKind) -> Option<u64> {
        self.mocks.access(stream, iova, kind)
    }

    fn page(&self, number: u64) -> u64 {
        Memory::page(number).0
    }

    fn shows_stale(&self) -> bool {
        false
    }

    fn cannot(&self) -> &[Denied] {
        &self.cannot
    }
}

fn prove(flavour: Flavour, hardware: Hardware) {
    cells::entry(Machine::Iommufd(cells::Kernel::Mock), hardware, true).prove(|| Through::new(flavour));
}

/// A table of PASIDs natively, a page table by the window.
#[test]
#[ignore = "needs the lab: tests/lab/run"]
fn suite_of_hosts_as_smmuv3() {
    prove(Flavour::Smmuv3, Hardware::Smmuv3);
}

/// A page table for each PASID natively, a table of them by what it holds.
#[test]
#[ignore = "needs the lab: tests/lab/run"]
fn suite_of_hosts_as_vtd() {
    prove(Flavour::Vtd, Hardware::Vtd);
}

/// What mediation has made is given back.
#[test]
#[ignore = "needs the lab: tests/lab/run"]
fn nothing_is_left() {
    for flavour in [Flavour::Smmuv3, Flavour::Vtd] {
        let mut test = Through::new(flavour);
        viommu_tests::host_suite::run(
            "tables_serve_pasids",
            viommu_tests::host_suite::tables_serve_pasids,
            &mut test,
        );
        let Through { host, mocks, .. } = test;
        drop(host.into_inner());
        assert_eq!(mocks.kernel.free_numbers(), mocks.free);
        for device in mocks.devices {
            mocks.kernel.remove_device(device);
        }
    }
}
