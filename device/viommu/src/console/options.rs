//! The console's command line, and the machine that it asks for.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context as _, bail, ensure};
use clap::{ArgAction, Args};
use pgtable_formats::context::{smmuv3, vtd};
use pgtable_formats::{Gpa, Iova, IovaRange};
use viommu_device::host::EndpointCaps;
use viommu_device::{DeviceConfig, Limits};
use viommu_wire::{DomainId, DomainRange, EndpointId, Features, ReservedKind, ReservedRegion};

use crate::capture::{Capture, IdRegisters, PAGE};
use crate::machine::Setup;
use crate::notation;

/// The device at a prompt: one command a line on standard input, one answer a line on standard output.
///
/// Numbers go in as decimal or with 0x; addresses come out as lower-case 0x hex; byte strings (HEX) are bare hex in the
/// order of memory. Empty lines and lines that start with # are passed over. What goes wrong is answered `error REASON`,
/// and the console goes on; it ends with its input. Why the device rejected a request goes to standard error.
#[derive(Args, Clone, Debug)]
#[command(after_long_help = COMMANDS, verbatim_doc_comment)]
pub(crate) struct Options {
    /// An endpoint, and the tables that its hardware walks: smmuv3 (default), vtd or none. May be repeated, and
    /// replaces the default: 8 and 9 with smmuv3, 16 with vtd.
    #[arg(long, value_name = "ID[:KIND]", value_parser = endpoint)]
    endpoint: Vec<(EndpointId, Kind)>,
    /// A reserved region of an endpoint: ID:msi:A-B or ID:reserved:A-B, both ends inside; ID:none for no region. May be
    /// repeated, and replaces the default of that endpoint: 8 and 9 have msi:0x8000000-0x80fffff.
    #[arg(long, value_name = "ID:KIND:A-B", value_parser = reserved)]
    resv: Vec<(EndpointId, Option<ReservedRegion>)>,
    /// Where guest memory starts, and its size in bytes, or with K, M or G. Default: 0x40000000:256M.
    #[arg(long, value_name = "BASE:SIZE", value_parser = memory, conflicts_with = "capture")]
    memory: Option<(Gpa, Gpa)>,
    /// The lowest bit is the granule of MAP, the others are hints.
    #[arg(long, value_name = "MASK", value_parser = notation::number, default_value = "0xfffffffffffff000")]
    page_size_mask: u64,
    /// Addresses that MAP takes. Default: 0 to 2^48-1, or all where INPUT_RANGE is not offered.
    #[arg(long, value_name = "A-B", value_parser = iova_range)]
    input_range: Option<IovaRange>,
    /// Domain IDs that a driver may use.
    #[arg(long, value_name = "A-B", value_parser = domain_range, default_value = "0-0xffffffff")]
    domain_range: DomainRange,
    /// Whether unattached endpoints start in bypass: 0 or 1.
    #[arg(long, value_name = "0|1", value_parser = flag, default_value = "0", action = ArgAction::Set)]
    bypass: bool,
    /// Device-type features to offer. Those of the transport (VERSION_1, INDIRECT_DESC, EVENT_IDX) always are. Default:
    /// all that the device has.
    #[arg(long, value_name = "HEX", value_parser = features)]
    features: Option<Features>,
    /// A bound on what the guest can make grow, such as max_domains=16. May be repeated. Names: max_domains,
    /// max_mappings_per_domain, max_mappings, max_pending_events, max_bound_pasids_per_endpoint, max_bound_pasids,
    /// max_page_requests_per_endpoint, max_page_requests.
    #[arg(long, value_name = "NAME=VALUE", value_parser = limit)]
    limit: Vec<(Limit, usize)>,
    /// An ID register of the hardware that walks tables: idr0, idr1, idr3, idr5 (SMMUv3), cap, ecap (VT-d). May be
    /// repeated. Default: all that this program's walker does, or what the capture says.
    #[arg(long, value_name = "NAME=VALUE", value_parser = register)]
    register: Vec<(Register, u64)>,
    /// An endpoint whose accesses can wait for a page: PAGE_REQUEST is offered then. May be repeated. Default: none.
    #[arg(long, value_name = "ID", value_parser = notation::number32)]
    page_requests: Vec<u32>,
    /// How long the driver may take to answer page requests, in the time of the command `time`; then they are answered
    /// INVALID. Default: 10 seconds.
    #[arg(long, value_name = "NS", value_parser = notation::number)]
    page_request_timeout: Option<u64>,
    /// Nothing of guest tables is cached: changes show without INVALIDATE.
    #[arg(long)]
    strict: bool,
    /// Takes endpoints, ID registers and guest memory from a capture. `bind ENDPOINT` then binds its captured table.
    #[arg(long, value_name = "DIR", conflicts_with = "endpoint")]
    capture: Option<PathBuf>,
}

