//! The driver: bring-up, configuration, and the queues behind every request.

use viommu_wire::{Config, DomainId, DomainRange, EndpointId, Features, IovaRange, numbers};

use crate::RequestError;
use crate::fault::EventRing;
use crate::hal::{Platform, Transport, TransportError};
use crate::ids::IdSpace;
use crate::probe::{Endpoint, EndpointProperties};
use crate::queue::{QueueError, QueueOptions};
use crate::requester::{Counters, Requester};

/// What a driver wants of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DriverOptions {
    /// Features to accept where they are offered. INPUT_RANGE, DOMAIN_RANGE and PROBE are always accepted, and
    /// what this library cannot do never is. Who accepts PAGE_REQUEST answers page requests: see [`sva`](crate::sva), or
    /// [`Driver::respond`].
    pub features: Features,
    /// Features without which bring-up fails.
    pub required: Features,
    /// Most descriptors for the request queue, from 2 to 32768, rounded down to a power of two: half of them is the
    /// largest batch that one notification announces, or all of them with INDIRECT_DESC.
    pub request_queue: u16,
    /// Most event buffers, from 1 to 32768, rounded down to a power of two.
    pub event_queue: u16,
}

impl Default for DriverOptions {
    fn default() -> Self {
        Self { features: SUPPORTED, required: Features::empty(), request_queue: 512, event_queue: 64 }
    }
}

/// Everything this library knows how to use. BYPASS is superseded and never used.
const SUPPORTED: Features = Features::INPUT_RANGE
    .union(Features::DOMAIN_RANGE)
    .union(Features::MAP_UNMAP)
    .union(Features::PROBE)
    .union(Features::MMIO)
    .union(Features::BYPASS_CONFIG)
    .union(Features::ATTACH_TABLE)
    .union(Features::PAGE_REQUEST)
    .union(Features::RING_INDIRECT_DESC)
    .union(Features::RING_EVENT_IDX)
    .union(Features::VERSION_1)
    .union(Features::ACCESS_PLATFORM);

/// Accepted whenever offered: the ranges and reserved regions must be known, and a device that sees memory
/// through its platform must be told that the driver knows. [`Platform`]'s addresses are those the device can use.
const ALWAYS: Features = Features::INPUT_RANGE
    .union(Features::DOMAIN_RANGE)
    .union(Features::PROBE)
    .union(Features::VERSION_1)
    .union(Features::ACCESS_PLATFORM);

/// Largest properties area that is believed, in bytes: room for 2,700 reserved regions.
pub const MAX_PROBE_SIZE: u32 = 1 << 16;

/// Why the device could not be brought up. The device was told (FAILED).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InitError {
    /// The device is not a modern one.
    #[error("the device does not offer VERSION_1")]
    Legacy,
    /// The device lacks features that [`DriverOptions::required`] names.
    #[error("the device does not offer {0:?}")]
    Missing(Features),
    /// The configuration breaks the specification or changed all the time while it was read.
    #[error("the device's configuration has no meaning")]
    Config,
    /// The properties area is larger than [`MAX_PROBE_SIZE`].
    #[error("a properties area of {0} bytes is too large")]
    ProbeSize(u32),
    /// The device has no such queue, or a smaller one than the driver can use.
    #[error("queue {queue} has {size} descriptors")]
    QueueSize {
        /// Its index.
        queue: u16,
        /// Its size.
        size: u16,
    },
    /// A queue could not be made.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The device does not go along.
    #[error(transparent)]
    Transport(#[from] TransportError),
}

/// Why `bypass` was not read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("BYPASS_CONFIG was not negotiated")]
pub struct NoBypass;

/// A virtio-iommu device, up and running.
///
/// All requests are synchronous: a method returns when the device has answered. Nothing here knows which vendor's
/// hardware is below.
#[derive(Debug)]
pub struct Driver<P, T> {
    pub(crate) platform: P,
    pub(crate) transport: T,
    pub(crate) features: Features,
    pub(crate) config: Config,
    pub(crate) requests: Requester,
    pub(crate) events: EventRing,
    pub(crate) asids: IdSpace,
    domains: DomainIds,
}

