//! INVALIDATE.

use super::request::{Guest, INVAL, NOENT, OK, is_zero, le16, le32, le64};
use super::seen::Drop;
use super::world::Hardware;
use super::{Binding, Domain, Endpoint, Model};

const DOMAIN: u8 = 1;
const PASID: u8 = 2;
const ADDRESS: u8 = 3;

impl Model {
    pub(super) fn invalidate(&mut self, bytes: &[u8], guest: Guest<'_>) -> u8 {
        let (scope, caches, flags, domain) = (bytes[4], bytes[5], le16(bytes, 6), le32(bytes, 8));
        let (is_leaf, has_pasid, has_id, global) =
            (flags & 1 != 0, flags & 2 != 0, flags & 4 != 0, flags & 8 != 0);
        if !is_zero(&bytes[41..60]) || flags >> 4 != 0 || caches == 0 || caches >> 2 != 0 {
            return INVAL;
        }
        let pasid = has_pasid.then(|| le32(bytes, 12));
        let (pasid, range) = match scope {
            DOMAIN => (None, None),
            PASID => (pasid, None),
            ADDRESS => match pages(le64(bytes, 24), le64(bytes, 32), bytes[40]) {
                Some(range) => (pasid, Some(range)),
                None => return INVAL,
            },
            _ => return INVAL,
        };
        if pasid.is_some_and(|pasid| pasid >> 20 != 0) {
            return INVAL;
        }
        match self.domains.get(&domain) {
            None => return NOENT,
            Some(Domain::Table) => {}
            Some(_) => return INVAL,
        }
        // The ASID is in bits 15:0; a wider tag is none, and narrows nothing.
        let id = u16::try_from(le64(bytes, 16)).ok().filter(|_| has_id);
        let members = self.endpoints.iter().filter(|(_, endpoint)| endpoint.domain == Some(domain));
        let members: Vec<u32> = members.map(|(&number, _)| number).collect();
        for number in members {
            let hardware = self.world.endpoint(number).map_or(Hardware::None, |spec| spec.tables);
            let asid = id.filter(|_| matches!(hardware, Hardware::Smmuv3 { .. }));
            let Some(endpoint) = self.endpoints.get_mut(&number) else { continue };
            // Without a PASID, a tag reaches every PASID that has it.
            let is_by_tag = scope != DOMAIN && pasid.is_none() && asid.is_some();
            let entries = match scope {
                DOMAIN => None,
                _ => Some(entries(endpoint, pasid, hardware)),
            };
            let whole = scope == DOMAIN && asid.is_none();
            // Nothing was ever cached through a table that is not there.
            let is_bound = match &endpoint.binding {
                Binding::Pages(pages) => pages.contains_key(&pasid.unwrap_or(0)),
                _ => true,
            };
            endpoint.seen.invalidate(&Drop {
                entries,
                contexts: caches & 1 != 0,
                tables: !is_leaf || caches & 1 != 0,
                range,
                asid,
                is_by_tag: is_by_tag || scope == DOMAIN,
                // By address, those of all entries go, too: hardware does not look at the tag of a global one. An
                // entry is not named by address.
                global: global || whole || range.is_some() && caches == 2 && is_bound,
            });
            if caches & 1 != 0 {
                let named = if scope == DOMAIN { None } else { Some(pasid) };
                // A tag that no architecture has narrows nothing: by itself it is about every PASID.
                let is_wide = has_id && id.is_none() && pasid.is_none();
                self.read_again(number, named.filter(|_| !is_wide), guest);
                if is_wide {
                    self.revoke(number, None, hardware);
                }
                self.revoke(number, named, hardware);
            }
        }
        OK
    }

    /// The PASID cache was invalidated: what waits for the entry that was named waits no longer.
    fn revoke(&mut self, id: u32, named: Option<Option<u32>>, hardware: Hardware) {
        let Some(endpoint) = self.endpoints.get(&id) else { return };
        let Some(pasid) = named else {
            // Where the device reads the table itself, the machine may do so with those whose entry has changed.
            if matches!(endpoint.binding, Binding::Directory(_, Some(_))) {
                self.asking.maybe(id, |_| true);
            }
            return;
        };
        // All that have the entry; by name what was named alone.
        let serving = match &endpoint.binding {
            Binding::None => return,
            Binding::CdTable(table) => table.entry(None).ok().flatten(),
            Binding::Directory(table, _) => table.entry(None, hardware).ok(),
            Binding::Pages(_) => Some(0),
        };
        let is_named =
            |of: Option<u32>| of == pasid || serving.is_some() && of.or(serving) == pasid.or(serving);
        if !self.asks() {
            // Nobody is told of them in any case.
            return self.asking.maybe(id, is_named);
        }
        self.asking.close(id, "closed by INVALIDATE", is_named);
    }
}

/// The entries that a PASID names: its own, and the one that serves its accesses.
fn entries(endpoint: &Endpoint, pasid: Option<u32>, hardware: Hardware) -> Vec<u32> {
    let serving = match &endpoint.binding {
        Binding::None => None,
        Binding::CdTable(table) => table.entry(pasid).ok().flatten(),
        Binding::Directory(table, _) => table.entry(pasid, hardware).ok(),
        // Untagged accesses use the table of PASID 0.
        Binding::Pages(_) => pasid.or(Some(0)),
    };
    pasid.into_iter().chain(serving).collect()
}

/// The addresses of all pages that are touched.
fn pages(address: u64, count: u64, lg2: u8) -> Option<(u64, u64)> {
    if count == 0 || lg2 >= 64 {
        return None;
    }
    let bytes = u128::from(count) << lg2;
    let last = u128::from(address) + bytes - 1;
    if last > u128::from(u64::MAX) {
        return None;
    }
    let inside = (1_u64 << lg2) - 1;
    Some((address & !inside, last as u64 | inside))
}
