//! `demo`: what a virtio-iommu is for, told by doing it.
//!
//! A guest and a VMM in one process: guest memory, split virtqueues in it, the driver of `viommu-guest` on one side and
//! the device on the other, and a small DMA engine behind the IOMMU. Each scene finds out facts ([`facts`]), compares
//! them with what must come out, and fails where they differ; [`text`] tells what was found.

mod begin;
mod channel;
mod compare;
mod engine;
mod facts;
mod guest;
mod machine;
mod pager;
mod paging;
mod share;
mod text;

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::Args;
use viommu_queue::record::Tape;

use facts::{Paging, Sharing, Story};
use guest::Guest;
use machine::Machine;
use share::Shared;

/// The whole story, on this machine, in seconds: a guest hands its own page tables to an IOMMU.
///
/// Guest, device and memory are in this one process. Every line is measured or read back, and compared with what must
/// come out, before it is printed; where something differs the program says what and ends non-zero.
#[derive(Args, Clone, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Options {
    /// The same facts as one JSON document.
    #[arg(long)]
    json: bool,
    /// How many buffers of 4 KiB the last scene moves in each way.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=8192))]
    buffers: u32,
    /// Records what guest and devices do, for `viommu patterns`. Times in the trace are numbers of events.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Hardware that caches nothing. It has no stale translations to show, so scene 4 does not come out as told.
    #[arg(long, hide = true)]
    strict: bool,
}

/// Tells the story.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    // A scene is shown when it has come out.
    let mut show =
        |scene: &dyn std::fmt::Display| if options.json { Ok(()) } else { print(&scene.to_string()) };
    let story = tell(options, &mut show)?;
    if options.json {
        print(&serde_json::to_string_pretty(&story)?)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn tell(
    options: &Options,
    show: &mut dyn FnMut(&dyn std::fmt::Display) -> anyhow::Result<()>,
) -> anyhow::Result<Story> {
    let machine = machine::start(options.strict)?;
    let tape = options.trace.as_deref().map(|path| record(&machine, path)).transpose()?;
    let mut guest = Guest::start(&machine)?;
    let guest = &mut guest;

    show(&text::Opening)?;
    let first = begin::machine(&machine, guest).context("scene 1")?;
    show(&text::Machine(&first))?;
    let (endpoint, probe) = begin::probe(guest).context("scene 2")?;
    show(&text::Probe(&probe))?;

    let (mut shared, handover) =
        Shared::start(&machine, guest, &endpoint, &['A', 'B', 'C']).context("scene 3")?;
    show(&text::Handover(&handover))?;
    let change = shared.change(guest).context("scene 4")?;
    show(&text::Change(&change))?;
    let faults = shared.faults(guest).context("scene 5")?;
    show(&text::Faults(&faults))?;
    shared.end(guest).context("the end of scene 5")?;
    let smmuv3 = Sharing { handover, change, faults };

    let vtd = other_vendor(&machine, guest).context("scene 6")?;
    show(&text::OtherVendor(&vtd))?;

    let paging = demand_paged(&machine, guest).context("scene 7")?;
    show(&text::Paging(&paging))?;

    let comparison = compare::compare(&machine, guest, options.buffers).context("scene 8")?;
    show(&text::Comparison(&comparison))?;
    if let Some((tape, path)) = tape {
        machine.lock().set_recorder(None);
        tape.finish().with_context(|| format!("{}", path.display()))?;
    }
    show(&text::Closing)?;
    Ok(Story { machine: first, probe, smmuv3, vtd, paging, comparison })
}

/// From now on, everything goes into the trace.
fn record<'p>(machine: &Machine, path: &'p Path) -> anyhow::Result<(Arc<Tape<File>>, &'p Path)> {
    let file = File::create(path).with_context(|| format!("{}", path.display()))?;
    let tape = Arc::new(Tape::new(file));
    machine.lock().set_recorder(Some(tape.clone()));
    Ok((tape, path))
}

/// Scenes 3 to 5 with the same code, and hardware of another maker.
fn other_vendor(machine: &Machine, guest: &mut Guest) -> anyhow::Result<Sharing> {
    let endpoint = guest.driver.probe(machine::VTD)?;
    let (mut shared, handover) = Shared::start(machine, guest, &endpoint, &['D', 'E'])?;
    let change = shared.change(guest)?;
    let faults = shared.faults(guest)?;
    shared.end(guest)?;
    Ok(Sharing { handover, change, faults })
}

/// Memory that is not there at first, and a process that is killed; with each hardware.
fn demand_paged(machine: &Machine, guest: &mut Guest) -> anyhow::Result<[Paging; 2]> {
    let mut paging = |endpoint, names| {
        let endpoint = guest.driver.probe(endpoint)?;
        let facts = paging::paging(machine, guest, &endpoint, names);
        facts.with_context(|| format!("endpoint {}", endpoint.id()))
    };
    Ok([paging(machine::SMMUV3_PAGED, ['F', 'G', 'H'])?, paging(machine::VTD_PAGED, ['I', 'J', 'K'])?])
}

/// A reader who has seen enough is no error.
fn print(text: &str) -> anyhow::Result<()> {
    match writeln!(io::stdout().lock(), "{text}") {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}
