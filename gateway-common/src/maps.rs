//! The maps of the kernel plane: each is described here and nowhere else.
//!
//! [`maps!`](crate::maps!) hands the list to a macro of the caller. `gateway-ebpf` turns an entry into a BTF map of
//! that name; this file turns it into a [`MapSpec`], which the loader and the tests compare with the compiled object.

/// Changed whenever a map, its key or value, or the meaning of one of them changes. The object carries the number in
/// section [`ABI_SECTION`]; the loader refuses another one.
pub const ABI_VERSION: u32 = 3;
/// The read-only section (and map) in which the object keeps its [`ABI_VERSION`], 4 bytes, native order.
pub const ABI_SECTION: &str = ".rodata.abi";

/// How many workers there may be: worker numbers are below it, and maps that hold something per worker have this many
/// entries.
pub const MAX_WORKERS: usize = 64;

/// How many clients the kernel is told of. Far more than one gateway serves, and the empty maps take 12 MiB (16 bytes for
/// each entry they may get; entries themselves are allocated when they come). A client beyond it is steered by nothing
/// and reaches its worker through the other workers.
pub const MAX_CLIENTS: usize = 65_536;

/// How many receive queues an interface may have for the fast path; frames from further ones pass.
pub const MAX_QUEUES: usize = 64;
/// Our addresses times the ports we listen on.
pub const MAX_LOCAL: usize = 1024;
/// Server addresses of relays, IPv4 and IPv6 counted apart.
pub const MAX_RELAYS: usize = 1024;

/// Calls `$then!` with the list of maps: `/// doc`, `NAME: kind<key, value>[capacity];` each.
///
/// Keys and values are named by their full path, because the list is expanded in other crates.
#[macro_export]
macro_rules! maps {
    ($then:ident) => {
        $then! {
            /// Frames seen on attached interfaces, by [`FrameKind`]($crate::FrameKind), for each CPU.
            COUNTERS: PerCpuArray<u32, $crate::maps::FrameCount>[$crate::FrameKind::COUNT];
            /// The worker of each connection: where datagrams with a WireGuard receiver index go.
            SESSIONS: HashMap<$crate::maps::SessionKey, $crate::maps::Owner>[$crate::maps::MAX_CLIENTS];
            /// The worker of each tunnel address, two for each client: where packets that the kernel routes into the TUN go.
            TUNNELS: HashMap<$crate::maps::TunnelKey, $crate::maps::Owner>[2 * $crate::maps::MAX_CLIENTS];
            /// The workers' UDP sockets, by [`socket_key`]($crate::maps::socket_key).
            SOCKETS: ReusePortSockArray<u32, u32>[2 * $crate::maps::MAX_WORKERS];
            /// Frames that `uplink` decided about, by [`Outcome`]($crate::maps::Outcome), for each CPU.
            VERDICTS: PerCpuArray<u32, $crate::maps::FrameCount>[$crate::maps::Outcome::COUNT];
            /// Frames that `uplink` dropped, by [`DropReason`]($crate::DropReason), for each CPU.
            DROPS: PerCpuArray<u32, $crate::maps::FrameCount>[$crate::DropReason::COUNT];
            /// What the operator may change while the programs run.
            CONFIG: Array<u32, $crate::maps::Config>[1];
            /// The one budget of handshakes from addresses that nobody knows.
            HANDSHAKES: Array<u32, $crate::budget::Budget>[1];
            /// Our own addresses, with the ports we listen on.
            LOCAL: HashMap<$crate::maps::Endpoint, $crate::maps::Present>[$crate::maps::MAX_LOCAL];
            /// The server addresses of our relays.
            RELAYS: HashMap<$crate::maps::Endpoint, $crate::maps::RelayId>[$crate::maps::MAX_RELAYS];
            /// The channels that are bound and confirmed, with their budgets of handshakes; a client may have several.
            CHANNELS: HashMap<$crate::maps::ChannelKey, $crate::budget::Budget>[4 * $crate::maps::MAX_CLIENTS];
            /// Addresses that ICE has authenticated, with their budgets of handshakes.
            PEERS: HashMap<$crate::maps::Endpoint, $crate::budget::Budget>[4 * $crate::maps::MAX_CLIENTS];
            /// The beginnings of the usernames in connectivity checks that are for us.
            UFRAGS: HashMap<$crate::maps::UfragKey, $crate::maps::Present>[$crate::maps::MAX_CLIENTS];
            /// The workers' AF_XDP sockets, by [`xsk_slot`]($crate::maps::xsk_slot).
            XSKS: XskMap<u32, u32>[$crate::maps::MAX_QUEUES * $crate::maps::MAX_WORKERS];
            // FLOWS (5-tuple of a promoted flow's replies -> owner) comes with promotion: design.md section 4.
        }
    };
}

