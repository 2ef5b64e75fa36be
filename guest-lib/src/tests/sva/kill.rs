//! Devices that fail at any point, and processes that end at any point: nothing is lost, and nothing hangs.

use super::*;
use crate::hal::fake::Mood;

/// How the device fails.
#[derive(Clone, Copy, Debug)]
enum Failure {
    Refuses,
    /// The driver gives up on the request; whether the device acted on it is unknown.
    Silent,
}

struct Story {
    driver: TestDriver,
    device: FakeTransport,
    processes: Processes<DemandPaged>,
    svas: Vec<Sva>,
    handles: Vec<(usize, Handle)>,
    endpoints: Vec<Endpoint>,
}

impl Story {
    fn new(endpoints: Vec<Endpoint>) -> Self {
        let (driver, device) = driver();
        Self { driver, device, processes: Processes::new(), svas: vec![], handles: vec![], endpoints }
    }

    /// Lets request `number` from now on fail, and all later ones.
    fn fail_from(&self, number: usize, failure: Failure) {
        let transport = self.device.clone();
        let mut left = number;
        self.device.set_script(move |_, writable| {
            writable.fill(0);
            if left == 0 {
                if matches!(failure, Failure::Silent) {
                    transport.0.borrow_mut().mood = Mood::Silent;
                    return 0;
                }
                let tail = writable.len() - 4;
                writable[tail] = 3;
                return writable.len() as u32;
            }
            left -= 1;
            writable.len() as u32
        });
    }

    fn recover(&self) {
        self.device.0.borrow_mut().mood = Mood::Obedient;
        answer(&self.device, Status::Ok);
    }

    /// One process, two endpoints, faults in all stages; ended in the middle. Stops at the first error.
    fn run(&mut self) -> Result<(), SvaError> {
        for endpoint in self.endpoints.clone() {
            self.svas.push(Sva::new(&mut self.driver, &endpoint, SvaOptions::default())?);
        }
        let id = process(&mut self.driver, &self.endpoints[0], &mut self.processes, 8);
        for (place, sva) in self.svas.iter_mut().enumerate() {
            self.handles.push((place, sva.bind(&mut self.driver, &mut self.processes, id)?));
        }
        let pasid = self.handles[0].1.pasid();
        for (group, last) in [(1, true), (2, false), (3, true)] {
            self.svas[0].receive(&Event::PageRequest(wanted(pasid, group, group.into(), last)));
        }
        self.svas[0].serve(&mut self.driver, &mut self.processes)?;
        self.svas[0].receive(&Event::PageRequest(wanted(pasid, 4, 5, true)));
        match self.processes.exit(&mut self.driver, id) {
            Ok(()) => {}
            Err(crate::sva::ExitError::Table(error)) => return Err(error.into()),
            Err(error) => panic!("{error}"),
        }
        while let Some((place, handle)) = self.handles.pop() {
            if let Err((handle, error)) =
                self.svas[place].unbind(&mut self.driver, &mut self.processes, handle)
            {
                self.handles.push((place, handle));
                return Err(error);
            }
        }
        Ok(())
    }

    /// What a guest does whatever had happened: ends, unbinds and gives back.
    fn clean_up(mut self) -> TestDriver {
        let driver = &mut self.driver;
        let ids: Vec<_> = self.processes.ids().collect();
        for &id in &ids {
            self.processes.exit(driver, id).unwrap();
        }
        for (place, handle) in self.handles {
            self.svas[place].unbind(driver, &mut self.processes, handle).map_err(|(_, error)| error).unwrap();
        }
        for sva in &mut self.svas {
            sva.retry_unbinds(driver, &mut self.processes).unwrap();
        }
        for id in ids {
            self.processes.remove(driver, id).unwrap().release(driver);
        }
        for sva in self.svas {
            assert_eq!(sva.open_groups(), 0, "no group is left behind");
            sva.release(driver).map_err(|(_, error)| error).unwrap();
        }
        self.driver
    }
}

#[test]
fn a_device_that_fails_at_any_request_costs_nothing_in_the_end() {
    let pairs = |id| all(id).into_iter();
    for (one, other) in pairs(ENDPOINT).zip(pairs(9)) {
        for failure in [Failure::Refuses, Failure::Silent] {
            let mut failures = 0;
            for number in 0.. {
                let mut story = Story::new(vec![one.clone(), other.clone()]);
                let before = story.driver.platform().alloc.live.clone();
                story.fail_from(number, failure);
                let outcome = story.run();
                story.recover();
                // Where an endpoint could not even be handed over, the hardware may have its tables.
                let is_set_up = story.svas.len() == 2;
                let driver = story.clean_up();
                if is_set_up {
                    assert_eq!(driver.platform().alloc.live, before, "{failure:?} at {number}");
                    assert_eq!(driver.asids.in_use(), 0);
                }
                if outcome.is_ok() {
                    break;
                }
                failures += 1;
                assert!(failures < 60, "no end: {outcome:?}");
            }
            assert!(failures > 6, "{failures}");
        }
    }
}

/// The end of the process at any point of its life, with requests in every stage.
#[test]
fn a_process_that_ends_at_any_point_leaves_nothing() {
    for endpoint in all(ENDPOINT) {
        for stage in 0..8 {
            let mut story = Story::new(vec![endpoint.clone()]);
            let before = story.driver.platform().alloc.live.clone();
            let mut sva = Sva::new(&mut story.driver, &endpoint, SvaOptions::default()).unwrap();
            let id = process(&mut story.driver, &endpoint, &mut story.processes, 8);
            let mut pasid = None;
            for step in 0..stage {
                match step {
                    0 => {
                        let handle = sva.bind(&mut story.driver, &mut story.processes, id).unwrap();
                        pasid = Some(handle.pasid());
                        story.handles.push((0, handle));
                    }
                    1 => ask(&story.device, wanted(pasid.unwrap(), 1, 1, false)),
                    2 => drop(events(&mut story.driver, &mut sva)),
                    3 => ask(&story.device, wanted(pasid.unwrap(), 1, 2, true)),
                    4 => drop(events(&mut story.driver, &mut sva)),
                    5 => drop(sva.serve(&mut story.driver, &mut story.processes).unwrap()),
                    _ => ask(&story.device, wanted(pasid.unwrap(), 2, 3, true)),
                }
            }
            story.svas.push(sva);
            let device = story.device.clone();
            requests(&device);
            let driver = story.clean_up();
            let is_answer = |request: &Request| matches!(request, Request::PageResponse(_));
            assert!(!requests(&device).iter().any(is_answer), "stage {stage}: the device's to answer");
            assert_eq!(driver.platform().alloc.live, before, "stage {stage}");
        }
    }
}
