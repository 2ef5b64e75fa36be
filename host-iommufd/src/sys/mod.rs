//! [`Sys`]: the kernel itself, by `/dev/iommu` and the VFIO character devices.
//!
//! ```no_run
//! use std::path::Path;
//!
//! use viommu_host_iommufd::kernel::Iommufd;
//! use viommu_host_iommufd::sys::Sys;
//!
//! let kernel = Sys::open()?;
//! let (device, _handle) = kernel.bind(Path::new("/sys/bus/pci/devices/0000:01:00.0"))?;
//! println!("{:x?}", kernel.hw_info(device)?);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Not supported
//!
//! VFIO groups and containers (a device needs its character device, Linux 6.6); tokens of virtual functions; devices
//! whose files another process opened. Dirty bitmaps and hardware queues have no method in [`Iommufd`].

mod bind;
mod errno;
mod hw_info;
#[cfg(test)]
mod layout;
#[cfg(test)]
mod on_kernel;
mod queue;
mod raw;
mod record;

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::RawFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iommufd_bindings::iommufd as abi;
use iommufd_ioctls::IommuFd;
use nix::errno::Errno;
use pgtable_formats::{Iova, IovaRange, Pasid};
use vfio_ioctls::{VfioDevice, VfioError, VfioIommufd};

pub use self::bind::{BindError, OpenError};
use self::errno::{errno_of, vfio_errno};
use self::queue::{Queue, QueueKind};
use self::raw::{RangesAnswer, size};
use crate::kernel::{
    Backing, Commands, DeviceId, Event, HwCapabilities, HwInfo, HwptData, HwptSpec, InvalidateError,
    IoasMapping, Iommufd, IovaRanges, ObjectId, PageFault, ResponseCode, ViommuKind,
};

/// `/dev/iommu`, with the devices bound to it. Devices that are still bound when it is dropped are detached: their DMA is
/// blocked.
///
/// Memory is mapped as it is asked for: see [Trust](Iommufd#trust).
pub struct Sys {
    // Files of queues, by the queue. Closed first, the devices after them.
    queues: Mutex<HashMap<ObjectId, Queue>>,
    devices: Mutex<HashMap<DeviceId, Arc<VfioDevice>>>,
    // What vfio-ioctls wants for a device. It allocates an IOAS, which stays empty.
    vfio: Arc<VfioIommufd>,
    iommufd: Arc<IommuFd>,
}

impl Sys {
    /// Opens `/dev/iommu`.
    ///
    /// # Errors
    /// [`OpenError`] says what is missing, and what to do.
    pub fn open() -> Result<Self, OpenError> {
        Self::with(IommuFd::new().map_err(OpenError::from_iommufd)?)
    }

    /// Takes `/dev/iommu` as somebody with more privilege opened it.
    ///
    /// # Errors
    /// [`OpenError::Os`] where `iommufd` is something else.
    pub fn from_file(iommufd: File) -> Result<Self, OpenError> {
        Self::with(IommuFd::new_from_fd(iommufd))
    }

    fn with(iommufd: IommuFd) -> Result<Self, OpenError> {
        let vfio = VfioIommufd::new(Arc::new(iommufd), None, None).map_err(|error| match error {
            VfioError::NewVfioIommufd(error) => OpenError::Os(errno_of(error)),
            _ => OpenError::Os(Errno::EINVAL),
        })?;
        Ok(Self::from_vfio(Arc::new(vfio)))
    }

    /// Shares the `/dev/iommu` of a VMM that has devices of its own there, or a VFIO device of KVM.
    /// [`adopt`](Self::adopt) brings the devices.
    pub fn from_vfio(vfio: Arc<VfioIommufd>) -> Self {
        let iommufd = vfio.iommufd().clone();
        Self { queues: Mutex::default(), devices: Mutex::default(), vfio, iommufd }
    }

    /// The open `/dev/iommu`, for ioctls that [`Iommufd`] has no method for.
    pub fn iommufd(&self) -> &Arc<IommuFd> {
        &self.iommufd
    }

    /// Opens the character device of `device`, a folder like `/sys/bus/pci/devices/0000:01:00.0`, and binds it. It is
    /// attached to nothing: all its DMA is blocked.
    ///
    /// # Errors
    /// [`BindError`] says what is missing, and what to do.
    pub fn bind(&self, device: &Path) -> Result<(DeviceId, Arc<VfioDevice>), BindError> {
        bind::check(device)?;
        let handle = VfioDevice::new(device, self.vfio.clone(), false)
            .map_err(|error| BindError::from_vfio(device, error))?;
        let id = handle
            .iommufd_dev_id()
            .ok_or(BindError::Os { what: "VFIO_DEVICE_BIND_IOMMUFD", errno: Errno::EINVAL })?;
        let (id, handle) = (DeviceId(id), Arc::new(handle));
        lock(&self.devices).insert(id, handle.clone());
        Ok((id, handle))
    }

