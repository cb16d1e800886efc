//! One table of frames with the verdict about each, for [`decide`](crate::decide) in user space and for the compiled
//! program; never in a shipped binary. The world they arrive in is [`World::example`].

use std::collections::{BTreeMap, BTreeSet};
use std::string::{String, ToString as _};
use std::vec::Vec;
use std::{cell::RefCell, format, vec};

use crate::budget::{ANYONE, Budget, PEER};
use crate::classify::STUN_MAGIC;
use crate::decide::{Look, Purse};
use crate::frame_table::{ethernet, ipv4_between, ipv6_between, udp_between};
use crate::maps::{ChannelKey, Endpoint, Owner, RelayId, SessionKey, TunnelKey};
use crate::steer_table::{channel, message};
use crate::{DropReason, Verdict};

/// A frame and what is done with it.
#[derive(Debug)]
pub struct Row {
    /// Names the row in a failing test.
    pub name: String,
    /// From the Ethernet header on.
    pub bytes: Vec<u8>,
    /// What is done with it.
    pub verdict: Verdict,
}

/// Address and port, as in [`Endpoint`].
pub type At = ([u8; 16], [u8; 2]);

/// The maps of the kernel plane, in user space.
#[derive(Debug, Default)]
pub struct World {
    /// See [`Config`](crate::maps::Config).
    pub enabled: bool,
    /// See [`LOCAL`](crate::maps::LOCAL).
    pub local: BTreeSet<At>,
    /// See [`RELAYS`](crate::maps::RELAYS).
    pub relays: BTreeMap<At, u32>,
    /// See [`CHANNELS`](crate::maps::CHANNELS).
    pub channels: RefCell<BTreeMap<(u32, u32), Budget>>,
    /// See [`PEERS`](crate::maps::PEERS).
    pub peers: RefCell<BTreeMap<At, Budget>>,
    /// See [`HANDSHAKES`](crate::maps::HANDSHAKES).
    pub anyone: RefCell<Budget>,
    /// See [`SESSIONS`](crate::maps::SESSIONS).
    pub sessions: BTreeMap<u32, u32>,
    /// See [`UFRAGS`](crate::maps::UFRAGS).
    pub ufrags: BTreeSet<[u8; 4]>,
    /// Now, in ns.
    pub now: u64,
}

/// Ours.
pub const PORT: [u8; 2] = 52_625_u16.to_be_bytes();
const HERE4: [u8; 4] = [192, 0, 2, 2];
const HERE6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
const RELAY4: ([u8; 4], [u8; 2]) = ([198, 51, 100, 3], 3478_u16.to_be_bytes());
const RELAY6: ([u8; 16], [u8; 2]) =
    ([0x20, 1, 0xd, 0xb8, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3], 3478_u16.to_be_bytes());
const PEER4: ([u8; 4], [u8; 2]) = ([203, 0, 113, 9], 40_000_u16.to_be_bytes());
const PEER6: ([u8; 16], [u8; 2]) =
    ([0x20, 1, 0xd, 0xb8, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9], 40_000_u16.to_be_bytes());
const STRANGER4: ([u8; 4], [u8; 2]) = ([203, 0, 113, 66], 1024_u16.to_be_bytes());
const STRANGER6: ([u8; 16], [u8; 2]) =
    ([0x20, 1, 0xd, 0xb8, 0, 0x66, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], 1024_u16.to_be_bytes());
/// A peer, and a channel of both relays, whose budgets are used up.
const BUSY4: ([u8; 4], [u8; 2]) = ([203, 0, 113, 10], 40_001_u16.to_be_bytes());
const BUSY_CHANNEL: u16 = 0x4005;
const BOUND: u16 = 0x4001;
const UFRAG: [u8; 4] = *b"ab3d";
const SESSION: u32 = 0x6c_4c25;
const WORKER: u32 = 3;
/// "Used up" for ever, as far as any clock goes.
const NEVER: Budget = Budget { full_at: 1 << 62 };

