//! The device without queues.

use viommu_device::host::Host;
use viommu_device::soft::SoftHost;
use viommu_device::{Device, DeviceConfig, Features};
use viommu_queue::GuestTables;
use viommu_wire::EndpointId;

use super::machine::Setup;
use super::{Memory, Reply, Sends, UNWRITTEN};

/// A device that is called directly.
pub struct Bare<H: Host = SoftHost<GuestTables>> {
    /// The device.
    pub device: Device<H>,
}

impl Bare {
    /// Over a software host, and the memory of its guest.
    pub fn new(setup: &Setup) -> (Self, Memory) {
        let (host, memory) = soft_host(setup);
        (Self::over(setup.config.clone(), setup.accept, host), memory)
    }
}

impl<H: Host> Bare<H> {
    /// Over any host, with `accept` negotiated (`None`: all).
    pub fn over(config: DeviceConfig, accept: Option<Features>, host: H) -> Self {
        let mut device = Device::new(config, host).expect("a configuration");
        let offered = device.offered_features();
        device.accept_features(accept.map_or(offered, |accept| accept & offered)).expect("what is offered");
        Self { device }
    }
}

impl<H: Host> Sends for Bare<H> {
    fn raw(&mut self, readable: &[u8], writable: usize) -> Reply {
        let mut bytes = vec![UNWRITTEN; writable];
        let used = self.device.handle(readable, &mut bytes).used;
        Reply { used, bytes }
    }
}

/// A software host with the endpoints of `setup`, and the memory of its guest.
pub(crate) fn soft_host(setup: &Setup) -> (SoftHost<GuestTables>, Memory) {
    let memory = Memory::new(setup.memory_bytes);
    let mut host = SoftHost::new(memory.tables().clone());
    for (id, caps) in &setup.endpoints {
        host.add_endpoint(EndpointId(*id), caps.clone()).expect("an endpoint");
    }
    (host, memory)
}
