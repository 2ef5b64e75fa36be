//! Faults of guests' tables: from the kernel's event queues to reports.

use std::collections::{BTreeMap, VecDeque};

use pgtable_formats::Fault;
use viommu_device::host::{FaultCause, FaultReport, Stream};
use viommu_wire::EndpointId;

use crate::kernel::{Event, Iommufd};
use crate::objects::EventQueue;
use crate::unit::{EVENT_QUEUE_DEPTH, Kind, Unit, UnitId};
use crate::vendor::smmuv3;

/// Faults of one endpoint that wait to be handed out. Further ones are lost, and counted: one that floods loses its own.
pub const MAX_WAITING_FAULTS: usize = 1024;

/// Faults that are handed out, at least, before queues are read again.
const ROUND: usize = 16;

/// What came out of the queues of all units.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    /// Oldest first; no endpoint has none.
    waiting: BTreeMap<EndpointId, VecDeque<FaultReport>>,
    /// The endpoints that have some, in the order of their turns.
    turns: VecDeque<EndpointId>,
    /// How many are handed out before queues are read again.
    left: usize,
    /// Number of the next event of each unit.
    next: BTreeMap<UnitId, u32>,
    lost: u64,
    ignored: u64,
}

impl Faults {
    pub(crate) const fn lost(&self) -> u64 {
        self.lost
    }

    pub(crate) const fn ignored(&self) -> u64 {
        self.ignored
    }

    /// Whether queues are to be read: every endpoint that had something had its turn.
    pub(crate) fn is_round_over(&self) -> bool {
        self.left == 0 || self.turns.is_empty()
    }

    pub(crate) fn begin_round(&mut self) {
        self.left = self.turns.len().max(ROUND);
    }

    /// The oldest fault of the endpoint whose turn it is.
    pub(crate) fn pop(&mut self) -> Option<FaultReport> {
        let endpoint = self.turns.pop_front()?;
        self.left = self.left.saturating_sub(1);
        let waiting = self.waiting.get_mut(&endpoint)?;
        let report = waiting.pop_front();
        if waiting.is_empty() {
            self.waiting.remove(&endpoint);
        } else {
            self.turns.push_back(endpoint);
        }
        report
    }

    /// Reads the queue of `unit`, if it has one, as far as the kernel keeps it. `is_endpoint`: whether there is one of
    /// that number behind it.
    pub(crate) fn read<K: Iommufd>(&mut self, unit: &Unit<K>, is_endpoint: impl Fn(EndpointId) -> bool) {
        let Kind::Smmuv3(smmu) = &unit.kind else { return };
        let Some(queue) = &smmu.events else { return };
        let mut seen = 0;
        // All that the kernel kept until now; what comes meanwhile may stay.
        while seen < EVENT_QUEUE_DEPTH as usize {
            match self.read_once(unit.id, queue, &is_endpoint) {
                0 => return,
                count => seen += count,
            }
        }
    }

    /// One read. Answers how many events came.
    fn read_once<K: Iommufd>(
        &mut self,
        unit: UnitId,
        queue: &EventQueue<K>,
        is_endpoint: &impl Fn(EndpointId) -> bool,
    ) -> usize {
        let events = queue.read().unwrap_or_else(|errno| {
            tracing::debug!(%errno, "event queue not read");
            Vec::new()
        });
        for event in &events {
            self.push(unit, event, is_endpoint);
        }
        events.len()
    }

    fn push(&mut self, unit: UnitId, event: &Event, is_endpoint: impl Fn(EndpointId) -> bool) {
        let record = match event {
            Event::Lost { sequence } => {
                // Its number is that of the last event lost.
                let lost = self.gap(unit, *sequence).saturating_add(1);
                self.count_lost(lost);
                return;
            }
            Event::Smmuv3 { sequence, record } => {
                let lost = self.gap(unit, *sequence);
                self.count_lost(lost);
                record
            }
        };
        let decoded = smmuv3::decode(record).filter(|event| is_endpoint(EndpointId(event.vsid)));
        let Some(event) = decoded else {
            tracing::debug!(?record, "event ignored");
            self.ignored = self.ignored.saturating_add(1);
            return;
        };
        let endpoint = EndpointId(event.vsid);
        let waiting = self.waiting.entry(endpoint).or_default();
        match waiting.len() {
            0 => self.turns.push_back(endpoint),
            MAX_WAITING_FAULTS.. => return self.count_lost(1),
            _ => {}
        }
        waiting.push_back(FaultReport {
            stream: Stream { endpoint, pasid: event.pasid },
            address: event.address,
            kind: event.kind,
            privileged: event.privileged,
            cause: FaultCause::Table(Fault::Smmuv3(event.event)),
        });
    }

