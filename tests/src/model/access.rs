//! Accesses of endpoints: every answer that is right, and the event of a fault.

use super::words::{Access, Context, Kind, LastTable, Leaf, Space, Words};
use super::world::{EndpointSpec, Hardware};
use super::{Binding, Domain, Model, bit};

/// An answer to an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Where it leads, and how many bytes from there on may go on with it at most.
    To {
        /// Guest-physical address.
        output: u64,
        /// Bytes.
        at_most: u64,
    },
    /// It faults, with this name.
    Fault(&'static str),
    /// Not modelled: the tables hold what the generator cannot make on purpose.
    Any,
}

/// One right answer, and what a device that gives it may have in its caches.
#[derive(Clone, Debug)]
pub struct Route {
    /// The answer.
    pub answer: Answer,
    /// The entry that served it, and the context found there.
    context: Option<(Option<u32>, Context)>,
    /// The translation.
    leaf: Option<Leaf>,
    /// The table of pages that it came from.
    table: Option<LastTable>,
}

impl Route {
    /// Whether the access is to wait, where its endpoint can: an entry of the page table could let it through.
    /// `None`: an SMMU says the same of addresses that its tables do not reach, so it may or may not.
    pub fn is_recoverable(&self, iova: u64) -> Option<bool> {
        let in_reach = match self.context {
            Some((_, Context::Tables(Space::Arm { input, .. }))) => iova >> 55 & 1 == 0 && iova >> input == 0,
            _ => true,
        };
        match self.answer {
            Answer::Fault("F_TRANSLATION") if !in_reach => None,
            Answer::Fault("F_TRANSLATION" | "F_ACCESS" | "F_PERMISSION" | "0x71" | "0x81" | "0x85") => {
                Some(true)
            }
            _ => Some(false),
        }
    }

    const fn plain(answer: Answer) -> Self {
        Self { answer, context: None, leaf: None, table: None }
    }
}

/// What is said about an access that a guest's table does not reach.
const UNATTACHED: Answer = Answer::Fault("unattached");

impl Model {
    /// Every right answer to an access, a fresh walk's first.
    pub fn answers(
        &self,
        id: u32,
        pasid: Option<u32>,
        iova: u64,
        access: Access,
        words: Words<'_>,
    ) -> Vec<Route> {
        let (Some(spec), Some(endpoint)) = (self.world.endpoint(id), self.endpoints.get(&id)) else {
            return vec![Route::plain(UNATTACHED)];
        };
        let domain = endpoint.domain.and_then(|domain| self.domains.get(&domain));
        let plain = match domain {
            None if self.bypass && self.world.is_own(iova, iova) => Answer::Any,
            None if self.bypass && self.world.offered & bit::BYPASS_CONFIG != 0 => {
                identity(spec, iova, access)
            } // D-16
            None => UNATTACHED, // D-14
            // What DMA meets in the device's own tables is for the second stage to say.
            Some(Domain::Bypass) if self.world.is_own(iova, iova) => Answer::Any,
            Some(Domain::Bypass) => identity(spec, iova, access),
            Some(Domain::Mapped(_)) if pasid.is_some() => UNATTACHED,
            Some(domain @ Domain::Mapped(_)) => mapped(domain, spec, iova, access),
            Some(Domain::Table) => return self.through_tables(spec, pasid, iova, access, words),
        };
        vec![Route::plain(plain)]
    }

    /// A device gave an answer that is that of some of the routes, so that it may have cached what leads to it.
    pub fn learn(&mut self, id: u32, pasid: Option<u32>, iova: u64, routes: &[Route], given: &[bool]) {
        let Some(endpoint) = self.endpoints.get_mut(&id).filter(|_| !self.strict) else { return };
        for (route, _) in routes.iter().zip(given).filter(|(_, given)| **given) {
            let Some((entry, context)) = route.context else { continue };
            if matches!(endpoint.binding, Binding::CdTable(_) | Binding::Directory(_, None)) {
                endpoint.seen.add_context(pasid, entry, context);
            }
            let (Some(entry), Context::Tables(space)) = (entry, context) else { continue };
            if let Some(leaf) = route.leaf {
                endpoint.seen.add_leaf(entry, space.asid(), leaf);
            }
            if let Some(table) = route.table {
                endpoint.seen.add_table(entry, space.asid(), iova, table);
            }
        }
    }

