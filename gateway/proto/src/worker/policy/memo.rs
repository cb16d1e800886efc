//! What a policy decided lately: memoised, stamped with an epoch. Knows no rule.

use std::{hash::Hasher, net::IpAddr};

use rustc_hash::FxHasher;

use super::{Class, Decision};

/// Recent decisions, direct mapped. An entry holds only under the epoch it was made in.
pub struct Memo {
    epoch: u32,
    entries: Box<[Option<Remembered>; MEMO]>,
}

#[derive(Clone, Copy)]
struct Remembered {
    epoch: u32,
    ip: IpAddr,
    class: Class,
    decision: Decision,
}

/// A client talks to few services at a time; 64 entries are 4 KB.
const MEMO: usize = 64;
/// What every client's memo takes.
#[cfg(test)]
pub const BYTES: usize = size_of::<[Option<Remembered>; MEMO]>();

impl Memo {
    /// Remembers nothing.
    pub fn new() -> Self {
        Self { epoch: 0, entries: Box::new([None; MEMO]) }
    }

    /// What was decided so far holds no longer.
    pub fn forget(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
        if self.epoch == 0 {
            *self.entries = [None; MEMO];
        }
    }

    /// The decision, if it is remembered.
    #[inline]
    pub fn get(&self, ip: IpAddr, class: Class) -> Option<Decision> {
        self.entries[place(ip, class)]
            .as_ref()
            .filter(|e| e.epoch == self.epoch && e.class == class && e.ip == ip)
            .map(|e| e.decision)
    }

    /// Remembers a decision.
    #[inline]
    pub fn put(&mut self, ip: IpAddr, class: Class, decision: Decision) {
        self.entries[place(ip, class)] = Some(Remembered { epoch: self.epoch, ip, class, decision });
    }
}

#[inline]
fn place(ip: IpAddr, class: Class) -> usize {
    let mut hasher = FxHasher::default();
    match ip {
        IpAddr::V4(ip) => hasher.write_u32(ip.to_bits()),
        IpAddr::V6(ip) => hasher.write_u128(ip.to_bits()),
    }
    hasher.write_u32(match class {
        Class::Tcp(port) => u32::from(port),
        Class::Udp(port) => 0x1_0000 | u32::from(port),
        Class::Icmp => 0x2_0000,
        Class::Other => 0x3_0000,
    });
    usize::from(hasher.finish().to_le_bytes()[0]) % MEMO
}
