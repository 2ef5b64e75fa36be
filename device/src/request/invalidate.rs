//! INVALIDATE, and dropping what was cached of a table that is not there any more.

use alloc::vec::Vec;

use viommu_wire::{Caches, Invalidate, InvalidateScope, Pasid};

use crate::device::Device;
use crate::domain::DomainKind;
use crate::endpoint::{Bound, Endpoint};
use crate::error::Rejection;
use crate::host::{Host, Invalidation, Scope, Stopped};

impl<H: Host> Device<H> {
    pub(super) fn invalidate(&mut self, request: &Invalidate) -> Result<(), Rejection> {
        let domain = request.domain;
        let place = self.domains.find(domain).ok_or(Rejection::NoDomain(domain))?;
        let found = self.domains[place].kind();
        if found != DomainKind::Table {
            return Err(Rejection::WrongKind { domain, found });
        }
        let mut batch = core::mem::take(&mut self.batch);
        for &at in &self.domains[place].endpoints {
            expand(request, &self.endpoints[at], &mut batch);
        }
        let result = invalidate_or_wider(&mut self.host, &mut batch);
        batch.clear();
        self.batch = batch;
        Ok(result?)
    }

    /// Drops all that was cached of the tables of one endpoint.
    pub(super) fn flush(&mut self, at: usize, scope: Scope) -> Result<(), Stopped> {
        let endpoint = self.endpoints[at].id;
        let caches = Caches::all();
        let all = Invalidation { endpoint, scope, caches, leaf: false, tag: None, global: true };
        invalidate_or_wider(&mut self.host, &mut [all])
    }
}

/// What `request` asks of `endpoint`. Tables that are not bound have nothing cached: every binding starts clean.
fn expand<S>(request: &Invalidate, endpoint: &Endpoint<S>, batch: &mut Vec<Invalidation>) {
    // A tag that no architecture has narrows nothing. Nor does a tag by itself among page tables that are bound one by
    // one: it is about each PASID that has it, and which these are is for the host to know.
    let by_itself =
        matches!(request.scope, InvalidateScope::Pasid(None) | InvalidateScope::Address { pasid: None, .. });
    let tag = request.tag.and_then(|tag| u16::try_from(tag).ok());
    let tag = tag.filter(|_| !by_itself || matches!(endpoint.untagged, Bound::PasidTable(_)));
    let mut push_scope = |scope| {
        let Invalidate { caches, leaf, global, .. } = *request;
        batch.push(Invalidation { endpoint: endpoint.id, scope, caches, leaf, tag, global });
    };
    let asked = match request.scope {
        InvalidateScope::Domain => {
            if endpoint.has_table() {
                push_scope(Scope::Endpoint);
            }
            return;
        }
        InvalidateScope::Pasid(pasid) | InvalidateScope::Address { pasid, .. } => pasid,
    };
    // A tag by itself is about every PASID that has it: one that narrows nothing is about all.
    if asked.is_none() && request.tag.is_some() && tag.is_none() && endpoint.has_table() {
        return push_scope(Scope::Endpoint);
    }
    let mut push = |pasid| {
        push_scope(match request.scope {
            InvalidateScope::Address { range, page_lg2, .. } => Scope::Range { pasid, range, page_lg2 },
            InvalidateScope::Domain | InvalidateScope::Pasid(_) => Scope::Pasid(pasid),
        });
    };
    match (&endpoint.untagged, asked) {
        (Bound::PasidTable(_), _) => push(asked),
        // Accesses with PASID 0 and untagged ones share one table, and perhaps not their cache entries.
        (Bound::PageTable(_), None | Some(Pasid::ZERO)) => {
            push(None);
            push(Some(Pasid::ZERO));
        }
        (_, Some(pasid)) if endpoint.pasids.contains_key(&pasid) => push(asked),
        // Global translations of the domain may have been cached for any PASID.
        _ if request.global && endpoint.has_table() => push_scope(Scope::Endpoint),
        _ => {}
    }
}

/// Does the batch; where the host stops, it is asked for all of each endpoint that is left, which is always right and
/// sometimes all that it can do.
fn invalidate_or_wider<H: Host>(host: &mut H, batch: &mut [Invalidation]) -> Result<(), Stopped> {
    if batch.is_empty() {
        return Ok(());
    }
    let Err(stopped) = host.invalidate(batch) else { return Ok(()) };
    let rest = batch.get_mut(stopped.done..).unwrap_or(&mut []);
    if rest.is_empty() {
        return Err(stopped);
    }
    for invalidation in rest.iter_mut() {
        *invalidation = Invalidation {
            endpoint: invalidation.endpoint,
            scope: Scope::Endpoint,
            caches: invalidation.caches,
            leaf: false,
            tag: None,
            global: true,
        };
    }
    host.invalidate(rest).map_err(|again| Stopped { done: stopped.done.saturating_add(again.done), ..again })
}
