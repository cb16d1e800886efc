//! The translation behind DNS resources, where it is more than addresses: hops and path MTU, filters and revocation, ends of
//! connections, restarts on either side, a nameserver that falls silent.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use socket2::{Domain, Protocol, Socket, Type};

use super::{
    Context,
    client::Client,
    dns::{Nameserver, OTHER, ResolvConf},
    lab::{Download, Lab, Options, curl, is_prohibited, lan6, launch, ping, ping_raw},
    names::{PROXIES, assign, fetch, names, start},
    relays::reconnect,
    resources::{active, connect_from, part},
};
use crate::{
    net::{
        NetNs,
        netns::veth,
        process::{run, wait_for},
        topology::{LAN_HOST, LAN_HOST_2, PORTAL},
    },
    standins::{
        client::{Event, Generation},
        portal::{Filter, Role},
    },
};

const SECOND: Duration = Duration::from_secs(1);
const NAME: &str = "web.lan.test";

/// A host two hops behind the gateway, by a link that carries 1000 bytes of IPv4.
///
/// ```text
///   gateway 172.20.0.1 ---- 172.20.0.100 LAN host 172.21.0.1 --(1000)-- 172.21.0.100 far
/// ```
const FAR: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(172, 21, 0, 100), Ipv6Addr::new(0xfd00, 0xdb8, 0x21, 0, 0, 0, 0, 0x100));

/// traceroute counts the gateway, the router and the host, each as the proxy address, the only one of them that the client knows
/// (packets.md section 5.5); what is too long for a link in between is told to the client about that address, and TCP gets
/// through in both directions. Over IPv6 too.
pub(super) fn hops_and_mtu(cx: &mut Context) -> Result<()> {
    const ECHOED: usize = 1_000_000;
    let far = far_host(cx)?;
    let _nameserver = nameserver(cx, "names", FAR)?;
    let mut lab = start(cx, vec![names()], &[names()])?;
    active(&mut lab, NAME, &PROXIES)?;
    let client = &cx.topology.clients[0].namespace;
    let (v4, v6) = (PROXIES[0], PROXIES[2]);
    for (family, proxy) in [("-4", v4), ("-6", v6)] {
        // UDP to a port where nobody listens ends with "port unreachable", an echo with its reply, a SYN with a reset.
        for method in ["-U", "-I", "-T"] {
            let command = ["traceroute", "-n", family, method, "-q", "2", "-w", "2", "-m", "6", proxy];
            let said = run(client, 20 * SECOND, &command)?.success()?;
            let hops: Vec<Option<&str>> =
                said.lines().skip(1).map(|line| line.split_whitespace().nth(1)).collect();
            ensure!(hops == [Some(proxy); 3], "traceroute {family} {method} to {proxy} said {said}");
        }
    }

    let said = ping_raw(client, &["-M", "do", "-s", "1200", v4])?.stdout;
    ensure!(said.contains("mtu = 1000"), "an echo of 1228 bytes to {v4}: {said}");
    // The client's kernel took it for the proxy address.
    let route = run(client, 2 * SECOND, &["ip", "route", "get", v4])?.success()?;
    ensure!(route.contains("mtu 1000"), "{route}");
    // A fresh proxy, about which the client knows nothing yet: TCP itself must find out.
    for proxy in [PROXIES[1], PROXIES[2]] {
        let proxy = SocketAddr::new(proxy.parse()?, 7);
        echo_server(&far, proxy.ip())?;
        let sent: Vec<u8> = std::fs::read(&cx.big.path)?[..ECHOED].to_vec();
        let came = client.run(|| echo(proxy, &sent))?;
        ensure!(came == sent, "{proxy}: what came back is not what was sent");
    }
    too_big(client, &far, v6.parse()?)?;
    ping(client, v6.parse()?)?;
    lab.finish()
}

