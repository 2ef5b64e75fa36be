use super::*;
use crate::suite::FlatMem;
use crate::{TableMem, walk};

const ALL: u64 = bits::PRESENT | bits::WRITE | bits::USER;
const NEXT: [u64; 4] = [0, 0x4000, 0x3000, 0x2000];

fn format(flags: X86Flags) -> X86 {
    let params = X86Params { root: Gpa(0x1fff), levels: X86Levels::Four, output_lg2: 46, flags };
    X86::new(params).expect("legal")
}

/// Tables at 0x1000 (level 3) to 0x4000 (level 0) on the way to address 0. `entries[level]` without the address of the
/// next table; that of level 0 is whole.
fn four_levels(entries: [u64; 4]) -> FlatMem {
    let mem = FlatMem::new(Gpa(0x1000), 0x4000);
    for level in 0..4 {
        mem.store(Gpa(0x4000 - 0x1000 * level as u64), entries[level] | NEXT[level]).expect("memory");
    }
    mem
}

fn answer(flags: X86Flags, entries: [u64; 4], access: Access) -> Result<Translation, WalkFault> {
    walk(&format(flags), &four_levels(entries), Iova(0), access)
}

fn denied<T>(denied: Denied) -> Result<T, WalkFault> {
    Err(WalkFault::Permission { level: 0, denied })
}

const PRIV_READ: Access = Access { kind: AccessKind::Read, privileged: true };
const PRIV_WRITE: Access = Access { kind: AccessKind::Write, privileged: true };
const EXECUTE: Access = Access { kind: AccessKind::Execute, privileged: false };
const PRIV_EXECUTE: Access = Access { kind: AccessKind::Execute, privileged: true };

/// VT-d, 9.8: bit positions, by hand.
#[test]
fn golden_entries() {
    let format = format(X86Flags::NXE | X86Flags::FS1GP);
    // XD 63, D 6, A 5, U/S 2, R/W 1, P 0.
    let output = Gpa(0x0000_1234_4000_0000);
    assert_eq!(format.leaf_entry(0, output, Attrs::READ_WRITE), Some(0x8000_1234_4000_0067));
    assert_eq!(format.leaf_entry(1, output, Attrs::READ_WRITE), Some(0x8000_1234_4000_00e7));
    assert_eq!(format.leaf_entry(2, output, Attrs::READ), Some(0x8000_1234_4000_00a5));
    // PAT is bit 7 of a 4 KiB leaf and bit 12 of a larger one; PCD 4, PWT 3.
    let attrs = Attrs { memory_type: 7, execute: true, global: true, user: false, ..Attrs::READ };
    assert_eq!(format.leaf_entry(0, output, attrs), Some(0x0000_1234_4000_01b9));
    assert_eq!(format.leaf_entry(1, output, attrs), Some(0x0000_1234_4000_11b9));
    assert_eq!(format.table_entry(output), 0x0000_1234_4000_0027);
    let extended = self::format(X86Flags::EAFE);
    assert_eq!(extended.table_entry(output), 0x0000_1234_4000_0427);
    // Without NXE bit 63 would be ignored.
    assert_eq!(extended.leaf_entry(0, output, Attrs::READ), Some(0x0000_1234_4000_0425));
}

#[test]
fn reserved_bits() {
    let plain = format(X86Flags::empty());
    let rich = format(X86Flags::FS1GP | X86Flags::NXE);
    for level in 0..4 {
        for bit in 46..52 {
            assert_eq!(rich.decode(level, 1 | 1 << bit), Entry::Reserved, "level {level} bit {bit}");
        }
        for bit in (52..64).chain([9, 11]) {
            assert_ne!(plain.decode(level, 1 | 1 << bit), Entry::Reserved, "level {level} bit {bit}");
        }
        assert_ne!(rich.decode(level, 1 | 1 << 63), Entry::Reserved);
        assert_eq!(rich.decode(level, !1), Entry::Empty);
    }
    // PS: a 2 MiB leaf always, a 1 GiB leaf by capability, above that reserved; at level 0 it is PAT.
    assert_eq!(plain.decode(0, 0x81), Entry::Leaf(Gpa(0)));
    assert_eq!(plain.decode(1, 0x81), Entry::Leaf(Gpa(0)));
    assert_eq!(plain.decode(2, 0x81), Entry::Reserved);
    assert_eq!(rich.decode(2, 0x81), Entry::Leaf(Gpa(0)));
    assert_eq!(rich.decode(3, 0x81), Entry::Reserved);
    // Address bits below a large leaf's size, but bit 12.
    for (level, low) in [(1, 13..21), (2, 13..30)] {
        for bit in low {
            assert_eq!(rich.decode(level, 0x81 | 1 << bit), Entry::Reserved, "level {level} bit {bit}");
        }
        assert_eq!(rich.decode(level, 0x1081), Entry::Leaf(Gpa(0)));
    }
}

