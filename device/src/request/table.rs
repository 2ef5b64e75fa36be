//! ATTACH_TABLE: the guest's own tables.

use pgtable_formats::context::{Canonical, smmuv3, vtd};
use viommu_wire::{AttachTable, Pasid, TableDescriptor};

use super::probe;
use crate::binding::Target;
use crate::device::Device;
use crate::domain::{DomainKind, DomainSpace};
use crate::endpoint::{Bound, Endpoint};
use crate::error::{Rejection, Resource};
use crate::host::{Host, Scope, SpaceSpec, Stream, TableCaps};

/// A table that was checked, and whose accesses shall use it.
struct Checked {
    table: Canonical,
    /// The PASID of a table for one; `None` for a table of all PASIDs.
    pasid: Option<Pasid>,
}

impl<H: Host> Device<H> {
    /// Order of checks: endpoint, domain, format, table, limits, host.
    pub(super) fn attach_table(&mut self, request: &AttachTable) -> Result<(), Rejection> {
        let at = self.find_endpoint(request.endpoint)?;
        if let TableDescriptor::Unbind { pasid } = request.table {
            return self.unbind(at, request, pasid);
        }
        let existing = self.find_domain(request.domain, DomainKind::Table)?;
        let Checked { table, pasid } = self.check_table(at, &request.table)?;
        if existing.is_none() {
            self.check_domains()?;
        }
        // Elsewhere it is a DETACH first, which takes all tables of the endpoint away (D-22).
        let stays = self.endpoints[at].domain == Some(request.domain);
        if let Some(pasid) = pasid {
            self.check_page_tables(at, pasid, stays)?;
        }

        let space = self.host.create(SpaceSpec::GuestTable { endpoint: request.endpoint, table: &table })?;
        let result = match pasid {
            None => {
                let entry = table.effective_pasid(None);
                self.bind_untagged_table(at, space, false, |space| Bound::PasidTable(space, entry))
            }
            Some(Pasid::ZERO) => self.bind_untagged_table(at, space, stays, Bound::PageTable),
            Some(pasid) => self.bind_page_table(at, space, pasid, stays),
        };
        let result = match result {
            Ok(()) => Ok(()),
            Err(Unbound::Unchanged(rejection)) => return Err(rejection),
            Err(Unbound::Forward(rejection)) => Err(rejection),
        };
        if !stays {
            let place = match existing {
                Some(place) => place,
                None => self.domains.insert(request.domain, DomainSpace::Table),
            };
            self.join(at, place);
        }
        result
    }

    /// Takes the table of one PASID back. The endpoint stays in the domain.
    fn unbind(&mut self, at: usize, request: &AttachTable, pasid: Pasid) -> Result<(), Rejection> {
        let AttachTable { domain, endpoint, .. } = *request;
        if self.endpoints[at].domain != Some(domain) {
            return Err(Rejection::NotAttached { endpoint, domain });
        }
        self.find_domain(domain, DomainKind::Table)?;
        if pasid == Pasid::ZERO {
            if !matches!(self.endpoints[at].untagged, Bound::PageTable(_)) {
                return Err(Rejection::NotBound { endpoint, pasid });
            }
            self.bind_untagged(at, Target::Nothing)?;
            self.record_untagged(at, Bound::Nothing);
            self.close_untagged_groups(at);
            return Ok(());
        }
        if !self.endpoints[at].pasids.contains_key(&pasid) {
            return Err(Rejection::NotBound { endpoint, pasid });
        }
        self.host.bind(Stream { endpoint, pasid: Some(pasid) }, None)?;
        if let Some(space) = self.endpoints[at].pasids.remove(&pasid) {
            self.page_tables = self.page_tables.saturating_sub(1);
            self.host.destroy(space);
        }
        self.close_groups(at, |other| other == Some(pasid));
        Ok(())
    }

