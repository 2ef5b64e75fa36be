//! The bytes of a trace, as the [module](super) lists them.

use pgtable_formats::Pasid;
use viommu_device::host::Stream;
use viommu_device::wire::{AccessFlags, Request};
use viommu_device::{EndpointId, Iova, Status};

use super::{Accessed, Event, Outcome, PageAsked, WaitEnd, Waited};
use crate::translated::MAX_ACCESS;

/// The version of the format.
pub const VERSION: u16 = 2;

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
const PAGE_REQUEST: u8 = 5;
const WAITED: u8 = 6;
const LOST: u8 = 254;
const END: u8 = 255;

const UNWRITTEN: u8 = 0xff;
const UNTAGGED: u32 = u32::MAX;
const NOTIFIED: u8 = 1;
/// As in the flags of events.
const LAST: u8 = 1 << 4;

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
                let mut body = [0; 22];
                put_stream(&mut body, stream);
                put(&mut body, 8, &iova.0.to_le_bytes());
                put(&mut body, 16, &length.to_le_bytes());
                let [flags, ..] = access.bits().to_le_bytes();
                let length = match outcome {
                    Outcome::Waits { group } => {
                        put(&mut body, 20, &group.to_le_bytes());
                        body.len()
                    }
                    _ => 20,
                };
                append(to, ACCESS, outcome.number(), flags, time, body.get(..length).unwrap_or(&body));
            }
            Record::Event(Event::PageRequest(PageAsked { stream, address, access, group, last })) => {
                let mut body = [0; 18];
                put_stream(&mut body, stream);
                put(&mut body, 8, &address.0.to_le_bytes());
                put(&mut body, 16, &group.to_le_bytes());
                let [flags, ..] = access.bits().to_le_bytes();
                append(to, PAGE_REQUEST, 0, flags | if last { LAST } else { 0 }, time, &body);
            }
            Record::Event(Event::Waited(Waited { stream, group, end })) => {
                let mut body = [0; 10];
                put_stream(&mut body, stream);
                put(&mut body, 8, &group.to_le_bytes());
                append(to, WAITED, end as u8, 0, time, &body);
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
            PAGE_REQUEST if result == 0 => {
                page_request(flags, body).map(|asked| Record::Event(Event::PageRequest(asked)))
            }
            WAITED if flags == 0 => waited(result, body).map(|waited| Record::Event(Event::Waited(waited))),
            RESET if plain && body.is_empty() => Some(Record::Event(Event::Reset)),
            LOST if plain => Some(Record::Lost(u64::from_le_bytes(body.try_into().ok()?))),
            END if plain => Some(Record::End(u64::from_le_bytes(body.try_into().ok()?))),
            _ => None,
        }
    }
}

fn access(result: u8, flags: u8, body: &[u8]) -> Option<Accessed> {
    let outcome = Outcome::parse(result, body.get(20..)?)?;
    let iova = le64(body, 8)?;
    let length = le32(body, 16)?;
    let fits = length != 0 && length as usize <= MAX_ACCESS && iova.checked_add(length.into()).is_some();
    fits.then_some(())?;
    Some(Accessed {
        stream: stream(body)?,
        iova: Iova(iova),
        length,
        access: AccessFlags::from_bits(flags.into())?,
        outcome,
    })
}

fn page_request(flags: u8, body: &[u8]) -> Option<PageAsked> {
    let group = u16::from_le_bytes(body.get(16..)?.try_into().ok()?);
    let access = AccessFlags::from_bits((flags & !LAST).into())?;
    let address = Iova(le64(body, 8)?);
    Some(PageAsked { stream: stream(body)?, address, access, group, last: flags & LAST != 0 })
}

fn waited(result: u8, body: &[u8]) -> Option<Waited> {
    let group = u16::from_le_bytes(body.get(8..)?.try_into().ok()?);
    Some(Waited { stream: stream(body)?, group, end: *WaitEnd::ALL.get(usize::from(result))? })
}

impl Outcome {
    const fn number(self) -> u8 {
        match self {
            Self::Passed => 0,
            Self::Unattached => 1,
            Self::Unmapped => 2,
            Self::Permission => 3,
            Self::Configuration => 4,
            Self::TableAccess => 5,
            Self::Malformed => 6,
            Self::Waits { .. } => 7,
        }
    }

    /// `rest`: what is behind the length of the access.
    fn parse(number: u8, rest: &[u8]) -> Option<Self> {
        Some(match (number, rest) {
            (0, []) => Self::Passed,
            (1, []) => Self::Unattached,
            (2, []) => Self::Unmapped,
            (3, []) => Self::Permission,
            (4, []) => Self::Configuration,
            (5, []) => Self::TableAccess,
            (6, []) => Self::Malformed,
            (7, &[low, high]) => Self::Waits { group: u16::from_le_bytes([low, high]) },
            _ => return None,
        })
    }
}

/// Endpoint and PASID, the first 8 bytes of a body.
fn stream(body: &[u8]) -> Option<Stream> {
    let pasid = match le32(body, 4)? {
        UNTAGGED => None,
        value => Some(Pasid::new(value)?),
    };
    Some(Stream { endpoint: EndpointId(le32(body, 0)?), pasid })
}

fn put_stream(to: &mut [u8], stream: Stream) {
    put(to, 0, &stream.endpoint.0.to_le_bytes());
    put(to, 4, &stream.pasid.map_or(UNTAGGED, Pasid::value).to_le_bytes());
}

fn le32(body: &[u8], at: usize) -> Option<u32> {
    body.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)
}

fn le64(body: &[u8], at: usize) -> Option<u64> {
    body.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes)
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
