//! What the tests, the fuzz targets and the benchmarks of the workspace share. Not published.
//!
//! - [`rig`]: guest and device back to back over real virtqueues in shared memory, and the device alone.
//! - [`tables`]: guest tables of either architecture, made by hand.
//! - [`model`]: a reference model of the device, and what runs the two side by side.
//! - [`mod@host_suite`]: what every [`Host`](viommu_device::host::Host) has to prove.
//! - [`mod@kernel_suite`]: what is relied on of iommufd, for the kernel and its stand-ins.
//!
//! Everything here panics where something is not as it must be: it is test code.
#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test that cannot go on has to say so"
)]

pub mod fuzz;
pub mod host_suite;
pub mod kernel_suite;
pub mod model;
pub mod rig;
pub mod tables;