    /// From the guest's numbers to a table that the endpoint at `at` takes.
    fn check_table(&self, at: usize, table: &TableDescriptor) -> Result<Checked, Rejection> {
        let format = table.format();
        let Endpoint { id: endpoint, tables, .. } = &self.endpoints[at];
        let endpoint = *endpoint;
        let caps = self.host.caps(endpoint).and_then(|caps| {
            let tables = tables.as_ref()?;
            probe::formats(tables, caps).contains(&format).then_some(tables)
        });
        match (table, caps) {
            (TableDescriptor::Smmuv3 { ste0, ste1 }, Some(TableCaps::Smmuv3(caps))) => {
                let table = smmuv3::CdTable::from_ste(*ste0, *ste1, caps).map_err(Rejection::Smmuv3)?;
                Ok(Checked { table: Canonical::Smmuv3(table), pasid: None })
            }
            (TableDescriptor::VtdPasidTable(asked), Some(TableCaps::Vtd(caps))) => {
                let table = vtd::PasidTable::new(asked.directory, asked.directory_lg2, asked.untagged, caps)
                    .map_err(Rejection::Vtd)?;
                Ok(Checked { table: Canonical::VtdPasidTable(table), pasid: None })
            }
            (TableDescriptor::VtdPageTable(asked), Some(TableCaps::Vtd(caps))) => {
                let pasid = asked.pasid;
                check_pasid(pasid, caps.pasid_bits)?;
                let flags = vtd::FirstStageFlags::from_bits_retain(asked.flags);
                let table =
                    vtd::FirstStage::new(asked.pgd, flags, asked.addr_width, caps).map_err(Rejection::Vtd)?;
                Ok(Checked { table: Canonical::VtdFirstStage(table), pasid: Some(pasid) })
            }
            (TableDescriptor::ArmPageTable(asked), Some(TableCaps::Smmuv3(caps))) => {
                check_pasid(asked.pasid, caps.ssid_bits)?;
                let registers = smmuv3::PageTableRegisters {
                    asid: asked.asid,
                    tcr: asked.tcr.into(),
                    ttbr0: asked.ttbr0,
                    ttbr1: asked.ttbr1,
                    mair: asked.mair,
                };
                let table = smmuv3::PageTable::new(&registers, caps).map_err(Rejection::Smmuv3PageTable)?;
                Ok(Checked { table: Canonical::Smmuv3PageTable(table), pasid: Some(asked.pasid) })
            }
            _ => Err(Rejection::Format { endpoint, format }),
        }
    }

    /// Whether one more page table may be bound, unless it replaces one.
    fn check_page_tables(&self, at: usize, pasid: Pasid, stays: bool) -> Result<(), Rejection> {
        let endpoint = &self.endpoints[at];
        let bound = endpoint.page_tables();
        let replaces = stays
            && match pasid {
                Pasid::ZERO => matches!(endpoint.untagged, Bound::PageTable(_)),
                pasid => endpoint.pasids.contains_key(&pasid),
            };
        // What goes when the endpoint leaves its domain makes room.
        let kept = if stays { bound } else { 0 };
        let limits = &self.config.limits;
        if !replaces && kept >= limits.max_bound_pasids_per_endpoint {
            return Err(Rejection::Limit(Resource::PasidsPerEndpoint, limits.max_bound_pasids_per_endpoint));
        }
        if !replaces && self.page_tables.saturating_sub(bound - kept) >= limits.max_bound_pasids {
            return Err(Rejection::Limit(Resource::Pasids, limits.max_bound_pasids));
        }
        Ok(())
    }

    /// Binds a table to untagged accesses. `keep`: page tables of other PASIDs stay.
    fn bind_untagged_table(
        &mut self,
        at: usize,
        mut space: H::Space,
        keep: bool,
        bound: impl FnOnce(H::Space) -> Bound<H::Space>,
    ) -> Result<(), Unbound> {
        if !keep && let Err(error) = self.unbind_pasids(at) {
            return self.unchanged(space, error);
        }
        let stream = Stream::untagged(self.endpoints[at].id);
        if let Err(error) = self.host.bind(stream, Some(&mut space)) {
            if !keep {
                self.rebind_pasids(at);
            }
            return self.unchanged(space, error);
        }
        // Translations outlive their table, and may meet the new one's tags.
        let flushed = self.flush(at, Scope::Endpoint);
        if let Err(stopped) = flushed
            && self.restore_untagged(at)
        {
            if !keep {
                self.rebind_pasids(at);
            }
            return self.unchanged(space, stopped);
        }
        if !keep {
            self.forget_pasids(at);
        }
        self.record_untagged(at, bound(space));
        self.close_untagged_groups(at); // Where PASIDs go, too, none is bound on its own any more.
        flushed.map_err(|stopped| Unbound::Forward(stopped.into()))
    }

