//! Accesses that may wait, recorded.

use std::fmt;
use std::sync::Arc;

use viommu_device::host::Stream;
use viommu_device::soft::{AccessError, Answer, Ticket};

use super::iommu::flags;
use super::{Accessed, Event, Recorder, WaitEnd, Waited};
use crate::paged::{Attempt, Observe, PagedIommu};

/// Tells a recorder, as long as there is one, of what a [`PagedIommu`] does: of each access as it is tried, and of the end of
/// each wait.
#[derive(Clone)]
pub struct Recording(Option<Arc<dyn Recorder>>);

impl<T> PagedIommu<T> {
    /// The same accesses, each told to `recorder`.
    pub fn recorded(self, recorder: Option<Arc<dyn Recorder>>) -> PagedIommu<T, Recording> {
        self.observed(Recording(recorder))
    }
}

impl<T> PagedIommu<T, Recording> {
    /// Tells `recorder` from now on, or nobody.
    pub fn set_recorder(&mut self, recorder: Option<Arc<dyn Recorder>>) {
        self.observer = Recording(recorder);
    }
}

impl Observe for Recording {
    fn tried(&self, attempt: &Attempt, outcome: Result<(), AccessError>) {
        let Some(recorder) = &self.0 else { return };
        let &Attempt { stream, privileged, range, access } = attempt;
        // Longer ones are refused before.
        let length = u32::try_from(range.length_minus_one().saturating_add(1)).unwrap_or(u32::MAX);
        recorder.record(Event::Access(Accessed {
            stream,
            iova: range.start(),
            length,
            access: flags(access, privileged),
            outcome: outcome.into(),
        }));
    }

    fn waited(&self, stream: Stream, ticket: Ticket, answer: Option<Answer>) {
        let Some(recorder) = &self.0 else { return };
        let end = match answer {
            Some(Answer::Retry) => WaitEnd::Retry,
            Some(Answer::Failed) => WaitEnd::Failed,
            None => WaitEnd::TimedOut,
        };
        recorder.record(Event::Waited(Waited { stream, group: ticket.group(), end }));
    }
}

impl fmt::Debug for Recording {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Recording").field(&self.0.is_some()).finish()
    }
}
