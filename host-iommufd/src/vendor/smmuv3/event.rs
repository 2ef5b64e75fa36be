//! Events, as `iommu_vevent_arm_smmuv3` hands them over.

use bitfield_struct::bitfield;
use pgtable_formats::context::smmuv3::Event;
use pgtable_formats::{AccessKind, Iova, Pasid};

/// What an event says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodedEvent {
    /// `virt_id` of the vDEVICE.
    pub vsid: u32,
    /// The PASID of the access, or the number of the descriptor that it met (C_BAD_SUBSTREAMID); `None`: untagged, or
    /// the event does not tell.
    pub pasid: Option<Pasid>,
    /// Its address; `None` where the event has none.
    pub address: Option<Iova>,
    /// What it did; [`AccessKind::Read`] where the event does not tell, as it tells no address then.
    pub kind: AccessKind,
    /// In privileged mode; `false` where the event does not tell.
    pub privileged: bool,
    /// What happened.
    pub event: Event,
}

/// Event record, bits 63:0 (IHI 0070, 7.3).
#[bitfield(u64)]
struct Word0 {
    /// Bits 7:0.
    id: u8,
    /// Bits 10:8.
    #[bits(3)]
    __: u8,
    /// Bit 11, SSV: the SubstreamID is valid.
    ssv: bool,
    /// Bits 31:12, SubstreamID.
    #[bits(20)]
    ssid: u32,
    /// Bits 63:32, StreamID.
    sid: u32,
}

/// Event record, bits 127:64, of an access.
#[bitfield(u64)]
struct Word1 {
    /// Bits 32:0: STAG and, in bit 31, STALL.
    #[bits(33)]
    __: u64,
    /// Bit 33, PnU: privileged.
    pnu: bool,
    /// Bit 34, InD: an instruction.
    ind: bool,
    /// Bit 35, RnW: a read.
    rnw: bool,
    /// Bits 38:36.
    #[bits(3)]
    __: u8,
    /// Bit 39, S2: stage 2 faulted.
    s2: bool,
    /// Bits 63:40: CLASS, TTRnW and what only other events have.
    #[bits(24)]
    __: u32,
}

/// Reads the 32 bytes of an event record.
///
/// `None` for what the kernel does not forward to a guest: events that are not about stage 1 (F_CD_FETCH and
/// F_WALK_EABT are the host's memory errors), faults of stage 2, numbers without a meaning.
pub fn decode(record: &[u64; 4]) -> Option<DecodedEvent> {
    let [word0, word1, input_address, _] = *record;
    let (word0, word1) = (Word0::from_bits(word0), Word1::from_bits(word1));
    let event = Event::from_id(word0.id())?;
    let ssid = Pasid::new(word0.ssid());
    let tagged = ssid.filter(|_| word0.ssv());
    let of_configuration = |pasid| DecodedEvent {
        vsid: word0.sid(),
        pasid,
        address: None,
        kind: AccessKind::Read,
        privileged: false,
        event,
    };
    match event {
        Event::CBadSte | Event::CBadCd => Some(of_configuration(tagged)),
        Event::FStreamDisabled => Some(of_configuration(None)),
        // Its SubstreamID is always valid; 0 may be that of an untagged access that uses descriptor 0 (IHI 0070, 7.3.9).
        Event::CBadSubstreamid => Some(of_configuration(ssid)),
        Event::FTranslation | Event::FAddrSize | Event::FAccess | Event::FPermission if !word1.s2() => {
            Some(DecodedEvent {
                address: Some(Iova(input_address)),
                kind: match (word1.rnw(), word1.ind()) {
                    (false, _) => AccessKind::Write,
                    (true, false) => AccessKind::Read,
                    (true, true) => AccessKind::Execute,
                },
                privileged: word1.pnu(),
                ..of_configuration(tagged)
            })
        }
        _ => None,
    }
}
