//! The fast path as the daemon takes it: the real program on a veth, attached, switched, taken away and looked for again.
//!
//! `a` has the fast path, `b` only sockets. Datagrams look like WireGuard data, one connection for each worker.

use std::{
    net::{TcpListener, TcpStream, UdpSocket},
    sync::Arc,
    time::{Duration, Instant},
};

use gateway_common::{DropReason, maps::Outcome};
use gateway_proto::{
    ClientId, Command, ConnectionIndex, Ecn, Route, WorkerId,
    command::{ClientState, Connection, ConnectionKeys, Home},
};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::{
    ALL, OFF, SIZES, addrs, ethtool, fast_path, in_netns, ip,
    pipe::{CHANNEL, Dress, Pipe},
    traffic::{Arrived, Numbered, datagrams, transfer},
    xsk::{
        Bed, PAIRS,
        redirect::{Mode as Attach, Redirect},
    },
};
use crate::{
    bpf,
    data::{
        DataPlane, PORT, TUN_NAME, Wanted,
        interface::{Families, Interface},
        xsk::Mode,
    },
};

const NATIVE: fast_path::Config =
    fast_path::Config { wanted: Wanted::Exactly(Mode::Native), bpffs: None, clients: None };
const PAIR: (&str, &str) = PAIRS[0];

/// False, and says so, without the kernel programs.
fn can_run() -> bool {
    if bpf::built_in().is_none() {
        eprintln!("skipped: built without the BPF object; `cargo xtask build-ebpf` makes it");
    }
    bpf::built_in().is_some()
}

struct Side {
    data: DataPlane,
    interface: Interface,
}

impl Side {
    async fn start(
        n: u8,
        workers: usize,
        fast_path: &fast_path::Config,
        dress: Dress,
        (own, other): (&str, &str),
    ) -> Self {
        let at = |ip: &str| (ip.parse::<std::net::IpAddr>().unwrap(), PORT).into();
        let route = Route { src: Some(at(own)), dst: at(other), ecn: Ecn::NotEct };
        let pipe = Pipe { dress, ..Pipe::new(Some(route)) };
        let core = |id| Pipe { id, workers, ..pipe.clone() };
        let data = DataPlane::start_with(TUN_NAME, workers, SIZES, ALL, fast_path, core, |_, _| None);
        let mut data = data.unwrap();
        let mut interface = Interface::new(TUN_NAME).unwrap();
        assert_eq!(interface.configure(addrs(n)).await.unwrap(), Families::Dual);
        for worker in 0..workers {
            let keys = ConnectionKeys {
                index: ConnectionIndex::new(Pipe::connection(worker)).unwrap(),
                public_key: [1; 32],
                preshared_key: Zeroizing::new([2; 32]),
                ufrag: *b"abcd",
            };
            let connection = Connection::Present(Arc::new(keys), None);
            data.send(Command::Client {
                id: ClientId(Uuid::from_u128(worker as u128)),
                home: Home::at(WorkerId::new(worker).unwrap()),
                desired: Some(Arc::new(ClientState::new(addrs(n), connection, [].into()))),
            });
        }
        // Anything by the link: it is how the interface is found.
        data.send(Command::Relays([at(other)].into()));
        data.send(Command::Channel { server: at(other), number: CHANNEL, peer: Some(at(other)) });
        Self { data, interface }
    }