impl<P: Platform, T: Transport> Driver<P, T> {
    /// Resets the device, negotiates features, reads the configuration, sets up both queues and starts the device.
    ///
    /// # Errors
    /// As [`InitError`] says.
    pub fn new(mut platform: P, mut transport: T, options: DriverOptions) -> Result<Self, InitError> {
        transport.reset();
        match Self::bring_up(&mut platform, &mut transport, options) {
            Ok((features, config, requests, events)) => Ok(Self {
                platform,
                transport,
                features,
                config,
                requests,
                events,
                asids: IdSpace::new(1, u32::from(u16::MAX)),
                domains: DomainIds {
                    next: Some(config.domain_range.first()),
                    last: config.domain_range.last(),
                },
            }),
            Err(error) => {
                transport.fail();
                Err(error)
            }
        }
    }

    fn bring_up(
        platform: &mut P,
        transport: &mut T,
        options: DriverOptions,
    ) -> Result<(Features, Config, Requester, EventRing), InitError> {
        let offered = transport.offered_features();
        if !offered.contains(Features::VERSION_1) {
            return Err(InitError::Legacy);
        }
        let features = offered & SUPPORTED & (options.features | ALWAYS);
        if !features.contains(options.required) {
            return Err(InitError::Missing(options.required - features));
        }
        transport.accept_features(features)?;
        let config = read_config(transport, features)?;
        if config.probe_size > MAX_PROBE_SIZE {
            return Err(InitError::ProbeSize(config.probe_size));
        }

        let event_idx = features.contains(Features::RING_EVENT_IDX);
        let size = queue_size(transport, numbers::REQUEST_QUEUE, options.request_queue, 2)?;
        let indirect = if features.contains(Features::RING_INDIRECT_DESC) { 2 } else { 0 };
        let (memory, alloc) = platform.parts();
        let ring_options = QueueOptions { event_idx, indirect, interrupts: false };
        let requests = Requester::new(memory, alloc, size, ring_options, config.probe_size)?;
        transport.enable_queue(numbers::REQUEST_QUEUE, requests.layout())?;

        let size = queue_size(transport, numbers::EVENT_QUEUE, options.event_queue, 1)?;
        let mut events = EventRing::new(memory, alloc, size, features)?;
        transport.enable_queue(numbers::EVENT_QUEUE, events.layout())?;
        transport.start();
        if events.post(memory)? {
            transport.notify(numbers::EVENT_QUEUE);
        }
        Ok((features, config, requests, events))
    }

    /// The features in force.
    pub const fn features(&self) -> Features {
        self.features
    }

    /// The configuration as it was at bring-up. Ranges that were not negotiated are everything, `probe_size` is then
    /// 0; `bypass` may have changed since, see [`bypass`](Self::bypass).
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// log2 of the smallest page that MAP takes.
    pub const fn granule_lg2(&self) -> u32 {
        self.config.page_size_mask.trailing_zeros()
    }

    /// Whether endpoints that are not attached are in bypass. Reads the device.
    ///
    /// # Errors
    /// [`NoBypass`] where the field has no meaning.
    pub fn bypass(&mut self) -> Result<bool, NoBypass> {
        if !self.features.contains(Features::BYPASS_CONFIG) {
            return Err(NoBypass);
        }
        let mut byte = [0];
        self.transport.read_config(Config::BYPASS_OFFSET, &mut byte);
        Ok(byte[0] & 1 != 0) // bits 7:1 are ignored
    }

    /// Puts endpoints that are not attached in bypass, or closes them off. The only write to the configuration that
    /// there is.
    ///
    /// # Errors
    /// [`NoBypass`] where the field may not be written.
    pub fn set_bypass(&mut self, bypass: bool) -> Result<(), NoBypass> {
        if !self.features.contains(Features::BYPASS_CONFIG) {
            return Err(NoBypass);
        }
        self.transport.write_config(Config::BYPASS_OFFSET, &[u8::from(bypass)]);
        Ok(())
    }

