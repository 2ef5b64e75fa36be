//! Accesses that wait for a page: the tickets that they hold, and the page requests that these are to the device.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;

use pgtable_formats::{Access, AccessKind, Iova, Pasid};
use viommu_wire::{AccessFlags, EndpointId, PageResponseCode};

use super::front::PAGE_LG2;
use super::space::SpaceIndex;
use crate::host::{Answered, FaultCause, GroupResponse, PageRequestReport, Stream};
use crate::sorted::SortedMap;

/// How many pages the accesses of one endpoint wait for at a time; beyond, an access faults.
pub const MAX_WAITING_PER_ENDPOINT: usize = 256;

const ANSWERS_LG2: u32 = 12;
/// How many answers are kept for whoever asks.
const ANSWERS: usize = 1 << ANSWERS_LG2;

/// Groups of streams of an endpoint of which it is known when the last one was closed.
const CLOSINGS: usize = 32;

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
    pub(super) stream: Stream,
    group: u16,
}

impl Ticket {
    /// The number of its group of page requests: with the access's stream, what the guest's answer names.
    pub const fn group(self) -> u16 {
        self.group
    }
}

/// What became of a ticket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// The page is there, or was: try the access again.
    Retry,
    /// The access failed for good.
    Failed,
}

/// Which streams of an endpoint translate through something else now.
#[derive(Clone, Copy, Debug)]
pub(super) enum Closing<'a> {
    /// That with this PASID, or the untagged one.
    Stream(Option<Pasid>),
    /// All but those with one of these PASIDs.
    AllBut(&'a BTreeMap<Pasid, SpaceIndex>),
}

/// What the accesses of one endpoint wait for.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    /// By group: each ticket is a group of its own.
    open: SortedMap<u16, Open>,
    /// The groups again, by what they wait for.
    pages: SortedMap<Page, u16>,
    /// Where the search for an unused number starts.
    next_group: u16,
    /// Whether somebody may still be told to try again.
    has_retries: bool,
    /// By [`place_of`] a stream: tickets with a lower number were closed, or given to another stream of that place.
    closed_below: [u64; CLOSINGS],
}

#[derive(Clone, Copy, Debug)]
struct Open {
    number: u64,
    page: Page,
    iova: Iova,
    /// What it is to a driver that takes no page requests, see [`PageRequestReport::fault`].
    fault: Option<FaultCause>,
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
    answers: Vec<Kept>,
}

/// What was said to a ticket.
#[derive(Clone, Copy, Debug)]
struct Kept {
    number: u64,
    stream: Stream,
    answer: Answer,
}

impl Tickets {
    pub(super) const fn new() -> Self {
        Self { next: 1, unreported: VecDeque::new(), answers: Vec::new() }
    }

    /// A new ticket for an access of `stream` to `iova`, which is told as `fault` where it is no page request. `None` where
    /// too many are open.
    pub(super) fn open(
        &mut self,
        waiting: &mut Waiting,
        stream: Stream,
        iova: Iova,
        access: Access,
        fault: Option<FaultCause>,
    ) -> Option<Ticket> {
        if waiting.open.len() >= MAX_WAITING_PER_ENDPOINT {
            return None;
        }
        let group = waiting.unused_group();
        let number = self.next;
        // 2^64 tickets are never given.
        self.next = self.next.wrapping_add(1);
        let page = Page::new(stream, iova, access);
        waiting.open.insert(group, Open { number, page, iova, fault, is_reported: false });
        waiting.pages.insert(page, group);
        let ticket = Ticket { number, stream, group };
        self.unreported.push_back(ticket);
        Some(ticket)
    }

    /// The next ticket that the device is to be told of.
    pub(super) fn next_unreported(&mut self) -> Option<Ticket> {
        self.unreported.pop_front()
    }

    /// What was said to `ticket`, which is not open. Of a very old one nobody knows: to try again is right where its
    /// stream still is what it was.
    pub(super) fn answer(&self, waiting: &Waiting, ticket: Ticket) -> Answer {
        let kept = self.answers.get(slot(ticket.number)).filter(|kept| kept.number == ticket.number);
        match kept {
            Some(kept) => kept.answer,
            None if ticket.number < waiting.closed_below[place_of(ticket.stream.pasid)] => Answer::Failed,
            None => Answer::Retry,
        }
    }

