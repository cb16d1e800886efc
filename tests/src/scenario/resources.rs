//! DNS resources in use: what ordinary programs see of the translation between proxy addresses and real ones.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use socket2::{Domain, Socket, Type};

use super::{
    Context,
    dns::Nameserver,
    lab::{Lab, curl, ping},
    names::{PROXIES, assign_to, fetch, names, start},
};
use crate::{
    net::{
        process::wait_for,
        topology::{LAN_HOST, PORTAL},
    },
    standins::client::Event,
};

const SECOND: Duration = Duration::from_secs(1);

/// A proxy address of each family for each of three names.
const NAMES: [(&str, [&str; 2]); 3] = [
    ("one.lan.test", ["100.96.1.1", "fd00:2021:1111:8000::101"]),
    ("two.lan.test", ["100.96.1.2", "fd00:2021:1111:8000::102"]),
    ("three.lan.test", ["100.96.1.3", "fd00:2021:1111:8000::103"]),
];

/// Where every direct way is closed.
pub(super) fn relayed(cx: &mut Context) -> Result<()> {
    let (v4, v6) = LAN_HOST;
    let _nameserver = Nameserver::start_with(cx, "names", PORTAL, "-", &[format!("web.lan.test,{v4},{v6}")])?;
    let mut lab = start(cx, vec![names()], &[names()])?;
    let path = lab.clients[0].path().context("no path")?;
    ensure!(path.is_relayed(), "the path is {path:?}");
    active(&mut lab, "web.lan.test", &PROXIES)?;
    let client = &cx.topology.clients[0].namespace;
    for (proxy, host) in [(PROXIES[0], IpAddr::from(v4)), (PROXIES[2], v6.into())] {
        let proxy = proxy.parse()?;
        ping(client, proxy)?;
        let reached = fetch(client, proxy)?;
        ensure!(reached == host, "{proxy} leads to {reached} instead of {host}");
    }
    lab.finish()
}

/// Three names stand for one host. From one and the same source port a client downloads from all three at once, and each
/// download gets its own bytes: behind the gateway they have different ports.
pub(super) fn shared_address(cx: &mut Context) -> Result<()> {
    const PART: usize = 4_000_000;
    let (v4, v6) = LAN_HOST;
    let hosts = NAMES.map(|(name, _)| format!("{name},{v4},{v6}"));
    let _nameserver = Nameserver::start_with(cx, "names", PORTAL, "-", &hosts)?;
    let mut lab = start(cx, vec![names()], &[names()])?;
    for (name, proxies) in &NAMES {
        active(&mut lab, name, proxies)?;
    }
    let client = &cx.topology.clients[0].namespace;
    let sent = std::fs::read(&cx.big.path)?;
    for family in 0..2 {
        // Twice: the same ports are free again for the same names.
        for round in 0..2 {
            let download = |index: usize| {
                client.run(|| {
                    let server = SocketAddr::new(NAMES[index].1[family].parse()?, 80);
                    part(connect_from(40_000, server)?, PART * index, PART)
                })
            };
            let parts = std::thread::scope(|scope| {
                let running = [0, 1, 2].map(|index| scope.spawn(move || download(index)));
                running.map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("a download panicked"))))
            });
            for (index, came) in parts.into_iter().enumerate() {
                let (name, proxies) = NAMES[index];
                let what = format!("{name} by {}, round {round}", proxies[family]);
                let came = came.with_context(|| what.clone())?;
                ensure!(
                    came == sent[PART * index..PART * (index + 1)],
                    "{what}: what came is not what was sent"
                );
            }
        }
    }
    lab.finish()
}

