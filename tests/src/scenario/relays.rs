//! Relays come and go while clients use them, and clients while relays remember them.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;

use super::{
    Context,
    lab::{
        Download, Lab, Options, host, host_2, http_both, is_up, lan4, lan6, ping, ping_raw, start_gateway,
    },
};
use crate::{
    net::{
        process::wait_for,
        topology::{LAN_HOST, LAN_HOST_2},
    },
    standins::{
        client::{self, Command, Event},
        portal::{self, Relay, Resource},
    },
};

const SECOND: Duration = Duration::from_secs(1);

/// A transfer of this many bytes takes six seconds at the pace of `/slow`.
const PART: usize = 30_000_000;

/// How long traffic may stand still when the relay in use is started again: the client's checks come every 1.5 s, 2 s
/// without one make the gateway ask, and a relay that was not up yet is asked again a second later. The rest is room for
/// a busy machine.
const RELAY_FORGOT: Duration = Duration::from_secs(8);

/// The relay in use is killed and started again: all allocations are lost, and nobody tells the gateway. It asks the
/// quiet relay, gets another allocation and tells the client, whose connection lives on.
pub(super) fn restarted(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options { rust_log: "info,gateway_proto=debug", ..Options::default() })?;
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    http_both(client)?;
    for round in 0..3 {
        lab.clients[0].forget_events();
        let gone = Instant::now();
        lab.restart_relay(cx, 0)?;
        wait_for("an echo from the LAN", RELAY_FORGOT, || {
            let said = ping_raw(client, &["-W", "0.2", &LAN_HOST.0.to_string()])?;
            Ok(said.status.success().then_some(()))
        })?;
        println!(
            "      round {round}: echoes again {:.1} s after the relay's restart",
            gone.elapsed().as_secs_f64()
        );
        http_both(client)?;
        let closed = lab.clients[0].wait_for("closed", SECOND, |event| matches!(event, Event::Closed { .. }));
        ensure!(closed.is_err(), "the client gave its connection up");
    }
    lab.finish()
}

/// Asks for these again and again until there is a session.
pub(super) fn reconnect(lab: &mut Lab, index: usize, resources: &[Resource], limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        lab.clients[index].forget_events();
        for resource in resources {
            lab.clients[index].request(resource.id)?;
        }
        match lab.clients[index].wait_established(5 * SECOND) {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => {}
        }
    }
}

/// `relays_presence` takes the relay in use away and offers another one, back and forth, while a transfer runs. Both
/// relays live on, so that every byte can arrive.
pub(super) fn replaced(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options { resources: vec![host()], ..Options::default() })?;
    lab.connect(0, &[host()])?;
    let client = &cx.topology.clients[0].namespace;
    let mut offers: Vec<Relay> = Vec::new();
    lab.portal.configure(|config| offers = config.relays.clone());
    let transfer = Download::start_part(cx, client, "transfer", PART)?;
    transfer.wait_growth(2 * SECOND)?;
    for remaining in [&offers[1], &offers[0]] {
        // First both, then one: nobody is ever without.
        lab.portal.set_relays(offers.clone());
        std::thread::sleep(SECOND / 2);
        lab.portal.set_relays(vec![remaining.clone()]);
        transfer.wait_growth(10 * SECOND).context("after a relay was replaced")?;
        std::thread::sleep(SECOND / 2);
    }
    transfer.finish_part(cx, PART, 30 * SECOND)?;
    lab.finish()
}

/// The portal takes all relays away: `no_relays` is sent, the direct connection lives on. They come back: new requests
/// are served.
pub(super) fn all_gone(cx: &mut Context) -> Result<()> {
    let options = Options {
        resources: vec![host(), host_2()],
        rust_log: "info,gateway_proto=debug",
        ..Options::default()
    };
    let mut lab = Lab::start(cx, &options)?;
    lab.connect(0, &[host()])?;
    let client = &cx.topology.clients[0].namespace;
    let usable = |expected: bool| {
        wait_for(&format!("/readyz to say that a relay is up: {expected}"), 5 * SECOND, || {
            Ok((is_up(cx, "relay")? == expected).then_some(()))
        })
    };
    usable(true)?;
    let transfer = Download::start_part(cx, client, "transfer", PART)?;
    let mut offers = Vec::new();
    lab.portal.configure(|config| offers = config.relays.clone());
    let taken = lab.portal.mark();
    lab.portal.set_relays(Vec::new());
    lab.portal.wait_since(taken, 2 * SECOND, |entry| entry.from_gateway("no_relays"))?;
    usable(false)?;
    transfer.wait_growth(2 * SECOND).context("without relays")?;
    // More than the 2 s after which a connection that lost its path is given up.
    std::thread::sleep(3 * SECOND);
    transfer.wait_growth(2 * SECOND).context("3 s without relays")?;
    lab.clients[0].forget_events();
    lab.portal.set_relays(offers);
    usable(true)?;
    lab.clients[0].request(host_2().id)?;
    // The client waits 5 s for a relay of its own before it asks without; for a direct connection it needs none.
    lab.clients[0].wait_authorized(host_2().id, 8 * SECOND)?;
    ping(client, LAN_HOST_2.0.into()).context("a resource granted after the relays came back")?;
    transfer.finish_part(cx, PART, 30 * SECOND)?;
    ensure!(lab.gateway.poll().is_none(), "the gateway lives");
    lab.finish()
}

