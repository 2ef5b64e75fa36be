//! One endpoint: its device, and what its streams are bound and attached to.
//!
//! *Bound* is what the device core last asked for and was granted; *attached* is what the kernel has. They differ for a
//! stream that is *blocked*: its table's caches could not be brought up to date, and until they can it reaches nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use nix::errno::Errno;
use pgtable_formats::{IovaRange, Pasid};
use viommu_device::host::{EndpointCaps, PageRequestReport};
use viommu_wire::EndpointId;

use crate::kernel::{DeviceId, Iommufd};
use crate::objects::{Attachment, Hwpt, Vdevice};
use crate::page_requests::PageRequests;
use crate::unit::{Kind, Table, Unit};
use crate::vendor::smmuv3;

/// What an administrator reads of it.
const BLOCKED: &str = "endpoint blocked: its caches could not be brought up to date";

pub(crate) struct Endpoint<K: Iommufd> {
    // In this order: streams are detached, then the vDEVICE goes, then what it is part of.
    tagged: BTreeMap<Pasid, Tagged<K>>,
    attachment: Attachment<K>,
    bound: Bound<K>,
    _vdevice: Option<Vdevice<K>>,
    pub(crate) unit: Arc<Unit<K>>,

    pub(crate) facts: Facts,
    /// `None` where its accesses cannot wait.
    pub(crate) page_requests: Option<PageRequests<K>>,
    /// The IOMMU may hold translations of tables that the stream is not bound to any more, or that changed since: no
    /// table before they are gone. Only where tags are the guest's (SMMUv3).
    stale: bool,
}

/// What never changes of an endpoint.
pub(crate) struct Facts {
    pub(crate) id: EndpointId,
    pub(crate) device: DeviceId,
    pub(crate) caps: EndpointCaps,
    /// The device has ATS, and it may be enabled.
    pub(crate) ats: bool,
    pub(crate) may_stall: bool,
    /// From the lowest to the highest address that may be mapped.
    pub(crate) span: Option<IovaRange>,
    /// What mappings have to be aligned to, in bytes.
    pub(crate) alignment: u64,
}

/// What a stream is bound to.
pub(crate) enum Bound<K: Iommufd> {
    Nothing,
    /// Bypass or mappings.
    Paging(Arc<Hwpt<K>>),
    /// A guest's table.
    Table(Table<K>),
}

/// A PASID with a binding of its own.
struct Tagged<K: Iommufd> {
    /// `None` while it is blocked.
    attachment: Option<Attachment<K>>,
    bound: Arc<Hwpt<K>>,
    is_table: bool,
}

impl<K: Iommufd> Bound<K> {
    const fn hwpt(&self) -> Option<&Arc<Hwpt<K>>> {
        match self {
            Self::Nothing => None,
            Self::Paging(hwpt) | Self::Table(Table { hwpt, .. }) => Some(hwpt),
        }
    }

    const fn is_table(&self) -> bool {
        matches!(self, Self::Table(_))
    }
}

impl<K: Iommufd> Tagged<K> {
    fn is_to(&self, table: &Arc<Hwpt<K>>) -> bool {
        self.attachment.as_ref().is_some_and(|attachment| attachment.is_to(table))
    }
}

impl<K: Iommufd> Endpoint<K> {
    /// Of a device that is attached to the abort of `unit`.
    pub(crate) fn new(
        facts: Facts,
        unit: Arc<Unit<K>>,
        vdevice: Option<Vdevice<K>>,
        attachment: Attachment<K>,
        page_requests: Option<PageRequests<K>>,
    ) -> Self {
        Self {
            tagged: BTreeMap::new(),
            attachment,
            bound: Bound::Nothing,
            _vdevice: vdevice,
            unit,
            facts,
            page_requests,
            stale: false,
        }
    }

    /// Binds untagged accesses.
    ///
    /// From a guest's table to anything else an SMMUv3 goes by way of abort: what is cached under the guest's tags has to
    /// be gone first, and no kernel drops it. From one table to another the device core does, when it is bound.
    pub(crate) fn bind_untagged(&mut self, bound: Bound<K>) -> Result<(), Errno> {
        let leaves = self.has_guest_tags() && self.bound.is_table() && !bound.is_table();
        if leaves {
            self.attach(&Arc::clone(&self.unit.abort))?;
            self.stale = true;
        }
        if self.stale && (leaves || bound.hwpt().is_some()) {
            self.drop_everything().inspect_err(|errno| self.tell_blocked(*errno))?;
        }
        let result = match bound.hwpt() {
            None if leaves => Ok(()),
            target => self.attach(&Arc::clone(target.unwrap_or(&self.unit.abort))),
        };
        match result {
            Ok(()) => self.bound = bound,
            // Nothing is cached: if this fails as well, the endpoint is blocked.
            Err(_) if leaves => self.resume().unwrap_or_else(|errno| self.tell_blocked(errno)),
            Err(_) => {}
        }
        result
    }

