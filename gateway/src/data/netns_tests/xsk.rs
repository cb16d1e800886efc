//! AF_XDP sockets on a real veth with two queues: what arrives, what leaves, what the kernel counts.
//!
//! ```text
//!   namespace a                                            namespace b
//!   ports -- rings -- XDP -- 192.0.2.1, 2001:db8::1  veth-a === veth-b  192.0.2.2, 2001:db8::2 -- UDP sockets
//! ```

mod allocations;
mod carried;
mod modes;
pub mod redirect;
mod ways;

use std::{
    fs::File,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    sync::Arc,
    time::{Duration, Instant},
};

use gateway_common::{Counters, DropReason, checksum, frame::Frame};
use nix::sched::{CloneFlags, setns, unshare};

use self::redirect::{Mode, PORT, Redirect, WORKERS};
use super::{in_netns, ip};
use crate::data::xsk::{OpenError, Place, Port, Queue, Sizes, Socket, Transfer, open};

const QUEUES: u32 = 2;
const SIZES: Sizes = Sizes { frame: 2048, rx: 512, tx: 256, fill: 1024, completion: 1024, frames: 2048 };
pub const PAIRS: [(&str, &str); 2] = [("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")];

/// The two ends, and namespace `a` entered.
pub struct Bed {
    a: File,
    b: File,
    /// The indices of the veth's ends.
    pub interface: u32,
    far_interface: u32,
}

impl Bed {
    pub fn new() -> Self {
        let a = File::open("/proc/thread-self/ns/net").unwrap();
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let b = File::open("/proc/thread-self/ns/net").unwrap();
        let queues = format!("numrxqueues {QUEUES} numtxqueues {QUEUES}");
        let bed = Self { a, b, interface: 0, far_interface: 0 };
        bed.enter_a();
        ip(&format!("link add veth-a {queues} type veth peer name veth-b {queues}"));
        ip(&format!("link set veth-b netns /proc/{}/fd/{}", std::process::id(), bed.b.as_raw_fd()));
        for (number, name) in [(1, "veth-a"), (2, "veth-b")] {
            if number == 2 {
                bed.enter_b();
            }
            ip(&format!("link set {name} address 02:00:00:00:00:0{number} up"));
            ip(&format!("addr add 192.0.2.{number}/24 dev {name}"));
            ip(&format!("addr add 2001:db8::{number}/64 dev {name} nodad"));
            // What waits for a neighbour is dropped beyond a few.
            let other = 3 - number;
            for address in [format!("192.0.2.{other}"), format!("2001:db8::{other}")] {
                ip(&format!("neigh replace {address} lladdr 02:00:00:00:00:0{other} dev {name}"));
            }
        }
        let index = |name| ip(&format!("-o link show {name}")).split(':').next().unwrap().parse().unwrap();
        let far_interface = index("veth-b");
        bed.enter_a();
        let interface = index("veth-a");
        let deadline = Instant::now() + Duration::from_secs(5);
        while !ip("link show veth-a").contains("state UP") {
            assert!(Instant::now() < deadline, "the veth does not come up");
        }
        Self { interface, far_interface, ..bed }
    }

    pub fn enter_a(&self) {
        setns(&self.a, CloneFlags::CLONE_NEWNET).unwrap();
    }

    pub fn enter_b(&self) {
        setns(&self.b, CloneFlags::CLONE_NEWNET).unwrap();
    }

    fn place(&self, queue: u32) -> Place {
        Place { interface: self.interface, queue, transfer: Transfer::Copy }
    }

    /// Sockets for `workers` on a queue; one that has just been closed keeps the queue for a moment.
    fn open(&self, queue: u32, workers: u32, sizes: Sizes) -> (Arc<Queue>, Vec<Port<Socket>>) {
        Self::open_at(self.place(queue), workers, sizes)
    }

