//! Tables written word by word at the console, bound and walked.
#![allow(clippy::unwrap_used, reason = "a test may stop")]

mod program;

use program::*;

const CD: u64 = 0x4000_1000;
const L0: u64 = 0x4000_2000;
const L1: u64 = 0x4000_3000;
const L2: u64 = 0x4000_4000;
const L3: u64 = 0x4000_5000;
/// Valid, inner shareable, accessible, user read and write.
const PAGE: u64 = 0x743;
const TABLE: u64 = 0x3;

const DIRECTORY: u64 = 0x4001_0000;
const PASIDS: u64 = 0x4001_1000;
const PML4: u64 = 0x4001_2000;
const PDPT: u64 = 0x4001_3000;
const PD: u64 = 0x4001_4000;
const PT: u64 = 0x4001_5000;
/// Present, writable, user, accessed, dirty.
const X86: u64 = 0x67;

/// First word of a context descriptor: T0SZ 16, EPD1, V, IPS 48 bits, AA64, R, A, ASID.
fn cd(asid: u64) -> u64 {
    16 | 1 << 30 | 1 << 31 | 5 << 32 | 1 << 41 | 1 << 45 | 1 << 46 | asid << 48
}

type Exchange = (String, String);

fn set(at: u64, value: u64) -> Exchange {
    (word(at, value), "ok".into())
}

/// A linear table whose substream 0 and 5 map 0x1000 to 0x40100000.
fn smmuv3_tables() -> Vec<Exchange> {
    vec![
        set(CD, cd(1)),
        set(CD + 8, L0),
        set(CD + 5 * 64, cd(6)),
        set(CD + 5 * 64 + 8, L0),
        set(L0, L1 | TABLE),
        set(L1, L2 | TABLE),
        set(L2, L3 | TABLE),
        set(L3 + 8, 0x4010_0000 | PAGE),
    ]
}

/// Linear, 3 bits of substream, untagged DMA through CD 0.
fn attach_cds() -> Exchange {
    (attach_smmuv3(1, 8, CD | 3 << 59, 2), status(OK))
}

fn vtd_tables() -> Vec<Exchange> {
    vec![
        set(DIRECTORY, PASIDS | 1),
        set(PASIDS, 1 | 1 << 6),
        set(PASIDS + 16, PML4),
        set(PASIDS + 5 * 64, 1 | 1 << 6),
        set(PASIDS + 5 * 64 + 16, PML4),
        set(PML4, PDPT | X86),
        set(PDPT, PD | X86),
        set(PD, PT | X86),
        set(PT + 8, 0x4010_0000 | X86),
    ]
}

fn attach_directory() -> Exchange {
    (attach_pasid_table(1, 16, DIRECTORY, 0, 7), status(OK))
}

fn check(options: &[&str], parts: &[Vec<Exchange>]) {
    converse(options, &parts.concat());
}

fn says(command: &str, answer: &str) -> Exchange {
    (command.into(), answer.into())
}

#[test]
fn smmuv3_tables_are_walked_and_stale_until_invalidated() {
    check(
        &[],
        &[
            smmuv3_tables(),
            vec![
                attach_cds(),
                says("dma 8 - 0x1ffc 4 w", "ok 0x40100ffc"),
                says("dma 8 5 0x1000 4 r", "ok 0x40100000"),
                says("dma 8 1 0x1000 4 r", "fault C_BAD_CD"),
                says("dma 8 8 0x1000 4 r", "fault C_BAD_SUBSTREAMID"),
                says("dma 8 - 0x2000 4 r", "fault F_TRANSLATION"),
                says("dma 8 - 0xffff000000000000 4 r", "fault F_TRANSLATION"),
                // The guest changes the page; what is cached stays until it says so.
                set(L3 + 8, 0x4020_0000 | PAGE),
                says("dma 8 - 0x1000 4 r", "ok 0x40100000"),
                (invalidate_domain(1), status(OK)),
                says("dma 8 - 0x1000 4 r", "ok 0x40200000"),
                // Read-only (AP bit 7).
                set(L3 + 8, 0x4020_0000 | PAGE | 0x80),
                (invalidate_domain(1), status(OK)),
                says("dma 8 - 0x1000 4 w", "fault F_PERMISSION"),
                says("dma 8 - 0x1000 4 r", "ok 0x40200000"),
                says("reset", "ok"),
                says("dma 8 - 0x1000 4 r", "fault unattached"),
            ],
        ],
    );
}

