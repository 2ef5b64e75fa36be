//! The base requests, framing, limits.

use super::*;
use crate::{Limits, Rejection};

#[test]
fn framing() {
    let mut device = device();
    let attach = attach(1, 8).encode();
    let mut unwritten = |readable: &[u8], writable: usize| {
        let mut buffer = vec![0xee; writable];
        let handled = device.handle(readable, &mut buffer);
        assert_eq!(handled.used, 0);
        assert_eq!(handled.rejection.and_then(|rejection| rejection.status()), None);
        assert!(buffer.iter().all(|&byte| byte == 0xee));
        assert_eq!(device.domain_count(), 0, "not done either");
    };
    unwritten(&[], 4); // D-11
    unwritten(&[1, 0, 0], 4);
    unwritten(&attach, 0);
    unwritten(&attach, 3);
    for kind in [0, 8, 9, 0xff] {
        unwritten(&[kind; 64], 4); // D-10
    }
    for length in 4..attach.len() {
        assert_eq!(raw(&mut device, &attach[..length]), Status::Inval);
    }
    // Longer than needed on both sides; D-12.
    let mut longer = attach.to_vec();
    longer[1..4].copy_from_slice(&[1, 2, 3]);
    longer.resize(100, 0xff);
    let mut writable = [0xee; 9];
    assert_eq!(device.handle(&longer, &mut writable), Handled { used: 4, rejection: None });
    assert_eq!(writable, [0, 0, 0, 0, 0xee, 0xee, 0xee, 0xee, 0xee]);
}

#[test]
fn attach_statuses() {
    let mut device = device_with(DeviceConfig {
        domain_range: DomainRange::new(DomainId(1), DomainId(100)).unwrap(),
        ..DeviceConfig::default()
    });
    let mut reserved = attach(1, 8).encode().to_vec();
    reserved[16] = 1;
    assert_eq!(raw(&mut device, &reserved), Status::Inval); // D-17
    let mut flags = attach(1, 8).encode().to_vec();
    flags[12] = 2;
    assert_eq!(raw(&mut device, &flags), Status::Inval); // D-18
    assert_eq!(send(&mut device, &attach(1, 7)), Status::NoEnt); // D-19
    assert_eq!(send(&mut device, &attach(0, 8)), Status::Range);
    assert_eq!(send(&mut device, &attach(101, 8)), Status::Range);
    assert_eq!(device.domain_count(), 0);
    assert_eq!(send(&mut device, &attach(1, 8)), Status::Ok);
    assert_eq!(send(&mut device, &attach(1, 9)), Status::Ok); // D-20
    assert_eq!(send(&mut device, &attach_bypass(1, 16)), Status::Inval); // D-21
    assert_eq!(send(&mut device, &attach_bypass(1, 8)), Status::Inval);
    assert_eq!(send(&mut device, &attach_bypass(2, 16)), Status::Ok);
    assert_eq!(send(&mut device, &attach(2, 17)), Status::Inval);
    assert_eq!(device.host.bound_to(Stream::untagged(EndpointId(16))), Some("identity"));
    assert_eq!(device.domain_count(), 2);
}

#[test]
fn bypass_flag_needs_the_feature() {
    let mut device = device();
    device.accept_features(DeviceConfig::FEATURES - Features::BYPASS_CONFIG).unwrap();
    assert_eq!(send(&mut device, &attach_bypass(1, 8)), Status::Inval); // D-18
    assert_eq!(send(&mut device, &attach(1, 8)), Status::Ok);
}

#[test]
fn attach_to_the_same_domain_keeps_its_mappings() {
    let mut device = device();
    send(&mut device, &attach(1, 8));
    send(&mut device, &map(1, 0, 9));
    let before = observe(&device);
    let calls = device.host.calls;
    assert_eq!(send(&mut device, &attach(1, 8)), Status::Ok);
    assert_eq!(observe(&device), before);
    assert_eq!(device.host.calls, calls);
}

#[test]
fn attach_elsewhere_detaches() {
    let mut device = device();
    send(&mut device, &attach(1, 8));
    send(&mut device, &map(1, 0, 9));
    assert_eq!(send(&mut device, &attach(2, 8)), Status::Ok); // D-22
    assert_eq!(send(&mut device, &map(1, 20, 20)), Status::NoEnt); // D-29
    assert_eq!(device.mapping_count(), 0);
    assert_eq!(device.host.live_spaces(), 1);
    assert_eq!(send(&mut device, &map(2, 0, 9)), Status::Ok);
}

