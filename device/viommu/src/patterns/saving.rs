//! What the driver sent, and what it would have sent had it handed its tables over.
//!
//! The three ways are compared over the requests about domains that translate by MAP requests: ATTACH, MAP, UNMAP,
//! DETACH. Only requests that the trace holds are counted, and only what follows from them:
//! - an ATTACH to a domain that translates by MAP requests becomes an ATTACH_TABLE;
//! - a MAP is not sent: the guest writes its own table;
//! - an UNMAP that removed something becomes an INVALIDATE, so that nothing reaches the memory once it is given back;
//! - an UNMAP that removed nothing is not sent;
//! - a DETACH is sent as it was, and so is whatever was rejected.
//!
//! If what is mapped may stay mapped, as the memory of a process that the device works for, the INVALIDATEs are not
//! sent either. That is another promise: the device reaches the memory all the while.

use std::collections::BTreeMap;

use serde::Serialize;
use viommu_wire::{Request, RequestType};

use super::world::{Concern, Kind};

/// Requests, and what they cost.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Sent {
    pub(super) requests: u64,
    /// Bytes that the device read of them.
    pub(super) bytes: u64,
    /// Notifications that brought at least one of them; each is an exit to the hypervisor.
    pub(super) kicks: u64,
    pub(super) kinds: BTreeMap<&'static str, u64>,
}

/// The three ways.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Saving {
    /// Every request.
    pub(super) all: Sent,
    /// Those about domains that translate by MAP requests.
    pub(super) sent: Sent,
    /// The same with the guest's own table.
    pub(super) handover: Sent,
    /// The same with the guest's own table, in which everything stays.
    pub(super) bound: Sent,
    #[serde(skip)]
    pending: [bool; 4],
}

/// What a request is where the guest has its own table.
struct Fate {
    handover: Option<RequestType>,
    bound: Option<RequestType>,
}

impl Saving {
    /// The device answered this. `length`: bytes of it.
    pub(super) fn request(
        &mut self,
        request: Option<&Request>,
        done: bool,
        concern: &Concern,
        length: usize,
    ) {
        let name = request.map_or("unknown", |request| request.kind().name());
        let [in_all, in_sent, in_handover, in_bound] = &mut self.pending;
        self.all.add(name, length);
        *in_all = true;
        let Some(request) = request.filter(|_| concern.kind == Some(Kind::Mapped)) else { return };
        self.sent.add(name, length);
        *in_sent = true;
        let Fate { handover, bound } = fate(request, done, concern.removed);
        if let Some(kind) = handover {
            self.handover.add(kind.name(), kind.readable_len());
            *in_handover = true;
        }
        if let Some(kind) = bound {
            self.bound.add(kind.name(), kind.readable_len());
            *in_bound = true;
        }
    }

    /// What was sent since the last kick came with this one.
    pub(super) fn kick(&mut self) {
        let ways = [&mut self.all, &mut self.sent, &mut self.handover, &mut self.bound];
        for (way, pending) in ways.into_iter().zip(std::mem::take(&mut self.pending)) {
            way.kicks += u64::from(pending);
        }
    }

    /// Whether there is anything that handover changes.
    pub(super) fn applies(&self) -> bool {
        self.sent.requests > 0
    }
}

impl Sent {
    fn add(&mut self, kind: &'static str, length: usize) {
        self.requests += 1;
        self.bytes += length as u64;
        *self.kinds.entry(kind).or_insert(0) += 1;
    }

    /// How many of one kind.
    pub(super) fn of(&self, kind: RequestType) -> u64 {
        self.kinds.get(kind.name()).copied().unwrap_or(0)
    }
}

fn fate(request: &Request, done: bool, removed: u64) -> Fate {
    let both = |kind| Fate { handover: kind, bound: kind };
    match request {
        _ if !done => both(Some(request.kind())),
        Request::Attach(_) => both(Some(RequestType::AttachTable)),
        Request::Map(_) => both(None),
        Request::Unmap(_) if removed > 0 => Fate { handover: Some(RequestType::Invalidate), bound: None },
        Request::Unmap(_) => both(None),
        _ => both(Some(request.kind())),
    }
}
