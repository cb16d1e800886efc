//! The ways in which an operator starts the daemon: with which rights, credentials, roots, names and address families.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use serde_json::Value;

use super::{
    Context, Skip,
    lab::{
        Lab, Launch, Options, PORTAL_PORT, health, http_both, is_up, lan4, lan6, launch, ping, ping_both,
        start_gateway,
    },
    rest,
    trouble::is_one_sentence,
};
use crate::{
    net::{
        process::{Process, Spawn, wait_for},
        services::Relay,
        topology::{LAN_HOST, PORTAL},
    },
    standins::portal::{self, Portal, Role},
};

const SECOND: Duration = Duration::from_secs(1);

/// `/readyz` says no until TUN, DNS servers and a relay are up and the portal was reached, and what is missing; `/healthz`
/// says yes from the start.
pub(super) fn readiness(cx: &mut Context) -> Result<()> {
    let url = format!("ws://{PORTAL}:{PORTAL_PORT}/");
    let mut gateway = start_gateway(cx, "gateway", "a-gateway-token", &url, "info")?;
    wait_for("the health port", 3 * SECOND, || Ok((health(cx, "/healthz")?.0 == 200).then_some(())))?;
    let alive: Value = serde_json::from_str(&health(cx, "/healthz")?.1)?;
    ensure!(alive["alive"] == true, "{alive}");
    let (status, body) = health(cx, "/readyz")?;
    ensure!(status == 503, "ready without a portal: {status} {body}");
    let conditions = ["tun", "dns_listening", "relay", "portal"];
    for condition in conditions {
        ensure!(!is_up(cx, condition)?, "{condition} without a portal: {body}");
    }
    let report: Value = serde_json::from_str(&body)?;
    ensure!(report["missing"] == serde_json::json!(conditions), "{body}");
    ensure!(report["portal_was_reached"] == false, "{body}");
    ensure!(report["portal_partition_seconds"].as_f64().is_some_and(|age| age < 60.0), "{body}");
    ensure!(health(cx, "/elsewhere")?.0 == 404, "an unknown path");
    let (addresses, secret) = (cx.topology.relay_addresses(0), "a relay secret");
    let relay = &cx.topology.relays[0].namespace;
    let _coturn = Relay::start(relay, &cx.logs, "relay", &addresses, secret)?;
    let servers: Vec<_> = addresses.into_iter().map(|ip| SocketAddr::new(ip, 3478)).collect();
    let offer = portal::Relay::coturn(servers, secret);
    let config = portal::Config {
        listen: SocketAddr::new(PORTAL.into(), PORTAL_PORT),
        gateway_token: "a-gateway-token".to_owned(),
        ..portal::Config::default()
    };
    let mut portal = Portal::start(Some(&cx.topology.portal.namespace.path()), config)?;
    portal.wait_online(Role::Gateway, 1, 5 * SECOND)?;
    for condition in ["tun", "dns_listening", "portal"] {
        wait_for(condition, 2 * SECOND, || Ok(is_up(cx, condition)?.then_some(())))?;
    }
    // The portal's `init` had no relays.
    let (status, body) = health(cx, "/readyz")?;
    let report: Value = serde_json::from_str(&body)?;
    ensure!(status == 503, "no relay can be reached, and it is ready");
    ensure!(report["missing"] == serde_json::json!(["relay"]), "{body}");
    portal.set_relays(vec![offer]);
    wait_for("/readyz to say yes", 5 * SECOND, || Ok((health(cx, "/readyz")?.0 == 200).then_some(())))?;
    for condition in conditions {
        ensure!(is_up(cx, condition)?, "{condition} is not up");
    }
    portal.stop();
    wait_for("/readyz to notice", 2 * SECOND, || Ok((!is_up(cx, "portal")?).then_some(())))?;
    ensure!(health(cx, "/readyz")?.0 == 200, "a portal that is away makes nobody unready");
    ensure!(gateway.poll().is_none(), "the gateway lives");
    rest::terminate(&mut gateway, 3 * SECOND, 0)
}

