//! The UDP sockets: what datagrams carry, and who has which port.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Instant,
};

use gateway_common::{Counters, DropReason};
use gateway_proto::{Ecn, Route, Transmit};

use super::{ALL, SIZES, in_netns, ip, one};
use crate::data::{
    gso::Outlet,
    udp::{DataSocket, Receiver, Sockets},
};

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
fn stranger_on_the_port_is_noticed_even_if_he_would_share_it() {
    in_netns(async {
        use socket2::{Domain, Socket, Type};
        ip("link set lo up");
        let stranger = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
        stranger.set_reuse_port(true).unwrap();
        stranger.bind(&SocketAddr::from(([0, 0, 0, 0], 52_625)).into()).unwrap();
        for workers in [1, 3] {
            let group = Sockets::open(workers, SIZES, ALL).unwrap();
            let ports = |of: fn(&Sockets) -> u16| group.iter().map(of).collect::<Vec<_>>();
            let v4 = ports(|sockets| sockets.v4.as_ref().unwrap().port());
            assert!(v4.iter().all(|port| *port == v4[0] && ![0, 52_625].contains(port)), "{v4:?}");
            assert_eq!(ports(|sockets| sockets.v6.as_ref().unwrap().port()), vec![52_625; workers]);
        }
    });
}

#[test]
fn workers_share_a_port_and_what_comes_on_it() {
    in_netns(async {
        ip("link set lo up");
        let group = Sockets::open(4, SIZES, ALL).unwrap();
        for to in ["127.0.0.1:52625", "[::1]:52625"] {
            let to: SocketAddr = to.parse().unwrap();
            let any = if to.is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" };
            for i in 0..100 {
                UdpSocket::bind(any).unwrap().send_to(&[i], to).unwrap();
            }
            let mut receiver = Receiver::new();
            let got: Vec<usize> = group
                .iter()
                .map(|worker| {
                    let socket = if to.is_ipv4() { &worker.v4 } else { &worker.v6 };
                    drain(&mut receiver, socket.as_ref().unwrap())
                })
                .collect();
            assert!(got.iter().sum::<usize>() == 100 && got.iter().all(|count| *count > 0), "{to}: {got:?}");
        }
        // A sender is heard by the same worker each time.
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        for i in 0..20 {
            sender.send_to(&[i], "127.0.0.1:52625").unwrap();
        }
        let mut receiver = Receiver::new();
        let counts = group.iter().map(|worker| drain(&mut receiver, worker.v4.as_ref().unwrap()));
        assert_eq!(counts.filter(|count| *count > 0).collect::<Vec<_>>(), [20]);
    });
}

/// How many datagrams wait; none waits any more.
fn drain(receiver: &mut Receiver, socket: &DataSocket) -> usize {
    let mut count = 0;
    while let Ok(batch) = receiver.recv(socket) {
        count += batch.count();
    }
    count
}

#[test]
fn what_is_received_in_one_call_grows_with_what_arrives() {
    in_netns(async {
        ip("link set lo up");
        let socket = one(Sockets::open(1, SIZES, ALL)).v4.unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut receiver = Receiver::new();
        let mut calls = |count: u16| {
            for i in 0..count {
                // Lengths that grow are not merged.
                sender.send_to(&vec![7; usize::from(i) + 1], ("127.0.0.1", socket.port())).unwrap();
            }
            let mut calls = Vec::new();
            loop {
                let batch = receiver.recv(&socket).unwrap();
                calls.push(batch.count());
                if !batch.is_full() {
                    assert_eq!(calls.iter().sum::<usize>(), usize::from(count), "nothing stays behind");
                    return calls;
                }
            }
        };
        assert_eq!(calls(1), [1]);
        assert_eq!(calls(61), [2, 4, 8, 16, 31]);
        assert_eq!(calls(31), [31], "it keeps what it has learnt");
    });
}
