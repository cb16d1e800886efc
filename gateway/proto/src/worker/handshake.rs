//! The gate in front of every initiation: MAC1, budget, then the first half of the handshake, cheapest first
//! (design.md sections 1 and 2.1). Knows our key and budgets; which client it is, and its session, come after.
//!
//! Opening an initiation costs about 70 us, MAC1 one, a cookie reply with its datagram several. An initiation that exceeds
//! its budget is answered with a cookie; one that carries a cookie proves its address and has a budget of that address.
//! Cookies have a budget, too, and what could have no answer whatever it is costs no hash: a flood is looked at, no more.
//! Clients do not need the cookies then: where their checks came from they have a budget of their own.

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
/// Cookie replies to strangers, each second and at once, all together: 1 % of a core at most.
const COOKIES: u32 = 1000;
/// The same at once.
const COOKIES_AT_ONCE: u32 = 200;
/// Initiations that prove their source address by a cookie, per address; a NAT may hide many clients.
const PROVEN: Rate = Rate { per_second: 20, burst: 40 };
/// Addresses share a bucket by hash: bounded memory, and who shares is not for the sender to choose.
const PROVEN_BUCKETS: usize = 256;
/// The same, each second, of all addresses together: 4 % of a core. Whoever owns many gets no more.
const ALL_PROVEN: u32 = 500;
/// The same at once: 7 ms.
const ALL_PROVEN_AT_ONCE: u32 = 100;
/// A cookie reply's size.
pub const COOKIE_REPLY: usize = 64;
/// Where MAC2 is in an initiation: the last of its 148 bytes, zero for whoever has no cookie.
const MAC2: std::ops::Range<usize> = 132..148;

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
    cookies: Cookies,
    proven: Box<[Bucket; PROVEN_BUCKETS]>,
    all_proven: Bucket,
    /// This worker's share of [`ALL_PROVEN`].
    all_proven_rate: Rate,
    seed: u64,
}

/// Budgets of cookie replies. Those for paths that ICE authenticated are apart, so that strangers cannot use them up.
struct Cookies {
    known: Bucket,
    anywhere: Bucket,
    /// This worker's share of [`COOKIES`].
    rate: Rate,
}

impl Cookies {
    fn of(&mut self, is_known: bool) -> &mut Bucket {
        if is_known { &mut self.known } else { &mut self.anywhere }
    }
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
        let share = |of: u32| of.div_ceil(u32::try_from(gates).unwrap_or(of).max(1));
        Self {
            unlimited: Arc::new(RateLimiter::new(&public, u64::MAX)),
            strict: RateLimiter::new(&public, 0),
            anywhere: Bucket::FULL,
            anywhere_rate: Rate { per_second: share(ANYWHERE), burst: share(ANYWHERE) },
            cookies: Cookies {
                known: Bucket::FULL,
                anywhere: Bucket::FULL,
                rate: Rate { per_second: share(COOKIES), burst: share(COOKIES_AT_ONCE) },
            },
            proven: Box::new([Bucket::FULL; PROVEN_BUCKETS]),
            all_proven: Bucket::FULL,
            all_proven_rate: Rate { per_second: share(ALL_PROVEN), burst: share(ALL_PROVEN_AT_ONCE) },
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
        let is_known = known.is_some();
        let has_budget = match &known {
            Some(bucket) => bucket.has(KNOWN_PATH, now),
            None => self.anywhere.has(self.anywhere_rate, now),
        };
        if !has_budget && self.is_hopeless(message, from, is_known, now) {
            return Err(DropReason::CookieBudget);
        }
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
            let rate = self.cookies.rate;
            // Without room for a reply none is made.
            let room = if self.cookies.of(is_known).has(rate, now) { COOKIE_REPLY } else { 0 };
            match self.strict.verify_packet(Some(from), message, &mut reply[..room]) {
                Ok(_) if self.take_proven(from, now) => {}
                Ok(_) => return Err(DropReason::HandshakeBudget),
                Err(TunnResult::WriteToNetwork(_)) if self.cookies.of(is_known).take(rate, now) => {
                    return Ok(Admission::Cookie);
                }
                Err(_) => return Err(DropReason::CookieBudget),
            }
        }
        let half = parse_handshake_anon(&self.private, &self.public, &initiation)
            .map_err(|_| DropReason::HandshakeForged)?;
        Ok(Admission::Admitted(half.peer_static_public))
    }

    /// Would an initiation over its budget be neither opened nor answered, whatever it is? Most of a flood is known by this.
    fn is_hopeless(&mut self, message: &[u8], from: IpAddr, is_known: bool, now: Instant) -> bool {
        let rate = self.cookies.rate;
        if self.cookies.of(is_known).has(rate, now) {
            return false;
        }
        let has_mac2 = message.get(MAC2).is_some_and(|mac2| mac2 != [0; 16]);
        !has_mac2 || !self.has_proven(from, now)
    }

    fn has_proven(&mut self, from: IpAddr, now: Instant) -> bool {
        self.all_proven.has(self.all_proven_rate, now) && self.proven_bucket(from).has(PROVEN, now)
    }

    fn take_proven(&mut self, from: IpAddr, now: Instant) -> bool {
        // An address that has used up its own budget takes nothing of what is for all.
        self.has_proven(from, now)
            && self.proven_bucket(from).take(PROVEN, now)
            && self.all_proven.take(self.all_proven_rate, now)
    }

    fn proven_bucket(&mut self, from: IpAddr) -> &mut Bucket {
        let mut hasher = FxHasher::default();
        (self.seed, from).hash(&mut hasher);
        &mut self.proven[usize::from(hasher.finish().to_le_bytes()[0]) % PROVEN_BUCKETS]
    }
}
