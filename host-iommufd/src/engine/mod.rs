//! Devices that a program can drive for DMA, for checks of the hardware: the DMA is a real device's, so what translates
//! it is the real IOMMU.
//!
//! [`probe`] looks at a device's IDs and answers its [`Engine`]. Two devices of QEMU are known, [`Edu`] and
//! [`TestDevice`]; neither is of use for anything but tests.
//!
//! # Adding a driver
//!
//! 1. A file of this module, with a struct over [`Registers`] (so that it can be tested without the device), and an
//!    `impl Engine` for it. [`Engine::abilities`] says which methods work; the others keep their default, which answers
//!    [`DmaError::Unsupported`]. Every wait is bounded.
//! 2. A line in `DRIVERS`: vendor, device, and a function that makes sure that it is the device (IDs of emulated
//!    devices are often shared) and puts it in a known state.
//!
//! A device with a driver in user space qualifies if its descriptors hold I/O virtual addresses, it can be told to read
//! or write some bytes there, and `VFIO_DEVICE_RESET` stops it.

mod edu;
mod interrupt;
mod registers;
mod test_device;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use pgtable_formats::Iova;
use vfio_ioctls::VfioDevice;

pub use self::edu::Edu;
pub use self::interrupt::{Interrupt, InterruptError};
use self::registers::Config;
pub use self::registers::{Bar0, Registers};
pub use self::test_device::TestDevice;

bitflags::bitflags! {
    /// What an [`Engine`] can do.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Abilities: u8 {
        /// [`Engine::write`].
        const WRITE = 1 << 0;
        /// [`Engine::read`].
        const READ = 1 << 1;
        /// It is told when an access is refused, and says so by [`DmaError::Faulted`]. Without it a refused access ends
        /// like any other, and only memory and the IOMMU's events tell.
        const TELLS_FAULTS = 1 << 2;
        /// [`Engine::raise_interrupt`].
        const INTERRUPT = 1 << 3;
    }
}

/// A device that does DMA when told.
///
/// Each access is over when the method returns, whatever it returns, but for [`DmaError::Timeout`].
pub trait Engine: Send {
    /// What the device is, for people.
    fn name(&self) -> &'static str;

    /// Which of the methods work.
    fn abilities(&self) -> Abilities;

    /// The most bytes of one access.
    fn limit(&self) -> usize;

    /// The bytes that [`write`](Self::write) stores, where the device cannot store others.
    fn pattern(&self, length: usize) -> Option<Vec<u8>> {
        let _ = length;
        None
    }

    /// The device stores `length` bytes at `to`: its [`pattern`](Self::pattern), or else what it
    /// [read](Self::read) last.
    ///
    /// # Errors
    /// [`DmaError`]. Part of the bytes may have been stored.
    fn write(&mut self, to: Iova, length: usize) -> Result<(), DmaError> {
        let _ = (to, length);
        Err(DmaError::Unsupported)
    }

    /// The device loads `length` bytes from `from`, and keeps them.
    ///
    /// # Errors
    /// [`DmaError`].
    fn read(&mut self, from: Iova, length: usize) -> Result<(), DmaError> {
        let _ = (from, length);
        Err(DmaError::Unsupported)
    }

    /// The device loads `length` bytes from `from`, and stores them at `to`.
    ///
    /// # Errors
    /// [`DmaError`].
    fn copy(&mut self, from: Iova, to: Iova, length: usize) -> Result<(), DmaError> {
        self.read(from, length)?;
        self.write(to, length)
    }

    /// The device raises an interrupt; [`Interrupt`] receives it.
    ///
    /// # Errors
    /// [`DmaError::Unsupported`].
    fn raise_interrupt(&mut self) -> Result<(), DmaError> {
        Err(DmaError::Unsupported)
    }

    /// Takes the interrupt back, so that it can be raised again.
    ///
    /// # Errors
    /// [`DmaError::Unsupported`].
    fn acknowledge_interrupt(&mut self) -> Result<(), DmaError> {
        Err(DmaError::Unsupported)
    }

