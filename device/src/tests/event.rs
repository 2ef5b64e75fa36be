//! Faults on their way out.

use pgtable_formats::context::smmuv3;
use pgtable_formats::{AccessKind, Fault};

use super::*;
use crate::Limits;
use crate::host::{FaultCause, FaultReport};

fn report(cause: FaultCause) -> FaultReport {
    let stream = Stream { endpoint: EndpointId(8), pasid: Some(pasid(5)) };
    FaultReport {
        stream,
        address: Some(Iova(0x123_4000)),
        kind: AccessKind::Execute,
        privileged: true,
        cause,
    }
}

fn fault(reason: FaultReason, access: AccessFlags, pasid: Option<Pasid>) -> Event {
    let address = Some(Iova(0x123_4000));
    Event::Fault(FaultEvent { reason, access, endpoint: EndpointId(8), pasid, address })
}

#[test]
fn reasons() {
    let mut device = device();
    let access = AccessFlags::READ | AccessFlags::EXEC | AccessFlags::PRIVILEGED;
    for (cause, reason) in [
        (FaultCause::Unattached, FaultReason::Domain),
        (FaultCause::Unmapped, FaultReason::Mapping),
        (FaultCause::Permission, FaultReason::Mapping),
        (FaultCause::Table(Fault::Smmuv3(smmuv3::Event::FTranslation)), FaultReason::Mapping),
        (FaultCause::Table(Fault::Smmuv3(smmuv3::Event::CBadCd)), FaultReason::Unknown),
    ] {
        device.host_mut().faults.push_back(report(cause));
        assert!(device.event_pending());
        assert_eq!(device.next_event(), Some(fault(reason, access, Some(pasid(5)))));
        assert!(!device.event_pending());
    }
}

#[test]
fn the_ratified_text_has_no_pasid() {
    let mut device = device();
    device.accept_features(Features::MAP_UNMAP).unwrap();
    device.host_mut().faults.push_back(report(FaultCause::Unmapped));
    assert_eq!(device.next_event(), Some(fault(FaultReason::Mapping, AccessFlags::READ, None))); // D-55
}

#[test]
fn an_event_waits_for_a_buffer_that_holds_it() {
    let mut device = device();
    assert_eq!(device.fill_event(&mut [0; 24]), None);
    device.host_mut().faults.push_back(report(FaultCause::Unmapped));
    for length in 0..24 {
        let mut buffer = vec![0xee; length];
        assert_eq!(device.fill_event(&mut buffer), Some(0)); // D-58
        assert!(buffer.iter().all(|&byte| byte == 0xee));
    }
    let mut buffer = [0xee; 30];
    assert_eq!(device.fill_event(&mut buffer), Some(24));
    assert_eq!(buffer[24..], [0xee; 6]);
    assert!(matches!(Event::decode(&buffer[..24]), Some(Event::Fault(_))));
    assert_eq!(device.fill_event(&mut buffer), None);
}

#[test]
fn events_are_bounded() {
    let limits = Limits { max_pending_events: 3, ..Limits::default() };
    let mut device = device_with(DeviceConfig { limits, ..DeviceConfig::default() });
    device.host_mut().faults.extend((0..6).map(|_| report(FaultCause::Unmapped)));
    assert!(device.event_pending());
    assert_eq!(device.dropped_events(), 0);
    assert!(device.event_pending());
    assert_eq!(device.dropped_events(), 3); // D-59
    assert_eq!(core::iter::from_fn(|| device.next_event()).count(), 3);
}

#[test]
fn events_end_with_a_reset() {
    let mut device = device();
    device.host_mut().faults.extend((0..3).map(|_| report(FaultCause::Unmapped)));
    assert!(device.event_pending());
    device.host_mut().faults.push_back(report(FaultCause::Unmapped));
    device.reset();
    assert!(!device.event_pending());
}

#[test]
fn a_reset_takes_more_faults_than_may_wait() {
    let limits = Limits { max_pending_events: 1, ..Limits::default() };
    let mut device = device_with(DeviceConfig { limits, ..DeviceConfig::default() });
    device.host_mut().faults.extend((0..1000).map(|_| report(FaultCause::Unmapped)));
    device.reset();
    assert!(!device.event_pending());
}

#[test]
fn endpoints_in_events_are_known() {
    let mut device = device();
    let mut unknown = report(FaultCause::Unmapped);
    unknown.stream.endpoint = EndpointId(7);
    device.host_mut().faults.push_back(unknown);
    assert!(!device.event_pending()); // D-56
}
