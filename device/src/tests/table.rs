//! ATTACH_TABLE and INVALIDATE.

use alloc::format;

use pgtable_formats::context::Canonical;
use pgtable_formats::context::smmuv3::{Caps, IdRegisters};

use super::*;
use crate::Limits;
use crate::host::{HostError, Invalidation, Scope, TableCaps};

const BASE: u64 = 0x4000_0000;

fn bound(device: &Device<TestHost>, endpoint: u32, value: Option<u32>) -> Option<&'static str> {
    device.host.bound_to(Stream { endpoint: EndpointId(endpoint), pasid: value.map(pasid) })
}

fn invalidate(domain: u32, scope: InvalidateScope) -> Request {
    let domain = DomainId(domain);
    let (leaf, tag, global) = (true, Some(0x2a), false);
    Request::Invalidate(Invalidate { domain, scope, caches: Caches::TLB, leaf, tag, global })
}

/// What the host was asked to drop by the last request.
fn dropped(device: &mut Device<TestHost>) -> Vec<(u32, Scope)> {
    device.host.invalidations.drain(..).map(|done: Invalidation| (done.endpoint.0, done.scope)).collect()
}

#[test]
fn not_negotiated_is_unknown() {
    let mut device = device();
    device.accept_features(DeviceConfig::FEATURES - Features::ATTACH_TABLE).unwrap();
    for request in [table(1, 8, cd_table(BASE)), invalidate(1, InvalidateScope::Domain)] {
        let mut buffer = [0xee; 4];
        assert_eq!(device.handle(&request.encode(), &mut buffer).used, 0);
        assert_eq!(buffer, [0xee; 4]);
    }
}

#[test]
fn statuses() {
    let mut device = device();
    send(&mut device, &attach(1, 9));
    send(&mut device, &attach_bypass(2, 9));
    send(&mut device, &attach(1, 24));
    let before = observe(&device);
    let wide = TableDescriptor::VtdPageTable(VtdPageTable {
        pgd: Gpa(BASE),
        flags: 8,
        addr_width: 48,
        pasid: Pasid::ZERO,
    });
    for (request, expected) in [
        (table(3, 7, cd_table(BASE)), Status::NoEnt),
        (table(1, 8, cd_table(BASE)), Status::Inval),
        (table(2, 8, cd_table(BASE)), Status::Inval),
        (table(3, 24, cd_table(BASE)), Status::Unsupp),
        (table(3, 16, cd_table(BASE)), Status::Unsupp),
        (table(3, 8, page_table(BASE, 0)), Status::Unsupp),
        (table(3, 8, pasid_table(BASE)), Status::Unsupp),
        (table(3, 8, TableDescriptor::Other { format: 4 }), Status::Unsupp),
        (table(3, 8, TableDescriptor::Smmuv3 { ste0: BASE | 21 << 59, ste1: 0 }), Status::Unsupp),
        (table(3, 8, TableDescriptor::Smmuv3 { ste0: BASE | 3 << 4 | 10 << 59, ste1: 0 }), Status::Inval),
        (table(3, 8, cd_table(BASE + 0x40)), Status::Inval),
        (table(3, 16, page_table(BASE + 8, 0)), Status::Inval),
        (table(3, 16, wide), Status::Inval),
        (table(3, 8, unbind(5)), Status::Inval),
    ] {
        assert_eq!(send(&mut device, &request), expected, "{request:x?}");
        assert_eq!(observe(&device), before);
    }
    let mut pasid = table(3, 16, page_table(BASE, 0)).encode().to_vec();
    pasid[39] = 1;
    assert_eq!(raw(&mut device, &pasid), Status::Unsupp);
    for place in [13, 15, 40, 123] {
        let mut reserved = table(3, 16, page_table(BASE, 0)).encode().to_vec();
        reserved[place] = 1;
        assert_eq!(raw(&mut device, &reserved), Status::Inval);
    }
    for (error, expected) in [
        (HostError::Unsupported, Status::Unsupp),
        (HostError::BadAddress, Status::Inval),
        (HostError::NoMemory, Status::NoMem),
        (HostError::Failed(1), Status::DevErr),
    ] {
        device.host.fails = Fails::At(device.host.calls);
        device.host.error = Some(error);
        assert_eq!(send(&mut device, &table(3, 8, cd_table(BASE))), expected);
    }
    assert_eq!(observe(&device), before);
}

