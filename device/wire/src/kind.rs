//! The kinds of request: numbers, names, lengths.

use crate::layout::{
    AttachLayout, AttachTableLayout, DetachLayout, InvalidateLayout, MapLayout, PageResponseLayout,
    ProbeLayout, UnmapLayout,
};
use crate::numbers;

/// The kinds of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RequestType {
    /// [`Attach`](crate::Attach).
    Attach,
    /// [`Detach`](crate::Detach).
    Detach,
    /// [`Map`](crate::Map).
    Map,
    /// [`Unmap`](crate::Unmap).
    Unmap,
    /// [`Probe`](crate::Probe).
    Probe,
    /// [`AttachTable`](crate::AttachTable).
    AttachTable,
    /// [`Invalidate`](crate::Invalidate).
    Invalidate,
    /// [`PageResponse`](crate::PageResponse).
    PageResponse,
}

impl RequestType {
    /// Every kind.
    pub const ALL: [Self; 8] = [
        Self::Attach,
        Self::Detach,
        Self::Map,
        Self::Unmap,
        Self::Probe,
        Self::AttachTable,
        Self::Invalidate,
        Self::PageResponse,
    ];

    /// The kind with this number; `None` where there is none.
    #[inline]
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            numbers::T_ATTACH => Self::Attach,
            numbers::T_DETACH => Self::Detach,
            numbers::T_MAP => Self::Map,
            numbers::T_UNMAP => Self::Unmap,
            numbers::T_PROBE => Self::Probe,
            numbers::T_ATTACH_TABLE => Self::AttachTable,
            numbers::T_INVALIDATE => Self::Invalidate,
            numbers::T_PAGE_RESP => Self::PageResponse,
            _ => return None,
        })
    }

    /// The number on the wire.
    pub const fn number(self) -> u8 {
        match self {
            Self::Attach => numbers::T_ATTACH,
            Self::Detach => numbers::T_DETACH,
            Self::Map => numbers::T_MAP,
            Self::Unmap => numbers::T_UNMAP,
            Self::Probe => numbers::T_PROBE,
            Self::AttachTable => numbers::T_ATTACH_TABLE,
            Self::Invalidate => numbers::T_INVALIDATE,
            Self::PageResponse => numbers::T_PAGE_RESP,
        }
    }

    /// The specification's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Attach => "ATTACH",
            Self::Detach => "DETACH",
            Self::Map => "MAP",
            Self::Unmap => "UNMAP",
            Self::Probe => "PROBE",
            Self::AttachTable => "ATTACH_TABLE",
            Self::Invalidate => "INVALIDATE",
            Self::PageResponse => "PAGE_RESP",
        }
    }

    /// Length in bytes of the device-readable part.
    pub const fn readable_len(self) -> usize {
        match self {
            Self::Attach => size_of::<AttachLayout>(),
            Self::Detach => size_of::<DetachLayout>(),
            Self::Map => size_of::<MapLayout>(),
            Self::Unmap => size_of::<UnmapLayout>(),
            Self::Probe => size_of::<ProbeLayout>(),
            Self::AttachTable => size_of::<AttachTableLayout>(),
            Self::Invalidate => size_of::<InvalidateLayout>(),
            Self::PageResponse => size_of::<PageResponseLayout>(),
        }
    }
}
