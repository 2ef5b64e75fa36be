//! What the suite leaves out on each machine: this, and nothing else.

use viommu_tests::host_suite::iommufd::{Fakes, Layout};
use viommu_tests::host_suite::{Ability, skips};

/// What no host through Linux can.
const EVERYWHERE: [(&str, Ability); 3] = [
    ("identity_leads_where_it_says", Ability::BypassBeyondMemory),
    ("faults_are_told", Ability::UnboundFaults),
    ("faults_are_told", Ability::MappingFaults),
];

fn check(make: fn() -> Fakes, more: &[(&'static str, Ability)]) {
    let mut seen = skips(make);
    let mut expected: Vec<_> = EVERYWHERE.iter().chain(more).copied().collect();
    seen.sort_unstable();
    expected.sort_unstable();
    assert_eq!(seen, expected);
}

const NO_PAGE_TABLES: [(&str, Ability); 3] = [
    ("a_table_outside_memory_is_refused", Ability::PageTables),
    ("single_tables_serve_one_pasid", Ability::PageTables),
    ("single_tables_are_stale_until_invalidated", Ability::PageTables),
];

const NO_PASID_TABLES: [(&str, Ability); 6] = [
    ("a_table_outside_memory_is_refused", Ability::PasidTables),
    ("tables_serve_pasids", Ability::PasidTables),
    ("stale_until_invalidated", Ability::PasidTables),
    ("invalidation_by_range", Ability::PasidTables),
    ("invalidation_of_contexts", Ability::PasidTables),
    ("rebinding_starts_clean", Ability::PasidTables),
];

#[test]
fn of_an_smmuv3() {
    let arm = [
        ("identity_leads_where_it_says", Ability::PasidBypass),
        ("write_only_mappings", Ability::WriteOnly),
        ("stale_until_invalidated", Ability::NarrowUntagged),
        ("invalidation_by_range", Ability::NarrowUntagged),
    ];
    check(|| Fakes::smmuv3(Layout::OneUnit, false), &[&arm[..], &NO_PAGE_TABLES].concat());
    let ats = [("faults_of_tables_are_told", Ability::TableFaults)];
    check(|| Fakes::smmuv3(Layout::OneUnit, true), &[&arm[..], &NO_PAGE_TABLES, &ats].concat());
}

#[test]
fn of_the_emulated_smmuv3() {
    let arm = [
        ("unbound_streams_fault", Ability::Pasids),
        ("identity_leads_where_it_says", Ability::Pasids),
        ("mappings_translate_and_permit", Ability::Pasids),
        ("write_only_mappings", Ability::WriteOnly),
        ("tables_serve_pasids", Ability::Pasids),
        ("stale_until_invalidated", Ability::Pasids),
        ("invalidation_by_range", Ability::Pasids),
        ("invalidation_of_contexts", Ability::Pasids),
        ("invalidation_by_tag", Ability::Pasids),
        ("rebinding_starts_clean", Ability::Pasids),
        ("faults_of_tables_are_told", Ability::Pasids),
    ];
    check(Fakes::emulated, &[&arm[..], &NO_PAGE_TABLES].concat());
}

#[test]
fn of_vtd() {
    let intel = [
        ("identity_leads_where_it_says", Ability::PasidBypass),
        ("write_only_mappings", Ability::WriteOnly),
        ("invalidation_by_tag", Ability::Tags),
        ("faults_of_tables_are_told", Ability::TableFaults),
    ];
    check(|| Fakes::vtd(Layout::OneUnit), &[&intel[..], &NO_PASID_TABLES].concat());
}

#[test]
fn without_nested_translation() {
    let plain = [
        ("unbound_streams_fault", Ability::Pasids),
        ("identity_leads_where_it_says", Ability::Pasids),
        ("mappings_translate_and_permit", Ability::Pasids),
        ("invalidation_by_tag", Ability::Tags),
        ("faults_of_tables_are_told", Ability::TableFaults),
    ];
    let more = [&plain[..], &NO_PAGE_TABLES, &NO_PASID_TABLES].concat();
    check(|| Fakes::plain(Layout::OneUnit), &more);
}
