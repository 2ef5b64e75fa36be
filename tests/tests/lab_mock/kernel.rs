//! [`MockKernel`]: the real iommufd, with the devices and IOMMU of the kernel's own tests in place of hardware.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard};

use nix::errno::Errno;
use pgtable_formats::{Iova, IovaRange, Pasid};
use viommu_host_iommufd::fake::{FakeSmmuv3, Unit};
use viommu_host_iommufd::kernel::{
    Commands, DeviceId, Event, HwCapabilities, HwInfo, HwKind, HwptData, HwptFlags, HwptSpec,
    InvalidateError, IoasMapping, Iommufd, IovaRanges, ObjectId, PageFault, ResponseCode, ViommuKind,
    VtdInvalidation,
};
use viommu_host_iommufd::sys::Sys;

use super::ioctl::{self, TestOp, kind};

/// Which hardware a mock passes for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flavour {
    /// Nested tables by a vIOMMU, events, no tables of single PASIDs.
    Smmuv3,
    /// A nested table for each PASID, page requests.
    Vtd,
}

/// What a device's own cache holds in every slot until it is invalidated, and an IOTLB afterwards.
pub(crate) const CACHED: u32 = 0x00ba_ddad;
/// See [`CACHED`].
pub(crate) const INVALIDATED: u32 = 0;
/// Number of slots of an IOTLB, and of a device's cache.
pub(crate) const SLOTS: u32 = 4;
/// The slot of a device's cache that each command drops.
pub(crate) mod slot {
    pub(crate) const TLBI: u32 = 0;
    pub(crate) const CFGI_CD: u32 = 1;
    pub(crate) const CFGI_CD_ALL: u32 = 2;
    pub(crate) const ATC_INV: u32 = 3;
}
/// The address that every event of a mock is about.
pub(crate) const EVENT_ADDRESS: u64 = 0x2000_0000;

/// The kernel, with mocks for devices. What is ordinary iommufd goes to [`Sys`]; only types of hardware are translated:
/// the host says SMMUv3 or VT-d, and the kernel hears the types of its own tests.
pub(crate) struct MockKernel {
    sys: Sys,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    devices: BTreeMap<DeviceId, Mock>,
    attached: BTreeMap<(DeviceId, Option<Pasid>), ObjectId>,
    /// Tables with what they were made of and what is below.
    tables: BTreeMap<ObjectId, (HwptData, ObjectId)>,
    /// vIOMMUs with their nest parent.
    viommus: BTreeMap<ObjectId, ObjectId>,
    /// What is mapped, by address space and address.
    areas: BTreeMap<(ObjectId, u64), IoasMapping>,
    /// vDEVICEs with their vIOMMU and ID.
    vdevices: BTreeMap<ObjectId, (ObjectId, u64)>,
    events: BTreeMap<ObjectId, File>,
}

#[derive(Clone, Copy)]
struct Mock {
    number: u32,
    flavour: Flavour,
    /// An address space of its own, empty, and a table on it: VFIO has devices that are attached to nothing, mocks are
    /// not.
    parked: [ObjectId; 2],
}

/// What an access goes through.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Route {
    /// The guest's table, if there is one, as the host handed it over.
    pub(crate) stage1: HwptData,
    /// The paging table.
    pub(crate) table: ObjectId,
    /// Its address space.
    pub(crate) ioas: ObjectId,
}

impl MockKernel {
    /// The kernel, without any device yet.
    pub(crate) fn open() -> Self {
        Self { sys: Sys::open().expect("/dev/iommu"), state: Mutex::default() }
    }

    /// Makes a device and binds it.
    pub(crate) fn add_device(&self, flavour: Flavour) -> DeviceId {
        let ioas = self.sys.alloc_ioas().unwrap();
        let made = ioctl::make_device(self.fd(), ioas.0, ioctl::DEVICE_HAS_PASIDS)
            .expect("a mock: the kernel needs CONFIG_IOMMUFD_TEST");
        let device = DeviceId(made.device);
        let spec = HwptSpec {
            device,
            parent: ioas,
            flags: HwptFlags::PASID,
            data: HwptData::None,
            fault_queue: None,
        };
        let table = self.alloc_hwpt(&spec).unwrap();
        self.test(TestOp::Replace { mock: made.mock, table: table.0 }).unwrap();
        self.state().devices.insert(device, Mock { number: made.mock, flavour, parked: [table, ioas] });
        device
    }

    /// Takes a device out of the machine.
    pub(crate) fn remove_device(&self, device: DeviceId) {
        let mock = {
            let mut state = self.state();
            state.attached.retain(|(of, _), _| *of != device);
            state.devices.remove(&device).unwrap()
        };
        self.sys.destroy(ObjectId(mock.number)).unwrap();
        for object in mock.parked {
            self.destroy(object).unwrap();
        }
    }

