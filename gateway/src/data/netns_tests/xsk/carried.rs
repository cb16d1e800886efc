//! Two data planes whose datagrams pass the socket layer by, and a switch that is thrown while they are in use.

use std::{
    cell::RefCell,
    net::{TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd as _, OwnedFd},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use gateway_common::DropReason;
use gateway_proto::{Command, Ecn, Route};

use super::{Bed, PAIRS, QUEUES, SIZES, redirect::*};
use crate::data::{
    DataPlane, TUN_NAME,
    interface::{Families, Interface},
    netns_tests::{
        ALL, OFF, SIZES as BUFFERS, addrs, in_netns, ip,
        pipe::Pipe,
        traffic::{Arrived, Numbered, datagrams, transfer},
    },
    xsk::{Board, Fast, FastPlace, Figures, Place, Stage, Switch, Transfer, Watch, Ways},
};

/// One namespace's gateway with a fast path. What arrives on a queue goes to the worker of that number.
struct Side {
    data: DataPlane,
    interface: Interface,
    redirect: Redirect,
    switch: Arc<Switch>,
    figures: Vec<Arc<Figures>>,
    /// The sockets that frames are redirected to, by queue.
    sockets: Vec<OwnedFd>,
    watch: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl Side {
    /// In the side's namespace; `index` is its interface.
    async fn start(n: u8, workers: usize, index: u32, (own, other): (&str, &str)) -> Self {
        let route =
            Route { src: Some(super::address(own, 0)), dst: super::address(other, 0), ecn: Ecn::NotEct };
        let board = Arc::new(Board::default());
        let watch = tokio::spawn(Watch::new(Arc::clone(&board), [index]).unwrap().run());
        let redirect = Redirect::attach(index, Mode::Native).unwrap();
        let mut places: Vec<Vec<FastPlace<_>>> = (0..workers).map(|_| Vec::new()).collect();
        let mut sockets = Vec::new();
        for queue in 0..QUEUES {
            let place = Place { interface: index, queue, transfer: Transfer::Copy };
            let (_, ports) = Bed::open_at(place, workers as u32, SIZES);
            for (worker, port) in ports.into_iter().enumerate() {
                if worker == queue as usize % workers {
                    redirect.set(queue, 0, port.wire());
                    sockets.push(port.wire().as_fd().try_clone_to_owned().unwrap());
                }
                places[worker].push(FastPlace { interface: index, port });
            }
        }
        let switch = Arc::new(Switch::new(workers));
        let (places, figures) = (RefCell::new(places.into_iter()), RefCell::new(Vec::new()));
        let pipe = Pipe::new(Some(route));
        let core = |id| Pipe { id, workers, ..pipe.clone() };
        let data = DataPlane::start_with(TUN_NAME, workers, BUFFERS, ALL, &OFF, core, |id, sockets| {
            let port =
                |socket: &Option<crate::data::udp::DataSocket>| socket.as_ref().map_or(0, |s| s.port());
            let ways = Ways::new(Arc::clone(&board), port(&sockets.v4), port(&sockets.v6));
            let places = places.borrow_mut().next().unwrap();
            let fast = Fast::new(id.get(), places, ways, Arc::clone(&switch)).unwrap();
            figures.borrow_mut().push(fast.figures());
            Some(fast)
        });
        let mut interface = Interface::new(TUN_NAME).unwrap();
        assert_eq!(interface.configure(addrs(n)).await.unwrap(), Families::Dual);
        let (data, figures) = (data.unwrap(), figures.into_inner());
        Self { data, interface, redirect, switch, figures, sockets, watch }
    }

    /// Frames to and from the workers so far.
    fn carried(&self) -> (u64, u64) {
        let sum = |of: fn(&Figures) -> u64| self.figures.iter().map(|figures| of(figures)).sum();
        (sum(|f| f.received.load(Ordering::Relaxed)), sum(|f| f.sent.load(Ordering::Relaxed)))
    }

    /// What comes goes to the kernel from now on.
    fn turn_off(&self) {
        (0..QUEUES).for_each(|queue| self.redirect.clear(queue, 0));
    }

    /// What comes goes to the rings from now on, and no worker reads the one before the other.
    async fn turn_on(&mut self) {
        self.order(Stage::Hold, Switch::is_seen).await;
        for (queue, socket) in (0..).zip(&self.sockets) {
            self.redirect.set(queue, 0, socket);
        }
        self.order(Stage::Catch, Switch::is_settled).await;
    }

    async fn order(&mut self, stage: Stage, done: fn(&Switch) -> bool) {
        self.switch.set(stage);
        let deadline = Instant::now() + Duration::from_secs(10);
        // Wakes those that sleep.
        self.data.send(Command::Relays([].into()));
        while !done(&self.switch) {
            assert!(Instant::now() < deadline, "{stage:?} is not done");
            tokio::time::sleep(Duration::from_millis(1)).await;
            self.data.send(Command::Relays([].into()));
        }
    }

    async fn close(self) {
        let counters = self.data.counters();
        // TCP slows down by what is dropped when a ring is full, the kernel's or another worker's.
        let full = [DropReason::HandoverFull, DropReason::XskRingFull];
        let unexpected: Vec<_> = counters.iter().filter(|(reason, _)| !full.contains(reason)).collect();
        assert_eq!(unexpected, []);
        self.interface.remove().await;
        self.data.close().await.result.unwrap();
        self.watch.abort();
    }
}

/// Both sides over one pair of addresses, `b` entered last.
async fn sides(bed: &Bed, workers: usize, (here, there): (&str, &str)) -> [Side; 2] {
    bed.enter_a();
    let a = Side::start(1, workers, bed.interface, (here, there)).await;
    bed.enter_b();
    let b = Side::start(2, workers, bed.far_interface, (there, here)).await;
    [a, b]
}

/// A TCP connection through both tunnels, from `a` to `b`.
fn connect(bed: &Bed, v6: bool) -> (TcpStream, TcpStream) {
    let address = |n| if v6 { addrs(n).v6.into() } else { std::net::IpAddr::from(addrs(n).v4) };
    bed.enter_b();
    let listener = TcpListener::bind((address(2), 0)).unwrap();
    bed.enter_a();
    let stream = TcpStream::connect_timeout(&listener.local_addr().unwrap(), Duration::from_secs(5)).unwrap();
    (stream, listener.accept().unwrap().0)
}

/// Two UDP sockets, in `a` and in `b`.
fn pair(bed: &Bed) -> (UdpSocket, UdpSocket) {
    bed.enter_a();
    let a = UdpSocket::bind((addrs(1).v4, 0)).unwrap();
    bed.enter_b();
    (a, UdpSocket::bind((addrs(2).v4, 0)).unwrap())
}

#[test]
fn xsk_carries_tcp_and_udp_whole_both_ways() {
    for (workers, pair_of) in [(1, PAIRS[0]), (1, PAIRS[1]), (2, PAIRS[0])] {
        in_netns(async move {
            let bed = Bed::new();
            let sides = sides(&bed, workers, pair_of).await;
            // So that the first packets are not the only ones by the slow path.
            tokio::time::sleep(Duration::from_millis(50)).await;
            for v6 in [false, true] {
                let (a, b) = connect(&bed, v6);
                // The task that answers for ways runs on this thread.
                let work = tokio::task::spawn_blocking(move || {
                    transfer(a.try_clone().unwrap(), b.try_clone().unwrap());
                    transfer(b, a);
                });
                work.await.unwrap();
            }
            // Who has sent does not wait any more when it reads.
            let [(a, b), (c, d)] = [pair(&bed), pair(&bed)];
            tokio::task::spawn_blocking(move || {
                datagrams(&a, &b);
                datagrams(&d, &c);
            })
            .await
            .unwrap();
            for (side, enter) in sides.into_iter().zip([Bed::enter_a, Bed::enter_b]) {
                let (received, sent) = side.carried();
                println!("{workers} workers: {received} frames received, {sent} sent");
                assert!(received > 10_000 && sent > 10_000, "{received} received, {sent} sent");
                enter(&bed);
                side.close().await;
            }
        });
    }
}

#[test]
fn xsk_is_switched_while_packets_pass_and_none_is_lost_or_late() {
    for (workers, loaded) in [(1, false), (2, false), (1, true), (2, true)] {
        in_netns(async move {
            let bed = Bed::new();
            let mut sides = sides(&bed, workers, PAIRS[0]).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
            let (from, to) = pair(&bed);
            let (from_tcp, to_tcp) = connect(&bed, false);
            let bulk = tokio::task::spawn_blocking(move || loaded.then(|| transfer(from_tcp, to_tcp)));
            let stream = Numbered::start(from, to, !loaded);
            for round in 0..20 {
                let before = sides[1].carried().0;
                let deadline = Instant::now() + Duration::from_secs(10);
                tokio::time::sleep(Duration::from_millis(20)).await;
                while round % 2 == 0 && sides[1].carried().0 == before {
                    assert!(Instant::now() < deadline, "round {round}: nothing is carried");
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                for side in &mut sides {
                    match round % 2 {
                        0 => side.turn_off(),
                        _ => side.turn_on().await,
                    }
                }
            }
            bulk.await.unwrap();
            let Arrived { sent, count, latest } = stream.finish().await;
            println!("{workers} workers: {count} of {sent} datagrams, the latest {latest} behind the newest");
            // Beside TCP, queues overflow on a slow machine, the kernel's among them.
            assert!(loaded || count == sent, "{count} of {sent}");
            assert!(count > 0);
            assert!(latest < 1024, "{latest} behind the newest");
            for (side, enter) in sides.into_iter().zip([Bed::enter_a, Bed::enter_b]) {
                enter(&bed);
                side.close().await;
            }
            drop(ip("link del veth-b"));
        });
    }
}
