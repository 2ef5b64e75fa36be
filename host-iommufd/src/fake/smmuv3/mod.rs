//! The SMMUv3: what its driver accepts of a guest, and what its hardware does with it.

mod command;
mod event;
mod stage1;
mod ste;
mod tlb;

pub(super) use command::{Command, decode};
pub(super) use event::{is_forwarded, record};
pub(super) use stage1::{Failure, Stage1};
pub(super) use ste::Ste;
pub(super) use tlb::Tlb;
