use alloc::{format, vec, vec::Vec};

use proptest::prelude::*;

use super::*;
use crate::{
    Access, AccessKind, FaultClass, Gpa, Iova, IovaRange, Pasid, TableAlloc, TableMem, context,
    context::BuildError,
    context::journal::Journal,
    edit::{EditOptions, Editor},
    format::Attrs,
    suite::FlatMem,
};

const BASE: Gpa = Gpa(0x4000_0000);
const OUTSIDE: Gpa = Gpa(0x9000_0000);
const READ: Access = Access::READ;
const PRIVILEGED: Access = Access { kind: AccessKind::Read, privileged: true };
const EXECUTE: Access = Access { kind: AccessKind::Execute, privileged: false };

fn caps() -> Caps {
    Caps::from_registers(CapRegisters::SOFTWARE)
}

fn memory() -> FlatMem {
    FlatMem::new(BASE, 0x40_0000)
}

fn pasid(value: u32) -> Pasid {
    Pasid::new(value).unwrap()
}

fn no_flags() -> FirstStageFlags {
    FirstStageFlags::empty()
}

fn first_stage(root: Gpa) -> FirstStage {
    FirstStage::new(root, no_flags(), 48, &caps()).unwrap()
}

fn legal() -> PasidEntry {
    PasidEntry::first_stage(&first_stage(Gpa(0x4010_0000)), 9)
}

fn vtd(context: context::Context) -> FirstStage {
    match context {
        context::Context::Stage1(context::Stage1::Vtd(table)) => table,
        other => panic!("{other:?} is no first stage"),
    }
}

fn put(memory: &FlatMem, at: Gpa, words: &[u64]) {
    for (at, word) in (at.0..).step_by(8).zip(words) {
        memory.store(Gpa(at), *word).unwrap();
    }
}

// ---- layouts ----

/// A field filled with ones occupies its bits.
#[test]
fn fields_have_their_bits() {
    fn bits(high: u32, low: u32) -> u64 {
        (u64::MAX >> (63 - high)) & !((1_u64 << low) - 1)
    }
    const ADDRESS: u64 = (1 << 52) - 1;
    let context = [
        (ContextWord0::new().with_present(true), bits(0, 0)),
        (ContextWord0::new().with_fault_disable(true), bits(1, 1)),
        (ContextWord0::new().with_dte(true), bits(2, 2)),
        (ContextWord0::new().with_paside(true), bits(3, 3)),
        (ContextWord0::new().with_pre(true), bits(4, 4)),
        (ContextWord0::new().with_reserved(15), bits(8, 5)),
        (ContextWord0::new().with_pdts(7), bits(11, 9)),
        (ContextWord0::new().with_directory(ADDRESS), bits(63, 12)),
    ];
    for (word, mask) in context {
        assert_eq!(word.into_bits(), mask, "{word:?}");
    }
    assert_eq!(ContextWord1::new().with_rid_pasid(0xf_ffff).into_bits(), bits(83 - 64, 0));
    assert_eq!(ContextWord1::new().with_rid_priv(true).into_bits(), bits(84 - 64, 84 - 64));
    let directory = [
        (DirectoryEntry::new().with_present(true), bits(0, 0)),
        (DirectoryEntry::new().with_fault_disable(true), bits(1, 1)),
        (DirectoryEntry::new().with_reserved(0x3ff), bits(11, 2)),
        (DirectoryEntry::new().with_table(ADDRESS), bits(63, 12)),
    ];
    for (word, mask) in directory {
        assert_eq!(word.into_bits(), mask, "{word:?}");
    }
    let word0 = [
        (PasidWord0::new().with_present(true), bits(0, 0)),
        (PasidWord0::new().with_fault_disable(true), bits(1, 1)),
        (PasidWord0::new().with_address_width(7), bits(4, 2)),
        (PasidWord0::new().with_slee(true), bits(5, 5)),
        (PasidWord0::new().with_pgtt(7), bits(8, 6)),
        (PasidWord0::new().with_ssade(true), bits(9, 9)),
        (PasidWord0::new().with_reserved(3), bits(11, 10)),
        (PasidWord0::new().with_second_stage(ADDRESS), bits(63, 12)),
    ];
    for (word, mask) in word0 {
        assert_eq!(word.into_bits(), mask, "{word:?}");
    }
    let word1 = [
        (PasidWord1::new().with_domain(u16::MAX), bits(79 - 64, 0)),
        (PasidWord1::new().with_reserved(127), bits(86 - 64, 80 - 64)),
        (PasidWord1::new().with_pwsnp(true), bits(87 - 64, 87 - 64)),
        (PasidWord1::new().with_pgsnp(true), bits(88 - 64, 88 - 64)),
        (PasidWord1::new().with_cache_disable(true), bits(89 - 64, 89 - 64)),
        (PasidWord1::new().with_emte(true), bits(90 - 64, 90 - 64)),
        (PasidWord1::new().with_emt(7), bits(93 - 64, 91 - 64)),
        (PasidWord1::new().with_pwt(true), bits(94 - 64, 94 - 64)),
        (PasidWord1::new().with_pcd(true), bits(95 - 64, 95 - 64)),
        (PasidWord1::new().with_pat(u32::MAX), bits(127 - 64, 96 - 64)),
    ];
    for (word, mask) in word1 {
        assert_eq!(word.into_bits(), mask, "{word:?}");
    }
    let word2 = [
        (PasidWord2::new().with_sre(true), bits(0, 0)),
        (PasidWord2::new().with_ere(true), bits(129 - 128, 129 - 128)),
        (PasidWord2::new().with_fspm(3), bits(131 - 128, 130 - 128)),
        (PasidWord2::new().with_wpe(true), bits(132 - 128, 132 - 128)),
        (PasidWord2::new().with_nxe(true), bits(133 - 128, 133 - 128)),
        (PasidWord2::new().with_smep(true), bits(134 - 128, 134 - 128)),
        (PasidWord2::new().with_eafe(true), bits(135 - 128, 135 - 128)),
        (PasidWord2::new().with_reserved(15), bits(139 - 128, 136 - 128)),
        (PasidWord2::new().with_first_stage(ADDRESS), bits(191 - 128, 140 - 128)),
    ];
    for (word, mask) in word2 {
        assert_eq!(word.into_bits(), mask, "{word:?}");
    }
}

