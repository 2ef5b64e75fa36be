//! From a stream to a stage-1 page table: context descriptors and PASID tables.
//!
//! A guest's raw words become a [`Canonical`] value once, when they are bound: capabilities applied, unknown and
//! ignored bits gone. What the table in memory holds is judged at each [`lookup`](Canonical::lookup), as hardware does.

mod build;
#[cfg(test)]
mod journal;
pub mod smmuv3;
pub mod vtd;

pub use build::BuildError;

use crate::{Access, Fault, Gpa, Iova, Pasid, TableMem, Translation};

/// A guest table that was checked and may be handed over: only this crosses to a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Canonical {
    /// An SMMUv3 context-descriptor table: all PASIDs of an endpoint.
    Smmuv3(smmuv3::CdTable),
    /// The VMSAv8-64 page tables of one PASID of an endpoint behind an SMMUv3.
    Smmuv3PageTable(smmuv3::PageTable),
    /// A VT-d scalable-mode PASID directory: all PASIDs of an endpoint.
    VtdPasidTable(vtd::PasidTable),
    /// A VT-d first-stage page table: one PASID of an endpoint.
    VtdFirstStage(vtd::FirstStage),
}

/// What a PASID translates through.
// A tag of a whole word keeps the copies of a lookup's answer in whole words: they are on the path of every miss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Context {
    /// Stage 1 is bypassed: output equals input.
    Bypass,
    /// A stage-1 page table.
    Stage1(Stage1),
}

/// A stage-1 page table with all that a walk needs; what hardware keeps of a context once it has been fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Stage1 {
    /// VMSAv8-64 tables of an SMMUv3 context descriptor.
    Smmuv3(smmuv3::Context),
    /// VT-d first-stage tables.
    Vtd(vtd::FirstStage),
}

impl Canonical {
    /// Whether the table serves every PASID of its endpoint, or just the one it is bound to.
    pub const fn has_pasids(&self) -> bool {
        matches!(self, Self::Smmuv3(_) | Self::VtdPasidTable(_))
    }

    /// What the table itself takes up: where each part of it starts, and its size in bytes. What it leads to is not
    /// among it.
    pub fn extents(&self) -> impl Iterator<Item = (Gpa, u64)> {
        let (first, second) = match self {
            Self::Smmuv3(table) => (Some(table.extents()), None),
            Self::Smmuv3PageTable(table) => table.extents().into(),
            Self::VtdPasidTable(table) => (Some(table.extents()), None),
            Self::VtdFirstStage(table) => (Some(table.extents()), None),
        };
        first.into_iter().chain(second)
    }

    /// The PASID whose entry serves `pasid`: untagged DMA (`None`) may use an entry of its own. `None` where it
    /// uses no entry at all. Caches are tagged with the answer.
    #[inline]
    pub fn effective_pasid(&self, pasid: Option<Pasid>) -> Option<Pasid> {
        match self {
            Self::Smmuv3(table) => table.effective_pasid(pasid),
            Self::VtdPasidTable(table) => Some(pasid.unwrap_or(table.untagged())),
            Self::Smmuv3PageTable(_) | Self::VtdFirstStage(_) => pasid,
        }
    }

    /// Reads the entry of `pasid` (`None`: untagged DMA) from the live table.
    ///
    /// # Errors
    /// The fault that the architecture records, in its order of checks.
    #[inline]
    pub fn lookup<M: TableMem>(&self, mem: &M, pasid: Option<Pasid>) -> Result<Context, Fault> {
        match self {
            Self::Smmuv3(table) => table.lookup(mem, pasid).map_err(Fault::Smmuv3),
            Self::Smmuv3PageTable(table) => Ok(Context::Stage1(Stage1::Smmuv3(table.context()))),
            Self::VtdPasidTable(table) => table.lookup(mem, pasid).map_err(Fault::Vtd),
            Self::VtdFirstStage(table) => Ok(Context::Stage1(Stage1::Vtd(*table))),
        }
    }
}

impl Canonical {
    /// Whether the table says that `fault` of an access with `pasid` (`None`: untagged DMA) is not to be recorded:
    /// CD.R = 0 on Arm, FPD = 1 on VT-d. The access has failed all the same.
    ///
    /// `stage1` is what the access was translated by, where that is known: a table in memory may say something else by
    /// now.
    #[cold]
    pub fn silences<M: TableMem>(
        &self,
        mem: &M,
        pasid: Option<Pasid>,
        stage1: Option<&Stage1>,
        fault: Fault,
    ) -> bool {
        match (self, fault) {
            (Self::Smmuv3(_) | Self::Smmuv3PageTable(_), Fault::Smmuv3(event)) if event.heeds_r() => {
                let found = match stage1 {
                    Some(stage1) => Some(*stage1),
                    None => match self.lookup(mem, pasid) {
                        Ok(Context::Stage1(stage1)) => Some(stage1),
                        Ok(Context::Bypass) | Err(_) => None,
                    },
                };
                matches!(found, Some(Stage1::Smmuv3(context)) if !context.records())
            }
            (Self::VtdPasidTable(table), Fault::Vtd(reason)) if reason.is_qualified() => {
                table.disables_faults(mem, pasid)
            }
            _ => false,
        }
    }
}

impl Stage1 {
    /// Walks the live table for `iova`.
    ///
    /// # Errors
    /// The fault that the architecture records, in its order of checks.
    #[inline]
    pub fn walk<M: TableMem>(&self, mem: &M, iova: Iova, access: Access) -> Result<Translation, Fault> {
        match self {
            Self::Smmuv3(context) => context.walk(mem, iova, access).map_err(Fault::Smmuv3),
            Self::Vtd(table) => table.walk(mem, iova, access).map_err(Fault::Vtd),
        }
    }

    /// The architecture's address-space tag on cached translations: the ASID on Arm; VT-d tags by PASID alone.
    #[inline]
    pub const fn tag(&self) -> Option<u16> {
        match self {
            Self::Smmuv3(context) => Some(context.asid()),
            Self::Vtd(_) => None,
        }
    }
}
