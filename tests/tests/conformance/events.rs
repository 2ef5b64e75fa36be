//! Fault events: D-55 to D-60.

use pgtable_formats::{Access, AccessKind};
use viommu_device::host::{FaultCause, FaultReport, HostError, Stream};
use viommu_device::{DeviceConfig, Features, Limits};
use viommu_tests::rig::{Bare, Call, Flaky, Rig, Sends, Setup, request};
use viommu_wire::{
    AccessFlags, Config, EndpointId, Event, FaultEvent, FaultReason, Iova, MapFlags, Pasid, Status,
};

/// Endpoint 8 in domain 1 with a page for reads; everything but the handover.
fn rig() -> Rig {
    rig_with(Setup::accepting(DeviceConfig::FEATURES - Features::ATTACH_TABLE))
}

fn rig_with(setup: Setup) -> Rig {
    let mut rig = Rig::new(setup);
    assert_eq!(rig.send(&request::attach(1, 8)), Status::Ok);
    assert_eq!(rig.send(&request::map_with(1, 0x1000, 0x1fff, 0x5000, MapFlags::READ)), Status::Ok);
    rig
}

fn fault(rig: &Rig, endpoint: u32, pasid: Option<u32>, iova: u64, kind: AccessKind) {
    assert!(rig.machine.access(endpoint, pasid, iova, kind).is_err());
}

/// The record of one event, in a buffer of 24 bytes.
fn record(rig: &mut Rig) -> Vec<u8> {
    rig.post_event_buffer(24);
    let replies = rig.event_replies();
    assert_eq!((replies.len(), replies[0].used), (1, 24));
    replies[0].bytes.clone()
}

#[test]
fn d55_reserved_fields_and_undefined_flags_are_zero() {
    let mut rig = rig();
    fault(&rig, 8, None, 0x3008, AccessKind::Read);
    fault(&rig, 8, None, 0x1008, AccessKind::Write);
    fault(&rig, 9, None, 0x1000, AccessKind::Write);
    // What only the handover defines: PASIDs, instruction reads, privileged accesses.
    fault(&rig, 8, Some(5), 0x3000, AccessKind::Execute);
    {
        let mut iommu = rig.machine.lock();
        let access = Access { kind: AccessKind::Write, privileged: true };
        let host = iommu.device_mut().host_mut();
        assert!(host.translate(Stream::untagged(EndpointId(8)), Iova(0x4000), access, |_| ()).is_err());
    }
    let expected = [
        (2, 0x101, 8, 0x3008),
        (2, 0x102, 8, 0x1008),
        (1, 0x102, 9, 0x1000),
        (1, 0x101, 8, 0x3000),
        (2, 0x102, 8, 0x4000),
    ];
    for (reason, flags, endpoint, address) in expected {
        let mut bytes = vec![reason, 0, 0, 0];
        bytes.extend(u32::to_le_bytes(flags));
        bytes.extend(u32::to_le_bytes(endpoint));
        bytes.extend([0; 4]);
        bytes.extend(u64::to_le_bytes(address));
        assert_eq!(record(&mut rig), bytes, "{reason} {flags:#x} {endpoint} {address:#x}");
    }
}

#[test]
fn d56_events_name_endpoints_that_exist() {
    let setup = Setup::default();
    let (mut host, _) = Flaky::new(&setup);
    let report = |endpoint| FaultReport {
        stream: Stream::untagged(EndpointId(endpoint)),
        address: Some(Iova(0x1000)),
        kind: AccessKind::Read,
        privileged: false,
        cause: FaultCause::Unattached,
    };
    host.faults = [report(99), report(8), report(0)].into();
    let mut bare = Bare::over(setup.config, None, host);
    let Some(Event::Fault(fault)) = bare.device.next_event() else { panic!("no event") };
    assert_eq!(fault.endpoint, EndpointId(8));
    assert_eq!(bare.device.next_event(), None);
}

#[test]
fn d57_an_unknown_address_is_left_out() {
    let setup = Setup::default();
    let (mut host, _) = Flaky::new(&setup);
    host.faults = [FaultReport {
        stream: Stream::untagged(EndpointId(8)),
        address: None,
        kind: AccessKind::Write,
        privileged: false,
        cause: FaultCause::Unmapped,
    }]
    .into();
    let mut bare = Bare::over(setup.config, None, host);
    let mut buffer = [0xee; 24];
    assert_eq!(bare.device.fill_event(&mut buffer), Some(24));
    assert_eq!(buffer[4..8], 2u32.to_le_bytes());
    assert_eq!(buffer[16..], [0; 8]);
}

#[test]
fn d57_a_known_address_is_given_with_every_reason() {
    let mut rig = rig();
    fault(&rig, 8, None, 0xabc_def0, AccessKind::Read);
    fault(&rig, 16, None, u64::MAX, AccessKind::Read);
    let addresses: Vec<_> = rig
        .events()
        .into_iter()
        .map(|event| match event {
            Event::Fault(FaultEvent { reason, address, .. }) => (reason, address),
            other => panic!("{other:?}"),
        })
        .collect();
    let expected =
        [(FaultReason::Mapping, Some(Iova(0xabc_def0))), (FaultReason::Domain, Some(Iova(u64::MAX)))];
    assert_eq!(addresses, expected);
}

