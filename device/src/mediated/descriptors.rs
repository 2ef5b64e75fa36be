//! SMMUv3: page tables of single PASIDs, by way of a table of context descriptors that is the device's own.

use alloc::collections::BTreeMap;

use pgtable_formats::context::BuildError;
use pgtable_formats::context::Canonical;
use pgtable_formats::context::smmuv3::{Caps, Cd, CdTable, PageTable, TableFormat, Untagged};
use pgtable_formats::{Gpa, Pasid, TableAlloc};
use viommu_wire::EndpointId;

use super::everything;
use super::window::{Room, Tables};
use crate::host::{Host, HostError, Scope, SpaceSpec, Stream};
use crate::soft::Stage2;

/// The descriptors of one endpoint. What they hold is known here: the window is written and never read.
#[derive(Debug)]
pub(super) struct Descriptors<S> {
    table: CdTable,
    /// The machine's space for `table`.
    space: S,
    /// Level-2 tables, by the PASIDs' upper bits.
    leaves: BTreeMap<u32, Leaf>,
    /// The valid ones. That of PASID 0 serves untagged accesses.
    bound: BTreeMap<Pasid, Cd>,
    state: State,
    /// Caches could not be brought up to date: they have to be before the table is used again.
    stale: bool,
}

#[derive(Clone, Copy, Debug)]
struct Leaf {
    at: Gpa,
    /// How many valid descriptors there are in it.
    used: u32,
}

/// What the machine has the endpoint's untagged stream bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Not the table.
    Idle,
    /// The table.
    Serving,
    /// Nothing, though descriptors are valid.
    Blocked,
}

/// What it takes to change descriptors.
pub(super) struct Means<'a, H, M> {
    pub(super) endpoint: EndpointId,
    pub(super) host: &'a mut H,
    pub(super) memory: &'a M,
    pub(super) room: &'a mut Room,
    /// How much of the window the endpoint may have.
    pub(super) limit: u64,
}

impl<H: Host, M: Stage2> Means<'_, H, M> {
    fn untagged(&self) -> Stream {
        Stream::untagged(self.endpoint)
    }

    /// Drops all that is cached of a PASID. So the machine answers its page requests as well, as it does not with a
    /// wider scope.
    fn sync(&mut self, pasid: Pasid) -> Result<(), HostError> {
        let number = Some(pasid).filter(|pasid| *pasid != Pasid::ZERO);
        let all = everything(self.endpoint, Scope::Pasid(number));
        self.host.invalidate(&[all]).map_err(|stopped| stopped.error)
    }

    fn sync_all(&mut self) -> Result<(), HostError> {
        let all = everything(self.endpoint, Scope::Endpoint);
        self.host.invalidate(&[all]).map_err(|stopped| stopped.error)
    }
}

impl<S> Descriptors<S> {
    /// A table for all PASIDs that `caps` have, in which none is valid. Level 2 comes as it is needed.
    pub(super) fn new<H: Host<Space = S>, M: Stage2>(
        caps: &Caps,
        means: &mut Means<'_, H, M>,
    ) -> Result<Self, HostError> {
        let format = if caps.two_level_cd { TableFormat::TwoLevel4K } else { TableFormat::Linear };
        let Means { endpoint, host, memory, room, limit } = means;
        let size = if caps.two_level_cd { caps.ssid_bits.saturating_sub(3) } else { caps.ssid_bits + 6 };
        if 1 << size.max(12) > *limit {
            return Err(HostError::NoMemory);
        }
        let mut tables = Tables { room, memory: *memory };
        let table = CdTable::create(format, caps.ssid_bits, Untagged::Pasid0, caps, &mut tables);
        let table = table.map_err(build_error)?;
        let canonical = Canonical::Smmuv3(table);
        match host.create(SpaceSpec::GuestTable { endpoint: *endpoint, table: &canonical }) {
            Ok(space) => Ok(Self {
                table,
                space,
                leaves: BTreeMap::new(),
                bound: BTreeMap::new(),
                state: State::Idle,
                stale: false,
            }),
            Err(error) => {
                tables.free(table.extents().0, table.alloc_lg2());
                Err(error)
            }
        }
    }

