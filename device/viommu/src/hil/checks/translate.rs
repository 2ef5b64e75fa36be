//! Stage 1 and stage 2, in both directions.

use anyhow::{Context as _, ensure};
use pgtable_formats::format::Attrs;
use pgtable_formats::{Gpa, Iova};
use viommu_guest::Hardware;
use viommu_wire::ReservedKind;

use crate::hil::bench::Bench;
use crate::hil::check::{Stage, skip};
use crate::hil::guest::{AT, BURST, Bound, Guest, PAGE, PAGE_LG2};

pub(super) fn probe<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let station = stage.station(index)?;
    let endpoint = guest.driver.probe(station.endpoint()).context("PROBE")?;
    let properties = endpoint.properties().clone();
    ensure!(properties.unknown == 0, "PROBE has {} properties of an unknown type", properties.unknown);
    ensure!(properties.malformed == 0, "PROBE has {} malformed properties", properties.malformed);
    for region in &properties.reserved {
        stage.note(format!("reserved: {} {}", region.kind, region.range));
    }
    let formats: Vec<String> = properties.formats.iter().map(|format| format!("{format:#x}")).collect();
    match properties.hardware {
        None => return Err(skip("PROBE names no hardware that walks the guest's tables")),
        Some(Hardware::Smmuv3(caps)) => {
            let granules = [(caps.granule_4k, "4K"), (caps.granule_16k, "16K"), (caps.granule_64k, "64K")];
            let granules: Vec<&str> =
                granules.into_iter().filter_map(|(has, name)| has.then_some(name)).collect();
            ensure!(!granules.is_empty(), "PROBE names an SMMUv3 without a granule");
            stage.note(format!(
                "SMMUv3: granules {}, {} bits of output, {} bits of PASID, ASIDs of {} bits",
                granules.join(" "),
                caps.oas_bits,
                caps.ssid_bits,
                if caps.asid16 { 16 } else { 8 },
            ));
            let window = properties.reserved.iter().any(|region| region.kind == ReservedKind::Msi);
            ensure!(window, "PROBE tells no MSI window, and on an SMMUv3 interrupts are translated");
        }
        Some(Hardware::Vtd(caps)) => stage.note(format!("VT-d: {} bits of PASID", caps.pasid_bits)),
    }
    ensure!(!formats.is_empty(), "PROBE names hardware, and no format of tables");
    stage.note(format!("table formats {}; {} bits of PASID", formats.join(" "), properties.pasid_bits));
    let endpoints = guest.endpoints();
    let count = stage.bench.count();
    ensure!(endpoints == count, "the machine has {endpoints} endpoints, and {count} devices were given");
    Ok(())
}

pub(super) fn write<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let station = stage.station(index)?;
    let endpoint = guest.probe(station)?;
    let mut bound = Bound::new(&mut guest, &endpoint)?;
    let page = guest.page()?;
    bound.map(&mut guest, AT, page, PAGE, Attrs::READ_WRITE)?;
    for (offset, length) in [(0, BURST), (0x7c, 4), (PAGE - BURST as u64, BURST)] {
        guest.reaches(station, Iova(AT.0 + offset), Gpa(page.0 + offset), length)?;
    }
    stage.picture(&mut guest, "A DMA write through stage 1 and stage 2");
    bound.end(&mut guest)
}

pub(super) fn read<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    needs_read(stage, index)?;
    let mut guest = stage.guest()?;
    let station = stage.station(index)?;
    let endpoint = guest.probe(station)?;
    let mut bound = Bound::new(&mut guest, &endpoint)?;
    let page = guest.page()?;
    // Read-only: that is all it takes.
    bound.map(&mut guest, AT, page, PAGE, Attrs::READ)?;
    let sink = (Iova(AT.0 + 16 * PAGE), guest.page()?);
    bound.map(&mut guest, sink.0, sink.1, PAGE, Attrs::READ_WRITE)?;
    guest.fetches(station, AT, page, sink, BURST)?;
    guest.fetches(
        station,
        Iova(AT.0 + PAGE / 2),
        Gpa(page.0 + PAGE / 2),
        sink,
        usize::try_from(PAGE / 2)?,
    )?;
    stage.picture(&mut guest, "A DMA read through stage 1 and stage 2");
    bound.end(&mut guest)
}