/// "Packet too big" over IPv6 reaches who sent the packet, about the proxy address. No router of ours would say so, because a
/// tunnel's packets are no longer than what every link carries (RFC 8200 section 5): the far host does, quoting what it got.
fn too_big(client: &NetNs, far: &NetNs, proxy: Ipv6Addr) -> Result<()> {
    const PAYLOAD: [u8; 1000] = [0x5a; 1000];
    const IP: usize = 40;
    const UDP: usize = 8;
    let server = far.run(|| Ok(UdpSocket::bind((FAR.1, 0))?))?;
    server.set_read_timeout(Some(5 * SECOND))?;
    let port = server.local_addr()?.port();
    let socket = client.run(|| {
        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
        socket.connect((proxy, port))?;
        Ok(socket)
    })?;
    socket.set_read_timeout(Some(5 * SECOND))?;
    socket.send(&PAYLOAD)?;
    let (length, from) = server.recv_from(&mut [0; PAYLOAD.len()])?;
    let SocketAddr::V6(from) = from else { bail!("it came from {from}") };
    let datagram = u16::try_from(UDP + length)?.to_be_bytes();

    // RFC 8200 section 3, RFC 768; neither the hop limit nor the checksum of a quote is looked at.
    let mut quote = vec![0x60, 0, 0, 0, datagram[0], datagram[1], 17, 60];
    quote.extend([from.ip().octets(), FAR.1.octets()].concat());
    quote.extend([from.port().to_be_bytes(), port.to_be_bytes(), datagram, [0; 2]].concat());
    quote.extend(&PAYLOAD[..length]);
    ensure!(quote.len() == IP + UDP + PAYLOAD.len(), "{length} bytes came");
    // RFC 4443 section 3.2: type, code, checksum (by the kernel), MTU.
    let message = [&[2, 0, 0, 0][..], &1280_u32.to_be_bytes(), &quote].concat();
    let raw = far.run(|| Ok(Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?))?;
    raw.send_to(&message, &SocketAddr::new((*from.ip()).into(), 0).into())?;

    let said = socket.recv(&mut [0]).map_err(|error| rustix::io::Errno::from_io_error(&error));
    ensure!(said == Err(Some(rustix::io::Errno::MSGSIZE)), "the client's socket says {said:?}");
    Ok(())
}

/// Filters count for proxy addresses as for any other; new ones, a revocation and a new grant from the next packet.
pub(super) fn filters_and_revocation(cx: &mut Context) -> Result<()> {
    let web = || names().with_filters([Filter::tcp(80, 80)]);
    let _nameserver = nameserver(cx, "names", LAN_HOST)?;
    let mut lab = start(cx, vec![web(), lan6()], &[web(), lan6()])?;
    active(&mut lab, NAME, &PROXIES)?;
    let client = &cx.topology.clients[0].namespace;
    for proxy in [PROXIES[0], PROXIES[2]] {
        let said = ping_raw(client, &[proxy])?.stdout;
        ensure!(is_prohibited(&said), "ICMP is not among the filters, yet ping said {said}");
        fetch(client, proxy.parse()?)?;
        let url = format!("http://{}/", SocketAddr::new(proxy.parse()?, 8080));
        let refused = curl(client, &[&url])?;
        ensure!(!refused.status.success(), "port 8080 of {proxy} answers");
        ensure!(refused.took < 2 * SECOND, "port 8080 of {proxy}: curl took {:?}", refused.took);
    }
    for (index, proxy) in [PROXIES[0], PROXIES[2]].into_iter().enumerate() {
        let proxy: IpAddr = proxy.parse()?;
        let url = format!("http://{}/slow", SocketAddr::new(proxy, 80));
        let transfer = Download::start(cx, client, &format!("revoked-{index}"), &url)?;
        transfer.wait_growth(5 * SECOND)?;
        lab.clients[0].forget_events();
        lab.portal.reject_access(lab.client_id(0)?, names().id)?;
        std::thread::sleep(SECOND / 10);
        // What the server still sends ends at the gateway, so the transfer itself has nothing to acknowledge.
        let asked = Instant::now();
        ensure!(fetch(client, proxy).is_err(), "{proxy} is reached although it was revoked");
        ensure!(asked.elapsed() < 2 * SECOND, "{proxy} was refused after {:?}", asked.elapsed());
        lab.clients[0].wait_for(
            "a denial",
            SECOND,
            |event| matches!(event, Event::IcmpProhibited { dst } if *dst == proxy),
        )?;
        std::thread::sleep(SECOND / 5);
        let late = transfer.growth_within(SECOND);
        ensure!(late == 0, "{late} bytes arrived after the resource was revoked");
        ping(client, LAN_HOST.1.into()).context("the other resource")?;
        drop(transfer);
        lab.clients[0].forget_events();
        lab.clients[0].request(names().id)?;
        lab.clients[0].wait_authorized(names().id, 5 * SECOND)?;
        active(&mut lab, NAME, &PROXIES)?;
        fetch(client, proxy).context("granted again")?;
    }
    lab.finish()
}

