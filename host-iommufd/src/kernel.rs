//! The seam to the kernel: what this crate asks of iommufd and VFIO, in their own terms.
//!
//! Each method is one ioctl (or one read of a queue's file), nothing more: what objects there are, in which order they
//! come and go, and what an error means is decided above this seam, and tested on whoever stands below it.

use nix::errno::Errno;
use pgtable_formats::{IovaRange, Pasid};

/// iommufd, and the devices that are bound to it.
///
/// # Trust
/// Whoever calls this decides what devices reach: [`map`](Self::map) gives them whatever memory of the process, or file,
/// it is told, while safe Rust knows nothing of it. That such memory stays mapped, and that no Rust reference to it is
/// alive, is the caller's business. [`IommufdHost`](crate::IommufdHost) maps guest memory of `vm-memory` alone, which is
/// such memory, and keeps it.
///
/// # Errors
/// Every method returns the kernel's error number as it is. `EOPNOTSUPP` is the normal answer for a feature that is not
/// there, `ENOTTY` for an ioctl that the kernel does not have.
pub trait Iommufd {
    /// `IOMMU_DESTROY`. Nothing may use the object any more (`EBUSY`). Closes a queue's file first.
    fn destroy(&self, object: ObjectId) -> Result<(), Errno>;

    /// `IOMMU_IOAS_ALLOC`: an I/O address space, empty.
    fn alloc_ioas(&self) -> Result<ObjectId, Errno>;

    /// `IOMMU_IOAS_IOVA_RANGES`: what may be mapped. Narrows as devices are attached.
    fn iova_ranges(&self, ioas: ObjectId) -> Result<IovaRanges, Errno>;

    /// `IOMMU_IOAS_MAP` or `IOMMU_IOAS_MAP_FILE`, at a fixed address. See [Trust](Self#trust).
    fn map(&self, ioas: ObjectId, mapping: &IoasMapping) -> Result<(), Errno>;

    /// `IOMMU_IOAS_UNMAP`: removes what was mapped in `range`, whole mappings only. Answers how many bytes that were.
    fn unmap(&self, ioas: ObjectId, range: IovaRange) -> Result<u64, Errno>;

    /// `IOMMU_GET_HW_INFO`.
    fn hw_info(&self, device: DeviceId) -> Result<HwInfo, Errno>;

    /// `IOMMU_HWPT_ALLOC`: a table that devices can be attached to.
    fn alloc_hwpt(&self, spec: &HwptSpec) -> Result<ObjectId, Errno>;