    /// Binds accesses with a PASID, where that is attached on its own.
    pub(crate) fn bind_tagged(&mut self, pasid: Pasid, bound: &Bound<K>) -> Result<(), Errno> {
        let Some(hwpt) = bound.hwpt() else { return self.unbind_tagged(pasid) };
        let is_table = bound.is_table();
        if self.tagged.get(&pasid).is_some_and(|tagged| tagged.is_to(hwpt)) {
            self.close_page_requests_of(Some(pasid))?;
        }
        let Self { tagged, page_requests, .. } = self;
        match tagged.get_mut(&pasid) {
            Some(Tagged { attachment: place @ Some(_), bound, is_table: was_table }) => {
                if let Some(attachment) = place {
                    let result = attachment.replace(hwpt, || forget(page_requests, |of| of == Some(pasid)));
                    place.take_if(|attachment| attachment.is_to_nothing());
                    result?;
                }
                (*bound, *was_table) = (Arc::clone(hwpt), is_table);
            }
            _ => {
                let attachment = Some(Attachment::new(self.facts.device, Some(pasid), hwpt)?);
                self.tagged.insert(pasid, Tagged { attachment, bound: Arc::clone(hwpt), is_table });
            }
        }
        Ok(())
    }

    fn unbind_tagged(&mut self, pasid: Pasid) -> Result<(), Errno> {
        let Some(mut tagged) = self.tagged.remove(&pasid) else { return Ok(()) };
        let Some(attachment) = tagged.attachment.take() else { return Ok(()) };
        attachment.detach().map_err(|(attachment, errno)| {
            tagged.attachment = Some(attachment);
            self.tagged.insert(pasid, tagged);
            errno
        })?;
        forget(&mut self.page_requests, |of| of == Some(pasid));
        Ok(())
    }

    /// Attaches untagged accesses. What waited for the table before is answered INVALID: by the kernel, or here where it
    /// is the same table, which the kernel makes nothing of. What fails leaves what was attached, or blocks the endpoint.
    fn attach(&mut self, table: &Arc<Hwpt<K>>) -> Result<(), Errno> {
        if self.attachment.is_to(table) {
            self.close_page_requests(is_served_untagged)?;
        }
        let Self { attachment, page_requests, tagged, .. } = self;
        attachment.replace(table, || forget(page_requests, |pasid| is_served_untagged(tagged, pasid)))
    }

    /// The oldest page request that was not handed out.
    pub(crate) fn next_page_request(&mut self) -> Option<PageRequestReport> {
        let Self { page_requests, tagged, bound, .. } = self;
        page_requests.as_mut()?.next(|pasid| has_table(tagged, bound, pasid))
    }

    /// Answers the page requests with `pasid` INVALID, those that were not read included. What fails may leave some.
    pub(crate) fn close_page_requests_of(&mut self, pasid: Option<Pasid>) -> Result<(), Errno> {
        self.close_page_requests(|_, of| of == pasid)
    }

    fn close_page_requests(
        &mut self,
        selects: impl Fn(&BTreeMap<Pasid, Tagged<K>>, Option<Pasid>) -> bool,
    ) -> Result<(), Errno> {
        let Self { page_requests, tagged, bound, .. } = self;
        let Some(requests) = page_requests else { return Ok(()) };
        requests.close(|pasid| selects(tagged, pasid), |pasid| has_table(tagged, bound, pasid))
    }

    /// The guest's table that a stream is bound to.
    pub(crate) fn table(&self, pasid: Option<Pasid>) -> Option<&Arc<Hwpt<K>>> {
        match pasid {
            None => self.bound.hwpt().filter(|_| self.bound.is_table()),
            Some(pasid) => {
                self.tagged.get(&pasid).filter(|tagged| tagged.is_table).map(|tagged| &tagged.bound)
            }
        }
    }