    /// Puts the device in the state that [`probe`] left it in: for use after `VFIO_DEVICE_RESET`, which turns
    /// bus mastering off.
    ///
    /// # Errors
    /// [`DmaError::Broken`] where the device does not answer any more.
    fn restart(&mut self) -> Result<(), DmaError>;
}

/// A DMA that was not done, as far as the device knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DmaError {
    /// The access was refused.
    #[error("the device's access was refused")]
    Faulted,
    /// The device was not done in time. It may still be at it.
    #[error("the device was not done within {0:?}")]
    Timeout(Duration),
    /// The device cannot do that.
    #[error("the device cannot do that")]
    Unsupported,
    /// So many bytes at once are too much, or none.
    #[error("{length} bytes: the device does 1 to {limit} at once")]
    Length {
        /// What was asked.
        length: usize,
        /// [`Engine::limit`].
        limit: usize,
    },
    /// The device does not take so long an address.
    #[error("the device does not take address {0}")]
    Address(Iova),
    /// The device answers what it should not. The number is its own.
    #[error("the device answered {0:#x}")]
    Broken(u64),
}

impl DmaError {
    fn check_length(length: usize, limit: usize) -> Result<(), Self> {
        if (1..=limit).contains(&length) { Ok(()) } else { Err(Self::Length { length, limit }) }
    }
}

/// A device that no driver here knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no driver for PCI device {vendor:04x}:{device:04x} (there are drivers for {})", KnownIds)]
pub struct UnknownDevice {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
}

/// The driver for `device`, which must be bound and not in use by anybody else. Lets the device answer at its registers
/// and do DMA (memory space and bus master in its command register); it should be attached to something before.
///
/// # Errors
/// [`UnknownDevice`], also where the IDs are known and it is another device all the same.
pub fn probe(device: &Arc<VfioDevice>) -> Result<Box<dyn Engine>, UnknownDevice> {
    let config = Config::new(device.clone());
    let (vendor, id) = config.ids();
    for driver in DRIVERS {
        if (driver.vendor, driver.device) == (vendor, id)
            && let Some(engine) = (driver.start)(device)
        {
            return Ok(engine);
        }
    }
    Err(UnknownDevice { vendor, device: id })
}

struct Driver {
    vendor: u16,
    device: u16,
    start: fn(&Arc<VfioDevice>) -> Option<Box<dyn Engine>>,
}

const DRIVERS: &[Driver] = &[
    Driver {
        vendor: 0x1234,
        device: 0x11e8,
        start: |device| Edu::start(Bar0::new(device.clone())).ok().map(|engine| Box::new(engine) as _),
    },
    Driver {
        vendor: 0x1b36,
        device: 0x0005,
        start: |device| TestDevice::start(Bar0::new(device.clone())).ok().map(|engine| Box::new(engine) as _),
    },
];

struct KnownIds;

impl fmt::Display for KnownIds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, driver) in DRIVERS.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{:04x}:{:04x}", driver.vendor, driver.device)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_devices_are_told_with_what_is_known() {
        let error = UnknownDevice { vendor: 0x8086, device: 0x10d3 };
        assert_eq!(
            error.to_string(),
            "no driver for PCI device 8086:10d3 (there are drivers for 1234:11e8, 1b36:0005)"
        );
    }

    #[test]
    fn what_a_device_cannot_is_unsupported() {
        struct Nothing;
        impl Engine for Nothing {
            fn name(&self) -> &'static str {
                "nothing"
            }
            fn abilities(&self) -> Abilities {
                Abilities::empty()
            }
            fn limit(&self) -> usize {
                0
            }
            fn restart(&mut self) -> Result<(), DmaError> {
                Ok(())
            }
        }
        let mut engine: Box<dyn Engine> = Box::new(Nothing);
        assert_eq!(engine.copy(Iova(0), Iova(0), 1), Err(DmaError::Unsupported));
        assert_eq!(engine.write(Iova(0), 1), Err(DmaError::Unsupported));
        assert_eq!(engine.raise_interrupt(), Err(DmaError::Unsupported));
        assert_eq!(engine.acknowledge_interrupt(), Err(DmaError::Unsupported));
        assert_eq!(engine.pattern(4), None);
    }
}
