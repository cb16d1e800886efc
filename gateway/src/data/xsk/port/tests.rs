//! Ports against the kernel's twin: what arrives and leaves, and that no frame is lost, whatever happens.

#![expect(clippy::cast_possible_truncation, reason = "patterns to fill frames with")]

use std::{cell::RefCell, collections::VecDeque, rc::Rc, sync::Arc};

use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};

use super::{super::twin::*, *};

const SIZES: Sizes =
    Sizes { frames: 512, offered: 128, fill: 128, completion: 256, rx: 64, tx: 64, start: u32::MAX - 50 };

/// A frame with a number in it.
fn numbered(number: u32, len: usize) -> Vec<u8> {
    let mut bytes = vec![number as u8; len.max(4)];
    bytes[..4].copy_from_slice(&number.to_be_bytes());
    bytes
}

/// What a port has received and not seen; the batch is recycled.
fn receive(port: &mut Port<TwinWire>) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    port.look();
    while let Some(batch) = port.receive(BATCH) {
        assert!(port.receive(BATCH).is_none(), "one at a time");
        all.extend(batch.frames().map(<[u8]>::to_vec));
        port.recycle(batch);
    }
    all
}

/// Queues a frame; false if the way out is full.
fn send(port: &mut Port<TwinWire>, at: usize, bytes: &[u8]) -> bool {
    let Some(frame) = port.reserve() else { return false };
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    assert!(port.commit(at, bytes.len()));
    true
}

fn counted(port: &mut Port<TwinWire>) -> Vec<(DropReason, u64)> {
    let mut drops = Counters::default();
    port.count_drops(&mut drops);
    drops.iter().collect()
}

/// Everything comes to rest; then each frame is in the pool, in the fill ring or in the kernel's hand.
fn assert_nothing_is_lost(kernel: &Rc<RefCell<Kernel>>, queue: &Arc<Queue>, mut ports: Vec<Port<TwinWire>>) {
    kernel.borrow_mut().down = false;
    kernel.borrow_mut().completes = true;
    for _ in 0..4 {
        for port in &mut ports {
            receive(port);
            port.flush();
            port.restock();
        }
        kernel.borrow_mut().send_all();
    }
    ports.iter_mut().for_each(Port::restock);
    drop(ports);
    let kernel = kernel.borrow();
    assert_eq!(queue.free(), kernel.umem.ours(), "what is ours is in the pool");
    let offered = SIZES.frames as usize - queue.free();
    assert_eq!(offered, SIZES.offered, "the kernel has as many to receive into as in the beginning");
}

#[test]
fn what_arrives_is_received_in_order_by_its_socket_and_its_frames_are_offered_again() {
    let (kernel, queue, mut ports) = twin(SIZES, 2);
    // Many times round the rings.
    for round in 0..50 {
        for number in 0..60 {
            let socket = number as usize % 2;
            assert!(kernel.borrow_mut().deliver(socket, &numbered(round * 60 + number, 60)), "round {round}");
        }
        for (socket, port) in (0..).zip(&mut ports) {
            let expect: Vec<_> =
                (0..60).filter(|n| n % 2 == socket).map(|n| numbered(round * 60 + n, 60)).collect();
            assert_eq!(receive(port), expect, "round {round}");
        }
    }
    assert_eq!(counted(&mut ports[0]), []);
    assert_nothing_is_lost(&kernel, &queue, ports);
}

#[test]
fn what_is_sent_leaves_in_order_however_many_calls_it_takes() {
    let (kernel, queue, mut ports) = twin(SIZES, 1);
    let port = &mut ports[0];
    let mut expect = Vec::new();
    for number in 0..1000 {
        let bytes = numbered(number, 40 + number as usize % 1400);
        assert!(send(port, 64 - number as usize % 8, &bytes), "frame {number}");
        expect.push(bytes);
    }
    port.flush();
    assert!(!port.is_blocked());
    assert_eq!(kernel.borrow_mut().sent(0), expect);
    let kicks = kernel.borrow().kicks;
    assert!((1000 / 32..=1000 / 32 + 40).contains(&kicks), "{kicks} calls");
    assert_nothing_is_lost(&kernel, &queue, ports);
}

#[test]
fn a_reservation_that_is_not_committed_is_forgotten() {
    let (kernel, queue, mut ports) = twin(SIZES, 1);
    let sender = &mut ports[0];
    sender.reserve().unwrap().fill(1);
    sender.reserve().unwrap()[..60].fill(2);
    for (at, len) in [(0, 0), (2000, 60), (0, 2049)] {
        assert!(!sender.commit(at, len), "{len} at {at}");
    }
    assert!(sender.commit(0, 60), "a refused commit can be repeated");
    assert!(!sender.commit(0, 60), "but not one that was taken");
    sender.flush();
    assert_eq!(kernel.borrow_mut().sent(0), [vec![2; 60]]);
    ports[0].reserve().unwrap();
    assert_nothing_is_lost(&kernel, &queue, ports);
}

