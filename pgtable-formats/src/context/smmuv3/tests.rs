use alloc::{format, vec::Vec};

use proptest::prelude::*;

use super::*;
use crate::{
    Access, AccessKind, FaultClass, Gpa, Iova, IovaRange, Pasid, TableAlloc, TableMem, context,
    context::BuildError,
    context::journal::Journal,
    edit::{EditOptions, Editor},
    format::Attrs,
    leaf::vmsav8::{Granule, Vmsav8},
    suite::FlatMem,
};

const BASE: Gpa = Gpa(0x4000_0000);
const OUTSIDE: Gpa = Gpa(0x9000_0000);
const VALID: u64 = 1 << 31;
const READ: Access = Access::READ;

fn caps() -> Caps {
    Caps::from_registers(IdRegisters::SOFTWARE)
}

fn memory() -> FlatMem {
    FlatMem::new(BASE, 0x40_0000)
}

fn pasid(value: u32) -> Pasid {
    Pasid::new(value).unwrap()
}

fn lower(root: Gpa) -> CdSpec {
    let half = HalfSpec { root, granule: Granule::K4, input_bits: 48 };
    CdSpec { asid: 7, lower: Some(half), upper: None, output_bits: 48, ds: false, mair: 0xff }
}

/// A legal descriptor of the 48-bit lower half.
fn legal() -> Cd {
    lower(Gpa(0x4010_0000)).encode(&caps()).unwrap()
}

fn judge_with(cd: &Cd, caps: &Caps) -> Result<Context, Event> {
    context_from_cd(&cd.words(), caps, false)
}

fn judge(cd: &Cd) -> Result<Context, Event> {
    judge_with(cd, &caps())
}

fn stage1(context: context::Context) -> Context {
    match context {
        context::Context::Stage1(context::Stage1::Smmuv3(context)) => context,
        other => panic!("{other:?} is no stage 1"),
    }
}

// ---- layouts ----

/// A field filled with ones occupies the bits that the manual gives it.
#[test]
fn fields_have_the_manual_s_bits() {
    fn bits(high: u32, low: u32) -> u64 {
        (u64::MAX >> (63 - high)) & !((1_u64 << low) - 1)
    }
    let ste0 = [
        (Ste0::new().with_valid(true), bits(0, 0)),
        (Ste0::new().with_config(7), bits(3, 1)),
        (Ste0::new().with_s1_fmt(3), bits(5, 4)),
        (Ste0::new().with_s1_context_ptr((1 << 46) - 1), bits(51, 6)),
        (Ste0::new().with_s1_context_ptr_high(15), bits(55, 52)),
        (Ste0::new().with_s1_cd_max(31), bits(63, 59)),
    ];
    for (word, mask) in ste0 {
        assert_eq!(word.into_bits(), mask, "{word:?}");
    }
    let ste1 = [
        (Ste1::new().with_s1_dss(3), bits(1, 0)),
        (Ste1::new().with_s1_cir(3), bits(3, 2)),
        (Ste1::new().with_s1_cor(3), bits(5, 4)),
        (Ste1::new().with_s1_csh(3), bits(7, 6)),
        (Ste1::new().with_s1_stalld(true), bits(91 - 64, 91 - 64)),
        (Ste1::new().with_eats(3), bits(93 - 64, 92 - 64)),
        (Ste1::new().with_strw(3), bits(95 - 64, 94 - 64)),
    ];
    for (word, mask) in ste1 {
        assert_eq!(word.into_bits(), mask, "{word:?}");
    }
    let word0 = [
        (CdWord0::new().with_t0sz(63), bits(5, 0)),
        (CdWord0::new().with_tg0(3), bits(7, 6)),
        (CdWord0::new().with_ir0(3), bits(9, 8)),
        (CdWord0::new().with_or0(3), bits(11, 10)),
        (CdWord0::new().with_sh0(3), bits(13, 12)),
        (CdWord0::new().with_epd0(true), bits(14, 14)),
        (CdWord0::new().with_endi(true), bits(15, 15)),
        (CdWord0::new().with_t1sz(63), bits(21, 16)),
        (CdWord0::new().with_tg1(3), bits(23, 22)),
        (CdWord0::new().with_ir1(3), bits(25, 24)),
        (CdWord0::new().with_or1(3), bits(27, 26)),
        (CdWord0::new().with_sh1(3), bits(29, 28)),
        (CdWord0::new().with_epd1(true), bits(30, 30)),
        (CdWord0::new().with_valid(true), bits(31, 31)),
        (CdWord0::new().with_ips(7), bits(34, 32)),
        (CdWord0::new().with_affd(true), bits(35, 35)),
        (CdWord0::new().with_wxn(true), bits(36, 36)),
        (CdWord0::new().with_uwxn(true), bits(37, 37)),
        (CdWord0::new().with_tbi0(true), bits(38, 38)),
        (CdWord0::new().with_tbi1(true), bits(39, 39)),
        (CdWord0::new().with_pan(true), bits(40, 40)),
        (CdWord0::new().with_aa64(true), bits(41, 41)),
        (CdWord0::new().with_hd(true), bits(42, 42)),
        (CdWord0::new().with_ha(true), bits(43, 43)),
        (CdWord0::new().with_stall(true), bits(44, 44)),
        (CdWord0::new().with_record(true), bits(45, 45)),
        (CdWord0::new().with_abort(true), bits(46, 46)),
        (CdWord0::new().with_aset(true), bits(47, 47)),
        (CdWord0::new().with_asid(u16::MAX), bits(63, 48)),
    ];
    for (word, mask) in word0 {
        assert_eq!(word.into_bits(), mask, "{word:?}");
    }
    let word1 = [
        (CdWord1::new().with_nscfg0(true), bits(0, 0)),
        (CdWord1::new().with_had0(true), bits(65 - 64, 65 - 64)),
        (CdWord1::new().with_e0pd0(true), bits(66 - 64, 66 - 64)),
        (CdWord1::new().with_haft(true), bits(67 - 64, 67 - 64)),
        (CdWord1::new().with_ttb0((1 << 48) - 1), bits(115 - 64, 68 - 64)),
        (CdWord1::new().with_ttb0_high(15), bits(119 - 64, 116 - 64)),
        (CdWord1::new().with_pnch(true), bits(122 - 64, 122 - 64)),
        (CdWord1::new().with_epan(true), bits(123 - 64, 123 - 64)),
        (CdWord1::new().with_hwu0(15), bits(127 - 64, 124 - 64)),
    ];
    for (word, mask) in word1 {
        assert_eq!(word.into_bits(), mask, "{word:?}");
    }
    let word2 = [
        (CdWord2::new().with_nscfg1(true), bits(0, 0)),
        (CdWord2::new().with_had1(true), bits(129 - 128, 129 - 128)),
        (CdWord2::new().with_e0pd1(true), bits(130 - 128, 130 - 128)),
        (CdWord2::new().with_aie(true), bits(131 - 128, 131 - 128)),
        (CdWord2::new().with_ttb1((1 << 48) - 1), bits(179 - 128, 132 - 128)),
        (CdWord2::new().with_ttb1_high(15), bits(183 - 128, 180 - 128)),
        (CdWord2::new().with_ds(true), bits(186 - 128, 186 - 128)),
        (CdWord2::new().with_pie(true), bits(187 - 128, 187 - 128)),
        (CdWord2::new().with_hwu1(15), bits(191 - 128, 188 - 128)),
    ];
    for (word, mask) in word2 {
        assert_eq!(word.into_bits(), mask, "{word:?}");
    }
    assert_eq!(CdWord5::new().with_impdef(u32::MAX).into_bits(), bits(351 - 320, 0));
    assert_eq!(CdWord5::new().with_partid(u16::MAX).into_bits(), bits(367 - 320, 352 - 320));
    assert_eq!(CdWord5::new().with_pmg(u8::MAX).into_bits(), bits(375 - 320, 368 - 320));
    assert_eq!(L1Cd::new().with_valid(true).into_bits(), bits(0, 0));
    assert_eq!(L1Cd::new().with_l2_ptr((1 << 40) - 1).into_bits(), bits(51, 12));
}