#[test]
fn a_table_domain_is_no_other() {
    let mut device = device();
    assert_eq!(send(&mut device, &table(1, 8, cd_table(BASE))), Status::Ok);
    let before = observe(&device);
    assert_eq!(send(&mut device, &attach(1, 9)), Status::Inval);
    assert_eq!(send(&mut device, &attach(1, 8)), Status::Inval);
    assert_eq!(send(&mut device, &attach_bypass(1, 9)), Status::Inval);
    assert_eq!(send(&mut device, &map(1, 0, 0)), Status::Inval); // D-34
    assert_eq!(send(&mut device, &unmap(1, 0, 0)), Status::Inval); // D-40
    assert_eq!(observe(&device), before);
    assert_eq!(send(&mut device, &detach(1, 8)), Status::Ok);
    assert_eq!(send(&mut device, &attach(1, 8)), Status::Ok);
    assert_eq!(device.host.live_spaces(), 1);
}

#[test]
fn a_replaced_table_leaves_nothing_cached() {
    let mut device = device();
    send(&mut device, &table(1, 8, cd_table(BASE)));
    dropped(&mut device);
    assert_eq!(send(&mut device, &table(1, 8, cd_table(BASE + 0x10000))), Status::Ok);
    assert_eq!(dropped(&mut device), [(8, Scope::Endpoint)]);
    assert_eq!(device.host.live_spaces(), 1);
    assert!(device.host.state().contains(&alloc::format!("{}", BASE + 0x10000)));
}

#[test]
fn endpoints_of_a_domain_have_tables_of_their_own() {
    let mut device = device();
    assert_eq!(send(&mut device, &table(1, 8, cd_table(BASE))), Status::Ok);
    assert_eq!(send(&mut device, &table(1, 9, cd_table(BASE + 0x10000))), Status::Ok);
    assert_eq!(send(&mut device, &table(1, 16, pasid_table(BASE))), Status::Ok);
    assert_eq!(device.domain_count(), 1);
    assert_eq!(device.host.live_spaces(), 3);
    dropped(&mut device);
    assert_eq!(send(&mut device, &invalidate(1, InvalidateScope::Domain)), Status::Ok);
    let everything = [(8, Scope::Endpoint), (9, Scope::Endpoint), (16, Scope::Endpoint)];
    assert_eq!(dropped(&mut device), everything);
}

#[test]
fn page_tables_live_side_by_side() {
    let mut device = device();
    for value in [5, 0, 7] {
        assert_eq!(send(&mut device, &table(1, 16, page_table(BASE, value))), Status::Ok);
    }
    assert_eq!(bound(&device, 16, None), Some("page table"), "PASID 0 serves untagged accesses");
    assert_eq!(bound(&device, 16, Some(5)), Some("page table"));
    assert_eq!(bound(&device, 16, Some(7)), Some("page table"));
    // Bound once more: replaced.
    assert_eq!(send(&mut device, &table(1, 16, page_table(BASE + 0x1000, 5))), Status::Ok);
    assert_eq!(send(&mut device, &table(1, 16, page_table(BASE + 0x1000, 0))), Status::Ok);
    assert_eq!(device.host.live_spaces(), 3);
    // A PASID table replaces them all, and the reverse.
    assert_eq!(send(&mut device, &table(1, 16, pasid_table(BASE))), Status::Ok);
    assert_eq!(device.host.live_spaces(), 1);
    assert_eq!(bound(&device, 16, None), Some("PASID table"));
    assert_eq!(bound(&device, 16, Some(5)), None);
    assert_eq!(send(&mut device, &table(1, 16, page_table(BASE, 5))), Status::Ok);
    assert_eq!(device.host.live_spaces(), 1);
    assert_eq!(bound(&device, 16, None), None);
    assert_eq!(bound(&device, 16, Some(5)), Some("page table"));
}

