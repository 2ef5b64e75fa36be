//! On `IommufdHost` over a kernel that is made up, as it takes tables and with mediation. VT-d hands page requests on;
//! behind an SMMUv3 Linux lets no PCI device ask for pages, so there the memory is pinned.

use pgtable_formats::{AccessKind, Gpa};
use viommu_device::host::{Host, Stream};
use viommu_device::mediated::{Mediated, MediationLimits, Window};
use viommu_device::{Device, DeviceConfig};
use viommu_guest::hal::Parts;
use viommu_guest::tables::Style;
use viommu_guest::{Driver, DriverOptions};
use viommu_host_iommufd::fake::{DmaFault, FakeDevice, Kernel as Version, Unit};
use viommu_queue::loopback::{Alloc, Machine, Memory, Transport};
use viommu_tests::host_suite::iommufd::{ENDPOINTS, Fakes, Layout, SMMUV3, VTD};
use viommu_tests::host_suite::memory::{WINDOW, with_window};
use viommu_tests::rig::Guest;
use viommu_wire::numbers;

use super::kill::{Access, Cell, Hardware, Progress, kill};

const MEMORY_BYTES: usize = 64 << 20;
const WINDOW_BYTES: usize = 1 << 20;

#[test]
fn processes_die_behind_an_smmuv3() {
    native(Unit::smmuv3(), numbers::FORMAT_ARM_SMMU3, false);
}

#[test]
fn processes_die_behind_an_smmuv3_page_table_by_page_table() {
    mediated(Unit::smmuv3(), Style::Single, numbers::FORMAT_ARM_PT, false);
}

#[test]
fn processes_die_behind_vtd() {
    native(Unit::vtd(), numbers::FORMAT_INTEL_PT, true);
}

#[test]
fn processes_die_behind_vtd_with_a_table_of_their_own_making() {
    mediated(Unit::vtd(), Style::Table, numbers::FORMAT_INTEL_PASID_TABLE, true);
}

#[test]
fn processes_die_behind_vtd_in_pinned_memory() {
    native(Unit::vtd(), numbers::FORMAT_INTEL_PT, false);
}

/// The guest finds what is native by itself.
fn native(unit: Unit, format: u8, pri: bool) {
    let mut fakes = fakes(Memory::new(MEMORY_BYTES), unit, pri);
    let host = fakes.host.take().expect("a host that was made");
    run(fakes, host, Style::Preferred, format, pri);
}

fn mediated(unit: Unit, style: Style, format: u8, pri: bool) {
    let (guest, tables) = with_window(MEMORY_BYTES, WINDOW_BYTES);
    let mut fakes = fakes(guest, unit, pri);
    let host = fakes.host.take().expect("a host that was made");
    let window = Window::new(Gpa(WINDOW), WINDOW_BYTES as u64);
    let host = Mediated::new(host, tables, window, MediationLimits::DEFAULT).expect("a window");
    run(fakes, host, style, format, pri);
}

fn fakes(guest: Memory, unit: Unit, pri: bool) -> Fakes {
    let device = |unit| FakeDevice { ats: pri, pri, ..FakeDevice::on(unit).with_pasids(16) };
    let cannot = if matches!(unit, Unit::Vtd(_)) { VTD } else { SMMUV3 };
    let mut fakes = Fakes::on_kernel(Version::NEWEST, guest, unit, Layout::OneUnit, device, cannot);
    fakes.start().expect("a host");
    fakes.add(0).expect("an endpoint");
    fakes
}

fn run<H: Host>(fakes: Fakes, host: H, style: Style, format: u8, has_page_requests: bool) {
    let device = Device::new(DeviceConfig::default(), host).expect("a configuration");
    let memory = fakes.guest.clone();
    let machine = Machine::new(memory.clone(), device, 1024).expect("a queue size");
    let half = MEMORY_BYTES as u64 / 2;
    let alloc = Alloc::within(&memory, Gpa(Memory::BASE + half), Gpa(Memory::BASE + 2 * half - 1));
    let platform = Parts { memory, alloc };
    let driver =
        Driver::new(platform, Transport::new(machine.clone()), DriverOptions::default()).expect("a driver");
    let cell = Cell { endpoint: ENDPOINTS[0].0, style, format, has_page_requests };
    kill(cell, Guest { driver, machine }, Fake { fakes, host: core::marker::PhantomData::<H> });
}

struct Fake<H> {
    fakes: Fakes,
    host: core::marker::PhantomData<H>,
}

impl<H: Host> Hardware for Fake<H> {
    type Host = H;
    type Ticket = ();

    const SHARES_ANSWERS: bool = true;

    /// Page by page, as PCIe has it: what is there already is asked for again after the answer for the rest.
    fn go_on(&mut self, _: &Machine<H>, stream: Stream, access: &mut Access<()>) -> Progress {
        let kinds = [(access.reads, AccessKind::Read), (access.writes, AccessKind::Write)];
        let mut pieces = Vec::new();
        let last = access.iova + access.length as u64 - 1;
        let mut at = access.iova;
        access.ticket = None;
        while at <= last {
            let end = last.min(at | 0xfff);
            for (_, kind) in kinds.iter().filter(|(wanted, _)| *wanted) {
                match self.fakes.dma(stream, at, *kind) {
                    Ok(base) if pieces.last().is_none_or(|(known, _)| *known != base) => {
                        pieces.push((base, (end - at + 1) as usize));
                    }
                    Ok(_) => {}
                    Err(DmaFault::Stalled) => {
                        access.ticket = Some(());
                        return Progress::Waits;
                    }
                    Err(_) => return Progress::Fails,
                }
            }
            at = end + 1;
        }
        Progress::Done(pieces)
    }

    fn held(&mut self, _: &Machine<H>) -> usize {
        assert_eq!(self.fakes.fake.violations(), [""; 0]);
        let faults = self.fakes.fake.take_host_faults();
        assert!(
            faults.iter().all(|(_, fault)| !matches!(fault, DmaFault::Stage2(_))),
            "nobody leaves guest memory: {faults:?}"
        );
        self.fakes.fake.objects()
    }
}