    /// The PASIDs that are bound on their own.
    pub(crate) fn pasids(&self) -> impl Iterator<Item = Pasid> + '_ {
        self.tagged.keys().copied()
    }

    /// Whom commands to an SMMUv3 are about. A device that is blocked has ATS turned off.
    pub(crate) fn target(&self) -> smmuv3::Target {
        let (ats, pasids) = match &self.bound {
            Bound::Table(table) => (table.ats && !self.is_blocked(), table.pasid_bits.unwrap_or(0)),
            Bound::Nothing | Bound::Paging(_) => (false, 0),
        };
        smmuv3::Target { vsid: self.facts.id.0, ats, pasids }
    }

    /// Whether only dropping everything helps.
    pub(crate) fn needs_all(&self) -> bool {
        self.stale || self.is_blocked()
    }

    /// Everything was dropped: streams that were blocked go on.
    pub(crate) fn resume(&mut self) -> Result<(), Errno> {
        self.stale = false;
        if self.is_blocked() {
            self.attach(&Arc::clone(self.bound.hwpt().unwrap_or(&self.unit.abort)))?;
        }
        Ok(())
    }

    /// As [`resume`](Self::resume), for a PASID that is attached on its own.
    pub(crate) fn resume_tagged(&mut self, pasid: Pasid) -> Result<(), Errno> {
        match self.tagged.get_mut(&pasid) {
            Some(Tagged { attachment: place @ None, bound, .. }) => {
                *place = Some(Attachment::new(self.facts.device, Some(pasid), bound)?);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Caches could not be brought up to date: whoever translates through a guest's table stops.
    pub(crate) fn block(&mut self, errno: Errno) {
        self.stale = self.has_guest_tags();
        if !self.bound.is_table() {
            return;
        }
        match self.attach(&Arc::clone(&self.unit.abort)) {
            Err(errno) if !self.is_blocked() => {
                tracing::error!(endpoint = self.facts.id.0, %errno, "not blocked");
            }
            Ok(()) | Err(_) => self.tell_blocked(errno),
        }
    }

    /// As [`block`](Self::block), for a PASID that is attached on its own.
    pub(crate) fn block_tagged(&mut self, pasid: Pasid, errno: Errno) {
        let Some(tagged) = self.tagged.get_mut(&pasid) else { return };
        let Some(attachment) = tagged.attachment.take() else { return };
        match attachment.detach() {
            Ok(()) => {
                tracing::warn!(endpoint = self.facts.id.0, %pasid, %errno, "{BLOCKED}");
                forget(&mut self.page_requests, |of| of == Some(pasid));
            }
            Err((attachment, errno)) => {
                tracing::error!(endpoint = self.facts.id.0, %pasid, %errno, "not blocked");
                tagged.attachment = Some(attachment);
            }
        }
    }

    fn tell_blocked(&self, errno: Errno) {
        tracing::warn!(endpoint = self.facts.id.0, %errno, "{BLOCKED}");
    }

    fn is_blocked(&self) -> bool {
        !self.attachment.is_to(self.bound.hwpt().unwrap_or(&self.unit.abort))
    }

    /// Drops what the IOMMU holds of any table of the endpoint that is not attached.
    fn drop_everything(&mut self) -> Result<(), Errno> {
        if let Kind::Smmuv3(unit) = &self.unit.kind {
            let target = smmuv3::Target { ats: false, ..self.target() };
            unit.send(&smmuv3::everything(&[target], &unit.hardware))?;
        }
        self.stale = false;
        Ok(())
    }

    fn has_guest_tags(&self) -> bool {
        matches!(self.unit.kind, Kind::Smmuv3(_))
    }
}

/// Whether accesses with `pasid` go through what untagged ones are bound to, if through anything.
fn is_served_untagged<K: Iommufd>(tagged: &BTreeMap<Pasid, Tagged<K>>, pasid: Option<Pasid>) -> bool {
    pasid.is_none_or(|pasid| !tagged.contains_key(&pasid))
}

/// The kernel has answered page requests with selected PASIDs.
fn forget<K: Iommufd>(page_requests: &mut Option<PageRequests<K>>, selects: impl Fn(Option<Pasid>) -> bool) {
    if let Some(requests) = page_requests {
        requests.forget(selects);
    }
}

/// Whether accesses with `pasid` translate through a guest's table, so that they may ask for pages.
fn has_table<K: Iommufd>(
    tagged: &BTreeMap<Pasid, Tagged<K>>,
    bound: &Bound<K>,
    pasid: Option<Pasid>,
) -> bool {
    match pasid.and_then(|pasid| tagged.get(&pasid)) {
        Some(tagged) => tagged.is_table,
        None => match bound {
            // PASID 0 is that of untagged accesses, where it is not in a table of PASIDs.
            Bound::Table(table) => {
                table.pasid_bits.is_some() || pasid.is_none_or(|pasid| pasid == Pasid::ZERO)
            }
            Bound::Nothing | Bound::Paging(_) => false,
        },
    }
}
