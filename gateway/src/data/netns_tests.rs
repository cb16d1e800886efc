//! The data plane on real devices, in network namespaces made for each test and gone with its thread.
//!
//! ```text
//!   namespace a                                                     namespace b
//!   100.64.0.1  tun-firezone -- worker -- 192.0.2.1 === veth === 192.0.2.2 -- worker -- tun-firezone  100.64.0.2
//!   fd00:2021:1111::1                                                                   fd00:2021:1111::2
//! ```
//!
//! The workers are a [`Pipe`]: no cryptography, one datagram per packet. Without root these tests say so and pass.

#![expect(clippy::cast_possible_truncation, reason = "patterns to fill packets with")]

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::Command as Process,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::TryStreamExt as _;
use gateway_common::{Counters, DropReason};
use gateway_proto::{
    Command, Datagram, Ecn, Handover, Route, Sink, Transmit, WorkerEvent,
    addr::TunnelAddrs,
    command::StunDatagram,
    worker::{Moved, Traffic},
};
use nix::sched::{CloneFlags, setns, unshare};
use rand::{RngCore as _, SeedableRng as _, rngs::SmallRng};
use rtnetlink::packet_route::address::AddressAttribute;
use sha2::{Digest as _, Sha256};

use super::{
    BufferSizes, Capabilities, Config, DataPlane, TUN_NAME,
    capabilities::Capability,
    gso::Outlet,
    interface::{Families, Interface},
    tun::Tun,
    turn::Core,
    udp::{self, Receiver, Sockets},
};

const ALL: Capabilities = Capabilities::ALL;
const SIZES: BufferSizes = BufferSizes { recv: udp::RECV_BUFFER, send: udp::SEND_BUFFER };

#[test]
fn interface_is_changed_by_difference_adopted_after_a_crash_and_cleaned_up() {
    in_netns(async {
        let tun = Tun::create(TUN_NAME, 1, ALL).unwrap();
        let mut interface = Interface::new(TUN_NAME).unwrap();
        assert_eq!(interface.configure(addrs(1)).await.unwrap(), Families::Dual);
        let link = ip("link show dev tun-firezone");
        assert!(link.contains("mtu 1280") && link.contains("qlen 10000") && link.contains(",UP"), "{link}");
        assert_eq!(addresses(), ["100.64.0.1/32", "fd00:2021:1111::1/128"]);
        let rule = "100:\tnot from all fwmark 0xfd002021 lookup 539098368";
        let rules = || (ip("-4 rule show priority 100"), ip("-6 rule show priority 100"));
        assert_eq!(rules(), (rule.into(), rule.into()));
        let routes = || (ip("-4 route show table 539098368"), ip("-6 route show table 539098368"));
        let routed = routes();
        assert!(routed.0.starts_with("100.64.0.0/11 dev tun-firezone proto static"), "{routed:?}");
        assert!(routed.1.starts_with("fd00:2021:1111::/107 dev tun-firezone proto static"), "{routed:?}");

        let since = created(interface_index().await).await;
        ip("addr add 192.0.2.9/24 dev tun-firezone");
        tokio::time::sleep(Duration::from_millis(50)).await;
        let changed = TunnelAddrs { v4: addrs(3).v4, ..addrs(1) };
        assert_eq!(interface.configure(changed).await.unwrap(), Families::Dual);
        assert_eq!(addresses(), ["100.64.0.3/32", "fd00:2021:1111::1/128"]);
        assert_eq!(
            created(interface_index().await).await[1],
            since[1],
            "the unchanged address was not touched"
        );
        assert_eq!(routes(), routed);

        drop((interface, tun));
        assert_eq!(rules(), (rule.into(), rule.into()), "a crash leaves the rules");
        let _tun = Tun::create(TUN_NAME, 1, ALL).unwrap();
        let mut interface = Interface::new(TUN_NAME).unwrap();
        assert_eq!(interface.configure(addrs(1)).await.unwrap(), Families::Dual);
        assert_eq!((rules(), routes()), ((rule.into(), rule.into()), routed));
        interface.remove().await;
        assert_eq!(rules(), (String::new(), String::new()));
        Interface::new(TUN_NAME).unwrap().remove().await;
    });
}

