//! TCP and UDP through two data planes.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::{IpAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use gateway_common::DropReason;
use gateway_proto::{Ecn, Route, WorkerEvent};
use nix::sched::{CloneFlags, setns, unshare};
use rand::{RngCore as _, SeedableRng as _, rngs::SmallRng};
use sha2::{Digest as _, Sha256};

use super::{
    ALL, Capabilities, DataPlane, TUN_NAME, addrs, in_netns, ip, pipe::Pipe, start_several, veth_between,
};
use crate::data::{
    capabilities::Capability,
    interface::{Families, Interface},
};

#[test]
fn tcp_and_udp_pass_whole_both_ways_with_offloads_in_use() {
    in_netns(both_ways(1, ALL, &[("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")]));
}

#[test]
fn workers_pass_on_what_belongs_to_others() {
    for (workers, words) in [(2, ""), (4, ""), (2, "reuseport-steering,tun-steering")] {
        println!("{workers} workers, without {words:?}");
        let allowed = Capabilities::without(words).unwrap();
        in_netns(both_ways(workers, allowed, &[("192.0.2.1", "192.0.2.2")]));
    }
}

#[test]
fn tcp_and_udp_pass_whole_with_any_offload_forbidden() {
    for words in
        ["tun-offload", "tun-uso", "udp-gro", "udp-gso", "sendmmsg", "tun-offload,udp-gro,udp-gso,sendmmsg"]
    {
        println!("without {words}");
        let allowed = Capabilities::without(words).unwrap();
        in_netns(both_ways(1, allowed, &[("192.0.2.1", "192.0.2.2")]));
    }
}

/// Two data planes over each pair of addresses; TCP and UDP between them, in both families and directions.
async fn both_ways(workers: usize, allowed: Capabilities, pairs: &[(&str, &str)]) {
    ip("link set lo up");
    let a = File::open("/proc/thread-self/ns/net").unwrap();
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let b = File::open("/proc/thread-self/ns/net").unwrap();
    let enter = |ns: &File| setns(ns, CloneFlags::CLONE_NEWNET).unwrap();
    veth_between(&a, &b).await;

    for (outer_a, outer_b) in pairs {
        enter(&a);
        let side_a = Side::start(1, workers, outer_a, outer_b, allowed).await;
        enter(&b);
        let side_b = Side::start(2, workers, outer_b, outer_a, allowed).await;
        for (ip_a, ip_b) in
            [(IpAddr::from(addrs(1).v4), IpAddr::from(addrs(2).v4)), (addrs(1).v6.into(), addrs(2).v6.into())]
        {
            enter(&b);
            let listener = TcpListener::bind((ip_b, 0)).unwrap();
            // One to receive and one to send: who has sent by `quinn_udp` receives several at once.
            let udp_b = [0; 2].map(|port| UdpSocket::bind((ip_b, port)).unwrap());
            let to_b = listener.local_addr().unwrap();
            enter(&a);
            let stream = TcpStream::connect_timeout(&to_b, Duration::from_secs(5)).unwrap();
            let (accepted, from) = listener.accept().unwrap();
            assert_eq!(from.ip(), ip_a);
            transfer(stream.try_clone().unwrap(), accepted.try_clone().unwrap());
            transfer(accepted, stream);
            // A flow of each worker's: whichever of them the kernel gives all datagrams to, most belong to others.
            for owner in 0..workers {
                let udp_a = udp_b.each_ref().map(|other| owned_by(owner, workers, ip_a, other));
                datagrams(&udp_a[0], &udp_b[0]);
                datagrams(&udp_b[1], &udp_a[1]);
            }
        }
        let mut sides = [(side_a, &a), (side_b, &b)];
        for (side, ns) in &mut sides {
            enter(ns);
            side.check(allowed).await;
        }
        for (side, _) in sides {
            side.interface.remove().await;
            side.data.close().await.result.unwrap();
        }
    }
}

/// One namespace's gateway.
struct Side {
    data: DataPlane,
    pipe: Pipe,
    workers: usize,
    interface: Interface,
}

impl Side {
    async fn start(n: u8, workers: usize, own: &str, other: &str, allowed: Capabilities) -> Self {
        let (own, other): (IpAddr, IpAddr) = (own.parse().unwrap(), other.parse().unwrap());
        let route = Route { src: Some((own, 52_625).into()), dst: (other, 52_625).into(), ecn: Ecn::NotEct };
        let pipe = Pipe::new(Some(route));
        let data = start_several(workers, &pipe, allowed);
        let mut interface = Interface::new(TUN_NAME).unwrap();
        assert_eq!(interface.configure(addrs(n)).await.unwrap(), Families::Dual);
        Self { data, pipe, workers, interface }
    }

