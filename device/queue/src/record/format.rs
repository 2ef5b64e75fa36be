//! The bytes of a trace, as the [module](super) lists them.

use pgtable_formats::Pasid;
use viommu_device::host::Stream;
use viommu_device::wire::{AccessFlags, Request};
use viommu_device::{EndpointId, Iova, Status};

use super::{Accessed, Event, Outcome};
use crate::translated::MAX_ACCESS;

/// The version of the format.
pub const VERSION: u16 = 1;

/// Bytes of a request that are recorded: the longest has so many.
pub const MAX_REQUEST: usize = Request::MAX_READABLE_LEN;

pub(super) const MAGIC: [u8; 8] = *b"VIOMMUTR";
pub(super) const HEADER: usize = 16;
pub(super) const HEAD: usize = 12;
/// The longest record.
pub(super) const MAX_RECORD: usize = HEAD + MAX_REQUEST;

const _: () = assert!(MAX_REQUEST <= u8::MAX as usize && MAX_ACCESS <= u32::MAX as usize);

const REQUEST: u8 = 1;
const ACCESS: u8 = 2;
const KICK: u8 = 3;
const RESET: u8 = 4;
const LOST: u8 = 254;
const END: u8 = 255;

const UNWRITTEN: u8 = 0xff;
const UNTAGGED: u32 = u32::MAX;
const NOTIFIED: u8 = 1;

/// What the times of a trace are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// The number of the record.
    Records,
    /// Nanoseconds of a clock of the VMM's, from some moment on.
    Nanoseconds,
}

/// The first bytes of a trace.
pub(super) fn header(clock: Clock) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    let clock = match clock {
        Clock::Records => 0,
        Clock::Nanoseconds => 1,
    };
    put(&mut bytes, 0, &MAGIC);
    put(&mut bytes, 8, &VERSION.to_le_bytes());
    put(&mut bytes, 10, &[clock]);
    bytes
}

/// What a header says, or its version where that is another one.
pub(super) fn parse_header(bytes: &[u8; HEADER]) -> Result<Clock, BadHeader> {
    let [m0, m1, m2, m3, m4, m5, m6, m7, v0, v1, clock, rest @ ..] = *bytes;
    if [m0, m1, m2, m3, m4, m5, m6, m7] != MAGIC {
        return Err(BadHeader::NoTrace);
    }
    match (u16::from_le_bytes([v0, v1]), clock, rest) {
        (VERSION, 0, [0, 0, 0, 0, 0]) => Ok(Clock::Records),
        (VERSION, 1, [0, 0, 0, 0, 0]) => Ok(Clock::Nanoseconds),
        (VERSION, ..) => Err(BadHeader::NoTrace),
        (version, ..) => Err(BadHeader::Version(version)),
    }
}

pub(super) enum BadHeader {
    NoTrace,
    Version(u16),
}

/// A record: what is in a trace beside its header.
pub(super) enum Record<'a> {
    Event(Event<'a>),
    /// So many events were left out.
    Lost(u64),
    /// So many records were in front.
    End(u64),
}

impl Record<'_> {
    /// Appends its bytes.
    pub(super) fn encode(&self, time: u64, to: &mut Vec<u8>) {
        match *self {
            Record::Event(Event::Request { readable, status }) => {
                let body = readable.get(..MAX_REQUEST).unwrap_or(readable);
                append(to, REQUEST, status.map_or(UNWRITTEN, Status::number), 0, time, body);
            }
            Record::Event(Event::Access(Accessed { stream, iova, length, access, outcome })) => {
                let mut body = [0; 20];
                put(&mut body, 0, &stream.endpoint.0.to_le_bytes());
                put(&mut body, 4, &stream.pasid.map_or(UNTAGGED, Pasid::value).to_le_bytes());
                put(&mut body, 8, &iova.0.to_le_bytes());
                put(&mut body, 16, &length.to_le_bytes());
                let [flags, ..] = access.bits().to_le_bytes();
                append(to, ACCESS, outcome as u8, flags, time, &body);
            }
            Record::Event(Event::Kick { served, notify }) => {
                append(to, KICK, 0, if notify { NOTIFIED } else { 0 }, time, &served.to_le_bytes());
            }
            Record::Event(Event::Reset) => append(to, RESET, 0, 0, time, &[]),
            Record::Lost(events) => append(to, LOST, 0, 0, time, &events.to_le_bytes()),
            Record::End(records) => append(to, END, 0, 0, time, &records.to_le_bytes()),
        }
    }
}

/// A record's head.
#[derive(Clone, Copy)]
pub(super) struct Head {
    kind: u8,
    pub(super) length: u8,
    result: u8,
    flags: u8,
    pub(super) time: u64,
}

impl Head {
    pub(super) fn parse(bytes: [u8; HEAD]) -> Self {
        let [kind, length, result, flags, time @ ..] = bytes;
        Self { kind, length, result, flags, time: u64::from_le_bytes(time) }
    }

    /// The record with this body; `None` where there is no such record.
    pub(super) fn record<'a>(&self, body: &'a [u8]) -> Option<Record<'a>> {
        let &Self { kind, result, flags, .. } = self;
        let plain = result == 0 && flags == 0;
        match kind {
            REQUEST if flags == 0 && body.len() <= MAX_REQUEST => {
                let status = match result {
                    UNWRITTEN => None,
                    number => Some(Status::from_number(number)?),
                };
                Some(Record::Event(Event::Request { readable: body, status }))
            }
            ACCESS => access(result, flags, body).map(|access| Record::Event(Event::Access(access))),
            KICK if result == 0 && flags & !NOTIFIED == 0 => {
                let served = u32::from_le_bytes(body.try_into().ok()?);
                Some(Record::Event(Event::Kick { served, notify: flags == NOTIFIED }))
            }
            RESET if plain && body.is_empty() => Some(Record::Event(Event::Reset)),
            LOST if plain => Some(Record::Lost(u64::from_le_bytes(body.try_into().ok()?))),
            END if plain => Some(Record::End(u64::from_le_bytes(body.try_into().ok()?))),
            _ => None,
        }
    }
}

fn access(result: u8, flags: u8, body: &[u8]) -> Option<Accessed> {
    let body: [u8; 20] = body.try_into().ok()?;
    let word = |at: usize| body.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
    let pasid = match word(4)? {
        UNTAGGED => None,
        value => Some(Pasid::new(value)?),
    };
    let iova = u64::from(word(8)?) | u64::from(word(12)?) << 32;
    let length = word(16)?;
    let fits = length != 0 && length as usize <= MAX_ACCESS && iova.checked_add(length.into()).is_some();
    fits.then_some(())?;
    Some(Accessed {
        stream: Stream { endpoint: EndpointId(word(0)?), pasid },
        iova: Iova(iova),
        length,
        access: AccessFlags::from_bits(flags.into())?,
        outcome: *Outcome::ALL.get(usize::from(result))?,
    })
}

fn append(to: &mut Vec<u8>, kind: u8, result: u8, flags: u8, time: u64, body: &[u8]) {
    let length = u8::try_from(body.len()).unwrap_or(u8::MAX);
    to.extend_from_slice(&[kind, length, result, flags]);
    to.extend_from_slice(&time.to_le_bytes());
    to.extend_from_slice(body);
}

/// Writes `bytes` at a place that is known to be there.
fn put(to: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = to.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}