/// A PASID entry as Linux 7.3.4 wrote it, from `tests/captures/vtd-linux-7.3-4level`, endpoint 16.
#[test]
fn golden_linux_entry() {
    let words = [0x49, 4, 0x228_1000, 0, 0, 0, 0, 0];
    let entry = PasidEntry::from_words(words);
    assert_eq!(entry.words(), words);
    assert_eq!((entry.word0.pgtt(), entry.word0.address_width(), entry.word1.domain()), (1, 2, 4));
    let table = vtd(entry.judge(&caps()).unwrap());
    assert_eq!((table.root(), table.address_width(), table.flags()), (Gpa(0x228_1000), 48, no_flags()));
}

#[test]
fn reasons_print_their_number() {
    assert_eq!(format!("{}", FaultReason::NOT_PRESENT), "0x71");
    assert_eq!(format!("{}", FaultReason(5)), "0x05");
    assert_eq!(format!("{:?}", FaultReason::ENTRY_INVALID), "FaultReason(0x5b)");
    assert_eq!(FaultReason(0x73), FaultReason::ROOT_TABLE_ACCESS);
    assert_eq!(FaultReason::NOT_PRESENT.class(), FaultClass::NotMapped);
    assert_eq!(FaultReason(0xff).class(), FaultClass::Configuration);
    assert_eq!(FaultReason(0xff).describe(), "unknown fault reason");
    assert!(FaultReason::ALL.is_sorted_by_key(|reason| reason.0));
}

// ---- capabilities ----

#[test]
fn registers_decode() {
    // From the capture: QEMU's unit as Linux saw it.
    let registers = CapRegisters { cap: 0x81d2_008c_222f_0606, ecap: 0x8998_0000_0f46 };
    let caps = Caps::from_registers(registers);
    assert_eq!(caps.registers(), registers);
    assert_eq!((caps.haw, caps.fs5lp, caps.fs1gp, caps.pasid_bits), (48, false, true, 20));
    assert!(caps.first_stage && !caps.srs && !caps.eafs && !caps.rps);

    let filtered = registers.filtered();
    assert_eq!(filtered, filtered.filtered());
    // SAGAW, FRO, SLLPS, NFR, DRT, DRD, ESRTPS and ESIRTPS go; QI, IR, EIM, PT and IRO too.
    assert_eq!((filtered.cap, filtered.ecap), (0x0112_0080_002f_0006, 0x8998_0000_0004));
    let all = CapRegisters { cap: u64::MAX, ecap: u64::MAX }.filtered();
    assert_eq!((all.cap, all.ecap), (0x113f_0080_003f_0087, 0x3_8ffc_a000_0004));
}

