//! What is done with a frame on the uplink: one answer for the kernel, for user space and for the fuzzer.
//!
//! ```text
//! frame -> UDP? -> to one of LOCAL? -> what is it? -> RELAYS, CHANNELS, SESSIONS, PEERS, UFRAGS -> Verdict
//!            no: Pass     no: Pass
//! ```
//!
//! Whatever is dropped here would be dropped by a worker too, for the same reason; whatever is not understood is left to
//! the kernel. Nothing is verified: neither checksums (the network card's and the tag's business) nor signatures. The
//! frame is never changed. A redirected frame keeps its ChannelData header, whether or not the driver can adjust the
//! head, because the worker needs the channel's number to know the path; the verdict says how long that header is.

use crate::DropReason;
use crate::bytes::Bytes;
use crate::channel_data;
use crate::classify::{PayloadKind, Prefix, classify_prefix};
use crate::frame::{self, Ends, Frame};
use crate::maps::{ChannelKey, Endpoint, Owner, RelayId, SessionKey};

/// What is done with a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The kernel's own stack gets it.
    Pass,
    /// It goes to the AF_XDP socket of `worker` on the queue it came on; where there is none, it is passed.
    Redirect {
        /// The worker that owns the client.
        worker: u32,
        /// Bytes of UDP payload in front of the WireGuard message: 4 if there is a ChannelData header, else 0.
        strip: usize,
    },
    /// It is dropped.
    Drop(DropReason),
}

/// Whose handshakes a budget is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purse {
    /// An address that ICE has authenticated.
    Peer(Endpoint),
    /// A channel that is bound.
    Channel(ChannelKey),
    /// All others together.
    Anyone,
}

/// The maps, or a test's.
pub trait Look {
    /// False while the fast path is switched off: then everything passes.
    fn enabled(&self) -> bool;
    /// Is this an address and port that we listen on?
    fn local(&self, to: &Endpoint) -> bool;
    /// The relay whose server address this is.
    fn relay(&self, from: &Endpoint) -> Option<RelayId>;
    /// Is the channel bound and confirmed?
    fn channel(&self, key: &ChannelKey) -> bool;
    /// The worker of a connection.
    fn session(&self, key: &SessionKey) -> Option<Owner>;
    /// Is this the beginning of the username of somebody who may ask us?
    fn ufrag(&self, ufrag: [u8; 4]) -> bool;
    /// Takes one handshake out of a budget; false if it is used up, `None` if there is no such budget.
    fn spend(&self, purse: &Purse) -> Option<bool>;
}

/// The reasons that [`decide`] gives.
pub const REASONS: [DropReason; 9] = [
    DropReason::UnknownPayload,
    DropReason::EmptyDatagram,
    DropReason::MalformedChannelData,
    DropReason::UnknownRelay,
    DropReason::UnboundChannel,
    DropReason::MalformedWireGuard,
    DropReason::UnknownSession,
    DropReason::HandshakeBudget,
    DropReason::UnmatchedStun,
];

/// Decides about one Ethernet frame.
///
/// Always inlined, as the parsers are: the verifier must see the bounds of every read.
#[inline(always)]
#[must_use]
pub fn decide(packet: &(impl Bytes + ?Sized), maps: &impl Look) -> Verdict {
    if !maps.enabled() {
        return Verdict::Pass;
    }
    let Frame::Udp { at, len } = frame::parse(packet) else { return Verdict::Pass };
    let Some(Ends { from, to }) = frame::ends(packet, at) else { return Verdict::Pass };
    if !maps.local(&to) {
        return Verdict::Pass;
    }
    let Some(prefix) = Prefix::read(packet, at, len) else { return Verdict::Pass };
    match classify_prefix(&prefix) {
        PayloadKind::ChannelData => relayed(packet, at, &prefix, &from, maps),
        PayloadKind::Data => redirect(index_of(&prefix), 0, maps),
        PayloadKind::HandshakeInitiation => {
            let within = maps.spend(&Purse::Peer(from)).or_else(|| maps.spend(&Purse::Anyone));
            handshake(within)
        }
        PayloadKind::HandshakeResponse => match packet.read::<4>(at + RESPONSE_RECEIVER) {
            Some(index) => known(index, maps),
            None => Verdict::Pass,
        },
        PayloadKind::CookieReply => known(index_of(&prefix), maps),
        PayloadKind::Stun => stun(packet, at, &prefix, &from, maps),
        PayloadKind::MalformedChannelData => Verdict::Drop(DropReason::MalformedChannelData),
        PayloadKind::MalformedWireGuard => Verdict::Drop(DropReason::MalformedWireGuard),
        PayloadKind::Empty => Verdict::Drop(DropReason::EmptyDatagram),
        PayloadKind::Unknown => Verdict::Drop(DropReason::UnknownPayload),
    }
}

