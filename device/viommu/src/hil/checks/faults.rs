//! Accesses that are refused, and what the guest hears of them.

use anyhow::ensure;
use pgtable_formats::Iova;
use pgtable_formats::format::Attrs;
use viommu_guest::Hardware;
use viommu_host_iommufd::kernel::Iommufd;
use viommu_wire::{AccessFlags, EndpointId, FaultEvent, FaultReason};

use super::translate::one_page;
use crate::hil::bench::{Bench, Station};
use crate::hil::check::{Stage, skip};
use crate::hil::guest::{AT, Arrival, BURST, Bound, GLANCE, Guest, PAGE, PATIENCE, WORD};

/// Far from everything that is mapped.
const NOWHERE: Iova = Iova(AT.0 + 0x40_0000);

pub(super) fn unmapped<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let (bound, page) = one_page(stage, &mut guest, index, Attrs::READ_WRITE)?;
    let station = stage.station(index)?;
    quiet(&mut guest)?;
    guest.blocked(station, NOWHERE, page, WORD)?;
    let endpoint = station.endpoint();
    let events = expect_fault(&mut guest, endpoint, NOWHERE, AccessFlags::WRITE);
    let events = told(stage, &mut guest, index, events)?;
    stage.note(format!("{events} events for an access of {WORD} bytes"));
    stage.picture(&mut guest, "An access without a mapping");
    bound.end(&mut guest)
}

pub(super) fn read_only<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let (bound, page) = one_page(stage, &mut guest, index, Attrs::READ)?;
    let station = stage.station(index)?;
    quiet(&mut guest)?;
    guest.blocked(station, Iova(AT.0 + 0x40), page, WORD)?;
    let endpoint = station.endpoint();
    let events = expect_fault(&mut guest, endpoint, Iova(AT.0 + 0x40), AccessFlags::WRITE);
    told(stage, &mut guest, index, events)?;
    stage.picture(&mut guest, "A write to a read-only page");
    bound.end(&mut guest)
}

pub(super) fn recovery<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let (mut bound, page) = one_page(stage, &mut guest, index, Attrs::READ_WRITE)?;
    let station = stage.station(index)?;
    guest.blocked(station, NOWHERE, page, WORD)?;
    guest.reaches(station, AT, page, BURST)?;
    // What faulted is mapped now, and nothing of the fault was kept.
    let second = guest.page()?;
    bound.map(&mut guest, NOWHERE, second, PAGE, Attrs::READ_WRITE)?;
    guest.reaches(station, NOWHERE, second, BURST)?;
    stage.picture(&mut guest, "The same address, refused first and mapped then");
    bound.end(&mut guest)
}

pub(super) fn privileged<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let station = stage.station(index)?;
    if heeds_privilege(&mut guest, station)? {
        let events = expect_fault(&mut guest, station.endpoint(), AT, AccessFlags::WRITE);
        told(stage, &mut guest, index, events)?;
        return Ok(());
    }
    Err(skip("not shown: this hardware takes every access for a privileged one (as QEMU does)"))
}

/// Whether the hardware keeps unprivileged accesses, which those of devices are, from pages that only privileged ones may
/// use. QEMU's SMMUv3 does not know the difference.
pub(super) fn heeds_privilege<K: Iommufd>(
    guest: &mut Guest<K>,
    station: &mut Station,
) -> anyhow::Result<bool> {
    let endpoint = guest.probe(station)?;
    let mut bound = Bound::new(guest, &endpoint)?;
    let page = guest.page()?;
    bound.map(guest, AT, page, PAGE, Attrs { user: false, ..Attrs::READ_WRITE })?;
    let (arrival, _) = guest.dma_write(station, AT, page, WORD)?;
    bound.end(guest)?;
    Ok(arrival == Arrival::Nothing)
}

/// No event waits.
pub(super) fn quiet<K: Iommufd>(guest: &mut Guest<K>) -> anyhow::Result<()> {
    let waiting = guest.faults(GLANCE)?;
    ensure!(waiting.is_empty(), "events before anything happened: {waiting:?}");
    Ok(())
}

/// All events tell of this access, and there is at least one. How many.
pub(super) fn expect_fault<K: Iommufd>(
    guest: &mut Guest<K>,
    endpoint: EndpointId,
    address: Iova,
    access: AccessFlags,
) -> anyhow::Result<usize> {
    let events = guest.faults(PATIENCE)?;
    for event in &events {
        let FaultEvent { reason, endpoint: whose, pasid, .. } = *event;
        ensure!(whose == endpoint, "the event names endpoint {whose}, and it was {endpoint}: {event:?}");
        ensure!(reason == FaultReason::Mapping, "the event does not say MAPPING: {event:?}");
        ensure!(pasid.is_none(), "the event has a PASID, and the access had none: {event:?}");
        ensure!(event.access.contains(access), "the event does not say {access:?}: {event:?}");
        ensure!(event.address == Some(address), "the event does not say {address}: {event:?}");
    }
    ensure!(!events.is_empty() || guest.lost_events() == 0, "the kernel lost the event");
    Ok(events.len())
}

/// On VT-d, Linux tells nobody of faults that cannot be recovered from.
pub(super) fn told<B: Bench>(
    stage: &mut Stage<'_, B>,
    guest: &mut Guest<B::Kernel>,
    index: usize,
    events: anyhow::Result<usize>,
) -> anyhow::Result<usize> {
    let events = events?;
    let endpoint = guest.probe(stage.station(index)?)?;
    match endpoint.properties().hardware {
        _ if events > 0 => Ok(events),
        Some(Hardware::Vtd(_)) => {
            Err(skip("the access was refused; for VT-d the kernel tells no user of such faults"))
        }
        _ => anyhow::bail!("the access was refused, and no event told of it in {PATIENCE:?}"),
    }
}
