//! Limits, and what a re-reading that meets them leaves.

use super::*;

const NONE: vtd::PasidEntry = vtd::PasidEntry::from_words([0; 8]);

fn limited(max_entries_per_endpoint: usize) -> MediationLimits {
    MediationLimits { max_entries_per_endpoint, ..MediationLimits::DEFAULT }
}

/// What is one too many is refused, and takes nobody's place: each PASID is as it was or as it is now.
#[test]
fn a_limit_refuses_the_new_and_keeps_the_old() {
    let memory = memory();
    let mut host = over(&memory, limited(3));
    let guest = Guest::new();
    for pasid in [70, 71, 72] {
        guest.set(&memory, pasid, &entry(100));
    }
    guest.bind(&mut host, VTD).unwrap();
    // Below those that are bound, so that the new one is read first.
    guest.set(&memory, 5, &entry(105));
    guest.set(&memory, 71, &entry(101));
    let stopped = reread(&mut host, VTD, Scope::Endpoint);
    assert_eq!(stopped, Err(Stopped { done: 0, error: HostError::NoMemory }));
    assert_eq!(leads(&host, VTD), [(70, 100), (71, 101), (72, 100)]);
    let stopped = reread(&mut host, VTD, Scope::Pasid(Pasid::new(5)));
    assert_eq!(stopped, Err(Stopped { done: 0, error: HostError::NoMemory }));
    assert_eq!(leads(&host, VTD), [(70, 100), (71, 101), (72, 100)]);
    // What goes makes room in the same reading, wherever it lies.
    guest.set(&memory, 72, &NONE);
    guest.set(&memory, 6, &entry(106));
    let stopped = reread(&mut host, VTD, Scope::Endpoint);
    assert_eq!(stopped, Err(Stopped { done: 0, error: HostError::NoMemory }));
    assert_eq!(leads(&host, VTD), [(5, 105), (70, 100), (71, 101)]);
    guest.set(&memory, 70, &NONE);
    reread(&mut host, VTD, Scope::Endpoint).unwrap();
    assert_eq!(leads(&host, VTD), [(5, 105), (6, 106), (71, 101)]);
    assert_eq!(host.held(VTD).unwrap().entries, 3);
    assert_eq!(host.host().live, 3);
}

/// A batch says which of it was not done, and the ones before it were.
#[test]
fn the_place_in_a_batch_is_told() {
    let memory = memory();
    let mut host = over(&memory, limited(2));
    let guest = Guest::new();
    guest.set(&memory, 5, &entry(100));
    guest.bind(&mut host, VTD).unwrap();
    for pasid in [6, 7, 8] {
        guest.set(&memory, pasid, &entry(100));
    }
    let one = |pasid| Invalidation {
        endpoint: VTD,
        scope: Scope::Pasid(Pasid::new(pasid)),
        caches: Caches::PASID,
        leaf: false,
        tag: None,
        global: false,
    };
    let stopped = host.invalidate(&[one(6), one(7), one(8)]);
    assert_eq!(stopped, Err(Stopped { done: 1, error: HostError::NoMemory }));
    assert_eq!(leads(&host, VTD), [(5, 100), (6, 100)]);
}

/// To bind a table in place of another is all or nothing, also where only both together are too many.
#[test]
fn a_table_replaces_another_of_as_many() {
    let memory = memory();
    let mut host = over(&memory, limited(2));
    let first = Guest::new();
    let second = Guest { directory: Gpa(MEMORY.0 + (1 << 20)) };
    for pasid in [5, 6] {
        first.set(&memory, pasid, &entry(600));
        second.set(&memory, pasid + 2, &entry(601));
    }
    first.bind(&mut host, VTD).unwrap();
    second.bind(&mut host, VTD).unwrap();
    assert_eq!(leads(&host, VTD), [(7, 601), (8, 601)]);
    first.set(&memory, 7, &entry(600));
    assert_eq!(first.bind(&mut host, VTD), Err(HostError::NoMemory));
    assert_eq!(leads(&host, VTD), [(7, 601), (8, 601)]);
}

