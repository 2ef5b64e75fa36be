//! Scenes 1 and 2: what there is, and what the guest learns of it.

use anyhow::{Context as _, ensure};
use pgtable_formats::{Access, AccessKind};
use viommu_device::host::{FaultCause, Host as _, Stream, TableCaps};
use viommu_guest::{Endpoint, Hardware};
use viommu_wire::numbers::{EVENT_QUEUE, FORMAT_ARM_PT, FORMAT_ARM_SMMU3, REQUEST_QUEUE};
use viommu_wire::{FaultReason, Features, Gpa, Iova, IovaRange, ReservedKind, ReservedRegion};
use virtio_queue::QueueT;

use super::engine::Engine;
use super::facts::{self, Hex};
use super::guest::{Forbidden, Guest, same};
use super::machine::{self, Machine};

/// Scene 1: the machine, read back from the VMM, and that nothing passes before the guest says so.
pub(super) fn machine(machine: &Machine, guest: &mut Guest) -> anyhow::Result<facts::Machine> {
    let engine = Engine::new(machine, machine::SMMUV3);
    let at_first = guest.forbid(
        &engine,
        &Forbidden {
            what: "an access before the guest allowed any",
            pasid: None,
            address: Iova(machine::FIRST.0),
            kind: AccessKind::Read,
            reason: FaultReason::Domain,
            name: "unattached",
        },
    )?;
    for endpoint in machine::ENDPOINTS {
        let leads = machine.leads(Stream::untagged(endpoint), Iova(machine::FIRST.0), Access::READ);
        same("what an endpoint reaches at first", leads, Err(FaultCause::Unattached))?;
    }
    let iommu = machine.lock();
    let accepted = guest.driver.features();
    same("features in force in the device", iommu.device().features(), accepted & Features::DEVICE)?;
    let host = iommu.device().host();
    let endpoints = iommu.device().endpoints().map(|endpoint| {
        let caps = host.caps(endpoint);
        let hardware = match caps.and_then(|caps| caps.tables.as_ref()) {
            Some(TableCaps::Smmuv3(_)) => SMMUV3_NAME,
            Some(TableCaps::Vtd(_)) => VTD_NAME,
            None => "none",
        };
        let can_wait = caps.is_some_and(|caps| caps.page_requests);
        facts::Endpoint { endpoint: endpoint.0, hardware, can_wait }
    });
    let queues = [("requests", REQUEST_QUEUE), ("events", EVENT_QUEUE)].map(|(purpose, index)| {
        let queue = iommu.queue(index.into()).context("a queue is missing")?;
        ensure!(queue.ready(), "queue {index} is not enabled");
        let at = Gpa(queue.desc_table());
        ensure!((machine::FIRST..=machine::LAST).contains(&at), "queue {index} is not in guest memory");
        Ok(facts::Queue { purpose, entries: queue.size(), at: Hex(at.0) })
    });
    Ok(facts::Machine {
        memory_first: Hex(machine::FIRST.0),
        memory_last: Hex(machine::LAST.0),
        memory_bytes: machine::BYTES,
        queues: queues.into_iter().collect::<anyhow::Result<_>>()?,
        features_offered: names(iommu.offered_features()),
        features_accepted: names(accepted),
        endpoints: endpoints.collect(),
        at_first,
    })
}

/// Scene 2: PROBE. What it says must be what the VMM made.
pub(super) fn probe(guest: &mut Guest) -> anyhow::Result<(Endpoint, facts::Probe)> {
    let (endpoint, sent) = guest.measure(|guest| Ok(guest.driver.probe(machine::SMMUV3)?))?;
    let properties = endpoint.properties();
    let Some(Hardware::Smmuv3(caps)) = properties.hardware else {
        anyhow::bail!("PROBE names no SMMUv3: {:?}", properties.hardware);
    };
    let msi = IovaRange::new(machine::MSI.0, machine::MSI.1).context("an empty MSI window")?;
    let expected = vec![ReservedRegion { kind: ReservedKind::Msi, range: msi }];
    same("reserved regions", &properties.reserved, &expected)?;
    same("formats", properties.formats.iter().collect(), vec![FORMAT_ARM_SMMU3, FORMAT_ARM_PT])?;
    same("properties without meaning", (properties.unknown, properties.malformed), (0, 0))?;
    same("requests for a PROBE", (sent.requests, sent.notifications), (1, 1))?;
    let page_sizes = [(caps.granule_4k, 4096), (caps.granule_16k, 16384), (caps.granule_64k, 65536)];
    let facts = facts::Probe {
        endpoint: endpoint.id().0,
        sent,
        hardware: SMMUV3_NAME,
        page_sizes: page_sizes.into_iter().filter_map(|(has, size)| has.then_some(size)).collect(),
        address_bits: caps.oas_bits,
        pasid_bits: properties.pasid_bits,
        table_formats: properties.formats.iter().collect(),
        reserved: properties
            .reserved
            .iter()
            .map(|region| facts::Reserved {
                kind: region.kind.to_string(),
                first: Hex(region.range.start().0),
                last: Hex(region.range.last().0),
            })
            .collect(),
        not_understood: properties.unknown + properties.malformed,
    };
    Ok((endpoint, facts))
}

pub(super) const SMMUV3_NAME: &str = "Arm SMMUv3";
pub(super) const VTD_NAME: &str = "Intel VT-d";

fn names(features: Features) -> Vec<&'static str> {
    features.iter_names().map(|(name, _)| name).collect()
}
