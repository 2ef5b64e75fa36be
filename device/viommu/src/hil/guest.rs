//! A VMM and its guest in one process, over devices of the real machine.
//!
//! Guest memory is a memfd; the device of `viommu-device` stands on [`IommufdHost`], with [`Mediated`] around it for the
//! kind of table that the hardware does not take; the driver of `viommu-guest` sends its requests over real virtqueues. Nothing of it is simulated but the guest's processor, which is this one.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use pgtable_formats::format::Attrs;
use pgtable_formats::{Gpa, Iova, IovaRange, TableAlloc as _};
use viommu_device::host::Host as _;
use viommu_device::mediated::{Mediated, MediationLimits, Window};
use viommu_device::{Device, DeviceConfig};
use viommu_guest::hal::{GuestMem as _, Parts};
use viommu_guest::tables::{AddressSpace, PasidTable, SpaceOptions, Style, TableOptions};
use viommu_guest::{BypassDomain, Driver, DriverOptions, Endpoint};
use viommu_host_iommufd::IommufdHost;
use viommu_host_iommufd::counted::Counted;
use viommu_host_iommufd::kernel::Iommufd;
use viommu_queue::GuestTables;
use viommu_queue::loopback::{Alloc, Machine, Memory, Transport};
use viommu_wire::numbers::EVENT_QUEUE;
use viommu_wire::{DomainId, Event, FaultEvent, Features};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
};

use super::bench::{Bench, Moved, Station};
use super::picture::{self, End, Picture};

/// Bytes of a page.
pub(super) const PAGE: u64 = 0x1000;
/// log2 of it.
pub(super) const PAGE_LG2: u8 = 12;
/// First address of guest memory.
pub(super) const FIRST: Gpa = Gpa(0x4000_0000);
/// Bytes of guest memory: all of it is pinned.
pub(super) const BYTES: u64 = 8 << 20;
/// Bytes of the window above guest memory, for tables of the device's own.
const WINDOW_BYTES: u64 = 1 << 20;
/// Where checks map what they map: not an address of guest memory, so that a device in bypass gets nowhere with it.
pub(super) const AT: Iova = Iova(0x1_2340_0000);
/// How long an event may take.
pub(super) const PATIENCE: Duration = Duration::from_millis(500);
/// How long to look for events that must not come.
pub(super) const GLANCE: Duration = Duration::from_millis(20);
/// Bytes of a transfer of which nothing special is asked.
pub(super) const BURST: usize = 64;
/// Bytes of a transfer that is to be refused: devices that move words cause an event for each.
pub(super) const WORD: usize = 4;

const QUEUE_SIZE: u16 = 256;
/// What memory holds before a device writes there.
pub(super) const UNTOUCHED: u8 = 0xa5;

/// The machine: tables go to the hardware as they are, or as what it takes.
pub(super) type HilHost<K> = Mediated<IommufdHost<Counted<K>>, GuestTables>;

/// The driver.
pub(super) type HilDriver<K> = Driver<Parts<Memory, Alloc>, Transport<Machine<HilHost<K>>>>;

/// See the [module](self).
pub(super) struct Guest<K: Iommufd> {
    pub(super) driver: HilDriver<K>,
    pub(super) machine: Machine<HilHost<K>>,
    pub(super) memory: Memory,
    /// Where the tables of the machine's own are.
    pub(super) window: Gpa,
    /// What was mapped and accessed so far.
    pub(super) seen: Picture,
}

/// What came of a write of the device, seen from the memory where it should, or should not, have arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrival {
    /// All of it is there, and nothing beside it changed.
    Arrived,
    /// Nothing changed.
    Nothing,
    /// Something else is there.
    Garbled,
}

impl<K: Iommufd> Guest<K> {
    /// Makes the memory, gives the devices of `bench` to a new machine, and brings its driver up.
    pub(super) fn start<B: Bench<Kernel = K>>(bench: &mut B) -> anyhow::Result<Self> {
        let bytes = usize::try_from(BYTES)?;
        Self::start_with(bench, memory(&[(FIRST, bytes)])?, (FIRST, Gpa(FIRST.0 + BYTES - 1)))
    }

