use proptest::prelude::*;

use super::*;
use crate::context::smmuv3::{CdSpec, HalfSpec, IdRegisters};
use crate::context::{Canonical, Context as AnyContext, Stage1};
use crate::edit::{EditOptions, Editor};
use crate::format::Attrs;
use crate::suite::FlatMem;
use crate::{Access, IovaRange, Pasid, TableAlloc};

fn caps() -> Caps {
    Caps::from_registers(IdRegisters::SOFTWARE)
}

/// What an arm64 kernel with 4 KiB pages and 48 bits has in TCR_EL1 of a process, and IPS of 48 bits: T0SZ=16, walks
/// inner-shareable and write-back, EPD1=1; TG1=4K, T1SZ=16, A1=1, AS=1 and TBI0=1 are what such a kernel has besides.
const LINUX: u64 = 0x35_b5d0_3510;

fn registers() -> PageTableRegisters {
    PageTableRegisters {
        asid: 0x2a,
        tcr: Tcr::from_bits(LINUX),
        ttbr0: 0x4000_1000,
        ttbr1: 0x5000_2000,
        mair: 0xff,
    }
}

fn with(change: impl FnOnce(&mut PageTableRegisters)) -> Result<PageTable, PageTableRefusal> {
    let mut registers = registers();
    change(&mut registers);
    PageTable::new(&registers, &caps())
}

/// Every field lies where Arm DDI 0487 (TCR_EL1) has it.
#[test]
fn fields_have_the_manual_s_bits() {
    fn bits(high: u32, low: u32) -> u64 {
        (u64::MAX >> (63 - high)) & !((1_u64 << low) - 1)
    }
    let fields = [
        (Tcr::new().with_t0sz(63), bits(5, 0)),
        (Tcr::new().with_reserved6(true), bits(6, 6)),
        (Tcr::new().with_epd0(true), bits(7, 7)),
        (Tcr::new().with_irgn0(3), bits(9, 8)),
        (Tcr::new().with_orgn0(3), bits(11, 10)),
        (Tcr::new().with_sh0(3), bits(13, 12)),
        (Tcr::new().with_tg0(3), bits(15, 14)),
        (Tcr::new().with_t1sz(63), bits(21, 16)),
        (Tcr::new().with_a1(true), bits(22, 22)),
        (Tcr::new().with_epd1(true), bits(23, 23)),
        (Tcr::new().with_irgn1(3), bits(25, 24)),
        (Tcr::new().with_orgn1(3), bits(27, 26)),
        (Tcr::new().with_sh1(3), bits(29, 28)),
        (Tcr::new().with_tg1(3), bits(31, 30)),
        (Tcr::new().with_ips(7), bits(34, 32)),
        (Tcr::new().with_reserved35(true), bits(35, 35)),
        (Tcr::new().with_asid16(true), bits(36, 36)),
        (Tcr::new().with_tbi0(true), bits(37, 37)),
        (Tcr::new().with_tbi1(true), bits(38, 38)),
        (Tcr::new().with_ha(true), bits(39, 39)),
        (Tcr::new().with_hd(true), bits(40, 40)),
        (Tcr::new().with_hpd0(true), bits(41, 41)),
        (Tcr::new().with_hpd1(true), bits(42, 42)),
        (Tcr::new().with_hwu(0xff), bits(50, 43)),
        (Tcr::new().with_tbid(3), bits(52, 51)),
        (Tcr::new().with_nfd(3), bits(54, 53)),
        (Tcr::new().with_e0pd0(true), bits(55, 55)),
        (Tcr::new().with_e0pd1(true), bits(56, 56)),
        (Tcr::new().with_tcma(3), bits(58, 57)),
        (Tcr::new().with_ds(true), bits(59, 59)),
        (Tcr::new().with_mtx(3), bits(61, 60)),
        (Tcr::new().with_reserved62(3), bits(63, 62)),
    ];
    for (tcr, mask) in fields {
        assert_eq!(tcr.into_bits(), mask, "{tcr:?}");
    }
    assert_eq!(fields.iter().fold(0, |all, (tcr, _)| all | tcr.into_bits()), u64::MAX);
}

/// The descriptor that the registers stand for, word by word, put together from the layouts of IHI 0070, 5.4: V, AA64,
/// R, A and ASET; T0SZ=16, IR0=OR0=1, SH0=3, EPD1, IPS=5, TBI0; the disabled half is all 0 but for EPD1.
#[test]
fn golden_descriptor() {
    let table = PageTable::new(&registers(), &caps()).unwrap();
    let word0 =
        0x2a << 48 | 1 << 47 | 1 << 46 | 1 << 45 | 1 << 41 | 1 << 38 | 5 << 32 | 1 << 31 | 1 << 30 | 0x3510;
    assert_eq!(table.cd().words(), [word0, 0x4000_1000, 0, 0xff, 0, 0, 0, 0]);
    assert_eq!(table.extents(), [Some((Gpa(0x4000_1000), 4096)), None]);
    assert_eq!(table.asid(), 0x2a);
    let canonical = table.registers();
    assert_eq!((canonical.tcr.into_bits(), canonical.ttbr1), (0x25_0080_3510, 0), "what was ignored is gone");
    assert_eq!(PageTable::new(&canonical, &caps()), Ok(table));
}

