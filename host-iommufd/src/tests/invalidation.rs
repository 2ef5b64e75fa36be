//! Caches over guests' tables.

use viommu_device::host::HostError;

use super::*;

/// What has to be dropped before the guest's change is seen.
fn rig(unit: Unit) -> (Rig, Space<Kernel>, Pages) {
    let mut rig = Rig::two(unit);
    let (mut space, pages) = rig.table(FIRST, 0x1000, 0x4000_0000);
    rig.bind(FIRST, &mut space);
    rig.host.invalidate(&[all_of(FIRST)]).unwrap();
    assert_eq!(rig.read(FIRST, 0x1000), Ok(0x4000_0000));
    pages.remap(&mut rig.guest, 0x1000, 0x4000_1000);
    assert_eq!(rig.read(FIRST, 0x1000), Ok(0x4000_0000), "cached");
    rig.kernel.take();
    (rig, space, pages)
}

const UNITS: [fn() -> Unit; 2] = [Unit::smmuv3, Unit::vtd];

#[test]
fn at_most_two_ioctls_for_translations() {
    let tagged = |endpoint| Invalidation { tag: Some(7), global: false, ..page_of(endpoint, 0x1000) };
    for invalidation in [page_of(FIRST, 0x1000), tagged(FIRST)] {
        let (mut rig, _space, _) = rig(Unit::smmuv3());
        rig.host.invalidate(&[invalidation]).unwrap();
        // One of them is for the device's own cache.
        assert_eq!((rig.count(Call::Invalidate), rig.kernel.counts().ioctls()), (2, 2));
        assert_eq!(rig.read(FIRST, 0x1000), Ok(0x4000_1000));
        assert_eq!(rig.fake().violations(), [""; 0]);
    }
    let (mut rig, _space, _) = rig(Unit::vtd());
    rig.host.invalidate(&[page_of(FIRST, 0x1000)]).unwrap();
    assert_eq!((rig.count(Call::Invalidate), rig.kernel.counts().ioctls()), (1, 1));
    assert_eq!(rig.read(FIRST, 0x1000), Ok(0x4000_1000));
}

/// Untagged accesses and PASID 0 share a table of VT-d, and with it what is asked of both.
#[test]
fn the_same_asked_twice_of_one_table_of_vt_d_is_one_ioctl() {
    let (mut rig, _space, _) = rig(Unit::vtd());
    let of_zero = Scope::Range { pasid: Some(Pasid::ZERO), range: range(0x1000, 0x1000), page_lg2: 12 };
    let batch = [page_of(FIRST, 0x1000), Invalidation { scope: of_zero, ..page_of(FIRST, 0x1000) }];
    rig.host.invalidate(&batch).unwrap();
    assert_eq!(rig.kernel.counts().ioctls(), 1);
    assert_eq!(rig.read(FIRST, 0x1000), Ok(0x4000_1000));
}

/// Whatever range a guest names: VT-d is asked for blocks that it has a mask for (CAP_REG.MAMV, here 20), and for all
/// of the table where that does not do.
#[test]
fn vt_d_is_asked_for_aligned_blocks_that_it_has_a_mask_for() {
    let (mut rig, _space, pages) = rig(Unit::vtd());
    for (turn, (start, length)) in
        [(0x1000, 0x3000), (0, 1 << 33), (0x1000, 1 << 32), (0x1000, u64::MAX - 0x1fff)]
            .into_iter()
            .enumerate()
    {
        let scope = Scope::Range { pasid: None, range: range(start, length), page_lg2: 12 };
        rig.host.invalidate(&[Invalidation { scope, ..page_of(FIRST, 0) }]).unwrap();
        let output = 0x4000_1000 + 0x1000 * turn as u64;
        assert_eq!(rig.read(FIRST, 0x1000), Ok(output));
        pages.remap(&mut rig.guest, 0x1000, output + 0x1000);
    }
    assert_eq!(rig.fake().violations(), [""; 0]);
}

/// One ioctl for each 63 commands: 130 for the TLB, twice as many for the device's own cache, which may have the pages of
/// untagged accesses and of PASID 0.
#[test]
fn long_batches_are_cut() {
    let (mut rig, _space, _) = rig(Unit::smmuv3());
    let pages = (0..130).map(|page| page_of(FIRST, (1 + 2 * page) << 12));
    let batch: Vec<_> = pages.map(|one| Invalidation { tag: Some(7), global: false, ..one }).collect();
    rig.host.invalidate(&batch).unwrap();
    let ioctls = |commands: usize| commands.div_ceil(crate::SMMUV3_BATCH) as u64;
    assert_eq!(rig.count(Call::Invalidate), ioctls(130) + ioctls(260));
    assert_eq!(rig.read(FIRST, 0x1000), Ok(0x4000_1000));
}

/// F1.6: the kernel says that commands were handled that it has not issued.
#[test]
fn surprise_6_what_failed_once_is_sent_again_from_its_start() {
    for unit in UNITS {
        for number in 0..2 {
            let (mut rig, _space, _) = rig(unit());
            rig.failing().fail_nth(number, Errno::EIO);
            rig.host.invalidate(&[page_of(FIRST, 0x1000)]).unwrap();
            assert_eq!(rig.read(FIRST, 0x1000), Ok(0x4000_1000));
        }
    }
}

