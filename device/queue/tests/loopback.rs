//! Guest and device in one process.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has to say so")]

use pgtable_formats::{Access, Gpa, Iova, IovaRange, TableAlloc};
use viommu_device::host::{EndpointCaps, FaultCause, Stream};
use viommu_device::soft::SoftHost;
use viommu_device::wire::numbers::{EVENT_QUEUE, REQUEST_QUEUE};
use viommu_device::wire::{Event, MapFlags};
use viommu_device::{Device, DeviceConfig, EndpointId};
use viommu_guest::hal::{GuestMem, Parts, QueueLayout, Transport as _, TransportError};
use viommu_guest::{Driver, DriverOptions, MappedDomain, Mapping};
use viommu_queue::loopback::{Alloc, Machine, Memory, Port, Transport};
use viommu_queue::{Notify, QueueError};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const ENDPOINT: EndpointId = EndpointId(8);

fn machine(memory: &Memory) -> Machine {
    let mut host = SoftHost::new(memory.tables().clone());
    host.add_endpoint(ENDPOINT, EndpointCaps::default()).unwrap();
    let device = Device::new(DeviceConfig::default(), host).unwrap();
    Machine::new(memory.clone(), device, 256).unwrap()
}

fn driver(machine: &Machine) -> Driver<Parts<Memory, Alloc>, Transport<Machine>> {
    let memory = machine.memory().clone();
    let platform = Parts { alloc: Alloc::new(&memory), memory };
    Driver::new(platform, Transport::new(machine.clone()), DriverOptions::default()).unwrap()
}

#[test]
fn a_driver_and_the_device_work_back_to_back() {
    let machine = machine(&Memory::new(16 << 20));
    let mut driver = driver(&machine);
    let stream = Stream::untagged(ENDPOINT);
    assert_eq!(machine.leads(stream, Iova(0x1000), Access::READ), Err(FaultCause::Unattached));

    let endpoint = driver.probe(ENDPOINT).unwrap();
    let mut domain = MappedDomain::new(&mut driver).unwrap();
    domain.attach(&mut driver, &endpoint).unwrap();
    let range = IovaRange::from_length(Iova(0x1000), 0x1000).unwrap();
    let mapping = Mapping { range, target: Memory::page(3), flags: MapFlags::READ | MapFlags::WRITE };
    domain.map(&mut driver, mapping).unwrap();
    let dma = machine.behind(stream);
    dma.write_slice(b"through", GuestAddress(0x1010)).unwrap();
    let mut bytes = [0; 7];
    machine.memory().read(Gpa(Memory::page(3).0 + 0x10), &mut bytes).unwrap();
    assert_eq!(&bytes, b"through");

    assert!(dma.write_slice(&[1], GuestAddress(0x5000)).is_err());
    assert_eq!(machine.kick(EVENT_QUEUE), Ok(Notify { events: true, served: 1, ..Notify::default() }));
    let mut events = Vec::new();
    driver.handle_events(|event| events.push(event)).unwrap();
    assert!(matches!(events[..], [Event::Fault(fault)] if fault.address == Some(Iova(0x5000))));

    let counters = *driver.counters();
    let transport = driver.transport_mut();
    assert_eq!(transport.served, counters.requests);
    assert_eq!(transport.notifications[usize::from(REQUEST_QUEUE)], counters.notifications);
    assert_eq!((transport.failed, transport.broken), (false, None));
    let (platform, _) = driver.shut_down();
    assert_eq!(platform.alloc.live(), 0, "all memory goes back");
}

