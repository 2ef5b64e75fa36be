//! Endpoints come and go.

use pgtable_formats::context::smmuv3::Idr1;
use viommu_device::host::{HostError, TableKinds};
use viommu_wire::{ReservedKind, ReservedRegion};

use super::*;
use crate::fake::{FakeSmmuv3, FakeVtd};
use crate::sysfs::Root;
use crate::{SetupError, Step};

const UNITS: [fn() -> Unit; 4] = [Unit::smmuv3, Unit::emulated_smmuv3, Unit::vtd, || Unit::Plain];

#[test]
fn an_endpoint_that_goes_leaves_nothing_behind() {
    for unit in UNITS {
        let mut rig = Rig::new();
        let before = rig.fake().objects();
        let unit = rig.fake().add_unit(unit());
        let device = rig.add(FIRST, unit);
        rig.add(SECOND, unit);
        let both = rig.fake().objects();
        rig.host.remove_endpoint(SECOND).unwrap();
        assert!(rig.fake().objects() > before && rig.fake().objects() <= both);
        rig.host.remove_endpoint(FIRST).unwrap();
        assert_eq!(rig.fake().objects(), before, "{:#?}", rig.fake().describe());
        assert_eq!(rig.fake().attached(device, None), None);
        assert_eq!(rig.host.remove_endpoint(FIRST), Err(SetupError::NoEndpoint(FIRST)));
        rig.host.add_endpoint(FIRST, as_is(device)).unwrap();
        assert_eq!(rig.read(FIRST, 0x4000_0000).map_err(|_| ()), Err(()));
    }
}

#[test]
fn a_host_that_is_dropped_with_all_in_use_leaves_nothing_behind() {
    for unit in UNITS {
        let mut rig = Rig::two(unit());
        let mut identity = rig.identity();
        rig.bind(FIRST, &mut identity);
        let mut mapped = rig.mapped();
        rig.host.map(&mut mapped, mapping(0x1000, 0x1000, 0x4000_0000, READ_WRITE)).unwrap();
        rig.bind(SECOND, &mut mapped);
        let Rig { host, kernel, .. } = rig;
        drop(host);
        drop(mapped);
        assert_eq!(kernel.inner().inner().objects(), 0, "{:#?}", kernel.inner().inner().describe());
    }
}

/// Spaces, guests' tables among them, may outlive the host.
#[test]
fn spaces_may_outlive_the_host() {
    for unit in [Unit::smmuv3(), Unit::vtd()] {
        let mut rig = Rig::two(unit);
        let (mut table, _) = rig.table(FIRST, 0x1000, 0x4000_0000);
        rig.bind(FIRST, &mut table);
        let Rig { host, kernel, .. } = rig;
        drop(host);
        assert_ne!(kernel.inner().inner().objects(), 0);
        drop(table);
        assert_eq!(kernel.inner().inner().objects(), 0, "{:#?}", kernel.inner().inner().describe());
    }
}

#[test]
fn devices_of_one_unit_share_and_others_do_not() {
    for unit in UNITS {
        let mut rig = Rig::new();
        let [here, there] = [(); 2].map(|()| rig.fake().add_unit(unit()));
        rig.add(FIRST, here);
        rig.add(EndpointId(9), there);
        rig.add(SECOND, here);
        rig.add(EndpointId(10), there);
        let unit = |endpoint: u32| rig.host.endpoints[&EndpointId(endpoint)].unit.id;
        assert_eq!(rig.host.units.len(), 2);
        assert_eq!(unit(FIRST.0), unit(SECOND.0));
        assert_eq!(unit(9), unit(10));
        assert_ne!(unit(8), unit(9));
    }
}

