//! Two devices at once.

use anyhow::Context as _;
use pgtable_formats::format::Attrs;
use pgtable_formats::{Gpa, Iova};
use viommu_guest::tables::{AddressSpace, PasidTable, SpaceOptions, TableError, TableOptions};
use viommu_wire::{AccessFlags, Caches, Invalidate, InvalidateScope};

use super::faults::{expect_fault, quiet, told};
use crate::hil::bench::Bench;
use crate::hil::check::{Stage, skip};
use crate::hil::guest::{AT, Arrival, BURST, Bound, Guest, PAGE, WORD, attach, domain, range};
use crate::hil::picture;

/// One address space that two devices use, in one domain.
struct Shared {
    tables: [PasidTable; 2],
    space: AddressSpace,
}

impl Shared {
    fn new<B: Bench>(
        stage: &mut Stage<'_, B>,
        guest: &mut Guest<B::Kernel>,
        devices: [usize; 2],
    ) -> anyhow::Result<Self> {
        let domain = domain(guest)?;
        let first = guest.probe(stage.station(devices[0])?)?;
        let second = guest.probe(stage.station(devices[1])?)?;
        let mut space = AddressSpace::new(&mut guest.driver, &first, SpaceOptions::default())?;
        let mut table = |endpoint| -> anyhow::Result<PasidTable> {
            let mut table = PasidTable::new(&mut guest.driver, endpoint, domain, TableOptions::default())?;
            table.bind_at(&mut guest.driver, None, &mut space).map_err(|error| match error {
                TableError::Mismatch(_) => skip("the two devices are behind hardware that differs"),
                error => error.into(),
            })?;
            table.attach(&mut guest.driver).context("ATTACH_TABLE")?;
            Ok(table)
        };
        let tables = [table(&first)?, table(&second)?];
        Ok(Self { tables, space })
    }

    fn map<B: Bench>(&mut self, guest: &mut Guest<B::Kernel>, iova: Iova, output: Gpa) -> anyhow::Result<()> {
        let range = range(iova, PAGE)?;
        self.space.map(&mut guest.driver, range, output, Attrs::READ_WRITE)?;
        guest.seen.mappings.push(picture::Mapping { range, output, write: true, stale: false });
        Ok(())
    }

    fn end<B: Bench>(mut self, guest: &mut Guest<B::Kernel>) -> anyhow::Result<()> {
        for mut table in self.tables {
            table.detach(&mut guest.driver)?;
            table.unbind(&mut guest.driver, None, &mut self.space)?;
            table.release(&mut guest.driver).map_err(|(_, error)| error)?;
        }
        self.space.release(&mut guest.driver).map_err(|(_, error)| error)?;
        Ok(())
    }
}

pub(super) fn one_domain<B: Bench>(stage: &mut Stage<'_, B>, a: usize, b: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let mut shared = Shared::new(stage, &mut guest, [a, b])?;
    let page = guest.page()?;
    shared.map::<B>(&mut guest, AT, page)?;
    for _ in 0..2 {
        for index in [a, b] {
            guest.reaches(stage.station(index)?, AT, page, BURST)?;
        }
    }
    stage.picture(&mut guest, "One page table, two devices");
    shared.end::<B>(&mut guest)
}

pub(super) fn two_tables<B: Bench>(stage: &mut Stage<'_, B>, a: usize, b: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let mut bounds = Vec::new();
    for index in [a, b] {
        let endpoint = guest.probe(stage.station(index)?)?;
        let mut bound = Bound::new(&mut guest, &endpoint)?;
        let page = guest.page()?;
        // The same address, and one that only this device has.
        bound.map(&mut guest, AT, page, PAGE, Attrs::READ_WRITE)?;
        bounds.push((index, bound, page));
    }
    for _ in 0..2 {
        for (index, _, page) in &bounds {
            guest.reaches(stage.station(*index)?, AT, *page, BURST)?;
        }
    }
    quiet(&mut guest)?;
    for (place, (index, _, page)) in (1u64..).zip(&bounds) {
        let station = stage.station(*index)?;
        let nowhere = Iova(AT.0 + place * 0x10_0000);
        guest.blocked(station, nowhere, *page, WORD)?;
        let events = expect_fault(&mut guest, station.endpoint(), nowhere, AccessFlags::WRITE);
        told(stage, &mut guest, *index, events)?;
    }
    for (_, bound, _) in bounds {
        bound.end(&mut guest)?;
    }
    Ok(())
}

pub(super) fn invalidate<B: Bench>(stage: &mut Stage<'_, B>, a: usize, b: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let mut shared = Shared::new(stage, &mut guest, [a, b])?;
    let old = guest.page()?;
    shared.map::<B>(&mut guest, AT, old)?;
    for index in [a, b] {
        guest.reaches(stage.station(index)?, AT, old, BURST)?;
    }
    shared.space.unmap_unsynchronized(&mut guest.driver, range(AT, PAGE)?)?;
    guest.seen.mappings.clear();
    let new = guest.page()?;
    shared.map::<B>(&mut guest, AT, new)?;
    let mut stale = 0;
    for index in [a, b] {
        let (arrival, _) = guest.dma_write(stage.station(index)?, AT, old, WORD)?;
        stale += u32::from(arrival == Arrival::Arrived);
    }
    guest.seen.accesses.clear();
    let domain = shared.tables[0].domain();
    let scope = InvalidateScope::Domain;
    let all = Invalidate { domain, scope, caches: Caches::TLB, leaf: false, tag: None, global: false };
    guest.driver.invalidate(all)?;
    for index in [a, b] {
        guest.reaches(stage.station(index)?, AT, new, BURST)?;
    }
    stage.note(format!("stale before INVALIDATE: {stale} of 2 devices; after it: none"));
    shared.end::<B>(&mut guest)
}

pub(super) fn detach_one<B: Bench>(stage: &mut Stage<'_, B>, a: usize, b: usize) -> anyhow::Result<()> {
    let mut guest = stage.guest()?;
    let mut shared = Shared::new(stage, &mut guest, [a, b])?;
    let page = guest.page()?;
    shared.map::<B>(&mut guest, AT, page)?;
    for index in [a, b] {
        guest.reaches(stage.station(index)?, AT, page, BURST)?;
    }
    shared.tables[0].detach(&mut guest.driver)?;
    guest.blocked(stage.station(a)?, AT, page, WORD)?;
    guest.reaches(stage.station(b)?, AT, page, BURST)?;
    attach(&mut guest, &mut shared.tables[0], &mut shared.space, true)?;
    guest.reaches(stage.station(a)?, AT, page, BURST)?;
    shared.end::<B>(&mut guest)
}
