//! Network-namespace topologies, stand-ins written from the spec, scenarios.
