//! What is compared with the model: the device called directly, or behind its queues, over either machine.

mod direct;
mod machine;
mod queued;

use std::sync::Arc;

use pgtable_formats::{Access, AccessKind};
use viommu_device::host::{FaultCause, Host, Stream};
use viommu_device::soft::{AccessError, Answer, Piece, Ticket};
use viommu_device::{Device, PageRequestCounts};
use viommu_wire::{EndpointId, Features, Iova, Pasid};

use super::asking::{Ask, Key, Seen};
use super::words::{self, Kind};
use super::world::World;
use crate::rig::{Memory, Reply};

pub use direct::Direct;
use machine::Observed;
pub use machine::{Machine, Made, Native};
pub use queued::Queued;

/// A device under test, with its driver.
pub trait Subject {
    /// As after power-on, nothing negotiated.
    fn power_on(world: &Arc<World>) -> Self;

    /// The worlds that it is for.
    fn worlds() -> Vec<World>;

    /// Sends a request. `cut` says into how many parts each side of the chain is cut, where there is a chain.
    fn request(&mut self, readable: &[u8], writable: usize, cut: usize) -> Reply;

    /// Calls the device itself.
    fn with_device<R>(&mut self, call: impl FnOnce(&mut dyn Called) -> R) -> R;

    /// Guest memory.
    fn memory(&self) -> &Memory;

    /// Device or system reset, and then the driver accepts these of the features on offer.
    fn reset(&mut self, system: bool, accept: u64);

    /// The driver accepts exactly these, without a reset. `false`: refused.
    fn accept(&mut self, features: u64) -> bool;

    /// Offers an event buffer: what came back, or `None` if nothing did.
    fn take_event(&mut self, len: usize) -> Option<Vec<u8>>;
}

/// What can be seen of a device at no cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// The configuration space.
    pub config: [u8; 40],
    /// Negotiated.
    pub features: u64,
    /// How many there are.
    pub domains: usize,
    /// How many there are.
    pub mappings: usize,
    /// It asks for a reset.
    pub needs_reset: bool,
    /// Page requests in numbers.
    pub counts: PageRequestCounts,
    /// When it wants to be told the time.
    pub due: Option<u64>,
    /// Groups that the machine made up and has open.
    pub open: Vec<Key>,
}

/// A device and its machine, whatever it is made of.
pub trait Called {
    /// Everything at no cost.
    fn view(&self) -> View;
    /// Of the configuration space.
    fn read(&self, offset: usize, bytes: &mut [u8]);
    /// To it. `false`: refused.
    fn write(&mut self, offset: usize, bytes: &[u8]) -> bool;
    /// Tells it the time.
    fn set_time(&mut self, now: u64);
    /// Whether it has an event.
    fn has_event(&mut self) -> bool;
    /// The machine reads everything anew for each access.
    fn set_strict(&mut self, strict: bool);
    /// Empties the caches of the machine.
    fn flush(&mut self);
    /// An access of an endpoint, which may wait.
    fn wait(&mut self, stream: Stream, iova: Iova, access: Access) -> Result<Piece, AccessError>;
    /// One that cannot.
    fn translate(&mut self, stream: Stream, iova: Iova, access: Access) -> Result<Piece, FaultCause>;
    /// One that is not told of.
    fn peek(&mut self, stream: Stream, iova: Iova, access: Access) -> Result<Piece, FaultCause>;
    /// What became of an access.
    fn answer(&mut self, ticket: Ticket) -> Option<Answer>;
    /// What the device did with the machine since this was asked.
    fn seen(&mut self) -> Vec<Seen>;
    /// The machine makes up a page request.
    fn make_up(&mut self, ask: Ask);
    /// The machine answers a group by itself that it made up.
    fn forget(&mut self, key: Key);
    /// The machine fails to take its next answer.
    fn fail(&mut self);
}

impl<H: Machine> Called for Device<Observed<H>>
where
    Self: Sized,
{
    fn view(&self) -> View {
        let mut config = [0; 40];
        self.read_config(0, &mut config);
        View {
            config,
            features: self.features().bits(),
            domains: self.domain_count(),
            mappings: self.mapping_count(),
            needs_reset: self.needs_reset(),
            counts: self.page_request_counts(),
            due: self.page_requests_due(),
            open: self.host().open(),
        }
    }

    fn read(&self, offset: usize, bytes: &mut [u8]) {
        self.read_config(offset, bytes);
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) -> bool {
        self.write_config(offset, bytes).is_ok()
    }

    fn set_time(&mut self, now: u64) {
        Self::set_time(self, now);
    }

    fn has_event(&mut self) -> bool {
        self.event_pending()
    }

    fn set_strict(&mut self, strict: bool) {
        self.host_mut().inner.soft().set_strict(strict);
    }

    fn flush(&mut self) {
        self.host_mut().inner.soft().flush();
    }

    fn wait(&mut self, stream: Stream, iova: Iova, access: Access) -> Result<Piece, AccessError> {
        self.host_mut().inner.soft().access(stream, iova, access, |piece| piece)
    }

    fn translate(&mut self, stream: Stream, iova: Iova, access: Access) -> Result<Piece, FaultCause> {
        self.host_mut().inner.soft().translate(stream, iova, access, |piece| piece)
    }

    fn peek(&mut self, stream: Stream, iova: Iova, access: Access) -> Result<Piece, FaultCause> {
        self.host_mut().inner.soft().peek(stream, iova, access)
    }

    fn answer(&mut self, ticket: Ticket) -> Option<Answer> {
        self.host_mut().inner.soft().answer(ticket)
    }

    fn seen(&mut self) -> Vec<Seen> {
        std::mem::take(&mut self.host_mut().seen)
    }

    fn make_up(&mut self, ask: Ask) {
        self.host_mut().make_up(ask);
    }

    fn forget(&mut self, key: Key) {
        self.host_mut().forget(key);
    }

    fn fail(&mut self) {
        self.host_mut().fails = true;
    }
}

/// Device or system reset.
fn reset<H: Host>(device: &mut Device<H>, system: bool) {
    if system {
        device.system_reset();
    } else {
        device.reset();
    }
}

fn accept<H: Host>(device: &mut Device<H>, features: u64) -> bool {
    device.accept_features(Features::from_bits_retain(features)).is_ok()
}

/// As hosts name it.
pub(super) fn stream_of(id: u32, pasid: Option<u32>) -> Stream {
    Stream { endpoint: EndpointId(id), pasid: pasid.map(|pasid| Pasid::new(pasid).expect("20 bits")) }
}

/// As hosts name it.
pub(super) const fn access_of(access: words::Access) -> Access {
    let kind = match access.kind {
        Kind::Read => AccessKind::Read,
        Kind::Write => AccessKind::Write,
        Kind::Execute => AccessKind::Execute,
    };
    Access { kind, privileged: access.privileged }
}
