//! Where a queue lies: the driver's words, as the device's queue has them.

use viommu_device::host::Host;
use viommu_guest::hal::{QueueLayout, TransportError};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory};

use crate::virtio_iommu::VirtioIommu;

/// Tells `queue` where it lies, and enables it. Whether there is memory is for [`QueueT::is_valid`], or the first kick, to
/// say.
///
/// # Errors
/// A size or an alignment that no queue has; it is not enabled then.
pub fn place_queue(queue: &mut Queue, layout: QueueLayout) -> Result<(), virtio_queue::Error> {
    queue.set_ready(false);
    queue.try_set_size(layout.size)?;
    queue.try_set_desc_table_address(GuestAddress(layout.descriptors.0))?;
    queue.try_set_avail_ring_address(GuestAddress(layout.available.0))?;
    queue.try_set_used_ring_address(GuestAddress(layout.used.0))?;
    queue.set_ready(true);
    Ok(())
}

impl<H: Host> VirtioIommu<H> {
    /// Tells queue `index` where it lies in `memory`, and enables it.
    ///
    /// # Errors
    /// [`TransportError::Queue`] where there is no such queue, or where it cannot lie there: it is not enabled then.
    pub fn enable_queue<M: GuestMemory>(
        &mut self,
        index: u16,
        layout: QueueLayout,
        memory: &M,
    ) -> Result<(), TransportError> {
        let refused = TransportError::Queue { queue: index };
        let queue = self.queue_mut(index.into()).ok_or(refused)?;
        place_queue(queue, layout).map_err(|_| refused)?;
        if !queue.is_valid(memory) {
            queue.set_ready(false);
            return Err(refused);
        }
        Ok(())
    }
}
