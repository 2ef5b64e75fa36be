//! What a host may be without.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt;

use super::HostUnderTest;

/// Something that not every host, or not everything around one, can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ability {
    /// Accesses of endpoints: without, only answers are checked.
    Dma,
    /// Accesses that read.
    Reads,
    /// Accesses that write.
    Writes,
    /// Accesses with a PASID, and tables of more than one.
    Pasids,
    /// Bypass for accesses with a PASID.
    PasidBypass,
    /// Bypass to addresses that are not guest memory.
    BypassBeyondMemory,
    /// Mappings that are written and not read.
    WriteOnly,
    /// Tables of all PASIDs, which the guest fills.
    PasidTables,
    /// Page tables for one PASID.
    PageTables,
    /// Invalidation by the architecture's tag.
    Tags,
    /// Invalidation of one PASID without its tag that leaves other PASIDs alone.
    NarrowUntagged,
    /// Telling faults of streams that are bound to nothing.
    UnboundFaults,
    /// Telling faults of bypass and mappings.
    MappingFaults,
    /// Telling faults of guests' tables.
    TableFaults,
    /// Accesses that wait for a page.
    PageRequests,
}

/// An ability that is not there, and why.
pub type Denied = (Ability, &'static str);

/// In words.
impl fmt::Display for Ability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dma => "accesses",
            Self::Reads => "reads",
            Self::Writes => "writes",
            Self::Pasids => "PASIDs",
            Self::PasidBypass => "bypass with a PASID",
            Self::BypassBeyondMemory => "bypass beyond memory",
            Self::WriteOnly => "write-only mappings",
            Self::PasidTables => "PASID tables",
            Self::PageTables => "page tables of one PASID",
            Self::Tags => "invalidation by tag",
            Self::NarrowUntagged => "narrow invalidation without a tag",
            Self::UnboundFaults => "faults of unbound streams",
            Self::MappingFaults => "faults of mappings",
            Self::TableFaults => "faults of tables",
            Self::PageRequests => "page requests",
        })
    }
}

#[derive(Default)]
struct Running {
    check: &'static str,
    skipped: BTreeSet<Ability>,
}

thread_local! {
    static RUNNING: RefCell<Running> = RefCell::default();
}

/// A check begins.
pub(super) fn begin(check: &'static str) {
    RUNNING.set(Running { check, skipped: BTreeSet::new() });
}

/// It has ended: what it has left out.
pub(super) fn end() -> BTreeSet<Ability> {
    RUNNING.take().skipped
}

/// Whether the host has every one of these; where it has not, the check says what it leaves out.
pub(super) fn can<T: HostUnderTest>(test: &T, needed: &[Ability]) -> bool {
    let denied = |wanted: &Ability| test.cannot().iter().find(|(ability, _)| ability == wanted);
    let Some((ability, reason)) = needed.iter().find_map(denied) else { return true };
    RUNNING.with_borrow_mut(|running| {
        if running.skipped.insert(*ability) {
            println!("skipped: {}: {ability}: {reason}", running.check);
        }
    });
    false
}
