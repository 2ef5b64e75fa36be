//! What a VMM says about the device before a guest sees it.

use alloc::vec::Vec;

use viommu_wire::{Config, DomainRange, EndpointId, Features, Iova, IovaRange, ReservedKind, ReservedRegion};

use crate::host::{EndpointCaps, Host, HostError, TableCaps};
use crate::limits::Limits;
use crate::request::probe;

/// What the device offers and how much it keeps.
///
/// ```
/// use viommu_device::{DeviceConfig, Features};
///
/// let config = DeviceConfig { bypass: true, ..DeviceConfig::default() };
/// assert!(config.features.contains(Features::BYPASS_CONFIG));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Device-type features to offer, some of [`Self::ALL_FEATURES`]. What the transport offers is not said here.
    /// PAGE_REQUEST is offered only with ATTACH_TABLE, and where an endpoint of the host has page requests.
    pub features: Features,
    /// The lowest set bit is the granule of every MAP, the others are hints (D-4).
    pub page_size_mask: u64,
    /// Addresses that may be mapped (D-15).
    pub input_range: IovaRange,
    /// Domain IDs that may be used.
    pub domain_range: DomainRange,
    /// Length in bytes of the properties area of PROBE; never changes.
    pub probe_size: u32,
    /// Whether unattached endpoints start in bypass (D-5).
    pub bypass: bool,
    /// Bounds on what a guest can make grow.
    pub limits: Limits,
    /// How long in nanoseconds a driver may take to answer page requests; then they are answered INVALID.
    /// `u64::MAX`: for ever. The time is that of [`Device::set_time`](crate::Device::set_time).
    pub page_request_timeout_ns: u64,
}

/// Why a device cannot be made so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Features that this device does not have. Among them is BYPASS: new devices do not offer it (D-2, D-3).
    #[error("features {0:?} cannot be offered")]
    Features(Features),
    /// There is no page size (D-4).
    #[error("page_size_mask has no bit set")]
    NoPageSize,
    /// Endpoints are to start in bypass, and BYPASS_CONFIG is not offered (D-5).
    #[error("bypass needs the feature BYPASS_CONFIG")]
    BypassNotOffered,
    /// Mappable addresses are restricted, and INPUT_RANGE is not offered: no driver could know.
    #[error("an input range needs the feature INPUT_RANGE")]
    InputRangeNotOffered,
    /// Domain IDs are restricted, and DOMAIN_RANGE is not offered: no driver could know.
    #[error("a domain range needs the feature DOMAIN_RANGE")]
    DomainRangeNotOffered,
    /// The properties of an endpoint do not fit `probe_size`.
    #[error("endpoint {endpoint} has {needed} bytes of properties, and probe_size is {probe_size}")]
    ProbeSize {
        /// The endpoint.
        endpoint: EndpointId,
        /// Bytes that its properties take, those of all offered features included.
        needed: usize,
        /// Bytes that there are.
        probe_size: u32,
    },
    /// An endpoint has more than one MSI region (D-52).
    #[error("endpoint {0} has more than one MSI region")]
    MsiRegions(EndpointId),
    /// Reserved regions of an endpoint overlap (D-53).
    #[error("endpoint {endpoint} has the overlapping reserved regions {first} and {second}")]
    ReservedOverlap {
        /// The endpoint.
        endpoint: EndpointId,
        /// The one that starts first.
        first: IovaRange,
        /// The other.
        second: IovaRange,
    },
    /// The host could not put an endpoint in bypass.
    #[error("no bypass: {0}")]
    Host(#[from] HostError),
}

impl DeviceConfig {
    /// Every feature that this device has over any host.
    pub const FEATURES: Features = Features::INPUT_RANGE
        .union(Features::DOMAIN_RANGE)
        .union(Features::MAP_UNMAP)
        .union(Features::PROBE)
        .union(Features::MMIO)
        .union(Features::BYPASS_CONFIG)
        .union(Features::ATTACH_TABLE);

    /// And those that need a host to match: PAGE_REQUEST.
    pub const ALL_FEATURES: Features = Self::FEATURES.union(Features::PAGE_REQUEST);

    /// How long a driver may take to answer page requests, if nothing else is said: 10 seconds. An endpoint waits
    /// meanwhile, and a driver may have to read the page from a disk first.
    pub const PAGE_REQUEST_TIMEOUT_NS: u64 = 10_000_000_000;

