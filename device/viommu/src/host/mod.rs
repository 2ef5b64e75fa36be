//! `host`: what this machine can hand over.
//!
//! [`report`] collects facts (`sysfs` of viommu-host-iommufd, and what the kernel answers), [`judge`] turns them into
//! obstacles, [`obstacle`] says why and what to do, [`text`] and [`json`] print. Each step but the first is pure.

mod ask;
mod capabilities;
mod json;
mod judge;
mod names;
mod no_iommu;
mod note;
mod obstacle;
mod report;
#[cfg(test)]
mod tests;
mod text;

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use viommu_host_iommufd::sysfs::{Bdf, Machine, Root};

use ask::Ask;
use names::Names;
use report::Report;

/// What this machine can hand over: for each device whether a guest's tables can be bound, and if not, why not and what
/// to do.
///
/// Nothing is changed and no device gets another driver. A device that is already with vfio-pci is opened for a moment,
/// as a VMM does it (the kernel resets it then), to ask the kernel what it would do; one that is in use is left alone.
/// Works without privilege, and says what it could not see.
///
/// The exit status is 0 whenever the report could be made, whatever it says. Programs read `--json`.
#[derive(Args, Clone, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Options {
    /// The report as one JSON document: {"schema": 1, "summary": {…}, "machine": {…}, "iommus": […], "devices": […],
    /// "unseen": […]}. Fields are added, never changed, within a schema.
    #[arg(long)]
    json: bool,
    /// Tell of this PCI device alone, and all about it. May be given several times.
    #[arg(long = "device", value_name = "BDF")]
    devices: Vec<Bdf>,
    /// Look only: open no device.
    #[arg(long)]
    passive: bool,
    /// The tree of another machine: a folder with its sys, proc, dev and boot. Its kernel is not asked.
    #[arg(long, hide = true, value_name = "ROOT")]
    sysfs: Option<PathBuf>,
}

/// Looks, asks and prints.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let root = options.sysfs.as_ref().map_or_else(Root::here, Root::at);
    let machine = Machine::read(&root);
    let ask = Ask::new(options.passive || !root.is_here());
    let report = Report::new(machine, &options.devices, |device| ask.about(device))?;
    let names = Names::read(&root);
    let text = if options.json {
        serde_json::to_string_pretty(&json::Document::new(&report, &names))?
    } else {
        text::render(&report, &names, !options.devices.is_empty())
    };
    match writeln!(io::stdout().lock(), "{}", text.trim_end()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(ExitCode::SUCCESS),
    }
}
