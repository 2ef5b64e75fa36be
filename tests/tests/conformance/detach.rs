//! DETACH: D-25 to D-29.

use viommu_device::DeviceConfig;
use viommu_tests::rig::{Memory, Rig, Sends, Setup, request};
use viommu_wire::Status;
use vm_memory::{Bytes, GuestAddress};

/// Endpoints 8 and 9 in domain 1 with one mapping; endpoint 17 in the bypass domain 2.
fn rig() -> Rig {
    let mut rig = Rig::new(Setup::default());
    assert_eq!(rig.send(&request::attach(1, 8)), Status::Ok);
    assert_eq!(rig.send(&request::attach(1, 9)), Status::Ok);
    assert_eq!(rig.send(&request::map(1, 0x1000, 0x1fff, Memory::page(5).0)), Status::Ok);
    assert_eq!(rig.send(&request::attach_bypass(2, 17)), Status::Ok);
    rig
}

#[test]
fn d25_detach_reserved_is_ignored() {
    let mut rig = rig();
    let mut bytes = request::detach(1, 8).encode().to_vec();
    bytes[12..20].fill(0xff);
    assert_eq!(rig.send_bytes(&bytes), Status::Ok);
    assert_eq!(rig.machine.read(8, 0x1000), None);
    rig.works();
}

#[test]
fn d26_detach_of_an_unknown_endpoint_is_noent() {
    let mut rig = rig();
    for endpoint in [0, 7, 10, u32::MAX] {
        for domain in [1, 99] {
            rig.refuse(&request::detach(domain, endpoint).encode(), Status::NoEnt);
        }
    }
}

#[test]
fn d27_detach_from_another_domain_is_inval() {
    let mut rig = rig();
    for (domain, endpoint) in [(2, 8), (99, 8), (1, 17), (1, 16), (99, 16)] {
        rig.refuse(&request::detach(domain, endpoint).encode(), Status::Inval);
    }
}

#[test]
fn d28_after_detach_no_mapping_of_the_domain_can_be_used() {
    let mut rig = rig();
    let dma = rig.machine.dma(8, None);
    dma.write_slice(&[0x11; 8], GuestAddress(0x1000)).unwrap();
    // Translations that are cached do not outlive it.
    assert!(rig.machine.read(8, 0x1000).is_some());
    assert_eq!(rig.send(&request::detach(1, 8)), Status::Ok);
    assert!(dma.write_slice(&[0x22; 8], GuestAddress(0x1000)).is_err());
    assert!(dma.read_slice(&mut [0; 8], GuestAddress(0x1000)).is_err());
    let mut bytes = [0; 8];
    rig.machine.memory().map().read_slice(&mut bytes, GuestAddress(Memory::page(5).0)).unwrap();
    assert_eq!(bytes, [0x11; 8]);
    // Its neighbour still can.
    assert_eq!(rig.machine.read(9, 0x1000), Some(Memory::page(5).0));

    assert_eq!(rig.send(&request::detach(2, 17)), Status::Ok);
    assert_eq!(rig.machine.read(17, 0x1000), None);
    rig.works();
}

#[test]
fn d29_a_domain_without_endpoints_is_gone() {
    let mut rig = rig();
    assert_eq!(rig.send(&request::detach(1, 8)), Status::Ok);
    assert_eq!(rig.send(&request::map(1, 0x2000, 0x2fff, 0)), Status::Ok, "endpoint 9 is still there");
    assert_eq!(rig.send(&request::detach(1, 9)), Status::Ok);
    for request in [request::map(1, 0x2000, 0x2fff, 0), request::unmap(1, 0x1000, 0x1fff)] {
        rig.refuse(&request.encode(), Status::NoEnt);
    }
    {
        let iommu = rig.machine.lock();
        assert_eq!((iommu.device().domain_count(), iommu.device().mapping_count()), (1, 0));
    }
    // The ID starts afresh, with another kind even.
    assert_eq!(rig.send(&request::attach(1, 8)), Status::Ok);
    assert_eq!(rig.machine.read(8, 0x1000), None);
    assert_eq!(rig.send(&request::map(1, 0x1000, 0x1fff, 0xb000)), Status::Ok);
    assert_eq!(rig.send(&request::detach(1, 8)), Status::Ok);
    assert_eq!(rig.send(&request::attach_bypass(1, 8)), Status::Ok);
    assert_eq!(rig.machine.read(8, 0x1000), Some(0x1000));
}

#[test]
fn d29_a_detached_endpoint_is_in_bypass_where_unattached_ones_are() {
    let config = DeviceConfig { bypass: true, ..DeviceConfig::default() };
    let mut rig = Rig::new(Setup { config, ..Setup::default() });
    assert_eq!(rig.send(&request::attach(1, 8)), Status::Ok);
    assert_eq!(rig.machine.read(8, 0x3000), None);
    assert_eq!(rig.send(&request::detach(1, 8)), Status::Ok);
    assert_eq!(rig.machine.read(8, 0x3000), Some(0x3000));
}
