//! What a run found, for every way to report it.

use std::time::Duration;

use crate::hil::picture::Picture;

/// A whole run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Report {
    /// What the machine says of itself, name and value.
    pub(crate) facts: Vec<(&'static str, String)>,
    /// The devices, in the order of the command line.
    pub(crate) subjects: Vec<Subject>,
    /// The checks, in the order in which they ran.
    pub(crate) checks: Vec<Done>,
    /// The same work in two ways, by device.
    pub(crate) comparisons: Vec<Comparison>,
    /// How long all of it took.
    pub(crate) elapsed: Duration,
}

/// A device that was checked.
#[derive(Clone, Debug)]
pub(crate) struct Subject {
    /// Where it is on the bus.
    pub(crate) name: String,
    /// What moves its data.
    pub(crate) engine: String,
    /// What the guest calls it.
    pub(crate) endpoint: u32,
}

/// A check that ran, or was skipped.
#[derive(Clone, Debug)]
pub(crate) struct Done {
    /// On which devices.
    pub(crate) subject: String,
    /// Its name.
    pub(crate) name: &'static str,
    /// What it says when it passes.
    pub(crate) claim: &'static str,
    /// How it ended.
    pub(crate) outcome: Outcome,
    /// What it measured or saw on the way.
    pub(crate) notes: Vec<String>,
    /// What the address spaces looked like.
    pub(crate) pictures: Vec<Picture>,
    /// How long it took.
    pub(crate) elapsed: Duration,
}

/// How a check ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// What it claims is so.
    Passed,
    /// Something else came out, namely this.
    Failed(String),
    /// It cannot be done here, because of this.
    Skipped(String),
}

/// How many checks ended in which way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skipped: usize,
}

/// The same work by MAP and UNMAP requests, and by the guest's own table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Comparison {
    /// Which device did it.
    pub(crate) subject: String,
    /// One for each way and size.
    pub(crate) rows: Vec<Row>,
}

/// One way to do the work of a [`Comparison`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    /// How the guest maps.
    pub(crate) way: &'static str,
    /// Bytes of a buffer.
    pub(crate) buffer: u64,
    /// How many buffers.
    pub(crate) buffers: u32,
    /// Requests of the guest.
    pub(crate) requests: u64,
    /// Calls into the kernel.
    pub(crate) ioctls: u64,
    /// Time for mapping and unmapping, without the DMA.
    pub(crate) mapping: Duration,
    /// Time for the DMA.
    pub(crate) dma: Duration,
}

impl Report {
    /// How many checks ended in which way.
    pub(crate) fn tally(&self) -> Tally {
        tally(&self.checks)
    }

    /// The checks by subject, both in the order in which they ran first.
    pub(crate) fn groups(&self) -> Vec<(&str, Vec<&Done>)> {
        let mut groups: Vec<(&str, Vec<&Done>)> = Vec::new();
        for check in &self.checks {
            match groups.iter_mut().find(|(subject, _)| *subject == check.subject) {
                Some((_, checks)) => checks.push(check),
                None => groups.push((&check.subject, vec![check])),
            }
        }
        groups
    }
}

/// How many of `checks` ended in which way.
pub(crate) fn tally<'d>(checks: impl IntoIterator<Item = &'d Done>) -> Tally {
    checks.into_iter().fold(Tally::default(), |sum, check| match check.outcome {
        Outcome::Passed => Tally { passed: sum.passed + 1, ..sum },
        Outcome::Failed(_) => Tally { failed: sum.failed + 1, ..sum },
        Outcome::Skipped(_) => Tally { skipped: sum.skipped + 1, ..sum },
    })
}

impl Row {
    /// `number` by buffer.
    #[expect(clippy::cast_precision_loss, reason = "numbers for the eye")]
    pub(crate) fn each(&self, number: u64) -> f64 {
        number as f64 / f64::from(self.buffers.max(1))
    }
}

/// `4 KiB`, `64 KiB`, `2 MiB`.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        _ if bytes >= 1 << 30 && bytes.trailing_zeros() >= 30 => format!("{} GiB", bytes >> 30),
        _ if bytes >= 1 << 20 && bytes.trailing_zeros() >= 20 => format!("{} MiB", bytes >> 20),
        _ if bytes >= 1 << 10 && bytes.trailing_zeros() >= 10 => format!("{} KiB", bytes >> 10),
        _ => format!("{bytes} bytes"),
    }
}

/// Four figures at most, with a unit that suits them.
pub(crate) fn time(duration: Duration) -> String {
    let micros = duration.as_secs_f64() * 1e6;
    match micros {
        _ if micros < 1e3 => format!("{micros:.0} µs"),
        _ if micros < 1e5 => format!("{:.1} ms", micros / 1e3),
        _ if micros < 1e6 => format!("{:.0} ms", micros / 1e3),
        _ => format!("{:.2} s", micros / 1e6),
    }
}