impl World {
    /// What the rows of [`all`] are decided in.
    #[must_use]
    pub fn example() -> Self {
        let mut world = Self { enabled: true, now: 1 << 40, ..Self::default() };
        let mapped = |address| TunnelKey::v4(address).address;
        world.local.extend([(mapped(HERE4), PORT), (HERE6, PORT)]);
        world.relays.extend([((mapped(RELAY4.0), RELAY4.1), 7), ((RELAY6.0, RELAY6.1), 8)]);
        let mut channels = BTreeMap::new();
        for relay in [7, 8] {
            channels.insert((relay, u32::from(BOUND)), Budget::default());
            channels.insert((relay, u32::from(BUSY_CHANNEL)), NEVER);
        }
        // Bound on one relay only.
        channels.insert((7, 0x4007), Budget::default());
        let peers = BTreeMap::from([
            ((mapped(PEER4.0), PEER4.1), Budget::default()),
            ((PEER6.0, PEER6.1), Budget::default()),
            ((mapped(BUSY4.0), BUSY4.1), NEVER),
        ]);
        (world.channels, world.peers) = (channels.into(), peers.into());
        world.sessions.extend([(SESSION, WORKER), (0, 0), (0xff_ffff, 63)]);
        world.ufrags.insert(UFRAG);
        world
    }
}

impl Look for World {
    fn enabled(&self) -> bool {
        self.enabled
    }
    fn local(&self, to: &Endpoint) -> bool {
        self.local.contains(&(to.address, to.port))
    }
    fn relay(&self, from: &Endpoint) -> Option<RelayId> {
        self.relays.get(&(from.address, from.port)).map(|id| RelayId { id: *id })
    }
    fn channel(&self, key: &ChannelKey) -> bool {
        self.channels.borrow().contains_key(&(key.relay, key.number))
    }
    fn session(&self, key: &SessionKey) -> Option<Owner> {
        self.sessions.get(&key.connection).map(|worker| Owner { worker: *worker })
    }
    fn ufrag(&self, ufrag: [u8; 4]) -> bool {
        self.ufrags.contains(&ufrag)
    }
    fn spend(&self, purse: &Purse) -> Option<bool> {
        match purse {
            Purse::Peer(Endpoint { address, port, .. }) => {
                self.peers.borrow_mut().get_mut(&(*address, *port)).map(|b| b.spend(PEER, self.now))
            }
            Purse::Channel(ChannelKey { relay, number }) => {
                self.channels.borrow_mut().get_mut(&(*relay, *number)).map(|b| b.spend(PEER, self.now))
            }
            Purse::Anyone => Some(self.anyone.borrow_mut().spend(ANYONE, self.now)),
        }
    }
}

/// Who sends a frame, in both families.
#[derive(Clone, Copy)]
enum Sender {
    Relay,
    Peer,
    Stranger,
}