#[test]
fn unbinding() {
    let mut device = device();
    for value in [0, 5] {
        send(&mut device, &table(1, 16, page_table(BASE, value)));
    }
    send(&mut device, &table(1, 17, pasid_table(BASE)));
    for (request, expected) in [
        (table(1, 7, unbind(5)), Status::NoEnt),
        (table(2, 16, unbind(5)), Status::Inval),
        (table(1, 16, unbind(6)), Status::NoEnt),
        (table(1, 17, unbind(0)), Status::NoEnt),
        (table(1, 17, unbind(5)), Status::NoEnt),
        (table(1, 16, unbind(5)), Status::Ok),
        (table(1, 16, unbind(5)), Status::NoEnt),
        (table(1, 16, unbind(0)), Status::Ok),
        (table(1, 16, unbind(0)), Status::NoEnt),
    ] {
        assert_eq!(send(&mut device, &request), expected, "{request:?}");
    }
    assert_eq!(device.host.live_spaces(), 1);
    assert_eq!(send(&mut device, &detach(1, 16)), Status::Ok, "it stayed in the domain");
}

#[test]
fn another_domain_takes_the_endpoint_as_after_a_detach() {
    let mut device = device();
    for value in [0, 5, 6] {
        send(&mut device, &table(1, 16, page_table(BASE, value)));
    }
    assert_eq!(send(&mut device, &table(2, 16, page_table(BASE, 5))), Status::Ok); // D-22
    assert_eq!(device.domain_count(), 1);
    assert_eq!(device.host.live_spaces(), 1);
    assert_eq!(bound(&device, 16, Some(5)), Some("page table"));
    assert_eq!(bound(&device, 16, Some(6)), None); // D-28
    send(&mut device, &attach(3, 16));
    assert_eq!(bound(&device, 16, Some(5)), None);
    assert_eq!(bound(&device, 16, None), Some("mapped"));
    assert_eq!(send(&mut device, &table(2, 16, page_table(BASE, 5))), Status::Ok);
    assert_eq!(bound(&device, 16, None), None);
    assert_eq!(device.host.live_spaces(), 1);
}

#[test]
fn bound_pasids_are_limited() {
    let limits = Limits { max_bound_pasids_per_endpoint: 2, max_bound_pasids: 3, ..Limits::default() };
    let mut device = device_with(DeviceConfig { limits, ..DeviceConfig::default() });
    for (request, expected) in [
        (table(1, 16, page_table(BASE, 0)), Status::Ok),
        (table(1, 16, page_table(BASE, 1)), Status::Ok),
        (table(1, 16, page_table(BASE, 2)), Status::NoMem),
        (table(1, 16, page_table(BASE + 0x1000, 0)), Status::Ok),
        (table(1, 16, page_table(BASE + 0x1000, 1)), Status::Ok),
        (table(1, 17, page_table(BASE, 2)), Status::Ok),
        (table(1, 17, page_table(BASE, 3)), Status::NoMem),
        (table(2, 16, page_table(BASE, 2)), Status::Ok), // leaves two others behind
        (table(1, 17, page_table(BASE, 3)), Status::Ok),
        (table(1, 17, unbind(2)), Status::Ok),
        (table(2, 16, page_table(BASE, 3)), Status::Ok),
    ] {
        assert_eq!(send(&mut device, &request), expected, "{request:?}");
    }
}

#[test]
fn invalidate_statuses() {
    let mut device = device();
    send(&mut device, &attach(1, 8));
    send(&mut device, &attach_bypass(2, 9));
    assert_eq!(send(&mut device, &invalidate(1, InvalidateScope::Domain)), Status::Inval);
    assert_eq!(send(&mut device, &invalidate(2, InvalidateScope::Domain)), Status::Inval);
    assert_eq!(send(&mut device, &invalidate(3, InvalidateScope::Domain)), Status::NoEnt);
    send(&mut device, &table(3, 16, pasid_table(BASE)));
    let good = invalidate(3, InvalidateScope::Domain).encode().to_vec();
    assert_eq!(raw(&mut device, &good), Status::Ok);
    for (place, value) in [(4, 0), (4, 4), (5, 0), (5, 4), (6, 16), (41, 1), (59, 1)] {
        let mut bad = good.clone();
        bad[place] = value;
        assert_eq!(raw(&mut device, &bad), Status::Inval, "byte {place}");
    }
}

