//! What cached things are found by.

use pgtable_formats::Pasid;
use viommu_wire::EndpointId;

/// An endpoint and one of its PASIDs, or its untagged accesses, as one number that is never 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Key(u64);

impl Key {
    /// What no stream has: the key of an empty slot.
    pub(super) const NONE: Self = Self(0);

    #[inline]
    pub(super) const fn new(endpoint: EndpointId, pasid: Option<Pasid>) -> Self {
        let low = match pasid {
            None => 1,
            Some(pasid) => pasid.value() + 2,
        };
        Self((endpoint.0 as u64) << 32 | low as u64)
    }

    /// Whether it is a key of `endpoint`.
    #[inline]
    pub(super) const fn is_of(self, endpoint: EndpointId) -> bool {
        self.0 >> 32 == endpoint.0 as u64 && self.0 != 0
    }

    /// Spreads the key, together with `place`, over `1 << bits` slots.
    ///
    /// Neighbouring places and neighbouring PASIDs go to slots far apart (multiplication by odd fractions of the
    /// golden ratio), so that a guest that counts up, as all do, does not meet itself.
    #[inline]
    pub(super) const fn slot(self, place: u64, bits: u32) -> usize {
        const BY_KEY: u64 = 0x9e37_79b9_7f4a_7c15;
        const BY_PLACE: u64 = 0xd1b5_4a32_d192_ed03;
        let mixed = self.0.wrapping_mul(BY_KEY) ^ place.wrapping_mul(BY_PLACE);
        #[allow(clippy::cast_possible_truncation, reason = "a few bits are left")]
        let slot = (mixed >> (64 - bits)) as usize;
        slot
    }
}

/// The architecture's tag on a translation: the ASID on Arm, none on VT-d.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tag(u32);

impl Tag {
    #[inline]
    pub(super) const fn new(tag: Option<u16>) -> Self {
        match tag {
            None => Self(u32::MAX),
            Some(tag) => Self(tag as u32),
        }
    }

    /// What spreads translations over a cache: the tag where there is one, otherwise the key, so that an invalidation,
    /// which names one or the other, finds the place without a search.
    #[inline]
    pub(super) const fn spread(self, endpoint: EndpointId, key: Key) -> Key {
        if self.0 == u32::MAX { key } else { Key(((endpoint.0 as u64) << 32) | (self.0 as u64 + 1)) }
    }
}