#[test]
fn machine_without_ipv6_is_v4_only() {
    in_netns(async {
        let _tun = Tun::create(TUN_NAME, 1, ALL).unwrap();
        std::fs::write(format!("/proc/sys/net/ipv6/conf/{TUN_NAME}/disable_ipv6"), "1").unwrap();
        let mut interface = Interface::new(TUN_NAME).unwrap();
        assert_eq!(interface.configure(addrs(1)).await.unwrap(), Families::V4Only);
        assert_eq!(ip("-6 rule show priority 100"), "");
        let gone = Interface::new("no-such-tun").unwrap().configure(addrs(1)).await.unwrap_err();
        assert_eq!(gone.to_string(), "The TUN device no-such-tun is gone");
    });
}

#[test]
fn second_owner_of_the_tun_device_fails_in_one_sentence() {
    in_netns(async {
        let _first = Tun::create(TUN_NAME, 1, ALL).unwrap();
        let error = Tun::create(TUN_NAME, 1, ALL).err().expect("the device is exclusive");
        assert_eq!(
            error.to_string(),
            "The TUN device tun-firezone is in use by another process; stop that first"
        );
    });
}

#[test]
fn datagrams_carry_their_addresses_and_ecn_and_the_port_is_only_a_wish() {
    in_netns(async {
        ip("link set lo up");
        let sockets = one(Sockets::open(1, SIZES, ALL));
        for socket in [&sockets.v4, &sockets.v6].into_iter().flatten() {
            assert_eq!(socket.port(), 52_625);
        }
        let other = one(Sockets::open(1, SIZES, ALL));
        assert!(other.v4.as_ref().is_some_and(|s| ![0, 52_625].contains(&s.port())));

        let mut receiver = Receiver::new();
        for (to, from) in [("127.0.0.5:52625", "127.0.0.9"), ("[::1]:52625", "::1")] {
            let (to, from): (SocketAddr, IpAddr) = (to.parse().unwrap(), from.parse().unwrap());
            let (socket, sender) = match to.is_ipv4() {
                true => (sockets.v4.as_ref().unwrap(), other.v4.as_ref().unwrap()),
                false => (sockets.v6.as_ref().unwrap(), other.v6.as_ref().unwrap()),
            };
            let source = SocketAddr::new(from, sender.port());
            // Two full segments and a shorter one in one send, an empty datagram, one that is too long.
            let whole: Vec<u8> = (0..3000).map(|i| (i % 251) as u8).collect();
            for (contents, segment_size) in [(&whole[..], Some(1300)), (&[], None), (&whole[..1317], None)] {
                let transmit = quinn_udp::Transmit {
                    destination: to,
                    ecn: Some(quinn_udp::EcnCodepoint::Ect0),
                    contents,
                    segment_size,
                    src_ip: Some(from),
                };
                sender.state.try_send((&sender.socket).into(), &transmit).unwrap();
            }
            let transmit = Transmit { src: Some(source), dst: to, payload: vec![9; 9] };
            other.transmit(&transmit).unwrap();

            let mut drops = Counters::default();
            let mut got = Vec::new();
            while let Ok(batch) = receiver.recv(socket) {
                for d in batch.datagrams(&mut drops) {
                    assert_eq!((d.local, d.from), (to, source));
                    got.push((d.ecn, d.payload.to_vec()));
                }
            }
            let ect = |bytes: &[u8]| (Ecn::Ect0, bytes.to_vec());
            let expect = vec![
                ect(&whole[..1300]),
                ect(&whole[1300..2600]),
                ect(&whole[2600..]),
                ect(&[]),
                (Ecn::NotEct, vec![9; 9]),
            ];
            assert!(
                got == expect,
                "{to}: {:?}",
                got.iter().map(|(ecn, p)| (*ecn, p.len())).collect::<Vec<_>>()
            );
            assert_eq!(drops.get(DropReason::OversizedDatagram), 1);
        }
    });
}

