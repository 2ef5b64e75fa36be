//! FPD of a table that the machine does not see.

use pgtable_formats::{AccessKind, Fault};

use super::*;

const NOT_MAPPED: FaultCause = FaultCause::Table(Fault::Vtd(vtd::FaultReason::NOT_PRESENT));

fn fault(stream: Stream, cause: FaultCause) -> FaultReport {
    FaultReport { stream, address: Some(Iova(0x1000)), kind: AccessKind::Read, privileged: false, cause }
}

fn silent(entry: &vtd::PasidEntry) -> vtd::PasidEntry {
    vtd::PasidEntry { word0: entry.word0.with_fault_disable(true), ..*entry }
}

#[test]
fn what_is_not_to_be_recorded_is_passed_over() {
    let memory = memory();
    let mut host = over(&memory, MediationLimits::DEFAULT);
    let guest = Guest::new();
    guest.set(&memory, 0, &entry(100));
    guest.set(&memory, 5, &silent(&entry(100)));
    guest.set(&memory, 6, &entry(100));
    // Neither is present.
    guest.set(&memory, 7, &silent(&vtd::PasidEntry::from_words([0; 8])));
    guest.bind(&mut host, VTD).unwrap();
    let (untagged, silent, loud, absent) =
        (Stream::untagged(VTD), tagged(VTD, 5), tagged(VTD, 6), tagged(VTD, 7));
    let plain = [FaultCause::Unmapped, FaultCause::Permission, NOT_MAPPED];
    for cause in plain {
        host.host_mut().faults =
            vec![fault(silent, cause), fault(untagged, cause), fault(silent, cause), fault(loud, cause)];
        let told: Vec<_> = core::iter::from_fn(|| host.next_fault()).collect();
        assert_eq!(told, [fault(untagged, cause), fault(loud, cause)]);
    }
    host.host_mut().faults = [absent, tagged(VTD, 8)].map(|one| fault(one, FaultCause::Unattached)).into();
    let reason = FaultCause::Table(Fault::Vtd(vtd::FaultReason::ENTRY_NOT_PRESENT));
    assert_eq!(host.next_fault(), Some(fault(tagged(VTD, 8), reason)), "of the reason that the entry gives");
    // Not qualified: the entry itself could not be read.
    let unread = FaultCause::Table(Fault::Vtd(vtd::FaultReason::ENTRY_ACCESS));
    host.host_mut().faults = vec![fault(silent, unread)];
    assert_eq!(host.next_fault(), Some(fault(silent, unread)));

    // The access waits all the same.
    host.host_mut().asks(silent, 50);
    host.host_mut().asks(loud, 60);
    let asked: Vec<_> = core::iter::from_fn(|| host.next_page_request()).collect();
    assert_eq!([asked[0].fault, asked[1].fault], [None, Some(FaultCause::Unmapped)]);

    // Nobody's table any more.
    host.bind(untagged, None).unwrap();
    host.host_mut().faults = vec![fault(silent, FaultCause::Unattached)];
    assert_eq!(host.next_fault(), Some(fault(silent, FaultCause::Unattached)));
}

/// Endpoints that fault as fast as they are looked at do not keep one call for ever.
#[test]
fn what_is_passed_over_has_a_bound() {
    let memory = memory();
    let mut host = over(&memory, MediationLimits::DEFAULT);
    let guest = Guest::new();
    guest.set(&memory, 5, &silent(&entry(100)));
    guest.bind(&mut host, VTD).unwrap();
    host.host_mut().faults = vec![fault(tagged(VTD, 5), NOT_MAPPED); crate::event::MAX_DISCARDED + 1];
    assert_eq!((host.next_fault(), host.host().faults.len()), (None, 1));
}
