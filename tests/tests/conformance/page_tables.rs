//! Page tables of one PASID on Arm (format 0x80), and machines that take one kind of table.

use pgtable_formats::context::smmuv3::Tcr;
use pgtable_formats::format::Attrs;
use viommu_device::host::{EndpointCaps, TableKinds};
use viommu_device::{Gpa, Limits};
use viommu_tests::rig::{Memory, Rig, Sends, Setup, default_endpoints, request, smmuv3, vtd};
use viommu_tests::tables::{PageTable, PasidTable};
use viommu_wire::{
    ArmPageTable, Caches, DomainId, Invalidate, InvalidateScope, Iova, IovaRange, Properties, Property,
    Request, Status, TableDescriptor, numbers,
};

/// IOVA 0x1000, one page, to page `to` of memory.
fn pages(rig: &mut Rig, asid: u16, to: u64) -> PageTable {
    let table = PageTable::new(&smmuv3(), asid, rig.alloc());
    table.map(rig.alloc(), 0x1000, Memory::page(to).0, 0x1000, Attrs::READ_WRITE);
    table
}

fn bind(table: &PageTable, pasid: u32) -> Request {
    request::attach_table(1, 8, table.descriptor(pasid).unwrap())
}

/// With another descriptor.
fn changed(table: &PageTable, change: impl FnOnce(&mut ArmPageTable)) -> Request {
    let Some(TableDescriptor::ArmPageTable(mut arm)) = table.descriptor(5) else { panic!() };
    change(&mut arm);
    request::attach_table(1, 8, TableDescriptor::ArmPageTable(arm))
}

fn leads(rig: &Rig, pasid: Option<u32>) -> Option<u64> {
    let at = match pasid {
        None => rig.machine.read(8, 0x1000),
        Some(pasid) => rig.machine.read_with(8, pasid, 0x1000),
    };
    at.map(|at| (at - Memory::BASE) >> 12)
}

#[test]
fn x46_a_page_table_of_one_pasid_is_bound_by_its_registers() {
    let mut rig = Rig::new(Setup::default());
    let tables =
        [(5, 1, 2), (7, 2, 3), (0, 3, 4)].map(|(pasid, asid, to)| (pasid, pages(&mut rig, asid, to)));
    for (pasid, table) in &tables {
        assert_eq!(rig.send(&bind(table, *pasid)), Status::Ok);
    }
    assert_eq!(
        [None, Some(5), Some(7), Some(6)].map(|pasid| leads(&rig, pasid)),
        [Some(4), Some(2), Some(3), None]
    );
    assert_eq!(rig.send(&request::attach_table(1, 8, request::unbind(5))), Status::Ok);
    assert_eq!([None, Some(5), Some(7)].map(|pasid| leads(&rig, pasid)), [Some(4), None, Some(3)]);
    // A table of all PASIDs takes their place, and the other way round.
    let all = PasidTable::new(&smmuv3(), 4, rig.alloc());
    all.set(rig.alloc(), 6, &tables[0].1);
    assert_eq!(rig.send(&request::attach_table(1, 8, all.descriptor())), Status::Ok);
    assert_eq!(
        [None, Some(5), Some(7), Some(6)].map(|pasid| leads(&rig, pasid)),
        [None, None, None, Some(2)]
    );
    assert_eq!(rig.send(&bind(&tables[1].1, 7)), Status::Ok);
    assert_eq!([None, Some(7), Some(6)].map(|pasid| leads(&rig, pasid)), [None, Some(3), None]);
}

#[test]
fn x47_reserved_bits_and_bad_addresses_are_inval() {
    let mut rig = Rig::new(Setup::default());
    let table = pages(&mut rig, 1, 2);
    for bit in [6, 35, 62, 63] {
        rig.refuse(&changed(&table, |arm| arm.tcr |= 1 << bit).encode(), Status::Inval);
    }
    rig.refuse(&changed(&table, |arm| arm.tcr |= 3 << 14).encode(), Status::Inval);
    rig.refuse(&changed(&table, |arm| arm.tcr = arm.tcr & !(3 << 12) | 1 << 12).encode(), Status::Inval);
    rig.refuse(&changed(&table, |arm| arm.ttbr0 += 0x800).encode(), Status::Inval);
    // An ASID or CnP, as TTBR0_EL1 has them.
    rig.refuse(&changed(&table, |arm| arm.ttbr0 |= 1 << 48).encode(), Status::Inval);
    rig.refuse(&changed(&table, |arm| arm.ttbr0 |= 1).encode(), Status::Inval);
    // Not memory.
    rig.refuse(&changed(&table, |arm| arm.ttbr0 = 0x1000).encode(), Status::Inval);
    rig.refuse(&changed(&table, |arm| arm.ttbr0 = 1 << 47).encode(), Status::Inval);
    assert_eq!(rig.machine.lock().device().domain_count(), 0);
    rig.works();
}

