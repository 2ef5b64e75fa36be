use super::*;
use crate::suite::FlatMem;
use crate::{NotMemory, TableMem, Translation, walk};

const DEFAULT: Vmsav8Params = Vmsav8Params {
    root: Gpa(0x1000),
    granule: Granule::K4,
    input_lg2: 39,
    output_lg2: 40,
    wide: false,
    upper: false,
    flags: Vmsav8Flags::empty(),
};

const USER_READ: Access = Access::READ;
const USER_WRITE: Access = Access::WRITE;
const PRIV_WRITE: Access = Access { kind: AccessKind::Write, privileged: true };

fn format(params: Vmsav8Params) -> Vmsav8 {
    Vmsav8::new(params).expect("legal")
}

/// Tables at 0x1000 (level 2), 0x2000 and 0x3000 on the way to `leaf` at address 0, each entry OR'ed with its extra bits.
fn three_levels(extra: [u64; 2], leaf: u64) -> FlatMem {
    let mem = FlatMem::new(Gpa(0x1000), 0x3000);
    for (at, entry) in [(0x1000, 0x2003 | extra[0]), (0x2000, 0x3003 | extra[1]), (0x3000, leaf)] {
        mem.store(Gpa(at), entry).expect("memory");
    }
    mem
}

fn answer(flags: Vmsav8Flags, extra: [u64; 2], leaf: u64, access: Access) -> Result<Translation, WalkFault> {
    walk(&format(Vmsav8Params { flags, ..DEFAULT }), &three_levels(extra, leaf), Iova(0), access)
}

/// DDI 0487, D8.3: bit positions, by hand.
#[test]
fn golden_entries() {
    let format = format(DEFAULT);
    let write = Attrs { memory_type: 1, ..Attrs::READ_WRITE };
    // UXN 54, PXN 53; nG 11, AF 10, SH 9:8, AP[1] 6, AttrIndx 4:2, 11.
    assert_eq!(format.leaf_entry(0, Gpa(0x12_3456_7000), write), Some(0x0060_0012_3456_7f47));
    // AP[2] 7; 01.
    assert_eq!(format.leaf_entry(1, Gpa(0x12_3440_0000), Attrs::READ), Some(0x0060_0012_3440_0fc1));
    let text = Attrs { execute: true, global: true, ..Attrs::READ };
    assert_eq!(format.leaf_entry(0, Gpa(0x1000), text), Some(0x0020_0000_0000_17c3));
    let kernel_text = Attrs { user: false, ..text };
    assert_eq!(format.leaf_entry(0, Gpa(0x1000), kernel_text), Some(0x0040_0000_0000_1783));
    assert_eq!(format.table_entry(Gpa(0x12_3456_7000)), 0x0000_0012_3456_7003);
    assert_eq!(format.with_contiguous(0, true), 1 << 52);
    // Without HD there is no dirty state: DBM stays clear.
    let clean = Attrs { clean: true, ..Attrs::READ_WRITE };
    assert_eq!(format.leaf_entry(0, Gpa(0), clean), format.leaf_entry(0, Gpa(0), Attrs::READ_WRITE));
    let tracking = self::format(Vmsav8Params { flags: Vmsav8Flags::HA | Vmsav8Flags::HD, ..DEFAULT });
    assert_eq!(tracking.leaf_entry(0, Gpa(0), clean), Some(0x0068_0000_0000_0fc3));
}

/// DDI 0487, D8.3.1: OA[51:48] in bits 15:12 with 64 KiB; with DS OA[51:50] in bits 9:8, and no shareability.
#[test]
fn golden_entries_with_52_bits() {
    let wide =
        |granule| format(Vmsav8Params { granule, input_lg2: 52, output_lg2: 52, wide: true, ..DEFAULT });
    let output = Gpa(0x000e_1234_5679_0000);
    assert_eq!(wide(Granule::K64).leaf_entry(0, output, Attrs::READ), Some(0x0060_1234_5679_efc3));
    assert_eq!(wide(Granule::K64).table_entry(output), 0x0000_1234_5679_e003);
    for granule in [Granule::K4, Granule::K16] {
        assert_eq!(wide(granule).leaf_entry(0, output, Attrs::READ), Some(0x0062_1234_5679_0fc3));
        assert_eq!(wide(granule).table_entry(output), 0x0002_1234_5679_0303);
    }
    // Without it these bits are none of the address (64 KiB: RES0; else the rest of the entry).
    let narrow = format(Vmsav8Params { granule: Granule::K64, ..DEFAULT });
    assert_eq!(narrow.decode(0, 0xf003), Entry::Leaf(Gpa(0)));
    assert_eq!(format(DEFAULT).decode(1, 0x0003_0000_0000_0303), Entry::Table(Gpa(0)));
    // 52 bits of input do not need 52 of output with 64 KiB: no 4 TiB blocks then.
    let input = Vmsav8Params { granule: Granule::K64, input_lg2: 52, output_lg2: 48, ..DEFAULT };
    assert_eq!(format(input).decode(0, 0xf003), Entry::Leaf(Gpa(0)));
    assert_eq!((format(input).top_level(), format(input).decode(2, 0b01)), (2, Entry::Reserved));
}