#[test]
fn illegal_widths_are_refused() {
    for output_lg2 in [0, 31, 53, 64, 255] {
        let params = X86Params { root: Gpa(0), levels: X86Levels::Five, output_lg2, flags: X86Flags::all() };
        assert_eq!(X86::new(params), None);
    }
}

#[test]
fn only_canonical_addresses_are_admitted() {
    for (levels, lg2) in [(X86Levels::Four, 47), (X86Levels::Five, 56)] {
        let params = X86Params { root: Gpa(0), levels, output_lg2: 46, flags: X86Flags::empty() };
        let format = X86::new(params).expect("legal");
        let admit = |iova| format.admit(Iova(iova), Access::READ);
        let half = 1_u64 << lg2;
        assert_eq!(admit(half - 1), Ok(half - 1));
        assert_eq!(admit(half), Err(WalkFault::InputRange));
        assert_eq!(admit(u64::MAX << lg2), Ok(half));
        assert_eq!(admit((u64::MAX << lg2) - 1), Err(WalkFault::InputRange));
        assert_eq!(admit(u64::MAX), Ok(2 * half - 1));
    }
}

/// VT-d, 3.6.1: every level has to allow it.
#[test]
fn permissions_accumulate_over_levels() {
    let open = X86Flags::all();
    for level in 0..4 {
        let without = |bit: u64| {
            let mut entries = [ALL; 4];
            entries[level] ^= bit;
            entries
        };
        let read_only = without(bits::WRITE);
        assert_eq!(answer(open, read_only, Access::WRITE), denied(Denied::Write));
        assert_eq!(answer(open, read_only, PRIV_WRITE), denied(Denied::Write));
        assert!(answer(open - X86Flags::WPE, read_only, PRIV_WRITE).is_ok());
        assert!(answer(open, read_only, Access::READ).is_ok());
        let privileged = without(bits::USER);
        for access in [Access::READ, Access::WRITE, EXECUTE] {
            assert_eq!(answer(open, privileged, access), denied(Denied::Privilege));
        }
        assert!(answer(open, privileged, PRIV_WRITE).is_ok());
        assert!(answer(open, privileged, PRIV_EXECUTE).is_ok());
        let no_execute = without(bits::EXECUTE_DISABLE);
        assert_eq!(answer(open, no_execute, EXECUTE), denied(Denied::Execute));
        assert!(answer(open, no_execute, Access::READ).is_ok());
    }
    // SMEP: a user page.
    assert_eq!(answer(open, [ALL; 4], PRIV_EXECUTE), denied(Denied::Execute));
    assert!(answer(open - X86Flags::SMEP, [ALL; 4], PRIV_EXECUTE).is_ok());
    assert!(answer(open, [ALL; 4], EXECUTE).is_ok());
    assert_eq!(answer(open - X86Flags::ERE, [ALL; 4], EXECUTE), denied(Denied::Execute));
    assert_eq!(answer(open - X86Flags::SRE, [ALL; 4], PRIV_READ), denied(Denied::Read));
    let found = answer(X86Flags::empty(), [ALL; 4], Access::WRITE).expect("open");
    assert_eq!(found.perms, Perms::USER_READ | Perms::USER_WRITE);
}

#[test]
fn faults_in_order() {
    let none = X86Flags::empty();
    for level in 0..4_u8 {
        let with = |entry: u64| {
            // Everything below is worse, and is not reached.
            let mut entries = [0; 4];
            entries[usize::from(level)] = entry;
            entries[usize::from(level) + 1..].fill(ALL);
            entries
        };
        let reserved = 1 << 46;
        assert_eq!(
            answer(none, with(ALL ^ 1 | reserved), Access::READ),
            Err(WalkFault::NotPresent { level })
        );
        assert_eq!(answer(none, with(1 | reserved), Access::READ), Err(WalkFault::Reserved { level }));
        if let Some(below) = level.checked_sub(1) {
            // Missing rights are found once the leaf has been.
            assert_eq!(answer(none, with(1), Access::WRITE), Err(WalkFault::NotPresent { level: below }));
            let gone = Err(WalkFault::TableAccess { level: below });
            assert_eq!(answer(none, with(ALL | 1 << 40), Access::READ), gone);
        }
    }
    let params = format(none).params();
    let outside = X86::new(X86Params { root: Gpa(0x10_0000), ..params }).expect("legal");
    let fault = walk(&outside, &four_levels([ALL; 4]), Iova(0), Access::READ);
    assert_eq!(fault, Err(WalkFault::TableAccess { level: 3 }));
}