    fn open_at(place: Place, workers: u32, sizes: Sizes) -> (Arc<Queue>, Vec<Port<Socket>>) {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            match open(place, workers as usize, sizes) {
                Err(OpenError::Taken(_)) if Instant::now() < deadline => {}
                result => return result.unwrap(),
            }
        }
    }

    /// A socket in `b`.
    fn socket(&self, address: &str) -> UdpSocket {
        self.enter_b();
        let socket = UdpSocket::bind((address.parse::<IpAddr>().unwrap(), 0)).unwrap();
        self.enter_a();
        socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        socket
    }
}

/// Where worker `worker` listens.
fn address(ip: &str, worker: u32) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), PORT + worker as u16)
}

/// The payload of a frame.
fn payload(frame: &[u8]) -> &[u8] {
    let Frame::Udp { at, len } = gateway_common::frame::parse(frame) else {
        panic!("{frame:02x?} is no UDP")
    };
    &frame[at..][..len]
}

/// `frame` back to who sent it, with a checksum.
fn answer(frame: &[u8]) -> Vec<u8> {
    let payload_len = payload(frame).len();
    let v4 = frame[12] == 0x08;
    let (addresses, half, udp) = if v4 { (26, 4, 34) } else { (22, 16, 54) };
    let mut out = frame[..udp + 8 + payload_len].to_vec();
    out[..12].rotate_left(6);
    out[addresses..addresses + 2 * half].rotate_left(half);
    out[udp..udp + 4].rotate_left(2);
    out[udp + 6..udp + 8].fill(0);
    let pseudo = checksum::pseudo_header(&out[addresses..addresses + 2 * half], 17, (8 + payload_len) as u16);
    let sum = checksum::finish(pseudo + checksum::sum(&out[udp..]));
    out[udp + 6..udp + 8].copy_from_slice(&sum);
    out
}

/// What a port received.
fn receive(port: &mut Port<Socket>) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    port.look();
    while let Some(batch) = port.receive(usize::MAX) {
        all.extend(batch.frames().map(<[u8]>::to_vec));
        port.recycle(batch);
    }
    all
}

/// What all of `ports` received, each with the worker's number, after `count` frames in all.
fn receive_all(ports: &mut [Vec<Port<Socket>>], count: usize) -> Vec<(usize, Vec<u8>)> {
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut all = Vec::new();
    while all.len() < count {
        assert!(Instant::now() < deadline, "{} of {count} frames arrived", all.len());
        for (worker, port) in ports.iter_mut().flat_map(|ports| ports.iter_mut().enumerate()) {
            all.extend(receive(port).into_iter().map(|frame| (worker, frame)));
        }
    }
    all
}

fn send(port: &mut Port<Socket>, bytes: &[u8]) {
    port.reserve().expect("the way out is free")[..bytes.len()].copy_from_slice(bytes);
    assert!(port.commit(0, bytes.len()));
}

/// As the worker's thread does: what the kernel did not take is offered again.
fn flush_all(port: &mut Port<Socket>) {
    let deadline = Instant::now() + Duration::from_secs(5);
    port.flush();
    while port.is_blocked() {
        assert!(Instant::now() < deadline, "the kernel takes nothing");
        std::thread::sleep(Duration::from_millis(1));
        port.flush();
    }
}

fn counted(port: &mut Port<Socket>) -> Vec<(DropReason, u64)> {
    let mut drops = Counters::default();
    port.count_drops(&mut drops);
    drops.iter().collect()
}

/// The kernel has no more frames than are offered to it.
fn assert_nothing_is_lost(queue: &Queue, ports: &mut [Port<Socket>]) {
    let deadline = Instant::now() + Duration::from_secs(5);
    let offered = SIZES.fill as usize;
    while queue.umem().ours() != SIZES.frames as usize - offered {
        assert!(Instant::now() < deadline, "{} frames are ours", queue.umem().ours());
        ports.iter_mut().for_each(Port::restock);
    }
}

