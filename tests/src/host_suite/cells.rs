//! The cells: a page table or a table of PASIDs, an SMMUv3 or VT-d, the software host or host-iommufd. Each passes the
//! [suite](super), which is written once.
//!
//! | the guest hands over | to | by `SoftHost` | by `IommufdHost` |
//! |---|---|---|---|
//! | a page table for each PASID | SMMUv3 | native; mediated | mediated (a made-up kernel; Linux on an emulated SMMUv3; Linux's mock) |
//! | a page table for each PASID | VT-d | native | native (a made-up kernel; Linux's mock) |
//! | a table of PASIDs | SMMUv3 | native | native (a made-up kernel; Linux on an emulated SMMUv3; Linux's mock) |
//! | a table of PASIDs | VT-d | native; mediated | mediated (a made-up kernel; Linux's mock) |
//!
//! The table is made of [`ENTRIES`], and a test compares it. Each entry is a machine on which the suite is run
//! ([`Entry::prove`]), with the abilities that it lacks and the checks that leave something out for that. Real kernels are
//! in the lab (`tests/lab/run`); what they cannot, the made-up one can: QEMU's SMMUv3 has no PASIDs, Linux's mock walks no
//! tables.

use std::collections::BTreeSet;
use std::fmt;

use viommu_device::host::{Host, TableKinds};

use super::{Ability, HostUnderTest, skips};

/// Whose tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hardware {
    /// Arm's.
    Smmuv3,
    /// Intel's.
    Vtd,
}

/// What translates, or makes something translate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// The software host.
    Soft,
    /// Through Linux, on one of these.
    Iommufd(Kernel),
}

/// What answers the calls of [`Machine::Iommufd`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// The fake of host-iommufd, which keeps Linux's rules and walks tables.
    MadeUp,
    /// Linux on the lab's machine, with the DMA of real devices.
    Emulated,
    /// Linux in the lab, with the devices and IOMMU of its own tests.
    Mock,
}

/// A machine that runs the suite.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// What.
    pub machine: Machine,
    /// For which tables.
    pub hardware: Hardware,
    /// The kinds of tables that it takes as they are.
    pub native: TableKinds,
    /// Those that mediation makes of them; `None`: without mediation.
    pub mediated: Option<TableKinds>,
    /// The abilities that it lacks, and the checks that leave something out for it.
    left_out: &'static [&'static [LeftOut]],
}

type LeftOut = (Ability, &'static [&'static str]);

const NONE: TableKinds = TableKinds::empty();
const BOTH: TableKinds = TableKinds::all();
const PAGE: TableKinds = TableKinds::PAGE_TABLE;
const PASID: TableKinds = TableKinds::PASID_TABLE;

/// Checks that are made with each kind of table.
const OF_TABLES: &[&str] = &[
    "a_table_outside_memory_is_refused",
    "tables_serve_pasids",
    "stale_until_invalidated",
    "invalidation_by_range",
    "invalidation_of_contexts",
    "rebinding_starts_clean",
];

/// Those of accesses that wait.
const OF_PAGE_REQUESTS: &[&str] = &[
    "missing_pages_are_asked_for",
    "groups_are_answered_in_any_order",
    "what_is_taken_away_asks_no_more",
    "a_flood_starves_nobody",
    "answers_of_others_are_to_nobody",
];

const LINUX: &[LeftOut] = &[
    (Ability::UnboundFaults, &["faults_are_told"]),
    (Ability::MappingFaults, &["faults_are_told"]),
    (Ability::BypassBeyondMemory, &["identity_leads_where_it_says"]),
];
const IMPATIENT: &[LeftOut] = &[(Ability::PageRequests, OF_PAGE_REQUESTS)];
const STAGE_1: &[LeftOut] = &[(Ability::WriteOnly, &["write_only_mappings"])];
const NO_PASID_BYPASS: &[LeftOut] = &[(Ability::PasidBypass, &["identity_leads_where_it_says"])];
const BY_ASID: &[LeftOut] =
    &[(Ability::NarrowUntagged, &["stale_until_invalidated", "invalidation_by_range"])];
