//! The surprises of iommufd, each with a test of its number: what the kernel does that nobody would expect, shown on the
//! kernel that is made up, and that the host is ready for it.
//!
//! Not here:
//! - 12 (vfio-pci hides the PASID capability and drops writes to those of ATS and PRI): the configuration space is the
//!   VMM's to emulate; no request of this device touches it.
//! - 16 (`CONFIG_IOMMUFD_TEST`): no behaviour but a stand-in. The lab runs on it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::sync::Arc;

use nix::errno::Errno;
use pgtable_formats::context::smmuv3::{Event as SmmuEvent, Idr0};
use pgtable_formats::context::{Canonical, smmuv3, vtd};
use pgtable_formats::format::Attrs;
use pgtable_formats::{Access, AccessKind, Fault, Gpa, Iova, IovaRange, Pasid};
use viommu_device::DeviceConfig;
use viommu_device::host::{
    FaultCause, Host, HostError, Invalidation, Scope, SpaceSpec, Stream, TableCaps, TableKinds,
};
use viommu_device::mapping::{MapFlags, Mapping};
use viommu_host_iommufd::counted::Call;
use viommu_host_iommufd::fake::{DmaFault, FakeDevice, FakeIommufd, FakeMemory, FakeSmmuv3, Unit};
use viommu_host_iommufd::kernel::{
    Backing, Commands, DeviceId, HwptData, HwptFlags, HwptSpec, IoasMapping, Iommufd, ObjectId, ResponseCode,
    ViommuKind,
};
use viommu_tests::host_suite::HostUnderTest;
use viommu_tests::host_suite::iommufd::{ENDPOINTS, Fake, Fakes, Kernel, Layout};
use viommu_tests::rig::{Bare, Memory, Sends, request};
use viommu_tests::tables::{PageTable, PasidTable};
use viommu_wire::{Caches, Status, TableDescriptor, VtdPageTable};

type Space = viommu_host_iommufd::Space<Kernel>;

/// The kernel alone, with one device and guest memory mapped.
struct Raw {
    memory: Memory,
    fake: Fake,
    device: DeviceId,
    ioas: ObjectId,
}

impl Raw {
    fn new(unit: Unit, device: impl FnOnce(FakeDevice) -> FakeDevice) -> Self {
        let memory = Memory::new(64 << 20);
        let fake = FakeIommufd::new(FakeMemory::new(memory.map()));
        let unit = fake.add_unit(unit);
        let device = fake.add_device(device(FakeDevice::on(unit)));
        let ioas = fake.alloc_ioas().unwrap();
        let raw = Self { memory, fake, device, ioas };
        raw.map(true);
        raw
    }

    fn smmuv3() -> Self {
        Self::new(Unit::smmuv3(), |device| device.with_pasids(16))
    }

    fn vtd() -> Self {
        Self::new(Unit::vtd(), |device| device.with_pasids(20))
    }

    fn map(&self, writable: bool) {
        use vm_memory::{GuestAddress, GuestMemoryBackend as _};
        let address = self.memory.map().get_host_address(GuestAddress(Memory::BASE)).unwrap() as u64;
        let range = IovaRange::from_length(Iova(Memory::BASE), 64 << 20).unwrap();
        let backing = Backing::Memory(address);
        self.fake.map(self.ioas, &IoasMapping { range, backing, readable: true, writable }).unwrap();
    }

    fn hwpt(&self, parent: ObjectId, flags: HwptFlags, data: HwptData) -> Result<ObjectId, Errno> {
        self.hwpt_with_faults(parent, flags, data, None)
    }

    fn hwpt_with_faults(
        &self,
        parent: ObjectId,
        flags: HwptFlags,
        data: HwptData,
        fault_queue: Option<ObjectId>,
    ) -> Result<ObjectId, Errno> {
        self.fake.alloc_hwpt(&HwptSpec { device: self.device, parent, flags, data, fault_queue })
    }

    fn nest_parent(&self) -> ObjectId {
        self.hwpt(self.ioas, HwptFlags::NEST_PARENT, HwptData::None).unwrap()
    }

    fn viommu(&self) -> ObjectId {
        self.fake.alloc_viommu(ViommuKind::Smmuv3, self.device, self.nest_parent()).unwrap()
    }

    fn entry(&self, viommu: ObjectId, words: [u64; 2]) -> Result<ObjectId, Errno> {
        self.hwpt(viommu, HwptFlags::empty(), HwptData::Smmuv3(words))
    }

    /// A linear table of 16 descriptors whose first one has page 1 lead to page `target`.
    fn table(&self, asid: u16, target: u64) -> (PageTable, [u64; 2]) {
        let mut alloc = viommu_tests::rig::Alloc::within(
            &self.memory,
            Gpa(Memory::page(4096 + 256 * target).0),
            Gpa(Memory::page(4096 + 256 * target + 255).0),
        );
        let caps = TableCaps::Smmuv3(smmuv3::Caps::from_registers(smmuv3::IdRegisters::SOFTWARE));
        let table = PasidTable::new(&caps, 4, &mut alloc);
        let pages = PageTable::new(&caps, asid, &mut alloc);
        pages.map(&mut alloc, 0x1000, Memory::page(target).0, 0x1000, Attrs::READ_WRITE);
        table.set(&mut alloc, 0, &pages);
        let Canonical::Smmuv3(table) = table.canonical() else { panic!() };
        (pages, table.words())
    }

    fn read(&self, iova: u64) -> Result<Option<Gpa>, DmaFault> {
        self.fake.dma_gpa(self.device, None, iova, Access::READ)
    }
}

