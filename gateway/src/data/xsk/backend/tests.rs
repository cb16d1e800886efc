//! A worker's fast path over the kernel's twin.

use std::{cell::RefCell, rc::Rc};

use super::{
    super::{
        headers::{Hop, Way},
        twin::{Kernel, Sizes, TwinWire, twin},
        ways::{Answer, Board},
    },
    *,
};

const SIZES: Sizes =
    Sizes { frames: 512, offered: 128, fill: 128, completion: 256, rx: 64, tx: 64, start: 9 };
const HOP: Hop = Hop { interface: 7, source: [2, 0, 0, 0, 0, 1], destination: [2, 0, 0, 0, 0, 2], mtu: 1300 };

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// A frame from `src` to `dst`.
fn frame(src: &str, dst: &str, ecn: Ecn, payload: &[u8]) -> Vec<u8> {
    let mut way = Way::new(Hop { mtu: 9000, ..HOP }, addr(src), addr(dst), 1).unwrap();
    let mut frame = vec![0; PAYLOAD_AT + payload.len()];
    frame[PAYLOAD_AT..].copy_from_slice(payload);
    let start = way.finish(&mut frame, payload.len(), ecn).unwrap();
    frame.split_off(start)
}

/// To, from, codepoint, payload.
type Seen = (SocketAddr, SocketAddr, Ecn, Vec<u8>);

struct Bed {
    kernel: Rc<RefCell<Kernel>>,
    board: Arc<Board>,
    fast: Fast<TwinWire>,
}

/// A worker with two ports on one interface and one on another, in the order of the twin's sockets.
fn bed(worker: usize) -> Bed {
    let (kernel, _, ports) = twin(SIZES, 3);
    let places = [7, 7, 8].into_iter().zip(ports).map(|(interface, port)| Place { interface, port });
    let board = Arc::new(Board::default());
    let ways = Ways::new(Arc::clone(&board), 52_625, 52_625);
    let fast = Fast::new(worker, places.collect(), ways, Arc::new(Switch::new(worker + 1))).unwrap();
    Bed { kernel, board, fast }
}

impl Bed {
    /// What is asked is answered.
    fn answer(&mut self, interface: u32) {
        let hop = Hop { interface, ..HOP };
        let source = |v4| if v4 { "192.0.2.1" } else { "2001:db8::1" }.parse().unwrap();
        let open = self.board.take_open();
        self.board
            .publish(open.into_iter().map(|pair| (pair, Answer::Fast(hop, source(pair.dst.is_ipv4())))));
        self.fast.begin_batch();
    }

    fn send(&mut self, route: &Route, payload: &[u8]) -> bool {
        if !self.fast.prepare(route, payload.len()) {
            return false;
        }
        self.fast.buffer().unwrap()[..payload.len()].copy_from_slice(payload);
        self.fast.commit(payload.len());
        true
    }

    fn received(&mut self) -> (Vec<Seen>, Counters) {
        let (mut all, mut drops, refused) = (Vec::new(), Counters::default(), Refused::default());
        for port in 0..self.fast.ports() {
            self.fast.look(port);
            while let Some(batch) = self.fast.receive(port) {
                for datagram in datagrams(&batch, &refused) {
                    let Datagram { local, from, ecn, payload } = datagram;
                    all.push((local, from, ecn, payload.to_vec()));
                }
                self.fast.recycle(port, batch);
            }
        }
        refused.count(&mut drops);
        (all, drops)
    }
}

