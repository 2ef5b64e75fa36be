//! Resets, and ends of every kind.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgtable_formats::Iova;
use pgtable_formats::format::Attrs;
use viommu_guest::{BypassDomain, MappedDomain, Mapping};
use viommu_wire::MapFlags;

use super::translate::one_page;
use crate::hil::bench::Bench;
use crate::hil::check::{Stage, skip};
use crate::hil::guest::{AT, BURST, Bound, Guest, PAGE, WORD, range};

pub(super) fn virtio_reset<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let (bound, page) = one_page(stage, &mut guest, index, Attrs::READ_WRITE)?;
    let station = stage.station(index)?;
    guest.reaches(station, AT, page, BURST)?;
    let mut guest = guest.restart()?;
    // The table is memory and no more.
    drop(bound);
    guest.blocked(station, AT, page, WORD)?;
    guest.blocked(station, Iova(page.0), page, WORD)?;
    let endpoint = guest.probe(station)?;
    let mut bound = Bound::new(&mut guest, &endpoint)?;
    let page = guest.page()?;
    bound.map(&mut guest, AT, page, PAGE, Attrs::READ_WRITE)?;
    guest.reaches(station, AT, page, BURST)?;
    bound.end(&mut guest)
}

pub(super) fn device_reset<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let (mut bound, page) = one_page(stage, &mut guest, index, Attrs::READ_WRITE)?;
    let sink = (Iova(AT.0 + PAGE), guest.page()?);
    bound.map(&mut guest, sink.0, sink.1, PAGE, Attrs::READ_WRITE)?;
    let station = stage.station(index)?;
    guest.reaches(station, AT, page, BURST)?;
    station.controls().reset()?;
    station.restart()?;
    if station.reads() {
        // What it would write was lost with the reset.
        guest.fetches(station, AT, page, sink, usize::try_from(PAGE)?)?;
    }
    guest.reaches(station, AT, page, BURST)?;
    guest.blocked(station, Iova(AT.0 + 2 * PAGE), page, WORD)?;
    bound.end(&mut guest)
}

/// Every kind of object is made, and the machine is dropped with all of them in use.
pub(super) fn nothing_leaks<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let ((), calls) = stage.ioctls(|stage| {
        let mut guest = stage.guest()?;
        let station = stage.station(index)?;
        let endpoint = guest.driver.probe(station.endpoint())?;
        let mut mapped = MappedDomain::new(&mut guest.driver)?;
        mapped.attach(&mut guest.driver, &endpoint)?;
        let target = guest.page()?;
        let flags = MapFlags::READ | MapFlags::WRITE;
        mapped.map(&mut guest.driver, Mapping { range: range(AT, PAGE)?, target, flags })?;
        let bypass = BypassDomain::new(&mut guest.driver)?;
        bypass.attach(&mut guest.driver, &endpoint)?;
        if endpoint.properties().hardware.is_some() {
            let (_, page) = one_page(stage, &mut guest, index, Attrs::READ_WRITE)?;
            guest.reaches(stage.station(index)?, AT, page, BURST)?;
        }
        Ok(())
    })?;
    let made: u64 = calls.iter().filter(|(name, _)| is_alloc(name)).map(|(_, count)| count).sum();
    let gone = calls.iter().find(|(name, _)| is_destroy(name)).map_or(0, |(_, count)| *count);
    ensure!(made > 0, "no object was made, or calls are not counted: {calls:?}");
    ensure!(made == gone, "{made} objects were made, and {gone} destroyed: {calls:?}");
    stage.note(format!("{made} kernel objects were made, and as many destroyed"));
    // And the device can be had anew.
    let mut guest = stage.guest()?;
    let (bound, page) = one_page(stage, &mut guest, index, Attrs::READ_WRITE)?;
    guest.reaches(stage.station(index)?, AT, page, BURST)?;
    bound.end(&mut guest)
}

fn is_alloc(name: &str) -> bool {
    name.to_ascii_lowercase().contains("alloc")
}

fn is_destroy(name: &str) -> bool {
    name.to_ascii_lowercase().contains("destroy")
}

/// How long the other process works before it is killed.
const WORK: Duration = Duration::from_millis(250);

pub(super) fn killed<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let Some(mut worker) = stage.bench.worker(index) else {
        return Err(skip("no other process can have this device"));
    };
    stage.bench.let_go();
    let killed = (|| {
        let mut child =
            worker.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("cannot start a process")?;
        let said = match child.stdout.take() {
            Some(out) => BufReader::new(out).lines().next(),
            None => None,
        };
        let ready = matches!(&said, Some(Ok(line)) if line == READY);
        if ready {
            std::thread::sleep(WORK);
        }
        // This process, and no other: it was not waited for yet, so its ID is still its own.
        let alive = child.try_wait()?.is_none();
        if alive {
            kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGKILL).context("kill")?;
        }
        let status = child.wait()?;
        if !ready {
            bail!("the other process did not get to work ({status}): {said:?}");
        }
        ensure!(alive, "the other process ended by itself ({status})");
        Ok(status)
    })();
    stage.bench.take_again().context("after the process was killed")?;
    let status = killed?;
    stage.note(format!("the other process ended by {status}"));
    let mut guest = stage.guest()?;
    let (bound, page) = one_page(stage, &mut guest, index, Attrs::READ_WRITE)?;
    let station = stage.station(index)?;
    guest.reaches(station, AT, page, BURST)?;
    guest.blocked(station, Iova(AT.0 + PAGE), page, WORD)?;
    bound.end(&mut guest)
}

/// What the other process says once it works.
pub(in crate::hil) const READY: &str = "ready";

/// What the other process does: it binds a table, and lets the device work through it for ever.
pub(in crate::hil) fn work<B: Bench>(bench: &mut B) -> anyhow::Result<()> {
    let mut guest: Guest<B::Kernel> = Guest::start(bench)?;
    let station = bench.station(0)?;
    let endpoint = guest.probe(station)?;
    let mut bound = Bound::new(&mut guest, &endpoint)?;
    let page = guest.page()?;
    bound.map(&mut guest, AT, page, PAGE, Attrs::READ_WRITE)?;
    guest.reaches(station, AT, page, BURST)?;
    println!("{READY}");
    loop {
        guest.reaches(station, AT, page, BURST)?;
        guest.seen.accesses.clear();
    }
}
