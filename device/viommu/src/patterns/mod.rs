//! `patterns`: how devices use their mappings, from a trace, in words and pictures.

mod analysis;
mod endpoint;
mod extent;
mod histogram;
mod html;
mod locality;
mod raster;
mod saving;
mod story;
mod stride;
mod svg;
#[cfg(test)]
mod tests;
mod text;
mod waits;
mod world;

use std::fs::File;
use std::io::{self, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, ensure};
use clap::Args;
use viommu_queue::record::TraceReader;

/// How devices use their mappings, from a trace: how long mappings live, how often they are used, hits and misses, how
/// long accesses wait for pages that are not there, and what a handover of page tables would save.
///
/// A trace is what `viommu demo --trace FILE` writes, or a VMM with viommu_queue::record. Everything told is counted in
/// the trace. What is only thought is said so: an IOTLB of --iotlb entries for each endpoint, pages of 4 KiB, the least
/// recently used giving way; and the requests of a driver that hands its tables over: no MAP, an INVALIDATE for each
/// UNMAP that took something away, an ATTACH_TABLE for each ATTACH.
#[derive(Args, Clone, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Options {
    /// The trace.
    file: PathBuf,
    /// Writes a page with pictures there: one file, no script, nothing to fetch.
    #[arg(long, value_name = "OUT")]
    html: Option<PathBuf>,
    /// All numbers as one JSON document, instead of the words.
    #[arg(long)]
    json: bool,
    /// Entries of the IOTLB that hits and misses are counted for.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=4096))]
    iotlb: u16,
    /// Takes a trace that was cut, as far as it goes: its recorder was killed, for one.
    #[arg(long)]
    partial: bool,
}

/// Tells what is in the trace.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let name = options.file.display();
    let what = || format!("{name}");
    let mut trace = open(&options.file)?;
    let analysis = analysis::analyse(&mut trace, options.iotlb.into(), options.partial).with_context(what)?;
    if let Some(out) = &options.html {
        let drawing =
            raster::draw(&mut open(&options.file)?, &analysis, options.partial).with_context(what)?;
        let page = html::page(&options.file.to_string_lossy(), &analysis, &drawing);
        std::fs::write(out, page).with_context(|| format!("{}", out.display()))?;
    }
    let told = if options.json { serde_json::to_string_pretty(&analysis)? } else { text::text(&analysis) };
    match writeln!(io::stdout().lock(), "{told}") {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error.into()),
        _ => {}
    }
    Ok(ExitCode::SUCCESS)
}

fn open(path: &Path) -> anyhow::Result<TraceReader<BufReader<File>>> {
    let what = || format!("{}", path.display());
    // It is read twice; and what never ends, or never begins, is no trace.
    ensure!(std::fs::metadata(path).with_context(what)?.is_file(), "{} is no file", path.display());
    TraceReader::new(BufReader::new(File::open(path).with_context(what)?)).with_context(what)
}
