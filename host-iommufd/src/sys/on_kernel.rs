//! What only a kernel with `/dev/iommu` can tell. Ignored elsewhere; in the lab all tests run.

use std::path::{Path, PathBuf};

use nix::errno::Errno;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::*;

#[test]
#[ignore = "needs /dev/iommu"]
fn the_array_of_ranges_grows_as_the_kernel_asks() {
    let kernel = Sys::open().unwrap();
    let ioas = kernel.alloc_ioas().unwrap();
    assert!(matches!(raw::iova_ranges(kernel.iommufd(), ioas.0, 0), Ok(RangesAnswer::Needs(1))));
    let Ok(RangesAnswer::All { ranges, .. }) = raw::iova_ranges(kernel.iommufd(), ioas.0, 1) else {
        panic!()
    };
    assert_eq!((ranges.len(), ranges[0].start, ranges[0].last), (1, 0, u64::MAX));
    assert_eq!(kernel.iova_ranges(ioas).unwrap().allowed, [IovaRange::ALL]);
    assert_eq!(kernel.iova_ranges(ObjectId(999)).unwrap_err(), Errno::ENOENT);
    kernel.destroy(ioas).unwrap();
}

#[test]
#[ignore = "needs /dev/iommu"]
fn memory_is_mapped_and_unmapped_whole() {
    let kernel = Sys::open().unwrap();
    let ioas = kernel.alloc_ioas().unwrap();
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
    let address = memory.get_host_address(GuestAddress(0)).unwrap() as u64;
    let range = |start, length| IovaRange::from_length(Iova(start), length).unwrap();
    let mapping = |start, length, address| IoasMapping {
        range: range(start, length),
        backing: Backing::Memory(address),
        readable: true,
        writable: true,
    };
    kernel.map(ioas, &mapping(0x10_0000, 0x4000, address)).unwrap();
    kernel.map(ioas, &mapping(0x20_0000, 0x2000, address + 0x4000)).unwrap();
    assert_eq!(kernel.map(ioas, &mapping(0x10_1000, 0x1000, address)), Err(Errno::EEXIST));
    assert_eq!(kernel.map(ioas, &mapping(0, u64::MAX, address)), Err(Errno::EOVERFLOW));
    let all = IoasMapping { range: IovaRange::ALL, ..mapping(0, 1, address) };
    assert_eq!(kernel.map(ioas, &all), Err(Errno::EOVERFLOW));

    assert_eq!(kernel.unmap(ioas, range(0x10_0000, 0x1000)), Err(Errno::ENOENT), "a part of a mapping");
    assert_eq!(kernel.unmap(ioas, range(0x10_0000, 0x4000)), Ok(0x4000));
    assert_eq!(kernel.unmap(ioas, range(0x10_0000, 0x4000)), Err(Errno::ENOENT));
    assert_eq!(kernel.unmap(ioas, IovaRange::ALL), Ok(0x2000));
    assert_eq!(kernel.unmap(ioas, IovaRange::ALL), Ok(0));
    kernel.destroy(ioas).unwrap();
    assert_eq!(kernel.destroy(ioas), Err(Errno::ENOENT));
}

#[test]
#[ignore = "needs /dev/iommu"]
fn a_queue_is_closed_before_it_is_destroyed() {
    let kernel = Sys::open().unwrap();
    let queue = kernel.alloc_fault_queue().unwrap();
    let fd = kernel.queue_fd(queue).unwrap();
    assert!(Path::new(&format!("/proc/self/fd/{fd}")).exists());
    assert_eq!(kernel.read_events(queue), Err(Errno::EINVAL), "it has page requests");
    kernel.destroy(queue).unwrap();
    assert_eq!(kernel.queue_fd(queue), None);
    assert_eq!(kernel.respond(queue, 0, ResponseCode::Success), Err(Errno::ENOENT));
}

#[test]
#[ignore = "needs /dev/iommu and the devices of the lab"]
fn devices_come_and_go_alone() {
    let kernel = Sys::open().unwrap();
    let (first, first_handle) = kernel.bind(&device("TESTDEV0")).unwrap();
    let (second, second_handle) = kernel.bind(&device("TESTDEV1")).unwrap();
    drop((first_handle, second_handle));
    assert_ne!(first, second);
    let again = kernel.bind(&device("TESTDEV0")).err().unwrap();
    assert!(matches!(again, BindError::OpenOrNotCoherent(_)), "{again}");
    kernel.unbind(first).unwrap();
    assert_eq!(kernel.unbind(first), Err(Errno::ENOENT));
    assert_eq!(kernel.hw_info(first), Err(Errno::ENOENT));
    kernel.hw_info(second).unwrap();
    let (first, handle) = kernel.bind(&device("TESTDEV0")).unwrap();
    // A handle keeps its device open.
    kernel.unbind(first).unwrap();
    let again = kernel.bind(&device("TESTDEV0")).err().unwrap();
    assert!(matches!(again, BindError::OpenOrNotCoherent(_)), "{again}");
    drop(handle);
    kernel.bind(&device("TESTDEV0")).unwrap();
    // Devices that are bound, attached even, when everything goes.
    let ioas = kernel.alloc_ioas().unwrap();
    kernel.attach(second, None, ioas).unwrap();
    drop(kernel);
    let kernel = Sys::open().unwrap();
    let (second, _handle) = kernel.bind(&device("TESTDEV1")).unwrap();
    kernel.hw_info(second).unwrap();
}

#[test]
#[ignore = "needs /dev/iommu and the devices of the lab"]
fn a_device_of_somebody_elses_open_file() {
    let other = Sys::open().unwrap();
    let kernel = Sys::from_vfio(other.vfio.clone());
    let (id, handle) = other.bind(&device("TESTDEV0")).unwrap();
    assert_eq!(kernel.attach(id, None, ObjectId(1)), Err(Errno::ENOENT));
    assert_eq!(kernel.adopt(handle), Some(id));
    let ioas = kernel.alloc_ioas().unwrap();
    kernel.attach(id, None, ioas).unwrap();
    kernel.detach(id, None).unwrap();
}

#[test]
#[ignore = "needs /dev/iommu and the devices of the lab"]
fn a_device_with_another_driver_is_refused_with_advice() {
    let kernel = Sys::open().unwrap();
    let error = kernel.bind(Path::new("/sys/bus/pci/devices/0000:00:01.0")).err().unwrap();
    assert!(error.to_string().contains("driver virtio-pci"), "{error}");
    println!("{error}");
    let error = kernel.bind(Path::new("/sys/bus/pci/devices/0000:00:00.0")).err().unwrap();
    println!("{error}");
}

fn device(variable: &str) -> PathBuf {
    Path::new("/sys/bus/pci/devices").join(std::env::var(variable).unwrap())
}
