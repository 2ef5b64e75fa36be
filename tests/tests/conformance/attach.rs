//! ATTACH: D-17 to D-24.

use viommu_device::{DeviceConfig, Features, Limits};
use viommu_tests::rig::{Rig, Sends, Setup, request};
use viommu_wire::{AttachFlags, Status};

/// Endpoint 8 in domain 1 with one mapping; endpoint 17 in the bypass domain 2.
fn rig() -> Rig {
    let mut rig = Rig::new(Setup::default());
    assert_eq!(rig.send(&request::attach(1, 8)), Status::Ok);
    assert_eq!(rig.send(&request::map(1, 0x1000, 0x1fff, 0x5000)), Status::Ok);
    assert_eq!(rig.send(&request::attach_bypass(2, 17)), Status::Ok);
    rig
}

fn with_flags(domain: u32, endpoint: u32, flags: u32) -> Vec<u8> {
    let mut bytes = request::attach(domain, endpoint).encode().to_vec();
    bytes[12..16].copy_from_slice(&flags.to_le_bytes());
    bytes
}

#[test]
fn d17_attach_reserved_must_be_zero() {
    let mut rig = rig();
    for at in 16..20 {
        for value in [1, 0x80, 0xff] {
            let mut bytes = request::attach(1, 9).encode().to_vec();
            bytes[at] = value;
            rig.refuse(&bytes, Status::Inval);
        }
    }
    // Before the endpoint is looked for.
    let mut bytes = request::attach(1, 99).encode().to_vec();
    bytes[19] = 1;
    rig.refuse(&bytes, Status::Inval);
    assert_eq!(rig.send(&request::attach(1, 9)), Status::Ok);
}

#[test]
fn d18_unknown_attach_flags_are_refused() {
    let mut rig = rig();
    for bit in 1..32 {
        assert_eq!(rig.send_bytes(&with_flags(1, 9, 1 << bit)), Status::Inval, "bit {bit}");
        assert_eq!(rig.send_bytes(&with_flags(3, 9, 1 | 1 << bit)), Status::Inval, "bit {bit}");
    }
    rig.refuse(&with_flags(1, 9, 2), Status::Inval);
    rig.refuse(&with_flags(1, 99, u32::MAX), Status::Inval);
}

#[test]
fn d18_the_bypass_flag_is_unknown_where_it_was_not_negotiated() {
    let mut rig = Rig::new(Setup::accepting(DeviceConfig::FEATURES - Features::BYPASS_CONFIG));
    assert!(AttachFlags::BYPASS.bits() == 1);
    rig.refuse(&request::attach_bypass(1, 8).encode(), Status::Inval);
    assert_eq!(rig.send(&request::attach(1, 8)), Status::Ok);
}

#[test]
fn d19_attach_of_an_unknown_endpoint_is_noent() {
    let mut rig = rig();
    for endpoint in [0, 7, 10, u32::MAX] {
        for domain in [1, 2, 3] {
            rig.refuse(&request::attach(domain, endpoint).encode(), Status::NoEnt);
        }
    }
    assert_eq!(rig.machine.lock().device().domain_count(), 2);
}

#[test]
fn d20_a_domain_takes_further_endpoints() {
    let mut rig = rig();
    for endpoint in [9, 16, 24] {
        assert_eq!(rig.send(&request::attach(1, endpoint)), Status::Ok);
        assert_eq!(rig.machine.read(endpoint, 0x1000), Some(0x5000));
    }
    // They share what is mapped from now on, and what is unmapped.
    assert_eq!(rig.send(&request::map(1, 0x2000, 0x2fff, 0x6000)), Status::Ok);
    assert_eq!(rig.send(&request::unmap(1, 0x1000, 0x1fff)), Status::Ok);
    for endpoint in [8, 9, 16, 24] {
        let seen = (rig.machine.read(endpoint, 0x1000), rig.machine.read(endpoint, 0x2000));
        assert_eq!(seen, (None, Some(0x6000)));
    }
    assert_eq!(rig.send(&request::attach_bypass(2, 25)), Status::Ok);
    assert_eq!(rig.machine.read(25, 0x1000), Some(0x1000));
}

#[test]
fn d21_the_bypass_flag_must_match_the_domain() {
    let mut rig = rig();
    for endpoint in [9, 8, 17] {
        rig.refuse(&request::attach_bypass(1, endpoint).encode(), Status::Inval);
        rig.refuse(&request::attach(2, endpoint).encode(), Status::Inval);
    }
    // An attached endpoint stays where it was.
    assert_eq!((rig.machine.read(8, 0x1000), rig.machine.read(17, 0x1000)), (Some(0x5000), Some(0x1000)));
}

