//! What an access asks for, and what a translation answers.

use crate::{Gpa, Iova};

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccessKind {
    /// A data read.
    Read,
    /// A data write.
    Write,
    /// An instruction read (PCIe: Execute Requested).
    Execute,
}

/// One access of a device, as far as permissions care.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    /// Read, write or execute.
    pub kind: AccessKind,
    /// The access asks for privileged mode (PCIe: Privileged Mode Requested).
    pub privileged: bool,
}

impl Access {
    /// An unprivileged data read, which is what DMA is unless it says otherwise.
    pub const READ: Self = Self { kind: AccessKind::Read, privileged: false };
    /// An unprivileged data write.
    pub const WRITE: Self = Self { kind: AccessKind::Write, privileged: false };
}

bitflags::bitflags! {
    /// What a translation lets pass, for both privilege levels.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Perms: u8 {
        /// Unprivileged reads.
        const USER_READ = 1 << 0;
        /// Unprivileged writes.
        const USER_WRITE = 1 << 1;
        /// Unprivileged instruction reads.
        const USER_EXECUTE = 1 << 2;
        /// Privileged reads.
        const PRIV_READ = 1 << 3;
        /// Privileged writes.
        const PRIV_WRITE = 1 << 4;
        /// Privileged instruction reads.
        const PRIV_EXECUTE = 1 << 5;
    }
}

impl Perms {
    /// Reads at both levels.
    pub const READ: Self = Self::USER_READ.union(Self::PRIV_READ);
    /// Writes at both levels.
    pub const WRITE: Self = Self::USER_WRITE.union(Self::PRIV_WRITE);
    /// Instruction reads at both levels.
    pub const EXECUTE: Self = Self::USER_EXECUTE.union(Self::PRIV_EXECUTE);

    /// Whether `access` may pass.
    #[inline]
    pub const fn allow(self, access: Access) -> bool {
        let kind = match access.kind {
            AccessKind::Read => 0,
            AccessKind::Write => 1,
            AccessKind::Execute => 2,
        };
        self.bits() >> (kind + if access.privileged { 3 } else { 0 }) & 1 != 0
    }
}

/// A contiguous, naturally aligned piece of an address space and where it leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Translation {
    /// First input address; a multiple of `1 << size_lg2`.
    pub iova: Iova,
    /// First output address; a multiple of `1 << size_lg2`.
    pub output: Gpa,
    /// log2 of the size in bytes, 12 to 63.
    pub size_lg2: u8,
    /// What may pass *without a new walk*: a leaf whose dirty flag the hardware would still have to set does not
    /// list writes here, although a write that walks succeeds.
    pub perms: Perms,
    /// The entry is global: it survives an invalidation by address-space tag.
    pub global: bool,
}

impl Translation {
    /// Where `iova`, which lies inside this piece, leads.
    #[inline]
    pub const fn apply(&self, iova: Iova) -> Gpa {
        Gpa(self.output.0 | iova.0 & ((1 << self.size_lg2) - 1))
    }

    /// Whether `iova` lies inside.
    #[inline]
    pub const fn contains(&self, iova: Iova) -> bool {
        (self.iova.0 ^ iova.0) >> self.size_lg2 == 0
    }
}
