//! What is around a host: older kernels, memory in files and in pieces, interrupts, files to wait on.

use std::os::fd::BorrowedFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pgtable_formats::AccessKind;
use pgtable_formats::format::Attrs;
use viommu_device::host::{Host, SpaceSpec, Stream, TableCaps, TableKinds};
use viommu_host_iommufd::fake::{DmaFault, FakeDevice, Kernel, Unit};
use viommu_tests::host_suite::HostUnderTest;
use viommu_tests::host_suite::iommufd::{ENDPOINTS, Fakes, Layout};
use viommu_tests::rig::{Alloc, Memory};
use viommu_tests::tables::{PageTable, PasidTable};
use viommu_wire::ReservedKind;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

fn on(version: Kernel, guest: Memory, unit: Unit) -> Fakes {
    let device = |unit| FakeDevice::on(unit).with_pasids(16);
    let mut fakes = Fakes::on_kernel(version, guest, unit, Layout::OneUnit, device, &[]);
    fakes.start().unwrap();
    for index in 0..2 {
        fakes.add(index).unwrap();
    }
    fakes
}

fn older(version: Kernel, unit: Unit) -> Fakes {
    on(version, Memory::new(64 << 20), unit)
}

fn untagged() -> Stream {
    Stream::untagged(ENDPOINTS[0])
}

/// Binds a table in which page 1 leads to page 10, and the doorbell to itself if `doorbell`.
fn bind_table(fakes: &mut Fakes, doorbell: bool) -> <Fakes as HostUnderTest>::Host {
    let caps = fakes.host().caps(ENDPOINTS[0]).unwrap().tables.clone().unwrap();
    let table = PasidTable::new(&caps, 4, &mut fakes.memory);
    let pages = PageTable::new(&caps, 1, &mut fakes.memory);
    pages.map(&mut fakes.memory, 0x1000, Memory::page(10).0, 0x1000, Attrs::READ_WRITE);
    if doorbell {
        pages.map(&mut fakes.memory, 0x800_0000, 0x800_0000, 0x1000, Attrs::READ_WRITE);
    }
    table.set(&mut fakes.memory, 0, &pages);
    let mut host = fakes.host.take().unwrap();
    let spec = SpaceSpec::GuestTable { endpoint: ENDPOINTS[0], table: &table.canonical() };
    let mut space = host.create(spec).unwrap();
    host.bind(untagged(), Some(&mut space)).unwrap();
    host
}

#[test]
fn a_kernel_without_vdevices_has_bypass_and_mappings() {
    let mut fakes = older(Kernel { viommu: false, event_queues: false, ..Kernel::NEWEST }, Unit::smmuv3());
    let caps = fakes.host().caps(ENDPOINTS[0]).unwrap().clone();
    assert_eq!((caps.tables, caps.kinds), (None, TableKinds::empty()));
    let mut identity = fakes.host().create(SpaceSpec::Identity).unwrap();
    fakes.host().bind(untagged(), Some(&mut identity)).unwrap();
    let page = Memory::page(3).0;
    assert_eq!(fakes.dma(untagged(), page, AccessKind::Write), Ok(page));
}

#[test]
fn a_kernel_without_event_queues_has_tables() {
    let mut fakes = older(Kernel { event_queues: false, ..Kernel::NEWEST }, Unit::smmuv3());
    let mut host = bind_table(&mut fakes, false);
    assert_eq!(fakes.dma(untagged(), 0x1000, AccessKind::Read), Ok(Memory::page(10).0));
    assert!(fakes.dma(untagged(), 0x2000, AccessKind::Read).is_err());
    assert_eq!((host.next_fault(), host.queue_fds().len()), (None, 0));
}

#[test]
fn a_kernel_without_pasids_has_tables_of_untagged_accesses() {
    let fakes = &mut older(Kernel { pasids: false, ..Kernel::NEWEST }, Unit::vtd());
    let caps = fakes.host().caps(ENDPOINTS[0]).unwrap().tables.clone().unwrap();
    let pages = PageTable::new(&caps, 0, &mut fakes.memory);
    pages.map(&mut fakes.memory, 0x1000, Memory::page(10).0, 0x1000, Attrs::READ_WRITE);
    let table = pages.canonical().unwrap();
    let spec = SpaceSpec::GuestTable { endpoint: ENDPOINTS[0], table: &table };
    let mut space = fakes.host().create(spec).unwrap();
    fakes.host().bind(untagged(), Some(&mut space)).unwrap();
    assert_eq!(fakes.dma(untagged(), 0x1000, AccessKind::Read), Ok(Memory::page(10).0));
    let tagged = Stream { pasid: pgtable_formats::Pasid::new(5), ..untagged() };
    assert!(fakes.host().bind(tagged, Some(&mut space)).is_err());
    assert_eq!(fakes.dma(tagged, 0x1000, AccessKind::Read), Err(DmaFault::Blocked));
}

