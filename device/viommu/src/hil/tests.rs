//! The whole list on a kernel and devices that are made up; and on such that do not do what they should.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::errno::Errno;
use pgtable_formats::context::smmuv3::{Caps, IdRegisters};
use pgtable_formats::{Access, Gpa, Iova, IovaRange, NotMemory, Pasid, TableMem};
use viommu_host_iommufd::Device;
use viommu_host_iommufd::counted::Counted;
use viommu_host_iommufd::engine::{Abilities, DmaError, Engine};
use viommu_host_iommufd::fake::{FakeDevice, FakeIommufd, FakeMemory, Memory, Unit};
use viommu_host_iommufd::kernel::{
    Backing, Commands, DeviceId, Event, HwInfo, HwptData, HwptSpec, InvalidateError, IoasMapping, Iommufd,
    IovaRanges, ObjectId, PageFault, ResponseCode, ViommuKind,
};
use viommu_wire::{EndpointId, ReservedKind, ReservedRegion};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use super::bench::{Bench, Controls, Interrupts, Station, by_name};
use super::generate::{self, Layout, RandomTable, Shape};
use super::outcome::{Done, Outcome, Report};
use super::random::Random;
use super::{Options, check_all, checks};

/// The memory of the guest that is at work.
#[derive(Clone, Debug, Default)]
struct Current(Arc<Mutex<Option<GuestMemoryMmap>>>);

impl Current {
    fn map(&self) -> GuestMemoryMmap {
        self.0.lock().unwrap().clone().unwrap()
    }
}

impl Memory for Current {
    fn gpa(&self, at: Backing) -> Option<Gpa> {
        FakeMemory::new(&self.map()).gpa(at)
    }
}

impl TableMem for Current {
    fn load(&self, at: Gpa) -> Result<u64, NotMemory> {
        FakeMemory::new(&self.map()).load(at)
    }

    fn compare_exchange(&self, at: Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, NotMemory> {
        FakeMemory::new(&self.map()).compare_exchange(at, current, new)
    }
}

type Fake = FakeIommufd<Current>;

/// What a kernel does not do as it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sabotage {
    Nothing,
    /// Commands are taken, and nothing is dropped.
    DeafToInvalidations,
    /// Every nested table is the first one.
    WrongTable,
    /// Nobody hears of a fault.
    MuteAboutFaults,
    /// Whatever is attached, it is what was attached first.
    KeepsTheFirst,
    /// Objects stay.
    DestroysNothing,
    /// Read-only mappings are writable.
    IgnoresPermissions,
}

struct Broken {
    kernel: Arc<Fake>,
    sabotage: Sabotage,
    first_table: Mutex<Option<HwptData>>,
    first_attached: Mutex<BTreeMap<DeviceId, ObjectId>>,
}

