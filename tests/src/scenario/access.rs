//! Who may reach what, and how soon that changes: revocation, expiry, filters, overlaps, foreign sources.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::{
    Context,
    client::INTERFACE,
    lab::{
        Download, Lab, Options, curl, host, host_2, http_both, is_prohibited, lan4, lan6, ping, ping_both,
        ping_raw, wait_prohibited,
    },
};
use crate::{
    net::{
        process::{run, wait_for},
        topology::{LAN_HOST, LAN_HOST_2},
    },
    standins::portal::{Filter, Role},
};

const SECOND: Duration = Duration::from_secs(1);

/// One of two resources is revoked while both are in use: the next packet is refused, the other transfer goes on.
pub(super) fn revoke_one(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options { resources: vec![host(), host_2()], ..Options::default() })?;
    lab.connect(0, &[host(), host_2()])?;
    let client = &cx.topology.clients[0].namespace;
    let revoked = Download::start(cx, client, "revoked", &format!("http://{}/slow", LAN_HOST.0))?;
    let kept = Download::start(cx, client, "kept", &format!("http://{}/slow", LAN_HOST_2.0))?;
    revoked.wait_growth(2 * SECOND)?;
    kept.wait_growth(2 * SECOND)?;

    lab.portal.reject_access(lab.client_id(0)?, host().id)?;
    wait_prohibited(client, LAN_HOST.0.into(), SECOND)?;
    // What was in the socket buffers has arrived by now.
    std::thread::sleep(SECOND / 5);
    let late = revoked.growth_within(SECOND);
    ensure!(late == 0, "{late} bytes arrived after the resource was revoked");
    kept.wait_growth(2 * SECOND).context("the other transfer")?;
    // nginx sends its share of a second at once, and an echo may find a queue full of it.
    wait_for("an echo beside the transfer", 5 * SECOND, || Ok(ping(client, LAN_HOST_2.0.into()).ok()))?;
    lab.finish()
}

/// The last resource is revoked: the client hears goodbye, the connection is gone; it may ask again.
pub(super) fn revoke_last(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options { resources: vec![host()], ..Options::default() })?;
    lab.connect(0, &[host()])?;
    let client = &cx.topology.clients[0].namespace;
    let transfer = Download::start(cx, client, "transfer", &format!("http://{}/slow", LAN_HOST.0))?;
    transfer.wait_growth(2 * SECOND)?;

    lab.portal.reject_access(lab.client_id(0)?, host().id)?;
    lab.clients[0].wait_goodbye(SECOND)?;
    std::thread::sleep(SECOND / 5);
    ensure!(transfer.growth_within(SECOND) == 0, "bytes arrived after the last resource was revoked");
    ensure!(ping(client, LAN_HOST.0.into()).is_err(), "an echo came back over a connection that is gone");

    lab.clients[0].forget_events();
    lab.connect(0, &[host()])?;
    ping(client, LAN_HOST.0.into()).context("after a new authorization")?;
    lab.finish()
}

/// An authorization ends by its own time; one that lasts is not touched.
pub(super) fn expiry(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options { resources: vec![host(), host_2()], ..Options::default() })?;
    lab.connect(0, &[host_2()])?;
    lab.portal.set_expiry(Some(4 * SECOND));
    let asked = Instant::now();
    lab.connect(0, &[host()])?;
    let client = &cx.topology.clients[0].namespace;
    ping(client, LAN_HOST.0.into())?;
    wait_prohibited(client, LAN_HOST.0.into(), 8 * SECOND)?;
    let after = asked.elapsed();
    // `expires_at` is in whole seconds, and the gateway looks once a second.
    ensure!(after > 2 * SECOND && after < 7 * SECOND, "expired after {after:?} instead of 4 s");
    ping(client, LAN_HOST_2.0.into())?;
    lab.finish()
}

/// Filters say which ports, and new ones count from the next packet.
pub(super) fn filters(cx: &mut Context) -> Result<()> {
    let only = |port| vec![lan4().with_filters([Filter::tcp(port, port)]), lan6()];
    let mut lab = Lab::start(cx, &Options { resources: only(80), ..Options::default() })?;
    lab.connect(0, &only(80))?;
    let client = &cx.topology.clients[0].namespace;
    let check = |open: u16, closed: u16| -> Result<()> {
        let url = |port: u16| format!("http://{}:{port}/", LAN_HOST.0);
        curl(client, &[&url(open)])?.success().with_context(|| format!("port {open}"))?;
        let refused = curl(client, &[&url(closed)])?;
        ensure!(!refused.status.success(), "port {closed} answers");
        // ICMP 3/13 makes connect() fail at once; silence would take curl's 5 s.
        ensure!(refused.took < 2 * SECOND, "port {closed} was dropped in silence for {:?}", refused.took);
        Ok(())
    };
    check(80, 8080)?;
    let said = ping_raw(client, &[&LAN_HOST.0.to_string()])?.stdout;
    ensure!(is_prohibited(&said), "ICMP is not among the filters, yet ping said {said}");
    ping(client, LAN_HOST.1.into()).context("the other resource has no filters")?;

    lab.portal.resource_updated(&only(8080)[0]);
    std::thread::sleep(SECOND / 5);
    check(8080, 80)?;
    lab.portal.resource_updated(&lan4().with_filters([Filter::Icmp]));
    std::thread::sleep(SECOND / 5);
    ping(client, LAN_HOST.0.into()).context("ICMP is now permitted")?;
    lab.finish()
}

