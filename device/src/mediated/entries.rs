//! VT-d: a guest's PASID table, read here, by page tables of single PASIDs.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use pgtable_formats::context::Canonical;
use pgtable_formats::context::vtd::PasidTable;
use pgtable_formats::{Gpa, Pasid};
use viommu_wire::EndpointId;

use super::everything;
use super::reading::{Reading, Said, Target};
use super::window::Window;
use crate::host::{Host, HostError, Invalidation, Scope, SpaceSpec, Stream};
use crate::soft::Stage2;

/// What one endpoint translates through: a PASID table, as it was when it was read.
#[derive(Debug)]
pub(super) struct Entries<S> {
    table: PasidTable,
    /// The entries that are present and legal.
    bound: BTreeMap<Pasid, Entry<S>>,
}

#[derive(Debug)]
struct Entry<S> {
    said: Said,
    via: Via<S>,
}

/// What its streams are bound to.
#[derive(Debug)]
enum Via<S> {
    Space(S),
    /// The space that all bypass shares.
    Identity,
    /// Nothing: the machine does not do it, or the page table is not in memory.
    Refused,
    /// Nothing, since the machine failed to bind them, and failed again to bind them as they were. Where it did not even
    /// take them away, they may still be bound to these spaces: freed once it does.
    Lost(Vec<S>),
}

impl<S> Via<S> {
    fn spaces(self) -> Vec<S> {
        match self {
            Self::Space(space) => alloc::vec![space],
            Self::Lost(spaces) => spaces,
            Self::Identity | Self::Refused => Vec::new(),
        }
    }
}

/// Spaces of an entry that there is no more, which the machine did not let go of, and the streams that may be bound to
/// them.
#[derive(Debug)]
pub(super) struct Lost<S> {
    pub(super) streams: Streams,
    pub(super) spaces: Vec<S>,
}

/// What it takes to bind entries.
pub(super) struct Means<'a, H: Host, M> {
    pub(super) endpoint: EndpointId,
    pub(super) host: &'a mut H,
    pub(super) memory: &'a M,
    pub(super) identity: &'a mut Option<H::Space>,
    /// Of the endpoint. Nothing of it is bound while there is any.
    pub(super) lost: &'a mut Vec<Lost<H::Space>>,
    /// Where no table of a guest may lie.
    pub(super) window: Option<Window>,
    /// How many entries the endpoint may have bound.
    pub(super) limit: usize,
    /// How many of the guest's tables are read at once.
    pub(super) max_tables: usize,
    /// Whether the endpoint asks for pages.
    pub(super) page_requests: bool,
}

impl<H: Host, M: Stage2> Means<'_, H, M> {
    /// Makes what an entry is bound to.
    fn make(&mut self, target: Target) -> Result<Via<H::Space>, HostError> {
        let made = match target {
            Target::Bypass if self.identity.is_some() => return Ok(Via::Identity),
            Target::Bypass => self.host.create(SpaceSpec::Identity).map(|space| {
                *self.identity = Some(space);
                Via::Identity
            }),
            Target::PageTable(table) if self.is_in_window(table.extents()) => Err(HostError::BadAddress),
            Target::PageTable(table) => {
                let table = &Canonical::VtdFirstStage(table);
                self.host.create(SpaceSpec::GuestTable { endpoint: self.endpoint, table }).map(Via::Space)
            }
        };
        match made {
            // Hardware would fault on such an entry; so does what is bound to nothing.
            Err(HostError::Unsupported | HostError::BadAddress) => Ok(Via::Refused),
            made => made,
        }
    }

    fn is_in_window(&self, (first, size): (Gpa, u64)) -> bool {
        self.window.is_some_and(|window| window.touches(first, size))
    }

    fn bind(&mut self, pasid: Option<Pasid>, via: Option<&mut Via<H::Space>>) -> Result<(), HostError> {
        let space = match via {
            None | Some(Via::Refused | Via::Lost(_)) => None,
            Some(Via::Space(space)) => Some(space),
            Some(Via::Identity) => self.identity.as_mut(),
        };
        self.host.bind(Stream { endpoint: self.endpoint, pasid }, space)
    }

    /// Binds all streams of an entry, or none of them: then they are bound to `old`. What the machine does not do
    /// becomes [`Via::Refused`], and what it does not let go of [`Via::Lost`].
    fn bind_all(
        &mut self,
        streams: Streams,
        new: &mut Option<Via<H::Space>>,
        old: Option<&mut Via<H::Space>>,
    ) -> Result<(), HostError> {
        let (mut done, mut result) = self.bind_each(streams, new.as_mut());
        if result == Err(HostError::Unsupported) && new.is_some() {
            let (closed, closing) = self.bind_each(streams, None);
            (done, result) = (done.max(closed), closing);
            if result.is_ok() {
                let refused = new.replace(Via::Refused);
                self.discard(refused);
            }
        }
        if result.is_err() {
            self.restore(streams, done, new, old);
        }
        result
    }

    /// How many were bound, and why not all.
    fn bind_each(
        &mut self,
        streams: Streams,
        mut via: Option<&mut Via<H::Space>>,
    ) -> (usize, Result<(), HostError>) {
        let mut done = 0;
        for pasid in streams.into_iter().flatten() {
            if let Err(error) = self.bind(pasid, via.as_deref_mut()) {
                return (done, Err(error));
            }
            done += 1;
        }
        (done, Ok(()))
    }

    /// Binds the first `done` of an entry's streams from `new` to what they were bound to before. Where the machine
    /// fails once more, all of them are bound to nothing: closed rather than open.
    fn restore(
        &mut self,
        streams: Streams,
        done: usize,
        new: &mut Option<Via<H::Space>>,
        mut old: Option<&mut Via<H::Space>>,
    ) {
        let mut changed = streams.into_iter().flatten().take(done);
        if changed.all(|pasid| self.bind(pasid, old.as_deref_mut()).is_ok()) {
            return;
        }
        // Of an entry that is not recorded, the others may be bound to what is not known here.
        let closes = if old.is_some() { streams.len() } else { done };
        let mut is_closed = true;
        for pasid in streams.into_iter().flatten().take(closes) {
            is_closed &= self.bind(pasid, None).is_ok();
        }
        match old {
            Some(old) => {
                let before = core::mem::replace(old, Via::Lost(Vec::new()));
                if is_closed {
                    self.discard(Some(before));
                } else {
                    *old = Via::Lost(new.take().into_iter().chain([before]).flat_map(Via::spaces).collect());
                }
            }
            None if is_closed => {}
            None => *new = new.take().map(|new| Via::Lost(new.spaces())),
        }
    }

    fn discard(&mut self, via: Option<Via<H::Space>>) {
        for space in via.map_or_else(Vec::new, Via::spaces) {
            self.host.destroy(space);
        }
    }
}

