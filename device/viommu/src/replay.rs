//! `replay`: what a captured kernel's tables translate to, through the device.

mod check;

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use viommu_device::DeviceConfig;

use crate::capture::Capture;
use crate::driver::RawDriver;
use crate::machine::{Machine, Setup};
use check::{Checker, EndpointReport};

/// Differences that are told one by one.
const MAX_TOLD: usize = 20;

/// Binds tables that a real kernel built, and checks what they translate to.
///
/// Each endpoint's table is bound with an ATTACH_TABLE request through a virtqueue. Then every mapping is read and
/// written at its first byte, at its last, and as a whole: output addresses must be exact, and writes to what is only
/// readable must fault. Between the mappings, the byte before and after each, the middle of each gap, address 0 and the
/// top of the input range must fault, for reads and writes, by the architecture's name of a missing mapping. Each fault
/// must arrive as an event.
///
/// Ends non-zero where anything differs, or where the capture cannot be read.
#[derive(Args, Clone, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Options {
    /// A folder with capture.json and memory.bin; tests/captures/README.md describes them.
    dir: PathBuf,
    /// One line for machines: {"endpoints":...,"mappings":...,"agree":...,"differ":...}. `agree` counts the mappings that
    /// agree wholly; `differ` counts the others, and the unmapped addresses that did not fault as they must.
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Summary {
    endpoints: usize,
    mappings: usize,
    agree: usize,
    differ: usize,
}

/// Checks the capture and prints what came out.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let capture = Capture::load(&options.dir)?;
    let endpoints = capture.caps(capture.registers);
    let config = DeviceConfig::default();
    let mut machine = Machine::new(Setup { memory: capture.memory, endpoints, config, strict: false })?;
    capture.fill(&machine)?;
    let features = machine.offered_features();
    let driver = RawDriver::start(&mut machine, features)?;
    let reports = Checker::new(&capture, machine, driver).run()?;

    let count = |of: fn(&EndpointReport) -> usize| reports.iter().map(of).sum();
    let summary = Summary {
        endpoints: reports.len(),
        mappings: count(|report| report.mappings),
        agree: count(|report| report.agree),
        differ: count(|report| report.differences.len()),
    };
    let text =
        if options.json { serde_json::to_string(&summary)? } else { describe(&capture, &reports, &summary) };
    match writeln!(io::stdout().lock(), "{text}") {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error.into()),
        _ => {}
    }
    Ok(if summary.differ == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn describe(capture: &Capture, reports: &[EndpointReport], summary: &Summary) -> String {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(["endpoint", "mappings", "agree", "unmapped addresses", "accesses", "events", "differ"]);
    for column in table.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for report in reports {
        let numbers = [
            report.mappings,
            report.agree,
            report.unmapped,
            report.accesses,
            report.events,
            report.differences.len(),
        ];
        let mut row = vec![report.endpoint.to_string()];
        row.extend(numbers.iter().map(usize::to_string));
        table.add_row(row);
    }
    let mut lines = vec![capture.source.clone(), String::new(), table.to_string(), String::new()];
    let differences =
        || reports.iter().flat_map(|report| report.differences.iter().map(|text| (report.endpoint, text)));
    for (endpoint, difference) in differences().take(MAX_TOLD) {
        lines.push(format!("endpoint {endpoint}: {difference}"));
    }
    if summary.differ > MAX_TOLD {
        lines.push(format!("and {} more", summary.differ - MAX_TOLD));
    }
    let Summary { endpoints, mappings, agree, differ } = summary;
    lines.push(format!("{endpoints} endpoints, {mappings} mappings: {agree} agree, {differ} differences."));
    lines.join("\n")
}
