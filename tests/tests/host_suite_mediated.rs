//! The suite of hosts on machines that take one kind of table, and with mediation both: all cells of page table or PASID
//! table, SMMUv3 or VT-d.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "helpers of tests")]

mod host_suite_mediated {
    mod cells;
    mod failing;
    mod iommufd;
    mod restricted;
    mod soft;
}
