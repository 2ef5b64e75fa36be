//! Stale translations, and the requests that end them.

use anyhow::ensure;
use pgtable_formats::format::Attrs;
use pgtable_formats::{Gpa, Iova};
use viommu_guest::tables::{AddressSpace, SpaceOptions};
use viommu_host_iommufd::kernel::Iommufd;
use viommu_wire::{Caches, Invalidate, InvalidateScope};

use super::translate::one_page;
use crate::hil::bench::{Bench, Station};
use crate::hil::check::{Stage, skip};
use crate::hil::guest::{AT, Arrival, BURST, Bound, Guest, PAGE, WORD, range as span};
use crate::hil::picture;

/// How a check ends old translations.
type End<K> = fn(&mut Guest<K>, &mut Bound, u64) -> anyhow::Result<()>;

pub(super) fn stale<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let (mut bound, old) = one_page(stage, &mut guest, index, Attrs::READ_WRITE)?;
    let station = stage.station(index)?;
    guest.reaches(station, AT, old, BURST)?;
    guest.seen.accesses.clear();
    bound.unmap_silently(&mut guest, AT, PAGE)?;
    let (arrival, _) = guest.dma_write(station, AT, old, WORD)?;
    guest.last_was_stale();
    gone(&mut guest, AT, old)?;
    stage.picture(&mut guest, "Taken out of the table, and the hardware was not told");
    bound.space.synchronize(&mut guest.driver)?;
    let station = stage.station(index)?;
    guest.blocked(station, AT, old, WORD)?;
    guest.seen.mappings.clear();
    stage.picture(&mut guest, "After INVALIDATE");
    bound.end(&mut guest)?;
    match arrival {
        Arrival::Arrived => Ok(()),
        _ => Err(skip("not shown: the hardware did not keep the translation until INVALIDATE, as it may")),
    }
}

pub(super) fn address<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    remapped(stage, index, 1, |guest, bound, _| Ok(bound.space.synchronize(&mut guest.driver)?))
}

pub(super) fn range<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    remapped(stage, index, 8, |guest, bound, _| Ok(bound.space.synchronize(&mut guest.driver)?))
}

pub(super) fn pasid<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    remapped(stage, index, 4, |guest, bound, _| {
        let tag = bound.space.tag().map(u64::from);
        send(guest, bound, InvalidateScope::Pasid(None), Caches::TLB, tag)
    })
}

pub(super) fn domain<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    remapped(stage, index, 4, |guest, bound, _| {
        send(guest, bound, InvalidateScope::Domain, Caches::TLB, None)
    })
}

/// Untagged DMA gets another page table, in the entry of the same PASID table.
pub(super) fn pasid_cache<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let (mut bound, old) = one_page(stage, &mut guest, index, Attrs::READ_WRITE)?;
    let station = stage.station(index)?;
    guest.reaches(station, AT, old, BURST)?;
    let endpoint = guest.probe(station)?;
    let mut other = AddressSpace::new(&mut guest.driver, &endpoint, SpaceOptions::default())?;
    let new = guest.page()?;
    other.map(&mut guest.driver, span(AT, PAGE)?, new, Attrs::READ_WRITE)?;
    // Both of these invalidate the PASID cache.
    bound.pasids.unbind(&mut guest.driver, None, &mut bound.space)?;
    guest.blocked(station, AT, old, WORD)?;
    bound.pasids.bind_at(&mut guest.driver, None, &mut other)?;
    guest.seen.mappings.clear();
    let range = span(AT, PAGE)?;
    guest.seen.mappings.push(picture::Mapping { range, output: new, write: true, stale: false });
    guest.reaches(station, AT, new, BURST)?;
    guest.blocked_at(station, old)?;
    stage.picture(&mut guest, "Another page table for the same PASID");
    let old_space = std::mem::replace(&mut bound.space, other);
    old_space.release(&mut guest.driver).map_err(|(_, error)| error)?;
    bound.end(&mut guest)
}

pub(super) fn unmap<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let (mut bound, page) = one_page(stage, &mut guest, index, Attrs::READ_WRITE)?;
    let neighbour = guest.page()?;
    let next = Iova(AT.0 + PAGE);
    bound.map(&mut guest, next, neighbour, PAGE, Attrs::READ_WRITE)?;
    let station = stage.station(index)?;
    guest.reaches(station, AT, page, BURST)?;
    guest.reaches(station, next, neighbour, BURST)?;
    bound.unmap(&mut guest, AT, PAGE)?;
    guest.blocked(station, AT, page, WORD)?;
    guest.reaches(station, next, neighbour, BURST)?;
    stage.picture(&mut guest, "One page unmapped, its neighbour not");
    bound.end(&mut guest)
}