/// The start level, in the architecture's numbers, and what the root resolves.
#[test]
fn start_levels() {
    for (granule, input_lg2, start, root_lg2) in [
        (Granule::K4, 52, -1, 7),
        (Granule::K4, 49, -1, 4),
        (Granule::K4, 48, 0, 12),
        (Granule::K4, 40, 0, 4),
        (Granule::K4, 39, 1, 12),
        (Granule::K4, 31, 1, 4),
        (Granule::K4, 30, 2, 12),
        (Granule::K4, 21, 3, 12),
        (Granule::K4, 16, 3, 7),
        (Granule::K16, 52, 0, 8),
        (Granule::K16, 48, 0, 4),
        (Granule::K16, 47, 1, 14),
        (Granule::K16, 36, 2, 14),
        (Granule::K16, 25, 3, 14),
        (Granule::K64, 52, 1, 13),
        (Granule::K64, 48, 1, 9),
        (Granule::K64, 42, 2, 16),
        (Granule::K64, 29, 3, 16),
        (Granule::K64, 17, 3, 4),
    ] {
        let params = Vmsav8Params { granule, input_lg2, wide: input_lg2 > 48, ..DEFAULT };
        let format = format(params);
        assert_eq!(3 - i16::from(format.top_level()), start, "{granule:?} {input_lg2}");
        assert_eq!(params.root_lg2(), root_lg2, "{granule:?} {input_lg2}");
        assert_eq!(format.table_lg2(format.top_level()), root_lg2);
    }
}

#[test]
fn illegal_sizes_are_refused() {
    for (granule, input_lg2, output_lg2, wide) in [
        (Granule::K4, 15, 40, false),
        (Granule::K64, 16, 40, false),
        (Granule::K4, 49, 40, false),
        (Granule::K4, 53, 52, true),
        (Granule::K4, 39, 31, false),
        (Granule::K4, 39, 53, true),
        (Granule::K4, 255, 40, true),
    ] {
        let params = Vmsav8Params { granule, input_lg2, output_lg2, wide, ..DEFAULT };
        assert_eq!(Vmsav8::new(params), None, "{params:?}");
    }
}

/// The low bits of TTB are dropped: by the root's size, and at least 6 where addresses have 52 bits.
#[test]
fn root_alignment() {
    let root = |input_lg2, wide| {
        format(Vmsav8Params { root: Gpa(u64::MAX), input_lg2, wide, ..DEFAULT }).root().0 & 0xffff
    };
    assert_eq!(root(39, false), 0xf000);
    assert_eq!(root(40, false), 0xfff0);
    assert_eq!(root(40, true), 0xffc0);
    // With 64 KiB what counts is the configured output size.
    for (output_lg2, low) in [(48, 0xfff0), (52, 0xffc0)] {
        let params = Vmsav8Params { granule: Granule::K64, input_lg2: 30, output_lg2, wide: true, ..DEFAULT };
        assert_eq!(format(Vmsav8Params { root: Gpa(u64::MAX), ..params }).root().0 & 0xffff, low);
    }
}

#[test]
fn where_leaves_may_be() {
    for (granule, wide, leaves) in [
        (Granule::K4, false, &[12, 21, 30][..]),
        (Granule::K4, true, &[12, 21, 30, 39]),
        (Granule::K16, false, &[14, 25]),
        (Granule::K16, true, &[14, 25, 36]),
        (Granule::K64, false, &[16, 29]),
        (Granule::K64, true, &[16, 29, 42]),
    ] {
        let params = Vmsav8Params { granule, wide, input_lg2: 48, output_lg2: 48, ..DEFAULT };
        let format = format(params);
        assert_eq!(format.page_sizes(), leaves.iter().fold(0, |sizes, lg2| sizes | 1 << lg2));
        for level in 0..=format.top_level() {
            let is_leaf = leaves.contains(&format.entry_lg2(level));
            let block = if level == 0 { Entry::Reserved } else { Entry::Leaf(Gpa(0)) };
            assert_eq!(format.decode(level, 0b01), if is_leaf { block } else { Entry::Reserved });
            let table = if level == 0 { Entry::Leaf(Gpa(0)) } else { Entry::Table(Gpa(0)) };
            assert_eq!(format.decode(level, 0b11), table);
            assert_eq!(format.decode(level, !0b01), Entry::Empty);
        }
    }
}

