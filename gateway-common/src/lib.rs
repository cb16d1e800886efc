//! The contract of kernel and user space: what a frame is, what is done with it, what is counted.
//!
//! No allocation, no `std`: the same code runs in the kernel's programs, in the workers and in the fuzzer.
#![no_std]

#[cfg(any(test, feature = "frame-table"))]
extern crate std;

pub mod budget;
pub mod bytes;
pub mod channel_data;
pub mod checksum;
pub mod classify;
pub mod decide;
#[cfg(any(test, feature = "frame-table"))]
pub mod decide_table;
pub mod drop_reason;
pub mod frame;
pub mod frame_kind;
#[cfg(any(test, feature = "frame-table"))]
pub mod frame_table;
pub mod maps;
pub mod steer;
#[cfg(any(test, feature = "frame-table"))]
pub mod steer_table;

pub use classify::{PayloadKind, classify};
pub use decide::{Verdict, decide};
pub use drop_reason::{Counters, DropReason};
pub use frame_kind::{FrameKind, frame_kind};
pub use maps::{ABI_VERSION, FrameCount};