    fn through_tables(
        &self,
        spec: &EndpointSpec,
        pasid: Option<u32>,
        iova: u64,
        access: Access,
        words: Words<'_>,
    ) -> Vec<Route> {
        let endpoint = &self.endpoints[&spec.id];
        let fault = |name| vec![Route::plain(Answer::Fault(name))];
        let is_made = self.world.mediated.is_some();
        let is_vtd = matches!(spec.tables, Hardware::Vtd { .. });
        // The live entry first, then what may be cached.
        let mut contexts = Vec::new();
        let fresh = match &endpoint.binding {
            Binding::None => return vec![Route::plain(UNATTACHED)],
            Binding::Pages(pages) => match pages.get(&pasid.unwrap_or(0)) {
                // In the device's own descriptors, untagged DMA has that of PASID 0 for itself.
                Some(_) if pasid == Some(0) && is_made && !is_vtd => return fault("F_STREAM_DISABLED"),
                Some(context) => Ok((Some(pasid.unwrap_or(0)), *context)),
                None => return vec![Route::plain(UNATTACHED)],
            },
            Binding::CdTable(table) => match table.entry(pasid) {
                Err(name) => return fault(name),
                Ok(None) => Ok((None, Context::Bypass)),
                Ok(Some(entry)) => {
                    table.context(words, entry, spec.tables).map(|context| (Some(entry), context))
                }
            },
            Binding::Directory(table, Some(bound)) => match table.entry(pasid, spec.tables) {
                Err(name) => return fault(name),
                Ok(entry) => match bound.get(&entry) {
                    Some(context) => Ok((Some(entry), *context)),
                    // The driver is told what is wrong with the entry now.
                    None => match table.context(words, entry, spec.tables) {
                        Err(name) => return fault(name),
                        Ok(_) => return vec![Route::plain(UNATTACHED)],
                    },
                },
            },
            Binding::Directory(table, None) => match table.entry(pasid, spec.tables) {
                Err(name) => return fault(name),
                Ok(entry) => table.context(words, entry, spec.tables).map(|context| (Some(entry), context)),
            },
        };
        let mut routes = Vec::new();
        match fresh {
            Ok(context) => contexts.push(context),
            Err(name) => routes.push(Route::plain(Answer::Fault(name))),
        }
        if !self.strict {
            contexts.extend(endpoint.seen.contexts(pasid).filter(|context| Ok(*context) != fresh));
        }
        for (entry, context) in contexts {
            let through = |answer| Route { context: Some((entry, context)), ..Route::plain(answer) };
            let space = match context {
                Context::Unknown => {
                    routes.push(through(Answer::Any));
                    continue;
                }
                // Made of what bypass there is.
                Context::Bypass if is_made && is_vtd => {
                    routes.push(through(identity(spec, iova, access)));
                    continue;
                }
                Context::Bypass => {
                    routes.push(through(Answer::To { output: iova, at_most: u64::MAX }));
                    continue;
                }
                Context::Tables(space) => space,
            };
            if let Some(region) = spec.region(iova)
                && is_vtd
                && pasid.is_none()
                && region.msi
                && access.kind == Kind::Write
            {
                // VT-d takes interrupts out before it translates.
                let at_most = region.last - iova + 1;
                routes.push(through(Answer::To { output: iova, at_most }));
                continue;
            }
            self.through_space(
                spec.id,
                entry.unwrap_or(0),
                &space,
                iova,
                access,
                words,
                |answer, leaf, table| {
                    routes.push(Route { leaf, table, ..through(answer) });
                },
            );
        }
        routes
    }

    #[expect(clippy::too_many_arguments, reason = "an access has that many parts")]
    fn through_space(
        &self,
        id: u32,
        entry: u32,
        space: &Space,
        iova: u64,
        access: Access,
        words: Words<'_>,
        mut found: impl FnMut(Answer, Option<Leaf>, Option<LastTable>),
    ) {
        let to = |leaf: &Leaf| Answer::To { output: leaf.apply(iova), at_most: leaf.last() - iova + 1 };
        match space.walk(words, iova, access) {
            Ok((leaf, table)) => found(to(&leaf), Some(leaf), table),
            Err(name) => found(Answer::Fault(name), None, None),
        }
        if self.strict {
            return;
        }
        let seen = &self.endpoints[&id].seen;
        for leaf in seen.leaves(entry, space.asid(), iova).filter(|leaf| leaf.rights.allow(access)) {
            found(to(&leaf), Some(leaf), None);
        }
        for table in seen.tables(entry, space.asid(), iova) {
            // What a cached table does not translate is decided by a walk from the root.
            if let Ok((leaf, _)) = space.walk_from(words, table, iova, access) {
                found(to(&leaf), Some(leaf), Some(table));
            }
        }
    }

    /// An access faulted, for one of these reasons: the driver is to hear of it, unless `is_quiet`: then it may.
    pub fn record_fault(
        &mut self,
        id: u32,
        pasid: Option<u32>,
        iova: u64,
        access: Access,
        names: &[&str],
        is_quiet: bool,
    ) {
        if !self.endpoints.contains_key(&id) {
            return self.faults.push_nobodys(); // D-56
        }
        let record = self.record(id, pasid, iova, access);
        let reasons = names.iter().map(|name| match *name {
            "unattached" => 1_u8,
            "C_BAD_CD" | "C_BAD_SUBSTREAMID" | "F_STREAM_DISABLED" => 0,
            "0x45" | "0x46" | "0x51" | "0x59" | "0x5b" => 0,
            _ => 2,
        });
        let reasons: Vec<u8> = reasons.collect();
        let is_late = self.world.mediated.is_some() && names.iter().any(|name| is_configuration(name));
        self.faults.push(record, reasons, self.world.limits.events, is_quiet, is_late);
    }