/// DDI 0487, D8.4: AP[2:1] and UXN, PXN of the leaf.
#[test]
fn leaf_permissions() {
    let none = Perms::empty();
    for (ap, expected) in [
        (0b00, Perms::PRIV_READ | Perms::PRIV_WRITE),
        (0b01, Perms::READ | Perms::WRITE),
        (0b10, Perms::PRIV_READ),
        (0b11, Perms::READ),
    ] {
        for (xn, execute) in [
            (0, Perms::EXECUTE),
            (bits::UXN, Perms::PRIV_EXECUTE),
            (bits::PXN, Perms::USER_EXECUTE),
            (bits::UXN | bits::PXN, none),
        ] {
            // What unprivileged accesses can write is never executed by privileged ones.
            let execute = if ap == 0b01 { execute - Perms::PRIV_EXECUTE } else { execute };
            let perms = format(DEFAULT).perms(ap << 6 | xn, 0);
            assert_eq!(perms, expected | execute, "AP {ap:02b} XN {xn:#x}");
        }
    }
}

#[test]
fn table_permissions_accumulate_over_levels() {
    let open = bits::AP_UNPRIVILEGED | bits::AF | 0b11;
    let read = |flags, extra| {
        answer(flags, extra, open, Access { privileged: true, ..USER_READ }).expect("readable").perms
    };
    let all = (Perms::all()) - Perms::PRIV_EXECUTE;
    let user = Perms::USER_READ | Perms::USER_WRITE;
    for (limit, lost) in [
        // Without unprivileged writes nothing forbids privileged execution.
        (bits::AP_TABLE_PRIVILEGED, (all | Perms::PRIV_EXECUTE) - user),
        (bits::AP_TABLE_READ_ONLY, (all | Perms::PRIV_EXECUTE) - Perms::WRITE),
        (bits::UXN_TABLE, all - Perms::USER_EXECUTE),
        (bits::PXN_TABLE, all),
    ] {
        for extra in [[limit, 0], [0, limit]] {
            assert_eq!(read(Vmsav8Flags::empty(), extra), lost, "{extra:x?}");
            assert_eq!(read(Vmsav8Flags::HAD, extra), all, "HAD, {extra:x?}");
        }
    }
    let extra = [bits::AP_TABLE_PRIVILEGED | bits::PXN_TABLE, bits::AP_TABLE_READ_ONLY | bits::UXN_TABLE];
    assert_eq!(read(Vmsav8Flags::empty(), extra), Perms::PRIV_READ);
    let denied = |denied| Err(WalkFault::Permission { level: 0, denied });
    let none = Vmsav8Flags::empty();
    assert_eq!(answer(none, [bits::AP_TABLE_READ_ONLY, 0], open, USER_WRITE), denied(Denied::Write));
    assert_eq!(answer(none, [0, bits::AP_TABLE_PRIVILEGED], open, USER_READ), denied(Denied::Read));
}

#[test]
fn wxn_pan_epan() {
    let perms = |flags, leaf| format(Vmsav8Params { flags, ..DEFAULT }).perms(leaf, 0);
    let (wxn, pan) = (Vmsav8Flags::WXN, Vmsav8Flags::PAN);
    let epan = pan | Vmsav8Flags::EPAN;
    let (user, read_only) = (bits::AP_UNPRIVILEGED, bits::AP_READ_ONLY);
    assert_eq!(perms(wxn, user), Perms::READ | Perms::WRITE);
    // Privileged read-write: user execution is no concern of WXN.
    assert_eq!(perms(wxn, 0), Perms::PRIV_READ | Perms::PRIV_WRITE | Perms::USER_EXECUTE);
    assert_eq!(perms(wxn, read_only), Perms::PRIV_READ | Perms::EXECUTE);
    assert_eq!(perms(pan, user), Perms::USER_READ | Perms::USER_WRITE | Perms::USER_EXECUTE);
    assert_eq!(perms(pan, read_only), Perms::PRIV_READ | Perms::EXECUTE);
    assert_eq!(perms(epan, read_only), Perms::EXECUTE);
    assert_eq!(perms(epan, read_only | bits::UXN), Perms::PRIV_READ | Perms::PRIV_EXECUTE);
    // WXN looks at what may be written, PAN or not.
    assert_eq!(perms(epan | wxn, 0), Perms::USER_EXECUTE);
}

