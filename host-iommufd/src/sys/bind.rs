//! Why `/dev/iommu` or a device cannot be had, in words that say what to do.

use std::io;
use std::path::{Path, PathBuf};

use iommufd_ioctls::IommufdError;
use nix::errno::Errno;
use vfio_ioctls::VfioError;

use super::errno::errno_of;

/// `/dev/iommu` cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// There is none.
    #[error(
        "/dev/iommu does not exist: this kernel has no iommufd (CONFIG_IOMMUFD, Linux 6.6 or later; many \
         distributions build it as a module: try `modprobe iommufd`)"
    )]
    Missing,
    /// The file may not be opened.
    #[error(
        "/dev/iommu cannot be opened: permission denied (run as root, or give the user access to /dev/iommu and to \
         the device's file in /dev/vfio/devices)"
    )]
    Denied,
    /// Anything else.
    #[error("/dev/iommu cannot be used: {0}")]
    Os(Errno),
}

impl OpenError {
    pub(super) fn from_iommufd(error: IommufdError) -> Self {
        match errno_of(error) {
            Errno::ENOENT | Errno::ENXIO | Errno::ENODEV => Self::Missing,
            Errno::EACCES | Errno::EPERM => Self::Denied,
            errno => Self::Os(errno),
        }
    }
}

/// A device cannot be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// No such folder.
    #[error("{} does not exist: there is no such device", .0.display())]
    NoDevice(PathBuf),
    /// The device has no IOMMU group.
    #[error(
        "{} is behind no IOMMU: the firmware or the kernel has it off (Intel: `intel_iommu=on`; Arm: an SMMU in the \
         IORT or the device tree; virtual machines: give the machine an IOMMU)",
        .0.display()
    )]
    NoIommu(PathBuf),
    /// It is in the hands of a driver that is not VFIO's, or of none.
    #[error("{}", give_to_vfio(.device, .driver.as_deref()))]
    NotVfio {
        /// The folder in sysfs.
        device: PathBuf,
        /// The driver that has it.
        driver: Option<String>,
    },
    /// VFIO has it, and makes no character device.
    #[error(
        "{} has driver {driver} and no vfio-dev folder: the kernel makes no VFIO character devices \
         (CONFIG_VFIO_DEVICE_CDEV, Linux 6.6 or later)",
        .device.display()
    )]
    NoCdev {
        /// The folder in sysfs.
        device: PathBuf,
        /// Its driver.
        driver: String,
    },
    /// The character device cannot be opened.
    #[error("the VFIO character device of {} cannot be opened: {error}{}", .device.display(), open_hint(.error))]
    Open {
        /// The folder in sysfs.
        device: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// `EPERM`: interrupts of the device are not kept apart.
    #[error(
        "{} cannot be bound: its interrupts are not isolated, so it could raise any of the machine's. Turn interrupt \
         remapping on in the firmware (QEMU: `intremap=on`), or accept the risk by the kernel option \
         `iommufd.allow_unsafe_interrupts=1`",
        .0.display()
    )]
    NotIsolated(PathBuf),
    /// `EINVAL`, which has two meanings here.
    #[error(
        "{} cannot be bound, and the kernel does not say which of two reasons it has. Most likely it is open already, in \
         this process or another (`fuser /dev/vfio/devices/*`). Or its DMA is not coherent with the caches, and the \
         IOMMU cannot make it so (firmware has to say that it is: CCA in ACPI, dma-coherent in the device tree)",
        .0.display()
    )]
    OpenOrNotCoherent(PathBuf),
    /// `EBUSY`: a device of its group is in other hands.
    #[error(
        "{} cannot be bound: another device of its IOMMU group has a kernel driver or belongs to another process. The \
         devices in {}/iommu_group/devices go together",
        .0.display(), .0.display()
    )]
    Busy(PathBuf),
    /// An ioctl failed for another reason.
    #[error("{what} failed: {errno}")]
    Os {
        /// Which.
        what: &'static str,
        /// Why.
        errno: Errno,
    },
    /// VFIO answers something that is not a PCI or platform device.
    #[error("VFIO's answers about the device cannot be used: {0}")]
    Vfio(#[source] VfioError),
}

impl BindError {
    pub(super) fn from_vfio(device: &Path, error: VfioError) -> Self {
        let device = device.to_path_buf();
        let errno = match error {
            VfioError::OpenDeviceCdev(error) => return Self::Open { device, error },
            VfioError::InvalidVfioDev => return Self::without_cdev(device),
            VfioError::VfioDeviceBindIommufd(error) => Errno::from_raw(error.errno()),
            VfioError::VfioDeviceGetInfo(error) => {
                return Self::Os { what: "VFIO_DEVICE_GET_INFO", errno: Errno::from_raw(error.errno()) };
            }
            error => return Self::Vfio(error),
        };
        match errno {
            Errno::EPERM => Self::NotIsolated(device),
            Errno::EINVAL => Self::OpenOrNotCoherent(device),
            Errno::EBUSY => Self::Busy(device),
            errno => Self::Os { what: "VFIO_DEVICE_BIND_IOMMUFD", errno },
        }
    }

