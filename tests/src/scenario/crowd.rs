//! Many clients at once, each a process with its own tunnel, all behind one address.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::{
    Context,
    client::Client,
    lab::{Lab, Options, lan4},
};
use crate::{
    net::topology::{LAN_HOST, Plan, direct},
    standins::{
        client::{Command, Config, Event},
        portal::Role,
    },
};

const SECOND: Duration = Duration::from_secs(1);

/// How many. Their sum of inner and outer state is small; a hundred processes start in a few seconds on two cores.
const CLIENTS: usize = 100;
/// The first one's UDP port, above those of the ordinary clients.
const FIRST_PORT: u16 = 53_000;
/// Echoes of each client.
const ECHOES: u64 = 3;

/// One host with all clients, which the runner starts itself.
pub(super) fn plan() -> Plan {
    Plan { clients: 1, ..direct::plan() }
}

/// All ask at the same moment; every one is connected, reaches the LAN, and hears goodbye at the end.
pub(super) fn all_at_once(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4()])?;
    let namespace = &cx.topology.clients[0].namespace;
    let url = lab.portal.url();
    let mut crowd = Vec::new();
    for index in 0..CLIENTS {
        let name = format!("crowd{index}");
        let config = Config {
            port: FIRST_PORT + u16::try_from(index)?,
            tun: format!("tun-{index}"),
            ..Config::new(&url, &lab.client_token, &name)
        };
        crowd.push(Client::start_with(&config, cx, namespace)?);
    }
    let mut addresses = Vec::new();
    for client in &mut crowd {
        client.wait_joined(30 * SECOND)?;
        client.wait_relay(30 * SECOND)?;
        addresses.push(client.address().context("a tunnel address")?);
    }
    lab.portal.wait_online(Role::Client, CLIENTS + 1, SECOND)?;

    let (asked, cpu) = (Instant::now(), lab.gateway.cpu_time()?);
    for client in &mut crowd {
        client.request(lan4().id)?;
    }
    for client in &mut crowd {
        client.wait_established(20 * SECOND)?;
    }
    println!(
        "      {CLIENTS} clients connected in {:.1} s, {:?} of the gateway's CPU",
        asked.elapsed().as_secs_f64(),
        lab.gateway.cpu_time()?.saturating_sub(cpu)
    );
    let before: Vec<u64> =
        crowd.iter_mut().map(|client| Ok(client.stats()?.rx_packets)).collect::<Result<_>>()?;
    for sequence in 0..ECHOES {
        for (client, source) in crowd.iter_mut().zip(&addresses) {
            let packet = echo_request(*source, LAN_HOST.0, u16::try_from(sequence)?);
            client.command(&Command::SendInner { hex: hex::encode(packet) })?;
        }
    }
    for (client, before) in crowd.iter_mut().zip(before) {
        crate::net::process::wait_for("the echoes of one of the crowd", 5 * SECOND, || {
            Ok((client.stats()?.rx_packets >= before + ECHOES).then_some(()))
        })?;
    }
    for client in &mut crowd {
        let lost = |event: &Event| matches!(event, Event::Closed { .. } | Event::Error { .. });
        ensure!(!client.events().iter().any(lost), "one of the crowd lost its connection");
    }
    lab.terminate(5 * SECOND)?;
    for client in crowd.iter_mut().chain(&mut lab.clients) {
        client.wait_goodbye(2 * SECOND)?;
    }
    Ok(())
}

/// An ICMP echo request in an IPv4 packet.
fn echo_request(source: Ipv4Addr, destination: Ipv4Addr, sequence: u16) -> Vec<u8> {
    let mut icmp = vec![8, 0, 0, 0, 0xc0, 0x0d];
    icmp.extend(sequence.to_be_bytes());
    icmp.extend([0x5a; 24]);
    let sum = checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 1, 0, 0];
    packet.extend(source.octets());
    packet.extend(destination.octets());
    let length = u16::try_from(packet.len() + icmp.len()).expect("52 bytes");
    packet[2..4].copy_from_slice(&length.to_be_bytes());
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(icmp);
    packet
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !u16::try_from(sum).expect("folded to 16 bits")
}

impl Client {
    /// The IPv4 tunnel address that the portal assigned.
    fn address(&mut self) -> Option<Ipv4Addr> {
        self.events().iter().rev().find_map(|event| match event {
            Event::Joined { ipv4: IpAddr::V4(address), .. } => Some(*address),
            _ => None,
        })
    }
}
