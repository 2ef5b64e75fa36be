//! ATTACH_TABLE.

mod arm;

use std::collections::BTreeMap;
use std::ops::Range;

use super::request::{Guest, INVAL, NOENT, NOMEM, RANGE, UNSUPP, is_zero, le32, le64};
use super::words::{CdTable, Context, Directory, Space, Words};
use super::world::Hardware;
use super::{Binding, Domain, Model};

/// What a request asks to bind.
enum Asked {
    CdTable(CdTable),
    Directory(Directory),
    Pages(u32, Context),
}

/// A table, and the extents that have to lie in memory: where each begins, and its size.
struct Judged {
    asked: Asked,
    extents: Vec<(u64, u64)>,
}

/// A rejection: its status, and where two things are wrong another one that is right as well.
pub(super) type Refused = Vec<u8>;

fn refused<T>(status: u8) -> Result<T, Refused> {
    Err(vec![status])
}

impl Model {
    pub(super) fn attach_table(&mut self, bytes: &[u8], guest: Guest<'_>) -> Result<(), Refused> {
        let (domain, id, format) = (le32(bytes, 4), le32(bytes, 8), bytes[12]);
        if !is_zero(&bytes[13..16]) {
            return refused(INVAL);
        }
        // Where each format has a PASID, and where its reserved bytes begin and end.
        let (pasid, reserved): (_, &[Range<usize>]) = match format {
            0 => (Some(16), &[Range { start: 20, end: 124 }]),
            1 => (None, &[Range { start: 32, end: 124 }]),
            2 => (Some(36), &[Range { start: 40, end: 124 }]),
            0x80 => (Some(16), &[22..24, 56..124]),
            0x81 => (Some(24), &[Range { start: 29, end: 124 }]),
            _ => (None, &[]),
        };
        if reserved.iter().any(|range| !is_zero(&bytes[range.clone()])) {
            return refused(INVAL);
        }
        if pasid.is_some_and(|at| le32(bytes, at) >> 20 != 0) {
            return refused(UNSUPP);
        }
        if !self.endpoints.contains_key(&id) {
            return refused(NOENT);
        }
        if format == 0 {
            return self.unbind(domain, id, le32(bytes, 16));
        }
        if domain < self.world.domains.0 || self.world.domains.1 < domain {
            return refused(RANGE);
        }
        if !matches!(self.domains.get(&domain), None | Some(Domain::Table)) {
            return refused(INVAL); // D-21
        }
        let hardware = self.world.endpoint(id).map_or(Hardware::None, |spec| spec.tables);
        let Judged { asked, extents } = match (format, hardware) {
            (1, Hardware::Smmuv3 { .. }) => cd_table(bytes, hardware)?,
            (2, Hardware::Vtd { .. }) => pages(bytes, hardware)?,
            (0x80, Hardware::Smmuv3 { .. }) => arm::pages(bytes, hardware)?,
            (0x81, Hardware::Vtd { .. }) => directory(bytes, hardware)?,
            _ => return refused(UNSUPP),
        };
        let stays = self.endpoints[&id].domain == Some(domain);
        self.check_limits(id, domain, stays, &asked)?;
        let is_memory = |(first, size): &(u64, u64)| {
            let last = first + (size - 1);
            guest.memory.0 <= *first && last <= guest.memory.1 && !self.world.is_own(*first, last)
        };
        if !extents.iter().all(is_memory) {
            return refused(INVAL);
        }

        if !stays {
            self.join(id, domain, Domain::Table);
        }
        self.bind(id, asked, hardware, guest);
        Ok(())
    }

