//! Page requests of endpoints whose descriptors are the device's own: the machine does not know when one is taken away.

use alloc::collections::{BTreeSet, VecDeque};
use alloc::vec::Vec;

use pgtable_formats::Pasid;
use viommu_wire::{EndpointId, PageResponseCode};

use crate::host::{GroupResponse, Host, HostError, PageRequestReport, Stream};

/// Those that were taken from the machine.
#[derive(Debug, Default)]
pub(super) struct Requests {
    /// Not handed out yet. Bounded by what the machine keeps.
    waiting: VecDeque<PageRequestReport>,
    /// Handed out and not answered, where the machine cannot tell when they are over. Bounded by who asks for them.
    open: BTreeSet<(EndpointId, Option<Pasid>, u16)>,
}

impl Requests {
    /// The oldest. `is_made` says whose descriptors are the device's own.
    pub(super) fn next<H: Host>(
        &mut self,
        host: &mut H,
        is_made: impl Fn(EndpointId) -> bool,
    ) -> Option<PageRequestReport> {
        let request = self.waiting.pop_front().or_else(|| host.next_page_request())?;
        let Stream { endpoint, pasid } = request.stream;
        if is_made(endpoint) {
            self.open.insert((endpoint, pasid, request.group));
        }
        Some(request)
    }

    pub(super) fn respond<H: Host>(
        &mut self,
        host: &mut H,
        response: &GroupResponse,
    ) -> Result<(), HostError> {
        host.respond(response)?;
        let Stream { endpoint, pasid } = response.stream;
        self.open.remove(&(endpoint, pasid, response.group));
        self.waiting.retain(|other| other.stream != response.stream || other.group != response.group);
        Ok(())
    }

    /// A descriptor of the device's own was taken away: all that its stream asked for is answered INVALID.
    pub(super) fn close<H: Host>(&mut self, host: &mut H, stream: Stream) {
        while let Some(request) = host.next_page_request() {
            self.waiting.push_back(request);
        }
        self.settle(host, |other| other == stream);
    }

    /// The machine was told that `stream` is bound to something else, and has answered what it asked for.
    pub(super) fn moved<H: Host>(&mut self, host: &mut H, stream: Stream) {
        if !self.waiting.is_empty() || !self.open.is_empty() {
            let is_all = stream.pasid.is_none();
            self.settle(host, |other| other.endpoint == stream.endpoint && (is_all || other == stream));
        }
    }

    fn settle<H: Host>(&mut self, host: &mut H, is_over: impl Fn(Stream) -> bool) {
        let waiting = self.waiting.iter().map(|one| (one.stream.endpoint, one.stream.pasid, one.group));
        let of =
            |&(endpoint, pasid, _): &(EndpointId, Option<Pasid>, u16)| is_over(Stream { endpoint, pasid });
        let mut groups: Vec<_> = waiting.chain(self.open.iter().copied()).filter(of).collect();
        groups.sort_unstable();
        groups.dedup();
        for (endpoint, pasid, group) in groups {
            let stream = Stream { endpoint, pasid };
            // One that is gone needs no answer.
            let _ = host.respond(&GroupResponse { stream, group, code: PageResponseCode::Invalid });
        }
        self.open.retain(|group| !of(group));
        self.waiting.retain(|one| !is_over(one.stream));
    }
}