/// A table of 16 descriptors with a page table for untagged accesses: page 1 leads to page `target`.
fn cd_table(fakes: &mut Fakes, asid: u16, target: u64) -> (PasidTable, PageTable) {
    let caps = tables(fakes);
    let table = PasidTable::new(&caps, 4, &mut fakes.memory);
    let pages = PageTable::new(&caps, asid, &mut fakes.memory);
    pages.map(&mut fakes.memory, 0x1000, Memory::page(target).0, 0x1000, Attrs::READ_WRITE);
    table.set(&mut fakes.memory, 0, &pages);
    (table, pages)
}

fn tables(fakes: &mut Fakes) -> TableCaps {
    fakes.host().caps(ENDPOINTS[0]).unwrap().tables.clone().unwrap()
}

fn create(fakes: &mut Fakes, table: &Canonical) -> Result<Space, HostError> {
    fakes.host().create(SpaceSpec::GuestTable { endpoint: ENDPOINTS[0], table })
}

fn bind(fakes: &mut Fakes, space: &mut Space) {
    fakes.host().bind(untagged(), Some(space)).unwrap();
}

fn untagged() -> Stream {
    Stream::untagged(ENDPOINTS[0])
}

fn read(fakes: &Fakes, iova: u64) -> Result<u64, DmaFault> {
    fakes.dma(untagged(), iova, AccessKind::Read)
}

const fn event(event: SmmuEvent) -> DmaFault {
    DmaFault::Stage1(Fault::Smmuv3(event))
}

const fn page(number: u64) -> Result<u64, DmaFault> {
    Ok(Memory::page(number).0)
}

const CANNOT: &[viommu_tests::host_suite::Denied] = &[];

/// VT-d takes page tables, one for each PASID; an SMMUv3 the whole table of them, unseen.
#[test]
fn f1_01_vtd_is_not_table_handover() {
    let mut fakes = Fakes::vtd(Layout::OneUnit);
    let caps = tables(&mut fakes);
    assert_eq!(fakes.host().caps(ENDPOINTS[0]).unwrap().kinds, TableKinds::PAGE_TABLE);
    let directory = PasidTable::new(&caps, 13, &mut fakes.memory).canonical();
    assert_eq!(create(&mut fakes, &directory).err(), Some(HostError::Unsupported));
    fakes.kernel.take();
    for pasid in [5, 7] {
        let table = PageTable::new(&caps, 0, &mut fakes.memory).canonical().unwrap();
        let mut space = create(&mut fakes, &table).unwrap();
        let stream = Stream { endpoint: ENDPOINTS[0], pasid: Pasid::new(pasid) };
        fakes.host().bind(stream, Some(&mut space)).unwrap();
        assert!(fakes.fake.attached(fakes.devices[0], Some(pasid)).is_some());
    }
    let counts = fakes.kernel.take();
    assert_eq!((counts.of(Call::AllocHwpt), counts.of(Call::Attach)), (2, 2));

    let mut fakes = Fakes::smmuv3(Layout::OneUnit, false);
    assert_eq!(fakes.host().caps(ENDPOINTS[0]).unwrap().kinds, TableKinds::PASID_TABLE);
    let (table, _) = cd_table(&mut fakes, 1, 10);
    // TG0 = 3 is reserved: nobody looks before the hardware does.
    let Canonical::Smmuv3(cds) = table.canonical() else { panic!() };
    let word = pgtable_formats::TableMem::load(&fakes.guest, cds.extents().0).unwrap();
    fakes.guest.store(cds.extents().0, word | 3 << 6);
    let mut space = create(&mut fakes, &table.canonical()).unwrap();
    bind(&mut fakes, &mut space);
    assert_eq!(read(&fakes, 0x1000), Err(event(SmmuEvent::CBadCd)));

    let raw = Raw::smmuv3();
    let viommu = raw.viommu();
    assert_eq!(raw.hwpt(viommu, HwptFlags::PASID, HwptData::Smmuv3([9, 0])), Err(Errno::EOPNOTSUPP));
}