    /// How many events are missing before the one with this number, which counts to `i32::MAX` and begins anew.
    fn gap(&mut self, unit: UnitId, sequence: u32) -> u64 {
        const MASK: u32 = i32::MAX.cast_unsigned();
        let next = self.next.entry(unit).or_insert(0);
        let missing = sequence.wrapping_sub(*next) & MASK;
        *next = sequence.wrapping_add(1) & MASK;
        missing.into()
    }

    fn count_lost(&mut self, events: u64) {
        if events != 0 && self.lost == 0 {
            tracing::warn!("faults of guests' tables come faster than they are read: some are lost");
        }
        self.lost = self.lost.saturating_add(events);
    }

    /// The endpoint, which was behind `unit`, is gone: its number may be given to another one. `is_endpoint`: as for
    /// [`read`](Self::read), of those that are left.
    pub(crate) fn forget_endpoint<K: Iommufd>(
        &mut self,
        gone: EndpointId,
        unit: &Unit<K>,
        is_endpoint: impl Fn(EndpointId) -> bool,
    ) {
        self.waiting.remove(&gone);
        self.turns.retain(|endpoint| *endpoint != gone);
        self.read(unit, is_endpoint);
    }

    /// The unit is gone.
    pub(crate) fn forget_unit(&mut self, unit: UnitId) {
        self.next.remove(&unit);
    }
}

#[cfg(test)]
mod tests {
    use pgtable_formats::{AccessKind, Iova};

    use super::*;

    /// F_TRANSLATION of a read by the stream 0x42, as the emulated SMMU recorded it.
    const TRANSLATION: [u64; 4] = [0x42_0000_0010, 0x800_0000_0000 | 1 << 35, 0x2000_0000, 0];

    fn event(sequence: u32) -> Event {
        Event::Smmuv3 { sequence, record: TRANSLATION }
    }

    fn push(faults: &mut Faults, events: impl IntoIterator<Item = Event>) {
        for event in events {
            faults.push(UnitId(0), &event, |endpoint| endpoint == EndpointId(0x42));
        }
    }

    #[test]
    fn an_event_becomes_a_report_once() {
        let mut faults = Faults::default();
        push(&mut faults, [event(0)]);
        let report = faults.pop().unwrap();
        assert_eq!(report.stream, Stream::untagged(EndpointId(0x42)));
        assert_eq!((report.address, report.kind), (Some(Iova(0x2000_0000)), AccessKind::Read));
        assert!(report.cause.is_mapping());
        assert!(faults.pop().is_none());
        assert_eq!((faults.lost(), faults.ignored()), (0, 0));
    }

    #[test]
    fn lost_events_are_counted_by_their_numbers() {
        let mut faults = Faults::default();
        push(&mut faults, [event(0), event(1), Event::Lost { sequence: 4 }, event(5)]);
        assert_eq!(faults.lost(), 3);
        push(&mut faults, [event(8)]);
        assert_eq!(faults.lost(), 5);
    }

    #[test]
    fn numbers_begin_anew_after_the_largest() {
        let mut faults = Faults::default();
        faults.next.insert(UnitId(0), i32::MAX.cast_unsigned());
        push(&mut faults, [event(i32::MAX.cast_unsigned()), event(0), event(1)]);
        assert_eq!(faults.lost(), 0);
    }

    #[test]
    fn strangers_and_what_has_no_meaning_are_ignored_and_counted() {
        let mut faults = Faults::default();
        let stranger = [0x43_0000_0010, 0, 0, 0];
        let nonsense = [0x42_0000_00ff, 0, 0, 0];
        let records = [stranger, nonsense].into_iter().zip(0..);
        push(&mut faults, records.map(|(record, sequence)| Event::Smmuv3 { sequence, record }));
        assert!(faults.pop().is_none());
        assert_eq!((faults.lost(), faults.ignored()), (0, 2));
    }

    #[test]
    fn more_than_fit_are_lost() {
        let mut faults = Faults::default();
        push(&mut faults, (0..).take(MAX_WAITING_FAULTS + 3).map(event));
        assert_eq!(faults.lost(), 3);
        assert_eq!(std::iter::from_fn(|| faults.pop()).count(), MAX_WAITING_FAULTS);
    }
}
