//! Page requests: accesses that wait in the machine until the driver answers, or the device does.
//!
//! The device takes requests over from the host, tells them to the driver, endpoint by endpoint in turns, and gives the
//! driver's answer for a whole group to the host. It answers INVALID itself where nobody else will: see
//! [`PageRequestCounts`], and whenever a binding that the group waits for is replaced, or its entry invalidated.

mod groups;

use viommu_wire::{AccessFlags, Features, PageRequest, PageResponse, PageResponseCode, Pasid};

use crate::device::Device;
use crate::error::Rejection;
use crate::event::MAX_DISCARDED;
use crate::host::{
    Answered, FaultCause, FaultReport, GroupResponse, Host, Invalidation, PageRequestReport, Stream,
};
use groups::GroupKey;
pub(crate) use groups::Groups;
use pgtable_formats::AccessKind;

/// How many page requests there are, and what became of others since the device was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageRequestCounts {
    /// Requests that are not answered yet, told to the driver or not.
    pub requests: usize,
    /// Groups that they form.
    pub groups: usize,
    /// Groups that were answered INVALID because a bound was reached, see [`Limits`](crate::Limits).
    pub refused: u64,
    /// Groups that were answered INVALID because the driver took too long.
    pub timed_out: u64,
    /// Groups that were answered INVALID because the driver offered a buffer that their requests do not fit.
    pub buffer_too_small: u64,
}

/// What the device keeps of page requests.
#[derive(Debug)]
pub(crate) struct PageRequests {
    pub(crate) groups: Groups,
    /// In nanoseconds, as far as anybody said.
    now: u64,
    refused: u64,
    timed_out: u64,
    buffer_too_small: u64,
}

impl PageRequests {
    pub(crate) fn new(endpoints: usize) -> Self {
        Self { groups: Groups::new(endpoints), now: 0, refused: 0, timed_out: 0, buffer_too_small: 0 }
    }
}

impl<H: Host> Device<H> {
    /// Says what time it is, in nanoseconds since any moment in the past: the device has no clock. Page requests that
    /// the driver did not answer for [`page_request_timeout_ns`](crate::DeviceConfig::page_request_timeout_ns) are
    /// answered INVALID. A time before an earlier one counts as that.
    ///
    /// A group's time runs from the first call that finds it, so it may get more time, never less. Whoever never calls
    /// this lets endpoints wait for ever.
    pub fn set_time(&mut self, now_ns: u64) {
        self.collect_page_requests();
        self.page_requests.now = self.page_requests.now.max(now_ns);
        let PageRequests { groups, now, .. } = &mut self.page_requests;
        for (place, key) in groups.overdue(*now, self.config.page_request_timeout_ns) {
            count(&mut self.page_requests.timed_out);
            self.close_group(place, key);
        }
    }

    /// When [`set_time`](Self::set_time) is to be called next, in the time that it was told; a time that has passed
    /// means now. `None`: nothing waits that has a time.
    pub fn page_requests_due(&self) -> Option<u64> {
        let PageRequests { groups, now, .. } = &self.page_requests;
        groups.due(*now).filter(|_| self.config.page_request_timeout_ns != u64::MAX)
    }

    /// Page requests in numbers.
    pub fn page_request_counts(&self) -> PageRequestCounts {
        let PageRequests { groups, refused, timed_out, buffer_too_small, .. } = &self.page_requests;
        PageRequestCounts {
            requests: groups.requests(),
            groups: groups.groups(),
            refused: *refused,
            timed_out: *timed_out,
            buffer_too_small: *buffer_too_small,
        }
    }

    /// PAGE_RESP. Order of checks: endpoint, group, host.
    pub(crate) fn answer_group(&mut self, response: &PageResponse) -> Result<(), Rejection> {
        let PageResponse { endpoint, pasid, group_id: group, code } = *response;
        let place = self.endpoints.find(endpoint).ok_or(Rejection::NoEndpoint(endpoint))?;
        if !self.page_requests.groups.is_answerable(place, (pasid, group)) {
            return Err(Rejection::NoPageRequest { endpoint, pasid, group });
        }
        let answered =
            self.host.respond(&GroupResponse { stream: Stream { endpoint, pasid }, group, code })?;
        self.page_requests.groups.remove(place, (pasid, group));
        match answered {
            Answered::Taken => Ok(()),
            Answered::Gone => Err(Rejection::NoPageRequest { endpoint, pasid, group }),
        }
    }