#[test]
fn input_range_and_ignored_top_byte() {
    let lower = format(Vmsav8Params { flags: Vmsav8Flags::TBI, ..DEFAULT });
    let upper = format(Vmsav8Params { upper: true, ..DEFAULT });
    let admit = |format: &Vmsav8, iova| format.admit(Iova(iova), USER_READ);
    assert_eq!(admit(&lower, 0x7f_ffff_ffff), Ok(0x7f_ffff_ffff));
    assert_eq!(admit(&lower, 0xab00_0012_3456_7000), Ok(0x12_3456_7000));
    assert_eq!(admit(&lower, 0x80_0000_0000), Err(WalkFault::InputRange));
    assert_eq!(admit(&lower, 0x0080_0000_0000_0000), Err(WalkFault::InputRange));
    assert_eq!(admit(&upper, 0xffff_ff80_0000_0000), Ok(0));
    assert_eq!(admit(&upper, u64::MAX), Ok(0x7f_ffff_ffff));
    for outside in [0, 0x7f_ffff_ffff, 0xffff_ff7f_ffff_ffff, 0x00ff_ffff_ffff_f000] {
        assert_eq!(admit(&upper, outside), Err(WalkFault::InputRange), "{outside:#x}");
    }
    // The answer is about the address without its tag.
    let mem = three_levels([0, 0], bits::AP_UNPRIVILEGED | bits::AF | 0b11);
    let found = walk(&lower, &mem, Iova(0xab00_0000_0000_0123), USER_READ).expect("mapped");
    assert_eq!(found.iova, Iova(0));
    assert_eq!(lower.canonical(Iova(0xab00_0000_0000_0123)), Iova(0x123));
    assert_eq!(upper.canonical(Iova(0xabff_ffff_ffff_ffff)), Iova(0xabff_ffff_ffff_ffff));
}

/// E0PD closes the half to unprivileged accesses before any table is read.
#[test]
fn e0pd() {
    let leaf = bits::AP_UNPRIVILEGED | bits::AF | 0b11;
    let flags = Vmsav8Flags::E0PD;
    assert_eq!(answer(flags, [0, 0], leaf, USER_READ), Err(WalkFault::InputRange));
    assert_eq!(answer(flags, [0, 0], 0, USER_READ), Err(WalkFault::InputRange));
    let found = answer(flags, [0, 0], leaf, PRIV_WRITE).expect("privileged");
    assert_eq!(found.perms, Perms::PRIV_READ | Perms::PRIV_WRITE);
}

/// IHI 0070, 7.3.22: at each level the fetch, then validity, then size; the access flag before permissions.
#[test]
fn faults_in_order() {
    let beyond = 1 << 40;
    let none = Vmsav8Flags::empty();
    let not_user = bits::AF | 0b11;
    assert_eq!(
        answer(none, [0, 0], not_user, USER_READ),
        Err(WalkFault::Permission { level: 0, denied: Denied::Read })
    );
    assert_eq!(answer(none, [0, 0], 0b11, USER_READ), Err(WalkFault::AccessFlag { level: 0 }));
    assert_eq!(answer(none, [0, 0], 0b11 | beyond, USER_READ), Err(WalkFault::AddressSize { level: 0 }));
    assert_eq!(answer(none, [0, 0], 0b01 | beyond, USER_READ), Err(WalkFault::Reserved { level: 0 }));
    assert_eq!(answer(none, [0, 0], 0b10 | beyond, USER_READ), Err(WalkFault::NotPresent { level: 0 }));
    // Table addresses: too wide before they are read, and not there.
    assert_eq!(answer(none, [0, beyond], 0, USER_READ), Err(WalkFault::AddressSize { level: 1 }));
    assert_eq!(answer(none, [beyond, beyond], 0, USER_READ), Err(WalkFault::AddressSize { level: 2 }));
    assert_eq!(answer(none, [0, 1 << 39], 0, USER_READ), Err(WalkFault::TableAccess { level: 0 }));
    assert_eq!(answer(none, [1 << 39, 0], 0, USER_READ), Err(WalkFault::TableAccess { level: 1 }));
    let outside = format(Vmsav8Params { root: Gpa(0x10_0000), ..DEFAULT });
    let fault = walk(&outside, &three_levels([0, 0], 0), Iova(0), USER_READ);
    assert_eq!(fault, Err(WalkFault::TableAccess { level: 2 }));
}

