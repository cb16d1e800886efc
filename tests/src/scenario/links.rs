//! What links do to packets, and what must come through a tunnel unchanged: loss, delay, order, refusals, congestion marks.

use std::{net::IpAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};

use super::{
    Context,
    lab::{Lab, Options, curl, http_both, lan4, lan6},
    transfers::iperf3,
};
use crate::{
    net::{
        NetNs,
        process::{Process, Spawn, run, wait_for},
        topology::{LAN_HOST, Plan},
        wire::Link,
    },
    standins::client::Event,
};

const SECOND: Duration = Duration::from_secs(1);

/// 10 % on each of two access links: a fifth is lost in each direction.
pub(super) fn fifth_lost_plan() -> Plan {
    let link = Link { delay: Duration::from_millis(2), loss: 0.1, ..Link::default() };
    Plan { link, ..Plan::new("direct, 10 % loss on each access link") }
}

/// A fifth of all packets is lost: connecting and a TCP transfer take longer, and work.
pub(super) fn fifth_lost(cx: &mut Context) -> Result<()> {
    let patience = 25 * SECOND;
    let mut lab = Lab::start(cx, &Options { patience, ..Options::default() })?;
    connect_in_spite(&mut lab, patience)?;
    let client = &cx.topology.clients[0].namespace;
    let file = cx.logs.file("part");
    let path = file.display().to_string();
    let length = 300_000;
    let url = format!("http://{}/big", LAN_HOST.0);
    let range = format!("0-{}", length - 1);
    // One SYN in three gets no answer, and the pauses between them double: six in a row are 63 s of nothing. A new
    // connection asks anew.
    let patient = ["curl", "-sS", "-f", "--connect-timeout", "4", "--retry", "10", "--retry-all-errors"];
    let command = [&patient[..], &["--retry-delay", "1", "-r", &range, "-o", &path, &url]].concat();
    run(client, 90 * SECOND, &command)?.success()?;
    let (came, sent) = (std::fs::read(&file)?, std::fs::read(&cx.big.path)?);
    ensure!(came == sent[..length], "{} bytes came, not the {length} that were sent", came.len());
    lab.finish()
}

/// Four initiations are what a client tries on one connection. A third of such exchanges fails here, so one connection in 70
/// does, and the client's next packet asks for another one.
fn connect_in_spite(lab: &mut Lab, patience: Duration) -> Result<()> {
    const CONNECTIONS: usize = 3;
    for nth in 1.. {
        let Err(error) = lab.connect_within(0, &[lan4()], patience) else { break };
        let gave_up = lab.clients[0].events().iter().any(|event| matches!(event, Event::Closed { .. }));
        if !gave_up || nth == CONNECTIONS {
            return Err(error);
        }
        println!("      connection {nth} was lost: {error:#}");
        lab.clients[0].forget_events();
    }
    Ok(())
}

/// 50 ms from end to end and back, 100 Mbit/s.
pub(super) fn far_plan() -> Plan {
    let link =
        Link { delay: Duration::from_micros(12_500), loss: 0.0, rate: Some(100_000_000), ..Link::default() };
    Plan { link, ..Plan::new("direct, 50 ms round trip at 100 Mbit/s") }
}

/// Of the throughput without a tunnel. Headers alone cost 5 %: 1228 bytes of TCP in 1354 on the wire, against 1448 in 1514.
const NO_LESS: f64 = 0.9;

