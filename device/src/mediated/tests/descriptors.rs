//! What the machine has bound, against what a table of descriptors is taken for.

use super::*;

/// A table that the machine kept when its last descriptor went is bound anew once the untagged stream was bound to nothing.
#[test]
fn a_table_that_was_taken_away_is_bound_again() {
    for pasid in [None, Pasid::new(5)] {
        let memory = memory();
        let mut host = over(&memory, MediationLimits::DEFAULT);
        let stream = Stream { endpoint: ARM, pasid };
        let mut pages = space(&mut host, ARM, arm_pages(100));
        host.bind(stream, Some(&mut pages)).unwrap();
        // The descriptor goes, and what is cached of it; the table stays.
        host.host_mut().fails = Some(1);
        host.bind(stream, None).unwrap();
        assert!(host.host().bound.contains_key(&Stream::untagged(ARM)));
        host.bind(Stream::untagged(ARM), None).unwrap();
        assert_eq!(host.host().bound.len(), 0);
        host.bind(stream, Some(&mut pages)).unwrap();
        let bound = host.host().bound.get(&Stream::untagged(ARM));
        assert!(matches!(bound, Some(Bound::Table(Canonical::Smmuv3(_)))), "{bound:?}");
    }
}

/// What else the untagged stream can be bound to, beside page tables and without them.
#[test]
fn untagged_accesses_have_one_thing_at_a_time() {
    let memory = memory();
    let mut host = over(&memory, MediationLimits::DEFAULT);
    let untagged = Stream::untagged(ARM);
    let mut identity = host.create(SpaceSpec::Identity).unwrap();
    let mut pages = space(&mut host, ARM, arm_pages(100));
    host.bind(tagged(ARM, 5), Some(&mut pages)).unwrap();
    assert_eq!(host.bind(untagged, Some(&mut identity)), Err(HostError::Unsupported));
    host.bind(untagged, None).unwrap();
    assert_eq!(host.held(ARM).unwrap().page_tables, 1, "the other is served");
    host.bind(tagged(ARM, 5), None).unwrap();
    host.bind(untagged, Some(&mut identity)).unwrap();
    assert_eq!(host.host().bound.get(&untagged), Some(&Bound::Identity));
    assert_eq!(host.bind(tagged(ARM, 5), Some(&mut pages)), Err(HostError::Unsupported));
    host.bind(untagged, Some(&mut pages)).unwrap();
    assert!(matches!(host.host().bound.get(&untagged), Some(Bound::Table(_))));
    host.bind(untagged, None).unwrap();
    assert_eq!(host.host().bound.len(), 0);
}
