//! What the driver is told unasked: faults, and page requests, which take turns.

use alloc::collections::VecDeque;

use pgtable_formats::AccessKind;
use viommu_wire::{AccessFlags, Event, FaultEvent, FaultReason, Features};

use crate::device::Device;
use crate::host::{FaultCause, FaultReport, Host};

/// Faults of the host that a reset passes over, and page requests. More than a host holds: only one that finds them
/// faster than they are discarded, in a machine of its own, has more.
pub(crate) const MAX_DISCARDED: usize = 1 << 16;

/// Faults that wait for a buffer.
#[derive(Debug, Default)]
pub(crate) struct Events {
    faults: VecDeque<FaultEvent>,
    dropped: u64,
    /// Whether a page request goes before a fault: a flood of the ones does not hold up the others.
    is_turn_of_page_requests: bool,
}

/// What goes into the next buffer.
enum Next {
    Fault,
    /// Of the endpoint at this place.
    PageRequest(usize),
}

impl<H: Host> Device<H> {
    /// Takes the next event. A page request that was taken is to be answered, by PAGE_RESP.
    pub fn next_event(&mut self) -> Option<Event> {
        let (next, event) = self.peek_event()?;
        self.take_event(&next);
        Some(event)
    }

    /// Whether there is an event to deliver.
    pub fn event_pending(&mut self) -> bool {
        self.collect_faults();
        self.collect_page_requests();
        !self.events.faults.is_empty() || self.page_requests.groups.has_untold()
    }

    /// Writes the next event to the start of `buffer` and takes it.
    ///
    /// `None`: there is no event. `Some(0)`: the buffer is too small for it, nothing was written, and the buffer is to
    /// be returned with a used length of 0 (D-58); a fault is kept, a page request is answered INVALID with its whole
    /// group. `Some(n)`: `n` bytes were written.
    pub fn fill_event(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let (next, event) = self.peek_event()?;
        let written = event.encode(buffer);
        match (written, &next, event) {
            (Some(_), ..) => self.take_event(&next),
            (None, Next::PageRequest(place), Event::PageRequest(request)) => {
                self.close_too_large(*place, &request);
            }
            (None, ..) => {}
        }
        Some(written.unwrap_or(0))
    }

    /// How many faults were dropped because too many were waiting (D-59), since the device was made.
    pub fn dropped_events(&self) -> u64 {
        self.events.dropped
    }

    /// Forgets events that nobody took, those that the host still holds included.
    pub(crate) fn discard_events(&mut self) {
        self.events.faults.clear();
        self.events.is_turn_of_page_requests = false;
        for _ in 0..MAX_DISCARDED {
            if self.host.next_fault().is_none() {
                break;
            }
        }
        self.discard_page_requests();
    }

    /// Keeps a fault for the driver, or drops it where too many wait (D-59).
    pub(crate) fn push_fault(&mut self, report: &FaultReport) {
        if self.events.faults.len() < self.config.limits.max_pending_events {
            self.events.faults.push_back(fault_event(report, self.features));
        } else {
            self.events.dropped = self.events.dropped.saturating_add(1);
        }
    }

    fn peek_event(&mut self) -> Option<(Next, Event)> {
        self.collect_faults();
        self.collect_page_requests();
        let fault = self.events.faults.front().map(|&fault| (Next::Fault, Event::Fault(fault)));
        if fault.is_some() && !self.events.is_turn_of_page_requests {
            return fault;
        }
        let request = self.page_requests.groups.front();
        request.map(|(place, request)| (Next::PageRequest(place), Event::PageRequest(request))).or(fault)
    }

    fn take_event(&mut self, next: &Next) {
        match next {
            Next::Fault => drop(self.events.faults.pop_front()),
            Next::PageRequest(_) => self.page_requests.groups.told(),
        }
        self.events.is_turn_of_page_requests = matches!(next, Next::Fault);
    }

    /// Takes over what the host has. One call looks at a bounded number of faults: endpoints may produce them as fast
    /// as they are taken.
    fn collect_faults(&mut self) {
        let bound = self.config.limits.max_pending_events;
        for _ in 0..bound {
            let Some(report) = self.host.next_fault() else { return };
            if self.endpoints.find(report.stream.endpoint).is_none() {
                continue; // D-56
            }
            self.push_fault(&report);
        }
    }
}

/// The report in the words that were negotiated: a driver of the ratified text alone sees no flag that the text does
/// not define (D-55).
fn fault_event(report: &FaultReport, features: Features) -> FaultEvent {
    let extended = features.contains(Features::ATTACH_TABLE);
    let mut access = match report.kind {
        AccessKind::Read => AccessFlags::READ,
        AccessKind::Write => AccessFlags::WRITE,
        AccessKind::Execute if extended => AccessFlags::READ | AccessFlags::EXEC,
        AccessKind::Execute => AccessFlags::READ,
    };
    access.set(AccessFlags::PRIVILEGED, extended && report.privileged);
    FaultEvent {
        reason: match report.cause {
            FaultCause::Unattached => FaultReason::Domain,
            cause if cause.is_mapping() => FaultReason::Mapping,
            _ => FaultReason::Unknown,
        },
        access,
        endpoint: report.stream.endpoint,
        pasid: report.stream.pasid.filter(|_| extended),
        address: report.address, // D-57
    }
}
