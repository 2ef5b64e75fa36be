//! ATTACH_TABLE, and PROBE and events of the handover.

use pgtable_formats::format::Attrs;
use pgtable_formats::{AccessKind, TableMem};
use viommu_device::host::{EndpointCaps, FaultCause, HostError, TableCaps, TableKinds};
use viommu_device::{DeviceConfig, Features, Gpa, Limits};
use viommu_tests::rig::{Bare, Call, Flaky, Memory, Rig, Sends, Setup, request, smmuv3, vtd};
use viommu_tests::tables::{PageTable, PasidTable};
use viommu_wire::{
    Caches, DomainId, Event, Invalidate, InvalidateScope, Pasid, Properties, Property, Request, Status,
    TableDescriptor,
};

/// IOVA 0x1000, one page, to page `to` of memory.
fn pages(rig: &mut Rig, caps: &TableCaps, asid: u16, to: u64) -> PageTable {
    let table = PageTable::new(caps, asid, rig.alloc());
    table.map(rig.alloc(), 0x1000, Memory::page(to).0, 0x1000, Attrs::READ_WRITE);
    table
}

/// A PASID table in which PASID 0 leads 0x1000 to page `to`, and PASID 5 to page `to + 1`.
fn pasids(rig: &mut Rig, caps: &TableCaps, to: u64) -> PasidTable {
    let table = PasidTable::new(caps, 4, rig.alloc());
    for (pasid, page) in [(0, to), (5, to + 1)] {
        let pages = pages(rig, caps, page as u16, page);
        table.set(rig.alloc(), pasid, &pages);
    }
    table
}

fn bind(domain: u32, endpoint: u32, table: &PasidTable) -> Request {
    request::attach_table(domain, endpoint, table.descriptor())
}

/// Where untagged DMA and PASID 5 of an endpoint lead.
fn leads(rig: &Rig, endpoint: u32) -> (Option<u64>, Option<u64>) {
    let page = |address: u64| (address - Memory::BASE) >> 12;
    (rig.machine.read(endpoint, 0x1000).map(page), rig.machine.read_with(endpoint, 5, 0x1000).map(page))
}

/// Both architectures: capabilities and two endpoints.
fn architectures() -> [(TableCaps, u32, u32); 2] {
    [(smmuv3(), 8, 9), (vtd(), 16, 17)]
}

#[test]
fn x1_without_the_feature_the_types_are_unknown() {
    let mut rig = Rig::new(Setup::accepting(DeviceConfig::FEATURES - Features::ATTACH_TABLE));
    let table = pasids(&mut rig, &smmuv3(), 2);
    rig.leave_unwritten(&bind(1, 8, &table).encode(), 4);
    let mut rig = rig.restart(None);
    assert_eq!(rig.send(&bind(1, 8, &table)), Status::Ok);
    assert_eq!(leads(&rig, 8), (Some(2), Some(3)));
}

#[test]
fn x2_attach_table_of_an_unknown_endpoint_is_noent() {
    let mut rig = Rig::new(Setup::default());
    let table = pasids(&mut rig, &smmuv3(), 2);
    for endpoint in [0, 7, u32::MAX] {
        rig.refuse(&bind(1, endpoint, &table).encode(), Status::NoEnt);
        rig.refuse(&request::attach_table(1, endpoint, request::unbind(5)).encode(), Status::NoEnt);
    }
}

#[test]
fn x3_formats_that_the_endpoint_does_not_take_are_unsupp() {
    let mut rig = Rig::new(Setup::default());
    let arm = pasids(&mut rig, &smmuv3(), 2);
    let intel = pasids(&mut rig, &vtd(), 4);
    rig.refuse(&bind(1, 16, &arm).encode(), Status::Unsupp);
    rig.refuse(&bind(1, 8, &intel).encode(), Status::Unsupp);
    rig.refuse(
        &request::attach_table(1, 8, request::vtd_page_table(Memory::page(9), 0)).encode(),
        Status::Unsupp,
    );
    for endpoint in [25, 8, 16] {
        for format in [3, 4, 5, 6, 7, 0x7f, 0x80, 0x82, 0xff] {
            if (endpoint, format) == (8, 0x80) {
                continue; // It takes these: X-46.
            }
            let mut bytes =
                request::attach_table(1, endpoint, TableDescriptor::Other { format }).encode().to_vec();
            assert_eq!(bytes[12], format);
            assert_eq!(rig.send_bytes(&bytes), Status::Unsupp, "{format:#x}");
            // Whatever its descriptor holds.
            if format != 0x80 {
                bytes[16..124].fill(0x11);
                assert_eq!(rig.send_bytes(&bytes), Status::Unsupp, "{format:#x}");
            }
        }
    }
    rig.refuse(&bind(1, 25, &arm).encode(), Status::Unsupp);
    assert_eq!(rig.machine.lock().device().domain_count(), 0);
}