const COMMANDS: &str = "\
Commands:
  req HEX[,HEX...]|- W[,W...]|-  Sends a request: HEX is the device-readable part, W the length of the device-writable
                                 one; each comma-separated part is a descriptor. A part that is empty (or 0) is a
                                 descriptor of length 0; a side that is just - (or 0) has no descriptor. At most 1024
                                 parts, and 1 MiB on each side.
                                 Answers `used N HEX`: the used length and all of the writable part, zero-filled before.
  event N                        Offers an event buffer of N bytes, up to 4096. Answers `used N HEX`, or `none` where
                                 no event waits (no buffer stays posted then). A buffer that is too small is used with
                                 0 bytes, and the event waits for a larger one.
  mem GPA HEX                    Writes guest memory. Answers `ok`.
  peek GPA N                     Reads N bytes of guest memory, 1 to 65536. Answers HEX.
  dma ENDPOINT PASID|- IOVA N r|w
                                 An access of N bytes, up to 16 MiB, with a PASID or without. Answers `ok GPA...`, where
                                 each contiguous piece starts, or `fault REASON`: the architecture's name for a guest's
                                 table (F_TRANSLATION, C_BAD_CD; for VT-d the fault reason number, 0x71), else unmapped,
                                 permission or unattached. A fault waits as an event.
  dma ENDPOINT PASID|- IOVA N r|w wait
                                 The same by a device that can wait: where a page is missing, and the endpoint has page
                                 requests, the answer is `waits K`, and an event tells of it. K numbers these accesses,
                                 from 1 on; 1024 are kept.
  again K                        Access K once more. Answers as dma does, `waits K` while there is no answer, or `failed`:
                                 it was answered INVALID or FAILURE, by the driver or by the device.
  waiting                        Answers `none`, or the accesses that wait, one behind the other:
                                 `K ENDPOINT PASID|- IOVA N r|w GROUP,`, where GROUP is what the answer names.
  respond ENDPOINT PASID|- GROUP success|invalid|failure
                                 Answers a group of page requests, by PAGE_RESP. Answers as req does. The driver must
                                 have been told of the group, by `event 48`.
  time NS                        Says what time it is, in nanoseconds. Page requests whose time is over are answered
                                 INVALID. Answers `due NS`: when this is to be said next, or `due never`.
  features                       Answers `features HEX`: what is offered.
  accept HEX                     Resets the device and accepts these features; VERSION_1 need not be said. Answers `ok`.
                                 At the start, everything offered is accepted.
  config OFFSET N                Reads N bytes of the configuration space, 1 to 4096. Answers `config HEX`; beyond its
                                 end are zeros.
  config-write OFFSET HEX        Writes the configuration space. Answers `ok`.
  reset                          Resets the device and accepts again what was accepted last. Answers `ok`.
  bind ENDPOINT                  With --capture: binds the captured table of an endpoint with ATTACH_TABLE. The domain
                                 is the endpoint's place in the capture, from 1 on. Answers as req does.
  help                           Names the commands, in one line.";

