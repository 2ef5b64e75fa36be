//! The suite of `pgtable_formats::suite` on every format in every geometry that matters.
#![allow(clippy::expect_used, reason = "helpers of tests")]

use pgtable_formats::edit::{EditError, EditOptions, Editor};
use pgtable_formats::format::Attrs;
use pgtable_formats::leaf::{
    Granule, Vmsav8, Vmsav8Flags, Vmsav8Params, X86, X86Flags, X86Levels, X86Params,
};
use pgtable_formats::suite::{self, FlatMem, Op};
use pgtable_formats::{Access, Format, Gpa, Iova, IovaRange, walk};
use proptest::prelude::*;

/// Granule, input size, output size, wide, upper half, flags.
const VMSAV8: [(Granule, u8, u8, bool, bool, Vmsav8Flags); 18] = [
    (Granule::K4, 48, 48, false, false, Vmsav8Flags::empty()),
    (Granule::K4, 48, 44, false, true, Vmsav8Flags::HAD),
    (Granule::K4, 39, 40, false, true, Vmsav8Flags::TBI),
    (Granule::K4, 25, 32, false, false, Vmsav8Flags::HA.union(Vmsav8Flags::HD)),
    (Granule::K4, 21, 32, false, false, Vmsav8Flags::empty()),
    (Granule::K4, 16, 36, false, false, Vmsav8Flags::empty()),
    (Granule::K4, 52, 52, true, false, Vmsav8Flags::empty()),
    (Granule::K4, 49, 48, true, true, Vmsav8Flags::HA),
    (Granule::K16, 48, 48, false, false, Vmsav8Flags::WXN),
    (Granule::K16, 47, 42, false, true, Vmsav8Flags::PAN.union(Vmsav8Flags::EPAN)),
    (Granule::K16, 36, 36, false, false, Vmsav8Flags::AFFD),
    (Granule::K16, 52, 52, true, true, Vmsav8Flags::empty()),
    (Granule::K64, 48, 48, false, false, Vmsav8Flags::HA.union(Vmsav8Flags::HD)),
    (Granule::K64, 42, 44, false, true, Vmsav8Flags::empty()),
    (Granule::K64, 17, 32, false, false, Vmsav8Flags::empty()),
    (Granule::K64, 52, 52, true, false, Vmsav8Flags::empty()),
    (Granule::K64, 52, 48, false, false, Vmsav8Flags::empty()),
    (Granule::K64, 52, 48, true, true, Vmsav8Flags::PAN),
];

const X86S: [(X86Levels, u8, X86Flags); 6] = [
    (X86Levels::Four, 46, X86Flags::empty()),
    (X86Levels::Four, 39, X86Flags::FS1GP.union(X86Flags::SRE)),
    (X86Levels::Four, 52, X86Flags::all()),
    (X86Levels::Five, 52, X86Flags::FS1GP),
    (X86Levels::Five, 46, X86Flags::EAFE.union(X86Flags::WPE)),
    (X86Levels::Five, 48, X86Flags::all()),
];

fn vmsav8(number: usize, root: Gpa) -> Vmsav8 {
    let (granule, input_lg2, output_lg2, wide, upper, flags) = VMSAV8[number];
    let params = Vmsav8Params { root, granule, input_lg2, output_lg2, wide, upper, flags };
    Vmsav8::new(params).expect("a legal geometry")
}

fn x86(number: usize, root: Gpa) -> X86 {
    let (levels, output_lg2, flags) = X86S[number];
    X86::new(X86Params { root, levels, output_lg2, flags }).expect("a legal geometry")
}

#[test]
fn vmsav8_passes_the_suite() {
    for (number, geometry) in VMSAV8.iter().enumerate() {
        println!("{geometry:?}");
        suite::check(|root| vmsav8(number, root));
    }
}

#[test]
fn x86_passes_the_suite() {
    for (number, geometry) in X86S.iter().enumerate() {
        println!("{geometry:?}");
        suite::check(|root| x86(number, root));
    }
}

/// Mostly aligned runs, so that large pages and groups come up.
fn ops() -> impl Strategy<Value = Vec<Op>> {
    let page = || {
        (any::<u32>(), prop::sample::select(vec![0, 4, 5, 7, 9, 11, 13])).prop_map(|(n, lg2)| n >> lg2 << lg2)
    };
    let count = || (0..3_u32, 0..14_u32).prop_map(|(extra, lg2)| (1 << lg2) + extra);
    let op = prop_oneof![
        8 => (page(), count(), page(), any::<bool>())
            .prop_map(|(page, count, output, write)| Op::Map { page, count, output, write }),
        6 => (page(), count()).prop_map(|(page, count)| Op::Unmap { page, count }),
        1 => Just(Op::Clear),
    ];
    prop::collection::vec(op, 1..24)
}