#[test]
fn x3_a_host_may_take_one_kind_of_table() {
    let caps = |tables, kinds| EndpointCaps { tables: Some(tables), kinds, ..EndpointCaps::default() };
    let mut endpoints = viommu_tests::rig::default_endpoints();
    endpoints.extend([
        (30, caps(vtd(), TableKinds::PAGE_TABLE)),
        (31, caps(vtd(), TableKinds::PASID_TABLE)),
        (32, caps(smmuv3(), TableKinds::PAGE_TABLE)),
    ]);
    let mut rig = Rig::new(Setup { endpoints, ..Setup::default() });
    let page_table = || request::vtd_page_table(Memory::page(9), 5);
    let pasid_table = || request::vtd_pasid_table(Memory::page(16));
    let cd_table = request::cd_table(Memory::page(16), 4);
    for (endpoint, table) in [(30, pasid_table()), (31, page_table()), (32, cd_table)] {
        let format = table.format();
        assert!(!formats(&mut rig, endpoint).contains(&format));
        rig.refuse(&request::attach_table(1, endpoint, table).encode(), Status::Unsupp);
    }
    for (endpoint, table) in [(30, page_table()), (31, pasid_table())] {
        assert_eq!(formats(&mut rig, endpoint), [table.format()]);
        assert_eq!(rig.send(&request::attach_table(endpoint, endpoint, table)), Status::Ok);
    }
}

/// What PROBE says that an endpoint takes.
fn formats(rig: &mut Rig, endpoint: u32) -> Vec<u8> {
    let reply = rig.raw(&request::probe(endpoint).encode(), 516);
    let formats =
        Properties::new(&reply.bytes[..512]).filter_map(|property| match property.expect("well formed") {
            Property::TableFormats(formats) => Some(formats),
            _ => None,
        });
    formats.flat_map(viommu_wire::TableFormats::iter).collect()
}

#[test]
fn x4_pasids_beyond_the_hardware_are_unsupp() {
    use pgtable_formats::context::{smmuv3 as smmu, vtd as dmar};
    let mut registers = smmu::IdRegisters::SOFTWARE;
    registers.idr1 = smmu::Idr1::from_bits(registers.idr1).with_ssidsize(4).into_bits();
    let mut units = dmar::CapRegisters::SOFTWARE;
    units.ecap = dmar::Ecap::from_bits(units.ecap).with_pss(13).into_bits();
    let caps = |tables| EndpointCaps { tables: Some(tables), ..EndpointCaps::default() };
    let arm = TableCaps::Smmuv3(smmu::Caps::from_registers(registers));
    let intel = TableCaps::Vtd(dmar::Caps::from_registers(units));
    let mut endpoints = viommu_tests::rig::default_endpoints();
    endpoints.extend([(30, caps(arm)), (31, caps(intel))]);
    let mut rig = Rig::new(Setup { endpoints, ..Setup::default() });
    for bits in [5, 20, 31] {
        let table = request::cd_table(Memory::page(16), bits);
        rig.refuse(&request::attach_table(1, 30, table).encode(), Status::Unsupp);
    }
    assert_eq!(rig.send(&request::attach_table(1, 30, request::cd_table(Memory::page(16), 4))), Status::Ok);
    rig.refuse(
        &request::attach_table(2, 31, request::vtd_page_table(Memory::page(9), 1 << 14)).encode(),
        Status::Unsupp,
    );
    assert_eq!(
        rig.send(&request::attach_table(2, 31, request::vtd_page_table(Memory::page(9), 0x3fff))),
        Status::Ok
    );
    // More than any PASID has.
    let mut bytes =
        request::attach_table(2, 31, request::vtd_page_table(Memory::page(9), 0)).encode().to_vec();
    bytes[36..40].copy_from_slice(&(1u32 << 20).to_le_bytes());
    rig.refuse(&bytes, Status::Unsupp);
}

#[test]
fn x5_reserved_bytes_must_be_zero() {
    let mut rig = Rig::new(Setup::default());
    let arm = bind(1, 8, &pasids(&mut rig, &smmuv3(), 2)).encode();
    let intel = bind(1, 16, &pasids(&mut rig, &vtd(), 4)).encode();
    let single = request::attach_table(1, 16, request::vtd_page_table(Memory::page(9), 5)).encode();
    let unbind = request::attach_table(1, 8, request::unbind(5)).encode();
    let arm_pages = pages(&mut rig, &smmuv3(), 1, 2).descriptor(5).unwrap();
    let arm_single = request::attach_table(1, 8, arm_pages).encode();
    assert_eq!(arm_single[12], 0x80);
    for (request, between, first) in [
        (&arm, 0..0, 32),
        (&intel, 0..0, 29),
        (&single, 0..0, 40),
        (&unbind, 0..0, 20),
        (&arm_single, 22..24, 56),
    ] {
        for at in (13..16).chain(between).chain(first..124) {
            let mut bytes = request.to_vec();
            bytes[at] = 0x10;
            assert_eq!(rig.send_bytes(&bytes), Status::Inval, "byte {at} of format {}", bytes[12]);
        }
        let mut bytes = request.to_vec();
        bytes[123] = 1;
        rig.refuse(&bytes, Status::Inval);
    }
    assert_eq!(rig.send_bytes(&arm), Status::Ok);
}

