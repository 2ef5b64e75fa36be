//! Scene 7: memory that is there once a device asks for it, and a process that is killed in the middle of its DMA. The
//! guest's code is the same for each architecture, and for both ways to hand tables over.

use anyhow::{Context as _, bail, ensure};
use pgtable_formats::format::Attrs;
use pgtable_formats::{Access, Gpa, Pasid};
use viommu_device::soft::Answer;
use viommu_guest::sva::{Area, DemandPaged, Handle, ProcessId, Processes, Sva, SvaOptions};
use viommu_guest::tables::{AddressSpace, SpaceOptions};
use viommu_guest::{Endpoint, Hardware};
use viommu_wire::numbers::{EVENT_QUEUE, FORMAT_ARM_SMMU3, FORMAT_INTEL_PASID_TABLE};
use viommu_wire::{AccessFlags, Event, Iova, IovaRange};

use super::begin::{SMMUV3_NAME, VTD_NAME};
use super::channel::{Asked, BURST, Channel, Turn};
use super::facts::{Hex, Kill, PageRequest, PagedProcess, Paging};
use super::guest::{Guest, PAGE, PAGE_LEN, same};
use super::machine::Machine;
use super::pager::Pager;

/// Addresses of every process, none of which has memory at first.
const AREA: (Iova, u64) = (Iova(0x7f00_0000_0000), 64 << 20);
/// What is to be copied, and where to.
const SOURCE: Iova = AREA.0;
const TARGET: Iova = Iova(0x7f00_0010_0000);
/// Pages of either.
const PAGES: u64 = 4;
const LENGTH: u64 = PAGES * PAGE;
/// Channels that copy for one process, each its part.
const CHANNELS: usize = 2;
/// The one that is killed.
const VICTIM: usize = 1;
/// More turns than any process needs.
const MAX_ROUNDS: u32 = 100;
/// What stands in memory that was taken from the process that was killed.
const POISON: [u8; PAGE_LEN] = [0xd1; PAGE_LEN];

/// Lets the device copy for processes of these names, of which the second is killed on the way.
pub(super) fn paging(
    machine: &Machine,
    guest: &mut Guest,
    endpoint: &Endpoint,
    names: [char; 3],
) -> anyhow::Result<Paging> {
    let hardware = match endpoint.properties().hardware {
        Some(Hardware::Smmuv3(_)) => SMMUV3_NAME,
        Some(Hardware::Vtd(_)) => VTD_NAME,
        None => bail!("no hardware walks tables for endpoint {}", endpoint.id()),
    };
    let blocks = guest.driver.platform().alloc.live();
    let sva = Sva::new(&mut guest.driver, endpoint, SvaOptions::default())?;
    ensure!(sva.has_page_requests(), "the endpoint has no page requests");
    let format = sva.format();
    let mut world =
        World { machine, sva, processes: Processes::new(), jobs: Vec::new(), asked: Vec::new(), last: None };
    world.jobs =
        names.map(|name| world.start(guest, endpoint, name)).into_iter().collect::<anyhow::Result<_>>()?;

    let (facts, sent) = guest.measure(|guest| world.run(guest))?;
    let (rounds, switches, kill) = facts;
    let requests = world.requests()?;
    let processes = world.end(guest)?;
    same("blocks of memory that are out", guest.driver.platform().alloc.live(), blocks)?;
    Ok(Paging {
        endpoint: endpoint.id().0,
        hardware,
        format,
        one_table: matches!(format, FORMAT_ARM_SMMU3 | FORMAT_INTEL_PASID_TABLE),
        area_first: Hex(AREA.0.0),
        area_bytes: AREA.1,
        target: Hex(TARGET.0),
        length: LENGTH,
        burst: BURST as u64,
        rounds,
        switches,
        sent,
        processes,
        requests,
        kill,
    })
}

/// The guest's processes, and the device that works for them.
struct World<'m> {
    machine: &'m Machine,
    sva: Sva,
    processes: Processes<Pager>,
    jobs: Vec<Job>,
    /// What the device asked for, in order.
    asked: Vec<Request>,
    /// Whom it worked for last, and how often that changed.
    last: Option<Pasid>,
}

/// A process, and what the device does for it.
struct Job {
    name: char,
    id: ProcessId,
    /// `None`: it was unbound.
    handle: Option<Handle>,
    pasid: Pasid,
    channels: Vec<Channel>,
    /// Accesses that were refused.
    refused: u64,
}

