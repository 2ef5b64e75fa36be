//! Requests: from bytes to meaning on the device's side, from meaning to bytes on the guest's.

use core::ops::Deref;

use pgtable_formats::{Gpa, Iova, IovaRange, Pasid};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::layout::{
    AttachLayout, AttachTableLayout, DetachLayout, HeadLayout, MapLayout, ProbeLayout, UnmapLayout,
};
use crate::{DecodeError, DomainId, EndpointId, Invalidate, PageResponse, RequestType, TableDescriptor};

/// One request, all its values legal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Attach an endpoint to a domain.
    Attach(Attach),
    /// Detach an endpoint from its domain.
    Detach(Detach),
    /// Make a mapping.
    Map(Map),
    /// Remove mappings.
    Unmap(Unmap),
    /// Ask for the properties of an endpoint.
    Probe(Probe),
    /// Bind the guest's own table.
    AttachTable(AttachTable),
    /// Drop what was cached of the guest's own tables.
    Invalidate(Invalidate),
    /// Answer a page request.
    PageResponse(PageResponse),
}

/// Attach `endpoint` to `domain`, which the first ATTACH creates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attach {
    /// The domain.
    pub domain: DomainId,
    /// The endpoint.
    pub endpoint: EndpointId,
    /// What kind of domain.
    pub flags: AttachFlags,
}

bitflags::bitflags! {
    /// Flags of ATTACH.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct AttachFlags: u32 {
        /// A bypass domain: identity translation, no mappings. Needs `BYPASS_CONFIG`.
        const BYPASS = 1 << 0;
    }
}

/// Detach `endpoint` from `domain`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Detach {
    /// The domain that the endpoint is attached to.
    pub domain: DomainId,
    /// The endpoint.
    pub endpoint: EndpointId,
}

/// Map `virt_start..=virt_end` of `domain` to the guest-physical addresses from `phys_start` on.
///
/// The range may be inverted: the order of checks puts that after the look-up of the domain, see [`Map::range`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Map {
    /// The domain.
    pub domain: DomainId,
    /// First address.
    pub virt_start: Iova,
    /// Last address.
    pub virt_end: Iova,
    /// Where the first address leads.
    pub phys_start: Gpa,
    /// What accesses the mapping permits.
    pub flags: MapFlags,
}

bitflags::bitflags! {
    /// Flags of MAP.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct MapFlags: u32 {
        /// The device may read.
        const READ = 1 << 0;
        /// The device may write.
        const WRITE = 1 << 1;
        /// The target is device registers, not memory. Needs the feature `MMIO`.
        const MMIO = 1 << 2;
    }
}

impl Map {
    /// The range, unless its end lies before its start.
    #[inline]
    pub const fn range(&self) -> Option<IovaRange> {
        IovaRange::new(self.virt_start, self.virt_end)
    }
}

/// Remove every mapping of `domain` inside `virt_start..=virt_end`. As in [`Map`], the range may be inverted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unmap {
    /// The domain.
    pub domain: DomainId,
    /// First address.
    pub virt_start: Iova,
    /// Last address.
    pub virt_end: Iova,
}

impl Unmap {
    /// The range, unless its end lies before its start.
    #[inline]
    pub const fn range(&self) -> Option<IovaRange> {
        IovaRange::new(self.virt_start, self.virt_end)
    }
}

/// Ask for the properties of `endpoint`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The endpoint.
    pub endpoint: EndpointId,
}

/// Bind the guest's own table: attach `endpoint` to `domain`, which translates through `table`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachTable {
    /// The domain.
    pub domain: DomainId,
    /// The endpoint.
    pub endpoint: EndpointId,
    /// The table.
    pub table: TableDescriptor,
}

impl Request {
    /// Longest device-readable part of any request, in bytes.
    pub const MAX_READABLE_LEN: usize = size_of::<AttachTableLayout>();

