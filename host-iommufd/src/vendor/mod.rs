//! What each vendor's IOMMU takes: capabilities, tables, invalidations and events, between this project's words and
//! the vendor's.
//!
//! Pure functions: nothing here talks to the kernel.

mod block;
pub mod smmuv3;
pub mod vtd;
