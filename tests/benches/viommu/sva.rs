//! Processes that come and go: bind and unbind as a guest does them, through the ring.

use viommu_device::host::EndpointCaps;
use viommu_guest::sva::{ProcessId, Processes, Sva, SvaOptions, Unpaged};
use viommu_guest::tables::{AddressSpace, SpaceOptions, Style, TableOptions};
use viommu_tests::rig::{Guest, Setup};

use crate::measure::{Stopwatch, Suite};
use crate::walks;

const ENDPOINT: u32 = 8;
/// Processes of a batch.
const PROCESSES: usize = 16;

pub(crate) fn run(suite: &mut Suite) {
    for (name, caps) in walks::architectures() {
        for (way, style) in [("pasid-table", Style::Table), ("page-table", Style::Single)] {
            let caps =
                EndpointCaps { tables: Some(caps.clone()), page_requests: true, ..EndpointCaps::default() };
            let setup = Setup { endpoints: vec![(ENDPOINT, caps)], ..Setup::default() };
            let keys = |what| [("format", name), ("way", way), ("what", what)];
            one(suite, setup, style, keys("bind"), keys("unbind"));
        }
    }
}

fn one(suite: &mut Suite, setup: Setup, style: Style, bind: [(&str, &str); 3], unbind: [(&str, &str); 3]) {
    let mut guest = Guest::new(setup);
    let endpoint = guest.probe(ENDPOINT);
    let driver = &mut guest.driver;
    let table = TableOptions { style, ..TableOptions::default() };
    let mut sva = Sva::new(driver, &endpoint, SvaOptions { table, ..SvaOptions::default() }).expect("PASIDs");
    let mut processes = Processes::new();
    let ids: Vec<ProcessId> = (0..PROCESSES)
        .map(|_| {
            let space = AddressSpace::new(driver, &endpoint, SpaceOptions::default()).expect("memory");
            processes.add(space, Unpaged)
        })
        .collect();
    let stopwatch = Stopwatch::new();
    let mut round = || {
        let (bind, handles) = stopwatch.time(|| {
            let bind = |&id| sva.bind(driver, &mut processes, id).expect("a PASID");
            ids.iter().map(bind).collect::<Vec<_>>()
        });
        let (unbind, ()) = stopwatch.time(|| {
            for handle in handles {
                sva.unbind(driver, &mut processes, handle).expect("what was bound");
            }
        });
        (bind, unbind)
    };
    suite.run("sva-bind", &bind, PROCESSES as u64, || round().0);
    suite.run("sva-bind", &unbind, PROCESSES as u64, || round().1);
}
