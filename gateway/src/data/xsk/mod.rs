//! AF_XDP: frames from and to the device's own queues, past the socket layer.

#![expect(dead_code, reason = "only tests open such sockets until there is a fast path")]

mod headers;
mod memory;
mod port;
mod ring;
mod socket;
#[cfg(test)]
mod twin;
mod umem;

#[cfg(test)]
pub use self::{
    port::{Port, Queue},
    socket::{OpenError, Place, Sizes, Socket, Transfer, open},
};