    /// `IOMMU_HWPT_INVALIDATE`, on a vIOMMU (SMMUv3) or on a nested table (VT-d).
    fn invalidate(&self, object: ObjectId, commands: Commands<'_>) -> Result<(), InvalidateError>;

    /// `IOMMU_VIOMMU_ALLOC`: the guest's slice of the physical IOMMU of `device`. `parent` is a nest parent.
    fn alloc_viommu(&self, kind: ViommuKind, device: DeviceId, parent: ObjectId) -> Result<ObjectId, Errno>;

    /// `IOMMU_VDEVICE_ALLOC`: what `device` is called in commands and events of `viommu`.
    fn alloc_vdevice(&self, viommu: ObjectId, device: DeviceId, virtual_id: u64) -> Result<ObjectId, Errno>;

    /// `IOMMU_VEVENTQ_ALLOC`: a queue of at most `depth` events of `viommu`. One of a kind.
    fn alloc_event_queue(&self, viommu: ObjectId, kind: ViommuKind, depth: u32) -> Result<ObjectId, Errno>;

    /// The oldest events of a queue, some or all; empty where there is none. Never blocks.
    fn read_events(&self, queue: ObjectId) -> Result<Vec<Event>, Errno>;

    /// `IOMMU_FAULT_QUEUE_ALLOC`: a queue of page requests.
    fn alloc_fault_queue(&self) -> Result<ObjectId, Errno>;

    /// The oldest page requests of a queue, whole groups; empty where there is none. Never blocks.
    fn read_page_faults(&self, queue: ObjectId) -> Result<Vec<PageFault>, Errno>;

    /// Answers the group of page requests that `cookie` stands for.
    fn respond(&self, queue: ObjectId, cookie: u32, code: ResponseCode) -> Result<(), Errno>;

    /// The file of an event or fault queue, to wait for `POLLIN` on. Open until the queue is destroyed.
    fn queue_fd(&self, queue: ObjectId) -> Option<std::os::fd::RawFd>;

    /// `VFIO_DEVICE_ATTACH_IOMMUFD_PT`: what the untagged accesses of `device`, or those with `pasid`, translate
    /// through. Replaces what was attached.
    fn attach(&self, device: DeviceId, pasid: Option<Pasid>, table: ObjectId) -> Result<(), Errno>;

    /// `VFIO_DEVICE_DETACH_IOMMUFD_PT`.
    fn detach(&self, device: DeviceId, pasid: Option<Pasid>) -> Result<(), Errno>;
}

/// An iommufd object: an IOAS, a hardware page table, a vIOMMU, a vDEVICE, a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId(pub u32);

/// A device bound to the iommufd (`out_devid` of `VFIO_DEVICE_BIND_IOMMUFD`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(pub u32);

/// Answer of `IOMMU_IOAS_IOVA_RANGES`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IovaRanges {
    /// What may be mapped, ascending and disjoint.
    pub allowed: Vec<IovaRange>,
    /// What addresses and lengths of mappings have to be multiples of, in bytes.
    pub alignment: u64,
}

/// One mapping of an IOAS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoasMapping {
    /// The addresses that devices use.
    pub range: IovaRange,
    /// The memory behind them.
    pub backing: Backing,
    /// `IOMMU_IOAS_MAP_READABLE`.
    pub readable: bool,
    /// `IOMMU_IOAS_MAP_WRITEABLE`.
    pub writable: bool,
}

/// Where the memory of a mapping comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// This address of the process.
    Memory(u64),
    /// A memfd.
    File {
        /// Its descriptor.
        fd: std::os::fd::RawFd,
        /// Bytes from its start.
        offset: u64,
    },
}

/// Answer of `IOMMU_GET_HW_INFO`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HwInfo {
    /// The kind of IOMMU, with its registers.
    pub kind: HwKind,
    /// log2 of the number of PASIDs of the device; 0: none are enabled.
    pub max_pasid_lg2: u8,
    /// What can be done with the device.
    pub capabilities: HwCapabilities,
}

/// The registers of an IOMMU, as the kernel passes them on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HwKind {
    /// The kernel tells nothing of it (type 0).
    None,
    /// VT-d (type 1).
    Vtd {
        /// Bit 0: erratum 772415, a nest parent makes everything writable.
        flags: u32,
        /// Capability register.
        cap: u64,
        /// Extended capability register.
        ecap: u64,
    },
    /// SMMUv3 (type 2).
    Smmuv3 {
        /// Bit 0: TLBI and CFGI have to be sent twice.
        flags: u32,
        /// SMMU_IDR0 to SMMU_IDR5.
        idr: [u32; 6],
        /// SMMU_IIDR.
        iidr: u32,
        /// SMMU_AIDR.
        aidr: u32,
    },
    /// AMD (type 4).
    Amd {
        /// Extended feature register.
        efr: u64,
        /// Extended feature register 2.
        efr2: u64,
    },
    /// A type that is not known here.
    Other(u32),
}

bitflags::bitflags! {
    /// `out_capabilities` of `IOMMU_GET_HW_INFO`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct HwCapabilities: u64 {
        /// Bit 0: dirty tracking.
        const DIRTY_TRACKING = 1 << 0;
        /// Bit 1: the device has PASIDs with execute permission.
        const PASID_EXEC = 1 << 1;
        /// Bit 2: the device has PASIDs with privileged mode.
        const PASID_PRIV = 1 << 2;
        /// Bit 3: ATS cannot be enabled for the device.
        const ATS_NOT_SUPPORTED = 1 << 3;
    }
}

