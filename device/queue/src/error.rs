//! What is wrong with a queue, or with one chain in it.

/// The queue cannot be used as it stands. Nothing was taken from it.
///
/// The driver broke a rule that it can only mend by a reset; a transport may set `DEVICE_NEEDS_RESET`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The driver has not enabled the queue.
    #[error("queue is not ready")]
    NotReady,
    /// A ring, or the descriptor table, is not in one piece of guest memory, or breaks its alignment.
    #[error("{part} at {address:#x} is not in guest memory, or not aligned")]
    BadRing {
        /// Which.
        part: RingPart,
        /// Its guest-physical address.
        address: u64,
    },
    /// The available index is further ahead than there are entries.
    #[error("available index {index} is more than {size} entries beyond {next}")]
    AvailableIndex {
        /// The driver's index.
        index: u16,
        /// The first entry not taken yet.
        next: u16,
        /// Entries in the ring.
        size: u16,
    },
}

/// A part of a split virtqueue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingPart {
    /// The descriptor table.
    Descriptors,
    /// The available ring.
    Available,
    /// The used ring.
    Used,
}

impl std::fmt::Display for RingPart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Descriptors => "descriptor table",
            Self::Available => "available ring",
            Self::Used => "used ring",
        })
    }
}

/// The chain breaks a rule (virtio 1.4, "Split Virtqueues"). It goes back with used length 0 and nothing else happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// The available ring names a descriptor that the table does not have. There is nothing to give back.
    #[error("head {0} is not in the descriptor table")]
    Head(u16),
    /// A `next` field names a descriptor that the table does not have.
    #[error("next descriptor {0} is not in the table")]
    Next(u16),
    /// More descriptors than a chain may have: a loop, or more than the limit.
    #[error("chain loops, or has more than {0} descriptors")]
    TooLong(usize),
    /// The buffers hold 4 GiB or more.
    #[error("buffers of the chain hold 2^32 bytes or more")]
    TooManyBytes,
    /// A buffer without a byte.
    #[error("descriptor has length 0")]
    Empty,
    /// A buffer that is not guest memory.
    #[error("buffer at {address:#x}, {len} bytes, is not in guest memory")]
    BadAddress {
        /// Its guest-physical address.
        address: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// A device-readable buffer after a device-writable one.
    #[error("readable descriptor after a writable one")]
    Order,
    /// A device-readable buffer in a queue whose buffers are all device-writable.
    #[error("readable descriptor in a queue of writable buffers")]
    Readable,
    /// An indirect table inside an indirect table.
    #[error("indirect table refers to another one")]
    NestedIndirect,
    /// A descriptor with both flags, INDIRECT and NEXT.
    #[error("descriptor is both indirect and chained")]
    IndirectAndNext,
    /// An indirect table whose length is 0, not a multiple of 16, or beyond the limit.
    #[error("indirect table has {0} bytes")]
    IndirectLength(u32),
}