    /// Takes a device that is bound to the same `/dev/iommu` already. `None` where it is bound to none.
    pub fn adopt(&self, handle: Arc<VfioDevice>) -> Option<DeviceId> {
        let id = DeviceId(handle.iommufd_dev_id()?);
        lock(&self.devices).insert(id, handle);
        Some(id)
    }

    /// The handle of a device that is bound: its registers and interrupts.
    pub fn device(&self, device: DeviceId) -> Option<Arc<VfioDevice>> {
        lock(&self.devices).get(&device).cloned()
    }

    /// Detaches `device` and forgets it. It is closed when the last clone of its handle is dropped, and may then be
    /// bound again. Its vDEVICE has to be destroyed before: the kernel cannot free the vDEVICE's ID afterwards.
    ///
    /// # Errors
    /// `ENOENT` where it is not bound. Where it cannot be detached (a device that is gone) it stays bound.
    pub fn unbind(&self, device: DeviceId) -> Result<(), Errno> {
        let mut devices = lock(&self.devices);
        let handle = devices.get(&device).ok_or(Errno::ENOENT)?;
        handle.detach_hwpt().map_err(vfio_errno)?;
        devices.remove(&device);
        Ok(())
    }
}

impl Drop for Sys {
    fn drop(&mut self) {
        for (device, handle) in std::mem::take(&mut *lock(&self.devices)) {
            // vfio-ioctls panics where a device that it drops cannot be detached.
            if let Err(error) = handle.detach_hwpt() {
                tracing::error!(device = device.0, %error, "a device is left open: it cannot be detached");
                std::mem::forget(handle);
            }
        }
    }
}

impl Iommufd for Sys {
    fn destroy(&self, object: ObjectId) -> Result<(), Errno> {
        // An open file keeps its queue busy. Where the queue is busy for another reason as well, it stays without one:
        // the kernel gives a file only once.
        let queue = lock(&self.queues).remove(&object);
        drop(queue);
        self.iommufd.destroy_iommu_object(object.0).map_err(errno_of)
    }

    fn alloc_ioas(&self) -> Result<ObjectId, Errno> {
        let mut arg = abi::iommu_ioas_alloc { size: size::<abi::iommu_ioas_alloc>(), ..Default::default() };
        self.iommufd.alloc_iommu_ioas(&mut arg).map_err(errno_of)?;
        Ok(ObjectId(arg.out_ioas_id))
    }

    fn iova_ranges(&self, ioas: ObjectId) -> Result<IovaRanges, Errno> {
        // A few devices make a few holes. Others may be attached in between, so the number can grow.
        let mut room = 16;
        for _ in 0..8 {
            match raw::iova_ranges(&self.iommufd, ioas.0, room)? {
                RangesAnswer::All { ranges, alignment } => {
                    let ranges =
                        ranges.iter().map(|range| IovaRange::new(Iova(range.start), Iova(range.last)));
                    let allowed: Option<Vec<_>> = ranges.collect();
                    return Ok(IovaRanges { allowed: allowed.ok_or(Errno::EPROTO)?, alignment });
                }
                RangesAnswer::Needs(count) if count > room && count <= MAX_RANGES => room = count,
                RangesAnswer::Needs(_) => break,
            }
        }
        Err(Errno::EMSGSIZE)
    }

    fn map(&self, ioas: ObjectId, mapping: &IoasMapping) -> Result<(), Errno> {
        let length = mapping.range.length_minus_one().checked_add(1).ok_or(Errno::EOVERFLOW)?;
        let iova = mapping.range.start().0;
        let flags = map_flags(mapping);
        match mapping.backing {
            Backing::Memory(user_va) => self.iommufd.map_iommu_ioas(&abi::iommu_ioas_map {
                size: size::<abi::iommu_ioas_map>(),
                flags,
                ioas_id: ioas.0,
                user_va,
                length,
                iova,
                ..Default::default()
            }),
            Backing::File { fd, offset } => self.iommufd.map_iommu_ioas_file(&abi::iommu_ioas_map_file {
                size: size::<abi::iommu_ioas_map_file>(),
                flags,
                ioas_id: ioas.0,
                fd,
                start: offset,
                length,
                iova,
            }),
        }
        .map_err(errno_of)
    }

