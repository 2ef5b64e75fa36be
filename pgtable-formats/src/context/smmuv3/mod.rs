//! SMMUv3 (Arm IHI 0070): stream table entry words, context-descriptor tables, context descriptors, events.
//!
//! The way of one access: a [`CdTable`] was made from the two stream table entry words that a guest binds
//! ([`CdTable::from_ste`]); [`CdTable::lookup`] finds the [`Cd`] of a PASID (SubstreamID) and judges it; the
//! [`Context`] that comes out walks the guest's VMSAv8-64 tables. A guest makes its tables with [`CdTable::create`],
//! [`CdTable::write`] and [`CdTable::clear`]. Where a guest binds the page tables of one PASID, as the registers of a
//! processor describe them, a [`PageTable`] is the same thing without the table of descriptors.
//!
//! What is judged is the non-secure EL1 stream world without stage 2, which is what a guest sees.
//!
//! Not supported: VMSAv8-32 (`AA64 = 0`) and VMSAv9-128 tables, permission indirection (PIE), the attribute
//! index extension (AIE), memory attributes (MAIR is carried in the raw layout and otherwise ignored), MPAM,
//! stall (`CD.S = 1` passes only where the endpoint may stall; the fault comes out like any other), `CD.A` (a fault does
//! not say how the transaction ends). A fault comes out whether or not it is to be recorded: [`Context::records`] and
//! [`Event::heeds_r`] tell that.

mod build;
mod caps;
mod cd;
mod context;
mod event;
mod page_table;
mod ste;
mod table;
#[cfg(test)]
mod tests;

pub use caps::{Caps, IdRegisters, Idr0, Idr1, Idr3, Idr5, StallModel, TableEndianness};
pub use cd::{Cd, CdSpec, CdWord0, CdWord1, CdWord2, CdWord5, HalfSpec, L1Cd, SpecError};
pub use context::{Context, context_from_cd};
pub use event::Event;
pub use page_table::{PageTable, PageTableRefusal, PageTableRegisters, Tcr};
pub use ste::{Ste0, Ste1};
pub use table::{CdTable, SteRefusal, TableFormat, Untagged};
