//! The kernel's error numbers, out of what the crates below make of them.

use iommufd_ioctls::IommufdError;
use nix::errno::Errno;
use vfio_ioctls::VfioError;

/// The kernel's number out of an error of the standard library.
pub(super) fn io_errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// The kernel's number out of an error of `iommufd-ioctls`.
pub(super) fn errno_of(error: IommufdError) -> Errno {
    use IommufdError as E;
    match error {
        E::OpenIommufd(error) | E::AttachHwpt(error) => io_errno(&error),
        E::IommuDestroy(error)
        | E::IommuIoasAlloc(error)
        | E::IommuIoasMap(error)
        | E::IommuIoasMapFile(error)
        | E::IommuIoasUnmap(error)
        | E::IommuHwptAlloc(error)
        | E::IommuViommuAlloc(error)
        | E::IommuVdeviceAlloc(error)
        | E::IommuGetHwInfo(error)
        | E::IommuHwptInvalidate(error)
        | E::IommuVeventqAlloc(error)
        | E::VeventqNonBlocking(error)
        | E::IommuHwQueueAlloc(error) => Errno::from_raw(error.errno()),
        E::HwQueueUnsupported
        | E::UnsupportedViommuType(_)
        | E::UnsupportedVeventqType(_)
        | E::UnsupportedIommu(_)
        | E::IommuTypeMismatch(_) => Errno::EOPNOTSUPP,
    }
}

/// The kernel's number out of an error of attach and detach in `vfio-ioctls`.
pub(super) fn vfio_errno(error: VfioError) -> Errno {
    match error {
        VfioError::VfioDeviceAttachIommufdPt(error) | VfioError::VfioDeviceDetachIommufdPt(error) => {
            Errno::from_raw(error.errno())
        }
        _ => Errno::EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_keep_their_number() {
        let error = vmm_sys_util::errno::Error::new(95);
        assert_eq!(errno_of(IommufdError::IommuViommuAlloc(error)), Errno::EOPNOTSUPP);
        assert_eq!(
            vfio_errno(VfioError::VfioDeviceAttachIommufdPt(vmm_sys_util::errno::Error::new(2))),
            Errno::ENOENT
        );
        assert_eq!(io_errno(&std::io::Error::from_raw_os_error(16)), Errno::EBUSY);
    }
}
