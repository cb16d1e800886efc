//! The XDP program `uplink`, the maps it asks, and its counters.
//!
//! The maps hold what control and workers know; the writers here only translate. A map that is full is no error: what it
//! has no room for goes the slow way and is counted. Where a missing entry would make the kernel drop what a worker would
//! take ([`Uplink::must_pass`]), [`Kernel`](super::Kernel) switches the program off.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    os::fd::BorrowedFd,
};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{Array, HashMap, MapData, PerCpuArray, XskMap},
    programs::{Xdp, XdpMode, xdp::XdpLinkId},
};
use bytemuck::Pod;
use gateway_common::{
    DropReason, FrameCount,
    budget::Budget,
    maps::{self, ChannelKey, Config, Endpoint, MapSpec, Outcome, Present, RelayId, UfragKey, xsk_slot},
};
#[cfg(test)]
use gateway_common::{FrameKind, decide::Purse};
use gateway_proto::WorkerId;

use super::KernelPlane;

impl KernelPlane {
    /// Loads `uplink`. It is not attached yet.
    ///
    /// # Errors
    /// If the verifier refuses it, or the process may not load XDP programs (CAP_BPF and CAP_NET_ADMIN).
    pub fn load_uplink(&mut self) -> Result<()> {
        program(&mut self.ebpf)?.load().context("the kernel does not take the program uplink")
    }

    /// Attaches `uplink` to an interface of the calling thread's network namespace. It is detached by
    /// [`detach_uplink`](Self::detach_uplink), and in any case when the process ends.
    ///
    /// # Errors
    /// If it is not loaded, there is no such interface, or its driver does not take a program in this mode.
    pub fn attach_uplink(&mut self, interface: &str, mode: XdpMode) -> Result<XdpLinkId> {
        program(&mut self.ebpf)?
            .attach(interface, mode)
            .with_context(|| format!("cannot attach the program uplink to {interface} ({mode:?})"))
    }

    /// Detaches it from where it was attached.
    ///
    /// # Errors
    /// If it is not attached any more.
    pub fn detach_uplink(&mut self, link: XdpLinkId) -> Result<()> {
        program(&mut self.ebpf)?.detach(link).context("cannot detach the program uplink")
    }

    /// The kernel's number of the program.
    pub fn uplink_id(&self) -> Option<u32> {
        let program: &Xdp = self.ebpf.program("uplink")?.try_into().ok()?;
        Some(program.info().ok()?.id())
    }

    /// Frames seen so far, by kind, summed over the CPUs.
    ///
    /// # Errors
    /// If the kernel does not let the map be read.
    #[cfg(test)]
    pub fn frame_counts(&self) -> Result<Vec<(FrameKind, FrameCount)>> {
        self.counts(&maps::COUNTERS, FrameKind::ALL)
    }

    /// Frames by what came of them, summed over the CPUs.
    ///
    /// # Errors
    /// As for [`frame_counts`](Self::frame_counts).
    pub fn outcomes(&self) -> Result<Vec<(Outcome, FrameCount)>> {
        self.counts(&maps::VERDICTS, Outcome::ALL)
    }

    /// Frames that `uplink` dropped, by reason, summed over the CPUs.
    ///
    /// # Errors
    /// As for [`frame_counts`](Self::frame_counts).
    pub fn drops(&self) -> Result<Vec<(DropReason, FrameCount)>> {
        self.counts(&maps::DROPS, DropReason::ALL)
    }

    fn counts<T: Copy>(&self, spec: &MapSpec, all: &[T]) -> Result<Vec<(T, FrameCount)>> {
        let map = self.ebpf.map(spec.name).with_context(|| format!("the map {} is gone", spec.name))?;
        // aya's Pod is not ours to implement for FrameCount; the two words are cast instead.
        let map = PerCpuArray::<&MapData, [u64; size_of::<FrameCount>() / 8]>::try_from(map)?;
        let mut counts = Vec::with_capacity(all.len());
        for (index, what) in (0..).zip(all) {
            let mut sum = FrameCount::default();
            for words in map.get(&index, 0)?.iter() {
                let one: FrameCount = bytemuck::cast(*words);
                sum.packets += one.packets;
                sum.bytes += one.bytes;
            }
            counts.push((*what, sum));
        }
        Ok(counts)
    }
}

