//! Requests as the specification has them: checked, sent one by one or many at once.

use viommu_wire::{
    Attach, AttachFlags, AttachTable, Config, Detach, DomainId, EndpointId, Features, Gpa, Invalidate, Iova,
    IovaRange, Map, MapFlags, PageResponse, Request, Status, TableDescriptor, Unmap,
};

use crate::Driver;
use crate::hal::{Platform, Transport, TransportError};
use crate::probe::Endpoint;
use crate::queue::QueueError;

/// Why a request did not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The device would not know the request or its flag: not sent.
    #[error("needs a feature that was not negotiated: {0:?}")]
    NotNegotiated(Features),
    /// The request breaks a rule that the driver must keep: not sent.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The device refuses the request.
    #[error("the device answers {0}")]
    Status(Status),
    /// The device returned the request unwritten: it does not know it, or could not read it.
    #[error("the device did not answer the request")]
    Unwritten,
    /// The device wrote less than an answer, or an answer without meaning.
    #[error("the device's answer has no meaning")]
    BadAnswer,
    /// The queue is broken or full. Whether the device acted on the request is unknown.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The device does not answer. Whether it acted on the request is unknown.
    #[error(transparent)]
    Transport(#[from] TransportError),
}

impl RequestError {
    /// Whether the device may have acted on the request although it counts as failed.
    pub const fn is_outcome_unknown(&self) -> bool {
        matches!(self, Self::Queue(_) | Self::Transport(_) | Self::BadAnswer)
    }
}

/// Rules of the specification that a driver must keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The domain lies outside of `domain_range`.
    #[error("domain {0} lies outside of the device's range")]
    Domain(DomainId),
    /// Addresses lie outside of `input_range`.
    #[error("{0} lies outside of the device's range")]
    Range(IovaRange),
    /// The last address is not greater than the first.
    #[error("the last address {last} is not greater than the first, {first}")]
    Inverted {
        /// First address.
        first: Iova,
        /// Last address.
        last: Iova,
    },
    /// An address is not a multiple of the granule, or the last one does not end a granule.
    #[error("not aligned to {granule_lg2} bits")]
    Misaligned {
        /// log2 of the granule.
        granule_lg2: u32,
    },
    /// Guest-physical addresses leave the 64-bit space.
    #[error("physical addresses from {0} on leave the 64-bit space")]
    Physical(Gpa),
    /// Undefined flags are set.
    #[error("undefined flags {0:#x}")]
    Flags(u32),
    /// An INVALIDATE names no cache.
    #[error("no cache is named")]
    NoCache,
    /// PROBE is answered by properties: see [`Driver::probe`].
    #[error("PROBE cannot be sent as a plain request")]
    Probe,
}

/// Requests as the specification has them, checked against what was negotiated. [`MappedDomain`](crate::MappedDomain)
/// and the types in [`tables`](crate::tables) keep the rules that take memory, too.
impl<P: Platform, T: Transport> Driver<P, T> {
    /// Sends one request and waits for its answer.
    ///
    /// # Errors
    /// As [`RequestError`] says.
    pub fn send(&mut self, request: Request) -> Result<(), RequestError> {
        let mut outcome = Err(RequestError::Unwritten);
        self.send_all([request], |_, answer| outcome = answer);
        outcome
    }

    /// Sends many requests with as few notifications as possible: one for each time that the queue is full, and one at
    /// the end. `answer` is called once for each request, with its index and how it ended, in the order in which the
    /// device answers; the device may well execute them in another order, so no request may depend on another.
    pub fn send_all(
        &mut self,
        requests: impl IntoIterator<Item = Request>,
        answer: impl FnMut(usize, Result<(), RequestError>),
    ) {
        let (features, config) = (self.features, self.config);
        let requests =
            requests.into_iter().map(|request| check(&request, features, &config).map(|()| request));
        self.requests.send_all(self.platform.memory(), &mut self.transport, requests, answer);
    }

    /// ATTACH: the first one creates the domain; `flags` have to be the same for all of a domain.
    ///
    /// # Errors
    /// As [`RequestError`] says.
    pub fn attach(
        &mut self,
        domain: DomainId,
        endpoint: &Endpoint,
        flags: AttachFlags,
    ) -> Result<(), RequestError> {
        self.send(Request::Attach(Attach { domain, endpoint: endpoint.id(), flags }))
    }

    /// DETACH.
    ///
    /// # Errors
    /// As [`RequestError`] says.
    pub fn detach(&mut self, domain: DomainId, endpoint: EndpointId) -> Result<(), RequestError> {
        self.send(Request::Detach(Detach { domain, endpoint }))
    }