    /// Binds a table to the accesses with `pasid`, which is not 0. `keep`: page tables of other PASIDs stay.
    fn bind_page_table(
        &mut self,
        at: usize,
        mut space: H::Space,
        pasid: Pasid,
        keep: bool,
    ) -> Result<(), Unbound> {
        if !keep && let Err(error) = self.unbind_pasids(at) {
            return self.unchanged(space, error);
        }
        // Only a page table for PASID 0 of the same domain lets untagged accesses go on.
        let release = match self.endpoints[at].untagged {
            Bound::Nothing => false,
            Bound::PageTable(_) => !keep,
            Bound::Identity | Bound::Domain | Bound::PasidTable(..) => true,
        };
        let stream = Stream { endpoint: self.endpoints[at].id, pasid: Some(pasid) };
        let released = if release { self.bind_untagged(at, Target::Nothing) } else { Ok(()) };
        if let Err(error) = released {
            if !keep {
                self.rebind_pasids(at);
            }
            return self.unchanged(space, error);
        }
        if let Err(error) = self.host.bind(stream, Some(&mut space)) {
            self.undo_release(at, release, keep);
            return self.unchanged(space, error);
        }
        // Translations outlive their table.
        let flushed = self.flush(at, if release { Scope::Endpoint } else { Scope::Pasid(Some(pasid)) });
        if let Err(stopped) = flushed
            && self.restore_pasid(at, stream, pasid, keep)
        {
            self.undo_release(at, release, keep);
            return self.unchanged(space, stopped);
        }
        if !keep {
            self.forget_pasids(at);
        }
        if release {
            self.record_untagged(at, Bound::Nothing);
        }
        match self.endpoints[at].pasids.insert(pasid, space) {
            Some(replaced) => self.host.destroy(replaced),
            None => self.page_tables += 1,
        }
        self.close_groups(at, |other| !keep || release || other == Some(pasid));
        flushed.map_err(|stopped| Unbound::Forward(stopped.into()))
    }

    /// Binds a stream with a PASID of its own to what is recorded for it. `false` where the host fails once more.
    fn restore_pasid(&mut self, at: usize, stream: Stream, pasid: Pasid, keep: bool) -> bool {
        let recorded = self.endpoints[at].pasids.get_mut(&pasid).filter(|_| keep);
        let restored = self.host.bind(stream, recorded).is_ok();
        self.needs_reset |= !restored;
        restored
    }

    /// Binds again what had to go before a page table was bound.
    fn undo_release(&mut self, at: usize, release: bool, keep: bool) {
        if release && !self.restore_untagged(at) {
            self.record_untagged(at, Bound::Nothing);
        }
        if !keep {
            self.rebind_pasids(at);
        }
    }

    fn unchanged(&mut self, space: H::Space, error: impl Into<Rejection>) -> Result<(), Unbound> {
        self.host.destroy(space);
        Err(Unbound::Unchanged(error.into()))
    }
}

/// Whether the endpoint has the PASID that a page table is for.
fn check_pasid(pasid: Pasid, bits: u8) -> Result<(), Rejection> {
    match pasid.value().checked_shr(bits.into()) {
        None | Some(0) => Ok(()),
        Some(_) => Err(Rejection::PasidTooWide { pasid, bits }),
    }
}

/// How a binding failed.
enum Unbound {
    /// All is as it was.
    Unchanged(Rejection),
    /// The way back failed, too: what is in force, and recorded, is the new table.
    Forward(Rejection),
}
