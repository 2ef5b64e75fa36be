//! What holds for every request: D-9 to D-16, and parts that are cut, short or long.

use pgtable_formats::format::Attrs;
use viommu_device::{DeviceConfig, DomainRange, Features};
use viommu_tests::rig::{Bare, Memory, Rig, Sends, Setup, UNWRITTEN, request, smmuv3};
use viommu_tests::tables::{PageTable, PasidTable};
use viommu_wire::{
    Caches, Config, DomainId, Invalidate, InvalidateScope, Iova, IovaRange, Request, RequestType, Status,
    Tail,
};

fn invalidate(domain: u32) -> Request {
    Request::Invalidate(Invalidate {
        domain: DomainId(domain),
        scope: InvalidateScope::Domain,
        caches: Caches::all(),
        leaf: false,
        tag: None,
        global: false,
    })
}

/// A rig in which domain 1 has endpoint 8 and one mapping, and domain 2 endpoint 9 and a table; and requests of every
/// type that succeed in this order.
fn busy() -> (Rig, Vec<Request>) {
    let mut rig = Rig::new(Setup::default());
    let table = PasidTable::new(&smmuv3(), 4, rig.alloc());
    let pages = PageTable::new(&smmuv3(), 1, rig.alloc());
    pages.map(rig.alloc(), 0x1000, 0x9000, 0x1000, Attrs::READ_WRITE);
    table.set(rig.alloc(), 0, &pages);
    assert_eq!(rig.send(&request::attach(1, 8)), Status::Ok);
    assert_eq!(rig.send(&request::map(1, 0x1000, 0x1fff, 0x5000)), Status::Ok);
    assert_eq!(rig.send(&request::attach_table(2, 9, table.descriptor())), Status::Ok);
    assert_eq!((rig.machine.read(8, 0x1000), rig.machine.read(9, 0x1000)), (Some(0x5000), Some(0x9000)));
    let requests = vec![
        request::attach(1, 16),
        request::map(1, 0x2000, 0x2fff, 0x6000),
        request::unmap(1, 0x2000, 0x2fff),
        request::detach(1, 16),
        request::probe(8),
        request::attach_table(3, 9, table.descriptor()),
        invalidate(3),
    ];
    (rig, requests)
}

fn writable_len(request: &Request) -> usize {
    match request {
        Request::Probe(_) => DeviceConfig::default().probe_size as usize + Tail::LEN,
        _ => Tail::LEN,
    }
}

#[test]
fn d9_success_is_status_ok() {
    let (mut rig, requests) = busy();
    for request in requests {
        let reply = rig.raw(&request.encode(), writable_len(&request));
        assert_eq!((reply.used, reply.status()), (writable_len(&request), Some(Status::Ok)), "{request:?}");
    }
    rig.works();
}

#[test]
fn d10_unknown_types_come_back_unwritten() {
    let (mut rig, _) = busy();
    for kind in (0..=u8::MAX).filter(|&kind| RequestType::from_number(kind).is_none()) {
        let mut bytes = [0; 128];
        bytes[0] = kind;
        let reply = rig.raw(&bytes, 64);
        assert!(reply.is_unwritten(), "type {kind}: {reply:02x?}");
    }
    let mut bytes = [0; 128];
    bytes[0] = 9;
    rig.leave_unwritten(&bytes, 4);
    rig.leave_unwritten(&[0; 20], 4);
}

#[test]
fn d10_types_that_were_not_negotiated_are_unknown() {
    let mut rig = Rig::new(Setup::accepting(DeviceConfig::FEATURES - Features::ATTACH_TABLE));
    for request in [request::attach_table(1, 8, request::cd_table(Memory::page(16), 4)), invalidate(1)] {
        rig.leave_unwritten(&request.encode(), 4);
    }
    let mut response = [0; 28];
    response[0] = 8;
    rig.leave_unwritten(&response, 4);
    // The type alone decides: what is in the request is not looked at.
    rig.leave_unwritten(&[6, 0, 0, 0], 4);
}