/// A copy of the daemon that any user may execute: the tree it was built in may be closed to others.
fn for_everybody(cx: &mut Context) -> Result<()> {
    let copy = cx.logs.file("firezone-gateway");
    std::fs::copy(&cx.gateway, &copy)
        .with_context(|| format!("{} cannot be copied", cx.gateway.display()))?;
    std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755))?;
    cx.gateway = copy;
    // Where its control socket will be.
    std::fs::set_permissions(cx.logs.directory(), std::fs::Permissions::from_mode(0o777))?;
    Ok(())
}

pub(super) fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// nobody (65534), with the named capabilities and no others.
fn as_nobody(capabilities: &str) -> Launch {
    let wrapper = format!(
        "setpriv --reuid=65534 --regid=65534 --clear-groups --bounding-set=-all{capabilities} \
         --inh-caps=-all{capabilities} --ambient-caps=-all{capabilities} --no-new-privs --pdeathsig=KILL --"
    );
    Launch { wrapper: words(&wrapper), ..Launch::default() }
}

/// CAP_NET_ADMIN and no other right is enough; the token may be a systemd credential.
pub(super) fn one_capability(cx: &mut Context) -> Result<()> {
    // What it may not do here.
    "off".clone_into(&mut cx.variation.fast_path);
    for_everybody(cx)?;
    let mut way = as_nobody(",+net_admin");
    if std::fs::metadata("/dev/net/tun")?.permissions().mode() & 0o006 != 0o006 {
        let url = format!("ws://{PORTAL}:{PORTAL_PORT}/");
        let mut gateway = launch(cx, "closed", "a-token", &url, "info", &way)?;
        let status = gateway.wait(3 * SECOND)?;
        ensure!(status.code() == Some(1), "without /dev/net/tun it ended with {status}");
        is_one_sentence(&gateway.log(), "/dev/net/tun").context("a device file that is closed to it")?;
    }
    way.wrapper.splice(0..0, open_tun_device(cx)?);
    let mut lab = Lab::start(cx, &Options { launch: way, ..Options::default() })?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", lab.gateway.pid()))?;
    let field =
        |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
    ensure!(field("CapEff:") == "0000000000001000", "it runs with {status}");
    ensure!(field("Uid:").starts_with("65534"), "it runs with {status}");
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    ping_both(client)?;
    http_both(client)?;
    lab.terminate(3 * SECOND)?;
    let rules = crate::net::process::run(
        &cx.topology.gateway.namespace,
        2 * SECOND,
        &["ip", "rule", "list", "priority", "100"],
    )?;
    ensure!(rules.stdout.trim().is_empty(), "it left behind {}", rules.stdout);
    Ok(())
}

/// CAP_NET_ADMIN by the program's file only: what it starts has no right to nftables. It says so once, and serves.
pub(super) fn file_capability(cx: &mut Context) -> Result<()> {
    "off".clone_into(&mut cx.variation.fast_path);
    for_everybody(cx)?;
    let file = cx.gateway.display().to_string();
    let gateway = &cx.topology.gateway.namespace;
    let given = crate::net::process::run(gateway, 2 * SECOND, &["setcap", "cap_net_admin+ep", &file]);
    if let Err(error) = given.and_then(crate::net::process::Outcome::success) {
        return Err(Skip(format!("a file cannot be given capabilities: {error:#}")).into());
    }
    let mut wrapper = open_tun_device(cx)?;
    wrapper.extend(words(
        "setpriv --reuid=65534 --regid=65534 --clear-groups --bounding-set=-all,+net_admin --inh-caps=-all \
         --ambient-caps=-all --",
    ));
    let mut lab =
        Lab::start(cx, &Options { launch: Launch { wrapper, ..Launch::default() }, ..Options::default() })?;
    lab.expect_warning("AmbientCapabilities=");
    lab.connect(0, &[lan4(), lan6()])?;
    let warnings: Vec<String> =
        lab.gateway.log().lines().filter(|line| line.contains(" WARN ")).map(str::to_owned).collect();
    ensure!(warnings.len() == 1, "{warnings:?}");
    ensure!(
        warnings[0].contains("`nft` is not permitted to; give CAP_NET_ADMIN as an ambient capability"),
        "{warnings:?}"
    );
    ensure!(ping(&cx.topology.clients[0].namespace, LAN_HOST.0.into()).is_err(), "it works all the same");
    // Forwarding it could turn on itself; masquerading is the operator's now.
    cx.topology.prepare_gateway()?;
    ping_both(&cx.topology.clients[0].namespace)?;
    lab.terminate(3 * SECOND)
}

