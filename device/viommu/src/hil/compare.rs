//! A device's accesses, compared with what the software host makes of the same table in the same memory.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::{Context as _, bail};
use pgtable_formats::context::{Canonical, smmuv3};
use pgtable_formats::{Access, Fault, FaultClass, Gpa, Iova};
use viommu_device::host::{EndpointCaps, FaultCause, FaultReport, Host as _, SpaceSpec, Stream, TableCaps};
use viommu_device::soft::SoftHost;
use viommu_guest::Endpoint;
use viommu_guest::hal::GuestMem as _;
use viommu_host_iommufd::kernel::Iommufd;
use viommu_queue::GuestTables;
use viommu_wire::TableDescriptor;
use vm_memory::{GuestAddress, GuestMemoryBackend as _};

use super::bench::{Moved, Station};
use super::guest::{Guest, PATIENCE, UNTOUCHED, WORD, domain};
use crate::capture::CapturedEndpoint;

/// With so many differences there is no use in looking for more.
const ENOUGH: usize = 8;

/// What was compared.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) accesses: u64,
    pub(super) reached: u64,
    /// Faults of stage 1, by an event that says the same.
    faults: u64,
    /// Refused by stage 2, which is the host's.
    outside: u64,
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { accesses, reached, faults, outside } = self;
        write!(
            f,
            "{accesses} accesses: {reached} reached memory, {faults} faulted, {outside} left guest memory"
        )
    }
}

/// The software host over the same memory.
pub(super) struct Comparer {
    reference: SoftHost<GuestTables>,
    caps: smmuv3::Caps,
    stream: Stream,
    /// What a capture says besides.
    pub(super) expected: Option<CapturedEndpoint>,
    pub(super) counts: Counts,
    /// Addresses that stage 2 refused. Linux keeps faults of stage 2 to itself; QEMU's SMMUv3 does not mark them as such,
    /// so they arrive as faults of stage 1.
    outside: BTreeSet<Iova>,
    pub(super) differences: Vec<String>,
    /// Differences that have a table's number.
    numbered: usize,
}

impl Comparer {
    pub(super) fn new<K: Iommufd>(
        guest: &Guest<K>,
        endpoint: &Endpoint,
        caps: smmuv3::Caps,
    ) -> anyhow::Result<Self> {
        let mut reference = SoftHost::new(guest.memory.tables().clone());
        reference.set_strict(true);
        let tables = Some(TableCaps::Smmuv3(caps));
        reference.add_endpoint(endpoint.id(), EndpointCaps { tables, ..EndpointCaps::default() })?;
        let stream = Stream::untagged(endpoint.id());
        Ok(Self {
            reference,
            caps,
            stream,
            expected: None,
            counts: Counts::default(),
            outside: BTreeSet::new(),
            differences: Vec::new(),
            numbered: 0,
        })
    }

    pub(super) fn differs(&mut self, difference: String) {
        self.differences.push(difference);
    }

    pub(super) const fn is_enough(&self) -> bool {
        self.differences.len() >= ENOUGH
    }

    /// Says which table the last differences were found in.
    pub(super) fn number(&mut self, number: u32) {
        for difference in self.differences.iter_mut().skip(self.numbered) {
            *difference = format!("table {number}: {difference}");
        }
        self.numbered = self.differences.len();
    }

    /// Binds a table on both sides, and compares.
    pub(super) fn table<K: Iommufd>(
        &mut self,
        guest: &mut Guest<K>,
        station: &mut Station,
        endpoint: &Endpoint,
        descriptor: TableDescriptor,
        probes: &[Iova],
        explain: &dyn Fn(Iova) -> String,
    ) -> anyhow::Result<()> {
        let TableDescriptor::Smmuv3 { ste0, ste1 } = descriptor else { bail!("not a table of an SMMUv3") };
        let table = smmuv3::CdTable::from_ste(ste0, ste1, &self.caps)
            .map_err(|refusal| anyhow::anyhow!("the table is not for this hardware: {refusal}"))?;
        let table = Canonical::Smmuv3(table);
        let mut space =
            self.reference.create(SpaceSpec::GuestTable { endpoint: self.stream.endpoint, table: &table })?;
        self.reference.bind(self.stream, Some(&mut space))?;
        let domain = domain(guest)?;
        guest.driver.attach_table(domain, endpoint, descriptor).context("ATTACH_TABLE")?;
        for &iova in probes {
            if self.is_enough() {
                break;
            }
            let before = self.differences.len();
            self.access(guest, station, iova)?;
            for difference in self.differences.iter_mut().skip(before) {
                difference.push_str(&explain(iova));
            }
        }
        let surplus = self.events(guest, 0)?;
        if let Some(first) = surplus.first() {
            self.differs(format!("{} events that nothing explains, such as {first:?}", surplus.len()));
        }
        guest.driver.detach(domain, endpoint.id()).context("DETACH")?;
        self.reference.bind(self.stream, None)?;
        self.reference.destroy(space);
        Ok(())
    }

