//! Faults of a guest's table, one by one: what the guest hears of each on the emulated SMMUv3 and on the software host,
//! over the same tables in the same memory.

use std::time::{Duration, Instant};

use pgtable_formats::context::smmuv3::{Cd, CdWord0, CdWord1, CdWord2, Event};
use pgtable_formats::{Access, Fault, Gpa, Iova};
use viommu_device::host::{EndpointCaps, FaultCause, FaultReport, Host, Stream};
use viommu_device::soft::SoftHost;
use viommu_device::{Device, DeviceConfig};
use viommu_host_iommufd::IommufdHost;
use viommu_queue::GuestTables;
use viommu_tests::host_suite::memory::memory;
use viommu_tests::rig::{Bare, Memory, Sends, request};
use viommu_wire::{FaultEvent, Request, Status};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::devices::{Devices, MEMORY, forget_faults, next_fault};
use super::kernel::Kernel;

/// What the tables are about. It leads to the same place of data, whatever the size of the page or block; and in each
/// table its entry is among the first 512. QEMU has stage 2 translate where a table begins, and not where the entry is:
/// it looks for entries of larger tables in the wrong page, unless the host's pages happen to lie one after the other.
const IOVA: u64 = 1 << 37 | 2 << 30 | OFFSET;
/// The place.
const TARGET: u64 = Memory::BASE + OFFSET;
const OFFSET: u64 = 0x5010;

const CD: u64 = Memory::BASE + 0x20_0000;
/// One table a level, 64 KiB from the next.
const TABLES: u64 = Memory::BASE + 0x30_0000;
/// In no region of memory.
const NOWHERE: u64 = 0x1_0000_0000;
const BEYOND_44_BITS: u64 = 1 << 45;

const VALID: u64 = 1;
const TABLE_OR_PAGE: u64 = 1 << 1;
const UNPRIVILEGED: u64 = 1 << 6;
const READ_ONLY: u64 = 1 << 7;
const ACCESSED: u64 = 1 << 10;
const LEAF: u64 = UNPRIVILEGED | 3 << 8 | ACCESSED | 1 << 11;
const TABLE_READ_ONLY: u64 = 1 << 62;
const TABLE_PRIVILEGED: u64 = 1 << 61;

/// What comes of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// It reaches [`TARGET`].
    Reaches,
    /// It faults, and the guest hears of it.
    Told(Event),
    /// It comes to nothing, and the guest does not hear of it.
    Untold,
}

use Seen::{Reaches, Told, Untold};

/// A context descriptor and one entry a level, as hardware of either host finds them.
struct Tables {
    cd: Cd,
    entries: [u64; 4],
    page_lg2: u32,
}

impl Tables {
    /// All in order: 48 bits of address, 44 of output.
    fn new(page_lg2: u32) -> Self {
        let first = if page_lg2 == 16 { 1 } else { 0 };
        let (tg0, tg1) = match page_lg2 {
            12 => (0, 2),
            14 => (2, 1),
            _ => (1, 3),
        };
        let word0 = CdWord0::new()
            .with_t0sz(16)
            .with_t1sz(16)
            .with_tg0(tg0)
            .with_tg1(tg1)
            .with_ir0(1)
            .with_or0(1)
            .with_sh0(3)
            .with_epd1(true)
            .with_valid(true)
            .with_ips(4)
            .with_aa64(true)
            .with_record(true)
            .with_abort(true)
            .with_aset(true)
            .with_asid(7);
        let word1 = CdWord1::new().with_ttb0(table(first) >> 4);
        let mut tables =
            Self { cd: Cd { word0, word1, mair: 0xff, ..Cd::default() }, entries: [0; 4], page_lg2 };
        for level in 0..3 {
            tables.entries[level] = table(level + 1) | TABLE_OR_PAGE | VALID;
        }
        tables.entries[3] = tables.output(3) | LEAF | TABLE_OR_PAGE | VALID;
        tables
    }

    fn shift(&self, level: usize) -> u32 {
        self.page_lg2 + (self.page_lg2 - 3) * (3 - level as u32)
    }

