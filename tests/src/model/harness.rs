//! A subject and the model, side by side.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use pgtable_formats::TableMem;
use viommu_device::host::FaultCause;
use viommu_device::soft::Piece;
use viommu_guest::hal::GuestMem;
use viommu_wire::Gpa;

use super::access::{Answer, Route};
use super::generate;
use super::layout::MEMORY;
use super::subject::Subject;
use super::words::{Access, Kind};
use super::world::{World, bit};
use super::{Domain, Model};

/// One thing that a guest, its devices, or its VMM does.
#[derive(Clone)]
pub enum Op {
    /// Sends a request of any bytes.
    Request {
        /// The device-readable part.
        readable: Vec<u8>,
        /// Bytes of the device-writable part.
        writable: usize,
        /// Parts that each is cut into, where there is a ring.
        cut: usize,
    },
    /// An endpoint accesses memory.
    Access {
        /// The endpoint.
        id: u32,
        /// Its PASID.
        pasid: Option<u32>,
        /// The address.
        iova: u64,
        /// What it does.
        access: Access,
    },
    /// The guest writes its memory.
    Write {
        /// Where.
        at: u64,
        /// What.
        words: Vec<u64>,
    },
    /// The driver offers an event buffer.
    TakeEvent {
        /// Of this many bytes.
        len: usize,
    },
    /// The driver reads the configuration space.
    ReadConfig {
        /// From this byte on.
        offset: usize,
        /// So many.
        len: usize,
    },
    /// The driver writes it.
    WriteConfig {
        /// From this byte on.
        offset: usize,
        /// This.
        bytes: Vec<u8>,
    },
    /// The driver accepts features in the middle of things.
    Accept {
        /// These, offered or not.
        features: u64,
    },
    /// A reset, and then the driver accepts features.
    Reset {
        /// A system reset.
        system: bool,
        /// Of those on offer.
        accept: u64,
    },
    /// The VMM switches strict mode.
    Strict(bool),
}