    /// Decodes the device-readable part. Bytes beyond what the type needs are ignored.
    ///
    /// # Errors
    /// The first rule that the bytes break: length, then reserved bytes and flags, then values.
    #[inline]
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let kind = Self::peek(bytes)?;
        match kind {
            RequestType::Attach => Attach::from_layout(&layout(kind, bytes)?).map(Self::Attach),
            RequestType::Detach => Ok(Self::Detach(Detach::from_layout(&layout(kind, bytes)?))),
            RequestType::Map => Map::from_layout(&layout(kind, bytes)?).map(Self::Map),
            RequestType::Unmap => Unmap::from_layout(&layout(kind, bytes)?).map(Self::Unmap),
            RequestType::Probe => {
                let layout: ProbeLayout = layout(kind, bytes)?;
                Ok(Self::Probe(Probe { endpoint: EndpointId(layout.endpoint.get()) }))
            }
            RequestType::AttachTable => {
                AttachTable::from_layout(&layout(kind, bytes)?).map(Self::AttachTable)
            }
            RequestType::Invalidate => Invalidate::from_layout(&layout(kind, bytes)?).map(Self::Invalidate),
            RequestType::PageResponse => {
                PageResponse::from_layout(&layout(kind, bytes)?).map(Self::PageResponse)
            }
        }
    }

    /// The kind that the head names, without a look at the rest.
    ///
    /// # Errors
    /// [`DecodeError::NoHead`] and [`DecodeError::UnknownType`].
    #[inline]
    pub fn peek(bytes: &[u8]) -> Result<RequestType, DecodeError> {
        let Ok((head, _)) = HeadLayout::read_from_prefix(bytes) else {
            return Err(DecodeError::NoHead { length: bytes.len() });
        };
        RequestType::from_number(head.kind).ok_or(DecodeError::UnknownType { kind: head.kind })
    }

    /// The kind of this request.
    pub const fn kind(&self) -> RequestType {
        match self {
            Self::Attach(_) => RequestType::Attach,
            Self::Detach(_) => RequestType::Detach,
            Self::Map(_) => RequestType::Map,
            Self::Unmap(_) => RequestType::Unmap,
            Self::Probe(_) => RequestType::Probe,
            Self::AttachTable(_) => RequestType::AttachTable,
            Self::Invalidate(_) => RequestType::Invalidate,
            Self::PageResponse(_) => RequestType::PageResponse,
        }
    }

    /// The device-readable part, as a driver sends it.
    pub fn encode(&self) -> Encoded {
        let head = HeadLayout { kind: self.kind().number(), reserved: [0; 3] };
        match self {
            Self::Attach(attach) => Encoded::new(&AttachLayout {
                head,
                domain: attach.domain.0.into(),
                endpoint: attach.endpoint.0.into(),
                flags: attach.flags.bits().into(),
                reserved: [0; 4],
            }),
            Self::Detach(detach) => Encoded::new(&DetachLayout {
                head,
                domain: detach.domain.0.into(),
                endpoint: detach.endpoint.0.into(),
                reserved: [0; 8],
            }),
            Self::Map(map) => Encoded::new(&MapLayout {
                head,
                domain: map.domain.0.into(),
                virt_start: map.virt_start.0.into(),
                virt_end: map.virt_end.0.into(),
                phys_start: map.phys_start.0.into(),
                flags: map.flags.bits().into(),
            }),
            Self::Unmap(unmap) => Encoded::new(&UnmapLayout {
                head,
                domain: unmap.domain.0.into(),
                virt_start: unmap.virt_start.0.into(),
                virt_end: unmap.virt_end.0.into(),
                reserved: [0; 4],
            }),
            Self::Probe(probe) => {
                Encoded::new(&ProbeLayout { head, endpoint: probe.endpoint.0.into(), reserved: [0; 64] })
            }
            Self::AttachTable(attach) => {
                let (format, descriptor) = attach.table.encode();
                Encoded::new(&AttachTableLayout {
                    head,
                    domain: attach.domain.0.into(),
                    endpoint: attach.endpoint.0.into(),
                    format,
                    reserved: [0; 3],
                    descriptor,
                })
            }
            Self::Invalidate(invalidate) => Encoded::new(&invalidate.layout(head)),
            Self::PageResponse(response) => Encoded::new(&response.layout(head)),
        }
    }
}