#[test]
fn x6_other_bits_of_the_stream_table_words_are_ignored() {
    let mut rig = Rig::new(Setup::default());
    let TableDescriptor::Smmuv3 { ste0, ste1 } = pasids(&mut rig, &smmuv3(), 2).descriptor() else {
        panic!()
    };
    // V, Config, and what a driver's own entry has beside S1Fmt, S1ContextPtr, S1CDMax and S1DSS.
    for (ste0, ste1) in [
        (ste0 | 0xf, ste1 | 0xff << 2),
        (ste0 & !0xf, ste1 | 0b01 << 44),
        (ste0 | 0xb, ste1 | 0xffff << 30 & !(3 << 28)),
    ] {
        let table = TableDescriptor::Smmuv3 { ste0, ste1 };
        assert_eq!(rig.send(&request::attach_table(1, 8, table)), Status::Ok, "{ste0:#x} {ste1:#x}");
        assert_eq!(leads(&rig, 8), (Some(2), Some(3)));
        assert_eq!(rig.send(&request::detach(1, 8)), Status::Ok);
    }
}

#[test]
fn x7_attach_table_to_another_kind_of_domain_is_inval() {
    for (caps, endpoint, other) in architectures() {
        let mut rig = Rig::new(Setup::default());
        let table = pasids(&mut rig, &caps, 2);
        assert_eq!(rig.send(&request::attach(1, other)), Status::Ok);
        assert_eq!(rig.send(&request::map(1, 0x1000, 0x1fff, 0x5000)), Status::Ok);
        assert_eq!(rig.send(&request::attach_bypass(2, 25)), Status::Ok);
        for domain in [1, 2] {
            for endpoint in [endpoint, other] {
                rig.refuse(&bind(domain, endpoint, &table).encode(), Status::Inval);
            }
        }
        assert_eq!(rig.machine.read(other, 0x1000), Some(0x5000));
    }
}

#[test]
fn x8_table_pointers_outside_memory_are_inval() {
    let mut rig = Rig::new(Setup::default());
    let end = Gpa(rig.machine.memory().last().0 + 1);
    // Before memory, behind it, and a table that is only in part in memory: 2^10 descriptors of 64 bytes.
    for base in [Gpa(0), Gpa(Memory::BASE - 0x1_0000), end, Gpa(end.0 + 0x1000_0000)] {
        rig.refuse(&request::attach_table(1, 8, request::cd_table(base, 10)).encode(), Status::Inval);
        rig.refuse(&request::attach_table(1, 16, request::vtd_page_table(base, 0)).encode(), Status::Inval);
        rig.refuse(&request::attach_table(1, 16, request::vtd_page_table(base, 5)).encode(), Status::Inval);
        rig.refuse(&request::attach_table(1, 16, request::vtd_pasid_table(base)).encode(), Status::Inval);
    }
    let last = Gpa(end.0 - 0x1_0000);
    assert_eq!(rig.send(&request::attach_table(1, 8, request::cd_table(last, 10))), Status::Ok);
    rig.refuse(&request::attach_table(1, 8, request::cd_table(last, 11)).encode(), Status::Inval);
}

#[test]
fn x8_misaligned_table_pointers_are_inval() {
    let mut rig = Rig::new(Setup::default());
    for offset in [1, 0x20, 0x800, 0xfff] {
        let root = Gpa(Memory::page(9).0 + offset);
        rig.refuse(&request::attach_table(1, 16, request::vtd_page_table(root, 5)).encode(), Status::Inval);
        rig.refuse(&request::attach_table(1, 16, request::vtd_pasid_table(root)).encode(), Status::Inval);
    }
    // S1ContextPtr has no bits 5:0: a linear table ignores those below its size.
    let width = TableDescriptor::VtdPageTable(viommu_wire::VtdPageTable {
        pgd: Memory::page(9),
        flags: 1 << 3,
        addr_width: 48,
        pasid: Pasid::ZERO,
    });
    rig.refuse(&request::attach_table(1, 16, width).encode(), Status::Inval);
}

#[test]
fn x9_what_the_host_refuses_has_its_status() {
    let setup = Setup::default();
    let (host, _) = Flaky::new(&setup);
    let mut bare = Bare::over(setup.config, None, host);
    let request = request::attach_table(1, 8, request::cd_table(Memory::page(16), 4));
    for (error, status) in [
        (HostError::Unsupported, Status::Unsupp),
        (HostError::NoMemory, Status::NoMem),
        (HostError::BadAddress, Status::Inval),
        (HostError::Failed(5), Status::DevErr),
    ] {
        for call in [Call::Create, Call::Bind] {
            bare.device.host_mut().script = [(call, Some(error))].into();
            assert_eq!(bare.send(&request), status, "{call:?}");
            assert_eq!(bare.device.domain_count(), 0);
            assert!(!bare.device.needs_reset());
        }
    }
    assert_eq!(bare.send(&request), Status::Ok);
}

