//! Scene 8: the same work in three ways, and what each of them sends.

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};
use pgtable_formats::format::Attrs;
use pgtable_formats::{Access, Gpa, Pasid};
use viommu_guest::tables::{AddressSpace, PasidTable, SpaceOptions};
use viommu_guest::{DomainError, Endpoint, MappedDomain, Mapping};
use viommu_wire::{Iova, IovaRange, MapFlags, RequestType};

use super::engine::Engine;
use super::facts::{Comparison, PerBuffer, Way as WayFacts};
use super::guest::{Guest, PAGE, PAGE_LEN, PAGE_LG2, amount, same};
use super::machine::{COMPARED, Machine};
use super::share::Shared;

/// Bytes of a buffer.
const BUFFER: u64 = PAGE;
/// Buffers that a driver has in use at a time, where it does not take them one by one.
const BATCH: usize = 64;
/// The address of the first buffer, as the device sees it. The others follow.
const FIRST: Iova = Iova(0x10_0000_0000);

/// One buffer.
#[derive(Clone, Copy)]
struct Buffer {
    /// What the device is told.
    range: IovaRange,
    /// Where it lies.
    memory: Gpa,
}

/// A way to let a device use buffers for a while.
trait Way: Sized {
    const NAME: &'static str;
    /// The buffers are the device's only while they are mapped.
    const CLOSES: bool = true;

    /// What is done once, before the first buffer.
    fn begin(guest: &mut Guest, endpoint: &Endpoint, buffers: &[Buffer]) -> anyhow::Result<Self>;

    /// Whom the device has to say it works for.
    fn pasid(&self) -> Option<Pasid> {
        None
    }

    /// Lets the device use these buffers.
    fn map(&mut self, guest: &mut Guest, batch: &[Buffer]) -> anyhow::Result<()>;

    /// Takes them back: their memory may be used for something else afterwards.
    fn unmap(&mut self, guest: &mut Guest, batch: &[Buffer]) -> anyhow::Result<()>;

    /// What is done once, after the last buffer.
    fn end(self, guest: &mut Guest) -> anyhow::Result<()>;

    /// The requests that `batches` batches of `buffers` buffers in all need, by kind; and how many kicks.
    fn needs(buffers: u64, batches: u64) -> (Vec<(RequestType, u64)>, u64);
}

/// Compares the ways, with `count` buffers each.
pub(super) fn compare(machine: &Machine, guest: &mut Guest, count: u32) -> anyhow::Result<Comparison> {
    let endpoint = guest.driver.probe(COMPARED)?;
    let engine = Engine::new(machine, COMPARED);
    let buffers = scattered(guest, count)?;
    let ways = vec![
        run::<ByRequests>(guest, &engine, &endpoint, &buffers, 1)?,
        run::<ByTable>(guest, &engine, &endpoint, &buffers, 1)?,
        run::<ByRequests>(guest, &engine, &endpoint, &buffers, BATCH)?,
        run::<ByTable>(guest, &engine, &endpoint, &buffers, BATCH)?,
        run::<Bound>(guest, &engine, &endpoint, &buffers, buffers.len())?,
    ];
    same("mappings left in the device", machine.lock().device().mapping_count(), 0)?;
    same("events", guest.faults()?, Vec::new())?;
    Ok(Comparison { endpoint: COMPARED.0, buffers: count.into(), buffer_bytes: BUFFER, ways })
}

/// Buffers whose addresses follow each other for the device, and of which no two that do are neighbours in memory: so
/// each needs a mapping of its own.
fn scattered(guest: &mut Guest, count: u32) -> anyhow::Result<Vec<Buffer>> {
    let places = (u64::from(count).next_power_of_two() * 2).max(8);
    // Odd, so that it reaches each place of a power of two once; and neither 1 nor -1.
    let stride = places / 4 + 1;
    let size_lg2 = PAGE_LG2 + u8::try_from(places.trailing_zeros())?;
    let block = guest.block(size_lg2)?;
    let buffers = (0..u64::from(count)).map(|index| {
        let memory = Gpa(block.0 + index * stride % places * BUFFER);
        let range =
            IovaRange::from_length(Iova(FIRST.0 + index * BUFFER), BUFFER).context("an empty buffer")?;
        Ok(Buffer { range, memory })
    });
    let buffers: Vec<Buffer> = buffers.collect::<anyhow::Result<_>>()?;
    let neighbours = |pair: &[Buffer]| matches!(pair, [a, b] if a.memory.0.abs_diff(b.memory.0) == BUFFER);
    ensure!(!buffers.windows(2).any(neighbours), "two buffers are neighbours in memory");
    Ok(buffers)
}