const NO_TAGS: &[LeftOut] = &[(Ability::Tags, &["invalidation_by_tag"])];
const NO_TABLE_FAULTS: &[LeftOut] = &[(Ability::TableFaults, &["faults_of_tables_are_told"])];
const NO_PAGE_TABLES: &[LeftOut] = &[
    (Ability::PageTables, OF_TABLES),
    (Ability::PageTables, &["invalidation_by_tag", "what_is_denied_is_refused"]),
];
const NO_PAGE_TABLE_FAULTS: &[LeftOut] = &[(Ability::PageTables, &["faults_of_tables_are_told"])];
const NO_PASID_TABLES: &[LeftOut] =
    &[(Ability::PasidTables, OF_TABLES), (Ability::PasidTables, &["contexts_are_stale_until_invalidated"])];
const NO_PASID_TABLES_ASKING: &[LeftOut] = &[(Ability::PasidTables, OF_PAGE_REQUESTS)];
const NO_PASID_TABLES_IMPATIENT: &[LeftOut] = &[(Ability::PasidTables, &["what_is_denied_is_refused"])];

/// Every machine that runs the suite.
pub const ENTRIES: &[Entry] = &[
    Entry { machine: Machine::Soft, hardware: Hardware::Smmuv3, native: BOTH, mediated: None, left_out: &[] },
    Entry {
        machine: Machine::Soft,
        hardware: Hardware::Vtd,
        native: BOTH,
        mediated: None,
        left_out: &[NO_TAGS],
    },
    Entry {
        machine: Machine::Soft,
        hardware: Hardware::Smmuv3,
        native: PASID,
        mediated: Some(PAGE),
        left_out: &[],
    },
    Entry {
        machine: Machine::Soft,
        hardware: Hardware::Vtd,
        native: PAGE,
        mediated: Some(PASID),
        left_out: &[NO_TAGS],
    },
    Entry {
        machine: Machine::Iommufd(Kernel::MadeUp),
        hardware: Hardware::Smmuv3,
        native: PASID,
        mediated: None,
        left_out: &[
            LINUX,
            IMPATIENT,
            STAGE_1,
            NO_PASID_BYPASS,
            BY_ASID,
            NO_PAGE_TABLES,
            NO_PAGE_TABLE_FAULTS,
        ],
    },
    Entry {
        machine: Machine::Iommufd(Kernel::MadeUp),
        hardware: Hardware::Smmuv3,
        native: PASID,
        mediated: Some(PAGE),
        left_out: &[LINUX, IMPATIENT, STAGE_1, NO_PASID_BYPASS, BY_ASID],
    },
    Entry {
        machine: Machine::Iommufd(Kernel::MadeUp),
        hardware: Hardware::Vtd,
        native: PAGE,
        mediated: None,
        left_out: &[
            LINUX,
            STAGE_1,
            NO_PASID_BYPASS,
            NO_TAGS,
            NO_TABLE_FAULTS,
            NO_PASID_TABLES,
            NO_PASID_TABLES_ASKING,
        ],
    },
    Entry {
        machine: Machine::Iommufd(Kernel::MadeUp),
        hardware: Hardware::Vtd,
        native: PAGE,
        mediated: Some(PASID),
        left_out: &[LINUX, STAGE_1, NO_PASID_BYPASS, NO_TAGS, NO_TABLE_FAULTS],
    },
    Entry {
        machine: Machine::Iommufd(Kernel::Emulated),
        hardware: Hardware::Smmuv3,
        native: PASID,
        mediated: None,
        left_out: &[
            LINUX,
            IMPATIENT,
            STAGE_1,
            NO_PASID_BYPASS,
            UNTAGGED,
            NO_READS,
            NO_PAGE_TABLES,
            NO_PAGE_TABLE_FAULTS,
        ],
    },
    Entry {
        machine: Machine::Iommufd(Kernel::Emulated),
        hardware: Hardware::Smmuv3,
        native: PASID,
        mediated: Some(PAGE),
        left_out: &[LINUX, IMPATIENT, STAGE_1, NO_PASID_BYPASS, UNTAGGED, NO_READS],
    },
    Entry {
        machine: Machine::Iommufd(Kernel::Mock),
        hardware: Hardware::Smmuv3,
        native: PASID,
        mediated: None,
        left_out: &[LINUX, IMPATIENT, NO_PASID_BYPASS, BY_ASID, NO_TABLE_FAULTS, NO_PAGE_TABLES],
    },
    Entry {
        machine: Machine::Iommufd(Kernel::Mock),
        hardware: Hardware::Smmuv3,
        native: PASID,
        mediated: Some(PAGE),
        left_out: &[LINUX, IMPATIENT, NO_PASID_BYPASS, BY_ASID, NO_TABLE_FAULTS],
    },
    Entry {
        machine: Machine::Iommufd(Kernel::Mock),
        hardware: Hardware::Vtd,
        native: PAGE,
        mediated: None,
        left_out: &[
            LINUX,
            IMPATIENT,
            NO_PASID_BYPASS,
            NO_TAGS,
            NO_TABLE_FAULTS,
            NO_PASID_TABLES,
            NO_PASID_TABLES_IMPATIENT,
        ],
    },
    Entry {
        machine: Machine::Iommufd(Kernel::Mock),
        hardware: Hardware::Vtd,
        native: PAGE,
        mediated: Some(PASID),
        left_out: &[LINUX, IMPATIENT, NO_PASID_BYPASS, NO_TAGS, NO_TABLE_FAULTS],
    },
];