    /// One write of the device.
    fn access<K: Iommufd>(
        &mut self,
        guest: &mut Guest<K>,
        station: &mut Station,
        iova: Iova,
    ) -> anyhow::Result<()> {
        self.counts.accesses += 1;
        let leads = self.reference.peek(self.stream, iova, Access::WRITE).map(|piece| piece.output);
        // That was no access: nothing of it is to be reported.
        while self.reference.next_fault().is_some() {}
        self.check_capture(iova, leads);
        let target = leads.ok().filter(|at| guest.memory.map().address_in_range(GuestAddress(at.0)));
        let mut before = [0; WORD];
        if let Some(at) = target {
            guest.memory.read(at, &mut before)?;
            guest.write(at, &[UNTOUCHED; WORD])?;
        }
        let data = station.data(WORD)?;
        let moved = station.write(iova, WORD)?;
        match (leads, target) {
            (Ok(_), Some(at)) => {
                let found = guest.read(at, WORD)?;
                if found == data && moved != Moved::Refused {
                    self.counts.reached += 1;
                } else {
                    let events = self.events(guest, 0)?;
                    self.differs(format!(
                        "a write at {iova} should reach {at}, and the device {}: {events:?}",
                        if moved == Moved::Refused { "was refused" } else { "went elsewhere" }
                    ));
                }
                guest.write(at, &before)?;
            }
            (Ok(at), None) => {
                self.counts.outside += 1;
                self.outside.insert(iova);
                if moved == Moved::Done {
                    self.differs(format!(
                        "a write at {iova} leads to {at}, which is no memory, and was done"
                    ));
                }
            }
            (Err(cause), _) => self.refused(guest, iova, moved, cause)?,
        }
        Ok(())
    }

    fn refused<K: Iommufd>(
        &mut self,
        guest: &mut Guest<K>,
        iova: Iova,
        moved: Moved,
        cause: FaultCause,
    ) -> anyhow::Result<()> {
        if moved == Moved::Done {
            self.differs(format!("a write at {iova} should fault with {cause}, and was done"));
        }
        // To the hardware, a table that is no memory is a fault of stage 2.
        if let FaultCause::Table(fault) = cause
            && fault.class() == FaultClass::TableAccess
        {
            self.counts.outside += 1;
            self.outside.insert(iova);
            return Ok(());
        }
        self.outside.remove(&iova);
        let events = self.events(guest, 1)?;
        let address = match cause {
            FaultCause::Table(Fault::Smmuv3(smmuv3::Event::CBadCd)) => None,
            _ => Some(iova),
        };
        let same = |event: &FaultReport| {
            (event.stream, event.address, event.cause) == (self.stream, address, cause)
                // An event without an address tells nothing of the access.
                && (address.is_none() || event.kind == Access::WRITE.kind && !event.privileged)
        };
        if !events.is_empty() && events.iter().all(same) {
            self.counts.faults += 1;
        } else {
            self.differs(format!(
                "a write at {iova} should fault with {cause}, and the events are {events:?}"
            ));
        }
        Ok(())
    }

    /// Faults of stage 1 as the host reports them; waits until there are so many.
    fn events<K: Iommufd>(&self, guest: &Guest<K>, least: usize) -> anyhow::Result<Vec<FaultReport>> {
        let translation = FaultCause::Table(Fault::Smmuv3(smmuv3::Event::FTranslation));
        let end = Instant::now() + PATIENCE;
        let mut found = Vec::new();
        loop {
            let of_stage_2 = |event: &FaultReport| {
                event.cause == translation && event.address.is_some_and(|at| self.outside.contains(&at))
            };
            found.extend(events(guest, 0)?.into_iter().filter(|event| !of_stage_2(event)));
            if found.len() >= least || Instant::now() >= end {
                return Ok(found);
            }
            std::thread::yield_now();
        }
    }

    /// The software host must say what the capture says.
    fn check_capture(&mut self, iova: Iova, leads: Result<Gpa, FaultCause>) {
        let Some(table) = &self.expected else { return };
        let mapping = table.mappings.iter().find(|mapping| mapping.range.contains(iova));
        let agrees = match (mapping, leads) {
            (Some(mapping), Ok(at)) => {
                mapping.write && at.0 == mapping.output.0 + (iova.0 - mapping.range.start().0)
            }
            (Some(mapping), Err(cause)) => !mapping.write && cause.is_mapping(),
            (None, Err(cause)) => cause.is_mapping(),
            (None, Ok(_)) => false,
        };
        if !agrees {
            self.differs(format!("the capture says {mapping:?} of {iova}, and the software host {leads:?}"));
        }
    }
}

/// Faults as the host reports them; waits until there are so many.
pub(super) fn events<K: Iommufd>(guest: &Guest<K>, least: usize) -> anyhow::Result<Vec<FaultReport>> {
    let end = Instant::now() + PATIENCE;
    let mut events = Vec::new();
    loop {
        while let Some(event) = guest.machine.lock().device_mut().host_mut().next_fault() {
            events.push(event);
        }
        if events.len() >= least || Instant::now() >= end {
            return Ok(events);
        }
        std::thread::yield_now();
    }
}