    /// The same with this memory; tables and queues of the driver lie in `own`.
    pub(super) fn start_with<B: Bench<Kernel = K>>(
        bench: &mut B,
        map: GuestMemoryMmap,
        own: (Gpa, Gpa),
    ) -> anyhow::Result<Self> {
        let Windowed { window, of_devices, of_machine } = Windowed::above(&map)?;
        bench.memory_is(&of_machine);
        let mut host = IommufdHost::new(bench.kernel()?, &of_devices)
            .context("cannot hand guest memory to the kernel")?;
        for index in 0..bench.count() {
            let (endpoint, device) = bench.station(index)?.device();
            host.add_endpoint(endpoint, device).with_context(|| format!("cannot add endpoint {endpoint}"))?;
        }
        let memory = Memory::over(map);
        let config = DeviceConfig {
            input_range: host.input_range(),
            page_size_mask: host.page_size_mask(),
            ..DeviceConfig::default()
        };
        let tables = GuestTables::new(&of_machine);
        let host = Mediated::new(host, tables, Some(window), MediationLimits::DEFAULT)?;
        let device = Device::new(config, host)?;
        let machine = Machine::new(memory.clone(), device, QUEUE_SIZE)?;
        let driver = driver(&machine, own)?;
        let mut guest = Self { driver, machine, memory, window: window.first(), seen: Picture::default() };
        guest.forget();
        for index in 0..bench.count() {
            guest.load(bench.station(index)?)?;
        }
        guest.forget();
        Ok(guest)
    }

    /// Gives a device that writes what it read before something to write, in bypass.
    fn load(&mut self, station: &mut Station) -> anyhow::Result<()> {
        if !station.is_empty() {
            return Ok(());
        }
        let endpoint = self.driver.probe(station.endpoint())?;
        let domain = BypassDomain::new(&mut self.driver)?;
        domain.attach(&mut self.driver, &endpoint)?;
        let (source, sink) = (self.page()?, self.page()?);
        self.fetches(station, Iova(source.0), source, (Iova(sink.0), sink), usize::try_from(PAGE)?)
            .context("the device cannot be given something to write, in bypass")?;
        Ok(domain.detach(&mut self.driver, endpoint.id())?)
    }

    /// Resets the device and brings it up anew, as a guest does that starts again. Its old tables are forgotten.
    pub(super) fn restart(self) -> anyhow::Result<Self> {
        let Self { driver: old, machine, memory, window, seen } = self;
        drop(old.shut_down());
        let own = (FIRST, Gpa(FIRST.0 + BYTES - 1));
        Ok(Self { driver: driver(&machine, own)?, machine, memory, window, seen })
    }

    /// Starts a new picture.
    pub(super) fn forget(&mut self) {
        let memory = picture::Memory {
            first: self.memory.first(),
            last: self.memory.last(),
            what: "guest memory (memfd)".to_owned(),
        };
        self.seen = Picture { memory: vec![memory], ..Picture::default() };
    }

    /// The picture so far, without its accesses from here on.
    pub(super) fn snapshot(&mut self, title: impl Into<String>) -> Picture {
        let picture = Picture { title: title.into(), ..self.seen.clone() };
        self.seen.accesses.clear();
        picture
    }

    /// `1 << size_lg2` bytes of memory.
    pub(super) fn block(&mut self, size_lg2: u8) -> anyhow::Result<Gpa> {
        self.driver.platform_mut().alloc.alloc(size_lg2).context("guest memory is used up")
    }

    /// A page of memory.
    pub(super) fn page(&mut self) -> anyhow::Result<Gpa> {
        self.block(PAGE_LG2)
    }

