//! From a range of addresses to what TLBI can express.

use pgtable_formats::IovaRange;
use pgtable_formats::leaf::vmsav8::Granule;

use crate::vendor::block::low_byte;

/// What one TLBI by address is about. A frame is an address divided by 4096.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pages {
    /// Whatever translates one address, in tables of any granule (TG=0): legal on every SMMU, while TG with a range of
    /// one page is reserved.
    One {
        /// Of the address.
        frame: u64,
    },
    /// `(num + 1) << scale` pages in tables of one granule, from any page on.
    Many {
        /// Of the first address.
        frame: u64,
        /// The size of a page.
        granule: Granule,
        /// 0 to 31.
        num: u8,
        /// 0 to 31.
        scale: u8,
    },
}

/// Whether dropping `range` by address is possible, and cheaper than dropping all addresses. `by_range`: the SMMU has
/// commands of ranges (IDR3.RIL).
pub(super) const fn is_worthwhile(range: IovaRange, granule: Granule, by_range: bool) -> bool {
    let count = count(range, granule);
    // One at a time: fewer than one table has entries.
    if by_range { count >> MOST_PAGES_LG2 == 0 } else { count < 1 << (granule.lg2() - 3) }
}

/// The pages that `range` touches: one command for each, or at most 8 by range. For what [`is_worthwhile`].
pub(super) fn split(range: IovaRange, granule: Granule, by_range: bool) -> Vec<Pages> {
    let (first, count) = (range.start().0 >> granule.lg2(), count(range, granule));
    if by_range {
        return in_ranges(first, count, granule);
    }
    (first..first + count).map(|page| Pages::One { frame: frame(page, granule) }).collect()
}

/// log2 of 4096, in which commands count.
const FRAME_LG2: u8 = 12;
const NUM_LG2: u8 = 5;
/// A sixth bit, which needs IDR5.DS, would serve ranges that are larger than half of an address space.
const SCALE_MAX: u8 = 31;
const MOST_PAGES_LG2: u8 = NUM_LG2 + SCALE_MAX;

/// 5 bits of the number of pages in each command, lowest first.
fn in_ranges(first: u64, count: u64, granule: Granule) -> Vec<Pages> {
    let mut commands = Vec::new();
    let (mut page, mut left) = (first, count);
    while left != 0 {
        let frame = frame(page, granule);
        let scale = low_byte(left.trailing_zeros().into()).min(SCALE_MAX);
        let pages = left >> scale & ((1 << NUM_LG2) - 1);
        commands.push(match (pages, scale) {
            (1, 0) => Pages::One { frame },
            _ => Pages::Many { frame, granule, num: low_byte(pages - 1), scale },
        });
        page += pages << scale;
        left -= pages << scale;
    }
    commands
}

/// How many pages `range` touches: at most 2^52.
const fn count(range: IovaRange, granule: Granule) -> u64 {
    (range.last().0 >> granule.lg2()) - (range.start().0 >> granule.lg2()) + 1
}

const fn frame(page: u64, granule: Granule) -> u64 {
    page << (granule.lg2() - FRAME_LG2)
}
