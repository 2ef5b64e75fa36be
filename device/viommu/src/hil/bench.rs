//! What the checks run on: a kernel, and devices that do DMA when told.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use pgtable_formats::Iova;
use viommu_host_iommufd::Device;
use viommu_host_iommufd::counted::Counted;
use viommu_host_iommufd::engine::{Abilities, DmaError, Engine};
use viommu_host_iommufd::kernel::Iommufd;
use viommu_wire::EndpointId;
use vm_memory::GuestMemoryMmap;

/// A kernel with devices. The real one, or one that is made up.
pub(super) trait Bench {
    /// The kernel.
    type Kernel: Iommufd;

    /// The kernel, whose calls are counted.
    ///
    /// # Errors
    /// It was given back.
    fn kernel(&self) -> anyhow::Result<Arc<Counted<Self::Kernel>>>;

    /// Calls into the kernel so far, by kind.
    fn ioctls(&self) -> BTreeMap<&'static str, u64>;

    /// How many devices there are.
    fn count(&self) -> usize;

    /// What a device is called.
    fn name(&self, index: usize) -> String;

    /// A device.
    ///
    /// # Errors
    /// There is no such device.
    fn station(&mut self, index: usize) -> anyhow::Result<&mut Station>;

    /// The memory of the guest that comes next. Kernels that are made up have no other way to it.
    fn memory_is(&mut self, memory: &GuestMemoryMmap);

    /// A check is over, and its machine is gone.
    ///
    /// # Errors
    /// Something is left of it.
    fn settle(&mut self) -> anyhow::Result<()>;

    /// How to start another process that works with a device, until it is killed. It says `ready` when it does. `None`:
    /// no other process can have the devices.
    fn worker(&self, index: usize) -> Option<Command>;

    /// Gives all devices and the kernel back, so that another process can have them.
    fn let_go(&mut self);

    /// Takes them anew.
    ///
    /// # Errors
    /// They cannot be had any more.
    fn take_again(&mut self) -> anyhow::Result<()>;
}

/// What a kernel counted, by the kernel's own names.
pub(super) fn by_name<K>(kernel: &Counted<K>) -> BTreeMap<&'static str, u64> {
    let counts = kernel.counts();
    counts.iter().filter(|(call, _)| call.is_ioctl()).map(|(call, count)| (call.name(), count)).collect()
}

/// A device at its place, and what makes it work.
pub(super) struct Station {
    endpoint: EndpointId,
    device: Device,
    engine: Box<dyn Engine>,
    controls: Box<dyn Controls>,
    /// What the engine would write: known from the last thing that it read.
    holds: Option<Vec<u8>>,
    /// How long the first transfer took.
    pace: Option<Duration>,
    random: super::random::Random,
}

/// What can be done with a device besides DMA.
pub(super) trait Controls {
    /// Resets the device.
    ///
    /// # Errors
    /// It has no reset: a skip.
    fn reset(&mut self) -> anyhow::Result<()>;

    /// Turns the device's MSI on until the answer is dropped.
    ///
    /// # Errors
    /// It has no MSI: a skip. Or the kernel refuses.
    fn interrupts(&mut self) -> anyhow::Result<Box<dyn Interrupts>>;
}

/// Interrupts of a device, as they arrive.
pub(super) trait Interrupts {
    /// How many arrived since the last call; waits for the first at most so long.
    ///
    /// # Errors
    /// Waiting failed.
    fn wait(&mut self, limit: Duration) -> anyhow::Result<u64>;
}

/// What a device says of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moved {
    /// It was done, and the device would know.
    Done,
    /// It was refused.
    Refused,
    /// The device does not know.
    Unknown,
}

/// Bytes of a page: as much as the largest transfer that is asked for.
const PAGE_BYTES: u16 = 0x1000;
/// Beyond this a transfer is one to be sparing with.
const SLOW: Duration = Duration::from_millis(20);

impl Station {
    pub(super) fn new(
        endpoint: EndpointId,
        device: Device,
        engine: Box<dyn Engine>,
        controls: Box<dyn Controls>,
    ) -> Self {
        let random = super::random::Random::new(u64::from(endpoint.0) + 1);
        Self { endpoint, device, engine, controls, holds: None, pace: None, random }
    }

    /// What the guest calls it.
    pub(super) const fn endpoint(&self) -> EndpointId {
        self.endpoint
    }

