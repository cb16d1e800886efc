//! How workers live: starting, sleeping, sharing their time, ending.

use std::{
    net::UdpSocket,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use gateway_common::DropReason;
use gateway_proto::{Command, Transmit, WorkerEvent};

use super::{ALL, SIZES, TUN_NAME, addrs, in_netns, ip, pipe::Pipe, start, start_several};
use crate::data::{Closed, Config, DataPlane, interface::Interface};

#[test]
fn dead_worker_ends_the_wait_for_events() {
    type Action = fn(&mut Pipe);
    let table: [(Action, &str); 3] = [
        (|_| panic!("as the test wants"), "Worker 0 panicked: as the test wants"),
        (
            |pipe| std::thread::sleep(Duration::from_secs(8 * pipe.id.get() as u64)),
            "Worker 1 has been busy with one batch for 2 s",
        ),
        (
            |pipe| assert!(pipe.id.get() != 2, "the test wants only one to fail"),
            "Worker 2 panicked: the test wants only one to fail",
        ),
    ];
    for (workers, (action, expect)) in [1, 2, 4].into_iter().zip(table) {
        in_netns(async move {
            let pipe = Pipe { on_command: Some(action), ..Pipe::new(None) };
            let mut data = start_several(workers, &pipe, ALL);
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
        let mut data = start(&Pipe::new(None));
        ip("link del tun-firezone");
        let error =
            tokio::time::timeout(Duration::from_secs(6), data.recv()).await.expect("noticed").unwrap_err();
        assert!(error.to_string().starts_with("The TUN device is gone"), "{error:#}");
    });
}

#[test]
fn idle_worker_sleeps_and_one_with_a_stuck_deadline_does_not_spin() {
    in_netns(async {
        for (workers, stuck, most) in [(1, false, 2), (4, false, 8), (1, true, 400)] {
            let turns = Arc::new(AtomicU64::new(0));
            let pipe = Pipe { stuck_deadline: stuck, turns: turns.clone(), ..Pipe::new(None) };
            let data = start_several(workers, &pipe, ALL);
            tokio::time::sleep(Duration::from_millis(300)).await;
            let turns = turns.load(Ordering::Relaxed);
            assert!(turns <= most, "{turns} turns in 300 ms");
            assert!(!stuck || turns > 10, "{turns} turns in 300 ms");
            data.close().await.result.unwrap();
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
        let mut data = start(&pipe);
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
        data.close().await.result.unwrap();
    });
}

#[test]
fn data_plane_starts_hears_stun_sends_and_closes() {
    for workers in [1, 2, 4] {
        in_netns(start_and_close(workers));
    }
}

async fn start_and_close(workers: usize) {
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
            fast_path: super::OFF,
        })
    };
    let data = start().unwrap();
    assert!(start().err().expect("the device is taken").to_string().contains("in use by another process"));
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
    let stun = hex::decode("000100002112a442aabbccddeeff001122334455").unwrap();
    peer.send_to(&stun, "127.0.0.1:52625").unwrap();
    while data.events_waiting().0 == 0 && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let Closed { events: left, result: closed, .. } = data.close().await;
    closed.unwrap();
    let is_ours = |event: &WorkerEvent| matches!(event, WorkerEvent::Stun(told) if told.payload == stun);
    assert!(matches!(&left[..], [event] if is_ours(event)), "what nobody took is returned: {left:?}");
    assert_eq!(ip("link show dev tun-firezone"), "", "the device is gone");
    start().unwrap().close().await.result.unwrap();
}
