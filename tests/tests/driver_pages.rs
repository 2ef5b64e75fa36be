//! The driver's side of page requests, X-42 to X-45: `viommu-guest` on a device that answers by script.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use viommu_device::DeviceConfig;
use viommu_guest::sva::{Handle, Processes, Sva, SvaOptions, Unpaged};
use viommu_guest::tables::{AddressSpace, SpaceOptions};
use viommu_guest::{DriverOptions, Endpoint};
use viommu_tests::rig::{Guest, Memory, Scripted, request};
use viommu_wire::{
    AccessFlags, Caches, EndpointId, Event, Features, InvalidateScope, Iova, PageRequest, PageRequestFlags,
    PageResponse, PageResponseCode, Pasid, Property, Request, Status, TableDescriptor, TableFormats, Tail,
    numbers,
};

const ENDPOINT: EndpointId = EndpointId(8);

/// An endpoint that works for one process.
struct Bound {
    guest: Guest<Scripted>,
    endpoint: Endpoint,
    sva: Sva,
    processes: Processes<Unpaged>,
    handle: Handle,
}

impl Bound {
    /// Behind an SMMUv3, with tables in this format.
    fn new(format: u8) -> Self {
        let memory = Memory::new(64 << 20);
        let device = Scripted::new(&memory, DeviceConfig::ALL_FEATURES);
        let mut guest = Guest::over(device, &memory, DriverOptions::default()).unwrap();
        assert!(guest.driver.features().contains(Features::PAGE_REQUEST));
        let registers = pgtable_formats::context::smmuv3::IdRegisters::SOFTWARE;
        let properties = [
            Property::HwArmSmmu3 {
                idr0: registers.idr0,
                idr1: registers.idr1,
                idr3: registers.idr3,
                idr5: registers.idr5,
            },
            Property::PasidSize { bits: 20 },
            Property::TableFormats(TableFormats::new(&[format]).unwrap()),
            Property::PageRequests(PageRequestFlags::all()),
        ];
        let encoded = properties.iter().flat_map(|property| {
            let mut bytes = [0; 64];
            let length = property.encode(&mut bytes).unwrap();
            bytes.into_iter().take(length)
        });
        guest.machine.answer_properties(encoded.collect());
        let endpoint: Endpoint = guest.probe(ENDPOINT.0);
        guest.machine.script(|_, writable| {
            writable.fill(0);
            writable.len()
        });
        let mut sva = Sva::new(&mut guest.driver, &endpoint, SvaOptions::default()).unwrap();
        assert!(sva.has_page_requests());
        let mut processes = Processes::new();
        let space = AddressSpace::new(&mut guest.driver, &endpoint, SpaceOptions::default()).unwrap();
        let process = processes.add(space, Unpaged);
        let handle = sva.bind(&mut guest.driver, &mut processes, process).unwrap();
        guest.machine.received();
        Self { guest, endpoint, sva, processes, handle }
    }

    fn asks(&self, pasid: Option<Pasid>, group_id: u16, last: bool) -> PageRequest {
        PageRequest {
            access: AccessFlags::WRITE,
            endpoint: ENDPOINT,
            pasid,
            address: Iova(0x7f00_0000_1000),
            group_id,
            last,
            private_data: None,
        }
    }

    /// Tells the driver, which does not look yet.
    fn tell(&self, asked: PageRequest) {
        let mut record = [0; 48];
        assert_eq!(Event::PageRequest(asked).encode(&mut record), Some(48));
        self.guest.machine.send_event(&record, 48);
    }

    /// Lets the driver look and answer. What it sent, decoded.
    fn serve(&mut self) -> Vec<Request> {
        let Self { guest, sva, processes, .. } = self;
        guest.driver.handle_events(|event| assert!(sva.receive(&event), "{event:?}")).unwrap();
        sva.serve(&mut guest.driver, processes).unwrap();
        self.sent()
    }

    fn sent(&self) -> Vec<Request> {
        let received = self.guest.machine.received();
        received.into_iter().map(|(bytes, _)| Request::decode(&bytes).unwrap()).collect()
    }
}

fn invalid(pasid: Option<Pasid>, group_id: u16) -> Request {
    let (endpoint, code) = (ENDPOINT, PageResponseCode::Invalid);
    Request::PageResponse(PageResponse { endpoint, pasid, group_id, code })
}