    /// The output address of a leaf that leads to the target.
    fn output(&self, level: usize) -> u64 {
        TARGET >> self.shift(level) << self.shift(level)
    }

    /// A block in place of a table.
    fn block(&mut self, level: usize) {
        self.entries[level] = self.output(level) | LEAF | VALID;
    }

    fn write(&self, memory: &Memory) {
        for (at, word) in (CD..).step_by(8).zip(self.cd.words()) {
            memory.store(Gpa(at), word);
        }
        let empty = vec![0; 4 << 16];
        memory.map().write_slice(&empty, GuestAddress(TABLES)).unwrap();
        for (level, entry) in self.entries.into_iter().enumerate() {
            let index = IOVA >> self.shift(level) & ((1 << (self.page_lg2 - 3)) - 1);
            memory.store(Gpa(table(level) + 8 * index), entry);
        }
    }
}

const fn table(level: usize) -> u64 {
    TABLES + 0x1_0000 * level as u64
}

struct Case {
    what: &'static str,
    page_lg2: u32,
    change: fn(&mut Tables),
    iova: u64,
    soft: Seen,
    lab: Seen,
    /// Why they differ.
    why: &'static str,
}

/// Both say the same.
const fn same(what: &'static str, seen: Seen, change: fn(&mut Tables)) -> Case {
    Case { what, page_lg2: 12, change, iova: IOVA, soft: seen, lab: seen, why: "" }
}

impl Case {
    const fn at(self, iova: u64) -> Self {
        Self { iova, ..self }
    }

    const fn pages(self, page_lg2: u32) -> Self {
        Self { page_lg2, ..self }
    }

    const fn but_the_lab(self, lab: Seen, why: &'static str) -> Self {
        Self { lab, why, ..self }
    }
}

const FAULT_OF_STAGE_2: &str =
    "to the SMMU it is a fault of stage 2, which the kernel does not tell a guest of";
const SAID_TO_BE_OF_STAGE_1: &str = "a fault of stage 2 that QEMU records with S2=0 (IHI 0070, 7.3.13 wants 1), so that the kernel takes it for stage 1";
const BLOCK_TOO_LARGE: &str =
    "QEMU takes what is reserved (DDI 0487, D8.3.1) for a block; its output is no memory, a fault of stage 2";
const ALL_PRIVILEGED: &str = "QEMU takes every access for a privileged one";
const ACCESS_FLAG_FIRST: &str =
    "QEMU looks at the access flag before the output's size (IHI 0070, 7.3.22: after)";
const HAD_NOT_SHOWN: &str =
    "hardware with IDR3.HAD, which a guest may not be shown: to the software host the bit is a reserved one";

