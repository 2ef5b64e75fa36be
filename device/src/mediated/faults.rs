//! Faults, in terms of what the guest bound rather than of what was made of it.

use pgtable_formats::context::Canonical;
use pgtable_formats::context::vtd::PasidTable;
use pgtable_formats::{Fault, FaultClass, Pasid};

use super::{Mediated, Way};
use crate::event::MAX_DISCARDED;
use crate::host::{FaultCause, FaultReport, Host, PageRequestReport, Stream};
use crate::soft::Stage2;

impl<H: Host, M: Stage2> Mediated<H, M> {
    /// The next fault that is to be told. One call passes over a bounded number of others: endpoints may produce them
    /// as fast as they are taken.
    pub(super) fn next_told(&mut self) -> Option<FaultReport> {
        for _ in 0..MAX_DISCARDED {
            let report = self.host.next_fault()?;
            if let Some(cause) = self.told(report.stream, report.cause) {
                return Some(FaultReport { cause, ..report });
            }
        }
        None
    }

    /// A page request, with the fault that it would be.
    pub(super) fn with_told(&self, report: PageRequestReport) -> PageRequestReport {
        let fault = report.fault.and_then(|cause| self.told(report.stream, cause));
        PageRequestReport { fault, ..report }
    }

    /// Why an access failed. `None`: the guest's table says that it is not to be recorded.
    fn told(&self, stream: Stream, cause: FaultCause) -> Option<FaultCause> {
        match self.ports.get(&stream.endpoint).map(|port| &port.way) {
            Some(Way::Descriptors(_, Some(made))) => {
                let is_bound = made.is_idle() || made.serves(stream.pasid.unwrap_or(Pasid::ZERO));
                match cause {
                    // A descriptor that is not there.
                    FaultCause::Table(fault)
                        if !is_bound && matches!(fault.class(), FaultClass::Configuration) =>
                    {
                        Some(FaultCause::Unattached)
                    }
                    cause => Some(cause),
                }
            }
            Some(Way::Entries { bound: Some(bound), .. }) => {
                let cause = entry_cause(bound.table(), &self.memory, stream.pasid, cause);
                let is_silenced = is_disabled(bound.table(), &self.memory, stream.pasid, cause);
                (!is_silenced).then_some(cause)
            }
            _ => Some(cause),
        }
    }
}

/// What an entry that is bound to nothing says by itself.
fn entry_cause<M: Stage2>(
    table: &PasidTable,
    memory: &M,
    pasid: Option<Pasid>,
    cause: FaultCause,
) -> FaultCause {
    match cause {
        FaultCause::Unattached => match table.lookup(memory, pasid) {
            Err(reason) => FaultCause::Table(Fault::Vtd(reason)),
            Ok(_) => cause,
        },
        cause => cause,
    }
}

/// Whether FPD of the live table keeps a fault from being recorded: the machine does not know the table.
#[cold]
fn is_disabled<M: Stage2>(table: &PasidTable, memory: &M, pasid: Option<Pasid>, cause: FaultCause) -> bool {
    match cause {
        FaultCause::Table(fault) => Canonical::VtdPasidTable(*table).silences(memory, pasid, None, fault),
        // Of a machine that gives no reason; it comes of what an entry leads to.
        FaultCause::Unmapped | FaultCause::Permission => table.disables_faults(memory, pasid),
        FaultCause::Unattached => false,
    }
}