/// From one source port, again and again: connections that end by FIN, by the client's RST, by the server's refusal. Each
/// frees the port for the next.
pub(super) fn ends(cx: &mut Context) -> Result<()> {
    const PART: usize = 100_000;
    let _nameserver = nameserver(cx, "names", LAN_HOST)?;
    let mut lab = start(cx, vec![names()], &[names()])?;
    active(&mut lab, NAME, &PROXIES)?;
    let client = &cx.topology.clients[0].namespace;
    let sent = std::fs::read(&cx.big.path)?;
    for proxy in [PROXIES[0], PROXIES[2]] {
        let at = |port| -> Result<SocketAddr> { Ok(SocketAddr::new(proxy.parse()?, port)) };
        let (web, nobody) = (at(80)?, at(81)?);
        for round in 0..3 {
            client.run(|| {
                let whole =
                    part(connect_from(41_000, web)?, PART * round, PART).context("after a refusal")?;
                ensure!(whole == sent[PART * round..PART * (round + 1)], "{proxy}: other bytes came");
                let mut aborted = connect_from(41_000, web).context("after FIN")?;
                write!(aborted, "GET /slow HTTP/1.0\r\n\r\n")?;
                aborted.read_exact(&mut [0; 1000])?;
                // Closed with a linger of 0 it says RST.
                socket2::SockRef::from(&aborted).set_linger(Some(Duration::ZERO))?;
                drop(aborted);
                let whole = part(connect_from(41_000, web)?, 0, PART).context("after the client's RST")?;
                ensure!(whole == sent[..PART], "{proxy}: other bytes came");
                let asked = Instant::now();
                ensure!(connect_from(41_000, nobody).is_err(), "port 81 of {proxy} answers");
                ensure!(asked.elapsed() < 2 * SECOND, "{proxy} refused after {:?}", asked.elapsed());
                Ok(())
            })?;
        }
    }
    lab.finish()
}

/// A client that starts again and gives the same name other addresses, and the old ones to another name.
pub(super) fn client_again(cx: &mut Context) -> Result<()> {
    let (v4, v6) = LAN_HOST;
    let other = LAN_HOST_2;
    let records = [format!("{NAME},{v4},{v6}"), format!("other.lan.test,{},{}", other.0, other.1)];
    let _nameserver = Nameserver::start_with(cx, "names", PORTAL, "-", &records)?;
    let mut lab = start(cx, vec![names()], &[names()])?;
    active(&mut lab, NAME, &PROXIES)?;
    let client = &cx.topology.clients[0].namespace;
    let all_lead_to = |proxies: &[&str], host: (Ipv4Addr, Ipv6Addr)| -> Result<()> {
        for proxy in proxies {
            let proxy: IpAddr = proxy.parse()?;
            let expect = if proxy.is_ipv4() { IpAddr::from(host.0) } else { host.1.into() };
            let reached = fetch(client, proxy)?;
            ensure!(reached == expect, "{proxy} leads to {reached} instead of {expect}");
        }
        Ok(())
    };
    all_lead_to(&PROXIES, LAN_HOST)?;
    // Killed, in the middle of a transfer.
    let transfer = Download::start(cx, client, "cut", &format!("http://{}/slow", PROXIES[0]))?;
    lab.clients[0].process().signal(rustix::process::Signal::KILL)?;
    lab.clients[0].process().wait(2 * SECOND)?;
    drop(transfer);
    lab.clients.clear();
    let url = lab.portal.url();
    let again = Client::start_on_port(52_700, cx, 0, &url, &lab.client_token, Generation::Head)?;
    lab.clients.push(again);
    lab.clients[0].wait_joined(15 * SECOND)?;
    lab.clients[0].wait_relay(15 * SECOND)?;
    lab.connect(0, &[names()])?;
    active(&mut lab, "other.lan.test", &PROXIES)?;
    let fresh = ["100.96.3.1", "fd00:2021:1111:8000::301"];
    active(&mut lab, NAME, &fresh)?;
    all_lead_to(&PROXIES, other)?;
    all_lead_to(&fresh, LAN_HOST)?;
    lab.finish()
}