/// Entry and descriptor as Linux 7.3.4 wrote them, from `tests/captures/smmuv3-linux-7.3-4k`, endpoint 8.
#[test]
fn golden_linux_descriptor() {
    let words = [0x2_e204_c000_3510, 0x44ce_b000, 0, 0xffff_ffff_f404_ff44, 0, 0, 0, 0];
    let cd = Cd::from_words(words);
    assert_eq!(cd.words(), words);
    let word0 = cd.word0;
    assert_eq!((word0.t0sz(), word0.tg0(), word0.asid(), word0.ips()), (16, 0, 2, 4));
    assert!(word0.epd1() && !word0.epd0() && word0.aa64() && word0.record() && word0.abort() && word0.aset());
    let context = judge(&cd).unwrap();
    assert_eq!(context.asid(), 2);
    let half = context.half(Iova(0)).unwrap().params();
    assert_eq!((half.root, half.output_lg2, half.input_lg2), (Gpa(0x44ce_b000), 44, 48));
    assert_eq!(context.half(Iova(u64::MAX)), None);
}

#[test]
fn event_names_and_numbers() {
    for event in Event::ALL {
        assert_eq!(Event::from_id(event.id()), Some(event));
        assert_eq!(format!("{event}"), event.name());
    }
    assert_eq!((Event::CBadCd.id(), Event::FPermission.id(), Event::FVmsFetch.id()), (0x0a, 0x13, 0x25));
    assert_eq!((Event::FTranslation.id(), Event::FTranslation.name()), (0x10, "F_TRANSLATION"));
    assert_eq!(Event::from_id(0x0c), None);
    assert_eq!(Event::FTranslation.class(), FaultClass::NotMapped);
    assert_eq!(Event::FWalkEabt.class(), FaultClass::TableAccess);
}

// ---- capabilities ----

#[test]
fn registers_decode() {
    // From the capture: QEMU's SMMUv3 as Linux saw it.
    let registers = IdRegisters { idr0: 0x0d44_101b, idr1: 0x0273_0010, idr3: 0x1414, idr5: 0x74 };
    let caps = Caps::from_registers(registers);
    assert_eq!(caps.registers(), registers);
    assert_eq!((caps.ssid_bits, caps.two_level_cd, caps.asid16, caps.httu), (0, false, true, 0));
    assert_eq!((caps.oas_bits, caps.input_bits, caps.ds, caps.had), (44, 48, false, true));
    assert_eq!(caps.stall_model, StallModel::Terminate);
    assert_eq!(caps.endianness, TableEndianness::Little);
    assert!(caps.always_abort && caps.aarch64);
    assert!(Granule::ALL.into_iter().all(|granule| caps.has_granule(granule)));

    let filtered = registers.filtered();
    assert_eq!(filtered, filtered.filtered());
    assert_eq!(Idr0::from_bits(filtered.idr0).st_level(), 1);
    // VMID16, COHACC and S2P go, HAD and OAS too.
    assert_eq!((filtered.idr0, filtered.idr3, filtered.idr5), (0x0d40_100a, 0x1400, 0x70));
    assert_eq!(filtered.with_output_bits(44), IdRegisters { idr5: 0x74, ..filtered });

    let all = IdRegisters { idr0: u32::MAX, idr1: u32::MAX, idr3: u32::MAX, idr5: u32::MAX }.filtered();
    assert_eq!((all.idr0, all.idr1, all.idr3, all.idr5), (0x1f68_100e, 0x7ff, 0x1c00, 0xcf0));
}

#[test]
fn output_bits_round_down() {
    for (bits, oas) in
        [(0, 32), (35, 32), (36, 36), (40, 40), (43, 42), (47, 44), (48, 48), (52, 52), (64, 52)]
    {
        let caps = Caps::from_registers(IdRegisters::SOFTWARE.with_output_bits(bits));
        assert_eq!(caps.oas_bits, oas, "{bits}");
    }
}

// ---- binding ----

const DSS_PASID0: u64 = 2;

fn ste0(base: u64, fmt: u64, cd_max: u64) -> u64 {
    base | fmt << 4 | cd_max << 59
}

#[test]
fn ignored_bits_of_an_entry_are_masked() {
    let plain = CdTable::from_ste(ste0(0x4000_0000, 0, 3), DSS_PASID0, &caps()).unwrap();
    // V, Config, S1ContextPtr[55:52], reserved bits 58:56.
    let noise0 = 0xf | 0x7f << 52;
    // Everything but S1DSS, the fetch attributes and EATS.
    let noise1 = !(0xff | 3 << 28);
    let noisy = CdTable::from_ste(ste0(0x4000_0000, 0, 3) | noise0, DSS_PASID0 | noise1, &caps()).unwrap();
    assert_eq!(plain, noisy);
    assert_eq!(noisy.words(), [ste0(0x4000_0000, 0, 3) | 0xb, DSS_PASID0]);
}

#[test]
fn canonical_words() {
    let table = CdTable::from_ste(ste0(0x4000_0000, 2, 16), 0xd7 | 3 << 28, &caps()).unwrap();
    // S1DSS 3 acts as 0, EATS becomes full ATS.
    assert_eq!(table.words(), [ste0(0x4000_0000, 2, 16) | 0xb, 0xd4 | 1 << 28]);
    assert!(table.ats());
    assert_eq!(
        (table.untagged(), table.format(), table.pasid_bits()),
        (Untagged::Terminate, TableFormat::TwoLevel64K, 16)
    );
    // The format has no meaning without PASIDs.
    let table = CdTable::from_ste(ste0(0x4000_0000, 3, 0), 0, &caps()).unwrap();
    assert_eq!(table.words(), [ste0(0x4000_0000, 0, 0) | 0xb, 0]);
}

