//! Mediation over a host that only keeps the books, with guests that mean ill.

mod descriptors;
mod entries;
mod faults;
mod hostile;
mod page_requests;
mod window;

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec;
use alloc::vec::Vec;

use pgtable_formats::context::{Canonical, smmuv3, vtd};
use pgtable_formats::suite::FlatMem;
use pgtable_formats::{Gpa, IovaRange, Pasid};
use viommu_wire::{AccessFlags, Caches, EndpointId, Iova, PageResponseCode};

use super::{Mediated, MediationLimits, Space, Window};
use crate::host::{
    Answered, EndpointCaps, FaultCause, FaultReport, GroupResponse, Host, HostError, Invalidation, MapError,
    PageRequestReport, Scope, SpaceSpec, Stopped, Stream, TableCaps, TableKinds, UnmapError,
};
use crate::mapping::Mapping;
use crate::soft::Stage2;

const ARM: EndpointId = EndpointId(8);
const ARM_TOO: EndpointId = EndpointId(9);
const VTD: EndpointId = EndpointId(16);
const VTD_TOO: EndpointId = EndpointId(17);

const MEMORY: Gpa = Gpa(0x4000_0000);
const MEMORY_BYTES: usize = 8 << 20;
/// The last MiB of memory.
const WINDOW: Gpa = Gpa(0x4070_0000);

/// What a stream is bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Bound {
    Identity,
    Mapped,
    Table(Canonical),
}

/// A space, by its number.
#[derive(Debug)]
struct Made(usize, Bound);

/// A host that takes the tables of real machines, translates nothing and keeps the contract of [`Host`].
#[derive(Debug)]
struct Books {
    caps: BTreeMap<EndpointId, EndpointCaps>,
    bound: BTreeMap<Stream, Bound>,
    /// Groups that nobody has answered.
    open: BTreeSet<(Stream, u16)>,
    waiting: Vec<PageRequestReport>,
    invalidated: Vec<Invalidation>,
    calls: usize,
    /// Which call fails, counted from here, and how many after it.
    fails: Option<usize>,
    then: usize,
    faults: Vec<FaultReport>,
    /// The spaces that streams are bound to, by number.
    holds: BTreeMap<Stream, usize>,
    made: usize,
    live: usize,
}

impl Books {
    fn new() -> Self {
        let arm = TableCaps::Smmuv3(arm_caps());
        let caps = |tables, kinds| EndpointCaps {
            tables: Some(tables),
            kinds,
            native: kinds,
            page_requests: true,
            ..EndpointCaps::default()
        };
        let caps = [ARM, ARM_TOO]
            .map(|endpoint| (endpoint, caps(arm.clone(), TableKinds::PASID_TABLE)))
            .into_iter()
            .chain(
                [VTD, VTD_TOO]
                    .map(|endpoint| (endpoint, caps(TableCaps::Vtd(vtd_caps()), TableKinds::PAGE_TABLE))),
            );
        Self {
            caps: caps.collect(),
            bound: BTreeMap::new(),
            open: BTreeSet::new(),
            waiting: vec![],
            invalidated: vec![],
            calls: 0,
            fails: None,
            then: 0,
            faults: vec![],
            holds: BTreeMap::new(),
            made: 0,
            live: 0,
        }
    }

    /// An access waits.
    fn asks(&mut self, stream: Stream, group: u16) {
        let access = AccessFlags::READ;
        assert!(self.open.insert((stream, group)));
        let address = Iova(0x1000);
        self.waiting.push(PageRequestReport {
            stream,
            address,
            access,
            group,
            last: true,
            private_data: None,
            fault: Some(FaultCause::Unmapped),
        });
    }

    fn close(&mut self, is_over: impl Fn(Stream) -> bool) {
        self.open.retain(|(stream, _)| !is_over(*stream));
        self.waiting.retain(|report| !is_over(report.stream));
    }

