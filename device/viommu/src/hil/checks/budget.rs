//! What requests cost.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::ensure;
use pgtable_formats::format::Attrs;
use pgtable_formats::{Gpa, Iova};
use viommu_guest::{MappedDomain, Mapping};
use viommu_wire::{Caches, Invalidate, InvalidateScope, MapFlags};

use super::translate::one_page;
use crate::hil::bench::Bench;
use crate::hil::check::Stage;
use crate::hil::guest::{AT, BURST, Bound, Guest, PAGE, range};
use crate::hil::outcome::{Comparison, Row};

/// Most ioctls for an INVALIDATE.
const PER_INVALIDATE: u64 = 2;

pub(super) fn ioctls<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let endpoint = guest.probe(stage.station(index)?)?;
    let mut bound = Bound::unattached(&mut guest, &endpoint)?;
    let page = guest.page()?;
    bound.map(&mut guest, AT, page, PAGE, Attrs::READ_WRITE)?;
    let ((), attach) = stage.ioctls(|_| bound.attach(&mut guest))?;
    let allocs = count(&attach, "hwpt");
    ensure!(allocs == 1, "an ATTACH_TABLE took {allocs} HWPT_ALLOC: {attach:?}");
    stage.note(format!("ATTACH_TABLE: {}", list(&attach)));

    let tag = bound.space.tag().map(u64::from);
    let domain = bound.pasids.domain();
    let span =
        |length| range(AT, length).map(|range| InvalidateScope::Address { pasid: None, range, page_lg2: 12 });
    for (what, scope, caches) in [
        ("one page", span(PAGE)?, Caches::TLB),
        ("64 KiB", span(16 * PAGE)?, Caches::TLB),
        ("4 MiB and a page", span((4 << 20) + PAGE)?, Caches::TLB),
        ("64 GiB", span(64 << 30)?, Caches::TLB),
        ("a PASID", InvalidateScope::Pasid(None), Caches::TLB),
        ("a PASID, its entry too", InvalidateScope::Pasid(None), Caches::all()),
        ("a domain", InvalidateScope::Domain, Caches::TLB),
        ("a domain, entries too", InvalidateScope::Domain, Caches::all()),
    ] {
        let tag = if scope == InvalidateScope::Domain { None } else { tag };
        let invalidate = Invalidate { domain, scope, caches, leaf: false, tag, global: false };
        let (done, calls) = stage.ioctls(|_| Ok(guest.driver.invalidate(invalidate)))?;
        let total: u64 = calls.values().sum();
        stage.note(format!("INVALIDATE of {what}: {}", list(&calls)));
        done?;
        ensure!(total <= PER_INVALIDATE, "an INVALIDATE of {what} took {total} ioctls: {calls:?}");
        ensure!(total > 0, "an INVALIDATE of {what} took no ioctl");
    }
    let station = stage.station(index)?;
    guest.reaches(station, AT, page, BURST)?;
    bound.end(&mut guest)
}

fn count(calls: &BTreeMap<&'static str, u64>, what: &str) -> u64 {
    let of =
        |name: &str| name.to_ascii_lowercase().contains(what) && name.to_ascii_lowercase().contains("alloc");
    calls.iter().filter(|(name, _)| of(name)).map(|(_, count)| count).sum()
}

fn list(calls: &BTreeMap<&'static str, u64>) -> String {
    if calls.is_empty() {
        return "no ioctl".to_owned();
    }
    let calls: Vec<String> = calls.iter().map(|(name, count)| format!("{count} {name}")).collect();
    calls.join(", ")
}

/// The same work, by requests and by the guest's own table.
pub(super) fn compare<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    // A transfer shows how fast the device is, and that tables work.
    let (bound, page) = one_page(stage, &mut guest, index, Attrs::READ_WRITE)?;
    guest.reaches(stage.station(index)?, AT, page, BURST)?;
    bound.end(&mut guest)?;
    let station = stage.station(index)?;
    let buffers: u32 = if station.is_slow() { 3 } else { 256 };
    let mut rows = Vec::new();
    for size_lg2 in [12, 16] {
        let memory = guest.block(size_lg2)?;
        rows.push(by_requests(stage, &mut guest, index, memory, size_lg2, buffers)?);
        rows.push(by_table(stage, &mut guest, index, memory, size_lg2, buffers)?);
    }
    for pair in rows.chunks(2) {
        if let [requests, table] = pair {
            stage.note(format!(
                "buffers of {}: {} requests and {} ioctls by MAP/UNMAP, {} and {} by handover",
                crate::hil::outcome::size(requests.buffer),
                requests.requests,
                requests.ioctls,
                table.requests,
                table.ioctls
            ));
        }
    }
    let subject = stage.bench.name(index);
    stage.comparisons.push(Comparison { subject, rows });
    Ok(())
}

