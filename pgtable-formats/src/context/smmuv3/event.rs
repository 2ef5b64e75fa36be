//! Events: what an SMMUv3 records when a transaction does not pass (IHI 0070, 7.3).

use core::fmt;

use crate::FaultClass;

/// An SMMUv3 event, by its architectural number (IHI 0070, 7.3; event record bits 7:0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs, reason = "the variants are the architecture's own names; `name` gives them")]
pub enum Event {
    FUut = 0x01,
    CBadStreamid = 0x02,
    FSteFetch = 0x03,
    CBadSte = 0x04,
    FBadAtsTreq = 0x05,
    FStreamDisabled = 0x06,
    FTranslForbidden = 0x07,
    CBadSubstreamid = 0x08,
    FCdFetch = 0x09,
    CBadCd = 0x0a,
    FWalkEabt = 0x0b,
    FTranslation = 0x10,
    FAddrSize = 0x11,
    FAccess = 0x12,
    FPermission = 0x13,
    FTlbConflict = 0x20,
    FCfgConflict = 0x21,
    EPageRequest = 0x24,
    FVmsFetch = 0x25,
}

impl Event {
    /// Every event, in the order of numbers.
    pub const ALL: [Self; 19] = [
        Self::FUut,
        Self::CBadStreamid,
        Self::FSteFetch,
        Self::CBadSte,
        Self::FBadAtsTreq,
        Self::FStreamDisabled,
        Self::FTranslForbidden,
        Self::CBadSubstreamid,
        Self::FCdFetch,
        Self::CBadCd,
        Self::FWalkEabt,
        Self::FTranslation,
        Self::FAddrSize,
        Self::FAccess,
        Self::FPermission,
        Self::FTlbConflict,
        Self::FCfgConflict,
        Self::EPageRequest,
        Self::FVmsFetch,
    ];

    /// The event of an event record's ID field; `None` for a number without a meaning.
    pub fn from_id(id: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|event| event.id() == id)
    }

    /// The architectural number.
    #[inline]
    pub const fn id(self) -> u8 {
        self as u8
    }

    /// The architecture's name, such as `F_TRANSLATION`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::FUut => "F_UUT",
            Self::CBadStreamid => "C_BAD_STREAMID",
            Self::FSteFetch => "F_STE_FETCH",
            Self::CBadSte => "C_BAD_STE",
            Self::FBadAtsTreq => "F_BAD_ATS_TREQ",
            Self::FStreamDisabled => "F_STREAM_DISABLED",
            Self::FTranslForbidden => "F_TRANSL_FORBIDDEN",
            Self::CBadSubstreamid => "C_BAD_SUBSTREAMID",
            Self::FCdFetch => "F_CD_FETCH",
            Self::CBadCd => "C_BAD_CD",
            Self::FWalkEabt => "F_WALK_EABT",
            Self::FTranslation => "F_TRANSLATION",
            Self::FAddrSize => "F_ADDR_SIZE",
            Self::FAccess => "F_ACCESS",
            Self::FPermission => "F_PERMISSION",
            Self::FTlbConflict => "F_TLB_CONFLICT",
            Self::FCfgConflict => "F_CFG_CONFLICT",
            Self::EPageRequest => "E_PAGE_REQUEST",
            Self::FVmsFetch => "F_VMS_FETCH",
        }
    }

    /// Whether `CD.R = 0` keeps the event from being recorded: it is one of the four faults of stage 1 whose handling
    /// `CD.{A,R,S}` configure (IHI 0070, 3.12, 5.4, 5.5). Configuration errors and aborts of the SMMU's own accesses,
    /// F_WALK_EABT among them, are always recorded.
    pub const fn heeds_r(self) -> bool {
        matches!(self, Self::FTranslation | Self::FAddrSize | Self::FAccess | Self::FPermission)
    }

    /// What the event means, in neutral words.
    pub const fn class(self) -> FaultClass {
        match self {
            Self::FTranslation | Self::EPageRequest => FaultClass::NotMapped,
            Self::FPermission | Self::FAccess => FaultClass::Permission,
            Self::FAddrSize => FaultClass::Malformed,
            Self::FSteFetch | Self::FCdFetch | Self::FWalkEabt | Self::FVmsFetch => FaultClass::TableAccess,
            Self::FUut
            | Self::CBadStreamid
            | Self::CBadSte
            | Self::FBadAtsTreq
            | Self::FStreamDisabled
            | Self::FTranslForbidden
            | Self::CBadSubstreamid
            | Self::CBadCd
            | Self::FTlbConflict
            | Self::FCfgConflict => FaultClass::Configuration,
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
