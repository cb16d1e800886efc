//! Any bytes, from any side.

use rand::{Rng, RngCore, SeedableRng, rngs::SmallRng};

use super::*;

#[test]
fn no_bytes_panic_and_each_input_is_counted_once() {
    for seed in 0..20 {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut world = if seed % 2 == 0 { World::new(&lan()) } else { World::relayed(&lan()) };
        world.handshake();
        // Not all the time, so that both ways are walked.
        world.command(Command::Accounting { on: !seed.is_multiple_of(5) });
        world.command(flows::clock(&world));
        let resources = [cidr(1, "10.44.0.0/24", &[]), dns(3, "**.x")];
        names::tell_on(&mut world, &resources, (seed % 3 > 0).then(direct), &names::example());
        let samples = [
            udp(C4, LAN4, (1, 53), b"abcdefgh"),
            tcp(C6, LAN6, (1, 443)),
            icmp(C4, LAN4, 3, &udp(LAN4, C4, (53, 1), b"")),
            icmp(LAN4, C4, 11, &udp(C4, LAN4, (53, 1), b"")),
            udp(LAN4, C4, (53, 1), b"abcdefgh"),
            ip(C6, LAN6, 0, &[44, 0, 0, 0, 0, 0, 0, 0, 60, 0, 0, 0, 0, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0, 0]),
            udp(C4, "100.96.0.1", (1, 53), b""),
            tcp(C6, "fd00:2021:1111:8000::1", (1, 443)),
            udp(names::REAL4, C4, (53, 1), b""),
            icmp(LAN4, C4, 11, &udp(C4, names::REAL4, (1, 53), b"")),
            icmp(LAN6, C6, 2, &tcp(C6, names::REAL6, (1, 443))),
            answers::control(
                0,
                br#"{"resource":"2b6f3f0e-7a53-4d0b-9a4f-2f1f5d1f9a10","domain":"x","proxy_ips":[]}"#,
            ),
        ];
        for round in 0..1500 {
            let mut packet = samples[random.random_range(0..samples.len())].clone();
            mutate(&mut random, &mut packet);
            match round % 4 {
                // Any plaintext a client may encrypt, a goodbye excepted.
                0 => world.outbound(&packet),
                1 => world.inbound(&packet),
                // Any message on the wire.
                2 => {
                    let mut message = match random.random_range(0..3) {
                        0 => world.client.seal(&packet),
                        1 => world.client.initiate(),
                        _ => vec![0x40, 7, 0, 0],
                    };
                    mutate(&mut random, &mut message);
                    if random.random() {
                        world.datagram(REMOTE, &message)
                    } else {
                        world.client_sends(&message)
                    }
                }
                _ => {
                    let mut junk = vec![0; random.random_range(0..200)];
                    random.fill_bytes(&mut junk);
                    if let Some(first) = junk.first_mut() {
                        *first %= 128;
                    }
                    world.datagram(if random.random() { SERVER } else { REMOTE }, &junk);
                }
            }
            world.sink.packets.clear();
            world.sink.datagrams.clear();
            world.check_accounts();
        }
        world.command(Command::Shutdown);
        check_records(&mut world, seed);
        let counters = world.worker.counters();
        assert!(counters.iter().count() > 8, "the sample reaches many reasons: {counters:?}");
    }
}

/// What began has ended, and nothing is in a record that did not pass.
fn check_records(world: &mut World, seed: u64) {
    let reports = flows::flows(world);
    let ends: Vec<_> = reports.iter().filter_map(flows::carried).collect();
    assert_eq!(ends.len() * 2, reports.len(), "seed {seed}");
    assert_eq!(ends.is_empty(), seed.is_multiple_of(5), "seed {seed}");
    let [tx, _, rx, _] = ends.iter().fold([0; 4], |sum, end| std::array::from_fn(|n| sum[n] + end[n]));
    let t = world.worker.traffic();
    assert!(tx <= t.outbound_direct.packets + t.outbound_relayed.packets, "seed {seed}: {tx} of {t:?}");
    assert!(rx <= t.inbound_direct.packets + t.inbound_relayed.packets, "seed {seed}: {rx} of {t:?}");
}

fn mutate(random: &mut SmallRng, bytes: &mut Vec<u8>) {
    for _ in 0..random.random_range(0..4) {
        match random.random_range(0..6) {
            0 => bytes.truncate(random.random_range(0..=bytes.len())),
            1 => bytes.resize(bytes.len() + random.random_range(0..60), 0xaa),
            _ if !bytes.is_empty() => {
                let at = random.random_range(0..bytes.len());
                bytes[at] = random.random();
            }
            _ => {}
        }
    }
}
