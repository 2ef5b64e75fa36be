//! Address spaces: stage-1 page tables in guest memory.

use alloc::vec::Vec;

use pgtable_formats::context::{Stage1, smmuv3, vtd};
use pgtable_formats::edit::{EditError, EditOptions};
use pgtable_formats::format::{Attrs, Format};
use pgtable_formats::{Access, Fault, Translation};
use viommu_wire::{
    Caches, DomainId, EndpointId, Gpa, Invalidate, InvalidateScope, Iova, IovaRange, Pasid, Request, Status,
};

use super::TableError;
use super::lent::Retired;
use super::protect::{self, Piece};
use super::root::{Table, can_split};
use super::windows::Windows;
use crate::hal::{Platform, Transport};
use crate::probe::{Endpoint, Hardware};
use crate::{Driver, RequestError};

/// How an address space is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpaceOptions {
    /// log2 of the smallest page; `None` takes the smallest that the hardware has.
    pub page_lg2: Option<u8>,
    /// Mark contiguous groups where the format has them. A group is only unmapped as a whole, unless the hardware
    /// lets it be split.
    pub contiguous: bool,
    /// What becomes of tables in which nothing is mapped any more.
    pub empty_tables: EmptyTables,
}

/// What becomes of a page table's tables in which nothing is mapped any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum EmptyTables {
    /// They stay where an unmap covers only a part of what they translate, ready for the next mapping; so an unmap of
    /// single pages invalidates leaves only. One that covers all of it gives them back. What stays is bounded by the
    /// addresses that the space has ever mapped, one page for each 2 MiB of them where pages have 4 KiB, and goes with
    /// [`trim`](AddressSpace::trim), [`close`](AddressSpace::close) and [`release`](AddressSpace::release).
    #[default]
    Keep,
    /// They go at once. Where mappings come and go alone, each costs tables on all levels, and an invalidation of what
    /// the hardware cached of them.
    Free,
}

/// A stage-1 page table in guest memory, for addresses of 48 bits.
///
/// Any number of PASIDs may use it at once ([`PasidTable::bind`](super::PasidTable::bind)). Dropping it leaks its
/// memory; [`release`](Self::release) gives it back.
///
/// # Interrupts
/// An SMMUv3 translates message-signalled interrupts like any untagged write. So when untagged DMA of an endpoint gets
/// this address space, the endpoint's MSI window is mapped in it: at its own address, as device memory. The window
/// then belongs to the space for good: [`map`](Self::map) refuses addresses in it, and [`unmap`](Self::unmap) passes
/// over it. VT-d takes interrupts out before it translates, so there no window is mapped.
#[derive(Debug)]
pub struct AddressSpace {
    pub(super) table: Table,
    pub(super) edit: EditOptions,
    users: Vec<User>,
    /// MSI windows that are mapped, in whole pages.
    pub(super) windows: Windows,
    pub(super) retired: Retired,
    /// Some tables may be empty.
    pub(super) has_empty: bool,
    /// What no invalidation covered yet; `retired` is part of it.
    stale: Option<Stale>,
    /// Nothing is mapped any more.
    closed: bool,
}

/// Who uses an address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct User {
    pub(super) domain: DomainId,
    pub(super) endpoint: EndpointId,
    pub(super) pasid: Option<Pasid>,
}

/// What the hardware may still translate although the page table does not say so any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stale {
    /// Addresses: everything stale lies in this range.
    pub range: IovaRange,
    /// Only leaves were changed; otherwise cached pointers to tables are stale, too.
    pub leaf: bool,
}

impl Stale {
    /// The smallest range with both.
    fn with(self, other: Self) -> Self {
        let start = self.range.start().min(other.range.start());
        let last = self.range.last().max(other.range.last());
        let range = IovaRange::new(start, last).unwrap_or(IovaRange::ALL);
        Self { range, leaf: self.leaf && other.leaf }
    }
}

/// What an interrupt needs: a write to device memory.
const DOORBELL: Attrs = Attrs { memory_type: 1, ..Attrs::READ_WRITE };

