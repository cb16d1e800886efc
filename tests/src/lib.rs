//! Network-namespace topologies, stand-ins written from the spec, scenarios.

pub mod demo;
pub mod net;
pub mod scenario;
pub mod standins;