impl Iommufd for Broken {
    fn destroy(&self, object: ObjectId) -> Result<(), Errno> {
        if self.sabotage == Sabotage::DestroysNothing {
            return Err(Errno::EBUSY);
        }
        self.kernel.destroy(object)
    }
    fn alloc_ioas(&self) -> Result<ObjectId, Errno> {
        self.kernel.alloc_ioas()
    }
    fn iova_ranges(&self, ioas: ObjectId) -> Result<IovaRanges, Errno> {
        self.kernel.iova_ranges(ioas)
    }
    fn map(&self, ioas: ObjectId, mapping: &IoasMapping) -> Result<(), Errno> {
        let writable = mapping.writable || self.sabotage == Sabotage::IgnoresPermissions;
        self.kernel.map(ioas, &IoasMapping { writable, ..*mapping })
    }
    fn unmap(&self, ioas: ObjectId, range: IovaRange) -> Result<u64, Errno> {
        self.kernel.unmap(ioas, range)
    }
    fn hw_info(&self, device: DeviceId) -> Result<HwInfo, Errno> {
        self.kernel.hw_info(device)
    }
    fn alloc_hwpt(&self, spec: &HwptSpec) -> Result<ObjectId, Errno> {
        let mut data = spec.data;
        let translates = matches!(data, HwptData::Smmuv3([ste0, _]) if ste0 & 0xf == 0xb);
        if self.sabotage == Sabotage::WrongTable && translates {
            data = *self.first_table.lock().unwrap().get_or_insert(data);
        }
        self.kernel.alloc_hwpt(&HwptSpec { data, ..*spec })
    }
    fn invalidate(&self, object: ObjectId, commands: Commands<'_>) -> Result<(), InvalidateError> {
        match self.sabotage {
            Sabotage::DeafToInvalidations => Ok(()),
            _ => self.kernel.invalidate(object, commands),
        }
    }
    fn alloc_viommu(&self, kind: ViommuKind, device: DeviceId, parent: ObjectId) -> Result<ObjectId, Errno> {
        self.kernel.alloc_viommu(kind, device, parent)
    }
    fn alloc_vdevice(&self, viommu: ObjectId, device: DeviceId, virtual_id: u64) -> Result<ObjectId, Errno> {
        self.kernel.alloc_vdevice(viommu, device, virtual_id)
    }
    fn alloc_event_queue(&self, viommu: ObjectId, kind: ViommuKind, depth: u32) -> Result<ObjectId, Errno> {
        self.kernel.alloc_event_queue(viommu, kind, depth)
    }
    fn read_events(&self, queue: ObjectId) -> Result<Vec<Event>, Errno> {
        let events = self.kernel.read_events(queue)?;
        Ok(if self.sabotage == Sabotage::MuteAboutFaults { Vec::new() } else { events })
    }
    fn alloc_fault_queue(&self) -> Result<ObjectId, Errno> {
        self.kernel.alloc_fault_queue()
    }
    fn read_page_faults(&self, queue: ObjectId) -> Result<Vec<PageFault>, Errno> {
        self.kernel.read_page_faults(queue)
    }
    fn respond(&self, queue: ObjectId, cookie: u32, code: ResponseCode) -> Result<(), Errno> {
        self.kernel.respond(queue, cookie, code)
    }
    fn queue_fd(&self, queue: ObjectId) -> Option<std::os::fd::RawFd> {
        self.kernel.queue_fd(queue)
    }
    fn attach(&self, device: DeviceId, pasid: Option<Pasid>, table: ObjectId) -> Result<(), Errno> {
        if self.sabotage == Sabotage::KeepsTheFirst && pasid.is_none() {
            let first = *self.first_attached.lock().unwrap().entry(device).or_insert(table);
            if first != table && self.kernel.attached(device, None) == Some(first) {
                return Ok(());
            }
        }
        self.kernel.attach(device, pasid, table)
    }
    fn detach(&self, device: DeviceId, pasid: Option<Pasid>) -> Result<(), Errno> {
        self.first_attached.lock().unwrap().remove(&device);
        self.kernel.detach(device, pasid)
    }
}

/// A device as QEMU's two are: one that copies and is not told of faults, one that writes a pattern and is.
struct FakeEngine {
    kernel: Arc<Fake>,
    memory: Current,
    device: DeviceId,
    arrived: Arc<AtomicU64>,
    /// `None`: it writes a pattern.
    buffer: Option<Vec<u8>>,
}

impl FakeEngine {
    fn pieces(&self, at: Iova, length: usize, access: Access) -> Result<Vec<(Gpa, usize)>, DmaError> {
        let mut pieces = Vec::new();
        let mut done = 0;
        while done < length {
            let iova = at.0 + done as u64;
            let now = (0x1000 - (iova & 0xfff) as usize).min(length - done);
            let led = self.kernel.dma_gpa(self.device, None, iova, access);
            pieces.push((led.ok().flatten().ok_or(DmaError::Faulted)?, now));
            done += now;
        }
        Ok(pieces)
    }

    fn told(&self, done: Result<(), DmaError>) -> Result<(), DmaError> {
        if self.buffer.is_some() { Ok(()) } else { done }
    }
}

