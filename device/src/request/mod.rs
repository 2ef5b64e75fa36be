//! One request: bytes in, bytes out.

mod attach;
mod invalidate;
mod map;
pub(crate) mod probe;
mod table;

use viommu_wire::{Features, Request, RequestType, Status, Tail};

use crate::device::Device;
use crate::error::Rejection;
use crate::host::Host;

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handled {
    /// How many bytes of the device-writable part are the answer: the used length. 0: nothing was written.
    pub used: usize,
    /// Why the status is not OK, or there is none; for a log.
    pub rejection: Option<Rejection>,
}

impl<H: Host> Device<H> {
    /// Does one request. When this returns, its effect is in force and the descriptors can go back to the driver.
    ///
    /// `readable` is the whole device-readable part, gathered: bytes beyond what the type needs are ignored, so
    /// [`Request::MAX_READABLE_LEN`] are enough. `writable` is the whole device-writable part; the answer, of the
    /// length that [`Handled::used`] says, is at its start, and what follows is left as it was.
    ///
    /// A type that is not known or not negotiated, and parts that cannot hold a head or a tail, leave all of
    /// `writable` as it was, with a used length of 0 (D-10, D-11, D-45).
    pub fn handle(&mut self, readable: &[u8], writable: &mut [u8]) -> Handled {
        let kind = match self.recognise(readable, writable.len()) {
            Ok(kind) => kind,
            Err(rejection) => return Handled { used: 0, rejection: Some(rejection) },
        };
        let (result, tail_at) = match kind {
            RequestType::Probe => self.probe(readable, writable),
            _ => (self.perform(readable), 0),
        };
        let (status, rejection) = match result {
            Ok(()) => (Status::Ok, None), // D-9
            Err(rejection) => (rejection.status().unwrap_or(Status::DevErr), Some(rejection)),
        };
        // D-13; it fits: `recognise` has seen to it.
        match writable.get_mut(tail_at..).and_then(|rest| rest.first_chunk_mut()) {
            Some(tail) => *tail = Tail { status }.encode(),
            None => return Handled { used: 0, rejection },
        }
        Handled { used: tail_at + Tail::LEN, rejection }
    }

    /// Whether there is a request that gets an answer at all.
    #[inline]
    fn recognise(&self, readable: &[u8], writable: usize) -> Result<RequestType, Rejection> {
        let kind = Request::peek(readable)?; // D-10, D-11, D-12
        let available = match kind {
            RequestType::Attach | RequestType::Detach | RequestType::Map | RequestType::Unmap => true,
            RequestType::Probe => self.config.features.contains(Features::PROBE), // D-45
            RequestType::AttachTable | RequestType::Invalidate => {
                self.features.contains(Features::ATTACH_TABLE)
            }
            RequestType::PageResponse => self.features.contains(Features::PAGE_REQUEST),
        };
        if !available {
            return Err(Rejection::NotAvailable(kind));
        }
        if writable < Tail::LEN {
            return Err(Rejection::NoTail { length: writable }); // D-11
        }
        Ok(kind)
    }

    #[inline]
    fn perform(&mut self, readable: &[u8]) -> Result<(), Rejection> {
        match Request::decode(readable)? {
            Request::Map(map) => self.map(&map),
            Request::Unmap(unmap) => self.unmap(&unmap),
            Request::Attach(attach) => self.attach(&attach),
            Request::Detach(detach) => self.detach(&detach),
            Request::AttachTable(attach) => self.attach_table(&attach),
            Request::Invalidate(invalidate) => self.invalidate(&invalidate),
            Request::PageResponse(response) => self.answer_group(&response),
            Request::Probe(_) => Err(Rejection::NotAvailable(RequestType::Probe)),
        }
    }
}
