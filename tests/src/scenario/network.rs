//! Scenarios of the test network itself: without them a green scenario above could be a fault of its topology.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use super::Context;
use crate::net::{
    NetNs,
    process::run,
    services::{DNS_NAME, LanServers, Relay},
    topology::{LAN_HOST, Nat, Plan},
    wire::Link,
};

const SECOND: Duration = Duration::from_secs(1);

pub(super) fn reachability(cx: &mut Context) -> Result<()> {
    let topology = &cx.topology;
    let mut others = vec![topology.portal.v4.into(), topology.gateway.v4.into()];
    others.extend((0..topology.relays.len()).flat_map(|i| topology.relay_addresses(i)));
    others.extend(topology.gateway.v6.map(IpAddr::V6));
    for client in &topology.clients {
        for &address in &others {
            ping(&client.namespace, address).with_context(|| format!("from {}", client.namespace.name()))?;
        }
        ensure!(
            ping(&client.namespace, LAN_HOST.0.into()).is_err(),
            "a client reaches the LAN without a gateway"
        );
    }
    ping(&topology.gateway.namespace, LAN_HOST.0.into())?;
    ping(&topology.gateway.namespace, LAN_HOST.1.into())
}

pub(super) fn lan_servers(cx: &mut Context) -> Result<()> {
    let _servers = LanServers::start(&cx.topology.lan, &cx.logs, cx.big.clone())?;
    let gateway = &cx.topology.gateway.namespace;
    for host in [LAN_HOST.0.to_string(), format!("[{}]", LAN_HOST.1)] {
        let body = run(gateway, 5 * SECOND, &["curl", "-sS", &format!("http://{host}/")])?.success()?;
        ensure!(body == "hello from the LAN\n", "{body:?}");
    }
    let server = format!("@{}", LAN_HOST.0);
    let answer = run(gateway, 5 * SECOND, &["dig", "+short", "+time=2", &server, DNS_NAME])?.success()?;
    ensure!(answer.trim() == LAN_HOST.0.to_string(), "{answer:?}");
    Ok(())
}

pub(super) fn turn_allocation(cx: &mut Context) -> Result<()> {
    for (index, relay) in cx.topology.relays.iter().enumerate() {
        let addresses = cx.topology.relay_addresses(index);
        let _relay =
            Relay::start(&relay.namespace, &cx.logs, &format!("relay{index}"), &addresses, "a secret")?;
        for address in addresses {
            // Two allocations that send to each other through the relay (-y), ten messages each.
            let said = run(
                &cx.topology.gateway.namespace,
                10 * SECOND,
                &[
                    "turnutils_uclient",
                    "-y",
                    "-n",
                    "10",
                    "-W",
                    "a secret",
                    "-u",
                    "someone",
                    &address.to_string(),
                ],
            )?
            .success()?;
            ensure!(said.contains("Total lost packets 0 (0.000000%)"), "{said}");
        }
    }
    Ok(())
}

/// The source port that two different hosts see of one socket behind the gateway's NAT.
pub(super) fn nat_mapping(cx: &mut Context) -> Result<()> {
    let topology = &cx.topology;
    let listen = |namespace: &NetNs| namespace.run(|| Ok(UdpSocket::bind("0.0.0.0:5000")?));
    let seen_by = [listen(&topology.portal.namespace)?, listen(&topology.relays[0].namespace)?];
    let source = topology.gateway.namespace.run(|| Ok(UdpSocket::bind("0.0.0.0:52625")?))?;
    let mut ports = Vec::new();
    for (host, address) in seen_by.iter().zip([topology.portal.v4, topology.relays[0].v4]) {
        source.send_to(b"who am I", SocketAddr::new(address.into(), 5000))?;
        host.set_read_timeout(Some(SECOND))?;
        let (_, from) = host.recv_from(&mut [0; 16])?;
        ensure!(from.ip() == IpAddr::V4(topology.gateway.v4), "{from} is not the NAT's address");
        ports.push(from.port());
    }
    match topology.plan.gateway_nat {
        Nat::Symmetric => ensure!(ports[0] != ports[1], "both hosts saw {ports:?}"),
        _ => ensure!(ports == [52625, 52625], "the hosts saw {ports:?}"),
    }
    Ok(())
}

pub(super) fn blocked_udp(cx: &mut Context) -> Result<()> {
    let topology = &cx.topology;
    let gateway = topology.gateway.namespace.run(|| Ok(UdpSocket::bind("0.0.0.0:52625")?))?;
    let relay = topology.relays[1].namespace.run(|| Ok(UdpSocket::bind("0.0.0.0:52625")?))?;
    let client = topology.clients[0].namespace.run(|| Ok(UdpSocket::bind("0.0.0.0:52625")?))?;
    for (host, address, passes) in
        [(&gateway, topology.gateway.v4, false), (&relay, topology.relays[1].v4, true)]
    {
        client.send_to(b"hello", SocketAddr::new(address.into(), 52625))?;
        host.set_read_timeout(Some(SECOND / 5))?;
        ensure!(
            host.recv_from(&mut [0; 16]).is_ok() == passes,
            "UDP to {address}: expected passes = {passes}"
        );
    }
    topology.allow_direct()?;
    client.send_to(b"hello", SocketAddr::new(topology.gateway.v4.into(), 52625))?;
    gateway.recv_from(&mut [0; 16]).context("UDP after the block was lifted")?;
    Ok(())
}

pub(super) fn wire_plan() -> Plan {
    let link = Link { delay: Duration::from_millis(20), loss: 0.2, rate: Some(50_000_000), mtu: 1400 };
    Plan { link, ..Plan::new("direct, 20 ms and 20 % loss on each access link") }
}

pub(super) fn wire(cx: &mut Context) -> Result<()> {
    let target = cx.topology.gateway.v4.to_string();
    let said = run(
        &cx.topology.clients[0].namespace,
        15 * SECOND,
        &["ping", "-q", "-c", "100", "-i", "0.02", "-W", "1", &target],
    )?
    .stdout;
    let received: u32 = between(&said, "transmitted, ", " received").parse()?;
    let fastest: f64 = between(&said, "mdev = ", " ms").split('/').next().context("a minimum")?.parse()?;
    // Four crossings of 20 ms; 0.8^4 of the packets survive, give or take 4.5 standard deviations.
    ensure!((80.0..120.0).contains(&fastest), "the fastest round trip takes {fastest} ms");
    ensure!((20..64).contains(&received), "{received} of 100 came back");
    Ok(())
}

fn ping(from: &NetNs, to: IpAddr) -> Result<()> {
    let said = run(from, 3 * SECOND, &["ping", "-n", "-c", "1", "-W", "1", &to.to_string()])?;
    ensure!(said.status.success(), "no answer from {to}: {} {}", said.stdout, said.stderr);
    Ok(())
}

/// What stands between two texts; empty if they do not occur.
fn between<'a>(text: &'a str, before: &str, after: &str) -> &'a str {
    text.split_once(before).and_then(|(_, rest)| rest.split_once(after)).map_or("", |(found, _)| found)
}
