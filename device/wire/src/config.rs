//! The configuration space.

use zerocopy::{FromBytes, IntoBytes};

use crate::layout::ConfigLayout;
use crate::{DomainId, Iova, IovaRange};

/// Domain IDs that a driver may use, both ends inside.
///
/// # Invariants
/// `first <= last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainRange {
    first: DomainId,
    last: DomainId,
}

impl DomainRange {
    /// Every 32-bit number.
    pub const ALL: Self = Self { first: DomainId(0), last: DomainId(u32::MAX) };

    /// `None` where `last` lies before `first`.
    pub const fn new(first: DomainId, last: DomainId) -> Option<Self> {
        if first.0 <= last.0 { Some(Self { first, last }) } else { None }
    }

    /// Whether `domain` lies inside.
    #[inline]
    pub const fn contains(self, domain: DomainId) -> bool {
        self.first.0 <= domain.0 && domain.0 <= self.last.0
    }

    /// The lowest ID.
    pub const fn first(self) -> DomainId {
        self.first
    }

    /// The highest ID.
    pub const fn last(self) -> DomainId {
        self.last
    }
}

/// The configuration space (virtio 1.4, 5.13.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Its lowest set bit is the granule of every MAP, its others are hints. Never zero (D-4).
    pub page_size_mask: u64,
    /// Addresses that may be mapped.
    pub input_range: IovaRange,
    /// Domain IDs that may be used.
    pub domain_range: DomainRange,
    /// Length in bytes of the properties area of PROBE.
    pub probe_size: u32,
    /// Whether unattached endpoints are in bypass.
    pub bypass: bool,
}

impl Config {
    /// Length in bytes.
    pub const LEN: usize = size_of::<ConfigLayout>();
    /// Where the one writable byte is.
    pub const BYPASS_OFFSET: usize = core::mem::offset_of!(ConfigLayout, bypass);

    /// The bytes.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let layout = ConfigLayout {
            page_size_mask: self.page_size_mask.into(),
            input_start: self.input_range.start().0.into(),
            input_end: self.input_range.last().0.into(),
            domain_start: self.domain_range.first.0.into(),
            domain_end: self.domain_range.last.0.into(),
            probe_size: self.probe_size.into(),
            bypass: self.bypass.into(),
            reserved: [0; 3],
        };
        let mut bytes = [0; Self::LEN];
        bytes.copy_from_slice(layout.as_bytes());
        bytes
    }

    /// Reads the bytes, ignoring bits 7:1 of `bypass`. `None` where a device broke the specification: no page
    /// size, or a range whose end lies before its start.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Option<Self> {
        let layout = ConfigLayout::read_from_bytes(bytes).ok()?;
        let page_size_mask = layout.page_size_mask.get();
        if page_size_mask == 0 {
            return None;
        }
        Some(Self {
            page_size_mask,
            input_range: IovaRange::new(Iova(layout.input_start.get()), Iova(layout.input_end.get()))?,
            domain_range: DomainRange::new(
                DomainId(layout.domain_start.get()),
                DomainId(layout.domain_end.get()),
            )?,
            probe_size: layout.probe_size.get(),
            bypass: layout.bypass & 1 != 0,
        })
    }
}