#[test]
fn detach_statuses() {
    let mut device = device();
    send(&mut device, &attach(1, 8));
    send(&mut device, &attach(2, 9));
    assert_eq!(send(&mut device, &detach(1, 7)), Status::NoEnt); // D-26
    assert_eq!(send(&mut device, &detach(3, 8)), Status::Inval); // D-27
    assert_eq!(send(&mut device, &detach(2, 8)), Status::Inval);
    assert_eq!(send(&mut device, &detach(1, 16)), Status::Inval);
    let mut reserved = detach(1, 8).encode().to_vec();
    reserved[12..20].fill(0xff);
    assert_eq!(raw(&mut device, &reserved), Status::Ok); // D-25
    assert_eq!(device.host.bound_to(Stream::untagged(EndpointId(8))), None); // D-28
    assert_eq!(send(&mut device, &detach(1, 8)), Status::Inval);
    assert_eq!(device.domain_count(), 1); // D-29
}

#[test]
fn map_statuses() {
    let mut device = device();
    device.accept_features(DeviceConfig::FEATURES - Features::MMIO).unwrap();
    send(&mut device, &attach(1, 8));
    send(&mut device, &attach_bypass(2, 16));
    let top = (1u64 << 48) - 1;
    let cases = [
        (map(1, 0, 9), Status::Ok),
        (map(1, 9, 9), Status::Inval), // D-31
        (map(1, 5, 20), Status::Inval),
        (map(3, 0, 9), Status::NoEnt),                      // D-33
        (map(2, 0, 9), Status::Inval),                      // D-34
        (map_bytes(1, 0x10800, 0x10fff, 0), Status::Range), // D-30
        (map_bytes(1, 0x10000, 0x107ff, 0), Status::Range),
        (map_bytes(1, 0x10000, 0x10fff, 0x800), Status::Range),
        (map_bytes(1, 0x20000, 0x10fff, 0), Status::Range), // inverted
        (map_bytes(1, 0x10000, 0x11fff, u64::MAX - 0xfff), Status::Range), // output wraps
        (map_bytes(1, 0x10000, 0x10fff, u64::MAX - 0xfff), Status::Ok),
        (map_bytes(1, 0, u64::MAX, 0), Status::Range), // D-15
        (map_bytes(1, top - 0xfff, top + 0x1000, 0), Status::Range),
        (map_bytes(1, top + 1, top + 0x1000, 0), Status::Range),
        (map_bytes(1, top - 0xfff, top, 0), Status::Ok),
        (map_bytes(1, 0x800_0000, 0x800_0fff, 0), Status::Inval), // D-37
        (map_bytes(1, 0x80f_f000, 0x810_0fff, 0), Status::Inval),
        (map_bytes(1, 0x7ff_f000, 0x7ff_ffff, 0), Status::Ok),
        (map_bytes(1, 0x810_0000, 0x810_0fff, 0), Status::Ok),
    ];
    for (request, expected) in cases {
        assert_eq!(send(&mut device, &request), expected, "{request:x?}");
    }
    let mut flags = map(1, 0x100, 0x100).encode().to_vec();
    flags[32] = 7;
    assert_eq!(raw(&mut device, &flags), Status::Inval); // D-32, MMIO without its feature
    flags[32] = 8;
    assert_eq!(raw(&mut device, &flags), Status::Inval);
    device.accept_features(DeviceConfig::FEATURES).unwrap();
    flags[32] = 7;
    assert_eq!(raw(&mut device, &flags), Status::Ok);
}

#[test]
fn the_whole_space() {
    let mut device = device_with(DeviceConfig { input_range: IovaRange::ALL, ..DeviceConfig::default() });
    send(&mut device, &attach(1, 16));
    assert_eq!(send(&mut device, &map_bytes(1, 0, u64::MAX, 0x1000)), Status::Range);
    assert_eq!(send(&mut device, &map_bytes(1, 0, u64::MAX, 0)), Status::Ok);
    assert_eq!(send(&mut device, &unmap_bytes(1, 0, u64::MAX - 1)), Status::Range);
    assert_eq!(send(&mut device, &unmap_bytes(1, 0, u64::MAX)), Status::Ok);
    assert_eq!(device.mapping_count(), 0);
    send(&mut device, &attach(2, 8));
    assert_eq!(send(&mut device, &map_bytes(2, 0, u64::MAX, 0)), Status::Inval); // D-37
}