/// Every case; the manual's sections are of Arm IHI 0070 (SMMUv3) and DDI 0487 (page tables).
fn cases() -> Vec<Case> {
    vec![
        same("all in order", Reaches, |_| {}),
        same("a block of 2 MiB", Reaches, |t| t.block(2)),
        same("a block of 1 GiB", Reaches, |t| t.block(1)),
        same("a block of 512 GiB", Told(Event::FTranslation), |t| t.block(0))
            .but_the_lab(Untold, BLOCK_TOO_LARGE),
        same("nothing at level 0", Told(Event::FTranslation), |t| t.entries[0] = 0),
        same("nothing at level 1", Told(Event::FTranslation), |t| t.entries[1] = 0),
        same("nothing at level 2", Told(Event::FTranslation), |t| t.entries[2] = 0),
        same("nothing at level 3", Told(Event::FTranslation), |t| t.entries[3] = 0),
        same("an entry that is all ones but valid", Told(Event::FTranslation), |t| t.entries[3] = !VALID),
        same("a block at level 3", Told(Event::FTranslation), |t| t.entries[3] &= !TABLE_OR_PAGE),
        same("a neighbour", Told(Event::FTranslation), |_| {}).at(IOVA + 0x1000),
        same("beyond 48 bits", Told(Event::FTranslation), |_| {}).at(IOVA | 1 << 48),
        same("beyond 39 bits", Told(Event::FTranslation), short).at(IOVA | 1 << 39),
        same("39 bits", Reaches, short),
        same("no walks of the lower half", Told(Event::FTranslation), |t| t.cd.word0.set_epd0(true)),
        same("no walks of the upper half", Told(Event::FTranslation), |_| {}).at(IOVA | 0xffff << 48),
        same("the upper half", Reaches, upper_half).at(IOVA | 0xffff << 48),
        same("nothing in the upper half", Told(Event::FTranslation), |t| {
            upper_half(t);
            t.entries[3] = 0;
        })
        .at(IOVA | 0xffff << 48),
        same("between the halves", Told(Event::FTranslation), upper_half).at(IOVA | 0xfffe << 48),
        same("an ignored top byte", Reaches, |t| t.cd.word0.set_tbi0(true)).at(IOVA | 0xab << 56),
        same("an ignored top byte, nothing there", Told(Event::FTranslation), |t| {
            t.cd.word0.set_tbi0(true);
            t.entries[3] = 0;
        })
        .at(IOVA | 0xab << 56),
        // Permissions.
        same("read-only", Told(Event::FPermission), |t| t.entries[3] |= READ_ONLY),
        same("a read-only block of 2 MiB", Told(Event::FPermission), |t| {
            t.block(2);
            t.entries[2] |= READ_ONLY;
        }),
        same("read-only by level 0", Told(Event::FPermission), |t| t.entries[0] |= TABLE_READ_ONLY),
        same("read-only by level 1", Told(Event::FPermission), |t| t.entries[1] |= TABLE_READ_ONLY),
        same("read-only by level 2", Told(Event::FPermission), |t| t.entries[2] |= TABLE_READ_ONLY),
        same("read-only by level 2, which is not heeded (HAD)", Told(Event::FPermission), |t| {
            t.entries[2] |= TABLE_READ_ONLY;
            t.cd.word1.set_had0(true);
        })
        .but_the_lab(Reaches, HAD_NOT_SHOWN),
        same("for privileged accesses", Told(Event::FPermission), |t| t.entries[3] &= !UNPRIVILEGED)
            .but_the_lab(Reaches, ALL_PRIVILEGED),
        same("for privileged accesses by level 2", Told(Event::FPermission), |t| {
            t.entries[2] |= TABLE_PRIVILEGED;
        })
        .but_the_lab(Reaches, ALL_PRIVILEGED),
        same("not to be executed", Reaches, |t| t.entries[3] |= 3 << 53),
        same("writable is not executable (WXN)", Reaches, |t| t.cd.word0.set_wxn(true)),
        // The access flag.
        same("access flag of a page", Told(Event::FAccess), |t| t.entries[3] &= !ACCESSED),
        same("access flag of 2 MiB", Told(Event::FAccess), |t| {
            t.block(2);
            t.entries[2] &= !ACCESSED;
        }),
        same("access flag of 1 GiB", Told(Event::FAccess), |t| {
            t.block(1);
            t.entries[1] &= !ACCESSED;
        }),
        same("access flag that is not heeded (AFFD)", Reaches, |t| {
            t.cd.word0.set_affd(true);
            t.entries[3] &= !ACCESSED;
        }),
        same("access flag before permission", Told(Event::FAccess), |t| {
            t.entries[3] = t.entries[3] & !ACCESSED | READ_ONLY;
        }),
        // Sizes of addresses.
        same("output beyond 44 bits", Told(Event::FAddrSize), |t| t.entries[3] |= BEYOND_44_BITS),
        same("output beyond IPS", Told(Event::FAddrSize), |t| {
            t.cd.word0.set_ips(0);
            t.entries[3] |= NOWHERE;
        }),
        same("a block beyond IPS", Told(Event::FAddrSize), |t| {
            t.cd.word0.set_ips(0);
            t.block(2);
            t.entries[2] |= NOWHERE;
        }),
        same("table beyond 44 bits, level 1", Told(Event::FAddrSize), |t| t.entries[0] |= BEYOND_44_BITS),
        same("table beyond 44 bits, level 2", Told(Event::FAddrSize), |t| t.entries[1] |= BEYOND_44_BITS),
        same("table beyond IPS, level 3", Told(Event::FAddrSize), |t| {
            t.cd.word0.set_ips(0);
            t.entries[2] |= NOWHERE;
        }),
        same("address size before access flag", Told(Event::FAddrSize), |t| {
            t.entries[3] = (t.entries[3] | BEYOND_44_BITS) & !ACCESSED;
        })
        .but_the_lab(Told(Event::FAccess), ACCESS_FLAG_FIRST),
        // What is no memory.
        same("output that is no memory", Untold, |t| t.entries[3] |= NOWHERE),
        same("table that is no memory, level 1", Told(Event::FWalkEabt), |t| t.entries[0] |= NOWHERE)
            .but_the_lab(Told(Event::FTranslation), SAID_TO_BE_OF_STAGE_1),
        same("table that is no memory, level 3", Told(Event::FWalkEabt), |t| t.entries[2] |= NOWHERE)
            .but_the_lab(Told(Event::FTranslation), SAID_TO_BE_OF_STAGE_1),
        same("root that is no memory", Told(Event::FWalkEabt), |t| t.cd.word1.set_ttb0(NOWHERE >> 4))
            .but_the_lab(Untold, FAULT_OF_STAGE_2),
        // The descriptor.
        same("a descriptor of zeros", Told(Event::CBadCd), |t| t.cd = Cd::default()),
        same("a descriptor that is not valid", Told(Event::CBadCd), |t| t.cd.word0.set_valid(false)),
        same("32-bit tables", Told(Event::CBadCd), |t| t.cd.word0.set_aa64(false)),
        same("a reserved granule", Told(Event::CBadCd), |t| t.cd.word0.set_tg0(3)),
        same("T0SZ too small", Told(Event::CBadCd), |t| t.cd.word0.set_t0sz(15)),
        same("T0SZ too large", Told(Event::CBadCd), |t| t.cd.word0.set_t0sz(40)),
        same("a fault that stalls", Told(Event::CBadCd), |t| t.cd.word0.set_stall(true)),
        same("a fault that does not abort", Told(Event::CBadCd), |t| t.cd.word0.set_abort(false)),
        same("big-endian tables", Told(Event::CBadCd), |t| t.cd.word0.set_endi(true)),
        same("hardware sets the access flag", Told(Event::CBadCd), |t| t.cd.word0.set_ha(true)),
        same("a root beyond IPS", Told(Event::CBadCd), |t| {
            t.cd.word0.set_ips(0);
            t.cd.word1.set_ttb0(NOWHERE >> 4);
        }),
        same("a root beyond 44 bits", Told(Event::CBadCd), |t| t.cd.word1.set_ttb0(BEYOND_44_BITS >> 4)),
        same("IPS of more than the hardware's 44 bits", Reaches, |t| t.cd.word0.set_ips(5)),
        same("faults are not recorded", Untold, |t| {
            t.cd.word0.set_record(false);
            t.entries[3] = 0;
        }),
        // Other granules.
        same("16 KiB", Reaches, |_| {}).pages(14),
        same("16 KiB, a block of 32 MiB", Reaches, |t| t.block(2)).pages(14),
        same("16 KiB, nothing at level 0", Told(Event::FTranslation), |t| t.entries[0] = 0).pages(14),
        same("16 KiB, nothing at level 3", Told(Event::FTranslation), |t| t.entries[3] = 0).pages(14),
        same("16 KiB, a block at level 1", Told(Event::FTranslation), |t| t.block(1))
            .pages(14)
            .but_the_lab(Untold, BLOCK_TOO_LARGE),
        same("16 KiB, read-only", Told(Event::FPermission), |t| t.entries[3] |= READ_ONLY).pages(14),
        same("64 KiB", Reaches, |_| {}).pages(16),
        same("64 KiB, a block of 512 MiB", Reaches, |t| t.block(2)).pages(16),
        same("64 KiB, nothing at level 1", Told(Event::FTranslation), |t| t.entries[1] = 0).pages(16),
        same("64 KiB, nothing at level 3", Told(Event::FTranslation), |t| t.entries[3] = 0).pages(16),
        same("64 KiB, a block at level 1", Told(Event::FTranslation), |t| t.block(1))
            .pages(16)
            .but_the_lab(Untold, BLOCK_TOO_LARGE),
        same("64 KiB, access flag", Told(Event::FAccess), |t| t.entries[3] &= !ACCESSED).pages(16),
    ]
}

