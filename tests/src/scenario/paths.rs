//! A client reaches the LAN, over every kind of path.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::{
    Context,
    lab::{GATEWAY_NAME, Lab, Options, PATIENCE, curl, http_both, lan4, lan6, ping_both},
};
use crate::{
    net::{
        process::wait_for,
        topology::{Node, Plan},
        wire::Link,
    },
    standins::{
        client::{self, Command, Event, Path},
        portal::{self, Role},
    },
};

const SECOND: Duration = Duration::from_secs(1);

/// Public addresses: the direct path is taken.
pub(super) fn direct(cx: &mut Context) -> Result<()> {
    reach_the_lan(cx, &Options::default(), false)
}

/// Where nothing else works, the relay is.
pub(super) fn relayed(cx: &mut Context) -> Result<()> {
    reach_the_lan(cx, &Options::default(), true)
}

/// A client and a portal of Nov-2025: both on the v1 endpoints, the gateway finds its own way there.
pub(super) fn nov25(cx: &mut Context) -> Result<()> {
    let (portal, client) = (portal::Generation::V1Only, client::Generation::Nov25);
    reach_the_lan(cx, &Options { portal, client, ..Options::default() }, false)
}

/// A Nov-2025 client at a portal that serves both generations.
pub(super) fn nov25_client(cx: &mut Context) -> Result<()> {
    reach_the_lan(cx, &Options { client: client::Generation::Nov25, ..Options::default() }, true)
}

fn reach_the_lan(cx: &Context, options: &Options, relayed: bool) -> Result<()> {
    let mut lab = Lab::start(cx, options)?;
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    ping_both(client)?;
    http_both(client)?;
    // Behind NATs the relay may answer first: until both sides have sent, each NAT drops what the other sends. ICE then
    // replaces the pair (RFC 8445 section 8.1.1).
    let mut taken = None;
    wait_for("the best path", 5 * SECOND, || {
        taken = path(cx, &mut lab);
        Ok(taken.is_some_and(|(_, is_relayed)| is_relayed == relayed).then_some(()))
    })
    .with_context(|| format!("the path is {taken:?}"))?;
    ping_both(client)?;
    // The LAN sees the gateway, not the client.
    let seen = curl(client, &["http://172.20.0.100/whoami"])?.success()?;
    ensure!(seen.trim() == "172.20.0.1", "the LAN host saw {seen}");
    let gateway = lab.portal.id_of(Role::Gateway, GATEWAY_NAME);
    ensure!(gateway.is_some(), "the portal does not know the gateway by its name {GATEWAY_NAME}");
    lab.finish()
}

/// The path of client 0, and whether it is through a relay. A relay's address that a check came from before its candidate did
/// is none to the client (RFC 8445 section 7.3.1.3): it takes the path for a direct one.
fn path(cx: &Context, lab: &mut Lab) -> Option<(Path, bool)> {
    let last = lab.clients[0].events().iter().rev().find_map(|event| match event {
        Event::Path { kind, remote, .. } => Some((*kind, remote.ip())),
        _ => None,
    });
    let (kind, remote) = last?;
    let is_relays = |node: &Node| remote == node.v4 || node.v6.is_some_and(|v6| remote == v6);
    Some((kind, kind.is_relayed() || cx.topology.relays.iter().any(is_relays)))
}

/// The relay in use dies; the portal says so; the connection moves to the other one.
pub(super) fn relay_dies(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    http_both(client)?;
    // Whichever it chose: the first dies and comes back, then the second dies.
    let mut offers = Vec::new();
    lab.portal.configure(|config| offers = config.relays.clone());
    for gone in 0..2 {
        let remaining: Vec<_> =
            offers.iter().enumerate().filter(|(i, _)| *i != gone).map(|(_, o)| o.clone()).collect();
        lab.relays[gone].process().signal(rustix::process::Signal::STOP)?;
        lab.portal.set_relays(remaining);
        wait_for("HTTP over the other relay", 20 * SECOND, || Ok(http_both(client).ok()))
            .with_context(|| format!("relay{gone} is gone"))?;
        lab.relays[gone].process().signal(rustix::process::Signal::CONT)?;
        lab.portal.set_relays(offers.clone());
        std::thread::sleep(SECOND);
    }
    lab.finish()
}

/// The direct way closes under a live connection. The client gives its pair up after 16.5 s (connections.md section
/// 6.6) and goes on through the relay; the gateway must follow it there.
pub(super) fn direct_way_closes(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    http_both(client)?;
    cx.topology.block_direct()?;
    wait_for("HTTP over the relay", 45 * SECOND, || Ok(http_both(client).ok()))?;
    let taken = lab.clients[0].path().context("the client named no path")?;
    ensure!(taken.is_relayed(), "the path is {taken:?}");
    cx.topology.allow_direct()?;
    http_both(client)?;
    lab.finish()
}

/// The portal offers relays only after the client has asked: the authorization waits, and is then served.
pub(super) fn relay_arrives_late(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options { hold_relays: true, ..Options::default() })?;
    let asked = lab.portal.mark();
    lab.portal.authorize(lab.client_id(0)?, lan4().id)?;
    lab.portal
        .wait_since(asked, 2 * SECOND, |entry| entry.from_gateway("no_relays"))
        .context("no_relays, at once")?;
    std::thread::sleep(2 * SECOND);
    let early = lab.portal.log_since(asked).iter().any(|entry| entry.from_gateway("authorization_created"));
    ensure!(!early, "acknowledged before any relay was there");
    let offered = lab.portal.mark();
    lab.portal.hold_relays(false);
    lab.portal
        .wait_since(offered, 8 * SECOND, |entry| entry.from_gateway("authorization_created"))
        .context("the parked authorization")?;
    // The client may have heard of it before it had an allocation of its own; then it asks again.
    lab.clients[0].wait_relay(PATIENCE)?;
    lab.connect(0, &[lan4(), lan6()])?;
    http_both(&cx.topology.clients[0].namespace)?;
    lab.finish()
}

/// The client's network changes: new address, new key, new login.
pub(super) fn client_roams(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    http_both(client)?;
    for (old, new) in [(2, 3), (3, 4)] {
        client.ip_batch(&[
            format!("addr del 192.0.2.{old}/26 dev eth0"),
            format!("addr add 192.0.2.{new}/26 dev eth0"),
            "route replace default via 192.0.2.1".to_owned(),
        ])?;
        lab.clients[0].forget_events();
        lab.clients[0].command(&Command::Roam)?;
        lab.clients[0].wait_joined(PATIENCE)?;
        lab.clients[0].wait_relay(PATIENCE)?;
        lab.connect(0, &[lan4(), lan6()])?;
        http_both(client)?;
    }
    lab.finish()
}

/// The client dies without a word and comes again while the gateway still believes in the old connection.
pub(super) fn client_vanishes(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    http_both(client)?;
    for _ in 0..2 {
        lab.clients[0].forget_events();
        lab.clients[0].command(&Command::Vanish)?;
        lab.connect(0, &[lan4(), lan6()])?;
        http_both(client)?;
    }
    lab.finish()
}

/// 20 ms and 1 % loss on each access link.
pub(super) fn lossy_plan() -> Plan {
    let link = Link { delay: Duration::from_millis(20), loss: 0.01, rate: Some(100_000_000), mtu: 1500 };
    Plan { link, ..Plan::new("direct, 20 ms and 1 % loss on each access link") }
}

/// Loss and delay only cost time.
pub(super) fn lossy(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    for _ in 0..5 {
        http_both(client)?;
    }
    lab.finish()
}
