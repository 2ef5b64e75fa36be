//! Unattached, bypass, mappings, tables: what a device can be bound to, and the ways between.

use anyhow::{Context as _, ensure};
use pgtable_formats::format::Attrs;
use pgtable_formats::{Gpa, Iova};
use viommu_guest::{BypassDomain, MappedDomain, Mapping};
use viommu_wire::MapFlags;

use super::translate::{needs_read, one_page};
use crate::hil::bench::Bench;
use crate::hil::check::{Stage, skip};
use crate::hil::guest::{AT, Arrival, BURST, Bound, PAGE, PAGE_LG2, WORD, range as span};
use crate::hil::picture;

const PAGE_BYTES: usize = 1 << PAGE_LG2;

pub(super) fn unattached<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let station = stage.station(index)?;
    let page = guest.page()?;
    // Neither by its address nor by any other.
    guest.blocked(station, Iova(page.0), page, WORD)?;
    guest.blocked(station, AT, page, WORD)?;
    guest.driver.probe(station.endpoint()).context("PROBE")?;
    guest.blocked(station, Iova(page.0), page, WORD)?;
    stage.picture(&mut guest, "Attached to nothing");
    Ok(())
}

pub(super) fn bypass_domain<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let station = stage.station(index)?;
    let endpoint = guest.driver.probe(station.endpoint())?;
    let domain = BypassDomain::new(&mut guest.driver)?;
    domain.attach(&mut guest.driver, &endpoint)?;
    let page = guest.page()?;
    guest.reaches(station, Iova(page.0), page, BURST)?;
    if station.reads() {
        let sink = guest.page()?;
        guest.fetches(station, Iova(page.0), page, (Iova(sink.0), sink), PAGE_BYTES)?;
    }
    guest.blocked(station, AT, page, WORD)?;
    domain.detach(&mut guest.driver, endpoint.id())?;
    guest.blocked(station, Iova(page.0), page, WORD)
}

pub(super) fn bypass_unattached<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let station = stage.station(index)?;
    let page = guest.page()?;
    guest.driver.set_bypass(true)?;
    ensure!(guest.driver.bypass()?, "the device did not take `bypass`");
    guest.reaches(station, Iova(page.0), page, BURST)?;
    guest.driver.set_bypass(false)?;
    guest.blocked(station, Iova(page.0), page, WORD)
}

pub(super) fn detach<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let (mut bound, page) = one_page(stage, &mut guest, index, Attrs::READ_WRITE)?;
    let station = stage.station(index)?;
    guest.reaches(station, AT, page, BURST)?;
    bound.pasids.detach(&mut guest.driver)?;
    guest.blocked(station, AT, page, WORD)?;
    guest.blocked(station, Iova(page.0), page, WORD)?;
    // And the same table once more.
    bound.attach(&mut guest)?;
    guest.reaches(station, AT, page, BURST)?;
    bound.end(&mut guest)
}

pub(super) fn rebind<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let (first, old) = one_page(stage, &mut guest, index, Attrs::READ_WRITE)?;
    let station = stage.station(index)?;
    let endpoint = guest.probe(station)?;
    guest.reaches(station, AT, old, BURST)?;
    stage.picture(&mut guest, "The first table");
    guest.forget();
    // ATTACH_TABLE to another domain, without a DETACH.
    let mut second = Bound::unattached(&mut guest, &endpoint)?;
    let new = guest.page()?;
    second.map(&mut guest, AT, new, PAGE, Attrs::READ_WRITE)?;
    second.attach(&mut guest)?;
    let station = stage.station(index)?;
    guest.reaches(station, AT, new, BURST)?;
    stage.picture(&mut guest, "The second table, in its place");
    drop(first);
    second.end(&mut guest)
}

/// Hardware keeps translations by tag: a new table that has the tag of an old one must not find them.
pub(super) fn rebind_same_tag<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let (first, old) = one_page(stage, &mut guest, index, Attrs::READ_WRITE)?;
    let station = stage.station(index)?;
    let endpoint = guest.probe(station)?;
    let Some(tag) = first.space.tag() else {
        return Err(skip("this architecture's tables have no tag"));
    };
    guest.reaches(station, AT, old, BURST)?;
    first.end(&mut guest)?;
    let mut second = Bound::unattached(&mut guest, &endpoint)?;
    ensure!(second.space.tag() == Some(tag), "the guest did not use tag {tag} again");
    let new = guest.page()?;
    ensure!(new != old, "the guest used the page again");
    second.map(&mut guest, AT, new, PAGE, Attrs::READ_WRITE)?;
    second.attach(&mut guest)?;
    guest.reaches(station, AT, new, BURST)?;
    second.end(&mut guest)
}