#[test]
fn frames_are_the_datagrams_that_a_socket_would_have_received() {
    let mut bed = bed(0);
    let data = [[4, 0, 0, 0].as_slice(), &[7; 60]].concat();
    let channel = [[0x40, 0, 0, 64].as_slice(), &data].concat();
    let (client, relay, us) = ("198.51.100.7:4000", "203.0.113.3:3478", "192.0.2.1:52625");
    let tagged = {
        let mut frame = frame(client, us, Ecn::Ce, &data);
        frame.splice(12..12, [0x81, 0, 0, 5]);
        frame
    };
    let padded = [frame(client, us, Ecn::NotEct, b"x"), vec![0; 20]].concat();
    let (client6, us6) = ("[2001:db8:7::7]:9", "[2001:db8::1]:52625");
    let table = [
        ("direct", frame(client, us, Ecn::Ect0, &data), (us, client, Ecn::Ect0, &data[..])),
        ("relayed", frame(relay, us, Ecn::NotEct, &channel), (us, relay, Ecn::NotEct, &channel[..])),
        ("relayed, taken off", frame(relay, us, Ecn::NotEct, &data), (us, relay, Ecn::NotEct, &data[..])),
        ("IPv6", frame(client6, us6, Ecn::Ect1, &data), (us6, client6, Ecn::Ect1, &data[..])),
        ("a VLAN tag", tagged, (us, client, Ecn::Ce, &data[..])),
        ("padding", padded, (us, client, Ecn::NotEct, b"x")),
        ("empty", frame(client, us, Ecn::NotEct, b""), (us, client, Ecn::NotEct, b"")),
        ("the longest", frame(client, us, Ecn::NotEct, &[1; 1316]), (us, client, Ecn::NotEct, &[1; 1316])),
    ];
    for (name, frame, (local, from, ecn, payload)) in table {
        assert!(bed.kernel.borrow_mut().deliver(1, &frame));
        let (got, drops) = bed.received();
        assert_eq!(got, [(addr(local), addr(from), ecn, payload.to_vec())], "{name}");
        assert_eq!(drops.iter().count(), 0, "{name}");
    }
    assert_eq!(bed.fast.figures().received.load(Ordering::Relaxed), 8);
}

#[test]
fn what_the_kernel_plane_takes_for_udp_is_a_datagram_with_the_same_payload() {
    for sample in gateway_common::frame_table::all() {
        let got = datagram(&sample.bytes).map(|datagram| datagram.payload.to_vec());
        assert_eq!(got, sample.payload, "{}", sample.name);
        for cut in 0..sample.bytes.len() {
            if let Some(datagram) = datagram(&sample.bytes[..cut]) {
                assert_eq!(Some(datagram.payload), sample.payload.as_deref(), "{} cut to {cut}", sample.name);
            }
        }
    }
}

#[test]
fn what_is_no_datagram_ends_no_batch_and_is_counted_as_on_the_other_path() {
    let mut bed = bed(0);
    let good = frame("198.51.100.7:4000", "192.0.2.1:52625", Ecn::NotEct, b"good");
    let long = frame("198.51.100.7:4000", "192.0.2.1:52625", Ecn::NotEct, &[0; 1317]);
    for cut in 0..good.len() {
        let mut kernel = bed.kernel.borrow_mut();
        // Nothing shorter than an Ethernet header can be delivered, but a program may shorten it.
        for bytes in [&good, &good[..cut], &long, &good] {
            assert!(kernel.deliver(cut % 3, bytes));
        }
        drop(kernel);
        let (got, drops) = bed.received();
        assert_eq!(got.len(), 2, "cut to {cut}");
        assert_eq!(
            drops.iter().collect::<Vec<_>>(),
            [(DropReason::UnknownPayload, 1), (DropReason::OversizedDatagram, 1)],
            "cut to {cut}"
        );
    }
}

