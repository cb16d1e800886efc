//! Things go wrong around the gateway: the portal dies, it is told to stop, junk arrives, operators err.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use rand::{Rng as _, RngCore as _, SeedableRng as _, rngs::SmallRng};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::{
    Context,
    lab::{
        Download, Lab, Options, host, host_2, http_both, lan4, lan6, ping, ping_both, start_gateway,
        wait_prohibited,
    },
};
use crate::{
    net::{
        NetNs,
        process::{Process, Spawn},
        topology::{LAN_HOST, LAN_HOST_2},
    },
    standins::portal::{Direction, Entry, Refusal, Role},
};

const SECOND: Duration = Duration::from_secs(1);

/// The gateway's UDP port (connections.md section 2.1).
pub(super) const PORT: u16 = 52625;

/// The portal is killed while traffic flows: it flows on. The portal comes back: the gateway does too, and what was
/// revoked meanwhile is gone.
pub(super) fn portal_dies(cx: &mut Context) -> Result<()> {
    let mut lab =
        Lab::start(cx, &Options { resources: vec![host(), host_2(), lan6()], ..Options::default() })?;
    lab.connect(0, &[host(), host_2()])?;
    let client = &cx.topology.clients[0].namespace;
    let transfer = Download::start(cx, client, "transfer", &format!("http://{}/slow", LAN_HOST.0))?;
    transfer.wait_growth(2 * SECOND)?;

    // A grant of the last seconds survives a list that lacks it: the portal writes it down late.
    std::thread::sleep(6 * SECOND);
    lab.portal.stop();
    let id = lab.client_id(0)?;
    lab.portal.forget(id, host_2().id);
    for _ in 0..3 {
        transfer.wait_growth(2 * SECOND).context("without a portal")?;
        std::thread::sleep(SECOND / 2);
    }
    ping(client, LAN_HOST_2.0.into()).context("nobody has told the gateway yet")?;
    let back = lab.portal.mark();
    lab.portal.restart()?;
    lab.portal
        .wait_since(back, 20 * SECOND, |entry| entry.to_gateway("init"))
        .context("the gateway comes back to the portal")?;
    transfer.wait_growth(2 * SECOND).context("after the portal came back")?;
    wait_prohibited(client, LAN_HOST_2.0.into(), 3 * SECOND)
        .context("what was revoked while the portal was away")?;
    ping(client, LAN_HOST.0.into())?;

    lab.clients[0].forget_events();
    lab.portal.wait_online(Role::Client, 1, 20 * SECOND).context("the client comes back to the portal")?;
    lab.clients[0].request(lan6().id)?;
    lab.clients[0].wait_authorized(lan6().id, 5 * SECOND)?;
    ping(client, LAN_HOST.1.into()).context("a new authorization from the portal that came back")?;
    lab.finish()
}

/// The WebSockets are reset again and again.
pub(super) fn sockets_drop(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    for _ in 0..3 {
        let dropped = lab.portal.mark();
        lab.portal.drop_sockets(Some(Role::Gateway));
        lab.portal.wait_since(dropped, 20 * SECOND, |entry| entry.to_gateway("init"))?;
        ping_both(&cx.topology.clients[0].namespace)?;
    }
    lab.finish()
}

/// The portal's socket is open but says nothing: unanswered heartbeats end it, and the next one works.
pub(super) fn portal_silent(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    let silent = lab.portal.mark();
    let since = std::time::Instant::now();
    lab.portal.set_silent(true);
    let left = |entry: &Entry| entry.peer == Role::Gateway && entry.dir == Direction::Disconnect;
    lab.portal.wait_since(silent, 50 * SECOND, left).context("the gateway leaves a silent portal")?;
    let noticed = since.elapsed();
    lab.portal.set_silent(false);
    lab.portal.wait_since(silent, 20 * SECOND, |entry| entry.to_gateway("init"))?;
    println!("      left the silent portal after {:.1} s", noticed.as_secs_f64());
    ensure!(noticed > 10 * SECOND, "one heartbeat without an answer is no silence: {noticed:?}");
    ping_both(&cx.topology.clients[0].namespace)?;
    lab.finish()
}

