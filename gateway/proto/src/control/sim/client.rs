//! The client of the simulation: the ICE library's controlling agent and a TURN client of its own. It knows nothing
//! of control but what is on the wire.

use std::{
    collections::HashMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use is::{Candidate, IceAgent, IceAgentEvent, IceConnectionState, IceCreds, Protocol, stun};
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::{
    addr::TunnelAddrs,
    command::{ChannelUse, StunDatagram},
    ids::{ClientId, RelayId, ResourceId},
    portal::messages::{
        Authorize, ClientIdentity, Egress, IceCredentials, Key, Resource, ResourceKind, UnixSeconds,
    },
    relay::{LocalCandidate, RelayEvent, Relays, Use, twin::Packet},
    sink::Transmit,
};

/// The client.
pub(in crate::control) struct Client {
    pub(in crate::control) id: ClientId,
    pub(in crate::control) agent: IceAgent,
    pub(super) relays: Relays,
    pub(super) relay: RelayId,
    pub(super) hosts: Vec<SocketAddr>,
    relayed: Vec<SocketAddr>,
    channels: HashMap<(SocketAddr, u16), SocketAddr>,
    /// Its local candidates as it signals them.
    pub(in crate::control) signalled: Vec<String>,
    pub(super) to_signal: Vec<String>,
    out: Vec<Transmit>,
    /// What reached it that is neither STUN nor TURN.
    pub(in crate::control) inbox: Vec<Vec<u8>>,
    pub(in crate::control) nominated: Option<(SocketAddr, SocketAddr)>,
    /// Told to start by the gateway's acknowledgement.
    pub(in crate::control) authorized: usize,
    started: bool,
    silent: bool,
}

impl Client {
    pub(super) fn new(host: SocketAddr, now: Instant) -> Self {
        let creds = |c: IceCredentials| IceCreds { ufrag: c.username, pass: c.password.to_string() };
        let (gateway, client) = credentials();
        let mut agent = IceAgent::new(creds(client));
        agent.set_remote_credentials(creds(gateway));
        agent.set_controlling(true);
        agent.set_timing_advance(Duration::ZERO);
        // "HEAD client active" (connections.md section 6.6).
        agent.set_max_stun_retransmits(12);
        agent.set_max_stun_rto(Duration::from_millis(1500));
        agent.handle_timeout(now);
        // The first event holds the credentials, and the library logs what it hands out.
        while agent.poll_event().is_some() {}
        Self {
            id: ClientId(Uuid::from_u128(0xC)),
            agent,
            relays: Relays::new(99),
            relay: RelayId(Uuid::nil()),
            hosts: vec![host],
            relayed: Vec::new(),
            channels: HashMap::new(),
            signalled: Vec::new(),
            to_signal: Vec::new(),
            out: Vec::new(),
            inbox: Vec::new(),
            nominated: None,
            authorized: 0,
            started: false,
            silent: false,
        }
    }

    /// What the portal tells the gateway when this client asks for `resource`.
    pub(in crate::control) fn authorize(&self, resource: u128, expires_at: Option<u64>) -> Authorize {
        let (gateway_ice, client_ice) = credentials();
        Authorize {
            reference: format!("ref-{resource}"),
            resource: resource_of(resource),
            client: ClientIdentity {
                id: self.id,
                public_key: [7; 32],
                preshared_key: Key(Zeroizing::new([9; 32])),
                tunnel: TunnelAddrs {
                    v4: [100, 64, 2, 2].into(),
                    v6: "fd00:2021:1111::2:2".parse().unwrap(),
                },
            },
            client_ice,
            gateway_ice,
            expires_at: expires_at.map(UnixSeconds),
            use_iceless: false,
            flow_logs_ingest_token: None,
        }
    }

    /// Takes back a candidate: the line, for the portal.
    pub(in crate::control) fn withdraws(&mut self, kind: is::CandidateKind) -> String {
        let candidate = self.agent.local_candidates().find(|c| c.kind() == kind).unwrap();
        self.agent.invalidate_candidate(&candidate);
        candidate.to_sdp_string()
    }

    /// It neither signals nor checks nor answers any more.
    pub(in crate::control) fn falls_silent(&mut self) {
        self.silent = true;
    }

    pub(super) fn hears(&mut self, message: Egress, now: Instant) {
        if self.silent {
            return;
        }
        match message {
            Egress::Authorized { .. } => {
                self.authorized += 1;
                if !std::mem::replace(&mut self.started, true) {
                    let mut known = self.relays.host_and_reflexive();
                    known.extend(self.relays.relayed(self.relay));
                    known.iter().for_each(|candidate| self.adds(candidate));
                }
            }
            Egress::BroadcastIceCandidates(_, lines) => {
                for line in lines {
                    let candidate = Candidate::from_sdp_string(&line).unwrap();
                    if candidate.kind() != is::CandidateKind::Host {
                        self.relays.bind(self.relay, candidate.addr(), Use::Signalled, now);
                    }
                    self.agent.add_remote_candidate(candidate);
                }
            }
            Egress::BroadcastInvalidatedIceCandidates(_, lines) => {
                for line in lines {
                    self.agent.invalidate_candidate(&Candidate::from_sdp_string(&line).unwrap());
                }
            }
            Egress::NoRelays => {}
        }
        self.drive(now);
    }

    fn adds(&mut self, found: &LocalCandidate) {
        let candidate = match *found {
            LocalCandidate::Host(addr) => Candidate::host(addr, Protocol::Udp),
            LocalCandidate::Reflexive { addr, base } => {
                Candidate::server_reflexive(addr, base, Protocol::Udp)
            }
            LocalCandidate::Relayed { addr, local, .. } => {
                self.relayed.push(addr);
                Candidate::relayed(addr, local, Protocol::Udp)
            }
        };
        if let Some(added) = self.agent.add_local_candidate(candidate.unwrap()) {
            self.signalled.push(added.to_sdp_string());
            self.to_signal.push(added.to_sdp_string());
        }
    }

    pub(super) fn receives(&mut self, packet: &Packet, now: Instant) {
        let Packet { src, dst, payload } = packet;
        if let Some(data) = gateway_common::channel_data::parse(payload) {
            let Some(peer) = self.channels.get(&(*src, data.number)).copied() else { return };
            let used = ChannelUse { server: *src, number: data.number, received: true, sent: false };
            self.relays.handle_channels_used(&[used], now);
            let ours = self.relayed.iter().rev().find(|r| r.is_ipv4() == peer.is_ipv4());
            let Some(destination) = ours.copied() else { return };
            self.takes(data.payload, peer, destination, now);
            return;
        }
        let datagram = StunDatagram {
            heard_by: crate::WorkerId::FIRST,
            local: *dst,
            from: *src,
            via: None,
            payload: payload.clone(),
        };
        if !self.relays.handle_stun(&datagram, now) {
            self.takes(payload, *src, *dst, now);
        }
        self.drive(now);
    }

    fn takes(&mut self, payload: &[u8], source: SocketAddr, destination: SocketAddr, now: Instant) {
        match stun::StunMessage::parse(payload) {
            Ok(message) => {
                let packet = stun::StunPacket { proto: Protocol::Udp, source, destination, message };
                self.agent.handle_packet(now, packet);
            }
            Err(_) => self.inbox.push(payload.to_vec()),
        }
        self.drive(now);
    }

    pub(super) fn handle_timeout(&mut self, now: Instant) {
        self.relays.handle_timeout(now);
        self.drive(now);
    }

    fn drive(&mut self, now: Instant) {
        while let Some(event) = self.relays.poll_event() {
            match event {
                RelayEvent::Added(found, relay) if self.started && relay == self.relay => self.adds(&found),
                RelayEvent::ChannelOpened { server, number, peer, .. } => {
                    self.channels.insert((server, number), peer);
                }
                RelayEvent::ChannelGone { server, number, .. } => {
                    self.channels.remove(&(server, number));
                }
                _ => {}
            }
        }
        if !self.started || self.silent {
            return;
        }
        loop {
            self.agent.handle_timeout(now);
            while let Some(check) = self.agent.poll_transmit() {
                let payload = Vec::from(check.contents);
                if self.relayed.contains(&check.source) {
                    self.out.extend(self.relays.wrap(self.relay, check.destination, &payload, now));
                } else {
                    self.out.push(Transmit { src: Some(check.source), dst: check.destination, payload });
                }
            }
            while let Some(event) = self.agent.poll_event() {
                match event {
                    IceAgentEvent::NominatedSend { source, destination, .. } => {
                        self.nominated = Some((source, destination));
                    }
                    IceAgentEvent::IceConnectionStateChange(IceConnectionState::Disconnected) => {
                        self.nominated = None;
                    }
                    _ => {}
                }
            }
            if self.agent.poll_timeout().is_none_or(|at| at > now) {
                return;
            }
        }
    }

    pub(super) fn poll_transmit(&mut self) -> Option<Transmit> {
        self.relays.poll_transmit().or_else(|| (!self.out.is_empty()).then(|| self.out.remove(0)))
    }

    pub(super) fn poll_timeout(&mut self) -> Option<Instant> {
        let agent = (self.started && !self.silent).then(|| self.agent.poll_timeout()).flatten();
        [agent, self.relays.poll_timeout()].into_iter().flatten().min()
    }
}

/// (gateway's, client's), as in the recording `head-direct`.
pub(in crate::control) fn credentials() -> (IceCredentials, IceCredentials) {
    let of = |username: &str, password: &str| IceCredentials {
        username: username.to_owned(),
        password: Zeroizing::new(password.to_owned()),
    };
    (of("7swh", "v4gth7yrtmrzjum2tyhguq"), of("o7vl", "5dm2b4nl6bk6m77jluz5md"))
}

/// A network that differs by id, without filters.
pub(in crate::control) fn resource_of(id: u128) -> Resource {
    let network = IpNet::new([172, 20, u8::try_from(id).unwrap(), 0].into(), 24).unwrap();
    let kind = ResourceKind::Cidr { name: format!("lan {id}"), network, filters: Vec::new() };
    Resource { id: ResourceId(Uuid::from_u128(id)), kind }
}
