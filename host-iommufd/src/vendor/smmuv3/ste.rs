//! Stream table entries, as `iommu_hwpt_arm_smmuv3` takes them.

use pgtable_formats::context::smmuv3::{CdTable, Ste0, Ste1};

const CONFIG_BYPASS: u8 = 4;
const EATS_FULL: u8 = 1;

/// The entry of a stream that bypasses stage 1: V=1, Config=4.
pub const BYPASS: [u64; 2] = [Ste0::new().with_valid(true).with_config(CONFIG_BYPASS).into_bits(), 0];

/// The entry of a stream whose accesses all abort: V=0. No event is recorded of them.
pub const ABORT: [u64; 2] = [0, 0];

/// The entry of a stream that translates through `table`: V=1, Config=5.
///
/// - S1STALLD is set where the SMMU leaves stalling to the guest (`STALL_MODEL = 0`) and the endpoint may not stall.
///   The kernel takes the bit as it is, and a stalled transaction of such a device is never resumed.
/// - EATS is 1 where the guest asks for ATS, `ats` says that SMMU and device have it, and the endpoint may not stall:
///   the physical entry has S2S set for one that may, and full ATS with S2S is illegal (IHI 0070, 5.2).
/// - Nothing else is set than S1Fmt, S1ContextPtr\[51:6\], S1CDMax, S1DSS, S1CIR, S1COR and S1CSH: the kernel refuses
///   any other bit with `EIO`.
pub const fn ste(table: &CdTable, ats: bool, may_stall: bool) -> [u64; 2] {
    let [word0, word1] = table.with_stall(may_stall).words();
    let eats = if table.ats() && ats && !may_stall { EATS_FULL } else { 0 };
    [word0, Ste1::from_bits(word1).with_eats(eats).into_bits()]
}