#[test]
fn x48_what_the_hardware_does_not_have_is_unsupp() {
    let mut rig = Rig::new(Setup::default());
    let table = pages(&mut rig, 1, 2);
    let unsupported: [fn(Tcr) -> Tcr; 8] = [
        |tcr| tcr.with_ips(6),
        |tcr| tcr.with_ips(7),
        |tcr| tcr.with_t0sz(15),
        |tcr| tcr.with_t0sz(40),
        |tcr| tcr.with_ha(true),
        |tcr| tcr.with_e0pd0(true),
        // The software MMU has it, and PROBE does not tell.
        |tcr| tcr.with_hpd0(true),
        |tcr| tcr.with_ds(true),
    ];
    for change in unsupported {
        rig.refuse(&changed(&table, |arm| arm.tcr = change(arm.tcr.into()).into()).encode(), Status::Unsupp);
    }
    let mut endpoints = default_endpoints();
    let mut registers = pgtable_formats::context::smmuv3::IdRegisters::SOFTWARE;
    registers.idr1 = registers.idr1 & !(0x1f << 6) | 4 << 6;
    let narrow = pgtable_formats::context::smmuv3::Caps::from_registers(registers);
    let tables = Some(viommu_device::host::TableCaps::Smmuv3(narrow));
    endpoints.push((30, EndpointCaps { tables, ..EndpointCaps::default() }));
    let mut rig = Rig::new(Setup { endpoints, ..Setup::default() });
    let table = pages(&mut rig, 1, 2);
    for (pasid, status) in [(16, Status::Unsupp), (15, Status::Ok)] {
        let request = request::attach_table(1, 30, table.descriptor(pasid).unwrap());
        assert_eq!(rig.send(&request), status, "{pasid}");
    }
}

#[test]
fn x49_what_only_processors_have_is_ignored() {
    let mut rig = Rig::new(Setup::default());
    let table = pages(&mut rig, 1, 2);
    // A1, AS, HWU, TBID, NFD, TCMA, MTX; and all of the half that is disabled.
    let ignored = 1 << 22 | 1 << 36 | 0xff << 43 | 3 << 51 | 3 << 53 | 3 << 57 | 3 << 60;
    let upper = 0x3f << 16 | 0xff << 24 | 1 << 38 | 1 << 42 | 1 << 56;
    for bits in [ignored, upper, ignored | upper] {
        assert_eq!(rig.send(&changed(&table, |arm| (arm.tcr, arm.ttbr1) = (arm.tcr | bits, !0))), Status::Ok);
        assert_eq!(leads(&rig, Some(5)), Some(2));
    }
}

#[test]
fn x50_page_tables_beyond_a_limit_are_nomem() {
    let mut setup = Setup::default();
    setup.config.limits = Limits { max_bound_pasids_per_endpoint: 2, ..Limits::DEFAULT };
    let mut rig = Rig::new(setup);
    let table = pages(&mut rig, 1, 2);
    for pasid in [0, 5] {
        assert_eq!(rig.send(&bind(&table, pasid)), Status::Ok);
    }
    rig.refuse(&bind(&table, 6).encode(), Status::NoMem);
    assert_eq!(rig.send(&bind(&table, 5)), Status::Ok, "in the place of one");
}

/// What PROBE says that an endpoint takes.
fn formats(rig: &mut Rig, endpoint: u32) -> Vec<u8> {
    let reply = rig.raw(&request::probe(endpoint).encode(), 516);
    let lists = Properties::new(&reply.bytes[..512]).filter_map(|property| match property.unwrap() {
        Property::TableFormats(list) => Some(list.iter().collect::<Vec<_>>()),
        _ => None,
    });
    lists.flatten().collect()
}

#[test]
fn x51_what_is_handed_over_as_it_is_comes_first() {
    let (all, page, pasid) = (TableKinds::all(), TableKinds::PAGE_TABLE, TableKinds::PASID_TABLE);
    let arm = [numbers::FORMAT_ARM_SMMU3, numbers::FORMAT_ARM_PT];
    let intel = [numbers::FORMAT_INTEL_PASID_TABLE, numbers::FORMAT_INTEL_PT];
    let cases = [
        (all, all, [true, true], false),
        (all, pasid, [true, true], false),
        (all, page, [true, true], true),
        (page, page, [false, true], false),
        (pasid, pasid, [true, false], false),
    ];
    for (tables, list) in [(smmuv3(), arm), (vtd(), intel)] {
        for (kinds, native, taken, reversed) in cases {
            let caps =
                EndpointCaps { tables: Some(tables.clone()), kinds, native, ..EndpointCaps::default() };
            let mut rig = Rig::new(Setup { endpoints: vec![(24, caps)], ..Setup::default() });
            let mut expected: Vec<u8> =
                list.iter().zip(taken).filter(|(_, taken)| *taken).map(|(format, _)| *format).collect();
            if reversed {
                expected.reverse();
            }
            assert_eq!(formats(&mut rig, 24), expected, "{kinds:?} {native:?}");
        }
    }
    let mut rig = Rig::new(Setup::default());
    assert_eq!(Gpa(Memory::BASE), Memory::page(0));
    assert_eq!(formats(&mut rig, 25), [0_u8; 0]);
}

/// Found by a reader of the text: an INVALIDATE that names nothing but an ASID dropped nothing.
#[test]
fn x20_an_asid_alone_reaches_page_tables_that_are_bound_one_by_one() {
    let mut rig = Rig::new(Setup::default());
    let table = pages(&mut rig, 0x2a, 2);
    assert_eq!(rig.send(&bind(&table, 5)), Status::Ok);
    for (to, scope) in [
        (3, InvalidateScope::Pasid(None)),
        (
            4,
            InvalidateScope::Address {
                pasid: None,
                range: IovaRange::from_length(Iova(0x1000), 0x1000).expect("a page"),
                page_lg2: 12,
            },
        ),
    ] {
        let before = leads(&rig, Some(5));
        table.remap(rig.alloc(), 0x1000, Memory::page(to).0, 0x1000);
        assert_eq!(leads(&rig, Some(5)), before, "stale, as on hardware");
        let asid = Invalidate {
            domain: DomainId(1),
            scope,
            caches: Caches::TLB,
            leaf: false,
            tag: Some(0x2a),
            global: false,
        };
        assert_eq!(rig.send(&Request::Invalidate(asid)), Status::Ok);
        assert_eq!(leads(&rig, Some(5)), Some(to));
    }
}