    /// Closes what the streams of `endpoint` wait for: it failed. So has what was told to try again and did not yet: it
    /// would find another address space.
    pub(super) fn close(&mut self, endpoint: EndpointId, waiting: &mut Waiting, closing: Closing<'_>) {
        match closing {
            Closing::Stream(pasid) => waiting.closed_below[place_of(pasid)] = self.next,
            Closing::AllBut(_) => waiting.closed_below.fill(self.next),
        }
        if waiting.has_retries {
            waiting.has_retries = self.take_back(endpoint, closing);
        }
        if waiting.open.is_empty() {
            return;
        }
        let Waiting { open, pages, .. } = waiting;
        let mut closed = Vec::new();
        open.retain(|&group, open| {
            let pasid = open.page.pasid;
            let is_closed = closing.selects(pasid);
            if is_closed {
                pages.remove(&open.page);
                closed.push(Ticket { number: open.number, stream: Stream { endpoint, pasid }, group });
            }
            !is_closed
        });
        closed.sort_unstable_by_key(|ticket| ticket.number);
        let is_closed = |number: u64| closed.binary_search_by_key(&number, |ticket| ticket.number).is_ok();
        self.unreported.retain(|ticket| !is_closed(ticket.number));
        closed.iter().for_each(|ticket| self.keep(ticket.number, ticket.stream, Answer::Failed));
    }

    /// Whether other streams of the endpoint were told to try again.
    fn take_back(&mut self, endpoint: EndpointId, closing: Closing<'_>) -> bool {
        let mut others = false;
        for kept in &mut self.answers {
            if kept.stream.endpoint == endpoint && kept.answer == Answer::Retry {
                if closing.selects(kept.stream.pasid) {
                    kept.answer = Answer::Failed;
                } else {
                    others = true;
                }
            }
        }
        others
    }

    /// Closes one group with the guest's answer; nothing where it is gone or the device was not told of it.
    pub(super) fn respond(&mut self, waiting: &mut Waiting, response: &GroupResponse) -> Answered {
        let reported = |open: &&Open| open.is_reported && open.page.pasid == response.stream.pasid;
        let Some(&Open { number, page, .. }) = waiting.open.get(&response.group).filter(reported) else {
            return Answered::Gone;
        };
        waiting.open.remove(&response.group);
        waiting.pages.remove(&page);
        let answer = match response.code {
            PageResponseCode::Success => Answer::Retry,
            PageResponseCode::Invalid | PageResponseCode::Failure => Answer::Failed,
        };
        waiting.has_retries |= answer == Answer::Retry;
        self.keep(number, response.stream, answer);
        Answered::Taken
    }

    fn keep(&mut self, number: u64, stream: Stream, answer: Answer) {
        if self.answers.is_empty() {
            self.answers.resize(ANSWERS, Kept { number: 0, stream, answer: Answer::Failed });
        }
        // A ticket that was open for very long does not take the place of one that is asked about now.
        if let Some(kept) = self.answers.get_mut(slot(number)).filter(|kept| kept.number <= number) {
            *kept = Kept { number, stream, answer };
        }
    }
}

impl Closing<'_> {
    fn selects(&self, pasid: Option<Pasid>) -> bool {
        match self {
            Self::Stream(closed) => *closed == pasid,
            Self::AllBut(bound) => pasid.is_none_or(|pasid| !bound.contains_key(&pasid)),
        }
    }
}

impl Page {
    fn new(stream: Stream, iova: Iova, access: Access) -> Self {
        let kind = match access.kind {
            AccessKind::Read => Kind::Read,
            AccessKind::Write => Kind::Write,
            AccessKind::Execute => Kind::Execute,
        };
        Self { pasid: stream.pasid, page: iova.0 >> PAGE_LG2, kind, is_privileged: access.privileged }
    }
}

impl Waiting {
    /// The ticket that is open for the page of an access, if there is any.
    pub(super) fn find(&self, stream: Stream, iova: Iova, access: Access) -> Option<Ticket> {
        let page = Page::new(stream, iova, access);
        // Where not even a read is allowed, no other access is. The reverse does not hold.
        let pages = [page, Page { kind: Kind::Read, ..page }];
        let &group = pages.iter().find_map(|page| self.pages.get(page))?;
        Some(Ticket { number: self.open.get(&group)?.number, stream, group })
    }

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
            stream: ticket.stream,
            address: open.iova,
            access,
            group: ticket.group,
            last: true,
            private_data: None,
            fault: open.fault,
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

/// The place of a stream in [`Waiting::closed_below`]: PASIDs that follow one another have different ones.
const fn place_of(pasid: Option<Pasid>) -> usize {
    match pasid {
        None => 0,
        Some(pasid) => 1 + pasid.value() as usize % (CLOSINGS - 1),
    }
}

fn slot(number: u64) -> usize {
    const MASK: u64 = (1 << ANSWERS_LG2) - 1;
    #[allow(clippy::cast_possible_truncation, reason = "a few bits are left")]
    let slot = (number & MASK) as usize;
    slot
}