#[test]
fn widths_are_capped() {
    let haw = |mgaw: u64| Caps::from_registers(CapRegisters { cap: mgaw << 16, ecap: 0 }).haw;
    assert_eq!([0, 31, 38, 47, 51, 52, 56, 63].map(haw), [32, 32, 39, 48, 52, 52, 52, 52]);
    let bits = |ecap: u64| Caps::from_registers(CapRegisters { cap: 0, ecap }).pasid_bits;
    assert_eq!(bits(19 << 35 | 1 << 40), 20);
    assert_eq!(bits(31 << 35 | 1 << 40), 20);
    assert_eq!(bits(7 << 35 | 1 << 40), 8);
    assert_eq!(bits(19 << 35), 0, "ECAP.PASID is 0");
}

// ---- binding ----

#[test]
fn directory_refusals() {
    let full = caps();
    let narrow = Caps { pasid_bits: 16, ..full };
    let none = Caps { first_stage: false, ..full };
    let haw = Caps { haw: 39, ..full };
    let p = pasid;
    let cases = [
        (0x4000_0000, 9, p(0), &none, Refusal::FirstStage, true),
        (0x4000_0000, 6, p(0), &full, Refusal::DirectorySize(6), false),
        (0x4000_0000, 15, p(0), &full, Refusal::DirectorySize(15), false),
        (0x4000_0000, 255, p(0), &full, Refusal::DirectorySize(255), false),
        (0x4000_0000, 14, p(0), &narrow, Refusal::PasidBits { asked: 20, implemented: 16 }, true),
        (0x4000_0000, 7, p(1 << 13), &full, Refusal::Untagged(p(1 << 13)), false),
        (0x4000_0800, 9, p(0), &full, Refusal::Alignment, false),
        (0x80_0000_0000, 9, p(0), &haw, Refusal::AddressSize { bits: 39 }, false),
    ];
    for (directory, lg2, untagged, caps, refusal, unsupported) in cases {
        assert_eq!(PasidTable::new(Gpa(directory), lg2, untagged, caps), Err(refusal));
        assert_eq!(refusal.is_unsupported(), unsupported, "{refusal:?}");
    }
    let fixed = Caps { rps: false, ..full };
    assert_eq!(PasidTable::new(BASE, 9, p(5), &fixed), Err(Refusal::UntaggedFixed));
    assert!(PasidTable::new(BASE, 9, p(0), &fixed).is_ok());
    // A directory of one page is taken whatever the number of PASIDs.
    let small = Caps { pasid_bits: 10, ..full };
    assert_eq!(PasidTable::new(BASE, 9, p(0), &small).unwrap().pasid_bits(), 10);
    for lg2 in 7..=14 {
        let table = PasidTable::new(BASE, lg2, p(5), &full).unwrap();
        assert_eq!((table.extents(), table.pasid_bits()), ((BASE, 8 << lg2), lg2 + 6));
        assert_eq!(PasidTable::from_context_entry(table.words(), &full), Ok(table));
    }
}

#[test]
fn context_entries() {
    let full = caps();
    let legal = [BASE.0 | 2 << 9 | 0b1001, 3, 0, 0];
    let table = PasidTable::from_context_entry(legal, &full).unwrap();
    assert_eq!((table.untagged(), table.directory_lg2()), (pasid(3), 9));
    assert_eq!(table.words(), legal);
    // FPD, DTE and PRE are ignored.
    let [word0, rest @ ..] = legal;
    let noisy = [word0 | 0b1_0110, rest[0], rest[1], rest[2]];
    assert_eq!(PasidTable::from_context_entry(noisy, &full), Ok(table));
    let cases = [
        ([word0 & !1, 3, 0, 0], Refusal::NotPresent, false),
        ([word0 | 1 << 5, 3, 0, 0], Refusal::Reserved, false),
        ([word0 | 1 << 8, 3, 0, 0], Refusal::Reserved, false),
        ([word0, 3 | 1 << 21, 0, 0], Refusal::Reserved, false),
        ([word0, 3, 1, 0], Refusal::Reserved, false),
        ([word0, 3, 0, 1 << 63], Refusal::Reserved, false),
        ([word0, 3 | 1 << 20, 0, 0], Refusal::UntaggedPrivileged, true),
        ([word0, 1 << 15, 0, 0], Refusal::Untagged(pasid(1 << 15)), false),
        ([word0 | 1 << 52, 3, 0, 0], Refusal::AddressSize { bits: 52 }, false),
    ];
    for (words, refusal, unsupported) in cases {
        assert_eq!(PasidTable::from_context_entry(words, &full), Err(refusal), "{words:x?}");
        assert_eq!(refusal.is_unsupported(), unsupported);
    }
    let fixed = Caps { rps: false, ..full };
    assert_eq!(PasidTable::from_context_entry(legal, &fixed), Err(Refusal::UntaggedFixed));
    assert!(Refusal::UntaggedFixed.is_unsupported());
    assert!(PasidTable::from_context_entry([word0, 0, 0, 0], &fixed).is_ok());
}

