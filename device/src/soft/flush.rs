//! Which cached things an invalidation is about.

use pgtable_formats::{Iova, IovaRange, Pasid};
use viommu_wire::{Caches, EndpointId};

use super::key::{Key, Tag};
use crate::host::{Invalidation, Scope};

/// The addresses that a cached thing translates: a naturally aligned block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reach {
    pub(super) start: u64,
    pub(super) size_lg2: u8,
}

/// A predicate on translations and cached tables.
#[derive(Clone, Copy, Debug)]
pub(super) struct Selector {
    pub(super) endpoint: EndpointId,
    /// Whose; what matches one of them is selected.
    whose: Whose,
    /// Only what translates an address of this range.
    pub(super) range: Option<IovaRange>,
    /// Global translations of any PASID of the endpoint, too.
    pub(super) globals: bool,
    /// And at least those of the PASID or tag itself.
    own_globals: bool,
    /// Where everything is that is not global, see [`Tag::spread`].
    pub(super) spread: Option<Key>,
    /// The range of addresses whose cached tables it is about.
    tables_range: Option<IovaRange>,
}

#[derive(Clone, Copy, Debug)]
enum Whose {
    Everyone,
    These { owner: Option<Key>, tag: Option<Tag> },
}

impl Selector {
    /// All of `endpoint`.
    pub(super) const fn endpoint(endpoint: EndpointId) -> Self {
        Self {
            endpoint,
            whose: Whose::Everyone,
            range: None,
            globals: true,
            own_globals: true,
            spread: None,
            tables_range: None,
        }
    }

    /// All of one PASID, or of untagged accesses.
    pub(super) const fn pasid(endpoint: EndpointId, pasid: Option<Pasid>) -> Self {
        let whose = Whose::These { owner: Some(Key::new(endpoint, pasid)), tag: None };
        Self {
            endpoint,
            whose,
            range: None,
            globals: false,
            own_globals: true,
            spread: None,
            tables_range: None,
        }
    }

    /// What `invalidation` is about. `effective` says whose entry serves a PASID, `None` where none does;
    /// `has_tags` whether the endpoint's translations carry the architecture's tag.
    ///
    /// - A tag selects by itself, whatever PASID is named: two PASIDs may share an ASID, and drivers of Arm hardware
    ///   think in ASIDs.
    /// - Dropping contexts drops all that was translated through them, whatever the tag and the range: the guest may
    ///   have replaced the tables, the tag, or both.
    /// - A range includes global translations, as on hardware.
    /// - A range that is named by an ignored top byte (TBI on Arm) is not looked for: all addresses go.
    pub(super) fn new(
        invalidation: &Invalidation,
        has_tags: bool,
        effective: impl Fn(Option<Pasid>) -> Option<Option<Pasid>>,
    ) -> Self {
        let endpoint = invalidation.endpoint;
        let tag = invalidation.tag.filter(|_| has_tags).map(|tag| Tag::new(Some(tag)));
        let drops_contexts = invalidation.caches.contains(Caches::PASID);
        let (pasid, range) = match invalidation.scope {
            Scope::Endpoint => match tag {
                Some(tag) if !drops_contexts => {
                    let whose = Whose::These { owner: None, tag: Some(tag) };
                    let globals = invalidation.global;
                    return Self {
                        endpoint,
                        whose,
                        range: None,
                        globals,
                        own_globals: false,
                        spread: None,
                        tables_range: None,
                    };
                }
                _ => return Self::endpoint(endpoint),
            },
            Scope::Pasid(pasid) => (pasid, None),
            Scope::Range { pasid, range, .. } => {
                let aliased = has_tags && !is_canonical(range);
                (pasid, Some(range).filter(|_| !drops_contexts && !aliased))
            }
        };
        let ranged = matches!(invalidation.scope, Scope::Range { .. });
        let owner = effective(pasid).map(|effective| Key::new(endpoint, effective));
        let spread = match (tag, owner) {
            (Some(tag), _) => Some(tag.spread(endpoint, Key::NONE)),
            (None, Some(owner)) if !has_tags => Some(owner),
            _ => None,
        };
        Self {
            endpoint,
            whose: Whose::These { owner: owner.filter(|_| tag.is_none() || drops_contexts), tag },
            range,
            globals: invalidation.global || ranged && invalidation.caches.contains(Caches::TLB),
            own_globals: drops_contexts,
            spread: spread.filter(|_| range.is_some()),
            // VT-d, like the processors it shares tables with, drops cached tables of any address.
            tables_range: range.filter(|_| has_tags),
        }
    }

    /// The same about cached tables.
    pub(super) const fn for_tables(self) -> Self {
        Self { range: self.tables_range, ..self }
    }

    #[inline]
    pub(super) fn selects(&self, owner: Key, tag: Tag, reach: Reach, is_global: bool) -> bool {
        owner.is_of(self.endpoint)
            && self.range.is_none_or(|range| reach.touches(range))
            && match self.whose {
                Whose::Everyone => true,
                Whose::These { owner: its, tag: named } => {
                    let is_own = its == Some(owner) || named == Some(tag);
                    if is_global { self.globals || self.own_globals && is_own } else { is_own }
                }
            }
    }
}

/// Whether both ends are extensions of their sign in bit 55, the form in which translations are kept.
fn is_canonical(range: IovaRange) -> bool {
    [range.start(), range.last()].iter().all(|&Iova(end)| matches!(end >> 55, 0 | 0x1ff))
}

impl Reach {
    #[inline]
    const fn touches(self, range: IovaRange) -> bool {
        let last = self.start | ((1 << self.size_lg2) - 1);
        self.start <= range.last().0 && range.start().0 <= last
    }
}
