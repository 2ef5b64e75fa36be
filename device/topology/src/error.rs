//! Why a topology is refused.

use thiserror::Error;

use crate::{Bdf, Endpoints};

/// What is wrong with the description of an IOMMU and its endpoints.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum TopologyError {
    /// A PCI device number has five bits.
    #[error("PCI device number {0:#x} is above 0x1f")]
    DeviceNumber(u8),
    /// A PCI function number has three bits.
    #[error("PCI function number {0} is above 7")]
    FunctionNumber(u8),
    /// The last segment of a range is below the first.
    #[error("segment range ends at {last:#x}, before its start {first:#x}")]
    SegmentsInverted {
        /// The first segment as given.
        first: u16,
        /// The last segment as given.
        last: u16,
    },
    /// The last BDF of a range is below the first. A range over several segments takes the same BDFs
    /// of each, so this is wrong even if the last segment is above the first.
    #[error("BDF range ends at {last}, before its start {first}")]
    BdfsInverted {
        /// The first BDF as given.
        first: Bdf,
        /// The last BDF as given.
        last: Bdf,
    },
    /// The highest endpoint ID of a range does not fit in 32 bits.
    #[error("endpoint IDs from {first_id:#x} on for {segments} segments end at {last_id:#x}, above 32 bits")]
    EndpointIdOverflow {
        /// The ID of the range's first device.
        first_id: u32,
        /// How many segments the range covers.
        segments: u32,
        /// The ID that the range's last device would get.
        last_id: u64,
    },
    /// Two entries name the same device, so that it would have two endpoint IDs.
    #[error("{first} and {second} have devices in common")]
    SameDevice {
        /// The entry that comes first.
        first: Endpoints,
        /// The entry that comes later.
        second: Endpoints,
    },
    /// Two entries give the same endpoint ID to different devices.
    #[error("{first} and {second} have endpoint IDs in common")]
    SameEndpointId {
        /// The entry that comes first.
        first: Endpoints,
        /// The entry that comes later.
        second: Endpoints,
    },
    /// An entry names only the IOMMU itself, which is never an endpoint. (Within a larger PCI range
    /// its BDF is allowed, and left out.)
    #[error("{0} is the IOMMU itself")]
    OnlyTheIommu(Endpoints),
}