fn short(tables: &mut Tables) {
    tables.cd.word0.set_t0sz(25);
    tables.cd.word1.set_ttb0(table(1) >> 4);
}

fn upper_half(tables: &mut Tables) {
    tables.cd.word0.set_epd1(false);
    tables.cd.word0.set_ir1(1);
    tables.cd.word0.set_or1(1);
    tables.cd.word0.set_sh1(3);
    tables.cd.word2 = CdWord2::new().with_ttb1(table(0) >> 4);
}

/// A device over each host.
struct Pair {
    soft: Bare<SoftHost<GuestTables>>,
    lab: Bare<IommufdHost<Kernel>>,
    devices: Devices,
}

impl Pair {
    fn new() -> Self {
        let (devices, host) = Devices::take(["TESTDEV0", "TESTDEV1"], Memory::over(memory(MEMORY)));
        let [endpoint, _] = devices.endpoints;
        let caps = EndpointCaps { reserved: Vec::new(), ..host.caps(endpoint).unwrap().clone() };
        let mut soft = SoftHost::new(devices.guest.tables().clone());
        soft.set_strict(true);
        soft.add_endpoint(endpoint, caps).unwrap();
        let config = DeviceConfig {
            input_range: host.input_range(),
            page_size_mask: host.page_size_mask(),
            ..DeviceConfig::default()
        };
        let soft = Bare::over(config.clone(), None, soft);
        Self { soft, lab: Bare::over(config, None, host), devices }
    }

