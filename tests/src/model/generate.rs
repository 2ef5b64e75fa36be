//! Operations out of bytes: the same for the state-machine test and for fuzzing.
//!
//! Numbers come from small sets, so that requests meet each other: domains, endpoints and PASIDs of which half exist,
//! addresses within a few pages. What was generated is then spoiled now and then.

mod asking;
mod tables;

use arbitrary::Unstructured;

use super::layout::{self, Tables};
use super::op::Op;
use super::words::{Access, Kind};
use super::world::{Focus, Hardware, World, bit};
use super::{Domain, Model};
use crate::rig::Memory;

pub use tables::prepared;
use tables::write;

/// What the generator wants to know of the state.
#[derive(Clone, Debug)]
pub struct Hints {
    granule: u64,
    input: (u64, u64),
    probe_size: usize,
    offered: u64,
    /// Where endpoints are attached.
    attached: Vec<(u32, u32)>,
    /// Mappings of any domain: domain, first, last.
    mappings: Vec<(u32, u64, u64)>,
    /// Endpoints, and whether their tables are VT-d ones.
    endpoints: Vec<(u32, Option<bool>)>,
    focus: Focus,
    /// The device has tables of its own.
    is_made: bool,
    /// The last few accesses.
    recent: Vec<(u32, Option<u32>, u64)>,
}

impl Hints {
    /// Of this state.
    pub fn new(model: &Model) -> Self {
        let World { input, probe_size, offered, .. } = *model.world;
        let attached = |(&id, endpoint): (&u32, &super::Endpoint)| Some((id, endpoint.domain?));
        let mappings = |(&id, domain): (&u32, &Domain)| {
            domain
                .mappings()
                .take(6)
                .map(move |(first, mapping)| (id, first, mapping.last))
                .collect::<Vec<_>>()
        };
        let endpoints = model.world.endpoints.iter().map(|spec| {
            let is_vtd = match spec.tables {
                Hardware::None => None,
                Hardware::Smmuv3 { .. } => Some(false),
                Hardware::Vtd { .. } => Some(true),
            };
            (spec.id, is_vtd)
        });
        Self {
            granule: model.world.granule(),
            input,
            probe_size: probe_size as usize,
            offered,
            attached: model.endpoints.iter().filter_map(attached).collect(),
            mappings: model.domains.iter().flat_map(mappings).collect(),
            endpoints: endpoints.collect(),
            focus: model.world.focus,
            is_made: model.world.mediated.is_some(),
            recent: model.recent.clone(),
        }
    }
}

/// A source of small numbers.
struct Source<'a, 'b>(&'a mut Unstructured<'b>);

/// One operation; the simplest one where the bytes have run out.
pub fn op(bytes: &mut Unstructured<'_>, hints: &Hints) -> Op {
    let mut source = Source(bytes);
    let source = &mut source;
    if hints.focus == Focus::Tables && !source.one_in(40) {
        let is_attached = |id: u32| hints.attached.iter().any(|&(attached, _)| attached == id);
        let missing = hints.endpoints.iter().find(|endpoint| !is_attached(endpoint.0));
        let request = |readable| Op::Request { readable, writable: 4, cut: 1 };
        return match (missing, source.below(20)) {
            (Some(&(id, _)), _) => request(attach_table_to(source, hints, id, 1 + id % 2)),
            (None, 0..10) => access(source, hints),
            (None, 10..16) => write(source, hints),
            (None, _) => request(invalidate(source, hints)),
        };
    }
    if hints.focus == Focus::Mappings && !hints.attached.is_empty() && !source.one_in(10) {
        let readable = match source.below(20) {
            0..9 => map(source, hints),
            9..13 => unmap(source, hints),
            _ => return access(source, hints),
        };
        return Op::Request { readable, writable: 4, cut: 1 };
    }
    if hints.focus == Focus::Requests && !source.one_in(20) {
        return asking::focused(source, hints);
    }
    match source.below(100) {
        0..50 => request(source, hints),
        50..68 => access(source, hints),
        68..80 => write(source, hints),
        80..90 => asking::any(source, hints),
        90..94 => Op::TakeEvent { len: source.pick(&[48, 48, 48, 24, 47, 0, 23, 25, 8]) },
        94 => Op::ReadConfig { offset: source.below(44), len: source.below(44) },
        95 | 96 => write_config(source),
        97 => {
            let odd = source.below(8) == 7;
            Op::Accept {
                features: hints.offered & source.features() | if odd { 1 << source.below(64) } else { 0 },
            }
        }
        98 => Op::Reset { system: source.below(2) == 1, accept: source.features() },
        _ => Op::Strict(source.below(2) == 1),
    }
}