    /// Why `device` has no folder `vfio-dev`.
    fn without_cdev(device: PathBuf) -> Self {
        match driver(&device) {
            Some(driver) if driver.contains("vfio") => Self::NoCdev { device, driver },
            driver => Self::NotVfio { device, driver },
        }
    }
}

/// What can be seen of `device` before it is opened.
pub(super) fn check(device: &Path) -> Result<(), BindError> {
    if !device.is_dir() {
        return Err(BindError::NoDevice(device.to_path_buf()));
    }
    if !device.join("iommu_group").exists() {
        return Err(BindError::NoIommu(device.to_path_buf()));
    }
    if !device.join("vfio-dev").is_dir() {
        return Err(BindError::without_cdev(device.to_path_buf()));
    }
    Ok(())
}

fn driver(device: &Path) -> Option<String> {
    let link = device.join("driver").read_link().ok()?;
    Some(link.file_name()?.to_string_lossy().into_owned())
}

fn give_to_vfio(device: &Path, driver: Option<&str>) -> String {
    let path = device.display();
    let address = device.file_name().unwrap_or_default().to_string_lossy();
    let (whose, unbind) = match driver {
        Some(driver) => (format!("driver {driver}"), format!("echo {address} > {path}/driver/unbind; ")),
        None => ("no driver".to_owned(), String::new()),
    };
    format!(
        "{path} has {whose}, and VFIO has to have it. As root: `modprobe vfio-pci; {unbind}echo vfio-pci > \
         {path}/driver_override; echo {address} > /sys/bus/pci/drivers_probe`"
    )
}

fn open_hint(error: &io::Error) -> &'static str {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EACCES | Errno::EPERM) => " (run as root, or give the user access to it)",
        Some(Errno::ENOENT) => " (is there a devtmpfs or udev to make it?)",
        Some(Errno::EBUSY) => " (another process has it, or has its group through /dev/vfio/)",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// A folder of its own, gone when dropped.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("viommu-bind-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            let device = path.join("0000:01:00.0");
            fs::create_dir_all(device).unwrap();
            Self(path)
        }

        fn device(&self) -> PathBuf {
            self.0.join("0000:01:00.0")
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn no_such_device() {
        let error = check(Path::new("/nonexistent/0000:01:00.0")).unwrap_err();
        assert!(error.to_string().contains("there is no such device"), "{error}");
    }

    #[test]
    fn a_device_is_given_to_vfio_step_by_step() {
        let folder = Folder::new("steps");
        let device = folder.device();
        let error = check(&device).unwrap_err();
        assert!(matches!(error, BindError::NoIommu(_)), "{error}");

        symlink("../groups/7", device.join("iommu_group")).unwrap();
        fs::create_dir_all(folder.0.join("groups/7")).unwrap();
        let error = check(&device).unwrap_err();
        assert!(matches!(error, BindError::NotVfio { driver: None, .. }), "{error}");
        assert!(!error.to_string().contains("unbind"), "{error}");

        symlink("/sys/bus/pci/drivers/nvme", device.join("driver")).unwrap();
        let error = check(&device).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("driver nvme") && text.contains("driver/unbind"), "{text}");
        assert!(text.contains("echo 0000:01:00.0 > /sys/bus/pci/drivers_probe"), "{text}");

        fs::remove_file(device.join("driver")).unwrap();
        symlink("/sys/bus/pci/drivers/vfio-pci", device.join("driver")).unwrap();
        let error = check(&device).unwrap_err();
        assert!(error.to_string().contains("CONFIG_VFIO_DEVICE_CDEV"), "{error}");

        fs::create_dir(device.join("vfio-dev")).unwrap();
        check(&device).unwrap();
    }

    #[test]
    fn the_kernels_refusals_are_explained() {
        let device = Path::new("/sys/bus/pci/devices/0000:01:00.0");
        let bind = |errno: Errno| {
            let error = VfioError::VfioDeviceBindIommufd(vmm_sys_util::errno::Error::new(errno as i32));
            BindError::from_vfio(device, error).to_string()
        };
        assert!(bind(Errno::EPERM).contains("allow_unsafe_interrupts"));
        assert!(bind(Errno::EINVAL).contains("coherent"));
        assert!(bind(Errno::EBUSY).contains("IOMMU group"));
        assert!(bind(Errno::ENODEV).contains("ENODEV"));
        let open = VfioError::OpenDeviceCdev(io::Error::from_raw_os_error(13));
        assert!(BindError::from_vfio(device, open).to_string().contains("run as root"));
    }

    #[test]
    fn opening_tells_what_is_missing() {
        let open =
            |errno| OpenError::from_iommufd(IommufdError::OpenIommufd(io::Error::from_raw_os_error(errno)));
        assert_eq!(open(2), OpenError::Missing);
        assert_eq!(open(13), OpenError::Denied);
        assert_eq!(open(24), OpenError::Os(Errno::EMFILE));
        assert!(OpenError::Missing.to_string().contains("CONFIG_IOMMUFD"));
    }
}