    fn unmap(&self, ioas: ObjectId, range: IovaRange) -> Result<u64, Errno> {
        let mut arg = abi::iommu_ioas_unmap {
            size: size::<abi::iommu_ioas_unmap>(),
            ioas_id: ioas.0,
            iova: range.start().0,
            // From 0 this is the kernel's word for everything; from elsewhere the length fits.
            length: range.length_minus_one().saturating_add(1),
        };
        self.iommufd.unmap_iommu_ioas(&mut arg).map_err(errno_of)?;
        Ok(arg.length)
    }

    fn hw_info(&self, device: DeviceId) -> Result<HwInfo, Errno> {
        let info = raw::hw_info(&self.iommufd, device.0)?;
        Ok(HwInfo {
            kind: hw_info::decode(info.kind, &info.registers),
            max_pasid_lg2: info.max_pasid_lg2,
            capabilities: HwCapabilities::from_bits_retain(info.capabilities),
        })
    }

    fn alloc_hwpt(&self, spec: &HwptSpec) -> Result<ObjectId, Errno> {
        let mut arg = abi::iommu_hwpt_alloc {
            flags: spec.flags.bits(),
            dev_id: spec.device.0,
            pt_id: spec.parent.0,
            ..Default::default()
        };
        if let Some(queue) = spec.fault_queue {
            arg.flags |= abi::iommufd_hwpt_alloc_flags_IOMMU_HWPT_FAULT_ID_VALID;
            arg.fault_id = queue.0;
        }
        match spec.data {
            HwptData::None => raw::alloc_hwpt(&self.iommufd, arg, &()),
            HwptData::Vtd { flags, root, address_width } => {
                arg.data_type = abi::iommu_hwpt_data_type_IOMMU_HWPT_DATA_VTD_S1;
                let data = abi::iommu_hwpt_vtd_s1 {
                    flags,
                    pgtbl_addr: root,
                    addr_width: address_width,
                    __reserved: 0,
                };
                raw::alloc_hwpt(&self.iommufd, arg, &data)
            }
            HwptData::Smmuv3(ste) => {
                arg.data_type = abi::iommu_hwpt_data_type_IOMMU_HWPT_DATA_ARM_SMMUV3;
                let data = abi::iommu_hwpt_arm_smmuv3 { ste: ste.map(u64::to_le) };
                raw::alloc_hwpt(&self.iommufd, arg, &data)
            }
        }
    }

    fn invalidate(&self, object: ObjectId, commands: Commands<'_>) -> Result<(), InvalidateError> {
        match commands {
            Commands::Vtd(entries) => {
                let entries: Vec<_> = entries
                    .iter()
                    .map(|entry| abi::iommu_hwpt_vtd_s1_invalidate {
                        addr: entry.address,
                        npages: entry.pages,
                        flags: if entry.leaf {
                            abi::iommu_hwpt_vtd_s1_invalidate_flags_IOMMU_VTD_INV_FLAGS_LEAF
                        } else {
                            0
                        },
                        __reserved: 0,
                    })
                    .collect();
                let data_type = abi::iommu_hwpt_invalidate_data_type_IOMMU_HWPT_INVALIDATE_DATA_VTD_S1;
                raw::invalidate(&self.iommufd, object.0, data_type, &entries)
            }
            Commands::Smmuv3(entries) => {
                let data_type = abi::iommu_hwpt_invalidate_data_type_IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3;
                if cfg!(target_endian = "little") {
                    // `iommu_viommu_arm_smmuv3_invalidate` is two little-endian words.
                    raw::invalidate(&self.iommufd, object.0, data_type, entries)
                } else {
                    let entries: Vec<_> = entries.iter().map(|command| command.map(u64::to_le)).collect();
                    raw::invalidate(&self.iommufd, object.0, data_type, &entries)
                }
            }
        }
    }

    fn alloc_viommu(&self, kind: ViommuKind, device: DeviceId, parent: ObjectId) -> Result<ObjectId, Errno> {
        let mut arg = abi::iommu_viommu_alloc {
            size: size::<abi::iommu_viommu_alloc>(),
            type_: match kind {
                ViommuKind::Smmuv3 => abi::iommu_viommu_type_IOMMU_VIOMMU_TYPE_ARM_SMMUV3,
            },
            dev_id: device.0,
            hwpt_id: parent.0,
            ..Default::default()
        };
        self.iommufd.alloc_iommu_viommu(&mut arg).map_err(errno_of)?;
        Ok(ObjectId(arg.out_viommu_id))
    }

