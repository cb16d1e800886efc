//! AF_XDP: frames from and to the device's own queues, past the socket layer.

#![expect(dead_code, reason = "only tests open such sockets until there is a fast path")]

mod memory;
mod port;
mod ring;
#[cfg(test)]
mod twin;
mod umem;
