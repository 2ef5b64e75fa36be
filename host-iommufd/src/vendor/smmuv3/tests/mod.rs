//! Two judges of every word that is made here know nothing of how it is made: one lets pass what the kernel does, one
//! says what a command drops.

mod accepted;
mod coverage;
mod words;

use pgtable_formats::{Iova, IovaRange, Pasid};
use viommu_device::host::{Invalidation, Scope};
use viommu_wire::{Caches, EndpointId};

use super::{Hardware, Plan, Target};

/// The registers of the SMMUv3 that QEMU emulates, as Linux 7.3 passed them on: no PASIDs, no stalls, no ATS, three
/// granules, 16-bit ASIDs, range invalidation.
const EMULATED: [u32; 6] = [0x0d44_101b, 0x0273_0010, 0, 0x1414, 0, 0x74];
/// IDR0.ATS.
const ATS: u32 = 1 << 10;
/// IDR1.SSIDSIZE = 20.
const PASIDS: u32 = 20 << 6;
/// IDR3.RIL.
const RIL: u32 = 1 << 10;

/// The emulated SMMU with what it lacks, two-level tables of descriptors among it.
fn server() -> Hardware {
    hardware(0, |idr| {
        idr[0] |= ATS | 1 << 19;
        idr[1] |= PASIDS;
    })
}

fn hardware(flags: u32, change: impl FnOnce(&mut [u32; 6])) -> Hardware {
    let mut idr = EMULATED;
    change(&mut idr);
    Hardware::new(flags, &idr, 44)
}

fn range(start: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova(start), Iova(last)).unwrap()
}

fn pasid(value: u32) -> Pasid {
    Pasid::new(value).unwrap()
}

/// All translations of `scope`.
fn translations(scope: Scope) -> Invalidation {
    Invalidation {
        endpoint: EndpointId(7),
        scope,
        caches: Caches::TLB,
        leaf: false,
        tag: None,
        global: false,
    }
}

const TARGET: Target = Target { vsid: 7, ats: true, pasids: 20 };
const PLAIN: Target = Target { vsid: 7, ats: false, pasids: 0 };

fn commands(plan: &Plan) -> Vec<Vec<[u64; 2]>> {
    plan.steps().map(|step| step.commands.to_vec()).collect()
}
