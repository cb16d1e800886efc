//! What a running DNS server is to whoever holds it, whatever it speaks: an address and a task.

use std::net::SocketAddr;

use tokio::task::{JoinHandle, spawn_local};

/// A server on one address; it ends with [`Server::close`].
#[derive(Debug)]
pub struct Server {
    local: SocketAddr,
    task: JoinHandle<()>,
}

impl Server {
    /// One that listens on `local` already; `serve` is what it does.
    pub fn run(local: SocketAddr, serve: impl Future<Output = ()> + 'static) -> Self {
        Self { local, task: spawn_local(serve) }
    }

    /// Where it listens.
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// Whether it still does. Nothing but a panic ends it before [`Server::close`].
    pub fn is_running(&self) -> bool {
        !self.task.is_finished()
    }

    /// Frees the address and drops everything that belongs to it.
    pub async fn close(self) {
        self.task.abort();
        // Cancelled, as just ordered.
        let _ = self.task.await;
    }
}