    /// For the host.
    pub(super) fn device(&self) -> (EndpointId, Device) {
        (self.endpoint, self.device.clone())
    }

    /// What the engine is.
    pub(super) fn engine_name(&self) -> &'static str {
        self.engine.name()
    }

    /// What else can be done with it.
    pub(super) fn controls(&mut self) -> &mut dyn Controls {
        &mut *self.controls
    }

    /// Whether the device can read memory.
    pub(super) fn reads(&self) -> bool {
        self.engine.abilities().contains(Abilities::READ)
    }

    /// Whether the device can raise interrupts.
    pub(super) fn interrupts(&self) -> bool {
        self.engine.abilities().contains(Abilities::INTERRUPT)
    }

    /// Whether the device knows that an access was refused.
    pub(super) fn tells_faults(&self) -> bool {
        self.engine.abilities().contains(Abilities::TELLS_FAULTS)
    }

    /// Whether transfers take so long that there should be few.
    pub(super) fn is_slow(&self) -> bool {
        self.pace.is_some_and(|pace| pace > SLOW)
    }

    /// Whether the engine has to read something before it can write a page.
    pub(super) fn is_empty(&self) -> bool {
        let held = self.holds.as_ref().map_or(0, Vec::len);
        held < self.engine.limit().min(usize::from(PAGE_BYTES)) && self.engine.pattern(1).is_none()
    }

    /// The bytes that [`write`](Self::write) stores.
    ///
    /// # Errors
    /// The device cannot move so much, or what it would store is not known.
    pub(super) fn data(&self, length: usize) -> anyhow::Result<Vec<u8>> {
        let limit = self.engine.limit();
        ensure!(length <= limit, "{} moves at most {limit} bytes at once", self.engine.name());
        if let Some(pattern) = self.engine.pattern(length) {
            return Ok(pattern);
        }
        let held = self.holds.as_ref().and_then(|held| held.get(..length));
        Ok(held.context("what the device would write is not known")?.to_vec())
    }

    /// Bytes that were not there before.
    pub(super) fn fresh(&mut self, length: usize) -> Vec<u8> {
        // Neither zeros nor what memory is filled with.
        (0..length).map(|_| u8::try_from(self.random.below(0x80)).unwrap_or(0) | 1).collect()
    }

    /// The device writes [`data`](Self::data) at `to`.
    ///
    /// # Errors
    /// It does not work.
    pub(super) fn write(&mut self, to: Iova, length: usize) -> anyhow::Result<Moved> {
        let start = Instant::now();
        let done = self.engine.write(to, length);
        self.pace.get_or_insert(start.elapsed());
        self.moved(done, "write", to)
    }

    /// The device reads at `from`, where `expected` is.
    ///
    /// # Errors
    /// It does not work.
    pub(super) fn read(&mut self, from: Iova, expected: Vec<u8>) -> anyhow::Result<Moved> {
        // Until it is known to have come through.
        self.holds = None;
        let done = self.engine.read(from, expected.len());
        let moved = self.moved(done, "read", from)?;
        if moved != Moved::Refused {
            self.holds = Some(expected);
        }
        Ok(moved)
    }

    /// What the device would write is not known any more.
    pub(super) fn forget(&mut self) {
        self.holds = None;
    }

    /// Raises an interrupt, and takes it back.
    ///
    /// # Errors
    /// It does not work.
    pub(super) fn raise(&mut self) -> anyhow::Result<()> {
        self.engine.raise_interrupt().context("cannot raise an interrupt")?;
        self.engine.acknowledge_interrupt().context("cannot take the interrupt back")
    }

    /// Puts the engine in the state in which it started.
    ///
    /// # Errors
    /// It does not answer.
    pub(super) fn restart(&mut self) -> anyhow::Result<()> {
        self.forget();
        Ok(self.engine.restart()?)
    }

    fn moved(&self, done: Result<(), DmaError>, what: &str, at: Iova) -> anyhow::Result<Moved> {
        match done {
            Ok(()) if self.tells_faults() => Ok(Moved::Done),
            Ok(()) => Ok(Moved::Unknown),
            Err(DmaError::Faulted) => Ok(Moved::Refused),
            Err(error) => Err(error).with_context(|| format!("DMA {what} at {at}")),
        }
    }
}
