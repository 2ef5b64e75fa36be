//! On `SoftHost`, by the DMA of an emulated device that waits for pages.

use std::time::Duration;

use viommu_device::host::{EndpointCaps, Stream, TableCaps};
use viommu_device::soft::{Answer, SoftHost, Ticket};
use viommu_device::{Device, DeviceConfig};
use viommu_guest::DriverOptions;
use viommu_guest::tables::Style;
use viommu_queue::loopback::{Machine, Memory};
use viommu_queue::{DmaError, GuestTables};
use viommu_tests::rig::{Guest, smmuv3, vtd};
use viommu_wire::{EndpointId, numbers};
use vm_memory::{GuestAddress, Permissions};

use super::kill::{Access, Cell, Hardware, Progress, kill};

#[test]
fn processes_die_behind_an_smmuv3_with_a_table_of_their_own_making() {
    run(smmuv3(), Style::Table, numbers::FORMAT_ARM_SMMU3, true);
}

#[test]
fn processes_die_behind_an_smmuv3_page_table_by_page_table() {
    run(smmuv3(), Style::Single, numbers::FORMAT_ARM_PT, true);
}

#[test]
fn processes_die_behind_vtd_with_a_table_of_their_own_making() {
    run(vtd(), Style::Table, numbers::FORMAT_INTEL_PASID_TABLE, true);
}

#[test]
fn processes_die_behind_vtd_page_table_by_page_table() {
    run(vtd(), Style::Single, numbers::FORMAT_INTEL_PT, true);
}

#[test]
fn processes_die_in_pinned_memory() {
    run(smmuv3(), Style::Preferred, numbers::FORMAT_ARM_SMMU3, false);
}

fn run(tables: TableCaps, style: Style, format: u8, page_requests: bool) {
    let endpoint = EndpointId(8);
    let memory = Memory::new(64 << 20);
    let mut host = SoftHost::new(memory.tables().clone());
    let caps = EndpointCaps { tables: Some(tables), page_requests, ..EndpointCaps::default() };
    host.add_endpoint(endpoint, caps).expect("an endpoint");
    let device = Device::new(DeviceConfig::default(), host).expect("a configuration");
    let machine = Machine::new(memory.clone(), device, 1024).expect("a queue size");
    let guest = Guest::over(machine, &memory, DriverOptions::default()).expect("a driver");
    let cell = Cell { endpoint: endpoint.0, style, format, has_page_requests: page_requests };
    kill(cell, guest, Soft { endpoint });
}

struct Soft {
    endpoint: EndpointId,
}

impl Hardware for Soft {
    type Host = SoftHost<GuestTables>;
    type Ticket = Ticket;

    const SHARES_ANSWERS: bool = false;

    fn go_on(
        &mut self,
        machine: &Machine<Self::Host>,
        stream: Stream,
        access: &mut Access<Ticket>,
    ) -> Progress {
        let dma = machine.paged(stream, Duration::ZERO);
        if let Some(ticket) = access.ticket {
            match dma.answer(ticket) {
                None => return Progress::Waits,
                Some(answer) => {
                    access.ticket = None;
                    if answer == Answer::Failed {
                        return Progress::Fails;
                    }
                }
            }
        }
        let kind = match (access.reads, access.writes) {
            (true, true) => Permissions::ReadWrite,
            (_, true) => Permissions::Write,
            _ => Permissions::Read,
        };
        match dma.try_translate(GuestAddress(access.iova), access.length, kind) {
            Ok(pieces) => Progress::Done(pieces.map(|piece| (piece.base.0, piece.length)).collect()),
            Err(DmaError::Waits(ticket)) => {
                access.ticket = Some(ticket);
                Progress::Waits
            }
            Err(DmaError::Fault(_)) => Progress::Fails,
            Err(error) => panic!("{error}"),
        }
    }

    fn held(&mut self, machine: &Machine<Self::Host>) -> usize {
        machine.lock().device_mut().host_mut().waiting(self.endpoint)
    }
}
