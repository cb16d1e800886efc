//! One client: who it is, what it may, how it is reached. Knows its own state only; who looks for it is peers.rs.

use std::{
    collections::VecDeque,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use gateway_common::DropReason;

use super::{
    Volume,
    account::Denials,
    bucket::{Bucket, Rate},
    flows::Flows,
    handshake::Gate,
    inner::Inner,
    names::ProxyTable,
    nat::{Limits, Nat, NatRefusal},
    policy::{Class, Decision, Policy},
    wg::Wg,
    wheel::Tick,
};
use crate::{
    addr::TunnelAddrs,
    command::{ClientState, Connection, ConnectionKeys, Path},
    flow::Attributions,
    ids::{ClientId, ConnectionIndex},
    names::{Answer, Names},
    portal::messages::Resource,
};

/// A client.
pub struct Peer {
    /// The portal's name.
    pub id: ClientId,
    /// The order that made it this worker's, see [`Home::order`](crate::command::Home::order).
    pub order: u64,
    /// The only source addresses it may use.
    pub tunnel: TunnelAddrs,
    /// What it may reach.
    pub policy: Policy,
    /// What `policy` was compiled from.
    resources: Arc<[Resource]>,
    /// The proxy addresses it has assigned to names.
    pub proxies: ProxyTable,
    /// Translates what goes there; made for the first packet.
    pub nat: Option<Box<Nat>>,
    /// What its flows carry, while that is counted.
    pub flows: Option<Box<Flows>>,
    /// Whom they are attributed to.
    pub attributions: Attributions,
    /// What is told of its packets that are denied.
    pub denials: Denials,
    /// A random number of its own.
    seed: u64,
    /// What `proxies` was made from, and the answers about it.
    names: Arc<Names>,
    /// The serial of the last answer that was sent, or was not for this worker to send.
    told: u64,
    /// Where its checks came from, see [`ClientState::heard_from`].
    pub heard_from: Arc<[SocketAddr]>,
    /// Its connection, if control has made one. About 12 KB, hence apart.
    pub link: Option<Box<Link>>,
    /// Budget of initiations from its direct path and from where its checks came from.
    pub handshakes: Bucket,
    /// Packets of it that were passed on, for who asks about it.
    pub outbound: Volume,
    /// Packets to it that were sent.
    pub inbound: Volume,
    /// When the wheel looks at it next; other entries are stale.
    pub due: Tick,
    icmp: Bucket,
    control: Bucket,
    activity: Option<Instant>,
}

/// A client's connection.
pub struct Link {
    /// The upper bits of our WireGuard indices.
    pub index: ConnectionIndex,
    /// The client's WireGuard key.
    pub public_key: [u8; 32],
    /// Sessions and their timers.
    pub wg: Wg,
    /// The nominated path.
    pub path: Option<Path>,
    /// WireGuard messages without a path to leave by (connections.md section 5.1 step 7).
    pub held: VecDeque<Vec<u8>>,
}

/// "ring of 128 outgoing WireGuard packets"
const HELD: usize = 128;
/// Denials per client: plenty for a host that tries many addresses, nothing for a scanner.
const ICMP: Rate = Rate { per_second: 100, burst: 200 };
/// Assignments per client: one for every name that somebody looks up there. What is not answered is repeated after 2 s.
const CONTROL: Rate = Rate { per_second: 20, burst: 100 };
/// [`WorkerEvent::Activity`](crate::WorkerEvent::Activity) is coarse.
const ACTIVITY: Duration = Duration::from_secs(5);

impl Peer {
    /// A client that control has just told of. `seed` is random and this client's own.
    pub fn new(id: ClientId, order: u64, state: &ClientState, gate: &Gate, seed: u64) -> Self {
        let mut proxies = ProxyTable::new(seed);
        proxies.update(&state.names.domains);
        let mut peer = Self {
            id,
            order,
            tunnel: state.tunnel,
            policy: Policy::new(&state.resources),
            resources: Arc::clone(&state.resources),
            proxies,
            nat: None,
            flows: None,
            attributions: Arc::clone(&state.attributions),
            denials: Denials::default(),
            seed,
            names: Arc::clone(&state.names),
            // These are answers to questions of an earlier life of the client.
            told: state.names.answers.last().map_or(0, |answer| answer.serial),
            heard_from: Arc::clone(&state.heard_from),
            link: None,
            handshakes: Bucket::FULL,
            outbound: Volume::default(),
            inbound: Volume::default(),
            due: Tick::default(),
            icmp: Bucket::FULL,
            control: Bucket::FULL,
            activity: None,
        };
        peer.connect(&state.connection, gate);
        peer
    }

    /// Becomes what control says. True if it has a new connection, whose timers are to run.
    pub fn apply(&mut self, state: &ClientState, gate: &Gate, now: Instant) -> bool {
        if self.tunnel != state.tunnel {
            self.tunnel = state.tunnel;
            // Answers to what it sent from its former address are not for whoever has that now.
            if let Some(nat) = &mut self.nat {
                nat.clear();
            }
        }
        self.heard_from = Arc::clone(&state.heard_from);
        if !Arc::ptr_eq(&self.resources, &state.resources) {
            self.policy.replace(&state.resources);
            self.resources = Arc::clone(&state.resources);
        }
        if !self.proxies.is(&state.names.domains) {
            self.rename(state, now);
        }
        self.names = Arc::clone(&state.names);
        self.attributions = Arc::clone(&state.attributions);
        self.connect(&state.connection, gate)
    }

    /// The answers that the client has not heard, with its connection. They count as heard from now on: one that cannot
    /// be sent is asked for again (dns.md section 5.1).
    pub fn take_answers(&mut self) -> Option<(&[Answer], &mut Link)> {
        let answers = &self.names.answers;
        let new = &answers[answers.partition_point(|answer| answer.serial <= self.told)..];
        self.told = new.last()?.serial;
        Some((new, self.link.as_deref_mut()?))
    }

    /// An address that is another name's now must not lead to the former one's sessions. All others stay, whatever
    /// stands behind their proxy addresses by now.
    fn rename(&mut self, state: &ClientState, now: Instant) {
        let moved = self.proxies.update(&state.names.domains);
        if let Some(nat) = self.nat.as_mut().filter(|_| !moved.is_empty()) {
            nat.forget(&moved, now);
        }
        self.policy.on_names_changed();
    }

    /// May traffic of this class pass between the client and the proxy address `ip`?
    #[inline]
    pub fn decide_proxy(&mut self, ip: IpAddr, class: Class) -> Decision {
        let resources = self.proxies.get(ip).map_or(&[][..], |proxy| &proxy.domain.resources);
        self.policy.decide_proxy(ip, resources, class)
    }

    /// Translates a packet to a proxy address, behind which stands `real`. An error leaves it as it is.
    #[inline]
    pub fn translate(
        &mut self,
        packet: &mut [u8],
        view: &mut Inner,
        real: IpAddr,
        now: Instant,
    ) -> Result<(), DropReason> {
        let nat = match &mut self.nat {
            Some(nat) => nat,
            none => none.insert(new_nat(self.seed, now)),
        };
        match nat.outbound(packet, view, real, now) {
            Ok(_) => Ok(()),
            Err(NatRefusal::Unsupported) => Err(DropReason::UnsupportedProtocol),
            Err(NatRefusal::OtherFamily) => Err(DropReason::NoTranslation),
            Err(NatRefusal::Exhausted | NatRefusal::Full) => Err(DropReason::NatExhausted),
        }
    }

    /// Ends the sessions whose time is up; true if there is no time for all of them now.
    pub fn end_sessions(&mut self, now: Instant) -> bool {
        let Some(nat) = &mut self.nat else { return false };
        let mut is_due = || {
            nat.poll_timeout().is_some_and(|at| at <= now) && {
                nat.handle_timeout(now);
                true
            }
        };
        // A few hundred each time.
        (0..4).all(|_| is_due())
    }

    /// Does something of it end by time?
    pub fn is_timed(&self) -> bool {
        self.link.is_some()
            || self.nat.as_ref().is_some_and(|nat| nat.poll_timeout().is_some())
            || self.flows.as_ref().is_some_and(|flows| flows.poll_timeout().is_some())
    }

    fn connect(&mut self, connection: &Connection, gate: &Gate) -> bool {
        match connection {
            Connection::Absent => {
                self.link = None;
                false
            }
            Connection::Present(keys, path) => match &mut self.link {
                Some(link) if link.index == keys.index => {
                    link.path = *path;
                    false
                }
                link => {
                    *link = Some(Box::new(Link::new(keys, *path, gate)));
                    self.activity = None;
                    true
                }
            },
        }
    }

    /// May one more denial go to this client?
    pub fn take_icmp(&mut self, now: Instant) -> bool {
        self.icmp.take(ICMP, now)
    }

    /// May this client say one thing more about names?
    pub fn take_control(&mut self, now: Instant) -> bool {
        self.control.take(CONTROL, now)
    }

    /// Application data flowed: is it time to tell control?
    #[inline]
    pub fn is_activity_due(&self, now: Instant) -> bool {
        self.activity.is_none_or(|last| now.saturating_duration_since(last) >= ACTIVITY)
    }

    /// Control was told.
    pub fn on_activity_told(&mut self, now: Instant) {
        self.activity = Some(now);
    }
}

#[cold]
fn new_nat(seed: u64, now: Instant) -> Box<Nat> {
    Box::new(Nat::new(seed, Limits::default(), now))
}

impl Link {
    fn new(keys: &ConnectionKeys, path: Option<Path>, gate: &Gate) -> Self {
        Self {
            index: keys.index,
            public_key: keys.public_key,
            wg: Wg::new(gate.private_key(), keys, gate.unlimited()),
            path,
            held: VecDeque::new(),
        }
    }

    /// Keeps a message until there is a path; the oldest goes when it is too many.
    pub fn hold(&mut self, message: &[u8]) {
        if self.held.len() >= HELD {
            self.held.pop_front();
        }
        self.held.push_back(message.to_vec());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connected_client_costs_less_than_24_kb() {
        let (peer, link) = (size_of::<Peer>(), size_of::<Link>());
        println!("peer {peer}, link {link}, memo {} bytes", Policy::MEMO_BYTES);
        assert!(peer + link + Policy::MEMO_BYTES < 24 << 10, "{peer} + {link} + {}", Policy::MEMO_BYTES);
    }
}