/// The `n`-th call fails, for every `n`: nothing stays, and the next try succeeds.
#[test]
fn whatever_fails_while_an_endpoint_is_added_leaves_nothing_behind() {
    for unit in UNITS {
        for second in [false, true] {
            let mut reached_the_end = false;
            for number in 0..40 {
                let mut rig = Rig::new();
                let unit = rig.fake().add_unit(unit());
                if second {
                    rig.add(FIRST, unit);
                }
                let before = rig.fake().describe();
                let device = FakeDevice { ats: true, ..FakeDevice::on(unit).with_pasids(8) };
                let device = rig.fake().add_device(device);
                rig.failing().fail_nth(number, Errno::EIO);
                let result = rig.host.add_endpoint(SECOND, as_is(device));
                reached_the_end = rig.failing().failed().is_none();
                if reached_the_end {
                    assert_eq!(result, Ok(()));
                    break;
                }
                assert!(matches!(result, Err(SetupError::Kernel { errno: Errno::EIO, .. })), "{result:?}");
                assert_eq!(rig.fake().describe(), before, "call {number}");
                assert_eq!(rig.fake().attached(device, None), None);
                rig.failing().heal();
                rig.host.add_endpoint(SECOND, as_is(device)).unwrap();
            }
            assert!(reached_the_end);
        }
    }
}

#[test]
fn what_an_endpoint_can_do_is_what_hardware_and_kernel_can() {
    let kinds = |unit| {
        let mut rig = Rig::new();
        let unit = rig.fake().add_unit(unit);
        rig.add(FIRST, unit);
        let caps = rig.host.caps(FIRST).unwrap();
        (caps.tables.is_some(), caps.kinds)
    };
    assert_eq!(kinds(Unit::smmuv3()), (true, TableKinds::PASID_TABLE));
    assert_eq!(kinds(Unit::vtd()), (true, TableKinds::PAGE_TABLE));
    assert_eq!(kinds(Unit::Plain), (false, TableKinds::empty()));
    let incoherent = FakeSmmuv3 { coherent: false, ..FakeSmmuv3::NEW };
    assert_eq!(kinds(Unit::Smmuv3(incoherent)), (false, TableKinds::empty()));
    let Unit::Vtd(vtd) = Unit::vtd() else { panic!() };
    let not_nesting = FakeVtd { ecap: vtd.ecap & !(1 << 26), ..vtd };
    assert_eq!(kinds(Unit::Vtd(not_nesting)), (false, TableKinds::empty()));
}

/// An SMMU names a device by one StreamID: this one has bypass and mappings, its neighbour has tables as well.
#[test]
fn a_device_with_several_stream_ids_works_without_tables() {
    let mut rig = Rig::new();
    let unit = rig.fake().add_unit(Unit::smmuv3());
    rig.add(FIRST, unit);
    let device = rig.fake().add_device(FakeDevice { stream_ids: 2, ..FakeDevice::on(unit) });
    rig.host.add_endpoint(SECOND, as_is(device)).unwrap();
    assert!(rig.host.caps(SECOND).unwrap().tables.is_none());
    assert!(rig.host.caps(FIRST).unwrap().tables.is_some());
    let mut identity = rig.identity();
    rig.bind(SECOND, &mut identity);
    assert_eq!(rig.read(SECOND, 0x4000_0000), Ok(0x4000_0000));
}

/// Registers and PASID size agree.
#[test]
fn no_more_pasids_are_shown_than_the_device_has() {
    for bits in [0, 3, 20] {
        let mut rig = Rig::new();
        for (unit, id) in [(Unit::smmuv3(), FIRST), (Unit::vtd(), SECOND)] {
            let unit = rig.fake().add_unit(unit);
            let device = rig.fake().add_device(FakeDevice::on(unit).with_pasids(bits));
            rig.host.add_endpoint(id, as_is(device)).unwrap();
        }
        let TableCaps::Smmuv3(arm) = rig.caps(FIRST) else { panic!() };
        assert_eq!(arm.ssid_bits, bits.min(16));
        assert_eq!(Idr1::from_bits(arm.registers().idr1).ssidsize(), bits.min(16));
        let TableCaps::Vtd(intel) = rig.caps(SECOND) else { panic!() };
        assert_eq!(intel.pasid_bits, bits);
    }
}

