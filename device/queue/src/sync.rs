//! What threads meet at. A test that explores schedules compiles `translated.rs` and `paged.rs` over other ones.

pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};