#[test]
fn vanished_source_address_costs_its_own_datagrams_only() {
    in_netns(async {
        ip("link set lo up");
        let sockets = one(Sockets::open(1, SIZES, ALL));
        let receiver = one(Sockets::open(1, SIZES, ALL)).v4.unwrap();
        let mut outlet = Outlet::new(sockets.v4.unwrap());
        let dst = ([127, 0, 0, 1], receiver.port()).into();
        let src = |ip: &str| Some(SocketAddr::new(ip.parse().unwrap(), 52_625));
        let gone = Route { src: src("192.0.2.77"), dst, ecn: Ecn::Ect0 };
        let good = Route { src: src("127.0.0.3"), dst, ecn: Ecn::Ect1 };
        let (now, mut drops) = (Instant::now(), Counters::default());
        for route in [good, gone, good] {
            for _ in 0..3 {
                outlet.reserve(&route, 500, now, &mut drops).unwrap()[..500].fill(1);
                outlet.commit(500);
            }
            outlet.flush(now, &mut drops);
        }
        assert_eq!(drops.iter().collect::<Vec<_>>(), [(DropReason::UdpSend, 3)]);
        let mut buffers = Receiver::new();
        let batch = buffers.recv(&receiver).unwrap();
        assert_eq!(batch.messages(), 2, "both were sent with segmentation offload");
        let got: Vec<_> = batch.datagrams(&mut drops).map(|d| (d.from, d.ecn, d.payload.len())).collect();
        assert_eq!(got, [(good.src.unwrap(), Ecn::Ect1, 500); 6], "and with their ECN");
    });
}

#[test]
fn tcp_and_udp_pass_whole_both_ways_with_offloads_in_use() {
    in_netns(both_ways(ALL, &[("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")]));
}

#[test]
fn tcp_and_udp_pass_whole_with_any_offload_forbidden() {
    for words in
        ["tun-offload", "tun-uso", "udp-gro", "udp-gso", "sendmmsg", "tun-offload,udp-gro,udp-gso,sendmmsg"]
    {
        println!("without {words}");
        let allowed = Capabilities::without(words).unwrap();
        in_netns(both_ways(allowed, &[("192.0.2.1", "192.0.2.2")]));
    }
}

/// Two data planes over each pair of addresses; TCP and UDP between them, in both families and directions.
async fn both_ways(allowed: Capabilities, pairs: &[(&str, &str)]) {
    ip("link set lo up");
    let a = File::open("/proc/thread-self/ns/net").unwrap();
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let b = File::open("/proc/thread-self/ns/net").unwrap();
    let enter = |ns: &File| setns(ns, CloneFlags::CLONE_NEWNET).unwrap();
    veth_between(&a, &b).await;

    for (outer_a, outer_b) in pairs {
        enter(&a);
        let side_a = Side::start(1, outer_a, outer_b, allowed).await;
        enter(&b);
        let side_b = Side::start(2, outer_b, outer_a, allowed).await;
        for (ip_a, ip_b) in
            [(IpAddr::from(addrs(1).v4), IpAddr::from(addrs(2).v4)), (addrs(1).v6.into(), addrs(2).v6.into())]
        {
            enter(&b);
            let listener = TcpListener::bind((ip_b, 0)).unwrap();
            let udp_b = [0; 2].map(|port| UdpSocket::bind((ip_b, port)).unwrap());
            let to_b = listener.local_addr().unwrap();
            enter(&a);
            let stream = TcpStream::connect_timeout(&to_b, Duration::from_secs(5)).unwrap();
            let (accepted, from) = listener.accept().unwrap();
            assert_eq!(from.ip(), ip_a);
            transfer(stream.try_clone().unwrap(), accepted.try_clone().unwrap());
            transfer(accepted, stream);
            let udp_a = [0; 2].map(|port| UdpSocket::bind((ip_a, port)).unwrap());
            datagrams(&udp_a[0], &udp_b[0]);
            datagrams(&udp_b[1], &udp_a[1]);
        }
        let mut sides = [(side_a, &a), (side_b, &b)];
        for (side, ns) in &mut sides {
            enter(ns);
            side.check(allowed).await;
        }
        for (side, _) in sides {
            side.interface.remove().await;
            side.data.close().await.unwrap();
        }
    }
}