/// The PASIDs of an entry's streams, `None` for untagged accesses.
pub(super) type Streams = [Option<Option<Pasid>>; 2];

impl<S> Entries<S> {
    /// Nothing is bound yet.
    pub(super) const fn new(table: PasidTable) -> Self {
        Self { table, bound: BTreeMap::new() }
    }

    /// Reads a table in place of the present one and binds what it says, all or nothing. `is_new`: the untagged stream
    /// is bound to something that is not known here, if not to nothing.
    pub(super) fn replace<H: Host<Space = S>, M: Stage2>(
        &mut self,
        table: &PasidTable,
        is_new: bool,
        means: &mut Means<'_, H, M>,
    ) -> Result<(), HostError> {
        if self.table.untagged() == table.untagged() {
            // What both tables say is not bound anew, so that nothing else answers its page requests.
            self.answer_requests(means)?;
            let before = core::mem::replace(&mut self.table, *table);
            return self.exchange(is_new, means).inspect_err(|_| self.table = before);
        }
        // Other streams for the same numbers: no entry can be taken over.
        self.close(true, means)?;
        let mut new = Self::new(*table);
        match new.exchange(false, means) {
            Ok(()) => {
                core::mem::replace(self, new).discard(means);
                Ok(())
            }
            Err(error) => {
                if new.lose(means) {
                    // Closed rather than open: other streams have to be taken away first.
                    self.shut(means);
                } else {
                    self.open(means);
                }
                Err(error)
            }
        }
    }

    /// Gives up entries that could not be bound. Whether the machine did not let go of all.
    pub(super) fn lose<H: Host<Space = S>, M: Stage2>(self, means: &mut Means<'_, H, M>) -> bool {
        let streams: Vec<Streams> = self.bound.keys().map(|&pasid| self.streams(pasid)).collect();
        for (streams, entry) in streams.into_iter().zip(self.bound.into_values()) {
            match entry.via {
                Via::Lost(spaces) => means.lost.push(Lost { streams, spaces }),
                via => means.discard(Some(via)),
            }
        }
        !means.lost.is_empty()
    }

    /// Notes that the streams of all entries are bound to nothing, and are to be bound anew by the next reading.
    fn shut<H: Host<Space = S>, M: Stage2>(&mut self, means: &mut Means<'_, H, M>) {
        for entry in self.bound.values_mut() {
            let via = core::mem::replace(&mut entry.via, Via::Lost(Vec::new()));
            means.discard(Some(via));
        }
    }

    /// Binds the untagged stream to something else, and all others of the table to nothing; or nothing happens.
    pub(super) fn leave<H: Host<Space = S>, M: Stage2>(
        &mut self,
        space: Option<&mut S>,
        means: &mut Means<'_, H, M>,
    ) -> Result<(), HostError> {
        self.close(false, means)?;
        if let Err(error) = means.host.bind(Stream::untagged(means.endpoint), space) {
            self.open(means);
            return Err(error);
        }
        core::mem::replace(self, Self::new(self.table)).discard(means);
        Ok(())
    }