#[test]
fn byte_granule() {
    let mut device = device_with(DeviceConfig { page_size_mask: u64::MAX, ..DeviceConfig::default() });
    send(&mut device, &attach(1, 16));
    assert_eq!(send(&mut device, &map_bytes(1, 3, 3, 7)), Status::Ok);
    let mask =
        DeviceConfig { page_size_mask: 1 << 63, input_range: IovaRange::ALL, ..DeviceConfig::default() };
    let mut device = device_with(mask);
    send(&mut device, &attach(1, 16));
    assert_eq!(send(&mut device, &map_bytes(1, 1 << 63, u64::MAX, 0)), Status::Ok);
}

/// virtio 1.4, 5.13.6.6: the examples.
#[test]
fn the_seven_unmap_cases() {
    type Range = (u64, u64);
    let cases: [(&[Range], Range, Status, usize); 7] = [
        (&[], (0, 4), Status::Ok, 0),
        (&[(0, 9)], (0, 9), Status::Ok, 0),
        (&[(0, 4), (5, 9)], (0, 9), Status::Ok, 0),
        (&[(0, 9)], (0, 4), Status::Range, 1),
        (&[(0, 4), (5, 9)], (0, 4), Status::Ok, 1),
        (&[(0, 4)], (0, 9), Status::Ok, 0),
        (&[(0, 4), (10, 14)], (0, 14), Status::Ok, 0),
    ];
    for (number, (mapped, asked, status, left)) in cases.into_iter().enumerate() {
        let mut device = device();
        send(&mut device, &attach(1, 8));
        for &(first, last) in mapped {
            assert_eq!(send(&mut device, &map(1, first, last)), Status::Ok);
        }
        assert_eq!(send(&mut device, &unmap(1, asked.0, asked.1)), status, "case {}", number + 1);
        assert_eq!(device.mapping_count(), left, "case {}", number + 1);
    }
}

#[test]
fn unmap_statuses() {
    let mut device = device();
    send(&mut device, &attach(1, 8));
    send(&mut device, &attach_bypass(2, 16));
    send(&mut device, &map(1, 0, 4));
    send(&mut device, &map(1, 5, 9));
    let mut reserved = unmap(1, 0, 9).encode().to_vec();
    reserved[24] = 1;
    assert_eq!(raw(&mut device, &reserved), Status::Inval); // D-38
    assert_eq!(send(&mut device, &unmap(3, 0, 9)), Status::NoEnt); // D-39
    assert_eq!(send(&mut device, &unmap(2, 0, 9)), Status::Inval); // D-40
    assert_eq!(send(&mut device, &unmap_bytes(1, 0x1000, 0xfff)), Status::Range);
    // D-41, split at either end: nothing goes.
    assert_eq!(send(&mut device, &unmap(1, 0, 7)), Status::Range);
    assert_eq!(send(&mut device, &unmap(1, 3, 9)), Status::Range);
    assert_eq!(device.mapping_count(), 2);
    // D-42, outside of the input range too.
    assert_eq!(send(&mut device, &unmap_bytes(1, 0, u64::MAX)), Status::Ok);
    assert_eq!(send(&mut device, &unmap_bytes(1, 1 << 50, u64::MAX)), Status::Ok);
    assert_eq!(device.mapping_count(), 0);
}

#[test]
fn reserved_regions_follow_membership() {
    let mut device = device();
    let over = map_bytes(1, 0x800_0000, 0x800_0fff, 0);
    send(&mut device, &attach(1, 16));
    assert_eq!(send(&mut device, &over), Status::Ok);
    let before = observe(&device);
    assert_eq!(send(&mut device, &attach(1, 8)), Status::Unsupp); // D-23
    assert_eq!(observe(&device), before);
    send(&mut device, &unmap_bytes(1, 0x800_0000, 0x800_0fff));
    send(&mut device, &map(1, 0, 0));
    assert_eq!(send(&mut device, &attach(1, 8)), Status::Ok);
    assert_eq!(send(&mut device, &over), Status::Inval); // D-37
    assert_eq!(send(&mut device, &attach(1, 9)), Status::Ok);
    send(&mut device, &detach(1, 8));
    assert_eq!(send(&mut device, &over), Status::Inval);
    send(&mut device, &detach(1, 9));
    assert_eq!(send(&mut device, &over), Status::Ok);
}

