//! The accesses that show whether a bound table translates as its capture says.

use std::collections::BTreeSet;

use anyhow::Context as _;
use pgtable_formats::{Access, AccessKind, FaultClass, Gpa, Iova, IovaRange};
use viommu_device::host::{FaultCause, Stream};
use viommu_wire::{AccessFlags, EndpointId, Event, FaultEvent, FaultReason, Status, Tail};

use crate::capture::{Capture, CapturedEndpoint, CapturedMapping, IdRegisters};
use crate::driver::RawDriver;
use crate::machine::Machine;

/// Bytes of an event buffer, as drivers post them.
const EVENT_BYTES: usize = 24;

/// What was checked for one endpoint, and what differs.
#[derive(Clone, Debug)]
pub(super) struct EndpointReport {
    pub(super) endpoint: EndpointId,
    pub(super) mappings: usize,
    /// Mappings that agree wholly.
    pub(super) agree: usize,
    /// Addresses without a mapping that were tried.
    pub(super) unmapped: usize,
    /// Accesses made.
    pub(super) accesses: usize,
    /// Faults that arrived as events.
    pub(super) events: usize,
    /// One for each mapping or unmapped address that does not agree.
    pub(super) differences: Vec<String>,
}

/// What an access must come to.
#[derive(Clone, Copy, Debug)]
enum Expected {
    /// These addresses, from the first on.
    Output(Gpa),
    /// The architecture's fault for a missing mapping.
    NotMapped,
    /// One of its faults for a missing permission.
    Permission,
}

/// A machine with the capture's memory, and what it is compared with.
pub(super) struct Checker<'c> {
    capture: &'c Capture,
    machine: Machine,
    driver: RawDriver,
}

impl<'c> Checker<'c> {
    pub(super) fn new(capture: &'c Capture, machine: Machine, driver: RawDriver) -> Self {
        Self { capture, machine, driver }
    }

    /// Binds and checks every endpoint.
    pub(super) fn run(mut self) -> anyhow::Result<Vec<EndpointReport>> {
        self.capture.endpoints.iter().map(|endpoint| self.endpoint(endpoint)).collect()
    }

    fn endpoint(&mut self, captured: &CapturedEndpoint) -> anyhow::Result<EndpointReport> {
        let mut report = EndpointReport {
            endpoint: captured.id,
            mappings: captured.mappings.len(),
            agree: 0,
            unmapped: 0,
            accesses: 0,
            events: 0,
            differences: Vec::new(),
        };
        if let Err(refusal) = self.bind(captured.id)? {
            let refused = format!("its table is not bound: {refusal}");
            // Nothing of it agrees, and an endpoint without mappings must not pass.
            report.differences = vec![refused; captured.mappings.len().max(1)];
            return Ok(report);
        }
        for mapping in &captured.mappings {
            match self.mapping(mapping, &mut report)? {
                Ok(()) => report.agree += 1,
                Err(difference) => report.differences.push(difference),
            }
        }
        for address in self.unmapped(&captured.mappings) {
            report.unmapped += 1;
            let byte = IovaRange::from_length(address, 1).context("no such address")?;
            for access in [Access::READ, Access::WRITE] {
                if let Err(difference) = self.access(byte, access, Expected::NotMapped, &mut report)? {
                    report.differences.push(difference);
                    break;
                }
            }
        }
        Ok(report)
    }

    /// Sends the ATTACH_TABLE.
    fn bind(&mut self, endpoint: EndpointId) -> anyhow::Result<Result<(), String>> {
        let request = self.capture.attach_table(endpoint).context("no such endpoint")?.encode().to_vec();
        let answer = self.driver.request(&mut self.machine, &[request], &[Tail::LEN])?;
        Ok(match Tail::decode(&answer.writable) {
            _ if answer.used as usize != Tail::LEN => Err(format!("used length {}", answer.used)),
            Some(Tail { status: Status::Ok }) => Ok(()),
            Some(Tail { status }) => Err(format!("status {status}")),
            None => Err("no such status".to_owned()),
        })
    }

    /// First byte, last byte, and all of it.
    fn mapping(
        &mut self,
        mapping: &CapturedMapping,
        report: &mut EndpointReport,
    ) -> anyhow::Result<Result<(), String>> {
        let (first, last) = (mapping.range.start(), mapping.range.last());
        let byte = |at| IovaRange::from_length(at, 1).context("no such address");
        let pieces = [
            (byte(first)?, mapping.output),
            (byte(last)?, mapping.output_last()),
            (mapping.range, mapping.output),
        ];
        for (range, output) in pieces {
            for access in [Access::READ, Access::WRITE] {
                let permitted = mapping.user && (mapping.write || access.kind != AccessKind::Write);
                let expected = if permitted { Expected::Output(output) } else { Expected::Permission };
                if let Err(difference) = self.access(range, access, expected, report)? {
                    return Ok(Err(difference));
                }
            }
        }
        Ok(Ok(()))
    }