#[test]
fn extents_follow_format_and_size() {
    let cases = [
        (0, 0, 64),
        (0, 1, 128),
        (0, 20, 64 << 20),
        (1, 6, 8),
        (1, 9, 64),
        (1, 10, 128),
        (1, 20, 16384 * 8),
        (2, 10, 8),
        (2, 13, 64),
        (2, 20, 1024 * 8),
    ];
    for (fmt, cd_max, bytes) in cases {
        let table = CdTable::from_ste(ste0(0x4000_0000, fmt, cd_max), 0, &caps()).unwrap();
        assert_eq!(table.extents(), (Gpa(0x4000_0000), bytes), "{fmt} {cd_max}");
    }
}

#[test]
fn refusals() {
    let full = caps();
    let linear = Caps { two_level_cd: false, ssid_bits: 8, ..full };
    let none = Caps { ssid_bits: 0, ..full };
    let narrow = Caps { oas_bits: 32, ..full };
    let bits = |asked, implemented| SteRefusal::PasidBits { asked, implemented };
    let cases = [
        (ste0(0x4000_0000, 0, 21), &full, bits(21, 20), true),
        (ste0(0x4000_0000, 0, 31), &full, bits(31, 20), true),
        (ste0(0x4000_0000, 0, 9), &linear, bits(9, 8), true),
        (ste0(0x4000_0000, 0, 1), &none, bits(1, 0), true),
        (ste0(0x4000_0000, 1, 8), &linear, SteRefusal::TwoLevel, true),
        (ste0(0x4000_0000, 2, 8), &linear, SteRefusal::TwoLevel, true),
        (ste0(0x4000_0000, 3, 1), &full, SteRefusal::Format, false),
        (ste0(0x1_0000_0000, 0, 0), &narrow, SteRefusal::AddressSize { bits: 32 }, false),
        (ste0(0x4000_0040, 0, 1), &full, SteRefusal::Alignment { size: 128 }, false),
        (ste0(0x4000_0800, 0, 6), &full, SteRefusal::Alignment { size: 4096 }, false),
        (ste0(0x4000_0040, 1, 10), &full, SteRefusal::Alignment { size: 128 }, false),
        (ste0(0x4000_0040, 2, 14), &full, SteRefusal::Alignment { size: 128 }, false),
    ];
    for (ste0, caps, refusal, unsupported) in cases {
        assert_eq!(CdTable::from_ste(ste0, 0, caps), Err(refusal), "{ste0:#x}");
        assert_eq!(refusal.is_unsupported(), unsupported, "{refusal:?}");
    }
    // The smallest alignment of each format: what a pointer can express.
    for (fmt, cd_max) in [(0, 0), (1, 9), (2, 13)] {
        CdTable::from_ste(ste0(0x4000_0040, fmt, cd_max), 0, &full).unwrap();
    }
}

// ---- lookup ----

#[test]
fn untagged_and_tagged_dma_by_s1dss() {
    let memory = memory();
    for index in 0..4 {
        for (word, value) in legal().words().into_iter().enumerate() {
            memory.store(Gpa(BASE.0 + index * 64 + 8 * word as u64), value).unwrap();
        }
    }
    let bad = Err(Event::CBadSubstreamid);
    let disabled = Err(Event::FStreamDisabled);
    let ok = Ok(Some(context::Context::Stage1(context::Stage1::Smmuv3(judge(&legal()).unwrap()))));
    let bypass = Ok(Some(context::Context::Bypass));
    // S1CDMax, S1DSS -> untagged, PASID 0, PASID 3, PASID 4
    let cases = [
        (0, 0, [ok, bad, bad, bad]),
        (0, 1, [ok, bad, bad, bad]),
        (0, 2, [ok, bad, bad, bad]),
        (2, 0, [disabled, ok, ok, bad]),
        (2, 1, [bypass, ok, ok, bad]),
        (2, 2, [ok, disabled, ok, bad]),
        (2, 3, [disabled, ok, ok, bad]),
    ];
    for (cd_max, dss, expected) in cases {
        let table = CdTable::from_ste(ste0(BASE.0, 0, cd_max), dss, &caps()).unwrap();
        for (tag, expected) in [None, Pasid::new(0), Pasid::new(3), Pasid::new(4)].into_iter().zip(expected) {
            assert_eq!(table.lookup(&memory, tag).map(Some), expected, "{cd_max} {dss} {tag:?}");
            // A cache tag exists exactly where a descriptor is used.
            let used = matches!(expected, Ok(Some(context::Context::Stage1(_))));
            assert_eq!(table.effective_pasid(tag), used.then(|| tag.unwrap_or(Pasid::ZERO)));
        }
    }
}

#[test]
fn lookup_faults_in_the_order_of_the_manual() {
    let memory = memory();
    let outside = |fmt, cd_max, dss| CdTable::from_ste(ste0(OUTSIDE.0, fmt, cd_max), dss, &caps()).unwrap();
    // The PASID is judged before anything is read, S1DSS too.
    assert_eq!(outside(0, 2, 2).lookup(&memory, Pasid::new(4)), Err(Event::CBadSubstreamid));
    assert_eq!(outside(0, 2, 2).lookup(&memory, Pasid::new(0)), Err(Event::FStreamDisabled));
    assert_eq!(outside(0, 2, 2).lookup(&memory, None), Err(Event::FCdFetch));
    assert_eq!(outside(1, 8, 0).lookup(&memory, Pasid::new(1)), Err(Event::FCdFetch));

    // Level 1: not valid, then too wide, then the level-2 table not in memory, then the descriptor.
    let table = CdTable::from_ste(ste0(BASE.0, 1, 8), 0, &caps()).unwrap();
    let l1 = Gpa(BASE.0 + 8);
    let lookup = || table.lookup(&memory, Pasid::new(64 + 5));
    memory.store(l1, BASE.0 + 0x1000).unwrap();
    assert_eq!(lookup(), Err(Event::CBadSubstreamid), "V=0");
    memory.store(l1, 1 << 48 | 1).unwrap();
    assert_eq!(lookup(), Err(Event::CBadSubstreamid), "L2Ptr beyond OAS");
    memory.store(l1, OUTSIDE.0 | 1).unwrap();
    assert_eq!(lookup(), Err(Event::FCdFetch));
    memory.store(l1, (BASE.0 + 0x1000) | 1).unwrap();
    assert_eq!(lookup(), Err(Event::CBadCd), "V=0");
    for (word, value) in legal().words().into_iter().enumerate() {
        memory.store(Gpa(BASE.0 + 0x1000 + 5 * 64 + 8 * word as u64), value).unwrap();
    }
    assert_eq!(stage1(lookup().unwrap()).asid(), 7);

    // 64 KiB leaves: bits 15:12 of L2Ptr are reserved and masked.
    let table = CdTable::from_ste(ste0(BASE.0, 2, 11), 0, &caps()).unwrap();
    memory.store(l1, (BASE.0 + 0x1_0000) | 0xf000 | 1).unwrap();
    let at = BASE.0 + 0x1_0000 + 1023 * 64;
    for (word, value) in legal().words().into_iter().enumerate() {
        memory.store(Gpa(at + 8 * word as u64), value).unwrap();
    }
    assert_eq!(stage1(table.lookup(&memory, Pasid::new(2047)).unwrap()).asid(), 7);
}