#[test]
fn scopes() {
    let mut device = device();
    let pages = range(0x1000, 0x2fff);
    let address = |pasid| InvalidateScope::Address { pasid, range: pages, page_lg2: 12 };
    let ranged = |pasid| Scope::Range { pasid, range: pages, page_lg2: 12 };
    send(&mut device, &table(1, 8, cd_table(BASE)));
    for value in [0, 5] {
        send(&mut device, &table(1, 16, page_table(BASE, value)));
    }
    send(&mut device, &table(1, 17, page_table(BASE, 6)));
    dropped(&mut device);
    let (zero, five) = (Some(Pasid::ZERO), Some(pasid(5)));
    for (scope, expected) in [
        (InvalidateScope::Domain, vec![(8, Scope::Endpoint), (16, Scope::Endpoint), (17, Scope::Endpoint)]),
        (InvalidateScope::Pasid(five), vec![(8, Scope::Pasid(five)), (16, Scope::Pasid(five))]),
        (
            InvalidateScope::Pasid(None),
            // A tag by itself may be that of any page table.
            vec![(8, Scope::Pasid(None)), (16, Scope::Endpoint), (17, Scope::Endpoint)],
        ),
        (
            InvalidateScope::Pasid(zero),
            vec![(8, Scope::Pasid(zero)), (16, Scope::Pasid(None)), (16, Scope::Pasid(zero))],
        ),
        (address(five), vec![(8, ranged(five)), (16, ranged(five))]),
    ] {
        assert_eq!(send(&mut device, &invalidate(1, scope)), Status::Ok);
        assert_eq!(dropped(&mut device), expected);
    }
    // Words pass unchanged; a tag that does not fit narrows nothing.
    send(&mut device, &table(2, 9, cd_table(BASE)));
    dropped(&mut device);
    send(&mut device, &invalidate(2, InvalidateScope::Domain));
    let (endpoint, scope, caches) = (EndpointId(9), Scope::Endpoint, Caches::TLB);
    let exact = Invalidation { endpoint, scope, caches, leaf: true, tag: Some(0x2a), global: false };
    assert_eq!(device.host.invalidations.pop(), Some(exact));
    let mut tag = invalidate(2, InvalidateScope::Domain).encode().to_vec();
    tag[18] = 1;
    assert_eq!(raw(&mut device, &tag), Status::Ok);
    assert_eq!(device.host.invalidations.pop(), Some(Invalidation { tag: None, ..exact }));
}

/// A tag alone, without a PASID, is about every PASID that has it; one that does not fit cannot narrow that.
#[test]
fn a_tag_that_does_not_fit_is_about_every_pasid() {
    let mut device = device();
    send(&mut device, &table(1, 8, cd_table(BASE)));
    dropped(&mut device);
    let range = range(0x1000, 0x2fff);
    for scope in [InvalidateScope::Pasid(None), InvalidateScope::Address { pasid: None, range, page_lg2: 12 }]
    {
        let mut request = invalidate(1, scope).encode().to_vec();
        request[18] = 1;
        assert_eq!(raw(&mut device, &request), Status::Ok);
        assert_eq!(dropped(&mut device), [(8, Scope::Endpoint)], "{scope:?}");
    }
}

/// Global translations are those of the domain, whichever endpoint has the PASID that is named.
#[test]
fn global_translations_go_at_endpoints_without_the_pasid() {
    let mut device = device();
    send(&mut device, &table(1, 16, page_table(BASE, 5)));
    send(&mut device, &table(1, 17, page_table(BASE, 6)));
    dropped(&mut device);
    let five = Some(pasid(5));
    let mut request = invalidate(1, InvalidateScope::Pasid(five)).encode().to_vec();
    assert_eq!(raw(&mut device, &request), Status::Ok);
    assert_eq!(dropped(&mut device), [(16, Scope::Pasid(five))]);
    request[6] |= 1 << 3;
    assert_eq!(raw(&mut device, &request), Status::Ok);
    assert_eq!(dropped(&mut device), [(16, Scope::Pasid(five)), (17, Scope::Endpoint)]);
}

#[test]
fn a_host_without_resources_is_nomem() {
    for (error, expected) in [(HostError::NoMemory, Status::NoMem), (HostError::Unsupported, Status::DevErr)]
    {
        let mut device = device();
        assert_eq!(send(&mut device, &table(1, 8, cd_table(BASE))), Status::Ok);
        device.host.error = Some(error);
        device.host.fails = Fails::Always;
        assert_eq!(send(&mut device, &invalidate(1, InvalidateScope::Domain)), expected);
    }
}

