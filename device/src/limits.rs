//! Bounds on whatever a guest can make grow.

/// How much a guest may make the device keep. A request that would go beyond is answered NOMEM and changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Domains that exist at the same time. The domain that an ATTACH is about to empty still counts.
    pub max_domains: usize,
    /// Mappings in one domain.
    pub max_mappings_per_domain: usize,
    /// Mappings in all domains together.
    pub max_mappings: usize,
    /// Faults that wait for an event buffer. Later ones are dropped and counted (D-59).
    pub max_pending_events: usize,
    /// Page tables bound for single PASIDs of one endpoint. A PASID table counts as none.
    pub max_bound_pasids_per_endpoint: usize,
    /// Page tables bound for single PASIDs of all endpoints together.
    pub max_bound_pasids: usize,
    /// Page requests of one endpoint that are not answered yet, told to the driver or not. A group that would go
    /// beyond is answered INVALID at once.
    pub max_page_requests_per_endpoint: usize,
    /// Page requests of all endpoints together that are not answered yet. While it is reached and some of them wait
    /// for an event buffer, the host keeps what it has; when the driver was told of all, a further group is answered
    /// INVALID at once.
    pub max_page_requests: usize,
}

impl Limits {
    /// What a device has that is not told otherwise.
    pub const DEFAULT: Self = Self {
        max_domains: 1 << 16,
        max_mappings_per_domain: 1 << 21,
        max_mappings: 1 << 22,
        max_pending_events: 1 << 10,
        max_bound_pasids_per_endpoint: 1 << 12,
        max_bound_pasids: 1 << 16,
        max_page_requests_per_endpoint: 1 << 8,
        max_page_requests: 1 << 12,
    };
}

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
}
