//! What the control socket tells of a daemon that works: `status`, `why`, `flows`, `top`, `bundle`, against what really
//! happened.

use std::{os::unix::fs::PermissionsExt as _, path::PathBuf, thread::ScopedJoinHandle, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;

use super::{
    Context,
    capture::shown_in_readme,
    fast_path::{self, Proof},
    lab::{Lab, Launch, Options, curl, lan4, lan6, launch, ping_both, ping_raw},
    rest,
};
use crate::{
    net::{
        process::{Outcome, run, wait_for},
        services::checksum,
        topology::LAN_HOST,
    },
    standins::{
        client::Path,
        portal::{Filter, FlowLogs, Role},
    },
};

const SECOND: Duration = Duration::from_secs(1);
/// Debian's.
const PYTHON: &str = "/usr/bin/python3";

/// Runs `firezone-gateway` with these arguments against the daemon of the scenario.
fn ask(cx: &Context, arguments: &[&str]) -> Result<Outcome> {
    let (program, socket) = (cx.gateway.display().to_string(), socket(cx).display().to_string());
    let command = [&[program.as_str(), "--control-socket", socket.as_str()], arguments].concat();
    run(&cx.topology.gateway.namespace, 20 * SECOND, &command)
}

fn socket(cx: &Context) -> PathBuf {
    cx.logs.file("control.sock")
}

fn status(cx: &Context) -> Result<Value> {
    Ok(serde_json::from_str(&ask(cx, &["status", "--json"])?.success()?)?)
}

/// Path, endpoints, volumes, handshake, resources and relays are those of the connection that the client has.
pub(super) fn status_during_ping(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options::default())?;
    let nobody = status(cx)?;
    ensure!(nobody["clients"] == Value::Array(Vec::new()), "clients before any came: {nobody}");
    lab.connect(0, &[lan4(), lan6()])?;
    ping_both(&cx.topology.clients[0].namespace)?;
    let kind = match lab.clients[0].path().context("the client named no path")? {
        Path::Direct | Path::Relayed => "direct",
        Path::ToRelay | Path::RelayedToRelay => "relayed",
    };
    let before = status(cx)?;
    let client = &before["clients"][0];
    ensure!(client["id"] == lab.client_id(0)?.to_string(), "{before}");
    ensure!(client["connection"] == "connected" && client["path"]["kind"] == kind, "not {kind}: {client}");
    ensure!(client["path"]["relay"].is_string() == (kind == "relayed"), "{client}");
    let age = client["handshake_age_seconds"].as_f64().context("no handshake")?;
    ensure!((0.0..60.0).contains(&age), "a handshake {age} s ago");
    let resources = client["resources"].as_array().context("resources are no list")?;
    ensure!(resources.len() == 2, "{client}");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    for resource in resources {
        let until = resource["expires_at"].as_u64().context("no expiry")?;
        ensure!((now + 1800..now + 5400).contains(&until), "an hour was granted, until {until} at {now}");
    }
    let relay = &before["relays"][0];
    ensure!(
        relay["state"] == "allocated" && relay["rtt_seconds"].as_f64().is_some_and(|rtt| rtt < 1.0),
        "{relay}"
    );
    ensure!(kind != "relayed" || relay["channels"].as_u64() >= Some(1), "{relay}");
    ensure!(
        before["ready"] == true && before["portal"]["connected"] == true && before["tun"]["up"] == true,
        "{before}"
    );
    ensure!(before["dns"]["listening"] == true, "{before}");
    let fast = &before["fast_path"];
    ensure!(
        fast["on"] == cx.variation.is_fast() && fast["mode"].is_string() == (fast["on"] == true),
        "{fast}"
    );
    ensure!(fast["words"].as_str().is_some_and(|words| words.starts_with("o")), "{fast}");

    // Ten echoes of 84 bytes, each way; the client's kernel may say a little more on its own.
    let said =
        ping_raw(&cx.topology.clients[0].namespace, &["-c", "10", "-i", "0.1", &LAN_HOST.0.to_string()])?;
    ensure!(said.status.success(), "{}", said.stdout);
    let after = status(cx)?;
    for way in ["outbound", "inbound"] {
        let grown = |what: &str, of: &Value| of["clients"][0][way][what].as_u64();
        let packets = grown("packets", &after).zip(grown("packets", &before)).map(|(a, b)| a - b);
        let bytes = grown("bytes", &after).zip(grown("bytes", &before)).map(|(a, b)| a - b);
        ensure!(packets.is_some_and(|n| (10..30).contains(&n)), "{way}: {packets:?} packets for 10");
        ensure!(bytes.is_some_and(|n| (840..3000).contains(&n)), "{way}: {bytes:?} bytes for 840");
    }
    let text = ask(cx, &["status"])?.success()?;
    for expect in
        ["ready: yes", "portal: connected", &format!("path: {kind}"), "latest handshake:", "172.20.0.0/24"]
    {
        ensure!(text.contains(expect), "no {expect:?} in {text}");
    }
    if kind == "direct" {
        shown_in_readme("firezone-gateway status", &text)?;
    }
    let mode = std::fs::metadata(socket(cx))?.permissions().mode() & 0o777;
    ensure!(mode == 0o600, "the socket has mode {mode:o}");
    let program = cx.gateway.display().to_string();
    let socket = socket(cx).display().to_string();
    let nobody =
        ["setpriv", "--reuid=65534", "--clear-groups", &program, "--control-socket", &socket, "status"];
    let refused = run(&cx.topology.gateway.namespace, 10 * SECOND, &nobody)?;
    ensure!(!refused.status.success(), "somebody else may ask: {}", refused.stdout);
    lab.finish()
}

