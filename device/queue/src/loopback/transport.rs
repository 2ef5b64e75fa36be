//! The driver's way to the device.

use std::ops::Deref;

use viommu_device::Features;
use viommu_guest::hal::{self, QueueLayout, TransportError};

use crate::error::QueueError;
use crate::virtio_iommu::{Notify, REQUEST_QUEUE};

/// The device's end of a [`Transport`]. Whatever leads to a port is one.
pub trait Port {
    /// Device reset.
    fn reset(&self);

    /// Features on offer.
    fn offered(&self) -> Features;

    /// The driver's choice.
    ///
    /// # Errors
    /// [`TransportError::FeaturesRefused`].
    fn accept(&self, features: Features) -> Result<(), TransportError>;

    /// The largest size of a queue, 0 where there is none of that number.
    fn max_queue_size(&self, queue: u16) -> u16;

    /// Where a queue lies; from here on it is enabled.
    ///
    /// # Errors
    /// [`TransportError::Queue`].
    fn enable_queue(&self, queue: u16, layout: QueueLayout) -> Result<(), TransportError>;

    /// The driver kicked a queue: the device does all there is to do.
    ///
    /// # Errors
    /// The queue is unusable.
    fn kick(&self, queue: u16) -> Result<Notify, QueueError>;

    /// Reads the configuration space.
    fn read_config(&self, offset: usize, bytes: &mut [u8]);

    /// Writes the configuration space.
    fn write_config(&self, offset: usize, bytes: &[u8]);
}

impl<P: Deref<Target: Port>> Port for P {
    fn reset(&self) {
        (**self).reset();
    }

    fn offered(&self) -> Features {
        (**self).offered()
    }

    fn accept(&self, features: Features) -> Result<(), TransportError> {
        (**self).accept(features)
    }

    fn max_queue_size(&self, queue: u16) -> u16 {
        (**self).max_queue_size(queue)
    }

    fn enable_queue(&self, queue: u16, layout: QueueLayout) -> Result<(), TransportError> {
        (**self).enable_queue(queue, layout)
    }

    fn kick(&self, queue: u16) -> Result<Notify, QueueError> {
        (**self).kick(queue)
    }

    fn read_config(&self, offset: usize, bytes: &mut [u8]) {
        (**self).read_config(offset, bytes);
    }

    fn write_config(&self, offset: usize, bytes: &[u8]) {
        (**self).write_config(offset, bytes);
    }
}

/// The driver's end. It remembers what went through.
#[derive(Clone, Debug)]
pub struct Transport<P> {
    /// The device's end.
    pub port: P,
    /// Notifications by queue.
    pub notifications: [u64; 2],
    /// Requests that the device answered.
    pub served: u64,
    /// Every write to the configuration space.
    pub config_writes: Vec<(usize, Vec<u8>)>,
    /// What the driver accepted.
    pub accepted: Features,
    /// FAILED was set.
    pub failed: bool,
    /// The first kick since the last reset that the device could not make sense of.
    pub broken: Option<QueueError>,
    started: bool,
}

impl<P: Port> Transport<P> {
    /// To the device behind `port`.
    pub fn new(port: P) -> Self {
        Self {
            port,
            notifications: [0; 2],
            served: 0,
            config_writes: Vec::new(),
            accepted: Features::empty(),
            failed: false,
            broken: None,
            started: false,
        }
    }

    /// Lets the device run. `true`: it gave something back.
    fn run(&mut self, queue: u16) -> bool {
        match self.port.kick(queue) {
            Ok(Notify { served, .. }) => {
                if usize::from(queue) == REQUEST_QUEUE {
                    self.served += u64::from(served);
                }
                served > 0
            }
            Err(error) => {
                tracing::warn!(queue, %error, "the device cannot use the queue");
                self.broken.get_or_insert(error);
                false
            }
        }
    }
}

impl<P: Port> hal::Transport for Transport<P> {
    fn reset(&mut self) {
        self.port.reset();
        self.started = false;
        self.broken = None;
    }

    fn offered_features(&mut self) -> Features {
        self.port.offered()
    }

    fn accept_features(&mut self, features: Features) -> Result<(), TransportError> {
        self.accepted = features;
        self.port.accept(features)
    }

    fn max_queue_size(&mut self, queue: u16) -> u16 {
        self.port.max_queue_size(queue)
    }

    fn enable_queue(&mut self, queue: u16, layout: QueueLayout) -> Result<(), TransportError> {
        self.port.enable_queue(queue, layout)
    }

    fn start(&mut self) {
        self.started = true;
    }

    fn fail(&mut self) {
        self.failed = true;
    }

    /// # Panics
    /// Before DRIVER_OK: no driver may do that (virtio 1.4, 3.1.1).
    fn notify(&mut self, queue: u16) {
        assert!(self.started, "a notification before DRIVER_OK");
        if let Some(count) = self.notifications.get_mut(usize::from(queue)) {
            *count += 1;
        }
        self.run(queue);
    }

    /// Lets the device look once more. Where that gives nothing back, nothing ever comes.
    fn wait(&mut self, queue: u16) -> Result<(), TransportError> {
        if self.run(queue) { Ok(()) } else { Err(TransportError::Gone) }
    }

    fn config_generation(&mut self) -> u32 {
        0
    }

    fn read_config(&mut self, offset: usize, bytes: &mut [u8]) {
        self.port.read_config(offset, bytes);
    }

    fn write_config(&mut self, offset: usize, bytes: &[u8]) {
        self.config_writes.push((offset, bytes.to_vec()));
        self.port.write_config(offset, bytes);
    }
}