/// Maps pages, lets the device use them, maps others at their addresses, and ends the old translations by `end`: the
/// device must reach the new pages then.
fn remapped<B: Bench>(
    stage: &mut Stage<'_, B>,
    index: usize,
    pages: u64,
    end: End<B::Kernel>,
) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let station = stage.station(index)?;
    let endpoint = guest.probe(station)?;
    let mut bound = Bound::new(&mut guest, &endpoint)?;
    let pages = if station.is_slow() { pages.min(2) } else { pages };
    let at = |page: u64| Iova(AT.0 + page * PAGE);
    let old = (0..pages).map(|_| guest.page()).collect::<anyhow::Result<Vec<Gpa>>>()?;
    for (page, &output) in (0..).zip(&old) {
        bound.map(&mut guest, at(page), output, PAGE, Attrs::READ_WRITE)?;
    }
    for (page, &output) in (0..).zip(&old) {
        guest.reaches(station, at(page), output, BURST)?;
    }
    bound.unmap_silently(&mut guest, AT, pages * PAGE)?;
    let new = (0..pages).map(|_| guest.page()).collect::<anyhow::Result<Vec<Gpa>>>()?;
    for (page, &output) in (0..).zip(&new) {
        bound.map(&mut guest, at(page), output, PAGE, Attrs::READ_WRITE)?;
    }
    guest.seen.accesses.clear();
    // Which of them the hardware shows is its own business.
    let mut stale = 0;
    for (page, &output) in (0..).zip(&old) {
        let (arrival, _) = guest.dma_write(station, at(page), output, WORD)?;
        guest.last_was_stale();
        stale += u64::from(arrival == Arrival::Arrived);
    }
    // What did not show went to the new page: no fault.
    for access in &mut guest.seen.accesses {
        if access.end == picture::End::Faulted
            && let Some(mapping) =
                guest.seen.mappings.iter().find(|mapping| mapping.range.contains(access.address))
        {
            access.end = picture::End::Reached(mapping.output);
        }
    }
    let before = guest.snapshot("Other pages in the table, before INVALIDATE");
    let sent = *guest.driver.counters();
    end(&mut guest, &mut bound, pages)?;
    let sent = guest.driver.counters().since(&sent).requests;
    for (page, (&old, &new)) in (0..).zip(old.iter().zip(&new)) {
        let shown =
            if stale > 0 { "the stale translation is still in use" } else { "the device went elsewhere" };
        guest
            .reaches(station, at(page), new, BURST)
            .map_err(|error| error.context(format!("after INVALIDATE {shown} (it led to {old})")))?;
    }
    ensure!(sent == 1, "it took {sent} requests");
    stage.pictures.push(before);
    stage.picture(&mut guest, "After INVALIDATE");
    stage.note(format!("stale before INVALIDATE: {stale} of {pages} pages; after it: none"));
    bound.end(&mut guest)
}

fn send<K: Iommufd>(
    guest: &mut Guest<K>,
    bound: &Bound,
    scope: InvalidateScope,
    caches: Caches,
    tag: Option<u64>,
) -> anyhow::Result<()> {
    let domain = bound.pasids.domain();
    let invalidate = Invalidate { domain, scope, caches, leaf: false, tag, global: false };
    Ok(guest.driver.invalidate(invalidate)?)
}

/// Notes in the picture that a mapping was taken away.
fn gone<K: Iommufd>(guest: &mut Guest<K>, iova: Iova, output: Gpa) -> anyhow::Result<()> {
    let range = span(iova, PAGE)?;
    guest.seen.mappings.push(picture::Mapping { range, output, write: true, stale: true });
    Ok(())
}

impl<K: Iommufd> Guest<K> {
    /// The device, at [`AT`], does not get to `old`.
    fn blocked_at(&mut self, station: &mut Station, old: Gpa) -> anyhow::Result<()> {
        let (arrival, _) = self.dma_write(station, AT, old, WORD)?;
        self.seen.accesses.pop();
        ensure!(arrival == Arrival::Nothing, "a DMA write to {AT} still changes {old}, of the table before");
        Ok(())
    }
}
