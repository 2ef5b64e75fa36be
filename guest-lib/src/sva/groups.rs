//! Page requests on their way to a handler, group by group.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;

use viommu_wire::{EndpointId, PageRequest, PageResponse, PageResponseCode, Pasid};

/// What an endpoint may make the driver keep. A device that keeps to bounds of its own, as it should, does not reach these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupLimits {
    /// Groups that are not answered yet. Beyond, the one that has gathered longest without being whole makes room; where
    /// all are whole, a new one is answered INVALID.
    pub groups: usize,
    /// Those of one PASID, so that one process does not take them all. Beyond, the same happens among these.
    pub groups_per_pasid: usize,
    /// Requests of one group. Later ones are not kept: the device asks again for them after the answer.
    pub requests_per_group: usize,
}

impl Default for GroupLimits {
    fn default() -> Self {
        Self { groups: 1 << 10, groups_per_pasid: 1 << 9, requests_per_group: 1 << 6 }
    }
}

/// What became of page requests, other than being answered as a handler says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GroupCounters {
    /// Requests that came.
    pub received: u64,
    /// Requests that repeat one of their group.
    pub repeated: u64,
    /// Requests that were not kept because their group had too many.
    pub truncated: u64,
    /// Groups that were forgotten because they did not get whole and others needed the room.
    pub evicted: u64,
    /// Groups that the device used the number of anew, so that it must have answered by itself.
    pub superseded: u64,
    /// Groups whose PASID was unbound before they were answered: the device has answered them INVALID by itself.
    pub revoked: u64,
    /// Requests that an unbind found in the event queue: the same holds for them.
    pub drained: u64,
    /// Groups that were answered INVALID because a bound was reached.
    pub refused: u64,
    /// Requests that could be neither kept nor answered: a bound was reached, and their group is not whole, or too many
    /// refusals wait to be sent.
    pub dropped: u64,
}

/// Names a group that a handler answers later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token {
    pub(super) endpoint: EndpointId,
    key: Key,
    serial: u64,
}

/// What names a group of one endpoint: the PASID of its requests (`None`: untagged) and its number.
type Key = (Option<Pasid>, u16);

/// The groups of one endpoint. A group is *gathering* until its last request came, then *ready* until a handler has seen
/// it, and *kept* if that answers later.
#[derive(Debug)]
pub(super) struct Groups {
    endpoint: EndpointId,
    limits: GroupLimits,
    by_key: BTreeMap<Key, Group>,
    /// All that are ready, in the order in which they got so.
    ready: VecDeque<Key>,
    /// Whole groups that there was no room for; at most [`GroupLimits::groups`].
    refused: VecDeque<Key>,
    next_serial: u64,
    counters: GroupCounters,
}

#[derive(Debug)]
struct Group {
    /// Of all groups that there ever were, in order.
    serial: u64,
    state: State,
    requests: Vec<PageRequest>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Gathering,
    Ready,
    Kept,
}

/// A group that is ready, for a handler to see.
#[derive(Debug)]
pub(super) struct Ready {
    pub(super) token: Token,
    pub(super) requests: Vec<PageRequest>,
}

impl Token {
    /// The PASID; `None` where untagged DMA asks.
    pub const fn pasid(&self) -> Option<Pasid> {
        self.key.0
    }

    /// The response to the group.
    pub(super) const fn response(&self, code: PageResponseCode) -> PageResponse {
        response(self.endpoint, self.key, code)
    }
}

impl Groups {
    pub(super) const fn new(endpoint: EndpointId, limits: GroupLimits) -> Self {
        Self {
            endpoint,
            limits,
            by_key: BTreeMap::new(),
            ready: VecDeque::new(),
            refused: VecDeque::new(),
            next_serial: 0,
            counters: GroupCounters {
                received: 0,
                repeated: 0,
                truncated: 0,
                evicted: 0,
                superseded: 0,
                revoked: 0,
                drained: 0,
                refused: 0,
                dropped: 0,
            },
        }
    }

    pub(super) const fn counters(&self) -> &GroupCounters {
        &self.counters
    }

    /// How many groups are ready.
    pub(super) fn ready(&self) -> usize {
        self.ready.len()
    }

    /// How many are not answered.
    pub(super) fn open(&self) -> usize {
        self.by_key.len()
    }