/// `uplink` in the object.
pub(super) fn program(ebpf: &mut Ebpf) -> Result<&mut Xdp> {
    Ok(ebpf.program_mut("uplink").context("the BPF object has no program uplink")?.try_into()?)
}

/// The maps that only `uplink` asks. It is switched off until [`enable`](Self::enable) says otherwise.
pub struct Uplink {
    local: Table<20, 4>,
    relays: Table<20, 4>,
    channels: Table<8, 8>,
    peers: Table<20, 8>,
    ufrags: Table<4, 4>,
    sockets: XskMap<MapData>,
    config: Array<MapData, u32>,
    /// The relays that are entered, and the channels of each that are.
    known: BTreeMap<SocketAddr, Relay>,
    next_relay: u32,
}

struct Relay {
    id: u32,
    channels: BTreeSet<u16>,
}

impl Uplink {
    /// Takes the maps out of `plane`. Pin them before, if they are to be pinned.
    ///
    /// # Errors
    /// If they were taken before.
    pub fn take(plane: &mut KernelPlane) -> Result<Self> {
        let ebpf = &mut plane.ebpf;
        Ok(Self {
            local: Table::take(ebpf, &maps::LOCAL)?,
            relays: Table::take(ebpf, &maps::RELAYS)?,
            channels: Table::take(ebpf, &maps::CHANNELS)?,
            peers: Table::take(ebpf, &maps::PEERS)?,
            ufrags: Table::take(ebpf, &maps::UFRAGS)?,
            sockets: super::take(ebpf, &maps::XSKS)?.try_into()?,
            config: super::take(ebpf, &maps::CONFIG)?.try_into()?,
            known: BTreeMap::new(),
            next_relay: 1,
        })
    }

    /// Switches the decisions on or off, for the very next frame. The program stays attached: detaching resets many
    /// drivers.
    ///
    /// # Errors
    /// If the kernel does not let the map be written.
    pub fn enable(&mut self, enabled: bool) -> Result<()> {
        let Config { enabled } = Config { enabled: u32::from(enabled) };
        self.config.set(0, enabled, 0).context("cannot switch the program uplink")
    }

    /// Frames to this address and port are decided about, or not; others pass.
    pub fn set_local(&mut self, ours: SocketAddr, here: bool) {
        self.local.set(endpoint(ours), here.then_some(PRESENT), Write::Any);
    }

    /// `relay` is a server address of one of our relays, or no more; then its channels are gone too.
    pub fn set_relay(&mut self, relay: SocketAddr, known: bool) {
        if known {
            if !self.known.contains_key(&relay) {
                let id = self.next_relay;
                // Four billion relays in one life: never.
                self.next_relay = self.next_relay.wrapping_add(1);
                self.known.insert(relay, Relay { id, channels: BTreeSet::new() });
                self.relays.set(endpoint(relay), Some(RelayId { id }), Write::Any);
            }
        } else if let Some(Relay { id, channels }) = self.known.remove(&relay) {
            self.relays.set(endpoint(relay), None::<RelayId>, Write::Any);
            for number in channels {
                let key = ChannelKey { relay: id, number: u32::from(number) };
                self.channels.set(key, None::<Budget>, Write::Any);
            }
        }
    }

    /// The channel is bound and confirmed, or no more. Ignored for a relay that is not known.
    pub fn set_channel(&mut self, relay: SocketAddr, number: u16, bound: bool) {
        let Some(relay) = self.known.get_mut(&relay) else { return };
        let key = ChannelKey { relay: relay.id, number: u32::from(number) };
        if bound {
            relay.channels.insert(number);
        } else {
            relay.channels.remove(&number);
        }
        self.channels.set(key, bound.then_some(Budget::default()), Write::KeepOld);
    }

    /// ICE has authenticated this address, or it is no client's any more.
    pub fn set_peer(&mut self, peer: SocketAddr, authenticated: bool) {
        self.peers.set(endpoint(peer), authenticated.then_some(Budget::default()), Write::KeepOld);
    }

    /// Connectivity checks whose USERNAME begins so are for one of our clients, or not. Only the first four bytes count; the
    /// caller counts how many share them.
    pub fn set_ufrag(&mut self, ufrag: [u8; 4], known: bool) {
        self.ufrags.set(UfragKey { ufrag }, known.then_some(PRESENT), Write::Any);
    }

