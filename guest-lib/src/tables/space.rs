//! Address spaces: stage-1 page tables in guest memory.

use alloc::vec::Vec;

use pgtable_formats::context::{Stage1, smmuv3, vtd};
use pgtable_formats::edit::{EditError, EditOptions, Editor, Partial};
use pgtable_formats::format::{Attrs, Format};
use pgtable_formats::leaf::vmsav8::{Granule, Vmsav8, Vmsav8Flags, Vmsav8Params};
use pgtable_formats::{Access, Fault, TableAlloc, Translation};
use viommu_wire::{
    Caches, DomainId, EndpointId, Gpa, Invalidate, InvalidateScope, Iova, IovaRange, Pasid, Request, Status,
};

use super::TableError;
use super::lent::{Lent, Retired};
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
}

/// A stage-1 page table in guest memory, for addresses of 48 bits.
///
/// Any number of PASIDs may use it at once ([`PasidTable::bind`](super::PasidTable::bind)). Dropping it leaks its
/// memory; [`release`](Self::release) gives it back.
#[derive(Debug)]
pub struct AddressSpace {
    table: Table,
    edit: EditOptions,
    users: Vec<User>,
    retired: Retired,
    /// What no invalidation covered yet; `retired` is part of it.
    stale: Option<Stale>,
}

#[derive(Clone, Copy, Debug)]
enum Table {
    Smmuv3 { cd: smmuv3::Cd, context: smmuv3::Context, format: Vmsav8 },
    Vtd(vtd::FirstStage),
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

/// Translates 48 bits of address: what every hardware has.
const INPUT_BITS: u8 = 48;
/// Memory types by index: 0 normal write-back memory, 1 device memory (nGnRE).
const MAIR: u64 = 0x04ff;
const MIN_ALLOC_LG2: u8 = 12;

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
        let edit = EditOptions { contiguous: options.contiguous, split, ..EditOptions::default() };
        Ok(Self { table, edit, users: Vec::new(), retired: Retired::default(), stale: None })
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
    /// [`TableError::Edit`] where something is mapped there already, or cannot be: then nothing of `range` is new.
    /// [`TableError::Request`] where undoing a part failed.
    pub fn map<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        range: IovaRange,
        target: Gpa,
        attrs: Attrs,
    ) -> Result<(), TableError> {
        let attrs = Attrs { global: false, ..attrs };
        let before = self.retired.len();
        let memory = &mut Lent::new(&mut driver.platform, &mut self.retired);
        let mapped = match &self.table {
            Table::Smmuv3 { format, .. } => Editor::new(*format, memory, self.edit).map(range, target, attrs),
            Table::Vtd(table) => Editor::new(*table.format(), memory, self.edit).map(range, target, attrs),
        };
        let Err(Partial { done, cause }) = mapped else {
            return Ok(());
        };
        match IovaRange::from_length(range.start(), done) {
            // The device may have seen the part that was there for a moment.
            Some(part) => self.unmap(driver, part)?,
            // Tables that were to be new were never seen by anybody.
            None => self.retired.release_from(before, driver.platform.parts().1),
        }
        Err(cause.into())
    }

    /// Removes every mapping in `range`, and returns when no device uses it any more.
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
        let removed = self.remove(driver, range);
        self.synchronize(driver)?;
        removed
    }

    /// Removes every mapping in `range` and leaves the invalidation to the caller, who may gather several, or wants to
    /// see what a stale translation is. [`synchronize`](Self::synchronize) must follow before the target memory is
    /// used for anything else.
    ///
    /// # Errors
    /// [`TableError::Edit`] as [`unmap`](Self::unmap); [`synchronize`](Self::synchronize) must follow all the same.
    pub fn unmap_unsynchronized<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        range: IovaRange,
    ) -> Result<(), TableError> {
        self.remove(driver, range)
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

    /// Gives the memory and the tag back.
    ///
    /// # Errors
    /// The space itself with [`TableError::InUse`] where a PASID still uses it, or with what else is in the way.
    #[expect(clippy::result_large_err, reason = "the space must not be lost")]
    pub fn release<P: Platform, T: Transport>(
        mut self,
        driver: &mut Driver<P, T>,
    ) -> Result<(), (Self, TableError)> {
        if !self.users.is_empty() {
            return Err((self, TableError::InUse));
        }
        let memory = &mut Lent::new(&mut driver.platform, &mut self.retired);
        let (cleared, root_lg2) = match &self.table {
            Table::Smmuv3 { format, .. } => {
                (Editor::new(*format, memory, self.edit).clear(), format.params().root_lg2())
            }
            Table::Vtd(table) => (Editor::new(*table.format(), memory, self.edit).clear(), MIN_ALLOC_LG2),
        };
        if let Err(Partial { cause, .. }) = cleared {
            return Err((self, cause.into()));
        }
        let (_, alloc) = driver.platform.parts();
        self.retired.release_from(0, alloc);
        alloc.free(self.root(), root_lg2.max(MIN_ALLOC_LG2));
        if let Some(tag) = self.tag() {
            driver.asids.release(tag.into());
        }
        Ok(())
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

    pub(super) fn add_user(&mut self, user: User) {
        self.users.push(user);
    }

    pub(super) fn has_user(&self, user: User) -> bool {
        self.users.contains(&user)
    }

    pub(super) fn remove_user(&mut self, user: User) {
        self.users.retain(|known| *known != user);
    }

    fn stage1(&self) -> Stage1 {
        match &self.table {
            Table::Smmuv3 { context, .. } => Stage1::Smmuv3(*context),
            Table::Vtd(table) => Stage1::Vtd(*table),
        }
    }

    /// Unmaps, and notes what is stale even if that stopped on the way.
    fn remove<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        range: IovaRange,
    ) -> Result<(), TableError> {
        let memory = &mut Lent::new(&mut driver.platform, &mut self.retired);
        let unmapped = match &self.table {
            Table::Smmuv3 { format, .. } => Editor::new(*format, memory, self.edit).unmap(range),
            Table::Vtd(table) => Editor::new(*table.format(), memory, self.edit).unmap(range),
        };
        if let Err(Partial { cause: cause @ (EditError::Unaligned | EditError::InputRange), done: 0 }) =
            unmapped
        {
            return Err(cause.into());
        }
        let leaf = unmapped.is_ok_and(|unmapped| !unmapped.tables_freed);
        let stale = Stale { range, leaf };
        self.stale = Some(self.stale.map_or(stale, |before| before.with(stale)));
        Ok(unmapped.map(|_| ()).map_err(|Partial { cause, .. }| cause)?)
    }
}

