//! What an endpoint did for each address space while others waited: the second time through a trace.

use pgtable_formats::Pasid;
use viommu_queue::record::{Accessed, Outcome};
use viommu_wire::Request;

use super::WaitFacts;

/// One address space.
pub(in super::super) struct Lane {
    pub(in super::super) pasid: Option<Pasid>,
    /// Columns in which an access got through, and in which one was refused.
    pub(in super::super) passed: Vec<bool>,
    pub(in super::super) refused: Vec<bool>,
}

/// All of an endpoint that has accesses that wait.
pub(in super::super) struct Lanes {
    pub(in super::super) lanes: Vec<Lane>,
    /// PAGE_RESP and INVALIDATE requests, column by column.
    pub(in super::super) answers: Vec<u32>,
    pub(in super::super) invalidates: Vec<u32>,
    /// Tables bound and unbound.
    pub(in super::super) binds: Vec<u32>,
}

impl Lanes {
    pub(in super::super) fn new(facts: &WaitFacts, columns: usize) -> Self {
        let lane = |pasid| Lane { pasid, passed: vec![false; columns], refused: vec![false; columns] };
        Self {
            lanes: facts.spaces().into_iter().map(lane).collect(),
            answers: vec![0; columns],
            invalidates: vec![0; columns],
            binds: vec![0; columns],
        }
    }

    /// An access, in its column.
    pub(in super::super) fn access(&mut self, access: &Accessed, column: usize) {
        let Some(lane) = self.lanes.iter_mut().find(|lane| lane.pasid == access.stream.pasid) else { return };
        let marks = match access.outcome {
            Outcome::Passed => &mut lane.passed,
            Outcome::Waits { .. } => return,
            _ => &mut lane.refused,
        };
        if let Some(mark) = marks.get_mut(column) {
            *mark = true;
        }
    }

    /// A request that the device did, in its column.
    pub(in super::super) fn request(&mut self, request: &Request, column: usize) {
        let counts = match request {
            Request::PageResponse(_) => &mut self.answers,
            Request::Invalidate(_) => &mut self.invalidates,
            Request::AttachTable(_) => &mut self.binds,
            _ => return,
        };
        if let Some(count) = counts.get_mut(column) {
            *count = count.saturating_add(1);
        }
    }
}