/// What walks the tables of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Smmuv3,
    Vtd,
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Idr0,
    Idr1,
    Idr3,
    Idr5,
    Cap,
    Ecap,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Limit {
    Domains,
    MappingsPerDomain,
    Mappings,
    PendingEvents,
    BoundPasidsPerEndpoint,
    BoundPasids,
    PageRequestsPerEndpoint,
    PageRequests,
}

const DEFAULT_ENDPOINTS: [(EndpointId, Kind); 3] =
    [(EndpointId(8), Kind::Smmuv3), (EndpointId(9), Kind::Smmuv3), (EndpointId(16), Kind::Vtd)];
const DEFAULT_MEMORY: (Gpa, Gpa) = (Gpa(0x4000_0000), Gpa(0x4fff_ffff));
const DEFAULT_MSI: (u64, u64) = (0x800_0000, 0x80f_ffff);
const DEFAULT_MSI_ENDPOINTS: [EndpointId; 2] = [EndpointId(8), EndpointId(9)];

impl Options {
    /// The machine that the options describe, and the capture whose memory is to be loaded into it.
    pub(super) fn setup(&self) -> anyhow::Result<(Setup, Option<Capture>)> {
        let capture = self.capture.as_deref().map(Capture::load).transpose()?;
        let mut endpoints = match &capture {
            Some(capture) => self.captured_endpoints(capture)?,
            None => self.plain_endpoints()?,
        };
        self.reserve(&mut endpoints)?;
        self.let_wait(&mut endpoints)?;
        let memory = match &capture {
            Some(capture) => capture.memory,
            None => self.memory.unwrap_or(DEFAULT_MEMORY),
        };
        let endpoints = endpoints.into_iter().collect();
        Ok((Setup { memory, endpoints, config: self.config(), strict: self.strict }, capture))
    }

    fn config(&self) -> DeviceConfig {
        let default = DeviceConfig::default();
        let features = self.features.unwrap_or(default.features);
        let input_range = match self.input_range {
            Some(range) => range,
            None if features.contains(Features::INPUT_RANGE) => default.input_range,
            None => IovaRange::ALL,
        };
        let mut limits = default.limits;
        for &(limit, value) in &self.limit {
            *limit.field(&mut limits) = value;
        }
        DeviceConfig {
            features,
            page_size_mask: self.page_size_mask,
            input_range,
            domain_range: self.domain_range,
            bypass: self.bypass,
            limits,
            page_request_timeout_ns: self.page_request_timeout.unwrap_or(default.page_request_timeout_ns),
            ..default
        }
    }

    fn plain_endpoints(&self) -> anyhow::Result<BTreeMap<EndpointId, EndpointCaps>> {
        let listed = if self.endpoint.is_empty() { &DEFAULT_ENDPOINTS[..] } else { &self.endpoint };
        let mut smmu = IdRegisters::Smmuv3(smmuv3::IdRegisters::SOFTWARE);
        let mut vtd = IdRegisters::Vtd(vtd::CapRegisters::SOFTWARE);
        for &(register, value) in &self.register {
            let (target, kind) = match register.kind() {
                Kind::Smmuv3 => (&mut smmu, Kind::Smmuv3),
                _ => (&mut vtd, Kind::Vtd),
            };
            ensure!(
                listed.iter().any(|&(_, listed)| listed == kind),
                "no endpoint has register {}",
                register.name()
            );
            register.replace(target, value)?;
        }
        let mut endpoints = BTreeMap::new();
        for &(id, kind) in listed {
            let tables = match kind {
                Kind::Smmuv3 => Some(smmu.caps()),
                Kind::Vtd => Some(vtd.caps()),
                Kind::None => None,
            };
            let known = endpoints.insert(id, EndpointCaps { tables, ..EndpointCaps::default() });
            ensure!(known.is_none(), "endpoint {id} is listed twice");
        }
        let (first, last) = DEFAULT_MSI;
        let range = IovaRange::new(Iova(first), Iova(last)).context("empty range")?;
        for id in DEFAULT_MSI_ENDPOINTS {
            if let Some(caps) = endpoints.get_mut(&id) {
                caps.reserved.push(ReservedRegion { kind: ReservedKind::Msi, range });
            }
        }
        Ok(endpoints)
    }

