//! A device's registers and configuration space, through VFIO's regions.

use std::sync::Arc;

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_BAR1_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX,
};
use vfio_ioctls::VfioDevice;

/// The registers in BAR 0 of a device. Little-endian, as PCI has it; each access is one of its width, at a multiple of
/// it. A read that fails gives all ones, like a read on the bus.
pub trait Registers: Send {
    /// 32 bits.
    fn read32(&self, offset: u64) -> u32;
    /// 64 bits.
    fn read64(&self, offset: u64) -> u64;
    /// 32 bits.
    fn write32(&mut self, offset: u64, value: u32);
    /// 64 bits. Older kernels make two accesses of it.
    fn write64(&mut self, offset: u64, value: u64);
    /// Lets the device answer here, and do DMA: memory space and bus master in its command register.
    fn enable(&mut self);
    /// Whether the device has no other BARs than the first.
    fn is_only_bar(&self) -> bool;
}

/// The registers of a device that VFIO has.
pub struct Bar0 {
    device: Arc<VfioDevice>,
}

impl Bar0 {
    /// Of `device`.
    pub fn new(device: Arc<VfioDevice>) -> Self {
        Self { device }
    }

    fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut bytes = [0xff; N];
        self.device.region_read(VFIO_PCI_BAR0_REGION_INDEX, &mut bytes, offset);
        bytes
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        self.device.region_write(VFIO_PCI_BAR0_REGION_INDEX, bytes, offset);
    }
}

impl Registers for Bar0 {
    fn read32(&self, offset: u64) -> u32 {
        u32::from_le_bytes(self.read(offset))
    }

    fn read64(&self, offset: u64) -> u64 {
        u64::from_le_bytes(self.read(offset))
    }

    fn write32(&mut self, offset: u64, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    fn write64(&mut self, offset: u64, value: u64) {
        self.write(offset, &value.to_le_bytes());
    }

    fn enable(&mut self) {
        Config::new(self.device.clone()).enable();
    }

    fn is_only_bar(&self) -> bool {
        (VFIO_PCI_BAR1_REGION_INDEX..VFIO_PCI_BAR1_REGION_INDEX + 5)
            .all(|bar| self.device.get_region_size(bar) == 0)
    }
}

/// The configuration space of a device that VFIO has.
pub(super) struct Config {
    device: Arc<VfioDevice>,
}

impl Config {
    pub(super) fn new(device: Arc<VfioDevice>) -> Self {
        Self { device }
    }

    /// Vendor and device ID.
    pub(super) fn ids(&self) -> (u16, u16) {
        (self.read16(0x00), self.read16(0x02))
    }

    fn enable(&self) {
        const COMMAND: u64 = 0x04;
        const MEMORY_SPACE: u16 = 1 << 1;
        const BUS_MASTER: u16 = 1 << 2;
        let command = self.read16(COMMAND) | MEMORY_SPACE | BUS_MASTER;
        self.device.region_write(VFIO_PCI_CONFIG_REGION_INDEX, &command.to_le_bytes(), COMMAND);
    }

    fn read16(&self, offset: u64) -> u16 {
        let mut bytes = [0xff; 2];
        self.device.region_read(VFIO_PCI_CONFIG_REGION_INDEX, &mut bytes, offset);
        u16::from_le_bytes(bytes)
    }
}