/// Permitted, filtered, unknown; and what a packet really meets is the same.
pub(super) fn why(cx: &mut Context) -> Result<()> {
    "off".clone_into(&mut cx.variation.fast_path);
    let only = lan4().with_filters([Filter::tcp(80, 80)]);
    let options = Options { resources: vec![only.clone(), lan6()], ..Options::default() };
    let mut lab = Lab::start(cx, &options)?;
    lab.connect(0, &[only, lan6()])?;
    let now = status(cx)?;
    let tunnel = now["clients"][0]["tunnel"][0].as_str().context("no tunnel address")?.to_owned();
    let host = LAN_HOST.0.to_string();
    let table: [(&[&str], &str, &str); 6] = [
        (&[&tunnel, &host, "tcp", "80"], "permitted", "lan4"),
        (&[&tunnel, &host, "tcp", "22"], "dropped", "permits tcp 80"),
        (&[&tunnel, &host, "icmp"], "dropped", "not_allowed"),
        (&[&tunnel, "192.0.2.250", "udp", "53"], "dropped", "no resource"),
        (&[&host, &tunnel, "tcp", "80"], "permitted", "from"),
        (&[&host, "192.0.2.250", "47"], "unknown", "status"),
    ];
    for (arguments, verdict, words) in table {
        let json = ask(cx, &[&["why", "--json"], arguments].concat())?.success()?;
        let json: Value = serde_json::from_str(&json)?;
        ensure!(json["verdict"] == verdict, "{arguments:?}: {json}");
        let text = ask(cx, &[&["why"], arguments].concat())?.success()?;
        ensure!(text.contains(words), "{arguments:?}: no {words:?} in {text}");
    }
    let url = format!("http://{host}/");
    let client = &cx.topology.clients[0].namespace;
    curl(client, &["-f", "-o", "/dev/null", &url])?.success().context("port 80 is permitted")?;
    let said = ping_raw(client, &[&host])?;
    ensure!(!said.status.success(), "ICMP is not permitted, yet {}", said.stdout);
    for (arguments, words) in [
        (&["why", &tunnel, &host, "tcp"][..], "needs a \"port\""),
        (&["why", &tunnel, "::1", "icmp"], "of one family"),
        (&["fast-path", "on"], "start the gateway with --fast-path auto"),
        (&["flows", "--client", "bob"], "client's id"),
    ] {
        let said = ask(cx, arguments)?;
        ensure!(!said.status.success() && said.stderr.contains(words), "{arguments:?}: {}", said.stderr);
    }
    lab.finish()
}

