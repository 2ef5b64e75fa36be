//! Faults that the driver has not been told of.

use std::collections::BTreeSet;

/// Records in the order of accesses. Some may be lost (D-59), and two may be alike, so that one delivery has more than one
/// explanation: all of them are kept.
#[derive(Clone, Debug)]
pub(super) struct Faults {
    pending: Vec<Fault>,
    /// Page requests that became faults, which come before or after others.
    aside: Vec<Fault>,
    /// What was told; each is possible.
    told: BTreeSet<Told>,
    /// Faults of endpoints that do not exist, which are never told of (D-56).
    nobodys: usize,
}

/// How many of `pending` are done with, and which of those aside.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Told {
    pending: usize,
    aside: BTreeSet<usize>,
}

#[derive(Clone, Debug)]
struct Fault {
    /// But for the reason.
    record: [u8; 24],
    /// Each is possible.
    reasons: Vec<u8>,
    may_be_lost: bool,
    /// The reason is found out later.
    is_late: bool,
}

impl Faults {
    pub(super) fn new() -> Self {
        Self { pending: Vec::new(), aside: Vec::new(), told: [Told::default()].into(), nobodys: 0 }
    }

    /// An access faulted, while at most `room` events are kept.
    pub(super) fn push(
        &mut self,
        record: [u8; 24],
        reasons: Vec<u8>,
        room: usize,
        is_quiet: bool,
        is_late: bool,
    ) {
        let may_be_lost = is_quiet || self.waiting() >= room;
        self.pending.push(Fault { record, reasons, may_be_lost, is_late });
    }

    /// A page request became a fault.
    pub(super) fn push_aside(&mut self, record: [u8; 24], reasons: Vec<u8>, room: usize, is_quiet: bool) {
        let is_full = self.waiting() >= room;
        self.aside.push(Fault { record, reasons, may_be_lost: is_quiet || is_full, is_late: false });
        // It may take the place of one that the device did not look at yet.
        if is_full {
            self.aside.iter_mut().chain(&mut self.pending).for_each(|fault| fault.may_be_lost = true);
        }
    }

    /// What there is changes. Where the device makes one kind of table of the other, why an access did not get to a page
    /// table is only found out when the fault is looked at.
    pub(super) fn loosen(&mut self) {
        for fault in self.pending.iter_mut().filter(|fault| fault.is_late) {
            fault.reasons = vec![0, 1, 2];
        }
    }

    /// An access of no endpoint faulted.
    pub(super) fn push_nobodys(&mut self) {
        self.nobodys += 1;
    }

    /// The device delivered this. `false`: that cannot be.
    pub(super) fn take(&mut self, record: &[u8]) -> bool {
        let mut told = BTreeSet::new();
        for before in &self.told {
            for (at, fault) in self.pending.iter().enumerate().skip(before.pending) {
                if fault.is(record) {
                    told.insert(Told { pending: at + 1, ..before.clone() });
                }
                if !fault.may_be_lost {
                    break;
                }
            }
            // Of several that are alike, one.
            let is_left = |at: &usize| !before.aside.contains(at) && self.aside[*at].is(record);
            for may_be_lost in [false, true] {
                let found = (0..self.aside.len())
                    .find(|at| is_left(at) && self.aside[*at].may_be_lost == may_be_lost);
                if let Some(at) = found {
                    let mut after = before.clone();
                    after.aside.insert(at);
                    told.insert(after);
                }
            }
        }
        self.told = told;
        !self.told.is_empty()
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
        let is_right = self.told.iter().any(|told| !self.left(told).any(|fault| !fault.may_be_lost));
        *self = Self::new();
        is_right
    }

    /// Whether there may be something to deliver although the device says that there is nothing.
    pub(super) fn may_hide(&self, looks: usize) -> bool {
        self.nobodys >= looks
    }

    /// Whether there is something to deliver.
    pub(super) fn must_have_some(&self) -> bool {
        let must = |told: &Told| self.left(told).any(|fault| !fault.may_be_lost);
        self.nobodys == 0 && self.told.iter().all(must)
    }

    /// Whether there may be something to deliver.
    pub(super) fn may_have_some(&self) -> bool {
        self.waiting() > 0
    }

    /// How many there are at most.
    fn waiting(&self) -> usize {
        self.told.iter().map(|told| self.left(told).count()).max().unwrap_or(0)
    }

    /// What was not told.
    fn left<'a>(&'a self, told: &'a Told) -> impl Iterator<Item = &'a Fault> {
        let aside = self.aside.iter().enumerate().filter(|(at, _)| !told.aside.contains(at));
        self.pending.iter().skip(told.pending).chain(aside.map(|(_, fault)| fault))
    }
}

impl Fault {
    fn is(&self, record: &[u8]) -> bool {
        let (Some(reason), Some(rest)) = (record.first(), record.get(1..)) else { return false };
        self.reasons.contains(reason) && self.record[1..] == *rest
    }
}
