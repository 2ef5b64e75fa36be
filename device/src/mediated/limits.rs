//! Bounds on what a guest can make the mediation keep.

/// How much a guest may have that is made for it. What would go beyond is refused with
/// [`HostError::NoMemory`](crate::host::HostError::NoMemory), and changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MediationLimits {
    /// Entries of a PASID table that are bound for one endpoint.
    pub max_entries_per_endpoint: usize,
    /// Entries of PASID tables that are bound for all endpoints together.
    pub max_entries: usize,
    /// How many bytes of the window one endpoint may have: level 1 of its table (8 bytes for each 64 PASIDs that it
    /// could have), and 4 KiB for each 64 PASIDs of which one is bound.
    pub max_window_per_endpoint: u64,
}

impl MediationLimits {
    /// What there is where nothing else is said.
    pub const DEFAULT: Self =
        Self { max_entries_per_endpoint: 1 << 12, max_entries: 1 << 16, max_window_per_endpoint: 32 << 20 };
}

impl Default for MediationLimits {
    fn default() -> Self {
        Self::DEFAULT
    }
}