#[test]
fn first_stage_refusals() {
    let full = caps();
    let plain = Caps { fs5lp: false, srs: false, eafs: false, haw: 39, ..full };
    let all = FirstStageFlags::all();
    let cases = [
        (BASE, no_flags(), 48, Caps { first_stage: false, ..full }, Refusal::FirstStage, true),
        (BASE, no_flags(), 57, plain, Refusal::FiveLevels, true),
        (BASE, no_flags(), 39, full, Refusal::AddressWidth(39), false),
        (BASE, no_flags(), 0, full, Refusal::AddressWidth(0), false),
        (BASE, FirstStageFlags::from_bits_retain(8), 48, full, Refusal::Reserved, false),
        (BASE, FirstStageFlags::SRE, 48, plain, Refusal::Privileged, true),
        (BASE, FirstStageFlags::EAFE, 48, plain, Refusal::ExtendedAccessed, true),
        (Gpa(BASE.0 + 8), no_flags(), 48, full, Refusal::Alignment, false),
        (Gpa(1 << 39), no_flags(), 48, plain, Refusal::AddressSize { bits: 39 }, false),
        (Gpa(1 << 63), no_flags(), 48, full, Refusal::AddressSize { bits: 52 }, false),
    ];
    for (root, flags, width, caps, refusal, unsupported) in cases {
        assert_eq!(FirstStage::new(root, flags, width, &caps), Err(refusal));
        assert_eq!(refusal.is_unsupported(), unsupported, "{refusal:?}");
    }
    let table = FirstStage::new(BASE, all, 57, &full).unwrap();
    assert_eq!((table.flags(), table.address_width(), table.extents()), (all, 57, (BASE, 4096)));
    let alone = FirstStage::new(BASE, FirstStageFlags::WPE, 48, &full).unwrap();
    assert_eq!(alone, first_stage(BASE), "WPE without SRE has no effect");
}

// ---- lookup ----

#[test]
fn lookup_faults_in_order() {
    let memory = memory();
    let table = PasidTable::new(BASE, 7, pasid(0), &caps()).unwrap();
    let directory = Gpa(BASE.0 + 8);
    let entry = Gpa(BASE.0 + 0x1000 + 5 * 64);
    let lookup = || table.lookup(&memory, Pasid::new(64 + 5)).map(vtd).map(|table| table.root());
    let reason = |code| Err(FaultReason(code));
    // The PASID is judged before anything is read.
    let outside = PasidTable::new(OUTSIDE, 7, pasid(0), &caps()).unwrap();
    assert_eq!(outside.lookup(&memory, Pasid::new(1 << 13)), Err(FaultReason(0x46)));
    assert_eq!(outside.lookup(&memory, Pasid::new((1 << 13) - 1)), Err(FaultReason(0x50)));
    let few = PasidTable::new(OUTSIDE, 7, pasid(0), &Caps { pasid_bits: 4, ..caps() }).unwrap();
    assert_eq!(few.lookup(&memory, Pasid::new(16)), Err(FaultReason(0x46)));
    let untagged_only = PasidTable::from_context_entry([OUTSIDE.0 | 1, 0, 0, 0], &caps()).unwrap();
    assert_eq!(untagged_only.lookup(&memory, Pasid::new(1 << 13)), Err(FaultReason(0x45)));
    assert_eq!(untagged_only.lookup(&memory, None), Err(FaultReason(0x50)));
    // The directory entry.
    memory.store(directory, 0xffe).unwrap();
    assert_eq!(lookup(), reason(0x51));
    for reserved in [1 << 2, 1 << 11, 1 << 52, 1 << 63] {
        memory.store(directory, (BASE.0 + 0x1000) | 1 | reserved).unwrap();
        assert_eq!(lookup(), reason(0x52), "{reserved:#x}");
    }
    memory.store(directory, OUTSIDE.0 | 1).unwrap();
    assert_eq!(lookup(), reason(0x58));
    // The PASID entry.
    memory.store(directory, (BASE.0 + 0x1000) | 0b11).unwrap();
    put(&memory, entry, &[0xffff_fffe; 8]);
    assert_eq!(lookup(), reason(0x59));
    put(&memory, entry, &legal().words());
    assert_eq!(lookup(), Ok(Gpa(0x4010_0000)));
    memory.store(Gpa(entry.0 + 56), 1).unwrap();
    assert_eq!(lookup(), reason(0x5a));
}

