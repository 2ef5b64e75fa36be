//! The device: features, configuration space, reset.

use alloc::vec::Vec;

use viommu_wire::{Config, EndpointId, Features};

use crate::config::{ConfigError, DeviceConfig};
use crate::domain::{DomainSpace, Domains};
use crate::endpoint::{Bound, Endpoints};
use crate::error::{ConfigWriteError, FeatureError};
use crate::event::Events;
use crate::host::{Host, Invalidation, Stream};
use crate::page_request::PageRequests;

/// A virtio-iommu device over the machine `H`.
///
/// It owns no queue, thread or clock: [`handle`](Self::handle) takes one request and gives its answer, events are
/// pulled. Endpoints are those that the host has when the device is made.
#[derive(Debug)]
pub struct Device<H: Host> {
    pub(crate) config: DeviceConfig,
    pub(crate) host: H,
    /// The features of `config` that an endpoint has a use for.
    offered: Features,
    /// Negotiated.
    pub(crate) features: Features,
    /// The field of the configuration space.
    pub(crate) bypass: bool,
    pub(crate) endpoints: Endpoints<H::Space>,
    pub(crate) domains: Domains<H::Space>,
    /// Mappings of all domains.
    pub(crate) mappings: usize,
    /// Page tables bound for single PASIDs of all endpoints.
    pub(crate) page_tables: usize,
    /// Made when first needed, then shared by all that are in bypass.
    pub(crate) identity: Option<H::Space>,
    pub(crate) events: Events,
    pub(crate) page_requests: PageRequests,
    /// Invalidations of one request; empty in between, kept for its memory.
    pub(crate) batch: Vec<Invalidation>,
    /// Spaces that the host would not take streams away from when the device was reset.
    pub(crate) stuck: Vec<Stuck<H::Space>>,
    pub(crate) needs_reset: bool,
}

/// A space that cannot be destroyed, because streams may still translate through it.
#[derive(Debug)]
pub(crate) struct Stuck<S> {
    pub(crate) streams: Vec<Stream>,
    pub(crate) space: S,
}

impl<H: Host> Device<H> {
    /// Makes a device whose driver has not negotiated anything yet.
    ///
    /// No stream of `host` may be bound: the device starts from there.
    ///
    /// # Errors
    /// What [`DeviceConfig::validate`] finds; [`ConfigError::Host`] where endpoints cannot be put in bypass.
    pub fn new(config: DeviceConfig, host: H) -> Result<Self, ConfigError> {
        config.validate(&host)?;
        let endpoints = Endpoints::new(&host);
        let mut device = Self {
            offered: config.offered(&host),
            features: Features::empty(),
            bypass: config.bypass,
            page_requests: PageRequests::new(endpoints.len()),
            endpoints,
            domains: Domains::new(),
            mappings: 0,
            page_tables: 0,
            identity: None,
            events: Events::default(),
            batch: Vec::new(),
            stuck: Vec::new(),
            needs_reset: false,
            config,
            host,
        };
        for at in 0..device.endpoints.len() {
            device.move_endpoint(at, device.unattached())?; // D-16
        }
        Ok(device)
    }

    /// The machine.
    pub fn host(&self) -> &H {
        &self.host
    }

    /// The machine. To bind streams behind the device's back is a mistake.
    pub fn host_mut(&mut self) -> &mut H {
        &mut self.host
    }

    /// What the device was made with.
    pub fn config(&self) -> &DeviceConfig {
        &self.config
    }

    /// The device-type features on offer (D-1): those of the configuration, and PAGE_REQUEST among them only with
    /// ATTACH_TABLE and where an endpoint has page requests.
    pub fn offered_features(&self) -> Features {
        self.offered
    }

    /// The device-type features that the driver accepted.
    pub fn features(&self) -> Features {
        self.features
    }

