//! ATTACH_TABLE.

use std::ops::Range;

use super::request::{INVAL, NOENT, NOMEM, OK, RANGE, UNSUPP, is_zero, le32, le64};
use super::words::{CdTable, Directory, Space};
use super::world::Hardware;
use super::{Binding, Domain, Model};

/// What a request asks to bind.
enum Asked {
    Table(Binding),
    Pages(u32, Space),
}

impl Model {
    /// `memory`: first and last address of guest memory, which is one piece.
    pub(super) fn attach_table(&mut self, bytes: &[u8], memory: (u64, u64)) -> u8 {
        let (domain, id, format) = (le32(bytes, 4), le32(bytes, 8), bytes[12]);
        if !is_zero(&bytes[13..16]) {
            return INVAL;
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
            return INVAL;
        }
        if pasid.is_some_and(|at| le32(bytes, at) >> 20 != 0) {
            return UNSUPP;
        }
        if !self.endpoints.contains_key(&id) {
            return NOENT;
        }
        if format == 0 {
            return self.unbind(domain, id, le32(bytes, 16));
        }
        if domain < self.world.domains.0 || self.world.domains.1 < domain {
            return RANGE;
        }
        if !matches!(self.domains.get(&domain), None | Some(Domain::Table)) {
            return INVAL; // D-21
        }
        let hardware = self.world.endpoint(id).map_or(Hardware::None, |spec| spec.tables);
        let judged = match (format, hardware) {
            (1, Hardware::Smmuv3 { .. }) => cd_table(bytes, hardware),
            (2, Hardware::Vtd { .. }) => pages(bytes, hardware),
            (0x81, Hardware::Vtd { .. }) => directory(bytes, hardware),
            _ => return UNSUPP,
        };
        let (asked, base, size) = match judged {
            Ok(judged) => judged,
            Err(status) => return status,
        };

        let limits = &self.world.limits;
        let stays = self.endpoints[&id].domain == Some(domain);
        if !self.domains.contains_key(&domain) && self.domains.len() >= limits.domains {
            return NOMEM;
        }
        if let Asked::Pages(pasid, _) = &asked {
            // Those that stay bound, this one aside.
            let kept = |other: u32| match &self.endpoints[&other].binding {
                Binding::Pages(_) if other == id && !stays => 0,
                Binding::Pages(pages) => {
                    pages.keys().filter(|&&bound| other != id || bound != *pasid).count()
                }
                _ => 0,
            };
            let all: usize = self.endpoints.keys().map(|&other| kept(other)).sum();
            let replaces =
                stays && matches!(&self.endpoints[&id].binding, Binding::Pages(p) if p.contains_key(pasid));
            if !replaces && (kept(id) >= limits.pasids_per_endpoint || all >= limits.pasids) {
                return NOMEM;
            }
        }
        if base < memory.0 || memory.1 < base + (size - 1) {
            return INVAL;
        }

        if !stays {
            self.join(id, domain, Domain::Table);
        }
        let Some(endpoint) = self.endpoints.get_mut(&id) else { return NOENT };
        match (asked, &mut endpoint.binding) {
            (Asked::Table(table), binding) => {
                *binding = table;
                endpoint.seen.clear();
            }
            (Asked::Pages(pasid, space), Binding::Pages(pages)) => {
                pages.insert(pasid, space);
                endpoint.seen.forget_entry(pasid);
            }
            (Asked::Pages(pasid, space), binding) => {
                *binding = Binding::Pages([(pasid, space)].into());
                endpoint.seen.clear();
            }
        }
        OK
    }

    fn unbind(&mut self, domain: u32, id: u32, pasid: u32) -> u8 {
        let Some(endpoint) = self.endpoints.get_mut(&id) else { return NOENT };
        if endpoint.domain != Some(domain) {
            return INVAL;
        }
        if domain < self.world.domains.0 || self.world.domains.1 < domain {
            return RANGE;
        }
        if !matches!(self.domains.get(&domain), Some(Domain::Table)) {
            return INVAL;
        }
        let Binding::Pages(pages) = &mut endpoint.binding else { return NOENT };
        if pages.remove(&pasid).is_none() {
            return NOENT;
        }
        endpoint.seen.forget_entry(pasid);
        OK
    }
}

/// A table, where it begins, and its size; or the status.
type Judged = Result<(Asked, u64, u64), u8>;

fn cd_table(bytes: &[u8], hardware: Hardware) -> Judged {
    let Hardware::Smmuv3 { ssid_bits, two_level, oas, .. } = hardware else { return Err(UNSUPP) };
    let (ste0, ste1) = (le64(bytes, 16), le64(bytes, 24));
    let cd_max = (ste0 >> 59) as u32;
    if cd_max > ssid_bits.into() {
        return Err(UNSUPP);
    }
    let leaf_bits = match ste0 >> 4 & 3 {
        _ if cd_max == 0 => 0,
        0 => 0,
        1 => 6,
        2 => 10,
        _ => return Err(INVAL),
    };
    if leaf_bits != 0 && !two_level {
        return Err(UNSUPP);
    }
    let base = ste0 & 0x000f_ffff_ffff_ffc0;
    let size = if leaf_bits == 0 { 64 << cd_max } else { 8 << cd_max.saturating_sub(leaf_bits) };
    if base >> oas != 0 || base % u64::max(size, 64) != 0 {
        return Err(INVAL);
    }
    let table = CdTable { base, leaf_bits, cd_max, dss: ste1 & 3 };
    Ok((Asked::Table(Binding::CdTable(table)), base, size))
}

fn pages(bytes: &[u8], hardware: Hardware) -> Judged {
    let Hardware::Vtd { pasid_bits, haw, five_levels, giant_pages, srs, eafs, .. } = hardware else {
        return Err(UNSUPP);
    };
    let (root, flags, width, pasid) = (le64(bytes, 16), le64(bytes, 24), le32(bytes, 32), le32(bytes, 36));
    if pasid >> pasid_bits != 0 {
        return Err(UNSUPP);
    }
    let levels = match width {
        48 => 4,
        57 if five_levels => 5,
        57 => return Err(UNSUPP),
        _ => return Err(INVAL),
    };
    if flags >> 3 != 0 {
        return Err(INVAL);
    }
    let (sre, eafe, wpe) = (flags & 1 != 0, flags & 2 != 0, flags & 4 != 0);
    if sre && !srs || eafe && !eafs {
        return Err(UNSUPP);
    }
    if root % 4096 != 0 || root >> haw != 0 {
        return Err(INVAL);
    }
    let space = Space::Vtd { root, levels, sre, wpe: sre && wpe, haw: haw.into(), giant_pages };
    Ok((Asked::Pages(pasid, space), root, 4096))
}

fn directory(bytes: &[u8], hardware: Hardware) -> Judged {
    let Hardware::Vtd { pasid_bits, haw, rps, .. } = hardware else { return Err(UNSUPP) };
    let (base, untagged, lg2) = (le64(bytes, 16), le32(bytes, 24), bytes[28]);
    if !(7..=14).contains(&lg2) {
        return Err(INVAL);
    }
    // What fits a page may cover more than there is.
    if lg2 > 9 && lg2 + 6 > pasid_bits {
        return Err(UNSUPP);
    }
    if untagged != 0 && !rps {
        return Err(UNSUPP);
    }
    if untagged >> (lg2 + 6) != 0 || base % 4096 != 0 || base >> haw != 0 {
        return Err(INVAL);
    }
    let table = Directory { base, lg2: lg2.into(), untagged };
    Ok((Asked::Table(Binding::Directory(table)), base, 8 << lg2))
}