/// Two clients, one with the network, one with a single host of it.
pub(super) fn overlapping_resources(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options { resources: vec![lan4(), host(), lan6()], ..Options::default() })?;
    lab.connect(0, &[lan4(), host(), lan6()])?;
    lab.connect(1, &[host()])?;
    let [wide, narrow] = [0, 1].map(|index| &cx.topology.clients[index].namespace);
    ping_both(wide)?;
    http_both(wide)?;
    ping(wide, LAN_HOST_2.0.into())?;
    ping(narrow, LAN_HOST.0.into())?;
    // The narrow client's own routes would not even try; the gateway must refuse it all the same.
    narrow.ip_batch(&[format!("route replace {}/32 dev {INTERFACE}", LAN_HOST_2.0)])?;
    wait_prohibited(narrow, LAN_HOST_2.0.into(), SECOND)?;
    // Without the host, the wide client still has the network.
    lab.portal.reject_access(lab.client_id(0)?, host().id)?;
    std::thread::sleep(SECOND / 5);
    ping(wide, LAN_HOST.0.into())?;
    ping(narrow, LAN_HOST.0.into()).context("the other client's authorization")?;
    // And when the wide client has lost everything, the narrow one has not.
    lab.portal.reject_access(lab.client_id(0)?, lan4().id)?;
    wait_prohibited(wide, LAN_HOST.0.into(), SECOND)?;
    ping(narrow, LAN_HOST.0.into())?;
    lab.finish()
}

/// A client that sends with a source address that is not its own is refused, and the LAN sees nothing.
pub(super) fn spoofed_source(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    ping_both(client)?;
    cx.topology.lan.nft(
        r#"table inet watch {
          counter echo_requests {}
          chain input {
            type filter hook input priority filter;
            icmp type echo-request counter name echo_requests
            icmpv6 type echo-request counter name echo_requests
          }
        }"#,
    )?;
    let foreign = Ipv4Addr::new(100, 64, 9, 9);
    client.ip_batch(&[
        format!("addr add {foreign}/32 dev {INTERFACE}"),
        format!("addr add fd00:2021:1111::9:9/128 dev {INTERFACE} nodad"),
    ])?;
    for (source, target) in [
        (foreign.to_string(), LAN_HOST.0.to_string()),
        ("fd00:2021:1111::9:9".to_owned(), LAN_HOST.1.to_string()),
    ] {
        // The kernel makes a fresh IPv6 address its own by a work queue; what answers a ping before that is lost.
        wait_for(&format!("{source} to be the client's"), 2 * SECOND, || {
            let route = run(client, SECOND, &["ip", "route", "get", &source])?.success()?;
            Ok(route.starts_with("local ").then_some(()))
        })?;
        let said = ping_raw(client, &["-I", &source, &target])?.stdout;
        ensure!(is_prohibited(&said), "as {source}, ping to {target} said {said}");
    }
    let list =
        run(&cx.topology.lan, SECOND * 2, &["nft", "list", "counter", "inet", "watch", "echo_requests"])?;
    let list = list.success()?;
    ensure!(list.contains("packets 0 "), "the LAN saw a packet with a foreign source: {list}");
    ping_both(client).context("with its own source")?;
    lab.finish()
}

/// On its own tunnel address the gateway answers echo, and opens no port of the host.
pub(super) fn gateway_own_address(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    let init = lab.portal.wait_for(SECOND, |entry| entry.to_gateway("init"))?;
    let own: Ipv4Addr =
        init.payload()["interface"]["ipv4"].as_str().context("an address in init")?.parse()?;
    client.ip_batch(&[format!("route replace {own}/32 dev {INTERFACE}")])?;
    ping(client, IpAddr::V4(own)).context("the gateway's own tunnel address answers echo")?;
    let refused = curl(client, &[&format!("http://{own}:8080/healthz")])?;
    ensure!(!refused.status.success(), "a client reaches the health port of the gateway through the tunnel");
    ensure!(lab.portal.online(Role::Gateway).len() == 1, "the gateway is still connected");
    lab.finish()
}
