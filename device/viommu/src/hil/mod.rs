//! `hil`: whether this machine's hardware does what is promised to a guest.
//!
//! A VMM and its guest in one process, on the real kernel: guest memory, the device on `IommufdHost`, virtqueues, the
//! driver of `viommu-guest`. Requests are real ones, data is moved by the DMA of real devices ([`bench`](mod@bench)), and each
//! [check](checks) compares it with memory. [`report`] tells what was found.

mod bench;
mod check;
mod checks;
mod compare;
mod generate;
mod guest;
mod outcome;
mod picture;
mod random;
mod real;
pub(crate) mod report;
#[cfg(test)]
mod tests;

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, bail};
use clap::Args;
use viommu_host_iommufd::sysfs::Bdf;

use bench::Bench;
use check::{Check, Run, Stage};
use outcome::{Report, Subject};
use real::RealBench;

/// Hardware in the loop: hand guest tables to this machine's IOMMU, and check what devices reach through them.
///
/// Needs /dev/iommu, and devices that vfio-pci has and that this program can drive: QEMU's edu and iommu-testdev.
/// `viommu host` says what is missing. Ends with 0 if every check that could be made passed, 1 if one failed, 2 if none
/// could be made.
#[derive(Args, Clone, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Options {
    /// A PCI device that vfio-pci has, such as 0000:01:00.0. Twice for the checks with two devices at once.
    #[arg(long = "device", value_name = "ADDRESS")]
    devices: Vec<Bdf>,
    /// The results as JUnit XML.
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// The results as KTAP.
    #[arg(long, value_name = "FILE")]
    ktap: Option<PathBuf>,
    /// The results as one HTML page, with pictures of the address spaces.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Only this check; may be given several times.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Lists the checks, and makes none.
    #[arg(long)]
    list: bool,
    /// What random tables are made from.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// How many random tables each device is given.
    #[arg(long, value_name = "N", default_value_t = 100)]
    tables: u32,
    /// A folder with tables that a real kernel built (see tests/captures); may be given several times.
    #[arg(long, value_name = "FOLDER")]
    captures: Vec<PathBuf>,
    /// Binds a table and lets the first device work until this process is killed.
    #[arg(long, hide = true)]
    child: bool,
}

/// Nothing could be checked.
const CANNOT: u8 = 2;

/// Makes the checks.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let checks = checks::all::<RealBench>();
    if options.list {
        return list(&checks);
    }
    match attempt(options, &checks) {
        Ok(true) => Ok(ExitCode::SUCCESS),
        Ok(false) => Ok(ExitCode::FAILURE),
        Err(error) => {
            eprintln!("error: nothing was checked: {error:#}");
            Ok(ExitCode::from(CANNOT))
        }
    }
}

/// Whether no check failed.
fn attempt(options: &Options, checks: &[Check<RealBench>]) -> anyhow::Result<bool> {
    if options.devices.is_empty() {
        bail!(
            "no device was named (--device 0000:01:00.0). It takes one that vfio-pci has and that this program can \
             make do DMA; `viommu host` lists the devices of this machine"
        );
    }
    let checks = selected(checks, &options.only)?;
    let mut bench = RealBench::new(&options.devices)?;
    if options.child {
        checks::work(&mut bench)?;
        bail!("the work came to an end");
    }
    let mut report = Report { facts: facts(options), ..Report::default() };
    check_all(&mut bench, &checks, options, &mut report, &mut |text| print(text))?;
    write_out(&options.junit, &report, report::junit)?;
    write_out(&options.ktap, &report, report::ktap)?;
    write_out(&options.html, &report, report::html)?;
    let tally = report.tally();
    if tally.failed == 0 && tally.passed == 0 {
        bail!("every check was skipped");
    }
    Ok(tally.failed == 0)
}

/// Runs checks, and tells of each device when it is done with.
fn check_all<B: Bench>(
    bench: &mut B,
    checks: &[&Check<B>],
    options: &Options,
    report: &mut Report,
    show: &mut dyn FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let start = Instant::now();
    for index in 0..bench.count() {
        let name = bench.name(index);
        let station = bench.station(index)?;
        let (engine, endpoint) = (station.engine_name().to_owned(), station.endpoint().0);
        report.subjects.push(Subject { name, engine, endpoint });
    }
    let mut stage = Stage {
        bench,
        seed: options.seed,
        tables: options.tables,
        captures: &options.captures,
        notes: Vec::new(),
        pictures: Vec::new(),
        comparisons: Vec::new(),
    };
    let width = checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    show(&report::head(report))?;
    // Device by device, and what takes two of them last.
    for index in 0..stage.bench.count() {
        let subject = stage.bench.name(index);
        show(&format!("\n{subject}\n"))?;
        for check in checks.iter().filter(|check| matches!(check.run, Run::Device(_))) {
            let done = check::on_device(&mut stage, check, index);
            show(&report::line(&done, width))?;
            report.checks.push(done);
        }
    }
    let pairs = checks.iter().filter(|check| matches!(check.run, Run::Pair(_)));
    for (number, check) in pairs.enumerate() {
        let done = check::on_pair(&mut stage, check);
        if number == 0 {
            show(&format!("\n{}\n", done.subject))?;
        }
        show(&report::line(&done, width))?;
        report.checks.push(done);
    }
    report.comparisons = stage.comparisons;
    report.elapsed = start.elapsed();
    show(&report::tail(report))
}

fn selected<'c, B: Bench>(checks: &'c [Check<B>], only: &[String]) -> anyhow::Result<Vec<&'c Check<B>>> {
    for name in only {
        if checks.iter().all(|check| check.name != name) {
            bail!("there is no check {name}; --list names them");
        }
    }
    let wanted = |check: &&Check<B>| only.is_empty() || only.iter().any(|name| check.name == name);
    Ok(checks.iter().filter(wanted).collect())
}

fn facts(options: &Options) -> Vec<(&'static str, String)> {
    let kernel = nix::sys::utsname::uname().map_or_else(
        |_| "unknown".to_owned(),
        |name| {
            let part = |text: &std::ffi::OsStr| text.to_string_lossy().into_owned();
            format!("{} {} {}", part(name.sysname()), part(name.release()), part(name.machine()))
        },
    );
    vec![
        ("program", format!("viommu {}", env!("CARGO_PKG_VERSION"))),
        ("kernel", kernel),
        ("seed", options.seed.to_string()),
    ]
}

fn list(checks: &[Check<RealBench>]) -> anyhow::Result<ExitCode> {
    let width = checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    for check in checks {
        print(&format!("{:<width$}  {}\n", check.name, check.claim))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn write_out(path: &Option<PathBuf>, report: &Report, text: fn(&Report) -> String) -> anyhow::Result<()> {
    let Some(path) = path else { return Ok(()) };
    let write = |path: &Path| fs::write(path, text(report));
    write(path).with_context(|| format!("cannot write {}", path.display()))
}

/// A reader who has seen enough is no error.
fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}
