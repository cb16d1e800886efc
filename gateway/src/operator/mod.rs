//! What an operator asks a running gateway by a Unix socket: `status`, `why`, `flows`, `top`, `bundle`, `fast-path`.
//!
//! ```text
//! firezone-gateway status --line of JSON--> server --Ask--> event loop: Overview
//!        text, top, bundle <--line of JSON----'    '--Ask--> event loop --Command::Inquire--> every worker
//!                                                                  '<---WorkerEvent::Replied--'
//! ```
//!
//! The daemon's side is [`server`] (sockets), [`protocol`] (lines), [`ask`] (the way to the event loop) and [`status`]
//! (what is told). Nobody counts for it and nobody waits: workers answer between two batches, and are asked at most 200
//! times a second. The other side is `client` and what it prints.

mod ask;
pub mod bundle;
pub mod client;
mod fast_path;
pub mod manual;
mod protocol;
mod server;
mod show;
mod status;
#[cfg(test)]
mod tests;
pub mod top;
mod why;

pub use self::{
    ask::{Ask, Asks, FastPathNow, Inquiries, Known, MAX_CLIENTS, Overview, channel},
    server::Server,
};