#[test]
fn dead_worker_ends_the_wait_for_events() {
    type Action = fn(&mut Pipe);
    let table: [(Action, &str); 2] = [
        (|_| panic!("as the test wants"), "Worker 0 panicked: as the test wants"),
        (|_| std::thread::sleep(Duration::from_secs(8)), "Worker 0 has been busy with one batch for 2 s"),
    ];
    for (action, expect) in table {
        in_netns(async move {
            let mut pipe = Pipe::new(None);
            pipe.on_command = Some(action);
            let (mut data, _) = start(pipe);
            data.send(Command::Relays([].into()));
            let error = tokio::time::timeout(Duration::from_secs(6), data.recv())
                .await
                .expect("noticed")
                .unwrap_err();
            assert!(error.to_string().starts_with(expect), "{error}");
        });
    }
}

#[test]
fn deleted_tun_device_ends_the_worker() {
    in_netns(async {
        let (mut data, _) = start(Pipe::new(None));
        ip("link del tun-firezone");
        let error =
            tokio::time::timeout(Duration::from_secs(6), data.recv()).await.expect("noticed").unwrap_err();
        assert!(error.to_string().starts_with("The TUN device is gone"), "{error:#}");
    });
}

#[test]
fn idle_worker_sleeps_and_one_with_a_stuck_deadline_does_not_spin() {
    in_netns(async {
        for (stuck, most) in [(false, 2), (true, 400)] {
            let turns = Arc::new(AtomicU64::new(0));
            let pipe = Pipe { stuck_deadline: stuck, turns: turns.clone(), ..Pipe::new(None) };
            let (data, _) = start(pipe);
            tokio::time::sleep(Duration::from_millis(300)).await;
            let turns = turns.load(Ordering::Relaxed);
            assert!(turns <= most, "{turns} turns in 300 ms");
            assert!(!stuck || turns > 10, "{turns} turns in 300 ms");
            data.close().await.unwrap();
        }
    });
}

#[test]
fn flood_of_one_direction_leaves_turns_to_the_other() {
    in_netns(async {
        ip("link set lo up");
        let mut pipe = Pipe::new(None);
        pipe.on_command = Some(|_| std::thread::sleep(Duration::from_millis(800)));
        let batches = pipe.batches.clone();
        let (mut data, _) = start(pipe);
        let mut interface = Interface::new(TUN_NAME).unwrap();
        interface.configure(addrs(1)).await.unwrap();
        data.send(Command::Relays([].into()));
        tokio::time::sleep(Duration::from_millis(50)).await;

        // While the worker is busy elsewhere: 10 000 datagrams on the socket, 3000 packets in the device.
        let flood = UdpSocket::bind("127.0.0.1:0").unwrap();
        let state = quinn_udp::UdpSocketState::new((&flood).into()).unwrap();
        for _ in 0..200 {
            let transmit = quinn_udp::Transmit {
                destination: "127.0.0.1:52625".parse().unwrap(),
                ecn: None,
                contents: &[0xff; 50 * 1000],
                segment_size: Some(1000),
                src_ip: None,
            };
            state.try_send((&flood).into(), &transmit).unwrap();
        }
        let inner = UdpSocket::bind((addrs(1).v4, 0)).unwrap();
        for _ in 0..3000 {
            inner.send_to(&[1; 100], (addrs(2).v4, 9)).unwrap();
        }
        let total = |of_tun| -> usize {
            let batches = batches.lock().unwrap();
            batches.iter().filter(|(tun, _)| *tun == of_tun).map(|(_, count)| count).sum()
        };
        let deadline = Instant::now() + Duration::from_secs(8);
        while (total(false), total(true)) < (10_000, 3000) && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!((total(false), total(true)), (10_000, 3000), "nothing is lost");
        let (mut run, mut longest, mut left) = (0, [0; 2], 3000);
        let mut before = true;
        for &(tun, count) in batches.lock().unwrap().iter() {
            run = if tun == before { run + count } else { count };
            before = tun;
            if left > 0 {
                longest[usize::from(tun)] = run.max(longest[usize::from(tun)]);
            }
            left -= if tun { count } else { 0 };
        }
        // A turn ends at 1024, and the batch that gets there may be of 32 * 50.
        assert!(longest[0] < 1024 + 1600 && longest[1] < 1024 + 400, "{longest:?} in a row");
        interface.remove().await;
        data.close().await.unwrap();
    });
}

#[test]
fn data_plane_starts_hears_stun_sends_and_closes() {
    for workers in [1, 2, 4] {
        in_netns(start_and_close(workers));
    }
}