    /// A page request became a fault: the driver is to hear of it, unless `is_quiet`: then it may.
    pub fn record_refusal(&mut self, id: u32, pasid: Option<u32>, iova: u64, access: Access, is_quiet: bool) {
        let record = self.record(id, pasid, iova, access);
        self.faults.push_aside(record, vec![2], self.world.limits.events, is_quiet);
    }

    /// The event of a fault, but for its reason.
    fn record(&self, id: u32, pasid: Option<u32>, iova: u64, access: Access) -> [u8; 24] {
        let is_extended = self.features & bit::ATTACH_TABLE != 0;
        let mut flags = 0x100_u32 | if access.kind == Kind::Write { 2 } else { 1 };
        if is_extended {
            flags |= if access.kind == Kind::Execute { 4 } else { 0 };
            flags |= if access.privileged { 8 } else { 0 };
            flags |= if pasid.is_some() { 0x200 } else { 0 };
        }
        let mut record = [0; 24];
        record[4..8].copy_from_slice(&flags.to_le_bytes());
        record[8..12].copy_from_slice(&id.to_le_bytes());
        record[12..16].copy_from_slice(&pasid.filter(|_| is_extended).unwrap_or(0).to_le_bytes());
        record[16..24].copy_from_slice(&iova.to_le_bytes());
        record
    }

    /// Whether the guest's table may say that faults of an access are not to be recorded: FPD of VT-d as it is now, or
    /// was when it was cached.
    pub fn is_quiet(
        &self,
        id: u32,
        pasid: Option<u32>,
        routes: &[Route],
        right: &[bool],
        words: Words<'_>,
    ) -> bool {
        let is_any = routes.iter().any(|route| route.answer == Answer::Any);
        let is_stale = !right.first().copied().unwrap_or(false);
        let (Some(spec), Some(endpoint)) = (self.world.endpoint(id), self.endpoints.get(&id)) else {
            return false;
        };
        let Binding::Directory(table, _) = &endpoint.binding else { return is_any };
        let Ok(entry) = table.entry(pasid, spec.tables) else { return false };
        let fpd = |at: u64| words(at).filter(|word| word & 2 != 0);
        let directory = table.base + 8 * u64::from(entry >> 6);
        let in_entry = || words(directory).and_then(|word| fpd((word & !0xfff) + 64 * u64::from(entry & 63)));
        is_any
            || is_stale
            || fpd(directory).or_else(in_entry).is_some()
            || endpoint.seen.contexts(pasid).count() > 1
    }

    /// Takes the event that the device delivered. `false`: there is no such one.
    pub fn take_event(&mut self, record: &[u8]) -> bool {
        self.faults.take(record)
    }

    /// The device said that it has no event. `false`: it must have one.
    pub fn be_silent(&mut self) -> bool {
        self.faults.be_silent(self.world.limits.events)
    }

    /// Whether the device may have an event although it says that it has none.
    pub fn may_hide_events(&self) -> bool {
        self.faults.may_hide(self.world.limits.events)
    }

    /// What there is changes.
    pub fn loosen_faults(&mut self) {
        self.faults.loosen();
    }

    /// Whether the device must have a fault to tell.
    pub fn must_have_fault(&self) -> bool {
        self.faults.must_have_some()
    }

    /// Whether the device may have an event.
    pub fn may_have_event(&self) -> bool {
        self.faults.may_have_some()
    }
}

/// Whether an access with this fault did not get to a page table.
pub(super) fn is_configuration(name: &str) -> bool {
    name == "unattached"
        || name.starts_with("C_BAD")
        || name == "F_STREAM_DISABLED"
        || name.starts_with("0x4")
        || name.starts_with("0x5") && !matches!(name, "0x5c" | "0x5d")
}

/// Bypass: D-16; reserved regions do not lead to memory (D-54), and interrupts pass.
fn identity(spec: &EndpointSpec, iova: u64, access: Access) -> Answer {
    match spec.region(iova) {
        Some(region) if !(region.msi && access.kind == Kind::Write) => Answer::Fault("unmapped"),
        Some(region) => Answer::To { output: iova, at_most: region.last - iova + 1 },
        None => Answer::To { output: iova, at_most: room(spec, iova) },
    }
}

fn mapped(domain: &Domain, spec: &EndpointSpec, iova: u64, access: Access) -> Answer {
    if spec.region(iova).is_some() {
        return identity(spec, iova, access);
    }
    let found = domain.mappings().find(|(first, mapping)| *first <= iova && iova <= mapping.last);
    let Some((first, mapping)) = found else { return Answer::Fault("unmapped") };
    // D-35; a request cannot say that instructions may not be read.
    let needed = if access.kind == Kind::Write { 2 } else { 1 };
    if mapping.flags & needed == 0 {
        return Answer::Fault("permission");
    }
    let at_most = (mapping.last - iova).saturating_add(1).min(room(spec, iova));
    Answer::To { output: mapping.output + (iova - first), at_most }
}

/// Bytes up to the next reserved region.
fn room(spec: &EndpointSpec, iova: u64) -> u64 {
    let next = spec.reserved.iter().map(|region| region.first).filter(|&first| first > iova).min();
    next.map_or(u64::MAX, |first| first - iova)
}