    /// A command of the kernel's tests.
    pub(crate) fn test(&self, op: TestOp) -> Result<(), Errno> {
        ioctl::test(self.fd(), op)
    }

    /// Whether a paging table leads the page at `iova` to that which the process has at `user`.
    pub(crate) fn leads(&self, table: ObjectId, iova: u64, user: u64) -> bool {
        self.test(TestOp::CheckMap { table: table.0, iova, length: 0x1000, user }).is_ok()
    }

    /// Whether every slot of a nested table's IOTLB holds this.
    pub(crate) fn iotlb_holds(&self, table: ObjectId, value: u32) -> bool {
        (0..SLOTS).all(|slot| self.test(TestOp::CheckIotlb { table: table.0, slot, value }).is_ok())
    }

    /// Whether a slot of the device's cache was never invalidated.
    pub(crate) fn cached(&self, device: DeviceId, slot: u32) -> bool {
        let holds = |value| self.test(TestOp::CheckCache { device: device.0, slot, value }).is_ok();
        assert!(holds(CACHED) != holds(INVALIDATED));
        holds(CACHED)
    }

    /// What a device, or a PASID of it, is attached to, as the kernel says for a PASID.
    pub(crate) fn attached(&self, device: DeviceId, pasid: Option<Pasid>) -> Option<ObjectId> {
        let (mock, table) = {
            let state = self.state();
            (state.devices[&device], state.attached.get(&(device, pasid)).copied())
        };
        // To the kernel PASID 0 is that of untagged accesses.
        if let Some(pasid) = pasid.filter(|pasid| *pasid != Pasid::ZERO) {
            let check = TestOp::CheckPasid {
                mock: mock.number,
                pasid: pasid.value(),
                table: table.map_or(0, |table| table.0),
            };
            self.test(check).expect("the kernel knows of another table");
        }
        table
    }

    /// What an access goes through: what its PASID is attached to, or else on an SMMUv3 the nested table of the device.
    pub(crate) fn route(&self, device: DeviceId, pasid: Option<Pasid>) -> Option<Route> {
        let state = self.state();
        let attached = |pasid| state.attached.get(&(device, pasid)).map(|table| state.tables[table]);
        let (data, below) = attached(pasid)
            .or_else(|| attached(None).filter(|(data, _)| matches!(data, HwptData::Smmuv3(_))))?;
        let table = match data {
            HwptData::None => state.attached[&(device, pasid)],
            HwptData::Vtd { .. } => below,
            HwptData::Smmuv3(_) => state.viommus[&below],
        };
        Some(Route { stage1: data, table, ioas: state.tables[&table].1 })
    }

    /// What an address space was asked to map at an address.
    pub(crate) fn area(&self, ioas: ObjectId, iova: u64) -> Option<IoasMapping> {
        let state = self.state();
        let (_, area) = state.areas.range((ioas, 0)..=(ioas, iova)).next_back()?;
        area.range.contains(Iova(iova)).then_some(*area)
    }

    /// Reads, or writes, memory through an address space.
    pub(crate) fn access(
        &self,
        ioas: ObjectId,
        iova: u64,
        write: bool,
        bytes: &mut [u8],
    ) -> Result<(), Errno> {
        ioctl::access(self.fd(), ioas.0, iova, write, bytes)
    }

    /// The next numbers that the kernel gives to objects. They are the lowest free ones: the same numbers at two times
    /// tell that as many objects exist.
    pub(crate) fn free_numbers(&self) -> Vec<u32> {
        let made: Vec<_> = (0..16).map(|_| self.sys.alloc_ioas().unwrap()).collect();
        for ioas in &made {
            self.sys.destroy(*ioas).unwrap();
        }
        made.iter().map(|ioas| ioas.0).collect()
    }

    fn mock(&self, device: DeviceId) -> Result<Mock, Errno> {
        self.state().devices.get(&device).copied().ok_or(Errno::ENOENT)
    }