/// Level 1 has one entry where level 2 resolves more bits than S1CDMax has, and S1CDMax is the bound all the same.
#[test]
fn two_levels_for_a_few_pasids() {
    let memory = memory();
    let leaf = BASE.0 + 0x1_0000;
    memory.store(BASE, leaf | 1).unwrap();
    for value in [7, 8] {
        for (word, bits) in legal().words().into_iter().enumerate() {
            memory.store(Gpa(leaf + value * 64 + 8 * word as u64), bits).unwrap();
        }
    }
    for fmt in [1, 2] {
        let table = CdTable::from_ste(ste0(BASE.0, fmt, 3), 0, &caps()).unwrap();
        assert_eq!(table.extents(), (BASE, 8));
        assert_eq!(stage1(table.lookup(&memory, Pasid::new(7)).unwrap()).asid(), 7);
        assert_eq!(table.lookup(&memory, Pasid::new(8)), Err(Event::CBadSubstreamid));
    }
}

#[test]
fn a_table_that_refers_to_itself_ends() {
    let memory = memory();
    memory.store(BASE, BASE.0 | 1).unwrap();
    let table = CdTable::from_ste(ste0(BASE.0, 1, 8), 2, &caps()).unwrap();
    assert_eq!(table.lookup(&memory, None), Err(Event::CBadCd));
}

// ---- judging a descriptor ----

/// Every condition of `CdIllegal()` that concerns this stream world: the change that breaks it, and the capabilities.
#[test]
fn c_bad_cd_list() {
    let full = caps();
    let legal = legal();
    let word0 = |change: fn(CdWord0) -> CdWord0| Cd { word0: change(legal.word0), ..legal };
    let two_halves = |change: fn(CdWord0) -> CdWord0| {
        let half = HalfSpec { root: Gpa(0x4010_0000), granule: Granule::K4, input_bits: 48 };
        let cd = CdSpec { upper: Some(half), ..lower(Gpa(0x4010_0000)) }.encode(&full).unwrap();
        Cd { word0: change(cd.word0), ..cd }
    };
    let stall_both = Caps { stall_model: StallModel::Both, ..full };
    let stall_forced = Caps { stall_model: StallModel::Stall, ..full };
    let mixed = Caps { endianness: TableEndianness::Both, ..full };
    let big = Caps { endianness: TableEndianness::Big, ..full };
    let httu = |httu| Caps { httu, ..full };
    let wide = Caps { oas_bits: 52, input_bits: 52, ds: true, ..full };
    let small = Caps { stt: true, ..full };
    let ttb = |address: u64| Cd { word1: CdWord1::new().with_ttb0(address >> 4), ..legal };
    let with_ds = |cd: Cd| Cd { word2: cd.word2.with_ds(true), ..cd };
    let bad: Vec<(&str, Cd, Caps)> = [
        ("V=0", word0(|w| w.with_valid(false)), full),
        ("S1STALLD=1 and S=1", word0(|w| w.with_stall(true)), stall_both),
        ("TERM_MODEL=1 and A=0", word0(|w| w.with_abort(false)), full),
        ("STALL_MODEL=1 and S=1", word0(|w| w.with_stall(true)), full),
        ("STALL_MODEL=2 and S=0", legal, stall_forced),
        ("ENDI=1, little-endian only", word0(|w| w.with_endi(true)), full),
        ("ENDI=0, big-endian only", legal, big),
        ("AA64=0", word0(|w| w.with_aa64(false)), full),
        ("AA64=1 without TTF[1]", legal, Caps { aarch64: false, ..full }),
        ("HA=1 with HTTU=0", word0(|w| w.with_ha(true)), full),
        ("HD=1 with HTTU=0", word0(|w| w.with_hd(true)), full),
        ("HD=1 with HTTU=1", word0(|w| w.with_ha(true).with_hd(true)), httu(1)),
        ("HAFT=1 and HA=0 with HTTU=3", Cd { word1: legal.word1.with_haft(true), ..legal }, httu(3)),
        ("ASID of 16 bits", word0(|w| w.with_asid(0x100)), Caps { asid16: false, ..full }),
        ("T0SZ > 39", word0(|w| w.with_t0sz(40)), full),
        ("T0SZ > 48 with STT", word0(|w| w.with_t0sz(49)), small),
        ("T0SZ > 47 with STT and 64 KiB", word0(|w| w.with_t0sz(48).with_tg0(1)), small),
        ("T0SZ < 16", word0(|w| w.with_t0sz(15)), full),
        ("T0SZ < 16 with VAX but neither 64 KiB nor DS", word0(|w| w.with_t0sz(15)), wide),
        ("T0SZ < 16 with 64 KiB but without VAX", word0(|w| w.with_t0sz(15).with_tg0(1)), full),
        ("T0SZ < 12", with_ds(word0(|w| w.with_t0sz(11))), wide),
        ("DS without IDR5.DS", with_ds(word0(|w| w.with_t0sz(12))), Caps { ds: false, ..wide }),
        ("T1SZ > 39", two_halves(|w| w.with_t1sz(40)), full),
        ("T1SZ < 16", two_halves(|w| w.with_t1sz(15)), full),
        ("TG0 reserved", word0(|w| w.with_tg0(3)), full),
        ("TG1 reserved", two_halves(|w| w.with_tg1(0)), full),
        ("4 KiB not implemented", legal, Caps { granule_4k: false, ..full }),
        ("64 KiB not implemented", word0(|w| w.with_tg0(1)), Caps { granule_64k: false, ..full }),
        ("16 KiB not implemented", word0(|w| w.with_tg0(2)), Caps { granule_16k: false, ..full }),
        ("16 KiB not implemented, upper", two_halves(|w| w.with_tg1(1)), Caps { granule_16k: false, ..full }),
        ("TTB0 beyond IPS", Cd { word0: legal.word0.with_ips(0), ..ttb(1 << 32) }, full),
        ("TTB0 beyond OAS", ttb(1 << 44), Caps { oas_bits: 44, ..full }),
        ("TTB0 beyond 48 bits, 4 KiB", Cd { word0: legal.word0.with_ips(6), ..ttb(1 << 48) }, wide),
        (
            "TTB1 beyond IPS",
            Cd { word2: CdWord2::new().with_ttb1(1 << 40 >> 4), ..two_halves(|w| w.with_ips(0)) },
            full,
        ),
    ]
    .into();
    for (why, cd, caps) in bad {
        assert_eq!(judge_with(&cd, &caps), Err(Event::CBadCd), "{why}");
    }
    let good: Vec<(&str, Cd, Caps)> = [
        ("S=1 where the endpoint may stall is judged below", legal, stall_both),
        ("S=1 where stalls are forced", word0(|w| w.with_stall(true)), stall_forced),
        ("A=0 with TERM_MODEL=0", word0(|w| w.with_abort(false)), Caps { always_abort: false, ..full }),
        ("ENDI=1, both", word0(|w| w.with_endi(true)), mixed),
        ("ENDI=1, both halves disabled", word0(|w| w.with_endi(true).with_epd0(true)), full),
        ("HA=1 with HTTU=1", word0(|w| w.with_ha(true)), httu(1)),
        ("HD=1 with HTTU=2", word0(|w| w.with_ha(true).with_hd(true)), httu(2)),
        ("HAFT=1 with HTTU=2 is reserved", Cd { word1: legal.word1.with_haft(true), ..legal }, httu(2)),
        ("ASID of 8 bits", word0(|w| w.with_asid(0xff)), Caps { asid16: false, ..full }),
        ("T0SZ 39", word0(|w| w.with_t0sz(39)), full),
        ("T0SZ 48 with STT", word0(|w| w.with_t0sz(48)), small),
        ("T0SZ 47 with STT and 64 KiB", word0(|w| w.with_t0sz(47).with_tg0(1)), small),
        ("T0SZ 12 with VAX and 64 KiB", word0(|w| w.with_t0sz(12).with_tg0(1)), wide),
        ("T0SZ 12 with VAX and DS", with_ds(word0(|w| w.with_t0sz(12))), wide),
        ("EPD0 hides T0SZ, TG0 and TTB0", word0(|w| w.with_epd0(true).with_t0sz(63).with_tg0(3)), full),
        ("EPD1 hides T1SZ and TG1", two_halves(|w| w.with_epd1(true).with_t1sz(0).with_tg1(0)), full),
        (
            "TTB0 beyond 48 bits, 64 KiB",
            Cd { word0: legal.word0.with_ips(6).with_tg0(1), ..ttb(1 << 48) },
            wide,
        ),
        ("IPS beyond OAS", word0(|w| w.with_ips(7)), full),
        ("reserved and unsupported fields", Cd { piiu: u64::MAX, piip: u64::MAX, amair: 1, ..legal }, full),
    ]
    .into();
    for (why, cd, caps) in good {
        assert!(judge_with(&cd, &caps).is_ok(), "{why}");
    }
    let stalling = word0(|w| w.with_stall(true));
    assert!(context_from_cd(&stalling.words(), &stall_both, true).is_ok(), "S=1, the endpoint may stall");
    assert_eq!(context_from_cd(&stalling.words(), &full, true), Err(Event::CBadCd), "nothing stalls here");
}