    fn alloc_vdevice(&self, viommu: ObjectId, device: DeviceId, virtual_id: u64) -> Result<ObjectId, Errno> {
        let mut arg = abi::iommu_vdevice_alloc {
            size: size::<abi::iommu_vdevice_alloc>(),
            viommu_id: viommu.0,
            dev_id: device.0,
            virt_id: virtual_id,
            ..Default::default()
        };
        self.iommufd.alloc_iommu_vdevice(&mut arg).map_err(errno_of)?;
        Ok(ObjectId(arg.out_vdevice_id))
    }

    fn alloc_event_queue(&self, viommu: ObjectId, kind: ViommuKind, depth: u32) -> Result<ObjectId, Errno> {
        let mut arg = abi::iommu_veventq_alloc {
            size: size::<abi::iommu_veventq_alloc>(),
            viommu_id: viommu.0,
            type_: match kind {
                ViommuKind::Smmuv3 => abi::iommu_veventq_type_IOMMU_VEVENTQ_TYPE_ARM_SMMUV3,
            },
            veventq_depth: depth,
            ..Default::default()
        };
        let (id, file) = self.iommufd.alloc_veventq(&mut arg).map_err(errno_of)?;
        let id = ObjectId(id);
        lock(&self.queues).insert(id, Queue::new(file, QueueKind::Events(kind)));
        Ok(id)
    }

    fn read_events(&self, queue: ObjectId) -> Result<Vec<Event>, Errno> {
        lock(&self.queues).get(&queue).ok_or(Errno::ENOENT)?.read_events()
    }

    fn alloc_fault_queue(&self) -> Result<ObjectId, Errno> {
        let (id, file) = raw::alloc_fault_queue(&self.iommufd)?;
        lock(&self.queues).insert(id, Queue::new(file, QueueKind::PageFaults));
        Ok(id)
    }

    fn read_page_faults(&self, queue: ObjectId) -> Result<Vec<PageFault>, Errno> {
        lock(&self.queues).get(&queue).ok_or(Errno::ENOENT)?.read_page_faults()
    }

    fn respond(&self, queue: ObjectId, cookie: u32, code: ResponseCode) -> Result<(), Errno> {
        lock(&self.queues).get(&queue).ok_or(Errno::ENOENT)?.respond(cookie, code)
    }

    fn queue_fd(&self, queue: ObjectId) -> Option<RawFd> {
        lock(&self.queues).get(&queue).map(|queue| queue.fd())
    }

    fn attach(&self, device: DeviceId, pasid: Option<Pasid>, table: ObjectId) -> Result<(), Errno> {
        let handle = self.device(device).ok_or(Errno::ENOENT)?;
        match pasid {
            None => handle.attach_hwpt(table.0),
            Some(pasid) => handle.attach_iommufd_pt_pasid(table.0, pasid.value()),
        }
        .map_err(vfio_errno)
    }

    fn detach(&self, device: DeviceId, pasid: Option<Pasid>) -> Result<(), Errno> {
        let handle = self.device(device).ok_or(Errno::ENOENT)?;
        match pasid {
            None => handle.detach_hwpt(),
            Some(pasid) => handle.detach_iommufd_pt_pasid(pasid.value()),
        }
        .map_err(vfio_errno)
    }
}

/// More holes than any machine has; a bound for the room that the kernel can ask for.
const MAX_RANGES: u32 = 1 << 16;

fn map_flags(mapping: &IoasMapping) -> u32 {
    let mut flags = abi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA;
    if mapping.readable {
        flags |= abi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE;
    }
    if mapping.writable {
        flags |= abi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE;
    }
    flags
}

/// A poisoned lock guards a map, which is whole after any panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sys_is_shared_between_threads() {
        fn shared<T: Send + Sync>() {}
        shared::<Sys>();
    }

    #[test]
    fn what_is_not_an_iommufd_is_refused() {
        let null = File::open("/dev/null").unwrap();
        assert!(matches!(Sys::from_file(null), Err(OpenError::Os(Errno::ENOTTY))));
    }

    #[test]
    fn map_flags_are_of_the_mapping() {
        let range = IovaRange::ALL;
        let mapping =
            |readable, writable| IoasMapping { range, backing: Backing::Memory(0), readable, writable };
        assert_eq!(map_flags(&mapping(false, false)), 1);
        assert_eq!(map_flags(&mapping(false, true)), 3);
        assert_eq!(map_flags(&mapping(true, false)), 5);
        assert_eq!(map_flags(&mapping(true, true)), 7);
    }
}
