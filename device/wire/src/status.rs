//! How a request ended, as the guest sees it.

use core::fmt;

use crate::layout::TailLayout;
use zerocopy::{FromBytes, IntoBytes};

/// Status of a request (virtio 1.4, 5.13.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Status {
    /// Success.
    Ok = 0,
    /// Transport error.
    IoErr = 1,
    /// The request is not supported.
    Unsupp = 2,
    /// The device failed.
    DevErr = 3,
    /// A parameter is wrong.
    Inval = 4,
    /// A parameter is out of range or misaligned.
    Range = 5,
    /// An object was not found.
    NoEnt = 6,
    /// A bad address.
    Fault = 7,
    /// A resource or a limit is used up.
    NoMem = 8,
}

impl Status {
    /// The status with this number; `None` where the specification defines none.
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            0 => Self::Ok,
            1 => Self::IoErr,
            2 => Self::Unsupp,
            3 => Self::DevErr,
            4 => Self::Inval,
            5 => Self::Range,
            6 => Self::NoEnt,
            7 => Self::Fault,
            8 => Self::NoMem,
            _ => return None,
        })
    }

    /// The number on the wire.
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// The specification's name, without its prefix.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::IoErr => "IOERR",
            Self::Unsupp => "UNSUPP",
            Self::DevErr => "DEVERR",
            Self::Inval => "INVAL",
            Self::Range => "RANGE",
            Self::NoEnt => "NOENT",
            Self::Fault => "FAULT",
            Self::NoMem => "NOMEM",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The last four device-writable bytes of every request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tail {
    /// How the request ended.
    pub status: Status,
}

impl Tail {
    /// Length in bytes.
    pub const LEN: usize = size_of::<TailLayout>();

    /// The bytes, reserved ones zero (D-13).
    pub fn encode(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        let layout = TailLayout { status: self.status.number(), reserved: [0; 3] };
        bytes.copy_from_slice(layout.as_bytes());
        bytes
    }

    /// Reads a tail, ignoring its reserved bytes. `None`: not four bytes, or no such status.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let layout = TailLayout::read_from_bytes(bytes).ok()?;
        Some(Self { status: Status::from_number(layout.status)? })
    }
}