    /// Lets a PASID (0: untagged accesses) translate through `page_table`. Accesses fault while one replaces another.
    pub(super) fn bind<H: Host<Space = S>, M: Stage2>(
        &mut self,
        pasid: Pasid,
        page_table: &PageTable,
        means: &mut Means<'_, H, M>,
    ) -> Result<(), HostError> {
        self.resume(means)?;
        let at = self.place(pasid, means)?;
        let (old, new) = (self.bound.get(&pasid).copied(), *page_table.cd());
        if let Some(old) = old {
            self.take_away(pasid, &old, at, means)?;
        }
        let mut outcome = new.store(means.memory, at).map_err(|_| HostError::NoMemory);
        if outcome.is_ok() {
            outcome = match self.state {
                State::Idle => means.host.bind(means.untagged(), Some(&mut self.space)),
                State::Serving | State::Blocked => means.sync(pasid).inspect_err(|_| self.stale = true),
            };
        }
        if let Err(error) = outcome {
            // In the window is what was; what is in caches nobody knows.
            let _ = new.store_valid(means.memory, at, false);
            if let Some(old) = old {
                let _ = old.store(means.memory, at);
            }
            if self.state == State::Serving {
                self.block(means);
            }
            return Err(error);
        }
        self.state = State::Serving;
        self.bound.insert(pasid, new);
        if old.is_none()
            && let Some(leaf) = self.leaf_of(pasid)
        {
            leaf.used += 1;
        }
        Ok(())
    }

    /// Lets a PASID (0: untagged accesses) fault.
    pub(super) fn unbind<H: Host<Space = S>, M: Stage2>(
        &mut self,
        pasid: Pasid,
        means: &mut Means<'_, H, M>,
    ) -> Result<(), HostError> {
        let Some(old) = self.bound.get(&pasid).copied() else { return Ok(()) };
        if self.state == State::Serving {
            self.resume(means)?;
        }
        let at = self.place(pasid, means)?;
        self.take_away(pasid, &old, at, means)?;
        self.forget(pasid);
        self.settle(means);
        if self.state == State::Blocked {
            // The others; where it fails they wait for the next request.
            let _ = self.resume(means);
        }
        Ok(())
    }

    /// Takes the table away from the machine where no descriptor is valid. Where that fails it stays: all accesses fault
    /// in any case.
    pub(super) fn settle<H: Host<Space = S>, M: Stage2>(&mut self, means: &mut Means<'_, H, M>) {
        if self.bound.is_empty()
            && self.state != State::Idle
            && means.host.bind(means.untagged(), None).is_ok()
        {
            self.state = State::Idle;
        }
    }

    /// Brings caches up to date where that failed before, and lets the table serve again.
    pub(super) fn resume<H: Host<Space = S>, M: Stage2>(
        &mut self,
        means: &mut Means<'_, H, M>,
    ) -> Result<(), HostError> {
        if self.stale {
            means.sync_all()?;
            self.stale = false;
        }
        if self.state == State::Blocked {
            means.host.bind(means.untagged(), Some(&mut self.space))?;
            self.state = State::Serving;
        }
        Ok(())
    }

    /// Gives level-2 tables without a valid descriptor back.
    pub(super) fn trim<H: Host<Space = S>, M: Stage2>(&mut self, means: &mut Means<'_, H, M>) {
        let Some(leaf_lg2) = self.table.leaf_lg2() else { return };
        let empty = |leaf: &Leaf| leaf.used == 0;
        if !self.leaves.values().any(empty) {
            return;
        }
        let bits = leaf_lg2 - CD_LG2;
        for (&index, leaf) in self.leaves.iter().filter(|(_, leaf)| empty(leaf)) {
            let Some(pasid) = Pasid::new(index << bits) else { continue };
            if self.table.link(means.memory, pasid, None).is_err() {
                debug_assert!(false, "a window that is not memory at {}", leaf.at);
            }
        }
        if self.state != State::Idle && means.sync_all().is_err() {
            // Level 1 may be cached: the tables stay where they are.
            for (&index, leaf) in self.leaves.iter().filter(|(_, leaf)| empty(leaf)) {
                let pasid = Pasid::new(index << bits);
                let _ = pasid.map(|pasid| self.table.link(means.memory, pasid, Some(leaf.at)));
            }
            self.stale = true;
            return;
        }
        self.leaves.retain(|_, leaf| {
            if empty(leaf) {
                means.room.give_back(leaf.at, leaf_lg2);
            }
            !empty(leaf)
        });
    }

    /// Frees everything. The machine has the endpoint bound to something else.
    pub(super) fn release<H: Host<Space = S>>(self, host: &mut H, room: &mut Room) {
        host.destroy(self.space);
        for leaf in self.leaves.values() {
            room.give_back(leaf.at, self.table.leaf_lg2().unwrap_or(0));
        }
        room.give_back(self.table.extents().0, self.table.alloc_lg2());
    }

    /// Whether a PASID (0: untagged accesses) is bound.
    pub(super) fn serves(&self, pasid: Pasid) -> bool {
        self.bound.contains_key(&pasid)
    }

    /// Whether accesses with a PASID are.
    pub(super) fn serves_tagged(&self) -> bool {
        self.bound.last_key_value().is_some_and(|(pasid, _)| *pasid != Pasid::ZERO)
    }

