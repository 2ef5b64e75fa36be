//! INVALIDATE, and dropping what was cached of a table that is not there any more.

use alloc::vec::Vec;

use viommu_wire::{Caches, Features, Invalidate, InvalidateScope, Pasid};

use crate::device::Device;
use crate::domain::DomainKind;
use crate::endpoint::{Bound, Endpoint};
use crate::error::Rejection;
use crate::host::{Host, Invalidation, Scope, Stopped, Stream};

impl<H: Host> Device<H> {
    pub(super) fn invalidate(&mut self, request: &Invalidate) -> Result<(), Rejection> {
        let domain = request.domain;
        let place = self.domains.find(domain).ok_or(Rejection::NoDomain(domain))?;
        let found = self.domains[place].kind();
        if found != DomainKind::Table {
            return Err(Rejection::WrongKind { domain, found });
        }
        let mut batch = core::mem::take(&mut self.batch);
        let may_wait = self.features.contains(Features::PAGE_REQUEST);
        for &at in &self.domains[place].endpoints {
            expand(request, &self.endpoints[at], may_wait, &mut batch);
        }
        let result = invalidate_and_revoke(&mut self.host, &batch, may_wait);
        if result.is_ok() {
            self.close_revoked(&batch);
        }
        batch.clear();
        self.batch = batch;
        result?;
        Ok(())
    }

    /// Drops all that was cached of the tables of one endpoint.
    pub(super) fn flush(&mut self, at: usize, scope: Scope) -> Result<(), Stopped> {
        let endpoint = self.endpoints[at].id;
        let caches = Caches::all();
        let all = Invalidation { endpoint, scope, caches, leaf: false, tag: None, global: true };
        invalidate_or_wider(&mut self.host, &[all]).map(drop)
    }
}

/// What `request` asks of `endpoint`: what to drop; and where accesses `may_wait`, those whose entry it takes back, one by
/// one, as page requests of theirs end. Tables that are not bound have nothing cached: every binding starts clean.
fn expand<S>(request: &Invalidate, endpoint: &Endpoint<S>, may_wait: bool, batch: &mut Vec<Invalidation>) {
    let Invalidate { caches, leaf, global, .. } = *request;
    // A tag that no architecture has narrows nothing. Nor does a tag by itself among page tables that are bound one by
    // one: it is about each PASID that has it, and which these are is for the host to know.
    let is_narrow = named(request.scope) != Some(None) || matches!(endpoint.untagged, Bound::PasidTable(..));
    let tag = request.tag.and_then(|tag| u16::try_from(tag).ok()).filter(|_| is_narrow);
    let first = batch.len();
    let mut add = |scope| {
        if !batch.iter().skip(first).any(|invalidation| invalidation.scope == scope) {
            batch.push(Invalidation { endpoint: endpoint.id, scope, caches, leaf, tag, global });
        }
    };
    dropped(request, endpoint, tag).into_iter().flatten().for_each(&mut add);
    if may_wait {
        revoked(request, endpoint).into_iter().flatten().map(Scope::Pasid).for_each(add);
    }
}

/// What to drop of the caches over the tables of `endpoint`. `tag`: what the request's comes to.
fn dropped<S>(request: &Invalidate, endpoint: &Endpoint<S>, tag: Option<u16>) -> [Option<Scope>; 2] {
    let everything = [Some(Scope::Endpoint).filter(|_| endpoint.has_table()), None];
    let Some(pasid) = named(request.scope) else { return everything };
    // A tag by itself is about every PASID that has it: one that narrows nothing is about all.
    if pasid.is_none() && request.tag.is_some() && tag.is_none() {
        return everything;
    }
    let streams = served(endpoint, pasid);
    // Global translations of the domain may have been cached for any PASID.
    if streams == [None; 2] && request.global {
        return everything;
    }
    // An entry goes as a whole, whatever the addresses.
    let drops_entries = request.caches.contains(Caches::PASID);
    streams.map(|stream| match request.scope {
        InvalidateScope::Address { range, page_lg2, .. } if !drops_entries => {
            stream.map(|pasid| Scope::Range { pasid, range, page_lg2 })
        }
        _ => stream.map(Scope::Pasid),
    })
}

