//! The data plane's state: every client belongs to exactly one worker, which alone holds its WireGuard state,
//! policy and paths.

use std::time::Instant;

use gateway_common::{Counters, DropReason, PayloadKind, classify};
use x25519_dalek::StaticSecret;

use crate::{Command, Datagram, Sink, WorkerEvent};

/// What a worker is started with.
pub struct Config {
    /// The gateway's WireGuard key.
    pub private_key: StaticSecret,
    /// Let clients reach every port of the gateway's own tunnel address, not only DNS and ICMP echo.
    pub allow_own_ip: bool,
    /// Seeds the timers' spread.
    pub seed: u64,
    /// The present.
    pub now: Instant,
}

/// What one worker carried, by direction and by the kind of path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Client to resource, arrived on our own address.
    pub outbound_direct: Volume,
    /// Client to resource, arrived through a channel of ours.
    pub outbound_relayed: Volume,
    /// Resource to client, sent from our own address.
    pub inbound_direct: Volume,
    /// Resource to client, sent through a channel of ours.
    pub inbound_relayed: Volume,
}

/// Inner packets passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Volume {
    /// How many.
    pub packets: u64,
    /// Their bytes, IP headers included.
    pub bytes: u64,
}

/// One worker.
pub struct Worker {
    counters: Counters,
    traffic: Traffic,
}

impl Worker {
    /// A worker without clients.
    #[must_use]
    pub fn new(config: Config) -> Self {
        let _ = config;
        Self { counters: Counters::default(), traffic: Traffic::default() }
    }

    /// Control says what is true now. Goodbyes go out through `sink`.
    pub fn handle_command(&mut self, command: Command, now: Instant, sink: &mut impl Sink) {
        let _ = (command, now, sink);
    }

    /// A batch of received UDP payloads.
    pub fn handle_datagrams<'a>(
        &mut self,
        batch: impl IntoIterator<Item = Datagram<'a>>,
        now: Instant,
        sink: &mut impl Sink,
    ) {
        let _ = (now, sink);
        for datagram in batch {
            let reason = match classify(datagram.payload) {
                PayloadKind::Empty => DropReason::EmptyDatagram,
                _ => DropReason::UnknownPayload,
            };
            self.counters.count(reason);
        }
    }

    /// A batch of IP packets from the TUN device.
    pub fn handle_packets<'a>(
        &mut self,
        batch: impl IntoIterator<Item = &'a mut [u8]>,
        now: Instant,
        sink: &mut impl Sink,
    ) {
        let _ = (now, sink);
        for _ in batch {
            self.counters.count(DropReason::NotAPeer);
        }
    }

    /// The deadline of [`Worker::poll_timeout`] has passed.
    pub fn handle_timeout(&mut self, now: Instant, sink: &mut impl Sink) {
        let _ = (now, sink);
    }

    /// What control must hear; `None` once the queue is empty.
    pub fn poll_event(&mut self) -> Option<WorkerEvent> {
        None
    }

    /// When [`Worker::handle_timeout`] wants to be called next; `None` while there is nothing to time.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        None
    }

    /// Packets dropped so far, by reason.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// For what the backend drops on its side.
    pub fn counters_mut(&mut self) -> &mut Counters {
        &mut self.counters
    }

    /// Inner packets passed on so far.
    #[must_use]
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }
}
