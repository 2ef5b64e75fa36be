//! Page requests, as the chapter of that name tells them.
//!
//! A *wait* is what an endpoint waits with: an access of software, or a group that a machine made up. Its requests are in
//! the machine until the device takes them over; then they are in the device's books, by group, until the group is over.
//! What the device takes, and what it answers the machine, is seen ([`Seen`]); this says whether it may.

mod device;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::request::{DEVERR, NOENT, OK};
use super::words::{Access, Kind};
use super::world::Bounds;

/// What names a group: endpoint, PASID, number.
pub type Key = (u32, Option<u32>, u16);

/// SUCCESS.
pub const SUCCESS: u16 = 0;
/// INVALID.
pub const INVALID: u16 = 1;

/// One page request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Whose.
    pub id: u32,
    /// Its PASID.
    pub pasid: Option<u32>,
    /// The address.
    pub address: u64,
    /// READ, WRITE, EXEC, PRIVILEGED, as in an event.
    pub flags: u32,
    /// The last of its group.
    pub last: bool,
    /// What only hardware understands.
    pub private: Option<[u64; 2]>,
    /// `None`: the machine did not say yet.
    pub number: Option<u16>,
}

/// What the device did with its machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// It took a request over.
    Taken(Ask),
    /// It answered a group, and the machine took it.
    Answered(Key, u16),
    /// It answered a group that the machine does not have.
    Gone(Key, u16),
    /// It answered a group, and the machine failed.
    Failed(Key, u16),
}

/// What happens while the device does this.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scene {
    /// PAGE_REQUEST is negotiated.
    pub is_negotiated: bool,
    /// Everything goes.
    pub is_reset: bool,
    /// The time that the device was told.
    pub time: Option<u64>,
    /// An event buffer of so many bytes was offered.
    pub buffer: Option<usize>,
}

/// What an endpoint waits with.
#[derive(Clone, Debug)]
pub struct Wait {
    /// Whose.
    pub id: u32,
    /// Its PASID.
    pub pasid: Option<u32>,
    /// The access of software: address and what it does.
    pub access: Option<(u64, Access)>,
    /// The guest's table may say that its fault is not to be recorded, where it is one.
    pub is_quiet: bool,
    /// The group of a machine that made it up, and whether its last request was there.
    pub made_up: Option<(u16, bool)>,
    /// `Some(true)`: try again. `Some(false)`: it failed.
    pub outcome: Option<bool>,
}

/// A group in the device's books.
#[derive(Clone, Debug)]
pub struct Group {
    /// Its name.
    pub key: Key,
    wait: u64,
    /// Its requests: whether the driver was told, since when the device has it.
    asks: Vec<(Ask, bool, u64)>,
    is_whole: bool,
    /// The time from which its own counts.
    since: Option<u64>,
    /// The machine has answered it by itself, and the device cannot know.
    is_gone: bool,
}

/// All of it.
#[derive(Clone, Debug)]
pub struct Asking {
    per_endpoint: usize,
    in_all: usize,
    timeout: u64,
    /// By number.
    pub waits: BTreeMap<u64, Wait>,
    next_wait: u64,
    /// In the machine: what it made up goes first.
    made_up: VecDeque<(u64, Ask)>,
    accesses: VecDeque<(u64, Ask)>,
    /// Those that are not over.
    pub groups: Vec<Group>,
    /// As the device was told.
    pub now: u64,
    /// Counts what happens.
    tick: u64,
    /// When each endpoint had its last turn.
    turns: BTreeMap<u32, u64>,
    /// The last event: whether it was a fault, when, and whether a fault was left.
    last_event: Option<(bool, u64, bool)>,
    /// Numbers of groups of accesses that were used.
    numbers: BTreeSet<(u32, u16)>,
    /// Refused for a bound, timed out, too small a buffer.
    pub refused: [u64; 3],
    /// The machine failed where the device had no way back.
    pub needs_reset: bool,
    /// The machine fails to take its next answer.
    pub fails: bool,
    /// The answer that the driver just gave.
    given: Option<Seen>,
    /// Groups that are over by what just happened, answered by the machine itself.
    closing: Vec<Key>,
    /// Groups that the device has to answer INVALID, for that reason.
    due: Vec<(Key, &'static str)>,
    /// Waits that the machine may have answered by itself.
    pub doubtful: Vec<u64>,
    /// The last group that was answered.
    pub answered: Option<Key>,
    /// What happened how often.
    pub tally: BTreeMap<&'static str, u64>,
}

impl Group {
    /// Whether the driver may answer it.
    pub fn is_answerable(&self) -> bool {
        self.is_whole && self.asks.iter().all(|(_, told, _)| *told)
    }