    fn fd(&self) -> RawFd {
        self.sys.iommufd().as_raw_fd()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl Iommufd for MockKernel {
    fn destroy(&self, object: ObjectId) -> Result<(), Errno> {
        self.state().events.remove(&object);
        self.sys.destroy(object)?;
        let mut state = self.state();
        state.vdevices.remove(&object);
        state.tables.remove(&object);
        state.viommus.remove(&object);
        state.areas.retain(|(of, _), _| *of != object);
        Ok(())
    }

    fn alloc_ioas(&self) -> Result<ObjectId, Errno> {
        self.sys.alloc_ioas()
    }

    fn iova_ranges(&self, ioas: ObjectId) -> Result<IovaRanges, Errno> {
        self.sys.iova_ranges(ioas)
    }

    fn map(&self, ioas: ObjectId, mapping: &IoasMapping) -> Result<(), Errno> {
        self.sys.map(ioas, mapping)?;
        self.state().areas.insert((ioas, mapping.range.start().0), *mapping);
        Ok(())
    }

    fn unmap(&self, ioas: ObjectId, range: IovaRange) -> Result<u64, Errno> {
        let unmapped = self.sys.unmap(ioas, range)?;
        self.state().areas.retain(|(of, _), area| *of != ioas || !range.covers(area.range));
        Ok(unmapped)
    }

    fn hw_info(&self, device: DeviceId) -> Result<HwInfo, Errno> {
        let info = self.sys.hw_info(device)?;
        assert_eq!(info.kind, HwKind::Other(kind::HARDWARE));
        let kind = match (self.mock(device)?.flavour, Unit::vtd()) {
            (Flavour::Smmuv3, _) => HwKind::Smmuv3 { flags: 0, idr: FakeSmmuv3::NEW.idr, iidr: 0, aidr: 1 },
            (Flavour::Vtd, Unit::Vtd(vtd)) => HwKind::Vtd { flags: 1, cap: vtd.cap, ecap: vtd.ecap },
            _ => unreachable!(),
        };
        // The kernel knows ATS of PCI alone. A mock has page requests all the same.
        let capabilities = info.capabilities - HwCapabilities::ATS_NOT_SUPPORTED;
        Ok(HwInfo { kind, capabilities, ..info })
    }

    fn alloc_hwpt(&self, spec: &HwptSpec) -> Result<ObjectId, Errno> {
        const FAULT_ID_VALID: u32 = 1 << 2;
        let data = match spec.data {
            HwptData::None => [0, ioctl::format::WIDE],
            data => [cached_by(data), 0],
        };
        let (flags, queue) = match spec.fault_queue {
            Some(queue) => (spec.flags.bits() | FAULT_ID_VALID, queue.0),
            None => (spec.flags.bits(), 0),
        };
        let table = ioctl::alloc_table(self.fd(), spec.device.0, spec.parent.0, flags, queue, data)?;
        let table = ObjectId(table);
        self.state().tables.insert(table, (spec.data, spec.parent));
        Ok(table)
    }

    fn invalidate(&self, object: ObjectId, commands: Commands<'_>) -> Result<(), InvalidateError> {
        match commands {
            Commands::Vtd(entries) => {
                let entries: Vec<_> = entries.iter().map(iotlb_entry).collect();
                ioctl::invalidate(self.fd(), object.0, &entries)
            }
            Commands::Smmuv3(commands) => {
                let first = self.state().vdevices.values().find(|(of, _)| *of == object).map(|(_, id)| *id);
                let entries: Vec<_> = commands.iter().map(|command| cache_entry(command, first)).collect();
                ioctl::invalidate(self.fd(), object.0, &entries)
            }
        }
    }

    fn alloc_viommu(&self, kind: ViommuKind, device: DeviceId, parent: ObjectId) -> Result<ObjectId, Errno> {
        let ViommuKind::Smmuv3 = kind;
        if self.mock(device)?.flavour != Flavour::Smmuv3 {
            return Err(Errno::EOPNOTSUPP);
        }
        let viommu = ObjectId(ioctl::alloc_viommu(self.fd(), device.0, parent.0)?);
        self.state().viommus.insert(viommu, parent);
        Ok(viommu)
    }

    fn alloc_vdevice(&self, viommu: ObjectId, device: DeviceId, virtual_id: u64) -> Result<ObjectId, Errno> {
        let vdevice = self.sys.alloc_vdevice(viommu, device, virtual_id)?;
        self.state().vdevices.insert(vdevice, (viommu, virtual_id));
        Ok(vdevice)
    }

    fn alloc_event_queue(&self, viommu: ObjectId, kind: ViommuKind, depth: u32) -> Result<ObjectId, Errno> {
        let ViommuKind::Smmuv3 = kind;
        let (queue, file) = ioctl::alloc_event_queue(self.fd(), viommu.0, depth)?;
        self.state().events.insert(ObjectId(queue), file);
        Ok(ObjectId(queue))
    }

    fn read_events(&self, queue: ObjectId) -> Result<Vec<Event>, Errno> {
        let state = self.state();
        let mut file = state.events.get(&queue).ok_or(Errno::ENOENT)?;
        let mut bytes = [0; 64 * 12];
        // The file blocks no reader: an empty queue reads as its end.
        let length = file.read(&mut bytes).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap()))?;
        Ok(events(&bytes[..length]))
    }

