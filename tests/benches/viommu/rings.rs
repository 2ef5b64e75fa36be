//! Requests through a real ring. The driver's part is not timed: a batch is one kick, from the first look at the ring
//! to the decision about the notification.

mod driver;
mod live;

use viommu_device::host::EndpointCaps;
use viommu_tests::rig::{Setup, request};
use viommu_wire::Request;

use crate::measure::Suite;
use driver::Driver;
use live::{Live, PAGE};

const BATCHES: [usize; 3] = [1, 16, 256];
/// The domain and the endpoint of mappings; it has no reserved regions.
const DOMAIN: u32 = 1;
const ENDPOINT: u32 = 24;

/// The ring with a handler that does nothing.
pub(crate) fn floor(suite: &mut Suite) {
    let mut driver = Driver::new(Setup::default());
    for batch in BATCHES {
        let requests = vec![request::map(DOMAIN, 0, PAGE - 1, 0); batch];
        suite.run("floor-ring", &[("batch", &batch.to_string())], batch as u64, || {
            driver.send_to_nobody(&requests)
        });
    }
}

/// MAP and UNMAP of one page each, at so many live mappings.
pub(crate) fn map_and_unmap(suite: &mut Suite) {
    for (order, make) in [("sequential", Live::sequential as fn() -> Live), ("random", Live::random)] {
        for full in [1_000, 100_000, 1_000_000] {
            let mut driver = Driver::new(Setup::default());
            driver.send(&[request::attach(DOMAIN, ENDPOINT)]);
            let mut live = make();
            live.fill(&mut driver, suite.size(full));
            for batch in BATCHES {
                let (name, size) = (full.to_string(), batch.to_string());
                let keys = [("live", name.as_str()), ("batch", size.as_str()), ("addresses", order)];
                suite.run("map", &keys, batch as u64, || {
                    driver.send(&live.take(batch));
                    driver.send(&live.add(batch))
                });
                suite.run("unmap", &keys, batch as u64, || {
                    let time = driver.send(&live.take(batch));
                    driver.send(&live.add(batch));
                    time
                });
            }
        }
    }
}

/// One UNMAP over 512 mappings.
pub(crate) fn unmap_of_many(suite: &mut Suite) {
    const MANY: u64 = 512;
    let mut driver = Driver::new(Setup::default());
    driver.send(&[request::attach(DOMAIN, ENDPOINT)]);
    let mut live = Live::sequential();
    let count = suite.size(1_000_000);
    live.fill(&mut driver, count);
    suite.run("unmap-512", &[("live", "1000000"), ("batch", "1")], 1, || {
        let (block, first) = live.block(MANY);
        let time = driver.send(&[request::unmap(DOMAIN, first, first + MANY * PAGE - 1)]);
        for part in block.chunks(256) {
            driver.send(part);
        }
        time
    });
}

/// ATTACH and DETACH of 16 endpoints: each to a domain of its own, which that creates and destroys, or all to one.
pub(crate) fn attach_and_detach(suite: &mut Suite) {
    const COUNT: u32 = 16;
    let endpoints = 0x100..0x100 + COUNT;
    let caps = endpoints.clone().map(|endpoint| (endpoint, EndpointCaps::default()));
    let mut driver = Driver::new(Setup { endpoints: caps.collect(), ..Setup::default() });
    for (name, is_own) in [("own", true), ("shared", false)] {
        let domain = |endpoint: u32| if is_own { endpoint } else { DOMAIN };
        let requests = |request: fn(u32, u32) -> Request| -> Vec<Request> {
            endpoints.clone().map(|endpoint| request(domain(endpoint), endpoint)).collect()
        };
        let (attach, detach) = (requests(request::attach), requests(request::detach));
        let keys = [("batch", "16"), ("domains", name)];
        suite.run("attach", &keys, u64::from(COUNT), || {
            let time = driver.send(&attach);
            driver.send(&detach);
            time
        });
        suite.run("detach", &keys, u64::from(COUNT), || {
            driver.send(&attach);
            driver.send(&detach)
        });
    }
}
