//! A relay as an operator wants to see it. Types only.

use std::{net::SocketAddr, time::Duration};

use crate::ids::RelayId;

/// One relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayView {
    /// The portal's name.
    pub id: RelayId,
    /// Its addresses, as the portal told them.
    pub addresses: Vec<SocketAddr>,
    /// The one that answered first and is used.
    pub active: Option<SocketAddr>,
    /// Smoothed round-trip time.
    pub rtt: Option<Duration>,
    /// How far we are with it.
    pub state: RelayState,
    /// Our addresses on it.
    pub relayed: Vec<SocketAddr>,
    /// Channels that it has confirmed.
    pub channels: usize,
}

/// How far we are with a relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RelayState {
    /// It has not answered.
    Silent,
    /// It answers, and has not granted an address.
    Answering,
    /// We have an address on it.
    Allocated,
    /// It is being given up.
    Failed,
}