    /// The driver's choice. Bits that belong to the transport are ignored.
    ///
    /// # Errors
    /// A device-type bit that was not offered; the choice stays as it was.
    pub fn accept_features(&mut self, accepted: Features) -> Result<(), FeatureError> {
        let chosen = accepted.intersection(Features::DEVICE);
        let unknown = chosen.difference(self.offered);
        if !unknown.is_empty() {
            return Err(FeatureError(unknown));
        }
        self.features = chosen;
        if !chosen.contains(Features::PAGE_REQUEST | Features::ATTACH_TABLE) {
            self.close_all_groups();
        }
        Ok(())
    }

    /// Fills `data` from the configuration space, from byte `offset` on. Beyond its end are zeros.
    pub fn read_config(&self, offset: usize, data: &mut [u8]) {
        let space = self.config.space(self.bypass).encode(); // D-7
        let source = space.get(offset..).unwrap_or(&[]);
        let (filled, beyond) = data.split_at_mut(source.len().min(data.len()));
        for (byte, value) in filled.iter_mut().zip(source) {
            *byte = *value;
        }
        beyond.fill(0);
    }

    /// A write of the driver to the configuration space. Endpoints that are not attached follow a change of `bypass`.
    ///
    /// # Errors
    /// Anything but 0 or 1 to `bypass`, after BYPASS_CONFIG was negotiated; or the host's. Nothing changes then.
    pub fn write_config(&mut self, offset: usize, data: &[u8]) -> Result<(), ConfigWriteError> {
        let bypass = match (offset, data) {
            (_, []) => return Ok(()),
            (Config::BYPASS_OFFSET, [value]) => *value,
            _ => return Err(ConfigWriteError::ReadOnly { offset, length: data.len() }),
        };
        if !self.features.contains(Features::BYPASS_CONFIG) {
            return Err(ConfigWriteError::NotNegotiated);
        }
        let bypass = match bypass {
            0 => false,
            1 => true,
            value => return Err(ConfigWriteError::Value(value)), // D-7
        };
        self.set_bypass(bypass)
    }

    /// Device reset: no endpoint is attached any more (D-8), nothing of what the guest made is left, page requests are
    /// answered INVALID, and features are to be negotiated anew. `bypass` stays as it is (D-6).
    pub fn reset(&mut self) {
        self.features = Features::empty();
        self.needs_reset = false;
        self.release_stuck();
        for at in 0..self.endpoints.len() {
            self.reset_endpoint(at);
        }
        for domain in self.domains.take() {
            if let DomainSpace::Mapped(mapped) = domain.space {
                self.destroy_unless_stuck(mapped.space, &domain.endpoints);
            }
        }
        for at in 0..self.endpoints.len() {
            let endpoint = &mut self.endpoints[at];
            if matches!(endpoint.untagged, Bound::Domain) {
                endpoint.untagged = Bound::Nothing; // What it is still bound to is among the stuck ones.
            }
        }
        self.mappings = 0;
        self.page_tables = 0;
        let bypass =
            (0..self.endpoints.len()).any(|at| matches!(self.endpoints[at].untagged, Bound::Identity));
        if !bypass && let Some(identity) = self.identity.take() {
            self.host.destroy(identity);
        }
        self.discard_events();
    }

    /// System reset: a device reset that also gives `bypass` its first value (D-6).
    pub fn system_reset(&mut self) {
        self.bypass = self.config.bypass;
        self.reset();
    }

    /// Whether the host failed in a way that left an endpoint other than the driver believes: the transport should
    /// set DEVICE_NEEDS_RESET (D-60). A reset in which the host does not fail ends this.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset
    }

    /// The endpoints, in ascending order.
    pub fn endpoints(&self) -> impl Iterator<Item = EndpointId> + '_ {
        (0..self.endpoints.len()).map(|at| self.endpoints[at].id)
    }

    /// How many domains exist.
    pub fn domain_count(&self) -> usize {
        self.domains.len()
    }

    /// How many mappings exist in all domains.
    pub fn mapping_count(&self) -> usize {
        self.mappings
    }
}
