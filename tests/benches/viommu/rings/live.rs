//! The mappings that exist, and which ones come and go.

use std::collections::HashSet;

use viommu_tests::rig::request;
use viommu_wire::Request;

use super::DOMAIN;
use super::driver::Driver;
use crate::measure::Random;

pub(crate) const PAGE: u64 = 0x1000;
/// Random addresses are below this page: dense enough for neighbours, sparse enough to be free mostly.
const RANDOM_PAGES: u64 = 1 << 24;

/// Pages of 4 KiB that are mapped.
pub(crate) enum Live {
    /// A window of an address space: new ones follow the last one and the oldest go, as the buffers of a driver whose
    /// allocator counts up.
    Sequential { first: u64, end: u64, random: Random },
    /// New ones and those that go are anywhere.
    Random { pages: Vec<u64>, used: HashSet<u64>, random: Random },
}

impl Live {
    pub(crate) fn sequential() -> Self {
        Self::Sequential { first: 0, end: 0, random: Random(1) }
    }

    pub(crate) fn random() -> Self {
        Self::Random { pages: Vec::new(), used: HashSet::new(), random: Random(2) }
    }

    /// Maps `count` pages.
    pub(crate) fn fill(&mut self, driver: &mut Driver, count: usize) {
        for done in (0..count).step_by(256) {
            let requests = self.add(256.min(count - done));
            driver.send(&requests);
        }
    }

    /// MAPs of `count` pages that are free.
    pub(crate) fn add(&mut self, count: usize) -> Vec<Request> {
        match self {
            Self::Sequential { end, .. } => {
                let start = *end;
                *end += count as u64;
                (start..*end).map(map).collect()
            }
            Self::Random { pages, used, random } => {
                let mut free = || loop {
                    let page = random.below(RANDOM_PAGES);
                    if used.insert(page) {
                        return page;
                    }
                };
                let added: Vec<u64> = (0..count).map(|_| free()).collect();
                pages.extend(&added);
                added.into_iter().map(map).collect()
            }
        }
    }

    /// UNMAPs of `count` pages that are mapped.
    pub(crate) fn take(&mut self, count: usize) -> Vec<Request> {
        match self {
            Self::Sequential { first, .. } => {
                let start = *first;
                *first += count as u64;
                (start..*first).map(unmap).collect()
            }
            Self::Random { pages, used, random } => (0..count)
                .map(|_| {
                    let page = pages.swap_remove(random.below(pages.len() as u64) as usize);
                    used.remove(&page);
                    unmap(page)
                })
                .collect(),
        }
    }

    /// `count` pages in a row anywhere in the window: the MAPs that bring them back, and the first address.
    pub(crate) fn block(&mut self, count: u64) -> (Vec<Request>, u64) {
        let Self::Sequential { first, end, random } = self else { panic!("no blocks") };
        let start = *first + random.below(*end - *first - count);
        ((start..start + count).map(map).collect(), start * PAGE)
    }
}

fn map(page: u64) -> Request {
    let start = page * PAGE;
    // Somewhere else, as memory is: not consecutive.
    let output = (page.wrapping_mul(0x9e37_79b9) & 0xf_ffff) * PAGE;
    request::map(DOMAIN, start, start + (PAGE - 1), output)
}

fn unmap(page: u64) -> Request {
    request::unmap(DOMAIN, page * PAGE, page * PAGE + (PAGE - 1))
}
