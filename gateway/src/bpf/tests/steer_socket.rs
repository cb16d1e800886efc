//! `steer_socket` with real sockets: three workers of each family at `up0`, clients at `far0`.

use std::{
    io::{ErrorKind, IoSliceMut},
    net::{SocketAddr, UdpSocket},
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use aya::sys::{Stats, enable_stats};
use gateway_common::{
    maps::MAX_CLIENTS,
    steer_table::{self, CONNECTION, OTHER, channel, message},
};
use gateway_proto::{ConnectionIndex, WorkerId};

use super::network::{Network, run};
use crate::bpf::{Kernel, LeftOut};

const WORKERS: usize = 3;
const PORT: u16 = 52625;
/// Source ports of a client, so that the hash alone would spread its datagrams.
const FLOWS: usize = 24;
const FAMILIES: [bool; 2] = [false, true];

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_datagrams_reach_the_worker_of_their_session_in_both_families_and_the_rest_is_spread() {
    let network = Network::make().unwrap();
    let mut group = network.enter("receiver", Group::bind).unwrap();
    let mut steering = group.steered().unwrap();
    let samples = steer_table::datagrams();
    for home in [2, 0, 1] {
        // The first and last index of all are elsewhere than what most samples belong to.
        let elsewhere = (home + 1) % WORKERS;
        for (connection, worker) in [(CONNECTION, home), (0, elsewhere), (0xff_ffff, elsewhere)] {
            steering.owners.set_session(index(connection), WorkerId::new(worker));
        }
        for ipv6 in FAMILIES {
            let mut spread = [0; WORKERS];
            for sample in &samples {
                let arrived = network.enter("sender", || send(ipv6, &sample.bytes)).unwrap();
                assert_eq!(arrived, FLOWS);
                let got = group.receive(ipv6, &sample.bytes, FLOWS);
                let Some(connection) = sample.connection else {
                    for (sum, got) in spread.iter_mut().zip(got) {
                        *sum += got;
                    }
                    continue;
                };
                let mut expect = [0; WORKERS];
                expect[if connection == CONNECTION { home } else { elsewhere }] = FLOWS;
                assert_eq!(got, expect, "{}, IPv6: {ipv6}", sample.name);
            }
            assert!(spread.iter().all(|got| *got > 0), "what is nobody's is not spread: {spread:?}");
        }
    }
    // Forgotten: the hash again.
    steering.owners.set_session(index(CONNECTION), None);
    let forgotten = message(4, CONNECTION, 64);
    network.enter("sender", || send(false, &forgotten)).unwrap();
    let got = group.receive(false, &forgotten, FLOWS);
    assert!(got.iter().filter(|got| **got > 0).count() > 1, "still steered: {got:?}");
    assert_eq!(steering.owners.left_out(), LeftOut::default());
}

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_merged_datagrams_go_whole_to_the_worker_of_the_first() {
    const SEGMENTS: usize = 20;
    let network = Network::make().unwrap();
    let group = network.enter("receiver", Group::bind).unwrap();
    let mut steering = group.steered().unwrap();
    steering.owners.set_session(index(CONNECTION), WorkerId::new(2));
    steering.owners.set_session(index(OTHER), WorkerId::new(1));
    let stats = enable_stats(Stats::RunTime).unwrap();

    let mine = message(4, CONNECTION, 96);
    let theirs = message(4, OTHER, 96);
    let table = [
        ("one client", mine.repeat(SEGMENTS), 96, 2),
        ("one relayed client", channel(0x4000, &mine).repeat(SEGMENTS), 100, 2),
        (
            "two relayed clients",
            [channel(0x4000, &mine), channel(0x4001, &theirs)].concat().repeat(10),
            100,
            2,
        ),
        (
            "the same, the other one first",
            [channel(0x4001, &theirs), channel(0x4000, &mine)].concat().repeat(10),
            100,
            1,
        ),
        ("a shorter one at the end", [mine.repeat(SEGMENTS - 1), message(4, CONNECTION, 40)].concat(), 96, 2),
    ];
    for ipv6 in FAMILIES {
        for (name, bytes, segment, worker) in &table {
            let before = steering.plane.socket_runs().unwrap();
            network.enter("sender", || send_segmented(ipv6, bytes, *segment)).unwrap();
            let (found, got, stride) = group.receive_merged(ipv6);
            assert_eq!((found, stride), (*worker, *segment), "{name}, IPv6: {ipv6}");
            assert!(got == *bytes, "{name}, IPv6: {ipv6}: other bytes");
            let runs = steering.plane.socket_runs().unwrap().0 - before.0;
            assert_eq!(runs, 1, "{name}, IPv6: {ipv6}: all {SEGMENTS} segments are steered at once");
        }
    }
    drop(stats);
}

/// The sender's stack cuts a super-datagram, because its veth takes none; GRO at the other end merges what NAPI finds.
#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_datagrams_that_gro_has_merged_stay_with_their_worker() {
    const SEGMENTS: usize = 40;
    const ROUNDS: usize = 25;
    let network = Network::make().unwrap();
    // A veth asks its peer's GRO only while it can do no TSO itself.
    network.enter("sender", || run("ethtool -K far0 tso off tx-udp-segmentation off")).unwrap();
    network.enter("receiver", || run("ethtool -K up0 gro on")).unwrap();
    let group = network.enter("receiver", Group::bind).unwrap();
    let mut steering = group.steered().unwrap();
    steering.owners.set_session(index(CONNECTION), WorkerId::new(1));
    let stats = enable_stats(Stats::RunTime).unwrap();
    let datagram = channel(0x4000, &message(4, CONNECTION, 1312));
    for ipv6 in FAMILIES {
        let before = steering.plane.socket_runs().unwrap();
        for _ in 0..ROUNDS {
            let whole = datagram.repeat(SEGMENTS);
            network.enter("sender", || send_segmented(ipv6, &whole, datagram.len())).unwrap();
            let mut got = 0;
            while got < SEGMENTS {
                let (worker, bytes, stride) = group.receive_merged(ipv6);
                assert_eq!((worker, stride), (1, datagram.len()), "IPv6: {ipv6}");
                assert!(bytes.chunks(stride).all(|bytes| bytes == datagram), "IPv6: {ipv6}: other bytes");
                got += bytes.len() / stride;
            }
            assert_eq!(got, SEGMENTS);
        }
        let runs = steering.plane.socket_runs().unwrap().0 - before.0;
        let all = u64::try_from(ROUNDS * SEGMENTS).unwrap();
        println!("steer_socket: {runs} runs for {all} datagrams behind GRO, IPv6: {ipv6}");
        assert!(runs < all, "GRO has merged nothing: {runs} runs");
    }
    drop(stats);
}

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_full_map_leaves_a_client_out_and_a_removal_makes_room() {
    let mut steering = Kernel::steering().unwrap();
    let worker = WorkerId::new(1);
    let capacity = u32::try_from(MAX_CLIENTS).unwrap();
    for connection in 0..capacity {
        steering.owners.set_session(index(connection), worker);
    }
    assert_eq!(steering.owners.left_out().sessions, 0);
    steering.owners.set_session(index(capacity), worker);
    assert_eq!(steering.owners.left_out().sessions, 1, "one more than there is room for");
    // Those that are in can still move; one that goes makes room.
    steering.owners.set_session(index(7), WorkerId::new(0));
    steering.owners.set_session(index(8), None);
    steering.owners.set_session(index(capacity), worker);
    assert_eq!(steering.owners.left_out(), LeftOut { sessions: 1, tunnels: 0 });
}

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_cost_of_steering_a_datagram_is_told() {
    let network = Network::make().unwrap();
    let mut group = network.enter("receiver", Group::bind).unwrap();
    let mut steering = group.steered().unwrap();
    for connection in 0..1000 {
        steering.owners.set_session(index(connection), WorkerId::new(1));
    }
    let data = message(4, 500, 1312);
    // The last one is not looked up; what remains is mostly the statistics' own two looks at the clock.
    let table = [
        ("data", data.clone(), true),
        ("relayed data", channel(0x4000, &data), true),
        ("an unknown session", message(4, 5000, 1312), false),
        ("text", vec![0xa5; 1312], false),
    ];
    let stats = enable_stats(Stats::RunTime).unwrap();
    for ipv6 in FAMILIES {
        for (name, datagram, known) in &table {
            let before = steering.plane.socket_runs().unwrap();
            for _ in 0..20 {
                network.enter("sender", || burst(ipv6, datagram)).unwrap();
                let got = group.receive(ipv6, datagram, BURST);
                assert!(!known || got == [0, BURST, 0], "{name}: {got:?}");
            }
            let after = steering.plane.socket_runs().unwrap();
            let (runs, time) = (after.0 - before.0, after.1 - before.1);
            assert_eq!(runs, u64::try_from(20 * BURST).unwrap());
            println!("steer_socket: {} ns for {name}, IPv6: {ipv6}", time.as_nanos() / u128::from(runs));
        }
    }
    drop(stats);
}

