//! The whole way of a guest's table to an SMMUv3, by nothing but the ioctls, with a device that does DMA.
//!
//! `bare_nesting TESTDEV [EDU]`, each like `0000:00:04.0`: QEMU's iommu-testdev and edu, bound to vfio-pci, behind an
//! SMMUv3 with both stages. Says each step; ends with status 1 where the kernel or the hardware does otherwise.

use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use pgtable_formats::{Iova, IovaRange, Pasid};
use vfio_ioctls::VfioDevice;
use viommu_host_iommufd::engine::{self, Abilities, DmaError, Engine, Interrupt};
use viommu_host_iommufd::kernel::{
    Backing, Commands, DeviceId, Event, HwKind, HwptData, HwptFlags, HwptSpec, IoasMapping, Iommufd,
    ObjectId, ResponseCode, ViommuKind,
};
use viommu_host_iommufd::sys::Sys;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Where the guest's memory begins, and how much there is.
const MEMORY: u64 = 0x4000_0000;
const MEMORY_LENGTH: usize = 16 << 20;

// What lies in it.
const CD: u64 = MEMORY + 0x1000;
const LEVEL_1: u64 = MEMORY + 0x2000;
const LEVEL_2: u64 = MEMORY + 0x3000;
const LEVEL_3: u64 = MEMORY + 0x4000;
const LEVEL_3_DOORBELL: u64 = MEMORY + 0x5000;
const PAGE_A: u64 = MEMORY + 0x20_0000;
const PAGE_B: u64 = MEMORY + 0x20_1000;
const PAGE_C: u64 = MEMORY + 0x20_2000;

/// What the guest calls it.
const IOVA: u64 = 0x1000_0000;
const HIGH: u64 = 0x12_0000_0000;
const UNMAPPED: u64 = 0x1001_0000;

/// The window that the kernel maps the interrupt controller's doorbell into, on Arm.
const DOORBELL: u64 = 0x0800_0000;