#[test]
fn a_kernel_that_looks_by_itself_is_not_called() {
    let (kernel, queue, mut ports) = twin(SIZES, 1);
    kernel.borrow_mut().set_sleepy(false, false);
    assert!(send(&mut ports[0], 0, &numbered(1, 60)));
    ports[0].flush();
    kernel.borrow_mut().deliver(0, &numbered(1, 60));
    receive(&mut ports[0]);
    assert_eq!((kernel.borrow().kicks, kernel.borrow().wakes), (0, 0));
    kernel.borrow_mut().send_all();
    assert_eq!(kernel.borrow_mut().sent(0), [numbered(1, 60)]);

    kernel.borrow_mut().set_sleepy(true, true);
    kernel.borrow_mut().deliver(0, &numbered(2, 60));
    receive(&mut ports[0]);
    assert_eq!(kernel.borrow().wakes, 1, "once for the batch");
    ports[0].restock();
    assert_eq!(kernel.borrow().wakes, 1, "not for nothing");
    assert_nothing_is_lost(&kernel, &queue, ports);
}

#[test]
fn a_driver_that_sends_later_is_told_once_and_again_before_the_thread_sleeps() {
    let (kernel, queue, mut ports) = twin(SIZES, 1);
    kernel.borrow_mut().zero_copy = true;
    let port = &mut ports[0];
    for number in 0..50 {
        assert!(send(port, 0, &numbered(number, 60)));
    }
    port.flush();
    assert!(!port.is_blocked() && kernel.borrow().kicks == 1, "it is told once");
    port.before_sleep();
    assert_eq!(kernel.borrow().kicks, 2, "it sleeps, and frames wait");
    kernel.borrow_mut().set_sleepy(false, false);
    port.before_sleep();
    assert_eq!((kernel.borrow().kicks, kernel.borrow().wakes), (2, 0), "it is at it");
    kernel.borrow_mut().send_all();
    assert_eq!(kernel.borrow_mut().sent(0).len(), 50);
    kernel.borrow_mut().set_sleepy(true, true);
    let kicks = kernel.borrow().kicks;
    port.before_sleep();
    assert_eq!((kernel.borrow().kicks, kernel.borrow().wakes), (kicks, 1), "there is room to receive");
    assert_nothing_is_lost(&kernel, &queue, ports);
}

#[test]
fn a_device_that_is_down_fills_the_ring_and_then_nothing_is_taken_until_it_is_up() {
    let (kernel, queue, mut ports) = twin(SIZES, 1);
    kernel.borrow_mut().down = true;
    let mut taken: Vec<Vec<u8>> = Vec::new();
    for number in 0..200 {
        let bytes = numbered(number, 100);
        if send(&mut ports[0], 0, &bytes) {
            taken.push(bytes);
        }
    }
    assert_eq!(taken.len(), SIZES.tx as usize);
    let calls = kernel.borrow().kicks;
    assert!(calls < 20, "{calls} calls: what is blocked is not tried for each frame");
    assert!(ports[0].is_blocked());
    kernel.borrow_mut().down = false;
    ports[0].flush();
    assert!(!ports[0].is_blocked());
    assert_eq!(kernel.borrow_mut().sent(0), taken, "nothing of it is lost");
    assert_nothing_is_lost(&kernel, &queue, ports);
}

#[test]
fn a_full_completion_ring_is_emptied_and_one_that_stays_full_blocks() {
    let (kernel, queue, mut ports) = twin(Sizes { completion: 16, ..SIZES }, 1);
    for number in 0..60 {
        assert!(send(&mut ports[0], 0, &numbered(number, 60)));
    }
    ports[0].flush();
    assert_eq!(kernel.borrow_mut().sent(0).len(), 60, "by several calls");
    kernel.borrow_mut().completes = false;
    for number in 0..60 {
        assert!(send(&mut ports[0], 0, &numbered(number, 60)));
    }
    ports[0].flush();
    assert!(ports[0].is_blocked());
    assert_eq!(kernel.borrow_mut().sent(0).len(), 16);
    kernel.borrow_mut().complete(16);
    assert_nothing_is_lost(&kernel, &queue, ports);
}