async fn start_and_close(workers: usize) {
    {
        ip("link set lo up");
        let start = || {
            DataPlane::start(Config {
                tun_name: TUN_NAME.into(),
                workers,
                private_key: x25519_dalek::StaticSecret::from([7; 32]),
                allow_own_ip: false,
                seed: 1,
                buffers: SIZES,
                allowed: ALL,
            })
        };
        let data = start().unwrap();
        assert!(
            start().err().expect("the device is taken").to_string().contains("in use by another process")
        );
        let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
        peer.send_to(&[0xff; 20], "127.0.0.1:52625").unwrap();
        let src = Some("127.0.0.7:52625".parse().unwrap());
        data.transmit(&Transmit { src, dst: peer.local_addr().unwrap(), payload: vec![1, 2, 3] });
        let mut buffer = [0; 10];
        peer.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        assert_eq!(peer.recv_from(&mut buffer).unwrap(), (3, "127.0.0.7:52625".parse().unwrap()));
        let counted = || data.counters().get(DropReason::UnknownPayload) == 1;
        let deadline = Instant::now() + Duration::from_secs(5);
        while !counted() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(counted(), "{:?}", data.counters());
        data.close().await.unwrap();
        assert_eq!(ip("link show dev tun-firezone"), "", "the device is gone");
        start().unwrap().close().await.unwrap();
    }
}

/// Runs `test` in a network namespace of its own; says so if it cannot.
fn in_netns(test: impl Future<Output = ()> + Send) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: making network namespaces and TUN devices needs root");
        return;
    }
    std::thread::scope(|scope| {
        let run = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(test);
        };
        if let Err(panic) = scope.spawn(run).join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// A core without cryptography: every packet becomes a datagram to `route`, every datagram a packet.
struct Pipe {
    route: Option<Route>,
    counters: Counters,
    turns: Arc<AtomicU64>,
    /// Packets and datagrams that came in.
    seen: Arc<AtomicU64>,
    /// What came in, in order: how many datagrams, and whether they were packets of the TUN device instead.
    batches: Arc<Mutex<Vec<(bool, usize)>>>,
    stuck_deadline: bool,
    on_command: Option<fn(&mut Self)>,
    events: Vec<WorkerEvent>,
    /// An event was made of the first datagram.
    told: bool,
}

impl Pipe {
    fn new(route: Option<Route>) -> Self {
        Self {
            route,
            counters: Counters::default(),
            turns: Arc::default(),
            seen: Arc::default(),
            batches: Arc::default(),
            stuck_deadline: false,
            on_command: None,
            events: Vec::new(),
            told: false,
        }
    }
}

impl Core for Pipe {
    fn handle_command(&mut self, command: Command, _: Instant, _: &mut impl Sink) {
        if let (Some(action), false) = (self.on_command, matches!(command, Command::Shutdown)) {
            action(self);
        }
    }

    fn handle_datagrams<'a>(
        &mut self,
        batch: impl IntoIterator<Item = Datagram<'a>>,
        _: Instant,
        sink: &mut impl Sink,
    ) {
        let mut count = 0;
        for d in batch {
            count += 1;
            self.seen.fetch_add(1, Ordering::Relaxed);
            let Some(buffer) = sink.reserve_packet(d.payload.len()) else {
                self.counters.count(DropReason::Backpressure);
                continue;
            };
            buffer[..d.payload.len()].copy_from_slice(d.payload);
            sink.commit_packet(d.payload.len());
            if !std::mem::replace(&mut self.told, true) {
                let (local, from, payload) = (d.local, d.from, Vec::new());
                self.events.push(WorkerEvent::Stun(StunDatagram {
                    heard_by: gateway_proto::WorkerId::FIRST,
                    local,
                    from,
                    via: None,
                    payload,
                }));
            }
        }
        self.batches.lock().unwrap().push((false, count));
    }

    fn handle_packets<'a>(
        &mut self,
        batch: impl IntoIterator<Item = &'a mut [u8]>,
        _: Instant,
        sink: &mut impl Sink,
    ) {
        let mut count = 0;
        for packet in batch {
            count += 1;
            self.seen.fetch_add(1, Ordering::Relaxed);
            let buffer = self.route.as_ref().and_then(|route| sink.reserve_datagram(route, packet.len()));
            let Some(buffer) = buffer else {
                self.counters.count(DropReason::Backpressure);
                continue;
            };
            buffer[..packet.len()].copy_from_slice(packet);
            sink.commit_datagram(packet.len());
        }
        self.batches.lock().unwrap().push((true, count));
    }

    fn handle_handovers<'a>(
        &mut self,
        _: impl IntoIterator<Item = Handover<'a>>,
        _: Instant,
        _: &mut impl Sink,
    ) {
    }

    fn handle_moved(&mut self, _: Moved, _: Instant, _: &mut impl Sink) {}

    fn handle_timeout(&mut self, _: Instant, _: &mut impl Sink) {}

    fn poll_event(&mut self) -> Option<WorkerEvent> {
        if self.events.is_empty() {
            self.turns.fetch_add(1, Ordering::Relaxed);
        }
        self.events.pop()
    }

    fn poll_timeout(&self) -> Option<Instant> {
        self.stuck_deadline.then(|| Instant::now() - Duration::from_millis(100))
    }

    fn counters_mut(&mut self) -> &mut Counters {
        &mut self.counters
    }

    fn traffic(&self) -> Traffic {
        Traffic::default()
    }
}