#[test]
fn d22_attach_elsewhere_is_detach_then_attach() {
    let mut rig = rig();
    assert_eq!(rig.send(&request::attach(1, 9)), Status::Ok);
    assert_eq!(rig.send(&request::attach(3, 8)), Status::Ok);
    assert_eq!((rig.machine.read(8, 0x1000), rig.machine.read(9, 0x1000)), (None, Some(0x5000)));
    assert_eq!(rig.send(&request::map(3, 0x1000, 0x1fff, 0x7000)), Status::Ok);
    assert_eq!((rig.machine.read(8, 0x1000), rig.machine.read(9, 0x1000)), (Some(0x7000), Some(0x5000)));
    assert_eq!(rig.send(&request::detach(1, 8)), Status::Inval, "it is not there any more");

    // The last one leaves: the domain is gone with its mappings.
    assert_eq!(rig.send(&request::attach_bypass(2, 9)), Status::Ok);
    assert_eq!(rig.machine.read(9, 0x1000), Some(0x1000));
    assert_eq!(rig.send(&request::unmap(1, 0, 0xfff)), Status::NoEnt);
    assert_eq!(rig.send(&request::attach_bypass(1, 16)), Status::Ok);
    rig.works();
}

#[test]
fn d22_attach_to_the_same_domain_changes_nothing() {
    let mut rig = rig();
    let before = rig.machine.snapshot();
    for request in [request::attach(1, 8), request::attach_bypass(2, 17)] {
        assert_eq!(rig.send(&request), Status::Ok);
    }
    assert_eq!(rig.machine.snapshot(), before);
    assert_eq!(rig.machine.read(8, 0x1000), Some(0x5000), "the mappings of the only endpoint stay");
    // One DETACH is enough.
    assert_eq!(rig.send(&request::detach(1, 8)), Status::Ok);
    assert_eq!(rig.send(&request::detach(1, 8)), Status::Inval);
}

#[test]
fn d22_a_refused_attach_leaves_the_endpoint_where_it_was() {
    let config =
        DeviceConfig { limits: Limits { max_domains: 2, ..Limits::DEFAULT }, ..DeviceConfig::default() };
    let mut rig = Rig::new(Setup { config, ..Setup::default() });
    assert_eq!(rig.send(&request::attach(1, 8)), Status::Ok);
    assert_eq!(rig.send(&request::map(1, 0x1000, 0x1fff, 0x5000)), Status::Ok);
    assert_eq!(rig.send(&request::attach(2, 9)), Status::Ok);
    let before = rig.machine.snapshot();
    for endpoint in [8, 9, 16] {
        assert_eq!(rig.send(&request::attach(3, endpoint)), Status::NoMem);
        assert_eq!(rig.send(&request::attach_bypass(3, endpoint)), Status::NoMem);
    }
    assert_eq!(rig.machine.snapshot(), before);
    assert_eq!(rig.send(&request::detach(2, 9)), Status::Ok);
    assert_eq!(rig.send(&request::attach(3, 16)), Status::Ok);
}

#[test]
fn d23_an_endpoint_whose_reserved_region_is_mapped_is_refused() {
    let mut rig = rig();
    assert_eq!(rig.send(&request::attach(1, 16)), Status::Ok);
    assert_eq!(rig.send(&request::map(1, 0x10_f000, 0x11_0fff, 0x8000)), Status::Ok);
    rig.refuse(&request::attach(1, 25).encode(), Status::Unsupp);
    assert_eq!(rig.send(&request::unmap(1, 0x10_f000, 0x11_0fff)), Status::Ok);
    assert_eq!(rig.send(&request::attach(1, 25)), Status::Ok);
    assert_eq!(rig.machine.read(25, 0x1000), Some(0x5000));
    // From now on its region counts for the whole domain, until it leaves.
    rig.refuse(&request::map(1, 0x10_f000, 0x11_0fff, 0x8000).encode(), Status::Inval);
    assert_eq!(rig.send(&request::detach(1, 25)), Status::Ok);
    assert_eq!(rig.send(&request::map(1, 0x10_f000, 0x11_0fff, 0x8000)), Status::Ok);
}

#[test]
fn d23_endpoints_with_different_hardware_share_a_domain_of_mappings() {
    let mut rig = rig();
    for endpoint in [9, 16, 25] {
        assert_eq!(rig.send(&request::attach(1, endpoint)), Status::Ok);
        assert_eq!(rig.machine.read(endpoint, 0x1000), Some(0x5000));
    }
}

#[test]
fn d24_after_attach_the_endpoint_is_attached_and_its_domain_exists() {
    let mut rig = Rig::new(Setup::default());
    for domain in [0, 1, u32::MAX] {
        assert_eq!(rig.send(&request::map(domain, 0, 0xfff, 0x9000)), Status::NoEnt);
        assert_eq!(rig.send(&request::attach(domain, 8)), Status::Ok);
        assert_eq!(rig.send(&request::map(domain, 0, 0xfff, 0x9000)), Status::Ok);
        assert_eq!((rig.machine.read(8, 0), rig.machine.write(8, 0xfff)), (Some(0x9000), Some(0x9fff)));
    }
    assert_eq!(rig.machine.lock().device().domain_count(), 1);
    rig.works();
}