/// QEMU's SMMUv3 has no PASIDs.
const UNTAGGED: &[LeftOut] = &[(
    Ability::Pasids,
    &[
        "unbound_streams_fault",
        "mappings_translate_and_permit",
        "what_is_denied_is_refused",
        "tables_serve_pasids",
        "stale_until_invalidated",
        "invalidation_by_range",
        "invalidation_of_contexts",
        "contexts_are_stale_until_invalidated",
        "invalidation_by_tag",
        "rebinding_starts_clean",
        "faults_of_tables_are_told",
    ],
)];

/// The suite is run with devices that write; of reads there is a target of its own (`lab_smmuv3::reading`).
const NO_READS: &[LeftOut] = &[(
    Ability::Reads,
    &[
        "unbound_streams_fault",
        "identity_leads_where_it_says",
        "mappings_translate_and_permit",
        "unmap_takes_effect_at_once",
        "bind_replaces_in_one_step",
        "what_is_denied_is_refused",
        "faults_of_tables_are_told",
    ],
)];

/// The entry of a machine, with mediation or without.
pub fn entry(machine: Machine, hardware: Hardware, is_mediated: bool) -> &'static Entry {
    let is_it = |entry: &&Entry| {
        (entry.machine, entry.hardware, entry.mediated.is_some()) == (machine, hardware, is_mediated)
    };
    ENTRIES.iter().find(is_it).expect("an entry of each machine")
}

impl Entry {
    /// Runs the suite on the machine, and compares what it takes and what is left out with what is said here.
    pub fn prove<T: HostUnderTest>(&self, mut make: impl FnMut() -> T) {
        self.takes(&mut make());
        let left_out: BTreeSet<_> = skips(make).into_iter().collect();
        assert_eq!(left_out, self.left_out(), "{self}");
    }

    /// Each check that leaves something out, with the ability that it would have needed.
    pub fn left_out(&self) -> BTreeSet<(&'static str, Ability)> {
        let of =
            |(ability, checks): &LeftOut| checks.iter().map(|check| (*check, *ability)).collect::<Vec<_>>();
        self.left_out.iter().copied().flatten().flat_map(of).collect()
    }