    /// Frames for `worker` that come on `queue` go into this AF_XDP socket; with `None`, to the kernel's stack.
    ///
    /// # Errors
    /// If it is no such socket, or queue or worker are beyond what there may be.
    pub fn set_socket(&mut self, queue: u32, worker: WorkerId, socket: Option<BorrowedFd<'_>>) -> Result<()> {
        let worker = u32::try_from(worker.get()).context("workers are fewer than MAX_WORKERS")?;
        let slot = xsk_slot(queue, worker);
        match socket {
            Some(socket) => self.sockets.set(slot, socket, 0),
            None => self.sockets.unset(slot),
        }
        .with_context(|| format!("no place for the socket of worker {worker} on queue {queue}"))
    }

    /// How often a map did not take an entry, by its name.
    #[must_use]
    pub fn left_out(&self) -> [(&'static str, u64); 5] {
        [
            (maps::LOCAL.name, self.local.left_out),
            (maps::RELAYS.name, self.relays.left_out),
            (maps::CHANNELS.name, self.channels.left_out),
            (maps::PEERS.name, self.peers.left_out),
            (maps::UFRAGS.name, self.ufrags.left_out),
        ]
    }

    /// Its part of [`Kernel::must_pass`](super::Kernel::must_pass).
    #[must_use]
    pub fn must_pass(&self) -> bool {
        self.relays.left_out > 0 || self.channels.left_out > 0 || self.ufrags.left_out > 0
    }
}

impl fmt::Debug for Uplink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uplink").field("left_out", &self.left_out()).finish_non_exhaustive()
    }
}

#[cfg(test)]
impl Uplink {
    /// Puts a budget that is there into this state.
    pub(super) fn set_budget(&mut self, plane: &mut KernelPlane, purse: &Purse, budget: Budget) {
        match purse {
            Purse::Peer(peer) => self.peers.set(*peer, Some(budget), Write::Any),
            Purse::Channel(key) => self.channels.set(*key, Some(budget), Write::Any),
            Purse::Anyone => {
                let map = plane.ebpf.map_mut(maps::HANDSHAKES.name).expect("a map of the list");
                let mut map = Array::<_, u64>::try_from(map).expect("an array");
                map.set(0, budget.full_at, 0).expect("the first entry");
            }
        }
    }

    /// The number by which the kernel knows a relay.
    pub(super) fn relay_id(&self, relay: SocketAddr) -> Option<u32> {
        self.known.get(&relay).map(|relay| relay.id)
    }
}

const PRESENT: Present = Present { present: 1 };

/// An address as a key. IPv4 mapped into IPv6 is the same as IPv4.
fn endpoint(address: SocketAddr) -> Endpoint {
    let port = address.port().to_be_bytes();
    match address.ip() {
        IpAddr::V4(ip) => Endpoint::v4(ip.octets(), port),
        IpAddr::V6(ip) => Endpoint::v6(ip.octets(), port),
    }
}

/// What to do with an entry that is there already.
#[derive(Clone, Copy)]
enum Write {
    /// Overwrite it.
    Any,
    /// Keep it, and with it the budget that the kernel has spent.
    KeepOld,
}

/// A hash map with keys of `K` and values of `V` bytes. aya's Pod is not ours to implement for the types of the contract;
/// their bytes are cast instead.
struct Table<const K: usize, const V: usize> {
    map: HashMap<MapData, [u8; K], [u8; V]>,
    left_out: u64,
}

impl<const K: usize, const V: usize> Table<K, V> {
    fn take(ebpf: &mut Ebpf, spec: &MapSpec) -> Result<Self> {
        Ok(Self { map: super::take(ebpf, spec)?.try_into()?, left_out: 0 })
    }

    /// Removing what is not there is no failure.
    fn set(&mut self, key: impl Pod, value: Option<impl Pod>, write: Write) {
        let key: [u8; K] = bytes(&key);
        let Some(value) = value else {
            let _not_there = self.map.remove(&key);
            return;
        };
        let there = matches!(write, Write::KeepOld) && self.map.get(&key, 0).is_ok();
        if !there && self.map.insert(key, bytes::<V>(&value), 0).is_err() {
            self.left_out += 1;
        }
    }
}

fn bytes<const N: usize>(of: &impl Pod) -> [u8; N] {
    bytemuck::bytes_of(of).try_into().expect("a table's sizes are those of its keys and values")
}
