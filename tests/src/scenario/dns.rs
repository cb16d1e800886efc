//! The DNS servers on the gateway's tunnel addresses: what clients ask there, and what happens to their nameservers.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};

use super::{
    Context,
    client::INTERFACE,
    lab::{Lab, Launch, Options, lan4, lan6, ping},
    start::{can_run, in_mount_namespace, words},
};
use crate::{
    net::{
        NetNs,
        process::{Process, Spawn, run},
        topology::{LAN_HOST, PORTAL},
    },
    standins::portal::Role,
};

const SECOND: Duration = Duration::from_secs(1);
/// Where the servers listen.
const PORT: u16 = 53535;
/// A second address of the host with the nameservers.
pub(super) const OTHER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 67);
/// The gateway's addresses in the network of its resources.
const FURTHER: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(172, 20, 0, 1)), IpAddr::V6(Ipv6Addr::new(0xfd00, 0xdb8, 0x20, 0, 0, 0, 0, 1))];
/// 12 strings of 200 bytes: longer than any UDP answer.
const LONG: usize = 12;

/// SRV and TXT over both transports and families, an answer that is too long for UDP, and queries that are none.
pub(super) fn queries(cx: &mut Context) -> Result<()> {
    let _first = Nameserver::start(cx, "names", PORTAL, "hello")?;
    let (mut lab, own) = start_with_nameserver(cx, &ResolvConf::new(cx, &[PORTAL])?)?;
    let client = &cx.topology.clients[0].namespace;
    for server in own {
        for transport in ["+notcp", "+tcp"] {
            let srv = dig(client, server, &[transport, "+short", "_web._tcp.lan.test", "SRV"])?;
            ensure!(srv.trim() == "10 20 8080 files.lan.test.", "{server} {transport}: {srv}");
            let txt = dig(client, server, &[transport, "+short", "_note.lan.test", "TXT"])?;
            ensure!(txt.trim() == "\"hello\"", "{server} {transport}: {txt}");
            let none = dig(client, server, &[transport, "_nobody.lan.test", "TXT"])?;
            ensure!(none.contains("status: NXDOMAIN"), "{server} {transport}: {none}");
            let status = dig(client, server, &[transport, "+opcode=status", "_note.lan.test", "TXT"])?;
            ensure!(status.contains("status: NOTIMP"), "{server} {transport}: {status}");
        }
        // Over UDP it is cut, with the OPT that the query had; dig then comes over TCP by itself.
        let cut = dig(client, server, &["+notcp", "+ignore", "_long.lan.test", "TXT"])?;
        ensure!(cut.contains(" tc ") || cut.contains(" tc;"), "{server}: no TC in {cut}");
        ensure!(cut.contains("EDNS: version: 0"), "{server}: no OPT in {cut}");
        let without = dig(client, server, &["+notcp", "+ignore", "+noedns", "_long.lan.test", "TXT"])?;
        ensure!(without.contains(" tc ") && !without.contains("EDNS"), "{server}: {without}");
        let whole = dig(client, server, &["+short", "_long.lan.test", "TXT"])?;
        let strings = whole.matches(&"x".repeat(200)).count();
        ensure!(strings == LONG, "{server}: {strings} strings of {LONG} arrived: {whole}");
        // A question announced and not there: FORMERR with its ID; the next query is answered all the same.
        let broken = b"\xab\xcd\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00";
        let answer = client.run(|| over_udp(SocketAddr::new(server, PORT), broken))?;
        ensure!(answer[..4] == [0xab, 0xcd, 0x81, 0x81], "{server}: {answer:02x?}");
        let mut stream = client.run(|| connect(SocketAddr::new(server, PORT)))?;
        let answers = over_tcp(&mut stream, &[broken, &txt_query(7)])?;
        ensure!(answers[0][..4] == [0xab, 0xcd, 0x81, 0x81], "{server}: {answers:02x?}");
        ensure!(answers[1][..2] == [0, 7] && answers[1].ends_with(b"\x05hello"), "{server}: {answers:02x?}");
    }
    // Where the operator wants them besides: for clients a resource like any other, and for the network behind it.
    for further in FURTHER {
        for (who, transport) in [(client, "+notcp"), (client, "+tcp"), (&cx.topology.lan, "+notcp")] {
            let txt = dig(who, further, &["-p", "53", transport, "+short", "_note.lan.test", "TXT"])?;
            ensure!(txt.trim() == "\"hello\"", "{further} {transport}: {txt}");
        }
    }
    lab.clients[0].forget_events();
    lab.finish()
}