/// Where a response has its receiver index; data and cookie replies have it at 4.
const RESPONSE_RECEIVER: usize = 8;

/// ChannelData of exact length (relay-dialect.md section 4). What is inside a bound channel and neither data nor an
/// initiation is left to the worker: the sender has come through a relay that authenticated itself.
#[inline(always)]
fn relayed(
    packet: &(impl Bytes + ?Sized),
    at: usize,
    outer: &Prefix,
    from: &Endpoint,
    maps: &impl Look,
) -> Verdict {
    let Some(relay) = maps.relay(from) else { return Verdict::Drop(DropReason::UnknownRelay) };
    let [hi, lo, ..] = outer.head;
    let key = ChannelKey { relay: relay.id, number: u32::from(u16::from_be_bytes([hi, lo])) };
    if !maps.channel(&key) {
        return Verdict::Drop(DropReason::UnboundChannel);
    }
    let (at, len) = (at + channel_data::HEADER_LEN, outer.len - channel_data::HEADER_LEN);
    let Some(inner) = Prefix::read(packet, at, len) else { return Verdict::Pass };
    match classify_prefix(&inner) {
        PayloadKind::Data => redirect(index_of(&inner), channel_data::HEADER_LEN, maps),
        PayloadKind::HandshakeInitiation => handshake(maps.spend(&Purse::Channel(key))),
        _ => Verdict::Pass,
    }
}

#[inline(always)]
fn redirect(index: [u8; 4], strip: usize, maps: &impl Look) -> Verdict {
    match maps.session(&session(index)) {
        Some(owner) => Verdict::Redirect { worker: owner.worker, strip },
        None => Verdict::Drop(DropReason::UnknownSession),
    }
}

#[inline(always)]
fn known(index: [u8; 4], maps: &impl Look) -> Verdict {
    match maps.session(&session(index)) {
        Some(_) => Verdict::Pass,
        None => Verdict::Drop(DropReason::UnknownSession),
    }
}

/// A budget that is not there (a channel unbound this moment, a map without its entry) is no reason to drop.
#[inline(always)]
fn handshake(within: Option<bool>) -> Verdict {
    match within {
        Some(false) => Verdict::Drop(DropReason::HandshakeBudget),
        _ => Verdict::Pass,
    }
}

/// Bytes 4..8 of a message: the receiver index of data and of a cookie reply.
#[inline(always)]
fn index_of(prefix: &Prefix) -> [u8; 4] {
    let [_, _, _, _, index @ ..] = prefix.head;
    index
}

#[inline(always)]
fn session(index: [u8; 4]) -> SessionKey {
    SessionKey { connection: u32::from_le_bytes(index) >> 8 }
}

/// The two bits of a STUN type that are its class (RFC 8489 section 5, figure 3).
const CLASS: u16 = 0x0110;
const REQUEST: u16 = 0x0000;
const INDICATION: u16 = 0x0010;
const USERNAME: u16 = 0x0006;
const STUN_HEADER: usize = 20;
/// How many attributes of a request are looked through. ICE agents put USERNAME among the first; a request that does not
/// is left to the worker, so that nothing is dropped here that it would have answered.
const ATTRIBUTES: usize = 8;
/// How far into a request attributes are looked for, bytes. The verifier wants a bound; no check is longer than that.
const FURTHEST: usize = 1200;