    /// Reads memory, as the guest's processor does.
    pub(super) fn read(&self, at: Gpa, length: usize) -> anyhow::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.memory.read(at, &mut bytes).with_context(|| format!("no guest memory at {at}"))?;
        Ok(bytes)
    }

    /// Writes memory, as the guest's processor does.
    pub(super) fn write(&self, at: Gpa, bytes: &[u8]) -> anyhow::Result<()> {
        self.memory.write(at, bytes).with_context(|| format!("no guest memory at {at}"))
    }

    /// Faults that the device tells of. Waits for the first at most `patience`, and takes what comes with it.
    pub(super) fn faults(&mut self, patience: Duration) -> anyhow::Result<Vec<FaultEvent>> {
        let end = Instant::now() + patience;
        let mut faults = Vec::new();
        loop {
            let before = faults.len();
            // What a VMM does when the kernel's queue has something. The guest looks for itself.
            let _ = self.machine.kick(EVENT_QUEUE)?;
            self.driver.handle_events(|event| {
                if let Event::Fault(fault) = event {
                    faults.push(fault);
                }
            })?;
            let quiet = faults.len() == before;
            if quiet && (!faults.is_empty() || Instant::now() >= end) {
                return Ok(faults);
            }
            std::thread::sleep(Duration::from_millis(if faults.is_empty() { 1 } else { 3 }));
        }
    }

    /// Lets the device write `length` bytes at `iova`, and looks at `target` whether they arrived there.
    pub(super) fn dma_write(
        &mut self,
        station: &mut Station,
        iova: Iova,
        target: Gpa,
        length: usize,
    ) -> anyhow::Result<(Arrival, Moved)> {
        let page = Gpa(target.0 & !(PAGE - 1));
        let offset = usize::try_from(target.0 - page.0)?;
        let span = (offset + length).next_multiple_of(usize::try_from(PAGE)?);
        self.write(page, &vec![UNTOUCHED; span])?;
        let data = station.data(length)?;
        let moved = station.write(iova, length)?;
        let found = self.read(page, span)?;
        let mut expected = vec![UNTOUCHED; span];
        let arrival = if found == expected {
            Arrival::Nothing
        } else {
            let place = expected.get_mut(offset..offset + length).context("a place outside of its pages")?;
            place.copy_from_slice(&data);
            if found == expected { Arrival::Arrived } else { Arrival::Garbled }
        };
        let end = match arrival {
            Arrival::Nothing => End::Faulted,
            Arrival::Arrived | Arrival::Garbled => End::Reached(target),
        };
        self.seen.accesses.push(picture::Access { address: iova, write: true, end });
        Ok((arrival, moved))
    }

    /// The device writes at `iova`, and that must arrive at `target`.
    pub(super) fn reaches(
        &mut self,
        station: &mut Station,
        iova: Iova,
        target: Gpa,
        length: usize,
    ) -> anyhow::Result<()> {
        let (arrival, moved) = self.dma_write(station, iova, target, length)?;
        ensure!(
            moved != Moved::Refused,
            "a DMA write of {length} bytes to {iova} was refused; it should reach {target}"
        );
        ensure!(
            arrival == Arrival::Arrived,
            "a DMA write of {length} bytes to {iova} should arrive at {target}, and there is {}",
            match arrival {
                Arrival::Nothing => "nothing",
                _ => "something else",
            }
        );
        Ok(())
    }

    /// The device reads at `iova`, and must get what is at `source`. It shows what it got by a write to `sink`, an
    /// address and where that leads.
    pub(super) fn fetches(
        &mut self,
        station: &mut Station,
        iova: Iova,
        source: Gpa,
        sink: (Iova, Gpa),
        length: usize,
    ) -> anyhow::Result<()> {
        let data = station.fresh(length);
        self.write(source, &data)?;
        let moved = station.read(iova, data)?;
        self.seen.accesses.push(picture::Access { address: iova, write: false, end: End::Reached(source) });
        ensure!(
            moved != Moved::Refused,
            "a DMA read of {length} bytes at {iova} was refused; it should read {source}"
        );
        self.reaches(station, sink.0, sink.1, length).inspect_err(|_| station.forget()).with_context(|| {
            format!("what a DMA read of {length} bytes at {iova} got is not what is at {source}")
        })
    }

    /// The device writes at `iova`, and that must not change what is at `watched`.
    pub(super) fn blocked(
        &mut self,
        station: &mut Station,
        iova: Iova,
        watched: Gpa,
        length: usize,
    ) -> anyhow::Result<()> {
        let (arrival, moved) = self.dma_write(station, iova, watched, length)?;
        ensure!(
            arrival == Arrival::Nothing,
            "a DMA write to {iova} should be refused, and it changed {watched}"
        );
        ensure!(
            moved != Moved::Done,
            "a DMA write to {iova} should be refused, and the device says that it was done"
        );
        Ok(())
    }

    /// The next access goes to an address that is not in a table any more: what it shows is stale.
    pub(super) fn last_was_stale(&mut self) {
        if let Some(access) = self.seen.accesses.last_mut()
            && let End::Reached(at) = access.end
        {
            access.end = End::Stale(at);
        }
    }
}

/// A page table for a device's untagged accesses.
pub(super) struct Bound {
    pub(super) pasids: PasidTable,
    pub(super) space: AddressSpace,
    /// Untagged accesses have the page table. Where the guest fills a table of PASIDs, from the start.
    entered: bool,
}

