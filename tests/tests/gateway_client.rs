//! The client stand-in against a gateway that fits in this file: ICE controlled, WireGuard responder, `ping`.
//!
//! It proves the client alone, with a real coturn, before the daemon is there to be suspected. Needs root.
//! The file's name begins with `gateway` because `netns::sweep` of another run spares only such processes.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ChildStdin;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use futures_util::{SinkExt as _, StreamExt as _};
use gateway_tests::net::process::{self, Logs, Process, Spawn};
use gateway_tests::net::topology::{PORTAL, Plan, Topology};
use gateway_tests::net::{netns, services};
use gateway_tests::scenario::cannot_run;
use gateway_tests::standins::client::{Command, Config, Event, Generation, Path};
use gateway_tests::standins::phoenix::Frame;
use gateway_tests::standins::portal::{self, Portal, Relay, Resource, Role};
use is::stun::{StunMessage, StunPacket};
use is::{Candidate, IceAgent, IceAgentEvent, IceCreds, Protocol};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

const SOON: Duration = Duration::from_secs(10);
/// The fake gateway refuses this address of the LAN.
const FORBIDDEN: Ipv4Addr = Ipv4Addr::new(172, 20, 0, 13);

#[test]
fn head_client_reaches_a_gateway_directly() {
    reach(Plan::new("standin direct"), Generation::Head, &[Path::Direct]);
}

#[test]
fn nov25_client_reaches_a_gateway_through_its_relay() {
    let plan = Plan { relay_only: true, ..Plan::new("standin relayed") };
    reach(plan, Generation::Nov25, &[Path::Relayed]);
}

/// Namespaces are named after the process: one topology at a time in each.
static TOPOLOGY: Mutex<()> = Mutex::new(());

fn reach(plan: Plan, generation: Generation, paths: &[Path]) {
    let _alone = TOPOLOGY.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(reason) = cannot_run() {
        eprintln!("skipped: {reason}");
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let logs = Logs::new(folder.path().to_path_buf()).expect("a folder for logs");
    if let Err(error) = try_reach(plan, generation, paths, &logs) {
        panic!("{error:#}\n{}", logs.tails(40));
    }
}

fn try_reach(plan: Plan, generation: Generation, paths: &[Path], logs: &Logs) -> Result<()> {
    let topology = Topology::build(plan)?;
    topology.prepare_gateway()?;
    let relay_addrs = topology.relay_addresses(0);
    let _coturn =
        services::Relay::start(&topology.relays[0].namespace, logs, "relay0", &relay_addrs, "north")?;
    let lan = Resource::cidr("lan4", "172.20.0.0/24");
    let config = portal::Config {
        listen: SocketAddr::new(PORTAL.into(), 8081),
        resources: vec![lan.clone()],
        relays: vec![Relay::coturn([SocketAddr::new(relay_addrs[0], 3478)], "north")],
        ..portal::Config::default()
    };
    let client_config = Config {
        generation,
        request: vec![lan.id],
        ..Config::new(&format!("ws://{PORTAL}:8081/"), &config.client_token, "c")
    };
    let gateway_token = config.gateway_token.clone();
    let portal = Portal::start(Some(&topology.portal.namespace.path()), config)?;
    let heard = fake_gateway(topology.gateway.namespace.path(), topology.gateway.v4, gateway_token);
    portal.wait_online(Role::Gateway, 1, SOON)?;

    let file = logs.file("client.json");
    std::fs::write(&file, serde_json::to_string(&client_config)?)?;
    let namespace = &topology.clients[0].namespace;
    let command = [env!("CARGO_BIN_EXE_gateway-tests"), "client", "--config"].map(str::to_owned);
    let command = command.into_iter().chain([file.display().to_string()]).collect();
    let mut child =
        Process::spawn(namespace, logs, &Spawn { name: "client", command, piped: true, ..Spawn::default() })?;
    let (stdin, stdout) = child.pipes().context("pipes")?;
    let mut client = Driver::new(stdin, stdout)?;
    client.wait("joined", |e| matches!(e, Event::Joined { .. }))?;
    client.wait("authorized", |e| matches!(e, Event::Authorized { resource, .. } if *resource == lan.id))?;
    client.wait("established", |e| matches!(e, Event::Established { ms, .. } if *ms < 3000))?;
    let ping = process::run(namespace, SOON, &["ping", "-c", "5", "-i", "0.1", "-W", "1", "172.20.0.100"])?
        .success()?;
    anyhow::ensure!(ping.contains(" 0% packet loss"), "{ping}");
    // The path may have become better in the meantime.
    let path = client.last_path().context("no path was reported")?;
    anyhow::ensure!(paths.contains(&path), "unexpected path {path:?}");

    let _ = process::run(namespace, SOON, &["ping", "-c", "1", "-W", "1", &FORBIDDEN.to_string()])?;
    client.wait("prohibited", |e| *e == Event::IcmpProhibited { dst: FORBIDDEN.into() })?;

    // Idle means idle.
    let before = child.cpu_time()?;
    std::thread::sleep(Duration::from_secs(2));
    let used = child.cpu_time()? - before;
    anyhow::ensure!(used <= Duration::from_millis(60), "the idle client used {used:?} of CPU in 2 s");

    client.say(&Command::Stop)?;
    anyhow::ensure!(heard.recv_timeout(SOON)? == "goodbye", "the gateway hears the goodbye");
    anyhow::ensure!(child.wait(SOON)?.success(), "a stopped client exits 0");
    Ok(())
}

struct Driver {
    commands: ChildStdin,
    events: Receiver<Event>,
    seen: Vec<Event>,
}

impl Driver {
    fn new(commands: ChildStdin, stdout: std::process::ChildStdout) -> Result<Self> {
        let (sender, events) = mpsc::channel();
        std::thread::Builder::new().spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                eprintln!("client: {line}");
                if let Ok(event) = serde_json::from_str(&line) {
                    let _ = sender.send(event);
                }
            }
        })?;
        Ok(Self { commands, events, seen: Vec::new() })
    }

    fn say(&mut self, command: &Command) -> Result<()> {
        Ok(writeln!(self.commands, "{}", serde_json::to_string(command)?)?)
    }

    fn wait(&mut self, what: &str, matches: impl Fn(&Event) -> bool) -> Result<()> {
        let deadline = Instant::now() + SOON;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let event = self
                .events
                .recv_timeout(left)
                .with_context(|| format!("no event {what}; seen {:?}", self.seen))?;
            let found = matches(&event);
            self.seen.push(event);
            if found {
                return Ok(());
            }
        }
    }

    fn last_path(&mut self) -> Option<Path> {
        self.seen.extend(self.events.try_iter());
        self.seen.iter().rev().find_map(|e| if let Event::Path { kind, .. } = e { Some(*kind) } else { None })
    }
}