#[test]
fn r_and_s_say_whether_faults_are_recorded() {
    let caps = Caps { stall_model: StallModel::Both, ..caps() };
    for (record, stall, records) in
        [(true, false, true), (false, false, false), (true, true, true), (false, true, true)]
    {
        let mut cd = legal();
        cd.word0 = cd.word0.with_record(record).with_stall(stall);
        let context = context_from_cd(&cd.words(), &caps, true).unwrap();
        assert_eq!(context.records(), records, "R {record}, S {stall}");
    }
    let heeding: Vec<_> = Event::ALL.into_iter().filter(|event| event.heeds_r()).collect();
    assert_eq!(heeding, [Event::FTranslation, Event::FAddrSize, Event::FAccess, Event::FPermission]);
}

#[test]
fn stalling_endpoints() {
    let caps = Caps { stall_model: StallModel::Both, ..caps() };
    let memory = memory();
    let stalling = Cd { word0: legal().word0.with_stall(true), ..legal() };
    for (word, value) in stalling.words().into_iter().enumerate() {
        memory.store(Gpa(BASE.0 + 8 * word as u64), value).unwrap();
    }
    let table = CdTable::from_ste(ste0(BASE.0, 0, 0), 0, &caps).unwrap();
    assert_eq!(table.words()[1] >> 27 & 1, 1, "S1STALLD");
    assert_eq!(table.lookup(&memory, None), Err(Event::CBadCd));
    let table = table.with_stall(true);
    assert_eq!(table.words()[1] >> 27 & 1, 0);
    assert!(table.lookup(&memory, None).is_ok());
    // S1STALLD is illegal where stalling is not optional.
    let table = CdTable::from_ste(ste0(BASE.0, 0, 0), 1 << 27, &self::caps()).unwrap();
    assert_eq!(table.words()[1] >> 27 & 1, 0);
}

#[test]
fn fields_reach_the_walk() {
    use crate::leaf::vmsav8::Vmsav8Flags as Flags;
    let everything = Caps { httu: 2, had: true, e0pd: true, epan: true, ..caps() };
    let half = HalfSpec { root: Gpa(0x4010_0000), granule: Granule::K4, input_bits: 48 };
    let mut cd = CdSpec { upper: Some(half), ..lower(Gpa(0x4010_0000)) }.encode(&everything).unwrap();
    let flags = |cd: &Cd, caps: &Caps| {
        let context = judge_with(cd, caps).unwrap();
        [0, u64::MAX].map(|iova| context.half(Iova(iova)).unwrap().params().flags)
    };
    assert_eq!(flags(&cd, &everything), [Flags::empty(); 2]);
    cd.word0.set_tbi0(true);
    cd.word2.set_had1(true);
    cd.word1.set_e0pd0(true);
    assert_eq!(flags(&cd, &everything), [Flags::TBI | Flags::E0PD, Flags::HAD]);
    assert_eq!(flags(&cd, &Caps { had: false, e0pd: false, ..everything }), [Flags::TBI, Flags::empty()]);
    cd.word0 = cd.word0.with_tbi0(false).with_tbi1(true).with_affd(true).with_ha(true).with_hd(true);
    cd.word0 = cd.word0.with_wxn(true).with_pan(true);
    cd.word1 = cd.word1.with_e0pd0(false).with_had0(true).with_epan(true);
    cd.word2 = cd.word2.with_had1(false).with_e0pd1(true);
    let both = Flags::AFFD | Flags::HA | Flags::HD | Flags::WXN | Flags::PAN | Flags::EPAN;
    assert_eq!(flags(&cd, &everything), [both | Flags::HAD, both | Flags::TBI | Flags::E0PD]);
}