    /// That these are the kinds of tables which it takes, and that neither is left out.
    pub fn takes<T: HostUnderTest>(&self, test: &mut T) {
        let kinds = self.native | self.mediated.unwrap_or(NONE);
        for endpoint in test.endpoints() {
            let caps = test.host().caps(endpoint).expect("an endpoint");
            assert_eq!((caps.native & caps.kinds, caps.kinds), (self.native, kinds), "{self}");
        }
        for (kind, ability) in [(PAGE, Ability::PageTables), (PASID, Ability::PasidTables)] {
            let is_denied = test.cannot().iter().any(|(denied, _)| *denied == ability);
            assert_eq!(is_denied, !kinds.contains(kind), "{self}: {ability}");
        }
    }

    /// What a check leaves out.
    pub fn left_out_of(&self, check: &str) -> BTreeSet<Ability> {
        let of_check = self.left_out().into_iter().filter(|(of, _)| *of == check);
        of_check.map(|(_, ability)| ability).collect()
    }

    /// Whether it runs wherever the tests do.
    pub fn is_here(&self) -> bool {
        matches!(self.machine, Machine::Soft | Machine::Iommufd(Kernel::MadeUp))
    }

    /// How it takes a kind of table: natively or not; `None`: it does not, or does so without mediation as well.
    fn way(&self, kind: TableKinds) -> Option<Way> {
        match self.mediated {
            None if self.native.contains(kind) => Some(Way::Native),
            Some(mediated) if mediated.contains(kind) => Some(Way::Mediated),
            _ => None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Native,
    Mediated,
}

/// In words.
impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { machine, hardware, mediated, .. } = self;
        let over = if mediated.is_some() { "mediation over " } else { "" };
        write!(f, "{over}{machine:?}, {hardware:?}")
    }
}

/// The table of the [module](self), with its cells.
pub fn table() -> Vec<String> {
    let mut lines = Vec::new();
    for (kind, name) in [(PAGE, "a page table for each PASID"), (PASID, "a table of PASIDs")] {
        for (hardware, hardware_name) in [(Hardware::Smmuv3, "SMMUv3"), (Hardware::Vtd, "VT-d")] {
            let [soft, iommufd] = [false, true].map(|is_iommufd| cell(kind, hardware, is_iommufd));
            lines.push(format!("| {name} | {hardware_name} | {soft} | {iommufd} |"));
        }
    }
    lines
}

/// How one cell is filled.
fn cell(kind: TableKinds, hardware: Hardware, is_iommufd: bool) -> String {
    let of_cell = |entry: &&Entry| {
        entry.hardware == hardware && matches!(entry.machine, Machine::Iommufd(_)) == is_iommufd
    };
    let mut ways = Vec::new();
    for (way, name) in [(Way::Native, "native"), (Way::Mediated, "mediated")] {
        let entries: Vec<&Entry> =
            ENTRIES.iter().filter(of_cell).filter(|entry| entry.way(kind) == Some(way)).collect();
        let kernels: Vec<&str> = entries
            .iter()
            .filter_map(|entry| match entry.machine {
                Machine::Soft => None,
                Machine::Iommufd(Kernel::MadeUp) => Some("a made-up kernel"),
                Machine::Iommufd(Kernel::Emulated) => Some("Linux on an emulated SMMUv3"),
                Machine::Iommufd(Kernel::Mock) => Some("Linux's mock"),
            })
            .collect();
        match (entries.is_empty(), kernels.is_empty()) {
            (true, _) => {}
            (false, true) => ways.push(name.to_owned()),
            (false, false) => ways.push(format!("{name} ({})", kernels.join("; "))),
        }
    }
    ways.join("; ")
}

/// Whether something that runs wherever the tests do is in each of the eight cells.
pub fn cells_here() -> usize {
    let mut count = 0;
    for kind in [PAGE, PASID] {
        for hardware in [Hardware::Smmuv3, Hardware::Vtd] {
            for is_iommufd in [false, true] {
                count += usize::from(ENTRIES.iter().any(|entry| {
                    entry.is_here()
                        && entry.hardware == hardware
                        && matches!(entry.machine, Machine::Iommufd(_)) == is_iommufd
                        && entry.way(kind).is_some()
                }));
            }
        }
    }
    count
}
