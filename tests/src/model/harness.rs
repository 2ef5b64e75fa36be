//! A subject and the model, side by side.

use std::collections::BTreeMap;
use std::sync::Arc;

use pgtable_formats::TableMem;
use viommu_device::soft::{AccessError, Piece, Ticket};
use viommu_guest::hal::GuestMem;
use viommu_wire::{Gpa, Iova};

use super::access::{Answer, Route, is_configuration};
use super::asking::Scene;
use super::generate;
use super::layout::MEMORY;
use super::op::{Op, hex};
use super::request::Guest;
use super::subject::{Subject, access_of, stream_of};
use super::words::{Access, Kind};
use super::world::{World, bit};
use super::{Domain, Model};

/// What was done.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Requests.
    pub requests: u64,
    /// Requests by type and status; `None`: returned unwritten.
    pub statuses: BTreeMap<(u8, Option<u8>), u64>,
    /// Accesses.
    pub accesses: u64,
    /// Accesses that went through a guest's table.
    pub through_tables: u64,
    /// Accesses that were answered as only a cache can.
    pub stale: u64,
    /// Faults by name.
    pub faults: BTreeMap<String, u64>,
    /// Events taken.
    pub events: u64,
    /// Resets.
    pub resets: u64,
    /// Answers that the model has no opinion about.
    pub any: u64,
    /// Events that were page requests.
    pub page_requests: u64,
    /// Requests that bind, by format and status.
    pub formats: BTreeMap<(u8, Option<u8>), u64>,
    /// What became of page requests.
    pub asking: BTreeMap<&'static str, u64>,
}

impl Counts {
    /// Adds those of another run.
    pub fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.accesses += other.accesses;
        self.through_tables += other.through_tables;
        self.stale += other.stale;
        self.events += other.events;
        self.resets += other.resets;
        self.any += other.any;
        self.page_requests += other.page_requests;
        for (&key, count) in &other.formats {
            *self.formats.entry(key).or_default() += count;
        }
        for (&key, count) in &other.asking {
            *self.asking.entry(key).or_default() += count;
        }
        for (&key, count) in &other.statuses {
            *self.statuses.entry(key).or_default() += count;
        }
        for (name, count) in &other.faults {
            *self.faults.entry(name.clone()).or_default() += count;
        }
    }
}

/// Runs both and panics where they differ.
pub struct Harness<S> {
    pub(super) subject: S,
    /// The model.
    pub model: Model,
    /// Accesses that wait, by the number that the model has given them.
    pub(super) tickets: BTreeMap<u64, Ticket>,
    /// What the guest wrote to its memory.
    written: BTreeMap<u64, u64>,
    /// What was done.
    pub counts: Counts,
}

impl<S: Subject> Harness<S> {
    /// Both as after power-on.
    pub fn new(world: &Arc<World>) -> Self {
        Self {
            subject: S::power_on(world),
            model: Model::new(Arc::clone(world)),
            tickets: BTreeMap::new(),
            written: BTreeMap::new(),
            counts: Counts::default(),
        }
    }