    /// Takes over what the host has, as far as there is room. One call looks at a bounded number: endpoints may ask as
    /// fast as they are answered.
    pub(crate) fn collect_page_requests(&mut self) {
        let limits = self.config.limits;
        for _ in 0..limits.max_page_requests.max(1) {
            if self.page_requests.groups.is_choked(&limits) {
                return;
            }
            let Some(report) = self.host.next_page_request() else { return };
            self.take_over(&report);
        }
    }

    /// Answers INVALID the groups of an endpoint whose PASID is selected: what they waited for is gone. A host that has
    /// answered them itself has forgotten them.
    pub(crate) fn close_groups(&mut self, place: usize, selects: impl Fn(Option<Pasid>) -> bool) {
        while let Some(key) = self.page_requests.groups.find(place, &selects) {
            self.close_group(place, key);
        }
    }

    /// Answers INVALID the groups of the streams that `batch` revokes. The host, which was asked for them by name, has
    /// done so with what it holds.
    pub(crate) fn close_revoked(&mut self, batch: &[Invalidation]) {
        if self.page_requests.groups.groups() == 0 {
            return;
        }
        for Stream { endpoint, pasid } in batch.iter().filter_map(Invalidation::revoked) {
            if let Some(place) = self.endpoints.find(endpoint) {
                self.close_groups(place, |other| other == pasid);
            }
        }
    }

    /// The same for what the untagged stream serves: all but the PASIDs that are bound on their own.
    pub(crate) fn close_untagged_groups(&mut self, place: usize) {
        loop {
            let bound = &self.endpoints[place].pasids;
            let served = |pasid: Option<Pasid>| pasid.is_none_or(|pasid| !bound.contains_key(&pasid));
            let Some(key) = self.page_requests.groups.find(place, served) else { return };
            self.close_group(place, key);
        }
    }

    /// Answers INVALID every group of every endpoint.
    pub(crate) fn close_all_groups(&mut self) {
        if self.page_requests.groups.groups() > 0 {
            (0..self.endpoints.len()).for_each(|place| self.close_groups(place, |_| true));
        }
    }

    /// Answers INVALID all groups, those that the host still holds included.
    pub(crate) fn discard_page_requests(&mut self) {
        self.close_all_groups();
        for _ in 0..MAX_DISCARDED {
            let Some(report) = self.host.next_page_request() else { return };
            self.refuse(report.stream, report.group);
        }
    }

    /// Answers INVALID the group of a request that does not fit the driver's buffer.
    pub(crate) fn close_too_large(&mut self, place: usize, request: &PageRequest) {
        count(&mut self.page_requests.buffer_too_small);
        self.close_group(place, (request.pasid, request.group_id));
    }

    fn take_over(&mut self, report: &PageRequestReport) {
        let PageRequestReport { stream, address, access, group, last, private_data, fault } = *report;
        let place = self.endpoints.find(stream.endpoint);
        let capable = self.host.caps(stream.endpoint).is_some_and(|caps| caps.page_requests);
        let Some(place) = place.filter(|_| capable) else {
            return self.refuse(stream, group); // D-56
        };
        if !self.features.contains(Features::PAGE_REQUEST | Features::ATTACH_TABLE) {
            // For this driver it is a fault like any other, and told as any other.
            self.refuse(stream, group);
            if let Some(cause) = fault {
                self.push_fault(&final_fault(report, cause));
            }
            return;
        }
        let Stream { endpoint, pasid } = stream;
        let request = PageRequest { access, endpoint, pasid, address, group_id: group, last, private_data };
        if self.page_requests.groups.add(place, request, &self.config.limits).is_err() {
            count(&mut self.page_requests.refused);
            self.refuse(stream, group);
        }
    }

    fn close_group(&mut self, place: usize, key: GroupKey) {
        self.page_requests.groups.remove(place, key);
        let (pasid, group) = key;
        self.refuse(Stream { endpoint: self.endpoints[place].id, pasid }, group);
    }

    /// An access that nobody will answer any more leaves its endpoint other than the driver believes (D-60).
    fn refuse(&mut self, stream: Stream, group: u16) {
        let response = GroupResponse { stream, group, code: PageResponseCode::Invalid };
        self.needs_reset |= self.host.respond(&response).is_err();
    }
}

/// The access as one that failed.
fn final_fault(report: &PageRequestReport, cause: FaultCause) -> FaultReport {
    let kind = if report.access.contains(AccessFlags::WRITE) {
        AccessKind::Write
    } else if report.access.contains(AccessFlags::EXEC) {
        AccessKind::Execute
    } else {
        AccessKind::Read
    };
    FaultReport {
        stream: report.stream,
        address: Some(report.address),
        kind,
        privileged: report.access.contains(AccessFlags::PRIVILEGED),
        cause,
    }
}

fn count(counter: &mut u64) {
    *counter = counter.saturating_add(1);
}