/// SIGTERM: every client hears goodbye, the exit code is 0, and nothing takes long.
pub(super) fn terminate(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    lab.connect(1, &[lan4()])?;
    http_both(&cx.topology.clients[0].namespace)?;
    lab.terminate(3 * SECOND)?;
    for client in &mut lab.clients {
        client.wait_goodbye(SECOND)?;
    }
    Ok(())
}

/// A gateway that is started again serves its clients again.
pub(super) fn restart(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    http_both(&cx.topology.clients[0].namespace)?;
    lab.terminate(3 * SECOND)?;
    lab.clients[0].wait_goodbye(SECOND)?;
    lab.clients[0].forget_events();
    let gone = lab.portal.mark();
    let token = lab.gateway_token.clone();
    lab.gateway = start_gateway(cx, "gateway-again", &token, &lab.portal.url(), "info")?;
    lab.portal.wait_since(gone, 5 * SECOND, |entry| entry.to_gateway("init"))?;
    lab.connect(0, &[lan4(), lan6()])?;
    http_both(&cx.topology.clients[0].namespace)?;
    lab.finish()
}

/// Malformed and hostile datagrams from strangers, from the client's host and from the relay's own address.
pub(super) fn hostile_datagrams(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    let topology = &cx.topology;
    let client = &topology.clients[0].namespace;
    let transfer = Download::start(cx, client, "transfer", &format!("http://{}/slow", LAN_HOST.0))?;
    let gateway = SocketAddr::new(topology.gateway.v4.into(), PORT);
    let from_relay = raw_udp(&topology.relays[0].namespace)?;
    let from_client = topology.clients[0].namespace.run(|| Ok(UdpSocket::bind("0.0.0.0:0")?))?;
    let from_stranger = topology.portal.namespace.run(|| Ok(UdpSocket::bind("0.0.0.0:0")?))?;
    let mut random = SmallRng::seed_from_u64(0xbad);
    for round in 0..10_000 {
        let junk = junk(&mut random);
        match round % 3 {
            0 => send_raw_udp(&from_relay, 3478, gateway, &junk)?,
            // A full socket buffer is no failure of the gateway's.
            1 => drop(from_client.send_to(&junk, gateway)),
            _ => drop(from_stranger.send_to(&junk, gateway)),
        }
        if round % 100 == 0 {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    transfer.wait_growth(3 * SECOND).context("while junk arrived")?;
    ping_both(client)?;
    http_both(client)?;
    lab.clients[0].forget_events();
    ensure!(lab.portal.online(Role::Gateway).len() == 1, "the gateway lost its portal");
    lab.finish()
}

/// A second gateway in the same namespace says one sentence with the first one's pid, and exit code 1.
pub(super) fn second_instance(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    let token = lab.gateway_token.clone();
    let mut second = start_gateway(cx, "second", &token, &lab.portal.url(), "info")?;
    let status = second.wait(3 * SECOND)?;
    let said = second.log();
    ensure!(status.code() == Some(1), "{status}: {said}");
    is_one_sentence(&said, &format!("{}", lab.gateway.pid())).context("the first one's pid")?;
    http_both(&cx.topology.clients[0].namespace).context("the first gateway serves on")?;
    lab.finish()
}

/// What an operator can get wrong: exit code, and what the message must name.
pub(super) fn operator_errors(cx: &mut Context) -> Result<()> {
    /// `--flag` arguments; variables; exit code; what the output must contain.
    type Case = (&'static [&'static str], &'static [(&'static str, &'static str)], i32, &'static str);
    const GOOD: (&str, &str) = ("FIREZONE_TOKEN", "token");
    const URL: (&str, &str) = ("FIREZONE_API_URL", "wss://203.0.113.66:8081/");
    let cases: &[Case] = &[
        (&["--help"], &[], 0, "FIREZONE_TOKEN"),
        (&["--version"], &[], 0, "firezone-gateway"),
        (&["--no-such-flag"], &[], 2, "--no-such-flag"),
        (&["--log-format", "verse"], &[GOOD], 2, "--log-format"),
        (&[], &[GOOD, ("HEALTH_CHECK_ADDR", "nowhere")], 2, "--health-check-addr"),
        (&[], &[GOOD, ("FIREZONE_MAX_PARTITION_TIME", "soon")], 2, "--max-partition-time"),
        (&[], &[GOOD, ("FIREZONE_API_URL", "not a url")], 1, "FIREZONE_API_URL"),
        (&[], &[GOOD, ("FIREZONE_API_URL", "ftp://portal/")], 1, "FIREZONE_API_URL"),
        (&[], &[URL, ("FIREZONE_ID", "x")], 1, "FIREZONE_TOKEN"),
        (&["--ca-file", "/nonexistent.pem"], &[GOOD, URL, ("FIREZONE_ID", "x")], 1, "/nonexistent.pem"),
    ];
    for (index, (arguments, variables, code, needle)) in cases.iter().enumerate() {
        let command = [cx.gateway.display().to_string()]
            .into_iter()
            .chain(arguments.iter().map(|&argument| argument.to_owned()))
            .collect();
        let environment = variables.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
        let name = format!("operator-{index}");
        let what = Spawn { name: &name, command, environment, piped: false };
        let mut process = Process::spawn(&cx.topology.gateway.namespace, &cx.logs, &what)?;
        let status = process.wait(5 * SECOND)?;
        let said = process.log();
        ensure!(status.code() == Some(*code), "{arguments:?} {variables:?}: {status}, not {code}: {said}");
        ensure!(said.contains(needle), "{arguments:?} {variables:?}: {needle} is not named: {said}");
        if *code == 1 {
            is_one_sentence(&said, needle).with_context(|| format!("{arguments:?} {variables:?}"))?;
        }
    }
    Ok(())
}

/// The last line names `needle`; before it there is at most what a good start says too.
pub(super) fn is_one_sentence(said: &str, needle: &str) -> Result<()> {
    let lines: Vec<&str> = said.trim_end().lines().collect();
    let (last, before) = lines.split_last().context("silence")?;
    ensure!(last.contains(needle), "the last line does not name {needle}: {last}");
    ensure!(before.iter().all(|line| line.contains(" INFO ")), "more than a sentence: {said}");
    Ok(())
}

/// The portal is too busy, then does not know the token any more: wait as told, then end.
pub(super) fn portal_refuses(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    lab.portal.refuse_next(Role::Gateway, &Refusal::busy(3), 1);
    let dropped = lab.portal.mark();
    lab.portal.drop_sockets(Some(Role::Gateway));
    let is_refusal = |entry: &Entry| entry.peer == Role::Gateway && entry.dir == Direction::Refused;
    let refused = lab.portal.wait_since(dropped, 10 * SECOND, is_refusal)?;
    let joined = lab.portal.wait_since(dropped, 10 * SECOND, |entry| entry.to_gateway("init"))?;
    let waited = joined.at - refused.at;
    ensure!(
        waited >= 3 * SECOND && waited < 5 * SECOND,
        "Retry-After: 3, yet it came again after {waited:?}"
    );
    ping_both(client).context("refused, but back")?;

    lab.portal.refuse_next(Role::Gateway, &Refusal::new(401, "invalid_token"), 1);
    lab.portal.drop_sockets(Some(Role::Gateway));
    let status = lab.gateway.wait(10 * SECOND)?;
    ensure!(status.code() == Some(1), "with an invalid token it ended with {status}");
    let said = lab.gateway.log();
    let last = said.lines().last().unwrap_or_default();
    ensure!(last.contains("token"), "the last line does not name the token: {last}");
    Ok(())
}

/// Everything the daemon writes at TRACE, searched for every secret of the run in every likely notation.
pub(super) fn no_secret_in_trace(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options { rust_log: "trace", ..Options::default() })?;
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    ping_both(client)?;
    http_both(client)?;
    // The paths that are rarely logged: a reconnect with its init, a revocation, new relays, a goodbye.
    let dropped = lab.portal.mark();
    lab.portal.drop_sockets(Some(Role::Gateway));
    lab.portal.wait_since(dropped, 20 * SECOND, |entry| entry.to_gateway("init"))?;
    lab.portal.hold_relays(false);
    lab.portal.push(Role::Gateway, "invented", &serde_json::json!({ "token": lab.gateway_token }));
    lab.portal.reject_access(lab.client_id(0)?, lan6().id)?;
    ping(client, IpAddr::V4(LAN_HOST.0))?;
    lab.terminate(3 * SECOND)?;

    let log = lab.gateway.log();
    ensure!(log.contains("TRACE") && log.lines().count() > 20, "this was not a TRACE log: {log}");
    let secrets = lab.portal.secrets();
    for kind in ["token", "psk", "ice password", "turn password", "ingest token"] {
        ensure!(secrets.iter().any(|secret| secret.kind == kind), "the run used no {kind}");
    }
    for secret in &secrets {
        for notation in notations(&secret.value) {
            ensure!(!log.contains(&notation), "the log at TRACE contains a {}", secret.kind);
        }
    }
    Ok(())
}

