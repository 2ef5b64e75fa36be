//! VT-d scalable mode: PASID directories and tables, first-stage page tables, fault reasons.
//!
//! The way of one access: a [`PasidTable`] was made from what a guest binds (a directory, its size, the PASID of
//! untagged DMA); [`PasidTable::lookup`] finds the [`PasidEntry`] of a PASID and judges it; the [`FirstStage`] that
//! comes out walks the guest's tables. Where the guest binds one page table for one PASID, [`FirstStage::new`] makes
//! the same thing directly. A guest makes its tables with [`PasidTable::create`], [`PasidTable::write`] and
//! [`PasidTable::clear`].
//!
//! The layouts follow Intel's published `dmar_defs.h` and the behaviour of existing drivers and devices.
//!
//! Not supported: second-stage and nested entries (PGTT 2 and 3), legacy and abort modes, execute requests (ERE),
//! NXE, SMEP and memory types in PASID entries: no host interface can express them, so they are reserved here.
//! A fault comes out whether or not FPD stops its recording: [`PasidTable::disables_faults`] and
//! [`FaultReason::is_qualified`] tell that.

mod build;
mod caps;
mod context;
mod first_stage;
mod pasid;
mod reason;
mod scan;
mod table;
#[cfg(test)]
mod tests;

pub use caps::{Cap, CapRegisters, Caps, Ecap};
pub use context::{ContextEntry, ContextWord0, ContextWord1};
pub use first_stage::{FirstStage, FirstStageFlags};
pub use pasid::{DirectoryEntry, PasidEntry, PasidWord0, PasidWord1, PasidWord2};
pub use reason::FaultReason;
pub use table::{PasidTable, Refusal};
