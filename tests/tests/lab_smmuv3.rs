//! `IommufdHost` on the emulated SMMUv3 of the lab: a real kernel, and the DMA of real devices.
//!
//! Run in the lab: `tests/lab/cargo test -p viommu-tests --test lab_smmuv3 -- --include-ignored --test-threads=1`. Each
//! test takes the devices and gives them back, so that no two can run at a time.
//!
//! The tables of the captures and random ones are compared by `viommu hil` (`tests/lab/plan`).
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "helpers of tests"
)]

mod lab_smmuv3 {
    mod devices;
    mod events;
    mod kernel;
    mod reading;
    mod rig;
    mod writing;
}