/// Two files and anonymous memory, with a hole; bypass, mappings across regions, and tables in a file.
#[test]
fn memory_in_files_and_in_pieces() {
    for map_file in [true, false] {
        let regions: Vec<_> = [(Memory::BASE, 32 << 20), (Memory::BASE + (32 << 20), 16 << 20)]
            .into_iter()
            .map(|(start, size)| {
                let file =
                    nix::sys::memfd::memfd_create(c"guest", nix::sys::memfd::MFdFlags::empty()).unwrap();
                let file = std::fs::File::from(file);
                file.set_len(size as u64 + 0x4000).unwrap();
                (GuestAddress(start), size, Some(FileOffset::new(file, 0x4000)))
            })
            .chain([(GuestAddress(1 << 32), 1 << 20, None)])
            .collect();
        let memory = GuestMemoryMmap::from_ranges_with_files(regions).unwrap();
        let version = Kernel { map_file, ..Kernel::NEWEST };
        let mut fakes = on(version, Memory::over(memory), Unit::smmuv3());
        fakes.memory = Alloc::within(&fakes.guest, Memory::page(4096), Memory::page(8000));
        let mut identity = fakes.host().create(SpaceSpec::Identity).unwrap();
        fakes.host().bind(untagged(), Some(&mut identity)).unwrap();
        let border = Memory::BASE + (32 << 20);
        for at in [Memory::BASE, border - 1, border, border + (16 << 20) - 1, 1 << 32, (1 << 32) + 0xf_ffff] {
            assert_eq!(fakes.dma(untagged(), at, AccessKind::Write), Ok(at), "{at:#x}");
        }
        for at in [Memory::BASE - 1, border + (16 << 20), (1 << 32) + 0x10_0000] {
            assert_eq!(
                fakes.dma(untagged(), at, AccessKind::Read),
                Err(DmaFault::Stage2(pgtable_formats::Gpa(at)))
            );
        }
        fakes.host().bind(untagged(), None).unwrap();
        let host = bind_table(&mut fakes, false);
        assert_eq!(fakes.dma(untagged(), 0x1000, AccessKind::Read), Ok(Memory::page(10).0));
        drop(host);
    }
}

/// PROBE has the window; the guest has to map it where it translates, and nothing else is needed.
#[test]
fn interrupts_go_through_the_guests_table() {
    for doorbell in [false, true] {
        let mut fakes = older(Kernel::NEWEST, Unit::smmuv3());
        let regions = fakes.host().caps(ENDPOINTS[0]).unwrap().reserved.clone();
        let msi: Vec<_> = regions.iter().filter(|region| region.kind == ReservedKind::Msi).collect();
        assert_eq!(msi.len(), 1);
        assert_eq!((msi[0].range.start().0, msi[0].range.last().0), (0x800_0000, 0x80f_ffff));
        let device = fakes.devices[0];
        assert!(fakes.fake.interrupt(device).is_err(), "blocked");
        let mut identity = fakes.host().create(SpaceSpec::Identity).unwrap();
        fakes.host().bind(untagged(), Some(&mut identity)).unwrap();
        assert_eq!(fakes.fake.interrupt(device), Ok(()));
        let host = bind_table(&mut fakes, doorbell);
        assert_eq!(fakes.fake.interrupt(device).is_ok(), doorbell);
        drop(host);
    }
}

/// A file can be read exactly while there are faults.
#[test]
fn queues_can_be_waited_for() {
    let mut fakes = older(Kernel::NEWEST, Unit::smmuv3());
    let mut host = bind_table(&mut fakes, false);
    let [fd] = host.queue_fds()[..] else { panic!("one IOMMU, one queue") };
    #[allow(unsafe_code)]
    // SAFETY: the host, which owns it, lives as long.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let ready = || poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::ZERO).unwrap() == 1;
    assert!(!ready());
    for _ in 0..40 {
        fakes.dma(untagged(), 0x9000, AccessKind::Read).unwrap_err();
    }
    assert!(ready());
    for left in (0..40).rev() {
        assert!(host.next_fault().is_some(), "{left} left");
    }
    assert!(!ready() && host.next_fault().is_none());
}

/// Registers reach the guest as far as nesting allows, and no further.
#[test]
fn capabilities_are_filtered() {
    let mut fakes = Fakes::smmuv3(Layout::OneUnit, true);
    let caps = fakes.host().caps(ENDPOINTS[0]).unwrap().tables.clone();
    let Some(TableCaps::Smmuv3(caps)) = caps else { panic!() };
    assert_eq!((caps.ssid_bits, caps.oas_bits, caps.httu), (16, 48, 0));
    let mut fakes = Fakes::vtd(Layout::OneUnit);
    let caps = fakes.host().caps(ENDPOINTS[0]).unwrap().tables.clone();
    let Some(TableCaps::Vtd(caps)) = caps else { panic!() };
    assert_eq!((caps.pasid_bits, caps.haw), (20, 48));
}
