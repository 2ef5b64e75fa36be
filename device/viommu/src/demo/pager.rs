//! Who answers for the pages of a process, and what was answered.

use viommu_guest::Driver;
use viommu_guest::hal::{Platform, Transport};
use viommu_guest::sva::{Answer, DemandPaged, FaultHandler, PageGroup};
use viommu_guest::tables::AddressSpace;
use viommu_wire::{AccessFlags, Iova};

/// Memory on demand, with a list of what was granted.
pub(super) struct Pager {
    pub(super) memory: DemandPaged,
    /// Group, address, and whether it was to be written, of each page request that was granted.
    pub(super) served: Vec<(u16, Iova, bool)>,
}

impl Pager {
    pub(super) fn new(memory: DemandPaged) -> Self {
        Self { memory, served: Vec::new() }
    }
}

impl<P: Platform, T: Transport> FaultHandler<P, T> for Pager {
    fn handle(
        &mut self,
        driver: &mut Driver<P, T>,
        space: &mut AddressSpace,
        group: &PageGroup<'_>,
    ) -> Answer {
        let answer = self.memory.handle(driver, space, group);
        if answer == Answer::Success {
            self.served.extend(group.requests.iter().map(|request| {
                (request.group_id, request.address, request.access.contains(AccessFlags::WRITE))
            }));
        }
        answer
    }
}
