//! Addresses and PASIDs, each with a type of its own, so that no function takes two bare `u64`.

use core::fmt;

/// A guest-physical address: what a stage-1 table produces, and where the guest's tables lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(pub u64);

/// An I/O virtual address: what a device puts on the bus, before any translation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Iova(pub u64);

impl Gpa {
    /// The address `offset` bytes further, or `None` where that leaves the 64-bit space.
    #[inline]
    pub const fn checked_add(self, offset: u64) -> Option<Self> {
        match self.0.checked_add(offset) {
            Some(address) => Some(Self(address)),
            None => None,
        }
    }

    /// Whether the low `lg2` bits (less than 64) are zero.
    #[inline]
    pub const fn is_aligned(self, lg2: u8) -> bool {
        self.0 & ((1 << lg2) - 1) == 0
    }
}

impl Iova {
    /// The address `offset` bytes further, or `None` where that leaves the 64-bit space.
    #[inline]
    pub const fn checked_add(self, offset: u64) -> Option<Self> {
        match self.0.checked_add(offset) {
            Some(address) => Some(Self(address)),
            None => None,
        }
    }
}

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A process address space identifier, 20 bits (PCIe); Arm calls it SubstreamID.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pasid(u32);

impl Pasid {
    /// Width of a PASID in bits.
    pub const BITS: u8 = 20;
    /// PASID 0, which serves untagged DMA where the architecture says so.
    pub const ZERO: Self = Self(0);

    /// `None` where `value` does not fit 20 bits.
    #[inline]
    pub const fn new(value: u32) -> Option<Self> {
        if value >> Self::BITS == 0 { Some(Self(value)) } else { None }
    }

    /// The number.
    #[inline]
    pub const fn value(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Pasid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A range of I/O virtual addresses with both ends inside, so that it can reach 2^64-1.
///
/// # Invariants
/// `start <= last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IovaRange {
    start: u64,
    last: u64,
}

impl IovaRange {
    /// Every address.
    pub const ALL: Self = Self { start: 0, last: u64::MAX };

    /// `None` where `last` lies before `start`.
    #[inline]
    pub const fn new(start: Iova, last: Iova) -> Option<Self> {
        if start.0 <= last.0 { Some(Self { start: start.0, last: last.0 }) } else { None }
    }

    /// `length` bytes from `start`; `None` where `length` is 0 or the range leaves the 64-bit space.
    #[inline]
    pub const fn from_length(start: Iova, length: u64) -> Option<Self> {
        match length.checked_sub(1) {
            Some(offset) => match start.0.checked_add(offset) {
                Some(last) => Some(Self { start: start.0, last }),
                None => None,
            },
            None => None,
        }
    }

    /// The first address.
    #[inline]
    pub const fn start(self) -> Iova {
        Iova(self.start)
    }

    /// The last address, inside the range.
    #[inline]
    pub const fn last(self) -> Iova {
        Iova(self.last)
    }

    /// Length in bytes less one; the length itself need not fit 64 bits.
    #[inline]
    pub const fn length_minus_one(self) -> u64 {
        self.last - self.start
    }

    /// Whether `address` lies inside.
    #[inline]
    pub const fn contains(self, address: Iova) -> bool {
        self.start <= address.0 && address.0 <= self.last
    }

    /// Whether the whole of `other` lies inside.
    #[inline]
    pub const fn covers(self, other: Self) -> bool {
        self.start <= other.start && other.last <= self.last
    }

    /// Whether any address lies in both.
    #[inline]
    pub const fn overlaps(self, other: Self) -> bool {
        self.start <= other.last && other.start <= self.last
    }
}

impl fmt::Display for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start, self.last)
    }
}