/// On one line, so that a failure can be read.
impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Request { readable, writable, cut } => {
                write!(f, "request {} {writable} cut {cut}", hex(readable))
            }
            Self::Access { id, pasid, iova, access: Access { kind, privileged } } => {
                let mode = if *privileged { " privileged" } else { "" };
                write!(f, "access {id} {pasid:?} {iova:#x} {kind:?}{mode}")
            }
            Self::Write { at, words } => write!(f, "write {at:#x} {words:x?}"),
            Self::TakeEvent { len } => write!(f, "event {len}"),
            Self::ReadConfig { offset, len } => write!(f, "config {offset} {len}"),
            Self::WriteConfig { offset, bytes } => write!(f, "config-write {offset} {}", hex(bytes)),
            Self::Accept { features } => write!(f, "accept {features:#x}"),
            Self::Reset { system, accept } => write!(f, "reset system={system} accept {accept:#x}"),
            Self::Strict(strict) => write!(f, "strict {strict}"),
        }
    }
}

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
    subject: S,
    /// The model.
    pub model: Model,
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
            written: BTreeMap::new(),
            counts: Counts::default(),
        }
    }

    /// Does one thing to both. Panics where they differ.
    pub fn step(&mut self, op: &Op) {
        match op {
            Op::Request { readable, writable, cut } => self.request(readable, *writable, *cut),
            &Op::Access { id, pasid, iova, access } => self.access(id, pasid, iova, access),
            Op::Write { at, words } => self.write(*at, words),
            &Op::TakeEvent { len } => {
                self.take_event(len);
            }
            &Op::ReadConfig { offset, len } => self.read_config(offset, len),
            Op::WriteConfig { offset, bytes } => {
                let done = self.subject.with_device(|device| device.write_config(*offset, bytes).is_ok());
                assert_eq!(done, self.model.write_config(*offset, bytes), "write to the configuration space");
            }
            &Op::Accept { features } => {
                self.drain_events(); // Their form depends on the features.
                let accepted = self.subject.accept(features);
                assert_eq!(accepted, self.model.accept(features), "features {features:#x}");
            }
            &Op::Reset { system, accept } => {
                self.counts.resets += 1;
                self.subject.reset(system, accept);
                self.model.reset(system);
                assert!(self.model.accept(accept & self.model.world.offered));
            }
            &Op::Strict(strict) => {
                self.subject.with_device(|device| device.host_mut().set_strict(strict));
                self.model.set_strict(strict);
            }
        }
        self.check();
    }

    /// Looks at everything that can be seen, with what caches hold and without. For the end of a run.
    pub fn finish(&mut self) {
        self.sweep();
        self.subject.with_device(|device| device.host_mut().flush());
        self.model.set_strict(self.model.strict);
        self.sweep();
        self.drain_events();
        // Walks set accessed and dirty flags of VT-d tables (bits 5, 6, 10), and nothing else is ever written.
        let memory = self.subject.memory();
        for (&at, &word) in &self.written {
            let found = memory.load(Gpa(at)).expect("memory");
            let flags = 0x460;
            assert_eq!(found & !flags, word & !flags, "the word at {at:#x} changed");
        }
    }

    fn request(&mut self, readable: &[u8], writable: usize, cut: usize) {
        let given = self.subject.request(readable, writable, cut);
        let wanted = self.model.request(readable, writable, MEMORY);
        let kind = readable.first().copied().filter(|kind| readable.len() >= 4 && *kind <= 9).unwrap_or(0);
        let status = wanted.used.checked_sub(4).map(|at| wanted.bytes[at]);
        self.counts.requests += 1;
        *self.counts.statuses.entry((kind, status)).or_default() += 1;
        assert_eq!(given.used, wanted.used, "used length of {}", hex(readable));
        assert!(
            given.bytes == wanted.bytes,
            "answer to {}:\n given {}\nwanted {}",
            hex(readable),
            hex(&given.bytes),
            hex(&wanted.bytes)
        );
    }

    fn access(&mut self, id: u32, pasid: Option<u32>, iova: u64, access: Access) {
        self.model.note_access(id, pasid, iova);
        let routes = self.routes(id, pasid, iova, access);
        let given = self.subject.access(id, pasid, iova, access);
        self.judge(id, pasid, iova, access, &routes, given);
        if let Err(cause) = given {
            let name = cause.to_string();
            self.model.record_fault(id, pasid, iova, access, &name);
            *self.counts.faults.entry(name).or_default() += 1;
        }
    }

    /// The right answers, by tables as they are in memory now.
    fn routes(&self, id: u32, pasid: Option<u32>, iova: u64, access: Access) -> Vec<Route> {
        let memory = self.subject.memory();
        self.model.answers(id, pasid, iova, access, &|at| memory.load(Gpa(at)).ok())
    }

    fn judge(
        &mut self,
        id: u32,
        pasid: Option<u32>,
        iova: u64,
        access: Access,
        routes: &[Route],
        given: Result<Piece, FaultCause>,
    ) {
        let is_right = |route: &Route| match (route.answer, &given) {
            (Answer::Any, _) => true,
            (Answer::To { output, at_most }, Ok(piece)) => {
                piece.output.0 == output && (1..=at_most).contains(&piece.length)
            }
            (Answer::Fault(name), Err(cause)) => cause.to_string() == name,
            _ => false,
        };
        assert!(
            routes.iter().any(is_right),
            "endpoint {id} PASID {pasid:?} {iova:#x} {access:?}: given {given:x?}, right would be {:x?}",
            routes.iter().map(|route| route.answer).collect::<Vec<_>>()
        );
        self.counts.accesses += 1;
        let domain = self.model.endpoints.get(&id).and_then(|endpoint| endpoint.domain);
        let is_table = domain.is_some_and(|domain| matches!(self.model.domains[&domain], Domain::Table));
        self.counts.through_tables += u64::from(is_table && given.is_ok());
        self.counts.stale += u64::from(!routes.first().is_some_and(is_right));
        self.counts.any += u64::from(routes.iter().any(|route| route.answer == Answer::Any));
        self.model.learn(id, pasid, iova, routes, is_right);
    }

    fn write(&mut self, at: u64, words: &[u64]) {
        for (at, &word) in (at..).step_by(8).zip(words) {
            self.subject.memory().write(Gpa(at), &word.to_le_bytes()).expect("memory");
            self.written.insert(at, word);
        }
    }

    /// Whether there was one.
    fn take_event(&mut self, len: usize) -> bool {
        match self.subject.take_event(len) {
            None => {
                assert!(self.model.be_silent(), "an event is missing");
                return false;
            }
            Some(record) if record.is_empty() => {
                assert!(len < 24 && self.model.may_have_event(), "a buffer of {len} bytes came back empty");
            }
            Some(record) => {
                assert!(
                    len >= 24 && self.model.take_event(&record),
                    "an event out of nowhere: {}",
                    hex(&record)
                );
                self.counts.events += 1;
            }
        }
        true
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
        self.subject.with_device(|device| device.read_config(offset, &mut given));
        let space = self.model.config();
        let wanted: Vec<u8> = (offset..offset + len).map(|at| space.get(at).copied().unwrap_or(0)).collect();
        assert_eq!(given, wanted, "configuration space at {offset}");
    }

    /// What can be seen at no cost.
    fn check(&mut self) {
        let model = &self.model;
        let seen = self.subject.with_device(|device| {
            let mut config = [0; 40];
            device.read_config(0, &mut config);
            let features = device.features().bits();
            (config, features, device.domain_count(), device.mapping_count(), device.needs_reset())
        });
        let wanted = (model.config(), model.features, model.domains.len(), model.mappings(), false);
        assert_eq!(seen, wanted, "configuration, features, domains, mappings, needs reset");
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
                        let given = self.subject.peek(spec.id, pasid, iova, access);
                        self.judge(spec.id, pasid, iova, access, &routes, given);
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

/// Bytes in the order of memory.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