    async fn until(&self, what: &str, done: impl Fn(&fast_path::Status) -> bool) {
        let fast = self.data.fast_path().expect("it is wanted");
        let deadline = Instant::now() + Duration::from_secs(20);
        while !done(&fast.status()) {
            assert!(Instant::now() < deadline, "not {what}: {}", fast.status());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn carried(&self) -> (u64, u64) {
        self.data.fast_path().expect("it is wanted").carried()
    }

    async fn close(self) {
        let counters = self.data.counters();
        // TCP slows down by what is dropped when a ring is full; the rest is the control's of no one.
        let full = [DropReason::HandoverFull, DropReason::XskRingFull];
        let unexpected: Vec<_> = counters.iter().filter(|(reason, _)| !full.contains(reason)).collect();
        assert_eq!(unexpected, []);
        self.interface.remove().await;
        self.data.close().await.result.unwrap();
    }
}

/// Both sides, `a` entered and with its fast path on.
async fn sides(bed: &Bed, workers: usize) -> [Side; 2] {
    dressed_sides(bed, workers, &NATIVE, Dress::Data, PAIR).await
}

async fn dressed_sides(
    bed: &Bed,
    workers: usize,
    wanted: &fast_path::Config,
    dress: Dress,
    (here, there): (&str, &str),
) -> [Side; 2] {
    bed.enter_b();
    let b = Side::start(2, workers, &OFF, dress, (there, here)).await;
    bed.enter_a();
    let a = Side::start(1, workers, wanted, dress, (here, there)).await;
    a.until("on", |status| status.on).await;
    [a, b]
}

/// A TCP connection through both tunnels and some datagrams, both ways; how many frames that were.
async fn carry(bed: &Bed, a: &Side) -> (u64, u64) {
    let before = a.carried();
    bed.enter_b();
    let listener = TcpListener::bind((addrs(2).v4, 0)).unwrap();
    let b_socket = UdpSocket::bind((addrs(2).v4, 0)).unwrap();
    bed.enter_a();
    let a_socket = UdpSocket::bind((addrs(1).v4, 0)).unwrap();
    let to = listener.local_addr().unwrap();
    let here = TcpStream::connect_timeout(&to, Duration::from_secs(5)).unwrap();
    let there = listener.accept().unwrap().0;
    tokio::task::spawn_blocking(move || {
        transfer(here.try_clone().unwrap(), there.try_clone().unwrap());
        transfer(there, here);
        datagrams(&a_socket, &b_socket);
    })
    .await
    .unwrap();
    let after = a.carried();
    (after.0 - before.0, after.1 - before.1)
}

fn shows_xdp() -> bool {
    ip("-d link show veth-a").contains("xdp")
}

#[test]
fn fast_path_attaches_carries_is_switched_and_leaves_nothing() {
    for workers in [1, 2] {
        in_netns(async move {
            if !can_run() {
                return;
            }
            let bed = Bed::new();
            let [a, b] = sides(&bed, workers).await;
            assert_eq!(a.data.fast_path().unwrap().status().to_string(), "on, veth-a: native");
            assert!(shows_xdp());
            let (received, sent) = carry(&bed, &a).await;
            println!("{workers} workers: {received} frames received, {sent} sent");
            assert!(received > 1000 && sent > 1000, "{received} received, {sent} sent");
            // The kernel says the same.
            let outcomes = a.data.frame_outcomes().unwrap();
            let of = |outcome| outcomes.iter().find(|(o, _)| *o == outcome).unwrap().1.packets;
            assert!(of(Outcome::Redirected) >= received && of(Outcome::NoSocket) == 0, "{outcomes:?}");

            let fast = a.data.fast_path().unwrap();
            assert!(!fast.switcher().switch(false).await.unwrap());
            assert!(shows_xdp(), "the program stays");
            // What was on its way.
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert_eq!(carry(&bed, &a).await, (0, 0), "it is off");
            assert!(fast.switcher().switch(true).await.unwrap());
            let (received, sent) = carry(&bed, &a).await;
            assert!(received > 1000 && sent > 1000, "on again: {received} received, {sent} sent");
            a.close().await;
            assert!(!shows_xdp(), "a program is left");
            bed.enter_b();
            b.close().await;
        });
    }
}

#[test]
fn fast_path_carries_direct_and_relayed_over_ipv4_and_ipv6_in_every_mode_of_a_veth() {
    for mode in [Mode::Native, Mode::Generic] {
        for (dress, pair) in
            [Dress::Data, Dress::Relayed].into_iter().flat_map(|dress| PAIRS.map(|pair| (dress, pair)))
        {
            in_netns(async move {
                if !can_run() {
                    return;
                }
                let bed = Bed::new();
                let wanted = fast_path::Config { wanted: Wanted::Exactly(mode), bpffs: None, clients: None };
                if mode == Mode::Generic {
                    // Such a program comes behind all that merges.
                    bed.enter_b();
                    ethtool("-K veth-b gso off tso off tx-udp-segmentation off");
                    bed.enter_a();
                    ethtool("-K veth-a gro off");
                }
                let [a, b] = dressed_sides(&bed, 2, &wanted, dress, pair).await;
                let (received, sent) = carry(&bed, &a).await;
                println!("{mode}, {dress:?}, {}: {received} frames received, {sent} sent", pair.0);
                assert!(received > 1000 && sent > 1000, "{received} received, {sent} sent");
                a.close().await;
                bed.enter_b();
                b.close().await;
            });
        }
    }
}

#[test]
fn fast_path_is_switched_while_packets_pass_and_none_is_lost_or_late() {
    for workers in [1, 2] {
        in_netns(async move {
            if !can_run() {
                return;
            }
            let bed = Bed::new();
            let [a, b] = sides(&bed, workers).await;
            bed.enter_a();
            let to = UdpSocket::bind((addrs(1).v4, 0)).unwrap();
            bed.enter_b();
            let from = UdpSocket::bind((addrs(2).v4, 0)).unwrap();
            bed.enter_a();
            let stream = Numbered::start(from, to, true);
            let fast = a.data.fast_path().unwrap();
            for round in 0..20 {
                let before = a.carried().0;
                let deadline = Instant::now() + Duration::from_secs(10);
                tokio::time::sleep(Duration::from_millis(20)).await;
                while round % 2 == 0 && a.carried().0 == before {
                    assert!(Instant::now() < deadline, "round {round}: nothing is carried");
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                assert_eq!(fast.switcher().switch(round % 2 == 1).await.unwrap(), round % 2 == 1);
            }
            let Arrived { sent, count, latest } = stream.finish().await;
            println!("{workers} workers: {count} of {sent} datagrams, the latest {latest} behind the newest");
            assert_eq!(count, sent, "some are lost");
            assert!(count > 0 && latest < 1024, "{latest} behind the newest");
            a.close().await;
            bed.enter_b();
            b.close().await;
        });
    }
}

#[test]
fn fast_path_looks_again_when_the_interface_changes() {
    in_netns(async {
        if !can_run() {
            return;
        }
        let bed = Bed::new();
        let [a, b] = sides(&bed, 2).await;
        let left = |status: &fast_path::Status| !status.on;
        // Another MTU, with other frames.
        ip("link set veth-a mtu 1400");
        a.until("left", left).await;
        a.until("on with another MTU", |status| status.on).await;
        // Beside the time in which a link settles.
        tokio::time::sleep(Duration::from_secs(6)).await;
        ip("link set veth-a down");
        a.until("left by a link that is down", |status| status.interface.is_none()).await;
        assert!(!shows_xdp());
        ip("link set veth-a up");
        // With the link went what the kernel knew of neighbours and IPv6.
        ip("neigh replace 192.0.2.2 lladdr 02:00:00:00:00:02 dev veth-a");
        a.until("on with the link up", |status| status.on).await;
        ip("link set veth-a mtu 1500");
        a.until("left", left).await;
        a.until("on again", |status| status.on).await;
        let (received, sent) = carry(&bed, &a).await;
        assert!(received > 1000 && sent > 1000, "{received} received, {sent} sent");
        // The interface goes; the sockets carry on, and nothing ends.
        ip("link del veth-a");
        a.until("left by a device that is gone", |status| status.interface.is_none()).await;
        assert!(
            !a.data.fast_path().unwrap().switcher().switch(true).await.unwrap(),
            "there is none to switch on"
        );
        a.close().await;
        bed.enter_b();
        b.close().await;
    });
}

#[test]
fn fast_path_of_another_program_is_respected_until_it_goes() {
    in_netns(async {
        if !can_run() {
            return;
        }
        let bed = Bed::new();
        let other = Redirect::attach(bed.interface, Attach::Native).unwrap();
        let a = Side::start(1, 1, &NATIVE, Dress::Data, PAIR).await;
        a.until("refused", |status| status.outcome.contains("another XDP program (id ")).await;
        assert!(!a.data.fast_path().unwrap().switcher().switch(true).await.unwrap());
        assert!(shows_xdp(), "it is still there");
        drop(other);
        // Something happens, so that it is looked at.
        ip("addr add 192.0.2.77/32 dev veth-a");
        a.until("on", |status| status.on).await;
        a.close().await;
    });
}

#[test]
fn fast_path_by_itself_leaves_a_veth_alone() {
    in_netns(async {
        if !can_run() {
            return;
        }
        let _bed = Bed::new();
        let auto = fast_path::Config::default();
        let a = Side::start(1, 1, &auto, Dress::Data, PAIR).await;
        a.until("refused", |status| status.outcome.contains("veth-a is a veth device")).await;
        assert!(!shows_xdp());
        a.close().await;
    });
}