/// The bytes of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encoded {
    bytes: [u8; Request::MAX_READABLE_LEN],
    length: usize,
}

impl Encoded {
    fn new<L: IntoBytes + Immutable>(layout: &L) -> Self {
        const { assert!(size_of::<L>() <= Request::MAX_READABLE_LEN) };
        let mut bytes = [0; Request::MAX_READABLE_LEN];
        let length = size_of::<L>();
        bytes[..length].copy_from_slice(layout.as_bytes());
        Self { bytes, length }
    }
}

impl Deref for Encoded {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl AsRef<[u8]> for Encoded {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

#[inline]
fn layout<L: FromBytes + KnownLayout + Immutable + Unaligned>(
    kind: RequestType,
    bytes: &[u8],
) -> Result<L, DecodeError> {
    match L::read_from_prefix(bytes) {
        Ok((layout, _)) => Ok(layout),
        Err(_) => Err(DecodeError::Short { kind, length: bytes.len() }),
    }
}

/// Whether all bytes are zero.
#[inline]
pub(crate) fn zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte == 0)
}

impl Attach {
    #[inline]
    fn from_layout(layout: &AttachLayout) -> Result<Self, DecodeError> {
        let kind = RequestType::Attach;
        if !zero(&layout.reserved) {
            return Err(DecodeError::Reserved { kind }); // D-17
        }
        let flags = AttachFlags::from_bits(layout.flags.get()).ok_or(DecodeError::UnknownFlags {
            kind,
            flags: u64::from(layout.flags.get() & !AttachFlags::all().bits()),
        })?; // D-18
        Ok(Self { domain: DomainId(layout.domain.get()), endpoint: EndpointId(layout.endpoint.get()), flags })
    }
}

impl Detach {
    /// Reserved bytes are ignored (D-25).
    #[inline]
    fn from_layout(layout: &DetachLayout) -> Self {
        Self { domain: DomainId(layout.domain.get()), endpoint: EndpointId(layout.endpoint.get()) }
    }
}

impl Map {
    #[inline]
    fn from_layout(layout: &MapLayout) -> Result<Self, DecodeError> {
        let flags = MapFlags::from_bits(layout.flags.get()).ok_or(DecodeError::UnknownFlags {
            kind: RequestType::Map,
            flags: u64::from(layout.flags.get() & !MapFlags::all().bits()),
        })?; // D-32
        Ok(Self {
            domain: DomainId(layout.domain.get()),
            virt_start: Iova(layout.virt_start.get()),
            virt_end: Iova(layout.virt_end.get()),
            phys_start: Gpa(layout.phys_start.get()),
            flags,
        })
    }
}

impl Unmap {
    #[inline]
    fn from_layout(layout: &UnmapLayout) -> Result<Self, DecodeError> {
        if !zero(&layout.reserved) {
            return Err(DecodeError::Reserved { kind: RequestType::Unmap }); // D-38
        }
        Ok(Self {
            domain: DomainId(layout.domain.get()),
            virt_start: Iova(layout.virt_start.get()),
            virt_end: Iova(layout.virt_end.get()),
        })
    }
}

impl AttachTable {
    fn from_layout(layout: &AttachTableLayout) -> Result<Self, DecodeError> {
        if !zero(&layout.reserved) {
            return Err(DecodeError::Reserved { kind: RequestType::AttachTable });
        }
        Ok(Self {
            domain: DomainId(layout.domain.get()),
            endpoint: EndpointId(layout.endpoint.get()),
            table: TableDescriptor::decode(layout.format, &layout.descriptor)?,
        })
    }
}

pub(crate) fn pasid(kind: RequestType, value: u32) -> Result<Pasid, DecodeError> {
    Pasid::new(value).ok_or(DecodeError::WidePasid { kind, pasid: value })
}
