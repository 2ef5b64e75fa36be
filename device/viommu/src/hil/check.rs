//! What a check is, and how one is run.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::Context as _;
use viommu_host_iommufd::kernel::Iommufd;

use super::bench::{Bench, Station};
use super::guest::Guest;
use super::outcome::{Comparison, Done, Outcome};
use super::picture::Picture;

/// A check: its name, what it says when it passes, and how it is done.
pub(super) struct Check<B: Bench> {
    /// For `--only`.
    pub(super) name: &'static str,
    /// What is so when it passes.
    pub(super) claim: &'static str,
    /// On what.
    pub(super) run: Run<B>,
}

/// What a check is run on.
pub(super) enum Run<B: Bench> {
    /// Once for each device.
    Device(fn(&mut Stage<'_, B>, usize) -> anyhow::Result<()>),
    /// Once for the first two devices.
    Pair(fn(&mut Stage<'_, B>, usize, usize) -> anyhow::Result<()>),
}

/// What a check works with, and what it leaves for the report.
pub(super) struct Stage<'b, B: Bench> {
    pub(super) bench: &'b mut B,
    /// What random things are made from.
    pub(super) seed: u64,
    /// How many random tables.
    pub(super) tables: u32,
    /// Folders with captures.
    pub(super) captures: &'b [std::path::PathBuf],
    pub(super) notes: Vec<String>,
    pub(super) pictures: Vec<Picture>,
    pub(super) comparisons: Vec<Comparison>,
}

/// A check cannot be done here: not an error, but not a pass.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
struct Skip(String);

/// Ends a check that cannot be done here.
pub(super) fn skip(why: impl Into<String>) -> anyhow::Error {
    Skip(why.into()).into()
}

impl<B: Bench> Stage<'_, B> {
    /// A machine with a guest that was just started.
    pub(super) fn guest(&mut self) -> anyhow::Result<Guest<B::Kernel>> {
        Guest::start(self.bench)
    }

    /// One of the devices.
    pub(super) fn station(&mut self, index: usize) -> anyhow::Result<&mut Station> {
        self.bench.station(index)
    }

    /// Notes something for the report.
    pub(super) fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// Notes what the guest's address space looks like; its accesses so far are done with.
    pub(super) fn picture<K: Iommufd>(&mut self, guest: &mut Guest<K>, title: impl Into<String>) {
        self.pictures.push(guest.snapshot(title));
    }

    /// Does something, and counts the calls into the kernel that it takes, by kind.
    pub(super) fn ioctls<R>(
        &mut self,
        work: impl FnOnce(&mut Self) -> anyhow::Result<R>,
    ) -> anyhow::Result<(R, BTreeMap<&'static str, u64>)> {
        let before = self.bench.ioctls();
        let result = work(self)?;
        let mut counts = self.bench.ioctls();
        for (name, count) in &mut counts {
            *count = count.saturating_sub(before.get(name).copied().unwrap_or(0));
        }
        counts.retain(|_, count| *count != 0);
        Ok((result, counts))
    }
}

/// Runs a check on one device.
pub(super) fn on_device<B: Bench>(stage: &mut Stage<'_, B>, check: &Check<B>, index: usize) -> Done {
    let subject = stage.bench.name(index);
    attempt(stage, check, subject, |stage| match check.run {
        Run::Device(work) => work(stage, index),
        Run::Pair(_) => Err(skip("needs two devices")),
    })
}

/// Runs a check on the first two devices.
pub(super) fn on_pair<B: Bench>(stage: &mut Stage<'_, B>, check: &Check<B>) -> Done {
    let count = stage.bench.count();
    let subject = match count {
        0 | 1 => "two devices".to_owned(),
        _ => format!("{} and {}", stage.bench.name(0), stage.bench.name(1)),
    };
    attempt(stage, check, subject, |stage| match check.run {
        Run::Pair(_) if count < 2 => Err(skip("needs two devices (--device twice)")),
        Run::Pair(work) => work(stage, 0, 1),
        Run::Device(_) => Err(skip("needs one device")),
    })
}

fn attempt<B: Bench>(
    stage: &mut Stage<'_, B>,
    check: &Check<B>,
    subject: String,
    work: impl FnOnce(&mut Stage<'_, B>) -> anyhow::Result<()>,
) -> Done {
    let start = Instant::now();
    let mut outcome = match work(stage) {
        Ok(()) => Outcome::Passed,
        Err(error) => match error.downcast_ref::<Skip>() {
            Some(Skip(why)) => Outcome::Skipped(why.clone()),
            None => Outcome::Failed(format!("{error:#}")),
        },
    };
    // What a check leaves behind must not be in the way of the next one.
    if let Err(error) = stage.bench.settle().context("after the check") {
        let before = match outcome {
            Outcome::Failed(why) => format!("{why}\n"),
            _ => String::new(),
        };
        outcome = Outcome::Failed(format!("{before}{error:#}"));
    }
    Done {
        subject,
        name: check.name,
        claim: check.claim,
        outcome,
        notes: std::mem::take(&mut stage.notes),
        pictures: std::mem::take(&mut stage.pictures),
        elapsed: start.elapsed(),
    }
}