#[test]
fn untagged_dma_uses_its_pasid() {
    let mut memory = memory();
    let table = PasidTable::create(9, pasid(77), &caps(), &mut memory).unwrap();
    table.write(&mut memory, pasid(77), &legal()).unwrap();
    let context = table.lookup(&memory, None).unwrap();
    assert_eq!(table.lookup(&memory, Some(pasid(77))), Ok(context));
    assert_eq!(vtd(context).root(), Gpa(0x4010_0000));
    assert_eq!(context::Canonical::VtdPasidTable(table).effective_pasid(None), Some(pasid(77)));
}

#[test]
fn pasid_entries_are_judged() {
    let full = caps();
    let plain = Caps { fs5lp: false, srs: false, eafs: false, haw: 39, ..full };
    let flip = |word: usize, bit: u32| {
        let mut words = legal().words();
        words[word] ^= 1 << bit;
        PasidEntry::from_words(words)
    };
    let reason = |code| Err(FaultReason(code));
    assert_eq!(flip(0, 0).judge(&full), reason(0x59));
    // Reserved for every entry: SLEE, SSADE, 11:10, 86:80, 89 to 127, ERE, NXE, SMEP, 139:136, 192 and above.
    let reserved = [(0, 5..=5), (0, 9..=11), (1, 16..=22), (1, 25..=63), (2, 1..=1), (2, 5..=6), (2, 8..=11)];
    for (word, bits) in reserved.into_iter().chain((3..8).map(|word| (word, 0..=63))) {
        for bit in bits {
            assert_eq!(flip(word, bit).judge(&full), reason(0x5a), "word {word} bit {bit}");
        }
    }
    // FSPTPTR beyond the host address width.
    for bit in 52..64 {
        assert_eq!(flip(2, bit).judge(&full), reason(0x5a));
    }
    assert_eq!(flip(2, 39).judge(&plain), reason(0x5a));
    assert!(flip(2, 39).judge(&full).is_ok());
    // Reserved without the capability: SRE, WPE, EAFE.
    for bit in [0, 4, 7] {
        assert!(flip(2, bit).judge(&full).is_ok(), "bit {bit}");
        assert_eq!(flip(2, bit).judge(&plain), reason(0x5a), "bit {bit}");
    }
    // Ignored: FPD, AW, SSPTPTR, DID, PWSNP, PGSNP.
    let ignored = [(0, 1..=4), (0, 12..=63), (1, 0..=15), (1, 23..=24)];
    for (word, bits) in ignored {
        for bit in bits {
            assert_eq!(flip(word, bit).judge(&full), legal().judge(&full), "word {word} bit {bit}");
        }
    }
    // The type of table.
    for pgtt in 0..8 {
        let entry = PasidEntry { word0: legal().word0.with_pgtt(pgtt), ..legal() };
        match pgtt {
            1 => assert_eq!(vtd(entry.judge(&full).unwrap()).root(), Gpa(0x4010_0000)),
            4 => assert_eq!(entry.judge(&full), Ok(context::Context::Bypass)),
            _ => assert_eq!(entry.judge(&full), reason(0x5b), "PGTT {pgtt}"),
        }
    }
    // The number of levels.
    let levels = |fspm| PasidEntry { word2: legal().word2.with_fspm(fspm), ..legal() };
    assert_eq!(vtd(levels(1).judge(&full).unwrap()).address_width(), 57);
    assert_eq!(levels(1).judge(&plain), reason(0x5b));
    assert_eq!(levels(2).judge(&full), reason(0x5b));
    assert_eq!(levels(3).judge(&full), reason(0x5b));
    // The order: not present, reserved, invalid.
    let mut words = levels(3).words();
    words[7] = 1;
    assert_eq!(PasidEntry::from_words(words).judge(&full), reason(0x5a));
    words[0] = 0;
    assert_eq!(PasidEntry::from_words(words).judge(&full), reason(0x59));
    // Pass-through ignores bits 191:128 only.
    let mut words = PasidEntry::pass_through(1).words();
    words[2] = u64::MAX;
    assert_eq!(PasidEntry::from_words(words).judge(&full), Ok(context::Context::Bypass));
    words[3] = 1;
    assert_eq!(PasidEntry::from_words(words).judge(&full), reason(0x5a));
}

// ---- walks ----

const IOVA: Iova = Iova(0x12_3456_7000);
const OUTPUT: Gpa = Gpa(0x8_0000_0000);

struct Mapped {
    memory: FlatMem,
    table: FirstStage,
}

/// One page is mapped at [`IOVA`].
fn mapped(attrs: Attrs, output: Gpa, flags: FirstStageFlags, width: u32) -> Mapped {
    let mut memory = memory();
    let root = memory.alloc(12).unwrap();
    let table = FirstStage::new(root, flags, width, &caps()).unwrap();
    let range = IovaRange::from_length(IOVA, 4096).unwrap();
    Editor::new(*table.format(), &mut memory, EditOptions::default()).map(range, output, attrs).unwrap();
    Mapped { memory, table }
}

