//! AF_XDP: frames from and to the device's own queues, past the socket layer.

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
