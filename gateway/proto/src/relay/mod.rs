//! The TURN client: allocations and channels (connections.md section 8, relay-dialect.md).
