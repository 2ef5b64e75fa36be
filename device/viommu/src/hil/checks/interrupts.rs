//! Interrupts that are memory writes, and go through the guest's tables like any other.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use pgtable_formats::context::smmuv3;
use pgtable_formats::edit::{EditOptions, Editor};
use pgtable_formats::format::Attrs;
use pgtable_formats::{Access, Gpa, IovaRange};
use viommu_guest::{Endpoint, Hardware};
use viommu_host_iommufd::kernel::Iommufd;
use viommu_wire::{AccessFlags, TableDescriptor};

use super::faults::quiet;
use super::tables::raw_table;
use crate::hil::bench::Bench;
use crate::hil::check::{Stage, skip};
use crate::hil::guest::{AT, BURST, Bound, Guest, PAGE, PATIENCE, domain, range as span};
use crate::hil::picture;

/// How long to wait for an interrupt that must not come.
const NEVER: Duration = Duration::from_millis(100);

pub(super) fn mapped<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let (endpoint, window, _) = begin(stage, &mut guest, index)?;
    // The guest library maps the window where untagged DMA gets a page table.
    let bound = Bound::new(&mut guest, &endpoint)?;
    let output = bound.space.translate(&guest.driver, window.start(), Access::WRITE);
    let output =
        output.map_err(|fault| anyhow::anyhow!("the guest's table does not map the window: {fault}"))?;
    let output = output.apply(window.start());
    guest.seen.mappings.push(picture::Mapping { range: window, output, write: true, stale: false });
    let station = stage.station(index)?;
    let mut interrupts = station.controls().interrupts()?;
    station.raise()?;
    let count = interrupts.wait(PATIENCE)?;
    ensure!(count > 0, "the device raised an MSI, and none arrived in {PATIENCE:?}");
    station.raise()?;
    ensure!(interrupts.wait(PATIENCE)? > 0, "the first MSI arrived, and the second did not");
    drop(interrupts);
    let at = window.start();
    let end = picture::End::Reached(Gpa(at.0));
    guest.seen.accesses.push(picture::Access { address: at, write: true, end });
    guest.seen.memory.push(picture::Memory {
        first: Gpa(at.0),
        last: Gpa(window.last().0),
        what: "doorbell of interrupts (host)".to_owned(),
    });
    stage.picture(&mut guest, "The MSI window, mapped in the guest's table");
    bound.end(&mut guest)
}

pub(super) fn unmapped<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let (endpoint, window, caps) = begin(stage, &mut guest, index)?;
    let page = guest.page()?;
    let table = without_window(&mut guest, &caps, page)?;
    let domain = domain(&mut guest)?;
    guest.driver.attach_table(domain, &endpoint, table).context("ATTACH_TABLE")?;
    let range = span(AT, PAGE)?;
    guest.seen.mappings.push(picture::Mapping { range, output: page, write: true, stale: false });
    let station = stage.station(index)?;
    let mut interrupts = station.controls().interrupts()?;
    quiet(&mut guest)?;
    station.raise()?;
    let count = interrupts.wait(NEVER)?;
    ensure!(count == 0, "{count} MSIs arrived, and the guest's table does not map the window");
    drop(interrupts);
    let faults = guest.faults(PATIENCE)?;
    let first = faults.first().context("the MSI was lost, and no event told of it")?;
    let address = first.address.context("the event has no address")?;
    ensure!(window.contains(address), "the event tells of {address}, and the window is {window}");
    ensure!(first.endpoint == endpoint.id(), "the event names endpoint {}", first.endpoint);
    ensure!(first.access.contains(AccessFlags::WRITE), "the event does not say that it was a write");
    let end = picture::End::Faulted;
    guest.seen.accesses.push(picture::Access { address, write: true, end });
    stage.note(format!("the event tells of address {address}"));
    // The device is none the worse for it.
    let station = stage.station(index)?;
    guest.reaches(station, AT, page, BURST)?;
    stage.picture(&mut guest, "The MSI window is not mapped");
    Ok(guest.driver.detach(domain, endpoint.id())?)
}

/// A device with interrupts, the window where it writes them, and the hardware that translates that.
fn begin<B: Bench>(
    stage: &mut Stage<'_, B>,
    guest: &mut Guest<B::Kernel>,
    index: usize,
) -> anyhow::Result<(Endpoint, IovaRange, smmuv3::Caps)> {
    let station = stage.station(index)?;
    if !station.interrupts() {
        return Err(skip(format!("{} raises no interrupts", station.engine_name())));
    }
    let endpoint = guest.probe(station)?;
    let Some(Hardware::Smmuv3(caps)) = endpoint.properties().hardware else {
        return Err(skip("VT-d takes interrupts out before it translates"));
    };
    let window = endpoint.properties().msi().context("PROBE tells no MSI window")?;
    Ok((endpoint, window, caps))
}

/// A table as the guest library would not make it: one page at [`AT`], and nothing where interrupts go.
fn without_window<K: Iommufd>(
    guest: &mut Guest<K>,
    caps: &smmuv3::Caps,
    page: Gpa,
) -> anyhow::Result<TableDescriptor> {
    let (table, format) = raw_table(guest, caps)?;
    let memory = &mut guest.driver.platform_mut().alloc;
    let mapped =
        Editor::new(format, memory, EditOptions::default()).map(span(AT, PAGE)?, page, Attrs::READ_WRITE);
    mapped.map_err(|partial| partial.cause)?;
    Ok(table)
}
