//! Objects of the kernel that free themselves, each after what is made of it.
//!
//! An object holds its parents, and what a device is attached to is held by the [`Attachment`]: so whatever order a
//! guest causes, nothing is destroyed that is in use. What the kernel refuses to free is kept and tried again before
//! whatever is freed later; it is never an error of the operation that let it go.

use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use pgtable_formats::{IovaRange, Pasid};

use crate::kernel::{
    Commands, DeviceId, Event, HwptData, HwptFlags, HwptSpec, InvalidateError, IoasMapping, Iommufd,
    IovaRanges, ObjectId, PageFault, ResponseCode, ViommuKind,
};

/// The kernel, and what it has not freed yet.
pub(crate) struct Session<K: Iommufd> {
    kernel: Arc<K>,
    unfreed: Mutex<Vec<Release>>,
}

/// Something to give back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Release {
    Detach(DeviceId, Option<Pasid>),
    Destroy(ObjectId),
}

impl<K: Iommufd> Session<K> {
    pub(crate) fn new(kernel: Arc<K>) -> Arc<Self> {
        Arc::new(Self { kernel, unfreed: Mutex::default() })
    }

    pub(crate) fn kernel(&self) -> &Arc<K> {
        &self.kernel
    }

    /// What was let go earlier comes first: it may be what keeps this one in use.
    fn release(&self, release: Release) {
        let mut unfreed = self.unfreed.lock().unwrap_or_else(PoisonError::into_inner);
        unfreed.retain(|&earlier| self.try_release(earlier).is_err());
        if let Err(errno) = self.try_release(release) {
            tracing::warn!(?release, %errno, "not freed, will be tried again");
            unfreed.push(release);
        }
    }

    fn try_release(&self, release: Release) -> Result<(), Errno> {
        let result = match release {
            Release::Detach(device, pasid) => self.kernel.detach(device, pasid),
            Release::Destroy(object) => self.kernel.destroy(object),
        };
        // Whoever took it away, it is gone.
        result
            .or_else(|errno| if matches!(errno, Errno::ENOENT | Errno::ENODEV) { Ok(()) } else { Err(errno) })
    }

    /// A device that is attached anew is not to be detached any more.
    fn keep_attached(&self, device: DeviceId, pasid: Option<Pasid>) {
        let mut unfreed = self.unfreed.lock().unwrap_or_else(PoisonError::into_inner);
        unfreed.retain(|&release| release != Release::Detach(device, pasid));
    }
}

impl<K: Iommufd> Drop for Session<K> {
    fn drop(&mut self) {
        let unfreed = std::mem::take(self.unfreed.get_mut().unwrap_or_else(PoisonError::into_inner));
        for release in unfreed {
            if let Err(errno) = self.try_release(release) {
                tracing::warn!(?release, %errno, "not freed before the iommufd is closed");
            }
        }
    }
}

/// Any object. Comes first in what holds it, so that it is destroyed before its parents are let go.
struct Object<K: Iommufd> {
    session: Arc<Session<K>>,
    id: ObjectId,
}

impl<K: Iommufd> Object<K> {
    fn new(session: &Arc<Session<K>>, id: ObjectId) -> Self {
        Self { session: Arc::clone(session), id }
    }

    fn kernel(&self) -> &K {
        &self.session.kernel
    }

    fn is_of(&self, session: &Arc<Session<K>>) -> bool {
        Arc::ptr_eq(&self.session, session)
    }
}

impl<K: Iommufd> Drop for Object<K> {
    fn drop(&mut self) {
        self.session.release(Release::Destroy(self.id));
    }
}

/// An I/O address space.
pub(crate) struct Ioas<K: Iommufd> {
    object: Object<K>,
}

impl<K: Iommufd> Ioas<K> {
    pub(crate) fn new(session: &Arc<Session<K>>) -> Result<Arc<Self>, Errno> {
        let object = Object::new(session, session.kernel.alloc_ioas()?);
        Ok(Arc::new(Self { object }))
    }

    /// Whether it was made there.
    pub(crate) fn is_of(&self, session: &Arc<Session<K>>) -> bool {
        self.object.is_of(session)
    }

    pub(crate) fn map(&self, mapping: &IoasMapping) -> Result<(), Errno> {
        self.object.kernel().map(self.object.id, mapping)
    }

    pub(crate) fn unmap(&self, range: IovaRange) -> Result<u64, Errno> {
        self.object.kernel().unmap(self.object.id, range)
    }

    pub(crate) fn ranges(&self) -> Result<IovaRanges, Errno> {
        self.object.kernel().iova_ranges(self.object.id)
    }
}

/// A hardware page table: what a device can be attached to.
pub(crate) struct Hwpt<K: Iommufd> {
    object: Object<K>,
    _parent: Parent<K>,
    page_requests: Option<Arc<FaultQueue<K>>>,
}