/// A gateway that starts again knows no names: it refuses their addresses, which lets the client ask for access and
/// assign them again.
pub(super) fn gateway_again(cx: &mut Context) -> Result<()> {
    let _nameserver = nameserver(cx, "names", LAN_HOST)?;
    let file = ResolvConf::new(cx, &[PORTAL])?;
    let mut lab = start(cx, vec![names()], &[names()])?;
    active(&mut lab, NAME, &PROXIES)?;
    let client = &cx.topology.clients[0].namespace;
    let (v4, v6): (IpAddr, IpAddr) = (PROXIES[0].parse()?, PROXIES[2].parse()?);
    fetch(client, v4)?;
    lab.gateway.signal(rustix::process::Signal::KILL)?;
    lab.gateway.wait(2 * SECOND)?;
    lab.clients[0].forget_events();
    let mark = lab.portal.mark();
    let (token, url) = (lab.gateway_token.clone(), lab.portal.url());
    lab.gateway = launch(cx, "gateway-again", &token, &url, "info", &file.launch(cx)?)?;
    lab.portal.wait_since(mark, 10 * SECOND, |entry| entry.to_gateway("init"))?;
    reconnect(&mut lab, 0, &[names()], 30 * SECOND)?;
    lab.clients[0].forget_events();
    ensure!(fetch(client, v4).is_err(), "a gateway that was just started knows {v4}");
    lab.clients[0].wait_for(
        "a denial, so that the client asks again",
        2 * SECOND,
        |event| matches!(event, Event::IcmpProhibited { dst } if *dst == v4),
    )?;
    active(&mut lab, NAME, &PROXIES)?;
    for (proxy, host) in [(v4, IpAddr::from(LAN_HOST.0)), (v6, LAN_HOST.1.into())] {
        let reached = fetch(client, proxy)?;
        ensure!(reached == host, "{proxy} leads to {reached} instead of {host}");
    }
    ensure!(lab.portal.online(Role::Gateway).len() == 1, "the gateway is connected once");
    lab.finish()
}

/// The first of two nameservers falls silent: names of DNS resources are found by the second in less than 2 s.
pub(super) fn failover(cx: &mut Context) -> Result<()> {
    let record = |name: &str| format!("{name},{},{}", LAN_HOST.0, LAN_HOST.1);
    let hosts = [record("first.lan.test"), record("second.lan.test"), record("third.lan.test")];
    let mut first = Nameserver::start_with(cx, "names", PORTAL, "-", &hosts)?;
    cx.topology.portal.namespace.ip_batch(&[format!("addr add {OTHER}/26 dev eth0")])?;
    let _second = Nameserver::start_with(cx, "names-2", OTHER, "-", &hosts)?;
    let launch = ResolvConf::new(cx, &[PORTAL, OTHER])?.launch(cx)?;
    let options = Options { resources: vec![names()], launch, ..Options::default() };
    let mut lab = Lab::start(cx, &options)?;
    lab.connect(0, &[names()])?;
    let client = &cx.topology.clients[0].namespace;
    let mut found = |name: &str| -> Result<Duration> {
        let asked = Instant::now();
        let status = assign(&mut lab, &names(), name)?;
        let took = asked.elapsed();
        ensure!(status == "Active", "{name} is {status} after {took:?}");
        // Active is also what has no address.
        fetch(client, PROXIES[0].parse()?).with_context(|| format!("{name}, after {took:?}"))?;
        Ok(took)
    };
    found("first.lan.test")?;
    // Nothing comes back, not even an error.
    cx.topology.portal.namespace.nft(&format!(
        "add table ip silent\n\
         add chain ip silent input {{ type filter hook input priority filter; }}\n\
         add rule ip silent input ip daddr {PORTAL} meta l4proto {{ tcp, udp }} th dport 53 drop\n"
    ))?;
    let took = found("second.lan.test")?;
    ensure!(took < 2 * SECOND, "with a silent nameserver it took {took:?}");
    // The host is there, the program is not: an error comes at once.
    cx.topology.portal.namespace.nft("delete table ip silent\n")?;
    first.kill()?;
    let took = found("third.lan.test")?;
    ensure!(took < 2 * SECOND, "with a dead nameserver it took {took:?}");
    lab.finish()
}

/// A datagram over IPv6 of every possible checksum passes both ways, alone and among others, as it is and translated. One of
/// them sums to zero wherever somebody sums, and is refused if that is not spelled as ones. (Over IPv4 nobody would notice.)
pub(super) fn every_checksum(cx: &mut Context) -> Result<()> {
    let _nameserver = nameserver(cx, "names", LAN_HOST)?;
    let mut lab = start(cx, vec![names(), lan6()], &[names(), lan6()])?;
    active(&mut lab, NAME, &PROXIES)?;
    let (client, lan) = (&cx.topology.clients[0].namespace, &cx.topology.lan);
    ping(client, LAN_HOST.1.into())?;
    // What is translated is translated packet by packet, so that it need not be alone.
    for (address, at_once) in [(LAN_HOST.1, 1), (LAN_HOST.1, 32), (PROXIES[2].parse()?, 32)] {
        let server = lan.run(|| Ok(UdpSocket::bind((LAN_HOST.1, 0))?))?;
        let socket = client.run(|| {
            let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
            socket.connect((address, server.local_addr()?.port()))?;
            Ok(socket)
        })?;
        let all: Vec<u16> = (0..=u16::MAX).collect();
        for numbers in all.chunks(at_once) {
            there_and_back(&socket, &server, numbers)
                .with_context(|| format!("{address}, {at_once} at once"))?;
        }
    }
    lab.finish()
}