impl AddressSpace {
    /// Makes an empty page table that the hardware of `endpoint` can walk.
    ///
    /// # Errors
    /// [`TableError::NoHardware`], [`TableError::Unsupported`], [`TableError::NoTag`], [`TableError::NoMemory`].
    pub fn new<P: Platform, T: Transport>(
        driver: &mut Driver<P, T>,
        endpoint: &Endpoint,
        options: SpaceOptions,
    ) -> Result<Self, TableError> {
        let (table, split) = match endpoint.properties().hardware {
            None => return Err(TableError::NoHardware(endpoint.id())),
            Some(Hardware::Smmuv3(caps)) => (Table::smmuv3(driver, &caps, options)?, can_split(&caps)),
            Some(Hardware::Vtd(caps)) => (Table::vtd(driver, &caps, options)?, true),
        };
        let keep_tables = options.empty_tables == EmptyTables::Keep;
        let edit = EditOptions { contiguous: options.contiguous, split, keep_tables };
        Ok(Self {
            table,
            edit,
            users: Vec::new(),
            windows: Windows::default(),
            retired: Retired::default(),
            has_empty: false,
            stale: None,
            closed: false,
        })
    }

    /// log2 of the smallest page: what ranges and targets are aligned to.
    pub fn page_lg2(&self) -> u8 {
        match &self.table {
            Table::Smmuv3 { format, .. } => format.entry_lg2(0),
            Table::Vtd(table) => table.format().entry_lg2(0),
        }
    }

    /// The tag that the hardware puts on translations, where the architecture has one (Arm: the ASID).
    pub const fn tag(&self) -> Option<u16> {
        match &self.table {
            Table::Smmuv3 { context, .. } => Some(context.asid()),
            Table::Vtd(_) => None,
        }
    }

    /// The root table.
    pub const fn root(&self) -> Gpa {
        match &self.table {
            Table::Smmuv3 { format, .. } => format.params().root,
            Table::Vtd(table) => table.root(),
        }
    }