#[test]
fn strict_shows_every_change() {
    check(
        &["--strict"],
        &[
            smmuv3_tables(),
            vec![
                attach_cds(),
                says("dma 8 - 0x1000 4 r", "ok 0x40100000"),
                set(L3 + 8, 0x4020_0000 | PAGE),
                says("dma 8 - 0x1000 4 r", "ok 0x40200000"),
                set(CD, 0),
                says("dma 8 - 0x1000 4 r", "fault C_BAD_CD"),
            ],
        ],
    );
}

#[test]
fn vtd_tables_are_walked() {
    check(
        &[],
        &[
            vtd_tables(),
            vec![
                attach_directory(),
                says("dma 16 - 0x1ffc 4 w", "ok 0x40100ffc"),
                says("dma 16 5 0x1000 4 r", "ok 0x40100000"),
                says("dma 16 - 0x2000 4 r", "fault 0x71"),
                says("dma 16 - 0x800000000000 4 r", "fault 0x80"),
                says("dma 16 1 0x1000 4 r", "fault 0x59"),
                says("dma 16 64 0x1000 4 r", "fault 0x51"),
                says("dma 16 8192 0x1000 4 r", "fault 0x46"),
                set(PT + 8, 0x4010_0000 | X86 & !2),
                (invalidate_domain(1), status(OK)),
                says("dma 16 - 0x1000 4 w", "fault 0x85"),
                set(PT + 8, 0x4010_0000 | X86 & !4),
                (invalidate_domain(1), status(OK)),
                says("dma 16 - 0x1000 4 r", "fault 0x81"),
                // PS is reserved in the root.
                set(PML4, PDPT | X86 | 0x80),
                (invalidate_domain(1), status(OK)),
                says("dma 16 - 0x1000 4 r", "fault 0x72"),
            ],
        ],
    );
}

#[test]
fn a_page_table_is_bound_for_one_pasid() {
    check(
        &[],
        &[
            vtd_tables(),
            vec![
                (attach_page_table(1, 16, PML4, 48, 9), status(OK)),
                says("dma 16 9 0x1000 4 r", "ok 0x40100000"),
                says("dma 16 - 0x1000 4 r", "fault unattached"),
                (attach_page_table(1, 16, PML4, 48, 0), status(OK)),
                says("dma 16 - 0x1000 4 r", "ok 0x40100000"),
                // Format 0 takes one back.
                (unbind(1, 16, 9), status(OK)),
                says("dma 16 9 0x1000 4 r", "fault unattached"),
                says("dma 16 - 0x1000 4 r", "ok 0x40100000"),
                (unbind(1, 16, 9), status(NOENT)),
            ],
        ],
    );
}

#[test]
fn an_arm_page_table_is_bound_for_one_pasid() {
    check(
        &[],
        &[
            smmuv3_tables(),
            vec![
                (attach_arm_page_table(1, 8, L0, 6, 5), status(OK)),
                says("dma 8 5 0x1ffc 4 w", "ok 0x40100ffc"),
                says("dma 8 5 0x2000 4 r", "fault F_TRANSLATION"),
                says("dma 8 - 0x1000 4 r", "fault unattached"),
                says("dma 8 4 0x1000 4 r", "fault unattached"),
                // PASID 0 is untagged DMA.
                (attach_arm_page_table(1, 8, L0, 7, 0), status(OK)),
                says("dma 8 - 0x1000 4 r", "ok 0x40100000"),
                (attach_arm_page_table(1, 8, L0 + 8, 8, 6), status(INVAL)),
                (attach_arm_page_table(1, 8, 0x5000_0000, 8, 6), status(INVAL)),
                (attach_arm_page_table(1, 16, L0, 8, 6), status(UNSUPP)),
                // Stale until invalidated.
                says("dma 8 5 0x1000 4 r", "ok 0x40100000"),
                set(L3 + 8, 0x4020_0000 | PAGE),
                says("dma 8 5 0x1000 4 r", "ok 0x40100000"),
                (invalidate_domain(1), status(OK)),
                says("dma 8 5 0x1000 4 r", "ok 0x40200000"),
                (unbind(1, 8, 5), status(OK)),
                says("dma 8 5 0x1000 4 r", "fault unattached"),
                says("dma 8 - 0x1000 4 r", "ok 0x40200000"),
            ],
        ],
    );
}

