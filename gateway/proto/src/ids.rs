//! Identifiers are newtypes: two bare UUIDs in one signature are a bug waiting.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

uuid_id!(
    /// A client, as the portal names it.
    ClientId
);
uuid_id!(
    /// A resource, as the portal names it.
    ResourceId
);
uuid_id!(
    /// A relay, as the portal names it.
    RelayId
);

uuid_id!(
    /// What permits a client one resource by one policy, as the portal's ingest tokens name it.
    PolicyAuthorizationId
);

/// The 24-bit index of one connection: the upper bits of every WireGuard index we hand out
/// (connections.md section 10.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionIndex(u32);

impl ConnectionIndex {
    /// The largest index.
    pub const MAX: u32 = (1 << 24) - 1;

    /// `None` unless `index` fits 24 bits.
    #[must_use]
    pub fn new(index: u32) -> Option<Self> {
        (index <= Self::MAX).then_some(Self(index))
    }

    /// The connection a received WireGuard index (host order) belongs to; the low byte is the session counter.
    #[must_use]
    pub fn of_receiver(receiver: u32) -> Self {
        Self(receiver >> 8)
    }

    /// The bare 24-bit value.
    #[must_use]
    pub fn get(self) -> u32 {
        self.0
    }
}

/// One worker of the data plane: its number, below [`MAX_WORKERS`](gateway_common::maps::MAX_WORKERS).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct WorkerId(u8);

impl WorkerId {
    /// The first worker, which is always there.
    pub const FIRST: Self = Self(0);

    /// `None` unless `number` is below [`MAX_WORKERS`](gateway_common::maps::MAX_WORKERS).
    #[must_use]
    pub fn new(number: usize) -> Option<Self> {
        u8::try_from(number).ok().filter(|_| number < gateway_common::maps::MAX_WORKERS).map(Self)
    }

    /// The number, for indexing.
    #[inline]
    #[must_use]
    pub fn get(self) -> usize {
        usize::from(self.0)
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}