// ---- the gateway ------------------------------------------------------------------------------

/// Runs until the test process ends; what it heard inside the tunnel comes out of the channel.
fn fake_gateway(namespace: PathBuf, ip: Ipv4Addr, token: String) -> Receiver<&'static str> {
    let (sender, heard) = mpsc::channel();
    std::thread::spawn(move || {
        let run = || -> Result<()> {
            netns::enter(&namespace)?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(gateway(ip, &token, &sender))
        };
        if let Err(error) = run() {
            eprintln!("fake gateway: {error:#}");
        }
    });
    heard
}

struct Peer {
    agent: IceAgent,
    tunn: Tunn,
    route: Option<SocketAddr>,
}

async fn gateway(ip: Ipv4Addr, token: &str, heard: &Sender<&'static str>) -> Result<()> {
    let key = StaticSecret::from(rand::random::<[u8; 32]>());
    let public = STANDARD.encode(PublicKey::from(&key).as_bytes());
    let query: String = url::form_urlencoded::Serializer::new(String::new())
        .extend_pairs([("external_id", "g"), ("name", "g"), ("public_key", &public)])
        .finish();
    let request = tokio_tungstenite::tungstenite::http::Request::builder()
        .uri(format!("ws://{PORTAL}:8081/gateway/v2/websocket?{query}"))
        .header("Host", "portal")
        .header("User-Agent", "Debian/12.0.0 gateway/1.6.1")
        .header("Connection", "Upgrade")
        .header("Upgrade", "websocket")
        .header("Sec-WebSocket-Version", "13")
        .header("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")
        .header("X-Authorization", format!("Bearer {token}"))
        .body(())?;
    let stream = tokio::net::TcpStream::connect((PORTAL, 8081)).await?;
    let (mut socket, _) = tokio_tungstenite::client_async(request, stream).await?;
    let mut next_ref = 0;
    let mut text = move |event: &str, payload: Value| {
        let frame =
            Frame { topic: "gateway".into(), event: event.into(), payload, reference: Some(next_ref) };
        next_ref += 1;
        Message::text(frame.encode())
    };
    socket.send(text("phx_join", Value::Null)).await?;
    let local = SocketAddr::new(ip.into(), 52625);
    let udp = tokio::net::UdpSocket::bind(local).await?;
    let mut peer: Option<Peer> = None;
    let mut buffer = [0; 2048];
    let mut tick = tokio::time::interval(Duration::from_millis(20));
    loop {
        tokio::select! {
            message = socket.next() => {
                let Message::Text(message) = message.context("the portal went away")?? else { continue };
                let frame = Frame::decode(message.as_str())?;
                match frame.event.as_str() {
                    "create_authorization" => {
                        let (new, line) = authorized(&frame.payload, &key, local)?;
                        peer = Some(new);
                        socket.send(text("authorization_created", json!({ "ref": frame.payload["ref"] }))).await?;
                        let clients = json!([frame.payload["client"]["id"]]);
                        socket.send(text("broadcast_ice_candidates", json!({ "client_ids": clients, "candidates": [line] }))).await?;
                    }
                    "ice_candidates" => {
                        let peer = peer.as_mut().context("candidates before the authorization")?;
                        for line in frame.payload["candidates"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                            peer.agent.add_remote_candidate(Candidate::from_sdp_string(line)?);
                        }
                    }
                    _ => {}
                }
            }
            received = udp.recv_from(&mut buffer) => {
                let (length, from) = received?;
                if let Some(peer) = &mut peer {
                    for (to, bytes) in handle(peer, &buffer[..length], from, local, heard) {
                        udp.send_to(&bytes, to).await?;
                    }
                }
            }
            _ = tick.tick() => {}
        }
        if let Some(peer) = &mut peer {
            peer.agent.handle_timeout(Instant::now());
            while let Some(event) = peer.agent.poll_event() {
                if let IceAgentEvent::NominatedSend { destination, .. } = event {
                    peer.route = Some(destination);
                }
            }
            while let Some(transmit) = peer.agent.poll_transmit() {
                udp.send_to(&transmit.contents, transmit.destination).await?;
            }
        }
    }
}