/// A secret as text, and if it is base64, its bytes as `{:?}`, `{:x?}` and hexadecimal digits would show them.
fn notations(secret: &str) -> Vec<String> {
    let mut all = vec![secret.to_owned()];
    let mut add_bytes = |bytes: &[u8]| {
        all.push(hex::encode(bytes));
        all.push(hex::encode_upper(bytes));
        let part = &bytes[..bytes.len().min(8)];
        all.push(format!("{part:?}").trim_matches(['[', ']']).to_owned());
        all.push(format!("{part:x?}").trim_matches(['[', ']']).to_owned());
    };
    add_bytes(secret.as_bytes());
    if let Ok(bytes) = base64::engine::general_purpose::STANDARD.decode(secret)
        && bytes.len() >= 16
    {
        add_bytes(&bytes);
    }
    all
}

/// One datagram that no honest peer sends.
pub(super) fn junk(random: &mut SmallRng) -> Vec<u8> {
    let length = match random.random_range(0..8) {
        0 => random.random_range(0..4),
        1 => random.random_range(1_400..9_000),
        _ => random.random_range(4..300),
    };
    let mut bytes = vec![0; length];
    random.fill_bytes(&mut bytes);
    // A first byte that leads deep into each parser, then a body that does not hold what it promises.
    let heads: [&[u8]; 10] = [
        &[1, 0, 0, 0],                                     // WireGuard initiation
        &[2, 0, 0, 0],                                     // response
        &[3, 0, 0, 0],                                     // cookie reply
        &[4, 0, 0, 0],                                     // data, random receiver
        &[4, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], // data, a likely receiver
        &[0x40, 0x00, 0xff, 0xff],                         // ChannelData that claims more than there is
        &[0x40, 0x00, 0x00, 0x20, 4, 0, 0, 0],             // ChannelData with WireGuard inside
        &[0x00, 0x01, 0x00, 0x40, 0x21, 0x12, 0xa4, 0x42], // STUN binding request
        &[0x01, 0x01, 0x00, 0x08, 0x21, 0x12, 0xa4, 0x42], // STUN success
        &[0x01, 0x13, 0xff, 0xfc, 0x21, 0x12, 0xa4, 0x42], // TURN error with an impossible length
    ];
    let head = heads[random.random_range(0..heads.len())];
    let overlap = head.len().min(bytes.len());
    bytes[..overlap].copy_from_slice(&head[..overlap]);
    // The lengths that are just right for handshake messages.
    if random.random_bool(0.2) {
        bytes.resize([148, 92, 64, 32][random.random_range(0..4)], 0);
    }
    bytes
}

/// A socket that sends UDP from any source port, also one that is taken.
pub(super) fn raw_udp(namespace: &NetNs) -> Result<Socket> {
    namespace.run(|| Ok(Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::UDP))?))
}

pub(super) fn send_raw_udp(socket: &Socket, source_port: u16, to: SocketAddr, payload: &[u8]) -> Result<()> {
    let length = u16::try_from(payload.len() + 8)?;
    let mut datagram = Vec::with_capacity(payload.len() + 8);
    datagram.extend(source_port.to_be_bytes());
    datagram.extend(to.port().to_be_bytes());
    datagram.extend(length.to_be_bytes());
    // RFC 768: zero means that the transmitter generated no checksum.
    datagram.extend([0, 0]);
    datagram.extend(payload);
    // A full buffer is no failure of the gateway's; the port in the address is ignored for raw sockets.
    let _sent = socket.send_to(&datagram, &SockAddr::from(to));
    Ok(())
}