/// What a hardware page table is made of.
enum Parent<K: Iommufd> {
    Ioas(#[expect(dead_code, reason = "held")] Arc<Ioas<K>>),
    Hwpt(#[expect(dead_code, reason = "held")] Arc<Hwpt<K>>),
    Viommu(#[expect(dead_code, reason = "held")] Arc<Viommu<K>>),
}

impl<K: Iommufd> Hwpt<K> {
    /// What `ioas` maps.
    pub(crate) fn paging(
        ioas: &Arc<Ioas<K>>,
        device: DeviceId,
        flags: HwptFlags,
    ) -> Result<Arc<Self>, Errno> {
        let spec =
            HwptSpec { device, parent: ioas.object.id, flags, data: HwptData::None, fault_queue: None };
        Self::new(&ioas.object, Parent::Ioas(Arc::clone(ioas)), spec, None)
    }

    /// A guest's table over a nest parent (VT-d). `queue`: where its page requests go.
    pub(crate) fn on_nest_parent(
        parent: &Arc<Self>,
        device: DeviceId,
        flags: HwptFlags,
        data: HwptData,
        queue: Option<&Arc<FaultQueue<K>>>,
    ) -> Result<Arc<Self>, Errno> {
        let spec = HwptSpec { device, parent: parent.object.id, flags, data, fault_queue: None };
        Self::new(&parent.object, Parent::Hwpt(Arc::clone(parent)), spec, queue)
    }

    /// A stream table entry of a guest (SMMUv3). `queue`: where its page requests go.
    pub(crate) fn on_viommu(
        viommu: &Arc<Viommu<K>>,
        device: DeviceId,
        entry: [u64; 2],
        queue: Option<&Arc<FaultQueue<K>>>,
    ) -> Result<Arc<Self>, Errno> {
        let spec = HwptSpec {
            device,
            parent: viommu.object.id,
            flags: HwptFlags::empty(),
            data: HwptData::Smmuv3(entry),
            fault_queue: None,
        };
        Self::new(&viommu.object, Parent::Viommu(Arc::clone(viommu)), spec, queue)
    }

    fn new(
        relative: &Object<K>,
        parent: Parent<K>,
        spec: HwptSpec,
        queue: Option<&Arc<FaultQueue<K>>>,
    ) -> Result<Arc<Self>, Errno> {
        let fault_queue = queue.map(|queue| queue.object.id);
        let id = relative.kernel().alloc_hwpt(&HwptSpec { fault_queue, ..spec })?;
        let object = Object::new(&relative.session, id);
        Ok(Arc::new(Self { object, _parent: parent, page_requests: queue.cloned() }))
    }

    /// Whether it was made there.
    pub(crate) fn is_of(&self, session: &Arc<Session<K>>) -> bool {
        self.object.is_of(session)
    }

    /// Whether this table has a fault queue, and the other one has not the same.
    fn loses_queue(&self, other: &Self) -> bool {
        let Some(queue) = &self.page_requests else { return false };
        other.page_requests.as_ref().is_none_or(|other| !Arc::ptr_eq(queue, other))
    }

    /// Drops what is cached of a guest's table (VT-d).
    pub(crate) fn invalidate(&self, commands: Commands<'_>) -> Result<(), InvalidateError> {
        self.object.kernel().invalidate(self.object.id, commands)
    }
}

/// The guest's slice of a physical IOMMU.
pub(crate) struct Viommu<K: Iommufd> {
    object: Object<K>,
    _nest_parent: Arc<Hwpt<K>>,
}

impl<K: Iommufd> Viommu<K> {
    pub(crate) fn new(
        kind: ViommuKind,
        device: DeviceId,
        nest_parent: &Arc<Hwpt<K>>,
    ) -> Result<Arc<Self>, Errno> {
        let parent = &nest_parent.object;
        let id = parent.kernel().alloc_viommu(kind, device, parent.id)?;
        Ok(Arc::new(Self { object: Object::new(&parent.session, id), _nest_parent: Arc::clone(nest_parent) }))
    }

    pub(crate) fn invalidate(&self, commands: Commands<'_>) -> Result<(), InvalidateError> {
        self.object.kernel().invalidate(self.object.id, commands)
    }
}

/// What a device is called in commands and events of a vIOMMU.
pub(crate) struct Vdevice<K: Iommufd> {
    _object: Object<K>,
    _viommu: Arc<Viommu<K>>,
}

impl<K: Iommufd> Vdevice<K> {
    pub(crate) fn new(viommu: &Arc<Viommu<K>>, device: DeviceId, virtual_id: u64) -> Result<Self, Errno> {
        let parent = &viommu.object;
        let id = parent.kernel().alloc_vdevice(parent.id, device, virtual_id)?;
        Ok(Self { _object: Object::new(&parent.session, id), _viommu: Arc::clone(viommu) })
    }
}

/// The events of a vIOMMU.
pub(crate) struct EventQueue<K: Iommufd> {
    object: Object<K>,
    _viommu: Arc<Viommu<K>>,
}

impl<K: Iommufd> EventQueue<K> {
    pub(crate) fn new(viommu: &Arc<Viommu<K>>, kind: ViommuKind, depth: u32) -> Result<Self, Errno> {
        let parent = &viommu.object;
        let id = parent.kernel().alloc_event_queue(parent.id, kind, depth)?;
        Ok(Self { object: Object::new(&parent.session, id), _viommu: Arc::clone(viommu) })
    }

    pub(crate) fn read(&self) -> Result<Vec<Event>, Errno> {
        self.object.kernel().read_events(self.object.id)
    }

    pub(crate) fn fd(&self) -> Option<RawFd> {
        self.object.kernel().queue_fd(self.object.id)
    }
}

/// The page requests of the tables that are made with it.
pub(crate) struct FaultQueue<K: Iommufd> {
    object: Object<K>,
}

impl<K: Iommufd> FaultQueue<K> {
    pub(crate) fn new(session: &Arc<Session<K>>) -> Result<Arc<Self>, Errno> {
        let object = Object::new(session, session.kernel.alloc_fault_queue()?);
        Ok(Arc::new(Self { object }))
    }

    pub(crate) fn read(&self) -> Result<Vec<PageFault>, Errno> {
        self.object.kernel().read_page_faults(self.object.id)
    }

    pub(crate) fn respond(&self, cookie: u32, code: ResponseCode) -> Result<(), Errno> {
        self.object.kernel().respond(self.object.id, cookie, code)
    }

    pub(crate) fn fd(&self) -> Option<RawFd> {
        self.object.kernel().queue_fd(self.object.id)
    }
}

/// A device, or one PASID of it, attached to a table. Detached when it is dropped.
pub(crate) struct Attachment<K: Iommufd> {
    session: Arc<Session<K>>,
    device: DeviceId,
    pasid: Option<Pasid>,
    /// `None` while it is attached to nothing, and reaches nothing.
    table: Option<Arc<Hwpt<K>>>,
}

impl<K: Iommufd> Attachment<K> {
    pub(crate) fn new(device: DeviceId, pasid: Option<Pasid>, table: &Arc<Hwpt<K>>) -> Result<Self, Errno> {
        let session = Arc::clone(&table.object.session);
        session.kernel.attach(device, pasid, table.object.id)?;
        session.keep_attached(device, pasid);
        Ok(Self { session, device, pasid, table: Some(Arc::clone(table)) })
    }

    /// Attaches to another table, in one step unless a fault queue is left. What fails leaves it attached as it was, or
    /// to nothing where not even that can be had again. Calls `ended` once the kernel has answered the page requests that
    /// waited, which may be so although this fails.
    ///
    /// A queue is left by way of nothing: on replacement, kernels from 6.15 on look for what to answer in the queue of
    /// the *new* table, and later read what they have left in the old one through memory that they have freed. Those that
    /// do it right (Linux 7.3.4) cannot be told from the others; all of them answer when the old table is detached.
    pub(crate) fn replace(&mut self, table: &Arc<Hwpt<K>>, ended: impl FnOnce()) -> Result<(), Errno> {
        match self.table.take_if(|attached| attached.loses_queue(table)) {
            None => {
                let is_same = self.is_to(table);
                self.attach(table)?;
                if !is_same {
                    ended();
                }
                Ok(())
            }
            Some(attached) => {
                if let Err(errno) = self.session.kernel.detach(self.device, self.pasid) {
                    self.table = Some(attached);
                    return Err(errno);
                }
                ended();
                self.attach(table).inspect_err(|_| {
                    if let Err(errno) = self.attach(&attached) {
                        tracing::warn!(device = self.device.0, pasid = ?self.pasid, %errno, "attached to nothing");
                    }
                })
            }
        }
    }

    /// In place of what is attached, if anything is.
    fn attach(&mut self, table: &Arc<Hwpt<K>>) -> Result<(), Errno> {
        self.session.kernel.attach(self.device, self.pasid, table.object.id)?;
        self.table = Some(Arc::clone(table));
        Ok(())
    }

    /// Detaches; what fails hands the attachment back.
    pub(crate) fn detach(mut self) -> Result<(), (Self, Errno)> {
        match self.session.kernel.detach(self.device, self.pasid) {
            Ok(()) => {
                self.table = None;
                Ok(())
            }
            Err(errno) => Err((self, errno)),
        }
    }

    /// Whether it reaches nothing because a replacement failed.
    pub(crate) const fn is_to_nothing(&self) -> bool {
        self.table.is_none()
    }

    /// Whether it is attached to this very table.
    pub(crate) fn is_to(&self, table: &Arc<Hwpt<K>>) -> bool {
        self.table.as_ref().is_some_and(|attached| Arc::ptr_eq(attached, table))
    }
}

impl<K: Iommufd> Drop for Attachment<K> {
    fn drop(&mut self) {
        if self.table.is_some() {
            self.session.release(Release::Detach(self.device, self.pasid));
        }
    }
}