    /// Does one thing to both. Panics where they differ.
    pub fn step(&mut self, op: &Op) {
        match op {
            Op::Request { readable, writable, cut } => self.request(readable, *writable, *cut),
            &Op::Access { id, pasid, iova, access, waits } => self.access(id, pasid, iova, access, waits),
            Op::Write { at, words } => self.write(*at, words),
            &Op::TakeEvent { len } => {
                self.take_event(len);
            }
            &Op::ReadConfig { offset, len } => self.read_config(offset, len),
            Op::WriteConfig { offset, bytes } => {
                let done = self.subject.with_device(|device| device.write(*offset, bytes));
                assert_eq!(done, self.model.write_config(*offset, bytes), "write to the configuration space");
            }
            &Op::Accept { features } => {
                self.drain_events(); // Their form depends on the features.
                let accepted = self.subject.accept(features);
                assert_eq!(accepted, self.model.accept(features), "features {features:#x}");
                self.settle(Scene::default());
            }
            &Op::Reset { system, accept } => {
                self.counts.resets += 1;
                self.subject.reset(system, accept);
                self.model.reset(system);
                self.settle(Scene { is_reset: true, ..Scene::default() });
                assert!(self.model.accept(accept & self.model.world.offered));
            }
            &Op::Strict(strict) => {
                self.subject.with_device(|device| device.set_strict(strict));
                self.model.set_strict(strict);
            }
            &Op::Time { by } => self.set_time(by),
            &Op::Answer { which, twist, code } => self.answer(which, twist, code),
            &Op::Serve { which } => self.serve(which),
            &Op::MakeUp { .. } => self.make_up(op),
            &Op::Forget { which } => self.forget(which),
            Op::Fail => {
                self.subject.with_device(|device| device.fail());
                self.model.asking.fails = true;
            }
        }
        self.settle(Scene::default());
        self.check();
    }

    /// Looks at everything that can be seen, with what caches hold and without. For the end of a run.
    pub fn finish(&mut self) {
        self.sweep();
        self.subject.with_device(|device| device.flush());
        self.model.set_strict(self.model.strict);
        self.sweep();
        self.drain_events();
        self.settle(Scene::default());
        self.counts.asking = self.model.asking.tally.clone();
        // Walks set accessed and dirty flags of VT-d tables (bits 5, 6, 10), and nothing else is ever written.
        let memory = self.subject.memory();
        for (&at, &word) in &self.written {
            let found = memory.load(Gpa(at)).expect("memory");
            let flags = 0x460;
            assert_eq!(found & !flags, word & !flags, "the word at {at:#x} changed");
        }
    }

    pub(super) fn request(&mut self, readable: &[u8], writable: usize, cut: usize) {
        self.model.loosen_faults();
        let given = self.subject.request(readable, writable, cut);
        let memory = self.subject.memory();
        let words = |at| memory.load(Gpa(at)).ok();
        let wanted = self.model.request(readable, writable, Guest { memory: MEMORY, words: &words });
        let mut reply = wanted.reply;
        if let (Some(or), Some(at)) = (wanted.or, reply.used.checked_sub(4))
            && given.bytes.get(at) == Some(&or)
        {
            reply.bytes[at] = or;
        }
        let kind = readable.first().copied().filter(|kind| readable.len() >= 4 && *kind <= 9).unwrap_or(0);
        let status = reply.used.checked_sub(4).map(|at| reply.bytes[at]);
        self.counts.requests += 1;
        *self.counts.statuses.entry((kind, status)).or_default() += 1;
        if kind == 6
            && let Some(&format) = readable.get(12)
            && matches!(format, 0..=2 | 0x80 | 0x81)
        {
            *self.counts.formats.entry((format, status)).or_default() += 1;
        }
        assert_eq!(given.used, reply.used, "used length of {}", hex(readable));
        assert!(
            given.bytes == reply.bytes,
            "answer to {}:\n given {}\nwanted {}",
            hex(readable),
            hex(&given.bytes),
            hex(&reply.bytes)
        );
        self.settle(Scene::default());
    }

    pub(super) fn access(&mut self, id: u32, pasid: Option<u32>, iova: u64, access: Access, waits: bool) {
        self.model.note_access(id, pasid, iova);
        let routes = self.routes(id, pasid, iova, access);
        let (stream, at, real) = (stream_of(id, pasid), Iova(iova), access_of(access));
        let given = self.subject.with_device(|device| match waits {
            true => device.wait(stream, at, real),
            false => device.translate(stream, at, real).map_err(AccessError::Fault),
        });
        let right = self.judge(id, pasid, iova, access, &routes, given, waits);
        let memory = self.subject.memory();
        let words = |at| memory.load(Gpa(at)).ok();
        let is_quiet = given.is_err() && self.model.is_quiet(id, pasid, &routes, &right, &words);
        match given {
            Ok(_) => {}
            Err(AccessError::Fault(cause)) => {
                let name = cause.to_string();
                let names = routes.iter().filter_map(|route| match route.answer {
                    Answer::Fault(wanted) if self.is_same(wanted, &name) => Some(wanted),
                    _ => None,
                });
                let mut names: Vec<&str> = names.collect();
                if names.is_empty() {
                    names.push(&name);
                }
                self.model.record_fault(id, pasid, iova, access, &names, is_quiet);
                *self.counts.faults.entry(name).or_default() += 1;
            }
            Err(AccessError::Waits(ticket)) => self.begin_to_wait(id, pasid, iova, access, ticket, is_quiet),
        }
    }