const READ: u32 = 1;
const WRITE: u32 = 2;

#[test]
fn accesses_wait_for_pages_until_the_driver_has_answered() {
    check(
        &["--page-requests", "8"],
        &[
            smmuv3_tables(),
            vec![
                (attach_arm_page_table(1, 8, L0, 6, 5), status(OK)),
                says("dma 8 5 0x1000 4 w wait", "ok 0x40100000"),
                // Two pages of one access, one after the other.
                says("dma 8 5 0x1ff0 0x2010 w wait", "waits 1"),
                says("dma 8 5 0x9000 4 r wait", "waits 2"),
                says("waiting", "1 8 5 0x1ff0 8208 w 0, 2 8 5 0x9000 4 r 1"),
                // Not told yet.
                (("respond 8 5 0 success").into(), status(NOENT)),
                ("event 48".into(), page_request(8, WRITE, 5, 0x2000, 0)),
                ("event 48".into(), page_request(8, READ, 5, 0x9000, 1)),
                says("event 48", "none"),
                says("again 1", "waits 1"),
                set(L3 + 16, 0x4010_1000 | PAGE),
                ("respond 8 5 0 success".into(), status(OK)),
                says("again 1", "waits 1"),
                ("event 48".into(), page_request(8, WRITE, 5, 0x3000, 2)),
                set(L3 + 24, 0x4030_0000 | PAGE),
                // Another PASID's group of that number is another group.
                ("respond 8 6 2 success".into(), status(NOENT)),
                ("respond 8 - 2 success".into(), status(NOENT)),
                ("respond 8 5 2 success".into(), status(OK)),
                ("respond 8 5 2 success".into(), status(NOENT)),
                says("again 1", "ok 0x40100ff0 0x40300000"),
                ("respond 8 5 1 invalid".into(), status(OK)),
                says("again 2", "failed"),
                says("waiting", "none"),
                // Without `wait` it is a device that cannot.
                says("dma 8 5 0x9000 4 r", "fault F_TRANSLATION"),
                says("dma 9 5 0x9000 4 r wait", "fault unattached"),
            ],
        ],
    );
}

#[test]
fn unbinding_time_and_small_buffers_end_a_wait() {
    check(
        &[
            "--page-requests",
            "8",
            "--page-request-timeout",
            "1000",
            "--limit",
            "max_page_requests_per_endpoint=2",
        ],
        &[
            smmuv3_tables(),
            vec![
                (attach_arm_page_table(1, 8, L0, 6, 5), status(OK)),
                (attach_arm_page_table(1, 8, L0, 7, 6), status(OK)),
                says("time 5000", "due never"),
                says("dma 8 5 0x2000 4 r wait", "waits 1"),
                says("dma 8 6 0x2000 4 w wait", "waits 2"),
                ("event 48".into(), page_request(8, READ, 5, 0x2000, 0)),
                // Beyond the bound of the endpoint: refused at once, when the device looks.
                says("dma 8 6 0x3000 4 w wait", "waits 3"),
                says("event 24", "used 0 000000000000000000000000000000000000000000000000"),
                says("again 2", "failed"),
                says("time 5999", "due 6999"),
                says("again 1", "waits 1"),
                says("time 6999", "due never"),
                says("again 1", "failed"),
                says("again 3", "failed"),
                says("dma 8 5 0x2000 4 r wait", "waits 4"),
                says("dma 8 6 0x2000 4 r wait", "waits 5"),
                (unbind(1, 8, 5), status(OK)),
                says("again 4", "failed"),
                says("again 5", "waits 5"),
                says("waiting", "5 8 6 0x2000 4 r 4"),
                ("event 48".into(), page_request(8, READ, 6, 0x2000, 4)),
                (detach(1, 8), status(OK)),
                says("again 5", "failed"),
                ("respond 8 6 4 success".into(), status(NOENT)),
                says("dma 8 6 0x2000 4 r wait", "fault unattached"),
            ],
        ],
    );
}