/// A data plane around `pipe`, and its sight of what came in.
fn start(pipe: Pipe) -> (DataPlane, Arc<AtomicU64>) {
    start_with(pipe, ALL)
}

fn start_with(pipe: Pipe, allowed: Capabilities) -> (DataPlane, Arc<AtomicU64>) {
    let seen = pipe.seen.clone();
    let pipe = Mutex::new(Some(pipe));
    let core = |_| pipe.lock().unwrap().take().expect("one worker");
    (DataPlane::start_with(TUN_NAME, 1, SIZES, allowed, core).unwrap(), seen)
}

fn one<T>(of: anyhow::Result<Vec<T>>) -> T {
    of.unwrap().pop().expect("there is one")
}

/// One namespace's gateway.
struct Side {
    data: DataPlane,
    seen: Arc<AtomicU64>,
    interface: Interface,
}

impl Side {
    async fn start(n: u8, own: &str, other: &str, allowed: Capabilities) -> Self {
        let (own, other): (IpAddr, IpAddr) = (own.parse().unwrap(), other.parse().unwrap());
        let route = Route { src: Some((own, 52_625).into()), dst: (other, 52_625).into(), ecn: Ecn::NotEct };
        let (data, seen) = start_with(Pipe::new(Some(route)), allowed);
        let mut interface = Interface::new(TUN_NAME).unwrap();
        assert_eq!(interface.configure(addrs(n)).await.unwrap(), Families::Dual);
        Self { data, seen, interface }
    }

    /// To be called in the side's namespace.
    async fn check(&mut self, allowed: Capabilities) {
        // Single sends fill the socket's buffer; TCP slows down by what is dropped then.
        let counters = self.data.counters();
        let unexpected = |(reason, _): &(DropReason, u64)| {
            allowed.allow(Capability::UdpGso) || *reason != DropReason::Backpressure
        };
        assert_eq!(counters.iter().filter(unexpected).collect::<Vec<_>>(), []);
        let events = self.data.recv().await.unwrap();
        assert!(matches!(&events[0], WorkerEvent::Stun(stun) if stun.local.port() == 52_625));
        let all = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        let line = all.lines().find_map(|l| l.trim().strip_prefix("tun-firezone:")).unwrap();
        let fields: Vec<u64> = line.split_whitespace().map(|f| f.parse().unwrap()).collect();
        assert_eq!((fields[3], fields[11]), (0, 0), "drops: {line}");
        let (in_kernel, seen) = (fields[1] + fields[9], self.seen.load(Ordering::Relaxed));
        println!("{seen} packets through the worker were {in_kernel} in the kernel");
        assert!(
            in_kernel * 4 < seen || !allowed.allow(Capability::TunOffload),
            "no super-packets: {in_kernel} in the kernel, {seen} here"
        );
    }
}

