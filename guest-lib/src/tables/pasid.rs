//! PASID tables: which address space each PASID of an endpoint uses.

use alloc::collections::BTreeSet;

use pgtable_formats::context::{smmuv3, vtd};
use viommu_wire::{
    Caches, DomainId, EndpointId, Invalidate, InvalidateScope, Pasid, Status, TableDescriptor, VtdPageTable,
    VtdPasidTable, numbers,
};

use super::TableError;
use super::choice::{arm_page_table, is_known, smmuv3_format, stalls};
use super::lent::{Lent, Retired};
use super::space::{AddressSpace, User};
use crate::hal::{Platform, Transport};
use crate::ids::IdSpace;
use crate::probe::{Endpoint, Hardware};
use crate::{Driver, RequestError};

/// How PASIDs are handed over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Style {
    /// The first way in the device's list that this library knows.
    #[default]
    Preferred,
    /// The guest fills a table in its memory: one ATTACH_TABLE for all PASIDs.
    Table,
    /// One ATTACH_TABLE for each PASID; the device keeps the table.
    Single,
}

/// How a PASID table is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableOptions {
    /// Width of the PASIDs wanted, in bits; fewer where endpoint or hardware has fewer. 0: untagged DMA only.
    pub pasid_bits: u8,
    /// How PASIDs are handed over.
    pub style: Style,
    /// Layout of an SMMUv3 table; `None` lets its size decide.
    pub smmuv3_format: Option<smmuv3::TableFormat>,
}

impl Default for TableOptions {
    fn default() -> Self {
        Self { pasid_bits: Pasid::BITS, style: Style::Preferred, smmuv3_format: None }
    }
}

/// The address spaces of one endpoint, by PASID, as a domain of its own kind.
///
/// The address space of untagged DMA is that of PASID `None`; PASID 0 is kept free for it in every format. Behind an
/// SMMUv3 an endpoint that sends interrupts needs one, even if it is empty otherwise:
/// [interrupts](AddressSpace#interrupts) are untagged writes, and are translated.
///
/// Dropping a table leaks its memory, because the hardware may still read it; [`release`](Self::release) gives it back.
#[derive(Debug)]
pub struct PasidTable {
    endpoint: Endpoint,
    domain: DomainId,
    table: Table,
    pasids: IdSpace,
    /// Untagged DMA has an address space, or the hardware may still hold on to its last one.
    untagged: bool,
    /// The device translates the endpoint's accesses through this.
    attached: bool,
}

#[derive(Debug)]
enum Table {
    Smmuv3(smmuv3::CdTable),
    Vtd(vtd::PasidTable),
    Single { walker: Walker, bound: BTreeSet<Pasid> },
}

/// Hardware that takes one page table for each PASID.
#[derive(Clone, Copy, Debug)]
enum Walker {
    Smmuv3(smmuv3::Caps),
    Vtd(vtd::Caps),
}

impl PasidTable {
    /// Makes an empty table for `endpoint`. Several endpoints may share a domain, each with a table of its own.
    ///
    /// # Errors
    /// [`TableError::NoHardware`], [`TableError::Format`], [`TableError::Build`].
    pub fn new<P: Platform, T: Transport>(
        driver: &mut Driver<P, T>,
        endpoint: &Endpoint,
        domain: DomainId,
        options: TableOptions,
    ) -> Result<Self, TableError> {
        let properties = endpoint.properties();
        let hardware = properties.hardware.ok_or(TableError::NoHardware(endpoint.id()))?;
        let format = properties
            .formats
            .iter()
            .find(|format| is_known(*format, hardware, options.style))
            .ok_or(TableError::Format(endpoint.id()))?;
        let wanted = options.pasid_bits.min(properties.pasid_bits);
        let (_, alloc) = driver.platform.parts();
        let (table, pasid_bits) = match hardware {
            Hardware::Smmuv3(caps) if format == numbers::FORMAT_ARM_PT => {
                let table = Table::Single { walker: Walker::Smmuv3(caps), bound: BTreeSet::new() };
                (table, wanted.min(caps.ssid_bits))
            }
            Hardware::Smmuv3(caps) => {
                let bits = wanted.min(caps.ssid_bits);
                let layout = options.smmuv3_format.unwrap_or_else(|| smmuv3_format(bits, &caps));
                let table = smmuv3::CdTable::create(layout, bits, smmuv3::Untagged::Pasid0, &caps, alloc)?;
                (Table::Smmuv3(table), bits)
            }
            Hardware::Vtd(caps) if format == numbers::FORMAT_INTEL_PT => {
                let table = Table::Single { walker: Walker::Vtd(caps), bound: BTreeSet::new() };
                (table, wanted.min(caps.pasid_bits))
            }
            Hardware::Vtd(caps) => {
                // A directory has at least 2^7 entries, each for 2^6 PASIDs.
                let bits = wanted.min(caps.pasid_bits);
                let directory_lg2 = bits.saturating_sub(6).max(7);
                let table = vtd::PasidTable::create(directory_lg2, Pasid::ZERO, &caps, alloc)?;
                (Table::Vtd(table), bits)
            }
        };
        let pasids = IdSpace::new(1, (1 << pasid_bits) - 1);
        Ok(Self { endpoint: endpoint.clone(), domain, table, pasids, untagged: false, attached: false })
    }