impl Bound {
    /// A new table in a domain of its own, empty, handed over by ATTACH_TABLE.
    pub(super) fn new<K: Iommufd>(guest: &mut Guest<K>, endpoint: &Endpoint) -> anyhow::Result<Self> {
        let mut bound = Self::unattached(guest, endpoint)?;
        bound.attach(guest)?;
        Ok(bound)
    }

    /// The same, not handed over yet.
    pub(super) fn unattached<K: Iommufd>(guest: &mut Guest<K>, endpoint: &Endpoint) -> anyhow::Result<Self> {
        Self::in_style(guest, endpoint, Style::Preferred)
    }

    /// The same, handed over in a way of the caller's choice.
    pub(super) fn in_style<K: Iommufd>(
        guest: &mut Guest<K>,
        endpoint: &Endpoint,
        style: Style,
    ) -> anyhow::Result<Self> {
        let domain = domain(guest)?;
        let options = TableOptions { style, ..TableOptions::default() };
        let mut pasids = PasidTable::new(&mut guest.driver, endpoint, domain, options)?;
        let mut space = AddressSpace::new(&mut guest.driver, endpoint, SpaceOptions::default())?;
        let entered = pasids.descriptor().is_some();
        if entered {
            pasids
                .bind_at(&mut guest.driver, None, &mut space)
                .context("cannot write the table of untagged DMA")?;
        }
        Ok(Self { pasids, space, entered })
    }

    /// ATTACH_TABLE; of the table of PASIDs, or of the page table where each PASID is bound by itself.
    pub(super) fn attach<K: Iommufd>(&mut self, guest: &mut Guest<K>) -> anyhow::Result<()> {
        attach(guest, &mut self.pasids, &mut self.space, self.entered)?;
        self.entered = true;
        Ok(())
    }

    /// Maps; only memory changes.
    pub(super) fn map<K: Iommufd>(
        &mut self,
        guest: &mut Guest<K>,
        iova: Iova,
        output: Gpa,
        length: u64,
        attrs: Attrs,
    ) -> anyhow::Result<()> {
        let range = range(iova, length)?;
        self.space.map(&mut guest.driver, range, output, attrs)?;
        let mappings = &mut guest.seen.mappings;
        mappings.push(picture::Mapping { range, output, write: attrs.write, stale: false });
        Ok(())
    }

    /// Takes a mapping out of the table, and tells nobody.
    pub(super) fn unmap_silently<K: Iommufd>(
        &mut self,
        guest: &mut Guest<K>,
        iova: Iova,
        length: u64,
    ) -> anyhow::Result<()> {
        let range = range(iova, length)?;
        self.space.unmap_unsynchronized(&mut guest.driver, range)?;
        guest.seen.mappings.retain(|mapping| !(range.covers(mapping.range)));
        Ok(())
    }

    /// Unmaps, and invalidates.
    pub(super) fn unmap<K: Iommufd>(
        &mut self,
        guest: &mut Guest<K>,
        iova: Iova,
        length: u64,
    ) -> anyhow::Result<()> {
        self.unmap_silently(guest, iova, length)?;
        self.space.synchronize(&mut guest.driver).context("INVALIDATE")
    }

    /// Detaches, and gives everything back.
    pub(super) fn end<K: Iommufd>(mut self, guest: &mut Guest<K>) -> anyhow::Result<()> {
        self.pasids.detach(&mut guest.driver).context("DETACH")?;
        if self.entered {
            self.pasids.unbind(&mut guest.driver, None, &mut self.space)?;
        }
        self.space.release(&mut guest.driver).map_err(|(_, error)| error)?;
        self.pasids.release(&mut guest.driver).map_err(|(_, error)| error)?;
        Ok(())
    }
}

/// Hands a page table over for untagged accesses. `entered`: they had it before.
pub(super) fn attach<K: Iommufd>(
    guest: &mut Guest<K>,
    pasids: &mut PasidTable,
    space: &mut AddressSpace,
    entered: bool,
) -> anyhow::Result<()> {
    if pasids.descriptor().is_some() {
        return pasids.attach(&mut guest.driver).context("ATTACH_TABLE");
    }
    if entered {
        pasids.unbind(&mut guest.driver, None, space)?;
    }
    pasids.bind_at(&mut guest.driver, None, space).context("ATTACH_TABLE")
}