// ---- walks ----

struct Mapped {
    memory: FlatMem,
    context: Context,
}

const IOVA: Iova = Iova(0x12_3456_7000);
const OUTPUT: Gpa = Gpa(0x8_0000_0000);

fn edit(memory: &mut FlatMem, half: Vmsav8, iova: Iova, output: Gpa, attrs: Attrs) {
    let range = IovaRange::from_length(iova, 1 << half.params().granule.lg2()).unwrap();
    Editor::new(half, memory, EditOptions::default()).map(range, output, attrs).unwrap();
}

/// One page is mapped at [`IOVA`] through the lower half.
fn mapped(attrs: Attrs) -> Mapped {
    let mut memory = memory();
    let root = memory.alloc(12).unwrap();
    let context = judge(&lower(root).encode(&caps()).unwrap()).unwrap();
    edit(&mut memory, *context.half(IOVA).unwrap(), IOVA, OUTPUT, attrs);
    Mapped { memory, context }
}

impl Mapped {
    /// Address of the entry that the walk for [`IOVA`] reads at `level` (3 is the root's).
    fn entry(&self, level: u32) -> Gpa {
        let mut table = self.context.half(IOVA).unwrap().params().root;
        for upper in (level + 1..=3).rev() {
            let at = table.0 + (IOVA.0 >> (12 + 9 * upper) & 0x1ff) * 8;
            table = Gpa(self.memory.load(Gpa(at)).unwrap() & 0xffff_ffff_f000);
        }
        Gpa(table.0 + (IOVA.0 >> (12 + 9 * level) & 0x1ff) * 8)
    }

    fn change(&self, level: u32, change: impl Fn(u64) -> u64) {
        let at = self.entry(level);
        self.memory.store(at, change(self.memory.load(at).unwrap())).unwrap();
    }

    fn walk(&self, access: Access) -> Result<Gpa, Event> {
        self.context.walk(&self.memory, IOVA, access).map(|translation| translation.apply(IOVA))
    }
}

#[test]
fn walk_events() {
    const AF: u64 = 1 << 10;
    let fresh = || mapped(Attrs::READ);
    assert_eq!(fresh().walk(READ), Ok(OUTPUT));
    assert_eq!(fresh().walk(Access::WRITE), Err(Event::FPermission));
    for level in 0..4 {
        let case = fresh();
        case.change(level, |entry| entry & !1);
        assert_eq!(case.walk(READ), Err(Event::FTranslation), "level {level}");
        // The address is judged by IPS, which is 48 bits here and cannot be exceeded; a table outside memory can.
        if level > 0 {
            let case = fresh();
            case.change(level, |entry| entry & 0xfff | OUTSIDE.0);
            assert_eq!(case.walk(READ), Err(Event::FWalkEabt), "level {level}");
        }
    }
    let case = fresh();
    case.change(0, |entry| entry & !AF);
    assert_eq!(case.walk(Access::WRITE), Err(Event::FAccess), "F_ACCESS before F_PERMISSION");
    // Outside of the input range, in the hole, in the disabled half.
    for iova in [1 << 48, 1 << 54, 1 << 55, u64::MAX] {
        assert_eq!(fresh().context.walk(&fresh().memory, Iova(iova), READ), Err(Event::FTranslation));
    }
    let mut case = fresh();
    case.context = judge(&lower(OUTSIDE).encode(&caps()).unwrap()).unwrap();
    assert_eq!(case.walk(READ), Err(Event::FWalkEabt), "root outside memory");
}

#[test]
fn effective_output_size_is_the_smaller_of_ips_and_oas() {
    let mut memory = memory();
    let root = memory.alloc(12).unwrap();
    let wide = judge(&lower(root).encode(&caps()).unwrap()).unwrap();
    edit(&mut memory, *wide.half(IOVA).unwrap(), IOVA, Gpa(1 << 40), Attrs::READ);
    assert!(wide.walk(&memory, IOVA, READ).is_ok());
    let by_ips = judge(&CdSpec { output_bits: 40, ..lower(root) }.encode(&caps()).unwrap()).unwrap();
    assert_eq!(by_ips.walk(&memory, IOVA, READ), Err(Event::FAddrSize));
    let narrow = Caps { oas_bits: 40, ..caps() };
    let by_oas = judge_with(&lower(root).encode(&narrow).unwrap(), &narrow).unwrap();
    assert_eq!(by_oas.walk(&memory, IOVA, READ), Err(Event::FAddrSize));
}

/// What an entry says of output bits 51:48 is judged by IPS where it counts, and ignored where it does not.
#[test]
fn output_bits_51_to_48_by_granule_ds_oas_and_ips() {
    let large = Caps { oas_bits: 52, ds: true, ..caps() };
    let (ok, size) = (Ok(Gpa(0)), Err(Event::FAddrSize));
    for (granule, ds, caps, output_bits, bit, expected) in [
        (Granule::K4, false, large, 52, 48, ok),
        (Granule::K4, true, large, 52, 48, Ok(Gpa(1 << 48))),
        (Granule::K4, true, large, 48, 48, size),
        (Granule::K16, true, large, 52, 9, Ok(Gpa(1 << 51))),
        (Granule::K16, true, large, 48, 9, size),
        (Granule::K64, false, large, 52, 15, Ok(Gpa(1 << 51))),
        (Granule::K64, false, large, 48, 15, size),
        (Granule::K64, false, caps(), 52, 15, ok),
    ] {
        let mut memory = memory();
        let root = memory.alloc(16).unwrap();
        let half = HalfSpec { root, granule, input_bits: 25 };
        let spec = CdSpec { lower: Some(half), ds, output_bits, ..lower(root) };
        let context = judge_with(&spec.encode(&caps).unwrap(), &caps).unwrap();
        let (mut table, mut level) = (root, context.half(Iova(0)).unwrap().params().top_level());
        while level > 0 {
            let below = memory.alloc(16).unwrap();
            memory.store(table, below.0 | 3).unwrap();
            (table, level) = (below, level - 1);
        }
        memory.store(table, 1 << bit | 0b100_0100_0011).unwrap();
        let found = context.walk(&memory, Iova(0), READ).map(|found| found.output);
        assert_eq!(found, expected, "{granule:?} DS {ds} IPS {output_bits} bit {bit}");
    }
}