/// A descriptor that a guest makes for its own table says the same as registers.
#[test]
fn registers_of_a_descriptor() {
    let half = |root| Some(HalfSpec { root: Gpa(root), granule: Granule::K16, input_bits: 47 });
    let spec = CdSpec {
        asid: 7,
        lower: half(0x4000_0000),
        upper: half(0x5000_0000),
        output_bits: 48,
        ds: false,
        mair: 0xff44,
    };
    let cd = spec.encode(&caps()).unwrap();
    let table = PageTable::new(&PageTableRegisters::of(&cd), &caps()).unwrap();
    assert_eq!(*table.cd(), cd);
    assert_eq!(Ok(table.context()), context_from_cd(&cd.words(), &caps(), false));
    // 47 bits of 16 KiB pages: three levels, all of the first.
    assert_eq!(table.extents(), [0x4000_0000, 0x5000_0000].map(|root| Some((Gpa(root), 16384))));
}

#[test]
fn what_is_ignored() {
    let expected = PageTable::new(&registers(), &caps());
    for change in [
        Tcr::new().with_a1(true),
        Tcr::new().with_asid16(true),
        Tcr::new().with_hwu(0xff),
        Tcr::new().with_tbid(3),
        Tcr::new().with_nfd(3),
        Tcr::new().with_tcma(3),
        Tcr::new().with_mtx(3),
        // Of the half that is disabled.
        Tcr::new().with_t1sz(63),
        Tcr::new().with_tg1(3),
        Tcr::new().with_sh1(3),
        Tcr::new().with_tbi1(true),
        Tcr::new().with_hpd1(true),
        Tcr::new().with_e0pd1(true),
    ] {
        let flipped = with(|registers| registers.tcr = Tcr::from_bits(LINUX ^ change.into_bits()));
        assert_eq!(flipped, expected, "{change:?}");
    }
    assert_eq!(with(|registers| registers.ttbr1 = !0), expected);
}

#[test]
fn what_is_refused() {
    use PageTableRefusal as No;
    let tcr = |change: fn(Tcr) -> Tcr| with(|registers| registers.tcr = change(registers.tcr)).map(drop);
    let reserved = Err(No::Reserved);
    assert_eq!(tcr(|tcr| tcr.with_reserved6(true)), reserved);
    assert_eq!(tcr(|tcr| tcr.with_reserved35(true)), reserved);
    assert_eq!(tcr(|tcr| tcr.with_reserved62(1)), reserved);
    assert_eq!(tcr(|tcr| tcr.with_tg0(3)), reserved);
    assert_eq!(tcr(|tcr| tcr.with_sh0(1)), reserved);
    assert_eq!(tcr(|tcr| tcr.with_epd1(false).with_tg1(0)), reserved);
    let size = |asked| Err(No::InputSize { asked, smallest: 25, largest: 48 });
    assert_eq!(tcr(|tcr| tcr.with_t0sz(15)), size(49));
    assert_eq!(tcr(|tcr| tcr.with_t0sz(40)), size(24));
    assert_eq!(tcr(|tcr| tcr.with_ips(6)), Err(No::OutputSize { asked: 52, implemented: 48 }));
    assert_eq!(tcr(|tcr| tcr.with_ips(7)), Err(No::OutputSize { asked: 56, implemented: 48 }));
    assert_eq!(tcr(|tcr| tcr.with_ha(true)), Err(No::FlagUpdate));
    assert_eq!(tcr(|tcr| tcr.with_hd(true)), Err(No::FlagUpdate));
    assert_eq!(tcr(|tcr| tcr.with_e0pd0(true)), Err(No::E0pd));
    assert_eq!(tcr(|tcr| tcr.with_ds(true)), Err(No::LargeAddresses));
    assert_eq!(tcr(|tcr| tcr.with_hpd0(true)), Ok(()));
    assert_eq!(
        with(|registers| registers.ttbr0 = 0x4000_1800),
        Err(No::Alignment { table: Gpa(0x4000_1800), size: 4096 })
    );
    assert_eq!(
        with(|registers| registers.ttbr0 |= 1),
        Err(No::Alignment { table: Gpa(0x4000_1001), size: 4096 })
    );
    // An ASID as TTBR0_EL1 has it.
    let at = 0x2a << 48 | 0x4000_1000;
    assert_eq!(with(|registers| registers.ttbr0 = at), Err(No::AddressSize { table: Gpa(at), bits: 48 }));
    assert!(No::OutputSize { asked: 52, implemented: 48 }.is_unsupported() && !No::Reserved.is_unsupported());
    for (asked, unsupported) in [(12, false), (16, true), (52, true), (53, false)] {
        assert_eq!(No::InputSize { asked, smallest: 25, largest: 48 }.is_unsupported(), unsupported);
    }
    let narrow = Caps { asid16: false, ..caps() };
    let wide = PageTableRegisters { asid: 0x100, ..registers() };
    assert_eq!(PageTable::new(&wide, &narrow), Err(No::Asid(0x100)));
    let no_4k = Caps { granule_4k: false, ..caps() };
    assert_eq!(PageTable::new(&registers(), &no_4k), Err(No::Granule(Granule::K4)));
    let no_had = Caps { had: false, ..caps() };
    let hpd = PageTableRegisters { tcr: registers().tcr.with_hpd0(true), ..registers() };
    assert_eq!(PageTable::new(&hpd, &no_had), Err(No::HierarchicalPermissions));
    assert_eq!(PageTable::new(&registers(), &Caps { aarch64: false, ..caps() }), Err(No::Aarch64));
}

