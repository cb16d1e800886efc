//! The same script with the fast path off and on: what comes out is the same, packet by packet.
//!
//! ```text
//!   client's TUN <- packets made by hand          LAN host: echoes UDP, answers ICMP and TCP
//!        |  ^                                          |  ^
//!        v  | tap: what comes back                     v  | tap: what arrives
//!      gateway, FIREZONE_FAST_PATH=off, then native ----+--+
//!        ^
//!        | junk from a stranger and from the relay
//! ```
//!
//! Ciphertext cannot be compared: keys and times differ. What is decrypted can, and what is refused, and why.

mod packet;
mod tap;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

pub(super) use self::packet::Head;
use self::{
    packet::{ACK, FIN, Flow, ICMP, ICMPV6, SYN, TCP, UDP, seal},
    tap::Tap,
};
use super::{
    Context,
    client::INTERFACE,
    dns::{Nameserver, ResolvConf},
    fast_path::{self, Proof},
    lab::{Lab, Options, host, host_2, lan6},
    metrics::{drops, need_parser},
    names::{PROXIES, assign, names},
    trouble::{PORT, raw_udp, send_raw_udp},
};
use crate::{
    net::{
        NetNs,
        process::run,
        topology::{LAN_HOST, LAN_HOST_2, PORTAL},
    },
    standins::{client::Event, portal::Filter},
};

const SECOND: Duration = Duration::from_secs(1);
/// Where the LAN host echoes UDP.
const ECHO: u16 = 7000;
/// Where the LAN host takes TCP segments and datagrams, does not look at them and says nothing.
const SINK: u16 = 7001;
/// Datagrams of each flow that come at once, more or less.
const BURST: u16 = 250;
/// Of each kind of junk.
const JUNK: u64 = 20;
/// Of each kind of packet that is refused.
const REFUSED: u64 = 2;

/// What came out.
struct Outcome {
    /// On the LAN, by flow.
    outbound: BTreeMap<Flow, Vec<String>>,
    /// At the client, by flow.
    inbound: BTreeMap<Flow, Vec<String>>,
    /// By reason.
    drops: BTreeMap<String, u64>,
}

/// Off, then on.
pub(super) fn fast_vs_slow(cx: &mut Context) -> Result<()> {
    need_parser(cx)?;
    fast_path::prepare(&cx.topology)?;
    // Whole packets on the LAN too, and nothing in the tunnel but the script's.
    let whole =
        ["ethtool", "-K", "eth1", "gro", "off", "gso", "off", "tso", "off", "tx-udp-segmentation", "off"];
    run(&cx.topology.gateway.namespace, 5 * SECOND, &whole)?.success()?;
    cx.topology.clients[0].namespace.nft(&format!(
        "table inet quiet {{
 chain output {{
 type filter hook output priority filter
 oifname {INTERFACE} drop
 }}
}}"
    ))?;
    cx.topology.lan.nft(&format!(
        "table inet sink {{
 chain input {{
 type filter hook input priority filter
 th dport {SINK} drop
 }}
}}"
    ))?;
    let mut outcomes = Vec::new();
    for mode in ["off", "native"] {
        mode.clone_into(&mut cx.variation.fast_path);
        outcomes.push(play(cx).with_context(|| format!("with the fast path {mode}"))?);
        let proof = Proof::of(&cx.topology).redirected();
        ensure!(proof.is_err(), "the program is still there after its gateway");
    }
    let [slow, fast] = <[Outcome; 2]>::try_from(outcomes).ok().context("two outcomes")?;
    same("outbound", &slow.outbound, &fast.outbound)?;
    same("inbound", &slow.inbound, &fast.inbound)?;
    ensure!(slow.drops == fast.drops, "drops differ: off {:?}, native {:?}", slow.drops, fast.drops);
    let packets = |flows: &BTreeMap<Flow, Vec<String>>| flows.values().map(Vec::len).sum::<usize>();
    println!(
        "      the same: {} packets of {} flows outbound, {} of {} inbound, drops {:?}",
        packets(&fast.outbound),
        fast.outbound.len(),
        packets(&fast.inbound),
        fast.inbound.len(),
        fast.drops
    );
    Ok(())
}