    /// The right answers, by tables as they are in memory now.
    fn routes(&self, id: u32, pasid: Option<u32>, iova: u64, access: Access) -> Vec<Route> {
        let memory = self.subject.memory();
        self.model.answers(id, pasid, iova, access, &|at| memory.load(Gpa(at)).ok())
    }

    /// Whether a fault of the machine is the one that the driver is to be told. Where the device makes one kind of table
    /// of the other, the machine has another reason for what does not get to a page table.
    fn is_same(&self, wanted: &str, given: &str) -> bool {
        let is_made = self.model.world.mediated.is_some();
        wanted == given || is_made && is_configuration(wanted) && is_configuration(given)
    }

    #[expect(clippy::too_many_arguments, reason = "an access has that many parts")]
    fn judge(
        &mut self,
        id: u32,
        pasid: Option<u32>,
        iova: u64,
        access: Access,
        routes: &[Route],
        given: Result<Piece, AccessError>,
        waits: bool,
    ) -> Vec<bool> {
        let may_wait = waits && self.model.world.endpoint(id).is_some_and(|spec| spec.waits);
        let is_right = |route: &Route| match (route.answer, &given) {
            (Answer::Any, _) => true,
            (Answer::To { output, at_most }, Ok(piece)) => {
                piece.output.0 == output && (1..=at_most).contains(&piece.length)
            }
            (Answer::Fault(_), Err(AccessError::Waits(_))) => {
                may_wait && route.is_recoverable(iova) != Some(false)
            }
            (Answer::Fault(name), Err(AccessError::Fault(cause))) => {
                self.is_same(name, &cause.to_string())
                    && !(may_wait && route.is_recoverable(iova) == Some(true))
            }
            _ => false,
        };
        assert!(
            routes.iter().any(is_right),
            "endpoint {id} PASID {pasid:?} {iova:#x} {access:?}: given {given:x?}, right would be {:x?}",
            routes.iter().map(|route| route.answer).collect::<Vec<_>>()
        );
        let right: Vec<bool> = routes.iter().map(is_right).collect();
        self.counts.accesses += 1;
        let domain = self.model.endpoints.get(&id).and_then(|endpoint| endpoint.domain);
        let is_table = domain.is_some_and(|domain| matches!(self.model.domains[&domain], Domain::Table));
        self.counts.through_tables += u64::from(is_table && given.is_ok());
        self.counts.stale += u64::from(!right.first().copied().unwrap_or(false));
        self.counts.any += u64::from(routes.iter().any(|route| route.answer == Answer::Any));
        self.model.learn(id, pasid, iova, routes, &right);
        right
    }

    pub(super) fn write(&mut self, at: u64, words: &[u64]) {
        self.model.loosen_faults();
        for (at, &word) in (at..).step_by(8).zip(words) {
            self.subject.memory().write(Gpa(at), &word.to_le_bytes()).expect("memory");
            self.written.insert(at, word);
        }
    }

