//! What translating a packet costs, in nanoseconds: `cargo run --release -p gateway-proto --example nat_cost`.
//!
//! Each figure is the least of several rounds. A packet is made ready again by copying its headers, which is measured
//! by itself and taken off.
#![expect(clippy::disallowed_methods, reason = "it measures time")]

use std::{
    hint::black_box,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::{Duration, Instant},
};

use gateway_proto::worker::{
    inner::{Inner, view},
    nat::{Limits, Nat},
};

const PACKETS: u32 = 1 << 20;

fn main() {
    println!("{:>28} {:>9} {:>9} {:>9} {:>9}", "", "outbound", "inbound", "open", "end");
    for (name, v6, tcp) in
        [("UDP over IPv4", false, false), ("TCP over IPv4", false, true), ("TCP over IPv6", true, true)]
    {
        for sessions in [1, 100, 10_000, 60_000] {
            let [out, back, open, end] = measure(v6, tcp, sessions);
            println!("{name:>14} {sessions:>6} sessions {out:>9.1} {back:>9.1} {open:>9.1} {end:>9.1}");
        }
    }
}

fn measure(v6: bool, tcp: bool, sessions: u16) -> [f64; 4] {
    let start = Instant::now();
    let mut nat = Nat::new(1, Limits::default(), start);
    let there: Vec<_> = (1..=sessions).map(|port| packet(v6, tcp, true, port)).collect();
    let back: Vec<_> = (1..=sessions).map(|port| packet(v6, tcp, false, port)).collect();
    let real = address(v6, 3);

    let opening = Instant::now();
    run(&there, sessions.into(), |bytes, view| assert!(nat.outbound(bytes, view, real, start).is_ok()));
    let open = opening.elapsed().as_secs_f64() * 1e9 / f64::from(sessions);
    let best = |packets: &[(Vec<u8>, Inner)], act: &mut dyn FnMut(&mut [u8], &mut Inner)| {
        let rounds = (0..7).map(|_| run(packets, PACKETS, &mut *act));
        rounds.fold(f64::MAX, f64::min)
    };
    let nothing = best(&there, &mut |bytes, view| {
        black_box((bytes, view));
    });
    let out = best(&there, &mut |bytes, view| assert!(nat.outbound(bytes, view, real, start).is_ok()));
    let inbound = best(&back, &mut |bytes, view| {
        black_box(nat.inbound(bytes, view, start));
    });
    let later = start + Duration::from_secs(8000);
    let ending = Instant::now();
    while nat.sessions() > 0 {
        nat.handle_timeout(later);
    }
    let end = ending.elapsed().as_secs_f64() * 1e9 / f64::from(sessions);
    [out - nothing, inbound - nothing, open, end]
}

/// Nanoseconds per packet.
fn run(packets: &[(Vec<u8>, Inner)], count: u32, mut act: impl FnMut(&mut [u8], &mut Inner)) -> f64 {
    // A stride, so that the sessions do not come in the order they were made in.
    let (mut at, mut bytes) = (0, [0; 96]);
    let began = Instant::now();
    for _ in 0..count {
        let (packet, view) = &packets[at];
        bytes[..packet.len()].copy_from_slice(packet);
        act(&mut bytes[..packet.len()], &mut { *view });
        at = (at + 7919) % packets.len();
    }
    began.elapsed().as_secs_f64() * 1e9 / f64::from(count)
}

fn address(v6: bool, last: u8) -> IpAddr {
    if v6 {
        Ipv6Addr::from_bits(0xfd00 << 112 | u128::from(last)).into()
    } else {
        Ipv4Addr::new(10, 0, 0, last).into()
    }
}

/// From the client (1) to the proxy (2), or from the real address (3) to the client.
fn packet(v6: bool, tcp: bool, outbound: bool, port: u16) -> (Vec<u8>, Inner) {
    let (src, dst) = if outbound { (1, 2) } else { (3, 1) };
    let len = if tcp { 20 } else { 8 };
    let mut packet = if v6 {
        vec![0x60, 0, 0, 0, 0, len, if tcp { 6 } else { 17 }, 64]
    } else {
        vec![0x45, 0, 0, 20 + len, 0, 0, 0, 0, 64, if tcp { 6 } else { 17 }, 0, 0]
    };
    for last in [src, dst] {
        match address(v6, last) {
            IpAddr::V4(ip) => packet.extend(ip.octets()),
            IpAddr::V6(ip) => packet.extend(ip.octets()),
        }
    }
    let ports = if outbound { [port, 443] } else { [443, port] };
    packet.extend(ports.map(u16::to_be_bytes).as_flattened());
    // The checksums need not be right: they are updated, not looked at.
    match tcp {
        true => packet.extend([0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 1, 1, 1, 1, 0, 0]),
        false => packet.extend([0, len, 1, 1]),
    }
    let view = view(&packet).expect("a valid packet");
    (packet, view)
}
