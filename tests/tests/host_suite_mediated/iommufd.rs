//! The suite through a kernel that is made up. The window is memory that devices can read and not write.

use std::sync::Arc;

use nix::libc;
use pgtable_formats::format::Attrs;
use pgtable_formats::{AccessKind, Gpa};
use viommu_device::host::{Host, SpaceSpec, Stream};
use viommu_device::mediated::{Mediated, MediationLimits, Window};
use viommu_host_iommufd::IommufdHost;
use viommu_host_iommufd::fake::{FakeDevice, Kernel as Version, Unit};
use viommu_queue::GuestTables;
use viommu_tests::host_suite::iommufd::{ENDPOINTS, Fakes, Kernel, Layout};
use viommu_tests::host_suite::{Ability, Denied, HostUnderTest, skips};
use viommu_tests::rig::{Alloc, Memory};
use viommu_tests::tables::PageTable;
use viommu_wire::EndpointId;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

const MEMORY_BYTES: usize = 64 << 20;
const WINDOW: u64 = 0x8000_0000;
const WINDOW_BYTES: usize = 1 << 20;

struct Through {
    fakes: Fakes,
    host: Mediated<IommufdHost<Kernel>, GuestTables>,
    cannot: &'static [Denied],
}

/// Memory as the kernel is given it, and as the device writes it.
fn memories() -> (Memory, GuestTables) {
    let path = std::env::temp_dir().join(format!(
        "viommu-window-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    ));
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .expect("a file");
    std::fs::remove_file(&path).expect("a name of our own");
    file.set_len(WINDOW_BYTES as u64).expect("room");
    let file = Arc::new(file);
    let region = |at, file, size, protection, flags| {
        let mmap = MmapRegion::build(file, size, protection, flags).expect("a mapping");
        Arc::new(GuestRegionMmap::new(mmap, GuestAddress(at)).expect("an address"))
    };
    let both = libc::PROT_READ | libc::PROT_WRITE;
    let anonymous = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    let memory = region(Memory::BASE, None, MEMORY_BYTES, both, anonymous);
    let window = |protection| {
        let file = Some(FileOffset::from_arc(Arc::clone(&file), 0));
        region(WINDOW, file, WINDOW_BYTES, protection, libc::MAP_SHARED)
    };
    let map = |window| {
        GuestMemoryMmap::from_arc_regions(vec![Arc::clone(&memory), window]).expect("disjoint regions")
    };
    let theirs = Memory::over(map(window(libc::PROT_READ)));
    let ours = GuestTables::new(&map(window(both)));
    (theirs, ours)
}

impl Through {
    fn new(unit: Unit, layout: Layout, pasid_bits: u8, cannot: &'static [Denied]) -> Self {
        let (guest, tables) = memories();
        let device = |unit| FakeDevice::on(unit).with_pasids(pasid_bits);
        let mut fakes = Fakes::on_kernel(Version::NEWEST, guest, unit, layout, device, cannot);
        let half = MEMORY_BYTES as u64 / 2;
        let last = Gpa(Memory::BASE + 2 * half - 1);
        fakes.memory = Alloc::within(&fakes.guest, Gpa(Memory::BASE + half), last);
        fakes.start().expect("a host");
        for index in 0..2 {
            fakes.add(index).expect("an endpoint");
        }
        let host = fakes.host.take().expect("a host that was made");
        let window = Window::new(Gpa(WINDOW), WINDOW_BYTES as u64);
        let host = Mediated::new(host, tables, window, MediationLimits::DEFAULT).expect("a window");
        Self { fakes, host, cannot }
    }

    fn smmuv3(layout: Layout) -> Self {
        Self::new(Unit::smmuv3(), layout, 16, SMMUV3)
    }

    fn vtd(layout: Layout) -> Self {
        Self::new(Unit::vtd(), layout, 20, VTD)
    }
}

impl HostUnderTest for Through {
    type Host = Mediated<IommufdHost<Kernel>, GuestTables>;
    type Memory = Alloc;

    fn host(&mut self) -> &mut Self::Host {
        &mut self.host
    }

    fn memory(&mut self) -> &mut Alloc {
        &mut self.fakes.memory
    }

    fn endpoints(&self) -> [EndpointId; 2] {
        ENDPOINTS
    }

    fn access(&mut self, stream: Stream, iova: u64, kind: AccessKind) -> Option<u64> {
        let reached = self.fakes.dma(stream, iova, kind).ok();
        assert_eq!(self.fakes.fake.violations(), [""; 0]);
        reached
    }

    fn page(&self, number: u64) -> u64 {
        Memory::page(number).0
    }

    fn shows_stale(&self) -> bool {
        true
    }

    fn cannot(&self) -> &'static [Denied] {
        self.cannot
    }
}

const KERNEL: Denied = (Ability::UnboundFaults, "the kernel tells faults of guests' tables only");
const MAPPINGS: Denied = (Ability::MappingFaults, "the kernel tells faults of guests' tables only");
const BYPASS: Denied = (Ability::BypassBeyondMemory, "bypass is stage 2, which has guest memory alone");
const WRITES: Denied = (Ability::WriteOnly, "pages of stage 1 that can be written can be read");

const SMMUV3: &[Denied] = &[
    KERNEL,
    MAPPINGS,
    BYPASS,
    WRITES,
    (Ability::PasidBypass, "an SMMUv3 whose stage 1 is bypassed refuses PASIDs"),
    (Ability::NarrowUntagged, "an SMMUv3 finds translations by ASID alone"),
];

const VTD: &[Denied] = &[
    KERNEL,
    MAPPINGS,
    BYPASS,
    WRITES,
    (Ability::PasidBypass, "PASIDs are attached one by one"),
    (Ability::Tags, "VT-d has no tag but the PASID"),
    (Ability::TableFaults, "the kernel tells no faults of VT-d"),
];

mod smmuv3 {
    viommu_tests::host_suite!(super::Through::smmuv3(super::Layout::OneUnit));
}

mod two_smmuv3 {
    viommu_tests::host_suite!(super::Through::smmuv3(super::Layout::TwoUnits));
}

mod vtd {
    viommu_tests::host_suite!(super::Through::vtd(super::Layout::OneUnit));
}

mod two_vtd {
    viommu_tests::host_suite!(super::Through::vtd(super::Layout::TwoUnits));
}

/// No check is left out for want of a kind of table.
#[test]
fn all_kinds_of_tables_are_there() {
    for make in [Through::smmuv3, Through::vtd] {
        let skipped = skips(|| make(Layout::OneUnit));
        let tables = [Ability::PasidTables, Ability::PageTables];
        assert!(skipped.iter().all(|(_, ability)| !tables.contains(ability)), "{skipped:?}");
    }
}

/// Not even a guest that maps the window reaches it to write.
#[test]
fn dma_does_not_write_the_window() {
    let mut test = Through::smmuv3(Layout::OneUnit);
    let caps = test.host.caps(ENDPOINTS[0]).and_then(|caps| caps.tables.clone()).expect("tables");
    let table = PageTable::new(&caps, 1, &mut test.fakes.memory);
    table.map(&mut test.fakes.memory, 0x1000, WINDOW, 0x1000, Attrs::READ_WRITE);
    let canonical = table.canonical().expect("page tables");
    let spec = SpaceSpec::GuestTable { endpoint: ENDPOINTS[0], table: &canonical };
    let mut space = test.host.create(spec).expect("a space");
    let stream = Stream { endpoint: ENDPOINTS[0], pasid: pgtable_formats::Pasid::new(5) };
    test.host.bind(stream, Some(&mut space)).expect("bound");
    assert_eq!(test.access(stream, 0x1000, AccessKind::Read), Some(WINDOW));
    assert_eq!(test.access(stream, 0x1000, AccessKind::Write), None);
}

/// When all is gone the kernel has no object left.
#[test]
fn nothing_stays_behind() {
    for make in [Through::smmuv3, Through::vtd] {
        for (name, check) in viommu_tests::host_suite::suite::<Through>() {
            let mut test = make(Layout::OneUnit);
            viommu_tests::host_suite::run(name, check, &mut test);
            let Through { fakes, host, .. } = test;
            drop(host.into_inner());
            assert_eq!(fakes.fake.violations(), [""; 0], "{name}");
        }
    }
}
