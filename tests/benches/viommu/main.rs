//! Benchmarks: `cargo bench -p viommu-tests`, or with a filter behind `--`.
//!
//! Beside what criterion prints, each benchmark ends in one line `BENCH name key=value … p50_ns=…`: the median, and
//! `min_ns` the least, over the timed batches, divided by what a batch holds. In the same run come the *floors*
//! (`floor-…`): what the same work costs with nothing in it. Run it on an idle machine; where it is not idle, `min_ns`
//! says more.
//!
//! `cargo test` runs each benchmark once with few mappings, to see that it works.

#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a benchmark that cannot go on has to say so"
)]

mod building;
mod dma;
mod faults;
mod measure;
mod mediated;
mod memory;
mod responses;
mod rings;
mod sva;
mod translation;
mod walks;

use std::time::Duration;

use criterion::Criterion;

use measure::Suite;

/// Names of benchmarks, and what runs them.
type Part = (&'static [&'static str], fn(&mut Suite));

fn main() {
    let criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(700))
        .nresamples(1_001)
        .without_plots()
        .configure_from_args();
    let mut suite = Suite::new(criterion);
    let all: [Part; 16] = [
        (&["floor-ring"], rings::floor),
        (&["map", "unmap"], rings::map_and_unmap),
        (&["unmap-512"], rings::unmap_of_many),
        (&["attach", "detach"], rings::attach_and_detach),
        (&["floor-walk"], walks::floor),
        (&["walk", "lookup-and-walk"], walks::run),
        (&["hit", "miss"], translation::run),
        (&["dma"], dma::run),
        (&["page-fault"], faults::run),
        (&["page-response"], responses::answers),
        (&["set-time"], responses::time),
        (&["sva-bind"], sva::run),
        (&["build-map", "build-unmap", "build-pasid-entry"], building::run),
        (&["pasid-bind"], mediated::bind_and_unbind),
        (&["pasid-reread"], mediated::read_again),
        (&["memory"], memory::run),
    ];
    for (names, run) in all {
        if suite.wants(names) {
            run(&mut suite);
        }
    }
    suite.finish();
}
