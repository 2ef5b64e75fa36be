//! The canonical first-stage page table.

use super::{Caps, FaultReason, Refusal};
use crate::{
    Access, AccessKind, Gpa, Iova, TableMem, Translation, WalkFault,
    format::Denied,
    leaf::x86::{X86, X86Flags, X86Levels, X86Params},
    walk,
};

bitflags::bitflags! {
    /// What a first-stage table is bound with, bit for bit as `iommu_hwpt_vtd_s1` has it.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct FirstStageFlags: u64 {
        /// Bit 0, SRE: privileged requests are enabled.
        const SRE = 1 << 0;
        /// Bit 1, EAFE: walks set extended-accessed flags.
        const EAFE = 1 << 1;
        /// Bit 2, WPE: read-only pages bind privileged writes; ignored without SRE.
        const WPE = 1 << 2;
    }
}

/// A first-stage page table in canonical form: 4 or 5 levels of x86-64 entries, and all that a walk needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstStage {
    format: X86,
}

impl FirstStage {
    /// Checks a table that is bound directly to one PASID. `address_width` is 48 or 57 bits.
    ///
    /// WPE without SRE is dropped: it has no effect. Whether the root lies in memory is for the caller to check, see
    /// [`extents`](Self::extents).
    ///
    /// # Errors
    /// What the numbers themselves show to be wrong.
    pub fn new(root: Gpa, flags: FirstStageFlags, address_width: u32, caps: &Caps) -> Result<Self, Refusal> {
        if !caps.first_stage {
            return Err(Refusal::FirstStage);
        }
        let levels = match address_width {
            48 => X86Levels::Four,
            57 if caps.fs5lp => X86Levels::Five,
            57 => return Err(Refusal::FiveLevels),
            _ => return Err(Refusal::AddressWidth(address_width)),
        };
        if !FirstStageFlags::all().contains(flags) {
            return Err(Refusal::Reserved);
        }
        if flags.contains(FirstStageFlags::SRE) && !caps.srs {
            return Err(Refusal::Privileged);
        }
        if flags.contains(FirstStageFlags::EAFE) && !caps.eafs {
            return Err(Refusal::ExtendedAccessed);
        }
        if !root.is_aligned(12) {
            return Err(Refusal::Alignment);
        }
        if root.0 >> caps.haw != 0 {
            return Err(Refusal::AddressSize { bits: caps.haw });
        }
        let mut format_flags = X86Flags::empty();
        format_flags.set(X86Flags::SRE, flags.contains(FirstStageFlags::SRE));
        format_flags.set(X86Flags::WPE, flags.contains(FirstStageFlags::WPE));
        format_flags.set(X86Flags::EAFE, flags.contains(FirstStageFlags::EAFE));
        Self::assemble(root, levels, format_flags, caps).ok_or(Refusal::AddressSize { bits: caps.haw })
    }

    /// The table of checked parts, with the flags SRE, WPE and EAFE.
    #[inline]
    pub(super) fn assemble(root: Gpa, levels: X86Levels, mut flags: X86Flags, caps: &Caps) -> Option<Self> {
        flags.set(X86Flags::FS1GP, caps.fs1gp);
        if !flags.contains(X86Flags::SRE) {
            flags.remove(X86Flags::WPE);
        }
        let format = X86::new(X86Params { root, levels, output_lg2: caps.haw, flags })?;
        Some(Self { format })
    }

    /// The root table.
    pub const fn root(&self) -> Gpa {
        self.format.params().root
    }

    /// Bits of a canonical address: 48 or 57.
    pub const fn address_width(&self) -> u32 {
        match self.format.params().levels {
            X86Levels::Four => 48,
            X86Levels::Five => 57,
        }
    }

    /// The flags, without what has no effect.
    pub const fn flags(&self) -> FirstStageFlags {
        let flags = self.format.params().flags;
        let mut answer = FirstStageFlags::empty();
        if flags.contains(X86Flags::SRE) {
            answer = answer.union(FirstStageFlags::SRE);
        }
        if flags.contains(X86Flags::WPE) {
            answer = answer.union(FirstStageFlags::WPE);
        }
        if flags.contains(X86Flags::EAFE) {
            answer = answer.union(FirstStageFlags::EAFE);
        }
        answer
    }

    /// Where the root table starts and its size in bytes.
    pub const fn extents(&self) -> (Gpa, u64) {
        (self.root(), 4096)
    }

    /// The format that walks and builds this table.
    #[inline]
    pub const fn format(&self) -> &X86 {
        &self.format
    }

    /// Walks the live table.
    ///
    /// # Errors
    /// In this order: 0x5c for an execute request (ERE is never set), 0x5d for a privileged request without SRE,
    /// 0x80 for an address that is not canonical; then per level 0x73 (root) or 0x70 where the table is not in
    /// memory, 0x71, 0x72; of the leaf 0x81, 0x82, 0x85, and 0x87 for an output in the interrupt range.
    #[inline]
    pub fn walk<M: TableMem>(&self, mem: &M, iova: Iova, access: Access) -> Result<Translation, FaultReason> {
        self.admit(access)?;
        walk(&self.format, mem, iova, access).map_err(|fault| self.reason(fault))
    }

    /// What the PASID entry says to a request before any table is read: SRE and ERE.
    ///
    /// # Errors
    /// 0x5c or 0x5d.
    #[inline]
    pub const fn admit(&self, access: Access) -> Result<(), FaultReason> {
        if matches!(access.kind, AccessKind::Execute) {
            return Err(FaultReason::EXECUTE_DISABLED);
        }
        if access.privileged && !self.format.params().flags.contains(X86Flags::SRE) {
            return Err(FaultReason::PRIVILEGED_DISABLED);
        }
        Ok(())
    }

    /// What the walker finds in this table, as a VT-d unit records it.
    #[cold]
    pub const fn reason(&self, fault: WalkFault) -> FaultReason {
        let top_level = match self.format.params().levels {
            X86Levels::Four => 3,
            X86Levels::Five => 4,
        };
        match fault {
            WalkFault::InputRange => FaultReason::NOT_CANONICAL,
            WalkFault::TableAccess { level } if level == top_level => FaultReason::ROOT_TABLE_ACCESS,
            WalkFault::TableAccess { .. } => FaultReason::TABLE_ACCESS,
            WalkFault::NotPresent { .. } => FaultReason::NOT_PRESENT,
            WalkFault::Reserved { .. } | WalkFault::AddressSize { .. } => FaultReason::RESERVED,
            WalkFault::Permission { denied, .. } => match denied {
                Denied::Privilege => FaultReason::USER_DENIED,
                Denied::Execute => FaultReason::EXECUTE_DENIED,
                Denied::Write => FaultReason::WRITE_DENIED,
                Denied::Read => FaultReason::READ_DENIED,
            },
            WalkFault::Output { .. } => FaultReason::INTERRUPT_RANGE,
            // VT-d sets accessed flags itself, so a clear one alone is never a fault.
            WalkFault::EntryUpdate { .. } | WalkFault::AccessFlag { .. } => FaultReason::ENTRY_UPDATE_FAILED,
        }
    }
}