/// IDR5.VAX and OAS are independent.
#[test]
fn input_of_52_bits_with_output_of_48() {
    let vax = Caps { input_bits: 52, ..caps() };
    let half = HalfSpec { root: Gpa(0x4010_0000), granule: Granule::K64, input_bits: 52 };
    let cd = CdSpec { lower: Some(half), ..lower(half.root) }.encode(&vax).unwrap();
    let params = judge_with(&cd, &vax).unwrap().half(Iova(0)).unwrap().params();
    assert_eq!((params.input_lg2, params.output_lg2, params.wide), (52, 48, false));
}

#[test]
fn bit_55_selects_the_half() {
    let mut memory = memory();
    let roots = [memory.alloc(12).unwrap(), memory.alloc(16).unwrap()];
    let spec = CdSpec {
        upper: Some(HalfSpec { root: roots[1], granule: Granule::K64, input_bits: 42 }),
        ..lower(roots[0])
    };
    let context = judge(&spec.encode(&caps()).unwrap()).unwrap();
    let high = Iova(!0x3ff_ffff_ffff | 0x1_0000);
    edit(&mut memory, *context.half(IOVA).unwrap(), IOVA, OUTPUT, Attrs::READ);
    edit(&mut memory, *context.half(high).unwrap(), high, Gpa(0x9_0000_0000), Attrs::READ_WRITE);
    assert_eq!(context.walk(&memory, IOVA, READ).unwrap().output, OUTPUT);
    let translation = context.walk(&memory, high, Access::WRITE).unwrap();
    assert_eq!((translation.output, translation.size_lg2, translation.iova), (Gpa(0x9_0000_0000), 16, high));
    assert_eq!(context.walk(&memory, Iova(high.0 & !(1 << 60)), READ), Err(Event::FTranslation));
}

#[test]
fn big_endian_tables() {
    let case = mapped(Attrs::READ_WRITE);
    let mixed = Caps { endianness: TableEndianness::Both, httu: 2, ..caps() };
    let root = case.context.half(IOVA).unwrap().params().root;
    let spec = lower(root).encode(&mixed).unwrap();
    let cd = Cd { word0: spec.word0.with_endi(true).with_ha(true), ..spec };
    let big = judge_with(&cd, &mixed).unwrap();
    assert!(big.is_big_endian());
    // From the leaf up, so that the way down can still be read.
    case.change(0, |entry| entry & !(1 << 10));
    for level in 0..4 {
        case.change(level, u64::swap_bytes);
    }
    let leaf_table = big.walk(&case.memory, IOVA, READ).unwrap();
    assert_eq!(leaf_table.output, OUTPUT);
    // The access flag was set in the right byte: a walk that may not set it passes now.
    let frozen = judge_with(&Cd { word0: cd.word0.with_ha(false), ..cd }, &mixed).unwrap();
    assert_eq!(frozen.walk(&case.memory, IOVA, READ).unwrap().output, OUTPUT);
    assert_ne!(case.walk(READ), Ok(OUTPUT), "little-endian");
}

#[test]
fn privileged_and_instruction_accesses() {
    let execute = Access { kind: AccessKind::Execute, privileged: false };
    assert_eq!(mapped(Attrs::READ).walk(execute), Err(Event::FPermission));
    assert!(mapped(Attrs { execute: true, ..Attrs::READ }).walk(execute).is_ok());
    let kernel = mapped(Attrs { user: false, ..Attrs::READ });
    assert_eq!(kernel.walk(READ), Err(Event::FPermission));
    assert!(kernel.walk(Access { privileged: true, ..READ }).is_ok());
}

// ---- building ----

#[test]
fn descriptors_that_no_smmu_takes_are_not_made() {
    let good = lower(Gpa(0x4010_0000));
    let half = good.lower.unwrap();
    let with = |half| CdSpec { lower: Some(half), ..good };
    let bad = [
        with(HalfSpec { root: Gpa(0x4010_0800), ..half }),
        with(HalfSpec { root: Gpa(1 << 52), ..half }),
        with(HalfSpec { input_bits: 52, ..half }),
        with(HalfSpec { input_bits: 0, ..half }),
        with(HalfSpec { input_bits: 24, ..half }),
        with(HalfSpec { root: Gpa(1 << 40), ..half }).with_output(32),
        good.with_output(53),
        CdSpec { lower: None, upper: Some(HalfSpec { root: Gpa(0x30), input_bits: 25, ..half }), ..good },
    ];
    for spec in bad {
        assert_eq!(spec.encode(&caps()), Err(SpecError), "{spec:?}");
    }
    let narrow = Caps { asid16: false, granule_4k: false, ..caps() };
    assert_eq!(good.encode(&narrow), Err(SpecError));
    let k64 = with(HalfSpec { granule: Granule::K64, root: Gpa(0x4010_0200), input_bits: 48 });
    assert!(k64.encode(&narrow).is_ok(), "the first table of a 48-bit range with 64 KiB has 64 entries");
    assert_eq!(CdSpec { asid: 0x100, ..k64 }.encode(&narrow), Err(SpecError));
    // No half at all faults everything.
    let none = judge(&CdSpec { lower: None, ..good }.encode(&caps()).unwrap()).unwrap();
    assert_eq!(none.walk(&memory(), IOVA, READ), Err(Event::FTranslation));
    // Big-endian and stalling hardware gets what it insists on.
    let odd = Caps { endianness: TableEndianness::Big, stall_model: StallModel::Stall, ..caps() };
    let cd = good.encode(&odd).unwrap();
    assert!(cd.word0.endi() && cd.word0.stall() && judge_with(&cd, &odd).is_ok());
}

impl CdSpec {
    fn with_output(self, output_bits: u8) -> Self {
        Self { output_bits, ..self }
    }
}

