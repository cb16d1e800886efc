//! Why a packet was dropped: one closed enum, shared by kernel and user space; it is the metric label.

macro_rules! drop_reasons {
    ($($(#[doc = $doc:literal])+ $name:ident => $label:literal,)+) => {
        /// Why a packet from outside was not passed on.
        ///
        /// The discriminant is the index into [`Counters`] and into the per-CPU counter map of the kernel plane.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum DropReason { $($(#[doc = $doc])+ $name,)+ }

        impl DropReason {
            /// Every reason, in the order of the discriminants.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];
            /// How many reasons there are.
            pub const COUNT: usize = Self::ALL.len();
            /// The metric label: lower-case words joined by `_`.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)+ }
            }
        }
    };
}

drop_reasons! {
    // From the network, before decryption.
    /// Neither STUN, ChannelData nor WireGuard.
    UnknownPayload => "unknown_payload",
    /// A zero-length datagram.
    EmptyDatagram => "empty_datagram",
    /// The kernel did not say which address a datagram was sent to.
    NoDestination => "no_destination",
    /// A datagram longer than any that a client or relay may send us.
    OversizedDatagram => "oversized_datagram",
    /// First byte of ChannelData, but the length field does not match the datagram.
    MalformedChannelData => "malformed_channel_data",
    /// ChannelData from an address that is no relay of ours.
    UnknownRelay => "unknown_relay",
    /// ChannelData on a channel that is not bound or not confirmed.
    UnboundChannel => "unbound_channel",
    /// First byte of a WireGuard message, but a length that no such message has.
    MalformedWireGuard => "malformed_wireguard",
    /// A WireGuard receiver index that belongs to no client.
    UnknownSession => "unknown_session",
    /// An initiation from a public key that no authorization names.
    UnknownPublicKey => "unknown_public_key",
    /// MAC1 (or the initiation's AEAD) is wrong.
    HandshakeForged => "handshake_forged",
    /// More handshakes than the budget allows.
    HandshakeBudget => "handshake_budget",
    /// The same, and more than the budget of cookies allows to answer: MAC1 was perhaps not even looked at.
    CookieBudget => "cookie_budget",
    /// An initiation or a response that repeats an earlier one.
    HandshakeReplayed => "handshake_replayed",
    /// A handshake message WireGuard refused for another reason.
    HandshakeRejected => "handshake_rejected",
    /// Data for a session that is not there any more.
    SessionExpired => "session_expired",
    /// The authentication tag of a data message is wrong.
    DataForged => "data_forged",
    /// A counter that was seen before.
    DataReplayed => "data_replayed",
    /// STUN that belongs to no relay and no client.
    UnmatchedStun => "unmatched_stun",
    /// From a relay: not a valid STUN message, or a success without what it must carry.
    MalformedStun => "malformed_stun",
    /// From a relay: an answer without valid MESSAGE-INTEGRITY.
    RelayUnauthenticated => "relay_unauthenticated",
    /// From a relay: an answer to nothing in flight, a request, an indication.
    RelayUnexpected => "relay_unexpected",
    /// A check towards a peer that no channel is bound to yet.
    NoChannel => "no_channel",
    /// A channel was wanted, but the relay's numbers have run low or out.
    ChannelsExhausted => "channels_exhausted",
    /// The queue to the control plane had no place for another event of this kind.
    ControlQueueFull => "control_queue_full",

    // Inner packets, outbound.
    /// Not a valid IP packet (packets.md section 1).
    MalformedInner => "malformed_inner",
    /// An inner packet longer than the tunnel's MTU.
    OversizedInner => "oversized_inner",
    /// A fragment inside the tunnel.
    InnerFragment => "inner_fragment",
    /// An inner packet to a multicast address.
    Multicast => "multicast",
    /// An ICMP error sent by a client.
    OutboundIcmpError => "outbound_icmp_error",
    /// The inner source address is not the client's; answered with ICMP prohibited.
    ForeignSource => "foreign_source",
    /// The destination is another tunnel address; answered with ICMP prohibited.
    TunnelDestination => "tunnel_destination",
    /// The gateway's own address, but not its DNS port or an echo; answered with ICMP prohibited.
    OwnAddressPort => "own_address_port",
    /// No resource permits the packet; answered with ICMP prohibited.
    NotAllowed => "not_allowed",
    /// The Internet resource does not reach private addresses; answered with ICMP unreachable.
    PrivateDestination => "private_destination",
    /// A DNS resource's proxy address without a translation; answered with ICMP unreachable.
    NoTranslation => "no_translation",
    /// To a DNS resource: no port is free towards its address, or the client has too many sessions.
    NatExhausted => "nat_exhausted",
    /// An inner packet with a source route, which may lead past the rules, or with IPv4 options that do not add up.
    SourceRouted => "source_routed",
    /// A control packet inside the tunnel that does not parse.
    MalformedControl => "malformed_control",
    /// A client says more about names than its budget allows.
    ControlBudget => "control_budget",

    // Inner packets, inbound.
    /// From the TUN, to an address outside the tunnel ranges.
    NotAPeer => "not_a_peer",
    /// From the TUN, to a tunnel address that no client holds.
    NoPeerState => "no_peer_state",
    /// From the TUN, with a source in a tunnel range.
    TunnelSource => "tunnel_source",
    /// From the TUN, from a source no resource of the client names.
    InboundNotAllowed => "inbound_not_allowed",
    /// From the TUN, of an ICMP type that cannot be matched to a client's traffic; or to a DNS resource, of a protocol that
    /// cannot be translated.
    UnsupportedProtocol => "unsupported_protocol",
    /// From the TUN, for a session of a DNS resource that has ended.
    NatExpired => "expired_nat_session",
    /// From the TUN, an ICMP error that does not say which packet it is about.
    MalformedIcmpError => "malformed_icmp_error",
    /// The client has no connection.
    NotConnected => "not_connected",
    /// The client's connection has no path yet.
    Connecting => "connecting",
    /// The client has no WireGuard session to encrypt with.
    NoSession => "no_session",

    // The device and socket side.
    /// A virtio header or super-packet from the TUN that does not add up.
    MalformedOffload => "malformed_offload",
    /// The kernel refused a packet written to the TUN.
    TunWrite => "tun_write",
    /// The kernel refused a datagram.
    UdpSend => "udp_send",
    /// The ring to the worker that owns the client is full, or a packet found no owner on its way between workers.
    HandoverFull => "handover_full",
    /// The way out is full.
    Backpressure => "backpressure",
    /// The receive ring of a worker's AF_XDP socket was full: the kernel dropped the frame.
    XskRingFull => "xsk_ring_full",
    /// A queue's fill ring was empty: the kernel had no frame to receive into.
    XskStarved => "xsk_starved",
    /// The kernel dropped a frame on its way into an AF_XDP socket for another reason: it is longer than what we offer.
    XskRefused => "xsk_refused",
    /// The kernel did not take what we wrote into a transmit ring.
    XskTxInvalid => "xsk_tx_invalid",
    /// The budget for generated ICMP messages of this client is used up.
    IcmpBudget => "icmp_budget",
}

/// One counter for each [`DropReason`], in packets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counters([u64; DropReason::COUNT]);

impl Default for Counters {
    fn default() -> Self {
        Self([0; DropReason::COUNT])
    }
}

impl From<[u64; DropReason::COUNT]> for Counters {
    /// The opposite of [`Counters::values`].
    fn from(values: [u64; DropReason::COUNT]) -> Self {
        Self(values)
    }
}

impl Counters {
    /// Counts one packet.
    #[inline]
    pub fn count(&mut self, reason: DropReason) {
        self.add(reason, 1);
    }

    /// Counts `packets` packets.
    #[inline]
    pub fn add(&mut self, reason: DropReason, packets: u64) {
        let slot = &mut self.0[reason as usize];
        *slot = slot.wrapping_add(packets);
    }

    /// Packets dropped for `reason` so far.
    #[must_use]
    pub fn get(&self, reason: DropReason) -> u64 {
        self.0[reason as usize]
    }

    /// Every reason with a count above zero.
    pub fn iter(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.iter().map(|r| (*r, self.get(*r))).filter(|(_, n)| *n > 0)
    }

    /// Every count, in the order of the discriminants.
    #[inline]
    #[must_use]
    pub fn values(&self) -> &[u64; DropReason::COUNT] {
        &self.0
    }

    /// Adds all of `other`.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            *mine = mine.wrapping_add(*theirs);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn discriminants_are_indices() {
        for (i, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, i);
        }
    }

    #[test]
    fn labels_are_unique_and_plain() {
        for (i, a) in DropReason::ALL.iter().enumerate() {
            assert!(a.label().bytes().all(|b| b.is_ascii_lowercase() || b == b'_'));
            assert!(DropReason::ALL[i + 1..].iter().all(|b| a.label() != b.label()));
        }
    }
}