/// The portal sends the same addresses again, twice: the servers and their connections do not notice.
pub(super) fn connection_stays(cx: &mut Context) -> Result<()> {
    let _first = Nameserver::start(cx, "names", PORTAL, "hello")?;
    let (lab, own) = start_with_nameserver(cx, &ResolvConf::new(cx, &[PORTAL])?)?;
    let client = &cx.topology.clients[0].namespace;
    let mut streams = Vec::new();
    for server in own {
        streams.push(client.run(|| connect(SocketAddr::new(server, PORT)))?);
    }
    for round in 0..3 {
        for stream in &mut streams {
            // Two in one segment: both are answered, in any order.
            let queries = [txt_query(1), txt_query(2)];
            let answers = over_tcp(stream, &[&queries[0], &queries[1]])
                .with_context(|| format!("after {round} further init"))?;
            let mut ids: Vec<u8> = answers.iter().map(|answer| answer[1]).collect();
            ids.sort_unstable();
            ensure!(ids == [1, 2], "{answers:02x?}");
        }
        if round < 2 {
            let dropped = lab.portal.mark();
            lab.portal.drop_sockets(Some(Role::Gateway));
            lab.portal.wait_since(dropped, 10 * SECOND, |entry| entry.to_gateway("init"))?;
            std::thread::sleep(SECOND / 5);
        }
    }
    lab.finish()
}

/// The first nameserver dies: the second answers, and from the second query on at once. Then the file names one that
/// knows something else.
pub(super) fn failover(cx: &mut Context) -> Result<()> {
    let mut first = Nameserver::start(cx, "names", PORTAL, "first")?;
    cx.topology.portal.namespace.ip_batch(&[format!("addr add {OTHER}/26 dev eth0")])?;
    let mut second = Nameserver::start(cx, "names-2", OTHER, "second")?;
    let file = ResolvConf::new(cx, &[PORTAL, OTHER])?;
    let (mut lab, [v4, v6]) = start_with_nameserver(cx, &file)?;
    let client = &cx.topology.clients[0].namespace;
    let ask = |server, transport: &str| -> Result<(String, Duration)> {
        let asked = Instant::now();
        let said = dig(client, server, &[transport, "+short", "_note.lan.test", "TXT"])?;
        Ok((said.trim().to_owned(), asked.elapsed()))
    };
    ensure!(ask(v4, "+notcp")?.0 == "\"first\"", "the configured order");
    ensure!(ask(v6, "+tcp")?.0 == "\"first\"", "the configured order");

    // It falls silent, as a host that is switched off does: nothing comes back, not even an error.
    cx.topology.portal.namespace.nft(&format!(
        r#"table ip silent {{
          chain input {{
            type filter hook input priority filter
            ip daddr {PORTAL} meta l4proto {{ tcp, udp }} th dport 53 drop
          }}
        }}"#
    ))?;
    for transport in ["+notcp", "+tcp"] {
        let (said, took) = ask(v4, transport)?;
        ensure!(said == "\"second\"", "{transport}: {said} after {took:?}");
        ensure!(took < 3 * SECOND, "{transport}: the first query took {took:?}");
        let (said, took) = ask(v4, transport)?;
        ensure!(said == "\"second\"" && took < SECOND / 3, "{transport}: then {said} after {took:?}");
    }

    // Its host is there again, and the program is not: an error comes at once.
    cx.topology.portal.namespace.nft("delete table ip silent\n")?;
    first.kill()?;
    ensure!(ask(v4, "+notcp")?.0 == "\"second\"", "the first is dead");
    second.kill()?;
    let failed = dig(client, v4, &["+notcp", "_note.lan.test", "TXT"])?;
    ensure!(failed.contains("status: SERVFAIL") && failed.contains(" ra;"), "{failed}");

    // Another nameserver and another file; the gateway looks every 5 s.
    let _third = Nameserver::start(cx, "names-3", OTHER, "third")?;
    file.write(&[OTHER])?;
    let deadline = Instant::now() + 15 * SECOND;
    while ask(v6, "+notcp")?.0 != "\"third\"" {
        ensure!(Instant::now() < deadline, "the new nameserver is not asked");
        std::thread::sleep(SECOND / 5);
    }
    lab.clients[0].forget_events();
    lab.finish()
}

