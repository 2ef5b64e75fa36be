//! Interrupts of a device, received by the program.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use vfio_ioctls::{VfioDevice, VfioError};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The first MSI of a device, into an eventfd. Off when dropped.
pub struct Interrupt {
    device: Arc<VfioDevice>,
    event: EventFd,
    epoll: Epoll,
}

/// An interrupt cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum InterruptError {
    /// No eventfd.
    #[error("no eventfd: {0}")]
    EventFd(#[source] io::Error),
    /// VFIO refused: a device without MSI, or attached to a table without room for the doorbell.
    #[error("the device's MSI cannot be enabled: {0}")]
    Enable(#[source] VfioError),
    /// Waiting failed.
    #[error("waiting for the interrupt failed: {0}")]
    Wait(Errno),
}

impl InterruptError {
    fn wait(error: &io::Error) -> Self {
        Self::Wait(error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
    }
}

impl Interrupt {
    /// Turns the MSI of `device` on. Under a table of the guest it arrives only where the guest's table maps the
    /// doorbell, at the window that the host reports.
    ///
    /// # Errors
    /// [`InterruptError::EventFd`], [`InterruptError::Enable`].
    pub fn enable(device: &Arc<VfioDevice>) -> Result<Self, InterruptError> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(InterruptError::EventFd)?;
        let epoll = Epoll::new().map_err(InterruptError::EventFd)?;
        epoll
            .ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))
            .map_err(InterruptError::EventFd)?;
        device.enable_msi(vec![&event]).map_err(InterruptError::Enable)?;
        Ok(Self { device: device.clone(), event, epoll })
    }

    /// How many interrupts came since the last call; waits for the first at most `limit`, then answers 0.
    ///
    /// # Errors
    /// [`InterruptError::Wait`].
    pub fn wait(&self, limit: Duration) -> Result<u64, InterruptError> {
        let timeout = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
        loop {
            match self.epoll.wait(timeout, &mut [EpollEvent::default()]) {
                Ok(0) => return Ok(0),
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) => return Err(InterruptError::wait(&error)),
            }
        }
        match self.event.read() {
            Ok(count) => Ok(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(InterruptError::wait(&error)),
        }
    }
}

impl AsRawFd for Interrupt {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

impl Drop for Interrupt {
    fn drop(&mut self) {
        if let Err(error) = self.device.disable_msi() {
            tracing::warn!(%error, "the device's MSI stays on");
        }
    }
}
