//! The kernel's own mock (`CONFIG_IOMMUFD_TEST`): real ioctls for what the emulated hardware does not have.
//!
//! Run in the lab: `tests/lab/cargo test -p viommu-tests --test lab_mock -- --include-ignored --test-threads=1`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "helpers of tests"
)]

mod lab_mock {
    mod host;
    mod ioctl;
    mod kernel;
    mod mediated;
    mod mocks;
    mod page_requests;
    mod rules;
}