/// Page requests: where a table has a fault queue they come and are answered. The host's tables have one exactly where
/// the guest was offered page requests; of others the kernel answers at once, and nothing waits.
#[test]
fn f1_02_page_requests_are_vtd_only() {
    let raw = Raw::new(Unit::vtd(), |device| FakeDevice { pri: true, ..device.with_pasids(20) });
    let parent = raw.hwpt(raw.ioas, HwptFlags::NEST_PARENT | HwptFlags::PASID, HwptData::None).unwrap();
    let queue = raw.fake.alloc_fault_queue().unwrap();
    let data = HwptData::Vtd { flags: 0, root: Memory::page(9).0, address_width: 48 };
    let table = raw.hwpt_with_faults(parent, HwptFlags::PASID, data, Some(queue)).unwrap();
    raw.fake.attach(raw.device, Pasid::new(5), table).unwrap();
    assert!(raw.fake.page_request(raw.device, Some(5), 3, 0x1000, 1, false));
    assert_eq!(raw.fake.read_page_faults(queue), Ok(vec![]), "whole groups only");
    assert!(raw.fake.page_request(raw.device, Some(5), 3, 0x2000, 2, true));
    let faults = raw.fake.read_page_faults(queue).unwrap();
    let seen: Vec<_> = faults.iter().map(|fault| (fault.flags, fault.pasid, fault.address)).collect();
    assert_eq!(seen, [(1, 5, 0x1000), (3, 5, 0x2000)]);
    assert_eq!(faults[0].cookie, faults[1].cookie);
    assert_eq!(raw.fake.respond(queue, faults[0].cookie + 1, ResponseCode::Success), Err(Errno::EINVAL));
    raw.fake.respond(queue, faults[0].cookie, ResponseCode::Success).unwrap();
    assert_eq!(raw.fake.respond(queue, faults[0].cookie, ResponseCode::Success), Err(Errno::EINVAL));
    raw.fake.page_request(raw.device, Some(5), 4, 0x1000, 1, true);
    raw.fake.detach(raw.device, Pasid::new(5)).unwrap();
    let answers = [(raw.device, 3, Some(ResponseCode::Success)), (raw.device, 4, None)];
    assert_eq!(raw.fake.page_responses(), answers, "what is detached is answered INVALID");

    for mut fakes in [Fakes::vtd(Layout::OneUnit), Fakes::smmuv3(Layout::OneUnit, true)] {
        let mut mapped = fakes.host().create(SpaceSpec::Mapped).unwrap();
        bind(&mut fakes, &mut mapped);
        assert!(!fakes.fake.page_request(fakes.devices[0], None, 1, 0x1000, 1, true));
        assert_eq!(fakes.fake.page_responses(), [(fakes.devices[0], 1, None)]);
    }

    // A device on PCI asks for pages behind VT-d, and behind an SMMUv3 nobody hears it.
    let device = |unit| FakeDevice { ats: true, pri: true, ..FakeDevice::on(unit).with_pasids(16) };
    for (unit, asks) in [(Unit::vtd(), true), (Unit::smmuv3(), false)] {
        let mut fakes = Fakes::new(unit, Layout::OneUnit, device, CANNOT);
        assert_eq!(fakes.host().caps(ENDPOINTS[0]).unwrap().page_requests, asks);
        let caps = tables(&mut fakes);
        let table = PageTable::new(&caps, 1, &mut fakes.memory);
        let canonical = match &caps {
            TableCaps::Vtd(_) => table.canonical().unwrap(),
            TableCaps::Smmuv3(_) => cd_table(&mut fakes, 1, 10).0.canonical(),
        };
        let mut space = create(&mut fakes, &canonical).unwrap();
        bind(&mut fakes, &mut space);
        assert_eq!(fakes.fake.page_request(fakes.devices[0], None, 1, 0x1000, 1, true), asks);
        assert_eq!(fakes.host().next_page_request().is_some(), asks);
    }
}

/// Of an SMMUv3, eight events of stage 1 reach the guest; those of stage 2 do not, and none of VT-d does.
#[test]
fn f1_03_few_faults_are_told() {
    let mut fakes = Fakes::smmuv3(Layout::OneUnit, false);
    let (table, pages) = cd_table(&mut fakes, 1, 10);
    let mut space = create(&mut fakes, &table.canonical()).unwrap();
    bind(&mut fakes, &mut space);
    assert_eq!(read(&fakes, 0x1000), page(10));
    assert_eq!(read(&fakes, 0x2008), Err(event(SmmuEvent::FTranslation)));
    let fault = fakes.host().next_fault().unwrap();
    assert_eq!((fault.stream, fault.address), (untagged(), Some(Iova(0x2008))));
    assert_eq!(fault.cause, FaultCause::Table(Fault::Smmuv3(SmmuEvent::FTranslation)));
    // A page that leads out of memory: stage 2 faults.
    pages.map(&mut fakes.memory, 0x3000, 0x1000, 0x1000, Attrs::READ_WRITE);
    assert_eq!(read(&fakes, 0x3000), Err(DmaFault::Stage2(Gpa(0x1000))));
    assert_eq!(fakes.host().next_fault(), None);
    assert_eq!(fakes.fake.take_host_faults(), [(fakes.devices[0], DmaFault::Stage2(Gpa(0x1000)))]);
    // A table out of memory: the same, though the guest's own SMMU would tell F_WALK_EABT.
    let caps = tables(&mut fakes);
    let TableCaps::Smmuv3(smmu) = &caps else { panic!() };
    let half = smmuv3::HalfSpec {
        root: Gpa(0x5000),
        granule: pgtable_formats::leaf::vmsav8::Granule::K4,
        input_bits: 48,
    };
    let (output_bits, mair) = (smmu.oas_bits, 0xff);
    let spec = smmuv3::CdSpec { asid: 2, lower: Some(half), upper: None, output_bits, ds: false, mair };
    let Canonical::Smmuv3(cds) = table.canonical() else { panic!() };
    cds.write(&mut fakes.memory, Pasid::new(5).unwrap(), &spec.encode(smmu).unwrap()).unwrap();
    let tagged = Stream { pasid: Pasid::new(5), ..untagged() };
    let seen = fakes.dma(tagged, 0x1000, AccessKind::Read);
    assert!(matches!(seen, Err(DmaFault::Stage2(_))), "{seen:?}");
    assert_eq!(fakes.host().next_fault(), None);

    let mut fakes = Fakes::vtd(Layout::OneUnit);
    let caps = tables(&mut fakes);
    let table = PageTable::new(&caps, 0, &mut fakes.memory).canonical().unwrap();
    let mut space = create(&mut fakes, &table).unwrap();
    bind(&mut fakes, &mut space);
    let fault = DmaFault::Stage1(Fault::Vtd(vtd::FaultReason::NOT_PRESENT));
    assert_eq!(read(&fakes, 0x1000), Err(fault));
    assert_eq!(fakes.host().next_fault(), None);
    assert_eq!(fakes.fake.take_host_faults(), [(fakes.devices[0], fault)]);
}

