//! The builder and the walker against two crates that know the formats from elsewhere.
#![allow(clippy::expect_used, clippy::cast_possible_truncation, reason = "helpers of tests")]

use aarch64_paging::descriptor::{El1Attributes, PhysicalAddress};
use aarch64_paging::paging::{Constraints, El1And0, MemoryRegion, RootTable, VaRange};
use aarch64_paging::target::TargetAllocator;
use pgtable_formats::edit::{EditOptions, Editor};
use pgtable_formats::format::Attrs;
use pgtable_formats::leaf::{
    Granule, Vmsav8, Vmsav8Flags, Vmsav8Params, X86, X86Flags, X86Levels, X86Params,
};
use pgtable_formats::suite::{self, FlatMem};
use pgtable_formats::visit::{leaf_at, leaves};
use pgtable_formats::{Access, Format, Gpa, Iova, IovaRange, walk};
use proptest::prelude::*;
use x86_64::structures::paging::{PageTableFlags, PhysFrame, Size4KiB, page_table::PageTableEntry};
use x86_64::{PhysAddr, VirtAddr};

const TABLES: Gpa = Gpa(0x8000_0000);

fn vmsav8(root: Gpa, upper: bool) -> Vmsav8 {
    let params = Vmsav8Params {
        root,
        granule: Granule::K4,
        input_lg2: 48,
        output_lg2: 48,
        wide: false,
        upper,
        flags: Vmsav8Flags::empty(),
    };
    Vmsav8::new(params).expect("a legal geometry")
}

fn x86(root: Gpa, levels: X86Levels) -> X86 {
    let flags = X86Flags::FS1GP | X86Flags::NXE | X86Flags::ERE;
    X86::new(X86Params { root, levels, output_lg2: 52, flags }).expect("a legal geometry")
}

