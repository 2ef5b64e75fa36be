//! PAGE_RESP: the answer to a page request.

use pgtable_formats::Pasid;

use crate::layout::{HeadLayout, PageResponseLayout};
use crate::request::{pasid, zero};
use crate::{DecodeError, EndpointId, RequestType};

/// Answer all page requests of one group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageResponse {
    /// The endpoint that asked.
    pub endpoint: EndpointId,
    /// The PASID that it asked for.
    pub pasid: Option<Pasid>,
    /// The group.
    pub group_id: u16,
    /// The answer.
    pub code: PageResponseCode,
}

/// What a page response says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageResponseCode {
    /// The pages are there now: try again.
    Success,
    /// The access is not allowed.
    Invalid,
    /// The fault could not be handled, nor will later ones be.
    Failure,
}

impl PageResponse {
    const PASID_VALID: u32 = 1;

    pub(crate) fn from_layout(layout: &PageResponseLayout) -> Result<Self, DecodeError> {
        let kind = RequestType::PageResponse;
        if !zero(&layout.reserved) {
            return Err(DecodeError::Reserved { kind });
        }
        let unknown = layout.flags.get() & !Self::PASID_VALID;
        if unknown != 0 {
            return Err(DecodeError::UnknownFlags { kind, flags: unknown.into() });
        }
        let pasid = match layout.flags.get() & Self::PASID_VALID {
            0 => None,
            _ => Some(pasid(kind, layout.pasid.get())?),
        };
        let code = PageResponseCode::from_number(layout.code.get()).ok_or(DecodeError::BadSelector {
            kind,
            field: "resp_code",
            value: layout.code.get().into(),
        })?;
        Ok(Self { endpoint: EndpointId(layout.endpoint.get()), pasid, group_id: layout.group_id.get(), code })
    }

    pub(crate) fn layout(&self, head: HeadLayout) -> PageResponseLayout {
        PageResponseLayout {
            head,
            endpoint: self.endpoint.0.into(),
            flags: self.pasid.map_or(0, |_| Self::PASID_VALID).into(),
            pasid: self.pasid.map_or(0, Pasid::value).into(),
            group_id: self.group_id.into(),
            code: self.code.number().into(),
            reserved: [0; 8],
        }
    }
}

impl PageResponseCode {
    const fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            0 => Self::Success,
            1 => Self::Invalid,
            2 => Self::Failure,
            _ => return None,
        })
    }

    const fn number(self) -> u16 {
        match self {
            Self::Success => 0,
            Self::Invalid => 1,
            Self::Failure => 2,
        }
    }
}