#[test]
fn x9_tables_beyond_a_limit_are_nomem() {
    let limits =
        Limits { max_bound_pasids_per_endpoint: 2, max_bound_pasids: 3, max_domains: 2, ..Limits::DEFAULT };
    let mut rig =
        Rig::new(Setup { config: DeviceConfig { limits, ..DeviceConfig::default() }, ..Setup::default() });
    let table = |pasid| request::vtd_page_table(Memory::page(9), pasid);
    assert_eq!(rig.send(&request::attach_table(1, 16, table(1))), Status::Ok);
    assert_eq!(rig.send(&request::attach_table(1, 16, table(2))), Status::Ok);
    let before = rig.machine.snapshot();
    assert_eq!(rig.send(&request::attach_table(1, 16, table(3))), Status::NoMem, "two of one endpoint");
    assert_eq!(rig.machine.snapshot(), before);
    assert_eq!(rig.send(&request::attach_table(1, 16, table(2))), Status::Ok, "one that is replaced");
    assert_eq!(rig.send(&request::attach_table(2, 17, table(1))), Status::Ok);
    assert_eq!(rig.send(&request::attach_table(2, 17, table(2))), Status::NoMem, "three in all");
    assert_eq!(rig.send(&request::attach_table(1, 16, request::unbind(1))), Status::Ok);
    assert_eq!(rig.send(&request::attach_table(2, 17, table(2))), Status::Ok);
    assert_eq!(rig.send(&request::attach_table(3, 8, request::cd_table(Memory::page(16), 4))), Status::NoMem);
}

#[test]
fn x10_attach_table_elsewhere_moves_the_endpoint() {
    for (caps, endpoint, other) in architectures() {
        let mut rig = Rig::new(Setup::default());
        let (first, second) = (pasids(&mut rig, &caps, 2), pasids(&mut rig, &caps, 4));
        // From a domain of mappings, from bypass, from another table.
        assert_eq!(rig.send(&request::attach(1, endpoint)), Status::Ok);
        assert_eq!(rig.send(&bind(2, endpoint, &first)), Status::Ok);
        assert_eq!(leads(&rig, endpoint), (Some(2), Some(3)));
        assert_eq!(rig.send(&request::map(1, 0, 0xfff, 0)), Status::NoEnt, "the empty domain is gone");
        assert_eq!(rig.send(&request::attach_bypass(3, other)), Status::Ok);
        assert_eq!(rig.send(&bind(2, other, &second)), Status::Ok);
        assert_eq!(rig.send(&bind(4, endpoint, &second)), Status::Ok);
        assert_eq!((leads(&rig, endpoint), leads(&rig, other)), ((Some(4), Some(5)), (Some(4), Some(5))));
        assert_eq!(rig.send(&request::detach(2, endpoint)), Status::Inval);
        // And back to mappings: nothing of the table is left, tagged or untagged.
        assert_eq!(rig.send(&request::attach(5, endpoint)), Status::Ok);
        assert_eq!(leads(&rig, endpoint), (None, None));
        assert_eq!(rig.machine.lock().device().domain_count(), 2);
        rig.works();
    }
}

#[test]
fn x11_endpoints_of_a_domain_may_have_different_tables() {
    let mut rig = Rig::new(Setup::default());
    let tables = [(8, smmuv3(), 2), (9, smmuv3(), 4), (16, vtd(), 6), (17, vtd(), 8)];
    for (endpoint, caps, to) in &tables {
        let table = pasids(&mut rig, caps, *to);
        assert_eq!(rig.send(&bind(1, *endpoint, &table)), Status::Ok);
    }
    for (endpoint, _, to) in tables {
        assert_eq!(leads(&rig, endpoint), (Some(to), Some(to + 1)));
    }
    assert_eq!(rig.machine.lock().device().domain_count(), 1);
}

#[test]
fn x12_map_and_unmap_in_a_table_domain_are_inval() {
    for (caps, endpoint, _) in architectures() {
        let mut rig = Rig::new(Setup::default());
        let table = pasids(&mut rig, &caps, 2);
        assert_eq!(rig.send(&bind(1, endpoint, &table)), Status::Ok);
        rig.refuse(&request::map(1, 0x2000, 0x2fff, 0x5000).encode(), Status::Inval);
        rig.refuse(&request::unmap(1, 0x1000, 0x1fff).encode(), Status::Inval);
        assert_eq!(leads(&rig, endpoint), (Some(2), Some(3)));
    }
}