/// Payloads, their senders, and what is done with them whatever they are wrapped in.
fn payloads() -> Vec<(&'static str, Sender, Vec<u8>, Verdict)> {
    use DropReason as R;
    use Sender::{Peer, Relay, Stranger};
    use Verdict::{Drop, Pass};
    let data = |len| message(4, SESSION, len);
    let direct = Verdict::Redirect { worker: WORKER, strip: 0 };
    let relayed = Verdict::Redirect { worker: WORKER, strip: 4 };
    let other = SESSION + 1;
    vec![
        ("data", Peer, data(1312), direct),
        ("keepalive", Peer, data(32), direct),
        ("data from an address nobody knows", Stranger, data(96), direct),
        ("data straight from a relay", Relay, data(96), direct),
        ("the first index", Peer, message(4, 0, 64), Verdict::Redirect { worker: 0, strip: 0 }),
        ("the last index", Peer, message(4, 0xff_ffff, 64), Verdict::Redirect { worker: 63, strip: 0 }),
        ("data of nobody", Peer, message(4, other, 96), Drop(R::UnknownSession)),
        ("data of 31 bytes", Peer, data(31), Drop(R::MalformedWireGuard)),
        ("a response", Peer, message(2, SESSION, 92), Pass),
        ("a response to nobody", Peer, message(2, other, 92), Drop(R::UnknownSession)),
        ("a short response", Peer, message(2, SESSION, 91), Drop(R::MalformedWireGuard)),
        ("a cookie reply", Peer, message(3, SESSION, 64), Pass),
        ("a cookie reply to nobody", Peer, message(3, other, 64), Drop(R::UnknownSession)),
        ("a long cookie reply", Peer, message(3, SESSION, 65), Drop(R::MalformedWireGuard)),
        ("an initiation of a peer", Peer, message(1, 0, 148), Pass),
        ("an initiation of a stranger", Stranger, message(1, 0, 148), Pass),
        ("a short initiation", Peer, message(1, 0, 147), Drop(R::MalformedWireGuard)),
        ("relayed data", Relay, channel(BOUND, &data(1312)), relayed),
        ("a relayed keepalive", Relay, channel(BOUND, &data(32)), relayed),
        ("relayed data of nobody", Relay, channel(BOUND, &message(4, other, 96)), Drop(R::UnknownSession)),
        ("relayed data, no relay", Stranger, channel(BOUND, &data(96)), Drop(R::UnknownRelay)),
        ("relayed data on no channel", Relay, channel(0x4002, &data(96)), Drop(R::UnboundChannel)),
        ("a channel number beyond the RFC's", Relay, channel(0x7fff, &data(96)), Drop(R::UnboundChannel)),
        ("a relayed initiation", Relay, channel(BOUND, &message(1, 0, 148)), Pass),
        (
            "a relayed initiation too many",
            Relay,
            channel(BUSY_CHANNEL, &message(1, 0, 148)),
            Drop(R::HandshakeBudget),
        ),
        ("data on a channel without budget", Relay, channel(BUSY_CHANNEL, &data(96)), relayed),
        ("a relayed response of nobody", Relay, channel(BOUND, &message(2, other, 92)), Pass),
        ("relayed short data", Relay, channel(BOUND, &data(31)), Pass),
        ("relayed STUN", Relay, channel(BOUND, &stun(1, &[])), Pass),
        ("an empty channel message", Relay, channel(BOUND, &[]), Pass),
        ("a channel message of one byte", Relay, channel(BOUND, &[4]), Pass),
        ("ChannelData in ChannelData", Relay, channel(BOUND, &channel(BOUND, &data(64))), Pass),
        (
            "ChannelData that says more than it has",
            Relay,
            [&[0x40, 1, 0, 97][..], &data(96)].concat(),
            Drop(R::MalformedChannelData),
        ),
        (
            "ChannelData that says less than it has",
            Relay,
            [&[0x40, 1, 0, 95][..], &data(96)].concat(),
            Drop(R::MalformedChannelData),
        ),
        ("a check that names us", Stranger, stun(1, &[(6, b"ab3d:wxyz")]), Pass),
        ("a check that names nobody", Stranger, stun(1, &[(6, b"ab3e:wxyz")]), Drop(R::UnmatchedStun)),
        ("a check of four bytes", Stranger, stun(1, &[(6, b"ab3d")]), Pass),
        ("a check of three bytes", Stranger, stun(1, &[(6, b"ab3")]), Drop(R::UnmatchedStun)),
        ("a check without a name", Stranger, stun(1, &[(0x24, &[1; 4])]), Drop(R::UnmatchedStun)),
        ("a check with nothing", Stranger, stun(1, &[]), Drop(R::UnmatchedStun)),
        (
            "a check that names us late",
            Stranger,
            stun(1, &[(0x24, &[1; 4]), (0x802a, &[2; 8]), (0x8022, &[3; 5]), (6, b"ab3d:wxyz")]),
            Pass,
        ),
        (
            "a check that names us eighth",
            Stranger,
            stun(
                1,
                &[
                    (1, &[][..]),
                    (1, &[]),
                    (1, &[]),
                    (1, &[]),
                    (1, &[]),
                    (1, &[]),
                    (1, &[]),
                    (6, b"ab3e:wxyz"),
                ],
            ),
            Drop(R::UnmatchedStun),
        ),
        ("a check of nine attributes", Stranger, stun(1, &[(1, &[][..]); 9]), Pass),
        ("a check of eight attributes", Stranger, stun(1, &[(1, &[][..]); 8]), Drop(R::UnmatchedStun)),
        (
            "a check whose name is further than we look",
            Stranger,
            stun(1, &[(0x8022, &[3; 1204][..]), (6, b"ab3e:wxyz")]),
            Pass,
        ),
        ("a check whose attribute lies", Stranger, lying(stun(1, &[(1, &[0; 8])])), Drop(R::UnmatchedStun)),
        ("a check whose name lies", Stranger, lying(stun(1, &[(6, b"ab3d")])), Drop(R::UnmatchedStun)),
        ("a success of anybody", Stranger, stun(0x101, &[]), Pass),
        ("an error of anybody", Stranger, stun(0x111, &[]), Pass),
        ("an indication of anybody", Stranger, stun(0x011, &[]), Drop(R::UnmatchedStun)),
        ("a request of a relay", Relay, stun(1, &[]), Pass),
        ("an indication of a relay", Relay, stun(0x17, &[(0x12, &[0; 8])]), Pass),
        ("no bytes", Stranger, vec![], Drop(R::EmptyDatagram)),
        ("one zero", Stranger, vec![0], Drop(R::UnknownPayload)),
        ("DTLS", Stranger, vec![22, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0], Drop(R::UnknownPayload)),
        ("text", Stranger, b"GET / HTTP/1.1\r\n\r\n".to_vec(), Drop(R::MalformedChannelData)),
        ("a relay's padding", Relay, vec![0; 40], Drop(R::UnknownPayload)),
    ]
}