/// Sends 20 MB one way and compares the digests.
fn transfer(mut from: TcpStream, mut to: TcpStream) {
    const BYTES: usize = 20 << 20;
    let sender = std::thread::spawn(move || {
        let mut bytes = vec![0; BYTES];
        SmallRng::seed_from_u64(5).fill_bytes(&mut bytes);
        from.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
        from.write_all(&bytes).unwrap();
        Sha256::digest(&bytes)
    });
    let mut bytes = vec![0; BYTES];
    to.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    to.read_exact(&mut bytes).unwrap();
    assert_eq!(sender.join().unwrap(), Sha256::digest(&bytes));
}

/// Sends datagrams one way, also with the sender's segmentation offload; all arrive whole and in order.
fn datagrams(from: &UdpSocket, to: &UdpSocket) {
    to.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let state = quinn_udp::UdpSocketState::new(from.into()).unwrap();
    let mut expect = 0u8;
    for round in 0..20usize {
        let size = 1200 - round * 50;
        let whole: Vec<u8> = (0..30).flat_map(|i| vec![i as u8; size]).chain([0xee; 7]).collect();
        let destination = to.local_addr().unwrap();
        let transmit = quinn_udp::Transmit {
            destination,
            ecn: None,
            contents: &whole,
            segment_size: Some(size),
            src_ip: None,
        };
        state.try_send(from.into(), &transmit).unwrap();
        for datagram in whole.chunks(size) {
            let mut buffer = [0; 2000];
            let (len, _) = to.recv_from(&mut buffer).unwrap();
            assert_eq!(&buffer[..len], datagram, "round {round}");
            expect = expect.wrapping_add(1);
        }
    }
    assert_eq!(expect, (20 * 31u32 % 256) as u8);
}

async fn veth_between(a: &File, b: &File) {
    use std::os::fd::AsRawFd as _;
    setns(a, CloneFlags::CLONE_NEWNET).unwrap();
    let (connection, handle, _) = rtnetlink::new_connection().unwrap();
    let task = tokio::spawn(connection);
    handle.link().add(rtnetlink::LinkVeth::new("veth-a", "veth-b").build()).execute().await.unwrap();
    let to_b = rtnetlink::LinkUnspec::new_with_name("veth-b").setns_by_fd(b.as_raw_fd()).build();
    handle.link().change(to_b).execute().await.unwrap();
    task.abort();
    for (ns, name, v4, v6) in
        [(a, "veth-a", "192.0.2.1/24", "2001:db8::1/64"), (b, "veth-b", "192.0.2.2/24", "2001:db8::2/64")]
    {
        setns(ns, CloneFlags::CLONE_NEWNET).unwrap();
        ip(&format!("addr add {v4} dev {name}"));
        ip(&format!("addr add {v6} dev {name} nodad"));
        ip(&format!("link set {name} up"));
    }
}

/// The output of `ip`, in the namespace of this thread; empty if it fails.
fn ip(arguments: &str) -> String {
    let output = Process::new("ip").args(arguments.split(' ')).output().expect("iproute2 is installed");
    if !output.status.success() {
        println!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    }
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Addresses of the TUN device with their prefix lengths.
fn addresses() -> Vec<String> {
    ip("-o addr show dev tun-firezone")
        .lines()
        .map(|l| l.split_whitespace().nth(3).unwrap().to_owned())
        .collect()
}

/// When each address was created, in the kernel's ticks.
async fn created(index: u32) -> Vec<u32> {
    let (connection, handle, _) = rtnetlink::new_connection().unwrap();
    let task = tokio::spawn(connection);
    let all: Vec<_> =
        handle.address().get().set_link_index_filter(index).execute().try_collect().await.unwrap();
    task.abort();
    let stamp = |a: &AddressAttribute| match a {
        AddressAttribute::CacheInfo(info) => Some(info.cstamp),
        _ => None,
    };
    all.iter().map(|message| message.attributes.iter().find_map(stamp).unwrap()).collect()
}

async fn interface_index() -> u32 {
    let (connection, handle, _) = rtnetlink::new_connection().unwrap();
    let task = tokio::spawn(connection);
    let link =
        handle.link().get().match_name(TUN_NAME.to_owned()).execute().try_next().await.unwrap().unwrap();
    task.abort();
    link.header.index
}

fn addrs(n: u8) -> TunnelAddrs {
    TunnelAddrs { v4: [100, 64, 0, n].into(), v6: [0xfd00, 0x2021, 0x1111, 0, 0, 0, 0, n.into()].into() }
}