#[test]
fn x13_plain_attach_to_a_table_domain_is_inval() {
    for (caps, endpoint, other) in architectures() {
        let mut rig = Rig::new(Setup::default());
        let table = pasids(&mut rig, &caps, 2);
        assert_eq!(rig.send(&bind(1, endpoint, &table)), Status::Ok);
        for endpoint in [endpoint, other] {
            rig.refuse(&request::attach(1, endpoint).encode(), Status::Inval);
            rig.refuse(&request::attach_bypass(1, endpoint).encode(), Status::Inval);
        }
    }
}

#[test]
fn x14_after_detach_nothing_of_the_table_is_used() {
    for (caps, endpoint, other) in architectures() {
        let mut rig = Rig::new(Setup::default());
        let table = pasids(&mut rig, &caps, 2);
        for endpoint in [endpoint, other] {
            assert_eq!(rig.send(&bind(1, endpoint, &table)), Status::Ok);
            assert_eq!(leads(&rig, endpoint), (Some(2), Some(3)), "and now cached");
        }
        for (domain, status) in [(2, Status::Inval), (1, Status::Ok), (1, Status::Inval)] {
            assert_eq!(rig.send(&request::detach(domain, endpoint)), status);
        }
        assert_eq!((leads(&rig, endpoint), leads(&rig, other)), ((None, None), (Some(2), Some(3))));
        let cause = rig.machine.peek(endpoint, Some(5), 0x1000, AccessKind::Read);
        assert_eq!(cause, Err(FaultCause::Unattached));
        // A table that is bound later starts clean.
        let table = pasids(&mut rig, &caps, 6);
        assert_eq!(rig.send(&bind(3, endpoint, &table)), Status::Ok);
        assert_eq!(leads(&rig, endpoint), (Some(6), Some(7)));
        rig.works();
    }
}

#[test]
fn x15_attach_table_again_replaces_the_table() {
    for (caps, endpoint, _) in architectures() {
        let mut rig = Rig::new(Setup::default());
        let (first, second) = (pasids(&mut rig, &caps, 2), pasids(&mut rig, &caps, 4));
        assert_eq!(rig.send(&bind(1, endpoint, &first)), Status::Ok);
        assert_eq!(leads(&rig, endpoint), (Some(2), Some(3)));
        assert_eq!(rig.send(&bind(1, endpoint, &second)), Status::Ok);
        assert_eq!(leads(&rig, endpoint), (Some(4), Some(5)), "without an INVALIDATE");
        assert_eq!(rig.machine.lock().device().domain_count(), 1);
        let bad = match &caps {
            TableCaps::Smmuv3(_) => request::cd_table(Gpa(0), 4),
            TableCaps::Vtd(_) => request::vtd_pasid_table(Gpa(0)),
        };
        rig.refuse(&request::attach_table(1, endpoint, bad).encode(), Status::Inval);
        assert_eq!(leads(&rig, endpoint), (Some(4), Some(5)));
    }
}

#[test]
fn x22_format_0_takes_one_pasid_back() {
    let mut rig = Rig::new(Setup::default());
    for (pasid, to) in [(0, 2), (5, 3), (7, 4)] {
        let table = pages(&mut rig, &vtd(), 0, to).descriptor(pasid).unwrap();
        assert_eq!(rig.send(&request::attach_table(1, 16, table)), Status::Ok);
    }
    assert_eq!(leads(&rig, 16), (Some(2), Some(3)));
    let unbind = |domain, endpoint, pasid| request::attach_table(domain, endpoint, request::unbind(pasid));
    rig.refuse(&unbind(1, 16, 6).encode(), Status::NoEnt);
    rig.refuse(&unbind(2, 16, 5).encode(), Status::Inval);
    rig.refuse(&unbind(1, 17, 5).encode(), Status::Inval);
    assert_eq!(rig.send(&unbind(1, 16, 5)), Status::Ok);
    assert_eq!(leads(&rig, 16), (Some(2), None));
    assert_eq!(rig.machine.read_with(16, 7, 0x1000), Some(Memory::page(4).0));
    rig.refuse(&unbind(1, 16, 5).encode(), Status::NoEnt);
    assert_eq!(rig.send(&unbind(1, 16, 0)), Status::Ok);
    assert_eq!(rig.send(&unbind(1, 16, 7)), Status::Ok);
    // The endpoint is still attached: it may be bound again, or detached.
    assert_eq!(rig.send(&request::detach(1, 16)), Status::Ok);
    rig.works();
}

