//! What the suite of hosts has for reads, with two `edu`: they copy, each way in a tenth of a second, and know nothing
//! of a refusal.

use std::collections::BTreeSet;

use pgtable_formats::{AccessKind, Iova, IovaRange};
use viommu_host_iommufd::IommufdHost;
use viommu_host_iommufd::kernel::{Backing, HwptData, HwptFlags, HwptSpec, IoasMapping, Iommufd, ObjectId};
use viommu_tests::host_suite::cells::{self, Hardware, Machine};
use viommu_tests::host_suite::iommufd::EMULATED;
use viommu_tests::host_suite::{self, Ability, Check, suite};
use viommu_tests::rig::Memory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::devices::{DATA, Devices};
use super::kernel::Kernel;
use super::rig::{Drive, Rig, check};

type Native = Rig<Copiers, IommufdHost<Kernel>>;

struct Copiers {
    /// Where devices reach nothing but [`outside`](Self::outside), at address 0.
    detour: ObjectId,
    outside: GuestMemoryMmap,
    /// Number of the last access.
    count: u32,
}

/// Words of data.
const WORDS: u32 = DATA as u32 / 4;

impl Copiers {
    /// Each word of data is told apart from all others, and from what it was before.
    fn stamp(&mut self, devices: &Devices) {
        self.count += 1;
        let first = self.count * WORDS;
        let words: Vec<u8> = (first..first + WORDS).flat_map(u32::to_le_bytes).collect();
        devices.fill(&words);
    }

    /// The address of a word of data that was stamped for this access.
    fn place(&self, word: u32) -> Option<u64> {
        let index = word.checked_sub(self.count * WORDS).filter(|index| *index < WORDS)?;
        Some(Memory::BASE + 4 * u64::from(index))
    }

    /// What the device holds, by way of the detour.
    fn held(&self, devices: &mut Devices, index: usize) -> u32 {
        let device = devices.ids[index];
        let table = devices.kernel.attached(device);
        devices.kernel.attach(device, None, self.detour).unwrap();
        devices.engines[index].write(Iova(0), 4).unwrap();
        devices.kernel.attach(device, None, table).unwrap();
        self.outside.read_obj::<u32>(GuestAddress(0)).unwrap()
    }

    /// Where a read of the word leads.
    fn read(&mut self, devices: &mut Devices, index: usize, iova: u64) -> Option<u64> {
        self.stamp(devices);
        devices.engines[index].read(Iova(iova & !3), 4).unwrap();
        let held = self.held(devices, index);
        Some(self.place(held)? + (iova & 3))
    }

    /// Where a write leads, of what the device holds: nothing that data holds.
    fn write(&mut self, devices: &mut Devices, index: usize, iova: u64) -> Option<u64> {
        self.stamp(devices);
        let before = devices.data();
        devices.engines[index].write(Iova(iova & !3), 4).unwrap();
        let after = devices.data();
        let words = before.chunks_exact(4).zip(after.chunks_exact(4)).zip((Memory::BASE..).step_by(4));
        let mut written = words.filter(|((before, after), _)| before != after).map(|(_, at)| at);
        let reached = written.next();
        assert_eq!(written.next(), None, "{iova:#x} leads to two places");
        Some(reached? + (iova & 3))
    }
}

impl Drive for Copiers {
    const DEVICES: [&str; 2] = ["EDU0", "EDU1"];
    /// The detour is an attachment, for which the kernel may drop what it likes.
    const SHOWS_STALE: bool = false;

    fn new(devices: &Devices) -> Self {
        let outside = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let kernel = &devices.kernel;
        let ioas = kernel.alloc_ioas().unwrap();
        let memory = outside.get_host_address(GuestAddress(0)).unwrap() as u64;
        let mapping = IoasMapping {
            range: IovaRange::from_length(Iova(0), 0x1000).unwrap(),
            backing: Backing::Memory(memory),
            readable: true,
            writable: true,
        };
        kernel.map(ioas, &mapping).unwrap();
        let detour = HwptSpec {
            device: devices.ids[0],
            parent: ioas,
            flags: HwptFlags::empty(),
            data: HwptData::None,
            fault_queue: None,
        };
        let detour = kernel.alloc_hwpt(&detour).unwrap();
        Self { detour, outside, count: 0 }
    }

    fn access(&mut self, devices: &mut Devices, index: usize, iova: u64, kind: AccessKind) -> Option<u64> {
        if kind == AccessKind::Write {
            self.write(devices, index, iova)
        } else {
            self.read(devices, index, iova)
        }
    }
}

fn in_the_lab(name: &'static str, work: Check<Native>) {
    let machine = Machine::Iommufd(cells::Kernel::Emulated);
    let without_reads = cells::entry(machine, Hardware::Smmuv3, false).left_out_of(name);
    let reads = BTreeSet::from([Ability::Reads]);
    check(name, work, &mut Native::native(EMULATED), &(&without_reads - &reads));
}

macro_rules! with_reads {
    ($($name:ident)*) => {
        $(
            #[test]
            #[ignore = "needs the lab: tests/lab/run"]
            fn $name() {
                in_the_lab(stringify!($name), host_suite::$name);
            }
        )*

        const WITH_READS: &[&str] = &[$(stringify!($name)),*];
    };
}

with_reads! {
    identity_leads_where_it_says
    mappings_translate_and_permit
    tables_serve_pasids
    faults_of_tables_are_told
}

/// Checks in which reads are no other than writes, or are not made, and that are done with writes alone. Here, they
/// would take minutes.
const WITHOUT_READS: &[&str] = &[
    "unbound_streams_fault",
    "write_only_mappings",
    "overlap_changes_nothing",
    "unmap_splits_nothing",
    "unmap_takes_effect_at_once",
    "mappings_live_in_their_space",
    "bind_replaces_in_one_step",
    "unbind_closes",
    "spaces_outlive_their_streams",
    "refusals_change_nothing",
    "faults_are_told",
    "many_spaces",
    "what_is_denied_is_refused",
    "a_table_outside_memory_is_refused",
    "stale_until_invalidated",
    "invalidation_by_range",
    "invalidation_of_contexts",
    "contexts_are_stale_until_invalidated",
    "invalidation_by_tag",
    "rebinding_starts_clean",
    "missing_pages_are_asked_for",
    "groups_are_answered_in_any_order",
    "what_is_taken_away_asks_no_more",
    "a_flood_starves_nobody",
    "answers_of_others_are_to_nobody",
];

#[test]
fn no_check_is_forgotten() {
    let mut named = [WITH_READS, WITHOUT_READS].concat();
    let mut all: Vec<_> = suite::<Native>().into_iter().map(|(name, _)| name).collect();
    named.sort_unstable();
    all.sort_unstable();
    assert_eq!(named, all);
}