/// A queue of events that is full loses some: they are counted, by a mark at its end or by a gap in the numbers.
#[test]
fn f1_03_lost_faults_are_counted() {
    let mut fakes = Fakes::smmuv3(Layout::OneUnit, false);
    let (table, _) = cd_table(&mut fakes, 1, 10);
    let mut space = create(&mut fakes, &table.canonical()).unwrap();
    bind(&mut fakes, &mut space);
    let depth = u64::from(viommu_host_iommufd::EVENT_QUEUE_DEPTH);
    let mut told = 0;
    for lost in [3, 5] {
        for _ in 0..depth + lost {
            read(&fakes, 0x9000).unwrap_err();
        }
        while fakes.host().next_fault().is_some() {
            told += 1;
        }
    }
    assert_eq!((told, fakes.host().lost_events()), (2 * depth, 8));
    // Without a mark: what comes after it takes its place.
    let raw = Raw::smmuv3();
    let viommu = raw.viommu();
    let queue = raw.fake.alloc_event_queue(viommu, ViommuKind::Smmuv3, 2).unwrap();
    assert_eq!(raw.fake.alloc_event_queue(viommu, ViommuKind::Smmuv3, 2), Err(Errno::EEXIST));
    raw.fake.alloc_vdevice(viommu, raw.device, 8).unwrap();
    let (_, words) = raw.table(1, 10);
    let table = raw.entry(viommu, words).unwrap();
    raw.fake.attach(raw.device, None, table).unwrap();
    for _ in 0..3 {
        raw.read(0x9000).unwrap_err();
    }
    use viommu_host_iommufd::kernel::Event;
    let read = raw.fake.read_events(queue).unwrap();
    assert!(
        matches!(read[..], [Event::Smmuv3 { sequence: 0, .. }, _, Event::Lost { sequence: 2 }]),
        "{read:?}"
    );
}

/// On Arm a nest parent has no dirty tracking, and the host does not ask for it.
#[test]
fn f1_04_nest_parents_on_arm_track_no_dirty_pages() {
    let both = HwptFlags::NEST_PARENT | HwptFlags::DIRTY_TRACKING;
    let httu = FakeSmmuv3 { idr: with_httu(FakeSmmuv3::NEW.idr), ..FakeSmmuv3::NEW };
    let raw = Raw::new(Unit::Smmuv3(httu), |device| device);
    assert_eq!(raw.hwpt(raw.ioas, both, HwptData::None), Err(Errno::EOPNOTSUPP));
    assert!(raw.hwpt(raw.ioas, HwptFlags::DIRTY_TRACKING, HwptData::None).is_ok());
    assert!(raw.hwpt(raw.ioas, HwptFlags::NEST_PARENT, HwptData::None).is_ok());
    let with_pasid = HwptFlags::NEST_PARENT | HwptFlags::PASID;
    assert_eq!(raw.hwpt(raw.ioas, with_pasid, HwptData::None), Err(Errno::EOPNOTSUPP));
    let mut fakes = Fakes::new(Unit::Smmuv3(httu), Layout::OneUnit, FakeDevice::on, CANNOT);
    assert!(matches!(tables(&mut fakes), TableCaps::Smmuv3(_)));
}

/// The vDEVICE comes first; a device with several StreamIDs has none, and is an endpoint without tables.
#[test]
fn f1_05_the_vdevice_comes_first() {
    let raw = Raw::smmuv3();
    let viommu = raw.viommu();
    let (_, words) = raw.table(1, 10);
    let table = raw.entry(viommu, words).unwrap();
    let abort = raw.entry(viommu, [0, 0]).unwrap();
    assert_eq!(raw.fake.attach(raw.device, None, table), Err(Errno::ENOENT));
    raw.fake.attach(raw.device, None, abort).unwrap();
    let name = raw.fake.alloc_vdevice(viommu, raw.device, 8).unwrap();
    assert_eq!(raw.fake.alloc_vdevice(viommu, raw.device, 9), Err(Errno::EEXIST));
    raw.fake.attach(raw.device, None, table).unwrap();
    assert_eq!(raw.read(0x1000), Ok(Some(Memory::page(10))));
    assert_eq!(raw.fake.destroy(table), Err(Errno::EBUSY));
    assert_eq!(raw.fake.destroy(viommu), Err(Errno::EBUSY));
    raw.fake.destroy(name).unwrap();

    let several = |unit| FakeDevice { stream_ids: 2, ..FakeDevice::on(unit) };
    let mut fakes = Fakes::new(Unit::smmuv3(), Layout::OneUnit, several, CANNOT);
    assert_eq!(fakes.host().caps(ENDPOINTS[0]).unwrap().tables, None);
    let mut identity = fakes.host().create(SpaceSpec::Identity).unwrap();
    bind(&mut fakes, &mut identity);
    assert_eq!(read(&fakes, Memory::page(3).0), page(3));
    fakes.host().bind(untagged(), None).unwrap();
    assert_eq!(read(&fakes, Memory::page(3).0), Err(DmaFault::Unmapped));
}

const NH_ALL: [u64; 2] = [0x10, 0];