/// Over a long path the tunnel carries about what the path without it does, and keeps packets in order.
pub(super) fn far(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    let command = ["iperf3", "-s", "-p", "5201"].map(str::to_owned).to_vec();
    let what = Spawn { name: "iperf3-plain", command, ..Spawn::default() };
    let _plain_server = Process::spawn(&cx.topology.gateway.namespace, &cx.logs, &what)?;
    let plain_server = IpAddr::V4(cx.topology.gateway.v4);
    wait_for("the plain iperf3", 3 * SECOND, || {
        Ok(iperf3(client, plain_server, &["-n", "1000"]).is_ok().then_some(()))
    })?;
    for direction in ["", "-R"] {
        // A busy machine can spoil a round; it does not spoil the best of three by a fault of the gateway's.
        let mut best: f64 = 0.0;
        for _ in 0..3 {
            let plain = mbit(client, plain_server, direction)?;
            let tunnel = mbit(client, LAN_HOST.0.into(), direction)?;
            println!("      {direction:>2} plain {plain:.1} Mbit/s, tunnel {tunnel:.1} Mbit/s");
            best = best.max(tunnel / plain);
            if best >= NO_LESS {
                break;
            }
        }
        ensure!(
            best >= NO_LESS,
            "TCP {direction}: {:.1} % of what the path carries without it",
            100.0 * best
        );
        let arguments = ["-u", "-b", "40M", "-l", "1200", "-t", "2", direction];
        let report = iperf3(client, LAN_HOST.1.into(), &arguments)?;
        let stream = &report["end"]["streams"][0]["udp"];
        let (late, packets) = (stream["out_of_order"].as_u64(), stream["packets"].as_u64());
        ensure!(packets.is_some_and(|packets| packets > 5_000), "iperf3 sent {packets:?} packets");
        ensure!(late == Some(0), "UDP {direction}: {late:?} of {packets:?} packets overtook others");
    }
    lab.finish()
}

fn mbit(client: &NetNs, server: IpAddr, direction: &str) -> Result<f64> {
    let report = iperf3(client, server, &["-t", "4", "-O", "1", direction])?;
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(bits.context("iperf3's sum")? / 1e6)
}

/// What the LAN host refuses is refused at the client, at once: TCP by RST, UDP by ICMP.
pub(super) fn refusals(cx: &mut Context) -> Result<()> {
    /// curl(1): failed to connect to host.
    const REFUSED: i32 = 7;
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    http_both(client)?;
    for host in [LAN_HOST.0.to_string(), format!("[{}]", LAN_HOST.1)] {
        let said = curl(client, &[&format!("http://{host}:9/")])?;
        ensure!(said.status.code() == Some(REFUSED), "{host}: {} {}", said.status, said.stderr);
        ensure!(said.took < SECOND, "the refusal of {host} took {:?}", said.took);
    }
    for address in [LAN_HOST.0.to_string(), LAN_HOST.1.to_string()] {
        let server = format!("@{address}");
        let said =
            run(client, 8 * SECOND, &["dig", "+time=3", "+tries=1", "-p", "9", &server, "example.test"])?;
        ensure!(!said.status.success(), "somebody answers on UDP port 9 of {address}");
        ensure!(said.stdout.contains("refused"), "{address}: {}", said.stdout);
        ensure!(said.took < 2 * SECOND, "the refusal of UDP to {address} took {:?}", said.took);
    }
    lab.finish()
}

