//! The suite of hosts with mediation, on machines that take one kind of table; and what is special to mediation.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "helpers of tests")]

mod host_suite_mediated {
    mod cells;
    mod failing;
    mod iommufd;
    mod soft;
}