/// A machine that fails part-way, at each place: old or new for each PASID, and done when it is asked again.
#[test]
fn a_cut_leaves_old_or_new() {
    for at in 0.. {
        let memory = memory();
        let mut host = over(&memory, limited(4));
        let guest = Guest::new();
        for pasid in [5, 70, 71, 900] {
            guest.set(&memory, pasid, &entry(100));
        }
        guest.bind(&mut host, VTD).unwrap();
        guest.set(&memory, 5, &entry(101));
        guest.set(&memory, 70, &NONE);
        guest.set(&memory, 900, &NONE);
        guest.set(&memory, 1, &entry(102));
        host.host_mut().fails = Some(at);
        let result = reread(&mut host, VTD, Scope::Endpoint);
        let is_through = host.host_mut().fails.take().is_some();
        assert_eq!(result.is_ok(), is_through, "{at}");
        let seen: BTreeMap<u32, u64> = leads(&host, VTD).into_iter().collect();
        for (pasid, states) in [
            (1, [None, Some(102)]),
            (5, [Some(100), Some(101)]),
            (70, [Some(100), None]),
            (71, [Some(100); 2]),
            (900, [Some(100), None]),
        ] {
            assert!(states.contains(&seen.get(&pasid).copied()), "{pasid}, failing at {at}: {seen:?}");
        }
        reread(&mut host, VTD, Scope::Endpoint).unwrap();
        assert_eq!(leads(&host, VTD), [(1, 102), (5, 101), (71, 100)]);
        assert_eq!(host.host().live, 3);
        if is_through {
            assert!(at > 5);
            break;
        }
    }
}

/// Words that a unit ignores do not make an entry another one.
#[test]
fn what_is_ignored_binds_nothing_anew() {
    let memory = memory();
    let mut host = over(&memory, MediationLimits::DEFAULT);
    let guest = Guest::new();
    guest.set(&memory, 5, &entry(100));
    guest.bind(&mut host, VTD).unwrap();
    let calls = host.host().calls;
    guest.set(&memory, 5, &vtd::PasidEntry::first_stage(&vtd_pages(100), 2));
    reread(&mut host, VTD, Scope::Endpoint).unwrap();
    assert_eq!(host.host().calls - calls, 1, "an invalidation");
    // A reserved bit beyond the words that are kept.
    let bad = vtd::PasidEntry { reserved: [0, 0, 0, 0, 1], ..entry(100) };
    guest.set(&memory, 5, &bad);
    reread(&mut host, VTD, Scope::Endpoint).unwrap();
    assert_eq!(leads(&host, VTD), []);
}

fn table(untagged: u32, directory: Gpa, caps: &vtd::Caps) -> Canonical {
    let untagged = Pasid::new(untagged).unwrap();
    Canonical::VtdPasidTable(vtd::PasidTable::new(directory, 7, untagged, caps).unwrap())
}

/// With fewer bits of PASIDs, or none.
fn with_pasids(bits: u8) -> vtd::Caps {
    let software = vtd::CapRegisters::SOFTWARE;
    let ecap = vtd::Ecap::from_bits(software.ecap).with_pasid(bits != 0).with_pss(bits.saturating_sub(1));
    vtd::Caps::from_registers(vtd::CapRegisters { ecap: ecap.into_bits(), ..software })
}

fn root<M: Stage2>(host: &Both<'_, M>, stream: Stream) -> Option<u64> {
    match host.host().bound.get(&stream)? {
        Bound::Table(Canonical::VtdFirstStage(table)) => Some((table.root().0 - MEMORY.0) >> 12),
        other => panic!("{other:?}"),
    }
}