    fn check_limits(&self, id: u32, domain: u32, stays: bool, asked: &Asked) -> Result<(), Refused> {
        let limits = &self.world.limits;
        if !self.domains.contains_key(&domain) && self.domains.len() >= limits.domains {
            return refused(NOMEM);
        }
        let Asked::Pages(pasid, _) = asked else { return Ok(()) };
        // Those that stay bound, this one aside.
        let kept = |other: u32| match &self.endpoints[&other].binding {
            Binding::Pages(_) if other == id && !stays => 0,
            Binding::Pages(pages) => pages.keys().filter(|&&bound| other != id || bound != *pasid).count(),
            _ => 0,
        };
        let all: usize = self.endpoints.keys().map(|&other| kept(other)).sum();
        let replaces =
            stays && matches!(&self.endpoints[&id].binding, Binding::Pages(p) if p.contains_key(pasid));
        match !replaces && (kept(id) >= limits.pasids_per_endpoint || all >= limits.pasids) {
            true => refused(NOMEM),
            false => Ok(()),
        }
    }

    /// what waited for what is replaced waits no longer.
    fn bind(&mut self, id: u32, asked: Asked, hardware: Hardware, guest: Guest<'_>) {
        let is_made = self.world.mediated.is_some();
        let Some(endpoint) = self.endpoints.get_mut(&id) else { return };
        match (asked, &mut endpoint.binding) {
            (Asked::CdTable(table), binding) => *binding = Binding::CdTable(table),
            (Asked::Directory(table), binding) => {
                let read = is_made.then(|| read(&table, hardware, guest));
                *binding = Binding::Directory(table, read);
            }
            (Asked::Pages(pasid, context), Binding::Pages(pages)) => {
                pages.insert(pasid, context);
                endpoint.seen.forget_entry(pasid);
                return self
                    .asking
                    .close(id, "closed by the ATTACH_TABLE of a PASID", |of| of.unwrap_or(0) == pasid);
            }
            (Asked::Pages(pasid, context), binding) => *binding = Binding::Pages([(pasid, context)].into()),
        }
        endpoint.seen.clear();
        self.asking.close(id, "closed by an ATTACH_TABLE", |_| true);
    }

    fn unbind(&mut self, domain: u32, id: u32, pasid: u32) -> Result<(), Refused> {
        let Some(endpoint) = self.endpoints.get_mut(&id) else { return refused(NOENT) };
        if endpoint.domain != Some(domain) {
            return refused(INVAL);
        }
        if domain < self.world.domains.0 || self.world.domains.1 < domain {
            return refused(RANGE);
        }
        if !matches!(self.domains.get(&domain), Some(Domain::Table)) {
            return refused(INVAL);
        }
        let Binding::Pages(pages) = &mut endpoint.binding else { return refused(NOENT) };
        if pages.remove(&pasid).is_none() {
            return refused(NOENT);
        }
        endpoint.seen.forget_entry(pasid);
        self.asking.close(id, "closed by format NONE", |of| of.unwrap_or(0) == pasid);
        Ok(())
    }

    /// A device that reads PASID tables itself reads an entry anew, or all of them.
    pub(super) fn read_again(&mut self, id: u32, pasid: Option<Option<u32>>, guest: Guest<'_>) {
        let hardware = self.world.endpoint(id).map_or(Hardware::None, |spec| spec.tables);
        let Some(endpoint) = self.endpoints.get_mut(&id) else { return };
        let Binding::Directory(table, Some(bound)) = &mut endpoint.binding else { return };
        match pasid {
            None => *bound = read(table, hardware, guest),
            Some(pasid) => {
                let Ok(entry) = table.entry(pasid, hardware) else { return };
                match read_entry(table, entry, hardware, guest) {
                    Some(context) => bound.insert(entry, context),
                    None => bound.remove(&entry),
                };
            }
        }
    }
}

/// Every entry that is legal, and whose page table is in memory.
fn read(table: &Directory, hardware: Hardware, guest: Guest<'_>) -> BTreeMap<u32, Context> {
    let Hardware::Vtd { pasid_bits, .. } = hardware else { return BTreeMap::new() };
    let end = 1_u32 << (table.lg2 + 6).min(pasid_bits.into());
    let is_present =
        |entry: &u32| (guest.words)(table.base + 8 * u64::from(entry >> 6)).is_some_and(|word| word & 1 != 0);
    let tables = (0..end).step_by(64).filter(is_present);
    let entries = tables.flat_map(|first| first..end.min(first + 64)).chain([table.untagged]);
    entries.filter_map(|entry| Some((entry, read_entry(table, entry, hardware, guest)?))).collect()
}