impl Engine for FakeEngine {
    fn name(&self) -> &'static str {
        if self.buffer.is_some() { "copier" } else { "writer" }
    }
    fn abilities(&self) -> Abilities {
        match self.buffer {
            Some(_) => Abilities::READ | Abilities::WRITE | Abilities::INTERRUPT,
            None => Abilities::WRITE | Abilities::TELLS_FAULTS,
        }
    }
    fn limit(&self) -> usize {
        0x1000
    }
    fn pattern(&self, length: usize) -> Option<Vec<u8>> {
        self.buffer.is_none().then(|| (1u8..=7).cycle().take(length).collect())
    }
    fn write(&mut self, to: Iova, length: usize) -> Result<(), DmaError> {
        let data = self.pattern(length).unwrap_or_else(|| self.buffer.clone().unwrap());
        let written = self.pieces(to, length, Access::WRITE).map(|pieces| {
            let mut done = 0;
            for (at, now) in pieces {
                self.memory.map().write_slice(&data[done..done + now], GuestAddress(at.0)).unwrap();
                done += now;
            }
        });
        self.told(written)
    }
    fn read(&mut self, from: Iova, length: usize) -> Result<(), DmaError> {
        let pieces = self.pieces(from, length, Access::READ);
        let map = self.memory.map();
        let buffer = self.buffer.as_mut().ok_or(DmaError::Unsupported)?;
        let read = pieces.map(|pieces| {
            let mut done = 0;
            for (at, now) in pieces {
                map.read_slice(&mut buffer[done..done + now], GuestAddress(at.0)).unwrap();
                done += now;
            }
        });
        self.told(read)
    }
    fn raise_interrupt(&mut self) -> Result<(), DmaError> {
        if self.kernel.interrupt(self.device).is_ok() {
            self.arrived.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }
    fn acknowledge_interrupt(&mut self) -> Result<(), DmaError> {
        Ok(())
    }
    fn restart(&mut self) -> Result<(), DmaError> {
        if let Some(buffer) = &mut self.buffer {
            buffer.fill(0);
        }
        Ok(())
    }
}

struct FakeControls(Arc<AtomicU64>);

impl Controls for FakeControls {
    fn reset(&mut self) -> anyhow::Result<()> {
        Ok(())
    }
    fn interrupts(&mut self) -> anyhow::Result<Box<dyn Interrupts>> {
        self.0.store(0, Ordering::SeqCst);
        Ok(Box::new(FakeControls(self.0.clone())))
    }
}

impl Interrupts for FakeControls {
    fn wait(&mut self, _: Duration) -> anyhow::Result<u64> {
        Ok(self.0.swap(0, Ordering::SeqCst))
    }
}

struct FakeBench {
    fake: Arc<Fake>,
    kernel: Arc<Counted<Broken>>,
    memory: Current,
    stations: Vec<Station>,
}

impl FakeBench {
    fn new(unit: Unit, sabotage: Sabotage) -> Self {
        let memory = Current::default();
        let fake = Arc::new(Fake::new(memory.clone()));
        let unit_id = fake.add_unit(unit);
        let kernel = Arc::new(Counted::new(Broken {
            kernel: fake.clone(),
            sabotage,
            first_table: Mutex::default(),
            first_attached: Mutex::default(),
        }));
        let station = |endpoint, buffer: Option<Vec<u8>>| {
            let id = fake.add_device(FakeDevice::on(unit_id));
            let arrived = Arc::new(AtomicU64::new(0));
            let engine = FakeEngine {
                kernel: fake.clone(),
                memory: memory.clone(),
                device: id,
                arrived: arrived.clone(),
                buffer,
            };
            let range = match unit {
                Unit::Smmuv3(_) => IovaRange::new(Iova(0x800_0000), Iova(0x80f_ffff)),
                _ => IovaRange::new(Iova(0xfee0_0000), Iova(0xfeef_ffff)),
            };
            let reserved = vec![ReservedRegion { kind: ReservedKind::Msi, range: range.unwrap() }];
            let device = Device { id, reserved, may_stall: false, ats: false, pri: false };
            Station::new(EndpointId(endpoint), device, Box::new(engine), Box::new(FakeControls(arrived)))
        };
        let stations = vec![station(8, Some(vec![0; 0x1000])), station(16, None)];
        Self { fake, kernel, memory, stations }
    }
}

