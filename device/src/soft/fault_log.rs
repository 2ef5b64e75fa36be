//! Failed accesses that the device has not heard of yet.

use alloc::collections::VecDeque;

use pgtable_formats::{Access, Iova};

use crate::host::{FaultCause, FaultReport, Stream};

/// How many failed accesses wait; further ones are counted and lost, as in the event queue of hardware.
pub const MAX_PENDING_FAULTS: usize = 1024;

#[derive(Debug)]
pub(super) struct FaultLog {
    pending: VecDeque<FaultReport>,
    dropped: u64,
}

impl FaultLog {
    pub(super) const fn new() -> Self {
        Self { pending: VecDeque::new(), dropped: 0 }
    }

    #[cold]
    pub(super) fn push(&mut self, stream: Stream, iova: Iova, access: Access, cause: FaultCause) {
        if self.pending.len() >= MAX_PENDING_FAULTS {
            self.dropped = self.dropped.saturating_add(1);
            return;
        }
        self.pending.push_back(FaultReport {
            stream,
            address: Some(iova),
            kind: access.kind,
            privileged: access.privileged,
            cause,
        });
    }

    pub(super) fn pop(&mut self) -> Option<FaultReport> {
        self.pending.pop_front()
    }

    pub(super) const fn dropped(&self) -> u64 {
        self.dropped
    }
}