/// One client asks as fast as it can: it is refused what is too much, the other client and its pings do not notice.
pub(super) fn flood(cx: &mut Context) -> Result<()> {
    let _first = Nameserver::start(cx, "names", PORTAL, "hello")?;
    let (mut lab, own) = start_with_nameserver(cx, &ResolvConf::new(cx, &[PORTAL])?)?;
    lab.connect(1, &[lan4(), lan6()])?;
    let [greedy, other] = [0, 1].map(|index| &cx.topology.clients[index].namespace);
    route(other, own)?;
    let until = Instant::now() + 4 * SECOND;
    let (answered, refused) = std::thread::scope(|scope| {
        let flood = scope.spawn(|| greedy.run(|| ask_until(SocketAddr::new(own[0], PORT), until)));
        let mut asked = 0;
        while Instant::now() < until {
            for server in own {
                let started = Instant::now();
                let note = dig(other, server, &["+notcp", "+short", "_note.lan.test", "TXT"])?;
                let took = started.elapsed();
                ensure!(note.trim() == "\"hello\"" && took < 2 * SECOND, "{note:?} after {took:?}");
                asked += 1;
            }
            ping(other, LAN_HOST.0.into())?;
        }
        ensure!(asked > 4, "the other client asked {asked} times only");
        flood.join().map_err(|_| anyhow!("the flood panicked"))?
    })?;
    // 400 at once and 200 a second, for 4 s and the little that the start took.
    ensure!((500..2000).contains(&answered), "{answered} queries of the flood were answered");
    ensure!(refused > 1000, "{refused} queries of the flood were refused");
    lab.terminate(5 * SECOND)?;
    let log = lab.gateway.log();
    for count in ["answered", "over the client's limit"] {
        let counted =
            |line: &str| line.contains("DNS servers") && line.contains(&format!("what=\"{count}\""));
        ensure!(log.lines().any(counted), "no {count:?} among the counters in the log");
    }
    Ok(())
}

/// Something else has the port on every address: after three attempts the daemon ends and says why.
pub(super) fn port_taken(cx: &mut Context) -> Result<()> {
    let holder =
        cx.topology.gateway.namespace.run(|| Ok(TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?))?;
    let mut lab = Lab::start(cx, &Options::default())?;
    let status = lab.gateway.wait(10 * SECOND)?;
    drop(holder);
    ensure!(status.code() == Some(1), "it ended with {status}");
    let log = lab.gateway.log();
    let expect = "Failed to bind DNS servers on TUN interface: Cannot listen on 100.";
    ensure!(
        log.lines().any(|line| line.contains("ERROR") && line.contains(expect) && line.contains("in use")),
        "no such error: {log}"
    );
    Ok(())
}

