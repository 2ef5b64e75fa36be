//! Criterion, and the summary lines from the same measurement.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};

/// Runs benchmarks and collects their summary lines.
pub(crate) struct Suite {
    criterion: Criterion,
    lines: Vec<String>,
    /// Whether times are wanted; else everything runs once.
    measures: bool,
    /// What criterion, too, goes by: a part of `name/keys`, or a regular expression for it.
    filter: Option<String>,
}

/// What distinguishes one benchmark from others of the same name.
pub(crate) type Keys<'a> = &'a [(&'a str, &'a str)];

/// More batches than this are timed for criterion alone.
const MAX_SAMPLES: usize = 1 << 20;

impl Suite {
    pub(crate) fn new(criterion: Criterion) -> Self {
        // What criterion, too, goes by.
        let has = |wanted: &str| std::env::args().any(|argument| argument == wanted);
        let measures = has("--bench") && !has("--test");
        Self { criterion, lines: Vec::new(), measures, filter: filter(std::env::args().skip(1)) }
    }

    /// Whether any of the benchmarks `names` is asked for: what the others need is not set up, which may take longer than
    /// they do.
    pub(crate) fn wants(&self, names: &[&str]) -> bool {
        let Some(filter) = &self.filter else { return true };
        let wanted = filter.split('/').next().unwrap_or_default();
        let is_name = wanted.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '-');
        !is_name || names.iter().any(|name| name.contains(wanted))
    }

    /// How many of something to set up: `full`, or fewer where nothing is measured.
    pub(crate) fn size(&self, full: usize) -> usize {
        if self.measures { full } else { full.min(2_000) }
    }

    /// Measures `batch`, which does some work `elements` times and says how long that took. What it does besides is not
    /// measured.
    pub(crate) fn run(
        &mut self,
        name: &str,
        keys: Keys<'_>,
        elements: u64,
        mut batch: impl FnMut() -> Duration,
    ) {
        let parameter: Vec<String> = keys.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let mut samples: Vec<Duration> = Vec::with_capacity(MAX_SAMPLES);
        let mut group = self.criterion.benchmark_group(name);
        group.throughput(Throughput::Elements(elements));
        group.bench_function(BenchmarkId::from_parameter(parameter.join(",")), |bencher| {
            bencher.iter_custom(|batches| {
                let mut sum = Duration::ZERO;
                for _ in 0..batches {
                    let time = batch();
                    sum += time;
                    if samples.len() < MAX_SAMPLES {
                        samples.push(time);
                    }
                }
                sum
            });
        });
        group.finish();
        samples.sort_unstable();
        let per_element = |sample: Option<&Duration>| {
            sample.map_or(f64::NAN, |sample| sample.as_nanos() as f64 / elements as f64)
        };
        if !samples.is_empty() {
            let p50 = per_element(samples.get(samples.len() / 2));
            let min = per_element(samples.first());
            self.line(name, keys, &format!("p50_ns={p50:.1} min_ns={min:.1} batches={}", samples.len()));
        }
    }

    /// Adds a summary line, where anything is measured.
    pub(crate) fn line(&mut self, name: &str, keys: Keys<'_>, result: &str) {
        if !self.measures {
            return;
        }
        let keys: String = keys.iter().map(|(key, value)| format!("{key}={value} ")).collect();
        self.lines.push(format!("BENCH {name} {keys}{result}"));
    }

    /// Prints the summary.
    pub(crate) fn finish(self) {
        self.criterion.final_summary();
        for line in self.lines {
            println!("{line}");
        }
    }
}

/// The filter among the program's arguments.
fn filter(mut arguments: impl Iterator<Item = String>) -> Option<String> {
    const ALONE: [&str; 7] = ["--bench", "--test", "--exact", "--list", "--noplot", "--quiet", "--verbose"];
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            alone if ALONE.contains(&alone) => {}
            option if option.starts_with('-') => drop(arguments.next()),
            _ => return Some(argument),
        }
    }
    None
}

/// Times work, without what reading the clock adds: a batch of one request takes only a few times as long as that.
#[derive(Clone, Copy)]
pub(crate) struct Stopwatch {
    overhead: Duration,
}

impl Stopwatch {
    pub(crate) fn new() -> Self {
        let mut times: Vec<Duration> = (0..1_001).map(|_| Instant::now().elapsed()).collect();
        times.sort_unstable();
        Self { overhead: times[times.len() / 2] }
    }

    #[inline]
    pub(crate) fn time<R>(&self, work: impl FnOnce() -> R) -> (Duration, R) {
        let start = Instant::now();
        let result = black_box(work());
        (start.elapsed().saturating_sub(self.overhead), result)
    }
}

/// Numbers that look random and are the same in each run (splitmix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % bound
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}