    /// To be called in the side's namespace.
    async fn check(&mut self, allowed: Capabilities) {
        // Single sends fill the socket's buffer; TCP slows down by what is dropped then.
        let counters = self.data.counters();
        // So does what finds the ring to its owner full.
        let unexpected = |(reason, _): &(DropReason, u64)| match reason {
            DropReason::Backpressure => allowed.allow(Capability::UdpGso),
            DropReason::HandoverFull => self.workers == 1,
            _ => true,
        };
        assert_eq!(counters.iter().filter(unexpected).collect::<Vec<_>>(), []);
        let events = self.data.recv().await.unwrap();
        assert!(matches!(&events[0], WorkerEvent::Stun(stun) if stun.local.port() == 52_625));
        let all = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        let line = all.lines().find_map(|l| l.trim().strip_prefix("tun-firezone:")).unwrap();
        let fields: Vec<u64> = line.split_whitespace().map(|f| f.parse().unwrap()).collect();
        assert_eq!((fields[3], fields[11]), (0, 0), "drops: {line}");
        let (in_kernel, seen) = (fields[1] + fields[9], self.pipe.seen.load(Ordering::Relaxed));
        let passed = self.pipe.passed.load(Ordering::Relaxed);
        println!("{seen} packets, of which {passed} were passed on, were {in_kernel} in the kernel");
        assert_eq!(passed > 0, self.workers > 1);
        assert!(
            in_kernel * 4 < seen || !allowed.allow(Capability::TunOffload),
            "no super-packets: {in_kernel} in the kernel, {seen} here"
        );
    }
}

/// Sends 20 MB one way and compares the digests.
pub fn transfer(mut from: TcpStream, mut to: TcpStream) {
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

/// A socket at `ip`, whose flow with `other` belongs to worker `owner`.
fn owned_by(owner: usize, workers: usize, ip: IpAddr, other: &UdpSocket) -> UdpSocket {
    let port = |socket: &UdpSocket| socket.local_addr().unwrap().port();
    (0..1000)
        .map(|_| UdpSocket::bind((ip, 0)).unwrap())
        .find(|socket| Pipe::owner_of([port(socket), port(other)], workers) == owner)
        .expect("one port in `workers` does")
}

/// Sends datagrams one way, also with the sender's segmentation offload; all arrive whole and in order.
pub fn datagrams(from: &UdpSocket, to: &UdpSocket) {
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

/// Numbered datagrams one way, eight each millisecond, until [`Numbered::finish`].
pub struct Numbered {
    stop: Arc<AtomicBool>,
    writer: JoinHandle<u32>,
    reader: JoinHandle<(u32, u32)>,
}

/// What became of them.
pub struct Arrived {
    pub sent: u32,
    pub count: u32,
    /// How far the latest was behind the newest before it.
    pub latest: u32,
}

impl Numbered {
    /// If `bounded`, no more are under way than fit everywhere, however slow the machine is.
    pub fn start(from: UdpSocket, to: UdpSocket, bounded: bool) -> Self {
        let (stop, read) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let dst = to.local_addr().unwrap();
        let writer = std::thread::spawn({
            let (stop, read) = (Arc::clone(&stop), Arc::clone(&read));
            move || {
                let mut number = 0_u32;
                while !stop.load(Ordering::Relaxed) {
                    if !bounded || number - read.load(Ordering::Relaxed) < 200 {
                        for _ in 0..8 {
                            from.send_to(&number.to_be_bytes(), dst).unwrap();
                            number += 1;
                        }
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
                number
            }
        });
        let reader = std::thread::spawn(move || {
            to.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            let (mut newest, mut latest) = (0, 0);
            let mut bytes = [0; 4];
            while to.recv(&mut bytes).is_ok() {
                let number = u32::from_be_bytes(bytes);
                newest = newest.max(number);
                latest = latest.max(newest - number);
                read.fetch_add(1, Ordering::Relaxed);
            }
            (read.load(Ordering::Relaxed), latest)
        });
        Self { stop, writer, reader }
    }

    /// Sends no more, and waits for what is under way.
    pub async fn finish(self) -> Arrived {
        let Self { stop, writer, reader } = self;
        stop.store(true, Ordering::Relaxed);
        let sent = writer.join().unwrap();
        let (count, latest) = tokio::task::spawn_blocking(move || reader.join().unwrap()).await.unwrap();
        Arrived { sent, count, latest }
    }
}
