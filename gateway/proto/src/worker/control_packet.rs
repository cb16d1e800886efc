//! The control protocol inside the tunnel (packets.md sections 6.1 and 6.2): what is a control packet, and how ours are
//! written. Knows no client.

use std::net::{IpAddr, Ipv6Addr};

use serde::Serialize;

use super::inner::{Inner, Transport};
use crate::{ResourceId, addr::MAX_INNER, names::Answer};

/// What a client says to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// Proxy addresses of a DNS resource (type 0), for [`AssignedIps::parse`](crate::names::AssignedIps::parse).
    AssignedIps {
        /// Where in the packet its JSON begins.
        json_at: usize,
    },
    /// The client leaves (type 2).
    Goodbye,
    /// Any other type, to be ignored.
    Unknown(u8),
}

/// A whole goodbye packet (test-vectors.md section 7.3).
pub const GOODBYE: [u8; 48] = {
    let mut packet = [0; 48];
    packet[0] = 0x60;
    // The payload's length: HEADER_LEN.
    packet[5] = 8;
    packet[6] = PROTOCOL;
    packet[IP_LEN] = 2;
    packet
};

/// "next header 0xFF": reserved by IANA, so no host sends it.
const PROTOCOL: u8 = 0xff;
/// The IPv6 header, without extensions.
const IP_LEN: usize = 40;
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
        0 => Control::AssignedIps { json_at: inner.transport_at + HEADER_LEN },
        2 => Control::Goodbye,
        other => Control::Unknown(other),
    })
}

/// Writes a `DomainStatus` packet (type 1) to the beginning of `out` and returns its length in bytes; `None` if it does
/// not fit, which is for a name that is longer than names are.
pub fn status(answer: &Answer, out: &mut [u8; MAX_INNER]) -> Option<usize> {
    #[derive(Serialize)]
    struct DomainStatus<'a> {
        resource: ResourceId,
        domain: &'a str,
        status: &'static str,
    }
    let status = if answer.active { "Active" } else { "Inactive" };
    let status = DomainStatus { resource: answer.resource, domain: &answer.said, status };
    let (header, mut json) = out.split_at_mut(IP_LEN + HEADER_LEN);
    let room = json.len();
    serde_json::to_writer(&mut json, &status).ok()?;
    let payload = HEADER_LEN + room - json.len();
    header.copy_from_slice(&GOODBYE);
    header[4..6].copy_from_slice(&u16::try_from(payload).ok()?.to_be_bytes());
    header[IP_LEN] = 1;
    Some(IP_LEN + payload)
}

#[cfg(test)]
mod tests {
    use super::{super::inner, *};
    use crate::names::AssignedIps;

    /// test-vectors.md section 7.1.
    const ASSIGNED: &str = "6000000000fbff00000000000000000000000000000000000000000000000000
        000000000000000000000000000000007b227265736f75726365223a22326236
        66336630652d376135332d346430622d396134662d3266316635643166396131
        30222c22646f6d61696e223a226769742e6578616d706c652e6e6574222c2270
        726f78795f697073223a5b223130302e39362e302e31222c223130302e39362e
        302e32222c223130302e39362e302e33222c223130302e39362e302e34222c22
        666430303a323032313a313131313a383030303a3a222c22666430303a323032
        313a313131313a383030303a3a31222c22666430303a323032313a313131313a
        383030303a3a32222c22666430303a323032313a313131313a383030303a3a33
        225d7d";
    /// test-vectors.md section 7.2.
    const STATUS: &str = "600000000068ff00000000000000000000000000000000000000000000000000
        000000000000000001000000000000007b227265736f75726365223a22326236
        66336630652d376135332d346430622d396134662d3266316635643166396131
        30222c22646f6d61696e223a226769742e6578616d706c652e6e6574222c2273
        7461747573223a22416374697665227d";

    fn bytes(hex: &str) -> Vec<u8> {
        hex::decode(hex.split_whitespace().collect::<String>()).unwrap()
    }

    #[test]
    fn assigned_addresses_are_found_in_their_packet() {
        let packet = bytes(ASSIGNED);
        assert_eq!(packet.len(), 291);
        let Some(Control::AssignedIps { json_at }) = parsed(&packet) else { panic!("not recognised") };
        let assigned = AssignedIps::parse(&packet[json_at..]).unwrap();
        assert_eq!(&*assigned.said, "git.example.net");
        assert_eq!(assigned.resource.to_string(), "2b6f3f0e-7a53-4d0b-9a4f-2f1f5d1f9a10");
        let proxies: Vec<String> = assigned.proxies.iter().map(ToString::to_string).collect();
        assert_eq!(proxies[..2], ["100.96.0.1", "100.96.0.2"]);
        assert_eq!(proxies[6..], ["fd00:2021:1111:8000::2", "fd00:2021:1111:8000::3"]);
    }

    #[test]
    fn a_status_is_written_as_upstream_writes_it() {
        let packet = bytes(ASSIGNED);
        let AssignedIps { resource, said, .. } = AssignedIps::parse(&packet[48..]).unwrap();
        let mut out = [0xaa; MAX_INNER];
        let mut written = |said: &str, active| {
            let answer = Answer { serial: 1, resource, said: said.into(), active };
            status(&answer, &mut out).map(|len| out[..len].to_vec())
        };
        assert_eq!(written(&said, true), Some(bytes(STATUS)));
        let inactive = written(&said, false).unwrap();
        assert!(inactive.ends_with(b"\"status\":\"Inactive\"}"));
        assert_eq!((inactive.len(), inactive[5]), (146, 106));
        assert_eq!(parsed(&inactive), Some(Control::Unknown(1)), "the client's kind of packet, whole");

        let odd = written("\"a\".Example", true).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&odd[48..]).unwrap();
        assert_eq!(json["domain"], "\"a\".Example");
        assert!(written(&"\"".repeat(253), true).is_some(), "the longest name there is");
        assert_eq!(written(&"a".repeat(MAX_INNER), true), None);
    }

    fn parsed(packet: &[u8]) -> Option<Control> {
        parse(packet, &inner::view(packet).unwrap())
    }

    #[test]
    fn the_test_vectors_are_recognised() {
        let goodbye = bytes(
            "6000000000 08ff00 00000000000000000000000000000000 00000000000000000000000000000000
            0200000000000000",
        );
        assert_eq!(goodbye, GOODBYE);
        assert_eq!(parsed(&goodbye), Some(Control::Goodbye));

        let mut other = GOODBYE;
        for (kind, expect) in
            [(0, Control::AssignedIps { json_at: 48 }), (1, Control::Unknown(1)), (77, Control::Unknown(77))]
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
