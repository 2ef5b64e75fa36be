//! One test for each normative statement, named by its id: `d` the device's of the ratified chapter, `r` the driver's,
//! `x` those of the extension. `requirements.toml` says what each id means.
//!
//! What must be refused is sent through a real queue, and afterwards nothing may have changed for any endpoint and the
//! device must still work.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "helpers of tests"
)]

mod conformance {
    mod attach;
    mod detach;
    mod driver;
    mod events;
    mod features_config;
    mod handover;
    mod interrupts;
    mod invalidate;
    mod map;
    mod page_requests;
    mod page_tables;
    mod probe;
    mod requests;
    mod unmap;
}
