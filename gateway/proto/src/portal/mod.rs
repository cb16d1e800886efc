//! The portal's protocol, without its socket: messages, Phoenix framing, login URL, reconnect policy
//! (portal-protocol.md).

pub mod messages;
