//! Network-namespace topologies, stand-ins written from the spec, scenarios.

pub mod net;
pub mod scenario;
pub mod standins;
