//! The report on the machine that runs the tests, whatever that is.
#![allow(clippy::unwrap_used, reason = "tests")]

mod program;

use program::viommu;
use serde_json::Value;

#[test]
fn every_machine_gets_a_report() {
    let output = viommu(&["host", "--passive"], b"");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    for section in ["\nMachine\n  kernel  ", "  iommufd  ", "  VFIO  ", "  firmware  "] {
        assert!(text.contains(section), "{section:?} is not in\n{text}");
    }
    assert!(text.lines().all(|line| line.trim_end() == line), "{text}");

    let output = viommu(&["host", "--passive", "--json"], b"");
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["schema"], 1);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(document["machine"]["kernel"], kernel.trim());
    let devices = document["summary"]["devices"].as_u64().unwrap();
    assert_eq!(usize::try_from(devices).unwrap(), document["devices"].as_array().unwrap().len());
    let first = text.lines().next().unwrap();
    assert!(devices == 0 || first.contains(&format!("of {devices} devices can be handed over")), "{first}");
}

#[test]
fn devices_that_are_not_there_are_an_error() {
    let cases = [
        ("ffff:ff:1f.7", "there is no PCI device ffff:ff:1f.7"),
        ("eth0", "a PCI function is written like 0000:01:00.0"),
    ];
    for (device, explanation) in cases {
        let output = viommu(&["host", "--passive", "--device", device], b"");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && output.stdout.is_empty(), "{device}");
        assert!(errors.contains(explanation), "{errors}");
    }
}
