//! Memory that a live mapping of 4 KiB takes.

use pgtable_formats::{Gpa, Iova, IovaRange};
use viommu_device::mapping::{MapFlags, Mapping, Mappings};

use crate::measure::{Random, Suite};

pub(crate) fn run(suite: &mut Suite) {
    let count = suite.size(1_000_000) as u64;
    let mut random: Vec<u64> = (0..count).collect();
    Random(4).shuffle(&mut random);
    for (order, pages) in [("sequential", (0..count).collect()), ("random", random)] {
        let mut mappings = Mappings::new();
        for page in pages {
            let range = IovaRange::from_length(Iova(page << 12), 1 << 12).expect("a range");
            let mapping = Mapping { range, output: Gpa(page << 12), flags: MapFlags::READ };
            mappings.insert(mapping).expect("a free page");
        }
        let bytes = mappings.memory_bytes() as f64 / mappings.len() as f64;
        let live = mappings.len().to_string();
        suite.line(
            "memory",
            &[("live", &live), ("addresses", order)],
            &format!("bytes_per_mapping={bytes:.1}"),
        );
        // Every other one goes: what is left pays for the gaps.
        for page in (0..count).step_by(2) {
            let range = IovaRange::from_length(Iova(page << 12), 1 << 12).expect("a range");
            assert_eq!(mappings.remove(range), Ok(1));
        }
        let bytes = mappings.memory_bytes() as f64 / mappings.len() as f64;
        let (live, order) = (mappings.len().to_string(), format!("{order},every-other-removed"));
        suite.line(
            "memory",
            &[("live", &live), ("addresses", &order)],
            &format!("bytes_per_mapping={bytes:.1}"),
        );
    }
}
