//! Running the program, and the bytes of requests, written down apart from the crates under test.
#![allow(dead_code, reason = "each test uses a part")]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

pub(crate) const OK: u8 = 0;
pub(crate) const UNSUPP: u8 = 2;
pub(crate) const INVAL: u8 = 4;
pub(crate) const RANGE: u8 = 5;
pub(crate) const NOENT: u8 = 6;
pub(crate) const NOMEM: u8 = 8;

/// A captured kernel.
pub(crate) fn capture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/captures").join(name)
}

pub(crate) fn smmuv3() -> PathBuf {
    capture("smmuv3-linux-7.3-4k")
}

pub(crate) fn vtd() -> PathBuf {
    capture("vtd-linux-7.3-4level")
}

/// Runs the program with this standard input.
pub(crate) fn viommu(arguments: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_viommu"))
        .args(arguments)
        .env_remove("RUST_LOG")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || {
        // A program that refuses its options does not read.
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!errors.contains("panicked"), "{errors}");
    output
}

/// What the console with these options answers to these lines.
pub(crate) fn answers(options: &[&str], lines: &[u8]) -> Vec<String> {
    let arguments = [&["console"], options].concat();
    let output = viommu(&arguments, lines);
    assert!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

/// A conversation with the console. An answer that ends in `*` stands for all that start so.
pub(crate) fn converse<C: AsRef<str>, A: AsRef<str>>(options: &[&str], exchanges: &[(C, A)]) {
    let lines: String = exchanges.iter().map(|(command, _)| format!("{}\n", command.as_ref())).collect();
    let answers = answers(options, lines.as_bytes());
    for (index, (command, expected)) in exchanges.iter().enumerate() {
        let answer = answers.get(index).map_or("(nothing)", String::as_str);
        let expected = expected.as_ref();
        let agrees = match expected.strip_suffix('*') {
            Some(start) => answer.starts_with(start),
            None => answer == expected,
        };
        assert!(
            agrees,
            "line {}: {}\n  answers: {answer}\n expected: {expected}",
            index + 1,
            command.as_ref()
        );
    }
    assert_eq!(answers.len(), exchanges.len());
}

/// A failure to start with an explanation.
pub(crate) fn refused(options: &[&str], explanation: &str) {
    let output = viommu(&[&["console"], options].concat(), b"features\n");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{options:?}");
    assert!(output.stdout.is_empty());
    assert!(errors.contains(explanation), "{options:?}: {errors}");
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn le32(value: u32) -> String {
    hex(&value.to_le_bytes())
}

pub(crate) fn le64(value: u64) -> String {
    hex(&value.to_le_bytes())
}

pub(crate) fn zeros(bytes: usize) -> String {
    "00".repeat(bytes)
}

/// The answer of a request other than PROBE.
pub(crate) fn status(status: u8) -> String {
    format!("used 4 {status:02x}000000")
}

pub(crate) fn attach(domain: u32, endpoint: u32) -> String {
    format!("req 01000000{}{}{} 4", le32(domain), le32(endpoint), zeros(8))
}

pub(crate) fn attach_bypass(domain: u32, endpoint: u32) -> String {
    format!("req 01000000{}{}{}{} 4", le32(domain), le32(endpoint), le32(1), zeros(4))
}

pub(crate) fn detach(domain: u32, endpoint: u32) -> String {
    format!("req 02000000{}{}{} 4", le32(domain), le32(endpoint), zeros(8))
}

/// Flags: 1 read, 2 write, 4 MMIO.
pub(crate) fn map(domain: u32, first: u64, last: u64, physical: u64, flags: u32) -> String {
    format!("req {} 4", map_bytes(domain, first, last, physical, flags))
}

pub(crate) fn map_bytes(domain: u32, first: u64, last: u64, physical: u64, flags: u32) -> String {
    format!("03000000{}{}{}{}{}", le32(domain), le64(first), le64(last), le64(physical), le32(flags))
}

pub(crate) fn unmap(domain: u32, first: u64, last: u64) -> String {
    format!("req 04000000{}{}{}{} 4", le32(domain), le64(first), le64(last), zeros(4))
}

pub(crate) fn probe(endpoint: u32, writable: usize) -> String {
    format!("req 05000000{}{} {writable}", le32(endpoint), zeros(64))
}

pub(crate) fn attach_smmuv3(domain: u32, endpoint: u32, ste0: u64, ste1: u64) -> String {
    format!(
        "req 06000000{}{}01000000{}{}{} 4",
        le32(domain),
        le32(endpoint),
        le64(ste0),
        le64(ste1),
        zeros(92)
    )
}

pub(crate) fn attach_pasid_table(
    domain: u32,
    endpoint: u32,
    directory: u64,
    untagged: u32,
    directory_lg2: u8,
) -> String {
    format!(
        "req 06000000{}{}81000000{}{}{directory_lg2:02x}{} 4",
        le32(domain),
        le32(endpoint),
        le64(directory),
        le32(untagged),
        zeros(95)
    )
}

pub(crate) fn attach_page_table(domain: u32, endpoint: u32, root: u64, width: u32, pasid: u32) -> String {
    format!(
        "req 06000000{}{}02000000{}{}{}{}{} 4",
        le32(domain),
        le32(endpoint),
        le64(root),
        le64(0),
        le32(width),
        le32(pasid),
        zeros(84)
    )
}

/// A VMSAv8-64 page table for one PASID: T0SZ, granule and the rest of TCR as Linux has them for 48 bits and 4 KiB.
pub(crate) fn attach_arm_page_table(domain: u32, endpoint: u32, root: u64, asid: u16, pasid: u32) -> String {
    // T0SZ 16, IRGN0 and ORGN0 write-back, SH0 inner, EPD1, IPS 48 bits.
    let tcr: u64 = 16 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23 | 5 << 32;
    format!(
        "req 06000000{}{}80000000{}{}0000{}{}{}{}{} 4",
        le32(domain),
        le32(endpoint),
        le32(pasid),
        hex(&asid.to_le_bytes()),
        le64(tcr),
        le64(root),
        le64(0),
        le64(0xff),
        zeros(68)
    )
}

/// The event of a page request, the last one of its group, with PASID and address.
pub(crate) fn page_request(endpoint: u32, access: u32, pasid: u32, address: u64, group: u16) -> String {
    // LAST, PAGE_REQ, ADDRESS, PASID, GROUP_ID.
    let flags = access | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 10;
    format!(
        "used 48 02000000{}{}{}{}{}{}",
        le32(flags),
        le32(endpoint),
        le32(pasid),
        le64(address),
        hex(&group.to_le_bytes()),
        zeros(22)
    )
}

/// Unbinds a PASID: ATTACH_TABLE with format 0.
pub(crate) fn unbind(domain: u32, endpoint: u32, pasid: u32) -> String {
    format!("req 06000000{}{}00000000{}{} 4", le32(domain), le32(endpoint), le32(pasid), zeros(104))
}

/// Everything of a domain.
pub(crate) fn invalidate_domain(domain: u32) -> String {
    format!("req 070000000103{}{}{} 4", "0000", le32(domain), zeros(48))
}

/// Writes one word.
pub(crate) fn word(at: u64, value: u64) -> String {
    format!("mem {at:#x} {}", le64(value))
}