/// A domain ID that is not in use.
pub(super) fn domain<K: Iommufd>(guest: &mut Guest<K>) -> anyhow::Result<DomainId> {
    guest.driver.new_domain_id().context("no domain is left")
}

/// `length` bytes from `iova` on.
pub(super) fn range(iova: Iova, length: u64) -> anyhow::Result<IovaRange> {
    IovaRange::from_length(iova, length).context("an empty range")
}

/// Guest memory in a file, so that the kernel can be given the file.
pub(super) fn memory(regions: &[(Gpa, usize)]) -> anyhow::Result<GuestMemoryMmap> {
    let total: usize = regions.iter().map(|(_, bytes)| bytes).sum();
    let file = File::from(memfd_create(c"viommu-guest", MFdFlags::MFD_CLOEXEC).context("memfd_create")?);
    file.set_len(total as u64).context("cannot make guest memory")?;
    let mut offset = 0;
    let mut ranges = Vec::with_capacity(regions.len());
    for (first, bytes) in regions {
        let place = FileOffset::new(file.try_clone()?, offset);
        ranges.push((GuestAddress(first.0), *bytes, Some(place)));
        offset += *bytes as u64;
    }
    GuestMemoryMmap::from_ranges_with_files(ranges).context("cannot map guest memory")
}

/// Guest memory, and above it a window for tables of the device's own, of which the guest is told as a reserved region.
struct Windowed {
    window: Window,
    /// As the kernel is given it: devices read the window and do not write it.
    of_devices: GuestMemoryMmap,
    /// As the machine has it, which does.
    of_machine: GuestMemoryMmap,
}

impl Windowed {
    fn above(guest: &GuestMemoryMmap) -> anyhow::Result<Self> {
        let first = guest.last_addr().0.checked_add(1).context("no room above guest memory")?;
        let first = first.checked_next_multiple_of(WINDOW_BYTES).context("no room above guest memory")?;
        let window = Window::new(Gpa(first), WINDOW_BYTES).context("no room above guest memory")?;
        let file = File::from(memfd_create(c"viommu-window", MFdFlags::MFD_CLOEXEC).context("memfd_create")?);
        file.set_len(WINDOW_BYTES).context("cannot make the window")?;
        let file = FileOffset::new(file, 0);
        let with = |protection| -> anyhow::Result<GuestMemoryMmap> {
            let bytes = usize::try_from(WINDOW_BYTES)?;
            let mapping = MmapRegion::build(Some(file.clone()), bytes, protection, libc::MAP_SHARED)
                .context("cannot map the window")?;
            let region =
                GuestRegionMmap::new(mapping, GuestAddress(first)).context("the window has no place")?;
            guest.insert_region(Arc::new(region)).context("the window has no place beside guest memory")
        };
        let of_devices = with(libc::PROT_READ)?;
        let of_machine = with(libc::PROT_READ | libc::PROT_WRITE)?;
        Ok(Self { window, of_devices, of_machine })
    }
}

fn driver<K: Iommufd>(machine: &Machine<HilHost<K>>, own: (Gpa, Gpa)) -> anyhow::Result<HilDriver<K>> {
    let memory = machine.memory().clone();
    let alloc = Alloc::within(&memory, own.0, own.1);
    let options = DriverOptions {
        required: Features::MAP_UNMAP | Features::PROBE | Features::ATTACH_TABLE | Features::BYPASS_CONFIG,
        ..DriverOptions::default()
    };
    Ok(Driver::new(Parts { memory, alloc }, Transport::new(machine.clone()), options)?)
}

impl<K: Iommufd> Guest<K> {
    /// PROBE; the hardware must take tables.
    pub(super) fn probe(&mut self, station: &Station) -> anyhow::Result<Endpoint> {
        let endpoint = self.driver.probe(station.endpoint()).context("PROBE")?;
        if endpoint.properties().hardware.is_none() {
            return Err(super::check::skip("PROBE names no hardware that walks the guest's tables"));
        }
        Ok(endpoint)
    }

    /// How many events the kernel had no room for.
    pub(super) fn lost_events(&self) -> u64 {
        self.machine.lock().device().host().host().lost_events()
    }

    /// Names of the endpoints.
    pub(super) fn endpoints(&self) -> usize {
        self.machine.lock().device().host().endpoints().len()
    }
}
