//! Two of the lab's devices and a host over them, as a [`HostUnderTest`].

use std::collections::BTreeSet;
use std::time::Instant;

use pgtable_formats::{AccessKind, Gpa};
use viommu_device::host::{FaultReport, Host, Stream};
use viommu_device::mediated::{Mediated, MediationLimits, Window};
use viommu_host_iommufd::IommufdHost;
use viommu_queue::GuestTables;
use viommu_tests::host_suite::memory::{WINDOW, memory, with_window};
use viommu_tests::host_suite::{Ability, Check, Denied, HostUnderTest, run};
use viommu_tests::rig::{Alloc, Memory};
use viommu_wire::EndpointId;

use super::devices::{Devices, MEMORY, forget_faults, next_fault};
use super::kernel::Kernel;

/// Bytes for tables of the device's own.
const WINDOW_BYTES: usize = 1 << 20;

/// How devices are made to access memory, and how it is found out what they reached.
pub(crate) trait Drive: Sized {
    /// The variables that name two devices of this kind.
    const DEVICES: [&str; 2];
    /// Whether what they do leaves cached translations alone.
    const SHOWS_STALE: bool;

    fn new(devices: &Devices) -> Self;

    /// Where an access of one of them leads; `None` where it is refused.
    fn access(&mut self, devices: &mut Devices, index: usize, iova: u64, kind: AccessKind) -> Option<u64>;
}

/// See the [module](self). What is dropped last lets go of the devices.
pub(crate) struct Rig<D, H> {
    host: H,
    drive: D,
    alloc: Alloc,
    devices: Devices,
    cannot: &'static [Denied],
}

impl<D: Drive> Rig<D, IommufdHost<Kernel>> {
    pub(crate) fn native(cannot: &'static [Denied]) -> Self {
        let (devices, host) = Devices::take(D::DEVICES, Memory::over(memory(MEMORY)));
        Self::over(devices, host, cannot)
    }
}

impl<D: Drive> Rig<D, Mediated<IommufdHost<Kernel>, GuestTables>> {
    pub(crate) fn mediated(cannot: &'static [Denied]) -> Self {
        let (guest, tables) = with_window(MEMORY, WINDOW_BYTES);
        let (devices, host) = Devices::take(D::DEVICES, guest);
        let window = Window::new(Gpa(WINDOW), WINDOW_BYTES as u64);
        let host = Mediated::new(host, tables, window, MediationLimits::DEFAULT).unwrap();
        Self::over(devices, host, cannot)
    }
}

impl<D: Drive, H: Host> Rig<D, H> {
    fn over(devices: Devices, host: H, cannot: &'static [Denied]) -> Self {
        let middle = Memory::BASE + MEMORY as u64 / 2;
        let last = Memory::BASE + MEMORY as u64 - 1;
        let alloc = Alloc::within(&devices.guest, Gpa(middle), Gpa(last));
        Self { host, drive: D::new(&devices), alloc, devices, cannot }
    }
}

impl<D: Drive, H: Host> HostUnderTest for Rig<D, H> {
    type Host = H;
    type Memory = Alloc;

    fn host(&mut self) -> &mut H {
        &mut self.host
    }

    fn memory(&mut self) -> &mut Alloc {
        &mut self.alloc
    }

    fn endpoints(&self) -> [EndpointId; 2] {
        self.devices.endpoints
    }

    fn access(&mut self, stream: Stream, iova: u64, kind: AccessKind) -> Option<u64> {
        assert_eq!(stream.pasid, None);
        forget_faults(&mut self.host);
        let index = self.devices.index(stream.endpoint);
        self.drive.access(&mut self.devices, index, iova, kind)
    }

    fn told(&mut self) -> Option<FaultReport> {
        next_fault(&mut self.host)
    }

    fn page(&self, number: u64) -> u64 {
        Memory::page(number).0
    }

    fn shows_stale(&self) -> bool {
        D::SHOWS_STALE
    }

    fn cannot(&self) -> &'static [Denied] {
        self.cannot
    }
}

/// Runs one check of the suite, and compares what it left out.
pub(crate) fn check<T: HostUnderTest>(
    name: &'static str,
    check: Check<T>,
    test: &mut T,
    expected: &BTreeSet<Ability>,
) {
    let start = Instant::now();
    let skipped = run(name, check, test);
    println!("{name}: {:.1?}", start.elapsed());
    assert_eq!(skipped, *expected, "what {name} leaves out");
}