pub(super) fn map_unmap<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let station = stage.station(index)?;
    let endpoint = guest.driver.probe(station.endpoint())?;
    let mut domain = MappedDomain::new(&mut guest.driver)?;
    domain.attach(&mut guest.driver, &endpoint)?;
    let pages = [guest.page()?, guest.page()?];
    for (place, &target) in (0u64..).zip(&pages) {
        let range = span(Iova(AT.0 + place * PAGE), PAGE)?;
        let flags = MapFlags::READ | MapFlags::WRITE;
        domain.map(&mut guest.driver, Mapping { range, target, flags })?;
        let mapping = picture::Mapping { range, output: target, write: true, stale: false };
        guest.seen.mappings.push(mapping);
    }
    let [first, second] = pages;
    let next = Iova(AT.0 + PAGE);
    guest.reaches(station, AT, first, BURST)?;
    guest.reaches(station, next, second, BURST)?;
    if station.reads() {
        guest.fetches(station, AT, first, (next, second), PAGE_BYTES)?;
    }
    domain.unmap(&mut guest.driver, span(AT, PAGE)?)?;
    guest.seen.mappings.remove(0);
    guest.blocked(station, AT, first, WORD)?;
    guest.reaches(station, next, second, BURST)?;
    stage.picture(&mut guest, "By MAP and UNMAP requests: the first page unmapped");
    let station = stage.station(index)?;
    domain.detach(&mut guest.driver, endpoint.id())?;
    guest.blocked(station, next, second, WORD)
}

pub(super) fn map_read_only<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let station = stage.station(index)?;
    let endpoint = guest.driver.probe(station.endpoint())?;
    let mut domain = MappedDomain::new(&mut guest.driver)?;
    domain.attach(&mut guest.driver, &endpoint)?;
    let target = guest.page()?;
    let page = span(AT, PAGE)?;
    domain.map(&mut guest.driver, Mapping { range: page, target, flags: MapFlags::READ })?;
    guest.blocked(station, AT, target, WORD)?;
    let reads = needs_read(stage, index).is_ok();
    let station = stage.station(index)?;
    if reads {
        let sink = (Iova(AT.0 + PAGE), guest.page()?);
        let flags = MapFlags::READ | MapFlags::WRITE;
        let mapping = Mapping { range: span(sink.0, PAGE)?, target: sink.1, flags };
        domain.map(&mut guest.driver, mapping)?;
        guest.fetches(station, AT, target, sink, PAGE_BYTES)?;
    }
    Ok(domain.detach(&mut guest.driver, endpoint.id())?)
}

pub(super) fn between<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let (mut bound, page) = one_page(stage, &mut guest, index, Attrs::READ_WRITE)?;
    let station = stage.station(index)?;
    let endpoint = guest.probe(station)?;
    guest.reaches(station, AT, page, BURST)?;

    if bound.pasids.descriptor().is_none() {
        // Where each PASID is bound by itself, the guest has to know that this one is not any more.
        bound.pasids.detach(&mut guest.driver)?;
    }
    let bypass = BypassDomain::new(&mut guest.driver)?;
    bypass.attach(&mut guest.driver, &endpoint)?;
    guest.reaches(station, Iova(page.0), page, BURST)?;
    guest.blocked(station, AT, page, WORD)?;

    let mut mapped = MappedDomain::new(&mut guest.driver)?;
    mapped.attach(&mut guest.driver, &endpoint)?;
    let target = guest.page()?;
    let flags = MapFlags::READ | MapFlags::WRITE;
    mapped.map(&mut guest.driver, Mapping { range: span(AT, PAGE)?, target, flags })?;
    guest.reaches(station, AT, target, BURST)?;
    not_at(guest.dma_write(station, Iova(page.0), page, WORD)?.0, page)?;

    bound.attach(&mut guest)?;
    guest.reaches(station, AT, page, BURST)?;
    not_at(guest.dma_write(station, Iova(target.0), target, WORD)?.0, target)?;
    bound.end(&mut guest)
}

fn not_at(arrival: Arrival, page: Gpa) -> anyhow::Result<()> {
    ensure!(
        arrival == Arrival::Nothing,
        "bypass was left, and the device still reaches {page} by its own address"
    );
    Ok(())
}