#[test]
fn x42_event_buffers_have_room_for_page_requests() {
    let mut bound = Bound::new(numbers::FORMAT_ARM_SMMU3);
    let asked = PageRequest {
        private_data: Some([u64::MAX, 0x8000_0000_0000_0001]),
        ..bound.asks(Some(request::pasid(77)), 0xffff, true)
    };
    // More often than there are buffers at a time.
    for _ in 0..1000 {
        bound.tell(asked);
        let mut seen = Vec::new();
        bound.guest.driver.handle_events(|event| seen.push(event)).unwrap();
        assert_eq!(seen, [Event::PageRequest(asked)], "to the last byte");
    }
}

#[test]
fn x43_groups_are_answered_once_and_whole_and_with_their_pasid() {
    let mut bound = Bound::new(numbers::FORMAT_ARM_SMMU3);
    let pasid = Some(bound.handle.pasid());
    bound.tell(bound.asks(pasid, 3, false));
    assert_eq!(bound.serve(), [], "there is more to come");
    bound.tell(bound.asks(pasid, 3, false));
    bound.tell(bound.asks(pasid, 4, true));
    assert_eq!(bound.serve(), [invalid(pasid, 4)]);
    bound.tell(bound.asks(pasid, 3, true));
    assert_eq!(bound.serve(), [invalid(pasid, 3)], "three requests, one answer");
    assert_eq!(bound.serve(), []);
    // The same number without a PASID, and with one that nobody has.
    for pasid in [None, Some(request::pasid(77))] {
        bound.tell(bound.asks(pasid, 3, true));
        assert_eq!(bound.serve(), [invalid(pasid, 3)]);
    }
}

#[test]
fn x44_an_answer_that_comes_late_is_no_failure_and_is_not_repeated() {
    let mut bound = Bound::new(numbers::FORMAT_ARM_SMMU3);
    let pasid = Some(bound.handle.pasid());
    bound.guest.machine.script(|_, writable| {
        writable.copy_from_slice(&Tail { status: Status::NoEnt }.encode());
        writable.len()
    });
    bound.tell(bound.asks(pasid, 3, true));
    assert_eq!(bound.serve(), [invalid(pasid, 3)]);
    assert_eq!(bound.serve(), []);
    assert_eq!((bound.sva.serve_counters().gone, bound.sva.serve_counters().failed), (1, 0));
}

#[test]
fn x45_a_pasid_is_drained_before_it_is_given_away() {
    for format in [numbers::FORMAT_ARM_SMMU3, numbers::FORMAT_ARM_PT] {
        let mut bound = Bound::new(format);
        let pasid = bound.handle.pasid();
        // One that waits for its handler to be asked, one that is not whole, one of each that lies in the queue.
        bound.tell(bound.asks(Some(pasid), 1, true));
        bound.tell(bound.asks(Some(pasid), 2, false));
        let Bound { guest, sva, .. } = &mut bound;
        guest.driver.handle_events(|event| assert!(sva.receive(&event))).unwrap();
        bound.tell(bound.asks(Some(pasid), 3, true));
        bound.tell(bound.asks(Some(pasid), 4, false));
        let space =
            AddressSpace::new(&mut bound.guest.driver, &bound.endpoint, SpaceOptions::default()).unwrap();
        let next = bound.processes.add(space, Unpaged);
        let Bound { guest, sva, processes, handle, .. } = &mut bound;
        let left = core::mem::replace(handle, sva.bind(&mut guest.driver, processes, next).unwrap());
        assert_ne!(handle.pasid(), pasid, "still taken");
        guest.machine.received();
        sva.unbind(&mut guest.driver, processes, left).unwrap();
        let sent = bound.sent();
        match sent[0] {
            Request::AttachTable(attach) => assert_eq!(attach.table, TableDescriptor::Unbind { pasid }),
            Request::Invalidate(invalidate) => {
                assert_eq!(invalidate.scope, InvalidateScope::Pasid(Some(pasid)));
                assert_eq!(invalidate.caches, Caches::all());
                assert_eq!(format, numbers::FORMAT_ARM_SMMU3);
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(sent[1..], [], "the device has answered all of them");
        assert_eq!((bound.serve(), bound.sva.open_groups()), (vec![], 0));
        // Whoever gets the PASID is asked for what is his.
        let Bound { guest, sva, processes, handle, .. } = &mut bound;
        let process = handle.process();
        let taken = core::mem::replace(handle, sva.bind(&mut guest.driver, processes, process).unwrap());
        sva.unbind(&mut guest.driver, processes, taken).unwrap();
        bound.sent();
        for group in 1..=4 {
            bound.tell(bound.asks(Some(pasid), group, true));
            assert_eq!(bound.serve(), [invalid(Some(pasid), group)]);
        }
    }
}