/// A relay is away for longer than the gateway waits, at a portal that knows no `no_relays` and saw nothing: the gateway
/// joins anew, for the `init` that names the relay again. The direct connection lives on.
pub(super) fn away_at_nov25(cx: &mut Context) -> Result<()> {
    let (portal, client) = (portal::Generation::V1Only, client::Generation::Nov25);
    let options = Options { portal, client, ..Options::default() };
    let mut lab = Lab::start(cx, &options)?;
    lab.connect(0, &[lan4(), lan6()])?;
    let usable = |expected: bool, limit| {
        wait_for(&format!("/readyz to say that a relay is up: {expected}"), limit, || {
            Ok((is_up(cx, "relay")? == expected).then_some(()))
        })
    };
    usable(true, 5 * SECOND)?;
    let mark = lab.portal.mark();
    lab.relays[0].process().signal(Signal::STOP)?;
    // The keep-alive comes 25 s after the last sign of life, and its repetitions take 8 s.
    usable(false, 40 * SECOND)?;
    lab.relays[0].process().signal(Signal::CONT)?;
    let found = Instant::now();
    lab.portal.wait_since(mark, 35 * SECOND, |entry| entry.to_gateway("init"))?;
    usable(true, 5 * SECOND)?;
    println!("      a relay again {:.1} s after the last was given up", found.elapsed().as_secs_f64());
    http_both(&cx.topology.clients[0].namespace)?;
    lab.finish()
}

/// A change of address may interrupt a transfer for this long (issue 3): a new log-in, a relay, ICE, a handshake, and the
/// next retransmission of a TCP sender that has doubled its time-out meanwhile.
const RECOVERED: Duration = Duration::from_secs(2);

/// The client gets another address in the middle of a transfer: new key, new login, same tunnel address. The transfer
/// stands still and then goes on to its last byte.
pub(super) fn roams_mid_transfer(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options { resources: vec![host()], ..Options::default() })?;
    lab.connect(0, &[host()])?;
    let client = &cx.topology.clients[0].namespace;
    let transfer = Download::start_part(cx, client, "transfer", PART)?;
    transfer.wait_growth(2 * SECOND)?;
    for (old, new) in [(2, 3), (3, 4)] {
        client.ip_batch(&[
            format!("addr del 192.0.2.{old}/26 dev eth0"),
            format!("addr add 192.0.2.{new}/26 dev eth0"),
            "route replace default via 192.0.2.1".to_owned(),
        ])?;
        lab.clients[0].forget_events();
        let moved = Instant::now();
        lab.clients[0].command(&Command::Roam)?;
        lab.clients[0].wait_established(10 * SECOND)?;
        transfer.wait_growth(10 * SECOND).with_context(|| format!("from 192.0.2.{new}"))?;
        let stood = moved.elapsed();
        println!("      from 192.0.2.{new} the transfer goes on after {:.2} s", stood.as_secs_f64());
        ensure!(stood < RECOVERED, "the transfer stood still for {stood:?}");
    }
    transfer.finish_part(cx, PART, 30 * SECOND)?;
    lab.finish()
}

/// The gateway is killed without a chance to clean up, and started again while the client stays: its rules are adopted,
/// not doubled, and the client comes back.
pub(super) fn gateway_killed(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    http_both(client)?;
    ensure!(rules(cx)? == [1, 1], "rules while it runs: {:?}", rules(cx)?);
    lab.gateway.signal(Signal::KILL)?;
    lab.gateway.wait(2 * SECOND)?;
    ensure!(rules(cx)? == [1, 1], "rules of a killed gateway: {:?}", rules(cx)?);
    lab.clients[0].forget_events();
    let (killed, mark) = (Instant::now(), lab.portal.mark());
    lab.gateway = start_gateway(cx, "gateway-again", &lab.gateway_token, &lab.portal.url(), "info")?;
    lab.portal.wait_since(mark, 10 * SECOND, |entry| entry.to_gateway("init"))?;
    // As the first packet after the outage would: the portal grants anew, with the new gateway's key.
    reconnect(&mut lab, 0, &[lan4(), lan6()], 30 * SECOND)?;
    wait_for("HTTP again", 10 * SECOND, || Ok(http_both(client).ok()))?;
    println!("      HTTP again {:.1} s after SIGKILL", killed.elapsed().as_secs_f64());
    ensure!(rules(cx)? == [1, 1], "rules after the restart: {:?}", rules(cx)?);
    ping(client, LAN_HOST.0.into())?;
    lab.terminate(3 * SECOND)?;
    ensure!(rules(cx)? == [0, 0], "rules that are left behind: {:?}", rules(cx)?);
    Ok(())
}

/// How many rules of priority 100 there are, IPv4 and IPv6.
fn rules(cx: &Context) -> Result<[usize; 2]> {
    let count = |family: &str| -> Result<usize> {
        let command = ["ip", family, "rule", "list", "priority", "100"];
        let said =
            crate::net::process::run(&cx.topology.gateway.namespace, 2 * SECOND, &command)?.success()?;
        Ok(said.lines().filter(|line| !line.trim().is_empty()).count())
    };
    Ok([count("-4")?, count("-6")?])
}