    /// Checks the values, each alone, together, and against the endpoints of `host`.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn validate<H: Host>(&self, host: &H) -> Result<(), ConfigError> {
        let unknown = self.features.difference(Self::ALL_FEATURES);
        if !unknown.is_empty() {
            return Err(ConfigError::Features(unknown)); // D-2, D-3
        }
        if self.page_size_mask == 0 {
            return Err(ConfigError::NoPageSize); // D-4
        }
        if self.bypass && !self.features.contains(Features::BYPASS_CONFIG) {
            return Err(ConfigError::BypassNotOffered); // D-5
        }
        let maps = self.features.contains(Features::MAP_UNMAP);
        if maps && self.input_range != IovaRange::ALL && !self.features.contains(Features::INPUT_RANGE) {
            return Err(ConfigError::InputRangeNotOffered);
        }
        if self.domain_range != DomainRange::ALL && !self.features.contains(Features::DOMAIN_RANGE) {
            return Err(ConfigError::DomainRangeNotOffered);
        }
        let offered = self.offered(host);
        host.endpoints()
            .into_iter()
            .filter_map(|endpoint| Some((endpoint, host.caps(endpoint)?)))
            .try_for_each(|(endpoint, caps)| self.validate_endpoint(endpoint, caps, offered))
    }

    /// The features, without those that no endpoint of `host` has a use for.
    pub(crate) fn offered<H: Host>(&self, host: &H) -> Features {
        let asks = |&endpoint: &EndpointId| host.caps(endpoint).is_some_and(|caps| caps.page_requests);
        let has_tables = self.features.contains(Features::ATTACH_TABLE);
        match self.features.contains(Features::PAGE_REQUEST)
            && !(has_tables && host.endpoints().iter().any(asks))
        {
            true => self.features - Features::PAGE_REQUEST,
            false => self.features,
        }
    }

    /// log2 of the granule of MAP.
    pub const fn granule_lg2(&self) -> u32 {
        self.page_size_mask.trailing_zeros()
    }

    /// The configuration space while `bypass` has this value.
    pub(crate) const fn space(&self, bypass: bool) -> Config {
        Config {
            page_size_mask: self.page_size_mask,
            input_range: self.input_range,
            domain_range: self.domain_range,
            probe_size: self.probe_size,
            bypass,
        }
    }

    fn validate_endpoint(
        &self,
        endpoint: EndpointId,
        caps: &EndpointCaps,
        offered: Features,
    ) -> Result<(), ConfigError> {
        if caps.reserved.iter().filter(|region| region.kind == ReservedKind::Msi).count() > 1 {
            return Err(ConfigError::MsiRegions(endpoint)); // D-52
        }
        if let Some((first, second)) = overlap(&caps.reserved) {
            return Err(ConfigError::ReservedOverlap { endpoint, first, second }); // D-53
        }
        if self.features.contains(Features::PROBE) {
            let tables = caps.tables.as_ref().map(TableCaps::for_guests);
            // With all that may become visible: probe_size stays when features are negotiated.
            let needed = probe::properties(caps, tables.as_ref(), offered)
                .map(|property| property.encoded_len())
                .sum();
            if u32::try_from(needed).map_or(true, |needed| needed > self.probe_size) {
                return Err(ConfigError::ProbeSize { endpoint, needed, probe_size: self.probe_size });
            }
        }
        Ok(())
    }
}

/// All features, 4 KiB pages, 48-bit addresses, every domain ID, a `probe_size` of 512, no bypass, 10 seconds for the
/// answer to a page request.
impl Default for DeviceConfig {
    fn default() -> Self {
        Self {
            features: Self::ALL_FEATURES,
            page_size_mask: 0xffff_ffff_ffff_f000,
            input_range: IovaRange::from_length(Iova(0), 1 << 48).unwrap_or(IovaRange::ALL),
            domain_range: DomainRange::ALL,
            probe_size: 512,
            bypass: false,
            limits: Limits::DEFAULT,
            page_request_timeout_ns: Self::PAGE_REQUEST_TIMEOUT_NS,
        }
    }
}

fn overlap(regions: &[ReservedRegion]) -> Option<(IovaRange, IovaRange)> {
    let mut ranges: Vec<IovaRange> = regions.iter().map(|region| region.range).collect();
    ranges.sort_unstable_by_key(|range| range.start());
    ranges.windows(2).find_map(|pair| match pair {
        [first, second] if first.overlaps(*second) => Some((*first, *second)),
        _ => None,
    })
}
