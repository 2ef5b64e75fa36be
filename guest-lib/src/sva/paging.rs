//! Memory that is there once somebody asks for it.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use pgtable_formats::format::Attrs;
use pgtable_formats::{Access, AccessKind, TableAlloc};
use viommu_wire::{AccessFlags, Gpa, Iova, IovaRange, PageRequest};

use super::process::{Answer, FaultHandler, PageGroup};
use crate::Driver;
use crate::hal::{Platform, Transport};
use crate::tables::{AddressSpace, TableError};

/// Addresses that a process may use, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Whole pages.
    pub range: IovaRange,
    /// What every page of it allows.
    pub attrs: Attrs,
}

/// Why a page is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PagingError {
    /// No area holds the address, or not the whole page.
    #[error("{0} lies in no area")]
    NoArea(Iova),
    /// The area does not allow the access.
    #[error("{0:?} is not allowed")]
    Denied(AccessFlags),
    /// The bound on pages is reached.
    #[error("all pages are in use")]
    Full,
    /// The allocator has no page.
    #[error("no memory for a page")]
    NoMemory,
    /// Another area has some of the addresses.
    #[error("{0} is another area")]
    Overlap(IovaRange),
    /// The page table was not changed.
    #[error(transparent)]
    Table(#[from] TableError),
}

/// What became of accesses to pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PagingCounters {
    /// Pages that were made.
    pub made: u64,
    /// Pages that were there with too little permission.
    pub upgraded: u64,
    /// Pages that were there: somebody else had asked.
    pub present: u64,
    /// Accesses that failed.
    pub failed: u64,
}

/// The memory of a process: areas of addresses whose pages are taken from the platform's allocator, zeroed, at the first
/// access, up to a bound. Works for page requests as their [`FaultHandler`], and for the processor by
/// [`populate`](Self::populate).
///
/// An access that no area allows, and one for which there is no memory, is answered INVALID; that is what Linux answers,
/// too: FAILURE would stop the endpoint for other processes.
///
/// Dropping it leaks its pages; [`release`](Self::release) gives them back.
#[derive(Debug)]
pub struct DemandPaged {
    /// Disjoint, ascending.
    areas: Vec<Area>,
    /// Frames by the first address of their page.
    pages: BTreeMap<Iova, Gpa>,
    max_pages: usize,
    page_lg2: u8,
    /// Every page of every area is there.
    pinned: bool,
    counters: PagingCounters,
}

impl DemandPaged {
    /// For the process that has `space`, which may use up to `max_pages` of its smallest pages.
    pub fn new(space: &AddressSpace, max_pages: usize) -> Self {
        Self {
            areas: Vec::new(),
            pages: BTreeMap::new(),
            max_pages,
            page_lg2: space.page_lg2(),
            pinned: false,
            counters: PagingCounters::default(),
        }
    }

    /// Adds addresses that the process may use.
    ///
    /// # Errors
    /// [`PagingError::Overlap`].
    pub fn add_area(&mut self, area: Area) -> Result<(), PagingError> {
        let place = self.areas.partition_point(|known| known.range.start() < area.range.start());
        let neighbours = self.areas.get(place.saturating_sub(1)..).unwrap_or_default();
        if let Some(other) = neighbours.iter().take(2).find(|known| known.range.overlaps(area.range)) {
            return Err(PagingError::Overlap(other.range));
        }
        self.areas.insert(place, area);
        self.pinned = false;
        Ok(())
    }

    /// The areas, ascending.
    pub fn areas(&self) -> &[Area] {
        &self.areas
    }

    /// How many pages there are.
    pub fn resident(&self) -> usize {
        self.pages.len()
    }

    /// What became of accesses.
    pub const fn counters(&self) -> &PagingCounters {
        &self.counters
    }

