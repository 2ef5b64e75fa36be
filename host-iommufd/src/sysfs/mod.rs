//! What sysfs, procfs and the firmware's tables say of devices, their groups, IOMMUs and the kernel.
//!
//! Nothing here opens a device or changes anything: [`Machine::read`] looks, and keeps apart what is not there from what
//! may not be seen ([`Seen`]). [`reserved_regions`] is what [`PROBE`](viommu_wire::Property::ReservedRegion) tells a guest
//! of a device.
//!
//! All paths lie below a [`Root`], so that the tree of another machine can be read as well.
//!
//! Not supported: devices on other buses than PCI (they are listed by name), firmware tables other than the IORT (DMAR,
//! IVRS and others are known by name alone), SMMUs described by a device tree.

mod config_space;
mod group;
mod instance;
mod iort;
mod kconfig;
mod machine;
mod pci;
mod root;
mod system;

pub use config_space::{Ats, ConfigSpace, HeaderType, PasidCapability, Sriov};
pub use group::{Group, Region, RegionKind, reserved_regions};
pub use instance::{IommuInstance, IommuKind};
pub use iort::{Iort, IortError, RootComplex};
pub use kconfig::{KernelConfig, Setting};
pub use machine::Machine;
pub use pci::{Bdf, InvalidBdf, PciDevice, VfioCdev};
pub use root::{Root, Seen};
pub use system::{Architecture, CpuMaker, Firmware, Node, Release, System};