fn run<W: Way>(
    guest: &mut Guest,
    engine: &Engine,
    endpoint: &Endpoint,
    buffers: &[Buffer],
    batch: usize,
) -> anyhow::Result<WayFacts> {
    for buffer in buffers {
        guest.write(buffer.memory, &[0; PAGE_LEN])?;
    }
    let (mut way, before) = guest.measure(|guest| W::begin(guest, endpoint, buffers))?;
    let (mut moved, mut closed) = (0, 0);
    let ((), sent) = guest.measure(|guest| {
        for (batch, base) in buffers.chunks(batch).zip((0..).step_by(batch)) {
            way.map(guest, batch)?;
            for (buffer, index) in batch.iter().zip(base..) {
                engine.write(way.pasid(), buffer.range.start(), &pattern(index))?;
            }
            way.unmap(guest, batch)?;
            for (buffer, index) in batch.iter().zip(base..) {
                let found = guest.read(buffer.memory, PAGE_LEN)?;
                ensure!(found == pattern(index), "buffer {index} does not hold what the device wrote");
                moved += BUFFER;
                let leads = engine.leads(way.pasid(), buffer.range.start(), Access::WRITE);
                same("whether the device reaches a buffer", leads.is_ok(), !W::CLOSES)?;
                closed += u64::from(leads.is_err());
            }
        }
        Ok(())
    })?;
    let ((), after) = guest.measure(|guest| way.end(guest))?;

    let count = buffers.len() as u64;
    let (kinds, kicks) = W::needs(count, buffers.chunks(batch).len() as u64);
    let kinds: BTreeMap<_, _> = kinds.into_iter().map(|(kind, number)| (kind.name(), number)).collect();
    same(W::NAME, sent, amount(&kinds, kicks))?;
    let each = |number: u64| number as f64 / count as f64;
    Ok(WayFacts {
        way: W::NAME,
        batch: batch as u64,
        kinds,
        sent,
        per_buffer: PerBuffer {
            requests: each(sent.requests),
            notifications: each(sent.notifications),
            bytes: each(sent.bytes),
        },
        before,
        after,
        moved,
        closed,
    })
}

/// MAP and UNMAP requests: the device keeps the page table.
struct ByRequests {
    domain: MappedDomain,
    endpoint: Endpoint,
}

impl Way for ByRequests {
    const NAME: &'static str = "MAP and UNMAP";

    fn begin(guest: &mut Guest, endpoint: &Endpoint, _: &[Buffer]) -> anyhow::Result<Self> {
        let mut domain = MappedDomain::new(&mut guest.driver)?;
        domain.attach(&mut guest.driver, endpoint)?;
        Ok(Self { domain, endpoint: endpoint.clone() })
    }

    fn map(&mut self, guest: &mut Guest, batch: &[Buffer]) -> anyhow::Result<()> {
        let flags = MapFlags::READ | MapFlags::WRITE;
        let mapping = |buffer: &Buffer| Mapping { range: buffer.range, target: buffer.memory, flags };
        let mappings: Vec<Mapping> = batch.iter().map(mapping).collect();
        let mut outcome: Result<(), DomainError> = Ok(());
        self.domain.map_all(&mut guest.driver, &mappings, |_, error| outcome = Err(error));
        Ok(outcome?)
    }

    /// One UNMAP for the whole batch: what it covers need not be one mapping.
    fn unmap(&mut self, guest: &mut Guest, batch: &[Buffer]) -> anyhow::Result<()> {
        Ok(self.domain.unmap(&mut guest.driver, whole(batch)?)?)
    }

    fn end(mut self, guest: &mut Guest) -> anyhow::Result<()> {
        Ok(self.domain.detach(&mut guest.driver, self.endpoint.id())?)
    }

    fn needs(buffers: u64, batches: u64) -> (Vec<(RequestType, u64)>, u64) {
        (vec![(RequestType::Map, buffers), (RequestType::Unmap, batches)], 2 * batches)
    }
}

