//! What the suite leaves out on each machine: this, and nothing else. On those that fill a cell it is what
//! [`cells`] says.

use std::collections::BTreeSet;

use viommu_tests::host_suite::cells::{self, Hardware, Machine};
use viommu_tests::host_suite::iommufd::{Fakes, Layout};
use viommu_tests::host_suite::{Ability, skips};

fn entry(kernel: cells::Kernel, hardware: Hardware) -> &'static cells::Entry {
    cells::entry(Machine::Iommufd(kernel), hardware, false)
}

/// The checks of accesses that wait.
const PAGE_REQUESTS: [(&str, Ability); 5] = [
    ("missing_pages_are_asked_for", Ability::PageRequests),
    ("groups_are_answered_in_any_order", Ability::PageRequests),
    ("what_is_taken_away_asks_no_more", Ability::PageRequests),
    ("a_flood_starves_nobody", Ability::PageRequests),
    ("answers_of_others_are_to_nobody", Ability::PageRequests),
];

fn left_out(make: fn() -> Fakes) -> BTreeSet<(&'static str, Ability)> {
    skips(make).into_iter().collect()
}

#[test]
fn of_an_smmuv3() {
    let entry = entry(cells::Kernel::MadeUp, Hardware::Smmuv3);
    assert_eq!(left_out(|| Fakes::smmuv3(Layout::TwoUnits, false)), entry.left_out());
    assert_eq!(left_out(Fakes::smmuv3_without_ranges), entry.left_out());
    assert_eq!(left_out(Fakes::smmuv3_with_erratum), entry.left_out());
    // With ATS, no kind of table has faults that are told.
    let mut with_ats = entry.left_out();
    with_ats.remove(&("faults_of_tables_are_told", Ability::PageTables));
    with_ats.insert(("faults_of_tables_are_told", Ability::TableFaults));
    assert_eq!(left_out(|| Fakes::smmuv3(Layout::OneUnit, true)), with_ats);
}

/// What the lab's machine leaves out, but for what its devices cannot.
#[test]
fn of_the_emulated_smmuv3() {
    let mut expected = entry(cells::Kernel::Emulated, Hardware::Smmuv3).left_out();
    expected.retain(|(_, ability)| *ability != Ability::Reads);
    assert_eq!(left_out(Fakes::emulated), expected);
}

#[test]
fn of_vtd() {
    let entry = entry(cells::Kernel::MadeUp, Hardware::Vtd);
    assert_eq!(left_out(|| Fakes::vtd_asking(Layout::TwoUnits)), entry.left_out());
    let mut impatient = entry.left_out();
    impatient.retain(|(check, _)| PAGE_REQUESTS.iter().all(|(of, _)| of != check));
    impatient.extend(PAGE_REQUESTS);
    impatient.insert(("what_is_denied_is_refused", Ability::PasidTables));
    assert_eq!(left_out(|| Fakes::vtd(Layout::TwoUnits)), impatient);
}

#[test]
fn without_nested_translation() {
    let of_tables = |check| [(check, Ability::PasidTables), (check, Ability::PageTables)];
    let mut expected: BTreeSet<_> = [
        "what_is_denied_is_refused",
        "a_table_outside_memory_is_refused",
        "tables_serve_pasids",
        "stale_until_invalidated",
        "invalidation_by_range",
        "invalidation_of_contexts",
        "rebinding_starts_clean",
    ]
    .into_iter()
    .flat_map(of_tables)
    .collect();
    expected.extend([
        ("unbound_streams_fault", Ability::Pasids),
        ("identity_leads_where_it_says", Ability::Pasids),
        ("identity_leads_where_it_says", Ability::BypassBeyondMemory),
        ("mappings_translate_and_permit", Ability::Pasids),
        ("faults_are_told", Ability::UnboundFaults),
        ("faults_are_told", Ability::MappingFaults),
        ("contexts_are_stale_until_invalidated", Ability::PasidTables),
        ("invalidation_by_tag", Ability::Tags),
        ("faults_of_tables_are_told", Ability::TableFaults),
    ]);
    expected.extend(PAGE_REQUESTS);
    assert_eq!(left_out(|| Fakes::plain(Layout::OneUnit)), expected);
}
