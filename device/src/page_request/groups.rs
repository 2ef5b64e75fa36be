//! Page requests that are not answered yet, by endpoint and group.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use viommu_wire::{PageRequest, Pasid};

use crate::limits::Limits;
use crate::sorted::SortedMap;

/// What names a group of one endpoint: the PASID of its requests (`None`: untagged) and its number.
pub(super) type GroupKey = (Option<Pasid>, u16);

/// A bound is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Full;

/// All groups. A group is *gathering* until its last request was taken over, then *whole*; it is *answerable* once it
/// is whole and the driver was told of all of it.
#[derive(Debug)]
pub(crate) struct Groups {
    /// By place of the endpoint.
    endpoints: Vec<Asking>,
    /// Places with requests to tell, in the order of their turns. Some may have none left.
    turns: VecDeque<usize>,
    /// Requests of all endpoints.
    requests: usize,
    /// Those of them that the driver was not told of.
    untold: usize,
    groups: usize,
    age: Age,
}

/// What is known of the ages of groups without a look at each.
#[derive(Clone, Copy, Debug)]
struct Age {
    /// No group is due before, in nanoseconds; `u64::MAX`: none ever is.
    due: u64,
    /// Whether a group has no time yet.
    has_undated: bool,
}

/// What one endpoint asks for.
#[derive(Debug)]
struct Asking {
    /// What the driver was not told of, oldest first.
    untold: VecDeque<PageRequest>,
    groups: SortedMap<GroupKey, Group>,
    /// Requests in `groups`, told or not.
    requests: usize,
    has_turn: bool,
    age: Age,
}

#[derive(Clone, Copy, Debug)]
struct Group {
    requests: usize,
    untold: usize,
    is_whole: bool,
    /// When it was there first, in nanoseconds.
    since: Option<u64>,
}

impl Groups {
    pub(crate) fn new(endpoints: usize) -> Self {
        Self {
            endpoints: (0..endpoints).map(|_| Asking::new()).collect(),
            turns: VecDeque::new(),
            requests: 0,
            untold: 0,
            groups: 0,
            age: Age::NONE,
        }
    }

    pub(super) const fn groups(&self) -> usize {
        self.groups
    }

    pub(super) const fn requests(&self) -> usize {
        self.requests
    }

    /// Whether there is something to tell the driver.
    pub(crate) const fn has_untold(&self) -> bool {
        self.untold > 0
    }

    /// Whether no more is to be taken over until the driver was told of something.
    pub(super) const fn is_choked(&self, limits: &Limits) -> bool {
        self.requests >= limits.max_page_requests && self.untold > 0
    }

    /// Takes over a request of the endpoint at `place`.
    ///
    /// A group that is whole already was answered by the host, which uses its number anew: it is forgotten. Where a
    /// bound is reached, what there is of the request's own group is forgotten, too.
    pub(super) fn add(&mut self, place: usize, request: PageRequest, limits: &Limits) -> Result<(), Full> {
        let key = (request.pasid, request.group_id);
        if self.group(place, key).is_some_and(|group| group.is_whole) {
            self.remove(place, key);
        }
        let Some(asking) = self.endpoints.get_mut(place) else { return Err(Full) };
        if asking.requests >= limits.max_page_requests_per_endpoint
            || self.requests >= limits.max_page_requests
        {
            self.remove(place, key);
            return Err(Full);
        }
        match asking.groups.get_mut(&key) {
            Some(group) => {
                group.requests += 1;
                group.untold += 1;
                group.is_whole = request.last;
            }
            None => {
                let group = Group { requests: 1, untold: 1, is_whole: request.last, since: None };
                asking.groups.insert(key, group);
                asking.age.has_undated = true;
                self.age.has_undated = true;
                self.groups += 1;
            }
        }
        asking.untold.push_back(request);
        asking.requests += 1;
        self.requests += 1;
        self.untold += 1;
        if !asking.has_turn {
            asking.has_turn = true;
            self.turns.push_back(place);
        }
        Ok(())
    }

    /// What to tell the driver next, with its endpoint's place: endpoints take turns.
    pub(crate) fn front(&mut self) -> Option<(usize, PageRequest)> {
        while let Some(&place) = self.turns.front() {
            let Some(asking) = self.endpoints.get_mut(place) else { break };
            if let Some(request) = asking.untold.front() {
                return Some((place, *request));
            }
            asking.has_turn = false;
            self.turns.pop_front();
        }
        None
    }

    /// Notes that the driver was told of what [`front`](Self::front) gives.
    pub(crate) fn told(&mut self) {
        let Some((place, request)) = self.front() else { return };
        let Some(asking) = self.endpoints.get_mut(place) else { return };
        asking.untold.pop_front();
        self.untold = self.untold.saturating_sub(1);
        if let Some(group) = asking.groups.get_mut(&(request.pasid, request.group_id)) {
            group.untold = group.untold.saturating_sub(1);
        }
        self.turns.pop_front();
        asking.has_turn = !asking.untold.is_empty();
        if asking.has_turn {
            self.turns.push_back(place);
        }
    }

