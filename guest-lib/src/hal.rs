//! What the platform (a guest kernel, firmware, a test) lends to the driver: memory, allocation, a transport.
//!
//! All addresses are guest-physical, as the device sees them: an IOMMU does not translate its own rings.

#[cfg(test)]
pub(crate) mod fake;

use core::sync::atomic::{Ordering, fence};

use pgtable_formats::{NotMemory, TableAlloc, TableMem};
use viommu_wire::{Features, Gpa};

/// Memory that driver and device share: rings and request buffers.
///
/// # Implementations
/// The device changes this memory at any time, so every method accesses it as volatile or atomic and never through
/// a Rust reference. On a machine where devices are not coherent, the memory is mapped uncached.
pub trait GuestMem {
    /// Copies `bytes.len()` bytes from `at` on. How the copy is cut into accesses does not matter.
    ///
    /// # Errors
    /// [`NotMemory`] where not all of it is memory.
    fn read(&self, at: Gpa, bytes: &mut [u8]) -> Result<(), NotMemory>;

    /// Copies `bytes` to `at`. How the copy is cut into accesses does not matter.
    ///
    /// # Errors
    /// [`NotMemory`] where not all of it is memory.
    fn write(&self, at: Gpa, bytes: &[u8]) -> Result<(), NotMemory>;

    /// Loads the little-endian word at `at`, a multiple of 2, in one access that no later access passes (acquire).
    ///
    /// # Errors
    /// [`NotMemory`] where no memory is behind `at`.
    fn load_acquire(&self, at: Gpa) -> Result<u16, NotMemory>;

    /// Stores the little-endian word at `at`, a multiple of 2, in one access that passes no earlier one (release).
    ///
    /// # Errors
    /// [`NotMemory`] where no memory is behind `at`.
    fn store_release(&self, at: Gpa, value: u16) -> Result<(), NotMemory>;

    /// Orders every access before it against every access after it, stores against later loads included.
    fn barrier(&self) {
        fence(Ordering::SeqCst);
    }
}

impl<M: GuestMem + ?Sized> GuestMem for &M {
    fn read(&self, at: Gpa, bytes: &mut [u8]) -> Result<(), NotMemory> {
        (**self).read(at, bytes)
    }

    fn write(&self, at: Gpa, bytes: &[u8]) -> Result<(), NotMemory> {
        (**self).write(at, bytes)
    }

    fn load_acquire(&self, at: Gpa) -> Result<u16, NotMemory> {
        (**self).load_acquire(at)
    }

    fn store_release(&self, at: Gpa, value: u16) -> Result<(), NotMemory> {
        (**self).store_release(at, value)
    }

    fn barrier(&self) {
        (**self).barrier();
    }
}

/// Memory and an allocator over it, apart, so that tables can be read while new ones are taken.
pub trait Platform {
    /// Rings, buffers and tables lie here.
    type Memory: GuestMem + TableMem;
    /// Gives rings, buffers and tables: zeroed, aligned to their size.
    type Alloc: TableAlloc;

    /// The memory.
    fn memory(&self) -> &Self::Memory;

    /// Both at once.
    fn parts(&mut self) -> (&Self::Memory, &mut Self::Alloc);
}

/// The plain [`Platform`]: a memory and an allocator.
#[derive(Clone, Debug)]
pub struct Parts<M, A> {
    /// The memory.
    pub memory: M,
    /// The allocator.
    pub alloc: A,
}

impl<M: GuestMem + TableMem, A: TableAlloc> Platform for Parts<M, A> {
    type Memory = M;
    type Alloc = A;

    fn memory(&self) -> &M {
        &self.memory
    }

    fn parts(&mut self) -> (&M, &mut A) {
        (&self.memory, &mut self.alloc)
    }
}

/// Where a virtqueue lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLayout {
    /// Number of descriptors, a power of two.
    pub size: u16,
    /// Descriptor table.
    pub descriptors: Gpa,
    /// Available ring, "driver area".
    pub available: Gpa,
    /// Used ring, "device area".
    pub used: Gpa,
}

/// The way to the device: virtio over PCI, MMIO, or a call inside one process (virtio 1.4, chapter 4).
///
/// Methods come in the order of device initialization (virtio 1.4, 3.1).
pub trait Transport {
    /// Resets the device and waits until it is; then sets ACKNOWLEDGE and DRIVER.
    fn reset(&mut self);

    /// Feature bits 63:0 that the device offers.
    fn offered_features(&mut self) -> Features;

    /// Writes the accepted features and FEATURES_OK.
    ///
    /// # Errors
    /// [`TransportError::FeaturesRefused`] where the device takes FEATURES_OK back.
    fn accept_features(&mut self, features: Features) -> Result<(), TransportError>;

    /// How many descriptors queue `queue` may have; 0 where there is no such queue.
    fn max_queue_size(&mut self, queue: u16) -> u16;

    /// Tells the device where a queue lies and enables it.
    ///
    /// # Errors
    /// [`TransportError::Queue`] where the device cannot have it.
    fn enable_queue(&mut self, queue: u16, layout: QueueLayout) -> Result<(), TransportError>;

    /// Sets DRIVER_OK: from here on the device works.
    fn start(&mut self);

    /// Sets FAILED: the driver gave up.
    fn fail(&mut self);

    /// Tells the device that queue `queue` has new buffers. Every store before it is visible to the device.
    fn notify(&mut self, queue: u16);

    /// Called while the driver waits for queue `queue`: pauses, yields the processor, sleeps until an interrupt, or
    /// lets a device in the same process run.
    ///
    /// # Errors
    /// [`TransportError::Gone`] where waiting is of no use any more: time is up, or the device says
    /// DEVICE_NEEDS_RESET.
    fn wait(&mut self, queue: u16) -> Result<(), TransportError>;

    /// Changes whenever the configuration may have changed as a whole.
    fn config_generation(&mut self) -> u32;

    /// Reads device-specific configuration.
    fn read_config(&mut self, offset: usize, bytes: &mut [u8]);

    /// Writes device-specific configuration.
    fn write_config(&mut self, offset: usize, bytes: &[u8]);
}

/// What goes wrong between driver and device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// The device does not work with the features accepted.
    #[error("the device refuses the features")]
    FeaturesRefused,
    /// The device does not take the queue.
    #[error("the device refuses queue {queue}")]
    Queue {
        /// Its index.
        queue: u16,
    },
    /// The device does not answer any more.
    #[error("the device does not answer")]
    Gone,
}