    /// What it asks first.
    pub fn first(&self) -> Option<&Ask> {
        self.asks.first().map(|(ask, ..)| ask)
    }
}

impl Asking {
    pub(super) fn new(limits: &Bounds, timeout: u64) -> Self {
        Self {
            per_endpoint: limits.requests_per_endpoint,
            in_all: limits.requests,
            timeout,
            waits: BTreeMap::new(),
            next_wait: 0,
            made_up: VecDeque::new(),
            accesses: VecDeque::new(),
            groups: Vec::new(),
            now: 0,
            tick: 0,
            turns: BTreeMap::new(),
            last_event: None,
            numbers: BTreeSet::new(),
            refused: [0; 3],
            needs_reset: false,
            fails: false,
            given: None,
            closing: Vec::new(),
            due: Vec::new(),
            doubtful: Vec::new(),
            answered: None,
            tally: BTreeMap::new(),
        }
    }

    fn count(&mut self, what: &'static str) {
        *self.tally.entry(what).or_default() += 1;
    }

    /// The open wait of software that an access joins, if any: one page, one wait. Where not even a read is allowed, no
    /// other access is.
    pub fn joined(&self, id: u32, pasid: Option<u32>, iova: u64, access: Access) -> Option<u64> {
        let is_it = |wait: &Wait, kind: Kind| {
            let same = |(address, other): (u64, Access)| {
                address >> 12 == iova >> 12 && other == Access { kind, privileged: access.privileged }
            };
            wait.outcome.is_none() && (wait.id, wait.pasid) == (id, pasid) && wait.access.is_some_and(same)
        };
        let find = |kind| self.waits.iter().find(|(_, wait)| is_it(wait, kind)).map(|(&number, _)| number);
        find(access.kind).or_else(|| find(Kind::Read))
    }

    /// An access of software begins to wait.
    pub fn wait(&mut self, id: u32, pasid: Option<u32>, iova: u64, access: Access, is_quiet: bool) -> u64 {
        self.count("accesses that began to wait");
        let access_of = Some((iova, access));
        let number = self.add(Wait { id, pasid, access: access_of, is_quiet, made_up: None, outcome: None });
        let flags = match access.kind {
            Kind::Read => 1,
            Kind::Write => 2,
            Kind::Execute => 5,
        };
        let flags = flags | if access.privileged { 8 } else { 0 };
        let ask = Ask { id, pasid, address: iova, flags, last: true, private: None, number: None };
        self.accesses.push_back((number, ask));
        number
    }

    /// The machine makes up a request. `false`: it would not, its group is there already.
    pub fn make_up(&mut self, ask: &Ask) -> bool {
        let Some(group) = ask.number else { return false };
        let is_it = |wait: &Wait| {
            let number = wait.made_up.map(|(number, _)| number);
            wait.outcome.is_none() && (wait.id, wait.pasid, number) == (ask.id, ask.pasid, Some(group))
        };
        let found = self.waits.iter_mut().find(|(_, wait)| is_it(wait));
        let number = match found {
            Some((_, Wait { made_up: Some((_, true)), .. })) => return false,
            Some((&number, wait)) => {
                wait.made_up = Some((group, ask.last));
                number
            }
            None => {
                let made_up = Some((group, ask.last));
                let (id, pasid) = (ask.id, ask.pasid);
                self.add(Wait { id, pasid, access: None, is_quiet: false, made_up, outcome: None })
            }
        };
        self.count("requests of groups that a machine made up");
        self.made_up.push_back((number, ask.clone()));
        true
    }

    /// Groups that a machine made up and may answer by itself: the device has all of them.
    pub fn forgettable(&self) -> Vec<Key> {
        let is_there = |wait: &u64| self.made_up.iter().all(|(other, _)| other != wait);
        let may = |group: &&Group| {
            let wait = self.waits.get(&group.wait);
            group.is_whole
                && is_there(&group.wait)
                && wait.is_some_and(|wait| wait.made_up.is_some() && wait.outcome.is_none())
        };
        self.groups.iter().filter(may).map(|group| group.key).collect()
    }

    /// A machine answers a group by itself.
    pub fn forget(&mut self, key: Key) {
        let found = self.groups.iter().find(|group| group.key == key).map(|group| group.wait);
        if let Some(wait) = found {
            self.count("closed by the machine itself");
            self.gone(wait);
        }
    }