#[test]
fn x23_page_tables_of_several_pasids_live_side_by_side() {
    let mut rig = Rig::new(Setup::default());
    for (pasid, to) in [(5, 3), (7, 4), (0, 2)] {
        let table = pages(&mut rig, &vtd(), 0, to).descriptor(pasid).unwrap();
        assert_eq!(rig.send(&request::attach_table(1, 16, table)), Status::Ok);
    }
    assert_eq!(
        (leads(&rig, 16), rig.machine.read_with(16, 7, 0x1000)),
        ((Some(2), Some(3)), Some(Memory::page(4).0))
    );
    assert_eq!(rig.machine.read_with(16, 0, 0x1000), Some(Memory::page(2).0), "PASID 0 is untagged DMA");
    assert_eq!(rig.machine.read_with(16, 6, 0x1000), None);

    // One PASID again: the table is replaced.
    let table = pages(&mut rig, &vtd(), 0, 8).descriptor(5).unwrap();
    assert_eq!(rig.send(&request::attach_table(1, 16, table)), Status::Ok);
    assert_eq!(leads(&rig, 16), (Some(2), Some(8)));

    // A PASID table takes the place of all of them, and the other way round.
    let whole = pasids(&mut rig, &vtd(), 10);
    assert_eq!(rig.send(&bind(1, 16, &whole)), Status::Ok);
    assert_eq!((leads(&rig, 16), rig.machine.read_with(16, 7, 0x1000)), ((Some(10), Some(11)), None));
    assert_eq!(rig.send(&request::attach_table(1, 16, table)), Status::Ok);
    assert_eq!(leads(&rig, 16), (None, Some(8)));

    // In another domain the endpoint comes with nothing.
    let table = pages(&mut rig, &vtd(), 0, 12).descriptor(7).unwrap();
    assert_eq!(rig.send(&request::attach_table(2, 16, table)), Status::Ok);
    assert_eq!(
        (leads(&rig, 16), rig.machine.read_with(16, 7, 0x1000)),
        ((None, None), Some(Memory::page(12).0))
    );
    rig.works();
}

#[test]
fn x24_handover_properties_appear_with_the_feature_only() {
    let kinds = |rig: &mut Rig, endpoint| -> Vec<Property> {
        let reply = rig.raw(&request::probe(endpoint).encode(), 516);
        assert_eq!((reply.used, reply.status()), (516, Some(Status::Ok)), "probe_size never changes");
        Properties::new(&reply.bytes[..512]).map(Result::unwrap).collect()
    };
    let mut rig = Rig::new(Setup::accepting(DeviceConfig::FEATURES - Features::ATTACH_TABLE));
    for endpoint in [8, 16, 24, 25] {
        let properties = kinds(&mut rig, endpoint);
        assert!(
            properties.iter().all(|property| matches!(property, Property::ReservedRegion(_))),
            "{properties:?}"
        );
    }
    let mut rig = rig.restart(None);
    match kinds(&mut rig, 8)[..] {
        [
            Property::ReservedRegion(_),
            Property::HwArmSmmu3 { .. },
            Property::PasidSize { bits: 20 },
            Property::TableFormats(formats),
        ] => assert_eq!(formats.iter().collect::<Vec<_>>(), [1, 0x80]),
        ref other => panic!("{other:?}"),
    }
    match kinds(&mut rig, 16)[..] {
        [Property::HwIntelVtd { .. }, Property::PasidSize { bits: 20 }, Property::TableFormats(formats)] => {
            assert_eq!(formats.iter().collect::<Vec<_>>(), [0x81, 2]);
        }
        ref other => panic!("{other:?}"),
    }
    assert_eq!(kinds(&mut rig, 24), []);
}

#[test]
fn x25_faults_of_a_guests_table_are_told_with_their_pasid() {
    for (caps, endpoint, _) in architectures() {
        let mut rig = Rig::new(Setup::default());
        let table = pasids(&mut rig, &caps, 2);
        assert_eq!(rig.send(&bind(1, endpoint, &table)), Status::Ok);
        assert!(rig.machine.access(endpoint, Some(5), 0x9000, AccessKind::Write).is_err());
        assert!(rig.machine.access(endpoint, Some(6), 0x1000, AccessKind::Read).is_err());
        assert!(rig.machine.access(endpoint, None, 0x9000, AccessKind::Read).is_err());
        let pasids: Vec<_> = rig
            .events()
            .into_iter()
            .map(|event| match event {
                Event::Fault(fault) => (fault.pasid.map(Pasid::value), fault.endpoint.0, fault.reason),
                other => panic!("{other:?}"),
            })
            .collect();
        use viommu_wire::FaultReason::{Mapping, Unknown};
        // PASID 6 has no page table at all: that is no missing mapping.
        let expected =
            [(Some(5), endpoint, Mapping), (Some(6), endpoint, Unknown), (None, endpoint, Mapping)];
        assert_eq!(pasids, expected);
    }
}

