//! The kill test: processes that share their memory with a device die at a random point of its DMA and faults.
//!
//! Guest, device and endpoint take turns on one thread, in an order that a seed decides, so a failure repeats itself. On
//! every host, for both architectures and both ways to hand tables over, 1,000 processes die each, two at a time beside
//! one that lives on:
//! - nothing hangs: whoever waited has an answer when unbind returns, and survivors get everything they ask for;
//! - nothing leaks: tables, frames, PASIDs, tickets, groups and the kernel's objects are back, each time;
//! - no access gets through after unbind returned, or after the process's exit did.
//!
//! Where an endpoint has no page requests, the memory of the processes is pinned.

#![allow(clippy::expect_used, clippy::panic, clippy::cast_possible_truncation)]

mod sva {
    mod fakes;
    mod kill;
    mod soft;
}
