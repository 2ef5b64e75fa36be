//! What an address space looked like when a check looked at it.

use pgtable_formats::{Gpa, Iova, IovaRange};

/// Both stages of one device's translation, and what its accesses came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Picture {
    /// What it shows.
    pub(crate) title: String,
    /// Stage 1: the guest's table.
    pub(crate) mappings: Vec<Mapping>,
    /// Stage 2: the guest's memory, as the machine has it.
    pub(crate) memory: Vec<Memory>,
    /// Accesses.
    pub(crate) accesses: Vec<Access>,
}

/// A mapping of stage 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// What the device says.
    pub(crate) range: IovaRange,
    /// Where that leads.
    pub(crate) output: Gpa,
    /// Whether writes pass.
    pub(crate) write: bool,
    /// It was taken away, and the hardware was not told.
    pub(crate) stale: bool,
}

/// A region of stage 2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Memory {
    /// First address for the guest.
    pub(crate) first: Gpa,
    /// Last address for the guest.
    pub(crate) last: Gpa,
    /// What is behind it.
    pub(crate) what: String,
}

/// An access of the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    /// Where it went.
    pub(crate) address: Iova,
    /// It wrote.
    pub(crate) write: bool,
    /// What came of it.
    pub(crate) end: End,
}

/// What came of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It reached this address.
    Reached(Gpa),
    /// It reached this address by a translation that the table does not have any more.
    Stale(Gpa),
    /// It was refused.
    Faulted,
}
