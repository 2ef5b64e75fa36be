//! The suite of hosts on the software host, and the cells that all machines together fill.

use viommu_tests::host_suite::cells::{ENTRIES, Hardware, Kernel, Machine, cells_here, entry, table};
use viommu_tests::host_suite::iommufd::{Fakes, Layout};
use viommu_tests::host_suite::mediated::MediatedFakes;
use viommu_tests::host_suite::soft::{ARM, IMPATIENT, INTEL, NO_TABLES, PLAIN, SMMUV3, Soft, VTD};
use viommu_tests::host_suite::{Ability, skips, suite};

mod smmuv3 {
    use super::{ARM, SMMUV3, Soft};
    viommu_tests::host_suite!(Soft::native(SMMUV3, false, ARM));
}

mod vtd {
    use super::{INTEL, Soft, VTD};
    viommu_tests::host_suite!(Soft::native(VTD, false, INTEL));
}

mod strict_smmuv3 {
    use super::{ARM, SMMUV3, Soft};
    viommu_tests::host_suite!(Soft::native(SMMUV3, true, ARM));
}

mod strict_vtd {
    use super::{INTEL, Soft, VTD};
    viommu_tests::host_suite!(Soft::native(VTD, true, INTEL));
}

mod impatient {
    use super::{IMPATIENT, SMMUV3, Soft};
    viommu_tests::host_suite!(Soft::native(SMMUV3, false, IMPATIENT));
}

mod without_tables {
    use super::{NO_TABLES, PLAIN, Soft};
    viommu_tests::host_suite!(Soft::native(PLAIN, false, NO_TABLES));
}

/// The suite on each machine that is in this process; those of the lab are in `lab_smmuv3` and `lab_mock`.
#[test]
fn the_eight_cells_pass_one_suite() {
    let made_up = Machine::Iommufd(Kernel::MadeUp);
    let at = Layout::OneUnit;
    for (hardware, endpoints, cannot) in [(Hardware::Smmuv3, SMMUV3, ARM), (Hardware::Vtd, VTD, INTEL)] {
        entry(Machine::Soft, hardware, false).prove(|| Soft::native(endpoints, false, cannot));
        entry(Machine::Soft, hardware, true).prove(|| Soft::mediated(endpoints, false, cannot));
    }
    entry(made_up, Hardware::Smmuv3, false).prove(|| Fakes::smmuv3(at, false));
    entry(made_up, Hardware::Smmuv3, true).prove(|| MediatedFakes::smmuv3(at));
    entry(made_up, Hardware::Vtd, false).prove(|| Fakes::vtd_asking(at));
    entry(made_up, Hardware::Vtd, true).prove(|| MediatedFakes::vtd_asking(at));
    let run = 8;
    assert_eq!((run, cells_here()), (ENTRIES.iter().filter(|entry| entry.is_here()).count(), 8));
}

/// What the documentation shows is what is run.
#[test]
fn the_table_of_cells_is_the_documented_one() {
    let page = include_str!("../src/host_suite/cells.rs");
    let lines = page.lines().filter_map(|line| line.strip_prefix("//! | a "));
    let documented: Vec<String> = lines.map(|line| format!("| a {line}")).collect();
    assert_eq!(documented, table());
}

/// What is left out is left out of a check that there is.
#[test]
fn what_is_left_out_has_a_name() {
    let names: Vec<&str> = suite::<Soft<viommu_device::soft::SoftHost<viommu_queue::GuestTables>>>()
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    for entry in ENTRIES {
        for (check, _) in entry.left_out() {
            assert!(names.contains(&check), "{entry}: {check}");
        }
    }
}

/// Nothing is left out but what has to be.
#[test]
fn skips_are_these() {
    let of = |ability| move |check| (check, ability);
    let asking = [
        "missing_pages_are_asked_for",
        "groups_are_answered_in_any_order",
        "what_is_taken_away_asks_no_more",
        "a_flood_starves_nobody",
        "answers_of_others_are_to_nobody",
    ];
    let impatient: Vec<_> = asking.into_iter().map(of(Ability::PageRequests)).collect();
    assert_eq!(skips(|| Soft::native(SMMUV3, false, IMPATIENT)), impatient);
    let tables = [
        "what_is_denied_is_refused",
        "a_table_outside_memory_is_refused",
        "tables_serve_pasids",
        "stale_until_invalidated",
        "invalidation_by_range",
        "invalidation_of_contexts",
        "rebinding_starts_clean",
        "faults_of_tables_are_told",
    ];
    let mut expected: Vec<_> = tables
        .into_iter()
        .flat_map(|check| [(check, Ability::PasidTables), (check, Ability::PageTables)])
        .collect();
    expected.push(("contexts_are_stale_until_invalidated", Ability::PasidTables));
    expected.push(("invalidation_by_tag", Ability::Tags));
    expected.extend(impatient);
    let mut seen = skips(|| Soft::native(PLAIN, false, NO_TABLES));
    seen.sort_unstable();
    expected.sort_unstable();
    assert_eq!(seen, expected);
}