/// One datagram for each of `numbers`, which it carries: all to the server, then all back.
fn there_and_back(socket: &UdpSocket, server: &UdpSocket, numbers: &[u16]) -> Result<()> {
    const LENGTH: usize = 100;
    let mut buffer = [0; LENGTH];
    let mut receive = |at: &UdpSocket, who: &str| -> Result<(u16, SocketAddr)> {
        at.set_read_timeout(Some(5 * SECOND))?;
        let (length, from) =
            at.recv_from(&mut buffer).with_context(|| format!("{numbers:?} did not all reach {who}"))?;
        ensure!(length == LENGTH, "{length} bytes came to {who}");
        Ok((u16::from_be_bytes([buffer[0], buffer[1]]), from))
    };
    let datagram = |number: u16| {
        let mut datagram = [0x5a; LENGTH];
        datagram[..2].copy_from_slice(&number.to_be_bytes());
        datagram
    };
    for number in numbers {
        socket.send(&datagram(*number))?;
    }
    let came = numbers.iter().map(|_| receive(server, "the server")).collect::<Result<Vec<_>>>()?;
    for (number, from) in &came {
        server.send_to(&datagram(*number), from)?;
    }
    let back = numbers.iter().map(|_| Ok(receive(socket, "the client")?.0)).collect::<Result<Vec<_>>>()?;
    ensure!(back == numbers, "{numbers:?} came back as {back:?}");
    Ok(())
}

/// One that says this of [`NAME`].
fn nameserver(cx: &Context, log: &str, (v4, v6): (Ipv4Addr, Ipv6Addr)) -> Result<Nameserver> {
    Nameserver::start_with(cx, log, PORTAL, "-", &[format!("{NAME},{v4},{v6}")])
}

/// Makes [`FAR`], and the LAN host its router.
fn far_host(cx: &Context) -> Result<NetNs> {
    let far = NetNs::new("far")?;
    let lan = &cx.topology.lan;
    veth((lan, "eth1"), (&far, "eth0"))?;
    lan.sysctl(&["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"])?;
    // The LAN host's routes are its links only; answers go by the gateway, who masquerades.
    lan.ip_batch(&["addr add 172.21.0.1/24 dev eth1", "addr add fd00:db8:21::1/64 dev eth1 nodad"])?;
    far.ip_batch(&[
        format!("addr add {}/24 dev eth0", FAR.0),
        format!("addr add {}/64 dev eth0 nodad", FAR.1),
        "route add default via 172.21.0.1".to_owned(),
        "route add ::/0 via fd00:db8:21::1".to_owned(),
    ])?;
    // Of IPv4 only: IPv6 ends where a link carries less than 1280 (RFC 8200 section 5), which is all that a tunnel sends.
    lan.ip_batch(&["route replace 172.21.0.0/24 dev eth1 mtu lock 1000"])?;
    far.ip_batch(&["route replace 172.20.0.0/24 via 172.21.0.1 mtu lock 1000"])?;
    cx.topology.gateway.namespace.ip_batch(&[
        format!("route add 172.21.0.0/24 via {}", LAN_HOST.0),
        format!("route add fd00:db8:21::/64 via {}", LAN_HOST.1),
    ])?;
    Ok(far)
}

/// One connection to port 7 of `far`, in the family of `like`, gets back what it sent until it closes its half.
fn echo_server(far: &NetNs, like: IpAddr) -> Result<()> {
    let any: IpAddr =
        if like.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let listener = far.run(|| Ok(TcpListener::bind((any, 7))?))?;
    std::thread::Builder::new().name("echo".to_owned()).spawn(move || {
        let Ok((mut stream, _)) = listener.accept() else { return };
        let mut bytes = Vec::new();
        // What goes wrong here is missed at the other end.
        let _ = stream.read_to_end(&mut bytes).and_then(|_| stream.write_all(&bytes));
    })?;
    Ok(())
}

fn echo(server: SocketAddr, bytes: &[u8]) -> Result<Vec<u8>> {
    let mut stream =
        wait_for("the echo server", 5 * SECOND, || Ok(TcpStream::connect_timeout(&server, 2 * SECOND).ok()))?;
    stream.set_read_timeout(Some(20 * SECOND))?;
    stream.write_all(bytes)?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut came = Vec::new();
    stream.read_to_end(&mut came).map_err(|error| anyhow!("{} bytes came, then {error}", came.len()))?;
    Ok(came)
}
