//! What a context descriptor says of one half of an address space.

use crate::Gpa;

/// The size of the smallest page and of every table below the root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Granule {
    /// 4 KiB.
    K4 = 12,
    /// 16 KiB.
    K16 = 14,
    /// 64 KiB.
    K64 = 16,
}

impl Granule {
    /// Every granule.
    pub const ALL: [Self; 3] = [Self::K4, Self::K16, Self::K64];

    /// log2 of the size in bytes.
    #[inline]
    pub const fn lg2(self) -> u8 {
        self as u8
    }
}

bitflags::bitflags! {
    /// What a context descriptor says about one half, or both. Names are the descriptor's (IHI 0070, 5.4).
    ///
    /// UWXN is missing: it matters to AArch32 tables only. Here what unprivileged writes reach is never executable
    /// by privileged accesses.
    ///
    /// Bits 8:0 lie as in bits 43:35 of a descriptor (TBI as in TBI0), HAD and E0PD next to each other as there: so
    /// that they are taken over together.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Vmsav8Flags: u16 {
        /// AFFD: a clear access flag is no fault.
        const AFFD = 1 << 0;
        /// WXN: what is writable is not executable.
        const WXN = 1 << 1;
        /// TBIx: bits \[63:56\] of an address are ignored.
        const TBI = 1 << 3;
        /// PAN: privileged data accesses may not use what unprivileged ones can read.
        const PAN = 1 << 5;
        /// HD: the walk makes writable what DBM says may be; ignored without HA.
        const HD = 1 << 7;
        /// HA: the walk sets access flags.
        const HA = 1 << 8;
        /// HADx: permissions of table entries are ignored.
        const HAD = 1 << 9;
        /// E0PDx: this half is closed to unprivileged accesses.
        const E0PD = 1 << 10;
        /// EPAN: PAN is about what unprivileged accesses can only execute, too.
        const EPAN = 1 << 11;
    }
}

/// What makes a [`Vmsav8`](super::Vmsav8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Vmsav8Params {
    /// The root table, TTBx; bits below its alignment are dropped.
    pub root: Gpa,
    /// TGx.
    pub granule: Granule,
    /// Size of the input range, 64 - TxSZ: 16 (64 KiB granule: 17) to 48, to 52 where [`wide`](Self::wide) or with
    /// 64 KiB.
    pub input_lg2: u8,
    /// Effective output size, the smaller of IPS and OAS: 32 to 52.
    pub output_lg2: u8,
    /// Entries hold 52-bit addresses: CD.DS with 4 and 16 KiB granules; an OAS of 52 bits or more with 64 KiB.
    pub wide: bool,
    /// The half that TTB1 translates: addresses with bit 55 set.
    pub upper: bool,
    /// Everything else.
    pub flags: Vmsav8Flags,
}

impl Vmsav8Params {
    /// Level of the root: 0 where one table translates everything.
    #[inline]
    pub const fn top_level(&self) -> u8 {
        let above_page = self.input_lg2.saturating_sub(1).saturating_sub(self.granule.lg2());
        // Divisors that the compiler knows: a real division takes longer than all else here.
        match self.granule {
            Granule::K4 => above_page / 9,
            Granule::K16 => above_page / 11,
            Granule::K64 => above_page / 13,
        }
    }

    /// log2 of the root table's size in bytes; its alignment is that, and at least 64 bytes where outputs have 52 bits.
    #[inline]
    pub const fn root_lg2(&self) -> u8 {
        let below = self.granule.lg2() + self.top_level() * (self.granule.lg2() - 3);
        self.input_lg2.saturating_sub(below) + 3
    }

    #[inline]
    pub(super) const fn is_legal(&self) -> bool {
        let highest = if self.wide || matches!(self.granule, Granule::K64) { 52 } else { 48 };
        self.input_lg2 >= 16
            && self.input_lg2 > self.granule.lg2()
            && self.input_lg2 <= highest
            && self.output_lg2 >= 32
            && self.output_lg2 <= 52
    }
}