    /// Addresses to try where nothing is mapped.
    fn unmapped(&self, mappings: &[CapturedMapping]) -> Vec<Iova> {
        // The lower half of a 4-level VT-d table, or a whole one of an SMMUv3; and the end of the upper half.
        let top = match self.capture.registers {
            IdRegisters::Smmuv3(_) => (1 << 48) - 1,
            IdRegisters::Vtd(_) => (1 << 47) - 1,
        };
        let mut addresses = BTreeSet::from([0, top, u64::MAX]);
        let mut free = 0;
        for mapping in mappings {
            let (first, last) = (mapping.range.start().0, mapping.range.last().0);
            addresses.extend(first.checked_sub(1));
            addresses.extend(last.checked_add(1));
            if free < first {
                addresses.insert(free + (first - free) / 2);
            }
            free = last.saturating_add(1);
        }
        if free < top {
            addresses.insert(free + (top - free) / 2);
        }
        let mapped = |address: u64| {
            let after = mappings.partition_point(|mapping| mapping.range.start().0 <= address);
            let before = after.checked_sub(1).and_then(|index| mappings.get(index));
            before.is_some_and(|mapping| mapping.range.contains(Iova(address)))
        };
        addresses.into_iter().filter(|&address| !mapped(address)).map(Iova).collect()
    }

    /// Makes an untagged access and compares; what faults must arrive as an event.
    fn access(
        &mut self,
        range: IovaRange,
        access: Access,
        expected: Expected,
        report: &mut EndpointReport,
    ) -> anyhow::Result<Result<(), String>> {
        report.accesses += 1;
        let stream = Stream::untagged(report.endpoint);
        let mut pieces = Vec::new();
        let host = self.machine.device_mut().host_mut();
        let done =
            host.translate_range(stream, range, access, |_, output, length| pieces.push((output, length)));
        let kind = if access.kind == AccessKind::Write { "write" } else { "read" };
        let differs = |found: &str| {
            Ok(Err(format!("{kind} of {range} gives {found}, expected {}", self.name(expected))))
        };
        let cause = match (done, expected) {
            (Ok(()), Expected::Output(output)) if agree(&pieces, output, range) => return Ok(Ok(())),
            (Ok(()), _) => {
                let found: Vec<String> = pieces.iter().map(|(output, _)| output.to_string()).collect();
                return differs(&found.join(" "));
            }
            (Err(cause), Expected::NotMapped) if cause.to_string() == self.not_mapped() => cause,
            (Err(FaultCause::Table(fault)), Expected::Permission)
                if fault.class() == FaultClass::Permission =>
            {
                FaultCause::Table(fault)
            }
            (Err(cause), _) => {
                let differs = differs(&format!("fault {cause}"));
                // It waits as an event, which must not be taken for that of a later one.
                self.driver.event(&mut self.machine, EVENT_BYTES)?;
                return differs;
            }
        };
        let event = self.driver.event(&mut self.machine, EVENT_BYTES)?;
        let event = event.and_then(|event| Event::decode(event.writable.get(..event.used as usize)?));
        let flag = if access.kind == AccessKind::Write { AccessFlags::WRITE } else { AccessFlags::READ };
        let wanted = Event::Fault(FaultEvent {
            reason: FaultReason::Mapping,
            access: flag,
            endpoint: report.endpoint,
            pasid: None,
            address: Some(range.start()),
        });
        if event != Some(wanted) {
            return Ok(Err(format!("{kind} of {range} faults with {cause}, and its event is {event:?}")));
        }
        report.events += 1;
        Ok(Ok(()))
    }

    fn name(&self, expected: Expected) -> String {
        match expected {
            Expected::Output(output) => output.to_string(),
            Expected::NotMapped => format!("fault {}", self.not_mapped()),
            Expected::Permission => "a permission fault".to_owned(),
        }
    }

    /// The architecture's name of a missing mapping.
    fn not_mapped(&self) -> &'static str {
        match self.capture.registers {
            IdRegisters::Smmuv3(_) => "F_TRANSLATION",
            IdRegisters::Vtd(_) => "0x71",
        }
    }
}

/// Whether the pieces are one run from `output` on, as long as `range`.
fn agree(pieces: &[(Gpa, u64)], output: Gpa, range: IovaRange) -> bool {
    let mut next = Some(output);
    let mut total = 0u128;
    for &(piece, length) in pieces {
        if next != Some(piece) {
            return false;
        }
        next = piece.checked_add(length);
        total += u128::from(length);
    }
    total == u128::from(range.length_minus_one()) + 1
}
