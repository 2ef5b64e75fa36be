//! Accesses that wait for a page: the tickets that they hold, and the page requests that these are to the device.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;

use pgtable_formats::{Access, AccessKind, Iova, Pasid};
use viommu_wire::{AccessFlags, EndpointId, PageResponseCode};

use super::front::PAGE_LG2;
use crate::host::{FaultCause, GroupResponse, PageRequestReport, Stream};

/// How many pages the accesses of one endpoint wait for at a time; beyond, an access faults.
pub const MAX_WAITING_PER_ENDPOINT: usize = 256;

const ANSWERS_LG2: u32 = 12;
/// How many answers are kept for whoever asks.
const ANSWERS: usize = 1 << ANSWERS_LG2;

/// Why an access did not get through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// It failed for good.
    #[error("{0}")]
    Fault(FaultCause),
    /// The guest was asked for the page: [`SoftHost::answer`](super::SoftHost::answer) tells what it says.
    #[error("waits for a page")]
    Waits(Ticket),
}

impl From<FaultCause> for AccessError {
    fn from(cause: FaultCause) -> Self {
        Self::Fault(cause)
    }
}

/// What waits for a page. Accesses to one page may hold the same ticket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket {
    /// Of all that a host ever gave, in order.
    number: u64,
    pub(super) endpoint: EndpointId,
    group: u16,
}

/// What became of a ticket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// The page is there, or was: try the access again.
    Retry,
    /// The access failed for good.
    Failed,
}

/// What the accesses of one endpoint wait for.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    /// By group: each ticket is a group of its own.
    open: BTreeMap<u16, Open>,
    /// The groups again, by what they wait for.
    pages: BTreeMap<Page, u16>,
    /// Where the search for an unused number starts.
    next_group: u16,
}

#[derive(Clone, Copy, Debug)]
struct Open {
    number: u64,
    page: Page,
    iova: Iova,
    /// Whether the device took the request over: only then can it be answered.
    is_reported: bool,
}

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Page {
    pasid: Option<Pasid>,
    page: u64,
    kind: Kind,
    is_privileged: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Read,
    Write,
    Execute,
}

/// What all endpoints share.
#[derive(Debug)]
pub(super) struct Tickets {
    /// The number of the next ticket; none has 0.
    next: u64,
    /// Tickets that the device was not told of, oldest first; all of them are open.
    unreported: VecDeque<Ticket>,
    /// By the low bits of the ticket's number; allocated with the first answer.
    answers: Vec<(u64, Answer)>,
}

impl Tickets {
    pub(super) const fn new() -> Self {
        Self { next: 1, unreported: VecDeque::new(), answers: Vec::new() }
    }

    /// A ticket for an access of `stream` to `iova`; one that is open for the same page, if there is any. `None` where
    /// too many are open.
    pub(super) fn open(
        &mut self,
        waiting: &mut Waiting,
        stream: Stream,
        iova: Iova,
        access: Access,
    ) -> Option<Ticket> {
        let Stream { endpoint, pasid } = stream;
        let kind = match access.kind {
            AccessKind::Read => Kind::Read,
            AccessKind::Write => Kind::Write,
            AccessKind::Execute => Kind::Execute,
        };
        let page = Page { pasid, page: iova.0 >> PAGE_LG2, kind, is_privileged: access.privileged };
        // Where not even a read is allowed, no other access is. The reverse does not hold.
        let joined = [page, Page { kind: Kind::Read, ..page }]
            .iter()
            .find_map(|page| waiting.pages.get(page))
            .and_then(|group| Some((*group, waiting.open.get(group)?.number)));
        if let Some((group, number)) = joined {
            return Some(Ticket { number, endpoint, group });
        }
        if waiting.open.len() >= MAX_WAITING_PER_ENDPOINT {
            return None;
        }
        let group = waiting.unused_group();
        let number = self.next;
        // 2^64 tickets are never given.
        self.next = self.next.wrapping_add(1);
        waiting.open.insert(group, Open { number, page, iova, is_reported: false });
        waiting.pages.insert(page, group);
        let ticket = Ticket { number, endpoint, group };
        self.unreported.push_back(ticket);
        Some(ticket)
    }