#[test]
fn tables_of_every_format_are_built_and_released() {
    for (format, leaf_lg2) in
        [(TableFormat::Linear, 0), (TableFormat::TwoLevel4K, 12), (TableFormat::TwoLevel64K, 16)]
    {
        let mut memory = memory();
        let table = CdTable::create(format, 11, Untagged::Pasid0, &caps(), &mut memory).unwrap();
        assert_eq!(memory.tables(), 1);
        // What is bound describes the same table.
        let [word0, word1] = table.words();
        assert_eq!(CdTable::from_ste(word0, word1, &caps()), Ok(table));
        let cd = |asid| CdSpec { asid, ..lower(Gpa(0x4010_0000)) }.encode(&caps()).unwrap();
        for value in [0_u32, 63, 64, 1023, 1024, 2047] {
            let fresh = table.read(&memory, pasid(value)).unwrap();
            let tables = memory.tables();
            let asid = u16::try_from(value + 1).unwrap();
            let level1 = table.write(&mut memory, pasid(value), &cd(asid)).unwrap();
            assert_eq!(level1, fresh.is_none());
            assert_eq!(memory.tables() - tables, usize::from(level1));
            assert_eq!(table.read(&memory, pasid(value)), Ok(Some(cd(asid))));
            assert_eq!(table.write(&mut memory, pasid(value), &cd(1)), Err(BuildError::InUse));
        }
        assert_eq!(leaf_lg2 == 0, memory.tables() == 1);
        for value in [63, 64, 1023, 1024, 2047] {
            assert_eq!(
                u32::from(stage1(table.lookup(&memory, Some(pasid(value))).unwrap()).asid()),
                value + 1
            );
        }
        assert_eq!(stage1(table.lookup(&memory, None).unwrap()).asid(), 1);
        assert_eq!(table.clear(&memory, pasid(64)), Ok(true));
        assert_eq!(table.clear(&memory, pasid(64)), Ok(false));
        assert_eq!(table.lookup(&memory, Some(pasid(64))), Err(Event::CBadCd));
        assert_eq!(table.read(&memory, pasid(64)).map(|cd| cd.map(|cd| cd.word0.valid())), Ok(Some(false)));
        assert_eq!(table.clear(&memory, pasid(2048)), Err(BuildError::OutOfTable(pasid(2048))));
        let beyond = table.write(&mut memory, pasid(2048), &cd(1));
        assert_eq!(beyond, Err(BuildError::OutOfTable(pasid(2048))));
        table.release(&mut memory).unwrap();
        assert_eq!(memory.tables(), 0);
    }
}

#[test]
fn building_fails_cleanly() {
    let mut memory = memory();
    let create = |caps: &Caps, memory: &mut FlatMem| {
        CdTable::create(TableFormat::TwoLevel4K, 8, Untagged::Terminate, caps, memory)
    };
    assert_eq!(create(&Caps { two_level_cd: false, ..caps() }, &mut memory), Err(BuildError::Unsupported));
    assert_eq!(create(&Caps { ssid_bits: 7, ..caps() }, &mut memory), Err(BuildError::Unsupported));
    let below = Caps { oas_bits: 30, ..caps() };
    assert_eq!(create(&below, &mut memory), Err(BuildError::Unsupported), "memory lies beyond OAS");
    assert_eq!(memory.tables(), 0);
    memory.allow_tables(Some(0));
    assert_eq!(create(&caps(), &mut memory), Err(BuildError::NoTable));
    memory.allow_tables(Some(1));
    let table = create(&caps(), &mut memory).unwrap();
    assert_eq!(table.write(&mut memory, pasid(1), &legal()), Err(BuildError::NoTable));
    assert_eq!(table.lookup(&memory, Some(pasid(1))), Err(Event::CBadSubstreamid));
    let outside = CdTable::from_ste(ste0(OUTSIDE.0, 0, 0), 0, &caps()).unwrap();
    assert!(matches!(outside.write(&mut memory, pasid(0), &legal()), Err(BuildError::NotMemory(_))));
}

#[test]
fn v_is_written_last_and_cleared_first() {
    let mut journal = Journal { memory: memory(), writes: Vec::new().into() };
    let table = CdTable::create(TableFormat::Linear, 2, Untagged::Terminate, &caps(), &mut journal).unwrap();
    let at = table.extents().0.0 + 64;
    table.write(&mut journal, pasid(1), &legal()).unwrap();
    let writes = journal.writes.take();
    let (last, others) = writes.split_last().unwrap();
    assert_eq!((others.len(), *last), (7, (at, legal().words()[0])));
    assert!(others.iter().all(|(address, _)| *address != at));
    table.clear(&journal, pasid(1)).unwrap();
    // Not a word more: an SMMU that is fetching the descriptor may read word 0 before, and another one after.
    assert_eq!(journal.writes.take(), [(at, legal().words()[0] & !VALID)]);
    assert_eq!(table.write(&mut journal, pasid(1), &legal()), Ok(false), "what is left is no hindrance");
    assert_eq!(table.read(&journal, pasid(1)), Ok(Some(legal())));
}

// ---- anything goes in ----

fn any_caps() -> impl Strategy<Value = Caps> {
    any::<[u32; 4]>()
        .prop_map(|[idr0, idr1, idr3, idr5]| Caps::from_registers(IdRegisters { idr0, idr1, idr3, idr5 }))
}

proptest! {
    #[test]
    fn canonical_words_are_a_fixed_point(ste: [u64; 2], caps in any_caps()) {
        if let Ok(table) = CdTable::from_ste(ste[0], ste[1], &caps) {
            let [word0, word1] = table.words();
            prop_assert_eq!(CdTable::from_ste(word0, word1, &caps), Ok(table));
            prop_assert_eq!(word0 & !(0xf80f_ffff_ffff_ffff), 0, "bits that Linux refuses");
            prop_assert_eq!(word1 & !(0xff | 1 << 27 | 1 << 28), 0, "bits that Linux refuses");
        }
    }

    #[test]
    fn any_descriptor_is_judged_and_walked(
        words: [u64; 8],
        force in prop::bool::weighted(0.9),
        full in prop::bool::weighted(0.9),
        random in any_caps(),
        iova: u64,
        pasid in 0_u32..1 << 20,
    ) {
        let caps = if full { Caps { httu: 2, ds: true, input_bits: 52, oas_bits: 52, ..caps() } } else { random };
        let mut cd = Cd::from_words(words);
        if force {
            // Otherwise next to none gets past the first checks.
            cd.word0 = cd.word0.with_valid(true).with_aa64(true).with_abort(true).with_stall(false).with_endi(false);
            cd.word0 = cd.word0.with_t0sz(16 + cd.word0.t0sz() % 24).with_t1sz(16 + cd.word0.t1sz() % 24);
            cd.word1.set_ttb0(cd.word1.ttb0() & 0xffff | BASE.0 >> 4);
            cd.word2.set_ttb1(cd.word2.ttb1() & 0xffff | BASE.0 >> 4);
        }
        let memory = FlatMem::new(BASE, 0x10_0000);
        for (at, word) in (BASE.0..).step_by(8).zip(cd.words()) {
            memory.store(Gpa(at), word).unwrap();
        }
        if let Ok(context) = context_from_cd(&cd.words(), &caps, false) {
            let _ = context.walk(&memory, Iova(iova), Access::WRITE);
        }
        let tag = Pasid::new(pasid);
        for fmt in 0..3 {
            if let Ok(table) = CdTable::from_ste(ste0(BASE.0, fmt, 20), 2, &caps) {
                // Of the linear table only descriptor 0 is not empty, and untagged DMA has it for itself.
                prop_assert!(table.lookup(&memory, tag).is_err() || fmt != 0);
                let _ = table.lookup(&memory, None);
            }
        }
    }
}