#[test]
fn d10_the_device_itself_leaves_every_byte_as_it_was() {
    let (mut bare, _) = Bare::new(&Setup::default());
    for readable in [&[0; 20][..], &[9; 124], &[8; 28], &[1, 0, 0], &[]] {
        for writable in [0, 3, 4, 516] {
            assert!(bare.raw(readable, writable).is_unwritten(), "{readable:02x?} {writable}");
        }
    }
}

#[test]
fn d11_without_a_head_the_request_comes_back_unwritten() {
    let (mut rig, _) = busy();
    for length in 1..4 {
        rig.leave_unwritten(&[3, 0, 0][..length], 4);
    }
    let reply = rig.raw_parts(&[], &[4]);
    assert!(reply.is_unwritten());
    rig.works();
}

#[test]
fn d11_without_room_for_a_tail_the_request_comes_back_unwritten_and_undone() {
    let (mut rig, requests) = busy();
    for request in requests {
        for writable in 0..Tail::LEN {
            rig.leave_unwritten(&request.encode(), writable);
        }
    }
}

#[test]
fn d11_too_short_for_its_type_is_inval_and_undone() {
    let (mut rig, requests) = busy();
    for request in requests {
        let bytes = request.encode();
        for length in [4, 5, bytes.len() / 2, bytes.len() - 1] {
            let before = rig.machine.snapshot();
            let reply = rig.raw(&bytes[..length], writable_len(&request));
            assert_eq!(reply.used, writable_len(&request), "the whole writable part");
            assert_eq!(reply.status(), Some(Status::Inval), "{request:?} of {length} bytes");
            assert_eq!(rig.machine.snapshot(), before);
        }
    }
    rig.works();
}

#[test]
fn d11_bytes_behind_the_request_are_ignored() {
    let (mut rig, requests) = busy();
    for request in requests {
        let mut bytes = request.encode().to_vec();
        bytes.extend([0xff; 300]);
        let reply = rig.raw(&bytes, writable_len(&request));
        assert_eq!(reply.status(), Some(Status::Ok), "{request:?}");
    }
    rig.works();
}

#[test]
fn d11_a_longer_writable_part_is_written_at_its_start_only() {
    let (mut rig, requests) = busy();
    for request in requests {
        let length = writable_len(&request);
        let reply = rig.raw(&request.encode(), length + 37);
        assert_eq!((reply.used, reply.status()), (length, Some(Status::Ok)), "{request:?}");
        assert!(reply.bytes[length..].iter().all(|&byte| byte == UNWRITTEN), "{request:?}");
    }
    rig.works();
}

#[test]
fn d11_a_request_may_be_cut_anywhere() {
    let (mut rig, requests) = busy();
    for request in &requests {
        let bytes = request.encode();
        let readable: Vec<&[u8]> = bytes.chunks(1).collect();
        let length = writable_len(request);
        // A PROBE has more bytes than a chain may have descriptors.
        let writable: Vec<usize> = if length == 4 { vec![1; 4] } else { vec![1, 2, 3, length - 9, 1, 1, 1] };
        let reply = rig.raw_parts(&readable, &writable);
        assert_eq!((reply.used, reply.status()), (length, Some(Status::Ok)), "{request:?}");
    }
    let (mut rig, requests) = busy();
    for request in &requests {
        let bytes = request.encode();
        let (first, second) = bytes.split_at(bytes.len() / 2 - 1);
        let reply = rig.raw_parts(&[first, second], &[1, writable_len(request) - 1]);
        assert_eq!(reply.status(), Some(Status::Ok), "{request:?}");
    }
    rig.works();
}

#[test]
fn d12_reserved_bytes_of_the_head_are_ignored() {
    let (mut rig, requests) = busy();
    for request in requests {
        let mut bytes = request.encode().to_vec();
        bytes[1..4].fill(0xff);
        let reply = rig.raw(&bytes, writable_len(&request));
        assert_eq!(reply.status(), Some(Status::Ok), "{request:?}");
    }
    rig.works();
}

#[test]
fn d13_reserved_bytes_of_the_tail_are_zero() {
    let (mut rig, requests) = busy();
    let refused = [request::attach(1, 99), request::map(1, 0x1000, 0x1fff, 0), request::unmap(9, 0, 0xfff)];
    for request in requests.into_iter().chain(refused).chain([request::map(1, 1, 2, 3)]) {
        let reply = rig.raw(&request.encode(), writable_len(&request));
        let tail = reply.used - Tail::LEN;
        assert_eq!(reply.bytes[tail + 1..reply.used], [0; 3], "{request:?}");
    }
}