/// A wrapper that shows the daemon a /dev/net/tun that everybody may open, as udev makes it; here it may be root's alone.
fn open_tun_device(cx: &Context) -> Result<Vec<String>> {
    let device = cx.logs.file("tun");
    let device = device.display();
    let script = format!("mount --bind '{device}' /dev/net/tun && exec \"$@\"");
    let wrapper = in_mount_namespace(&script);
    let node = format!("mknod '{device}' c 10 200 && chmod 0666 '{device}'");
    let made = crate::net::process::run(&cx.topology.gateway.namespace, 2 * SECOND, &["sh", "-c", &node])?;
    made.success().map_err(|error| Skip(format!("no device node can be made: {error}")))?;
    can_run(cx, &wrapper)?;
    Ok(wrapper)
}

/// Runs `script` in a mount namespace of its own; at its end `"$@"` is the program.
pub(super) fn in_mount_namespace(script: &str) -> Vec<String> {
    ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"].map(str::to_owned).to_vec()
}

pub(super) fn can_run(cx: &Context, wrapper: &[String]) -> Result<()> {
    let command: Vec<&str> = wrapper.iter().map(String::as_str).chain(["true"]).collect();
    let said = crate::net::process::run(&cx.topology.gateway.namespace, 2 * SECOND, &command)?;
    said.success().map_err(|error| Skip(format!("no mount namespaces here: {error}")))?;
    Ok(())
}

/// Without CAP_NET_ADMIN, as nobody or as root (as in a container), it says so in one sentence.
pub(super) fn no_capability(cx: &mut Context) -> Result<()> {
    for_everybody(cx)?;
    let root = words("setpriv --bounding-set=-net_admin --inh-caps=-net_admin --pdeathsig=KILL --");
    let url = format!("ws://{PORTAL}:{PORTAL_PORT}/");
    for (name, way) in
        [("nobody", as_nobody("")), ("root-without", Launch { wrapper: root, ..Launch::default() })]
    {
        let mut gateway = launch(cx, name, "a-token", &url, "info", &way)?;
        let status = gateway.wait(3 * SECOND)?;
        let said = gateway.log();
        ensure!(status.code() == Some(1), "{name}: {status}: {said}");
        is_one_sentence(&said, "CAP_NET_ADMIN").context(name)?;
    }
    Ok(())
}

/// The token comes as a systemd credential; a missing or empty one is named.
pub(super) fn credential(cx: &mut Context) -> Result<()> {
    let folder = cx.logs.file("credentials");
    std::fs::create_dir_all(&folder)?;
    let way = Launch {
        environment: vec![("CREDENTIALS_DIRECTORY", folder.display().to_string())],
        without: &["FIREZONE_TOKEN"],
        ..Launch::default()
    };
    let url = format!("ws://{PORTAL}:{PORTAL_PORT}/");
    for (name, content) in [("missing", None), ("empty", Some(" \n"))] {
        if let Some(content) = content {
            std::fs::write(folder.join("FIREZONE_TOKEN"), content)?;
        }
        let mut gateway = launch(cx, name, "", &url, "info", &way)?;
        let status = gateway.wait(3 * SECOND)?;
        let said = gateway.log();
        ensure!(status.code() == Some(1), "{name}: {status}: {said}");
        is_one_sentence(&said, "FIREZONE_TOKEN").context(name)?;
    }
    std::fs::write(folder.join("FIREZONE_TOKEN"), "a-token-of-systemd\n")?;
    let config = portal::Config {
        listen: SocketAddr::new(PORTAL.into(), PORTAL_PORT),
        gateway_token: "a-token-of-systemd".to_owned(),
        ..portal::Config::default()
    };
    let portal = Portal::start(Some(&cx.topology.portal.namespace.path()), config)?;
    let mut gateway = launch(cx, "gateway", "", &url, "info", &way)?;
    portal.wait_online(Role::Gateway, 1, 5 * SECOND)?;
    rest::terminate(&mut gateway, 3 * SECOND, 0)
}

