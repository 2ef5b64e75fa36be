//! Feature bits, configuration space, resets: D-1 to D-8.

use viommu_device::host::HostError;
use viommu_device::{ConfigError, ConfigWriteError, DeviceConfig, Features};
use viommu_tests::rig::{Bare, Call, Flaky, Machine, Rig, Sends, Setup, request};
use viommu_wire::{Config, DomainRange, IovaRange, Status};

fn refused(config: DeviceConfig) -> ConfigError {
    let (host, _) = Flaky::new(&Setup::default());
    viommu_device::Device::new(config, host).unwrap_err()
}

fn read(machine: &Machine) -> Config {
    let mut bytes = [0xee; Config::LEN];
    machine.lock().device().read_config(0, &mut bytes);
    Config::decode(&bytes).unwrap()
}

fn read_bypass(machine: &Machine) -> u8 {
    let mut byte = [0xee];
    machine.lock().device().read_config(Config::BYPASS_OFFSET, &mut byte);
    byte[0]
}

fn write_bypass(machine: &Machine, value: u8) -> Result<(), ConfigWriteError> {
    machine.lock().device_mut().write_config(Config::BYPASS_OFFSET, &[value])
}

fn with_bypass(bypass: bool) -> Setup {
    Setup { config: DeviceConfig { bypass, ..DeviceConfig::default() }, ..Setup::default() }
}

#[test]
fn d1_map_unmap_is_offered() {
    assert!(DeviceConfig::default().features.contains(Features::MAP_UNMAP));
    let rig = Rig::new(Setup::default());
    assert!(rig.machine.lock().offered_features().contains(Features::MAP_UNMAP | Features::VERSION_1));
}

#[test]
fn d1_a_device_that_does_not_offer_map_unmap_says_unsupp() {
    let mut rig = Rig::new(Setup::offering(DeviceConfig::FEATURES - Features::MAP_UNMAP));
    assert_eq!(rig.send(&request::attach(1, 8)), Status::Ok);
    assert_eq!(rig.send(&request::map(1, 0, 0xfff, 0)), Status::Unsupp);
    assert_eq!(rig.send(&request::unmap(1, 0, 0xfff)), Status::Unsupp);
}

#[test]
fn d2_the_old_bypass_feature_is_never_offered() {
    assert!(!DeviceConfig::FEATURES.contains(Features::BYPASS));
    let features = Features::BYPASS | Features::MAP_UNMAP;
    let config = DeviceConfig { features, ..DeviceConfig::default() };
    assert_eq!(refused(config), ConfigError::Features(Features::BYPASS));
}

#[test]
fn d3_bypass_and_bypass_config_are_never_offered_together() {
    let config =
        DeviceConfig { features: DeviceConfig::FEATURES | Features::BYPASS, ..DeviceConfig::default() };
    assert_eq!(refused(config), ConfigError::Features(Features::BYPASS));
}

#[test]
fn d4_there_is_a_page_size() {
    let config = DeviceConfig { page_size_mask: 0, ..DeviceConfig::default() };
    assert_eq!(refused(config), ConfigError::NoPageSize);
    for page_size_mask in [1, 0x1000, 0x4000_0000, 0x4020_1000, 1 << 63, u64::MAX] {
        let config = DeviceConfig { page_size_mask, ..DeviceConfig::default() };
        let rig = Rig::new(Setup { config, ..Setup::default() });
        assert_eq!(read(&rig.machine).page_size_mask, page_size_mask);
    }
}

#[test]
fn d4_the_lowest_bit_is_the_granule_of_map() {
    for granule_lg2 in [0, 12, 14, 16, 30] {
        let page_size_mask = 1 << granule_lg2 | 1 << 40;
        let config = DeviceConfig { page_size_mask, ..DeviceConfig::default() };
        let mut rig = Rig::new(Setup { config, ..Setup::default() });
        let size = 1 << granule_lg2;
        assert_eq!(rig.send(&request::attach(1, 16)), Status::Ok);
        assert_eq!(rig.send(&request::map(1, size, 2 * size - 1, 4 * size)), Status::Ok, "{granule_lg2}");
        assert_eq!(rig.machine.write(16, size), Some(4 * size));
        if granule_lg2 > 0 {
            let status = rig.send(&request::map(1, 2 * size, 2 * size + size / 2 - 1, 0));
            assert_eq!(status, Status::Range, "{granule_lg2}");
        }
    }
}

#[test]
fn d5_bypass_may_start_as_1() {
    let rig = Rig::new(with_bypass(true));
    assert_eq!(read_bypass(&rig.machine), 1);
    assert_eq!(rig.machine.write(8, 0x1234), Some(0x1234));
    assert_eq!(read_bypass(&Rig::new(with_bypass(false)).machine), 0);
}

