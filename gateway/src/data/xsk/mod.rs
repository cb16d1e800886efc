//! AF_XDP: frames from and to the device's own queues, past the socket layer.

#![expect(dead_code, reason = "only tests open such sockets until there is a fast path")]

mod backend;
mod headers;
mod memory;
mod neighbours;
mod netlink;
mod order;
mod port;
mod ring;
mod socket;
#[cfg(test)]
mod twin;
mod umem;
mod ways;

#[cfg(test)]
pub use self::{
    headers::{Hop, PAYLOAD_AT},
    netlink::Watch,
    port::{Port, Queue},
    socket::{OpenError, Place, Sizes, Socket, Transfer, open},
    ways::{Board, Ways},
};