#[test]
fn d14_unattached_endpoints_that_are_not_in_bypass_reach_nothing() {
    let mut rig = Rig::new(Setup::default());
    let target = Memory::page(3);
    rig.machine.memory().store(target, 0x1111);
    for endpoint in [8, 16, 24, 25] {
        for pasid in [None, Some(0), Some(3)] {
            use vm_memory::{Bytes, GuestAddress};
            let dma = rig.machine.dma(endpoint, pasid);
            assert!(dma.write_slice(&[0xff; 8], GuestAddress(target.0)).is_err());
            assert!(dma.read_slice(&mut [0; 8], GuestAddress(target.0)).is_err());
        }
    }
    use pgtable_formats::TableMem;
    assert_eq!(rig.machine.memory().load(target), Ok(0x1111));
    // Attached and detached again it is the same.
    assert_eq!(rig.send(&request::attach_bypass(1, 8)), Status::Ok);
    assert_eq!(rig.machine.write(8, target.0), Some(target.0));
    assert_eq!(rig.send(&request::detach(1, 8)), Status::Ok);
    assert_eq!(rig.machine.write(8, target.0), None);
}

#[test]
fn d15_map_outside_the_input_range_fails() {
    let input_range = IovaRange::new(Iova(0x4000), Iova(0xffff)).unwrap();
    let config = DeviceConfig { input_range, ..DeviceConfig::default() };
    let mut rig = Rig::new(Setup { config, ..Setup::default() });
    assert_eq!(rig.send(&request::attach(1, 16)), Status::Ok);
    for (start, last) in [
        (0, 0xfff),
        (0x3000, 0x3fff),
        (0x3000, 0x4fff),
        (0xf000, 0x1_0fff),
        (0x1_0000, 0x1_0fff),
        (0, u64::MAX),
    ] {
        let before = rig.machine.snapshot();
        assert_eq!(rig.send(&request::map(1, start, last, 0)), Status::Range, "{start:#x}-{last:#x}");
        assert_eq!(rig.machine.snapshot(), before);
    }
    assert_eq!(rig.send(&request::map(1, 0x4000, 0xffff, 0x5000)), Status::Ok);
    assert_eq!(rig.machine.read(16, 0xffff), Some(0x1_0fff));
}

#[test]
fn d15_unmap_outside_the_input_range_finds_nothing_there() {
    let input_range = IovaRange::new(Iova(0x4000), Iova(0xffff)).unwrap();
    let config = DeviceConfig { input_range, ..DeviceConfig::default() };
    let mut rig = Rig::new(Setup { config, ..Setup::default() });
    assert_eq!(rig.send(&request::attach(1, 16)), Status::Ok);
    assert_eq!(rig.send(&request::map(1, 0x4000, 0x4fff, 0x5000)), Status::Ok);
    assert_eq!(rig.send(&request::unmap(1, 0x2_0000, 0x2_ffff)), Status::Ok);
    assert_eq!(rig.machine.read(16, 0x4000), Some(0x5000));
    assert_eq!(rig.send(&request::unmap(1, 0, u64::MAX)), Status::Ok);
    assert_eq!(rig.machine.read(16, 0x4000), None);
}

#[test]
fn d16_a_unattached_endpoints_are_in_bypass_where_the_field_says_so() {
    let config = DeviceConfig { bypass: true, ..DeviceConfig::default() };
    // Offered is enough: the driver need not have accepted it.
    for accept in
        [DeviceConfig::FEATURES, DeviceConfig::FEATURES - Features::BYPASS_CONFIG, Features::empty()]
    {
        let setup = Setup { config: config.clone(), accept: Some(accept), ..Setup::default() };
        let mut rig = Rig::new(setup);
        for endpoint in [8, 16] {
            assert_eq!(rig.machine.read(endpoint, 0x1234), Some(0x1234));
            assert_eq!(rig.machine.write(endpoint, Memory::BASE), Some(Memory::BASE));
            assert_eq!(
                rig.machine.read_with(endpoint, 7, 0x1234),
                Some(0x1234),
                "every access, tagged ones too"
            );
        }
        assert_eq!(rig.send(&request::attach(1, 8)), Status::Ok);
        assert_eq!((rig.machine.read(8, 0x1234), rig.machine.read(16, 0x1234)), (None, Some(0x1234)));
        assert_eq!(rig.send(&request::detach(1, 8)), Status::Ok);
        assert_eq!(rig.machine.read(8, 0x1234), Some(0x1234));
    }
}