/// What `IOMMU_HWPT_ALLOC` is to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HwptSpec {
    /// For the IOMMU of this device.
    pub device: DeviceId,
    /// An IOAS (a paging table), a nest parent (a nested table of VT-d), a vIOMMU (a nested table of SMMUv3).
    pub parent: ObjectId,
    /// How.
    pub flags: HwptFlags,
    /// The guest's table, of a nested one.
    pub data: HwptData,
    /// Where page requests go: sets `IOMMU_HWPT_FAULT_ID_VALID`.
    pub fault_queue: Option<ObjectId>,
}

bitflags::bitflags! {
    /// `flags` of `IOMMU_HWPT_ALLOC`, but for `FAULT_ID_VALID`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct HwptFlags: u32 {
        /// May be the parent of nested tables.
        const NEST_PARENT = 1 << 0;
        /// With dirty tracking.
        const DIRTY_TRACKING = 1 << 1;
        /// May be attached where PASIDs are in use.
        const PASID = 1 << 3;
    }
}

/// What a nested table is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HwptData {
    /// Not a nested table.
    None,
    /// `iommu_hwpt_vtd_s1`.
    Vtd {
        /// SRE, EAFE, WPE.
        flags: u64,
        /// Guest-physical address of the root table.
        root: u64,
        /// 48 or 57 bits.
        address_width: u32,
    },
    /// `iommu_hwpt_arm_smmuv3`: words 0 and 1 of the stream table entry.
    Smmuv3([u64; 2]),
}

/// The entries of one `IOMMU_HWPT_INVALIDATE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commands<'a> {
    /// `iommu_hwpt_vtd_s1_invalidate`.
    Vtd(&'a [VtdInvalidation]),
    /// `iommu_viommu_arm_smmuv3_invalidate`: commands as the SMMU's queue has them.
    Smmuv3(&'a [[u64; 2]]),
}

/// `iommu_hwpt_vtd_s1_invalidate`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VtdInvalidation {
    /// First address; a multiple of 4 KiB.
    pub address: u64,
    /// Number of 4 KiB pages; `u64::MAX` with address 0: everything.
    pub pages: u64,
    /// Only what came from leaf entries.
    pub leaf: bool,
}

/// An invalidation that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{errno} after {done} entries")]
pub struct InvalidateError {
    /// How many entries the kernel says it handled. On SMMUv3 those after the last multiple of 63 were *not* issued.
    pub done: u32,
    /// Why it stopped.
    pub errno: Errno,
}

/// What kind of vIOMMU, and of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ViommuKind {
    /// `IOMMU_VIOMMU_TYPE_ARM_SMMUV3`, `IOMMU_VEVENTQ_TYPE_ARM_SMMUV3`.
    Smmuv3,
}

/// A record of an event queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Events were lost before this place.
    Lost {
        /// Number of the record.
        sequence: u32,
    },
    /// An event as the SMMU recorded it, with the vDEVICE's ID in place of the StreamID.
    Smmuv3 {
        /// Number of the record, from 0 to `i32::MAX`, then again from 0.
        sequence: u32,
        /// The 32 bytes of the record.
        record: [u64; 4],
    },
}

/// `iommu_hwpt_pgfault`: a page request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// PASID_VALID 1, LAST_PAGE 2.
    pub flags: u32,
    /// Whose.
    pub device: DeviceId,
    /// With which PASID, where flag PASID_VALID is set.
    pub pasid: u32,
    /// Number of the group, as the device gave it.
    pub group: u32,
    /// READ 1, WRITE 2, EXEC 4, PRIV 8.
    pub permissions: u32,
    /// The address.
    pub address: u64,
    /// What to answer the whole group by.
    pub cookie: u32,
}

/// Answer to a group of page requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseCode {
    /// `IOMMUFD_PAGE_RESP_SUCCESS`: the device tries again.
    Success,
    /// `IOMMUFD_PAGE_RESP_INVALID`: the access failed.
    Invalid,
}