/// Switched off and on, again and again, while 100 MB come down and 100 MB go up: nothing is lost or comes twice, and the
/// kernel's own counters say that it was really off and on.
pub(super) fn fast_path_switched(cx: &mut Context) -> Result<()> {
    "native".clone_into(&mut cx.variation.fast_path);
    fast_path::prepare(&cx.topology)?;
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    let proof = Proof::of(&cx.topology);
    wait_for("a fast path that is on", 10 * SECOND, || {
        Ok((status(cx)?["fast_path"]["on"] == true).then_some(()))
    })?;

    let client = &cx.topology.clients[0].namespace;
    let (down, source) = (cx.logs.file("down"), cx.big.path.display().to_string());
    let (target, get, put) = (
        down.display().to_string(),
        format!("http://{}/big", LAN_HOST.0),
        format!("http://[{}]/put/up", LAN_HOST.1),
    );
    // So slow that it lasts for some switches.
    let transfer = |arguments: &[&str]| {
        let curl = [&["curl", "-sS", "-f", "--limit-rate", "12M"], arguments].concat();
        run(client, 60 * SECOND, &curl)?.success()
    };
    let (mut switches, mut fast_frames) = (0, 0);
    std::thread::scope(|scope| -> Result<()> {
        let transfers = [
            scope.spawn(|| transfer(&["-o", &target, &get])),
            scope.spawn(|| transfer(&["-T", &source, &put])),
        ];
        while !transfers.iter().any(ScopedJoinHandle::is_finished) {
            let said = ask(cx, &["fast-path", "off"])?.success()?;
            ensure!(said.contains("switched off, eth0: native"), "{said}");
            let before = proof.redirected()?;
            std::thread::sleep(SECOND / 5);
            let frames = proof.redirected()? - before;
            ensure!(frames == 0, "{frames} frames took the fast path while it was off");
            let mode = if switches % 4 == 0 { "auto" } else { "on" };
            let said = ask(cx, &["fast-path", mode])?.success()?;
            ensure!(said.contains("on, eth0: native"), "{said}");
            let before = proof.redirected()?;
            std::thread::sleep(SECOND / 5);
            fast_frames += proof.redirected()? - before;
            switches += 2;
        }
        for transfer in transfers {
            transfer.join().map_err(|_| anyhow::anyhow!("a transfer panicked"))??;
        }
        Ok(())
    })?;
    ensure!(switches >= 8, "{switches} switches during the transfers");
    // Of 12 MB/s each way come 10 000 frames a second, more or less.
    ensure!(fast_frames > 1000, "{fast_frames} frames took the fast path while it was on");
    ensure!(checksum(&down)? == cx.big.sha256, "what came down is not what is there");
    ensure!(lab.lan.uploaded("up")? == cx.big.sha256, "what came up is not what was sent");
    std::fs::remove_file(down)?;
    let after = status(cx)?;
    ensure!(after["fast_path"]["on"] == true && after["fast_path"]["mode"] == "native", "{after}");
    // None came twice, and none so late that it could not be told from one that did.
    ensure!(after["drops"]["data_replayed"].is_null(), "{}", after["drops"]);
    lab.finish()
}