/// The entry of untagged accesses is named by its number, too, where no access that is tagged may use it: the endpoint
/// has no PASIDs, or fewer than that.
#[test]
fn the_untagged_entry_is_read_by_its_number() {
    let untagged = Stream::untagged(VTD);
    for (pasid_bits, number) in [(0, 0), (0, 5), (8, 600)] {
        let memory = memory();
        let mut host = over(&memory, MediationLimits::DEFAULT);
        let guest = Guest::new();
        guest.set(&memory, number, &entry(100));
        let caps = with_pasids(pasid_bits);
        let number = u32::try_from(number).unwrap();
        let mut all = space(&mut host, VTD, table(number, MEMORY, &caps));
        host.bind(untagged, Some(&mut all)).unwrap();
        reread(&mut host, VTD, Scope::Pasid(Pasid::new(number))).unwrap();
        assert_eq!(root(&host, untagged), Some(100), "{pasid_bits} bits, {number}");
        guest.set(&memory, number.into(), &entry(101));
        reread(&mut host, VTD, Scope::Pasid(Pasid::new(number))).unwrap();
        assert_eq!(root(&host, untagged), Some(101));
        guest.set(&memory, number.into(), &NONE);
        reread(&mut host, VTD, Scope::Pasid(Pasid::new(number))).unwrap();
        assert_eq!((root(&host, untagged), host.host().live), (None, 0));
    }
}

/// An entry with two streams, and a machine that fails several times in a row at each place: no space is freed that a
/// stream is bound to, none is lost, both streams are as they were, as they are now, or closed, and the next reading does
/// what is left.
#[test]
fn a_machine_that_fails_twice_frees_nothing_in_use() {
    let untagged = Stream::untagged(VTD);
    let other = Gpa(MEMORY.0 + (1 << 20));
    // To read the table again, and to bind another one in its place; the entry becomes another, goes, or comes.
    for (rebinds, before, after) in [
        (false, entry(100), entry(101)),
        (false, entry(100), NONE),
        (false, NONE, entry(101)),
        (true, entry(100), entry(101)),
        (true, entry(100), NONE),
        (true, NONE, entry(101)),
    ] {
        for (at, then) in (0..8).flat_map(|at| (0..6).map(move |then| (at, then))) {
            let story = (rebinds, at, then);
            let memory = memory();
            let mut host = over(&memory, MediationLimits::DEFAULT);
            let (first, second) = (Guest::new(), Guest { directory: other });
            for guest in [&first, &second] {
                guest.set(&memory, 4, &entry(90));
                guest.set(&memory, 5, &before);
            }
            let mut tables = [MEMORY, other].map(|at| space(&mut host, VTD, table(5, at, &vtd_caps())));
            host.bind(untagged, Some(&mut tables[0])).unwrap();
            let changed = if rebinds { &second } else { &first };
            changed.set(&memory, 5, &after);
            changed.set(&memory, 4, &entry(91));
            host.host_mut().fails = Some(at);
            host.host_mut().then = then;
            let result = if rebinds {
                host.bind(untagged, Some(&mut tables[1]))
            } else {
                reread(&mut host, VTD, Scope::Endpoint).map_err(|stopped| stopped.error)
            };
            (host.host_mut().fails, host.host_mut().then) = (None, 0);
            let of = |entry: &vtd::PasidEntry, page| (*entry != NONE).then_some(page);
            let states = [of(&before, 100), of(&after, 101), None];
            for stream in [untagged, tagged(VTD, 5)] {
                assert!(states.contains(&root(&host, stream)), "{story:?}");
            }
            assert!([Some(90), Some(91), None].contains(&root(&host, tagged(VTD, 4))), "{story:?}");
            // What is read next: the table that was bound.
            let is_after = !rebinds || result.is_ok();
            reread(&mut host, VTD, Scope::Endpoint).unwrap();
            let (five, four) = if is_after { (states[1], 91) } else { (states[0], 90) };
            for (stream, page) in [(untagged, five), (tagged(VTD, 5), five), (tagged(VTD, 4), Some(four))] {
                assert_eq!(root(&host, stream), page, "{story:?} {stream:?} {result:?}");
            }
            assert_eq!(host.host().live, 1 + usize::from(five.is_some()), "{story:?}");
            assert_eq!(host.held(VTD).unwrap().refused, 0);
            host.bind(untagged, None).unwrap();
            assert_eq!((host.host().live, host.host().bound.len()), (0, 0), "{story:?}");
        }
    }
}