/// STUN from a relay, and every response, is left to user space, which knows the transactions. A request from anybody
/// else must name one of us.
#[inline(always)]
fn stun(
    packet: &(impl Bytes + ?Sized),
    at: usize,
    prefix: &Prefix,
    from: &Endpoint,
    maps: &impl Look,
) -> Verdict {
    if maps.relay(from).is_some() {
        return Verdict::Pass;
    }
    let [hi, lo, ..] = prefix.head;
    match u16::from_be_bytes([hi, lo]) & CLASS {
        REQUEST => {}
        // connections.md section 7: binding indications are ignored.
        INDICATION => return Verdict::Drop(DropReason::UnmatchedStun),
        _ => return Verdict::Pass,
    }
    let end = prefix.len;
    let mut attribute = STUN_HEADER;
    for _ in 0..ATTRIBUTES {
        if attribute + 4 > end {
            return Verdict::Drop(DropReason::UnmatchedStun);
        }
        if attribute > FURTHEST {
            return Verdict::Pass;
        }
        let Some([hi, lo, len_hi, len_lo]) = packet.read::<4>(at + attribute) else { return Verdict::Pass };
        let len = usize::from(u16::from_be_bytes([len_hi, len_lo]));
        if u16::from_be_bytes([hi, lo]) == USERNAME {
            if len < 4 || attribute + 4 + len > end {
                return Verdict::Drop(DropReason::UnmatchedStun);
            }
            let Some(ufrag) = packet.read::<4>(at + attribute + 4) else { return Verdict::Pass };
            return match maps.ufrag(ufrag) {
                true => Verdict::Pass,
                false => Verdict::Drop(DropReason::UnmatchedStun),
            };
        }
        // RFC 8489 section 14: values are padded to four bytes.
        attribute += 4 + ((len + 3) & !3);
    }
    if attribute + 4 > end { Verdict::Drop(DropReason::UnmatchedStun) } else { Verdict::Pass }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;
    use crate::decide_table::{World, all};

    #[test]
    fn every_row_of_the_table_has_its_verdict() {
        let rows = all();
        assert!(rows.len() >= 150, "only {} rows", rows.len());
        for row in rows {
            assert_eq!(decide(&*row.bytes, &World::example()), row.verdict, "{}", row.name);
        }
    }

    #[test]
    fn every_verdict_and_every_reason_is_in_the_table() {
        let rows = all();
        for reason in REASONS {
            assert!(rows.iter().any(|row| row.verdict == Verdict::Drop(reason)), "no row for {reason:?}");
        }
        for strip in [0, 4] {
            let redirected = |verdict| matches!(verdict, Verdict::Redirect { strip: s, .. } if s == strip);
            assert!(rows.iter().any(|row| redirected(row.verdict)), "no row strips {strip}");
        }
        for row in &rows {
            if let Verdict::Drop(reason) = row.verdict {
                assert!(REASONS.contains(&reason), "{}: {reason:?} is not in the list", row.name);
            }
        }
    }

    #[test]
    fn everything_passes_while_switched_off() {
        let world = World { enabled: false, ..World::example() };
        for row in all() {
            assert_eq!(decide(&*row.bytes, &world), Verdict::Pass, "{}", row.name);
        }
    }

    #[test]
    fn nothing_is_dropped_that_is_not_for_us() {
        let world = World { local: Default::default(), ..World::example() };
        for row in all() {
            assert_eq!(decide(&*row.bytes, &world), Verdict::Pass, "{}", row.name);
        }
    }

    #[test]
    fn strangers_share_one_budget_and_peers_do_not_pay_for_them() {
        let world = World::example();
        let row =
            |name: &str| all().into_iter().find(|row| row.name == name).expect("a row of that name").bytes;
        let (stranger, peer) =
            (row("an initiation of a stranger, IPv4"), row("an initiation of a peer, IPv4"));
        let relayed = row("a relayed initiation, IPv6");
        let verdicts: Vec<_> = (0..101).map(|_| decide(&*stranger, &world)).collect();
        assert_eq!(verdicts[99..], [Verdict::Pass, Verdict::Drop(DropReason::HandshakeBudget)]);
        for own in [peer, relayed] {
            let verdicts: Vec<_> = (0..11).map(|_| decide(&*own, &world)).collect();
            assert_eq!(verdicts[9..], [Verdict::Pass, Verdict::Drop(DropReason::HandshakeBudget)]);
        }
    }

    #[test]
    fn a_budget_that_has_gone_drops_nothing() {
        assert_eq!(handshake(None), Verdict::Pass);
    }
}
