//! Ranges of addresses in naturally aligned powers of two: all that hardware understands of a range.

use pgtable_formats::IovaRange;

/// A naturally aligned block of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Block {
    start: u64,
    /// log2 of the size in bytes: 12 to 64.
    lg2: u8,
}

impl Block {
    /// Every address.
    pub(super) const ALL: Self = Self { start: 0, lg2: 64 };

    /// The first address.
    pub(super) const fn start(self) -> u64 {
        self.start
    }

    /// The first address divided by 4096.
    pub(super) const fn frame(self) -> u64 {
        self.start >> FRAME_LG2
    }

    /// log2 of the number of 4 KiB pages: 0 to 52.
    pub(super) const fn size(self) -> u8 {
        self.lg2 - FRAME_LG2
    }

    /// The smallest block that has both addresses.
    const fn around(first: u64, last: u64) -> Self {
        let lg2 = low_byte(64 - (first ^ last).leading_zeros() as u64);
        Self { start: first & !low_bits(lg2), lg2 }
    }
}

/// One or two blocks that cover `range`, together less than twice as large; but none is smaller than 2^`least_lg2`
/// bytes, the smallest translation unit, which is 12 or more.
pub(super) fn blocks(range: IovaRange, least_lg2: u8) -> impl Iterator<Item = Block> {
    let start = range.start().0 & !low_bits(least_lg2);
    let last = range.last().0 | low_bits(least_lg2);
    let whole = Block::around(start, last);
    let half_lg2 = whole.lg2 - 1;
    // Two pages around the middle of `whole` would need all of it.
    let middle = last & !low_bits(half_lg2);
    let (first, second) = match (last - start) >> half_lg2 {
        0 => (Block::around(start, middle - 1), Some(Block::around(middle, last))),
        _ => (whole, None),
    };
    core::iter::once(first).chain(second)
}

const FRAME_LG2: u8 = 12;

/// A mask of the lowest `count` bits.
const fn low_bits(count: u8) -> u64 {
    match 1u64.checked_shl(count as u32) {
        Some(bit) => bit - 1,
        None => u64::MAX,
    }
}

/// The lowest 8 bits.
pub(super) const fn low_byte(value: u64) -> u8 {
    let [byte, ..] = value.to_le_bytes();
    byte
}
