//! Why bytes are not a request.

use crate::{RequestType, Status};

/// Why bytes are not a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// There is not even a head.
    #[error("request of {length} bytes has no head")]
    NoHead {
        /// Length in bytes of the device-readable part.
        length: usize,
    },
    /// The type is not known (D-10).
    #[error("unknown request type {kind}")]
    UnknownType {
        /// The number found.
        kind: u8,
    },
    /// The device-readable part ends too early.
    #[error("{} of {length} bytes is too short", kind.name())]
    Short {
        /// The kind of request.
        kind: RequestType,
        /// Length in bytes of the device-readable part.
        length: usize,
    },
    /// Reserved bytes that must be zero are not (D-17 and the like).
    #[error("{}: reserved bytes are not zero", kind.name())]
    Reserved {
        /// The kind of request.
        kind: RequestType,
    },
    /// Flags that the specification does not define (D-18, D-32).
    #[error("{}: unknown flags {flags:#x}", kind.name())]
    UnknownFlags {
        /// The kind of request.
        kind: RequestType,
        /// The undefined bits.
        flags: u64,
    },
    /// A field that selects has a value without meaning.
    #[error("{}: {field} has no meaning {value:#x}", kind.name())]
    BadSelector {
        /// The kind of request.
        kind: RequestType,
        /// The field's name in the specification.
        field: &'static str,
        /// The value found.
        value: u64,
    },
    /// INVALIDATE names no pages, pages of no size, or a range that leaves the 64-bit space.
    #[error("INVALIDATE: no such address range")]
    BadAddressRange,
    /// A PASID needs more than 20 bits.
    #[error("{}: PASID {pasid:#x} is wider than 20 bits", kind.name())]
    WidePasid {
        /// The kind of request.
        kind: RequestType,
        /// The value found.
        pasid: u32,
    },
}

impl DecodeError {
    /// The status that the guest gets; `None` where the request is returned unwritten (D-10, D-11).
    pub const fn status(&self) -> Option<Status> {
        match self {
            Self::NoHead { .. } | Self::UnknownType { .. } => None,
            Self::WidePasid { kind: RequestType::AttachTable, .. } => Some(Status::Unsupp),
            Self::Short { .. }
            | Self::Reserved { .. }
            | Self::UnknownFlags { .. }
            | Self::BadSelector { .. }
            | Self::BadAddressRange
            | Self::WidePasid { .. } => Some(Status::Inval),
        }
    }
}
