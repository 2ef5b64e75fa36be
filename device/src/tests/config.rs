//! Features, configuration space, bypass.

use super::*;
use crate::host::HostError;
use crate::{ConfigError, ConfigWriteError, FeatureError};

fn refused(config: DeviceConfig) -> ConfigError {
    Device::new(config, machine()).unwrap_err()
}

#[test]
fn configurations_that_are_refused() {
    let base = DeviceConfig::default();
    let with = |features| DeviceConfig { features, ..DeviceConfig::default() };
    let all = DeviceConfig::ALL_FEATURES;
    // D-2, D-3
    assert_eq!(refused(with(all | Features::BYPASS)), ConfigError::Features(Features::BYPASS));
    assert_eq!(refused(with(all | Features::VERSION_1)), ConfigError::Features(Features::VERSION_1));
    assert_eq!(refused(DeviceConfig { page_size_mask: 0, ..base.clone() }), ConfigError::NoPageSize); // D-4
    let bypass = DeviceConfig { bypass: true, ..with(all - Features::BYPASS_CONFIG) };
    assert_eq!(refused(bypass), ConfigError::BypassNotOffered); // D-5
    assert_eq!(refused(with(all - Features::INPUT_RANGE)), ConfigError::InputRangeNotOffered);
    let domain_range = DomainRange::new(DomainId(1), DomainId(2)).unwrap();
    let restricted = DeviceConfig { domain_range, ..with(all - Features::DOMAIN_RANGE) };
    assert_eq!(refused(restricted), ConfigError::DomainRangeNotOffered);
    // RESV_MEM 24, HW_ARM_SMMU3 56, PASID_SIZE 8, TABLE_FORMATS 16.
    assert_eq!(
        refused(DeviceConfig { probe_size: 103, ..base.clone() }),
        ConfigError::ProbeSize { endpoint: EndpointId(8), needed: 104, probe_size: 103 }
    );
    assert!(Device::new(DeviceConfig { probe_size: 104, ..base }, machine()).is_ok());
    assert!(Device::new(DeviceConfig { probe_size: 0, ..with(all - Features::PROBE) }, machine()).is_ok());
}

#[test]
fn endpoints_that_are_refused() {
    let region = |kind, first, last| ReservedRegion { kind, range: range(first, last) };
    let new = |reserved| Device::new(DeviceConfig::default(), TestHost::default().with(1, None, reserved));
    let (msi, reserved) = (ReservedKind::Msi, ReservedKind::Reserved);
    let error = new(vec![region(msi, 0, 1), region(msi, 4, 5)]).unwrap_err();
    assert_eq!(error, ConfigError::MsiRegions(EndpointId(1))); // D-52
    let error = new(vec![region(reserved, 4, 9), region(msi, 0, 4)]).unwrap_err();
    let (first, second) = (range(0, 4), range(4, 9));
    assert_eq!(error, ConfigError::ReservedOverlap { endpoint: EndpointId(1), first, second }); // D-53
    assert!(new(vec![region(reserved, 5, 9), region(msi, 0, 4)]).is_ok());
}

#[test]
fn features_are_a_choice_of_the_offer() {
    let features = DeviceConfig::FEATURES - Features::MMIO;
    let mut device = Device::new(DeviceConfig { features, ..DeviceConfig::default() }, machine()).unwrap();
    assert_eq!(device.offered_features(), features);
    assert_eq!(device.features(), Features::empty());
    let transport = Features::VERSION_1 | Features::RING_EVENT_IDX;
    device.accept_features(Features::PROBE | transport).unwrap();
    assert_eq!(device.features(), Features::PROBE);
    assert_eq!(device.accept_features(Features::MMIO), Err(FeatureError(Features::MMIO)));
    assert_eq!(device.features(), Features::PROBE);
}

#[test]
fn reads_of_the_configuration_space() {
    let device = device();
    let mut whole = [0xee; 44];
    device.read_config(0, &mut whole);
    let expected = Config {
        page_size_mask: 0xffff_ffff_ffff_f000,
        input_range: range(0, (1 << 48) - 1),
        domain_range: DomainRange::ALL,
        probe_size: 512,
        bypass: false,
    };
    assert_eq!(whole[..40], expected.encode());
    assert_eq!(whole[40..], [0; 4]);
    for offset in 0..44 {
        for length in 0..=44 - offset {
            let mut part = vec![0xee; length];
            device.read_config(offset, &mut part);
            assert_eq!(part, whole[offset..offset + length]);
        }
    }
    let mut beyond = [0xee; 3];
    device.read_config(usize::MAX, &mut beyond);
    assert_eq!(beyond, [0; 3]);
}

