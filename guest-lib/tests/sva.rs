//! Shared virtual addresses against the real device, over real rings: every hardware, every way to hand tables over.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has to say so")]

use pgtable_formats::context::{smmuv3, vtd};
use pgtable_formats::format::Attrs;
use pgtable_formats::{Access, Gpa, Iova, IovaRange};
use viommu_device::host::{EndpointCaps, Stream, TableCaps};
use viommu_device::soft::{AccessError, Answer, SoftHost, Ticket};
use viommu_device::wire::numbers::{
    EVENT_QUEUE, FORMAT_ARM_PT, FORMAT_ARM_SMMU3, FORMAT_INTEL_PASID_TABLE, FORMAT_INTEL_PT,
};
use viommu_device::{Device, DeviceConfig, EndpointId};
use viommu_guest::hal::Parts;
use viommu_guest::sva::{Area, DemandPaged, Handle, ProcessId, Processes, Sva, SvaOptions};
use viommu_guest::tables::{AddressSpace, SpaceOptions, Style, TableOptions};
use viommu_guest::{Driver, DriverOptions, Endpoint};
use viommu_queue::loopback::{Alloc, Machine, Memory, Transport};

const ENDPOINT: EndpointId = EndpointId(8);
const HEAP: u64 = 0x7f00_0000_0000;

type Guest = Driver<Parts<Memory, Alloc>, Transport<Machine>>;

fn machine(tables: TableCaps) -> (Machine, Guest) {
    let memory = Memory::new(64 << 20);
    let mut host = SoftHost::new(memory.tables().clone());
    let caps = EndpointCaps { tables: Some(tables), page_requests: true, ..EndpointCaps::default() };
    host.add_endpoint(ENDPOINT, caps).unwrap();
    let device = Device::new(DeviceConfig::default(), host).unwrap();
    let machine = Machine::new(memory.clone(), device, 64).unwrap();
    let platform = Parts { alloc: Alloc::new(&memory), memory };
    let driver = Driver::new(platform, Transport::new(machine.clone()), DriverOptions::default()).unwrap();
    (machine, driver)
}

fn process(driver: &mut Guest, endpoint: &Endpoint, processes: &mut Processes<DemandPaged>) -> ProcessId {
    let space = AddressSpace::new(driver, endpoint, SpaceOptions::default()).unwrap();
    let mut memory = DemandPaged::new(&space, 64);
    let range = IovaRange::from_length(Iova(HEAP), 64 << 12).unwrap();
    memory.add_area(Area { range, attrs: Attrs::READ_WRITE }).unwrap();
    processes.add(space, memory)
}

/// An access of the emulated device: where it leads, or what it waits with.
fn access(machine: &Machine, handle: &Handle, page: u64) -> Result<Gpa, AccessError> {
    let stream = Stream { endpoint: ENDPOINT, pasid: Some(handle.pasid()) };
    let mut iommu = machine.lock();
    let host = iommu.device_mut().host_mut();
    host.access(stream, Iova(HEAP + (page << 12)), Access::WRITE, |piece| piece.output)
}

fn ticket(machine: &Machine, handle: &Handle, page: u64) -> Ticket {
    match access(machine, handle, page) {
        Err(AccessError::Waits(ticket)) => ticket,
        other => panic!("{other:?}"),
    }
}

fn answer(machine: &Machine, ticket: Ticket) -> Option<Answer> {
    machine.lock().device_mut().host_mut().answer(ticket)
}

/// The device puts what it has into the event queue, unless it did with a request.
fn deliver(machine: &Machine) {
    machine.kick(EVENT_QUEUE).map(drop).unwrap();
}

fn interrupt(machine: &Machine, driver: &mut Guest, sva: &mut Sva, processes: &mut Processes<DemandPaged>) {
    deliver(machine);
    driver.handle_events(|event| assert!(sva.receive(&event), "{event:?}")).unwrap();
    sva.serve(driver, processes).unwrap();
}