    /// Reads the whole table anew and binds what has changed, first what makes room. Whatever fails, each entry is as it
    /// was or as it is now.
    ///
    /// # Errors
    /// The first; what comes behind it was tried nevertheless. [`HostError::NoMemory`] where entries were left out.
    pub(super) fn refresh<H: Host<Space = S>, M: Stage2>(
        &mut self,
        means: &mut Means<'_, H, M>,
    ) -> Result<(), HostError> {
        let Reading { changes, is_whole, .. } = self.read(means);
        let mut result = Ok(());
        for adds in [false, true] {
            for &(pasid, said) in changes.iter().filter(|(_, said)| said.is_some() == adds) {
                result = result.and(self.apply(pasid, said, means));
            }
        }
        if is_whole { result } else { result.and(Err(HostError::NoMemory)) }
    }

    /// The same for the entry of one PASID, `None` for that of untagged accesses.
    pub(super) fn refresh_one<H: Host<Space = S>, M: Stage2>(
        &mut self,
        pasid: Option<Pasid>,
        means: &mut Means<'_, H, M>,
    ) -> Result<(), HostError> {
        let untagged = self.table.untagged();
        // By its number the entry of untagged accesses is there, too, where no tagged access may use it.
        let read = self.table.fetch(means.memory, pasid.filter(|pasid| *pasid != untagged));
        let said = read.ok().and_then(|entry| Said::of(&entry, self.table.caps()));
        let pasid = pasid.unwrap_or(untagged);
        let is_same = match self.bound.get(&pasid) {
            // What was refused is tried again: the guest asks for it.
            Some(entry) => {
                said.is_some_and(|said| said.target == entry.said.target)
                    && !matches!(entry.via, Via::Refused | Via::Lost(_))
            }
            None => said.is_none(),
        };
        if is_same { Ok(()) } else { self.apply(pasid, said, means) }
    }

    /// The table.
    pub(super) const fn table(&self) -> &PasidTable {
        &self.table
    }

    /// How many entries are bound.
    pub(super) fn len(&self) -> usize {
        self.bound.len()
    }

    /// How many of them the machine refused.
    pub(super) fn refused(&self) -> usize {
        self.bound.values().filter(|entry| matches!(entry.via, Via::Refused | Via::Lost(_))).count()
    }

    /// The streams that the entry of a PASID serves.
    pub(super) fn streams(&self, pasid: Pasid) -> Streams {
        let is_tagged = pasid.value() >> self.table.pasid_bits() == 0 && self.table.pasid_bits() != 0;
        match pasid == self.table.untagged() {
            // The untagged stream's table serves PASID 0 as well.
            true if pasid == Pasid::ZERO || !is_tagged => [None, Some(None)],
            true => [Some(Some(pasid)), Some(None)],
            false => [None, Some(Some(pasid))],
        }
    }

    /// What in the live table is not as it is bound. What was lost is not as it says.
    fn read<H: Host<Space = S>, M: Stage2>(&self, means: &Means<'_, H, M>) -> Reading {
        let is_lost = |entry: &Entry<S>| matches!(entry.via, Via::Lost(_));
        let bound =
            self.bound.iter().map(|(&pasid, entry)| (pasid, (!is_lost(entry)).then_some(&entry.said)));
        Reading::of(&self.table, means.memory, bound, means.limit, means.max_tables)
    }

    /// Has the machine answer what the streams of all entries have asked for.
    fn answer_requests<H: Host<Space = S>, M: Stage2>(
        &self,
        means: &mut Means<'_, H, M>,
    ) -> Result<(), HostError> {
        if !means.page_requests {
            return Ok(());
        }
        // Accesses that are tagged with PASID 0 have what serves untagged ones, and requests of their own.
        let zero = self.bound.contains_key(&Pasid::ZERO).then_some(Some(Pasid::ZERO));
        let streams = self.bound.keys().flat_map(|&pasid| self.streams(pasid)).flatten().chain(zero);
        let all: Vec<Invalidation> =
            streams.map(|pasid| everything(means.endpoint, Scope::Pasid(pasid))).collect();
        means.host.invalidate(&all).map_err(|stopped| stopped.error)
    }