/// How far an invalidation got, is not what the kernel says; none is a mistake; a stray bit is refused.
#[test]
fn f1_06_invalidations_over_report() {
    let raw = Raw::smmuv3();
    let viommu = raw.viommu();
    raw.fake.alloc_vdevice(viommu, raw.device, 8).unwrap();
    let (pages, words) = raw.table(7, 10);
    let table = raw.entry(viommu, words).unwrap();
    raw.fake.attach(raw.device, None, table).unwrap();
    let send = |commands: &[[u64; 2]]| {
        raw.fake.invalidate(viommu, Commands::Smmuv3(commands)).map_err(|error| (error.done, error.errno))
    };
    let remap = |target: u64| {
        let mut alloc = viommu_tests::rig::Alloc::new(&raw.memory);
        pages.remap(&mut alloc, 0x1000, Memory::page(target).0, 0x1000);
    };
    assert_eq!(send(&[]), Err((0, Errno::EINVAL)));
    assert_eq!(raw.read(0x1000), Ok(Some(Memory::page(10))));
    remap(11);
    // The bad one takes down those that wait with it, and they count as done.
    let mut commands = vec![NH_ALL; 3];
    commands.push([0x03, 0]);
    assert_eq!(send(&commands), Err((3, Errno::EIO)));
    assert_eq!(raw.read(0x1000), Ok(Some(Memory::page(10))), "none was issued");
    // After 63 they are.
    let mut commands = vec![NH_ALL; 65];
    commands.push([0x03, 0]);
    assert_eq!(send(&commands), Err((65, Errno::EIO)));
    assert_eq!(raw.read(0x1000), Ok(Some(Memory::page(11))), "the first batch was");
    // Stray bits, a wrong vSID, commands of the host's own.
    let tlbi_va = 0x12 | 7 << 48;
    for refused in [
        [NH_ALL[0] | 1 << 12, 0],
        [NH_ALL[0], 1],
        [0x13 | 7 << 48, 0x1000],
        [0x05 | 1 << 11 | 8 << 32, 1],
        [0x05 | 9 << 32, 1],
        [0x46, 0],
        [0x04, 31],
        [tlbi_va | 1 << 12, 0x1000],
        [tlbi_va, 0x1000 | 1 << 10],
        [0x40 | 8 << 32, 53],
    ] {
        assert_eq!(send(&[refused]), Err((0, Errno::EIO)), "{refused:x?}");
    }
    // A range of one page has its level.
    for taken in
        [NH_ALL, [0x30, 0], [tlbi_va, 0x1001], [tlbi_va, 0x1000 | 1 << 10 | 3 << 8], [0x06 | 8 << 32, 0]]
    {
        assert_eq!(send(&[taken]), Ok(()), "{taken:x?}");
    }
}

/// TLBI and ATC_INV go one after the other: together, a device would fetch again what it was to forget.
#[test]
fn f1_06_device_tlbs_come_last() {
    let mut fakes = Fakes::smmuv3(Layout::OneUnit, true);
    let (table, pages) = cd_table(&mut fakes, 1, 10);
    let Canonical::Smmuv3(cds) = table.canonical() else { panic!() };
    let [word0, word1] = cds.words();
    let TableCaps::Smmuv3(caps) = tables(&mut fakes) else { panic!() };
    let ats = Canonical::Smmuv3(smmuv3::CdTable::from_ste(word0, word1 | 1 << 28, &caps).unwrap());
    let mut space = create(&mut fakes, &ats).unwrap();
    bind(&mut fakes, &mut space);
    assert_eq!(read(&fakes, 0x1000), page(10));
    pages.remap(&mut fakes.memory, 0x1000, Memory::page(11).0, 0x1000);
    let scope = Scope::Range {
        pasid: None,
        range: IovaRange::new(Iova(0x1000), Iova(0x1fff)).unwrap(),
        page_lg2: 12,
    };
    let asked = Invalidation {
        endpoint: ENDPOINTS[0],
        scope,
        caches: Caches::TLB,
        leaf: true,
        tag: Some(1),
        global: false,
    };
    fakes.host().invalidate(&[asked]).unwrap();
    assert_eq!(read(&fakes, 0x1000), page(11));
    assert_eq!(fakes.fake.violations(), [""; 0]);

    // What the host would get for it.
    let raw = Raw::new(Unit::smmuv3(), |device| FakeDevice { ats: true, ..device });
    let viommu = raw.viommu();
    raw.fake.alloc_vdevice(viommu, raw.device, 8).unwrap();
    let (pages, [word0, word1]) = raw.table(7, 10);
    let table = raw.entry(viommu, [word0, word1 | 1 << 28]).unwrap();
    raw.fake.attach(raw.device, None, table).unwrap();
    assert_eq!(raw.read(0x1000), Ok(Some(Memory::page(10))));
    let mut alloc = viommu_tests::rig::Alloc::new(&raw.memory);
    pages.remap(&mut alloc, 0x1000, Memory::page(11).0, 0x1000);
    raw.fake.invalidate(viommu, Commands::Smmuv3(&[NH_ALL, [0x40 | 8 << 32, 52]])).unwrap();
    assert_eq!((raw.read(0x1000), raw.fake.violations().len()), (Ok(Some(Memory::page(10))), 1));
}

