//! Why a request, or a write of the driver, was not done.

use pgtable_formats::context::{smmuv3, vtd};
use viommu_wire::{
    DecodeError, DomainId, DomainRange, EndpointId, Features, Gpa, Iova, IovaRange, Pasid, RequestType,
    Status,
};

use crate::domain::DomainKind;
use crate::host::{HostError, Stopped};

/// Why a request was not done, for people; [`status`](Self::status) is what the guest sees of it.
///
/// A request that was rejected has changed nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// The device-readable part is not a request.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The device-writable part cannot hold a tail (D-11).
    #[error("{length} writable bytes cannot hold a tail")]
    NoTail {
        /// Length in bytes of the device-writable part.
        length: usize,
    },
    /// A type that the features do not include (D-10, D-45).
    #[error("{} is not among the features", .0.name())]
    NotAvailable(RequestType),
    /// MAP or UNMAP without the feature MAP_UNMAP.
    #[error("{} needs the feature MAP_UNMAP, which was not negotiated", .0.name())]
    NoMapUnmap(RequestType),
    /// The flag needs a feature that was not negotiated, which makes it an unknown one (D-18, D-32).
    #[error("{}: flag of the feature {feature:?}, which was not negotiated", kind.name())]
    FlagNotNegotiated {
        /// The kind of request.
        kind: RequestType,
        /// What it needs.
        feature: Features,
    },
    /// The endpoint does not exist (D-19, D-26, D-44).
    #[error("endpoint {0} does not exist")]
    NoEndpoint(EndpointId),
    /// The domain ID is not one that a driver may use.
    #[error("domain {domain} is not in {}-{}", range.first(), range.last())]
    DomainOutOfRange {
        /// The domain.
        domain: DomainId,
        /// The IDs that may be used.
        range: DomainRange,
    },
    /// The domain does not exist (D-33, D-39).
    #[error("domain {0} does not exist")]
    NoDomain(DomainId),
    /// The domain exists and is of another kind (D-21, D-34, D-40).
    #[error("domain {domain} is a {found} domain")]
    WrongKind {
        /// The domain.
        domain: DomainId,
        /// Its kind.
        found: DomainKind,
    },
    /// The endpoint is not in the domain (D-27).
    #[error("endpoint {endpoint} is not in domain {domain}")]
    NotAttached {
        /// The endpoint.
        endpoint: EndpointId,
        /// The domain.
        domain: DomainId,
    },
    /// The domain has mappings where the endpoint has a reserved region (D-23).
    #[error("domain {domain} has mappings in the reserved region {region} of endpoint {endpoint}")]
    Incompatible {
        /// The endpoint.
        endpoint: EndpointId,
        /// The domain.
        domain: DomainId,
        /// The region.
        region: IovaRange,
    },
    /// The last address lies before the first.
    #[error("the range ends at {last}, before its start {start}")]
    Inverted {
        /// First address.
        start: Iova,
        /// Last address.
        last: Iova,
    },
    /// The input or the output range does not consist of whole pages (D-30).
    #[error("{range} to {output} is not aligned to the granule of 2^{granule_lg2} bytes")]
    Misaligned {
        /// The input range.
        range: IovaRange,
        /// The first output address.
        output: Gpa,
        /// log2 of the page size in bytes.
        granule_lg2: u32,
    },
    /// The output range leaves the 64-bit space.
    #[error("{range} to {output} leaves the 64-bit space")]
    OutputWraps {
        /// The input range.
        range: IovaRange,
        /// The first output address.
        output: Gpa,
    },
    /// Addresses that cannot be mapped (D-15).
    #[error("{range} is not in the input range {input_range}")]
    OutsideInputRange {
        /// The range.
        range: IovaRange,
        /// What can be mapped.
        input_range: IovaRange,
    },
    /// The range lies in a reserved region of an endpoint of the domain (D-37).
    #[error("{range} overlaps the reserved region {region}")]
    ReservedRegion {
        /// The range.
        range: IovaRange,
        /// The region.
        region: IovaRange,
    },
    /// Part of the range is mapped (D-31).
    #[error("part of {0} is mapped")]
    Overlap(IovaRange),
    /// A mapping lies partly in the range to unmap (D-41).
    #[error("a mapping lies partly in {0}")]
    Split(IovaRange),
    /// A limit is reached.
    #[error("{0} limit of {1} is reached")]
    Limit(Resource, usize),
    /// The endpoint does not take tables of this format.
    #[error("endpoint {endpoint} takes no tables of format {format:#x}")]
    Format {
        /// The endpoint.
        endpoint: EndpointId,
        /// The format.
        format: u8,
    },
    /// The endpoint's PASIDs are narrower.
    #[error("PASID {pasid} has more than {bits} bits")]
    PasidTooWide {
        /// The PASID.
        pasid: Pasid,
        /// The endpoint's width.
        bits: u8,
    },
    /// The two stream table entry words do not name a table that this SMMUv3 walks.
    #[error("stream table entry: {0}")]
    Smmuv3(smmuv3::SteRefusal),
    /// The registers do not describe page tables that this SMMUv3 walks.
    #[error("page table: {0}")]
    Smmuv3PageTable(smmuv3::PageTableRefusal),
    /// The numbers do not name a table that this VT-d unit walks.
    #[error("VT-d table: {0}")]
    Vtd(vtd::Refusal),
    /// Nothing is bound for the PASID that is to be unbound.
    #[error("endpoint {endpoint} has no page table bound for PASID {pasid}")]
    NotBound {
        /// The endpoint.
        endpoint: EndpointId,
        /// The PASID.
        pasid: Pasid,
    },
    /// There is no such group of page requests, or the driver was not told of all of it yet.
    #[error("endpoint {endpoint} has no group {group} of page requests that waits for this answer")]
    NoPageRequest {
        /// The endpoint.
        endpoint: EndpointId,
        /// The PASID; `None` for untagged accesses.
        pasid: Option<Pasid>,
        /// The group.
        group: u16,
    },
    /// The properties area is smaller than `probe_size` (D-49).
    #[error("PROBE has {length} writable bytes and needs {needed}")]
    ShortProbe {
        /// Length in bytes of the device-writable part.
        length: usize,
        /// What it needs.
        needed: usize,
    },
    /// The host could not do it.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The host could not invalidate, not even all of the endpoint. What it could is done. NOMEM where it lacked
    /// resources, which may be there later; otherwise DEVERR.
    #[error("invalidation {0}")]
    Invalidate(#[from] Stopped),
}