/// A portal with a certificate of its own authority: by flag's variable, by SSL_CERT_FILE, and not without either.
pub(super) fn private_authority(cx: &mut Context) -> Result<()> {
    let (tls, roots) = certificates(cx.logs.directory())?;
    let config = portal::Config {
        listen: SocketAddr::new(PORTAL.into(), PORTAL_PORT),
        gateway_token: "a-token".to_owned(),
        tls: Some(tls),
        ..portal::Config::default()
    };
    let portal = Portal::start(Some(&cx.topology.portal.namespace.path()), config)?;
    ensure!(portal.url().starts_with("wss://"), "{}", portal.url());
    let roots = roots.display().to_string();
    for variable in ["FIREZONE_CA_FILE", "SSL_CERT_FILE"] {
        let way = Launch { environment: vec![(variable, roots.clone())], ..Launch::default() };
        let mark = portal.mark();
        let mut gateway = launch(cx, variable, "a-token", &portal.url(), "info", &way)?;
        portal.wait_since(mark, 5 * SECOND, |entry| entry.to_gateway("init")).context(variable)?;
        wait_for("the TUN device", 2 * SECOND, || Ok(is_up(cx, "tun")?.then_some(())))?;
        rest::terminate(&mut gateway, 3 * SECOND, 0).context(variable)?;
        wait_for("the portal to see it go", 2 * SECOND, || {
            Ok(portal.online(Role::Gateway).is_empty().then_some(()))
        })?;
    }
    let mark = portal.mark();
    let mut gateway = start_gateway(cx, "untrusting", "a-token", &portal.url(), "info")?;
    // A wrong certificate may be mended at the portal, so it tries again for 15 s before it gives up.
    let said = wait_for("a word about the certificate", 5 * SECOND, || {
        Ok(Some(gateway.log()).filter(|said| said.contains("certificate")))
    })?;
    ensure!(said.contains("ca-file") || said.contains("CA_FILE"), "the cure is not named: {said}");
    ensure!(
        !portal.log_since(mark).iter().any(|entry| entry.to_gateway("init")),
        "it trusts a stranger's certificate"
    );
    ensure!(gateway.poll().is_none_or(|status| status.code() == Some(1)), "{said}");
    Ok(())
}

/// An authority, and a portal's certificate of it for the portal's address: PEM files in `folder`.
pub(super) fn certificates(folder: &Path) -> Result<(portal::Tls, PathBuf)> {
    let authority_key = rcgen::KeyPair::generate()?;
    let mut authority = rcgen::CertificateParams::new(Vec::new())?;
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let certificate = authority.self_signed(&authority_key)?;
    let issuer = rcgen::Issuer::new(authority, authority_key);
    let key = rcgen::KeyPair::generate()?;
    let leaf = rcgen::CertificateParams::new(vec![PORTAL.to_string()])?.signed_by(&key, &issuer)?;
    let (chain, key_file, roots) =
        (folder.join("portal.pem"), folder.join("portal.key"), folder.join("roots.pem"));
    std::fs::write(&chain, pem("CERTIFICATE", leaf.der()))?;
    std::fs::write(&key_file, pem("PRIVATE KEY", key.serialized_der()))?;
    std::fs::write(&roots, pem("CERTIFICATE", certificate.der()))?;
    Ok((portal::Tls { certificates: chain, key: key_file }, roots))
}

fn pem(label: &str, der: &[u8]) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN {label}-----\n{text}\n-----END {label}-----\n")
}