fn by_requests<B: Bench>(
    stage: &mut Stage<'_, B>,
    guest: &mut Guest<B::Kernel>,
    index: usize,
    target: Gpa,
    size_lg2: u8,
    buffers: u32,
) -> anyhow::Result<Row> {
    let endpoint = guest.driver.probe(stage.station(index)?.endpoint())?;
    let mut domain = MappedDomain::new(&mut guest.driver)?;
    domain.attach(&mut guest.driver, &endpoint)?;
    let flags = MapFlags::READ | MapFlags::WRITE;
    let neighbour = Mapping { range: range(Iova(NEIGHBOUR), PAGE)?, target, flags };
    domain.map(&mut guest.driver, neighbour)?;
    let row =
        measure(stage, guest, index, "MAP and UNMAP", (target, size_lg2, buffers), |guest, iova, map| {
            let range = range(iova, 1 << size_lg2)?;
            if map {
                domain.map(&mut guest.driver, Mapping { range, target, flags })?;
            } else {
                domain.unmap(&mut guest.driver, range)?;
            }
            Ok(())
        })?;
    domain.unmap(&mut guest.driver, neighbour.range)?;
    domain.detach(&mut guest.driver, endpoint.id())?;
    Ok(row)
}

fn by_table<B: Bench>(
    stage: &mut Stage<'_, B>,
    guest: &mut Guest<B::Kernel>,
    index: usize,
    target: Gpa,
    size_lg2: u8,
    buffers: u32,
) -> anyhow::Result<Row> {
    let endpoint = guest.probe(stage.station(index)?)?;
    let mut bound = Bound::new(guest, &endpoint)?;
    let neighbour = range(Iova(NEIGHBOUR), PAGE)?;
    bound.space.map(&mut guest.driver, neighbour, target, Attrs::READ_WRITE)?;
    let row = measure(stage, guest, index, "handover", (target, size_lg2, buffers), |guest, iova, map| {
        let range = range(iova, 1 << size_lg2)?;
        if map {
            bound.space.map(&mut guest.driver, range, target, Attrs::READ_WRITE)?;
        } else {
            bound.space.unmap(&mut guest.driver, range)?;
        }
        Ok(())
    })?;
    bound.end(guest)?;
    Ok(row)
}

/// Addresses that buffers take in turn, as those that an allocator gives out again.
const PLACES: u64 = 16;

/// A page that stays mapped beside the buffers, as a process has others: the tables that lead to it stay.
const NEIGHBOUR: u64 = AT.0 + (PLACES << 16);

/// Maps a buffer, lets the device write to its end, unmaps it; so many times.
fn measure<B: Bench>(
    stage: &mut Stage<'_, B>,
    guest: &mut Guest<B::Kernel>,
    index: usize,
    way: &'static str,
    (target, size_lg2, buffers): (Gpa, u8, u32),
    mut change: impl FnMut(&mut Guest<B::Kernel>, Iova, bool) -> anyhow::Result<()>,
) -> anyhow::Result<Row> {
    let buffer = 1u64 << size_lg2;
    let (mut mapping, mut dma) = (Duration::ZERO, Duration::ZERO);
    let sent = *guest.driver.counters();
    let ((), calls) = stage.ioctls(|stage| {
        let station = stage.station(index)?;
        for number in 0..u64::from(buffers) {
            let iova = Iova(AT.0 + (number % PLACES) * buffer);
            let start = Instant::now();
            change(guest, iova, true)?;
            mapping += start.elapsed();

            let start = Instant::now();
            guest.reaches(
                station,
                Iova(iova.0 + buffer - BURST as u64),
                Gpa(target.0 + buffer - BURST as u64),
                BURST,
            )?;
            dma += start.elapsed();
            guest.seen.accesses.clear();

            let start = Instant::now();
            change(guest, iova, false)?;
            mapping += start.elapsed();
        }
        Ok(())
    })?;
    let requests = guest.driver.counters().since(&sent).requests;
    Ok(Row { way, buffer, buffers, requests, ioctls: calls.values().sum(), mapping, dma })
}
