//! Bounds on what a guest can make the mediation keep.

/// How much a guest may have that is made for it. What would go beyond is refused with
/// [`HostError::NoMemory`](crate::host::HostError::NoMemory): a bind then changes nothing, and a PASID table that is read
/// again has each PASID as it was or as it is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MediationLimits {
    /// Entries of a PASID table that are bound for one endpoint.
    pub max_entries_per_endpoint: usize,
    /// Entries of PASID tables that are bound for all endpoints together.
    pub max_entries: usize,
    /// PASID tables, of 64 entries each, that are read at once. Beyond these a guest's directory is not read, whether
    /// or not there is anything legal in them; so one reading loads no more than 2^14 words of a directory and 512 of
    /// each table. A request costs up to two readings for each endpoint: where one fails, by this limit or another, the
    /// device asks once more for all of the endpoint.
    pub max_tables_per_reading: usize,
    /// How many bytes of the window one endpoint may have: level 1 of its table (8 bytes for each 64 PASIDs that it
    /// could have), and 4 KiB for each 64 PASIDs of which one is bound.
    pub max_window_per_endpoint: u64,
}

impl MediationLimits {
    /// What there is where nothing else is said.
    pub const DEFAULT: Self = Self {
        max_entries_per_endpoint: 1 << 12,
        max_entries: 1 << 16,
        max_tables_per_reading: 1 << 12,
        max_window_per_endpoint: 32 << 20,
    };
}

impl Default for MediationLimits {
    fn default() -> Self {
        Self::DEFAULT
    }
}