impl Table {
    fn smmuv3<P: Platform, T: Transport>(
        driver: &mut Driver<P, T>,
        caps: &smmuv3::Caps,
        options: SpaceOptions,
    ) -> Result<Self, TableError> {
        // The builder writes little-endian entries.
        if caps.endianness == smmuv3::TableEndianness::Big {
            return Err(TableError::Unsupported);
        }
        let granule = Granule::ALL
            .into_iter()
            .filter(|granule| match granule {
                Granule::K4 => caps.granule_4k,
                Granule::K16 => caps.granule_16k,
                Granule::K64 => caps.granule_64k,
            })
            .find(|granule| options.page_lg2.is_none_or(|page_lg2| page_lg2 == granule.lg2()))
            .ok_or(TableError::Unsupported)?;
        let root_lg2 = Vmsav8Params {
            root: Gpa(0),
            granule,
            input_lg2: INPUT_BITS,
            output_lg2: caps.oas_bits,
            wide: false,
            upper: false,
            flags: Vmsav8Flags::empty(),
        }
        .root_lg2()
        .max(MIN_ALLOC_LG2);
        let last_asid = if caps.asid16 { u16::MAX } else { u16::from(u8::MAX) };
        let asid = driver.asids.take(last_asid.into()).ok_or(TableError::NoTag)?;
        let (_, alloc) = driver.platform.parts();
        let Some(root) = alloc.alloc(root_lg2) else {
            driver.asids.release(asid);
            return Err(TableError::NoMemory);
        };
        let spec = smmuv3::CdSpec {
            asid: u16::try_from(asid).map_err(|_| TableError::NoTag)?,
            lower: Some(smmuv3::HalfSpec { root, granule, input_bits: INPUT_BITS }),
            upper: None,
            output_bits: caps.oas_bits,
            ds: false,
            mair: MAIR,
        };
        let made = spec.encode(caps).ok().and_then(|cd| {
            let context = smmuv3::context_from_cd(&cd.words(), caps, cd.word0.stall()).ok()?;
            Some(Self::Smmuv3 { cd, context, format: *context.half(Iova(0))? })
        });
        made.ok_or_else(|| {
            alloc.free(root, root_lg2);
            driver.asids.release(asid);
            TableError::Unsupported
        })
    }

    fn vtd<P: Platform, T: Transport>(
        driver: &mut Driver<P, T>,
        caps: &vtd::Caps,
        options: SpaceOptions,
    ) -> Result<Self, TableError> {
        if options.page_lg2.is_some_and(|page_lg2| page_lg2 != MIN_ALLOC_LG2) {
            return Err(TableError::Unsupported);
        }
        let (_, alloc) = driver.platform.parts();
        let root = alloc.alloc(MIN_ALLOC_LG2).ok_or(TableError::NoMemory)?;
        let flags = vtd::FirstStageFlags::empty();
        vtd::FirstStage::new(root, flags, INPUT_BITS.into(), caps).map(Self::Vtd).map_err(|_| {
            alloc.free(root, MIN_ALLOC_LG2);
            TableError::Unsupported
        })
    }
}

/// Whether a valid leaf may be replaced by a table without taking it out first: break-before-make level 2.
const fn can_split(caps: &smmuv3::Caps) -> bool {
    smmuv3::Idr3::from_bits(caps.registers().idr3).bbml() >= 2
}