#[test]
fn accessed_and_dirty() {
    for (flags, accessed) in [(X86Flags::empty(), 0x20), (X86Flags::EAFE, 0x420)] {
        let format = format(flags);
        let mem = four_levels([ALL; 4]);
        let load = |at| mem.load(Gpa(at)).map(|entry| entry & 0xfff);
        let found = walk(&format, &mem, Iova(0), Access::READ).expect("readable");
        assert_eq!(found.perms, Perms::USER_READ, "a clean page lists no writes");
        for at in [0x1000, 0x2000, 0x3000, 0x4000] {
            assert_eq!(load(at), Ok(ALL | accessed));
        }
        let found = walk(&format, &mem, Iova(0), Access::WRITE).expect("writable");
        assert_eq!(found.perms, Perms::USER_READ | Perms::USER_WRITE);
        assert_eq!(load(0x4000), Ok(ALL | accessed | 0x40));
        assert_eq!(load(0x3000), Ok(ALL | accessed), "no dirty flag above leaves");
    }
    // A refused write leaves the leaf alone.
    let mem = four_levels([bits::PRESENT | bits::USER, ALL, ALL, ALL]);
    assert!(walk(&format(X86Flags::empty()), &mem, Iova(0), Access::WRITE).is_err());
    assert_eq!(mem.load(Gpa(0x4000)), Ok(bits::PRESENT | bits::USER));
}

#[test]
fn outputs_in_the_interrupt_range_are_refused() {
    let none = X86Flags::empty();
    let small = |output| answer(none, [output | ALL, ALL, ALL, ALL], Access::READ).map(|found| found.output);
    assert_eq!(small(0xfedf_f000), Ok(Gpa(0xfedf_f000)));
    assert_eq!(small(0xfee0_0000), Err(WalkFault::Output { level: 0 }));
    assert_eq!(small(0xfeef_f000), Err(WalkFault::Output { level: 0 }));
    assert_eq!(small(0xfef0_0000), Ok(Gpa(0xfef0_0000)));
    // Without rights, that comes first; and a refused write does not make the page dirty.
    assert_eq!(answer(none, [0xfee0_0001, ALL, ALL, ALL], Access::READ), denied(Denied::Privilege));
    let mem = four_levels([0xfee0_0000 | ALL, ALL, ALL, ALL]);
    assert_eq!(walk(&format(none), &mem, Iova(0), Access::WRITE), Err(WalkFault::Output { level: 0 }));
    assert_eq!(mem.load(Gpa(0x4000)), Ok(0xfee0_0000 | ALL));
}

/// A large page around the interrupt range translates, in pieces that do not touch it.
#[test]
fn large_pages_around_the_interrupt_range() {
    let format = format(X86Flags::FS1GP);
    let mem = FlatMem::new(Gpa(0x1000), 0x2000);
    mem.store(Gpa(0x1000), 0x2000 | ALL).expect("memory");
    // Output 0xc000_0000 to 0xffff_ffff for 0x4000_0000 to 0x7fff_ffff.
    mem.store(Gpa(0x2008), 0xc000_0000 | ALL | bits::PAGE_SIZE).expect("memory");
    for (iova, first, size_lg2) in [
        (0x4000_0000, 0x4000_0000, 29),
        (0x6000_0000, 0x6000_0000, 28),
        (0x7edf_ffff, 0x7ec0_0000, 21),
        (0x7ef0_0000, 0x7ef0_0000, 20),
        (0x7f00_0000, 0x7f00_0000, 24),
        (0x7fff_ffff, 0x7f00_0000, 24),
    ] {
        let found = walk(&format, &mem, Iova(iova), Access::READ).expect("mapped");
        assert_eq!((found.iova, found.size_lg2), (Iova(first), size_lg2), "{iova:#x}");
        assert_eq!(found.apply(Iova(iova)), Gpa(iova + 0x8000_0000));
    }
    for iova in [0x7ee0_0000, 0x7eef_ffff] {
        assert_eq!(walk(&format, &mem, Iova(iova), Access::READ), Err(WalkFault::Output { level: 2 }));
    }
}