/// Every row.
#[must_use]
pub fn all() -> Vec<Row> {
    let mut rows = Vec::new();
    for (what, from, payload, verdict) in payloads() {
        let (v4, v6) = match from {
            Sender::Relay => (RELAY4, RELAY6),
            Sender::Peer => (PEER4, PEER6),
            Sender::Stranger => (STRANGER4, STRANGER6),
        };
        let four = ipv4_between(v4.0, HERE4, 17, &udp_between(v4.1, PORT, &payload));
        let six = ipv6_between(v6.0, HERE6, 17, &udp_between(v6.1, PORT, &payload));
        let mut padded = ethernet(&[], 0x0800, &four);
        padded.extend([4; 6]);
        let elsewhere = ipv4_between(v4.0, [192, 0, 2, 3], 17, &udp_between(v4.1, PORT, &payload));
        let other_port = ipv6_between(v6.0, HERE6, 17, &udp_between(v6.1, [1, 1], &payload));
        let mut row = |how: &str, bytes, verdict| {
            rows.push(Row { name: format!("{what}, {how}"), bytes, verdict });
        };
        row("IPv4", ethernet(&[], 0x0800, &four), verdict);
        row("IPv6", ethernet(&[], 0x86dd, &six), verdict);
        row("IPv4 with a VLAN tag", ethernet(&[0x8100], 0x0800, &four), verdict);
        row("IPv6 with a service tag", ethernet(&[0x88a8], 0x86dd, &six), verdict);
        row("IPv4 with Ethernet padding", padded, verdict);
        row("to another host", ethernet(&[], 0x0800, &elsewhere), Verdict::Pass);
        row("to another port", ethernet(&[], 0x86dd, &other_port), Verdict::Pass);
        row("with two tags", ethernet(&[0x88a8, 0x8100], 0x0800, &four), Verdict::Pass);
    }
    rows.extend(others().into_iter().map(|(name, bytes, verdict)| Row {
        name: name.to_string(),
        bytes,
        verdict,
    }));
    rows.extend(
        crate::frame_table::all().into_iter().filter(|sample| sample.payload.is_none()).map(|sample| Row {
            name: sample.name,
            bytes: sample.bytes,
            verdict: Verdict::Pass,
        }),
    );
    rows.extend(cut());
    rows
}