fn authorized(order: &Value, key: &StaticSecret, local: SocketAddr) -> Result<(Peer, String)> {
    let creds = |name: &str| IceCreds {
        ufrag: order[name]["username"].as_str().unwrap_or_default().into(),
        pass: order[name]["password"].as_str().unwrap_or_default().into(),
    };
    let bytes = |name: &str| -> Result<[u8; 32]> {
        let decoded = STANDARD.decode(order["client"][name].as_str().unwrap_or_default())?;
        <[u8; 32]>::try_from(decoded).map_err(|_| anyhow::anyhow!("{name} has not 32 bytes"))
    };
    let mut agent = IceAgent::new(creds("gateway_ice_credentials"));
    agent.set_remote_credentials(creds("client_ice_credentials"));
    agent.set_controlling(false);
    agent.set_timing_advance(Duration::ZERO);
    let Some(line) =
        agent.add_local_candidate(Candidate::host(local, Protocol::Udp)?).map(Candidate::to_sdp_string)
    else {
        bail!("the agent refuses the host candidate");
    };
    let client_key = PublicKey::from(bytes("public_key")?);
    let tunn = Tunn::new(key.clone(), client_key, Some(bytes("preshared_key")?), None, 7, None);
    Ok((Peer { agent, tunn, route: None }, line))
}

fn handle(
    peer: &mut Peer,
    bytes: &[u8],
    from: SocketAddr,
    local: SocketAddr,
    heard: &Sender<&'static str>,
) -> Vec<(SocketAddr, Vec<u8>)> {
    if let Ok(message) = StunMessage::parse(bytes) {
        peer.agent.handle_packet(
            Instant::now(),
            StunPacket { proto: Protocol::Udp, source: from, destination: local, message },
        );
        return Vec::new();
    }
    let (mut plain, mut out) = ([0; 2048], [0; 2048]);
    let to = peer.route.unwrap_or(from);
    match peer.tunn.decapsulate(None, bytes, &mut plain) {
        TunnResult::WriteToNetwork(reply) => vec![(to, reply.to_vec())],
        TunnResult::WriteToTunnelV4(packet, _) => {
            let Some(answer) = answer(packet) else { return Vec::new() };
            match peer.tunn.encapsulate(&answer, &mut out) {
                TunnResult::WriteToNetwork(reply) => vec![(to, reply.to_vec())],
                _ => Vec::new(),
            }
        }
        TunnResult::WriteToTunnelV6(packet, _) if packet[6] == 0xFF && packet[40] == 2 => {
            let _ = heard.send("goodbye");
            Vec::new()
        }
        _ => Vec::new(),
    }
}

/// An echo reply, or "administratively prohibited" for the forbidden address.
fn answer(packet: &[u8]) -> Option<Vec<u8>> {
    if packet[9] != 1 || packet[20] != 8 {
        return None;
    }
    let mut reply = if packet[16..20] == FORBIDDEN.octets() {
        let mut reply = packet[..28].to_vec();
        reply[2..4].copy_from_slice(&56_u16.to_be_bytes());
        reply[20..28].copy_from_slice(&[3, 13, 0, 0, 0, 0, 0, 0]);
        reply.extend(&packet[..28]);
        reply
    } else {
        let mut reply = packet.to_vec();
        reply[20] = 0;
        reply
    };
    let (source, destination) = (packet[12..16].to_vec(), packet[16..20].to_vec());
    reply[12..16].copy_from_slice(&destination);
    reply[16..20].copy_from_slice(&source);
    for (range, at) in [(0..20, 10), (20..reply.len(), 22)] {
        reply[at..at + 2].fill(0);
        let words = reply[range].chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0)));
        let mut sum: u32 = words.sum();
        while sum > 0xFFFF {
            sum = (sum & 0xFFFF) + (sum >> 16);
        }
        let sum = !u16::try_from(sum).ok()?;
        reply[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    }
    Some(reply)
}