/// The first difference.
fn same(what: &str, slow: &BTreeMap<Flow, Vec<String>>, fast: &BTreeMap<Flow, Vec<String>>) -> Result<()> {
    for flow in slow.keys().chain(fast.keys()) {
        let (none, none_either) = (Vec::new(), Vec::new());
        let (slow, fast) = (slow.get(flow).unwrap_or(&none), fast.get(flow).unwrap_or(&none_either));
        for index in 0..slow.len().max(fast.len()) {
            let (slow, fast) = (slow.get(index), fast.get(index));
            // Headers are in front.
            let begin = |text: Option<&String>| text.map(|text| text.chars().take(120).collect::<String>());
            ensure!(
                slow == fast,
                "{what}, {flow:?}, packet {index}: off {:?}, native {:?}",
                begin(slow),
                begin(fast)
            );
        }
    }
    Ok(())
}

/// Who sends.
struct Client {
    v4: IpAddr,
    v6: IpAddr,
    tap: Tap,
    next: u16,
}

impl Client {
    /// A head with the next identification.
    fn head(&mut self, to: IpAddr) -> Head {
        self.next += 1;
        Head::new(if to.is_ipv4() { self.v4 } else { self.v6 }, to, self.next)
    }
}

fn play(cx: &Context) -> Result<Outcome> {
    let (v4, v6) = LAN_HOST;
    let _nameserver = Nameserver::start_with(cx, "names", PORTAL, "-", &[format!("web.lan.test,{v4},{v6}")])?;
    let launch = ResolvConf::new(cx, &[PORTAL])?.launch(cx)?;
    let web = host_2().with_filters([Filter::tcp(80, 80)]);
    let resources = vec![host(), lan6(), web, names()];
    let mut lab = Lab::start(cx, &Options { resources: resources.clone(), launch, ..Options::default() })?;
    lab.connect(0, &resources)?;
    let addresses = lab.clients[0].events().iter().find_map(|event| match event {
        Event::Joined { ipv4, ipv6 } => Some((*ipv4, *ipv6)),
        _ => None,
    });
    let (v4, v6) = addresses.context("the client's addresses")?;
    let status = assign(&mut lab, &names(), "web.lan.test")?;
    ensure!(status == "Active", "web.lan.test is {status}");
    let _echo = Echo::start(&cx.topology.lan)?;
    let lan = Tap::start(&cx.topology.lan, &cx.logs, "eth0", true)?;
    let tap = Tap::start(&cx.topology.clients[0].namespace, &cx.logs, INTERFACE, false)?;
    let mut client = Client { v4, v6, tap, next: 0 };
    let before = drops(cx)?;

    let reached =
        [LAN_HOST.0.into(), LAN_HOST.1.into(), PROXIES[0].parse::<IpAddr>()?, PROXIES[2].parse::<IpAddr>()?];
    one_by_one(&mut client, &lan, &reached)?;
    burst(&mut client, &lan, &reached)?;
    let own = lab.portal.wait_for(SECOND, |entry| entry.to_gateway("init"))?;
    let own: IpAddr = own.payload()["interface"]["ipv4"].as_str().context("an address in init")?.parse()?;
    refused(&mut client, own)?;
    junk(cx)?;
    lab.portal.reject_access(lab.client_id(0)?, host().id)?;
    revoked(&mut client, &lan, &reached)?;
    // Whatever else is still to come: there must be nothing.
    std::thread::sleep(SECOND / 5);
    let mut dropped = drops(cx)?;
    for (reason, packets) in before {
        *dropped.entry(reason).or_default() -= packets;
    }
    dropped.retain(|_, packets| *packets > 0);
    // The gateway's kernel solicits routers through the TUN device when it likes.
    dropped.remove("not_a_peer");
    check_reasons(&dropped)?;
    let outcome = Outcome { outbound: by_flow(&lan)?, inbound: by_flow(&client.tap)?, drops: dropped };
    lab.finish()?;
    Ok(outcome)
}

