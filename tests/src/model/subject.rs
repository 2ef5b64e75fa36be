//! What is compared with the model: the device called directly, or behind its queues.

use std::sync::Arc;

use pgtable_formats::{Access, AccessKind};
use viommu_device::Device;
use viommu_device::host::{FaultCause, Stream};
use viommu_device::soft::{Piece, SoftHost};
use viommu_queue::GuestTables;
use viommu_wire::{EndpointId, Features, Iova, Pasid};

use super::layout::MEMORY_BYTES;
use super::words::{self, Kind};
use super::world::World;
use crate::rig::{Bare, Machine, Memory, Reply, Rig, Sends, Setup};

type SoftDevice = Device<SoftHost<GuestTables>>;

/// A device under test.
pub trait Subject {
    /// As after power-on, nothing negotiated.
    fn power_on(world: &Arc<World>) -> Self;

    /// Sends a request. `cut` says into how many parts each side of the chain is cut, where there is a chain.
    fn request(&mut self, readable: &[u8], writable: usize, cut: usize) -> Reply;

    /// Calls the device itself.
    fn with_device<R>(&mut self, call: impl FnOnce(&mut SoftDevice) -> R) -> R;

    /// Guest memory.
    fn memory(&self) -> &Memory;

    /// Device or system reset, and then the driver accepts these of the features on offer.
    fn reset(&mut self, system: bool, accept: u64);

    /// The driver accepts exactly these, without a reset. `false`: refused.
    fn accept(&mut self, features: u64) -> bool;

    /// Offers an event buffer: what came back, or `None` if nothing did.
    fn take_event(&mut self, len: usize) -> Option<Vec<u8>>;

    /// Makes an access, which is recorded where it faults.
    fn access(
        &mut self,
        id: u32,
        pasid: Option<u32>,
        iova: u64,
        access: words::Access,
    ) -> Result<Piece, FaultCause> {
        let (stream, access) = (stream(id, pasid), real(access));
        self.with_device(|device| device.host_mut().translate(stream, Iova(iova), access, |piece| piece))
    }

    /// The same, not recorded.
    fn peek(
        &mut self,
        id: u32,
        pasid: Option<u32>,
        iova: u64,
        access: words::Access,
    ) -> Result<Piece, FaultCause> {
        let (stream, access) = (stream(id, pasid), real(access));
        self.with_device(|device| device.host_mut().peek(stream, Iova(iova), access))
    }
}

/// The device called directly.
pub struct Direct {
    bare: Bare,
    memory: Memory,
}

impl Subject for Direct {
    fn power_on(world: &Arc<World>) -> Self {
        let (bare, memory) = Bare::new(&setup(world, 0));
        Self { bare, memory }
    }

    fn request(&mut self, readable: &[u8], writable: usize, _: usize) -> Reply {
        self.bare.raw(readable, writable)
    }

    fn with_device<R>(&mut self, call: impl FnOnce(&mut SoftDevice) -> R) -> R {
        call(&mut self.bare.device)
    }

    fn memory(&self) -> &Memory {
        &self.memory
    }

    fn reset(&mut self, system: bool, accept: u64) {
        let device = &mut self.bare.device;
        if system {
            device.system_reset();
        } else {
            device.reset();
        }
        let accepted = Features::from_bits_retain(accept) & device.offered_features();
        device.accept_features(accepted).expect("what is offered");
    }

    fn accept(&mut self, features: u64) -> bool {
        self.bare.device.accept_features(Features::from_bits_retain(features)).is_ok()
    }

    fn take_event(&mut self, len: usize) -> Option<Vec<u8>> {
        let mut buffer = vec![0; len];
        let used = self.bare.device.fill_event(&mut buffer)?;
        buffer.truncate(used);
        Some(buffer)
    }
}

/// The device behind its queues.
pub struct Queued {
    /// `None` while it is reset.
    rig: Option<Rig>,
    memory: Memory,
}

/// Features of the transport that stay negotiated.
const TRANSPORT: Features =
    Features::VERSION_1.union(Features::RING_EVENT_IDX).union(Features::RING_INDIRECT_DESC);

impl Queued {
    fn rig(&mut self) -> &mut Rig {
        self.rig.as_mut().expect("a rig")
    }
}

impl Subject for Queued {
    fn power_on(world: &Arc<World>) -> Self {
        let rig = Rig::new(setup(world, TRANSPORT.bits()));
        let memory = rig.machine.memory().clone();
        Self { rig: Some(rig), memory }
    }

    fn request(&mut self, readable: &[u8], writable: usize, cut: usize) -> Reply {
        if readable.is_empty() && writable == 0 {
            return Reply { used: 0, bytes: vec![] }; // A chain has at least one byte.
        }
        let size = |len: usize| len.div_ceil(cut.clamp(1, 8)).max(1);
        let parts: Vec<&[u8]> = readable.chunks(size(readable.len())).collect();
        let step = size(writable);
        let room: Vec<usize> = (0..writable).step_by(step).map(|at| step.min(writable - at)).collect();
        self.rig().raw_parts(&parts, &room)
    }

    fn with_device<R>(&mut self, call: impl FnOnce(&mut SoftDevice) -> R) -> R {
        call(self.rig().machine.lock().device_mut())
    }

    fn memory(&self) -> &Memory {
        &self.memory
    }

    fn reset(&mut self, system: bool, accept: u64) {
        let machine: Machine = self.rig().machine.clone();
        if system {
            machine.lock().system_reset();
        } else {
            machine.lock().reset();
        }
        self.rig = Some(Rig::start(machine, Some(Features::from_bits_retain(accept) | TRANSPORT)));
    }

    fn accept(&mut self, features: u64) -> bool {
        let features = Features::from_bits_retain(features) | TRANSPORT;
        self.rig().machine.lock().accept_features(features).is_ok()
    }

    fn take_event(&mut self, len: usize) -> Option<Vec<u8>> {
        // A buffer would stay in the ring for a later event.
        if !self.with_device(SoftDevice::event_pending) {
            return None;
        }
        let rig = self.rig();
        rig.post_event_buffer(len.max(1)); // A buffer has at least one byte.
        let mut replies = rig.event_replies();
        assert_eq!(replies.len(), 1, "an event and a buffer for it");
        let mut reply = replies.remove(0);
        reply.bytes.truncate(reply.used);
        Some(reply.bytes)
    }
}

fn setup(world: &Arc<World>, accept: u64) -> Setup {
    Setup {
        config: world.device_config(),
        endpoints: world.device_endpoints(),
        accept: Some(Features::from_bits_retain(accept)),
        queue_size: 256,
        memory_bytes: MEMORY_BYTES,
    }
}

fn stream(id: u32, pasid: Option<u32>) -> Stream {
    Stream { endpoint: EndpointId(id), pasid: pasid.map(|pasid| Pasid::new(pasid).expect("20 bits")) }
}

const fn real(access: words::Access) -> Access {
    let kind = match access.kind {
        Kind::Read => AccessKind::Read,
        Kind::Write => AccessKind::Write,
        Kind::Execute => AccessKind::Execute,
    };
    Access { kind, privileged: access.privileged }
}
