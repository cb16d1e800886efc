//! The test network: namespaces, links, processes and real servers, and the topologies made of them.
//!
//! Nothing here knows the gateway's protocol. A scenario takes a [`topology::Topology`], starts programs in its
//! namespaces and asks questions with `curl`, `ping`, `dig` and `iperf3`. Everything made here is removed by a guard;
//! what a guard cannot remove (SIGKILL of the run) is removed by the janitor process ([`janitor`]) and, last, by the sweep
//! at the next start.

pub mod janitor;
pub mod netns;
pub mod process;
mod readme;
pub mod services;
pub mod topology;
pub mod wire;

pub use netns::NetNs;
pub use process::{Logs, Process};