    fn alloc_fault_queue(&self) -> Result<ObjectId, Errno> {
        self.sys.alloc_fault_queue()
    }

    fn read_page_faults(&self, queue: ObjectId) -> Result<Vec<PageFault>, Errno> {
        self.sys.read_page_faults(queue)
    }

    fn respond(&self, queue: ObjectId, cookie: u32, code: ResponseCode) -> Result<(), Errno> {
        self.sys.respond(queue, cookie, code)
    }

    fn queue_fd(&self, queue: ObjectId) -> Option<RawFd> {
        let file = self.state().events.get(&queue).map(AsRawFd::as_raw_fd);
        file.or_else(|| self.sys.queue_fd(queue))
    }

    fn attach(&self, device: DeviceId, pasid: Option<Pasid>, table: ObjectId) -> Result<(), Errno> {
        let mock = self.mock(device)?.number;
        let is_attached = self.state().attached.contains_key(&(device, pasid));
        // VFIO replaces what is attached; the mock has a command for each.
        let op = match pasid.map(Pasid::value) {
            None => TestOp::Replace { mock, table: table.0 },
            Some(pasid) if is_attached => TestOp::ReplacePasid { mock, pasid, table: table.0 },
            Some(pasid) => TestOp::AttachPasid { mock, pasid, table: table.0 },
        };
        self.test(op)?;
        self.state().attached.insert((device, pasid), table);
        Ok(())
    }

    fn detach(&self, device: DeviceId, pasid: Option<Pasid>) -> Result<(), Errno> {
        let Mock { number: mock, parked, .. } = self.mock(device)?;
        if self.state().attached.remove(&(device, pasid)).is_none() {
            return Ok(());
        }
        self.test(match pasid.map(Pasid::value) {
            None => TestOp::Replace { mock, table: parked[0].0 },
            Some(pasid) => TestOp::DetachPasid { mock, pasid },
        })
    }
}

/// What the IOTLB of a nested table holds at first: something of the guest's table, to see that it arrived.
pub(crate) fn cached_by(data: HwptData) -> u32 {
    match data {
        HwptData::None => 0,
        HwptData::Vtd { flags, root, address_width } => {
            (root >> 12) as u32 ^ flags as u32 ^ address_width << 24
        }
        HwptData::Smmuv3([first, second]) => (first >> 6) as u32 ^ (first << 28) as u32 ^ second as u32,
    }
}

/// Flags and slot. What the VT-d driver refuses becomes a slot that there is not.
fn iotlb_entry(entry: &VtdInvalidation) -> [u32; 2] {
    const ALL: u32 = 1;
    match *entry {
        VtdInvalidation { address: 0, pages: u64::MAX, .. } => [ALL, 0],
        VtdInvalidation { address, pages, .. } if !address.is_multiple_of(0x1000) || pages == u64::MAX => {
            [0, SLOTS]
        }
        VtdInvalidation { address, .. } => [0, (address >> 12) as u32 % SLOTS],
    }
}

/// Flags, vDEVICE and slot. A TLBI names no device: it goes to the first. An unknown command becomes an unknown flag.
fn cache_entry(command: &[u64; 2], first: Option<u64>) -> [u32; 3] {
    const UNKNOWN: u32 = 2;
    let stream = (command[0] >> 32) as u32;
    match command[0] & 0xff {
        0x10..=0x13 | 0x30 => [0, first.unwrap_or(0) as u32, slot::TLBI],
        0x05 => [0, stream, slot::CFGI_CD],
        0x06 => [0, stream, slot::CFGI_CD_ALL],
        0x40 => [0, stream, slot::ATC_INV],
        _ => [UNKNOWN, stream, 0],
    }
}

/// Headers of two words: flags (1: events were lost, and nothing follows) and number; then the vDEVICE's ID.
fn events(bytes: &[u8]) -> Vec<Event> {
    let mut words = bytes.chunks_exact(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap()));
    let mut events = Vec::new();
    while let (Some(flags), Some(sequence)) = (words.next(), words.next()) {
        events.push(match flags {
            1 => Event::Lost { sequence },
            _ => Event::Smmuv3 { sequence, record: translation_fault(words.next().unwrap()) },
        });
    }
    events
}

/// F_TRANSLATION of a write without a SubstreamID, as QEMU's SMMUv3 records it.
fn translation_fault(stream: u32) -> [u64; 4] {
    [0x10 | u64::from(stream) << 32, 0x200_0000_0000, EVENT_ADDRESS, 0]
}