    fn captured_endpoints(&self, capture: &Capture) -> anyhow::Result<BTreeMap<EndpointId, EndpointCaps>> {
        let mut registers = capture.registers;
        for &(register, value) in &self.register {
            register.replace(&mut registers, value)?;
        }
        Ok(capture.caps(registers).into_iter().collect())
    }

    fn reserve(&self, endpoints: &mut BTreeMap<EndpointId, EndpointCaps>) -> anyhow::Result<()> {
        for (id, _) in &self.resv {
            let Some(caps) = endpoints.get_mut(id) else { bail!("--resv: there is no endpoint {id}") };
            caps.reserved.clear();
        }
        for &(id, region) in &self.resv {
            if let Some(caps) = endpoints.get_mut(&id) {
                caps.reserved.extend(region);
            }
        }
        Ok(())
    }

    fn let_wait(&self, endpoints: &mut BTreeMap<EndpointId, EndpointCaps>) -> anyhow::Result<()> {
        for id in &self.page_requests {
            let caps = endpoints.get_mut(&EndpointId(*id));
            caps.with_context(|| format!("--page-requests: there is no endpoint {id}"))?.page_requests = true;
        }
        Ok(())
    }
}

impl Register {
    const ALL: [Self; 6] = [Self::Idr0, Self::Idr1, Self::Idr3, Self::Idr5, Self::Cap, Self::Ecap];

    const fn name(self) -> &'static str {
        match self {
            Self::Idr0 => "idr0",
            Self::Idr1 => "idr1",
            Self::Idr3 => "idr3",
            Self::Idr5 => "idr5",
            Self::Cap => "cap",
            Self::Ecap => "ecap",
        }
    }

    const fn kind(self) -> Kind {
        match self {
            Self::Idr0 | Self::Idr1 | Self::Idr3 | Self::Idr5 => Kind::Smmuv3,
            Self::Cap | Self::Ecap => Kind::Vtd,
        }
    }

    fn replace(self, registers: &mut IdRegisters, value: u64) -> anyhow::Result<()> {
        let narrow = || u32::try_from(value).with_context(|| format!("register {} has 32 bits", self.name()));
        match (registers, self) {
            (IdRegisters::Smmuv3(registers), Self::Idr0) => registers.idr0 = narrow()?,
            (IdRegisters::Smmuv3(registers), Self::Idr1) => registers.idr1 = narrow()?,
            (IdRegisters::Smmuv3(registers), Self::Idr3) => registers.idr3 = narrow()?,
            (IdRegisters::Smmuv3(registers), Self::Idr5) => registers.idr5 = narrow()?,
            (IdRegisters::Vtd(registers), Self::Cap) => registers.cap = value,
            (IdRegisters::Vtd(registers), Self::Ecap) => registers.ecap = value,
            _ => bail!("no endpoint has register {}", self.name()),
        }
        Ok(())
    }
}

impl Limit {
    const ALL: [Self; 8] = [
        Self::Domains,
        Self::MappingsPerDomain,
        Self::Mappings,
        Self::PendingEvents,
        Self::BoundPasidsPerEndpoint,
        Self::BoundPasids,
        Self::PageRequestsPerEndpoint,
        Self::PageRequests,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Domains => "max_domains",
            Self::MappingsPerDomain => "max_mappings_per_domain",
            Self::Mappings => "max_mappings",
            Self::PendingEvents => "max_pending_events",
            Self::BoundPasidsPerEndpoint => "max_bound_pasids_per_endpoint",
            Self::BoundPasids => "max_bound_pasids",
            Self::PageRequestsPerEndpoint => "max_page_requests_per_endpoint",
            Self::PageRequests => "max_page_requests",
        }
    }

    fn field(self, limits: &mut Limits) -> &mut usize {
        match self {
            Self::Domains => &mut limits.max_domains,
            Self::MappingsPerDomain => &mut limits.max_mappings_per_domain,
            Self::Mappings => &mut limits.max_mappings,
            Self::PendingEvents => &mut limits.max_pending_events,
            Self::BoundPasidsPerEndpoint => &mut limits.max_bound_pasids_per_endpoint,
            Self::BoundPasids => &mut limits.max_bound_pasids,
            Self::PageRequestsPerEndpoint => &mut limits.max_page_requests_per_endpoint,
            Self::PageRequests => &mut limits.max_page_requests,
        }
    }
}

