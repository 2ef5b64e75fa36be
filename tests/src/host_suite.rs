//! What every [`Host`] has to prove, written once.
//!
//! A host comes as a [`HostUnderTest`]: the host itself, two endpoints behind it, memory for guest tables, and a way to
//! let an endpoint access memory. Each function is one property of the contract of [`Host`]; a test target calls them
//! all with a fresh host each, see [`host_suite!`](crate::host_suite!).
//!
//! No machine can do everything. What one cannot, it says with its reason ([`HostUnderTest::cannot`]); each check that
//! leaves something out for it says so (`skipped: CHECK: ABILITY: REASON`), and a test holds the list of what was left
//! out against the one that is expected ([`skips`]). An ability that is denied although the host has it is a failure.
//!
//! Which machines run it, with which kinds of tables, and what each leaves out, is in [`cells`].

mod abilities;
pub mod cells;
mod checks;
pub mod iommufd;
pub mod mediated;
pub mod memory;
mod page_requests;
mod restricted;
pub mod soft;
mod tables;

use std::collections::BTreeSet;

use pgtable_formats::{AccessKind, TableAlloc, TableMem};
use viommu_device::host::{FaultReport, Host, Stream};
use viommu_device::soft::Answer;
use viommu_wire::EndpointId;

pub use abilities::{Ability, Denied};
pub use checks::*;
pub use page_requests::*;
pub use restricted::Restricted;
pub use tables::*;

/// What becomes of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// It leads there.
    Reaches(u64),
    /// It fails.
    Fails,
    /// It waits for a page.
    Waits(Waiting),
}

/// An access that waits, as whoever makes accesses numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting(pub usize);

/// A host with what is around it.
pub trait HostUnderTest {
    /// The host.
    type Host: Host;
    /// The guest's memory, with an allocator for tables. Addresses from it are those that the host walks.
    type Memory: TableMem + TableAlloc;

    /// The host. No stream is bound when a test starts.
    fn host(&mut self) -> &mut Self::Host;

    /// The memory.
    fn memory(&mut self) -> &mut Self::Memory;

    /// Two endpoints that take the same tables, or none. The lowest 256 pages, and the pages of [`page`](Self::page), lie
    /// in no reserved region of theirs.
    fn endpoints(&self) -> [EndpointId; 2];

    /// Where an access of an endpoint leads that does not wait for a page; `None` where it faults.
    fn access(&mut self, stream: Stream, iova: u64, kind: AccessKind) -> Option<u64>;

    /// An access that waits for a page, where the endpoint's can.
    fn attempt(&mut self, stream: Stream, iova: u64, kind: AccessKind) -> Attempt {
        self.access(stream, iova, kind).map_or(Attempt::Fails, Attempt::Reaches)
    }

    /// What an access was told that waits; `None` as long as it was told nothing.
    fn answer(&mut self, waiting: Waiting) -> Option<Answer> {
        panic!("{waiting:?}: nothing waits here");
    }

    /// The fault of the last [`access`](Self::access), if the host has told it.
    fn told(&mut self) -> Option<FaultReport> {
        self.host().next_fault()
    }

    /// Addresses in guest memory that mappings may lead to: the page of this number, at least 256 of them.
    fn page(&self, number: u64) -> u64;

    /// Whether a cached translation is certain to stay visible until it is invalidated. Where it is not, the suite only
    /// checks that it is gone afterwards.
    fn shows_stale(&self) -> bool;

    /// Whether the guest turns ATS on where it hands over a table (Arm).
    fn ats(&self) -> bool {
        false
    }

    /// What this host, or what is around it, cannot do, and why.
    fn cannot(&self) -> &[Denied] {
        &[]
    }
}

/// Makes one test of each check of the suite: `host_suite!(make_a_host);`. For machines that are not everywhere,
/// `host_suite!(#[ignore = "why"] with)` makes ignored ones, each of which calls `with(name, check)`.
#[macro_export]
macro_rules! host_suite {
    (@tests $make:expr; $($name:ident)*) => {$(
        #[test]
        fn $name() {
            $crate::host_suite::run(stringify!($name), $crate::host_suite::$name, &mut $make);
        }
    )*};
    (@list $subject:ty; $($name:ident)*) => {
        vec![$((stringify!($name), $name as fn(&mut $subject))),*]
    };
    (@each $($then:tt)*) => {
        $crate::host_suite! {
            $($then)*
            unbound_streams_fault
            identity_leads_where_it_says
            mappings_translate_and_permit
            write_only_mappings
            overlap_changes_nothing
            unmap_splits_nothing
            unmap_takes_effect_at_once
            mappings_live_in_their_space
            bind_replaces_in_one_step
            unbind_closes
            spaces_outlive_their_streams
            refusals_change_nothing
            faults_are_told
            many_spaces
            what_is_denied_is_refused
            a_table_outside_memory_is_refused
            tables_serve_pasids
            stale_until_invalidated
            invalidation_by_range
            invalidation_of_contexts
            contexts_are_stale_until_invalidated
            invalidation_by_tag
            rebinding_starts_clean
            faults_of_tables_are_told
            missing_pages_are_asked_for
            groups_are_answered_in_any_order
            what_is_taken_away_asks_no_more
            a_flood_starves_nobody
            answers_of_others_are_to_nobody
        }
    };
    (@ignored $why:literal $run:ident; $($name:ident)*) => {$(
        #[test]
        #[ignore = $why]
        fn $name() {
            $run(stringify!($name), $crate::host_suite::$name);
        }
    )*};
    (#[ignore = $why:literal] $run:ident) => {
        $crate::host_suite! { @each @ignored $why $run; }
    };
    ($make:expr) => {
        $crate::host_suite! { @each @tests $make; }
    };
}

/// A check of the suite.
pub type Check<T> = fn(&mut T);

/// Every check, with its name: for those who are not a test target.
pub fn suite<T: HostUnderTest>() -> Vec<(&'static str, Check<T>)> {
    crate::host_suite!(@each @list T;)
}

/// Runs one check, and says what it left out.
pub fn run<T: HostUnderTest>(name: &'static str, check: Check<T>, test: &mut T) -> BTreeSet<Ability> {
    abilities::begin(name);
    check(test);
    abilities::end()
}

/// Runs every check, each with a fresh host, and says what was left out: the check, and the ability it would have needed.
pub fn skips<T: HostUnderTest>(mut make: impl FnMut() -> T) -> Vec<(&'static str, Ability)> {
    let mut skipped = Vec::new();
    for (name, check) in suite::<T>() {
        let abilities = run(name, check, &mut make());
        skipped.extend(abilities.into_iter().map(|ability| (name, ability)));
    }
    skipped
}
