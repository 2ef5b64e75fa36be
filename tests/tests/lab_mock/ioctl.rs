//! The unsafe code of the mock: ioctls whose types are those of the kernel's own tests.
//!
//! Numbers and offsets are of Linux 7.3; those of [`TestOp`] belong to `CONFIG_IOMMUFD_TEST` and are no stable interface.

#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc;
use viommu_host_iommufd::kernel::InvalidateError;

/// What a nested table, an invalidation, a vIOMMU and an event of the mock are called.
pub(crate) mod kind {
    /// Of `IOMMU_HWPT_ALLOC`: two words, what the table's IOTLB holds and which page-table format it has.
    pub(crate) const TABLE: u32 = 0xdead;
    /// Of `IOMMU_HWPT_INVALIDATE` on a nested table (flags, slot) or a vIOMMU (flags, vDEVICE, slot).
    pub(crate) const INVALIDATION: u32 = 0xdead_beef;
    /// Of `IOMMU_VIOMMU_ALLOC`.
    pub(crate) const VIOMMU: u32 = 0xdead_beef;
    /// Of `IOMMU_VEVENTQ_ALLOC`: an event is one word, the vDEVICE's ID.
    pub(crate) const EVENT: u32 = 0xbeef_beef;
    /// Of `IOMMU_GET_HW_INFO`.
    pub(crate) const HARDWARE: u32 = 0xfeed_beef;
}

/// Page-table formats of the mock.
pub(crate) mod format {
    /// Translates 56 bits of address by pages of 4 KiB and 1 MiB. The default format has 31 bits, from 16 MiB on.
    pub(crate) const WIDE: u32 = 1;
}

/// A command of `IOMMU_TEST_CMD`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum TestOp {
    /// Makes a device and attaches it to an address space. Answers the numbers of [`Made`].
    MakeDevice { ioas: u32, flags: u32 },
    /// Attaches a device to another table.
    Replace { mock: u32, table: u32 },
    /// Attaches a PASID of a device to its first table.
    AttachPasid { mock: u32, pasid: u32, table: u32 },
    /// Attaches a PASID of a device to another table.
    ReplacePasid { mock: u32, pasid: u32, table: u32 },
    /// Detaches a PASID of a device.
    DetachPasid { mock: u32, pasid: u32 },
    /// Whether a PASID is attached to this table; 0: to none.
    CheckPasid { mock: u32, pasid: u32, table: u32 },
    /// Whether a table leads `iova` to the pages that the process has at `user`.
    CheckMap { table: u32, iova: u64, length: u64, user: u64 },
    /// How often the pages at `user` are pinned.
    CheckPins { user: u64, length: u64, pins: u32 },
    /// What slot `slot` of a nested table's IOTLB holds.
    CheckIotlb { table: u32, slot: u32, value: u32 },
    /// What slot `slot` of a device's own cache holds.
    CheckCache { device: u32, slot: u32, value: u32 },
    /// A device sends a page request, the only one of its group.
    PageRequest { device: u32, pasid: u32, group: u32, permissions: u32, address: u64 },
    /// An event of a device.
    Event { device: u32 },
    /// Makes an access, which reads and writes memory through an address space, as a device without an IOMMU. Answers a
    /// file.
    MakeAccess { ioas: u32 },
}

/// What [`TestOp::MakeDevice`] answers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Made {
    /// The mock: what attaches and detaches it.
    pub(crate) mock: u32,
    /// What it is bound as: what everybody else calls it.
    pub(crate) device: u32,
}

/// A mock has PASIDs of 20 bits.
pub(crate) const DEVICE_HAS_PASIDS: u32 = 1 << 2;
/// The PASID of a device that has none, in [`TestOp::PageRequest`].
pub(crate) const NO_PASID: u32 = 0;
/// The PASID whose second attach the mock fails with `ENOMEM`.
pub(crate) const UNRULY_PASID: u32 = 1024;

