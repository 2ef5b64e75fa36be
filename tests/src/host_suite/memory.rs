//! Guest memory that a kernel can be given: files.

use std::fs::File;
use std::sync::Arc;

use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use viommu_queue::GuestTables;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::rig::Memory;

/// Where the window of [`with_window`] is.
pub const WINDOW: u64 = 0x8000_0000;

/// So many bytes of memory at [`Memory::BASE`].
pub fn memory(bytes: usize) -> GuestMemoryMmap {
    let file = FileOffset::new(file(bytes), 0);
    GuestMemoryMmap::from_ranges_with_files([(GuestAddress(Memory::BASE), bytes, Some(file))])
        .expect("a mapping")
}

/// The same with `window` bytes at [`WINDOW`] beside it, for tables of the device's own: as the kernel is given it, with
/// a window that devices can read and not write; and as the device has it, that writes it.
pub fn with_window(bytes: usize, window: usize) -> (Memory, GuestTables) {
    let both = libc::PROT_READ | libc::PROT_WRITE;
    let memory = region(Memory::BASE, &Arc::new(file(bytes)), bytes, both);
    let file = Arc::new(file(window));
    let map = |protection| {
        let window = region(WINDOW, &file, window, protection);
        GuestMemoryMmap::from_arc_regions(vec![Arc::clone(&memory), window]).expect("disjoint regions")
    };
    (Memory::over(map(libc::PROT_READ)), GuestTables::new(&map(both)))
}

fn file(bytes: usize) -> File {
    let file = File::from(memfd_create(c"guest memory", MFdFlags::MFD_CLOEXEC).expect("memory"));
    file.set_len(bytes as u64).expect("room");
    file
}

fn region(at: u64, file: &Arc<File>, bytes: usize, protection: i32) -> Arc<GuestRegionMmap> {
    let file = FileOffset::from_arc(Arc::clone(file), 0);
    let mmap = MmapRegion::build(Some(file), bytes, protection, libc::MAP_SHARED).expect("a mapping");
    Arc::new(GuestRegionMmap::new(mmap, GuestAddress(at)).expect("an address"))
}
