//! Accesses that wait for a page: how many, for how long, how it ended; and which pages a device touches first.
//!
//! A wait is that of a group of page requests: it begins with the first access that has to wait for it, and ends when the
//! device goes on. Times are the trace's.

pub(super) mod lanes;
pub(super) mod picture;
pub(super) mod story;

use std::collections::{BTreeMap, HashMap, HashSet};

use pgtable_formats::{IovaRange, Pasid};
use serde::Serialize;
use viommu_queue::record::{PageAsked, WaitEnd};
use viommu_wire::{AccessFlags, PageResponseCode};

use super::histogram::Histogram;
use super::world::Moment;

/// Waits of an endpoint that are followed at a time, and those that are kept to be drawn.
const FOLLOWED: usize = 1 << 12;
/// Pages of an endpoint whose first touch is kept.
const PAGES: usize = 1 << 12;
/// Pages of one access that are followed.
const PER_ACCESS: usize = 256;
/// PASIDs of an endpoint that are told one by one.
pub(super) const PASIDS: usize = 16;

/// A group of one endpoint.
type Key = (Option<Pasid>, u16);

/// The waits of one endpoint, as far as the trace goes.
#[derive(Default)]
pub(super) struct Waits {
    open: BTreeMap<Key, Wait>,
    waited_for: HashSet<(Option<Pasid>, u64)>,
    places: HashMap<(Option<Pasid>, u64), usize>,
    /// The page that each address space waited for last.
    last: BTreeMap<Option<Pasid>, u64>,
    facts: WaitFacts,
}

/// What came out.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct WaitFacts {
    /// Groups that accesses waited for.
    pub(super) waits: u64,
    /// Page requests that the driver was told of.
    pub(super) told: u64,
    /// How they ended.
    pub(super) ends: BTreeMap<&'static str, u64>,
    /// From the first access to when the device went on, of those that ended.
    pub(super) lengths: Histogram,
    /// From the event to the driver's answer, where there was one.
    pub(super) answers: Histogram,
    /// Waits at the same time.
    pub(super) most_at_a_time: usize,
    /// Waits for a page that had been waited for before.
    pub(super) again: u64,
    /// Waits for the page behind the one that the same address space had waited for before.
    pub(super) follows: u64,
    pub(super) by_pasid: BTreeMap<u32, u64>,
    pub(super) without_pasid: u64,
    /// Pages whose first touch is known; of those, how many the device had to wait for.
    pub(super) pages: u64,
    pub(super) pages_waited_for: u64,
    /// What is drawn of them, in the order in which they began.
    #[serde(skip)]
    pub(super) kept: Vec<Wait>,
    /// In the order in which they were touched.
    #[serde(skip)]
    pub(super) touches: Vec<Touch>,
    /// There was more than is kept.
    #[serde(skip)]
    pub(super) more: bool,
}

/// One wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wait {
    pub(super) pasid: Option<Pasid>,
    /// An address in the page.
    pub(super) address: u64,
    pub(super) write: bool,
    pub(super) began: Moment,
    /// The driver was told.
    pub(super) told: Option<Moment>,
    /// The driver answered.
    pub(super) answered: Option<(Moment, PageResponseCode)>,
    /// The device went on.
    pub(super) ended: Option<Moment>,
    pub(super) end: End,
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Not, as far as the trace goes.
    Open,
    /// With a page.
    Served,
    /// The driver said no.
    Refused,
    /// Without an answer of the driver's: what it waited for was taken away, or the driver's time was over.
    Closed,
    /// The device's patience was over.
    GaveUp,
}

/// The first touch of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Touch {
    pub(super) pasid: Option<Pasid>,
    pub(super) page: u64,
    pub(super) waited: bool,
    /// An access got through to it.
    pub(super) passed: bool,
}

impl Waits {
    /// An access has to wait.
    pub(super) fn tried(&mut self, key: Key, range: IovaRange, access: AccessFlags, now: Moment) {
        let write = access.contains(AccessFlags::WRITE);
        self.wait(key, range.start().0, write, now);
    }

    /// The driver was told.
    pub(super) fn told(&mut self, asked: &PageAsked, now: Moment) {
        self.facts.told += 1;
        let (pasid, address) = (asked.stream.pasid, asked.address.0);
        let write = asked.access.contains(AccessFlags::WRITE);
        let Some(wait) = self.wait((pasid, asked.group), address, write, now) else { return };
        wait.told.get_or_insert(now);
        // Of an access to several pages only this says which one is missing.
        wait.address = address;
        self.asked_for(pasid, address >> 12);
    }

    /// The driver answered.
    pub(super) fn answered(&mut self, key: Key, code: PageResponseCode, now: Moment) {
        if let Some(wait) = self.open.get_mut(&key) {
            wait.answered = Some((now, code));
            if let Some(told) = wait.told {
                self.facts.answers.add(now.time.saturating_sub(told.time));
            }
        }
    }

