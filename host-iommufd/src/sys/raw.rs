//! The unsafe code of this crate: ioctls that `iommufd-ioctls` has no wrapper for, descriptors that the kernel hands
//! out, and pointers that go into its structures.

#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

use iommufd_bindings::iommufd::{
    iommu_fault_alloc, iommu_hw_info, iommu_hwpt_alloc, iommu_hwpt_invalidate, iommu_ioas_iova_ranges,
    iommu_iova_range,
};
use iommufd_ioctls::IommuFd;
use nix::errno::Errno;

use super::errno::errno_of;
use super::hw_info::REGISTERS_LENGTH;
use crate::kernel::{InvalidateError, ObjectId};

// The commands of A1 that iommufd-ioctls 0.4 lacks. Type byte ';' and no direction or size bits (`_IO`).
const IOAS_IOVA_RANGES: u32 = 0x3B84;
const FAULT_QUEUE_ALLOC: u32 = 0x3B8E;

mod ioctl {
    use super::{FAULT_QUEUE_ALLOC, IOAS_IOVA_RANGES, iommu_fault_alloc, iommu_ioas_iova_ranges};

    nix::ioctl_readwrite_bad!(ioas_iova_ranges, IOAS_IOVA_RANGES, iommu_ioas_iova_ranges);
    nix::ioctl_readwrite_bad!(fault_queue_alloc, FAULT_QUEUE_ALLOC, iommu_fault_alloc);
}

/// Answer of `IOMMU_IOAS_IOVA_RANGES` to an array of a given length.
pub(super) enum RangesAnswer {
    /// The array was long enough; `ranges` is cut to what the kernel filled.
    All {
        /// As the kernel has them.
        ranges: Vec<iommu_iova_range>,
        /// `out_iova_alignment`.
        alignment: u64,
    },
    /// `EMSGSIZE`: so many would be needed.
    Needs(u32),
}

/// One `IOMMU_IOAS_IOVA_RANGES` with room for `room` ranges.
pub(super) fn iova_ranges(iommufd: &IommuFd, ioas: u32, room: u32) -> Result<RangesAnswer, Errno> {
    let mut ranges = vec![iommu_iova_range::default(); usize::try_from(room).map_err(|_| Errno::EOVERFLOW)?];
    let mut arg = iommu_ioas_iova_ranges {
        size: size::<iommu_ioas_iova_ranges>(),
        ioas_id: ioas,
        num_iovas: room,
        allowed_iovas: address(ranges.as_mut_ptr()),
        ..Default::default()
    };
    // SAFETY: `arg` is the structure of this command, with its size; `allowed_iovas` points to `num_iovas` ranges that
    // are alive and borrowed by nobody else, of a type that any bits are valid for.
    match unsafe { ioctl::ioas_iova_ranges(iommufd.as_raw_fd(), &raw mut arg) } {
        Ok(_) => {
            ranges.truncate(usize::try_from(arg.num_iovas).unwrap_or(usize::MAX));
            Ok(RangesAnswer::All { ranges, alignment: arg.out_iova_alignment })
        }
        Err(Errno::EMSGSIZE) => Ok(RangesAnswer::Needs(arg.num_iovas)),
        Err(errno) => Err(errno),
    }
}

/// `IOMMU_FAULT_QUEUE_ALLOC`: the queue and its file.
pub(super) fn alloc_fault_queue(iommufd: &IommuFd) -> Result<(ObjectId, File), Errno> {
    let mut arg = iommu_fault_alloc { size: size::<iommu_fault_alloc>(), ..Default::default() };
    // SAFETY: `arg` is the structure of this command, with its size.
    unsafe { ioctl::fault_queue_alloc(iommufd.as_raw_fd(), &raw mut arg) }?;
    let fd = RawFd::try_from(arg.out_fault_fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just installed this descriptor for us, and nobody else knows of it.
    Ok((ObjectId(arg.out_fault_id), unsafe { File::from_raw_fd(fd) }))
}

/// What `IOMMU_GET_HW_INFO` answers.
pub(super) struct RawHwInfo {
    /// `out_data_type`.
    pub(super) kind: u32,
    /// The registers, zero behind what the kernel has.
    pub(super) registers: [u8; REGISTERS_LENGTH],
    /// `out_max_pasid_log2`.
    pub(super) max_pasid_lg2: u8,
    /// `out_capabilities`.
    pub(super) capabilities: u64,
}

/// `IOMMU_GET_HW_INFO`, the default type of the device's IOMMU.
pub(super) fn hw_info(iommufd: &IommuFd, device: u32) -> Result<RawHwInfo, Errno> {
    let mut registers = [0u8; REGISTERS_LENGTH];
    let mut arg = iommu_hw_info {
        size: size::<iommu_hw_info>(),
        dev_id: device,
        // A constant of a few words.
        data_len: u32::try_from(REGISTERS_LENGTH).unwrap_or(0),
        data_uptr: address(registers.as_mut_ptr()),
        ..Default::default()
    };
    // The kernel writes at most `data_len` bytes to `data_uptr`, which are `registers`, alive and borrowed by nobody.
    iommufd.get_hw_info(&mut arg).map_err(errno_of)?;
    // SAFETY: the union holds one u32 under either name.
    let kind = unsafe { arg.__bindgen_anon_1.out_data_type };
    Ok(RawHwInfo {
        kind,
        registers,
        max_pasid_lg2: arg.out_max_pasid_log2,
        capabilities: arg.out_capabilities,
    })
}

/// `IOMMU_HWPT_ALLOC` of what `arg` says, with `data` as the guest's table (`()` where it is not a nested one).
pub(super) fn alloc_hwpt<T>(
    iommufd: &IommuFd,
    mut arg: iommu_hwpt_alloc,
    data: &T,
) -> Result<ObjectId, Errno> {
    arg.size = size::<iommu_hwpt_alloc>();
    arg.data_len = size::<T>();
    arg.data_uptr = if arg.data_len == 0 { 0 } else { address(data) };
    iommufd.alloc_iommu_hwpt(&mut arg).map_err(errno_of)?;
    Ok(ObjectId(arg.out_hwpt_id))
}

/// `IOMMU_HWPT_INVALIDATE` of `entries`, which the kernel reads.
pub(super) fn invalidate<T>(
    iommufd: &IommuFd,
    object: u32,
    data_type: u32,
    entries: &[T],
) -> Result<(), InvalidateError> {
    let count = u32::try_from(entries.len());
    let count = count.map_err(|_| InvalidateError { done: 0, errno: Errno::EINVAL })?;
    let mut arg = iommu_hwpt_invalidate {
        size: size::<iommu_hwpt_invalidate>(),
        hwpt_id: object,
        data_uptr: address(entries.as_ptr()),
        data_type,
        entry_len: size::<T>(),
        entry_num: count,
        ..Default::default()
    };
    match iommufd.invalidate_hwpt(&mut arg) {
        Ok(()) if arg.entry_num >= count => Ok(()),
        Ok(()) => Err(InvalidateError { done: arg.entry_num, errno: Errno::EIO }),
        // A command that the kernel refuses as a whole leaves the number as it was.
        Err(error) => Err(InvalidateError {
            done: if arg.entry_num >= count { 0 } else { arg.entry_num },
            errno: errno_of(error),
        }),
    }
}

/// `sizeof`, as the kernel's structures have it.
pub(super) fn size<T>() -> u32 {
    // Structures of this API are some words long.
    u32::try_from(size_of::<T>()).unwrap_or(u32::MAX)
}

fn address<T>(pointer: *const T) -> u64 {
    pointer.expose_provenance() as u64
}
