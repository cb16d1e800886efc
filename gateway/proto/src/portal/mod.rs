//! The portal's protocol, without its socket (portal-protocol.md).
//!
//! [`login_url`] says where to connect and [`endpoint`] on which path; [`phoenix`] frames and [`session`] keeps one
//! WebSocket alive; [`parse`] and [`egress`] turn JSON into [`messages`] and back, [`ingest_token`] reads one of their
//! fields; [`failure`] names what can go wrong and [`retry`] what to do then. The sockets, TLS and DNS are in the
//! daemon's own `portal` module.

pub mod egress;
pub mod endpoint;
pub mod failure;
pub mod ingest_token;
pub mod login_url;
pub mod messages;
pub mod parse;
pub mod phoenix;
pub mod retry;
pub mod session;

pub use endpoint::Generation;
pub use parse::{Parsed, parse_ingress};