/// What a guest can use up, see [`Limits`](crate::Limits).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Resource {
    /// `max_domains`.
    Domains,
    /// `max_mappings_per_domain`.
    MappingsPerDomain,
    /// `max_mappings`.
    Mappings,
    /// `max_bound_pasids_per_endpoint`.
    PasidsPerEndpoint,
    /// `max_bound_pasids`.
    Pasids,
}

impl Rejection {
    /// The status that the guest gets; `None` where the request is returned unwritten, with a used length of 0.
    pub const fn status(&self) -> Option<Status> {
        Some(match self {
            Self::NoTail { .. } | Self::NotAvailable(_) => return None,
            Self::Decode(error) => return error.status(),
            Self::NoEndpoint(_) | Self::NoDomain(_) | Self::NotBound { .. } | Self::NoPageRequest { .. } => {
                Status::NoEnt
            }
            Self::FlagNotNegotiated { .. }
            | Self::WrongKind { .. }
            | Self::NotAttached { .. }
            | Self::ReservedRegion { .. }
            | Self::Overlap(_)
            | Self::ShortProbe { .. } => Status::Inval,
            Self::DomainOutOfRange { .. }
            | Self::Inverted { .. }
            | Self::Misaligned { .. }
            | Self::OutputWraps { .. }
            | Self::OutsideInputRange { .. }
            | Self::Split(_) => Status::Range,
            Self::NoMapUnmap(_)
            | Self::Incompatible { .. }
            | Self::Format { .. }
            | Self::PasidTooWide { .. } => Status::Unsupp,
            Self::Smmuv3(refusal) => refused(refusal.is_unsupported()),
            Self::Smmuv3PageTable(refusal) => refused(refusal.is_unsupported()),
            Self::Vtd(refusal) => refused(refusal.is_unsupported()),
            Self::Limit(..)
            | Self::Host(HostError::NoMemory)
            | Self::Invalidate(Stopped { error: HostError::NoMemory, .. }) => Status::NoMem,
            Self::Host(HostError::Unsupported) => Status::Unsupp,
            Self::Host(HostError::BadAddress) => Status::Inval,
            Self::Host(HostError::Failed(_)) | Self::Invalidate(_) => Status::DevErr,
        })
    }
}

const fn refused(unsupported: bool) -> Status {
    if unsupported { Status::Unsupp } else { Status::Inval }
}

impl core::fmt::Display for Resource {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Domains => "domain",
            Self::MappingsPerDomain => "mapping per domain",
            Self::Mappings => "mapping",
            Self::PasidsPerEndpoint => "bound PASID per endpoint",
            Self::Pasids => "bound PASID",
        })
    }
}

/// The driver accepted features that were not offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("features {0:?} were not offered")]
pub struct FeatureError(pub Features);

/// Why a write of the driver to the configuration space had no effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigWriteError {
    /// Something other than `bypass`.
    #[error("{length} bytes at offset {offset} are not the writable field")]
    ReadOnly {
        /// Offset in bytes.
        offset: usize,
        /// Length in bytes.
        length: usize,
    },
    /// BYPASS_CONFIG was not negotiated.
    #[error("BYPASS_CONFIG was not negotiated")]
    NotNegotiated,
    /// Neither 0 nor 1 (D-7, R-2).
    #[error("bypass cannot be {0}")]
    Value(u8),
    /// The host could not do it; every endpoint is as it was.
    #[error(transparent)]
    Host(#[from] HostError),
}
