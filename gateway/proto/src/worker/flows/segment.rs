//! What of a packet matters to its flow. Knows one packet, no flow.

use crate::worker::inner::{Inner, Transport};

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;

/// A TCP segment, or a UDP datagram, which has no flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Bytes behind the header of TCP or UDP.
    pub payload: u64,
    /// It may begin a flow: any datagram, but of segments none that ends one, and none that only acknowledges
    /// (cli-and-service.md section 14.2).
    pub opens: bool,
    /// TCP's flags.
    pub syn: bool,
    pub fin: bool,
    pub rst: bool,
}

impl Segment {
    /// `view` is that of `packet`, or was, before it was translated.
    #[inline]
    pub fn read(packet: &[u8], view: &Inner) -> Self {
        let transport = &packet[view.transport_at..];
        let (header, flags) = match view.transport {
            Transport::Tcp { .. } => (usize::from(transport[12] >> 4) * 4, transport[13]),
            _ => (8, 0),
        };
        let payload = transport.len().saturating_sub(header) as u64;
        let [fin, syn, rst] = [FIN, SYN, RST].map(|flag| flags & flag != 0);
        let is_udp = matches!(view.transport, Transport::Udp { .. });
        Self { payload, opens: is_udp || (!fin && !rst && (syn || payload > 0)), syn, fin, rst }
    }
}