fn endpoint(text: &str) -> anyhow::Result<(EndpointId, Kind)> {
    let (id, kind) = text.split_once(':').unwrap_or((text, "smmuv3"));
    let kind = match kind {
        "smmuv3" => Kind::Smmuv3,
        "vtd" => Kind::Vtd,
        "none" => Kind::None,
        other => bail!("`{other}` is none of smmuv3, vtd, none"),
    };
    Ok((EndpointId(notation::number32(id)?), kind))
}

fn reserved(text: &str) -> anyhow::Result<(EndpointId, Option<ReservedRegion>)> {
    let (id, region) = text.split_once(':').context("not ID:KIND:A-B")?;
    let id = EndpointId(notation::number32(id)?);
    if region == "none" {
        return Ok((id, None));
    }
    let (kind, range) = region.split_once(':').context("not ID:KIND:A-B")?;
    let kind = match kind {
        "msi" => ReservedKind::Msi,
        "reserved" => ReservedKind::Reserved,
        other => bail!("`{other}` is neither msi nor reserved"),
    };
    Ok((id, Some(ReservedRegion { kind, range: iova_range(range)? })))
}

fn memory(text: &str) -> anyhow::Result<(Gpa, Gpa)> {
    let (base, size) = text.split_once(':').context("not BASE:SIZE")?;
    let (base, size) = (notation::number(base)?, notation::size(size)?);
    ensure!(base.is_multiple_of(PAGE) && size.is_multiple_of(PAGE), "not a multiple of {PAGE}");
    let last = size.checked_sub(1).context("memory has no size")?;
    Ok((Gpa(base), Gpa(base.checked_add(last).context("memory wraps at 2^64")?)))
}

fn iova_range(text: &str) -> anyhow::Result<IovaRange> {
    let (first, last) = notation::range(text)?;
    IovaRange::new(Iova(first), Iova(last)).context("the range ends before it starts")
}

fn domain_range(text: &str) -> anyhow::Result<DomainRange> {
    let (first, last) = notation::range(text)?;
    let (first, last) = (u32::try_from(first)?, u32::try_from(last)?);
    DomainRange::new(DomainId(first), DomainId(last)).context("the range ends before it starts")
}

fn flag(text: &str) -> anyhow::Result<bool> {
    match text {
        "0" => Ok(false),
        "1" => Ok(true),
        _ => bail!("neither 0 nor 1"),
    }
}

fn features(text: &str) -> anyhow::Result<Features> {
    let bits = notation::hex_number(text)?;
    let features = Features::from_bits_retain(bits);
    let unknown = features.difference(DeviceConfig::ALL_FEATURES);
    ensure!(unknown.is_empty(), "the device does not have bits {:#x}", unknown.bits());
    Ok(features)
}

fn limit(text: &str) -> anyhow::Result<(Limit, usize)> {
    let (name, value) = text.split_once('=').context("not NAME=VALUE")?;
    let limit = Limit::ALL.into_iter().find(|limit| limit.name() == name);
    let limit = limit.with_context(|| format!("there is no limit `{name}`"))?;
    Ok((limit, usize::try_from(notation::number(value)?)?))
}

fn register(text: &str) -> anyhow::Result<(Register, u64)> {
    let (name, value) = text.split_once('=').context("not NAME=VALUE")?;
    let register = Register::ALL.into_iter().find(|register| register.name() == name);
    let register = register.with_context(|| format!("there is no register `{name}`"))?;
    Ok((register, notation::number(value)?))
}
