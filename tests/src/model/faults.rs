//! Faults that the driver has not been told of.

use std::collections::BTreeSet;

/// Records in the order of accesses. Some may be lost (D-59), and two may be alike, so that one delivery has more than one
/// explanation: all of them are kept.
#[derive(Clone, Debug)]
pub(super) struct Faults {
    pending: Vec<Fault>,
    /// How many of `pending` are done with; each is possible.
    done: BTreeSet<usize>,
    /// Faults of endpoints that do not exist, which are never told of (D-56).
    nobodys: usize,
}

#[derive(Clone, Debug)]
struct Fault {
    record: [u8; 24],
    may_be_lost: bool,
}

impl Faults {
    pub(super) fn new() -> Self {
        Self { pending: Vec::new(), done: [0].into(), nobodys: 0 }
    }

    /// An access faulted, while at most `room` events are kept.
    pub(super) fn push(&mut self, record: [u8; 24], room: usize) {
        let waiting = self.pending.len() - self.done.first().copied().unwrap_or(0);
        self.pending.push(Fault { record, may_be_lost: waiting >= room });
    }

    /// An access of no endpoint faulted.
    pub(super) fn push_nobodys(&mut self) {
        self.nobodys += 1;
    }

    /// The device delivered this. `false`: that cannot be.
    pub(super) fn take(&mut self, record: &[u8]) -> bool {
        let mut done = BTreeSet::new();
        for &start in &self.done {
            for (at, fault) in self.pending.iter().enumerate().skip(start) {
                if fault.record == record {
                    done.insert(at + 1);
                }
                if !fault.may_be_lost {
                    break;
                }
            }
        }
        let first = done.first().copied().unwrap_or(0);
        self.pending.drain(..first);
        self.done = done.iter().map(|at| at - first).collect();
        !self.done.is_empty()
    }

    /// The device said that it has nothing to deliver. `false`: that cannot be.
    ///
    /// It looks at so many faults at a time as events may wait; where none of these is of an endpoint that exists, the
    /// next look comes later.
    pub(super) fn be_silent(&mut self, looks: usize) -> bool {
        if self.nobodys >= looks {
            self.nobodys -= looks;
            return true;
        }
        let is_over = |start: usize| self.pending.iter().skip(start).all(|fault| fault.may_be_lost);
        let is_right = self.done.iter().any(|&start| is_over(start));
        *self = Self::new();
        is_right
    }

    /// Whether there may be something to deliver although the device says that there is nothing.
    pub(super) fn may_hide(&self, looks: usize) -> bool {
        self.nobodys >= looks
    }

    /// Whether there may be something to deliver.
    pub(super) fn may_have_some(&self) -> bool {
        self.done.first().is_some_and(|&first| first < self.pending.len())
    }
}
