//! Why a translation failed, in the architecture's own words.

use core::fmt;

use crate::context::{smmuv3, vtd};

/// A failed translation, as the architecture whose table it is would record it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// An SMMUv3 event (IHI 0070, 7.3).
    Smmuv3(smmuv3::Event),
    /// A VT-d fault reason.
    Vtd(vtd::FaultReason),
}

/// What a fault means to somebody who does not know the architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultClass {
    /// The address has no mapping.
    NotMapped,
    /// The mapping does not permit the access.
    Permission,
    /// The configuration (stream entry, context, PASID entry) does not let the access reach a page table.
    Configuration,
    /// A table could not be read: it lies outside guest memory.
    TableAccess,
    /// A table entry is malformed (reserved bits, address too wide).
    Malformed,
}

impl Fault {
    /// The kind of fault, in neutral words.
    pub const fn class(self) -> FaultClass {
        match self {
            Self::Smmuv3(event) => event.class(),
            Self::Vtd(reason) => reason.class(),
        }
    }
}

/// The architecture's own name: `F_TRANSLATION`, or for VT-d the fault reason number `0x71`.
impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Smmuv3(event) => event.fmt(f),
            Self::Vtd(reason) => reason.fmt(f),
        }
    }
}