impl Source<'_, '_> {
    fn below(&mut self, end: usize) -> usize {
        self.0.int_in_range(0..=end - 1).unwrap_or(0)
    }

    fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len())]
    }

    fn word(&mut self) -> u64 {
        self.0.arbitrary().unwrap_or(0)
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == n - 1
    }

    /// Mostly all features.
    fn features(&mut self) -> u64 {
        if self.one_in(3) { self.word() & bit::ALL } else { bit::ALL }
    }

    fn domain(&mut self) -> u32 {
        if self.one_in(8) { self.pick(&[0, 5, 200, u32::MAX]) } else { 1 + self.below(4) as u32 }
    }

    fn pasid(&mut self) -> u32 {
        if self.one_in(8) {
            self.pick(&[18, 300, 0xf_ffff, 0x10_0000, 0x4000_0001])
        } else {
            self.pick(&[0, 1, 2, 65])
        }
    }

    fn asid(&mut self) -> u16 {
        self.pick(&[1, 2, 0xffff])
    }

    /// A recent access, more often than not if there was any.
    fn recent(&mut self, hints: &Hints) -> Option<(u32, Option<u32>, u64)> {
        if hints.recent.is_empty() || self.one_in(3) { None } else { Some(self.pick(&hints.recent)) }
    }

    /// Pages that the generated page tables translate, and some beyond.
    fn table_iova(&mut self) -> u64 {
        let odd = self.one_in(12);
        let base = if odd { self.pick(&[1 << 30, 1 << 39, 1 << 47, 0xfee0_0000, !0xfff]) } else { 0 };
        let page = self.pick(&[0_u64, 0, 1, 1, 2, 3, 4, 5]);
        base | (self.pick(&[0_u64, 0, 1])) << 21 | page << 12 | self.pick(&[0, 8, 0xfff])
    }
}

fn endpoint(source: &mut Source<'_, '_>, hints: &Hints) -> u32 {
    if source.one_in(16) { source.pick(&[0, 7, 10]) } else { source.pick(&hints.endpoints).0 }
}

/// An attached endpoint and its domain, as far as there are any.
fn attached(source: &mut Source<'_, '_>, hints: &Hints) -> (u32, u32) {
    match hints.attached.is_empty() || source.one_in(5) {
        true => (endpoint(source, hints), source.domain()),
        false => source.pick(&hints.attached),
    }
}

fn request(source: &mut Source<'_, '_>, hints: &Hints) -> Op {
    let mut bytes = match source.below(32) {
        0..6 => attach(source, hints),
        6..9 => {
            let (endpoint, domain) = attached(source, hints);
            [head(2), le(&[domain, endpoint]), vec![0; 8]].concat()
        }
        9..15 => map(source, hints),
        15..18 => unmap(source, hints),
        18 => [head(5), le(&[endpoint(source, hints)]), vec![0; 64]].concat(),
        19..26 => attach_table(source, hints),
        26..30 => invalidate(source, hints),
        30 => asking::response(source, hints),
        _ => {
            let length = source.below(80);
            (0..length).map(|_| source.below(256) as u8).collect()
        }
    };
    let needed = if bytes.first() == Some(&5) { hints.probe_size + 4 } else { 4 };
    let mut writable = needed;
    if source.one_in(10) {
        match source.below(8) {
            0 | 1 => {
                let at = source.below(bytes.len().max(1));
                let bit = source.below(8);
                bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << bit);
            }
            2 => bytes.truncate(source.below(bytes.len() + 1)),
            3 => bytes.extend(vec![source.below(256) as u8; source.below(200)]),
            4 => writable = source.below(needed + 1),
            5 => writable = needed + source.below(40),
            6 => bytes.iter_mut().take(1).for_each(|kind| *kind = source.below(12) as u8),
            _ => bytes.iter_mut().skip(1).take(3).for_each(|reserved| *reserved = 0xff), // D-12
        }
    }
    let cut = if source.one_in(4) { 1 + source.below(8) } else { 1 };
    Op::Request { readable: bytes, writable, cut }
}

fn attach(source: &mut Source<'_, '_>, hints: &Hints) -> Vec<u8> {
    let (domain, endpoint) = (source.domain(), endpoint(source, hints));
    let flags = source.pick(&[0, 0, 0, 0, 0, 1, 1, 2]);
    let reserved = u32::from(source.one_in(20));
    [head(1), le(&[domain, endpoint, flags, reserved])].concat()
}