fn index(connection: u32) -> ConnectionIndex {
    ConnectionIndex::new(connection).unwrap()
}

/// Sends `payload` once from each of [`FLOWS`] ports; how many were sent.
fn send(ipv6: bool, payload: &[u8]) -> Result<usize> {
    let (from, to) = addresses(ipv6);
    for _ in 0..FLOWS {
        UdpSocket::bind(from)?.send_to(payload, to)?;
    }
    Ok(FLOWS)
}

/// Few enough for the buffer of one socket.
const BURST: usize = 60;

/// Sends `payload` [`BURST`] times from one port.
fn burst(ipv6: bool, payload: &[u8]) -> Result<()> {
    let (from, to) = addresses(ipv6);
    let socket = UdpSocket::bind(from)?;
    for _ in 0..BURST {
        socket.send_to(payload, to)?;
    }
    Ok(())
}

/// Sends `payload` as one super-datagram of `segment_size`.
fn send_segmented(ipv6: bool, contents: &[u8], segment_size: usize) -> Result<()> {
    let (from, destination) = addresses(ipv6);
    let socket = UdpSocket::bind(from)?;
    let state = quinn_udp::UdpSocketState::new((&socket).into())?;
    let transmit = quinn_udp::Transmit {
        destination,
        ecn: None,
        contents,
        segment_size: Some(segment_size),
        src_ip: None,
    };
    Ok(state.try_send((&socket).into(), &transmit)?)
}

