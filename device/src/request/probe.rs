//! PROBE.

use viommu_wire::{Features, PageRequestFlags, Property, Request, TableFormats, Tail, numbers};

use crate::device::Device;
use crate::error::Rejection;
use crate::host::{EndpointCaps, Host, TableCaps, TableKinds};

impl<H: Host> Device<H> {
    /// Fills the properties area; also says where the tail belongs: behind the area, whatever it holds.
    ///
    /// In a part that is too short for both, the tail is in the last four bytes (D-49).
    pub(super) fn probe(&self, readable: &[u8], writable: &mut [u8]) -> (Result<(), Rejection>, usize) {
        let room = writable.len().saturating_sub(Tail::LEN);
        let size = usize::try_from(self.config.probe_size).unwrap_or(usize::MAX);
        let tail_at = room.min(size);
        let Some(area) = writable.get_mut(..tail_at) else { return (Ok(()), tail_at) };
        area.fill(0); // D-50
        let result = if room < size {
            let needed = size.saturating_add(Tail::LEN);
            Err(Rejection::ShortProbe { length: room + Tail::LEN, needed }) // D-49
        } else {
            self.fill_properties(readable, area)
        };
        (result, tail_at)
    }

    fn fill_properties(&self, readable: &[u8], mut area: &mut [u8]) -> Result<(), Rejection> {
        let endpoint = match Request::decode(readable)? {
            Request::Probe(probe) => probe.endpoint, // D-43
            other => return Err(Rejection::NotAvailable(other.kind())),
        };
        let at = self.find_endpoint(endpoint)?; // D-44
        let caps = self.host.caps(endpoint).ok_or(Rejection::NoEndpoint(endpoint))?;
        for property in properties(caps, self.endpoints[at].tables.as_ref(), self.features) {
            // D-46, D-47, D-48. All fit: `DeviceConfig::validate` has counted them.
            let Some(written) = property.encode(area) else { break };
            area = area.split_at_mut_checked(written).map_or(&mut [], |(_, rest)| rest);
        }
        Ok(())
    }
}

/// What PROBE says of an endpoint: reserved regions; once the handover of tables was negotiated, what tables the
/// endpoint takes; and once page requests were, whether it makes any. `tables`: those of `caps`, for guests.
pub(crate) fn properties(
    caps: &EndpointCaps,
    tables: Option<&TableCaps>,
    features: Features,
) -> impl Iterator<Item = Property> {
    let tables = tables.filter(|_| features.contains(Features::ATTACH_TABLE));
    let handover = tables.map(|tables| {
        let bits = pasid_bits(tables);
        [
            Some(hardware(tables)),
            (bits != 0).then_some(Property::PasidSize { bits }),
            TableFormats::new(formats(tables, caps)).map(Property::TableFormats),
        ]
    });
    let reserved = caps.reserved.iter().map(|&region| Property::ReservedRegion(region));
    let page_requests =
        features.contains(Features::PAGE_REQUEST).then(|| Property::PageRequests(page_request_flags(caps)));
    reserved.chain(handover.into_iter().flatten().flatten()).chain(page_requests)
}

/// Groups of different PASIDs may have one number, so a response always has to name the PASID.
const fn page_request_flags(caps: &EndpointCaps) -> PageRequestFlags {
    if caps.page_requests { PageRequestFlags::all() } else { PageRequestFlags::empty() }
}

/// The formats that ATTACH_TABLE takes, the preferred one first: what is handed over as it is before what is made of
/// it, and of two of these the one that takes fewer requests.
pub(super) const fn formats(tables: &TableCaps, caps: &EndpointCaps) -> &'static [u8] {
    /// Tables of all PASIDs come before page tables, and the reverse.
    const fn pick(caps: &EndpointCaps, both: [&'static [u8]; 2]) -> &'static [u8] {
        let [all_first, one_first] = both;
        let has_all = caps.kinds.contains(TableKinds::PASID_TABLE);
        let has_one = caps.kinds.contains(TableKinds::PAGE_TABLE);
        let is_made = !caps.native.contains(TableKinds::PASID_TABLE);
        match (has_all, has_one, all_first, one_first) {
            (true, true, ..) if is_made && caps.native.contains(TableKinds::PAGE_TABLE) => one_first,
            (true, true, ..) => all_first,
            (true, false, [all @ .., _], _) => all,
            (false, true, _, [one @ .., _]) => one,
            _ => &[],
        }
    }
    const ARM: [&[u8]; 2] = [
        &[numbers::FORMAT_ARM_SMMU3, numbers::FORMAT_ARM_PT],
        &[numbers::FORMAT_ARM_PT, numbers::FORMAT_ARM_SMMU3],
    ];
    const INTEL: [&[u8]; 2] = [
        &[numbers::FORMAT_INTEL_PASID_TABLE, numbers::FORMAT_INTEL_PT],
        &[numbers::FORMAT_INTEL_PT, numbers::FORMAT_INTEL_PASID_TABLE],
    ];
    match tables {
        TableCaps::Smmuv3(_) => pick(caps, ARM),
        TableCaps::Vtd(vtd) if vtd.first_stage => pick(caps, INTEL),
        TableCaps::Vtd(_) => &[],
    }
}

/// Width of the endpoint's PASIDs in bits.
pub(super) const fn pasid_bits(tables: &TableCaps) -> u8 {
    match tables {
        TableCaps::Smmuv3(caps) => caps.ssid_bits,
        TableCaps::Vtd(caps) => caps.pasid_bits,
    }
}

/// The registers.
fn hardware(tables: &TableCaps) -> Property {
    match tables {
        TableCaps::Smmuv3(caps) => {
            let registers = caps.registers();
            Property::HwArmSmmu3 {
                idr0: registers.idr0,
                idr1: registers.idr1,
                idr3: registers.idr3,
                idr5: registers.idr5,
            }
        }
        TableCaps::Vtd(caps) => {
            let registers = caps.registers();
            Property::HwIntelVtd { cap: registers.cap, ecap: registers.ecap }
        }
    }
}