/// First and last address of a few pages, or of none.
fn range(source: &mut Source<'_, '_>, hints: &Hints) -> (u64, u64) {
    let granule = hints.granule;
    let pages = source.pick(&[1, 1, 1, 1, 2, 2, 4]);
    let first = match source.below(12) {
        10 => hints.input.1.wrapping_sub(granule * source.below(4) as u64).wrapping_add(1),
        11 => source.pick(&[0, hints.input.0, 0x800_0000, u64::MAX, 1 << 63]),
        _ => granule * (1 + source.below(10)) as u64,
    };
    let last = first.wrapping_add(granule * pages).wrapping_sub(1);
    if !source.one_in(12) {
        return (first, last);
    }
    match source.below(6) {
        0 => (last, first),
        1 => (0, u64::MAX),
        2 => (first.wrapping_add(1), last),
        3 => (first, last.wrapping_sub(1)),
        4 => (first, u64::MAX),
        _ => (source.word(), source.word()),
    }
}

fn map(source: &mut Source<'_, '_>, hints: &Hints) -> Vec<u8> {
    let domain = attached(source, hints).1;
    let (first, last) = range(source, hints);
    let output = match source.below(12) {
        10 => first.wrapping_neg(),
        11 => source.word(),
        _ if hints.is_made && source.one_in(10) => layout::WINDOW - hints.granule,
        _ => Memory::BASE + hints.granule * source.below(64) as u64,
    };
    let flags = source.pick(&[3, 3, 3, 3, 3, 3, 1, 1, 2, 2, 0, 7, 8, 1 << 31]);
    [head(3), le(&[domain]), le64(&[first, last, output]), le(&[flags])].concat()
}

fn unmap(source: &mut Source<'_, '_>, hints: &Hints) -> Vec<u8> {
    let (domain, first, last) = match hints.mappings.is_empty() || source.one_in(4) {
        true => {
            let (first, last) = range(source, hints);
            (attached(source, hints).1, first, last)
        }
        // Exactly one mapping, or off by something.
        false => {
            let (domain, first, last) = source.pick(&hints.mappings);
            let step = source.pick(&[0, 0, 0, 1, hints.granule]);
            match source.below(5) {
                0 => (domain, first.wrapping_sub(step), last),
                1 => (domain, first, last.wrapping_add(step)),
                2 => (domain, first.wrapping_add(step), last),
                3 => (domain, first, last.wrapping_sub(step)),
                _ => (domain, 0, last.max(source.pick(&hints.mappings).2)),
            }
        }
    };
    [head(4), le(&[domain]), le64(&[first, last]), le(&[u32::from(source.one_in(30))])].concat()
}

fn attach_table(source: &mut Source<'_, '_>, hints: &Hints) -> Vec<u8> {
    let (id, domain) = match source.one_in(3) {
        true => attached(source, hints),
        false => (endpoint(source, hints), source.domain()),
    };
    attach_table_to(source, hints, id, domain)
}

fn attach_table_to(source: &mut Source<'_, '_>, hints: &Hints, id: u32, domain: u32) -> Vec<u8> {
    let is_vtd = hints.endpoints.iter().find(|endpoint| endpoint.0 == id).and_then(|endpoint| endpoint.1);
    let is_odd = source.one_in(8);
    let format = match (is_vtd, is_odd) {
        (_, true) => source.pick(&[0, 1, 2, 3, 4, 0x80, 0x81, 0xff]),
        (Some(true), _) => source.pick(&[2, 2, 2, 0x81, 0x81, 0]),
        _ => source.pick(&[1, 1, 0x80, 0x80, 0x80, 0]),
    };
    let place = source.below(24);
    let zeros = source.pick(&[layout::ZEROS, layout::WINDOW, layout::WINDOW + 0x2_0000]);
    let at = |table: u64| match place {
        12 => table + 64,
        13 => zeros,
        14 => Memory::BASE + layout::MEMORY_BYTES as u64,
        15 => 1 << 40,
        _ => table,
    };
    let body = match format {
        1 => {
            let table = source.below(layout::CD_TABLE_COUNT as usize) as u64;
            let (kind, bits) = match table {
                0 => (0, 4),
                1 => (1, 8),
                _ => (0, 0),
            };
            let kind = if source.one_in(16) { source.below(4) as u64 } else { kind };
            let bits = if source.one_in(10) { source.pick(&[0, 2, 4, 5, 8, 10, 21, 31]) } else { bits };
            let base = at(layout::CD_TABLES + table * layout::CD_TABLE_STEP);
            let ste0 = base | kind << 4 | bits << 59 | if source.one_in(4) { 0xb } else { 0 };
            // What the device ignores may be set.
            let ste1 = source.pick(&[2, 2, 2, 0, 1, 3, 2 | 0xffff_ffff_0000_0000]);
            le64(&[ste0, ste1])
        }
        2 => {
            let root = at(Tables::new(true, source.below(3) as u64).root);
            let flags = if source.one_in(4) { source.below(10) as u64 } else { 0 };
            let width = source.pick(&[48, 48, 48, 48, 57, 39]);
            [le64(&[root, flags]), le(&[width, source.pasid()])].concat()
        }
        0x81 => {
            let table = source.below(layout::DIRECTORY_COUNT as usize) as u64;
            let base = at(layout::DIRECTORIES + table * layout::DIRECTORY_STEP);
            let untagged = if source.one_in(6) { source.pasid() } else { 0 };
            let lg2 = source.pick(&[7, 7, 7, 7, 9, 10, 14, 6, 15]);
            [le64(&[base]), le(&[untagged, lg2])].concat()
        }
        0x80 => tables::arm(source, at),
        _ => le(&[source.pasid()]),
    };
    let mut bytes = [head(6), le(&[domain, id]), vec![format, 0, 0, 0], body].concat();
    bytes.resize(124, 0);
    bytes
}