/// Of the sender and of the receiver.
fn addresses(ipv6: bool) -> (SocketAddr, SocketAddr) {
    let (from, to) = if ipv6 { ("[fd99:7::2]:0", "fd99:7::1") } else { ("10.99.7.2:0", "10.99.7.1") };
    (from.parse().expect("an address"), SocketAddr::new(to.parse().expect("an address"), PORT))
}

/// The workers' sockets, with GRO.
struct Group {
    v4: Vec<Socket>,
    v6: Vec<Socket>,
}

type Socket = (UdpSocket, quinn_udp::UdpSocketState);

impl Group {
    fn bind() -> Result<Self> {
        let bind = |ipv6| (0..WORKERS).map(|_| reuseport(ipv6)).collect::<Result<Vec<_>>>();
        Ok(Self { v4: bind(false)?, v6: bind(true)? })
    }

    fn of(&self, ipv6: bool) -> &[Socket] {
        if ipv6 { &self.v6 } else { &self.v4 }
    }

    fn steered(&self) -> Result<Kernel> {
        let mut steering = Kernel::steering()?;
        for ipv6 in FAMILIES {
            let sockets: Vec<_> = self.of(ipv6).iter().map(|(socket, _)| socket.as_fd()).collect();
            steering.plane.attach_sockets(ipv6, &sockets)?;
        }
        Ok(steering)
    }

    /// How often each worker got `payload`, after `count` datagrams in all; nothing else may arrive, nowhere.
    fn receive(&mut self, ipv6: bool, payload: &[u8], count: usize) -> [usize; WORKERS] {
        let mut got = [0; WORKERS];
        let mut buffer = vec![0; 1 << 16];
        let deadline = Instant::now() + Duration::from_secs(5);
        while got.iter().sum::<usize>() < count {
            assert!(Instant::now() < deadline, "datagrams are missing: {got:?}");
            for (worker, (socket, _)) in self.of(ipv6).iter().enumerate() {
                match socket.recv_from(&mut buffer) {
                    Ok((len, _)) => {
                        assert!(buffer[..len] == *payload, "worker {worker} got something else: {len} bytes");
                        got[worker] += 1;
                    }
                    Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock, "{e}"),
                }
            }
        }
        let others =
            self.of(!ipv6).iter().filter(|(socket, _)| socket.recv_from(&mut buffer).is_ok()).count();
        assert_eq!(others, 0, "datagrams changed their family");
        got
    }

    /// The worker that got one super-datagram, its bytes, and the length of its segments.
    fn receive_merged(&self, ipv6: bool) -> (usize, Vec<u8>, usize) {
        let mut buffer = vec![0; 1 << 16];
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            assert!(Instant::now() < deadline, "nothing has arrived");
            for (worker, (socket, state)) in self.of(ipv6).iter().enumerate() {
                let mut meta = [quinn_udp::RecvMeta::default()];
                match state.recv(socket.into(), &mut [IoSliceMut::new(&mut buffer)], &mut meta) {
                    Ok(_) => return (worker, buffer[..meta[0].len].to_vec(), meta[0].stride),
                    Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock, "{e}"),
                }
            }
        }
    }
}

fn reuseport(ipv6: bool) -> Result<Socket> {
    let domain = if ipv6 { socket2::Domain::IPV6 } else { socket2::Domain::IPV4 };
    let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, None)?;
    socket.set_reuse_port(true)?;
    if ipv6 {
        socket.set_only_v6(true)?;
    }
    let any: std::net::IpAddr = if ipv6 { [0; 16].into() } else { [0; 4].into() };
    socket.bind(&SocketAddr::new(any, PORT).into())?;
    let socket: UdpSocket = socket.into();
    // Sets the socket non-blocking, too.
    let state = quinn_udp::UdpSocketState::new((&socket).into())?;
    ensure!(state.gro_segments() > 1, "the kernel offers no GRO on UDP sockets");
    Ok((socket, state))
}
