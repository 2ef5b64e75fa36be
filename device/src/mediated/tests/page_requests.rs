//! Whose page requests are over when a table changes: the machine answers them, by the contract of `Host`.

use super::*;

fn open<M: Stage2>(host: &Both<'_, M>) -> Vec<u16> {
    host.host().open.iter().map(|(_, group)| *group).collect()
}

fn arm<M: Stage2>(host: &mut Both<'_, M>, pasids: &[u32]) {
    for &pasid in pasids {
        let mut pages = space(host, ARM, arm_pages(100));
        host.bind(tagged(ARM, pasid), Some(&mut pages)).unwrap();
    }
}

/// Of page tables by descriptors: of the PASID that is unbound, bound anew or invalidated, and of no other.
#[test]
fn a_descriptor_that_goes_closes_its_own() {
    let memory = memory();
    let mut host = over(&memory, MediationLimits::DEFAULT);
    arm(&mut host, &[5, 6, 7, 8]);
    for (pasid, group) in [(5, 50), (5, 51), (6, 60), (7, 70), (8, 80)] {
        host.host_mut().asks(tagged(ARM, pasid), group);
    }
    assert_eq!(host.next_page_request().map(|report| report.group), Some(50));
    host.bind(tagged(ARM, 5), None).unwrap();
    assert_eq!(open(&host), [60, 70, 80]);
    assert_eq!(host.respond(&answer(tagged(ARM, 5), 50)), Ok(Answered::Gone));
    assert_eq!(host.next_page_request().map(|report| report.group), Some(60), "51 is not told any more");
    arm(&mut host, &[6]);
    assert_eq!(open(&host), [70, 80]);
    reread(&mut host, ARM, Scope::Endpoint).unwrap();
    assert_eq!(open(&host), [70, 80]);
    reread(&mut host, ARM, Scope::Pasid(Pasid::new(7))).unwrap();
    assert_eq!(open(&host), [80]);
    assert_eq!(host.respond(&answer(tagged(ARM, 8), 80)), Ok(Answered::Taken));
}

/// Where a machine cannot drop what is cached of one PASID, that is not taken for done by a wider scope, which would
/// leave its page requests open.
#[test]
fn an_endpoint_that_is_blocked_closes_all() {
    let memory = memory();
    let mut host = over(&memory, MediationLimits::DEFAULT);
    arm(&mut host, &[5, 6]);
    host.host_mut().asks(tagged(ARM, 5), 50);
    host.host_mut().asks(tagged(ARM, 6), 60);
    host.host_mut().fails = Some(0);
    assert_eq!(host.bind(tagged(ARM, 5), None), Err(HostError::Failed(5)));
    assert_eq!((open(&host), host.host().bound.len()), (vec![], 0), "blocked");
    host.bind(tagged(ARM, 5), None).unwrap();
    assert_eq!(host.host().bound.len(), 1, "the other goes on");

    // It cannot even be blocked: what is overdue is done for all, and for the one that is asked for.
    let mut host = over(&memory, MediationLimits::DEFAULT);
    arm(&mut host, &[5, 6]);
    host.host_mut().asks(tagged(ARM, 6), 60);
    host.host_mut().fails = Some(0);
    assert_eq!(host.bind(tagged(ARM, 5), None), Err(HostError::Failed(5)));
    host.host_mut().asks(tagged(ARM, 6), 61);
    reread(&mut host, ARM, Scope::Pasid(Pasid::new(6))).unwrap();
    assert_eq!(open(&host), [0; 0]);
}

/// Of entries of a PASID table: of those that changed, and of the one that is named, whether or not it has changed.
#[test]
fn an_entry_that_is_named_closes_its_own() {
    let memory = memory();
    let mut host = over(&memory, MediationLimits { max_entries_per_endpoint: 4, ..MediationLimits::DEFAULT });
    let guest = Guest::new();
    for pasid in [0, 5, 6, 7] {
        guest.set(&memory, pasid, &entry(100));
    }
    guest.bind(&mut host, VTD).unwrap();
    let untagged = Stream::untagged(VTD);
    let all = [(untagged, 1), (tagged(VTD, 5), 50), (tagged(VTD, 6), 60), (tagged(VTD, 7), 70)];
    for (stream, group) in all {
        host.host_mut().asks(stream, group);
    }
    reread(&mut host, VTD, Scope::Endpoint).unwrap();
    assert_eq!(open(&host), [1, 50, 60, 70], "nothing has changed");
    reread(&mut host, VTD, Scope::Pasid(Pasid::new(6))).unwrap();
    assert_eq!(open(&host), [1, 50, 70]);
    guest.set(&memory, 5, &entry(101));
    reread(&mut host, VTD, Scope::Endpoint).unwrap();
    assert_eq!(open(&host), [1, 70], "one has");
    reread(&mut host, VTD, Scope::Pasid(None)).unwrap();
    assert_eq!(open(&host), [70]);
    // A limit keeps from binding, not from answering.
    host.host_mut().asks(tagged(VTD, 9), 90);
    guest.set(&memory, 9, &entry(100));
    let stopped = reread(&mut host, VTD, Scope::Pasid(Pasid::new(9)));
    assert_eq!(stopped, Err(Stopped { done: 0, error: HostError::NoMemory }));
    assert_eq!(open(&host), [70]);
}

/// A table in place of another is a bind: everything is closed, even what both tables say.
#[test]
fn another_table_closes_all() {
    let memory = memory();
    let mut host = over(&memory, MediationLimits::DEFAULT);
    let first = Guest::new();
    let second = Guest { directory: Gpa(MEMORY.0 + (1 << 20)) };
    for guest in [&first, &second] {
        for pasid in [0, 5] {
            guest.set(&memory, pasid, &entry(600));
        }
    }
    first.bind(&mut host, VTD).unwrap();
    host.host_mut().asks(Stream::untagged(VTD), 1);
    host.host_mut().asks(tagged(VTD, 5), 50);
    second.bind(&mut host, VTD).unwrap();
    assert_eq!(open(&host), [0; 0]);
    host.host_mut().asks(tagged(VTD, 5), 51);
    host.bind(Stream::untagged(VTD), None).unwrap();
    assert_eq!(open(&host), [0; 0]);
}