impl Bench for FakeBench {
    type Kernel = Broken;

    fn kernel(&self) -> anyhow::Result<Arc<Counted<Broken>>> {
        Ok(self.kernel.clone())
    }
    fn ioctls(&self) -> BTreeMap<&'static str, u64> {
        by_name(&self.kernel)
    }
    fn count(&self) -> usize {
        self.stations.len()
    }
    fn name(&self, index: usize) -> String {
        ["copier", "writer"][index].to_owned()
    }
    fn station(&mut self, index: usize) -> anyhow::Result<&mut Station> {
        Ok(&mut self.stations[index])
    }
    fn memory_is(&mut self, memory: &GuestMemoryMmap) {
        *self.memory.0.lock().unwrap() = Some(memory.clone());
    }
    fn settle(&mut self) -> anyhow::Result<()> {
        if self.kernel.inner().sabotage != Sabotage::Nothing {
            return Ok(());
        }
        let left = self.fake.describe();
        anyhow::ensure!(left.is_empty(), "objects are left: {left:?}");
        let violations = self.fake.violations();
        anyhow::ensure!(violations.is_empty(), "against the rules: {violations:?}");
        Ok(())
    }
    fn worker(&self, _: usize) -> Option<Command> {
        None
    }
    fn let_go(&mut self) {}
    fn take_again(&mut self) -> anyhow::Result<()> {
        Ok(())
    }
}

fn options(only: &[&str]) -> Options {
    let captures = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/captures/");
    Options {
        devices: Vec::new(),
        junit: None,
        ktap: None,
        html: None,
        only: only.iter().map(ToString::to_string).collect(),
        list: false,
        seed: 1,
        tables: 100,
        captures: ["smmuv3-linux-7.3-4k", "vtd-linux-7.3-4level"]
            .map(|name| format!("{captures}{name}").into())
            .into(),
        child: false,
    }
}

fn run(bench: &mut FakeBench, only: &[&str]) -> Report {
    let options = options(only);
    let all = checks::all();
    let checks = super::selected(&all, &options.only).unwrap();
    let mut report = Report::default();
    check_all(bench, &checks, &options, &mut report, &mut |text| {
        print!("{text}");
        Ok(())
    })
    .unwrap();
    report
}

fn names(report: &Report, wanted: fn(&Outcome) -> bool) -> Vec<(&str, &'static str)> {
    let found = report.checks.iter().filter(|check| wanted(&check.outcome));
    found.map(|Done { subject, name, .. }| (subject.as_str(), *name)).collect()
}

fn failed(report: &Report) -> Vec<(&str, &'static str)> {
    names(report, |outcome| matches!(outcome, Outcome::Failed(_)))
}

fn skipped(report: &Report) -> Vec<(&str, &'static str)> {
    names(report, |outcome| matches!(outcome, Outcome::Skipped(_)))
}

#[test]
fn all_pass_on_a_kernel_that_keeps_the_rules() {
    let report = run(&mut FakeBench::new(Unit::emulated_smmuv3(), Sabotage::Nothing), &[]);
    assert_eq!(failed(&report), []);
    let expected = [
        ("copier", "killed-process"),
        ("writer", "table-read"),
        ("writer", "msi-mapped"),
        ("writer", "msi-unmapped"),
        ("writer", "killed-process"),
    ];
    assert_eq!(skipped(&report), expected);
    assert_eq!(report.comparisons.len(), 2);
}

#[test]
fn what_needs_an_smmu_is_skipped_by_name_on_vtd() {
    let report = run(&mut FakeBench::new(Unit::vtd(), Sabotage::Nothing), &[]);
    assert_eq!(failed(&report), []);
    let skipped: Vec<_> = skipped(&report).into_iter().filter(|(subject, _)| *subject == "copier").collect();
    let names: Vec<_> = skipped.into_iter().map(|(_, name)| name).collect();
    let expected = [
        "fault-unmapped",
        "fault-read-only",
        "fault-privileged",
        "rebind-same-tag",
        "mediated-window",
        "msi-mapped",
        "msi-unmapped",
        "killed-process",
        "random-tables",
        "captured-tables",
    ];
    assert_eq!(names, expected);
}