/// A driver that attaches and never detaches keeps one table alive, whatever it attaches.
#[test]
fn a_flood_of_tables_leaves_one() {
    let mut device = device();
    let live = device.host.live_spaces();
    for round in 0..2000 {
        let base = BASE + ((round % 64) << 16);
        let domain = u32::try_from(round % 3).unwrap() + 1;
        let tables = [cd_table(base), TableDescriptor::Smmuv3 { ste0: base | 3 << 59, ste1: 1 }];
        assert_eq!(send(&mut device, &table(domain, 8, tables[usize::from(round % 2 == 0)])), Status::Ok);
        let tables = [pasid_table(base), page_table(base, 0), page_table(base, 5)];
        let of_16 = tables[usize::try_from(round % 7).unwrap() % 3];
        assert_eq!(send(&mut device, &table(domain + 10, 16, of_16)), Status::Ok);
        assert!(device.host.live_spaces() <= live + 3, "{round}");
        assert!(device.domain_count() <= 2);
    }
    assert_eq!(device.host.bound_streams(), device.host.live_spaces() - live);
    device.reset();
    assert_eq!((device.host.live_spaces(), device.host.bound_streams()), (live, 0));
    consistent(&device);
}

/// ATS is turned on and off by attaching the same table with another EATS.
#[test]
fn a_flip_of_eats_reaches_the_host() {
    let mut device = device();
    let before = device.host.live_spaces();
    for (eats, ats) in [(0, false), (1, true), (0, false), (2, true), (1, true)] {
        let bits = TableDescriptor::Smmuv3 { ste0: BASE | 10 << 59, ste1: 2 | eats << 28 };
        assert_eq!(send(&mut device, &table(1, 8, bits)), Status::Ok);
        assert!(device.host.state().contains(&format!("ats: {ats}")), "{}", device.host.state());
        assert_eq!(device.host.live_spaces(), before + 1);
    }
}

/// The software MMU has these, and PROBE does not tell: a page table that uses them is refused, a PASID table is judged
/// without them.
#[test]
fn tables_are_judged_by_what_probe_tells() {
    let registers = IdRegisters { idr0: IdRegisters::SOFTWARE.idr0 | 2 << 6, ..IdRegisters::SOFTWARE };
    let all = Caps::from_registers(registers);
    assert!(all.httu == 2 && all.had, "or this says nothing");
    let host = TestHost::default().with(8, Some(TableCaps::Smmuv3(all)), vec![]);
    let mut device = Device::new(DeviceConfig::default(), host).unwrap();
    device.accept_features(device.offered_features()).unwrap();
    assert_eq!(send(&mut device, &table(1, 8, cd_table(BASE))), Status::Ok);
    let Some(Canonical::Smmuv3(bound)) = device.host.table_of(Stream::untagged(EndpointId(8))) else {
        panic!("no table")
    };
    assert_eq!((bound.caps().httu, bound.caps().had), (0, false));
    let page_table = |tcr| {
        let (pasid, ttbr0) = (pasid(5), BASE);
        let arm = ArmPageTable { pasid, asid: 1, tcr, ttbr0, ttbr1: 0, mair: 0xff };
        table(1, 8, TableDescriptor::ArmPageTable(arm))
    };
    // 48 bits of address, no upper half; with TCR.HA or TCR.HPD0 besides.
    let plain = 1 << 23 | 16;
    for (tcr, expected) in
        [(plain, Status::Ok), (plain | 1 << 39, Status::Unsupp), (plain | 1 << 41, Status::Unsupp)]
    {
        assert_eq!(send(&mut device, &page_table(tcr)), expected, "{tcr:#x}");
    }
}

#[test]
fn an_invalidation_that_stops_is_widened() {
    let mut device = device();
    for endpoint in [8, 9] {
        send(&mut device, &table(1, endpoint, cd_table(BASE)));
    }
    dropped(&mut device);
    let five = Some(pasid(5));
    device.host.stops.extend([1]);
    assert_eq!(send(&mut device, &invalidate(1, InvalidateScope::Pasid(five))), Status::Ok);
    assert_eq!(dropped(&mut device), [(8, Scope::Pasid(five)), (9, Scope::Endpoint)]);
    device.host.stops.extend([1, 0]);
    assert_eq!(send(&mut device, &invalidate(1, InvalidateScope::Pasid(five))), Status::DevErr);
    assert_eq!(dropped(&mut device), [(8, Scope::Pasid(five))]);
}