    fn step(&mut self) -> Result<(), HostError> {
        self.calls += 1;
        match self.fails.as_mut() {
            Some(0) => {
                match self.then.checked_sub(1) {
                    Some(left) => self.then = left,
                    None => self.fails = None,
                }
                Err(HostError::Failed(5))
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl Host for Books {
    type Space = Made;

    fn endpoints(&self) -> Vec<EndpointId> {
        self.caps.keys().copied().collect()
    }

    fn caps(&self, endpoint: EndpointId) -> Option<&EndpointCaps> {
        self.caps.get(&endpoint)
    }

    fn create(&mut self, spec: SpaceSpec<'_>) -> Result<Made, HostError> {
        self.step()?;
        self.live += 1;
        self.made += 1;
        let bound = match spec {
            SpaceSpec::Identity => Bound::Identity,
            SpaceSpec::Mapped => Bound::Mapped,
            SpaceSpec::GuestTable { table, .. } => {
                let is_native = matches!(table, Canonical::Smmuv3(_) | Canonical::VtdFirstStage(_));
                assert!(is_native, "a table that this machine does not take");
                Bound::Table(table.clone())
            }
        };
        Ok(Made(self.made, bound))
    }

    fn destroy(&mut self, Made(number, _): Made) {
        assert!(self.holds.values().all(|other| *other != number), "a stream is bound to it");
        self.live -= 1;
    }

    fn map(&mut self, _: &mut Made, _: Mapping) -> Result<(), MapError> {
        Ok(())
    }

    fn unmap(&mut self, _: &mut Made, _: IovaRange) -> Result<usize, UnmapError> {
        Ok(0)
    }

    fn bind(&mut self, stream: Stream, space: Option<&mut Made>) -> Result<(), HostError> {
        self.step()?;
        let own: BTreeSet<Stream> = self.bound.keys().copied().filter(|one| one.pasid.is_some()).collect();
        match space {
            Some(Made(number, bound)) => {
                self.holds.insert(stream, *number);
                self.bound.insert(stream, bound.clone());
            }
            None => {
                self.holds.remove(&stream);
                self.bound.remove(&stream);
            }
        }
        self.close(|other| {
            let follows =
                stream.pasid.is_none() && other.endpoint == stream.endpoint && !own.contains(&other);
            other == stream || follows
        });
        Ok(())
    }

    fn invalidate(&mut self, batch: &[Invalidation]) -> Result<(), Stopped> {
        self.step().map_err(|error| Stopped { done: 0, error })?;
        for one in batch {
            self.invalidated.push(*one);
            if let Some(revoked) = one.revoked() {
                self.close(|other| other == revoked);
            }
        }
        Ok(())
    }

    fn next_fault(&mut self) -> Option<FaultReport> {
        if self.faults.is_empty() { None } else { Some(self.faults.remove(0)) }
    }

    fn next_page_request(&mut self) -> Option<PageRequestReport> {
        if self.waiting.is_empty() { None } else { Some(self.waiting.remove(0)) }
    }

    fn respond(&mut self, response: &GroupResponse) -> Result<Answered, HostError> {
        self.waiting.retain(|other| other.stream != response.stream || other.group != response.group);
        let was_open = self.open.remove(&(response.stream, response.group));
        Ok(if was_open { Answered::Taken } else { Answered::Gone })
    }
}

type Both<'a, M> = Mediated<Books, &'a M>;

fn memory() -> FlatMem {
    FlatMem::new(MEMORY, MEMORY_BYTES)
}

fn over<M: Stage2>(memory: &M, limits: MediationLimits) -> Both<'_, M> {
    let window = Window::new(WINDOW, 1 << 20);
    Mediated::new(Books::new(), memory, window, limits).unwrap()
}

fn arm_caps() -> smmuv3::Caps {
    smmuv3::Caps::from_registers(smmuv3::IdRegisters::SOFTWARE)
}

fn vtd_caps() -> vtd::Caps {
    vtd::Caps::from_registers(vtd::CapRegisters::SOFTWARE)
}

fn tagged(endpoint: EndpointId, pasid: u32) -> Stream {
    Stream { endpoint, pasid: Some(Pasid::new(pasid).unwrap()) }
}

fn space<M: Stage2>(host: &mut Both<'_, M>, endpoint: EndpointId, table: Canonical) -> Space<Made> {
    host.create(SpaceSpec::GuestTable { endpoint, table: &table }).unwrap()
}

/// A page table of one PASID, at `page` of memory.
fn arm_pages(page: u64) -> Canonical {
    let tcr = smmuv3::Tcr::from_bits(0x25_0080_3510);
    let ttbr0 = MEMORY.0 + (page << 12);
    let registers = smmuv3::PageTableRegisters { asid: 1, tcr, ttbr0, ttbr1: 0, mair: 0xff };
    Canonical::Smmuv3PageTable(smmuv3::PageTable::new(&registers, &arm_caps()).unwrap())
}

fn vtd_pages(page: u64) -> vtd::FirstStage {
    let root = Gpa(MEMORY.0 + (page << 12));
    vtd::FirstStage::new(root, vtd::FirstStageFlags::empty(), 48, &vtd_caps()).unwrap()
}

fn entry(page: u64) -> vtd::PasidEntry {
    vtd::PasidEntry::first_stage(&vtd_pages(page), 1)
}

fn write_entry(memory: &FlatMem, at: Gpa, entry: &vtd::PasidEntry) {
    for (at, word) in (at.0..).step_by(8).zip(entry.words()) {
        memory.store(Gpa(at), word).unwrap();
    }
}

/// A PASID table of 20 bits: the directory at page 0 of memory. It has room for 16 tables behind it.
struct Guest {
    directory: Gpa,
}

impl Guest {
    const fn new() -> Self {
        Self { directory: MEMORY }
    }

    fn canonical(&self) -> Canonical {
        let table = vtd::PasidTable::new(self.directory, 14, Pasid::ZERO, &vtd_caps()).unwrap();
        Canonical::VtdPasidTable(table)
    }

    /// The table that all directory entries of this guest may lead to, number 0 to 15.
    fn table(&self, number: u64) -> Gpa {
        Gpa(self.directory.0 + (128 << 10) + (number << 12))
    }

    fn link(&self, memory: &FlatMem, place: u64, table: Gpa) {
        memory.store(Gpa(self.directory.0 + 8 * place), table.0 | 1).unwrap();
    }

    /// PASIDs below 1,024 have a table each for 64 of them.
    fn set(&self, memory: &FlatMem, pasid: u64, entry: &vtd::PasidEntry) {
        let table = self.table(pasid >> 6);
        self.link(memory, pasid >> 6, table);
        write_entry(memory, Gpa(table.0 + ((pasid & 63) << 6)), entry);
    }

    fn bind<M: Stage2>(&self, host: &mut Both<'_, M>, endpoint: EndpointId) -> Result<(), HostError> {
        let mut all = space(host, endpoint, self.canonical());
        host.bind(Stream::untagged(endpoint), Some(&mut all))
    }
}

fn reread<M: Stage2>(host: &mut Both<'_, M>, endpoint: EndpointId, scope: Scope) -> Result<(), Stopped> {
    let caches = Caches::PASID;
    host.invalidate(&[Invalidation { endpoint, scope, caches, leaf: false, tag: None, global: false }])
}

/// The page tables by their page numbers, of all PASIDs that are bound on their own below.
fn leads<M: Stage2>(host: &Both<'_, M>, endpoint: EndpointId) -> Vec<(u32, u64)> {
    let of = |(stream, bound): (&Stream, &Bound)| match (stream.pasid, bound) {
        (Some(pasid), Bound::Table(Canonical::VtdFirstStage(table))) if stream.endpoint == endpoint => {
            Some((pasid.value(), table.root().0.wrapping_sub(MEMORY.0) >> 12))
        }
        _ => None,
    };
    host.host().bound.iter().filter_map(of).collect()
}

const fn answer(stream: Stream, group: u16) -> GroupResponse {
    GroupResponse { stream, group, code: PageResponseCode::Success }
}