pub(super) fn scattered<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    const PAGES: u64 = 4;
    let mut guest = stage.guest()?;
    let station = stage.station(index)?;
    let endpoint = guest.probe(station)?;
    let mut bound = Bound::new(&mut guest, &endpoint)?;
    let mut pages = (0..PAGES).map(|_| guest.page()).collect::<anyhow::Result<Vec<_>>>()?;
    pages.reverse();
    for (place, &page) in (0u64..).zip(&pages) {
        bound.map(&mut guest, Iova(AT.0 + place * PAGE), page, PAGE, Attrs::READ_WRITE)?;
    }
    for (place, &page) in (0u64..).zip(&pages) {
        guest.reaches(station, Iova(AT.0 + place * PAGE + 0x100), Gpa(page.0 + 0x100), BURST)?;
    }
    // One transfer over the border of two pages that are not neighbours.
    let (Some(&first), Some(&second)) = (pages.first(), pages.get(1)) else { return Ok(()) };
    let half = BURST / 2;
    for page in [first, second] {
        guest.write(page, &vec![0; usize::try_from(PAGE)?])?;
    }
    let data = station.data(BURST)?;
    station.write(Iova(AT.0 + PAGE - half as u64), BURST)?;
    let mut found = guest.read(Gpa(first.0 + PAGE - half as u64), half)?;
    found.extend(guest.read(second, half)?);
    ensure!(found == data, "a DMA write over the border of two pages did not reach both of them");
    stage.picture(&mut guest, "Pages that do not follow each other in memory");
    bound.end(&mut guest)
}

pub(super) fn block<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    const BLOCK_LG2: u8 = 21;
    let mut guest = stage.guest()?;
    let station = stage.station(index)?;
    let endpoint = guest.probe(station)?;
    let mut bound = Bound::new(&mut guest, &endpoint)?;
    if bound.space.page_lg2() != PAGE_LG2 {
        return Err(skip(format!("the smallest page has 2^{} bytes", bound.space.page_lg2())));
    }
    let block = guest.block(BLOCK_LG2)?;
    let at = Iova(AT.0 & !((1 << BLOCK_LG2) - 1));
    let length = 1u64 << BLOCK_LG2;
    bound.map(&mut guest, at, block, length, Attrs::READ_WRITE)?;
    for offset in [0, length / 2, length - BURST as u64] {
        guest.reaches(station, Iova(at.0 + offset), Gpa(block.0 + offset), BURST)?;
    }
    stage.picture(&mut guest, "A mapping of 2 MiB");
    bound.end(&mut guest)
}

pub(super) fn map_later<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let station = stage.station(index)?;
    let endpoint = guest.probe(station)?;
    let mut bound = Bound::new(&mut guest, &endpoint)?;
    let (first, second) = (guest.page()?, guest.page()?);
    bound.map(&mut guest, AT, first, PAGE, Attrs::READ_WRITE)?;
    guest.reaches(station, AT, first, BURST)?;
    let sent = *guest.driver.counters();
    let next = Iova(AT.0 + PAGE);
    bound.map(&mut guest, next, second, PAGE, Attrs::READ_WRITE)?;
    let sent = guest.driver.counters().since(&sent).requests;
    guest.reaches(station, next, second, BURST)?;
    ensure!(sent == 0, "mapping sent {sent} requests");
    bound.end(&mut guest)
}

/// Not every device can read.
pub(super) fn needs_read<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let station = stage.station(index)?;
    if station.reads() {
        Ok(())
    } else {
        Err(skip(format!("{} does not read memory", station.engine_name())))
    }
}

/// A table with one page at [`AT`], attached, and the page.
pub(super) fn one_page<B: Bench>(
    stage: &mut Stage<'_, B>,
    guest: &mut Guest<B::Kernel>,
    index: usize,
    attrs: Attrs,
) -> anyhow::Result<(Bound, Gpa)> {
    let endpoint = guest.probe(stage.station(index)?)?;
    let mut bound = Bound::new(guest, &endpoint)?;
    let page = guest.page()?;
    bound.map(guest, AT, page, PAGE, attrs)?;
    Ok((bound, page))
}
