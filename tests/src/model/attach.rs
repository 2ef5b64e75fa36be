//! ATTACH and DETACH.

use std::collections::BTreeMap;

use super::request::{INVAL, NOENT, NOMEM, OK, RANGE, UNSUPP, is_zero, le32};
use super::{Domain, Endpoint, Model, bit};

impl Model {
    pub(super) fn attach(&mut self, bytes: &[u8]) -> u8 {
        let (domain, endpoint, flags) = (le32(bytes, 4), le32(bytes, 8), le32(bytes, 12));
        if !is_zero(&bytes[16..20]) {
            return INVAL; // D-17
        }
        let allowed = u32::from(self.features & bit::BYPASS_CONFIG != 0);
        if flags & !allowed != 0 {
            return INVAL; // D-18
        }
        if !self.endpoints.contains_key(&endpoint) {
            return NOENT; // D-19
        }
        if domain < self.world.domains.0 || self.world.domains.1 < domain {
            return RANGE;
        }
        match (self.domains.get(&domain), flags) {
            (None | Some(Domain::Mapped(_)), 0) | (None | Some(Domain::Bypass), 1) => {}
            _ => return INVAL, // D-21
        }
        if self.endpoints[&endpoint].domain == Some(domain) {
            return OK;
        }
        match self.domains.get(&domain) {
            None if self.domains.len() >= self.world.limits.domains => return NOMEM,
            None => {}
            Some(found) => {
                let regions =
                    self.world.endpoint(endpoint).map(|spec| self.world.reserved(spec)).unwrap_or_default();
                if found.mappings().any(|(first, mapping)| {
                    regions.iter().any(|region| region.first <= mapping.last && first <= region.last)
                }) {
                    return UNSUPP; // D-23
                }
            }
        }
        let made = if flags == 0 { Domain::Mapped(BTreeMap::new()) } else { Domain::Bypass };
        self.join(endpoint, domain, made);
        OK
    }

    pub(super) fn detach(&mut self, bytes: &[u8]) -> u8 {
        let (domain, id) = (le32(bytes, 4), le32(bytes, 8));
        match self.endpoints.get(&id) {
            None => NOENT,                                              // D-26
            Some(endpoint) if endpoint.domain != Some(domain) => INVAL, // D-27
            Some(_) => {
                self.leave(id, "closed by DETACH"); // D-28
                OK
            }
        }
    }

    /// Puts an endpoint into a domain, which is made if there is none, and takes it out of where it was (D-22, D-24).
    pub(super) fn join(&mut self, id: u32, domain: u32, made: Domain) {
        let why = match made {
            Domain::Table => "closed by an ATTACH_TABLE elsewhere",
            Domain::Mapped(_) | Domain::Bypass => "closed by ATTACH",
        };
        self.leave(id, why);
        self.domains.entry(domain).or_insert(made);
        self.endpoints.insert(id, Endpoint { domain: Some(domain), ..Endpoint::default() });
    }
}
