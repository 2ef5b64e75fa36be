//! Faults on their way to the driver.

use alloc::collections::VecDeque;

use pgtable_formats::AccessKind;
use viommu_wire::{AccessFlags, Event, FaultEvent, FaultReason, Features};

use crate::device::Device;
use crate::host::{FaultCause, FaultReport, Host};

/// Faults of the host that a reset passes over. More than a host holds: only one that finds them faster than they are
/// discarded, in a machine of its own, has more.
const MAX_DISCARDED: usize = 1 << 16;

/// Faults that wait for a buffer.
#[derive(Debug, Default)]
pub(crate) struct Events {
    queue: VecDeque<Event>,
    dropped: u64,
}

impl<H: Host> Device<H> {
    /// Takes the oldest event.
    pub fn next_event(&mut self) -> Option<Event> {
        self.collect_faults();
        self.events.queue.pop_front()
    }

    /// Whether there is an event to deliver.
    pub fn event_pending(&mut self) -> bool {
        self.collect_faults();
        !self.events.queue.is_empty()
    }

    /// Writes the oldest event to the start of `buffer` and takes it.
    ///
    /// `None`: there is no event. `Some(0)`: the buffer is too small for it, nothing was written and the event is
    /// kept; the buffer is to be returned with a used length of 0 (D-58). `Some(n)`: `n` bytes were written.
    pub fn fill_event(&mut self, buffer: &mut [u8]) -> Option<usize> {
        self.collect_faults();
        let written = self.events.queue.front()?.encode(buffer);
        if written.is_some() {
            self.events.queue.pop_front();
        }
        Some(written.unwrap_or(0))
    }

    /// How many faults were dropped because too many were waiting (D-59), since the device was made.
    pub fn dropped_events(&self) -> u64 {
        self.events.dropped
    }

    /// Forgets events that nobody took, those that the host still holds included.
    pub(crate) fn discard_events(&mut self) {
        self.events.queue.clear();
        for _ in 0..MAX_DISCARDED {
            if self.host.next_fault().is_none() {
                break;
            }
        }
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
            if self.events.queue.len() < bound {
                self.events.queue.push_back(Event::Fault(fault_event(&report, self.features)));
            } else {
                self.events.dropped = self.events.dropped.saturating_add(1); // D-59
            }
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