/// The guest's own page table: it edits it, and invalidates what it took away.
struct ByTable {
    pasids: PasidTable,
    space: AddressSpace,
}

impl Way for ByTable {
    const NAME: &'static str = "handover";

    fn begin(guest: &mut Guest, endpoint: &Endpoint, _: &[Buffer]) -> anyhow::Result<Self> {
        let domain = guest.driver.new_domain_id().context("no domain is left")?;
        let mut pasids = Shared::pasid_table(guest, endpoint, domain)?;
        let mut space = AddressSpace::new(&mut guest.driver, endpoint, SpaceOptions::default())?;
        pasids.bind_at(&mut guest.driver, None, &mut space)?;
        pasids.attach(&mut guest.driver)?;
        Ok(Self { pasids, space })
    }

    fn map(&mut self, guest: &mut Guest, batch: &[Buffer]) -> anyhow::Result<()> {
        for buffer in batch {
            self.space.map(&mut guest.driver, buffer.range, buffer.memory, Attrs::READ_WRITE)?;
        }
        Ok(())
    }

    /// One INVALIDATE for the whole batch.
    fn unmap(&mut self, guest: &mut Guest, batch: &[Buffer]) -> anyhow::Result<()> {
        Ok(self.space.unmap(&mut guest.driver, whole(batch)?)?)
    }

    fn end(mut self, guest: &mut Guest) -> anyhow::Result<()> {
        self.pasids.detach(&mut guest.driver)?;
        self.pasids.unbind(&mut guest.driver, None, &mut self.space)?;
        self.space.release(&mut guest.driver).map_err(|(_, error)| error)?;
        self.pasids.release(&mut guest.driver).map_err(|(_, error)| error)?;
        Ok(())
    }

    fn needs(_: u64, batches: u64) -> (Vec<(RequestType, u64)>, u64) {
        (vec![(RequestType::Invalidate, batches)], batches)
    }
}

/// A process whose page table is bound for as long as it lives. Its buffers are memory that it has anyway.
struct Bound {
    pasids: PasidTable,
    space: AddressSpace,
    pasid: Pasid,
}

impl Way for Bound {
    const NAME: &'static str = "process bound once";
    const CLOSES: bool = false;

    fn begin(guest: &mut Guest, endpoint: &Endpoint, buffers: &[Buffer]) -> anyhow::Result<Self> {
        let domain = guest.driver.new_domain_id().context("no domain is left")?;
        let mut pasids = Shared::pasid_table(guest, endpoint, domain)?;
        pasids.attach(&mut guest.driver)?;
        let mut space = AddressSpace::new(&mut guest.driver, endpoint, SpaceOptions::default())?;
        let pasid = pasids.bind(&mut guest.driver, &mut space)?;
        for buffer in buffers {
            space.map(&mut guest.driver, buffer.range, buffer.memory, Attrs::READ_WRITE)?;
        }
        Ok(Self { pasids, space, pasid })
    }

    fn pasid(&self) -> Option<Pasid> {
        Some(self.pasid)
    }

    fn map(&mut self, _: &mut Guest, _: &[Buffer]) -> anyhow::Result<()> {
        Ok(())
    }

    fn unmap(&mut self, _: &mut Guest, _: &[Buffer]) -> anyhow::Result<()> {
        Ok(())
    }

    fn end(mut self, guest: &mut Guest) -> anyhow::Result<()> {
        self.pasids.unbind(&mut guest.driver, Some(self.pasid), &mut self.space)?;
        self.space.release(&mut guest.driver).map_err(|(_, error)| error)?;
        self.pasids.release(&mut guest.driver).map_err(|(_, error)| error)?;
        Ok(())
    }

    fn needs(_: u64, _: u64) -> (Vec<(RequestType, u64)>, u64) {
        (Vec::new(), 0)
    }
}

/// From the first address of the batch to its last.
fn whole(batch: &[Buffer]) -> anyhow::Result<IovaRange> {
    let ends = batch.first().zip(batch.last()).context("an empty batch")?;
    IovaRange::new(ends.0.range.start(), ends.1.range.last()).context("a batch out of order")
}

/// What the device writes into buffer `index`.
fn pattern(index: usize) -> Vec<u8> {
    format!("buffer {index} ").into_bytes().into_iter().cycle().take(PAGE_LEN).collect()
}