/// Where the SMMU may stall and the device may not, the entry says so; where it never stalls, the entry must not.
#[test]
fn f1_06a_s1stalld_is_forced() {
    let both = Unit::Smmuv3(FakeSmmuv3::NEW.with_stall_model(0));
    for (unit, stall) in [(both, false), (both, true), (Unit::smmuv3(), false)] {
        let device = |unit| FakeDevice { stall, ..FakeDevice::on(unit).with_pasids(16) };
        let mut fakes = Fakes::new(unit, Layout::OneUnit, device, CANNOT);
        let (table, _) = cd_table(&mut fakes, 1, 10);
        let mut space = create(&mut fakes, &table.canonical()).unwrap();
        bind(&mut fakes, &mut space);
        assert_eq!(read(&fakes, 0x1000), page(10), "an entry that is legal");
        // The guest turns stalling on, after the table was bound.
        let Canonical::Smmuv3(cds) = table.canonical() else { panic!() };
        let word = pgtable_formats::TableMem::load(&fakes.guest, cds.extents().0).unwrap();
        fakes.guest.store(cds.extents().0, word | 1 << 44);
        let endpoint = ENDPOINTS[0];
        let (scope, caches) = (Scope::Endpoint, Caches::all());
        let all = Invalidation { endpoint, scope, caches, leaf: false, tag: None, global: true };
        fakes.host().invalidate(&[all]).unwrap();
        let faulting = read(&fakes, 0x9000);
        if stall {
            assert_eq!(faulting, Err(DmaFault::Stalled), "the guest is asked");
            assert!(fakes.host().next_page_request().is_some());
        } else {
            assert_eq!(faulting, Err(event(SmmuEvent::CBadCd)), "nothing can stall");
        }
        assert_eq!(fakes.fake.violations(), [""; 0]);
    }

    // What would become of it: the kernel takes the entry as it is.
    let raw = Raw::new(both, |device| device);
    let viommu = raw.viommu();
    raw.fake.alloc_vdevice(viommu, raw.device, 8).unwrap();
    let (_, words) = raw.table(7, 10);
    let cds = Gpa(words[0] & 0x000f_ffff_ffff_ffc0);
    let word = pgtable_formats::TableMem::load(&raw.memory, cds).unwrap();
    raw.memory.store(cds, word | 1 << 44);
    let table = raw.entry(viommu, [words[0], words[1] & !(1 << 27)]).unwrap();
    raw.fake.attach(raw.device, None, table).unwrap();
    assert_eq!(raw.read(0x9000), Err(DmaFault::Stalled));
    assert_eq!(raw.fake.violations().len(), 1);
}

/// Replacing a table leaves its translations under the guest's ASIDs: whoever binds drops them.
#[test]
fn f1_07_replacing_flushes_nothing() {
    let raw = Raw::smmuv3();
    let viommu = raw.viommu();
    raw.fake.alloc_vdevice(viommu, raw.device, 8).unwrap();
    for (target, seen) in [(10, 10), (11, 10)] {
        let (_, words) = raw.table(7, target);
        let table = raw.entry(viommu, words).unwrap();
        raw.fake.attach(raw.device, None, table).unwrap();
        assert_eq!(raw.read(0x1000), Ok(Some(Memory::page(seen))), "the old table's");
    }

    // By requests, and with anything between the two.
    for between in
        [None, Some(request::attach(9, ENDPOINTS[0].0)), Some(request::attach_bypass(9, ENDPOINTS[0].0))]
    {
        let mut fakes = Fakes::smmuv3(Layout::OneUnit, false);
        let tables: Vec<_> = [10, 11].map(|target| cd_table(&mut fakes, 7, target).0).into();
        // So that the VMID stays in use.
        let other = cd_table(&mut fakes, 8, 12).0;
        let mut bare = Bare::over(DeviceConfig::default(), None, fakes.host.take().unwrap());
        let attach = |endpoint: usize, table: &PasidTable| {
            request::attach_table(3, ENDPOINTS[endpoint].0, table.descriptor())
        };
        assert_eq!(bare.send(&attach(1, &other)), Status::Ok);
        assert_eq!(bare.send(&attach(0, &tables[0])), Status::Ok);
        assert_eq!(read(&fakes, 0x1000), page(10));
        if let Some(between) = &between {
            assert_eq!(bare.send(between), Status::Ok);
        }
        assert_eq!(bare.send(&attach(0, &tables[1])), Status::Ok);
        assert_eq!(read(&fakes, 0x1000), page(11), "{between:?}");
    }
}

/// Hardware updates of flags are not nestable: the guest is not shown that there are any.
#[test]
fn f1_08_httu_is_hidden() {
    let httu = FakeSmmuv3 { idr: with_httu(FakeSmmuv3::NEW.idr), ..FakeSmmuv3::NEW };
    let mut fakes = Fakes::new(Unit::Smmuv3(httu), Layout::OneUnit, FakeDevice::on, CANNOT);
    let TableCaps::Smmuv3(caps) = tables(&mut fakes) else { panic!() };
    assert_eq!((caps.httu, Idr0::from_bits(caps.registers().idr0).httu()), (0, 0));
}

fn with_httu(mut idr: [u32; 6]) -> [u32; 6] {
    idr[0] = Idr0::from_bits(idr[0]).with_httu(2).into_bits();
    idr
}

/// The kernel refuses bits that a guest's driver sets in its entry; the host passes on what counts.
#[test]
fn f1_09_entries_are_masked() {
    let raw = Raw::smmuv3();
    let viommu = raw.viommu();
    let (_, [word0, word1]) = raw.table(1, 10);
    for refused in [
        [word0 | 1 << 52, word1],
        [word0 | 1 << 56, word1],
        [word0, word1 | 1 << 30],
        [word0, word1 | 1 << 44],
        [word0, word1 | 2 << 28],
        [word0 & !0xe | 6 << 1, word1],
    ] {
        assert_eq!(raw.entry(viommu, refused), Err(Errno::EIO), "{refused:x?}");
    }
    assert!(raw.entry(viommu, [!1, !0]).is_ok(), "V = 0 aborts, whatever else there is");
    let cfgi_ste = [0x03 | 8 << 32, 1];
    assert!(raw.fake.invalidate(viommu, Commands::Smmuv3(&[cfgi_ste])).is_err());

    let mut fakes = Fakes::smmuv3(Layout::OneUnit, false);
    let TableDescriptor::Smmuv3 { ste0, ste1 } = cd_table(&mut fakes, 1, 10).0.descriptor() else { panic!() };
    let mut bare = Bare::over(DeviceConfig::default(), None, fakes.host.take().unwrap());
    // STRW = 2, SHCFG = 1, MEV, Config = 7: what a driver may have in its own copy.
    let (ste0, ste1) = (ste0 | 7 << 1, ste1 | 2 << 30 | 1 << 44 | 1 << 19);
    let table = TableDescriptor::Smmuv3 { ste0, ste1 };
    assert_eq!(bare.send(&request::attach_table(3, ENDPOINTS[0].0, table)), Status::Ok);
    assert_eq!(read(&fakes, 0x1000), page(10));
}