fn invalidate(source: &mut Source<'_, '_>, hints: &Hints) -> Vec<u8> {
    let recent = source.recent(hints);
    let (domain, pasid, page) = match recent {
        Some((id, pasid, iova)) => {
            let attached = hints.attached.iter().find(|attached| attached.0 == id);
            (attached.map_or(1, |attached| attached.1), pasid.unwrap_or(0), iova & !0xfff)
        }
        None => (attached(source, hints).1, source.pasid(), source.table_iova() & !0xfff),
    };
    let scope = if source.one_in(20) { source.below(6) as u8 } else { source.pick(&[1, 2, 2, 3, 3, 3]) };
    let caches = if source.one_in(20) { source.below(6) as u8 } else { source.pick(&[2, 2, 1, 3]) };
    let flags =
        if source.one_in(20) { source.word() as u16 } else { source.pick(&[2, 2, 2, 0, 3, 6, 4, 7, 10, 15]) };
    // Untagged accesses are named by no PASID at all.
    let is_untagged = matches!(recent, Some((_, None, _))) && source.below(2) == 0;
    let flags = if is_untagged { flags & !2 } else { flags };
    let id = if source.one_in(16) { source.word() } else { source.asid().into() };
    let (address, count, lg2) = match source.below(16) {
        13 => (0, 1, 48),
        14 => (source.word(), source.word(), source.below(70) as u8),
        15 => (source.table_iova(), source.below(3) as u64, source.pick(&[12, 21, 63, 64])),
        _ => (page, source.pick(&[1, 1, 1, 2, 3]), source.pick(&[12, 12, 12, 21])),
    };
    let mut bytes = [
        head(7),
        vec![scope, caches],
        flags.to_le_bytes().to_vec(),
        le(&[domain, pasid]),
        le64(&[id, address, count]),
        vec![lg2],
    ]
    .concat();
    bytes.resize(60, 0);
    bytes
}

fn access(source: &mut Source<'_, '_>, hints: &Hints) -> Op {
    let kinds = [Kind::Read, Kind::Read, Kind::Read, Kind::Write, Kind::Write, Kind::Write, Kind::Execute];
    let access = Access { kind: source.pick(&kinds), privileged: source.one_in(8) };
    let waits = source.below(3) != 0;
    if let Some((id, pasid, iova)) = source.recent(hints)
        && source.below(2) == 0
    {
        return Op::Access { id, pasid, iova: iova ^ source.pick(&[0, 0, 8]), access, waits };
    }
    let id = attached(source, hints).0;
    let is_table = hints.endpoints.iter().any(|endpoint| endpoint.0 == id && endpoint.1.is_some());
    let pasid = match source.below(3) {
        0 => None,
        _ => Some(source.pasid() & 0xf_ffff),
    };
    let iova = match source.below(4) {
        _ if matches!(hints.focus, Focus::Tables | Focus::Requests) => source.table_iova(),
        0..3 if is_table => source.table_iova(),
        _ => match hints.mappings.is_empty() || source.one_in(4) {
            true => range(source, hints).0.wrapping_add(source.below(3) as u64).wrapping_sub(1),
            false => {
                let (_, first, last) = source.pick(&hints.mappings);
                source.pick(&[first, last, first.wrapping_sub(1), last.wrapping_add(1)])
            }
        },
    };
    Op::Access { id, pasid, iova, access, waits }
}

fn write_config(source: &mut Source<'_, '_>) -> Op {
    let (offset, bytes) = match source.below(8) {
        0..6 => (36, vec![source.below(2) as u8]),
        6 => (36, vec![source.below(256) as u8; source.below(4)]),
        _ => (source.below(48), vec![1; source.below(9)]),
    };
    Op::WriteConfig { offset, bytes }
}

fn head(kind: u8) -> Vec<u8> {
    vec![kind, 0, 0, 0]
}

fn le(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn le64(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
