//! Reading a trace. Whoever wrote it is not trusted.

use std::fmt;
use std::io::{self, Read};

use super::Event;
use super::format::{BadHeader, Clock, HEAD, HEADER, Head, Record, VERSION, parse_header};

/// Reads the events of a trace, one after the other. It keeps one record; put a [`BufReader`](io::BufReader) before a
/// file.
pub struct TraceReader<R> {
    source: R,
    clock: Clock,
    body: [u8; u8::MAX as usize],
    /// Bytes read so far.
    offset: u64,
    records: u64,
    time: u64,
    lost: u64,
    ended: bool,
}

/// Why a trace cannot be read on. Events before that were as recorded.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// It does not start as a trace does.
    #[error("this is no trace of viommu: it does not start with its header")]
    NoTrace,
    /// It was written for another reader.
    #[error("the trace has version {version}; this program reads version {VERSION}")]
    Version {
        /// Its version.
        version: u16,
    },
    /// It stops before its end: whoever recorded it did not finish, or the file was cut.
    #[error("the trace is cut off after {offset} bytes, behind {records} whole records")]
    Cut {
        /// Its length.
        offset: u64,
        /// Whole records up to there.
        records: u64,
    },
    /// A record has no meaning.
    #[error("there is no valid record at byte {offset}, behind {records} valid ones")]
    Record {
        /// Where it starts.
        offset: u64,
        /// Records in front of it.
        records: u64,
    },
    /// There is something behind the end.
    #[error("there is something behind the end of the trace, at byte {offset}")]
    Behind {
        /// Where the trace ends.
        offset: u64,
    },
    /// It could not be read.
    #[error("cannot read the trace: {0}")]
    Io(#[from] io::Error),
}

impl<R: Read> TraceReader<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// It is no trace, or one of another version, or it cannot be read.
    pub fn new(mut source: R) -> Result<Self, TraceError> {
        let mut bytes = [0; HEADER];
        if read(&mut source, &mut bytes)? < HEADER {
            return Err(TraceError::NoTrace);
        }
        let clock = parse_header(&bytes).map_err(|bad| match bad {
            BadHeader::NoTrace => TraceError::NoTrace,
            BadHeader::Version(version) => TraceError::Version { version },
        })?;
        Ok(Self {
            source,
            clock,
            body: [0; u8::MAX as usize],
            offset: HEADER as u64,
            records: 0,
            time: 0,
            lost: 0,
            ended: false,
        })
    }

    /// What its times are.
    pub const fn clock(&self) -> Clock {
        self.clock
    }

    /// Events that the recorder left out, as far as was read.
    pub const fn lost(&self) -> u64 {
        self.lost
    }

    /// The next event and its time; `None` at the end. The event is valid until the next call.
    ///
    /// # Errors
    /// Where the trace cannot be read on. The same again, or worse, if asked again.
    pub fn next_event(&mut self) -> Result<Option<(u64, Event<'_>)>, TraceError> {
        while !self.ended {
            let head = self.head()?;
            // Twice, because what borrows from the body is given out.
            match self.record(&head)? {
                Record::Event(_) => {
                    self.passed(&head);
                    let body = self.body.get(..usize::from(head.length)).unwrap_or_default();
                    return match head.record(body) {
                        Some(Record::Event(event)) => Ok(Some((head.time, event))),
                        _ => Ok(None),
                    };
                }
                Record::Lost(events) => {
                    self.lost = self.lost.saturating_add(events);
                    self.passed(&head);
                }
                Record::End(records) => {
                    if records != self.records {
                        return Err(self.invalid());
                    }
                    self.passed(&head);
                    self.ended = true;
                    if read(&mut self.source, &mut [0])? != 0 {
                        return Err(TraceError::Behind { offset: self.offset });
                    }
                }
            }
        }
        Ok(None)
    }

    fn head(&mut self) -> Result<Head, TraceError> {
        let cut = TraceError::Cut { offset: self.offset, records: self.records };
        let mut bytes = [0; HEAD];
        match read(&mut self.source, &mut bytes)? {
            HEAD => {}
            length => return Err(longer(cut, length)),
        }
        let head = Head::parse(bytes);
        if head.time < self.time {
            return Err(self.invalid());
        }
        let body = self.body.get_mut(..usize::from(head.length)).unwrap_or_default();
        let length = read(&mut self.source, body)?;
        if length < body.len() {
            return Err(longer(cut, HEAD + length));
        }
        Ok(head)
    }

    fn record(&self, head: &Head) -> Result<Record<'_>, TraceError> {
        let body = self.body.get(..usize::from(head.length)).unwrap_or_default();
        head.record(body).ok_or_else(|| self.invalid())
    }

    fn passed(&mut self, head: &Head) {
        self.offset = self.offset.saturating_add((HEAD + usize::from(head.length)) as u64);
        self.records = self.records.saturating_add(1);
        self.time = head.time;
    }

    fn invalid(&self) -> TraceError {
        TraceError::Record { offset: self.offset, records: self.records }
    }
}

/// The same error for a trace that has so many more bytes.
fn longer(cut: TraceError, bytes: usize) -> TraceError {
    match cut {
        TraceError::Cut { offset, records } => {
            TraceError::Cut { offset: offset.saturating_add(bytes as u64), records }
        }
        other => other,
    }
}

/// Fills `bytes`, or as much of it as there is.
fn read(source: &mut impl Read, bytes: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match source.read(rest) {
            Ok(0) => break,
            Ok(length) => filled += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

impl<R> fmt::Debug for TraceReader<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TraceReader")
            .field("clock", &self.clock)
            .field("offset", &self.offset)
            .field("records", &self.records)
            .finish_non_exhaustive()
    }
}