    /// Makes an access to `at` possible where its area allows it, and tells where it leads.
    ///
    /// # Errors
    /// [`PagingError`].
    pub fn populate<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        space: &mut AddressSpace,
        at: Iova,
        access: AccessFlags,
    ) -> Result<Gpa, PagingError> {
        let output = self.try_populate(driver, space, at, access);
        if let Err(error) = &output {
            self.counters.failed += 1;
            // A change of permission that failed may have taken pages out.
            self.pinned &= !matches!(error, PagingError::Table(_));
        }
        output
    }

    /// Makes every page of every area: for endpoints without page requests, and where no access may wait. Pages that are
    /// [discarded](Self::discard) later, and those of areas that are added later, are not there until this is called
    /// again.
    ///
    /// # Errors
    /// [`PagingError`]; the pages that were made stay.
    pub fn pin<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        space: &mut AddressSpace,
    ) -> Result<(), PagingError> {
        if self.whole_pages() > self.max_pages as u64 {
            return Err(PagingError::Full);
        }
        for Area { range, attrs } in self.areas.clone() {
            let access = if attrs.write { AccessFlags::WRITE } else { AccessFlags::READ };
            let mut next = Some(range.start());
            while let Some(at) = next.filter(|at| *at <= range.last()) {
                self.populate(driver, space, at, access)?;
                next = at.checked_add(1 << self.page_lg2);
            }
        }
        self.pinned = true;
        Ok(())
    }

    /// Whether every page of every area is there since it was [pinned](Self::pin).
    pub const fn is_pinned(&self) -> bool {
        self.pinned
    }

    /// Changes what the areas in `range` allow, and the pages that are there; gaps stay gaps.
    ///
    /// # Errors
    /// [`PagingError::Table`]: some pages may be changed, or not be there until the next access; the areas are as before.
    /// Nothing is [pinned](Self::pin) any more.
    pub fn protect<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        space: &mut AddressSpace,
        range: IovaRange,
        attrs: Attrs,
    ) -> Result<(), PagingError> {
        space.protect(driver, range, attrs).inspect_err(|_| self.pinned = false)?;
        let part = |first: Option<Iova>, last: Option<Iova>, attrs| {
            let range = IovaRange::new(first?, last?)?;
            Some(Area { range, attrs })
        };
        let mut areas = Vec::with_capacity(self.areas.len() + 2);
        for area in self.areas.drain(..) {
            let (start, last) = (area.range.start(), area.range.last());
            if !area.range.overlaps(range) {
                areas.push(area);
                continue;
            }
            let before = range.start().0.checked_sub(1).map(Iova);
            areas.extend(part(Some(start), before, area.attrs));
            areas.extend(part(Some(start.max(range.start())), Some(last.min(range.last())), attrs));
            areas.extend(part(range.last().checked_add(1), Some(last), area.attrs));
        }
        self.areas = areas;
        Ok(())
    }

    /// Gives back the pages of `range`, whole pages. Areas stay: the next access gets a new page.
    ///
    /// # Errors
    /// [`PagingError::Table`]: no page was given back, and none is lost.
    pub fn discard<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        space: &mut AddressSpace,
        range: IovaRange,
    ) -> Result<(), PagingError> {
        self.pinned = false;
        space.unmap(driver, range)?;
        let (_, alloc) = driver.platform.parts();
        let gone: Vec<Iova> = self.pages.range(range.start()..=range.last()).map(|(at, _)| *at).collect();
        for at in gone {
            if let Some(frame) = self.pages.remove(&at) {
                alloc.free(frame, self.page_lg2);
            }
        }
        Ok(())
    }

    /// Gives all pages back. No device may reach them any more: the process was
    /// [removed](super::Processes::remove), or has [ended](super::Processes::exit).
    pub fn release<P: Platform, T: Transport>(self, driver: &mut Driver<P, T>) {
        let (_, alloc) = driver.platform.parts();
        for frame in self.pages.into_values() {
            alloc.free(frame, self.page_lg2);
        }
    }

    fn try_populate<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        space: &mut AddressSpace,
        at: Iova,
        access: AccessFlags,
    ) -> Result<Gpa, PagingError> {
        let page = self.page_around(at);
        let Area { attrs, .. } =
            self.area_of(at).filter(|area| area.range.covers(page)).ok_or(PagingError::NoArea(at))?;
        if access.contains(AccessFlags::WRITE) && !attrs.write
            || access.contains(AccessFlags::EXEC) && !attrs.execute
        {
            return Err(PagingError::Denied(access));
        }
        if let Some(&frame) = self.pages.get(&page.start()) {
            if let Some(output) = permitted(space, driver, at, access) {
                self.counters.present += 1;
                return Ok(output);
            }
            if permitted(space, driver, at, AccessFlags::READ).is_some() {
                space.protect(driver, page, attrs)?;
                self.counters.upgraded += 1;
            } else {
                // Taken out by a discard that did not get to its end.
                space.map(driver, page, frame, attrs)?;
            }
        } else {
            self.make(driver, space, page, attrs)?;
        }
        // What the page table still does not allow, such as privileged execution, never will be.
        permitted(space, driver, at, access).ok_or(PagingError::Denied(access))
    }

    fn make<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        space: &mut AddressSpace,
        page: IovaRange,
        attrs: Attrs,
    ) -> Result<(), PagingError> {
        if self.pages.len() >= self.max_pages {
            return Err(PagingError::Full);
        }
        let (_, alloc) = driver.platform.parts();
        let frame = alloc.alloc(self.page_lg2).ok_or(PagingError::NoMemory)?;
        let mapped = space.map(driver, page, frame, attrs);
        if let Err(error) = mapped
            && !matches!(error, TableError::Request(_))
        {
            // A single page is mapped or is not, so no device has seen it.
            driver.platform.parts().1.free(frame, self.page_lg2);
            return Err(error.into());
        }
        self.pages.insert(page.start(), frame);
        self.counters.made += 1;
        Ok(mapped?)
    }

    /// Pages of all areas; `u64::MAX` where there are more.
    fn whole_pages(&self) -> u64 {
        let pages = |area: &Area| (area.range.length_minus_one() >> self.page_lg2).saturating_add(1);
        self.areas.iter().map(pages).fold(0, u64::saturating_add)
    }

    fn area_of(&self, at: Iova) -> Option<Area> {
        let behind = self.areas.partition_point(|area| area.range.start() <= at);
        let area = self.areas.get(behind.checked_sub(1)?)?;
        area.range.contains(at).then_some(*area)
    }

    fn page_around(&self, at: Iova) -> IovaRange {
        let mask = (1 << self.page_lg2) - 1;
        IovaRange::new(Iova(at.0 & !mask), Iova(at.0 | mask)).unwrap_or(IovaRange::ALL)
    }
}