impl Mapped {
    /// Changes the entry that the walk for [`IOVA`] reads at `level`.
    fn change(&self, level: u32, change: impl Fn(u64) -> u64) {
        let mut table = self.table.root();
        let top = if self.table.address_width() == 57 { 4 } else { 3 };
        for upper in (level + 1..=top).rev() {
            let at = table.0 + (IOVA.0 >> (12 + 9 * upper) & 0x1ff) * 8;
            table = Gpa(self.memory.load(Gpa(at)).unwrap() & 0xf_ffff_ffff_f000);
        }
        let at = Gpa(table.0 + (IOVA.0 >> (12 + 9 * level) & 0x1ff) * 8);
        self.memory.store(at, change(self.memory.load(at).unwrap())).unwrap();
    }

    fn walk(&self, access: Access) -> Result<Gpa, FaultReason> {
        self.walk_at(IOVA, access)
    }

    fn walk_at(&self, iova: Iova, access: Access) -> Result<Gpa, FaultReason> {
        self.table.walk(&self.memory, iova, access).map(|translation| translation.apply(iova))
    }
}

#[test]
fn walk_reasons() {
    let reason = |code| Err(FaultReason(code));
    for (width, top) in [(48, 3), (57, 4)] {
        let fresh = |attrs| mapped(attrs, OUTPUT, no_flags(), width);
        assert_eq!(fresh(Attrs::READ).walk(READ), Ok(OUTPUT));
        assert_eq!(fresh(Attrs::READ_WRITE).walk(Access::WRITE), Ok(OUTPUT));
        assert_eq!(fresh(Attrs::READ).walk(Access::WRITE), reason(0x85));
        assert_eq!(fresh(Attrs::READ).walk(EXECUTE), reason(0x5c), "before anything else");
        assert_eq!(fresh(Attrs::READ).walk(PRIVILEGED), reason(0x5d));
        assert_eq!(fresh(Attrs { user: false, ..Attrs::READ }).walk(READ), reason(0x81));
        for level in 0..=top {
            let case = fresh(Attrs::READ_WRITE);
            case.change(level, |entry| entry & !1);
            assert_eq!(case.walk(READ), reason(0x71), "level {level}");
            let case = fresh(Attrs::READ_WRITE);
            case.change(level, |entry| entry | 1 << 63);
            assert_eq!(case.walk(READ), Ok(OUTPUT), "level {level}: XD is ignored without NXE");
            if level > 0 {
                let case = fresh(Attrs::READ_WRITE);
                case.change(level, |entry| entry & 0xfff | OUTSIDE.0);
                assert_eq!(case.walk(READ), reason(0x70), "level {level}");
            }
            let case = fresh(Attrs::READ_WRITE);
            case.change(level, |entry| entry & !0b100);
            assert_eq!(case.walk(READ), reason(0x81), "U/S counts at level {level}");
            let case = fresh(Attrs::READ_WRITE);
            case.change(level, |entry| entry & !0b10);
            assert_eq!(case.walk(Access::WRITE), reason(0x85), "R/W counts at level {level}");
        }
        let case = fresh(Attrs::READ);
        let beyond = Iova(1 << (width - 1));
        assert_eq!(case.walk_at(beyond, READ), reason(0x80), "not canonical");
        assert_eq!(case.walk_at(beyond, PRIVILEGED), reason(0x5d), "SRE before the address");
        assert_eq!(case.walk_at(Iova(u64::MAX), READ), reason(0x71), "canonical");
        let case = Mapped { table: FirstStage::new(OUTSIDE, no_flags(), width, &caps()).unwrap(), ..case };
        assert_eq!(case.walk(READ), reason(0x73), "root outside memory");
    }
    let interrupts = mapped(Attrs::READ_WRITE, Gpa(0xfee0_0000), no_flags(), 48);
    assert_eq!(interrupts.walk(Access::WRITE), reason(0x87));
}

#[test]
fn address_bits_from_the_host_address_width_on_are_reserved() {
    let narrow = Caps { haw: 35, ..caps() };
    for level in 0..4 {
        let case = mapped(Attrs::READ, BASE, no_flags(), 48);
        let table = FirstStage::new(case.table.root(), no_flags(), 48, &narrow).unwrap();
        let case = Mapped { table, ..case };
        assert_eq!(case.walk(READ), Ok(BASE));
        case.change(level, |entry| entry | 1 << 35);
        assert_eq!(case.walk(READ), Err(FaultReason(0x72)), "level {level}");
    }
}

