//! The leaf formats: page tables proper, one file each.

pub mod vmsav8;
pub mod x86;

pub use vmsav8::{Granule, Vmsav8, Vmsav8Flags, Vmsav8Params};
pub use x86::{X86, X86Flags, X86Levels, X86Params};