    /// MAP, without a check of what else is mapped or reserved.
    ///
    /// # Errors
    /// As [`RequestError`] says.
    pub fn map(
        &mut self,
        domain: DomainId,
        range: IovaRange,
        phys_start: Gpa,
        flags: MapFlags,
    ) -> Result<(), RequestError> {
        let (virt_start, virt_end) = (range.start(), range.last());
        self.send(Request::Map(Map { domain, virt_start, virt_end, phys_start, flags }))
    }

    /// UNMAP. The caller sees to it that the ends of `range` split no mapping.
    ///
    /// # Errors
    /// As [`RequestError`] says.
    pub fn unmap(&mut self, domain: DomainId, range: IovaRange) -> Result<(), RequestError> {
        self.send(Request::Unmap(Unmap { domain, virt_start: range.start(), virt_end: range.last() }))
    }

    /// ATTACH_TABLE.
    ///
    /// # Errors
    /// As [`RequestError`] says.
    pub fn attach_table(
        &mut self,
        domain: DomainId,
        endpoint: &Endpoint,
        table: TableDescriptor,
    ) -> Result<(), RequestError> {
        self.send(Request::AttachTable(AttachTable { domain, endpoint: endpoint.id(), table }))
    }

    /// INVALIDATE. When it returns, no access uses what was dropped any more.
    ///
    /// # Errors
    /// As [`RequestError`] says.
    pub fn invalidate(&mut self, invalidate: Invalidate) -> Result<(), RequestError> {
        self.send(Request::Invalidate(invalidate))
    }

    /// PAGE_RESP: answers all page requests of a group. A device that has nothing left to answer says
    /// [`Status::NoEnt`], which is harmless: it has answered by itself.
    ///
    /// # Errors
    /// As [`RequestError`] says.
    pub fn respond(&mut self, response: PageResponse) -> Result<(), RequestError> {
        self.send(Request::PageResponse(response))
    }
}

/// What a driver must not send.
fn check(request: &Request, features: Features, config: &Config) -> Result<(), RequestError> {
    let domain = match request {
        Request::Attach(attach) => {
            let unknown = attach.flags.bits() & !AttachFlags::all().bits();
            if unknown != 0 {
                return Err(Refusal::Flags(unknown).into());
            }
            if attach.flags.contains(AttachFlags::BYPASS) {
                need(features, Features::BYPASS_CONFIG)?;
            }
            attach.domain
        }
        Request::Detach(detach) => detach.domain,
        Request::Map(map) => {
            need(features, Features::MAP_UNMAP)?;
            let unknown = map.flags.bits() & !MapFlags::all().bits();
            if unknown != 0 {
                return Err(Refusal::Flags(unknown).into());
            }
            if map.flags.contains(MapFlags::MMIO) {
                need(features, Features::MMIO)?;
            }
            let range = check_range(map.virt_start, map.virt_end, config)?;
            check_alignment(map.phys_start.0, config)?;
            map.phys_start.checked_add(range.length_minus_one()).ok_or(Refusal::Physical(map.phys_start))?;
            map.domain
        }
        Request::Unmap(unmap) => {
            need(features, Features::MAP_UNMAP)?;
            check_range(unmap.virt_start, unmap.virt_end, config)?;
            unmap.domain
        }
        Request::Probe(_) => return Err(Refusal::Probe.into()),
        Request::AttachTable(attach) => {
            need(features, Features::ATTACH_TABLE)?;
            attach.domain
        }
        Request::Invalidate(invalidate) => {
            need(features, Features::ATTACH_TABLE)?;
            if invalidate.caches.is_empty() {
                return Err(Refusal::NoCache.into());
            }
            invalidate.domain
        }
        Request::PageResponse(_) => return need(features, Features::PAGE_REQUEST),
    };
    if config.domain_range.contains(domain) { Ok(()) } else { Err(Refusal::Domain(domain).into()) }
}

fn need(features: Features, feature: Features) -> Result<(), RequestError> {
    if features.contains(feature) { Ok(()) } else { Err(RequestError::NotNegotiated(feature)) }
}

fn check_range(first: Iova, last: Iova, config: &Config) -> Result<IovaRange, Refusal> {
    let range =
        IovaRange::new(first, last).filter(|_| first != last).ok_or(Refusal::Inverted { first, last })?;
    check_alignment(first.0, config)?;
    check_alignment(last.0.wrapping_add(1), config)?;
    if config.input_range.covers(range) { Ok(range) } else { Err(Refusal::Range(range)) }
}

fn check_alignment(address: u64, config: &Config) -> Result<(), Refusal> {
    let granule_lg2 = config.page_size_mask.trailing_zeros();
    if address.trailing_zeros() >= granule_lg2 { Ok(()) } else { Err(Refusal::Misaligned { granule_lg2 }) }
}