/// Where the driver's notification is lost, waiting is enough.
#[test]
fn waiting_lets_the_device_run() {
    let memory = Memory::new(16 << 20);
    let machine = machine(&memory);
    let mut alloc = Alloc::new(&memory);
    let mut transport = Transport::new(machine.clone());
    transport.reset();
    let features = transport.offered_features();
    transport.accept_features(features).unwrap();
    let options = viommu_guest::queue::QueueOptions::default();
    let mut queue = viommu_guest::queue::Queue::new(&memory, &mut alloc, 4, options).unwrap();
    transport.enable_queue(REQUEST_QUEUE, queue.layout()).unwrap();
    transport.start();
    assert_eq!(transport.wait(REQUEST_QUEUE), Err(TransportError::Gone), "there is nothing to do");

    let attach = [1, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    memory.write(Memory::page(0), &attach).unwrap();
    memory.store(Memory::page(1), u64::MAX);
    let readable = viommu_guest::queue::Buffer { at: Memory::page(0), length: 20 };
    let writable = viommu_guest::queue::Buffer { at: Memory::page(1), length: 4 };
    queue.add(&memory, &[readable], &[writable]).unwrap();
    assert!(queue.publish(&memory).unwrap());
    assert_eq!(transport.wait(REQUEST_QUEUE), Ok(()));
    assert_eq!(queue.collect(&memory).unwrap().map(|used| used.written), Some(4));
    assert_eq!((transport.served, transport.notifications), (1, [0, 0]));
}

#[test]
fn a_queue_that_cannot_be_is_refused() {
    let memory = Memory::new(1 << 20);
    let machine = machine(&memory);
    let good = QueueLayout {
        size: 16,
        descriptors: Memory::page(0),
        available: Memory::page(1),
        used: Memory::page(2),
    };
    for bad in [
        QueueLayout { size: 0, ..good },
        QueueLayout { size: 12, ..good },
        QueueLayout { size: 512, ..good },
        QueueLayout { descriptors: Gpa(Memory::BASE + 8), ..good },
        QueueLayout { available: Gpa(Memory::BASE + 1), ..good },
        QueueLayout { used: Gpa(Memory::BASE + 2), ..good },
        QueueLayout { descriptors: Gpa(memory.last().0 + 1), ..good },
        QueueLayout { used: Gpa(memory.last().0 - 3), ..good },
    ] {
        machine.enable_queue(REQUEST_QUEUE, good).unwrap();
        let refused = Err(TransportError::Queue { queue: REQUEST_QUEUE });
        assert_eq!(machine.enable_queue(REQUEST_QUEUE, bad), refused, "{bad:?}");
        assert!(machine.lock().queue(0).is_some_and(|queue| !queue.ready()), "{bad:?}");
        assert_eq!(machine.kick(REQUEST_QUEUE), Err(QueueError::NotReady));
    }
    assert_eq!(machine.enable_queue(2, good), Err(TransportError::Queue { queue: 2 }));
    assert_eq!((machine.max_queue_size(1), machine.max_queue_size(2)), (256, 0));
    assert_eq!(machine.kick(2), Err(QueueError::NotReady));
}

#[test]
fn blocks_are_aligned_and_zero_and_counted() {
    let memory = Memory::new(1 << 20);
    let mut alloc = Alloc::new(&memory);
    assert_eq!(alloc.take(12), Memory::page(128), "the lower half is the user's");
    let block = alloc.take(16);
    assert_eq!(block, Memory::page(144));
    memory.store(Gpa(block.0 + 0xfff8), u64::MAX);
    alloc.free(block, 16);
    assert_eq!(alloc.live(), 1);
    assert_eq!(alloc.alloc(16), Some(block));
    assert_eq!(pgtable_formats::TableMem::load(&alloc, Gpa(block.0 + 0xfff8)), Ok(0));
    assert_eq!((alloc.alloc(19), alloc.alloc(64)), (None, None));
    assert_eq!(alloc.live(), 2);

    let mut all = Alloc::within(&memory, memory.first(), memory.last());
    assert_eq!(all.alloc(20), Some(Memory::page(0)));
    assert_eq!(all.alloc(0), None, "all is out");
}

#[test]
#[should_panic(expected = "was not given out")]
fn what_is_not_out_cannot_come_back() {
    Alloc::new(&Memory::new(1 << 20)).free(Memory::page(128), 12);
}

#[test]
#[should_panic(expected = "before DRIVER_OK")]
fn a_driver_that_notifies_too_early_is_stopped() {
    Transport::new(machine(&Memory::new(1 << 20))).notify(REQUEST_QUEUE);
}

/// A VMM's memory has more than one region.
#[test]
fn memory_may_have_gaps() {
    let regions =
        [(GuestAddress(0x1000), 0x1000), (GuestAddress(0x2000), 0x1000), (GuestAddress(0x8000), 0x1000)];
    let memory = Memory::over(GuestMemoryMmap::from_ranges(&regions).unwrap());
    assert_eq!((memory.first(), memory.last()), (Gpa(0x1000), Gpa(0x8fff)));
    let mut bytes = [0; 4];
    memory.write(Gpa(0x1ffe), &[1, 2, 3, 4]).unwrap();
    memory.read(Gpa(0x1ffe), &mut bytes).unwrap();
    assert_eq!(bytes, [1, 2, 3, 4]);
    assert!(memory.write(Gpa(0x2ffe), &bytes).is_err() && memory.read(Gpa(0x7fff), &mut bytes).is_err());
    memory.store_release(Gpa(0x8000), 0x1234).unwrap();
    assert_eq!(memory.load_acquire(Gpa(0x8000)), Ok(0x1234));
    assert!(memory.load_acquire(Gpa(0x3000)).is_err());
}
