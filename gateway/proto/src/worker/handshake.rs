//! The gate in front of every initiation: MAC1, budget, then the first half of the handshake, cheapest first
//! (design.md sections 1 and 2.1). Knows our key and budgets; which client it is, and its session, come after.
//!
//! Opening an initiation costs about 70 us, MAC1 and a cookie reply a few. An initiation that exceeds its budget is
//! answered with a cookie; one that carries a cookie proves its address and has a budget of that address, so that a
//! flood from spoofed sources delays honest clients by one round trip and locks nobody out.

use std::{
    hash::{Hash, Hasher},
    net::IpAddr,
    sync::Arc,
    time::Instant,
};

use boringtun::noise::{Packet, TunnResult, handshake::parse_handshake_anon, rate_limiter::RateLimiter};
use gateway_common::DropReason;
use rustc_hash::FxHasher;
use x25519_dalek::{PublicKey, StaticSecret};

use super::bucket::{Bucket, Rate};

/// Initiations on a path that ICE authenticated. A client repeats one every 2 to 5 s; some have two in flight.
const KNOWN_PATH: Rate = Rate { per_second: 2, burst: 10 };
/// Initiations from anywhere else, each second and at once, all together (connections.md section 10.6).
const ANYWHERE: u32 = 100;
/// Initiations that prove their source address by a cookie, per address; a NAT may hide many clients.
const PROVEN: Rate = Rate { per_second: 20, burst: 40 };
/// Addresses share a bucket by hash: bounded memory, and who shares is not for the sender to choose.
const PROVEN_BUCKETS: usize = 256;
/// A cookie reply's size.
pub const COOKIE_REPLY: usize = 64;

/// Our identity and the budgets.
pub struct Gate {
    private: StaticSecret,
    public: PublicKey,
    /// Checks MAC1 only. Also every `Tunn`'s limiter: two limiters have two cookie secrets.
    unlimited: Arc<RateLimiter>,
    /// Always "under load": demands a cookie.
    strict: RateLimiter,
    anywhere: Bucket,
    /// This worker's share of [`ANYWHERE`].
    anywhere_rate: Rate,
    proven: Box<[Bucket; PROVEN_BUCKETS]>,
    seed: u64,
}

/// The gate's answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Admission {
    /// An initiation by the holder of this public key (which only its session can prove).
    Admitted([u8; 32]),
    /// Over the budget: send back this cookie reply the way the initiation came.
    Cookie,
}

impl Gate {
    /// A gate with full budgets, one of `gates` that share those which are for everybody.
    pub fn new(private: StaticSecret, seed: u64, gates: usize) -> Self {
        let public = PublicKey::from(&private);
        let share = ANYWHERE.div_ceil(u32::try_from(gates).unwrap_or(ANYWHERE).max(1));
        Self {
            unlimited: Arc::new(RateLimiter::new(&public, u64::MAX)),
            strict: RateLimiter::new(&public, 0),
            anywhere: Bucket::FULL,
            anywhere_rate: Rate { per_second: share, burst: share },
            proven: Box::new([Bucket::FULL; PROVEN_BUCKETS]),
            private,
            public,
            seed,
        }
    }

    /// Our WireGuard key.
    pub fn private_key(&self) -> &StaticSecret {
        &self.private
    }

    /// The limiter every `Tunn` shares.
    pub fn unlimited(&self) -> &Arc<RateLimiter> {
        &self.unlimited
    }

    /// Looks at an initiation (148 bytes) from `from`. `known` is the budget of the path if ICE authenticated it.
    pub fn admit(
        &mut self,
        message: &[u8],
        from: IpAddr,
        known: Option<&mut Bucket>,
        reply: &mut [u8; COOKIE_REPLY],
        now: Instant,
    ) -> Result<Admission, DropReason> {
        let initiation = match self.unlimited.verify_packet(None, message, &mut []) {
            Ok(Packet::HandshakeInit(initiation)) => initiation,
            Ok(_) => return Err(DropReason::MalformedWireGuard),
            Err(_) => return Err(DropReason::HandshakeForged),
        };
        let within = match known {
            Some(bucket) => bucket.take(KNOWN_PATH, now),
            None => self.anywhere.take(self.anywhere_rate, now),
        };
        if !within {
            match self.strict.verify_packet(Some(from), message, reply) {
                Ok(_) if self.proven_bucket(from).take(PROVEN, now) => {}
                Err(TunnResult::WriteToNetwork(_)) => return Ok(Admission::Cookie),
                _ => return Err(DropReason::HandshakeBudget),
            }
        }
        let half = parse_handshake_anon(&self.private, &self.public, &initiation)
            .map_err(|_| DropReason::HandshakeForged)?;
        Ok(Admission::Admitted(half.peer_static_public))
    }

    fn proven_bucket(&mut self, from: IpAddr) -> &mut Bucket {
        let mut hasher = FxHasher::default();
        (self.seed, from).hash(&mut hasher);
        &mut self.proven[usize::from(hasher.finish().to_le_bytes()[0]) % PROVEN_BUCKETS]
    }
}
