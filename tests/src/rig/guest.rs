//! The driver of `viommu-guest` on a machine.

use viommu_guest::hal::Parts;
use viommu_guest::{Driver, DriverOptions, Endpoint, InitError};
use viommu_wire::EndpointId;

use super::machine::{Machine, Setup};
use super::{Alloc, Memory, Port, Transport};

/// A driver, and the machine that it runs on.
pub struct Guest<D: Port = Machine> {
    /// The driver.
    pub driver: Driver<Parts<Memory, Alloc>, Transport<D>>,
    /// The device's end, and what is behind it.
    pub machine: D,
}

impl Guest {
    /// Brings a machine up with all features that driver and device have.
    pub fn new(setup: Setup) -> Self {
        Self::with_options(setup, DriverOptions::default()).expect("a driver")
    }

    /// Brings a machine up.
    ///
    /// # Errors
    /// As the driver says.
    pub fn with_options(setup: Setup, options: DriverOptions) -> Result<Self, InitError> {
        let machine = Machine::new(setup);
        let memory = machine.memory().clone();
        Guest::over(machine, &memory, options)
    }
}

impl<D: Port + Clone> Guest<D> {
    /// Brings up the device behind `machine`, which shares `memory`.
    ///
    /// # Errors
    /// As the driver says.
    pub fn over(machine: D, memory: &Memory, options: DriverOptions) -> Result<Self, InitError> {
        let platform = Parts { memory: memory.clone(), alloc: Alloc::new(memory) };
        let driver = Driver::new(platform, Transport::new(machine.clone()), options)?;
        Ok(Self { driver, machine })
    }

    /// Probes an endpoint.
    pub fn probe(&mut self, endpoint: u32) -> Endpoint {
        self.driver.probe(EndpointId(endpoint)).expect("an endpoint")
    }
}