    fn stream(&self) -> Stream {
        Stream::untagged(self.devices.endpoints[0])
    }

    fn both(&mut self, request: &Request) {
        assert_eq!((self.soft.send(request), self.lab.send(request)), (Status::Ok, Status::Ok));
    }

    /// Writes on both sides. Where they lead.
    fn access(&mut self, iova: u64) -> (Option<u64>, Option<u64>) {
        let stream = self.stream();
        let soft =
            self.soft.device.host_mut().translate(stream, Iova(iova), Access::WRITE, |piece| piece.output.0);
        let soft = soft.ok().filter(|at| self.devices.guest.map().address_in_range(GuestAddress(*at)));
        (soft, self.devices.write(0, iova))
    }

    /// What comes of it on both sides, with the events that the guest gets.
    fn see(&mut self, case: &Case) -> [(Seen, Option<FaultEvent>); 2] {
        forget_faults(self.lab.device.host_mut());
        let (soft, lab) = self.access(case.iova);
        let told = [self.soft.device.host_mut().next_fault(), next_fault(self.lab.device.host_mut())];
        let surplus = [self.soft.device.host_mut().next_fault(), self.lab.device.host_mut().next_fault()];
        assert_eq!(surplus, [None; 2], "{}: one access, one fault", case.what);
        let again = self.access(case.iova);
        assert_eq!(again, (soft, lab), "{}: the same again", case.what);
        let soft_event = told[0].as_ref().and_then(|_| event(&mut self.soft.device));
        let lab_event = told[1].as_ref().and_then(|_| event(&mut self.lab.device));
        let stream = self.stream();
        [
            (seen(case, stream, soft, told[0].as_ref()), soft_event),
            (seen(case, stream, lab, told[1].as_ref()), lab_event),
        ]
    }
}

/// What a guest gets in its buffer, which may be on its way.
fn event<H: Host>(device: &mut Device<H>) -> Option<FaultEvent> {
    let start = Instant::now();
    let mut buffer = [0; 64];
    loop {
        if let Some(length) = device.fill_event(&mut buffer) {
            return match viommu_wire::Event::decode(&buffer[..length]) {
                Some(viommu_wire::Event::Fault(fault)) => Some(fault),
                other => panic!("{other:?}"),
            };
        }
        assert!(start.elapsed() < Duration::from_secs(1), "an event that was there before");
    }
}

