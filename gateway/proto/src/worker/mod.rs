//! The data plane's state: every client belongs to exactly one worker, which alone holds its WireGuard state,
//! policy and paths.