#[test]
fn tables_that_refer_to_themselves_come_to_an_end() {
    check(
        &[],
        &[
            vec![
                set(CD, cd(1)),
                set(CD + 8, L0),
                attach_cds(),
                // As a page, without the access flag, and with it.
                set(L0, L0 | TABLE),
                says("dma 8 - 0 4 r", "fault F_ACCESS"),
                set(L0, L0 | PAGE),
                says("dma 8 - 0xabc 4 r", "ok 0x40002abc"),
                says("dma 8 - 0x1000 4 r", "fault F_TRANSLATION"),
                // A first-level CD table that is its own leaf.
                set(CD, CD | 1),
                (attach_smmuv3(1, 8, CD | 1 << 4 | 10 << 59, 2), status(OK)),
                says("dma 8 - 0xabc 4 r", "fault C_BAD_CD"),
            ],
            vec![
                set(PML4, PML4 | X86),
                set(DIRECTORY, PASIDS | 1),
                set(PASIDS, 1 | 1 << 6),
                set(PASIDS + 16, PML4),
                (attach_pasid_table(2, 16, DIRECTORY, 0, 7), status(OK)),
                says("dma 16 - 0xabc 4 r", "ok 0x40012abc"),
                says("dma 16 - 0x1000 4 r", "fault 0x71"),
                set(DIRECTORY, DIRECTORY | 1),
                (invalidate_domain(2), status(OK)),
                says("dma 16 - 0xabc 4 r", "fault 0x5b"),
            ],
        ],
    );
}

#[test]
fn pointers_inside_tables_that_leave_memory_fault_when_used() {
    check(
        &[],
        &[
            smmuv3_tables(),
            vtd_tables(),
            vec![
                attach_cds(),
                set(L1, 0x6000_0000 | TABLE),
                says("dma 8 - 0x1000 4 r", "fault F_WALK_EABT"),
                set(CD, CD | 1),
                set(CD + 8, 0x6000_0000 | 1),
                (attach_smmuv3(1, 8, CD | 1 << 4 | 10 << 59, 2), status(OK)),
                says("dma 8 64 0x1000 4 r", "fault F_CD_FETCH"),
                (attach_pasid_table(2, 16, DIRECTORY, 0, 7), status(OK)),
                set(PDPT, 0x6000_0000 | X86),
                says("dma 16 - 0x1000 4 r", "fault 0x70"),
                set(PASIDS + 16, 0x6000_0000),
                (invalidate_domain(2), status(OK)),
                says("dma 16 - 0x1000 4 r", "fault 0x73"),
                set(DIRECTORY, 0x6000_0001),
                (invalidate_domain(2), status(OK)),
                says("dma 16 - 0x1000 4 r", "fault 0x58"),
            ],
        ],
    );
}