fn seen(case: &Case, stream: Stream, reached: Option<u64>, told: Option<&FaultReport>) -> Seen {
    let what = case.what;
    let Some(report) = told else {
        return match reached {
            Some(at) => {
                assert_eq!(at, TARGET, "{what}");
                Reaches
            }
            None => Untold,
        };
    };
    assert_eq!((reached, report.stream), (None, stream), "{what}");
    let FaultCause::Table(Fault::Smmuv3(event)) = report.cause else { panic!("{what}: {report:?}") };
    if report.address.is_some() || !is_of_the_descriptor(event) {
        assert_eq!(report.address, Some(Iova(case.iova)), "{what}");
        assert_eq!((report.kind, report.privileged), (Access::WRITE.kind, false), "{what}");
    }
    Told(event)
}

/// Nothing of the access is in its record (IHI 0070, 7.3.11), while the software host tells all that it knows.
fn is_of_the_descriptor(event: Event) -> bool {
    event == Event::CBadCd
}

/// Whether a guest is told the same.
fn is_same(seen: Seen, soft: Option<FaultEvent>, lab: Option<FaultEvent>) -> bool {
    match (seen, soft, lab) {
        (Told(event), Some(soft), Some(lab)) if is_of_the_descriptor(event) => {
            (soft.reason, soft.endpoint, soft.pasid, None)
                == (lab.reason, lab.endpoint, lab.pasid, lab.address)
        }
        (Told(_), soft, lab) => soft.is_some() && soft == lab,
        _ => soft.is_none() && lab.is_none(),
    }
}

#[test]
#[ignore = "needs the lab: tests/lab/run"]
fn faults_are_the_same_on_both_hosts() {
    let mut pair = Pair::new();
    let endpoint = pair.stream().endpoint;
    let mut wrong = Vec::new();
    for case in cases() {
        let mut tables = Tables::new(case.page_lg2);
        (case.change)(&mut tables);
        tables.write(&pair.devices.guest);
        pair.both(&request::attach_table(1, endpoint.0, request::cd_table(Gpa(CD), 0)));
        let [(soft, soft_event), (lab, lab_event)] = pair.see(&case);
        pair.both(&request::detach(1, endpoint.0));
        let Case { what, why, .. } = case;
        assert_eq!(case.soft == case.lab, why.is_empty(), "{what}: a difference has a reason");
        if (soft, lab) != (case.soft, case.lab) {
            wrong.push(format!(
                "{what}: software {soft:?} and not {:?}, hardware {lab:?} and not {:?}",
                case.soft, case.lab
            ));
        } else if soft == lab && !is_same(soft, soft_event, lab_event) {
            wrong.push(format!("{what}: the guest gets {soft_event:?} and {lab_event:?}"));
        }
        if !why.is_empty() {
            println!("differs: {what}: software {soft:?}, hardware {lab:?}: {why}");
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// So that F_CD_FETCH, which the kernel tells no guest of, cannot be.
#[test]
#[ignore = "needs the lab: tests/lab/run"]
fn descriptors_outside_memory_are_refused_by_both_hosts() {
    let mut pair = Pair::new();
    let endpoint = pair.stream().endpoint;
    let last = pair.devices.guest.last().0;
    for descriptor in [0, NOWHERE, Memory::BASE - 0x40, last + 1] {
        let request = request::attach_table(1, endpoint.0, request::cd_table(Gpa(descriptor), 0));
        let answers = (pair.soft.send(&request), pair.lab.send(&request));
        assert_eq!(answers, (Status::Inval, Status::Inval), "{descriptor:#x}");
    }
    // The last one that lies in it all the same, and that is no descriptor.
    pair.both(&request::attach_table(1, endpoint.0, request::cd_table(Gpa(last - 0x3f), 0)));
    let (soft, lab) = pair.access(IOVA);
    assert_eq!((soft, lab), (None, None));
    pair.both(&request::detach(1, endpoint.0));
}