/// What fails when a kernel is broken in one way. Each list is the checks that are about it, and at least these fail.
fn fails(sabotage: Sabotage, expected: &[&str]) {
    let report = run(&mut FakeBench::new(Unit::emulated_smmuv3(), sabotage), &[]);
    let failed: Vec<_> = failed(&report).into_iter().map(|(_, name)| name).collect();
    for name in expected {
        assert!(failed.contains(name), "{name} does not notice {sabotage:?}: {failed:?}");
    }
}

#[test]
fn a_kernel_that_drops_invalidations_is_noticed() {
    fails(
        Sabotage::DeafToInvalidations,
        &[
            "stale-translation",
            "invalidate-address",
            "invalidate-range",
            "invalidate-pasid",
            "invalidate-domain",
            "invalidate-pasid-cache",
            "unmap",
            "rebind-same-tag",
            "mediated-table",
            "pair-invalidate",
        ],
    );
}

#[test]
fn a_kernel_that_attaches_another_table_is_noticed() {
    fails(
        Sabotage::WrongTable,
        &["rebind", "random-tables", "captured-tables", "comparison", "pair-one-domain", "pair-two-tables"],
    );
}

#[test]
fn a_kernel_that_keeps_the_first_table_is_noticed() {
    fails(
        Sabotage::KeepsTheFirst,
        &[
            "table-write",
            "bypass-domain",
            "rebind",
            "map-unmap",
            "between-modes",
            "mediated-table",
            "mediated-turns",
            "random-tables",
        ],
    );
}

#[test]
fn a_kernel_that_tells_of_no_fault_is_noticed() {
    fails(
        Sabotage::MuteAboutFaults,
        &[
            "fault-unmapped",
            "fault-read-only",
            "msi-unmapped",
            "random-tables",
            "captured-tables",
            "pair-two-tables",
        ],
    );
}

#[test]
fn objects_that_stay_are_noticed() {
    fails(Sabotage::DestroysNothing, &["nothing-leaks"]);
}

#[test]
fn permissions_that_are_ignored_are_noticed() {
    fails(Sabotage::IgnoresPermissions, &["map-read-only", "mediated-window"]);
}

/// A table as random as `seed`.
fn table(seed: u64, is_odd: bool) -> RandomTable {
    let layout = Layout {
        tables: Gpa(0x4000_0000),
        table_pages: 64,
        data: Gpa(0x4020_0000),
        data_bytes: 2 << 20,
        nowhere: Gpa(0x8000_0000),
    };
    let caps = Caps::from_registers(IdRegisters::SOFTWARE);
    let shape = Shape { privilege: is_odd, top_blocks: is_odd, in_order: is_odd };
    generate::smmuv3(&mut Random::new(seed), &layout, &caps, shape)
}

#[test]
fn the_same_seed_makes_the_same_table() {
    let parts = |seed| (table(seed, true).pages, table(seed, true).probes);
    assert_eq!(parts(7), parts(7));
    assert_ne!(parts(7), parts(8));
    assert!(parts(7).0.keys().all(|at| (0x4000_0000..0x4004_0000).contains(at)));
}

#[test]
fn where_asked_nothing_is_refused_for_two_reasons() {
    for seed in 0..500 {
        let table = table(seed, false);
        // Below a table entry that forbids writes there are no holes.
        for iova in table.probes.iter().filter(|iova| iova.0 < 1 << 48) {
            let way = table.way(*iova);
            let last = way.rsplit_once(" 0x").and_then(|(_, entry)| u64::from_str_radix(entry, 16).ok());
            let is_hole = last.is_some_and(|entry| entry & 1 == 0);
            assert!(!(is_hole && way.contains("0x40000000400")), "seed {seed}, {iova}: {way}");
        }
    }
}

#[test]
fn a_check_that_does_not_exist_is_an_error() {
    let all = checks::all::<FakeBench>();
    let error = super::selected(&all, &["no-such".to_owned()]).err().unwrap();
    assert!(error.to_string().contains("--list"), "{error}");
}