#[test]
fn reserved_regions_and_the_input_range_are_the_kernels() {
    let mut rig = Rig::new();
    let unit = rig.fake().add_unit(Unit::emulated_smmuv3());
    let mut device = FakeDevice::on(unit);
    device.reserved.push(range(0x10_0000, 0x1000));
    let id = rig.fake().add_device(device);
    let msi = ReservedRegion { kind: ReservedKind::Msi, range: range(0x800_0000, 0x10_0000) };
    rig.host.add_endpoint(FIRST, Device { reserved: vec![msi], ..as_is(id) }).unwrap();
    let hole = ReservedRegion { kind: ReservedKind::Reserved, range: range(0x10_0000, 0x1000) };
    assert_eq!(rig.host.caps(FIRST).unwrap().reserved, [hole, msi]);
    assert_eq!(rig.host.input_range(), range(0, 1 << 44));
    assert_eq!(rig.host.page_size_mask(), 0xffff_ffff_ffff_f000);
    // A device of its own does not narrow what others may.
    rig.add(SECOND, unit);
    let reserved = ReservedRegion { kind: ReservedKind::Reserved, ..msi };
    assert_eq!(rig.host.caps(SECOND).unwrap().reserved, [reserved]);
}

#[test]
fn memory_where_a_device_has_something_else_is_told() {
    let mut rig = Rig::new();
    let unit = rig.fake().add_unit(Unit::Plain);
    let mut device = FakeDevice::on(unit);
    device.reserved.push(range(0x6000_0000, 0x1000));
    let device = rig.fake().add_device(device);
    let before = rig.fake().objects();
    let memory = range(0x6000_0000, 1 << 20);
    assert_eq!(rig.host.add_endpoint(FIRST, as_is(device)), Err(SetupError::MemoryReserved { memory }));
    assert_eq!(rig.fake().objects(), before);
}

#[test]
fn numbers_and_devices_are_taken_once() {
    let mut rig = Rig::two(Unit::smmuv3());
    let device = rig.device(FIRST);
    assert_eq!(rig.host.add_endpoint(FIRST, as_is(device)), Err(SetupError::EndpointExists(FIRST)));
    let taken = SetupError::DeviceExists { device, endpoint: FIRST };
    assert_eq!(rig.host.add_endpoint(EndpointId(1), as_is(device)), Err(taken));
    let nobody = Err(SetupError::Kernel { step: Step::HardwareInfo, errno: Errno::ENOENT });
    assert_eq!(rig.host.add_endpoint(EndpointId(1), as_is(DeviceId(999))), nobody);
}

/// Kernels before 6.15 may tell how many PASIDs a device has and make tables for them, and yet attach none.
#[test]
fn no_pasids_are_shown_that_cannot_be_attached() {
    let ranges = MEMORY.map(|(start, size)| (GuestAddress(start), size));
    let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    for pasids in [false, true] {
        let mut rig = Rig::with_memory(&memory, fake::Kernel { pasids, ..fake::Kernel::NEWEST });
        let unit = rig.fake().add_unit(Unit::vtd());
        let device = rig.add(FIRST, unit);
        let TableCaps::Vtd(caps) = rig.caps(FIRST) else { panic!() };
        assert_eq!(caps.pasid_bits, if pasids { 8 } else { 0 });
        assert_eq!(rig.fake().attached(device, Some(1)), None);
    }
}