struct Request {
    pasid: Pasid,
    asked: Asked,
    /// What the device was told.
    answer: Option<Answer>,
}

impl World<'_> {
    /// A process that has written to every other page of its source.
    fn start(&mut self, guest: &mut Guest, endpoint: &Endpoint, name: char) -> anyhow::Result<Job> {
        let space = AddressSpace::new(&mut guest.driver, endpoint, SpaceOptions::default())?;
        let mut memory = DemandPaged::new(&space, 1 << 10);
        let range = IovaRange::from_length(AREA.0, AREA.1).context("an empty area")?;
        memory.add_area(Area { range, attrs: Attrs::READ_WRITE })?;
        let id = self.processes.add(space, Pager::new(memory));
        for index in (0..PAGES).step_by(2) {
            let (space, pager) = self.processes.get_mut(id).context("no process")?.parts();
            let at = Iova(SOURCE.0 + index * PAGE);
            let frame = pager.memory.populate(&mut guest.driver, space, at, AccessFlags::WRITE)?;
            guest.write(frame, &page_of(name, index))?;
        }
        let handle = self.sva.bind(&mut guest.driver, &mut self.processes, id)?;
        let pasid = handle.pasid();
        let part = LENGTH / CHANNELS as u64;
        let channel = |index| {
            let way = (Iova(SOURCE.0 + index * part), Iova(TARGET.0 + index * part));
            Channel::new(self.machine, endpoint.id(), pasid, way, part)
        };
        let channels = (0..CHANNELS as u64).map(channel).collect();
        Ok(Job { name, id, handle: Some(handle), pasid, channels, refused: 0 })
    }

    /// Everybody's turn, again and again: the device's channels, the VMM, the guest.
    fn run(&mut self, guest: &mut Guest) -> anyhow::Result<(u32, u32, Kill)> {
        let mut switches = 0;
        let mut killed = None;
        for round in 1..=MAX_ROUNDS {
            for channel in 0..CHANNELS {
                for job in 0..self.jobs.len() {
                    switches += u32::from(self.turn(job, channel)?);
                }
                // What a VMM does where an access waits or has faulted.
                let _ = self.machine.kick(EVENT_QUEUE)?;
                if channel == 0 {
                    self.take_events(guest)?;
                }
            }
            // The events of the second channel are in the queue, unseen.
            if killed.is_none() && self.is_to_die() {
                killed = Some(self.kill(guest)?);
            }
            self.take_events(guest)?;
            self.sva.serve(&mut guest.driver, &mut self.processes)?;
            self.look_for_answers()?;
            let is_over = |job: &Job| job.handle.is_none() || job.done() == LENGTH;
            if self.jobs.iter().all(is_over) {
                let (kill, watched) = killed.context("nobody was killed")?;
                return Ok((round, switches, self.after_kill(guest, kill, &watched)?));
            }
        }
        bail!("a copy did not come to its end")
    }

    /// One channel does what it can. Whether it works for another process than the one before.
    fn turn(&mut self, job: usize, channel: usize) -> anyhow::Result<bool> {
        let job = self.jobs.get_mut(job).context("no process")?;
        let turn = job.channels.get_mut(channel).context("no channel")?.turn()?;
        let is_bound = job.handle.is_some();
        match turn {
            Turn::Waits(asked) => {
                ensure!(is_bound, "an access for process {} waits after its unbind", job.name);
                self.asked.push(Request { pasid: job.pasid, asked, answer: None });
            }
            Turn::Moved => ensure!(is_bound, "process {} was accessed after its unbind", job.name),
            Turn::Refused(_) | Turn::Failed(_) => {
                ensure!(!is_bound, "an access for process {} was refused", job.name);
                job.refused += u64::from(matches!(turn, Turn::Refused(_)));
            }
            Turn::StillWaits | Turn::Done => {}
        }
        let works = turn == Turn::Moved;
        let switches = works && self.last.is_some_and(|last| last != job.pasid);
        if works {
            self.last = Some(job.pasid);
        }
        Ok(switches)
    }

    /// What the device was told of what it asked for.
    fn look_for_answers(&mut self) -> anyhow::Result<()> {
        for request in self.asked.iter_mut().filter(|request| request.answer.is_none()) {
            let job = self.jobs.iter().find(|job| job.pasid == request.pasid).context("no process")?;
            let channel = job.channels.first().context("no channel")?;
            request.answer = channel.answer(request.asked);
        }
        Ok(())
    }

    fn take_events(&mut self, guest: &mut Guest) -> anyhow::Result<()> {
        let mut strange = None;
        guest.driver.handle_events(|event| {
            let is_ours = self.sva.receive(&event);
            let is_refusal = match event {
                Event::Fault(fault) => {
                    self.jobs.iter().any(|job| job.handle.is_none() && fault.pasid == Some(job.pasid))
                }
                Event::PageRequest(_) => false,
            };
            if !is_ours && !is_refusal {
                strange = Some(event);
            }
        })?;
        same("an event that nobody caused", strange, None)
    }

    /// In the middle of its work, while all of its channels wait.
    fn is_to_die(&self) -> bool {
        let waits = |job: &Job| job.channels.iter().all(|channel| channel.waits().is_some());
        self.jobs.get(VICTIM).is_some_and(|job| job.done() >= LENGTH / 2 && waits(job))
    }

    /// The process ends without a word to the device, and is then unbound. What must hold when that has returned is
    /// checked; and what was its memory is filled for somebody else.
    fn kill(&mut self, guest: &mut Guest) -> anyhow::Result<(Kill, Vec<Gpa>)> {
        let first_waits = |job: &&Job| job.channels.first().is_some_and(|channel| channel.waits().is_some());
        let taken_in = self.jobs.iter().filter(first_waits).count();
        let Self { machine, sva, processes, jobs, asked, .. } = self;
        let job = jobs.get_mut(VICTIM).context("no process")?;
        let handle = job.handle.take().context("it is unbound")?;
        let frames = frames(guest, processes, job.id)?;
        let waiting = job.channels.iter().filter(|channel| channel.waits().is_some()).count() as u64;
        // One was taken in, for each of the first channels; what else the device was told of lies in the queue.
        same("page requests that the guest has taken in", sva.open_groups(), taken_in)?;
        ensure!(!machine.lock().device_mut().event_pending(), "an event has no place in the queue");

        let ((), sent_for_exit) = guest.measure(|guest| Ok(processes.exit(&mut guest.driver, job.id)?))?;
        // A page that it had a moment ago.
        let channel = job.channels.first().context("no channel")?;
        let Turn::Waits(after_exit) = channel.read(SOURCE, &mut [0; 64])? else {
            bail!("an access after the end of process {} does not wait", job.name);
        };
        asked.push(Request { pasid: job.pasid, asked: after_exit, answer: None });
        let waiting = waiting + 1;

        let before = *sva.serve_counters();
        let unbind = |guest: &mut Guest| {
            let unbound = sva.unbind(&mut guest.driver, processes, handle);
            Ok(unbound.map_err(|(_, error)| error)?)
        };
        let ((), sent_for_unbind) = guest.measure(unbind)?;
        let after = *sva.serve_counters();
        same("answers that failed", after.failed, 0)?;
        let by_guest = after.answered - before.answered;

        self.look_for_answers()?;
        let job = self.jobs.get(VICTIM).context("no process")?;
        for request in self.asked.iter().filter(|request| request.pasid == job.pasid) {
            ensure!(request.answer.is_some(), "an access hangs: {:?}", request.asked);
        }
        let refused = self
            .asked
            .iter()
            .filter(|request| request.pasid == job.pasid && request.answer == Some(Answer::Failed))
            .count() as u64;
        same("accesses that waited and were refused", refused, waiting)?;
        let channel = job.channels.first().context("no channel")?;
        let Turn::Refused(cause) = channel.read(SOURCE, &mut [0; 64])? else {
            bail!("an access after the unbind of process {} is not refused", job.name);
        };
        frames.iter().try_for_each(|&frame| guest.write(frame, &POISON))?;
        let _ = self.machine.kick(EVENT_QUEUE)?;
        let kill = Kill {
            process: job.name,
            pasid: job.pasid.value(),
            copied: job.done(),
            waiting,
            sent_for_exit,
            sent_for_unbind,
            answered_by_guest: by_guest,
            answered_by_device: waiting - by_guest,
            // The one above.
            refused_afterwards: 1,
            refusal: cause.to_string(),
            watched: frames.len() as u64 * PAGE,
        };
        Ok((kill, frames))
    }

    /// What the device, which nobody has stopped, did for the dead.
    fn after_kill(&self, guest: &Guest, kill: Kill, watched: &[Gpa]) -> anyhow::Result<Kill> {
        let job = self.jobs.get(VICTIM).context("no process")?;
        same("bytes copied for the dead", job.done(), kill.copied)?;
        ensure!(job.refused > 0, "the device has not tried");
        for &frame in watched {
            ensure!(guest.read(frame, PAGE_LEN)? == POISON, "{frame} was written after the unbind");
        }
        Ok(Kill { refused_afterwards: kill.refused_afterwards + job.refused, ..kill })
    }

    /// Every page request with its answer, as the device had it; the guest must have had the same.
    fn requests(&self) -> anyhow::Result<Vec<PageRequest>> {
        let mut requests = Vec::new();
        let mut granted = Vec::new();
        for Request { pasid, asked, answer } in &self.asked {
            let job = self.jobs.iter().find(|job| job.pasid == *pasid).context("no process")?;
            let Asked { ticket, address, write } = *asked;
            let answer = match answer.context("an access hangs")? {
                Answer::Retry => {
                    granted.push((*pasid, ticket.group(), address, write));
                    "SUCCESS"
                }
                Answer::Failed => "INVALID",
            };
            let access = if write { "write" } else { "read" };
            let (process, pasid, group) = (job.name, pasid.value(), ticket.group());
            requests.push(PageRequest { process, pasid, access, address: Hex(address.0), group, answer });
        }
        let mut served = Vec::new();
        for job in &self.jobs {
            let pager = self.processes.get(job.id).context("no process")?.handler();
            served.extend(
                pager.served.iter().map(|&(group, address, write)| (job.pasid, group, address, write)),
            );
        }
        granted.sort();
        served.sort();
        same("page requests that the guest granted", served, granted)?;
        Ok(requests)
    }

    /// Compares what was copied, and takes it all down.
    fn end(mut self, guest: &mut Guest) -> anyhow::Result<Vec<PagedProcess>> {
        let mut facts = Vec::new();
        for Job { name, id, handle, pasid, channels, .. } in std::mem::take(&mut self.jobs) {
            let finished = handle.is_some();
            if finished {
                self.check_copy(guest, id, name)?;
            }
            if let Some(handle) = handle {
                let unbound = self.sva.unbind(&mut guest.driver, &mut self.processes, handle);
                unbound.map_err(|(_, error)| error)?;
            }
            let pager = self.processes.remove(&mut guest.driver, id)?;
            facts.push(PagedProcess {
                name,
                pasid: pasid.value(),
                pages_made: pager.memory.counters().made,
                copied: channels.iter().map(Channel::done).sum(),
                finished,
            });
            pager.memory.release(&mut guest.driver);
        }
        same("page requests without an answer", self.sva.open_groups(), 0)?;
        let counts = self.machine.lock().device().page_request_counts();
        same("page requests in the device", (counts.requests, counts.groups), (0, 0))?;
        self.sva.release(&mut guest.driver).map_err(|(_, error)| error)?;
        Ok(facts)
    }

    /// Every byte, as the processor sees it.
    fn check_copy(&self, guest: &Guest, id: ProcessId, name: char) -> anyhow::Result<()> {
        let space = self.processes.get(id).context("no process")?.space();
        for index in 0..PAGES {
            let read = |from: Iova| {
                let at = Iova(from.0 + index * PAGE);
                let found = space.translate(&guest.driver, at, Access::READ);
                guest.read(found.map_err(|fault| anyhow::anyhow!("{fault}"))?.apply(at), PAGE_LEN)
            };
            let written = if index % 2 == 0 { page_of(name, index) } else { vec![0; PAGE_LEN] };
            ensure!(read(SOURCE)? == written, "page {index} of process {name} has changed");
            ensure!(read(TARGET)? == written, "the copy of page {index} of process {name} differs");
        }
        Ok(())
    }
}

impl Job {
    fn done(&self) -> u64 {
        self.channels.iter().map(Channel::done).sum()
    }
}

/// Where the pages that a process has lie.
fn frames(guest: &Guest, processes: &Processes<Pager>, id: ProcessId) -> anyhow::Result<Vec<Gpa>> {
    let space = processes.get(id).context("no process")?.space();
    let pages =
        [SOURCE, TARGET].into_iter().flat_map(|from| (0..PAGES).map(move |index| from.0 + index * PAGE));
    let found = |at: u64| Some(space.translate(&guest.driver, Iova(at), Access::READ).ok()?.apply(Iova(at)));
    Ok(pages.filter_map(found).collect())
}

/// What a process writes into a page.
fn page_of(name: char, index: u64) -> Vec<u8> {
    format!("process {name}, page {index}. ").into_bytes().into_iter().cycle().take(PAGE_LEN).collect()
}
