//! Requests as bytes, and what must come back.

use super::words::Words;
use super::world::{EndpointSpec, Hardware};
use super::{Domain, Mapping, Model, bit};
use crate::rig::{Reply, UNWRITTEN};

pub(super) const OK: u8 = 0;
pub(super) const UNSUPP: u8 = 2;
pub(super) const DEVERR: u8 = 3;
pub(super) const INVAL: u8 = 4;
pub(super) const RANGE: u8 = 5;
pub(super) const NOENT: u8 = 6;
pub(super) const NOMEM: u8 = 8;

/// The guest's side of a request.
#[derive(Clone, Copy)]
pub struct Guest<'a> {
    /// First and last address of its memory, which is one piece.
    pub memory: (u64, u64),
    /// What is in it.
    pub words: Words<'a>,
}

/// What must come back.
#[derive(Clone, Debug)]
pub struct Foretold {
    /// All of it.
    pub reply: Reply,
    /// The status may be this as well: two things are wrong at once.
    pub or: Option<u8>,
}

/// Bytes of the readable part by type, head included; 0 where the type is not known.
const LENGTHS: [usize; 9] = [0, 20, 20, 36, 28, 72, 124, 60, 28];

pub(super) fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}

pub(super) fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub(super) fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

pub(super) fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte == 0)
}

impl Model {
    /// Does a request, and says what must come back: the used length and the whole writable part, of which what the
    /// device does not write is [`UNWRITTEN`].
    pub fn request(&mut self, readable: &[u8], writable: usize, guest: Guest<'_>) -> Foretold {
        let mut reply = Reply { used: 0, bytes: vec![UNWRITTEN; writable] };
        let mut or = None;
        // D-10, D-11, D-45; the types of the proposal only once they are negotiated.
        let known = match readable.first() {
            _ if readable.len() < 4 => false,
            Some(1..=4) => true,
            Some(5) => self.world.offered & bit::PROBE != 0,
            Some(6 | 7) => self.features & bit::ATTACH_TABLE != 0,
            Some(8) => self.features & bit::PAGE_REQUEST != 0,
            _ => false,
        };
        if !known || writable < 4 {
            return Foretold { reply, or };
        }
        let is_whole = readable.len() >= LENGTHS[usize::from(readable[0])];
        let (status, tail) = match readable[0] {
            5 => {
                let size = self.world.probe_size as usize;
                let tail = size.min(writable - 4);
                reply.bytes[..tail].fill(0); // D-50
                let status = match tail == size {
                    true if is_whole => self.probe(readable, &mut reply.bytes[..tail]),
                    _ => INVAL, // D-49, or too short itself
                };
                (status, tail)
            }
            _ if !is_whole => (INVAL, 0),
            1 => (self.attach(readable), 0),
            2 => (self.detach(readable), 0),
            3 => (self.map(readable), 0),
            4 => (self.unmap(readable), 0),
            6 => match self.attach_table(readable, guest) {
                Ok(()) => (OK, 0),
                Err(statuses) => {
                    or = statuses.get(1).copied();
                    (statuses[0], 0)
                }
            },
            7 => (self.invalidate(readable, guest), 0),
            _ => (self.page_response(readable), 0),
        };
        reply.bytes[tail..tail + 4].copy_from_slice(&[status, 0, 0, 0]); // D-13
        reply.used = tail + 4;
        Foretold { reply, or }
    }

    fn page_response(&mut self, bytes: &[u8]) -> u8 {
        let (id, flags, pasid) = (le32(bytes, 4), le32(bytes, 8), le32(bytes, 12));
        let (group, code) = (le16(bytes, 16), le16(bytes, 18));
        let pasid = (flags & 1 != 0).then_some(pasid);
        if flags >> 1 != 0
            || code > 2
            || !is_zero(&bytes[20..28])
            || pasid.is_some_and(|pasid| pasid >> 20 != 0)
        {
            return INVAL;
        }
        if !self.endpoints.contains_key(&id) {
            return NOENT;
        }
        self.asking.respond((id, pasid, group), code)
    }