#[test]
fn processes_share_their_addresses_with_a_device() {
    let arm = || TableCaps::Smmuv3(smmuv3::Caps::from_registers(smmuv3::IdRegisters::SOFTWARE));
    let intel = || TableCaps::Vtd(vtd::Caps::from_registers(vtd::CapRegisters::SOFTWARE));
    for (tables, style, format) in [
        (arm(), Style::Table, FORMAT_ARM_SMMU3),
        (arm(), Style::Single, FORMAT_ARM_PT),
        (intel(), Style::Table, FORMAT_INTEL_PASID_TABLE),
        (intel(), Style::Single, FORMAT_INTEL_PT),
    ] {
        let (machine, mut driver) = machine(tables);
        let live = driver.platform().alloc.live();
        let endpoint = driver.probe(ENDPOINT).unwrap();
        let table = TableOptions { style, ..TableOptions::default() };
        let options = SvaOptions { table, ..SvaOptions::default() };
        let mut sva = Sva::new(&mut driver, &endpoint, options).unwrap();
        assert_eq!((sva.format(), sva.has_page_requests()), (format, true));
        let mut processes = Processes::new();
        let ids = [(); 3].map(|()| process(&mut driver, &endpoint, &mut processes));
        let handles = ids.map(|id| sva.bind(&mut driver, &mut processes, id).unwrap());

        // Each waits for its own page, and gets it.
        let waiting = handles.each_ref().map(|handle| ticket(&machine, handle, 5));
        assert!(waiting.iter().all(|ticket| answer(&machine, *ticket).is_none()));
        interrupt(&machine, &mut driver, &mut sva, &mut processes);
        assert!(waiting.iter().all(|ticket| answer(&machine, *ticket) == Some(Answer::Retry)));
        let frames = handles.each_ref().map(|handle| access(&machine, handle, 5).unwrap());
        assert!(frames[0] != frames[1] && frames[1] != frames[2] && frames[0] != frames[2]);

        // Outside of what the process has.
        let lost = ticket(&machine, &handles[0], 64);
        interrupt(&machine, &mut driver, &mut sva, &mut processes);
        assert_eq!(answer(&machine, lost), Some(Answer::Failed));

        // The first process goes on, the second changes its memory, the third ends in the middle of its DMA.
        let heap = IovaRange::from_length(Iova(HEAP), 64 << 12).unwrap();
        let (space, memory) = processes.get_mut(ids[1]).unwrap().parts();
        memory.discard(&mut driver, space, heap).unwrap();
        let again = ticket(&machine, &handles[1], 5);
        let dying = ticket(&machine, &handles[2], 6);
        processes.exit(&mut driver, ids[2]).unwrap();
        let late = ticket(&machine, &handles[2], 5);
        interrupt(&machine, &mut driver, &mut sva, &mut processes);
        assert_eq!(answer(&machine, again), Some(Answer::Retry));
        assert!(access(&machine, &handles[1], 5).is_ok());
        assert_eq!(access(&machine, &handles[0], 5), Ok(frames[0]));
        for ticket in [dying, late] {
            assert_eq!(answer(&machine, ticket), Some(Answer::Failed));
        }

        // One that still waits when its process is unbound is told to give up.
        let waits = ticket(&machine, &handles[0], 9);
        deliver(&machine);
        for handle in handles {
            let pasid = handle.pasid();
            sva.unbind(&mut driver, &mut processes, handle).map_err(|(_, error)| error).unwrap();
            let stream = Stream { endpoint: ENDPOINT, pasid: Some(pasid) };
            assert!(machine.leads(stream, Iova(HEAP + 0x5000), Access::READ).is_err());
        }
        assert_eq!(answer(&machine, waits), Some(Answer::Failed));
        assert_eq!(machine.lock().device_mut().host_mut().waiting(ENDPOINT), 0);
        assert_eq!(machine.lock().device().page_request_counts().groups, 0);
        for id in ids {
            processes.remove(&mut driver, id).unwrap().release(&mut driver);
        }
        sva.release(&mut driver).map_err(|(_, error)| error).unwrap();
        assert_eq!(driver.platform().alloc.live(), live);
    }
}