/// Queries in bursts, without waiting; how many were answered, and how many refused.
fn ask_until(server: SocketAddr, until: Instant) -> Result<(u32, u32)> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect(server)?;
    socket.set_nonblocking(true)?;
    let (mut answered, mut refused, mut answer) = (0, 0, [0; 2000]);
    while Instant::now() < until {
        for id in 0..20 {
            // What the socket does not take is not asked.
            let _ = socket.send(&txt_query(id));
        }
        while let Ok(length) = socket.recv(&mut answer) {
            match answer[3] & 0xf {
                0 if answer[..length].ends_with(b"\x05hello") => answered += 1,
                5 => refused += 1,
                other => bail!("RCODE {other} in an answer to the flood"),
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok((answered, refused))
}

/// The daemon with `file` as its resolv.conf, and a client that has a route to the tunnel addresses, which are returned.
pub(super) fn start_with_nameserver(cx: &Context, file: &ResolvConf) -> Result<(Lab, [IpAddr; 2])> {
    let mut launch = file.launch(cx)?;
    let further = FURTHER.map(|ip| SocketAddr::new(ip, 53).to_string()).join(",");
    launch.environment.push(("FIREZONE_DNS_LISTEN", further));
    let options = Options { launch, rust_log: "info,firezone_gateway::dns=debug", ..Options::default() };
    let mut lab = Lab::start(cx, &options)?;
    lab.connect(0, &[lan4(), lan6()])?;
    let init = lab.portal.wait_for(SECOND, |entry| entry.to_gateway("init"))?;
    let own = |family: &str| {
        init.payload()["interface"][family].as_str().with_context(|| format!("no {family} address in init"))
    };
    let (v4, v6): (Ipv4Addr, Ipv6Addr) = (own("ipv4")?.parse()?, own("ipv6")?.parse()?);
    let own = [v4.into(), v6.into()];
    route(&cx.topology.clients[0].namespace, own)?;
    Ok((lab, own))
}

/// The stand-in client has routes to its resources only.
fn route(client: &NetNs, own: [IpAddr; 2]) -> Result<()> {
    client.ip_batch(&own.map(|ip| format!("route replace {ip} dev {INTERFACE}")))
}

/// A file that is mounted over the daemon's /etc/resolv.conf.
pub(crate) struct ResolvConf {
    path: PathBuf,
}

impl ResolvConf {
    pub(crate) fn new(cx: &Context, servers: &[Ipv4Addr]) -> Result<Self> {
        let file = Self { path: cx.logs.file("resolv.conf") };
        file.write(servers)?;
        Ok(file)
    }

    /// The daemon with this file; skips the scenario where nothing can be mounted.
    pub(crate) fn launch(&self, cx: &Context) -> Result<Launch> {
        let mount = format!("mount --bind '{}' /etc/resolv.conf && exec \"$@\"", self.path.display());
        let wrapper = in_mount_namespace(&mount);
        can_run(cx, &wrapper)?;
        Ok(Launch { wrapper, ..Launch::default() })
    }

    fn write(&self, servers: &[Ipv4Addr]) -> Result<()> {
        let text: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
        Ok(std::fs::write(&self.path, text)?)
    }
}

/// A dnsmasq on one address of the portal's host.
pub(crate) struct Nameserver(Process);

impl Nameserver {
    /// `note` is what it has to say as TXT of `_note.lan.test`.
    pub(super) fn start(cx: &Context, name: &str, address: Ipv4Addr, note: &str) -> Result<Self> {
        Self::start_with(cx, name, address, note, &[])
    }

    /// `hosts` are names of `lan.test` and their addresses, as in `--host-record`.
    pub(crate) fn start_with(
        cx: &Context,
        name: &str,
        address: Ipv4Addr,
        note: &str,
        hosts: &[String],
    ) -> Result<Self> {
        let options: Vec<String> = hosts.iter().map(|host| format!("--host-record={host}")).collect();
        Self::start_as(cx, name, address, note, &options)
    }

    /// `options` are dnsmasq's own.
    pub(super) fn start_as(
        cx: &Context,
        name: &str,
        address: Ipv4Addr,
        note: &str,
        options: &[String],
    ) -> Result<Self> {
        let long = vec!["x".repeat(200); LONG].join(",");
        let mut command = words(&format!(
            "dnsmasq --keep-in-foreground --conf-file=/dev/null --user=root --no-resolv --no-hosts --pid-file= \
             --log-facility=- --log-queries --bind-interfaces --listen-address={address} --except-interface=lo \
             --local=/lan.test/ --srv-host=_web._tcp.lan.test,files.lan.test,8080,10,20 \
             --txt-record=_note.lan.test,{note} --txt-record=_long.lan.test,{long}"
        ));
        command.extend_from_slice(options);
        let host = &cx.topology.portal.namespace;
        let process = Process::spawn(host, &cx.logs, &Spawn { name, command, ..Spawn::default() })?;
        let at = SocketAddr::new(address.into(), 53);
        host.run(|| {
            crate::net::process::wait_for(&format!("{at} to listen"), 5 * SECOND, || {
                Ok(TcpStream::connect_timeout(&at, SECOND).ok())
            })
            .map(drop)
        })?;
        Ok(Self(process))
    }

    pub(super) fn kill(&mut self) -> Result<()> {
        self.0.signal(rustix::process::Signal::KILL)?;
        self.0.wait(2 * SECOND).map(drop)
    }
}

/// `dig` at the gateway, once, with 6 s for the answer; what it printed.
pub(super) fn dig(client: &NetNs, server: IpAddr, arguments: &[&str]) -> Result<String> {
    let (server, port) = (format!("@{server}"), PORT.to_string());
    let mut command = vec!["dig", "-p", &port, &server, "+time=6", "+tries=1"];
    command.extend(arguments);
    run(client, 10 * SECOND, &command)?.success()
}

/// `_note.lan.test` TXT.
fn txt_query(id: u8) -> Vec<u8> {
    let mut query = vec![0, id, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    query.extend(b"\x05_note\x03lan\x04test\x00\x00\x10\x00\x01");
    query
}

fn over_udp(server: SocketAddr, message: &[u8]) -> Result<Vec<u8>> {
    let any: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_read_timeout(Some(2 * SECOND))?;
    socket.send_to(message, server)?;
    let mut answer = vec![0; 2000];
    let length = socket.recv(&mut answer).context("no answer")?;
    answer.truncate(length);
    Ok(answer)
}

fn connect(server: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&server, 2 * SECOND)?;
    stream.set_read_timeout(Some(6 * SECOND))?;
    Ok(stream)
}

/// All messages in one write; as many answers, as they come.
fn over_tcp(stream: &mut TcpStream, messages: &[&[u8]]) -> Result<Vec<Vec<u8>>> {
    let mut bytes = Vec::new();
    for message in messages {
        bytes.extend(u16::try_from(message.len())?.to_be_bytes());
        bytes.extend(*message);
    }
    stream.write_all(&bytes)?;
    let answers = messages.iter().map(|_| {
        let mut length = [0; 2];
        stream.read_exact(&mut length)?;
        let mut answer = vec![0; u16::from_be_bytes(length).into()];
        stream.read_exact(&mut answer)?;
        Ok(answer)
    });
    answers.collect()
}