    /// Asks what the device says of an endpoint; without PROBE it says nothing.
    ///
    /// # Errors
    /// As [`RequestError`] says; [`Status::NoEnt`](viommu_wire::Status::NoEnt) where there is no such endpoint.
    pub fn probe(&mut self, endpoint: EndpointId) -> Result<Endpoint, RequestError> {
        if !self.features.contains(Features::PROBE) {
            return Ok(Endpoint::new(endpoint, EndpointProperties::default()));
        }
        let properties = self.requests.probe(self.platform.memory(), &mut self.transport, endpoint)?;
        Ok(Endpoint::new(endpoint, properties))
    }

    /// A domain ID that was not given before; `None` when all are used up.
    ///
    /// IDs are given in rising order and not again: a 32-bit space outlasts most drivers. One that must reuse IDs keeps
    /// its own list.
    pub fn new_domain_id(&mut self) -> Option<DomainId> {
        self.domains.take()
    }

    /// What was sent so far.
    pub const fn counters(&self) -> &Counters {
        self.requests.counters()
    }

    /// The platform that [`new`](Self::new) was given.
    pub const fn platform(&self) -> &P {
        &self.platform
    }

    /// The platform, to be changed.
    pub const fn platform_mut(&mut self) -> &mut P {
        &mut self.platform
    }

    /// The transport that [`new`](Self::new) was given.
    pub const fn transport_mut(&mut self) -> &mut T {
        &mut self.transport
    }

    /// Resets the device, which detaches every endpoint, and takes the memory of the queues back.
    pub fn shut_down(mut self) -> (P, T) {
        self.transport.reset();
        let (_, alloc) = self.platform.parts();
        self.requests.release(alloc);
        self.events.release(alloc);
        (self.platform, self.transport)
    }
}

#[derive(Debug)]
struct DomainIds {
    next: Option<DomainId>,
    last: DomainId,
}

impl DomainIds {
    fn take(&mut self) -> Option<DomainId> {
        let domain = self.next?;
        self.next = domain.0.checked_add(1).map(DomainId).filter(|next| *next <= self.last);
        Some(domain)
    }
}

/// Reads the whole configuration as of one moment, and puts everything in place of a range that does not count.
fn read_config<T: Transport>(transport: &mut T, features: Features) -> Result<Config, InitError> {
    const ATTEMPTS: u32 = 16;
    let everything = Config {
        page_size_mask: 1,
        input_range: IovaRange::ALL,
        domain_range: DomainRange::ALL,
        probe_size: 0,
        bypass: false,
    }
    .encode();
    for _ in 0..ATTEMPTS {
        let before = transport.config_generation();
        let mut bytes = [0; Config::LEN];
        transport.read_config(0, &mut bytes);
        if transport.config_generation() != before {
            continue;
        }
        let fields = [
            (Features::INPUT_RANGE, 8..24),
            (Features::DOMAIN_RANGE, 24..32),
            (Features::PROBE, 32..36),
            (Features::BYPASS_CONFIG, 36..37),
        ];
        for (feature, place) in fields {
            if !features.contains(feature) {
                bytes[place.clone()].copy_from_slice(&everything[place]);
            }
        }
        return Config::decode(&bytes).ok_or(InitError::Config);
    }
    Err(InitError::Config)
}

/// The largest power of two that driver and device both want.
fn queue_size<T: Transport>(transport: &mut T, queue: u16, most: u16, least: u16) -> Result<u16, InitError> {
    let size = transport.max_queue_size(queue).min(most);
    match size.checked_ilog2() {
        Some(lg2) if size >= least => Ok(1 << lg2),
        _ => Err(InitError::QueueSize { queue, size }),
    }
}
