//! SMMUv3 (Arm IHI 0070) behind a vIOMMU.
//!
//! All words that reach the kernel are made here, field by field, of what the device understood of a request; no bit
//! of a guest is copied through. The kernel refuses a command or an entry with a bit that it does not know (`EIO`), and
//! older ones pass it to the queue that all guests share.
//!
//! Not supported: stage 2 of a guest's own, split-stage ATS, RESUME and PRI_RESP (a stall or page request is answered
//! through a fault queue), hints of the translation table level (TTL).

mod command;
mod event;
mod hardware;
mod plan;
mod range;
mod ste;
#[cfg(test)]
mod tests;

pub use event::{DecodedEvent, decode};
pub use hardware::{Hardware, caps};
pub use plan::{Plan, Step, Target, everything, plan};
pub use ste::{ABORT, BYPASS, ste};
