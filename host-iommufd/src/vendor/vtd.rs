//! VT-d scalable mode: nested first-stage tables, one for each PASID of an endpoint.
//!
//! Page requests are no matter of the vendor: a table is made with a fault queue, whoever walks it.
//!
//! Not supported: a PASID directory (the kernel has no way to hand one over), faults (it reports none of VT-d).

use pgtable_formats::context::vtd::{Cap, CapRegisters, Caps, FirstStage};
use viommu_device::host::{Invalidation, Scope};
use viommu_wire::Caches;

use super::block::blocks;
use crate::kernel::{HwptData, VtdInvalidation};

/// What a guest is shown of CAP_REG and ECAP_REG: the bits that the uAPI lists as usable with nesting.
pub const fn caps(cap: u64, ecap: u64) -> Caps {
    Caps::from_registers(CapRegisters { cap, ecap }.filtered())
}

/// A table as `iommu_hwpt_vtd_s1` has it.
///
/// The kernel ignores unknown flags and checks neither range nor alignment of the root: [`FirstStage::new`] did.
pub const fn table(table: &FirstStage) -> HwptData {
    HwptData::Vtd { flags: table.flags().bits(), root: table.root().0, address_width: table.address_width() }
}

/// log2 of the most 4 KiB pages that the unit can be told to drop at once, without dropping all (CAP_REG.MAMV); `None`
/// where it cannot be told any (CAP_REG.PSI). For [`plan`].
pub fn largest_block(caps: &Caps) -> Option<u8> {
    let cap = Cap::from_bits(caps.registers().cap);
    cap.psi().then_some(cap.mamv())
}

/// What one invalidation comes to for one nested table: one or two entries. They drop what is asked, or more.
///
/// - Ranges are naturally aligned powers of two of pages, and everything where those would be larger than
///   `largest_block`. The kernel rounds other ranges, those before 6.10 to a block that may miss their end, with a
///   warning in the host's log; and none checks that the unit has a mask for it.
/// - Device TLBs are the kernel's: it invalidates them with the translations.
/// - Where the PASID's own entry changed, everything goes: the table is another one.
/// - A tag has no meaning. Global translations go with a range; the flush of a whole table is defined for those that
///   are not global, and the uAPI has nothing stronger, so a guest has to leave bit G alone.
pub fn plan(invalidation: &Invalidation, largest_block: Option<u8>) -> Vec<VtdInvalidation> {
    let configuration = invalidation.caches.contains(Caches::PASID);
    let leaf = invalidation.leaf && !configuration;
    let everything = VtdInvalidation { address: 0, pages: ALL_PAGES, leaf };
    let (Scope::Range { range, .. }, Some(largest), false) =
        (invalidation.scope, largest_block, configuration)
    else {
        return vec![everything];
    };
    let entries = blocks(range, PAGE_LG2).map(|block| {
        let pages = 1_u64.checked_shl(block.size().into()).filter(|_| block.size() <= largest)?;
        Some(VtdInvalidation { address: block.start(), pages, leaf })
    });
    entries.collect::<Option<Vec<_>>>().unwrap_or_else(|| vec![everything])
}

/// With address 0: everything.
const ALL_PAGES: u64 = u64::MAX;
const PAGE_LG2: u8 = 12;

#[cfg(test)]
mod tests {
    use pgtable_formats::context::vtd::FirstStageFlags;
    use pgtable_formats::{Gpa, Iova, IovaRange, Pasid};
    use proptest::prelude::*;
    use viommu_wire::EndpointId;

    use super::*;

    fn asked(scope: Scope) -> Invalidation {
        Invalidation {
            endpoint: EndpointId(3),
            scope,
            caches: Caches::TLB,
            leaf: false,
            tag: None,
            global: false,
        }
    }

    fn pages_of(start: u64, last: u64) -> Scope {
        let range = IovaRange::new(Iova(start), Iova(last)).unwrap();
        Scope::Range { pasid: Pasid::new(5), range, page_lg2: 12 }
    }

    const LARGEST: Option<u8> = Some(20);

    const ALL: VtdInvalidation = VtdInvalidation { address: 0, pages: u64::MAX, leaf: false };

    #[test]
    fn only_bits_of_the_uapi_reach_a_guest() {
        let CapRegisters { cap, ecap } = caps(u64::MAX, u64::MAX).registers();
        let listed = 1 << 60 | 1 << 56 | 0x3f << 48 | 1 << 39 | 0x3f << 16 | 1 << 7 | 7;
        assert_eq!(cap, listed, "all but SAGAW, which is about the second stage");
        let first_stage = 1 << 43 | 1 << 47 | 1 << 40 | 0x1f << 35 | 1 << 31 | 1 << 34 | 1 << 48 | 1 << 49;
        let device = 1 << 29 | 1 << 2 | 1 << 42 | 1 << 41;
        assert_eq!(ecap, first_stage | device);
    }

