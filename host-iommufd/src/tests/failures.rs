//! The kernel refuses, at each place: either what was is in force, or the endpoint is blocked; and nothing is left over.

use viommu_device::host::{HostError, MapError};

use super::*;

/// A step in the life of an endpoint. Adds the space that is in force then.
type Life = fn(&mut Rig, &mut Vec<Space<Kernel>>) -> Result<(), HostError>;

fn to_table(rig: &mut Rig, spaces: &mut Vec<Space<Kernel>>) -> Result<(), HostError> {
    let caps = rig.caps(FIRST);
    let (table, _) = rig.guest.table(&caps, 0x1000, 0x4000_1000);
    let mut space = rig.host.create(SpaceSpec::GuestTable { endpoint: FIRST, table: &table })?;
    let result = rig.host.bind(Stream::untagged(FIRST), Some(&mut space));
    match result {
        Ok(()) => {
            spaces.push(space);
            rig.host.invalidate(&[all_of(FIRST)]).map_err(|stopped| stopped.error)
        }
        Err(error) => {
            rig.host.destroy(space);
            Err(error)
        }
    }
}

fn to_mappings(rig: &mut Rig, spaces: &mut Vec<Space<Kernel>>) -> Result<(), HostError> {
    let mut space = rig.host.create(SpaceSpec::Mapped)?;
    let map = mapping(0x1000, 0x1000, 0x4000_2000, READ_WRITE);
    let mapped = rig.host.map(&mut space, map).map_err(|error| match error {
        MapError::Host(error) => error,
        MapError::Overlap => panic!("it was empty"),
    });
    let result = mapped.and_then(|()| rig.host.bind(Stream::untagged(FIRST), Some(&mut space)));
    match result {
        Ok(()) => {
            spaces.push(space);
            Ok(())
        }
        Err(error) => {
            rig.host.destroy(space);
            Err(error)
        }
    }
}

fn to_identity(rig: &mut Rig, spaces: &mut Vec<Space<Kernel>>) -> Result<(), HostError> {
    let mut space = rig.host.create(SpaceSpec::Identity)?;
    rig.host.bind(Stream::untagged(FIRST), Some(&mut space))?;
    spaces.push(space);
    Ok(())
}

fn to_nothing(rig: &mut Rig, _: &mut Vec<Space<Kernel>>) -> Result<(), HostError> {
    rig.host.bind(Stream::untagged(FIRST), None)
}

fn reach(rig: &Rig) -> Reached {
    (rig.read(FIRST, 0x1000).ok(), rig.read(FIRST, 0x6000_0000).ok())
}

/// What is read from the address that tables and mappings have, and from one that bypass has.
type Reached = (Option<u64>, Option<u64>);

const TABLE: Reached = (Some(0x4000_1000), None);
const NOTHING: Reached = (None, None);

#[test]
fn every_change_of_a_binding_with_every_call_failing() {
    let lives: [(Life, Reached); 4] = [
        (to_table, TABLE),
        (to_mappings, (Some(0x4000_2000), None)),
        (to_identity, (None, Some(0x6000_0000))),
        (to_nothing, NOTHING),
    ];
    for unit in [Unit::smmuv3, Unit::vtd] {
        for (from, before) in lives {
            for (to, after) in lives {
                for forever in [false, true] {
                    check_change(unit(), (from, before), (to, after), forever);
                }
            }
        }
    }
}

fn check_change(unit: Unit, (from, before): (Life, Reached), (to, after): (Life, Reached), forever: bool) {
    for number in 0.. {
        let mut rig = Rig::two(unit);
        let clean = rig.fake().describe();
        let mut spaces = Vec::new();
        from(&mut rig, &mut spaces).unwrap();
        assert_eq!(reach(&rig), before);
        match forever {
            true => rig.failing().fail_run(number, u64::MAX, Errno::EIO),
            false => rig.failing().fail_nth(number, Errno::EIO),
        }
        let result = to(&mut rig, &mut spaces);
        let done = rig.failing().failed().is_none();
        rig.failing().heal();
        match result {
            Ok(()) => assert_eq!(reach(&rig), after, "call {number}"),
            Err(_) => {
                let reached = reach(&rig);
                // The flush after binding is a request of its own, and whom the kernel does not let block is not blocked.
                let unblockable = forever && after == TABLE && reached == after;
                assert!(unblockable || [before, NOTHING].contains(&reached), "call {number}: {reached:?}");
            }
        }
        // It goes on as if nothing had happened.
        to(&mut rig, &mut spaces).unwrap();
        assert_eq!(reach(&rig), after, "call {number}");
        to_nothing(&mut rig, &mut spaces).unwrap();
        for space in spaces {
            rig.host.destroy(space);
        }
        assert_eq!(rig.fake().describe(), clean, "call {number}");
        assert_eq!(rig.fake().violations(), [""; 0]);
        if done {
            break;
        }
        assert!(number < 30);
    }
}

/// The kernel is not supposed to refuse that: nothing breaks, and what was not freed goes with what is freed later.
#[test]
fn what_is_not_freed_is_freed_later() {
    for call in [Call::Destroy, Call::Detach] {
        for unit in [Unit::smmuv3, Unit::vtd] {
            let mut rig = Rig::new();
            let clean = rig.fake().objects();
            let unit = rig.fake().add_unit(unit());
            let device = rig.add(FIRST, unit);
            let mut spaces = Vec::new();
            to_table(&mut rig, &mut spaces).unwrap();
            rig.failing().fail_kind(call, Errno::EBUSY);
            to_mappings(&mut rig, &mut spaces).unwrap();
            for space in spaces {
                rig.host.destroy(space);
            }
            rig.host.remove_endpoint(FIRST).unwrap();
            assert!(rig.fake().objects() > clean);
            rig.failing().heal();
            let space = rig.mapped();
            rig.host.destroy(space);
            assert_eq!(rig.fake().objects(), clean, "{:#?}", rig.fake().describe());
            assert_eq!(rig.fake().attached(device, None), None);
        }
    }
}

/// A device that could not be detached and is an endpoint again stays one.
#[test]
fn a_late_detach_spares_a_device_that_came_back() {
    let mut rig = Rig::new();
    let unit = rig.fake().add_unit(Unit::Plain);
    let device = rig.add(FIRST, unit);
    rig.failing().fail_kind(Call::Detach, Errno::EBUSY);
    rig.host.remove_endpoint(FIRST).unwrap();
    rig.failing().heal();
    rig.host.add_endpoint(FIRST, as_is(device)).unwrap();
    let mut spaces = Vec::new();
    to_identity(&mut rig, &mut spaces).unwrap();
    let space = rig.mapped();
    rig.host.destroy(space);
    assert_eq!(reach(&rig), (None, Some(0x6000_0000)));
}