#[test]
fn privileged_requests_by_sre_and_wpe() {
    let write = Access { privileged: true, ..Access::WRITE };
    let kernel = Attrs { user: false, ..Attrs::READ };
    let sre = mapped(kernel, OUTPUT, FirstStageFlags::SRE, 48);
    assert_eq!((sre.walk(PRIVILEGED), sre.walk(write)), (Ok(OUTPUT), Ok(OUTPUT)), "R/W binds users only");
    assert_eq!(sre.walk(READ), Err(FaultReason(0x81)));
    let wpe = mapped(kernel, OUTPUT, FirstStageFlags::SRE | FirstStageFlags::WPE, 48);
    assert_eq!((wpe.walk(PRIVILEGED), wpe.walk(write)), (Ok(OUTPUT), Err(FaultReason(0x85))));
}

#[test]
fn flags_that_cannot_be_set() {
    /// Memory that may be read only.
    struct ReadOnly(FlatMem);
    impl TableMem for ReadOnly {
        fn load(&self, at: Gpa) -> Result<u64, crate::NotMemory> {
            self.0.load(at)
        }
        fn compare_exchange(&self, _: Gpa, _: u64, _: u64) -> Result<Result<u64, u64>, crate::NotMemory> {
            Err(crate::NotMemory)
        }
    }
    let case = mapped(Attrs::READ, OUTPUT, no_flags(), 48);
    case.change(0, |entry| entry & !(1 << 5));
    let memory = ReadOnly(case.memory);
    assert_eq!(case.table.walk(&memory, IOVA, READ).unwrap_err(), FaultReason(0x91));
}

// ---- building ----

#[test]
fn directories_of_every_size_are_built_and_released() {
    for lg2 in 7..=14 {
        let mut memory = memory();
        let table = PasidTable::create(lg2, pasid(0), &caps(), &mut memory).unwrap();
        let last = (1 << (lg2 + 6)) - 1;
        let values = vec![0, 1, 63, 64, last];
        for value in values {
            let root = Gpa(BASE.0 + u64::from(value % 1024) * 4096);
            let flags = FirstStageFlags::SRE | FirstStageFlags::WPE | FirstStageFlags::EAFE;
            let bound = FirstStage::new(root, flags, if value == 1 { 57 } else { 48 }, &caps()).unwrap();
            let entry = PasidEntry::first_stage(&bound, 3);
            table.write(&mut memory, pasid(value), &entry).unwrap();
            assert_eq!(table.lookup(&memory, Some(pasid(value))).map(vtd), Ok(bound));
            assert_eq!(table.read(&memory, pasid(value)), Ok(Some(entry)));
            assert_eq!(table.write(&mut memory, pasid(value), &entry), Err(BuildError::InUse));
        }
        assert_eq!(memory.tables(), 4, "a directory and three PASID tables");
        assert_eq!(table.read(&memory, pasid(128)), Ok(None));
        assert_eq!(table.clear(&memory, pasid(63)), Ok(true));
        assert_eq!(table.clear(&memory, pasid(63)), Ok(false));
        assert_eq!(table.clear(&memory, pasid(128)), Ok(false));
        assert_eq!(table.lookup(&memory, Some(pasid(63))), Err(FaultReason::ENTRY_NOT_PRESENT));
        let left = table.read(&memory, pasid(63)).map(|entry| entry.map(|entry| entry.word0.present()));
        assert_eq!(left, Ok(Some(false)));
        if let Some(beyond) = Pasid::new(last + 1) {
            assert_eq!(table.write(&mut memory, beyond, &legal()), Err(BuildError::OutOfTable(beyond)));
            assert_eq!(table.clear(&memory, beyond), Err(BuildError::OutOfTable(beyond)));
        }
        table.release(&mut memory).unwrap();
        assert_eq!(memory.tables(), 0);
    }
}

#[test]
fn building_fails_cleanly() {
    let mut memory = memory();
    let none = Caps { first_stage: false, ..caps() };
    assert_eq!(PasidTable::create(9, pasid(0), &none, &mut memory), Err(BuildError::Unsupported));
    assert_eq!(PasidTable::create(6, pasid(0), &caps(), &mut memory), Err(BuildError::Unsupported));
    let low = Caps { haw: 30, ..caps() };
    assert_eq!(PasidTable::create(9, pasid(0), &low, &mut memory), Err(BuildError::Unsupported));
    assert_eq!(memory.tables(), 0);
    memory.allow_tables(Some(0));
    assert_eq!(PasidTable::create(9, pasid(0), &caps(), &mut memory), Err(BuildError::NoTable));
    memory.allow_tables(Some(1));
    let table = PasidTable::create(9, pasid(0), &caps(), &mut memory).unwrap();
    assert_eq!(table.write(&mut memory, pasid(0), &legal()), Err(BuildError::NoTable));
    assert_eq!(table.lookup(&memory, None), Err(FaultReason::DIRECTORY_NOT_PRESENT));
}

