//! INVALIDATE of endpoints whose tables are not handed over as they are.

use pgtable_formats::Pasid;
use viommu_wire::Caches;

use super::descriptors::Means;
use super::{Mediated, Way, everything};
use crate::host::{Host, HostError, Invalidation, Scope, Stopped, Stream};
use crate::soft::Stage2;

impl<H: Host, M: Stage2> Mediated<H, M> {
    /// A batch that is about such an endpoint, too.
    ///
    /// First what has changed in PASID tables is bound, then the host below drops what it has cached, in one call.
    pub(super) fn invalidate_made(&mut self, batch: &[Invalidation]) -> Result<(), Stopped> {
        let mut parts = core::mem::take(&mut self.batch);
        let mut failed = Ok(());
        for (place, invalidation) in batch.iter().enumerate() {
            if let Err(error) = self.prepare(place, invalidation, &mut parts) {
                failed = Err(Stopped { done: place, error });
                break;
            }
        }
        let result = self.send(&parts).and_then(|()| self.resume(&parts));
        parts.clear();
        self.batch = parts;
        result.and(failed)
    }

    /// Adds what the host below is asked for to `parts`, also on failure.
    fn prepare(
        &mut self,
        place: usize,
        invalidation: &Invalidation,
        parts: &mut alloc::vec::Vec<(usize, Invalidation)>,
    ) -> Result<(), HostError> {
        let endpoint = invalidation.endpoint;
        let mut result = Ok(());
        match self.ports.get(&endpoint).map(|port| &port.way) {
            Some(Way::Descriptors(_, Some(made))) if made.needs_all() => {
                parts.push((place, everything(endpoint, Scope::Endpoint)));
                // It may be about page requests, too.
                parts.push((place, *invalidation));
            }
            Some(Way::Descriptors(_, Some(made))) => {
                // Hardware that finds translations by their tag alone need not drop all of them.
                let tag = match (invalidation.tag, invalidation.scope) {
                    (None, Scope::Pasid(pasid) | Scope::Range { pasid, .. })
                        if !invalidation.caches.contains(Caches::PASID) =>
                    {
                        made.asid(pasid.unwrap_or(Pasid::ZERO))
                    }
                    (tag, _) => tag,
                };
                parts.push((place, Invalidation { tag, ..*invalidation }));
            }
            Some(Way::Entries { bound: Some(bound), .. }) => {
                let is_reread = invalidation.caches.contains(Caches::PASID);
                let named = match invalidation.scope {
                    Scope::Endpoint => None,
                    Scope::Pasid(pasid) | Scope::Range { pasid, .. } => Some(pasid),
                };
                let streams = named.map(|pasid| {
                    let number = pasid.unwrap_or(bound.table().untagged());
                    let [first, second] = bound.streams(number);
                    // Perhaps not one cache entry, though one table.
                    [first, second, (number == Pasid::ZERO).then_some(Some(Pasid::ZERO))]
                });
                if is_reread {
                    result = self.reread(endpoint, named);
                }
                let Some(streams) = streams else {
                    let all = everything(endpoint, Scope::Endpoint);
                    parts.push((place, if is_reread { all } else { *invalidation }));
                    return result;
                };
                for pasid in streams.into_iter().flatten() {
                    let part = match invalidation.scope {
                        _ if is_reread => everything(endpoint, Scope::Pasid(pasid)),
                        Scope::Range { range, page_lg2, .. } => {
                            Invalidation { scope: Scope::Range { pasid, range, page_lg2 }, ..*invalidation }
                        }
                        _ => Invalidation { scope: Scope::Pasid(pasid), ..*invalidation },
                    };
                    parts.push((place, part));
                }
            }
            _ => parts.push((place, *invalidation)),
        }
        result
    }

    fn reread(
        &mut self,
        endpoint: viommu_wire::EndpointId,
        named: Option<Option<Pasid>>,
    ) -> Result<(), HostError> {
        self.with_entries(Stream::untagged(endpoint), |slot, means| match (slot, named) {
            (Some(entries), None) => entries.refresh(means),
            (Some(entries), Some(pasid)) => entries.refresh_one(pasid, means),
            (None, _) => Ok(()),
        })
    }

    fn send(&mut self, parts: &[(usize, Invalidation)]) -> Result<(), Stopped> {
        self.sent.clear();
        self.sent.extend(parts.iter().map(|(_, invalidation)| *invalidation));
        self.host.invalidate(&self.sent).map_err(|stopped| {
            let place = parts.get(stopped.done).or(parts.last()).map(|(place, _)| *place);
            Stopped { done: place.unwrap_or(0), ..stopped }
        })
    }

    /// All of an endpoint was dropped: where that was overdue it goes on.
    fn resume(&mut self, parts: &[(usize, Invalidation)]) -> Result<(), Stopped> {
        let Self { host, memory, ports, room: Some(room), limits, .. } = self else { return Ok(()) };
        for (place, invalidation) in parts {
            let endpoint = invalidation.endpoint;
            if let Some(Way::Descriptors(_, Some(made))) = ports.get_mut(&endpoint).map(|port| &mut port.way)
                && made.needs_all()
            {
                made.set_clean();
                let limit = limits.max_window_per_endpoint;
                let resumed = made.resume(&mut Means { endpoint, host, memory, room, limit });
                resumed.map_err(|error| Stopped { done: *place, error })?;
            }
        }
        Ok(())
    }
}