    /// The device goes on, if it waited still: one that polls may be told twice.
    pub(super) fn ended(&mut self, key: Key, end: WaitEnd, now: Moment) {
        let Some(mut wait) = self.open.remove(&key) else { return };
        wait.ended = Some(now);
        wait.end = match (end, wait.answered) {
            (WaitEnd::TimedOut, _) => End::GaveUp,
            (WaitEnd::Retry, _) => End::Served,
            (WaitEnd::Failed, Some((_, PageResponseCode::Invalid | PageResponseCode::Failure))) => {
                End::Refused
            }
            (WaitEnd::Failed, _) => End::Closed,
        };
        self.keep(wait);
    }

    /// An access got through.
    pub(super) fn passed(&mut self, pasid: Option<Pasid>, range: IovaRange) {
        for page in (range.start().0 >> 12..=range.last().0 >> 12).take(PER_ACCESS) {
            if let Some(touch) = self.touch(pasid, page) {
                touch.passed = true;
            }
        }
    }

    /// What came out; nothing where nothing waited.
    pub(super) fn facts(mut self) -> Option<WaitFacts> {
        for wait in std::mem::take(&mut self.open).into_values() {
            self.settle(wait);
        }
        let mut facts = self.facts;
        facts.kept.sort_by_key(|wait| wait.began.event);
        facts.pages = facts.touches.len() as u64;
        facts.pages_waited_for = facts.touches.iter().filter(|touch| touch.waited).count() as u64;
        (facts.waits > 0).then_some(facts)
    }

    /// The wait of a group; a new one, where there is none that goes on.
    fn wait(&mut self, key: Key, address: u64, write: bool, now: Moment) -> Option<&mut Wait> {
        // A number is used again when its group is over.
        if let Some(over) = self.open.get(&key).filter(|wait| wait.answered.is_some()).copied() {
            self.open.remove(&key);
            self.settle(over);
        }
        if !self.open.contains_key(&key) {
            self.facts.waits += 1;
            match key.0 {
                None => self.facts.without_pasid += 1,
                Some(pasid) => {
                    let known = self.facts.by_pasid.len();
                    let count = self.facts.by_pasid.entry(pasid.value());
                    match count {
                        std::collections::btree_map::Entry::Vacant(_) if known >= PASIDS => {
                            self.facts.more = true;
                        }
                        count => *count.or_default() += 1,
                    }
                }
            }
            if self.open.len() >= FOLLOWED {
                self.facts.more = true;
                return None;
            }
            let (pasid, _) = key;
            let began = now;
            let wait = Wait {
                pasid,
                address,
                write,
                began,
                told: None,
                answered: None,
                ended: None,
                end: End::Open,
            };
            self.open.insert(key, wait);
            self.facts.most_at_a_time = self.facts.most_at_a_time.max(self.open.len());
        }
        self.open.get_mut(&key)
    }

    /// A page was asked for.
    fn asked_for(&mut self, pasid: Option<Pasid>, page: u64) {
        if let Some(touch) = self.touch(pasid, page) {
            touch.waited |= !touch.passed;
        }
        if self.waited_for.len() < PAGES || self.waited_for.contains(&(pasid, page)) {
            self.facts.again += u64::from(!self.waited_for.insert((pasid, page)));
        }
        if self.last.len() < PAGES || self.last.contains_key(&pasid) {
            let before = self.last.insert(pasid, page);
            self.facts.follows += u64::from(before.is_some_and(|before| before.checked_add(1) == Some(page)));
        }
    }

    fn touch(&mut self, pasid: Option<Pasid>, page: u64) -> Option<&mut Touch> {
        let WaitFacts { touches, more, .. } = &mut self.facts;
        let place = match self.places.get(&(pasid, page)) {
            Some(&place) => place,
            None if touches.len() >= PAGES => {
                *more = true;
                return None;
            }
            None => {
                self.places.insert((pasid, page), touches.len());
                touches.push(Touch { pasid, page, waited: false, passed: false });
                touches.len() - 1
            }
        };
        touches.get_mut(place)
    }

    /// A wait whose end was not recorded.
    fn settle(&mut self, mut wait: Wait) {
        if let Some((at, code)) = wait.answered {
            wait.ended = Some(at);
            wait.end = match code {
                PageResponseCode::Success => End::Served,
                PageResponseCode::Invalid | PageResponseCode::Failure => End::Refused,
            };
        }
        self.keep(wait);
    }

    fn keep(&mut self, wait: Wait) {
        *self.facts.ends.entry(wait.end.name()).or_default() += 1;
        if let Some(ended) = wait.ended {
            self.facts.lengths.add(ended.time.saturating_sub(wait.began.time));
        }
        if self.facts.kept.len() < FOLLOWED {
            self.facts.kept.push(wait);
        } else {
            self.facts.more = true;
        }
    }
}

impl WaitFacts {
    /// How many ended so.
    pub(super) fn of(&self, end: End) -> u64 {
        self.ends.get(end.name()).copied().unwrap_or(0)
    }

    /// The address spaces that waited, as far as they are told one by one.
    pub(super) fn spaces(&self) -> Vec<Option<Pasid>> {
        let untagged = (self.without_pasid > 0).then_some(None);
        untagged.into_iter().chain(self.by_pasid.keys().map(|&pasid| Pasid::new(pasid))).collect()
    }
}

impl End {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Served => "served",
            Self::Refused => "refused",
            Self::Closed => "closed",
            Self::GaveUp => "gave_up",
        }
    }
}
