//! The suite of hosts with two `iommu-testdev`, which write, at once, and are told of a refusal: the host as it is, and
//! with mediation.

use std::sync::LazyLock;

use pgtable_formats::AccessKind;
use viommu_device::mediated::Mediated;
use viommu_host_iommufd::IommufdHost;
use viommu_queue::GuestTables;
use viommu_tests::host_suite::cells::{self, Entry, Hardware, Machine};
use viommu_tests::host_suite::iommufd::{EMULATED, EMULATED_MEDIATED};
use viommu_tests::host_suite::{Ability, Check, Denied, HostUnderTest};

use super::devices::Devices;
use super::kernel::Kernel;
use super::rig::{Drive, Rig, check};

type Native = Rig<Writers, IommufdHost<Kernel>>;
type OverMediation = Rig<Writers, Mediated<IommufdHost<Kernel>, GuestTables>>;

struct Writers;

impl Drive for Writers {
    const DEVICES: [&str; 2] = ["TESTDEV0", "TESTDEV1"];
    const SHOWS_STALE: bool = true;

    fn new(_: &Devices) -> Self {
        Self
    }

    /// One byte is written, and looked for in all data.
    fn access(&mut self, devices: &mut Devices, index: usize, iova: u64, kind: AccessKind) -> Option<u64> {
        assert_eq!(kind, AccessKind::Write);
        devices.write(index, iova)
    }
}

const READS: Denied = (Ability::Reads, "iommu-testdev writes and does not read");
static CANNOT: LazyLock<Vec<Denied>> = LazyLock::new(|| [EMULATED, &[READS]].concat());
static CANNOT_MEDIATED: LazyLock<Vec<Denied>> = LazyLock::new(|| [EMULATED_MEDIATED, &[READS]].concat());

mod native {
    use super::{CANNOT, Check, Native, prove};

    fn prove_native(name: &'static str, check: Check<Native>) {
        prove(name, check, &mut Native::native(&CANNOT), false);
    }

    viommu_tests::host_suite!(
        #[ignore = "needs the lab: tests/lab/run"]
        prove_native
    );
}

mod mediated {
    use super::{CANNOT_MEDIATED, Check, OverMediation, prove};

    fn prove_mediated(name: &'static str, check: Check<OverMediation>) {
        prove(name, check, &mut OverMediation::mediated(&CANNOT_MEDIATED), true);
    }

    viommu_tests::host_suite!(
        #[ignore = "needs the lab: tests/lab/run"]
        prove_mediated
    );
}

fn prove<T: HostUnderTest>(name: &'static str, work: Check<T>, test: &mut T, is_mediated: bool) {
    let machine = Machine::Iommufd(cells::Kernel::Emulated);
    let entry: &Entry = cells::entry(machine, Hardware::Smmuv3, is_mediated);
    entry.takes(test);
    check(name, work, test, &entry.left_out_of(name));
}