/// What the endpoint may do is said by S, where the hardware leaves a choice.
#[test]
fn stalls_are_the_endpoint_s() {
    for (model, may_stall, expected) in [
        (StallModel::Both, false, false),
        (StallModel::Both, true, true),
        (StallModel::Terminate, true, false),
        (StallModel::Stall, false, true),
    ] {
        let caps = Caps { stall_model: model, ..caps() };
        let table = PageTable::new(&registers(), &caps).unwrap().with_stall(may_stall);
        assert_eq!(table.cd().word0.stall(), expected, "{model:?}");
        assert!(context_from_cd(&table.cd().words(), &caps, may_stall).is_ok());
    }
}

#[test]
fn walks_without_a_descriptor_in_memory() {
    let mut memory = FlatMem::new(Gpa(0x4000_0000), 0x10_0000);
    let root = memory.alloc(12).unwrap();
    let table = with(|registers| registers.ttbr0 = root.0).unwrap();
    let format = *table.context().half(Iova(0)).unwrap();
    let range = IovaRange::from_length(Iova(0x1000), 0x1000).unwrap();
    let mut editor = Editor::new(format, &mut memory, EditOptions::default());
    editor.map(range, Gpa(0x4008_0000), Attrs::READ_WRITE).unwrap();
    let canonical = Canonical::Smmuv3PageTable(table);
    assert!(!canonical.has_pasids());
    assert_eq!(canonical.extents().collect::<alloc::vec::Vec<_>>(), [(root, 4096)]);
    for pasid in [None, Pasid::new(5)] {
        assert_eq!(canonical.effective_pasid(pasid), pasid);
        let Ok(AnyContext::Stage1(stage1)) = canonical.lookup(&memory, pasid) else { panic!() };
        assert!(matches!(stage1, Stage1::Smmuv3(_)) && stage1.tag() == Some(0x2a));
        let translation = stage1.walk(&memory, Iova(0x1abc), Access::READ).unwrap();
        assert_eq!(translation.apply(Iova(0x1abc)), Gpa(0x4008_0abc));
        assert_eq!(
            stage1.walk(&memory, Iova(0x2000), Access::READ).map_err(|fault| fault.class()),
            Err(crate::FaultClass::NotMapped)
        );
    }
}

proptest! {
    /// Whatever the registers hold: what is taken is a legal descriptor that says the same, and what is refused has a
    /// reason of its own, never just that of the descriptor.
    #[test]
    fn taken_or_refused_for_a_reason(
        tcr in any::<u64>(),
        keep in any::<u64>(),
        asid in any::<u16>(),
        ttbr in [any::<u64>(), any::<u64>()],
        shift in [0u32..52, 0u32..52],
        idr in [any::<u32>(), any::<u32>(), any::<u32>(), any::<u32>()],
        software in any::<bool>(),
    ) {
        let [idr0, idr1, idr3, idr5] = idr;
        let read = IdRegisters { idr0, idr1, idr3, idr5 };
        let caps = Caps::from_registers(if software { IdRegisters::SOFTWARE } else { read });
        // Near to something legal.
        let tcr = Tcr::from_bits(tcr & keep | LINUX & !keep & !(3 << 62 | 1 << 35 | 1 << 6));
        let ttbr = [ttbr[0] >> shift[0] & !0xffff, ttbr[1] >> shift[1] & !0xffff];
        let registers = PageTableRegisters { asid, tcr, ttbr0: ttbr[0], ttbr1: ttbr[1], mair: 0xff };
        match PageTable::new(&registers, &caps) {
            Ok(table) => {
                let judged = context_from_cd(&table.cd().words(), &caps, false);
                prop_assert_eq!(judged, Ok(table.context()));
                prop_assert_eq!(PageTable::new(&table.registers(), &caps), Ok(table));
                prop_assert_eq!([tcr.epd0(), tcr.epd1()].map(|epd| !epd), table.extents().map(|part| part.is_some()));
                for (part, root) in table.extents().into_iter().zip(ttbr) {
                    if let Some((at, size)) = part {
                        prop_assert_eq!(at, Gpa(root));
                        prop_assert!(size.is_power_of_two() && at.0 % size == 0);
                    }
                }
            }
            Err(refusal) => prop_assert_ne!(refusal, PageTableRefusal::Descriptor),
        }
    }
}