    fn map(&mut self, bytes: &[u8]) -> u8 {
        let (domain, flags) = (le32(bytes, 4), le32(bytes, 32));
        let (first, last, output) = (le64(bytes, 8), le64(bytes, 16), le64(bytes, 24));
        if flags & !0b111 != 0 {
            return INVAL; // D-32
        }
        if self.features & bit::MAP_UNMAP == 0 {
            return UNSUPP;
        }
        if flags & 0b100 != 0 && self.features & bit::MMIO == 0 {
            return INVAL; // D-32
        }
        let total = self.mappings();
        let world = &self.world;
        let mappings = match self.domains.get_mut(&domain) {
            None => return NOENT, // D-33
            Some(Domain::Mapped(mappings)) => mappings,
            Some(_) => return INVAL, // D-34
        };
        let granule = u128::from(world.granule());
        let (first, last, output) = (u128::from(first), u128::from(last), u128::from(output));
        let is_ordered = first <= last;
        let is_aligned = [first, last + 1, output].iter().all(|end| end % granule == 0); // D-30
        if !is_ordered || !is_aligned || output + (last - first) > u64::MAX.into() {
            return RANGE;
        }
        let (first, last, output) = (first as u64, last as u64, output as u64);
        if first < world.input.0 || world.input.1 < last {
            return RANGE; // D-15
        }
        let members = self.endpoints.iter().filter(|(_, endpoint)| endpoint.domain == Some(domain));
        let mut regions =
            members.flat_map(|(id, _)| world.endpoint(*id).map(|spec| world.reserved(spec))).flatten();
        if regions.any(|region| region.first <= last && first <= region.last) {
            return INVAL; // D-37
        }
        if mappings.iter().any(|(&start, mapping)| start <= last && first <= mapping.last) {
            return INVAL; // D-31
        }
        if mappings.len() >= world.limits.mappings_per_domain || total >= world.limits.mappings {
            return NOMEM;
        }
        if world.is_own(output, output + (last - first)) {
            return INVAL;
        }
        mappings.insert(first, Mapping { last, output, flags });
        OK
    }

    fn unmap(&mut self, bytes: &[u8]) -> u8 {
        let (domain, first, last) = (le32(bytes, 4), le64(bytes, 8), le64(bytes, 16));
        if !is_zero(&bytes[24..28]) {
            return INVAL; // D-38
        }
        if self.features & bit::MAP_UNMAP == 0 {
            return UNSUPP;
        }
        let mappings = match self.domains.get_mut(&domain) {
            None => return NOENT, // D-39
            Some(Domain::Mapped(mappings)) => mappings,
            Some(_) => return INVAL, // D-40
        };
        if last < first {
            return RANGE;
        }
        let is_touched = |start: u64, mapping: &Mapping| start <= last && first <= mapping.last;
        let is_covered = |start: u64, mapping: &Mapping| first <= start && mapping.last <= last;
        if mappings.iter().any(|(&start, mapping)| is_touched(start, mapping) && !is_covered(start, mapping))
        {
            return RANGE; // D-41
        }
        mappings.retain(|&start, mapping| !is_touched(start, mapping)); // D-42
        OK
    }

    fn probe(&self, bytes: &[u8], area: &mut [u8]) -> u8 {
        let Some(spec) = self.world.endpoint(le32(bytes, 4)) else { return NOENT }; // D-44
        let mut properties = Vec::new();
        for region in &self.world.reserved(spec) {
            let mut value = vec![region.msi.into(), 0, 0, 0];
            value.extend(region.first.to_le_bytes());
            value.extend(region.last.to_le_bytes());
            property(&mut properties, 1, &value);
        }
        if self.features & bit::ATTACH_TABLE != 0 {
            handover(spec, self.world.mediated.is_some(), &mut properties);
        }
        if self.features & bit::PAGE_REQUEST != 0 {
            property(&mut properties, 0x802, &[if spec.waits { 3 } else { 0 }, 0, 0, 0]);
        }
        area[..properties.len()].copy_from_slice(&properties);
        OK
    }
}

/// D-46, D-47, D-48.
fn property(properties: &mut Vec<u8>, kind: u16, value: &[u8]) {
    properties.extend(kind.to_le_bytes());
    properties.extend((value.len() as u16).to_le_bytes());
    properties.extend(value);
}

/// What a driver that hands over tables has to know: registers, width of PASIDs, formats.
fn handover(spec: &EndpointSpec, takes_one: bool, properties: &mut Vec<u8>) {
    let words = |words: &[u64]| {
        let mut value = vec![0; 4];
        words.iter().for_each(|word| value.extend(word.to_le_bytes()));
        value
    };
    let (bits, formats) = match spec.tables {
        Hardware::None => return,
        Hardware::Smmuv3 { ssid_bits, shown, .. } => {
            let [idr0, idr1, idr3, idr5] = shown.map(u64::from);
            property(properties, 2, &words(&[idr0, idr1, 0, idr3, 0, idr5]));
            (ssid_bits, 0x8001)
        }
        Hardware::Vtd { pasid_bits, shown, .. } => {
            property(properties, 3, &words(&shown));
            (pasid_bits, if takes_one { 0x8102 } else { 0x0281 })
        }
    };
    if bits != 0 {
        property(properties, 0x800, &[bits, 0, 0, 0]);
    }
    property(properties, 0x801, &words(&[formats]));
}
