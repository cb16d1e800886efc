//! What a session is found by, from either side, and the hash over it. Knows no session, no time.
//!
//! ```text
//! Inside   kind | client's port or echo id | proxy address      <- outbound packets
//! Outside  kind | our port or echo id      | real address       <- inbound packets
//! ```
//!
//! "The destination port is not part of the key" (packets.md section 5.2), and neither is the client's address: one
//! table per client.

use std::{
    hash::{BuildHasher, Hash, Hasher},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// What a session carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// TCP, told apart by ports.
    Tcp,
    /// UDP, told apart by ports.
    Udp,
    /// ICMP or ICMPv6 echo, told apart by identifiers.
    Echo,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Echo];
}

/// One side of a session as a client's packets name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Inside(Key);

/// One side of a session as the resource's packets name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Outside(Key);

/// A resource's address and a kind: what ports are free is asked for each of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Remote(Key);

impl Inside {
    /// `port` is the client's source port or echo identifier.
    #[inline]
    #[must_use]
    pub fn new(kind: Kind, port: u16, proxy: IpAddr) -> Self {
        Self(Key::new(kind, port, proxy))
    }

    /// The client's source port or echo identifier.
    #[inline]
    #[must_use]
    pub fn port(&self) -> u16 {
        self.0.port()
    }

    /// The proxy address.
    #[inline]
    #[must_use]
    pub fn proxy(&self) -> IpAddr {
        self.0.ip()
    }

    /// What it carries.
    #[inline]
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.0.kind()
    }
}

impl Outside {
    /// `port` is the source port or echo identifier that the resource sees.
    #[inline]
    #[must_use]
    pub fn new(kind: Kind, port: u16, real: IpAddr) -> Self {
        Self(Key::new(kind, port, real))
    }

    /// The source port or echo identifier that the resource sees.
    #[inline]
    #[must_use]
    pub fn port(&self) -> u16 {
        self.0.port()
    }

    /// The resource's address.
    #[inline]
    #[must_use]
    pub fn real(&self) -> IpAddr {
        self.0.ip()
    }

    /// What it carries.
    #[inline]
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.0.kind()
    }

    /// All of it but the port.
    pub(super) fn remote(&self) -> Remote {
        Remote(Key { tag: self.0.tag & !0xffff, ..self.0 })
    }

    /// The same with another port.
    pub(super) fn with_port(&self, port: u16) -> Self {
        Self(Key { tag: self.0.tag & !0xffff | u32::from(port), ..self.0 })
    }
}

/// 20 bytes in two words and a half, so that a map's slot is no larger than it must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    high: u64,
    low: u64,
    /// Family and kind above, the port in the lower half.
    tag: u32,
}

const V6: u32 = 0x10_0000;

impl Key {
    #[inline]
    fn new(kind: Kind, port: u16, ip: IpAddr) -> Self {
        let tag = (kind as u32) << 16 | u32::from(port);
        match ip {
            IpAddr::V4(ip) => Self { high: 0, low: u64::from(ip.to_bits()), tag },
            IpAddr::V6(ip) => {
                let [high, low] = halves(ip.to_bits());
                Self { high, low, tag: tag | V6 }
            }
        }
    }

    #[inline]
    fn ip(&self) -> IpAddr {
        if self.tag & V6 == 0 {
            let [.., a, b, c, d] = self.low.to_be_bytes();
            return Ipv4Addr::new(a, b, c, d).into();
        }
        Ipv6Addr::from_bits(u128::from(self.high) << 64 | u128::from(self.low)).into()
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "the lower half of the tag is the port")]
    fn port(&self) -> u16 {
        self.tag as u16
    }

    #[inline]
    fn kind(&self) -> Kind {
        match self.tag >> 16 & 3 {
            0 => Kind::Tcp,
            1 => Kind::Udp,
            _ => Kind::Echo,
        }
    }
}

#[inline]
#[expect(clippy::cast_possible_truncation, reason = "the two halves")]
fn halves(bits: u128) -> [u64; 2] {
    [(bits >> 64) as u64, bits as u64]
}

/// A hash with two secret words.
///
/// The keys are the client's choice, and a seed alone does not help FxHash: keys whose *difference* times its constant
/// is small share a bucket under every seed. Here the multiplier itself is secret, and both halves of the product
/// count.
#[derive(Clone)]
pub(in crate::worker) struct Secret {
    start: u64,
    multiplier: u64,
}

impl Secret {
    /// `seed` is random and nobody else's.
    pub fn new(seed: u64) -> Self {
        // Two steps of SplitMix64.
        let mix = |n: u64| {
            let mut z = seed.wrapping_add(n.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ z >> 31
        };
        // Bits at both ends: a product with a short factor would spread over too few of them.
        Self { start: mix(1), multiplier: mix(2) | 1 << 63 | 1 }
    }
}

impl BuildHasher for Secret {
    type Hasher = Mixed;

    #[inline]
    fn build_hasher(&self) -> Mixed {
        Mixed { state: self.start, multiplier: self.multiplier }
    }
}

/// See [`Secret`].
pub(in crate::worker) struct Mixed {
    state: u64,
    multiplier: u64,
}

impl Hasher for Mixed {
    #[inline]
    fn write_u64(&mut self, word: u64) {
        let [high, low] = halves(u128::from(self.state ^ word) * u128::from(self.multiplier));
        self.state = (high ^ low).rotate_left(23);
    }

    #[inline]
    fn write_u32(&mut self, word: u32) {
        self.write_u64(u64::from(word));
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    #[inline]
    fn finish(&self) -> u64 {
        self.state
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_gives_back_what_it_was_made_of() {
        let ips =
            ["0.0.0.0", "100.96.0.1", "255.255.255.255", "::", "fd00:2021:1111:8000::1", "::ffff:1.2.3.4"];
        let mut all = std::collections::HashSet::new();
        for ip in ips.map(|ip| ip.parse().unwrap()) {
            for kind in Kind::ALL {
                for port in [0, 1, 0x8000, 0xffff] {
                    let outside = Outside::new(kind, port, ip);
                    assert_eq!((outside.kind(), outside.port(), outside.real()), (kind, port, ip));
                    assert_eq!(outside.with_port(7).remote(), Outside::new(kind, 9, ip).remote());
                    assert!(all.insert(outside), "{outside:?} is another's key");
                }
            }
        }
    }

    #[test]
    fn regular_keys_spread_over_buckets_and_tags() {
        // What a client makes by itself: one proxy, all ports; and one port, many proxies. 7 upper and 12 lower bits
        // are what a hash map looks at.
        for seed in 0..20 {
            let secret = Secret::new(seed);
            let (mut low, mut high) = (vec![0_u32; 4096], vec![0_u32; 128]);
            for n in 0..65_536_u32 {
                let key = match n % 2 {
                    0 => Key::new(
                        Kind::Udp,
                        (n / 2).to_be_bytes()[3].into(),
                        Ipv4Addr::from_bits(n >> 9).into(),
                    ),
                    _ => Key::new(Kind::Tcp, u16::try_from(n).unwrap(), Ipv4Addr::new(100, 96, 0, 1).into()),
                };
                let hash = secret.hash_one(key);
                low[usize::try_from(hash & 0xfff).unwrap()] += 1;
                high[usize::try_from(hash >> 57).unwrap()] += 1;
            }
            // Means 16 and 512; a fair die exceeds these once in billions.
            assert!(low.iter().all(|n| *n < 64), "seed {seed}: {:?}", low.iter().max());
            assert!(high.iter().all(|n| *n > 256 && *n < 1024), "seed {seed}: {high:?}");
        }
    }
}
