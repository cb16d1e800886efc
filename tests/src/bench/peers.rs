//! Plain WireGuard servers in the gateway's namespace, and the client of each.
//!
//! They decrypt, check the source against allowed-ips and forward; they have no portal, no ICE, no relays and no policy.

use std::{net::Ipv4Addr, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use boringtun::x25519::{PublicKey, StaticSecret};

use super::{
    accounting::GATEWAY_CORE,
    bed::{self, Who},
};
use crate::{
    net::process::{Process, Spawn, run, wait_for},
    scenario::Context,
    standins::client::PlainConfig,
};

/// A running server and its client.
pub(super) struct Peer {
    pub(super) who: Who,
    _client: Process,
    pub(super) server: Process,
}

/// Both servers put their control socket here, and leave it behind when they are killed; so each has the folder for itself.
const SOCKETS: &str = "/run/wireguard";
const OWN_FOLDER: &str = r#"mkdir -p "$0" && mount -t tmpfs tmpfs "$0" && exec "$@""#;

/// Starts and configures both.
///
/// # Errors
/// If a program is not installed or does not come up.
pub(super) fn start(cx: &Context, who: Who) -> Result<Peer> {
    let (number, program, arguments): (u8, PathBuf, &[&str]) = match who {
        Who::BoringTun => {
            let program = boringtun_cli()?;
            (1, program, &["--foreground", "--disable-drop-privileges", "--threads", "1"])
        }
        _ => (2, "wireguard-go".into(), &["--foreground"]),
    };
    let topology = &cx.topology;
    let interface = format!("tun-{}-{number}", std::process::id());
    let address = Ipv4Addr::new(10, 77, number, 1);
    let client_address = Ipv4Addr::new(10, 77, number, 2);
    let port = 51_820 + u16::from(number);
    let (server_key, client_key) = (keys(), keys());

    let core = GATEWAY_CORE.to_string();
    let pinned =
        ["unshare", "-m", "sh", "-c", OWN_FOLDER, SOCKETS, "taskset", "-c", &core].map(str::to_owned);
    let words = arguments.iter().map(|&word| word.to_owned()).chain([interface.clone()]);
    let command = pinned.into_iter().chain([program.display().to_string()]).chain(words).collect();
    let what = Spawn { name: who.name(), command, ..Spawn::default() };
    let mut server = Process::spawn(&topology.gateway.namespace, &cx.logs, &what)?;
    let pid = server.pid().to_string();
    let socket = PathBuf::from(format!("/proc/{pid}/root{SOCKETS}/{interface}.sock"));
    wait_for("the server's socket", Duration::from_secs(3), || {
        ensure!(server.poll().is_none(), "{} ended: {}", who.name(), server.log());
        Ok(socket.exists().then_some(()))
    })?;
    let peer = Peer {
        who,
        server,
        _client: client(cx, who, number, client_address, port, &server_key, &client_key)?,
    };

    let key_file = cx.logs.file(&format!("{interface}.key"));
    std::fs::write(&key_file, base64(server_key.0.as_bytes()))?;
    let allowed = format!("{client_address}/32");
    let command = [
        "nsenter",
        "-t",
        &pid,
        "-m",
        "wg",
        "set",
        &interface,
        "listen-port",
        &port.to_string(),
        "private-key",
        &key_file.display().to_string(),
        "peer",
        &base64(client_key.1.as_bytes()),
        "allowed-ips",
        &allowed,
    ];
    run(&topology.gateway.namespace, Duration::from_secs(5), &command)?.success().context("wg set")?;
    topology.gateway.namespace.ip_batch(&[
        format!("addr add {address}/24 dev {interface}"),
        format!("link set {interface} mtu 1280 up"),
    ])?;
    Ok(peer)
}

fn client(
    cx: &Context,
    who: Who,
    number: u8,
    address: Ipv4Addr,
    port: u16,
    server: &Keys,
    own: &Keys,
) -> Result<Process> {
    let config = PlainConfig {
        tun: format!("tun-c{number}"),
        address,
        private_key: hex::encode(own.0.as_bytes()),
        peer_key: hex::encode(server.1.as_bytes()),
        endpoint: bed::endpoint(&cx.topology, port),
        routes: vec![ipnet::Ipv4Net::from(who.target()).into()],
    };
    let name = format!("{} client", who.name());
    let file = cx.logs.file(&format!("{name}.json"));
    std::fs::write(&file, serde_json::to_string(&config)?)?;
    let program = std::env::current_exe()?.display().to_string();
    let command = vec![program, "wireguard-client".into(), "--config".into(), file.display().to_string()];
    let what = Spawn { name: &name, command, ..Spawn::default() };
    Process::spawn(&cx.topology.clients[0].namespace, &cx.logs, &what)
}

type Keys = (StaticSecret, PublicKey);

fn keys() -> Keys {
    let private = StaticSecret::from(rand::random::<[u8; 32]>());
    let public = PublicKey::from(&private);
    (private, public)
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

/// `cargo xtask bench` installs it into `target/peers`; this program is in `target/release`.
fn boringtun_cli() -> Result<PathBuf> {
    let here = std::env::current_exe()?;
    let target = here.parent().and_then(|folder| folder.parent()).context("a target folder")?;
    let program = target.join("peers/bin/boringtun-cli");
    ensure!(program.exists(), "{} is not there; `cargo xtask bench` installs it", program.display());
    Ok(program)
}