    /// Maps `range` to the addresses from `target` on, with the largest pages that fit. Mappings are always tagged:
    /// `attrs.global` is ignored.
    ///
    /// # Errors
    /// [`TableError::Closed`]; [`TableError::MsiWindow`] where interrupts go there; [`TableError::Edit`] where something
    /// is mapped there already, or cannot be: then nothing of `range` is new. [`TableError::Request`] where undoing a part
    /// failed, or giving back empty tables.
    pub fn map<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        range: IovaRange,
        target: Gpa,
        attrs: Attrs,
    ) -> Result<(), TableError> {
        self.admit(range)?;
        self.insert(driver, range, target, attrs)
    }

    /// Removes every mapping in `range` but those of MSI windows, and returns when no device uses it any more.
    ///
    /// # Errors
    /// [`TableError::Edit`] where an end of `range` lies inside of a page that cannot be split, or not at the end of
    /// the smallest page: what comes before is removed. [`TableError::Request`] where the invalidation failed:
    /// the next one covers it, too, and no memory is given back before.
    pub fn unmap<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        range: IovaRange,
    ) -> Result<(), TableError> {
        let removed = self.unmap_unsynchronized(driver, range);
        self.synchronize(driver)?;
        removed
    }

    /// Does what [`unmap`](Self::unmap) does and leaves the invalidation to the caller, who may gather several, or wants
    /// to see what a stale translation is. [`synchronize`](Self::synchronize) must follow before the target memory is
    /// used for anything else.
    ///
    /// # Errors
    /// [`TableError::Edit`] as [`unmap`](Self::unmap); [`synchronize`](Self::synchronize) must follow all the same.
    pub fn unmap_unsynchronized<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        range: IovaRange,
    ) -> Result<(), TableError> {
        self.windows.outside(range).into_iter().try_for_each(|part| self.remove(driver, part))
    }

    /// Lets `range` lead to the addresses from `target` on, whatever was mapped there before: takes the old mappings
    /// out, invalidates, and only then writes the new ones, so that no access ever finds both (on Arm:
    /// break-before-make). Accesses in between fault, or wait where the device has page requests.
    ///
    /// # Errors
    /// As [`unmap`](Self::unmap) and [`map`](Self::map); after those of `map` nothing of `range` is mapped.
    pub fn remap<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        range: IovaRange,
        target: Gpa,
        attrs: Attrs,
    ) -> Result<(), TableError> {
        self.admit(range)?;
        self.unmap(driver, range)?;
        self.insert(driver, range, target, attrs)
    }

    /// Changes what the mappings in `range` allow to what `attrs` says of users, writes and execution; where they lead
    /// and their memory type stay. Gaps stay gaps. Returns when no device uses the old permissions any more: after less
    /// is allowed that is safety, after more it is what lets the device see it.
    ///
    /// A mapping is changed in place. One that has to be split first, or that is part of a contiguous group, is taken
    /// out and mapped anew instead: accesses in between fault, or wait.
    ///
    /// # Errors
    /// [`TableError::Closed`]; [`TableError::MsiWindow`]; [`TableError::Edit`] and [`TableError::Request`] as
    /// [`unmap`](Self::unmap) and [`map`](Self::map): part of `range` may be changed, and a piece that could not be
    /// mapped anew is not mapped.
    pub fn protect<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        range: IovaRange,
        attrs: Attrs,
    ) -> Result<(), TableError> {
        self.admit(range)?;
        let memory = driver.platform.memory();
        let anew = match &self.table {
            Table::Smmuv3 { format, .. } => protect::in_place(format, memory, range, attrs),
            Table::Vtd(table) => protect::in_place(table.format(), memory, range, attrs),
        };
        if !matches!(anew, Err(EditError::Unaligned | EditError::InputRange)) {
            self.add_stale(Stale { range, leaf: true });
        }
        let changed = anew.map_err(TableError::from).and_then(|anew| {
            anew.into_iter()
                .try_for_each(|Piece { range, output, attrs }| self.remap(driver, range, output, attrs))
        });
        self.synchronize(driver)?;
        changed
    }

    /// Empties the space for good, as the end of its process does: from the moment that this returns, every access
    /// through it faults, whoever is still bound. The windows of interrupts stay.
    ///
    /// # Errors
    /// [`TableError::Edit`], [`TableError::Request`]: to be called again. Nothing can be mapped in either case.
    pub fn close<P: Platform, T: Transport>(&mut self, driver: &mut Driver<P, T>) -> Result<(), TableError> {
        self.closed = true;
        let removed = self.remove_all(driver);
        self.synchronize(driver)?;
        removed
    }

    /// Whether the space was [closed](Self::close).
    pub const fn is_closed(&self) -> bool {
        self.closed
    }

    /// What is stale.
    pub const fn stale(&self) -> Option<Stale> {
        self.stale
    }

    /// Invalidates what is stale, for every PASID that uses the space, with one notification.
    ///
    /// # Errors
    /// [`TableError::Request`]: it is still stale, and no memory was given back.
    pub fn synchronize<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
    ) -> Result<(), TableError> {
        let mut outcome = Ok(());
        driver.send_all(self.invalidations().map(Request::Invalidate), |_, answer| match answer {
            // The device keeps nothing for a domain that it does not know.
            Ok(()) | Err(RequestError::Status(Status::NoEnt)) => {}
            Err(error) => outcome = Err(error),
        });
        outcome?;
        self.stale = None;
        self.retired.release_from(0, driver.platform.parts().1);
        Ok(())
    }

    /// The requests that [`synchronize`](Self::synchronize) sends: one for each domain and PASID.
    pub fn invalidations(&self) -> impl Iterator<Item = Invalidate> {
        let tag = self.tag().map(u64::from);
        let page_lg2 = self.page_lg2();
        let users = self.users.iter().enumerate().filter(|(index, user)| {
            let same = |other: &User| (other.domain, other.pasid) == (user.domain, user.pasid);
            !self.users.iter().take(*index).any(same)
        });
        self.stale.into_iter().flat_map(move |Stale { range, leaf }| {
            users.clone().map(move |(_, user)| {
                let scope = match range {
                    IovaRange::ALL => InvalidateScope::Pasid(user.pasid),
                    range => InvalidateScope::Address { pasid: user.pasid, range, page_lg2 },
                };
                Invalidate { domain: user.domain, scope, caches: Caches::TLB, leaf, tag, global: false }
            })
        })
    }

    /// What the page table says now, as hardware without any cache would answer.
    ///
    /// # Errors
    /// The fault that the architecture records.
    pub fn translate<P: Platform, T: Transport>(
        &self,
        driver: &Driver<P, T>,
        iova: Iova,
        access: Access,
    ) -> Result<Translation, Fault> {
        self.stage1().walk(driver.platform.memory(), iova, access)
    }

    /// The context descriptor for an SMMUv3 with `caps`; `None` where it does not mean the same there.
    pub(super) fn descriptor(&self, caps: &smmuv3::Caps) -> Option<&smmuv3::Cd> {
        match &self.table {
            Table::Smmuv3 { cd, context, .. } => {
                let there = smmuv3::context_from_cd(&cd.words(), caps, cd.word0.stall());
                (there == Ok(*context)).then_some(cd)
            }
            Table::Vtd(_) => None,
        }
    }

    /// The table for a VT-d unit with `caps`; `None` where it does not mean the same there.
    pub(super) fn first_stage(&self, caps: &vtd::Caps) -> Option<&vtd::FirstStage> {
        match &self.table {
            Table::Vtd(table) => {
                let there = vtd::FirstStage::new(table.root(), table.flags(), table.address_width(), caps);
                (there == Ok(*table)).then_some(table)
            }
            Table::Smmuv3 { .. } => None,
        }
    }

    /// Lets the interrupts of `endpoint` through, whose untagged DMA is about to use this space.
    ///
    /// # Errors
    /// [`TableError::MsiWindow`] where the caller has mappings there; [`TableError::Edit`]; [`TableError::Request`].
    pub(super) fn admit_interrupts<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        endpoint: &Endpoint,
    ) -> Result<(), TableError> {
        let Table::Smmuv3 { .. } = self.table else {
            return Ok(());
        };
        let within_page = (1 << self.page_lg2()) - 1;
        for window in endpoint.properties().msi_windows() {
            let start = Iova(window.start().0 & !within_page);
            let last = Iova(window.last().0 | within_page);
            let parts =
                IovaRange::new(start, last).map_or_else(Vec::new, |pages| self.windows.outside(pages));
            for part in parts {
                self.insert(driver, part, Gpa(part.start().0), DOORBELL).map_err(|error| match error {
                    TableError::Edit(EditError::Exists) => TableError::MsiWindow(window),
                    error => error,
                })?;
                self.windows.add(part);
            }
        }
        Ok(())
    }

    pub(super) fn has_users(&self) -> bool {
        !self.users.is_empty()
    }

    pub(super) fn add_user(&mut self, user: User) {
        self.users.push(user);
    }

    pub(super) fn has_user(&self, user: User) -> bool {
        self.users.contains(&user)
    }

    pub(super) fn remove_user(&mut self, user: User) {
        self.users.retain(|known| *known != user);
    }

    pub(super) fn add_stale(&mut self, stale: Stale) {
        self.stale = Some(self.stale.map_or(stale, |before| before.with(stale)));
    }

    fn stage1(&self) -> Stage1 {
        match &self.table {
            Table::Smmuv3 { context, .. } => Stage1::Smmuv3(*context),
            Table::Vtd(table) => Stage1::Vtd(*table),
        }
    }

    /// Whether the caller may put mappings in `range`.
    fn admit(&self, range: IovaRange) -> Result<(), TableError> {
        if self.closed {
            return Err(TableError::Closed);
        }
        if self.windows.touch(range) {
            return Err(TableError::MsiWindow(range));
        }
        Ok(())
    }
}