#[test]
fn d5_bypass_cannot_start_as_1_where_the_field_does_not_exist() {
    let features = DeviceConfig::FEATURES - Features::BYPASS_CONFIG;
    assert_eq!(
        refused(DeviceConfig { features, bypass: true, ..DeviceConfig::default() }),
        ConfigError::BypassNotOffered
    );
}

#[test]
fn d6_device_reset_keeps_bypass() {
    for start in [false, true] {
        let rig = Rig::new(with_bypass(start));
        let changed = u8::from(!start);
        write_bypass(&rig.machine, changed).unwrap();
        let rig = rig.restart(None);
        assert_eq!(read_bypass(&rig.machine), changed);
        assert_eq!(rig.machine.read(8, 0x1000), (!start).then_some(0x1000));
    }
}

#[test]
fn d6_system_reset_restores_bypass() {
    for start in [false, true] {
        let mut rig = Rig::new(with_bypass(start));
        write_bypass(&rig.machine, u8::from(!start)).unwrap();
        assert_eq!(rig.send(&request::attach(1, 9)), Status::Ok);
        rig.machine.lock().system_reset();
        assert_eq!(read_bypass(&rig.machine), u8::from(start));
        for endpoint in [8, 9] {
            assert_eq!(rig.machine.read(endpoint, 0x1000), start.then_some(0x1000));
        }
    }
}

#[test]
fn d7_bypass_is_0_or_1_whatever_is_written() {
    let mut rig = Rig::new(with_bypass(false));
    for value in 2..=u8::MAX {
        assert_eq!(write_bypass(&rig.machine, value), Err(ConfigWriteError::Value(value)));
        assert_eq!(read_bypass(&rig.machine), 0);
    }
    assert_eq!(write_bypass(&rig.machine, 1), Ok(()));
    for value in 2..=u8::MAX {
        assert!(write_bypass(&rig.machine, value).is_err());
        assert_eq!(read_bypass(&rig.machine), 1);
    }
    assert_eq!(rig.machine.read(8, 0x1000), Some(0x1000));
    assert_eq!(write_bypass(&rig.machine, 0), Ok(()));
    assert_eq!((read_bypass(&rig.machine), rig.machine.read(8, 0x1000)), (0, None));
    rig.works();
}

#[test]
fn d7_nothing_else_of_the_configuration_can_be_written() {
    let rig = Rig::new(Setup::default());
    let before = rig.machine.snapshot();
    for offset in (0..48).filter(|&offset| offset != Config::BYPASS_OFFSET) {
        let write = rig.machine.lock().device_mut().write_config(offset, &[1]);
        assert_eq!(write, Err(ConfigWriteError::ReadOnly { offset, length: 1 }));
    }
    for (offset, length) in [(0, 8), (32, 8), (36, 2), (36, 4), (35, 2), (usize::MAX, 4)] {
        let write = rig.machine.lock().device_mut().write_config(offset, &vec![1; length]);
        assert_eq!(write, Err(ConfigWriteError::ReadOnly { offset, length }));
    }
    assert_eq!(rig.machine.snapshot(), before);
}

#[test]
fn d7_bypass_is_not_written_before_it_is_negotiated() {
    let rig = Rig::new(Setup::accepting(DeviceConfig::FEATURES - Features::BYPASS_CONFIG));
    assert_eq!(write_bypass(&rig.machine, 1), Err(ConfigWriteError::NotNegotiated));
    assert_eq!((read_bypass(&rig.machine), rig.machine.read(8, 0x1000)), (0, None));
}

#[test]
fn d7_a_write_that_the_host_fails_changes_nothing() {
    let setup = Setup::default();
    let (host, _) = Flaky::new(&setup);
    let mut bare = Bare::over(setup.config, None, host);
    let error = HostError::Failed(5);
    // The second endpoint fails: the first is put back.
    bare.device.host_mut().script = [(Call::Bind, None), (Call::Bind, Some(error))].into();
    let write = bare.device.write_config(Config::BYPASS_OFFSET, &[1]);
    assert_eq!(write, Err(ConfigWriteError::Host(error)));
    let mut byte = [0xee];
    bare.device.read_config(Config::BYPASS_OFFSET, &mut byte);
    assert_eq!(byte, [0]);
    assert!(!bare.device.needs_reset());
    let stream = viommu_device::host::Stream::untagged(viommu_wire::EndpointId(8));
    let access = pgtable_formats::Access::READ;
    assert!(bare.device.host_mut().inner.peek(stream, viommu_wire::Iova(0), access).is_err());
    assert_eq!(bare.device.write_config(Config::BYPASS_OFFSET, &[1]), Ok(()));
    assert!(bare.device.host_mut().inner.peek(stream, viommu_wire::Iova(0), access).is_ok());
}

