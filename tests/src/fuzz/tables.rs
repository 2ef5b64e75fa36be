//! Walks over memory of any kind.

use arbitrary::Unstructured;
use pgtable_formats::format::Attrs;
use pgtable_formats::leaf::{
    Granule, Vmsav8, Vmsav8Flags, Vmsav8Params, X86, X86Flags, X86Levels, X86Params,
};
use pgtable_formats::suite::FlatMem;
use pgtable_formats::visit::leaf_at;
use pgtable_formats::walk::{Step, walk_from};
use pgtable_formats::{Access, AccessKind, Format, Gpa, Iova, TableMem, walk};

use super::Filler;
use crate::model::words::{self, Kind, Space};

const BASE: u64 = 0x4000_0000;
const BYTES: usize = 0x2_0000;

/// Walks end, agree with themselves, and with the model's walks; translations are aligned and within bounds.
pub fn walker(bytes: &[u8]) {
    let mut bytes = Unstructured::new(bytes);
    let root = Gpa(BASE);
    let is_x86 = bytes.arbitrary().unwrap_or(false);
    if is_x86 {
        let levels = if bytes.arbitrary().unwrap_or(false) { X86Levels::Five } else { X86Levels::Four };
        let flags = X86Flags::from_bits_truncate(bytes.arbitrary().unwrap_or(0));
        let output_lg2 = bytes.int_in_range(32..=52).unwrap_or(32);
        let format = X86::new(X86Params { root, levels, output_lg2, flags }).expect("legal numbers");
        check(format, &mut bytes, Some(space(&format)).filter(|_| !flags.contains(X86Flags::NXE)));
    } else {
        let granule = *bytes.choose(&Granule::ALL).unwrap_or(&Granule::K4);
        let wide = bytes.arbitrary().unwrap_or(false);
        let input_lg2 = bytes.int_in_range(16..=if wide { 52 } else { 48 }).unwrap_or(16);
        let output_lg2 = bytes.int_in_range(32..=52).unwrap_or(32);
        let upper = bytes.arbitrary().unwrap_or(false);
        let flags = Vmsav8Flags::from_bits_truncate(bytes.arbitrary().unwrap_or(0));
        let params = Vmsav8Params { root, granule, input_lg2, output_lg2, wide, upper, flags };
        let Some(format) = Vmsav8::new(params) else {
            assert_eq!((granule, input_lg2), (Granule::K64, 16), "the one size that there is not");
            return;
        };
        let is_plain = granule == Granule::K4 && !wide && !upper && flags.is_empty();
        let output = u32::from(output_lg2.min(48));
        let space = Space::Arm { root: BASE, input: input_lg2.into(), output, asid: 0 };
        check(format, &mut bytes, Some(space).filter(|_| is_plain));
    }
}

/// What the model knows of a VT-d table without execute requests.
fn space(format: &X86) -> Space {
    let params = format.params();
    let sre = params.flags.contains(X86Flags::SRE);
    Space::Vtd {
        root: params.root.0,
        levels: if params.levels == X86Levels::Five { 5 } else { 4 },
        sre,
        wpe: sre && params.flags.contains(X86Flags::WPE),
        haw: params.output_lg2.into(),
        giant_pages: params.flags.contains(X86Flags::FS1GP),
    }
}

fn check<F: Format>(format: F, bytes: &mut Unstructured<'_>, space: Option<Space>) {
    let memory = FlatMem::new(Gpa(BASE), BYTES);
    fill(format, bytes, &memory);
    for _ in 0..16 {
        let index = bytes.arbitrary::<u64>().unwrap_or(0);
        let index =
            if bytes.ratio(7, 8).unwrap_or(true) { index & ((1 << format.input_lg2()) - 1) } else { index };
        let iova = if bytes.ratio(7, 8).unwrap_or(true) {
            format.iova(index & ((1 << format.input_lg2()) - 1))
        } else {
            Iova(index)
        };
        let kind = *bytes
            .choose(&[AccessKind::Read, AccessKind::Write, AccessKind::Execute])
            .unwrap_or(&AccessKind::Read);
        let access = Access { kind, privileged: bytes.arbitrary().unwrap_or(false) };
        check_walk(format, &memory, iova, access, space);
        if bytes.is_empty() {
            break;
        }
    }
}