#[test]
fn xsk_frames_reach_their_worker_on_every_queue_and_answers_reach_who_asked() {
    for mode in [Mode::Native, Mode::Generic] {
        in_netns(async {
            let bed = Bed::new();
            let redirect = Redirect::attach(bed.interface, mode).unwrap();
            let (queues, mut ports): (Vec<_>, Vec<_>) =
                (0..QUEUES).map(|queue| bed.open(queue, WORKERS - 1, SIZES)).unzip();
            for (queue, ports) in (0..).zip(&ports) {
                assert!(ports.iter().all(|port| !port.wire().is_zero_copy()));
                for (worker, port) in (0..).zip(ports) {
                    redirect.set(queue, worker, port.wire());
                }
            }
            for (here, there) in PAIRS {
                // Enough flows for both queues, more frames for one worker than one call sends.
                let senders: Vec<_> = (0..8).map(|_| bed.socket(there)).collect();
                for round in 0..20_u8 {
                    let mut expect = Vec::new();
                    for worker in 0..WORKERS - 1 {
                        for (number, sender) in (0..).zip(&senders) {
                            for i in 0..6 {
                                let mut bytes = vec![round; 60 + 200 * usize::from(i)];
                                bytes[..3].copy_from_slice(&[worker as u8, number, i]);
                                sender.send_to(&bytes, address(here, worker)).unwrap();
                                expect.push((worker as usize, bytes));
                            }
                        }
                    }
                    let got = receive_all(&mut ports, expect.len());
                    let mut payloads: Vec<_> =
                        got.iter().map(|(worker, frame)| (*worker, payload(frame).to_vec())).collect();
                    payloads.sort();
                    expect.sort();
                    assert!(payloads == expect, "{mode:?} {here}, round {round}: other frames");
                    for (_, frame) in &got {
                        // All by one socket of one queue, whoever received it.
                        send(&mut ports[usize::from(round) % 2][1], &answer(frame));
                    }
                    for ports in &mut ports {
                        flush_all(&mut ports[1]);
                    }
                    for (number, sender) in (0..).zip(&senders) {
                        for _ in 0..6 * (WORKERS - 1) {
                            let mut buffer = [0; 2048];
                            let (len, from) = sender.recv_from(&mut buffer).expect("an answer");
                            assert_eq!((buffer[1], buffer[len - 1]), (number, round), "{mode:?} {here}");
                            assert_eq!(from, address(here, buffer[0].into()), "{mode:?}");
                        }
                    }
                }
            }
            for (queue, ports) in queues.iter().zip(&mut ports) {
                assert_nothing_is_lost(queue, ports);
                assert!(ports.iter_mut().all(|port| counted(port).is_empty()), "nothing was dropped");
            }
            // An empty slot: the kernel has it.
            bed.enter_a();
            let kernel = UdpSocket::bind(address("192.0.2.1", WORKERS - 1)).unwrap();
            kernel.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
            bed.socket("192.0.2.2").send_to(b"slow", kernel.local_addr().unwrap()).unwrap();
            assert_eq!(kernel.recv(&mut [0; 9]).expect("it passes"), 4);
        });
    }
}

#[test]
fn xsk_starved_queue_and_full_ring_are_counted_and_recover() {
    in_netns(async {
        let table = [
            ("few frames", Sizes { fill: 16, ..SIZES }, 16, DropReason::XskStarved),
            ("a small ring", Sizes { rx: 16, ..SIZES }, 16, DropReason::XskRingFull),
        ];
        let bed = Bed::new();
        let redirect = Redirect::attach(bed.interface, Mode::Native).unwrap();
        for (name, sizes, fit, reason) in table {
            let (_queues, mut ports): (Vec<_>, Vec<_>) =
                (0..QUEUES).map(|queue| bed.open(queue, 1, sizes)).unzip();
            for (queue, ports) in (0..).zip(&ports) {
                redirect.set(queue, 0, ports[0].wire());
            }
            let sender = bed.socket("192.0.2.2");
            for _ in 0..3 {
                for _ in 0..50 {
                    sender.send_to(&[1; 100], address("192.0.2.1", 0)).unwrap();
                }
                // One flow, one queue.
                assert_eq!(receive_all(&mut ports, fit).len(), fit, "{name}");
                let drops: Vec<_> = ports.iter_mut().flat_map(|ports| counted(&mut ports[0])).collect();
                assert_eq!(drops, [(reason, 50 - fit as u64)], "{name}");
            }
        }
    });
}

