//! The contract of kernel and user space: what a frame is, what is done with it, what is counted.
//!
//! No allocation, no `std`: the same code runs in the XDP program, in the workers and in the fuzzer.
#![no_std]

pub mod channel_data;
pub mod classify;
pub mod drop_reason;

pub use classify::{PayloadKind, classify};
pub use drop_reason::{Counters, DropReason};