    /// All changes, or none.
    fn exchange<H: Host<Space = S>, M: Stage2>(
        &mut self,
        is_new: bool,
        means: &mut Means<'_, H, M>,
    ) -> Result<(), HostError> {
        let Reading { mut changes, is_whole, added, gone } = self.read(means);
        if !is_whole || (self.bound.len() + added).saturating_sub(gone) > means.limit {
            return Err(HostError::NoMemory);
        }
        // The untagged stream comes last: what it is bound to may not be known here, and cannot be restored then.
        let untagged = self.table.untagged();
        match changes.binary_search_by_key(&untagged, |(pasid, _)| *pasid) {
            Ok(place) => changes.get_mut(place..).unwrap_or_default().rotate_left(1),
            Err(_) if is_new => changes.push((untagged, None)),
            Err(_) => {}
        }
        let mut made = Vec::with_capacity(changes.len());
        for (pasid, said) in changes {
            match said.map(|said| means.make(said.target)).transpose() {
                Ok(via) => made.push((pasid, said, via)),
                Err(error) => {
                    made.into_iter().for_each(|(_, _, via)| means.discard(via));
                    return Err(error);
                }
            }
        }
        let mut failed = None;
        for (place, (pasid, _, via)) in made.iter_mut().enumerate() {
            let streams = self.streams(*pasid);
            let old = self.bound.get_mut(pasid).map(|entry| &mut entry.via);
            if let Err(error) = means.bind_all(streams, via, old) {
                failed = Some((place, error));
                break;
            }
        }
        let Some((place, error)) = failed else {
            made.into_iter().for_each(|(pasid, said, via)| self.record(pasid, said, via, means));
            return Ok(());
        };
        for (at, (pasid, said, mut via)) in made.into_iter().enumerate() {
            if at < place {
                let streams = self.streams(pasid);
                let old = self.bound.get_mut(&pasid).map(|entry| &mut entry.via);
                means.restore(streams, streams.len(), &mut via, old);
            }
            self.give_up(pasid, said, via, means);
        }
        Err(error)
    }

    /// One change. What would be one entry too many is not bound.
    fn apply<H: Host<Space = S>, M: Stage2>(
        &mut self,
        pasid: Pasid,
        said: Option<Said>,
        means: &mut Means<'_, H, M>,
    ) -> Result<(), HostError> {
        if said.is_some() && self.bound.len() >= means.limit && !self.bound.contains_key(&pasid) {
            return Err(HostError::NoMemory);
        }
        let mut via = said.map(|said| means.make(said.target)).transpose()?;
        let streams = self.streams(pasid);
        let old = self.bound.get_mut(&pasid).map(|entry| &mut entry.via);
        if let Err(error) = means.bind_all(streams, &mut via, old) {
            self.give_up(pasid, said, via, means);
            return Err(error);
        }
        self.record(pasid, said, via, means);
        Ok(())
    }

    fn record<H: Host<Space = S>, M: Stage2>(
        &mut self,
        pasid: Pasid,
        said: Option<Said>,
        via: Option<Via<S>>,
        means: &mut Means<'_, H, M>,
    ) {
        let old = match said.zip(via) {
            Some((said, via)) => self.bound.insert(pasid, Entry { said, via }),
            None => self.bound.remove(&pasid),
        };
        means.discard(old.map(|entry| entry.via));
    }

    /// Frees what could not be bound, unless streams may be bound to it: then there is an entry, for the next change to
    /// begin with.
    fn give_up<H: Host<Space = S>, M: Stage2>(
        &mut self,
        pasid: Pasid,
        said: Option<Said>,
        via: Option<Via<S>>,
        means: &mut Means<'_, H, M>,
    ) {
        match (said, via) {
            (Some(said), Some(via @ Via::Lost(_))) => drop(self.bound.insert(pasid, Entry { said, via })),
            (_, via) => means.discard(via),
        }
    }

    /// Binds the streams of all entries to nothing, the untagged one only `with_untagged`; or nothing happens.
    fn close<H: Host<Space = S>, M: Stage2>(
        &mut self,
        with_untagged: bool,
        means: &mut Means<'_, H, M>,
    ) -> Result<(), HostError> {
        let closed = self.bound.keys().try_for_each(|&pasid| {
            let streams = self.streams(pasid).into_iter().flatten();
            let mut wanted = streams.filter(|stream| with_untagged || stream.is_some());
            wanted.try_for_each(|stream| means.bind(stream, None))
        });
        if closed.is_err() {
            self.open(means);
        }
        closed
    }

    /// Binds the streams of all entries as they are recorded.
    fn open<H: Host<Space = S>, M: Stage2>(&mut self, means: &mut Means<'_, H, M>) {
        let pasids: Vec<Pasid> = self.bound.keys().copied().collect();
        for pasid in pasids {
            let streams = self.streams(pasid);
            let via = self.bound.get_mut(&pasid).map(|entry| &mut entry.via);
            means.restore(streams, streams.len(), &mut None, via);
        }
    }

    /// Frees everything. No stream is bound to it any more.
    fn discard<H: Host<Space = S>, M: Stage2>(self, means: &mut Means<'_, H, M>) {
        self.bound.into_values().for_each(|entry| means.discard(Some(entry.via)));
    }
}
