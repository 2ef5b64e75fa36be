//! Event records (IHI 0070, 7.3), and which of them reach a guest.

use pgtable_formats::context::smmuv3::Event;
use pgtable_formats::{Access, AccessKind};

/// Whether the driver passes an event of stage 1 on.
pub(in super::super) fn is_forwarded(event: Event) -> bool {
    matches!(event.id(), 0x04 | 0x06 | 0x08 | 0x0a | 0x10..=0x13)
}

/// The 32 bytes, with the vDEVICE's ID for a StreamID.
pub(in super::super) fn record(
    event: Event,
    virtual_id: u64,
    pasid: Option<u32>,
    iova: u64,
    access: Access,
) -> [u64; 4] {
    let substream = pasid.map_or(0, |pasid| u64::from(pasid) << 12);
    // A bad SubstreamID is told without the flag that it is there.
    let flag = if pasid.is_some() && event != Event::CBadSubstreamid { 1 << 11 } else { 0 };
    let word0 = u64::from(event.id()) | flag | substream | virtual_id << 32;
    if !matches!(event.id(), 0x10..=0x13) {
        return [word0, 0, 0, 0];
    }
    let reads = access.kind != AccessKind::Write;
    let executes = access.kind == AccessKind::Execute;
    // CLASS 2: the input address is at fault.
    let word1 =
        u64::from(access.privileged) << 33 | u64::from(executes) << 34 | u64::from(reads) << 35 | 2 << 40;
    [word0, word1, iova, 0]
}