    /// The endpoint.
    pub const fn endpoint(&self) -> EndpointId {
        self.endpoint.id()
    }

    /// The domain.
    pub const fn domain(&self) -> DomainId {
        self.domain
    }

    /// Whether the endpoint's accesses go through this table.
    pub const fn is_attached(&self) -> bool {
        self.attached
    }

    /// The format's number, as ATTACH_TABLE has it.
    pub const fn format(&self) -> u8 {
        match self.table {
            Table::Smmuv3(_) => numbers::FORMAT_ARM_SMMU3,
            Table::Vtd(_) => numbers::FORMAT_INTEL_PASID_TABLE,
            Table::Single { walker: Walker::Smmuv3(_), .. } => numbers::FORMAT_ARM_PT,
            Table::Single { walker: Walker::Vtd(_), .. } => numbers::FORMAT_INTEL_PT,
        }
    }

    /// What [`attach`](Self::attach) binds; `None` where each PASID is bound by itself.
    pub fn descriptor(&self) -> Option<TableDescriptor> {
        match &self.table {
            Table::Smmuv3(table) => {
                let [ste0, ste1] = table.words();
                Some(TableDescriptor::Smmuv3 { ste0, ste1 })
            }
            Table::Vtd(table) => Some(TableDescriptor::VtdPasidTable(VtdPasidTable {
                directory: table.extents().0,
                directory_lg2: table.directory_lg2(),
                untagged: table.untagged(),
            })),
            Table::Single { .. } => None,
        }
    }

    /// Hands the table over: from here on the endpoint's accesses go through it. Where each PASID is bound by itself,
    /// [`bind`](Self::bind) does that.
    ///
    /// # Errors
    /// [`TableError::Request`].
    pub fn attach<P: Platform, T: Transport>(&mut self, driver: &mut Driver<P, T>) -> Result<(), TableError> {
        let Some(descriptor) = self.descriptor() else {
            return Ok(());
        };
        let attached = driver.attach_table(self.domain, &self.endpoint, descriptor);
        self.attached |= attached.as_ref().map_or_else(RequestError::is_outcome_unknown, |()| true);
        Ok(attached?)
    }

    /// Takes the table back: the endpoint's accesses go through nothing of it any more.
    ///
    /// # Errors
    /// [`TableError::Request`].
    pub fn detach<P: Platform, T: Transport>(&mut self, driver: &mut Driver<P, T>) -> Result<(), TableError> {
        if self.attached {
            driver.detach(self.domain, self.endpoint.id())?;
            self.attached = false;
        }
        if let Table::Single { bound, .. } = &mut self.table {
            bound.clear();
        }
        Ok(())
    }