/// A name with more addresses than proxies; names with addresses of one family only, whose other proxies are refused at
/// once.
pub(super) fn many_or_one(cx: &mut Context) -> Result<()> {
    const PROXIES: [&str; 8] = [
        "100.96.2.1",
        "100.96.2.2",
        "100.96.2.3",
        "100.96.2.4",
        "fd00:2021:1111:8000::201",
        "fd00:2021:1111:8000::202",
        "fd00:2021:1111:8000::203",
        "fd00:2021:1111:8000::204",
    ];
    // Ten of each family; in order, the first ones stand behind the proxies.
    let many: Vec<String> =
        (150..160).flat_map(|host| [format!("172.20.0.{host}"), format!("fd00:db8:20::{host}")]).collect();
    let lines: Vec<String> = many.iter().map(|address| address_line(address)).collect();
    cx.topology.lan.ip_batch(&lines)?;
    let file = cx.logs.file("many.hosts");
    std::fs::write(&file, many.iter().map(|ip| format!("{ip} many.lan.test\n")).collect::<String>())?;
    let (v4, v6) = LAN_HOST;
    let options = [
        format!("--addn-hosts={}", file.display()),
        format!("--host-record=four.lan.test,{v4}"),
        format!("--host-record=six.lan.test,{v6}"),
    ];
    let _nameserver = Nameserver::start_as(cx, "names", PORTAL, "-", &options)?;
    let mut lab = start(cx, vec![names()], &[names()])?;
    let client = &cx.topology.clients[0].namespace;

    active(&mut lab, "many.lan.test", &PROXIES)?;
    for (index, proxy) in PROXIES.iter().enumerate() {
        let number = 150 + index % 4;
        let host: IpAddr = match index {
            0..4 => format!("172.20.0.{number}").parse()?,
            _ => format!("fd00:db8:20::{number}").parse()?,
        };
        let reached = fetch(client, proxy.parse()?)?;
        ensure!(reached == host, "{proxy} leads to {reached} instead of {host}");
    }

    for (name, proxies, works) in [("four.lan.test", NAMES[0].1, 0), ("six.lan.test", NAMES[1].1, 1)] {
        active(&mut lab, name, &proxies)?;
        let (good, bad): (IpAddr, IpAddr) = (proxies[works].parse()?, proxies[1 - works].parse()?);
        fetch(client, good).with_context(|| format!("{name} by {good}"))?;
        lab.clients[0].forget_events();
        let refused = curl(client, &[&format!("http://{}/", SocketAddr::new(bad, 80))])?;
        ensure!(!refused.status.success(), "{name} is reached by {bad}");
        // ICMP makes connect() fail at once for IPv6; for IPv4, Linux takes "net unreachable" for a hint and says it at the end.
        lab.clients[0].wait_for(
            "unreachable",
            SECOND,
            |event| matches!(event, Event::IcmpUnreachable { dst } if *dst == bad),
        )?;
        ensure!(refused.took < 2 * SECOND, "{name} by {bad}: curl took {:?}", refused.took);
        // What `curl --resolve` does for a browser: both families are tried, the good one is taken.
        let asked = Instant::now();
        let both = format!("{name}:80:{},[{}]", proxies[0], proxies[1]);
        curl(client, &["-f", "--resolve", &both, &format!("http://{name}/")])?.success()?;
        ensure!(asked.elapsed() < 2 * SECOND, "{name} by both took {:?}", asked.elapsed());
    }
    lab.finish()
}

fn address_line(address: &str) -> String {
    match address.contains(':') {
        true => format!("addr add {address}/64 dev eth0 nodad preferred_lft 0"),
        false => format!("addr add {address}/24 dev eth0"),
    }
}

/// Assigns, and the gateway knows the name.
pub(super) fn active(lab: &mut Lab, name: &str, proxies: &[&str]) -> Result<()> {
    let status = assign_to(lab, &names(), name, proxies)?;
    ensure!(status == "Active", "{name} is {status}");
    Ok(())
}

/// A connection from this source port, whatever other connections it has.
pub(super) fn connect_from(port: u16, server: SocketAddr) -> Result<TcpStream> {
    let connect = || -> std::io::Result<TcpStream> {
        let socket = Socket::new(Domain::for_address(server), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        let any: IpAddr =
            if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        socket.bind(&SocketAddr::new(any, port).into())?;
        socket.connect_timeout(&server.into(), 5 * SECOND)?;
        Ok(socket.into())
    };
    let what = format!("a connection from {port} to {server}");
    let stream = wait_for(&what, 5 * SECOND, || match connect() {
        // The last one's FIN has not been acknowledged.
        Err(error) if error.kind() == ErrorKind::AddrNotAvailable => Ok(None),
        other => other.map(Some).context("connect"),
    })
    .with_context(|| what.clone())?;
    stream.set_read_timeout(Some(10 * SECOND))?;
    Ok(stream)
}

/// `length` bytes of the big file from `begin` on, until the server closes.
pub(super) fn part(mut stream: TcpStream, begin: usize, length: usize) -> Result<Vec<u8>> {
    let range = format!("bytes={begin}-{}", begin + length - 1);
    write!(stream, "GET /big HTTP/1.0\r\nHost: x\r\nRange: {range}\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let head = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").context("no header")?;
    ensure!(answer.starts_with(b"HTTP/1.1 206"), "{}", String::from_utf8_lossy(&answer[..head]));
    Ok(answer.split_off(head + 4))
}