/// A value of [`COUNTERS`]: what one CPU has seen of one kind of frame.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
#[repr(C)]
pub struct FrameCount {
    /// Frames.
    pub packets: u64,
    /// Bytes of these frames, Ethernet header included.
    pub bytes: u64,
}

const _: () = assert!(size_of::<FrameCount>() == 16 && align_of::<FrameCount>() == 8);

/// A key of [`SESSIONS`]: one connection, by what all WireGuard indices have in common that we hand out for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
#[repr(C)]
pub struct SessionKey {
    /// The upper 24 bits of the index (connections.md section 10.2), native order.
    pub connection: u32,
}

const _: () = assert!(size_of::<SessionKey>() == 4);

/// A key of [`TUNNELS`]: an address in the tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
#[repr(C)]
pub struct TunnelKey {
    /// IPv6, or IPv4 mapped into it (RFC 4291 section 2.5.5.2), in the order of the wire.
    pub address: [u8; 16],
}

const _: () = assert!(size_of::<TunnelKey>() == 16);

impl TunnelKey {
    /// The key of an IPv4 address.
    #[inline(always)]
    #[must_use]
    pub const fn v4([a, b, c, d]: [u8; 4]) -> Self {
        Self { address: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d] }
    }

    /// The key of an IPv6 address.
    #[inline(always)]
    #[must_use]
    pub const fn v6(address: [u8; 16]) -> Self {
        Self { address }
    }
}

/// A value of [`SESSIONS`] and [`TUNNELS`]: whose a client is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
#[repr(C)]
pub struct Owner {
    /// The worker's number, below [`MAX_WORKERS`].
    pub worker: u32,
}

const _: () = assert!(size_of::<Owner>() == 4);

/// A key of [`LOCAL`], [`RELAYS`] and [`PEERS`]: a UDP address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
#[repr(C)]
pub struct Endpoint {
    /// IPv6, or IPv4 mapped into it (RFC 4291 section 2.5.5.2), in the order of the wire.
    pub address: [u8; 16],
    /// In the order of the wire.
    pub port: [u8; 2],
    /// Zero.
    pub padding: [u8; 2],
}

const _: () = assert!(size_of::<Endpoint>() == 20 && align_of::<Endpoint>() == 1);

impl Endpoint {
    /// The key of an IPv4 address; the port as it lies on the wire.
    #[inline(always)]
    #[must_use]
    pub const fn v4(address: [u8; 4], port: [u8; 2]) -> Self {
        Self::v6(TunnelKey::v4(address).address, port)
    }

    /// The key of an IPv6 address; the port as it lies on the wire.
    #[inline(always)]
    #[must_use]
    pub const fn v6(address: [u8; 16], port: [u8; 2]) -> Self {
        Self { address, port, padding: [0; 2] }
    }
}

/// A value of maps that are sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
#[repr(C)]
pub struct Present {
    /// 1.
    pub present: u32,
}

/// A value of [`RELAYS`]: a small number in place of the address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
#[repr(C)]
pub struct RelayId {
    /// Never used for another relay in the life of the daemon.
    pub id: u32,
}

/// A key of [`CHANNELS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
#[repr(C)]
pub struct ChannelKey {
    /// See [`RelayId`].
    pub relay: u32,
    /// The channel's number, native order.
    pub number: u32,
}

const _: () = assert!(size_of::<ChannelKey>() == 8);

/// A key of [`UFRAGS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
#[repr(C)]
pub struct UfragKey {
    /// The first four bytes of USERNAME: our own ufrag for a client (connections.md section 5).
    pub ufrag: [u8; 4],
}

/// The value of [`CONFIG`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
#[repr(C)]
pub struct Config {
    /// 1: `uplink` decides. 0, as in a fresh map: it only counts and passes.
    pub enabled: u32,
}

/// What came of a frame: the index into [`VERDICTS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum Outcome {
    /// Left to the kernel's stack.
    Passed,
    /// Meant for an AF_XDP socket that is not there, so left to the kernel's stack.
    NoSocket,
    /// Handed to an AF_XDP socket. What happens to it there, only that socket's statistics know.
    Redirected,
    /// Dropped; [`DROPS`] says why.
    Dropped,
}

impl Outcome {
    /// Every outcome, in the order of the discriminants.
    pub const ALL: &'static [Self] = &[Self::Passed, Self::NoSocket, Self::Redirected, Self::Dropped];
    /// How many there are.
    pub const COUNT: usize = Self::ALL.len();

    /// The metric label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::NoSocket => "no_socket",
            Self::Redirected => "redirected",
            Self::Dropped => "dropped",
        }
    }
}

/// The slot in [`XSKS`] of a worker's socket on a receive queue; beyond the map, where no socket can be, for numbers that
/// are too large.
#[inline(always)]
#[must_use]
pub const fn xsk_slot(queue: u32, worker: u32) -> u32 {
    #[expect(clippy::cast_possible_truncation, reason = "64")]
    const QUEUES: u32 = MAX_QUEUES as u32;
    #[expect(clippy::cast_possible_truncation, reason = "64")]
    const WORKERS: u32 = MAX_WORKERS as u32;
    if queue >= QUEUES || worker >= WORKERS { QUEUES * WORKERS } else { queue * WORKERS + worker }
}

