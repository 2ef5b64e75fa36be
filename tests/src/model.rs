//! A reference model of the device: slow, obvious, written from the specification.
//!
//! [`Model`] is a map of maps. It says what every request, as bytes, must be answered with ([`Model::request`]), and what
//! every access may be answered with ([`Model::answers`]). It shares no code with the device: requests are taken apart
//! by offset, tables are walked by [`words`]. [`World`] says what a device is made of, [`Harness`] runs a [`Subject`] and
//! the model side by side, and [`generate`] makes operations of bytes.
//!
//! An access through a guest's table has more than one right answer as long as the guest did not invalidate: the model
//! remembers what accesses may have left in caches ([`seen`]), and accepts an answer that such a cache would give, or a
//! fresh walk, and nothing else.
//!
//! Page requests go from an access through the machine and the device to the driver and back: [`asking`] says what the
//! device may do with them, and is told what it did.

mod access;
pub mod asking;
mod attach;
mod faults;
pub mod generate;
mod harness;
mod invalidate;
pub mod layout;
mod op;
mod request;
pub mod seen;
mod subject;
mod table;
mod waiting;
pub mod words;
pub mod world;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use asking::Asking;
use faults::Faults;
use words::{CdTable, Context, Directory};

pub use access::{Answer, Route};
pub use harness::{Counts, Harness};
pub use op::{Op, Twist};
pub use request::Guest;
pub use seen::Seen;
pub use subject::{Called, Direct, Machine, Made, Native, Queued, Subject, View};
pub use world::{World, bit};

/// What the device must be like.
#[derive(Clone)]
pub struct Model {
    /// What it is made of.
    pub world: Arc<World>,
    /// Negotiated.
    pub features: u64,
    /// Of the configuration space.
    pub bypass: bool,
    /// The host caches nothing.
    pub strict: bool,
    /// What exists.
    pub domains: BTreeMap<u32, Domain>,
    /// By number.
    pub endpoints: BTreeMap<u32, Endpoint>,
    /// The last few accesses: endpoint, PASID, address.
    recent: Vec<(u32, Option<u32>, u64)>,
    /// Faults that the driver was not told of.
    faults: Faults,
    /// Page requests.
    pub asking: Asking,
}

/// A domain.
#[derive(Clone, Debug)]
pub enum Domain {
    /// By first address.
    Mapped(BTreeMap<u64, Mapping>),
    /// Identity.
    Bypass,
    /// Of guest tables.
    Table,
}

/// What a MAP made.
#[derive(Clone, Copy, Debug)]
pub struct Mapping {
    /// Last address.
    pub last: u64,
    /// Where the first one leads.
    pub output: u64,
    /// As in the request.
    pub flags: u32,
}

/// An endpoint.
#[derive(Clone, Debug, Default)]
pub struct Endpoint {
    /// Where it is attached.
    pub domain: Option<u32>,
    /// Its tables, in a domain of tables.
    pub binding: Binding,
    /// What its accesses may have left in caches.
    pub seen: Seen,
}

/// The tables of an endpoint.
#[derive(Clone, Debug, Default)]
pub enum Binding {
    /// None.
    #[default]
    None,
    /// Of all PASIDs, SMMUv3.
    CdTable(CdTable),
    /// Of all PASIDs, VT-d. Where the device reads it, with what every entry that is bound led to then.
    Directory(Directory, Option<BTreeMap<u32, Context>>),
    /// Of single PASIDs; 0 is untagged DMA.
    Pages(BTreeMap<u32, Context>),
}

/// Only what a run begins with.
impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model").field("world", &self.world.name).finish_non_exhaustive()
    }
}

impl Model {
    /// As after power-on.
    pub fn new(world: Arc<World>) -> Self {
        let endpoints = world.endpoints.iter().map(|spec| (spec.id, Endpoint::default())).collect();
        Self {
            features: 0,
            bypass: world.bypass,
            strict: false,
            domains: BTreeMap::new(),
            endpoints,
            recent: Vec::new(),
            faults: Faults::new(),
            asking: Asking::new(&world.limits, world.timeout),
            world,
        }
    }

    /// The driver accepts features. `false`: refused, nothing changes.
    pub fn accept(&mut self, features: u64) -> bool {
        let chosen = features & bit::DEVICE_TYPE;
        if chosen & !self.world.offered != 0 {
            return false;
        }
        self.features = chosen;
        if !self.asks() {
            self.asking.renounce();
        }
        true
    }