#[test]
fn p_is_written_last_and_cleared_first() {
    let mut journal = Journal { memory: memory(), writes: Vec::new().into() };
    let table = PasidTable::create(7, pasid(0), &caps(), &mut journal).unwrap();
    table.write(&mut journal, pasid(1), &legal()).unwrap();
    let writes = journal.writes.take();
    let directory_entry = journal.load(table.extents().0).unwrap();
    let at = (directory_entry & !0xfff) + 64;
    assert_eq!(writes.first(), Some(&(table.extents().0.0, directory_entry)), "the table before the entry");
    let (last, others) = writes.split_last().unwrap();
    assert_eq!((others.len(), *last), (8, (at, legal().words()[0])));
    assert!(others.iter().all(|(address, _)| *address != at));
    table.clear(&journal, pasid(1)).unwrap();
    // Not a word more: hardware that is fetching the entry may read word 0 before, and another one after.
    assert_eq!(journal.writes.take(), [(at, legal().words()[0] & !1)]);
    assert_eq!(table.write(&mut journal, pasid(1), &legal()), Ok(()), "what is left is no hindrance");
    assert_eq!(table.read(&journal, pasid(1)), Ok(Some(legal())));
}

// ---- anything goes in ----

/// A fault of the PASID entry or of what it leads to, and of the directory entry once that was read.
#[test]
fn which_faults_fpd_keeps_from_being_recorded() {
    let unqualified: Vec<u8> =
        FaultReason::ALL.iter().filter(|reason| !reason.is_qualified()).map(|reason| reason.0).collect();
    assert!(unqualified.iter().all(|&number| number <= 0x50 || number == 0x58), "{unqualified:x?}");
    for number in [0x45, 0x46, 0x50, 0x58] {
        assert!(unqualified.contains(&number), "{number:#x}");
    }
}

proptest! {
    #[test]
    fn any_registers_and_numbers_are_taken(
        cap: u64, ecap: u64, root: u64, lg2: u8, untagged in 0_u32..1 << 20, flags: u64, width: u32, words: [u64; 4],
    ) {
        let caps = Caps::from_registers(CapRegisters { cap, ecap });
        for table in [
            PasidTable::new(Gpa(root), lg2, pasid(untagged), &caps),
            PasidTable::from_context_entry(words, &caps),
            PasidTable::from_context_entry([words[0] & 0xffff_ffff_f1ff | 1, words[1] & 0xff, 0, 0], &caps),
        ]
        .into_iter()
        .flatten()
        {
            prop_assert!(table.extents().0.0.checked_add(table.extents().1).is_some());
            prop_assert_eq!(PasidTable::from_context_entry(table.words(), &caps), Ok(table));
        }
        let flags = FirstStageFlags::from_bits_retain(flags & 0xf);
        for width in [48, 57, width] {
            if let Ok(table) = FirstStage::new(Gpa(root & 0xffff_f000), flags, width, &caps) {
                let again = FirstStage::new(table.root(), table.flags(), table.address_width(), &caps);
                prop_assert_eq!(again, Ok(table));
                // The entry that leads to it is legal and leads to it.
                let judged = PasidEntry::first_stage(&table, 0).judge(&caps);
                prop_assert_eq!(judged.map(vtd), Ok(table));
            }
        }
    }

    #[test]
    fn any_memory_is_looked_up_and_walked(
        directory: u64, words: [u64; 8], masked: bool, tag in 0_u32..1 << 13, iova: u64,
    ) {
        let memory = memory();
        let mut words = words;
        if masked {
            words = [words[0] & !0xe20 | 1, words[1] & 0x180_ffff, words[2] & 0x4fff_f09d, 0, 0, 0, 0, 0];
        }
        let at = BASE.0 + u64::from(tag >> 6) * 8;
        memory.store(Gpa(at), if masked { BASE.0 + 0x1000 } else { directory } | 1).unwrap();
        put(&memory, Gpa(BASE.0 + 0x1000 + u64::from(tag & 63) * 64), &words);
        let table = PasidTable::new(BASE, 7, pasid(tag), &caps()).unwrap();
        if let Ok(context::Context::Stage1(stage1)) = table.lookup(&memory, None) {
            let _ = stage1.walk(&memory, Iova(iova), Access::WRITE);
            let _ = stage1.walk(&memory, Iova(iova & 0x7fff_ffff_ffff), READ);
        }
    }
}