/// Congestion marks cross the tunnel both ways (packets.md section 8): the outer packet carries the inner codepoint, and
/// what a router on the way marks arrives inside.
pub(super) fn congestion_marks(cx: &mut Context) -> Result<()> {
    const ECHOES: u64 = 10;
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    let (router, lan) = (&cx.topology.router, &cx.topology.lan);
    http_both(client)?;
    router.nft(
        r#"table inet watch {
          counter to_client_ect0 {}
          counter to_client_ect1 {}
          counter to_client_ce {}
          counter marked {}
          chain marking { }
          chain forward {
            type filter hook forward priority filter;
            iifname "gw" oifname "cl*" meta l4proto udp ip ecn ect0 counter name to_client_ect0
            iifname "gw" oifname "cl*" meta l4proto udp ip ecn ect1 counter name to_client_ect1
            iifname "gw" oifname "cl*" meta l4proto udp ip ecn ce counter name to_client_ce
            iifname "gw" oifname "cl*" meta l4proto udp ip6 ecn ect0 counter name to_client_ect0
            iifname "gw" oifname "cl*" meta l4proto udp ip6 ecn ect1 counter name to_client_ect1
            iifname "gw" oifname "cl*" meta l4proto udp ip6 ecn ce counter name to_client_ce
            jump marking
          }
        }"#,
    )?;
    lan.nft(
        r#"table inet watch {
          counter ce {}
          counter not_ect {}
          chain input {
            type filter hook input priority filter;
            icmp type echo-request ip ecn ce counter name ce
            icmpv6 type echo-request ip6 ecn ce counter name ce
            icmp type echo-request ip ecn not-ect counter name not_ect
            icmpv6 type echo-request ip6 ecn not-ect counter name not_ect
          }
        }"#,
    )?;
    let echoes = |tos: &str| -> Result<()> {
        for address in [IpAddr::V4(LAN_HOST.0), IpAddr::V6(LAN_HOST.1)] {
            let (count, address) = (ECHOES.to_string(), address.to_string());
            let command = ["ping", "-n", "-c", &count, "-i", "0.05", "-W", "2", "-Q", tos, &address];
            run(client, 10 * SECOND, &command)?.success().with_context(|| format!("with TOS {tos}"))?;
        }
        Ok(())
    };
    // Nobody marks: the outer packet shows what the inner one says. The answer to an echo has its request's TOS.
    for (tos, counter_name) in [("2", "to_client_ect0"), ("1", "to_client_ect1"), ("3", "to_client_ce")] {
        let before = counter(router, "inet", counter_name)?;
        echoes(tos)?;
        let seen = counter(router, "inet", counter_name)? - before;
        ensure!(seen >= 2 * ECHOES, "of {} packets with TOS {tos}, {seen} outer ones said so", 2 * ECHOES);
    }
    let expected = 2 * ECHOES;
    let (before, before_client) = (counter(lan, "inet", "ce")?, lab.clients[0].stats()?.rx_ce);
    ensure!(before == expected, "{before} CE requests reached the LAN, {expected} were sent");
    // Marked on the way to the gateway.
    let mark = |from: &str, to: &str| {
        router.nft(&format!(
            r#"flush chain inet watch marking
            add rule inet watch marking iifname "{from}" oifname "{to}" meta l4proto udp ip ecn {{ ect0, ect1 }} ip ecn set ce counter name marked
            add rule inet watch marking iifname "{from}" oifname "{to}" meta l4proto udp ip6 ecn {{ ect0, ect1 }} ip6 ecn set ce counter name marked"#
        ))
    };
    mark("cl*", "gw").map_err(|error| super::Skip(format!("nft cannot set ECN here: {error:#}")))?;
    echoes("2")?;
    let seen = counter(lan, "inet", "ce")? - before;
    ensure!(counter(router, "inet", "marked")? >= expected, "the router marked nothing");
    ensure!(seen == expected, "{seen} of {expected} marks of the router arrived inside, at the LAN host");
    // Marked on the way to the client, which is the stand-in's own doing; the gateway must have sent it markable.
    let at_client = lab.clients[0].stats()?.rx_ce;
    mark("gw", "cl*")?;
    echoes("1")?;
    let seen = lab.clients[0].stats()?.rx_ce - at_client;
    ensure!(seen >= expected, "{seen} of {expected} marks arrived at the client");
    ensure!(at_client >= before_client, "the client's counter went backwards");
    // What is not capable is never marked inside, whatever happens outside.
    let marks = counter(lan, "inet", "ce")?;
    router.nft(
        r#"flush chain inet watch marking
        add rule inet watch marking iifname "cl*" oifname "gw" meta l4proto udp ip ecn set ce
        add rule inet watch marking iifname "cl*" oifname "gw" meta l4proto udp ip6 ecn set ce"#,
    )?;
    let plain = counter(lan, "inet", "not_ect")?;
    echoes("0")?;
    let arrived = counter(lan, "inet", "not_ect")? - plain;
    ensure!(arrived == expected, "{arrived} of {expected} packets that cannot be marked arrived unmarked");
    ensure!(counter(lan, "inet", "ce")? == marks, "a packet that is not ECN-capable was marked");
    lab.finish()
}

/// Packets that the named nftables counter of table `watch` saw.
fn counter(namespace: &NetNs, family: &str, name: &str) -> Result<u64> {
    let said = run(namespace, 2 * SECOND, &["nft", "list", "counter", family, "watch", name])?.success()?;
    let packets = said.split_once("packets ").and_then(|(_, rest)| rest.split(' ').next());
    packets.context("nft's counter")?.parse().with_context(|| format!("nft said {said}"))
}