/// The PASIDs (`None`: untagged accesses) whose entry the request names, by whichever of them.
fn revoked<S>(request: &Invalidate, endpoint: &Endpoint<S>) -> [Option<Option<Pasid>>; 2] {
    let Some(pasid) = named(request.scope).filter(|_| request.caches.contains(Caches::PASID)) else {
        return [None; 2];
    };
    match (&endpoint.untagged, pasid) {
        // Untagged accesses and those with a PASID may have one entry.
        (&Bound::PasidTable(_, untagged @ Some(_)), None) => [Some(None), Some(untagged)],
        (&Bound::PasidTable(_, untagged), Some(_)) if pasid == untagged => [Some(pasid), Some(None)],
        _ => served(endpoint, pasid),
    }
}

/// The PASIDs (`None`: untagged accesses) under which something may be cached of what `pasid` names.
fn served<S>(endpoint: &Endpoint<S>, pasid: Option<Pasid>) -> [Option<Option<Pasid>>; 2] {
    match (&endpoint.untagged, pasid) {
        (Bound::PasidTable(..), _) => [Some(pasid), None],
        // Accesses with PASID 0 and untagged ones share one table, and perhaps not their cache entries.
        (Bound::PageTable(_), None | Some(Pasid::ZERO)) => [Some(None), Some(Some(Pasid::ZERO))],
        (_, Some(named)) if endpoint.pasids.contains_key(&named) => [Some(pasid), None],
        _ => [None; 2],
    }
}

/// The PASID that a request is about, or untagged accesses. `None`: it is about all.
const fn named(scope: InvalidateScope) -> Option<Option<Pasid>> {
    match scope {
        InvalidateScope::Domain => None,
        InvalidateScope::Pasid(pasid) | InvalidateScope::Address { pasid, .. } => Some(pasid),
    }
}

/// Does the batch. Where the host did some of it for whole endpoints, which ends no page requests, and accesses
/// `may_wait`, it is asked for the streams that are revoked by name once more.
fn invalidate_and_revoke<H: Host>(
    host: &mut H,
    batch: &[Invalidation],
    may_wait: bool,
) -> Result<(), Stopped> {
    let exactly = invalidate_or_wider(host, batch)?;
    if !may_wait || exactly == batch.len() {
        return Ok(());
    }
    let waits = |stream: Stream| host.caps(stream.endpoint).is_some_and(|caps| caps.page_requests);
    let rest = batch.iter().skip(exactly).filter(|one| one.revoked().is_some_and(waits));
    let rest: Vec<_> = rest.copied().collect();
    if rest.is_empty() { Ok(()) } else { host.invalidate(&rest) }
}

/// Does the batch; where the host stops, it is asked for all of each endpoint that is left, which is always right and
/// sometimes all that it can do. Answers how many of the batch were done as asked.
fn invalidate_or_wider<H: Host>(host: &mut H, batch: &[Invalidation]) -> Result<usize, Stopped> {
    if batch.is_empty() {
        return Ok(0);
    }
    let Err(stopped) = host.invalidate(batch) else { return Ok(batch.len()) };
    let wider = |&Invalidation { endpoint, caches, .. }: &Invalidation| Invalidation {
        endpoint,
        scope: Scope::Endpoint,
        caches,
        leaf: false,
        tag: None,
        global: true,
    };
    let rest: Vec<_> = batch.iter().skip(stopped.done).map(wider).collect();
    if rest.is_empty() {
        return Err(stopped);
    }
    match host.invalidate(&rest) {
        Ok(()) => Ok(stopped.done),
        Err(again) => Err(Stopped { done: stopped.done.saturating_add(again.done), ..again }),
    }
}
