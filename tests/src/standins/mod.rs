//! The two other ends of the gateway, written from the spec and from nothing else.
//!
//! [`portal`] is a portal a script can steer, [`ingest`] its endpoint for flow logs, [`client`] is a client with a real TUN
//! device. Neither
//! uses a line of the gateway: where both misread the spec in the same way, the recorded samples and
//! the test vectors (spec/test-vectors.md) are what finds it.

pub mod client;
pub mod ingest;
pub mod phoenix;
pub mod portal;
