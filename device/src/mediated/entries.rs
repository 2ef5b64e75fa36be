//! VT-d: a guest's PASID table, read here, by page tables of single PASIDs.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use pgtable_formats::Pasid;
use pgtable_formats::context::vtd::{FirstStage, PasidTable};
use pgtable_formats::context::{Canonical, Context, Stage1};
use viommu_wire::EndpointId;

use crate::host::{Host, HostError, SpaceSpec, Stream};
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
    target: Target,
    via: Via<S>,
}

/// What an entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    PageTable(FirstStage),
    Bypass,
}

/// What its streams are bound to.
#[derive(Debug)]
enum Via<S> {
    Space(S),
    /// The space that all bypass shares.
    Identity,
    /// Nothing: the machine does not do it, or the page table is not in memory.
    Refused,
}

/// An entry that is not as it is bound. `None`: not present, or not legal.
type Change = (Pasid, Option<Target>);

/// What it takes to bind entries.
pub(super) struct Means<'a, H: Host, M> {
    pub(super) endpoint: EndpointId,
    pub(super) host: &'a mut H,
    pub(super) memory: &'a M,
    pub(super) identity: &'a mut Option<H::Space>,
    /// How many entries the endpoint may have bound.
    pub(super) limit: usize,
}

impl Target {
    fn of(context: Context) -> Option<Self> {
        match context {
            Context::Bypass => Some(Self::Bypass),
            Context::Stage1(Stage1::Vtd(table)) => Some(Self::PageTable(table)),
            Context::Stage1(Stage1::Smmuv3(_)) => None,
        }
    }
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

    fn bind(&mut self, pasid: Option<Pasid>, via: Option<&mut Via<H::Space>>) -> Result<(), HostError> {
        let space = match via {
            None | Some(Via::Refused) => None,
            Some(Via::Space(space)) => Some(space),
            Some(Via::Identity) => self.identity.as_mut(),
        };
        self.host.bind(Stream { endpoint: self.endpoint, pasid }, space)
    }

    /// Binds all streams of an entry, or none of them: then they are bound to `old`. What the machine does not do
    /// becomes [`Via::Refused`].
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
            self.restore(streams.into_iter().flatten().take(done), old);
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

    /// Binds streams to what they were bound to before. Where the machine fails once more they are bound to nothing:
    /// closed rather than open.
    fn restore(
        &mut self,
        streams: impl Iterator<Item = Option<Pasid>> + Clone,
        mut old: Option<&mut Via<H::Space>>,
    ) {
        for pasid in streams.clone() {
            if self.bind(pasid, old.as_deref_mut()).is_ok() {
                continue;
            }
            for pasid in streams {
                let _ = self.bind(pasid, None);
            }
            if let Some(old) = old {
                let lost = core::mem::replace(old, Via::Refused);
                self.discard(Some(lost));
            }
            return;
        }
    }

    fn discard(&mut self, via: Option<Via<H::Space>>) {
        if let Some(Via::Space(space)) = via {
            self.host.destroy(space);
        }
    }
}