#[test]
fn access_flag() {
    let leaf = bits::AP_UNPRIVILEGED | 0b11;
    assert!(answer(Vmsav8Flags::AFFD, [0, 0], leaf, USER_READ).is_ok());
    let format = format(Vmsav8Params { flags: Vmsav8Flags::HA, ..DEFAULT });
    let mem = three_levels([0, 0], leaf);
    let entry = || mem.load(Gpa(0x3000));
    // A refused access leaves no trace.
    let execute = Access { kind: AccessKind::Execute, privileged: true };
    assert!(walk(&format, &mem, Iova(0), execute).is_err());
    assert_eq!(entry(), Ok(leaf));
    assert!(walk(&format, &mem, Iova(0), USER_READ).is_ok());
    assert_eq!(entry(), Ok(leaf | bits::AF));
}

/// HD: a clean page reads without writes being listed, and a write makes it dirty.
#[test]
fn dirty_state() {
    let flags = Vmsav8Flags::HA | Vmsav8Flags::HD;
    let clean = bits::AP_UNPRIVILEGED | bits::AP_READ_ONLY | bits::DBM | 0b11;
    let format = format(Vmsav8Params { flags, ..DEFAULT });
    let mem = three_levels([0, 0], clean);
    let load = |mem: &FlatMem| mem.load(Gpa(0x3000)).map(|entry| entry & 0xfff);
    let found = walk(&format, &mem, Iova(0), USER_READ).expect("readable");
    assert_eq!(found.perms, Perms::READ | Perms::USER_EXECUTE);
    assert_eq!(load(&mem), Ok(0x4c3));
    let found = walk(&format, &mem, Iova(0), USER_WRITE).expect("writable");
    assert_eq!(found.perms, Perms::READ | Perms::WRITE | Perms::USER_EXECUTE);
    assert_eq!(load(&mem), Ok(0x443));
    // A table that forbids writes, no DBM, and no HD: a permission fault, and the page stays clean.
    let denied = Err(WalkFault::Permission { level: 0, denied: Denied::Write });
    let mem = three_levels([bits::AP_TABLE_READ_ONLY, 0], clean);
    assert_eq!(walk(&format, &mem, Iova(0), USER_WRITE), denied);
    assert_eq!(load(&mem), Ok(0xc3));
    assert_eq!(answer(flags, [0, 0], clean & !bits::DBM, USER_WRITE), denied);
    assert_eq!(answer(Vmsav8Flags::HA, [0, 0], clean, USER_WRITE), denied);
    assert_eq!(answer(Vmsav8Flags::HD | Vmsav8Flags::AFFD, [0, 0], clean, USER_WRITE), denied);
}

/// Software bits, permissions and dirty state stay; nT and the contiguous hint are no part of a page.
#[test]
fn a_split_block_keeps_what_it_says() {
    let block = 0x0790_0000_4020_0fc1 | 1 << 16;
    assert_eq!(format(DEFAULT).relevel(block, 1, 0, Gpa(0x4020_5000)), 0x0780_0000_4020_5fc3);
    assert_eq!(format(DEFAULT).relevel(block, 2, 1, Gpa(0x4020_0000)), 0x0780_0000_4020_0fc1);
}

#[test]
fn blocks_and_globals() {
    let format = format(DEFAULT);
    let mem = FlatMem::new(Gpa(0x1000), 0x1000);
    let block = (0x40_0000_0000 - (1 << 30)) | bits::AP_UNPRIVILEGED | bits::AF | 0b01;
    // nT, bit 16, and the rest below a block's size are no address.
    mem.store(Gpa(0x1008), block | 1 << 16 | 1 << 20).expect("memory");
    let found = walk(&format, &mem, Iova(0x4000_1234), USER_READ).expect("mapped");
    let output = Gpa(0x40_0000_0000 - (1 << 30));
    assert_eq!((found.iova, found.output, found.size_lg2), (Iova(0x4000_0000), output, 30));
    assert!(found.global);
    mem.store(Gpa(0x1008), block | bits::NOT_GLOBAL).expect("memory");
    assert!(!walk(&format, &mem, Iova(0x4000_0000), USER_READ).expect("mapped").global);
    assert_eq!(mem.store(Gpa(0x2000), 0), Err(NotMemory));
}