impl<P: Platform, T: Transport> FaultHandler<P, T> for DemandPaged {
    fn is_pinned(&self) -> bool {
        self.pinned
    }

    fn handle(
        &mut self,
        driver: &mut Driver<P, T>,
        space: &mut AddressSpace,
        group: &PageGroup<'_>,
    ) -> Answer {
        let populated = |PageRequest { address, access, .. }: &PageRequest| {
            self.populate(driver, space, *address, *access).is_ok()
        };
        if group.requests.iter().all(populated) { Answer::Success } else { Answer::Invalid }
    }
}

/// Where an access to `at` leads, if the page table lets all of it pass.
fn permitted<P: Platform, T: Transport>(
    space: &AddressSpace,
    driver: &Driver<P, T>,
    at: Iova,
    access: AccessFlags,
) -> Option<Gpa> {
    let privileged = access.contains(AccessFlags::PRIVILEGED);
    let kinds = [
        (AccessFlags::WRITE, AccessKind::Write),
        (AccessFlags::EXEC, AccessKind::Execute),
        // An access that says nothing of itself has to read, at least.
        (AccessFlags::empty(), AccessKind::Read),
    ];
    let mut output = None;
    for (_, kind) in kinds.into_iter().filter(|(flag, _)| access.contains(*flag)) {
        output = Some(space.translate(driver, at, Access { kind, privileged }).ok()?.apply(at));
    }
    output
}
