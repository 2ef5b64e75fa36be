//! IOMMU translation tables: validate, walk, build.
//!
//! What a guest hands to an IOMMU, and what the IOMMU does with it, as plain functions over guest memory:
//!
//! - [`leaf`]: page tables proper. VMSAv8-64 stage 1 (4, 16 and 64 KiB granules, 52-bit forms) and x86-64 with 4
//!   and 5 levels, which VT-d calls first-stage tables.
//! - [`context`]: what leads to a page table. SMMUv3 stream-table words and context descriptors, VT-d PASID
//!   directories and tables.
//! - [`walk`](walk()): one walker for all leaf formats; [`edit::Editor`]: one builder; [`visit`]: what a table maps.
//! - [`suite`]: what every format has to prove, and a memory to prove it in (feature `alloc`).
//!
//! Memory is behind two traits: [`TableMem`], one 64-bit load and one compare-exchange by guest-physical address, and
//! [`TableAlloc`] for those who build. The tables are a stranger's: each entry is loaded once, malformed is told
//! from not present, permissions of all levels count, and every walk ends.
//!
//! ```
//! # #[cfg(feature = "alloc")] {
//! use pgtable_formats::edit::{EditOptions, Editor};
//! use pgtable_formats::format::Attrs;
//! use pgtable_formats::leaf::{X86, X86Flags, X86Levels, X86Params};
//! use pgtable_formats::suite::FlatMem;
//! use pgtable_formats::{Access, Gpa, Iova, IovaRange, TableAlloc, WalkFault, walk};
//!
//! let mut memory = FlatMem::new(Gpa(0x4000_0000), 1 << 20);
//! let root = memory.alloc(12).ok_or("no memory")?;
//! let params = X86Params { root, levels: X86Levels::Four, output_lg2: 46, flags: X86Flags::empty() };
//! let format = X86::new(params).ok_or("not a legal configuration")?;
//!
//! let range = IovaRange::from_length(Iova(0x20_0000), 0x20_1000).ok_or("empty range")?;
//! Editor::new(format, &mut memory, EditOptions::default()).map(range, Gpa(0x8000_0000), Attrs::READ)?;
//!
//! let large = walk(&format, &memory, Iova(0x20_1234), Access::READ)?;
//! assert_eq!((large.size_lg2, large.apply(Iova(0x20_1234))), (21, Gpa(0x8000_1234)));
//! let fault = walk(&format, &memory, Iova(0x40_1000), Access::READ);
//! assert_eq!(fault, Err(WalkFault::NotPresent { level: 0 }));
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Not supported
//!
//! Stage-2 and nested tables (stage 2 is the host's; [`TableMem`] stands for it), AArch32 and big-endian tables,
//! permission indirection and 128-bit descriptors, AMD and RISC-V tables, legacy-mode VT-d. Contiguous groups are
//! built, and ignored as a hint in walks. Memory types are carried and mean nothing here. Nothing caches and nothing
//! invalidates.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(any(feature = "alloc", test))]
extern crate alloc;

mod access;
mod addr;
pub mod context;
pub mod edit;
mod fault;
pub mod format;
pub mod leaf;
mod mem;
#[cfg(any(feature = "alloc", test))]
pub mod suite;
pub mod visit;
pub mod walk;

pub use access::{Access, AccessKind, Perms, Translation};
pub use addr::{Gpa, Iova, IovaRange, Pasid};
pub use fault::{Fault, FaultClass};
pub use format::Format;
pub use mem::{NotMemory, TableAlloc, TableMem};
pub use walk::{WalkFault, walk};
