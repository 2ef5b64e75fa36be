//! A whole machine in one process: guest memory, the device on its software host, and its two queues.

use std::sync::Arc;

use anyhow::{Context as _, bail, ensure};
use pgtable_formats::Gpa;
use viommu_device::host::EndpointCaps;
use viommu_device::soft::SoftHost;
use viommu_device::{Device, DeviceConfig};
use viommu_guest::hal::QueueLayout;
use viommu_queue::loopback::place_queue;
use viommu_queue::{EventQueue, GuestTables, Kick, RequestQueue};
use viommu_wire::numbers::{EVENT_QUEUE, REQUEST_QUEUE};
use viommu_wire::{EndpointId, Features};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

/// Entries that a driver may give each queue.
pub(crate) const MAX_QUEUE_SIZE: u16 = 1024;
/// Most device-writable bytes of a request that the device is shown.
const WRITABLE_LIMIT: usize = 1 << 20;
/// Where [`Machine::RINGS`] starts: above every address that a translation table can hold.
const RINGS_BASE: u64 = 1 << 56;

/// What a machine is made of.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    /// First and last address of guest memory, whole pages.
    pub(crate) memory: (Gpa, Gpa),
    /// The endpoints behind the device.
    pub(crate) endpoints: Vec<(EndpointId, EndpointCaps)>,
    /// What the device offers.
    pub(crate) config: DeviceConfig,
    /// Nothing of guest tables is cached.
    pub(crate) strict: bool,
}

/// See the [module](self).
pub(crate) struct Machine {
    device: Device<SoftHost<GuestTables>>,
    requests: RequestQueue,
    events: EventQueue,
    /// Guest memory, and [`Self::RINGS`].
    memory: GuestMemoryMmap,
    /// First and last address of guest memory.
    span: (Gpa, Gpa),
}

impl Machine {
    /// A piece of memory of its own, [`Self::RINGS_BYTES`] long, for the rings and buffers of a driver that wants to keep
    /// all of guest memory for its user. Translation tables are not looked for there.
    pub(crate) const RINGS: Gpa = Gpa(RINGS_BASE);
    /// Length in bytes.
    pub(crate) const RINGS_BYTES: u64 = 16 << 20;

    /// Features of the transport: those that the queues have.
    const TRANSPORT: Features =
        Features::VERSION_1.union(Features::RING_INDIRECT_DESC).union(Features::RING_EVENT_IDX);

    /// Makes the machine; its memory is zero.
    pub(crate) fn new(setup: Setup) -> anyhow::Result<Self> {
        let (first, last) = setup.memory;
        ensure!(last.0 < RINGS_BASE, "guest memory ends above {:#x}", RINGS_BASE - 1);
        let bytes = last.0.checked_sub(first.0).context("guest memory ends before it starts")? + 1;
        let map = |at: Gpa, bytes: u64| -> anyhow::Result<Arc<GuestRegionMmap>> {
            let region = GuestRegionMmap::from_range(GuestAddress(at.0), usize::try_from(bytes)?, None);
            Ok(Arc::new(region.with_context(|| format!("cannot map {bytes} bytes of memory"))?))
        };
        let guest = GuestMemoryMmap::from_arc_regions(vec![map(first, bytes)?])?;
        let memory = guest.insert_region(map(Self::RINGS, Self::RINGS_BYTES)?)?;

        let mut host = SoftHost::new(GuestTables::new(&guest));
        host.set_strict(setup.strict);
        for (id, caps) in setup.endpoints {
            host.add_endpoint(id, caps).with_context(|| format!("endpoint {id}"))?;
        }
        Ok(Self {
            device: Device::new(setup.config, host)?,
            requests: RequestQueue::new(MAX_QUEUE_SIZE, WRITABLE_LIMIT)?,
            events: EventQueue::new(MAX_QUEUE_SIZE)?,
            memory,
            span: setup.memory,
        })
    }

    /// The device.
    pub(crate) fn device(&self) -> &Device<SoftHost<GuestTables>> {
        &self.device
    }

    /// The device.
    pub(crate) fn device_mut(&mut self) -> &mut Device<SoftHost<GuestTables>> {
        &mut self.device
    }

    /// All memory, [`Self::RINGS`] too.
    pub(crate) fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Writes guest memory, all of `bytes` or nothing.
    pub(crate) fn write(&self, at: Gpa, bytes: &[u8]) -> anyhow::Result<()> {
        self.check(at, bytes.len())?;
        Ok(self.memory.write_slice(bytes, GuestAddress(at.0))?)
    }

    /// Reads guest memory.
    pub(crate) fn read(&self, at: Gpa, length: usize) -> anyhow::Result<Vec<u8>> {
        self.check(at, length)?;
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(at.0))?;
        Ok(bytes)
    }

    fn check(&self, at: Gpa, length: usize) -> anyhow::Result<()> {
        let (first, last) = self.span;
        let inside = at >= first && at <= last && length as u64 <= last.0 - at.0 + 1;
        ensure!(inside, "{length} bytes at {at} are not in guest memory {first}-{last}");
        Ok(())
    }

    /// What device and transport offer.
    pub(crate) fn offered_features(&self) -> Features {
        self.device.offered_features() | Self::TRANSPORT
    }

    /// The driver's choice.
    ///
    /// # Errors
    /// Bits that were not offered; nothing changes then.
    pub(crate) fn accept_features(&mut self, features: Features) -> anyhow::Result<()> {
        let unknown = features.difference(self.offered_features());
        ensure!(unknown.is_empty(), "bits {:#x} were not offered", unknown.bits());
        self.device.accept_features(features)?;
        let event_idx = features.contains(Features::RING_EVENT_IDX);
        self.requests.queue_mut().set_event_idx(event_idx);
        self.events.queue_mut().set_event_idx(event_idx);
        Ok(())
    }

    /// Resets the device: its queues are not enabled any more, and features are to be accepted anew.
    pub(crate) fn reset(&mut self) {
        self.device.reset();
        self.requests.queue_mut().reset();
        self.events.queue_mut().reset();
    }

    /// Tells the device where a queue lies, and that it may be used.
    pub(crate) fn enable_queue(&mut self, index: u16, layout: QueueLayout) -> anyhow::Result<()> {
        let queue = match index {
            REQUEST_QUEUE => self.requests.queue_mut(),
            EVENT_QUEUE => self.events.queue_mut(),
            _ => bail!("there is no queue {index}"),
        };
        place_queue(queue, layout).with_context(|| format!("queue {index} cannot be {layout:?}"))?;
        if !queue.is_valid(&self.memory) {
            queue.set_ready(false);
            bail!("queue {index} cannot lie at {}", layout.descriptors);
        }
        Ok(())
    }

    /// The driver notifies the device of what it put into a queue. Why a request was rejected goes to the log.
    pub(crate) fn notify(&mut self, index: u16) -> anyhow::Result<Kick> {
        let device = &mut self.device;
        Ok(match index {
            REQUEST_QUEUE => self.requests.kick(&self.memory, |readable, writable| {
                let handled = device.handle(readable, writable);
                if let Some(rejection) = handled.rejection {
                    tracing::warn!(status = rejection.status().map(|status| status.name()), "{rejection}");
                }
                handled.used
            })?,
            EVENT_QUEUE => self.events.kick(&self.memory, |buffer| device.fill_event(buffer))?,
            _ => bail!("there is no queue {index}"),
        })
    }
}