fn by_flow(tap: &Tap) -> Result<BTreeMap<Flow, Vec<String>>> {
    let mut flows: BTreeMap<Flow, Vec<String>> = BTreeMap::new();
    for packet in tap.all()? {
        flows.entry(packet.flow).or_default().push(packet.text);
    }
    Ok(flows)
}

/// Each packet is answered before the next is sent: UDP, echo, a TCP connection that is refused, one that is not, every
/// class of service.
fn one_by_one(client: &mut Client, lan: &Tap, reached: &[IpAddr]) -> Result<()> {
    for (index, &to) in (0..).zip(reached) {
        let back = |flow: &Flow| flow.from == to;
        let ports = [20_000 + index, ECHO];
        for round in 1..=8_u16 {
            let mut head = client.head(to);
            head.tos = u8::try_from(round * 31 % 256)?;
            head.fragmentable = round % 2 == 1;
            head.ttl = u8::try_from(20 + round)?;
            let payload = vec![u8::try_from(round)?; usize::from(round) * 150 - 149];
            client.tap.send(&head.udp(ports[0], ports[1], &payload))?;
            client
                .tap
                .wait("a UDP echo", round.into(), 2 * SECOND, |flow| back(flow) && flow.protocol == UDP)?;
            let packet = client.head(to).echo(77 + index, round, &payload);
            client.tap.send(&packet)?;
            client.tap.wait("an echo", round.into(), 2 * SECOND, |flow| {
                back(flow) && matches!(flow.protocol, ICMP | ICMPV6)
            })?;
        }
        let packet = client.head(to).tcp([30_000 + index, 9], 1000, SYN, b"");
        client.tap.send(&packet)?;
        client.tap.wait("a reset", 1, 2 * SECOND, |flow| back(flow) && flow.protocol == TCP)?;
    }
    for (index, &to) in (0..).zip(reached) {
        let ports = [31_000 + index, SINK];
        let mut sequence = 5000;
        for (flags, length) in [(SYN, 0), (ACK, 1), (ACK, 1200), (ACK, 0), (ACK, 700), (FIN | ACK, 0)] {
            let packet = client.head(to).tcp(ports, sequence, flags, &vec![flags; length]);
            client.tap.send(&packet)?;
            sequence += u32::try_from(length)? + u32::from(flags & (SYN | FIN) != 0);
        }
    }
    lan.wait("TCP segments", 6 * reached.len(), 2 * SECOND, |flow| {
        flow.protocol == TCP && flow.about[1] == SINK
    })
}