    #[test]
    fn table_as_the_kernel_has_it() {
        let caps = caps(CapRegisters::SOFTWARE.cap, CapRegisters::SOFTWARE.ecap);
        let flags = FirstStageFlags::all();
        let five = FirstStage::new(Gpa(0x4000_1000), flags, 57, &caps).unwrap();
        let data = HwptData::Vtd { flags: 0b111, root: 0x4000_1000, address_width: 57 };
        assert_eq!(table(&five), data);
        let four = FirstStage::new(Gpa(0x4000_1000), FirstStageFlags::WPE, 48, &caps).unwrap();
        let data = HwptData::Vtd { flags: 0, root: 0x4000_1000, address_width: 48 };
        assert_eq!(table(&four), data, "WPE has no effect without SRE");
    }

    #[test]
    fn whole_tables() {
        assert_eq!(plan(&asked(Scope::Endpoint), LARGEST), [ALL]);
        assert_eq!(plan(&asked(Scope::Pasid(Pasid::new(5))), LARGEST), [ALL]);
        let leaf = Invalidation { leaf: true, ..asked(Scope::Pasid(None)) };
        assert_eq!(plan(&leaf, LARGEST), [VtdInvalidation { leaf: true, ..ALL }]);
        for caches in [Caches::PASID, Caches::all()] {
            let changed = Invalidation { caches, leaf: true, ..asked(pages_of(0x1000, 0x1fff)) };
            assert_eq!(plan(&changed, LARGEST), [ALL], "another table");
        }
    }

    #[test]
    fn ranges() {
        let entry = |address, pages| VtdInvalidation { address, pages, leaf: false };
        let of = |start, last| plan(&asked(pages_of(start, last)), LARGEST);
        assert_eq!(of(0x7f00_0000_1000, 0x7f00_0000_1fff), [entry(0x7f00_0000_1000, 1)]);
        let leaf = Invalidation { leaf: true, ..asked(pages_of(0x20_0000, 0x3f_ffff)) };
        assert_eq!(plan(&leaf, LARGEST), [VtdInvalidation { leaf: true, ..entry(0x20_0000, 512) }]);
        assert_eq!(of(0x1fff, 0x2000), [entry(0x1000, 1), entry(0x2000, 1)]);
        assert_eq!(of(0x1000, 0x4fff), [entry(0, 4), entry(0x4000, 1)]);
        assert_eq!(of(0, 0xffff_ffff), [entry(0, 1 << 20)]);
        assert_eq!(of(0, 0x1_0000_0fff), [ALL], "more than the unit has a mask for");
        assert_eq!(of(0, u64::MAX), [ALL]);
        assert_eq!(of(0x1000, u64::MAX), [ALL]);
        assert_eq!(plan(&asked(pages_of(0x1000, 0x1fff)), None), [ALL], "no ranges at all");
    }

    #[test]
    fn the_largest_block_is_the_units() {
        let of = |cap: Cap| largest_block(&caps(cap.into_bits(), CapRegisters::SOFTWARE.ecap));
        assert_eq!(of(Cap::new().with_psi(true).with_mamv(18)), Some(18));
        assert_eq!(of(Cap::new().with_psi(false).with_mamv(18)), None);
    }

    proptest! {
        /// Blocks that every kernel leaves as they are, and every unit with such a MAMV takes; together they cover the
        /// range and are less than twice as large.
        #[test]
        fn ranges_are_covered_by_blocks(start: u64, length: u64, bits in 0u32..64, largest in 0u8..64) {
            let last = start.saturating_add(length >> bits);
            let entries = plan(&asked(pages_of(start, last)), Some(largest));
            if entries == [ALL] {
                return Ok(());
            }
            let (first_page, last_page) = (start >> 12, last >> 12);
            let mut next = first_page;
            let mut sum = 0;
            for VtdInvalidation { address, pages, leaf } in entries {
                prop_assert!(!leaf && pages.is_power_of_two() && pages.trailing_zeros() <= largest.into());
                prop_assert!(address % 4096 == 0 && (address >> 12) % pages == 0);
                prop_assert!(address >> 12 <= next);
                next = (address >> 12) + pages;
                sum += pages;
            }
            prop_assert!(next > last_page);
            prop_assert!(sum == 1 || sum < 2 * (last_page - first_page + 1));
        }
    }
}
