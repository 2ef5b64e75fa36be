//! Writing a trace.

use std::fmt;
use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::format::{Clock, HEADER, MAX_RECORD, Record, header};
use super::{Event, Recorder};

/// How long a trace may become unless [`Tape::limit`] says otherwise, in bytes: some 30 million accesses.
pub const DEFAULT_LIMIT: u64 = 1 << 30;

/// Bytes that are kept before they are written.
const BUFFER: usize = 1 << 16;

/// A recorder that writes a trace, to a file mostly.
///
/// It keeps at most 64 KiB in memory. Once the trace has reached its limit, or cannot be written, events are counted
/// and left out. A trace is whole only after [`finish`](Self::finish).
pub struct Tape<W> {
    clock: Option<Box<dyn Fn() -> u64 + Send + Sync>>,
    limit: u64,
    state: Mutex<State<W>>,
}

struct State<W> {
    sink: W,
    buffer: Vec<u8>,
    /// Bytes so far, those in the buffer included.
    length: u64,
    /// Records so far.
    records: u64,
    lost: u64,
    /// The latest.
    time: u64,
    error: Option<io::ErrorKind>,
    /// What came of it, once it is finished.
    finished: Option<Written>,
}

/// What a trace holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Events in it.
    pub events: u64,
    /// Events that were left out at its end.
    pub lost: u64,
    /// Its length in bytes.
    pub bytes: u64,
}

impl<W: Write + Send> Tape<W> {
    /// Records to `sink`; times are the numbers of records.
    pub fn new(sink: W) -> Self {
        let state = State {
            sink,
            buffer: Vec::with_capacity(BUFFER),
            length: 0,
            records: 0,
            lost: 0,
            time: 0,
            error: None,
            finished: None,
        };
        Self { clock: None, limit: DEFAULT_LIMIT, state: Mutex::new(state) }
    }

    /// Takes times from `nanoseconds`, which counts from some moment on. Should it run backwards, time stands still.
    #[must_use]
    pub fn clock(self, nanoseconds: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        Self { clock: Some(Box::new(nanoseconds)), ..self }
    }

    /// Leaves out what would make the trace longer than `bytes`; the few bytes that say so come on top.
    #[must_use]
    pub fn limit(self, bytes: u64) -> Self {
        Self { limit: bytes, ..self }
    }

    /// Ends the trace and flushes it. Events that come later are not recorded.
    ///
    /// # Errors
    /// The first time that the sink did not take what was recorded.
    pub fn finish(&self) -> io::Result<Written> {
        let mut state = self.state();
        let written = match state.finished {
            Some(written) => written,
            None => state.finish(self.unit()),
        };
        state.error.map_or(Ok(written), |kind| Err(kind.into()))
    }

    /// What the trace was written to.
    pub fn into_sink(self) -> W {
        self.state.into_inner().unwrap_or_else(PoisonError::into_inner).sink
    }

    fn unit(&self) -> Clock {
        if self.clock.is_some() { Clock::Nanoseconds } else { Clock::Records }
    }

    /// Whoever panicked with it left a whole number of records.
    fn state(&self) -> MutexGuard<'_, State<W>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<W: Write> State<W> {
    fn begin(&mut self, unit: Clock) {
        if self.length == 0 {
            self.buffer.extend_from_slice(&header(unit));
            self.length = HEADER as u64;
        }
    }

    fn finish(&mut self, unit: Clock) -> Written {
        self.begin(unit);
        let (events, lost) = (self.records, self.lost);
        if lost > 0 {
            self.append(&Record::Lost(lost));
        }
        self.append(&Record::End(self.records));
        self.write();
        if self.error.is_none()
            && let Err(error) = self.sink.flush()
        {
            self.error = Some(error.kind());
        }
        let written = Written { events, lost, bytes: self.length };
        self.finished = Some(written);
        written
    }

    fn append(&mut self, record: &Record<'_>) {
        let before = self.buffer.len();
        record.encode(self.time, &mut self.buffer);
        self.length = self.length.saturating_add((self.buffer.len() - before) as u64);
        self.records = self.records.saturating_add(1);
        if self.buffer.len() + MAX_RECORD > BUFFER {
            self.write();
        }
    }

    fn write(&mut self) {
        if self.error.is_none()
            && let Err(error) = self.sink.write_all(&self.buffer)
        {
            self.error = Some(error.kind());
        }
        self.buffer.clear();
    }
}

impl<W: Write + Send> Recorder for Tape<W> {
    fn record(&self, event: Event<'_>) {
        let mut state = self.state();
        if state.finished.is_some() {
            return;
        }
        state.begin(self.unit());
        // Once something is missing, all that follows is: a gap in the middle would be told as something that happened.
        if state.lost > 0 || state.error.is_some() || state.length + MAX_RECORD as u64 > self.limit {
            state.lost = state.lost.saturating_add(1);
            return;
        }
        let now = self.clock.as_ref().map_or(state.records, |clock| clock());
        state.time = state.time.max(now);
        state.append(&Record::Event(event));
    }
}

impl<W> fmt::Debug for Tape<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tape").field("limit", &self.limit).finish_non_exhaustive()
    }
}
