//! The number by which the worker's parts speak of a client. Knows nothing of clients.

/// A client's place in [`Peers`](super::peers::Peers). Places are used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slot(pub u32);
