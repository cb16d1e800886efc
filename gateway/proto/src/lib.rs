//! The sans-IO core of `firezone-gateway`: the core decides, the shell moves bytes.
//!
//! Two state machines, [`Control`](control::Control) and [`Worker`](worker::Worker). Neither reads a clock, opens
//! a socket or spawns anything: time, randomness and bytes come in as arguments; transmits, commands, events and
//! one deadline come out. (boringtun reads its own clock inside `worker/wg.rs`; that is the one exemption.)
//!
//! ```text
//!  portal <--- Egress --+---------+-- Command (state, coalesced) --> +--------+ --> Sink: datagrams, packets
//!         ---- Ingress ->| Control |                                  | Worker |
//!  STUN/TURN datagrams ->+---------+ <-- WorkerEvent (quota) --------- +--------+ <-- datagrams, TUN packets
//! ```
//!
//! A method is one of four kinds: a getter; `handle_*` for what happened; a plain verb for what an operator or
//! the portal orders; `poll_*` for what to do next. After any `handle_*` or verb, drain in this order until each
//! is empty: `poll_command`, `poll_transmit`, `poll_egress`, `poll_event`, and only then ask `poll_timeout`.
//!
//! `outbound` is client to resource, `inbound` is resource to client; `rx`/`tx` belong to devices and rings.

pub mod addr;
pub mod command;
pub mod flow;
pub mod ids;
pub mod inquiry;
pub mod names;
pub mod pattern;
pub mod portal;
pub mod sink;

pub mod control;
pub mod relay;
pub mod worker;

pub use command::{Command, WorkerEvent};
pub use ids::{ClientId, ConnectionIndex, RelayId, ResourceId, WorkerId};
pub use sink::{Datagram, Ecn, Handover, Passed, Route, Sink, Transmit};

/// True in a build whose WireGuard clock is set by tests (feature `mock-instant`); the daemon refuses to be built so.
pub const MOCK_CLOCK: bool = cfg!(feature = "mock-instant");