#[test]
fn what_the_request_shows_to_be_wrong_is_not_bound() {
    let smmu = |ste0: u64, ste1: u64, result| (attach_smmuv3(1, 8, ste0, ste1), status(result));
    let vtd = |directory: u64, untagged, lg2, result| {
        (attach_pasid_table(2, 16, directory, untagged, lg2), status(result))
    };
    let unharmed =
        || vec![says("dma 8 - 0x1000 4 r", "ok 0x40100000"), says("dma 16 - 0x1000 4 r", "ok 0x40100000")];
    let wrong = [
        // Outside memory: below, above, and beginning or ending there.
        smmu(0, 2, INVAL),
        smmu(0x3fff_ffc0, 2, INVAL),
        smmu(0x5000_0000, 2, INVAL),
        smmu(0xf_ffff_ffff_ffc0, 2, INVAL),
        smmu(0x4fff_ffc0 | 1 << 59, 2, INVAL),
        // There is no table format 3; 21 PASID bits do not, either.
        smmu(CD | 3 << 4 | 10 << 59, 2, INVAL),
        smmu(CD | 21 << 59, 2, UNSUPP),
        smmu(CD | 31 << 59, 2, UNSUPP),
        // Reserved bytes, before and behind the words.
        (
            format!("req 06000000{}{}01000001{}{}{} 4", le32(1), le32(8), le64(CD), le64(2), zeros(92)),
            status(INVAL),
        ),
        (
            format!("req 06000000{}{}01000000{}{}01{} 4", le32(1), le32(8), le64(CD), le64(2), zeros(91)),
            status(INVAL),
        ),
        vtd(0x3fff_f000, 0, 7, INVAL),
        vtd(0x5000_0000, 0, 7, INVAL),
        vtd(0x4fff_f000, 0, 14, INVAL),
        vtd(DIRECTORY + 8, 0, 7, INVAL),
        vtd(DIRECTORY, 0, 6, INVAL),
        vtd(DIRECTORY, 0, 15, INVAL),
        vtd(DIRECTORY, 1 << 13, 7, INVAL),
        vtd(DIRECTORY, 1 << 20, 14, UNSUPP),
        (attach_page_table(2, 16, 0x5000_0000, 48, 1), status(INVAL)),
        (attach_page_table(2, 16, PML4 + 8, 48, 1), status(INVAL)),
        (attach_page_table(2, 16, PML4, 50, 1), status(INVAL)),
        (attach_page_table(2, 16, PML4, 48, 1 << 20), status(UNSUPP)),
        // Formats that the endpoint's hardware does not have, or nobody knows.
        (attach_smmuv3(2, 16, CD, 2), status(UNSUPP)),
        (attach_pasid_table(1, 8, DIRECTORY, 0, 7), status(UNSUPP)),
        (attach_page_table(1, 8, PML4, 48, 1), status(UNSUPP)),
        (format!("req 06000000{}{}33{} 4", le32(1), le32(8), zeros(111)), status(UNSUPP)),
        (format!("req 06000000{}{}80{} 4", le32(2), le32(16), zeros(111)), status(UNSUPP)),
        // A page table for one PASID, of nothing but zeros.
        (format!("req 06000000{}{}80{} 4", le32(1), le32(8), zeros(111)), status(INVAL)),
        // Mappings have no place in a domain of tables.
        (map(1, 0x1000, 0x1fff, 0, 3), status(INVAL)),
        (unmap(1, 0x1000, 0x1fff), status(INVAL)),
        (attach(1, 9), status(INVAL)),
        (attach(1, 8), status(INVAL)),
    ];
    let mut parts = vec![
        smmuv3_tables(),
        vtd_tables(),
        vec![attach_cds(), (attach_pasid_table(2, 16, DIRECTORY, 0, 7), status(OK))],
        unharmed(),
    ];
    for exchange in wrong {
        parts.push(vec![exchange]);
        parts.push(unharmed());
    }
    check(&[], &parts);
}

#[test]
fn invalidations_that_make_no_sense_are_refused() {
    // Scope, caches, flags, domain, pasid, id, address, number of pages, page size, reserved.
    let request = |scope: u8, caches: u8, flags: u16, domain: u32, pages: u64, size: u8, reserved: u8| {
        let flags = hex(&flags.to_le_bytes());
        format!(
            "req 07000000{scope:02x}{caches:02x}{flags}{}{}{}{}{}{size:02x}{}{reserved:02x} 4",
            le32(domain),
            le32(0),
            le64(0),
            le64(0x1000),
            le64(pages),
            zeros(18)
        )
    };
    check(
        &[],
        &[
            smmuv3_tables(),
            vec![
                attach_cds(),
                (request(3, 2, 0, 1, 1, 12, 0), status(OK)),
                (request(2, 3, 2, 1, 0, 0, 0), status(OK)),
                (request(0, 3, 0, 1, 1, 12, 0), status(INVAL)),
                (request(4, 3, 0, 1, 1, 12, 0), status(INVAL)),
                (request(1, 0, 0, 1, 1, 12, 0), status(INVAL)),
                (request(1, 4, 0, 1, 1, 12, 0), status(INVAL)),
                (request(1, 3, 16, 1, 1, 12, 0), status(INVAL)),
                (request(3, 2, 0, 1, 0, 12, 0), status(INVAL)),
                (request(3, 2, 0, 1, 1, 64, 0), status(INVAL)),
                (request(3, 2, 0, 1, u64::MAX, 12, 0), status(INVAL)),
                (request(1, 3, 0, 1, 0, 0, 1), status(INVAL)),
                (request(1, 3, 0, 2, 0, 0, 0), status(NOENT)),
                says("dma 8 - 0x1000 4 r", "ok 0x40100000"),
            ],
        ],
    );
}