    /// Takes a request in.
    pub(super) fn add(&mut self, request: PageRequest) {
        self.counters.received += 1;
        let key = (request.pasid, request.group_id);
        if self.by_key.get(&key).is_some_and(|group| group.state != State::Gathering) {
            self.counters.superseded += 1;
            self.remove(key);
        }
        if !self.refused.is_empty() {
            // Another group has the name by now.
            self.refused.retain(|refused| *refused != key);
        }
        if !self.by_key.contains_key(&key) && !self.make_room(request.pasid) {
            return self.refuse(key, request.last);
        }
        let group = self.by_key.entry(key).or_insert_with(|| {
            self.next_serial += 1;
            Group { serial: self.next_serial, state: State::Gathering, requests: Vec::new() }
        });
        let same = |known: &PageRequest| (known.address, known.access) == (request.address, request.access);
        if group.requests.iter().any(same) {
            self.counters.repeated += 1;
        } else if group.requests.len() < self.limits.requests_per_group.max(1) {
            group.requests.push(request);
        } else {
            self.counters.truncated += 1;
        }
        if request.last {
            group.state = State::Ready;
            self.ready.push_back(key);
        }
    }

    /// Counts a request whose PASID is being unbound.
    pub(super) const fn drain(&mut self) {
        self.counters.received += 1;
        self.counters.drained += 1;
    }

    /// The group that has been ready for longest. It counts as kept until it is [closed](Self::close).
    pub(super) fn next_ready(&mut self) -> Option<Ready> {
        let key = self.ready.pop_front()?;
        let group = self.by_key.get_mut(&key)?;
        group.state = State::Kept;
        let requests = core::mem::take(&mut group.requests);
        Some(Ready { token: Token { endpoint: self.endpoint, key, serial: group.serial }, requests })
    }

    /// Forgets a group that is answered now. `false`: it was forgotten before.
    pub(super) fn close(&mut self, token: Token) -> bool {
        if token.endpoint != self.endpoint {
            return false;
        }
        let is_open = self
            .by_key
            .get(&token.key)
            .is_some_and(|group| group.serial == token.serial && group.state == State::Kept);
        if is_open {
            self.remove(token.key);
        }
        is_open
    }

    /// Forgets everything of a PASID, which the device has answered by itself: an answer might meet a group of whoever
    /// gets the PASID next.
    pub(super) fn forget_pasid(&mut self, pasid: Pasid) {
        let whole = (Some(pasid), 0)..=(Some(pasid), u16::MAX);
        let keys: Vec<Key> = self.by_key.range(whole).map(|(key, _)| *key).collect();
        for key in keys {
            self.counters.revoked += 1;
            self.remove(key);
        }
        self.refused.retain(|(other, _)| *other != Some(pasid));
    }

    /// The answers that refused groups have to get.
    pub(super) fn take_refused(&mut self, answers: &mut Vec<PageResponse>) {
        let endpoint = self.endpoint;
        answers.extend(self.refused.drain(..).map(|key| response(endpoint, key, PageResponseCode::Invalid)));
    }

    fn make_room(&mut self, pasid: Option<Pasid>) -> bool {
        let of_pasid = || self.by_key.range((pasid, 0)..=(pasid, u16::MAX)).count();
        // Few groups at all need no counting.
        if self.by_key.len() >= self.limits.groups_per_pasid && of_pasid() >= self.limits.groups_per_pasid {
            return self.evict(|(other, _)| other == pasid);
        }
        self.by_key.len() < self.limits.groups || self.evict(|_| true)
    }

    /// Forgets the selected group that has gathered for longest. `false`: none gathers.
    fn evict(&mut self, selects: impl Fn(Key) -> bool) -> bool {
        let gathering = self
            .by_key
            .iter()
            .filter(|(key, group)| group.state == State::Gathering && selects(**key))
            .min_by_key(|(_, group)| group.serial)
            .map(|(key, _)| *key);
        let Some(key) = gathering else {
            return false;
        };
        self.counters.evicted += 1;
        self.remove(key);
        true
    }

    fn refuse(&mut self, key: Key, is_whole: bool) {
        if is_whole && self.refused.len() < self.limits.groups.max(1) {
            self.counters.refused += 1;
            self.refused.push_back(key);
        } else {
            self.counters.dropped += 1;
        }
    }

    fn remove(&mut self, key: Key) -> Option<Group> {
        let group = self.by_key.remove(&key)?;
        if group.state == State::Ready {
            self.ready.retain(|ready| *ready != key);
        }
        Some(group)
    }
}

const fn response(endpoint: EndpointId, (pasid, group_id): Key, code: PageResponseCode) -> PageResponse {
    PageResponse { endpoint, pasid, group_id, code }
}
