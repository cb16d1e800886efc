//! AF_XDP: frames from and to the device's own queues, past the socket layer.
//!
//! ```text
//!   backend   one worker's fast path: datagrams in and out          order    rings before sockets, or after
//!      port   one worker's end of a queue: batches, way out         ways     which route has which headers
//!    socket   the sockets of a queue                                headers  Ethernet, IP, UDP
//!      umem   frames and who owns them                              neighbours, netlink   what the kernel would do
//!      ring   indices and entries        memory   mappings          probe, facts          what an interface can do
//! ```
//!
//! It decides nothing about clients and knows no BPF map: which frame reaches which socket is the program's business.

#![cfg_attr(
    not(test),
    expect(dead_code, reason = "only tests open such sockets until the daemon attaches XDP")
)]

mod backend;
mod facts;
mod headers;
mod memory;
mod neighbours;
mod netlink;
mod order;
mod port;
mod probe;
mod ring;
mod socket;
#[cfg(test)]
mod twin;
mod umem;
mod ways;

pub use self::backend::{Fast, MAX_PORTS, Refused, datagrams};
#[cfg(test)]
pub use self::{
    backend::{Figures, Place as FastPlace},
    facts::facts,
    headers::{Hop, PAYLOAD_AT},
    netlink::Watch,
    order::{Stage, Switch},
    port::{Port, Queue},
    probe::{Facts, Mode, Refusal, Wanted, probe},
    socket::{OpenError, Place, Sizes, Socket, Transfer, open},
    ways::{Board, Ways},
};
