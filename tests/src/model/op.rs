//! What can happen.

use std::fmt;

use super::words::Access;

/// One thing that a guest, its devices, or its VMM does.
#[derive(Clone)]
pub enum Op {
    /// Sends a request of any bytes.
    Request {
        /// The device-readable part.
        readable: Vec<u8>,
        /// Bytes of the device-writable part.
        writable: usize,
        /// Parts that each is cut into, where there is a ring.
        cut: usize,
    },
    /// An endpoint accesses memory.
    Access {
        /// The endpoint.
        id: u32,
        /// Its PASID.
        pasid: Option<u32>,
        /// The address.
        iova: u64,
        /// What it does.
        access: Access,
        /// Where the endpoint can, it waits for the page.
        waits: bool,
    },
    /// The guest writes its memory.
    Write {
        /// Where.
        at: u64,
        /// What.
        words: Vec<u64>,
    },
    /// The driver offers an event buffer.
    TakeEvent {
        /// Of this many bytes.
        len: usize,
    },
    /// The driver reads the configuration space.
    ReadConfig {
        /// From this byte on.
        offset: usize,
        /// So many.
        len: usize,
    },
    /// The driver writes it.
    WriteConfig {
        /// From this byte on.
        offset: usize,
        /// This.
        bytes: Vec<u8>,
    },
    /// The driver accepts features in the middle of things.
    Accept {
        /// These, offered or not.
        features: u64,
    },
    /// A reset, and then the driver accepts features.
    Reset {
        /// A system reset.
        system: bool,
        /// Of those on offer.
        accept: u64,
    },
    /// The VMM switches strict mode.
    Strict(bool),
    /// The VMM tells the time.
    Time {
        /// So much more than before.
        by: i64,
    },
    /// The driver answers a group of page requests.
    Answer {
        /// One of those that are there.
        which: usize,
        /// What is wrong about it.
        twist: Twist,
        /// The code.
        code: u16,
    },
    /// The driver makes the page that a group asks for, answers SUCCESS, and the access is tried again.
    Serve {
        /// One of those that are there.
        which: usize,
    },
    /// A machine makes up a page request, where what translates is a guest's table.
    MakeUp {
        /// The endpoint.
        id: u32,
        /// Its PASID.
        pasid: Option<u32>,
        /// The number of its group.
        group: u16,
        /// The last one of it.
        last: bool,
        /// READ, WRITE, EXEC, PRIVILEGED.
        flags: u32,
        /// What only hardware understands.
        private: Option<[u64; 2]>,
    },
    /// A machine answers a group by itself that it made up.
    Forget {
        /// One of those that it may.
        which: usize,
    },
    /// The machine fails to take its next answer.
    Fail,
}

/// What is wrong about an answer to page requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Twist {
    /// Nothing.
    None,
    /// Another PASID.
    Pasid(u32),
    /// A PASID where there is none, or the reverse.
    Tagged,
    /// Another number.
    Group(u16),
    /// Another endpoint.
    Endpoint(u32),
    /// The group that was answered last, once more.
    Again,
    /// This bit is flipped.
    Bit(usize),
}

/// On one line, so that a failure can be read.
impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Request { readable, writable, cut } => {
                write!(f, "request {} {writable} cut {cut}", hex(readable))
            }
            Self::Access { id, pasid, iova, access: Access { kind, privileged }, waits } => {
                let mode = if *privileged { " privileged" } else { "" };
                let waits = if *waits { " waits" } else { "" };
                write!(f, "access {id} {pasid:?} {iova:#x} {kind:?}{mode}{waits}")
            }
            Self::Write { at, words } => write!(f, "write {at:#x} {words:x?}"),
            Self::TakeEvent { len } => write!(f, "event {len}"),
            Self::ReadConfig { offset, len } => write!(f, "config {offset} {len}"),
            Self::WriteConfig { offset, bytes } => write!(f, "config-write {offset} {}", hex(bytes)),
            Self::Accept { features } => write!(f, "accept {features:#x}"),
            Self::Reset { system, accept } => write!(f, "reset system={system} accept {accept:#x}"),
            Self::Strict(strict) => write!(f, "strict {strict}"),
            Self::Time { by } => write!(f, "time {by:+}"),
            Self::Answer { which, twist, code } => write!(f, "answer {which} {twist:?} code {code}"),
            Self::Serve { which } => write!(f, "serve {which}"),
            Self::MakeUp { id, pasid, group, last, flags, private } => {
                write!(f, "ask {id} {pasid:?} group {group:#x} last {last} flags {flags:#x} {private:x?}")
            }
            Self::Forget { which } => write!(f, "forget {which}"),
            Self::Fail => write!(f, "fail"),
        }
    }
}

/// Bytes in the order of memory.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