#[test]
fn what_the_kernel_drops_is_counted_once_and_by_its_reason() {
    let (kernel, queue, mut ports) = twin(SIZES, 3);
    let long = vec![0; 1793];
    assert!(!kernel.borrow_mut().deliver(0, &long));
    assert_eq!(counted(&mut ports[0]), [(DropReason::XskRefused, 1)]);
    // 64 fit the receive ring, 128 frames are there for all three sockets.
    for _ in 0..70 {
        kernel.borrow_mut().deliver(0, &numbered(0, 60));
    }
    for _ in 0..70 {
        kernel.borrow_mut().deliver(1, &numbered(0, 60));
    }
    for _ in 0..5 {
        assert!(!kernel.borrow_mut().deliver(2, &numbered(0, 60)));
    }
    assert_eq!(counted(&mut ports[0]), [(DropReason::XskRingFull, 6)]);
    assert_eq!(counted(&mut ports[1]), [(DropReason::XskStarved, 6)]);
    assert_eq!(counted(&mut ports[2]), [(DropReason::XskStarved, 5)]);
    assert_eq!(counted(&mut ports[1]), [], "once");
    assert_nothing_is_lost(&kernel, &queue, ports);
}

#[test]
fn too_few_frames_to_send_are_no_error_and_no_loss() {
    let (kernel, queue, mut ports) = twin(Sizes { frames: 130, ..SIZES }, 2);
    kernel.borrow_mut().completes = false;
    assert!(send(&mut ports[0], 0, &numbered(0, 60)) && send(&mut ports[0], 0, &numbered(1, 60)));
    assert!(!send(&mut ports[0], 0, &numbered(2, 60)), "there are only two");
    assert!(!send(&mut ports[1], 0, &numbered(2, 60)));
    ports[0].flush();
    kernel.borrow_mut().complete(1);
    assert!(send(&mut ports[1], 0, &numbered(2, 60)), "what the one has sent is the other's");
    ports[1].flush();
    kernel.borrow_mut().complete(9);
    drop(ports);
    let (free, held) = (queue.free(), kernel.borrow().held());
    assert!(free <= 2 && held == 0, "{free} {held}");
}

/// Random traffic, delays and failures: what goes in comes out, in order, and no frame is lost.
#[test]
fn whatever_happens_in_whatever_order_no_frame_is_lost() {
    for seed in 0..60 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let count = rng.random_range(1..4);
        let start = u32::MAX - rng.random_range(0..500);
        let (kernel, queue, mut ports) = twin(Sizes { start, ..SIZES }, count);
        let mut arriving = vec![VecDeque::new(); count];
        let mut leaving = vec![VecDeque::new(); count];
        let (mut number, mut received, mut sent) = (0, 0, 0);
        for _ in 0..3000 {
            let socket = rng.random_range(0..count);
            number += 1;
            let bytes = numbered(number, rng.random_range(14..1500));
            match rng.random_range(0..20) {
                0..7 => {
                    if kernel.borrow_mut().deliver(socket, &bytes) {
                        arriving[socket].push_back(bytes);
                    }
                }
                7..13 => {
                    if send(&mut ports[socket], rng.random_range(0..500), &bytes) {
                        leaving[socket].push_back(bytes);
                    }
                }
                13..15 => {
                    let port = &mut ports[socket];
                    port.look();
                    let Some(batch) = port.receive(rng.random_range(0..=BATCH)) else { continue };
                    for frame in batch.frames() {
                        assert_eq!(Some(frame), arriving[socket].pop_front().as_deref(), "seed {seed}");
                        received += 1;
                        // An answer in the middle of the batch.
                        if let Some(out) = port.reserve() {
                            out[..frame.len()].copy_from_slice(frame);
                            assert!(port.commit(0, frame.len()));
                            leaving[socket].push_back(frame.to_vec());
                        }
                    }
                    port.recycle(batch);
                }
                15 => ports[socket].restock(),
                16 => ports[socket].flush(),
                17 => {
                    let mut kernel = kernel.borrow_mut();
                    kernel.completes = !kernel.completes;
                    kernel.complete(rng.random_range(0..100));
                }
                18 => kernel.borrow_mut().down = rng.random_bool(0.3),
                _ => {
                    let (tx, fill) = (rng.random_bool(0.8), rng.random_bool(0.5));
                    kernel.borrow_mut().set_sleepy(tx, fill);
                    if !tx {
                        kernel.borrow_mut().send_all();
                    }
                }
            }
            for (socket, leaving) in leaving.iter_mut().enumerate() {
                for bytes in kernel.borrow_mut().sent(socket) {
                    assert_eq!(Some(bytes), leaving.pop_front(), "seed {seed}");
                    sent += 1;
                }
            }
        }
        assert!(received > 300 && sent > 300, "seed {seed}: {received} received, {sent} sent");
        assert_nothing_is_lost(&kernel, &queue, ports);
    }
}
