//! The guest: its driver, and what went over its queue.

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};
use pgtable_formats::{Access, AccessKind, Fault as WalkFault, FaultClass, Gpa, Pasid, TableAlloc as _};
use viommu_device::host::FaultCause;
use viommu_guest::hal::{GuestMem as _, Parts, Platform as _};
use viommu_guest::{Driver, DriverOptions};
use viommu_queue::loopback::{Alloc, Memory, Transport};
use viommu_wire::numbers::{EVENT_QUEUE, REQUEST_QUEUE};
use viommu_wire::{AccessFlags, Event, FaultEvent, FaultReason, Features, Iova, RequestType, Tail};

use super::engine::{Engine, Refused};
use super::facts::{Fault, Hex, Sent};
use super::machine::{self, Machine};

/// log2 of the page size that the guest uses.
pub(super) const PAGE_LG2: u8 = 12;
/// Bytes of a page.
pub(super) const PAGE_LEN: usize = 1 << PAGE_LG2;
/// The same, for addresses.
pub(super) const PAGE: u64 = PAGE_LEN as u64;

/// A guest with a running driver.
pub(super) struct Guest {
    pub(super) driver: Driver<Parts<Memory, Alloc>, Transport<Machine>>,
    machine: Machine,
}

/// An access that must be refused, and how.
pub(super) struct Forbidden {
    /// In words, what is wrong with it.
    pub(super) what: &'static str,
    pub(super) pasid: Option<Pasid>,
    pub(super) address: Iova,
    pub(super) kind: AccessKind,
    /// The reason that the event must give.
    pub(super) reason: FaultReason,
    /// What the hardware must call it.
    pub(super) name: &'static str,
}

impl Guest {
    /// Brings the device up.
    pub(super) fn start(machine: &Machine) -> anyhow::Result<Self> {
        let memory = machine.memory().clone();
        let alloc = Alloc::within(&memory, machine::FIRST, machine::LAST);
        let options = DriverOptions {
            required: Features::MAP_UNMAP | Features::PROBE | Features::ATTACH_TABLE,
            ..DriverOptions::default()
        };
        let driver = Driver::new(Parts { memory, alloc }, Transport::new(machine.clone()), options)?;
        Ok(Self { driver, machine: machine.clone() })
    }

    /// Does something and counts what it sends. The driver's count must be the device's.
    pub(super) fn measure<R>(
        &mut self,
        work: impl FnOnce(&mut Self) -> anyhow::Result<R>,
    ) -> anyhow::Result<(R, Sent)> {
        let counters = *self.driver.counters();
        let arrived = |way: &Transport<Machine>| (way.served, way.notifications[usize::from(REQUEST_QUEUE)]);
        let before = arrived(self.driver.transport_mut());
        let result = work(self)?;
        let sent = self.driver.counters().since(&counters);
        let after = arrived(self.driver.transport_mut());
        same("requests that the device answered", after.0 - before.0, sent.requests)?;
        same("kicks that reached the device", after.1 - before.1, sent.notifications)?;
        let bytes = sent.readable_bytes + sent.writable_bytes;
        Ok((result, Sent { requests: sent.requests, notifications: sent.notifications, bytes }))
    }

    /// A page of memory for a process.
    pub(super) fn page(&mut self) -> anyhow::Result<Gpa> {
        self.block(PAGE_LG2)
    }

    /// `1 << size_lg2` bytes of memory.
    pub(super) fn block(&mut self, size_lg2: u8) -> anyhow::Result<Gpa> {
        self.driver.platform_mut().alloc.alloc(size_lg2).context("guest memory is used up")
    }

    /// Reads memory, as the guest's processor does.
    pub(super) fn read(&self, at: Gpa, length: usize) -> anyhow::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.driver.platform().memory().read(at, &mut bytes)?;
        Ok(bytes)
    }

    /// Writes memory, as the guest's processor does.
    pub(super) fn write(&self, at: Gpa, bytes: &[u8]) -> anyhow::Result<()> {
        Ok(self.driver.platform().memory().write(at, bytes)?)
    }

    /// Faults that the device told of.
    pub(super) fn faults(&mut self) -> anyhow::Result<Vec<FaultEvent>> {
        let mut faults = Vec::new();
        self.driver.handle_events(|event| {
            if let Event::Fault(fault) = event {
                faults.push(fault);
            }
        })?;
        Ok(faults)
    }

    /// Lets the engine try what it must not do. It must be refused by the right name, and exactly one event must tell.
    pub(super) fn forbid(&mut self, engine: &Engine, forbidden: &Forbidden) -> anyhow::Result<Fault> {
        let &Forbidden { what, pasid, address, kind, reason, name } = forbidden;
        same("events that wait already", self.faults()?, Vec::new())?;
        let mut bytes = [0; 8];
        let (access, flags, outcome) = match kind {
            AccessKind::Write => ("write", AccessFlags::WRITE, engine.write(pasid, address, &bytes)),
            _ => ("read", AccessFlags::READ, engine.read(pasid, address, &mut bytes)),
        };
        same(what, outcome, Err(Refused(name.to_owned())))?;
        // What a VMM does after a device met a fault. The guest looks for events itself.
        let _ = self.machine.kick(EVENT_QUEUE)?;
        let endpoint = engine.endpoint();
        let expected = FaultEvent { reason, access: flags, endpoint, pasid, address: Some(address) };
        same("events", self.faults()?, vec![expected])?;
        // The hardware's answer for the same access once more, without another event.
        let cause = engine.leads(pasid, address, Access { kind, privileged: false });
        let cause = cause.err().context("the same access passes now")?;
        let architecture = cause.to_string();
        same("the name of the fault", architecture.as_str(), name)?;
        Ok(Fault {
            what,
            access,
            endpoint: endpoint.0,
            pasid: pasid.map(Pasid::value),
            address: Hex(address.0),
            reason: match reason {
                FaultReason::Domain => "DOMAIN",
                FaultReason::Mapping => "MAPPING",
                FaultReason::Unknown => "UNKNOWN",
            },
            architecture,
            meaning: meaning(cause),
        })
    }
}

/// The hardware's name for a fault in a few words.
fn meaning(cause: FaultCause) -> &'static str {
    match cause {
        FaultCause::Unattached => "the guest has said nothing about the endpoint",
        FaultCause::Unmapped => "no mapping",
        FaultCause::Permission => "the mapping does not permit the access",
        FaultCause::Table(WalkFault::Vtd(reason)) => reason.describe(),
        FaultCause::Table(fault) => match fault.class() {
            FaultClass::NotMapped => "no entry for the address",
            FaultClass::Permission => "the entry does not permit the access",
            FaultClass::Configuration => "the PASID has no page table",
            FaultClass::TableAccess => "a table could not be read",
            FaultClass::Malformed => "an entry of a table is malformed",
        },
    }
}

/// What these requests, sent with so many kicks, amount to by the specification.
pub(super) fn amount(kinds: &BTreeMap<&'static str, u64>, notifications: u64) -> Sent {
    let mut sent = Sent { notifications, ..Sent::default() };
    for kind in RequestType::ALL {
        let number = kinds.get(kind.name()).copied().unwrap_or(0);
        sent.requests += number;
        sent.bytes += number * (kind.readable_len() + Tail::LEN) as u64;
    }
    sent
}

/// Ends the demo where something is not as told.
pub(super) fn same<V: PartialEq + std::fmt::Debug>(what: &str, found: V, expected: V) -> anyhow::Result<()> {
    ensure!(found == expected, "{what}: expected {expected:?}, found {found:?}");
    Ok(())
}