/// The key in [`SOCKETS`] of a worker's socket for one family: IPv4 first, then IPv6.
#[inline(always)]
#[must_use]
pub const fn socket_key(worker: u32, ipv6: bool) -> u32 {
    #[expect(clippy::cast_possible_truncation, reason = "64")]
    const MAX: u32 = MAX_WORKERS as u32;
    if ipv6 { worker.wrapping_add(MAX) } else { worker }
}

/// The kinds of maps in the list; the names are aya's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapKind {
    /// `BPF_MAP_TYPE_ARRAY`.
    Array,
    /// `BPF_MAP_TYPE_PERCPU_ARRAY`.
    PerCpuArray,
    /// `BPF_MAP_TYPE_HASH` with `BPF_F_NO_PREALLOC`: memory is taken for the entries that there are. Only user space
    /// adds to such a map, so no program ever waits for memory.
    HashMap,
    /// `BPF_MAP_TYPE_REUSEPORT_SOCKARRAY`.
    ReusePortSockArray,
    /// `BPF_MAP_TYPE_XSKMAP`.
    XskMap,
}

impl MapKind {
    /// The flags the map is made with.
    #[must_use]
    pub const fn flags(self) -> u32 {
        /// linux/bpf.h
        const BPF_F_NO_PREALLOC: u32 = 1;
        match self {
            Self::HashMap => BPF_F_NO_PREALLOC,
            Self::Array | Self::PerCpuArray | Self::ReusePortSockArray | Self::XskMap => 0,
        }
    }
}

/// One map of the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapSpec {
    /// Its name in the object, under the pin directory and in `bpftool`.
    pub name: &'static str,
    /// Its kind.
    pub kind: MapKind,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Number of entries.
    pub capacity: u32,
}

impl MapSpec {
    /// Number of entries where there is to be room for `clients`, at least one, instead of [`MAX_CLIENTS`]. Only maps that
    /// hold something for each client differ: those that have a multiple of that number.
    #[must_use]
    pub const fn capacity_for(&self, clients: u32) -> u32 {
        #[expect(clippy::cast_possible_truncation, reason = "65536")]
        const ALL_CLIENTS: u32 = MAX_CLIENTS as u32;
        if self.capacity.is_multiple_of(ALL_CLIENTS) {
            (self.capacity / ALL_CLIENTS).saturating_mul(clients)
        } else {
            self.capacity
        }
    }
}

macro_rules! describe {
    ($($(#[$doc:meta])+ $name:ident: $kind:ident<$key:ty, $value:ty>[$capacity:expr];)+) => {
        $(
            $(#[$doc])+
            #[expect(clippy::cast_possible_truncation, reason = "sizes of PODs and capacities are far below 2^32")]
            pub const $name: MapSpec = MapSpec {
                name: stringify!($name),
                kind: MapKind::$kind,
                key_size: size_of::<$key>() as u32,
                value_size: size_of::<$value>() as u32,
                capacity: $capacity as u32,
            };
        )+

        /// Every map, in the order of the list.
        pub const ALL: &[MapSpec] = &[$($name,)+];
    };
}

crate::maps!(describe);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_worker_has_a_socket_of_each_family() {
        let mut seen = [false; 2 * MAX_WORKERS];
        for worker in 0..64 {
            for ipv6 in [false, true] {
                let slot = &mut seen[usize::try_from(socket_key(worker, ipv6)).unwrap()];
                assert!(!std::mem::replace(slot, true), "worker {worker}, IPv6 {ipv6}: the key is taken");
            }
        }
        assert!(seen.iter().all(|taken| *taken));
    }

    #[test]
    fn only_the_maps_of_clients_are_sized_by_their_number() {
        for map in ALL {
            let expect = match map.name {
                "TUNNELS" => 6,
                "CHANNELS" | "PEERS" => 12,
                "SESSIONS" | "UFRAGS" => 3,
                _ => map.capacity,
            };
            assert_eq!(map.capacity_for(3), expect, "{}", map.name);
            assert_eq!(map.capacity_for(u32::try_from(MAX_CLIENTS).unwrap()), map.capacity, "{}", map.name);
        }
    }

    #[test]
    fn names_fit_the_kernel_and_are_unique() {
        for (i, map) in ALL.iter().enumerate() {
            // BPF_OBJ_NAME_LEN is 16 with the terminating zero.
            assert!(map.name.len() < 16, "{} is cut by the kernel", map.name);
            assert!(map.capacity > 0, "{}", map.name);
            assert!(ALL[i + 1..].iter().all(|b| b.name != map.name));
        }
    }
}
