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
mod faults;
mod measure;
mod mediated;
mod memory;
mod rings;
mod translation;
mod walks;

use std::time::Duration;

use criterion::Criterion;

use measure::Suite;

fn main() {
    let criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(700))
        .nresamples(1_001)
        .without_plots()
        .configure_from_args();
    let mut suite = Suite::new(criterion);
    rings::floor(&mut suite);
    rings::map_and_unmap(&mut suite);
    rings::unmap_of_many(&mut suite);
    rings::attach_and_detach(&mut suite);
    walks::floor(&mut suite);
    walks::run(&mut suite);
    translation::run(&mut suite);
    faults::run(&mut suite);
    building::run(&mut suite);
    mediated::run(&mut suite);
    memory::run(&mut suite);
    suite.finish();
}