/// In domain 1 a page table for PASID 5 alone.
#[test]
fn x25_a_pasid_that_no_page_table_is_bound_for_is_domain() {
    for (caps, endpoint, _) in architectures() {
        let mut rig = Rig::new(Setup::default());
        let pages = pages(&mut rig, &caps, 1, 2);
        let table = pages.descriptor(5).unwrap();
        assert_eq!(rig.send(&request::attach_table(1, endpoint, table)), Status::Ok);
        for pasid in [None, Some(6)] {
            assert!(rig.machine.access(endpoint, pasid, 0x1000, AccessKind::Read).is_err());
            match rig.events()[..] {
                [Event::Fault(fault)] => {
                    assert_eq!(fault.reason, viommu_wire::FaultReason::Domain);
                    assert_eq!(fault.pasid.map(Pasid::value), pasid);
                }
                ref other => panic!("{other:?}"),
            }
        }
        assert!(rig.machine.access(endpoint, Some(5), 0x9000, AccessKind::Read).is_err());
        assert!(matches!(
            rig.events()[..],
            [Event::Fault(fault)] if fault.reason == viommu_wire::FaultReason::Mapping
        ));
    }
}

#[test]
fn x54_faults_that_are_not_to_be_recorded_are_not_told() {
    for (caps, endpoint, _) in architectures() {
        let mut rig = Rig::new(Setup::default());
        let table = pasids(&mut rig, &caps, 2);
        assert_eq!(rig.send(&bind(1, endpoint, &table)), Status::Ok);
        // CD.R is set and has to be cleared, FPD the other way round.
        let (entry, bit) = match table.descriptor() {
            TableDescriptor::Smmuv3 { ste0, .. } => ((ste0 & 0x000f_ffff_ffff_ffc0) + 5 * 64, 1 << 45),
            TableDescriptor::VtdPasidTable(table) => {
                ((rig.machine.memory().load(table.directory).unwrap() & !0xfff) + 5 * 64, 1 << 1)
            }
            other => panic!("{other:?}"),
        };
        for told in [true, false, true] {
            for iova in [0x9000, 0x1_2345_6000] {
                assert!(rig.machine.access(endpoint, Some(5), iova, AccessKind::Write).is_err());
                assert_eq!(rig.events().len(), usize::from(told));
                assert!(rig.machine.access(endpoint, None, iova, AccessKind::Write).is_err());
                assert_eq!(rig.events().len(), 1, "of another entry");
            }
            assert_eq!(leads(&rig, endpoint), (Some(2), Some(3)));
            let word = rig.machine.memory().load(Gpa(entry)).unwrap();
            rig.machine.memory().store(Gpa(entry), word ^ bit);
            let scope = InvalidateScope::Pasid(Pasid::new(5));
            let (domain, caches) = (DomainId(1), Caches::all());
            let entry = Invalidate { domain, scope, caches, leaf: false, tag: None, global: false };
            assert_eq!(rig.send(&Request::Invalidate(entry)), Status::Ok);
        }
    }
}

#[test]
fn x54_what_stalls_is_told_whatever_r_says() {
    use pgtable_formats::context::smmuv3::{Caps, IdRegisters};
    // All faults stall on this hardware: CD.S is 1.
    const STALL_MODEL: u32 = 2 << 24;
    let registers =
        IdRegisters { idr0: IdRegisters::SOFTWARE.idr0 & !(3 << 24) | STALL_MODEL, ..IdRegisters::SOFTWARE };
    let caps = TableCaps::Smmuv3(Caps::from_registers(registers));
    let endpoint = EndpointCaps { tables: Some(caps.clone()), ..EndpointCaps::default() };
    let mut rig = Rig::new(Setup { endpoints: vec![(8, endpoint)], ..Setup::default() });
    let table = pasids(&mut rig, &caps, 2);
    assert_eq!(rig.send(&bind(1, 8, &table)), Status::Ok);
    let TableDescriptor::Smmuv3 { ste0, .. } = table.descriptor() else { panic!() };
    let entry = Gpa((ste0 & 0x000f_ffff_ffff_ffc0) + 5 * 64);
    for record in [1, 0] {
        let word = rig.machine.memory().load(entry).unwrap();
        assert_eq!(word >> 44 & 1, 1, "CD.S");
        rig.machine.memory().store(entry, word & !(1 << 45) | record << 45);
        rig.machine.lock().device_mut().host_mut().flush();
        assert!(rig.machine.access(8, Some(5), 0x9000, AccessKind::Write).is_err());
        match rig.events()[..] {
            [Event::Fault(fault)] => assert_eq!(fault.reason, viommu_wire::FaultReason::Mapping),
            ref other => panic!("{other:?}"),
        }
    }
}

#[test]
fn x26_what_tables_hold_is_judged_when_it_is_used() {
    for (caps, endpoint, _) in architectures() {
        let mut rig = Rig::new(Setup::default());
        // A table without an entry is bound; entries may come later.
        let table = PasidTable::new(&caps, 4, rig.alloc());
        assert_eq!(rig.send(&bind(1, endpoint, &table)), Status::Ok);
        assert_eq!(leads(&rig, endpoint), (None, None));
        let pages = pages(&mut rig, &caps, 1, 3);
        table.set(rig.alloc(), 5, &pages);
        assert_eq!(leads(&rig, endpoint), (None, Some(3)));
    }
}