    /// A machine has answered a wait by itself.
    pub fn gone(&mut self, number: u64) {
        self.end(number, false);
        self.groups.iter_mut().filter(|group| group.wait == number).for_each(|group| group.is_gone = true);
    }

    /// What the accesses of an endpoint translate through is replaced or taken away, for selected PASIDs: the machine
    /// answers by itself, and what the driver was not told of it is never told.
    pub fn close(&mut self, id: u32, why: &'static str, selects: impl Fn(Option<u32>) -> bool) {
        let open = self.waits.iter().filter(|(_, wait)| wait.outcome.is_none());
        let closed: Vec<u64> = open
            .filter(|(_, wait)| wait.id == id && selects(wait.pasid))
            .map(|(&number, _)| number)
            .collect();
        for number in closed {
            self.count(why);
            self.end(number, false);
        }
        let is_closed = |group: &Group| group.key.0 == id && selects(group.key.1);
        self.closing.extend(self.groups.iter().filter(|group| is_closed(group)).map(|group| group.key));
        self.groups.retain(|group| !is_closed(group));
    }

    /// A machine may answer these by itself.
    pub fn maybe(&mut self, id: u32, selects: impl Fn(Option<u32>) -> bool) {
        let open = self.waits.iter().filter(|(_, wait)| wait.outcome.is_none());
        let may = open.filter(|(_, wait)| wait.id == id && selects(wait.pasid)).map(|(&number, _)| number);
        self.doubtful.extend(may);
    }

    /// The driver takes PAGE_REQUEST back: the device answers what there is.
    pub fn renounce(&mut self) {
        self.due.extend(self.groups.iter().map(|group| (group.key, "closed by the features")));
    }

    /// PAGE_RESP, and its status.
    pub fn respond(&mut self, key: Key, code: u16) -> u8 {
        let place = self.groups.iter().position(|group| group.key == key);
        let place = match place {
            Some(place) if self.groups[place].is_answerable() => place,
            Some(place) if self.groups[place].is_whole => {
                self.count("answers before all was told");
                return NOENT;
            }
            Some(_) => {
                self.count("answers to a group that is gathering");
                return NOENT;
            }
            None if self.answered == Some(key) => {
                self.count("answers given twice");
                return NOENT;
            }
            None => return NOENT,
        };
        if self.fails {
            self.given = Some(Seen::Failed(key, code));
            self.count("answers that the machine failed to take");
            return DEVERR;
        }
        let group = self.groups.remove(place);
        self.answered = Some(key);
        if group.is_gone {
            self.count("answers to a group that the machine had answered");
            self.given = Some(Seen::Gone(key, code));
            return NOENT;
        }
        self.count(match code {
            SUCCESS => "answered SUCCESS",
            INVALID => "answered INVALID",
            _ => "answered FAILURE",
        });
        self.end(group.wait, code == SUCCESS);
        self.given = Some(Seen::Answered(key, code));
        OK
    }

    /// Of how many requests and groups the driver's answer is awaited, or will be.
    pub fn counts(&self) -> (usize, usize) {
        (self.groups.iter().map(|group| group.asks.len()).sum(), self.groups.len())
    }

    /// When the time of a group is over at the earliest. `None`: never.
    pub fn due_at(&self) -> Option<u64> {
        let dues = self.groups.iter().map(|group| match group.since {
            None => Some(self.now),
            Some(since) => since.checked_add(self.timeout).filter(|&due| due != u64::MAX),
        });
        if self.timeout == u64::MAX { None } else { dues.flatten().min() }
    }

    /// Whether the driver has to be told of something.
    pub fn has_untold(&self) -> bool {
        self.groups.iter().any(|group| group.asks.iter().any(|(_, told, _)| !told))
    }

    /// How many requests the device did not take over.
    pub fn in_machine(&self) -> usize {
        self.made_up.len() + self.accesses.len()
    }

    /// Forgets turns, as a reset does.
    pub fn begin_anew(&mut self) {
        self.last_event = None;
        self.needs_reset = false;
        self.answered = None;
    }

    fn add(&mut self, wait: Wait) -> u64 {
        self.next_wait += 1;
        self.waits.insert(self.next_wait, wait);
        self.next_wait
    }

    /// A wait is over: nothing of it is in the machine any more.
    fn end(&mut self, number: u64, outcome: bool) {
        if let Some(wait) = self.waits.get_mut(&number) {
            wait.outcome.get_or_insert(outcome);
        }
        self.made_up.retain(|(other, _)| *other != number);
        self.accesses.retain(|(other, _)| *other != number);
    }
}