fn others() -> Vec<(&'static str, Vec<u8>, Verdict)> {
    let data = message(4, SESSION, 96);
    let four = |from, to, payload: &[u8]| {
        ethernet(&[], 0x0800, &ipv4_between(from, to, 17, &udp_between([9, 9], PORT, payload)))
    };
    let six = |from, to, payload: &[u8]| {
        ethernet(&[], 0x86dd, &ipv6_between(from, to, 17, &udp_between(RELAY4.1, PORT, payload)))
    };
    let mapped = |address| TunnelKey::v4(address).address;
    let busy = ipv4_between(BUSY4.0, HERE4, 17, &udp_between(BUSY4.1, PORT, &message(1, 0, 148)));
    let half = ipv6_between(RELAY6.0, HERE6, 17, &udp_between(RELAY6.1, PORT, &channel(0x4007, &data)));
    let whole = ipv4_between(RELAY4.0, HERE4, 17, &udp_between(RELAY4.1, PORT, &channel(0x4007, &data)));
    let port = ipv4_between(RELAY4.0, HERE4, 17, &udp_between([9, 9], PORT, &channel(BOUND, &data)));
    vec![
        (
            "an initiation too many of a peer",
            ethernet(&[], 0x0800, &busy),
            Verdict::Drop(DropReason::HandshakeBudget),
        ),
        (
            "a channel of the other relay",
            ethernet(&[], 0x86dd, &half),
            Verdict::Drop(DropReason::UnboundChannel),
        ),
        (
            "a channel of this relay",
            ethernet(&[], 0x0800, &whole),
            Verdict::Redirect { worker: WORKER, strip: 4 },
        ),
        (
            "another port of a relay's host",
            ethernet(&[], 0x0800, &port),
            Verdict::Drop(DropReason::UnknownRelay),
        ),
        ("IPv6 to our mapped address", six(RELAY6.0, mapped(HERE4), &data), Verdict::Pass),
        (
            "IPv6 from a relay's mapped address",
            six(mapped(RELAY4.0), HERE6, &channel(BOUND, &data)),
            Verdict::Pass,
        ),
        ("IPv6 from a mapped address, junk", six(mapped(RELAY4.0), HERE6, b"junk"), Verdict::Pass),
        ("IPv6 to a compatible address", six(RELAY6.0, compatible(HERE4), &data), Verdict::Pass),
        (
            "IPv6 from a compatible address",
            six(compatible(RELAY4.0), HERE6, &channel(BOUND, &data)),
            Verdict::Drop(DropReason::UnknownRelay),
        ),
        ("junk to a multicast group", four([203, 0, 113, 66], [224, 0, 0, 1], b"junk"), Verdict::Pass),
        ("junk to everybody", four([203, 0, 113, 66], [255; 4], b"junk"), Verdict::Pass),
        ("data from ourselves", four(HERE4, HERE4, &data), Verdict::Redirect { worker: WORKER, strip: 0 }),
    ]
}

/// Frames that end at any byte: the IP header says more than there is, so the kernel gets them.
fn cut() -> Vec<Row> {
    let data = channel(BOUND, &message(4, SESSION, 32));
    let four = ipv4_between(RELAY4.0, HERE4, 17, &udp_between(RELAY4.1, PORT, &data));
    let six = ipv6_between(RELAY6.0, HERE6, 17, &udp_between(RELAY6.1, PORT, &data));
    let mut rows = Vec::new();
    for (name, frame) in [
        ("IPv4", ethernet(&[], 0x0800, &four)),
        ("IPv4 with a tag", ethernet(&[0x8100], 0x0800, &four)),
        ("IPv6", ethernet(&[], 0x86dd, &six)),
    ] {
        rows.extend((0..frame.len()).map(|at| Row {
            name: format!("{name} cut to {at} bytes"),
            bytes: frame[..at].to_vec(),
            verdict: Verdict::Pass,
        }));
    }
    rows
}

/// A STUN message; values are padded as they must be.
#[must_use]
pub fn stun(kind: u16, attributes: &[(u16, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (kind, value) in attributes {
        body.extend(kind.to_be_bytes());
        body.extend(u16::try_from(value.len()).expect("short").to_be_bytes());
        body.extend(*value);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    let len = u16::try_from(body.len()).expect("short").to_be_bytes();
    [&kind.to_be_bytes()[..], &len, &STUN_MAGIC, &[7; 12], &body].concat()
}

/// The first attribute claims 64 KiB.
fn lying(mut stun: Vec<u8>) -> Vec<u8> {
    stun[22..24].copy_from_slice(&[0xff, 0xff]);
    stun
}

/// RFC 4291 section 2.5.5.1, not the mapped form.
fn compatible([a, b, c, d]: [u8; 4]) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d]
}
