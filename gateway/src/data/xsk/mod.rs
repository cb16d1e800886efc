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

pub use self::{
    backend::{Fast, Figures, MAX_PORTS, Place as FastPlace, Refused, datagrams},
    facts::facts,
    netlink::{Watch, route_interface},
    order::{Stage, Switch},
    probe::{Facts, Mode, Outcome, Refusal, Wanted, probe},
    socket::{MAX_SOCKETS, OpenError, Place, Sizes, Socket, Transfer, open},
    ways::{Board, Ways},
};
#[cfg(test)]
pub use self::{
    headers::{Hop, PAYLOAD_AT},
    port::{Port, Queue},
};