#[test]
fn d58_a_buffer_that_is_too_small_goes_back_unwritten_and_the_event_stays_whole() {
    let mut rig = rig();
    fault(&rig, 8, None, 0x3000, AccessKind::Read);
    for len in [1, 12, 12, 23] {
        rig.post_event_buffer(len);
        let replies = rig.event_replies();
        assert_eq!(replies.len(), 1, "{len}");
        assert!(replies[0].is_unwritten(), "{len}");
        assert!(rig.machine.lock().device_mut().event_pending());
    }
    assert_eq!(record(&mut rig)[16..], 0x3000u64.to_le_bytes());
    assert!(!rig.machine.lock().device_mut().event_pending());
}

#[test]
fn d58_an_event_does_not_span_buffers() {
    let mut rig = rig();
    for len in [12, 12, 24, 100] {
        rig.post_event_buffer(len);
    }
    assert_eq!(rig.event_replies(), [], "there is nothing to report yet");
    fault(&rig, 8, None, 0x3000, AccessKind::Read);
    fault(&rig, 8, None, 0x4000, AccessKind::Read);
    let used: Vec<usize> = rig.event_replies().iter().map(|reply| reply.used).collect();
    assert_eq!(used, [0, 0, 24, 24]);
}

#[test]
fn d59_without_a_buffer_events_wait() {
    let mut rig = rig();
    for page in 3..9u64 {
        fault(&rig, 8, None, page << 12, AccessKind::Write);
    }
    assert_eq!(rig.event_replies(), []);
    // Requests go on meanwhile.
    assert_eq!(rig.send(&request::map(1, 0x2000, 0x2fff, 0)), Status::Ok);
    for page in 3..9u64 {
        assert_eq!(record(&mut rig)[16..], (page << 12).to_le_bytes());
    }
}

#[test]
fn d59_beyond_the_limit_events_are_dropped_and_counted() {
    let limits = Limits { max_pending_events: 4, ..Limits::DEFAULT };
    let config = DeviceConfig { limits, ..DeviceConfig::default() };
    let mut rig = rig_with(Setup { config, ..Setup::default() });
    for page in 3..13u64 {
        fault(&rig, 8, None, page << 12, AccessKind::Read);
        // The device hears of each before the next.
        assert!(rig.machine.lock().device_mut().event_pending());
    }
    assert_eq!(rig.machine.lock().device().dropped_events(), 6);
    let pages: Vec<u64> = rig
        .events()
        .into_iter()
        .map(|event| match event {
            Event::Fault(FaultEvent { address: Some(address), .. }) => address.0 >> 12,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(pages, [3, 4, 5, 6], "the oldest are kept");
    fault(&rig, 8, None, 0xf000, AccessKind::Read);
    assert_eq!(rig.events().len(), 1);
    rig.works();
}

#[test]
fn d60_an_internal_error_asks_for_a_reset_and_makes_no_event() {
    let setup = Setup::default();
    let (host, _) = Flaky::new(&setup);
    let mut bare = Bare::over(setup.config, None, host);
    let error = HostError::Failed(5);
    // The second endpoint fails, and then the way back of the first does.
    bare.device.host_mut().script =
        [(Call::Bind, None), (Call::Bind, Some(error)), (Call::Bind, Some(error))].into();
    assert!(bare.device.write_config(Config::BYPASS_OFFSET, &[1]).is_err());
    assert!(bare.device.needs_reset());
    assert_eq!(bare.device.next_event(), None);
    bare.device.reset();
    assert!(!bare.device.needs_reset());
    bare.device.accept_features(bare.device.offered_features()).unwrap();
    assert_eq!(bare.send(&request::attach(1, 8)), Status::Ok);
}

#[test]
fn d60_a_failed_request_is_answered_deverr_and_makes_no_event() {
    let setup = Setup::default();
    let (host, _) = Flaky::new(&setup);
    let mut bare = Bare::over(setup.config, None, host);
    for call in [Call::Create, Call::Bind] {
        bare.device.host_mut().script = [(call, Some(HostError::Failed(5)))].into();
        assert_eq!(bare.send(&request::attach(1, 8)), Status::DevErr);
        assert_eq!((bare.device.domain_count(), bare.device.next_event()), (0, None));
    }
    assert_eq!(bare.send(&request::attach(1, 8)), Status::Ok);
    bare.device.host_mut().script = [(Call::Map, Some(HostError::Failed(5)))].into();
    assert_eq!(bare.send(&request::map(1, 0x1000, 0x1fff, 0)), Status::DevErr);
    assert_eq!(bare.send(&request::map(1, 0x1000, 0x1fff, 0)), Status::Ok);
    bare.device.host_mut().script = [(Call::Unmap, Some(HostError::NoMemory))].into();
    assert_eq!(bare.send(&request::unmap(1, 0x1000, 0x1fff)), Status::NoMem);
    assert_eq!(bare.send(&request::unmap(1, 0x1000, 0x1fff)), Status::Ok);
    assert!(!bare.device.needs_reset());
}

#[test]
fn events_of_the_handover_carry_pasid_and_mode() {
    let mut rig = rig_with(Setup::default());
    let stream = Stream { endpoint: EndpointId(8), pasid: Pasid::new(5) };
    let access = Access { kind: AccessKind::Execute, privileged: true };
    assert!(
        rig.machine.lock().device_mut().host_mut().translate(stream, Iova(0x3000), access, |_| ()).is_err()
    );
    let expected = FaultEvent {
        reason: FaultReason::Domain,
        access: AccessFlags::READ | AccessFlags::EXEC | AccessFlags::PRIVILEGED,
        endpoint: EndpointId(8),
        pasid: Pasid::new(5),
        address: Some(Iova(0x3000)),
    };
    assert_eq!(rig.events(), [Event::Fault(expected)]);
}