fn check_walk<F: Format>(format: F, memory: &FlatMem, iova: Iova, access: Access, space: Option<Space>) {
    let foretold = space.map(|space| {
        let kind = match access.kind {
            AccessKind::Read => Kind::Read,
            AccessKind::Write => Kind::Write,
            AccessKind::Execute => Kind::Execute,
        };
        let access = words::Access { kind, privileged: access.privileged };
        let word = |at| memory.load(Gpa(at)).ok();
        space.walk(&word, iova.0, access).map(|(leaf, _)| leaf.apply(iova.0)).ok()
    });
    let mut steps = Vec::new();
    let answer = walk_from(&format, memory, Step::root(&format), iova, access, |step| steps.push(step));
    assert!(steps.len() <= usize::from(format.top_level()));
    assert_eq!(walk(&format, memory, iova, access), answer, "the same again");
    // The model has no execute requests on VT-d, where they are refused before a walk.
    let is_known = !(matches!(space, Some(Space::Vtd { .. })) && access.kind == AccessKind::Execute);
    if let Some(foretold) = foretold.filter(|_| is_known) {
        assert_eq!(answer.map(|found| found.apply(iova).0).ok(), foretold, "{iova} {access:?}");
    }
    let Ok(found) = answer else { return };
    for step in steps {
        assert_eq!(
            walk_from(&format, memory, step, iova, access, |_| ()),
            answer,
            "from level {}",
            step.level
        );
    }
    let mask = (1_u64 << found.size_lg2) - 1;
    assert_eq!((found.iova.0 & mask, found.output.0 & mask), (0, 0), "aligned");
    let index = format.admit(iova, access).expect("an address that was translated");
    assert!(found.contains(format.iova(index)), "around the address");
    assert!(found.perms.allow(access), "what passed may pass");
    // Of a block that is larger than the output size, what the entry holds is what is checked.
    assert_eq!(found.output.0 >> format.output_lg2(), 0, "a legal output");
    assert_eq!(found.output.0 & mask, 0);
    let leaf = leaf_at(&format, memory, iova).expect("memory").expect("a leaf");
    assert!(leaf.size_lg2 >= found.size_lg2 && leaf.output.0 <= found.output.0);
}

/// Tables that lead to each other, spoiled by words of the input.
fn fill<F: Format>(format: F, bytes: &mut Unstructured<'_>, memory: &FlatMem) {
    let mut filler = Filler::new(bytes.arbitrary().unwrap_or(0));
    let good = bytes.int_in_range(0..=8_u64).unwrap_or(8);
    let tables = BYTES as u64 >> 16;
    for offset in (0..BYTES as u64).step_by(8) {
        let random = filler.next();
        let word = match random % 16 {
            0 => filler.next(),
            kind if kind <= good => {
                let attrs = Attrs { user: random & 0x100 != 0, write: random & 0x200 != 0, ..Attrs::READ };
                let table = Gpa(BASE + (random >> 32) % tables * 0x1_0000);
                match random >> 12 & 3 {
                    0 => format.leaf_entry((random >> 16) as u8 & 1, table, attrs).unwrap_or(0),
                    _ => format.table_entry(table),
                }
            }
            _ => {
                format.table_entry(Gpa(BASE + (random >> 32) % (BYTES as u64 >> 12) * 0x1000))
                    ^ 1 << (random >> 8 & 63)
            }
        };
        memory.store(Gpa(BASE + offset), word).expect("memory");
    }
    let patches = bytes.int_in_range(0..=32).unwrap_or(0);
    for _ in 0..patches {
        let at = bytes.int_in_range(0..=BYTES as u64 / 8 - 1).unwrap_or(0);
        let word = bytes.arbitrary().unwrap_or(0);
        memory.store(Gpa(BASE + 8 * at), word).expect("memory");
    }
}