fn read_entry(table: &Directory, entry: u32, hardware: Hardware, guest: Guest<'_>) -> Option<Context> {
    let found = table.context(guest.words as Words<'_>, entry, hardware).ok()?;
    let is_there = match found {
        Context::Tables(Space::Vtd { root, .. }) => guest.memory.0 <= root && root + 4095 <= guest.memory.1,
        _ => true,
    };
    is_there.then_some(found)
}

fn cd_table(bytes: &[u8], hardware: Hardware) -> Result<Judged, Refused> {
    let Hardware::Smmuv3 { ssid_bits, two_level, oas, .. } = hardware else { return refused(UNSUPP) };
    let (ste0, ste1) = (le64(bytes, 16), le64(bytes, 24));
    let cd_max = (ste0 >> 59) as u32;
    if cd_max > ssid_bits.into() {
        return refused(UNSUPP);
    }
    let leaf_bits = match ste0 >> 4 & 3 {
        _ if cd_max == 0 => 0,
        0 => 0,
        1 => 6,
        2 => 10,
        _ => return refused(INVAL),
    };
    if leaf_bits != 0 && !two_level {
        return refused(UNSUPP);
    }
    let base = ste0 & 0x000f_ffff_ffff_ffc0;
    let size = if leaf_bits == 0 { 64 << cd_max } else { 8 << cd_max.saturating_sub(leaf_bits) };
    if base >> oas != 0 || base % u64::max(size, 64) != 0 {
        return refused(INVAL);
    }
    let table = CdTable { base, leaf_bits, cd_max, dss: ste1 & 3 };
    Ok(Judged { asked: Asked::CdTable(table), extents: vec![(base, size)] })
}

fn pages(bytes: &[u8], hardware: Hardware) -> Result<Judged, Refused> {
    let Hardware::Vtd { pasid_bits, haw, five_levels, giant_pages, srs, eafs, .. } = hardware else {
        return refused(UNSUPP);
    };
    let (root, flags, width, pasid) = (le64(bytes, 16), le64(bytes, 24), le32(bytes, 32), le32(bytes, 36));
    if pasid >> pasid_bits != 0 {
        return refused(UNSUPP);
    }
    let levels = match width {
        48 => 4,
        57 if five_levels => 5,
        57 => return refused(UNSUPP),
        _ => return refused(INVAL),
    };
    if flags >> 3 != 0 {
        return refused(INVAL);
    }
    let (sre, eafe, wpe) = (flags & 1 != 0, flags & 2 != 0, flags & 4 != 0);
    if sre && !srs || eafe && !eafs {
        return refused(UNSUPP);
    }
    if root % 4096 != 0 || root >> haw != 0 {
        return refused(INVAL);
    }
    let space = Space::Vtd { root, levels, sre, wpe: sre && wpe, haw: haw.into(), giant_pages };
    Ok(Judged { asked: Asked::Pages(pasid, Context::Tables(space)), extents: vec![(root, 4096)] })
}

fn directory(bytes: &[u8], hardware: Hardware) -> Result<Judged, Refused> {
    let Hardware::Vtd { pasid_bits, haw, rps, .. } = hardware else { return refused(UNSUPP) };
    let (base, untagged, lg2) = (le64(bytes, 16), le32(bytes, 24), bytes[28]);
    if !(7..=14).contains(&lg2) {
        return refused(INVAL);
    }
    // What fits a page may cover more than there is.
    if lg2 > 9 && lg2 + 6 > pasid_bits {
        return refused(UNSUPP);
    }
    if untagged != 0 && !rps {
        return refused(UNSUPP);
    }
    if untagged >> (lg2 + 6) != 0 || base % 4096 != 0 || base >> haw != 0 {
        return refused(INVAL);
    }
    let table = Directory { base, lg2: lg2.into(), untagged };
    Ok(Judged { asked: Asked::Directory(table), extents: vec![(base, 8 << lg2)] })
}