/// The kernel takes any flags and any root for VT-d; the device does not.
#[test]
fn f1_10_vtd_roots_are_checked_here() {
    let raw = Raw::vtd();
    let parent = raw.nest_parent();
    let (flags, address_width) = (u64::MAX << 3, 48);
    for root in [Memory::page(1).0 | 0x123, u64::MAX] {
        let data = HwptData::Vtd { flags, root, address_width };
        let table = raw.hwpt(parent, HwptFlags::empty(), data).unwrap();
        assert_eq!(raw.fake.attach(raw.device, None, table), Ok(()));
        assert!(raw.read(0x1000).is_err());
    }
    let data = HwptData::Vtd { flags: 0, root: 0, address_width: 39 };
    let table = raw.hwpt(parent, HwptFlags::empty(), data).unwrap();
    assert_eq!(raw.fake.attach(raw.device, None, table), Err(Errno::EINVAL));

    let mut fakes = Fakes::vtd(Layout::OneUnit);
    let mut bare = Bare::over(DeviceConfig::default(), None, fakes.host.take().unwrap());
    let good = VtdPageTable { pgd: Memory::page(1), flags: 0, addr_width: 48, pasid: Pasid::ZERO };
    for bad in [
        VtdPageTable { flags: 8, ..good },
        VtdPageTable { pgd: Gpa(good.pgd.0 | 0x800), ..good },
        VtdPageTable { pgd: Gpa(1 << 60), ..good },
        VtdPageTable { addr_width: 39, ..good },
        VtdPageTable { pgd: Gpa(0x1000), ..good },
    ] {
        fakes.kernel.take();
        let table = TableDescriptor::VtdPageTable(bad);
        let status = bare.send(&request::attach_table(3, ENDPOINTS[0].0, table));
        assert_ne!(status, Status::Ok, "{bad:?}");
        assert_eq!(fakes.kernel.take().of(Call::AllocHwpt), 0, "{bad:?}");
    }
    let table = TableDescriptor::VtdPageTable(good);
    assert_eq!(bare.send(&request::attach_table(3, ENDPOINTS[0].0, table)), Status::Ok);
}

/// A nest parent of VT-d makes everything writable. Mappings of a domain do not go through it.
#[test]
fn f1_11_vtd_nest_parents_write() {
    for (raw, writes) in [(Raw::vtd(), true), (Raw::smmuv3(), false)] {
        raw.fake.unmap(raw.ioas, IovaRange::ALL).unwrap();
        raw.map(false);
        let parent = raw.nest_parent();
        raw.fake.attach(raw.device, None, parent).unwrap();
        let written = raw.fake.dma_gpa(raw.device, None, Memory::page(3).0, Access::WRITE);
        assert_eq!(written.is_ok(), writes);
    }
    let mut fakes = Fakes::vtd(Layout::OneUnit);
    let mut mapped = fakes.host().create(SpaceSpec::Mapped).unwrap();
    let range = IovaRange::from_length(Iova(0x1000), 0x1000).unwrap();
    let mapping = Mapping { range, output: Memory::page(3), flags: MapFlags::READ };
    fakes.host().map(&mut mapped, mapping).unwrap();
    bind(&mut fakes, &mut mapped);
    assert_eq!(read(&fakes, 0x1000), page(3));
    assert_eq!(fakes.dma(untagged(), 0x1000, AccessKind::Write), Err(DmaFault::Permission));
}

/// A virtual function with page requests is attached to no table that takes them: the host finds out, and its tables take
/// none.
#[test]
fn f1_13_virtual_functions_have_no_page_requests() {
    let function = |device: FakeDevice| FakeDevice { virtual_function: true, pri: true, ats: true, ..device };
    let raw = Raw::new(Unit::vtd(), function);
    let queue = raw.fake.alloc_fault_queue().unwrap();
    let table = raw.hwpt_with_faults(raw.ioas, HwptFlags::empty(), HwptData::None, Some(queue)).unwrap();
    assert_eq!(raw.fake.attach(raw.device, None, table), Err(Errno::EINVAL));
    let mut fakes = Fakes::new(Unit::vtd(), Layout::OneUnit, |unit| function(FakeDevice::on(unit)), CANNOT);
    assert!(!fakes.host().caps(ENDPOINTS[0]).unwrap().page_requests);
    let caps = tables(&mut fakes);
    let table = PageTable::new(&caps, 0, &mut fakes.memory);
    table.map(&mut fakes.memory, 0x1000, Memory::page(3).0, 0x1000, Attrs::READ_WRITE);
    let mut space = create(&mut fakes, &table.canonical().unwrap()).unwrap();
    bind(&mut fakes, &mut space);
    assert_eq!(read(&fakes, 0x1000), page(3));
}