    /// The tag of what a PASID translates through.
    pub(super) fn asid(&self, pasid: Pasid) -> Option<u16> {
        self.bound.get(&pasid).map(|cd| cd.word0.asid())
    }

    /// Whether it only waits to be used again.
    pub(super) fn is_idle(&self) -> bool {
        self.state == State::Idle && self.bound.is_empty()
    }

    /// Whether only an invalidation of everything helps.
    pub(super) const fn needs_all(&self) -> bool {
        self.stale || matches!(self.state, State::Blocked)
    }

    /// Everything was invalidated.
    pub(super) const fn set_clean(&mut self) {
        self.stale = false;
    }

    /// The machine has the untagged stream bound to nothing, and no descriptor is valid.
    pub(super) const fn set_idle(&mut self) {
        self.state = State::Idle;
    }

    /// What is bound (PASID 0: untagged accesses).
    pub(super) fn pasids(&self) -> impl Iterator<Item = Pasid> + '_ {
        self.bound.keys().copied()
    }

    pub(super) fn len(&self) -> usize {
        self.bound.len()
    }

    /// How much of the window it has.
    pub(super) fn bytes(&self) -> u64 {
        let leaf = self.table.leaf_lg2().map_or(0, |lg2| 1 << lg2);
        let leaves = u64::try_from(self.leaves.len()).unwrap_or(u64::MAX);
        (1 << self.table.alloc_lg2()) + leaves.saturating_mul(leaf)
    }

    /// Clears V and waits until nothing uses the descriptor any more; else it is as it was.
    fn take_away<H: Host<Space = S>, M: Stage2>(
        &mut self,
        pasid: Pasid,
        old: &Cd,
        at: Gpa,
        means: &mut Means<'_, H, M>,
    ) -> Result<(), HostError> {
        old.store_valid(means.memory, at, false).map_err(|_| HostError::NoMemory)?;
        // While it is blocked nothing is reached; everything is dropped before it is reached again.
        if self.state != State::Serving {
            return Ok(());
        }
        means.sync(pasid).inspect_err(|_| {
            self.stale = true;
            let _ = old.store_valid(means.memory, at, true);
            self.block(means);
        })
    }

    /// Caches could not be brought up to date: whoever translates through the table stops until they are. Where that
    /// fails as well, the next request begins with it.
    fn block<H: Host<Space = S>, M: Stage2>(&mut self, means: &mut Means<'_, H, M>) {
        self.stale = true;
        if means.host.bind(means.untagged(), None).is_ok() {
            self.state = State::Blocked;
        }
    }

    fn forget(&mut self, pasid: Pasid) {
        if self.bound.remove(&pasid).is_some()
            && let Some(leaf) = self.leaf_of(pasid)
        {
            leaf.used = leaf.used.saturating_sub(1);
        }
    }

    /// Where the descriptor of a PASID is; its level-2 table is made where there is none.
    fn place<H: Host<Space = S>, M: Stage2>(
        &mut self,
        pasid: Pasid,
        means: &mut Means<'_, H, M>,
    ) -> Result<Gpa, HostError> {
        let (Some(lg2), None) = (self.table.leaf_lg2(), self.leaf_at(pasid)) else {
            return self.table.place(self.leaf_at(pasid), pasid).map_err(build_error);
        };
        if pasid.value() >> self.table.pasid_bits() != 0 {
            return Err(HostError::Unsupported);
        }
        if self.bytes().saturating_add(1 << lg2) > means.limit {
            return Err(HostError::NoMemory);
        }
        let mut tables = Tables { room: means.room, memory: means.memory };
        let at = tables.alloc(lg2).ok_or(HostError::NoMemory)?;
        if let Err(error) = self.table.link(means.memory, pasid, Some(at)) {
            tables.free(at, lg2);
            return Err(build_error(error));
        }
        self.leaves.insert(pasid.value() >> (lg2 - CD_LG2), Leaf { at, used: 0 });
        self.table.place(Some(at), pasid).map_err(build_error)
    }

    fn leaf_at(&self, pasid: Pasid) -> Option<Gpa> {
        let bits = self.table.leaf_lg2()? - CD_LG2;
        self.leaves.get(&(pasid.value() >> bits)).map(|leaf| leaf.at)
    }

    fn leaf_of(&mut self, pasid: Pasid) -> Option<&mut Leaf> {
        let bits = self.table.leaf_lg2()? - CD_LG2;
        self.leaves.get_mut(&(pasid.value() >> bits))
    }
}

/// log2 of the size of a descriptor.
const CD_LG2: u8 = 6;

const fn build_error(error: BuildError) -> HostError {
    match error {
        BuildError::Unsupported | BuildError::OutOfTable(_) => HostError::Unsupported,
        // A window that is not memory has no room.
        BuildError::NoTable | BuildError::NotMemory(_) | BuildError::InUse => HostError::NoMemory,
    }
}