#[test]
fn x26_a_table_that_leads_to_itself_ends_in_a_fault() {
    for (caps, endpoint, _) in architectures() {
        let mut rig = Rig::new(Setup::default());
        let table = PasidTable::new(&caps, 4, rig.alloc());
        let loops = PageTable::new(&caps, 1, rig.alloc());
        // Each entry of the root is a table descriptor that leads to the root: 4 levels down it is a page of itself.
        let entry = match &caps {
            TableCaps::Smmuv3(_) => loops.root().0 | 0b11,
            TableCaps::Vtd(_) => loops.root().0 | 0b111,
        };
        for index in 0..512 {
            rig.machine.memory().store(Gpa(loops.root().0 + 8 * index), entry);
        }
        table.set(rig.alloc(), 0, &loops);
        assert_eq!(rig.send(&bind(1, endpoint, &table)), Status::Ok);
        for iova in [0, 0x1000, 0x1234_5678_9abc, (1 << 47) - 1] {
            // VT-d sets no flag here that it needs; on Arm the access flag of the page is clear.
            match rig.machine.peek(endpoint, None, iova, AccessKind::Read) {
                Ok(output) => assert_eq!(output & !0xfff, loops.root().0),
                Err(cause) => assert!(matches!(cause, FaultCause::Table(_)), "{cause}"),
            }
        }
        // A PASID table that leads to itself, or to nowhere, faults as well.
        let itself = match table.descriptor() {
            TableDescriptor::Smmuv3 { ste0, .. } => Gpa(ste0 & 0x000f_ffff_ffff_ffc0),
            TableDescriptor::VtdPasidTable(table) => table.directory,
            other => panic!("{other:?}"),
        };
        for value in [itself.0 | 1, u64::MAX, 0x1000 | 1] {
            for index in 0..128 {
                rig.machine.memory().store(Gpa(itself.0 + 8 * index), value);
            }
            rig.machine.lock().device_mut().host_mut().flush();
            for pasid in [None, Some(0), Some(5)] {
                assert!(rig.machine.peek(endpoint, pasid, 0x1000, AccessKind::Read).is_err());
            }
        }
        assert_eq!(rig.send(&request::detach(1, endpoint)), Status::Ok);
        rig.works();
    }
}

#[test]
fn x26_reserved_bits_in_tables_are_faults_of_the_access() {
    for (caps, endpoint, _) in architectures() {
        let mut rig = Rig::new(Setup::default());
        let table = pasids(&mut rig, &caps, 2);
        assert_eq!(rig.send(&bind(1, endpoint, &table)), Status::Ok);
        let (entry, bits, name) = match table.descriptor() {
            // The descriptor of PASID 5: TG0 = 3 is reserved.
            TableDescriptor::Smmuv3 { ste0, .. } => {
                (Gpa((ste0 & 0x000f_ffff_ffff_ffc0) + 5 * 64), 3 << 6, "C_BAD_CD")
            }
            // The entry of PASID 5, behind the first of the directory: bit 11 is reserved.
            TableDescriptor::VtdPasidTable(table) => {
                let entries = rig.machine.memory().load(table.directory).unwrap() & !0xfff;
                (Gpa(entries + 5 * 64), 1 << 11, "0x5a")
            }
            other => panic!("{other:?}"),
        };
        let word = rig.machine.memory().load(entry).unwrap();
        rig.machine.memory().store(entry, word | bits);
        let cause = rig.machine.access(endpoint, Some(5), 0x1000, AccessKind::Read).unwrap_err();
        assert_eq!(cause.to_string(), name);
        assert_eq!(leads(&rig, endpoint), (Some(2), None));
        // As hardware, the next access looks again.
        rig.machine.memory().store(entry, word);
        assert_eq!(leads(&rig, endpoint), (Some(2), Some(3)));
        rig.works();
    }
}

#[test]
fn x27_a_known_type_always_gets_its_whole_answer() {
    let mut rig = Rig::new(Setup::default());
    // Linux takes a used length of 0 for success: every refusal must be written.
    let table = request::cd_table(Memory::page(16), 4);
    for request in [
        request::attach(1, 99),
        request::detach(1, 8),
        request::map(9, 0, 0xfff, 0),
        request::unmap(9, 0, 0xfff),
        request::attach_table(1, 99, table),
        request::attach_table(1, 25, table),
    ] {
        let reply = rig.raw(&request.encode(), 4);
        assert_eq!(reply.used, 4);
        assert_ne!(reply.status(), Some(Status::Ok));
    }
    assert_eq!(rig.raw(&request::probe(99).encode(), 516).used, 516);
}

#[test]
fn x21_page_responses_are_unknown_until_page_requests_are_offered() {
    assert!(!DeviceConfig::FEATURES.contains(Features::PAGE_REQUEST));
    let mut rig = Rig::new(Setup::default());
    let mut bytes = [0; 28];
    bytes[0] = 8;
    bytes[4] = 8;
    rig.leave_unwritten(&bytes, 4);
}