/// Faults of an endpoint are nothing to the next that has its number.
#[test]
fn faults_of_an_endpoint_go_with_it() {
    for asked in [0, 1] {
        let mut rig = Rig::two(Unit::emulated_smmuv3());
        for endpoint in [FIRST, SECOND] {
            let (mut space, _) = rig.table(endpoint, 0x1000, 0x4000_0000);
            rig.bind(endpoint, &mut space);
        }
        for _ in 0..3 {
            assert!(rig.read(FIRST, 0x5000).is_err());
            assert!(rig.read(SECOND, 0x5000).is_err());
        }
        let device = rig.device(FIRST);
        for _ in 0..asked {
            assert_eq!(rig.host.next_fault().unwrap().stream.endpoint, FIRST);
        }
        rig.host.remove_endpoint(FIRST).unwrap();
        rig.host.add_endpoint(FIRST, as_is(device)).unwrap();
        let left = std::iter::from_fn(|| rig.host.next_fault()).map(|report| report.stream.endpoint);
        assert_eq!(left.collect::<Vec<_>>(), [SECOND; 3]);
        assert_eq!(rig.host.lost_events(), 0);
    }
}

/// Numbers of objects mean something else to another kernel.
#[test]
fn spaces_of_another_host_are_refused() {
    for unit in [Unit::smmuv3(), Unit::vtd()] {
        let (mut here, mut there) = (Rig::two(unit), Rig::two(unit));
        let mut mapped = there.mapped();
        let (mut table, _) = there.table(FIRST, 0x1000, 0x4000_0000);
        let (stream, refused) = (Stream::untagged(FIRST), Err(HostError::Unsupported));
        assert_eq!(here.host.bind(stream, Some(&mut mapped)), refused);
        assert_eq!(here.host.bind(stream, Some(&mut table)), refused);
        let map = mapping(0x1000, 0x1000, 0x4000_0000, READ_WRITE);
        assert_eq!(here.host.map(&mut mapped, map), Err(HostError::Unsupported.into()));
        assert!(here.read(FIRST, 0x1000).is_err());
        assert_eq!(there.host.bind(stream, Some(&mut table)), Ok(()));
    }
}

#[test]
fn a_function_on_pci_is_as_sysfs_has_it() {
    let tree = vmm_sys_util::tempdir::TempDir::new().unwrap();
    let (root, function) = (Root::at(tree.as_path()), "0000:01:00.0".parse().unwrap());
    let read = || Device::on_pci(DeviceId(3), &root, function);
    assert_eq!(read(), None, "nothing is known of its interrupts");
    let folder = root.path("/sys/bus/pci/devices/0000:01:00.0");
    std::fs::create_dir_all(folder.join("iommu_group")).unwrap();
    let regions = "0x0000000008000000 0x00000000080fffff msi\n";
    std::fs::write(folder.join("iommu_group/reserved_regions"), regions).unwrap();
    let msi = ReservedRegion { kind: ReservedKind::Msi, range: range(0x800_0000, 0x10_0000) };
    let without_ats =
        Device { id: DeviceId(3), reserved: vec![msi], may_stall: false, ats: false, pri: false };
    assert_eq!(read(), Some(without_ats.clone()));
    for (name, text) in [("vendor", "0x1234"), ("device", "0x11e8"), ("class", "0x00ff00")] {
        std::fs::write(folder.join(name), text).unwrap();
    }
    // Capability 15 is ATS.
    let mut config = vec![0; 4096];
    config[0x100..0x104].copy_from_slice(&0x0001_000f_u32.to_le_bytes());
    std::fs::write(folder.join("config"), config).unwrap();
    assert_eq!(read(), Some(Device { ats: true, ..without_ats }));
}

/// Linux 6.13 to 6.14 nest without event queues.
#[test]
fn an_older_kernel_does_without_faults() {
    let rig = Rig::two(Unit::smmuv3());
    assert_eq!(rig.host.queue_fds().len(), 1);
    let mut rig = Rig::new();
    let unit = rig.fake().add_unit(Unit::smmuv3());
    rig.failing().fail_kind(Call::AllocEventQueue, Errno::ENOTTY);
    rig.add(FIRST, unit);
    assert!(rig.host.caps(FIRST).unwrap().tables.is_some());
    assert_eq!(rig.host.queue_fds(), []);
    assert_eq!(rig.host.next_fault(), None);
}
