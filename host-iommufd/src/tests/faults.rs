//! Faults of guests' tables, as they are handed out.

use super::*;

/// Endpoints take turns, behind one unit or several, and one that floods loses its own.
#[test]
fn an_endpoint_that_floods_delays_no_fault_of_another() {
    for units in 1..=2 {
        for (loud, quiet) in [(FIRST, SECOND), (SECOND, FIRST)] {
            let mut rig = Rig::new();
            let units: Vec<_> = (0..units).map(|_| rig.fake().add_unit(Unit::emulated_smmuv3())).collect();
            rig.add(FIRST, units[0]);
            rig.add(SECOND, *units.last().unwrap());
            let mut spaces = [FIRST, SECOND].map(|endpoint| rig.table(endpoint, 0x1000, 0x4000_0000).0);
            for (space, endpoint) in spaces.iter_mut().zip([FIRST, SECOND]) {
                rig.bind(endpoint, space);
            }
            let fault = |rig: &Rig, endpoint| assert!(rig.read(endpoint, 0x9000).is_err());
            (0..500).for_each(|_| fault(&rig, loud));
            assert_eq!(rig.host.next_fault().unwrap().stream.endpoint, loud);
            fault(&rig, quiet);
            // As many as are handed out before queues are read again, and one.
            let told: Vec<_> = (0..18).filter_map(|_| rig.host.next_fault()).collect();
            assert!(told.iter().any(|report| report.stream.endpoint == quiet));
            assert_eq!(std::iter::from_fn(|| rig.host.next_fault()).count(), 500 + 1 - 1 - 18);
            assert_eq!(rig.host.lost_events(), 0);
        }
    }
}