    /// Lets a free PASID use `space`: the endpoint's accesses with that PASID go through it from now on.
    ///
    /// # Errors
    /// [`TableError::NoPasid`]; otherwise as [`bind_at`](Self::bind_at).
    pub fn bind<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        space: &mut AddressSpace,
    ) -> Result<Pasid, TableError> {
        self.bind_or_tell(driver, space).map_err(|(_, error)| error)
    }

    /// As [`bind`](Self::bind), and tells which PASID stays taken after a failure: the hardware may use the space
    /// under it until an [`unbind`](Self::unbind) succeeds.
    pub(crate) fn bind_or_tell<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        space: &mut AddressSpace,
    ) -> Result<Pasid, (Option<Pasid>, TableError)> {
        let number = self.pasids.take(u32::MAX).ok_or((None, TableError::NoPasid))?;
        let pasid = Pasid::new(number).ok_or((None, TableError::NoPasid))?;
        self.enter_or_give_back(driver, Some(pasid), space).map_err(|error| {
            let is_taken = space.has_user(self.user(Some(pasid)));
            (is_taken.then_some(pasid), error)
        })?;
        Ok(pasid)
    }

    /// Lets a PASID of the caller's choice use `space`; `None` is untagged DMA.
    ///
    /// # Errors
    /// [`TableError::InUse`] where the PASID has an address space, [`TableError::NoPasid`] where it lies outside of
    /// the table, [`TableError::MsiWindow`] where untagged DMA is bound and `space` has mappings where interrupts of the
    /// endpoint go, [`TableError::Mismatch`], [`TableError::Edit`], [`TableError::Build`], [`TableError::Request`].
    pub fn bind_at<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        pasid: Option<Pasid>,
        space: &mut AddressSpace,
    ) -> Result<(), TableError> {
        let is_free = match pasid.map(Pasid::value) {
            None => !core::mem::replace(&mut self.untagged, true),
            Some(number) if !self.pasids.contains(number) => return Err(TableError::NoPasid),
            Some(number) => self.pasids.claim(number),
        };
        if !is_free {
            return Err(TableError::InUse);
        }
        self.enter_or_give_back(driver, pasid, space)
    }

    /// Takes `space` from a PASID, and returns when no access with that PASID uses it any more. The PASID is free
    /// again.
    ///
    /// # Errors
    /// [`TableError::NotBound`]; [`TableError::Build`]; [`TableError::Request`] where the invalidation failed: the entry
    /// is gone, but the PASID stays taken until another attempt succeeds.
    pub fn unbind<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        pasid: Option<Pasid>,
        space: &mut AddressSpace,
    ) -> Result<(), TableError> {
        self.take_away(driver, pasid, space)?;
        self.give_back(pasid);
        Ok(())
    }

    /// Whether `pasid` uses `space`.
    pub(crate) fn uses(&self, pasid: Option<Pasid>, space: &AddressSpace) -> bool {
        space.has_user(self.user(pasid))
    }

    /// [`unbind`](Self::unbind), but the PASID stays taken.
    pub(crate) fn take_away<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        pasid: Option<Pasid>,
        space: &mut AddressSpace,
    ) -> Result<(), TableError> {
        let user = self.user(pasid);
        if !space.has_user(user) {
            return Err(TableError::NotBound(pasid));
        }
        let index = pasid.unwrap_or(Pasid::ZERO);
        if let Table::Single { bound, .. } = &mut self.table {
            if bound.contains(&index) {
                let unbind = TableDescriptor::Unbind { pasid: index };
                match driver.attach_table(self.domain, &self.endpoint, unbind) {
                    // The device has nothing there any more.
                    Ok(()) | Err(RequestError::Status(Status::NoEnt)) => {}
                    Err(error) => return Err(error.into()),
                }
                bound.remove(&index);
            }
        } else {
            self.erase(driver, index)?;
            self.invalidate_entry(driver, pasid, Caches::all(), space.tag())?;
        }
        space.remove_user(user);
        Ok(())
    }

    /// How many PASIDs are in use, untagged DMA left out.
    pub fn in_use(&self) -> u32 {
        self.pasids.in_use()
    }

    /// Detaches the endpoint where it is attached, and gives the memory back.
    ///
    /// # Errors
    /// The table itself, with [`TableError::InUse`] where an address space is bound, which only [`unbind`](Self::unbind)
    /// can set free (nothing happened then); with [`TableError::Request`] where the endpoint could not be detached, so that
    /// the hardware may still read the memory; with [`TableError::Build`].
    #[expect(clippy::result_large_err, reason = "the table must not be lost")]
    pub fn release<P: Platform, T: Transport>(
        mut self,
        driver: &mut Driver<P, T>,
    ) -> Result<(), (Self, TableError)> {
        if self.untagged || self.pasids.in_use() != 0 {
            return Err((self, TableError::InUse));
        }
        if let Err(error) = self.detach(driver) {
            return Err((self, error));
        }
        let mut retired = Retired::default();
        let memory = &mut Lent::new(&mut driver.platform, &mut retired);
        let released = match self.table {
            Table::Smmuv3(table) => table.release(memory),
            Table::Vtd(table) => table.release(memory),
            Table::Single { .. } => Ok(()),
        };
        if let Err(error) = released {
            // Nothing was freed yet: another attempt finds all of it.
            return Err((self, error.into()));
        }
        retired.release_from(0, driver.platform.parts().1);
        Ok(())
    }

    /// [`enter`](Self::enter), for a PASID that was taken for it. Where the hardware may still use the space after a
    /// failure, the PASID stays taken and the space has a user.
    fn enter_or_give_back<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        pasid: Option<Pasid>,
        space: &mut AddressSpace,
    ) -> Result<(), TableError> {
        let entered = self.enter(driver, pasid, space);
        if entered.is_err() && !space.has_user(self.user(pasid)) {
            self.give_back(pasid);
        }
        entered
    }

    /// Sets a PASID free, of which the hardware knows nothing any more.
    pub(crate) fn give_back(&mut self, pasid: Option<Pasid>) {
        match pasid {
            Some(pasid) => drop(self.pasids.release(pasid.value())),
            None => self.untagged = false,
        }
    }

    /// Writes the entry of a PASID and lets the hardware see it.
    fn enter<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        pasid: Option<Pasid>,
        space: &mut AddressSpace,
    ) -> Result<(), TableError> {
        let mismatch = TableError::Mismatch(self.endpoint.id());
        let index = pasid.unwrap_or(Pasid::ZERO);
        let mut retired = Retired::default();
        match &mut self.table {
            Table::Smmuv3(table) => {
                let stalls = pasid.is_some() && stalls(driver.features, &self.endpoint, table.caps());
                let mut cd = *space.descriptor(table.caps()).ok_or(mismatch)?;
                if stalls {
                    cd.word0.set_stall(true);
                }
                if pasid.is_none() {
                    space.admit_interrupts(driver, &self.endpoint)?;
                }
                let written = table.write(&mut Lent::new(&mut driver.platform, &mut retired), index, &cd);
                retired.release_from(0, driver.platform.parts().1);
                written?;
            }
            Table::Vtd(table) => {
                let first_stage = space.first_stage(table.caps()).ok_or(mismatch)?;
                let entry = vtd::PasidEntry::first_stage(first_stage, DOMAIN_TAG);
                let written = table.write(&mut Lent::new(&mut driver.platform, &mut retired), index, &entry);
                retired.release_from(0, driver.platform.parts().1);
                written?;
            }
            Table::Single { walker, bound } => {
                if bound.contains(&index) {
                    return Err(TableError::InUse);
                }
                let descriptor = match walker {
                    Walker::Smmuv3(caps) => {
                        let cd = *space.descriptor(caps).ok_or(mismatch)?;
                        if pasid.is_none() {
                            space.admit_interrupts(driver, &self.endpoint)?;
                        }
                        TableDescriptor::ArmPageTable(arm_page_table(index, &cd))
                    }
                    Walker::Vtd(caps) => {
                        let first_stage = space.first_stage(caps).ok_or(mismatch)?;
                        TableDescriptor::VtdPageTable(VtdPageTable {
                            pgd: first_stage.root(),
                            flags: first_stage.flags().bits(),
                            addr_width: first_stage.address_width(),
                            pasid: index,
                        })
                    }
                };
                let bind = driver.attach_table(self.domain, &self.endpoint, descriptor);
                if bind.as_ref().map_or_else(RequestError::is_outcome_unknown, |()| true) {
                    bound.insert(index);
                    self.attached = true;
                    space.add_user(self.user(pasid));
                }
                return Ok(bind?);
            }
        }
        // From here on the hardware may use the space.
        let user = self.user(pasid);
        space.add_user(user);
        // An entry that was not valid may be cached as such.
        let Err(error) = self.invalidate_entry(driver, pasid, Caches::PASID, None) else {
            return Ok(());
        };
        self.erase(driver, index)?;
        if self.invalidate_entry(driver, pasid, Caches::all(), space.tag()).is_ok() {
            space.remove_user(user);
        }
        Err(error)
    }

    /// Clears an entry of a table in memory.
    fn erase<P: Platform, T: Transport>(
        &self,
        driver: &Driver<P, T>,
        index: Pasid,
    ) -> Result<(), TableError> {
        match &self.table {
            Table::Smmuv3(table) => table.clear(driver.platform.memory(), index)?,
            Table::Vtd(table) => table.clear(driver.platform.memory(), index)?,
            Table::Single { .. } => false,
        };
        Ok(())
    }

    fn invalidate_entry<P: Platform, T: Transport>(
        &self,
        driver: &mut Driver<P, T>,
        pasid: Option<Pasid>,
        caches: Caches,
        tag: Option<u16>,
    ) -> Result<(), TableError> {
        if !self.attached {
            return Ok(());
        }
        // Not LEAF: a table of the second level may have come with the entry.
        let invalidate = Invalidate {
            domain: self.domain,
            scope: InvalidateScope::Pasid(pasid),
            caches,
            leaf: false,
            tag: tag.map(u64::from),
            global: false,
        };
        match driver.invalidate(invalidate) {
            Ok(()) | Err(RequestError::Status(Status::NoEnt)) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    const fn user(&self, pasid: Option<Pasid>) -> User {
        User { domain: self.domain, endpoint: self.endpoint.id(), pasid }
    }
}

/// The domain tag in PASID entries. The host puts its own in place.
const DOMAIN_TAG: u16 = 1;
