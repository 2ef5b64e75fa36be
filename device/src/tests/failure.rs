//! A host that fails, at each call that a request makes.

use super::*;
use crate::host::HostError;

/// What is in force before, and the request.
type Case = (&'static str, Vec<Request>, Request);

fn cases() -> Vec<Case> {
    let base = 0x4000_0000;
    let pages = |values: &[u32]| -> Vec<Request> {
        values.iter().map(|&value| table(1, 16, page_table(base, value))).collect()
    };
    vec![
        ("attach", vec![], attach(1, 8)),
        ("attach to another's", vec![attach(1, 9), map(1, 0, 0)], attach(1, 8)),
        ("attach elsewhere", vec![attach(1, 8), map(1, 0, 0)], attach(2, 8)),
        ("attach in bypass", vec![], attach_bypass(1, 8)),
        ("from a table", vec![table(1, 8, cd_table(base))], attach(2, 8)),
        ("from page tables", pages(&[0, 5, 6, 7]), attach(2, 16)),
        ("detach", vec![attach(1, 8), map(1, 0, 0)], detach(1, 8)),
        ("detach page tables", pages(&[0, 5, 6, 7]), detach(1, 16)),
        ("map", vec![attach(1, 8)], map(1, 0, 0)),
        ("unmap", vec![attach(1, 8), map(1, 0, 0), map(1, 1, 1)], unmap(1, 0, 1)),
        ("table", vec![], table(1, 8, cd_table(base))),
        ("table from mapped", vec![attach(2, 8), map(2, 0, 0)], table(1, 8, cd_table(base))),
        ("table from bypass", vec![attach_bypass(2, 8)], table(1, 8, cd_table(base))),
        ("table again", vec![table(1, 8, cd_table(base))], table(1, 8, cd_table(base + 0x10000))),
        ("table elsewhere", vec![table(1, 8, cd_table(base))], table(2, 8, cd_table(base + 0x10000))),
        ("PASID table for page tables", pages(&[0, 5, 6]), table(1, 16, pasid_table(base))),
        (
            "page table for PASID table",
            vec![table(1, 16, pasid_table(base))],
            table(1, 16, page_table(base, 5)),
        ),
        (
            "page table 0 for PASID table",
            vec![table(1, 16, pasid_table(base))],
            table(1, 16, page_table(base, 0)),
        ),
        ("first page table", vec![attach(2, 16)], table(1, 16, page_table(base, 5))),
        ("one more page table", pages(&[0, 6]), table(1, 16, page_table(base, 5))),
        ("page table again", pages(&[0, 5, 6]), table(1, 16, page_table(base + 0x1000, 5))),
        ("page table 0 again", pages(&[0, 5]), table(1, 16, page_table(base + 0x1000, 0))),
        ("page table elsewhere", pages(&[0, 5, 6]), table(2, 16, page_table(base, 5))),
        ("page table 0 elsewhere", pages(&[0, 5, 6]), table(2, 16, page_table(base, 0))),
        ("unbind", pages(&[0, 5]), table(1, 16, unbind(5))),
        ("unbind 0", pages(&[0, 5]), table(1, 16, unbind(0))),
    ]
}

fn prepared(bypass: bool, before: &[Request]) -> Device<TestHost> {
    let mut device = device_with(DeviceConfig { bypass, ..DeviceConfig::default() });
    for request in before {
        assert_eq!(send(&mut device, request), Status::Ok, "{request:?}");
    }
    device
}

fn left_clean(device: &mut Device<TestHost>, bypass: bool) {
    device.host.fails = Fails::Never;
    device.reset();
    consistent(device);
    assert!(!device.needs_reset());
    assert_eq!(device.host.live_spaces(), usize::from(bypass));
    assert_eq!(device.host.bound_streams(), if bypass { device.endpoints.len() } else { 0 });
    assert_eq!((device.domain_count(), device.mapping_count()), (0, 0));
}

#[test]
fn one_failure_changes_nothing() {
    for (name, before, request) in cases() {
        for bypass in [false, true] {
            for position in 0.. {
                let mut device = prepared(bypass, &before);
                let observed = observe(&device);
                let spaces = device.host.live_spaces();
                let first = device.host.calls;
                device.host.fails = Fails::At(first + position);
                let status = send(&mut device, &request);
                let failed = device.host.last_failed;
                if failed.is_none() {
                    assert_eq!(status, Status::Ok);
                    assert_eq!(device.host.calls, first + position, "{name}: each call was made to fail");
                    break;
                }
                assert!(!device.needs_reset());
                if failed == Some("invalidate") {
                    assert_eq!(status, Status::Ok, "{name}: it is asked once more, for all");
                    continue;
                }
                assert_eq!(status, Status::DevErr, "{name}, call {position}");
                assert_eq!(observe(&device), observed, "{name}, call {position}");
                // Identity is made once and kept.
                let kept = device.host.live_spaces() - usize::from(device.identity.is_some());
                assert!(kept <= spaces, "{name}, call {position}");
                assert_eq!(send(&mut device, &request), Status::Ok, "{name} once more");
                left_clean(&mut device, bypass);
            }
        }
    }
}

#[test]
fn an_invalidation_that_cannot_be_done_changes_nothing() {
    for (name, before, request) in cases() {
        let mut device = prepared(false, &before);
        let observed = observe(&device);
        device.host.stops.extend([0, 0]);
        let status = send(&mut device, &request);
        if device.host.stops.len() == 2 {
            assert_eq!(status, Status::Ok, "{name} invalidates nothing");
            continue;
        }
        assert_eq!(status, Status::DevErr, "{name}");
        assert_eq!(observe(&device), observed, "{name}");
        assert_eq!(send(&mut device, &request), Status::Ok, "{name} once more");
        left_clean(&mut device, false);
    }
}

#[test]
fn whatever_fails_the_records_are_true() {
    for (name, before, request) in cases() {
        for bypass in [false, true] {
            for position in 0.. {
                let mut device = prepared(bypass, &before);
                device.host.fails = Fails::From(device.host.calls + position);
                send(&mut device, &request); // Compares the records with the host.
                if device.host.last_failed.is_none() {
                    break;
                }
                device.reset();
                let stuck = device.stuck.len();
                assert!(stuck == 0 || device.needs_reset(), "{name}");
                left_clean(&mut device, bypass);
            }
        }
    }
}

#[test]
fn the_way_back_may_fail_too() {
    // Every pair of failing calls.
    for (_, before, request) in cases() {
        let mut device = prepared(false, &before);
        let first = device.host.calls;
        send(&mut device, &request);
        let made = device.host.calls - first;
        for position in 0..made {
            let mut device = prepared(false, &before);
            device.host.stops.extend([0; 2]);
            device.host.fails = Fails::From(first + position);
            send(&mut device, &request);
            left_clean(&mut device, false);
        }
    }
}

#[test]
fn statuses_of_the_host() {
    for (error, expected) in [
        (HostError::Unsupported, Status::Unsupp),
        (HostError::NoMemory, Status::NoMem),
        (HostError::BadAddress, Status::Inval),
        (HostError::Failed(3), Status::DevErr),
    ] {
        for (_, before, request) in cases() {
            let mut device = prepared(false, &before);
            device.host.error = Some(error);
            device.host.fails = Fails::At(device.host.calls);
            assert_eq!(send(&mut device, &request), expected);
        }
    }
}
