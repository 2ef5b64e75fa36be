//! The device called directly.

use std::sync::Arc;

use viommu_device::Device;
use viommu_wire::Features;

use super::super::layout::MEMORY_BYTES;
use super::super::world::World;
use super::{Called, Machine, Native, Observed, Subject, accept, reset};
use crate::rig::{Memory, Reply, UNWRITTEN};

/// The device without queues, over a machine.
pub struct Direct<H: Machine = Native> {
    device: Device<Observed<H>>,
    memory: Memory,
}

impl<H: Machine> Subject for Direct<H> {
    fn power_on(world: &Arc<World>) -> Self {
        let memory = Memory::new(MEMORY_BYTES);
        let host = Observed::new(H::make(world, &memory));
        let device = Device::new(world.device_config(), host).expect("a configuration");
        Self { device, memory }
    }

    fn worlds() -> Vec<World> {
        H::worlds()
    }

    fn request(&mut self, readable: &[u8], writable: usize, _: usize) -> Reply {
        let mut bytes = vec![UNWRITTEN; writable];
        let used = self.device.handle(readable, &mut bytes).used;
        Reply { used, bytes }
    }

    fn with_device<R>(&mut self, call: impl FnOnce(&mut dyn Called) -> R) -> R {
        call(&mut self.device)
    }

    fn memory(&self) -> &Memory {
        &self.memory
    }

    fn reset(&mut self, system: bool, features: u64) {
        reset(&mut self.device, system);
        let accepted = Features::from_bits_retain(features) & self.device.offered_features();
        assert!(accept(&mut self.device, accepted.bits()), "what is offered");
    }

    fn accept(&mut self, features: u64) -> bool {
        accept(&mut self.device, features)
    }

    fn take_event(&mut self, len: usize) -> Option<Vec<u8>> {
        let mut buffer = vec![0; len];
        let used = self.device.fill_event(&mut buffer)?;
        buffer.truncate(used);
        Some(buffer)
    }
}