#[test]
fn d16_a_before_a_driver_comes_bypass_holds_already() {
    let config = DeviceConfig { bypass: true, ..DeviceConfig::default() };
    let machine = viommu_tests::rig::Machine::new(Setup { config, ..Setup::default() });
    assert_eq!(machine.write(8, 0x1234), Some(0x1234));
    machine.lock().reset();
    assert_eq!(machine.write(8, 0x1234), Some(0x1234));
}

#[test]
fn d16_a_a_change_of_the_field_moves_unattached_endpoints_only() {
    let mut rig = Rig::new(Setup::default());
    assert_eq!(rig.send(&request::attach(1, 8)), Status::Ok);
    assert_eq!(rig.send(&request::map(1, 0x1000, 0x1fff, 0x5000)), Status::Ok);
    for (value, unattached) in [(1, Some(0x2000)), (0, None)] {
        rig.machine.lock().device_mut().write_config(Config::BYPASS_OFFSET, &[value]).unwrap();
        assert_eq!((rig.machine.read(8, 0x1000), rig.machine.read(8, 0x2000)), (Some(0x5000), None));
        assert_eq!(rig.machine.read(9, 0x2000), unattached);
    }
}

#[test]
fn d16_b_endpoints_of_a_bypass_domain_are_in_bypass() {
    let mut rig = Rig::new(Setup::default());
    for endpoint in [8, 16] {
        assert_eq!(rig.send(&request::attach_bypass(1, endpoint)), Status::Ok);
        assert_eq!(rig.machine.read(endpoint, 0x1234), Some(0x1234));
        assert_eq!(rig.machine.write(endpoint, u64::MAX), Some(u64::MAX));
        assert_eq!(rig.machine.read_with(endpoint, 9, 0x1234), Some(0x1234));
    }
    assert_eq!(rig.machine.read(9, 0x1234), None);
}

#[test]
fn d16_c_the_old_feature_is_not_offered_so_it_opens_nothing() {
    let rig = Rig::new(Setup::default());
    let accepted = rig.machine.lock().device_mut().accept_features(Features::BYPASS);
    assert!(accepted.is_err());
    assert_eq!(rig.machine.read(8, 0x1234), None);
}

#[test]
fn domain_ids_outside_the_range_are_refused() {
    let domain_range = DomainRange::new(DomainId(3), DomainId(100)).unwrap();
    let config = DeviceConfig { domain_range, ..DeviceConfig::default() };
    let mut rig = Rig::new(Setup { config, ..Setup::default() });
    for domain in [0, 2, 101, u32::MAX] {
        rig.refuse(&request::attach(domain, 8).encode(), Status::Range);
        rig.refuse(&request::attach_bypass(domain, 8).encode(), Status::Range);
    }
    for domain in [3, 100] {
        assert_eq!(rig.send(&request::attach(domain, 8)), Status::Ok);
    }
}

#[test]
fn a_batch_is_answered_with_one_notification_in_order() {
    let mut rig = Rig::new(Setup::default());
    assert_eq!(rig.send(&request::attach(1, 8)), Status::Ok);
    for page in 0..100u64 {
        rig.add(&[&request::map(1, page << 12, (page << 12) + 0xfff, page << 12).encode()], &[4]);
    }
    rig.add(&[&request::map(1, 0, 0xfff, 0).encode()], &[4]);
    let replies = rig.kick();
    assert!(replies[..100].iter().all(|reply| reply.status() == Some(Status::Ok)));
    assert_eq!(replies[100].status(), Some(Status::Inval));
    assert_eq!(rig.machine.read(8, 99 << 12), Some(99 << 12));
}