/// Rates on a terminal, open flows, and an archive without secrets; the socket of a killed daemon is no obstacle.
pub(super) fn top_flows_bundle(cx: &mut Context) -> Result<()> {
    let launched = Launch::default().with("FIREZONE_FLOW_LOGS", "true");
    let launched = launched.with("FIREZONE_FLOW_LOGS_DIR", cx.logs.file("spool").display().to_string());
    let options = Options { launch: launched, flow_logs: FlowLogs::default(), ..Options::default() };
    let mut lab = Lab::start(cx, &options)?;
    lab.connect(0, &[lan4(), lan6()])?;
    let id = lab.client_id(0)?.to_string();

    let (program, path) = (cx.gateway.display().to_string(), socket(cx).display().to_string());
    let namespace = &cx.topology.gateway.namespace;
    let script = include_str!("top.py");
    let top = [PYTHON, "-c", script, "5", &program, "--control-socket", &path, "top"];
    let drawn = std::thread::scope(|scope| -> Result<Outcome> {
        let client = &cx.topology.clients[0].namespace;
        let host = LAN_HOST.0.to_string();
        let pinging = scope.spawn(move || {
            let ping = ["ping", "-n", "-q", "-c", "80", "-i", "0.1", "-s", "1000", "-W", "2", &host];
            run(client, 30 * SECOND, &ping)
        });
        let drawn = run(namespace, 40 * SECOND, &top)?;
        let said = pinging.join().map_err(|_| anyhow::anyhow!("the ping panicked"))??;
        ensure!(said.status.success(), "{}", said.stdout);
        Ok(drawn)
    })?;
    let drawn: Value = serde_json::from_str(&drawn.success()?)?;
    ensure!(drawn["status"] == 0, "top did not end in order on q: {drawn}");
    let lines = drawn["screen"].as_array().context("no screen")?;
    let screen = lines.iter().filter_map(Value::as_str).collect::<Vec<_>>().join("\n");
    shown_in_readme("firezone-gateway top", &screen)?;
    for expect in [&id[..12], "direct", "KiB/s", "WORKER", "q quit", "ready, portal connected"] {
        ensure!(screen.contains(expect), "no {expect:?} on the screen:\n{screen}");
    }

    let url = format!("http://{}/", LAN_HOST.0);
    curl(&cx.topology.clients[0].namespace, &["-f", "-o", "/dev/null", &url])?.success()?;
    let flows: Value = serde_json::from_str(&ask(cx, &["flows", "--json", "--client", &id])?.success()?)?;
    ensure!(flows["counted"] == true, "{flows}");

    // What is secret, and whether it stands anywhere in the archive.
    let archive = cx.logs.file("support.tar");
    ask(cx, &["bundle", "--output", &archive.display().to_string()])?.success()?;
    let text = std::fs::read(&archive)?;
    let holds = |needle: &str| text.windows(needle.len()).any(|window| window == needle.as_bytes());
    for secret in [&lab.gateway_token, &lab.client_token, &lab.relay_secret] {
        ensure!(!holds(secret), "a secret stands in the archive");
    }
    for expect in
        ["status.json", "metrics.txt", "versions.json", &id, "firezone_gateway_clients", "ip_forward"]
    {
        ensure!(holds(expect), "no {expect} in the archive");
    }
    std::fs::remove_file(&archive)?;

    lab.gateway.signal(Signal::KILL)?;
    lab.gateway.wait(5 * SECOND)?;
    ensure!(socket(cx).exists(), "the socket of a killed daemon stays");
    let said = ask(cx, &["status"])?;
    ensure!(!said.status.success() && said.stderr.contains("No gateway listens"), "{}", said.stderr);
    let (url, mark) = (lab.portal.url(), lab.portal.mark());
    lab.gateway = launch(cx, "gateway-again", &lab.gateway_token, &url, "info", &options.launch)?;
    lab.portal.wait_since(mark, 20 * SECOND, |entry| entry.to_gateway("init"))?;
    ensure!(!lab.portal.online(Role::Gateway).is_empty(), "the gateway has gone");
    wait_for("a status of the next daemon", 10 * SECOND, || Ok(status(cx).ok()))?;
    lab.clients.clear();
    rest::terminate(&mut lab.gateway, 10 * SECOND, 1)?;
    if socket(cx).exists() {
        bail!("the socket is still there after the end");
    }
    Ok(())
}
