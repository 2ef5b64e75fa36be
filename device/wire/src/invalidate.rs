//! INVALIDATE: what to drop of the caches over a guest's own tables.

use pgtable_formats::{Iova, IovaRange, Pasid};

use crate::layout::{HeadLayout, InvalidateLayout};
use crate::request::{pasid, zero};
use crate::{DecodeError, DomainId, RequestType};

const KIND: RequestType = RequestType::Invalidate;

/// Drop what was cached of the tables of `domain`. A device may drop more, never less.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invalidate {
    /// The domain.
    pub domain: DomainId,
    /// How much of its address spaces.
    pub scope: InvalidateScope,
    /// Which caches; never empty.
    pub caches: Caches,
    /// Only what came from leaf entries: the guest changed no table pointer.
    pub leaf: bool,
    /// Architectural tag that narrows the TLB part; on Arm the ASID, in bits 15:0.
    pub tag: Option<u64>,
    /// Global translations, too.
    pub global: bool,
}

/// How much of a domain an [`Invalidate`] is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidateScope {
    /// Every address space.
    Domain,
    /// One PASID; `None` is the address space of untagged DMA.
    Pasid(Option<Pasid>),
    /// A range of one PASID.
    Address {
        /// The PASID; `None` is the address space of untagged DMA.
        pasid: Option<Pasid>,
        /// Addresses, whole pages.
        range: IovaRange,
        /// log2 of the size in bytes of the pages named, 0 to 63.
        page_lg2: u8,
    },
}

bitflags::bitflags! {
    /// The caches of an [`Invalidate`].
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Caches: u8 {
        /// Entries fetched from the PASID table.
        const PASID = 1 << 0;
        /// Translations, those cached in the device included.
        const TLB = 1 << 1;
    }
}

bitflags::bitflags! {
    #[derive(Clone, Copy)]
    struct Flags: u16 {
        const LEAF = 1 << 0;
        const PASID = 1 << 1;
        const ID = 1 << 2;
        const GLOBAL = 1 << 3;
    }
}

const SCOPE_DOMAIN: u8 = 1;
const SCOPE_PASID: u8 = 2;
const SCOPE_ADDRESS: u8 = 3;

impl Invalidate {
    pub(crate) fn from_layout(layout: &InvalidateLayout) -> Result<Self, DecodeError> {
        if !zero(&layout.reserved) {
            return Err(DecodeError::Reserved { kind: KIND });
        }
        let flags = Flags::from_bits(layout.flags.get()).ok_or(DecodeError::UnknownFlags {
            kind: KIND,
            flags: u64::from(layout.flags.get() & !Flags::all().bits()),
        })?;
        let caches = Caches::from_bits(layout.caches)
            .filter(|caches| !caches.is_empty())
            .ok_or(DecodeError::BadSelector { kind: KIND, field: "caches", value: layout.caches.into() })?;
        let pasid = || match flags.contains(Flags::PASID) {
            true => pasid(KIND, layout.pasid.get()).map(Some),
            false => Ok(None),
        };
        let scope = match layout.scope {
            SCOPE_DOMAIN => InvalidateScope::Domain,
            SCOPE_PASID => InvalidateScope::Pasid(pasid()?),
            SCOPE_ADDRESS => InvalidateScope::Address {
                pasid: pasid()?,
                range: pages(layout.address.get(), layout.nr_pages.get(), layout.page_size)
                    .ok_or(DecodeError::BadAddressRange)?,
                page_lg2: layout.page_size,
            },
            scope => {
                return Err(DecodeError::BadSelector { kind: KIND, field: "scope", value: scope.into() });
            }
        };
        Ok(Self {
            domain: DomainId(layout.domain.get()),
            scope,
            caches,
            leaf: flags.contains(Flags::LEAF),
            tag: flags.contains(Flags::ID).then_some(layout.id.get()),
            global: flags.contains(Flags::GLOBAL),
        })
    }

    pub(crate) fn layout(&self, head: HeadLayout) -> InvalidateLayout {
        let (scope, pasid, address, nr_pages, page_size) = match self.scope {
            InvalidateScope::Domain => (SCOPE_DOMAIN, None, 0, 0, 0),
            InvalidateScope::Pasid(pasid) => (SCOPE_PASID, pasid, 0, 0, 0),
            InvalidateScope::Address { pasid, range, page_lg2 } => {
                let first = range.start().0 >> page_lg2;
                // One page less than 2^64 only where a page is a byte; no request can say 2^64 of them.
                let pages = ((range.last().0 >> page_lg2) - first).saturating_add(1);
                (SCOPE_ADDRESS, pasid, first << page_lg2, pages, page_lg2)
            }
        };
        let mut flags = Flags::empty();
        flags.set(Flags::LEAF, self.leaf);
        flags.set(Flags::PASID, pasid.is_some());
        flags.set(Flags::ID, self.tag.is_some());
        flags.set(Flags::GLOBAL, self.global);
        InvalidateLayout {
            head,
            scope,
            caches: self.caches.bits(),
            flags: flags.bits().into(),
            domain: self.domain.0.into(),
            pasid: pasid.map_or(0, Pasid::value).into(),
            id: self.tag.unwrap_or(0).into(),
            address: address.into(),
            nr_pages: nr_pages.into(),
            page_size,
            reserved: [0; 19],
        }
    }
}

/// The whole pages that `count` pages from `address` on touch. `None`: no pages, no such page size, or past 2^64.
fn pages(address: u64, count: u64, page_lg2: u8) -> Option<IovaRange> {
    if page_lg2 >= 64 {
        return None;
    }
    let offset_mask = (1u64 << page_lg2) - 1;
    let length_minus_one = (u128::from(count) << page_lg2).checked_sub(1)?;
    let last = u64::try_from(u128::from(address) + length_minus_one).ok()?;
    IovaRange::new(Iova(address & !offset_mask), Iova(last | offset_mask))
}