/// What cannot be dropped as it was asked for is dropped with all the rest.
#[test]
fn what_fails_twice_becomes_everything() {
    for unit in UNITS {
        let (mut rig, _space, _) = rig(unit());
        rig.failing().fail_run(0, 2, Errno::EIO);
        rig.host.invalidate(&[page_of(FIRST, 0x1000)]).unwrap();
        assert_eq!(rig.read(FIRST, 0x1000), Ok(0x4000_1000));
    }
}

/// Nothing can be dropped: the endpoint reaches nothing until it can.
#[test]
fn what_cannot_be_dropped_blocks_and_goes_on_when_it_can() {
    for unit in UNITS {
        let (mut rig, mut space, pages) = rig(unit());
        let before = rig.fake().objects();
        rig.failing().fail_kind(Call::Invalidate, Errno::EIO);
        let stopped = rig.host.invalidate(&[page_of(FIRST, 0x1000)]).unwrap_err();
        assert_eq!((stopped.done, stopped.error), (0, HostError::Failed(Errno::EIO as i32)));
        assert!(rig.read(FIRST, 0x1000).is_err());
        assert_eq!(rig.fake().objects(), before);
        // Asked again, and still not.
        assert!(rig.host.invalidate(&[all_of(FIRST)]).is_err());
        assert!(rig.read(FIRST, 0x1000).is_err());
        // The neighbour is not concerned.
        assert!(rig.host.invalidate(&[]).is_ok());
        rig.failing().heal();
        rig.host.invalidate(&[page_of(FIRST, 0x5000)]).unwrap();
        assert_eq!(rig.read(FIRST, 0x1000), Ok(0x4000_1000), "all was dropped");
        pages.remap(&mut rig.guest, 0x1000, 0x4000_2000);
        rig.host.invalidate(&[page_of(FIRST, 0x1000)]).unwrap();
        assert_eq!(rig.read(FIRST, 0x1000), Ok(0x4000_2000));
        rig.bind(FIRST, &mut space);
        assert_eq!(rig.read(FIRST, 0x1000), Ok(0x4000_2000));
    }
}

/// The device core, told of the failure, may bind another table: not before the caches are clean.
#[test]
fn a_blocked_endpoint_is_not_bound_to_a_table_with_stale_caches() {
    let (mut rig, mut space, _) = rig(Unit::smmuv3());
    rig.failing().fail_kind(Call::Invalidate, Errno::EIO);
    assert!(rig.host.invalidate(&[page_of(FIRST, 0x1000)]).is_err());
    let stream = Stream::untagged(FIRST);
    assert!(rig.host.bind(stream, Some(&mut space)).is_err());
    let mut identity = rig.identity();
    assert!(rig.host.bind(stream, Some(&mut identity)).is_err());
    assert!(rig.read(FIRST, 0x1000).is_err());
    rig.failing().heal();
    rig.bind(FIRST, &mut space);
    assert_eq!(rig.read(FIRST, 0x1000), Ok(0x4000_1000));
}

#[test]
fn a_table_that_cannot_be_left_cleanly_is_left_blocked() {
    for to_identity in [true, false] {
        let (mut rig, _space, _) = rig(Unit::smmuv3());
        let mut identity = rig.identity();
        rig.failing().fail_kind(Call::Invalidate, Errno::EIO);
        let target = to_identity.then_some(&mut identity);
        assert!(rig.host.bind(Stream::untagged(FIRST), target).is_err());
        for address in [0x1000, 0x4000_0000] {
            assert!(rig.read(FIRST, address).is_err());
        }
        rig.failing().heal();
        let target = to_identity.then_some(&mut identity);
        rig.host.bind(Stream::untagged(FIRST), target).unwrap();
        assert_eq!(rig.read(FIRST, 0x4000_0000).is_ok(), to_identity);
    }
}

#[test]
fn each_unit_is_asked_and_the_first_failure_counts() {
    let mut rig = Rig::new();
    for (id, unit) in [(FIRST, Unit::smmuv3()), (SECOND, Unit::smmuv3())] {
        let unit = rig.fake().add_unit(unit);
        rig.add(id, unit);
    }
    rig.kernel.take();
    rig.host.invalidate(&[page_of(SECOND, 0), page_of(FIRST, 0), page_of(SECOND, 0x1000)]).unwrap();
    assert_eq!(rig.count(Call::Invalidate), 2);
    // Everything of the first unit fails, nothing of the second.
    rig.failing().fail_run(0, 4, Errno::EIO);
    let stopped = rig.host.invalidate(&[page_of(SECOND, 0), page_of(FIRST, 0)]).unwrap_err();
    assert_eq!(stopped.done, 1);
    let nobody = EndpointId(999);
    rig.failing().heal();
    rig.kernel.take();
    let stopped = rig.host.invalidate(&[page_of(FIRST, 0), all_of(nobody), page_of(SECOND, 0)]).unwrap_err();
    assert_eq!((stopped.done, stopped.error), (1, HostError::Unsupported));
    assert_ne!(rig.count(Call::Invalidate), 0);
}

/// Erratum T264-SMMU-3.
#[test]
fn an_smmu_that_needs_it_is_told_twice() {
    let repeat = fake::FakeSmmuv3 { repeat: true, ..fake::FakeSmmuv3::NEW };
    let (mut rig, _space, _) = rig(Unit::Smmuv3(repeat));
    rig.host.invalidate(&[page_of(FIRST, 0x1000)]).unwrap();
    assert_eq!(rig.count(Call::Invalidate), 3);
    assert_eq!(rig.read(FIRST, 0x1000), Ok(0x4000_1000));
}
