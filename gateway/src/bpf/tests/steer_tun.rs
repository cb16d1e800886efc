//! `steer_tun`: the table of packets in the kernel's own test run, and a real TUN with four queues in a namespace.

use std::{
    net::{IpAddr, UdpSocket},
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use anyhow::Result;
use aya::programs::{TestRun as _, TestRunOptions};
use gateway_common::steer_table;
use gateway_proto::WorkerId;
use tun_rs::{DeviceBuilder, SyncDevice};

use super::network::{Network, ip};
use crate::bpf::{Kernel, LeftOut, steering};

const QUEUES: usize = 4;
const DEVICE: &str = "tun-steer";
const CLIENTS: [(&str, usize); 4] =
    [("100.64.1.7", 2), ("fd00:2021:1111::107", 2), ("100.95.255.254", 1), ("fd00:2021:1111::1f:fffe", 3)];
const STRANGERS: [&str; 2] = ["100.64.1.8", "fd00:2021:1111::108"];

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_packets_of_the_table_get_the_queue_that_user_space_finds() {
    let samples = steer_table::packets();
    let mut steering = Kernel::steering().unwrap();
    let destination = |sample: &steer_table::Packet| {
        sample.tunnel.map(|key| std::net::Ipv6Addr::from(key.address).to_canonical())
    };
    // Nobody is known; then all are; then nobody again.
    for worker in [None, WorkerId::new(5), None] {
        for sample in &samples {
            if let Some(tunnel) = destination(sample) {
                steering.owners.set_tunnel(tunnel, worker);
            }
        }
        for sample in &samples {
            // The kernel takes an Ethernet header off before it runs the program. It is of a type for experiments,
            // because the kernel refuses to run anything with a damaged packet of a type that it knows.
            let frame = [&[0; 12][..], &[0x88, 0xb5], &sample.bytes].concat();
            let options = TestRunOptions { data_in: Some(&frame), ..TestRunOptions::new() };
            let result = steering::steer_tun(&mut steering.plane.ebpf).unwrap().test_run(options).unwrap();
            let expect = worker.filter(|_| sample.tunnel.is_some()).map_or(0, WorkerId::get);
            assert_eq!(usize::try_from(result.return_value).unwrap(), expect, "{}", sample.name);
        }
    }
}

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_packets_to_a_client_reach_its_queue_also_after_it_moved_and_after_silence() {
    let network = Network::make().unwrap();
    let result = network.enter("receiver", || {
        let queues = open_queues()?;
        let mut steering = Kernel::steering()?;
        steering.plane.attach_tun(queues[1].as_fd())?;
        let set = |steering: &mut Kernel, moved: usize| {
            for (client, home) in CLIENTS {
                steering.owners.set_tunnel(client.parse().unwrap(), WorkerId::new((home + moved) % QUEUES));
            }
        };
        set(&mut steering, 0);
        exchange(&queues, 0)?;
        set(&mut steering, 1);
        exchange(&queues, 1)?;
        // The kernel's own table of flows forgets after 3 s, and then it hashes; nothing of it may show.
        std::thread::sleep(Duration::from_secs(4));
        exchange(&queues, 1)?;
        set(&mut steering, 3);
        exchange(&queues, 3)?;
        assert_eq!(steering.owners.left_out(), LeftOut::default());
        Ok(())
    });
    result.unwrap();
}

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_cost_of_steering_a_packet_is_told() {
    const RUNS: u32 = 100_000;
    let mut steering = Kernel::steering().unwrap();
    for client in 0..1000 {
        let tunnel = std::net::Ipv4Addr::from(0x6440_0100 + client);
        steering.owners.set_tunnel(tunnel.into(), WorkerId::new(1));
    }
    steering.owners.set_tunnel("fd00:2021:1111::7".parse().unwrap(), WorkerId::new(1));
    for name in ["IPv4 of full length", "IPv6", "neither"] {
        let sample = steer_table::packets().into_iter().find(|sample| sample.name == name).unwrap();
        let frame = [&[0; 12][..], &[0x88, 0xb5], &sample.bytes].concat();
        let options = TestRunOptions { data_in: Some(&frame), repeat: RUNS, ..TestRunOptions::new() };
        let result = steering::steer_tun(&mut steering.plane.ebpf).unwrap().test_run(options).unwrap();
        assert_eq!(result.return_value, u32::from(sample.tunnel.is_some()), "{name}");
        println!("steer_tun: {} ns for a packet, {name}", result.duration.as_nanos());
    }
}

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_what_is_no_queue_of_a_tun_is_refused_in_one_sentence() {
    let mut steering = Kernel::steering().unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    let error = steering.plane.attach_tun(file.as_fd()).unwrap_err();
    assert_eq!(error.to_string(), "the TUN device does not take the program steer_tun");
    let error = steering.plane.attach_sockets(false, &[file.as_fd()]).unwrap_err();
    assert!(error.to_string().starts_with("the socket of worker 0 cannot be steered"), "{error:#}");
    assert!(steering.plane.attach_sockets(true, &[]).is_err());
}

fn open_queues() -> Result<Vec<SyncDevice>> {
    let first = DeviceBuilder::new()
        .name(DEVICE)
        .mtu(1280)
        .with(|builder| {
            builder.multi_queue(true).packet_information(false);
        })
        .build_sync()?;
    let mut queues = vec![first];
    while queues.len() < QUEUES {
        queues.push(queues[0].try_clone()?);
    }
    for queue in &queues {
        queue.set_nonblocking(true)?;
    }
    ip("address add 100.64.0.1/11 dev tun-steer")?;
    ip("address add fd00:2021:1111::1/107 dev tun-steer nodad")?;
    ip("link set tun-steer up")?;
    Ok(queues)
}

/// Sends to every client and stranger from many ports, and sees where that arrives.
fn exchange(queues: &[SyncDevice], moved: usize) -> Result<()> {
    const FLOWS: usize = 64;
    let clients = CLIENTS.map(|(client, home)| (client, (home + moved) % QUEUES));
    for (to, queue) in clients.into_iter().chain(STRANGERS.map(|stranger| (stranger, 0))) {
        let to: IpAddr = to.parse()?;
        for _ in 0..FLOWS {
            let from = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            UdpSocket::bind(from)?.send_to(b"inbound", (to, 9))?;
        }
        let mut expect = [0; QUEUES];
        expect[queue] = FLOWS;
        let mut got = [0; QUEUES];
        let deadline = Instant::now() + Duration::from_secs(5);
        while got.iter().sum::<usize>() < FLOWS {
            assert!(Instant::now() < deadline, "packets to {to} are missing: {got:?}");
            for (queue, got) in queues.iter().zip(&mut got) {
                *got += drain(queue, to);
            }
        }
        assert_eq!(got, expect, "packets to {to}");
    }
    Ok(())
}

/// How many packets to `to` wait in the queue; the kernel's own (neighbour discovery and the like) are not counted.
fn drain(queue: &SyncDevice, to: IpAddr) -> usize {
    let mut count = 0;
    let mut buffer = [0; 2048];
    while let Ok(len) = rustix::io::read(queue, &mut buffer) {
        let found = gateway_common::steer::tunnel_of(&buffer[..len])
            .map(|key| std::net::Ipv6Addr::from(key.address).to_canonical());
        count += usize::from(found == Some(to));
    }
    count
}