    /// Whether the driver was told of a whole group `key`.
    pub(super) fn is_answerable(&self, place: usize, key: GroupKey) -> bool {
        self.group(place, key).is_some_and(|group| group.is_whole && group.untold == 0)
    }

    /// Forgets a group, and what the driver was not told of it.
    pub(super) fn remove(&mut self, place: usize, key: GroupKey) {
        let Some(asking) = self.endpoints.get_mut(place) else { return };
        let Some(group) = asking.groups.remove(&key) else { return };
        if group.untold > 0 {
            asking.untold.retain(|request| (request.pasid, request.group_id) != key);
        }
        asking.requests = asking.requests.saturating_sub(group.requests);
        self.requests = self.requests.saturating_sub(group.requests);
        self.untold = self.untold.saturating_sub(group.untold);
        self.groups = self.groups.saturating_sub(1);
    }

    /// A group of the endpoint at `place` whose PASID is selected.
    pub(super) fn find(&self, place: usize, selects: impl Fn(Option<Pasid>) -> bool) -> Option<GroupKey> {
        let asking = self.endpoints.get(place)?;
        asking.groups.keys().copied().find(|&(pasid, _)| selects(pasid))
    }

    /// When [`next_due`](Self::next_due) will have something; at once where a group has no time yet.
    pub(super) fn due(&self, now: u64) -> Option<u64> {
        match (self.groups, self.age.has_undated) {
            (0, _) => None,
            (_, true) => Some(now),
            (_, false) => Some(self.age.due).filter(|&due| due != u64::MAX),
        }
    }

    /// Groups that are older than `timeout` at `now`, both in nanoseconds. The age of a group counts from the first
    /// call that finds it: it came some time after the call before.
    pub(super) fn overdue(&mut self, now: u64, timeout: u64) -> Vec<(usize, GroupKey)> {
        let mut overdue = Vec::new();
        if self.groups == 0 || !self.age.is_worth_a_look(now) {
            return overdue;
        }
        self.age = Age::NONE;
        for (place, asking) in self.endpoints.iter_mut().enumerate() {
            // What one endpoint asks for in turn does not make the others' groups be looked at.
            if asking.age.is_worth_a_look(now) {
                asking.age = Age::NONE;
                for (&key, group) in asking.groups.iter_mut() {
                    let due = group.since.get_or_insert(now).saturating_add(timeout);
                    if due <= now && due != u64::MAX {
                        overdue.push((place, key));
                    } else {
                        asking.age.due = asking.age.due.min(due);
                    }
                }
            }
            self.age.due = self.age.due.min(asking.age.due);
        }
        overdue
    }

    fn group(&self, place: usize, key: GroupKey) -> Option<&Group> {
        self.endpoints.get(place)?.groups.get(&key)
    }
}

impl Asking {
    const fn new() -> Self {
        Self {
            untold: VecDeque::new(),
            groups: SortedMap::new(),
            requests: 0,
            has_turn: false,
            age: Age::NONE,
        }
    }
}

impl Age {
    /// Of no groups.
    const NONE: Self = Self { due: u64::MAX, has_undated: false };

    const fn is_worth_a_look(&self, now: u64) -> bool {
        self.has_undated || self.due <= now
    }
}

#[cfg(test)]
mod tests {
    use viommu_wire::{AccessFlags, EndpointId, Iova, PageRequest};

    use super::Groups;
    use crate::limits::Limits;

    fn ask(groups: &mut Groups, place: usize, group_id: u16) {
        let request = PageRequest {
            access: AccessFlags::READ,
            endpoint: EndpointId(8),
            pasid: None,
            address: Iova(0),
            group_id,
            last: true,
            private_data: None,
        };
        assert_eq!(groups.add(place, request, &Limits::DEFAULT), Ok(()));
    }

    #[test]
    fn a_group_is_due_whatever_other_endpoints_ask_for() {
        let mut groups = Groups::new(2);
        ask(&mut groups, 0, 1);
        assert_eq!(groups.due(0), Some(0), "it has no time yet");
        assert_eq!(groups.overdue(100, 1_000), []);
        assert_eq!(groups.due(100), Some(1_100));
        ask(&mut groups, 1, 1);
        ask(&mut groups, 0, 2);
        assert_eq!(groups.overdue(600, 1_000), []);
        assert_eq!(groups.due(600), Some(1_100));
        groups.remove(0, (None, 2));
        assert_eq!(groups.overdue(1_099, 1_000), []);
        assert_eq!(groups.overdue(1_100, 1_000), [(0, (None, 1))]);
        groups.remove(0, (None, 1));
        assert_eq!(groups.due(1_100), Some(1_600));
        assert_eq!(groups.overdue(1_600, 1_000), [(1, (None, 1))]);
        groups.remove(1, (None, 1));
        assert_eq!(groups.due(1_600), None);
    }
}