#[test]
fn xsk_socket_in_the_slot_of_another_queue_gets_nothing_and_nobody_counts_it() {
    in_netns(async {
        let bed = Bed::new();
        let redirect = Redirect::attach(bed.interface, Mode::Native).unwrap();
        let (_queues, mut ports): (Vec<_>, Vec<_>) =
            (0..QUEUES).map(|queue| bed.open(queue, 1, SIZES)).unzip();
        for (queue, ports) in (0..).zip(&ports) {
            redirect.set(QUEUES - 1 - queue, 0, ports[0].wire());
        }
        let sender = bed.socket("192.0.2.2");
        for _ in 0..20 {
            sender.send_to(b"lost", address("192.0.2.1", 0)).unwrap();
        }
        std::thread::sleep(Duration::from_millis(100));
        for ports in &mut ports {
            assert_eq!(receive(&mut ports[0]).len(), 0);
            assert_eq!(counted(&mut ports[0]), []);
        }
        for (queue, ports) in (0..).zip(&ports) {
            redirect.set(queue, 0, ports[0].wire());
        }
        sender.send_to(b"right", address("192.0.2.1", 0)).unwrap();
        assert_eq!(payload(&receive_all(&mut ports, 1)[0].1), b"right");
    });
}

#[test]
fn xsk_frames_wait_while_the_link_is_down_and_the_ring_fills() {
    in_netns(async {
        let bed = Bed::new();
        let (queue, mut ports) = bed.open(0, 1, SIZES);
        let redirect = Redirect::attach(bed.interface, Mode::Native).unwrap();
        redirect.set(0, 0, ports[0].wire());
        redirect.set(1, 0, ports[0].wire());
        let asked = bed.socket("192.0.2.2");
        let to = format!("02000000000{}02000000000{}0800", 2, 1);
        let mut frame = hex::decode(to).unwrap();
        let (len, port) = (20 + 8 + 5, asked.local_addr().unwrap().port());
        frame.extend([0x45, 0, 0, len, 0, 0, 0x40, 0, 64, 17, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]);
        let sum = checksum::finish(checksum::sum(&frame[14..34]));
        frame[24..26].copy_from_slice(&sum);
        frame.extend([PORT.to_be_bytes(), port.to_be_bytes(), [0, 13], [0, 0]].concat());
        frame.extend(b"hello");

        ip("link set veth-a down");
        let port = &mut ports[0];
        for _ in 0..SIZES.tx {
            send(port, &frame);
        }
        port.flush();
        assert!(port.is_blocked() && port.reserve().is_none(), "another way must be gone");
        ip("link set veth-a up");
        let deadline = Instant::now() + Duration::from_secs(5);
        while port.is_blocked() || port.reserve().is_none() {
            assert!(Instant::now() < deadline, "nothing is sent");
            port.flush();
        }
        for _ in 0..SIZES.tx {
            assert_eq!(asked.recv(&mut [0; 9]).expect("what waited"), 5);
        }
        assert_nothing_is_lost(&queue, &mut ports);
    });
}

#[test]
fn xsk_what_cannot_be_opened_says_why() {
    in_netns(async {
        let bed = Bed::new();
        let held = bed.open(0, 1, SIZES);
        let zero_copy = Place { transfer: Transfer::ZeroCopy, ..bed.place(1) };
        let table = [
            (bed.place(0), "queue 0 has AF_XDP sockets of another program"),
            (bed.place(9), "there is no queue 9"),
            (zero_copy, "the driver has no zero-copy mode for AF_XDP"),
            (Place { interface: 9999, ..bed.place(0) }, "the interface is gone"),
        ];
        for (place, text) in table {
            let error = open(place, 1, SIZES).err().map(|error| error.to_string());
            assert_eq!(error.as_deref(), Some(text), "{place:?}");
        }
        drop(held);
        // And the queue is free again.
        bed.open(0, 2, SIZES);
    });
}