    /// Whether the driver is told of page requests.
    pub fn asks(&self) -> bool {
        let needed = bit::PAGE_REQUEST | bit::ATTACH_TABLE;
        self.features & needed == needed
    }

    /// Device reset (D-6, D-8), or system reset, which restores `bypass`.
    pub fn reset(&mut self, system: bool) {
        let bypass = if system { self.world.bypass } else { self.bypass };
        for &id in self.endpoints.keys() {
            self.asking.close(id, "closed by a reset", |_| true);
        }
        self.asking.begin_anew();
        let asking = self.asking.clone();
        *self = Self { bypass, strict: self.strict, asking, ..Self::new(Arc::clone(&self.world)) };
    }

    /// Strict mode of the host, which empties caches either way.
    pub fn set_strict(&mut self, strict: bool) {
        self.strict = strict;
        for endpoint in self.endpoints.values_mut() {
            endpoint.seen = Seen::default();
        }
    }

    /// The configuration space.
    pub fn config(&self) -> [u8; 40] {
        let World { page_size_mask, input, domains, probe_size, .. } = *self.world;
        let mut bytes = [0; 40];
        bytes[0..8].copy_from_slice(&page_size_mask.to_le_bytes());
        bytes[8..16].copy_from_slice(&input.0.to_le_bytes());
        bytes[16..24].copy_from_slice(&input.1.to_le_bytes());
        bytes[24..28].copy_from_slice(&domains.0.to_le_bytes());
        bytes[28..32].copy_from_slice(&domains.1.to_le_bytes());
        bytes[32..36].copy_from_slice(&probe_size.to_le_bytes());
        bytes[36] = self.bypass.into();
        bytes
    }

    /// A write of the driver to it. `false`: refused, nothing changes.
    pub fn write_config(&mut self, offset: usize, bytes: &[u8]) -> bool {
        match bytes {
            [] => true,
            &[value @ 0..=1] if offset == 36 && self.features & bit::BYPASS_CONFIG != 0 => {
                self.bypass = value == 1;
                true
            }
            _ => false,
        }
    }

    /// Takes the part of an operation that does not depend on what is in guest memory, or on what the device chose.
    pub fn foresee(&mut self, op: &Op) {
        match op {
            Op::Request { readable, writable, .. } => {
                self.request(readable, *writable, Guest { memory: layout::MEMORY, words: &|_| None });
            }
            Op::WriteConfig { offset, bytes } => {
                self.write_config(*offset, bytes);
            }
            Op::Accept { features } => {
                self.accept(*features);
            }
            Op::Reset { system, accept } => {
                self.reset(*system);
                self.accept(accept & self.world.offered);
            }
            Op::Strict(strict) => self.set_strict(*strict),
            &Op::Access { id, pasid, iova, .. } => self.note_access(id, pasid, iova),
            Op::Write { .. }
            | Op::TakeEvent { .. }
            | Op::ReadConfig { .. }
            | Op::Time { .. }
            | Op::Answer { .. }
            | Op::Serve { .. }
            | Op::MakeUp { .. }
            | Op::Forget { .. }
            | Op::Fail => {}
        }
    }

    /// Remembers an access, so that what is generated next can meet it.
    fn note_access(&mut self, id: u32, pasid: Option<u32>, iova: u64) {
        self.recent.insert(0, (id, pasid, iova));
        self.recent.truncate(3);
    }

    /// How many mappings there are.
    pub fn mappings(&self) -> usize {
        self.domains.values().map(|domain| domain.mappings().len()).sum()
    }

    /// An endpoint leaves its domain, and its tables are gone. A domain without endpoints ceases to exist (D-29).
    fn leave(&mut self, id: u32, why: &'static str) {
        self.asking.close(id, why, |_| true);
        let Some(endpoint) = self.endpoints.get_mut(&id) else { return };
        let left = endpoint.domain;
        *endpoint = Endpoint::default();
        if let Some(domain) = left
            && self.endpoints.values().all(|endpoint| endpoint.domain != Some(domain))
        {
            self.domains.remove(&domain);
        }
    }
}

impl Domain {
    /// Of what it maps: nothing, if it is none of mappings.
    pub fn mappings(&self) -> impl ExactSizeIterator<Item = (u64, Mapping)> + '_ {
        static NONE: BTreeMap<u64, Mapping> = BTreeMap::new();
        let mappings = match self {
            Self::Mapped(mappings) => mappings,
            Self::Bypass | Self::Table => &NONE,
        };
        mappings.iter().map(|(&first, &mapping)| (first, mapping))
    }
}