/// The portal is named, not numbered; the name's server moves while the gateway runs.
pub(super) fn portal_by_name(cx: &mut Context) -> Result<()> {
    /// A second address of the portal's host, for the second name server.
    const OTHER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 67);
    let host = &cx.topology.portal.namespace;
    host.ip_batch(&[format!("addr add {OTHER}/26 dev eth0")])?;
    let name_server = |name: &str, address: Ipv4Addr| -> Result<Process> {
        let command = format!(
            "dnsmasq --keep-in-foreground --conf-file=/dev/null --user=root --no-resolv --no-hosts --pid-file= \
             --log-facility=- --log-queries --bind-interfaces --listen-address={address} --except-interface=lo \
             --host-record=portal.lab.test,{PORTAL}"
        );
        Process::spawn(host, &cx.logs, &Spawn { name, command: words(&command), ..Spawn::default() })
    };
    let mut first = name_server("names", PORTAL)?;
    let resolver = cx.logs.file("resolv.conf");
    let nobody = cx.logs.file("hosts");
    std::fs::write(&resolver, format!("nameserver {PORTAL}\noptions timeout:1 attempts:2\n"))?;
    std::fs::write(&nobody, "127.0.0.1 localhost\n")?;
    let (conf, hosts) = (resolver.display(), nobody.display());
    let script =
        format!("mount --bind '{conf}' /etc/resolv.conf && mount --bind '{hosts}' /etc/hosts && exec \"$@\"");
    let wrapper = in_mount_namespace(&script);
    can_run(cx, &wrapper)?;
    let options = Options {
        gateway_url: Some(format!("ws://portal.lab.test:{PORTAL_PORT}/")),
        launch: Launch { wrapper, ..Launch::default() },
        ..Options::default()
    };
    let mut lab = Lab::start(cx, &options)?;
    lab.connect(0, &[lan4(), lan6()])?;
    http_both(&cx.topology.clients[0].namespace)?;
    ensure!(first.log().contains("portal.lab.test"), "the name server was not asked");

    // The old name server dies, the file names the new one; the portal's socket breaks.
    first.signal(rustix::process::Signal::KILL)?;
    first.wait(2 * SECOND)?;
    let second = name_server("names-moved", OTHER)?;
    std::fs::write(&resolver, format!("nameserver {OTHER}\noptions timeout:1 attempts:2\n"))?;
    let dropped = lab.portal.mark();
    lab.portal.drop_sockets(Some(Role::Gateway));
    lab.portal
        .wait_since(dropped, 15 * SECOND, |entry| entry.to_gateway("init"))
        .context("by the new name server")?;
    ensure!(second.log().contains("portal.lab.test"), "the new name server was not asked");
    http_both(&cx.topology.clients[0].namespace)?;
    lab.finish()
}

/// The gateway's machine has no IPv6.
pub(super) fn without_ipv6(cx: &mut Context) -> Result<()> {
    let gateway = &cx.topology.gateway.namespace;
    gateway.sysctl(&["net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1"])?;
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    ping(client, LAN_HOST.0.into())?;
    ensure!(ping(client, LAN_HOST.1.into()).is_err(), "IPv6 through a gateway without IPv6");
    ping(client, LAN_HOST.0.into()).context("after IPv6 packets had nowhere to go")?;
    // And after a second `init`, which finds the interface as it is.
    let dropped = lab.portal.mark();
    lab.portal.drop_sockets(Some(Role::Gateway));
    lab.portal.wait_since(dropped, 20 * SECOND, |entry| entry.to_gateway("init"))?;
    ping(client, LAN_HOST.0.into())?;
    lab.finish()
}

/// The gateway's machine has no IPv4 address.
pub(super) fn without_ipv4(cx: &mut Context) -> Result<()> {
    let gateway = &cx.topology.gateway.namespace;
    gateway.ip_batch(&["addr del 198.51.100.2/24 dev eth0", "addr del 172.20.0.1/24 dev eth1"])?;
    let portal_v6 = cx.topology.portal.v6.context("a dual-stack topology")?;
    let options = Options {
        listen: SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), PORTAL_PORT),
        gateway_url: Some(format!("ws://[{portal_v6}]:{PORTAL_PORT}/")),
        client_url: Some(format!("ws://{PORTAL}:{PORTAL_PORT}/")),
        ..Options::default()
    };
    let mut lab = Lab::start(cx, &options)?;
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    ping(client, LAN_HOST.1.into())?;
    let body = super::lab::curl(client, &[&format!("http://[{}]/", LAN_HOST.1)])?.success()?;
    ensure!(body == "hello from the LAN\n", "{body:?}");
    ensure!(ping(client, LAN_HOST.0.into()).is_err(), "IPv4 through a gateway without IPv4");
    ping(client, LAN_HOST.1.into()).context("after IPv4 packets had nowhere to go")?;
    lab.finish()
}