#[test]
fn d8_device_reset_detaches_every_endpoint() {
    let mut rig = Rig::new(Setup::default());
    for (domain, endpoint) in [(1, 8), (1, 9), (2, 16)] {
        assert_eq!(rig.send(&request::attach(domain, endpoint)), Status::Ok);
    }
    assert_eq!(rig.send(&request::attach_bypass(3, 17)), Status::Ok);
    assert_eq!(rig.send(&request::map(1, 0x1000, 0x1fff, 0x5000)), Status::Ok);
    assert_eq!((rig.machine.read(9, 0x1000), rig.machine.read(17, 0x1000)), (Some(0x5000), Some(0x1000)));

    let mut rig = rig.restart(None);
    for endpoint in [8, 9, 16, 17] {
        assert_eq!(rig.machine.read(endpoint, 0x1000), None);
    }
    {
        let iommu = rig.machine.lock();
        assert_eq!((iommu.device().domain_count(), iommu.device().mapping_count()), (0, 0));
    }
    assert_eq!(rig.send(&request::unmap(1, 0x1000, 0x1fff)), Status::NoEnt);
    assert_eq!(rig.send(&request::detach(2, 16)), Status::Inval);
    // The IDs are free, for any kind of domain.
    assert_eq!(rig.send(&request::attach_bypass(1, 8)), Status::Ok);
    rig.works();
}

#[test]
fn d8_device_reset_forgets_features_and_events() {
    let mut rig = Rig::new(Setup::default());
    assert!(rig.machine.access(8, None, 0x1000, pgtable_formats::AccessKind::Read).is_err());
    assert!(rig.machine.lock().device_mut().event_pending());
    rig.machine.lock().reset();
    assert!(!rig.machine.lock().device_mut().event_pending());
    assert_eq!(rig.machine.lock().device().features(), Features::empty());
    rig = Rig::start(rig.machine, Some(DeviceConfig::FEATURES - Features::ATTACH_TABLE));
    assert!(!rig.machine.lock().device().features().contains(Features::ATTACH_TABLE));
}

#[test]
fn features_that_were_not_offered_are_refused_and_change_nothing() {
    let rig = Rig::new(Setup::offering(Features::MAP_UNMAP | Features::INPUT_RANGE | Features::PROBE));
    let before = rig.machine.lock().device().features();
    let error = rig.machine.lock().accept_features(Features::PROBE | Features::MMIO).unwrap_err();
    assert_eq!(error.0, Features::MMIO);
    assert_eq!(rig.machine.lock().device().features(), before);
}

#[test]
fn the_configuration_reads_the_same_in_any_pieces() {
    let rig = Rig::new(Setup::default());
    let iommu = rig.machine.lock();
    let mut whole = [0xee; 64];
    iommu.device().read_config(0, &mut whole);
    let config = DeviceConfig::default();
    assert_eq!(whole[..8], config.page_size_mask.to_le_bytes());
    assert_eq!(whole[8..16], config.input_range.start().0.to_le_bytes());
    assert_eq!(whole[16..24], config.input_range.last().0.to_le_bytes());
    assert_eq!(whole[24..28], config.domain_range.first().0.to_le_bytes());
    assert_eq!(whole[28..32], config.domain_range.last().0.to_le_bytes());
    assert_eq!(whole[32..36], config.probe_size.to_le_bytes());
    assert_eq!(whole[36..], [0; 28]);
    for offset in 0..64 {
        for length in 0..=(64 - offset) {
            let mut piece = vec![0xee; length];
            iommu.device().read_config(offset, &mut piece);
            assert_eq!(piece, whole[offset..offset + length]);
        }
    }
    let mut beyond = [0xee; 4];
    iommu.device().read_config(usize::MAX, &mut beyond);
    assert_eq!(beyond, [0; 4]);
}

#[test]
fn ranges_that_no_driver_could_know_are_refused() {
    let range = IovaRange::new(viommu_wire::Iova(0), viommu_wire::Iova(0xffff)).unwrap();
    let features = DeviceConfig::FEATURES - Features::INPUT_RANGE;
    let config = DeviceConfig { features, input_range: range, ..DeviceConfig::default() };
    assert_eq!(refused(config), ConfigError::InputRangeNotOffered);
    let domain_range = DomainRange::new(viommu_wire::DomainId(1), viommu_wire::DomainId(2)).unwrap();
    let features = DeviceConfig::FEATURES - Features::DOMAIN_RANGE;
    let config = DeviceConfig { features, domain_range, ..DeviceConfig::default() };
    assert_eq!(refused(config), ConfigError::DomainRangeNotOffered);
}