/// (iova, output, size, entry), in order.
fn list<F: Format>(format: &F, mem: &FlatMem) -> Vec<(Iova, Gpa, u8, u64)> {
    let mut list = Vec::new();
    leaves(format, mem, u64::MAX, |leaf| list.push((leaf.iova, leaf.output, leaf.size_lg2, leaf.entry)))
        .expect("no budget");
    list
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    /// Both builders make the same leaves, to the bit; and the walker finds them in the other's tables.
    #[test]
    fn vmsav8_as_aarch64_paging_builds_it(
        (page, output, pages) in prop::sample::select(vec![0_u8, 4, 9, 13, 18]).prop_flat_map(|lg2| {
            let aligned = move |n: u64| n >> lg2 << lg2;
            (
                (0..1_u64 << 35).prop_map(aligned),
                (0..1_u64 << 30).prop_map(aligned),
                // Enough for two of the largest pages that fit.
                prop_oneof![Just(1_u64 << lg2), 1..(64_u64 << (lg2 / 2)), (1_u64 << lg2)..(2 << lg2)],
            )
        }),
        upper in any::<bool>(), write in any::<bool>(), user in any::<bool>(),
    ) {
        let attrs = Attrs { user, write, execute: false, global: false, memory_type: 3, clean: false };
        let mut flags = El1Attributes::VALID | El1Attributes::ATTRIBUTE_INDEX_3 | El1Attributes::INNER_SHAREABLE
            | El1Attributes::ACCESSED | El1Attributes::NON_GLOBAL | El1Attributes::UXN | El1Attributes::PXN;
        flags.set(El1Attributes::USER, user);
        flags.set(El1Attributes::READ_ONLY, !write);
        let base = if upper { u64::MAX << 48 } else { 0 };
        let (start, bytes) = (base | page << 12, pages << 12);

        let half = if upper { VaRange::Upper } else { VaRange::Lower };
        let mut theirs = RootTable::with_va_range(TargetAllocator::new(TABLES.0), 0, El1And0, half);
        let region = MemoryRegion::new(start as usize, (start + bytes) as usize);
        theirs.map_range(&region, PhysicalAddress((output << 12) as usize), flags, Constraints::empty()).expect("mapped");
        let image = theirs.translation().as_bytes();
        let their_mem = FlatMem::new(TABLES, image.len());
        for (number, word) in image.chunks_exact(8).enumerate() {
            let word = u64::from_le_bytes(word.try_into().expect("8 bytes"));
            their_mem.store(Gpa(TABLES.0 + number as u64 * 8), word).expect("memory");
        }
        let their_format = vmsav8(Gpa(theirs.to_physical().0 as u64), upper);

        let (format, mut mem) = suite::empty(FlatMem::new(TABLES, 8 << 20), |root| vmsav8(root, upper));
        let range = IovaRange::from_length(Iova(start), bytes).expect("a range");
        Editor::new(format, &mut mem, EditOptions::default()).map(range, Gpa(output << 12), attrs).expect("mapped");

        let (our_list, their_list) = (list(&format, &mem), list(&their_format, &their_mem));
        prop_assert_eq!(our_list.len(), their_list.len());
        prop_assert_eq!(our_list.iter().zip(&their_list).find(|(ours, theirs)| ours != theirs), None);
        for offset in [0, bytes / 2, bytes - 1] {
            let iova = Iova(start + offset);
            let found = walk(&their_format, &their_mem, iova, Access { privileged: !user, ..Access::READ });
            prop_assert_eq!(found.map(|found| found.apply(iova)), Ok(Gpa((output << 12) + offset)));
        }
    }

    /// The entries on the way to a page, their places and their bits are what `x86_64` says.
    #[test]
    fn x86_as_x86_64_describes_it(address in any::<u64>(), frame in 0..1_u64 << 40, bits in 0..16_u8) {
        let iova = VirtAddr::new_truncate(address & !0xfff);
        let (user, write, execute, global) = (bits & 1 != 0, bits & 2 != 0, bits & 4 != 0, bits & 8 != 0);
        let attrs = Attrs { user, write, execute, global, memory_type: 0, clean: true };
        let (format, mut mem) = suite::empty(FlatMem::new(TABLES, 1 << 20), |root| x86(root, X86Levels::Four));
        let range = IovaRange::from_length(Iova(iova.as_u64()), 0x1000).expect("a range");
        Editor::new(format, &mut mem, EditOptions::default()).map(range, Gpa(frame << 12), attrs).expect("mapped");

        let mut flags = PageTableFlags::PRESENT | PageTableFlags::ACCESSED;
        flags.set(PageTableFlags::USER_ACCESSIBLE, user);
        flags.set(PageTableFlags::WRITABLE, write);
        flags.set(PageTableFlags::NO_EXECUTE, !execute);
        flags.set(PageTableFlags::GLOBAL, global);
        let mut expected = PageTableEntry::new();
        expected.set_frame(PhysFrame::<Size4KiB>::containing_address(PhysAddr::new(frame << 12)), flags);
        let leaf = leaf_at(&format, &mem, range.start()).expect("memory").expect("mapped");
        prop_assert_eq!(leaf.entry, expected.addr().as_u64() | expected.flags().bits());
        prop_assert_eq!(leaf.at.0 & 0xfff, u64::from(iova.p1_index()) * 8);
        let index = |level| format.index(level, address);
        prop_assert_eq!(index(3), u64::from(iova.p4_index()));
        prop_assert_eq!(index(2), u64::from(iova.p3_index()));
        prop_assert_eq!(index(1), u64::from(iova.p2_index()));
    }

    #[test]
    fn x86_canonical_as_x86_64_says(address in any::<u64>(), shift in 0..18_u32) {
        // Shifted right with its sign, so that both answers come up.
        let address = (address.cast_signed() >> shift).cast_unsigned();
        let admitted = x86(Gpa(0), X86Levels::Four).admit(Iova(address), Access::READ).is_ok();
        prop_assert_eq!(admitted, VirtAddr::try_new(address).is_ok());
    }
}