#[test]
fn limits() {
    let limits = Limits { max_domains: 2, max_mappings_per_domain: 2, max_mappings: 3, ..Limits::default() };
    let mut device = device_with(DeviceConfig { limits, ..DeviceConfig::default() });
    send(&mut device, &attach(1, 8));
    send(&mut device, &attach(2, 16));
    let before = observe(&device);
    assert_eq!(send(&mut device, &attach(3, 9)), Status::NoMem);
    assert_eq!(send(&mut device, &attach_bypass(3, 9)), Status::NoMem);
    assert_eq!(send(&mut device, &table(3, 9, cd_table(0x4000_0000))), Status::NoMem);
    assert_eq!(observe(&device), before);
    assert_eq!(send(&mut device, &attach(2, 17)), Status::Ok);
    for (request, expected) in [
        (map(1, 0, 0), Status::Ok),
        (map(1, 1, 1), Status::Ok),
        (map(1, 2, 2), Status::NoMem),
        (map(1, 1, 2), Status::Inval), // The overlap counts, the limit does not.
        (map(2, 0, 0), Status::Ok),
        (map(2, 1, 1), Status::NoMem),
        (map(2, 0, 1), Status::Inval),
        (unmap(1, 0, 1), Status::Ok),
        (map(2, 1, 1), Status::Ok),
        (detach(2, 16), Status::Ok),
        (detach(2, 17), Status::Ok),
        (map(1, 0, 0), Status::Ok),
        (map(1, 1, 1), Status::Ok),
    ] {
        assert_eq!(send(&mut device, &request), expected, "{request:?}");
    }
}

#[test]
fn a_million_mappings_fit_by_default() {
    const { assert!(Limits::DEFAULT.max_mappings_per_domain >= 1 << 20) };
    const { assert!(Limits::DEFAULT.max_mappings >= 1 << 20) };
}

#[test]
fn map_unmap_that_is_not_negotiated() {
    let without = DeviceConfig::FEATURES - Features::MAP_UNMAP;
    let mut unoffered = device_with(DeviceConfig { features: without, ..DeviceConfig::default() });
    let mut declined = device();
    declined.accept_features(without).unwrap();
    for device in [&mut unoffered, &mut declined] {
        assert_eq!(send(device, &attach(1, 8)), Status::Ok);
        assert_eq!(send(device, &map(1, 0, 0)), Status::Unsupp);
        assert_eq!(send(device, &unmap(1, 0, 0)), Status::Unsupp);
    }
}

#[test]
fn reset_leaves_nothing() {
    let mut device = device();
    send(&mut device, &attach(1, 8));
    send(&mut device, &map(1, 0, 100));
    send(&mut device, &attach_bypass(2, 9));
    send(&mut device, &table(3, 16, page_table(0x4000_0000, 0)));
    send(&mut device, &table(3, 16, page_table(0x4000_0000, 5)));
    send(&mut device, &table(3, 17, pasid_table(0x4000_0000)));
    assert_eq!(device.host.live_spaces(), 5);
    device.reset();
    consistent(&device);
    assert_eq!(device.host.live_spaces(), 0);
    assert_eq!(device.host.bound_streams(), 0);
    assert_eq!((device.domain_count(), device.mapping_count()), (0, 0)); // D-8
    assert_eq!(device.features(), Features::empty());
    device.accept_features(DeviceConfig::FEATURES).unwrap();
    assert_eq!(send(&mut device, &map(1, 0, 0)), Status::NoEnt);
    assert_eq!(send(&mut device, &attach_bypass(1, 8)), Status::Ok);
}

#[test]
fn the_rejection_says_why() {
    let mut device = device();
    let handled = device.handle(&attach(1, 7).encode(), &mut [0; 4]);
    assert_eq!(handled.rejection, Some(Rejection::NoEndpoint(EndpointId(7))));
    let text = alloc::format!("{}", handled.rejection.unwrap());
    assert_eq!(text, "endpoint 7 does not exist");
}