/// `struct iommu_test_cmd`: the operands are a union.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct TestCommand {
    size: u32,
    op: u32,
    id: u32,
    reserved: u32,
    operands: [u64; 6],
    last: u32,
    padding: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct HwptAlloc {
    size: u32,
    flags: u32,
    device: u32,
    parent: u32,
    out_table: u32,
    reserved: u32,
    data_type: u32,
    data_length: u32,
    data: u64,
    fault_queue: u32,
    reserved2: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct HwptInvalidate {
    size: u32,
    object: u32,
    data: u64,
    data_type: u32,
    entry_length: u32,
    entry_count: u32,
    reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ViommuAlloc {
    size: u32,
    flags: u32,
    kind: u32,
    device: u32,
    parent: u32,
    out_viommu: u32,
    data_length: u32,
    reserved: u32,
    data: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct VeventqAlloc {
    size: u32,
    flags: u32,
    viommu: u32,
    kind: u32,
    depth: u32,
    out_queue: u32,
    out_file: u32,
    reserved: u32,
}

/// A structure of iommufd with the number of its command.
trait Argument: Default {
    const NUMBER: libc::c_ulong;
}

impl Argument for TestCommand {
    const NUMBER: libc::c_ulong = 0x3ba0;
}

impl Argument for HwptAlloc {
    const NUMBER: libc::c_ulong = 0x3b89;
}

impl Argument for HwptInvalidate {
    const NUMBER: libc::c_ulong = 0x3b8d;
}

impl Argument for ViommuAlloc {
    const NUMBER: libc::c_ulong = 0x3b90;
}

impl Argument for VeventqAlloc {
    const NUMBER: libc::c_ulong = 0x3b93;
}

/// What `sizeof` says: the first word of each structure.
const fn size<T>() -> u32 {
    size_of::<T>() as u32
}

/// # Safety
/// Addresses in `argument` lead to memory that the kernel may read, or write, as the command says.
unsafe fn call<A: Argument>(iommufd: RawFd, argument: &mut A) -> Result<(), Errno> {
    // SAFETY: `argument` is the structure of this command and starts with its size; the rest is the caller's promise.
    Errno::result(unsafe { libc::ioctl(iommufd, A::NUMBER, &raw mut *argument) }).map(drop)
}

const fn pair(low: u32, high: u32) -> u64 {
    low as u64 | (high as u64) << 32
}

impl TestOp {
    /// Number, object, operands.
    fn encode(self) -> (u32, u32, [u64; 6]) {
        match self {
            Self::MakeDevice { ioas, flags } => (12, ioas, [0, pair(0, flags), 0, 0, 0, 0]),
            Self::Replace { mock, table } => (10, mock, [pair(table, 0), 0, 0, 0, 0, 0]),
            Self::AttachPasid { mock, pasid, table } => (18, mock, [pair(pasid, table), 0, 0, 0, 0, 0]),
            Self::ReplacePasid { mock, pasid, table } => (19, mock, [pair(pasid, table), 0, 0, 0, 0, 0]),
            Self::DetachPasid { mock, pasid } => (20, mock, [pair(pasid, 0), 0, 0, 0, 0, 0]),
            Self::CheckPasid { mock, pasid, table } => (21, mock, [pair(pasid, table), 0, 0, 0, 0, 0]),
            Self::CheckMap { table, iova, length, user } => (3, table, [iova, length, user, 0, 0, 0]),
            Self::CheckPins { user, length, pins } => (4, 0, [length, user, pair(pins, 0), 0, 0, 0]),
            Self::CheckIotlb { table, slot, value } => (14, table, [pair(slot, value), 0, 0, 0, 0, 0]),
            Self::CheckCache { device, slot, value } => (16, device, [pair(slot, value), 0, 0, 0, 0, 0]),
            Self::PageRequest { device, pasid, group, permissions, address } => {
                (15, 0, [pair(device, pasid), pair(group, permissions), address, 0, 0, 0])
            }
            Self::Event { device } => (17, 0, [pair(device, 0), 0, 0, 0, 0, 0]),
            Self::MakeAccess { ioas } => (5, ioas, [0; 6]),
        }
    }
}

fn test_command(iommufd: RawFd, (op, id, operands): (u32, u32, [u64; 6])) -> Result<[u64; 6], Errno> {
    let mut command = TestCommand { size: size::<TestCommand>(), op, id, operands, ..Default::default() };
    // SAFETY: of the commands that come here only CheckMap and CheckPins have an address. The kernel looks up the pages
    // behind it and refuses what is none; it reads and writes nothing there. ACCESS_RW has a buffer, see `access`.
    unsafe { call(iommufd, &mut command) }?;
    Ok(command.operands)
}

/// Runs a command of the kernel's own tests. Checks answer `EINVAL` where something else is found.
pub(crate) fn test(iommufd: RawFd, op: TestOp) -> Result<(), Errno> {
    test_command(iommufd, op.encode()).map(drop)
}

/// [`TestOp::MakeDevice`].
pub(crate) fn make_device(iommufd: RawFd, ioas: u32, flags: u32) -> Result<Made, Errno> {
    let [first, second, ..] = test_command(iommufd, TestOp::MakeDevice { ioas, flags }.encode())?;
    Ok(Made { mock: first as u32, device: second as u32 })
}

/// Reads, or writes, memory at `iova` of an address space; `EPERM` and `ENOENT` where it does not lead there.
pub(crate) fn access(
    iommufd: RawFd,
    ioas: u32,
    iova: u64,
    write: bool,
    bytes: &mut [u8],
) -> Result<(), Errno> {
    let [answer, ..] = test_command(iommufd, TestOp::MakeAccess { ioas }.encode())?;
    let file = answer as RawFd;
    // SAFETY: the kernel has just installed this descriptor for us, and nobody else knows of it.
    let file = unsafe { OwnedFd::from_raw_fd(file) };
    let operands =
        [iova, bytes.len() as u64, bytes.as_mut_ptr().expose_provenance() as u64, write.into(), 0, 0];
    let id = file.as_raw_fd() as u32;
    let mut command = TestCommand { size: size::<TestCommand>(), op: 8, id, operands, ..Default::default() };
    // SAFETY: the kernel reads or writes as many bytes at the third operand as the second says: those of `bytes`.
    unsafe { call(iommufd, &mut command) }
}

/// `IOMMU_HWPT_ALLOC` with the mock's data.
pub(crate) fn alloc_table(
    iommufd: RawFd,
    device: u32,
    parent: u32,
    flags: u32,
    fault_queue: u32,
    data: [u32; 2],
) -> Result<u32, Errno> {
    let mut argument = HwptAlloc {
        size: size::<HwptAlloc>(),
        flags,
        device,
        parent,
        data_type: kind::TABLE,
        data_length: size::<[u32; 2]>(),
        data: (&raw const data).expose_provenance() as u64,
        fault_queue,
        ..Default::default()
    };
    // SAFETY: the kernel reads `data_length` bytes at `data`.
    unsafe { call(iommufd, &mut argument) }?;
    Ok(argument.out_table)
}

/// `IOMMU_HWPT_INVALIDATE` with the mock's entries.
pub(crate) fn invalidate<const WORDS: usize>(
    iommufd: RawFd,
    object: u32,
    entries: &[[u32; WORDS]],
) -> Result<(), InvalidateError> {
    let entry_count =
        u32::try_from(entries.len()).map_err(|_| InvalidateError { done: 0, errno: Errno::EINVAL })?;
    let mut argument = HwptInvalidate {
        size: size::<HwptInvalidate>(),
        object,
        data: entries.as_ptr().expose_provenance() as u64,
        data_type: kind::INVALIDATION,
        entry_length: size::<[u32; WORDS]>(),
        entry_count,
        ..Default::default()
    };
    // SAFETY: the kernel reads `entry_count` entries of `entry_length` bytes at `data`.
    unsafe { call(iommufd, &mut argument) }
        .map_err(|errno| InvalidateError { done: argument.entry_count, errno })
}

/// `IOMMU_VIOMMU_ALLOC` of the mock's kind.
pub(crate) fn alloc_viommu(iommufd: RawFd, device: u32, parent: u32) -> Result<u32, Errno> {
    let size = size::<ViommuAlloc>();
    let mut argument = ViommuAlloc { size, kind: kind::VIOMMU, device, parent, ..Default::default() };
    // SAFETY: it has no data.
    unsafe { call(iommufd, &mut argument) }?;
    Ok(argument.out_viommu)
}

/// `IOMMU_VEVENTQ_ALLOC` of the mock's kind.
pub(crate) fn alloc_event_queue(iommufd: RawFd, viommu: u32, depth: u32) -> Result<(u32, File), Errno> {
    let size = size::<VeventqAlloc>();
    let mut argument = VeventqAlloc { size, viommu, kind: kind::EVENT, depth, ..Default::default() };
    // SAFETY: it has no addresses.
    unsafe { call(iommufd, &mut argument) }?;
    // SAFETY: the kernel has just installed this descriptor for us, and nobody else knows of it.
    let file = unsafe { File::from_raw_fd(argument.out_file as RawFd) };
    Ok((argument.out_queue, file))
}