/// All flows at once, each packet numbered; a wrong checksum stays wrong, and none stays none.
fn burst(client: &mut Client, lan: &Tap, reached: &[IpAddr]) -> Result<()> {
    for number in 0..BURST {
        for (index, &to) in (0..).zip(reached) {
            let payload = [&number.to_be_bytes()[..], &[0x5a; 600]].concat();
            let packet = client.head(to).udp(21_000 + index, ECHO, &payload);
            client.tap.send(&packet)?;
        }
        // What relay and LAN can take: nothing may be lost.
        if number % 2 == 1 {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    let (expect, ports) = (usize::from(BURST) * reached.len(), 21_000..22_000);
    lan.wait("the burst", expect, 10 * SECOND, |flow| ports.contains(&flow.about[0]))?;
    client.tap.wait("the burst's echoes", expect, 10 * SECOND, |flow| ports.contains(&flow.about[1]))?;

    for (index, &to) in (0..).zip(reached) {
        let mut wrong = client.head(to).udp(22_000 + index, SINK, b"wrong");
        let at = wrong.len() - 1;
        wrong[at] ^= 0x10;
        client.tap.send(&wrong)?;
    }
    let mut none = client.head(LAN_HOST.0.into()).udp(23_000, ECHO, b"none");
    none[26..28].fill(0);
    client.tap.send(&none)?;
    lan.wait("wrong checksums", reached.len() + 1, 2 * SECOND, |flow| {
        (22_000..24_000).contains(&flow.about[0])
    })
}

/// What each rule refuses, and what the client is told about it.
fn refused(client: &mut Client, own: IpAddr) -> Result<()> {
    let outside: Ipv4Addr = "172.20.1.9".parse()?;
    let mut from_others = |to: IpAddr, from: &str| -> Result<Vec<u8>> {
        Ok(Head { from: from.parse()?, ..client.head(to) }.udp(24_000, ECHO, b"foreign"))
    };
    let foreign = [
        from_others(LAN_HOST.0.into(), "100.64.9.9")?,
        from_others(LAN_HOST.1.into(), "fd00:2021:1111::9:9")?,
    ];
    let mut udp =
        |to: &str| -> Result<Vec<u8>> { Ok(client.head(to.parse()?).udp(24_001, ECHO, b"refused")) };
    let mut packets = foreign.to_vec();
    packets.extend([
        udp(&outside.to_string())?,
        udp("fd00:db8:21::1")?,
        udp(&LAN_HOST_2.0.to_string())?,
        udp("100.64.0.99")?,
        udp(&own.to_string())?,
        udp("100.96.9.9")?,
        udp("224.0.0.251")?,
    ]);
    // More fragments follow.
    let mut fragment = udp(&LAN_HOST.0.to_string())?;
    fragment[6] = 0x20;
    seal(&mut fragment[..20]);
    // A total length beyond the packet's end.
    let mut longer = udp(&LAN_HOST.0.to_string())?;
    longer[3] += 40;
    seal(&mut longer[..20]);
    // Loose source route (RFC 791 section 3.1): 131, length 7, pointer 4, one address; then the end of the list.
    let mut routed = udp(&LAN_HOST.0.to_string())?;
    routed.splice(20..20, [131, 7, 4, 172, 20, 0, 1, 0]);
    routed[0] = 0x47;
    routed[3] += 8;
    seal(&mut routed[..28]);
    packets.extend([fragment, longer, routed]);
    // "Host unreachable", about an answer of the LAN's.
    let answer = Head::new(LAN_HOST.0.into(), client.v4, 1).udp(ECHO, 24_002, b"answer");
    packets.push(client.head(LAN_HOST.0.into()).icmp(3, 1, &[&[0; 4], &*answer].concat()));
    for packet in packets {
        for _ in 0..REFUSED {
            client.tap.send(&packet)?;
            // Each answer is told apart from the next, and no budget is used up.
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    client.tap.wait("denials", 10, 2 * SECOND, |flow| {
        matches!((flow.protocol, flow.about[0]), (ICMP, 3) | (ICMPV6, 1))
    })
}

/// Datagrams that can be nothing, some of each kind, from a stranger and in the name of the relay.
fn junk(cx: &Context) -> Result<()> {
    let topology = &cx.topology;
    let gateway = SocketAddr::new(topology.gateway.v4.into(), PORT);
    let stranger = topology.portal.namespace.run(|| Ok(UdpSocket::bind("0.0.0.0:0")?))?;
    let relay = raw_udp(&topology.relays[0].namespace)?;
    let stun = |kind: u16, attributes: &[u8]| {
        let length = u16::try_from(attributes.len()).expect("a few attributes");
        [&kind.to_be_bytes()[..], &length.to_be_bytes(), &[0x21, 0x12, 0xa4, 0x42], &[7; 12], attributes]
            .concat()
    };
    let wireguard = |kind: u8, length: usize, receiver: usize| {
        let mut bytes = vec![0x33; length];
        bytes[..4].copy_from_slice(&[kind, 0, 0, 0]);
        bytes[receiver..receiver + 4].copy_from_slice(&[0x01, 0xfe, 0xff, 0xff]);
        bytes
    };
    let username = [&[0, 6, 0, 8][..], b"nobo:ody"].concat();
    let from_stranger = [
        vec![],
        vec![0xff; 40],
        wireguard(4, 20, 4),
        wireguard(4, 64, 4),
        wireguard(2, 92, 8),
        wireguard(3, 64, 4),
        [&[0x40, 0x01, 0, 32][..], &wireguard(4, 32, 4)].concat(),
        [&[0x40, 0x01, 0, 99][..], &[0; 32]].concat(),
        stun(0x0001, &username),
        stun(0x0001, &[]),
        stun(0x0011, &[]),
    ];
    let from_relay = [[&[0x4f, 0xff, 0, 32][..], &wireguard(4, 32, 4)].concat()];
    for _ in 0..JUNK {
        for datagram in &from_stranger {
            stranger.send_to(datagram, gateway)?;
        }
        for datagram in &from_relay {
            send_raw_udp(&relay, 3478, gateway, datagram)?;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// After the revocation of one address the others are reached as before.
fn revoked(client: &mut Client, lan: &Tap, reached: &[IpAddr]) -> Result<()> {
    // The client is told by nobody but the gateway's refusals.
    std::thread::sleep(SECOND / 2);
    for (index, &to) in (0..).zip(reached) {
        for number in 0..4 {
            let packet = client.head(to).udp(25_000 + index, ECHO, &[number; 10]);
            client.tap.send(&packet)?;
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    let rest = reached.len() - 1;
    lan.wait("the other addresses'", 4 * rest, 2 * SECOND, |flow| (25_000..26_000).contains(&flow.about[0]))?;
    client.tap.wait("their echoes", 4 * rest, 2 * SECOND, |flow| (25_000..26_000).contains(&flow.about[1]))
}

/// The script reaches the rules that it is meant to reach, as often as it is meant to.
fn check_reasons(dropped: &BTreeMap<String, u64>) -> Result<()> {
    let expect = [
        ("empty_datagram", JUNK),
        ("unknown_payload", JUNK),
        ("malformed_wireguard", JUNK),
        ("unknown_session", 3 * JUNK),
        ("unknown_relay", JUNK),
        ("malformed_channel_data", JUNK),
        ("unmatched_stun", 3 * JUNK),
        ("unbound_channel", JUNK),
        ("foreign_source", 2 * REFUSED),
        // Outside, of either family, by a filter, a proxy address that is nobody's; and four after the revocation.
        ("not_allowed", 4 * REFUSED + 4),
        ("tunnel_destination", REFUSED),
        ("own_address_port", REFUSED),
        ("multicast", REFUSED),
        ("inner_fragment", REFUSED),
        ("malformed_inner", REFUSED),
        ("source_routed", REFUSED),
        ("outbound_icmp_error", REFUSED),
    ];
    let expect: BTreeMap<String, u64> =
        expect.into_iter().map(|(reason, n)| (reason.to_owned(), n)).collect();
    ensure!(*dropped == expect, "dropped: {dropped:?}, but what was sent for it: {expect:?}");
    Ok(())
}

/// Returns every datagram to its sender.
struct Echo(Arc<AtomicBool>);

impl Echo {
    fn start(namespace: &NetNs) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        for address in ["0.0.0.0", "::"] {
            let socket = namespace.run(|| {
                let domain = if address == "::" { socket2::Domain::IPV6 } else { socket2::Domain::IPV4 };
                let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, None)?;
                if address == "::" {
                    socket.set_only_v6(true)?;
                }
                socket.set_recv_buffer_size(8 << 20)?;
                socket.bind(&SocketAddr::new(address.parse()?, ECHO).into())?;
                Ok(UdpSocket::from(socket))
            })?;
            socket.set_read_timeout(Some(SECOND / 10))?;
            let stop = Arc::clone(&stop);
            std::thread::Builder::new().name("echo".to_owned()).spawn(move || {
                let mut bytes = [0; 2048];
                while !stop.load(Ordering::Relaxed) {
                    if let Ok((length, from)) = socket.recv_from(&mut bytes) {
                        // Who does not hear it says so.
                        let _sent = socket.send_to(&bytes[..length], from);
                    }
                }
            })?;
        }
        Ok(Self(stop))
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
