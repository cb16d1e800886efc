//! A client that says in its control packets what no client should, as fast as it can, while another resource of it is in use:
//! the transfer does not notice, each packet is counted by what was wrong with it, and the daemon stays as small as it was.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rand::{RngCore as _, SeedableRng as _, rngs::SmallRng};
use serde_json::json;

use super::{
    Context,
    dns::{Nameserver, ResolvConf},
    lab::{Download, Lab, Options, ping},
    names::{PROXIES, fetch, names},
    resources::active,
};
use crate::{
    net::{
        process::Process,
        topology::{LAN_HOST, PORTAL},
    },
    standins::client::{Command, Event},
};

const SECOND: Duration = Duration::from_secs(1);
const NAME: &str = "web.lan.test";
/// How much the daemon may grow, in kB: buffers that are allocated once, and nothing for each packet.
const GROWTH: u64 = 30_000;

/// 1000 a second, for five seconds.
pub(super) fn control_packets(cx: &mut Context) -> Result<()> {
    const BURSTS: u64 = 100;
    const BURST: u32 = 50;
    let (v4, v6) = LAN_HOST;
    let _nameserver = Nameserver::start_with(cx, "names", PORTAL, "-", &[format!("{NAME},{v4},{v6}")])?;
    let launch = ResolvConf::new(cx, &[PORTAL])?.launch(cx)?;
    let rust_log = "info,firezone_gateway::runtime=debug";
    let options = Options { resources: vec![names()], launch, rust_log, ..Options::default() };
    let mut lab = Lab::start(cx, &options)?;
    lab.connect(0, &[names()])?;
    active(&mut lab, NAME, &PROXIES)?;
    let client = &cx.topology.clients[0].namespace;
    let proxy: IpAddr = PROXIES[0].parse()?;
    let url = format!("http://{}/slow", SocketAddr::new(proxy, 80));
    let transfer = Download::start(cx, client, "transfer", &url)?;
    transfer.wait_growth(5 * SECOND)?;
    let (memory, before) = (resident(&lab.gateway)?, transfer.length());

    let packets = hostile();
    let mut random = SmallRng::seed_from_u64(4);
    let begin = Instant::now();
    for burst in 0..BURSTS {
        for _ in 0..BURST {
            let index = random.next_u32() as usize % packets.len();
            lab.clients[0].command(&Command::SendInner { hex: packets[index].clone() })?;
        }
        let next = begin + SECOND * u32::try_from(burst + 1)? / 20;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    let took = begin.elapsed();
    // nginx gives 5 MB a second; half of that also on a machine with something else to do.
    let rate = (transfer.length() - before) as f64 / took.as_secs_f64();
    ensure!(rate > 2_500_000.0, "the transfer had {rate:.0} bytes a second while control packets came");
    let grown = resident(&lab.gateway)?.saturating_sub(memory);
    ensure!(grown < GROWTH, "the daemon grew by {grown} kB");

    // What is foreign is answered with `Inactive`; nothing hostile was ever active, and what was there before still is.
    let wrong = |event: &Event| match event {
        Event::DomainStatus { status, domain, .. } => status == "Active" && domain != NAME,
        _ => false,
    };
    let events = lab.clients[0].events();
    ensure!(!events.iter().any(wrong), "a hostile name is active: {events:?}");
    ping(client, proxy)?;
    // The budget fills again, and a name is heard again.
    std::thread::sleep(2 * SECOND);
    active(&mut lab, NAME, &PROXIES)?;
    ensure!(fetch(client, proxy)? == IpAddr::from(v4), "the name leads somewhere else");
    drop(transfer);
    // What was dropped is said once a minute, and at the end.
    lab.terminate(10 * SECOND)?;
    let log = lab.gateway.log();
    ensure!(!log.contains("panicked"), "a panic");
    for reason in ["malformed_control", "control_budget", "malformed_inner", "foreign_source"] {
        ensure!(log.contains(&format!("reason=\"{reason}\"")), "no {reason:?} among the counters in the log");
    }
    Ok(())
}

/// Control packets that no client sends, as hexadecimal IP packets.
fn hostile() -> Vec<String> {
    let assign = |resource: &str, domain: &str, proxies: &[&str]| {
        json!({"resource": resource, "domain": domain, "proxy_ips": proxies}).to_string().into_bytes()
    };
    let own = names().id.to_string();
    let stranger = "00000000-0000-4000-8000-000000000000";
    let good = assign(&own, NAME, &["100.96.9.1"]);
    let label = "a".repeat(64);
    let long = format!("{}.lan.test", ["abcdefghi"; 25].join("."));
    let many: Vec<String> = (0..60).map(|n| format!("100.96.8.{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let mut bodies: Vec<(u8, Vec<u8>)> = vec![
        (0, b"{".to_vec()),
        (0, b"null".to_vec()),
        (0, b"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[".repeat(20)),
        (0, vec![0xff; 1200]),
        (0, vec![0; 300]),
        (0, br#"{"resource":7,"domain":[],"proxy_ips":{}}"#.to_vec()),
        (0, good[..good.len() / 2].to_vec()),
        (0, assign("../../etc/passwd", NAME, &["100.96.9.1"])),
        (0, assign(stranger, NAME, &["100.96.9.1"])),
        (0, assign(&own, "nul\0.lan.test", &["100.96.9.1"])),
        (0, assign(&own, "a..lan.test", &["100.96.9.1"])),
        (0, assign(&own, "", &["100.96.9.1"])),
        (0, assign(&own, &format!("{label}.lan.test"), &["100.96.9.1"])),
        (0, assign(&own, &long, &["100.96.9.1"])),
        // What is not for proxies: anybody's, the LAN's, a client's, the gateway's host.
        (
            0,
            assign(
                &own,
                NAME,
                &["8.8.8.8", "172.20.0.100", "100.64.0.1", "127.0.0.1", "::1", "fd00:db8:20::100"],
            ),
        ),
        (0, assign(&own, NAME, &[])),
        (0, assign(&own, NAME, &["100.96.9.1; drop table"])),
        (0, assign(&own, "elsewhere.example", &many)),
        (1, br#"{"resource":"","domain":"","status":"Active"}"#.to_vec()),
        (77, vec![1; 500]),
        (255, Vec::new()),
    ];
    bodies.push((0, Vec::new()));
    let mut packets: Vec<String> =
        bodies.iter().map(|(kind, body)| hex::encode(packet(*kind, body))).collect();
    // Lengths that lie, and one that ends before its event.
    let mut lying = packet(0, &good);
    lying[4..6].copy_from_slice(&u16::MAX.to_be_bytes());
    packets.push(hex::encode(&lying));
    lying[4..6].copy_from_slice(&[0, 0]);
    packets.push(hex::encode(&lying));
    packets.push(hex::encode(&packet(0, &[])[..44]));
    packets
}

/// packets.md section 6: IPv6 from `::` to `::`, next header 0xff, hop limit 0, a type and seven bytes of nothing.
fn packet(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; 48];
    packet[0] = 0x60;
    let length = u16::try_from(8 + body.len()).unwrap_or(u16::MAX);
    packet[4..6].copy_from_slice(&length.to_be_bytes());
    packet[6] = 0xff;
    packet[40] = kind;
    packet.extend_from_slice(body);
    packet
}

/// Memory of the process that is in use, in kB.
fn resident(process: &Process) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