#[test]
fn writes_of_the_configuration_space() {
    let mut device = device();
    let before = observe(&device);
    for (offset, data) in
        [(0, &[0][..]), (35, &[0]), (35, &[0, 1]), (36, &[1, 0]), (37, &[0]), (usize::MAX, &[1])]
    {
        let length = data.len();
        assert_eq!(device.write_config(offset, data), Err(ConfigWriteError::ReadOnly { offset, length }));
    }
    for value in 2..=255 {
        assert_eq!(device.write_config(36, &[value]), Err(ConfigWriteError::Value(value))); // D-7
    }
    device.accept_features(DeviceConfig::FEATURES - Features::BYPASS_CONFIG).unwrap();
    assert_eq!(device.write_config(36, &[1]), Err(ConfigWriteError::NotNegotiated));
    device.accept_features(DeviceConfig::FEATURES).unwrap();
    assert_eq!(observe(&device), before);
    device.write_config(36, &[1]).unwrap();
    assert_ne!(observe(&device), before);
}

#[test]
fn bypass_is_for_unattached_endpoints() {
    let at = |device: &Device<TestHost>, id| device.host.bound_to(Stream::untagged(EndpointId(id)));
    let mut device = device_with(DeviceConfig { bypass: true, ..DeviceConfig::default() });
    device.reset();
    assert_eq!(at(&device, 8), Some("identity"), "D-16 (a): the offer is enough");
    device.accept_features(DeviceConfig::FEATURES).unwrap();
    send(&mut device, &attach(1, 8));
    assert_eq!(at(&device, 8), Some("mapped"));
    send(&mut device, &table(2, 16, page_table(0x4000_0000, 5)));
    assert_eq!(at(&device, 16), None, "attached: not in bypass");
    send(&mut device, &attach_bypass(3, 17));
    device.write_config(36, &[0]).unwrap();
    consistent(&device);
    assert_eq!(at(&device, 8), Some("mapped"));
    assert_eq!(at(&device, 9), None); // D-14
    assert_eq!(at(&device, 17), Some("identity"), "D-16 (b)");
    send(&mut device, &detach(1, 8));
    assert_eq!(at(&device, 8), None);
    device.write_config(36, &[1]).unwrap();
    assert_eq!(at(&device, 8), Some("identity"));
    assert_eq!(at(&device, 16), None);
    send(&mut device, &detach(2, 16));
    assert_eq!(at(&device, 16), Some("identity"));
    consistent(&device);
}

#[test]
fn resets_and_bypass() {
    let mut device = device();
    let bypass = |device: &Device<TestHost>| {
        let mut byte = [0xee];
        device.read_config(36, &mut byte);
        byte[0]
    };
    device.write_config(36, &[1]).unwrap();
    device.reset();
    consistent(&device);
    assert_eq!(bypass(&device), 1); // D-6
    assert_eq!(device.host.live_spaces(), 1);
    device.system_reset();
    consistent(&device);
    assert_eq!(bypass(&device), 0); // D-6
    assert_eq!(device.host.live_spaces(), 0);
}

#[test]
fn a_failed_change_of_bypass_changes_nothing() {
    let mut device = device();
    send(&mut device, &attach(1, 9));
    for bypass in [1, 0] {
        let before = observe(&device);
        let mut failures = 0;
        loop {
            device.host.fails = Fails::At(device.host.calls + failures);
            match device.write_config(36, &[bypass]) {
                Ok(()) => break,
                Err(error) => assert_eq!(error, ConfigWriteError::Host(HostError::Failed(5))),
            }
            assert_eq!(observe(&device), before);
            consistent(&device);
            failures += 1;
        }
        assert!(failures >= 4, "one for each unattached endpoint");
        assert!(!device.needs_reset());
    }
}

#[test]
fn a_host_without_bypass() {
    let mut host = machine();
    host.fails = Fails::Always;
    host.error = Some(HostError::Unsupported);
    let config = DeviceConfig { bypass: true, ..DeviceConfig::default() };
    assert_eq!(Device::new(config, host).unwrap_err(), ConfigError::Host(HostError::Unsupported));
}