/// A kernel that is asked to replace a table by one without its fault queue forgets the page requests there, and reads
/// them through freed memory later. The host detaches first: all that waited has an answer.
#[test]
fn f1_17_replacing_may_leave_page_requests() {
    let asks = |device: FakeDevice| FakeDevice { pri: true, ats: true, ..device.with_pasids(20) };
    let raw = Raw::new(Unit::vtd(), asks);
    let parent = raw.hwpt(raw.ioas, HwptFlags::NEST_PARENT, HwptData::None).unwrap();
    let queue = raw.fake.alloc_fault_queue().unwrap();
    let data = HwptData::Vtd { flags: 0, root: 0, address_width: 48 };
    let table = raw.hwpt_with_faults(parent, HwptFlags::empty(), data, Some(queue)).unwrap();
    raw.fake.attach(raw.device, None, table).unwrap();
    assert!(raw.fake.page_request(raw.device, None, 1, 0x5000, 1, true));
    raw.fake.attach(raw.device, None, parent).unwrap();
    assert_eq!(raw.fake.page_responses(), [], "nobody has answered");
    assert_eq!(raw.fake.violations(), [""; 0]);
    assert_eq!(raw.fake.read_page_faults(queue).unwrap().len(), 1);
    assert_eq!(raw.fake.violations().len(), 1);

    for pasid in [None, Pasid::new(5)] {
        let stream = Stream { endpoint: ENDPOINTS[0], pasid };
        // To nothing, to all of guest memory, to mappings; each with the second attach refused as well.
        for (spec, fails) in [None, Some(SpaceSpec::Identity), Some(SpaceSpec::Mapped)]
            .into_iter()
            .flat_map(|spec| [false, true].map(|fails| (spec, fails)))
        {
            let mut fakes =
                Fakes::new(Unit::vtd(), Layout::OneUnit, |unit| asks(FakeDevice::on(unit)), CANNOT);
            let caps = tables(&mut fakes);
            let pages = PageTable::new(&caps, 0, &mut fakes.memory);
            pages.map(&mut fakes.memory, 0x1000, Memory::page(3).0, 0x1000, Attrs::READ_WRITE);
            let mut bound = create(&mut fakes, &pages.canonical().unwrap()).unwrap();
            fakes.host().bind(stream, Some(&mut bound)).unwrap();
            let mut target = spec.map(|spec| fakes.host().create(spec).unwrap());
            let device = fakes.devices[0];
            let ask = |fakes: &Fakes, group| {
                assert!(fakes.fake.page_request(device, pasid.map(Pasid::value), group, 0x5000, 1, true));
            };
            ask(&fakes, 1);
            assert!(fakes.host().next_page_request().is_some());
            ask(&fakes, 2);
            if fails {
                fakes.kernel.inner().fail_kind(Call::Attach, Errno::ENOMEM);
            }
            let result = fakes.host().bind(stream, target.as_mut());
            let failed = fails && fakes.kernel.inner().failed().is_some();
            assert_eq!(result.is_err(), failed, "{pasid:?}");
            fakes.kernel.inner().heal();
            let mut answers = fakes.fake.page_responses();
            answers.sort_by_key(|(_, group, _)| *group);
            assert_eq!(answers, [(device, 1, None), (device, 2, None)], "{pasid:?}");
            assert_eq!(fakes.host().next_page_request(), None);
            if failed {
                fakes.host().bind(stream, target.as_mut()).unwrap();
            }
            assert_eq!(fakes.fake.violations(), [""; 0]);
        }
    }
}

/// AMD nests and cannot invalidate: its endpoints have no tables, and all the rest. So have those of any other IOMMU.
#[test]
fn f1_14_amd_has_no_tables() {
    let amd = Unit::Amd { efr: 1 << 4 | 1 << 48 | 1 << 7, efr2: 1 };
    for unit in [amd, Unit::Plain] {
        let mut fakes = Fakes::new(unit, Layout::TwoUnits, FakeDevice::on, CANNOT);
        let caps = fakes.host().caps(ENDPOINTS[0]).unwrap().clone();
        assert_eq!((caps.tables, caps.kinds), (None, TableKinds::empty()));
        let mut identity = fakes.host().create(SpaceSpec::Identity).unwrap();
        bind(&mut fakes, &mut identity);
        assert_eq!(read(&fakes, Memory::page(3).0), page(3));
    }
}

/// The emulated SMMUv3 has no PASIDs: a table of one descriptor is bound, a larger one refused.
#[test]
fn f1_15_the_emulated_smmuv3_has_one_descriptor() {
    let mut fakes = Fakes::emulated();
    let caps = tables(&mut fakes);
    assert!(matches!(&caps, TableCaps::Smmuv3(caps) if (caps.ssid_bits, caps.oas_bits) == (0, 44)));
    let table = PasidTable::new(&caps, 0, &mut fakes.memory);
    let pages = PageTable::new(&caps, 1, &mut fakes.memory);
    pages.map(&mut fakes.memory, 0x1000, Memory::page(10).0, 0x1000, Attrs::READ_WRITE);
    table.set(&mut fakes.memory, 0, &pages);
    let TableDescriptor::Smmuv3 { ste0, ste1 } = table.descriptor() else { panic!() };
    let mut bare = Bare::over(DeviceConfig::default(), None, fakes.host.take().unwrap());
    let mut attach = |ste0| {
        let table = TableDescriptor::Smmuv3 { ste0, ste1 };
        bare.send(&request::attach_table(3, ENDPOINTS[0].0, table))
    };
    assert_eq!(attach(ste0 | 1 << 59), Status::Unsupp);
    assert_eq!(attach(ste0), Status::Ok);
    assert_eq!(read(&fakes, 0x1000), page(10));
    assert_eq!(Arc::strong_count(&fakes.fake), 2);
}