    /// Whether there was one.
    pub(super) fn take_event(&mut self, len: usize) -> bool {
        let given = self.subject.take_event(len);
        let small = self.model.asking.refused[2];
        self.settle(Scene { buffer: Some(len), ..Scene::default() });
        let is_closed = self.model.asking.refused[2] != small;
        match given {
            None => {
                assert!(!is_closed && !self.model.asking.has_untold(), "a page request is missing");
                assert!(self.model.be_silent(), "an event is missing");
                return false;
            }
            Some(record) if record.is_empty() => {
                let is_right = is_closed || len < 24 && self.model.may_have_event();
                assert!(is_right, "a buffer of {len} bytes came back empty");
            }
            Some(record) => {
                assert!(!is_closed, "a page request was closed, and an event given");
                self.told(len, &record);
                self.counts.events += 1;
            }
        }
        true
    }

    fn told(&mut self, len: usize, record: &[u8]) {
        if let Ok(record) = <&[u8; 48]>::try_from(record) {
            assert!(len >= 48);
            let fault_left = self.model.must_have_fault();
            let told = self.model.asking.tell(record, fault_left);
            self.counts.page_requests += 1;
            return told.unwrap_or_else(|why| panic!("{why}"));
        }
        let is_right = len >= 24 && self.model.take_event(record);
        assert!(is_right, "an event out of nowhere: {}", hex(record));
        self.model.asking.told_fault().unwrap_or_else(|why| panic!("{why}"));
    }

    fn drain_events(&mut self) {
        loop {
            let again = self.model.may_hide_events();
            if !self.take_event(64) && !again {
                break;
            }
        }
    }

    fn read_config(&mut self, offset: usize, len: usize) {
        let mut given = vec![0xee; len];
        self.subject.with_device(|device| device.read(offset, &mut given));
        let space = self.model.config();
        let wanted: Vec<u8> = (offset..offset + len).map(|at| space.get(at).copied().unwrap_or(0)).collect();
        assert_eq!(given, wanted, "configuration space at {offset}");
    }

    /// What can be seen at no cost.
    fn check(&mut self) {
        let model = &self.model;
        let view = self.subject.with_device(|device| device.view());
        let seen = (view.config, view.features, view.domains, view.mappings, view.needs_reset);
        let needs_reset = model.asking.needs_reset;
        let wanted = (model.config(), model.features, model.domains.len(), model.mappings(), needs_reset);
        assert_eq!(seen, wanted, "configuration, features, domains, mappings, needs reset");
        self.check_asking(&view);
    }

    /// Reads and writes where it matters, without recording faults.
    fn sweep(&mut self) {
        let world = Arc::clone(&self.model.world);
        let granule = world.granule();
        let mut iovas: Vec<u64> = (0..8).map(|n| n * granule).collect();
        for domain in self.model.domains.values() {
            for (first, mapping) in domain.mappings().take(16) {
                let ends =
                    [first.checked_sub(1), Some(first), Some(mapping.last), mapping.last.checked_add(1)];
                iovas.extend(ends.into_iter().flatten());
            }
        }
        iovas.extend([0x20_0000, 0x20_1000, 0x3f_ffff, 0x800_0000, 0xfee0_0000, 1 << 39, 1 << 47, u64::MAX]);
        iovas.sort_unstable();
        iovas.dedup();
        for spec in &world.endpoints {
            for pasid in [None, Some(0), Some(1), Some(65)] {
                for &iova in &iovas {
                    for kind in [Kind::Read, Kind::Write] {
                        let access = Access { kind, privileged: false };
                        let routes = self.routes(spec.id, pasid, iova, access);
                        let (stream, at, real) = (stream_of(spec.id, pasid), Iova(iova), access_of(access));
                        let given = self.subject.with_device(|device| device.peek(stream, at, real));
                        let given = given.map_err(AccessError::Fault);
                        self.judge(spec.id, pasid, iova, access, &routes, given, false);
                    }
                }
            }
        }
    }

    /// Negotiates everything on offer, and fills the tables of [`layout`](super::layout) so that most accesses find
    /// something.
    pub fn prepare(&mut self) {
        self.step(&Op::Accept { features: self.model.world.offered & bit::ALL });
        for (at, words) in generate::prepared() {
            self.write(at, &words);
        }
    }
}
