//! Network-namespace topologies, stand-ins written from the spec, scenarios, the benchmark.

pub mod bench;
pub mod demo;
pub mod net;
pub mod scenario;
pub mod standins;