const VSID: u64 = 0x42;
const VSID_EDU: u64 = 0x43;
const ASID: u64 = 7;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let Some(test_device) = arguments.next() else {
        eprintln!("bare_nesting TESTDEV [EDU], each like 0000:00:04.0");
        return ExitCode::FAILURE;
    };
    match run(&test_device, arguments.next().as_deref()) {
        Ok(()) => {
            println!("all as it should be");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("FAILED: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(test_device: &str, edu: Option<&str>) -> Outcome<()> {
    let kernel = Sys::open()?;
    let (device, handle) = bind(&kernel, test_device)?;
    let info = kernel.hw_info(device)?;
    println!("{info:x?}");
    ensure("an SMMUv3", matches!(info.kind, HwKind::Smmuv3 { .. }))?;
    let mut engine = engine::probe(&handle)?;
    println!("{} can {:?}", engine.name(), engine.abilities());
    ensure("a device that tells faults", engine.abilities().contains(Abilities::TELLS_FAULTS))?;

    let memory = Memory::new()?;
    let ioas = kernel.alloc_ioas()?;
    ensure("an empty IOAS takes everything", kernel.iova_ranges(ioas)?.allowed == [IovaRange::ALL])?;
    let whole = range(MEMORY, MEMORY_LENGTH as u64);
    kernel.map(ioas, &memory.as_file(whole))?;
    expect("mapping it twice", kernel.map(ioas, &memory.as_file(whole)), Errno::EEXIST)?;

    expect("a vIOMMU on an IOAS", kernel.alloc_viommu(ViommuKind::Smmuv3, device, ioas), Errno::ENOENT)?;
    let parent = kernel.alloc_hwpt(&paging(device, ioas, HwptFlags::NEST_PARENT))?;
    let viommu = kernel.alloc_viommu(ViommuKind::Smmuv3, device, parent)?;

    memory.write_tables()?;
    let abort = kernel.alloc_hwpt(&nested(device, viommu, [0, 0]))?;
    let bypass = kernel.alloc_hwpt(&nested(device, viommu, [1 | 4 << 1, 0]))?;
    let table = kernel.alloc_hwpt(&nested(device, viommu, [1 | 5 << 1 | CD, 1 << 2 | 1 << 4 | 3 << 6]))?;
    expect("STE of stage 2", kernel.alloc_hwpt(&nested(device, viommu, [1 | 6 << 1, 0])), Errno::EIO)?;
    expect("a table before the vDEVICE", kernel.attach(device, None, table), Errno::ENOENT)?;

    let vdevice = kernel.alloc_vdevice(viommu, device, VSID)?;
    expect("a second vDEVICE", kernel.alloc_vdevice(viommu, device, 0x99), Errno::EEXIST)?;
    let queue = kernel.alloc_event_queue(viommu, ViommuKind::Smmuv3, 8)?;
    let second = kernel.alloc_event_queue(viommu, ViommuKind::Smmuv3, 8);
    expect("a second event queue", second, Errno::EEXIST)?;
    ensure("no events yet", kernel.read_events(queue)?.is_empty())?;

    // Abort.
    kernel.attach(device, None, abort)?;
    refused("abort", engine.as_mut(), PAGE_A)?;

    // Stage 1 on stage 2.
    kernel.attach(device, None, table)?;
    memory.clear()?;
    engine.write(Iova(IOVA), 64)?;
    memory.ensure_pattern("through the guest's table", engine.as_ref(), PAGE_A)?;

    // A changed table.
    memory.set_page(IOVA, PAGE_B)?;
    memory.clear()?;
    engine.write(Iova(IOVA), 64)?;
    memory.ensure_pattern("stale until invalidated", engine.as_ref(), PAGE_A)?;
    kernel.invalidate(viommu, Commands::Smmuv3(&[tlbi_va(IOVA)]))?;
    memory.clear()?;
    engine.write(Iova(IOVA), 64)?;
    memory.ensure_pattern("fresh after TLBI_NH_VA", engine.as_ref(), PAGE_B)?;

    // Commands that are refused.
    let bad = kernel.invalidate(viommu, Commands::Smmuv3(&[tlbi_va(IOVA), [0x7f, 0], tlbi_va(IOVA)]));
    ensure("an unknown command: EIO after 1", bad.is_err_and(|e| (e.errno, e.done) == (Errno::EIO, 1)))?;
    let bad = kernel.invalidate(viommu, Commands::Smmuv3(&[[0x06 | 0x77 << 32, 0]]));
    ensure("an unknown vSID: EIO after 0", bad.is_err_and(|e| (e.errno, e.done) == (Errno::EIO, 0)))?;
    let bad = kernel.invalidate(ObjectId(9999), Commands::Smmuv3(&[tlbi_va(IOVA)]));
    ensure("an unknown object: ENOENT after 0", bad.is_err_and(|e| (e.errno, e.done) == (Errno::ENOENT, 0)))?;
    kernel.invalidate(viommu, Commands::Smmuv3(&[[0x06 | VSID << 32, 0], [0x10, 0]]))?;

    // Events: one for each 4 bytes, and room for 8.
    refused("nothing mapped", engine.as_mut(), UNMAPPED)?;
    let events = wait_for_events(&kernel, queue)?;
    println!("  {} records, the first {:x?}", events.len(), events.first());
    let Some(Event::Smmuv3 { sequence: 0, record }) = events.first() else {
        return Err("no first event".into());
    };
    ensure("F_TRANSLATION of the vSID", (record[0] & 0xff, record[0] >> 32) == (0x10, VSID))?;
    ensure("at the address", record[2] & !0xfff == UNMAPPED)?;
    println!("  the last: {:x?}", events.last());
    ensure("lost events are told", events.iter().any(|event| matches!(event, Event::Lost { .. })))?;

    // Bypass, and the nest parent itself.
    for (what, hwpt) in [("bypass", bypass), ("the nest parent", parent)] {
        kernel.attach(device, None, hwpt)?;
        memory.clear()?;
        engine.write(Iova(PAGE_C), 64)?;
        memory.ensure_pattern(what, engine.as_ref(), PAGE_C)?;
        refused("outside of memory", engine.as_mut(), MEMORY + MEMORY_LENGTH as u64)?;
    }
    let holes = kernel.iova_ranges(ioas)?;
    println!("  allowed {:x?}", holes.allowed);
    let doorbell = range(DOORBELL, 0x10_0000);
    ensure("the MSI window is not allowed", holes.allowed.iter().all(|allowed| !allowed.overlaps(doorbell)))?;
    ensure("alignment of a page", holes.alignment == 0x1000)?;

    // Lifetimes.
    expect("destroying what is attached", kernel.destroy(parent), Errno::EBUSY)?;
    expect("PASID without substreams", kernel.attach(device, Pasid::new(5), table), Errno::EINVAL)?;
    expect("destroying a vIOMMU in use", kernel.destroy(viommu), Errno::EBUSY)?;
    expect("destroying nothing", kernel.destroy(ObjectId(9999)), Errno::ENOENT)?;
    expect("a device that is not bound", kernel.attach(DeviceId(9999), None, table), Errno::ENOENT)?;
    page_requests(&kernel)?;

    if let Some(edu) = edu {
        second_device(&kernel, edu, viommu, table, &memory)?;
    }

    kernel.detach(device, None)?;
    refused("detached", engine.as_mut(), PAGE_C)?;
    for object in [table, abort, bypass, queue, vdevice, viommu, parent, ioas] {
        kernel.destroy(object)?;
    }
    drop((engine, handle));
    kernel.unbind(device)?;
    let (again, _handle) = bind(&kernel, test_device)?;
    println!("bound again as {again:?}");
    Ok(())
}

/// A fault queue without a device that could fill it.
fn page_requests(kernel: &Sys) -> Outcome<()> {
    let queue = kernel.alloc_fault_queue()?;
    ensure("a fault queue has a file", kernel.queue_fd(queue).is_some())?;
    ensure("no page requests", kernel.read_page_faults(queue)?.is_empty())?;
    expect("an answer nobody waits for", kernel.respond(queue, 7, ResponseCode::Success), Errno::EINVAL)?;
    kernel.destroy(queue)?;
    expect("a fault queue that is gone", kernel.read_page_faults(queue), Errno::ENOENT)
}

/// Another device under the same table: both directions, and its interrupt.
fn second_device(kernel: &Sys, edu: &str, viommu: ObjectId, table: ObjectId, memory: &Memory) -> Outcome<()> {
    let (device, handle) = bind(kernel, edu)?;
    let vdevice = kernel.alloc_vdevice(viommu, device, VSID_EDU)?;
    kernel.attach(device, None, table)?;
    let mut engine = engine::probe(&handle)?;
    println!("{} can {:?}", engine.name(), engine.abilities());
    let bytes: Vec<u8> = (0..=255).collect();
    memory.clear()?;
    memory.guest.write_slice(&bytes, GuestAddress(PAGE_B))?;
    let start = Instant::now();
    engine.copy(Iova(IOVA), Iova(IOVA + 0x1000), 256)?;
    println!("  a copy of 256 bytes takes {:?}", start.elapsed());
    let mut copied = vec![0; 256];
    memory.guest.read_slice(&mut copied, GuestAddress(PAGE_C))?;
    ensure("copied by the second device", copied == bytes)?;
    memory.guest.write_slice(&[0xdd; 256], GuestAddress(PAGE_C))?;
    engine.copy(Iova(HIGH + IOVA), Iova(HIGH + IOVA + 0x1000), 256)?;
    memory.guest.read_slice(&mut copied, GuestAddress(PAGE_C))?;
    ensure("and with addresses above 4 GiB", copied == bytes)?;

    let interrupt = Interrupt::enable(&handle)?;
    engine.raise_interrupt()?;
    ensure("no MSI without the doorbell", interrupt.wait(Duration::from_millis(300))? == 0)?;
    engine.acknowledge_interrupt()?;
    memory.map_doorbell()?;
    engine.raise_interrupt()?;
    ensure("MSI through the guest's table", interrupt.wait(Duration::from_secs(5))? == 1)?;
    engine.acknowledge_interrupt()?;
    drop(interrupt);

    handle.reset();
    engine.restart()?;
    engine.copy(Iova(IOVA), Iova(IOVA + 0x1000), 256)?;
    println!("ok: works after a reset");

    kernel.detach(device, None)?;
    kernel.destroy(vdevice)?;
    kernel.unbind(device)?;
    Ok(())
}

fn bind(kernel: &Sys, address: &str) -> Outcome<(DeviceId, Arc<VfioDevice>)> {
    Ok(kernel.bind(&PathBuf::from("/sys/bus/pci/devices").join(address))?)
}

fn paging(device: DeviceId, ioas: ObjectId, flags: HwptFlags) -> HwptSpec {
    HwptSpec { device, parent: ioas, flags, data: HwptData::None, fault_queue: None }
}

fn nested(device: DeviceId, viommu: ObjectId, ste: [u64; 2]) -> HwptSpec {
    HwptSpec {
        device,
        parent: viommu,
        flags: HwptFlags::empty(),
        data: HwptData::Smmuv3(ste),
        fault_queue: None,
    }
}

/// `TLBI_NH_VA` of one page.
fn tlbi_va(iova: u64) -> [u64; 2] {
    [0x12 | ASID << 48, iova | 1]
}

fn range(start: u64, length: u64) -> IovaRange {
    IovaRange::from_length(Iova(start), length).unwrap_or(IovaRange::ALL)
}

fn ensure(what: &str, holds: bool) -> Outcome<()> {
    if !holds {
        return Err(what.into());
    }
    println!("ok: {what}");
    Ok(())
}

fn expect<T>(what: &str, result: Result<T, Errno>, errno: Errno) -> Outcome<()> {
    match result {
        Err(found) if found == errno => ensure(&format!("{what}: {found}"), true),
        Err(found) => Err(format!("{what}: {found} and not {errno}").into()),
        Ok(_) => Err(format!("{what}: done, and not {errno}").into()),
    }
}

fn refused(what: &str, engine: &mut dyn Engine, iova: u64) -> Outcome<()> {
    let result = engine.write(Iova(iova), 64);
    ensure(&format!("{what}: the write of {iova:#x} is refused"), result == Err(DmaError::Faulted))
}

fn wait_for_events(kernel: &Sys, queue: ObjectId) -> Outcome<Vec<Event>> {
    let start = Instant::now();
    let mut events = Vec::new();
    while start.elapsed() < Duration::from_secs(2) {
        let more = kernel.read_events(queue)?;
        if more.is_empty() && !events.is_empty() {
            return Ok(events);
        }
        events.extend(more);
        std::thread::sleep(Duration::from_millis(20));
    }
    Err("no events within 2 s".into())
}

/// The guest's memory: a memfd.
struct Memory {
    guest: GuestMemoryMmap,
    file: File,
}

impl Memory {
    fn new() -> Outcome<Self> {
        let file = File::from(memfd_create(c"guest memory", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(MEMORY_LENGTH as u64)?;
        let region = (GuestAddress(MEMORY), MEMORY_LENGTH, Some(FileOffset::new(file.try_clone()?, 0)));
        Ok(Self { guest: GuestMemoryMmap::from_ranges_with_files([region])?, file })
    }

    fn as_file(&self, range: IovaRange) -> IoasMapping {
        use std::os::fd::AsRawFd;
        let backing = Backing::File { fd: self.file.as_raw_fd(), offset: 0 };
        IoasMapping { range, backing, readable: true, writable: true }
    }

    /// A context descriptor, and three levels of 4 KiB tables with two pages.
    fn write_tables(&self) -> Outcome<()> {
        // T0SZ, cacheable, inner shareable, EPD1, V, 44 bits out, AA64, R, A, ASET.
        let word0 =
            25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 30 | 1 << 31 | 4 << 32 | 1 << 41 | 7 << 45 | ASID << 48;
        for (index, word) in [word0, LEVEL_1, 0, 0xff].into_iter().enumerate() {
            self.guest.write_obj(word, GuestAddress(CD + 8 * index as u64))?;
        }
        self.guest.write_obj(LEVEL_2 | 3, GuestAddress(LEVEL_1))?;
        // The same again, high up.
        self.guest.write_obj(LEVEL_2 | 3, GuestAddress(LEVEL_1 + 8 * (HIGH >> 30)))?;
        self.guest.write_obj(LEVEL_3 | 3, GuestAddress(LEVEL_2 + 8 * (IOVA >> 21)))?;
        self.set_page(IOVA, PAGE_A)?;
        self.set_page(IOVA + 0x1000, PAGE_C)
    }

    fn set_page(&self, iova: u64, page: u64) -> Outcome<()> {
        let entry = GuestAddress(LEVEL_3 + 8 * ((iova >> 12) & 511));
        Ok(self.guest.write_obj(descriptor(page), entry)?)
    }

    fn map_doorbell(&self) -> Outcome<()> {
        self.guest.write_obj(LEVEL_3_DOORBELL | 3, GuestAddress(LEVEL_2 + 8 * (DOORBELL >> 21)))?;
        Ok(self.guest.write_obj(descriptor(DOORBELL), GuestAddress(LEVEL_3_DOORBELL))?)
    }

    fn clear(&self) -> Outcome<()> {
        Ok(self.guest.write_slice(&[0xee; 3 * 0x1000], GuestAddress(PAGE_A))?)
    }

    /// The device's bytes lie at `page`, and nowhere else.
    fn ensure_pattern(&self, what: &str, engine: &dyn Engine, page: u64) -> Outcome<()> {
        let mut expected = vec![0xee; 3 * 0x1000];
        let offset = usize::try_from(page - PAGE_A)?;
        expected[offset..offset + 64].copy_from_slice(&engine.pattern(64).ok_or("no pattern")?);
        let mut found = vec![0; 3 * 0x1000];
        self.guest.read_slice(&mut found, GuestAddress(PAGE_A))?;
        ensure(&format!("{what}: 64 bytes at {page:#x}"), found == expected)
    }
}

/// A page for reading and writing: AP[1], inner shareable, AF, nG.
fn descriptor(page: u64) -> u64 {
    page | 3 | 1 << 6 | 3 << 8 | 1 << 10 | 1 << 11
}