    /// The next ticket that the device is to be told of.
    pub(super) fn next_unreported(&mut self) -> Option<Ticket> {
        self.unreported.pop_front()
    }

    /// What was said to `ticket`, which is not open. Of a very old one nobody knows; to try again is always right.
    pub(super) fn answer(&self, ticket: Ticket) -> Answer {
        let kept = self.answers.get(slot(ticket.number)).filter(|(number, _)| *number == ticket.number);
        kept.map_or(Answer::Retry, |&(_, answer)| answer)
    }

    /// Closes what `waiting` waits for with selected PASIDs: it failed.
    pub(super) fn close(&mut self, waiting: &mut Waiting, selects: impl Fn(Option<Pasid>) -> bool) {
        if waiting.open.is_empty() {
            return;
        }
        let Waiting { open, pages, .. } = waiting;
        let mut numbers = Vec::new();
        open.retain(|_, open| {
            let is_closed = selects(open.page.pasid);
            if is_closed {
                pages.remove(&open.page);
                numbers.push(open.number);
            }
            !is_closed
        });
        numbers.sort_unstable();
        self.unreported.retain(|ticket| numbers.binary_search(&ticket.number).is_err());
        numbers.iter().for_each(|&number| self.keep(number, Answer::Failed));
    }

    /// Closes one group with the guest's answer; nothing where it is gone or the device was not told of it.
    pub(super) fn respond(&mut self, waiting: &mut Waiting, response: &GroupResponse) {
        let reported = |open: &&Open| open.is_reported && open.page.pasid == response.stream.pasid;
        let Some(&Open { number, page, .. }) = waiting.open.get(&response.group).filter(reported) else {
            return;
        };
        waiting.open.remove(&response.group);
        waiting.pages.remove(&page);
        self.keep(
            number,
            match response.code {
                PageResponseCode::Success => Answer::Retry,
                PageResponseCode::Invalid | PageResponseCode::Failure => Answer::Failed,
            },
        );
    }

    fn keep(&mut self, number: u64, answer: Answer) {
        if self.answers.is_empty() {
            self.answers.resize(ANSWERS, (0, Answer::Failed));
        }
        if let Some(kept) = self.answers.get_mut(slot(number)) {
            *kept = (number, answer);
        }
    }
}

impl Waiting {
    pub(super) fn is_open(&self, ticket: Ticket) -> bool {
        self.open.get(&ticket.group).is_some_and(|open| open.number == ticket.number)
    }

    pub(super) fn len(&self) -> usize {
        self.open.len()
    }

    /// The page request of `ticket`, of which the device is told now.
    pub(super) fn report(&mut self, ticket: Ticket) -> Option<PageRequestReport> {
        let open = self.open.get_mut(&ticket.group).filter(|open| open.number == ticket.number)?;
        open.is_reported = true;
        let mut access = match open.page.kind {
            Kind::Read => AccessFlags::READ,
            Kind::Write => AccessFlags::WRITE,
            Kind::Execute => AccessFlags::READ | AccessFlags::EXEC,
        };
        access.set(AccessFlags::PRIVILEGED, open.page.is_privileged);
        Some(PageRequestReport {
            stream: Stream { endpoint: ticket.endpoint, pasid: open.page.pasid },
            address: open.iova,
            access,
            group: ticket.group,
            last: true,
            private_data: None,
        })
    }

    /// There is one: far fewer groups than numbers are open.
    fn unused_group(&mut self) -> u16 {
        while self.open.contains_key(&self.next_group) {
            self.next_group = self.next_group.wrapping_add(1);
        }
        let group = self.next_group;
        self.next_group = group.wrapping_add(1);
        group
    }
}

fn slot(number: u64) -> usize {
    const MASK: u64 = (1 << ANSWERS_LG2) - 1;
    #[allow(clippy::cast_possible_truncation, reason = "a few bits are left")]
    let slot = (number & MASK) as usize;
    slot
}