/// The PASIDs of an entry's streams, `None` for untagged accesses.
type Streams = [Option<Option<Pasid>>; 2];

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
                self.open(means);
                Err(error)
            }
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

    /// Reads the whole table anew and binds what has changed. Whatever fails, each entry is as it was or as it is now.
    ///
    /// # Errors
    /// The first; what comes behind it was tried nevertheless.
    pub(super) fn refresh<H: Host<Space = S>, M: Stage2>(
        &mut self,
        means: &mut Means<'_, H, M>,
    ) -> Result<(), HostError> {
        let (changes, is_over) = self.changes(means.memory, means.limit);
        let mut result = Ok(());
        for (pasid, target) in changes {
            result = result.and(self.apply(pasid, target, means));
        }
        if is_over { result.and(Err(HostError::NoMemory)) } else { result }
    }

    /// The same for the entry of one PASID, `None` for that of untagged accesses.
    pub(super) fn refresh_one<H: Host<Space = S>, M: Stage2>(
        &mut self,
        pasid: Option<Pasid>,
        means: &mut Means<'_, H, M>,
    ) -> Result<(), HostError> {
        let judged = self.table.lookup(means.memory, pasid);
        let target = judged.ok().and_then(Target::of);
        let pasid = pasid.unwrap_or(self.table.untagged());
        let is_same = match self.bound.get(&pasid) {
            // What was refused is tried again: the guest asks for it.
            Some(entry) => target == Some(entry.target) && !matches!(entry.via, Via::Refused),
            None if target.is_some() && self.bound.len() >= means.limit => return Err(HostError::NoMemory),
            None => target.is_none(),
        };
        if is_same { Ok(()) } else { self.apply(pasid, target, means) }
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
        self.bound.values().filter(|entry| matches!(entry.via, Via::Refused)).count()
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

    /// What in the live table is not as it is bound, by ascending PASID; and whether that are more than `limit` entries,
    /// those above which are left out.
    fn changes<M: Stage2>(&self, memory: &M, limit: usize) -> (Vec<Change>, bool) {
        let mut changes: Vec<Change> = Vec::new();
        let mut bound = self.bound.iter().peekable();
        let (mut kept, mut is_over) = (0, false);
        self.table.scan(memory, |pasid, judged| {
            while let Some((&gone, _)) = bound.next_if(|(other, _)| **other < pasid) {
                changes.push((gone, None));
            }
            let target = judged.ok().and_then(Target::of);
            let old = bound.next_if(|(other, _)| **other == pasid).map(|(_, entry)| entry.target);
            if target.is_some() && kept >= limit {
                is_over = true;
                changes.extend(old.map(|_| (pasid, None)));
                return;
            }
            kept += usize::from(target.is_some());
            if target != old {
                changes.push((pasid, target));
            }
        });
        changes.extend(bound.map(|(&gone, _)| (gone, None)));
        (changes, is_over)
    }

    /// All changes, or none.
    fn exchange<H: Host<Space = S>, M: Stage2>(
        &mut self,
        is_new: bool,
        means: &mut Means<'_, H, M>,
    ) -> Result<(), HostError> {
        let (mut changes, is_over) = self.changes(means.memory, means.limit);
        if is_over {
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
        for (pasid, target) in changes {
            match target.map(|target| means.make(target)).transpose() {
                Ok(via) => made.push((pasid, target, via)),
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
            made.into_iter().for_each(|(pasid, target, via)| self.record(pasid, target, via, means));
            return Ok(());
        };
        for (at, (pasid, _, via)) in made.into_iter().enumerate() {
            if at < place {
                let streams = self.streams(pasid).into_iter().flatten();
                means.restore(streams, self.bound.get_mut(&pasid).map(|entry| &mut entry.via));
            }
            means.discard(via);
        }
        Err(error)
    }

    /// One change.
    fn apply<H: Host<Space = S>, M: Stage2>(
        &mut self,
        pasid: Pasid,
        target: Option<Target>,
        means: &mut Means<'_, H, M>,
    ) -> Result<(), HostError> {
        let mut via = target.map(|target| means.make(target)).transpose()?;
        let streams = self.streams(pasid);
        let old = self.bound.get_mut(&pasid).map(|entry| &mut entry.via);
        if let Err(error) = means.bind_all(streams, &mut via, old) {
            means.discard(via);
            return Err(error);
        }
        self.record(pasid, target, via, means);
        Ok(())
    }

    fn record<H: Host<Space = S>, M: Stage2>(
        &mut self,
        pasid: Pasid,
        target: Option<Target>,
        via: Option<Via<S>>,
        means: &mut Means<'_, H, M>,
    ) {
        let old = match target.zip(via) {
            Some((target, via)) => self.bound.insert(pasid, Entry { target, via }),
            None => self.bound.remove(&pasid),
        };
        means.discard(old.map(|entry| entry.via));
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
            let streams = self.streams(pasid).into_iter().flatten();
            means.restore(streams, self.bound.get_mut(&pasid).map(|entry| &mut entry.via));
        }
    }

    /// Frees everything. No stream is bound to it any more.
    fn discard<H: Host<Space = S>, M: Stage2>(self, means: &mut Means<'_, H, M>) {
        self.bound.into_values().for_each(|entry| means.discard(Some(entry.via)));
    }
}
