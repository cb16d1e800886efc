//! The control protocol inside the tunnel (packets.md section 6.1): framing only. Knows no client.

use std::net::{IpAddr, Ipv6Addr};

use super::inner::{Inner, Transport};

/// What a client says to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// Proxy addresses of a DNS resource (type 0).
    AssignedIps,
    /// The client leaves (type 2).
    Goodbye,
    /// Any other type, to be ignored.
    Unknown(u8),
}

/// A whole goodbye packet (test-vectors.md section 7.3).
pub const GOODBYE: [u8; 48] = {
    let mut packet = [0; 48];
    packet[0] = 0x60;
    packet[5] = 8;
    packet[6] = PROTOCOL;
    packet[40] = 2;
    packet
};

/// "next header 0xFF": reserved by IANA, so no host sends it.
const PROTOCOL: u8 = 0xff;
/// Event type and seven reserved bytes.
const HEADER_LEN: usize = 8;

/// Is this valid packet a control packet, and which?
///
/// `None` if not: then it is treated like any other packet, "payload shorter than 8 bytes" included.
pub fn parse(packet: &[u8], inner: &Inner) -> Option<Control> {
    const NOWHERE: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    if inner.transport != Transport::Other(PROTOCOL) || inner.src != NOWHERE || inner.dst != NOWHERE {
        return None;
    }
    let payload = packet.get(inner.transport_at..).filter(|p| p.len() >= HEADER_LEN)?;
    Some(match payload[0] {
        0 => Control::AssignedIps,
        2 => Control::Goodbye,
        other => Control::Unknown(other),
    })
}

#[cfg(test)]
mod tests {
    use super::{super::inner, *};

    fn parsed(packet: &[u8]) -> Option<Control> {
        parse(packet, &inner::view(packet).unwrap())
    }

    #[test]
    fn the_test_vectors_are_recognised() {
        let goodbye = "6000000000 08ff00 00000000000000000000000000000000 00000000000000000000000000000000
            0200000000000000";
        let goodbye = hex::decode(goodbye.split_whitespace().collect::<String>()).unwrap();
        assert_eq!(goodbye, GOODBYE);
        assert_eq!(parsed(&goodbye), Some(Control::Goodbye));

        let mut other = GOODBYE;
        for (kind, expect) in
            [(0, Control::AssignedIps), (1, Control::Unknown(1)), (77, Control::Unknown(77))]
        {
            other[40] = kind;
            assert_eq!(parsed(&other), Some(expect));
        }
    }

    #[test]
    fn short_payloads_and_real_addresses_are_ordinary_packets() {
        let mut short = GOODBYE[..47].to_vec();
        short[5] = 7;
        assert_eq!(parsed(&short), None);
        let mut addressed = GOODBYE;
        addressed[39] = 1;
        assert_eq!(parsed(&addressed), None);
        let mut protocol = GOODBYE;
        protocol[6] = 0xfe;
        assert_eq!(parsed(&protocol), None);
    }
}
