//! What a frame is, as one closed enum: the index and the label of the kernel plane's per-CPU frame counters.

use crate::bytes::Bytes;
use crate::classify::{PayloadKind, Prefix, classify_prefix};
use crate::frame::{self, Frame};

macro_rules! frame_kinds {
    ($($(#[doc = $doc:literal])+ $name:ident => $label:literal,)+) => {
        /// What a frame on an attached interface is.
        ///
        /// The discriminant is the key in the map [`COUNTERS`](crate::maps::COUNTERS).
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u32)]
        pub enum FrameKind { $($(#[doc = $doc])+ $name,)+ }

        impl FrameKind {
            /// Every kind, in the order of the discriminants.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];
            /// How many kinds there are.
            pub const COUNT: usize = Self::ALL.len();
            /// The metric label: lower-case words joined by `_`.
            #[must_use]
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)+ }
            }
        }
    };
}

frame_kinds! {
    /// [`Frame::NotIp`].
    NotIp => "not_ip",
    /// [`Frame::MalformedIp`].
    MalformedIp => "malformed_ip",
    /// [`Frame::IpOptions`].
    IpOptions => "ip_options",
    /// [`Frame::Fragment`].
    Fragment => "fragment",
    /// [`Frame::ExtensionHeader`].
    ExtensionHeader => "extension_header",
    /// [`Frame::NotUdp`].
    NotUdp => "not_udp",
    /// [`Frame::MalformedUdp`].
    MalformedUdp => "malformed_udp",
    /// [`PayloadKind::Stun`].
    Stun => "stun",
    /// [`PayloadKind::ChannelData`].
    ChannelData => "channel_data",
    /// [`PayloadKind::HandshakeInitiation`].
    HandshakeInitiation => "handshake_initiation",
    /// [`PayloadKind::HandshakeResponse`].
    HandshakeResponse => "handshake_response",
    /// [`PayloadKind::CookieReply`].
    CookieReply => "cookie_reply",
    /// [`PayloadKind::Data`].
    Data => "data",
    /// [`PayloadKind::MalformedChannelData`].
    MalformedChannelData => "malformed_channel_data",
    /// [`PayloadKind::MalformedWireGuard`].
    MalformedWireGuard => "malformed_wireguard",
    /// [`PayloadKind::Empty`].
    Empty => "empty",
    /// [`PayloadKind::Unknown`].
    Unknown => "unknown",
}

impl From<PayloadKind> for FrameKind {
    #[inline(always)]
    fn from(kind: PayloadKind) -> Self {
        match kind {
            PayloadKind::Stun => Self::Stun,
            PayloadKind::ChannelData => Self::ChannelData,
            PayloadKind::HandshakeInitiation => Self::HandshakeInitiation,
            PayloadKind::HandshakeResponse => Self::HandshakeResponse,
            PayloadKind::CookieReply => Self::CookieReply,
            PayloadKind::Data => Self::Data,
            PayloadKind::MalformedChannelData => Self::MalformedChannelData,
            PayloadKind::MalformedWireGuard => Self::MalformedWireGuard,
            PayloadKind::Empty => Self::Empty,
            PayloadKind::Unknown => Self::Unknown,
        }
    }
}

/// Says what a whole Ethernet frame is.
#[inline(always)]
#[must_use]
pub fn frame_kind(frame: &(impl Bytes + ?Sized)) -> FrameKind {
    match frame::parse(frame) {
        Frame::Udp { at, len } => match Prefix::read(frame, at, len) {
            Some(prefix) => classify_prefix(&prefix).into(),
            None => FrameKind::MalformedUdp,
        },
        Frame::NotIp => FrameKind::NotIp,
        Frame::MalformedIp => FrameKind::MalformedIp,
        Frame::IpOptions => FrameKind::IpOptions,
        Frame::Fragment => FrameKind::Fragment,
        Frame::ExtensionHeader => FrameKind::ExtensionHeader,
        Frame::NotUdp => FrameKind::NotUdp,
        Frame::MalformedUdp => FrameKind::MalformedUdp,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{classify, frame_table};

    #[test]
    fn discriminants_are_indices_and_labels_unique() {
        for (i, kind) in FrameKind::ALL.iter().enumerate() {
            assert_eq!(*kind as usize, i);
            assert!(FrameKind::ALL[i + 1..].iter().all(|b| kind.label() != b.label()));
        }
    }

    #[test]
    fn frames_are_what_the_table_says() {
        for sample in frame_table::all() {
            assert_eq!(frame_kind(&*sample.bytes), sample.kind, "{}", sample.name);
        }
    }

    #[test]
    fn a_datagram_is_what_classify_says_of_its_payload() {
        for sample in frame_table::all() {
            if let Some(payload) = &sample.payload {
                assert_eq!(sample.kind, classify(payload).into(), "{}", sample.name);
            }
        }
    }

    #[test]
    fn every_kind_is_in_the_table() {
        let table = frame_table::all();
        for kind in FrameKind::ALL {
            assert!(table.iter().any(|s| s.kind == *kind), "no frame is {}", kind.label());
        }
    }
}
