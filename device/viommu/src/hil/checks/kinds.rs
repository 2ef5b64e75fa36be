//! Both ways to hand over: a table of all PASIDs, and a page table by itself. One of them is the hardware's own; the
//! other is made of it, with the same promises.

use anyhow::{Context as _, ensure};
use pgtable_formats::format::Attrs;
use pgtable_formats::{Gpa, Iova, TableMem as _};
use viommu_guest::Endpoint;
use viommu_guest::tables::{AddressSpace, SpaceOptions, Style};
use viommu_host_iommufd::kernel::Iommufd;
use viommu_wire::numbers;

use crate::hil::bench::{Bench, Moved};
use crate::hil::check::{Stage, skip};
use crate::hil::guest::{AT, Arrival, BURST, Bound, Guest, PAGE, WORD, range};

/// The kind that is not the hardware's own: it is the second in PROBE's list.
fn other_style<K: Iommufd>(guest: &mut Guest<K>, endpoint: &Endpoint) -> anyhow::Result<Style> {
    let preferred = Bound::unattached(guest, endpoint)?;
    let is_table = preferred.pasids.descriptor().is_some();
    preferred.end(guest)?;
    Ok(if is_table { Style::Single } else { Style::Table })
}

pub(super) fn mediated<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let endpoint = guest.probe(stage.station(index)?)?;
    let style = other_style(&mut guest, &endpoint)?;
    let (mut bound, page) = one_page(&mut guest, &endpoint, style)?;
    let format = bound.pasids.format();
    let station = stage.station(index)?;
    guest.reaches(station, AT, page, BURST)?;
    if station.reads() {
        let sink = (Iova(AT.0 + PAGE), guest.page()?);
        bound.map(&mut guest, sink.0, sink.1, PAGE, Attrs::READ_WRITE)?;
        guest.fetches(station, AT, page, sink, BURST)?;
    }
    stage.picture(&mut guest, format!("Handed over in format {format:#x}"));

    // Taken out of the table: perhaps it still shows, and after INVALIDATE it does not.
    let station = stage.station(index)?;
    bound.unmap_silently(&mut guest, AT, PAGE)?;
    let (arrival, _) = guest.dma_write(station, AT, page, WORD)?;
    if arrival == Arrival::Arrived {
        guest.last_was_stale();
    }
    bound.space.synchronize(&mut guest.driver)?;
    guest.blocked(station, AT, page, WORD)?;
    let stale =
        if arrival == Arrival::Arrived { "stale before INVALIDATE" } else { "not kept until INVALIDATE" };
    stage.note(format!("format {format:#x}; a page that was unmapped was {stale}, and gone after it"));

    // Another page table takes its place, and then none.
    let mut other = AddressSpace::new(&mut guest.driver, &endpoint, SpaceOptions::default())?;
    let new = guest.page()?;
    other.map(&mut guest.driver, range(AT, PAGE)?, new, Attrs::READ_WRITE)?;
    bound.pasids.unbind(&mut guest.driver, None, &mut bound.space).context("unbind")?;
    let station = stage.station(index)?;
    guest.blocked(station, AT, page, WORD)?;
    bound.pasids.bind_at(&mut guest.driver, None, &mut other).context("bind")?;
    guest.reaches(station, AT, new, BURST)?;
    let old = std::mem::replace(&mut bound.space, other);
    old.release(&mut guest.driver).map_err(|(_, error)| error)?;
    bound.end(&mut guest)?;
    guest.blocked(station, AT, new, WORD)?;
    guest.blocked(station, Iova(new.0), new, WORD)
}

/// From one kind to the other and back, on one device.
pub(super) fn between<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let endpoint = guest.probe(stage.station(index)?)?;
    for style in [Style::Table, Style::Single, Style::Table] {
        let (bound, page) = one_page(&mut guest, &endpoint, style)?;
        let station = stage.station(index)?;
        guest.reaches(station, AT, page, BURST)?;
        bound.end(&mut guest)?;
        guest.blocked(station, AT, page, WORD)?;
    }
    Ok(())
}

/// The device writes nothing in the window that holds tables of the machine's own, even if a guest leads it there.
pub(super) fn window<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let endpoint = guest.probe(stage.station(index)?)?;
    let (mut bound, page) = one_page(&mut guest, &endpoint, Style::Single)?;
    if bound.pasids.format() != numbers::FORMAT_ARM_PT {
        bound.end(&mut guest)?;
        return Err(skip("this hardware takes page tables as they are: nothing is in a window"));
    }
    let window = guest.window;
    let is_told = endpoint.properties().reserved.iter().any(|region| region.range.contains(Iova(window.0)));
    ensure!(is_told, "PROBE does not tell that {window} is reserved");
    let next = Iova(AT.0 + PAGE);
    bound.map(&mut guest, next, window, PAGE, Attrs::READ_WRITE)?;
    let before = own_table(&guest)?;
    ensure!(before.iter().any(|word| *word != 0), "no table is at {window}");
    let station = stage.station(index)?;
    guest.reaches(station, AT, page, BURST)?;
    let moved = station.write(next, WORD)?;
    ensure!(moved != Moved::Done, "a DMA write to {window}, a table of the machine's own, was done");
    ensure!(own_table(&guest)? == before, "a DMA write changed {window}, a table of the machine's own");
    guest.reaches(station, AT, page, BURST)?;
    bound.end(&mut guest)
}

/// The first page of the window.
fn own_table<K: Iommufd>(guest: &Guest<K>) -> anyhow::Result<Vec<u64>> {
    let machine = guest.machine.lock();
    let tables = machine.device().host().memory();
    let words = (guest.window.0..guest.window.0 + PAGE).step_by(8);
    words.map(|at| tables.load(Gpa(at)).ok().context("the window is not memory")).collect()
}

/// A table with one page at [`AT`], attached in this style, and the page.
fn one_page<K: Iommufd>(
    guest: &mut Guest<K>,
    endpoint: &Endpoint,
    style: Style,
) -> anyhow::Result<(Bound, Gpa)> {
    let mut bound = Bound::in_style(guest, endpoint, style)?;
    let page = guest.page()?;
    bound.map(guest, AT, page, PAGE, Attrs::READ_WRITE)?;
    bound.attach(guest)?;
    Ok((bound, page))
}