#[test]
fn datagrams_go_out_by_the_link_of_their_route_or_not_here() {
    for worker in 0..2 {
        let mut bed = bed(worker);
        let route = |dst: &str| Route { src: None, dst: addr(dst), ecn: Ecn::Ect0 };
        for (dst, interface, socket) in
            [("198.51.100.7:9", 7, worker), ("[2001:db8:7::7]:9", 7, worker), ("198.51.100.8:9", 8, 2)]
        {
            let route = route(dst);
            assert!(!bed.send(&route, b"early"), "it is not known yet");
            bed.answer(interface);
            let own = if route.dst.is_ipv4() { "192.0.2.1:52625" } else { "[2001:db8::1]:52625" };
            for payload in [&b"first"[..], b"second"] {
                assert!(bed.send(&route, payload), "{dst}");
            }
            assert!(bed.kernel.borrow_mut().sent(socket).is_empty(), "not before it is flushed");
            bed.fast.flush();
            let sent = bed.kernel.borrow_mut().sent(socket);
            let payloads: Vec<_> = sent.iter().map(|frame| datagram(frame).unwrap()).collect();
            assert_eq!(payloads.iter().map(|d| d.payload).collect::<Vec<_>>(), [&b"first"[..], b"second"]);
            assert!(payloads.iter().all(|d| (d.from, d.local, d.ecn) == (addr(own), addr(dst), Ecn::Ect0)));
            let most = if route.dst.is_ipv4() { 1272 } else { 1252 };
            assert!(bed.send(&route, &vec![1; most]) && !bed.send(&route, &vec![1; most + 1]), "{dst}: MTU");
            bed.fast.flush();
            assert_eq!(bed.kernel.borrow_mut().sent(socket).len(), 1);
        }
        let elsewhere = route("198.51.100.9:9");
        bed.send(&elsewhere, b"");
        bed.answer(9);
        assert!(!bed.send(&elsewhere, b"no port there"));
        bed.fast.flush();
        assert_eq!(bed.fast.figures().sent.load(Ordering::Relaxed), 9);
    }
}

#[test]
fn a_reservation_that_is_not_committed_sends_nothing() {
    let mut bed = bed(0);
    let route = Route { src: None, dst: addr("198.51.100.7:9"), ecn: Ecn::NotEct };
    bed.send(&route, b"");
    bed.answer(7);
    assert!(bed.fast.prepare(&route, 100));
    bed.fast.flush();
    bed.fast.commit(100);
    assert!(bed.fast.prepare(&route, 100));
    bed.fast.commit(0);
    bed.fast.commit(100);
    assert!(bed.fast.prepare(&route, 100) && bed.send(&route, b"second"));
    bed.fast.commit(100);
    bed.fast.flush();
    let sent = bed.kernel.borrow_mut().sent(0);
    assert_eq!(sent.iter().map(|frame| datagram(frame).unwrap().payload).collect::<Vec<_>>(), [b"second"]);
}

#[test]
fn what_the_device_does_not_take_goes_another_way_and_is_tried_again() {
    let mut bed = bed(0);
    let route = Route { src: None, dst: addr("198.51.100.7:9"), ecn: Ecn::NotEct };
    bed.send(&route, b"");
    bed.answer(7);
    bed.kernel.borrow_mut().down = true;
    let taken = (0..100).filter(|_| bed.send(&route, b"data")).count();
    bed.fast.flush();
    assert!(taken == SIZES.tx as usize && bed.fast.is_waiting());
    bed.kernel.borrow_mut().down = false;
    bed.fast.flush();
    assert!(!bed.fast.is_waiting());
    assert_eq!(bed.kernel.borrow_mut().sent(0).len(), taken);
}

#[test]
fn rings_are_left_alone_while_that_is_ordered() {
    let mut bed = bed(0);
    bed.fast.switch.set(super::super::order::Stage::Catch);
    let frame = frame("198.51.100.7:4000", "192.0.2.1:52625", Ecn::NotEct, b"good");
    bed.kernel.borrow_mut().deliver(0, &frame);
    bed.fast.begin_turn();
    bed.fast.on_passed(false);
    assert!(bed.fast.look(0) == 0 && bed.fast.is_waiting());
    bed.fast.on_empty(false);
    bed.fast.on_empty(true);
    bed.fast.end_turn();
    bed.fast.begin_turn();
    bed.fast.on_passed(false);
    assert!(bed.fast.look(0) == 1 && !bed.fast.is_waiting());
    assert_eq!(bed.received().0.len(), 1);
}

#[test]
fn there_are_no_more_ports_than_a_thread_can_wait_for() {
    let (_, _, ports) = twin(Sizes { frames: 8192, ..SIZES }, MAX_PORTS + 1);
    let places = ports.into_iter().map(|port| Place { interface: 1, port }).collect();
    let ways = Ways::new(Arc::default(), 1, 1);
    assert!(Fast::new(0, places, ways, Arc::new(Switch::new(1))).is_none());
}