fn options() -> impl Strategy<Value = EditOptions> {
    (any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(contiguous, split, keep_tables)| EditOptions {
        contiguous,
        split,
        keep_tables,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn vmsav8_agrees_with_a_map(number in 0..VMSAV8.len(), options in options(), ops in ops()) {
        suite::run_model(|root| vmsav8(number, root), options, &ops);
    }

    #[test]
    fn x86_agrees_with_a_map(number in 0..X86S.len(), options in options(), ops in ops()) {
        suite::run_model(|root| x86(number, root), options, &ops);
    }
}

/// At whichever table the memory runs out, what was mapped before is reported, works, and all of it can be removed.
#[test]
fn running_out_of_tables_leaves_nothing_half_done() {
    let range = IovaRange::from_length(Iova(0x7fff_f000), 0x3f_f000 + 0x20_0000).expect("a range");
    for allowed in 0..8 {
        let (format, mut mem) = suite::empty(FlatMem::new(Gpa(0), 1 << 20), |root| x86(0, root));
        mem.allow_tables(Some(allowed));
        let mut editor = Editor::new(format, &mut mem, EditOptions::default());
        let done = match editor.map(range, Gpa(0x1000_0000), Attrs::READ_WRITE) {
            Ok(()) => range.length_minus_one() + 1,
            Err(stop) => {
                assert_eq!(stop.cause, EditError::NoTable);
                stop.done
            }
        };
        assert_eq!(
            done == range.length_minus_one() + 1,
            allowed >= 7,
            "{allowed} tables map {done:#x} bytes"
        );
        let mut offset = 0;
        while offset <= range.length_minus_one() {
            let iova = Iova(range.start().0 + offset);
            let found = walk(&format, &mem, iova, Access::WRITE).map(|found| found.apply(iova)).ok();
            assert_eq!(found, (offset < done).then_some(Gpa(0x1000_0000 + offset)), "{allowed}: {iova}");
            offset += 0x1000;
        }
        let unmapped = Editor::new(format, &mut mem, EditOptions::default()).clear();
        assert_eq!(unmapped.map(|unmapped| unmapped.bytes), Ok(done));
        assert_eq!(mem.tables(), 1, "only the root is left");
    }
}

#[test]
fn what_cannot_be_mapped_is_refused_before_anything_changes() {
    let (format, mut mem) = suite::empty(FlatMem::new(Gpa(0), 1 << 20), |root| x86(0, root));
    let mut editor = Editor::new(format, &mut mem, EditOptions::default());
    let range = |start, last| IovaRange::new(Iova(start), Iova(last)).expect("a range");
    let odd_type = Attrs { memory_type: 8, ..Attrs::READ };
    for (range, output, attrs, cause) in [
        (range(0x800, 0xfff), 0, Attrs::READ, EditError::Unaligned),
        (range(0, 0x7ff), 0, Attrs::READ, EditError::Unaligned),
        (range(0, 0xfff), 0x800, Attrs::READ, EditError::Unaligned),
        (range(1 << 47, (1 << 47) + 0xfff), 0, Attrs::READ, EditError::InputRange),
        // From one half into the other.
        (range((1 << 47) - 0x1000, (u64::MAX << 47) + 0xfff), 0, Attrs::READ, EditError::InputRange),
        (IovaRange::ALL, 0, Attrs::READ, EditError::InputRange),
        (range(0, 0xfff), 1 << 46, Attrs::READ, EditError::OutputRange),
        (range(0, 0x1fff), (1 << 46) - 0x1000, Attrs::READ, EditError::OutputRange),
        (range(0, 0x1fff), !0xfff, Attrs::READ, EditError::OutputRange),
        (range(0, 0xfff), 0, odd_type, EditError::Attrs),
    ] {
        let stop = editor.map(range, Gpa(output), attrs).expect_err("refused");
        assert_eq!((stop.done, stop.cause), (0, cause), "{range} {output:#x}");
    }
    assert_eq!(mem.tables(), 1);
}

/// A part of a block, and a part of a contiguous group: refused, or split so that the rest stays as it was.
#[test]
fn parts_of_blocks_and_groups() {
    let configure = |root| vmsav8(0, root);
    let contiguous = EditOptions { contiguous: true, ..EditOptions::default() };
    let (format, mut mem) = suite::empty(FlatMem::new(Gpa(0), 1 << 20), configure);
    let range = |start, length| IovaRange::from_length(Iova(start), length).expect("a range");
    let mut editor = Editor::new(format, &mut mem, contiguous);
    editor
        .map(range(0x20_0000, 0x21_0000), Gpa(0x4020_0000), Attrs::READ_WRITE)
        .expect("a block and a group");
    let leaf = |mem: &FlatMem, iova| {
        let leaf = pgtable_formats::visit::leaf_at(&format, mem, Iova(iova)).expect("memory");
        leaf.map(|leaf| (leaf.size_lg2, format.is_contiguous(leaf.entry), leaf.output))
    };
    assert_eq!(leaf(&mem, 0x20_0000), Some((21, false, Gpa(0x4020_0000))));
    assert_eq!(leaf(&mem, 0x40_f000), Some((12, true, Gpa(0x4040_f000))));
    for part in [range(0x20_0000, 0x1000), range(0x40_0000, 0x1000)] {
        let stop = Editor::new(format, &mut mem, contiguous).unmap(part).expect_err("would split");
        assert_eq!((stop.done, stop.cause), (0, EditError::WouldSplit));
    }
    let split = EditOptions { split: true, ..contiguous };
    let mut editor = Editor::new(format, &mut mem, split);
    assert_eq!(editor.unmap(range(0x3f_f000, 0x2000)).map(|unmapped| unmapped.bytes), Ok(0x2000));
    assert_eq!(leaf(&mem, 0x3f_e000), Some((12, false, Gpa(0x403f_e000))));
    assert_eq!(leaf(&mem, 0x3f_f000), None);
    assert_eq!(leaf(&mem, 0x40_0000), None);
    assert_eq!(leaf(&mem, 0x40_1000), Some((12, false, Gpa(0x4040_1000))));
}
